//! End-to-end benchmark: the same images, queue and weights through the
//! worker and through a reference worker, one after the other on the same
//! machine, with an emulated AWS. Prints a table and writes a JSON file.

mod cloud;
mod preparation;
mod proxy;
mod stages;
mod worker;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;

use cloud::{Cloud, Run};
use preparation::PreparationFigures;
use stages::StageFigures;
use worker::{Finished, Kind, Worker};

/// Measures the worker end to end beside a reference worker, and beside its
/// floors: the model beside this machine's matrix-product ceiling, decoding
/// alone, and what the emulated AWS gives to a worker that computes nothing.
///
/// What is not given is made: weights from a seed, a bundle from them, and
/// images from gradients and noise, all kept in the work folder.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// A set of images: NAME=FOLDER, or a NAME that is made here: mixed (43
    /// photos of 0.3 to 20 megapixels), web (43 of at most 1024 pixels), small
    /// (10,000 of 64 to 128 pixels), giant (20 of 100 megapixels). Repeatable.
    /// [default: mixed and web]
    #[arg(long = "set")]
    sets: Vec<String>,
    /// Images per workload; a smaller folder is used again and again. At least
    /// 200 are worth it: a batch is as good as done when its first vector is
    /// seen, which flatters short runs. [default: each file of a small set five
    /// times, of a set of 200 files or more once]
    #[arg(long)]
    images: Option<usize>,
    /// The worker's program; by default the one beside this program.
    #[arg(long)]
    gpu_task: Option<PathBuf>,
    /// The model compiler; by default the one beside this program.
    #[arg(long)]
    clip_model: Option<PathBuf>,
    /// Weights in safetensors form, for both workers; synthesised by default.
    #[arg(long)]
    weights: Option<PathBuf>,
    /// The program `ministack`; it is started and stopped here.
    #[arg(long, env = "LOCAL_MINISTACK")]
    ministack: PathBuf,
    /// A Python with torch, openai-clip, boto3 and Pillow: the reference
    /// worker. Without it the reference is left out, and the output says so.
    #[arg(long, env = "REFERENCE_PYTHON")]
    reference: Option<PathBuf>,
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
    /// Where the figures go as JSON; by default bench.json in the work folder.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Where everything made here is kept, logs included.
    #[arg(long, default_value = "target/bench")]
    work: PathBuf,
    /// Seconds that one run may take.
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// Leaves out the model's own benchmark.
    #[arg(long)]
    no_model: bool,
    /// Leaves out the reference worker.
    #[arg(long)]
    no_reference: bool,
}

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
    /// Between the first vector and the last deletion.
    cpu_seconds_per_image: f64,
    /// Start included.
    cpu_seconds_in_all: f64,
    peak_memory_mb: f64,
    vectors: usize,
    events: usize,
    duplicate_events: usize,
    /// Messages in the dead-letter queue.
    rejected: u64,
    /// Documents with neither a vector nor a rejection.
    lost: usize,
    exit_code: Option<i32>,
    stop_seconds: f64,
    /// Worst relative L2 distance to the reference's vector of the same image.
    worst_relative_l2: Option<f64>,
    /// By the worker's own metrics.
    stages: Vec<StageFigures>,
}

/// What bounds a set on this machine.
#[derive(Clone, Debug, Serialize)]
struct Floors {
    set: String,
    preparation: PreparationFigures,
    /// What the emulated AWS gives to a worker that computes nothing.
    emulator_images_per_second: f64,
    /// Preparation (exact) and model on all cores, with nothing else to do.
    compute_images_per_second: Option<f64>,
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    std::fs::create_dir_all(&arguments.work)?;
    let reference = arguments
        .reference
        .as_ref()
        .filter(|python| !arguments.no_reference && python.exists());
    let clip_model = beside(&arguments.clip_model, "clip-model")?;
    let (weights, bundle) = model(&arguments, &clip_model)?;
    let sets = sets(&arguments)?;
    let mut results = Results::default();
    if !arguments.no_model {
        results.model = Some(model_figures(&clip_model, &bundle)?);
    }
    let cloud = Cloud::start(&arguments.ministack, &arguments.work).await?;
    let mut workers = Vec::new();
    match reference {
        Some(python) => workers.push(Worker {
            kind: Kind::Reference,
            program: python.clone(),
            variables: vec![
                ("WEIGHTS".to_owned(), path_text(&weights)),
                ("LABELS".to_owned(), path_text(&labels(&arguments.work)?)),
            ],
        }),
        None => {
            println!("reference worker: LEFT OUT (REFERENCE_PYTHON names no Python with PyTorch)")
        }
    }
    workers.push(Worker {
        kind: Kind::Task,
        program: beside(&arguments.gpu_task, "gpu-task")?,
        variables: task_variables(&arguments, &bundle)?,
    });
    let mut all = Vec::new();
    for (name, folder) in &sets {
        let files = files(folder)?;
        let count = arguments.images.unwrap_or(match files.len() {
            few @ ..SMALL_SET => few * REPEATS,
            many => many,
        });
        cloud.upload(name, &files).await?;
        let floors = floors(&cloud, name, &files, results.model.as_ref()).await?;
        print_floors(&floors);
        results.floors.push(floors);
        for round in 1..=arguments.rounds {
            let mut reference: Option<Vectors> = None;
            for worker in &workers {
                let run = cloud.prepare(name, &files, count).await?;
                let finished = measure(&arguments, &cloud, &run, worker).await?;
                let vectors = cloud.vectors(&run).await?;
                let published = cloud.published(&run).await?;
                let rejected = cloud.backlog(&run.dead_letters).await?;
                let working = (finished.done - finished.first_vector).as_secs_f64();
                let stages = match worker.kind {
                    Kind::Task => {
                        let output = arguments.work.join("gpu-task.stdout");
                        stages::read(&output, finished.done.as_secs_f64())?
                    }
                    Kind::Reference => Vec::new(),
                };
                let figures = Figures {
                    set: name.clone(),
                    worker: worker.kind.name(),
                    round,
                    s3_latency_ms: arguments.s3_latency_ms,
                    images: count,
                    images_per_second: (count.max(2) - 1) as f64 / working,
                    start_to_first_vector_seconds: finished.first_vector.as_secs_f64(),
                    total_seconds: finished.done.as_secs_f64(),
                    cpu_seconds_per_image: finished.working_cpu.as_secs_f64()
                        / (count.max(2) - 1) as f64,
                    cpu_seconds_in_all: finished.cpu.as_secs_f64(),
                    peak_memory_mb: finished.peak_bytes as f64 / 1e6,
                    vectors: vectors.len(),
                    events: published.events,
                    duplicate_events: published.duplicates,
                    rejected,
                    lost: run
                        .documents
                        .saturating_sub(vectors.len() + rejected as usize),
                    exit_code: finished.exit_code,
                    stop_seconds: finished.stop.as_secs_f64(),
                    worst_relative_l2: reference.as_ref().map(|one| worst(one, &vectors)),
                    stages,
                };
                print_row(&figures);
                if !figures.stages.is_empty() {
                    stages::print(&figures.stages);
                }
                if worker.kind == Kind::Reference {
                    reference = Some(vectors);
                }
                all.push(figures);
            }
        }
    }
    print_table(&all);
    let lost: usize = all.iter().map(|figures| figures.lost).sum();
    results.end_to_end = all;
    let path = arguments
        .json
        .clone()
        .unwrap_or_else(|| arguments.work.join("bench.json"));
    std::fs::write(&path, serde_json::to_string_pretty(&results)?)?;
    println!("\nfigures: {}", path.display());
    if lost > 0 {
        bail!("{lost} images were lost: neither a vector nor a rejection tells of them");
    }
    Ok(())
}

#[derive(Default, Serialize)]
struct Results {
    end_to_end: Vec<Figures>,
    floors: Vec<Floors>,
    /// What `clip-model bench --json` says.
    model: Option<serde_json::Value>,
}

/// A program: the one that is given, or the one beside this one.
fn beside(given: &Option<PathBuf>, name: &str) -> Result<PathBuf> {
    let path = match given {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name(name),
    };
    if !path.exists() {
        bail!(
            "{} is not there; build it with the same profile",
            path.display()
        );
    }
    Ok(path)
}

/// Runs a program to its end and fails if it does.
fn run_program(command: &mut Command) -> Result<()> {
    let status = command
        .status()
        .with_context(|| format!("starting {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}

/// The weights and the bundle made of them.
fn model(arguments: &Arguments, clip_model: &Path) -> Result<(PathBuf, PathBuf)> {
    let weights = match &arguments.weights {
        Some(weights) => weights.clone(),
        None => {
            let weights = arguments.work.join("vit-b-32.safetensors");
            if !weights.exists() {
                let mut command = Command::new(clip_model);
                command.args(["synthesize", "ViT-B/32", "--seed", "0", "--output"]);
                run_program(command.arg(&weights))?;
            }
            weights
        }
    };
    let name = weights.file_stem().unwrap_or_default().to_string_lossy();
    let bundle = arguments.work.join(format!("bundle-{name}"));
    if !bundle.join("manifest.json").exists() {
        let mut command = Command::new(clip_model);
        command.arg("build").arg("--weights").arg(&weights);
        run_program(command.arg("--output").arg(&bundle))?;
    }
    Ok((weights, bundle))
}

/// Sets that can be made here, with their numbers of images. Mixed and web
/// have as many as the first measurement of the original had.
const SETS: [(&str, usize); 4] = [("mixed", 43), ("web", 43), ("small", 10_000), ("giant", 20)];

/// Sets with fewer files are used `REPEATS` times.
const SMALL_SET: usize = 200;
const REPEATS: usize = 5;

/// The sets that are measured when none is named.
const DEFAULT_SETS: [&str; 2] = ["mixed", "web"];

fn sets(arguments: &Arguments) -> Result<Vec<(String, PathBuf)>> {
    let mut names: Vec<&str> = arguments.sets.iter().map(String::as_str).collect();
    if names.is_empty() {
        names.extend(DEFAULT_SETS);
    }
    let mut sets = Vec::new();
    for name in names {
        match name.split_once('=') {
            Some((name, folder)) => sets.push((name.to_owned(), PathBuf::from(folder))),
            None => sets.push((name.to_owned(), make_set(arguments, name)?)),
        }
    }
    Ok(sets)
}

/// Makes the images of a set; those that are there stay.
fn make_set(arguments: &Arguments, name: &str) -> Result<PathBuf> {
    let Some((_, count)) = SETS.iter().find(|(known, _)| *known == name) else {
        let known = SETS.map(|(known, _)| known).join(", ");
        bail!("--set {name:?} is neither NAME=FOLDER nor one of {known}");
    };
    let python = arguments.reference.as_ref().context(
        "images are made with REFERENCE_PYTHON, which is not set; use --set NAME=FOLDER",
    )?;
    let script = arguments.work.join("photos.py");
    std::fs::write(&script, include_str!("../photos.py"))?;
    let folder = arguments.work.join(name);
    let mut command = Command::new(python);
    command.arg(&script).arg(&folder).arg(name);
    run_program(command.arg(count.to_string()))?;
    Ok(folder)
}

/// Images that pass through the emulator while its ceiling is measured.
const CEILING_IMAGES: usize = 400;

/// Measures what bounds a set. Of many files every so-manieth is decoded.
async fn floors(
    cloud: &Cloud,
    name: &str,
    files: &[PathBuf],
    model: Option<&serde_json::Value>,
) -> Result<Floors> {
    let step = files.len().div_ceil(CEILING_IMAGES);
    let some: Vec<PathBuf> = files.iter().step_by(step).cloned().collect();
    let preparation = tokio::task::spawn_blocking(move || preparation::measure(&some)).await??;
    let run = cloud.prepare(name, files, CEILING_IMAGES).await?;
    let emulator_images_per_second = cloud.ceiling(&run, CEILING_IMAGES).await?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
    let model_ms = model.and_then(fastest_on_one_thread);
    Ok(Floors {
        set: name.to_owned(),
        preparation,
        emulator_images_per_second,
        compute_images_per_second: model_ms
            .map(|model_ms| cores * 1e3 / (preparation.exact_ms + model_ms)),
    })
}

/// Milliseconds per image of the model's best batch on one thread.
fn fastest_on_one_thread(model: &serde_json::Value) -> Option<f64> {
    let figures = model["figures"].as_array()?;
    figures
        .iter()
        .filter(|figure| figure["threads"] == 1)
        .filter_map(|figure| figure["ms_per_image"].as_f64())
        .min_by(f64::total_cmp)
}

fn print_floors(floors: &Floors) {
    print!(
        "{} floors: decode and prepare {:.2} ms (fast {:.2} ms) of processor time per image; the emulated AWS alone \
         {:.0} images/s",
        floors.set,
        floors.preparation.exact_ms,
        floors.preparation.fast_ms,
        floors.emulator_images_per_second
    );
    match floors.compute_images_per_second {
        Some(rate) => println!("; preparing and the model on all cores {rate:.1} images/s"),
        None => println!(),
    }
}

fn labels(work: &Path) -> Result<PathBuf> {
    let path = work.join("labels.txt");
    std::fs::write(&path, include_str!("../../../lib/model/labels.txt"))?;
    Ok(path)
}

fn model_figures(clip_model: &Path, bundle: &Path) -> Result<serde_json::Value> {
    let output = Command::new(clip_model)
        .args(["bench", "--json"])
        .arg(bundle)
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("clip-model bench ended with {}", output.status);
    }
    let figures: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    println!("{}", serde_json::to_string_pretty(&figures)?);
    Ok(figures)
}

/// Vectors by the URL of their document.
type Vectors = BTreeMap<String, Vec<f32>>;

fn path_text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn task_variables(arguments: &Arguments, bundle: &Path) -> Result<Vec<(String, String)>> {
    let mut variables = vec![
        ("MODEL_PATH".to_owned(), path_text(bundle)),
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
        .run(cloud, run, &s3_endpoint, &arguments.work, limit)
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
         {} vectors, {} events ({} duplicates), {} rejected, {} lost, stopped in {:.2} s with {:?}{}",
        figures.set,
        figures.worker,
        figures.round,
        figures.images_per_second,
        figures.start_to_first_vector_seconds,
        figures.cpu_seconds_per_image,
        figures.peak_memory_mb,
        figures.vectors,
        figures.events,
        figures.duplicate_events,
        figures.rejected,
        figures.lost,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_needs_nothing_that_a_run_needs() {
        let asked = Arguments::try_parse_from(["pipeline-bench", "--help"]);
        let kind = asked.err().map(|error| error.kind());
        assert_eq!(kind, Some(clap::error::ErrorKind::DisplayHelp));
    }
}
