//! Decode: from a document to the model's pixels, on the CPU.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::download::Fetched;
use super::{Image, Shared, milliseconds, stage};
use crate::failure::{Cause, Stage, TaskError};
use crate::services::Size;

/// An image as the model takes it.
pub(super) struct Decoded {
    pub(super) image: Image,
    pub(super) pixels: Vec<u8>,
    pub(super) size: Size,
    pub(super) kind: events::ImageType,
    pub(super) version: String,
    pub(super) ready: Instant,
}

/// Buffers of pixels that are used again: all have the same length.
#[derive(Default)]
pub(super) struct Buffers(Mutex<Vec<Vec<u8>>>);

impl Buffers {
    /// Buffers kept for later; more are only needed in a burst.
    const KEPT: usize = 64;

    fn take(&self, length: usize) -> Vec<u8> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = kept.pop().unwrap_or_default();
        buffer.resize(length, 0);
        buffer
    }

    fn give(&self, buffer: Vec<u8>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < Self::KEPT {
            kept.push(buffer);
        }
    }
}

/// Shared by the decoders, which take buffers, and the batcher, which gives
/// them back.
pub(super) static BUFFERS: Buffers = Buffers(Mutex::new(Vec::new()));

/// Gives a buffer back for later.
pub(super) fn give_back(buffer: Vec<u8>) {
    BUFFERS.give(buffer);
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
            shared.stats.leaves(Stage::Decode);
            if !fetched.image.ticket.is_ours() {
                return;
            }
            let Some(model) = shared.model().await else {
                return;
            };
            match decode(&shared, fetched, model.side).await {
                Ok(decoded) => {
                    shared.stats.waits(Stage::Batch);
                    let _ = to_batch.send(decoded).await;
                }
                Err((image, error)) => image.fail(&shared, error),
            }
        }
    })
    .await;
}

async fn decode(
    shared: &Arc<Shared>,
    fetched: Fetched,
    side: u32,
) -> Result<Decoded, (Image, TaskError)> {
    let Fetched {
        mut image,
        bytes,
        kind,
        version,
        memory: document_memory,
    } = fetched;
    let needed = match shared.services.preparer.memory_needed(&bytes, kind) {
        Ok(needed) => needed,
        Err(error) => return Err((image, error)),
    };
    let decode_memory = shared.decode_memory.reserve(needed).await;
    let started = Instant::now();
    let preparer = shared.services.preparer.clone();
    let work = tokio::task::spawn_blocking(move || {
        let mut pixels = BUFFERS.take(side as usize * side as usize * 3);
        let result = preparer.prepare(&bytes, kind, side, &mut pixels);
        // Freed before anybody else may reserve what they took.
        drop(bytes);
        drop((document_memory, decode_memory));
        (pixels, result)
    });
    let joined = work.await;
    image.times.decode = milliseconds(started);
    shared.stats.did(Stage::Decode, started.elapsed());
    match joined {
        Ok((pixels, Ok(size))) => Ok(Decoded {
            image,
            pixels,
            size,
            kind,
            version,
            ready: Instant::now(),
        }),
        Ok((pixels, Err(error))) => {
            give_back(pixels);
            Err((image, error))
        }
        Err(panic) => {
            let message = format!("the decoder gave up on {}: {panic}", image.url);
            let error = TaskError::permanent(Stage::Decode, Cause::DecoderPanic, message);
            Err((image, error))
        }
    }
}
