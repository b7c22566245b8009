//! Takes the observation: every read at once, every list to its end.

use std::future::Future;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use planner::boot::BOOT_KEY;
use planner::history::needs_metrics;
use planner::observation::{ContainerInstance, Group, Lane, Task};
use planner::streak::{OPTION_KEY, TASKS_KEY};
use planner::{Observation, Policy};
use platform::aws::Error;

use crate::aws::{Aws, DESCRIBE_MAX, Page, TaskFilter};

/// Time that all reads together may take. The Lambda's time-out (60 s) leaves
/// room for the writes.
pub const OBSERVE_TIMEOUT: Duration = Duration::from_secs(12);

/// Pages of one list before something is wrong with its tokens: 10,000 entries.
const MAX_PAGES: usize = 100;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Call(#[from] Error),
    #[error("no answer within {} s", OBSERVE_TIMEOUT.as_secs())]
    Timeout,
}

/// An essential read failed: nothing can be decided.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot observe {what}: {source}")]
pub struct ObserveError {
    pub what: &'static str,
    pub source: ReadError,
}

/// Reads everything. Metrics, activities and warm pools may be missing; the
/// rest is essential.
pub async fn observe<A: Aws>(
    aws: &A,
    policy: &Policy,
    now: i64,
) -> Result<Observation, ObserveError> {
    let names: Vec<String> = policy
        .options
        .iter()
        .map(|option| option.auto_scaling_group.clone())
        .collect();
    let (queue, lane, metrics, wanted, unwanted, instances, groups, activities) = tokio::join!(
        essential("the queue", aws.queue()),
        lane(aws, policy, now),
        in_time(aws.metrics(now)),
        essential("the tasks", tasks(aws, TaskFilter::Wanted)),
        essential("the stopped tasks", tasks(aws, TaskFilter::Unwanted)),
        essential("the container instances", container_instances(aws)),
        essential("the Auto Scaling groups", groups(aws, &names)),
        join_all(
            names
                .iter()
                .map(|name| in_time(aws.describe_activities(name)))
        ),
    );
    let mut seen = Observation {
        at: now,
        queue: queue?,
        tasks: wanted?,
        container_instances: instances?,
        groups: groups?,
        ..Observation::default()
    };
    for task in unwanted? {
        // A task can move from one list to the other between the two reads.
        if !seen.tasks.iter().any(|known| known.arn == task.arn) {
            seen.tasks.push(task);
        }
    }
    let (lane, missing) = lane?;
    seen.lane = lane;
    seen.missing.extend(missing);
    match metrics {
        Ok(metrics) => {
            seen.queue.oldest_age = metrics.oldest_age;
            seen.images_per_second = metrics.images_per_second;
            seen.arrivals = metrics.arrivals;
            seen.first_vector_seconds = metrics.first_vector_seconds;
        }
        Err(error) => seen.missing.push(format!("CloudWatch metrics ({error})")),
    }
    // Rare, so it costs nothing while all is well.
    if seen.tasks.iter().any(needs_metrics) {
        match in_time(aws.working_minutes(now)).await {
            Ok(minutes) => seen.working_minutes = Some(minutes),
            Err(error) => seen.missing.push(format!("deleted messages ({error})")),
        }
    }
    for (name, activities) in names.iter().zip(activities) {
        let group = seen.groups.iter_mut().find(|group| group.name == *name);
        match (group, activities) {
            (Some(group), Ok(activities)) => group.activities = activities,
            (Some(_), Err(error)) => seen
                .missing
                .push(format!("scaling activities of {name} ({error})")),
            (None, _) => {}
        }
    }
    let with_pools = seen
        .groups
        .iter_mut()
        .filter(|group| group.warm_pool.is_some());
    let pools = with_pools.map(|group| async {
        let ready = in_time(aws.describe_warm_pool(&group.name)).await;
        (group, ready)
    });
    for (group, ready) in join_all(pools).await {
        match ready {
            Ok(ready) => group.warm_pool = Some(ready),
            Err(error) => seen
                .missing
                .push(format!("warm pool of {} ({error})", group.name)),
        }
    }
    Ok(seen)
}

/// The express lane, if the policy has one, and what of it could not be read.
async fn lane<A: Aws>(
    aws: &A,
    policy: &Policy,
    now: i64,
) -> Result<(Option<Lane>, Vec<String>), ObserveError> {
    if policy.lane.is_none() {
        return Ok((None, Vec::new()));
    }
    let usage = async {
        match policy.max_daily_cost > 0.0 {
            true => in_time(aws.lane_usage(now)).await,
            false => Ok(Default::default()),
        }
    };
    let (gpu_queue, state, metrics, usage) = tokio::join!(
        essential("the GPUs' own queue", aws.gpu_queue()),
        in_time(aws.lane_state()),
        in_time(aws.lane_metrics(now)),
        usage,
    );
    let mut missing = Vec::new();
    let mut note = |what: &str, error: ReadError| missing.push(format!("{what} ({error})"));
    let mut lane = Lane {
        gpu_queue: gpu_queue?,
        ..Lane::default()
    };
    match state {
        Ok(state) => lane.state = state,
        Err(error) => note("state of the express lane", error),
    }
    match metrics {
        Ok(metrics) => {
            lane.seconds_per_image = metrics.seconds_per_image;
            lane.images_lately = metrics.images_lately;
        }
        Err(error) => note("metrics of the express lane", error),
    }
    match usage {
        Ok(usage) => (lane.seconds_today, lane.requests_today) = (usage.seconds, usage.requests),
        Err(error) => note("use of the express lane", error),
    }
    Ok((Some(lane), missing))
}

async fn essential<T>(
    what: &'static str,
    read: impl Future<Output = Result<T, Error>>,
) -> Result<T, ObserveError> {
    in_time(read)
        .await
        .map_err(|source| ObserveError { what, source })
}

async fn in_time<T>(read: impl Future<Output = Result<T, Error>>) -> Result<T, ReadError> {
    match tokio::time::timeout(OBSERVE_TIMEOUT, read).await {
        Ok(answer) => Ok(answer?),
        Err(_) => Err(ReadError::Timeout),
    }
}

/// Walks a list to its end.
async fn all_pages<T, F, R>(operation: &'static str, mut read: F) -> Result<Vec<T>, Error>
where
    F: FnMut(Option<String>) -> R,
    R: Future<Output = Result<Page<T>, Error>>,
{
    let mut items = Vec::new();
    let mut token = None;
    for _ in 0..MAX_PAGES {
        let page = read(token).await?;
        items.extend(page.items);
        match page.next {
            Some(next) if !next.is_empty() => token = Some(next),
            _ => return Ok(items),
        }
    }
    Err(Error::of_code(
        operation,
        "TooManyPages",
        format!("the list did not end within {MAX_PAGES} pages"),
    ))
}

/// Describes what a list named, a hundred at a time and all at once.
async fn described<'a, T, R>(
    arns: &'a [String],
    describe: impl Fn(&'a [String]) -> R,
) -> Result<Vec<T>, Error>
where
    R: Future<Output = Result<Vec<T>, Error>>,
{
    let parts = try_join_all(arns.chunks(DESCRIBE_MAX).map(describe)).await?;
    Ok(parts.into_iter().flatten().collect())
}

async fn tasks<A: Aws>(aws: &A, filter: TaskFilter) -> Result<Vec<Task>, Error> {
    let arns = all_pages("ecs:ListTasks", |page| aws.list_tasks(&filter, page)).await?;
    described(&arns, |chunk| aws.describe_tasks(chunk)).await
}

async fn container_instances<A: Aws>(aws: &A) -> Result<Vec<ContainerInstance>, Error> {
    let arns = all_pages("ecs:ListContainerInstances", |page| {
        aws.list_container_instances(page)
    })
    .await?;
    described(&arns, |chunk| aws.describe_container_instances(chunk)).await
}

/// The groups in the order of the options, with the scaler's own tags.
async fn groups<A: Aws>(aws: &A, names: &[String]) -> Result<Vec<Group>, Error> {
    let mut groups = all_pages("autoscaling:DescribeAutoScalingGroups", |page| {
        aws.describe_groups(names, page)
    })
    .await?;
    groups.sort_by_key(|group| names.iter().position(|name| *name == group.name));
    for group in &mut groups {
        group
            .tags
            .retain(|key, _| [TASKS_KEY, OPTION_KEY, BOOT_KEY].contains(&key.as_str()));
    }
    Ok(groups)
}

/// Tasks of ours that hold, or are about to hold, the container instance.
pub(crate) async fn tasks_on<A: Aws>(
    aws: &A,
    container_instance: &str,
) -> Result<Vec<String>, Error> {
    let filter = TaskFilter::WantedOn(container_instance.to_owned());
    let tasks = tasks(aws, filter).await?;
    Ok(tasks.into_iter().map(|task| task.arn).collect())
}
