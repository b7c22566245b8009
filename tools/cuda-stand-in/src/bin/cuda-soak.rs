//! Runs both towers of a bundle on CUDA over the stand-ins, a thousand batches of changing size, and
//! checks what can be checked without a GPU: nothing falls back to the processor, each row is its own
//! image's, memory does not grow. Usage: `cuda-soak BUNDLE`.

use std::process::ExitCode;

use clip_model::Bundle;
use clip_model::engine::{EngineOptions, ExecutionProvider, TextEngine, VisionEngine};

/// Images in one run at most, as the task has it on CUDA.
const MAX_BATCH: usize = 64;
const BATCHES: usize = 1000;
/// By then every size has been seen, more or less.
const SETTLED: usize = 300;
const TEXT_BATCHES: usize = 50;
/// What the process's own memory may grow by after that; the C library's heap is never quite still.
const GROWTH_BYTES: u64 = 16 << 20;
/// Where the stand-in counts bytes of device memory.
const DEVICE_BYTES_AT: usize = 4 * size_of::<u64>();

type Outcome = Result<String, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cuda-soak: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome {
    let folder = std::env::args().nth(1).ok_or("usage: cuda-soak BUNDLE")?;
    let bundle = Bundle::open(folder.as_ref())?;
    let options = EngineOptions {
        provider: ExecutionProvider::Cuda,
        max_batch: MAX_BATCH,
        ..EngineOptions::default()
    };
    let mut engine = VisionEngine::load(&bundle, &options)?;
    engine.warm_up()?;
    let (dimensions, bytes) = (engine.dimensions(), engine.image_bytes());
    let mut pixels = engine.buffer(MAX_BATCH * bytes)?;
    let mut images = 0;
    let mut settled = None;
    for run in 0..BATCHES {
        // Every size up to the largest, in an order without a pattern to it.
        let batch = 1 + run * 37 % MAX_BATCH;
        let value = |image: usize| ((run * 7 + image) % 251) as u8;
        for (image, place) in pixels.chunks_exact_mut(bytes).take(batch).enumerate() {
            place.fill(value(image));
        }
        let rows = engine.embed(&pixels[..batch * bytes], batch)?;
        for (image, row) in rows.chunks_exact(dimensions).enumerate() {
            if row.iter().any(|&sample| sample != f32::from(value(image))) {
                return Err(
                    format!("run {run}: row {image} of {batch} is not that image's").into(),
                );
            }
        }
        images += batch;
        if run == SETTLED {
            settled = Some(memory()?);
        }
    }
    let (before, after) = (settled.ok_or("too few batches")?, memory()?);
    if after.0 > before.0 || after.1 > before.1 + GROWTH_BYTES {
        return Err(format!(
            "memory grows: device {} to {} bytes, process {} to {}",
            before.0, after.0, before.1, after.1
        )
        .into());
    }
    drop((engine, pixels));

    let tokenizer = bundle.tokenizer()?;
    let mut engine = TextEngine::load(&bundle, &options)?;
    for run in 0..TEXT_BATCHES {
        let texts = vec!["a photo of a cat"; 1 + run];
        let found = engine.embed(&tokenizer.encode_batch(&texts)?)?;
        if found.len() != texts.len() * dimensions {
            return Err(format!("{} values for {} texts", found.len(), texts.len()).into());
        }
    }
    Ok(format!(
        "{BATCHES} batches of 1 to {MAX_BATCH} images, {images} rows each of its own image; \
         device memory {:.0} MB from the first to the last; {TEXT_BATCHES} batches of texts",
        after.0 as f64 / 1e6
    ))
}

fn memory() -> Result<(u64, u64), Box<dyn std::error::Error>> {
    let counters = std::fs::read(std::env::var("CUDA_STAND_IN_COUNTERS")?)?;
    let place = counters.get(DEVICE_BYTES_AT..DEVICE_BYTES_AT + 8);
    let device = u64::from_ne_bytes(place.ok_or("no counters")?.try_into()?);
    let status = std::fs::read_to_string("/proc/self/status")?;
    let anonymous = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = anonymous.and_then(|rest| rest.split_whitespace().next());
    Ok((device, kib.ok_or("no RssAnon")?.parse::<u64>()? * 1024))
}
