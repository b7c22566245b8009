//! The whole pipeline, seen from outside: objects go into S3, CloudEvents come
//! out of a queue that is subscribed to the output topic.
//!
//! The emulator's address is `LOCAL_MINISTACK`, ONNX Runtime's `ORT_DYLIB_PATH`;
//! `cargo xtask test` installs both and sets them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use local::cloud::{Task, TaskStatus};
use local::deployment::{SOURCE_BUCKET, WayIn, local_parameters};
use pipeline_tests::{
    PATIENCE, Pipeline, bmp, by_document, cdk_package, check_contract, check_with_sdk, samples,
    signal, vector_url,
};
use serde_json::{Value, json};

const SOURCE: &str = "s3://clip-source";

#[tokio::test(flavor = "multi_thread")]
async fn images_put_into_s3_come_out_as_events_with_vectors_and_the_cluster_is_back_at_zero() {
    let pipeline = Pipeline::start(|options| options).await.unwrap();
    let mut images: BTreeMap<String, Vec<u8>> = samples().into_iter().collect();
    images.insert("a folder/my photo+é&(1).bmp".to_owned(), bmp(1, 300));
    for (key, content) in &images {
        pipeline
            .deployment
            .upload(key, content.clone(), None)
            .await
            .unwrap();
    }

    let events = pipeline.events_of(images.len()).await.unwrap();

    check_with_sdk(&events.iter().collect::<Vec<_>>()).unwrap();
    let documents = by_document(&events);
    for key in images.keys() {
        let url = events::S3Url::new(SOURCE_BUCKET, key).to_string();
        let event = documents
            .get(&url)
            .unwrap_or_else(|| panic!("no event for {url}"))[0];
        check_contract(event).unwrap();
        assert_eq!(event["type"], "document-created");
        assert_eq!(
            event["data"]["callStack"],
            json!(["clip-image-processor", "s3-event-trigger"])
        );
        assert_eq!(event["data"]["source"], event["data"]["document"]);
        let vector = pipeline.vector(event).await.unwrap();
        assert_eq!(vector.len(), 32);
        assert!(vector.iter().any(|value| *value != 0.0));
        let keywords = event["data"]["metadata"]["keywords"].as_array().unwrap();
        assert_eq!(keywords.len(), 5, "{keywords:?}");
    }
    let vectors: BTreeSet<Vec<u32>> = {
        let mut all = BTreeSet::new();
        for event in documents.values() {
            let vector = pipeline.vector(event[0]).await.unwrap();
            all.insert(vector.iter().map(|value| value.to_bits()).collect());
        }
        all
    };
    assert_eq!(
        vectors.len(),
        images.len(),
        "every image has a vector of its own"
    );
    pipeline.back_at_zero().await.unwrap();
    let snapshot = pipeline.deployment.cloud.snapshot();
    assert_eq!(
        snapshot.peak_instances, 1,
        "so few images need one instance"
    );
    assert!(snapshot.tasks.iter().all(|task| task.exit_code == Some(0)));
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_through_the_pipeline_that_cdk_synthesises() {
    let Some(template) = cdk_template() else {
        return;
    };
    let pipeline = Pipeline::start(|mut options| {
        options.template = template.path().to_owned();
        options
    })
    .await
    .unwrap();
    // As CDK writes them, and none of its own.
    let functions = pipeline.deployment.lambda.list_functions().send();
    let functions = functions.await.unwrap().functions.unwrap_or_default();
    assert_eq!(functions.len(), 2, "{functions:?}");
    let serverless = "AWS::Serverless::Function";
    assert_eq!(pipeline.deployment.stack.of_type(serverless).count(), 0);

    pipeline
        .deployment
        .upload("image.bmp", bmp(1, 300), None)
        .await
        .unwrap();
    let events = pipeline.events_of(1).await.unwrap();

    check_contract(&events[0]).unwrap();
    let document = &events[0]["data"]["document"]["url"];
    assert_eq!(*document, format!("{SOURCE}/image.bmp"));
    assert_eq!(pipeline.vector(&events[0]).await.unwrap().len(), 32);
    pipeline.back_at_zero().await.unwrap();
    pipeline.stop().await;
}

/// The template of a stack with the CDK construct, for one machine.
fn cdk_template() -> Option<tempfile::NamedTempFile> {
    let package = cdk_package("the pipeline that CDK synthesises")?;
    let mut parameters = local_parameters();
    parameters.insert("SourceEvents".to_owned(), "None".to_owned());
    // The construct takes numbers as such.
    let parameters: BTreeMap<String, Value> = parameters
        .into_iter()
        .map(|(name, value)| match value.parse::<u64>() {
            Ok(number) => (name, json!(number)),
            Err(_) => (name, json!(value)),
        })
        .collect();
    let template = tempfile::NamedTempFile::new().unwrap();
    let synthesis = Command::new("npm")
        .current_dir(package)
        .args(["run", "--silent", "synth:example", "--", "pipeline"])
        .arg(json!(parameters).to_string())
        .stdout(template.reopen().unwrap())
        .status()
        .unwrap();
    assert!(synthesis.success(), "{synthesis}");
    Some(template)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_killed_in_mid_batch_loses_nothing() {
    const IMAGES: u32 = 60;
    let pipeline = Pipeline::start(|mut options| {
        // The template's least visibility timeout is minutes, and this test is
        // about what comes back, not about how long that takes.
        let seconds = "10".to_owned();
        options
            .task_environment
            .insert("VISIBILITY_TIMEOUT_SECONDS".to_owned(), seconds);
        options.parameter("MaxInstances", 1)
    })
    .await
    .unwrap();
    for seed in 0..IMAGES {
        let key = format!("image-{seed:03}.bmp");
        pipeline
            .deployment
            .upload(&key, bmp(seed, 320), None)
            .await
            .unwrap();
    }
    let task = in_mid_work(&pipeline).await;
    assert!(pipeline.deployment.cloud.kill_task(&task.id));

    let events = pipeline.events_of(IMAGES as usize).await.unwrap();
    pipeline.back_at_zero().await.unwrap();

    let mut all = events;
    all.extend(pipeline.deployment.take_events().await.unwrap());
    let documents = by_document(&all);
    assert_eq!(
        documents.len(),
        IMAGES as usize,
        "at least one event for each image"
    );
    let named: BTreeSet<String> = all
        .iter()
        .map(|event| vector_url(event).unwrap().key)
        .collect();
    let stored: BTreeSet<String> = pipeline.vector_keys().await.unwrap().into_iter().collect();
    assert_eq!(
        named.len(),
        IMAGES as usize,
        "exactly one vector for each image"
    );
    assert_eq!(
        named, stored,
        "no vector without an event and no event without a vector"
    );
    let tasks = pipeline.deployment.cloud.snapshot().tasks;
    let exit_codes: Vec<Option<i32>> = tasks.iter().map(|task| task.exit_code).collect();
    assert_eq!(exit_codes[0], Some(137), "the kill hit the first task");
    assert_eq!(
        exit_codes.last(),
        Some(&Some(0)),
        "another one did the rest"
    );
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kills_in_mid_work_never_pause_the_queue() {
    // The least pause after which the planner can tell that it was no failed start.
    under_kills(3, Duration::from_secs(12), "10", PATIENCE).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes minutes; its figure is in BENCHMARKS.md"]
async fn eight_kills_25_s_apart_keep_1200_images_for_less_than_10_minutes() {
    let (pause, limit) = (Duration::from_secs(25), Duration::from_secs(600));
    let visibility_timeout = "180"; // the template's
    let (images, took) = under_kills(8, pause, visibility_timeout, limit).await;
    println!("\n{images} images, 8 kills: {took:?}");
    assert!(images >= 1200);
}

/// Uploads images as long as it takes to kill so many tasks, each after it ran for `pause`.
/// All images must be done within the limit. Answers how many they were, and how long it took.
async fn under_kills(
    kills: usize,
    pause: Duration,
    visibility_timeout: &str,
    limit: Duration,
) -> (u32, Duration) {
    const IMAGES_PER_SECOND: u32 = 6;
    let pipeline = Pipeline::start(|mut options| {
        let name = "VISIBILITY_TIMEOUT_SECONDS".to_owned();
        let variables = &mut options.task_environment;
        variables.insert(name, visibility_timeout.to_owned());
        options.parameter("MaxInstances", 1)
    })
    .await
    .unwrap();
    let began = Instant::now();
    let is_over = AtomicBool::new(false);
    let uploads = async {
        let mut images = 0;
        while !is_over.load(Ordering::Relaxed) {
            let (key, image) = (format!("{images:04}.bmp"), bmp(images, 64));
            pipeline.deployment.upload(&key, image, None).await.unwrap();
            images += 1;
            let next = began + Duration::from_secs(1) * images / IMAGES_PER_SECOND;
            tokio::time::sleep_until(next.into()).await;
        }
        images
    };
    let killer = async {
        for _ in 0..kills {
            let (task, _) = pipeline.running_task().await.unwrap();
            tokio::time::sleep(pause).await;
            assert!(pipeline.deployment.cloud.kill_task(&task));
            while pipeline.running_task().await.unwrap().0 == task {}
        }
        is_over.store(true, Ordering::Relaxed);
    };
    let (images, ()) = tokio::join!(uploads, killer);
    let left = limit.saturating_sub(began.elapsed());
    let events = pipeline.events_within(images as usize, left).await.unwrap();
    let took = began.elapsed();
    pipeline.back_at_zero().await.unwrap();
    assert_eq!(by_document(&events).len(), images as usize);
    assert_eq!(pipeline.vector_keys().await.unwrap().len(), images as usize);
    let tasks = pipeline.deployment.cloud.snapshot().tasks;
    let killed = tasks.iter().filter(|task| task.exit_code == Some(137));
    assert_eq!(killed.count(), kills);
    pipeline.stop().await;
    (images, took)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_update_in_mid_work_rolls_over() {
    const BEFORE: u32 = 40;
    const IN_ALL: u32 = 120;
    let pipeline = Pipeline::start(|options| {
        options
            .parameter("MaxInstances", 2)
            .parameter("ImagesPerSecond", 1)
            .parameter("TargetDrainSeconds", 60)
    })
    .await
    .unwrap();
    let upload = async |seeds: Range<u32>| {
        for seed in seeds {
            let (key, image) = (format!("{seed:03}.bmp"), bmp(seed, 320));
            pipeline.deployment.upload(&key, image, None).await.unwrap();
        }
    };
    upload(0..BEFORE).await;
    let old_task = in_mid_work(&pipeline).await;
    // Frozen, so that it is still at work after the update, however fast it is.
    signal("STOP", old_task.pid.unwrap());

    let change = BTreeMap::from([("ExtractLabels".to_owned(), "false".to_owned())]);
    pipeline.deployment.update(change).await.unwrap();
    upload(BEFORE..IN_ALL).await;
    // As the minute's schedule does, for what came within intake's debounce.
    let schedule = json!({"source": "aws.events"});
    let wake = pipeline.deployment.invoke("ScalerFunction", &schedule);
    wake.await.unwrap();
    // What the old task does not hold is done by the new definition's.
    let has_labels = |event: &Value| !list_of(&event["data"]["metadata"]["keywords"]).is_empty();
    let mut events = Vec::new();
    while events.iter().all(has_labels) {
        events.extend(pipeline.events_of(1).await.unwrap());
    }
    signal("CONT", old_task.pid.unwrap());
    let missing = IN_ALL as usize - by_document(&events).len();
    events.extend(pipeline.events_of(missing).await.unwrap());
    pipeline.back_at_zero().await.unwrap();

    assert_eq!(by_document(&events).len(), IN_ALL as usize);
    assert!(events.iter().any(has_labels), "the old task did its part");
    let tasks = pipeline.deployment.cloud.snapshot().tasks;
    let exit_codes: Vec<Option<i32>> = tasks.iter().map(|task| task.exit_code).collect();
    assert!(
        exit_codes.iter().all(|code| *code == Some(0)),
        "{exit_codes:?}"
    );
    // Revisions of one family: what may run and what is found goes by its name.
    let family = old_task.definition.arn.strip_suffix(":1").unwrap();
    for task in &tasks {
        let revision = if task.id == old_task.id { 1 } else { 2 };
        assert_eq!(task.definition.arn, format!("{family}:{revision}"));
    }
    for call in pipeline.deployment.cloud.calls() {
        if call.operation == "TerminateInstanceInAutoScalingGroup" {
            let held = tasks.iter().find(|task| {
                call.request["InstanceId"] == *task.instance
                    && (task.created_at..task.stopped_at.unwrap()).contains(&call.at)
            });
            assert!(held.is_none(), "released with {held:?}");
        }
    }
    pipeline.stop().await;
}

/// Waits until a task has stored something and holds more.
async fn in_mid_work(pipeline: &Pipeline) -> Task {
    loop {
        let (task, _) = pipeline.running_task().await.unwrap();
        let input = pipeline.deployment.input_queue_url();
        let counts = pipeline.deployment.queue_counts(&input).await.unwrap();
        let stored = pipeline.vector_keys().await.unwrap().len();
        if stored > 0 && counts.in_flight > 0 {
            let tasks = pipeline.deployment.cloud.snapshot().tasks;
            return tasks.into_iter().find(|one| one.id == task).unwrap();
        }
    }
}

fn list_of(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_leaves_with_its_reason_and_costs_the_good_nothing() {
    let pipeline = Pipeline::start(|options| options).await.unwrap();
    let jpeg = samples()
        .into_iter()
        .find(|(name, _)| name.ends_with(".jpg"));
    let (_, jpeg) = jpeg.expect("a JPEG among the samples");
    let truncated = jpeg[..jpeg.len() / 2].to_vec();
    let uploads: [(&str, Vec<u8>); 5] = [
        ("good.bmp", bmp(1, 64)),
        ("text.jpg", b"This is no photo.".to_vec()),
        ("truncated.jpg", truncated),
        ("empty.png", Vec::new()),
        ("lie.png", jpeg.clone()),
    ];
    for (key, content) in uploads {
        pipeline
            .deployment
            .upload(key, content, Some("image/png"))
            .await
            .unwrap();
    }
    pipeline
        .deployment
        .upload("notes.txt", b"notes".to_vec(), None)
        .await
        .unwrap();

    let events = pipeline.events_of(2).await.unwrap();
    let rejections = pipeline.rejections(3).await.unwrap();
    pipeline.back_at_zero().await.unwrap();

    let documents = by_document(&events);
    assert!(documents.contains_key(&format!("{SOURCE}/good.bmp")));
    let lie = documents[&format!("{SOURCE}/lie.png")][0];
    assert_eq!(
        lie["data"]["document"]["type"], "image/jpeg",
        "content wins"
    );
    let mut reasons = BTreeMap::new();
    for rejection in &rejections {
        let object = rejection.object.clone().unwrap_or_default();
        reasons.insert(object, rejection.reason.clone().unwrap_or_default());
    }
    for (object, word) in [
        ("text.jpg", "none of the seven"),
        ("empty.png", "empty"),
        ("truncated.jpg", "trunc"),
    ] {
        let reason = reasons.get(&format!("{SOURCE}/{object}"));
        let reason = reason.unwrap_or_else(|| panic!("{object} in {reasons:?}"));
        assert!(reason.contains(word), "{object}: {reason}");
    }
    assert_eq!(
        reasons.len(),
        3,
        "a file that claims nothing is no rejection: {reasons:?}"
    );
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_reaches_the_output_takes_the_vector_along_and_starts_no_gpu() {
    let pipeline = Pipeline::start(|options| options).await.unwrap();
    pipeline
        .deployment
        .upload("here.bmp", bmp(1, 64), None)
        .await
        .unwrap();
    pipeline
        .deployment
        .upload("stays.bmp", bmp(2, 64), None)
        .await
        .unwrap();
    pipeline.events_of(2).await.unwrap();
    pipeline.back_at_zero().await.unwrap();
    let tasks_before = pipeline.deployment.cloud.snapshot().tasks.len();
    // The next middleware of the deployment takes only vectors; this one
    // listens to everything.
    let queue = listen_to_everything(&pipeline).await;

    let deletion = pipeline
        .deployment
        .s3
        .delete_object()
        .bucket(SOURCE_BUCKET)
        .key("here.bmp");
    deletion.send().await.unwrap();

    let event = receive(&pipeline, &queue).await;
    assert_eq!(event["type"], "document-deleted");
    check_with_sdk(&[&event]).unwrap();
    assert_eq!(
        event["data"]["document"],
        json!({"url": format!("{SOURCE}/here.bmp"), "type": "image/bmp"})
    );
    assert_eq!(pipeline.vector_keys().await.unwrap().len(), 1);
    assert_eq!(
        pipeline.deployment.cloud.snapshot().tasks.len(),
        tasks_before
    );
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cloudevent_of_another_middleware_keeps_what_it_carries() {
    let pipeline = Pipeline::start(|options| options).await.unwrap();
    // Not through the source bucket's notification: as an object that another
    // middleware wrote elsewhere.
    let elsewhere = pipeline.deployment.cache_bucket();
    let put = pipeline
        .deployment
        .s3
        .put_object()
        .bucket(&elsewhere)
        .key("resized/photo");
    put.body(bmp(5, 80).into()).send().await.unwrap();
    let event = json!({
        "specversion": "1.0",
        "id": "1780d5de-fd6f-4530-98d7-82ebee85ea39",
        "type": "document-created",
        "time": "2023-10-22T13:19:10.657Z",
        "data": {
            "chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
            "source": {"url": format!("{SOURCE}/photo.tiff"), "type": "image/tiff", "size": 9},
            "document": {"url": format!("s3://{elsewhere}/resized/photo"), "type": "image/bmp"},
            "metadata": {"keywords": ["sea"], "custom": {"order": 7}, "title": "Harbour"},
            "callStack": ["sharp-image-transform", "s3-event-trigger"],
        }
    });
    let topic = new_topic(&pipeline, "other-middleware").await;
    let input = pipeline.deployment.input_queue_url();
    let name = input.rsplit('/').next().unwrap();
    let filter: Value =
        serde_json::from_str(include_str!("../../events/filters/subscription.json")).unwrap();
    let subscription = json!({
        "TopicArn": topic, "Protocol": "sqs",
        "Endpoint": format!("arn:aws:sqs:us-east-1:000000000000:{name}"),
        "RawMessageDelivery": true, "FilterPolicyScope": "MessageBody", "FilterPolicy": filter,
    });
    pipeline.deployment.subscribe(&subscription).await.unwrap();
    publish(&pipeline, &topic, event.to_string()).await;

    let output = pipeline.events_of(1).await.unwrap().remove(0);

    check_contract(&output).unwrap();
    check_with_sdk(&[&output]).unwrap();
    for same in [
        "/id",
        "/time",
        "/data/chainId",
        "/data/source",
        "/data/document",
    ] {
        assert_eq!(output.pointer(same), event.pointer(same), "{same}");
    }
    let metadata = &output["data"]["metadata"];
    assert_eq!(metadata["custom"], json!({"order": 7}));
    assert_eq!(metadata["title"], "Harbour");
    let keywords = metadata["keywords"].as_array().unwrap();
    assert_eq!((keywords.len(), &keywords[0]), (6, &json!("sea")));
    assert_eq!(
        output["data"]["callStack"],
        json!([
            "clip-image-processor",
            "sharp-image-transform",
            "s3-event-trigger"
        ])
    );
    pipeline.back_at_zero().await.unwrap();
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn eventbridge_sqs_sns_and_pipes_are_ways_in_too() {
    let pipeline = Pipeline::start(|mut options| {
        options.way_in = WayIn::EventBridge;
        options
    })
    .await
    .unwrap();
    // The bucket's own events on the default bus.
    pipeline
        .deployment
        .upload("by-eventbridge.bmp", bmp(1, 64), None)
        .await
        .unwrap();
    let first = pipeline.events_of(1).await.unwrap();
    assert!(by_document(&first).contains_key(&format!("{SOURCE}/by-eventbridge.bmp")));

    // The others, for objects of a bucket that tells nobody by itself.
    let silent_bucket = pipeline.deployment.cache_bucket();
    let ways = ["by-sqs.bmp", "by-sns.bmp", "wrapped.bmp", "by-pipe.bmp"];
    for (seed, key) in ways.iter().enumerate() {
        let put = pipeline.deployment.s3.put_object().bucket(&silent_bucket);
        let body = bmp(10 + seed as u32, 64);
        put.key(*key).body(body.into()).send().await.unwrap();
    }
    let notification = |key: &str| {
        json!({"Records": [{"eventSource": "aws:s3", "eventName": "ObjectCreated:Put", "s3": {
            "bucket": {"name": silent_bucket}, "object": {"key": key, "size": 1},
        }}]})
        .to_string()
    };
    let function = "arn:aws:lambda:us-east-1:000000000000:function:clip-IntakeFunction";

    // A queue that the function reads, as the template's NotificationQueueArn.
    let (queue, queue_arn) = new_queue(&pipeline, "notifications").await;
    let mapping = pipeline.deployment.lambda.create_event_source_mapping();
    let mapping = mapping
        .function_name("clip-IntakeFunction")
        .event_source_arn(&queue_arn);
    let partial = aws_sdk_lambda::types::FunctionResponseType::ReportBatchItemFailures;
    let mapping = mapping.function_response_types(partial).batch_size(10);
    mapping.send().await.unwrap();
    let send = pipeline.deployment.sqs.send_message().queue_url(&queue);
    send.message_body(notification("by-sqs.bmp"))
        .send()
        .await
        .unwrap();

    // A topic that the function is subscribed to, as NotificationTopicArn.
    let to_function = new_topic(&pipeline, "to-function").await;
    let lambda = json!({"TopicArn": to_function, "Protocol": "lambda", "Endpoint": function});
    pipeline.deployment.subscribe(&lambda).await.unwrap();
    publish(&pipeline, &to_function, notification("by-sns.bmp")).await;

    // A topic before that queue, which wraps what it carries.
    let to_queue = new_topic(&pipeline, "to-queue").await;
    let wrapping = json!({"TopicArn": to_queue, "Protocol": "sqs", "Endpoint": queue_arn});
    pipeline.deployment.subscribe(&wrapping).await.unwrap();
    publish(&pipeline, &to_queue, notification("wrapped.bmp")).await;

    // A Pipe invokes its target with an array of what its source holds.
    let from_pipe = json!([{"messageId": "m", "body": notification("by-pipe.bmp")}]);
    let answer = pipeline
        .deployment
        .invoke("IntakeFunction", &from_pipe)
        .await
        .unwrap();
    assert_eq!(answer["enqueued"], 1, "{answer}");

    let events = pipeline.events_of(ways.len()).await.unwrap();
    let documents = by_document(&events);
    for key in ways {
        let url = format!("s3://{silent_bucket}/{key}");
        let event = documents
            .get(&url)
            .unwrap_or_else(|| panic!("no event for {url}"))[0];
        check_contract(event).unwrap();
    }
    pipeline.back_at_zero().await.unwrap();
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_functions_answer_every_sample_under_a_real_runtime() {
    let pipeline = Pipeline::start(|options| options).await.unwrap();
    // The objects that the samples speak of.
    for (bucket, key) in [
        ("source-bucket", "holiday/my photo+é&(1).png"),
        ("bucket", "image.png"),
    ] {
        let create = pipeline.deployment.s3.create_bucket().bucket(bucket);
        create.send().await.unwrap();
        let put = pipeline.deployment.s3.put_object().bucket(bucket).key(key);
        put.body(bmp(7, 64).into()).send().await.unwrap();
    }
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../events/samples");
    let mut answered = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let sample: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        let is_output = name.starts_with("output-");
        if !is_output {
            let answer = pipeline.deployment.invoke("IntakeFunction", &sample).await;
            let answer = answer.unwrap_or_else(|error| panic!("intake, {name}: {error}"));
            let is_batch = name.ends_with("sqs") && name != "pipe-sqs" || name.ends_with("-raw");
            if is_batch {
                assert_eq!(answer, json!({"batchItemFailures": []}), "{name}");
            } else {
                assert_eq!(answer["failed"], 0, "{name}: {answer}");
            }
        }
        // The scaler looks at the world whatever wakes it.
        let answer = pipeline.deployment.invoke("ScalerFunction", &sample).await;
        answer.unwrap_or_else(|error| panic!("scaler, {name}: {error}"));
        answered += 1;
    }
    assert!(answered >= 15, "{answered} samples");
    let events = pipeline.events_of(2).await.unwrap();
    assert!(by_document(&events).contains_key("s3://bucket/image.png"));
    let rejections = pipeline.rejections(1).await.unwrap();
    assert!(rejections.iter().all(|one| one.body == "not JSON at all"));
    pipeline.back_at_zero().await.unwrap();
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn topic_bus_and_queue_are_ways_out_and_all_get_every_event() {
    let pipeline =
        Pipeline::start(|options| options.parameter("OutputKind", "topic+event-bus+queue"))
            .await
            .unwrap();
    let on_bus = listen_to_the_bus(&pipeline).await;
    let output_queue = pipeline
        .deployment
        .sqs
        .get_queue_url()
        .queue_name("clip-OutputQueue");
    let output_queue = output_queue.send().await.unwrap().queue_url.unwrap();

    pipeline
        .deployment
        .upload("one.bmp", bmp(1, 64), None)
        .await
        .unwrap();

    let from_topic = pipeline.events_of(1).await.unwrap().remove(0);
    let from_queue = receive(&pipeline, &output_queue).await;
    let from_bus = receive(&pipeline, &on_bus).await;
    check_contract(&from_topic).unwrap();
    check_with_sdk(&[&from_topic]).unwrap();
    assert_eq!(from_topic, from_queue);
    assert_eq!(from_bus["detail-type"], "document-created");
    let detail = &from_bus["detail"];
    for required in [
        "specversion",
        "id",
        "source",
        "type",
        "subject",
        "datacontenttype",
    ] {
        assert!(detail[required].is_string(), "{required} in {detail}");
    }
    assert_eq!(detail["data"], from_topic["data"]);
    pipeline.back_at_zero().await.unwrap();
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_images_start_no_more_tasks_than_allowed_and_each_decision_is_explained() {
    const IMAGES: u32 = 120;
    let pipeline = Pipeline::start(|options| {
        options
            .parameter("MaxInstances", 3)
            .parameter("ImagesPerSecond", 1)
            .parameter("TargetDrainSeconds", 30)
    })
    .await
    .unwrap();
    for seed in 0..IMAGES {
        let key = format!("{seed:03}.bmp");
        pipeline
            .deployment
            .upload(&key, bmp(seed, 200), None)
            .await
            .unwrap();
    }
    let events = pipeline.events_of(IMAGES as usize).await.unwrap();
    pipeline.back_at_zero().await.unwrap();
    assert_eq!(by_document(&events).len(), IMAGES as usize);
    let snapshot = pipeline.deployment.cloud.snapshot();
    assert!(
        (1..=3).contains(&snapshot.peak_instances),
        "{}",
        snapshot.peak_instances
    );
    assert!(
        (1..=3).contains(&snapshot.peak_tasks),
        "{}",
        snapshot.peak_tasks
    );
    let all_stopped = snapshot
        .tasks
        .iter()
        .all(|task| task.status == TaskStatus::Stopped);
    assert!(all_stopped);
    let logs = pipeline
        .deployment
        .function_logs("ScalerFunction")
        .await
        .unwrap();
    let (mut started, mut released) = (0, 0);
    let mut reasons = Vec::new();
    for line in logs.iter().filter_map(|line| line.json()) {
        for decision in line["plan"]["decisions"].as_array().into_iter().flatten() {
            let why = decision["why"].as_str().unwrap_or_default();
            assert!(!why.is_empty(), "a decision without a reason: {decision}");
            reasons.push(why.to_owned());
            started += usize::from(decision["do"] == "runTasks");
            released += usize::from(decision["do"] == "release");
        }
    }
    assert!(started >= 1, "no decision to run a task among {reasons:?}");
    assert!(
        released >= 1,
        "no decision to give an instance back among {reasons:?}"
    );
    pipeline.stop().await;
}

async fn new_queue(pipeline: &Pipeline, name: &str) -> (String, String) {
    let url = pipeline
        .deployment
        .create_queue(name, &Value::Null)
        .await
        .unwrap();
    (url, format!("arn:aws:sqs:us-east-1:000000000000:{name}"))
}

async fn new_topic(pipeline: &Pipeline, name: &str) -> String {
    let created = pipeline
        .deployment
        .sns
        .create_topic()
        .name(name)
        .send()
        .await;
    created.unwrap().topic_arn.unwrap()
}

async fn publish(pipeline: &Pipeline, topic: &str, message: String) {
    let publish = pipeline.deployment.sns.publish().topic_arn(topic);
    publish.message(message).send().await.unwrap();
}

/// A queue that gets everything that the output topic carries.
async fn listen_to_everything(pipeline: &Pipeline) -> String {
    let (url, arn) = new_queue(pipeline, "everything").await;
    let subscription = json!({
        "TopicArn": "arn:aws:sns:us-east-1:000000000000:clip-OutputTopic",
        "Protocol": "sqs", "Endpoint": arn, "RawMessageDelivery": true,
    });
    pipeline.deployment.subscribe(&subscription).await.unwrap();
    url
}

/// A queue that gets everything of this system on the default event bus.
async fn listen_to_the_bus(pipeline: &Pipeline) -> String {
    let (url, arn) = new_queue(pipeline, "on-bus").await;
    let pattern = json!({"detail-type": ["document-created", "document-deleted"]});
    let rule = pipeline.deployment.events.put_rule().name("listen");
    rule.event_pattern(pattern.to_string())
        .send()
        .await
        .unwrap();
    let target = aws_sdk_eventbridge::types::Target::builder()
        .id("queue")
        .arn(arn);
    let targets = pipeline.deployment.events.put_targets().rule("listen");
    targets
        .targets(target.build().unwrap())
        .send()
        .await
        .unwrap();
    url
}

/// The next message of a queue, as JSON.
async fn receive(pipeline: &Pipeline, queue_url: &str) -> Value {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        let request = pipeline
            .deployment
            .sqs
            .receive_message()
            .queue_url(queue_url);
        let answer = request.wait_time_seconds(1).send().await.unwrap();
        if let Some(message) = answer.messages().first() {
            return serde_json::from_str(message.body().unwrap()).unwrap();
        }
    }
    panic!("nothing arrived in {queue_url}");
}
