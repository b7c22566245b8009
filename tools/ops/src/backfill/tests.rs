//! Walks over made-up objects into a made-up queue, ended in every way.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use delivery::{Answer, Destination, Entry as Message};
use proptest::prelude::*;
use tokio::sync::Notify;

use super::job::tests::{job, object};
use super::job::{Object, Position};
use super::rate::MAX_WINDOW;
use super::*;
use crate::units::Rate;

struct Pages {
    objects: Vec<Object>,
    next: usize,
    size: usize,
}

impl Pages {
    fn after(objects: &[Object], position: Option<&Position>, size: usize) -> Self {
        let next = match position {
            Some(Position::Key(key)) => objects.partition_point(|one| one.key <= *key),
            _ => 0,
        };
        Self {
            objects: objects.to_vec(),
            next,
            size,
        }
    }
}

#[async_trait]
impl Source for Pages {
    async fn next_page(&mut self) -> Result<Option<Vec<Entry>>, SourceError> {
        if self.next == self.objects.len() {
            return Ok(None);
        }
        let end = self.objects.len().min(self.next + self.size);
        let page = self.objects[self.next..end].iter().map(|object| Entry {
            object: object.clone(),
            position: Position::Key(object.key.clone()),
        });
        self.next = end;
        Ok(Some(page.collect()))
    }
}

/// Where a process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Death {
    /// The request was never sent.
    BeforeTheQueue,
    /// The queue has it, the answer never came.
    BehindTheQueue,
}

/// A queue that counts each event, fails as told, and lets processes die.
#[derive(Default)]
struct FakeQueue {
    received: Mutex<HashMap<String, usize>>,
    requests: AtomicUsize,
    /// With this request the process dies.
    death: Mutex<Option<(usize, Death)>>,
    dying: Notify,
    /// Keys whose entries fail this often.
    failures: Mutex<HashMap<String, u32>>,
    /// A key that the queue refuses.
    refused: Option<&'static str>,
}

#[async_trait]
impl Destination for FakeQueue {
    fn name(&self) -> &str {
        "queue"
    }

    async fn send(&self, entries: &[&Message]) -> Answer {
        assert!(entries.len() <= 10);
        let number = self.requests.fetch_add(1, Ordering::SeqCst);
        let death = *self.death.lock().unwrap();
        let dies = death.filter(|(request, _)| *request == number);
        if dies.is_some_and(|(_, death)| death == Death::BeforeTheQueue) {
            self.dying.notify_one();
            std::future::pending::<()>().await;
        }
        let mut outcomes = Vec::new();
        for entry in entries {
            if self.refused.is_some_and(|key| entry.body.contains(key)) {
                outcomes.push(Err(aws::Error::of_code(
                    "fake",
                    "InvalidMessageContents",
                    "",
                )));
                continue;
            }
            let mut failures = self.failures.lock().unwrap();
            let failing = failures
                .iter_mut()
                .find(|(key, left)| **left > 0 && entry.body.contains(key.as_str()));
            if let Some((_, left)) = failing {
                *left -= 1;
                outcomes.push(Err(aws::Error::of_code("fake", "InternalError", "")));
                continue;
            }
            let event = CloudEvent::parse(entry.body.as_bytes()).expect("a valid event");
            *self.received.lock().unwrap().entry(event.id).or_default() += 1;
            outcomes.push(Ok(()));
        }
        if dies.is_some() {
            self.dying.notify_one();
            std::future::pending::<()>().await;
        }
        Ok(outcomes)
    }
}

struct Held(BTreeSet<String>);

#[async_trait]
impl Vectors for Held {
    async fn exist(&self, keys: &[String]) -> Result<Vec<bool>, aws::Error> {
        Ok(keys.iter().map(|key| self.0.contains(key)).collect())
    }
}

struct Silent;

impl Progress for Silent {
    fn counts(&self, _: &Counts) {}
    fn note(&self, _: &str) {}
}

#[derive(Default)]
struct Bell(AtomicUsize);

#[async_trait]
impl Waker for Bell {
    async fn wake(&self) -> Result<(), aws::Error> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}

struct Bucket {
    objects: Vec<Object>,
    vectors: Held,
    /// Ids of the events that are wanted.
    wanted: BTreeSet<String>,
}

/// `count` images, every seventh a text, every fifth embedded already.
fn bucket(count: usize) -> Bucket {
    let mut vectors = BTreeSet::new();
    let mut wanted = BTreeSet::new();
    let mut objects = Vec::new();
    for index in 0..count {
        let is_text = index % 7 == 3;
        let name = if is_text { "txt" } else { "png" };
        let object = object(&format!("photos/{index:05}.{name}"));
        if let Ok(one) = job().decide(&object) {
            if index % 5 == 0 {
                vectors.insert(one.vector_key);
            } else {
                wanted.insert(one.id.to_string());
            }
        }
        objects.push(object);
    }
    Bucket {
        objects,
        vectors: Held(vectors),
        wanted,
    }
}

struct Run<'a> {
    bucket: &'a Bucket,
    queue: &'a Arc<FakeQueue>,
    path: &'a Path,
    stop: CancellationToken,
    rate: Rate,
    page: usize,
}

impl<'a> Run<'a> {
    fn new(bucket: &'a Bucket, queue: &'a Arc<FakeQueue>, path: &'a Path) -> Self {
        Self {
            bucket,
            queue,
            path,
            stop: CancellationToken::new(),
            rate: Rate(None),
            page: 130,
        }
    }

    /// One process: from the checkpoint to its end, or to its death.
    async fn go(self) -> Option<Result<(End, Checkpoint), BackfillError>> {
        let (checkpoint, mut state) = CheckpointFile::open(self.path, &job()).unwrap();
        let mut source = Pages::after(&self.bucket.objects, state.position.as_ref(), self.page);
        let outputs = Outputs::new(vec![self.queue.clone()]);
        let job = job();
        let walk = Walk {
            job: &job,
            source: &mut source,
            vectors: &self.bucket.vectors,
            queue: Some(&outputs),
            waker: None,
            rate: TokenBucket::new(self.rate, Instant::now()),
            checkpoint: Some(&checkpoint),
            progress: &Silent,
            stop: &self.stop,
        };
        let end = tokio::select! {
            biased;
            () = self.queue.dying.notified() => return None,
            end = walk.run(&mut state) => end,
        };
        Some(end.map(|end| (end, state)))
    }
}

fn assert_adds_up(counts: &Counts) {
    assert_eq!(counts.listed, counts.settled(), "{counts:?}");
}

#[tokio::test(start_paused = true)]
async fn a_walk_enqueues_what_is_wanted_and_counts_the_rest() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("walk.json");
    let bucket = bucket(1_000);
    let queue = Arc::new(FakeQueue::default());
    let (end, state) = Run::new(&bucket, &queue, &path)
        .go()
        .await
        .unwrap()
        .unwrap();
    assert_eq!(end, End::Complete);
    assert!(state.complete && state.in_doubt.is_empty() && state.settled.is_empty());
    assert_eq!(state.counts.listed, 1_000);
    assert_eq!(state.counts.no_image_by_name, 143);
    assert_eq!(state.counts.already_embedded, bucket.vectors.0.len() as u64);
    assert_eq!(state.counts.enqueued, bucket.wanted.len() as u64);
    assert_eq!(state.counts.enqueued_bytes, 1_000 * state.counts.enqueued);
    assert_adds_up(&state.counts);
    let received = queue.received.lock().unwrap();
    assert_eq!(
        received.keys().cloned().collect::<BTreeSet<_>>(),
        bucket.wanted
    );
    assert!(received.values().all(|times| *times == 1));
}

#[tokio::test(start_paused = true)]
async fn the_rate_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("walk.json");
    let bucket = bucket(1_000);
    let queue = Arc::new(FakeQueue::default());
    let start = Instant::now();
    let mut run = Run::new(&bucket, &queue, &path);
    run.rate = Rate(Some(20.0));
    run.go().await.unwrap().unwrap();
    let expected = (bucket.wanted.len() as f64 - 20.0) / 20.0;
    let took = start.elapsed().as_secs_f64();
    assert!(
        (expected..expected + 1.5).contains(&took),
        "{took} s, not {expected} s"
    );
}

#[tokio::test(start_paused = true)]
async fn a_stop_finishes_the_window_and_the_next_run_sends_nothing_twice() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("walk.json");
    let bucket = bucket(1_000);
    let queue = Arc::new(FakeQueue::default());
    let mut run = Run::new(&bucket, &queue, &path);
    run.rate = Rate(Some(50.0));
    let stop = run.stop.clone();
    let stopping = async {
        tokio::time::sleep(std::time::Duration::from_millis(4_321)).await;
        stop.cancel();
    };
    let (ended, ()) = tokio::join!(run.go(), stopping);
    let (end, state) = ended.unwrap().unwrap();
    assert_eq!(end, End::Stopped);
    assert!(!state.complete && state.in_doubt.is_empty());
    assert_eq!(state.counts.enqueued, 250, "a burst of 50 and 50 a second");
    assert_adds_up(&state.counts);

    let (end, state) = Run::new(&bucket, &queue, &path)
        .go()
        .await
        .unwrap()
        .unwrap();
    assert_eq!(end, End::Complete);
    assert_eq!(state.counts.enqueued, bucket.wanted.len() as u64);
    assert_eq!(state.counts.sent_again, 0);
    assert_adds_up(&state.counts);
    assert!(
        queue
            .received
            .lock()
            .unwrap()
            .values()
            .all(|times| *times == 1)
    );
}

#[tokio::test(start_paused = true)]
async fn what_the_queue_confirmed_of_a_failing_window_is_not_sent_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("walk.json");
    let bucket = bucket(300);
    // More failures than one run has tries, for two images of one window.
    let failures = ["photos/00001.png", "photos/00032.png"].map(|key| (key.to_owned(), 7));
    let queue = Arc::new(FakeQueue {
        failures: Mutex::new(HashMap::from(failures)),
        ..FakeQueue::default()
    });
    let problem = Run::new(&bucket, &queue, &path)
        .go()
        .await
        .unwrap()
        .unwrap_err();
    assert!(
        matches!(
            problem,
            BackfillError::Queue {
                failed: 2,
                sent: 80,
                ..
            }
        ),
        "{problem}"
    );
    assert_eq!(problem.failure(), Failure::Transient);
    let state = read_checkpoint(&path, &job()).unwrap();
    assert_eq!((state.settled.len(), state.in_doubt.len()), (78, 2));

    // Another rate: the windows of the next run have other borders.
    let mut run = Run::new(&bucket, &queue, &path);
    run.rate = Rate(Some(7.0));
    let (end, state) = run.go().await.unwrap().unwrap();
    assert_eq!(end, End::Complete);
    assert_eq!(state.counts.enqueued, bucket.wanted.len() as u64);
    assert_eq!(state.counts.sent_again, 2);
    assert_adds_up(&state.counts);
    assert!(
        queue
            .received
            .lock()
            .unwrap()
            .values()
            .all(|times| *times == 1)
    );
}

#[tokio::test(start_paused = true)]
async fn an_event_that_the_queue_refuses_is_counted_and_holds_nothing_up() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("walk.json");
    let bucket = bucket(100);
    let queue = Arc::new(FakeQueue {
        refused: Some("photos/00004.png"),
        ..FakeQueue::default()
    });
    let (end, state) = Run::new(&bucket, &queue, &path)
        .go()
        .await
        .unwrap()
        .unwrap();
    assert_eq!((end, state.counts.refused), (End::Complete, 1));
    assert_eq!(state.counts.enqueued, bucket.wanted.len() as u64 - 1);
    assert_adds_up(&state.counts);
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_counts_the_same_and_sends_nothing() {
    let bucket = bucket(500);
    let mut source = Pages::after(&bucket.objects, None, 100);
    let (job, stop, bell) = (job(), CancellationToken::new(), Bell::default());
    let mut state = Checkpoint::default();
    let walk = Walk {
        job: &job,
        source: &mut source,
        vectors: &bucket.vectors,
        queue: None,
        waker: Some(&bell),
        rate: TokenBucket::new(Rate(Some(1.0)), Instant::now()),
        checkpoint: None,
        progress: &Silent,
        stop: &stop,
    };
    assert_eq!(walk.run(&mut state).await.unwrap(), End::Complete);
    assert_eq!(state.counts.enqueued, bucket.wanted.len() as u64);
    assert_adds_up(&state.counts);
    assert_eq!(bell.0.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn the_scaler_is_woken_with_the_first_work_and_at_the_end() {
    let bucket = bucket(500);
    let queue = Arc::new(FakeQueue::default());
    let outputs = Outputs::new(vec![queue.clone()]);
    let mut source = Pages::after(&bucket.objects, None, 100);
    let (job, stop, bell) = (job(), CancellationToken::new(), Bell::default());
    let walk = Walk {
        job: &job,
        source: &mut source,
        vectors: &bucket.vectors,
        queue: Some(&outputs),
        waker: Some(&bell),
        rate: TokenBucket::new(Rate(None), Instant::now()),
        checkpoint: None,
        progress: &Silent,
        stop: &stop,
    };
    walk.run(&mut Checkpoint::default()).await.unwrap();
    assert_eq!(bell.0.load(Ordering::SeqCst), 2);
}

fn deaths() -> impl Strategy<Value = Vec<(usize, bool, f64, usize)>> {
    let death = (0usize..60, any::<bool>(), 1.0f64..200.0, 1usize..200);
    proptest::collection::vec(death, 0..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However often the process dies, and wherever: no image is lost, each is
    /// counted once, and only what a checkpoint called in doubt comes twice.
    #[test]
    fn kills_lose_nothing_and_double_only_what_was_in_doubt(deaths in deaths()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .unwrap();
        runtime.block_on(async {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("walk.json");
            let bucket = bucket(600);
            let queue = Arc::new(FakeQueue::default());
            let mut doubted: BTreeMap<String, usize> = BTreeMap::new();
            for (request, is_behind, rate, page) in deaths {
                let death = if is_behind { Death::BehindTheQueue } else { Death::BeforeTheQueue };
                let now = queue.requests.load(Ordering::SeqCst);
                *queue.death.lock().unwrap() = Some((now + request, death));
                let mut run = Run::new(&bucket, &queue, &path);
                run.rate = Rate(Some(rate));
                run.page = page;
                let ended = run.go().await;
                let state = read_checkpoint(&path, &job()).unwrap();
                assert!(state.in_doubt.len() <= MAX_WINDOW);
                if ended.is_none() {
                    assert!(!state.in_doubt.is_empty(), "an intent is saved before sending");
                }
                for id in &state.in_doubt {
                    *doubted.entry(id.to_string()).or_default() += 1;
                }
                assert_adds_up(&state.counts);
            }
            *queue.death.lock().unwrap() = None;
            let (end, state) = Run::new(&bucket, &queue, &path).go().await.unwrap().unwrap();
            assert_eq!(end, End::Complete);
            assert_eq!(state.counts.enqueued, bucket.wanted.len() as u64);
            assert!(state.counts.sent_again <= doubted.len() as u64);
            assert_adds_up(&state.counts);
            let received = queue.received.lock().unwrap();
            let ids: BTreeSet<String> = received.keys().cloned().collect();
            assert_eq!(&ids, &bucket.wanted);
            for (id, times) in received.iter() {
                let may_be = 1 + doubted.get(id).copied().unwrap_or(0);
                assert!(*times <= may_be, "{id}: {times} times, {may_be} allowed");
            }
        });
    }
}
