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

    /// The world's speeds.
    pub fn physics(&self) -> Physics {
        Physics::new(
            self.policy.images_per_second,
            f64::from(self.policy.boot_seconds),
        )
    }

    /// A world for a trace.
    pub fn world(&self, trace: &Trace) -> World {
        let options = self.policy.options.iter();
        let groups = options.map(|option| option.auto_scaling_group.as_str());
        World::new(trace, self.physics(), groups, self.policy.max_instances)
    }
}

/// One model on one trace.
#[derive(Clone, Debug)]
pub struct Row {
    /// The model.
    pub model: &'static str,
    /// Its numbers.
    pub summary: Averages,
    /// First run's curve, for the plot.
    pub curve: Vec<Moment>,
    /// Most instances at any time.
    pub most_instances: u32,
    /// Whether every run gave everything back by itself.
    pub ended: bool,
}

/// All models on one trace.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The trace.
    pub trace: Trace,
    /// The models.
    pub rows: Vec<Row>,
    /// The oracle.
    pub oracle: Bound,
}

/// Runs one model once.
pub fn run_once(
    setting: &Setting,
    trace: &Trace,
    controller: &mut dyn Controller,
) -> (Tally, bool) {
    let mut world = setting.world(trace);
    let ended = world.run(controller, trace.end() + HORIZON_AFTER_END);
    (world.tally, ended)
}

/// Runs a trace under every model.
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
            summary: Averages::of(&runs),
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

/// One requirement and whether it holds.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// What is required, on which trace.
    pub what: String,
    /// Whether it holds.
    pub holds: bool,
    /// The numbers.
    pub numbers: String,
}

/// The requirements of the comparison.
pub fn verdicts(comparison: &Comparison) -> Vec<Verdict> {
    let name = &comparison.trace.name;
    let ours = &comparison.rows[0].summary;
    let original = &comparison.rows[1].summary;
    let keda = &comparison.rows[2].summary;
    let oracle_hours = comparison.oracle.gpu_seconds / 3600.0;
    let mut verdicts = vec![
        Verdict {
            what: format!("{name}: all images done, everything given back"),
            holds: ours.done >= 1.0 && comparison.rows[0].ended,
            numbers: format!("{:.1} %", ours.done * 100.0),
        },
        Verdict {
            what: format!("{name}: GPU-hours at most 1.3 × the oracle's"),
            holds: ours.gpu_hours <= 1.3 * oracle_hours,
            numbers: format!(
                "{:.4} / {oracle_hours:.4} = {:.2}",
                ours.gpu_hours,
                ours.gpu_hours / oracle_hours
            ),
        },
    ];
    if ["one", "hundred", "bursts"].contains(&name.as_str()) {
        verdicts.push(Verdict {
            what: format!("{name}: GPU-hours at most half of the original's"),
            holds: ours.gpu_hours <= 0.5 * original.gpu_hours,
            numbers: format!(
                "{:.4} / {:.4} = {:.2}",
                ours.gpu_hours,
                original.gpu_hours,
                ours.gpu_hours / original.gpu_hours
            ),
        });
    }
    if let (Some(mine), Some(theirs)) = (ours.first_vector, original.first_vector) {
        verdicts.push(Verdict {
            what: format!("{name}: first vector at least 60 s before the original's"),
            holds: theirs - mine >= 60.0,
            numbers: format!("{mine:.0} s against {theirs:.0} s"),
        });
    }
    for (rival, summary) in [("original", original), ("KEDA", keda)] {
        if let (Some(mine), Some(theirs)) = (ours.p95, summary.p95) {
            verdicts.push(Verdict {
                what: format!("{name}: p95 latency no worse than that of {rival}"),
                holds: mine <= theirs,
                numbers: format!("{mine:.3} s against {theirs:.3} s"),
            });
        }
    }
    verdicts
}
