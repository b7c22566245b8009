//! How long an instance takes from being asked for to its first vector: what
//! instances and tasks showed, remembered in a tag; the policy's value until
//! something was seen.

use std::fmt;

use crate::observation::{ActivityKind, Group, Observation, Task};
use crate::policy::Policy;

/// Tag key on the first option's group: how long a start took.
pub const BOOT_KEY: &str = "clip-scaler:boot";

/// What was measured is believed within this factor of the configured value:
/// one start that went wrong must not decide about the next hundred.
const BOOT_TRUST: f64 = 4.0;

/// A value that differs by less than this share from the remembered one is the
/// same: not every instance is worth a write.
const SAME_SHARE: f64 = 0.1;

/// A task placed later than this after its instance registered was not waited
/// for: the time in between is no boot.
const PLACED_AT_ONCE_SECONDS: i64 = 30;

/// Share of the configured time that a task needs from RUNNING to its first
/// vector, until tasks report it.
const FIRST_VECTOR_SHARE: f64 = 0.07;

/// The time from asking for an instance to its first vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Boot {
    /// In seconds, to plan with.
    pub seconds: f64,
    /// Whether a start was seen; else the policy's value.
    pub is_learned: bool,
    /// What the tag should say, when it says something else.
    pub(crate) remember: Option<String>,
}

/// What the tag remembers, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Learned {
    /// From the launch to a task that is RUNNING.
    running: Option<f64>,
    /// From there to its first vector.
    first_vector: Option<f64>,
}

impl Boot {
    /// From what is seen, what is remembered, and what is configured.
    pub fn of(seen: &Observation, policy: &Policy) -> Self {
        let tag = seen
            .groups
            .first()
            .and_then(|group| group.tags.get(BOOT_KEY));
        let stored = tag.map_or_else(Learned::default, |tag| Learned::from_tag(tag));
        let learned = Learned {
            running: newer(launch_to_running(seen), stored.running),
            first_vector: newer(seen.first_vector_seconds, stored.first_vector),
        };
        let configured = f64::from(policy.boot_seconds);
        let first_vector = configured * FIRST_VECTOR_SHARE;
        let seconds = learned.running.map_or(configured, |running| {
            running + learned.first_vector.unwrap_or(first_vector)
        });
        Self {
            seconds: seconds.clamp(configured / BOOT_TRUST, configured * BOOT_TRUST),
            is_learned: learned.running.is_some(),
            remember: (learned != stored).then(|| learned.to_string()),
        }
    }
}

fn newer(measured: Option<f64>, stored: Option<f64>) -> Option<f64> {
    let measured = measured.filter(|seconds| seconds.is_finite() && *seconds >= 0.0);
    match (measured, stored) {
        (Some(new), Some(old)) if (new - old).abs() > old * SAME_SHARE => Some(new.round()),
        (new, None) => new.map(f64::round),
        (_, old) => old,
    }
}

/// The median over the instances whose first task is seen. A group with a warm
/// pool does not count: some of its instances were not made but started.
fn launch_to_running(seen: &Observation) -> Option<f64> {
    let groups = seen.groups.iter().filter(|group| group.warm_pool.is_none());
    let starts = groups.flat_map(|group| starts_of(group, seen));
    let took = starts.map(|start| start.task_running_at - start.asked_at);
    let mut all: Vec<i64> = took.filter(|seconds| *seconds > 0).collect();
    all.sort_unstable();
    all.get(all.len() / 2).map(|seconds| *seconds as f64)
}

/// The steps of an instance's start, in seconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Start {
    /// When its launch began.
    pub asked_at: i64,
    /// When its launch was over, where that is known.
    pub running_at: Option<i64>,
    /// When its agent joined the cluster.
    pub registered_at: i64,
    /// When its first task was RUNNING.
    pub task_running_at: i64,
}

/// The starts whose first task began to run in the last `seconds`.
pub fn latest_starts(seen: &Observation, seconds: i64) -> impl Iterator<Item = Start> {
    let starts = seen.groups.iter().flat_map(|group| starts_of(group, seen));
    starts.filter(move |start| seen.at - start.task_running_at < seconds)
}

fn starts_of<'a>(group: &'a Group, seen: &'a Observation) -> impl Iterator<Item = Start> + 'a {
    let launches = group.activities.iter();
    let launches = launches.filter(|activity| activity.kind == ActivityKind::Launch);
    launches.filter_map(|launch| {
        let instance = launch.instance.as_deref()?;
        let mut registered = seen.container_instances.iter();
        let registered = registered.find(|known| known.instance_id == instance)?;
        let is_first = |task: &&Task| {
            let placed_after = task.created_at.zip(registered.registered_at);
            task.container_instance.as_ref() == Some(&registered.arn)
                && placed_after.is_some_and(|(at, from)| at - from <= PLACED_AT_ONCE_SECONDS)
        };
        let tasks = seen.tasks.iter().filter(is_first);
        Some(Start {
            asked_at: launch.started_at,
            running_at: launch.ended_at,
            registered_at: registered.registered_at?,
            task_running_at: tasks.filter_map(|task| task.started_at).min()?,
        })
    })
}

impl Learned {
    fn from_tag(tag: &str) -> Self {
        let value = |name: &str| {
            let mut words = tag.split(' ');
            words.find_map(|word| word.strip_prefix(name)?.parse().ok())
        };
        Self {
            running: value("running="),
            first_vector: value("first="),
        }
    }
}

impl fmt::Display for Learned {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = [("running", self.running), ("first", self.first_vector)];
        let known = words
            .iter()
            .filter_map(|(name, value)| Some((name, (*value)?)));
        let words: Vec<String> = known
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        formatter.write_str(&words.join(" "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::{
        Activity, ActivityStatus, ContainerInstance, ContainerInstanceStatus,
    };

    /// Instances launched at 0, registered at 100, whose first task runs after
    /// so many seconds.
    fn seen(running_after: &[i64]) -> Observation {
        let mut seen = Observation {
            at: 1000,
            groups: vec![Group::default()],
            ..Observation::default()
        };
        for (number, after) in running_after.iter().enumerate() {
            let (id, arn) = (format!("i-{number}"), format!("ci/{number}"));
            seen.groups[0].activities.push(Activity {
                kind: ActivityKind::Launch,
                instance: Some(id.clone()),
                started_at: 0,
                ended_at: Some(60),
                status: ActivityStatus::Successful,
                message: None,
            });
            seen.container_instances.push(ContainerInstance {
                arn: arn.clone(),
                instance_id: id,
                status: ContainerInstanceStatus::Active,
                agent_connected: true,
                registered_at: Some(100),
                version: 1,
                gpus: 1,
                free_gpus: 0,
            });
            seen.tasks.push(Task {
                container_instance: Some(arn),
                created_at: Some(102),
                started_at: Some(*after),
                ..Task::default()
            });
        }
        seen
    }

    fn seconds(seen: &Observation) -> f64 {
        Boot::of(seen, &Policy::default()).seconds
    }

    #[test]
    fn the_configured_time_is_the_start_value() {
        let boot = Boot::of(&seen(&[]), &Policy::default());
        assert_eq!(
            (boot.seconds, boot.is_learned, boot.remember),
            (180.0, false, None)
        );
    }

    #[test]
    fn the_median_start_and_the_tasks_first_vector_replace_it() {
        let mut seen = seen(&[110, 120, 300]);
        seen.first_vector_seconds = Some(9.0);
        let boot = Boot::of(&seen, &Policy::default());
        assert_eq!((boot.seconds, boot.is_learned), (129.0, true));
        assert_eq!(boot.remember.as_deref(), Some("running=120 first=9"));
    }

    #[test]
    fn the_phases_of_the_latest_starts_are_told() {
        let seen = seen(&[110, 970]);
        let latest: Vec<Start> = latest_starts(&seen, 60).collect();
        let start = Start {
            asked_at: 0,
            running_at: Some(60),
            registered_at: 100,
            task_running_at: 970,
        };
        assert_eq!(latest, [start]);
    }

    #[test]
    fn it_outlives_the_instances_in_the_tag_and_small_changes_are_none() {
        let mut later = seen(&[]);
        let tag = |text: &str| [(BOOT_KEY.to_owned(), text.to_owned())].into();
        later.groups[0].tags = tag("running=120 first=9");
        assert_eq!(seconds(&later), 129.0);
        let mut similar = seen(&[125]);
        similar.groups[0].tags = tag("running=120 first=9");
        let boot = Boot::of(&similar, &Policy::default());
        assert_eq!((boot.seconds, boot.remember), (129.0, None));
        later.groups[0].tags = tag("hello");
        assert_eq!(seconds(&later), 180.0);
    }

    #[test]
    fn what_waited_came_from_a_warm_pool_or_is_absurd_teaches_nothing() {
        let mut waited = seen(&[400]);
        waited.tasks[0].created_at = Some(390);
        assert_eq!(seconds(&waited), 180.0);
        let mut warm = seen(&[60]);
        warm.groups[0].warm_pool = Some(1);
        assert_eq!(seconds(&warm), 180.0);
        assert_eq!(seconds(&seen(&[5000])), 720.0);
    }
}
