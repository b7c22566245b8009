//! What happens in the cluster and in the functions, told as lines: each
//! change once.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
};

use serde_json::Value;

use super::{screen::Screen, stages::Stages};
use crate::{
    Deployment,
    cloud::{ContainerInstanceStatus, Instance, Lifecycle, Snapshot, Task, TaskStatus},
    deployment::{DeployError, LogLine, QueueCounts},
};

/// Lines of a failed task's log that are shown.
const LOG_TAIL: usize = 3;

/// A log that is read as it grows: only its end is asked for again.
#[derive(Default)]
struct Tail {
    newest_ms: i64,
    /// Lines of the last moments, which may be answered again.
    seen: HashSet<(i64, String)>,
}

impl Tail {
    /// Lines may appear this much later than lines with a later timestamp.
    const OVERLAP_MS: i64 = 5_000;

    async fn read(
        &mut self,
        pipeline: &Deployment,
        function: &str,
    ) -> Result<Vec<LogLine>, DeployError> {
        let lines = pipeline
            .function_logs_since(function, self.newest_ms - Self::OVERLAP_MS)
            .await?;
        Ok(self.fresh(lines))
    }

    fn fresh(&mut self, lines: Vec<LogLine>) -> Vec<LogLine> {
        let newest = lines.iter().map(|line| line.timestamp).max();
        self.newest_ms = self.newest_ms.max(newest.unwrap_or_default());
        let horizon = self.newest_ms - Self::OVERLAP_MS;
        let mut fresh = Vec::new();
        for line in lines {
            if self.seen.insert((line.timestamp, line.message.clone())) {
                fresh.push(line);
            }
        }
        self.seen.retain(|(timestamp, _)| *timestamp >= horizon);
        fresh
    }
}

pub(super) struct Watch<'a> {
    pipeline: &'a Deployment,
    tasks: BTreeMap<String, TaskStatus>,
    instances: BTreeMap<String, &'static str>,
    now: Snapshot,
    pub stages: Stages,
    intake: Tail,
    scaler: Tail,
    express: Tail,
    /// Runs that were woken at the same time decide the same: told once.
    last_decision: String,
}

impl<'a> Watch<'a> {
    pub fn new(pipeline: &'a Deployment) -> Self {
        Self {
            pipeline,
            tasks: BTreeMap::new(),
            instances: BTreeMap::new(),
            now: Snapshot::default(),
            stages: Stages::default(),
            intake: Tail::default(),
            scaler: Tail::default(),
            express: Tail::default(),
            last_decision: String::new(),
        }
    }

    /// Lines of intake's log that were not answered before.
    pub async fn intake_lines(&mut self) -> Result<Vec<LogLine>, DeployError> {
        self.intake.read(self.pipeline, "IntakeFunction").await
    }

    /// Lines of the express lane's log that were not answered before.
    pub async fn express_lines(&mut self) -> Result<Vec<LogLine>, DeployError> {
        self.express.read(self.pipeline, "ExpressFunction").await
    }

    /// Shows what the scaler decided, where it decided something.
    pub async fn show_scaler(&mut self, screen: &Screen) -> Result<(), DeployError> {
        for line in self.scaler.read(self.pipeline, "ScalerFunction").await? {
            for decision in line.json().map(|run| decisions(&run)).unwrap_or_default() {
                if decision != self.last_decision {
                    screen.line("scaler", &decision);
                    self.last_decision = decision;
                }
            }
        }
        Ok(())
    }

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
            match task.status {
                TaskStatus::Running | TaskStatus::Stopping => {
                    self.stages.read(&task.log);
                }
                TaskStatus::Stopped if self.tasks.get(&task.id) != Some(&TaskStatus::Stopped) => {
                    self.stages.read(&task.log);
                    self.stages.forget(&task.log);
                }
                _ => {}
            }
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
            .filter(|one| one.lifecycle.is_live() && one.container_status().is_none())
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

fn state_of(instance: &Instance) -> &'static str {
    match (instance.lifecycle, instance.container_status()) {
        (Lifecycle::Pending, _) => "boots",
        (Lifecycle::InService, None) => "is up and not registered yet",
        (Lifecycle::InService, Some(ContainerInstanceStatus::Draining)) => "is drained",
        (Lifecycle::InService, Some(_)) => "is registered and takes tasks",
        (Lifecycle::Terminating, _) => "is being terminated",
        (Lifecycle::Terminated, _) => "is gone",
    }
}

fn show_task(screen: &Screen, task: &Task) {
    let id = short(&task.id);
    let on = short(&task.instance);
    match task.status {
        TaskStatus::Pending => screen.line(
            "task",
            &format!("{id} is placed on {on}; its image is pulled"),
        ),
        TaskStatus::Activating => {}
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
    if run["message"].as_str() != Some("scaler run") {
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
    let text = |name: &str| match &decision[name] {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let what = match decision["do"].as_str() {
        Some("setDesired") => {
            format!(
                "desired capacity of {} {} → {}",
                text("group"),
                text("from"),
                text("to")
            )
        }
        Some("runTasks") => format!("run {} task(s)", text("count")),
        Some("release") => format!("give {} back", short(&text("instance"))),
        Some("stopTask") => format!("stop task {}", last_segment(&text("task"))),
        _ => members_in_words(decision),
    };
    format!("{what}: {}", decision["why"].as_str().unwrap_or_default())
}

fn last_segment(arn: &str) -> &str {
    short(arn.rsplit('/').next().unwrap_or(arn))
}

/// For kinds of decisions that have no words here.
fn members_in_words(decision: &Value) -> String {
    let members: Vec<String> = decision
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(name, _)| *name != "why")
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    members.join(" ")
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
    fn decisions_are_told_in_words() {
        let run = json!({"message": "scaler run", "plan": {"decisions": [
            {"do": "setDesired", "group": "clip-1", "from": 0, "to": 2, "why": "8 messages"},
            {"do": "release", "instance": "i-0000000000000002a", "why": "idle"},
            {"do": "somethingNew", "count": 3, "why": "so"},
        ]}});
        let told = decisions(&run);
        assert_eq!(told[0], "desired capacity of clip-1 0 → 2: 8 messages");
        assert_eq!(told[1], "give 0000002a back: idle");
        assert_eq!(told[2], "count=3 do=\"somethingNew\": so");
    }

    #[test]
    fn a_line_is_read_once() {
        let line = |timestamp, message: &str| LogLine {
            timestamp,
            message: message.to_owned(),
        };
        let mut tail = Tail::default();
        assert_eq!(
            tail.fresh(vec![line(10_000, "a"), line(10_001, "b")]).len(),
            2
        );
        let again = vec![
            line(9_000, "late"),
            line(10_000, "a"),
            line(10_001, "b"),
            line(10_001, "c"),
        ];
        let fresh: Vec<String> = tail
            .fresh(again)
            .into_iter()
            .map(|line| line.message)
            .collect();
        assert_eq!(fresh, ["late", "c"]);
        assert_eq!(tail.fresh(vec![line(99_000, "d")]).len(), 1);
        assert_eq!(tail.seen.len(), 1, "what is long past is forgotten");
    }

    #[test]
    fn ids_are_cut_to_what_tells_them_apart() {
        assert_eq!(short("i-0000000000000002a"), "0000002a");
        assert_eq!(short("0000000264c774c5de3b4317bec7a1b1"), "00000002");
    }
}
