//! What lies in the queue of failed invocations: Lambda's record of an
//! asynchronous invocation of intake that failed for good, and events that
//! EventBridge could not deliver to it.
//!
//! Lambda Developer Guide, "Capturing records of Lambda asynchronous
//! invocations"; EventBridge User Guide, "Using dead-letter queues to process
//! undelivered events".

use std::collections::HashMap;

use aws_sdk_sqs::types::MessageAttributeValue;
use events::{Item, deliveries};
use serde::Deserialize;
use serde_json::Value;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    request_context: Context,
    /// What the function was invoked with. Lambda leaves it out of a record
    /// that would be too large with it.
    request_payload: Option<Value>,
    response_payload: Option<Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Context {
    condition: String,
    /// Every record names the function; nothing else has both.
    #[serde(rename = "functionArn")]
    _function_arn: String,
    approximate_invoke_count: Option<u64>,
}

impl Record {
    /// `None` for any other message.
    pub fn parse(body: &str) -> Option<Self> {
        serde_json::from_str(body).ok()
    }

    pub fn payload(&self) -> Option<String> {
        self.request_payload.as_ref().map(Value::to_string)
    }

    pub fn reason(&self) -> String {
        let mut reason = self.request_context.condition.clone();
        if let Some(count) = self.request_context.approximate_invoke_count {
            reason.push_str(&format!(" after {count} invocations"));
        }
        match &self.response_payload {
            None | Some(Value::Null) => {}
            Some(response) => match error_message(response) {
                Some(message) => reason.push_str(&format!(": {message}")),
                None => reason.push_str(&format!(": {response}")),
            },
        }
        reason
    }
}

pub fn error_message(response: &Value) -> Option<&str> {
    response["errorMessage"].as_str()
}

/// Why EventBridge could not deliver the event that is the message's body.
pub fn undelivered(attributes: &HashMap<String, MessageAttributeValue>) -> Option<String> {
    let text = |name: &str| attributes.get(name)?.string_value();
    text("RULE_ARN")?;
    let code = text("ERROR_CODE")?;
    let message = text("ERROR_MESSAGE").unwrap_or_default();
    let tries =
        text("RETRY_ATTEMPTS").map_or(String::new(), |count| format!(" after {count} retries"));
    Some(format!("{code}{tries}: {message}"))
}

/// The object that work is about, and of how many more it is.
pub fn object_of(work: &str) -> Option<String> {
    let value: Value = serde_json::from_str(work).ok()?;
    let mut urls = deliveries(&value)
        .into_iter()
        .filter_map(|delivery| delivery.items.ok())
        .flatten()
        .filter_map(|item| match item {
            Item::Event(event) => Some(event.data.document.url),
            Item::Object(object) => Some(object.url.to_string()),
            Item::Rejected { object, .. } => Some(object),
            Item::Ignored { .. } => None,
        });
    let first = urls.next()?;
    match urls.count() {
        0 => Some(first),
        more => Some(format!("{first} and {more} more")),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::letter::tests::text;
    use super::*;
    use serde_json::json;

    /// A record as Lambda writes it.
    pub(crate) fn record(payload: &Value) -> Value {
        json!({
            "version": "1.0",
            "timestamp": "2026-05-01T10:00:00.000Z",
            "requestContext": {
                "requestId": "e4b46cbf-b738-xmpl-8880-a18cdf61200e",
                "functionArn": "arn:aws:lambda:eu-west-1:123456789012:function:intake:$LATEST",
                "condition": "RetriesExhausted",
                "approximateInvokeCount": 3,
            },
            "requestPayload": payload,
            "responseContext": {"statusCode": 200, "executedVersion": "$LATEST", "functionError": "Unhandled"},
            "responsePayload": {"errorMessage": "SendMessageBatch: QueueDoesNotExist", "errorType": "&ServiceError"},
        })
    }

    #[test]
    fn a_record_tells_what_was_asked_and_why_it_failed() {
        let payload = json!({"Records": [
            {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b"}, "object": {"key": "a+b.png"}}},
            {"eventName": "ObjectCreated:Put", "s3": {"bucket": {"name": "b"}, "object": {"key": "c.png"}}},
        ]});
        let record = Record::parse(&record(&payload).to_string()).expect("a record");
        assert_eq!(
            record.reason(),
            "RetriesExhausted after 3 invocations: SendMessageBatch: QueueDoesNotExist"
        );
        let kept = record.payload().expect("a payload");
        assert_eq!(serde_json::from_str::<Value>(&kept).unwrap(), payload);
        assert_eq!(
            object_of(&kept).as_deref(),
            Some("s3://b/a%20b.png and 1 more")
        );
    }

    #[test]
    fn an_event_that_grew_too_old_has_no_response() {
        let mut old = record(&json!({}));
        old["requestContext"]["condition"] = json!("EventAgeExceeded");
        old["requestContext"]["approximateInvokeCount"] = json!(0);
        old.as_object_mut().unwrap().remove("responsePayload");
        let record = Record::parse(&old.to_string()).expect("a record");
        assert_eq!(record.reason(), "EventAgeExceeded after 0 invocations");
    }

    #[test]
    fn nothing_else_is_a_record() {
        let work = json!({"requestPayload": {}, "requestContext": {"condition": "x"}});
        for body in ["", "null", "{}", &work.to_string()] {
            assert!(Record::parse(body).is_none(), "{body}");
        }
    }

    #[test]
    fn an_undelivered_event_tells_its_error() {
        let attributes = HashMap::from(
            [
                (
                    "RULE_ARN",
                    "arn:aws:events:eu-west-1:123456789012:rule/images",
                ),
                ("ERROR_CODE", "NO_PERMISSIONS"),
                ("ERROR_MESSAGE", "not authorized to invoke"),
                ("RETRY_ATTEMPTS", "185"),
            ]
            .map(|(name, value)| (name.to_owned(), text(value))),
        );
        assert_eq!(
            undelivered(&attributes).as_deref(),
            Some("NO_PERMISSIONS after 185 retries: not authorized to invoke")
        );
        assert_eq!(undelivered(&HashMap::new()), None);
    }
}
