//! AWS behind [`Services`].

use std::sync::Arc;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_lambda::error::DisplayErrorContext;
use aws_sdk_lambda::primitives::Blob;
use aws_sdk_lambda::types::InvocationType;
use aws_sdk_s3::error::ProvideErrorMetadata;
use delivery::{DeadLetters, Destination, Outputs, Queue, Rejection};
use events::{CloudEvent, DETECTION_BYTES, S3Object};

use crate::config::Config;
use crate::handler::{Head, Rejected, ServiceError, Services};

/// The clients that intake calls.
pub struct AwsServices {
    s3: aws_sdk_s3::Client,
    lambda: aws_sdk_lambda::Client,
    input_queue: Outputs,
    outputs: Outputs,
    dead_letters: DeadLetters,
    config: Config,
}

impl AwsServices {
    /// Clients for the configured services.
    pub fn new(sdk: &SdkConfig, config: Config) -> Self {
        let sqs = aws_sdk_sqs::Client::new(&delivery::with_call_timeout(sdk));
        let input_queue: Arc<dyn Destination> = Arc::new(Queue::new(sqs, &config.input_queue_url));
        Self {
            s3: platform::s3_client(&delivery::with_call_timeout(sdk)),
            lambda: aws_sdk_lambda::Client::new(&delivery::with_call_timeout(sdk)),
            input_queue: Outputs::new(vec![input_queue]),
            outputs: Outputs::connect(&config.outputs, sdk),
            dead_letters: DeadLetters::new(sdk, &config.dead_letter_queue_url),
            config,
        }
    }
}

fn failed(call: &'static str, problem: impl ToString) -> ServiceError {
    ServiceError {
        call,
        problem: problem.to_string(),
    }
}

#[async_trait]
impl Services for AwsServices {
    async fn head(&self, object: &S3Object) -> Result<Option<Head>, ServiceError> {
        let first_bytes = self
            .s3
            .get_object()
            .bucket(&object.url.bucket)
            .key(&object.url.key)
            .range(format!("bytes=0-{}", DETECTION_BYTES - 1))
            .send()
            .await;
        let output = match first_bytes {
            Ok(output) => output,
            Err(error) => {
                return match error.code() {
                    Some("NoSuchKey" | "NotFound") => Ok(None),
                    // No range lies within an object of no bytes.
                    Some("InvalidRange") => Ok(Some(Head {
                        size: Some(0),
                        ..Head::default()
                    })),
                    _ => Err(failed("GetObject", DisplayErrorContext(&error))),
                };
            }
        };
        let size = output
            .content_range()
            .and_then(|range| range.rsplit('/').next())
            .and_then(|total| total.parse().ok());
        let etag = output.e_tag().map(|etag| etag.trim_matches('"').to_owned());
        let content_type = output.content_type().map(str::to_owned);
        let body = output
            .body
            .collect()
            .await
            .map_err(|error| failed("GetObject", error))?;
        Ok(Some(Head {
            first_bytes: body.to_vec(),
            content_type,
            size,
            etag,
        }))
    }

    async fn enqueue(&self, events: Vec<CloudEvent>) -> Vec<Result<(), ServiceError>> {
        self.input_queue
            .publish(&events)
            .await
            .into_iter()
            .map(|result| result.map_err(|error| failed("SendMessageBatch", error)))
            .collect()
    }

    async fn reject(&self, body: &str, rejected: &Rejected) -> Result<(), ServiceError> {
        let rejection = Rejection {
            stage: "intake".to_owned(),
            reason: rejected.reason.clone(),
            by: "intake".to_owned(),
            object: rejected.object.clone(),
            event: None,
        };
        self.dead_letters
            .reject(body, &rejection)
            .await
            .map_err(|error| failed("SendMessage", error))
    }

    async fn delete_vectors(&self, document_url: &str) -> Result<usize, ServiceError> {
        delivery::delete_vectors(
            &self.s3,
            &self.config.cache_bucket,
            &self.config.cache_prefix,
            document_url,
            self.config.model_name.as_deref(),
        )
        .await
        .map_err(|error| failed("DeleteObjects", error))
    }

    async fn publish(&self, event: CloudEvent) -> Result<(), ServiceError> {
        let results = self.outputs.publish(&[event]).await;
        for result in results {
            result.map_err(|error| failed("Publish", error))?;
        }
        Ok(())
    }

    async fn wake_scaler(&self) -> Result<(), ServiceError> {
        let Some(name) = &self.config.scaler_function_name else {
            return Ok(());
        };
        self.lambda
            .invoke()
            .function_name(name)
            .invocation_type(InvocationType::Event)
            .payload(Blob::new(r#"{"source":"intake"}"#))
            .send()
            .await
            .map(|_| ())
            .map_err(|error| failed("Invoke", DisplayErrorContext(&error)))
    }
}
