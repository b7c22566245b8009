//! SQS behind [`Queues`].

use std::time::Duration;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{
    ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
    MessageSystemAttributeName, SendMessageBatchRequestEntry,
};
use chrono::Utc;
use delivery::{send_all, sqs_answer, with_call_timeout};
use platform::aws;

use super::{HOLD, Intake, Letter, MAX_BATCH, Problem, Queues, Results};

/// Seconds of a long poll: above zero, so that all servers are asked.
const WAIT_SECONDS: i32 = 1;

pub enum WayBack {
    None,
    Queue(String),
    Intake(Intake),
}

pub struct SqsQueues {
    client: Client,
    dead_letters: String,
    back: WayBack,
}

impl SqsQueues {
    pub fn new(sdk: &SdkConfig, dead_letters: &str, back: WayBack) -> Self {
        Self {
            client: Client::new(&with_call_timeout(sdk)),
            dead_letters: dead_letters.to_owned(),
            back,
        }
    }

    async fn send_to(&self, input: &str, letters: &[&Letter]) -> Results {
        let sent = send_all(
            "input queue",
            letters,
            |letter| bytes_of(letter),
            |letters| async move {
                let mut request = self.client.send_message_batch().queue_url(input);
                for (position, letter) in letters.iter().enumerate() {
                    let mut entry = SendMessageBatchRequestEntry::builder()
                        .id(position.to_string())
                        .message_body(&letter.body);
                    for (name, value) in &letter.attributes {
                        entry = entry.message_attributes(name, value.clone());
                    }
                    request = request.entries(entry.build().expect("id and body are set"));
                }
                let response = request.send().await.map(|response| response.failed);
                sqs_answer("sqs:SendMessageBatch", input, letters.len(), response)
            },
        );
        sent.await.into_iter().map(|result| Ok(result?)).collect()
    }
}

#[async_trait]
impl Queues for SqsQueues {
    async fn receive(&self) -> Result<Vec<Letter>, aws::Error> {
        let response = self
            .client
            .receive_message()
            .queue_url(&self.dead_letters)
            .max_number_of_messages(MAX_BATCH as i32)
            .wait_time_seconds(WAIT_SECONDS)
            .visibility_timeout(HOLD.as_secs() as i32)
            .message_attribute_names("All")
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount)
            .message_system_attribute_names(MessageSystemAttributeName::SentTimestamp)
            .send()
            .await
            .map_err(|error| {
                aws::Error::from_sdk("sqs:ReceiveMessage", &error).of(&self.dead_letters)
            })?;
        let now = Utc::now();
        let messages = response.messages.unwrap_or_default().into_iter();
        Ok(messages.map(|message| Letter::new(message, now)).collect())
    }

    async fn hold(&self, receipts: &[&str], time: Duration) {
        let seconds = i32::try_from(time.as_secs()).unwrap_or(i32::MAX);
        let queue = &self.dead_letters;
        send_all(
            "dead-letter queue",
            receipts,
            |_| 0,
            |receipts| async move {
                let mut request = self
                    .client
                    .change_message_visibility_batch()
                    .queue_url(queue);
                for (position, receipt) in receipts.iter().enumerate() {
                    let entry = ChangeMessageVisibilityBatchRequestEntry::builder()
                        .id(position.to_string())
                        .receipt_handle(**receipt)
                        .visibility_timeout(seconds)
                        .build()
                        .expect("id and handle are set");
                    request = request.entries(entry);
                }
                let response = request.send().await.map(|response| response.failed);
                sqs_answer(
                    "sqs:ChangeMessageVisibilityBatch",
                    queue,
                    receipts.len(),
                    response,
                )
            },
        )
        .await;
    }

    async fn send(&self, letters: &[&Letter]) -> Results {
        match &self.back {
            WayBack::None => letters.iter().map(|_| Err(Problem::NoWayBack)).collect(),
            WayBack::Intake(intake) => intake.take_all(letters).await,
            WayBack::Queue(input) => {
                let is_body = |letter: &&&Letter| !letter.fields.is_record;
                let bodies: Vec<&Letter> = letters.iter().filter(is_body).copied().collect();
                let mut sent = self.send_to(input, &bodies).await.into_iter();
                letters
                    .iter()
                    .map(|letter| match letter.fields.is_record {
                        true => Err(Problem::NeedsIntake),
                        false => sent.next().expect("a result for each body"),
                    })
                    .collect()
            }
        }
    }

    async fn delete(&self, receipts: &[&str]) -> Results {
        let queue = &self.dead_letters;
        let deleted = send_all(
            "dead-letter queue",
            receipts,
            |_| 0,
            |receipts| async move {
                let mut request = self.client.delete_message_batch().queue_url(queue);
                for (position, receipt) in receipts.iter().enumerate() {
                    let entry = DeleteMessageBatchRequestEntry::builder()
                        .id(position.to_string())
                        .receipt_handle(**receipt)
                        .build()
                        .expect("id and handle are set");
                    request = request.entries(entry);
                }
                let response = request.send().await.map(|response| response.failed);
                sqs_answer("sqs:DeleteMessageBatch", queue, receipts.len(), response)
            },
        );
        deleted
            .await
            .into_iter()
            .map(|result| Ok(result?))
            .collect()
    }
}

fn bytes_of(letter: &Letter) -> usize {
    let attributes = letter.attributes.iter().map(|(name, value)| {
        let text = value.string_value().map_or(0, str::len);
        let binary = value.binary_value().map_or(0, |blob| blob.as_ref().len());
        name.len() + value.data_type().len() + text + binary
    });
    letter.body.len() + attributes.sum::<usize>()
}
