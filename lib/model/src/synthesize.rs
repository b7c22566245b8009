//! Weights from a seeded generator, for machines that cannot reach the model hub.
//!
//! They have the published shapes and the scales of a freshly initialised CLIP, so that speed,
//! memory and numerics are those of the real model; what they say about an image means nothing.
//! The generator is integer arithmetic and one multiplication per value, so that every machine
//! makes the same bytes from the same seed.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::View;
use serde::{Deserialize, Serialize};

use crate::architecture::{Architecture, Transformer};
use crate::checkpoint::CheckpointError;
use crate::files::little_endian;

/// Key of the file metadata that marks synthesised weights; its value is a [`Mark`] as JSON. It is
/// the only key, because the order of several would change from run to run and the file's digest
/// with it.
pub const MARK_KEY: &str = "clip-model.synthesized";

/// What synthesised weights say about themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The generator's seed.
    pub seed: u64,
    /// The whole architecture; tensors alone do not tell heads, activation and image size.
    pub architecture: Architecture,
}

/// How the values of a tensor are drawn.
#[derive(Clone, Copy, Debug)]
struct Draw {
    mean: f32,
    deviation: f32,
}

/// Seeded weights of an architecture, in the layout of OpenAI's checkpoints. Nothing is kept:
/// each tensor is made when it is asked for.
#[derive(Clone, Debug)]
pub struct SynthesizedWeights {
    architecture: Architecture,
    seed: u64,
    tensors: Vec<(String, Vec<usize>, Draw)>,
}

impl SynthesizedWeights {
    /// The weights of `architecture` that `seed` stands for.
    pub fn new(architecture: Architecture, seed: u64) -> SynthesizedWeights {
        SynthesizedWeights {
            architecture,
            seed,
            tensors: plan(&architecture),
        }
    }

    /// The shape they are made for.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The seed they are made from.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Every tensor's name and shape.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.tensors
            .iter()
            .map(|(name, shape, _)| (name.as_str(), shape.as_slice()))
    }

    /// One tensor's values, or nothing where the architecture has no such tensor.
    pub fn values(&self, name: &str) -> Option<Vec<f32>> {
        let (name, shape, draw) = self.tensors.iter().find(|(known, _, _)| known == name)?;
        let mut values = vec![0.0; shape.iter().product()];
        fill(&mut values, stream(self.seed, name), *draw);
        Some(values)
    }

    /// Bytes of all tensors together, as written.
    pub fn bytes(&self) -> u64 {
        let values: usize = self
            .shapes()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        (values * size_of::<f32>()) as u64
    }

    /// Writes them as a safetensors file whose metadata marks them as synthesised. `progress` is
    /// told the bytes written so far.
    pub fn write(&self, path: &Path, progress: &dyn Fn(u64)) -> Result<(), CheckpointError> {
        struct Lazy<'a> {
            weights: &'a SynthesizedWeights,
            name: &'a str,
            shape: &'a [usize],
            written: &'a std::cell::Cell<u64>,
            progress: &'a dyn Fn(u64),
        }
        impl View for Lazy<'_> {
            fn dtype(&self) -> Dtype {
                Dtype::F32
            }
            fn shape(&self) -> &[usize] {
                self.shape
            }
            fn data(&self) -> Cow<'_, [u8]> {
                let values = self.weights.values(self.name).unwrap_or_default();
                self.written
                    .set(self.written.get() + self.data_len() as u64);
                (self.progress)(self.written.get());
                Cow::Owned(little_endian(&values))
            }
            fn data_len(&self) -> usize {
                self.shape.iter().product::<usize>() * size_of::<f32>()
            }
        }

        let written = std::cell::Cell::new(0);
        let views = self.tensors.iter().map(|(name, shape, _)| {
            let view = Lazy {
                weights: self,
                name,
                shape,
                written: &written,
                progress,
            };
            (name.as_str(), view)
        });
        let mark = Mark {
            seed: self.seed,
            architecture: self.architecture,
        };
        // Renamed into place when whole, so that an interrupted run leaves no half file behind.
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let write = || -> Result<(), Box<dyn std::error::Error>> {
            let metadata = HashMap::from([(MARK_KEY.to_owned(), serde_json::to_string(&mark)?)]);
            std::fs::create_dir_all(folder)?;
            let partial = tempfile::Builder::new()
                .prefix(".clip-model-")
                .tempfile_in(folder)?;
            safetensors::serialize_to_file(views, Some(metadata), partial.path())?;
            partial.persist(path)?;
            Ok(crate::files::make_readable(path)?)
        };
        write().map_err(|error| CheckpointError::Write {
            path: path.to_owned(),
            reason: error.to_string(),
        })
    }
}

/// Names, shapes and distributions of every tensor of an architecture.
fn plan(architecture: &Architecture) -> Vec<(String, Vec<usize>, Draw)> {
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize], mean: f32, deviation: f64| {
        let deviation = deviation as f32;
        tensors.push((name, shape.to_vec(), Draw { mean, deviation }));
    };
    let inverse_root = |value: usize| 1.0 / (value as f64).sqrt();

    let (vision, text) = (&architecture.vision, &architecture.text);
    let (vision_width, text_width) = (vision.transformer.width, text.transformer.width);
    let (patch, dimensions) = (vision.patch_size, architecture.dimensions);
    let (vision_scale, text_scale) = (inverse_root(vision_width), inverse_root(text_width));
    for (name, shape, deviation) in [
        // Larger than PyTorch's default for a convolution: patches must differ by the image's
        // content and not by their position alone, as in a trained model.
        (
            "visual.conv1.weight",
            &[vision_width, 3, patch, patch][..],
            inverse_root(3 * patch * patch),
        ),
        ("visual.class_embedding", &[vision_width], vision_scale),
        (
            "visual.positional_embedding",
            &[vision.tokens(), vision_width],
            vision_scale,
        ),
        ("visual.proj", &[vision_width, dimensions], vision_scale),
        (
            "token_embedding.weight",
            &[text.vocabulary, text_width],
            0.02,
        ),
        ("positional_embedding", &[text.context, text_width], 0.01),
        ("text_projection", &[text_width, dimensions], text_scale),
    ] {
        add(name.to_owned(), shape, 0.0, deviation);
    }
    add("logit_scale".to_owned(), &[], 100f32.ln(), 0.0);
    for (norm, width) in [
        ("visual.ln_pre", vision_width),
        ("visual.ln_post", vision_width),
        ("ln_final", text_width),
    ] {
        add(format!("{norm}.weight"), &[width], 1.0, 0.05);
        add(format!("{norm}.bias"), &[width], 0.0, 0.05);
    }
    for (prefix, transformer) in [
        ("visual.transformer", &vision.transformer),
        ("transformer", &text.transformer),
    ] {
        let Transformer {
            width,
            layers,
            hidden,
            ..
        } = *transformer;
        // The scales with which OpenAI's code initialises a transformer.
        let inward = inverse_root(width);
        let outward = inverse_root(width) * inverse_root(2 * layers);
        for layer in 0..layers {
            let block = format!("{prefix}.resblocks.{layer}");
            for norm in ["ln_1", "ln_2"] {
                add(format!("{block}.{norm}.weight"), &[width], 1.0, 0.05);
                add(format!("{block}.{norm}.bias"), &[width], 0.0, 0.05);
            }
            for (name, out, into, deviation, bias_deviation) in [
                ("attn.out_proj.", width, width, outward, 0.02),
                ("mlp.c_fc.", hidden, width, inverse_root(2 * width), 0.02),
                ("mlp.c_proj.", width, hidden, outward, 0.02),
                ("attn.in_proj_", 3 * width, width, inward, 0.05),
            ] {
                let name = format!("{block}.{name}");
                add(format!("{name}weight"), &[out, into], 0.0, deviation);
                add(format!("{name}bias"), &[out], 0.0, bias_deviation);
            }
        }
    }
    tensors
}

/// The increment of SplitMix64 (Steele, Lea, Flood 2014).
const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// SplitMix64's finaliser.
fn mix(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}

/// Where a tensor's stream starts: its name (FNV-1a) mixed with the seed.
fn stream(seed: u64, name: &str) -> u64 {
    let mut hash = 0xCBF2_9CE4_8422_2325_u64;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3);
    }
    mix(hash ^ mix(seed.wrapping_add(GOLDEN_GAMMA)))
}

/// Fills a tensor with nearly normal values: the sum of four uniform 16-bit numbers, centred and
/// scaled.
fn fill(values: &mut [f32], start: u64, draw: Draw) {
    const CENTRE: f32 = 2.0 * 65_535.0;
    // The standard deviation of the sum, √(4 · (2³² − 1) / 12).
    const SPREAD: f32 = 37_837.227;
    let scale = draw.deviation / SPREAD;
    let mut state = start;
    for value in values {
        state = state.wrapping_add(GOLDEN_GAMMA);
        let bits = mix(state);
        let sum =
            (bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) + ((bits >> 32) & 0xFFFF) + (bits >> 48);
        *value = draw.mean + (sum as f32 - CENTRE) * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_asked_mean_and_deviation() {
        let mut values = vec![0.0; 100_000];
        let draw = Draw {
            mean: 1.0,
            deviation: 0.5,
        };
        fill(&mut values, stream(0, "a tensor"), draw);
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        let variance = values
            .iter()
            .map(|&v| (f64::from(v) - mean).powi(2))
            .sum::<f64>()
            / values.len() as f64;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        assert!((variance.sqrt() - 0.5).abs() < 0.01, "{}", variance.sqrt());
    }

    #[test]
    fn tensors_and_seeds_have_streams_of_their_own() {
        let tiny = Architecture::named("tiny").expect("a known name");
        let zero = SynthesizedWeights::new(tiny, 0);
        let one = SynthesizedWeights::new(tiny, 1);
        let name = "visual.class_embedding";
        assert_eq!(
            zero.values(name),
            SynthesizedWeights::new(tiny, 0).values(name)
        );
        assert_ne!(zero.values(name), one.values(name));
        assert_ne!(
            zero.values("visual.ln_pre.bias"),
            zero.values("visual.ln_post.bias")
        );
        assert!(zero.values("no.such.tensor").is_none());
    }
}
