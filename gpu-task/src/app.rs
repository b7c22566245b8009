//! Wires the configuration, AWS and the model to the pipeline.

use std::path::PathBuf;
use std::sync::Arc;

use clip_image::Options;
use clip_model::engine::EngineOptions;
use delivery::{DeadLetters, Outputs};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::bundle_cache;
use crate::config::{Config, ModelSource};
use crate::documents::RemoteDocuments;
use crate::failure::Fatal;
use crate::model;
use crate::outside::CacheBucket;
use crate::pipeline::{self, RETRY, Settings, Summary};
use crate::prepare::ImagePreparer;
use crate::services::Services;
use crate::sqs::SqsQueue;
use crate::stats::Stats;

/// Publish requests at the same time: at 100 ms each and ten events a
/// request, 800 events/s.
const PUBLISHES: usize = 8;

/// Messages for which one receiver is enough at 100 ms a receive.
const MESSAGES_PER_RECEIVER: usize = 64;

/// Receivers at most; each holds a connection in a long poll.
const MAX_RECEIVERS: usize = 8;

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
        provider: config.provider,
        intra_threads: Some(config.intra_threads),
        // A spinning thread takes a core from the decoders.
        spinning: false,
        max_batch: config.batch_size,
    };
    let loading = model::load(bundle_folder(&config, &sdk), options, config.extract_labels);
    let s3 = platform::s3_client(&delivery::with_call_timeout(&sdk));
    let services = Services {
        queue: Arc::new(queue),
        documents: Arc::new(RemoteDocuments::new(&sdk)),
        vectors: Arc::new(CacheBucket::new(
            s3,
            &config.cache_bucket,
            &config.cache_prefix,
        )),
        publisher: Arc::new(Outputs::connect(&config.outputs, &sdk)),
        rejects: Arc::new(DeadLetters::new(&sdk, &config.dead_letter_queue_url)),
        preparer: Arc::new(ImagePreparer::new(Options {
            limits: config.limits,
            apply_exif_orientation: config.apply_exif_orientation,
            decode: config.decode,
            ..Options::default()
        })),
    };
    let stats = Arc::new(Stats::new(
        &config.metrics_namespace,
        config.queue_name(),
        config.cluster_name.as_deref(),
        config.batch_size,
    ));
    pipeline::run(settings(&config), services, stats, facts, loading, stop).await
}

/// The pipeline's part of the configuration.
pub fn settings(config: &Config) -> Settings {
    let receivers = config.max_messages / MESSAGES_PER_RECEIVER;
    Settings {
        batch_size: config.batch_size,
        batch_wait: config.batch_wait,
        decode_threads: config.decode_threads,
        downloads: config.downloads,
        stores: config.stores,
        publishes: PUBLISHES,
        receivers: receivers.clamp(1, MAX_RECEIVERS),
        max_messages: config.max_messages,
        memory_budget: config.memory_budget,
        max_image_bytes: config.limits.max_bytes,
        visibility: config.visibility,
        download_timeout: config.download_timeout,
        idle_exit: config.idle_exit,
        stop_timeout: config.stop_timeout,
        metrics_interval: config.metrics_interval,
        cache_prefix: config.cache_prefix.clone(),
        image_lines_per_second: config.image_lines_per_second,
        retry: RETRY,
    }
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
    let source = config.model.clone();
    let s3 = platform::s3_client(sdk);
    async move {
        match source {
            ModelSource::Path(folder) => Ok(folder),
            ModelSource::Uri {
                bucket,
                prefix,
                cache,
            } => bundle_cache::fetch(&s3, &bucket, &prefix, &cache)
                .await
                .map_err(|error| Fatal::Model(error.to_string())),
        }
    }
}
