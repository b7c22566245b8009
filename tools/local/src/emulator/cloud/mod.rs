//! The local cloud: Auto Scaling groups with boot delays and limited capacity,
//! container instances with GPU slots, and ECS tasks that are real processes.
//!
//! [`Cloud`] is a handle; its API doors (`super::ecs`, `super::autoscaling`)
//! are served over HTTP by `super::server`. Faults are injected through the
//! handle: capacity that is not there, instances that never register, tasks and
//! instances that die, API calls that fail.

mod faults;
pub(crate) mod groups;
mod instance_types;
pub(crate) mod state;
pub(crate) mod tasks;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, OnceLock},
    time::Duration,
};

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use ministack::{ACCOUNT, process};

use super::{
    ecs::{self, Refusal},
    server,
};
pub(crate) use faults::Faults;
pub use faults::{ApiFault, ApiFaultKind};
pub use instance_types::InstanceType;
use state::{CloudState, ClusterState, TimeForm};
pub use state::{ContainerInstanceStatus, Instance, Lifecycle, Task, TaskStatus};

/// Events that a slow listener may be behind before it misses some.
const EVENT_BUFFER: usize = 8192;

/// How long each step takes. The defaults are short enough to watch; on AWS an
/// instance takes one to three minutes from launch to registration.
#[derive(Debug, Clone)]
pub struct Timings {
    /// From the launch of an instance to InService.
    pub instance_launch: Duration,
    /// From InService to its registration in the ECS cluster.
    pub instance_register: Duration,
    /// From the order to terminate an instance until it is gone.
    pub instance_terminate: Duration,
    /// Between a launch that failed for lack of capacity and the next attempt.
    pub capacity_retry: Duration,
    /// PENDING: pulling the container image.
    pub image_pull: Duration,
    /// How long a stopped task stays visible (ECS: at least one hour).
    pub stopped_task_retention: Duration,
}

impl Default for Timings {
    fn default() -> Self {
        Self {
            instance_launch: Duration::from_millis(1500),
            instance_register: Duration::from_millis(1000),
            instance_terminate: Duration::from_millis(500),
            capacity_retry: Duration::from_secs(10),
            image_pull: Duration::from_millis(300),
            stopped_task_retention: Duration::from_secs(3600),
        }
    }
}

impl Timings {
    /// For tests: every step takes a few milliseconds.
    pub fn fast() -> Self {
        Self {
            instance_launch: Duration::from_millis(40),
            instance_register: Duration::from_millis(40),
            instance_terminate: Duration::from_millis(40),
            capacity_retry: Duration::from_millis(150),
            image_pull: Duration::from_millis(20),
            ..Self::default()
        }
    }
}

#[derive(Debug, Clone)]
pub struct ImageProgram {
    /// The program that the image's entry point runs.
    pub program: PathBuf,
    /// Variables that on AWS come from the image, the instance or the task role
    /// (library paths, credentials, endpoints); the task definition's own
    /// environment comes on top.
    pub environment: BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
pub struct GroupConfig {
    pub name: String,
    pub cluster: String,
    pub instance_type: String,
    /// Spot instead of On-Demand: only the wording of failures differs.
    pub spot: bool,
    pub min: usize,
    pub max: usize,
    pub desired: usize,
    /// Availability zones, used in turn.
    pub zones: Vec<String>,
    pub protect_new_instances: bool,
    /// Scale-in takes the newest instance first (`NewestInstance`), not the oldest.
    pub newest_first: bool,
}

impl GroupConfig {
    /// A group from zero with one zone.
    pub fn new(name: &str, cluster: &str, instance_type: &str, max: usize) -> Self {
        Self {
            name: name.to_owned(),
            cluster: cluster.to_owned(),
            instance_type: instance_type.to_owned(),
            spot: false,
            min: 0,
            max,
            desired: 0,
            zones: vec!["us-east-1a".to_owned()],
            protect_new_instances: false,
            newest_first: false,
        }
    }
}

#[derive(Debug, Clone)]
pub struct CloudConfig {
    pub region: String,
    pub timings: Timings,
    pub images: BTreeMap<String, ImageProgram>,
    /// Where each task's output goes, one file per task.
    pub log_dir: PathBuf,
}

#[derive(Debug, Clone)]
pub struct AwsEvent {
    /// `aws.ecs` or `aws.autoscaling`.
    pub source: &'static str,
    pub detail_type: &'static str,
    pub resources: Vec<String>,
    pub time: DateTime<Utc>,
    pub detail: Value,
}

impl AwsEvent {
    /// The whole event, in the form that targets receive.
    pub fn envelope(&self, region: &str) -> Value {
        json!({
            "version": "0",
            "id": Uuid::new_v4().to_string(),
            "detail-type": self.detail_type,
            "source": self.source,
            "account": ACCOUNT,
            "time": self.time.to_rfc3339_opts(chrono::SecondsFormat::Secs, true),
            "region": region,
            "resources": self.resources,
            "detail": self.detail,
        })
    }
}

#[derive(Debug, Clone)]
pub struct ApiCall {
    pub at: DateTime<Utc>,
    pub operation: String,
    pub request: Value,
    pub error: Option<String>,
}

#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Every task that is still visible, stopped ones included, oldest first.
    pub tasks: Vec<Task>,
    pub instances: Vec<Instance>,
    pub peak_tasks: usize,
    pub peak_instances: usize,
}

impl Snapshot {
    pub fn live_tasks(&self) -> usize {
        self.tasks
            .iter()
            .filter(|task| task.status != TaskStatus::Stopped)
            .count()
    }

    pub fn live_instances(&self) -> usize {
        self.instances
            .iter()
            .filter(|instance| instance.lifecycle != Lifecycle::Terminated)
            .count()
    }
}

/// A handle on the local cloud; clones share it. When the last one is dropped,
/// or on [`Cloud::shut_down`], every task's process is killed.
#[derive(Clone)]
pub struct Cloud {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub config: CloudConfig,
    pub faults: Faults,
    state: Mutex<CloudState>,
    timings: Mutex<Timings>,
    events: broadcast::Sender<AwsEvent>,
    endpoint: OnceLock<String>,
    pub cancel: CancellationToken,
    pub runners: TaskTracker,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.cancel.cancel();
        let state = self.state.get_mut();
        kill_tasks(state.unwrap_or_else(std::sync::PoisonError::into_inner));
    }
}

fn kill_tasks(state: &CloudState) {
    for pid in state.tasks.values().filter_map(|task| task.pid) {
        process::kill(pid);
    }
}

impl Cloud {
    /// An empty cloud. Must be called inside a Tokio runtime.
    pub fn new(config: CloudConfig) -> Self {
        let (events, _) = broadcast::channel(EVENT_BUFFER);
        let timings = config.timings.clone();
        Self {
            inner: Arc::new(Inner {
                config,
                faults: Faults::default(),
                state: Mutex::default(),
                timings: Mutex::new(timings),
                events,
                endpoint: OnceLock::new(),
                cancel: CancellationToken::new(),
                runners: TaskTracker::new(),
            }),
        }
    }

    /// Serves ECS and Auto Scaling on a free port of 127.0.0.1 and answers their
    /// common endpoint (`AWS_ENDPOINT_URL_ECS`, `AWS_ENDPOINT_URL_AUTO_SCALING`).
    pub async fn serve(&self) -> std::io::Result<String> {
        if let Some(endpoint) = self.inner.endpoint.get() {
            return Ok(endpoint.clone());
        }
        let address = server::serve(self).await?;
        Ok(self
            .inner
            .endpoint
            .get_or_init(|| format!("http://{address}"))
            .clone())
    }

    pub fn create_cluster(&self, name: &str) -> String {
        let arn = self.arn("ecs", &format!("cluster/{name}"));
        let cluster = ClusterState {
            name: name.to_owned(),
            arn: arn.clone(),
        };
        self.lock().clusters.insert(name.to_owned(), cluster);
        arn
    }

    /// Creates an Auto Scaling group; its first instances start at once.
    pub fn create_group(&self, config: GroupConfig) {
        groups::create(self, config);
    }

    /// Registers a task definition, as RegisterTaskDefinition would.
    pub fn register_task_definition(&self, definition: &Value) -> Result<String, Refusal> {
        ecs::register_task_definition(self, definition)
    }

    /// DeregisterTaskDefinition: tasks of it go on, and no new one starts.
    pub fn deregister_task_definition(&self, arn: &str) {
        self.lock().inactive_definitions.insert(arn.to_owned());
    }

    /// Events from now on.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<AwsEvent> {
        self.inner.events.subscribe()
    }

    pub fn snapshot(&self) -> Snapshot {
        let state = self.lock();
        let mut tasks: Vec<Task> = state.tasks.values().cloned().collect();
        tasks.sort_by(|a, b| (a.created_at, &a.id).cmp(&(b.created_at, &b.id)));
        let mut instances: Vec<Instance> = state.instances.values().cloned().collect();
        instances.sort_by(|a, b| (a.launched_at, &a.id).cmp(&(b.launched_at, &b.id)));
        Snapshot {
            tasks,
            instances,
            peak_tasks: state.peak_tasks,
            peak_instances: state.peak_instances,
        }
    }

    /// Every API call so far (the latest 20,000).
    pub fn calls(&self) -> Vec<ApiCall> {
        self.lock().calls.iter().cloned().collect()
    }

    pub fn set_timings(&self, timings: Timings) {
        *self
            .inner
            .timings
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = timings;
    }

    /// Fault: EC2 can give this group at most `instances` at a time (none: any
    /// number). Launches beyond that fail as InsufficientInstanceCapacity does.
    pub fn set_capacity(&self, group: &str, instances: Option<usize>) {
        if let Some(group) = self.lock().groups.get_mut(group) {
            group.capacity = instances;
        }
        groups::reconcile(self, group);
    }

    /// Fault: the next `count` instances of the group never register in ECS.
    pub fn set_never_register(&self, group: &str, count: usize) {
        if let Some(group) = self.lock().groups.get_mut(group) {
            group.never_register = count;
        }
    }

    /// Fault: an instance is lost, with its tasks, without warning. Its group
    /// replaces it, since its desired capacity is unchanged.
    pub fn kill_instance(&self, instance_id: &str) -> bool {
        groups::lose(self, instance_id)
    }

    /// Fault: SIGKILL to a task's process. False when it has none.
    pub fn kill_task(&self, task_id: &str) -> bool {
        let pid = self.lock().tasks.get(task_id).and_then(|task| task.pid);
        pid.is_some_and(process::kill)
    }

    /// Fault: API calls that fail. Several can be active; see [`ApiFault`].
    pub fn inject(&self, fault: ApiFault) {
        self.inner.faults.add(fault);
    }

    pub fn clear_api_faults(&self) {
        self.inner.faults.clear();
    }

    /// Kills every task at once, without waiting.
    pub fn kill_everything(&self) {
        self.inner.cancel.cancel();
        kill_tasks(&self.lock());
    }

    /// Kills every task and waits until their processes are gone.
    pub async fn shut_down(&self) {
        self.inner.cancel.cancel();
        self.inner.runners.close();
        self.inner.runners.wait().await;
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, CloudState> {
        // A panic while the lock is held is a bug in a rule; the state is still
        // whole enough for the rest of a test to report what it saw.
        self.inner
            .state
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn timings(&self) -> Timings {
        self.inner
            .timings
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    pub(crate) fn region(&self) -> &str {
        &self.inner.config.region
    }

    pub(crate) fn arn(&self, service: &str, resource: &str) -> String {
        format!("arn:aws:{service}:{}:{ACCOUNT}:{resource}", self.region())
    }

    pub(crate) fn publish(&self, event: AwsEvent) {
        // No listener is no fault: tests of the API alone have none.
        let _ = self.inner.events.send(event);
    }

    /// Runs something later, unless the cloud is shut down before. It holds the
    /// cloud weakly while it waits, so that a forgotten timer keeps nothing alive.
    pub(crate) fn later(&self, delay: Duration, act: impl FnOnce(&Cloud) + Send + 'static) {
        let weak = Arc::downgrade(&self.inner);
        let cancel = self.inner.cancel.clone();
        self.inner.runners.spawn(async move {
            tokio::select! {
                () = cancel.cancelled() => {}
                () = tokio::time::sleep(delay) => {
                    if let Some(inner) = weak.upgrade() {
                        act(&Cloud { inner });
                    }
                }
            }
        });
    }

    /// Publishes the present state of a task, as a new version of it.
    pub(crate) fn publish_task(&self, task_id: &str) {
        let mut state = self.lock();
        state.note_peaks();
        let Some(task) = state.tasks.get_mut(task_id) else {
            return;
        };
        task.version += 1;
        let (arn, detail) = (task.arn.clone(), task.describe(TimeForm::Iso));
        drop(state);
        self.publish_of_ecs("ECS Task State Change", arn, detail);
    }

    /// Publishes the present state of a container instance, as a new version.
    pub(crate) fn publish_container_instance(&self, instance_id: &str) {
        let mut state = self.lock();
        let instance = state.instances.get_mut(instance_id);
        let registration = instance.and_then(|instance| instance.registration.as_mut());
        let Some(registration) = registration else {
            return;
        };
        registration.version += 1;
        let arn = registration.arn.clone();
        let instance = &state.instances[instance_id];
        let cluster = format!("cluster/{}", instance.cluster);
        let Some(mut detail) = state.describe_container_instance(instance, TimeForm::Iso) else {
            return;
        };
        drop(state);
        detail["clusterArn"] = json!(self.arn("ecs", &cluster));
        detail["accountType"] = json!("task");
        self.publish_of_ecs("ECS Container Instance State Change", arn, detail);
    }

    fn publish_of_ecs(&self, detail_type: &'static str, arn: String, mut detail: Value) {
        let time = Utc::now();
        detail["updatedAt"] = TimeForm::Iso.write(time);
        self.publish(AwsEvent {
            source: "aws.ecs",
            detail_type,
            resources: vec![arn],
            time,
            detail,
        });
    }
}
