//! Wires the configuration, the queue and the signals to the pipeline.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use worker::config::Config;
use worker::{Fatal, SqsQueue, Summary};

/// Runs the task until it is idle, stopped, or cannot go on.
pub async fn run(config: Config) -> Result<Summary, Fatal> {
    let stop = stop_on_signals()?;
    let sdk = platform::aws_config().await;
    let queue = SqsQueue::new(&sdk, config.queue_urls());
    let facts = Box::pin({
        let queue = queue.clone();
        async move { queue.facts().await }
    });
    let loading = worker::load(&config, &sdk);
    let services = worker::connect(&config, &sdk, Arc::new(queue))?;
    let metrics = worker::metrics(&config);
    let interval = config.settings.metrics_interval;
    let running = worker::run_pipeline(
        config.settings,
        services,
        metrics.clone(),
        facts,
        loading,
        stop,
    );
    let ended = tokio::select! {
        ended = running => ended,
        () = metrics.emit_every(interval) => unreachable!("it has no end"),
    };
    metrics.emit();
    ended
}

/// A token that SIGTERM (ECS, Spot) and SIGINT (a person) cancel.
fn stop_on_signals() -> Result<CancellationToken, Fatal> {
    let stop = CancellationToken::new();
    for (name, kind) in [
        ("SIGTERM", SignalKind::terminate()),
        ("SIGINT", SignalKind::interrupt()),
    ] {
        let mut signals = signal(kind)
            .map_err(|error| Fatal::Configuration(format!("cannot listen for {name}: {error}")))?;
        let stop = stop.clone();
        tokio::spawn(async move {
            signals.recv().await;
            tracing::info!(signal = name, "stopping");
            stop.cancel();
        });
    }
    Ok(stop)
}
