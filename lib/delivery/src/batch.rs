//! Sending many things through a batch API: packed within its limits, and what
//! failed again.

use std::ops::Range;
use std::time::Duration;

use aws_sdk_sqs::config::http::HttpResponse;
use aws_sdk_sqs::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_sqs::types::BatchResultErrorEntry;
use futures_util::StreamExt;
use futures_util::stream;
use platform::Failure;
use platform::aws::{self, ErrorKind};

use crate::Backoff;

/// Bytes of one request, and so of one event: SNS's limit, and the one of SQS
/// and EventBridge that holds for every queue and bus whatever its settings.
pub const PUBLISH_MAX_BYTES: usize = 256 * 1024;

/// What one request of SNS PublishBatch, SQS SendMessageBatch (and its twins)
/// or EventBridge PutEvents may hold.
const LIMITS: BatchLimits = BatchLimits {
    entries: 10,
    bytes: PUBLISH_MAX_BYTES,
};

/// Tries of one entry. With the backoff below they span about 3 s, so a short
/// throttling does not send the message back through the whole pipeline.
pub(crate) const MAX_TRIES: u32 = 5;

const BACKOFF: Backoff = Backoff {
    base: Duration::from_millis(100),
    cap: Duration::from_secs(2),
};

/// Requests to one place at the same time.
const CONCURRENT_REQUESTS: usize = 4;

/// What became of a request: of each of its entries, or of it as a whole.
pub type Answer = Result<Vec<Result<(), aws::Error>>, aws::Error>;

#[derive(Clone, Copy, Debug)]
struct BatchLimits {
    entries: usize,
    bytes: usize,
}

/// One result per entry of a request to `resource`, from the entries that
/// failed (id, code, message), whose ids are their positions.
pub(crate) fn entry_results<'a>(
    operation: &'static str,
    resource: &str,
    count: usize,
    failed: impl Iterator<Item = (&'a str, &'a str, Option<&'a str>)>,
) -> Vec<Result<(), aws::Error>> {
    let mut all = vec![Ok(()); count];
    for (id, code, message) in failed {
        if let Some(result) = id.parse::<usize>().ok().and_then(|at| all.get_mut(at)) {
            let error = aws::Error::of_code(operation, code, message.unwrap_or("no message"));
            *result = Err(error.of(resource));
        }
    }
    all
}

/// What a batch request to an SQS queue answered, from the failed entries of
/// its response.
pub fn sqs_answer<E>(
    operation: &'static str,
    queue: &str,
    count: usize,
    response: Result<Vec<BatchResultErrorEntry>, SdkError<E, HttpResponse>>,
) -> Answer
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let failed = response.map_err(|error| aws::Error::from_sdk(operation, &error).of(queue))?;
    let failed = failed.iter();
    let failed = failed.map(|failure| (failure.id(), failure.code(), failure.message()));
    Ok(entry_results(operation, queue, count, failed))
}

/// Sends items to the place that is called `place` in the log, and again those
/// that failed; one result per item. An error is permanent when the item
/// itself is at fault. Anything else (access, a missing topic, throttling, the
/// network) is about the place, which may be mended while the item waits.
pub async fn send_all<'a, T, Sending>(
    place: &str,
    items: &'a [T],
    bytes: impl Fn(&T) -> usize,
    send: impl Fn(Vec<&'a T>) -> Sending,
) -> Vec<Result<(), aws::Error>>
where
    Sending: Future<Output = Answer>,
{
    let mut results = vec![Ok(()); items.len()];
    let mut pending: Vec<usize> = (0..items.len()).collect();
    // A request with others in it was refused as a whole: alone, only the one
    // at fault is refused.
    let mut goes_alone = vec![false; items.len()];
    let mut tries = 0;
    while !pending.is_empty() {
        tries += 1;
        let (alone, together): (Vec<usize>, Vec<usize>) =
            pending.drain(..).partition(|index| goes_alone[*index]);
        let sizes: Vec<usize> = together.iter().map(|index| bytes(&items[*index])).collect();
        let packed = pack(&sizes, LIMITS).into_iter();
        let requests = packed
            .map(|range| together[range].to_vec())
            .chain(alone.into_iter().map(|index| vec![index]));
        let answers: Vec<(Vec<usize>, Answer)> = stream::iter(requests)
            .map(|request| {
                let sending = send(request.iter().map(|index| &items[*index]).collect());
                async move { (request, sending.await) }
            })
            .buffer_unordered(CONCURRENT_REQUESTS)
            .collect()
            .await;
        for (request, answer) in answers {
            let has_company = answer.is_err() && request.len() > 1;
            let outcomes = answer.unwrap_or_else(|error| vec![Err(error); request.len()]);
            for (index, outcome) in request.into_iter().zip(outcomes) {
                results[index] = outcome.map_err(|error| {
                    let is_fault = matches!(error.kind, ErrorKind::Refused | ErrorKind::TooLarge);
                    goes_alone[index] |= is_fault && has_company;
                    let failure = match is_fault && !has_company {
                        true => Failure::Permanent,
                        false => Failure::Transient,
                    };
                    aws::Error { failure, ..error }
                });
            }
        }
        let is_open = |result: &Result<(), aws::Error>| matches!(result, Err(error) if error.failure == Failure::Transient);
        pending = (0..items.len())
            .filter(|index| is_open(&results[*index]))
            .collect();
        if tries == MAX_TRIES {
            break;
        }
        if let Some(Err(error)) = pending.first().map(|first| &results[*first]) {
            let wait = BACKOFF.wait(tries);
            let wait_ms = wait.as_millis() as u64;
            tracing::warn!(place, failed = pending.len(), tries, wait_ms, %error, "sending again");
            tokio::time::sleep(wait).await;
        }
    }
    results
}

/// Cuts entries of the given sizes into consecutive requests, each within the
/// limits. An entry that is itself over the limit gets a request of its own;
/// callers keep such entries out.
fn pack(sizes: &[usize], limits: BatchLimits) -> Vec<Range<usize>> {
    let mut requests = Vec::new();
    let mut start = 0;
    let mut bytes = 0;
    for (index, size) in sizes.iter().enumerate() {
        let is_full = index - start == limits.entries.max(1);
        if index > start && (is_full || bytes + size > limits.bytes) {
            requests.push(start..index);
            start = index;
            bytes = 0;
        }
        bytes += size;
    }
    if start < sizes.len() {
        requests.push(start..sizes.len());
    }
    requests
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;

    const LIMITS: BatchLimits = BatchLimits {
        entries: 10,
        bytes: 1000,
    };

    fn error(code: &str) -> aws::Error {
        aws::Error::of_code("sqs:SendMessageBatch", code, "why")
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_failed_is_asked_again() {
        let requests = Mutex::new(Vec::new());
        let results = send_all(
            "queue",
            &[0, 1, 2, 3],
            |_| 1,
            |items| {
                let mut requests = requests.lock().unwrap();
                let busy = |item: &&u8| match **item {
                    1 if requests.len() > 1 => Ok(()),
                    1 | 3 => Err(error("InternalError")),
                    _ => Ok(()),
                };
                let answer = match requests.len() {
                    1 => Err(error("Unreachable")),
                    _ => Ok(items.iter().map(busy).collect()),
                };
                requests.push(items.into_iter().copied().collect::<Vec<u8>>());
                std::future::ready(answer)
            },
        )
        .await;
        let requests = requests.into_inner().unwrap();
        assert_eq!(
            requests,
            [vec![0, 1, 2, 3], vec![1, 3], vec![1, 3], vec![3], vec![3]]
        );
        assert_eq!(
            results,
            [Ok(()), Ok(()), Ok(()), Err(error("InternalError"))]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn only_codes_about_the_entry_itself_refuse_it() {
        for (code, is_refused) in [
            ("InvalidParameter", true),
            ("AWS.SimpleQueueService.BatchRequestTooLong", true),
            ("MalformedDetail", true),
            ("ThrottlingException", false),
            ("AccessDenied", false),
            ("NotFound", false),
            ("InternalFailure", false),
            ("", false),
        ] {
            let send = |_| std::future::ready(Ok(vec![Err(error(code))]));
            let results = send_all("topic", &["entry"], |_| 1, send).await;
            let failure = results[0].as_ref().unwrap_err().failure;
            assert_eq!(failure == Failure::Permanent, is_refused, "{code}");
        }
    }

    #[test]
    fn a_failure_is_put_to_the_entry_whose_id_it_names() {
        let failed = [("1", "InternalError", Some("why")), ("nine", "X", None)];
        let all = entry_results("sqs:SendMessageBatch", "queue", 3, failed.into_iter());
        assert_eq!(
            all,
            [Ok(()), Err(error("InternalError").of("queue")), Ok(())]
        );
    }

    #[test]
    fn nothing_makes_no_request() {
        assert!(pack(&[], LIMITS).is_empty());
    }

    proptest! {
        #[test]
        fn every_request_is_within_the_limits_and_nothing_is_left_out(
            sizes in proptest::collection::vec(0usize..=1000, 0..60)
        ) {
            let requests = pack(&sizes, LIMITS);
            let mut next = 0;
            for request in requests {
                prop_assert_eq!(request.start, next);
                prop_assert!(!request.is_empty() && request.len() <= LIMITS.entries);
                prop_assert!(sizes[request.clone()].iter().sum::<usize>() <= LIMITS.bytes);
                next = request.end;
            }
            prop_assert_eq!(next, sizes.len());
        }

        #[test]
        fn no_two_neighbours_would_fit_into_one_request(
            sizes in proptest::collection::vec(0usize..=1000, 0..60)
        ) {
            let requests = pack(&sizes, LIMITS);
            for pair in requests.windows(2) {
                let both = pair[0].start..pair[1].start + 1;
                let fits = both.len() <= LIMITS.entries
                    && sizes[both].iter().sum::<usize>() <= LIMITS.bytes;
                prop_assert!(!fits);
            }
        }
    }
}
