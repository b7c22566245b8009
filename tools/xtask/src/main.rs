//! The project's commands. `cargo xtask --help` lists them.
//!
//! Every command installs what it needs into `.tools/` of this workspace, once,
//! and works offline from then on.

mod cdk;
mod conformance;
mod dependencies;
mod fuzz;
mod test_run;
mod tools;

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};

use crate::cdk::{Installation, Package};
use crate::tools::{Environment, Profile, Tools, set_unless_set};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The commands of clip-image-processor")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

/// A command without a help flag of its own hands it to the program that it is.
#[derive(Subcommand)]
enum Task {
    /// Run the whole pipeline on this machine on sample photos or your own files
    #[command(disable_help_flag = true)]
    Demo(Rest),
    /// Run every test
    Test {
        /// Run the tests of infra/cdk alone, which need Node 20 and npm
        #[arg(long, conflicts_with = "arguments")]
        cdk: bool,
        /// Passed on to `cargo test` (`-p events`, a test's name, …); all tests without
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run the whole pipeline under faults and audit every object
    #[command(disable_help_flag = true)]
    Soak(Rest),
    /// Measure the pipeline beside a reference worker (Python, PyTorch) on this machine
    #[command(disable_help_flag = true)]
    Bench(Rest),
    /// Simulate the scaler and its alternatives on traces of arrivals
    #[command(disable_help_flag = true)]
    Simulate(Rest),
    /// Compare decoder and model with Pillow and PyTorch CLIP on a folder of images
    Conformance(conformance::Arguments),
    /// Fuzz whatever reads bytes of others, with coverage and AddressSanitizer
    Fuzz(fuzz::Arguments),
    /// Lint the template, its translation, the Dockerfile, and what they must agree on with the code
    #[command(disable_help_flag = true)]
    LintInfra(Rest),
    /// Check licences, sources, duplicates and security advisories of the dependencies
    LintDependencies(dependencies::Arguments),
    /// Assemble the container image's root filesystem without Docker, check it, run the task in it
    #[command(disable_help_flag = true)]
    Image(Rest),
    /// Run a program of the workspace with its environment set up, such as `run clip-model --help`
    Run {
        /// The program (clip-model, gpu-task, local, scaler, …)
        program: String,
        #[command(flatten)]
        rest: Rest,
    },
}

#[derive(Args)]
struct Rest {
    /// The program's arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
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
        Task::Test { cdk, arguments } => test_run::run_tests(&tools, cdk, &arguments),
        Task::Conformance(arguments) => conformance::run_command(&tools, arguments),
        Task::Fuzz(arguments) => fuzz::run_command(&tools, &arguments),
        Task::LintDependencies(arguments) => dependencies::lint(&tools, &arguments),
        Task::Demo(rest) => {
            let programs = [
                "local",
                "gpu-task",
                "express",
                "intake",
                "scaler",
                "clip-model",
            ];
            let demo = [OsString::from("demo")];
            let arguments = [&demo[..], &rest.arguments].concat();
            tools.hand_over(&programs, Profile::Debug, &arguments, |demo| {
                set_unless_set(demo, &tools.install(Environment::Local)?);
                Ok(())
            })
        }
        Task::Soak(rest) => {
            let programs = ["soak", "gpu-task", "intake", "scaler", "express"];
            tools.hand_over(&programs, Profile::Debug, &rest.arguments, |soak| {
                set_unless_set(soak, &tools.install(Environment::Local)?);
                Ok(())
            })
        }
        Task::Bench(rest) => {
            let programs = ["pipeline-bench", "gpu-task", "clip-model"];
            tools.hand_over(&programs, Profile::Release, &rest.arguments, |bench| {
                set_unless_set(bench, &tools.install(Environment::Reference)?);
                Ok(())
            })
        }
        Task::Simulate(Rest { mut arguments }) => {
            if asks_for_traces(&arguments) {
                arguments.insert(0, "run".into());
            }
            tools.hand_over(&["simulator"], Profile::Release, &arguments, |_| Ok(()))
        }
        Task::LintInfra(Rest { mut arguments }) => {
            arguments.insert(0, "lint".into());
            tools.hand_over(&["infra-checks"], Profile::Debug, &arguments, |lint| {
                let variables = tools.install(Environment::Infra)?;
                set_unless_set(lint, &variables);
                lint.current_dir(&tools.root);
                match Package::install(&tools)? {
                    Installation::Done(package) => {
                        let synthesised = tools.root.join(".tools/synthesised.json");
                        package.synthesise(&variables, &synthesised)?;
                        lint.arg("--synthesised").arg(synthesised);
                    }
                    Installation::Lacking(what) => {
                        println!("not run: the linters on what infra/cdk synthesises ({what})");
                    }
                }
                Ok(())
            })
        }
        Task::Image(Rest { mut arguments }) => {
            let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
            let (cuda, rehearse, has_model) = (has("--cuda"), has("--rehearse"), has("--model"));
            // What a rehearsal finds does not depend on the optimiser.
            let profile = if rehearse {
                Profile::Debug
            } else {
                Profile::Release
            };
            arguments.insert(0, "image".into());
            tools.hand_over(&["infra-checks"], Profile::Debug, &arguments, |image| {
                let variables = tools.install(Environment::Local)?;
                tools.build(&["gpu-task", "clip-model"], profile)?;
                set_unless_set(image, &variables);
                image.current_dir(&tools.root);
                image
                    .arg("--gpu-task")
                    .arg(tools.built("gpu-task", profile));
                if cuda {
                    // The library beside the program: `--bin` would build the latter alone.
                    let mut build = tools.cargo("build");
                    tools::run(build.args(["--quiet", "--package", "cuda-stand-in"]))?;
                    let bundle = tools.rehearsal_model(profile, &variables)?;
                    let stand_ins = tools.built("", Profile::Debug);
                    image.arg("--stand-ins").arg(stand_ins);
                    image.arg("--rehearsal-model").arg(&bundle);
                    if rehearse {
                        image.arg("--model").arg(bundle);
                    }
                }
                if !has_model && !rehearse {
                    let (_, bundle) = tools.synthesized_model(&variables)?;
                    image.arg("--model").arg(bundle);
                }
                Ok(())
            })
        }
        Task::Run { program, rest } => {
            let programs = [program.as_str()];
            tools.hand_over(&programs, Profile::Debug, &rest.arguments, |command| {
                set_unless_set(command, &tools.install(Environment::Local)?);
                Ok(())
            })
        }
    }
}

impl Tools {
    /// Lets the first of `programs` take this one's place, so that a Ctrl-C reaches it alone and its
    /// exit code is the command's. `prepare` gets what it needs. For its help it needs nothing: no
    /// environment, no other program, and no optimised build.
    fn hand_over(
        &self,
        programs: &[&str],
        profile: Profile,
        arguments: &[OsString],
        prepare: impl FnOnce(&mut Command) -> anyhow::Result<()>,
    ) -> anyhow::Result<ExitCode> {
        let (programs, profile, wants_help) = if arguments.iter().any(|word| is_help(word)) {
            (&programs[..1], Profile::Debug, true)
        } else {
            (programs, profile, false)
        };
        let mut command = self.program(programs[0], profile, &[]);
        command.args(arguments);
        if !wants_help {
            prepare(&mut command)?;
        }
        self.build(programs, profile)?;
        let error = command.exec();
        bail!(
            "{} cannot be started: {error}",
            command.get_program().display()
        )
    }
}

fn is_help(argument: &OsStr) -> bool {
    argument == "--help" || argument == "-h"
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

fn workspace_root() -> anyhow::Result<PathBuf> {
    let manifest_dir = std::env::var_os("CARGO_MANIFEST_DIR")
        .context("CARGO_MANIFEST_DIR is not set: run this through `cargo xtask`")?;
    Path::new(&manifest_dir)
        .ancestors()
        .nth(2)
        .map(PathBuf::from)
        .context("xtask lies in no workspace")
}
