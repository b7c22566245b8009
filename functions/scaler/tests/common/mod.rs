//! A small AWS that enforces AWS's own limits: RunTask's count, Describe's
//! hundred, List's pages, UpdateContainerInstancesState's ten, tokens,
//! MaxSize, MinSize, GPU slots.

// Each test crate uses its own part of it.
#![allow(dead_code)]

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use planner::observation::{
    Activity, ActivityKind, ActivityStatus, ContainerInstance, ContainerInstanceStatus, Group,
    GroupInstance, LaneState, Lifecycle, Queue, Task, TaskStatus,
};
use platform::aws::Error;
use platform::env::Reader;
use scaler::aws::{
    Aws, DESCRIBE_MAX, LaneMetrics, LaneUsage, Metrics, Page, RunTaskAnswer, TaskFilter,
    UPDATE_STATE_MAX,
};
use scaler::config::Config;

/// ECS's page size.
const PAGE: usize = 100;

pub fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

/// A configuration with one group `gpu` (and `spare`, when two are asked for).
pub fn config(max_instances: u32, options: usize) -> Config {
    let list: Vec<String> = ["gpu", "spare"][..options]
        .iter()
        .map(|name| format!(r#"{{"name":"{name}","autoScalingGroup":"{name}"}}"#))
        .collect();
    let values: HashMap<&str, String> = HashMap::from([
        ("INPUT_QUEUE_URL", "http://sqs/1/input".to_owned()),
        ("ECS_CLUSTER", "clip".to_owned()),
        ("TASK_DEFINITION", "gpu-task".to_owned()),
        ("CAPACITY_OPTIONS", format!("[{}]", list.join(","))),
        ("MAX_INSTANCES", max_instances.to_string()),
        // 1 image/s and 1 s to drain: a task a message.
        ("IMAGES_PER_SECOND", "1".to_owned()),
        ("TARGET_DRAIN_SECONDS", "1".to_owned()),
    ]);
    Config::read(&Reader::new(move |name| values.get(name).cloned())).expect("a valid environment")
}

#[derive(Default)]
pub struct State {
    pub queue: Queue,
    /// Counts that the next reads answer instead, in order.
    pub stale_counts: Vec<u64>,
    pub metrics: Option<Metrics>,
    pub gpu_queue: Queue,
    pub lane_state: LaneState,
    pub lane_metrics: LaneMetrics,
    pub lane_usage: LaneUsage,
    pub working_minutes: Vec<i64>,
    pub tasks: Vec<Task>,
    pub instances: Vec<ContainerInstance>,
    pub groups: Vec<Group>,
    pub activities: BTreeMap<String, Vec<Activity>>,
    /// Error codes that the next calls of an operation answer.
    pub errors: HashMap<&'static str, Vec<&'static str>>,
    /// Operations that always fail.
    pub broken: Vec<&'static str>,
    /// A task is placed on every instance in the moment before it is drained.
    pub place_before_drain: bool,
    /// All calls, in order.
    pub calls: Vec<String>,
    tokens: HashMap<String, (u32, RunTaskAnswer)>,
    next_task: u32,
}

impl State {
    /// An instance that stands ready in `group`, registered `age` seconds ago.
    pub fn add_instance(&mut self, group: &str, id: &str, age: i64) {
        self.instances.push(ContainerInstance {
            arn: format!("ci/{id}"),
            instance_id: id.to_owned(),
            status: ContainerInstanceStatus::Active,
            agent_connected: true,
            registered_at: Some(now() - age),
            version: 1,
            gpus: 1,
            free_gpus: 1,
        });
        self.add_to_group(group, id);
    }

    /// An instance of the group that has not registered.
    pub fn add_to_group(&mut self, group: &str, id: &str) {
        let group = self.group(group);
        group.instances.push(GroupInstance {
            id: id.to_owned(),
            state: Lifecycle::InService,
            healthy: true,
            zone: "a".to_owned(),
            instance_type: "g4dn.xlarge".to_owned(),
        });
        group.desired = group.desired.max(group.instances.len() as u32);
    }

    pub fn group(&mut self, name: &str) -> &mut Group {
        self.groups
            .iter_mut()
            .find(|group| group.name == name)
            .expect("a known group")
    }

    /// What the group was asked for registers.
    pub fn boot_all(&mut self, group: &str) {
        let desired = self.group(group).desired;
        for number in self.group(group).instances.len() as u32..desired {
            self.add_instance(group, &format!("i-{group}{number}"), 0);
        }
    }

    /// A task on an instance.
    pub fn add_task(&mut self, instance: &str, status: TaskStatus, started_ago: i64) -> String {
        self.next_task += 1;
        let arn = format!("task/{}", self.next_task);
        let container_instance = format!("ci/{instance}");
        self.tasks.push(Task {
            arn: arn.clone(),
            status,
            stopping: status == TaskStatus::Stopped,
            container_instance: Some(container_instance.clone()),
            created_at: Some(now() - started_ago - 60),
            started_at: (!status.is_starting()).then(|| now() - started_ago),
            stopped_at: (status == TaskStatus::Stopped).then(now),
            stop_code: None,
            stop_reason: None,
            exit_code: None,
        });
        if status != TaskStatus::Stopped
            && let Some(registered) = self
                .instances
                .iter_mut()
                .find(|known| known.arn == container_instance)
        {
            registered.free_gpus = 0;
            registered.version += 1;
        }
        arn
    }

    pub fn running(&self) -> usize {
        self.tasks
            .iter()
            .filter(|task| task.status != TaskStatus::Stopped)
            .count()
    }

    pub fn calls_of(&self, operation: &str) -> Vec<String> {
        self.calls
            .iter()
            .filter(|call| call.starts_with(operation))
            .cloned()
            .collect()
    }
}

pub struct FakeAws {
    pub state: Mutex<State>,
}

impl FakeAws {
    /// Empty groups of the given maximum.
    pub fn new(max: u32, groups: &[&str]) -> Self {
        let state = State {
            groups: groups
                .iter()
                .map(|name| Group {
                    name: (*name).to_owned(),
                    max,
                    ..Group::default()
                })
                .collect(),
            ..State::default()
        };
        Self {
            state: Mutex::new(state),
        }
    }

    pub fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().expect("no test panics inside"))
    }

    /// Counts the call and answers an error that was planned for it.
    fn call(&self, operation: &'static str, what: String) -> Result<(), Error> {
        self.with(|state| {
            state.calls.push(format!("{operation} {what}"));
            let planned = state
                .errors
                .get_mut(operation)
                .and_then(|codes| (!codes.is_empty()).then(|| codes.remove(0)));
            let code = planned.or_else(|| {
                state
                    .broken
                    .contains(&operation)
                    .then_some("InternalFailure")
            });
            match code {
                Some(code) => Err(error(operation, code)),
                None => Ok(()),
            }
        })
    }
}

pub fn error(operation: &'static str, code: &str) -> Error {
    Error::of_code(operation, code, "as the test wants it")
}

fn page_of(all: Vec<String>, page: Option<String>) -> Page<String> {
    let from: usize = page.and_then(|token| token.parse().ok()).unwrap_or(0);
    let to = (from + PAGE).min(all.len());
    Page {
        items: all[from..to].to_vec(),
        next: (to < all.len()).then(|| to.to_string()),
    }
}

#[async_trait]
impl Aws for FakeAws {
    async fn queue(&self) -> Result<Queue, Error> {
        self.call("GetQueueAttributes", String::new())?;
        Ok(self.with(|state| {
            if state.stale_counts.is_empty() {
                state.queue.clone()
            } else {
                Queue {
                    visible: state.stale_counts.remove(0),
                    ..Queue::default()
                }
            }
        }))
    }

    async fn metrics(&self, _now: i64) -> Result<Metrics, Error> {
        self.call("GetMetricData", String::new())?;
        Ok(self.with(|state| state.metrics.unwrap_or_default()))
    }

    async fn gpu_queue(&self) -> Result<Queue, Error> {
        self.call("GetQueueAttributes", "gpu".to_owned())?;
        Ok(self.with(|state| state.gpu_queue.clone()))
    }

    async fn lane_state(&self) -> Result<LaneState, Error> {
        self.call("GetEventSourceMapping", String::new())?;
        Ok(self.with(|state| state.lane_state))
    }

    async fn lane_metrics(&self, _now: i64) -> Result<LaneMetrics, Error> {
        self.call("GetMetricData", "lane".to_owned())?;
        Ok(self.with(|state| state.lane_metrics))
    }

    async fn lane_usage(&self, _now: i64) -> Result<LaneUsage, Error> {
        self.call("GetMetricData", "usage".to_owned())?;
        Ok(self.with(|state| state.lane_usage))
    }

    async fn set_lane(&self, open: bool) -> Result<(), Error> {
        self.call("UpdateEventSourceMapping", open.to_string())?;
        self.with(|state| {
            state.lane_state = if open {
                LaneState::Opening
            } else {
                LaneState::Closing
            };
        });
        Ok(())
    }

    async fn working_minutes(&self, _now: i64) -> Result<Vec<i64>, Error> {
        self.call("GetMetricData", "deleted".to_owned())?;
        Ok(self.with(|state| state.working_minutes.clone()))
    }

    async fn list_tasks(
        &self,
        filter: &TaskFilter,
        page: Option<String>,
    ) -> Result<Page<String>, Error> {
        self.call("ListTasks", format!("{filter:?}"))?;
        Ok(self.with(|state| {
            let arns = state
                .tasks
                .iter()
                .filter(|task| match filter {
                    TaskFilter::Wanted => !task.stopping,
                    TaskFilter::Unwanted => task.stopping,
                    TaskFilter::WantedOn(arn) => {
                        !task.stopping && task.container_instance.as_ref() == Some(arn)
                    }
                })
                .map(|task| task.arn.clone())
                .collect();
            page_of(arns, page)
        }))
    }

    async fn describe_tasks(&self, arns: &[String]) -> Result<Vec<Task>, Error> {
        self.call("DescribeTasks", arns.len().to_string())?;
        if arns.len() > DESCRIBE_MAX || arns.is_empty() {
            return Err(error("DescribeTasks", "InvalidParameterException"));
        }
        Ok(self.with(|state| {
            state
                .tasks
                .iter()
                .filter(|task| arns.contains(&task.arn))
                .cloned()
                .collect()
        }))
    }

    async fn list_container_instances(&self, page: Option<String>) -> Result<Page<String>, Error> {
        self.call("ListContainerInstances", String::new())?;
        let arns = self.with(|state| {
            state
                .instances
                .iter()
                .map(|instance| instance.arn.clone())
                .collect()
        });
        Ok(page_of(arns, page))
    }

    async fn describe_container_instances(
        &self,
        arns: &[String],
    ) -> Result<Vec<ContainerInstance>, Error> {
        self.call("DescribeContainerInstances", arns.len().to_string())?;
        if arns.len() > DESCRIBE_MAX || arns.is_empty() {
            return Err(error(
                "DescribeContainerInstances",
                "InvalidParameterException",
            ));
        }
        Ok(self.with(|state| {
            state
                .instances
                .iter()
                .filter(|instance| arns.contains(&instance.arn))
                .cloned()
                .collect()
        }))
    }

    async fn describe_groups(
        &self,
        names: &[String],
        page: Option<String>,
    ) -> Result<Page<Group>, Error> {
        self.call("DescribeAutoScalingGroups", String::new())?;
        // A page a group: the caller must walk them.
        let from: usize = page.and_then(|token| token.parse().ok()).unwrap_or(0);
        Ok(self.with(|state| {
            let all: Vec<Group> = state
                .groups
                .iter()
                .filter(|group| names.contains(&group.name))
                .cloned()
                .collect();
            Page {
                items: all.get(from).cloned().into_iter().collect(),
                next: (from + 1 < all.len()).then(|| (from + 1).to_string()),
            }
        }))
    }

    async fn describe_activities(&self, group: &str) -> Result<Vec<Activity>, Error> {
        self.call("DescribeScalingActivities", group.to_owned())?;
        Ok(self.with(|state| state.activities.get(group).cloned().unwrap_or_default()))
    }

    async fn describe_warm_pool(&self, group: &str) -> Result<u32, Error> {
        self.call("DescribeWarmPool", group.to_owned())?;
        Ok(0)
    }

    async fn run_task(&self, count: u32, token: &str) -> Result<RunTaskAnswer, Error> {
        self.call("RunTask", format!("{count} {token}"))?;
        if count == 0 || count > 10 || token.len() > 64 {
            return Err(error("RunTask", "InvalidParameterException"));
        }
        self.with(|state| {
            if let Some((known, answer)) = state.tokens.get(token) {
                return if *known == count {
                    Ok(answer.clone())
                } else {
                    Err(error("RunTask", "ConflictException"))
                };
            }
            let mut answer = RunTaskAnswer::default();
            for _ in 0..count {
                let free = state
                    .instances
                    .iter()
                    .find(|instance| {
                        instance.free_gpus > 0
                            && instance.agent_connected
                            && instance.status == ContainerInstanceStatus::Active
                    })
                    .map(|instance| instance.instance_id.clone());
                match free {
                    Some(id) => {
                        let arn = state.add_task(&id, TaskStatus::Pending, 0);
                        answer.started.push(arn);
                    }
                    None => answer.failures.push(error("RunTask", "RESOURCE:GPU")),
                }
            }
            state
                .tokens
                .insert(token.to_owned(), (count, answer.clone()));
            Ok(answer)
        })
    }

    async fn stop_task(&self, task: &str, reason: &str) -> Result<(), Error> {
        self.call("StopTask", format!("{task} {reason}"))?;
        self.with(|state| {
            for known in state.tasks.iter_mut().filter(|known| known.arn == task) {
                known.stopping = true;
                known.status = TaskStatus::Stopped;
                known.stopped_at = Some(now());
                known.stop_code = Some("UserInitiated".to_owned());
                known.stop_reason = Some(reason.to_owned());
            }
        });
        Ok(())
    }

    async fn set_draining(&self, arns: &[String], draining: bool) -> Result<Vec<Error>, Error> {
        self.call(
            "UpdateContainerInstancesState",
            format!("{draining} {arns:?}"),
        )?;
        if arns.len() > UPDATE_STATE_MAX || arns.is_empty() {
            return Err(error(
                "UpdateContainerInstancesState",
                "InvalidParameterException",
            ));
        }
        Ok(self.with(|state| {
            let mut failures = Vec::new();
            for arn in arns {
                let Some(position) = state.instances.iter().position(|known| known.arn == *arn)
                else {
                    failures
                        .push(error("UpdateContainerInstancesState", "MISSING").of(arn.clone()));
                    continue;
                };
                if state.place_before_drain && draining {
                    let id = state.instances[position].instance_id.clone();
                    state.add_task(&id, TaskStatus::Pending, 0);
                }
                state.instances[position].status = if draining {
                    ContainerInstanceStatus::Draining
                } else {
                    ContainerInstanceStatus::Active
                };
            }
            failures
        }))
    }

    async fn set_desired_capacity(&self, group: &str, desired: u32) -> Result<(), Error> {
        self.call("SetDesiredCapacity", format!("{group} {desired}"))?;
        self.with(|state| {
            let group = state.group(group);
            if desired > group.max || desired < group.min {
                return Err(error("SetDesiredCapacity", "ValidationError"));
            }
            group.desired = desired;
            Ok(())
        })
    }

    async fn terminate_instance(&self, id: &str, decrement: bool) -> Result<(), Error> {
        self.call(
            "TerminateInstanceInAutoScalingGroup",
            format!("{id} {decrement}"),
        )?;
        self.with(|state| {
            let mut found = false;
            for group in &mut state.groups {
                let before = group.instances.len();
                if group.instances.iter().any(|known| known.id == id) {
                    if decrement && group.desired <= group.min {
                        return Err(error(
                            "TerminateInstanceInAutoScalingGroup",
                            "ValidationError",
                        ));
                    }
                    group.instances.retain(|known| known.id != id);
                    found |= group.instances.len() < before;
                    if decrement {
                        group.desired -= 1;
                    }
                }
            }
            state.instances.retain(|known| known.instance_id != id);
            if found {
                Ok(())
            } else {
                Err(error(
                    "TerminateInstanceInAutoScalingGroup",
                    "ValidationError",
                ))
            }
        })
    }

    async fn tag_group(&self, group: &str, key: &str, value: &str) -> Result<(), Error> {
        self.call("CreateOrUpdateTags", format!("{group} {key} {value}"))?;
        self.with(|state| {
            state
                .group(group)
                .tags
                .insert(key.to_owned(), value.to_owned())
        });
        Ok(())
    }
}

pub fn launch(id: Option<&str>, ago: i64, status: ActivityStatus, message: &str) -> Activity {
    Activity {
        kind: ActivityKind::Launch,
        instance: id.map(str::to_owned),
        started_at: now() - ago,
        ended_at: None,
        status,
        message: (!message.is_empty()).then(|| message.to_owned()),
    }
}
