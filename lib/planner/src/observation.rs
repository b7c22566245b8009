//! What one run sees. Times are seconds since the Unix epoch; the same JSON is
//! in the log line and is what `scaler explain` reads.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Everything that the planner may know.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Observation {
    /// When it was taken.
    pub at: i64,
    /// The input queue.
    pub queue: Queue,
    /// How fast messages arrived lately, when CloudWatch knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrivals: Option<Arrivals>,
    /// Images per second of one busy task, as tasks reported lately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub images_per_second: Option<f64>,
    /// Seconds from a task's start to its first vector, as tasks reported lately.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_vector_seconds: Option<f64>,
    /// Full minutes of the last hour, by their beginning, in which messages were
    /// deleted, which is what a task does with an image that is done. Read only
    /// when a task's end has to be judged by it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_minutes: Option<Vec<i64>>,
    /// The cluster's tasks but for those of services, of whatever definition,
    /// STOPPED ones included as long as ECS shows them.
    #[serde(default)]
    pub tasks: Vec<Task>,
    /// The cluster's container instances.
    #[serde(default)]
    pub container_instances: Vec<ContainerInstance>,
    /// The Auto Scaling groups of the policy's options, as far as they exist.
    #[serde(default)]
    pub groups: Vec<Group>,
    /// The express lane, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lane: Option<Lane>,
    /// What could not be read and is not essential.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing: Vec<String>,
}

/// Messages sent per second over the last full minutes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Arrivals {
    /// What every one of the last three minutes had: it goes on.
    pub sustained: f64,
    /// What the busiest of the last five minutes had: it may come again.
    pub highest: f64,
}

impl Arrivals {
    /// From the messages sent in each of the last full minutes, newest first.
    pub fn from_minutes(minutes: &[f64]) -> Self {
        let per_second = |minute: &f64| minute.max(0.0) / 60.0;
        let sustained = if minutes.len() >= SUSTAINED_MINUTES {
            minutes[..SUSTAINED_MINUTES]
                .iter()
                .map(per_second)
                .fold(f64::INFINITY, f64::min)
        } else {
            0.0
        };
        Self {
            sustained,
            highest: minutes
                .iter()
                .take(HIGHEST_MINUTES)
                .map(per_second)
                .fold(0.0, f64::max),
        }
    }
}

/// Minutes that make a rate sustained: a single burst fills one or two.
pub const SUSTAINED_MINUTES: usize = 3;

/// Minutes whose busiest one counts.
pub const HIGHEST_MINUTES: usize = 5;

/// SQS's approximate counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Queue {
    /// Messages that a receive would return.
    pub visible: u64,
    /// Messages received and not yet deleted.
    #[serde(default)]
    pub in_flight: u64,
    /// Messages that become visible later.
    #[serde(default)]
    pub delayed: u64,
    /// Age of the oldest message in seconds, when CloudWatch knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_age: Option<u64>,
}

impl Queue {
    /// All work that is not done: in-flight messages are work too, since the
    /// task that holds them can die.
    pub fn backlog(&self) -> u64 {
        self.visible
            .saturating_add(self.in_flight)
            .saturating_add(self.delayed)
    }
}

/// The express lane: a function that takes from the same input queue.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Lane {
    /// What it handed over or gave up: only GPUs take from this queue.
    pub gpu_queue: Queue,
    /// Whether it takes messages.
    pub state: LaneState,
    /// Billed seconds of one image when there is a backlog, as reported lately.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds_per_image: Option<f64>,
    /// Images that it finished in the last full minutes, when that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub images_lately: Option<u64>,
    /// Its running time since midnight UTC, in seconds.
    pub seconds_today: f64,
    /// Its invocations since midnight UTC.
    pub requests_today: f64,
}

/// States of the mapping from the queue to the lane's function (AWS Lambda API
/// reference, GetEventSourceMapping, `State`). A change takes up to a minute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum LaneState {
    /// It takes messages.
    Open,
    /// It will.
    Opening,
    /// It will not much longer.
    Closing,
    /// It takes none.
    Closed,
    /// Open, but a person has set the function's reserved concurrency to 0, which
    /// is how all invocations are stopped at once.
    Throttled,
    /// Not known: work is not counted twice, so it counts as open.
    #[default]
    Unknown,
}

impl LaneState {
    /// Reads Lambda's word.
    pub fn from_lambda(word: &str) -> Self {
        match word {
            "Enabled" => Self::Open,
            "Enabling" | "Creating" => Self::Opening,
            "Disabling" => Self::Closing,
            "Disabled" => Self::Closed,
            _ => Self::Unknown,
        }
    }

    /// Whether it takes messages or will.
    pub fn is_open(self) -> bool {
        !matches!(self, Self::Closing | Self::Closed)
    }
}

/// A task of ours.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Task {
    /// Its ARN.
    pub arn: String,
    /// ECS's last status.
    pub status: TaskStatus,
    /// ECS has been told to stop it.
    #[serde(default)]
    pub stopping: bool,
    /// The container instance that holds it, once placed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container_instance: Option<String>,
    /// When RunTask made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<i64>,
    /// When it became RUNNING.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<i64>,
    /// When its container ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stopped_at: Option<i64>,
    /// ECS's stop code, such as `TaskFailedToStart`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_code: Option<String>,
    /// Why it stopped, in ECS's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<String>,
    /// Exit code of its container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
}

impl Task {
    /// Whether it works or will: it starts or runs, and nobody stops it.
    pub fn gives_capacity(&self) -> bool {
        !self.stopping && (self.status.is_starting() || self.status == TaskStatus::Running)
    }
}

/// ECS's task states
/// (<https://docs.aws.amazon.com/AmazonECS/latest/developerguide/task-lifecycle-explanation.html>).
/// ECS alone moves a task from one to the next; RunTask and StopTask ask for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum TaskStatus {
    /// ECS prepares (network interface, or waits for a managed-scaling provider).
    Provisioning,
    /// Waits for the agent: image pull, container creation.
    #[default]
    Pending,
    /// Last steps before RUNNING.
    Activating,
    /// The container runs.
    Running,
    /// First steps of stopping.
    Deactivating,
    /// Waits for the container to end.
    Stopping,
    /// ECS tidies up.
    Deprovisioning,
    /// Over.
    Stopped,
}

impl TaskStatus {
    /// Reads ECS's word; an unknown one counts as starting, which neither
    /// launches nor gives back anything.
    pub fn from_ecs(word: &str) -> Self {
        match word {
            "PROVISIONING" => Self::Provisioning,
            "ACTIVATING" => Self::Activating,
            "RUNNING" => Self::Running,
            "DEACTIVATING" => Self::Deactivating,
            "STOPPING" => Self::Stopping,
            "DEPROVISIONING" => Self::Deprovisioning,
            "STOPPED" | "DELETED" => Self::Stopped,
            _ => Self::Pending,
        }
    }

    /// Before RUNNING.
    pub fn is_starting(self) -> bool {
        matches!(self, Self::Provisioning | Self::Pending | Self::Activating)
    }
}

/// An instance as ECS sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ContainerInstance {
    /// Its ARN in ECS.
    pub arn: String,
    /// Its EC2 instance.
    pub instance_id: String,
    /// Whether ECS places tasks on it.
    pub status: ContainerInstanceStatus,
    /// Whether its agent is connected.
    pub agent_connected: bool,
    /// When it registered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registered_at: Option<i64>,
    /// ECS's counter of its changes.
    #[serde(default)]
    pub version: i64,
    /// GPUs it registered.
    #[serde(default)]
    pub gpus: u32,
    /// GPUs that no task holds.
    #[serde(default)]
    pub free_gpus: u32,
}

impl ContainerInstance {
    /// Whether some task holds a GPU, be it one that nobody lists.
    pub fn holds_gpu(&self) -> bool {
        self.free_gpus < self.gpus
    }
}

/// ECS's container instance states, as far as they matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum ContainerInstanceStatus {
    /// Takes tasks.
    Active,
    /// Takes no new task (the scaler asked for it).
    Draining,
    /// Anything else: on its way in or out.
    Other,
}

impl ContainerInstanceStatus {
    /// Reads ECS's word.
    pub fn from_ecs(word: &str) -> Self {
        match word {
            "ACTIVE" => Self::Active,
            "DRAINING" => Self::Draining,
            _ => Self::Other,
        }
    }
}

/// An Auto Scaling group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Group {
    /// Its name.
    pub name: String,
    /// DesiredCapacity.
    pub desired: u32,
    /// MinSize.
    #[serde(default)]
    pub min: u32,
    /// MaxSize.
    pub max: u32,
    /// Its instances.
    #[serde(default)]
    pub instances: Vec<GroupInstance>,
    /// Its latest scaling activities.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub activities: Vec<Activity>,
    /// Instances ready in its warm pool, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm_pool: Option<u32>,
    /// The scaler's own tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
}

/// An instance as its group sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupInstance {
    /// EC2's identifier.
    pub id: String,
    /// Where in its life it is.
    pub state: Lifecycle,
    /// Auto Scaling's health check.
    #[serde(default = "yes")]
    pub healthy: bool,
    /// Availability zone.
    #[serde(default)]
    pub zone: String,
    /// Instance type.
    #[serde(default)]
    pub instance_type: String,
}

fn yes() -> bool {
    true
}

/// Auto Scaling's lifecycle states, folded to what matters here
/// (<https://docs.aws.amazon.com/autoscaling/ec2/userguide/ec2-auto-scaling-lifecycle.html>).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lifecycle {
    /// Being launched.
    Pending,
    /// Part of the group.
    InService,
    /// On its way out, and paid for until it is gone.
    Terminating,
    /// Standby, detached and the like: not the scaler's to use.
    Other,
}

impl Lifecycle {
    /// Reads Auto Scaling's word.
    pub fn from_auto_scaling(word: &str) -> Self {
        if word.starts_with("Pending") {
            Self::Pending
        } else if word == "InService" {
            Self::InService
        } else if word.starts_with("Terminat") {
            Self::Terminating
        } else {
            Self::Other
        }
    }
}

/// One scaling activity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// What it did.
    pub kind: ActivityKind,
    /// The instance that its description names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// When it began.
    pub started_at: i64,
    /// When it was over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<i64>,
    /// How it stands.
    pub status: ActivityStatus,
    /// Auto Scaling's words, for a failure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// Kinds of scaling activities.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActivityKind {
    /// An instance is launched.
    Launch,
    /// An instance is terminated.
    Terminate,
    /// Anything else.
    Other,
}

impl ActivityKind {
    /// Reads an activity's description, such as
    /// `Launching a new EC2 instance: i-0123`.
    pub fn from_description(description: &str) -> Self {
        if description.starts_with("Launching") {
            Self::Launch
        } else if description.starts_with("Terminating") {
            Self::Terminate
        } else {
            Self::Other
        }
    }
}

/// How a scaling activity stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActivityStatus {
    /// Done.
    Successful,
    /// Failed.
    Failed,
    /// Given up.
    Cancelled,
    /// Under way.
    InProgress,
}

impl ActivityStatus {
    /// Reads Auto Scaling's word.
    pub fn from_auto_scaling(word: &str) -> Self {
        match word {
            "Successful" => Self::Successful,
            "Failed" => Self::Failed,
            "Cancelled" => Self::Cancelled,
            _ => Self::InProgress,
        }
    }
}

impl Activity {
    /// A launch for which there was capacity.
    pub fn is_launch_that_works(&self) -> bool {
        let works = matches!(
            self.status,
            ActivityStatus::Successful | ActivityStatus::InProgress
        );
        self.kind == ActivityKind::Launch && works && self.instance.is_some()
    }

    /// A launch for which there was no capacity, no quota or no permission.
    /// A cancelled launch without a complaint is one that was withdrawn.
    pub fn is_failed_launch(&self) -> bool {
        if self.kind != ActivityKind::Launch {
            return false;
        }
        match self.status {
            ActivityStatus::Failed => true,
            ActivityStatus::Cancelled => self.message.as_deref().is_some_and(|message| {
                let message = message.to_ascii_lowercase();
                ["capacity", "limit", "fail", "insufficient"]
                    .iter()
                    .any(|word| message.contains(word))
            }),
            _ => false,
        }
    }

    /// The instance that a description such as
    /// `Terminating EC2 instance: i-0123` names.
    pub fn instance_in(description: &str) -> Option<String> {
        description
            .split(|c: char| c.is_whitespace() || c == ':' || c == ',' || c == '.')
            .find(|word| word.starts_with("i-") && word.len() > 2)
            .map(str::to_owned)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_activity_names_its_instance() {
        assert_eq!(
            Activity::instance_in("Launching a new EC2 instance: i-0abc12"),
            Some("i-0abc12".to_owned())
        );
        assert_eq!(Activity::instance_in("Launching a new EC2 instance"), None);
    }

    #[test]
    fn a_withdrawn_launch_is_no_failure() {
        let mut activity = Activity {
            kind: ActivityKind::Launch,
            instance: None,
            started_at: 0,
            ended_at: None,
            status: ActivityStatus::Cancelled,
            message: None,
        };
        assert!(!activity.is_failed_launch());
        activity.message = Some("Insufficient capacity in all zones".to_owned());
        assert!(activity.is_failed_launch());
        activity.kind = ActivityKind::Terminate;
        assert!(!activity.is_failed_launch());
    }

    #[test]
    fn every_lifecycle_word_has_a_place() {
        for (word, state) in [
            ("Pending", Lifecycle::Pending),
            ("Pending:Wait", Lifecycle::Pending),
            ("InService", Lifecycle::InService),
            ("Terminating:Proceed", Lifecycle::Terminating),
            ("Terminated", Lifecycle::Terminating),
            ("Standby", Lifecycle::Other),
        ] {
            assert_eq!(Lifecycle::from_auto_scaling(word), state, "{word}");
        }
    }

    #[test]
    fn a_single_burst_is_not_sustained() {
        let arrivals = Arrivals::from_minutes(&[0.0, 6000.0, 0.0, 0.0, 0.0]);
        assert_eq!((arrivals.sustained, arrivals.highest), (0.0, 100.0));
        let steady = Arrivals::from_minutes(&[60.0, 120.0, 90.0]);
        assert_eq!((steady.sustained, steady.highest), (1.0, 2.0));
        assert_eq!(Arrivals::from_minutes(&[60.0]).sustained, 0.0);
    }

    #[test]
    fn a_missing_field_has_its_default() {
        let observation: Observation =
            serde_json::from_str(r#"{"at":1,"queue":{"visible":3}}"#).expect("valid JSON");
        assert_eq!(observation.queue.backlog(), 3);
        assert!(observation.tasks.is_empty());
    }
}
