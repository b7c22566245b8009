//! `cargo xtask test`: every test, and one summary over all of them.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::tools::{Environment, Tools, run, set_unless_set};

/// Runs `cargo test` on the workspace. The whole-pipeline tests start real
/// programs, so those are built first, in one go with the tests: building
/// them apart would build the dependencies twice, with and without what the
/// tests alone need of them.
pub fn run_tests(tools: &Tools, arguments: &[OsString]) -> anyhow::Result<ExitCode> {
    let variables = tools.install(Environment::Local)?;
    eprintln!("building programs and tests …");
    let mut build = tools.cargo("build");
    run(build.args(["--quiet", "--workspace", "--bins", "--tests"]))?;
    let mut cargo = tools.cargo("test");
    if !arguments
        .iter()
        .any(|argument| argument == "-p" || argument == "--package")
    {
        cargo.arg("--workspace");
    }
    cargo.arg("--no-fail-fast").args(arguments);
    set_unless_set(&mut cargo, &variables);
    let started = Instant::now();
    let mut child = cargo
        .stdout(Stdio::piped())
        .spawn()
        .context("cargo cannot be started")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut tally = Tally::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        tally.add(&line);
        println!("{line}");
    }
    let status = child.wait()?;
    let is_good = status.success() && tally.failed == 0;
    println!("\nall test programs together:");
    for what in &tally.not_run {
        println!("{NOT_RUN}{what}");
    }
    println!("{}", tally.summary(is_good, started.elapsed()));
    Ok(if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// How a test says, on a line of its own, what this machine could not check: `not run: NAME (no
/// VNNI)`. It writes to standard output itself, since the runner keeps what a passing test prints.
const NOT_RUN: &str = "not run: ";

/// The sum over the summaries of all test programs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    measured: u64,
    filtered_out: u64,
    not_run: Vec<String>,
}

impl Tally {
    /// Adds a line such as `test result: ok. 24 passed; 0 failed; …`.
    fn add(&mut self, line: &str) {
        if let Some(what) = line.strip_prefix(NOT_RUN) {
            self.not_run.push(what.to_owned());
        }
        let Some(summary) = line.strip_prefix("test result: ") else {
            return;
        };
        for part in summary.split([';', '.']) {
            match part.trim().split_once(' ') {
                Some((count, "passed")) => self.passed += count.parse().unwrap_or(0),
                Some((count, "failed")) => self.failed += count.parse().unwrap_or(0),
                Some((count, "ignored")) => self.ignored += count.parse().unwrap_or(0),
                Some((count, "measured")) => self.measured += count.parse().unwrap_or(0),
                Some((count, "filtered out")) => self.filtered_out += count.parse().unwrap_or(0),
                _ => {}
            }
        }
    }

    /// In the form of each program's own.
    fn summary(&self, is_good: bool, took: Duration) -> String {
        format!(
            "test result: {}. {} passed; {} failed; {} ignored; {} measured; {} filtered out; finished in {:.2}s",
            if is_good { "ok" } else { "FAILED" },
            self.passed,
            self.failed,
            self.ignored,
            self.measured,
            self.filtered_out,
            took.as_secs_f64()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summaries_of_all_test_programs_are_added_up() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test result: ok. 24 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.07s",
            "test a ... ok",
            "not run: the 8-bit engine (no VNNI)",
            "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.50s",
        ] {
            tally.add(line);
        }
        assert_eq!(
            tally,
            Tally {
                passed: 27,
                failed: 2,
                ignored: 1,
                not_run: vec!["the 8-bit engine (no VNNI)".to_owned()],
                ..Tally::default()
            }
        );
        let summary = tally.summary(false, Duration::from_millis(2500));
        assert_eq!(
            summary,
            "test result: FAILED. 27 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 2.50s"
        );
    }
}
