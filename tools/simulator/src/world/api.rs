//! The APIs, as the scaler sees them.

use planner::observation::{
    Arrivals, ContainerInstanceStatus, Group, GroupInstance, HIGHEST_MINUTES, Lifecycle,
    Observation, Queue, TaskStatus,
};
use planner::{Action, Plan};

use super::{Ms, Physics, World, seconds};

/// ECS shows a stopped task for an hour.
const STOPPED_SHOWN: Ms = 3_600_000;

/// CloudWatch has a minute's sum this long after the minute.
pub(super) const METRIC_DELAY: Ms = 60_000;

/// SQS stops reporting for a queue that nobody has used for so many minutes.
const METRICS_END_AFTER_MINUTES: Ms = 6 * 60;

impl World {
    /// What the scaler's reads would return now. `None` when a read fails.
    pub fn observe(&mut self) -> Option<Observation> {
        let now = self.now;
        let mut dips = false;
        if let Some(chaos) = &mut self.chaos {
            // Queue, two task lists, container instances, groups: the essential reads.
            for _ in 0..5 {
                if !chaos.call_succeeds(now) {
                    return None;
                }
            }
            dips = chaos.rng.f64() < chaos.count_dips;
        }
        let workers = &self.workers;
        self.shown.retain(|index| {
            let worker = &workers[*index];
            worker.shown.status != TaskStatus::Stopped
                || worker.ended.is_none_or(|ended| now - ended < STOPPED_SHOWN)
        });
        let queue = match dips {
            true => Queue::default(),
            false => Queue {
                visible: self.visible,
                in_flight: self.in_flight,
                ..Queue::default()
            },
        };
        let tasks = self.shown.iter().map(|index| &self.workers[*index].shown);
        let machines = self.living.iter().map(|index| &self.machines[*index]);
        Some(Observation {
            at: seconds(now),
            queue,
            arrivals: self.seen_arrivals(),
            first_vector_seconds: self.seen_first_vector(),
            lane: self.seen_lane(),
            tasks: tasks.cloned().collect(),
            container_instances: machines
                .filter(|machine| machine.is_registered())
                .map(|machine| machine.shown.clone())
                .collect(),
            groups: (0..self.groups.len())
                .map(|group| self.seen_group(group))
                .collect(),
            ..Observation::default()
        })
    }

    /// A task's own, once one has worked.
    fn seen_first_vector(&self) -> Option<f64> {
        let Physics {
            load,
            fetch,
            deliver,
            ..
        } = self.physics;
        let was_ready = self
            .machines
            .iter()
            .any(|machine| machine.first_ready.is_some());
        was_ready
            .then(|| (load + fetch + deliver) as f64 / 1000.0 + self.physics.per_image() / 1000.0)
    }

    fn seen_arrivals(&self) -> Option<Arrivals> {
        let (newest, _) = self.sent.back()?;
        let this_minute = (self.now - METRIC_DELAY).div_euclid(60_000);
        if this_minute - newest > METRICS_END_AFTER_MINUTES {
            return None;
        }
        let mut minutes = [0.0; HIGHEST_MINUTES];
        for (minute, sum) in &self.sent {
            let back = usize::try_from(this_minute - 1 - minute).ok();
            if let Some(slot) = back.and_then(|back| minutes.get_mut(back)) {
                *slot = *sum as f64;
            }
        }
        Some(Arrivals::from_minutes(&minutes))
    }

    fn seen_group(&self, group: usize) -> Group {
        let machines = self.living.iter().map(|index| &self.machines[*index]);
        let instances = machines
            .filter(|machine| machine.group == group && !machine.is_lost)
            .map(|machine| GroupInstance {
                id: machine.shown.instance_id.clone(),
                state: match (machine.is_terminating, machine.is_registered()) {
                    (true, _) => Lifecycle::Terminating,
                    (false, true) => Lifecycle::InService,
                    (false, false) => Lifecycle::Pending,
                },
                healthy: true,
                zone: String::new(),
                instance_type: String::new(),
            });
        Group {
            instances: instances.collect(),
            ..self.groups[group].shown.clone()
        }
    }

    /// Carries a plan out as the scaler does. Answers whether every call succeeded.
    pub fn apply(&mut self, plan: &Plan) -> bool {
        let mut all_succeeded = true;
        for action in plan.actions() {
            let now = self.now;
            let succeeds = match &mut self.chaos {
                Some(chaos) => chaos.call_succeeds(now),
                None => true,
            };
            all_succeeded &= succeeds;
            if succeeds {
                self.apply_one(action);
            }
        }
        all_succeeded
    }

    fn apply_one(&mut self, action: &Action) {
        match action {
            Action::Release {
                instance,
                decrement,
                ..
            } => {
                let Some(index) = self.find_machine(instance) else {
                    return;
                };
                self.machines[index].shown.status = ContainerInstanceStatus::Draining;
                if !self.holds_task(index) {
                    self.terminate(index, *decrement);
                }
            }
            Action::StopTask { task, reason } => {
                let mut shown = self.shown.iter().copied();
                let found = shown.find(|index| self.workers[*index].shown.arn == *task);
                if let Some(index) = found
                    && self.workers[index].shown.status != TaskStatus::Stopped
                    && !self.workers[index].shown.stopping
                {
                    self.stop_task(index, reason);
                }
            }
            Action::SetDesired { group, to, .. } => {
                // Above MaxSize, Auto Scaling refuses.
                if let Some(index) = self.find_group(group)
                    && *to <= self.groups[index].shown.max
                {
                    self.set_desired(index, *to);
                }
            }
            Action::Activate { instance, .. } => {
                if let Some(index) = self.find_machine(instance) {
                    self.machines[index].shown.status = ContainerInstanceStatus::Active;
                }
            }
            Action::RunTasks { count, token } => {
                // The same token is the same call: it launches nothing twice.
                if self.tokens.insert(token.clone()) {
                    let free = self.free_instances();
                    for machine in free.into_iter().take(count.get() as usize) {
                        self.start_task(machine);
                    }
                }
            }
            Action::SetLane { open } => self.set_lane(*open),
            Action::Remember { group, key, value } => {
                if let Some(index) = self.find_group(group) {
                    let tags = &mut self.groups[index].shown.tags;
                    tags.insert(key.clone(), value.clone());
                }
            }
        }
    }

    fn find_group(&self, name: &str) -> Option<usize> {
        self.groups
            .iter()
            .position(|group| group.shown.name == name)
    }

    fn find_machine(&self, id: &str) -> Option<usize> {
        let mut living = self.living().into_iter();
        living.find(|index| self.machines[*index].shown.instance_id == id)
    }
}
