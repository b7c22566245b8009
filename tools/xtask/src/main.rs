//! The project's commands. `cargo xtask --help` lists them.
//!
//! Every command installs what it needs into `.tools/` of this workspace, once,
//! and works offline from then on.

mod conformance;
mod test_run;
mod tools;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

use crate::tools::{Environment, Tools};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The commands of clip-image-processor")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Run the whole pipeline on this machine on sample photos or your own files
    #[command(disable_help_flag = true)]
    Demo {
        /// Files, folders and options; `cargo xtask demo --help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run every test
    Test {
        /// Passed on to `cargo test` (`-p events`, a test's name, …); all tests without
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Measure the pipeline beside a reference worker (Python, PyTorch) on this machine
    #[command(disable_help_flag = true)]
    Bench {
        /// Options; `cargo xtask bench --help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Simulate the scaler and its alternatives on traces of arrivals
    #[command(disable_help_flag = true)]
    Simulate {
        /// Traces and options; `cargo xtask simulate --help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Compare decoder and model with Pillow and PyTorch CLIP on a folder of images
    #[command(disable_help_flag = true)]
    Conformance {
        /// Folder and options; `cargo xtask conformance --help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Lint the template, its translation, the Dockerfile, and what they must agree on with the code
    #[command(disable_help_flag = true)]
    LintInfra {
        /// Options; `cargo xtask lint-infra --help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Assemble the container image's root filesystem without Docker, check it, run the task in it
    #[command(disable_help_flag = true)]
    Image {
        /// `--cpu` or `--cuda` and more; `cargo xtask image --help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run a program of the workspace with its environment set up, such as `run clip-model --help`
    Run {
        /// The program (clip-model, gpu-task, local, scaler, …)
        program: String,
        /// Its arguments
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<ExitCode> {
    let tools = Tools::new(workspace_root()?);
    match task {
        Task::Demo { arguments } => {
            let environment = tools.install(Environment::Local)?;
            let programs = ["local", "gpu-task", "intake", "scaler", "clip-model"];
            tools.build(&programs, Profile::Debug)?;
            let mut demo = tools.program("local", Profile::Debug, &environment);
            demo.arg("demo").args(arguments);
            replace_this_process(demo)
        }
        Task::Test { arguments } => test_run::run_tests(&tools, &arguments),
        Task::Bench { arguments } => {
            let environment = tools.install(Environment::Reference)?;
            tools.build(
                &["pipeline-bench", "gpu-task", "clip-model"],
                Profile::Release,
            )?;
            let mut bench = tools.program("pipeline-bench", Profile::Release, &environment);
            bench.args(arguments);
            replace_this_process(bench)
        }
        Task::Simulate { arguments } => {
            tools.build(&["simulator"], Profile::Release)?;
            let mut simulate = tools.program("simulator", Profile::Release, &[]);
            if asks_for_traces(&arguments) {
                simulate.arg("run");
            }
            simulate.args(arguments);
            replace_this_process(simulate)
        }
        Task::Conformance { arguments } => conformance::run_command(&tools, &arguments),
        Task::LintInfra { arguments } => {
            let environment = tools.install(Environment::Infra)?;
            tools.build(&["infra-checks"], Profile::Debug)?;
            let mut lint = tools.program("infra-checks", Profile::Debug, &environment);
            lint.current_dir(&tools.root).arg("lint").args(arguments);
            replace_this_process(lint)
        }
        Task::Image { arguments } => {
            let environment = tools.install(Environment::Local)?;
            tools.build(&["infra-checks"], Profile::Debug)?;
            tools.build(&["gpu-task", "clip-model"], Profile::Release)?;
            let mut image = tools.program("infra-checks", Profile::Debug, &environment);
            image.current_dir(&tools.root).arg("image");
            let wants_help = arguments.iter().any(|argument| argument == "--help");
            if !wants_help && !arguments.iter().any(|argument| argument == "--model") {
                let (_, bundle) = tools.synthesized_model(&environment)?;
                image.arg("--model").arg(bundle);
            }
            image.args(arguments);
            replace_this_process(image)
        }
        Task::Run { program, arguments } => {
            let environment = tools.install(Environment::Local)?;
            tools.build(&[&program], Profile::Debug)?;
            let mut command = tools.program(&program, Profile::Debug, &environment);
            command.args(arguments);
            replace_this_process(command)
        }
    }
}

/// Which build of a program is meant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build: tests and the demo.
    Debug,
    /// What runs on AWS: benchmarks and simulations.
    Release,
}

impl Profile {
    fn folder(self) -> &'static str {
        match self {
            Profile::Debug => "debug",
            Profile::Release => "release",
        }
    }
}

/// Whether the arguments are traces to compare the scalers on, which is the
/// simulator's main job, and not one of its other commands.
fn asks_for_traces(arguments: &[OsString]) -> bool {
    let first = arguments.first().and_then(|first| first.to_str());
    let is_command = matches!(
        first,
        Some("run" | "days" | "check" | "help" | "-h" | "--help" | "--version")
    );
    !is_command
}

/// Lets the program take this one's place, so that a Ctrl-C reaches it alone
/// and its exit code is the command's.
fn replace_this_process(mut command: Command) -> anyhow::Result<ExitCode> {
    let error = command.exec();
    bail!(
        "{} cannot be started: {error}",
        command.get_program().display()
    )
}

fn workspace_root() -> anyhow::Result<PathBuf> {
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR")
        .context("CARGO_MANIFEST_DIR is not set: run this through `cargo xtask`")?;
    Path::new(&manifest_dir)
        .ancestors()
        .nth(2)
        .map(PathBuf::from)
        .context("xtask lies in no workspace")
}
