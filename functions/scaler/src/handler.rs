//! One run: why it was woken, what it saw, what it decided, what came of it.

use std::io::Write;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use planner::boot::{Start, latest_starts};
use planner::cadence::{NEXT_PASSES, RECALL_LOOK, SECOND_LOOKS};
use planner::observation::TaskStatus;
use planner::{Observation, Plan, Policy, plan};
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

/// A start's phases are told by every run of so many seconds, in which at least one is the
/// schedule's: what is told twice changes no average.
const STARTS_TOLD_SECONDS: i64 = 60;

/// The run's metrics: what the dashboard and the alarms read. The rest is in the log line.
pub fn metric_line(record: &RunRecord, since_ms: Option<i64>, config: &Config) -> MetricLine {
    let figures = &record.plan.figures;
    let failed = record
        .outcomes
        .iter()
        .filter(|outcome| outcome.result == Completion::Failed);
    let mut line = MetricLine::new(&config.metrics_namespace)
        .dimension("QueueName", config.queue_name())
        .property("cause", record.cause.as_str())
        .property("verdict", record.plan.verdict.as_str());
    for (name, count) in [
        ("TasksWanted", figures.tasks_wanted),
        ("TasksRunning", figures.running),
        ("TasksStarting", figures.starting),
        ("Instances", figures.footprint),
        ("CrashLoop", figures.crash_loop),
        ("CapacityShortage", figures.options_resting),
        ("FailedActions", failed.count() as u32),
    ] {
        line = line.metric(name, Unit::Count, f64::from(count));
    }
    if let Some(spent) = figures.spent {
        let is_reached = spent.total() >= record.policy.max_daily_cost;
        line = line
            .metric("DollarsToday", Unit::Count, spent.total())
            .metric(
                "CostCeilingReached",
                Unit::Count,
                f64::from(u8::from(is_reached)),
            );
    }
    if let Some(since_ms) = since_ms {
        let seconds = (epoch_seconds() * 1000 - since_ms) as f64 / 1e3;
        line = line.metric("EventToDecision", Unit::Seconds, seconds.max(0.0));
    }
    let starts: Vec<Start> = latest_starts(&record.observation, STARTS_TOLD_SECONDS).collect();
    let of = |phase: fn(&Start) -> Option<i64>| {
        let seconds = starts.iter().filter_map(phase);
        seconds.map(|seconds| seconds.max(0) as f64).collect()
    };
    for (name, seconds) in [
        (
            "DecisionToInstance",
            of(|start| Some(start.running_at? - start.asked_at)),
        ),
        (
            "InstanceToRegistered",
            of(|start| Some(start.registered_at - start.running_at?)),
        ),
        (
            "RegisteredToTask",
            of(|start| Some(start.task_running_at - start.registered_at)),
        ),
    ] {
        line = line.values(name, Unit::Seconds, seconds);
    }
    line
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
