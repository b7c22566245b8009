//! `cargo xtask fuzz`: libFuzzer on every target, in a build of its own that counts branches and
//! checks each access to memory, of Rust and of the C libraries.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use clap::Args;

use crate::tools::{Tools, run};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Seeds larger than this make each run slow.
const MOST_SEED_BYTES: u64 = 48 * 1024;

/// Each target with the folder of its seeds; the images of all types lie in one, by type.
const TARGETS: [(&str, &str); 11] = [
    ("bmp", "lib/image/goldens/files"),
    ("gif", "lib/image/goldens/files"),
    ("jpeg", "lib/image/goldens/files"),
    ("pcx", "lib/image/goldens/files"),
    ("png", "lib/image/goldens/files"),
    ("tiff", "lib/image/goldens/files"),
    ("webp", "lib/image/goldens/files"),
    ("events", "events/samples"),
    ("s3-key", "tools/fuzz/seeds/s3-key"),
    ("checkpoint", "tools/fuzz/seeds/checkpoint"),
    ("template", "tools/fuzz/seeds/template"),
];

/// One input may take this long, under the sanitizer and beside other work: thrice what the
/// decoders allow themselves.
const TIMEOUT_SECONDS: u32 = 90;

/// A target holds at most this, with the fuzzer and its corpus.
const MOST_RSS_MIB: u32 = 1024;

/// One allocation: what the targets let an image announce, and what it may take beyond.
const MOST_ALLOCATION_MIB: u32 = 128;

#[derive(Args)]
pub struct Arguments {
    /// One of bmp, gif, jpeg, pcx, png, tiff, webp, events, s3-key, checkpoint, template; all without
    #[arg(value_parser = TARGETS.map(|(name, _)| name))]
    target: Option<String>,
    /// For how long each is fuzzed
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Run the target once, on this file
    #[arg(long, requires = "target", conflicts_with = "seconds")]
    input: Option<PathBuf>,
}

/// Fuzzes as many targets at a time as there are processors, and tells of each what was found.
/// Fails on a finding.
pub fn run_command(tools: &Tools, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let fuzzer = Fuzzer {
        root: tools.root.clone(),
        folder: tools.root.join("target/fuzz"),
        seconds: arguments.seconds,
    };
    build(tools, &fuzzer.folder)?;
    if let (Some(name), Some(input)) = (&arguments.target, &arguments.input) {
        let input = fs::canonicalize(input).with_context(|| input.display().to_string())?;
        let status = fuzzer.command(name).arg(input).status()?;
        return Ok(exit_code(status.success()));
    }
    let chosen = |name: &str| {
        arguments
            .target
            .as_deref()
            .is_none_or(|target| target == name)
    };
    let targets: Vec<_> = TARGETS.iter().filter(|(name, _)| chosen(name)).collect();
    let mut findings = 0;
    for some in targets.chunks(thread::available_parallelism()?.get()) {
        let outcomes = thread::scope(|scope| {
            let start = |target: &&(&'static str, &'static str)| {
                let (name, seeds) = **target;
                let fuzzer = &fuzzer;
                scope.spawn(move || fuzzer.fuzz(name, &fuzzer.root.join(seeds)))
            };
            let running: Vec<_> = some.iter().map(start).collect();
            running
                .into_iter()
                .map(|one| one.join())
                .collect::<Vec<_>>()
        });
        for outcome in outcomes {
            findings += usize::from(!outcome.map_err(|_| anyhow!("a target's thread panicked"))??);
        }
    }
    println!(
        "{} targets fuzzed, {findings} with a finding",
        targets.len()
    );
    Ok(exit_code(findings == 0))
}

fn exit_code(is_good: bool) -> ExitCode {
    if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Builds the targets. The features are rustc's own, but not yet called stable.
fn build(tools: &Tools, folder: &Path) -> anyhow::Result<()> {
    eprintln!("building the fuzz targets …");
    let flags = [
        "--cfg=fuzzing",
        "-Zsanitizer=address",
        "-Cpasses=sancov-module",
        "-Cllvm-args=-sanitizer-coverage-level=4",
        "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
        "-Cllvm-args=-sanitizer-coverage-pc-table",
        "-Cllvm-args=-sanitizer-coverage-trace-compares",
        "-Cforce-frame-pointers",
    ];
    let mut cargo = tools.cargo("rustc");
    cargo.args([
        "--quiet",
        "--package",
        "fuzz",
        "--bin",
        "fuzz",
        "--features",
        "libfuzzer",
    ]);
    cargo.args(["--target", TRIPLE, "--target-dir"]).arg(folder);
    cargo
        .env("RUSTC_BOOTSTRAP", "1")
        .env("RUSTFLAGS", flags.join(" "));
    cargo.env(
        "CFLAGS",
        "-fsanitize=address -fsanitize-coverage=trace-pc -fno-omit-frame-pointer",
    );
    // As the tests are built, with their checks of arithmetic, but fast.
    cargo
        .env("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
        .env("CARGO_INCREMENTAL", "0");
    // The target's own count of C's branches, in the place of libFuzzer's, which only warns.
    run(cargo.args(["--", "-Clink-arg=-Wl,--allow-multiple-definition"]))
}

fn seed_inputs(name: &str, folder: &Path) -> anyhow::Result<Vec<String>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let file = entry.file_name();
        let is_ours =
            !folder.ends_with("goldens/files") || file.to_string_lossy().starts_with(name);
        if is_ours && entry.metadata()?.len() <= MOST_SEED_BYTES {
            paths.push(entry.path().display().to_string());
        }
    }
    Ok(paths)
}

struct Fuzzer {
    root: PathBuf,
    /// Of the build, the corpora, what was found, and the logs.
    folder: PathBuf,
    seconds: u64,
}

impl Fuzzer {
    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.folder.join(TRIPLE).join("debug/fuzz"));
        command.env("FUZZ_TARGET", name).current_dir(&self.root);
        // A freed block is kept back for a while, so that its use is found; not for 256 MiB.
        command.env(
            "ASAN_OPTIONS",
            "quarantine_size_mb=16:detect_odr_violation=0",
        );
        command.arg(format!("-timeout={TIMEOUT_SECONDS}"));
        command.arg(format!("-rss_limit_mb={MOST_RSS_MIB}"));
        command.arg(format!("-malloc_limit_mb={MOST_ALLOCATION_MIB}"));
        command
    }

    /// Whether nothing was found.
    fn fuzz(&self, name: &str, seeds: &Path) -> anyhow::Result<bool> {
        let corpus = self.folder.join("corpus").join(name);
        let crashes = self.folder.join("crashes").join(name);
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&crashes)?;
        let known = fs::read_dir(&crashes)?.count();
        let log = self.folder.join(format!("{name}.log"));
        println!("{name}: {} s, log in {} …", self.seconds, log.display());
        let started = Instant::now();
        let status = self
            .command(name)
            .arg(format!("-max_total_time={}", self.seconds))
            .arg(format!("-artifact_prefix={}/", crashes.display()))
            .arg(format!(
                "-seed_inputs={}",
                seed_inputs(name, seeds)?.join(",")
            ))
            .args(["-print_final_stats=1", "-use_value_profile=1", "-reload=0"])
            .arg(&corpus)
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .status()
            .context("the target cannot be started")?;
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        let figure = |label: &str| {
            let line = text.lines().find(|line| line.contains(label));
            line.and_then(|line| line.split_whitespace().last())
                .unwrap_or("?")
                .to_owned()
        };
        println!(
            "{name}: {} inputs in {:.0} s, {} kept, at most {} MiB",
            figure("stat::number_of_executed_units"),
            started.elapsed().as_secs_f64(),
            fs::read_dir(&corpus)?.count(),
            figure("stat::peak_rss_mb"),
        );
        if status.success() {
            return Ok(true);
        }
        let mut files: Vec<_> = fs::read_dir(&crashes)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        ensure!(
            files.len() > known,
            "{name} ended with {status}: {}",
            log.display()
        );
        files.sort_by_key(|path| fs::metadata(path).and_then(|data| data.modified()).ok());
        let words = ["panicked", "ERROR:", "announced"];
        for line in text
            .lines()
            .filter(|line| words.iter().any(|word| line.contains(word)))
        {
            println!("{name}: {line}");
        }
        if let Some(file) = files.last() {
            let file = file.display();
            println!("{name}: found; again with cargo xtask fuzz {name} --input {file}");
        }
        Ok(false)
    }
}
