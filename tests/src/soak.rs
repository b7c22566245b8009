//! The whole pipeline under a schedule of faults, and an audit of every object.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fastrand::Rng;
use futures_util::future::join_all;
use local::cloud::{ApiFault, ApiFaultKind, Task, TaskStatus};
use local::deployment::SOURCE_BUCKET;
use serde_json::{Value, json};

use crate::proxy::{Fault, Proxy};
use crate::{Pipeline, vector_url};

/// What a soak is.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub images: usize,
    /// A slow machine uploads fewer images: no more after this time.
    pub limit: Duration,
    pub seed: u64,
}

/// Objects that arrive together.
const CHUNK: usize = 50;
/// Uploads go on while fewer messages than this wait: more is more memory, not more work.
const MOST_WAITING: usize = 50_000;
/// Images of a hundred that are broken, and that are deleted again.
const BAD_PERCENT: u64 = 5;
const DELETED_PERCENT: u64 = 5;
/// Events of a hundred that come twice, and that come with a later chunk.
const TWICE_PERCENT: u64 = 3;
const LATE_PERCENT: u64 = 10;
/// What was uploaded is done in less time than this, once the faults are over, or is lost.
const DRAIN_LIMIT: Duration = Duration::from_secs(600);
/// A killed task's messages come back after this.
const VISIBILITY_SECONDS: u64 = 20;
/// Between two faults, and how long the lasting ones last.
const FAULT_EVERY: Duration = Duration::from_secs(5);
const FAULT_LASTS: Duration = Duration::from_secs(3);
/// A task that was killed earlier than this failed at its start, as the planner sees it.
const KILLABLE_AFTER: Duration = Duration::from_secs(11);
/// At most one good file of so many may be accused of killing its worker.
const MOST_ACCUSED: usize = 500;
/// A task's memory grows until it has seen this much.
const WARM_UP_SECONDS: f64 = 10.0;

/// What should become of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Embedded,
    Rejected,
    Deleted,
}

/// One of each type that decodes, then what does not.
const GOOD: [&str; 7] = [
    "bmp-1.bmp",
    "gif-1.gif",
    "jpeg-low-quality.jpg",
    "pcx-1.pcx",
    "png-p1.png",
    "tiff-1.tif",
    "webp-lossy.webp",
];
const BAD: [&str; 7] = [
    "bmp-header-only.bmp",
    "gif-no-frame.gif",
    "jpeg-text.jpg",
    "jpeg-empty.jpg",
    "png-bad-filter.png",
    "tiff-unknown-compression.tif",
    "webp-truncated.webp",
];

fn file(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../lib/image/goldens/files");
    std::fs::read(folder.join(name)).expect("a golden file")
}

struct Object {
    key: String,
    content: Vec<u8>,
    fate: Fate,
}

/// The objects in their order; every good one has bytes of its own behind its last.
fn objects(plan: Plan) -> Vec<Object> {
    let (good, bad) = (GOOD.map(file), BAD.map(file));
    let mut rng = Rng::with_seed(plan.seed);
    let one = |number: usize| {
        let fate = match rng.u64(..100) {
            draw if draw < BAD_PERCENT => Fate::Rejected,
            draw if draw < BAD_PERCENT + DELETED_PERCENT => Fate::Deleted,
            _ => Fate::Embedded,
        };
        let kind = rng.usize(..GOOD.len());
        let (name, mut content) = match fate {
            Fate::Rejected => (BAD[kind], bad[kind].clone()),
            _ => (GOOD[kind], good[kind].clone()),
        };
        if fate != Fate::Rejected {
            content.extend_from_slice(&number.to_be_bytes());
        }
        let key = format!("{number:07}-{name}");
        Object { key, content, fate }
    };
    (0..plan.images).map(one).collect()
}

fn record(name: &str, object: &Object, sequence: usize) -> Value {
    json!({
        "eventSource": "aws:s3", "eventName": name, "eventTime": chrono::Utc::now().to_rfc3339(),
        "s3": {"bucket": {"name": SOURCE_BUCKET}, "object": {
            "key": object.key, "size": object.content.len(), "sequencer": format!("{sequence:016X}"),
        }},
    })
}

/// What happened in one second.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moment {
    pub seconds: f64,
    pub uploaded: usize,
    pub settled: usize,
    pub waiting: usize,
    pub memory_mib: f64,
}

/// What came out, and how it went.
#[derive(Debug, Default)]
pub struct Report {
    pub embedded: usize,
    pub rejected: usize,
    pub deleted: usize,
    /// Good files that were working each time their worker was killed, and were taken for the
    /// cause: their letters can be sent back.
    pub accused: usize,
    /// Events beyond the first of their document.
    pub repeated: usize,
    /// What is wrong, an object a line.
    pub violations: Vec<String>,
    pub faults: BTreeMap<String, u64>,
    pub tasks: usize,
    pub curve: Vec<Moment>,
    pub took: Duration,
    /// Of the task that lived longest: seconds, and MiB and file handles an hour.
    pub longest: (f64, f64, f64),
}

impl fmt::Display for Report {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let images = self.embedded + self.rejected + self.deleted + self.accused;
        let seconds = self.took.as_secs_f64();
        writeln!(to, "| | |\n| --- | --- |")?;
        writeln!(
            to,
            "| objects | {images} in {seconds:.0} s, {:.1} a second |",
            images as f64 / seconds
        )?;
        writeln!(to, "| a vector and an event | {} |", self.embedded)?;
        writeln!(to, "| dead letter with its reason | {} |", self.rejected)?;
        writeln!(to, "| deleted, nothing left | {} |", self.deleted)?;
        writeln!(
            to,
            "| good, but accused of its worker's deaths | {} |",
            self.accused
        )?;
        writeln!(to, "| repeated events | {} |", self.repeated)?;
        for (fault, times) in &self.faults {
            writeln!(to, "| fault: {fault} | {times} |")?;
        }
        let (lived, memory, handles) = self.longest;
        writeln!(
            to,
            "| tasks | {}, the longest {lived:.0} s: memory {memory:+.1} MiB, handles {handles:+.1} an hour |",
            self.tasks
        )?;
        writeln!(to, "| **violations** | **{}** |", self.violations.len())?;
        self.violations
            .iter()
            .take(20)
            .try_for_each(|one| writeln!(to, "{one}"))
    }
}

/// Everything that the parts of a running soak share.
struct Soak<'a> {
    plan: Plan,
    objects: &'a [Object],
    pipeline: &'a Pipeline,
    proxy: Proxy,
    uploaded: AtomicUsize,
    all_told: AtomicBool,
    waiting: AtomicUsize,
    settled: AtomicUsize,
    is_over: AtomicBool,
}

/// Runs it to its end.
pub async fn run(plan: Plan) -> Result<Report> {
    let proxy = Proxy::start().await?;
    let pipeline = Pipeline::start(|mut options| {
        let task = &mut options.task_environment;
        task.insert("AWS_ENDPOINT_URL".to_owned(), proxy.endpoint().to_owned());
        task.insert(
            "VISIBILITY_TIMEOUT_SECONDS".to_owned(),
            VISIBILITY_SECONDS.to_string(),
        );
        task.insert("METRICS_INTERVAL_SECONDS".to_owned(), "60".to_owned());
        options
            .parameter("MaxInstances", 2)
            .parameter("LogLevel", "warn")
    })
    .await?;
    proxy.target(pipeline.deployment.emulator.port());
    // The soak tells intake itself, twice and in another order where it likes.
    let silence = pipeline
        .deployment
        .s3
        .put_bucket_notification_configuration();
    let nothing = aws_sdk_s3::types::NotificationConfiguration::builder().build();
    silence
        .bucket(SOURCE_BUCKET)
        .notification_configuration(nothing)
        .send()
        .await?;
    let objects = objects(plan);
    let soak = Soak {
        plan,
        objects: &objects,
        pipeline: &pipeline,
        proxy,
        uploaded: AtomicUsize::new(0),
        all_told: AtomicBool::new(false),
        waiting: AtomicUsize::new(0),
        settled: AtomicUsize::new(0),
        is_over: AtomicBool::new(false),
    };
    let began = Instant::now();
    let (uploads, faults, outcomes, watched) = tokio::join!(
        soak.upload(),
        soak.break_things(),
        soak.collect(began),
        soak.watch(began)
    );
    uploads?;
    let mut report = soak.audit(&outcomes?).await?;
    report.faults = faults?;
    report.took = began.elapsed();
    (report.curve, report.longest) = watched?;
    report.tasks = pipeline.deployment.cloud.snapshot().tasks.len();
    pipeline.stop().await;
    Ok(report)
}

/// What came out so far, by document.
#[derive(Default)]
struct Outcomes {
    /// The vector's key, and how many events there were.
    events: BTreeMap<String, (String, usize)>,
    letters: BTreeMap<String, Vec<Option<String>>>,
}

impl Soak<'_> {
    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }

    async fn upload(&self) -> Result<()> {
        let began = Instant::now();
        let mut rng = Rng::with_seed(self.plan.seed ^ 1);
        let mut late = Vec::new();
        let mut doomed: Vec<&Object> = Vec::new();
        let mut sequence = 0;
        for chunk in self.objects.chunks(CHUNK) {
            while self.waiting.load(Ordering::Relaxed) > MOST_WAITING {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            if began.elapsed() > self.plan.limit {
                break;
            }
            let puts = chunk.iter().map(|object| {
                self.pipeline
                    .deployment
                    .upload(&object.key, object.content.clone(), None)
            });
            join_all(puts)
                .await
                .into_iter()
                .collect::<Result<Vec<()>, _>>()?;
            let mut records = std::mem::take(&mut late);
            for object in std::mem::take(&mut doomed) {
                if rng.bool() {
                    doomed.push(object);
                    continue;
                }
                records.push(self.delete(object, &mut sequence).await?);
            }
            for object in chunk {
                sequence += 1;
                let created = record("ObjectCreated:Put", object, sequence);
                if rng.u64(..100) < TWICE_PERCENT {
                    late.push(created.clone());
                }
                let is_late = rng.u64(..100) < LATE_PERCENT;
                if is_late { &mut late } else { &mut records }.push(created);
                if object.fate == Fate::Deleted {
                    doomed.push(object);
                }
            }
            rng.shuffle(&mut records);
            self.tell(records).await;
            self.uploaded.fetch_add(chunk.len(), Ordering::Relaxed);
        }
        for object in doomed {
            late.push(self.delete(object, &mut sequence).await?);
        }
        self.tell(late).await;
        self.all_told.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn delete(&self, object: &Object, sequence: &mut usize) -> Result<Value> {
        let delete = self.pipeline.deployment.s3.delete_object();
        delete.bucket(SOURCE_BUCKET).key(&object.key).send().await?;
        *sequence += 1;
        Ok(record("ObjectRemoved:Delete", object, *sequence))
    }

    /// As S3 does, again and again until it was taken.
    async fn tell(&self, records: Vec<Value>) {
        let payload = json!({"Records": records});
        while let Err(error) = self
            .pipeline
            .deployment
            .invoke("IntakeFunction", &payload)
            .await
        {
            if self.is_over() {
                return;
            }
            eprintln!("intake is told again: {error}");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// One fault after the other, each kind once in every round.
    async fn break_things(&self) -> Result<BTreeMap<String, u64>> {
        let mut rng = Rng::with_seed(self.plan.seed ^ 2);
        let mut done = BTreeMap::new();
        let mut round = Vec::new();
        while !self.all_told.load(Ordering::Relaxed) {
            tokio::time::sleep(FAULT_EVERY).await;
            if round.is_empty() {
                round = (0..11).collect();
                rng.shuffle(&mut round);
            }
            let Some(kind) = round.pop() else { continue };
            let cloud = &self.pipeline.deployment.cloud;
            let newest = cloud.snapshot().tasks.into_iter().rfind(|task| {
                let lived = task.started_at.map(|at| (chrono::Utc::now() - at).to_std());
                task.status == TaskStatus::Running
                    && lived.is_some_and(|lived| lived.is_ok_and(|lived| lived > KILLABLE_AFTER))
            });
            let lasting = |fault| async move {
                self.proxy.set(Some(fault));
                tokio::time::sleep(FAULT_LASTS).await;
                self.proxy.set(None);
            };
            let name = match (kind, newest) {
                (0, Some(task)) if cloud.kill_task(&task.id) => "SIGKILL",
                (1, Some(Task { pid: Some(pid), .. })) => {
                    crate::signal("TERM", pid);
                    "SIGTERM"
                }
                (2, Some(task)) if cloud.kill_instance(&task.instance) => "lost instance",
                (0..=2, _) => continue,
                (3, _) => {
                    cloud.inject(ApiFault::share(0.3, ApiFaultKind::Throttle));
                    tokio::time::sleep(FAULT_LASTS).await;
                    cloud.clear_api_faults();
                    "ECS throttled"
                }
                (4, _) => {
                    // Twice, so that the stack is as it was.
                    for labels in ["false", "true"] {
                        let change = [("ExtractLabels".to_owned(), labels.to_owned())];
                        self.pipeline.deployment.update(change.into()).await?;
                    }
                    "stack update"
                }
                (5, _) => {
                    lasting(Fault::S3Unavailable).await;
                    "S3 503"
                }
                (6, _) => {
                    lasting(Fault::S3Slow).await;
                    "S3 slow"
                }
                (7, _) => {
                    lasting(Fault::S3Denied).await;
                    "access taken away and given back"
                }
                (8, _) => {
                    lasting(Fault::SnsThrottled).await;
                    "SNS throttled"
                }
                (9, _) => {
                    lasting(Fault::Away).await;
                    "every service restarted"
                }
                _ => {
                    lasting(Fault::ReceivedTwice).await;
                    "received twice"
                }
            };
            *done.entry(name.to_owned()).or_default() += 1;
        }
        done.insert(
            "calls that failed at S3, SNS and SQS".to_owned(),
            self.proxy.struck(),
        );
        Ok(done)
    }

    /// Takes what comes out until everything has come to its end, or the time is over.
    async fn collect(&self, began: Instant) -> Result<Outcomes> {
        let deployment = &self.pipeline.deployment;
        let input = deployment.input_queue_url();
        let mut outcomes = Outcomes::default();
        loop {
            for event in deployment.take_events().await? {
                let key = vector_url(&event)?.key;
                let url = event["data"]["document"]["url"]
                    .as_str()
                    .unwrap_or_default();
                outcomes.events.entry(url.to_owned()).or_insert((key, 0)).1 += 1;
            }
            for letter in deployment.take_rejections().await? {
                let object = letter.object.unwrap_or_default();
                outcomes
                    .letters
                    .entry(object)
                    .or_default()
                    .push(letter.reason);
            }
            let waiting = deployment.queue_counts(&input).await?.total();
            self.waiting.store(waiting, Ordering::Relaxed);
            let settled = outcomes.events.len() + outcomes.letters.len();
            self.settled.store(settled, Ordering::Relaxed);
            let all_told = self.all_told.load(Ordering::Relaxed);
            let is_idle = all_told && waiting == 0 && deployment.cloud.snapshot().live_tasks() == 0;
            let is_enough = is_idle || began.elapsed() > self.plan.limit + DRAIN_LIMIT;
            // Once more, for what came between the last look and the end.
            if is_enough && self.is_over.swap(true, Ordering::Relaxed) {
                return Ok(outcomes);
            }
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }

    /// Looks at everything once a second.
    async fn watch(&self, began: Instant) -> Result<(Vec<Moment>, (f64, f64, f64))> {
        let mut curve = Vec::new();
        let mut tasks: BTreeMap<String, Vec<[f64; 3]>> = BTreeMap::new();
        while !self.is_over() {
            let mut moment = Moment {
                seconds: began.elapsed().as_secs_f64(),
                uploaded: self.uploaded.load(Ordering::Relaxed),
                settled: self.settled.load(Ordering::Relaxed),
                waiting: self.waiting.load(Ordering::Relaxed),
                memory_mib: 0.0,
            };
            for task in self.pipeline.deployment.cloud.snapshot().tasks {
                let Some([memory_mib, handles]) = task.pid.and_then(usage_of) else {
                    continue;
                };
                moment.memory_mib += memory_mib;
                let points = tasks.entry(task.id).or_default();
                points.push([moment.seconds, memory_mib, handles]);
            }
            curve.push(moment);
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let longest = tasks.into_values().max_by_key(Vec::len).unwrap_or_default();
        let from = longest
            .first()
            .map_or(0.0, |first| first[0] + WARM_UP_SECONDS);
        let warm: Vec<[f64; 3]> = longest.into_iter().filter(|one| one[0] >= from).collect();
        let lived = warm.last().map_or(0.0, |last| last[0] - from);
        Ok((
            curve,
            (lived, 3600.0 * slope(&warm, 1), 3600.0 * slope(&warm, 2)),
        ))
    }

    /// Exactly one of the three for every object, and no vector of anything else.
    async fn audit(&self, outcomes: &Outcomes) -> Result<Report> {
        let mut report = Report::default();
        let keys: BTreeSet<String> = self.pipeline.vector_keys().await?.into_iter().collect();
        let mut owned = 0;
        for object in &self.objects[..self.uploaded.load(Ordering::Relaxed)] {
            let url = events::S3Url::new(SOURCE_BUCKET, &object.key).to_string();
            let event = outcomes.events.get(&url);
            let has_vector = event.is_some_and(|(key, _)| keys.contains(key));
            let letters = outcomes.letters.get(&url).map_or(&[][..], Vec::as_slice);
            let has_reasons = letters.iter().all(Option::is_some);
            report.repeated += event.map_or(0, |(_, times)| times - 1);
            owned += usize::from(has_vector);
            let accuses = |reason: &Option<String>| {
                let reason = reason.as_deref().unwrap_or_default();
                reason.starts_with("killed its worker")
            };
            if object.fate == Fate::Embedded && !letters.is_empty() && letters.iter().all(accuses) {
                report.accused += 1;
                continue;
            }
            let is_right = match object.fate {
                Fate::Embedded => {
                    report.embedded += 1;
                    has_vector && letters.is_empty()
                }
                Fate::Rejected => {
                    report.rejected += 1;
                    event.is_none() && !letters.is_empty() && has_reasons
                }
                Fate::Deleted => {
                    report.deleted += 1;
                    !has_vector && has_reasons
                }
            };
            if !is_right {
                let problem = format!(
                    "{:?}, {url}: event {event:?}, vector {has_vector}, letters {letters:?}",
                    object.fate
                );
                report.violations.push(problem);
            }
        }
        // An accused file may have stored its vector before its worker died.
        let orphans = keys.len() - owned;
        if orphans > report.accused {
            let problem = format!("{orphans} vectors that no event points to");
            report.violations.push(problem);
        }
        if report.accused * MOST_ACCUSED > self.objects.len() {
            let problem = format!("{} good files were accused", report.accused);
            report.violations.push(problem);
        }
        Ok(report)
    }
}

/// MiB of memory and open files of a process.
fn usage_of(pid: u32) -> Option<[f64; 2]> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let resident = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: f64 = resident.split_whitespace().next()?.parse().ok()?;
    let handles = std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    Some([kib / 1024.0, handles as f64])
}

/// Least squares, a second.
fn slope(points: &[[f64; 3]], column: usize) -> f64 {
    let count = points.len().max(1) as f64;
    let mean = |column: usize| points.iter().map(|point| point[column]).sum::<f64>() / count;
    let (x, y) = (mean(0), mean(column));
    let moment = |column: usize, mean: f64| {
        let products = points
            .iter()
            .map(|point| (point[0] - x) * (point[column] - mean));
        products.sum::<f64>()
    };
    let spread = moment(0, x);
    if spread > 0.0 {
        moment(column, y) / spread
    } else {
        0.0
    }
}

/// The run as an SVG: what was uploaded, what is done, what waits, and the tasks' memory.
pub fn draw(report: &Report, path: &Path) -> Result<()> {
    const WIDTH: f64 = 900.0;
    const HEIGHT: f64 = 200.0;
    let end = report
        .curve
        .last()
        .context("nothing was seen")?
        .seconds
        .max(1.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {}\" font-family=\"sans-serif\" font-size=\"12\">\n",
        WIDTH + 20.0,
        2.0 * HEIGHT + 70.0
    );
    type Curve = (usize, &'static str, &'static str, fn(&Moment) -> f64);
    let curves: [Curve; 4] = [
        (0, "uploaded", "#0072b2", |moment| moment.uploaded as f64),
        (0, "settled", "#009e73", |moment| moment.settled as f64),
        (0, "waiting", "#d55e00", |moment| moment.waiting as f64),
        (1, "MiB of all tasks", "#cc79a7", |moment| moment.memory_mib),
    ];
    for (index, (row, name, colour, value)) in curves.iter().enumerate() {
        let in_row = curves.iter().filter(|curve| curve.0 == *row);
        let values = in_row.flat_map(|curve| report.curve.iter().map(curve.3));
        let top = values.fold(1.0, f64::max);
        let bottom = HEIGHT + *row as f64 * (HEIGHT + 30.0) + 20.0;
        let points = report.curve.iter().map(|moment| {
            let (x, y) = (
                moment.seconds / end * WIDTH,
                bottom - value(moment) / top * HEIGHT,
            );
            format!("{:.1},{y:.1} ", x + 10.0)
        });
        let points: String = points.collect();
        writeln!(
            svg,
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\" points=\"{points}\"/>"
        )?;
        let (x, y) = (15 + 220 * index, bottom - HEIGHT - 6.0);
        writeln!(
            svg,
            "<text x=\"{x}\" y=\"{y}\" fill=\"{colour}\">{name} (top {top:.0})</text>"
        )?;
    }
    writeln!(
        svg,
        "<text x=\"10\" y=\"{}\">{end:.0} s</text>\n</svg>",
        2.0 * HEIGHT + 66.0
    )?;
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}
