//! The pipeline: receive → download → decode → batch → infer → store →
//! publish → acknowledge. Stages run all at once with bounded queues between
//! them; `design.md` tells who owns a message when.

mod batch;
mod begin;
mod decode;
mod desk;
mod download;
mod ending;
mod held;
mod receive;
mod store;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use events::{CloudEvent, S3Object};
use futures_util::future::BoxFuture;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use self::batch::{Presence, Traffic};
use self::ending::Ending;
use self::held::Held;
use crate::config::Settings;
use crate::metrics::Metrics;
use crate::rules::budget::Budget;
use crate::rules::failure::{Cause, Fatal, Stage, TaskError};
use crate::rules::ledger::Ticket;
use crate::services::{BATCH_MAX, Embedder, ModelInfo, QueueFacts, Services};

/// Share of the memory budget for documents that wait for a decoder; the rest
/// is for decoding. Two budgets, because whoever waits for the second holds
/// part of the first, and must not wait for somebody who waits for it.
const DOCUMENTS_SHARE: f64 = 1.0 / 3.0;

/// Kept free at the end of the stop timeout to hand back what is left.
const STOP_MARGIN: Duration = Duration::from_secs(2);

/// The model while it loads. The description comes first, so that decoding
/// starts before the model is ready.
pub struct Loading {
    pub info: BoxFuture<'static, Result<Arc<ModelInfo>, Fatal>>,
    pub embedders: BoxFuture<'static, Result<Vec<Box<dyn Embedder>>, Fatal>>,
}

/// Why a run ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Nothing was left to do for the idle time.
    Idle,
    Stopped,
}

/// What a run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub ended: Ended,
    pub images: u64,
    pub rejected: u64,
    /// Left to a larger worker.
    pub handed_over: u64,
    /// Messages handed back to the queue at the end.
    pub handed_back: usize,
}

/// What every stage shares.
struct Shared {
    settings: Settings,
    services: Services,
    metrics: Arc<Metrics>,
    model: watch::Receiver<Option<Arc<ModelInfo>>>,
    ending: Ending,
    held: Held,
    traffic: Traffic,
    documents_budget: Budget,
    decoding_budget: Budget,
}

impl Shared {
    /// What needs more than `room` bytes goes to a larger worker, where there
    /// is one; otherwise it gets all there is.
    fn check_room(&self, stage: Stage, needed: u64, room: u64) -> Result<(), TaskError> {
        if self.services.larger.is_none() || needed <= room {
            return Ok(());
        }
        let message = format!("needs {needed} bytes of memory, this worker has {room} for it");
        Err(TaskError::permanent(stage, Cause::BeyondWorker, message))
    }

    /// What is known of the model, once it is; `None` when the task ends
    /// before.
    async fn model(&self) -> Option<Arc<ModelInfo>> {
        let mut model = self.model.clone();
        tokio::select! {
            found = model.wait_for(Option::is_some) => found.ok().and_then(|found| found.clone()),
            () = self.ending.stop.cancelled() => None,
        }
    }
}

/// What an image is to become the vector of.
enum Subject {
    Event(Box<CloudEvent>),
    /// An object that S3 told of; its event is made once its type is known.
    Object(S3Object),
}

/// Milliseconds that an image spent in each stage.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    download: f64,
    decode: f64,
    batch: f64,
    infer: f64,
    store: f64,
}

/// One item of a message on its way.
struct Job {
    ticket: Ticket,
    /// The document's URL, where it is known.
    object: String,
    /// What is rejected when the message holds more than this item.
    own_body: Option<String>,
}

impl Job {
    /// Reports an error and ends the ticket with it.
    fn fail(self, shared: &Shared, error: TaskError) {
        let message = self.ticket.message();
        if error.cause == Cause::BeyondWorker {
            let (object, reason) = (&self.object, &error.message);
            tracing::info!(object, reason, "handed over to a larger worker");
            shared.metrics.handed_over();
        } else {
            self.report(shared, &error);
        }
        let body = self.own_body.unwrap_or_else(|| message.body.clone());
        let object = Some(self.object).filter(|object| !object.is_empty());
        self.ticket.fail(error, object, body);
    }

    fn report(&self, shared: &Shared, error: &TaskError) {
        let message = self.ticket.message();
        tracing::warn!(
            object = self.object,
            stage = error.stage.name(),
            cause = error.cause.name(),
            failure = error.word(),
            receive_count = message.receive_count,
            message_id = message.message_id,
            reason = error.message,
            "failed"
        );
        shared.metrics.failed(error);
        shared.ending.count_refusals(Some(error));
    }
}

/// An image on its way.
struct Image {
    job: Job,
    subject: Subject,
    times: Times,
    presence: Presence,
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}

/// Runs `work` on everything that arrives, on at most `workers` things at a
/// time. Ends when all senders are gone.
async fn stage<T, Work, Running>(mut arrivals: mpsc::Receiver<T>, workers: usize, work: Work)
where
    T: Send + 'static,
    Work: Fn(T) -> Running + Send + 'static,
    Running: Future<Output = ()> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(workers.max(1)));
    loop {
        // The slot first: what no worker can take stays in the bounded queue.
        let slot = slots.clone().acquire_owned().await;
        let Some(item) = arrivals.recv().await else {
            return;
        };
        let running = work(item);
        tokio::spawn(async move {
            running.await;
            drop(slot);
        });
    }
}

/// Waits for the first arrival, then for company, at most `linger`, for what
/// one request takes and for as many as may come. `None` when all senders are
/// gone.
async fn gather<T>(
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<Option<T>>,
    may_come: impl Fn() -> usize,
    linger: Duration,
) -> Option<Vec<T>> {
    let mut gathered = vec![poll_fn(&mut poll).await?];
    let deadline = Instant::now() + linger;
    while gathered.len() < BATCH_MAX.min(may_come()) {
        match tokio::time::timeout_at(deadline, poll_fn(&mut poll)).await {
            Ok(Some(next)) => gathered.push(next),
            Ok(None) | Err(_) => break,
        }
    }
    Some(gathered)
}

/// Runs the pipeline until `stop` is cancelled, the task is idle, or it
/// cannot go on.
pub async fn run(
    settings: Settings,
    services: Services,
    metrics: Arc<Metrics>,
    facts: BoxFuture<'static, Result<QueueFacts, Fatal>>,
    loading: Loading,
    stop: CancellationToken,
) -> Result<Summary, Fatal> {
    let (model_sender, model) = watch::channel(None);
    let (desk, desk_arrivals) = mpsc::unbounded_channel();
    let documents_bytes = (settings.memory_budget as f64 * DOCUMENTS_SHARE) as u64;
    let shared = Arc::new(Shared {
        services,
        metrics,
        model,
        ending: Ending::new(stop),
        held: Held::new(&settings, desk),
        traffic: Traffic::default(),
        documents_budget: Budget::new(documents_bytes),
        decoding_budget: Budget::new(settings.memory_budget - documents_bytes),
        settings,
    });
    let settings = &shared.settings;

    // Each queue holds what its consumer can take at once: enough to never
    // wait, little enough that a stop has little to hand back.
    let (to_download, downloads) = mpsc::channel(settings.max_messages);
    let (to_decode, decodes) = mpsc::channel(settings.decode_threads);
    let (to_batch, decoded) = mpsc::channel(settings.batch_size);
    let (to_store, stores) = mpsc::channel(2 * settings.batch_size);
    let (to_publish, publishes) = mpsc::channel(settings.stores);

    tokio::spawn(download::run(shared.clone(), downloads, to_decode));
    tokio::spawn(decode::run(shared.clone(), decodes, to_batch));
    let to_model = batch::run(shared.clone(), decoded, to_store.clone());
    tokio::spawn(store::run(shared.clone(), stores, to_publish));
    tokio::spawn(store::publish(shared.clone(), publishes));
    let background = [
        tokio::spawn(desk::run(shared.clone(), desk_arrivals)),
        tokio::spawn(desk::heartbeat(shared.clone())),
        tokio::spawn(held::adapt_limit(shared.clone())),
    ];
    tokio::spawn(load(shared.clone(), facts, loading, model_sender, to_model));
    tokio::spawn(begin::run(shared.clone(), to_download, to_store));
    let receivers = receive::spawn(&shared);

    shared.ending.stop.cancelled().await;
    let handed_back = drain(&shared, receivers).await;
    for task in background {
        task.abort();
    }
    let ended = shared.ending.reason()?;
    let (images, rejected, handed_over) = shared.metrics.totals();
    Ok(Summary {
        ended,
        images,
        rejected,
        handed_over,
        handed_back,
    })
}

/// Brings the queue's facts and the model in, all at once.
async fn load(
    shared: Arc<Shared>,
    facts: BoxFuture<'static, Result<QueueFacts, Fatal>>,
    loading: Loading,
    model_sender: watch::Sender<Option<Arc<ModelInfo>>>,
    to_model: batch::Models,
) {
    let facts = async {
        match facts.await {
            Ok(facts) => {
                let _ = shared.held.facts.set(facts);
            }
            Err(fatal) => shared.ending.end_with(fatal),
        }
    };
    let info = async {
        match loading.info.await {
            Ok(info) => {
                let _ = model_sender.send(Some(info));
            }
            Err(fatal) => shared.ending.end_with(fatal),
        }
    };
    let embedders = async {
        match loading.embedders.await {
            Ok(embedders) => {
                if let Some(model) = shared.model().await {
                    to_model.start(&shared, model.side, embedders);
                }
            }
            Err(fatal) => shared.ending.end_with(fatal),
        }
    };
    tokio::join!(facts, info, embedders);
}

/// Ends the run: what has not reached the model goes back at once, so that
/// another task can take it; what has is finished, if it can be in time.
/// Answers how many messages were handed back.
async fn drain(shared: &Arc<Shared>, receivers: Vec<tokio::task::JoinHandle<()>>) -> usize {
    let margin = STOP_MARGIN.min(shared.settings.stop_timeout / 4);
    let deadline = Instant::now() + shared.settings.stop_timeout - margin;
    let is_fatal = shared.ending.is_fatal();
    // The receivers first: one that still polls would be given at once what
    // is handed back here.
    for receiver in receivers {
        let _ = tokio::time::timeout_at(deadline, receiver).await;
    }
    shared.ending.receivers_ended.cancel();
    let mut handed_back = desk::hand_back(shared, shared.held.ledger.give_up(is_fatal)).await;
    let _ = tokio::time::timeout_at(deadline, shared.held.ledger.wait_until_empty()).await;
    handed_back += desk::hand_back(shared, shared.held.ledger.give_up(true)).await;
    if handed_back > 0 {
        tracing::info!(messages = handed_back, "handed back to the queue");
    }
    handed_back
}
