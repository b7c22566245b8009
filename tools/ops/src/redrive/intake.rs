//! The way back through intake.

use std::time::Duration;

use aws_config::SdkConfig;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_lambda::Client;
use aws_sdk_lambda::primitives::Blob;
use aws_sdk_lambda::types::InvocationType;
use futures_util::future::join_all;
use platform::aws;
use serde_json::Value;

use super::record::error_message;
use super::{Letter, Problem, Results};

/// One try of an invocation: the function's own time-out of 30 s, and a start.
const INVOKE_TIMEOUT: Duration = Duration::from_secs(45);

/// Intake's Lambda. It is invoked synchronously: an asynchronous invocation
/// would only be accepted, and may fail as the first one did.
pub struct Intake {
    client: Client,
    function: String,
}

impl Intake {
    pub fn new(sdk: &SdkConfig, function: &str) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(Duration::from_secs(3))
            .operation_attempt_timeout(INVOKE_TIMEOUT)
            .build();
        let config = sdk.to_builder().timeout_config(timeouts).build();
        Self {
            client: Client::new(&config),
            function: function.to_owned(),
        }
    }

    pub async fn take_all(&self, letters: &[&Letter]) -> Results {
        join_all(letters.iter().map(|letter| self.take(letter))).await
    }

    async fn take(&self, letter: &Letter) -> Result<(), Problem> {
        let payload = letter.payload.as_ref().unwrap_or(&letter.body);
        let response = self
            .client
            .invoke()
            .function_name(&self.function)
            .invocation_type(InvocationType::RequestResponse)
            .payload(Blob::new(payload.as_bytes()))
            .send()
            .await
            .map_err(|error| aws::Error::from_sdk("lambda:Invoke", &error).of(&self.function))?;
        let answer = response.payload().map_or(&[][..], |blob| blob.as_ref());
        let answer: Value = serde_json::from_slice(answer).unwrap_or_default();
        if let Some(kind) = response.function_error() {
            let message = error_message(&answer).map_or_else(|| answer.to_string(), str::to_owned);
            let kind = kind.to_owned();
            return Err(Problem::IntakeFailed { kind, message });
        }
        judge(answer)
    }
}

/// Whether intake's answer says that all of the work is done. Any other
/// function's answer does not.
fn judge(answer: Value) -> Result<(), Problem> {
    if let Some(failed) = answer["batchItemFailures"].as_array() {
        return match failed.len() {
            0 => Ok(()),
            count => Err(Problem::NotTaken(count)),
        };
    }
    match (answer["enqueued"].as_u64(), answer["failed"].as_u64()) {
        (Some(_), Some(0)) => Ok(()),
        _ => Err(Problem::NotIntake(answer)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_intakes_own_yes_is_a_yes() {
        let counts = json!({"enqueued": 1, "deleted": 0, "rejected": 0, "unsupported": 0, "ignored": 0, "failed": 0});
        assert!(judge(counts).is_ok());
        assert!(judge(json!({"batchItemFailures": []})).is_ok());
        let one = json!({"batchItemFailures": [{"itemIdentifier": "m1"}]});
        for (answer, words) in [
            (one, "1 of the messages"),
            (json!({"enqueued": 1, "failed": 2}), "no answer of intake's"),
            (json!({"verdict": "the queue is empty"}), "right function"),
            (Value::Null, "right function"),
        ] {
            let problem = judge(answer).unwrap_err().to_string();
            assert!(problem.contains(words), "{words} in {problem}");
        }
    }
}
