//! Sending events to every configured output, with retries of what failed.

use std::sync::Arc;

use aws_config::SdkConfig;
use events::CloudEvent;
use futures_util::future::join_all;
use platform::env::{EnvError, Reader, invalid};
use platform::{Failure, aws};

use crate::batch::{MAX_TRIES, PUBLISH_MAX_BYTES, send_all};
use crate::destinations::{Bus, Destination, Entry, Queue, Topic};
use crate::with_call_timeout;

/// Where events go. At least one is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputConfig {
    /// `OUTPUT_TOPIC_ARN`: an SNS topic.
    pub topic_arn: Option<String>,
    /// `OUTPUT_EVENT_BUS`: an EventBridge bus, by name or ARN.
    pub event_bus: Option<String>,
    /// `OUTPUT_QUEUE_URL`: an SQS queue.
    pub queue_url: Option<String>,
}

impl OutputConfig {
    /// Reads and checks the `OUTPUT_…` variables.
    pub fn from_env(env: &Reader<'_>) -> Result<Self, EnvError> {
        let config = Self {
            topic_arn: env.optional("OUTPUT_TOPIC_ARN"),
            event_bus: env.optional("OUTPUT_EVENT_BUS"),
            queue_url: env.optional("OUTPUT_QUEUE_URL"),
        };
        if let Some(arn) = &config.topic_arn
            && (!arn.starts_with("arn:") || !arn.contains(":sns:") || arn.ends_with(".fifo"))
        {
            return Err(invalid(
                "OUTPUT_TOPIC_ARN",
                arn,
                "the ARN of a standard SNS topic (arn:PARTITION:sns:REGION:ACCOUNT:NAME)",
            ));
        }
        if let Some(url) = &config.queue_url
            && (!url.starts_with("http") || url.ends_with(".fifo"))
        {
            return Err(invalid(
                "OUTPUT_QUEUE_URL",
                url,
                "the URL of a standard SQS queue",
            ));
        }
        if config.topic_arn.is_none() && config.event_bus.is_none() && config.queue_url.is_none() {
            return Err(EnvError::Missing {
                name: "OUTPUT_TOPIC_ARN".to_owned(),
                accepted: "at least one of OUTPUT_TOPIC_ARN, OUTPUT_EVENT_BUS and \
                           OUTPUT_QUEUE_URL must say where events go"
                    .to_owned(),
            });
        }
        Ok(config)
    }
}

/// Why an event was not delivered to every output.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // The messages say it.
pub enum PublishError {
    #[error("the event has {bytes} bytes, the output {output} takes {PUBLISH_MAX_BYTES}")]
    TooLarge {
        output: String,
        /// The event's size as that output counts it.
        bytes: usize,
    },
    #[error("the output {output} refuses the event: {error}")]
    Refused { output: String, error: aws::Error },
    #[error("the output {output} failed {MAX_TRIES} times: {error}")]
    Unavailable { output: String, error: aws::Error },
}

impl PublishError {
    /// Whether a later try can succeed.
    pub fn failure(&self) -> Failure {
        match self {
            PublishError::TooLarge { .. } | PublishError::Refused { .. } => Failure::Permanent,
            PublishError::Unavailable { .. } => Failure::Transient,
        }
    }
}

/// Every output.
#[derive(Clone)]
pub struct Outputs {
    destinations: Vec<Arc<dyn Destination>>,
}

impl Outputs {
    /// The outputs of a configuration.
    pub fn connect(config: &OutputConfig, sdk: &SdkConfig) -> Self {
        let sdk = with_call_timeout(sdk);
        let mut destinations: Vec<Arc<dyn Destination>> = Vec::new();
        if let Some(arn) = config.topic_arn.clone() {
            let client = aws_sdk_sns::Client::new(&sdk);
            destinations.push(Arc::new(Topic { client, arn }));
        }
        if let Some(name) = config.event_bus.clone() {
            let client = aws_sdk_eventbridge::Client::new(&sdk);
            destinations.push(Arc::new(Bus { client, name }));
        }
        if let Some(url) = config.queue_url.clone() {
            let client = aws_sdk_sqs::Client::new(&sdk);
            destinations.push(Arc::new(Queue { client, url }));
        }
        Self::new(destinations)
    }

    /// The input queue, which takes events as an output does.
    pub fn to_queue(url: &str, sdk: &SdkConfig) -> Self {
        let client = aws_sdk_sqs::Client::new(&with_call_timeout(sdk));
        let url = url.to_owned();
        Self::new(vec![Arc::new(Queue { client, url })])
    }

    /// Outputs of the caller's own.
    pub fn new(destinations: Vec<Arc<dyn Destination>>) -> Self {
        Self { destinations }
    }

    /// Sends every event to every output; answers one result per event. `Ok`
    /// means that all outputs have it. After a transient error the caller
    /// sends the event again, to all outputs: each event arrives at least
    /// once everywhere.
    pub async fn publish(&self, events: &[CloudEvent]) -> Vec<Result<(), PublishError>> {
        let sends = self
            .destinations
            .iter()
            .map(|destination| publish_to(destination.as_ref(), events));
        let by_destination = join_all(sends).await;
        let mut results = vec![Ok(()); events.len()];
        for one in by_destination {
            for (result, new) in results.iter_mut().zip(one) {
                *result = worse(std::mem::replace(result, Ok(())), new);
            }
        }
        results
    }

    /// Whether the event fits every output, or the first refusal. Lets the
    /// caller slim an event before it is sent anywhere.
    pub fn check_size(&self, event: &CloudEvent) -> Result<(), PublishError> {
        for destination in &self.destinations {
            let entry = destination.encode(event);
            if let Some(error) = too_large(destination.as_ref(), &entry) {
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Of two results the one that decides. A transient error wins over a
/// permanent one: the retry delivers what can be delivered, and the permanent
/// one is still there afterwards.
fn worse(a: Result<(), PublishError>, b: Result<(), PublishError>) -> Result<(), PublishError> {
    match (a, b) {
        (Ok(()), other) | (other, Ok(())) => other,
        (Err(a), Err(b)) => Err(if b.failure() == Failure::Transient {
            b
        } else {
            a
        }),
    }
}

fn too_large(destination: &dyn Destination, entry: &Entry) -> Option<PublishError> {
    (entry.bytes > PUBLISH_MAX_BYTES).then(|| PublishError::TooLarge {
        output: destination.name().to_owned(),
        bytes: entry.bytes,
    })
}

async fn publish_to(
    destination: &dyn Destination,
    events: &[CloudEvent],
) -> Vec<Result<(), PublishError>> {
    let mut results = vec![Ok(()); events.len()];
    let mut entries = Vec::with_capacity(events.len());
    for (index, event) in events.iter().enumerate() {
        let entry = destination.encode(event);
        match too_large(destination, &entry) {
            Some(error) => results[index] = Err(error),
            None => entries.push((index, entry)),
        }
    }
    let bytes = |(_, entry): &(usize, Entry)| entry.bytes;
    let sent = send_all(destination.name(), &entries, bytes, |batch| async move {
        let entries: Vec<&Entry> = batch.into_iter().map(|(_, entry)| entry).collect();
        destination.send(&entries).await
    })
    .await;
    for ((index, _), result) in entries.iter().zip(sent) {
        let output = destination.name().to_owned();
        results[*index] = result.map_err(|error| match error.failure {
            Failure::Permanent => PublishError::Refused { output, error },
            Failure::Transient => PublishError::Unavailable { output, error },
        });
    }
    results
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex;

    use async_trait::async_trait;
    use events::{Document, EventType};

    use super::*;
    use crate::Answer;

    /// An output that enforces AWS's limits and fails as it is told.
    #[derive(Default)]
    struct Fake {
        delivered: Mutex<Vec<String>>,
        /// How often the entry that contains the word still fails.
        failures: Mutex<HashMap<String, u32>>,
        /// A word whose presence gets the whole request refused.
        poison: Option<&'static str>,
        requests: Mutex<Vec<usize>>,
    }

    #[async_trait]
    impl Destination for Fake {
        fn name(&self) -> &str {
            "fake"
        }

        async fn send(&self, entries: &[&Entry]) -> Answer {
            let bytes: usize = entries.iter().map(|entry| entry.bytes).sum();
            assert!((1..=10).contains(&entries.len()), "{}", entries.len());
            assert!(bytes <= 256 * 1024, "{bytes}");
            self.requests.lock().unwrap().push(entries.len());
            if let Some(word) = self.poison
                && entries.iter().any(|entry| entry.body.contains(word))
            {
                return Err(aws::Error::of_code("fake", "InvalidParameter", ""));
            }
            let mut failures = self.failures.lock().unwrap();
            let mut outcomes = Vec::new();
            for entry in entries {
                let failing = failures
                    .iter_mut()
                    .find(|(word, left)| **left > 0 && entry.body.contains(word.as_str()));
                outcomes.push(match failing {
                    Some((_, left)) => {
                        *left -= 1;
                        Err(aws::Error::of_code("fake", "InternalError", ""))
                    }
                    None => {
                        self.delivered.lock().unwrap().push(entry.body.clone());
                        Ok(())
                    }
                });
            }
            Ok(outcomes)
        }
    }

    fn event(name: &str) -> CloudEvent {
        let document = Document {
            url: format!("s3://bucket/{name}"),
            mime_type: "image/png".to_owned(),
            size: None,
            etag: None,
        };
        CloudEvent::new(EventType::DocumentCreated, document)
    }

    fn events(count: usize) -> Vec<CloudEvent> {
        (0..count)
            .map(|index| event(&format!("image-{index}.png")))
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn events_go_in_full_batches() {
        let fake = Arc::new(Fake::default());
        let results = Outputs::new(vec![fake.clone()]).publish(&events(25)).await;
        assert!(results.iter().all(Result::is_ok));
        let mut requests = fake.requests.lock().unwrap().clone();
        requests.sort_unstable();
        assert_eq!(requests, [5, 10, 10]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_failed_is_sent_again() {
        let fake = Arc::new(Fake {
            failures: Mutex::new(HashMap::from([("image-3.png".to_owned(), 2)])),
            ..Fake::default()
        });
        let results = Outputs::new(vec![fake.clone()]).publish(&events(10)).await;
        assert!(results.iter().all(Result::is_ok));
        assert_eq!(*fake.requests.lock().unwrap(), [10, 1, 1]);
        assert_eq!(fake.delivered.lock().unwrap().len(), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_fails_every_time_is_transient_and_the_rest_is_delivered() {
        let fake = Arc::new(Fake {
            failures: Mutex::new(HashMap::from([("image-1.png".to_owned(), u32::MAX)])),
            ..Fake::default()
        });
        let results = Outputs::new(vec![fake.clone()]).publish(&events(3)).await;
        let failure = results[1].as_ref().unwrap_err().failure();
        assert_eq!(failure, Failure::Transient);
        assert!(results[0].is_ok() && results[2].is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn one_event_at_fault_does_not_take_its_batch_with_it() {
        let fake = Arc::new(Fake {
            poison: Some("image-4.png"),
            ..Fake::default()
        });
        let results = Outputs::new(vec![fake.clone()]).publish(&events(10)).await;
        for (index, result) in results.iter().enumerate() {
            assert_eq!(result.is_err(), index == 4, "{index}: {result:?}");
        }
        assert!(matches!(results[4], Err(PublishError::Refused { .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_over_the_limit_is_told_and_never_sent() {
        let fake = Arc::new(Fake::default());
        let mut large = event("large.png");
        large.data.metadata.title = Some("x".repeat(300_000));
        let outputs = Outputs::new(vec![fake.clone()]);
        assert!(outputs.check_size(&large).is_err());
        let results = outputs.publish(&[large, event("small.png")]).await;
        assert!(
            matches!(&results[0], Err(PublishError::TooLarge { bytes, .. }) if *bytes > 262_144)
        );
        assert!(results[1].is_ok());
        assert_eq!(fake.delivered.lock().unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn every_output_gets_every_event_and_a_transient_error_decides() {
        let good = Arc::new(Fake::default());
        let refusing = Arc::new(Fake {
            poison: Some("image"),
            ..Fake::default()
        });
        let failing = Arc::new(Fake {
            failures: Mutex::new(HashMap::from([("image-0.png".to_owned(), u32::MAX)])),
            ..Fake::default()
        });
        let outputs = Outputs::new(vec![good.clone(), refusing, failing]);
        let results = outputs.publish(&events(2)).await;
        assert!(matches!(results[0], Err(PublishError::Unavailable { .. })));
        assert!(matches!(results[1], Err(PublishError::Refused { .. })));
        assert_eq!(good.delivered.lock().unwrap().len(), 2);
    }

    #[test]
    fn at_least_one_output_must_be_named() {
        let none = Reader::new(|_| None);
        let error = OutputConfig::from_env(&none).unwrap_err().to_string();
        assert!(error.contains("OUTPUT_EVENT_BUS"), "{error}");
        let wrong = Reader::new(|name| (name == "OUTPUT_TOPIC_ARN").then(|| "my-topic".to_owned()));
        let error = OutputConfig::from_env(&wrong).unwrap_err().to_string();
        assert!(error.contains("my-topic"), "{error}");
    }
}
