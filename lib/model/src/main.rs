//! `clip-model`: gets weights, compiles them into a bundle, and looks into bundles.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Parser, Subcommand};
use clip_model::architecture::{Architecture, KNOWN_MODELS};
use clip_model::build::{BuildOptions, Step, build};
use clip_model::bundle::Bundle;
use clip_model::checkpoint::{Checkpoint, Overrides};
use clip_model::engine::{EngineOptions, ExecutionProvider, TextEngine, VisionEngine};
use clip_model::labels::parse_list;
use clip_model::synthesize::SynthesizedWeights;
use clip_model::{Precision, WeightsOrigin, bench, blocks, fetch};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// Gets CLIP weights and compiles them into the bundle that the task loads.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Download the published OpenAI weights of a model (ViT-B/32, ViT-B/16, ViT-L/14).
    ///
    /// Checked against the hub's own SHA-256; an interrupted download goes on where it stopped.
    /// HF_ENDPOINT names another hub, HF_TOKEN an access token.
    Fetch {
        /// The model.
        name: String,
        /// Where the weights go [default: the name, with `-` for `/`, and `.safetensors`].
        #[arg(long)]
        output: Option<PathBuf>,
    },
    /// Make weights of a model's shape from a seed, for machines that cannot reach the hub.
    ///
    /// Speed, memory and numerics are the real model's; what they say about an image means nothing.
    Synthesize {
        /// The model: ViT-B/32, ViT-B/16, ViT-L/14 or tiny.
        name: String,
        /// Each seed has its own weights, the same on every machine.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Where the weights go [default: the name, with `-` for `/`, the seed and `.safetensors`].
        #[arg(long)]
        output: Option<PathBuf>,
    },
    /// Compile weights into a bundle: graphs, tokenizer, labels and manifest.
    ///
    /// Labels are embedded with the text tower, which needs ONNX Runtime (ORT_DYLIB_PATH).
    Build(BuildArguments),
    /// Say what a bundle is.
    Inspect {
        /// The bundle's folder.
        folder: PathBuf,
        /// Compare the digest of every file with the manifest.
        #[arg(long)]
        verify: bool,
    },
    /// Print the vectors of texts or of prepared pixels, one JSON line each.
    Embed {
        /// The bundle's folder.
        folder: PathBuf,
        /// The texts.
        #[arg(required_unless_present = "pixels")]
        texts: Vec<String>,
        /// Raw RGB bytes of one or more square images of the model's size, one after the other.
        #[arg(long, conflicts_with = "texts")]
        pixels: Option<PathBuf>,
        #[command(flatten)]
        engine: EngineArguments,
    },
    /// Measure the vision tower beside the machine's matrix-product ceiling.
    Bench {
        /// The bundle's folder.
        folder: PathBuf,
        #[command(flatten)]
        plan: bench::Plan,
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct BuildArguments {
    /// Weights in safetensors form, in OpenAI's, OpenCLIP's or Hugging Face's layout.
    #[arg(long)]
    weights: PathBuf,
    /// The bundle's folder; one that is there is replaced.
    #[arg(long)]
    output: PathBuf,
    /// fp32 for CPUs, fp16 for GPUs, int8 for CPUs that may trade exactness for speed.
    #[arg(long, value_enum, default_value_t = Precision::Fp32)]
    precision: Precision,
    /// A list of labels, one per line, in place of the built-in one.
    #[arg(long, conflicts_with_all = ["no_labels", "vision_only"])]
    labels: Option<PathBuf>,
    /// Leave the labels out, which needs no ONNX Runtime.
    #[arg(long)]
    no_labels: bool,
    /// Leave the text tower, the tokenizer and the labels out.
    #[arg(long)]
    vision_only: bool,
    #[command(flatten)]
    overrides: Overrides,
}

#[derive(Args)]
struct EngineArguments {
    /// What computes.
    #[arg(long, env = "EXECUTION_PROVIDER", value_enum, default_value_t)]
    provider: ExecutionProvider,
    /// Threads that share an operator [default: all cores].
    #[arg(long)]
    threads: Option<usize>,
}

impl EngineArguments {
    fn options(&self) -> EngineOptions {
        EngineOptions {
            provider: self.provider,
            intra_threads: self.threads,
            ..EngineOptions::default()
        }
    }
}

/// Labels printed with an image's vector, as many as the task writes into an event.
const SHOWN_LABELS: usize = 5;

type Outcome = Result<(), Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { clip_model::engine::disable_telemetry() };
    let outcome = match Arguments::parse().command {
        Command::Fetch { name, output } => run_fetch(&name, output),
        Command::Synthesize { name, seed, output } => run_synthesize(&name, seed, output),
        Command::Build(arguments) => run_build(&arguments),
        Command::Inspect { folder, verify } => run_inspect(&folder, verify),
        Command::Embed {
            folder,
            texts,
            pixels,
            engine,
        } => match pixels {
            Some(pixels) => run_embed_pixels(&folder, &pixels, &engine.options()),
            None => run_embed(&folder, &texts, &engine.options()),
        },
        Command::Bench { folder, plan, json } => run_bench(&folder, &plan, json),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A bar over bytes.
fn byte_bar(total: u64, message: &str) -> ProgressBar {
    let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
    bar(total, message, style)
}

fn bar(total: u64, message: &str, style: &str) -> ProgressBar {
    let bar = ProgressBar::new(total).with_message(message.to_owned());
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

fn file_name(model: &str, suffix: &str) -> PathBuf {
    PathBuf::from(format!("{}{suffix}.safetensors", model.replace('/', "-")))
}

fn run_fetch(name: &str, output: Option<PathBuf>) -> Outcome {
    let output = output.unwrap_or_else(|| file_name(name, ""));
    let endpoint = fetch::endpoint();
    let bar = byte_bar(0, name);
    let told = Cell::new(None);
    let receipt = fetch::fetch(name, &endpoint, &output, &|progress| {
        bar.set_length(progress.total);
        bar.set_position(progress.received);
        // Without a terminal the bar is not shown.
        let tenth = 10 * progress.received / progress.total.max(1);
        if bar.is_hidden() && told.replace(Some(tenth)) != Some(tenth) {
            let (received, total) = (HumanBytes(progress.received), HumanBytes(progress.total));
            eprintln!("{name} from {endpoint}: {received} of {total}");
        }
    })?;
    bar.finish_and_clear();
    println!(
        "{}: {} of {}, sha256 {}",
        output.display(),
        receipt.file,
        receipt.repository,
        receipt.sha256
    );
    Ok(())
}

fn run_synthesize(name: &str, seed: u64, output: Option<PathBuf>) -> Outcome {
    let Some(architecture) = Architecture::named(name) else {
        return Err(format!(
            "unknown model `{name}`; known are {}",
            KNOWN_MODELS.join(", ")
        )
        .into());
    };
    let output = output.unwrap_or_else(|| file_name(name, &format!("-seed{seed}")));
    let weights = SynthesizedWeights::new(architecture, seed);
    let bar = byte_bar(weights.bytes(), name);
    weights.write(&output, &|written| bar.set_position(written))?;
    bar.finish_and_clear();
    println!(
        "{}: {name}, {} bytes",
        output.display(),
        std::fs::metadata(&output)?.len()
    );
    warn_of_synthesis(&WeightsOrigin::Synthesized { seed });
    Ok(())
}

fn run_build(arguments: &BuildArguments) -> Outcome {
    let started = Instant::now();
    let checkpoint = Checkpoint::open(&arguments.weights, arguments.overrides)?;
    for assumption in checkpoint.assumptions() {
        eprintln!("note: nothing beside the weights says otherwise, so assumed: {assumption}");
    }
    let mut options = BuildOptions {
        precision: arguments.precision,
        vision_only: arguments.vision_only,
        ..BuildOptions::default()
    };
    if let Some(path) = &arguments.labels {
        let text = std::fs::read_to_string(path)
            .map_err(|error| format!("cannot read the labels {}: {error}", path.display()))?;
        options.labels = Some(parse_list(&text));
    }
    if arguments.no_labels || arguments.vision_only {
        options.labels = None;
    } else {
        // Before minutes of work, not after.
        clip_model::engine::environment().map_err(clip_model::build::BuildError::Engine)?;
    }
    let architecture = checkpoint.architecture();
    let bar = bar(
        blocks(architecture, !arguments.vision_only),
        &architecture.name(),
        "{msg} {wide_bar} {pos}/{len} blocks {elapsed}",
    );
    let bundle = build(
        &checkpoint,
        &arguments.output,
        &options,
        &|step| match step {
            Step::Block => bar.inc(1),
            Step::Labels => bar.set_message("labels"),
            Step::Digests => bar.set_message("digests"),
        },
    )?;
    bar.finish_and_clear();
    describe(&bundle);
    if bundle.manifest().precision == Precision::Fp32 {
        eprintln!("note: fp32 is for CPUs; for GPUs build with `--precision fp16`");
    }
    println!("built in {:.1} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn run_inspect(folder: &Path, verify: bool) -> Outcome {
    let bundle = Bundle::open(folder)?;
    if verify {
        bundle.verify()?;
    }
    describe(&bundle);
    if verify {
        println!("every digest matches");
    }
    Ok(())
}

fn describe(bundle: &Bundle) {
    let manifest = bundle.manifest();
    println!("{}", bundle.folder().display());
    println!(
        "  model       {}, {} dimensions, {2}×{2} pixels, {3}",
        manifest.model, manifest.dimensions, manifest.image_size, manifest.precision
    );
    println!("  weights     {}", manifest.weights);
    match (&manifest.labels, bundle.has_text()) {
        (Some(labels), _) => println!("  labels      {}, \"{}\"", labels.count, labels.prompt),
        (None, true) => println!("  labels      none"),
        (None, false) => println!("  labels      none, vision tower only"),
    }
    println!("  digest      {}", manifest.digest());
    for (name, file) in &manifest.files {
        println!("  {:>11}  {}  {name}", file.bytes, &file.sha256[..16]);
    }
    warn_of_synthesis(&manifest.weights);
}

fn warn_of_synthesis(weights: &WeightsOrigin) {
    if let WeightsOrigin::Synthesized { .. } = weights {
        eprintln!("WARNING: weights {weights}; use `clip-model fetch` for real ones");
    }
}

fn run_embed(folder: &Path, texts: &[String], options: &EngineOptions) -> Outcome {
    let bundle = Bundle::open(folder)?;
    warn_of_synthesis(&bundle.manifest().weights);
    let tokens = bundle.tokenizer()?.encode_batch(texts)?;
    let mut engine = TextEngine::load(&bundle, options)?;
    let embeddings = engine.embed(&tokens)?;
    for (text, embedding) in texts.iter().zip(embeddings.chunks(engine.dimensions())) {
        println!(
            "{}",
            serde_json::json!({ "text": text, "embedding": embedding })
        );
    }
    Ok(())
}

fn run_embed_pixels(folder: &Path, path: &Path, options: &EngineOptions) -> Outcome {
    let bundle = Bundle::open(folder)?;
    warn_of_synthesis(&bundle.manifest().weights);
    let pixels = std::fs::read(path)
        .map_err(|error| format!("cannot read the pixels {}: {error}", path.display()))?;
    let mut engine = VisionEngine::load(&bundle, options)?;
    // A last part that is no whole image is refused by the engine.
    let images = pixels.len().div_ceil(engine.image_bytes());
    let embeddings = engine.embed(&pixels, images)?;
    for embedding in embeddings.chunks(engine.dimensions()) {
        let labels = bundle
            .labels()
            .map(|labels| labels.top(embedding, SHOWN_LABELS));
        println!(
            "{}",
            serde_json::json!({ "labels": labels, "embedding": embedding })
        );
    }
    Ok(())
}

fn run_bench(folder: &Path, plan: &bench::Plan, json: bool) -> Outcome {
    let bundle = Bundle::open(folder)?;
    warn_of_synthesis(&bundle.manifest().weights);
    let started = Instant::now();
    let mut engine = VisionEngine::load(
        &bundle,
        &EngineOptions {
            provider: plan.provider,
            ..EngineOptions::default()
        },
    )?;
    let loaded = started.elapsed();
    engine.warm_up()?;
    let first = started.elapsed();
    drop(engine);
    let report = bench::run(&bundle, plan)?;
    if json {
        println!("{}", serde_json::to_string_pretty(&report)?);
        return Ok(());
    }
    println!(
        "load {:.0} ms, load and first image {:.0} ms",
        1e3 * loaded.as_secs_f64(),
        1e3 * first.as_secs_f64()
    );
    print!("{report}");
    Ok(())
}
