//! Every form in which work arrives, taken apart into the same few items.
//!
//! An envelope may hold another: an SQS record holds an SNS notification that
//! holds an S3 event. Each layer is recognised by its own shape.

use serde_json::Value;

use crate::{CloudEvent, Document, EventType, ImageType, S3Url, decode_notification_key};

/// How many envelopes may lie around one event. The deepest real form (Pipe →
/// SQS → SNS → S3) has four; more is a mistake or an attack.
const MAX_DEPTH: usize = 6;

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
}

impl S3Object {
    /// The fresh CloudEvent that the S3 trigger emits for this object. A
    /// deletion carries `url` and `type` only.
    pub fn to_event(&self, image_type: ImageType) -> CloudEvent {
        let is_created = self.kind == EventType::DocumentCreated;
        CloudEvent::new(
            self.kind,
            Document {
                url: self.url.to_string(),
                mime_type: image_type.mime().to_owned(),
                size: self.size.filter(|_| is_created).map(Into::into),
                etag: self.etag.clone().filter(|_| is_created),
            },
        )
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
pub enum FormError {
    /// The body is not JSON.
    #[error("not JSON: {0}")]
    Json(String),
    /// The JSON has none of the known shapes.
    #[error(
        "none of the known forms (S3 notification, EventBridge aws.s3 event, SNS, SQS, Pipe, CloudEvent): {0}"
    )]
    Unknown(String),
    /// A known shape lacks something or holds a wrong value.
    #[error("{form}: {problem}")]
    Malformed {
        /// Which form it has.
        form: &'static str,
        /// What is wrong with it.
        problem: String,
    },
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
    if let Some(records) = sqs_records(payload) {
        return records
            .iter()
            .map(|record| {
                let body = record["body"].as_str().unwrap_or_default();
                Delivery {
                    message_id: record["messageId"].as_str().map(str::to_owned),
                    body: body.to_owned(),
                    items: parse_text(body, 1),
                }
            })
            .collect();
    }
    vec![Delivery {
        message_id: None,
        body: payload.to_string(),
        items: parse_value(payload, 0),
    }]
}

/// Takes the body of a queue message apart.
pub fn parse_work(body: &[u8]) -> Result<Vec<Item>, FormError> {
    let value: Value =
        serde_json::from_slice(body).map_err(|error| FormError::Json(error.to_string()))?;
    parse_value(&value, 0)
}

fn parse_text(text: &str, depth: usize) -> Result<Vec<Item>, FormError> {
    let value: Value =
        serde_json::from_str(text).map_err(|error| FormError::Json(error.to_string()))?;
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
        let mut items = Vec::new();
        for element in elements {
            items.extend(parse_value(element, depth + 1)?);
        }
        return Ok(items);
    }
    if let Some(records) = value["Records"].as_array() {
        let mut items = Vec::new();
        for record in records {
            items.extend(parse_record(record, depth)?);
        }
        return Ok(items);
    }
    if is_sqs_record(value) {
        return parse_text(value["body"].as_str().unwrap_or_default(), depth + 1);
    }
    if value["Type"] == "Notification" && value["Message"].is_string() {
        return parse_text(value["Message"].as_str().unwrap_or_default(), depth + 1);
    }
    if value["Event"] == "s3:TestEvent" {
        return Ok(vec![ignored("S3's test event")]);
    }
    if value["detail-type"].is_string() && value["detail"].is_object() {
        return Ok(vec![eventbridge_item(value)?]);
    }
    if value["data"].is_object() && value["type"].is_string() {
        let event =
            CloudEvent::from_value(value.clone()).map_err(|error| FormError::Malformed {
                form: "CloudEvent",
                problem: error.to_string(),
            })?;
        return Ok(vec![Item::Event(Box::new(event))]);
    }
    Err(FormError::Unknown(describe(value)))
}

fn parse_record(record: &Value, depth: usize) -> Result<Vec<Item>, FormError> {
    if is_sqs_record(record) {
        return parse_text(record["body"].as_str().unwrap_or_default(), depth + 1);
    }
    if let Some(message) = record["Sns"]["Message"].as_str() {
        return parse_text(message, depth + 1);
    }
    if record["s3"].is_object() {
        return Ok(vec![s3_record_item(record)?]);
    }
    Err(FormError::Unknown(format!(
        "a record with {}",
        describe(record)
    )))
}

fn sqs_records(payload: &Value) -> Option<&Vec<Value>> {
    let records = payload["Records"].as_array()?;
    let all_are_messages = !records.is_empty() && records.iter().all(is_sqs_record);
    all_are_messages.then_some(records)
}

fn is_sqs_record(value: &Value) -> bool {
    value["messageId"].is_string() && value["body"].is_string()
}

fn ignored(reason: impl Into<String>) -> Item {
    Item::Ignored {
        reason: reason.into(),
    }
}

/// One record of an S3 notification. The version of its structure is not
/// checked: 2.x only ever adds fields.
fn s3_record_item(record: &Value) -> Result<Item, FormError> {
    let malformed = |problem: &str| FormError::Malformed {
        form: "S3 notification",
        problem: problem.to_owned(),
    };
    let name = record["eventName"]
        .as_str()
        .ok_or_else(|| malformed("eventName is missing"))?;
    let name = name.strip_prefix("s3:").unwrap_or(name);
    let kind = if name.starts_with("ObjectCreated:") {
        EventType::DocumentCreated
    } else if name.starts_with("ObjectRemoved:") || name.starts_with("LifecycleExpiration:") {
        EventType::DocumentDeleted
    } else {
        return Ok(ignored(format!("{name} creates and deletes nothing")));
    };
    let s3 = &record["s3"];
    let bucket = s3["bucket"]["name"]
        .as_str()
        .ok_or_else(|| malformed("s3.bucket.name is missing"))?;
    let encoded_key = s3["object"]["key"]
        .as_str()
        .ok_or_else(|| malformed("s3.object.key is missing"))?;
    let key =
        decode_notification_key(encoded_key).map_err(|error| malformed(&error.to_string()))?;
    Ok(object_item(
        bucket,
        &key,
        kind,
        &s3["object"],
        "eTag",
        "versionId",
    ))
}

/// EventBridge's `Object Created` and `Object Deleted`, whose keys are not
/// encoded.
fn eventbridge_item(event: &Value) -> Result<Item, FormError> {
    let malformed = |problem: String| FormError::Malformed {
        form: "EventBridge event",
        problem,
    };
    let detail_type = event["detail-type"].as_str().unwrap_or_default();
    if event["source"] != "aws.s3" {
        return Err(malformed(format!(
            "source is {}, only aws.s3 is known",
            event["source"]
        )));
    }
    let kind = match detail_type {
        "Object Created" => EventType::DocumentCreated,
        "Object Deleted" => EventType::DocumentDeleted,
        other => return Ok(ignored(format!("{other:?} creates and deletes nothing"))),
    };
    let detail = &event["detail"];
    let bucket = detail["bucket"]["name"]
        .as_str()
        .ok_or_else(|| malformed("detail.bucket.name is missing".to_owned()))?;
    let key = detail["object"]["key"]
        .as_str()
        .ok_or_else(|| malformed("detail.object.key is missing".to_owned()))?;
    Ok(object_item(
        bucket,
        key,
        kind,
        &detail["object"],
        "etag",
        "version-id",
    ))
}

fn object_item(
    bucket: &str,
    key: &str,
    kind: EventType,
    object: &Value,
    etag_name: &str,
    version_name: &str,
) -> Item {
    if key.ends_with('/') {
        return ignored(format!("{key:?} is a folder marker"));
    }
    let url = S3Url::new(bucket, key);
    if let Err(error) = url.to_string().parse::<S3Url>() {
        return Item::Rejected {
            object: url.to_string(),
            reason: error.to_string(),
        };
    }
    let text = |name: &str| {
        object[name]
            .as_str()
            .map(|value| value.trim_matches('"').to_owned())
            .filter(|value| !value.is_empty())
    };
    Item::Object(S3Object {
        url,
        kind,
        size: object["size"].as_u64(),
        etag: text(etag_name),
        version_id: text(version_name),
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
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

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
