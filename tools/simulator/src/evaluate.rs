//! Runs a trace under every model and compares.

use planner::{CapacityOption, Policy};

use crate::models::{Keda, Original, SageMaker};
use crate::oracle::{Bound, bound};
use crate::ours::Ours;
use crate::tally::{Averages, Moment, Tally};
use crate::trace::Trace;
use crate::world::{Controller, Ms, Physics, World};

/// g4dn.xlarge, On-Demand, Linux, us-east-1, USD per hour (Amazon EC2
/// On-Demand price list; billed by the second).
pub const G4DN_XLARGE_USD_PER_HOUR: f64 = 0.526;

/// Offsets of the minute (and of KEDA's poll) against the trace: every model
/// is run with each, since a trace that begins right on a tick flatters pollers.
const PHASES: Ms = 8;

/// How long a run may go on after the last arrival: longer than any model
/// needs for a million images.
const HORIZON_AFTER_END: Ms = 7 * 24 * 3_600_000;

/// The models, in the table's order.
pub const MODELS: [&str; 4] = ["scaler", "(a) original", "(b) KEDA", "(c) SageMaker async"];

/// What is compared, under which conditions.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The scaler's policy; its rate and boot time are the world's.
    pub policy: Policy,
}

impl Setting {
    /// The default policy with one option.
    pub fn new(mut policy: Policy) -> Self {
        if policy.options.is_empty() {
            policy.options = vec![CapacityOption::of_group("gpu")];
        }
        Self { policy }
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
    /// Whether every run gave everything back by itself.
    pub ended: bool,
}

#[derive(Clone, Debug)]
pub struct Comparison {
    pub trace: Trace,
    pub rows: Vec<Row>,
    pub oracle: Bound,
}

pub fn run_once(
    setting: &Setting,
    trace: &Trace,
    controller: &mut dyn Controller,
) -> (Tally, bool) {
    let mut world = setting.world(trace);
    let ended = world.run(controller, trace.end() + HORIZON_AFTER_END);
    (world.tally, ended)
}

pub fn compare(setting: &Setting, trace: &Trace) -> Comparison {
    let max = setting.policy.max_instances;
    let mut rows = Vec::new();
    for (number, model) in MODELS.into_iter().enumerate() {
        let mut runs = Vec::new();
        let mut ended = true;
        for step in 0..PHASES {
            let phase = step * 60_000 / PHASES;
            let mut controller: Box<dyn Controller> = match number {
                0 => Box::new(Ours::new(setting.policy.clone(), phase)),
                1 => Box::new(Original::new(max, phase)),
                2 => Box::new(Keda::new(max, phase / 2)),
                _ => Box::new(SageMaker::new(max, phase)),
            };
            let (stats, by_itself) = run_once(setting, trace, controller.as_mut());
            ended &= by_itself;
            runs.push(stats);
        }
        rows.push(Row {
            model,
            averages: Averages::of(&runs),
            curve: runs[0].curve.clone(),
            most_instances: runs.iter().map(|run| run.most_instances).max().unwrap_or(0),
            ended,
        });
    }
    let oracle = bound(
        trace,
        &setting.physics(),
        f64::from(setting.policy.target_drain_seconds),
        max,
    );
    Comparison {
        trace: trace.clone(),
        rows,
        oracle,
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
    let [ours, original, keda] = [0, 1, 2].map(|row| &comparison.rows[row].averages);
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
        ours.done >= 1.0 && comparison.rows[0].ended,
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
    verdicts
}
