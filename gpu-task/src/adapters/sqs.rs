//! SQS as the input queue.

use std::time::Duration;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry,
    DeleteMessageBatchRequestEntry, MessageSystemAttributeName, QueueAttributeName,
};
use aws_smithy_types::error::display::DisplayErrorContext;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use serde_json::Value;

use crate::rules::failure::{Fatal, is_access_problem};
use crate::services::{
    Extension, LONG_POLL_MAX, LeaseError, Queue, QueueFacts, ReceiveError, Received,
};

/// One try of a receive: the long poll and the network around it.
const RECEIVE_TIMEOUT: Duration = Duration::from_secs(LONG_POLL_MAX.as_secs() + 10);

/// One try of any other call.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Codes that say that a receipt no longer holds its message. SQS answers
/// `InvalidParameterValue` for an expired handle, and for an extension past
/// its 12 hours.
const LOST_CODES: &[&str] = &[
    "InvalidParameterValue",
    "MessageNotInflight",
    "ReceiptHandleIsInvalid",
];

/// Codes that say that the queue cannot be used at all.
const REFUSAL_CODES: &[&str] = &["InvalidAddress", "NonExistentQueue", "QueueDoesNotExist"];

#[derive(Clone)]
pub struct SqsQueue {
    client: Client,
    polling: Client,
    url: String,
}

impl SqsQueue {
    pub fn new(sdk: &SdkConfig, url: &str) -> Self {
        let with_timeout = |timeout: Duration| {
            let timeouts = TimeoutConfig::builder()
                .connect_timeout(Duration::from_secs(3))
                .operation_attempt_timeout(timeout)
                .build();
            Client::new(&sdk.to_builder().timeout_config(timeouts).build())
        };
        Self {
            client: with_timeout(CALL_TIMEOUT),
            polling: with_timeout(RECEIVE_TIMEOUT),
            url: url.to_owned(),
        }
    }

    /// Asks the queue for its redrive policy, which also proves that the
    /// queue exists and that this task may use it.
    pub async fn facts(&self) -> Result<QueueFacts, Fatal> {
        let response = self
            .client
            .get_queue_attributes()
            .queue_url(&self.url)
            .attribute_names(QueueAttributeName::RedrivePolicy)
            .send()
            .await;
        match response {
            Ok(response) => {
                let policy = response
                    .attributes()
                    .and_then(|all| all.get(&QueueAttributeName::RedrivePolicy));
                Ok(QueueFacts {
                    max_receives: policy.and_then(|policy| max_receive_count(policy)),
                })
            }
            Err(error) => Err(Fatal::Access(format!(
                "cannot read the attributes of INPUT_QUEUE_URL={}: {}",
                self.url,
                DisplayErrorContext(&error)
            ))),
        }
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

fn is_refusal(code: Option<&str>, message: &str) -> bool {
    let names_queue = code.is_some_and(|code| REFUSAL_CODES.iter().any(|one| code.contains(one)));
    names_queue || is_access_problem(message)
}

/// One result per entry from the failed entries of a response, whose ids are
/// the entries' positions.
fn results(count: usize, failed: &[BatchResultErrorEntry]) -> Vec<Result<(), LeaseError>> {
    let mut all = vec![Ok(()); count];
    for failure in failed {
        let position = failure.id().parse::<usize>().ok();
        let Some(result) = position.and_then(|position| all.get_mut(position)) else {
            continue;
        };
        let text = format!(
            "{}: {}",
            failure.code(),
            failure.message().unwrap_or_default()
        );
        let is_lost = LOST_CODES.iter().any(|code| failure.code().contains(code));
        *result = Err(if is_lost {
            LeaseError::Lost(text)
        } else {
            LeaseError::Failed(text)
        });
    }
    all
}

#[async_trait]
impl Queue for SqsQueue {
    async fn receive(
        &self,
        max: usize,
        wait: Duration,
        visibility: Duration,
    ) -> Result<Vec<Received>, ReceiveError> {
        let response = self
            .polling
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(max as i32)
            .wait_time_seconds(wait.min(LONG_POLL_MAX).as_secs() as i32)
            .visibility_timeout(visibility.as_secs() as i32)
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount)
            .send()
            .await
            .map_err(|error| {
                let message = DisplayErrorContext(&error).to_string();
                ReceiveError {
                    is_refusal: is_refusal(error.code(), &message),
                    message,
                }
            })?;
        let mut received = Vec::new();
        for message in response.messages.unwrap_or_default() {
            let count = message
                .attributes
                .as_ref()
                .and_then(|all| all.get(&MessageSystemAttributeName::ApproximateReceiveCount))
                .and_then(|count| count.parse().ok())
                .unwrap_or(1);
            let (Some(message_id), Some(receipt)) = (message.message_id, message.receipt_handle)
            else {
                continue;
            };
            received.push(Received {
                message_id,
                receipt,
                body: message.body.unwrap_or_default(),
                receive_count: count,
            });
        }
        Ok(received)
    }

    async fn extend(&self, extensions: &[Extension]) -> Vec<Result<(), LeaseError>> {
        let mut request = self
            .client
            .change_message_visibility_batch()
            .queue_url(&self.url);
        for (position, extension) in extensions.iter().enumerate() {
            let entry = ChangeMessageVisibilityBatchRequestEntry::builder()
                .id(position.to_string())
                .receipt_handle(&extension.receipt)
                .visibility_timeout(extension.visibility.as_secs() as i32)
                .build()
                .expect("id and receipt are set");
            request = request.entries(entry);
        }
        match request.send().await {
            Ok(response) => results(extensions.len(), response.failed()),
            Err(error) => {
                let message = DisplayErrorContext(&error).to_string();
                vec![Err(LeaseError::Failed(message)); extensions.len()]
            }
        }
    }

    async fn acknowledge(&self, receipts: &[String]) -> Vec<Result<(), LeaseError>> {
        let mut request = self.client.delete_message_batch().queue_url(&self.url);
        for (position, receipt) in receipts.iter().enumerate() {
            let entry = DeleteMessageBatchRequestEntry::builder()
                .id(position.to_string())
                .receipt_handle(receipt)
                .build()
                .expect("id and receipt are set");
            request = request.entries(entry);
        }
        match request.send().await {
            Ok(response) => results(receipts.len(), response.failed()),
            Err(error) => {
                let message = DisplayErrorContext(&error).to_string();
                vec![Err(LeaseError::Failed(message)); receipts.len()]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(id: &str, code: &str) -> BatchResultErrorEntry {
        BatchResultErrorEntry::builder()
            .id(id)
            .code(code)
            .sender_fault(true)
            .build()
            .unwrap()
    }

    #[test]
    fn a_stale_receipt_is_a_lost_lease_and_anything_else_is_not() {
        let all = results(
            4,
            &[
                failed("0", "ReceiptHandleIsInvalid"),
                failed("2", "AWS.SimpleQueueService.MessageNotInflight"),
                failed("3", "InternalError"),
            ],
        );
        assert!(matches!(all[0], Err(LeaseError::Lost(_))));
        assert_eq!(all[1], Ok(()));
        assert!(matches!(all[2], Err(LeaseError::Lost(_))));
        assert!(matches!(all[3], Err(LeaseError::Failed(_))));
    }

    #[test]
    fn the_redrive_policy_gives_its_count_as_number_or_text() {
        assert_eq!(max_receive_count(r#"{"maxReceiveCount":5}"#), Some(5));
        assert_eq!(max_receive_count(r#"{"maxReceiveCount":"3"}"#), Some(3));
        assert_eq!(max_receive_count("{}"), None);
    }

    #[test]
    fn a_missing_queue_and_refused_access_are_refusals() {
        let missing = Some("AWS.SimpleQueueService.NonExistentQueue");
        assert!(is_refusal(missing, ""));
        assert!(is_refusal(Some("AccessDenied"), "AccessDenied: no"));
        assert!(!is_refusal(Some("ThrottlingException"), "slow down"));
    }
}
