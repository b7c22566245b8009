//! Where the objects come from: the bucket's listing.

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::types::EncodingType;
use aws_smithy_types::error::display::DisplayErrorContext;
use chrono::DateTime;
use events::decode_notification_key;

use super::job::{Job, Object, Position};

/// The objects could not be told.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// A call failed.
    #[error("{operation} of s3://{bucket}/{key} failed: {problem}")]
    Call {
        /// The S3 operation.
        operation: &'static str,
        /// The bucket.
        bucket: String,
        /// The key, or the prefix of the keys.
        key: String,
        /// What S3 or the network said.
        problem: String,
    },
    /// The bucket does not list its keys in order, so a walk of it cannot be
    /// resumed.
    #[error(
        "s3://{bucket} lists {later:?} after {earlier:?}: a directory bucket does not list in \
         order and cannot be walked; use --manifest with an inventory of it"
    )]
    Order {
        /// The bucket.
        bucket: String,
        /// The key before.
        earlier: String,
        /// The key that is out of order.
        later: String,
    },
    /// The inventory cannot be used.
    #[error("the inventory {manifest} cannot be used: {problem}")]
    Inventory {
        /// The manifest's URL.
        manifest: String,
        /// Why, and what to do.
        problem: String,
    },
}

/// An object, and the position of a walk that has it behind itself.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The object.
    pub object: Object,
    /// The position after it.
    pub position: Position,
}

/// Tells of objects, page by page, in an order that never changes.
#[async_trait]
pub trait Source: Send {
    /// The next objects; `None` after the last. A page may be empty.
    async fn next_page(&mut self) -> Result<Option<Vec<Entry>>, SourceError>;
}

/// A listing of a bucket.
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
            .map_err(|error| self.failed(&DisplayErrorContext(&error).to_string()))?;
        let is_encoded = response.encoding_type() == Some(&EncodingType::Url);
        let mut entries = Vec::with_capacity(response.contents().len());
        for listed in response.contents() {
            let key = listed.key().unwrap_or_default();
            let key = if is_encoded {
                decode_notification_key(key).map_err(|error| self.failed(&error.to_string()))?
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

impl Listing {
    fn failed(&self, problem: &str) -> SourceError {
        SourceError::Call {
            operation: "ListObjectsV2",
            bucket: self.bucket.clone(),
            key: self.prefix.clone(),
            problem: problem.to_owned(),
        }
    }
}
