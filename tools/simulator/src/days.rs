//! Random simulated days: random policies, arrivals and disturbances. Two
//! promises must hold in all of them, and a crash loop must stay cheap.

use planner::{CapacityOption, Policy};

use crate::evaluate::{Nobody, Setting, run_once, run_with_lane};
use crate::ours::Ours;
use crate::tally::Tally;
use crate::trace::{Trace, exponential};
use crate::world::{Chaos, LanePhysics, Ms, Physics, World};

/// Beyond the grace, the time to give everything back after the last message.
const GIVE_BACK_SECONDS: Ms = 90;

const DAY: Ms = 24 * 3_600_000;

/// Time after the day for what was held back by a broken task's backoff.
const AFTERMATH: Ms = 24 * 3_600_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Day {
    /// Its seed: the same seed is the same day.
    pub seed: u64,
    /// Most instances at once, those on their way out included.
    pub most_instances: u32,
    pub max_instances: u32,
    /// Milliseconds from the last message's end (or the last disturbance after
    /// it) until nothing was paid for any more.
    pub to_zero: Ms,
    pub allowed: Ms,
    pub grace: Ms,
    /// Whether all work was done and everything given back.
    pub finished: bool,
    pub runs: u64,
}

impl Day {
    /// What is wrong with it, if anything.
    pub fn fault(&self) -> Option<String> {
        let seed = self.seed;
        if self.most_instances > self.max_instances {
            return Some(format!(
                "seed {seed}: {} instances, the maximum is {}",
                self.most_instances, self.max_instances
            ));
        }
        if !self.finished {
            return Some(format!(
                "seed {seed}: work or instances are left after the day"
            ));
        }
        if self.to_zero > self.allowed {
            return Some(format!(
                "seed {seed}: {} s from the last message to zero, {} s are allowed",
                self.to_zero / 1000,
                self.allowed / 1000
            ));
        }
        None
    }
}

pub fn day(seed: u64) -> Day {
    let mut rng = fastrand::Rng::with_seed(seed ^ 0x5eed_0fda_7500);
    let policy = random_policy(&mut rng);
    let trace = random_trace(&mut rng);
    let physics = Physics::new(
        policy.images_per_second * (0.5 + rng.f64()),
        f64::from(policy.boot_seconds) * (0.7 + 0.5 * rng.f64()),
    );
    let groups = policy
        .options
        .iter()
        .map(|option| option.auto_scaling_group.as_str());
    let mut world = World::new(&trace, physics, groups, policy.max_instances);
    for group in 0..policy.options.len() {
        world.set_shortages(group, random_spans(&mut rng, 2, 3_600_000.0));
    }
    let chaos = Chaos {
        call_failure: rng.f64() * 0.1,
        outages: random_spans(&mut rng, 2, 300_000.0),
        never_registers: if rng.bool() { 0.0 } else { rng.f64() * 0.05 },
        lost: if rng.bool() { 0.0 } else { rng.f64() * 0.1 },
        broken_tasks: if rng.u8(0..4) == 0 {
            random_spans(&mut rng, 1, 7_200_000.0)
        } else {
            Vec::new()
        },
        count_dips: rng.f64() * 0.01,
        rng: fastrand::Rng::with_seed(seed),
    };
    let outages = chaos.outages.clone();
    world.chaos = Some(chaos);
    let phase = (rng.f64() * 60_000.0) as Ms;
    let mut ours = Ours::new(policy.clone(), phase);
    let finished = world.run(&mut ours, DAY + AFTERMATH);

    let stats = &world.tally;
    let zero_at = stats
        .curve
        .iter()
        .rev()
        .take_while(|moment| moment.paid == 0)
        .last()
        .map_or(0, |moment| moment.at);
    // Nobody gives back during an outage, nor before an instance is lost.
    let mut quiet_from = stats.last_done.max(world.last_disturbance);
    for (from, to) in outages {
        if from < zero_at && to > stats.last_done {
            quiet_from = quiet_from.max(to);
        }
    }
    let grace = policy.idle_grace_seconds.max(policy.idle_exit_seconds);
    Day {
        seed,
        most_instances: stats.most_instances,
        max_instances: policy.max_instances,
        to_zero: (zero_at - quiet_from).max(0),
        allowed: (Ms::from(grace) + GIVE_BACK_SECONDS) * 1000,
        grace: Ms::from(grace) * 1000,
        finished: finished && stats.done == stats.arrived,
        runs: ours.runs,
    }
}

/// A random day's dollars without disturbances: with the lane, and of the
/// cheaper of the lane and GPUs alone, of those that keep the promise.
#[derive(Clone, Copy, Debug)]
pub struct Bill {
    pub seed: u64,
    pub both: f64,
    pub cheaper: f64,
    pub finished: bool,
}

impl Bill {
    pub fn ratio(&self) -> f64 {
        self.both / self.cheaper
    }
}

pub fn bill(seed: u64) -> Bill {
    let mut rng = fastrand::Rng::with_seed(seed ^ 0xb111);
    let policy = random_policy(&mut rng);
    let trace = random_trace(&mut rng);
    let lane = LanePhysics {
        max_concurrency: rng.u32(2..=50),
        per_image: 100.0 + rng.f64() * 200.0,
        cold_start: rng.i64(500..4_000),
        ..LanePhysics::default()
    };
    let setting = Setting::with_lane(policy, lane);
    let phase = rng.i64(0..60_000);
    let promise = setting.policy.boot_seconds + setting.policy.target_drain_seconds;
    let cost = |tally: &Tally| tally.dollars(&setting.prices()).iter().sum::<f64>();
    let mut ours = Ours::new(setting.policy.clone(), phase);
    let (both, finished) = run_with_lane(&setting, &trace, &mut ours, seed);
    let (lane, _) = run_with_lane(&setting, &trace, &mut Nobody, seed);
    let without = Policy {
        lane: None,
        ..setting.policy.clone()
    };
    let (gpus, _) = run_once(&setting, &trace, &mut Ours::new(without, phase));
    let in_time = lane.longest() <= f64::from(promise);
    Bill {
        seed,
        both: cost(&both),
        cheaper: match in_time {
            true => cost(&gpus).min(cost(&lane)),
            false => cost(&gpus),
        },
        finished: finished && both.done == both.arrived,
    }
}

fn random_policy(rng: &mut fastrand::Rng) -> Policy {
    let idle_grace_seconds = rng.u32(15..=120);
    let options = rng.usize(1..=3);
    Policy {
        max_instances: rng.u32(1..=25),
        min_instances: 0,
        target_drain_seconds: rng.u32(10..=300),
        idle_grace_seconds,
        idle_exit_seconds: if rng.bool() {
            idle_grace_seconds
        } else {
            rng.u32(10..=idle_grace_seconds)
        },
        boot_seconds: rng.u32(40..=300),
        images_per_second: 2.0 + rng.f64() * 198.0,
        options: (0..options)
            .map(|number| CapacityOption::of_group(&format!("group-{number}")))
            .collect(),
        ..Policy::default()
    }
}

fn random_trace(rng: &mut fastrand::Rng) -> Trace {
    let mut arrivals = Vec::new();
    let bursts_per_day = 1.0 + rng.f64() * 40.0;
    let burst_mean = 10_f64.powf(rng.f64() * 4.0);
    let mut at = 0.0;
    loop {
        at += exponential(rng, DAY as f64 / bursts_per_day);
        if at >= DAY as f64 {
            break;
        }
        let images = exponential(rng, burst_mean).ceil().max(1.0) as u64;
        if rng.u8(0..3) == 0 {
            // A trickle instead of a burst: single images, some seconds apart.
            let gap = exponential(rng, 20_000.0);
            for number in 0..images.min(200) {
                arrivals.push((at as Ms + (number as f64 * gap) as Ms, 1));
            }
        } else {
            arrivals.push((at as Ms, images));
        }
    }
    if arrivals.is_empty() {
        arrivals.push((rng.i64(0..DAY), 1));
    }
    arrivals.sort_unstable();
    Trace {
        name: "random day".to_owned(),
        about: String::new(),
        arrivals,
    }
}

fn random_spans(rng: &mut fastrand::Rng, most: usize, mean_ms: f64) -> Vec<(Ms, Ms)> {
    (0..rng.usize(0..=most))
        .map(|_| {
            let from = (rng.f64() * DAY as f64) as Ms;
            (
                from,
                from + exponential(rng, mean_ms).min(DAY as f64 / 4.0) as Ms,
            )
        })
        .collect()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrashLoop {
    /// Tasks launched in the first hour after the first launch.
    pub first_hour: u32,
    pub first_day: u32,
    /// Whether the work was done after the task was repaired.
    pub recovered: bool,
}

/// A task that fails at start, with `images` waiting, repaired after `repaired_after`.
pub fn crash_loop(max_instances: u32, images: u64, repaired_after: Ms) -> CrashLoop {
    let policy = Policy {
        max_instances,
        options: vec![CapacityOption::of_group("gpu")],
        ..Policy::default()
    };
    let trace = Trace {
        name: "crash loop".to_owned(),
        about: String::new(),
        arrivals: vec![(0, images)],
    };
    let physics = Physics::new(policy.images_per_second, f64::from(policy.boot_seconds));
    let mut world = World::new(&trace, physics, ["gpu"], max_instances);
    world.chaos = Some(Chaos {
        rng: fastrand::Rng::with_seed(1),
        broken_tasks: vec![(0, repaired_after)],
        ..Chaos::default()
    });
    let mut ours = Ours::new(policy, 20_000);
    let ended = world.run(&mut ours, repaired_after + 3 * DAY);
    let launches = &world.tally.launch_times;
    let first = launches.first().copied().unwrap_or(0);
    let within = |span: Ms| launches.iter().filter(|at| **at - first < span).count() as u32;
    CrashLoop {
        first_hour: within(3_600_000),
        first_day: within(DAY),
        recovered: ended && world.tally.done == images,
    }
}
