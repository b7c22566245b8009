//! A message of the dead-letter queue, and who is chosen.

use std::collections::HashMap;

use aws_sdk_sqs::types::{Message, MessageAttributeValue, MessageSystemAttributeName};
use chrono::{DateTime, Utc};
use delivery::attribute;
use regex_lite::Regex;
use serde::Serialize;

use super::record::{Record, object_of, undelivered};

/// What is shown for a message that SQS itself moved here.
const MOVED_BY_SQS: &str = "no reason given: moved here by SQS after too many receives";

/// The attributes that a rejection adds, and that do not go back.
const REJECTION_ATTRIBUTES: [&str; 6] = [
    attribute::REASON,
    attribute::STAGE,
    attribute::BY,
    attribute::OBJECT,
    attribute::EVENT,
    attribute::ORIGINAL_BYTES,
];

#[derive(Clone, Debug)]
pub struct Letter {
    pub fields: Fields,
    pub body: String,
    /// What intake was invoked with, when the message is Lambda's record of an
    /// invocation that failed for good.
    pub payload: Option<String>,
    /// Its attributes other than those of the rejection.
    pub attributes: HashMap<String, MessageAttributeValue>,
    pub receipt: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fields {
    pub id: String,
    pub reason: String,
    pub stage: Option<String>,
    /// By which program; `SQS` when it moved the message itself, `Lambda` when
    /// intake failed, `EventBridge` when intake could not be reached.
    pub by: String,
    pub object: Option<String>,
    /// Where the finished event lies that no output took.
    pub event: Option<String>,
    pub receive_count: Option<u64>,
    pub sent_at: Option<DateTime<Utc>>,
    pub age_seconds: Option<u64>,
    pub bytes: usize,
    /// The body's size before it was cut to fit, if it was.
    pub original_bytes: Option<u64>,
    /// Whether it is Lambda's record of a failed invocation: only intake can
    /// take what is in it.
    pub is_record: bool,
    /// Whether the record lacks what intake was invoked with.
    pub is_empty_record: bool,
}

impl Fields {
    /// Whether the work in it is not whole any more, and can only be looked at.
    pub fn is_cut(&self) -> bool {
        self.original_bytes.is_some() || self.is_empty_record
    }
}

impl Letter {
    pub fn new(message: Message, now: DateTime<Utc>) -> Self {
        let number = |name: MessageSystemAttributeName| {
            let text = message.attributes.as_ref()?.get(&name)?;
            text.parse::<i64>().ok()
        };
        let receive_count = number(MessageSystemAttributeName::ApproximateReceiveCount);
        let sent_at = number(MessageSystemAttributeName::SentTimestamp)
            .and_then(DateTime::from_timestamp_millis);
        let mut attributes = message.message_attributes.unwrap_or_default();
        let text = |name: &str| {
            let value = attributes.get(name)?.string_value()?;
            Some(value.to_owned())
        };
        let body = message.body.unwrap_or_default();
        let record = Record::parse(&body);
        let payload = record.as_ref().and_then(Record::payload);
        let work = payload.as_deref().unwrap_or(&body);
        let (by, reason) = match (text(attribute::REASON), &record, undelivered(&attributes)) {
            (Some(reason), _, _) => ("-", reason),
            (None, Some(record), _) => ("Lambda", record.reason()),
            (None, None, Some(reason)) => ("EventBridge", reason),
            (None, None, None) => ("SQS", MOVED_BY_SQS.to_owned()),
        };
        let fields = Fields {
            id: message.message_id.unwrap_or_default(),
            by: text(attribute::BY).unwrap_or_else(|| by.to_owned()),
            reason,
            stage: text(attribute::STAGE),
            object: text(attribute::OBJECT).or_else(|| object_of(work)),
            event: text(attribute::EVENT),
            receive_count: receive_count.and_then(|count| u64::try_from(count).ok()),
            sent_at,
            age_seconds: sent_at
                .and_then(|sent_at| u64::try_from((now - sent_at).num_seconds()).ok()),
            bytes: body.len(),
            original_bytes: text(attribute::ORIGINAL_BYTES).and_then(|bytes| bytes.parse().ok()),
            is_record: record.is_some(),
            is_empty_record: record.is_some() && payload.is_none(),
        };
        attributes.retain(|name, _| !REJECTION_ATTRIBUTES.contains(&name.as_str()));
        Self {
            fields,
            body,
            payload,
            attributes,
            receipt: message.receipt_handle.unwrap_or_default(),
        }
    }
}

#[derive(Clone, Debug)]
pub enum Choice {
    All,
    Reason(Regex),
    /// Those whose id begins with one of these.
    Ids(Vec<String>),
}

impl Choice {
    pub fn takes(&self, fields: &Fields) -> bool {
        match self {
            Choice::All => true,
            Choice::Reason(regex) => regex.is_match(&fields.reason),
            Choice::Ids(ids) => ids.iter().any(|id| fields.id.starts_with(id.trim())),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn text(value: &str) -> MessageAttributeValue {
        MessageAttributeValue::builder()
            .data_type("String")
            .string_value(value)
            .build()
            .unwrap()
    }

    pub(crate) fn letter(id: &str, attributes: &[(&str, &str)]) -> Letter {
        let mut message = Message::builder()
            .message_id(id)
            .receipt_handle(format!("receipt-{id}"))
            .body("{}")
            .attributes(MessageSystemAttributeName::ApproximateReceiveCount, "3")
            .attributes(MessageSystemAttributeName::SentTimestamp, "1777629600000");
        for (name, value) in attributes {
            message = message.message_attributes(*name, text(value));
        }
        let now = "2026-05-01T10:30:00Z".parse().unwrap();
        Letter::new(message.build(), now)
    }

    fn bare(body: &str) -> Letter {
        Letter::new(Message::builder().body(body).build(), Utc::now())
    }

    #[test]
    fn a_rejection_tells_its_reason_and_keeps_only_other_attributes() {
        let letter = letter(
            "m1",
            &[
                ("RejectionReason", "not a PNG"),
                ("RejectionStage", "decode"),
                ("RejectedBy", "gpu-task"),
                ("RejectedObject", "s3://b/a.png"),
                ("Tenant", "blue"),
            ],
        );
        let fields = &letter.fields;
        assert_eq!(fields.reason, "not a PNG");
        assert_eq!(fields.stage.as_deref(), Some("decode"));
        assert_eq!(
            (fields.by.as_str(), fields.age_seconds),
            ("gpu-task", Some(1_800))
        );
        assert_eq!(fields.object.as_deref(), Some("s3://b/a.png"));
        assert!(!fields.is_cut());
        assert_eq!(letter.attributes.keys().collect::<Vec<_>>(), ["Tenant"]);
    }

    #[test]
    fn a_message_that_sqs_moved_tells_so_and_its_object() {
        let body = r#"{"type":"document-created","data":{
            "chainId":"6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
            "source":{"url":"s3://b/a.png","type":"image/png"},
            "document":{"url":"s3://b/a.png","type":"image/png"}}}"#;
        let letter = bare(body);
        assert_eq!(letter.fields.by, "SQS");
        assert_eq!(letter.fields.object.as_deref(), Some("s3://b/a.png"));
        let choice = Choice::Reason(Regex::new("moved here by SQS").unwrap());
        assert!(choice.takes(&letter.fields));
    }

    #[test]
    fn a_record_without_its_payload_can_only_be_looked_at() {
        let mut record = super::super::record::tests::record(&serde_json::json!({"Records": []}));
        let read = |record: &serde_json::Value| bare(&record.to_string());
        let whole = read(&record);
        assert!(whole.fields.is_record && !whole.fields.is_cut());
        assert_eq!(whole.fields.by, "Lambda");
        assert_eq!(whole.payload.as_deref(), Some(r#"{"Records":[]}"#));
        record.as_object_mut().unwrap().remove("requestPayload");
        let empty = read(&record);
        assert!(empty.fields.is_record && empty.fields.is_cut());
    }

    #[test]
    fn ids_may_be_given_by_their_beginnings() {
        let fields = letter("0f6c-1", &[]).fields;
        assert!(Choice::Ids(vec!["0f6".to_owned()]).takes(&fields));
        assert!(!Choice::Ids(vec!["f6c".to_owned()]).takes(&fields));
    }
}
