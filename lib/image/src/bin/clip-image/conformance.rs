//! Runs the decoders over a folder, each file in a process of its own, and
//! compares the crops with Pillow's.

use crate::type_of;
use clip_image::ImageType;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A file's format as Pillow names it, and what Pillow made of it.
type Seen = (Option<String>, Reference);

/// A file that takes longer counts as a hang.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// A process that held more counts as out of bounds.
const MEMORY_LIMIT: u64 = 1 << 30;

/// Crops further apart than this on average, of 255, disagree.
const MEAN_LIMIT: f64 = 1.0;

/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(2);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Folder to search, with all below it.
    folder: PathBuf,
    /// Python interpreter that has Pillow.
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// Folder for the crops (`N.ours.rgb`, `N.reference.rgb`) and `report.json`.
    #[arg(long, default_value = "target/conformance")]
    out: PathBuf,
    /// Side of the crop, in pixels.
    #[arg(long, default_value_t = clip_image::DEFAULT_SIZE)]
    size: u32,
}

/// One file's story.
struct Case {
    path: PathBuf,
    kind: ImageType,
    ours: Ours,
    reference: Reference,
}

enum Ours {
    Decoded,
    Refused(String),
    /// Crashed, hung, or took too much memory.
    Failed(String),
}

enum Reference {
    Decoded { mode: String },
    Refused(String),
}

/// How a case ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Both,
    BothRefused,
    Disagree,
    OnlyReference,
    OnlyOurs,
    Failed,
}

#[derive(Default)]
struct Row {
    files: usize,
    both: usize,
    refused: usize,
    disagree: usize,
    only_reference: usize,
    only_ours: usize,
    failed: usize,
    worst_mean: f64,
    worst_max: u8,
}

/// Whether everything that Pillow opens came out the same here.
pub(crate) fn run(arguments: &Arguments) -> Result<bool, Box<dyn Error>> {
    std::fs::create_dir_all(&arguments.out)?;
    let mut candidates = Vec::new();
    collect(&arguments.folder, &mut candidates)?;
    candidates.sort();
    let references = references(arguments, &candidates)?;
    let mut cases = Vec::new();
    for (index, (path, (format, reference))) in candidates.iter().zip(references).enumerate() {
        let Some(kind) = kind_of(path, format.as_deref(), &reference) else {
            continue;
        };
        let ours = ours(arguments, index, path);
        cases.push((
            index,
            Case {
                path: path.clone(),
                kind,
                ours,
                reference,
            },
        ));
    }
    report(arguments, &cases)
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(&path, found)?;
        } else if kind.is_file() {
            // Only what could be an image: a look at the first bytes and the name.
            let mut head = [0; 32];
            let read = std::fs::File::open(&path)?.read(&mut head)?;
            if type_of(&path, &head[..read]).is_some() {
                found.push(path);
            }
        }
    }
    Ok(())
}

/// The type to count a file under: Pillow's word where it opened the file.
fn kind_of(path: &Path, format: Option<&str>, reference: &Reference) -> Option<ImageType> {
    if matches!(reference, Reference::Decoded { .. }) {
        return match format {
            Some("BMP") => Some(ImageType::Bmp),
            Some("GIF") => Some(ImageType::Gif),
            Some("JPEG" | "MPO") => Some(ImageType::Jpeg),
            Some("PNG") => Some(ImageType::Png),
            Some("TIFF") => Some(ImageType::Tiff),
            Some("WEBP") => Some(ImageType::Webp),
            Some("PCX") => Some(ImageType::Pcx),
            _ => None,
        };
    }
    let bytes = std::fs::read(path).ok()?;
    type_of(path, &bytes)
}

fn references(arguments: &Arguments, candidates: &[PathBuf]) -> Result<Vec<Seen>, Box<dyn Error>> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/conformance.py");
    let mut child = Command::new(&arguments.python)
        .arg(script)
        .arg(&arguments.out)
        .arg(arguments.size.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut input = child.stdin.take().ok_or("no standard input")?;
    let paths: Vec<PathBuf> = candidates.to_vec();
    let feeder = std::thread::spawn(move || -> std::io::Result<()> {
        for path in paths {
            writeln!(input, "{}", path.display())?;
        }
        Ok(())
    });
    let output = child.stdout.take().ok_or("no standard output")?;
    let mut references = Vec::new();
    for line in BufReader::new(output).lines() {
        let outcome: Value = serde_json::from_str(&line?)?;
        let text = |key: &str| outcome[key].as_str().unwrap_or_default().to_owned();
        let reference = if outcome["ok"] == true {
            Reference::Decoded { mode: text("mode") }
        } else {
            Reference::Refused(text("error"))
        };
        references.push((outcome["format"].as_str().map(str::to_owned), reference));
    }
    // Where Python died, its feeder's error says less than the missing lines.
    let _ = feeder.join();
    child.wait()?;
    if references.len() != candidates.len() {
        return Err(format!(
            "{} with Pillow answered for {} files of {}",
            arguments.python.display(),
            references.len(),
            candidates.len()
        )
        .into());
    }
    Ok(references)
}

fn ours(arguments: &Arguments, index: usize, path: &Path) -> Ours {
    let out = arguments.out.join(format!("{index}.ours.rgb"));
    match child(arguments, path, &out) {
        Ok(ours) => ours,
        Err(error) => Ours::Failed(error.to_string()),
    }
}

fn child(arguments: &Arguments, path: &Path, out: &Path) -> Result<Ours, Box<dyn Error>> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg("prepare")
        .arg(path)
        .arg("--out")
        .arg(out)
        .arg("--size")
        .arg(arguments.size.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > TIME_LIMIT {
            child.kill()?;
            child.wait()?;
            return Ok(Ours::Failed(format!("took over {TIME_LIMIT:?}")));
        }
        std::thread::sleep(POLL);
    };
    let mut line = String::new();
    if let Some(mut output) = child.stdout.take() {
        output.read_to_string(&mut line)?;
    }
    let Ok(outcome) = serde_json::from_str::<Value>(&line) else {
        return Ok(Ours::Failed(format!("ended with {status}")));
    };
    let peak = outcome["peak_bytes"].as_u64().unwrap_or(0);
    if peak > MEMORY_LIMIT {
        return Ok(Ours::Failed(format!("held {peak} bytes")));
    }
    if outcome["ok"] == true {
        return Ok(Ours::Decoded);
    }
    let error = outcome["error"].as_str().unwrap_or_default().to_owned();
    Ok(if outcome["kind"] == "decoder" {
        Ours::Failed(error)
    } else {
        Ours::Refused(error)
    })
}

/// Mean and greatest difference of the two crops.
fn differences(out: &Path, index: usize) -> std::io::Result<(f64, u8)> {
    let ours = std::fs::read(out.join(format!("{index}.ours.rgb")))?;
    let reference = std::fs::read(out.join(format!("{index}.reference.rgb")))?;
    let mut sum = 0u64;
    let mut worst = 0;
    for (&a, &b) in ours.iter().zip(&reference) {
        let difference = a.abs_diff(b);
        sum += u64::from(difference);
        worst = worst.max(difference);
    }
    Ok((sum as f64 / ours.len().max(1) as f64, worst))
}

fn report(arguments: &Arguments, cases: &[(usize, Case)]) -> Result<bool, Box<dyn Error>> {
    let mut rows: BTreeMap<&str, Row> = BTreeMap::new();
    let mut entries = Vec::new();
    let mut notes = Vec::new();
    for (index, case) in cases {
        let row = rows.entry(case.kind.mime()).or_default();
        row.files += 1;
        let mut detail = json!({
            "index": index,
            "path": case.path.to_string_lossy(),
            "type": case.kind.mime(),
        });
        let (outcome, note) = match (&case.ours, &case.reference) {
            (Ours::Failed(reason), _) => (Outcome::Failed, reason.clone()),
            (Ours::Decoded, Reference::Decoded { mode }) => {
                let (mean, worst) = differences(&arguments.out, *index)?;
                detail["mean"] = mean.into();
                detail["max"] = worst.into();
                detail["mode"] = mode.clone().into();
                row.worst_mean = row.worst_mean.max(mean);
                row.worst_max = row.worst_max.max(worst);
                if mean <= MEAN_LIMIT {
                    (Outcome::Both, String::new())
                } else {
                    (
                        Outcome::Disagree,
                        format!("mode {mode}, mean difference {mean:.2}, greatest {worst}"),
                    )
                }
            }
            (Ours::Refused(reason), Reference::Refused(other)) => {
                detail["reference_error"] = other.clone().into();
                (Outcome::BothRefused, reason.clone())
            }
            (Ours::Refused(reason), Reference::Decoded { mode }) => {
                (Outcome::OnlyReference, format!("mode {mode}: {reason}"))
            }
            (Ours::Decoded, Reference::Refused(reason)) => (Outcome::OnlyOurs, reason.clone()),
        };
        let (counter, name) = match outcome {
            Outcome::Both => (&mut row.both, "both"),
            Outcome::BothRefused => (&mut row.refused, "both refused"),
            Outcome::Disagree => (&mut row.disagree, "disagree"),
            Outcome::OnlyReference => (&mut row.only_reference, "refused here"),
            Outcome::OnlyOurs => (&mut row.only_ours, "refused there"),
            Outcome::Failed => (&mut row.failed, "failed"),
        };
        *counter += 1;
        detail["outcome"] = name.into();
        detail["note"] = note.clone().into();
        if !matches!(outcome, Outcome::Both | Outcome::BothRefused) {
            notes.push(format!("{name}: {}: {note}", case.path.display()));
        }
        entries.push(detail);
    }
    std::fs::write(
        arguments.out.join("report.json"),
        serde_json::to_vec_pretty(&entries)?,
    )?;
    println!(
        "{:<12} {:>6} {:>6} {:>8} {:>9} {:>8} {:>8} {:>7} {:>10} {:>9}",
        "type",
        "files",
        "both",
        "refused",
        "disagree",
        "refused",
        "refused",
        "failed",
        "worst mean",
        "worst max"
    );
    println!(
        "{:<12} {:>6} {:>6} {:>8} {:>9} {:>8} {:>8}",
        "", "", "", "by both", "", "here", "there"
    );
    let (mut opened, mut agreed, mut failed) = (0, 0, 0);
    for (kind, row) in &rows {
        println!(
            "{:<12} {:>6} {:>6} {:>8} {:>9} {:>8} {:>8} {:>7} {:>10.3} {:>9}",
            kind,
            row.files,
            row.both,
            row.refused,
            row.disagree,
            row.only_reference,
            row.only_ours,
            row.failed,
            row.worst_mean,
            row.worst_max
        );
        opened += row.both + row.disagree + row.only_reference;
        agreed += row.both;
        failed += row.failed + row.only_ours;
    }
    println!(
        "{agreed} of {opened} files that Pillow opens came out the same ({:.2} %)",
        100.0 * agreed as f64 / (opened.max(1)) as f64
    );
    for note in &notes {
        println!("{note}");
    }
    Ok(failed == 0 && agreed == opened)
}
