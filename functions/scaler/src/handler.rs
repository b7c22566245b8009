//! One run: why it was woken, what it saw, what it decided, what came of it.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use platform::metrics::{MetricLine, Unit};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::act::{Outcome, OutcomeKind, act};
use crate::aws::Aws;
use crate::config::Config;
use crate::observe::{ObserveError, observe};
use planner::Observation;
use planner::Policy;
use planner::history;
use planner::{Action, Plan, plan};

/// Waits before another look at a queue that seems empty though somebody says
/// that work came: SQS's counts are approximate and lag behind a send.
const SECOND_LOOKS: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// Wait before something on its way is called back for an empty queue: one
/// count that is wrong for a moment must not cost a start.
const RECALL_LOOK: Duration = Duration::from_secs(2);

/// Waits before another pass when a call failed that can succeed, or when a
/// task was stopped whose instance can go at once: the schedule's minute is
/// long when an instance is paid for.
const NEXT_PASSES: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(8)];

/// Who woke the scaler. Only for the log, and for one more look at the queue:
/// what is decided depends on the observation alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Intake sent messages.
    Work(String),
    /// ECS, Auto Scaling, the schedule or a person.
    Other(String),
}

impl Cause {
    /// Reads any event. None is refused.
    pub fn of(event: &Value) -> Self {
        let word = |name: &str| event.get(name).and_then(Value::as_str);
        match (word("detail-type"), word("source")) {
            (Some(kind), Some(source)) => Self::Other(format!("{source}: {kind}")),
            (Some(kind), None) => Self::Other(kind.to_owned()),
            _ => {
                let cause = word("cause").or_else(|| word("source")).unwrap_or("invoke");
                Self::Work(cause.to_owned())
            }
        }
    }

    /// For the log.
    pub fn text(&self) -> &str {
        match self {
            Self::Work(text) | Self::Other(text) => text,
        }
    }
}

/// What a run leaves behind: the structured log line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Always `scaler run`, to find the line by.
    pub message: String,
    /// Who woke it.
    pub cause: String,
    /// What it saw.
    pub observation: Observation,
    /// The rules.
    pub policy: Policy,
    /// What it decided.
    pub plan: Plan,
    /// What came of it.
    pub outcomes: Vec<Outcome>,
    /// Milliseconds from the wake to the decision.
    pub decision_ms: u64,
}

/// Observes, plans and acts; again, a few seconds later, for what failed and
/// can succeed. The report is the last pass's, with every pass's outcomes. An
/// error means that no pass could read what is essential, and nothing was done.
pub async fn run<A: Aws>(aws: &A, config: &Config, cause: &Cause) -> Result<Report, ObserveError> {
    let mut waits = NEXT_PASSES.iter();
    let mut earlier: Vec<Outcome> = Vec::new();
    let mut last_report = None;
    loop {
        let pass = one_pass(aws, config, cause).await;
        let (again, failure) = match pass {
            Ok(mut report) => {
                let again = deserves_another_pass(&report);
                earlier.append(&mut report.outcomes);
                last_report = Some(report);
                (again, None)
            }
            Err(error) => (true, Some(error)),
        };
        let wait = waits.next().filter(|_| again);
        match (wait, failure, last_report.take()) {
            (Some(wait), _, kept) => {
                last_report = kept;
                tokio::time::sleep(*wait).await;
            }
            (None, _, Some(mut report)) => {
                report.outcomes = earlier;
                return Ok(report);
            }
            (None, Some(error), None) => return Err(error),
            // A pass ends with a report or an error.
            (None, None, None) => unreachable!("a pass without report and error"),
        }
    }
}

fn deserves_another_pass(report: &Report) -> bool {
    let can_succeed = report
        .outcomes
        .iter()
        .any(|outcome| outcome.result == OutcomeKind::Failed && outcome.transient);
    let frees_an_instance = report
        .plan
        .actions()
        .any(|action| matches!(action, Action::StopTask { .. }));
    can_succeed || frees_an_instance
}

async fn one_pass<A: Aws>(aws: &A, config: &Config, cause: &Cause) -> Result<Report, ObserveError> {
    let began = Instant::now();
    let mut looks = SECOND_LOOKS.iter();
    let mut recall_looks = [RECALL_LOOK].iter();
    let mut waited = Duration::ZERO;
    let (observation, plan) = loop {
        let observation = observe(aws, &config.policy, epoch_seconds()).await?;
        let plan = plan(&observation, &config.policy);
        let wait = if deserves_second_look(cause, &observation) {
            looks.next()
        } else if plan.calls_back {
            recall_looks.next()
        } else {
            None
        };
        let Some(wait) = wait else {
            break (observation, plan);
        };
        tokio::time::sleep(*wait).await;
        waited += *wait;
    };
    let decision_ms = (began.elapsed().saturating_sub(waited)).as_millis() as u64;
    let outcomes = act(aws, &plan).await;
    Ok(Report {
        message: "scaler run".to_owned(),
        cause: cause.text().to_owned(),
        observation,
        policy: config.policy.clone(),
        plan,
        outcomes,
        decision_ms,
    })
}

/// Somebody says that work came, nothing shows it, and nothing runs that would
/// find it.
fn deserves_second_look(cause: &Cause, observation: &Observation) -> bool {
    let nothing_runs = observation
        .tasks
        .iter()
        .all(|task| task.stopping || task.status == planner::observation::TaskStatus::Stopped);
    matches!(cause, Cause::Work(_)) && observation.queue.backlog() == 0 && nothing_runs
}

fn epoch_seconds() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

/// Writes the run's log line, as one JSON object, to standard error.
pub fn log(report: &Report) {
    let Ok(mut line) = serde_json::to_string(report) else {
        return;
    };
    line.push('\n');
    let mut stderr = std::io::stderr().lock();
    // Nobody reading the log is no reason to fail.
    let _ = stderr.write_all(line.as_bytes());
}

/// The run's metrics, one line per set of dimensions.
pub fn metric_lines(report: &Report, config: &Config) -> Vec<MetricLine> {
    let figures = &report.plan.figures;
    let failed = report
        .outcomes
        .iter()
        .filter(|outcome| outcome.result == OutcomeKind::Failed)
        .count();
    let launched: u32 = report.outcomes.iter().map(|outcome| outcome.launched).sum();
    let count = |number: u32| f64::from(number);
    let new_line =
        || MetricLine::new(&config.metrics_namespace).dimension("QueueName", config.queue_name());
    let mut main = new_line()
        .property("cause", report.cause.as_str())
        .property("verdict", report.plan.verdict.as_str())
        .metric("Backlog", Unit::Count, figures.backlog as f64)
        .metric("TasksWanted", Unit::Count, count(figures.tasks_wanted))
        .metric("TasksRunning", Unit::Count, count(figures.running))
        .metric("TasksStarting", Unit::Count, count(figures.starting))
        .metric("TasksStuck", Unit::Count, count(figures.stuck_tasks))
        .metric(
            "InstancesWanted",
            Unit::Count,
            count(figures.instances_wanted),
        )
        .metric("Instances", Unit::Count, count(figures.footprint))
        .metric("TasksLaunched", Unit::Count, count(launched))
        .metric(
            "InstancesRequested",
            Unit::Count,
            count(requested(&report.plan)),
        )
        .metric(
            "InstancesReleased",
            Unit::Count,
            count(released(&report.plan)),
        )
        .metric("CrashLoop", Unit::Count, count(figures.crash_loop))
        .metric(
            "CapacityShortage",
            Unit::Count,
            count(figures.options_resting),
        )
        .metric("FailedActions", Unit::Count, failed as f64)
        .metric(
            "DecisionLatency",
            Unit::Milliseconds,
            report.decision_ms as f64,
        );
    if let Some(age) = report.observation.queue.oldest_age {
        main = main.metric("OldestMessageAge", Unit::Seconds, age as f64);
    }
    let mut lines = vec![main];
    for (cause, times) in failures_by_cause(report) {
        lines.push(new_line().dimension("Cause", &cause).metric(
            "Failures",
            Unit::Count,
            count(times),
        ));
    }
    lines
}

fn requested(plan: &Plan) -> u32 {
    plan.actions()
        .map(|action| match action {
            Action::SetDesired { from, to, .. } => to.saturating_sub(*from),
            _ => 0,
        })
        .sum()
}

fn released(plan: &Plan) -> u32 {
    plan.actions()
        .filter(|action| matches!(action, Action::Release { .. }))
        .count() as u32
}

/// Failures of this run: actions that did not happen, by error code; failed
/// launches; capacity that is not there.
fn failures_by_cause(report: &Report) -> BTreeMap<String, u32> {
    let mut causes: BTreeMap<String, u32> = BTreeMap::new();
    for outcome in &report.outcomes {
        if let Some(cause) = &outcome.cause {
            *causes.entry(cause.clone()).or_default() += 1;
        }
    }
    let figures = &report.plan.figures;
    if figures.crash_loop > 0 {
        causes.insert("FailedLaunch".to_owned(), figures.crash_loop);
    }
    let short = report
        .observation
        .groups
        .iter()
        .filter(|group| history::rest(group, report.observation.at).is_some())
        .count() as u32;
    if short > 0 {
        causes.insert("NoCapacity".to_owned(), short);
    }
    causes
}

/// The metric line of a run that could not observe.
pub fn blind_line(error: &ObserveError, config: &Config) -> MetricLine {
    MetricLine::new(&config.metrics_namespace)
        .dimension("QueueName", config.queue_name())
        .dimension("Cause", "CannotObserve")
        .property("error", error.to_string())
        .metric("Failures", Unit::Count, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn any_event_has_a_cause() {
        for (event, cause) in [
            (
                json!({"source": "aws.ecs", "detail-type": "ECS Task State Change"}),
                Cause::Other("aws.ecs: ECS Task State Change".to_owned()),
            ),
            (
                json!({"source": "aws.events", "detail-type": "Scheduled Event"}),
                Cause::Other("aws.events: Scheduled Event".to_owned()),
            ),
            (json!({"cause": "intake"}), Cause::Work("intake".to_owned())),
            (json!(null), Cause::Work("invoke".to_owned())),
            (json!([1, 2]), Cause::Work("invoke".to_owned())),
        ] {
            assert_eq!(Cause::of(&event), cause);
        }
    }
}
