//! The simulated world: a queue, Auto Scaling groups, instances and tasks.
//! Who scales it is not its concern; see [`crate::ours`] and [`crate::models`].

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};

use scaler::observation::{
    Activity, ActivityKind, ActivityStatus, Arrivals, ContainerInstance, ContainerInstanceStatus,
    Group, GroupInstance, HIGHEST_MINUTES, Lifecycle, Observation, Queue, Task, TaskStatus,
};
use scaler::{Action, Plan, Policy};

use crate::stats::Stats;
use crate::trace::Trace;

/// Milliseconds since the trace began.
pub type Ms = i64;

/// The trace's beginning, as the planner's clock shows it.
const EPOCH_SECONDS: i64 = 1_700_000_000;

/// Work that a task takes at a time: one second's worth.
const CHUNK_SECONDS: f64 = 1.0;

/// ECS shows a stopped task for an hour.
const STOPPED_SHOWN_MS: Ms = 3_600_000;

/// Minutes of CloudWatch's sums that are kept.
const METRIC_MINUTES: usize = 16;

/// CloudWatch has a minute's sum this long after the minute.
const METRIC_DELAY: Ms = 60_000;

/// Scaling activities that a read returns.
const ACTIVITIES_SHOWN: usize = 50;

/// Share of the boot time between launch and registration with ECS; the rest
/// is the task's image pull and model load.
const REGISTER_SHARE: f64 = 0.6;

/// How fast things are. The same for every scaler that is compared.
#[derive(Clone, Debug)]
pub struct Physics {
    /// Images per second of one task.
    pub images_per_second: f64,
    /// From asking for an instance to its first vector.
    pub boot_seconds: f64,
    /// From a capacity change to the launch.
    pub group_reaction: Ms,
    /// From terminate to gone.
    pub terminate: Ms,
    /// Container start on an instance that has the image.
    pub warm_start: Ms,
    /// Model load, once the container runs.
    pub load: Ms,
    /// From the container's end to STOPPED.
    pub stop: Ms,
    /// What one image alone takes from receive to delete: download, upload,
    /// publish. Images side by side share it.
    pub round_trip: Ms,
    /// Messages of a lost task come back after this.
    pub visibility: Ms,
}

impl Physics {
    /// The usual delays, with the given rate and boot time.
    pub fn new(images_per_second: f64, boot_seconds: f64) -> Self {
        Self {
            images_per_second,
            boot_seconds,
            group_reaction: 3_000,
            terminate: 40_000,
            warm_start: 3_000,
            load: (boot_seconds * 1000.0 * 0.07) as Ms,
            stop: 2_000,
            round_trip: 300,
            visibility: 180_000,
        }
    }

    fn register_after(&self) -> Ms {
        (self.boot_seconds * 1000.0 * REGISTER_SHARE) as Ms - self.group_reaction
    }

    fn cold_start(&self) -> Ms {
        (self.boot_seconds * 1000.0 * (1.0 - REGISTER_SHARE)) as Ms - self.load
    }
}

/// What happens.
#[derive(Clone, Debug)]
enum Event {
    Arrive(usize),
    Reconcile(usize),
    Register(usize),
    Gone(usize),
    TaskRunning(usize),
    TaskReady(usize),
    ChunkDone(usize, Ms),
    IdleCheck(usize, Ms),
    TaskStopped(usize),
    Reappear(Vec<(Ms, u64)>),
    Lose(usize),
    Timer(u32),
}

/// What a scaler may learn of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// Messages arrived.
    Arrived,
    /// ECS: a task changed its state.
    Task,
    /// ECS: a container instance changed.
    ContainerInstance,
    /// Auto Scaling: a launch or termination ended, or failed.
    Group,
    /// A timer of the scaler's own.
    Timer(u32),
}

/// Who decides.
pub trait Controller {
    /// Sets up timers.
    fn start(&mut self, world: &mut World);
    /// Learns of something.
    fn signal(&mut self, world: &mut World, signal: Signal);
}

#[derive(Clone, Debug)]
struct Instance {
    id: String,
    arn: String,
    group: usize,
    launched: Ms,
    registered: Option<Ms>,
    terminating: Option<Ms>,
    gone: bool,
    lost: bool,
    draining: bool,
    task: Option<usize>,
    image_cached: bool,
    first_ready: Option<Ms>,
    version: i64,
}

#[derive(Clone, Debug)]
struct Chunk {
    pieces: Vec<(Ms, u64)>,
    began: Ms,
}

#[derive(Clone, Debug)]
struct RunningTask {
    arn: String,
    instance: Option<usize>,
    status: TaskStatus,
    created: Ms,
    started: Option<Ms>,
    stopped: Option<Ms>,
    ready: bool,
    stopping: bool,
    broken: bool,
    exit_code: Option<i32>,
    stop_code: Option<&'static str>,
    stop_reason: Option<String>,
    chunk: Option<Chunk>,
    idle_since: Ms,
}

#[derive(Clone, Debug, Default)]
struct GroupState {
    desired: u32,
    max: u32,
    activities: VecDeque<Activity>,
    tags: BTreeMap<String, String>,
    /// No capacity in these spans.
    shortages: Vec<(Ms, Ms)>,
    reconcile_at: Ms,
}

/// What goes wrong by itself.
#[derive(Clone, Debug)]
pub struct Chaos {
    /// Decides everything below.
    pub rng: fastrand::Rng,
    /// Chance that one try of an API call fails; the SDK tries three times.
    pub call_failure: f64,
    /// Spans in which every call fails.
    pub outages: Vec<(Ms, Ms)>,
    /// Chance that an instance never registers.
    pub never_registers: f64,
    /// Chance that an instance is lost at some time of its life.
    pub lost: f64,
    /// Spans in which tasks fail at start.
    pub broken_tasks: Vec<(Ms, Ms)>,
    /// Chance that the queue's count is zero though it is not.
    pub count_dips: f64,
}

impl Chaos {
    /// Whether a call, with the SDK's two more tries, succeeds.
    pub fn call_succeeds(&mut self, now: Ms) -> bool {
        if within(&self.outages, now) {
            return false;
        }
        (0..3).any(|_| self.rng.f64() >= self.call_failure)
    }
}

fn within(spans: &[(Ms, Ms)], at: Ms) -> bool {
    spans.iter().any(|(from, to)| (*from..*to).contains(&at))
}

/// The simulated world.
pub struct World {
    now: Ms,
    sequence: u64,
    events: BinaryHeap<Reverse<(Ms, u64, usize)>>,
    slots: Vec<Option<Event>>,
    free_slots: Vec<usize>,
    physics: Physics,
    /// Tasks exit after this long without work; `None`: never.
    idle_exit: Option<Ms>,
    arrivals: Vec<(Ms, u64)>,
    arrived: usize,
    queue: VecDeque<(Ms, u64)>,
    visible: u64,
    in_flight: u64,
    groups: Vec<GroupState>,
    group_names: Vec<String>,
    instances: Vec<Instance>,
    living: Vec<usize>,
    tasks: Vec<RunningTask>,
    shown: Vec<usize>,
    free_workers: VecDeque<usize>,
    tokens: HashMap<String, ()>,
    signals: Vec<Signal>,
    /// What went on.
    pub stats: Stats,
    /// What goes wrong.
    pub chaos: Option<Chaos>,
    paid: u32,
    footprint: u32,
    last_disturbance: Ms,
    /// Messages sent in each minute.
    sent: VecDeque<(Ms, u64)>,
}

impl World {
    /// A world without instances, with one group per name.
    pub fn new(trace: &Trace, physics: Physics, groups: &[(String, u32)]) -> Self {
        let mut world = Self {
            now: 0,
            sequence: 0,
            events: BinaryHeap::new(),
            slots: Vec::new(),
            free_slots: Vec::new(),
            physics,
            idle_exit: None,
            arrivals: trace.arrivals.clone(),
            arrived: 0,
            queue: VecDeque::new(),
            visible: 0,
            in_flight: 0,
            groups: groups
                .iter()
                .map(|(_, max)| GroupState {
                    max: *max,
                    reconcile_at: -1,
                    ..GroupState::default()
                })
                .collect(),
            group_names: groups.iter().map(|(name, _)| name.clone()).collect(),
            instances: Vec::new(),
            living: Vec::new(),
            tasks: Vec::new(),
            shown: Vec::new(),
            free_workers: VecDeque::new(),
            tokens: HashMap::new(),
            signals: Vec::new(),
            stats: Stats::default(),
            chaos: None,
            paid: 0,
            footprint: 0,
            last_disturbance: 0,
            sent: VecDeque::new(),
        };
        if let Some((at, _)) = world.arrivals.first() {
            let at = *at;
            world.schedule(at, Event::Arrive(0));
        }
        world
    }

    /// Now.
    pub fn now(&self) -> Ms {
        self.now
    }

    /// Tasks exit after this long without work.
    pub fn set_idle_exit(&mut self, after: Option<Ms>) {
        self.idle_exit = after;
    }

    /// Spans without capacity in a group.
    pub fn set_shortages(&mut self, group: usize, spans: Vec<(Ms, Ms)>) {
        self.groups[group].shortages = spans;
    }

    /// Messages that nobody has received.
    pub fn visible(&self) -> u64 {
        self.visible
    }

    /// Messages that are not done.
    pub fn backlog(&self) -> u64 {
        self.visible + self.in_flight
    }

    /// Instances that are paid for.
    pub fn paid(&self) -> u32 {
        self.paid
    }

    /// When something went wrong last that delays giving back.
    pub fn last_disturbance(&self) -> Ms {
        self.last_disturbance
    }

    /// Messages of the trace that have not arrived yet.
    pub fn expects_more(&self) -> bool {
        self.arrived < self.arrivals.len()
    }

    fn schedule(&mut self, at: Ms, event: Event) {
        self.sequence += 1;
        let slot = match self.free_slots.pop() {
            Some(slot) => {
                self.slots[slot] = Some(event);
                slot
            }
            None => {
                self.slots.push(Some(event));
                self.slots.len() - 1
            }
        };
        self.events.push(Reverse((at, self.sequence, slot)));
    }

    /// Gives the controller a [`Signal::Timer`] at `at`.
    pub fn set_timer(&mut self, at: Ms, number: u32) {
        self.schedule(at.max(self.now), Event::Timer(number));
    }

    /// Runs until all work is done and nothing is paid for any more, or until
    /// `horizon`. Answers whether it ended by itself.
    pub fn run(&mut self, controller: &mut dyn Controller, horizon: Ms) -> bool {
        controller.start(self);
        while let Some(Reverse((at, _, slot))) = self.events.pop() {
            if at > horizon {
                self.now = horizon;
                return false;
            }
            self.now = at;
            self.free_slots.push(slot);
            if let Some(event) = self.slots[slot].take() {
                self.handle(event);
            }
            while let Some(signal) = self.signals.pop() {
                controller.signal(self, signal);
            }
            let is_over = !self.expects_more()
                && self.backlog() == 0
                && self.footprint == 0
                && self.groups.iter().all(|group| group.desired == 0);
            if is_over {
                return true;
            }
        }
        true
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive(index) => self.arrive(index),
            Event::Reconcile(group) => self.reconcile(group),
            Event::Register(instance) => self.register(instance),
            Event::Gone(instance) => self.gone(instance),
            Event::TaskRunning(task) => self.task_running(task),
            Event::TaskReady(task) => self.task_ready(task),
            Event::ChunkDone(task, began) => self.chunk_done(task, began),
            Event::IdleCheck(task, since) => self.idle_check(task, since),
            Event::TaskStopped(task) => self.task_stopped(task),
            Event::Reappear(pieces) => self.reappear(pieces),
            Event::Lose(instance) => self.lose(instance),
            Event::Timer(number) => self.signals.push(Signal::Timer(number)),
        }
    }

    // The queue.

    fn arrive(&mut self, index: usize) {
        let (at, count) = self.arrivals[index];
        self.queue.push_back((at, count));
        self.visible += count;
        self.arrived = index + 1;
        self.stats.arrived += count;
        self.stats.first_arrival.get_or_insert(at);
        let minute = at.div_euclid(60_000);
        match self.sent.back_mut() {
            Some((known, sum)) if *known == minute => *sum += count,
            _ => self.sent.push_back((minute, count)),
        }
        while self.sent.len() > METRIC_MINUTES {
            self.sent.pop_front();
        }
        if let Some((next, _)) = self.arrivals.get(index + 1) {
            let next = *next;
            self.schedule(next, Event::Arrive(index + 1));
        }
        self.signals.push(Signal::Arrived);
        self.dispatch();
        self.note();
    }

    fn reappear(&mut self, pieces: Vec<(Ms, u64)>) {
        for (at, count) in pieces.into_iter().rev() {
            self.queue.push_front((at, count));
            self.visible += count;
            self.in_flight -= count;
        }
        self.dispatch();
        self.note();
    }

    fn take(&mut self, mut wanted: u64) -> Vec<(Ms, u64)> {
        let mut pieces = Vec::new();
        while wanted > 0 {
            let Some((at, count)) = self.queue.front_mut() else {
                break;
            };
            let taken = (*count).min(wanted);
            pieces.push((*at, taken));
            *count -= taken;
            wanted -= taken;
            self.visible -= taken;
            self.in_flight += taken;
            if *count == 0 {
                self.queue.pop_front();
            }
        }
        pieces
    }

    /// Gives visible messages to tasks that wait, in turn: SQS favours nobody.
    fn dispatch(&mut self) {
        while self.visible > 0 {
            let Some(task) = self.free_workers.pop_front() else {
                return;
            };
            if !self.can_work(task) {
                continue;
            }
            let sharers = self.free_workers.len() as u64 + 1;
            let most = (self.physics.images_per_second * CHUNK_SECONDS).max(1.0) as u64;
            let count = self.visible.div_ceil(sharers).min(most);
            let pieces = self.take(count);
            let duration = (count as f64 / self.physics.images_per_second * 1000.0).ceil() as Ms;
            self.tasks[task].chunk = Some(Chunk {
                pieces,
                began: self.now,
            });
            let duration = duration.max(self.physics.round_trip);
            let (at, began) = (self.now + duration, self.now);
            self.schedule(at, Event::ChunkDone(task, began));
        }
    }

    fn can_work(&self, task: usize) -> bool {
        let task = &self.tasks[task];
        task.ready && !task.stopping && task.chunk.is_none() && task.status == TaskStatus::Running
    }

    fn chunk_done(&mut self, task: usize, began: Ms) {
        let is_current = self.tasks[task]
            .chunk
            .as_ref()
            .is_some_and(|chunk| chunk.began == began);
        if !is_current || self.tasks[task].status != TaskStatus::Running {
            return;
        }
        let Some(chunk) = self.tasks[task].chunk.take() else {
            return;
        };
        let mut done_before = 0;
        let images: u64 = chunk.pieces.iter().map(|(_, count)| count).sum();
        let per_image = (self.now - chunk.began) as f64 / images.max(1) as f64;
        for (arrived, count) in &chunk.pieces {
            self.stats
                .images_done(*arrived, *count, chunk.began, done_before, per_image);
            done_before += count;
        }
        self.in_flight -= done_before;
        self.stats.busy += self.now - chunk.began;
        self.stats.last_done = self.now;
        self.wait_for_work(task);
        self.note();
    }

    fn wait_for_work(&mut self, task: usize) {
        if self.tasks[task].stopping {
            self.end_task(
                task,
                Some(0),
                "EssentialContainerExited",
                "drained".to_owned(),
            );
            return;
        }
        self.tasks[task].idle_since = self.now;
        self.free_workers.push_back(task);
        self.dispatch();
        if self.tasks[task].chunk.is_none()
            && let Some(after) = self.idle_exit
        {
            let (at, since) = (self.now + after, self.now);
            self.schedule(at, Event::IdleCheck(task, since));
        }
    }

    fn idle_check(&mut self, task: usize, since: Ms) {
        let state = &self.tasks[task];
        let waited = state.idle_since == since && state.chunk.is_none();
        if waited && state.status == TaskStatus::Running && !state.stopping {
            self.end_task(
                task,
                Some(0),
                "EssentialContainerExited",
                "Essential container in task exited".to_owned(),
            );
        }
    }

    // Instances.

    /// Asks a group for capacity.
    pub fn set_desired(&mut self, group: usize, desired: u32) {
        self.groups[group].desired = desired;
        self.reconcile_in(group, self.physics.group_reaction);
    }

    fn reconcile_in(&mut self, group: usize, after: Ms) {
        let at = self.now + after;
        self.groups[group].reconcile_at = at;
        self.schedule(at, Event::Reconcile(group));
    }

    /// Instances of the group that are there and stay.
    pub fn living_in(&self, group: usize) -> u32 {
        self.living
            .iter()
            .filter(|index| {
                let instance = &self.instances[**index];
                instance.group == group && instance.terminating.is_none()
            })
            .count() as u32
    }

    fn reconcile(&mut self, group: usize) {
        if self.groups[group].reconcile_at != self.now {
            return;
        }
        let living = self.living_in(group);
        let desired = self.groups[group].desired.min(self.groups[group].max);
        if living >= desired {
            return;
        }
        if within(&self.groups[group].shortages, self.now) {
            self.log_activity(
                group,
                ActivityKind::Launch,
                None,
                ActivityStatus::Failed,
                Some("InsufficientInstanceCapacity: there is no g4dn.xlarge in the zone"),
            );
            self.signals.push(Signal::Group);
            self.reconcile_in(group, 60_000);
            return;
        }
        for _ in living..desired {
            self.launch(group);
        }
        self.signals.push(Signal::Group);
        self.note();
    }

    fn launch(&mut self, group: usize) {
        let index = self.instances.len();
        let id = format!("i-{index:08x}");
        self.log_activity(
            group,
            ActivityKind::Launch,
            Some(id.clone()),
            ActivityStatus::Successful,
            None,
        );
        self.instances.push(Instance {
            arn: format!("container-instance/{index}"),
            id,
            group,
            launched: self.now,
            registered: None,
            terminating: None,
            gone: false,
            lost: false,
            draining: false,
            task: None,
            image_cached: false,
            first_ready: None,
            version: 1,
        });
        self.living.push(index);
        self.paid += 1;
        self.footprint += 1;
        self.stats.instances_started += 1;
        self.stats.instance_times.push(self.now);
        self.stats.most_instances = self.stats.most_instances.max(self.footprint);
        let after = self.physics.register_after();
        let mut registers = true;
        if let Some(chaos) = &mut self.chaos {
            registers = chaos.rng.f64() >= chaos.never_registers;
            if chaos.rng.f64() < chaos.lost {
                let at = self.now + (chaos.rng.f64() * 1_800_000.0) as Ms;
                self.schedule(at, Event::Lose(index));
            }
        }
        if registers {
            self.schedule(self.now + after, Event::Register(index));
        }
    }

    fn log_activity(
        &mut self,
        group: usize,
        kind: ActivityKind,
        instance: Option<String>,
        status: ActivityStatus,
        message: Option<&str>,
    ) {
        let started_at = seconds(self.now);
        let activities = &mut self.groups[group].activities;
        activities.push_front(Activity {
            kind,
            instance,
            started_at,
            status,
            message: message.map(str::to_owned),
        });
        activities.truncate(ACTIVITIES_SHOWN);
    }

    fn register(&mut self, index: usize) {
        let instance = &mut self.instances[index];
        if instance.terminating.is_some() {
            return;
        }
        instance.registered = Some(self.now);
        instance.version += 1;
        self.signals.push(Signal::ContainerInstance);
    }

    /// Terminates an instance.
    pub fn terminate(&mut self, index: usize, decrement: bool) {
        if self.instances[index].terminating.is_some() {
            return;
        }
        self.stop_paying(index);
        let group = self.instances[index].group;
        if decrement {
            self.groups[group].desired = self.groups[group].desired.saturating_sub(1);
        } else {
            self.reconcile_in(group, self.physics.group_reaction);
        }
        let id = self.instances[index].id.clone();
        self.log_activity(
            group,
            ActivityKind::Terminate,
            Some(id),
            ActivityStatus::Successful,
            None,
        );
        if let Some(task) = self.instances[index].task {
            self.end_task(task, None, "", "Host EC2 (instance) terminated.".to_owned());
        }
        self.schedule(self.now + self.physics.terminate, Event::Gone(index));
        self.note();
    }

    fn stop_paying(&mut self, index: usize) {
        let instance = &mut self.instances[index];
        instance.terminating = Some(self.now);
        let paid = self.now - instance.launched;
        let booting = instance.first_ready.unwrap_or(self.now) - instance.launched;
        self.stats.paid += paid;
        self.stats.booting += booting;
        self.paid -= 1;
    }

    fn gone(&mut self, index: usize) {
        if self.instances[index].gone {
            return;
        }
        self.instances[index].gone = true;
        self.living.retain(|living| *living != index);
        if !self.instances[index].lost {
            self.footprint -= 1;
        }
        self.signals.push(Signal::Group);
        self.note();
    }

    /// The instance vanishes (hardware, Spot): nobody asked for it, the group
    /// replaces it, ECS notices a little later.
    fn lose(&mut self, index: usize) {
        if self.instances[index].terminating.is_some() {
            return;
        }
        self.last_disturbance = self.now;
        self.stop_paying(index);
        self.instances[index].lost = true;
        self.footprint -= 1;
        let group = self.instances[index].group;
        self.reconcile_in(group, 20_000);
        if let Some(task) = self.instances[index].task {
            let lost = self.tasks[task].chunk.take();
            if let Some(chunk) = lost {
                let at = self.now + self.physics.visibility;
                self.schedule(at, Event::Reappear(chunk.pieces));
            }
            self.tasks[task].ready = false;
            self.tasks[task].stop_reason = Some("Host EC2 (instance) terminated.".to_owned());
            self.schedule(self.now + 30_000, Event::TaskStopped(task));
        }
        self.schedule(self.now + self.physics.terminate, Event::Gone(index));
        self.note();
    }

    /// Instances that take a task: registered, there, empty.
    pub fn free_instances(&self) -> Vec<usize> {
        self.living
            .iter()
            .copied()
            .filter(|index| {
                let instance = &self.instances[*index];
                instance.registered.is_some()
                    && instance.terminating.is_none()
                    && !instance.draining
                    && instance.task.is_none()
            })
            .collect()
    }

    // Tasks.

    /// Starts a task on an instance.
    pub fn start_task(&mut self, instance: usize) -> usize {
        let index = self.tasks.len();
        let is_cached = self.instances[instance].image_cached;
        self.instances[instance].task = Some(index);
        self.instances[instance].version += 1;
        let now = self.now;
        let broken = self
            .chaos
            .as_ref()
            .is_some_and(|chaos| within(&chaos.broken_tasks, now));
        self.tasks.push(RunningTask {
            arn: format!("task/{index}"),
            instance: Some(instance),
            status: TaskStatus::Pending,
            created: now,
            started: None,
            stopped: None,
            ready: false,
            stopping: false,
            broken,
            exit_code: None,
            stop_code: None,
            stop_reason: None,
            chunk: None,
            idle_since: now,
        });
        self.shown.push(index);
        self.stats.tasks_launched += 1;
        self.stats.launch_times.push(now);
        let after = if is_cached {
            self.physics.warm_start
        } else {
            self.physics.cold_start()
        };
        self.schedule(now + after, Event::TaskRunning(index));
        index
    }

    fn task_running(&mut self, task: usize) {
        if self.tasks[task].status != TaskStatus::Pending || self.tasks[task].stopping {
            return;
        }
        self.tasks[task].status = TaskStatus::Running;
        self.tasks[task].started = Some(self.now);
        if let Some(instance) = self.tasks[task].instance {
            self.instances[instance].image_cached = true;
        }
        self.schedule(self.now + self.physics.load, Event::TaskReady(task));
        self.signals.push(Signal::Task);
    }

    fn task_ready(&mut self, task: usize) {
        let state = &self.tasks[task];
        let is_lost = state
            .instance
            .is_some_and(|instance| self.instances[instance].terminating.is_some());
        if state.status != TaskStatus::Running || is_lost || state.stopping {
            return;
        }
        if state.broken {
            self.end_task(
                task,
                Some(1),
                "EssentialContainerExited",
                "Essential container in task exited: the model bundle is damaged".to_owned(),
            );
            return;
        }
        self.tasks[task].ready = true;
        if let Some(instance) = self.tasks[task].instance {
            let first_ready = &mut self.instances[instance].first_ready;
            first_ready.get_or_insert(self.now);
        }
        self.wait_for_work(task);
    }

    fn end_task(
        &mut self,
        task: usize,
        exit_code: Option<i32>,
        code: &'static str,
        reason: String,
    ) {
        let lost = self.tasks[task].chunk.take();
        if let Some(chunk) = lost {
            self.reappear(chunk.pieces);
        }
        let state = &mut self.tasks[task];
        state.ready = false;
        state.stopping = true;
        state.status = TaskStatus::Deactivating;
        state.exit_code = exit_code;
        state.stop_code = (!code.is_empty()).then_some(code);
        state.stop_reason = Some(reason);
        // The container's end, which is what counts as the end of work.
        state.stopped = Some(self.now);
        self.schedule(self.now + self.physics.stop, Event::TaskStopped(task));
    }

    fn task_stopped(&mut self, task: usize) {
        if self.tasks[task].status == TaskStatus::Stopped {
            return;
        }
        self.tasks[task].status = TaskStatus::Stopped;
        self.tasks[task].stopping = true;
        self.tasks[task].ready = false;
        let now = self.now;
        self.tasks[task].stopped.get_or_insert(now);
        if let Some(instance) = self.tasks[task].instance {
            self.instances[instance].version += 1;
            if self.instances[instance].task == Some(task) {
                self.instances[instance].task = None;
            }
        }
        self.signals.push(Signal::Task);
        self.signals.push(Signal::ContainerInstance);
    }

    /// Whether the instance holds a task that has work.
    pub fn works(&self, instance: usize) -> bool {
        self.instances[instance]
            .task
            .is_some_and(|task| self.tasks[task].chunk.is_some())
    }

    /// Whether the instance holds a task.
    pub fn holds_task(&self, instance: usize) -> bool {
        self.instances[instance].task.is_some()
    }

    /// Instances that are there and stay.
    pub fn living(&self) -> Vec<usize> {
        self.living
            .iter()
            .copied()
            .filter(|index| self.instances[*index].terminating.is_none())
            .collect()
    }

    /// Whether the instance's task is ready for work.
    pub fn is_ready(&self, instance: usize) -> bool {
        self.instances[instance]
            .task
            .is_some_and(|task| self.tasks[task].ready)
    }

    /// Tasks of the cluster that run or start.
    pub fn active_tasks(&self) -> u32 {
        self.shown
            .iter()
            .filter(|index| {
                let task = &self.tasks[**index];
                task.status != TaskStatus::Stopped && !task.stopping
            })
            .count() as u32
    }

    /// Tasks that are RUNNING.
    pub fn running_tasks(&self) -> u32 {
        self.shown
            .iter()
            .filter(|index| {
                let task = &self.tasks[**index];
                task.status == TaskStatus::Running && !task.stopping
            })
            .count() as u32
    }

    fn note(&mut self) {
        let backlog = self.backlog();
        self.stats.note(self.now, self.paid, backlog);
    }

    // The APIs, as the scaler sees them.

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
        let tasks = &self.tasks;
        self.shown.retain(|index| {
            let task = &tasks[*index];
            task.status != TaskStatus::Stopped
                || task
                    .stopped
                    .is_none_or(|stopped| now - stopped < STOPPED_SHOWN_MS)
        });
        let queue = if dips {
            Queue::default()
        } else {
            Queue {
                visible: self.visible,
                in_flight: self.in_flight,
                delayed: 0,
                oldest_age: None,
            }
        };
        Some(Observation {
            at: seconds(now),
            queue,
            arrivals: self.seen_arrivals(),
            images_per_second: None,
            tasks: self
                .shown
                .iter()
                .map(|index| self.seen_task(*index))
                .collect(),
            container_instances: self
                .living
                .iter()
                .filter_map(|index| self.seen_container_instance(*index))
                .collect(),
            groups: (0..self.groups.len())
                .map(|group| self.seen_group(group))
                .collect(),
            missing: Vec::new(),
        })
    }

    fn seen_arrivals(&self) -> Option<Arrivals> {
        // SQS stops reporting for a queue that nobody has used for hours.
        let (newest, _) = self.sent.back()?;
        let this_minute = (self.now - METRIC_DELAY).div_euclid(60_000);
        if this_minute - newest > 6 * 60 {
            return None;
        }
        let mut minutes = [0.0; HIGHEST_MINUTES];
        for (minute, sum) in &self.sent {
            let back = this_minute - 1 - minute;
            if let Some(slot) = usize::try_from(back)
                .ok()
                .and_then(|back| minutes.get_mut(back))
            {
                *slot = *sum as f64;
            }
        }
        Some(Arrivals::from_minutes(&minutes))
    }

    fn seen_task(&self, index: usize) -> Task {
        let task = &self.tasks[index];
        Task {
            arn: task.arn.clone(),
            status: task.status,
            stopping: task.stopping,
            container_instance: task
                .instance
                .map(|instance| self.instances[instance].arn.clone()),
            created_at: Some(seconds(task.created)),
            started_at: task.started.map(seconds),
            stopped_at: task
                .stopped
                .filter(|_| task.status == TaskStatus::Stopped)
                .map(seconds),
            stop_code: task.stop_code.map(str::to_owned),
            stop_reason: task.stop_reason.clone(),
            exit_code: task.exit_code,
        }
    }

    fn seen_container_instance(&self, index: usize) -> Option<ContainerInstance> {
        let instance = &self.instances[index];
        let registered = instance.registered?;
        Some(ContainerInstance {
            arn: instance.arn.clone(),
            instance_id: instance.id.clone(),
            status: if instance.draining {
                ContainerInstanceStatus::Draining
            } else {
                ContainerInstanceStatus::Active
            },
            agent_connected: instance.terminating.is_none(),
            registered_at: Some(seconds(registered)),
            version: instance.version,
            gpus: 1,
            free_gpus: u32::from(instance.task.is_none()),
        })
    }

    fn seen_group(&self, group: usize) -> Group {
        let state = &self.groups[group];
        Group {
            name: self.group_names[group].clone(),
            desired: state.desired,
            min: 0,
            max: state.max,
            instances: self
                .living
                .iter()
                .filter(|index| self.instances[**index].group == group)
                .filter(|index| !self.instances[**index].lost)
                .map(|index| {
                    let instance = &self.instances[*index];
                    GroupInstance {
                        id: instance.id.clone(),
                        state: match (instance.terminating, instance.registered) {
                            (Some(_), _) => Lifecycle::Terminating,
                            (None, Some(_)) => Lifecycle::InService,
                            (None, None) => Lifecycle::Pending,
                        },
                        healthy: true,
                        zone: String::new(),
                        instance_type: String::new(),
                    }
                })
                .collect(),
            activities: state.activities.iter().cloned().collect(),
            warm_pool: None,
            tags: state.tags.clone(),
        }
    }

    /// Carries a plan out as `scaler::act` does. Answers whether every call succeeded.
    pub fn apply(&mut self, plan: &Plan, policy: &Policy) -> bool {
        let mut all_succeeded = true;
        for decision in &plan.decisions {
            let now = self.now;
            if let Some(chaos) = &mut self.chaos
                && !chaos.call_succeeds(now)
            {
                all_succeeded = false;
                continue;
            }
            self.apply_one(&decision.action, policy);
        }
        all_succeeded
    }

    fn apply_one(&mut self, action: &Action, policy: &Policy) {
        match action {
            Action::Release {
                instance,
                decrement,
                ..
            } => {
                let Some(index) = self.find_instance(instance) else {
                    return;
                };
                if self.instances[index].registered.is_some() {
                    self.instances[index].draining = true;
                }
                if self.instances[index].task.is_none() {
                    self.terminate(index, *decrement);
                }
            }
            Action::StopTask { task, reason } => {
                let found = self
                    .shown
                    .iter()
                    .copied()
                    .find(|index| self.tasks[*index].arn == *task);
                if let Some(index) = found
                    && self.tasks[index].status != TaskStatus::Stopped
                    && !self.tasks[index].stopping
                {
                    self.stop_task(index, reason);
                }
            }
            Action::SetDesired { group, to, .. } => {
                if let Some(index) = self.group_names.iter().position(|name| name == group) {
                    // Above MaxSize, Auto Scaling refuses.
                    if *to <= self.groups[index].max {
                        self.set_desired(index, *to);
                    }
                }
            }
            Action::Activate { instance, .. } => {
                if let Some(index) = self.find_instance(instance) {
                    self.instances[index].draining = false;
                }
            }
            Action::RunTasks { count, token } => {
                // The same token is the same call: it launches nothing twice.
                if self.tokens.insert(token.clone(), ()).is_some() {
                    return;
                }
                let free = self.free_instances();
                for instance in free.into_iter().take(count.get() as usize) {
                    self.start_task(instance);
                }
            }
            Action::Remember { group, key, value } => {
                if let Some(index) = self.group_names.iter().position(|name| name == group) {
                    self.groups[index].tags.insert(key.clone(), value.clone());
                }
            }
        }
        debug_assert!(
            self.groups.iter().map(|group| group.desired).sum::<u32>()
                <= policy.max_instances.max(1) * 2,
            "desired capacities are out of bounds"
        );
    }

    /// StopTask: a task that works drains first, any other ends at once.
    fn stop_task(&mut self, task: usize, reason: &str) {
        if self.tasks[task].chunk.is_some() {
            self.tasks[task].stopping = true;
            return;
        }
        let exit_code = self.tasks[task].ready.then_some(0);
        self.end_task(task, exit_code, "UserInitiated", reason.to_owned());
    }

    fn find_instance(&self, id: &str) -> Option<usize> {
        self.living
            .iter()
            .copied()
            .find(|index| self.instances[*index].id == id)
            .filter(|index| self.instances[*index].terminating.is_none())
    }
}

fn seconds(at: Ms) -> i64 {
    EPOCH_SECONDS + at.div_euclid(1000)
}
