//! The backfill against an emulated AWS: the real program, interrupted.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use common::{Emulator, json, text};
use events::{CloudEvent, S3Url, vector};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Keys of images in the large bucket.
const IMAGES: usize = 10_000;

/// Every so manieth is embedded already: 1,429 of them.
const EMBEDDED_EVERY: usize = 7;

/// The MD5 of `x`, which is what every object holds.
const ETAG: &str = "9dd4e461268c8034f5c8564e155c67a6";

const MODEL: &str = "ViT-B/32";

fn image_key(index: usize) -> String {
    // A space, so that keys and URLs differ.
    format!("all/{:02}/image {index:05}.png", index % 10)
}

fn url(bucket: &str, key: &str) -> String {
    S3Url::new(bucket, key).to_string()
}

fn put(buckets: &Path, bucket: &str, key: &str, content: &[u8]) {
    let path = buckets.join(bucket).join(key);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, content).unwrap();
}

fn put_vector(buckets: &Path, bucket: &str, key: &str, model: &str) {
    let vector_key = vector::key(vector::DEFAULT_PREFIX, &url(bucket, key), ETAG, model);
    put(buckets, "cache", &vector_key, b"[0.5]");
}

fn fill(buckets: &Path) {
    for index in 0..IMAGES {
        let key = image_key(index);
        put(buckets, "large", &key, b"x");
        if index % EMBEDDED_EVERY == 0 {
            put_vector(buckets, "large", &key, MODEL);
        }
    }
    // Another model's vector is none.
    put_vector(buckets, "large", &image_key(1), "ViT-L/14");
    put(buckets, "cache", "clip-image-processor/readme.txt", b"x");
    put(buckets, "large", "all/readme.txt", b"x");
    put(buckets, "large", "all/empty.png", b"");
    put(buckets, "large", "other/image.png", b"x");

    for key in [
        "a b/é+&(1).JPG",
        "a b/two.webp",
        "a b/three.gif",
        "four.png",
    ] {
        put(buckets, "small", key, b"x");
    }
    put_vector(buckets, "small", "a b/two.webp", MODEL);
    put_inventory(buckets);
}

/// An inventory of the small bucket in two files.
fn put_inventory(buckets: &Path) {
    let row = |key: &str, latest: &str, size: &str| {
        format!(
            "\"small\",\"{key}\",\"\",\"{latest}\",\"false\",\"{size}\",\"2026-05-01T00:00:00.000Z\",\"{ETAG}\"\n"
        )
    };
    let one = row("a+b/%C3%A9%2B%26%281%29.JPG", "true", "1") + &row("a+b/two.webp", "true", "1");
    let two = row("four.png", "true", "1")
        + &row("a+b/three.gif", "false", "1")
        + &row("a+b/three.gif", "true", "1")
        + &row("a+b/empty.png", "true", "0");
    for (name, rows) in [("one", one), ("two", two)] {
        let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packed.write_all(rows.as_bytes()).unwrap();
        let key = format!("inv/data/{name}.csv.gz");
        put(buckets, "inventories", &key, &packed.finish().unwrap());
    }
    let manifest = |format: &str| {
        json!({
            "sourceBucket": "small",
            "destinationBucket": "arn:aws:s3:::inventories",
            "version": "2016-11-30",
            "creationTimestamp": "1777593600000",
            "fileFormat": format,
            "fileSchema": "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag",
            "files": [{"key": "inv/data/one.csv.gz", "size": 1, "MD5checksum": ""},
                      {"key": "inv/data/two.csv.gz", "size": 1, "MD5checksum": ""}],
        })
        .to_string()
    };
    put(
        buckets,
        "inventories",
        "inv/manifest.json",
        manifest("CSV").as_bytes(),
    );
    put(
        buckets,
        "inventories",
        "orc/manifest.json",
        manifest("ORC").as_bytes(),
    );
}

fn checkpoint(path: &Path) -> Value {
    fs::read(path)
        .ok()
        .and_then(|content| serde_json::from_slice(&content).ok())
        .unwrap_or(Value::Null)
}

/// Waits until the checkpoint tells of more than so many enqueued objects.
fn wait_for(path: &Path, enqueued: u64, child: &mut Child) {
    let start = Instant::now();
    while checkpoint(path)["counts"]["enqueued"].as_u64() <= Some(enqueued) {
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it was interrupted"
        );
        assert!(start.elapsed() < Duration::from_secs(60), "no progress");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn event_of(message: &Value) -> CloudEvent {
    let body = message["Body"].as_str().expect("a body");
    CloudEvent::parse(body.as_bytes()).expect("an event that the next middleware accepts")
}

#[tokio::test]
async fn the_backfill_against_an_emulated_aws() {
    let emulator = Emulator::start(fill);
    ten_thousand_keys_interrupted_twice(&emulator).await;
    a_small_bucket_with_filters(&emulator).await;
    an_inventory_instead_of_a_listing(&emulator).await;
    failures_tell_what_to_do(&emulator).await;
}

/// The first time by SIGKILL, the second time by SIGINT.
async fn ten_thousand_keys_interrupted_twice(emulator: &Emulator) {
    let queue = emulator.queue("large-input").await;
    let path = emulator.scratch("large.json");
    let arguments = |rate: &'static str| {
        let file = path.to_str().expect("a path in UTF-8").to_owned();
        [
            "backfill",
            "s3://large/all/",
            "--queue",
            &queue,
            "--cache-bucket",
            "cache",
            "--rate",
            rate,
            "--checkpoint",
            &file,
            "--json",
        ]
        .map(str::to_owned)
    };
    let start = |rate| {
        let arguments = arguments(rate);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut command = emulator.clip_ops(&arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("the program runs")
    };

    let mut first = start("2000/s");
    wait_for(&path, 2_000, &mut first);
    first.kill().unwrap();
    first.wait().unwrap();
    let killed = checkpoint(&path);
    let in_doubt: BTreeSet<&str> = ids(&killed["in-doubt"]);
    assert!(
        in_doubt.len() <= 80,
        "at most one window: {}",
        in_doubt.len()
    );
    assert_eq!(killed["complete"], false);

    let mut second = start("2000/s");
    wait_for(&path, 5_000, &mut second);
    kill_process(Pid::from_child(&second), Signal::INT).unwrap();
    let second = second.wait_with_output().unwrap();
    assert_eq!(second.status.code(), Some(130), "{}", text(&second));
    assert!(
        text(&second).contains("the same command goes on"),
        "{}",
        text(&second)
    );
    let stopped = checkpoint(&path);
    assert_eq!(
        stopped["in-doubt"],
        json!([]),
        "the window in flight was finished"
    );
    let before: BTreeSet<String> = emulator
        .messages(&queue)
        .iter()
        .map(|message| event_of(message).id)
        .collect();
    assert_eq!(stopped["counts"]["enqueued"], before.len());

    let third = start("max").wait_with_output().unwrap();
    assert_eq!(third.status.code(), Some(0), "{}", text(&third));
    let result = json(&third);
    let counts = &result["counts"];
    let embedded = IMAGES.div_ceil(EMBEDDED_EVERY);
    assert_eq!(result["outcome"], "complete");
    assert_eq!(counts["listed"], IMAGES + 2);
    assert_eq!(counts["enqueued"], IMAGES - embedded);
    assert_eq!(counts["alreadyEmbedded"], embedded);
    assert_eq!(
        (&counts["noImageByName"], &counts["tooSmall"]),
        (&json!(1), &json!(1))
    );
    assert_eq!(counts["refused"], 0);
    assert_eq!(counts["sentAgain"], in_doubt.len());

    let mut copies: BTreeMap<String, (String, usize)> = BTreeMap::new();
    for message in emulator.messages(&queue) {
        let event = event_of(&message);
        let entry = copies
            .entry(event.data.document.url)
            .or_insert((event.id, 0));
        entry.1 += 1;
    }
    let wanted: BTreeSet<String> = (0..IMAGES)
        .filter(|index| index % EMBEDDED_EVERY != 0)
        .map(|index| url("large", &image_key(index)))
        .collect();
    assert_eq!(copies.keys().cloned().collect::<BTreeSet<_>>(), wanted);
    for (url, (id, times)) in &copies {
        let allowed = if in_doubt.contains(id.as_str()) {
            1..=2
        } else {
            1..=1
        };
        assert!(allowed.contains(times), "{url} was sent {times} times");
    }

    // The file says that the work is done.
    let fourth = start("max").wait_with_output().unwrap();
    assert!(fourth.status.success(), "{}", text(&fourth));
    assert!(
        text(&fourth).contains("complete already"),
        "{}",
        text(&fourth)
    );
    let sent: usize = copies.values().map(|(_, times)| times).sum();
    assert_eq!(emulator.messages(&queue).len(), sent);
}

fn ids(list: &Value) -> BTreeSet<&str> {
    let list = list.as_array().expect("a list of ids");
    list.iter().filter_map(Value::as_str).collect()
}

async fn a_small_bucket_with_filters(emulator: &Emulator) {
    let queue = emulator.queue("small-input").await;
    let run = |more: &[&str]| {
        let common = [
            "backfill",
            "s3://small",
            "--queue",
            &queue,
            "--cache-bucket",
            "cache",
        ];
        emulator.run(&[&common, more].concat())
    };
    let dry = run(&["--dry-run", "--json"]);
    assert_eq!(json(&dry)["outcome"], "dry-run");
    assert_eq!(json(&dry)["counts"]["enqueued"], 3, "{}", text(&dry));
    assert!(emulator.messages(&queue).is_empty());

    let shown = run(&["--dry-run", "--since", "2100-01-01"]);
    let shown = text(&shown);
    assert!(
        shown.contains("0  would be enqueued") && shown.contains("4  too old"),
        "{shown}"
    );

    // Asking for each vector finds the same as listing them.
    let filtered = run(&["--types", "jpeg,webp", "--embedded-check", "head", "--json"]);
    let counts = &json(&filtered)["counts"];
    assert_eq!(
        (
            &counts["enqueued"],
            &counts["alreadyEmbedded"],
            &counts["otherType"]
        ),
        (&json!(1), &json!(1), &json!(2)),
        "{}",
        text(&filtered)
    );
    let messages = emulator.messages(&queue);
    assert_eq!(messages.len(), 1);
    let event = event_of(&messages[0]);
    let document = &event.data.document;
    assert_eq!(document.url, "s3://small/a%20b/%C3%A9%2B%26(1).JPG");
    assert_eq!(document.mime_type, "image/jpeg");
    assert_eq!(
        (document.size.clone(), document.etag.as_deref()),
        (Some(1.into()), Some(ETAG))
    );
    assert_eq!(event.data.call_stack, ["s3-event-trigger"]);
}

async fn an_inventory_instead_of_a_listing(emulator: &Emulator) {
    let queue = emulator.queue("inventory-input").await;
    let path = emulator.scratch("inventory.json");
    let file = path.to_str().expect("a path in UTF-8");
    let manifest = "s3://inventories/inv/manifest.json";
    let arguments = [
        "backfill",
        "s3://small",
        "--queue",
        &queue,
        "--cache-bucket",
        "cache",
        "--manifest",
        manifest,
        "--rate",
        "1/s",
        "--checkpoint",
        file,
        "--json",
    ];
    let mut first = emulator.clip_ops(&arguments);
    let mut first = first
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for(&path, 0, &mut first);
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(
        checkpoint(&path)["position"]["row"].is_object(),
        "{}",
        checkpoint(&path)
    );

    let second = emulator.run(&arguments);
    let counts = &json(&second)["counts"];
    assert_eq!(
        (
            &counts["listed"],
            &counts["enqueued"],
            &counts["alreadyEmbedded"]
        ),
        (&json!(6), &json!(3), &json!(1)),
        "{}",
        text(&second)
    );
    assert_eq!(
        (&counts["notCurrent"], &counts["tooSmall"]),
        (&json!(1), &json!(1))
    );
    let urls: BTreeSet<String> = emulator
        .messages(&queue)
        .iter()
        .map(|message| event_of(message).data.document.url)
        .collect();
    let expected = ["a b/é+&(1).JPG", "a b/three.gif", "four.png"];
    assert_eq!(urls, expected.map(|key| url("small", key)).into());
}

async fn failures_tell_what_to_do(emulator: &Emulator) {
    let queue = emulator.queue("untouched").await;
    let path = emulator.scratch("other.json");
    let file = path.to_str().expect("a path in UTF-8");
    let run = |source: &str, more: &[&str]| {
        let common = [
            "backfill",
            source,
            "--queue",
            &queue,
            "--cache-bucket",
            "cache",
        ];
        emulator.run(&[&common, more].concat())
    };
    let orc = run(
        "s3://small",
        &["--manifest", "s3://inventories/orc/manifest.json"],
    );
    assert_eq!(orc.status.code(), Some(1));
    assert!(
        text(&orc).contains("ORC, and only CSV is read"),
        "{}",
        text(&orc)
    );

    let nowhere = run("s3://no-such-bucket", &[]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(
        text(&nowhere).contains("NoSuchBucket"),
        "{}",
        text(&nowhere)
    );

    assert!(
        run("s3://small/none/", &["--checkpoint", file])
            .status
            .success()
    );
    let other = run(
        "s3://small/none/",
        &["--checkpoint", file, "--model", "ViT-L/14"],
    );
    assert_eq!(other.status.code(), Some(1));
    assert!(
        text(&other).contains("different job: model was"),
        "{}",
        text(&other)
    );

    let wrong = run("small", &[]);
    assert_eq!(wrong.status.code(), Some(2), "{}", text(&wrong));
    assert!(emulator.messages(&queue).is_empty());
}
