//! The wire contract: CloudEvents as Lakechain's middlewares send and accept
//! them, the forms in which work arrives, the supported image types, S3 URLs
//! and the names of vectors.
//!
//! Nothing here does I/O. What other systems observe of this one is decided
//! in this crate and nowhere else.

#![warn(missing_docs)]

mod cloud_event;
mod forms;
mod image_type;
mod s3_url;
pub mod vector;

pub use cloud_event::{
    CloudEvent, Data, Document, Embedding, EventError, EventType, Metadata, Properties, SERVICE,
};
pub use forms::{Delivery, FormError, Item, S3Object, deliveries, parse_work};
pub use image_type::{DETECTION_BYTES, ImageType};
pub use s3_url::{S3Url, S3UrlError, decode_notification_key};
