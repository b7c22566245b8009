//! `local demo`, as a user runs it, with a model that is small enough for a
//! test: needs `LOCAL_MINISTACK`, `ORT_DYLIB_PATH` and the pipeline's programs.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

/// A bundle of the tiny model, made by `clip-model` as a user makes one.
fn tiny_bundle(folder: &TempDir) -> PathBuf {
    let clip_model = ministack::process::sibling("clip-model");
    let weights = folder.path().join("tiny.safetensors");
    let bundle = folder.path().join("tiny");
    let run = |arguments: &[&str]| {
        let output = Command::new(&clip_model).args(arguments).output();
        let output = output.unwrap_or_else(|error| {
            panic!(
                "{}: {error} (cargo build -p clip-model)",
                clip_model.display()
            )
        });
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let (weights_text, bundle_text) = (weights.display().to_string(), bundle.display().to_string());
    run(&["synthesize", "tiny", "--output", &weights_text]);
    run(&[
        "build",
        "--no-labels",
        "--weights",
        &weights_text,
        "--output",
        &bundle_text,
    ]);
    bundle
}

fn demo(folder: &TempDir, arguments: &[&Path]) -> Command {
    for variable in ["LOCAL_MINISTACK", "ORT_DYLIB_PATH"] {
        assert!(
            std::env::var_os(variable).is_some(),
            "{variable} must be set; `cargo xtask test` does that"
        );
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_local"));
    command
        .arg("demo")
        .arg("--bundle")
        .arg(tiny_bundle(folder))
        .arg("--work-dir")
        .arg(folder.path().join("work"))
        .env("TMPDIR", temporary(folder))
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// The demo's temporary folder, of which nothing must be left.
fn temporary(folder: &TempDir) -> PathBuf {
    let path = folder.path().join("tmp");
    fs::create_dir_all(&path).expect("a folder");
    path
}

fn left_behind(folder: &TempDir) -> Vec<String> {
    let mut left = processes_in(folder.path());
    let files = fs::read_dir(temporary(folder)).expect("a folder").flatten();
    left.extend(files.map(|file| file.path().display().to_string()));
    left
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

fn samples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("samples")
}

#[test]
fn the_samples_come_out_as_vectors_and_events_and_the_cluster_is_at_zero_again() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = demo(&folder, &[]).output().expect("it runs");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("8 of 8 files embedded, 0 not"), "{said}");
    assert!(said.contains("SYNTHESISED WEIGHTS"), "{said}");
    assert_eq!(
        said.lines().last(),
        Some("the cluster is back at 0 tasks and 0 instances")
    );
    assert_eq!(left_behind(&folder), Vec::<String>::new());

    let results = folder.path().join("work/demo");
    let events = fs::read_to_string(results.join("events.jsonl")).expect("events");
    assert_eq!(events.lines().count(), 8);
    for line in events.lines() {
        let event: Value = serde_json::from_str(line).expect("JSON");
        let dimensions =
            &event["data"]["metadata"]["properties"]["attrs"]["embeddings"]["dimensions"];
        let url = event["data"]["document"]["url"].as_str().expect("a URL");
        let name = url
            .rsplit('/')
            .next()
            .unwrap_or_default()
            .replace("%20", " ");
        let vector = fs::read_to_string(results.join("vectors").join(format!("{name}.json")))
            .expect("a vector");
        let vector: Vec<f64> = serde_json::from_str(&vector).expect("an array of numbers");
        assert_eq!(dimensions.as_u64(), Some(vector.len() as u64));
    }
}

#[test]
fn a_mixed_folder_loses_nothing_and_each_bad_file_has_its_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let mixed = folder.path().join("my mixed + é folder");
    fs::create_dir_all(mixed.join("deep")).expect("folders");
    fs::copy(
        samples().join("mountains.jpg"),
        mixed.join("deep/photo + é&(1).jpg"),
    )
    .expect("a copy");
    fs::copy(samples().join("flower.gif"), mixed.join("flower 100%.gif")).expect("a copy");
    let whole = fs::read(samples().join("city at night.jpg")).expect("a sample");
    fs::write(mixed.join("half.jpg"), &whole[..whole.len() / 2]).expect("a file");
    fs::write(mixed.join("text.jpg"), "no image at all").expect("a file");
    fs::write(mixed.join("empty.png"), "").expect("a file");
    fs::write(mixed.join("notes.txt"), "just notes").expect("a file");
    let output = demo(&folder, &[&mixed]).output().expect("it runs");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("2 of 6 files embedded, 4 not"), "{said}");
    for (name, reason) in [
        ("half.jpg", "truncated"),
        ("text.jpg", "claims to be image/jpeg"),
        ("empty.png", "empty"),
        ("notes.txt", "none of the seven image types"),
    ] {
        let row = said
            .lines()
            .rev()
            .find(|line| line.starts_with("my mixed + é folder/") && line.contains(name));
        assert!(
            row.is_some_and(|row| row.contains(reason)),
            "{name}: {row:?} in\n{said}"
        );
    }
    assert_eq!(
        said.lines().last(),
        Some("the cluster is back at 0 tasks and 0 instances")
    );
}

#[test]
fn an_interrupt_stops_everything_that_was_started() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut running = demo(&folder, &[])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("it runs");
    let started = Instant::now();
    while processes_in(folder.path()).len() < 3 {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "emulator, functions and a task are not up"
        );
        assert_eq!(
            running.try_wait().expect("its state"),
            None,
            "it ended too early"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = rustix::process::Pid::from_child(&running);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a signal");
    assert_eq!(running.wait().expect("its end").code(), Some(130));
    let stopped = Instant::now();
    while !left_behind(&folder).is_empty() {
        assert!(
            stopped.elapsed() < Duration::from_secs(5),
            "left: {:?}",
            left_behind(&folder)
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_kept_pipeline_goes_on_telling_what_happens() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut running = demo(
        &folder,
        &[Path::new("--keep"), &samples().join("flower.gif")],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::null())
    .spawn()
    .expect("it runs");
    let (line, lines) = mpsc::channel();
    let output = BufReader::new(running.stdout.take().expect("its output"));
    std::thread::spawn(move || {
        output
            .lines()
            .try_for_each(|text| line.send(text.expect("text")))
    });
    let until = |wanted: &str| {
        let mut said = Vec::new();
        while let Ok(text) = lines.recv_timeout(SILENCE) {
            said.push(text);
            if said.last().is_some_and(|line| line.contains(wanted)) {
                return said;
            }
        }
        panic!("no {wanted:?}: {said:#?}\n{}", logs(folder.path()));
    };
    let told = until("AWS_ENDPOINT_URL=").pop().unwrap_or_default();
    until("aws s3 cp photo.jpg");
    let (_, endpoint) = told.split_once("AWS_ENDPOINT_URL=").expect("an endpoint");
    let endpoint = endpoint.split(' ').next().unwrap_or_default();
    put(
        endpoint,
        "by hand.pcx",
        &fs::read(samples().join("fruit.pcx")).expect("a sample"),
    );
    put(endpoint, "no image.png", b"text");
    let mut said = until("by hand.pcx");
    if !said.iter().any(|line| line.contains("no image.png")) {
        said.extend(until("no image.png"));
    }
    said.extend(until("is gone"));
    for wanted in [
        "scaler   ",
        "task     ",
        "instance ",
        "event    by hand.pcx",
        "rejected no image.png",
    ] {
        assert!(
            said.iter().any(|line| line.contains(wanted)),
            "{wanted}: {said:#?}"
        );
    }
    let pid = rustix::process::Pid::from_child(&running);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a signal");
    assert_eq!(running.wait().expect("its end").code(), Some(130));
}

/// Longer than a message stays hidden that a poll took along.
const SILENCE: Duration = Duration::from_secs(240);

/// What the tasks logged.
fn logs(folder: &Path) -> String {
    let logs = fs::read_dir(folder.join("work/demo/logs")).expect("a folder");
    let logs = logs.flatten().map(|log| {
        let text = fs::read_to_string(log.path()).unwrap_or_default();
        format!("{}\n{text}\n", log.path().display())
    });
    logs.collect()
}

/// Puts an object into the source bucket, as a person would.
fn put(endpoint: &str, key: &str, content: &[u8]) {
    let config = local::sdk::config(endpoint);
    let config = aws_sdk_s3::config::Builder::from(&config).force_path_style(true);
    let s3 = aws_sdk_s3::Client::from_conf(config.build());
    let put = s3.put_object().bucket("clip-source").key(key);
    let put = put.body(content.to_vec().into());
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(put.send()).expect("it is taken");
}

#[test]
fn what_is_not_there_is_said_at_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = demo(&folder, &[Path::new("/no/such/photo.jpg")])
        .output()
        .expect("it runs");
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output).contains("/no/such/photo.jpg: "),
        "{}",
        text(&output)
    );
}

/// Processes that work in `folder`: the emulator, its functions, the tasks.
fn processes_in(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        if fs::read_link(entry.path().join("cwd")).is_ok_and(|path| path.starts_with(folder)) {
            found.push(fs::read_to_string(entry.path().join("comm")).unwrap_or_default());
        }
    }
    found
}

#[test]
fn published_weights_that_cannot_be_had_end_the_demo_before_it_begins() {
    let folder = tempfile::tempdir().expect("a folder");
    for (model, reason) in [
        ("ViT-B/32", "the model hub cannot be reached"),
        ("tiny", "published no weights of tiny"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_local"))
            .args(["demo", "--weights", "published", "--model", model])
            .arg("--work-dir")
            .arg(folder.path().join("work"))
            // Nobody listens at the port that is reserved for multiplexers.
            .env("HF_ENDPOINT", "http://127.0.0.1:1")
            .output()
            .expect("it runs");
        let said = text(&output);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(reason), "{said}");
    }
}
