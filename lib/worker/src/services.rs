//! What the pipeline needs from the world, as small traits, so that its rules
//! can be tested against fakes that enforce AWS's own limits.

use std::ops::DerefMut;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use delivery::{Outputs, Presence, Rejection};
use events::{ImageType, S3Url};
use futures_util::stream::BoxStream;
use platform::aws;

use crate::rules::failure::TaskError;

/// Messages in one receive, delete or visibility request (SQS API).
pub const BATCH_MAX: usize = 10;

/// The longest that a receive may wait for a message (SQS API).
pub const LONG_POLL_MAX: Duration = Duration::from_secs(20);

/// The longest that a message may stay invisible after one receive, all
/// extensions together (SQS API).
pub const VISIBILITY_MAX: Duration = Duration::from_secs(12 * 3600);

/// Names one delivery of a message; needed to extend or acknowledge.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receipt {
    /// The queue that it came from, by its position.
    pub queue: usize,
    pub handle: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Identifies the message across deliveries.
    pub message_id: String,
    pub receipt: Receipt,
    pub body: String,
    /// How often it was delivered, this time included (approximate).
    pub receive_count: u32,
}

/// A change of one message's visibility.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    pub receipt: Receipt,
    /// Invisible for this long from now; zero hands the message back.
    pub visibility: Duration,
}

/// Why one message could not be extended or acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The visibility has ended, or a newer delivery holds the message: it is
    /// not ours any more.
    #[error("the lease is lost: {0}")]
    Lost(aws::Error),
    /// The service or the network failed; the lease may still be ours.
    #[error("{0}")]
    Failed(aws::Error),
}

#[async_trait]
pub trait Queue: Send + Sync {
    /// How many queues there are.
    fn count(&self) -> usize {
        1
    }

    /// Receives from the `queue`-th one: up to `max` (1 to [`BATCH_MAX`]) messages,
    /// waits up to `wait` for the first, and makes them invisible for `visibility`.
    async fn receive(
        &self,
        queue: usize,
        max: usize,
        wait: Duration,
        visibility: Duration,
    ) -> Result<Vec<Received>, aws::Error>;

    /// Changes the visibility of up to [`BATCH_MAX`] messages; one result
    /// each.
    async fn extend(&self, extensions: &[Extension]) -> Vec<Result<(), LeaseError>>;

    /// Deletes up to [`BATCH_MAX`] messages by their receipts; one result
    /// each.
    async fn acknowledge(&self, receipts: &[Receipt]) -> Vec<Result<(), LeaseError>>;
}

/// What the task wants to know of its queues before it starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueFacts {
    /// After how many deliveries the queue itself puts a message into its
    /// dead-letter queue, without a reason.
    pub max_receives: Option<u32>,
    /// Deliveries that a message may have had to another kind of worker, whose
    /// queue then put it into this task's.
    pub elsewhere: u32,
}

/// A document whose body has not been read yet.
pub struct OpenDocument {
    pub content_type: Option<String>,
    /// The length in bytes, where the server says it.
    pub length: Option<u64>,
    /// The ETag, without quotes.
    pub etag: Option<String>,
    pub body: BoxStream<'static, Result<Bytes, TaskError>>,
}

#[async_trait]
pub trait Documents: Send + Sync {
    /// Opens the document at a URL (`s3:` or `https:`).
    async fn open(&self, url: &str) -> Result<OpenDocument, TaskError>;
}

#[async_trait]
pub trait Vectors: Send + Sync {
    /// The bucket's name, for the URL in the event.
    fn bucket(&self) -> &str;

    /// Writes a vector; writing it again is harmless.
    async fn put(
        &self,
        key: &str,
        document_url: &str,
        model: &str,
        body: Vec<u8>,
    ) -> Result<(), aws::Error>;

    /// Deletes the vectors of a document that one model made.
    async fn delete_document(&self, document_url: &str, model: &str) -> Result<usize, aws::Error>;

    /// Looks whether a document in S3 is there.
    async fn presence(&self, document: &S3Url) -> Result<Presence, aws::Error>;
}

/// Where messages go that can never succeed (here).
#[async_trait]
pub trait Rejects: Send + Sync {
    /// Takes messages with their reasons; one result per message.
    async fn reject_all(&self, rejected: &[(String, Rejection)]) -> Vec<Result<(), aws::Error>>;
}

/// Notes that outlive the task: which messages are worked on alone.
#[async_trait]
pub trait Notes: Send + Sync {
    async fn write(&self, message_id: &str) -> Result<(), aws::Error>;

    async fn is_there(&self, message_id: &str) -> Result<bool, aws::Error>;

    async fn remove(&self, message_id: &str) -> Result<(), aws::Error>;
}

/// What was found in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub width: u32,
    pub height: u32,
}

/// Makes the model's pixels from a file.
pub trait Preparer: Send + Sync {
    /// Bytes of memory that [`Preparer::prepare`] takes, from the header.
    fn memory_needed(&self, bytes: &[u8], kind: ImageType) -> Result<u64, TaskError>;

    /// Decodes, resizes and crops to `side × side` RGB pixels in `out`.
    fn prepare(
        &self,
        bytes: &[u8],
        kind: ImageType,
        side: u32,
        out: &mut [u8],
    ) -> Result<Size, TaskError>;
}

/// Memory for the pixels of a batch.
pub type PixelBuffer = Box<dyn DerefMut<Target = [u8]> + Send>;

/// Why the model gave no vectors.
pub type EmbedError = Box<dyn std::error::Error + Send + Sync>;

pub trait Embedder: Send {
    /// Memory from which the model reads pixels fastest.
    fn buffer(&self, bytes: usize) -> Result<PixelBuffer, EmbedError> {
        Ok(Box::new(vec![0; bytes]))
    }

    /// Embeds `batch` images of `side × side × 3` bytes each; answers
    /// `batch × dimensions` values.
    fn embed(&mut self, pixels: &[u8], batch: usize) -> Result<Vec<f32>, EmbedError>;
}

pub struct ModelInfo {
    /// Its name, `ViT-B/32` and so on.
    pub name: String,
    /// The side of the images it takes, in pixels.
    pub side: u32,
    /// Finds the labels of a vector, best first; absent when labels are off.
    pub labels: Option<Box<LabelsOf>>,
}

/// Finds the labels of a vector, best first.
pub type LabelsOf = dyn Fn(&[f32]) -> Vec<String> + Send + Sync;

/// The pipeline's world.
#[derive(Clone)]
pub struct Services {
    pub queue: Arc<dyn Queue>,
    pub documents: Arc<dyn Documents>,
    pub vectors: Arc<dyn Vectors>,
    pub outputs: Outputs,
    pub rejects: Arc<dyn Rejects>,
    /// Where work goes that this worker has too little memory or time for;
    /// absent where there is no larger worker.
    pub larger: Option<Arc<dyn Rejects>>,
    pub preparer: Arc<dyn Preparer>,
    pub notes: Arc<dyn Notes>,
}
