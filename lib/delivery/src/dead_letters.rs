//! Putting a message that can never succeed into the dead-letter queue, with
//! the reason as attributes, so that a person or `redrive` can tell why.

use aws_config::SdkConfig;
use aws_sdk_sqs::types::{MessageAttributeValue, SendMessageBatchRequestEntry};
use platform::aws;

use crate::{Answer, PUBLISH_MAX_BYTES, send_all, sqs_answer, with_call_timeout};

/// Names of the attributes of a rejected message.
pub mod attribute {
    /// Why the message was rejected.
    pub const REASON: &str = "RejectionReason";
    /// In which stage.
    pub const STAGE: &str = "RejectionStage";
    /// By which program.
    pub const BY: &str = "RejectedBy";
    /// The object that the message is about, where it is known.
    pub const OBJECT: &str = "RejectedObject";
    /// Where the finished event lies that no output took.
    pub const EVENT: &str = "RejectedEvent";
    /// Length of the body in bytes before it was cut to SQS's limit.
    pub const ORIGINAL_BYTES: &str = "OriginalBytes";
}

/// Bytes of an attribute's value: a reason is a sentence, and every byte is
/// taken from what is left for the body.
const MAX_ATTRIBUTE_BYTES: usize = 2048;

/// Bytes kept free for all attributes with their names and types: six of them
/// at most, five of which are short in practice.
const ATTRIBUTE_RESERVE: usize = 3 * MAX_ATTRIBUTE_BYTES + 1024;

/// Why a message was rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// The stage that rejected it: `parse`, `download`, `decode`, …
    pub stage: String,
    /// Why, for a person.
    pub reason: String,
    /// The program that rejected it: `intake`, `gpu-task`.
    pub by: String,
    /// The object that the message is about, where it is known.
    pub object: Option<String>,
    /// Where the finished event lies that no output took.
    pub event: Option<String>,
}

/// The dead-letter queue.
#[derive(Clone)]
pub struct DeadLetters {
    client: aws_sdk_sqs::Client,
    queue_url: String,
}

impl DeadLetters {
    /// A dead-letter queue by its URL.
    pub fn new(sdk: &SdkConfig, queue_url: &str) -> Self {
        Self {
            client: aws_sdk_sqs::Client::new(&with_call_timeout(sdk)),
            queue_url: queue_url.to_owned(),
        }
    }

    /// Puts one message into the queue. Only after `Ok` may it be deleted
    /// elsewhere.
    pub async fn reject(&self, body: &str, rejection: &Rejection) -> Result<(), aws::Error> {
        let all = [(body.to_owned(), rejection.clone())];
        self.reject_all(&all).await.remove(0)
    }

    /// Puts messages into the queue, in batches, with retries; one result per
    /// message.
    pub async fn reject_all(
        &self,
        rejected: &[(String, Rejection)],
    ) -> Vec<Result<(), aws::Error>> {
        let letters: Vec<Letter> = rejected
            .iter()
            .map(|(body, rejection)| Letter::new(body, rejection))
            .collect();
        let send = |batch| self.send(batch);
        send_all("dead-letter queue", &letters, |letter| letter.bytes, send).await
    }

    async fn send(&self, letters: Vec<&Letter>) -> Answer {
        let mut request = self.client.send_message_batch().queue_url(&self.queue_url);
        for (position, letter) in letters.iter().enumerate() {
            request = request.entries(letter.entry(position));
        }
        let response = request.send().await.map(|response| response.failed);
        sqs_answer(
            "sqs:SendMessageBatch",
            &self.queue_url,
            letters.len(),
            response,
        )
    }
}

/// A rejected message as SQS accepts it.
struct Letter {
    body: String,
    attributes: Vec<(&'static str, String)>,
    bytes: usize,
}

impl Letter {
    fn new(body: &str, rejection: &Rejection) -> Self {
        let body_limit = PUBLISH_MAX_BYTES - ATTRIBUTE_RESERVE;
        let mut sendable = sendable(body, body_limit);
        let mut attributes = vec![
            (attribute::REASON, rejection.reason.as_str()),
            (attribute::STAGE, &rejection.stage),
            (attribute::BY, &rejection.by),
        ];
        if let Some(object) = &rejection.object {
            attributes.push((attribute::OBJECT, object));
        }
        if let Some(event) = &rejection.event {
            attributes.push((attribute::EVENT, event));
        }
        let original_bytes = body.len().to_string();
        if body.len() > body_limit {
            attributes.push((attribute::ORIGINAL_BYTES, &original_bytes));
        }
        let mut left = ATTRIBUTE_RESERVE;
        let mut kept: Vec<(&'static str, String)> = Vec::new();
        for (name, value) in attributes {
            let overhead = name.len() + "String".len();
            let limit = MAX_ATTRIBUTE_BYTES.min(left.saturating_sub(overhead));
            let value = self::sendable(value, limit);
            left = left.saturating_sub(overhead + value.len());
            kept.push((name, value));
        }
        if sendable.is_empty() {
            // SQS takes no empty body.
            sendable = "(empty)".to_owned();
        }
        let bytes = sendable.len() + ATTRIBUTE_RESERVE - left;
        Self {
            body: sendable,
            attributes: kept,
            bytes,
        }
    }

    fn entry(&self, position: usize) -> SendMessageBatchRequestEntry {
        let mut entry = SendMessageBatchRequestEntry::builder()
            .id(position.to_string())
            .message_body(&self.body);
        for (name, value) in &self.attributes {
            // SQS takes no empty attribute.
            if value.is_empty() {
                continue;
            }
            let value = MessageAttributeValue::builder()
                .data_type("String")
                .string_value(value)
                .build()
                .expect("the data type is set");
            entry = entry.message_attributes(*name, value);
        }
        entry.build().expect("id and body are set")
    }
}

/// The text with what SQS does not accept replaced (it takes the characters
/// of XML 1.0), cut to at most `max_bytes` at a character's boundary.
fn sendable(text: &str, max_bytes: usize) -> String {
    let mut result = String::with_capacity(text.len().min(max_bytes));
    for character in text.chars() {
        let is_accepted =
            matches!(character, '\t' | '\n' | '\r' | ' '..='\u{fffd}' | '\u{10000}'..);
        let character = if is_accepted { character } else { '\u{fffd}' };
        if result.len() + character.len_utf8() > max_bytes {
            break;
        }
        result.push(character);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn rejection(reason: &str) -> Rejection {
        Rejection {
            stage: "decode".to_owned(),
            reason: reason.to_owned(),
            by: "gpu-task".to_owned(),
            object: Some("s3://b/é.png".to_owned()),
            event: None,
        }
    }

    #[test]
    fn a_usual_message_keeps_its_body_and_gets_its_reasons() {
        let letter = Letter::new("{\"a\": 1}", &rejection("truncated"));
        assert_eq!(letter.body, "{\"a\": 1}");
        assert_eq!(
            letter.attributes,
            [
                ("RejectionReason", "truncated".to_owned()),
                ("RejectionStage", "decode".to_owned()),
                ("RejectedBy", "gpu-task".to_owned()),
                ("RejectedObject", "s3://b/é.png".to_owned()),
            ]
        );
    }

    #[test]
    fn an_empty_or_binary_body_can_still_be_sent() {
        assert_eq!(Letter::new("", &rejection("r")).body, "(empty)");
        assert_eq!(
            Letter::new("a\0b\u{ffff}", &rejection("r")).body,
            "a\u{fffd}b\u{fffd}"
        );
    }

    #[test]
    fn a_body_over_the_limit_is_cut_and_says_so() {
        let letter = Letter::new(&"é".repeat(400_000), &rejection("r"));
        assert!(letter.bytes <= PUBLISH_MAX_BYTES);
        assert!(
            letter
                .attributes
                .contains(&("OriginalBytes", "800000".to_owned()))
        );
    }

    proptest! {
        #[test]
        fn no_letter_is_over_sqs_limits(body in ".{0,300}", repeats in 1usize..2000, reason in ".{0,4000}") {
            let mut rejection = rejection(&reason);
            rejection.object = Some(reason.clone());
            rejection.event = Some(reason);
            let letter = Letter::new(&body.repeat(repeats), &rejection);
            let attributes: usize = letter
                .attributes
                .iter()
                .map(|(name, value)| name.len() + "String".len() + value.len())
                .sum();
            prop_assert!(letter.body.len() + attributes <= PUBLISH_MAX_BYTES);
            prop_assert!(letter.bytes >= letter.body.len() + attributes);
            prop_assert!(letter.attributes.len() <= 10);
        }
    }
}
