//! The worker, for as long as one invocation lasts.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use aws_config::SdkConfig;
use aws_lambda_events::sqs::{SqsBatchResponse, SqsEvent};
use delivery::DeadLetters;
use lambda_runtime::LambdaEvent;
use platform::metrics::{MetricLine, Unit};
use tokio::sync::OnceCell;
use worker::config::Config;
use worker::services::{EmbedError, Embedder, ModelInfo, PixelBuffer, Queue, Services};
use worker::{Fatal, Loading, SqsQueue, Summary};

use crate::invocation::Invocation;

/// Share of an invocation's time for what the model has begun with, and for
/// giving back the rest.
const END_SHARE: u32 = 3;

/// Kept free for the answer itself.
const ANSWER_MARGIN: Duration = Duration::from_secs(1);

/// Memory for the activations of a batch and for the program beside documents
/// and decoders: an estimate for ViT-B/32 at ten images, not measured.
const RESERVED_BYTES: u64 = 128 << 20;

/// Less than this is no room for photos (a JPEG of 12 megapixels takes 40 MB).
const LEAST_BUDGET_BYTES: u64 = 64 << 20;

/// The loaded model, and the memory that it leaves.
struct Model {
    info: Arc<ModelInfo>,
    embedder: Lent,
    memory_budget: u64,
}

/// The one embedder, for a run at a time.
#[derive(Clone)]
struct Lent(Arc<Mutex<Box<dyn Embedder>>>);

impl Embedder for Lent {
    fn buffer(&self, bytes: usize) -> Result<PixelBuffer, EmbedError> {
        let embedder = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        embedder.buffer(bytes)
    }

    fn embed(&mut self, pixels: &[u8], batch: usize) -> Result<Vec<f32>, EmbedError> {
        let mut embedder = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        embedder.embed(pixels, batch)
    }
}

pub struct Lane {
    config: Config,
    sdk: SdkConfig,
    services: Services,
    sqs: Arc<dyn Queue>,
    /// Bytes of memory that the function has, where Lambda says it.
    memory: Option<u64>,
    model: OnceCell<Model>,
}

impl Lane {
    /// A lane as `config` says, in a function of so many MiB of memory.
    pub fn new(mut config: Config, sdk: SdkConfig, memory_mib: Option<u64>) -> Result<Self, Fatal> {
        let settings = &mut config.settings;
        settings.program = "express";
        settings.idle_exit = Duration::ZERO;
        settings.retry.cap = settings.visibility / 2;
        let sqs = Arc::new(SqsQueue::new(&sdk, vec![config.input_queue_url.clone()]));
        let mut services = worker::connect(&config, &sdk, sqs.clone())?;
        let Some(gpu_queue) = &config.gpu_queue_url else {
            let problem = "GPU_QUEUE_URL is not set: where images go that are too large here";
            return Err(Fatal::Configuration(problem.to_owned()));
        };
        services.larger = Some(Arc::new(DeadLetters::new(&sdk, gpu_queue)));
        Ok(Self {
            config,
            sdk,
            services,
            sqs,
            memory: memory_mib.map(|mib| mib << 20),
            model: OnceCell::new(),
        })
    }

    /// Loads the model, unless it is there. A failure is tried again by the
    /// next invocation.
    pub async fn load(&self) -> Result<(), Fatal> {
        self.model().await.map(|_| ())
    }

    async fn model(&self) -> Result<&Model, Fatal> {
        let load = || async {
            let loading = worker::load(&self.config, &self.sdk);
            let info = loading.info.await?;
            let embedder = loading.embedders.await?.remove(0);
            let memory_budget = match self.memory {
                Some(memory) => budget(memory, resident_bytes())?,
                None => self.config.settings.memory_budget,
            };
            tracing::info!(memory_budget, "ready");
            Ok(Model {
                info,
                embedder: Lent(Arc::new(Mutex::new(embedder))),
                memory_budget,
            })
        };
        self.model.get_or_try_init(load).await
    }

    /// Works on the records of an event; answers those that are not done.
    pub async fn handle(
        &self,
        event: LambdaEvent<SqsEvent>,
    ) -> Result<SqsBatchResponse, lambda_runtime::Error> {
        let left = event.context.deadline().duration_since(SystemTime::now());
        let left = left.unwrap_or_default().saturating_sub(ANSWER_MARGIN);
        let for_the_end = left / END_SHARE;
        let records = event.payload.records.len();
        let visibility = self.config.settings.visibility;
        let invocation = Arc::new(Invocation::new(event.payload, self.sqs.clone(), visibility));
        let stop = invocation.ended();
        let watch = tokio::spawn({
            let stop = stop.clone();
            async move {
                tokio::time::sleep(left - for_the_end).await;
                stop.cancel();
            }
        });
        let working = async {
            let model = tokio::select! {
                model = self.model() => model?,
                () = stop.cancelled() => {
                    invocation.give_up().await;
                    return Ok(None);
                }
            };
            let started = Instant::now();
            let run = self.run(model, invocation.clone(), for_the_end);
            Ok(Some((run.await?, started.elapsed())))
        };
        let result: Result<Option<(Summary, Duration)>, Fatal> = working.await;
        watch.abort();
        let answer = invocation.answer();
        match result {
            Ok(Some((summary, time))) => self.emit(summary, time),
            Ok(None) => tracing::warn!(records, "no time left for them, given back"),
            Err(fatal) => {
                tracing::error!(%fatal, records, "cannot work on them, given back");
                if answer.batch_item_failures.len() == records {
                    invocation.give_up().await;
                    return Err(fatal.into());
                }
            }
        }
        Ok(answer)
    }

    async fn run(
        &self,
        model: &Model,
        invocation: Arc<Invocation>,
        stop_timeout: Duration,
    ) -> Result<Summary, Fatal> {
        let mut settings = self.config.settings.clone();
        settings.memory_budget = model.memory_budget;
        settings.stop_timeout = stop_timeout;
        let stop = invocation.ended();
        let services = Services {
            queue: invocation,
            ..self.services.clone()
        };
        let info = model.info.clone();
        let embedder: Box<dyn Embedder> = Box::new(model.embedder.clone());
        let loading = Loading {
            info: Box::pin(async { Ok(info) }),
            embedders: Box::pin(async { Ok(vec![embedder]) }),
        };
        // What the queue does after the last delivery is no rejection.
        let facts = Box::pin(async { Ok(Default::default()) });
        let metrics = worker::metrics(&self.config);
        worker::run_pipeline(settings, services, metrics, facts, loading, stop).await
    }

    fn emit(&self, summary: Summary, time: Duration) {
        let mut line = MetricLine::new(&self.config.metrics_namespace)
            .dimension("QueueName", self.config.queue_name())
            .dimension("Lane", "express")
            .metric("Images", Unit::Count, summary.images as f64)
            .metric("Rejected", Unit::Count, summary.rejected as f64)
            .metric("HandedOver", Unit::Count, summary.handed_over as f64);
        // A lone image pays for the network alone; what the planner asks is
        // what many cost.
        if summary.images >= self.config.settings.batch_size as u64 {
            let each = time.as_secs_f64() / summary.images as f64;
            line = line.metric("SecondsPerImage", Unit::Seconds, each);
        }
        line.emit();
    }
}

/// What the function's memory leaves for documents and decoders.
fn budget(memory: u64, resident: u64) -> Result<u64, Fatal> {
    let left = memory.saturating_sub(resident + RESERVED_BYTES);
    if left < LEAST_BUDGET_BYTES {
        return Err(Fatal::Configuration(format!(
            "the function has {} MB of memory, {} MB of which the loaded model takes: give it {} MB \
             or more",
            memory >> 20,
            resident >> 20,
            (resident + RESERVED_BYTES + LEAST_BUDGET_BYTES) >> 20
        )));
    }
    Ok(left)
}

/// Memory that this process has, in bytes; 0 where it cannot be told.
fn resident_bytes() -> u64 {
    const PAGE_BYTES: u64 = 4096;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.unwrap_or(0u64) * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_what_the_model_leaves_and_too_little_is_an_error_that_says_how_much() {
        assert_eq!(
            budget(1769 << 20, 600 << 20).unwrap(),
            (1769 - 600 - 128) << 20
        );
        let error = budget(700 << 20, 600 << 20).unwrap_err().to_string();
        assert!(error.contains("792 MB or more"), "{error}");
        assert!(resident_bytes() > 1 << 20);
    }
}
