//! Vectors in the cache bucket: written with the metadata by which a deletion
//! finds them, and deleted only when that metadata agrees.

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::display::DisplayErrorContext;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use events::vector;
use platform::{Failure, classify};
use sha2::{Digest, Sha256};

/// Bytes of one value of S3 user metadata here. All of an object's together
/// may have 2 KB; a percent-encoded key alone can have more.
const MAX_METADATA_BYTES: usize = 1024;

/// A call about vectors failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{operation} of s3://{bucket}/{key} failed: {message}")]
pub struct VectorError {
    /// The S3 operation.
    pub operation: &'static str,
    /// The cache bucket.
    pub bucket: String,
    /// The vector's key, or the prefix of the keys.
    pub key: String,
    /// What S3 or the network said.
    pub message: String,
    /// Whether a later try can succeed. A missing or refusing cache bucket
    /// counts as transient: it is not the image's fault.
    pub failure: Failure,
}

fn error_of<E>(
    operation: &'static str,
    bucket: &str,
    key: &str,
) -> impl FnOnce(SdkError<E, HttpResponse>) -> VectorError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let (bucket, key) = (bucket.to_owned(), key.to_owned());
    move |error| VectorError {
        operation,
        bucket,
        key,
        failure: match error.code() {
            Some("NoSuchBucket" | "InvalidBucketName") => Failure::Transient,
            _ => classify(&error),
        },
        message: DisplayErrorContext(&error).to_string(),
    }
}

/// A value as S3 user metadata can carry it: printable ASCII, and short. A
/// longer one is replaced by its digest, which compares just as well.
pub fn metadata_value(value: &str) -> String {
    let is_printable_ascii = value.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    if is_printable_ascii && value.len() <= MAX_METADATA_BYTES && value == value.trim() {
        return value.to_owned();
    }
    let digest = Sha256::digest(value.as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Writes a vector. Writing it again (a message delivered twice) writes the
/// same bytes to the same key.
pub async fn put_vector(
    s3: &Client,
    bucket: &str,
    key: &str,
    document_url: &str,
    model: &str,
    body: Vec<u8>,
) -> Result<(), VectorError> {
    s3.put_object()
        .bucket(bucket)
        .key(key)
        .content_type(vector::CONTENT_TYPE)
        .metadata(vector::DOCUMENT_METADATA, metadata_value(document_url))
        .metadata(vector::MODEL_METADATA, metadata_value(model))
        .body(ByteStream::from(body))
        .send()
        .await
        .map_err(error_of("PutObject", bucket, key))?;
    Ok(())
}

/// Deletes the vectors of a document: of every version of it, and of every
/// model or of one. Answers how many. Deleting what is gone already is no
/// error, so a repeated deletion is harmless.
pub async fn delete_vectors(
    s3: &Client,
    bucket: &str,
    prefix: &str,
    document_url: &str,
    model: Option<&str>,
) -> Result<usize, VectorError> {
    let key_prefix = vector::document_prefix(prefix, document_url);
    let wanted_document = metadata_value(document_url);
    let wanted_model = model.map(metadata_value);
    let mut keys = Vec::new();
    let mut pages = s3
        .list_objects_v2()
        .bucket(bucket)
        .prefix(&key_prefix)
        .into_paginator()
        .send();
    while let Some(page) = pages.next().await {
        let page = page.map_err(error_of("ListObjectsV2", bucket, &key_prefix))?;
        for object in page.contents() {
            keys.extend(object.key().map(str::to_owned));
        }
    }
    let mut deleted = 0;
    for key in keys {
        let head = match s3.head_object().bucket(bucket).key(&key).send().await {
            Ok(head) => head,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error_of("HeadObject", bucket, &key)(error)),
        };
        // The prefix is a short digest: another document may share it.
        let value = |name: &str| head.metadata().and_then(|all| all.get(name));
        let is_of_document = value(vector::DOCUMENT_METADATA) == Some(&wanted_document);
        let is_of_model = match &wanted_model {
            None => true,
            wanted => value(vector::MODEL_METADATA) == wanted.as_ref(),
        };
        if !is_of_document || !is_of_model {
            continue;
        }
        s3.delete_object()
            .bucket(bucket)
            .key(&key)
            .send()
            .await
            .map_err(error_of("DeleteObject", bucket, &key))?;
        deleted += 1;
    }
    Ok(deleted)
}

fn is_gone<E: ProvideErrorMetadata>(error: &SdkError<E, HttpResponse>) -> bool {
    match error {
        SdkError::ServiceError(service) => service.raw().status().as_u16() == 404,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_usual_url_is_readable_in_the_metadata() {
        let url = "s3://bucket/a/my%20photo.png";
        assert_eq!(metadata_value(url), url);
    }

    #[test]
    fn what_a_header_cannot_carry_is_replaced_by_its_digest() {
        let long = format!("s3://bucket/{}", "%C3%A9".repeat(400));
        for value in [long.as_str(), "https://example.com/é.png", " x"] {
            let carried = metadata_value(value);
            assert!(carried.starts_with("sha256:"), "{carried}");
            assert_eq!(carried, metadata_value(value));
        }
        assert_ne!(metadata_value("é"), metadata_value("è"));
    }

    proptest! {
        #[test]
        fn every_value_fits_a_header(value in "\\PC{0,2000}") {
            let carried = metadata_value(&value);
            prop_assert!(carried.is_ascii() && carried.len() <= MAX_METADATA_BYTES);
        }
    }
}
