//! `delivery` and S3 as the pipeline's services.

use async_trait::async_trait;
use delivery::{DeadLetters, Outputs, PublishError, Rejection};
use events::CloudEvent;
use platform::aws;

use crate::services::{Publisher, Rejects, Vectors};

/// The cache bucket.
pub struct CacheBucket {
    s3: aws_sdk_s3::Client,
    bucket: String,
    prefix: String,
}

impl CacheBucket {
    /// A bucket and the prefix of the vectors in it.
    pub fn new(s3: aws_sdk_s3::Client, bucket: &str, prefix: &str) -> Self {
        Self {
            s3,
            bucket: bucket.to_owned(),
            prefix: prefix.to_owned(),
        }
    }
}

#[async_trait]
impl Vectors for CacheBucket {
    fn bucket(&self) -> &str {
        &self.bucket
    }

    async fn put(
        &self,
        key: &str,
        document_url: &str,
        model: &str,
        body: Vec<u8>,
    ) -> Result<(), aws::Error> {
        delivery::put_vector(&self.s3, &self.bucket, key, document_url, model, body).await
    }

    async fn delete_document(&self, document_url: &str, model: &str) -> Result<usize, aws::Error> {
        let (bucket, prefix) = (&self.bucket, &self.prefix);
        delivery::delete_vectors(&self.s3, bucket, prefix, document_url, Some(model)).await
    }
}

#[async_trait]
impl Publisher for Outputs {
    async fn publish(&self, events: &[CloudEvent]) -> Vec<Result<(), PublishError>> {
        Outputs::publish(self, events).await
    }

    fn check_size(&self, event: &CloudEvent) -> Result<(), PublishError> {
        Outputs::check_size(self, event)
    }
}

#[async_trait]
impl Rejects for DeadLetters {
    async fn reject_all(&self, rejected: &[(String, Rejection)]) -> Vec<Result<(), String>> {
        DeadLetters::reject_all(self, rejected)
            .await
            .into_iter()
            .map(|result| result.map_err(|error| error.to_string()))
            .collect()
    }
}
