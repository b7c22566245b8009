//! The express Lambda: loads the model while Lambda initialises it, and works
//! on what each invocation brings.

use std::process::ExitCode;
use std::sync::Arc;

use aws_lambda_events::sqs::SqsEvent;
use express::Lane;
use lambda_runtime::{LambdaEvent, service_fn};
use platform::env::Reader;
use worker::Fatal;
use worker::config::Config;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { clip_model::engine::disable_telemetry() };
    let config = match Config::read(std::env::args_os()) {
        Ok(config) => config,
        Err(error) => error.exit(),
    };
    platform::init_logs("express");
    let ended = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(lambda_runtime::Error::from)
        .and_then(|runtime| runtime.block_on(serve(config)));
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            tracing::error!(%problem, "the Lambda runtime ended");
            ExitCode::FAILURE
        }
    }
}

async fn serve(config: Config) -> Result<(), lambda_runtime::Error> {
    let memory = Reader::process()
        .optional("AWS_LAMBDA_FUNCTION_MEMORY_SIZE")
        .map(|mib| mib.parse())
        .transpose()
        .map_err(|_| {
            Fatal::Configuration("AWS_LAMBDA_FUNCTION_MEMORY_SIZE is no number".to_owned())
        })?;
    let sdk = platform::aws_config().await;
    let lane = Arc::new(Lane::new(config, sdk, memory)?);
    tokio::spawn({
        let lane = lane.clone();
        async move {
            // An invocation tries again, and tells why it fails.
            let _ = lane.load().await;
        }
    });
    lambda_runtime::run(service_fn(move |event: LambdaEvent<SqsEvent>| {
        let lane = lane.clone();
        async move { lane.handle(event).await }
    }))
    .await
}
