//! Decode: from a document to the model's pixels, on the CPU.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::download::{Document, Fetched};
use super::{Image, Shared, milliseconds, stage};
use crate::rules::failure::{Cause, Stage, TaskError};
use crate::services::Size;
use events::ImageType;

/// What is known of a document once it is decoded.
pub(super) struct About {
    pub(super) size: Size,
    pub(super) kind: ImageType,
    pub(super) version: String,
}

/// An image as the model takes it.
pub(super) struct Decoded {
    pub(super) image: Image,
    pub(super) pixels: Vec<u8>,
    pub(super) about: About,
    pub(super) ready: Instant,
}

/// Buffers of pixels that are used again: all have the same length. The
/// decoders take them, the batcher gives them back.
static BUFFERS: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Buffers kept for later; more are only needed in a burst.
const BUFFERS_KEPT: usize = 64;

fn take_buffer(length: usize) -> Vec<u8> {
    let kept = BUFFERS.lock().unwrap_or_else(PoisonError::into_inner).pop();
    let mut buffer = kept.unwrap_or_default();
    buffer.resize(length, 0);
    buffer
}

pub(super) fn give_back(buffer: Vec<u8>) {
    let mut kept = BUFFERS.lock().unwrap_or_else(PoisonError::into_inner);
    if kept.len() < BUFFERS_KEPT {
        kept.push(buffer);
    }
}

pub(super) async fn run(
    shared: Arc<Shared>,
    documents: mpsc::Receiver<Fetched>,
    to_batch: mpsc::Sender<Decoded>,
) {
    let workers = shared.settings.decode_threads;
    stage(documents, workers, move |fetched: Fetched| {
        let (shared, to_batch) = (shared.clone(), to_batch.clone());
        async move {
            shared.metrics.leaves(Stage::Decode);
            if !fetched.image.job.ticket.is_ours() {
                return;
            }
            let Some(model) = shared.model().await else {
                return;
            };
            let Fetched {
                mut image,
                document,
            } = fetched;
            match decode(&shared, &mut image, document, model.side).await {
                Ok((pixels, about)) => {
                    shared.metrics.waits(Stage::Batch);
                    let ready = Instant::now();
                    let decoded = Decoded {
                        image,
                        pixels,
                        about,
                        ready,
                    };
                    let _ = to_batch.send(decoded).await;
                }
                Err(error) => image.job.fail(&shared, error),
            }
        }
    })
    .await;
}

async fn decode(
    shared: &Shared,
    image: &mut Image,
    document: Document,
    side: u32,
) -> Result<(Vec<u8>, About), TaskError> {
    let Document {
        bytes,
        kind,
        version,
        memory: document_memory,
    } = document;
    let preparer = shared.services.preparer.clone();
    let needed = preparer.memory_needed(&bytes, kind)?;
    shared.check_room(Stage::Decode, needed, shared.decoding_budget.total())?;
    let decoding_memory = shared.decoding_budget.reserve(needed).await;
    let started = Instant::now();
    let work = tokio::task::spawn_blocking(move || {
        let mut pixels = take_buffer(side as usize * side as usize * 3);
        let result = preparer.prepare(&bytes, kind, side, &mut pixels);
        // Freed before anybody else may reserve what they took.
        drop(bytes);
        drop((document_memory, decoding_memory));
        (pixels, result)
    });
    let joined = work.await;
    image.times.decode = milliseconds(started);
    shared.metrics.did(Stage::Decode, started.elapsed());
    match joined {
        Ok((pixels, Ok(size))) => Ok((
            pixels,
            About {
                size,
                kind,
                version,
            },
        )),
        Ok((pixels, Err(mut error))) => {
            give_back(pixels);
            if error.cause == Cause::Timeout && shared.services.larger.is_some() {
                error.cause = Cause::BeyondWorker;
            }
            Err(error)
        }
        Err(panic) => {
            let message = format!("the decoder gave up on {}: {panic}", image.job.object);
            let (stage, cause) = (Stage::Decode, Cause::DecoderPanic);
            Err(TaskError::permanent(stage, cause, message))
        }
    }
}
