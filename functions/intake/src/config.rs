//! Intake's configuration, from the environment.

use std::time::Duration;

use delivery::OutputConfig;
use platform::env::{EnvError, Reader};

/// What intake needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// `INPUT_QUEUE_URL`: where validated events go. Required.
    pub input_queue_url: String,
    /// `DEAD_LETTER_QUEUE_URL`: where rejections are recorded. Required.
    pub dead_letter_queue_url: String,
    /// `SCALER_FUNCTION_NAME`: the Lambda to wake; without it nothing is
    /// woken and the scaler's schedule alone starts tasks.
    pub scaler_function_name: Option<String>,
    /// `WAKE_INTERVAL_SECONDS`: the scaler is woken at most once in this time
    /// by one instance of intake (default 5).
    pub wake_interval: Duration,
    /// `CACHE_BUCKET`: where vectors lie that a deletion removes. Required.
    pub cache_bucket: String,
    /// `CACHE_PREFIX`: what their keys begin with (default
    /// `clip-image-processor`).
    pub cache_prefix: String,
    /// `MODEL_NAME`: only this model's vectors are deleted; all without it.
    pub model_name: Option<String>,
    /// `OUTPUT_TOPIC_ARN`, `OUTPUT_EVENT_BUS`, `OUTPUT_QUEUE_URL`: where
    /// deletions go; at least one.
    pub outputs: OutputConfig,
}

impl Config {
    /// Reads and checks the variables.
    pub fn from_env(env: &Reader<'_>) -> Result<Self, EnvError> {
        Ok(Self {
            input_queue_url: env.required("INPUT_QUEUE_URL", "the URL of the input queue")?,
            dead_letter_queue_url: env
                .required("DEAD_LETTER_QUEUE_URL", "the URL of the dead-letter queue")?,
            scaler_function_name: env.optional("SCALER_FUNCTION_NAME"),
            wake_interval: env.seconds(
                "WAKE_INTERVAL_SECONDS",
                planner::cadence::WAKE_INTERVAL.as_secs(),
                0..=60,
            )?,
            cache_bucket: env.required("CACHE_BUCKET", "the bucket that holds the vectors")?,
            cache_prefix: env
                .optional("CACHE_PREFIX")
                .unwrap_or_else(|| events::vector::DEFAULT_PREFIX.to_owned()),
            model_name: env.optional("MODEL_NAME"),
            outputs: OutputConfig::from_env(env)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(change: (&str, Option<&str>)) -> Result<Config, EnvError> {
        let variables = [
            ("INPUT_QUEUE_URL", "http://127.0.0.1/1/input"),
            ("DEAD_LETTER_QUEUE_URL", "http://127.0.0.1/1/dead"),
            ("CACHE_BUCKET", "cache"),
            (
                "OUTPUT_TOPIC_ARN",
                "arn:aws:sns:eu-west-1:123456789012:output",
            ),
        ];
        let reader = Reader::new(|name| {
            if name == change.0 {
                return change.1.map(str::to_owned);
            }
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        });
        Config::from_env(&reader)
    }

    #[test]
    fn defaults_are_sensible() {
        let config = read(("", None)).unwrap();
        assert_eq!(config.cache_prefix, "clip-image-processor");
        assert_eq!(config.wake_interval, Duration::from_secs(5));
        assert_eq!(config.scaler_function_name, None);
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (name, value) in [
            ("INPUT_QUEUE_URL", None),
            ("CACHE_BUCKET", Some("")),
            ("WAKE_INTERVAL_SECONDS", Some("soon")),
            ("OUTPUT_TOPIC_ARN", None),
        ] {
            let error = read((name, value)).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
