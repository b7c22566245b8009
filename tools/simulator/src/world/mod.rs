//! The simulated world: a queue, Auto Scaling groups, instances and tasks.
//! Who scales it is not its concern; see [`crate::ours`] and [`crate::models`].
//!
//! This module has the clock and who learns of what; `work` what tasks do with
//! messages, `cloud` the lives of instances and tasks, `api` what the scaler's
//! calls show and do.

mod api;
mod cloud;
mod lane;
mod physics;
#[cfg(test)]
mod tests;
mod work;

use std::collections::{BTreeMap, HashSet, VecDeque};

use planner::observation::{ContainerInstance, Group, Task};

pub use self::lane::LanePhysics;
use self::lane::LaneWorld;
pub use self::physics::{Chaos, Physics};
use self::work::{Pieces, Workload};
use crate::tally::Tally;
use crate::trace::Trace;

/// Milliseconds since the trace began.
pub type Ms = i64;

/// The trace's beginning, as the planner's clock shows it.
const EPOCH_SECONDS: i64 = 1_700_000_000;

fn seconds(at: Ms) -> i64 {
    EPOCH_SECONDS + at.div_euclid(1000)
}

/// What happens. Numbers are positions in [`World`]'s lists.
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
    LaneDone(usize),
    LaneRamp,
    LaneChanged(u32),
    Timer(u32),
}

/// What a scaler may learn of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
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
struct Machine {
    /// What ECS shows of it, from `registered_at` on.
    shown: ContainerInstance,
    group: usize,
    launched: Ms,
    first_ready: Option<Ms>,
    is_terminating: bool,
    is_gone: bool,
    is_lost: bool,
    has_image: bool,
    task: Option<usize>,
}

impl Machine {
    fn is_registered(&self) -> bool {
        self.shown.registered_at.is_some()
    }
}

/// A task and the work that it holds.
#[derive(Clone, Debug)]
struct Worker {
    /// What ECS shows of it.
    shown: Task,
    machine: usize,
    /// When its container ended.
    ended: Option<Ms>,
    is_ready: bool,
    is_broken: bool,
    work: Workload,
}

/// A group and what its user does not see.
#[derive(Clone, Debug, Default)]
struct ScalingGroup {
    /// What Auto Scaling shows of it, but for its instances.
    shown: Group,
    /// No capacity in these spans.
    shortages: Vec<(Ms, Ms)>,
    reconcile_at: Ms,
}

pub struct World {
    now: Ms,
    sequence: u64,
    events: BTreeMap<(Ms, u64), Event>,
    signals: Vec<Signal>,
    physics: Physics,
    /// Tasks exit after this long without work; `None`: never.
    pub idle_exit: Option<Ms>,
    arrivals: Vec<(Ms, u64)>,
    arrived: usize,
    queue: VecDeque<(Ms, u64)>,
    visible: u64,
    in_flight: u64,
    /// Messages sent in each minute.
    sent: VecDeque<(Ms, u64)>,
    groups: Vec<ScalingGroup>,
    machines: Vec<Machine>,
    living: Vec<usize>,
    workers: Vec<Worker>,
    /// Workers that ECS shows.
    shown: Vec<usize>,
    /// Workers that receive, in the order in which they are given messages.
    receivers: VecDeque<usize>,
    grains: u64,
    tokens: HashSet<String>,
    paid: u32,
    footprint: u32,
    /// When something went wrong last that delays giving back.
    pub last_disturbance: Ms,
    lane: Option<LaneWorld>,
    pub tally: Tally,
    pub chaos: Option<Chaos>,
}

impl World {
    /// A world without instances, with a group of each name, which may have
    /// `max` instances.
    pub fn new<'a>(
        trace: &Trace,
        physics: Physics,
        groups: impl IntoIterator<Item = &'a str>,
        max: u32,
    ) -> Self {
        let groups = groups.into_iter().map(|name| ScalingGroup {
            shown: Group {
                name: name.to_owned(),
                max,
                ..Group::default()
            },
            reconcile_at: -1,
            ..ScalingGroup::default()
        });
        let mut world = Self {
            now: 0,
            sequence: 0,
            events: BTreeMap::new(),
            signals: Vec::new(),
            physics,
            idle_exit: None,
            arrivals: trace.arrivals.clone(),
            arrived: 0,
            queue: VecDeque::new(),
            visible: 0,
            in_flight: 0,
            sent: VecDeque::new(),
            groups: groups.collect(),
            machines: Vec::new(),
            living: Vec::new(),
            workers: Vec::new(),
            shown: Vec::new(),
            receivers: VecDeque::new(),
            grains: 0,
            tokens: HashSet::new(),
            paid: 0,
            footprint: 0,
            last_disturbance: 0,
            lane: None,
            tally: Tally::default(),
            chaos: None,
        };
        if let Some((at, _)) = trace.arrivals.first() {
            world.schedule(*at, Event::Arrive(0));
        }
        world
    }

    pub fn now(&self) -> Ms {
        self.now
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

    fn schedule(&mut self, at: Ms, event: Event) {
        self.sequence += 1;
        self.events.insert((at, self.sequence), event);
    }

    fn schedule_in(&mut self, after: Ms, event: Event) {
        self.schedule(self.now + after, event);
    }

    /// Gives the controller a [`Signal::Timer`] at `at`.
    pub fn set_timer(&mut self, at: Ms, number: u32) {
        self.schedule(at.max(self.now), Event::Timer(number));
    }

    /// Runs until all work is done and nothing is paid for any more, or until
    /// `horizon`. Answers whether it ended by itself.
    pub fn run(&mut self, controller: &mut dyn Controller, horizon: Ms) -> bool {
        controller.start(self);
        while let Some(((at, _), event)) = self.events.pop_first() {
            if at > horizon {
                self.now = horizon;
                return false;
            }
            self.now = at;
            self.handle(event);
            while let Some(signal) = self.signals.pop() {
                controller.signal(self, signal);
            }
            let is_over = self.arrived == self.arrivals.len()
                && self.backlog() == 0
                && self.footprint == 0
                && self.groups.iter().all(|group| group.shown.desired == 0);
            if is_over {
                self.tally_polls();
                return true;
            }
        }
        true
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Arrive(index) => self.arrive(index),
            Event::Reconcile(group) => self.reconcile(group),
            Event::Register(machine) => self.register(machine),
            Event::Gone(machine) => self.gone(machine),
            Event::TaskRunning(worker) => self.task_running(worker),
            Event::TaskReady(worker) => self.task_ready(worker),
            Event::GrainDone(worker, number) => self.grain_done(worker, number),
            Event::IdleCheck(worker, since) => self.idle_check(worker, since),
            Event::TaskStopped(worker) => self.task_stopped(worker),
            Event::Reappear(pieces) => self.reappear(pieces),
            Event::Lose(machine) => self.lose(machine),
            Event::LaneDone(number) => self.lane_done(number),
            Event::LaneRamp => self.dispatch(),
            Event::LaneChanged(change) => self.lane_changed(change),
            Event::Timer(number) => self.signals.push(Signal::Timer(number)),
        }
    }

    fn note(&mut self) {
        let backlog = self.backlog();
        self.tally.note(self.now, self.paid, backlog);
    }
}
