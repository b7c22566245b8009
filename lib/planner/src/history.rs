//! What past launches say about the next one: the crash loop's memory and the
//! capacity options' rest.

use crate::observation::{Group, Observation, Task, TaskStatus};
use crate::streak::{FailureStreak, OPTION_KEY, TASKS_KEY};

/// A task that ends with an error before this has not worked, and one that
/// runs this long has. Longer than a model download and load on a cold disk.
pub const WORKING_AFTER_SECONDS: i64 = 600;

/// A task that has run this long has loaded its model: enough to let the rest
/// of a fleet follow the first ones.
pub const PROVEN_AFTER_SECONDS: i64 = 60;

/// A task that something killed after this long was not killed by its own start.
const STARTED_AFTER_SECONDS: i64 = 10;

/// SQS's metrics of a minute are there this long after it: what they do not
/// tell by then did not happen.
const METRICS_LATE_SECONDS: i64 = 300;

/// Exit code of a container that SIGKILL ended.
const KILLED: i32 = 137;

/// How ECS says that the kernel killed it for want of memory.
const OUT_OF_MEMORY: &str = "OutOfMemory";

/// Tasks tried at once while no launch is known to work (a crash loop
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

/// ECS's stop codes of tasks that something else ended (ECS API reference,
/// Task, `stopCode`).
const TAKEN_AWAY_CODES: [&str; 4] = [
    "UserInitiated",
    "SpotInterruption",
    "TerminationNotice",
    "ServiceSchedulerInitiated",
];

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

/// Whether the queue's metrics decide what a stopped task says.
pub fn needs_metrics(task: &Task) -> bool {
    let unknown = Observation::default();
    task.status == TaskStatus::Stopped
        && task.started_at.is_some()
        && (is_killed(task) || ending(task, &unknown) == Ending::Failed)
}

/// Judges a stopped task.
pub fn ending(task: &Task, seen: &Observation) -> Ending {
    if task.exit_code == Some(0) {
        return Ending::Worked;
    }
    let reason = task.stop_reason.as_deref().unwrap_or("");
    if reason.starts_with(STUCK_REASON) {
        return Ending::Failed;
    }
    let stop_code = task.stop_code.as_deref().unwrap_or("");
    if TAKEN_AWAY_CODES.contains(&stop_code) || reason.starts_with("Host EC2") {
        return Ending::Taken;
    }
    let Some((started, stopped)) = task.started_at.zip(task.stopped_at) else {
        return Ending::Failed;
    };
    let ran = stopped - started;
    if ran >= WORKING_AFTER_SECONDS || did_work_alone(task, seen) {
        Ending::Worked
    } else if is_killed(task) && ran >= STARTED_AFTER_SECONDS && !was_idle(task, seen) {
        Ending::Taken
    } else {
        Ending::Failed
    }
}

/// SIGKILL from outside: no task does that to itself. One that took all the
/// memory that it may have is its own fault.
fn is_killed(task: &Task) -> bool {
    let reason = task.stop_reason.as_deref().unwrap_or("");
    task.exit_code == Some(KILLED) && !reason.contains(OUT_OF_MEMORY)
}

/// Whether the task ran in the minute that begins at `minute`.
fn ran_in(task: &Task, minute: i64) -> bool {
    let is_over = task.stopped_at.is_some_and(|stopped| stopped <= minute);
    !is_over && task.started_at.is_some_and(|started| started < minute + 60)
}

/// Whether images were done in a minute in which no other task ran: SQS knows
/// when messages were deleted, not by whom.
fn did_work_alone(task: &Task, seen: &Observation) -> bool {
    let minutes = seen.working_minutes.iter().flatten();
    minutes.copied().any(|minute| {
        let ran = |other: &&Task| ran_in(other, minute);
        ran_in(task, minute) && seen.tasks.iter().filter(ran).count() == 1
    })
}

/// Whether it is known that nothing was done while the task ran.
fn was_idle(task: &Task, seen: &Observation) -> bool {
    let is_known = task
        .stopped_at
        .is_some_and(|stopped| seen.at - stopped >= METRICS_LATE_SECONDS);
    let minutes = seen.working_minutes.as_ref();
    is_known && minutes.is_some_and(|all| !all.iter().any(|minute| ran_in(task, *minute)))
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
        let tag = observation
            .groups
            .first()
            .and_then(|group| group.tags.get(TASKS_KEY));
        let stored = FailureStreak::from_tag(tag);
        let evidence = Evidence::of(observation);
        let streak = stored.clone().continued(observation, &evidence);

        let retry_at = streak.at + minutes_after(&LAUNCH_BACKOFF_MINUTES, streak.failures);
        let at_once = match streak.failures {
            0 if evidence.proven => None,
            0 => Some(UNPROVEN_LAUNCHES),
            _ => Some(u32::from(now >= retry_at)),
        };
        let is_new = (streak.failures, streak.at) != (stored.failures, stored.at);
        Self {
            failures: streak.failures,
            last_failure: streak.at,
            why: streak.why.clone(),
            retry_at,
            allowed: at_once.map(|most| most.saturating_sub(evidence.unproven)),
            remember: is_new.then_some(streak),
        }
    }
}

/// What the tasks that ECS shows say about launches.
struct Evidence {
    /// The last moment at which a launch was seen to work.
    worked_at: i64,
    /// Some launch loaded its model.
    proven: bool,
    /// Living tasks of which that is not known yet.
    unproven: u32,
}

impl Evidence {
    fn of(seen: &Observation) -> Self {
        let mut evidence = Self {
            worked_at: i64::MIN,
            proven: false,
            unproven: 0,
        };
        for task in &seen.tasks {
            let ran = task.started_at.map_or(0, |started| seen.at - started);
            match task.status {
                TaskStatus::Stopped if ending(task, seen) == Ending::Worked => {
                    let stopped_at = task.stopped_at.unwrap_or(i64::MIN);
                    evidence.worked_at = evidence.worked_at.max(stopped_at);
                    evidence.proven = true;
                }
                TaskStatus::Running => {
                    if ran >= WORKING_AFTER_SECONDS {
                        evidence.worked_at = seen.at;
                    }
                    evidence.proven |= ran >= PROVEN_AFTER_SECONDS;
                }
                _ => {}
            }
            let is_young = task.status.is_starting() || ran < PROVEN_AFTER_SECONDS;
            evidence.unproven += u32::from(task.gives_capacity() && is_young);
        }
        evidence
    }
}

impl FailureStreak {
    /// The streak after what the tasks show: ended by a launch that worked,
    /// longer by each newer one that failed.
    fn continued(self, seen: &Observation, evidence: &Evidence) -> Self {
        let counted_until = match self.failures {
            0 => i64::MIN,
            _ => self.at,
        };
        // The metrics may tell later of the very task that was counted that it worked.
        let mut streak = match self.at <= evidence.worked_at && self.failures > 0 {
            true => Self::default(),
            false => self,
        };
        let mut failed: Vec<(i64, &Task)> = seen
            .tasks
            .iter()
            .filter(|task| {
                task.status == TaskStatus::Stopped && ending(task, seen) == Ending::Failed
            })
            .filter_map(|task| Some((task.stopped_at?, task)))
            .filter(|(at, _)| *at > evidence.worked_at && *at > counted_until)
            .collect();
        failed.sort_by_key(|(at, _)| *at);
        streak.failures += failed.len() as u32;
        if let Some((at, task)) = failed.last() {
            streak.at = *at;
            streak.why = failure_text(task);
        }
        streak
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

/// Launches in a row for which a group found no capacity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// How many.
    pub launches: u32,
    /// When the newest was tried.
    pub at: i64,
    /// What that one said.
    pub why: String,
}

/// The group's shortage, if its newest launch failed. Activities may come in
/// any order.
pub fn shortage(group: &Group) -> Option<Shortage> {
    let last_success = group
        .activities
        .iter()
        .filter(|activity| activity.is_launch_that_works())
        .map(|activity| activity.started_at)
        .max();
    let failed = || {
        group.activities.iter().filter(|activity| {
            activity.is_failed_launch() && Some(activity.started_at) >= last_success
        })
    };
    let newest = failed().max_by_key(|activity| activity.started_at)?;
    Some(Shortage {
        launches: failed().count() as u32,
        at: newest.started_at,
        why: newest
            .message
            .clone()
            .unwrap_or_else(|| "the launch failed without a message".to_owned()),
    })
}

/// Whether and why the group's option rests now.
pub fn rest(group: &Group, now: i64) -> Option<Rest> {
    let useless = FailureStreak::from_tag(group.tags.get(OPTION_KEY));
    let until = useless.at + minutes_after(&FAILURE_BACKOFF_MINUTES, useless.failures);
    if useless.failures > 0 && now < until {
        return Some(Rest {
            until,
            failed_at: useless.at,
            why: useless.why,
            costly: true,
        });
    }
    let shortage = shortage(group)?;
    let until = shortage.at + minutes_after(&SHORTAGE_BACKOFF_MINUTES, shortage.launches);
    (now < until).then_some(Rest {
        until,
        failed_at: shortage.at,
        why: shortage.why,
        costly: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::{Activity, ActivityKind, ActivityStatus};
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
        let ending = |task: &Task| ending(task, &Observation::default());
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
    fn kills_in_mid_work_hold_nothing_back() {
        let kills: Vec<Task> = (1..=8)
            .map(|number| stopped(number * 27, 25, KILLED))
            .collect();
        let mut seen = seen(8 * 27 + 1, kills, None);
        for minutes in [None, Some(vec![0, 60, 120, 180])] {
            seen.working_minutes = minutes;
            let launches = Launches::from_observation(&seen);
            assert_eq!((launches.failures, launches.held(seen.at)), (0, false));
        }
    }

    #[test]
    fn kills_that_left_nothing_done_are_failures_once_that_is_known() {
        let kills: Vec<Task> = (1..=3)
            .map(|number| stopped(number * 27, 25, KILLED))
            .collect();
        let mut seen = seen(3 * 27 + METRICS_LATE_SECONDS, kills, None);
        seen.working_minutes = Some(vec![180]);
        assert_eq!(Launches::from_observation(&seen).failures, 3);
        seen.working_minutes = None;
        assert_eq!(Launches::from_observation(&seen).failures, 0);
        let at_start = stopped(10, STARTED_AFTER_SECONDS - 1, KILLED);
        assert_eq!(ending(&at_start, &seen), Ending::Failed);
    }

    #[test]
    fn a_task_that_did_images_before_it_failed_was_no_failed_launch() {
        let mut starved = stopped(200, 100, KILLED);
        starved.stop_reason = Some("OutOfMemoryError: Container killed".to_owned());
        for task in [stopped(200, 100, 5), starved] {
            assert!(needs_metrics(&task));
            // The metrics come a minute or two after the first verdict.
            let mut seen = seen(210, vec![task], None);
            let first = Launches::from_observation(&seen);
            assert_eq!(first.failures, 1);
            let tag = first.remember.map(|streak| streak.to_string());
            seen.groups[0]
                .tags
                .insert(TASKS_KEY.to_owned(), tag.expect("a tag"));
            seen.working_minutes = Some(vec![120]);
            let second = Launches::from_observation(&seen);
            assert_eq!((second.failures, second.allowed), (0, None));
            assert_eq!(second.remember, Some(FailureStreak::default()));
        }
    }

    #[test]
    fn what_others_did_excuses_no_crash_at_start() {
        let mut crashed = stopped(200, 30, 3);
        let mut worker = stopped(900, 800, 0);
        worker.status = TaskStatus::Running;
        (worker.stopped_at, worker.exit_code, worker.stopping) = (None, None, false);
        crashed.arn = "task/new".to_owned();
        let mut seen = seen(260, vec![crashed, worker], None);
        seen.working_minutes = Some(vec![120, 180]);
        assert_eq!(ending(&seen.tasks[0], &seen), Ending::Failed);
    }

    #[test]
    fn shortages_count_from_the_last_launch_that_worked() {
        let activity = |started_at, status, instance: Option<&str>| Activity {
            kind: ActivityKind::Launch,
            instance: instance.map(str::to_owned),
            started_at,
            ended_at: None,
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
            shortage(&group).map(|shortage| (shortage.launches, shortage.at)),
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
