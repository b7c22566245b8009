//! Carries a plan out. Every action's outcome is reported; none stops the
//! others: what did not happen is planned again by the next run.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use planner::{Action, Plan};
use platform::aws::Error;
use serde::{Deserialize, Serialize};

use crate::aws::{Aws, UPDATE_STATE_MAX};
use crate::observe::tasks_on;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ActionOutcome {
    pub action: String,
    pub result: Completion,
    /// What was started, or what went wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub detail: String,
    /// Error code or failure reason, for the metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Whether a later try can succeed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub transient: bool,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub launched: u32,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

/// How much of an action happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Completion {
    /// All of it.
    #[default]
    Done,
    /// Some of it.
    Partial,
    /// None, on purpose: the world had moved on.
    Skipped,
    /// None.
    Failed,
}

impl ActionOutcome {
    fn failed(action: String, error: &Error) -> Self {
        Self {
            action,
            result: Completion::Failed,
            detail: error.to_string(),
            cause: Some(error.code.clone()),
            transient: error.failure == platform::Failure::Transient,
            launched: 0,
        }
    }

    fn of(action: String, answer: Result<(), Error>) -> Self {
        match answer {
            Ok(()) => Self {
                action,
                ..Self::default()
            },
            Err(error) => Self::failed(action, &error),
        }
    }
}

pub async fn act<A: Aws>(aws: &A, plan: &Plan) -> Vec<ActionOutcome> {
    // Releases first: they free places under the maximum. Among themselves
    // they are independent.
    let refused = drain(aws, plan).await;
    let releases = plan.actions().filter_map(|action| match action {
        Action::Release {
            instance,
            container_instance,
            decrement,
            ..
        } => Some(release(
            aws,
            instance,
            container_instance.as_deref(),
            *decrement,
            &refused,
        )),
        _ => None,
    });
    let mut outcomes = join_all(releases).await;
    for action in plan.actions() {
        let outcome = match action {
            Action::Release { .. } => continue,
            Action::StopTask { task, reason } => {
                ActionOutcome::of(format!("stop {task}"), aws.stop_task(task, reason).await)
            }
            Action::SetDesired { group, from, to } => ActionOutcome::of(
                format!("set {group} from {from} to {to}"),
                aws.set_desired_capacity(group, *to).await,
            ),
            Action::Activate {
                container_instance,
                instance,
            } => activate(aws, container_instance, instance).await,
            Action::RunTasks { count, token } => run_tasks(aws, count.get(), token).await,
            Action::SetLane { open } => ActionOutcome::of(
                format!("{} the express lane", if *open { "open" } else { "close" }),
                aws.set_lane(*open).await,
            ),
            Action::Remember { group, key, value } => ActionOutcome::of(
                format!("remember {key} on {group}"),
                aws.tag_group(group, key, value).await,
            ),
        };
        outcomes.push(outcome);
    }
    outcomes
}

async fn run_tasks<A: Aws>(aws: &A, count: u32, token: &str) -> ActionOutcome {
    let action = format!("run {count} tasks");
    let answer = match aws.run_task(count, token).await {
        Ok(answer) => answer,
        Err(error) => return ActionOutcome::failed(action, &error),
    };
    let launched = answer.started.len() as u32;
    let mut reasons: BTreeMap<String, u32> = BTreeMap::new();
    for failure in answer.failures {
        *reasons.entry(failure.code).or_default() += 1;
    }
    let not_placed = reasons
        .iter()
        .map(|(reason, times)| format!("{times} not placed: {reason}"));
    let started = Some(answer.started.join(" ")).filter(|arns| !arns.is_empty());
    let details: Vec<String> = started.into_iter().chain(not_placed).collect();
    ActionOutcome {
        action,
        result: match (launched, reasons.is_empty()) {
            (_, true) => Completion::Done,
            (0, false) => Completion::Failed,
            (_, false) => Completion::Partial,
        },
        detail: details.join("; "),
        cause: reasons.into_keys().next(),
        // A GPU that was not free is seen by the next run, not by asking again.
        transient: false,
        launched,
    }
}

async fn activate<A: Aws>(aws: &A, container_instance: &str, instance: &str) -> ActionOutcome {
    let answer = aws
        .set_draining(&[container_instance.to_owned()], false)
        .await;
    let answer = answer.and_then(|failures| match failures.into_iter().next() {
        Some(failure) => Err(failure),
        None => Ok(()),
    });
    ActionOutcome::of(format!("take {instance} back into use"), answer)
}

/// Drains the instances that are released, in calls of at most ten. Answers
/// why one could not be drained; one that ECS does not know any more needs no
/// draining.
async fn drain<A: Aws>(aws: &A, plan: &Plan) -> BTreeMap<String, Error> {
    let arns: Vec<String> = plan
        .actions()
        .filter_map(|action| match action {
            Action::Release {
                container_instance, ..
            } => container_instance.clone(),
            _ => None,
        })
        .collect();
    let mut refused = BTreeMap::new();
    for chunk in arns.chunks(UPDATE_STATE_MAX) {
        match aws.set_draining(chunk, true).await {
            Ok(failures) => {
                let failures = failures
                    .into_iter()
                    .filter(|failure| failure.code != "MISSING");
                refused.extend(failures.filter_map(|failure| {
                    let arn = failure.resource.as_deref()?.to_owned();
                    Some((arn, failure))
                }));
            }
            Err(error) => refused.extend(chunk.iter().map(|arn| (arn.clone(), error.clone()))),
        }
    }
    refused
}

async fn release<A: Aws>(
    aws: &A,
    instance: &str,
    container_instance: Option<&str>,
    decrement: bool,
    refused: &BTreeMap<String, Error>,
) -> ActionOutcome {
    let action = format!("drain and terminate {instance}");
    if let Some(arn) = container_instance {
        if let Some(error) = refused.get(arn) {
            return ActionOutcome::failed(action, error);
        }
        // Draining keeps new tasks away; one that was placed before it is
        // found here, and then the instance stays until the task is done.
        match tasks_on(aws, arn).await {
            Ok(tasks) if tasks.is_empty() => {}
            Ok(tasks) => {
                return ActionOutcome {
                    action,
                    result: Completion::Skipped,
                    detail: format!("a task was placed on it meanwhile: {}", tasks.join(" ")),
                    ..ActionOutcome::default()
                };
            }
            Err(error) => return ActionOutcome::failed(action, &error),
        }
    }
    ActionOutcome::of(action, aws.terminate_instance(instance, decrement).await)
}
