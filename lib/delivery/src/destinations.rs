//! The three kinds of output, each as its API wants the events.

use async_trait::async_trait;
use aws_sdk_eventbridge::types::PutEventsRequestEntry;
use aws_sdk_sns::types::PublishBatchRequestEntry;
use aws_sdk_sqs::types::SendMessageBatchRequestEntry;
use events::{CloudEvent, EventType, SERVICE};
use platform::aws;

use crate::batch::entry_results;
use crate::{Answer, sqs_answer};

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

/// Somewhere to send events.
#[async_trait]
pub trait Destination: Send + Sync {
    /// Which output it is, for errors and metrics.
    fn name(&self) -> &str;

    /// The event as this output takes it: as a rule in Lakechain's form.
    fn encode(&self, event: &CloudEvent) -> Entry {
        let body = event.to_json();
        Entry {
            bytes: body.len(),
            kind: event.kind,
            body,
        }
    }

    /// Sends one request.
    async fn send(&self, entries: &[&Entry]) -> Answer;
}

/// An SNS topic: Lakechain's form, no attributes, no subject.
pub(crate) struct Topic {
    pub client: aws_sdk_sns::Client,
    pub arn: String,
}

#[async_trait]
impl Destination for Topic {
    fn name(&self) -> &str {
        "topic"
    }

    async fn send(&self, entries: &[&Entry]) -> Answer {
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
            .map_err(|error| aws::Error::from_sdk("sns:PublishBatch", &error).of(&self.arn))?;
        let failed = response.failed().iter();
        let failed = failed.map(|failure| (failure.id(), failure.code(), failure.message()));
        Ok(entry_results(
            "sns:PublishBatch",
            &self.arn,
            entries.len(),
            failed,
        ))
    }
}

/// An SQS queue: Lakechain's form.
pub(crate) struct Queue {
    pub client: aws_sdk_sqs::Client,
    pub url: String,
}

#[async_trait]
impl Destination for Queue {
    fn name(&self) -> &str {
        "queue"
    }

    async fn send(&self, entries: &[&Entry]) -> Answer {
        let mut request = self.client.send_message_batch().queue_url(&self.url);
        for (position, entry) in entries.iter().enumerate() {
            let entry = SendMessageBatchRequestEntry::builder()
                .id(position.to_string())
                .message_body(&entry.body)
                .build()
                .expect("id and body are set");
            request = request.entries(entry);
        }
        let response = request.send().await.map(|response| response.failed);
        sqs_answer("sqs:SendMessageBatch", &self.url, entries.len(), response)
    }
}

/// An EventBridge bus: standard CloudEvents 1.0 in `Detail`, the event's type
/// as `DetailType`, this middleware as `Source`.
pub(crate) struct Bus {
    pub client: aws_sdk_eventbridge::Client,
    pub name: String,
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

    async fn send(&self, entries: &[&Entry]) -> Answer {
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
            .map_err(|error| aws::Error::from_sdk("events:PutEvents", &error).of(&self.name))?;
        // Results come in the order of the entries, without ids. An answer
        // that is too short delivers only what it names.
        let result_of = |position: usize| {
            let (code, message) = match response.entries().get(position) {
                None => ("NoAnswer", "no answer for this entry"),
                Some(result) => match result.error_code() {
                    None => return Ok(()),
                    Some(code) => (code, result.error_message().unwrap_or("no message")),
                },
            };
            Err(aws::Error::of_code("events:PutEvents", code, message).of(&self.name))
        };
        Ok((0..entries.len()).map(result_of).collect())
    }
}
