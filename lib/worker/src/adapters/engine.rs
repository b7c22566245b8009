//! `clip-model`'s engine as the pipeline's embedder, loaded beside everything
//! else that happens at start.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clip_model::Bundle;
use clip_model::engine::{EngineOptions, VisionEngine};
use tokio::sync::oneshot;

use crate::pipeline::Loading;
use crate::rules::failure::Fatal;
use crate::services::{EmbedError, Embedder, LabelsOf, ModelInfo, PixelBuffer};

/// Labels that go into the keywords of an image.
const LABELS: usize = 5;

impl Embedder for VisionEngine {
    fn buffer(&self, bytes: usize) -> Result<PixelBuffer, EmbedError> {
        Ok(Box::new(VisionEngine::buffer(self, bytes)?))
    }

    fn embed(&mut self, pixels: &[u8], batch: usize) -> Result<Vec<f32>, EmbedError> {
        Ok(VisionEngine::embed(self, pixels, batch)?)
    }
}

/// What is known of a bundle's model.
fn describe(bundle: &Bundle, extract_labels: bool) -> ModelInfo {
    let manifest = bundle.manifest();
    let labels = bundle.labels().filter(|_| extract_labels).cloned();
    if extract_labels && labels.is_none() {
        tracing::warn!("EXTRACT_LABELS is on, but the bundle has no labels: no keywords are added");
    }
    ModelInfo {
        name: manifest.model.clone(),
        side: manifest.image_size as u32,
        labels: labels.map(|labels| -> Box<LabelsOf> {
            Box::new(move |vector: &[f32]| {
                let top = labels.top(vector, LABELS);
                top.into_iter().map(|(label, _)| label).collect()
            })
        }),
    }
}

/// Loads the bundle at `folder` (once it is there) on a thread of its own:
/// first what it is, then what runs it, warmed.
pub fn load(
    folder: impl Future<Output = Result<PathBuf, Fatal>> + Send + 'static,
    options: EngineOptions,
    extract_labels: bool,
) -> Loading {
    let (info_sender, info) = oneshot::channel();
    let (embedders_sender, embedders) = oneshot::channel();
    tokio::spawn(async move {
        let folder = match folder.await {
            Ok(folder) => folder,
            Err(fatal) => {
                let _ = info_sender.send(Err(fatal));
                return;
            }
        };
        tokio::task::spawn_blocking(move || match open(&folder) {
            Ok(bundle) => {
                let _ = info_sender.send(Ok(Arc::new(describe(&bundle, extract_labels))));
                let _ = embedders_sender.send(start(&bundle, &options));
            }
            Err(fatal) => {
                let _ = info_sender.send(Err(fatal));
            }
        });
    });
    Loading {
        info: Box::pin(arrival(info)),
        embedders: Box::pin(arrival(embedders)),
    }
}

/// A channel may close without a value: then the other one, or the end of the
/// task, brings the reason.
async fn arrival<T>(channel: oneshot::Receiver<T>) -> T {
    match channel.await {
        Ok(value) => value,
        Err(_) => std::future::pending().await,
    }
}

fn open(folder: &Path) -> Result<Bundle, Fatal> {
    let bundle = Bundle::open(folder).map_err(|error| Fatal::Model(error.to_string()))?;
    let manifest = bundle.manifest();
    tracing::info!(
        model = manifest.model,
        dimensions = manifest.dimensions,
        precision = %manifest.precision,
        weights = %manifest.weights,
        digest = manifest.digest(),
        "model bundle opened"
    );
    Ok(bundle)
}

fn start(bundle: &Bundle, options: &EngineOptions) -> Result<Vec<Box<dyn Embedder>>, Fatal> {
    let started = Instant::now();
    let failed = |error: clip_model::engine::EngineError| Fatal::Model(error.to_string());
    let mut engine = VisionEngine::load(bundle, options).map_err(failed)?;
    let loaded = started.elapsed();
    engine.warm_up().map_err(failed)?;
    tracing::info!(
        provider = ?options.provider,
        load_ms = loaded.as_millis() as u64,
        warm_ms = (started.elapsed() - loaded).as_millis() as u64,
        "model ready"
    );
    Ok(vec![Box::new(engine)])
}
