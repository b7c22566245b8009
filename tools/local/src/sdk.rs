//! Clients of the emulated AWS.

use aws_config::{BehaviorVersion, Region, SdkConfig, retry::RetryConfig};
use aws_sdk_sqs::config::{Credentials, SharedCredentialsProvider};
use aws_smithy_http_client::Builder;

/// The region of everything local.
pub const REGION: &str = "us-east-1";
/// The emulators' access key; they check no signature.
pub const ACCESS_KEY: &str = "test";
/// The emulators' secret key.
pub const SECRET_KEY: &str = "test";

/// A client configuration for one endpoint, with plain HTTP, fixed credentials
/// and nothing taken from the surrounding shell.
#[must_use]
pub fn config(endpoint: &str) -> SdkConfig {
    let credentials = Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "local");
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::new(REGION))
        .credentials_provider(SharedCredentialsProvider::new(credentials))
        .endpoint_url(endpoint)
        .http_client(Builder::new().build_http())
        .retry_config(RetryConfig::standard())
        .build()
}
