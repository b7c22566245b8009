//! What a plan says. How it is made: [`crate::plan`].

use serde::{Deserialize, Serialize};

use crate::lane::Comparison;
use crate::spent::Spent;

/// Most tasks of one RunTask call (ECS API reference, RunTask, `count`).
pub const RUN_TASK_MAX_COUNT: u32 = 10;

/// A number of tasks that one RunTask call takes: 1 to [`RUN_TASK_MAX_COUNT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct LaunchCount(u32);

impl LaunchCount {
    /// `None` for a count that RunTask refuses.
    pub fn new(count: u32) -> Option<Self> {
        (1..=RUN_TASK_MAX_COUNT)
            .contains(&count)
            .then_some(Self(count))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// A count that RunTask refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("RunTask takes 1 to {RUN_TASK_MAX_COUNT} tasks, not {0}")]
pub struct LaunchCountError(u32);

impl TryFrom<u32> for LaunchCount {
    type Error = LaunchCountError;

    fn try_from(count: u32) -> Result<Self, LaunchCountError> {
        Self::new(count).ok_or(LaunchCountError(count))
    }
}

impl From<LaunchCount> for u32 {
    fn from(count: LaunchCount) -> u32 {
        count.0
    }
}

/// One thing to do. Actions are carried out in the plan's order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Action {
    /// Drain an instance that holds no task, then terminate it.
    Release {
        /// Its group.
        group: String,
        /// Its EC2 identifier.
        instance: String,
        /// Its ECS ARN; `None` when it never registered.
        container_instance: Option<String>,
        /// Whether the group's DesiredCapacity falls with it.
        decrement: bool,
    },
    /// Stop a task: one that is not RUNNING yet, or one too many.
    StopTask {
        /// Its ARN.
        task: String,
        /// What ECS is told.
        reason: String,
    },
    /// Set a group's DesiredCapacity.
    SetDesired {
        /// The group.
        group: String,
        /// What it is.
        from: u32,
        /// What it should be.
        to: u32,
    },
    /// Take a draining instance back into use.
    Activate {
        /// Its ECS ARN.
        container_instance: String,
        /// Its EC2 identifier.
        instance: String,
    },
    /// Launch tasks on instances that stand ready.
    RunTasks {
        /// How many.
        count: LaunchCount,
        /// Makes a repeated call the same call.
        token: String,
    },
    /// Open or close the express lane.
    SetLane {
        /// Whether it should take messages.
        open: bool,
    },
    /// Write the scaler's memory.
    Remember {
        /// The group whose tag it is.
        group: String,
        /// Tag key.
        key: String,
        /// Tag value.
        value: String,
    },
}

/// An action and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What to do.
    #[serde(flatten)]
    pub action: Action,
    /// Why.
    pub why: String,
}

/// The numbers behind a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Visible, in-flight and delayed messages.
    pub backlog: u64,
    /// Images per second of one task, as planned with.
    pub images_per_second: f64,
    /// Seconds from asking for an instance to its first vector, as planned with.
    #[serde(default)]
    pub boot_seconds: f64,
    /// Whether that was learned from a start that was seen.
    #[serde(default)]
    pub boot_is_learned: bool,
    /// Backlog left when an instance asked for now would begin.
    pub backlog_after_boot: u64,
    /// Tasks that the backlog wants.
    pub tasks_wanted: u32,
    /// Instances that should exist.
    pub instances_wanted: u32,
    /// Tasks at work.
    pub running: u32,
    /// Tasks on their way to RUNNING.
    pub starting: u32,
    /// Tasks on their way out.
    pub stopping: u32,
    /// Tasks that ECS still shows on instances that are gone.
    pub lost: u32,
    /// Instances that take a task at once.
    pub ready: u32,
    /// Instances that have not registered yet.
    pub booting: u32,
    /// Instances asked for that the group has not begun.
    pub requested: u32,
    /// Instances being drained.
    pub draining: u32,
    /// Instances that are registered but take no task.
    pub unusable: u32,
    /// Instances on their way out.
    pub terminating: u32,
    /// Instances that count against the maximum.
    pub footprint: u32,
    /// Failed launches in a row.
    pub crash_loop: u32,
    /// Capacity options without capacity at the moment.
    pub options_resting: u32,
    /// Tasks stuck before RUNNING.
    pub stuck_tasks: u32,
    /// The backlog in the lane and on GPUs, in seconds and dollars.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Comparison>,
    /// What was spent since midnight UTC, where there is a ceiling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spent: Option<Spent>,
}

/// What to do, and why nothing else.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The decision in one sentence.
    pub verdict: String,
    /// Actions in the order in which to carry them out.
    pub decisions: Vec<Decision>,
    /// What else was seen and led to no action.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The numbers behind it.
    pub figures: Figures,
    /// Whether it gives something up that was asked for, because the queue is
    /// empty. One count is not enough for that: SQS's are approximate.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub calls_back: bool,
}

impl Plan {
    /// The actions alone.
    pub fn actions(&self) -> impl Iterator<Item = &Action> {
        self.decisions.iter().map(|decision| &decision.action)
    }

    /// Whether it stops a task, so that an instance can go soon.
    pub fn stops_a_task(&self) -> bool {
        self.actions()
            .any(|action| matches!(action, Action::StopTask { .. }))
    }

    /// Tasks that the plan launches.
    pub fn launches(&self) -> u32 {
        self.actions()
            .map(|action| match action {
                Action::RunTasks { count, .. } => count.get(),
                _ => 0,
            })
            .sum()
    }
}
