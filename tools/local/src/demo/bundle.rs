//! The model bundle of the demo: a given one, or one made here from
//! synthesised weights, loudly.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use clip_model::Bundle;
use thiserror::Error;

use ministack::process;

use crate::demo::screen::Screen;

/// Why there is no bundle.
#[derive(Debug, Error)]
pub enum BundleProblem {
    /// It is there and cannot be used.
    #[error("{path} is no usable model bundle: {problem}")]
    Unusable {
        /// Its folder.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// It is another model's.
    #[error("{path} is a bundle of {found}, not of {wanted}: choose it with --model {found}")]
    OtherModel {
        /// Its folder.
        path: PathBuf,
        /// What it is of.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// It could not be made.
    #[error("clip-model {step} failed ({status}): {output}")]
    Maker {
        /// `synthesize` or `build`.
        step: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        output: String,
    },
    /// A program or folder.
    #[error("{what}: {source}")]
    System {
        /// What was being done.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A bundle and what to say of it.
pub struct ReadyBundle {
    /// Its folder.
    pub folder: PathBuf,
    /// The model's name.
    pub model: String,
    /// Its vectors mean nothing.
    pub synthesized: bool,
    /// Its arithmetic, such as `fp32`.
    pub precision: String,
}

/// A model's name as a folder's.
#[must_use]
pub fn folder_name(model: &str) -> String {
    model.replace('/', "-")
}

/// Opens the bundle at `given`, or the one in the work folder, which is made
/// first if there is none.
///
/// # Errors
/// When it cannot be opened or made.
pub async fn ready(
    given: Option<&Path>,
    model: &str,
    work_dir: &Path,
    screen: &Screen,
) -> Result<ReadyBundle, BundleProblem> {
    let folder = given.map_or_else(
        || work_dir.join("models").join(folder_name(model)),
        Path::to_owned,
    );
    if given.is_none() && !folder.join("manifest.json").is_file() {
        make(model, &folder, screen).await?;
    }
    let bundle = Bundle::open(&folder).map_err(|error| BundleProblem::Unusable {
        path: folder.clone(),
        problem: error.to_string(),
    })?;
    let manifest = bundle.manifest();
    if given.is_none() && manifest.model != model && model != "tiny" {
        return Err(BundleProblem::OtherModel {
            path: folder,
            found: manifest.model.clone(),
            wanted: model.to_owned(),
        });
    }
    Ok(ReadyBundle {
        model: manifest.model.clone(),
        synthesized: manifest.is_synthesized(),
        precision: manifest.precision.to_string(),
        folder,
    })
}

/// Synthesises weights and builds a bundle of them, beside its place until it is whole.
async fn make(model: &str, folder: &Path, screen: &Screen) -> Result<(), BundleProblem> {
    let system = |what: &str| {
        let what = what.to_owned();
        move |source| BundleProblem::System { what, source }
    };
    let models = folder.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(models).map_err(system("making the models' folder"))?;
    let name = folder_name(model);
    let weights = models.join(format!(".{name}.safetensors"));
    let unfinished = models.join(format!(".{name}.unfinished"));
    screen.note(&format!(
        "no bundle of {model} yet: making one from synthesised weights (once, about half a minute)"
    ));
    let result = async {
        run(&[
            "synthesize",
            model,
            "--output",
            &weights.display().to_string(),
        ])
        .await?;
        screen.note("compiling the weights into ONNX graphs and embedding the labels");
        run(&[
            "build",
            "--weights",
            &weights.display().to_string(),
            "--output",
            &unfinished.display().to_string(),
        ])
        .await
    }
    .await;
    // The weights are in the bundle now; half a gigabyte twice helps nobody.
    let _ = fs::remove_file(&weights);
    result?;
    fs::rename(&unfinished, folder).map_err(system("putting the bundle in its place"))
}

async fn run(arguments: &[&str]) -> Result<(), BundleProblem> {
    let program = process::sibling("clip-model");
    let output = tokio::process::Command::new(&program)
        .args(arguments)
        .env_clear()
        .envs(process::base_environment())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| BundleProblem::System {
            what: format!("starting {}", program.display()),
            source,
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(BundleProblem::Maker {
        step: arguments
            .first()
            .map(|step| (*step).to_owned())
            .unwrap_or_default(),
        status: output.status,
        output: said.trim().lines().last().unwrap_or_default().to_owned(),
    })
}
