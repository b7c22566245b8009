//! A fleet of a fixed size, disturbed at given times.

use super::*;

/// Images per second of these tests.
const RATE: f64 = 50.0;
/// What one image takes alone: 20 ms of the model between two transfers.
const ALONE: u32 = 150 + 20 + 150;
/// All tasks are ready by then.
const READY: Ms = 60_000;

type Deed = fn(&mut World);

/// A lane of two at once, 100 ms an image, and a second to start.
fn run_lane(arrivals: &[(Ms, u64)], deeds: &[(Ms, Deed)]) -> World {
    let trace = Trace {
        name: "t".to_owned(),
        about: String::new(),
        arrivals: arrivals.to_vec(),
    };
    let mut world = World::new(&trace, Physics::new(RATE, 10.0), ["gpu"], 5);
    let physics = LanePhysics {
        max_concurrency: 2,
        batch_size: 10,
        per_image: 100.0,
        cold_start: 1_000,
    };
    world.set_lane_physics(physics, 1);
    let mut fleet = Fleet {
        tasks: 0,
        deeds: deeds.to_vec(),
    };
    world.run(&mut fleet, 3_600_000);
    world
}

#[test]
fn a_lane_bills_its_start_and_transfers_once_and_is_warm_after_that() {
    let world = run_lane(&[(0, 1), (60_000, 10)], &[]);
    // 100 ms to the invocation, 300 ms of transfers.
    let all = latencies(&world);
    assert_eq!(all[..10], [100 + 300 + 1_000; 10]);
    assert_eq!(all[10..], [100 + 1_000 + 300 + 100]);
    assert_eq!(
        (world.tally.lane_ms, world.tally.lane_requests),
        (1_400 + 1_300, 2)
    );
}

#[test]
fn a_lane_has_a_ceiling() {
    let world = run_lane(&[(0, 40)], &[]);
    let longest = latencies(&world).into_iter().max();
    assert_eq!(longest, Some(100 + 1_000 + 1_300 + 100 + 1_300));
    assert_eq!(world.tally.lane_images, 40);
}

#[test]
fn a_closed_lane_takes_nothing_but_not_at_once() {
    let close: Deed = |world| world.set_lane(false);
    let open: Deed = |world| world.set_lane(true);
    let world = run_lane(&[(2_000, 1), (70_000, 1)], &[(0, close), (90_000, open)]);
    let all = latencies(&world);
    assert_eq!(all[0], 1_500);
    assert!((25_000..82_000).contains(&all[1]), "{all:?}");
    // Idle polls are paid for while it is open: less than the whole time.
    assert!(world.tally.lane_polls < world.now as f64 / 4_000.0);
}

/// So many tasks, for ever, and deeds at their times.
struct Fleet {
    tasks: u32,
    deeds: Vec<(Ms, Deed)>,
}

impl Controller for Fleet {
    fn start(&mut self, world: &mut World) {
        world.set_desired(0, self.tasks);
        for (number, (at, _)) in self.deeds.iter().enumerate() {
            world.set_timer(*at, number as u32);
        }
    }

    fn signal(&mut self, world: &mut World, signal: Signal) {
        match signal {
            Signal::Timer(number) => (self.deeds[number as usize].1)(world),
            _ => {
                for instance in world.free_instances() {
                    world.start_task(instance);
                }
            }
        }
    }
}

fn run(tasks: u32, arrivals: &[(Ms, u64)], deeds: &[(Ms, Deed)]) -> World {
    let trace = Trace {
        name: "t".to_owned(),
        about: String::new(),
        arrivals: arrivals.to_vec(),
    };
    let physics = Physics::new(RATE, 10.0);
    let mut world = World::new(&trace, physics, ["gpu"], 5);
    let mut fleet = Fleet {
        tasks,
        deeds: deeds.to_vec(),
    };
    world.run(&mut fleet, 3_600_000);
    world
}

fn latencies(world: &World) -> Vec<u32> {
    let mut all = Vec::new();
    for (latency, images) in &world.tally.latencies {
        all.extend(std::iter::repeat_n(*latency, *images as usize));
    }
    all.sort_unstable();
    all
}

#[test]
fn an_image_is_received_while_another_is_in_work() {
    let arrivals = [(READY, 1), (READY + 30, 1), (READY + 200, 1)];
    assert_eq!(latencies(&run(1, &arrivals, &[])), [ALONE; 3]);
}

#[test]
fn images_wait_for_the_model_alone() {
    // 5 ms apart, 20 ms of the model each: every one waits 15 ms longer.
    let arrivals = [(READY, 1), (READY + 5, 1), (READY + 10, 1)];
    let world = run(1, &arrivals, &[]);
    assert_eq!(latencies(&world), [ALONE, ALONE + 15, ALONE + 30]);
    // Its whole capacity, for ten seconds.
    let full: Vec<(Ms, u64)> = (0..500).map(|number| (READY + number * 20, 1)).collect();
    assert_eq!(latencies(&run(1, &full, &[])), [ALONE; 500]);
}

#[test]
fn tasks_share_what_arrives_together() {
    for (tasks, longest) in [(1, 100), (2, 50), (5, 20)] {
        let world = run(tasks, &[(READY, 100)], &[]);
        let last = READY + Ms::from(ALONE) + 20 * (longest - 1);
        assert_eq!((world.tally.done, world.tally.last_done), (100, last));
    }
}

#[test]
fn a_task_holds_no_more_than_it_may() {
    let most = Physics::new(RATE, 10.0).held_most();
    assert_eq!(most, 1024);
    assert_eq!(Physics::new(0.5, 10.0).held_most(), 192);
    let look: Deed = |world| assert_eq!((world.in_flight, world.visible), (1024, 8976));
    let world = run(1, &[(READY, 10_000)], &[(READY + 1, look)]);
    assert_eq!(world.tally.done, 10_000);
    // Room comes back with each grain: the model never waits.
    let last = READY + Ms::from(ALONE) + 20 * 9_999;
    assert_eq!(world.tally.last_done, last);
}

#[test]
fn a_lost_task_leaves_what_it_has_not_done_to_its_messages_visibility() {
    // 150 ms to the model and 150 ms from it: 35 of 100 are done in a second.
    let lose: Deed = |world| world.lose(0);
    let world = run(2, &[(READY, 200)], &[(READY + 1_000, lose)]);
    assert_eq!(
        (world.tally.done, world.in_flight, world.visible),
        (200, 0, 0)
    );
    let late = latencies(&world)
        .iter()
        .filter(|one| **one > 180_000)
        .count();
    assert_eq!(late, 65);
}

#[test]
fn a_stopped_task_finishes_what_its_model_has_and_hands_the_rest_back_at_once() {
    // Two seconds' work for each; a stop within the first.
    let stop: Deed = |world| world.stop_task(0, "a test");
    let look: Deed = |world| {
        assert!(world.workers[0].shown.stopping && world.workers[0].work.held == 50);
        assert_eq!(world.workers[1].work.held, 150);
    };
    let deeds = [(READY + 500, stop), (READY + 501, look)];
    let world = run(2, &[(READY, 200)], &deeds);
    assert_eq!(
        (world.tally.done, world.in_flight, world.visible),
        (200, 0, 0)
    );
    assert_eq!(world.workers[0].shown.exit_code, Some(0));
    let last = READY + Ms::from(ALONE) + 20 * 149;
    assert_eq!(world.tally.last_done, last);
}

#[test]
fn no_image_is_lost_or_done_twice_whatever_ends() {
    let lose: Deed = |world| {
        if let Some(instance) = world.living().first() {
            world.lose(*instance);
        }
    };
    let end: Deed = |world| {
        if let Some(instance) = world.living().first() {
            world.terminate(*instance, false);
        }
    };
    let stop: Deed = |world| {
        let working = (0..world.workers.len()).find(|worker| world.workers[*worker].receives());
        if let Some(task) = working {
            world.stop_task(task, "a test");
        }
    };
    let mut rng = fastrand::Rng::with_seed(4);
    for _ in 0..200 {
        let arrivals: Vec<(Ms, u64)> = (0..20)
            .map(|number| (READY + number * 1_500, rng.u64(1..300)))
            .collect();
        let deeds: Vec<(Ms, Deed)> = (0..6)
            .map(|_| {
                (
                    READY + rng.i64(0..60_000),
                    [lose, end, stop][rng.usize(0..3)],
                )
            })
            .collect();
        let world = run(rng.u32(1..=4), &arrivals, &deeds);
        let images: u64 = arrivals.iter().map(|(_, count)| count).sum();
        assert_eq!(
            (world.tally.done, world.in_flight, world.visible),
            (images, 0, 0)
        );
        assert_eq!(latencies(&world).len() as u64, images);
        assert!(world.workers.iter().all(|worker| worker.work.held == 0));
    }
}
