//! Telling the scaler that there is work.

use async_trait::async_trait;
use aws_sdk_lambda::Client;
use aws_sdk_lambda::primitives::Blob;
use aws_sdk_lambda::types::InvocationType;
use platform::aws;

#[async_trait]
pub trait Waker: Send + Sync {
    async fn wake(&self) -> Result<(), aws::Error>;
}

pub struct Scaler {
    pub lambda: Client,
    /// The function's name or ARN.
    pub function: String,
}

#[async_trait]
impl Waker for Scaler {
    async fn wake(&self) -> Result<(), aws::Error> {
        self.lambda
            .invoke()
            .function_name(&self.function)
            .invocation_type(InvocationType::Event)
            .payload(Blob::new(r#"{"source":"clip-ops"}"#))
            .send()
            .await
            .map(|_| ())
            .map_err(|error| aws::Error::from_sdk("lambda:Invoke", &error).of(&self.function))
    }
}
