//! Files that kill their worker are found by name, and take nobody along.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::time::Duration;

use worker::config::{Config, Settings};
use worker::services::QueueFacts;

use crate::world::{World, image};

const IMAGES: usize = 2000;

/// The template's redrive policy.
const MAX_RECEIVES: u32 = 5;

/// More deaths than three killers may cost.
const MAX_LIVES: usize = 30;

fn default_settings(provider: &str) -> Settings {
    let flags = format!(
        "gpu-task --input-queue-url=https://a/in --dead-letter-queue-url=https://a/dead \
         --output-queue-url=https://a/out --cache-bucket=cache --model-path=/model \
         --decode-threads=2 --execution-provider={provider}"
    );
    let config = Config::read(flags.split_whitespace().map(OsString::from));
    config.expect("a valid configuration").settings
}

/// One worker's life: until the queue is empty, or until it is killed. Its
/// runtime goes with everything on it, in the middle of whatever it does.
fn live(world: &World) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let running = world.start();
        while world.queue.left() > 0 && !world.death.is_here() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if !world.death.is_here() {
            running.stop.cancel();
            running.task.await.unwrap().expect("the task ends well");
        }
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
    world.death.pass();
}

/// Three killers among two thousand images: exactly they are rejected.
fn three_killers(provider: &str, killers: [usize; 3]) {
    let mut world = World::new();
    world.settings = default_settings(provider);
    world.facts = Ok(QueueFacts {
        max_receives: Some(MAX_RECEIVES),
        ..QueueFacts::default()
    });
    world.queue_mut().max_receives = Some(MAX_RECEIVES);
    world.queue_mut().shuffles = true;
    let mut good = BTreeSet::new();
    let mut bad = BTreeSet::new();
    for index in 0..IMAGES {
        let is_killer = killers.contains(&index);
        let words = if is_killer { "kill" } else { "id" };
        let bytes = image(&format!("{words}:{index}"));
        let url = world.put(&format!("{index}.png"), bytes);
        world.send(&url);
        if is_killer { &mut bad } else { &mut good }.insert(url);
    }
    let mut lives = 0;
    while world.queue.left() > 0 {
        lives += 1;
        assert!(lives <= MAX_LIVES, "{:?}", world.preparer.kills);
        live(&world);
        world.queue.pass_visibility();
    }
    let kills = world.preparer.kills.lock().unwrap().clone();
    for killer in killers {
        let own = kills.iter().filter(|one| **one == killer as u64).count();
        assert!((1..=4).contains(&own), "{killer} killed {own} workers");
    }
    let rejections = world.output.rejections();
    let rejected: BTreeSet<String> = rejections
        .iter()
        .filter_map(|(_, rejection)| rejection.object.clone())
        .collect();
    assert_eq!(rejected, bad);
    assert_eq!(rejections.len(), killers.len());
    for (_, rejection) in &rejections {
        let reason = &rejection.reason;
        assert!(reason.starts_with("killed its worker"), "{reason}");
    }
    assert_eq!(*world.queue.taken_away.lock().unwrap(), [""; 0]);
    let embedded: BTreeSet<String> = world.output.urls().into_iter().collect();
    assert_eq!(embedded, good);
    assert_eq!(*world.vectors.notes.lock().unwrap(), Default::default());
}

#[test]
fn three_killers_among_two_thousand_are_rejected_by_name_with_the_defaults_of_a_cpu() {
    three_killers("cpu", [3, 901, 1999]);
}

#[test]
fn three_killers_among_two_thousand_are_rejected_by_name_with_the_defaults_of_a_gpu() {
    three_killers("cuda", [120, 121, 1400]);
}
