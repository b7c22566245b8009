//! What every program of the pipeline does at start: AWS clients, logs,
//! metrics and configuration. The same code runs on AWS and on one machine;
//! only endpoints (`AWS_ENDPOINT_URL`, `AWS_ENDPOINT_URL_ECS`, …) differ.

#![warn(missing_docs)]

pub mod aws;
pub mod env;
mod failure;
mod logs;
pub mod metrics;

pub use failure::Failure;
pub use logs::init_logs;

use aws_config::{BehaviorVersion, SdkConfig};
use aws_smithy_http_client::{Builder, tls};

/// Loads the AWS configuration from the environment (region, credentials,
/// endpoints) with the one HTTP client that all programs use: rustls with
/// ring, so that no build needs cmake and no binary carries two TLS stacks.
pub async fn aws_config() -> SdkConfig {
    let http_client = Builder::new()
        .tls_provider(tls::Provider::Rustls(
            tls::rustls_provider::CryptoMode::Ring,
        ))
        .build_https();
    aws_config::defaults(BehaviorVersion::latest())
        .http_client(http_client)
        .load()
        .await
}

/// An S3 client. Path-style addressing is used when an endpoint is given
/// (an emulator or a gateway has no virtual-host buckets), and only then.
#[cfg(feature = "s3")]
pub fn s3_client(config: &SdkConfig) -> aws_sdk_s3::Client {
    let endpoint_is_given = config.endpoint_url().is_some()
        || std::env::var_os("AWS_ENDPOINT_URL_S3").is_some()
        || std::env::var_os("AWS_ENDPOINT_URL").is_some();
    let s3_config = aws_sdk_s3::config::Builder::from(config)
        .force_path_style(endpoint_is_given)
        .build();
    aws_sdk_s3::Client::from_conf(s3_config)
}
