//! End-to-end benchmark: the same images, queue and weights through the
//! worker and through a reference worker, one after the other on the same
//! machine, with an emulated AWS. Prints a table and writes a JSON file.

mod cloud;
mod proxy;
mod worker;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;

use cloud::{Cloud, Run};
use worker::{Finished, Kind, Worker};

/// Measures the worker end to end beside a reference worker.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// A set of images, NAME=FOLDER; each folder's files are one workload.
    #[arg(long = "set", required = true)]
    sets: Vec<String>,
    /// Images per workload; a smaller folder is used again and again.
    #[arg(long)]
    images: Option<usize>,
    /// The worker's program.
    #[arg(long)]
    gpu_task: PathBuf,
    /// The model bundle.
    #[arg(long)]
    bundle: PathBuf,
    /// A Python with ministack in it; it is started and stopped here.
    #[arg(long)]
    ministack: PathBuf,
    /// A Python with torch, openai-clip, boto3 and Pillow: the reference
    /// worker. Without it the reference is left out, and the table says so.
    #[arg(long)]
    reference: Option<PathBuf>,
    /// The weights of the bundle, for the reference worker.
    #[arg(long, requires = "reference")]
    weights: Option<PathBuf>,
    /// The labels of the bundle, for the reference worker.
    #[arg(long)]
    labels: Option<PathBuf>,
    /// Latency added to each S3 request, in milliseconds.
    #[arg(long, default_value_t = 0)]
    s3_latency_ms: u64,
    /// Rounds; each runs every worker once, so that a noisy machine is noisy
    /// for all of them.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Variables for the worker, NAME=VALUE.
    #[arg(long = "env")]
    variables: Vec<String>,
    /// Where the figures go as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where the worker's logs and metrics go.
    #[arg(long, default_value = ".")]
    logs: PathBuf,
    /// Seconds that one run may take.
    #[arg(long, default_value_t = 600)]
    limit: u64,
}

/// The figures of one run.
#[derive(Clone, Debug, Serialize)]
struct Figures {
    set: String,
    worker: &'static str,
    round: usize,
    s3_latency_ms: u64,
    images: usize,
    /// Between the first vector and the last deletion.
    images_per_second: f64,
    start_to_first_vector_seconds: f64,
    total_seconds: f64,
    cpu_seconds_per_image: f64,
    peak_memory_mb: f64,
    vectors: usize,
    events: usize,
    exit_code: Option<i32>,
    stop_seconds: f64,
    /// Worst relative L2 distance to the reference's vector of the same image.
    worst_relative_l2: Option<f64>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    std::fs::create_dir_all(&arguments.logs)?;
    let cloud = Cloud::start(&arguments.ministack, &arguments.logs).await?;
    let mut workers = Vec::new();
    if let (Some(python), Some(weights)) = (&arguments.reference, &arguments.weights) {
        workers.push(Worker {
            kind: Kind::Reference,
            program: python.clone(),
            variables: vec![
                ("WEIGHTS".to_owned(), path_text(weights)),
                (
                    "LABELS".to_owned(),
                    arguments
                        .labels
                        .as_deref()
                        .map(path_text)
                        .unwrap_or_default(),
                ),
            ],
        });
    } else {
        println!("reference worker: left out (no --reference and --weights given)");
    }
    workers.push(Worker {
        kind: Kind::Task,
        program: arguments.gpu_task.clone(),
        variables: task_variables(&arguments)?,
    });
    let mut all = Vec::new();
    for set in &arguments.sets {
        let (name, folder) = set
            .split_once('=')
            .with_context(|| format!("--set {set:?} is not NAME=FOLDER"))?;
        let files = files(Path::new(folder))?;
        let count = arguments.images.unwrap_or(files.len());
        cloud.upload(name, &files).await?;
        for round in 1..=arguments.rounds {
            let mut reference: Option<Vectors> = None;
            for worker in &workers {
                let run = cloud.prepare(name, &files, count).await?;
                let finished = measure(&arguments, &cloud, &run, worker).await?;
                let vectors = cloud.vectors(&run).await?;
                let figures = Figures {
                    set: name.to_owned(),
                    worker: worker.kind.name(),
                    round,
                    s3_latency_ms: arguments.s3_latency_ms,
                    images: count,
                    images_per_second: (count.max(2) - 1) as f64
                        / (finished.done - finished.first_vector).as_secs_f64(),
                    start_to_first_vector_seconds: finished.first_vector.as_secs_f64(),
                    total_seconds: finished.done.as_secs_f64(),
                    cpu_seconds_per_image: finished.cpu.as_secs_f64() / count as f64,
                    peak_memory_mb: finished.peak_bytes as f64 / 1e6,
                    vectors: vectors.len(),
                    events: cloud.count_events(&run).await?,
                    exit_code: finished.exit_code,
                    stop_seconds: finished.stop.as_secs_f64(),
                    worst_relative_l2: reference.as_ref().map(|one| worst(one, &vectors)),
                };
                print_row(&figures);
                if worker.kind == Kind::Reference {
                    reference = Some(vectors);
                }
                all.push(figures);
            }
        }
    }
    print_table(&all);
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&all)?)?;
    }
    Ok(())
}

/// Vectors by the URL of their document.
type Vectors = BTreeMap<String, Vec<f32>>;

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn task_variables(arguments: &Arguments) -> Result<Vec<(String, String)>> {
    let mut variables = vec![
        ("MODEL_PATH".to_owned(), path_text(&arguments.bundle)),
        ("METRICS_INTERVAL_SECONDS".to_owned(), "5".to_owned()),
    ];
    for pair in &arguments.variables {
        let (name, value) = pair
            .split_once('=')
            .with_context(|| format!("--env {pair:?} is not NAME=VALUE"))?;
        variables.push((name.to_owned(), value.to_owned()));
    }
    Ok(variables)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        bail!("{} holds no file", folder.display());
    }
    Ok(files)
}

async fn measure(
    arguments: &Arguments,
    cloud: &Cloud,
    run: &Run,
    worker: &Worker,
) -> Result<Finished> {
    let latency = Duration::from_millis(arguments.s3_latency_ms);
    let proxy = if latency.is_zero() {
        None
    } else {
        Some(proxy::start(cloud.port, latency).await?)
    };
    let s3_endpoint = match proxy {
        Some(port) => format!("http://127.0.0.1:{port}"),
        None => cloud.endpoint.clone(),
    };
    let limit = Duration::from_secs(arguments.limit);
    worker
        .run(cloud, run, &s3_endpoint, &arguments.logs, limit)
        .await
}

/// The worst relative L2 distance over the images that both have.
fn worst(reference: &Vectors, vectors: &Vectors) -> f64 {
    let mut worst = 0.0f64;
    for (url, expected) in reference {
        let Some(found) = vectors.get(url) else {
            return f64::INFINITY;
        };
        let squares = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
        let pairs = expected.iter().zip(found);
        let distance = squares(&mut pairs.map(|(a, b)| f64::from(a - b))).sqrt();
        let length = squares(&mut expected.iter().map(|a| f64::from(*a))).sqrt();
        worst = worst.max(distance / length);
    }
    worst
}

fn print_row(figures: &Figures) {
    println!(
        "{} {} round {}: {:.2} images/s, first vector {:.2} s, {:.3} CPU-s/image, peak {:.0} MB, \
         {} vectors, {} events, stopped in {:.2} s with {:?}{}",
        figures.set,
        figures.worker,
        figures.round,
        figures.images_per_second,
        figures.start_to_first_vector_seconds,
        figures.cpu_seconds_per_image,
        figures.peak_memory_mb,
        figures.vectors,
        figures.events,
        figures.stop_seconds,
        figures.exit_code,
        figures
            .worst_relative_l2
            .map(|worst| format!(", worst relative L2 {worst:.1e}"))
            .unwrap_or_default(),
    );
}

/// Medians over the rounds.
fn print_table(all: &[Figures]) {
    println!(
        "\n| set | worker | images/s | start to first vector | CPU-s per image | peak memory |"
    );
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut seen = Vec::new();
    for figures in all {
        let key = (figures.set.clone(), figures.worker);
        if seen.contains(&key) {
            continue;
        }
        let same: Vec<&Figures> = all
            .iter()
            .filter(|one| one.set == key.0 && one.worker == key.1)
            .collect();
        let median = |value: fn(&Figures) -> f64| {
            let mut values: Vec<f64> = same.iter().map(|one| value(one)).collect();
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        println!(
            "| {} | {} | {:.2} | {:.2} s | {:.3} | {:.0} MB |",
            key.0,
            key.1,
            median(|one| one.images_per_second),
            median(|one| one.start_to_first_vector_seconds),
            median(|one| one.cpu_seconds_per_image),
            median(|one| one.peak_memory_mb),
        );
        seen.push(key);
    }
}
