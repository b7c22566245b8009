//! `local`: the pipeline on one machine.

use std::{collections::BTreeMap, path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use local::demo::{self, DemoEnd, DemoOptions, Weights};
use tokio::signal::unix::{SignalKind, signal};

/// Some image has no vector, or the cluster is not back at zero.
const SOME_FAILED: u8 = 1;
/// The demo could not begin.
const NOT_BEGUN: u8 = 2;
/// As shells report a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

#[derive(Parser)]
#[command(
    name = "local",
    version,
    about = "The pipeline on one machine, with an emulated AWS"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Embed images through the whole pipeline and show how it goes
    ///
    /// Exit code: 0 when every file has its vector and the cluster is back at zero, 1 when
    /// some file was rejected or lost, 2 when it could not begin, 130 after Ctrl-C.
    Demo {
        /// Images, or folders of them (recursively); own sample images without any
        paths: Vec<PathBuf>,
        /// Upload this many images, made of those files under other names
        #[arg(long, value_name = "IMAGES", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        burst: Option<u32>,
        /// The model: ViT-B/32, ViT-B/16 or ViT-L/14
        #[arg(long, default_value = "ViT-B/32")]
        model: String,
        /// A model bundle made by clip-model [default: one in WORK_DIR/models, made if absent]
        #[arg(long, conflicts_with = "weights")]
        bundle: Option<PathBuf>,
        /// The weights of a bundle that is made
        #[arg(long, value_enum, default_value_t)]
        weights: Weights,
        /// Never more instances than this
        #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
        max_instances: u16,
        /// The template to deploy, as YAML or as CDK synthesises it [default: infra/template.yaml]
        #[arg(long, value_name = "FILE", conflicts_with = "max_instances")]
        template: Option<PathBuf>,
        /// Where models, results and logs lie
        #[arg(long, default_value = ".local")]
        work_dir: PathBuf,
        /// Leave the pipeline up at the end, until Ctrl-C
        #[arg(long)]
        keep: bool,
        /// Set a parameter of the template, such as Decode=fast; can be repeated
        #[arg(long = "parameter", value_name = "NAME=VALUE", value_parser = parameter)]
        parameters: Vec<(String, String)>,
    },
}

fn parameter(text: &str) -> Result<(String, String), &'static str> {
    let (name, value) = text.split_once('=').ok_or("NAME=VALUE is accepted")?;
    Ok((name.to_owned(), value.to_owned()))
}

fn main() -> ExitCode {
    platform::init_logs("local");
    let Command::Demo {
        paths,
        burst,
        model,
        bundle,
        weights,
        max_instances,
        template,
        work_dir,
        keep,
        parameters,
    } = Arguments::parse().command;
    let options = DemoOptions {
        paths,
        burst: burst.map(|count| count as usize),
        model,
        bundle,
        weights,
        max_instances: usize::from(max_instances),
        template,
        work_dir,
        keep,
        parameters: parameters.into_iter().collect::<BTreeMap<_, _>>(),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("local: {error}");
            return ExitCode::from(NOT_BEGUN);
        }
    };
    let end = runtime.block_on(demo::run(&options, interruption()));
    match end {
        Ok(DemoEnd::Good) => ExitCode::SUCCESS,
        Ok(DemoEnd::SomeFailed) => ExitCode::from(SOME_FAILED),
        Ok(DemoEnd::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(error) => {
            eprintln!("local: {error}");
            ExitCode::from(NOT_BEGUN)
        }
    }
}

/// Ctrl-C, or the end of the terminal or of the session.
async fn interruption() {
    let (Ok(mut terminate), Ok(mut hang_up)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::hangup()),
    ) else {
        let _ = tokio::signal::ctrl_c().await;
        return;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
}
