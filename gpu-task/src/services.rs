//! What the pipeline needs from the world, as small traits, so that its rules
//! can be tested against fakes that enforce AWS's own limits.

use std::ops::DerefMut;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use delivery::{PublishError, Rejection};
use events::{CloudEvent, ImageType};
use futures_util::stream::BoxStream;
use platform::aws;

use crate::failure::TaskError;
use crate::queue::Queue;

/// A document whose body has not been read yet.
pub struct OpenDocument {
    /// The declared type.
    pub content_type: Option<String>,
    /// The length in bytes, where the server says it.
    pub length: Option<u64>,
    /// The ETag, without quotes.
    pub etag: Option<String>,
    /// The body.
    pub body: BoxStream<'static, Result<Bytes, TaskError>>,
}

/// Where documents come from.
#[async_trait]
pub trait Documents: Send + Sync {
    /// Opens the document at a URL (`s3:` or `https:`).
    async fn open(&self, url: &str) -> Result<OpenDocument, TaskError>;
}

/// Where vectors go.
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
}

/// Where events go.
#[async_trait]
pub trait Publisher: Send + Sync {
    /// Sends every event to every output; one result per event.
    async fn publish(&self, events: &[CloudEvent]) -> Vec<Result<(), PublishError>>;

    /// Whether the event fits every output.
    fn check_size(&self, event: &CloudEvent) -> Result<(), PublishError>;
}

/// Where messages go that can never succeed.
#[async_trait]
pub trait Rejects: Send + Sync {
    /// Takes messages with their reasons; one result per message, the error
    /// being what the queue said.
    async fn reject_all(&self, rejected: &[(String, Rejection)]) -> Vec<Result<(), String>>;
}

/// What was found in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
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

/// Runs the model.
pub trait Embedder: Send {
    /// Memory from which the model reads pixels fastest.
    fn buffer(&self, bytes: usize) -> Result<PixelBuffer, String> {
        Ok(Box::new(vec![0; bytes]))
    }

    /// Embeds `batch` images of `side × side × 3` bytes each; answers
    /// `batch × dimensions` values.
    fn embed(&mut self, pixels: &[u8], batch: usize) -> Result<Vec<f32>, String>;
}

/// What is known of the model.
pub struct ModelInfo {
    /// Its name, `ViT-B/32` and so on.
    pub name: String,
    /// The length of its vectors.
    pub dimensions: usize,
    /// The side of the images it takes, in pixels.
    pub side: u32,
    /// Whether its weights are synthesised, so that its vectors mean nothing.
    pub is_synthesized: bool,
    /// What goes into the event's `attrs.custom.clip`.
    pub details: serde_json::Map<String, serde_json::Value>,
    /// Finds the labels of a vector, best first; absent when labels are off.
    pub labels: Option<Box<LabelsOf>>,
}

/// Finds the labels of a vector, best first.
pub type LabelsOf = dyn Fn(&[f32]) -> Vec<String> + Send + Sync;

/// A model that is ready.
pub struct Model {
    /// What is known of it.
    pub info: ModelInfo,
    /// Runs it; several run side by side, each on a thread of its own.
    pub embedders: Vec<Box<dyn Embedder>>,
}

/// The pipeline's world.
#[derive(Clone)]
pub struct Services {
    /// The input queue.
    pub queue: Arc<dyn Queue>,
    /// The documents.
    pub documents: Arc<dyn Documents>,
    /// The cache bucket.
    pub vectors: Arc<dyn Vectors>,
    /// The outputs.
    pub publisher: Arc<dyn Publisher>,
    /// The dead-letter queue.
    pub rejects: Arc<dyn Rejects>,
    /// The decoders.
    pub preparer: Arc<dyn Preparer>,
}
