//! The express lane in the whole pipeline, as it should run and as it fails.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use aws_sdk_lambda::types::Environment;
use aws_sdk_sqs::types::QueueAttributeName;
use local::deployment::DeploymentOptions;
use pipeline_tests::{PATIENCE, Pipeline, bmp, by_document, check_contract};

const FUNCTION: &str = "clip-ExpressFunction";

/// A task that has started stays for what the lane gives up later.
fn lane(options: DeploymentOptions) -> DeploymentOptions {
    options
        .parameter("ExpressLane", "on")
        .parameter("IdleExitSeconds", 30)
}

/// Nobody starts an instance.
fn lane_alone(options: DeploymentOptions) -> DeploymentOptions {
    let mut options = lane(options);
    let environment = &mut options.function_environment;
    environment.insert("SCALER_FUNCTION_NAME".to_owned(), String::new());
    options
}

async fn upload(pipeline: &Pipeline, count: u32) {
    for seed in 0..count {
        let key = format!("image-{seed:03}.bmp");
        let uploaded = pipeline.deployment.upload(&key, bmp(seed, 320), None);
        uploaded.await.unwrap();
    }
}

/// What the lane holds comes back within seconds, not within the template's minute.
async fn come_back_soon(pipeline: &Pipeline) {
    let set = pipeline
        .deployment
        .sqs
        .set_queue_attributes()
        .queue_url(pipeline.deployment.input_queue_url())
        .attributes(QueueAttributeName::VisibilityTimeout, "5");
    set.send().await.unwrap();
}

/// Changes variables of the express function.
async fn told(pipeline: &Pipeline, changes: &[(&str, &str)]) {
    let lambda = &pipeline.deployment.lambda;
    let get = lambda.get_function_configuration().function_name(FUNCTION);
    let known = get.send().await.unwrap();
    let mut variables = known
        .environment
        .and_then(|environment| environment.variables)
        .unwrap();
    for (name, value) in changes {
        variables.insert((*name).to_owned(), (*value).to_owned());
    }
    let environment = Environment::builder()
        .set_variables(Some(variables))
        .build();
    let update = lambda
        .update_function_configuration()
        .function_name(FUNCTION)
        .environment(environment);
    update.send().await.unwrap();
}

/// All of `count` images are done, nothing is left, nothing was rejected, and
/// few are announced twice.
async fn all_done(pipeline: Pipeline, count: usize) {
    let mut events = pipeline.events_of(count).await.unwrap();
    pipeline.back_at_zero().await.unwrap();
    events.extend(pipeline.deployment.take_events().await.unwrap());
    assert_eq!(by_document(&events).len(), count);
    assert_eq!(pipeline.vector_keys().await.unwrap().len(), count);
    let rejected = pipeline.deployment.take_rejections().await.unwrap();
    assert!(rejected.is_empty(), "{rejected:?}");
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_back_in_seconds_with_no_instance_started() {
    let pipeline = Pipeline::start(lane_alone).await.unwrap();
    let started = Instant::now();
    upload(&pipeline, 1).await;
    let events = pipeline.events_of(1).await.unwrap();
    let time = started.elapsed();
    println!("upload to event, cold: {time:?}");
    check_contract(&events[0]).unwrap();
    assert!(time < Duration::from_secs(20), "{time:?}");
    pipeline.back_at_zero().await.unwrap();
    assert!(pipeline.deployment.cloud.snapshot().instances.is_empty());
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_lanes_give_the_same_vector() {
    let mut vectors = Vec::new();
    for lane in ["on", "off"] {
        let pipeline = Pipeline::start(|options| match lane {
            "on" => lane_alone(options),
            _ => options,
        })
        .await
        .unwrap();
        upload(&pipeline, 3).await;
        let events = pipeline.events_of(3).await.unwrap();
        let mut by_name = BTreeMap::new();
        for (document, events) in by_document(&events) {
            by_name.insert(document, pipeline.vector(events[0]).await.unwrap());
        }
        vectors.push(by_name);
        pipeline.stop().await;
    }
    for (one, other) in vectors[0].values().zip(vectors[1].values()) {
        let square = |value: f32| f64::from(value) * f64::from(value);
        let difference: f64 = one.iter().zip(other).map(|(a, b)| square(a - b)).sum();
        let length: f64 = one.iter().map(|a| square(*a)).sum();
        let error = (difference / length).sqrt();
        assert!(error <= 1e-6, "{error:e}");
    }
    assert_eq!(vectors[0].len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_too_large_for_the_function_waits_for_a_gpu_and_is_no_failure() {
    // What is left beside the model takes no document of 30 MB.
    let small = |options| lane_alone(options).parameter("ExpressMemory", 400);
    let pipeline = Pipeline::start(small).await.unwrap();
    let large = pipeline.deployment.upload("large.bmp", bmp(1, 5600), None);
    large.await.unwrap();
    upload(&pipeline, 4).await;
    pipeline.events_of(4).await.unwrap();
    let queue = pipeline.deployment.gpu_queue_url().unwrap();
    let started = Instant::now();
    while pipeline
        .deployment
        .queue_counts(&queue)
        .await
        .unwrap()
        .total()
        == 0
    {
        assert!(started.elapsed() < PATIENCE, "nothing is handed over");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let rejected = pipeline.deployment.take_rejections().await.unwrap();
    assert!(rejected.is_empty(), "{rejected:?}");
    pipeline.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_mapping_disabled_gpus_do_everything() {
    let pipeline = Pipeline::start(lane).await.unwrap();
    let uuid = pipeline.deployment.mapping_uuid("ExpressMapping").unwrap();
    let lambda = &pipeline.deployment.lambda;
    let update = lambda.update_event_source_mapping().uuid(uuid);
    update.enabled(false).send().await.unwrap();
    upload(&pipeline, 20).await;
    all_done(pipeline, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn throttled_to_nothing_gpus_do_everything() {
    let pipeline = Pipeline::start(lane).await.unwrap();
    come_back_soon(&pipeline).await;
    let throttle = pipeline
        .deployment
        .lambda
        .put_function_concurrency()
        .function_name(FUNCTION)
        .reserved_concurrent_executions(0);
    throttle.send().await.unwrap();
    upload(&pipeline, 20).await;
    // That nothing comes is seen by the schedule, a minute later or two.
    let started = Instant::now();
    while pipeline.deployment.cloud.snapshot().tasks.is_empty() {
        assert!(started.elapsed() < 2 * PATIENCE, "no task starts");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    all_done(pipeline, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_crashes_at_start_loses_nothing() {
    let pipeline = Pipeline::start(lane).await.unwrap();
    come_back_soon(&pipeline).await;
    told(&pipeline, &[("GPU_QUEUE_URL", "")]).await;
    upload(&pipeline, 20).await;
    all_done(pipeline, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_runs_out_of_time_gives_back_what_it_has() {
    let pipeline = Pipeline::start(lane).await.unwrap();
    // A storage that takes connections and never answers.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let storage = format!("http://{}", silent.local_addr().unwrap());
    let changes = [("AWS_ENDPOINT_URL_S3", storage.as_str())];
    told(&pipeline, &changes).await;
    let lambda = &pipeline.deployment.lambda;
    let update = lambda.update_function_configuration();
    let update = update.function_name(FUNCTION).timeout(5);
    update.send().await.unwrap();
    upload(&pipeline, 20).await;
    all_done(pipeline, 20).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_function_that_is_killed_in_its_work_loses_nothing() {
    let pipeline = Pipeline::start(lane).await.unwrap();
    come_back_soon(&pipeline).await;
    let endpoint = pipeline.deployment.emulator.endpoint().to_owned();
    let killer = tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let mut kills = 0;
        while started.elapsed() < Duration::from_secs(15) {
            kills += kill_functions(&endpoint);
            std::thread::sleep(Duration::from_millis(50));
        }
        kills
    });
    upload(&pipeline, 20).await;
    let kills = killer.await.unwrap();
    assert!(kills > 0, "no function ran");
    all_done(pipeline, 20).await;
}

/// Kills what runs the express function of one emulator, as Lambda does where
/// memory ends; answers how many.
fn kill_functions(endpoint: &str) -> usize {
    let mut kills = 0;
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let is_express = std::fs::read_link(entry.path().join("exe"))
            .is_ok_and(|program| program.file_name() == Some(Path::new("express").as_os_str()));
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let environment = std::fs::read(entry.path().join("environ")).unwrap_or_default();
        if is_express && String::from_utf8_lossy(&environment).contains(endpoint) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            kills += usize::from(
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok(),
            );
        }
    }
    kills
}
