//! Command line: `infra-checks lint`, `infra-checks image`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use infra_checks::Project;
use infra_checks::image::{self, Variant};
use infra_checks::linters::Linters;
use template::Template;

#[derive(Parser)]
#[command(
    name = "infra-checks",
    version,
    about = "Checks the deployment offline"
)]
struct Arguments {
    /// The workspace's root
    #[arg(long, global = true, default_value = ".")]
    root: PathBuf,
    #[command(subcommand)]
    command: Action,
}

#[derive(Subcommand)]
enum Action {
    /// Lint the template, the Dockerfile, and what they must agree on with the code
    Lint {
        /// Python environment with infra/requirements.txt, relative to the root
        #[arg(long, env = "INFRA_TOOLS", default_value = ".tools/venv-infra")]
        tools: PathBuf,
        /// Only the project's own assertions, which need no tools
        #[arg(long)]
        own: bool,
        /// A template that infra/cdk made; may be given several times
        #[arg(long)]
        synthesised: Vec<PathBuf>,
    },
    /// Assemble the container image's root filesystem, check it, run the task in it
    Image {
        /// The image for trials without a GPU (the default)
        #[arg(long, conflicts_with = "cuda")]
        cpu: bool,
        /// The image for GPU instances
        #[arg(long)]
        cuda: bool,
        /// Only rehearse the CUDA path, over stand-ins of CUDA's libraries
        #[arg(long, requires = "cuda")]
        rehearse: bool,
        /// The release build of gpu-task
        #[arg(long, default_value = "target/release/gpu-task")]
        gpu_task: PathBuf,
        /// A model bundle for one inference
        #[arg(long)]
        model: PathBuf,
        /// A model bundle of ViT-B/32 in fp16, for the rehearsal
        #[arg(long, required_if_eq("cuda", "true"))]
        rehearsal_model: Option<PathBuf>,
        /// The folder of libcuda_stand_in.so and cuda-soak, for the rehearsal
        #[arg(long, default_value = "target/debug")]
        stand_ins: PathBuf,
        /// Downloads and the root filesystem are kept here
        #[arg(long, default_value = ".tools/image")]
        work: PathBuf,
        /// A Python with pip, which downloads the native libraries
        #[arg(long, default_value = "python3")]
        python: PathBuf,
        /// The AWS emulator's program, for the trial
        #[arg(
            long,
            env = "LOCAL_MINISTACK",
            default_value = ".tools/venv/bin/ministack"
        )]
        emulator: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("infra-checks: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn read_template(path: &Path) -> anyhow::Result<Template> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    Ok(Template::parse(&text)?)
}

fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let root = arguments.root.canonicalize()?;
    match &arguments.command {
        Action::Lint {
            tools,
            own,
            synthesised,
        } => {
            eprintln!("own assertions");
            let mut project = Project::read(&root)?;
            for path in synthesised {
                project.synthesised.push(read_template(path)?);
            }
            let mut findings = project.findings();
            if !own {
                let scratch = root.join(".tools/lint-infra");
                std::fs::create_dir_all(&scratch)?;
                findings.extend(Linters::new(&root, tools)?.run(&scratch, synthesised)?);
            }
            for finding in &findings {
                println!("{finding}");
            }
            match findings.len() {
                0 => println!("lint-infra: no findings"),
                many => println!("lint-infra: {many} findings"),
            }
            Ok(findings.is_empty())
        }
        Action::Image {
            cpu: _,
            cuda,
            rehearse,
            gpu_task,
            model,
            rehearsal_model,
            stand_ins,
            work,
            python,
            emulator,
        } => {
            let variant = if *cuda { Variant::Cuda } else { Variant::Cpu };
            let stand_ins = root.join(stand_ins);
            let request = image::Request {
                variant,
                root: &root,
                gpu_task: &root.join(gpu_task),
                model: &root.join(model),
                work: &root.join(work),
                python,
                emulator: &root.join(emulator),
                stand_in: &stand_ins.join("libcuda_stand_in.so"),
                soak: &stand_ins.join("cuda-soak"),
                rehearsal_model: &root.join(rehearsal_model.as_deref().unwrap_or(model)),
            };
            if *rehearse {
                return image::rehearse(&request);
            }
            let report = image::build(&request)?;
            println!("{report}");
            Ok(report.is_good())
        }
    }
}
