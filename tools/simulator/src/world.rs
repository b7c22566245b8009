//! The simulated world: a queue, Auto Scaling groups, instances and tasks.
//! Who scales it is not its concern; see [`crate::ours`] and [`crate::models`].

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, VecDeque};

use planner::observation::{
    Activity, ActivityKind, ActivityStatus, Arrivals, ContainerInstance, ContainerInstanceStatus,
    Group, GroupInstance, HIGHEST_MINUTES, Lifecycle, Observation, Queue, Task, TaskStatus,
};
use planner::{Action, Plan, Policy};

use crate::stats::Stats;
use crate::trace::Trace;

/// Milliseconds since the trace began.
pub type Ms = i64;

/// Images: when they arrived in the queue, and how many.
type Pieces = Vec<(Ms, u64)>;

/// The trace's beginning, as the planner's clock shows it.
const EPOCH_SECONDS: i64 = 1_700_000_000;

/// What a poll brings at most, as seconds of one task's work: the grain of the
/// simulation. A task polls on while it has room, so nothing waits for a grain;
/// the room that one takes is free again when its last image is done.
const GRAIN_SECONDS: f64 = 1.0;

/// Messages that a task holds, as `gpu-task` on a GPU does: what it finishes in
/// half of the visibility, at least three batches of 64, at most MAX_MESSAGES
/// (`gpu-task/src/holding.rs`, and the defaults in `gpu-task/src/config.rs`).
const HELD_SHARE_OF_VISIBILITY: f64 = 0.5;
/// See [`HELD_SHARE_OF_VISIBILITY`].
const HELD_LEAST: u64 = 192;
/// See [`HELD_SHARE_OF_VISIBILITY`].
const HELD_MOST: u64 = 1024;

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
    /// From a message's receive to its image's place in the model's queue:
    /// download and decode. Images do it side by side.
    pub fetch: Ms,
    /// From the model to the message's deletion: store and publish. Images do
    /// it side by side.
    pub deliver: Ms,
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
            // Small objects come and go in 100 to 200 ms (Amazon S3 user
            // guide, "Best practices design patterns: optimizing Amazon S3
            // performance").
            fetch: 150,
            deliver: 150,
            visibility: 180_000,
        }
    }

    /// Messages that a task holds at most.
    fn held_most(&self) -> u64 {
        let visible_again = self.visibility as f64 / 1000.0;
        let finishable = self.images_per_second * visible_again * HELD_SHARE_OF_VISIBILITY;
        (finishable as u64).clamp(HELD_LEAST, HELD_MOST)
    }

    /// Milliseconds of the model for one image.
    fn per_image(&self) -> f64 {
        1000.0 / self.images_per_second
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
    GrainDone(usize, u64),
    IdleCheck(usize, Ms),
    TaskStopped(usize),
    Reappear(Pieces),
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

/// Images that a task received together. They go through its model one after
/// the other, behind those that it received before.
#[derive(Clone, Debug)]
struct Grain {
    number: u64,
    pieces: Pieces,
    images: u64,
    /// When the model begins with the first of them.
    begins: f64,
}

impl Grain {
    /// How many of its images are deleted from the queue by `now`.
    fn done_by(&self, now: Ms, physics: &Physics) -> u64 {
        let at_model = now as f64 - physics.deliver as f64 - self.begins;
        let done = (at_model / physics.per_image()).max(0.0) as u64;
        done.min(self.images)
    }
}

/// The first `count` images of the pieces, and the rest.
fn split(pieces: Pieces, mut count: u64) -> (Pieces, Pieces) {
    let (mut first, mut rest) = (Vec::new(), Vec::new());
    for (at, images) in pieces {
        let taken = images.min(count);
        count -= taken;
        if taken > 0 {
            first.push((at, taken));
        }
        if images > taken {
            rest.push((at, images - taken));
        }
    }
    (first, rest)
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
    /// What it holds, in the order in which the model takes it.
    grains: VecDeque<Grain>,
    /// Images in them.
    held: u64,
    /// When the model is through with them.
    model_free: f64,
    idle_since: Ms,
}

impl RunningTask {
    /// Whether it receives, or would if it had room.
    fn receives(&self) -> bool {
        self.ready && !self.stopping && self.status == TaskStatus::Running
    }
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
    /// Tasks that receive, in the order in which they are given messages.
    receivers: VecDeque<usize>,
    grains: u64,
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
            receivers: VecDeque::new(),
            grains: 0,
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
            Event::GrainDone(task, number) => self.grain_done(task, number),
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

    fn reappear(&mut self, pieces: Pieces) {
        for (at, count) in pieces.into_iter().rev() {
            self.queue.push_front((at, count));
            self.visible += count;
            self.in_flight -= count;
        }
        self.dispatch();
        self.note();
    }

    fn take(&mut self, mut wanted: u64) -> Pieces {
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

    /// Gives visible messages to the tasks that have room, in turn: every task
    /// polls while it works, and SQS favours nobody.
    fn dispatch(&mut self) {
        let grain = (self.physics.images_per_second * GRAIN_SECONDS).max(1.0) as u64;
        let held_most = self.physics.held_most();
        let tasks = &self.tasks;
        self.receivers.retain(|task| tasks[*task].receives());
        while self.visible > 0 {
            let with_room = |task: &&usize| self.tasks[**task].held < held_most;
            let sharers = self.receivers.iter().filter(with_room).count() as u64;
            if sharers == 0 {
                return;
            }
            let share = self.visible.div_ceil(sharers).min(grain);
            for _ in 0..self.receivers.len() {
                if self.visible == 0 {
                    return;
                }
                let Some(task) = self.receivers.pop_front() else {
                    return;
                };
                self.receivers.push_back(task);
                let room = held_most.saturating_sub(self.tasks[task].held);
                if room > 0 {
                    self.receive(task, share.min(room));
                }
            }
        }
    }

    /// A task receives `count` messages.
    fn receive(&mut self, task: usize, count: u64) {
        let pieces = self.take(count);
        let images: u64 = pieces.iter().map(|(_, count)| count).sum();
        self.grains += 1;
        let number = self.grains;
        let fetched = (self.now + self.physics.fetch) as f64;
        let state = &mut self.tasks[task];
        let begins = fetched.max(state.model_free);
        state.model_free = begins + images as f64 * self.physics.per_image();
        state.held += images;
        state.grains.push_back(Grain {
            number,
            pieces,
            images,
            begins,
        });
        let at = state.model_free.ceil() as Ms + self.physics.deliver;
        self.schedule(at, Event::GrainDone(task, number));
    }

    fn grain_done(&mut self, task: usize, number: u64) {
        let state = &mut self.tasks[task];
        // A task that was stopped or lost has given it away.
        if state.grains.front().map(|grain| grain.number) != Some(number) {
            return;
        }
        let Some(grain) = state.grains.pop_front() else {
            return;
        };
        state.held -= grain.images;
        let is_idle = state.grains.is_empty();
        self.count_done(grain.begins, grain.pieces);
        if is_idle {
            self.wait_for_work(task);
        } else {
            self.dispatch();
        }
        self.note();
    }

    /// Counts images of a grain, its first ones, as done.
    fn count_done(&mut self, model_begins: f64, pieces: Pieces) {
        let per_image = self.physics.per_image();
        let began = model_begins + self.physics.deliver as f64;
        let mut done_before = 0;
        for (arrived, count) in pieces {
            self.stats
                .images_done(arrived, count, began, done_before, per_image);
            done_before += count;
        }
        if done_before > 0 {
            self.in_flight -= done_before;
            self.stats.busy += (done_before as f64 * per_image) as Ms;
            self.stats.last_done = self.now;
        }
    }

    /// The task ends now: what it has done is done, the rest is answered.
    fn drop_work(&mut self, task: usize) -> Pieces {
        let grains = std::mem::take(&mut self.tasks[task].grains);
        self.tasks[task].held = 0;
        let mut rest = Vec::new();
        for grain in grains {
            let done = grain.done_by(self.now, &self.physics);
            let (finished, unfinished) = split(grain.pieces, done);
            self.count_done(grain.begins, finished);
            rest.extend(unfinished);
        }
        rest
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
        self.dispatch();
        if self.tasks[task].grains.is_empty()
            && let Some(after) = self.idle_exit
        {
            let (at, since) = (self.now + after, self.now);
            self.schedule(at, Event::IdleCheck(task, since));
        }
    }

    fn idle_check(&mut self, task: usize, since: Ms) {
        let state = &self.tasks[task];
        let waited = state.idle_since == since && state.grains.is_empty();
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
            let lost = self.drop_work(task);
            if !lost.is_empty() {
                let at = self.now + self.physics.visibility;
                self.schedule(at, Event::Reappear(lost));
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
            grains: VecDeque::new(),
            held: 0,
            model_free: 0.0,
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
        self.receivers.push_back(task);
        self.wait_for_work(task);
    }

    fn end_task(
        &mut self,
        task: usize,
        exit_code: Option<i32>,
        code: &'static str,
        reason: String,
    ) {
        let left = self.drop_work(task);
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
        if !left.is_empty() {
            self.reappear(left);
        }
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
            .is_some_and(|task| !self.tasks[task].grains.is_empty())
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

    /// StopTask: what the model has begun with is finished, what waits for it
    /// is handed back at once; a task without work ends at once.
    fn stop_task(&mut self, task: usize, reason: &str) {
        let now = self.now as f64;
        let state = &mut self.tasks[task];
        let begun = state.grains.partition_point(|grain| grain.begins <= now);
        let waiting = state.grains.split_off(begun);
        let handed_back: Pieces = waiting
            .iter()
            .flat_map(|grain| grain.pieces.iter().copied())
            .collect();
        state.held -= waiting.iter().map(|grain| grain.images).sum::<u64>();
        if begun == 0 {
            let exit_code = state.ready.then_some(0);
            self.end_task(task, exit_code, "UserInitiated", reason.to_owned());
        } else {
            state.stopping = true;
        }
        if !handed_back.is_empty() {
            self.reappear(handed_back);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Images per second of these tests.
    const RATE: f64 = 50.0;
    /// What one image takes alone: 20 ms of the model between two transfers.
    const ALONE: u32 = 150 + 20 + 150;
    /// All tasks are ready by then.
    const READY: Ms = 60_000;

    type Deed = fn(&mut World);

    /// So many tasks, for ever, and deeds at their times.
    struct Fleet {
        tasks: u32,
        deeds: Vec<(Ms, Deed)>,
    }

    impl Controller for Fleet {
        fn start(&mut self, world: &mut World) {
            world.set_desired(0, self.tasks);
            for (number, (at, _)) in self.deeds.iter().enumerate() {
                world.set_timer(*at, number as u32);
            }
        }

        fn signal(&mut self, world: &mut World, signal: Signal) {
            match signal {
                Signal::Timer(number) => (self.deeds[number as usize].1)(world),
                _ => {
                    for instance in world.free_instances() {
                        world.start_task(instance);
                    }
                }
            }
        }
    }

    fn run(tasks: u32, arrivals: &[(Ms, u64)], deeds: &[(Ms, Deed)]) -> World {
        let trace = Trace {
            name: "t".to_owned(),
            about: String::new(),
            arrivals: arrivals.to_vec(),
        };
        let physics = Physics::new(RATE, 10.0);
        let mut world = World::new(&trace, physics, &[("gpu".to_owned(), 5)]);
        let mut fleet = Fleet {
            tasks,
            deeds: deeds.to_vec(),
        };
        world.run(&mut fleet, 3_600_000);
        world
    }

    fn latencies(world: &World) -> Vec<u32> {
        let mut all = Vec::new();
        for (latency, images) in &world.stats.latencies {
            all.extend(std::iter::repeat_n(*latency, *images as usize));
        }
        all.sort_unstable();
        all
    }

    #[test]
    fn an_image_is_received_while_another_is_in_work() {
        let arrivals = [(READY, 1), (READY + 30, 1), (READY + 200, 1)];
        assert_eq!(latencies(&run(1, &arrivals, &[])), [ALONE; 3]);
    }

    #[test]
    fn images_wait_for_the_model_alone() {
        // 5 ms apart, 20 ms of the model each: every one waits 15 ms longer.
        let arrivals = [(READY, 1), (READY + 5, 1), (READY + 10, 1)];
        let world = run(1, &arrivals, &[]);
        assert_eq!(latencies(&world), [ALONE, ALONE + 15, ALONE + 30]);
        // Its whole capacity, for ten seconds.
        let full: Vec<(Ms, u64)> = (0..500).map(|number| (READY + number * 20, 1)).collect();
        assert_eq!(latencies(&run(1, &full, &[])), [ALONE; 500]);
    }

    #[test]
    fn tasks_share_what_arrives_together() {
        for (tasks, longest) in [(1, 100), (2, 50), (5, 20)] {
            let world = run(tasks, &[(READY, 100)], &[]);
            let last = READY + Ms::from(ALONE) + 20 * (longest - 1);
            assert_eq!((world.stats.done, world.stats.last_done), (100, last));
        }
    }

    #[test]
    fn a_task_holds_no_more_than_it_may() {
        let most = Physics::new(RATE, 10.0).held_most();
        assert_eq!(most, 1024);
        assert_eq!(Physics::new(0.5, 10.0).held_most(), 192);
        let look: Deed = |world| assert_eq!((world.in_flight, world.visible), (1024, 8976));
        let world = run(1, &[(READY, 10_000)], &[(READY + 1, look)]);
        assert_eq!(world.stats.done, 10_000);
        // Room comes back with each grain: the model never waits.
        let last = READY + Ms::from(ALONE) + 20 * 9_999;
        assert_eq!(world.stats.last_done, last);
    }

    #[test]
    fn a_lost_task_leaves_what_it_has_not_done_to_its_messages_visibility() {
        // 150 ms to the model and 150 ms from it: 35 of 100 are done in a second.
        let lose: Deed = |world| world.lose(0);
        let world = run(2, &[(READY, 200)], &[(READY + 1_000, lose)]);
        assert_eq!(
            (world.stats.done, world.in_flight, world.visible),
            (200, 0, 0)
        );
        let late = latencies(&world)
            .iter()
            .filter(|one| **one > 180_000)
            .count();
        assert_eq!(late, 65);
    }

    #[test]
    fn a_stopped_task_finishes_what_its_model_has_and_hands_the_rest_back_at_once() {
        // Two seconds' work for each; a stop within the first.
        let stop: Deed = |world| world.stop_task(0, "a test");
        let look: Deed = |world| {
            assert!(world.tasks[0].stopping && world.tasks[0].held == 50);
            assert_eq!(world.tasks[1].held, 150);
        };
        let deeds = [(READY + 500, stop), (READY + 501, look)];
        let world = run(2, &[(READY, 200)], &deeds);
        assert_eq!(
            (world.stats.done, world.in_flight, world.visible),
            (200, 0, 0)
        );
        assert_eq!(world.tasks[0].exit_code, Some(0));
        let last = READY + Ms::from(ALONE) + 20 * 149;
        assert_eq!(world.stats.last_done, last);
    }

    #[test]
    fn no_image_is_lost_or_done_twice_whatever_ends() {
        let lose: Deed = |world| {
            if let Some(instance) = world.living().first() {
                world.lose(*instance);
            }
        };
        let end: Deed = |world| {
            if let Some(instance) = world.living().first() {
                world.terminate(*instance, false);
            }
        };
        let stop: Deed = |world| {
            let working = (0..world.tasks.len()).find(|task| world.tasks[*task].receives());
            if let Some(task) = working {
                world.stop_task(task, "a test");
            }
        };
        let mut rng = fastrand::Rng::with_seed(4);
        for _ in 0..200 {
            let arrivals: Vec<(Ms, u64)> = (0..20)
                .map(|number| (READY + number * 1_500, rng.u64(1..300)))
                .collect();
            let deeds: Vec<(Ms, Deed)> = (0..6)
                .map(|_| {
                    (
                        READY + rng.i64(0..60_000),
                        [lose, end, stop][rng.usize(0..3)],
                    )
                })
                .collect();
            let world = run(rng.u32(1..=4), &arrivals, &deeds);
            let images: u64 = arrivals.iter().map(|(_, count)| count).sum();
            assert_eq!(
                (world.stats.done, world.in_flight, world.visible),
                (images, 0, 0)
            );
            assert_eq!(latencies(&world).len() as u64, images);
            assert!(world.tasks.iter().all(|task| task.held == 0));
        }
    }
}
