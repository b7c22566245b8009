//! `delivery`'s clients as the pipeline's services.

use async_trait::async_trait;
use delivery::{DeadLetters, Presence, Rejection};
use events::S3Url;
use platform::aws;

use crate::services::{Notes, Rejects, Vectors};

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

    async fn presence(&self, document: &S3Url) -> Result<Presence, aws::Error> {
        delivery::presence(&self.s3, document).await
    }
}

/// Where notes are kept, below the vectors' prefix.
const NOTES_FOLDER: &str = "suspects";

impl CacheBucket {
    fn note_key(&self, message_id: &str) -> String {
        format!(
            "{}/{NOTES_FOLDER}/{message_id}",
            self.prefix.trim_matches('/')
        )
    }
}

#[async_trait]
impl Notes for CacheBucket {
    async fn write(&self, message_id: &str) -> Result<(), aws::Error> {
        self.s3
            .put_object()
            .bucket(&self.bucket)
            .key(self.note_key(message_id))
            .send()
            .await
            .map_err(aws::failed("s3:PutObject"))?;
        Ok(())
    }

    async fn is_there(&self, message_id: &str) -> Result<bool, aws::Error> {
        // A look at the object itself is answered with a refusal where there
        // is none: the role may list this prefix, not the bucket.
        let listed = self
            .s3
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(self.note_key(message_id))
            .max_keys(1)
            .send()
            .await
            .map_err(aws::failed("s3:ListObjectsV2"))?;
        Ok(!listed.contents().is_empty())
    }

    async fn remove(&self, message_id: &str) -> Result<(), aws::Error> {
        self.s3
            .delete_object()
            .bucket(&self.bucket)
            .key(self.note_key(message_id))
            .send()
            .await
            .map_err(aws::failed("s3:DeleteObject"))?;
        Ok(())
    }
}

#[async_trait]
impl Rejects for DeadLetters {
    async fn reject_all(&self, rejected: &[(String, Rejection)]) -> Vec<Result<(), aws::Error>> {
        DeadLetters::reject_all(self, rejected).await
    }
}
