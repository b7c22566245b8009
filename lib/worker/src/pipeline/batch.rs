//! Batch and infer: images gather in front of the model, which runs on
//! threads of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::decode::{Decoded, give_back};
use super::store::{Embedded, ToStore};
use super::{Shared, milliseconds};
use crate::rules::batching::{Decision, View, decide};
use crate::rules::failure::{Cause, Fatal, Stage, TaskError};
use crate::services::{EmbedError, Embedder, PixelBuffer};

/// Runs that fail in a row, after which the device or the model is broken.
const MAX_FAILED_RUNS: usize = 3;

/// Buffers of pixels for each model: one that it reads, one that is filled or
/// ready.
const BUFFERS_PER_MODEL: usize = 2;

/// What the batching rule looks at.
#[derive(Default)]
pub(super) struct Traffic {
    /// Images on their way to the batcher.
    upstream: AtomicUsize,
    /// Batches at the model or in front of it.
    at_model: AtomicUsize,
    /// Models that run side by side; zero until they are loaded.
    models: AtomicUsize,
    /// Something of this changed.
    news: Notify,
}

/// Counts an image as present while it lives, and as upstream of the batcher
/// until it gets there.
pub(super) struct Presence {
    shared: Arc<Shared>,
    is_upstream: bool,
}

impl Presence {
    pub(super) fn new(shared: &Arc<Shared>) -> Self {
        shared.metrics.image_enters();
        shared.traffic.upstream.fetch_add(1, Ordering::AcqRel);
        Self {
            shared: shared.clone(),
            is_upstream: true,
        }
    }

    fn reaches_batch(&mut self) {
        let traffic = &self.shared.traffic;
        if std::mem::take(&mut self.is_upstream)
            && traffic.upstream.fetch_sub(1, Ordering::AcqRel) == 1
        {
            traffic.news.notify_one();
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.reaches_batch();
        self.shared.metrics.image_leaves();
    }
}

/// What goes to the model at once.
struct Batch {
    images: Vec<Decoded>,
    /// The images' pixels side by side, and room for more.
    pixels: PixelBuffer,
    each: usize,
}

impl Batch {
    fn pixels(&self) -> &[u8] {
        &self.pixels[..self.images.len() * self.each]
    }
}

/// The models' end of the batches, until they are loaded.
pub(super) struct Models {
    batches: mpsc::Receiver<Batch>,
    empty: mpsc::UnboundedSender<PixelBuffer>,
    to_store: mpsc::Sender<ToStore>,
}

pub(super) fn run(
    shared: Arc<Shared>,
    decoded: mpsc::Receiver<Decoded>,
    to_store: mpsc::Sender<ToStore>,
) -> Models {
    // Room for one: the next batch is ready while this one runs, and no more.
    let (to_model, batches) = mpsc::channel(1);
    let (empty, buffers) = mpsc::unbounded_channel();
    tokio::spawn(gather(shared, decoded, buffers, to_model));
    Models {
        batches,
        empty,
        to_store,
    }
}

async fn gather(
    shared: Arc<Shared>,
    mut decoded: mpsc::Receiver<Decoded>,
    mut buffers: mpsc::UnboundedReceiver<PixelBuffer>,
    to_model: mpsc::Sender<Batch>,
) {
    let capacity = shared.settings.batch_size;
    let mut images: Vec<Decoded> = Vec::with_capacity(capacity);
    loop {
        let models = shared.traffic.models.load(Ordering::Acquire);
        let view = View {
            filled: images.len(),
            capacity,
            upstream: shared.traffic.upstream.load(Ordering::Acquire),
            model_is_idle: shared.traffic.at_model.load(Ordering::Acquire) < models,
            oldest_waits: images
                .first()
                .map_or(Duration::ZERO, |oldest| oldest.ready.elapsed()),
            patience: shared.settings.batch_wait,
        };
        match decide(view) {
            Decision::Send => {
                let full = std::mem::replace(&mut images, Vec::with_capacity(capacity));
                shared.traffic.at_model.fetch_add(1, Ordering::AcqRel);
                // Without models there are no buffers: the first batch waits here.
                let Some(buffer) = buffers.recv().await else {
                    return;
                };
                if to_model.send(batch(full, buffer)).await.is_err() {
                    // The models are gone; so is the task.
                    return;
                }
            }
            Decision::Wait(time) => {
                let timer = async {
                    match time {
                        Some(time) => tokio::time::sleep(time).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    arrival = decoded.recv() => match arrival {
                        Some(mut arrival) => {
                            shared.metrics.leaves(Stage::Batch);
                            arrival.image.presence.reaches_batch();
                            if arrival.image.job.ticket.is_ours() {
                                images.push(arrival);
                            }
                        }
                        None if images.is_empty() => return,
                        None => {
                            // Nothing comes any more: upstream is empty, so the
                            // rule sends the rest as soon as a model is free.
                            shared.traffic.news.notified().await;
                        }
                    },
                    () = shared.traffic.news.notified() => {}
                    () = timer => {}
                }
            }
        }
    }
}

fn batch(mut images: Vec<Decoded>, mut pixels: PixelBuffer) -> Batch {
    let each = images.first().map_or(0, |image| image.pixels.len());
    for (image, place) in images.iter_mut().zip(pixels.chunks_exact_mut(each.max(1))) {
        let own = std::mem::take(&mut image.pixels);
        place.copy_from_slice(&own);
        give_back(own);
    }
    Batch {
        images,
        pixels,
        each,
    }
}

impl Models {
    /// Starts a thread per embedder. They share the batches, and end when the
    /// batcher does.
    pub(super) fn start(self, shared: &Arc<Shared>, side: u32, embedders: Vec<Box<dyn Embedder>>) {
        let bytes = shared.settings.batch_size * side as usize * side as usize * 3;
        for embedder in &embedders {
            for _ in 0..BUFFERS_PER_MODEL {
                match embedder.buffer(bytes) {
                    Ok(buffer) => {
                        let _ = self.empty.send(buffer);
                    }
                    Err(reason) => {
                        let message = format!("no memory for the model's pixels: {reason}");
                        shared.ending.end_with(Fatal::Model(message));
                        return;
                    }
                }
            }
        }
        let batches = Arc::new(Mutex::new(self.batches));
        let failed_runs = Arc::new(AtomicUsize::new(0));
        let count = embedders.len();
        for (index, embedder) in embedders.into_iter().enumerate() {
            let mut runner = Runner {
                shared: shared.clone(),
                embedder,
                failed_runs: failed_runs.clone(),
                empty: self.empty.clone(),
                to_store: self.to_store.clone(),
            };
            let batches = batches.clone();
            let thread = std::thread::Builder::new().name(format!("inference-{index}"));
            let started = thread.spawn(move || {
                loop {
                    let next = batches
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .blocking_recv();
                    match next {
                        Some(batch) => runner.run(batch),
                        None => return,
                    }
                }
            });
            if let Err(error) = started {
                let message = format!("cannot start a thread for the model: {error}");
                shared.ending.end_with(Fatal::Model(message));
                return;
            }
        }
        shared.traffic.models.store(count, Ordering::Release);
        shared.traffic.news.notify_one();
    }
}

/// From here on a stop finishes the images; those that it has handed back
/// already, or whose lease is lost, leave the batch.
fn commit(batch: Batch) -> Batch {
    let Batch {
        images,
        mut pixels,
        each,
    } = batch;
    let mut kept = Vec::with_capacity(images.len());
    for (position, decoded) in images.into_iter().enumerate() {
        if decoded.image.job.ticket.commit() {
            // Only where one before it left does an image move.
            if kept.len() < position {
                let from = position * each;
                pixels.copy_within(from..from + each, kept.len() * each);
            }
            kept.push(decoded);
        }
    }
    Batch {
        images: kept,
        pixels,
        each,
    }
}

/// One model on its thread.
struct Runner {
    shared: Arc<Shared>,
    embedder: Box<dyn Embedder>,
    failed_runs: Arc<AtomicUsize>,
    empty: mpsc::UnboundedSender<PixelBuffer>,
    to_store: mpsc::Sender<ToStore>,
}

impl Runner {
    fn run(&mut self, batch: Batch) {
        let batch = commit(batch);
        let started = Instant::now();
        let result = if batch.images.is_empty() {
            Ok(Vec::new())
        } else {
            let result = self.embed(batch.pixels(), batch.images.len());
            self.shared.metrics.did(Stage::Infer, started.elapsed());
            self.shared.metrics.batch(batch.images.len());
            result
        };
        // Told before the results go on: the next batch must not wait for a
        // full queue behind this one.
        self.shared.traffic.at_model.fetch_sub(1, Ordering::AcqRel);
        self.shared.traffic.news.notify_one();
        match result {
            Ok(values) => {
                // Nor must it wait for its memory.
                self.reuse(batch.pixels);
                if batch.images.is_empty() {
                    return;
                }
                self.failed_runs.store(0, Ordering::Relaxed);
                self.hand_on(batch.images, &values, started);
            }
            Err(reason) if batch.images.len() > 1 => {
                tracing::warn!(
                    images = batch.images.len(),
                    %reason,
                    "a batch failed, trying its images one by one"
                );
                self.run_singly(batch);
            }
            Err(reason) => {
                self.reuse(batch.pixels);
                self.fail(batch.images, &reason);
            }
        }
    }

    fn run_singly(&mut self, batch: Batch) {
        let Batch {
            images,
            pixels,
            each,
        } = batch;
        for (image, pixels) in images.into_iter().zip(pixels.chunks_exact(each)) {
            let started = Instant::now();
            match self.embed(pixels, 1) {
                Ok(values) => {
                    self.failed_runs.store(0, Ordering::Relaxed);
                    self.hand_on(vec![image], &values, started);
                }
                Err(reason) => self.fail(vec![image], &reason),
            }
        }
        self.reuse(pixels);
    }

    /// Lets the batcher fill the buffer again; one that is gone needs none.
    fn reuse(&self, buffer: PixelBuffer) {
        let _ = self.empty.send(buffer);
    }

    /// Runs the model; a panic in it is a failure of this run.
    fn embed(&mut self, pixels: &[u8], images: usize) -> Result<Vec<f32>, EmbedError> {
        let run = catch_unwind(AssertUnwindSafe(|| self.embedder.embed(pixels, images)));
        let values = match run {
            Ok(result) => result?,
            Err(_) => return Err("the model panicked".into()),
        };
        let dimensions = values.len() / images.max(1);
        if dimensions == 0 || values.len() != dimensions * images {
            return Err(format!("{} values for {images} images", values.len()).into());
        }
        Ok(values)
    }

    fn hand_on(&self, images: Vec<Decoded>, values: &[f32], started: Instant) {
        let dimensions = values.len() / images.len();
        let infer = milliseconds(started);
        for (decoded, vector) in images.into_iter().zip(values.chunks_exact(dimensions)) {
            let mut image = decoded.image;
            image.times.batch = (started - decoded.ready).as_secs_f64() * 1e3;
            image.times.infer = infer;
            self.shared.metrics.waits(Stage::Store);
            let embedded = Embedded {
                image,
                vector: vector.to_vec(),
                about: decoded.about,
            };
            // A closed queue drops the image, whose ticket then returns it.
            let _ = self
                .to_store
                .blocking_send(ToStore::Vector(Box::new(embedded)));
        }
    }

    fn fail(&self, images: Vec<Decoded>, reason: &EmbedError) {
        let in_a_row = self.failed_runs.fetch_add(1, Ordering::Relaxed) + 1;
        for decoded in images {
            let message = format!("the model failed on {}: {reason}", decoded.image.job.object);
            let error = TaskError::transient(Stage::Infer, Cause::Engine, message);
            decoded.image.job.fail(&self.shared, error);
        }
        if in_a_row == MAX_FAILED_RUNS {
            let message = format!("{in_a_row} runs failed in a row: {reason}");
            self.shared.ending.end_with(Fatal::Inference(message));
        }
    }
}
