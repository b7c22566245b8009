//! What intake does with a payload, as a function of the payload and of the
//! services it may call.

use std::time::Duration;

use async_trait::async_trait;
use aws_lambda_events::sqs::SqsBatchResponse;
use delivery::{PublishError, Rejection};
use events::{CloudEvent, Delivery, EventType, ImageType, Item, S3Object, S3Url, deliveries};
use futures_util::stream::{self, StreamExt};
use platform::aws;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::{info, warn};

/// Deliveries in work at once: enough to hide S3's latency behind itself in a
/// full SQS batch of 10, or in a backfill's notification of many records.
const CONCURRENT_DELIVERIES: usize = 16;

/// The middleware whose place this function takes for events of S3.
const S3_TRIGGER: &str = "s3-event-trigger";

/// A type that says nothing, for a deleted document whose name says nothing.
const UNKNOWN_TYPE: &str = "application/octet-stream";

/// The first bytes of an object, and what S3 says of it.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// The first bytes, at least [`events::DETECTION_BYTES`] where there are so many.
    pub first_bytes: Vec<u8>,
    /// The declared `Content-Type`.
    pub content_type: Option<String>,
    /// The object's size in bytes.
    pub size: Option<u64>,
    /// The object's ETag without quotes.
    pub etag: Option<String>,
}

/// What intake asks of the services around it.
#[async_trait]
pub trait Services: Send + Sync {
    /// Reads the beginning of an object; `None` when it does not exist.
    async fn head(&self, object: &S3Object) -> Result<Option<Head>, aws::Error>;
    /// Sends events to the input queue, a result for each.
    async fn enqueue(&self, events: Vec<CloudEvent>) -> Vec<Result<(), PublishError>>;
    /// Records a rejection in the dead-letter queue.
    async fn reject(&self, body: &str, rejection: &Rejection) -> Result<(), aws::Error>;
    /// Deletes the vectors of a document and says how many there were.
    async fn delete_vectors(&self, document_url: &str) -> Result<usize, aws::Error>;
    /// Publishes an event to the outputs.
    async fn publish(&self, event: CloudEvent) -> Result<(), PublishError>;
    /// Invokes the scaler asynchronously.
    async fn wake_scaler(&self) -> Result<(), aws::Error>;
}

/// Why a delivery must come again. Lambda and SQS count how often, so that
/// what never succeeds ends in a queue of failures and not in a circle.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ServiceError {
    /// A call failed.
    #[error(transparent)]
    Call(#[from] aws::Error),
    /// An event did not leave.
    #[error(transparent)]
    Publish(#[from] PublishError),
}

/// Something that will never become work: the object's URL as far as it is
/// known, and why.
fn rejection(object: Option<String>, reason: impl Into<String>) -> Rejection {
    Rejection {
        stage: "intake".to_owned(),
        reason: reason.into(),
        by: "intake".to_owned(),
        object,
        event: None,
    }
}

/// What became of the items of a payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Events sent to the input queue.
    pub enqueued: usize,
    /// Deletions passed on to the outputs.
    pub deleted: usize,
    /// Items recorded in the dead-letter queue.
    pub rejected: usize,
    /// Objects that neither are images nor claim to be.
    pub unsupported: usize,
    /// Folder markers, test events and the like.
    pub ignored: usize,
    /// Deliveries that must come again.
    pub failed: usize,
}

impl Counts {
    fn add(&mut self, other: Counts) {
        self.enqueued += other.enqueued;
        self.deleted += other.deleted;
        self.rejected += other.rejected;
        self.unsupported += other.unsupported;
        self.ignored += other.ignored;
        self.failed += other.failed;
    }
}

/// Intake, with the time it last woke the scaler.
pub struct Intake<S> {
    services: S,
    wake_interval: Duration,
    last_wake: Mutex<Option<Instant>>,
}

/// What one item of a delivery asks for.
enum Step {
    Enqueue(Box<CloudEvent>),
    Delete(Box<CloudEvent>),
    Reject(Rejection),
    Unsupported,
    Ignore,
}

impl<S: Services> Intake<S> {
    /// Intake on `services`, which wakes the scaler at most once in
    /// `wake_interval`; the scaler's own schedule covers the rest.
    pub fn new(services: S, wake_interval: Duration) -> Self {
        Self {
            services,
            wake_interval,
            last_wake: Mutex::new(None),
        }
    }

    /// Handles a Lambda payload: an SQS batch is answered with the records
    /// that must come again, anything else fails as a whole so that Lambda's
    /// own retries and its on-failure destination keep it.
    pub async fn handle(&self, payload: &Value) -> Result<(Value, Counts), ServiceError> {
        let deliveries = deliveries(payload);
        let outcomes: Vec<(Option<String>, Result<Counts, ServiceError>)> =
            stream::iter(deliveries)
                .map(|delivery| async move {
                    let outcome = self.deliver(&delivery).await;
                    (delivery.message_id, outcome)
                })
                .buffered(CONCURRENT_DELIVERIES)
                .collect()
                .await;

        let mut counts = Counts::default();
        let mut failed_ids = Vec::new();
        let mut failure = None;
        let mut is_batch = false;
        for (message_id, outcome) in outcomes {
            is_batch |= message_id.is_some();
            match outcome {
                Ok(delivered) => counts.add(delivered),
                Err(error) => {
                    warn!(%error, message_id, "the delivery must come again");
                    counts.failed += 1;
                    failed_ids.extend(message_id);
                    failure = Some(error);
                }
            }
        }
        if counts.enqueued > 0 {
            self.wake_scaler().await;
        }
        info!(?counts, "payload handled");
        match failure {
            Some(error) if !is_batch => Err(error),
            _ if is_batch => {
                let mut answer = SqsBatchResponse::default();
                answer.set_failures(failed_ids);
                Ok((json!(answer), counts))
            }
            _ => Ok((json!(counts), counts)),
        }
    }

    /// Carries out all that a delivery asks for. After an error the whole
    /// delivery comes again: events that were sent already are sent twice,
    /// which changes nothing downstream, and none is lost.
    async fn deliver(&self, delivery: &Delivery) -> Result<Counts, ServiceError> {
        let mut counts = Counts::default();
        let items = match &delivery.items {
            Ok(items) => items.as_slice(),
            Err(error) => {
                let rejected = rejection(None, error.to_string());
                self.record_rejection(&delivery.body, &rejected).await?;
                counts.rejected += 1;
                return Ok(counts);
            }
        };
        let steps: Vec<Result<Step, ServiceError>> = stream::iter(items)
            .map(|item| self.decide(item))
            .buffered(CONCURRENT_DELIVERIES)
            .collect()
            .await;
        let mut to_enqueue = Vec::new();
        let mut failure = None;
        for step in steps {
            match step {
                Ok(Step::Enqueue(event)) => to_enqueue.push(*event),
                Ok(Step::Delete(event)) => match self.delete(*event).await {
                    Ok(()) => counts.deleted += 1,
                    Err(error) => failure = Some(error),
                },
                Ok(Step::Reject(rejected)) => {
                    match self.record_rejection(&delivery.body, &rejected).await {
                        Ok(()) => counts.rejected += 1,
                        Err(error) => failure = Some(error),
                    }
                }
                Ok(Step::Unsupported) => counts.unsupported += 1,
                Ok(Step::Ignore) => counts.ignored += 1,
                Err(error) => failure = Some(error),
            }
        }
        if !to_enqueue.is_empty() {
            for result in self.services.enqueue(to_enqueue).await {
                match result {
                    Ok(()) => counts.enqueued += 1,
                    Err(error) => failure = Some(error.into()),
                }
            }
        }
        match failure {
            None => Ok(counts),
            Some(error) => {
                // What was sent is work, whatever becomes of the rest.
                if counts.enqueued > 0 {
                    self.wake_scaler().await;
                }
                Err(error)
            }
        }
    }

    async fn decide(&self, item: &Item) -> Result<Step, ServiceError> {
        match item {
            Item::Ignored { reason } => {
                info!(reason, "ignored");
                Ok(Step::Ignore)
            }
            Item::Rejected { object, reason } => {
                Ok(Step::Reject(rejection(Some(object.clone()), reason)))
            }
            Item::Event(event) if event.kind == EventType::DocumentDeleted => {
                Ok(Step::Delete(event.clone()))
            }
            Item::Event(event) => Ok(decide_event(event)),
            Item::Object(object) if object.kind == EventType::DocumentDeleted => {
                Ok(Step::Delete(Box::new(deletion_event(object))))
            }
            Item::Object(object) => self.decide_object(object).await,
        }
    }

    /// Looks at the beginning of a created object, so that what is no image
    /// never costs a GPU. If S3 cannot be asked now, the name decides and the
    /// task finds out: work must not wait for a role that is being fixed.
    async fn decide_object(&self, object: &S3Object) -> Result<Step, ServiceError> {
        let url = object.url.to_string();
        let by_name = ImageType::from_name(&object.url.key);
        let head = match self.services.head(object).await {
            Ok(Some(head)) => head,
            Ok(None) => {
                let reason = "the object does not exist (any more)";
                return Ok(Step::Reject(rejection(Some(url), reason)));
            }
            Err(error) => {
                return match by_name {
                    Some(image_type) => {
                        warn!(url, %error, "the object cannot be read now: its name decides");
                        Ok(Step::Enqueue(Box::new(creation_event(object, image_type))))
                    }
                    None => Err(error.into()),
                };
            }
        };
        let by_declaration = head.content_type.as_deref().and_then(ImageType::from_mime);
        if let Some(image_type) = ImageType::detect(&head.first_bytes) {
            for (claim, source) in [(by_declaration, "Content-Type"), (by_name, "extension")] {
                if claim.is_some_and(|claimed| claimed != image_type) {
                    info!(url, %image_type, source, "the content says otherwise, and wins");
                }
            }
            let mut complete = object.clone();
            complete.size = head.size.or(object.size);
            complete.etag = complete.etag.or(head.etag);
            return Ok(Step::Enqueue(Box::new(creation_event(
                &complete, image_type,
            ))));
        }
        let Some(claimed) = by_declaration.or(by_name) else {
            info!(
                url,
                content_type = head.content_type,
                "neither is an image nor claims to be"
            );
            return Ok(Step::Unsupported);
        };
        let reason = if head.first_bytes.is_empty() {
            format!("the object is empty and claims to be {claimed}")
        } else {
            format!(
                "the object claims to be {claimed}, but its content is none of the seven types \
                 (it begins with {})",
                hex(&head.first_bytes)
            )
        };
        Ok(Step::Reject(rejection(Some(url), reason)))
    }

    async fn delete(&self, event: CloudEvent) -> Result<(), ServiceError> {
        let url = event.data.document.url.clone();
        let vectors = self.services.delete_vectors(&url).await?;
        self.services.publish(event.passed_here()).await?;
        info!(url, vectors, "the deletion is passed on");
        Ok(())
    }

    async fn record_rejection(&self, body: &str, rejected: &Rejection) -> Result<(), ServiceError> {
        warn!(
            object = rejected.object,
            reason = rejected.reason,
            "rejected"
        );
        Ok(self.services.reject(body, rejected).await?)
    }

    /// Wakes the scaler unless that was done a moment ago. A failure is no
    /// failure of the delivery: the scaler's schedule is the safety net.
    async fn wake_scaler(&self) {
        let mut last_wake = self.last_wake.lock().await;
        if last_wake.is_some_and(|last| last.elapsed() < self.wake_interval) {
            return;
        }
        match self.services.wake_scaler().await {
            Ok(()) => *last_wake = Some(Instant::now()),
            Err(error) => warn!(%error, "the scaler was not woken: its schedule will run it"),
        }
    }
}

fn creation_event(object: &S3Object, image_type: ImageType) -> CloudEvent {
    let mut event = object.to_event(image_type);
    event.data.call_stack = vec![S3_TRIGGER.to_owned()];
    event
}

/// A deletion's event. Only the name is left to tell the type by.
fn deletion_event(object: &S3Object) -> CloudEvent {
    let by_name = ImageType::from_name(&object.url.key);
    let mut event = creation_event(object, by_name.unwrap_or(ImageType::Jpeg));
    if by_name.is_none() {
        event.data.document.mime_type = UNKNOWN_TYPE.to_owned();
        event.data.source.mime_type = UNKNOWN_TYPE.to_owned();
    }
    event
}

/// A creation from another middleware, whose type is its own business as long
/// as it is one of the seven.
fn decide_event(event: &CloudEvent) -> Step {
    let document = &event.data.document;
    if document.image_type().is_some() {
        return Step::Enqueue(Box::new(event.clone()));
    }
    let is_s3 = document.url.parse::<S3Url>().is_ok();
    let mime = &document.mime_type;
    let reason = format!("{mime:?} is none of the seven supported types");
    Step::Reject(rejection(is_s3.then(|| document.url.clone()), reason))
}

fn hex(bytes: &[u8]) -> String {
    /// Enough to recognise a format by.
    const SHOWN: usize = 8;
    let shown: Vec<String> = bytes
        .iter()
        .take(SHOWN)
        .map(|byte| format!("{byte:02x}"))
        .collect();
    shown.join(" ")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Mutex as StdMutex;

    use super::*;

    /// Services that remember what was asked of them.
    #[derive(Default)]
    struct Fake {
        objects: HashMap<String, Head>,
        head_fails: bool,
        enqueue_fails: bool,
        reject_fails: bool,
        log: StdMutex<Vec<String>>,
        enqueued: StdMutex<Vec<CloudEvent>>,
        published: StdMutex<Vec<CloudEvent>>,
    }

    impl Fake {
        fn note(&self, line: String) {
            self.log.lock().unwrap().push(line);
        }

        fn noted(&self, start: &str) -> Vec<String> {
            let log = self.log.lock().unwrap();
            log.iter()
                .filter(|line| line.starts_with(start))
                .cloned()
                .collect()
        }
    }

    fn failure(operation: &'static str) -> aws::Error {
        aws::Error::of_code(operation, "InternalError", "")
    }

    #[async_trait]
    impl Services for Fake {
        async fn head(&self, object: &S3Object) -> Result<Option<Head>, aws::Error> {
            if self.head_fails {
                return Err(failure("s3:GetObject"));
            }
            Ok(self.objects.get(&object.url.key).cloned())
        }

        async fn enqueue(&self, events: Vec<CloudEvent>) -> Vec<Result<(), PublishError>> {
            let results = events
                .iter()
                .map(|_| {
                    if self.enqueue_fails {
                        Err(PublishError::Unavailable {
                            output: "queue".to_owned(),
                            error: failure("sqs:SendMessageBatch"),
                        })
                    } else {
                        Ok(())
                    }
                })
                .collect();
            if !self.enqueue_fails {
                self.enqueued.lock().unwrap().extend(events);
            }
            results
        }

        async fn reject(&self, _body: &str, rejected: &Rejection) -> Result<(), aws::Error> {
            if self.reject_fails {
                return Err(failure("sqs:SendMessageBatch"));
            }
            self.note(format!("rejected: {}", rejected.reason));
            Ok(())
        }

        async fn delete_vectors(&self, document_url: &str) -> Result<usize, aws::Error> {
            self.note(format!("vectors deleted: {document_url}"));
            Ok(1)
        }

        async fn publish(&self, event: CloudEvent) -> Result<(), PublishError> {
            self.published.lock().unwrap().push(event);
            Ok(())
        }

        async fn wake_scaler(&self) -> Result<(), aws::Error> {
            self.note("woken".to_owned());
            Ok(())
        }
    }

    fn png() -> Head {
        Head {
            first_bytes: b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec(),
            content_type: Some("binary/octet-stream".to_owned()),
            size: Some(70),
            etag: Some("e1".to_owned()),
        }
    }

    fn with_objects(objects: &[(&str, Head)]) -> Fake {
        let owned = objects
            .iter()
            .map(|(key, head)| ((*key).to_owned(), head.clone()));
        Fake {
            objects: owned.collect(),
            ..Fake::default()
        }
    }

    fn intake(fake: Fake) -> Intake<Fake> {
        Intake::new(fake, Duration::from_secs(5))
    }

    fn created(keys: &[&str]) -> Value {
        let records: Vec<Value> = keys
            .iter()
            .map(|key| {
                json!({"eventName": "ObjectCreated:Put", "s3": {
                    "bucket": {"name": "src"}, "object": {"key": key},
                }})
            })
            .collect();
        json!({ "Records": records })
    }

    fn batch(bodies: &[Value]) -> Value {
        let records: Vec<Value> = bodies
            .iter()
            .enumerate()
            .map(
                |(index, body)| json!({"messageId": format!("m{index}"), "body": body.to_string()}),
            )
            .collect();
        json!({ "Records": records })
    }

    #[tokio::test]
    async fn content_decides_the_type_whatever_the_name_says() {
        let intake = intake(with_objects(&[("lie.jpg", png()), ("no-extension", png())]));
        let (_, counts) = intake
            .handle(&created(&["lie.jpg", "no-extension"]))
            .await
            .unwrap();
        assert_eq!(counts.enqueued, 2);
        let enqueued = intake.services.enqueued.lock().unwrap();
        for event in enqueued.iter() {
            assert_eq!(event.data.document.mime_type, "image/png");
            assert_eq!(event.data.document.etag.as_deref(), Some("e1"));
            assert_eq!(event.data.call_stack, ["s3-event-trigger"]);
        }
    }

    #[tokio::test]
    async fn what_claims_to_be_an_image_and_is_none_is_rejected_with_its_reason() {
        let text = Head {
            first_bytes: b"hello".to_vec(),
            ..Head::default()
        };
        let empty = Head::default();
        let intake = intake(with_objects(&[("text.jpg", text), ("empty.png", empty)]));
        let payload = created(&["text.jpg", "empty.png", "gone.gif"]);
        let (_, counts) = intake.handle(&payload).await.unwrap();
        assert_eq!(
            counts,
            Counts {
                rejected: 3,
                ..Counts::default()
            }
        );
        let reasons = intake.services.noted("rejected").join("\n");
        for word in ["68 65 6c 6c 6f", "empty", "does not exist"] {
            assert!(reasons.contains(word), "{word} in {reasons}");
        }
        assert!(
            intake.services.noted("woken").is_empty(),
            "rejections cost no GPU"
        );
    }

    #[tokio::test]
    async fn what_does_not_even_claim_to_be_an_image_is_no_rejection() {
        let text = Head {
            first_bytes: b"hello".to_vec(),
            ..Head::default()
        };
        let intake = intake(with_objects(&[("readme.txt", text)]));
        let (_, counts) = intake.handle(&created(&["readme.txt"])).await.unwrap();
        assert_eq!(
            counts,
            Counts {
                unsupported: 1,
                ..Counts::default()
            }
        );
    }

    #[tokio::test]
    async fn a_record_that_fails_comes_again_alone() {
        let mut fake = with_objects(&[("ab.png", png())]);
        fake.reject_fails = true;
        let intake = intake(fake);
        let payload = batch(&[created(&["ab.png"]), json!("rubbish")]);
        let (answer, counts) = intake.handle(&payload).await.unwrap();
        assert_eq!(
            answer,
            json!({"batchItemFailures": [{"itemIdentifier": "m1"}]})
        );
        assert_eq!((counts.enqueued, counts.failed), (1, 1));
    }

    #[tokio::test]
    async fn outside_a_batch_a_failure_fails_the_invocation_so_that_lambda_keeps_it() {
        let mut fake = with_objects(&[("ab.png", png())]);
        fake.enqueue_fails = true;
        let error = intake(fake)
            .handle(&created(&["ab.png"]))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("SendMessageBatch"), "{error}");
    }

    #[tokio::test]
    async fn an_unreadable_object_goes_by_its_name_and_comes_again_without_one() {
        let unreadable = || {
            intake(Fake {
                head_fails: true,
                ..Fake::default()
            })
        };
        let (_, counts) = unreadable().handle(&created(&["ab.png"])).await.unwrap();
        assert_eq!(counts.enqueued, 1);
        assert!(unreadable().handle(&created(&["nameless"])).await.is_err());
    }

    #[tokio::test]
    async fn a_deletion_goes_to_the_output_and_takes_its_vectors_along() {
        let intake = intake(Fake::default());
        let mut payload = created(&["ab.png"]);
        payload["Records"][0]["eventName"] = json!("ObjectRemoved:Delete");
        let (_, counts) = intake.handle(&payload).await.unwrap();
        assert_eq!(
            counts,
            Counts {
                deleted: 1,
                ..Counts::default()
            }
        );
        assert_eq!(
            intake.services.noted("vectors"),
            ["vectors deleted: s3://src/ab.png"]
        );
        let published = intake.services.published.lock().unwrap();
        assert_eq!(published[0].kind, EventType::DocumentDeleted);
        assert_eq!(
            published[0].data.call_stack,
            ["clip-image-processor", "s3-event-trigger"]
        );
    }

    #[tokio::test]
    async fn a_middlewares_event_passes_unchanged_if_its_type_is_supported() {
        let event = |mime: &str| {
            json!({"type": "document-created", "id": "1", "data": {
                "chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
                "source": {"url": "s3://src/a.mov", "type": "video/quicktime"},
                "document": {"url": "s3://src/frame", "type": mime},
                "metadata": {"title": "A frame"}, "callStack": ["ffmpeg"],
            }})
        };
        let intake = intake(Fake::default());
        let payload = batch(&[event("image/png"), event("video/quicktime")]);
        let (_, counts) = intake.handle(&payload).await.unwrap();
        assert_eq!(
            counts,
            Counts {
                enqueued: 1,
                rejected: 1,
                ..Counts::default()
            }
        );
        let enqueued = intake.services.enqueued.lock().unwrap();
        assert_eq!(
            enqueued[0],
            CloudEvent::from_value(event("image/png"))
                .map(|mut same| {
                    same.time = enqueued[0].time.clone();
                    same
                })
                .unwrap()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_scaler_is_woken_at_once_and_then_not_for_a_while() {
        let intake = intake(with_objects(&[("ab.png", png())]));
        for (seconds, wakes) in [(0, 1), (1, 1), (3, 1), (2, 2)] {
            tokio::time::advance(Duration::from_secs(seconds)).await;
            intake.handle(&created(&["ab.png"])).await.unwrap();
            assert_eq!(intake.services.noted("woken").len(), wakes);
        }
    }
}
