//! Clients of the emulated AWS.

use std::fmt::Display;

use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig};
use aws_sdk_sqs::{
    config::{Credentials, SharedCredentialsProvider},
    error::DisplayErrorContext,
};
use aws_smithy_http_client::Builder;
pub use ministack::{CREDENTIALS, REGION};
use thiserror::Error;

/// A client configuration for one endpoint, with plain HTTP, fixed credentials
/// and nothing taken from the surrounding shell.
pub fn config(endpoint: &str) -> SdkConfig {
    let credentials = Credentials::new(CREDENTIALS, CREDENTIALS, None, None, "local");
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(REGION))
        .credentials_provider(SharedCredentialsProvider::new(credentials))
        .endpoint_url(endpoint)
        .http_client(Builder::new().build_http())
        .retry_config(RetryConfig::standard())
        .build()
}

#[derive(Debug, Error)]
#[error("{what}: {problem}")]
pub struct CallFailed {
    pub what: String,
    pub problem: String,
}

/// Says what a call was for when it fails.
pub(crate) fn failed<E: std::error::Error>(what: impl Display) -> impl FnOnce(E) -> CallFailed {
    move |error| CallFailed {
        what: what.to_string(),
        // SDK errors say little by themselves: what they come from says why.
        problem: DisplayErrorContext(error).to_string(),
    }
}

/// Sends a call, and says what it was for when it fails.
pub(crate) async fn sent<T, E: std::error::Error>(
    what: impl Display,
    call: impl Future<Output = Result<T, E>>,
) -> Result<T, CallFailed> {
    call.await.map_err(failed(what))
}
