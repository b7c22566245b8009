//! Carries a plan out. Every action's outcome is reported; none stops the
//! others: what did not happen is planned again by the next run.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};

use crate::aws::{ApiError, Aws, UPDATE_STATE_MAX};
use crate::observe::tasks_on;
use planner::{Action, Plan};

/// What became of an action.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// The action, in short.
    pub action: String,
    /// How it went.
    pub result: OutcomeKind,
    /// Details: what was started, or what went wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Error code or failure reason, for the metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Whether a later try can succeed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transient: bool,
    /// Tasks that the action launched.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub launched: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// How an action went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OutcomeKind {
    /// All of it happened.
    Done,
    /// Some of it happened.
    Partial,
    /// The world had moved on: nothing was done, on purpose.
    Skipped,
    /// It did not happen.
    Failed,
}

impl Outcome {
    fn done(action: String, detail: impl Into<String>) -> Self {
        Self {
            action,
            result: OutcomeKind::Done,
            detail: detail.into(),
            cause: None,
            transient: false,
            launched: 0,
        }
    }

    fn failed(action: String, error: &ApiError) -> Self {
        Self {
            action,
            result: OutcomeKind::Failed,
            detail: error.to_string(),
            cause: Some(error.code.clone()),
            transient: error.failure == platform::Failure::Transient,
            launched: 0,
        }
    }

    fn of(action: String, answer: Result<(), ApiError>) -> Self {
        match answer {
            Ok(()) => Self::done(action, ""),
            Err(error) => Self::failed(action, &error),
        }
    }
}

/// Carries the plan out in its order.
pub async fn act<A: Aws>(aws: &A, plan: &Plan) -> Vec<Outcome> {
    // Releases first: they free places under the maximum. Among themselves
    // they are independent.
    let mut outcomes = release_all(aws, plan).await;
    for decision in &plan.decisions {
        let outcome = match &decision.action {
            Action::Release { .. } => continue,
            Action::StopTask { task, reason } => {
                Outcome::of(format!("stop {task}"), aws.stop_task(task, reason).await)
            }
            Action::SetDesired { group, from, to } => Outcome::of(
                format!("set {group} from {from} to {to}"),
                aws.set_desired_capacity(group, *to).await,
            ),
            Action::Activate {
                container_instance,
                instance,
            } => activate(aws, container_instance, instance).await,
            Action::RunTasks { count, token } => run_tasks(aws, count.get(), token).await,
            Action::Remember { group, key, value } => Outcome::of(
                format!("remember {key} on {group}"),
                aws.tag_group(group, key, value).await,
            ),
        };
        outcomes.push(outcome);
    }
    outcomes
}

async fn run_tasks<A: Aws>(aws: &A, count: u32, token: &str) -> Outcome {
    let action = format!("run {count} tasks");
    let answer = match aws.run_task(count, token).await {
        Ok(answer) => answer,
        Err(error) => return Outcome::failed(action, &error),
    };
    let launched = answer.started.len() as u32;
    let mut reasons: BTreeMap<&str, u32> = BTreeMap::new();
    for failure in &answer.failures {
        *reasons.entry(failure.reason.as_str()).or_default() += 1;
    }
    let mut detail = answer.started.join(" ");
    for (reason, times) in &reasons {
        if !detail.is_empty() {
            detail.push_str("; ");
        }
        detail.push_str(&format!("{times} not placed: {reason}"));
    }
    let result = match (launched, answer.failures.is_empty()) {
        (_, true) => OutcomeKind::Done,
        (0, false) => OutcomeKind::Failed,
        (_, false) => OutcomeKind::Partial,
    };
    Outcome {
        action,
        result,
        detail,
        cause: reasons.keys().next().map(|reason| (*reason).to_owned()),
        // A GPU that was not free is seen by the next run, not by asking again.
        transient: false,
        launched,
    }
}

async fn activate<A: Aws>(aws: &A, container_instance: &str, instance: &str) -> Outcome {
    let action = format!("take {instance} back into use");
    match aws
        .set_draining(&[container_instance.to_owned()], false)
        .await
    {
        Ok(failures) => match failures.first() {
            None => Outcome::done(action, ""),
            Some(failure) => Outcome {
                action,
                result: OutcomeKind::Failed,
                detail: failure.reason.clone(),
                cause: Some(failure.reason.clone()),
                transient: true,
                launched: 0,
            },
        },
        Err(error) => Outcome::failed(action, &error),
    }
}

struct Release<'a> {
    instance: &'a str,
    container_instance: Option<&'a str>,
    decrement: bool,
}

async fn release_all<A: Aws>(aws: &A, plan: &Plan) -> Vec<Outcome> {
    let releases: Vec<Release<'_>> = plan
        .actions()
        .filter_map(|action| match action {
            Action::Release {
                instance,
                container_instance,
                decrement,
                ..
            } => Some(Release {
                instance,
                container_instance: container_instance.as_deref(),
                decrement: *decrement,
            }),
            _ => None,
        })
        .collect();
    let drained = drain(aws, &releases).await;
    join_all(
        releases
            .iter()
            .map(|release| release_one(aws, release, &drained)),
    )
    .await
}

/// Drains the instances, in calls of at most ten. Answers why an instance
/// could not be drained; one that ECS does not know any more needs no draining.
async fn drain<A: Aws>(aws: &A, releases: &[Release<'_>]) -> BTreeMap<String, ApiError> {
    let arns: Vec<String> = releases
        .iter()
        .filter_map(|release| release.container_instance.map(str::to_owned))
        .collect();
    let mut refused = BTreeMap::new();
    for chunk in arns.chunks(UPDATE_STATE_MAX) {
        match aws.set_draining(chunk, true).await {
            Ok(failures) => {
                for failure in failures {
                    let Some(arn) = failure.arn else { continue };
                    if failure.reason != "MISSING" {
                        let error = ApiError {
                            operation: "ecs:UpdateContainerInstancesState",
                            code: failure.reason,
                            message: arn.clone(),
                            failure: platform::Failure::Transient,
                        };
                        refused.insert(arn, error);
                    }
                }
            }
            Err(error) => {
                for arn in chunk {
                    refused.insert(arn.clone(), error.clone());
                }
            }
        }
    }
    refused
}

async fn release_one<A: Aws>(
    aws: &A,
    release: &Release<'_>,
    refused: &BTreeMap<String, ApiError>,
) -> Outcome {
    let action = format!("drain and terminate {}", release.instance);
    if let Some(arn) = release.container_instance {
        if let Some(error) = refused.get(arn) {
            return Outcome::failed(action, error);
        }
        // Draining keeps new tasks away; one that was placed before it is
        // found here, and then the instance stays until the task is done.
        match tasks_on(aws, arn).await {
            Ok(tasks) if tasks.is_empty() => {}
            Ok(tasks) => {
                return Outcome {
                    action,
                    result: OutcomeKind::Skipped,
                    detail: format!("a task was placed on it meanwhile: {}", tasks.join(" ")),
                    cause: None,
                    transient: false,
                    launched: 0,
                };
            }
            Err(error) => return Outcome::failed(action, &error),
        }
    }
    Outcome::of(
        action,
        aws.terminate_instance(release.instance, release.decrement)
            .await,
    )
}
