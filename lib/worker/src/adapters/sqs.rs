//! SQS as the input queue.

use std::time::Duration;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
    MessageSystemAttributeName, QueueAttributeName,
};
use delivery::{Answer, sqs_answer, with_call_timeout, with_timeout};
use platform::aws;
use serde_json::Value;

use crate::rules::failure::Fatal;
use crate::services::{Extension, LONG_POLL_MAX, LeaseError, Queue, QueueFacts, Receipt, Received};

/// One try of a receive: the long poll and the network around it.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(LONG_POLL_MAX.as_secs() + 10);

/// Codes that say that a receipt no longer holds its message. SQS answers
/// `InvalidParameterValue` for an expired handle, and for an extension past
/// its 12 hours.
const LOST_CODES: &[&str] = &[
    "InvalidParameterValue",
    "MessageNotInflight",
    "ReceiptHandleIsInvalid",
];

#[derive(Clone)]
pub struct SqsQueue {
    client: Client,
    polling: Client,
    urls: Vec<String>,
}

impl SqsQueue {
    /// Queues by their URLs, in the order of their numbers.
    pub fn new(sdk: &SdkConfig, urls: Vec<String>) -> Self {
        Self {
            client: Client::new(&with_call_timeout(sdk)),
            polling: Client::new(&with_timeout(sdk, RECEIVE_TIMEOUT)),
            urls,
        }
    }

    /// Asks the queues for their redrive policies, which also proves that they
    /// exist and that this task may use them. Where there are two, the second
    /// one's policy leads into the first.
    pub async fn facts(&self) -> Result<QueueFacts, Fatal> {
        let elsewhere = match self.urls.get(1) {
            Some(url) => self.max_receives(url).await?.unwrap_or_default(),
            None => 0,
        };
        Ok(QueueFacts {
            max_receives: self.max_receives(&self.urls[0]).await?,
            elsewhere,
        })
    }

    async fn max_receives(&self, url: &str) -> Result<Option<u32>, Fatal> {
        let response = self
            .client
            .get_queue_attributes()
            .queue_url(url)
            .attribute_names(QueueAttributeName::RedrivePolicy)
            .send()
            .await
            .map_err(|error| {
                let error = aws::Error::from_sdk("sqs:GetQueueAttributes", &error);
                Fatal::Access(format!(
                    "cannot read the attributes of the queue {url}: {error}"
                ))
            })?;
        let policy = response
            .attributes()
            .and_then(|all| all.get(&QueueAttributeName::RedrivePolicy));
        Ok(policy.and_then(|policy| max_receive_count(policy)))
    }

    /// Positions of what belongs to each queue, none empty.
    fn by_queue(&self, queues: impl Iterator<Item = usize>) -> Vec<(&str, Vec<usize>)> {
        let mut all: Vec<(&str, Vec<usize>)> = self
            .urls
            .iter()
            .map(|url| (url.as_str(), Vec::new()))
            .collect();
        for (position, queue) in queues.enumerate() {
            all[queue].1.push(position);
        }
        all.retain(|(_, positions)| !positions.is_empty());
        all
    }
}

/// `maxReceiveCount` of a redrive policy; AWS takes it as number or as text.
fn max_receive_count(policy: &str) -> Option<u32> {
    let policy: Value = serde_json::from_str(policy).ok()?;
    let count = &policy["maxReceiveCount"];
    let number = count
        .as_u64()
        .or_else(|| count.as_str().and_then(|text| text.parse().ok()));
    number.and_then(|number| u32::try_from(number).ok())
}

/// One result per entry of a request. Only an entry's own error can tell that
/// its lease is lost.
fn results(count: usize, answer: Answer) -> Vec<Result<(), LeaseError>> {
    match answer {
        Err(error) => vec![Err(LeaseError::Failed(error)); count],
        Ok(entries) => entries
            .into_iter()
            .map(|entry| entry.map_err(lease_error))
            .collect(),
    }
}

/// Puts a request's results where its entries stand among `all`.
fn place(all: &mut [Result<(), LeaseError>], positions: &[usize], answer: Answer) {
    for (position, result) in positions.iter().zip(results(positions.len(), answer)) {
        all[*position] = result;
    }
}

fn lease_error(error: aws::Error) -> LeaseError {
    if LOST_CODES.contains(&error.code.as_str()) {
        LeaseError::Lost(error)
    } else {
        LeaseError::Failed(error)
    }
}

#[async_trait]
impl Queue for SqsQueue {
    fn count(&self) -> usize {
        self.urls.len()
    }

    async fn receive(
        &self,
        queue: usize,
        max: usize,
        wait: Duration,
        visibility: Duration,
    ) -> Result<Vec<Received>, aws::Error> {
        let response = self
            .polling
            .receive_message()
            .queue_url(&self.urls[queue])
            .max_number_of_messages(max as i32)
            .wait_time_seconds(wait.min(LONG_POLL_MAX).as_secs() as i32)
            .visibility_timeout(visibility.as_secs() as i32)
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount)
            .send()
            .await
            .map_err(aws::failed("sqs:ReceiveMessage"))?;
        let mut received = Vec::new();
        for message in response.messages.unwrap_or_default() {
            let count = message
                .attributes
                .as_ref()
                .and_then(|all| all.get(&MessageSystemAttributeName::ApproximateReceiveCount))
                .and_then(|count| count.parse().ok())
                .unwrap_or(1);
            let (Some(message_id), Some(handle)) = (message.message_id, message.receipt_handle)
            else {
                continue;
            };
            received.push(Received {
                message_id,
                receipt: Receipt { queue, handle },
                body: message.body.unwrap_or_default(),
                receive_count: count,
            });
        }
        Ok(received)
    }

    async fn extend(&self, extensions: &[Extension]) -> Vec<Result<(), LeaseError>> {
        let mut all = vec![Ok(()); extensions.len()];
        let queues = extensions.iter().map(|extension| extension.receipt.queue);
        for (url, positions) in self.by_queue(queues) {
            let mut request = self.client.change_message_visibility_batch().queue_url(url);
            for (id, position) in positions.iter().enumerate() {
                let extension = &extensions[*position];
                let entry = ChangeMessageVisibilityBatchRequestEntry::builder()
                    .id(id.to_string())
                    .receipt_handle(&extension.receipt.handle)
                    .visibility_timeout(extension.visibility.as_secs() as i32)
                    .build()
                    .expect("id and receipt are set");
                request = request.entries(entry);
            }
            let operation = "sqs:ChangeMessageVisibilityBatch";
            let response = request.send().await.map(|response| response.failed);
            let answer = sqs_answer(operation, url, positions.len(), response);
            place(&mut all, &positions, answer);
        }
        all
    }

    async fn acknowledge(&self, receipts: &[Receipt]) -> Vec<Result<(), LeaseError>> {
        let mut all = vec![Ok(()); receipts.len()];
        for (url, positions) in self.by_queue(receipts.iter().map(|receipt| receipt.queue)) {
            let mut request = self.client.delete_message_batch().queue_url(url);
            for (id, position) in positions.iter().enumerate() {
                let entry = DeleteMessageBatchRequestEntry::builder()
                    .id(id.to_string())
                    .receipt_handle(&receipts[*position].handle)
                    .build()
                    .expect("id and receipt are set");
                request = request.entries(entry);
            }
            let operation = "sqs:DeleteMessageBatch";
            let response = request.send().await.map(|response| response.failed);
            let answer = sqs_answer(operation, url, positions.len(), response);
            place(&mut all, &positions, answer);
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: &str) -> aws::Error {
        aws::Error::of_code("sqs:DeleteMessageBatch", code, "why")
    }

    #[test]
    fn a_stale_receipt_is_a_lost_lease_and_anything_else_is_not() {
        let all = results(
            4,
            Ok(vec![
                Err(error("ReceiptHandleIsInvalid")),
                Ok(()),
                Err(error("AWS.SimpleQueueService.MessageNotInflight")),
                Err(error("InternalError")),
            ]),
        );
        assert!(matches!(all[0], Err(LeaseError::Lost(_))));
        assert_eq!(all[1], Ok(()));
        assert!(matches!(all[2], Err(LeaseError::Lost(_))));
        assert!(matches!(all[3], Err(LeaseError::Failed(_))));
    }

    #[test]
    fn a_request_that_fails_as_a_whole_says_nothing_of_any_lease() {
        let problem = error("InvalidParameterValue");
        let all = results(2, Err(problem.clone()));
        assert_eq!(all, vec![Err(LeaseError::Failed(problem)); 2]);
    }

    #[test]
    fn the_redrive_policy_gives_its_count_as_number_or_text() {
        assert_eq!(max_receive_count(r#"{"maxReceiveCount":5}"#), Some(5));
        assert_eq!(max_receive_count(r#"{"maxReceiveCount":"3"}"#), Some(3));
        assert_eq!(max_receive_count("{}"), None);
    }
}
