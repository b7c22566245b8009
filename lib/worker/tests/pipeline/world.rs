//! A small AWS for the pipeline's tests. It enforces the limits of the real
//! one: batches of ten, 256 KiB, 12 hours, receipts that go stale.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use delivery::{Answer, Backoff, Destination, Entry, Outputs, Presence, Rejection};
use events::{CloudEvent, Document, EventType, ImageType, S3Url};
use futures_util::StreamExt;
use futures_util::stream;
use platform::aws;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use worker::config::Settings;
use worker::services::{
    Documents, EmbedError, Embedder, Extension, LeaseError, ModelInfo, Notes, OpenDocument,
    Preparer, Queue, QueueFacts, Receipt, Received, Rejects, Services, Size, Vectors,
};
use worker::{Cause, Fatal, Loading, Metrics, Stage, Summary, TaskError, run_pipeline};

pub const MODEL: &str = "ViT-T/1";
pub const SIDE: u32 = 4;
pub const DIMENSIONS: usize = 4;
const BATCH_LIMIT: usize = 10;
const BYTES_LIMIT: usize = 256 * 1024;

// ---------------------------------------------------------------- the death

/// Whether the worker was killed. What is left of it may go on computing for a
/// moment, but nothing that it says reaches anybody.
#[derive(Clone, Default)]
pub struct Death(Arc<AtomicBool>);

impl Death {
    pub fn is_here(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn strike(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Another worker is born.
    pub fn pass(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    async fn silences(&self) {
        if self.is_here() {
            std::future::pending::<()>().await;
        }
    }
}

// ---------------------------------------------------------------- the queue

#[derive(Clone, Debug)]
pub struct Stored {
    /// The queue that it is in.
    pub queue: usize,
    pub body: String,
    pub visible_at: Instant,
    pub first_received: Option<Instant>,
    pub deliveries: u32,
    pub is_deleted: bool,
    /// Visibility changes to zero.
    pub hand_backs: u32,
    pub extensions: u32,
}

impl Stored {
    pub fn is_visible(&self) -> bool {
        !self.is_deleted && self.visible_at <= Instant::now()
    }
}

#[derive(Default)]
pub struct FakeQueue {
    messages: Mutex<BTreeMap<String, Stored>>,
    pub most_in_flight: AtomicUsize,
    /// Every message is delivered once more while it is invisible.
    pub delivers_twice: bool,
    twice: Mutex<HashSet<String>>,
    pub receives: AtomicU64,
    /// Checked when a message is deleted: its event is out, its vector in.
    world: Mutex<Option<(Arc<FakeOutput>, Arc<FakeVectors>)>>,
    pub refuses: bool,
    /// Messages lie in two queues in turns.
    pub is_two: bool,
    /// After so many deliveries the queue itself takes a message away.
    pub max_receives: Option<u32>,
    /// The messages come in no order, as from SQS.
    pub shuffles: bool,
    /// What the queue itself took away.
    pub taken_away: Mutex<Vec<String>>,
    pub death: Death,
    latency: Duration,
}

impl FakeQueue {
    /// Every visibility ends, as it does some time after a worker's death.
    pub fn pass_visibility(&self) {
        for stored in self.messages.lock().unwrap().values_mut() {
            stored.visible_at = stored.visible_at.min(Instant::now());
        }
    }

    pub fn send(&self, body: &str) -> String {
        let mut messages = self.messages.lock().unwrap();
        let id = format!("m{:06}", messages.len());
        let queue = messages.len() % self.count();
        messages.insert(
            id.clone(),
            Stored {
                queue,
                body: body.to_owned(),
                visible_at: Instant::now(),
                first_received: None,
                deliveries: 0,
                is_deleted: false,
                hand_backs: 0,
                extensions: 0,
            },
        );
        id
    }

    pub fn message(&self, id: &str) -> Stored {
        self.messages.lock().unwrap()[id].clone()
    }

    pub fn all(&self) -> Vec<Stored> {
        self.messages.lock().unwrap().values().cloned().collect()
    }

    pub fn left(&self) -> usize {
        let messages = self.messages.lock().unwrap();
        messages.values().filter(|one| !one.is_deleted).count()
    }

    /// Another consumer takes the message, as if its visibility had ended.
    pub fn steal(&self, id: &str) {
        let mut messages = self.messages.lock().unwrap();
        let stored = messages.get_mut(id).unwrap();
        stored.deliveries += 1;
        stored.visible_at = Instant::now() + Duration::from_secs(3600);
    }

    /// The message and delivery of a receipt, if SQS still honours it.
    fn lease<'a>(
        messages: &'a mut BTreeMap<String, Stored>,
        receipt: &Receipt,
    ) -> Result<&'a mut Stored, LeaseError> {
        let (id, delivery) = receipt.handle.split_once('#').expect("a receipt of ours");
        let stored = messages.get_mut(id).expect("a message of ours");
        assert_eq!(receipt.queue, stored.queue, "a receipt of the other queue");
        if stored.is_deleted || delivery.parse() != Ok(stored.deliveries) {
            return Err(lost("ReceiptHandleIsInvalid"));
        }
        Ok(stored)
    }
}

fn lost(code: &str) -> LeaseError {
    LeaseError::Lost(aws::Error::of_code("sqs", code, "not yours"))
}

#[async_trait]
impl Queue for FakeQueue {
    fn count(&self) -> usize {
        if self.is_two { 2 } else { 1 }
    }

    async fn receive(
        &self,
        queue: usize,
        max: usize,
        wait: Duration,
        visibility: Duration,
    ) -> Result<Vec<Received>, aws::Error> {
        assert!((1..=BATCH_LIMIT).contains(&max), "{max}");
        assert!(wait <= Duration::from_secs(20), "{wait:?}");
        assert!(
            visibility <= Duration::from_secs(12 * 3600),
            "{visibility:?}"
        );
        self.death.silences().await;
        self.receives.fetch_add(1, Ordering::Relaxed);
        if self.refuses {
            let (code, message) = ("AccessDenied", "not you");
            return Err(aws::Error::of_code("sqs:ReceiveMessage", code, message));
        }
        tokio::time::sleep(self.latency).await;
        let deadline = Instant::now() + wait;
        loop {
            let mut received = Vec::new();
            {
                let mut messages = self.messages.lock().unwrap();
                let mut twice = self.twice.lock().unwrap();
                let mut order: Vec<_> = messages.iter_mut().collect();
                if self.shuffles {
                    fastrand::shuffle(&mut order);
                }
                for (id, stored) in order {
                    if received.len() == max {
                        break;
                    }
                    let again = self.delivers_twice
                        && stored.deliveries == 1
                        && !stored.is_deleted
                        && twice.insert(id.clone());
                    if stored.queue != queue || !(stored.is_visible() || again) {
                        continue;
                    }
                    if self.max_receives == Some(stored.deliveries) {
                        stored.is_deleted = true;
                        self.taken_away.lock().unwrap().push(stored.body.clone());
                        continue;
                    }
                    stored.deliveries += 1;
                    stored.visible_at = Instant::now() + visibility;
                    stored.first_received.get_or_insert_with(Instant::now);
                    received.push(Received {
                        message_id: id.clone(),
                        receipt: Receipt {
                            queue,
                            handle: format!("{id}#{}", stored.deliveries),
                        },
                        body: stored.body.clone(),
                        receive_count: stored.deliveries,
                    });
                }
                let in_flight = messages
                    .values()
                    .filter(|one| !one.is_deleted && !one.is_visible())
                    .count();
                self.most_in_flight.fetch_max(in_flight, Ordering::Relaxed);
            }
            if !received.is_empty() || Instant::now() >= deadline {
                return Ok(received);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn extend(&self, extensions: &[Extension]) -> Vec<Result<(), LeaseError>> {
        assert!((1..=BATCH_LIMIT).contains(&extensions.len()));
        self.death.silences().await;
        tokio::time::sleep(self.latency).await;
        let mut messages = self.messages.lock().unwrap();
        extensions
            .iter()
            .map(|extension| {
                let stored = Self::lease(&mut messages, &extension.receipt)?;
                if stored.is_visible() {
                    return Err(lost("MessageNotInflight"));
                }
                let first = stored.first_received.expect("it was received");
                let total = Instant::now() + extension.visibility - first;
                if total > Duration::from_secs(12 * 3600) {
                    return Err(lost("InvalidParameterValue"));
                }
                if extension.visibility.is_zero() {
                    stored.hand_backs += 1;
                } else {
                    stored.extensions += 1;
                }
                stored.visible_at = Instant::now() + extension.visibility;
                Ok(())
            })
            .collect()
    }

    async fn acknowledge(&self, receipts: &[Receipt]) -> Vec<Result<(), LeaseError>> {
        assert!((1..=BATCH_LIMIT).contains(&receipts.len()));
        self.death.silences().await;
        tokio::time::sleep(self.latency).await;
        let world = self.world.lock().unwrap().clone();
        let mut messages = self.messages.lock().unwrap();
        receipts
            .iter()
            .map(|receipt| {
                let stored = Self::lease(&mut messages, receipt)?;
                stored.is_deleted = true;
                if let Some((output, vectors)) = &world {
                    check_order(&stored.body, output, vectors);
                }
                Ok(())
            })
            .collect()
    }
}

/// A message may be deleted only when its vector is stored and its event out.
fn check_order(body: &str, output: &FakeOutput, vectors: &FakeVectors) {
    let Ok(event) = CloudEvent::parse(body.as_bytes()) else {
        return;
    };
    let is_in = |letters: &Mutex<Vec<(String, Rejection)>>| {
        let letters = letters.lock().unwrap();
        letters.iter().any(|(letter, _)| letter == body)
    };
    if is_in(&output.rejects) || is_in(&output.handed_over) {
        return;
    }
    let url = &event.data.document.url;
    if vectors.gone.lock().unwrap().contains(url) {
        return;
    }
    let delivered = output.delivered.lock().unwrap();
    let published = delivered
        .iter()
        .filter(|body| body.contains(url))
        .map(|body| CloudEvent::parse(body.as_bytes()).expect("a valid event"))
        .find(|one| one.data.document.url == *url)
        .unwrap_or_else(|| panic!("{url} was deleted before its event was out"));
    if event.kind == EventType::DocumentCreated {
        let key = vector_key(&published);
        assert!(
            vectors.get(&key).is_some(),
            "{url} was deleted without {key}"
        );
    }
}

/// The key of the vector that an event points to.
pub fn vector_key(event: &CloudEvent) -> String {
    let properties = event.data.metadata.properties.as_ref().expect("properties");
    let url = properties.attrs["embeddings"]["vectors"].as_str().unwrap();
    url.parse::<events::S3Url>().unwrap().key
}

// ------------------------------------------------------------ the documents

#[derive(Clone, Default)]
pub struct Content {
    pub bytes: Vec<u8>,
    pub content_type: Option<String>,
    /// How often opening it still fails.
    pub failures: u32,
    /// The body breaks off in the middle.
    pub is_cut: bool,
    /// The server does not say the length.
    pub hides_length: bool,
    /// A byte now and then, for ever.
    pub never_ends: bool,
}

#[derive(Default)]
pub struct FakeDocuments {
    pub contents: Mutex<HashMap<String, Content>>,
    pub opened: AtomicU64,
    latency: Duration,
}

#[async_trait]
impl Documents for FakeDocuments {
    async fn open(&self, url: &str) -> Result<OpenDocument, TaskError> {
        tokio::time::sleep(self.latency).await;
        self.opened.fetch_add(1, Ordering::Relaxed);
        let content = {
            let mut contents = self.contents.lock().unwrap();
            let Some(content) = contents.get_mut(url) else {
                let message = format!("{url}: NoSuchKey");
                return Err(TaskError::permanent(
                    Stage::Download,
                    Cause::NotFound,
                    message,
                ));
            };
            if content.failures > 0 {
                content.failures -= 1;
                return Err(unavailable(Stage::Download));
            }
            content.clone()
        };
        let half = content.bytes.len() / 2;
        let mut chunks: Vec<Result<Bytes, TaskError>> = vec![
            Ok(Bytes::copy_from_slice(&content.bytes[..half])),
            Ok(Bytes::copy_from_slice(&content.bytes[half..])),
        ];
        if content.is_cut {
            chunks[1] = Err(unavailable(Stage::Download));
        }
        let drip = stream::repeat(()).then(|()| async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            Ok(Bytes::from_static(b"."))
        });
        let more = if content.never_ends { usize::MAX } else { 0 };
        Ok(OpenDocument {
            content_type: content.content_type,
            length: (!content.hides_length).then_some(content.bytes.len() as u64),
            etag: Some(format!("{:x}", content.bytes.len())),
            body: stream::iter(chunks).chain(drip.take(more)).boxed(),
        })
    }
}

fn unavailable(stage: Stage) -> TaskError {
    TaskError::transient(stage, Cause::Unavailable, "503 Slow Down")
}

// -------------------------------------------------------------- the vectors

#[derive(Default)]
pub struct FakeVectors {
    stored: Mutex<BTreeMap<String, Vec<u8>>>,
    owners: Mutex<BTreeMap<String, String>>,
    pub puts: AtomicU64,
    /// How many puts still fail, and with what.
    pub failures: Mutex<(u32, &'static str)>,
    pub notes: Mutex<HashSet<String>>,
    /// Documents that have been deleted.
    pub gone: Mutex<HashSet<String>>,
    death: Death,
    latency: Duration,
}

impl FakeVectors {
    pub fn get(&self, key: &str) -> Option<Vec<u8>> {
        self.stored.lock().unwrap().get(key).cloned()
    }

    pub fn keys(&self) -> Vec<String> {
        self.stored.lock().unwrap().keys().cloned().collect()
    }

    fn check(&self, key: &str) -> Result<(), aws::Error> {
        let mut failures = self.failures.lock().unwrap();
        if failures.0 == 0 {
            return Ok(());
        }
        failures.0 -= 1;
        Err(aws::Error::of_code("s3:PutObject", failures.1, "").of(key))
    }
}

#[async_trait]
impl Vectors for FakeVectors {
    fn bucket(&self) -> &str {
        "cache"
    }

    async fn put(
        &self,
        key: &str,
        document_url: &str,
        _model: &str,
        body: Vec<u8>,
    ) -> Result<(), aws::Error> {
        self.death.silences().await;
        tokio::time::sleep(self.latency).await;
        self.check(key)?;
        self.puts.fetch_add(1, Ordering::Relaxed);
        self.stored.lock().unwrap().insert(key.to_owned(), body);
        let mut owners = self.owners.lock().unwrap();
        owners.insert(key.to_owned(), document_url.to_owned());
        Ok(())
    }

    async fn delete_document(&self, document_url: &str, _model: &str) -> Result<usize, aws::Error> {
        self.check(document_url)?;
        let owners = self.owners.lock().unwrap().clone();
        let mut stored = self.stored.lock().unwrap();
        let before = stored.len();
        stored.retain(|key, _| owners.get(key).map(String::as_str) != Some(document_url));
        Ok(before - stored.len())
    }

    async fn presence(&self, document: &S3Url) -> Result<Presence, aws::Error> {
        Ok(
            if self.gone.lock().unwrap().contains(&document.to_string()) {
                Presence::Gone
            } else {
                Presence::Live
            },
        )
    }
}

#[async_trait]
impl Notes for FakeVectors {
    async fn write(&self, message_id: &str) -> Result<(), aws::Error> {
        self.death.silences().await;
        self.notes.lock().unwrap().insert(message_id.to_owned());
        Ok(())
    }

    async fn is_there(&self, message_id: &str) -> Result<bool, aws::Error> {
        self.death.silences().await;
        Ok(self.notes.lock().unwrap().contains(message_id))
    }

    async fn remove(&self, message_id: &str) -> Result<(), aws::Error> {
        self.death.silences().await;
        self.notes.lock().unwrap().remove(message_id);
        Ok(())
    }
}

// ------------------------------------------------- the output and the rejects

#[derive(Default)]
pub struct FakeOutput {
    delivered: Mutex<Vec<String>>,
    pub rejects: Mutex<Vec<(String, Rejection)>>,
    /// Words of events that fail so many times more.
    pub failures: Mutex<HashMap<String, u32>>,
    /// How often the dead-letter queue still fails.
    /// What went to a larger worker.
    handed_over: Mutex<Vec<(String, Rejection)>>,
    pub reject_failures: AtomicUsize,
    death: Death,
    latency: Duration,
}

impl FakeOutput {
    pub fn events(&self) -> Vec<CloudEvent> {
        let delivered = self.delivered.lock().unwrap();
        delivered
            .iter()
            .map(|body| CloudEvent::parse(body.as_bytes()).expect("a valid event"))
            .collect()
    }

    pub fn urls(&self) -> Vec<String> {
        let mut urls: Vec<String> = self
            .events()
            .iter()
            .map(|event| event.data.document.url.clone())
            .collect();
        urls.sort();
        urls
    }

    pub fn handed_over(&self) -> Vec<String> {
        let letters = self.handed_over.lock().unwrap();
        letters.iter().map(|(body, _)| body.clone()).collect()
    }

    pub fn rejections(&self) -> Vec<(String, Rejection)> {
        self.rejects.lock().unwrap().clone()
    }
}

#[async_trait]
impl Destination for FakeOutput {
    fn name(&self) -> &str {
        "fake"
    }

    async fn send(&self, entries: &[&Entry]) -> Answer {
        assert!((1..=BATCH_LIMIT).contains(&entries.len()));
        let bytes: usize = entries.iter().map(|entry| entry.body.len()).sum();
        assert!(bytes <= BYTES_LIMIT, "{bytes}");
        self.death.silences().await;
        tokio::time::sleep(self.latency).await;
        let mut failures = self.failures.lock().unwrap();
        let mut outcomes = Vec::new();
        for entry in entries {
            let failing = failures
                .iter_mut()
                .find(|(word, left)| **left > 0 && entry.body.contains(word.as_str()));
            outcomes.push(match failing {
                Some((_, left)) => {
                    *left -= 1;
                    Err(aws::Error::of_code("fake", "InternalError", ""))
                }
                None => {
                    self.delivered.lock().unwrap().push(entry.body.clone());
                    Ok(())
                }
            });
        }
        Ok(outcomes)
    }
}

/// The dead-letter queue, on the other side of the output's books.
struct FakeRejects(Arc<FakeOutput>);

/// The queue of a larger worker, likewise.
struct FakeLarger(Arc<FakeOutput>);

#[async_trait]
impl Rejects for FakeLarger {
    async fn reject_all(&self, handed: &[(String, Rejection)]) -> Vec<Result<(), aws::Error>> {
        self.0.handed_over.lock().unwrap().extend_from_slice(handed);
        vec![Ok(()); handed.len()]
    }
}

#[async_trait]
impl Rejects for FakeRejects {
    async fn reject_all(&self, rejected: &[(String, Rejection)]) -> Vec<Result<(), aws::Error>> {
        self.0.death.silences().await;
        rejected
            .iter()
            .map(|letter| {
                let fails = self.0.reject_failures.fetch_update(
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                    |left| left.checked_sub(1),
                );
                if fails.is_ok() {
                    return Err(aws::Error::of_code("fake", "InternalError", ""));
                }
                self.0.rejects.lock().unwrap().push(letter.clone());
                Ok(())
            })
            .collect()
    }
}

// ---------------------------------------------------- the decoder, the model

/// An "image": the PNG signature, then words: `id:7`, `damaged`, `panic`,
/// `slow:MILLISECONDS`, `memory:BYTES`, `nan`, `poison`, `kill:7`.
pub fn image(words: &str) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n ".to_vec();
    bytes.extend_from_slice(words.as_bytes());
    bytes
}

fn word(bytes: &[u8], name: &str) -> Option<u64> {
    let text = String::from_utf8_lossy(bytes);
    text.split(' ')
        .find_map(|word| word.strip_prefix(name)?.strip_prefix(':')?.parse().ok())
}

fn has(bytes: &[u8], name: &str) -> bool {
    String::from_utf8_lossy(bytes)
        .split(' ')
        .any(|word| word == name)
}

#[derive(Default)]
pub struct FakePreparer {
    in_use: AtomicU64,
    running: AtomicUsize,
    /// Most memory in use while more than one decoder ran.
    pub most_shared: AtomicU64,
    pub most_running: AtomicUsize,
    /// Which image killed the worker, each time.
    pub kills: Mutex<Vec<u64>>,
    death: Death,
}

impl Preparer for FakePreparer {
    fn memory_needed(&self, bytes: &[u8], _kind: ImageType) -> Result<u64, TaskError> {
        Ok(word(bytes, "memory").unwrap_or(1000))
    }

    fn prepare(
        &self,
        bytes: &[u8],
        _kind: ImageType,
        side: u32,
        out: &mut [u8],
    ) -> Result<Size, TaskError> {
        assert_eq!(out.len(), (side * side * 3) as usize);
        let memory = self.memory_needed(bytes, ImageType::Png)?;
        let in_use = self.in_use.fetch_add(memory, Ordering::SeqCst) + memory;
        let running = self.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_running.fetch_max(running, Ordering::SeqCst);
        if running > 1 {
            self.most_shared.fetch_max(in_use, Ordering::SeqCst);
        }
        std::thread::sleep(Duration::from_millis(word(bytes, "slow").unwrap_or(0)));
        self.in_use.fetch_sub(memory, Ordering::SeqCst);
        self.running.fetch_sub(1, Ordering::SeqCst);
        assert!(!has(bytes, "panic"), "a decoder that panics");
        if let Some(killer) = word(bytes, "kill")
            && !self.death.is_here()
        {
            self.death.strike();
            self.kills.lock().unwrap().push(killer);
        }
        if has(bytes, "takes-too-long") {
            let message = "image needs 2 milliseconds of work, more than the limit of 1";
            return Err(TaskError::permanent(Stage::Decode, Cause::Timeout, message));
        }
        if has(bytes, "damaged") {
            let message = "PNG file is truncated";
            return Err(TaskError::permanent(Stage::Decode, Cause::Damaged, message));
        }
        out.fill(0);
        out[0] = word(bytes, "id").unwrap_or(0) as u8;
        out[1] = u8::from(has(bytes, "nan"));
        out[2] = u8::from(has(bytes, "poison"));
        Ok(Size {
            width: side,
            height: side,
        })
    }
}

#[derive(Clone, Default)]
pub struct Batches(pub Arc<Mutex<Vec<usize>>>);

struct FakeEmbedder {
    time_per_image: Duration,
    most: usize,
    batches: Batches,
}

impl Embedder for FakeEmbedder {
    fn embed(&mut self, pixels: &[u8], batch: usize) -> Result<Vec<f32>, EmbedError> {
        let each = (SIDE * SIDE * 3) as usize;
        assert!((1..=self.most).contains(&batch), "{batch}");
        assert_eq!(pixels.len(), batch * each);
        self.batches.0.lock().unwrap().push(batch);
        std::thread::sleep(self.time_per_image * batch as u32);
        let mut values = Vec::new();
        for image in pixels.chunks_exact(each) {
            if image[2] == 1 {
                return Err("CUDA error 700".into());
            }
            let first = if image[1] == 1 {
                f32::NAN
            } else {
                f32::from(image[0])
            };
            values.extend([first, 0.5, -0.25, 1e-7]);
        }
        Ok(values)
    }
}

// ---------------------------------------------------------------- the world

pub struct World {
    pub queue: Arc<FakeQueue>,
    pub documents: Arc<FakeDocuments>,
    pub vectors: Arc<FakeVectors>,
    pub output: Arc<FakeOutput>,
    /// Whether there is a larger worker to hand over to.
    pub has_larger: bool,
    pub preparer: Arc<FakePreparer>,
    pub batches: Batches,
    pub settings: Settings,
    pub time_per_image: Duration,
    pub facts: Result<QueueFacts, Fatal>,
    pub model_fails: bool,
    pub model_takes: Duration,
    pub metrics: Arc<Metrics>,
    pub death: Death,
}

pub struct Running {
    pub stop: CancellationToken,
    pub task: JoinHandle<Result<Summary, Fatal>>,
}

impl World {
    pub fn new() -> Self {
        Self::with_latency(Duration::ZERO)
    }

    /// A world in which every call to AWS takes this long.
    pub fn with_latency(latency: Duration) -> Self {
        let death = Death::default();
        let output = Arc::new(FakeOutput {
            death: death.clone(),
            latency,
            ..FakeOutput::default()
        });
        let vectors = Arc::new(FakeVectors {
            death: death.clone(),
            latency,
            ..FakeVectors::default()
        });
        let queue = FakeQueue {
            death: death.clone(),
            latency,
            ..FakeQueue::default()
        };
        *queue.world.lock().unwrap() = Some((output.clone(), vectors.clone()));
        Self {
            queue: Arc::new(queue),
            documents: Arc::new(FakeDocuments {
                latency,
                ..FakeDocuments::default()
            }),
            vectors,
            output,
            has_larger: false,
            preparer: Arc::new(FakePreparer {
                death: death.clone(),
                ..FakePreparer::default()
            }),
            batches: Batches::default(),
            settings: settings(),
            time_per_image: Duration::ZERO,
            facts: Ok(QueueFacts::default()),
            model_fails: false,
            model_takes: Duration::ZERO,
            metrics: Arc::new(Metrics::new("Tests", "input", None, 8)),
            death,
        }
    }

    /// Changes the queue before anything uses it.
    pub fn queue_mut(&mut self) -> &mut FakeQueue {
        Arc::get_mut(&mut self.queue).expect("nothing runs yet")
    }

    /// Puts an object; answers its URL.
    pub fn put(&self, name: &str, bytes: Vec<u8>) -> String {
        self.put_content(
            name,
            Content {
                bytes,
                ..Content::default()
            },
        )
    }

    pub fn put_content(&self, name: &str, content: Content) -> String {
        let url = format!("s3://bucket/{name}");
        let mut contents = self.documents.contents.lock().unwrap();
        contents.insert(url.clone(), content);
        url
    }

    /// Sends the event of an object; answers the message's id.
    pub fn send(&self, url: &str) -> String {
        self.queue.send(&created(url).to_json())
    }

    /// Puts and sends `count` images.
    pub fn images(&self, count: usize) -> Vec<String> {
        (0..count)
            .map(|index| {
                let url = self.put(
                    &format!("image-{index:05}.png"),
                    image(&format!("id:{index}")),
                );
                self.send(&url);
                url
            })
            .collect()
    }

    pub fn start(&self) -> Running {
        let services = Services {
            queue: self.queue.clone(),
            documents: self.documents.clone(),
            vectors: self.vectors.clone(),
            outputs: Outputs::new(vec![self.output.clone()]),
            rejects: Arc::new(FakeRejects(self.output.clone())),
            larger: self
                .has_larger
                .then(|| -> Arc<dyn Rejects> { Arc::new(FakeLarger(self.output.clone())) }),
            preparer: self.preparer.clone(),
            notes: self.vectors.clone(),
        };
        let stop = CancellationToken::new();
        let facts = self.facts.clone();
        let embedder: Box<dyn Embedder> = Box::new(FakeEmbedder {
            time_per_image: self.time_per_image,
            most: self.settings.batch_size,
            batches: self.batches.clone(),
        });
        let (fails, takes) = (self.model_fails, self.model_takes);
        let loading = Loading {
            info: Box::pin(async {
                Ok(Arc::new(ModelInfo {
                    name: MODEL.to_owned(),
                    side: SIDE,
                    labels: Some(Box::new(|vector| vec![format!("label-{}", vector[0])])),
                }))
            }),
            embedders: Box::pin(async move {
                tokio::time::sleep(takes).await;
                if fails {
                    return Err(Fatal::Model("the bundle is damaged".to_owned()));
                }
                Ok(vec![embedder])
            }),
        };
        let task = tokio::spawn(run_pipeline(
            self.settings.clone(),
            services,
            self.metrics.clone(),
            Box::pin(async move { facts }),
            loading,
            stop.clone(),
        ));
        Running { stop, task }
    }

    /// Runs until the queue is empty or the time is up, then stops.
    pub async fn run_until_empty(&self, limit: Duration) -> Summary {
        let running = self.start();
        let deadline = Instant::now() + limit;
        while self.queue.left() > 0 && Instant::now() < deadline && !running.task.is_finished() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        running.stop.cancel();
        running.task.await.unwrap().expect("the task ends well")
    }
}

/// Settings with short times, so that tests are quick.
fn settings() -> Settings {
    Settings {
        batch_size: 8,
        batch_wait: Duration::from_millis(20),
        decode_threads: 2,
        downloads: 16,
        stores: 16,
        max_messages: 128,
        memory_budget: 64 << 20,
        max_image_bytes: 1 << 20,
        visibility: Duration::from_secs(30),
        download_timeout: Duration::from_secs(5),
        idle_exit: Duration::ZERO,
        stop_timeout: Duration::from_secs(10),
        metrics_interval: Duration::from_secs(3600),
        cache_prefix: "clip-image-processor".to_owned(),
        image_lines_per_second: 0,
        program: "gpu-task",
        retry: Backoff {
            base: Duration::from_millis(10),
            cap: Duration::from_millis(50),
        },
    }
}

/// The event of a document that was created.
pub fn created(url: &str) -> CloudEvent {
    CloudEvent::new(
        EventType::DocumentCreated,
        Document {
            url: url.to_owned(),
            mime_type: "image/png".to_owned(),
            size: None,
            etag: None,
        },
    )
}
