//! Measures the vision tower beside the machine's own ceiling: a matrix product in the same
//! runtime, with the same threads, in turns with the model so that both see the same machine.

use std::path::Path;
use std::time::{Duration, Instant};

use ort::value::TensorRef;
use serde::Serialize;

use crate::bundle::Bundle;
use crate::engine::{self, EngineError, EngineOptions, ExecutionProvider, VisionEngine};
use crate::onnx::{Dim, GraphBuilder, element, int};
use crate::precision::Precision;

/// The matrix product that is the ceiling: the perceptron's of 32 images of ViT-B/32.
const ROWS: usize = 1600;
/// Its inner dimension.
const INNER: usize = 768;
/// Its columns.
const COLUMNS: usize = 3072;
/// Between a turn of the model and one of the product: the threads of ONNX Runtime's pools spin for
/// some tens of milliseconds after their work, and would take the other's cores.
const SPIN_OUT: Duration = Duration::from_millis(100);
/// Each figure is the median of this many turns at least.
const FEWEST_TURNS: usize = 5;

/// What is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Plan {
    /// Images in one run.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,64")]
    pub batches: Vec<usize>,
    /// Threads that share an operator.
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    pub threads: Vec<usize>,
    /// Seconds spent on each figure.
    #[arg(long, default_value_t = 4.0)]
    pub seconds: f64,
    /// What computes.
    #[arg(long, env = "EXECUTION_PROVIDER", value_enum, default_value_t)]
    pub provider: ExecutionProvider,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// Threads that shared an operator.
    pub threads: usize,
    /// Images in one run.
    pub batch: usize,
    /// Median over the runs.
    pub ms_per_image: f64,
    /// What the matrix products of an image cost at the ceiling.
    pub floor_ms_per_image: f64,
    /// The ceiling: the fastest product among the model's own turns.
    pub ceiling_gflops: f64,
    /// The floor over the time: 1 would be a model that is nothing but matrix products.
    pub efficiency: f64,
}

/// Everything measured in one run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The model's name.
    pub model: String,
    /// The arithmetic.
    pub precision: Precision,
    /// What the matrix products of one image cost.
    pub gflop_per_image: f64,
    /// The figures.
    pub figures: Vec<Figure>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            formatter,
            "{} {}, {:.2} GFLOP per image in matrix products",
            self.model, self.precision, self.gflop_per_image
        )?;
        writeln!(
            formatter,
            "threads  batch  ms/image  floor  GFLOP/s at the ceiling  of the ceiling"
        )?;
        for figure in &self.figures {
            writeln!(
                formatter,
                "{:>7}  {:>5}  {:>8.2}  {:>5.2}  {:>22.0}  {:>12.1} %",
                figure.threads,
                figure.batch,
                figure.ms_per_image,
                figure.floor_ms_per_image,
                figure.ceiling_gflops,
                100.0 * figure.efficiency
            )?;
        }
        Ok(())
    }
}

/// Measures a bundle.
pub fn run(bundle: &Bundle, plan: &Plan) -> Result<Report, EngineError> {
    let manifest = bundle.manifest();
    let flops = manifest
        .architecture
        .vision
        .flops_per_image(manifest.dimensions);
    let mut figures = Vec::new();
    for &threads in &plan.threads {
        for &batch in &plan.batches {
            let options = EngineOptions {
                provider: plan.provider,
                intra_threads: Some(threads),
                max_batch: batch,
                ..EngineOptions::default()
            };
            figures.push(measure(
                bundle,
                &options,
                batch,
                threads,
                plan.seconds,
                flops,
            )?);
        }
    }
    Ok(Report {
        model: manifest.model.clone(),
        precision: manifest.precision,
        gflop_per_image: flops as f64 / 1e9,
        figures,
    })
}

fn measure(
    bundle: &Bundle,
    options: &EngineOptions,
    batch: usize,
    threads: usize,
    seconds: f64,
    flops: u64,
) -> Result<Figure, EngineError> {
    let mut engine = VisionEngine::load(bundle, options)?;
    let mut ceiling = Ceiling::load(options, bundle.manifest().precision)?;
    // Values do not change the time; that they differ keeps the memory honest.
    let pixels: Vec<u8> = (0..batch * engine.image_bytes())
        .map(|index| (index * 31 % 251) as u8)
        .collect();
    engine.embed(&pixels, batch)?;
    ceiling.run()?;
    let (mut model, mut product) = (Vec::new(), Vec::new());
    let started = Instant::now();
    while started.elapsed().as_secs_f64() < seconds || model.len() < FEWEST_TURNS {
        std::thread::sleep(SPIN_OUT);
        let turn = Instant::now();
        ceiling.run()?;
        product.push(turn.elapsed().as_secs_f64());
        std::thread::sleep(SPIN_OUT);
        let turn = Instant::now();
        engine.embed(&pixels, batch)?;
        model.push(turn.elapsed().as_secs_f64());
    }
    let per_image = median(&mut model) / batch as f64;
    // A peak is the best that was seen; the model gets its median.
    let fastest = product.into_iter().fold(f64::INFINITY, f64::min);
    let per_second = (2 * ROWS * INNER * COLUMNS) as f64 / fastest;
    let floor = flops as f64 / per_second;
    Ok(Figure {
        threads,
        batch,
        ms_per_image: 1e3 * per_image,
        floor_ms_per_image: 1e3 * floor,
        ceiling_gflops: per_second / 1e9,
        efficiency: floor / per_image,
    })
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// A graph that is one matrix product.
struct Ceiling {
    session: ort::session::Session,
    input: Vec<f32>,
}

impl Ceiling {
    fn load(options: &EngineOptions, precision: Precision) -> Result<Ceiling, EngineError> {
        let failed = |error: std::io::Error| EngineError::Run {
            reason: format!("cannot write the bench's graph: {error}"),
        };
        let folder = tempfile::tempdir().map_err(failed)?;
        let path = folder.path().join("product.onnx");
        write_product(folder.path(), &path, precision).map_err(failed)?;
        let session = engine::load(&path, options)?;
        Ok(Ceiling {
            session,
            input: vec![0.5; ROWS * INNER],
        })
    }

    fn run(&mut self) -> Result<(), EngineError> {
        let shape = [ROWS, INNER];
        let input =
            TensorRef::from_array_view((shape, self.input.as_slice())).map_err(engine::failed)?;
        self.session
            .run(ort::inputs!["a" => input])
            .map_err(engine::failed)?;
        Ok(())
    }
}

fn write_product(folder: &Path, path: &Path, precision: Precision) -> std::io::Result<()> {
    let mut graph = GraphBuilder::new("product", precision, folder, "product.data")?;
    let rows = [Dim::Fixed(ROWS), Dim::Fixed(INNER)];
    let input = graph.input("a", element::FLOAT, &rows);
    let weight: Vec<f32> = (0..INNER * COLUMNS)
        .map(|index| (index % 7) as f32 * 0.01)
        .collect();
    let weight = graph.weight("b", &[INNER, COLUMNS], &weight)?;
    match precision {
        Precision::Fp32 | Precision::Int8 => {
            graph.push("", "MatMul", &[&input, &weight], vec!["c".to_owned()], &[])
        }
        Precision::Fp16 => {
            let to = int("to", i64::from(element::FLOAT16));
            let half = graph.node("Cast", &[&input], &[to]);
            graph.push("", "MatMul", &[&half, &weight], vec!["c".to_owned()], &[]);
        }
    }
    let kind = graph.float();
    graph.output("c", kind, &[Dim::Fixed(ROWS), Dim::Fixed(COLUMNS)]);
    graph.finish(path, &[])
}
