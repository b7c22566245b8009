//! The pipeline: receive → download → decode → batch → infer → store →
//! publish → acknowledge. Stages run all at once with bounded queues between
//! them; `design.md` tells who owns a message when.

mod batch;
mod decode;
mod desk;
mod download;
mod receive;
mod store;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use delivery::Backoff;
use events::{CloudEvent, S3Object};
use futures_util::future::BoxFuture;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::failure::{Cause, Failure, Fatal, Stage, TaskError, is_access_problem};
use crate::holding::{self, Gate};
use crate::ledger::{Ledger, Message, Ticket};
use crate::memory::Budget;
use crate::services::{Embedder, ModelInfo, Services};
use crate::sqs::QueueFacts;
use crate::stats::Stats;

/// Share of the memory budget for documents that wait for a decoder; the rest
/// is for decoding. Two budgets, because whoever waits for the second holds
/// part of the first, and must not wait for somebody who waits for it.
const DOCUMENTS_SHARE: f64 = 1.0 / 3.0;

/// Refusals of access in a row, with no success between them, after which the
/// task ends: its role is wrong, not the images.
const MAX_ACCESS_REFUSALS: usize = 20;

/// Kept free at the end of the stop timeout to hand back what is left.
const STOP_MARGIN: Duration = Duration::from_secs(2);

/// Batches of messages held before the rate is known: enough for a model that
/// is as fast as it gets behind a storage that answers after 100 ms.
const BATCHES_HELD_AT_FIRST: usize = 8;

/// How often the number of messages held is set anew.
const LIMIT_INTERVAL: Duration = Duration::from_secs(1);

/// How the pipeline runs.
#[derive(Clone, Debug)]
pub struct Settings {
    pub batch_size: usize,
    pub batch_wait: Duration,
    pub decode_threads: usize,
    pub downloads: usize,
    pub stores: usize,
    /// Publish requests at the same time.
    pub publishes: usize,
    /// Receive requests at the same time, once the queue is deep.
    pub receivers: usize,
    pub max_messages: usize,
    pub memory_budget: u64,
    pub max_image_bytes: u64,
    pub visibility: Duration,
    pub download_timeout: Duration,
    pub idle_exit: Option<Duration>,
    pub stop_timeout: Duration,
    pub metrics_interval: Duration,
    pub cache_prefix: String,
    pub image_lines_per_second: u32,
    /// When a message that failed for a passing reason comes back.
    pub retry: Backoff,
}

/// When a message that failed for a passing reason comes back: with the usual
/// five deliveries an outage of about two and a half minutes costs nothing.
pub const RETRY: Backoff = Backoff {
    base: Duration::from_secs(10),
    cap: Duration::from_secs(900),
};

/// The model while it loads. The description comes first, so that decoding
/// starts before the model is ready.
pub struct Loading {
    /// What the model is.
    pub info: BoxFuture<'static, Result<ModelInfo, Fatal>>,
    /// What runs it.
    pub embedders: BoxFuture<'static, Result<Vec<Box<dyn Embedder>>, Fatal>>,
}

/// Why a run ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Nothing was left to do for the idle time.
    Idle,
    /// It was asked to stop.
    Stopped,
}

/// What a run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Why it ended.
    pub ended: Ended,
    /// Images stored and published.
    pub images: u64,
    /// Images and messages rejected.
    pub rejected: u64,
    /// Messages handed back to the queue at the end.
    pub handed_back: usize,
}

/// What every stage shares.
struct Shared {
    settings: Settings,
    services: Services,
    stats: Arc<Stats>,
    ledger: Ledger,
    gate: Gate,
    /// Cancelled when the task stops, for whatever reason.
    stop: CancellationToken,
    /// Cancelled when no receiver polls any more.
    receivers_ended: CancellationToken,
    /// Cancelled by the idle rule, so that the reason is known.
    is_idle: CancellationToken,
    fatal: OnceLock<Fatal>,
    facts: OnceLock<QueueFacts>,
    model: watch::Receiver<Option<Arc<ModelInfo>>>,
    documents_memory: Budget,
    decode_memory: Budget,
    /// Images on their way to the batcher.
    upstream: AtomicUsize,
    /// Batches at the model or in front of it.
    batches_at_model: AtomicUsize,
    /// Models that run side by side; zero until they are loaded.
    models: AtomicUsize,
    /// Something changed that the batching rule looks at.
    batch_news: Notify,
    desk: mpsc::UnboundedSender<Arc<Message>>,
    last_active: Mutex<Instant>,
    access_refusals: AtomicUsize,
}

impl Shared {
    /// Ends the task with an error.
    fn end_with(&self, fatal: Fatal) {
        tracing::error!(exit_code = fatal.exit_code(), %fatal, "the task cannot go on");
        let _ = self.fatal.set(fatal);
        self.stop.cancel();
    }

    /// What is known of the model, once it is; `None` when the task ends
    /// before.
    async fn model(&self) -> Option<Arc<ModelInfo>> {
        let mut model = self.model.clone();
        tokio::select! {
            found = model.wait_for(Option::is_some) => found.ok().and_then(|found| found.clone()),
            () = self.stop.cancelled() => None,
        }
    }

    fn touch(&self) {
        let mut last = self
            .last_active
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last = Instant::now();
    }

    fn idle_for(&self) -> Duration {
        self.last_active
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .elapsed()
    }

    /// Counts refusals of access by the cache bucket and the outputs.
    fn note_access(&self, error: Option<&TaskError>) {
        let is_refusal = error.is_some_and(|error| {
            matches!(error.stage, Stage::Store | Stage::Publish)
                && error.cause == Cause::AccessDenied
        });
        if !is_refusal {
            if error.is_none() {
                self.access_refusals.store(0, Ordering::Relaxed);
            }
            return;
        }
        let in_a_row = self.access_refusals.fetch_add(1, Ordering::Relaxed) + 1;
        if in_a_row == MAX_ACCESS_REFUSALS {
            let reason = error.map(ToString::to_string).unwrap_or_default();
            self.end_with(Fatal::Access(format!(
                "refused {in_a_row} times in a row, check the task's role: {reason}"
            )));
        }
    }

    fn enter_image(self: &Arc<Self>) -> Presence {
        self.stats.image_enters();
        self.upstream.fetch_add(1, Ordering::AcqRel);
        Presence {
            shared: self.clone(),
            is_upstream: true,
        }
    }
}

/// Counts an image as present while it lives, and as upstream of the batcher
/// until it gets there.
struct Presence {
    shared: Arc<Shared>,
    is_upstream: bool,
}

impl Presence {
    fn reaches_batch(&mut self) {
        if !self.is_upstream {
            return;
        }
        self.is_upstream = false;
        if self.shared.upstream.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.shared.batch_news.notify_one();
        }
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.reaches_batch();
        self.shared.stats.image_leaves();
    }
}

/// What an image is to become the vector of.
enum Subject {
    /// The event of another middleware.
    Event(Box<CloudEvent>),
    /// An object that S3 told of; its event is made once its type is known.
    Object(S3Object),
}

impl Subject {
    fn url(&self) -> String {
        match self {
            Subject::Event(event) => event.data.document.url.clone(),
            Subject::Object(object) => object.url.to_string(),
        }
    }
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

/// An image on its way.
struct Image {
    ticket: Ticket,
    subject: Subject,
    url: String,
    /// What is rejected when the message holds more than this image.
    own_body: Option<String>,
    times: Times,
    presence: Presence,
}

impl Image {
    /// Ends the image's way with an error.
    fn fail(self, shared: &Shared, error: TaskError) {
        let Image {
            ticket,
            url,
            own_body,
            ..
        } = self;
        fail(shared, ticket, error, Some(url), own_body);
    }
}

/// Reports an error and ends the ticket with it.
fn fail(
    shared: &Shared,
    ticket: Ticket,
    error: TaskError,
    object: Option<String>,
    own_body: Option<String>,
) {
    let word = match error.failure {
        Failure::Permanent => "permanent",
        Failure::Transient => "transient",
    };
    tracing::warn!(
        object = object.as_deref().unwrap_or_default(),
        stage = error.stage.name(),
        cause = error.cause.name(),
        failure = word,
        receive_count = ticket.message().receive_count,
        message_id = ticket.message().message_id,
        reason = error.message,
        "failed"
    );
    shared.stats.failed(&error);
    shared.note_access(Some(&error));
    let body = own_body.unwrap_or_else(|| ticket.message().body.clone());
    ticket.fail(error, object, body);
}

/// The cause of a failed call, from its text.
fn cause_of_call(message: &str) -> Cause {
    if is_access_problem(message) {
        Cause::AccessDenied
    } else {
        Cause::Unavailable
    }
}

/// Milliseconds since `since`.
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

/// Waits for the first arrival, then for company, at most `linger` and at
/// most `max` in all. `None` when all senders are gone.
async fn gather<T>(
    arrivals: &mut mpsc::Receiver<T>,
    max: usize,
    linger: Duration,
) -> Option<Vec<T>> {
    let mut gathered = vec![arrivals.recv().await?];
    let deadline = Instant::now() + linger;
    while gathered.len() < max {
        match tokio::time::timeout_at(deadline, arrivals.recv()).await {
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
    stats: Arc<Stats>,
    facts: BoxFuture<'static, Result<QueueFacts, Fatal>>,
    loading: Loading,
    stop: CancellationToken,
) -> Result<Summary, Fatal> {
    let (model_sender, model) = watch::channel(None);
    let (desk, desk_arrivals) = mpsc::unbounded_channel();
    let documents_bytes = (settings.memory_budget as f64 * DOCUMENTS_SHARE) as u64;
    let first_limit = BATCHES_HELD_AT_FIRST * settings.batch_size;
    let shared = Arc::new(Shared {
        services,
        stats,
        ledger: Ledger::new(),
        gate: Gate::new(first_limit.min(settings.max_messages)),
        stop,
        receivers_ended: CancellationToken::new(),
        is_idle: CancellationToken::new(),
        fatal: OnceLock::new(),
        facts: OnceLock::new(),
        model,
        documents_memory: Budget::new(documents_bytes),
        decode_memory: Budget::new(settings.memory_budget - documents_bytes),
        upstream: AtomicUsize::new(0),
        batches_at_model: AtomicUsize::new(0),
        models: AtomicUsize::new(0),
        batch_news: Notify::new(),
        desk,
        last_active: Mutex::new(Instant::now()),
        access_refusals: AtomicUsize::new(0),
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
    tokio::spawn(desk::run(shared.clone(), desk_arrivals));
    let heartbeat = tokio::spawn(desk::heartbeat(shared.clone()));
    let metrics = tokio::spawn(report(shared.clone()));
    let limit = tokio::spawn(set_limit(shared.clone()));
    tokio::spawn(load(shared.clone(), facts, loading, model_sender, to_model));
    let receivers: Vec<_> = receive::spawn(&shared, &to_download, &to_store);
    drop((to_download, to_store));

    shared.stop.cancelled().await;
    let handed_back = drain(&shared, receivers).await;
    heartbeat.abort();
    metrics.abort();
    limit.abort();
    shared.stats.emit();
    if let Some(fatal) = shared.fatal.get() {
        return Err(fatal.clone());
    }
    let (images, rejected) = shared.stats.totals();
    Ok(Summary {
        ended: if shared.is_idle.is_cancelled() {
            Ended::Idle
        } else {
            Ended::Stopped
        },
        images,
        rejected,
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
                let _ = shared.facts.set(facts);
            }
            Err(fatal) => shared.end_with(fatal),
        }
    };
    let info = async {
        match loading.info.await {
            Ok(info) => {
                let _ = model_sender.send(Some(Arc::new(info)));
            }
            Err(fatal) => shared.end_with(fatal),
        }
    };
    let embedders = async {
        match loading.embedders.await {
            Ok(embedders) => {
                if let Some(model) = shared.model().await {
                    to_model.start(&shared, model.side, embedders);
                }
            }
            Err(fatal) => shared.end_with(fatal),
        }
    };
    tokio::join!(facts, info, embedders);
}

/// Writes the metrics every interval.
async fn report(shared: Arc<Shared>) {
    let mut ticks = tokio::time::interval(shared.settings.metrics_interval);
    ticks.tick().await;
    loop {
        ticks.tick().await;
        shared.stats.emit();
    }
}

/// Lets the throughput of the last second of full work set how many messages
/// may be held.
async fn set_limit(shared: Arc<Shared>) {
    let settings = &shared.settings;
    let least = holding::LEAST_BATCHES_HELD * settings.batch_size;
    let mut ticks = tokio::time::interval(LIMIT_INTERVAL);
    let mut before = shared.stats.work_done();
    loop {
        ticks.tick().await;
        let now = shared.stats.work_done();
        let busy = now.0 - before.0;
        if busy < LIMIT_INTERVAL / 2 {
            continue;
        }
        let rate = (now.1 - before.1) as f64 / busy.as_secs_f64();
        before = now;
        let limit = holding::limit(rate, settings.visibility, least, settings.max_messages);
        shared.gate.set_limit(limit);
    }
}

/// Ends the run: what has not reached the model goes back at once, so that
/// another task can take it; what has is finished, if it can be in time.
/// Answers how many messages were handed back.
async fn drain(shared: &Arc<Shared>, receivers: Vec<tokio::task::JoinHandle<()>>) -> usize {
    let margin = STOP_MARGIN.min(shared.settings.stop_timeout / 4);
    let deadline = Instant::now() + shared.settings.stop_timeout - margin;
    let is_fatal = shared.fatal.get().is_some();
    // The receivers first: one that still polls would be given at once what
    // is handed back here.
    for receiver in receivers {
        let _ = tokio::time::timeout_at(deadline, receiver).await;
    }
    shared.receivers_ended.cancel();
    let mut handed_back = desk::hand_back(shared, shared.ledger.give_up(is_fatal)).await;
    let _ = tokio::time::timeout_at(deadline, shared.ledger.wait_until_empty()).await;
    handed_back += desk::hand_back(shared, shared.ledger.give_up(true)).await;
    if handed_back > 0 {
        tracing::info!(messages = handed_back, "handed back to the queue");
    }
    handed_back
}
