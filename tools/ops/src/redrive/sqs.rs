//! SQS behind [`Queues`].

use std::time::Duration;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::error::SdkError;
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry,
    DeleteMessageBatchRequestEntry, Message, MessageSystemAttributeName,
    SendMessageBatchRequestEntry,
};
use aws_smithy_types::error::display::DisplayErrorContext;
use chrono::{DateTime, Utc};
use delivery::{Backoff, BatchLimits, PUBLISH_MAX_BYTES, pack, with_call_timeout};

use super::{HOLD, Intake, Letter, MAX_BATCH, QueueError, Queues, Results};

/// Seconds of a long poll: above zero, so that all servers are asked.
const WAIT_SECONDS: i32 = 1;

/// Tries of one message in one request.
const MAX_TRIES: u32 = 4;

const BACKOFF: Backoff = Backoff {
    base: Duration::from_millis(100),
    cap: Duration::from_secs(2),
};

/// Bytes of a message's attributes at most, beside its body: what a rejection
/// adds is gone, and the rest came with the message.
const LIMITS: BatchLimits = BatchLimits {
    entries: MAX_BATCH,
    bytes: PUBLISH_MAX_BYTES,
};

/// Why a record does not go to the input queue: no task could read it.
const NEEDS_INTAKE: &str =
    "it is Lambda's record of a failed invocation; --intake FUNCTION has intake take what is in it";

/// Where letters go back to.
pub enum WayBack {
    /// Nowhere: nothing is sent back.
    None,
    /// The input queue, by its URL.
    Queue(String),
    /// Intake.
    Intake(Intake),
}

/// The dead-letter queue and the way back.
pub struct SqsQueues {
    client: Client,
    dead_letters: String,
    back: WayBack,
}

impl SqsQueues {
    /// The dead-letter queue by its URL, and the way back.
    pub fn new(sdk: &SdkConfig, dead_letters: &str, back: WayBack) -> Self {
        Self {
            client: Client::new(&with_call_timeout(sdk)),
            dead_letters: dead_letters.to_owned(),
            back,
        }
    }

    /// Sends bodies to the input queue.
    async fn send_to(&self, input: &str, letters: &[&Letter]) -> Results {
        let mut results = Vec::with_capacity(letters.len());
        let sizes: Vec<usize> = letters.iter().map(|letter| bytes_of(letter)).collect();
        for range in pack(&sizes, LIMITS) {
            let request_letters = &letters[range];
            let sent = retried(request_letters.len(), move |positions| async move {
                let mut request = self.client.send_message_batch().queue_url(input);
                for position in &positions {
                    let letter = request_letters[*position];
                    let mut entry = SendMessageBatchRequestEntry::builder()
                        .id(position.to_string())
                        .message_body(&letter.body);
                    for (name, value) in &letter.attributes {
                        entry = entry.message_attributes(name, value.clone());
                    }
                    request = request.entries(entry.build().expect("id and body are set"));
                }
                let response = request.send().await;
                failures(response.map(|response| response.failed))
            });
            results.extend(sent.await);
        }
        results
    }
}

#[async_trait]
impl Queues for SqsQueues {
    async fn receive(&self) -> Result<Vec<Letter>, QueueError> {
        let response = self
            .client
            .receive_message()
            .queue_url(&self.dead_letters)
            .max_number_of_messages(MAX_BATCH as i32)
            .wait_time_seconds(WAIT_SECONDS)
            .visibility_timeout(HOLD.as_secs() as i32)
            .message_attribute_names("All")
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount)
            .message_system_attribute_names(MessageSystemAttributeName::SentTimestamp)
            .send()
            .await
            .map_err(|error| QueueError {
                operation: "ReceiveMessage",
                queue: self.dead_letters.clone(),
                problem: DisplayErrorContext(&error).to_string(),
            })?;
        let now = Utc::now();
        let messages = response.messages().iter();
        Ok(messages.map(|message| letter_of(message, now)).collect())
    }

    async fn hold(&self, receipts: &[&str], time: Duration) -> Results {
        let seconds = i32::try_from(time.as_secs()).unwrap_or(i32::MAX);
        retried(receipts.len(), move |positions| async move {
            let mut request = self
                .client
                .change_message_visibility_batch()
                .queue_url(&self.dead_letters);
            for position in &positions {
                let entry = ChangeMessageVisibilityBatchRequestEntry::builder()
                    .id(position.to_string())
                    .receipt_handle(receipts[*position])
                    .visibility_timeout(seconds)
                    .build()
                    .expect("id and handle are set");
                request = request.entries(entry);
            }
            let response = request.send().await;
            failures(response.map(|response| response.failed))
        })
        .await
    }

    async fn send(&self, letters: &[&Letter]) -> Results {
        match &self.back {
            WayBack::None => vec![Err("no way back is named".to_owned()); letters.len()],
            WayBack::Intake(intake) => intake.take_all(letters).await,
            WayBack::Queue(input) => {
                let bodies: Vec<&Letter> = letters
                    .iter()
                    .copied()
                    .filter(|letter| !letter.fields.is_record)
                    .collect();
                let mut sent = self.send_to(input, &bodies).await.into_iter();
                letters
                    .iter()
                    .map(|letter| match letter.fields.is_record {
                        true => Err(NEEDS_INTAKE.to_owned()),
                        false => sent.next().unwrap_or_else(|| Err("no result".to_owned())),
                    })
                    .collect()
            }
        }
    }

    async fn delete(&self, receipts: &[&str]) -> Results {
        retried(receipts.len(), move |positions| async move {
            let mut request = self
                .client
                .delete_message_batch()
                .queue_url(&self.dead_letters);
            for position in &positions {
                let entry = DeleteMessageBatchRequestEntry::builder()
                    .id(position.to_string())
                    .receipt_handle(receipts[*position])
                    .build()
                    .expect("id and handle are set");
                request = request.entries(entry);
            }
            let response = request.send().await;
            failures(response.map(|response| response.failed))
        })
        .await
    }
}

fn letter_of(message: &Message, now: DateTime<Utc>) -> Letter {
    let system = |name: MessageSystemAttributeName| {
        let attributes = message.attributes()?;
        attributes.get(&name)?.parse::<i64>().ok()
    };
    let no_attributes = std::collections::HashMap::new();
    Letter::new(
        message.message_id().unwrap_or_default(),
        message.receipt_handle().unwrap_or_default(),
        message.body().unwrap_or_default(),
        message.message_attributes().unwrap_or(&no_attributes),
        system(MessageSystemAttributeName::ApproximateReceiveCount)
            .and_then(|count| u64::try_from(count).ok()),
        system(MessageSystemAttributeName::SentTimestamp).and_then(DateTime::from_timestamp_millis),
        now,
    )
}

fn bytes_of(letter: &Letter) -> usize {
    let attributes = letter.attributes.iter().map(|(name, value)| {
        let text = value.string_value().map_or(0, str::len);
        let binary = value.binary_value().map_or(0, |blob| blob.as_ref().len());
        name.len() + value.data_type().len() + text + binary
    });
    letter.body.len() + attributes.sum::<usize>()
}

/// What failed in one request, by the entries' positions; or the whole of it.
enum Failed {
    Some(Vec<(usize, String)>),
    All(String),
}

fn failures<E, R>(response: Result<Vec<BatchResultErrorEntry>, SdkError<E, R>>) -> Failed
where
    E: std::error::Error + 'static,
    R: std::fmt::Debug,
    SdkError<E, R>: std::error::Error,
{
    match response {
        Err(error) => Failed::All(DisplayErrorContext(&error).to_string()),
        Ok(failed) => Failed::Some(
            failed
                .iter()
                .filter_map(|failure| {
                    let position = failure.id().parse().ok()?;
                    let message = failure.message().unwrap_or_default();
                    Some((position, format!("{}: {message}", failure.code())))
                })
                .collect(),
        ),
    }
}

/// Makes a request of `count` entries, and again for those that failed.
async fn retried<F>(count: usize, mut request: impl FnMut(Vec<usize>) -> F) -> Results
where
    F: Future<Output = Failed> + Send,
{
    let mut results: Results = vec![Ok(()); count];
    let mut pending: Vec<usize> = (0..count).collect();
    let mut tries = 0;
    while !pending.is_empty() {
        tries += 1;
        let failed = match request(pending.clone()).await {
            Failed::Some(failed) => failed,
            Failed::All(problem) => pending
                .iter()
                .map(|position| (*position, problem.clone()))
                .collect(),
        };
        for position in &pending {
            results[*position] = Ok(());
        }
        pending = Vec::new();
        for (position, problem) in failed {
            if let Some(result) = results.get_mut(position) {
                *result = Err(problem);
                pending.push(position);
            }
        }
        if tries == MAX_TRIES {
            break;
        }
        if !pending.is_empty() {
            tokio::time::sleep(BACKOFF.wait(tries)).await;
        }
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_failed_is_asked_again() {
        let mut requests = Vec::new();
        let results = retried(4, |positions| {
            requests.push(positions);
            let busy = |position| (position, "busy".to_owned());
            std::future::ready(match requests.len() {
                1 => Failed::Some(vec![busy(1), busy(3)]),
                2 => Failed::All("no route".to_owned()),
                _ => Failed::Some(vec![busy(3)]),
            })
        })
        .await;
        assert_eq!(
            requests,
            [vec![0, 1, 2, 3], vec![1, 3], vec![1, 3], vec![3]]
        );
        assert_eq!(results, [Ok(()), Ok(()), Ok(()), Err("busy".to_owned())]);
    }
}
