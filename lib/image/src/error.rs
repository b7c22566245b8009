//! What can be wrong with an image.
//!
//! Every variant is permanent: the same bytes give the same error again, so a
//! message that carries such an image is rejected, never retried.

/// Why an image was refused. The message says what is wrong and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The file ends before its pixels do.
    #[error("{format} file is truncated: {detail}")]
    Truncated {
        /// The format as it is commonly written, such as `JPEG`.
        format: &'static str,
        /// What was being read when the bytes ran out.
        detail: String,
    },
    /// The bytes do not follow the format.
    #[error("{format} file is corrupt: {detail}")]
    Corrupt {
        /// The format as it is commonly written, such as `JPEG`.
        format: &'static str,
        /// What was read and what was wanted.
        detail: String,
    },
    /// A valid file that uses something that the reference does not read either.
    #[error("{format} file uses an unsupported feature: {detail}")]
    Unsupported {
        /// The format as it is commonly written, such as `JPEG`.
        format: &'static str,
        /// The feature.
        detail: String,
    },
    /// The file, as its header describes it, is larger than what is allowed, or
    /// decoding it took more than that.
    #[error("image needs {needed} {what}, more than the limit of {limit}")]
    LimitExceeded {
        /// What is limited, such as `pixels` or `milliseconds of work`.
        what: &'static str,
        /// How many the image has or needs.
        needed: u64,
        /// How many are allowed.
        limit: u64,
    },
    /// A decoder failed in a way that it should not have; the task goes on.
    #[error("{format} decoder failed: {detail}")]
    Decoder {
        /// The format as it is commonly written, such as `JPEG`.
        format: &'static str,
        /// The message of the panic.
        detail: String,
    },
    /// The output slice does not have `size × size × 3` bytes.
    #[error("output buffer has {got} bytes, wanted {wanted}")]
    OutputSize {
        /// Length of the slice that was passed.
        got: usize,
        /// Length that `Options::size` asks for.
        wanted: usize,
    },
}

impl ImageError {
    /// A short stable name of the kind of error, for logs and metrics.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Truncated { .. } => "truncated",
            Self::Corrupt { .. } => "corrupt",
            Self::Unsupported { .. } => "unsupported",
            Self::LimitExceeded { .. } => "limit-exceeded",
            Self::Decoder { .. } => "decoder",
            Self::OutputSize { .. } => "output-size",
        }
    }
}

pub(crate) type Result<T> = std::result::Result<T, ImageError>;

/// Makes the errors of one format without repeating its name.
#[derive(Clone, Copy)]
pub(crate) struct Blame(pub(crate) &'static str);

impl Blame {
    pub(crate) fn truncated(self, detail: impl Into<String>) -> ImageError {
        ImageError::Truncated {
            format: self.0,
            detail: detail.into(),
        }
    }

    pub(crate) fn corrupt(self, detail: impl Into<String>) -> ImageError {
        ImageError::Corrupt {
            format: self.0,
            detail: detail.into(),
        }
    }

    pub(crate) fn unsupported(self, detail: impl Into<String>) -> ImageError {
        ImageError::Unsupported {
            format: self.0,
            detail: detail.into(),
        }
    }
}
