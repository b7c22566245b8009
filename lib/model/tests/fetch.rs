//! Downloads from a hub of our own on this machine, which behaves as the real one does and fails
//! as the real network does.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use clip_model::architecture::Activation;
use clip_model::build::{BuildOptions, build};
use clip_model::checkpoint::{Checkpoint, Overrides};
use clip_model::fetch::{FetchError, Progress, Receipt, fetch, probe};
use clip_model::files::{sha256_of_bytes, sha256_of_file};
use clip_model::synthesize::SynthesizedWeights;
use clip_model::{Architecture, WeightsOrigin};

const REPOSITORY: &str = "timm/vit_base_patch32_clip_224.openai";
const WEIGHTS: &str =
    "/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors";
const CONFIGURATION: &str =
    "/timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_config.json";
const REVISION: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the hub does wrong.
#[derive(Default)]
struct Faults {
    /// Requests answered with 503 before the first good answer.
    unavailable: AtomicUsize,
    /// Downloads cut off in the middle before the first whole one.
    cut: AtomicUsize,
    /// Announces another digest than the file has.
    lies: AtomicBool,
    /// Sends the whole file whatever range is asked for.
    ignores_ranges: AtomicBool,
    /// Announces no digest.
    no_digest: AtomicBool,
}

struct Hub {
    endpoint: String,
    content: Arc<Vec<u8>>,
    faults: Arc<Faults>,
    /// Method, path and range of every request.
    requests: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start() -> Hub {
        // Larger than any buffer on the way, so that a cut loses something.
        let content: Vec<u8> = (0..3_000_000u32)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        Hub::serving(content)
    }

    fn serving(content: Vec<u8>) -> Hub {
        let content = Arc::new(content);
        let faults = Arc::new(Faults::default());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        let hub = Hub {
            endpoint,
            content,
            faults,
            requests,
        };
        let (content, faults) = (Arc::clone(&hub.content), Arc::clone(&hub.faults));
        let requests = Arc::clone(&hub.requests);
        // Ends with the process: the listener has no other owner.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (content, faults) = (Arc::clone(&content), Arc::clone(&faults));
                let requests = Arc::clone(&requests);
                std::thread::spawn(move || serve(stream, &content, &faults, &requests));
            }
        });
        hub
    }

    fn fetch(&self, output: &Path) -> Result<Receipt, FetchError> {
        fetch("ViT-B/32", &self.endpoint, output, &|_| {})
    }

    fn requests(&self) -> Vec<String> {
        self.requests
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn take_one(counter: &AtomicUsize) -> bool {
    counter
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
            left.checked_sub(1)
        })
        .is_ok()
}

/// One request per connection.
fn serve(mut stream: TcpStream, content: &[u8], faults: &Faults, requests: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a clone"));
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or(0) == 0 {
        return;
    }
    let mut words = line.split_whitespace();
    let method = words.next().unwrap_or_default().to_owned();
    let path = words.next().unwrap_or_default().to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a header");
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    let range = headers.get("range").cloned().unwrap_or_default();
    let request = format!("{method} {path} {range}");
    requests
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(request.trim_end().to_owned());

    let mut answer = |status: &str, headers: &str, body: &[u8], length: usize| {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{headers}\r\n"
        );
        // A client that has gone is no fault of the server's.
        let _ = stream
            .write_all(head.as_bytes())
            .and_then(|()| stream.write_all(body));
    };
    if take_one(&faults.unavailable) {
        return answer("503 Service Unavailable", "", b"", 0);
    }
    match (method.as_str(), path.as_str()) {
        (_, WEIGHTS) => {
            let digest = if faults.lies.load(Ordering::SeqCst) {
                "0".repeat(64)
            } else {
                sha256_of_bytes(content)
            };
            if faults.no_digest.load(Ordering::SeqCst) {
                // A small file's ETag is not its SHA-256.
                let etag = "ETag: \"5d41402abc4b2a76b9719d911017c592\"\r\n";
                return answer("200 OK", etag, b"", 0);
            }
            let etag = format!(
                "X-Linked-Etag: \"{digest}\"\r\nX-Linked-Size: {}\r\n",
                content.len()
            );
            let headers = format!("{etag}X-Repo-Commit: {REVISION}\r\nLocation: /bytes\r\n");
            answer("302 Found", &headers, b"", 0);
        }
        (_, CONFIGURATION) => {
            let body = br#"{"model_cfg": {"quick_gelu": true, "vision_cfg": {"head_width": 16},
                "text_cfg": {"heads": 2}}}"#;
            answer("200 OK", "", body, body.len());
        }
        ("GET", "/bytes") => {
            let start = range
                .trim_start_matches("bytes=")
                .trim_end_matches('-')
                .parse();
            let ignores = faults.ignores_ranges.load(Ordering::SeqCst);
            let start: usize = if ignores { 0 } else { start.unwrap_or(0) };
            let part = &content[start..];
            let sent = if take_one(&faults.cut) {
                &part[..part.len() / 2]
            } else {
                part
            };
            if start > 0 {
                let last = content.len() - 1;
                let header = format!("Content-Range: bytes {start}-{last}/{}\r\n", content.len());
                answer("206 Partial Content", &header, sent, part.len());
            } else {
                answer("200 OK", "", sent, part.len());
            }
        }
        _ => answer("404 Not Found", "", b"", 0),
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder").flatten();
    let mut names: Vec<String> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn target(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("weights.safetensors")
}

#[test]
fn a_download_is_whole_verified_and_remembers_where_it_is_from() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().expect("a folder");
    let seen = Mutex::new(Vec::new());
    let receipt = fetch("ViT-B/32", &hub.endpoint, &target(&folder), &|progress| {
        seen.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(progress);
    })
    .expect("a download");
    assert_eq!(
        std::fs::read(target(&folder)).expect("weights"),
        *hub.content
    );
    assert_eq!(receipt.repository, REPOSITORY);
    assert_eq!(receipt.revision.as_deref(), Some(REVISION));
    assert_eq!(receipt.sha256, sha256_of_bytes(&hub.content));
    assert_eq!(Receipt::beside(&target(&folder)), Some(receipt));
    let wanted = [
        "open_clip_config.json",
        "weights.safetensors",
        "weights.safetensors.receipt.json",
    ];
    assert_eq!(names(folder.path()), wanted, "and no part is left");
    let seen = seen.into_inner().unwrap_or_else(PoisonError::into_inner);
    let total = hub.content.len() as u64;
    assert_eq!(
        seen.last(),
        Some(&Progress {
            received: total,
            total
        })
    );
    assert!(
        seen.windows(2)
            .all(|pair| pair[0].received <= pair[1].received)
    );
}

#[test]
fn published_weights_are_built_as_what_they_are() {
    // A hub whose file is a whole checkpoint, with a configuration that names the wrong activation.
    let folder = tempfile::tempdir().expect("a folder");
    let made = folder.path().join("made.safetensors");
    let architecture = Architecture::named("tiny").expect("a known model");
    SynthesizedWeights::new(architecture, 3)
        .write(&made, &|_| {})
        .expect("a file");
    // Without the mark of synthesized weights, as published ones are.
    let bytes = std::fs::read(&made).expect("weights");
    let tensors = safetensors::SafeTensors::deserialize(&bytes).expect("tensors");
    let bytes = safetensors::serialize(tensors.tensors(), None).expect("a checkpoint");
    let hub = Hub::serving(bytes);
    hub.fetch(&target(&folder)).expect("a download");
    let configuration = folder.path().join("open_clip_config.json");
    let text = std::fs::read_to_string(&configuration).expect("a configuration");
    assert!(text.contains("true"));
    std::fs::write(&configuration, text.replace("true", "false")).expect("a file");

    let checkpoint =
        Checkpoint::open(&target(&folder), Overrides::default()).expect("a checkpoint");
    let activation = checkpoint.architecture().vision.transformer.activation;
    assert_eq!(
        activation,
        Activation::QuickGelu,
        "OpenAI's, whatever the configuration says"
    );
    let options = BuildOptions {
        labels: None,
        ..BuildOptions::default()
    };
    let bundle = build(
        &checkpoint,
        &folder.path().join("bundle"),
        &options,
        &|_| {},
    )
    .expect("a bundle");
    let wanted = WeightsOrigin::Published {
        repository: REPOSITORY.to_owned(),
        revision: Some(REVISION.to_owned()),
    };
    assert_eq!(bundle.manifest().weights, wanted);
    assert_eq!(
        bundle.manifest().weights_sha256,
        Some(sha256_of_bytes(&hub.content))
    );
}

#[test]
fn weights_that_are_there_are_not_downloaded_again() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().expect("a folder");
    hub.fetch(&target(&folder)).expect("a download");
    hub.fetch(&target(&folder)).expect("nothing to do");
    let downloads = |hub: &Hub| {
        hub.requests()
            .iter()
            .filter(|r| r.starts_with("GET /bytes"))
            .count()
    };
    assert_eq!(downloads(&hub), 1);
    std::fs::write(target(&folder), "something else").expect("a file");
    hub.fetch(&target(&folder)).expect("a download");
    assert_eq!(downloads(&hub), 2);
    assert_eq!(
        sha256_of_file(&target(&folder)).expect("a digest"),
        sha256_of_bytes(&hub.content)
    );
}

#[test]
fn a_cut_download_goes_on_where_it_stopped() {
    let hub = Hub::start();
    hub.faults.cut.store(2, Ordering::SeqCst);
    let folder = tempfile::tempdir().expect("a folder");
    hub.fetch(&target(&folder)).expect("a download");
    assert_eq!(
        std::fs::read(target(&folder)).expect("weights"),
        *hub.content
    );
    let requests = hub.requests();
    let ranges = requests
        .iter()
        .filter(|request| request.contains("/bytes bytes="))
        .count();
    assert_eq!(ranges, 2, "{requests:?}");
}

#[test]
fn a_part_of_an_earlier_run_is_used() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().expect("a folder");
    let digest = sha256_of_bytes(&hub.content);
    let part = folder
        .path()
        .join(format!("weights.safetensors.{}.part", &digest[..16]));
    std::fs::write(&part, &hub.content[..1_234_567]).expect("a part");
    hub.fetch(&target(&folder)).expect("a download");
    assert_eq!(
        std::fs::read(target(&folder)).expect("weights"),
        *hub.content
    );
    let requests = hub.requests();
    assert!(
        requests.contains(&"GET /bytes bytes=1234567-".to_owned()),
        "{requests:?}"
    );
    assert!(!part.exists());
}

#[test]
fn two_downloads_to_one_file_do_not_mix() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().expect("a folder");
    let digest = sha256_of_bytes(&hub.content);
    let part = folder
        .path()
        .join(format!("weights.safetensors.{}.part", &digest[..16]));
    let other = std::fs::File::create(&part).expect("a part");
    other.try_lock().expect("a lock");
    let error = hub.fetch(&target(&folder)).expect_err("a refusal");
    assert!(error.to_string().contains("another fetch"), "{error}");
    drop(other);
    hub.fetch(&target(&folder)).expect("a download");
}

#[test]
fn a_hub_that_ignores_ranges_is_begun_with_again() {
    let hub = Hub::start();
    hub.faults.cut.store(1, Ordering::SeqCst);
    hub.faults.ignores_ranges.store(true, Ordering::SeqCst);
    let folder = tempfile::tempdir().expect("a folder");
    hub.fetch(&target(&folder)).expect("a download");
    assert_eq!(
        std::fs::read(target(&folder)).expect("weights"),
        *hub.content
    );
}

#[test]
fn a_hub_that_is_busy_is_asked_again() {
    let hub = Hub::start();
    hub.faults.unavailable.store(2, Ordering::SeqCst);
    let folder = tempfile::tempdir().expect("a folder");
    hub.fetch(&target(&folder)).expect("a download");
    assert!(target(&folder).exists());
}

#[test]
fn bytes_that_are_not_what_was_announced_are_not_kept() {
    let hub = Hub::start();
    hub.faults.lies.store(true, Ordering::SeqCst);
    let folder = tempfile::tempdir().expect("a folder");
    let error = hub.fetch(&target(&folder)).expect_err("a wrong digest");
    assert!(matches!(error, FetchError::Digest { .. }), "{error}");
    assert!(
        names(folder.path()).is_empty(),
        "{:?}",
        names(folder.path())
    );
}

#[test]
fn a_damaged_part_is_not_kept_either() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().expect("a folder");
    let digest = sha256_of_bytes(&hub.content);
    let part = folder
        .path()
        .join(format!("weights.safetensors.{}.part", &digest[..16]));
    std::fs::write(&part, vec![1; 1000]).expect("a part");
    let error = hub.fetch(&target(&folder)).expect_err("a wrong digest");
    assert!(matches!(error, FetchError::Digest { .. }), "{error}");
    hub.fetch(&target(&folder))
        .expect("a download from the beginning");
}

#[test]
fn without_a_digest_nothing_is_downloaded() {
    let hub = Hub::start();
    hub.faults.no_digest.store(true, Ordering::SeqCst);
    let folder = tempfile::tempdir().expect("a folder");
    let error = hub.fetch(&target(&folder)).expect_err("no digest");
    assert!(matches!(error, FetchError::NoDigest { .. }), "{error}");
    assert!(
        hub.requests()
            .iter()
            .all(|request| !request.contains("/bytes"))
    );
}

#[test]
fn an_absent_repository_is_said_to_be_absent() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().expect("a folder");
    let error = fetch("ViT-L/14", &hub.endpoint, &target(&folder), &|_| {}).expect_err("absence");
    assert!(error.to_string().contains("404"), "{error}");
    let error = fetch("ViT-H/14", &hub.endpoint, &target(&folder), &|_| {}).expect_err("no name");
    assert!(
        error.to_string().contains("ViT-B/32, ViT-B/16, ViT-L/14"),
        "{error}"
    );
}

#[test]
fn a_hub_in_reach_is_told_from_one_that_is_not() {
    let hub = Hub::start();
    probe(&hub.endpoint).expect("an answer, though of an error");
    let closed = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a port that nobody listens at any more");
    let error = probe(&format!("http://{closed}")).expect_err("no hub");
    assert!(matches!(error, FetchError::Hub { .. }), "{error}");
    // Takes connections and says nothing, as behind some firewalls.
    let silent = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = silent.local_addr().expect("an address");
    let started = std::time::Instant::now();
    assert!(probe(&format!("http://{address}")).is_err());
    assert!(started.elapsed() < std::time::Duration::from_secs(20));
}

#[test]
fn the_command_takes_the_hub_from_the_environment() {
    let hub = Hub::start();
    let folder = tempfile::tempdir().expect("a folder");
    let path = target(&folder);
    let output = Command::new(env!("CARGO_BIN_EXE_clip-model"))
        .args(["fetch", "ViT-B/32", "--output"])
        .arg(&path)
        .env("HF_ENDPOINT", format!("{}/", hub.endpoint))
        .output()
        .expect("a run of clip-model");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(
        said.contains(REPOSITORY) && said.contains(&sha256_of_bytes(&hub.content)),
        "{said}"
    );
    assert!(path.exists());
}
