//! Tasks: placement on instances, and the life of each as a real process.

use std::{sync::Arc, sync::Weak, time::Duration};

use chrono::Utc;
use ministack::process::{base_environment, kill, terminate};
use tokio::{process::Child, sync::watch};
use uuid::Uuid;

use super::{
    Cloud, ImageProgram, Inner,
    state::{CloudState, ClusterState, Instance, StopOrder, Task, TaskDefinition, TaskStatus},
};
use crate::process;

/// What a RunTask call wants of each of its tasks.
pub(crate) struct Order {
    pub cluster: ClusterState,
    pub definition: Arc<TaskDefinition>,
    pub started_by: Option<String>,
}

/// Why an instance cannot take a task, in the words of RunTask's `failures`.
pub(crate) fn obstacle(
    state: &CloudState,
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

/// Makes a task on an instance that has room for it.
pub(crate) fn create(
    cloud: &Cloud,
    state: &mut CloudState,
    order: &Order,
    instance_id: &str,
) -> String {
    // ECS task ids are 32 hex digits; the number in front keeps them in order.
    let number = state.number();
    let tail = Uuid::new_v4().simple().to_string();
    let id = format!("{number:08x}{}", &tail[..24]);
    let instance = &state.instances[instance_id];
    let definition = order.definition.clone();
    let mut gpus = state.remaining(instance).gpus;
    gpus.truncate(definition.gpus);
    let registration = instance.registration.as_ref();
    let task = Task {
        id: id.clone(),
        arn: cloud.arn("ecs", &format!("task/{}/{id}", order.cluster.name)),
        cluster: order.cluster.clone(),
        container_instance_arn: registration.map(|one| one.arn.clone()).unwrap_or_default(),
        instance: instance_id.to_owned(),
        zone: instance.zone.clone(),
        gpus,
        definition,
        status: TaskStatus::Pending,
        desired_stopped: false,
        started_by: order.started_by.clone(),
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
        stop: watch::channel(None).0,
    };
    state.tasks.insert(id.clone(), task);
    id
}

/// Starts the life of a task that was just created.
pub(crate) fn begin(cloud: &Cloud, task_id: &str) {
    publish(cloud, task_id);
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

/// A task's state, and what its instance has left with it: a new version of both.
fn publish(cloud: &Cloud, task_id: &str) {
    cloud.publish_task(task_id);
    let instance = cloud
        .lock()
        .tasks
        .get(task_id)
        .map(|task| task.instance.clone());
    if let Some(instance) = instance {
        cloud.publish_container_instance(&instance);
    }
}

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

/// StopTask. Nothing happens to a task that is over.
pub(crate) fn stop(cloud: &Cloud, task_id: &str, reason: &str) {
    update(cloud, task_id, |task| {
        if task.status == TaskStatus::Stopped {
            return;
        }
        task.desired_stopped = true;
        if task.stop.borrow().is_none() {
            let order = StopOrder {
                code: "UserInitiated",
                reason: reason.to_owned(),
                graceful: true,
            };
            task.stop_code = Some(order.code);
            task.stopped_reason = Some(order.reason.clone());
            task.stopping_at = Some(Utc::now());
            task.stop.send_replace(Some(order));
        }
    });
    cloud.publish_task(task_id);
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

/// The life of a task, from PENDING to STOPPED.
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
            terminate(pid);
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
        kill(pid);
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
    let (definition, gpus, log) = {
        let state = cloud.lock();
        let Some(task) = state.tasks.get(task_id) else {
            return Err(Ending::failed_to_start("the task is gone".to_owned(), None));
        };
        (task.definition.clone(), task.gpus.clone(), task.log.clone())
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
    let mut variables = base_environment();
    variables.extend(
        environment
            .iter()
            .map(|(name, value)| (name.clone(), value.into())),
    );
    variables.extend([
        ("AWS_EXECUTION_ENV".to_owned(), "AWS_ECS_EC2".into()),
        ("NVIDIA_VISIBLE_DEVICES".to_owned(), gpus.join(",").into()),
    ]);
    variables.extend(
        container
            .environment
            .iter()
            .map(|(name, value)| (name.clone(), value.into())),
    );
    let spec = process::Spec {
        program,
        args: &container.command,
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
    update(cloud, task_id, |task| {
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
    });
    publish(cloud, task_id);
    let id = task_id.to_owned();
    cloud.later(cloud.timings().stopped_task_retention, move |cloud| {
        cloud.lock().tasks.remove(&id);
    });
}
