//! Command line: `infra-checks lint`, `infra-checks image`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use infra_checks::Project;
use infra_checks::image::{self, Request};
use infra_checks::linters::Linters;
use template::Template;

#[derive(Parser)]
#[command(
    name = "infra-checks",
    version,
    about = "Checks the deployment offline"
)]
struct Arguments {
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
    Image(Box<Request>),
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
    match &arguments.command {
        Action::Lint {
            tools,
            own,
            synthesised,
        } => {
            let root = Path::new(".").canonicalize()?;
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
        Action::Image(request) if request.rehearse => image::rehearse(request),
        Action::Image(request) => {
            let report = image::build(request)?;
            println!("{report}");
            Ok(report.is_good())
        }
    }
}
