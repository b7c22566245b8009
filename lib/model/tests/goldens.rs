//! The compiled graphs against PyTorch CLIP on the same weights, pixels and texts.
//!
//! The goldens and the script that made them are in `goldens/`. These tests need ONNX Runtime
//! (`ORT_DYLIB_PATH`) and fail without it.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use clap::ValueEnum;
use clip_model::architecture::Activation;
use clip_model::build::{BuildOptions, build};
use clip_model::checkpoint::{Checkpoint, Overrides};
use clip_model::engine::{EngineOptions, ExecutionProvider, TextEngine, VisionEngine};
use clip_model::synthesize::SynthesizedWeights;
use clip_model::{Architecture, Bundle, Precision};
use safetensors::SafeTensors;

/// Relative L2 error that 32-bit graphs are allowed.
const FP32_LIMIT: f64 = 1e-4;
/// Relative L2 error that 16-bit graphs are allowed.
const FP16_LIMIT: f64 = 5e-3;
/// Relative L2 error that 8-bit vision graphs are allowed.
const INT8_LIMIT: f64 = 5e-2;
/// Images in every golden.
const IMAGES: usize = 8;

struct Golden {
    bytes: Vec<u8>,
}

impl Golden {
    fn read(model: &str) -> Golden {
        let name = format!("goldens/{}.safetensors", model.replace('/', "-"));
        // A copy of this test on a machine with a GPU finds them where GOLDENS says.
        let home = std::env::var_os("GOLDENS").map(PathBuf::from);
        let home = home.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let path = home.join(name);
        Golden {
            bytes: std::fs::read(path).expect("a golden"),
        }
    }

    fn tensor(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).expect("a safetensors file");
        let tensor = tensors.tensor(name).expect("a golden tensor");
        let words = tensor.data().chunks_exact(4);
        words
            .map(|word| f32::from_le_bytes(word.try_into().expect("four bytes")))
            .collect()
    }

    fn metadata(&self, key: &str) -> String {
        let (_, header) = SafeTensors::read_metadata(&self.bytes).expect("a header");
        header.metadata().as_ref().expect("metadata")[key].clone()
    }

    fn texts(&self) -> Vec<String> {
        serde_json::from_str(&self.metadata("texts")).expect("a list of texts")
    }
}

/// The formula of `goldens/make.py`.
fn pixels(size: usize) -> Vec<u8> {
    let mut pixels = vec![0; size * size * 3];
    pixels.extend(vec![255; size * size * 3]);
    for i in 2..IMAGES {
        for y in 0..size {
            for x in 0..size {
                for c in 0..3 {
                    let squares = x * x * (3 + i) + y * y * (5 + 2 * i) + x * y * (7 + c);
                    let wave = squares + c * 85 * 64 + i * 40 * 64;
                    pixels.push(((wave >> (i + 1)) & 255) as u8);
                }
            }
        }
    }
    pixels
}

fn worst_error(found: &[f32], wanted: &[f32], dimensions: usize) -> f64 {
    assert_eq!(found.len(), wanted.len());
    let rows = found.chunks(dimensions).zip(wanted.chunks(dimensions));
    rows.map(|(found, wanted)| {
        let square = |value: f32| f64::from(value) * f64::from(value);
        let difference: f64 = found.iter().zip(wanted).map(|(a, b)| square(a - b)).sum();
        let length: f64 = wanted.iter().map(|&value| square(value)).sum();
        (difference / length).sqrt()
    })
    .fold(0.0, f64::max)
}

/// The large models one at a time, for the memory's sake.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn without_labels(precision: Precision) -> BuildOptions {
    BuildOptions {
        precision,
        labels: None,
        ..BuildOptions::default()
    }
}

fn built(checkpoint: &Checkpoint, precision: Precision, folder: &Path) -> Bundle {
    clip_model::engine::environment().unwrap_or_else(|error| panic!("{error}"));
    build(
        checkpoint,
        &folder.join("bundle"),
        &without_labels(precision),
        &|_| {},
    )
    .expect("a bundle")
}

fn synthesized(model: &str) -> Checkpoint {
    let architecture = Architecture::named(model).expect("a known model");
    Checkpoint::synthesized(SynthesizedWeights::new(architecture, 0))
}

fn errors(bundle: &Bundle, golden: &Golden, suffix: &str) -> (f64, f64) {
    (
        vision_error(bundle, golden, suffix),
        text_error(bundle, golden, suffix),
    )
}

/// Smaller than the goldens' number of images, so that batches are cut.
fn options() -> EngineOptions {
    // The processor unless `EXECUTION_PROVIDER` says cuda.
    let provider = std::env::var("EXECUTION_PROVIDER").unwrap_or_else(|_| "cpu".to_owned());
    EngineOptions {
        provider: ExecutionProvider::from_str(&provider, false).expect("an execution provider"),
        max_batch: 4,
        // What a GPU computes is to be tested here.
        widen: false,
        ..EngineOptions::default()
    }
}

fn vision_error(bundle: &Bundle, golden: &Golden, suffix: &str) -> f64 {
    vision_error_with(&options(), bundle, golden, suffix)
}

fn vision_error_with(
    options: &EngineOptions,
    bundle: &Bundle,
    golden: &Golden,
    suffix: &str,
) -> f64 {
    let mut vision = VisionEngine::load(bundle, options).expect("a vision engine");
    let found = vision
        .embed(&pixels(vision.image_size()), IMAGES)
        .expect("embeddings");
    let wanted = golden.tensor(&format!("vision{suffix}"));
    worst_error(&found, &wanted, vision.dimensions())
}

fn text_error(bundle: &Bundle, golden: &Golden, suffix: &str) -> f64 {
    let tokenizer = bundle.tokenizer().expect("a tokenizer");
    let tokens = tokenizer.encode_batch(&golden.texts()).expect("tokens");
    let mut text = TextEngine::load(bundle, &options()).expect("a text engine");
    let found = text.embed(&tokens).expect("embeddings");
    let wanted = golden.tensor(&format!("text{suffix}"));
    worst_error(&found, &wanted, text.dimensions())
}

fn agrees(model: &str, precision: Precision, limit: f64) {
    let _turn = turn();
    let folder = tempfile::tempdir().expect("a folder");
    let bundle = built(&synthesized(model), precision, folder.path());
    assert_eq!(bundle.manifest().model, model);
    assert!(bundle.manifest().is_synthesized());
    let (vision, text) = errors(&bundle, &Golden::read(model), "");
    println!("{model} {precision}: relative L2 error {vision:.1e} vision, {text:.1e} text");
    if precision == Precision::Fp16 {
        let widen = EngineOptions {
            widen: true,
            ..options()
        };
        let widened = vision_error_with(&widen, &bundle, &Golden::read(model), "");
        println!("{model} {precision}, computed in 32 bits: {widened:.1e}");
        assert!(widened <= vision, "{widened:e} computed in 32 bits");
    }
    assert!(
        vision <= limit,
        "vision tower of {model} in {precision}: {vision:e}"
    );
    assert!(
        text <= limit,
        "text tower of {model} in {precision}: {text:e}"
    );
}

#[test]
fn vit_b_32_agrees_with_pytorch() {
    agrees("ViT-B/32", Precision::Fp32, FP32_LIMIT);
}

#[test]
fn vit_b_16_agrees_with_pytorch() {
    agrees("ViT-B/16", Precision::Fp32, FP32_LIMIT);
}

#[test]
fn vit_l_14_agrees_with_pytorch() {
    agrees("ViT-L/14", Precision::Fp32, FP32_LIMIT);
}

#[test]
fn tiny_agrees_with_pytorch_in_both_precisions() {
    agrees("tiny", Precision::Fp32, FP32_LIMIT);
    agrees("tiny", Precision::Fp16, FP16_LIMIT);
}

#[test]
fn vit_b_32_in_16_bits_agrees_with_pytorch() {
    agrees("ViT-B/32", Precision::Fp16, FP16_LIMIT);
}

#[test]
fn vit_b_16_in_16_bits_agrees_with_pytorch() {
    agrees("ViT-B/16", Precision::Fp16, FP16_LIMIT);
}

#[test]
fn vit_l_14_in_16_bits_agrees_with_pytorch() {
    agrees("ViT-L/14", Precision::Fp16, FP16_LIMIT);
}

#[test]
fn vit_b_32_in_8_bits_is_near_pytorch_whatever_its_company() {
    let _turn = turn();
    let folder = tempfile::tempdir().expect("a folder");
    let bundle = built(&synthesized("ViT-B/32"), Precision::Int8, folder.path());
    let golden = Golden::read("ViT-B/32");
    let text = text_error(&bundle, &golden, "");
    assert!(
        text <= FP32_LIMIT,
        "the text tower stays in 32 bits: {text:e}"
    );
    if !has_8_bit_products() {
        let refusal = VisionEngine::load(&bundle, &EngineOptions::default());
        let error = refusal.err().expect("a refusal").to_string();
        assert!(error.contains("needs a processor with VNNI"), "{error}");
        not_run(
            "vit_b_32_in_8_bits_is_near_pytorch_whatever_its_company, vision tower",
            "no VNNI",
        );
        return;
    }
    let vision = vision_error(&bundle, &golden, "");
    println!("ViT-B/32 int8: relative L2 error {vision:.1e} vision, {text:.1e} text");
    assert!((FP32_LIMIT..INT8_LIMIT).contains(&vision), "{vision:e}");

    let mut engine = VisionEngine::load(&bundle, &EngineOptions::default()).expect("an engine");
    assert_eq!(engine.max_batch(), 1);
    let pixels = pixels(engine.image_size());
    let together = engine.embed(&pixels, IMAGES).expect("embeddings");
    let third = &pixels[2 * engine.image_bytes()..][..engine.image_bytes()];
    let alone = engine.embed(third, 1).expect("an embedding");
    let dimensions = engine.dimensions();
    assert_eq!(alone, together[2 * dimensions..][..dimensions]);
}

#[cfg(target_arch = "x86_64")]
fn has_8_bit_products() -> bool {
    std::arch::is_x86_feature_detected!("avx512vnni")
        || std::arch::is_x86_feature_detected!("avxvnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_8_bit_products() -> bool {
    true
}

/// Told to `cargo xtask test`, whose summary names it. Past the test runner, which keeps what a
/// passing test prints to itself.
fn not_run(name: &str, reason: &str) {
    let line = format!("\nnot run: {name} ({reason})\n");
    std::io::stdout()
        .write_all(line.as_bytes())
        .expect("a standard output");
}

#[test]
fn the_generator_makes_the_goldens_weights() {
    for model in ["tiny", "ViT-B/32"] {
        let _turn = turn();
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("weights.safetensors");
        let architecture = Architecture::named(model).expect("a known model");
        SynthesizedWeights::new(architecture, 0)
            .write(&path, &|_| {})
            .expect("a file");
        let digest = clip_model::files::sha256_of_file(&path).expect("a digest");
        assert_eq!(
            digest,
            Golden::read(model).metadata("weights_sha256"),
            "{model}"
        );
    }
}

#[test]
fn a_model_with_the_exact_gelu_agrees_with_pytorch() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut architecture = Architecture::named("tiny").expect("a known model");
    architecture.vision.transformer.activation = Activation::Gelu;
    architecture.text.transformer.activation = Activation::Gelu;
    let checkpoint = Checkpoint::synthesized(SynthesizedWeights::new(architecture, 0));
    for (precision, limit) in [(Precision::Fp32, FP32_LIMIT), (Precision::Fp16, FP16_LIMIT)] {
        let bundle = built(&checkpoint, precision, folder.path());
        let (vision, text) = errors(&bundle, &Golden::read("tiny"), "_gelu");
        assert!(
            vision <= limit && text <= limit,
            "{precision}: {vision:e} {text:e}"
        );
    }
}

#[test]
fn tokens_are_the_reference_s() {
    #[derive(serde::Deserialize)]
    struct Encoded {
        text: String,
        ids: Vec<i32>,
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/tokens.json");
    let json = std::fs::read_to_string(path).expect("goldens");
    let goldens: Vec<Encoded> = serde_json::from_str(&json).expect("goldens");
    let tokenizer =
        clip_model::tokenizer::Tokenizer::new(clip_model::tokenizer::OPENAI_MERGES, 49_408, 77)
            .expect("a tokenizer");
    assert!(goldens.len() >= 16);
    for golden in goldens {
        let found = tokenizer.encode(&golden.text).expect("tokens");
        assert_eq!(found, golden.ids, "{:?}", golden.text);
    }
    let long = "word ".repeat(76);
    assert!(
        tokenizer
            .encode(&long)
            .expect_err("too long")
            .to_string()
            .contains("78 tokens")
    );
    assert_eq!(
        tokenizer.encode(&"word ".repeat(75)).expect("tokens").len(),
        77
    );
}

mod layouts {
    use super::*;
    use half::{bf16, f16};
    use safetensors::Dtype;
    use safetensors::tensor::TensorView;

    struct Stored {
        name: String,
        shape: Vec<usize>,
        values: Vec<f32>,
    }

    fn store(tensors: &[Stored], dtype: Dtype, path: &Path) {
        let bytes: Vec<Vec<u8>> = tensors
            .iter()
            .map(|tensor| {
                let values = tensor.values.iter();
                match dtype {
                    Dtype::F16 => values
                        .flat_map(|&v| f16::from_f32(v).to_le_bytes())
                        .collect(),
                    Dtype::BF16 => values
                        .flat_map(|&v| bf16::from_f32(v).to_le_bytes())
                        .collect(),
                    _ => values.flat_map(|v| v.to_le_bytes()).collect(),
                }
            })
            .collect();
        let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
            let view = TensorView::new(dtype, tensor.shape.clone(), bytes).expect("a view");
            (tensor.name.as_str(), view)
        });
        safetensors::serialize_to_file(views, None, path).expect("a file");
    }

    fn tiny() -> Vec<Stored> {
        let architecture = Architecture::named("tiny").expect("a known model");
        let weights = SynthesizedWeights::new(architecture, 0);
        weights
            .shapes()
            .map(|(name, shape)| Stored {
                name: name.to_owned(),
                shape: shape.to_vec(),
                values: weights.values(name).expect("values"),
            })
            .collect()
    }

    /// The same weights as Hugging Face's `CLIPModel` names, splits and turns them.
    fn hugging_face(tensors: Vec<Stored>) -> Vec<Stored> {
        let mut renamed = Vec::new();
        for Stored {
            name,
            shape,
            values,
        } in tensors
        {
            let tower = if name.starts_with("visual.") {
                "vision_model"
            } else {
                "text_model"
            };
            let short = name.trim_start_matches("visual.");
            let transposed = |name: &str| {
                let (rows, columns) = (shape[0], shape[1]);
                let turned = |index: usize| values[(index % rows) * columns + index / rows];
                Stored {
                    name: name.to_owned(),
                    shape: vec![columns, rows],
                    values: (0..values.len()).map(turned).collect(),
                }
            };
            if short == "proj" {
                renamed.push(transposed("visual_projection.weight"));
                continue;
            }
            if short == "text_projection" {
                renamed.push(transposed("text_projection.weight"));
                continue;
            }
            if let Some((prefix, kind)) = short.split_once(".attn.in_proj_") {
                let layer = prefix.trim_start_matches("transformer.resblocks.");
                let part = values.len() / 3;
                for (index, letter) in ["q", "k", "v"].iter().enumerate() {
                    let mut shape = shape.clone();
                    shape[0] /= 3;
                    renamed.push(Stored {
                        name: format!(
                            "{tower}.encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"
                        ),
                        shape,
                        values: values[index * part..(index + 1) * part].to_vec(),
                    });
                }
                continue;
            }
            let name = match short {
                "logit_scale" => "logit_scale".to_owned(),
                "conv1.weight" => "vision_model.embeddings.patch_embedding.weight".to_owned(),
                "class_embedding" => "vision_model.embeddings.class_embedding".to_owned(),
                "positional_embedding" => format!("{tower}.embeddings.position_embedding.weight"),
                "token_embedding.weight" => {
                    "text_model.embeddings.token_embedding.weight".to_owned()
                }
                other => format!("{tower}.{other}")
                    .replace("transformer.resblocks", "encoder.layers")
                    .replace("ln_pre", "pre_layrnorm")
                    .replace("ln_post", "post_layernorm")
                    .replace("ln_final", "final_layer_norm")
                    .replace("ln_1", "layer_norm1")
                    .replace("ln_2", "layer_norm2")
                    .replace("attn.out_proj", "self_attn.out_proj")
                    .replace("mlp.c_fc", "mlp.fc1")
                    .replace("mlp.c_proj", "mlp.fc2"),
            };
            renamed.push(Stored {
                name,
                shape,
                values,
            });
        }
        renamed
    }

    fn configuration(folder: &Path, activation: &str) {
        let json = serde_json::json!({
            "vision_config": { "image_size": 224, "num_attention_heads": 4, "hidden_act": activation },
            "text_config": { "num_attention_heads": 2, "hidden_act": activation },
        });
        std::fs::write(folder.join("config.json"), json.to_string()).expect("a file");
    }

    fn weights(folder: &Path) -> PathBuf {
        folder.join("model.safetensors")
    }

    #[test]
    fn hugging_face_s_layout_agrees_with_pytorch() {
        for (activation, suffix) in [("quick_gelu", ""), ("gelu", "_gelu")] {
            let folder = tempfile::tempdir().expect("a folder");
            let path = weights(folder.path());
            store(&hugging_face(tiny()), Dtype::F32, &path);
            configuration(folder.path(), activation);
            let checkpoint = Checkpoint::open(&path, Overrides::default()).expect("a checkpoint");
            assert!(checkpoint.assumptions().is_empty());
            let bundle = built(&checkpoint, Precision::Fp32, folder.path());
            let (vision, text) = errors(&bundle, &Golden::read("tiny"), suffix);
            assert!(
                vision <= FP32_LIMIT && text <= FP32_LIMIT,
                "{activation}: {vision:e} {text:e}"
            );
        }
    }

    #[test]
    fn weights_in_16_bits_are_read() {
        let overrides = Overrides {
            vision_heads: Some(4),
            text_heads: Some(2),
            activation: Some(Activation::QuickGelu),
        };
        for (dtype, limit) in [(Dtype::F16, 5e-3), (Dtype::BF16, 5e-2)] {
            let folder = tempfile::tempdir().expect("a folder");
            let path = weights(folder.path());
            store(&tiny(), dtype, &path);
            let checkpoint = Checkpoint::open(&path, overrides).expect("a checkpoint");
            assert_eq!(checkpoint.architecture().name(), "tiny");
            let bundle = built(&checkpoint, Precision::Fp32, folder.path());
            let (vision, text) = errors(&bundle, &Golden::read("tiny"), "");
            // Not zero either: then the weights would not have been rounded.
            assert!((1e-6..limit).contains(&vision), "{dtype:?}: {vision:e}");
            assert!((1e-6..limit).contains(&text), "{dtype:?}: {text:e}");
        }
    }

    #[test]
    fn an_image_size_that_patches_do_not_fill_is_cut() {
        // As the reference's strided convolution does: the last rows and columns are not read.
        let folder = tempfile::tempdir().expect("a folder");
        let path = weights(folder.path());
        store(&hugging_face(tiny()), Dtype::F32, &path);
        configuration(folder.path(), "quick_gelu");
        let text = std::fs::read_to_string(folder.path().join("config.json")).expect("a file");
        std::fs::write(
            folder.path().join("config.json"),
            text.replace("224", "230"),
        )
        .expect("a file");
        let checkpoint = Checkpoint::open(&path, Overrides::default()).expect("a checkpoint");
        let bundle = built(&checkpoint, Precision::Fp32, folder.path());
        let mut engine = VisionEngine::load(&bundle, &EngineOptions::default()).expect("an engine");
        assert_eq!(engine.image_size(), 230);
        let small = pixels(224);
        let image = 224 * 224 * 3;
        let mut padded = vec![9; 230 * 230 * 3];
        for row in 0..224 {
            let from = 2 * image + row * 224 * 3;
            padded[row * 230 * 3..][..224 * 3].copy_from_slice(&small[from..][..224 * 3]);
        }
        let found = engine.embed(&padded, 1).expect("embeddings");
        let wanted = Golden::read("tiny").tensor("vision");
        let dimensions = engine.dimensions();
        let error = worst_error(&found, &wanted[2 * dimensions..][..dimensions], dimensions);
        assert!(error <= FP32_LIMIT, "{error:e}");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = weights(folder.path());
        let overrides = Overrides {
            vision_heads: Some(4),
            text_heads: Some(2),
            activation: None,
        };

        let mut tensors = tiny();
        let name = "visual.transformer.resblocks.1.mlp.c_proj.weight";
        let odd = tensors
            .iter_mut()
            .find(|tensor| tensor.name == name)
            .expect("the tensor");
        odd.shape = vec![32, 512];
        store(&tensors, Dtype::F32, &path);
        let checkpoint = Checkpoint::open(&path, overrides).expect("a checkpoint");
        let options = without_labels(Precision::Fp32);
        let output = folder.path().join("bundle");
        let error = build(&checkpoint, &output, &options, &|_| {})
            .expect_err("a misfit")
            .to_string();
        for part in [name, "[32, 512]", "[64, 256]"] {
            assert!(error.contains(part), "{error}");
        }
        assert!(!output.exists(), "a failed build leaves nothing behind");
        let left: Vec<_> = std::fs::read_dir(folder.path())
            .expect("a folder")
            .collect();
        assert_eq!(left.len(), 1, "nor a temporary folder: {left:?}");

        let mut tensors = tiny();
        tensors.retain(|tensor| tensor.name != "ln_final.bias");
        store(&tensors, Dtype::F32, &path);
        let checkpoint = Checkpoint::open(&path, overrides).expect("a checkpoint");
        let error = build(&checkpoint, &output, &options, &|_| {})
            .expect_err("a gap")
            .to_string();
        assert!(
            error.contains("`ln_final.bias`") && error.contains("[32]"),
            "{error}"
        );

        let mut tensors = tiny();
        tensors.retain(|tensor| tensor.name != "visual.conv1.weight");
        store(&tensors, Dtype::F32, &path);
        let error = Checkpoint::open(&path, overrides)
            .err()
            .expect("no layout")
            .to_string();
        assert!(error.contains("not a CLIP checkpoint"), "{error}");

        std::fs::write(&path, "not weights").expect("a file");
        let error = Checkpoint::open(&path, overrides)
            .err()
            .expect("no weights")
            .to_string();
        assert!(error.contains("not a safetensors file"), "{error}");
    }

    #[test]
    fn an_activation_that_is_not_known_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = weights(folder.path());
        store(&hugging_face(tiny()), Dtype::F32, &path);
        configuration(folder.path(), "swish");
        let error = Checkpoint::open(&path, Overrides::default())
            .err()
            .expect("a refusal")
            .to_string();
        assert!(
            error.contains("swish") && error.contains("config.json"),
            "{error}"
        );
    }
}
