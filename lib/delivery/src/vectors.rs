//! Vectors in the cache bucket: written with the metadata by which a deletion
//! finds them, and deleted only when that metadata agrees.

use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use events::{S3Url, vector};
use platform::Failure;
use platform::aws::{self, ErrorKind};
use sha2::{Digest, Sha256};

/// Bytes of one value of S3 user metadata here. All of an object's together
/// may have 2 KB; a percent-encoded key alone can have more.
const MAX_METADATA_BYTES: usize = 1024;

/// What a call about the cache bucket failed with. A missing bucket is not the
/// image's fault, so a later try can succeed.
fn failed<E>(
    operation: &'static str,
    bucket: &str,
    key: &str,
) -> impl FnOnce(SdkError<E, HttpResponse>) -> aws::Error
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let url = S3Url::new(bucket, key).to_string();
    move |error| {
        let mut error = aws::Error::from_sdk(operation, &error).of(url);
        if matches!(error.code.as_str(), "NoSuchBucket" | "InvalidBucketName") {
            error.failure = Failure::Transient;
        }
        error
    }
}

/// A value as S3 user metadata can carry it: printable ASCII, and short. A
/// longer one is replaced by its digest, which compares just as well.
fn metadata_value(value: &str) -> String {
    let is_printable_ascii = value.bytes().all(|byte| (0x20..0x7f).contains(&byte));
    if is_printable_ascii && value.len() <= MAX_METADATA_BYTES && value == value.trim() {
        return value.to_owned();
    }
    format!("sha256:{}", hex::encode(Sha256::digest(value.as_bytes())))
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
) -> Result<(), aws::Error> {
    s3.put_object()
        .bucket(bucket)
        .key(key)
        .content_type(vector::CONTENT_TYPE)
        .metadata(vector::DOCUMENT_METADATA, metadata_value(document_url))
        .metadata(vector::MODEL_METADATA, metadata_value(model))
        .body(ByteStream::from(body))
        .send()
        .await
        .map_err(failed("s3:PutObject", bucket, key))?;
    Ok(())
}

/// Finds the vectors of a document: of every version of it, and of every
/// model or of one. Answers their keys.
pub async fn find_vectors(
    s3: &Client,
    bucket: &str,
    prefix: &str,
    document_url: &str,
    model: Option<&str>,
) -> Result<Vec<String>, aws::Error> {
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
        let page = page.map_err(failed("s3:ListObjectsV2", bucket, &key_prefix))?;
        for object in page.contents() {
            keys.extend(object.key().map(str::to_owned));
        }
    }
    let mut found = Vec::new();
    for key in keys {
        let head = s3.head_object().bucket(bucket).key(&key).send().await;
        let head = match head.map_err(failed("s3:HeadObject", bucket, &key)) {
            Ok(head) => head,
            Err(error) if error.kind == ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        // The prefix is a short digest: another document may share it.
        let value = |name: &str| head.metadata().and_then(|all| all.get(name));
        let is_of_document = value(vector::DOCUMENT_METADATA) == Some(&wanted_document);
        let is_of_model = match &wanted_model {
            None => true,
            wanted => value(vector::MODEL_METADATA) == wanted.as_ref(),
        };
        if is_of_document && is_of_model {
            found.push(key);
        }
    }
    Ok(found)
}

/// Deletes what [`find_vectors`] finds and answers how many there were.
/// Deleting what is gone already is no error, so a repeated deletion is
/// harmless.
pub async fn delete_vectors(
    s3: &Client,
    bucket: &str,
    prefix: &str,
    document_url: &str,
    model: Option<&str>,
) -> Result<usize, aws::Error> {
    let keys = find_vectors(s3, bucket, prefix, document_url, model).await?;
    remove_vectors(s3, bucket, &keys).await?;
    Ok(keys.len())
}

/// Deletes vectors by their keys.
pub async fn remove_vectors(s3: &Client, bucket: &str, keys: &[String]) -> Result<(), aws::Error> {
    for key in keys {
        s3.delete_object()
            .bucket(bucket)
            .key(key)
            .send()
            .await
            .map_err(failed("s3:DeleteObject", bucket, key))?;
    }
    Ok(())
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
