//! CPU time of `prepare` beside the reference's on the same files in the same run.
//!
//! `cargo bench -p clip-image` makes synthetic photos once (in
//! `target/bench-photos`) and needs a Python with Pillow: `PYTHON`, else
//! `.tools/venv/bin/python` of the workspace, else `python3`. With torchvision in it
//! the reference is CLIP's whole preprocessing, without it Pillow's part.

use clip_image::{DecodeMode, ImageType, Options, prepare};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The least of this many runs is taken: what the work costs undisturbed.
const REPEATS: usize = 40;

fn python(workspace: &Path) -> PathBuf {
    let installed = workspace.join(".tools/venv/bin/python");
    match std::env::var_os("PYTHON") {
        Some(python) => python.into(),
        None if installed.exists() => installed,
        None => "python3".into(),
    }
}

/// CPU time of this thread, in seconds.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid to write to; the clock exists on every system that
    // this runs on, and where it does not, the time stays zero.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn ours(bytes: &[u8], kind: ImageType, decode: DecodeMode) -> f64 {
    let options = Options {
        decode,
        ..Options::default()
    };
    let mut crop = vec![0; (options.size * options.size * 3) as usize];
    (0..REPEATS)
        .map(|_| {
            let started = cpu_seconds();
            prepare(bytes, kind, &options, &mut crop).expect("the photo decodes");
            cpu_seconds() - started
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    // Cargo passes `--bench`; with `--test` only the build is checked.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let workspace = package.join("../..");
    let script = package.join("bench/photos.py");
    let folder = workspace.join("target/bench-photos");
    let python = python(&workspace);
    let run = |command: &str, arguments: &[PathBuf]| {
        let output = Command::new(&python)
            .arg(&script)
            .arg(command)
            .args(arguments)
            .output()
            .unwrap_or_else(|error| panic!("{} does not start: {error}", python.display()));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    run("make", std::slice::from_ref(&folder));
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .expect("the folder of photos")
        .map(|entry| entry.expect("an entry of the folder").path())
        .collect();
    files.sort();
    let answers = run("time", &files);
    let answers: Vec<serde_json::Value> = answers
        .lines()
        .map(|line| serde_json::from_str(line).expect("times of a photo"))
        .collect();
    let name = answers[0]["reference"].as_str().expect("a name");
    println!("CPU ms on one thread, and parts of the reference's, which is {name}'s");
    println!(
        "{:<24} {:>9} {:>9} {:>9} {:>6} {:>9} {:>6}",
        "", "reference", "decoder", "exact", "", "fast", ""
    );
    for (file, answer) in files.iter().zip(&answers) {
        let seconds = |what: &str| answer[what].as_f64().expect("seconds");
        let (reference, decoder) = (seconds("seconds"), seconds("decode"));
        let bytes = std::fs::read(file).expect("the photo");
        let kind = ImageType::detect(&bytes).expect("a known type");
        let exact = ours(&bytes, kind, DecodeMode::Exact);
        let fast = ours(&bytes, kind, DecodeMode::Fast);
        println!(
            "{:<24} {:>9.2} {:>9.2} {:>9.2} {:>5.0}% {:>9.2} {:>5.0}%",
            file.file_name().unwrap_or_default().to_string_lossy(),
            reference * 1e3,
            decoder * 1e3,
            exact * 1e3,
            100.0 * exact / reference,
            fast * 1e3,
            100.0 * fast / reference
        );
    }
}
