//! What exists in the local cloud: clusters, Auto Scaling groups, instances,
//! task definitions and tasks, and what each of them looks like from outside.
//!
//! Nothing here waits or starts anything; `groups` and `tasks` do.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    path::PathBuf,
    sync::Arc,
};

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use uuid::Uuid;

use super::{ApiCall, GroupConfig};

/// How many API calls are kept for inspection.
pub(crate) const CALLS_KEPT: usize = 20_000;

/// Everything, behind one lock.
#[derive(Default)]
pub(crate) struct CloudState {
    pub clusters: BTreeMap<String, ClusterState>,
    pub groups: BTreeMap<String, Group>,
    /// By EC2 instance id. Terminated instances stay, as a record.
    pub instances: BTreeMap<String, Instance>,
    /// By family; revision `n` is at index `n - 1`.
    pub definitions: BTreeMap<String, Vec<Arc<TaskDefinition>>>,
    pub inactive_definitions: BTreeSet<String>,
    /// By task id, stopped ones included while they are visible.
    pub tasks: BTreeMap<String, Task>,
    /// RunTask's client tokens, by cluster and token.
    pub client_tokens: HashMap<(String, String), ClientToken>,
    pub calls: VecDeque<ApiCall>,
    pub peak_instances: usize,
    pub peak_tasks: usize,
    next_number: u64,
}

impl CloudState {
    /// A fresh number for ids: ids stay short, unique and in order of creation.
    pub fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    /// The group's instances, those that are gone included, oldest first.
    pub fn instances_of(&self, group: &str) -> impl Iterator<Item = &Instance> {
        let of_group = self.instances.values();
        let mut instances: Vec<&Instance> = of_group.filter(|one| one.group == group).collect();
        instances.sort_by_key(|one| (one.launched_at, &one.id));
        instances.into_iter()
    }

    pub fn tasks_on<'a>(&'a self, instance_id: &'a str) -> impl Iterator<Item = &'a Task> {
        self.tasks
            .values()
            .filter(move |task| task.instance == instance_id && task.status.holds_resources())
    }

    pub fn remaining(&self, instance: &Instance) -> Resources {
        let mut left = instance.resources.clone();
        for task in self.tasks_on(&instance.id) {
            left.cpu = left.cpu.saturating_sub(task.definition.cpu);
            left.memory_mib = left.memory_mib.saturating_sub(task.definition.memory_mib);
            left.gpus.retain(|gpu| !task.gpus.contains(gpu));
        }
        left
    }

    pub fn note_peaks(&mut self) {
        let instances = self
            .instances
            .values()
            .filter(|instance| instance.lifecycle.is_live())
            .count();
        let tasks = self
            .tasks
            .values()
            .filter(|task| task.status.holds_resources())
            .count();
        self.peak_instances = self.peak_instances.max(instances);
        self.peak_tasks = self.peak_tasks.max(tasks);
    }
}

/// An ECS cluster; its container instances are found through the groups.
#[derive(Debug, Clone)]
pub struct ClusterState {
    pub name: String,
    pub arn: String,
}

/// The answer to a RunTask call, remembered for its client token.
#[derive(Debug, Clone)]
pub(crate) struct ClientToken {
    /// The request without its token, in one canonical form.
    pub request: String,
    pub response: Value,
    pub task_arns: Vec<String>,
    pub created_at: DateTime<Utc>,
}

pub(crate) struct Group {
    pub config: GroupConfig,
    pub arn: String,
    pub created_at: DateTime<Utc>,
    pub tags: BTreeMap<String, GroupTag>,
    /// Newest last.
    pub activities: Vec<Activity>,
    /// How many instances EC2 can give this group at a time; none = any number.
    pub capacity: Option<usize>,
    /// Instances launched from now on whose ECS agent never registers.
    pub never_register: usize,
    /// A retry of a failed launch is already on its way.
    pub retry_scheduled: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct GroupTag {
    pub value: String,
    pub propagate: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Activity {
    pub id: String,
    pub group: String,
    pub instance_id: Option<String>,
    pub description: String,
    pub cause: String,
    pub start: DateTime<Utc>,
    pub end: Option<DateTime<Utc>>,
    pub status: ActivityStatus,
    pub message: Option<String>,
    pub zone: String,
}

impl Activity {
    pub fn begun(group: &str, zone: &str, cause: String) -> Self {
        Self {
            id: Uuid::new_v4().to_string(),
            group: group.to_owned(),
            instance_id: None,
            description: String::new(),
            cause,
            start: Utc::now(),
            end: None,
            status: ActivityStatus::InProgress,
            message: None,
            zone: zone.to_owned(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) enum ActivityStatus {
    InProgress,
    Successful,
    Failed,
}

/// Where an instance is in its life, as Auto Scaling sees it.
///
/// `Pending → InService → Terminating → Terminated`; a launch is caused by the
/// group's desired capacity, a termination by the group, by
/// TerminateInstanceInAutoScalingGroup or by a fault (`Cloud::kill_instance`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Lifecycle {
    Pending,
    InService,
    Terminating,
    Terminated,
}

impl Lifecycle {
    /// Whether it counts towards the group's capacity, and costs money.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Pending | Self::InService)
    }
}

/// CPU units, MiB and GPUs of an instance, or what is left of them.
#[derive(Debug, Clone, Default)]
pub struct Resources {
    pub cpu: u64,
    pub memory_mib: u64,
    pub gpus: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Instance {
    pub id: String,
    pub group: String,
    pub cluster: String,
    pub instance_type: String,
    pub zone: String,
    pub lifecycle: Lifecycle,
    pub protected: bool,
    pub launched_at: DateTime<Utc>,
    pub in_service_at: Option<DateTime<Utc>>,
    pub resources: Resources,
    /// Its ECS side, once the agent has registered.
    pub registration: Option<Registration>,
    pub registers: bool,
}

/// What the ECS agent of an instance has told the cluster.
#[derive(Debug, Clone)]
pub struct Registration {
    pub arn: String,
    pub status: ContainerInstanceStatus,
    pub status_reason: Option<String>,
    pub agent_connected: bool,
    pub registered_at: DateTime<Utc>,
    pub version: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ContainerInstanceStatus {
    /// It takes new tasks.
    Active,
    /// It keeps its tasks and takes no new ones.
    Draining,
    /// It has left the cluster.
    Inactive,
}

impl Instance {
    /// Its status in the ECS cluster, once its agent has registered.
    pub fn container_status(&self) -> Option<ContainerInstanceStatus> {
        let registration = self.registration.as_ref();
        registration.map(|registration| registration.status)
    }

    pub fn is_active(&self) -> bool {
        let is_registered = self.container_status() == Some(ContainerInstanceStatus::Active);
        self.lifecycle.is_live() && is_registered
    }
}

/// A registered task definition, with what placement needs read out of it.
#[derive(Debug)]
pub struct TaskDefinition {
    pub family: String,
    pub arn: String,
    pub cpu: u64,
    pub memory_mib: u64,
    pub gpus: usize,
    /// The one essential container that is run as a process.
    pub container: Container,
}

#[derive(Debug, Clone)]
pub struct Container {
    pub name: String,
    pub image: String,
    pub command: Vec<String>,
    pub environment: BTreeMap<String, String>,
    pub stop_timeout_s: u64,
}

/// Where a task is in its life.
///
/// `PENDING → ACTIVATING → RUNNING → STOPPING → STOPPED`. RunTask puts it at the
/// start; its own runner (`tasks::live`) moves it on; StopTask, the end of its
/// process and the loss of its instance move it to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum TaskStatus {
    Pending,
    Activating,
    Running,
    /// The process has been told to stop.
    Stopping,
    /// Over.
    Stopped,
}

impl TaskStatus {
    pub(crate) fn holds_resources(self) -> bool {
        self != Self::Stopped
    }

    fn container_status(self) -> &'static str {
        match self {
            Self::Pending | Self::Activating => "PENDING",
            Self::Running | Self::Stopping => "RUNNING",
            Self::Stopped => "STOPPED",
        }
    }
}

/// Why a task has to stop; read by its runner.
#[derive(Debug, Clone)]
pub struct StopOrder {
    pub code: &'static str,
    pub reason: String,
    /// SIGTERM first; without it the process is killed at once.
    pub graceful: bool,
}

#[derive(Debug, Clone)]
pub struct Task {
    pub id: String,
    pub arn: String,
    pub cluster: ClusterState,
    pub definition: Arc<TaskDefinition>,
    pub instance: String,
    pub container_instance_arn: String,
    pub zone: String,
    pub gpus: Vec<String>,
    pub status: TaskStatus,
    pub desired_stopped: bool,
    pub started_by: Option<String>,
    pub created_at: DateTime<Utc>,
    pub pull_started_at: Option<DateTime<Utc>>,
    pub pull_stopped_at: Option<DateTime<Utc>>,
    pub started_at: Option<DateTime<Utc>>,
    pub stopping_at: Option<DateTime<Utc>>,
    pub stopped_at: Option<DateTime<Utc>>,
    pub stop_code: Option<&'static str>,
    pub stopped_reason: Option<String>,
    pub exit_code: Option<i32>,
    pub container_reason: Option<String>,
    pub version: u64,
    pub pid: Option<u32>,
    pub log: PathBuf,
    pub stop: watch::Sender<Option<StopOrder>>,
}

/// How an instant is written: ECS's API uses epoch seconds, its events ISO 8601.
#[derive(Clone, Copy)]
pub(crate) enum TimeForm {
    Epoch,
    Iso,
}

impl TimeForm {
    pub fn write(self, at: DateTime<Utc>) -> Value {
        match self {
            #[expect(
                clippy::cast_precision_loss,
                reason = "milliseconds of this century fit 53 bits"
            )]
            Self::Epoch => json!(at.timestamp_millis() as f64 / 1000.0),
            Self::Iso => json!(at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)),
        }
    }
}

impl Task {
    /// The task as DescribeTasks and the state change events show it.
    pub(crate) fn describe(&self, form: TimeForm) -> Value {
        let mut container = json!({
            "containerArn": format!("{}/{}", self.arn.replace(":task/", ":container/"), self.id),
            "taskArn": self.arn,
            "name": self.definition.container.name,
            "image": self.definition.container.image,
            "lastStatus": self.status.container_status(),
            "networkBindings": [],
            "networkInterfaces": [],
            "healthStatus": "UNKNOWN",
            "cpu": self.definition.cpu.to_string(),
            "memory": self.definition.memory_mib.to_string(),
        });
        if !self.gpus.is_empty() {
            container["gpuIds"] = json!(self.gpus);
        }
        if let Some(exit_code) = self.exit_code {
            container["exitCode"] = json!(exit_code);
        }
        if let Some(reason) = &self.container_reason {
            container["reason"] = json!(reason);
        }
        let mut task = json!({
            "attachments": [],
            "attributes": [{"name": "ecs.cpu-architecture", "value": "x86_64"}],
            "availabilityZone": self.zone,
            "clusterArn": self.cluster.arn,
            "containerInstanceArn": self.container_instance_arn,
            "connectivity": "CONNECTED",
            "containers": [container],
            "cpu": self.definition.cpu.to_string(),
            "createdAt": form.write(self.created_at),
            "desiredStatus": if self.desired_stopped { "STOPPED" } else { "RUNNING" },
            "enableExecuteCommand": false,
            "group": format!("family:{}", self.definition.family),
            "healthStatus": "UNKNOWN",
            "lastStatus": self.status,
            "launchType": "EC2",
            "memory": self.definition.memory_mib.to_string(),
            "overrides": {"containerOverrides": [], "inferenceAcceleratorOverrides": []},
            "tags": [],
            "taskArn": self.arn,
            "taskDefinitionArn": self.definition.arn,
            "version": self.version,
        });
        let object = task.as_object_mut().expect("an object was built above");
        let texts = [
            ("startedBy", self.started_by.clone()),
            ("stopCode", self.stop_code.map(str::to_owned)),
            ("stoppedReason", self.stopped_reason.clone()),
        ];
        for (name, value) in texts {
            if let Some(value) = value {
                object.insert(name.to_owned(), json!(value));
            }
        }
        let times = [
            ("pullStartedAt", self.pull_started_at),
            ("pullStoppedAt", self.pull_stopped_at),
            ("startedAt", self.started_at),
            ("stoppingAt", self.stopping_at),
            (
                "executionStoppedAt",
                self.stopped_at.filter(|_| self.started_at.is_some()),
            ),
            ("stoppedAt", self.stopped_at),
        ];
        for (name, at) in times {
            if let Some(at) = at {
                object.insert(name.to_owned(), form.write(at));
            }
        }
        task
    }
}

impl CloudState {
    /// An instance as DescribeContainerInstances and its events show it; none
    /// while its agent has not registered.
    pub fn describe_container_instance(
        &self,
        instance: &Instance,
        form: TimeForm,
    ) -> Option<Value> {
        let registration = instance.registration.as_ref()?;
        let left = self.remaining(instance);
        let count = |status: TaskStatus| {
            self.tasks_on(&instance.id)
                .filter(|task| task.status == status)
                .count()
        };
        let mut shown = json!({
            "agentConnected": registration.agent_connected,
            "attachments": [],
            "attributes": [
                {"name": "ecs.availability-zone", "value": instance.zone},
                {"name": "ecs.instance-type", "value": instance.instance_type},
                {"name": "ecs.os-type", "value": "linux"},
            ],
            "containerInstanceArn": registration.arn,
            "ec2InstanceId": instance.id,
            "pendingTasksCount": count(TaskStatus::Pending) + count(TaskStatus::Activating),
            "registeredAt": form.write(registration.registered_at),
            "registeredResources": resources(&instance.resources),
            "remainingResources": resources(&left),
            "runningTasksCount": count(TaskStatus::Running),
            "status": registration.status,
            "tags": [],
            "version": registration.version,
            "versionInfo": {"agentVersion": "1.103.0", "agentHash": "local", "dockerVersion": "DockerVersion: 25.0.14"},
        });
        if let Some(reason) = &registration.status_reason {
            shown["statusReason"] = json!(reason);
        }
        Some(shown)
    }
}

fn resources(of: &Resources) -> Value {
    let integer = |name: &str, value: u64| json!({"name": name, "type": "INTEGER", "doubleValue": 0.0, "longValue": 0, "integerValue": value});
    let set = |name: &str, values: &[String]| json!({"name": name, "type": "STRINGSET", "doubleValue": 0.0, "longValue": 0, "integerValue": 0, "stringSetValue": values});
    let mut list = vec![
        integer("CPU", of.cpu),
        integer("MEMORY", of.memory_mib),
        set(
            "PORTS",
            &[
                "22".into(),
                "2375".into(),
                "2376".into(),
                "51678".into(),
                "51679".into(),
            ],
        ),
        set("PORTS_UDP", &[]),
    ];
    list.push(set("GPU", &of.gpus));
    Value::Array(list)
}
