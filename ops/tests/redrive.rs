//! The redrive against an emulated AWS: the real program.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{Emulator, json, text};
use delivery::{DeadLetters, Rejection};
use serde_json::{Value, json};

/// More than one receive brings.
const DENIED: usize = 23;

fn body(index: usize) -> String {
    format!(
        r#"{{ "type": "document-created", "data": {{"chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
        "source": {{"url": "s3://b/{index}.png", "type": "image/png"}},
        "document": {{"url": "s3://b/{index}.png", "type": "image/png"}}}} }}"#
    )
}

fn rejection(index: usize, reason: &str) -> Rejection {
    Rejection {
        stage: "download".to_owned(),
        reason: reason.to_owned(),
        by: "gpu-task".to_owned(),
        object: Some(format!("s3://b/{index}.png")),
        event: None,
    }
}

/// Rejected messages as the programs of this pipeline write them, one that
/// SQS moved by itself, and one whose body was cut.
async fn fill(emulator: &Emulator, dead_letters: &str) {
    let mut rejected: Vec<(String, Rejection)> = (0..DENIED)
        .map(|index| (body(index), rejection(index, "GetObject: AccessDenied")))
        .collect();
    rejected.push((body(100), rejection(100, "not a PNG: truncated")));
    rejected.push(("x".repeat(300_000), rejection(101, "not JSON")));
    let queue = DeadLetters::new(&emulator.sdk(), dead_letters);
    for result in queue.reject_all(&rejected).await {
        result.expect("the rejection is taken");
    }
    let sqs = aws_sdk_sqs::Client::new(&emulator.sdk());
    let moved = sqs
        .send_message()
        .queue_url(dead_letters)
        .message_body(body(102));
    moved.send().await.expect("a message");
}

fn bodies(messages: &[Value]) -> BTreeSet<String> {
    let body = |message: &Value| message["Body"].as_str().map(str::to_owned);
    messages.iter().filter_map(body).collect()
}

#[tokio::test]
async fn the_redrive_against_an_emulated_aws() {
    let emulator = Emulator::start(|_| ());
    let dead_letters = emulator.queue("dead").await;
    let input = emulator.queue("input").await;
    fill(&emulator, &dead_letters).await;
    let total = DENIED + 3;
    let run = |more: &[&str]| {
        let common = [
            "redrive",
            "--dead-letter-queue",
            &dead_letters,
            "--queue",
            &input,
        ];
        emulator.run(&[&common, more].concat())
    };

    // Showing consumes nothing, and everything is visible again at once.
    for _ in 0..2 {
        let shown = run(&["--json"]);
        let result = json(&shown);
        assert_eq!(result["counts"]["seen"], total, "{}", text(&shown));
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for message in result["messages"].as_array().expect("messages") {
            *reasons
                .entry(message["reason"].as_str().expect("a reason"))
                .or_default() += 1;
            assert!(message["ageSeconds"].is_u64() && message["receiveCount"].is_u64());
        }
        assert_eq!(reasons["GetObject: AccessDenied"], DENIED);
        assert_eq!(reasons.len(), 4, "{reasons:?}");
        let stored = emulator.messages(&dead_letters);
        assert_eq!(stored.len(), total);
        assert!(stored.iter().all(|message| message["IsVisible"] == true));
    }
    let table = text(&run(&["--list", "--limit", "3"]));
    assert!(
        table.contains("REASON") && table.contains("3 chosen"),
        "{table}"
    );
    let moved = text(&run(&["--reason", "moved here by SQS", "--dry-run"]));
    assert!(
        moved.contains("s3://b/102.png") && moved.contains("1 chosen"),
        "{moved}"
    );

    // Chosen by reason: their bodies go back as they were, without attributes.
    let sent = run(&["--reason", "Access(Denied)?$"]);
    assert!(sent.status.success(), "{}", text(&sent));
    assert!(
        text(&sent).contains(&format!("{DENIED} sent back")),
        "{}",
        text(&sent)
    );
    let arrived = emulator.messages(&input);
    assert_eq!(arrived.len(), DENIED);
    assert_eq!(bodies(&arrived), (0..DENIED).map(body).collect());
    assert!(
        arrived
            .iter()
            .all(|message| message["MessageAttributes"] == json!({}))
    );
    assert_eq!(emulator.messages(&dead_letters).len(), 3);

    // Chosen by id.
    let rest = json(&run(&["--json"]));
    let truncated = rest["messages"]
        .as_array()
        .and_then(|all| {
            all.iter()
                .find(|one| one["reason"] == "not a PNG: truncated")
        })
        .expect("it stays");
    let id = truncated["id"].as_str().expect("an id");
    assert!(run(&["--ids", id]).status.success());
    assert!(bodies(&emulator.messages(&input)).contains(&body(100)));

    // A cut body stays; the one that SQS moved goes.
    let all = run(&["--all"]);
    assert!(
        text(&all).contains("1 sent back, 1 stay, their body is cut"),
        "{}",
        text(&all)
    );
    let left = emulator.messages(&dead_letters);
    assert_eq!(left.len(), 1);
    assert!(left[0]["MessageAttributes"]["RejectionReason"].is_object());

    // Discarding needs a yes.
    let refused = run(&["--all", "--delete"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert_eq!(emulator.messages(&dead_letters).len(), 1);
    assert!(run(&["--all", "--delete", "--yes"]).status.success());
    assert!(emulator.messages(&dead_letters).is_empty());
    assert_eq!(emulator.messages(&input).len(), DENIED + 2);

    let nowhere = format!("{dead_letters}-gone");
    let failed = emulator.run(&["redrive", "--dead-letter-queue", &nowhere]);
    assert_eq!(failed.status.code(), Some(1), "{}", text(&failed));
    assert!(
        text(&failed).contains("NonExistentQueue"),
        "{}",
        text(&failed)
    );
}
