//! Runs a trace under every model and compares.

use planner::{CapacityOption, LanePolicy, Policy};

use crate::models::{Keda, Original, SageMaker};
use crate::oracle::{Bound, bound, bound_of_two};
use crate::ours::Ours;
use crate::tally::{Averages, Moment, Prices, Tally};
use crate::trace::Trace;
use crate::world::{Controller, LanePhysics, Ms, Physics, Signal, World};

/// The instance of all that are compared, billed by the second.
pub const INSTANCE: &str = "instanceHour.g4dn.xlarge";

/// Memory of the lane's function: one vCPU (AWS Lambda developer guide).
pub const LANE_MEMORY_MB: u32 = 1_769;

/// Offsets of the minute (and of KEDA's poll) against the trace: every model
/// is run with each, since a trace that begins right on a tick flatters pollers.
const PHASES: Ms = 8;

/// How long a run may go on after the last arrival: longer than any model
/// needs for a million images.
const HORIZON_AFTER_END: Ms = 7 * 24 * 3_600_000;

/// The models, in the table's order.
pub const MODELS: [&str; 6] = [
    "scaler and lane",
    "lane alone",
    "scaler, no lane",
    "(a) original",
    "(b) KEDA",
    "(c) SageMaker async",
];

/// What is compared, under which conditions.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The scaler's policy; its rate and boot time are the world's.
    pub policy: Policy,
    /// What the first two models have besides.
    pub lane: LanePhysics,
}

impl Setting {
    /// The default policy with one option.
    pub fn new(policy: Policy) -> Self {
        Self::with_lane(policy, LanePhysics::default())
    }

    /// The policy knows the lane and its prices, as the template tells it.
    pub fn with_lane(mut policy: Policy, lane: LanePhysics) -> Self {
        if policy.options.is_empty() {
            policy.options = vec![CapacityOption::of_group("gpu")];
        }
        for option in &mut policy.options {
            option.usd_per_hour = Some(prices::usd(INSTANCE));
        }
        let physics = Physics::new(policy.images_per_second, f64::from(policy.boot_seconds));
        policy.lane = Some(LanePolicy {
            max_concurrency: lane.max_concurrency,
            memory_mb: LANE_MEMORY_MB,
            batch_size: lane.batch_size as u32,
            seconds_per_image: lane.seconds_per_image(physics.fetch + physics.deliver),
            usd_per_gb_second: prices::usd("lambdaGbSecond"),
            usd_per_request: prices::usd("lambdaRequest"),
        });
        Self { policy, lane }
    }

    pub fn prices(&self) -> Prices {
        Prices {
            instance_hour: prices::usd(INSTANCE),
            lane_second: f64::from(LANE_MEMORY_MB) / 1024.0 * prices::usd("lambdaGbSecond"),
            lane_request: prices::usd("lambdaRequest"),
            queue_request: prices::usd("sqsRequest"),
        }
    }

    pub fn physics(&self) -> Physics {
        Physics::new(
            self.policy.images_per_second,
            f64::from(self.policy.boot_seconds),
        )
    }

    pub fn world(&self, trace: &Trace) -> World {
        let options = self.policy.options.iter();
        let groups = options.map(|option| option.auto_scaling_group.as_str());
        World::new(trace, self.physics(), groups, self.policy.max_instances)
    }
}

#[derive(Clone, Debug)]
pub struct Row {
    pub model: &'static str,
    pub averages: Averages,
    /// First run's curve, for the plot.
    pub curve: Vec<Moment>,
    /// Most instances at any time.
    pub most_instances: u32,
    /// The longest time that an image took, in seconds.
    pub longest: f64,
    /// Whether every run gave everything back by itself.
    pub ended: bool,
}

#[derive(Clone, Debug)]
pub struct Comparison {
    pub trace: Trace,
    pub rows: Vec<Row>,
    pub oracle: Bound,
    /// The same of both kinds of capacity, in dollars.
    pub oracle_of_two: f64,
    /// What GPUs from zero promise: a boot, and the drain target.
    pub promise: f64,
}

pub fn run_once(
    setting: &Setting,
    trace: &Trace,
    controller: &mut dyn Controller,
) -> (Tally, bool) {
    run_in(setting.world(trace), trace, controller)
}

/// The same with a lane beside.
pub fn run_with_lane(
    setting: &Setting,
    trace: &Trace,
    controller: &mut dyn Controller,
    seed: u64,
) -> (Tally, bool) {
    let mut world = setting.world(trace);
    world.set_lane_physics(setting.lane.clone(), seed);
    run_in(world, trace, controller)
}

fn run_in(mut world: World, trace: &Trace, controller: &mut dyn Controller) -> (Tally, bool) {
    let ended = world.run(controller, trace.end() + HORIZON_AFTER_END);
    (world.tally, ended)
}

/// Nobody scales: what there is does the work.
pub struct Nobody;

impl Controller for Nobody {
    fn start(&mut self, _: &mut World) {}
    fn signal(&mut self, _: &mut World, _: Signal) {}
}

pub fn compare(setting: &Setting, trace: &Trace) -> Comparison {
    let max = setting.policy.max_instances;
    let without_lane = Policy {
        lane: None,
        ..setting.policy.clone()
    };
    let mut rows = Vec::new();
    for (number, model) in MODELS.into_iter().enumerate() {
        let mut runs = Vec::new();
        let mut ended = true;
        // Nobody's minute begins anywhere.
        let phases = if number == 1 { 1 } else { PHASES };
        for step in 0..phases {
            let phase = step * 60_000 / PHASES;
            let mut controller: Box<dyn Controller> = match number {
                0 => Box::new(Ours::new(setting.policy.clone(), phase)),
                1 => Box::new(Nobody),
                2 => Box::new(Ours::new(without_lane.clone(), phase)),
                3 => Box::new(Original::new(max, phase)),
                4 => Box::new(Keda::new(max, phase / 2)),
                _ => Box::new(SageMaker::new(max, phase)),
            };
            let (stats, by_itself) = match number {
                0 | 1 => run_with_lane(setting, trace, controller.as_mut(), step as u64),
                _ => run_once(setting, trace, controller.as_mut()),
            };
            ended &= by_itself;
            runs.push(stats);
        }
        rows.push(Row {
            model,
            averages: Averages::of(&runs, &setting.prices()),
            curve: runs[0].curve.clone(),
            most_instances: runs.iter().map(|run| run.most_instances).max().unwrap_or(0),
            longest: runs.iter().map(Tally::longest).fold(0.0, f64::max),
            ended,
        });
    }
    let policy = &setting.policy;
    let drain = f64::from(policy.target_drain_seconds);
    Comparison {
        trace: trace.clone(),
        rows,
        oracle: bound(trace, &setting.physics(), drain, max),
        oracle_of_two: bound_of_two(trace, setting),
        promise: f64::from(policy.boot_seconds) + drain,
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What is required, on which trace.
    pub what: String,
    pub holds: bool,
    pub numbers: String,
}

pub fn verdicts(comparison: &Comparison) -> Vec<Verdict> {
    let name = &comparison.trace.name;
    let [ours, original, keda] = [2, 3, 4].map(|row| &comparison.rows[row].averages);
    let mut verdicts = Vec::new();
    let mut require = |what: &str, holds: bool, numbers: String| {
        verdicts.push(Verdict {
            what: format!("{name}: {what}"),
            holds,
            numbers,
        });
    };
    require(
        "all images done, everything given back",
        ours.done >= 1.0 && comparison.rows[2].ended,
        format!("{:.1} %", ours.done * 100.0),
    );
    let mut at_most = |what: &str, share: f64, other: f64| {
        let numbers = format!(
            "{:.4} / {other:.4} = {:.2}",
            ours.gpu_hours,
            ours.gpu_hours / other
        );
        require(what, ours.gpu_hours <= share * other, numbers);
    };
    let oracle_hours = comparison.oracle.gpu_seconds / 3600.0;
    at_most("GPU-hours at most 1.3 × the oracle's", 1.3, oracle_hours);
    if ["one", "hundred", "bursts"].contains(&name.as_str()) {
        let what = "GPU-hours at most half of the original's";
        at_most(what, 0.5, original.gpu_hours);
    }
    if let (Some(mine), Some(theirs)) = (ours.first_vector, original.first_vector) {
        require(
            "first vector at least 60 s before the original's",
            theirs - mine >= 60.0,
            format!("{mine:.0} s against {theirs:.0} s"),
        );
    }
    for (rival, averages) in [("original", original), ("KEDA", keda)] {
        if let (Some(mine), Some(theirs)) = (ours.p95, averages.p95) {
            require(
                &format!("p95 latency no worse than that of {rival}"),
                mine <= theirs,
                format!("{mine:.3} s against {theirs:.3} s"),
            );
        }
    }
    verdicts.extend(lane_verdicts(comparison));
    verdicts
}

/// What the lane adds must hold.
fn lane_verdicts(comparison: &Comparison) -> Vec<Verdict> {
    let name = comparison.trace.name.as_str();
    let [both, lane, today] = [0, 1, 2].map(|row| &comparison.rows[row]);
    let mut verdicts = Vec::new();
    let mut require = |what: &str, holds: bool, numbers: String| {
        verdicts.push(Verdict {
            what: format!("{name}, with the lane: {what}"),
            holds,
            numbers,
        });
    };
    require(
        "all images done, everything given back",
        both.averages.done >= 1.0 && both.ended,
        format!("{:.1} %", both.averages.done * 100.0),
    );
    // A mapping adds five batches a second: bursts of hundreds wait for that.
    let in_seconds = match name {
        "one" | "hundred" | "steady" => Some(5.0),
        "bursts" => Some(15.0),
        _ => None,
    };
    if let (Some(most), Some(p95)) = (in_seconds, both.averages.p95) {
        let what = format!("p95 latency at most {most:.0} s");
        require(&what, p95 <= most, format!("{p95:.2} s"));
    }
    let cost = |row: &Row| row.averages.total();
    let mut cheaper = cost(today);
    if lane.longest <= comparison.promise {
        cheaper = cheaper.min(cost(lane));
    }
    let mut at_most = |what: &str, share: f64, other: f64| {
        let mine = cost(both);
        let numbers = format!("${mine:.4} / ${other:.4} = {:.3}", mine / other);
        require(what, mine <= share * other, numbers);
    };
    let what = "dollars at most 1.05 × the cheaper of lane and GPUs alone, of those in time";
    at_most(what, 1.05, cheaper);
    if ["one", "hundred", "bursts"].contains(&name) {
        at_most("dollars at most a tenth of GPUs alone", 0.1, cost(today));
    }
    verdicts
}
