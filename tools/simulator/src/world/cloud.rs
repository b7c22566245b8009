//! The lives of instances and tasks, as Auto Scaling and ECS lead them.

use planner::observation::{
    Activity, ActivityKind, ActivityStatus, ContainerInstance, ContainerInstanceStatus, Task,
    TaskStatus,
};

use super::physics::within;
use super::{Event, Machine, Ms, Signal, Worker, World, seconds};

/// Scaling activities that a read returns.
const ACTIVITIES_SHOWN: usize = 50;

/// A group without capacity tries again after this.
const NEXT_TRY: Ms = 60_000;

/// A group notices so much later that it has lost an instance, and ECS that a
/// task is gone with it.
const LOSS_NOTICED_BY_GROUP: Ms = 20_000;
const LOSS_NOTICED_BY_ECS: Ms = 30_000;

/// A lost instance is lost within this time of its launch.
const LONGEST_LIFE_OF_LOST: f64 = 1_800_000.0;

const HOST_TERMINATED: &str = "Host EC2 (instance) terminated.";

impl World {
    pub fn set_desired(&mut self, group: usize, desired: u32) {
        self.groups[group].shown.desired = desired;
        self.reconcile_in(group, self.physics.group_reaction);
    }

    fn reconcile_in(&mut self, group: usize, after: Ms) {
        self.groups[group].reconcile_at = self.now + after;
        self.schedule_in(after, Event::Reconcile(group));
    }

    /// Instances that are there and stay.
    pub fn living(&self) -> Vec<usize> {
        self.which(|machine| !machine.is_terminating)
    }

    /// How many of them are in the group.
    pub fn living_in(&self, group: usize) -> u32 {
        self.which(|machine| machine.group == group && !machine.is_terminating)
            .len() as u32
    }

    fn which(&self, wanted: impl Fn(&Machine) -> bool) -> Vec<usize> {
        let living = self.living.iter().copied();
        living
            .filter(|index| wanted(&self.machines[*index]))
            .collect()
    }

    pub(super) fn reconcile(&mut self, group: usize) {
        let state = &self.groups[group];
        let living = self.living_in(group);
        let desired = state.shown.desired.min(state.shown.max);
        if state.reconcile_at != self.now || living >= desired {
            return;
        }
        if within(&state.shortages, self.now) {
            let why = "InsufficientInstanceCapacity: there is no g4dn.xlarge in the zone";
            self.log_activity(group, ActivityKind::Launch, None, Some(why));
            self.reconcile_in(group, NEXT_TRY);
        } else {
            for _ in living..desired {
                self.launch(group);
            }
            self.note();
        }
        self.signals.push(Signal::Group);
    }

    fn launch(&mut self, group: usize) {
        let index = self.machines.len();
        let id = format!("i-{index:08x}");
        self.log_activity(group, ActivityKind::Launch, Some(&id), None);
        self.machines.push(Machine {
            shown: ContainerInstance {
                arn: format!("container-instance/{index}"),
                instance_id: id,
                status: ContainerInstanceStatus::Active,
                agent_connected: true,
                registered_at: None,
                version: 1,
                gpus: 1,
                free_gpus: 1,
            },
            group,
            launched: self.now,
            first_ready: None,
            is_terminating: false,
            is_gone: false,
            is_lost: false,
            has_image: false,
            task: None,
        });
        self.living.push(index);
        self.paid += 1;
        self.footprint += 1;
        self.tally.instance_times.push(self.now);
        self.tally.most_instances = self.tally.most_instances.max(self.footprint);
        let mut registers = true;
        if let Some(chaos) = &mut self.chaos {
            registers = chaos.rng.f64() >= chaos.never_registers;
            if chaos.rng.f64() < chaos.lost {
                let after = (chaos.rng.f64() * LONGEST_LIFE_OF_LOST) as Ms;
                self.schedule_in(after, Event::Lose(index));
            }
        }
        if registers {
            self.schedule_in(self.physics.register_after(), Event::Register(index));
        }
    }

    /// An activity that failed has a message.
    fn log_activity(
        &mut self,
        group: usize,
        kind: ActivityKind,
        instance: Option<&str>,
        message: Option<&str>,
    ) {
        let activity = Activity {
            kind,
            instance: instance.map(str::to_owned),
            started_at: seconds(self.now),
            ended_at: None,
            status: match message {
                Some(_) => ActivityStatus::Failed,
                None => ActivityStatus::Successful,
            },
            message: message.map(str::to_owned),
        };
        let activities = &mut self.groups[group].shown.activities;
        activities.insert(0, activity);
        activities.truncate(ACTIVITIES_SHOWN);
    }

    pub(super) fn register(&mut self, index: usize) {
        let machine = &mut self.machines[index];
        if !machine.is_terminating {
            machine.shown.registered_at = Some(seconds(self.now));
            machine.shown.version += 1;
            self.signals.push(Signal::ContainerInstance);
        }
    }

    pub fn terminate(&mut self, index: usize, decrement: bool) {
        if self.machines[index].is_terminating {
            return;
        }
        self.stop_paying(index);
        let group = self.machines[index].group;
        if decrement {
            let desired = &mut self.groups[group].shown.desired;
            *desired = desired.saturating_sub(1);
        } else {
            self.reconcile_in(group, self.physics.group_reaction);
        }
        let id = self.machines[index].shown.instance_id.clone();
        self.log_activity(group, ActivityKind::Terminate, Some(&id), None);
        if let Some(worker) = self.machines[index].task {
            self.end_task(worker, None, None, HOST_TERMINATED);
        }
        self.schedule_in(self.physics.terminate, Event::Gone(index));
        self.note();
    }

    fn stop_paying(&mut self, index: usize) {
        let machine = &mut self.machines[index];
        machine.is_terminating = true;
        machine.shown.agent_connected = false;
        self.tally.paid += self.now - machine.launched;
        self.tally.booting += machine.first_ready.unwrap_or(self.now) - machine.launched;
        self.paid -= 1;
    }

    pub(super) fn gone(&mut self, index: usize) {
        let machine = &mut self.machines[index];
        if machine.is_gone {
            return;
        }
        machine.is_gone = true;
        self.footprint -= u32::from(!machine.is_lost);
        self.living.retain(|living| *living != index);
        self.signals.push(Signal::Group);
        self.note();
    }

    /// The instance vanishes (hardware, Spot): nobody asked for it, the group
    /// replaces it, ECS notices a little later.
    pub(super) fn lose(&mut self, index: usize) {
        if self.machines[index].is_terminating {
            return;
        }
        self.last_disturbance = self.now;
        self.stop_paying(index);
        self.machines[index].is_lost = true;
        self.footprint -= 1;
        self.reconcile_in(self.machines[index].group, LOSS_NOTICED_BY_GROUP);
        if let Some(worker) = self.machines[index].task {
            let lost = self.drop_work(worker);
            if !lost.is_empty() {
                self.schedule_in(self.physics.visibility, Event::Reappear(lost));
            }
            self.workers[worker].is_ready = false;
            self.workers[worker].shown.stop_reason = Some(HOST_TERMINATED.to_owned());
            self.schedule_in(LOSS_NOTICED_BY_ECS, Event::TaskStopped(worker));
        }
        self.schedule_in(self.physics.terminate, Event::Gone(index));
        self.note();
    }

    /// Instances that take a task: registered, there, empty.
    pub fn free_instances(&self) -> Vec<usize> {
        self.which(|machine| {
            machine.is_registered()
                && !machine.is_terminating
                && machine.shown.status == ContainerInstanceStatus::Active
                && machine.task.is_none()
        })
    }

    pub fn start_task(&mut self, machine: usize) {
        let index = self.workers.len();
        let now = self.now;
        let is_broken = self
            .chaos
            .as_ref()
            .is_some_and(|chaos| within(&chaos.broken_tasks, now));
        let host = &mut self.machines[machine];
        host.task = Some(index);
        host.shown.free_gpus = 0;
        host.shown.version += 1;
        let after = match host.has_image {
            true => self.physics.warm_start,
            false => self.physics.cold_start(),
        };
        let mut worker = Worker {
            shown: Task {
                arn: format!("task/{index}"),
                container_instance: Some(host.shown.arn.clone()),
                created_at: Some(seconds(now)),
                ..Task::default()
            },
            machine,
            ended: None,
            is_ready: false,
            is_broken,
            work: Default::default(),
        };
        worker.work.idle_since = now;
        self.workers.push(worker);
        self.shown.push(index);
        self.tally.launch_times.push(now);
        self.schedule_in(after, Event::TaskRunning(index));
    }

    pub(super) fn task_running(&mut self, worker: usize) {
        let state = &mut self.workers[worker];
        if state.shown.status != TaskStatus::Pending || state.shown.stopping {
            return;
        }
        state.shown.status = TaskStatus::Running;
        state.shown.started_at = Some(seconds(self.now));
        self.machines[state.machine].has_image = true;
        self.schedule_in(self.physics.load, Event::TaskReady(worker));
        self.signals.push(Signal::Task);
    }

    pub(super) fn task_ready(&mut self, worker: usize) {
        let state = &mut self.workers[worker];
        let host = &mut self.machines[state.machine];
        let runs = state.shown.status == TaskStatus::Running && !state.shown.stopping;
        if !runs || host.is_terminating {
            return;
        }
        if state.is_broken {
            self.fail_at_start(worker);
            return;
        }
        state.is_ready = true;
        host.first_ready.get_or_insert(self.now);
        self.receivers.push_back(worker);
        self.wait_for_work(worker);
    }

    /// The container ends now.
    pub(super) fn end_task(
        &mut self,
        worker: usize,
        exit_code: Option<i32>,
        stop_code: Option<&str>,
        reason: &str,
    ) {
        let left = self.drop_work(worker);
        let state = &mut self.workers[worker];
        state.is_ready = false;
        state.ended = Some(self.now);
        state.shown.stopping = true;
        state.shown.status = TaskStatus::Deactivating;
        state.shown.exit_code = exit_code;
        state.shown.stop_code = stop_code.map(str::to_owned);
        state.shown.stop_reason = Some(reason.to_owned());
        self.schedule_in(self.physics.stop, Event::TaskStopped(worker));
        if !left.is_empty() {
            self.reappear(left);
        }
    }

    pub(super) fn task_stopped(&mut self, worker: usize) {
        let state = &mut self.workers[worker];
        if state.shown.status == TaskStatus::Stopped {
            return;
        }
        let ended = *state.ended.get_or_insert(self.now);
        state.is_ready = false;
        state.shown.stopping = true;
        state.shown.status = TaskStatus::Stopped;
        state.shown.stopped_at = Some(seconds(ended));
        let host = &mut self.machines[state.machine];
        host.shown.version += 1;
        if host.task == Some(worker) {
            host.task = None;
            host.shown.free_gpus = 1;
        }
        self.signals.push(Signal::Task);
        self.signals.push(Signal::ContainerInstance);
    }

    fn worker_on(&self, machine: usize) -> Option<&Worker> {
        self.machines[machine]
            .task
            .map(|worker| &self.workers[worker])
    }

    /// Whether the instance holds a task that has work.
    pub fn works(&self, machine: usize) -> bool {
        self.worker_on(machine).is_some_and(Worker::has_work)
    }

    pub fn holds_task(&self, machine: usize) -> bool {
        self.machines[machine].task.is_some()
    }

    /// Whether the instance's task is ready for work.
    pub fn is_ready(&self, machine: usize) -> bool {
        self.worker_on(machine)
            .is_some_and(|worker| worker.is_ready)
    }

    /// Tasks that start or run and are not stopped, and those of them that run.
    pub fn tasks(&self) -> (u32, u32) {
        let active = |worker: &&usize| {
            let task = &self.workers[**worker].shown;
            task.status != TaskStatus::Stopped && !task.stopping
        };
        let running = |worker: &&usize| self.workers[**worker].shown.status == TaskStatus::Running;
        let count = self.shown.iter().filter(active).count() as u32;
        let run = self.shown.iter().filter(active).filter(running).count() as u32;
        (count, run)
    }
}
