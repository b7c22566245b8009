//! The intake Lambda: wires the clients once and answers payloads.

use std::process::ExitCode;
use std::sync::Arc;

use intake::{AwsServices, Config, Intake};
use lambda_runtime::{LambdaEvent, service_fn};
use platform::env::Reader;
use serde_json::Value;
use tracing::error;

const HELP: &str = "\
intake: the Lambda that turns every arriving form of work into CloudEvents on the input queue

It takes no arguments; the Lambda runtime starts it. Its environment:
  INPUT_QUEUE_URL        where validated events go (required)
  DEAD_LETTER_QUEUE_URL  where rejections are recorded, with their reason (required)
  CACHE_BUCKET           where the vectors lie that a deletion removes (required)
  CACHE_PREFIX           what their keys begin with (default clip-image-processor)
  MODEL_NAME             only this model's vectors are deleted (default: every model's)
  OUTPUT_TOPIC_ARN, OUTPUT_EVENT_BUS, OUTPUT_QUEUE_URL
                         where deletions are published (at least one)
  SCALER_FUNCTION_NAME   the scaler to wake (default: none; its schedule alone runs it)
  WAKE_INTERVAL_SECONDS  wakes it at most once in this time (default 5)
  LOG_FORMAT, RUST_LOG   json or text; a filter such as debug
";

#[tokio::main]
async fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        None => {}
        Some("--version") => {
            println!("intake {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Some("--help") => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Some(other) => {
            eprintln!("intake: {other:?} is no argument of this program: see --help");
            return ExitCode::FAILURE;
        }
    }
    platform::init_logs("intake");
    let env = Reader::process();
    let config = match Config::from_env(&env) {
        Ok(config) => config,
        Err(problem) => {
            error!(%problem, "the configuration is wrong");
            return ExitCode::FAILURE;
        }
    };
    let wake_interval = config.wake_interval;
    let sdk = platform::aws_config().await;
    let intake = Arc::new(Intake::new(AwsServices::new(&sdk, config), wake_interval));
    let serve = service_fn(move |event: LambdaEvent<Value>| {
        let intake = Arc::clone(&intake);
        async move {
            let (answer, _) = intake.handle(&event.payload).await?;
            Ok::<Value, lambda_runtime::Error>(answer)
        }
    });
    match lambda_runtime::run(serve).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            error!(%problem, "the Lambda runtime ended");
            ExitCode::FAILURE
        }
    }
}
