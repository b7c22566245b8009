//! `delivery`'s clients as the pipeline's services.

use async_trait::async_trait;
use delivery::{DeadLetters, Rejection};
use platform::aws;

use crate::services::{Rejects, Vectors};

pub struct CacheBucket {
    pub s3: aws_sdk_s3::Client,
    pub bucket: String,
    /// Of the vectors' keys.
    pub prefix: String,
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
impl Rejects for DeadLetters {
    async fn reject_all(&self, rejected: &[(String, Rejection)]) -> Vec<Result<(), aws::Error>> {
        DeadLetters::reject_all(self, rejected).await
    }
}
