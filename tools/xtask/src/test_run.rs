//! `cargo xtask test`: every test, and one summary over all of them.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::cdk::{Installation, Package};
use crate::tools::{Environment, Tools, run, set_unless_set};

/// Runs the workspace's tests and those of `infra/cdk`, or some of them: the latter alone
/// (`only_cdk`), or what `cargo test` makes of `arguments`.
pub fn run_tests(
    tools: &Tools,
    only_cdk: bool,
    arguments: &[OsString],
) -> anyhow::Result<ExitCode> {
    let package = Package::install(tools)?;
    let mut tally = Tally::default();
    let started = Instant::now();
    let mut is_good = true;
    if !only_cdk {
        let mut cargo = cargo_test(tools, arguments)?;
        if let Installation::Done(package) = &package {
            cargo.env("CDK_PACKAGE", &package.folder);
        }
        is_good &= follow(&mut cargo, |line| tally.add(line))?.success();
    }
    match &package {
        Installation::Done(package) if arguments.is_empty() => {
            is_good &= run_node_tests(package, &mut tally)?
        }
        Installation::Lacking(lacks) if arguments.is_empty() => {
            tally.not_run.push(format!("infra/cdk: {lacks}"));
            is_good &= !only_cdk;
        }
        _ => {}
    }
    is_good &= tally.failed == 0;
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

/// Whether they ran and none failed: what fails before them, such as the compiler, counts as
/// no test, and a runner that reports in another form must not look like one that passes.
fn run_node_tests(package: &Package, tally: &mut Tally) -> anyhow::Result<bool> {
    println!("\n     Running infra/cdk");
    let passed = tally.passed;
    let status = follow(&mut package.tests(), |line| tally.add_from_node(line))?;
    Ok(status.success() && tally.passed > passed)
}

/// Shows a command's output and hands on each line of it.
fn follow(command: &mut Command, mut each: impl FnMut(&str)) -> anyhow::Result<ExitStatus> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
    let output = child.stdout.take().context("a program has no output")?;
    for line in BufReader::new(output).lines() {
        let line = line?;
        each(&line);
        println!("{line}");
    }
    Ok(child.wait()?)
}

/// `cargo test` on the workspace. The whole-pipeline tests start real
/// programs, so those are built first, in one go with the tests: building
/// them apart would build the dependencies twice, with and without what the
/// tests alone need of them.
fn cargo_test(tools: &Tools, arguments: &[OsString]) -> anyhow::Result<Command> {
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
    Ok(cargo)
}

/// How a test says, on a line of its own, what this machine could not check: `not run: NAME (no
/// VNNI)`. It writes to standard output itself, since the runner keeps what a passing test prints.
const NOT_RUN: &str = "not run: ";

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

    /// Adds a line such as `# pass 86`, of those that end what Node's test runner reports, or
    /// `# not run: …`, as it shows what a test prints.
    fn add_from_node(&mut self, line: &str) {
        let Some(line) = line.strip_prefix("# ") else {
            return;
        };
        if let Some(what) = line.strip_prefix(NOT_RUN) {
            self.not_run.push(what.to_owned());
        }
        let Some((what, count)) = line.split_once(' ') else {
            return;
        };
        let Ok(count) = count.parse::<u64>() else {
            return;
        };
        match what {
            "pass" => self.passed += count,
            "fail" | "cancelled" => self.failed += count,
            "skipped" | "todo" => self.ignored += count,
            _ => {}
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
        for line in [
            "# not run: wiring (no checkout)",
            "ok 1 - # pass 50",
            "# tests 13",
            "# pass 7",
            "# fail 1",
            "# cancelled 2",
            "# skipped 3",
            "# todo 0",
            "# duration_ms 94000.5",
        ] {
            tally.add_from_node(line);
        }
        assert_eq!(
            tally,
            Tally {
                passed: 34,
                failed: 5,
                ignored: 4,
                not_run: vec![
                    "the 8-bit engine (no VNNI)".to_owned(),
                    "wiring (no checkout)".to_owned()
                ],
                ..Tally::default()
            }
        );
        let summary = tally.summary(false, Duration::from_millis(2500));
        assert_eq!(
            summary,
            "test result: FAILED. 34 passed; 5 failed; 4 ignored; 0 measured; 0 filtered out; finished in 2.50s"
        );
    }
}
