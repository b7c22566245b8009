//! The program leaves nothing behind in the folder for temporary files, where ONNX
//! Runtime's telemetry would keep a session's id. Needs ONNX Runtime (`ORT_DYLIB_PATH`).

use std::process::Command;

use clip_model::Architecture;
use clip_model::build::{BuildOptions, build};
use clip_model::checkpoint::Checkpoint;
use clip_model::synthesize::SynthesizedWeights;

#[test]
fn the_program_leaves_no_telemetry_behind() {
    let folder = tempfile::tempdir().expect("a folder");
    let temporary = folder.path().join("temporary");
    std::fs::create_dir(&temporary).expect("a folder");
    let architecture = Architecture::named("tiny").expect("a known model");
    let checkpoint = Checkpoint::synthesized(SynthesizedWeights::new(architecture, 7));
    let options = BuildOptions {
        labels: None,
        ..BuildOptions::default()
    };
    let bundle = folder.path().join("bundle");
    build(&checkpoint, &bundle, &options, &|_| {}).expect("a bundle");
    let output = Command::new(env!("CARGO_BIN_EXE_clip-model"))
        .args(["embed".as_ref(), bundle.as_os_str(), "a cat".as_ref()])
        .env_remove("ORT_DISABLE_TELEMETRY")
        .env("TMPDIR", &temporary)
        .output()
        .expect("the program starts");
    assert!(output.status.success(), "{output:?}");
    let left: Vec<_> = std::fs::read_dir(&temporary).expect("a folder").collect();
    assert!(left.is_empty(), "{left:?}");
}
