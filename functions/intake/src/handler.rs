//! What intake does with a payload, as a function of the payload and of the
//! services it may call.

use std::time::Duration;

use async_trait::async_trait;
use aws_lambda_events::sqs::SqsBatchResponse;
use chrono::DateTime;
use delivery::{Presence, PublishError, Rejection};
use events::{CloudEvent, Delivery, EventType, ImageType, Item, S3Object, S3Url, deliveries};
use futures_util::stream::{self, StreamExt};
use platform::{Failure, aws};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::{info, warn};

/// Deliveries in work at once: enough to hide S3's latency behind itself in a
/// full SQS batch of 10, or in a backfill's notification of many records.
const CONCURRENT_DELIVERIES: usize = 16;

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
    /// Looks whether an object is there.
    async fn presence(&self, url: &S3Url) -> Result<Presence, aws::Error>;
    /// Finds the vectors of a document.
    async fn find_vectors(&self, document_url: &str) -> Result<Vec<String>, aws::Error>;
    /// Deletes vectors.
    async fn remove_vectors(&self, keys: &[String]) -> Result<(), aws::Error>;
    /// Publishes an event to the outputs.
    async fn publish(&self, event: CloudEvent) -> Result<(), PublishError>;
    /// Invokes the scaler asynchronously.
    async fn wake_scaler(&self, since_ms: Option<i64>) -> Result<(), aws::Error>;
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
    /// When the first event happened that the scaler was not told of, in ms since 1970.
    waits_since_ms: Mutex<Option<i64>>,
}

/// What one item of a delivery asks for.
enum Step {
    Enqueue(Box<CloudEvent>),
    Deleted,
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
            waits_since_ms: Mutex::new(None),
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
                Ok(Step::Deleted) => counts.deleted += 1,
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
            let urls: Vec<String> = to_enqueue
                .iter()
                .map(|event| event.data.document.url.clone())
                .collect();
            let times = to_enqueue
                .iter()
                .filter_map(|event| DateTime::parse_from_rfc3339(&event.time).ok());
            if let Some(time) = times.min() {
                let mut since = self.waits_since_ms.lock().await;
                let time = time.timestamp_millis();
                *since = Some(since.map_or(time, |since| since.min(time)));
            }
            let results = self.services.enqueue(to_enqueue).await;
            for (url, result) in urls.into_iter().zip(results) {
                match result {
                    Ok(()) => counts.enqueued += 1,
                    Err(error) if error.failure() == Failure::Permanent => {
                        let rejected = rejection(Some(url), error.to_string());
                        match self.record_rejection(&delivery.body, &rejected).await {
                            Ok(()) => counts.rejected += 1,
                            Err(error) => failure = Some(error),
                        }
                    }
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
                self.decide_deletion(Deletion::of_event(event)).await
            }
            Item::Event(event) => Ok(decide_event(event)),
            Item::Object(object) if object.kind == EventType::DocumentDeleted => {
                self.decide_deletion(Deletion::of_object(object)).await
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
            Ok(None) if by_name.is_none() => {
                info!(
                    url,
                    "does not exist (any more), and was no image by its name"
                );
                return Ok(Step::Unsupported);
            }
            Ok(None) => {
                let reason = "the object does not exist (any more)";
                return Ok(Step::Reject(rejection(Some(url), reason)));
            }
            Err(error) => {
                return match by_name {
                    Some(image_type) => {
                        warn!(url, %error, "the object cannot be read now: its name decides");
                        Ok(Step::Enqueue(Box::new(object.to_event(image_type))))
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
            return Ok(Step::Enqueue(Box::new(complete.to_event(image_type))));
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

    /// Believes a deletion only when the object is gone: the table in
    /// `design.md`. The vectors are deleted last, so that a delivery that comes
    /// again still finds by them what has to be announced.
    async fn decide_deletion(&self, deletion: Deletion) -> Result<Step, ServiceError> {
        let Deletion {
            event,
            object,
            can_restore,
            is_no_image_by_name,
        } = deletion;
        let url = event.data.document.url.clone();
        let presence = match &object {
            Some(object) => self.services.presence(&object.url).await?,
            // Nobody here can look: the middleware that says so is believed.
            None => Presence::Gone,
        };
        let is_version_removal = object.as_ref().is_some_and(|one| one.is_version_removal);
        if presence == Presence::Marked && is_version_removal {
            info!(url, "a version went; the delete marker has its own event");
            return Ok(Step::Ignore);
        }
        if presence == Presence::Live && !can_restore {
            info!(url, "the object exists: its deletion is no longer true");
            return Ok(Step::Ignore);
        }
        let vectors = self.services.find_vectors(&url).await?;
        if presence == Presence::Live {
            return match object {
                Some(object) if vectors.is_empty() => {
                    info!(url, "the object is back, and has no vector");
                    self.decide_object(&object).await
                }
                _ => {
                    info!(url, "the object and its vector exist");
                    Ok(Step::Ignore)
                }
            };
        }
        // Where versions come and go, more than one event tells of a key that
        // is empty in the end: the one that finds the vectors announces it.
        let is_one_of_several = presence == Presence::Gone
            && object.as_ref().is_some_and(|one| one.version_id.is_some());
        if vectors.is_empty() && (is_one_of_several || is_no_image_by_name) {
            info!(url, "nothing was embedded of what is deleted");
            return Ok(Step::Ignore);
        }
        if let Err(error) = self.services.publish(event.passed_here()).await {
            if error.failure() == Failure::Transient {
                return Err(error.into());
            }
            self.services.remove_vectors(&vectors).await?;
            return Ok(Step::Reject(rejection(Some(url), error.to_string())));
        }
        self.services.remove_vectors(&vectors).await?;
        info!(url, vectors = vectors.len(), "the deletion is passed on");
        // An object that came back meanwhile may have lost its new vector.
        if let Some(object) = object
            && self.services.presence(&object.url).await? == Presence::Live
        {
            return self.decide_object(&object).await;
        }
        Ok(Step::Deleted)
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
        let since_ms = self.waits_since_ms.lock().await.take();
        match self.services.wake_scaler(since_ms).await {
            Ok(()) => *last_wake = Some(Instant::now()),
            Err(error) => warn!(%error, "the scaler was not woken: its schedule will run it"),
        }
    }
}

/// A deletion as somebody tells of it.
struct Deletion {
    event: CloudEvent,
    /// The object to look at, as a creation, if the document is in S3.
    object: Option<S3Object>,
    /// An object that is there may be one that came back without an event of
    /// its own, by the removal of what stood before it.
    can_restore: bool,
    /// Only a vector can tell that it was one of the seven types.
    is_no_image_by_name: bool,
}

impl Deletion {
    /// Only the name is left to tell the type by.
    fn of_object(object: &S3Object) -> Self {
        let by_name = ImageType::from_name(&object.url.key);
        let mut event = object.to_event(by_name.unwrap_or(ImageType::Jpeg));
        if by_name.is_none() {
            event.data.document.mime_type = UNKNOWN_TYPE.to_owned();
            event.data.source.mime_type = UNKNOWN_TYPE.to_owned();
        }
        Self {
            event,
            object: Some(S3Object {
                kind: EventType::DocumentCreated,
                ..object.clone()
            }),
            can_restore: object.is_version_removal,
            is_no_image_by_name: by_name.is_none(),
        }
    }

    /// A middleware does not tell whether a version, a marker or the object
    /// went, so either may be.
    fn of_event(event: &CloudEvent) -> Self {
        let document = &event.data.document;
        let object = document.url.parse().ok().map(|url| S3Object {
            url,
            kind: EventType::DocumentCreated,
            size: None,
            etag: None,
            version_id: None,
            is_version_removal: false,
        });
        Self {
            object,
            can_restore: true,
            is_no_image_by_name: document.image_type().is_none(),
            event: event.clone(),
        }
    }
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
        objects: StdMutex<HashMap<String, Head>>,
        /// Keys whose latest version is a delete marker.
        marked: Vec<&'static str>,
        /// Documents that have a vector, by their keys.
        vectors: StdMutex<Vec<String>>,
        /// A key that is created anew while its vectors are deleted.
        back_meanwhile: StdMutex<Option<(&'static str, Head)>>,
        head_fails: bool,
        is_too_large: bool,
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
            Ok(self.objects.lock().unwrap().get(&object.url.key).cloned())
        }

        async fn enqueue(&self, events: Vec<CloudEvent>) -> Vec<Result<(), PublishError>> {
            let results = events
                .iter()
                .map(|_| {
                    if self.is_too_large {
                        Err(PublishError::TooLarge {
                            output: "queue".to_owned(),
                            bytes: 300_000,
                        })
                    } else if self.enqueue_fails {
                        Err(PublishError::Unavailable {
                            output: "queue".to_owned(),
                            error: failure("sqs:SendMessageBatch"),
                        })
                    } else {
                        Ok(())
                    }
                })
                .collect();
            if !self.enqueue_fails && !self.is_too_large {
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

        async fn presence(&self, url: &S3Url) -> Result<Presence, aws::Error> {
            if self.head_fails {
                return Err(failure("s3:HeadObject"));
            }
            Ok(if self.objects.lock().unwrap().contains_key(&url.key) {
                Presence::Live
            } else if self.marked.contains(&url.key.as_str()) {
                Presence::Marked
            } else {
                Presence::Gone
            })
        }

        async fn find_vectors(&self, document_url: &str) -> Result<Vec<String>, aws::Error> {
            let vectors = self.vectors.lock().unwrap();
            let found = vectors.iter().filter(|url| url.as_str() == document_url);
            Ok(found.cloned().collect())
        }

        async fn remove_vectors(&self, keys: &[String]) -> Result<(), aws::Error> {
            self.vectors
                .lock()
                .unwrap()
                .retain(|url| !keys.contains(url));
            if let Some((key, head)) = self.back_meanwhile.lock().unwrap().take() {
                self.objects.lock().unwrap().insert(key.to_owned(), head);
            }
            Ok(())
        }

        async fn publish(&self, event: CloudEvent) -> Result<(), PublishError> {
            self.published.lock().unwrap().push(event);
            Ok(())
        }

        async fn wake_scaler(&self, since_ms: Option<i64>) -> Result<(), aws::Error> {
            assert!(since_ms.is_some(), "every event has its time");
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
            objects: StdMutex::new(owned.collect()),
            ..Fake::default()
        }
    }

    fn with_vectors(keys: &[&str]) -> Fake {
        let urls = keys.iter().map(|key| format!("s3://src/{key}"));
        Fake {
            vectors: StdMutex::new(urls.collect()),
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
        let intake = intake(with_vectors(&["ab.png"]));
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
        assert!(intake.services.vectors.lock().unwrap().is_empty());
        let published = intake.services.published.lock().unwrap();
        assert_eq!(published[0].kind, EventType::DocumentDeleted);
        assert_eq!(
            published[0].data.call_stack,
            ["clip-image-processor", "s3-event-trigger"]
        );
    }

    /// A deletion of a key in every form in which S3 tells of it.
    fn told(key: &str, how: How) -> Vec<Value> {
        let (names, deletion_type, version) = match how {
            How::Plain => (
                &["ObjectRemoved:Delete", "LifecycleExpiration:Delete"],
                "Permanently Deleted",
                None,
            ),
            How::Marker => (
                &[
                    "ObjectRemoved:DeleteMarkerCreated",
                    "LifecycleExpiration:DeleteMarkerCreated",
                ],
                "Delete Marker Created",
                Some("m1"),
            ),
            How::Version => (
                &["ObjectRemoved:Delete", "LifecycleExpiration:Delete"],
                "Permanently Deleted",
                Some("v1"),
            ),
        };
        let mut direct: Vec<Value> = names
            .iter()
            .map(|name| {
                let mut payload = created(&[key]);
                payload["Records"][0]["eventName"] = json!(name);
                if let Some(version) = version {
                    payload["Records"][0]["s3"]["object"]["versionId"] = json!(version);
                }
                payload
            })
            .collect();
        let mut event = json!({"source": "aws.s3", "detail-type": "Object Deleted", "detail": {
            "bucket": {"name": "src"}, "object": {"key": key, "sequencer": "0055"},
            "deletion-type": deletion_type,
        }});
        if let Some(version) = version {
            event["detail"]["object"]["version-id"] = json!(version);
        }
        direct.push(event);
        let queued: Vec<Value> = direct
            .iter()
            .map(|one| batch(std::slice::from_ref(one)))
            .collect();
        direct.extend(queued);
        direct
    }

    #[derive(Clone, Copy, Debug)]
    enum How {
        Plain,
        Marker,
        Version,
    }

    #[derive(Debug, PartialEq)]
    enum Then {
        Ignored,
        Announced,
        Enqueued,
    }

    /// A bucket in which `key` is as it is told, with or without a vector.
    fn bucket(key: &'static str, presence: Presence, has_vector: bool) -> Fake {
        let mut fake = match presence {
            Presence::Live => with_objects(&[(key, png())]),
            _ => Fake::default(),
        };
        if presence == Presence::Marked {
            fake.marked.push(key);
        }
        if has_vector {
            fake.vectors = with_vectors(&[key]).vectors;
        }
        fake
    }

    async fn then(intake: &Intake<Fake>, payload: &Value) -> Then {
        match intake.handle(payload).await.unwrap().1 {
            Counts { deleted: 1, .. } => Then::Announced,
            Counts { enqueued: 1, .. } => Then::Enqueued,
            Counts { ignored: 1, .. } => Then::Ignored,
            other => panic!("{other:?}"),
        }
    }

    /// The table of `design.md`, line by line.
    #[tokio::test]
    async fn a_deletion_is_believed_only_when_the_object_is_gone() {
        use Presence::{Gone, Live, Marked};
        for (key, how, presence, had_vector, expected, has_vector) in [
            ("ab.png", How::Plain, Live, true, Then::Ignored, true),
            ("ab.png", How::Plain, Live, false, Then::Ignored, false),
            ("ab.png", How::Plain, Gone, true, Then::Announced, false),
            ("ab.png", How::Plain, Gone, false, Then::Announced, false),
            ("ab.png", How::Marker, Live, true, Then::Ignored, true),
            ("ab.png", How::Marker, Marked, true, Then::Announced, false),
            ("ab.png", How::Marker, Marked, false, Then::Announced, false),
            ("ab.png", How::Marker, Gone, true, Then::Announced, false),
            ("ab.png", How::Marker, Gone, false, Then::Ignored, false),
            ("ab.png", How::Version, Live, true, Then::Ignored, true),
            ("ab.png", How::Version, Live, false, Then::Enqueued, false),
            ("ab.png", How::Version, Marked, true, Then::Ignored, true),
            ("ab.png", How::Version, Marked, false, Then::Ignored, false),
            ("ab.png", How::Version, Gone, true, Then::Announced, false),
            ("ab.png", How::Version, Gone, false, Then::Ignored, false),
            ("gone.txt", How::Plain, Gone, false, Then::Ignored, false),
            ("nameless", How::Plain, Gone, true, Then::Announced, false),
        ] {
            for payload in told(key, how) {
                let intake = intake(bucket(key, presence, had_vector));
                let case = format!("{key} {how:?} {presence:?} {had_vector} {payload}");
                assert_eq!(then(&intake, &payload).await, expected, "{case}");
                let vectors = intake.services.vectors.lock().unwrap().len();
                assert_eq!(vectors, usize::from(has_vector), "{case}");
                let published = intake.services.published.lock().unwrap().len();
                assert_eq!(
                    published,
                    usize::from(expected == Then::Announced),
                    "{case}"
                );
            }
        }
    }

    /// A marker is set, the version under it expires, the marker expires: in
    /// whatever order that is told, consumers hear of it once.
    #[tokio::test]
    async fn the_end_of_a_versioned_object_is_announced_once_in_every_order() {
        let markers = told("ab.png", How::Marker);
        let versions = told("ab.png", How::Version);
        for (marker, version) in markers.iter().zip(&versions) {
            for order in [
                [marker, version, version],
                [version, marker, version],
                [version, version, marker],
            ] {
                for presence in [Presence::Marked, Presence::Gone] {
                    let intake = intake(bucket("ab.png", presence, true));
                    for event in order {
                        intake.handle(event).await.unwrap();
                    }
                    assert_eq!(intake.services.published.lock().unwrap().len(), 1);
                    assert!(intake.services.vectors.lock().unwrap().is_empty());
                }
            }
        }
    }

    #[tokio::test]
    async fn a_deletion_that_cannot_be_checked_comes_again_and_changes_nothing() {
        for how in [How::Plain, How::Marker, How::Version] {
            for payload in told("ab.png", how) {
                let fake = Fake {
                    head_fails: true,
                    ..with_vectors(&["ab.png"])
                };
                let intake = intake(fake);
                match intake.handle(&payload).await {
                    Err(error) => assert!(error.to_string().contains("HeadObject"), "{error}"),
                    Ok((answer, counts)) => {
                        assert_eq!(counts.failed, 1);
                        assert_eq!(answer["batchItemFailures"][0]["itemIdentifier"], "m0");
                    }
                }
                assert_eq!(intake.services.vectors.lock().unwrap().len(), 1);
                assert!(intake.services.published.lock().unwrap().is_empty());
            }
        }
    }

    #[tokio::test]
    async fn an_object_that_comes_back_while_its_vectors_go_is_embedded_again() {
        for payload in told("ab.png", How::Plain) {
            let fake = Fake {
                back_meanwhile: StdMutex::new(Some(("ab.png", png()))),
                ..with_vectors(&["ab.png"])
            };
            let intake = intake(fake);
            assert_eq!(then(&intake, &payload).await, Then::Enqueued);
            let enqueued = intake.services.enqueued.lock().unwrap();
            assert_eq!(enqueued[0].kind, EventType::DocumentCreated);
            assert_eq!(enqueued[0].data.document.url, "s3://src/ab.png");
        }
    }

    #[tokio::test]
    async fn a_middlewares_deletion_is_checked_too() {
        let event = |url: &str, mime: &str| {
            json!({"type": "document-deleted", "id": "1", "data": {
                "chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
                "source": {"url": url, "type": mime}, "document": {"url": url, "type": mime},
            }})
        };
        let image = event("s3://src/ab.png", "image/png");
        let text = event("s3://src/gone.txt", "text/plain");
        let web = event("https://example.com/ab.png", "image/png");
        use Presence::{Gone, Live, Marked};
        for (presence, has_vector, expected) in [
            (Live, true, Then::Ignored),
            (Live, false, Then::Enqueued),
            (Marked, true, Then::Announced),
            (Gone, false, Then::Announced),
        ] {
            let intake = intake(bucket("ab.png", presence, has_vector));
            let outcome = then(&intake, &batch(std::slice::from_ref(&image))).await;
            assert_eq!(outcome, expected, "{presence:?}");
        }
        let nothing = intake(Fake::default());
        assert_eq!(then(&nothing, &text).await, Then::Ignored);
        assert_eq!(then(&nothing, &web).await, Then::Announced);
    }

    #[tokio::test]
    async fn an_event_over_the_queues_limit_is_rejected_with_its_reason() {
        let mut fake = with_objects(&[("ab.png", png())]);
        fake.is_too_large = true;
        let intake = intake(fake);
        let payload = batch(&[created(&["ab.png"])]);
        let (answer, counts) = intake.handle(&payload).await.unwrap();
        assert_eq!(answer, json!({"batchItemFailures": []}));
        assert_eq!((counts.rejected, counts.failed), (1, 0));
        let reasons = intake.services.noted("rejected").join("\n");
        assert!(reasons.contains("300000 bytes"), "{reasons}");
    }

    #[tokio::test]
    async fn a_vanished_object_that_was_no_image_by_its_name_is_no_rejection() {
        let (_, counts) = intake(Fake::default())
            .handle(&created(&["nameless"]))
            .await
            .unwrap();
        assert_eq!((counts.unsupported, counts.rejected), (1, 0));
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
