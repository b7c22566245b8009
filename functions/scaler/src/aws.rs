//! The AWS calls that the scaler makes, as one trait: the SDK is one
//! implementation, fakes that enforce AWS's limits are the others.

use async_trait::async_trait;
use platform::aws::Error;

use planner::observation::{Activity, Arrivals, ContainerInstance, Group, LaneState, Queue, Task};

/// Most ARNs of one Describe call and most entries of one List page (ECS API
/// reference, DescribeTasks, ListTasks and their container instance twins).
pub const DESCRIBE_MAX: usize = 100;

/// Most container instances of one UpdateContainerInstancesState call (ECS API
/// reference).
pub const UPDATE_STATE_MAX: usize = 10;

#[derive(Clone, Debug)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// Where the next page begins; `None` at the end.
    pub next: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TaskFilter {
    /// Tasks that should run, from PROVISIONING to RUNNING.
    Wanted,
    /// Tasks that should stop or have stopped.
    Unwanted,
    /// Tasks that should run on one container instance.
    WantedOn(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Metrics {
    /// Age of the oldest message, in seconds.
    pub oldest_age: Option<u64>,
    pub images_per_second: Option<f64>,
    pub arrivals: Option<Arrivals>,
    pub first_vector_seconds: Option<f64>,
}

/// What the express lane's function reported.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LaneMetrics {
    /// Billed seconds of one image, where invocations had several.
    pub seconds_per_image: Option<f64>,
    /// Images of the last full minutes.
    pub images_lately: Option<u64>,
}

/// What the express lane's function used since midnight UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LaneUsage {
    pub seconds: f64,
    pub requests: f64,
}

#[derive(Clone, Debug, Default)]
pub struct RunTaskAnswer {
    /// Tasks that now exist.
    pub started: Vec<String>,
    /// Tasks that do not.
    pub failures: Vec<Error>,
}

/// The calls. Each is one request; paging and batching are the callers'.
#[async_trait]
pub trait Aws: Send + Sync {
    /// SQS GetQueueAttributes: the three counts.
    async fn queue(&self) -> Result<Queue, Error>;
    /// SQS GetQueueAttributes: the counts of the queue of what only GPUs can do.
    async fn gpu_queue(&self) -> Result<Queue, Error>;
    /// Lambda GetEventSourceMapping.
    async fn lane_state(&self) -> Result<LaneState, Error>;
    /// CloudWatch GetMetricData.
    async fn lane_metrics(&self, now: i64) -> Result<LaneMetrics, Error>;
    /// CloudWatch GetMetricData, by the hour.
    async fn lane_usage(&self, now: i64) -> Result<LaneUsage, Error>;
    /// Lambda UpdateEventSourceMapping: asynchronous, up to a minute.
    async fn set_lane(&self, open: bool) -> Result<(), Error>;
    async fn metrics(&self, now: i64) -> Result<Metrics, Error>;
    /// CloudWatch GetMetricData: full minutes of the last hour in which messages
    /// of the queue were deleted.
    async fn working_minutes(&self, now: i64) -> Result<Vec<i64>, Error>;
    async fn list_tasks(
        &self,
        filter: &TaskFilter,
        page: Option<String>,
    ) -> Result<Page<String>, Error>;
    /// ECS DescribeTasks, at most [`DESCRIBE_MAX`] ARNs.
    async fn describe_tasks(&self, arns: &[String]) -> Result<Vec<Task>, Error>;
    async fn list_container_instances(&self, page: Option<String>) -> Result<Page<String>, Error>;
    /// ECS DescribeContainerInstances, at most [`DESCRIBE_MAX`] ARNs.
    async fn describe_container_instances(
        &self,
        arns: &[String],
    ) -> Result<Vec<ContainerInstance>, Error>;
    /// Auto Scaling DescribeAutoScalingGroups. A warm pool is there or not, and
    /// counts as empty until it is described.
    async fn describe_groups(
        &self,
        names: &[String],
        page: Option<String>,
    ) -> Result<Page<Group>, Error>;
    /// Auto Scaling DescribeScalingActivities: the newest page.
    async fn describe_activities(&self, group: &str) -> Result<Vec<Activity>, Error>;
    /// Auto Scaling DescribeWarmPool: instances that stand ready in it.
    async fn describe_warm_pool(&self, group: &str) -> Result<u32, Error>;
    async fn run_task(&self, count: u32, token: &str) -> Result<RunTaskAnswer, Error>;
    async fn stop_task(&self, task: &str, reason: &str) -> Result<(), Error>;
    /// ECS UpdateContainerInstancesState, at most [`UPDATE_STATE_MAX`] ARNs.
    /// Answers those that were refused, each with its ARN as resource.
    async fn set_draining(&self, arns: &[String], draining: bool) -> Result<Vec<Error>, Error>;
    async fn set_desired_capacity(&self, group: &str, desired: u32) -> Result<(), Error>;
    /// Auto Scaling TerminateInstanceInAutoScalingGroup.
    async fn terminate_instance(&self, id: &str, decrement: bool) -> Result<(), Error>;
    /// Auto Scaling CreateOrUpdateTags.
    async fn tag_group(&self, group: &str, key: &str, value: &str) -> Result<(), Error>;
}
