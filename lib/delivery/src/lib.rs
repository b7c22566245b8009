//! How results and rejects leave this system: events to the outputs (SNS
//! topic, EventBridge bus, SQS queue, any number at once), rejected messages
//! to the dead-letter queue, vectors into and out of the cache bucket.
//!
//! The worker and the intake share it, so that a deletion or a rejection is
//! the same thing wherever it is noticed. It knows events and AWS; it knows
//! nothing of images or of the input queue.

#![warn(missing_docs)]

mod backoff;
mod batch;
mod dead_letters;
mod destinations;
mod outputs;
mod presence;
mod vectors;

pub use backoff::Backoff;
pub use batch::{Answer, PUBLISH_MAX_BYTES, send_all, sqs_answer};
pub use dead_letters::{DeadLetters, Rejection, attribute};
pub use destinations::{Destination, Entry};
pub use outputs::{OutputConfig, Outputs, PublishError};
pub use presence::{Presence, presence};
pub use vectors::{delete_vectors, find_vectors, put_vector, remove_vectors};

use std::time::Duration;

use aws_config::SdkConfig;
use aws_config::timeout::TimeoutConfig;

/// One try of a call that carries at most 256 KiB: far above what the service
/// needs, far below what would leave a message's visibility to expire.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// [`with_timeout`] of such a call.
pub fn with_call_timeout(config: &SdkConfig) -> SdkConfig {
    with_timeout(config, CALL_TIMEOUT)
}

/// The same configuration with a limit on the time of each try, so that a
/// connection that went silent costs one retry and not the message's lease.
pub fn with_timeout(config: &SdkConfig, timeout: Duration) -> SdkConfig {
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(timeout)
        .build();
    config.to_builder().timeout_config(timeouts).build()
}
