//! `cargo xtask conformance`: decoder and model beside Pillow and PyTorch CLIP
//! over any folder of images.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::Context;
use clap::Args;

use crate::tools::{Environment, Profile, Tools};

#[derive(Args)]
pub struct Arguments {
    /// Folder to search, with all below it
    folder: PathBuf,
    /// Weights for both sides; without, weights are made from a seed
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Compare the crops only, which needs no weights
    #[arg(long)]
    crops_only: bool,
    /// Where crops and report.json go
    #[arg(long, default_value = "target/conformance")]
    out: PathBuf,
}

/// Compares the crops, then the embeddings. Fails when either disagrees.
pub fn run_command(tools: &Tools, arguments: Arguments) -> anyhow::Result<ExitCode> {
    let environment = tools.install(Environment::Reference)?;
    let python = environment
        .iter()
        .find(|(name, _)| *name == "REFERENCE_PYTHON")
        .map(|(_, python)| python.clone())
        .context("the reference environment names no Python")?;
    tools.build(&["clip-image", "clip-model"], Profile::Release)?;
    let mut crops = tools.program("clip-image", Profile::Release, &environment);
    crops.arg("conformance").arg(&arguments.folder);
    crops.arg("--python").arg(&python);
    crops.arg("--out").arg(&arguments.out);
    let crops_agree = crops
        .status()
        .context("clip-image cannot be started")?
        .success();
    if arguments.crops_only {
        return Ok(exit_code(crops_agree));
    }

    let (weights, bundle) = match arguments.weights {
        Some(weights) => {
            let bundle = tools.root.join(".local/models/conformance");
            tools.build_bundle(&weights, &bundle, &environment)?;
            (weights, bundle)
        }
        None => tools.synthesized_model(&environment)?,
    };
    let clip_model = tools.program("clip-model", Profile::Release, &[]);
    let mut embeddings = Command::new(&python);
    embeddings.arg(tools.root.join("tests/conformance/embeddings.py"));
    embeddings.arg("--crops").arg(&arguments.out);
    embeddings.arg("--weights").arg(&weights);
    embeddings.arg("--bundle").arg(&bundle);
    embeddings.arg("--clip-model").arg(clip_model.get_program());
    embeddings.envs(environment);
    let embeddings_agree = embeddings
        .status()
        .context("Python cannot be started")?
        .success();
    Ok(exit_code(crops_agree && embeddings_agree))
}

fn exit_code(success: bool) -> ExitCode {
    if success {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
