//! Every form in which work arrives, taken apart into the same few items.
//!
//! An envelope may hold another: an SQS record holds an SNS notification that
//! holds an S3 event. Each layer is recognised by its own shape.

use serde_json::Value;

use crate::{CloudEvent, Document, EventType, ImageType, S3Url, decode_notification_key};

/// How many envelopes may lie around one event. The deepest real form (Pipe →
/// SQS → SNS → S3) has four; more is a mistake or an attack.
const MAX_DEPTH: usize = 6;

/// The middleware whose place this system takes for events of S3.
const S3_TRIGGER: &str = "s3-event-trigger";

/// An object in S3 of which something happened, as S3 or EventBridge tells.
#[derive(Clone, Debug, PartialEq)]
pub struct S3Object {
    /// Where it is (key decoded).
    pub url: S3Url,
    /// Created or deleted.
    pub kind: EventType,
    /// Size in bytes; absent for deletions.
    pub size: Option<u64>,
    /// ETag without quotes; absent for deletions.
    pub etag: Option<String>,
    /// Version, in a bucket with versioning.
    pub version_id: Option<String>,
    /// A deletion took this very version away (an old one, the latest, or a
    /// delete marker), which says nothing of the object that the key names.
    pub is_version_removal: bool,
}

impl S3Object {
    /// The fresh CloudEvent that the S3 trigger emits for this object. A
    /// deletion carries `url` and `type` only.
    pub fn to_event(&self, image_type: ImageType) -> CloudEvent {
        let is_created = self.kind == EventType::DocumentCreated;
        let mut event = CloudEvent::new(
            self.kind,
            Document {
                url: self.url.to_string(),
                mime_type: image_type.mime().to_owned(),
                size: self.size.filter(|_| is_created).map(Into::into),
                etag: self.etag.clone().filter(|_| is_created),
            },
        );
        event.data.call_stack = vec![S3_TRIGGER.to_owned()];
        event
    }
}

/// One piece of work.
#[derive(Clone, Debug, PartialEq)]
pub enum Item {
    /// An object of a bucket, from S3 itself.
    Object(S3Object),
    /// A CloudEvent from another middleware.
    Event(Box<CloudEvent>),
    /// An object that no event can carry.
    Rejected {
        /// What was named.
        object: String,
        /// Why it is rejected.
        reason: String,
    },
    /// Nothing to do, by the contract: folder markers, test events.
    Ignored {
        /// Why.
        reason: String,
    },
}

/// Why a payload is not work in any known form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // The messages say it.
pub enum FormError {
    #[error("not JSON: {0}")]
    Json(String),
    #[error(
        "none of the known forms (S3 notification, EventBridge aws.s3 event, SNS, SQS, Pipe, CloudEvent): {0}"
    )]
    Unknown(String),
    #[error("{form}: {problem}")]
    Malformed { form: &'static str, problem: String },
}

/// What one delivery holds. An SQS batch has one delivery per record, which
/// succeeds or fails by itself; every other payload is a single delivery.
#[derive(Clone, Debug, PartialEq)]
pub struct Delivery {
    /// The SQS message id, for `batchItemFailures`.
    pub message_id: Option<String>,
    /// The body as it arrived, for the dead-letter queue.
    pub body: String,
    /// What it holds, or why it cannot be read.
    pub items: Result<Vec<Item>, FormError>,
}

/// Takes a Lambda's payload apart.
pub fn deliveries(payload: &Value) -> Vec<Delivery> {
    let records = payload["Records"].as_array().filter(|all| !all.is_empty());
    let messages = records.and_then(|all| all.iter().map(sqs_message).collect());
    let Some(messages): Option<Vec<(String, String)>> = messages else {
        return vec![Delivery {
            message_id: None,
            body: payload.to_string(),
            items: parse_value(payload, 0),
        }];
    };
    let delivery = |(message_id, body): (String, String)| Delivery {
        message_id: Some(message_id),
        items: parse_json(body.as_bytes(), 1),
        body,
    };
    messages.into_iter().map(delivery).collect()
}

/// Takes the body of a queue message apart.
pub fn parse_work(body: &[u8]) -> Result<Vec<Item>, FormError> {
    parse_json(body, 0)
}

fn parse_json(json: &[u8], depth: usize) -> Result<Vec<Item>, FormError> {
    let value: Value =
        serde_json::from_slice(json).map_err(|error| FormError::Json(error.to_string()))?;
    parse_value(&value, depth)
}

fn parse_value(value: &Value, depth: usize) -> Result<Vec<Item>, FormError> {
    if depth > MAX_DEPTH {
        return Err(FormError::Unknown(format!(
            "more than {MAX_DEPTH} envelopes around one event"
        )));
    }
    // A Pipe hands over an array of whatever its source holds.
    if let Some(elements) = value.as_array() {
        let parsed = elements.iter().map(|one| parse_value(one, depth + 1));
        return Ok(parsed.collect::<Result<Vec<_>, _>>()?.concat());
    }
    if let Some(records) = value["Records"].as_array() {
        let parsed = records.iter().map(|one| parse_record(one, depth));
        return Ok(parsed.collect::<Result<Vec<_>, _>>()?.concat());
    }
    if let Some((_, body)) = sqs_message(value) {
        return parse_json(body.as_bytes(), depth + 1);
    }
    if value["Type"] == "Notification"
        && let Some(message) = value["Message"].as_str()
    {
        return parse_json(message.as_bytes(), depth + 1);
    }
    if value["Event"] == "s3:TestEvent" {
        return Ok(vec![ignored("S3's test event")]);
    }
    if value["detail-type"].is_string() && value["detail"].is_object() {
        return Ok(vec![eventbridge_item(value)?]);
    }
    if value["data"].is_object() && value["type"].is_string() {
        let event = CloudEvent::from_value(value.clone()).map_err(malformed("CloudEvent"))?;
        return Ok(vec![Item::Event(Box::new(event))]);
    }
    Err(FormError::Unknown(describe(value)))
}

fn parse_record(record: &Value, depth: usize) -> Result<Vec<Item>, FormError> {
    if let Some((_, body)) = sqs_message(record) {
        return parse_json(body.as_bytes(), depth + 1);
    }
    if let Some(message) = record["Sns"]["Message"].as_str() {
        return parse_json(message.as_bytes(), depth + 1);
    }
    if record["s3"].is_object() {
        return Ok(vec![s3_record_item(record)?]);
    }
    Err(FormError::Unknown(format!(
        "a record with {}",
        describe(record)
    )))
}

/// Id and body of an SQS message, if the value is one. Of an envelope only that is read which is
/// needed: one that is odd elsewhere must not take its work along, nor the rest of a batch.
fn sqs_message(value: &Value) -> Option<(String, String)> {
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    Some((text("messageId")?, text("body")?))
}

fn ignored(reason: impl Into<String>) -> Item {
    Item::Ignored {
        reason: reason.into(),
    }
}

fn malformed<E: ToString>(form: &'static str) -> impl Fn(E) -> FormError {
    move |problem| FormError::Malformed {
        form,
        problem: problem.to_string(),
    }
}

/// One record of an S3 notification. The version of its structure is not
/// checked: 2.x only ever adds fields.
fn s3_record_item(record: &Value) -> Result<Item, FormError> {
    const FORM: &str = "S3 notification";
    let name = record["eventName"].as_str();
    let name = name.ok_or_else(|| malformed(FORM)("eventName is missing"))?;
    let name = name.strip_prefix("s3:").unwrap_or(name);
    let kind = if name.starts_with("ObjectCreated:") {
        EventType::DocumentCreated
    } else if name.starts_with("ObjectRemoved:") || name.starts_with("LifecycleExpiration:") {
        EventType::DocumentDeleted
    } else {
        return Ok(ignored(format!("{name} creates and deletes nothing")));
    };
    let Found {
        bucket,
        key,
        object,
    } = Found::of(FORM, &record["s3"])?;
    let key = decode_notification_key(key).map_err(malformed(FORM))?;
    let is_marker = name.ends_with(":DeleteMarkerCreated");
    let names = ["eTag", "versionId"];
    Ok(object_item(bucket, &key, kind, object, names, is_marker))
}

/// EventBridge's `Object Created` and `Object Deleted`, whose keys are not
/// encoded.
fn eventbridge_item(event: &Value) -> Result<Item, FormError> {
    const FORM: &str = "EventBridge event";
    if event["source"] != "aws.s3" {
        let problem = format!("source is {}, only aws.s3 is known", event["source"]);
        return Err(malformed(FORM)(problem));
    }
    let kind = match event["detail-type"].as_str().unwrap_or_default() {
        "Object Created" => EventType::DocumentCreated,
        "Object Deleted" => EventType::DocumentDeleted,
        other => return Ok(ignored(format!("{other:?} creates and deletes nothing"))),
    };
    let Found {
        bucket,
        key,
        object,
    } = Found::of(FORM, &event["detail"])?;
    let is_marker = event["detail"]["deletion-type"] == "Delete Marker Created";
    let names = ["etag", "version-id"];
    Ok(object_item(bucket, key, kind, object, names, is_marker))
}

/// What both tell of an object.
struct Found<'a> {
    bucket: &'a str,
    key: &'a str,
    object: &'a Value,
}

impl<'a> Found<'a> {
    fn of(form: &'static str, told: &'a Value) -> Result<Self, FormError> {
        let object = &told["object"];
        let bucket = told["bucket"]["name"].as_str();
        let key = object["key"].as_str();
        Ok(Self {
            bucket: bucket.ok_or_else(|| malformed(form)("bucket.name is missing"))?,
            key: key.ok_or_else(|| malformed(form)("object.key is missing"))?,
            object,
        })
    }
}

fn object_item(
    bucket: &str,
    key: &str,
    kind: EventType,
    object: &Value,
    [etag, version_id]: [&str; 2],
    is_marker: bool,
) -> Item {
    if key.ends_with('/') {
        return ignored(format!("{key:?} is a folder marker"));
    }
    let url = S3Url::new(bucket, key);
    let problem = match url.to_string().parse::<S3Url>() {
        Ok(same) if same == url => None,
        // It would name another bucket once it is written as a URL.
        Ok(_) => Some(format!("{bucket:?} is no bucket's name")),
        Err(error) => Some(error.to_string()),
    };
    if let Some(reason) = problem {
        return Item::Rejected {
            object: url.to_string(),
            reason,
        };
    }
    let text = |name: &str| {
        let text = object[name].as_str()?.trim_matches('"').to_owned();
        (!text.is_empty()).then_some(text)
    };
    let version_id = text(version_id);
    Item::Object(S3Object {
        url,
        kind,
        size: object["size"].as_u64(),
        etag: text(etag),
        is_version_removal: kind == EventType::DocumentDeleted
            && version_id.is_some()
            && !is_marker,
        version_id,
    })
}

/// The names at the top of a value, for an error that a person can act on.
fn describe(value: &Value) -> String {
    /// Enough to recognise a form by.
    const MAX_NAMES: usize = 8;
    match value {
        Value::Object(map) => {
            let names: Vec<&str> = map.keys().take(MAX_NAMES).map(String::as_str).collect();
            format!("an object with the keys {}", names.join(", "))
        }
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::Number(_) => "a number".to_owned(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn s3_event(name: &str, key: &str) -> Value {
        json!({"Records": [{
            "eventVersion": "2.1",
            "eventSource": "aws:s3",
            "eventName": name,
            "s3": {
                "bucket": {"name": "src"},
                "object": {"key": key, "size": 12, "eTag": "abc-3", "versionId": "v1"},
            },
        }]})
    }

    fn only_object(items: Vec<Item>) -> S3Object {
        match items.as_slice() {
            [Item::Object(object)] => object.clone(),
            other => panic!("one object expected, not {other:?}"),
        }
    }

    fn sqs(bodies: &[String]) -> Value {
        let records: Vec<Value> = bodies
            .iter()
            .enumerate()
            .map(|(index, body)| {
                json!({"messageId": format!("m{index}"), "body": body, "eventSource": "aws:sqs"})
            })
            .collect();
        json!({ "Records": records })
    }

    #[test]
    fn an_s3_notification_is_the_same_work_in_every_envelope() {
        let notification = s3_event("ObjectCreated:Put", "a/my+photo%2B.png");
        let text = notification.to_string();
        let wrapped = json!({"Type": "Notification", "Message": text}).to_string();
        let expected = S3Object {
            url: S3Url::new("src", "a/my photo+.png"),
            kind: EventType::DocumentCreated,
            size: Some(12),
            etag: Some("abc-3".to_owned()),
            version_id: Some("v1".to_owned()),
            is_version_removal: false,
        };
        let forms = [
            ("direct", notification.clone()),
            ("through SQS", sqs(std::slice::from_ref(&text))),
            (
                "through SNS",
                json!({"Records": [{"EventSource": "aws:sns", "Sns": {"Message": text}}]}),
            ),
            ("through SNS and SQS, wrapped", sqs(&[wrapped])),
            ("through SNS and SQS, raw", sqs(std::slice::from_ref(&text))),
            (
                "through a Pipe from SQS",
                json!([{"messageId": "m", "body": text}]),
            ),
        ];
        for (name, form) in forms {
            let delivery = deliveries(&form).remove(0);
            assert_eq!(only_object(delivery.items.unwrap()), expected, "{name}");
        }
    }

    /// What moto 5 sends.
    #[test]
    fn an_s3_record_of_moto_without_a_user_identity_is_work() {
        let record = json!({
            "eventVersion": "2.1", "eventSource": "aws:s3", "awsRegion": "eu-west-1",
            "eventTime": "2026-05-01T10:00:00.000Z", "eventName": "ObjectCreated:Put",
            "s3": {
                "s3SchemaVersion": "1.0", "configurationId": "images",
                "bucket": {"name": "src", "arn": "arn:aws:s3:::src"},
                "object": {"key": "a%2Fb.png", "size": 12, "eTag": "abc"},
            },
        });
        let object = only_object(parse_value(&json!({"Records": [record]}), 0).unwrap());
        assert_eq!(object.url.key, "a/b.png");
    }

    /// An envelope as SNS puts it into a queue, and one that somebody has shortened.
    #[test]
    fn an_sns_envelope_is_read_whole_or_shortened() {
        let text = s3_event("ObjectCreated:Put", "ab.png").to_string();
        let short = json!({"Type": "Notification", "Message": text});
        let mut whole = json!({
            "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324", "Subject": null,
            "TopicArn": "arn:aws:sns:eu-west-1:123456789012:images",
            "Timestamp": "2026-05-01T10:00:00.000Z", "SignatureVersion": "1", "Signature": "x",
            "SigningCertURL": "https://sns.eu-west-1.amazonaws.com/c.pem",
            "UnsubscribeURL": "https://sns.eu-west-1.amazonaws.com/?Action=Unsubscribe",
            "MessageAttributes": {"a": {"Type": "String", "Value": "b"}},
        });
        whole["Type"] = short["Type"].clone();
        whole["Message"] = short["Message"].clone();
        for envelope in [short, whole] {
            let object = only_object(parse_value(&envelope, 0).unwrap());
            assert_eq!(object.url.key, "ab.png");
        }
    }

    #[test]
    fn an_eventbridge_key_is_taken_as_it_is() {
        let event = |detail_type: &str| {
            json!({
                "version": "0", "source": "aws.s3", "detail-type": detail_type,
                "detail": {
                    "bucket": {"name": "src"},
                    "object": {"key": "a+b %41.png", "size": 5, "etag": "e", "version-id": "v"},
                },
            })
        };
        let created = only_object(parse_value(&event("Object Created"), 0).unwrap());
        assert_eq!(created.url.key, "a+b %41.png");
        assert_eq!(created.version_id.as_deref(), Some("v"));
        let deleted = only_object(parse_value(&event("Object Deleted"), 0).unwrap());
        assert_eq!(deleted.kind, EventType::DocumentDeleted);
        let ignored = parse_value(&event("Object Restore Completed"), 0).unwrap();
        assert!(matches!(ignored.as_slice(), [Item::Ignored { .. }]));
    }

    #[test]
    fn folder_markers_and_test_events_are_ignored() {
        let test_event = json!({"Service": "Amazon S3", "Event": "s3:TestEvent", "Bucket": "src"});
        for form in [test_event, s3_event("ObjectCreated:Put", "folder/")] {
            let items = parse_value(&form, 0).unwrap();
            assert!(matches!(items.as_slice(), [Item::Ignored { .. }]), "{form}");
        }
    }

    #[test]
    fn an_object_that_no_event_can_carry_is_rejected_with_its_reason() {
        let items = parse_value(&s3_event("ObjectCreated:Put", "a"), 0).unwrap();
        assert!(
            matches!(items.as_slice(), [Item::Rejected { object, .. }] if object == "s3://src/a")
        );
    }

    #[test]
    fn a_deletion_becomes_an_event_with_url_and_type_only() {
        let object =
            only_object(parse_value(&s3_event("ObjectRemoved:Delete", "ab.png"), 0).unwrap());
        let event = object.to_event(ImageType::Png);
        let document = serde_json::to_value(&event.data.document).unwrap();
        assert_eq!(
            document,
            json!({"url": "s3://src/ab.png", "type": "image/png"})
        );
    }

    #[test]
    fn each_record_of_a_batch_succeeds_or_fails_by_itself() {
        let good = s3_event("ObjectCreated:Put", "ab.png").to_string();
        let deliveries = deliveries(&sqs(&[good.clone(), "not json".to_owned(), good]));
        let outcomes: Vec<bool> = deliveries.iter().map(|one| one.items.is_ok()).collect();
        assert_eq!(outcomes, [true, false, true]);
        assert_eq!(deliveries[1].message_id.as_deref(), Some("m1"));
        assert_eq!(deliveries[1].body, "not json");
    }

    #[test]
    fn what_is_no_work_is_refused_with_what_was_seen() {
        for (value, word) in [
            (json!({"foo": 1}), "foo"),
            (json!({"Records": [{"kinesis": {}}]}), "kinesis"),
            (
                json!({"detail-type": "X", "source": "aws.ec2", "detail": {}}),
                "aws.ec2",
            ),
            (json!({"type": "document-created", "data": {}}), "chainId"),
            (json!("text"), "a string"),
        ] {
            let error = parse_value(&value, 0).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_payload_panics(text in "\\PC{0,200}", depth in 0usize..12) {
            let mut value = json!({"Type": "Notification", "Message": text});
            for _ in 0..depth {
                value = json!([value]);
            }
            let _ = deliveries(&value);
        }
    }
}
