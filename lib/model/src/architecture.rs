//! The shapes of a CLIP model: what its two towers look like, and the published ones by name.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The non-linearity between the two layers of a block's perceptron.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `x · sigmoid(1.702 x)`, what OpenAI trained with
    #[value(aliases = ["quick_gelu", "quickgelu"])]
    QuickGelu,
    /// The exact `x · Φ(x)`, what most other CLIP models were trained with
    Gelu,
}

/// One transformer: what both towers share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transformer {
    /// Channels of a token.
    pub width: usize,
    /// Blocks, one after the other.
    pub layers: usize,
    /// Attention heads; they divide the width.
    pub heads: usize,
    /// Channels between the two layers of the perceptron, 4 × the width in every published model.
    pub hidden: usize,
    /// The perceptron's non-linearity.
    pub activation: Activation,
}

/// The tower that reads pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VisionTower {
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a square patch in pixels.
    pub patch_size: usize,
    /// Its transformer.
    pub transformer: Transformer,
}

impl VisionTower {
    /// Patches along one side of the image. A remainder of pixels is ignored, as a strided
    /// convolution without padding ignores it.
    pub fn grid(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// Tokens in the sequence: the patches and the class token before them.
    pub fn tokens(&self) -> usize {
        self.grid() * self.grid() + 1
    }

    /// Multiply-adds × 2 that one image costs in matrix products: the floor that a measured time
    /// is held against. Counts what the compiled graph computes, which is less than the textbook
    /// sum because the last block computes only the class token's row where nothing else is read.
    pub fn flops_per_image(&self, dimensions: usize) -> u64 {
        let Transformer {
            width,
            layers,
            hidden,
            ..
        } = self.transformer;
        let tokens = self.tokens();
        let patches = 2 * (tokens - 1) * 3 * self.patch_size * self.patch_size * width;
        let block = |queries: usize| {
            let projections = 2 * width * width * (2 * tokens + 2 * queries);
            let attention = 2 * 2 * queries * tokens * width;
            let perceptron = 2 * 2 * queries * width * hidden;
            projections + attention + perceptron
        };
        let blocks = block(tokens) * (layers - 1) + block(1);
        (patches + blocks + 2 * width * dimensions) as u64
    }
}

/// The tower that reads text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextTower {
    /// Tokens of a text, padding included (77 in every published model).
    pub context: usize,
    /// Entries of the token embedding (49,408 in every published model).
    pub vocabulary: usize,
    /// Its transformer.
    pub transformer: Transformer,
}

/// A whole CLIP model's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Architecture {
    /// Length of the vectors that both towers end in.
    pub dimensions: usize,
    /// The tower that reads pixels.
    pub vision: VisionTower,
    /// The tower that reads text.
    pub text: TextTower,
}

/// Channels per attention head in every model that OpenAI published.
pub const OPENAI_HEAD_WIDTH: usize = 64;

/// The names that [`Architecture::named`] knows.
pub const KNOWN_MODELS: [&str; 4] = ["ViT-B/32", "ViT-B/16", "ViT-L/14", "tiny"];

impl Architecture {
    /// The architecture behind a published name, or `tiny`, a model of the same family that is
    /// small enough for tests.
    pub fn named(name: &str) -> Option<Architecture> {
        let quick = |width: usize, layers: usize, head: usize| Transformer {
            width,
            layers,
            heads: width / head,
            hidden: 4 * width,
            activation: Activation::QuickGelu,
        };
        let openai =
            |patch_size, vision_width, vision_layers, text_width, dimensions| Architecture {
                dimensions,
                vision: VisionTower {
                    image_size: 224,
                    patch_size,
                    transformer: quick(vision_width, vision_layers, OPENAI_HEAD_WIDTH),
                },
                text: TextTower {
                    context: 77,
                    vocabulary: 49_408,
                    transformer: quick(text_width, 12, OPENAI_HEAD_WIDTH),
                },
            };
        match name {
            "ViT-B/32" => Some(openai(32, 768, 12, 512, 512)),
            "ViT-B/16" => Some(openai(16, 768, 12, 512, 512)),
            "ViT-L/14" => Some(openai(14, 1024, 24, 768, 768)),
            "tiny" => Some(Architecture {
                dimensions: 32,
                vision: VisionTower {
                    image_size: 224,
                    patch_size: 32,
                    transformer: quick(64, 3, 16),
                },
                text: TextTower {
                    context: 77,
                    vocabulary: 49_408,
                    transformer: quick(32, 2, 16),
                },
            }),
            _ => None,
        }
    }

    /// The published name of this shape, or a description in the same style for any other.
    pub fn name(&self) -> String {
        for name in KNOWN_MODELS {
            if Architecture::named(name).is_some_and(|known| known == *self) {
                return name.to_owned();
            }
        }
        format!(
            "CLIP-{}x{}/{}@{}",
            self.vision.transformer.width,
            self.vision.transformer.layers,
            self.vision.patch_size,
            self.vision.image_size
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_name_names_itself() {
        for name in KNOWN_MODELS {
            let known = Architecture::named(name).expect("a known name");
            assert_eq!(known.name(), name);
            assert_eq!(
                known.vision.transformer.width % known.vision.transformer.heads,
                0
            );
        }
        assert!(Architecture::named("ViT-H/14").is_none());
    }

    #[test]
    fn an_unknown_shape_is_described() {
        let mut other = Architecture::named("ViT-L/14").expect("a known name");
        other.vision.image_size = 336;
        assert_eq!(other.name(), "CLIP-1024x24/14@336");
    }

    #[test]
    fn the_flops_of_vit_b_32_are_the_literature_s() {
        // 4.4 GMAC in the literature; the last block's saving takes 0.6 GFLOP off.
        let known = Architecture::named("ViT-B/32").expect("a known name");
        let gflop = known.vision.flops_per_image(known.dimensions) as f64 / 1e9;
        assert!((8.0..8.8).contains(&gflop), "{gflop}");
    }
}
