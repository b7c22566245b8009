//! A capacity option as one run sees it: its group joined with what ECS knows
//! of its instances and tasks, and what the run has decided about it so far.

use crate::history::{self, Rest, Shortage};
use crate::observation::{
    ActivityKind, ContainerInstance, ContainerInstanceStatus, Group, Lifecycle, Observation, Task,
    TaskStatus,
};
use crate::policy::{CapacityOption, Policy};

/// One capacity option in this run.
pub(crate) struct Offer<'a> {
    pub(crate) option: &'a CapacityOption,
    pub(crate) group: &'a Group,
    pub(crate) instances: Vec<Instance<'a>>,
    pub(crate) rest: Option<Rest>,
    pub(crate) shortage: Option<Shortage>,
    /// Instances asked for that the group has not begun, left where they are.
    pub(crate) requested: u32,
    /// The same, to be asked for elsewhere: this group has no capacity, and
    /// another option is open.
    pub(crate) moved: u32,
    /// Taken back in this run, `moved` included.
    pub(crate) withdrawn: u32,
    /// Asked for in this run.
    pub(crate) added: u32,
}

/// An instance of an option's group, joined with what ECS knows of it.
pub(crate) struct Instance<'a> {
    pub(crate) id: &'a str,
    pub(crate) registered: Option<&'a ContainerInstance>,
    pub(crate) state: InstanceState,
    /// Seconds since its launch activity, while that is shown.
    pub(crate) age: Option<i64>,
    /// ECS shows no task that it has ever held.
    pub(crate) held_nothing: bool,
    /// It goes because it is of no use.
    pub(crate) is_broken: bool,
    pub(crate) release: Option<Release>,
}

/// A release that this run has decided.
#[derive(Clone, Copy)]
pub(crate) struct Release {
    /// Whether DesiredCapacity falls with it.
    pub(crate) decrement: bool,
}

/// Where an instance stands. Changed by: the group (Booting, Gone), the
/// instance's agent (Booting → Ready, Ready ↔ Unusable), RunTask (Ready →
/// Busy), the task's end (Busy → Finishing → Ready), the scaler (Ready ↔
/// Draining or Drained → Gone). `idle`: seconds without work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum InstanceState {
    /// Not registered.
    Booting,
    /// Takes a task at once.
    Ready { idle: i64 },
    /// Registered, but takes no task.
    Unusable { idle: i64 },
    /// A GPU is held, and no task is seen that holds it: never given back, for
    /// it may be at work.
    Held { idle: i64 },
    /// Holds a task of ours that works or will.
    Busy,
    /// Holds a task of ours that is on its way out.
    Finishing,
    /// Draining and empty.
    Drained { idle: i64 },
    /// Draining, with a task that still works.
    Draining,
    /// On its way out, or out of our hands.
    Gone,
}

impl<'a> Offer<'a> {
    /// The policy's options in their order; one whose group does not exist is
    /// left out.
    pub(crate) fn all(seen: &'a Observation, policy: &'a Policy) -> Vec<Self> {
        let mut offers: Vec<Self> = policy
            .options
            .iter()
            .filter_map(|option| Self::join(seen, policy, option))
            .collect();
        let open = offers.iter().filter(|offer| offer.is_open()).count();
        for offer in &mut offers {
            let unfilled = offer.group.desired.saturating_sub(offer.living());
            let open_elsewhere = open > usize::from(offer.is_open());
            if offer.shortage.is_some() && open_elsewhere {
                offer.moved = unfilled;
            } else {
                offer.requested = unfilled;
            }
            offer.withdrawn = offer.moved;
        }
        offers
    }

    fn join(seen: &'a Observation, policy: &'a Policy, option: &'a CapacityOption) -> Option<Self> {
        let group = seen
            .groups
            .iter()
            .find(|group| group.name == option.auto_scaling_group)?;
        let instances = group
            .instances
            .iter()
            .map(|member| {
                let registered = seen
                    .container_instances
                    .iter()
                    .find(|registered| registered.instance_id == member.id);
                let tasks = registered.map_or_else(Vec::new, |registered| {
                    seen.tasks
                        .iter()
                        .filter(|task| task.container_instance.as_ref() == Some(&registered.arn))
                        .collect()
                });
                let state = match (member.state, registered) {
                    (Lifecycle::Terminating | Lifecycle::Other, _) => InstanceState::Gone,
                    (_, None) => InstanceState::Booting,
                    (_, Some(registered)) => {
                        let idle = idle_seconds(registered, &tasks, policy, seen.at);
                        registered_state(registered, &tasks, idle)
                    }
                };
                Instance {
                    id: &member.id,
                    registered,
                    state,
                    age: launch_age(group, &member.id, seen.at),
                    held_nothing: tasks.is_empty(),
                    is_broken: false,
                    release: None,
                }
            })
            .collect();
        Some(Self {
            option,
            group,
            instances,
            rest: history::rest(group, seen.at),
            shortage: history::shortage(group),
            requested: 0,
            moved: 0,
            withdrawn: 0,
            added: 0,
        })
    }

    /// Instances that are there and stay.
    pub(crate) fn living(&self) -> u32 {
        self.count(|instance| instance.state != InstanceState::Gone)
    }

    pub(crate) fn count(&self, wanted: impl Fn(&Instance<'a>) -> bool) -> u32 {
        self.instances
            .iter()
            .filter(|instance| wanted(instance))
            .count() as u32
    }

    /// Releases of this run that lower DesiredCapacity.
    pub(crate) fn decremented(&self) -> u32 {
        self.count(|instance| instance.release.is_some_and(|release| release.decrement))
    }

    /// What counts against the maximum, but for instances on their way out.
    pub(crate) fn planned(&self) -> u32 {
        let after_move = self.group.desired.saturating_sub(self.moved);
        after_move.max(self.living())
    }

    /// How many more its group may have.
    pub(crate) fn room(&self) -> u32 {
        self.group.max.saturating_sub(self.planned())
    }

    /// Whether it would give an instance that is asked for.
    fn is_open(&self) -> bool {
        self.rest.is_none() && self.group.max > self.group.desired.max(self.living())
    }
}

impl Instance<'_> {
    pub(crate) fn is_without_gpu(&self) -> bool {
        self.registered.is_some_and(|known| known.gpus == 0)
    }

    pub(crate) fn is_drained(&self) -> bool {
        matches!(self.state, InstanceState::Drained { .. })
    }
}

fn launch_age(group: &Group, id: &str, now: i64) -> Option<i64> {
    group
        .activities
        .iter()
        .filter(|activity| activity.kind == ActivityKind::Launch)
        .find(|activity| activity.instance.as_deref() == Some(id))
        .map(|activity| (now - activity.started_at).max(0))
}

fn registered_state(registered: &ContainerInstance, tasks: &[&Task], idle: i64) -> InstanceState {
    let holds_task = tasks.iter().any(|task| task.status != TaskStatus::Stopped);
    match registered.status {
        ContainerInstanceStatus::Draining if holds_task || registered.holds_gpu() => {
            InstanceState::Draining
        }
        ContainerInstanceStatus::Draining => InstanceState::Drained { idle },
        _ if tasks.iter().any(|task| task.gives_capacity()) => InstanceState::Busy,
        _ if holds_task => InstanceState::Finishing,
        _ if registered.holds_gpu() => InstanceState::Held { idle },
        ContainerInstanceStatus::Active if registered.agent_connected && registered.gpus > 0 => {
            InstanceState::Ready { idle }
        }
        _ => InstanceState::Unusable { idle },
    }
}

/// Seconds since the instance's last work. A task that exits with 0 has waited
/// for work before it did, and that wait was idle time already.
fn idle_seconds(registered: &ContainerInstance, tasks: &[&Task], policy: &Policy, now: i64) -> i64 {
    let waited_before_exit = i64::from(policy.idle_exit_seconds);
    let last_work = tasks
        .iter()
        .filter_map(|task| {
            // A task that never ran was no work.
            let (stopped, _) = task.stopped_at.zip(task.started_at)?;
            Some(match task.exit_code {
                Some(0) => stopped - waited_before_exit,
                _ => stopped,
            })
        })
        .max();
    let registered_at = registered.registered_at.unwrap_or(0);
    let idle_since = last_work.map_or(registered_at, |at| at.max(registered_at));
    (now - idle_since).max(0)
}
