//! Every sample in `events/samples` is read as what its name says.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use events::{CloudEvent, Embedding, EventType, Item, S3Url, deliveries};
use serde_json::{Map, Value};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("samples")
}

fn sample(name: &str) -> Value {
    let path = folder().join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

fn items(name: &str) -> Vec<Item> {
    let mut items = Vec::new();
    for delivery in deliveries(&sample(name)) {
        items.extend(
            delivery
                .items
                .unwrap_or_else(|error| panic!("{name}: {error}")),
        );
    }
    items
}

#[test]
fn a_created_object_is_the_same_work_in_every_arriving_form() {
    for name in [
        "s3-created",
        "s3-created-sqs",
        "s3-created-sns",
        "s3-created-sns-sqs",
        "s3-created-sns-sqs-raw",
        "eventbridge-created",
        "eventbridge-created-sqs",
        "pipe-sqs",
    ] {
        let items = items(name);
        let [Item::Object(object)] = items.as_slice() else {
            panic!("{name}: one object expected, not {items:?}");
        };
        assert_eq!(object.kind, EventType::DocumentCreated, "{name}");
        assert_eq!(
            object.url,
            S3Url::new("source-bucket", "holiday/my photo+é&(1).png"),
            "{name}"
        );
        assert_eq!(object.size, Some(245_328), "{name}");
        assert_eq!(
            object.etag.as_deref(),
            Some("1243cbd6cf145453c8b5519a2ada4779"),
            "{name}"
        );
    }
}

#[test]
fn a_deleted_object_is_a_deletion_in_every_arriving_form() {
    for name in ["s3-deleted", "eventbridge-deleted"] {
        let items = items(name);
        let [Item::Object(object)] = items.as_slice() else {
            panic!("{name}: one object expected, not {items:?}");
        };
        assert_eq!(object.kind, EventType::DocumentDeleted, "{name}");
        assert_eq!(
            object.url,
            S3Url::new("source-bucket", "holiday/beach.jpg"),
            "{name}"
        );
    }
}

#[test]
fn a_cloudevent_of_another_middleware_passes_as_it_is() {
    for (name, kind) in [
        ("cloudevent-created", EventType::DocumentCreated),
        ("cloudevent-created-sqs", EventType::DocumentCreated),
        ("cloudevent-deleted", EventType::DocumentDeleted),
    ] {
        let items = items(name);
        let [Item::Event(event)] = items.as_slice() else {
            panic!("{name}: one event expected, not {items:?}");
        };
        assert_eq!(event.kind, kind, "{name}");
        assert_eq!(event.id, "1780d5de-fd6f-4530-98d7-82ebee85ea39", "{name}");
    }
}

#[test]
fn the_test_event_that_s3_sends_is_no_work() {
    let items = items("s3-test-event");
    assert!(
        matches!(items.as_slice(), [Item::Ignored { .. }]),
        "{items:?}"
    );
}

#[test]
fn one_bad_record_of_a_batch_leaves_the_others_alone() {
    let outcomes: Vec<bool> = deliveries(&sample("mixed-sqs"))
        .iter()
        .map(|delivery| delivery.items.is_ok())
        .collect();
    assert_eq!(outcomes, [true, false, true]);
}

#[test]
fn the_enriched_event_equals_the_product_pages_example() {
    let input = CloudEvent::from_value(sample("cloudevent-created")).unwrap();
    let embedding = Embedding {
        vectors: "s3://cache-storage/clip-image-processor/45a42b35c3225085.json".to_owned(),
        model: "ViT-B/32".to_owned(),
        dimensions: 512,
    };
    let output = input.with_embedding(&embedding, &[], Map::new());
    assert_eq!(
        serde_json::to_value(&output).unwrap(),
        sample("output-cloudevent")
    );
    assert_eq!(output.to_standard(), sample("output-standard"));
}

#[test]
fn every_sample_is_read_by_a_test() {
    let tested = include_str!("samples.rs");
    let untested: BTreeSet<String> = fs::read_dir(folder())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| path.file_stem().unwrap().to_string_lossy().into_owned())
        .filter(|name| !tested.contains(&format!("\"{name}\"")))
        .collect();
    assert!(untested.is_empty(), "no test reads {untested:?}");
}
