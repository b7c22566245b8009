//! The decision: a pure function of what is observed and what is wanted, as a
//! chain of short steps.

use std::cmp::Reverse;

use crate::boot::{BOOT_KEY, Boot};
use crate::history::{
    Launches, RECALLED_REASON, RETIRED_REASON, STUCK_REASON, STUCK_TASK_SECONDS, UNPROVEN_LAUNCHES,
};
use crate::lane::{Choice, Estimate, Express, Gpus};
use crate::observation::{LaneState, Observation, Task, TaskStatus};
use crate::offer::{Instance, InstanceState, Offer, Release};
use crate::plan::{Action, Decision, Figures, LaunchCount, Plan, RUN_TASK_MAX_COUNT};
use crate::policy::Policy;
use crate::spent::{self, Spent};
use crate::streak::{FailureStreak, OPTION_KEY, TASKS_KEY};

/// Share of the boot time that a task needs on an instance that is already
/// there: image pull and model load. The rest is EC2 and the ECS agent.
const TASK_SHARE_OF_BOOT: f64 = 0.4;

/// Share of the boot time that is left when the instance comes from a warm
/// pool: it is started, not made.
const WARM_SHARE_OF_BOOT: f64 = 0.6;

/// An instance that has not registered after this long, and after twice the
/// boot time, never will.
const REGISTER_SECONDS: i64 = 600;

/// An instance that stood ready this long while work waited cannot be used.
const USELESS_AFTER_SECONDS: i64 = 600;

/// An agent reconnects within a minute or two; an instance whose agent is away
/// longer than this, and idle, is not waited for.
const DISCONNECTED_SECONDS: i64 = 180;

/// An instance whose agent registered without a GPU takes no task of ours, ever
/// (a driver that did not load, or not yet); an agent that starts again within
/// this time may find it.
const WITHOUT_GPU_SECONDS: i64 = 60;

/// What is on its way is called back when the queue has been empty, but not
/// sooner after it was asked for: SQS's counts lag behind the sends that asked
/// for it.
const SETTLED_SECONDS: i64 = 30;

/// A task is retired only when all have worked this long: the arrivals of the
/// last five minutes are then those that these tasks have seen.
const RETIRE_AFTER_SECONDS: i64 = 330;

/// What is left after a task is retired is busy at most to this share.
const BUSY_SHARE: f64 = 0.7;

/// Several instances of an option, or several runs, that find one of no use
/// within this time are one failure.
const ONE_FAILURE_SECONDS: i64 = 60;

/// Decides. The same observation and policy always give the same plan.
pub fn plan(observation: &Observation, policy: &Policy) -> Plan {
    let mut planner = Planner::new(observation, policy);
    planner.note_what_is_missing();
    planner.remember_launches();
    let tasks = planner.count_and_stop_tasks();
    // Instances that will never be of use go first: their places are free then.
    planner.release_broken();
    planner.count_instances();
    let mut forecast = planner.forecast(&tasks);
    planner.share_with_lane(&tasks, &mut forecast);
    let places = planner.places_for_tasks(&tasks);
    let need = planner.instances_needed(&forecast);
    planner.withdraw_requests(&need);
    planner.release_idle(&tasks, &places);
    planner.add_instances(need.add);
    planner.set_capacities();
    planner.set_lane(&tasks, &need);
    planner.activate(places.to_activate);
    planner.launch_tasks(&places);
    planner.note_limits(&need);
    planner.finish(&need)
}

struct Planner<'a> {
    seen: &'a Observation,
    policy: &'a Policy,
    now: i64,
    launches: Launches,
    boot: Boot,
    /// Failed launches in a row keep everything waiting.
    is_held: bool,
    /// Images that one task does within the policy's promise.
    per_task: f64,
    express: Option<Express<'a>>,
    /// Messages that want tasks: all of them, or what the lane leaves.
    for_tasks: f64,
    offers: Vec<Offer<'a>>,
    decisions: Vec<Decision>,
    notes: Vec<String>,
    figures: Figures,
    calls_back: bool,
}

/// The living tasks.
#[derive(Default)]
struct Tasks {
    running: u32,
    /// Seconds until each that starts will work.
    starting: Vec<f64>,
    /// Starting ones that have no instance yet: they will take ready ones.
    unplaced: u32,
}

impl Tasks {
    fn active(&self) -> u32 {
        self.running + self.starting.len() as u32
    }
}

/// Where the tasks that are missing can go.
struct Places {
    missing_tasks: u32,
    ready: u32,
    /// Drained instances that are taken back.
    to_activate: u32,
}

/// When an instance asked for now could begin.
struct Forecast {
    /// Tasks and instances that will serve by then, requests included.
    existing: u32,
    backlog: f64,
}

/// How many instances there should be.
struct Need {
    existing: u32,
    target: u32,
    short: u32,
    room: u32,
    add: u32,
}

impl<'a> Planner<'a> {
    fn new(seen: &'a Observation, policy: &'a Policy) -> Self {
        let launches = Launches::from_observation(seen);
        let rate = policy.rate(seen.images_per_second);
        let boot = Boot::of(seen, policy);
        let express = Express::of(seen, policy);
        let handed_over = express
            .as_ref()
            .map_or(0, |lane| lane.seen.gpu_queue.backlog());
        let backlog = seen.queue.backlog().saturating_add(handed_over);
        let spent = (policy.max_daily_cost > 0.0).then(|| Spent {
            instances: spent::on_instances(seen, policy),
            lane: express.as_ref().map_or(0.0, Express::spent),
        });
        Self {
            seen,
            policy,
            now: seen.at,
            is_held: launches.held(seen.at),
            per_task: rate * f64::from(policy.target_drain_seconds.max(1)),
            figures: Figures {
                backlog,
                spent,
                images_per_second: rate,
                boot_seconds: boot.seconds,
                boot_is_learned: boot.is_learned,
                crash_loop: launches.failures,
                ..Figures::default()
            },
            launches,
            boot,
            express,
            for_tasks: backlog as f64,
            offers: Offer::all(seen, policy),
            decisions: Vec::new(),
            notes: Vec::new(),
            calls_back: false,
        }
    }

    fn instances(&self) -> impl Iterator<Item = &Instance<'a>> {
        self.offers.iter().flat_map(|offer| &offer.instances)
    }

    fn count(&self, wanted: impl Fn(&Instance<'a>) -> bool) -> u32 {
        self.instances().filter(|instance| wanted(instance)).count() as u32
    }

    fn boot(&self) -> f64 {
        self.boot.seconds
    }

    fn task_start(&self) -> f64 {
        self.boot() * TASK_SHARE_OF_BOOT
    }

    fn decide(&mut self, action: Action, why: impl Into<String>) {
        self.decisions.push(Decision {
            action,
            why: why.into(),
        });
    }

    fn note_what_is_missing(&mut self) {
        for option in &self.policy.options {
            let group = &option.auto_scaling_group;
            if self.offers.iter().all(|offer| offer.group.name != *group) {
                let name = &option.name;
                self.notes.push(format!(
                    "option {name}: there is no Auto Scaling group {group}"
                ));
            }
        }
        for missing in &self.seen.missing {
            self.notes.push(format!("not observed: {missing}"));
        }
    }

    fn remember_launches(&mut self) {
        let Some(group) = self.seen.groups.first() else {
            return;
        };
        if let Some(value) = self.boot.remember.clone() {
            let why = format!("a start takes {:.0} s", self.boot());
            let action = Action::Remember {
                group: group.name.clone(),
                key: BOOT_KEY.to_owned(),
                value,
            };
            self.decide(action, why);
        }
        let Some(streak) = &self.launches.remember else {
            return;
        };
        let why = match streak.failures {
            0 => "a launch works again".to_owned(),
            failures => format!("{failures} failed launches in a row: {}", streak.why),
        };
        let action = Action::Remember {
            group: group.name.clone(),
            key: TASKS_KEY.to_owned(),
            value: streak.to_string(),
        };
        self.decide(action, why);
    }

    /// Counts the living tasks, and stops those that are stuck, that start for
    /// an empty queue, or that are one too many.
    fn count_and_stop_tasks(&mut self) -> Tasks {
        let mut tasks = Tasks::default();
        let mut stops = Vec::new();
        for task in &self.seen.tasks {
            if task.status == TaskStatus::Stopped {
                continue;
            }
            if !task.gives_capacity() {
                self.figures.stopping += 1;
            } else if !self.is_on_living_instance(task) {
                self.figures.lost += 1;
            } else if task.status == TaskStatus::Running {
                tasks.running += 1;
            } else if let Some(reason) = self.why_not_wait_for(task) {
                self.figures.stuck_tasks += u32::from(reason.starts_with(STUCK_REASON));
                stops.push((task.arn.clone(), reason));
            } else {
                tasks
                    .starting
                    .push((self.task_start() - self.age(task) as f64).max(0.0));
                tasks.unplaced += u32::from(task.container_instance.is_none());
            }
        }
        self.figures.running = tasks.running;
        self.figures.starting = tasks.starting.len() as u32;
        stops.extend(self.one_too_many());
        self.calls_back = self.figures.backlog == 0 && !stops.is_empty();
        for (task, reason) in stops {
            let why = reason.trim_start_matches("scaler: ").to_owned();
            self.decide(Action::StopTask { task, reason }, why);
        }
        tasks
    }

    fn age(&self, task: &Task) -> i64 {
        task.created_at.map_or(0, |created| self.now - created)
    }

    /// Whether the task's instance is there. ECS shows tasks of a lost
    /// instance as RUNNING until it notices.
    fn is_on_living_instance(&self, task: &Task) -> bool {
        let Some(arn) = &task.container_instance else {
            return true;
        };
        let registered = &self.seen.container_instances;
        let Some(registered) = registered.iter().find(|known| known.arn == *arn) else {
            return false;
        };
        match self
            .instances()
            .find(|instance| instance.id == registered.instance_id)
        {
            Some(instance) => instance.state != InstanceState::Gone,
            // Not of our groups: somebody else's instance, or one that is gone.
            None => registered.agent_connected,
        }
    }

    /// Why a task that starts is stopped instead, if it is.
    fn why_not_wait_for(&self, task: &Task) -> Option<String> {
        let age = self.age(task);
        if age >= STUCK_TASK_SECONDS {
            let status = format!("{:?}", task.status).to_uppercase();
            return Some(format!("{STUCK_REASON} in {status} for {age} s"));
        }
        let is_unneeded = self.figures.backlog == 0 && age >= SETTLED_SECONDS;
        is_unneeded.then(|| format!("{RECALLED_REASON}, the queue is empty"))
    }

    /// SQS favours nobody: several tasks share a trickle that one could do, and
    /// none of them is ever idle. One at a time goes, by a drain, when those
    /// that stay have room for the busiest of the last minutes.
    fn one_too_many(&self) -> Option<(String, String)> {
        let arrivals = self.seen.arrivals?;
        let Figures {
            running,
            starting,
            stopping,
            backlog,
            images_per_second: rate,
            ..
        } = self.figures;
        let is_calm = starting == 0
            && stopping == 0
            && self.launches.failures == 0
            && backlog as f64 <= rate * f64::from(running);
        let steady = match &self.express {
            Some(lane)
                if lane.seen.gpu_queue.backlog() == 0
                    && lane.is_cheaper_for(arrivals.highest, self.usd_per_hour()) =>
            {
                0.0
            }
            _ => (arrivals.highest / (rate * BUSY_SHARE)).ceil().max(1.0),
        };
        let enough = f64::from(self.policy.min_instances).max(steady);
        if !is_calm || f64::from(running) <= enough {
            return None;
        }
        let mut newest: Option<&Task> = None;
        for task in &self.seen.tasks {
            if task.status != TaskStatus::Running || task.stopping {
                continue;
            }
            if self.now - task.started_at? < RETIRE_AFTER_SECONDS {
                return None;
            }
            if newest.is_none_or(|known| known.started_at < task.started_at) {
                newest = Some(task);
            }
        }
        let reason = format!(
            "{RETIRED_REASON}: {running} tasks share {:.2} messages/s, {enough:.0} can do them",
            arrivals.highest
        );
        Some((newest?.arn.clone(), reason))
    }

    fn release_broken(&mut self) {
        for offer in 0..self.offers.len() {
            for instance in 0..self.offers[offer].instances.len() {
                let Some(why) = self.why_broken(&self.offers[offer].instances[instance]) else {
                    continue;
                };
                let is_first = self.offers[offer].count(|instance| instance.is_broken) == 0;
                self.offers[offer].instances[instance].is_broken = true;
                self.release((offer, instance), &why);
                if is_first {
                    self.remember_useless(offer, &why);
                }
            }
        }
    }

    fn why_broken(&self, instance: &Instance<'a>) -> Option<String> {
        let register_limit = ((2.0 * self.boot()) as i64).max(REGISTER_SECONDS);
        let oldest_age = self.seen.queue.oldest_age;
        let work_waits = oldest_age.is_some_and(|age| age >= USELESS_AFTER_SECONDS as u64);
        let may_launch = self.launches.allowed != Some(0);
        match (instance.state, instance.age) {
            (InstanceState::Booting, Some(age)) if age >= register_limit => {
                Some(format!("not registered with ECS {age} s after its launch"))
            }
            (InstanceState::Ready { idle }, _)
                if idle >= USELESS_AFTER_SECONDS && work_waits && may_launch =>
            {
                Some(format!(
                    "ready for {idle} s while work waits, and no task could be placed on it"
                ))
            }
            (InstanceState::Unusable { idle }, _)
                if idle >= WITHOUT_GPU_SECONDS && instance.is_without_gpu() =>
            {
                Some(format!("registered without a GPU {idle} s ago"))
            }
            (InstanceState::Unusable { idle }, _)
                if idle >= DISCONNECTED_SECONDS && self.figures.backlog > 0 =>
            {
                Some(format!(
                    "takes no task (its agent is away) and idle for {idle} s"
                ))
            }
            _ => None,
        }
    }

    fn remember_useless(&mut self, offer: usize, why: &str) {
        let Offer { group, option, .. } = &self.offers[offer];
        let stored = FailureStreak::from_tag(group.tags.get(OPTION_KEY));
        if stored.failures > 0 && self.now - stored.at < ONE_FAILURE_SECONDS {
            return;
        }
        let streak = FailureStreak {
            failures: stored.failures + 1,
            at: self.now,
            why: why.to_owned(),
        };
        let action = Action::Remember {
            group: group.name.clone(),
            key: OPTION_KEY.to_owned(),
            value: streak.to_string(),
        };
        let name = &option.name;
        let why = format!("option {name} rests: an instance of it was {why}");
        self.decide(action, why);
    }

    fn release(&mut self, (offer, instance): (usize, usize), why: &str) {
        let offer = &mut self.offers[offer];
        let group = offer.group;
        let desired = group.desired.saturating_sub(offer.decremented());
        let released = offer.count(|instance| instance.release.is_some());
        let living = offer.living().saturating_sub(released);
        // Below what the group holds, DesiredCapacity is already lower; at
        // MinSize Auto Scaling refuses to lower it.
        let decrement = desired >= living && desired > group.min;
        let instance = &mut offer.instances[instance];
        instance.release = Some(Release { decrement });
        let action = Action::Release {
            group: group.name.clone(),
            instance: instance.id.to_owned(),
            container_instance: instance.registered.map(|registered| registered.arn.clone()),
            decrement,
        };
        let mut why = why.to_owned();
        if desired <= group.min && desired >= living {
            why.push_str(" (the group's MinSize makes it replace the instance)");
        }
        self.decide(action, why);
    }

    /// Tasks or instances for so much work: at least one for any, at most the
    /// maximum, and none or one while launches fail.
    fn needed_for(&self, work: f64) -> u32 {
        if work <= 0.0 || self.is_held || self.is_too_dear() {
            return 0;
        }
        let most = match self.launches.failures {
            0 => self.policy.max_instances,
            _ => self.policy.max_instances.min(1),
        };
        let needed = (work / self.per_task).ceil().max(1.0);
        needed.min(f64::from(most)) as u32
    }

    fn places_for_tasks(&mut self, tasks: &Tasks) -> Places {
        let tasks_wanted = self.needed_for(self.for_tasks);
        let missing_tasks = tasks_wanted.saturating_sub(tasks.active());
        let ready = self
            .count(|instance| matches!(instance.state, InstanceState::Ready { .. }))
            .saturating_sub(tasks.unplaced);
        let drained = self.count(|instance| instance.is_drained());
        self.figures.tasks_wanted = tasks_wanted;
        self.figures.ready = ready;
        Places {
            missing_tasks,
            ready,
            to_activate: missing_tasks.saturating_sub(ready).min(drained),
        }
    }

    fn count_instances(&mut self) {
        use InstanceState::{Booting, Draining, Gone, Held, Unusable};
        self.figures.draining =
            self.count(|instance| instance.is_drained() || instance.state == Draining);
        self.figures.terminating = self.count(|instance| instance.state == Gone);
        self.figures.unusable =
            self.count(|instance| matches!(instance.state, Unusable { .. } | Held { .. }));
        self.figures.booting =
            self.count(|instance| instance.state == Booting && !instance.is_broken);
        self.figures.requested = self.offers.iter().map(|offer| offer.requested).sum();
        self.figures.options_resting = self
            .offers
            .iter()
            .filter(|offer| offer.rest.is_some())
            .count() as u32;
        self.figures.footprint = self.footprint();
    }

    /// Instances that count against the maximum, over all groups: what is
    /// there, what is asked for, and what is not yet gone.
    fn footprint(&self) -> u32 {
        self.figures.terminating + self.offers.iter().map(Offer::planned).sum::<u32>()
    }

    /// Work left when an instance asked for now could begin.
    fn forecast(&mut self, tasks: &Tasks) -> Forecast {
        let boot = self.boot_of_next();
        let mut existing = tasks.active() + self.figures.requested;
        let mut done_meanwhile = f64::from(tasks.running) * boot;
        for eta in &tasks.starting {
            done_meanwhile += (boot - eta).max(0.0);
        }
        // Ready instances that unplaced tasks will take count once, as those.
        let mut taken_soon = tasks.unplaced;
        for instance in self.instances() {
            if taken_soon > 0
                && !instance.is_broken
                && matches!(instance.state, InstanceState::Ready { .. })
            {
                taken_soon -= 1;
                continue;
            }
            if let Some(eta) = self.works_in(instance) {
                existing += 1;
                done_meanwhile += (boot - eta).max(0.0);
            }
        }
        // What keeps arriving will be there too.
        let backlog = self.figures.backlog as f64;
        let coming = match self.seen.arrivals {
            Some(arrivals) if backlog > 0.0 => arrivals.sustained * boot,
            _ => 0.0,
        };
        let done = self.figures.images_per_second * done_meanwhile;
        let backlog = (backlog + coming - done).max(0.0);
        self.figures.backlog_after_boot = backlog.ceil() as u64;
        Forecast { existing, backlog }
    }

    /// Whether the day's ceiling is reached: nothing new is started.
    fn is_too_dear(&self) -> bool {
        let spent = self.figures.spent.map_or(0.0, Spent::total);
        self.figures.spent.is_some() && spent >= self.policy.max_daily_cost
    }

    /// Leaves GPUs their part of the backlog: all of it without a lane.
    fn share_with_lane(&mut self, tasks: &Tasks, forecast: &mut Forecast) {
        let Some(lane) = &self.express else {
            return;
        };
        let gpus = self.gpus(lane, tasks, forecast.existing, forecast.backlog);
        let backlog = self.seen.queue.backlog() as f64;
        let needed = |rest| self.needed_for(rest);
        let (comparison, rest) =
            lane.compare(backlog, self.sustained(), &gpus, self.policy, needed);
        // What stands there anyway takes what keeps it busy.
        if comparison.choice == Choice::Lane && !lane.is_worth_a_task(backlog, &gpus) {
            self.for_tasks = lane.seen.gpu_queue.backlog() as f64;
        }
        forecast.backlog = rest;
        self.figures.backlog_after_boot = forecast.backlog.ceil() as u64;
        self.figures.comparison = Some(comparison);
    }

    fn gpus(&self, lane: &Express<'_>, tasks: &Tasks, existing: u32, rest: f64) -> Gpus {
        Gpus {
            existing,
            running: tasks.running,
            rate: self.figures.images_per_second,
            usd_per_hour: self.usd_per_hour(),
            boot: self.boot_of_next(),
            rest,
            only_gpu: rest.min(lane.seen.gpu_queue.backlog() as f64),
        }
    }

    fn sustained(&self) -> f64 {
        self.seen
            .arrivals
            .map_or(0.0, |arrivals| arrivals.sustained)
    }

    fn next_offer(&self) -> Option<&Offer<'a>> {
        self.offers.iter().find(|offer| offer.rest.is_none())
    }

    fn usd_per_hour(&self) -> Option<f64> {
        let offer = self.next_offer().or(self.offers.first())?;
        offer.option.usd_per_hour
    }

    /// Closes the lane while GPUs do the work for less, opens it before they
    /// go, and whenever they do not come.
    fn set_lane(&mut self, tasks: &Tasks, need: &Need) {
        let (Some(lane), Some(comparison)) = (&self.express, &self.figures.comparison) else {
            return;
        };
        let backlog = self.seen.queue.backlog();
        let gpus = self.gpus(lane, tasks, need.existing + need.add, 0.0);
        let none_comes = tasks.running == 0
            && (self.launches.failures > 0
                || self
                    .offers
                    .iter()
                    .all(|offer| offer.rest.is_some() || offer.shortage.is_some()));
        let open = !self.is_too_dear()
            && (none_comes
                || lane.should_be_open(comparison.choice, backlog as f64, self.sustained(), &gpus));
        let state = lane.seen.state;
        if open == state.is_open() || matches!(state, LaneState::Unknown | LaneState::Throttled) {
            return;
        }
        let existing = gpus.existing;
        let why = match open {
            false if self.is_too_dear() => "the day's ceiling is reached".to_owned(),
            false => format!("{existing} GPUs do {backlog} messages for less"),
            true if none_comes => "no GPU comes".to_owned(),
            true => format!("{backlog} messages are left for {existing} GPUs, which go soon"),
        };
        self.decide(Action::SetLane { open }, why);
    }

    fn boot_of_next(&self) -> f64 {
        let next = self.next_offer();
        let is_warm = next.is_some_and(|offer| offer.group.warm_pool.unwrap_or(0) > 0);
        self.boot() * if is_warm { WARM_SHARE_OF_BOOT } else { 1.0 }
    }

    /// Seconds until a task could work on the instance; `None` when a task that
    /// is counted already does, or none ever will.
    fn works_in(&self, instance: &Instance<'a>) -> Option<f64> {
        if instance.is_broken {
            return None;
        }
        match instance.state {
            // An agent that is away for long is not waited for.
            InstanceState::Unusable { idle } | InstanceState::Held { idle }
                if idle >= DISCONNECTED_SECONDS =>
            {
                None
            }
            InstanceState::Ready { .. }
            | InstanceState::Drained { .. }
            | InstanceState::Unusable { .. }
            | InstanceState::Held { .. }
            | InstanceState::Finishing => Some(self.task_start()),
            InstanceState::Booting => {
                let left = self.boot() - instance.age.unwrap_or(0) as f64;
                Some(left.clamp(self.task_start(), self.boot()))
            }
            InstanceState::Busy | InstanceState::Draining | InstanceState::Gone => None,
        }
    }

    fn instances_needed(&mut self, forecast: &Forecast) -> Need {
        let maximum = self.policy.max_instances;
        let target = self
            .needed_for(forecast.backlog)
            .max(self.policy.min_instances)
            .min(maximum);
        let room = maximum.saturating_sub(self.figures.footprint);
        let short = target.saturating_sub(forecast.existing);
        self.figures.instances_wanted = forecast.existing.max(target).min(maximum);
        Need {
            existing: forecast.existing,
            target,
            short,
            room,
            add: if self.is_too_dear() {
                0
            } else {
                short.min(room)
            },
        }
    }

    /// Takes requests back that are no longer wanted of a group without
    /// capacity. A request of a healthy group is left alone: its instance is
    /// seconds away, and a count that dips for a moment must not cancel it.
    fn withdraw_requests(&mut self, need: &Need) {
        let over_maximum = self
            .figures
            .footprint
            .saturating_sub(self.policy.max_instances);
        let mut unwanted = need.existing.saturating_sub(need.target).max(over_maximum);
        for offer in self.offers.iter_mut().rev() {
            if offer.shortage.is_some() || over_maximum > 0 {
                let taken = offer.requested.min(unwanted);
                offer.withdrawn += taken;
                unwanted -= taken;
            }
        }
    }

    fn release_idle(&mut self, tasks: &Tasks, places: &Places) {
        let mut idle = Vec::new();
        let mut ready = Vec::new();
        let mut unneeded = Vec::new();
        for (number, offer) in self.offers.iter().enumerate() {
            for (index, instance) in offer.instances.iter().enumerate() {
                let at = (number, index);
                match instance.state {
                    _ if instance.is_broken => {}
                    InstanceState::Unusable { .. } if instance.is_without_gpu() => {}
                    _ if self.came_for_nothing(instance, tasks) => unneeded.push(at),
                    InstanceState::Ready { idle } => ready.push((idle, at)),
                    InstanceState::Unusable { idle: seconds }
                    | InstanceState::Drained { idle: seconds } => idle.push((seconds, at)),
                    _ => {}
                }
            }
        }
        let broken = self.count(|instance| instance.is_broken);
        let living: u32 = self.offers.iter().map(Offer::living).sum();
        let mut left = living.saturating_sub(broken);
        for at in unneeded {
            if left > self.policy.min_instances {
                left -= 1;
                self.calls_back = true;
                self.release(
                    at,
                    "not needed any more: the queue is empty before it had work",
                );
            }
        }
        // The instance that worked last is the warmest: it is kept for new work.
        ready.sort_unstable();
        let kept = (places.missing_tasks + tasks.unplaced) as usize;
        idle.extend(ready.into_iter().skip(kept));
        idle.sort_by_key(|(seconds, _)| Reverse(*seconds));
        let mut to_keep_drained = places.to_activate;
        for (seconds, at) in idle {
            let is_drained = self.offers[at.0].instances[at.1].is_drained();
            if is_drained && to_keep_drained > 0 {
                to_keep_drained -= 1;
            } else if let Some(why) = self.why_release(seconds, at, left) {
                left -= 1;
                self.release(at, &why);
            }
        }
    }

    /// An instance that has not registered, or has and never held a task,
    /// though the queue is empty: the grace keeps what has worked for more
    /// work, this one only waited.
    fn came_for_nothing(&self, instance: &Instance<'a>, tasks: &Tasks) -> bool {
        let age = match instance.state {
            InstanceState::Booting => instance.age,
            InstanceState::Ready { idle } if tasks.unplaced == 0 && instance.held_nothing => {
                instance.age.or(Some(idle))
            }
            _ => None,
        };
        self.figures.backlog == 0 && age.is_some_and(|age| age >= SETTLED_SECONDS)
    }

    /// Why an idle instance goes; a note says why it stays.
    fn why_release(&mut self, seconds: i64, at: (usize, usize), left: u32) -> Option<String> {
        let grace = i64::from(self.policy.idle_grace_seconds);
        let minimum = self.policy.min_instances;
        let instance = &self.offers[at.0].instances[at.1];
        let id = instance.id;
        if left <= minimum {
            self.notes.push(format!(
                "instance {id}: idle for {seconds} s, kept by MIN_INSTANCES={minimum}"
            ));
            None
        } else if instance.is_drained() {
            Some(format!(
                "drained and idle for {seconds} s: it was on its way out"
            ))
        } else if seconds < grace {
            self.notes.push(format!(
                "instance {id}: idle for {seconds} s, goes after {grace} s"
            ));
            None
        } else {
            Some(format!(
                "idle for {seconds} s (grace {grace} s) and no work needs it"
            ))
        }
    }

    /// Spreads `add` instances over the options, in their order.
    fn add_instances(&mut self, add: u32) {
        let mut left = add;
        for offer in &mut self.offers {
            // An option found wanting in this run rests from this run on.
            if offer.rest.is_none() && offer.count(|instance| instance.is_broken) == 0 {
                offer.added = left.min(offer.room());
                left -= offer.added;
            }
        }
        // Everything rests: trying an option that merely had no capacity costs
        // nothing, so the one that failed longest ago is asked again.
        if left > 0
            && left == add
            && let Some(offer) = self
                .offers
                .iter_mut()
                .filter(|offer| offer.room() > 0 && offer.moved == 0)
                .filter(|offer| offer.rest.as_ref().is_some_and(|rest| !rest.costly))
                .min_by_key(|offer| offer.rest.as_ref().map(|rest| rest.failed_at))
        {
            offer.added = left.min(offer.room());
            left -= offer.added;
        }
        if left > 0 {
            let rests: Vec<String> = self
                .offers
                .iter()
                .filter_map(|offer| {
                    let rest = offer.rest.as_ref()?;
                    let wait = rest.until - self.now;
                    Some(format!("{} for {wait} s ({})", offer.option.name, rest.why))
                })
                .collect();
            let rests = match rests.is_empty() {
                true => "none".to_owned(),
                false => rests.join(", "),
            };
            self.notes.push(format!(
                "{left} more instances are wanted and no option can give them; resting: {rests}"
            ));
        }
    }

    fn set_capacities(&mut self) {
        let mut decisions = Vec::new();
        for offer in &self.offers {
            let (added, withdrawn) = (offer.added, offer.withdrawn);
            if withdrawn == 0 && added == 0 {
                continue;
            }
            let (group, name) = (offer.group, &offer.option.name);
            let base = match added {
                0 => group.desired,
                _ => group.desired.max(offer.living()),
            };
            // Releases of this run come first and lower DesiredCapacity themselves.
            let to = (base + added)
                .saturating_sub(withdrawn + offer.decremented())
                .max(group.min);
            let why = if added > 0 {
                format!(
                    "{} messages want {} instances ({:.0} images/s each, {} s to drain): {added} more of {name}",
                    self.figures.backlog,
                    self.figures.instances_wanted,
                    self.figures.images_per_second,
                    self.policy.target_drain_seconds
                )
            } else if offer.moved > 0 {
                let message = offer.shortage.as_ref().map_or("", |shortage| &shortage.why);
                format!(
                    "{name} has no capacity ({message}): {withdrawn} taken back and asked for elsewhere"
                )
            } else {
                format!("{withdrawn} instances of {name} that did not come are no longer wanted")
            };
            let action = Action::SetDesired {
                group: group.name.clone(),
                from: group.desired,
                to,
            };
            decisions.push(Decision { action, why });
        }
        self.decisions.append(&mut decisions);
    }

    fn activate(&mut self, count: u32) {
        let drained: Vec<Action> = self
            .instances()
            .filter(|instance| instance.is_drained() && instance.release.is_none())
            .filter_map(|instance| {
                Some(Action::Activate {
                    container_instance: instance.registered?.arn.clone(),
                    instance: instance.id.to_owned(),
                })
            })
            .take(count as usize)
            .collect();
        for action in drained {
            self.decide(action, "work came before the drained instance was gone");
        }
    }

    fn launch_tasks(&mut self, places: &Places) {
        let room = places.ready + places.to_activate;
        let wanted = places.missing_tasks.min(room);
        let allowed = self.launches.allowed.unwrap_or(u32::MAX);
        let launches = wanted.min(allowed);
        if wanted > launches {
            self.notes.push(match self.launches.failures {
                0 => format!(
                    "{} more tasks wait until one of the first {UNPROVEN_LAUNCHES} is seen to work",
                    wanted - launches,
                ),
                failures => format!(
                    "after {failures} failed launches one task is tried at a time ({})",
                    self.launches.why
                ),
            });
        }
        let why = format!(
            "{} messages want {} tasks, {} run and {} start; {room} instances stand ready",
            self.figures.backlog,
            self.figures.tasks_wanted,
            self.figures.running,
            self.figures.starting
        );
        let mut left = launches;
        let mut call = 0;
        while let Some(count) = LaunchCount::new(left.min(RUN_TASK_MAX_COUNT)) {
            let token = self.token(call, count.get());
            self.decide(Action::RunTasks { count, token }, why.clone());
            left -= count.get();
            call += 1;
        }
    }

    /// The same for two runs that see the same ready instances in the same
    /// minute, different once one of them has taken a task (ECS counts an
    /// instance's version up with each change). The minute keeps a call that
    /// was refused from being refused for ever.
    fn token(&self, call: u32, count: u32) -> String {
        let mut places: Vec<(&str, i64)> = self
            .instances()
            .filter(|instance| {
                instance.is_drained() || matches!(instance.state, InstanceState::Ready { .. })
            })
            .filter_map(|instance| instance.registered)
            .map(|registered| (registered.arn.as_str(), registered.version))
            .collect();
        places.sort_unstable();
        let text = format!("{places:?} {} {call} {count}", self.now.div_euclid(60));
        format!("scaler-{:016x}-{call}", fnv1a(text.as_bytes()))
    }

    fn note_limits(&mut self, need: &Need) {
        let Need { short, room, .. } = need;
        let Figures {
            terminating,
            lost,
            unusable,
            ..
        } = self.figures;
        if short > room {
            let maximum = self.policy.max_instances;
            let mut note =
                format!("{short} more instances are wanted, MAX_INSTANCES={maximum} allows {room}");
            if terminating > 0 {
                note.push_str(&format!("; {terminating} on their way out still count"));
            }
            self.notes.push(note);
        }
        if lost > 0 {
            self.notes.push(format!(
                "{lost} tasks are on instances that are gone: they give no capacity"
            ));
        }
        if unusable > 0 {
            self.notes.push(format!(
                "{unusable} registered instances take no task at the moment"
            ));
        }
        if let Some(why) = self.express.as_ref().and_then(|lane| lane.stalled.as_ref()) {
            self.notes.push(format!(
                "the express lane has stalled, GPUs take over: {why}"
            ));
        }
        if self.is_held && self.figures.backlog > 0 {
            let wait = self.launches.retry_at - self.now;
            self.notes.push(format!(
                "launches are held for {wait} s more after {} failed in a row: {}",
                self.launches.failures, self.launches.why
            ));
        }
    }

    fn is_for_lane(&self) -> bool {
        let comparison = self.figures.comparison.as_ref();
        comparison.is_some_and(|comparison| comparison.choice == Choice::Lane)
            && self.for_tasks < self.figures.backlog as f64
    }

    fn verdict(&self, need: &Need) -> String {
        let figures = &self.figures;
        let (backlog, running) = (figures.backlog, figures.running);
        let ending = figures.stopping;
        let acts = self
            .decisions
            .iter()
            .any(|decision| !matches!(decision.action, Action::Remember { .. }));
        if self.seen.groups.is_empty() {
            "no capacity option exists: nothing can be done".to_owned()
        } else if let Some(spent) = figures.spent.filter(|_| self.is_too_dear()) {
            let most = self.policy.max_daily_cost;
            format!(
                "{backlog} messages wait, nothing is started: {spent} spent since midnight UTC, MAX_DAILY_COST is ${most:.2}"
            )
        } else if self.is_held && backlog > 0 {
            format!(
                "{backlog} messages wait, launches are held after {} failures in a row",
                self.launches.failures
            )
        } else if backlog == 0 && acts {
            "the queue is empty: what is idle goes".to_owned()
        } else if backlog == 0 && need.existing == 0 && ending == 0 {
            "the queue is empty and nothing is left to give back".to_owned()
        } else if backlog == 0 {
            format!(
                "the queue is empty: {} tasks wait for work or end by themselves",
                running + figures.starting + ending
            )
        } else if let Some(comparison) = figures.comparison.as_ref().filter(|_| self.is_for_lane())
        {
            let Estimate {
                seconds, dollars, ..
            } = comparison.lane;
            format!(
                "{backlog} messages are the express lane's: about {seconds:.0} s and ${dollars:.4}"
            )
        } else if acts {
            format!(
                "{backlog} messages want {} tasks on {} instances",
                figures.tasks_wanted, figures.instances_wanted
            )
        } else if running > 0 && need.add == 0 {
            let seconds = backlog as f64 / (f64::from(running) * figures.images_per_second);
            format!(
                "{running} tasks work on {backlog} messages, about {seconds:.0} s; another instance is not worth its start"
            )
        } else {
            format!(
                "{backlog} messages wait for {} instances and tasks that are on their way",
                need.existing
            )
        }
    }

    fn finish(mut self, need: &Need) -> Plan {
        let verdict = self.verdict(need);
        // What is remembered must not delay what costs or earns money.
        self.decisions
            .sort_by_key(|decision| match decision.action {
                Action::Release { .. } => 0,
                Action::StopTask { .. } => 1,
                Action::SetDesired { .. } => 2,
                Action::SetLane { .. } => 3,
                Action::Activate { .. } => 3,
                Action::RunTasks { .. } => 4,
                Action::Remember { .. } => 5,
            });
        Plan {
            verdict,
            decisions: self.decisions,
            notes: self.notes,
            figures: self.figures,
            calls_back: self.calls_back,
        }
    }
}

/// FNV-1a, 64 bits: a token must be the same in every build, which the
/// standard library's hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}
