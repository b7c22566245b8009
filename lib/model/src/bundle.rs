//! A bundle on disk: the compiled graphs, the labels, the vocabulary, and the manifest that says
//! what they are.
//!
//! ```text
//! manifest.json        what the bundle is, with the size and digest of each other file
//! vision.onnx          pixels → embeddings; its weights in vision.onnx.data
//! text.onnx            tokens → embeddings; its weights in text.onnx.data
//! tokenizer.txt        merges of the byte-pair encoding
//! labels.safetensors   names and normalised embeddings of the labels
//! ```
//!
//! The last three are absent from a bundle of the vision tower alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::architecture::Architecture;
use crate::files::{sha256_of_bytes, sha256_of_file};
use crate::labels::Labels;
use crate::precision::Precision;
use crate::tokenizer::Tokenizer;

/// File name of the manifest.
pub const MANIFEST: &str = "manifest.json";
/// File name of the vision tower's graph.
pub const VISION_GRAPH: &str = "vision.onnx";
/// File name of the vision tower's weights.
pub const VISION_DATA: &str = "vision.onnx.data";
/// File name of the text tower's graph.
pub const TEXT_GRAPH: &str = "text.onnx";
/// File name of the text tower's weights.
pub const TEXT_DATA: &str = "text.onnx.data";
/// File name of the tokenizer's merges.
pub const TOKENIZER: &str = "tokenizer.txt";
/// File name of the labels' embeddings.
pub const LABELS: &str = "labels.safetensors";

/// The version of what this module writes and reads; raised with every incompatible change.
pub const FORMAT: u32 = 1;

/// Files up to this size are hashed whenever a bundle is opened (a few milliseconds); larger ones
/// only by [`Bundle::verify`], because hashing the weights costs a good part of a task's start.
const HASHED_ON_OPEN_BYTES: u64 = 4 << 20;

/// Why a bundle cannot be used.
#[allow(missing_docs)] // The messages say it.
#[derive(Debug, Error)]
pub enum BundleError {
    #[error("no model bundle at {}: {reason}; make one with `clip-model build`", path.display())]
    Absent { path: PathBuf, reason: String },
    #[error("the manifest {} is malformed: {reason}", path.display())]
    Manifest { path: PathBuf, reason: String },
    #[error("the bundle {} has format {found}, this program reads format {FORMAT}; build it again", path.display())]
    Format { path: PathBuf, found: u32 },
    #[error("{} does not match its manifest: {reason}; the bundle is damaged, fetch or build it again", path.display())]
    Damaged { path: PathBuf, reason: String },
    #[error("the bundle {} has no {part}; build it without `--vision-only` and `--no-labels`", path.display())]
    Lacking { path: PathBuf, part: &'static str },
}

/// Size and digest of a file of the bundle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDigest {
    /// SHA-256 in lower-case hexadecimal.
    pub sha256: String,
    /// Size in bytes.
    pub bytes: u64,
}

/// Where a bundle's weights come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum WeightsOrigin {
    /// Downloaded from the model hub by `clip-model fetch`.
    Published {
        /// The hub's repository.
        repository: String,
        /// The commit of the repository, where the hub said it.
        revision: Option<String>,
    },
    /// A file of the user's.
    File {
        /// Its name, without its folder.
        name: String,
    },
    /// Made by `clip-model synthesize`: shaped like the real ones, without meaning.
    Synthesized {
        /// The generator's seed.
        seed: u64,
    },
}

impl std::fmt::Display for WeightsOrigin {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WeightsOrigin::Published {
                repository,
                revision: Some(revision),
            } => {
                write!(formatter, "published in {repository} at {revision}")
            }
            WeightsOrigin::Published {
                repository,
                revision: None,
            } => {
                write!(formatter, "published in {repository}")
            }
            WeightsOrigin::File { name } => write!(formatter, "from the file {name}"),
            WeightsOrigin::Synthesized { seed } => write!(
                formatter,
                "SYNTHESIZED from seed {seed}: vectors and labels MEAN NOTHING"
            ),
        }
    }
}

/// How an image becomes the pixels that the vision graph takes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Preprocessing {
    /// How the image is made small.
    pub resize: String,
    /// What is kept of it.
    pub crop: String,
    /// The order of the bytes of a pixel.
    pub channels: String,
    /// Subtracted from a channel between 0 and 1. The graph does it, not its caller.
    pub mean: [f64; 3],
    /// Divides it afterwards. The graph does it, not its caller.
    pub deviation: [f64; 3],
}

/// What the labels in a bundle are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelsSummary {
    /// How many.
    pub count: usize,
    /// The sentence whose embedding stands for a label, with `{label}` in its place.
    pub prompt: String,
}

/// What a bundle is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// The version of the bundle's format.
    pub format: u32,
    /// The program that made it.
    pub producer: String,
    /// The model's name, such as `ViT-B/32`.
    pub model: String,
    /// Length of its vectors.
    pub dimensions: usize,
    /// Side of the square image that the vision graph takes, in pixels.
    pub image_size: usize,
    /// The arithmetic of its graphs.
    pub precision: Precision,
    /// Where its weights come from.
    pub weights: WeightsOrigin,
    /// SHA-256 of the weights' file; absent where they were never in one.
    pub weights_sha256: Option<String>,
    /// The shapes of both towers.
    pub architecture: Architecture,
    /// How an image becomes pixels.
    pub preprocessing: Preprocessing,
    /// What its labels are, where it has any.
    pub labels: Option<LabelsSummary>,
    /// Size and digest of every other file.
    pub files: BTreeMap<String, FileDigest>,
}

impl Manifest {
    /// The manifest as it is written.
    pub fn to_json(&self) -> String {
        // A struct of strings and numbers always serialises.
        let mut json = serde_json::to_string_pretty(self).unwrap_or_default();
        json.push('\n');
        json
    }

    /// Identifies the bundle with everything in it: SHA-256 of the manifest, which holds the
    /// digest of every other file.
    pub fn digest(&self) -> String {
        sha256_of_bytes(self.to_json().as_bytes())
    }

    /// Whether its vectors mean nothing.
    pub fn is_synthesized(&self) -> bool {
        matches!(self.weights, WeightsOrigin::Synthesized { .. })
    }
}

/// An opened bundle.
#[derive(Clone, Debug)]
pub struct Bundle {
    folder: PathBuf,
    manifest: Manifest,
    labels: Option<Labels>,
}

impl Bundle {
    /// Opens a bundle for use: reads the manifest, compares every file's size with it, and the
    /// digest of the small ones. The weights' digests are compared by [`Bundle::verify`], which
    /// belongs where a bundle arrives (a download, a copy), not where it is used.
    pub fn open(folder: &Path) -> Result<Bundle, BundleError> {
        let path = folder.join(MANIFEST);
        let json = std::fs::read_to_string(&path).map_err(|error| BundleError::Absent {
            path: folder.to_owned(),
            reason: format!("{}: {error}", path.display()),
        })?;
        let malformed = |error: serde_json::Error| BundleError::Manifest {
            path: path.clone(),
            reason: error.to_string(),
        };
        // The version is read by itself: a manifest of another version need not parse otherwise.
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let version: Version = serde_json::from_str(&json).map_err(malformed)?;
        if version.format != FORMAT {
            return Err(BundleError::Format {
                path: folder.to_owned(),
                found: version.format,
            });
        }
        let manifest: Manifest = serde_json::from_str(&json).map_err(malformed)?;
        for name in manifest.files.keys() {
            if Path::new(name).components().count() != 1
                || name.contains(['/', '\\'])
                || name == ".."
            {
                return Err(BundleError::Manifest {
                    path: path.clone(),
                    reason: format!("`{name}` is not a file name"),
                });
            }
        }
        if !manifest.files.contains_key(VISION_GRAPH) || !manifest.files.contains_key(VISION_DATA) {
            return Err(BundleError::Manifest {
                path: path.clone(),
                reason: format!("it lists no {VISION_GRAPH} with {VISION_DATA}"),
            });
        }
        let mut bundle = Bundle {
            folder: folder.to_owned(),
            manifest,
            labels: None,
        };
        bundle.check(|digest| digest.bytes <= HASHED_ON_OPEN_BYTES)?;
        if bundle.manifest.files.contains_key(LABELS) {
            let labels = Labels::read(&bundle.file(LABELS), bundle.manifest.dimensions)?;
            bundle.labels = Some(labels);
        }
        Ok(bundle)
    }

    /// Compares the digest of every file with the manifest (about a second for ViT-B/32).
    pub fn verify(&self) -> Result<(), BundleError> {
        self.check(|_| true)
    }

    fn check(&self, hash: impl Fn(&FileDigest) -> bool) -> Result<(), BundleError> {
        for (name, expected) in &self.manifest.files {
            let path = self.file(name);
            let damaged = |reason: String| BundleError::Damaged {
                path: path.clone(),
                reason,
            };
            let found = std::fs::metadata(&path).map_err(|error| damaged(error.to_string()))?;
            if found.len() != expected.bytes {
                let reason = format!("{} bytes, wanted {}", found.len(), expected.bytes);
                return Err(damaged(reason));
            }
            if hash(expected) {
                let sha256 = sha256_of_file(&path).map_err(|error| damaged(error.to_string()))?;
                if sha256 != expected.sha256 {
                    return Err(damaged(format!(
                        "sha256 {sha256}, wanted {}",
                        expected.sha256
                    )));
                }
            }
        }
        Ok(())
    }

    /// What it is.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its labels, where it has any.
    pub fn labels(&self) -> Option<&Labels> {
        self.labels.as_ref()
    }

    /// The folder it lies in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Whether it has the text tower.
    pub fn has_text(&self) -> bool {
        self.manifest.files.contains_key(TEXT_GRAPH)
    }

    /// The tokenizer of its text tower.
    pub fn tokenizer(&self) -> Result<Tokenizer, BundleError> {
        if !self.manifest.files.contains_key(TOKENIZER) {
            return Err(BundleError::Lacking {
                path: self.folder.clone(),
                part: "tokenizer",
            });
        }
        let path = self.file(TOKENIZER);
        let damaged = |reason: String| BundleError::Damaged {
            path: path.clone(),
            reason,
        };
        let merges = std::fs::read_to_string(&path).map_err(|error| damaged(error.to_string()))?;
        let text = &self.manifest.architecture.text;
        Tokenizer::new(&merges, text.vocabulary, text.context)
            .map_err(|error| damaged(error.to_string()))
    }
}
