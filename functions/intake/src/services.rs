//! AWS behind [`Services`].

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_sdk_lambda::primitives::Blob;
use aws_sdk_lambda::types::InvocationType;
use delivery::{DeadLetters, Outputs, Presence, PublishError, Rejection};
use events::{CloudEvent, DETECTION_BYTES, S3Object, S3Url};
use platform::aws;
use serde_json::json;

use crate::config::Config;
use crate::handler::{Head, Services};

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
        Self {
            s3: platform::s3_client(&delivery::with_call_timeout(sdk)),
            lambda: aws_sdk_lambda::Client::new(&delivery::with_call_timeout(sdk)),
            input_queue: Outputs::to_queue(&config.input_queue_url, sdk),
            outputs: Outputs::connect(&config.outputs, sdk),
            dead_letters: DeadLetters::new(sdk, &config.dead_letter_queue_url),
            config,
        }
    }
}

#[async_trait]
impl Services for AwsServices {
    async fn head(&self, object: &S3Object) -> Result<Option<Head>, aws::Error> {
        let failed = |error: aws::Error| error.of(object.url.to_string());
        let first_bytes = self
            .s3
            .get_object()
            .bucket(&object.url.bucket)
            .key(&object.url.key)
            .range(format!("bytes=0-{}", DETECTION_BYTES - 1))
            .send()
            .await
            .map_err(|error| failed(aws::Error::from_sdk("s3:GetObject", &error)));
        let output = match first_bytes {
            Ok(output) => output,
            Err(error) if matches!(error.code.as_str(), "NoSuchKey" | "NotFound") => {
                return Ok(None);
            }
            // No range lies within an object of no bytes.
            Err(error) if error.code == "InvalidRange" => {
                return Ok(Some(Head {
                    size: Some(0),
                    ..Head::default()
                }));
            }
            Err(error) => return Err(error),
        };
        let size = output
            .content_range()
            .and_then(|range| range.rsplit('/').next())
            .and_then(|total| total.parse().ok());
        let etag = output.e_tag().map(|etag| etag.trim_matches('"').to_owned());
        let content_type = output.content_type().map(str::to_owned);
        let body =
            output.body.collect().await.map_err(|error| {
                failed(aws::Error::network("s3:GetObject", "BrokenBody", &error))
            })?;
        Ok(Some(Head {
            first_bytes: body.to_vec(),
            content_type,
            size,
            etag,
        }))
    }

    async fn enqueue(&self, events: Vec<CloudEvent>) -> Vec<Result<(), PublishError>> {
        self.input_queue.publish(&events).await
    }

    async fn reject(&self, body: &str, rejection: &Rejection) -> Result<(), aws::Error> {
        self.dead_letters.reject(body, rejection).await
    }

    async fn presence(&self, url: &S3Url) -> Result<Presence, aws::Error> {
        delivery::presence(&self.s3, url).await
    }

    async fn find_vectors(&self, document_url: &str) -> Result<Vec<String>, aws::Error> {
        delivery::find_vectors(
            &self.s3,
            &self.config.cache_bucket,
            &self.config.cache_prefix,
            document_url,
            self.config.model_name.as_deref(),
        )
        .await
    }

    async fn remove_vectors(&self, keys: &[String]) -> Result<(), aws::Error> {
        delivery::remove_vectors(&self.s3, &self.config.cache_bucket, keys).await
    }

    async fn publish(&self, event: CloudEvent) -> Result<(), PublishError> {
        self.outputs.publish(&[event]).await.remove(0)
    }

    async fn wake_scaler(&self, since_ms: Option<i64>) -> Result<(), aws::Error> {
        let Some(name) = &self.config.scaler_function_name else {
            return Ok(());
        };
        self.lambda
            .invoke()
            .function_name(name)
            .invocation_type(InvocationType::Event)
            .payload(Blob::new(
                json!({"source": "intake", "sinceMs": since_ms}).to_string(),
            ))
            .send()
            .await
            .map(|_| ())
            .map_err(|error| aws::Error::from_sdk("lambda:Invoke", &error).of(name))
    }
}
