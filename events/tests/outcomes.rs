//! What becomes of an input: `outcomes.txt` has, for every sample and every mutation of it, whether it
//! is accepted and what is written, before the differences from Lakechain were mended (commit
//! 596becd) and, after `>`, since then. `make-outcomes.sh` makes it.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use events::{CloudEvent, Embedding, Item, S3Url, deliveries};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// Where an outcome may differ from before, and why.
const MENDED: &[(&str, &str)] = &[
    (" = \"s3://src/t/q.png?", "a query is no part of a key"),
    (" = \"s3://src/t/q.png#", "a fragment is no part of a key"),
    (" = \"s3://src/k?", "so this key is too short"),
    (" = \"S3://", "a scheme has no case"),
    (" = \"HTTPS://", "a scheme has no case"),
    (" = \" s3://", "blanks around a URL are none of it"),
    ("/data/document = [", "an array is no object"),
    ("/data/metadata/properties = [", "an array is no object"),
    ("cloudevent-created /data/metadata", "an array is no object"),
    ("cloudevent-deleted /data/metadata", "an array is no object"),
    ("output-cloudevent /data/metadata", "an array is no object"),
    ("full /data/metadata\t", "an array is no object"),
    ("/metadata/createdAt", "a text"),
    ("/metadata/updatedAt", "a text"),
    ("/metadata/image", "a URL"),
    ("/metadata/publisher", "a name, and perhaps URLs"),
    ("/metadata/ontology", "a URL that can be read"),
];

/// Replacements of every value of every sample; the first takes it away.
const REPLACEMENTS: [Option<&str>; 6] = [
    None,
    Some("null"),
    Some("[]"),
    Some("{}"),
    Some("\"x\""),
    Some("7"),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests")
}

/// An event with everything that it may have.
fn full() -> Value {
    let document =
        json!({"url": "s3://bucket/a%20b.png", "type": "image/png", "size": 1, "etag": "e"});
    json!({
        "specversion": "1.0", "id": "1", "type": "document-created", "time": "2023-10-22T13:19:10.657Z",
        "data": {
            "chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
            "source": document, "document": document, "callStack": ["a"], "more": 1,
            "metadata": {
                "type": "photo", "createdAt": "2023", "updatedAt": "2024", "image": "https://a/b",
                "authors": ["a"], "publisher": {"type": "t", "name": "n", "url": "https://a", "logo": "https://b"},
                "title": "t", "description": "d", "keywords": ["k"], "topics": ["t"], "rating": 3,
                "language": "en", "ontology": "s3://bucket/graph", "custom": {"a": {"b": 1}},
                "properties": {"kind": "image", "attrs": {
                    "dimensions": {"width": 1, "height": 2}, "custom": {"c": 1},
                    "embeddings": {"vectors": "s3://b/old", "model": "m", "dimensions": 1},
                }},
            },
        },
    })
}

/// Values at a place of the whole event, each with an outcome that no replacement shows.
fn particular() -> Vec<(&'static str, Value)> {
    let url = "/data/document/url";
    let mut all: Vec<(&str, Value)> = [
        "s3://src/t/q.png?x=1",
        "s3://src/t/q.png#f",
        "s3://src/t/q%3Fx.png",
        "s3://src/a/../q.png",
        "S3://src/t/q.png",
        " s3://src/t/q.png",
        "HTTPS://host/q.png",
        "https://host/q.png?x=1",
        "http://host/q.png",
        "https:///q.png",
        "s3://src/k",
        "s3://src/k?x=1",
        "s3:///q.png",
        "s3://src/%ff.png",
    ]
    .into_iter()
    .map(|text| (url, json!(text)))
    .collect();
    let metadata = |name: &'static str, value: Value| (name, value);
    all.extend([
        metadata(
            "/data/metadata/publisher",
            json!({"name": "n", "url": "no url"}),
        ),
        metadata(
            "/data/metadata/publisher",
            json!({"name": "n", "type": null}),
        ),
        metadata(
            "/data/metadata/publisher",
            json!({"name": "n", "colour": "red"}),
        ),
        metadata("/data/metadata/publisher", json!(["n"])),
        metadata("/data/metadata/image", json!("data:image/png;base64,AA")),
        metadata("/data/metadata/ontology", json!("https://host/graph")),
        metadata("/data/metadata/ontology", json!("ftp://host/graph")),
        metadata("/data/metadata/rating", json!(5.5)),
        metadata("/data/metadata/colour", json!("red")),
        metadata("/data/metadata/properties", json!(["image", {}])),
        metadata("/data/metadata/properties/attrs/stats", json!([])),
        metadata("/data/document", json!(["s3://bucket/ab.png", "image/png"])),
        metadata("/data/chainId", json!("6ebf76e4f70c440c98f93e3e7eb34c79")),
        metadata("/source", json!("s3")),
    ]);
    all
}

fn digest(written: &Value) -> String {
    let digest = Sha256::digest(written.to_string());
    format!("{:02x}{:02x}", digest[0], digest[1])
}

/// `R`ejected, i`X`ejected object, `I`gnored, `O`bject or `E`vent, and a digest of what is written of it.
fn outcome(payload: &Value) -> String {
    let text = payload.to_string();
    let mut outcome = String::new();
    for delivery in deliveries(payload) {
        let Ok(items) = delivery.items else {
            outcome.push('R');
            continue;
        };
        for item in items {
            outcome += &match item {
                Item::Object(object) => {
                    let event = object.to_event(events::ImageType::Png).data;
                    let told = json!([
                        event.source,
                        event.document,
                        event.metadata,
                        object.version_id
                    ]);
                    format!(
                        "O{}",
                        digest(&json!([object.url.to_string(), object.kind, told]))
                    )
                }
                Item::Event(event) => format!("E{}", digest(&written(*event, &text))),
                Item::Rejected { .. } => "X".to_owned(),
                Item::Ignored { .. } => "I".to_owned(),
            };
        }
    }
    if outcome.is_empty() {
        "-".to_owned()
    } else {
        outcome
    }
}

fn written(mut event: CloudEvent, text: &str) -> Value {
    for fresh in [&mut event.id, &mut event.time] {
        if !text.contains(fresh.as_str()) {
            *fresh = "fresh".to_owned();
        }
    }
    let key = event.data.document.url.parse::<S3Url>().map(|url| url.key);
    let embedding = Embedding {
        vectors: "s3://cache/clip-image-processor/0.json".to_owned(),
        model: "ViT-B/32".to_owned(),
        dimensions: 512,
    };
    let output = event
        .clone()
        .with_embedding(&embedding, &["cat".to_owned()], Map::new());
    json!([
        event.to_json(),
        output.to_json(),
        output.to_standard(),
        key.ok()
    ])
}

fn pointers(value: &Value, at: String, all: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (name, one) in map {
                pointers(one, format!("{at}/{name}"), all);
            }
        }
        Value::Array(list) => {
            for (index, one) in list.iter().enumerate() {
                pointers(one, format!("{at}/{index}"), all);
            }
        }
        _ => {}
    }
    if !at.is_empty() {
        all.push(at);
    }
}

fn replaced(value: &Value, pointer: &str, by: Option<Value>) -> Value {
    let mut value = value.clone();
    let (parent, name) = pointer.rsplit_once('/').unwrap();
    match (value.pointer_mut(parent).unwrap(), by) {
        (Value::Array(list), None) => drop(list.remove(name.parse().unwrap())),
        (Value::Array(list), Some(by)) => list[name.parse::<usize>().unwrap()] = by,
        (parent, Some(by)) => parent[name] = by,
        (parent, None) => drop(parent.as_object_mut().unwrap().remove(name)),
    }
    value
}

/// A case and its outcomes for each line.
fn table() -> Vec<(String, Vec<String>)> {
    let mut samples = vec![("full".to_owned(), full())];
    for entry in fs::read_dir(folder().join("../samples")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        samples.push((
            name,
            serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap(),
        ));
    }
    samples.sort_by(|one, other| one.0.cmp(&other.0));
    let mut rows = Vec::new();
    for (name, sample) in &samples {
        rows.push((name.clone(), vec![outcome(sample)]));
        let mut all = Vec::new();
        pointers(sample, String::new(), &mut all);
        for pointer in all {
            let outcomes = REPLACEMENTS.iter().map(|by| {
                let by = by.map(|text| serde_json::from_str(text).unwrap());
                outcome(&replaced(sample, &pointer, by))
            });
            rows.push((format!("{name} {pointer}"), outcomes.collect()));
        }
    }
    for (pointer, value) in particular() {
        let event = replaced(&full(), pointer, Some(value.clone()));
        rows.push((format!("full {pointer} = {value}"), vec![outcome(&event)]));
    }
    rows
}

#[test]
fn what_was_accepted_rejected_and_written_stays_so_but_for_what_is_mended() {
    let path = folder().join("outcomes.txt");
    let mut now = String::new();
    if let Some(before) = std::env::var_os("OUTCOMES_BEFORE") {
        for (case, outcomes) in table() {
            writeln!(now, "{case}\t{}", outcomes.join(" ")).unwrap();
        }
        fs::write(before, now).unwrap();
        return;
    }
    let known = fs::read_to_string(&path).unwrap();
    let rows = table();
    assert_eq!(known.lines().count(), rows.len(), "run make-outcomes.sh");
    let mut unmended = Vec::new();
    let mut unused: Vec<&str> = MENDED.iter().map(|(case, _)| *case).collect();
    for (line, (case, outcomes)) in known.lines().zip(rows) {
        let (name, cells) = line.split_once('\t').unwrap();
        assert_eq!(name, case, "run make-outcomes.sh");
        let mut differs = false;
        let merged: Vec<String> = cells
            .split(' ')
            .zip(outcomes)
            .map(|(cell, after)| {
                let before = cell.split('>').next().unwrap();
                differs |= before != after;
                if before == after {
                    after
                } else {
                    format!("{before}>{after}")
                }
            })
            .collect();
        if differs {
            let is_mended = MENDED
                .iter()
                .any(|(place, _)| format!("{case}\t").contains(place));
            unmended.extend((!is_mended).then(|| format!("{case}: {}", merged.join(" "))));
            unused.retain(|place| !format!("{case}\t").contains(place));
        }
        writeln!(now, "{case}\t{}", merged.join(" ")).unwrap();
    }
    assert!(unmended.is_empty(), "{}", unmended.join("\n"));
    assert!(unused.is_empty(), "nothing differs at {unused:?}");
    if std::env::var_os("OUTCOMES_AFTER").is_some() {
        fs::write(&path, &now).unwrap();
    }
    let is_known = now == known || std::env::var_os("OUTCOMES_AFTER").is_some();
    assert!(is_known, "the table is old: run make-outcomes.sh");
}
