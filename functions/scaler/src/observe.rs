//! Takes the observation: every read at once, every list to its end.

use std::future::Future;
use std::time::Duration;

use futures_util::future::try_join_all;

use crate::aws::{ApiError, Aws, DESCRIBE_MAX, DescribedGroup, Page, TaskFilter};
use planner::Policy;
use planner::observation::{ContainerInstance, Group, Observation, Task};
use planner::streak::{OPTION_KEY, TASKS_KEY};

/// Time that all reads together may take. The Lambda's time-out (60 s) leaves
/// room for the writes.
pub const OBSERVE_TIMEOUT: Duration = Duration::from_secs(12);

/// Pages of one list before something is wrong with its tokens: 10,000 entries.
const MAX_PAGES: usize = 100;

/// An essential read failed: nothing can be decided.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot observe {what}: {why}")]
pub struct ObserveError {
    /// What could not be read.
    pub what: &'static str,
    /// Why.
    pub why: String,
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
    let (queue, metrics, wanted, unwanted, instances, groups, activities) = tokio::join!(
        essential("the queue", aws.queue()),
        optional(aws.metrics(now)),
        essential("the tasks", tasks(aws, TaskFilter::Wanted)),
        essential("the stopped tasks", tasks(aws, TaskFilter::Unwanted)),
        essential("the container instances", container_instances(aws)),
        essential("the Auto Scaling groups", described_groups(aws, &names)),
        futures_util::future::join_all(
            names
                .iter()
                .map(|name| optional(aws.describe_activities(name)))
        ),
    );
    let mut missing = Vec::new();
    let mut queue = queue?;
    let mut images_per_second = None;
    let mut arrivals = None;
    match metrics {
        Ok(metrics) => {
            queue.oldest_age = metrics.oldest_age;
            images_per_second = metrics.images_per_second;
            arrivals = metrics.arrivals;
        }
        Err(why) => missing.push(format!("CloudWatch metrics ({why})")),
    }
    let mut tasks = wanted?;
    for task in unwanted? {
        // A task can move from one list to the other between the two reads.
        if !tasks.iter().any(|known| known.arn == task.arn) {
            tasks.push(task);
        }
    }
    let described = groups?;
    let pools = futures_util::future::join_all(described.iter().map(|group| async move {
        if group.has_warm_pool {
            Some(optional(aws.describe_warm_pool(&group.name)).await)
        } else {
            None
        }
    }))
    .await;

    let mut groups = Vec::new();
    for (index, name) in names.iter().enumerate() {
        // Kept in the order of the options.
        let Some(position) = described.iter().position(|group| group.name == *name) else {
            continue;
        };
        let mut group = own_view(&described[position]);
        match &activities[index] {
            Ok(activities) => group.activities = activities.clone(),
            Err(why) => missing.push(format!("scaling activities of {name} ({why})")),
        }
        match &pools[position] {
            Some(Ok(ready)) => group.warm_pool = Some(*ready),
            Some(Err(why)) => missing.push(format!("warm pool of {name} ({why})")),
            None => {}
        }
        groups.push(group);
    }
    Ok(Observation {
        at: now,
        queue,
        arrivals,
        images_per_second,
        tasks,
        container_instances: instances?,
        groups,
        missing,
    })
}

fn own_view(described: &DescribedGroup) -> Group {
    let mut tags = described.tags.clone();
    tags.retain(|key, _| key == TASKS_KEY || key == OPTION_KEY);
    Group {
        name: described.name.clone(),
        desired: described.desired,
        min: described.min,
        max: described.max,
        instances: described.instances.clone(),
        activities: Vec::new(),
        warm_pool: None,
        tags,
    }
}

async fn essential<T>(
    what: &'static str,
    read: impl Future<Output = Result<T, ApiError>>,
) -> Result<T, ObserveError> {
    optional(read)
        .await
        .map_err(|why| ObserveError { what, why })
}

async fn optional<T>(read: impl Future<Output = Result<T, ApiError>>) -> Result<T, String> {
    match tokio::time::timeout(OBSERVE_TIMEOUT, read).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("no answer within {} s", OBSERVE_TIMEOUT.as_secs())),
    }
}

/// Walks a list to its end.
async fn all_pages<T, F, R>(operation: &'static str, mut read: F) -> Result<Vec<T>, ApiError>
where
    F: FnMut(Option<String>) -> R,
    R: Future<Output = Result<Page<T>, ApiError>>,
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
    Err(ApiError {
        operation,
        code: "TooManyPages".to_owned(),
        message: format!("the list did not end within {MAX_PAGES} pages"),
        failure: platform::Failure::Transient,
    })
}

async fn tasks<A: Aws>(aws: &A, filter: TaskFilter) -> Result<Vec<Task>, ApiError> {
    let arns = all_pages("ecs:ListTasks", |page| aws.list_tasks(&filter, page)).await?;
    let described = try_join_all(
        arns.chunks(DESCRIBE_MAX)
            .map(|chunk| aws.describe_tasks(chunk)),
    )
    .await?;
    Ok(described.into_iter().flatten().collect())
}

async fn container_instances<A: Aws>(aws: &A) -> Result<Vec<ContainerInstance>, ApiError> {
    let arns = all_pages("ecs:ListContainerInstances", |page| {
        aws.list_container_instances(page)
    })
    .await?;
    let described = try_join_all(
        arns.chunks(DESCRIBE_MAX)
            .map(|chunk| aws.describe_container_instances(chunk)),
    )
    .await?;
    Ok(described.into_iter().flatten().collect())
}

async fn described_groups<A: Aws>(
    aws: &A,
    names: &[String],
) -> Result<Vec<DescribedGroup>, ApiError> {
    all_pages("autoscaling:DescribeAutoScalingGroups", |page| {
        aws.describe_groups(names, page)
    })
    .await
}

/// Tasks of ours that hold, or are about to hold, the container instance.
pub(crate) async fn tasks_on<A: Aws>(
    aws: &A,
    container_instance: &str,
) -> Result<Vec<String>, ApiError> {
    let filter = TaskFilter::WantedOn(container_instance.to_owned());
    all_pages("ecs:ListTasks", |page| aws.list_tasks(&filter, page)).await
}
