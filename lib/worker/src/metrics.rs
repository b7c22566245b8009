//! What the task measures of itself, and how it tells: one line of CloudWatch
//! metrics per stage and interval, and a summary at the end.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use platform::metrics::{MAX_VALUES_PER_METRIC, MetricLine, Unit};
use serde_json::{Map, Value};

use crate::rules::failure::{Cause, Failure, Stage, TaskError};

/// The least time with enough work at hand for a throughput to mean anything.
const MIN_SATURATED: Duration = Duration::from_secs(1);

#[derive(Default)]
struct StageStats {
    /// Work that waits for the stage.
    waiting: AtomicUsize,
    /// Pieces done in this interval.
    done: AtomicU64,
    /// Time spent on them, all workers together, in nanoseconds.
    busy: AtomicU64,
    samples: Mutex<Samples>,
}

/// A fair sample of an interval's latencies in milliseconds.
#[derive(Default)]
struct Samples {
    seen: usize,
    kept: Vec<f64>,
}

impl Samples {
    fn add(&mut self, value: f64) {
        self.seen += 1;
        if self.kept.len() < MAX_VALUES_PER_METRIC {
            self.kept.push(value);
            return;
        }
        // Reservoir sampling: each value seen stays with the same chance.
        let place = fastrand::usize(..self.seen);
        if let Some(kept) = self.kept.get_mut(place) {
            *kept = value;
        }
    }
}

/// The images in the pipeline, and how long there were enough of them.
#[derive(Default)]
struct InWork {
    images: usize,
    /// Since when there are at least `saturation` of them.
    saturated_since: Option<Instant>,
    /// How long there were, before that.
    saturated: Duration,
}

pub struct Metrics {
    namespace: String,
    queue_name: String,
    cluster: Option<String>,
    started: Instant,
    stages: [StageStats; Stage::ALL.len()],
    images_total: AtomicU64,
    failed_total: AtomicU64,
    handed_over_total: AtomicU64,
    bytes: AtomicU64,
    batches: Mutex<Samples>,
    failures: Mutex<BTreeMap<(Stage, Cause, &'static str), u64>>,
    in_work: Mutex<InWork>,
    saturation: usize,
    /// `saturated` and the images done when the metrics were last written.
    written: Mutex<(Duration, u64)>,
    first_vector: OnceLock<Duration>,
    first_vector_told: AtomicBool,
    lines: Mutex<(u64, u32)>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Figures stay usable after a panic elsewhere.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    /// Figures for the queue named `queue_name`. With at least `saturation`
    /// images in work the task counts as fully busy.
    pub fn new(
        namespace: &str,
        queue_name: &str,
        cluster: Option<&str>,
        saturation: usize,
    ) -> Self {
        Self {
            namespace: namespace.to_owned(),
            queue_name: queue_name.to_owned(),
            cluster: cluster.map(str::to_owned),
            started: Instant::now(),
            stages: Default::default(),
            images_total: AtomicU64::new(0),
            failed_total: AtomicU64::new(0),
            handed_over_total: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            batches: Mutex::default(),
            failures: Mutex::default(),
            in_work: Mutex::default(),
            saturation: saturation.max(1),
            written: Mutex::default(),
            first_vector: OnceLock::new(),
            first_vector_told: AtomicBool::new(false),
            lines: Mutex::new((0, 0)),
        }
    }

    fn stage(&self, stage: Stage) -> &StageStats {
        &self.stages[stage as usize]
    }

    /// Something waits for the stage from now on.
    pub(crate) fn waits(&self, stage: Stage) {
        self.stage(stage).waiting.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn leaves(&self, stage: Stage) {
        self.stage(stage).waiting.fetch_sub(1, Ordering::Relaxed);
    }

    pub(crate) fn did(&self, stage: Stage, time: Duration) {
        let stats = self.stage(stage);
        stats.done.fetch_add(1, Ordering::Relaxed);
        stats
            .busy
            .fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
        lock(&stats.samples).add(time.as_secs_f64() * 1e3);
    }

    /// A batch of this size went through the model.
    pub(crate) fn batch(&self, images: usize) {
        lock(&self.batches).add(images as f64);
    }

    pub(crate) fn read(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn image_enters(&self) {
        let mut in_work = lock(&self.in_work);
        in_work.images += 1;
        if in_work.images == self.saturation {
            in_work.saturated_since = Some(Instant::now());
        }
    }

    /// An image left the pipeline, however it ended.
    pub(crate) fn image_leaves(&self) {
        let mut in_work = lock(&self.in_work);
        if in_work.images == self.saturation
            && let Some(since) = in_work.saturated_since.take()
        {
            in_work.saturated += since.elapsed();
        }
        in_work.images -= 1;
    }

    pub(crate) fn images_in_work(&self) -> usize {
        lock(&self.in_work).images
    }

    pub(crate) fn stored(&self) {
        self.first_vector.get_or_init(|| self.started.elapsed());
    }

    pub(crate) fn image_done(&self) {
        self.images_total.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn handed_over(&self) {
        self.handed_over_total.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn failed(&self, error: &TaskError) {
        if error.failure == Failure::Permanent {
            self.failed_total.fetch_add(1, Ordering::Relaxed);
        }
        let key = (error.stage, error.cause, error.word());
        *lock(&self.failures).entry(key).or_default() += 1;
    }

    /// How long the task had at least a batch of work at hand, and how many
    /// images it has done, both since the start: what a throughput is made of.
    pub(crate) fn work_done(&self) -> (Duration, u64) {
        let in_work = lock(&self.in_work);
        let current = in_work.saturated_since.map(|since| since.elapsed());
        let images = self.images_total.load(Ordering::Relaxed);
        (in_work.saturated + current.unwrap_or_default(), images)
    }

    /// Images done, rejected and handed over since the start.
    pub(crate) fn totals(&self) -> (u64, u64, u64) {
        (
            self.images_total.load(Ordering::Relaxed),
            self.failed_total.load(Ordering::Relaxed),
            self.handed_over_total.load(Ordering::Relaxed),
        )
    }

    /// Whether one more log line per image may be written in this second.
    pub(crate) fn may_log_image(&self, lines_per_second: u32) -> bool {
        let second = self.started.elapsed().as_secs();
        let mut lines = lock(&self.lines);
        if lines.0 != second {
            *lines = (second, 0);
        }
        lines.1 += 1;
        lines.1 <= lines_per_second
    }

    /// Takes this interval's figures and begins the next. The throughput is
    /// that of the time in which the task had at least a batch of work at
    /// hand: an idle task is not a slow one.
    pub(crate) fn take_lines(&self) -> Vec<MetricLine> {
        let (saturated, images) = {
            let now = self.work_done();
            let before = std::mem::replace(&mut *lock(&self.written), now);
            (now.0 - before.0, now.1 - before.1)
        };
        let mut main = self
            .line()
            .metric("Images", Unit::Count, images as f64)
            .property("ImagesInWork", self.images_in_work())
            .property("BytesRead", self.bytes.swap(0, Ordering::Relaxed))
            .property("BatchSize", std::mem::take(&mut *lock(&self.batches)).kept)
            .property("Failures", self.take_failures());
        if saturated >= MIN_SATURATED && images > 0 {
            let rate = images as f64 / saturated.as_secs_f64();
            main = main.metric("ImagesPerSecond", Unit::CountPerSecond, rate);
        }
        if let Some(first) = self.first_vector.get()
            && !self.first_vector_told.swap(true, Ordering::Relaxed)
        {
            let milliseconds = first.as_secs_f64() * 1e3;
            main = main.metric("StartToFirstVector", Unit::Milliseconds, milliseconds);
        }
        let mut lines = vec![main];
        for stage in Stage::ALL {
            let stats = self.stage(stage);
            let done = stats.done.swap(0, Ordering::Relaxed);
            let busy = stats.busy.swap(0, Ordering::Relaxed);
            let samples = std::mem::take(&mut *lock(&stats.samples));
            let waiting = stats.waiting.load(Ordering::Relaxed);
            if done == 0 && waiting == 0 {
                continue;
            }
            let busy_ms = busy as f64 / 1e6;
            let line = self
                .line()
                .dimension("Stage", stage.name())
                .property("QueueLength", waiting)
                .property("Done", done);
            // Metrics are what the dashboard shows.
            let line = match stage {
                Stage::Infer => line.metric("BusyTime", Unit::Milliseconds, busy_ms),
                _ => line.property("BusyTime", busy_ms),
            };
            lines.push(match stage {
                Stage::Parse | Stage::Acknowledge => line.property("Latency", samples.kept),
                _ => line.values("Latency", Unit::Milliseconds, samples.kept),
            });
        }
        lines
    }

    /// This interval's failures by stage, cause and kind.
    fn take_failures(&self) -> Map<String, Value> {
        let failures = std::mem::take(&mut *lock(&self.failures)).into_iter();
        let named = failures.map(|((stage, cause, kind), count)| {
            let name = format!("{} {} {kind}", stage.name(), cause.name());
            (name, count.into())
        });
        named.collect()
    }

    /// Writes this interval's figures.
    pub fn emit(&self) {
        for line in self.take_lines() {
            line.emit();
        }
    }

    /// Writes figures again and again.
    pub async fn emit_every(&self, interval: Duration) {
        let mut ticks = tokio::time::interval(interval);
        ticks.tick().await;
        loop {
            ticks.tick().await;
            self.emit();
        }
    }

    fn line(&self) -> MetricLine {
        let mut line = MetricLine::new(&self.namespace).dimension("QueueName", &self.queue_name);
        if let Some(cluster) = &self.cluster {
            line = line.property("ClusterName", cluster.as_str());
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::time::SystemTime;

    fn stats() -> Metrics {
        Metrics::new("Namespace", "input", None, 2)
    }

    fn json(stats: &Metrics) -> Vec<serde_json::Value> {
        stats
            .take_lines()
            .iter()
            .map(|line| line.to_json(SystemTime::now()))
            .collect()
    }

    #[test]
    fn a_throughput_is_only_told_when_there_was_enough_work_to_measure_it() {
        let stats = stats();
        stats.image_enters();
        stats.image_done();
        stats.image_leaves();
        assert!(json(&stats)[0].get("ImagesPerSecond").is_none());
        stats.image_enters();
        stats.image_enters();
        lock(&stats.in_work).saturated_since = Instant::now().checked_sub(Duration::from_secs(4));
        stats.image_leaves();
        for _ in 0..40 {
            stats.image_done();
        }
        let rate = json(&stats)[0]["ImagesPerSecond"].as_f64().unwrap();
        assert!((9.0..=10.0).contains(&rate), "{rate}");
    }

    #[test]
    fn every_stage_that_did_something_has_a_line_of_its_own() {
        let stats = stats();
        stats.waits(Stage::Decode);
        stats.did(Stage::Infer, Duration::from_millis(50));
        let lines = json(&stats);
        let of = |name: &str| lines.iter().find(|line| line["Stage"] == name).unwrap();
        assert_eq!(of("decode")["QueueLength"], 1);
        assert_eq!(of("infer")["BusyTime"], 50.0);
        assert_eq!(of("infer")["Latency"], 50.0);
        assert_eq!(lines.len(), 3);
    }

    #[test]
    fn failures_are_counted_by_cause_and_start_again_with_the_interval() {
        let stats = stats();
        let error = TaskError::permanent(Stage::Decode, Cause::Damaged, "x");
        stats.failed(&error);
        stats.failed(&error);
        let failures = |lines: Vec<Value>| lines[0]["Failures"].clone();
        assert_eq!(
            failures(json(&stats)),
            json!({"decode damaged permanent": 2})
        );
        assert_eq!(failures(json(&stats)), json!({}));
        assert_eq!(stats.totals(), (0, 2, 0));
    }

    #[test]
    fn a_sample_stays_within_the_formats_limit() {
        let stats = stats();
        for _ in 0..5000 {
            stats.did(Stage::Store, Duration::from_millis(1));
        }
        let lines = json(&stats);
        let store = lines.iter().find(|line| line["Stage"] == "store").unwrap();
        assert_eq!(store["Latency"].as_array().unwrap().len(), 100);
        assert_eq!(store["Done"], 5000);
    }

    #[test]
    fn lines_per_image_are_bounded_per_second() {
        let stats = stats();
        let written = (0..100).filter(|_| stats.may_log_image(7)).count();
        // A new second may begin within the loop.
        assert!((7..=14).contains(&written), "{written}");
    }
}
