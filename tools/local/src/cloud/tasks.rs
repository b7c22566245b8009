//! Tasks: placement on instances, and the life of each as a real process.

use std::{sync::Arc, sync::Weak, time::Duration};

use chrono::Utc;
use serde_json::{Value, json};
use tokio::{process::Child, sync::watch};
use uuid::Uuid;

use super::{
    Cloud, ImageProgram, Inner,
    state::{Instance, State, StopOrder, Task, TaskDefinition, TaskStatus},
};
use crate::process;

/// What a RunTask or StartTask call wants of each of its tasks.
#[derive(Clone)]
pub(crate) struct Order {
    pub cluster: String,
    pub cluster_arn: String,
    pub definition: Arc<TaskDefinition>,
    pub capacity_provider: Option<String>,
    pub started_by: Option<String>,
    pub group: String,
    pub overrides: Value,
    pub tags: Value,
}

/// Why an instance cannot take a task, in the words of RunTask's `failures`.
pub(crate) fn obstacle(
    state: &State,
    instance: &Instance,
    definition: &TaskDefinition,
) -> Option<&'static str> {
    if !instance
        .registration
        .as_ref()
        .is_some_and(|registration| registration.agent_connected)
    {
        return Some("AGENT");
    }
    let left = state.remaining(instance);
    // The scarcest first: a busy GPU instance often lacks memory as well.
    if left.gpus.len() < definition.gpus {
        return Some("RESOURCE:GPU");
    }
    if left.memory_mib < definition.memory_mib {
        return Some("RESOURCE:MEMORY");
    }
    if left.cpu < definition.cpu {
        return Some("RESOURCE:CPU");
    }
    None
}

/// Makes a task. With an instance it starts there; without one it waits in
/// PROVISIONING until [`place_provisioning`] finds it a place.
pub(crate) fn create(
    cloud: &Cloud,
    state: &mut State,
    order: &Order,
    instance: Option<&str>,
) -> String {
    // ECS task ids are 32 hex digits; the number in front keeps them in order.
    let number = state.number();
    let tail = Uuid::new_v4().simple().to_string();
    let id = format!("{number:08x}{}", &tail[..24]);
    let (stop, _) = watch::channel(None);
    let task = Task {
        id: id.clone(),
        arn: cloud.arn("ecs", &format!("task/{}/{id}", order.cluster)),
        cluster: order.cluster.clone(),
        cluster_arn: order.cluster_arn.clone(),
        definition: order.definition.clone(),
        instance: None,
        container_instance_arn: None,
        zone: None,
        gpus: Vec::new(),
        status: TaskStatus::Provisioning,
        desired_stopped: false,
        capacity_provider: order.capacity_provider.clone(),
        started_by: order.started_by.clone(),
        group: order.group.clone(),
        overrides: order.overrides.clone(),
        tags: order.tags.clone(),
        created_at: Utc::now(),
        pull_started_at: None,
        pull_stopped_at: None,
        started_at: None,
        stopping_at: None,
        stopped_at: None,
        stop_code: None,
        stopped_reason: None,
        exit_code: None,
        container_reason: None,
        version: 0,
        pid: None,
        log: cloud.inner.config.log_dir.join(format!("task-{id}.log")),
        stop,
    };
    state.tasks.insert(id.clone(), task);
    if let Some(instance) = instance {
        assign(state, &id, instance);
    }
    id
}

fn assign(state: &mut State, task_id: &str, instance_id: &str) {
    let Some(instance) = state.instances.get(instance_id) else {
        return;
    };
    let left = state.remaining(instance);
    let container_instance = instance
        .registration
        .as_ref()
        .map(|registration| registration.arn.clone());
    let zone = instance.zone.clone();
    let Some(task) = state.tasks.get_mut(task_id) else {
        return;
    };
    task.gpus = left.gpus.into_iter().take(task.definition.gpus).collect();
    task.instance = Some(instance_id.to_owned());
    task.container_instance_arn = container_instance;
    task.zone = Some(zone);
    task.status = TaskStatus::Pending;
}

/// Starts the life of a task that was just created.
pub(crate) fn begin(cloud: &Cloud, task_id: &str) {
    let home = cloud
        .lock()
        .tasks
        .get(task_id)
        .and_then(|task| task.instance.clone());
    cloud.publish_task(task_id);
    if let Some(instance) = home {
        // What the instance has left changed: that is a new version of it.
        cloud.publish_container_instance(&instance);
        spawn_runner(cloud, task_id);
        return;
    }
    let id = task_id.to_owned();
    cloud.later(cloud.timings().provisioning_limit, move |cloud| {
        let waits = cloud.lock().tasks.get(&id).is_some_and(|task| task.status == TaskStatus::Provisioning);
        if waits {
            let reason = "Task did not transition from PROVISIONING in time: no capacity was available in its capacity provider.";
            finish(cloud, &id, Ending::failed_to_start(reason.to_owned(), None));
        }
    });
}

/// Gives tasks in PROVISIONING a place, oldest first, as far as there is room.
pub(crate) fn place_provisioning(cloud: &Cloud) {
    let mut placed = Vec::new();
    {
        let mut state = cloud.lock();
        let mut waiting: Vec<(chrono::DateTime<Utc>, String)> = state
            .tasks
            .values()
            .filter(|task| task.status == TaskStatus::Provisioning)
            .map(|task| (task.created_at, task.id.clone()))
            .collect();
        waiting.sort();
        for (_, id) in waiting {
            let Some(task) = state.tasks.get(&id) else {
                continue;
            };
            let definition = task.definition.clone();
            let cluster = task.cluster.clone();
            let provider = task.capacity_provider.clone();
            let home = state
                .instances
                .values()
                .find(|instance| {
                    instance.cluster == cluster
                        && instance.is_active()
                        && provider
                            .as_deref()
                            .is_none_or(|provider| provider == instance.group)
                        && obstacle(&state, instance, &definition).is_none()
                })
                .map(|instance| instance.id.clone());
            if let Some(home) = home {
                assign(&mut state, &id, &home);
                placed.push((id, home));
            }
        }
    }
    for (id, home) in placed {
        cloud.publish_task(&id);
        cloud.publish_container_instance(&home);
        spawn_runner(cloud, &id);
    }
}

/// Every task of a lost instance ends at once.
pub(crate) fn lose_tasks_of(cloud: &Cloud, instance_id: &str) {
    let order = StopOrder {
        code: "TerminationNotice",
        reason: format!("Host EC2 (instance {instance_id}) terminated."),
        graceful: false,
    };
    let state = cloud.lock();
    for task in state.tasks_on(instance_id) {
        task.stop.send_replace(Some(order.clone()));
    }
}

/// StopTask. False when the task is over or unknown.
pub(crate) fn stop(cloud: &Cloud, task_id: &str, reason: &str) -> bool {
    let waits_for_capacity = {
        let mut state = cloud.lock();
        let Some(task) = state.tasks.get_mut(task_id) else {
            return false;
        };
        if task.status == TaskStatus::Stopped {
            return false;
        }
        task.desired_stopped = true;
        let order = StopOrder {
            code: "UserInitiated",
            reason: reason.to_owned(),
            graceful: true,
        };
        let had_order = task.stop.borrow().is_some();
        if !had_order {
            task.stop_code = Some(order.code);
            task.stopped_reason = Some(order.reason.clone());
            task.stopping_at = Some(Utc::now());
            task.stop.send_replace(Some(order));
        }
        task.status == TaskStatus::Provisioning
    };
    if waits_for_capacity {
        finish(
            cloud,
            task_id,
            Ending {
                code: "UserInitiated",
                reason: reason.to_owned(),
                exit_code: None,
                container_reason: None,
            },
        );
    } else {
        cloud.publish_task(task_id);
    }
    true
}

/// How a task ended.
struct Ending {
    code: &'static str,
    reason: String,
    exit_code: Option<i32>,
    container_reason: Option<String>,
}

impl Ending {
    fn failed_to_start(reason: String, container_reason: Option<String>) -> Self {
        Self {
            code: "TaskFailedToStart",
            reason,
            exit_code: None,
            container_reason,
        }
    }
}

fn spawn_runner(cloud: &Cloud, task_id: &str) {
    let weak = Arc::downgrade(&cloud.inner);
    let cancel = cloud.inner.cancel.clone();
    let id = task_id.to_owned();
    cloud.inner.runners.spawn(async move {
        // On cancellation the runner is dropped, and its process with it.
        tokio::select! {
            () = cancel.cancelled() => {}
            () = live(weak, &id) => {}
        }
    });
}

/// The life of a placed task, from PENDING to STOPPED.
async fn live(cloud: Weak<Inner>, task_id: &str) {
    let Some(start) = up(&cloud) else { return };
    let pull = start.timings().image_pull;
    let Some(mut stop) = start
        .lock()
        .tasks
        .get(task_id)
        .map(|task| task.stop.subscribe())
    else {
        return;
    };
    update(&start, task_id, |task| {
        task.pull_started_at = Some(Utc::now())
    });
    drop(start);

    tokio::select! {
        () = tokio::time::sleep(pull) => {}
        order = ordered(&mut stop) => {
            if let Some(cloud) = up(&cloud) {
                finish(&cloud, task_id, Ending { code: order.code, reason: order.reason, exit_code: None, container_reason: None });
            }
            return;
        }
    }

    let Some(here) = up(&cloud) else { return };
    update(&here, task_id, |task| {
        task.pull_stopped_at = Some(Utc::now());
        task.status = TaskStatus::Activating;
    });
    let (mut child, stop_timeout) = match launch(&here, task_id) {
        Ok(started) => started,
        Err(ending) => {
            finish(&here, task_id, ending);
            return;
        }
    };
    let pid = child.id();
    update(&here, task_id, |task| {
        task.pid = pid;
        task.started_at = Some(Utc::now());
        task.status = TaskStatus::Running;
    });
    here.publish_task(task_id);
    drop(here);

    let ending = tokio::select! {
        exit_code = exit_code_of(&mut child) => Ending {
            code: "EssentialContainerExited",
            reason: "Essential container in task exited".to_owned(),
            exit_code,
            container_reason: None,
        },
        order = ordered(&mut stop) => {
            if order.graceful && let Some(cloud) = up(&cloud) {
                update(&cloud, task_id, |task| task.status = TaskStatus::Stopping);
                cloud.publish_task(task_id);
            }
            let exit_code = stop_process(&mut child, &order, stop_timeout, &mut stop).await;
            let last = stop.borrow().clone().unwrap_or(order);
            Ending { code: last.code, reason: last.reason, exit_code, container_reason: None }
        }
    };
    if let Some(cloud) = up(&cloud) {
        finish(&cloud, task_id, ending);
    }
}

fn up(weak: &Weak<Inner>) -> Option<Cloud> {
    weak.upgrade().map(|inner| Cloud { inner })
}

fn update(cloud: &Cloud, task_id: &str, change: impl FnOnce(&mut Task)) {
    if let Some(task) = cloud.lock().tasks.get_mut(task_id) {
        change(task);
    }
}

/// Waits for an order to stop.
async fn ordered(stop: &mut watch::Receiver<Option<StopOrder>>) -> StopOrder {
    match stop
        .wait_for(Option::is_some)
        .await
        .map(|order| order.clone())
    {
        Ok(Some(order)) => order,
        // The sender lives in the task, which outlives its runner.
        Ok(None) | Err(_) => std::future::pending().await,
    }
}

/// SIGTERM, then SIGKILL after the stop timeout or when the instance is lost meanwhile.
async fn stop_process(
    child: &mut Child,
    order: &StopOrder,
    stop_timeout: Duration,
    stop: &mut watch::Receiver<Option<StopOrder>>,
) -> Option<i32> {
    if order.graceful {
        if let Some(pid) = child.id() {
            process::terminate(pid);
        }
        let instance_lost =
            stop.wait_for(|order| order.as_ref().is_some_and(|order| !order.graceful));
        tokio::select! {
            exit_code = exit_code_of(child) => return exit_code,
            () = tokio::time::sleep(stop_timeout) => {}
            _ = instance_lost => {}
        }
    }
    if let Some(pid) = child.id() {
        process::kill(pid);
    }
    let exit_code = exit_code_of(child).await;
    // Nobody is left to report the exit code of a lost instance.
    if order.graceful { exit_code } else { None }
}

/// The exit code as a container runtime reports it.
async fn exit_code_of(child: &mut Child) -> Option<i32> {
    use std::os::unix::process::ExitStatusExt;
    /// Added to the signal's number by container runtimes: SIGKILL gives 137.
    const KILLED_BY_SIGNAL: i32 = 128;
    let status = child.wait().await.ok()?;
    status
        .code()
        .or_else(|| status.signal().map(|signal| KILLED_BY_SIGNAL + signal))
}

fn launch(cloud: &Cloud, task_id: &str) -> Result<(Child, Duration), Ending> {
    let (definition, overrides, gpus, log) = {
        let state = cloud.lock();
        let Some(task) = state.tasks.get(task_id) else {
            return Err(Ending::failed_to_start("the task is gone".to_owned(), None));
        };
        (
            task.definition.clone(),
            task.overrides.clone(),
            task.gpus.clone(),
            task.log.clone(),
        )
    };
    let container = &definition.container;
    let Some(image) = cloud.inner.config.images.get(&container.image) else {
        let reason = format!(
            "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed to resolve ref {}: not found",
            container.image
        );
        return Err(Ending::failed_to_start(
            "Task failed to start".to_owned(),
            Some(reason),
        ));
    };
    let ImageProgram {
        program,
        environment,
    } = image;
    let mut variables = process::base_environment();
    variables.extend(
        environment
            .iter()
            .map(|(name, value)| (name.clone(), value.into())),
    );
    variables.extend([
        ("AWS_EXECUTION_ENV".to_owned(), "AWS_ECS_EC2".into()),
        (
            "ECS_CONTAINER_METADATA_URI_V4".to_owned(),
            format!("{}/v4/{task_id}", cloud.inner.endpoint()).into(),
        ),
        ("NVIDIA_VISIBLE_DEVICES".to_owned(), gpus.join(",").into()),
    ]);
    variables.extend(
        container
            .environment
            .iter()
            .map(|(name, value)| (name.clone(), value.into())),
    );
    let mut command = container.command.clone();
    let override_of_container = overrides["containerOverrides"]
        .as_array()
        .and_then(|list| list.iter().find(|one| one["name"] == json!(container.name)));
    if let Some(changes) = override_of_container {
        for variable in changes["environment"].as_array().into_iter().flatten() {
            if let (Some(name), Some(value)) =
                (variable["name"].as_str(), variable["value"].as_str())
            {
                variables.insert(name.to_owned(), value.into());
            }
        }
        if let Some(words) = changes["command"].as_array() {
            command = words
                .iter()
                .filter_map(|word| word.as_str().map(str::to_owned))
                .collect();
        }
    }
    let spec = process::Spec {
        program,
        args: &command,
        environment: variables,
        directory: &cloud.inner.config.log_dir,
        log: &log,
    };
    match process::spawn(&spec) {
        Ok(child) => Ok((child, Duration::from_secs(container.stop_timeout_s))),
        Err(error) => {
            let reason = format!("CannotStartContainerError: {}: {error}", program.display());
            Err(Ending::failed_to_start(
                "Task failed to start".to_owned(),
                Some(reason),
            ))
        }
    }
}

fn finish(cloud: &Cloud, task_id: &str, ending: Ending) {
    let instance = {
        let mut state = cloud.lock();
        let Some(task) = state.tasks.get_mut(task_id) else {
            return;
        };
        if task.status == TaskStatus::Stopped {
            return;
        }
        let now = Utc::now();
        task.status = TaskStatus::Stopped;
        task.desired_stopped = true;
        task.pid = None;
        task.stopping_at.get_or_insert(now);
        task.stopped_at = Some(now);
        task.stop_code = Some(ending.code);
        task.stopped_reason = Some(ending.reason);
        task.exit_code = ending.exit_code;
        task.container_reason = ending.container_reason;
        task.instance.clone()
    };
    cloud.publish_task(task_id);
    if let Some(instance) = instance {
        cloud.publish_container_instance(&instance);
    }
    place_provisioning(cloud);
    let id = task_id.to_owned();
    cloud.later(cloud.timings().stopped_task_retention, move |cloud| {
        cloud.lock().tasks.remove(&id);
    });
}
