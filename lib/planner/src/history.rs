//! What past launches say about the next one: the crash loop's memory and the
//! capacity options' rest.

use crate::observation::{ActivityStatus, Group, Observation, Task, TaskStatus};
use crate::streak::{FailureStreak, OPTION_KEY, TASKS_KEY};

/// A task that ends with an error before this has not worked, and one that
/// runs this long has. Longer than a model download and load on a cold disk.
pub const WORKING_AFTER_SECONDS: i64 = 600;

/// A task that has run this long has loaded its model: enough to let the rest
/// of a fleet follow the first ones.
pub const PROVEN_AFTER_SECONDS: i64 = 60;

/// Tasks tried at once while no launch is known to work (issue: a crash loop
/// costs at most 5 launches in its first hour).
pub const UNPROVEN_LAUNCHES: u32 = 5;

/// A task that is not RUNNING after this long is stuck. An image of a few GB
/// is pulled in 2–3 minutes.
pub const STUCK_TASK_SECONDS: i64 = 600;

/// StopTask's reason for a stuck task begins with this, so that the next run
/// counts it as a failed launch.
pub const STUCK_REASON: &str = "scaler: stuck";

/// StopTask's reason for a task that works though fewer would do: it drains
/// and exits with 0.
pub const RETIRED_REASON: &str = "scaler: retired";

/// StopTask's reason for a task that is not needed any more begins with this:
/// no fault of the task.
pub const RECALLED_REASON: &str = "scaler: recalled";

/// Wait after the first, second, … failed launch in a row, in minutes. A first
/// failure is tried again at once: it is as likely a task that was killed
/// while it worked, whose images should not wait. The first four add up to
/// 46 minutes, so a launch at a time makes 5 in the first hour; the fifth
/// failure closes the hour.
const LAUNCH_BACKOFF_MINUTES: [i64; 8] = [0, 4, 12, 30, 60, 120, 240, 360];

/// Rest of an option after the first, second, … instance in a row that never
/// became useful, in minutes: each costs its boot, so the first rests too.
const FAILURE_BACKOFF_MINUTES: [i64; 8] = [1, 4, 12, 30, 60, 120, 240, 360];

/// Rest of an option after the first, second, … launch in a row for which
/// there was no capacity, in minutes. Trying costs nothing, so it stays short.
const SHORTAGE_BACKOFF_MINUTES: [i64; 5] = [1, 2, 5, 10, 15];

fn minutes_after(table: &[i64], failures: u32) -> i64 {
    match failures {
        0 => 0,
        n => 60 * table[(n as usize - 1).min(table.len() - 1)],
    }
}

/// What a stopped task says about launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It did what a task should.
    Worked,
    /// It failed at start, or so early that the launch was in vain.
    Failed,
    /// Something took it away: no verdict on the launch.
    Taken,
}

/// Judges a stopped task.
pub fn ending(task: &Task) -> Ending {
    if task.exit_code == Some(0) {
        return Ending::Worked;
    }
    let reason = task.stop_reason.as_deref().unwrap_or("");
    if reason.starts_with(STUCK_REASON) {
        return Ending::Failed;
    }
    let taken = matches!(
        task.stop_code.as_deref(),
        Some(
            "UserInitiated"
                | "SpotInterruption"
                | "TerminationNotice"
                | "ServiceSchedulerInitiated"
        )
    ) || reason.starts_with("Host EC2");
    if taken {
        return Ending::Taken;
    }
    let ran = match (task.started_at, task.stopped_at) {
        (Some(started), Some(stopped)) => stopped - started,
        _ => 0,
    };
    if ran >= WORKING_AFTER_SECONDS {
        Ending::Worked
    } else {
        Ending::Failed
    }
}

/// Why a task failed, in one line.
pub fn failure_text(task: &Task) -> String {
    let mut text = task
        .stop_reason
        .clone()
        .or_else(|| task.stop_code.clone())
        .unwrap_or_else(|| "stopped without a reason".to_owned());
    if let Some(code) = task.exit_code {
        text.push_str(&format!(" (exit code {code})"));
    }
    text
}

/// Whether tasks can be launched now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launches {
    /// Failed launches in a row, memory included.
    pub failures: u32,
    /// When the last of them ended.
    pub last_failure: i64,
    /// What it said.
    pub why: String,
    /// No launch before this.
    pub retry_at: i64,
    /// Tasks that may be launched in this run; `None`: as many as wanted.
    pub allowed: Option<u32>,
    /// What the tag should say, when it says something else.
    pub remember: Option<FailureStreak>,
}

impl Launches {
    /// Whether launches wait for `retry_at`.
    pub fn held(&self, now: i64) -> bool {
        self.failures > 0 && now < self.retry_at
    }

    /// Derives it from the stopped and running tasks and the tag.
    pub fn from_observation(observation: &Observation) -> Self {
        let now = observation.at;
        let stored = observation
            .groups
            .first()
            .map(|group| FailureStreak::from_tag(group.tags.get(TASKS_KEY)))
            .unwrap_or_default();

        let mut stopped: Vec<&Task> = observation
            .tasks
            .iter()
            .filter(|task| task.status == TaskStatus::Stopped && task.stopped_at.is_some())
            .collect();
        stopped.sort_by_key(|task| task.stopped_at);

        // The last moment at which a launch was seen to work.
        let mut worked_at = i64::MIN;
        let mut proven = false;
        for task in &observation.tasks {
            match task.status {
                TaskStatus::Stopped if ending(task) == Ending::Worked => {
                    worked_at = worked_at.max(task.stopped_at.unwrap_or(i64::MIN));
                    proven = true;
                }
                TaskStatus::Running => {
                    let ran = task.started_at.map_or(0, |started| now - started);
                    if ran >= WORKING_AFTER_SECONDS {
                        worked_at = now;
                    }
                    proven |= ran >= PROVEN_AFTER_SECONDS;
                }
                _ => {}
            }
        }

        let mut memory = if stored.at < worked_at && stored.failures > 0 {
            FailureStreak::default()
        } else {
            stored.clone()
        };
        for task in stopped {
            let stopped_at = task.stopped_at.unwrap_or(i64::MIN);
            let counts = ending(task) == Ending::Failed
                && stopped_at > worked_at
                && (stopped_at > stored.at || stored.failures == 0);
            if counts {
                memory.failures += 1;
                memory.at = stopped_at;
                memory.why = failure_text(task);
            }
        }

        let unproven = observation
            .tasks
            .iter()
            .filter(|task| !task.stopping)
            .filter(|task| {
                task.status.is_starting()
                    || (task.status == TaskStatus::Running
                        && task
                            .started_at
                            .is_none_or(|started| now - started < PROVEN_AFTER_SECONDS))
            })
            .count() as u32;

        let failures = memory.failures;
        let retry_at = memory.at + minutes_after(&LAUNCH_BACKOFF_MINUTES, failures);
        let allowed = if failures > 0 {
            let one_try = if now < retry_at { 0 } else { 1 };
            Some(u32::saturating_sub(one_try, unproven))
        } else if proven {
            None
        } else {
            Some(UNPROVEN_LAUNCHES.saturating_sub(unproven))
        };
        Self {
            failures,
            last_failure: memory.at,
            why: memory.why.clone(),
            retry_at,
            allowed,
            remember: (memory.failures != stored.failures || memory.at != stored.at)
                .then_some(memory),
        }
    }
}

/// Why an option is passed over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rest {
    /// Until when.
    pub until: i64,
    /// When it failed last.
    pub failed_at: i64,
    /// What it said.
    pub why: String,
    /// Trying again would cost money (an instance that starts and is of no
    /// use), not just a call.
    pub costly: bool,
}

/// Launches in a row for which the group found no capacity, the newest's time
/// and message. Activities may come in any order.
pub fn shortage(group: &Group) -> Option<(u32, i64, String)> {
    let last_success = group
        .activities
        .iter()
        .filter(|activity| {
            activity.kind == crate::observation::ActivityKind::Launch
                && matches!(
                    activity.status,
                    ActivityStatus::Successful | ActivityStatus::InProgress
                )
                && activity.instance.is_some()
        })
        .map(|activity| activity.started_at)
        .max()
        .unwrap_or(i64::MIN);
    let failed: Vec<_> = group
        .activities
        .iter()
        .filter(|activity| activity.is_failed_launch() && activity.started_at >= last_success)
        .collect();
    let newest = failed.iter().max_by_key(|activity| activity.started_at)?;
    let why = newest
        .message
        .clone()
        .unwrap_or_else(|| "the launch failed without a message".to_owned());
    Some((failed.len() as u32, newest.started_at, why))
}

/// Whether and why the group's option rests now.
pub fn rest(group: &Group, now: i64) -> Option<Rest> {
    let memory = FailureStreak::from_tag(group.tags.get(OPTION_KEY));
    let useless_until = memory.at + minutes_after(&FAILURE_BACKOFF_MINUTES, memory.failures);
    if memory.failures > 0 && now < useless_until {
        return Some(Rest {
            until: useless_until,
            failed_at: memory.at,
            why: memory.why,
            costly: true,
        });
    }
    let (count, at, why) = shortage(group)?;
    let until = at + minutes_after(&SHORTAGE_BACKOFF_MINUTES, count);
    (now < until).then_some(Rest {
        until,
        failed_at: at,
        why,
        costly: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::{Activity, ActivityKind};
    use std::collections::BTreeMap;

    fn stopped(at: i64, ran: i64, exit_code: i32) -> Task {
        Task {
            arn: format!("task/{at}"),
            status: TaskStatus::Stopped,
            stopping: true,
            container_instance: None,
            created_at: Some(at - ran - 40),
            started_at: Some(at - ran),
            stopped_at: Some(at),
            stop_code: Some("EssentialContainerExited".to_owned()),
            stop_reason: Some("Essential container in task exited".to_owned()),
            exit_code: Some(exit_code),
        }
    }

    fn seen(at: i64, tasks: Vec<Task>, tag: Option<&str>) -> Observation {
        let mut tags = BTreeMap::new();
        if let Some(tag) = tag {
            tags.insert(TASKS_KEY.to_owned(), tag.to_owned());
        }
        Observation {
            at,
            tasks,
            groups: vec![Group {
                name: "g".to_owned(),
                max: 5,
                tags,
                ..Group::default()
            }],
            ..Observation::default()
        }
    }

    #[test]
    fn failures_in_a_row_wait_longer_each_time() {
        let mut tasks = Vec::new();
        for (number, wait) in [(1, 0), (2, 240), (3, 720), (4, 1800), (5, 3600)] {
            tasks.push(stopped(number * 10, 5, 1));
            let launches = Launches::from_observation(&seen(100, tasks.clone(), None));
            assert_eq!(launches.failures, number as u32);
            assert_eq!(launches.retry_at, number * 10 + wait);
        }
    }

    #[test]
    fn a_task_that_worked_resets_the_count_and_the_tag() {
        let tasks = vec![stopped(10, 5, 1), stopped(20, 5, 1), stopped(900, 100, 0)];
        let launches = Launches::from_observation(&seen(1000, tasks, Some("k=2 at=20 why=x")));
        assert_eq!(launches.failures, 0);
        assert_eq!(launches.allowed, None);
        assert_eq!(launches.remember, Some(FailureStreak::default()));
    }

    #[test]
    fn the_tag_outlives_what_ecs_shows_and_is_not_counted_twice() {
        let tag = "k=5 at=1000 why=exit code 1";
        let launches = Launches::from_observation(&seen(5000, Vec::new(), Some(tag)));
        assert_eq!((launches.failures, launches.retry_at), (5, 4600));
        assert_eq!(launches.allowed, Some(1));
        assert_eq!(launches.remember, None);
        let both = Launches::from_observation(&seen(1001, vec![stopped(1000, 5, 1)], Some(tag)));
        assert_eq!(both.failures, 5);
        assert!(both.held(1001));
        let one_more = Launches::from_observation(&seen(
            1101,
            vec![stopped(1000, 5, 1), stopped(1100, 5, 1)],
            Some(tag),
        ));
        assert_eq!(one_more.failures, 6);
        assert_eq!(one_more.remember.map(|memory| memory.at), Some(1100));
    }

    #[test]
    fn a_cold_start_tries_five_and_then_waits_for_proof() {
        let mut tasks: Vec<Task> = (0..5)
            .map(|number| Task {
                arn: format!("task/{number}"),
                status: TaskStatus::Running,
                stopping: false,
                container_instance: None,
                created_at: Some(0),
                started_at: Some(50),
                stopped_at: None,
                stop_code: None,
                stop_reason: None,
                exit_code: None,
            })
            .collect();
        let waiting = Launches::from_observation(&seen(100, tasks.clone(), None));
        assert_eq!(waiting.allowed, Some(0));
        tasks[0].started_at = Some(40);
        let proven = Launches::from_observation(&seen(100, tasks, None));
        assert_eq!(proven.allowed, None);
    }

    #[test]
    fn what_was_taken_away_is_no_failure() {
        let mut lost = stopped(10, 5, 137);
        lost.stop_reason = Some("Host EC2 (instance i-1) terminated.".to_owned());
        assert_eq!(ending(&lost), Ending::Taken);
        let mut spot = stopped(10, 5, 143);
        spot.stop_code = Some("SpotInterruption".to_owned());
        assert_eq!(ending(&spot), Ending::Taken);
        let mut stuck = stopped(10, 0, 0);
        stuck.exit_code = None;
        stuck.stop_code = Some("UserInitiated".to_owned());
        stuck.stop_reason = Some("scaler: stuck in PENDING for 600 s".to_owned());
        assert_eq!(ending(&stuck), Ending::Failed);
        stuck.stop_reason = Some("scaler: recalled, the queue is empty".to_owned());
        assert_eq!(ending(&stuck), Ending::Taken);
        assert_eq!(ending(&stopped(1000, 900, 1)), Ending::Worked);
    }

    #[test]
    fn shortages_count_from_the_last_launch_that_worked() {
        let activity = |started_at, status, instance: Option<&str>| Activity {
            kind: ActivityKind::Launch,
            instance: instance.map(str::to_owned),
            started_at,
            status,
            message: Some("InsufficientInstanceCapacity".to_owned()),
        };
        let mut group = Group {
            activities: vec![
                activity(30, ActivityStatus::Failed, None),
                activity(20, ActivityStatus::Failed, None),
                activity(10, ActivityStatus::Successful, Some("i-1")),
                activity(5, ActivityStatus::Failed, None),
            ],
            ..Group::default()
        };
        assert_eq!(
            shortage(&group).map(|(count, at, _)| (count, at)),
            Some((2, 30))
        );
        assert_eq!(rest(&group, 100).map(|rest| rest.until), Some(150));
        assert_eq!(rest(&group, 150), None);
        group
            .activities
            .push(activity(40, ActivityStatus::Successful, Some("i-2")));
        assert_eq!(shortage(&group), None);
    }
}
