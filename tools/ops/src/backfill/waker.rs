//! Telling the scaler that there is work.

use async_trait::async_trait;
use aws_sdk_lambda::Client;
use aws_sdk_lambda::primitives::Blob;
use aws_sdk_lambda::types::InvocationType;
use aws_smithy_types::error::display::DisplayErrorContext;

/// Someone who starts tasks.
#[async_trait]
pub trait Waker: Send + Sync {
    /// Tells of work; the error is for a person.
    async fn wake(&self) -> Result<(), String>;
}

/// The scaler's Lambda.
pub struct Scaler {
    /// The client.
    pub lambda: Client,
    /// The function's name or ARN.
    pub function: String,
}

#[async_trait]
impl Waker for Scaler {
    async fn wake(&self) -> Result<(), String> {
        self.lambda
            .invoke()
            .function_name(&self.function)
            .invocation_type(InvocationType::Event)
            .payload(Blob::new(r#"{"source":"clip-ops"}"#))
            .send()
            .await
            .map(|_| ())
            .map_err(|error| {
                format!(
                    "Invoke of {}: {}",
                    self.function,
                    DisplayErrorContext(&error)
                )
            })
    }
}
