//! The three kinds of output, each as its API wants the events.

use async_trait::async_trait;
use aws_sdk_eventbridge::types::PutEventsRequestEntry;
use aws_sdk_sns::types::PublishBatchRequestEntry;
use aws_sdk_sqs::types::SendMessageBatchRequestEntry;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::display::DisplayErrorContext;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use events::{CloudEvent, EventType, SERVICE};

use crate::BatchLimits;

/// Bytes of one request, and so of one event: SNS's limit, and the one of SQS
/// and EventBridge that holds for every queue and bus whatever its settings.
pub const PUBLISH_MAX_BYTES: usize = 256 * 1024;

/// Entries of one SNS PublishBatch, SQS SendMessageBatch or EventBridge
/// PutEvents request.
const MAX_ENTRIES: usize = 10;

const LIMITS: BatchLimits = BatchLimits {
    entries: MAX_ENTRIES,
    bytes: PUBLISH_MAX_BYTES,
};

/// Codes that say that the entry itself is at fault. Anything else (access,
/// a missing topic, throttling, the network) is about the output, which may
/// be mended while the message waits.
const ENTRY_AT_FAULT: &[&str] = &[
    "BatchRequestTooLong",
    "InvalidArgument",
    "InvalidMessageContents",
    "InvalidParameter",
    "InvalidParameterValue",
    "MalformedDetail",
    "MessageTooLong",
    "ValidationError",
    "ValidationException",
];

/// One event as an output takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The message, or EventBridge's `Detail`.
    pub body: String,
    /// What happened, for EventBridge's `DetailType`.
    pub kind: EventType,
    /// The bytes that the API counts for it.
    pub bytes: usize,
}

/// What became of one entry of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The service has it.
    Delivered,
    /// The service will never take it.
    Refused(String),
    /// The service may take it later.
    Failed(String),
}

impl Outcome {
    /// Reads an error code of a batch API.
    fn of_code(code: &str, message: &str) -> Self {
        let text = format!("{code}: {message}");
        // SQS writes some codes as AWS.SimpleQueueService.<code>.
        let short = code.rsplit('.').next().unwrap_or(code);
        if ENTRY_AT_FAULT.contains(&short) {
            Outcome::Refused(text)
        } else {
            Outcome::Failed(text)
        }
    }
}

/// Why a whole request failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallFailure {
    /// Something in the request is at fault: sent one by one, the others pass.
    pub is_refusal: bool,
    /// What the service or the network said.
    pub message: String,
}

impl CallFailure {
    fn from_sdk<E, R>(error: &SdkError<E, R>) -> Self
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
        R: std::fmt::Debug,
    {
        let code = error.code().unwrap_or_default();
        Self {
            is_refusal: matches!(Outcome::of_code(code, ""), Outcome::Refused(_)),
            message: DisplayErrorContext(error).to_string(),
        }
    }
}

/// Somewhere to send events.
#[async_trait]
pub trait Destination: Send + Sync {
    /// Which output it is, for errors and metrics.
    fn name(&self) -> &str;

    /// What one request may hold.
    fn limits(&self) -> BatchLimits {
        LIMITS
    }

    /// The event as this output takes it.
    fn encode(&self, event: &CloudEvent) -> Entry;

    /// Sends one request; answers one outcome per entry.
    async fn send(&self, entries: &[&Entry]) -> Result<Vec<Outcome>, CallFailure>;
}

/// The event in Lakechain's form, as topics and queues carry it.
fn lakechain_entry(event: &CloudEvent) -> Entry {
    let body = event.to_json();
    Entry {
        bytes: body.len(),
        kind: event.kind,
        body,
    }
}

/// Fills outcomes from the failed entries of a response, whose ids are the
/// entries' positions.
fn outcomes<'a>(
    count: usize,
    failed: impl Iterator<Item = (&'a str, &'a str, &'a str)>,
) -> Vec<Outcome> {
    let mut all = vec![Outcome::Delivered; count];
    for (id, code, message) in failed {
        if let Some(outcome) = id.parse::<usize>().ok().and_then(|at| all.get_mut(at)) {
            *outcome = Outcome::of_code(code, message);
        }
    }
    all
}

/// An SNS topic: Lakechain's form, no attributes, no subject.
pub struct Topic {
    client: aws_sdk_sns::Client,
    arn: String,
}

impl Topic {
    /// A topic by its ARN.
    pub fn new(client: aws_sdk_sns::Client, arn: &str) -> Self {
        Self {
            client,
            arn: arn.to_owned(),
        }
    }
}

#[async_trait]
impl Destination for Topic {
    fn name(&self) -> &str {
        "topic"
    }

    fn encode(&self, event: &CloudEvent) -> Entry {
        lakechain_entry(event)
    }

    async fn send(&self, entries: &[&Entry]) -> Result<Vec<Outcome>, CallFailure> {
        let mut request = self.client.publish_batch().topic_arn(&self.arn);
        for (position, entry) in entries.iter().enumerate() {
            let entry = PublishBatchRequestEntry::builder()
                .id(position.to_string())
                .message(&entry.body)
                .build()
                .expect("id and message are set");
            request = request.publish_batch_request_entries(entry);
        }
        let response = request
            .send()
            .await
            .map_err(|error| CallFailure::from_sdk(&error))?;
        let failed = response.failed().iter().map(|failure| {
            let message = failure.message().unwrap_or_default();
            (failure.id(), failure.code(), message)
        });
        Ok(outcomes(entries.len(), failed))
    }
}

/// An SQS queue: Lakechain's form.
pub struct Queue {
    client: aws_sdk_sqs::Client,
    url: String,
}

impl Queue {
    /// A queue by its URL.
    pub fn new(client: aws_sdk_sqs::Client, url: &str) -> Self {
        Self {
            client,
            url: url.to_owned(),
        }
    }
}

#[async_trait]
impl Destination for Queue {
    fn name(&self) -> &str {
        "queue"
    }

    fn encode(&self, event: &CloudEvent) -> Entry {
        lakechain_entry(event)
    }

    async fn send(&self, entries: &[&Entry]) -> Result<Vec<Outcome>, CallFailure> {
        let mut request = self.client.send_message_batch().queue_url(&self.url);
        for (position, entry) in entries.iter().enumerate() {
            let entry = SendMessageBatchRequestEntry::builder()
                .id(position.to_string())
                .message_body(&entry.body)
                .build()
                .expect("id and body are set");
            request = request.entries(entry);
        }
        let response = request
            .send()
            .await
            .map_err(|error| CallFailure::from_sdk(&error))?;
        let failed = response.failed().iter().map(|failure| {
            let message = failure.message().unwrap_or_default();
            (failure.id(), failure.code(), message)
        });
        Ok(outcomes(entries.len(), failed))
    }
}

/// An EventBridge bus: standard CloudEvents 1.0 in `Detail`, the event's type
/// as `DetailType`, this middleware as `Source`.
pub struct Bus {
    client: aws_sdk_eventbridge::Client,
    name: String,
}

impl Bus {
    /// A bus by its name or ARN.
    pub fn new(client: aws_sdk_eventbridge::Client, name: &str) -> Self {
        Self {
            client,
            name: name.to_owned(),
        }
    }
}

#[async_trait]
impl Destination for Bus {
    fn name(&self) -> &str {
        "event bus"
    }

    fn encode(&self, event: &CloudEvent) -> Entry {
        let body = event.to_standard().to_string();
        Entry {
            // EventBridge counts the source, the detail type and the detail.
            bytes: body.len() + SERVICE.len() + event.kind.name().len(),
            kind: event.kind,
            body,
        }
    }

    async fn send(&self, entries: &[&Entry]) -> Result<Vec<Outcome>, CallFailure> {
        let mut request = self.client.put_events();
        for entry in entries {
            request = request.entries(
                PutEventsRequestEntry::builder()
                    .event_bus_name(&self.name)
                    .source(SERVICE)
                    .detail_type(entry.kind.name())
                    .detail(&entry.body)
                    .build(),
            );
        }
        let response = request
            .send()
            .await
            .map_err(|error| CallFailure::from_sdk(&error))?;
        // Results come in the order of the entries, without ids. An answer
        // that is too short delivers only what it names.
        let mut all = Vec::with_capacity(entries.len());
        for position in 0..entries.len() {
            let outcome = match response.entries().get(position) {
                None => Outcome::Failed("no answer for this entry".to_owned()),
                Some(result) => match result.error_code() {
                    None => Outcome::Delivered,
                    Some(code) => {
                        Outcome::of_code(code, result.error_message().unwrap_or_default())
                    }
                },
            };
            all.push(outcome);
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_codes_about_the_entry_itself_refuse_it() {
        for (code, is_refused) in [
            ("InvalidParameter", true),
            ("AWS.SimpleQueueService.BatchRequestTooLong", true),
            ("MalformedDetail", true),
            ("ThrottlingException", false),
            ("AccessDenied", false),
            ("InternalFailure", false),
            ("", false),
        ] {
            let outcome = Outcome::of_code(code, "why");
            assert_eq!(matches!(outcome, Outcome::Refused(_)), is_refused, "{code}");
        }
    }

    #[test]
    fn a_failure_is_put_to_the_entry_whose_id_it_names() {
        let failed = [("1", "InternalError", "later"), ("nine", "X", "")];
        let all = outcomes(3, failed.into_iter());
        assert_eq!(all[0], Outcome::Delivered);
        assert_eq!(all[1], Outcome::Failed("InternalError: later".to_owned()));
        assert_eq!(all[2], Outcome::Delivered);
    }
}
