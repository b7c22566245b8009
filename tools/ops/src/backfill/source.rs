//! Where the objects come from: the bucket's listing.

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::types::EncodingType;
use chrono::DateTime;
use events::{S3Url, S3UrlError, decode_notification_key};
use platform::aws;

use super::job::{Job, Object, Position};

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Call(#[from] aws::Error),
    /// The bucket does not list its keys in order, so a walk of it cannot be
    /// resumed.
    #[error(
        "s3://{bucket} lists {later:?} after {earlier:?}: a directory bucket does not list in \
         order and cannot be walked; use --manifest with an inventory of it"
    )]
    Order {
        bucket: String,
        earlier: String,
        later: String,
    },
    /// S3 lists a key that is not UTF-8.
    #[error(transparent)]
    Key(#[from] S3UrlError),
    #[error("the inventory {manifest} cannot be used: {problem:#}")]
    Inventory {
        manifest: String,
        problem: anyhow::Error,
    },
}

/// An object, and the position of a walk that has it behind itself.
#[derive(Clone, Debug)]
pub struct Entry {
    pub object: Object,
    pub position: Position,
}

/// Tells of objects, page by page, in an order that never changes.
#[async_trait]
pub trait Source: Send {
    /// The next objects; `None` after the last. A page may be empty.
    async fn next_page(&mut self) -> Result<Option<Vec<Entry>>, SourceError>;
}

pub struct Listing {
    s3: Client,
    bucket: String,
    prefix: String,
    after: Option<String>,
    is_finished: bool,
}

impl Listing {
    /// The objects of the job's bucket and prefix, after the position.
    pub fn new(s3: Client, job: &Job, position: Option<&Position>) -> Self {
        let after = match position {
            Some(Position::Key(key)) => Some(key.clone()),
            _ => None,
        };
        Self {
            s3,
            bucket: job.bucket.clone(),
            prefix: job.prefix.clone(),
            after,
            is_finished: false,
        }
    }
}

#[async_trait]
impl Source for Listing {
    async fn next_page(&mut self) -> Result<Option<Vec<Entry>>, SourceError> {
        if self.is_finished {
            return Ok(None);
        }
        // Every page begins after the last key rather than with a token: a
        // walk with a low rate may let minutes pass between two pages.
        let response = self
            .s3
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(&self.prefix)
            .set_start_after(self.after.clone())
            // Keys may hold characters that XML cannot carry.
            .encoding_type(EncodingType::Url)
            .send()
            .await
            .map_err(|error| {
                let place = S3Url::new(&self.bucket, &self.prefix).to_string();
                aws::Error::from_sdk("s3:ListObjectsV2", &error).of(place)
            })?;
        let is_encoded = response.encoding_type() == Some(&EncodingType::Url);
        let mut entries = Vec::with_capacity(response.contents().len());
        for listed in response.contents() {
            let key = listed.key().unwrap_or_default();
            let key = if is_encoded {
                decode_notification_key(key)?
            } else {
                key.to_owned()
            };
            if let Some(earlier) = &self.after
                && key.as_bytes() <= earlier.as_bytes()
            {
                return Err(SourceError::Order {
                    bucket: self.bucket.clone(),
                    earlier: earlier.clone(),
                    later: key,
                });
            }
            self.after = Some(key.clone());
            entries.push(Entry {
                position: Position::Key(key.clone()),
                object: Object {
                    key,
                    etag: listed
                        .e_tag()
                        .unwrap_or_default()
                        .trim_matches('"')
                        .to_owned(),
                    size: listed.size().and_then(|size| u64::try_from(size).ok()),
                    last_modified: listed.last_modified().and_then(|time| {
                        DateTime::from_timestamp(time.secs(), time.subsec_nanos())
                    }),
                    storage_class: listed
                        .storage_class()
                        .map(|class| class.as_str().to_owned()),
                    is_current: true,
                },
            });
        }
        self.is_finished = response.is_truncated() != Some(true) || entries.is_empty();
        Ok(Some(entries))
    }
}
