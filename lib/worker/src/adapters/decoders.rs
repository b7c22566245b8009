//! The decoders of `clip-image` as the pipeline's preparer.

use clip_image::{ImageError, Options, WORK_LIMIT};
use events::ImageType;

use crate::rules::failure::{Cause, Stage, TaskError};
use crate::services::{Preparer, Size};

/// Decoders with limits and modes. The side of the crop is the model's,
/// whatever the options say.
pub struct Decoders(pub Options);

fn task_error(error: ImageError) -> TaskError {
    let cause = match &error {
        ImageError::LimitExceeded {
            what: WORK_LIMIT, ..
        } => Cause::Timeout,
        ImageError::LimitExceeded { .. } => Cause::TooLarge,
        ImageError::Unsupported { .. } => Cause::Unsupported,
        ImageError::Decoder { .. } => Cause::DecoderPanic,
        ImageError::OutputSize { .. } => Cause::Internal,
        _ => Cause::Damaged,
    };
    TaskError::permanent(Stage::Decode, cause, error.to_string())
}

impl Preparer for Decoders {
    fn memory_needed(&self, bytes: &[u8], kind: ImageType) -> Result<u64, TaskError> {
        clip_image::memory_needed(bytes, kind, &self.0).map_err(task_error)
    }

    fn prepare(
        &self,
        bytes: &[u8],
        kind: ImageType,
        side: u32,
        out: &mut [u8],
    ) -> Result<Size, TaskError> {
        let options = Options {
            size: side,
            ..self.0
        };
        let prepared = clip_image::prepare(bytes, kind, &options, out).map_err(task_error)?;
        Ok(Size {
            width: prepared.width,
            height: prepared.height,
        })
    }
}
