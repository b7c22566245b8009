//! What the whole-pipeline tests share: a deployed pipeline with a small
//! model, images to put into it, and the outside view on what comes out.

pub mod proxy;
pub mod soak;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clip_model::architecture::Architecture;
use clip_model::build::{BuildOptions, build};
use clip_model::checkpoint::{Checkpoint, Overrides};
use clip_model::synthesize::SynthesizedWeights;
use events::{CloudEvent, S3Url};
use local::deployment::{Deployment, DeploymentOptions};
use serde_json::Value;
use tempfile::TempDir;

/// The longest that anything here may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Where the bundle lies in its folder.
const BUNDLE: &str = "bundle";

/// A model of CLIP's form that is small enough to load in milliseconds, shared
/// by the pipelines that are up at the same time and removed with the last.
fn tiny_bundle() -> Arc<TempDir> {
    static SHARED: Mutex<Weak<TempDir>> = Mutex::new(Weak::new());
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    shared.upgrade().unwrap_or_else(|| {
        let folder = TempDir::new().expect("a temporary folder");
        let weights = folder.path().join("weights.safetensors");
        let architecture = Architecture::named("tiny").expect("a known model");
        SynthesizedWeights::new(architecture, 0)
            .write(&weights, &|_| {})
            .expect("weights are written");
        let checkpoint = Checkpoint::open(&weights, Overrides::default()).expect("weights");
        let options = BuildOptions {
            labels: Some(
                ["dog", "cat", "boat", "tree", "house", "bread"]
                    .map(str::to_owned)
                    .to_vec(),
            ),
            ..BuildOptions::default()
        };
        let path = folder.path().join(BUNDLE);
        build(&checkpoint, &path, &options, &|_| {}).expect("a bundle is built");
        let folder = Arc::new(folder);
        *shared = Arc::downgrade(&folder);
        folder
    })
}

/// A deployed pipeline and the folder that its logs are in.
pub struct Pipeline {
    /// The pipeline.
    pub deployment: Deployment,
    folder: TempDir,
    _bundle: Arc<TempDir>,
}

impl Pipeline {
    /// Deploys with the tiny model and times that suit a test; `adjust`
    /// changes what the test is about.
    pub async fn start(
        adjust: impl FnOnce(DeploymentOptions) -> DeploymentOptions,
    ) -> anyhow::Result<Self> {
        let folder = TempDir::new()?;
        let bundle = tiny_bundle();
        let path = bundle.path().join(BUNDLE);
        let mut options = DeploymentOptions::new(&path, folder.path())?;
        options.timings = local::cloud::Timings::fast();
        // The bundle names its model itself; deletions must not be bound to
        // the template's choice of published names.
        options
            .function_environment
            .insert("MODEL_NAME".to_owned(), String::new());
        let deployment = Deployment::start(&adjust(options)).await?;
        Ok(Self {
            deployment,
            folder,
            _bundle: bundle,
        })
    }

    /// Collects what arrives at the next middleware until `count` different
    /// documents have arrived.
    pub async fn events_of(&self, count: usize) -> anyhow::Result<Vec<Value>> {
        self.events_within(count, PATIENCE).await
    }

    /// As [`Self::events_of`], for as long as `limit` at most.
    pub async fn events_within(&self, count: usize, limit: Duration) -> anyhow::Result<Vec<Value>> {
        let started = Instant::now();
        let mut events = Vec::new();
        loop {
            events.extend(self.deployment.take_events().await?);
            let documents = by_document(&events).len();
            if documents >= count {
                return Ok(events);
            }
            ensure!(
                started.elapsed() < limit,
                "{documents} of {count} documents arrived; {}",
                self.state().await
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Collects rejections until there are `count`.
    pub async fn rejections(
        &self,
        count: usize,
    ) -> anyhow::Result<Vec<local::deployment::DeadLetter>> {
        let started = Instant::now();
        let mut rejections = Vec::new();
        loop {
            rejections.extend(self.deployment.take_rejections().await?);
            if rejections.len() >= count {
                return Ok(rejections);
            }
            ensure!(
                started.elapsed() < PATIENCE,
                "{} of {count} rejections arrived; {}",
                rejections.len(),
                self.state().await
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Waits until a task runs, and answers its process.
    pub async fn running_task(&self) -> anyhow::Result<(String, u32)> {
        let started = Instant::now();
        loop {
            let snapshot = self.deployment.cloud.snapshot();
            for task in &snapshot.tasks {
                if let Some(pid) = task.pid {
                    return Ok((task.id.clone(), pid));
                }
            }
            ensure!(
                started.elapsed() < PATIENCE,
                "no task runs; {}",
                self.state().await
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The vector that an event points to.
    pub async fn vector(&self, event: &Value) -> anyhow::Result<Vec<f32>> {
        let url = vector_url(event)?;
        let body = self
            .deployment
            .object(&url.bucket, &url.key)
            .await?
            .with_context(|| format!("{url} does not exist"))?;
        Ok(serde_json::from_slice(&body)?)
    }

    /// Waits until no message, task or instance is left.
    pub async fn back_at_zero(&self) -> anyhow::Result<()> {
        ensure!(
            self.deployment.until_idle(PATIENCE).await?,
            "the pipeline did not come to rest; {}",
            self.state().await
        );
        Ok(())
    }

    /// The keys of all vectors in the cache bucket.
    pub async fn vector_keys(&self) -> anyhow::Result<Vec<String>> {
        let mut keys = Vec::new();
        let mut pages = self
            .deployment
            .s3
            .list_objects_v2()
            .bucket(self.deployment.cache_bucket())
            .into_paginator()
            .send();
        while let Some(page) = pages.next().await {
            for object in page?.contents() {
                keys.extend(object.key().map(str::to_owned));
            }
        }
        Ok(keys)
    }

    /// What a person would look at first when a test has waited in vain.
    async fn state(&self) -> String {
        let snapshot = self.deployment.cloud.snapshot();
        let input = self
            .deployment
            .queue_counts(&self.deployment.input_queue_url())
            .await;
        let mut state = format!("input queue: {input:?}\n");
        for task in &snapshot.tasks {
            state.push_str(&format!(
                "task {}: {:?} {:?} exit {:?}\n",
                task.id, task.status, task.stopped_reason, task.exit_code
            ));
        }
        for instance in &snapshot.instances {
            state.push_str(&format!(
                "instance {}: {:?}\n",
                instance.id, instance.lifecycle
            ));
        }
        for function in ["IntakeFunction", "ScalerFunction"] {
            let lines = self
                .deployment
                .function_logs(function)
                .await
                .unwrap_or_default();
            for line in lines.iter().rev().take(8).rev() {
                state.push_str(&format!("{function}: {line:?}\n"));
            }
        }
        for task in snapshot.tasks.iter().rev().take(2) {
            let log = std::fs::read_to_string(&task.log).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(12).collect();
            for line in tail.iter().rev() {
                state.push_str(&format!("{}: {line}\n", task.id));
            }
        }
        state.push_str(&format!("logs: {}\n", self.folder.path().display()));
        state
    }

    /// Ends the pipeline.
    pub async fn stop(self) {
        self.deployment.stop().await;
    }
}

/// Events by the URL of their document.
pub fn by_document(events: &[Value]) -> BTreeMap<String, Vec<&Value>> {
    let mut documents: BTreeMap<String, Vec<&Value>> = BTreeMap::new();
    for event in events {
        let url = event["data"]["document"]["url"]
            .as_str()
            .unwrap_or_default();
        documents.entry(url.to_owned()).or_default().push(event);
    }
    documents
}

/// Where the vector of an event lies.
pub fn vector_url(event: &Value) -> anyhow::Result<S3Url> {
    let text = event["data"]["metadata"]["properties"]["attrs"]["embeddings"]["vectors"]
        .as_str()
        .with_context(|| format!("no pointer to a vector in {event}"))?;
    Ok(text.parse()?)
}

/// Fails unless the next middleware would accept the event.
pub fn check_contract(event: &Value) -> anyhow::Result<()> {
    CloudEvent::from_value(event.clone()).with_context(|| event.to_string())?;
    let call_stack = event["data"]["callStack"]
        .as_array()
        .context("a call stack")?;
    ensure!(
        call_stack.first().and_then(Value::as_str) == Some("clip-image-processor"),
        "the call stack begins with {call_stack:?}"
    );
    let properties = &event["data"]["metadata"]["properties"];
    ensure!(
        properties["kind"] == "text",
        "kind is {}",
        properties["kind"]
    );
    let embeddings = &properties["attrs"]["embeddings"];
    ensure!(embeddings["model"].is_string(), "{embeddings}");
    ensure!(embeddings["dimensions"].is_number(), "{embeddings}");
    Ok(())
}

/// Fails unless Lakechain's own SDK, which the package of `infra/cdk` has, takes the events.
pub fn check_with_sdk(events: &[&Value]) -> anyhow::Result<()> {
    let Some(package) = cdk_package("the events against Lakechain's SDK") else {
        return Ok(());
    };
    let mut check = Command::new("node")
        .current_dir(package)
        .arg("scripts/check-events.mjs")
        .stdin(Stdio::piped())
        .spawn()?;
    let mut input = check.stdin.take().context("no standard input")?;
    input.write_all(&serde_json::to_vec(events)?)?;
    drop(input);
    let status = check.wait()?;
    ensure!(status.success(), "the SDK does not take them: {status}");
    Ok(())
}

/// The folder of the package of `infra/cdk`; None, and said to `cargo xtask test`, where it is not
/// installed.
pub fn cdk_package(purpose: &str) -> Option<OsString> {
    let package = std::env::var_os("CDK_PACKAGE");
    if package.is_none() {
        // Past the test runner, which keeps what a passing test prints to itself.
        let line = format!("\nnot run: {purpose} (CDK_PACKAGE is not set)\n");
        let _ = std::io::stdout().write_all(line.as_bytes());
    }
    package
}

/// A 24-bit BMP of a pattern that depends on the seed, so that each image has
/// bytes and a vector of its own.
pub fn bmp(seed: u32, side: u32) -> Vec<u8> {
    const HEADER_BYTES: u32 = 54;
    let row_bytes = (side * 3).next_multiple_of(4);
    let size = HEADER_BYTES + row_bytes * side;
    let mut file = Vec::with_capacity(size as usize);
    file.extend_from_slice(b"BM");
    for value in [size, 0, HEADER_BYTES, 40, side, side] {
        file.extend_from_slice(&value.to_le_bytes());
    }
    file.extend_from_slice(&[1, 0, 24, 0]);
    for value in [0, row_bytes * side, 2835, 2835, 0, 0] {
        file.extend_from_slice(&u32::to_le_bytes(value));
    }
    for y in 0..side {
        let start = file.len();
        for x in 0..side {
            let mixed = (x * 7 + y * 13 + seed * 101) ^ (seed.wrapping_mul(2_654_435_761) >> 24);
            file.extend_from_slice(&[mixed as u8, (mixed / 3) as u8, (x ^ y ^ seed) as u8]);
        }
        file.resize(start + row_bytes as usize, 0);
    }
    file
}

/// Sends a signal to a process that the test may meet after its end.
pub fn signal(name: &str, pid: u32) {
    let mut kill = Command::new("kill");
    let _ = kill.args(["-s", name, &pid.to_string()]).status();
}

/// The sample images of the demo, by file name.
pub fn samples() -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/local/samples");
    let mut samples = Vec::new();
    for entry in std::fs::read_dir(&folder).expect("tools/local/samples") {
        let path = entry.expect("an entry").path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if events::ImageType::from_name(&name).is_some() {
            samples.push((name, std::fs::read(&path).expect("a readable sample")));
        }
    }
    samples
}
