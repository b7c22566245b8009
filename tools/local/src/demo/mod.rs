//! The main job, shown as it goes: images put into S3 come out as vectors in
//! the cache bucket and events at the next middleware, and the cluster goes
//! from zero to work and back to zero.

mod bundle;
mod files;
mod screen;
mod stages;
mod tally;
mod upload;
mod watch;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use events::S3Url;
use ministack::{CREDENTIALS, REGION};
use serde_json::Value;
use thiserror::Error;
use tokio::sync::mpsc;

pub use bundle::{BundleProblem, Weights};
pub use files::FilesError;

use crate::{
    Deployment, DeploymentOptions,
    deployment::{DeployError, QueueCounts, SOURCE_BUCKET},
};
use bundle::ReadyBundle;
use files::InputFile;
use screen::Screen;
use tally::{Fate, Tally, TrackedFile};
use upload::Uploaded;
use watch::Watch;

/// How often the queues, the tasks and the instances are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// How often the functions' logs are read, which costs more.
const LOG_INTERVAL: Duration = Duration::from_millis(700);
/// How often a task writes its metrics, in seconds, for the view of its stages.
const METRICS_INTERVAL_SECONDS: &str = "1";
/// When nothing is queued, running or starting for this long, what was not
/// heard of is lost. Longer than an event needs from the topic to the queue.
const QUIET_LIMIT: Duration = Duration::from_secs(20);
/// Without any file settled for this long something is broken.
const STALL_LIMIT: Duration = Duration::from_secs(600);
/// The cluster is back at zero well within this after the last image; the
/// scaler's schedule alone would take a minute or two.
const ZERO_LIMIT: Duration = Duration::from_secs(180);
/// Labels shown for an image.
const LABELS_SHOWN: usize = 5;
/// Rows of the table; the rest is in the events file.
const ROWS_SHOWN: usize = 40;
/// The folder in the work folder for one demo's results.
const RESULTS: &str = "demo";

#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// Files and folders; the samples without any.
    pub paths: Vec<PathBuf>,
    /// So many images instead, made of those files under other names.
    pub burst: Option<usize>,
    pub model: String,
    /// Its bundle; one of the work folder without it.
    pub bundle: Option<PathBuf>,
    pub weights: Weights,
    /// Never more instances than this; what the template says if one is given.
    pub max_instances: usize,
    /// The template; `infra/template.yaml` without.
    pub template: Option<PathBuf>,
    /// Models, results, logs.
    pub work_dir: PathBuf,
    /// Leave the pipeline up at the end, until Ctrl-C.
    pub keep: bool,
    pub parameters: BTreeMap<String, String>,
}

#[derive(Debug, Error)]
pub enum DemoError {
    #[error(transparent)]
    Files(#[from] FilesError),
    #[error(transparent)]
    Bundle(#[from] BundleProblem),
    #[error(transparent)]
    Emulator(#[from] ministack::StartError),
    #[error(transparent)]
    Deploy(#[from] DeployError),
    #[error("{path}: {source}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DemoEnd {
    /// Every image has its vector, and the cluster is at zero.
    Good,
    /// Some have none, each with its reason, or the cluster is not at zero.
    SomeFailed,
    Interrupted,
}

/// Runs the demo. `interrupted` ends it early, with everything it started.
pub async fn run(
    options: &DemoOptions,
    interrupted: impl Future<Output = ()>,
) -> Result<DemoEnd, DemoError> {
    let screen = Screen::new();
    tokio::select! {
        end = show(options, &screen) => end,
        () = interrupted => {
            // Dropping the demo's future has killed what it started.
            screen.finish();
            screen.print("interrupted: everything that was started is stopped");
            Ok(DemoEnd::Interrupted)
        }
    }
}

async fn show(options: &DemoOptions, screen: &Screen) -> Result<DemoEnd, DemoError> {
    let files = if options.paths.is_empty() {
        files::samples()?
    } else {
        files::collect(&options.paths)?
    };
    let files = match options.burst {
        Some(count) => files::burst(&files, count),
        None => files,
    };
    let bundle = bundle::ready(
        options.bundle.as_deref(),
        &options.model,
        options.weights,
        &options.work_dir,
        screen,
    )
    .await?;
    let warning = bundle.synthesized.then(|| synthesized_warning(&bundle));
    if let Some(warning) = &warning {
        screen.loud(warning);
    }
    let results = options.work_dir.join(RESULTS);
    let logs = results.join("logs");
    start_afresh(&results)?;
    let sizes = files
        .iter()
        .filter_map(|file| fs::metadata(&file.path).ok());
    screen.note(&format!(
        "{} files, {:.1} MB; model {} ({})",
        files.len(),
        to_megabytes(sizes.map(|file| file.len()).sum()),
        bundle.model,
        bundle.precision
    ));

    let mut deployment = DeploymentOptions::new(&bundle.folder, &logs)?;
    if let Some(template) = &options.template {
        deployment.template.clone_from(template);
    } else {
        deployment = deployment
            .parameter("MaxInstances", options.max_instances)
            .parameter("ModelName", model_parameter(&bundle, options));
    }
    deployment.parameters.extend(options.parameters.clone());
    deployment.task_environment.insert(
        "METRICS_INTERVAL_SECONDS".to_owned(),
        METRICS_INTERVAL_SECONDS.to_owned(),
    );
    let template = options.template.as_deref();
    screen.note(&format!(
        "starting an emulated AWS and deploying {} into it",
        template.map_or("infra/template.yaml".into(), Path::to_string_lossy)
    ));
    let pipeline = Deployment::start(&deployment).await?;
    screen.note(&format!(
        "deployed: S3, SQS, SNS, EventBridge and Lambda at {}, ECS and Auto Scaling at {}",
        pipeline.emulator.endpoint(),
        pipeline.cloud_endpoint
    ));

    let first_upload = Instant::now();
    let mut show = Show::new(&pipeline, screen, files, results.join("events.jsonl"))?;
    let settled = show.follow().await?;
    let work_time = first_upload.elapsed();
    show.tally.close();

    screen.note("every image is settled; the cluster goes back to zero");
    let at_zero = show.until_zero().await?;
    screen.finish();

    let vectors = results.join("vectors");
    let vector_count = save_vectors(&pipeline, &show.tally, &vectors).await?;
    print_results(screen, &show.tally, work_time);
    if !settled {
        screen.print("\nnot every file was settled: the logs below say more");
    }
    let snapshot = pipeline.cloud.snapshot();
    screen.print("");
    screen.print(&format!(
        "vectors   {} ({vector_count} files, JSON arrays of numbers)",
        vectors.display()
    ));
    screen.print(&format!(
        "events    {} ({} lines)",
        show.events_path.display(),
        show.tally.embedded()
    ));
    screen.print(&format!(
        "logs      {} (one per task, and the emulator's)",
        logs.display()
    ));
    screen.print(&format!("stages    {}", show.watch.stages.total()));
    screen.print(&format!(
        "cluster   at most {} instance(s) and {} task(s) at a time, {} and {} in all",
        snapshot.peak_instances,
        snapshot.peak_tasks,
        snapshot.instances.len(),
        snapshot.tasks.len()
    ));
    if let Some(warning) = &warning {
        screen.print("");
        screen.loud(warning);
    }
    let all_good = settled && at_zero && show.tally.embedded() == show.tally.files.len();
    if options.keep {
        show.keep().await?;
    }
    screen.print("");
    screen.print(&last_line(&pipeline, at_zero));
    pipeline.stop().await;
    Ok(if all_good {
        DemoEnd::Good
    } else {
        DemoEnd::SomeFailed
    })
}

/// The template's models; another bundle (a tiny one for trials) passes as the
/// one asked for, since the task reads the model's name from the bundle.
fn model_parameter(bundle: &ReadyBundle, options: &DemoOptions) -> String {
    const MODELS: [&str; 3] = ["ViT-B/32", "ViT-B/16", "ViT-L/14"];
    let known = MODELS.contains(&bundle.model.as_str());
    if known {
        bundle.model.clone()
    } else {
        options.model.clone()
    }
}

fn synthesized_warning(bundle: &ReadyBundle) -> Vec<String> {
    vec![
        "SYNTHESISED WEIGHTS: what the vectors and labels say about an image means nothing."
            .to_owned(),
        "Everything else is real. For OpenAI's weights, on a machine that reaches the model hub:"
            .to_owned(),
        format!(
            "  cargo xtask demo --model {} --weights published",
            bundle.model
        ),
    ]
}

fn start_afresh(results: &Path) -> Result<(), DemoError> {
    match fs::remove_dir_all(results) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(write_failed(results)(error)),
    }
    fs::create_dir_all(results.join("vectors")).map_err(write_failed(results))
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn to_megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

struct Show<'a> {
    pipeline: &'a Deployment,
    screen: &'a Screen,
    watch: Watch<'a>,
    tally: Tally,
    uploads: mpsc::UnboundedReceiver<Uploaded>,
    is_uploading: bool,
    events_path: PathBuf,
    events_file: fs::File,
    logs_read: Option<Instant>,
}

impl<'a> Show<'a> {
    /// Uploads begin here.
    fn new(
        pipeline: &'a Deployment,
        screen: &'a Screen,
        files: Vec<InputFile>,
        events_path: PathBuf,
    ) -> Result<Self, DemoError> {
        screen.note(&format!(
            "uploading {} files to s3://{SOURCE_BUCKET}",
            files.len()
        ));
        let tally = Tally::new(files);
        let events_file = fs::File::create(&events_path).map_err(write_failed(&events_path))?;
        Ok(Self {
            watch: Watch::new(pipeline),
            uploads: upload::start(pipeline, &tally),
            is_uploading: true,
            tally,
            events_path,
            events_file,
            logs_read: None,
            pipeline,
            screen,
        })
    }

    /// Takes everything that is new and tells it. Answers what is in the queue.
    async fn look(&mut self) -> Result<QueueCounts, DemoError> {
        while let Ok((index, at, result)) = self.uploads.try_recv() {
            self.tally.uploaded(index, at, result);
        }
        if self.is_uploading && self.uploads.is_closed() && self.uploads.is_empty() {
            self.is_uploading = false;
            self.screen.note("all uploaded");
        }
        for event in self.pipeline.take_events().await? {
            let line = event.to_string();
            if let Some(file) = self.tally.event(event, Instant::now()) {
                writeln!(self.events_file, "{line}").map_err(write_failed(&self.events_path))?;
                // Progress bars tell as much.
                if !self.screen.has_bars() {
                    show_embedded(self.screen, file);
                }
            }
        }
        for letter in self.pipeline.take_rejections().await? {
            match self.tally.rejection(&letter) {
                Some(file) => show_rejected(self.screen, file),
                None => self.screen.line(
                    "rejected",
                    &format!(
                        "{}: {}",
                        letter.object.unwrap_or_default(),
                        letter.reason.unwrap_or_default()
                    ),
                ),
            }
        }
        if self.logs_read.is_none_or(|at| at.elapsed() > LOG_INTERVAL) {
            for line in self.watch.intake_lines().await? {
                if let Some(file) = self.tally.intake_line(&line) {
                    show_rejected(self.screen, file);
                }
            }
            self.read_express().await?;
            self.watch.show_scaler(self.screen).await?;
            self.logs_read = Some(Instant::now());
        }
        self.watch.show_cluster(self.screen);
        let queue = self.pipeline.input_queue_url();
        let queue = self.pipeline.queue_counts(&queue).await?;
        let (embedded, uploads) = (self.tally.embedded(), self.tally.uploads());
        self.screen.progress(
            self.tally.settled(),
            self.tally.files.len(),
            &self.watch.summary(embedded, uploads, queue),
            &self.watch.stages.now(),
        );
        Ok(queue)
    }

    async fn read_express(&mut self) -> Result<(), DemoError> {
        for line in self.watch.express_lines().await? {
            self.tally.express_line(&line);
        }
        Ok(())
    }

    /// Follows the files until each is settled. False when some never were.
    async fn follow(&mut self) -> Result<bool, DemoError> {
        let mut last_progress = Instant::now();
        let mut last_noise = Instant::now();
        loop {
            let before = self.tally.settled();
            let queue = self.look().await?;
            if self.tally.settled() == self.tally.files.len() {
                return Ok(true);
            }
            if self.tally.settled() > before {
                last_progress = Instant::now();
            }
            let is_quiet = !self.is_uploading && queue.total() == 0 && self.watch.is_at_rest();
            if !is_quiet {
                last_noise = Instant::now();
            }
            if last_noise.elapsed() > QUIET_LIMIT {
                self.screen
                    .note("the pipeline is at rest, and some files were never heard of again");
                return Ok(false);
            }
            if last_progress.elapsed() > STALL_LIMIT {
                let limit = STALL_LIMIT.as_secs();
                self.screen
                    .note(&format!("no file was settled for {limit} s"));
                return Ok(false);
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    async fn until_zero(&mut self) -> Result<bool, DemoError> {
        let started = Instant::now();
        loop {
            self.look().await?;
            if self.watch.is_at_rest() {
                self.read_express().await?;
                self.watch.show_scaler(self.screen).await?;
                return Ok(true);
            }
            if started.elapsed() > ZERO_LIMIT {
                return Ok(false);
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Leaves the pipeline up for trials by hand and goes on telling what
    /// happens in it; Ctrl-C ends it.
    async fn keep(&mut self) -> Result<(), DemoError> {
        let cloud = &self.pipeline.cloud_endpoint;
        self.screen.print("");
        for line in [
            "the pipeline stays up until Ctrl-C. Against it:".to_owned(),
            format!(
                "  export AWS_ENDPOINT_URL={} AWS_REGION={REGION}",
                self.pipeline.emulator.endpoint()
            ),
            format!("  export AWS_ACCESS_KEY_ID={CREDENTIALS} AWS_SECRET_ACCESS_KEY={CREDENTIALS}"),
            format!("  export AWS_ENDPOINT_URL_ECS={cloud} AWS_ENDPOINT_URL_AUTO_SCALING={cloud}"),
            format!("  aws s3 cp photo.jpg s3://{SOURCE_BUCKET}/"),
        ] {
            self.screen.print(&line);
        }
        self.tally.open();
        loop {
            self.look().await?;
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }
}

fn write_failed(path: &Path) -> impl FnOnce(std::io::Error) -> DemoError {
    let path = path.to_owned();
    move |source| DemoError::Write { path, source }
}

fn show_embedded(screen: &Screen, file: &TrackedFile) {
    if let Some(Fate::Embedded { after, event }) = &file.fate {
        let after = after.map(|after| format!(" after {:.1} s", after.as_secs_f64()));
        let told = format!("{}{}", file.input.key, after.unwrap_or_default());
        let labels = labels(event);
        screen.line("event", &[told, labels].join("  "));
    }
}

fn show_rejected(screen: &Screen, file: &TrackedFile) {
    if let Some(Fate::Rejected { by, reason }) = &file.fate {
        screen.line("rejected", &format!("{} by {by}: {reason}", file.input.key));
    }
}

async fn save_vectors(
    pipeline: &Deployment,
    tally: &Tally,
    folder: &Path,
) -> Result<usize, DemoError> {
    let mut saved = 0;
    for file in &tally.files {
        let Some(Fate::Embedded { event, .. }) = &file.fate else {
            continue;
        };
        let url = embeddings(event)["vectors"].as_str().unwrap_or_default();
        let Ok(url) = url.parse::<S3Url>() else {
            continue;
        };
        let Some(content) = pipeline.object(&url.bucket, &url.key).await? else {
            continue;
        };
        let path = folder.join(format!("{}.json", file.input.key.replace('/', "__")));
        fs::write(&path, content).map_err(write_failed(&path))?;
        saved += 1;
    }
    Ok(saved)
}

fn embeddings(event: &Value) -> &Value {
    &event["data"]["metadata"]["properties"]["attrs"]["embeddings"]
}

fn print_results(screen: &Screen, tally: &Tally, work_time: Duration) {
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    for file in &tally.files {
        match &file.fate {
            Some(Fate::Embedded { after, event }) => rows.push(vec![
                file.input.key.clone(),
                event["data"]["document"]["type"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                embeddings(event)["dimensions"].to_string(),
                format!("{:.1} s", after.unwrap_or_default().as_secs_f64()),
                if file.is_express { "express" } else { "gpu" }.to_owned(),
                labels(event),
            ]),
            Some(Fate::Rejected { by, reason }) => {
                failed.push(vec![file.input.key.clone(), by.clone(), reason.clone()])
            }
            Some(Fate::NotUploaded { reason }) => failed.push(vec![
                file.input.key.clone(),
                "demo".to_owned(),
                reason.clone(),
            ]),
            Some(Fate::Lost) | None => {
                failed.push(vec![
                    file.input.key.clone(),
                    "-".to_owned(),
                    "LOST: neither an event nor a rejection".to_owned(),
                ]);
            }
        }
    }
    let hidden = rows.len().saturating_sub(ROWS_SHOWN);
    rows.truncate(ROWS_SHOWN);
    screen.print("");
    for line in screen::table(
        &["object", "type", "dimensions", "time", "lane", "labels"],
        &rows,
        screen.columns(),
    ) {
        screen.print(&line);
    }
    if hidden > 0 {
        screen.print(&format!("… and {hidden} more"));
    }
    if !failed.is_empty() {
        screen.print("");
        for line in screen::table(&["not embedded", "by", "reason"], &failed, None) {
            screen.print(&line);
        }
    }
    screen.print("");
    screen.print(&format!(
        "{} of {} files embedded, {} not, in {:.1} s from the first upload to the last event",
        tally.embedded(),
        tally.files.len(),
        tally.files.len() - tally.embedded(),
        work_time.as_secs_f64()
    ));
    if tally.repeated_events > 0 {
        screen.print(&format!(
            "{} event(s) were delivered more than once, as queues may",
            tally.repeated_events
        ));
    }
}

fn labels(event: &Value) -> String {
    let keywords = event["data"]["metadata"]["keywords"].as_array();
    let words: Vec<&str> = keywords
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .take(LABELS_SHOWN)
        .collect();
    words.join(", ")
}

fn last_line(pipeline: &Deployment, at_zero: bool) -> String {
    let now = pipeline.cloud.snapshot();
    let (tasks, instances) = (now.live_tasks(), now.live_instances());
    if at_zero {
        format!("the cluster is back at {tasks} tasks and {instances} instances")
    } else {
        format!("THE CLUSTER IS NOT BACK AT ZERO: {tasks} tasks and {instances} instances")
    }
}
