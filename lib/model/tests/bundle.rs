//! A bundle from its building to its use, and what happens when it is damaged.
//!
//! These tests need ONNX Runtime (`ORT_DYLIB_PATH`) and fail without it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use clip_model::build::{BuildOptions, build};
use clip_model::bundle::{Bundle, BundleError, LABELS, MANIFEST, VISION_DATA, VISION_GRAPH};
use clip_model::checkpoint::Checkpoint;
use clip_model::engine::{EngineError, EngineOptions, ExecutionProvider, TextEngine, VisionEngine};
use clip_model::synthesize::SynthesizedWeights;
use clip_model::{Architecture, WeightsOrigin};

fn tiny(folder: &Path, options: &BuildOptions) -> Bundle {
    clip_model::engine::environment().unwrap_or_else(|error| panic!("{error}"));
    let architecture = Architecture::named("tiny").expect("a known model");
    let checkpoint = Checkpoint::synthesized(SynthesizedWeights::new(architecture, 7));
    build(&checkpoint, &folder.join("bundle"), options, &|_| {}).expect("a bundle")
}

fn words(labels: &[&str]) -> BuildOptions {
    let labels = labels.iter().map(|&label| label.to_owned()).collect();
    BuildOptions {
        labels: Some(labels),
        ..BuildOptions::default()
    }
}

#[test]
fn labels_are_the_embeddings_of_their_prompts() {
    let folder = tempfile::tempdir().expect("a folder");
    let bundle = tiny(folder.path(), &words(&["cat", "hot-air balloon", "owl"]));
    let labels = bundle.labels().expect("labels");
    assert_eq!(labels.names(), ["cat", "hot-air balloon", "owl"]);
    let mut engine = TextEngine::load(&bundle, &EngineOptions::default()).expect("an engine");
    let tokenizer = bundle.tokenizer().expect("a tokenizer");
    let tokens = tokenizer
        .encode_batch(&["a photo of a hot-air balloon"])
        .expect("tokens");
    let embedding = engine.embed(&tokens).expect("an embedding");
    let top = labels.top(&embedding, 2);
    assert_eq!(top[0].0, "hot-air balloon");
    assert!(
        (top[0].1 - 1.0).abs() < 1e-5 && top[1].1 < 0.9999,
        "{top:?}"
    );
    let manifest = bundle.manifest();
    assert_eq!(manifest.labels.as_ref().expect("a summary").count, 3);
}

#[test]
fn the_built_in_labels_are_all_embedded() {
    let folder = tempfile::tempdir().expect("a folder");
    let bundle = tiny(folder.path(), &BuildOptions::default());
    assert!(bundle.labels().expect("labels").names().len() >= 480);
    bundle.verify().expect("an intact bundle");
}

#[test]
fn a_text_s_company_does_not_change_its_embedding() {
    let folder = tempfile::tempdir().expect("a folder");
    let bundle = tiny(folder.path(), &words(&["cat"]));
    let mut engine = TextEngine::load(&bundle, &EngineOptions::default()).expect("an engine");
    let tokenizer = bundle.tokenizer().expect("a tokenizer");
    let long = "a long sentence about very many things that pads all the others";
    let alone = tokenizer.encode_batch(&["cat"]).expect("tokens");
    let company = tokenizer.encode_batch(&["cat", long]).expect("tokens");
    let alone = engine.embed(&alone).expect("an embedding");
    let company = engine.embed(&company).expect("embeddings");
    for (a, b) in alone.iter().zip(&company) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

#[test]
fn batches_of_any_size_give_each_image_its_vector() {
    let folder = tempfile::tempdir().expect("a folder");
    let options = BuildOptions {
        vision_only: true,
        ..BuildOptions::default()
    };
    let bundle = tiny(folder.path(), &options);
    assert!(!bundle.has_text() && bundle.labels().is_none());
    assert!(matches!(
        bundle.tokenizer(),
        Err(BundleError::Lacking { .. })
    ));
    let options = EngineOptions {
        max_batch: 3,
        ..EngineOptions::default()
    };
    let mut engine = VisionEngine::load(&bundle, &options).expect("an engine");
    engine.warm_up().expect("a run");
    let images: Vec<Vec<u8>> = (0..7)
        .map(|image| {
            (0..engine.image_bytes())
                .map(|i| ((i * (image + 1)) % 251) as u8)
                .collect()
        })
        .collect();
    let together = engine
        .embed(&images.concat(), images.len())
        .expect("embeddings");
    assert_eq!(together.len(), images.len() * engine.dimensions());
    for (image, row) in images.iter().zip(together.chunks(engine.dimensions())) {
        let alone = engine.embed(image, 1).expect("an embedding");
        for (a, b) in alone.iter().zip(row) {
            assert!((a - b).abs() <= 1e-4 * a.abs().max(1.0), "{a} {b}");
        }
    }
    assert!(engine.embed(&[], 0).expect("nothing").is_empty());
    let error = engine
        .embed(&[0; 5], 1)
        .expect_err("too few pixels")
        .to_string();
    assert!(
        error.contains("5 values") && error.contains("150528"),
        "{error}"
    );
}

#[test]
fn pixels_in_the_engine_s_own_memory_give_the_vectors_of_any_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let options = BuildOptions {
        vision_only: true,
        ..BuildOptions::default()
    };
    let bundle = tiny(folder.path(), &options);
    let mut engine = VisionEngine::load(&bundle, &EngineOptions::default()).expect("an engine");
    let image = engine.image_bytes();
    let mut buffer = engine.buffer(3 * image).expect("memory");
    assert!(buffer.len() == 3 * image && buffer.iter().all(|byte| *byte == 0));
    // Filled twice, as a pipeline does, the second time in part.
    for images in [3, 2] {
        let pixels: Vec<u8> = (0..images * image)
            .map(|i| (i * images % 251) as u8)
            .collect();
        buffer[..pixels.len()].copy_from_slice(&pixels);
        let own = engine
            .embed(&buffer[..pixels.len()], images)
            .expect("embeddings");
        assert_eq!(own, engine.embed(&pixels, images).expect("embeddings"));
    }
    drop(engine);
    // The memory outlives its engine: a pipeline stops in any order.
    buffer.fill(1);
}

#[test]
fn the_same_weights_make_the_same_bundle() {
    let folder = tempfile::tempdir().expect("a folder");
    let first = tiny(folder.path(), &words(&["cat"])).manifest().digest();
    let again = tiny(folder.path(), &words(&["cat"])).manifest().digest();
    assert_eq!(first, again, "and replaces the one that was there");
    let other = tiny(folder.path(), &words(&["dog"])).manifest().digest();
    assert_ne!(first, other);
    let left = std::fs::read_dir(folder.path()).expect("a folder").count();
    assert_eq!(left, 1, "nothing but the bundle is left");
}

#[test]
fn damage_is_noticed() {
    let folder = tempfile::tempdir().expect("a folder");
    let bundle = tiny(folder.path(), &words(&["cat"]));
    let at = bundle.folder().to_owned();

    // The weights: their size whenever the bundle is opened, their content when asked.
    let path = at.join(VISION_DATA);
    let intact = std::fs::read(&path).expect("weights");
    std::fs::write(&path, &intact[1..]).expect("a file");
    assert!(matches!(
        Bundle::open(&at),
        Err(BundleError::Damaged { .. })
    ));
    std::fs::write(&path, &intact).expect("a file");
    Bundle::open(&at)
        .expect("a bundle")
        .verify()
        .expect("an intact bundle");

    // The small files: content whenever the bundle is opened.
    for name in [VISION_GRAPH, LABELS] {
        let path = at.join(name);
        let intact = std::fs::read(&path).expect("a file");
        let mut damaged = intact.clone();
        *damaged.last_mut().expect("a byte") ^= 1;
        std::fs::write(&path, &damaged).expect("a file");
        let error = Bundle::open(&at).expect_err("damage").to_string();
        assert!(error.contains(name) && error.contains("sha256"), "{error}");
        std::fs::write(&path, &intact).expect("a file");
    }

    let manifest = at.join(MANIFEST);
    let intact = std::fs::read_to_string(&manifest).expect("a manifest");
    std::fs::write(&manifest, intact.replace("\"format\": 1", "\"format\": 99")).expect("a file");
    assert!(matches!(
        Bundle::open(&at),
        Err(BundleError::Format { found: 99, .. })
    ));
    std::fs::write(
        &manifest,
        intact.replace("\"labels.safetensors\"", "\"../elsewhere\""),
    )
    .expect("a file");
    assert!(matches!(
        Bundle::open(&at),
        Err(BundleError::Manifest { .. })
    ));
    std::fs::remove_file(&manifest).expect("a removal");
    let error = Bundle::open(&at).expect_err("no bundle").to_string();
    assert!(
        error.contains("no model bundle") && error.contains("clip-model build"),
        "{error}"
    );
}

#[test]
fn cuda_that_is_not_there_is_an_error() {
    let folder = tempfile::tempdir().expect("a folder");
    let options = BuildOptions {
        vision_only: true,
        ..BuildOptions::default()
    };
    let bundle = tiny(folder.path(), &options);
    let options = EngineOptions {
        provider: ExecutionProvider::Cuda,
        ..EngineOptions::default()
    };
    match VisionEngine::load(&bundle, &options) {
        // Where there is a GPU, the vectors are the processor's.
        Ok(mut cuda) => {
            let grey = vec![100; cuda.image_bytes()];
            let found = cuda.embed(&grey, 1).expect("an embedding");
            let mut cpu =
                VisionEngine::load(&bundle, &EngineOptions::default()).expect("an engine");
            let wanted = cpu.embed(&grey, 1).expect("an embedding");
            for (a, b) in found.iter().zip(&wanted) {
                assert!((a - b).abs() < 1e-2 * b.abs().max(1.0), "{a} {b}");
            }
        }
        Err(error) => {
            assert!(matches!(error, EngineError::Cuda { .. }), "{error}");
            assert!(
                error.to_string().contains("EXECUTION_PROVIDER=cuda"),
                "{error}"
            );
        }
    }
}

fn clip_model(arguments: &[&str], library: Option<&str>) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_clip-model"));
    command.args(arguments);
    match library {
        Some(path) => command.env("ORT_DYLIB_PATH", path),
        None => &mut command,
    };
    command.output().expect("a run of clip-model")
}

fn said(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

#[test]
fn the_commands_work_together_and_shout_about_synthesized_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let (weights, bundle) = (path("tiny.safetensors"), path("bundle"));
    let (weights, bundle) = (
        weights.to_str().expect("UTF-8"),
        bundle.to_str().expect("UTF-8"),
    );
    std::fs::write(path("labels.txt"), "cat\n# comment\ndog\n").expect("a file");
    let labels = path("labels.txt");
    let labels = labels.to_str().expect("UTF-8");

    let output = clip_model(
        &["synthesize", "tiny", "--seed", "7", "--output", weights],
        None,
    );
    assert!(output.status.success(), "{}", said(&output.stderr));
    assert!(said(&output.stderr).contains("MEAN NOTHING"));

    let build = [
        "build",
        "--weights",
        weights,
        "--output",
        bundle,
        "--labels",
        labels,
    ];
    let output = clip_model(&build, None);
    assert!(output.status.success(), "{}", said(&output.stderr));
    assert!(said(&output.stderr).contains("MEAN NOTHING"));

    let output = clip_model(&["inspect", bundle, "--verify"], None);
    assert!(output.status.success(), "{}", said(&output.stderr));
    for part in [
        "tiny",
        "32 dimensions",
        "SYNTHESIZED from seed 7",
        "labels      2",
    ] {
        assert!(
            said(&output.stdout).contains(part),
            "{part}: {}",
            said(&output.stdout)
        );
    }

    let output = clip_model(&["embed", bundle, "a cat", "a dog"], None);
    assert_eq!(
        said(&output.stdout).lines().count(),
        2,
        "{}",
        said(&output.stderr)
    );

    let opened = Bundle::open(Path::new(bundle)).expect("a bundle");
    assert_eq!(
        opened.manifest().weights,
        WeightsOrigin::Synthesized { seed: 7 }
    );
    assert!(opened.manifest().weights_sha256.is_some());

    let pixels = path("pixels.rgb");
    let pixels = pixels.to_str().expect("UTF-8");
    std::fs::write(pixels, vec![80; 2 * 224 * 224 * 3]).expect("a file");
    let output = clip_model(&["embed", bundle, "--pixels", pixels], None);
    assert_eq!(
        said(&output.stdout).lines().count(),
        2,
        "{}",
        said(&output.stderr)
    );
    assert!(
        said(&output.stdout).contains("\"cat\""),
        "{}",
        said(&output.stdout)
    );
    std::fs::write(pixels, [80; 100]).expect("a file");
    let output = clip_model(&["embed", bundle, "--pixels", pixels], None);
    assert!(
        said(&output.stderr).contains("100 values given"),
        "{}",
        said(&output.stderr)
    );

    let bench = [
        "bench",
        bundle,
        "--batches",
        "2",
        "--threads",
        "1",
        "--seconds",
        "0.01",
        "--json",
    ];
    let output = clip_model(&bench, None);
    let report: serde_json::Value =
        serde_json::from_slice(&output.stdout).expect("a report in JSON");
    assert_eq!(report["figures"][0]["batch"], 2);
    assert!(
        report["figures"][0]["ms_per_image"]
            .as_f64()
            .expect("a figure")
            > 0.0
    );

    // Without ONNX Runtime: what needs it says what to do, what does not need it works.
    let output = clip_model(&build, Some(""));
    assert!(!output.status.success());
    for part in ["ORT_DYLIB_PATH is not set", "--no-labels"] {
        assert!(
            said(&output.stderr).contains(part),
            "{part}: {}",
            said(&output.stderr)
        );
    }
    let missing = path("libnowhere.so");
    let output = clip_model(&["embed", bundle, "a cat"], missing.to_str());
    assert!(
        said(&output.stderr).contains("libnowhere.so: no such file"),
        "{}",
        said(&output.stderr)
    );
    let output = clip_model(
        &[
            "build",
            "--weights",
            weights,
            "--output",
            bundle,
            "--no-labels",
        ],
        Some(""),
    );
    assert!(output.status.success(), "{}", said(&output.stderr));

    let output = clip_model(&["synthesize", "ViT-Z/1"], None);
    assert!(!output.status.success() && said(&output.stderr).contains("ViT-B/32"));
}
