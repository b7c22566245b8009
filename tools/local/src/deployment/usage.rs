//! What a test or a demo asks of a running pipeline.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, Message, QueueAttributeName};
use serde_json::{Value, json};
use template::text_of;

use super::{DeployError, Deployment, SOURCE_BUCKET, names::name};
use crate::sdk::{CallFailed, failed, sent};

/// Messages of one receive call (SQS ReceiveMessage API).
const RECEIVE_MAX: i32 = 10;

#[derive(Debug, Clone)]
pub struct DeadLetter {
    /// What was rejected, as it was received.
    pub body: String,
    /// `RejectionReason`; none when SQS gave the message up after too many receives.
    pub reason: Option<String>,
    pub stage: Option<String>,
    pub by: Option<String>,
    /// `RejectedObject`, or the document in the body.
    pub object: Option<String>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueCounts {
    pub visible: usize,
    pub in_flight: usize,
}

impl QueueCounts {
    /// All of them.
    pub fn total(self) -> usize {
        self.visible + self.in_flight
    }
}

#[derive(Debug, Clone)]
pub struct LogLine {
    pub timestamp: i64,
    pub message: String,
}

impl LogLine {
    /// The line as a JSON object, where it is one.
    pub fn json(&self) -> Option<Value> {
        serde_json::from_str(&self.message)
            .ok()
            .filter(Value::is_object)
    }
}

impl Deployment {
    fn variable(&self, name: &str) -> String {
        text_of(&self.stack.properties("IntakeFunction")["Environment"]["Variables"][name])
    }

    pub fn input_queue_url(&self) -> String {
        self.variable("INPUT_QUEUE_URL")
    }

    /// The queue of what only a GPU can do, where there is an express lane.
    pub fn gpu_queue_url(&self) -> Option<String> {
        let express = self.stack.properties("ExpressFunction");
        let url = express["Environment"]["Variables"]["GPU_QUEUE_URL"].as_str();
        url.map(str::to_owned)
    }

    /// The identifier of an event source mapping of the template.
    pub fn mapping_uuid(&self, logical_id: &str) -> Option<String> {
        let mappings = self.mappings.lock();
        let mappings = mappings.unwrap_or_else(PoisonError::into_inner);
        mappings.get(&name(logical_id)).cloned()
    }

    pub fn dead_letter_queue_url(&self) -> String {
        self.variable("DEAD_LETTER_QUEUE_URL")
    }

    pub fn cache_bucket(&self) -> String {
        self.variable("CACHE_BUCKET")
    }

    /// Uploads an object into the source bucket.
    pub async fn upload(
        &self,
        key: &str,
        content: Vec<u8>,
        content_type: Option<&str>,
    ) -> Result<(), DeployError> {
        let put = self
            .s3
            .put_object()
            .bucket(SOURCE_BUCKET)
            .key(key)
            .set_content_type(content_type.map(str::to_owned))
            .body(content.into());
        sent(format!("uploading {key}"), put.send()).await?;
        Ok(())
    }

    /// Takes what has arrived at the next middleware: CloudEvents, oldest first.
    pub async fn take_events(&self) -> Result<Vec<Value>, DeployError> {
        let messages = self.take(&self.next_queue_url).await?;
        let events = messages.iter().map(|message| json_of(message.body()));
        Ok(events.collect())
    }

    /// Takes what has arrived in the dead-letter queue.
    pub async fn take_rejections(&self) -> Result<Vec<DeadLetter>, DeployError> {
        let messages = self.take(&self.dead_letter_queue_url()).await?;
        Ok(messages.iter().map(dead_letter).collect())
    }

    async fn take(&self, queue_url: &str) -> Result<Vec<Message>, DeployError> {
        let (receiving, deleting) = (
            format!("receiving from {queue_url}"),
            format!("deleting from {queue_url}"),
        );
        let mut taken = Vec::new();
        loop {
            let receive = self
                .sqs
                .receive_message()
                .queue_url(queue_url)
                .max_number_of_messages(RECEIVE_MAX)
                .message_attribute_names("All")
                .wait_time_seconds(0);
            let messages = sent(&receiving, receive.send())
                .await?
                .messages
                .unwrap_or_default();
            if messages.is_empty() {
                return Ok(taken);
            }
            let mut delete = self.sqs.delete_message_batch().queue_url(queue_url);
            for (index, message) in messages.iter().enumerate() {
                let entry = DeleteMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .set_receipt_handle(message.receipt_handle.clone())
                    .build();
                delete = delete.entries(entry.map_err(failed(&deleting))?);
            }
            sent(&deleting, delete.send()).await?;
            taken.extend(messages);
        }
    }

    /// How many messages a queue holds.
    pub async fn queue_counts(&self, queue_url: &str) -> Result<QueueCounts, DeployError> {
        let (visible, hidden) = (
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
        );
        let get = self
            .sqs
            .get_queue_attributes()
            .queue_url(queue_url)
            .attribute_names(visible.clone())
            .attribute_names(hidden.clone());
        let answer = sent(format!("counting {queue_url}"), get.send()).await?;
        let attributes = answer.attributes.unwrap_or_default();
        let count = |name| attributes.get(name).and_then(|text| text.parse().ok());
        Ok(QueueCounts {
            visible: count(&visible).unwrap_or(0),
            in_flight: count(&hidden).unwrap_or(0),
        })
    }

    /// Reads an object; none when there is none.
    pub async fn object(&self, bucket: &str, key: &str) -> Result<Option<Vec<u8>>, DeployError> {
        let what = format!("reading s3://{bucket}/{key}");
        let found = match self.s3.get_object().bucket(bucket).key(key).send().await {
            Err(error)
                if error
                    .as_service_error()
                    .is_some_and(|error| error.is_no_such_key()) =>
            {
                return Ok(None);
            }
            answer => answer.map_err(failed(&what))?,
        };
        let body = found.body.collect().await.map_err(failed(&what))?;
        Ok(Some(body.into_bytes().to_vec()))
    }

    /// Invokes a function by its logical id and answers its payload.
    pub async fn invoke(&self, logical_id: &str, payload: &Value) -> Result<Value, DeployError> {
        let what = format!("invoking {logical_id}");
        let invoke = self
            .lambda
            .invoke()
            .function_name(name(logical_id))
            .payload(aws_sdk_lambda::primitives::Blob::new(payload.to_string()));
        let answer = sent(&what, invoke.send()).await?;
        let text = answer
            .payload
            .map_or_else(Vec::new, |blob| blob.into_inner());
        let text = String::from_utf8_lossy(&text).into_owned();
        if answer.function_error.is_some() {
            let problem = text;
            return Err(CallFailed { what, problem }.into());
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// The log lines of a function since the deployment, by its logical id.
    pub async fn function_logs(&self, logical_id: &str) -> Result<Vec<LogLine>, DeployError> {
        self.function_logs_since(logical_id, self.started_ms).await
    }

    /// The log lines of a function from an instant on (milliseconds since
    /// 1970), oldest first. They appear when an invocation ends.
    pub async fn function_logs_since(
        &self,
        logical_id: &str,
        since_ms: i64,
    ) -> Result<Vec<LogLine>, DeployError> {
        // CloudWatch Logs' FilterLogEvents: too little for an SDK crate of its own.
        const HEADERS: [(&str, &str); 2] = [
            ("Content-Type", "application/x-amz-json-1.1"),
            ("X-Amz-Target", "Logs_20140328.FilterLogEvents"),
        ];
        let what = format!("reading the log of {logical_id}");
        let group = format!("/aws/lambda/{}", name(logical_id));
        let mut request = json!({"logGroupName": group, "startTime": since_ms});
        let mut lines = Vec::new();
        loop {
            let (port, body) = (self.emulator.port(), request.to_string());
            let answer = tokio::task::spawn_blocking(move || {
                ministack::request(port, "POST", "/", &HEADERS, body.as_bytes())
            });
            let answer = match answer.await.map_err(failed(&what))? {
                // The group appears with the first invocation.
                Err(ministack::CallError::Status { body, .. })
                    if json_of(Some(&body))["__type"] == "ResourceNotFoundException" =>
                {
                    break;
                }
                answer => answer.map_err(failed(&what))?,
            };
            let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
            lines.extend(
                template::list(&answer["events"])
                    .into_iter()
                    .map(|event| LogLine {
                        timestamp: event["timestamp"].as_i64().unwrap_or_default(),
                        message: text_of(&event["message"]),
                    }),
            );
            let next = &answer["nextToken"];
            if next.is_null() || *next == request["nextToken"] {
                break;
            }
            request["nextToken"] = next.clone();
        }
        lines.sort_by_key(|line| line.timestamp);
        Ok(lines)
    }

    /// Waits until no message, task or instance is left. False when that took
    /// longer than `limit`.
    pub async fn until_idle(&self, limit: Duration) -> Result<bool, DeployError> {
        let started = Instant::now();
        loop {
            let mut messages = self.queue_counts(&self.input_queue_url()).await?.total();
            if let Some(queue) = self.gpu_queue_url() {
                messages += self.queue_counts(&queue).await?.total();
            }
            let now = self.cloud.snapshot();
            if messages == 0 && now.live_tasks() == 0 && now.live_instances() == 0 {
                return Ok(true);
            }
            if started.elapsed() > limit {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn json_of(text: Option<&str>) -> Value {
    serde_json::from_str(text.unwrap_or_default()).unwrap_or_default()
}

fn dead_letter(message: &Message) -> DeadLetter {
    let attribute = |name: &str| {
        let attributes = message.message_attributes()?;
        attributes.get(name)?.string_value().map(str::to_owned)
    };
    let event = json_of(message.body());
    let document = event["data"]["document"]["url"].as_str().map(str::to_owned);
    DeadLetter {
        reason: attribute("RejectionReason"),
        stage: attribute("RejectionStage"),
        by: attribute("RejectedBy"),
        object: attribute("RejectedObject").or(document),
        body: message.body().unwrap_or_default().to_owned(),
    }
}
