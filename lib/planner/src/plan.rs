//! The decision: a pure function of what is seen and what is wanted.

use serde::{Deserialize, Serialize};

use crate::history::{
    self, Launches, RECALLED_REASON, RETIRED_REASON, STUCK_REASON, STUCK_TASK_SECONDS,
};
use crate::observation::{
    ActivityKind, ContainerInstance, ContainerInstanceStatus, Group, Lifecycle, Observation, Task,
    TaskStatus,
};
use crate::policy::Policy;
use crate::streak::{FailureStreak, OPTION_KEY, TASKS_KEY};

/// Most tasks of one RunTask call (ECS API reference, RunTask, `count`).
pub const RUN_TASK_MAX_COUNT: u32 = 10;

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

/// What is on its way is called back when the queue has been empty, but not
/// sooner after it was asked for: SQS's counts lag behind the sends that asked
/// for it.
const SETTLED_SECONDS: i64 = 30;

/// A task is retired only when all have worked this long: the arrivals of the
/// last five minutes are then those that these tasks have seen.
const RETIRE_AFTER_SECONDS: i64 = 330;

/// What is left after a task is retired is busy at most to this share.
const BUSY_SHARE: f64 = 0.7;

/// A number of tasks that one RunTask call takes: 1 to [`RUN_TASK_MAX_COUNT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct LaunchCount(u32);

impl LaunchCount {
    /// `None` for a count that RunTask refuses.
    pub fn new(count: u32) -> Option<Self> {
        (1..=RUN_TASK_MAX_COUNT)
            .contains(&count)
            .then_some(Self(count))
    }

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for LaunchCount {
    type Error = String;

    fn try_from(count: u32) -> Result<Self, String> {
        Self::new(count).ok_or_else(|| format!("RunTask takes 1 to {RUN_TASK_MAX_COUNT} tasks"))
    }
}

impl From<LaunchCount> for u32 {
    fn from(count: LaunchCount) -> u32 {
        count.0
    }
}

/// One thing to do. Actions are carried out in the plan's order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum Action {
    /// Drain an instance that holds no task, then terminate it.
    Release {
        /// Its group.
        group: String,
        /// Its EC2 identifier.
        instance: String,
        /// Its ECS ARN; `None` when it never registered.
        container_instance: Option<String>,
        /// Whether the group's DesiredCapacity falls with it.
        decrement: bool,
    },
    /// Stop a task: one that is not RUNNING yet, or one too many.
    StopTask {
        /// Its ARN.
        task: String,
        /// What ECS is told.
        reason: String,
    },
    /// Set a group's DesiredCapacity.
    SetDesired {
        /// The group.
        group: String,
        /// What it is.
        from: u32,
        /// What it should be.
        to: u32,
    },
    /// Take a draining instance back into use.
    Activate {
        /// Its ECS ARN.
        container_instance: String,
        /// Its EC2 identifier.
        instance: String,
    },
    /// Launch tasks on instances that stand ready.
    RunTasks {
        /// How many.
        count: LaunchCount,
        /// Makes a repeated call the same call.
        token: String,
    },
    /// Write the scaler's memory.
    Remember {
        /// The group whose tag it is.
        group: String,
        /// Tag key.
        key: String,
        /// Tag value.
        value: String,
    },
}

/// An action and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// What to do.
    #[serde(flatten)]
    pub action: Action,
    /// Why.
    pub why: String,
}

/// The numbers behind a plan.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Visible, in-flight and delayed messages.
    pub backlog: u64,
    /// Images per second of one task, as planned with.
    pub images_per_second: f64,
    /// Backlog left when an instance asked for now would begin.
    pub backlog_after_boot: u64,
    /// Tasks that the backlog wants.
    pub tasks_wanted: u32,
    /// Instances that should exist.
    pub instances_wanted: u32,
    /// Tasks at work.
    pub running: u32,
    /// Tasks on their way to RUNNING.
    pub starting: u32,
    /// Tasks on their way out.
    pub stopping: u32,
    /// Tasks that ECS still shows on instances that are gone.
    pub lost: u32,
    /// Instances that take a task at once.
    pub ready: u32,
    /// Instances that have not registered yet.
    pub booting: u32,
    /// Instances asked for that the group has not begun.
    pub requested: u32,
    /// Instances being drained.
    pub draining: u32,
    /// Instances that are registered but take no task.
    pub unusable: u32,
    /// Instances on their way out.
    pub terminating: u32,
    /// Instances that count against the maximum.
    pub footprint: u32,
    /// Failed launches in a row.
    pub crash_loop: u32,
    /// Capacity options without capacity at the moment.
    pub options_resting: u32,
    /// Tasks stuck before RUNNING.
    pub stuck_tasks: u32,
}

/// What to do, and why nothing else.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The decision in one sentence.
    pub verdict: String,
    /// Actions in the order in which to carry them out.
    pub decisions: Vec<Decision>,
    /// What else was seen and led to no action.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The numbers behind it.
    pub figures: Figures,
    /// Whether it gives something up that was asked for, because the queue is
    /// empty. One count is not enough for that: SQS's are approximate.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub calls_back: bool,
}

impl Plan {
    /// The actions alone.
    pub fn actions(&self) -> impl Iterator<Item = &Action> {
        self.decisions.iter().map(|decision| &decision.action)
    }

    /// Tasks that the plan launches.
    pub fn launches(&self) -> u32 {
        self.actions()
            .map(|action| match action {
                Action::RunTasks { count, .. } => count.get(),
                _ => 0,
            })
            .sum()
    }
}

/// An instance of one of our groups, joined with what ECS knows of it.
struct Instance<'a> {
    group: usize,
    id: &'a str,
    registered: Option<&'a ContainerInstance>,
    state: State,
}

/// Where an instance stands. Changed by: the group (Booting, Terminating), the
/// instance's agent (Booting → Ready, Ready ↔ Unusable), RunTask (Ready →
/// Busy), the task's exit (Busy → Ready), the scaler (Ready ↔ Draining →
/// Terminating).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not registered; age since its launch, when known.
    Booting { age: Option<i64> },
    /// Takes a task at once; seconds without work.
    Ready { idle: i64 },
    /// Registered, but takes no task; seconds without work.
    Unusable { idle: i64 },
    /// Holds a task of ours.
    Busy,
    /// Draining and empty; seconds without work.
    Drained { idle: i64 },
    /// Draining, with a task that still works.
    Draining,
    /// On its way out, or out of our hands.
    Gone,
}

/// Decides. The same observation and policy always give the same plan.
pub fn plan(observation: &Observation, policy: &Policy) -> Plan {
    Planner::new(observation, policy).plan()
}

struct Planner<'a> {
    seen: &'a Observation,
    policy: &'a Policy,
    now: i64,
    /// Groups in the order of the policy's options; absent ones left out.
    groups: Vec<&'a Group>,
    instances: Vec<Instance<'a>>,
    launches: Launches,
    decisions: Vec<Decision>,
    notes: Vec<String>,
    figures: Figures,
    calls_back: bool,
}

impl<'a> Planner<'a> {
    fn new(seen: &'a Observation, policy: &'a Policy) -> Self {
        let groups: Vec<&Group> = policy
            .options
            .iter()
            .filter_map(|option| {
                seen.groups
                    .iter()
                    .find(|group| group.name == option.auto_scaling_group)
            })
            .collect();
        let mut planner = Self {
            seen,
            policy,
            now: seen.at,
            groups,
            instances: Vec::new(),
            launches: Launches::from_observation(seen),
            decisions: Vec::new(),
            notes: Vec::new(),
            figures: Figures::default(),
            calls_back: false,
        };
        planner.join_instances();
        planner
    }

    fn join_instances(&mut self) {
        let mut instances = Vec::new();
        for (index, group) in self.groups.iter().enumerate() {
            for member in &group.instances {
                let registered = self
                    .seen
                    .container_instances
                    .iter()
                    .find(|registered| registered.instance_id == member.id);
                let state = match member.state {
                    Lifecycle::Terminating | Lifecycle::Other => State::Gone,
                    Lifecycle::Pending | Lifecycle::InService => match registered {
                        None => State::Booting {
                            age: self.launch_age(group, &member.id),
                        },
                        Some(registered) => self.registered_state(registered),
                    },
                };
                instances.push(Instance {
                    group: index,
                    id: &member.id,
                    registered,
                    state,
                });
            }
        }
        self.instances = instances;
    }

    fn launch_age(&self, group: &Group, id: &str) -> Option<i64> {
        group
            .activities
            .iter()
            .filter(|activity| activity.kind == ActivityKind::Launch)
            .find(|activity| activity.instance.as_deref() == Some(id))
            .map(|activity| (self.now - activity.started_at).max(0))
    }

    fn registered_state(&self, registered: &ContainerInstance) -> State {
        let holds_task = self.seen.tasks.iter().any(|task| {
            task.status != TaskStatus::Stopped
                && task.container_instance.as_deref() == Some(registered.arn.as_str())
        });
        let idle = self.idle_seconds(registered);
        let has_slot = registered.gpus == 0 || registered.free_gpus > 0;
        match registered.status {
            ContainerInstanceStatus::Draining if holds_task => State::Draining,
            ContainerInstanceStatus::Draining => State::Drained { idle },
            _ if holds_task => State::Busy,
            ContainerInstanceStatus::Active if registered.agent_connected && has_slot => {
                State::Ready { idle }
            }
            _ => State::Unusable { idle },
        }
    }

    /// Seconds since the instance's last work. A task that exits with 0 has
    /// waited for work before it did, and that wait was idle time already.
    fn idle_seconds(&self, registered: &ContainerInstance) -> i64 {
        let waited_before_exit = i64::from(self.policy.idle_exit_seconds);
        let last_work = self
            .seen
            .tasks
            .iter()
            .filter(|task| task.container_instance.as_deref() == Some(registered.arn.as_str()))
            .filter_map(|task| {
                let stopped = task.stopped_at?;
                // A task that never ran was no work.
                task.started_at?;
                let credit = match task.exit_code {
                    Some(0) => waited_before_exit,
                    _ => 0,
                };
                Some(stopped - credit)
            })
            .max();
        let registered_at = registered.registered_at.unwrap_or(0);
        let idle_since = last_work.map_or(registered_at, |at| at.max(registered_at));
        (self.now - idle_since).max(0)
    }

    fn boot(&self) -> f64 {
        f64::from(self.policy.boot_seconds)
    }

    fn task_start(&self) -> f64 {
        self.boot() * TASK_SHARE_OF_BOOT
    }

    /// Whether the task's instance is there. ECS shows tasks of a lost
    /// instance as RUNNING until it notices.
    fn is_on_living_instance(&self, task: &Task) -> bool {
        let Some(arn) = task.container_instance.as_deref() else {
            return true;
        };
        let Some(registered) = self
            .seen
            .container_instances
            .iter()
            .find(|registered| registered.arn == arn)
        else {
            return false;
        };
        match self
            .instances
            .iter()
            .find(|instance| instance.id == registered.instance_id)
        {
            Some(instance) => instance.state != State::Gone,
            // Not of our groups: somebody else's instance, or one that is gone.
            None => registered.agent_connected,
        }
    }

    fn decide(&mut self, action: Action, why: impl Into<String>) {
        self.decisions.push(Decision {
            action,
            why: why.into(),
        });
    }

    fn count(&self, wanted: impl Fn(State) -> bool) -> u32 {
        self.instances
            .iter()
            .filter(|instance| wanted(instance.state))
            .count() as u32
    }

    fn plan(mut self) -> Plan {
        let backlog = self.seen.queue.backlog();
        let rate = self.policy.rate(self.seen.images_per_second);
        self.figures.backlog = backlog;
        self.figures.images_per_second = rate;
        self.figures.crash_loop = self.launches.failures;
        self.report_missing_groups();
        self.remember_launches();

        // Tasks.
        let mut running = 0;
        let mut starting_etas = Vec::new();
        let mut unplaced = 0;
        let mut stops = Vec::new();
        for task in &self.seen.tasks {
            if task.status == TaskStatus::Stopped {
                continue;
            }
            if task.stopping || !(task.status.is_starting() || task.status == TaskStatus::Running) {
                self.figures.stopping += 1;
            } else if !self.is_on_living_instance(task) {
                self.figures.lost += 1;
            } else if task.status == TaskStatus::Running {
                running += 1;
            } else {
                let age = task.created_at.map_or(0, |created| self.now - created);
                if age >= STUCK_TASK_SECONDS {
                    let status = format!("{:?}", task.status).to_uppercase();
                    self.figures.stuck_tasks += 1;
                    stops.push((
                        task.arn.clone(),
                        format!("{STUCK_REASON} in {status} for {age} s"),
                    ));
                    continue;
                }
                if backlog == 0 && age >= SETTLED_SECONDS {
                    stops.push((
                        task.arn.clone(),
                        format!("{RECALLED_REASON}, the queue is empty"),
                    ));
                    continue;
                }
                starting_etas.push((self.task_start() - age as f64).max(0.0));
                unplaced += u32::from(task.container_instance.is_none());
            }
        }
        let starting = starting_etas.len() as u32;
        let active = running + starting;
        self.figures.running = running;
        self.figures.starting = starting;
        if let Some((task, reason)) = self.too_many(running, starting, backlog, rate) {
            stops.push((task, reason));
        }
        self.calls_back = backlog == 0 && !stops.is_empty();
        for (task, reason) in stops {
            let why = reason.trim_start_matches("scaler: ").to_owned();
            self.decide(Action::StopTask { task, reason }, why);
        }

        // What the backlog wants of tasks.
        let held = self.launches.held(self.now);
        let one_at_a_time = self.launches.failures > 0;
        let per_task = rate * f64::from(self.policy.target_drain_seconds.max(1));
        let mut tasks_wanted = self.tasks_for(backlog as f64, per_task);
        if held {
            tasks_wanted = 0;
        } else if one_at_a_time {
            tasks_wanted = tasks_wanted.min(1);
        }
        self.figures.tasks_wanted = tasks_wanted;

        // Instances that will never be of use go first: their places are free then.
        let broken = self.release_broken();

        let ready = self
            .count(|state| matches!(state, State::Ready { .. }))
            .saturating_sub(unplaced);
        let drained = self.count(|state| matches!(state, State::Drained { .. }));
        let missing_tasks = tasks_wanted.saturating_sub(active);
        let to_activate = missing_tasks.saturating_sub(ready).min(drained);
        self.figures.ready = ready;
        self.figures.draining = drained + self.count(|state| matches!(state, State::Draining));
        self.figures.terminating = self.count(|state| state == State::Gone);
        self.figures.unusable = self.count(|state| matches!(state, State::Unusable { .. }));
        self.figures.booting =
            self.count(|state| matches!(state, State::Booting { .. })) - broken.booting;

        // Requests that the groups have not begun.
        let requests = self.requests();
        let requested: u32 = requests.iter().map(|request| request.kept).sum();
        self.figures.requested = requested;
        self.figures.options_resting = self
            .groups
            .iter()
            .filter(|group| history::rest(group, self.now).is_some())
            .count() as u32;

        // Work left when an instance asked for now could begin.
        let boot = self.boot_of_next();
        let mut done_meanwhile = f64::from(running) * boot;
        for eta in &starting_etas {
            done_meanwhile += (boot - eta).max(0.0);
        }
        let mut existing = active + requested;
        // Tasks without an instance yet will take ready ones: those count once.
        let mut taken_soon = unplaced;
        for (index, instance) in self.instances.iter().enumerate() {
            if broken.instances.contains(&index) {
                continue;
            }
            if taken_soon > 0 && matches!(instance.state, State::Ready { .. }) {
                taken_soon -= 1;
                continue;
            }
            let eta = match instance.state {
                // An agent that is away for long is not waited for.
                State::Unusable { idle } if idle >= DISCONNECTED_SECONDS => continue,
                State::Ready { .. } | State::Drained { .. } | State::Unusable { .. } => {
                    self.task_start()
                }
                State::Booting { age } => {
                    (self.boot() - age.unwrap_or(0) as f64).clamp(self.task_start(), self.boot())
                }
                // A busy instance is counted by its task, unless that is on its way out.
                State::Busy if !self.holds_capacity(instance) => self.task_start(),
                State::Busy | State::Draining | State::Gone => continue,
            };
            existing += 1;
            done_meanwhile += (boot - eta).max(0.0);
        }
        // What keeps arriving will be there too.
        let sustained = self
            .seen
            .arrivals
            .map_or(0.0, |arrivals| arrivals.sustained);
        let coming = if backlog > 0 { sustained * boot } else { 0.0 };
        let backlog_after_boot = (backlog as f64 + coming - rate * done_meanwhile).max(0.0);
        self.figures.backlog_after_boot = backlog_after_boot.ceil() as u64;

        let mut needed = self.tasks_for(backlog_after_boot, per_task);
        if held {
            needed = 0;
        } else if one_at_a_time {
            needed = needed.min(1);
        }
        let target = needed
            .max(self.policy.min_instances)
            .min(self.policy.max_instances);
        let footprint = self.footprint(&requests);
        let room = self.policy.max_instances.saturating_sub(footprint);
        let short = target.saturating_sub(existing);
        let add = short.min(room);
        self.figures.footprint = footprint;
        self.figures.instances_wanted = existing.max(target).min(self.policy.max_instances);

        let withdrawals = self.withdrawals(&requests, target, existing);
        self.release_idle(missing_tasks, to_activate, unplaced, &broken);
        self.set_capacities(&requests, &withdrawals, add, &broken);
        self.activate(to_activate);
        self.launch_tasks(missing_tasks, ready + to_activate);
        self.explain_limits(short, room, held);

        let verdict = self.verdict(held, add, existing);
        Plan {
            verdict,
            decisions: self.in_order(),
            notes: self.notes,
            figures: self.figures,
            calls_back: self.calls_back,
        }
    }

    /// Tasks that drain `work` in time: at least one for any work, at most the maximum.
    fn tasks_for(&self, work: f64, per_task: f64) -> u32 {
        if work <= 0.0 {
            return 0;
        }
        let tasks = (work / per_task).ceil().max(1.0);
        if tasks >= f64::from(self.policy.max_instances) {
            self.policy.max_instances
        } else {
            tasks as u32
        }
    }

    /// SQS favours nobody: several tasks share a trickle that one could do, and
    /// none of them is ever idle. One at a time goes, by a drain, when those
    /// that stay have room for the busiest of the last minutes.
    fn too_many(
        &self,
        running: u32,
        starting: u32,
        backlog: u64,
        rate: f64,
    ) -> Option<(String, String)> {
        let arrivals = self.seen.arrivals?;
        let is_calm = starting == 0
            && self.figures.stopping == 0
            && self.launches.failures == 0
            && backlog as f64 <= rate * f64::from(running);
        let steady = (arrivals.highest / (rate * BUSY_SHARE)).ceil().max(1.0);
        let enough = f64::from(self.policy.min_instances).max(steady);
        if !is_calm || f64::from(running) <= enough {
            return None;
        }
        let mut newest: Option<&Task> = None;
        for task in &self.seen.tasks {
            if task.status != TaskStatus::Running || task.stopping {
                continue;
            }
            let started = task.started_at?;
            if self.now - started < RETIRE_AFTER_SECONDS {
                return None;
            }
            if newest.is_none_or(|known| known.started_at < task.started_at) {
                newest = Some(task);
            }
        }
        let task = newest?.arn.clone();
        let reason = format!(
            "{RETIRED_REASON}: {running} tasks share {:.2} messages/s, {enough:.0} can do them",
            arrivals.highest
        );
        Some((task, reason))
    }

    /// An instance that came and never held a task: the grace keeps what has
    /// worked for more work, this one only waited.
    fn came_for_nothing(&self, instance: &Instance<'_>, idle: i64) -> bool {
        let age = self
            .launch_age(self.groups[instance.group], instance.id)
            .unwrap_or(idle);
        let registered = instance
            .registered
            .map(|registered| registered.arn.as_str());
        let never_worked = self
            .seen
            .tasks
            .iter()
            .all(|task| task.container_instance.as_deref() != registered);
        never_worked && age >= SETTLED_SECONDS
    }

    fn holds_capacity(&self, instance: &Instance<'_>) -> bool {
        let Some(registered) = instance.registered else {
            return false;
        };
        self.seen.tasks.iter().any(|task| {
            task.container_instance.as_deref() == Some(registered.arn.as_str())
                && !task.stopping
                && (task.status.is_starting() || task.status == TaskStatus::Running)
        })
    }

    fn boot_of_next(&self) -> f64 {
        let next_is_warm = self
            .groups
            .iter()
            .find(|group| history::rest(group, self.now).is_none())
            .and_then(|group| group.warm_pool)
            .is_some_and(|ready| ready > 0);
        if next_is_warm {
            self.boot() * WARM_SHARE_OF_BOOT
        } else {
            self.boot()
        }
    }

    fn report_missing_groups(&mut self) {
        for option in &self.policy.options {
            let exists = self
                .groups
                .iter()
                .any(|group| group.name == option.auto_scaling_group);
            if !exists {
                self.notes.push(format!(
                    "option {}: there is no Auto Scaling group {}",
                    option.name, option.auto_scaling_group
                ));
            }
        }
        for missing in &self.seen.missing {
            self.notes.push(format!("not observed: {missing}"));
        }
    }

    fn remember_launches(&mut self) {
        let Some(memory) = self.launches.remember.clone() else {
            return;
        };
        let Some(group) = self.seen.groups.first() else {
            return;
        };
        let why = if memory.failures == 0 {
            "a launch works again".to_owned()
        } else {
            format!(
                "{} failed launches in a row: {}",
                memory.failures, memory.why
            )
        };
        let action = Action::Remember {
            group: group.name.clone(),
            key: TASKS_KEY.to_owned(),
            value: memory.to_string(),
        };
        self.decide(action, why);
    }

    fn option_name(&self, group: &str) -> String {
        self.policy
            .options
            .iter()
            .find(|option| option.auto_scaling_group == group)
            .map_or_else(|| group.to_owned(), |option| option.name.clone())
    }

    /// Instances of a group that are there and stay.
    fn living(&self, group: usize) -> u32 {
        self.instances
            .iter()
            .filter(|instance| instance.group == group && instance.state != State::Gone)
            .count() as u32
    }

    fn release_broken(&mut self) -> Broken {
        let limit = (2 * i64::from(self.policy.boot_seconds)).max(REGISTER_SECONDS);
        let work_waits = self
            .seen
            .queue
            .oldest_age
            .is_some_and(|age| age >= USELESS_AFTER_SECONDS as u64);
        let may_launch = self.launches.allowed != Some(0);
        let mut broken = Broken::default();
        let mut found = Vec::new();
        for (index, instance) in self.instances.iter().enumerate() {
            let why = match instance.state {
                State::Booting { age: Some(age) } if age >= limit => {
                    broken.booting += 1;
                    format!("not registered with ECS {age} s after its launch")
                }
                State::Ready { idle }
                    if idle >= USELESS_AFTER_SECONDS && work_waits && may_launch =>
                {
                    format!(
                        "ready for {idle} s while work waits, and no task could be placed on it"
                    )
                }
                State::Unusable { idle }
                    if idle >= DISCONNECTED_SECONDS && self.seen.queue.backlog() > 0 =>
                {
                    format!("takes no task (agent away or GPU held) and idle for {idle} s")
                }
                _ => continue,
            };
            found.push((index, why));
        }
        for (index, why) in found {
            broken.instances.push(index);
            let group = self.instances[index].group;
            self.release(index, &why, &mut broken);
            self.remember_useless(group, &why);
        }
        broken
    }

    fn remember_useless(&mut self, group: usize, why: &str) {
        let group = self.groups[group];
        let stored = FailureStreak::from_tag(group.tags.get(OPTION_KEY));
        // Several instances, or several runs, at one time are one failure.
        let already_counted = stored.failures > 0 && self.now - stored.at < 60;
        let already_planned = self.decisions.iter().any(|decision| {
            matches!(&decision.action, Action::Remember { group: name, key, .. }
                if *name == group.name && key == OPTION_KEY)
        });
        if already_counted || already_planned {
            return;
        }
        let memory = FailureStreak {
            failures: stored.failures + 1,
            at: self.now,
            why: why.to_owned(),
        };
        let option = self.option_name(&group.name);
        let action = Action::Remember {
            group: group.name.clone(),
            key: OPTION_KEY.to_owned(),
            value: memory.to_string(),
        };
        self.decide(
            action,
            format!("option {option} rests: an instance of it was {why}"),
        );
    }

    fn release(&mut self, index: usize, why: &str, broken: &mut Broken) {
        let instance = &self.instances[index];
        let group_index = instance.group;
        let group = self.groups[group_index];
        let released_before = broken.released(group_index);
        let decremented_before = broken.decremented(group_index);
        let desired = group.desired.saturating_sub(decremented_before);
        let living = self.living(group_index).saturating_sub(released_before);
        // Below what the group holds, DesiredCapacity is already lower; at
        // MinSize Auto Scaling refuses to lower it.
        let decrement = desired >= living && desired > group.min;
        let action = Action::Release {
            group: group.name.clone(),
            instance: instance.id.to_owned(),
            container_instance: instance.registered.map(|registered| registered.arn.clone()),
            decrement,
        };
        broken.released.push((group_index, decrement));
        let mut why = why.to_owned();
        if !decrement && desired <= group.min && desired >= living {
            why.push_str(" (the group's MinSize makes it replace the instance)");
        }
        self.decide(action, why);
    }

    /// What each group was asked for and has not begun.
    fn requests(&self) -> Vec<Request> {
        let mut requests = Vec::new();
        for (index, group) in self.groups.iter().enumerate() {
            let unfilled = group.desired.saturating_sub(self.living(index));
            let is_short = unfilled > 0 && history::shortage(group).is_some();
            let has_alternative = self.groups.iter().enumerate().any(|(other, candidate)| {
                other != index
                    && history::rest(candidate, self.now).is_none()
                    && candidate.max > candidate.desired.max(self.living(other))
            });
            let moved = if is_short && has_alternative {
                unfilled
            } else {
                0
            };
            requests.push(Request {
                kept: unfilled - moved,
                moved,
                is_short,
            });
        }
        requests
    }

    /// Instances that count against the maximum, over all groups: what is
    /// there, what is asked for, and what is not yet gone.
    fn footprint(&self, requests: &[Request]) -> u32 {
        let mut footprint = self.figures.terminating;
        for (index, group) in self.groups.iter().enumerate() {
            let after_move = group.desired.saturating_sub(requests[index].moved);
            footprint += after_move.max(self.living(index));
        }
        footprint
    }

    /// Requests to take back, per group: those that moved elsewhere, and those
    /// of a group without capacity that are no longer wanted. A request of a
    /// healthy group is left alone: its instance is seconds away, and a count
    /// that dips for a moment must not cancel it.
    fn withdrawals(&self, requests: &[Request], target: u32, existing: u32) -> Vec<u32> {
        let over_maximum = self
            .footprint(requests)
            .saturating_sub(self.policy.max_instances);
        let mut unwanted = existing.saturating_sub(target).max(over_maximum);
        let mut withdrawals: Vec<u32> = requests.iter().map(|request| request.moved).collect();
        for (index, request) in requests.iter().enumerate().rev() {
            let may_withdraw = request.is_short || over_maximum > 0;
            let taken = if may_withdraw {
                request.kept.min(unwanted)
            } else {
                0
            };
            withdrawals[index] += taken;
            unwanted -= taken;
        }
        withdrawals
    }

    fn release_idle(
        &mut self,
        missing_tasks: u32,
        to_activate: u32,
        unplaced: u32,
        broken: &Broken,
    ) {
        let grace = i64::from(self.policy.idle_grace_seconds);
        let mut idle: Vec<(i64, usize)> = Vec::new();
        let mut kept_ready = missing_tasks + unplaced;
        let mut ready: Vec<(i64, usize)> = Vec::new();
        let mut recalled = Vec::new();
        for (index, instance) in self.instances.iter().enumerate() {
            if broken.instances.contains(&index) {
                continue;
            }
            match instance.state {
                State::Ready { idle }
                    if self.figures.backlog == 0
                        && unplaced == 0
                        && self.came_for_nothing(instance, idle) =>
                {
                    recalled.push(index);
                }
                State::Ready { idle } => ready.push((idle, index)),
                State::Unusable { idle: seconds } | State::Drained { idle: seconds } => {
                    idle.push((seconds, index));
                }
                State::Booting { age: Some(age) }
                    if self.figures.backlog == 0 && age >= SETTLED_SECONDS =>
                {
                    recalled.push(index);
                }
                _ => {}
            }
        }
        // The instance that worked last is the warmest: it is kept for new work.
        ready.sort();
        for entry in ready {
            if kept_ready > 0 {
                kept_ready -= 1;
            } else {
                idle.push(entry);
            }
        }
        idle.sort_by_key(|(seconds, _)| std::cmp::Reverse(*seconds));
        let mut to_keep_drained = to_activate;
        let living: u32 = (0..self.groups.len()).map(|group| self.living(group)).sum();
        let mut left = living.saturating_sub(broken.instances.len() as u32);
        let mut bookkeeping = broken.clone();
        for index in recalled {
            if left > self.policy.min_instances {
                left -= 1;
                self.calls_back = true;
                self.release(
                    index,
                    "not needed any more: the queue is empty before it had work",
                    &mut bookkeeping,
                );
            }
        }
        for (seconds, index) in idle {
            let is_drained = matches!(self.instances[index].state, State::Drained { .. });
            let id = self.instances[index].id.to_owned();
            if is_drained && to_keep_drained > 0 {
                to_keep_drained -= 1;
                continue;
            }
            if left <= self.policy.min_instances {
                self.notes.push(format!(
                    "instance {id}: idle for {seconds} s, kept by MIN_INSTANCES={}",
                    self.policy.min_instances
                ));
                continue;
            }
            if seconds < grace && !is_drained {
                self.notes.push(format!(
                    "instance {id}: idle for {seconds} s, goes after {grace} s"
                ));
                continue;
            }
            left -= 1;
            let why = if is_drained {
                format!("drained and idle for {seconds} s: it was on its way out")
            } else {
                format!("idle for {seconds} s (grace {grace} s) and no work needs it")
            };
            self.release(index, &why, &mut bookkeeping);
        }
    }

    fn set_capacities(
        &mut self,
        requests: &[Request],
        withdrawals: &[u32],
        add: u32,
        broken: &Broken,
    ) {
        let additions = self.place(requests, add, broken);
        let placed: u32 = additions.iter().sum();
        if placed < add {
            let rests: Vec<String> = self
                .groups
                .iter()
                .filter_map(|group| {
                    let rest = history::rest(group, self.now)?;
                    let option = self.option_name(&group.name);
                    Some(format!(
                        "{option} for {} s ({})",
                        rest.until - self.now,
                        rest.why
                    ))
                })
                .collect();
            self.notes.push(format!(
                "{} more instances are wanted and no option can give them; resting: {}",
                add - placed,
                if rests.is_empty() {
                    "none".to_owned()
                } else {
                    rests.join(", ")
                }
            ));
        }
        for index in 0..self.groups.len() {
            let group = self.groups[index];
            let withdrawn = withdrawals[index];
            let added = additions[index];
            if withdrawn == 0 && added == 0 {
                continue;
            }
            // Releases of this run come first and lower DesiredCapacity themselves.
            let released = broken.decremented(index)
                + self
                    .decisions
                    .iter()
                    .filter(|decision| {
                        matches!(&decision.action, Action::Release { group: name, decrement: true, instance, .. }
                            if *name == group.name && !self.is_broken(broken, instance))
                    })
                    .count() as u32;
            let base = if added > 0 {
                group.desired.max(self.living(index))
            } else {
                group.desired
            };
            let to = (base + added)
                .saturating_sub(withdrawn + released)
                .max(group.min);
            let option = self.option_name(&group.name);
            let why = if added > 0 {
                format!(
                    "{} messages want {} instances ({:.0} images/s each, {} s to drain): {added} more of {option}",
                    self.figures.backlog,
                    self.figures.instances_wanted,
                    self.figures.images_per_second,
                    self.policy.target_drain_seconds
                )
            } else if requests[index].moved > 0 {
                let message = history::shortage(group).map_or(String::new(), |(_, _, why)| why);
                format!(
                    "{option} has no capacity ({message}): {withdrawn} taken back and asked for elsewhere"
                )
            } else {
                format!("{withdrawn} instances of {option} that did not come are no longer wanted")
            };
            let action = Action::SetDesired {
                group: group.name.clone(),
                from: group.desired,
                to,
            };
            self.decide(action, why);
        }
    }

    fn is_broken(&self, broken: &Broken, id: &str) -> bool {
        broken
            .instances
            .iter()
            .any(|index| self.instances[*index].id == id)
    }

    /// Spreads `add` instances over the options, in their order.
    fn place(&self, requests: &[Request], add: u32, broken: &Broken) -> Vec<u32> {
        let mut additions = vec![0; self.groups.len()];
        let mut left = add;
        let room = |index: usize| {
            let group = self.groups[index];
            let planned = group.desired.saturating_sub(requests[index].moved);
            group.max.saturating_sub(planned.max(self.living(index)))
        };
        for (index, group) in self.groups.iter().enumerate() {
            if left == 0 {
                break;
            }
            // An option found wanting in this run rests from this run on.
            if history::rest(group, self.now).is_some() || broken.released(index) > 0 {
                continue;
            }
            let given = left.min(room(index));
            additions[index] = given;
            left -= given;
        }
        // Everything rests: trying an option that merely had no capacity costs
        // nothing, so the one that failed longest ago is asked again.
        let nothing_given = left == add;
        if left > 0 && nothing_given {
            let least_recent = (0..self.groups.len())
                .filter(|index| room(*index) > 0 && requests[*index].moved == 0)
                .filter_map(|index| {
                    let rest = history::rest(self.groups[index], self.now)?;
                    (!rest.costly).then_some((rest.failed_at, index))
                })
                .min();
            if let Some((_, index)) = least_recent {
                additions[index] = left.min(room(index));
            }
        }
        additions
    }

    fn activate(&mut self, count: u32) {
        let drained: Vec<(String, String)> = self
            .instances
            .iter()
            .filter(|instance| matches!(instance.state, State::Drained { .. }))
            .filter_map(|instance| {
                let registered = instance.registered?;
                let is_released = self.decisions.iter().any(|decision| {
                    matches!(&decision.action, Action::Release { instance: id, .. } if id == instance.id)
                });
                (!is_released).then(|| (registered.arn.clone(), instance.id.to_owned()))
            })
            .take(count as usize)
            .collect();
        for (container_instance, instance) in drained {
            let action = Action::Activate {
                container_instance,
                instance,
            };
            self.decide(action, "work came before the drained instance was gone");
        }
    }

    fn launch_tasks(&mut self, missing_tasks: u32, places: u32) {
        let wanted = missing_tasks.min(places);
        let allowed = self.launches.allowed.unwrap_or(u32::MAX);
        let launches = wanted.min(allowed);
        if wanted > launches {
            self.notes.push(match self.launches.failures {
                0 => format!(
                    "{} more tasks wait until one of the first {} is seen to work",
                    wanted - launches,
                    history::UNPROVEN_LAUNCHES
                ),
                failures => format!(
                    "after {failures} failed launches one task is tried at a time ({})",
                    self.launches.why
                ),
            });
        }
        let why = format!(
            "{} messages want {} tasks, {} run and {} start; {places} instances stand ready",
            self.figures.backlog,
            self.figures.tasks_wanted,
            self.figures.running,
            self.figures.starting
        );
        let mut left = launches;
        let mut call = 0;
        while left > 0 {
            let Some(count) = LaunchCount::new(left.min(RUN_TASK_MAX_COUNT)) else {
                break;
            };
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
            .instances
            .iter()
            .filter(|instance| {
                matches!(instance.state, State::Ready { .. } | State::Drained { .. })
            })
            .filter_map(|instance| instance.registered)
            .map(|registered| (registered.arn.as_str(), registered.version))
            .collect();
        places.sort_unstable();
        let text = format!("{places:?} {} {call} {count}", self.now.div_euclid(60));
        format!("scaler-{:016x}-{call}", fnv1a(text.as_bytes()))
    }

    fn explain_limits(&mut self, short: u32, room: u32, held: bool) {
        if short > room {
            let maximum = self.policy.max_instances;
            let terminating = self.figures.terminating;
            let mut note =
                format!("{short} more instances are wanted, MAX_INSTANCES={maximum} allows {room}");
            if terminating > 0 {
                note.push_str(&format!("; {terminating} on their way out still count"));
            }
            self.notes.push(note);
        }
        if self.figures.lost > 0 {
            let lost = self.figures.lost;
            self.notes.push(format!(
                "{lost} tasks are on instances that are gone: they give no capacity"
            ));
        }
        if self.figures.unusable > 0 {
            let unusable = self.figures.unusable;
            self.notes.push(format!(
                "{unusable} registered instances take no task at the moment"
            ));
        }
        if held && self.seen.queue.backlog() > 0 {
            let wait = self.launches.retry_at - self.now;
            self.notes.push(format!(
                "launches are held for {wait} s more after {} failed in a row: {}",
                self.launches.failures, self.launches.why
            ));
        }
    }

    fn verdict(&self, held: bool, add: u32, existing: u32) -> String {
        let figures = &self.figures;
        let backlog = figures.backlog;
        if self.seen.groups.is_empty() {
            return "no capacity option exists: nothing can be done".to_owned();
        }
        let acts = self
            .decisions
            .iter()
            .any(|decision| !matches!(decision.action, Action::Remember { .. }));
        if held && backlog > 0 {
            return format!(
                "{backlog} messages wait, launches are held after {} failures in a row",
                self.launches.failures
            );
        }
        if backlog == 0 {
            if existing == 0 && figures.stopping == 0 && !acts {
                return "the queue is empty and nothing is left to give back".to_owned();
            }
            if acts {
                return "the queue is empty: what is idle goes".to_owned();
            }
            return format!(
                "the queue is empty: {} tasks wait for work or end by themselves",
                figures.running + figures.starting + figures.stopping
            );
        }
        if acts {
            return format!(
                "{backlog} messages want {} tasks on {} instances",
                figures.tasks_wanted, figures.instances_wanted
            );
        }
        if figures.running > 0 && add == 0 {
            let seconds = backlog as f64 / (f64::from(figures.running) * figures.images_per_second);
            return format!(
                "{} tasks work on {backlog} messages, about {seconds:.0} s; another instance is not worth its start",
                figures.running
            );
        }
        format!("{backlog} messages wait for {existing} instances and tasks that are on their way")
    }

    /// FailureStreak last: it must not delay what costs or earns money.
    fn in_order(&mut self) -> Vec<Decision> {
        let mut decisions = std::mem::take(&mut self.decisions);
        decisions.sort_by_key(|decision| match decision.action {
            Action::Release { .. } => 0,
            Action::StopTask { .. } => 1,
            Action::SetDesired { .. } => 2,
            Action::Activate { .. } => 3,
            Action::RunTasks { .. } => 4,
            Action::Remember { .. } => 5,
        });
        decisions
    }
}

/// What a group was asked for and has not begun.
struct Request {
    /// Left where it is.
    kept: u32,
    /// To be asked for elsewhere.
    moved: u32,
    /// The group's last launches failed.
    is_short: bool,
}

/// Instances that go because they are of no use, and the releases so far.
#[derive(Clone, Default)]
struct Broken {
    instances: Vec<usize>,
    booting: u32,
    released: Vec<(usize, bool)>,
}

impl Broken {
    fn released(&self, group: usize) -> u32 {
        self.released.iter().filter(|(of, _)| *of == group).count() as u32
    }

    fn decremented(&self, group: usize) -> u32 {
        self.released
            .iter()
            .filter(|(of, decrement)| *of == group && *decrement)
            .count() as u32
    }
}

/// FNV-1a, 64 bits: a token must be the same in every build, which the
/// standard library's hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes {
        hash ^= u64::from(*byte);
        hash = hash.wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash
}
