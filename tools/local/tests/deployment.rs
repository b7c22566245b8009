//! The deployment of `infra/template.yaml`: needs `LOCAL_MINISTACK`, and the
//! functions' programs in the target folder.
//!
//! The task's program is a script here, since these tests are about what
//! surrounds it; the whole pipeline with the real one is tested in `tests/`.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use local::{
    Deployment, DeploymentOptions,
    cloud::{TaskStatus, Timings},
    deployment::WayIn,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const SHORT: Duration = Duration::from_secs(30);

/// The scaler's promise for an instance whose grace had not passed when its
/// task ended: the one-minute schedule gives it back.
const BACK_AT_ZERO: Duration = Duration::from_secs(90);

fn script(folder: &Path, text: &str) -> PathBuf {
    let path = folder.join("stand-in-task");
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).expect("a script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("executable");
    path
}

fn options(folder: &TempDir, task: &str) -> DeploymentOptions {
    let mut options = DeploymentOptions::new(folder.path(), &folder.path().join("work"))
        .expect("LOCAL_MINISTACK is set");
    options.programs.gpu_task = script(folder.path(), task);
    options.timings = Timings {
        instance_launch: Duration::from_millis(200),
        ..Timings::fast()
    };
    options
}

async fn until<T, F: Future<Output = Option<T>>>(what: &str, mut look: impl FnMut() -> F) -> T {
    let started = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(started.elapsed() < SHORT, "not within {SHORT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// The smallest PNG: one transparent pixel.
const PNG: &[u8] = &[
    0x89, 0x50, 0x4E, 0x47, 0x0D, 0x0A, 0x1A, 0x0A, 0, 0, 0, 0x0D, 0x49, 0x48, 0x44, 0x52, 0, 0, 0,
    1, 0, 0, 0, 1, 8, 6, 0, 0, 0, 0x1F, 0x15, 0xC4, 0x89, 0, 0, 0, 0x0D, 0x49, 0x44, 0x41, 0x54,
    0x78, 0x9C, 0x63, 0, 1, 0, 0, 5, 0, 1, 0x0D, 0x0A, 0x2D, 0xB4, 0, 0, 0, 0, 0x49, 0x45, 0x4E,
    0x44, 0xAE, 0x42, 0x60, 0x82,
];

#[tokio::test]
async fn an_upload_becomes_work_and_the_scaler_starts_a_task_for_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = Deployment::start(&options(
        &folder,
        "env; while [ ! -e \"$0.done\" ]; do sleep 0.05; done",
    ))
    .await
    .expect("deployed");
    let input = pipeline.input_queue_url();
    pipeline
        .upload("a/my photo+é&(1).png", PNG.to_vec(), Some("image/png"))
        .await
        .expect("uploaded");
    let task = until("a running task", || async {
        pipeline
            .cloud
            .snapshot()
            .tasks
            .into_iter()
            .find(|task| task.status == TaskStatus::Running)
    })
    .await;
    assert_eq!(
        pipeline.queue_counts(&input).await.expect("counts").total(),
        1
    );
    assert_eq!(
        pipeline.cloud.snapshot().peak_instances,
        1,
        "one instance for one image"
    );

    let environment = until("the task's output", || async {
        let text = fs::read_to_string(&task.log).unwrap_or_default();
        text.contains("MODEL_PATH").then_some(text)
    })
    .await;
    for line in [
        format!("INPUT_QUEUE_URL={input}"),
        format!("CACHE_BUCKET={}", pipeline.cache_bucket()),
        format!("AWS_ENDPOINT_URL={}", pipeline.emulator.endpoint()),
        format!("MODEL_PATH={}", folder.path().display()),
        "EXECUTION_PROVIDER=cpu".to_owned(),
        "OUTPUT_TOPIC_ARN=arn:aws:sns:us-east-1:000000000000:clip-OutputTopic".to_owned(),
    ] {
        assert!(
            environment.lines().any(|one| one == line),
            "{line} is not in:\n{environment}"
        );
    }
    let message = pipeline
        .sqs
        .receive_message()
        .queue_url(&input)
        .send()
        .await
        .expect("a message");
    let event: Value =
        serde_json::from_str(message.messages()[0].body().expect("a body")).expect("JSON");
    assert_eq!(
        event["data"]["document"]["url"],
        json!("s3://clip-source/a/my%20photo%2B%C3%A9%26(1).png")
    );

    // When its task has found nothing more to do, the cluster goes back to zero.
    pipeline
        .sqs
        .purge_queue()
        .queue_url(&input)
        .send()
        .await
        .expect("purged");
    fs::write(folder.path().join("stand-in-task.done"), "").expect("a file");
    assert!(
        pipeline.until_idle(BACK_AT_ZERO).await.expect("counts"),
        "{:#?}",
        pipeline.cloud.snapshot()
    );

    let lines = pipeline
        .function_logs("ScalerFunction")
        .await
        .expect("logs");
    assert!(
        lines
            .iter()
            .filter_map(local::deployment::LogLine::json)
            .count()
            > 0,
        "the scaler's lines are JSON"
    );
    pipeline.stop().await;
}

#[tokio::test]
async fn what_is_no_image_is_rejected_with_its_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut options = options(&folder, "exit 0");
    options.way_in = WayIn::EventBridge;
    let pipeline = Deployment::start(&options).await.expect("deployed");
    pipeline
        .upload("lie.jpg", b"just text".to_vec(), Some("image/jpeg"))
        .await
        .expect("uploaded");
    let rejection = until("a rejection", || async {
        pipeline
            .take_rejections()
            .await
            .expect("messages")
            .into_iter()
            .next()
    })
    .await;
    assert_eq!(rejection.by.as_deref(), Some("intake"));
    assert!(
        rejection
            .reason
            .as_deref()
            .is_some_and(|reason| reason.contains("image/jpeg")),
        "{rejection:?}"
    );
    assert_eq!(
        rejection.object.as_deref(),
        Some("s3://clip-source/lie.jpg")
    );
    assert_eq!(
        pipeline.cloud.snapshot().instances.len(),
        0,
        "no instance for it"
    );
    pipeline.stop().await;
}

#[tokio::test]
async fn the_next_middleware_sees_embeddings_only() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = Deployment::start(&options(&folder, "exit 0"))
        .await
        .expect("deployed");
    let topic = "arn:aws:sns:us-east-1:000000000000:clip-OutputTopic";
    let embedded = json!({"type": "document-created", "data": {"metadata": {"properties": {"attrs": {"embeddings": {"vectors": "s3://b/k"}}}}}});
    for event in [
        json!({"type": "document-created", "data": {}}),
        embedded.clone(),
    ] {
        pipeline
            .sns
            .publish()
            .topic_arn(topic)
            .message(event.to_string())
            .send()
            .await
            .expect("published");
    }
    let events = until("an event", || async {
        let events = pipeline.take_events().await.expect("messages");
        (!events.is_empty()).then_some(events)
    })
    .await;
    assert_eq!(events, [embedded]);
    pipeline.stop().await;
}

#[tokio::test]
async fn the_queues_have_the_attributes_of_the_template() {
    let folder = tempfile::tempdir().expect("a folder");
    let options = options(&folder, "exit 0")
        .parameter("VisibilityTimeoutSeconds", 240)
        .parameter("RetentionDays", 7);
    let pipeline = Deployment::start(&options).await.expect("deployed");
    let all = aws_sdk_sqs::types::QueueAttributeName::All;
    let attributes = pipeline
        .sqs
        .get_queue_attributes()
        .queue_url(pipeline.input_queue_url())
        .attribute_names(all)
        .send()
        .await
        .expect("attributes");
    let get = |name: &str| {
        attributes
            .attributes()
            .and_then(|all| all.get(&name.into()))
            .cloned()
            .unwrap_or_default()
    };
    assert_eq!(get("VisibilityTimeout"), "240");
    assert_eq!(get("MessageRetentionPeriod"), "604800");
    assert_eq!(get("ReceiveMessageWaitTimeSeconds"), "20");
    let redrive: Value = serde_json::from_str(&get("RedrivePolicy")).expect("JSON");
    assert_eq!(
        redrive["deadLetterTargetArn"],
        json!("arn:aws:sqs:us-east-1:000000000000:clip-DeadLetterQueue")
    );
    pipeline.stop().await;
}

#[tokio::test]
async fn stopping_leaves_no_process() {
    let folder = tempfile::tempdir().expect("a folder");
    let pipeline = Deployment::start(&options(&folder, "exec sleep 600"))
        .await
        .expect("deployed");
    pipeline
        .upload("one.png", PNG.to_vec(), None)
        .await
        .expect("uploaded");
    until("a running task", || async {
        let tasks = pipeline.cloud.snapshot().tasks;
        tasks.iter().find_map(|task| task.pid)
    })
    .await;
    let endpoint = pipeline.emulator.endpoint().to_owned();
    let before = processes_with(&endpoint);
    assert!(
        ["sleep", "intake", "scaler", "ministack"]
            .iter()
            .all(|name| before.iter().any(|line| line.contains(name))),
        "emulator, warm functions and a task: {before:?}"
    );
    pipeline.stop().await;
    assert_eq!(processes_with(&endpoint), Vec::<String>::new());
}

/// Command lines of the processes that have this endpoint in their environment.
fn processes_with(endpoint: &str) -> Vec<String> {
    let variable = format!("AWS_ENDPOINT_URL={endpoint}\0");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if String::from_utf8_lossy(&environment).contains(&variable) {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            found.push(String::from_utf8_lossy(&line).replace('\0', " "));
        }
    }
    found
}
