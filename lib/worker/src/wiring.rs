//! The services and the model that a configuration names.

use std::path::PathBuf;
use std::sync::Arc;

use aws_config::SdkConfig;
use clip_model::engine::EngineOptions;
use delivery::{DeadLetters, Outputs};

use crate::adapters::bundle_cache;
use crate::adapters::cache_bucket::CacheBucket;
use crate::adapters::decoders::Decoders;
use crate::adapters::documents::RemoteDocuments;
use crate::adapters::engine;
use crate::config::Config;
use crate::metrics::Metrics;
use crate::pipeline::Loading;
use crate::rules::failure::Fatal;
use crate::services::{Queue, Services};

/// Everything outside, with messages from `queue`.
pub fn connect(config: &Config, sdk: &SdkConfig, queue: Arc<dyn Queue>) -> Result<Services, Fatal> {
    let outputs = config
        .outputs()
        .map_err(|error| Fatal::Configuration(error.to_string()))?;
    let cache_bucket = Arc::new(CacheBucket {
        s3: platform::s3_client(&delivery::with_call_timeout(sdk)),
        bucket: config.cache_bucket.clone(),
        prefix: config.settings.cache_prefix.clone(),
    });
    Ok(Services {
        queue,
        documents: Arc::new(RemoteDocuments::new(sdk)),
        notes: cache_bucket.clone(),
        vectors: cache_bucket,
        outputs: Outputs::connect(&outputs, sdk),
        rejects: Arc::new(DeadLetters::new(sdk, &config.dead_letter_queue_url)),
        larger: None,
        preparer: Arc::new(Decoders(config.image_options())),
    })
}

/// Begins to load the model.
pub fn load(config: &Config, sdk: &SdkConfig) -> Loading {
    let options = EngineOptions {
        provider: config.execution_provider,
        intra_threads: Some(config.intra_threads),
        // A spinning thread takes a core from the decoders.
        spinning: false,
        max_batch: config.settings.batch_size,
        widen: true,
    };
    engine::load(bundle_folder(config, sdk), options, config.extract_labels)
}

/// Figures of work on the configured queue.
pub fn metrics(config: &Config) -> Arc<Metrics> {
    Arc::new(Metrics::new(
        &config.metrics_namespace,
        config.queue_name(),
        config.cluster_name.as_deref(),
        config.settings.batch_size,
    ))
}

/// The folder of the bundle, fetched first where it comes from S3.
fn bundle_folder(
    config: &Config,
    sdk: &SdkConfig,
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
