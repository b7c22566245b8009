//! Builds a bundle from a checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::bundle::{
    Bundle, BundleError, FORMAT, FileDigest, LABELS, LabelsSummary, MANIFEST, Manifest,
    Preprocessing, TEXT_DATA, TEXT_GRAPH, TOKENIZER, VISION_DATA, VISION_GRAPH, WeightsOrigin,
};
use crate::checkpoint::{Checkpoint, Tower};
use crate::engine::{EngineError, EngineOptions, TextEngine};
use crate::fetch::Receipt;
use crate::files::{make_readable, sha256_of_file};
use crate::labels::{DEFAULT_LABELS, Labels, PROMPT, parse_list};
use crate::precision::Precision;
use crate::tokenizer::{OPENAI_MERGES, Tokenizer, TokenizerError};
use crate::towers::{self, CompileError, PIXEL_DEVIATION, PIXEL_MEAN, Target};

/// Texts embedded in one run while labels are made; they are short, so many fit.
const LABEL_BATCH: usize = 32;

/// Why a bundle cannot be built.
#[allow(missing_docs)] // The messages say it.
#[derive(Debug, Error)]
pub enum BuildError {
    #[error(transparent)]
    Compile(#[from] CompileError),
    #[error("cannot encode the labels: {0}")]
    Labels(#[from] TokenizerError),
    #[error("cannot embed the labels: {0}; `--no-labels` builds a bundle without them")]
    Engine(#[from] EngineError),
    #[error("the list of labels is empty; `--no-labels` builds a bundle without any")]
    NoLabels,
    #[error("cannot write the bundle: {}: {source}", path.display())]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(transparent)]
    Bundle(#[from] BundleError),
}

/// What goes into a bundle.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// The arithmetic of its graphs.
    pub precision: Precision,
    /// Whether the text tower, the tokenizer and the labels are left out.
    pub vision_only: bool,
    /// Its labels; none leaves them out, which needs no ONNX Runtime.
    pub labels: Option<Vec<String>>,
    /// How the labels' embeddings are computed.
    pub engine: EngineOptions,
}

impl Default for BuildOptions {
    fn default() -> BuildOptions {
        BuildOptions {
            precision: Precision::Fp32,
            vision_only: false,
            labels: Some(parse_list(DEFAULT_LABELS)),
            engine: EngineOptions {
                max_batch: LABEL_BATCH,
                // A build shares its machine with whatever waits for it.
                spinning: false,
                ..EngineOptions::default()
            },
        }
    }
}

/// What a build is doing, for whoever watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Another block was compiled.
    Block,
    /// The labels are being embedded.
    Labels,
    /// The digests are being computed.
    Digests,
}

/// Compiles a checkpoint into a bundle at `output`, replacing one that is there. The bundle appears
/// whole or not at all.
pub fn build(
    checkpoint: &Checkpoint,
    output: &Path,
    options: &BuildOptions,
    progress: &dyn Fn(Step),
) -> Result<Bundle, BuildError> {
    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| BuildError::Write { path, source }
    };
    let parent = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    std::fs::create_dir_all(parent).map_err(write(parent))?;
    // Beside the output, so that renaming does not cross file systems.
    let staging = tempfile::Builder::new()
        .prefix(".clip-model-")
        .tempdir_in(parent)
        .map_err(write(parent))?;
    let folder = staging.path();
    let architecture = *checkpoint.architecture();
    let block = || progress(Step::Block);

    let vision = Target {
        folder,
        graph: VISION_GRAPH,
        data: VISION_DATA,
        precision: options.precision,
    };
    towers::compile(checkpoint, Tower::Vision, vision, &block)?;
    let mut labels_summary = None;
    if !options.vision_only {
        let text = Target {
            graph: TEXT_GRAPH,
            data: TEXT_DATA,
            precision: match options.precision {
                // Texts are few: their vectors can be exact.
                Precision::Int8 => Precision::Fp32,
                other => other,
            },
            ..vision
        };
        towers::compile(checkpoint, Tower::Text, text, &block)?;
        let merges = folder.join(TOKENIZER);
        std::fs::write(&merges, OPENAI_MERGES).map_err(write(&merges))?;
        if let Some(names) = &options.labels {
            progress(Step::Labels);
            if names.is_empty() {
                return Err(BuildError::NoLabels);
            }
            let tokenizer = Tokenizer::new(
                OPENAI_MERGES,
                architecture.text.vocabulary,
                architecture.text.context,
            )?;
            let graph = folder.join(TEXT_GRAPH);
            let mut engine =
                TextEngine::load_graph(&graph, architecture.dimensions, &options.engine)?;
            let labels = embed_labels(names, &tokenizer, &mut engine)?;
            let path = folder.join(LABELS);
            labels.write(&path).map_err(write(&path))?;
            labels_summary = Some(LabelsSummary {
                count: names.len(),
                prompt: PROMPT.to_owned(),
            });
        }
    }

    progress(Step::Digests);
    let mut files = BTreeMap::new();
    for name in [
        VISION_GRAPH,
        VISION_DATA,
        TEXT_GRAPH,
        TEXT_DATA,
        TOKENIZER,
        LABELS,
    ] {
        let path = folder.join(name);
        if !path.exists() {
            continue;
        }
        let sha256 = sha256_of_file(&path).map_err(write(&path))?;
        let bytes = std::fs::metadata(&path).map_err(write(&path))?.len();
        files.insert(name.to_owned(), FileDigest { sha256, bytes });
    }
    let (weights, weights_sha256) =
        origin(checkpoint).map_err(|(path, source)| BuildError::Write { path, source })?;
    let manifest = Manifest {
        format: FORMAT,
        producer: format!("{} {}", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")),
        model: architecture.name(),
        dimensions: architecture.dimensions,
        image_size: architecture.vision.image_size,
        precision: options.precision,
        weights,
        weights_sha256,
        architecture,
        preprocessing: Preprocessing {
            resize: "shorter side to image_size, bicubic with antialiasing".to_owned(),
            crop: "centre".to_owned(),
            channels: "RGB".to_owned(),
            mean: PIXEL_MEAN,
            deviation: PIXEL_DEVIATION,
        },
        labels: labels_summary,
        files,
    };
    let path = folder.join(MANIFEST);
    std::fs::write(&path, manifest.to_json()).map_err(write(&path))?;
    make_readable(folder).map_err(write(folder))?;
    replace(staging, output).map_err(write(output))?;
    Ok(Bundle::open(output)?)
}

/// Puts the finished folder in place of what is there.
fn replace(staging: tempfile::TempDir, output: &Path) -> std::io::Result<()> {
    if output.exists() {
        // A folder cannot be renamed over another: the old one steps aside first, and goes with
        // the temporary folder that it is moved into.
        let aside = tempfile::Builder::new()
            .prefix(".clip-model-")
            .tempdir_in(staging.path().parent().unwrap_or(Path::new(".")))?;
        std::fs::rename(output, aside.path().join("old"))?;
    }
    let finished = staging.keep();
    std::fs::rename(&finished, output).inspect_err(|_| {
        // Best effort: the error that matters is the rename's.
        let _ = std::fs::remove_dir_all(&finished);
    })
}

fn embed_labels(
    names: &[String],
    tokenizer: &Tokenizer,
    engine: &mut TextEngine,
) -> Result<Labels, BuildError> {
    let mut embeddings = Vec::with_capacity(names.len() * engine.dimensions());
    for part in names.chunks(LABEL_BATCH) {
        let prompts: Vec<String> = part
            .iter()
            .map(|name| PROMPT.replace("{label}", name))
            .collect();
        let tokens = tokenizer.encode_batch(&prompts)?;
        embeddings.extend(engine.embed(&tokens)?);
    }
    Ok(Labels::new(names.to_vec(), engine.dimensions(), embeddings))
}

/// Where a checkpoint's weights come from, and their digest.
fn origin(
    checkpoint: &Checkpoint,
) -> Result<(WeightsOrigin, Option<String>), (PathBuf, std::io::Error)> {
    let Some(path) = checkpoint.path() else {
        let seed = checkpoint.synthesized_seed().unwrap_or_default();
        return Ok((WeightsOrigin::Synthesized { seed }, None));
    };
    let sha256 = sha256_of_file(path).map_err(|source| (path.to_owned(), source))?;
    if let Some(seed) = checkpoint.synthesized_seed() {
        return Ok((WeightsOrigin::Synthesized { seed }, Some(sha256)));
    }
    let origin = match Receipt::beside(path) {
        // A receipt counts only for the very file that it was written for.
        Some(receipt) if receipt.sha256 == sha256 => WeightsOrigin::Published {
            repository: receipt.repository,
            revision: receipt.revision,
        },
        _ => {
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            WeightsOrigin::File { name }
        }
    };
    Ok((origin, Some(sha256)))
}
