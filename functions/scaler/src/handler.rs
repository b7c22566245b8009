//! One run: why it was woken, what it saw, what it decided, what came of it.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use planner::cadence::{NEXT_PASSES, RECALL_LOOK, SECOND_LOOKS};
use planner::observation::TaskStatus;
use planner::{Action, Observation, Plan, Policy, plan};
use platform::metrics::{MetricLine, Unit};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::act::{ActionOutcome, Completion, act};
use crate::aws::Aws;
use crate::config::Config;
use crate::observe::{ObserveError, observe};

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

    pub fn text(&self) -> &str {
        match self {
            Self::Work(text) | Self::Other(text) => text,
        }
    }
}

/// What a run leaves behind: the structured log line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RunRecord {
    /// Always `scaler run`, to find the line by.
    pub message: String,
    pub cause: String,
    pub observation: Observation,
    pub policy: Policy,
    pub plan: Plan,
    pub outcomes: Vec<ActionOutcome>,
    /// Milliseconds from the wake to the decision.
    pub decision_ms: u64,
}

/// Observes, plans and acts; again, a few seconds later, for what failed and
/// can succeed. The record is the last pass's that could see, with every pass's
/// outcomes. An error means that no pass could read what is essential, and
/// nothing was done.
pub async fn run<A: Aws>(
    aws: &A,
    config: &Config,
    cause: &Cause,
) -> Result<RunRecord, ObserveError> {
    let mut latest = one_pass(aws, config, cause).await;
    let mut outcomes = Vec::new();
    for wait in NEXT_PASSES {
        if latest
            .as_ref()
            .is_ok_and(|record| !deserves_another_pass(record))
        {
            break;
        }
        tokio::time::sleep(wait).await;
        match one_pass(aws, config, cause).await {
            Ok(record) => {
                if let Ok(before) = std::mem::replace(&mut latest, Ok(record)) {
                    outcomes.extend(before.outcomes);
                }
            }
            Err(error) if latest.is_err() => latest = Err(error),
            Err(_) => {}
        }
    }
    let mut record = latest?;
    outcomes.append(&mut record.outcomes);
    Ok(RunRecord { outcomes, ..record })
}

fn deserves_another_pass(record: &RunRecord) -> bool {
    let can_succeed = record
        .outcomes
        .iter()
        .any(|outcome| outcome.result == Completion::Failed && outcome.transient);
    can_succeed || record.plan.stops_a_task()
}

async fn one_pass<A: Aws>(
    aws: &A,
    config: &Config,
    cause: &Cause,
) -> Result<RunRecord, ObserveError> {
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
    Ok(RunRecord {
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
        .all(|task| task.stopping || task.status == TaskStatus::Stopped);
    matches!(cause, Cause::Work(_)) && observation.queue.backlog() == 0 && nothing_runs
}

fn epoch_seconds() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

/// Writes the run's log line, as one JSON object, to standard error.
pub fn log(record: &RunRecord) {
    let Ok(mut line) = serde_json::to_string(record) else {
        return;
    };
    line.push('\n');
    // Nobody reading the log is no reason to fail.
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// The run's metrics, one line per set of dimensions.
pub fn metric_lines(record: &RunRecord, config: &Config) -> Vec<MetricLine> {
    let RunRecord {
        plan,
        outcomes,
        observation,
        ..
    } = record;
    let figures = &plan.figures;
    let failed = outcomes
        .iter()
        .filter(|outcome| outcome.result == Completion::Failed);
    let launched: u32 = outcomes.iter().map(|outcome| outcome.launched).sum();
    let (requested, released) = capacity_changes(plan);
    let new_line =
        || MetricLine::new(&config.metrics_namespace).dimension("QueueName", config.queue_name());
    let mut main = new_line()
        .property("cause", record.cause.as_str())
        .property("verdict", plan.verdict.as_str());
    for (name, count) in [
        ("TasksWanted", figures.tasks_wanted),
        ("TasksRunning", figures.running),
        ("TasksStarting", figures.starting),
        ("TasksStuck", figures.stuck_tasks),
        ("InstancesWanted", figures.instances_wanted),
        ("Instances", figures.footprint),
        ("TasksLaunched", launched),
        ("InstancesRequested", requested),
        ("InstancesReleased", released),
        ("CrashLoop", figures.crash_loop),
        ("CapacityShortage", figures.options_resting),
        ("FailedActions", failed.count() as u32),
    ] {
        main = main.metric(name, Unit::Count, f64::from(count));
    }
    main = main
        .metric("Backlog", Unit::Count, figures.backlog as f64)
        .metric(
            "DecisionLatency",
            Unit::Milliseconds,
            record.decision_ms as f64,
        );
    if let Some(spent) = figures.spent {
        let is_reached = spent.total() >= record.policy.max_daily_cost;
        main = main
            .metric("DollarsToday", Unit::Count, spent.total())
            .metric(
                "CostCeilingReached",
                Unit::Count,
                f64::from(u8::from(is_reached)),
            );
    }
    if let Some(age) = observation.queue.oldest_age {
        main = main.metric("OldestMessageAge", Unit::Seconds, age as f64);
    }
    let mut lines = vec![main];
    for (cause, times) in failures_by_cause(record) {
        let line = new_line().dimension("Cause", &cause);
        lines.push(line.metric("Failures", Unit::Count, f64::from(times)));
    }
    lines
}

/// Instances that the plan asks for, and those that it gives back.
fn capacity_changes(plan: &Plan) -> (u32, u32) {
    let (mut requested, mut released) = (0, 0);
    for action in plan.actions() {
        match action {
            Action::SetDesired { from, to, .. } => requested += to.saturating_sub(*from),
            Action::Release { .. } => released += 1,
            _ => {}
        }
    }
    (requested, released)
}

/// Failures of this run: actions that did not happen, by error code; failed
/// launches; capacity that is not there.
fn failures_by_cause(record: &RunRecord) -> BTreeMap<String, u32> {
    let mut causes: BTreeMap<String, u32> = BTreeMap::new();
    for cause in record
        .outcomes
        .iter()
        .filter_map(|outcome| outcome.cause.as_ref())
    {
        *causes.entry(cause.clone()).or_default() += 1;
    }
    let figures = &record.plan.figures;
    for (cause, count) in [
        ("FailedLaunch", figures.crash_loop),
        ("NoCapacity", figures.options_resting),
    ] {
        if count > 0 {
            causes.insert(cause.to_owned(), count);
        }
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
