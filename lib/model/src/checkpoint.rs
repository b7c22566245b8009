//! A CLIP checkpoint on disk: safetensors in OpenAI's or Hugging Face's layout, memory-mapped, and
//! read tensor by tensor so that no more than one is in memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use thiserror::Error;

use crate::architecture::{
    Activation, Architecture, OPENAI_HEAD_WIDTH, TextTower, Transformer, VisionTower,
};
use crate::fetch::Receipt;
use crate::synthesize::{MARK_KEY, Mark, SynthesizedWeights};

/// How the hub's repositories with OpenAI's own weights end.
const OPENAI_SUFFIX: &str = ".openai";

/// Why a checkpoint cannot be used.
#[allow(missing_docs)] // The messages say it.
#[derive(Debug, Error)]
pub enum CheckpointError {
    #[error("cannot read weights {}: {reason}", path.display())]
    Read { path: PathBuf, reason: String },
    #[error("cannot write weights {}: {reason}", path.display())]
    Write { path: PathBuf, reason: String },
    #[error("{} is not a safetensors file: {reason}", path.display())]
    Format { path: PathBuf, reason: String },
    #[error(
        "{origin} is not a CLIP checkpoint: it has neither `visual.conv1.weight` (OpenAI, OpenCLIP) \
         nor `vision_model.embeddings.patch_embedding.weight` (Hugging Face); its first tensors are {first}"
    )]
    UnknownLayout { origin: String, first: String },
    #[error("{origin} has no tensor `{name}`, wanted with shape {wanted:?}")]
    Missing {
        origin: String,
        name: String,
        wanted: Vec<usize>,
    },
    #[error("tensor `{name}` of {origin} has shape {found:?}, wanted {wanted:?}")]
    Shape {
        origin: String,
        name: String,
        found: Vec<usize>,
        wanted: Vec<usize>,
    },
    #[error("tensor `{name}` of {origin} holds {found}, wanted F32, F16 or BF16")]
    Type {
        origin: String,
        name: String,
        found: String,
    },
    #[error("cannot tell the architecture of {origin}: {reason}")]
    Architecture { origin: String, reason: String },
}

/// How the tensors are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// `visual.transformer.resblocks.…`, as in OpenAI's and OpenCLIP's checkpoints.
    OpenAi,
    /// `vision_model.encoder.layers.…`, as in Hugging Face's `CLIPModel`.
    HuggingFace,
}

/// What the user knows better than the file.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct Overrides {
    /// The non-linearity, where no configuration beside the weights says it.
    #[arg(long)]
    pub activation: Option<Activation>,
    /// Attention heads of the vision tower, where they are not 64 channels each.
    #[arg(long)]
    pub vision_heads: Option<usize>,
    /// Attention heads of the text tower, where they are not 64 channels each.
    #[arg(long)]
    pub text_heads: Option<usize>,
}

enum Store {
    File {
        map: Mmap,
        header_end: usize,
        header: safetensors::tensor::Metadata,
    },
    Synthesized(SynthesizedWeights),
}

/// Tensors by the names of their layout.
struct Weights {
    origin: String,
    path: Option<PathBuf>,
    store: Store,
    layout: Layout,
}

/// A tensor's or a layer's name in OpenAI's layout and in Hugging Face's.
type Names = (&'static str, &'static str);

const PATCHES: Names = (
    "visual.conv1.weight",
    "vision_model.embeddings.patch_embedding.weight",
);
const CLASS_TOKEN: Names = (
    "visual.class_embedding",
    "vision_model.embeddings.class_embedding",
);
const TOKENS: Names = (
    "token_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
);
pub(crate) const ATTENTION_NORM: Names = ("ln_1", "layer_norm1");
pub(crate) const ATTENTION_OUT: Names = ("attn.out_proj", "self_attn.out_proj");
pub(crate) const PERCEPTRON_NORM: Names = ("ln_2", "layer_norm2");
pub(crate) const PERCEPTRON_IN: Names = ("mlp.c_fc", "mlp.fc1");
pub(crate) const PERCEPTRON_OUT: Names = ("mlp.c_proj", "mlp.fc2");

fn positions(tower: Tower) -> Names {
    match tower {
        Tower::Vision => (
            "visual.positional_embedding",
            "vision_model.embeddings.position_embedding.weight",
        ),
        Tower::Text => (
            "positional_embedding",
            "text_model.embeddings.position_embedding.weight",
        ),
    }
}

/// An opened checkpoint whose architecture is known.
pub struct Checkpoint {
    weights: Weights,
    architecture: Architecture,
    synthesized_seed: Option<u64>,
    assumptions: Vec<String>,
}

/// Which tower a weight belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tower {
    /// The tower that reads pixels.
    Vision,
    /// The tower that reads text.
    Text,
}

/// Scale and offset of a layer normalisation.
pub struct Norm {
    /// Multiplies the normalised channels.
    pub scale: Vec<f32>,
    /// Is added to them.
    pub offset: Vec<f32>,
}

/// A linear layer as stored: `weight` is `[out, in]`, row-major.
pub struct Linear {
    /// `[out, in]`, row-major.
    pub weight: Vec<f32>,
    /// `[out]`.
    pub bias: Vec<f32>,
}

impl Checkpoint {
    /// Opens a safetensors file and works out its layout and architecture, from its tensors, from
    /// the metadata of synthesised weights, and from `config.json` (Hugging Face) or
    /// `open_clip_config.json` beside it.
    pub fn open(path: &Path, overrides: Overrides) -> Result<Checkpoint, CheckpointError> {
        let unreadable = |error: std::io::Error| CheckpointError::Read {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        let file = File::open(path).map_err(unreadable)?;
        // SAFETY: the mapping is private to this process and read-only; a file that another
        // process truncates meanwhile ends this one, which a build tool may accept.
        let map = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
        // Shapes and offsets are checked here against the file's length.
        let malformed = |error: safetensors::SafeTensorError| CheckpointError::Format {
            path: path.to_owned(),
            reason: error.to_string(),
        };
        SafeTensors::deserialize(&map).map_err(malformed)?;
        let (header_length, header) = SafeTensors::read_metadata(&map).map_err(malformed)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        // The length of the header's length.
        const LENGTH_BYTES: usize = 8;
        let store = Store::File {
            map,
            header_end: LENGTH_BYTES + header_length,
            header,
        };
        let origin = path.display().to_string();
        let layout = detect_layout(&store, &origin)?;
        let mark = metadata
            .get(MARK_KEY)
            .and_then(|json| serde_json::from_str::<Mark>(json).ok());
        let weights = Weights {
            origin,
            path: Some(path.to_owned()),
            store,
            layout,
        };
        let (architecture, assumptions) = match mark {
            Some(mark) => (mark.architecture, Vec::new()),
            None => weights.infer(overrides)?,
        };
        check(&architecture, &weights.origin)?;
        Ok(Checkpoint {
            weights,
            architecture,
            synthesized_seed: mark.map(|mark| mark.seed),
            assumptions,
        })
    }

    /// Seeded weights as if they had been read from a file.
    pub fn synthesized(weights: SynthesizedWeights) -> Checkpoint {
        Checkpoint {
            architecture: *weights.architecture(),
            synthesized_seed: Some(weights.seed()),
            weights: Weights {
                origin: format!("synthesized weights (seed {})", weights.seed()),
                path: None,
                layout: Layout::OpenAi,
                store: Store::Synthesized(weights),
            },
            assumptions: Vec::new(),
        }
    }

    /// The model's shape.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The seed, where the weights say that they were synthesised.
    pub fn synthesized_seed(&self) -> Option<u64> {
        self.synthesized_seed
    }

    /// The file it was read from.
    pub fn path(&self) -> Option<&Path> {
        self.weights.path.as_deref()
    }

    /// What had to be assumed because nothing beside the tensors said it.
    pub fn assumptions(&self) -> &[String] {
        &self.assumptions
    }

    /// One tensor as 32-bit floats, after checking its shape.
    pub(crate) fn tensor(&self, name: &str, wanted: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        let Some(found) = self.weights.store.shape(name) else {
            return Err(CheckpointError::Missing {
                origin: self.weights.origin.clone(),
                name: name.to_owned(),
                wanted: wanted.to_vec(),
            });
        };
        if found != wanted {
            return Err(CheckpointError::Shape {
                origin: self.weights.origin.clone(),
                name: name.to_owned(),
                found,
                wanted: wanted.to_vec(),
            });
        }
        match &self.weights.store {
            Store::Synthesized(weights) => Ok(weights.values(name).unwrap_or_default()),
            Store::File {
                map,
                header_end,
                header,
            } => {
                let Some(info) = header.info(name) else {
                    return Ok(Vec::new());
                };
                let (start, end) = info.data_offsets;
                let bytes = &map[header_end + start..header_end + end];
                decode(bytes, info.dtype).ok_or_else(|| CheckpointError::Type {
                    origin: self.weights.origin.clone(),
                    name: name.to_owned(),
                    found: format!("{:?}", info.dtype),
                })
            }
        }
    }

    /// The patch convolution `[width, 3, patch, patch]`.
    pub(crate) fn patch_convolution(&self) -> Result<Vec<f32>, CheckpointError> {
        let vision = &self.architecture.vision;
        let shape = [
            vision.transformer.width,
            3,
            vision.patch_size,
            vision.patch_size,
        ];
        self.tensor(self.weights.pick(PATCHES), &shape)
    }

    /// The class token `[width]`.
    pub(crate) fn class_token(&self) -> Result<Vec<f32>, CheckpointError> {
        self.tensor(
            self.weights.pick(CLASS_TOKEN),
            &[self.architecture.vision.transformer.width],
        )
    }

    /// The learnt positions `[tokens, width]` of a tower.
    pub(crate) fn positions(&self, tower: Tower) -> Result<Vec<f32>, CheckpointError> {
        let tokens = match tower {
            Tower::Vision => self.architecture.vision.tokens(),
            Tower::Text => self.architecture.text.context,
        };
        let shape = [tokens, self.transformer(tower).width];
        self.tensor(self.weights.pick(positions(tower)), &shape)
    }

    /// The token embedding `[vocabulary, width]`.
    pub(crate) fn token_embedding(&self) -> Result<Vec<f32>, CheckpointError> {
        let text = &self.architecture.text;
        let shape = [text.vocabulary, text.transformer.width];
        self.tensor(self.weights.pick(TOKENS), &shape)
    }

    /// The normalisation before the vision tower's first block.
    pub(crate) fn norm_before(&self) -> Result<Norm, CheckpointError> {
        // The misspelling is Hugging Face's.
        let name = self
            .weights
            .pick(("visual.ln_pre", "vision_model.pre_layrnorm"));
        self.norm(name, self.architecture.vision.transformer.width)
    }

    pub(crate) fn norm_after(&self, tower: Tower) -> Result<Norm, CheckpointError> {
        let names = match tower {
            Tower::Vision => ("visual.ln_post", "vision_model.post_layernorm"),
            Tower::Text => ("ln_final", "text_model.final_layer_norm"),
        };
        self.norm(self.weights.pick(names), self.transformer(tower).width)
    }

    /// The projection into the shared space as `[width, dimensions]`, row-major.
    pub(crate) fn projection(&self, tower: Tower) -> Result<Vec<f32>, CheckpointError> {
        let width = self.transformer(tower).width;
        let dimensions = self.architecture.dimensions;
        match (self.weights.layout, tower) {
            (Layout::OpenAi, Tower::Vision) => self.tensor("visual.proj", &[width, dimensions]),
            (Layout::OpenAi, Tower::Text) => self.tensor("text_projection", &[width, dimensions]),
            (Layout::HuggingFace, _) => {
                let name = match tower {
                    Tower::Vision => "visual_projection.weight",
                    Tower::Text => "text_projection.weight",
                };
                let stored = self.tensor(name, &[dimensions, width])?;
                Ok(transpose(&stored, dimensions, width))
            }
        }
    }

    pub(crate) fn block_norm(
        &self,
        tower: Tower,
        layer: usize,
        names: Names,
    ) -> Result<Norm, CheckpointError> {
        let name = self.weights.block(tower, layer, names);
        self.norm(&name, self.transformer(tower).width)
    }

    pub(crate) fn block_linear(
        &self,
        tower: Tower,
        layer: usize,
        names: Names,
        out: usize,
        into: usize,
    ) -> Result<Linear, CheckpointError> {
        self.linear(&self.weights.block(tower, layer, names), out, into)
    }

    /// The projections to queries, keys and values of a block.
    pub(crate) fn attention_in(
        &self,
        tower: Tower,
        layer: usize,
    ) -> Result<[Linear; 3], CheckpointError> {
        let width = self.transformer(tower).width;
        match self.weights.layout {
            Layout::OpenAi => {
                let prefix = self.weights.block(tower, layer, ("attn", ""));
                let weight =
                    self.tensor(&format!("{prefix}.in_proj_weight"), &[3 * width, width])?;
                let bias = self.tensor(&format!("{prefix}.in_proj_bias"), &[3 * width])?;
                let part = |index: usize| Linear {
                    weight: weight[index * width * width..(index + 1) * width * width].to_vec(),
                    bias: bias[index * width..(index + 1) * width].to_vec(),
                };
                Ok([part(0), part(1), part(2)])
            }
            Layout::HuggingFace => {
                let part = |name: &str| {
                    let attention = self.weights.block(tower, layer, ("", "self_attn"));
                    self.linear(&format!("{attention}.{name}"), width, width)
                };
                Ok([part("q_proj")?, part("k_proj")?, part("v_proj")?])
            }
        }
    }

    pub(crate) fn transformer(&self, tower: Tower) -> &Transformer {
        match tower {
            Tower::Vision => &self.architecture.vision.transformer,
            Tower::Text => &self.architecture.text.transformer,
        }
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm, CheckpointError> {
        Ok(Norm {
            scale: self.tensor(&format!("{name}.weight"), &[width])?,
            offset: self.tensor(&format!("{name}.bias"), &[width])?,
        })
    }

    fn linear(&self, name: &str, out: usize, into: usize) -> Result<Linear, CheckpointError> {
        Ok(Linear {
            weight: self.tensor(&format!("{name}.weight"), &[out, into])?,
            bias: self.tensor(&format!("{name}.bias"), &[out])?,
        })
    }
}

impl Weights {
    fn pick(&self, (open_ai, hugging_face): Names) -> &'static str {
        match self.layout {
            Layout::OpenAi => open_ai,
            Layout::HuggingFace => hugging_face,
        }
    }

    fn block(&self, tower: Tower, layer: usize, names: Names) -> String {
        let prefix = match (self.layout, tower) {
            (Layout::OpenAi, Tower::Vision) => "visual.transformer.resblocks",
            (Layout::OpenAi, Tower::Text) => "transformer.resblocks",
            (Layout::HuggingFace, Tower::Vision) => "vision_model.encoder.layers",
            (Layout::HuggingFace, Tower::Text) => "text_model.encoder.layers",
        };
        format!("{prefix}.{layer}.{}", self.pick(names))
    }

    /// Works out the architecture from the tensors' shapes and the configuration beside the file.
    fn infer(&self, overrides: Overrides) -> Result<(Architecture, Vec<String>), CheckpointError> {
        let mut assumptions = Vec::new();
        let mut configuration = self.configuration()?;
        // Whatever the configuration of a conversion says, OpenAI trained with QuickGELU; the other
        // activation gives plausible vectors that are wrong.
        let receipt = self.path.as_deref().and_then(Receipt::beside);
        if receipt.is_some_and(|receipt| receipt.repository.ends_with(OPENAI_SUFFIX)) {
            configuration.vision.activation = Some(Activation::QuickGelu);
            configuration.text.activation = Some(Activation::QuickGelu);
        }
        let convolution = self.shape_of(self.pick(PATCHES), 4)?;
        let (vision_width, patch_size) = (convolution[0], convolution[2]);
        let vision_positions = self.shape_of(self.pick(positions(Tower::Vision)), 2)?;
        let grid = (vision_positions[0].saturating_sub(1)).isqrt();
        if grid * grid + 1 != vision_positions[0] {
            return Err(self.contradiction(format!(
                "its {} vision positions are not a class token and a square grid",
                vision_positions[0]
            )));
        }
        let image_size = configuration.image_size.unwrap_or(grid * patch_size);
        let dimensions = match self.layout {
            Layout::OpenAi => self.shape_of("visual.proj", 2)?[1],
            Layout::HuggingFace => self.shape_of("visual_projection.weight", 2)?[0],
        };
        let token_embedding = self.shape_of(self.pick(TOKENS), 2)?;
        let text_positions = self.shape_of(self.pick(positions(Tower::Text)), 2)?;
        let text_width = token_embedding[1];

        let mut tower = |tower: Tower,
                         width: usize,
                         heads: Option<usize>,
                         configured: &TowerConfiguration| {
            let layers = (0..)
                .take_while(|&layer| {
                    let norm = self.block(tower, layer, ATTENTION_NORM) + ".weight";
                    self.store.shape(&norm).is_some()
                })
                .count();
            if layers == 0 {
                return Err(self.contradiction(format!("its {tower:?} tower has no blocks")));
            }
            let first = self.block(tower, 0, PERCEPTRON_IN) + ".weight";
            let hidden = self.shape_of(&first, 2)?[0];
            let by_width = configured.head_width.map(|head| width / head.max(1));
            let heads = match heads.or(configured.heads).or(by_width) {
                Some(heads) => heads,
                None => {
                    let heads = (width / OPENAI_HEAD_WIDTH).max(1);
                    assumptions.push(format!(
                        "{heads} attention heads in the {tower:?} tower ({OPENAI_HEAD_WIDTH} channels each)"
                    ));
                    heads
                }
            };
            let activation = match overrides.activation.or(configured.activation) {
                Some(activation) => activation,
                None => {
                    assumptions.push(format!(
                        "QuickGELU in the {tower:?} tower, as in OpenAI's models"
                    ));
                    Activation::QuickGelu
                }
            };
            Ok(Transformer {
                width,
                layers,
                heads,
                hidden,
                activation,
            })
        };
        let vision = tower(
            Tower::Vision,
            vision_width,
            overrides.vision_heads,
            &configuration.vision,
        )?;
        let text = tower(
            Tower::Text,
            text_width,
            overrides.text_heads,
            &configuration.text,
        )?;
        let architecture = Architecture {
            dimensions,
            vision: VisionTower {
                image_size,
                patch_size,
                transformer: vision,
            },
            text: TextTower {
                context: text_positions[0],
                vocabulary: token_embedding[0],
                transformer: text,
            },
        };
        Ok((architecture, assumptions))
    }

    fn shape_of(&self, name: &str, rank: usize) -> Result<Vec<usize>, CheckpointError> {
        match self.store.shape(name) {
            Some(shape) if shape.len() == rank => Ok(shape),
            Some(shape) => Err(self.contradiction(format!(
                "tensor `{name}` has shape {shape:?}, wanted {rank} dimensions"
            ))),
            None => Err(self.contradiction(format!("it has no tensor `{name}`"))),
        }
    }

    fn contradiction(&self, reason: String) -> CheckpointError {
        CheckpointError::Architecture {
            origin: self.origin.clone(),
            reason,
        }
    }

    /// What the configuration file beside the weights says.
    fn configuration(&self) -> Result<Configuration, CheckpointError> {
        let Some(folder) = self.path.as_deref().and_then(Path::parent) else {
            return Ok(Configuration::default());
        };
        let name = match self.layout {
            Layout::OpenAi => "open_clip_config.json",
            Layout::HuggingFace => "config.json",
        };
        let path = folder.join(name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Configuration::default());
            }
            Err(error) => {
                return Err(CheckpointError::Read {
                    path,
                    reason: error.to_string(),
                });
            }
        };
        let understood = match self.layout {
            Layout::OpenAi => serde_json::from_str::<OpenClipFile>(&text).map(Configuration::from),
            Layout::HuggingFace => {
                serde_json::from_str::<HuggingFaceFile>(&text).map(Configuration::from)
            }
        };
        let configuration = understood.map_err(|error| {
            self.contradiction(format!("{} is malformed: {error}", path.display()))
        })?;
        if let Some(activation) = configuration.unknown_activations.first() {
            return Err(self.contradiction(format!(
                "{} asks for the activation `{activation}`; known are quick_gelu and gelu",
                path.display()
            )));
        }
        Ok(configuration)
    }
}

impl Store {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        match self {
            Store::File { header, .. } => header.info(name).map(|info| info.shape.clone()),
            Store::Synthesized(weights) => weights
                .shapes()
                .find(|(known, _)| *known == name)
                .map(|(_, shape)| shape.to_vec()),
        }
    }
}

fn detect_layout(store: &Store, origin: &str) -> Result<Layout, CheckpointError> {
    if store.shape(PATCHES.0).is_some() {
        return Ok(Layout::OpenAi);
    }
    if store.shape(PATCHES.1).is_some() {
        return Ok(Layout::HuggingFace);
    }
    let mut names = match store {
        Store::File { header, .. } => header.offset_keys(),
        Store::Synthesized(weights) => weights.shapes().map(|(name, _)| name.to_owned()).collect(),
    };
    names.truncate(5);
    Err(CheckpointError::UnknownLayout {
        origin: origin.to_owned(),
        first: names.join(", "),
    })
}

fn check(architecture: &Architecture, origin: &str) -> Result<(), CheckpointError> {
    for (tower, transformer) in [
        ("vision", architecture.vision.transformer),
        ("text", architecture.text.transformer),
    ] {
        if transformer.heads == 0 || transformer.width % transformer.heads != 0 {
            return Err(CheckpointError::Architecture {
                origin: origin.to_owned(),
                reason: format!(
                    "{} channels of the {tower} tower cannot be shared by {} heads",
                    transformer.width, transformer.heads
                ),
            });
        }
    }
    if architecture.vision.grid() == 0 {
        return Err(CheckpointError::Architecture {
            origin: origin.to_owned(),
            reason: format!(
                "a patch of {} pixels does not fit into an image of {}",
                architecture.vision.patch_size, architecture.vision.image_size
            ),
        });
    }
    Ok(())
}

fn decode(bytes: &[u8], dtype: Dtype) -> Option<Vec<f32>> {
    let pairs = || bytes.chunks_exact(2).map(|pair| [pair[0], pair[1]]);
    match dtype {
        Dtype::F32 => Some(
            bytes
                .chunks_exact(4)
                .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
                .collect(),
        ),
        Dtype::F16 => Some(
            pairs()
                .map(|pair| f16::from_le_bytes(pair).to_f32())
                .collect(),
        ),
        Dtype::BF16 => Some(
            pairs()
                .map(|pair| bf16::from_le_bytes(pair).to_f32())
                .collect(),
        ),
        _ => None,
    }
}

/// `[rows, columns]` row-major into `[columns, rows]`.
pub fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    // Tiles that stay in the first-level cache; a plain double loop misses it on every write.
    const TILE: usize = 32;
    let mut out = vec![0.0; values.len()];
    for row_tile in (0..rows).step_by(TILE) {
        for column_tile in (0..columns).step_by(TILE) {
            for row in row_tile..(row_tile + TILE).min(rows) {
                for column in column_tile..(column_tile + TILE).min(columns) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    out
}

/// What a configuration file may say about one tower.
#[derive(Clone, Copy, Debug, Default)]
struct TowerConfiguration {
    heads: Option<usize>,
    /// Channels per head, where that is said in their place.
    head_width: Option<usize>,
    activation: Option<Activation>,
}

/// What a configuration file may say.
#[derive(Clone, Debug, Default)]
struct Configuration {
    image_size: Option<usize>,
    vision: TowerConfiguration,
    text: TowerConfiguration,
    unknown_activations: Vec<String>,
}

/// The part of Hugging Face's `config.json` that tensors do not tell.
#[derive(Deserialize)]
struct HuggingFaceFile {
    #[serde(default)]
    vision_config: HuggingFaceTower,
    #[serde(default)]
    text_config: HuggingFaceTower,
}

#[derive(Deserialize, Default)]
struct HuggingFaceTower {
    image_size: Option<usize>,
    num_attention_heads: Option<usize>,
    hidden_act: Option<String>,
}

impl From<HuggingFaceFile> for Configuration {
    fn from(file: HuggingFaceFile) -> Configuration {
        // What `CLIPVisionConfig` and `CLIPTextConfig` take where the file says nothing.
        const DEFAULT_VISION_HEADS: usize = 12;
        const DEFAULT_TEXT_HEADS: usize = 8;
        const DEFAULT_IMAGE_SIZE: usize = 224;
        let mut unknown_activations = Vec::new();
        let mut tower = |tower: &HuggingFaceTower, default_heads: usize| TowerConfiguration {
            heads: Some(tower.num_attention_heads.unwrap_or(default_heads)),
            head_width: None,
            activation: match &tower.hidden_act {
                None => Some(Activation::QuickGelu),
                Some(name) => match Activation::from_str(name, false) {
                    Ok(activation) => Some(activation),
                    Err(_) => {
                        unknown_activations.push(name.clone());
                        None
                    }
                },
            },
        };
        let vision = tower(&file.vision_config, DEFAULT_VISION_HEADS);
        let text = tower(&file.text_config, DEFAULT_TEXT_HEADS);
        Configuration {
            image_size: Some(file.vision_config.image_size.unwrap_or(DEFAULT_IMAGE_SIZE)),
            vision,
            text,
            unknown_activations,
        }
    }
}

/// The part of OpenCLIP's `open_clip_config.json` that tensors do not tell.
#[derive(Deserialize)]
struct OpenClipFile {
    model_cfg: OpenClipModel,
}

#[derive(Deserialize)]
struct OpenClipModel {
    #[serde(default)]
    quick_gelu: bool,
    vision_cfg: OpenClipVision,
    text_cfg: OpenClipText,
}

#[derive(Deserialize)]
struct OpenClipVision {
    image_size: Option<usize>,
    head_width: Option<usize>,
}

#[derive(Deserialize)]
struct OpenClipText {
    heads: Option<usize>,
}

impl From<OpenClipFile> for Configuration {
    fn from(file: OpenClipFile) -> Configuration {
        let model = file.model_cfg;
        let activation = Some(if model.quick_gelu {
            Activation::QuickGelu
        } else {
            Activation::Gelu
        });
        // What OpenCLIP's `CLIPVisionCfg` and `CLIPTextCfg` take where the file says nothing.
        const DEFAULT_TEXT_HEADS: usize = 8;
        let head_width = model.vision_cfg.head_width.unwrap_or(OPENAI_HEAD_WIDTH);
        Configuration {
            image_size: model.vision_cfg.image_size,
            vision: TowerConfiguration {
                heads: None,
                head_width: Some(head_width),
                activation,
            },
            text: TowerConfiguration {
                heads: Some(model.text_cfg.heads.unwrap_or(DEFAULT_TEXT_HEADS)),
                head_width: None,
                activation,
            },
            unknown_activations: Vec::new(),
        }
    }
}
