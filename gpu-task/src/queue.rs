//! The input queue: three verbs, and what they may answer.

use std::time::Duration;

use async_trait::async_trait;

/// Messages in one receive, delete or visibility request (SQS API).
pub const BATCH_MAX: usize = 10;

/// The longest that a receive may wait for a message (SQS API).
pub const LONG_POLL_MAX: Duration = Duration::from_secs(20);

/// The longest that a message may stay invisible after one receive, all
/// extensions together (SQS API).
pub const VISIBILITY_MAX: Duration = Duration::from_secs(12 * 3600);

/// A message as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Received {
    /// Identifies the message across deliveries.
    pub message_id: String,
    /// Identifies this delivery of it; needed to extend or acknowledge.
    pub receipt: String,
    /// The body.
    pub body: String,
    /// How often it was delivered, this time included (approximate).
    pub receive_count: u32,
}

/// A change of one message's visibility.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// The delivery.
    pub receipt: String,
    /// Invisible for this long from now; zero hands the message back.
    pub visibility: Duration,
}

/// Why one message could not be extended or acknowledged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// The visibility has ended, or a newer delivery holds the message: it is
    /// not ours any more.
    #[error("the lease is lost: {0}")]
    Lost(String),
    /// The service or the network failed; the lease may still be ours.
    #[error("{0}")]
    Failed(String),
}

/// Why nothing could be received.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ReceiveError {
    /// The queue is missing or refuses us: waiting does not help, unless a
    /// person does something.
    pub is_refusal: bool,
    /// What the service or the network said.
    pub message: String,
}

/// The input queue.
#[async_trait]
pub trait Queue: Send + Sync {
    /// Receives up to `max` (1 to [`BATCH_MAX`]) messages, waits up to `wait`
    /// for the first, and makes them invisible for `visibility`.
    async fn receive(
        &self,
        max: usize,
        wait: Duration,
        visibility: Duration,
    ) -> Result<Vec<Received>, ReceiveError>;

    /// Changes the visibility of up to [`BATCH_MAX`] messages; one result
    /// each.
    async fn extend(&self, extensions: &[Extension]) -> Vec<Result<(), LeaseError>>;

    /// Deletes up to [`BATCH_MAX`] messages by their receipts; one result
    /// each.
    async fn acknowledge(&self, receipts: &[String]) -> Vec<Result<(), LeaseError>>;
}
