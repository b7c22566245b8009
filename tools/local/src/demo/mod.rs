//! The main job, shown as it goes: images put into S3 come out as vectors in
//! the cache bucket and events at the next middleware, and the cluster goes
//! from zero to work and back to zero.

mod bundle;
mod files;
mod ledger;
mod screen;
mod stages;
mod watch;

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use events::{ImageType, S3Url};
use serde_json::Value;
use thiserror::Error;
use tokio::sync::mpsc;

pub use bundle::BundleProblem;
pub use files::{FilesError, InputFile};
pub use ledger::{Entry, Ledger, Outcome};
pub use screen::Screen;

use crate::{
    Deployment, DeploymentOptions,
    deployment::{DeployError, SOURCE_BUCKET},
    emulator::EmulatorError,
};
use bundle::ReadyBundle;
use watch::Watch;

/// Uploads at a time: enough to keep intake busy on two cores.
const PARALLEL_UPLOADS: usize = 8;
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

/// What to show.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// Files and folders; the samples without any.
    pub paths: Vec<PathBuf>,
    /// The model's name.
    pub model: String,
    /// Its bundle; one of the work folder without it.
    pub bundle: Option<PathBuf>,
    /// Never more instances than this.
    pub max_instances: usize,
    /// Models, results, logs.
    pub work_dir: PathBuf,
    /// Leave the pipeline up at the end, until Ctrl-C.
    pub keep: bool,
    /// Further parameters of the template.
    pub parameters: BTreeMap<String, String>,
}

/// Why there was nothing to show.
#[derive(Debug, Error)]
pub enum DemoError {
    /// The files.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleProblem),
    /// The emulator.
    #[error(transparent)]
    Emulator(#[from] EmulatorError),
    /// The pipeline.
    #[error(transparent)]
    Deploy(#[from] DeployError),
    /// A result could not be written.
    #[error("{path}: {source}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// How a demo ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DemoEnd {
    /// Every image has its vector, and the cluster is at zero.
    Good,
    /// Some have none, each with its reason, or the cluster is not at zero.
    SomeFailed,
    /// Ctrl-C.
    Interrupted,
}

/// Runs the demo. `interrupted` ends it early, with everything it started.
///
/// # Errors
/// When it could not begin, or results could not be written.
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
    let bundle = bundle::ready(
        options.bundle.as_deref(),
        &options.model,
        &options.work_dir,
        screen,
    )
    .await?;
    let warning = bundle
        .synthesized
        .then(|| synthesized_warning(&bundle, &options.work_dir));
    if let Some(warning) = &warning {
        screen.loud(warning);
    }
    let results = options.work_dir.join(RESULTS);
    let logs = results.join("logs");
    start_afresh(&results)?;
    let size: u64 = files
        .iter()
        .filter_map(|file| fs::metadata(&file.path).ok())
        .map(|meta| meta.len())
        .sum();
    screen.note(&format!(
        "{} files, {:.1} MB; model {} ({})",
        files.len(),
        to_megabytes(size),
        bundle.model,
        bundle.precision
    ));

    let mut deployment = DeploymentOptions::new(&bundle.folder, &logs)?
        .parameter("MaxInstances", options.max_instances)
        .parameter("ModelName", model_parameter(&bundle, options));
    deployment.parameters.extend(options.parameters.clone());
    deployment.task_environment.insert(
        "METRICS_INTERVAL_SECONDS".to_owned(),
        METRICS_INTERVAL_SECONDS.to_owned(),
    );
    screen.note("starting an emulated AWS and deploying infra/template.yaml into it");
    let pipeline = Deployment::start(&deployment).await?;
    screen.note(&format!(
        "deployed: S3, SQS, SNS, EventBridge and Lambda at {}, ECS and Auto Scaling at {}",
        pipeline.emulator.endpoint(),
        pipeline.cloud_endpoint
    ));

    let mut ledger = Ledger::new(files);
    let first_upload = Instant::now();
    let events_path = results.join("events.jsonl");
    let mut watch = Watch::new(&pipeline);
    let settled = follow(&pipeline, &mut watch, &mut ledger, screen, &events_path).await?;
    let work_time = first_upload.elapsed();
    ledger.close();

    screen.note("every image is settled; the cluster goes back to zero");
    let at_zero = until_zero(&pipeline, &mut watch, screen, &ledger).await?;
    screen.finish();

    let vectors = results.join("vectors");
    let vector_count = save_vectors(&pipeline, &ledger, &vectors).await?;
    report(screen, &ledger, work_time);
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
        events_path.display(),
        ledger.embedded()
    ));
    screen.print(&format!(
        "logs      {} (one per task, and the emulator's)",
        logs.display()
    ));
    screen.print(&format!("stages    {}", watch.stages.total()));
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
    let all_good = settled && at_zero && ledger.embedded() == ledger.entries.len();
    if options.keep {
        keep_up(&pipeline, screen).await;
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

fn synthesized_warning(bundle: &ReadyBundle, work_dir: &Path) -> Vec<String> {
    let name = bundle::folder_name(&bundle.model);
    let weights = work_dir.join(format!("{name}.safetensors"));
    vec![
        "SYNTHESISED WEIGHTS: what the vectors and labels say about an image means nothing."
            .to_owned(),
        "Everything else is real. For OpenAI's weights, on a machine that reaches the model hub:"
            .to_owned(),
        format!(
            "  cargo xtask run clip-model fetch {} --output {}",
            bundle.model,
            weights.display()
        ),
        format!(
            "  cargo xtask run clip-model build --weights {} --output {}",
            weights.display(),
            bundle.folder.display()
        ),
    ]
}

fn start_afresh(results: &Path) -> Result<(), DemoError> {
    let failed = |source| DemoError::Write {
        path: results.to_owned(),
        source,
    };
    match fs::remove_dir_all(results) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    fs::create_dir_all(results.join("vectors")).map_err(failed)
}

#[expect(clippy::cast_precision_loss, reason = "shown with one decimal")]
fn to_megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Uploads everything and follows it until each file is settled. False when
/// some never were.
async fn follow(
    pipeline: &Deployment,
    watch: &mut Watch<'_>,
    ledger: &mut Ledger,
    screen: &Screen,
    events_path: &Path,
) -> Result<bool, DemoError> {
    let write_failed = |source| DemoError::Write {
        path: events_path.to_owned(),
        source,
    };
    let mut events_file = fs::File::create(events_path).map_err(write_failed)?;
    let total = ledger.entries.len();
    let mut uploads = start_uploads(pipeline, ledger);
    let mut last_progress = Instant::now();
    let mut quiet_since: Option<Instant> = None;
    let mut logs_read: Option<Instant> = None;
    let mut uploading = true;
    screen.note(&format!("uploading {total} files to s3://{SOURCE_BUCKET}"));
    loop {
        let before = ledger.settled();
        while let Ok((index, at, result)) = uploads.try_recv() {
            ledger.uploaded(index, at, result);
        }
        if uploading && ledger.uploads() + not_uploaded(ledger) == total {
            uploading = false;
            screen.note("all uploaded");
        }
        for event in pipeline.take_events().await? {
            let line = event.to_string();
            if let Some(entry) = ledger.event(event, Instant::now()) {
                writeln!(events_file, "{line}").map_err(write_failed)?;
                if let (None, Some(Outcome::Embedded { after, .. })) =
                    (screen.columns(), &entry.outcome)
                {
                    screen.line(
                        "event",
                        &format!("{} after {:.1} s", entry.file.key, after.as_secs_f64()),
                    );
                }
            }
        }
        for rejection in pipeline.take_rejections().await? {
            match ledger.rejection(&rejection) {
                Some(entry) => show_rejected(screen, entry),
                None => screen.line(
                    "rejected",
                    &format!(
                        "{}: {}",
                        rejection.object.unwrap_or_default(),
                        rejection.reason.unwrap_or_default()
                    ),
                ),
            }
        }
        if logs_read.is_none_or(|at| at.elapsed() > LOG_INTERVAL) {
            for line in watch.intake_lines().await? {
                if let Some(entry) = ledger.intake_line(&line) {
                    show_rejected(screen, entry);
                }
            }
            watch.show_scaler(screen).await?;
            logs_read = Some(Instant::now());
        }
        watch.show_cluster(screen);
        let queue = pipeline.queue_counts(&pipeline.input_queue_url()).await?;
        screen.progress(
            ledger.settled(),
            total,
            &watch.summary(ledger.embedded(), ledger.uploads(), queue),
            &watch.stages.now(),
        );

        if ledger.settled() == total {
            return Ok(true);
        }
        if ledger.settled() > before {
            last_progress = Instant::now();
        }
        let quiet = !uploading && queue.total() == 0 && watch.is_at_rest();
        quiet_since = if quiet {
            quiet_since.or_else(|| Some(Instant::now()))
        } else {
            None
        };
        if quiet_since.is_some_and(|since| since.elapsed() > QUIET_LIMIT) {
            screen.note("the pipeline is at rest, and some files were never heard of again");
            return Ok(false);
        }
        if last_progress.elapsed() > STALL_LIMIT {
            screen.note(&format!(
                "no file was settled for {} s",
                STALL_LIMIT.as_secs()
            ));
            return Ok(false);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn not_uploaded(ledger: &Ledger) -> usize {
    ledger
        .entries
        .iter()
        .filter(|entry| entry.uploaded.is_none() && entry.outcome.is_some())
        .count()
}

fn show_rejected(screen: &Screen, entry: &Entry) {
    if let Some(Outcome::Rejected { by, reason }) = &entry.outcome {
        screen.line("rejected", &format!("{} by {by}: {reason}", entry.file.key));
    }
}

type Uploaded = (usize, Instant, Result<(), String>);

/// Uploads in the background, some at a time.
fn start_uploads(pipeline: &Deployment, ledger: &Ledger) -> mpsc::UnboundedReceiver<Uploaded> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let queue: Vec<(usize, InputFile)> = ledger
        .entries
        .iter()
        .enumerate()
        .map(|(index, entry)| (index, entry.file.clone()))
        .rev()
        .collect();
    let queue = std::sync::Arc::new(std::sync::Mutex::new(queue));
    for _ in 0..PARALLEL_UPLOADS.min(ledger.entries.len()) {
        let (s3, sender, queue) = (pipeline.s3.clone(), sender.clone(), queue.clone());
        tokio::spawn(async move {
            loop {
                let next = queue
                    .lock()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
                    .pop();
                let Some((index, file)) = next else { return };
                let result = upload(&s3, &file).await;
                // The demo was given up: nobody waits for the rest.
                if sender.send((index, Instant::now(), result)).is_err() {
                    return;
                }
            }
        });
    }
    receiver
}

async fn upload(s3: &aws_sdk_s3::Client, file: &InputFile) -> Result<(), String> {
    let content = tokio::fs::read(&file.path)
        .await
        .map_err(|error| format!("{}: {error}", file.path.display()))?;
    // As an ordinary uploader does: the type by the name.
    let content_type = ImageType::from_name(&file.key).map(|kind| kind.mime().to_owned());
    let request = s3
        .put_object()
        .bucket(SOURCE_BUCKET)
        .key(&file.key)
        .set_content_type(content_type)
        .body(content.into());
    request
        .send()
        .await
        .map(|_| ())
        .map_err(|error| format!("S3 refused it: {}", error.into_service_error()))
}

async fn until_zero(
    pipeline: &Deployment,
    watch: &mut Watch<'_>,
    screen: &Screen,
    ledger: &Ledger,
) -> Result<bool, DemoError> {
    let started = Instant::now();
    let mut logs_read = Instant::now();
    loop {
        watch.show_cluster(screen);
        if logs_read.elapsed() > LOG_INTERVAL {
            watch.show_scaler(screen).await?;
            logs_read = Instant::now();
        }
        let queue = pipeline.queue_counts(&pipeline.input_queue_url()).await?;
        screen.progress(
            ledger.settled(),
            ledger.entries.len(),
            &watch.summary(ledger.embedded(), ledger.uploads(), queue),
            &watch.stages.now(),
        );
        if watch.is_at_rest() {
            watch.show_scaler(screen).await?;
            return Ok(true);
        }
        if started.elapsed() > ZERO_LIMIT {
            return Ok(false);
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn save_vectors(
    pipeline: &Deployment,
    ledger: &Ledger,
    folder: &Path,
) -> Result<usize, DemoError> {
    let mut saved = 0;
    for entry in &ledger.entries {
        let Some(Outcome::Embedded { event, .. }) = &entry.outcome else {
            continue;
        };
        let url = embeddings(event)["vectors"].as_str().unwrap_or_default();
        let Ok(url) = url.parse::<S3Url>() else {
            continue;
        };
        let Some(content) = pipeline.object(&url.bucket, &url.key).await? else {
            continue;
        };
        let path = folder.join(format!("{}.json", entry.file.key.replace('/', "__")));
        fs::write(&path, content).map_err(|source| DemoError::Write { path, source })?;
        saved += 1;
    }
    Ok(saved)
}

fn embeddings(event: &Value) -> &Value {
    &event["data"]["metadata"]["properties"]["attrs"]["embeddings"]
}

/// The table, and whatever has no row in it.
fn report(screen: &Screen, ledger: &Ledger, work_time: Duration) {
    let mut rows = Vec::new();
    let mut failed = Vec::new();
    for entry in &ledger.entries {
        match &entry.outcome {
            Some(Outcome::Embedded { after, event }) => rows.push(vec![
                entry.file.key.clone(),
                event["data"]["document"]["type"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
                embeddings(event)["dimensions"].to_string(),
                format!("{:.1} s", after.as_secs_f64()),
                labels(event),
            ]),
            Some(Outcome::Rejected { by, reason }) => {
                failed.push(vec![entry.file.key.clone(), by.clone(), reason.clone()])
            }
            Some(Outcome::NotUploaded { reason }) => failed.push(vec![
                entry.file.key.clone(),
                "demo".to_owned(),
                reason.clone(),
            ]),
            Some(Outcome::Lost) | None => {
                failed.push(vec![
                    entry.file.key.clone(),
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
        &["object", "type", "dimensions", "time", "labels"],
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
        ledger.embedded(),
        ledger.entries.len(),
        ledger.entries.len() - ledger.embedded(),
        work_time.as_secs_f64()
    ));
    if ledger.repeated_events > 0 {
        screen.print(&format!(
            "{} event(s) were delivered more than once, as queues may",
            ledger.repeated_events
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

/// Leaves the pipeline up for trials by hand; Ctrl-C ends it.
async fn keep_up(pipeline: &Deployment, screen: &Screen) {
    screen.print("");
    screen.print("the pipeline stays up until Ctrl-C. Against it:");
    screen.print(&format!(
        "  export AWS_ENDPOINT_URL={} AWS_REGION={}",
        pipeline.emulator.endpoint(),
        crate::sdk::REGION
    ));
    screen.print(&format!(
        "  export AWS_ACCESS_KEY_ID={} AWS_SECRET_ACCESS_KEY={}",
        crate::sdk::ACCESS_KEY,
        crate::sdk::SECRET_KEY
    ));
    screen.print(&format!(
        "  export AWS_ENDPOINT_URL_ECS={0} AWS_ENDPOINT_URL_AUTO_SCALING={0}",
        pipeline.cloud_endpoint
    ));
    screen.print(&format!("  aws s3 cp photo.jpg s3://{SOURCE_BUCKET}/"));
    std::future::pending::<()>().await;
}
