//! Wires the configuration, AWS and the model to the pipeline.

use std::path::PathBuf;
use std::sync::Arc;

use clip_model::engine::EngineOptions;
use delivery::{DeadLetters, Outputs};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::adapters::bundle_cache;
use crate::adapters::cache_bucket::CacheBucket;
use crate::adapters::decoders::Decoders;
use crate::adapters::documents::RemoteDocuments;
use crate::adapters::engine;
use crate::adapters::sqs::SqsQueue;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::pipeline::{self, Summary};
use crate::rules::failure::Fatal;
use crate::services::Services;

/// Runs the task until it is idle, stopped, or cannot go on.
pub async fn run(config: Config) -> Result<Summary, Fatal> {
    let stop = stop_on_signals()?;
    let sdk = platform::aws_config().await;
    let queue = SqsQueue::new(&sdk, &config.input_queue_url);
    let facts = Box::pin({
        let queue = queue.clone();
        async move { queue.facts().await }
    });
    let options = EngineOptions {
        provider: config.execution_provider,
        intra_threads: Some(config.intra_threads),
        // A spinning thread takes a core from the decoders.
        spinning: false,
        max_batch: config.settings.batch_size,
    };
    let loading = engine::load(bundle_folder(&config, &sdk), options, config.extract_labels);
    let outputs = config
        .outputs()
        .map_err(|error| Fatal::Configuration(error.to_string()))?;
    let cache_bucket = Arc::new(CacheBucket {
        s3: platform::s3_client(&delivery::with_call_timeout(&sdk)),
        bucket: config.cache_bucket.clone(),
        prefix: config.settings.cache_prefix.clone(),
    });
    let services = Services {
        queue: Arc::new(queue),
        documents: Arc::new(RemoteDocuments::new(&sdk)),
        notes: cache_bucket.clone(),
        vectors: cache_bucket,
        outputs: Outputs::connect(&outputs, &sdk),
        rejects: Arc::new(DeadLetters::new(&sdk, &config.dead_letter_queue_url)),
        preparer: Arc::new(Decoders(config.image_options())),
    };
    let metrics = Arc::new(Metrics::new(
        &config.metrics_namespace,
        config.queue_name(),
        config.cluster_name.as_deref(),
        config.settings.batch_size,
    ));
    pipeline::run(config.settings, services, metrics, facts, loading, stop).await
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

/// The folder of the bundle, fetched first where it comes from S3.
fn bundle_folder(
    config: &Config,
    sdk: &aws_config::SdkConfig,
) -> impl Future<Output = Result<PathBuf, Fatal>> + Send + 'static {
    let s3 = platform::s3_client(sdk);
    let (path, uri, cache) = (
        config.model_path.clone(),
        config.model_uri.clone(),
        config.cache_dir.clone(),
    );
    async move {
        match (path, uri, cache) {
            (Some(folder), _, _) => Ok(folder),
            (None, Some(place), Some(cache)) => {
                bundle_cache::fetch(&s3, &place.bucket, &place.key, &cache)
                    .await
                    .map_err(|error| Fatal::Model(error.to_string()))
            }
            _ => unreachable!("the configuration demands a folder, or a URI and a cache"),
        }
    }
}
