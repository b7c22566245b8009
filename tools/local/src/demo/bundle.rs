//! The model bundle of the demo: a given one, or one made here from OpenAI's
//! weights, or, loudly, from synthesised ones.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
};

use clap::ValueEnum;
use clip_model::{
    Bundle,
    fetch::{self, FetchError, PUBLISHED},
};
use thiserror::Error;

use ministack::process;

use crate::demo::screen::Screen;

/// Where the weights of a bundle that is made here come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Weights {
    /// OpenAI's, if they are here or the model hub is in reach; synthesised otherwise
    #[default]
    Auto,
    /// OpenAI's, from the model hub
    Published,
    /// Made from a seed: the vectors mean nothing
    Synthesised,
}

#[derive(Debug, Error)]
pub enum BundleProblem {
    #[error("{path} is no usable model bundle: {problem}")]
    Unusable { path: PathBuf, problem: String },
    #[error("{path} is a bundle of {found}, not of {wanted}: choose it with --model {found}")]
    OtherModel {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    #[error("clip-model {step} failed ({status}): {output}")]
    Maker {
        /// `fetch`, `synthesize` or `build`.
        step: String,
        status: ExitStatus,
        output: String,
    },
    #[error(
        "OpenAI's weights of {model} are not here, and the model hub cannot be reached: {source}"
    )]
    Hub { model: String, source: FetchError },
    #[error("OpenAI published no weights of {model}: use --weights synthesised")]
    NotPublished { model: String },
    #[error("{what}: {source}")]
    System {
        what: String,
        source: std::io::Error,
    },
}

pub struct ReadyBundle {
    pub folder: PathBuf,
    pub model: String,
    pub synthesized: bool,
    pub precision: String,
}

pub fn folder_name(model: &str) -> String {
    model.replace('/', "-")
}

/// Opens the bundle at `given`, or the one of these weights in the work folder,
/// which is made first if there is none.
pub async fn ready(
    given: Option<&Path>,
    model: &str,
    weights: Weights,
    work_dir: &Path,
    screen: &Screen,
) -> Result<ReadyBundle, BundleProblem> {
    let folder = match given {
        Some(given) => given.to_owned(),
        None => own(model, weights, &work_dir.join("models"), screen).await?,
    };
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

/// The folder of the work folder's bundle, with a bundle in it.
async fn own(
    model: &str,
    weights: Weights,
    models: &Path,
    screen: &Screen,
) -> Result<PathBuf, BundleProblem> {
    fs::create_dir_all(models).map_err(system("making the models' folder"))?;
    let name = folder_name(model);
    let published = models.join(format!("{name}-openai"));
    if weights != Weights::Synthesised {
        if is_bundle(&published) {
            return Ok(published);
        }
        match fetched(model, models, screen).await {
            Ok(file) => {
                build(&file, &published, screen).await?;
                return Ok(published);
            }
            Err(problem) if weights == Weights::Published => return Err(problem),
            Err(problem) => screen.note(&problem.to_string()),
        }
    }
    let synthesised = models.join(&name);
    if !is_bundle(&synthesised) {
        screen.note(&format!(
            "no bundle of {model} yet: making one from synthesised weights (once, about half a minute)"
        ));
        let file = models.join(format!(".{name}.safetensors"));
        let made = async {
            run(&["synthesize", model, "--output", &file.display().to_string()]).await?;
            build(&file, &synthesised, screen).await
        }
        .await;
        // They can be made again; half a gigabyte twice helps nobody.
        let _ = fs::remove_file(&file);
        made?;
    }
    Ok(synthesised)
}

fn is_bundle(folder: &Path) -> bool {
    folder.join("manifest.json").is_file()
}

/// OpenAI's weights, downloaded and checked, or here from before. The file is
/// kept: a bundle in another precision needs no second download.
async fn fetched(model: &str, models: &Path, screen: &Screen) -> Result<PathBuf, BundleProblem> {
    if !PUBLISHED.iter().any(|(name, _)| *name == model) {
        return Err(BundleProblem::NotPublished {
            model: model.to_owned(),
        });
    }
    let hub = fetch::endpoint();
    let answer = tokio::task::spawn_blocking({
        let hub = hub.clone();
        move || fetch::probe(&hub)
    });
    if let Ok(Err(source)) = answer.await {
        return Err(BundleProblem::Hub {
            model: model.to_owned(),
            source,
        });
    }
    let folder = models.join(format!("{}-openai-weights", folder_name(model)));
    let file = folder.join("weights.safetensors");
    screen.note(&format!(
        "fetching OpenAI's weights of {model} from {hub} into {} (once)",
        folder.display()
    ));
    let mut fetch = maker();
    fetch.args(["fetch", model, "--output"]).arg(&file);
    // It shows its progress and, if it fails, why.
    let status = fetch
        .status()
        .await
        .map_err(system("starting clip-model"))?;
    if status.success() {
        return Ok(file);
    }
    Err(BundleProblem::Maker {
        step: "fetch".to_owned(),
        status,
        output: format!("OpenAI's weights of {model} were not fetched"),
    })
}

/// Compiles weights, beside the bundle's place until it is whole.
async fn build(weights: &Path, folder: &Path, screen: &Screen) -> Result<(), BundleProblem> {
    screen.note("compiling the weights into ONNX graphs and embedding the labels");
    let unfinished = folder.with_extension("unfinished");
    run(&[
        "build",
        "--weights",
        &weights.display().to_string(),
        "--output",
        &unfinished.display().to_string(),
    ])
    .await?;
    fs::rename(&unfinished, folder).map_err(system("putting the bundle in its place"))
}

fn system(what: &'static str) -> impl Fn(std::io::Error) -> BundleProblem {
    move |source| BundleProblem::System {
        what: what.to_owned(),
        source,
    }
}

fn maker() -> tokio::process::Command {
    let mut command = tokio::process::Command::new(process::sibling("clip-model"));
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

async fn run(arguments: &[&str]) -> Result<(), BundleProblem> {
    let output = maker()
        .args(arguments)
        .env_clear()
        .envs(process::base_environment())
        .output()
        .await
        .map_err(system("starting clip-model"))?;
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
