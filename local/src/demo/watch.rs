//! What happens in the cluster and in the functions, told as lines: each
//! change once.

use std::{collections::BTreeMap, fs};

use serde_json::Value;

use super::screen::Screen;
use crate::{
    Deployment,
    cloud::{ContainerInstanceStatus, InstanceView, Lifecycle, Snapshot, TaskStatus, TaskView},
    deployment::{DeployError, QueueCounts},
    emulator::LogLine,
};

/// Lines of a failed task's log that are shown.
const LOG_TAIL: usize = 3;

/// What was seen so far.
pub(super) struct Watch<'a> {
    pipeline: &'a Deployment,
    tasks: BTreeMap<String, TaskStatus>,
    instances: BTreeMap<String, &'static str>,
    now: Snapshot,
    intake_lines_seen: usize,
    scaler_lines_seen: usize,
}

impl<'a> Watch<'a> {
    pub fn new(pipeline: &'a Deployment) -> Self {
        Self {
            pipeline,
            tasks: BTreeMap::new(),
            instances: BTreeMap::new(),
            now: Snapshot::default(),
            intake_lines_seen: 0,
            scaler_lines_seen: 0,
        }
    }

    /// Lines of intake's log that were not answered before.
    pub async fn intake_lines(&mut self) -> Result<Vec<LogLine>, DeployError> {
        let lines = self.pipeline.function_logs("IntakeFunction").await?;
        let fresh = lines
            .get(self.intake_lines_seen..)
            .unwrap_or_default()
            .to_vec();
        self.intake_lines_seen = lines.len();
        Ok(fresh)
    }

    /// Shows what the scaler decided, where it decided something.
    pub async fn show_scaler(&mut self, screen: &Screen) -> Result<(), DeployError> {
        let lines = self.pipeline.function_logs("ScalerFunction").await?;
        for line in lines.get(self.scaler_lines_seen..).unwrap_or_default() {
            for decision in line.json().map(|run| decisions(&run)).unwrap_or_default() {
                screen.line("scaler", &decision);
            }
        }
        self.scaler_lines_seen = lines.len();
        Ok(())
    }

    /// Shows what changed among instances and tasks.
    pub fn show_cluster(&mut self, screen: &Screen) {
        self.now = self.pipeline.cloud.snapshot();
        for instance in &self.now.instances {
            let state = state_of(instance);
            if self.instances.insert(instance.id.clone(), state) != Some(state) {
                screen.line(
                    "instance",
                    &format!(
                        "{} ({}) {state}",
                        short(&instance.id),
                        instance.instance_type
                    ),
                );
            }
        }
        for task in &self.now.tasks {
            if self.tasks.insert(task.id.clone(), task.status) != Some(task.status) {
                show_task(screen, task);
            }
        }
    }

    /// One line on everything, for the terminal's bottom.
    pub fn summary(&self, embedded: usize, uploaded: usize, queue: QueueCounts) -> String {
        let tasks = |status: fn(TaskStatus) -> bool| {
            self.now
                .tasks
                .iter()
                .filter(|task| status(task.status))
                .count()
        };
        let booting = self
            .now
            .instances
            .iter()
            .filter(|one| one.lifecycle.is_live() && one.container_status.is_none())
            .count();
        format!(
            "uploaded {uploaded} · queue {} waiting, {} in work · instances {} ({booting} booting) · tasks {} running, {} starting · vectors {embedded}",
            queue.visible,
            queue.in_flight,
            self.now.live_instances(),
            tasks(|status| status == TaskStatus::Running),
            tasks(|status| status < TaskStatus::Running),
        )
    }

    /// Nothing runs and nothing is on its way.
    pub fn is_at_rest(&self) -> bool {
        self.now.live_tasks() == 0 && self.now.live_instances() == 0
    }
}

fn state_of(instance: &InstanceView) -> &'static str {
    match (instance.lifecycle, instance.container_status) {
        (Lifecycle::Pending, _) => "boots",
        (Lifecycle::InService, None) => "is up and not registered yet",
        (Lifecycle::InService, Some(ContainerInstanceStatus::Draining)) => "is drained",
        (Lifecycle::InService, Some(_)) => "is registered and takes tasks",
        (Lifecycle::Terminating, _) => "is being terminated",
        (Lifecycle::Terminated, _) => "is gone",
    }
}

fn show_task(screen: &Screen, task: &TaskView) {
    let id = short(&task.id);
    let on = task.instance.as_deref().map(short).unwrap_or_default();
    match task.status {
        TaskStatus::Provisioning => screen.line("task", &format!("{id} waits for an instance")),
        TaskStatus::Pending => screen.line(
            "task",
            &format!("{id} is placed on {on}; its image is pulled"),
        ),
        TaskStatus::Activating | TaskStatus::Deactivating => {}
        TaskStatus::Running => {
            let pid = task
                .pid
                .map(|pid| format!(", process {pid}"))
                .unwrap_or_default();
            screen.line("task", &format!("{id} runs{pid}"));
        }
        TaskStatus::Stopping => screen.line("task", &format!("{id} is told to stop")),
        TaskStatus::Stopped => {
            let reason = task.stopped_reason.as_deref().unwrap_or("no reason given");
            let code = task
                .exit_code
                .map_or_else(String::new, |code| format!(", exit code {code}"));
            screen.line("task", &format!("{id} stopped: {reason}{code}"));
            if task.exit_code != Some(0) {
                let log = fs::read_to_string(&task.log).unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                for line in lines.iter().rev().take(LOG_TAIL).rev() {
                    screen.line("", line);
                }
                screen.line("", &format!("its whole log: {}", task.log.display()));
            }
        }
    }
}

/// Ids as people compare them: the end tells them apart.
fn short(id: &str) -> &str {
    const SHOWN: usize = 8;
    if id.starts_with("i-") {
        &id[id.len().saturating_sub(SHOWN)..]
    } else {
        &id[..id.len().min(SHOWN)]
    }
}

/// The decisions in a line of the scaler's log, each with its reason.
fn decisions(run: &Value) -> Vec<String> {
    if run["message"] != Value::from("scaler run") {
        return Vec::new();
    }
    run["plan"]["decisions"]
        .as_array()
        .into_iter()
        .flatten()
        .map(decision_in_words)
        .collect()
}

fn decision_in_words(decision: &Value) -> String {
    let why = decision["why"].as_str().unwrap_or_default();
    let what: Vec<String> = decision
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| *name != "why")
        .map(|(name, value)| match value {
            Value::String(text) => format!("{name}={text}"),
            other => format!("{name}={other}"),
        })
        .collect();
    format!("{} because {why}", what.join(" "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_without_decisions_is_not_worth_a_line() {
        assert!(decisions(&json!({"message": "scaler run", "plan": {"decisions": []}})).is_empty());
        assert!(decisions(&json!({"message": "something else"})).is_empty());
    }

    #[test]
    fn ids_are_cut_to_what_tells_them_apart() {
        assert_eq!(short("i-0000000000000002a"), "0000002a");
        assert_eq!(short("0000000264c774c5de3b4317bec7a1b1"), "00000002");
    }
}
