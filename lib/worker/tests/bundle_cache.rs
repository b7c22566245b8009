//! The bundle cache against a small S3 that serves a folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use aws_config::{BehaviorVersion, Region};
use clip_model::Architecture;
use clip_model::build::{BuildOptions, build};
use clip_model::bundle::{Bundle, VISION_DATA};
use clip_model::checkpoint::Checkpoint;
use clip_model::synthesize::SynthesizedWeights;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use worker::bundle_cache::{FetchError, fetch};

/// A bundle of the tiny model, without what needs ONNX Runtime.
fn tiny(folder: &Path) -> PathBuf {
    tiny_with(folder, true)
}

fn tiny_with(folder: &Path, vision_only: bool) -> PathBuf {
    let architecture = Architecture::named("tiny").expect("a known model");
    let checkpoint = Checkpoint::synthesized(SynthesizedWeights::new(architecture, 7));
    let options = BuildOptions {
        vision_only,
        labels: None,
        ..BuildOptions::default()
    };
    let bundle = folder.join("bundle");
    build(&checkpoint, &bundle, &options, &|_| {}).expect("a bundle");
    bundle
}

struct Server {
    s3: aws_sdk_s3::Client,
    gets: Arc<AtomicUsize>,
}

/// Serves the files of a folder as `s3://models/clip/…`.
async fn serve(folder: PathBuf) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let gets = Arc::new(AtomicUsize::new(0));
    let counted = gets.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            tokio::spawn(answer(socket, folder.clone(), counted.clone()));
        }
    });
    let http_client = platform::aws_config().await.http_client().unwrap();
    let config = aws_config::defaults(BehaviorVersion::latest())
        .http_client(http_client)
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .test_credentials()
        .load()
        .await;
    Server {
        s3: platform::s3_client(&config),
        gets,
    }
}

async fn answer(mut socket: TcpStream, folder: PathBuf, gets: Arc<AtomicUsize>) {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match socket.read(&mut buffer).await {
            Ok(count @ 1..) => request.extend_from_slice(&buffer[..count]),
            _ => return,
        }
    }
    gets.fetch_add(1, Ordering::Relaxed);
    let request = String::from_utf8_lossy(&request).to_ascii_lowercase();
    let path = request.split(' ').nth(1).unwrap_or_default();
    let path = path.split('?').next().unwrap_or_default();
    let file = path
        .strip_prefix("/models/clip/")
        .and_then(|name| std::fs::read(folder.join(name)).ok());
    let range = request
        .lines()
        .find_map(|line| line.strip_prefix("range: bytes="))
        .and_then(|range| range.trim().split_once('-'))
        .map(|(start, end)| (start.parse().unwrap(), end.parse().unwrap()));
    let (status, body) = match (file, range) {
        (None, _) => (
            "404 Not Found",
            b"<Error><Code>NoSuchKey</Code><Message>gone</Message></Error>".to_vec(),
        ),
        (Some(file), None) => ("200 OK", file),
        (Some(file), Some((start, end))) => {
            let part: &[u8] = &file[start..=end];
            ("206 Partial Content", part.to_vec())
        }
    };
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    );
    let _ = socket.write_all(head.as_bytes()).await;
    let _ = socket.write_all(&body).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bundle_is_fetched_once_and_used_again() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = tiny(folder.path());
    let server = serve(bundle.clone()).await;
    let cache = folder.path().join("cache");
    let fetched = fetch(&server.s3, "models", "clip", &cache).await.unwrap();
    let opened = Bundle::open(&fetched).unwrap();
    opened.verify().unwrap();
    assert_eq!(opened.manifest(), Bundle::open(&bundle).unwrap().manifest());
    let gets = server.gets.load(Ordering::Relaxed);
    let again = fetch(&server.s3, "models", "clip", &cache).await.unwrap();
    assert_eq!(again, fetched);
    // Only the manifest, to see whether the bundle is still the same.
    assert_eq!(server.gets.load(Ordering::Relaxed), gets + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_texts_is_left_where_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = tiny_with(folder.path(), false);
    assert!(Bundle::open(&bundle).unwrap().has_text());
    let server = serve(bundle).await;
    let cache = folder.path().join("cache");
    let fetched = fetch(&server.s3, "models", "clip", &cache).await.unwrap();
    let opened = Bundle::open(&fetched).unwrap();
    opened.verify().unwrap();
    assert!(!opened.has_text());
    assert!(!fetched.join("text.onnx.data").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn tasks_that_start_at_once_fetch_it_once() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = tiny(folder.path());
    let files = std::fs::read_dir(&bundle).unwrap().count();
    let server = serve(bundle).await;
    let cache = folder.path().join("cache");
    let fetches = (0..6).map(|_| fetch(&server.s3, "models", "clip", &cache));
    let folders = futures_util::future::join_all(fetches).await;
    for folder in &folders {
        assert_eq!(folder.as_ref().unwrap(), folders[0].as_ref().unwrap());
    }
    // Six manifests, and every other file once (each is a single part).
    assert_eq!(server.gets.load(Ordering::Relaxed), 6 + files - 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_file_is_never_used_and_a_later_fetch_mends_it() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = tiny(folder.path());
    let data = bundle.join(VISION_DATA);
    let intact = std::fs::read(&data).unwrap();
    let mut damaged = intact.clone();
    *damaged.last_mut().unwrap() ^= 1;
    std::fs::write(&data, &damaged).unwrap();
    let server = serve(bundle).await;
    let cache = folder.path().join("cache");
    let error = fetch(&server.s3, "models", "clip", &cache)
        .await
        .unwrap_err();
    assert!(matches!(error, FetchError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("MODEL_URI"), "{error}");
    std::fs::write(&data, &intact).unwrap();
    let fetched = fetch(&server.s3, "models", "clip", &cache).await.unwrap();
    Bundle::open(&fetched).unwrap().verify().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_manifest_writes_nowhere_but_into_its_own_folder() {
    for name in ["../outside", "/tmp/outside", "a/b", "..", "."] {
        let folder = tempfile::tempdir().unwrap();
        let bundle = tiny(folder.path());
        let manifest = bundle.join("manifest.json");
        let text = std::fs::read_to_string(&manifest).unwrap();
        let more = format!("\"files\": {{\"{name}\": {{\"sha256\": \"00\", \"bytes\": 1}},");
        std::fs::write(&manifest, text.replace("\"files\": {", &more)).unwrap();
        let server = serve(bundle).await;
        let cache = folder.path().join("cache");
        let error = fetch(&server.s3, "models", "clip", &cache)
            .await
            .unwrap_err();
        assert!(
            matches!(error, FetchError::Manifest { .. }),
            "{name}: {error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_without_a_bundle_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path().join("empty")).await;
    let cache = folder.path().join("cache");
    let error = fetch(&server.s3, "models", "clip", &cache)
        .await
        .unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("s3://models/clip/manifest.json"),
        "{message}"
    );
    assert!(message.contains("NoSuchKey"), "{message}");
}
