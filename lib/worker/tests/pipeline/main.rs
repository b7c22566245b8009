//! What the pipeline promises, against a world that enforces AWS's limits and
//! fails as it is told.

mod killers;
mod world;

use std::sync::atomic::Ordering;
use std::time::Duration;

use events::{CloudEvent, Document, Embedding, EventType};
use proptest::prelude::*;
use serde_json::json;
use tokio::time::Instant;
use worker::services::QueueFacts;
use worker::{Ended, Fatal};
use world::{Content, World, created, image, vector_key};

const LONG: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn every_image_gets_one_vector_and_one_event_and_then_its_message_goes() {
    let world = World::new();
    let urls = world.images(137);
    let summary = world.run_until_empty(LONG).await;
    assert_eq!(summary.images, 137);
    assert_eq!(world.output.urls(), urls);
    assert_eq!(world.vectors.puts.load(Ordering::Relaxed), 137);
    for event in world.output.events() {
        let index: f32 = event.data.document.url[18..23].parse().unwrap();
        let body = world.vectors.get(&vector_key(&event)).unwrap();
        let values: Vec<f32> = serde_json::from_slice(&body).unwrap();
        assert_eq!(values, [index, 0.5, -0.25, 1e-7]);
        assert_eq!(
            event.data.metadata.keywords,
            Some(vec![format!("label-{index}")])
        );
    }
    assert!(world.output.rejections().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_full_while_there_is_work() {
    let mut world = World::new();
    world.time_per_image = Duration::from_millis(4);
    world.images(80);
    world.run_until_empty(LONG).await;
    let batches = world.batches.0.lock().unwrap().clone();
    let full = batches.iter().filter(|size| **size == 8).count();
    assert!(full >= 8, "{batches:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_model_waits_for_what_the_decoders_have_in_work() {
    let mut world = World::new();
    world.settings.batch_size = 64;
    world.settings.batch_wait = Duration::from_millis(150);
    world.settings.decode_threads = 8;
    // 200 a second: a wait of 10 ms would bring two at a time.
    for index in 0..64 {
        let url = world.put(&format!("{index}.png"), image("id:1 slow:40"));
        world.send(&url);
    }
    world.run_until_empty(LONG).await;
    let batches = world.batches.0.lock().unwrap().clone();
    assert!(batches.len() <= 12, "{batches:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_never_succeed_leaves_at_once_with_its_reason_and_the_rest_is_done() {
    let world = World::new();
    let good = world.images(20);
    let too_large = vec![0; (1 << 20) + 1];
    let cases = [
        ("damaged.png", image("damaged"), "truncated", "decode"),
        ("panics.png", image("panic"), "gave up on", "decode"),
        ("empty.png", Vec::new(), "is empty", "download"),
        (
            "notes.txt",
            b"no image".to_vec(),
            "none of the supported",
            "download",
        ),
        ("large.png", too_large, "MAX_IMAGE_BYTES", "download"),
        ("nan.png", image("nan"), "not finite", "infer"),
    ];
    let mut expected = Vec::new();
    for (name, bytes, reason, stage) in cases {
        let url = world.put(name, bytes);
        let mut event = created(&url);
        event.data.document.mime_type = "image/unknown".to_owned();
        world.queue.send(&event.to_json());
        expected.push((Some(url), reason, stage));
    }
    world.send("s3://bucket/gone.png");
    expected.push((
        Some("s3://bucket/gone.png".to_owned()),
        "NoSuchKey",
        "download",
    ));
    world.queue.send("this is no JSON");
    expected.push((None, "not JSON", "parse"));
    let summary = world.run_until_empty(LONG).await;
    assert_eq!(world.output.urls(), good);
    assert_eq!(summary.rejected, expected.len() as u64);
    let rejections = world.output.rejections();
    assert_eq!(rejections.len(), expected.len());
    for (object, reason, stage) in expected {
        let (body, rejection) = rejections
            .iter()
            .find(|(_, rejection)| rejection.object == object)
            .unwrap_or_else(|| panic!("{object:?} was not rejected"));
        assert!(rejection.reason.contains(reason), "{}", rejection.reason);
        assert_eq!(rejection.stage, stage);
        assert_eq!(rejection.by, "gpu-task");
        assert!(world.queue.all().iter().any(|one| one.body == *body));
    }
    // Nobody tried twice.
    assert!(world.queue.all().iter().all(|one| one.deliveries == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storage_that_fails_for_a_while_costs_nothing() {
    let world = World::new();
    let urls = world.images(10);
    *world.vectors.failures.lock().unwrap() = (12, "SlowDown");
    let slow = Content {
        bytes: image("id:1"),
        failures: 5,
        ..Content::default()
    };
    let flaky = world.put_content("flaky.png", slow);
    let id = world.send(&flaky);
    world.run_until_empty(LONG).await;
    assert_eq!(world.output.urls().len(), urls.len() + 1);
    assert!(world.output.rejections().is_empty());
    assert!(world.queue.message(&id).deliveries >= 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_delivery_that_the_queue_allows_ends_with_the_reason() {
    let mut world = World::new();
    world.facts = Ok(QueueFacts {
        max_receives: Some(3),
        ..QueueFacts::default()
    });
    let cut = Content {
        bytes: image("id:1"),
        is_cut: true,
        ..Content::default()
    };
    let url = world.put_content("cut.png", cut);
    let id = world.send(&url);
    world.run_until_empty(LONG).await;
    let rejections = world.output.rejections();
    assert_eq!(rejections.len(), 1);
    let reason = &rejections[0].1.reason;
    assert!(reason.contains("gave up after 3 deliveries"), "{reason}");
    assert!(reason.contains("503"), "{reason}");
    assert_eq!(world.queue.message(&id).deliveries, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_keeps_a_message_for_as_long_as_its_work_takes() {
    let mut world = World::new();
    world.settings.visibility = Duration::from_millis(400);
    let url = world.put("slow.png", image("id:3 slow:1500"));
    let id = world.send(&url);
    world.run_until_empty(LONG).await;
    let message = world.queue.message(&id);
    assert!(message.is_deleted);
    assert_eq!(message.deliveries, 1);
    assert!(message.extensions >= 3, "{message:?}");
    assert_eq!(world.output.urls(), [url]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_ends_the_work_on_it_before_it_is_published() {
    let mut world = World::new();
    world.settings.visibility = Duration::from_millis(400);
    let url = world.put("slow.png", image("id:3 slow:1000"));
    let id = world.send(&url);
    let running = world.start();
    while world.queue.message(&id).deliveries == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    world.queue.steal(&id);
    tokio::time::sleep(Duration::from_millis(1300)).await;
    running.stop.cancel();
    running.task.await.unwrap().unwrap();
    assert!(world.output.urls().is_empty());
    assert!(world.output.rejections().is_empty());
    let message = world.queue.message(&id);
    assert!(!message.is_deleted, "the thief owns it");
    assert_eq!(message.hand_backs, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_delivered_twice_is_worked_on_once() {
    let mut world = World::new();
    world.queue_mut().delivers_twice = true;
    // Everything is received twice while the model loads, before anything is done.
    world.model_takes = Duration::from_secs(2);
    let urls = world.images(24);
    world.run_until_empty(LONG).await;
    assert_eq!(world.output.urls(), urls);
    assert_eq!(world.vectors.puts.load(Ordering::Relaxed), 24);
    let twice = world
        .queue
        .all()
        .iter()
        .filter(|one| one.deliveries == 2)
        .count();
    assert_eq!(twice, 24, "delivered twice");
    assert_eq!(world.queue.left(), 0, "the newest receipt deletes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_finishes_what_the_model_has_and_hands_the_rest_back_at_once() {
    let mut world = World::new();
    world.time_per_image = Duration::from_millis(30);
    world.images(200);
    let running = world.start();
    while world.output.urls().len() < 16 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let stopped = Instant::now();
    running.stop.cancel();
    let back_in_time = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let in_flight = |one: &&world::Stored| !one.is_deleted && !one.is_visible();
        world.queue.all().iter().filter(in_flight).count()
    };
    let (summary, in_flight) = tokio::join!(running.task, back_in_time);
    let summary = summary.unwrap().unwrap();
    assert_eq!(summary.ended, Ended::Stopped);
    assert!(
        stopped.elapsed() < Duration::from_secs(5),
        "{:?}",
        stopped.elapsed()
    );
    // What is still in flight after a second is in the model or behind it.
    assert!(in_flight <= 8, "{in_flight}");
    assert!(summary.handed_back > 0);
    for message in world.queue.all() {
        assert!(message.is_deleted || message.is_visible(), "{message:?}");
    }
    assert_eq!(world.output.urls().len() + world.queue.left(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_into_the_stop_timeout_is_handed_back() {
    let mut world = World::new();
    world.settings.stop_timeout = Duration::from_secs(1);
    world.time_per_image = Duration::from_millis(600);
    world.images(16);
    let running = world.start();
    tokio::time::sleep(Duration::from_millis(300)).await;
    let stopped = Instant::now();
    running.stop.cancel();
    let summary = running.task.await.unwrap().unwrap();
    assert!(
        stopped.elapsed() < Duration::from_secs(1),
        "{:?}",
        stopped.elapsed()
    );
    assert_eq!(summary.handed_back, 16);
    assert!(world.queue.all().iter().all(world::Stored::is_visible));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_task_finishes_what_the_first_was_stopped_in() {
    let mut world = World::new();
    world.time_per_image = Duration::from_millis(5);
    let urls = world.images(100);
    let running = world.start();
    while world.output.urls().len() < 20 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.stop.cancel();
    running.task.await.unwrap().unwrap();
    world.run_until_empty(LONG).await;
    assert_eq!(world.output.urls(), urls, "each exactly once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_load_ends_the_task_and_gives_everything_back() {
    let mut world = World::new();
    world.model_fails = true;
    world.model_takes = Duration::from_millis(200);
    world.images(12);
    let result = world.start().task.await.unwrap();
    assert!(matches!(result, Err(Fatal::Model(_))), "{result:?}");
    assert!(world.queue.all().iter().all(world::Stored::is_visible));
    let all = world.queue.all();
    assert!(all.iter().all(|one| one.hand_backs == 1), "{all:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_refuses_the_task_ends_it() {
    let mut world = World::new();
    world.facts = Err(Fatal::Access("AccessDenied".to_owned()));
    let result = world.start().task.await.unwrap();
    assert_eq!(result.map_err(|fatal| fatal.exit_code()), Err(4));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_bucket_that_refuses_everything_ends_the_task() {
    let world = World::new();
    world.images(60);
    *world.vectors.failures.lock().unwrap() = (u32::MAX, "AccessDenied");
    let result = world.start().task.await.unwrap();
    assert_eq!(result.map_err(|fatal| fatal.exit_code()), Err(4));
    assert!(world.output.rejections().is_empty());
    assert_eq!(world.queue.left(), 60);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_image_that_the_model_fails_on_does_not_take_others_with_it() {
    let mut world = World::new();
    world.facts = Ok(QueueFacts {
        max_receives: Some(2),
        ..QueueFacts::default()
    });
    let urls = world.images(30);
    let poison = world.put("poison.png", image("poison"));
    world.send(&poison);
    world.run_until_empty(LONG).await;
    assert_eq!(world.output.urls(), urls);
    let rejections = world.output.rejections();
    assert_eq!(rejections.len(), 1);
    assert!(rejections[0].1.reason.contains("CUDA error 700"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_always_fails_ends_the_task() {
    let world = World::new();
    for index in 0..40 {
        let url = world.put(&format!("poison-{index}.png"), image("poison"));
        world.send(&url);
    }
    let result = world.start().task.await.unwrap();
    assert_eq!(result.map_err(|fatal| fatal.exit_code()), Err(5));
    assert_eq!(world.queue.left(), 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn decoding_stays_within_the_memory_budget_and_a_giant_runs_alone() {
    let mut world = World::new();
    world.settings.memory_budget = 96 << 20;
    world.settings.decode_threads = 8;
    let mut sent = 0;
    for index in 0..40 {
        let memory: u64 = if index % 13 == 5 { 500 << 20 } else { 20 << 20 };
        let words = format!("id:{index} slow:10 memory:{memory}");
        let url = world.put(&format!("big-{index}.png"), image(&words));
        world.send(&url);
        sent += 1;
    }
    let summary = world.run_until_empty(LONG).await;
    assert_eq!(summary.images, sent);
    // Two thirds of the budget are for decoding.
    let most = world.preparer.most_shared.load(Ordering::SeqCst);
    assert!(most > 20 << 20, "several ran at once: {most}");
    assert!(most <= 64 << 20, "{most}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_this_worker_has_no_room_or_time_for_goes_to_a_larger_one_and_is_no_failure() {
    let mut world = World::new();
    world.settings.memory_budget = 96 << 20;
    world.settings.max_image_bytes = 1 << 30;
    world.has_larger = true;
    let mut bodies = Vec::new();
    for (name, words) in [
        ("giant.png", "id:1 memory:500000000"),
        ("long.png", "id:2 takes-too-long"),
    ] {
        let url = world.put(name, image(words));
        bodies.push(world.send(&url));
    }
    let heavy = world.put("heavy.png", vec![0; 40 << 20]);
    bodies.push(world.send(&heavy));
    let small = world.put("small.png", image("id:3"));
    world.send(&small);
    let summary = world.run_until_empty(LONG).await;
    assert_eq!(
        (summary.images, summary.rejected, summary.handed_over),
        (1, 0, 3)
    );
    let mut handed = world.output.handed_over();
    let mut sent: Vec<String> = bodies
        .iter()
        .map(|id| world.queue.message(id).body)
        .collect();
    handed.sort();
    sent.sort();
    assert_eq!(handed, sent);
    assert!(world.output.rejections().is_empty());
    assert_eq!(world.queue.left(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_messages_of_two_queues_are_each_acknowledged_where_they_lie() {
    let mut world = World::new();
    world.queue_mut().is_two = true;
    let urls = world.images(50);
    // Every second one fails once, and so is given back as well.
    for url in urls.iter().step_by(3) {
        world.output.failures.lock().unwrap().insert(url.clone(), 4);
    }
    let summary = world.run_until_empty(LONG).await;
    assert_eq!(summary.images, 50);
    assert_eq!(world.output.urls(), urls);
    assert_eq!(world.queue.left(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn decoders_run_on_as_many_threads_as_are_allowed() {
    let world = World::new();
    for index in 0..20 {
        let url = world.put(&format!("slow-{index}.png"), image("slow:20"));
        world.send(&url);
    }
    world.run_until_empty(LONG).await;
    assert_eq!(world.preparer.most_running.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_model_keeps_messages_in_the_queue() {
    let mut world = World::new();
    world.time_per_image = Duration::from_millis(20);
    world.settings.max_messages = 40;
    world.images(300);
    let running = world.start();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    running.stop.cancel();
    running.task.await.unwrap().unwrap();
    let most = world.queue.most_in_flight.load(Ordering::Relaxed);
    assert!((16..=40).contains(&most), "{most}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_output_that_fails_for_some_events_gets_them_again() {
    let world = World::new();
    let urls = world.images(30);
    // More failures than the publisher's own tries: one goes back to the queue.
    world
        .output
        .failures
        .lock()
        .unwrap()
        .insert("image-00007".to_owned(), 6);
    world
        .output
        .failures
        .lock()
        .unwrap()
        .insert("image-00008".to_owned(), 2);
    world.run_until_empty(LONG).await;
    assert_eq!(world.output.urls(), urls);
    let deliveries: Vec<u32> = world.queue.all().iter().map(|one| one.deliveries).collect();
    assert_eq!(deliveries[7], 2);
    assert_eq!(deliveries[8], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_queue_that_fails_does_not_lose_the_message() {
    let world = World::new();
    world.output.reject_failures.store(2, Ordering::Relaxed);
    let url = world.put("damaged.png", image("damaged"));
    let id = world.send(&url);
    world.run_until_empty(LONG).await;
    assert_eq!(world.output.rejections().len(), 1);
    assert_eq!(world.queue.message(&id).deliveries, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_over_the_limit_is_slimmed_or_kept() {
    let world = World::new();
    // As long as the limit allows once the pointer to the vector is in it.
    let filled = |url: &str, excess: usize| {
        let mut event = created(url);
        event.data.metadata.keywords = Some(Vec::new());
        event.data.metadata.title = Some(String::new());
        let embedding = Embedding {
            vectors: "s3://cache/clip-image-processor/0123456789abcdef.json".to_owned(),
            model: world::MODEL.to_owned(),
            dimensions: world::DIMENSIONS,
        };
        let output = event
            .clone()
            .with_embedding(&embedding, &[], serde_json::Map::new());
        let room = 256 * 1024 - output.to_json().len();
        event.data.metadata.title = Some("x".repeat(room + excess));
        event.to_json()
    };
    let close = world.put("close.png", image("id:1"));
    // The pointer to the vector fits, the label does not.
    world.queue.send(&filled(&close, 0));
    let over = world.put("over.png", image("id:2"));
    world.queue.send(&filled(&over, 1));
    world.run_until_empty(LONG).await;
    assert_eq!(world.output.urls(), std::slice::from_ref(&close));
    assert_eq!(
        world.output.events()[0].data.metadata.keywords,
        Some(Vec::new())
    );
    let rejections = world.output.rejections();
    assert_eq!(rejections.len(), 1);
    let rejection = &rejections[0].1;
    assert_eq!(rejection.object.as_deref(), Some(over.as_str()));
    let place = rejection.event.as_deref().unwrap();
    let key = place.strip_prefix("s3://cache/").unwrap();
    assert!(
        key.starts_with("clip-image-processor/oversize-events/"),
        "{key}"
    );
    let kept = CloudEvent::parse(&world.vectors.get(key).unwrap()).unwrap();
    assert_eq!(kept.data.document.url, over);
    assert!(
        world.vectors.get(&vector_key(&kept)).is_some(),
        "its vector is there"
    );
    assert_eq!(
        kept.data.metadata.keywords,
        Some(vec!["label-2".to_owned()])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn latency_of_the_storage_does_not_cost_throughput() {
    let time_with = async |latency: Duration| {
        let mut world = World::with_latency(latency);
        world.time_per_image = Duration::from_millis(10);
        world.images(300);
        let started = Instant::now();
        world.run_until_empty(LONG).await;
        assert_eq!(world.output.urls().len(), 300);
        started.elapsed().as_secs_f64()
    };
    let quick = time_with(Duration::ZERO).await;
    let slow = time_with(Duration::from_millis(100)).await;
    // 3 s of model time; filling and emptying the pipeline takes six calls,
    // and a second passes before the rate is known that lets more in.
    assert!(slow < quick * 1.05 + 1.5, "{slow} s instead of {quick} s");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_with_several_objects_goes_when_all_are_done() {
    let world = World::new();
    world.put("one.png", image("id:1"));
    world.put("two.png", image("damaged"));
    world.put("three.png", image("id:3"));
    let record = |key: &str| {
        json!({
            "eventName": "ObjectCreated:Put",
            "s3": {"bucket": {"name": "bucket"}, "object": {"key": key, "size": 5, "eTag": "e"}},
        })
    };
    let body = json!({"Records": [record("one.png"), record("two.png"), record("three.png")]});
    let id = world.queue.send(&body.to_string());
    world
        .queue
        .send(r#"{"Event": "s3:TestEvent", "Bucket": "bucket"}"#);
    world.queue.send(r#"{"Records": []}"#);
    world.run_until_empty(LONG).await;
    assert_eq!(
        world.output.urls(),
        ["s3://bucket/one.png", "s3://bucket/three.png"]
    );
    assert!(world.queue.message(&id).is_deleted);
    let rejections = world.output.rejections();
    assert_eq!(rejections.len(), 1);
    // Only the one that failed is rejected, as an event of its own.
    let event = CloudEvent::parse(rejections[0].0.as_bytes()).unwrap();
    assert_eq!(event.data.document.url, "s3://bucket/two.png");
    assert_eq!(
        world.output.events()[0].data.document.mime_type,
        "image/png"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_document_takes_its_vectors_with_it_and_is_passed_on() {
    let world = World::new();
    let url = world.put("a.png", image("id:1"));
    let other = world.put("b.png", image("id:2"));
    world.send(&url);
    world.send(&other);
    world.run_until_empty(LONG).await;
    assert_eq!(world.vectors.keys().len(), 2);
    let document = Document {
        url: url.clone(),
        mime_type: "image/png".to_owned(),
        size: None,
        etag: None,
    };
    let deleted = CloudEvent::new(EventType::DocumentDeleted, document);
    world.queue.send(&deleted.to_json());
    world.run_until_empty(LONG).await;
    assert_eq!(world.vectors.keys().len(), 2, "the object still exists");
    assert_eq!(world.output.events().len(), 2);
    world.vectors.gone.lock().unwrap().insert(url.clone());
    world.queue.send(&deleted.to_json());
    world.run_until_empty(LONG).await;
    assert_eq!(world.vectors.keys().len(), 1);
    let events = world.output.events();
    let passed_on = events.last().unwrap();
    assert_eq!(passed_on.kind, EventType::DocumentDeleted);
    assert_eq!(passed_on.id, deleted.id);
    assert_eq!(passed_on.data.call_stack, ["clip-image-processor"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_is_deleted_while_it_is_in_work_leaves_no_vector_and_no_event() {
    let world = World::new();
    let url = world.put("a.png", image("id:1"));
    world.vectors.gone.lock().unwrap().insert(url.clone());
    world.send(&url);
    world.run_until_empty(LONG).await;
    assert_eq!(world.vectors.puts.load(Ordering::Relaxed), 1);
    assert!(world.vectors.keys().is_empty());
    assert!(world.output.events().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vector_of_an_earlier_delivery_goes_with_an_object_that_is_gone_at_the_next() {
    let world = World::new();
    let [url, other] = ["a.png", "b.png"].map(|name| world.put(name, image("id:1")));
    world.send(&url);
    world.send(&other);
    world.run_until_empty(LONG).await;
    assert_eq!(world.vectors.keys().len(), 2);
    for url in [&url, &other] {
        world.documents.contents.lock().unwrap().remove(url);
    }
    // Of the other, S3 says at the second look that it is there.
    world.vectors.gone.lock().unwrap().insert(url.clone());
    world.send(&url);
    world.send(&other);
    world.run_until_empty(LONG).await;
    assert_eq!(world.vectors.keys().len(), 1);
    assert_eq!(world.output.rejections().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_task_ends_by_itself_but_not_while_it_works() {
    let mut world = World::new();
    world.settings.idle_exit = Duration::from_secs(1);
    let url = world.put("slow.png", image("slow:2500"));
    world.send(&url);
    let started = Instant::now();
    let summary = world.start().task.await.unwrap().unwrap();
    assert_eq!(summary.ended, Ended::Idle);
    assert_eq!(summary.images, 1);
    let ran = started.elapsed().as_secs_f64();
    assert!((3.4..8.0).contains(&ran), "{ran}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_task_polls_seldom_and_one_at_a_time() {
    let world = World::new();
    let running = world.start();
    tokio::time::sleep(Duration::from_millis(800)).await;
    assert_eq!(world.queue.receives.load(Ordering::Relaxed), 1);
    running.stop.cancel();
    running.task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_without_a_length_is_bounded_while_it_is_read() {
    let world = World::new();
    let hidden = |bytes: Vec<u8>| Content {
        bytes,
        hides_length: true,
        ..Content::default()
    };
    let small = world.put_content("small.png", hidden(image("id:1")));
    let large = world.put_content("large.png", hidden(vec![7; (1 << 20) + 2]));
    world.send(&small);
    world.send(&large);
    world.run_until_empty(LONG).await;
    assert_eq!(world.output.urls(), [small]);
    assert!(
        world.output.rejections()[0]
            .1
            .reason
            .contains("MAX_IMAGE_BYTES")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_never_ends_is_given_up_with_its_reason() {
    let mut world = World::new();
    world.settings.download_timeout = Duration::from_millis(300);
    world.facts = Ok(QueueFacts {
        max_receives: Some(1),
        ..QueueFacts::default()
    });
    let endless = Content {
        bytes: image("id:1"),
        hides_length: true,
        never_ends: true,
        ..Content::default()
    };
    let url = world.put_content("endless.png", endless);
    world.send(&url);
    world.run_until_empty(LONG).await;
    let rejections = world.output.rejections();
    assert!(
        rejections[0].1.reason.contains("was not read in"),
        "{rejections:?}"
    );
}

#[derive(Clone, Debug)]
enum Kind {
    Good,
    Damaged,
    Gone,
    Flaky(u32),
    Malformed,
}

fn kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        6 => Just(Kind::Good),
        1 => Just(Kind::Damaged),
        1 => Just(Kind::Gone),
        1 => (1u32..6).prop_map(Kind::Flaky),
        1 => Just(Kind::Malformed),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn every_message_ends_in_exactly_one_place(
        kinds in proptest::collection::vec(kind(), 1..60),
        batch_size in 1usize..12,
        slow_puts in 0u32..8,
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (events, rejections, left) = runtime.block_on(async {
            let mut world = World::new();
            world.settings.batch_size = batch_size;
            *world.vectors.failures.lock().unwrap() = (slow_puts, "SlowDown");
            for (index, kind) in kinds.iter().enumerate() {
                let name = format!("{index}.png");
                let url = format!("s3://bucket/{name}");
                match kind {
                    Kind::Good => drop(world.put(&name, image("id:1"))),
                    Kind::Damaged => drop(world.put(&name, image("damaged"))),
                    Kind::Flaky(failures) => {
                        let content = Content {
                            bytes: image("id:2"),
                            failures: *failures,
                            ..Content::default()
                        };
                        world.put_content(&name, content);
                    }
                    Kind::Gone => {}
                    Kind::Malformed => {
                        world.queue.send("{}");
                        continue;
                    }
                }
                world.send(&url);
            }
            world.run_until_empty(LONG).await;
            (world.output.urls().len(), world.output.rejections().len(), world.queue.left())
        });
        let bad = |kind: &&Kind| matches!(kind, Kind::Damaged | Kind::Gone | Kind::Malformed);
        let bad = kinds.iter().filter(bad).count();
        prop_assert_eq!(left, 0);
        prop_assert_eq!(rejections, bad);
        prop_assert_eq!(events, kinds.len() - bad);
    }
}
