//! Decoding and preparing alone: what an image costs before the model.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clip_image::{DecodeMode, ImageType, Options, prepare};
use serde::Serialize;

/// Processor time per image on one thread, in milliseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PreparationFigures {
    pub exact_ms: f64,
    pub fast_ms: f64,
}

/// Measures over the files; those that do not decode count as nothing.
pub fn measure(files: &[PathBuf]) -> Result<PreparationFigures> {
    let mut figures = PreparationFigures {
        exact_ms: 0.0,
        fast_ms: 0.0,
    };
    for path in files {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        if let Some(kind) = ImageType::detect(&bytes) {
            figures.exact_ms += once(&bytes, kind, DecodeMode::Exact)?;
            figures.fast_ms += once(&bytes, kind, DecodeMode::Fast)?;
        }
    }
    figures.exact_ms /= files.len() as f64;
    figures.fast_ms /= files.len() as f64;
    Ok(figures)
}

fn once(bytes: &[u8], kind: ImageType, decode: DecodeMode) -> Result<f64> {
    let options = Options {
        decode,
        ..Options::default()
    };
    let mut crop = vec![0; (options.size * options.size * 3) as usize];
    let started = thread_time()?;
    // A broken file costs what it costs until that is seen.
    let _ = prepare(bytes, kind, &options, &mut crop);
    Ok(thread_time()? - started)
}

fn thread_time() -> Result<f64> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a local that may be written to.
    if unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) } != 0 {
        return Err(std::io::Error::last_os_error()).context("reading this thread's time");
    }
    Ok(time.tv_sec as f64 * 1e3 + time.tv_nsec as f64 / 1e6)
}
