//! What can go wrong with a piece of work, where, and whether trying again
//! can help.

use std::fmt;

pub use platform::Failure;
use platform::aws::{self, ErrorKind};

/// A stage of the pipeline, in the order in which work passes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    Receive,
    Parse,
    Download,
    Decode,
    /// Waiting for company in a batch.
    Batch,
    Infer,
    Store,
    Publish,
    /// Deleting, returning or rejecting the message.
    Acknowledge,
}

impl Stage {
    pub const ALL: [Stage; 9] = [
        Stage::Receive,
        Stage::Parse,
        Stage::Download,
        Stage::Decode,
        Stage::Batch,
        Stage::Infer,
        Stage::Store,
        Stage::Publish,
        Stage::Acknowledge,
    ];

    /// The name in logs, metrics and rejections.
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Receive => "receive",
            Stage::Parse => "parse",
            Stage::Download => "download",
            Stage::Decode => "decode",
            Stage::Batch => "batch",
            Stage::Infer => "infer",
            Stage::Store => "store",
            Stage::Publish => "publish",
            Stage::Acknowledge => "acknowledge",
        }
    }
}

/// Why something failed: one of few words, so that metrics can count them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// The message is no work in any known form.
    Malformed,
    NotFound,
    AccessDenied,
    Empty,
    TooLarge,
    /// It needs more memory or time than this worker has; a larger one does it.
    BeyondWorker,
    Unsupported,
    Damaged,
    /// A decoder gave up in a way that it should not have.
    DecoderPanic,
    /// The model's answer holds a value that is no number.
    NotFinite,
    Engine,
    /// The finished event is larger than an output takes.
    EventTooLarge,
    Refused,
    Unavailable,
    Timeout,
    /// Its worker died with it, again and again, at last with it alone.
    KilledWorker,
    /// The message's visibility ended before its work did.
    LeaseLost,
    Internal,
}

impl Cause {
    /// The word in logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Cause::Malformed => "malformed",
            Cause::NotFound => "not-found",
            Cause::AccessDenied => "access-denied",
            Cause::Empty => "empty",
            Cause::TooLarge => "too-large",
            Cause::BeyondWorker => "beyond-worker",
            Cause::Unsupported => "unsupported",
            Cause::Damaged => "damaged",
            Cause::DecoderPanic => "decoder-panic",
            Cause::NotFinite => "not-finite",
            Cause::Engine => "engine",
            Cause::EventTooLarge => "event-too-large",
            Cause::Refused => "refused",
            Cause::Unavailable => "unavailable",
            Cause::Timeout => "timeout",
            Cause::KilledWorker => "killed-worker",
            Cause::LeaseLost => "lease-lost",
            Cause::Internal => "internal",
        }
    }
}

impl From<&aws::Error> for Cause {
    fn from(error: &aws::Error) -> Self {
        match (error.kind, error.failure) {
            (ErrorKind::Access, _) => Cause::AccessDenied,
            (ErrorKind::NotFound, _) => Cause::NotFound,
            (_, Failure::Permanent) => Cause::Refused,
            (_, Failure::Transient) => Cause::Unavailable,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskError {
    pub stage: Stage,
    pub cause: Cause,
    /// Whether a later try can succeed.
    pub failure: Failure,
    pub message: String,
    /// Where the finished event lies that no output took.
    pub event: Option<String>,
}

impl TaskError {
    /// The input is at fault: every try will fail.
    pub fn permanent(stage: Stage, cause: Cause, message: impl Into<String>) -> Self {
        Self {
            stage,
            cause,
            failure: Failure::Permanent,
            message: message.into(),
            event: None,
        }
    }

    /// A call of an AWS API failed.
    pub fn of_call(stage: Stage, error: &aws::Error) -> Self {
        Self {
            failure: error.failure,
            ..Self::permanent(stage, error.into(), error.to_string())
        }
    }

    /// The kind in logs and metrics.
    pub(crate) const fn word(&self) -> &'static str {
        match self.failure {
            Failure::Permanent => "permanent",
            Failure::Transient => "transient",
        }
    }

    /// A later try can succeed.
    pub fn transient(stage: Stage, cause: Cause, message: impl Into<String>) -> Self {
        Self {
            failure: Failure::Transient,
            ..Self::permanent(stage, cause, message)
        }
    }
}

impl fmt::Display for TaskError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}

impl std::error::Error for TaskError {}

/// Why the task ends before its work does. Each has an exit code of its own,
/// which the scaler's crash-loop detection and a person reading ECS see.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fatal {
    #[error("configuration: {0}")]
    Configuration(String),
    #[error("model: {0}")]
    Model(String),
    #[error("aws access: {0}")]
    Access(String),
    #[error("inference: {0}")]
    Inference(String),
}

impl Fatal {
    pub const fn exit_code(&self) -> u8 {
        match self {
            Fatal::Configuration(_) => 2,
            Fatal::Model(_) => 3,
            Fatal::Access(_) => 4,
            Fatal::Inference(_) => 5,
        }
    }
}
