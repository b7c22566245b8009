//! Prepares images from the command line, and compares with Pillow.

mod conformance;

use clap::{Parser, Subcommand};
use clip_image::{DecodeMode, ImageType, Options, memory_needed, prepare};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Decode images to the crops that CLIP reads.
#[derive(Parser)]
#[command(name = "clip-image", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prepare files and print one JSON line for each.
    Prepare {
        /// Files to prepare; none: paths from standard input, one a line.
        files: Vec<PathBuf>,
        /// Write the crop of a single file here, as raw RGB.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Side of the crop, in pixels.
        #[arg(long, default_value_t = clip_image::DEFAULT_SIZE)]
        size: u32,
        /// Decode JPEG at a lower resolution where it is much larger than the crop.
        #[arg(long)]
        fast: bool,
        /// Turn images as their EXIF orientation says.
        #[arg(long)]
        orient: bool,
        /// Prepare each file this many times, for timing.
        #[arg(long, default_value_t = 1)]
        repeat: u32,
    },
    /// Compare all images in a folder with Pillow and print a table.
    Conformance(conformance::Arguments),
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Prepare {
            files,
            out,
            size,
            fast,
            orient,
            repeat,
        } => {
            let options = Options {
                size,
                decode: if fast {
                    DecodeMode::Fast
                } else {
                    DecodeMode::Exact
                },
                apply_exif_orientation: orient,
                ..Options::default()
            };
            let files = if files.is_empty() {
                std::io::stdin()
                    .lines()
                    .map_while(Result::ok)
                    .map(PathBuf::from)
                    .collect()
            } else {
                files
            };
            let mut all_good = true;
            for file in &files {
                all_good &= prepare_one(file, &options, out.as_deref(), repeat);
            }
            if all_good {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Command::Conformance(arguments) => match conformance::run(&arguments) {
            Ok(true) => ExitCode::SUCCESS,
            Ok(false) => ExitCode::FAILURE,
            Err(error) => {
                eprintln!("conformance run failed: {error}");
                ExitCode::from(2)
            }
        },
    }
}

/// The type by content, else by the name's extension.
pub(crate) fn type_of(path: &Path, bytes: &[u8]) -> Option<ImageType> {
    ImageType::detect(bytes).or_else(|| ImageType::from_name(path.to_str()?))
}

fn prepare_one(path: &Path, options: &Options, out: Option<&Path>, repeat: u32) -> bool {
    let mut crop = vec![0u8; options.size as usize * options.size as usize * 3];
    let started = Instant::now();
    let cpu_started = cpu_seconds();
    let mut estimate = None;
    let result = std::fs::read(path)
        .map_err(|error| ("unreadable", error.to_string()))
        .and_then(|bytes| {
            let Some(kind) = type_of(path, &bytes) else {
                return Err(("unsupported", "not one of the seven image types".to_owned()));
            };
            estimate = memory_needed(&bytes, kind, options).ok();
            let mut prepared = None;
            for _ in 0..repeat.max(1) {
                prepared = Some(
                    prepare(&bytes, kind, options, &mut crop)
                        .map_err(|error| (error.kind(), error.to_string()))?,
                );
            }
            Ok((kind, prepared))
        });
    let seconds = started.elapsed().as_secs_f64() / f64::from(repeat.max(1));
    let cpu = cpu_started
        .zip(cpu_seconds())
        .map(|(start, end)| (end - start) / f64::from(repeat.max(1)));
    let mut line = json!({
        "path": path.to_string_lossy(),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "memory_needed": estimate,
        "peak_bytes": peak_bytes(),
    });
    let is_good = match result {
        Ok((kind, prepared)) => {
            line["ok"] = true.into();
            line["type"] = kind.mime().into();
            line["width"] = prepared.map(|prepared| prepared.width).into();
            line["height"] = prepared.map(|prepared| prepared.height).into();
            out.is_none_or(|out| match std::fs::write(out, &crop) {
                Ok(()) => true,
                Err(error) => {
                    line["error"] = error.to_string().into();
                    false
                }
            })
        }
        Err((kind, message)) => {
            line["ok"] = false.into();
            line["kind"] = kind.into();
            line["error"] = message.into();
            false
        }
    };
    println!("{line}");
    is_good
}

/// Processor time that this process has taken, where the system tells.
fn cpu_seconds() -> Option<f64> {
    let statistics = std::fs::read_to_string("/proc/self/schedstat").ok()?;
    let nanoseconds: f64 = statistics.split_whitespace().next()?.parse().ok()?;
    Some(nanoseconds / 1e9)
}

/// The most memory that this process held at once, where the system tells.
fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}
