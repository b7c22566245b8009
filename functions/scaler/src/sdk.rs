//! [`Aws`] through the AWS SDK.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_sdk_autoscaling as autoscaling;
use aws_sdk_cloudwatch as cloudwatch;
use aws_sdk_cloudwatch::types::{
    Dimension, Metric, MetricDataQuery, MetricDataResult, MetricStat, ScanBy,
};
use aws_sdk_ecs as ecs;
use aws_sdk_lambda as lambda;
use aws_sdk_sqs as sqs;
use aws_smithy_types::DateTime;
use planner::observation::{
    Activity, ActivityKind, ActivityStatus, Arrivals, ContainerInstance, ContainerInstanceStatus,
    Group, GroupInstance, HIGHEST_MINUTES, LaneState, Lifecycle, Queue, Task, TaskStatus,
};
use platform::aws::{Error, failed};

use crate::aws::{Aws, LaneMetrics, LaneUsage, Metrics, Page, RunTaskAnswer, TaskFilter};
use crate::config::{Config, LaneConfig};

/// One try of a call. AWS's control planes answer within a second or not at all.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(4);

/// A call with its retries: less than [`crate::observe::OBSERVE_TIMEOUT`].
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Newest scaling activities that are read: more than a fleet starts in an hour.
const ACTIVITIES: i32 = 50;

/// Age of messages: SQS reports it each minute, up to several minutes late.
const AGE_WINDOW_SECONDS: i64 = 600;

/// Metrics come in minutes.
const PERIOD_SECONDS: i64 = 60;

/// As long as ECS shows a task that has stopped.
const STOPPED_WINDOW_SECONDS: i64 = 3_600;

/// Throughput: the best minute of the last quarter of an hour is what a busy
/// task can do.
const RATE_WINDOW_SECONDS: i64 = 900;

pub struct SdkAws {
    ecs: ecs::Client,
    autoscaling: autoscaling::Client,
    sqs: sqs::Client,
    cloudwatch: cloudwatch::Client,
    lambda: lambda::Client,
    lane: LaneConfig,
    queue_url: String,
    queue_name: String,
    cluster: String,
    task_definition: String,
    namespace: String,
}

impl SdkAws {
    /// Makes the clients once; they are shared by all runs of the process.
    pub fn new(shared: &SdkConfig, config: &Config) -> Self {
        let shared = shared
            .to_builder()
            .retry_config(RetryConfig::standard().with_max_attempts(3))
            .timeout_config(
                TimeoutConfig::builder()
                    .operation_attempt_timeout(ATTEMPT_TIMEOUT)
                    .operation_timeout(CALL_TIMEOUT)
                    .build(),
            )
            .build();
        Self {
            ecs: ecs::Client::new(&shared),
            autoscaling: autoscaling::Client::new(&shared),
            sqs: sqs::Client::new(&shared),
            cloudwatch: cloudwatch::Client::new(&shared),
            lambda: lambda::Client::new(&shared),
            lane: config.lane.clone().unwrap_or_default(),
            queue_url: config.input_queue_url.clone(),
            queue_name: config.queue_name().to_owned(),
            cluster: config.cluster.clone(),
            task_definition: config.task_definition.clone(),
            namespace: config.metrics_namespace.clone(),
        }
    }
}

/// Namespaces of SQS's and Lambda's own metrics.
const SQS: &str = "AWS/SQS";
const LAMBDA: &str = "AWS/Lambda";

const HOUR_SECONDS: i64 = 3_600;

/// A lane that works finishes something in this time: two minutes may be late.
const LATELY_SECONDS: i64 = 180;

/// Images of an invocation from which on it says what one of a backlog costs.
const LEAST_IMAGES_AN_INVOCATION: f64 = 5.0;

impl SdkAws {
    /// A metric of the queue, by the minute.
    fn query(&self, id: &str, namespace: &str, name: &str, stat: &str) -> MetricDataQuery {
        let queue = [("QueueName", self.queue_name.as_str())];
        Self::query_of(id, namespace, name, stat, &queue, PERIOD_SECONDS)
    }

    fn query_of(
        id: &str,
        namespace: &str,
        name: &str,
        stat: &str,
        dimensions: &[(&str, &str)],
        period: i64,
    ) -> MetricDataQuery {
        let dimensions = dimensions
            .iter()
            .map(|(name, value)| Dimension::builder().name(*name).value(*value).build());
        let metric = Metric::builder()
            .namespace(namespace)
            .metric_name(name)
            .set_dimensions(Some(dimensions.collect()))
            .build();
        let stat = MetricStat::builder()
            .metric(metric)
            .period(period as i32)
            .stat(stat)
            .build();
        MetricDataQuery::builder().id(id).metric_stat(stat).build()
    }

    async fn counts(&self, url: &str) -> Result<Queue, Error> {
        use sqs::types::QueueAttributeName as Name;
        let answer = self
            .sqs
            .get_queue_attributes()
            .queue_url(url)
            .attribute_names(Name::ApproximateNumberOfMessages)
            .attribute_names(Name::ApproximateNumberOfMessagesNotVisible)
            .attribute_names(Name::ApproximateNumberOfMessagesDelayed)
            .send()
            .await
            .map_err(failed("sqs:GetQueueAttributes"))?;
        let number = |name: Name| {
            answer
                .attributes()
                .and_then(|attributes| attributes.get(&name))
                .and_then(|value| value.parse::<u64>().ok())
        };
        let Some(visible) = number(Name::ApproximateNumberOfMessages) else {
            return Err(Error::of_code(
                "sqs:GetQueueAttributes",
                "NoCount",
                "the answer has no ApproximateNumberOfMessages",
            ));
        };
        Ok(Queue {
            visible,
            in_flight: number(Name::ApproximateNumberOfMessagesNotVisible).unwrap_or(0),
            delayed: number(Name::ApproximateNumberOfMessagesDelayed).unwrap_or(0),
            oldest_age: None,
        })
    }

    /// Full minutes only: half a minute's sum is no rate.
    async fn full_minutes(
        &self,
        queries: Vec<MetricDataQuery>,
        until: i64,
        seconds: i64,
    ) -> Result<Vec<MetricDataResult>, Error> {
        let answer = self
            .cloudwatch
            .get_metric_data()
            .set_metric_data_queries(Some(queries))
            .start_time(DateTime::from_secs(until - seconds))
            .end_time(DateTime::from_secs(until))
            .scan_by(ScanBy::TimestampDescending)
            .send()
            .await
            .map_err(failed("cloudwatch:GetMetricData"))?;
        Ok(answer.metric_data_results.unwrap_or_default())
    }
}

fn seconds(time: Option<&DateTime>) -> Option<i64> {
    time.map(DateTime::secs)
}

fn count(number: Option<i32>) -> u32 {
    number.unwrap_or(0).max(0) as u32
}

fn gpus(resources: &[ecs::types::Resource]) -> u32 {
    resources
        .iter()
        .filter(|resource| resource.name() == Some("GPU"))
        .map(|resource| resource.string_set_value().len() as u32)
        .sum()
}

/// ECS's words for what a call did not do.
fn partial(operation: &'static str, failures: &[ecs::types::Failure]) -> Vec<Error> {
    failures
        .iter()
        .map(|failure| {
            let detail = failure.detail().unwrap_or("no detail given");
            let reason = failure.reason().unwrap_or(detail);
            let error = Error::of_code(operation, reason, detail);
            match failure.arn() {
                Some(arn) => error.of(arn),
                None => error,
            }
        })
        .collect()
}

/// `None` for a task of a service, such as a monitoring daemon: it is not ours
/// to count, and RunTask's tasks have a `family:…` group, whatever the family.
fn task(task: &ecs::types::Task) -> Option<Task> {
    if task
        .group()
        .is_some_and(|group| group.starts_with("service:"))
    {
        return None;
    }
    let status = TaskStatus::from_ecs(task.last_status()?);
    let container = task
        .containers()
        .iter()
        // The failing container is the one to quote; a sidecar's 0 says nothing.
        .max_by_key(|container| container.exit_code().map_or(-1, i32::abs));
    let mut stop_reason = task.stopped_reason().map(str::to_owned);
    if let Some(reason) = container.and_then(ecs::types::Container::reason) {
        stop_reason = Some(match stop_reason {
            Some(stopped) => format!("{stopped}: {reason}"),
            None => reason.to_owned(),
        });
    }
    Some(Task {
        arn: task.task_arn()?.to_owned(),
        status,
        stopping: task.desired_status() == Some("STOPPED"),
        container_instance: task.container_instance_arn().map(str::to_owned),
        created_at: seconds(task.created_at()),
        started_at: seconds(task.started_at()),
        stopped_at: seconds(task.execution_stopped_at())
            .or_else(|| seconds(task.stopped_at()))
            .filter(|_| status == TaskStatus::Stopped),
        stop_code: task.stop_code().map(|code| code.as_str().to_owned()),
        stop_reason,
        exit_code: container.and_then(ecs::types::Container::exit_code),
    })
}

/// Values of the last full minutes, newest first; a minute that CloudWatch has
/// nothing of counts as zero.
fn minutes_back(result: &MetricDataResult, this_minute: i64) -> Vec<f64> {
    let mut minutes = vec![0.0; HIGHEST_MINUTES];
    for (at, value) in result.timestamps().iter().zip(result.values()) {
        let back = (this_minute - at.secs()).div_euclid(PERIOD_SECONDS) - 1;
        if let Some(minute) = usize::try_from(back)
            .ok()
            .and_then(|back| minutes.get_mut(back))
        {
            *minute = *value;
        }
    }
    minutes
}

#[async_trait]
impl Aws for SdkAws {
    async fn queue(&self) -> Result<Queue, Error> {
        self.counts(&self.queue_url).await
    }

    async fn gpu_queue(&self) -> Result<Queue, Error> {
        self.counts(&self.lane.gpu_queue_url).await
    }

    async fn lane_state(&self) -> Result<LaneState, Error> {
        let mapping = self
            .lambda
            .get_event_source_mapping()
            .uuid(&self.lane.mapping);
        let concurrency = self
            .lambda
            .get_function_concurrency()
            .function_name(&self.lane.function);
        let (mapping, concurrency) = tokio::join!(mapping.send(), concurrency.send());
        let mapping = mapping.map_err(failed("lambda:GetEventSourceMapping"))?;
        let state = LaneState::from_lambda(mapping.state().unwrap_or_default());
        let concurrency = concurrency.map_err(failed("lambda:GetFunctionConcurrency"))?;
        match concurrency.reserved_concurrent_executions() {
            Some(0) if state.is_open() => Ok(LaneState::Throttled),
            _ => Ok(state),
        }
    }

    async fn lane_metrics(&self, now: i64) -> Result<LaneMetrics, Error> {
        let this_minute = now - now.rem_euclid(PERIOD_SECONDS);
        let lane = [("QueueName", self.queue_name.as_str()), ("Lane", "express")];
        let query =
            |id, name, stat| Self::query_of(id, &self.namespace, name, stat, &lane, PERIOD_SECONDS);
        let queries = vec![
            query("seconds", "SecondsPerImage", "Average"),
            query("images", "Images", "Sum"),
            query("invocations", "Images", "SampleCount"),
        ];
        let results = self
            .full_minutes(queries, this_minute, RATE_WINDOW_SECONDS)
            .await?;
        let minutes = |id: &str| -> BTreeMap<i64, f64> {
            let results = results.iter().filter(|result| result.id() == Some(id));
            let points = results.flat_map(|result| result.timestamps().iter().zip(result.values()));
            points.map(|(at, value)| (at.secs(), *value)).collect()
        };
        let (images, invocations) = (minutes("images"), minutes("invocations"));
        // A minute of single images does not say what one of a backlog costs.
        let is_full = |minute: &i64| {
            let images = images.get(minute).copied().unwrap_or(0.0);
            let invocations = invocations.get(minute).copied().unwrap_or(0.0);
            images >= LEAST_IMAGES_AN_INVOCATION * invocations
        };
        let seconds = minutes("seconds").into_iter();
        let full = seconds.filter(|(minute, seconds)| is_full(minute) && *seconds > 0.0);
        let lately = images.range(this_minute - LATELY_SECONDS..);
        Ok(LaneMetrics {
            seconds_per_image: full.map(|(_, seconds)| seconds).reduce(f64::min),
            images_lately: Some(lately.map(|(_, images)| *images as u64).sum()),
        })
    }

    async fn lane_usage(&self, now: i64) -> Result<LaneUsage, Error> {
        let function = [("FunctionName", self.lane.function.as_str())];
        let query = |id, name| Self::query_of(id, LAMBDA, name, "Sum", &function, HOUR_SECONDS);
        let queries = vec![
            query("duration", "Duration"),
            query("invocations", "Invocations"),
        ];
        let midnight = now - now.rem_euclid(24 * HOUR_SECONDS);
        let results = self.full_minutes(queries, now, now - midnight).await?;
        let sum = |id: &str| -> f64 {
            let results = results.iter().filter(|result| result.id() == Some(id));
            results.flat_map(MetricDataResult::values).sum()
        };
        Ok(LaneUsage {
            seconds: sum("duration") / 1e3,
            requests: sum("invocations"),
        })
    }

    async fn set_lane(&self, open: bool) -> Result<(), Error> {
        self.lambda
            .update_event_source_mapping()
            .uuid(&self.lane.mapping)
            .enabled(open)
            .send()
            .await
            .map_err(failed("lambda:UpdateEventSourceMapping"))?;
        Ok(())
    }

    async fn metrics(&self, now: i64) -> Result<Metrics, Error> {
        let this_minute = now - now.rem_euclid(PERIOD_SECONDS);
        let queries = vec![
            self.query("age", SQS, "ApproximateAgeOfOldestMessage", "Maximum"),
            self.query("sent", SQS, "NumberOfMessagesSent", "Sum"),
            self.query("rate", &self.namespace, "ImagesPerSecond", "Maximum"),
            // The fastest of late: a task that found no work waited for it.
            self.query("first", &self.namespace, "StartToFirstVector", "Minimum"),
        ];
        let results = self
            .full_minutes(queries, this_minute, RATE_WINDOW_SECONDS)
            .await?;
        let mut metrics = Metrics::default();
        for result in &results {
            match result.id() {
                Some("age") => {
                    let newest = result.values().first().copied();
                    let is_recent = result
                        .timestamps()
                        .first()
                        .is_some_and(|at| now - at.secs() <= AGE_WINDOW_SECONDS);
                    metrics.oldest_age = newest
                        .filter(|age| is_recent && age.is_finite() && *age >= 0.0)
                        .map(|age| age as u64);
                }
                Some("sent") if !result.values().is_empty() => {
                    let minutes = minutes_back(result, this_minute);
                    metrics.arrivals = Some(Arrivals::from_minutes(&minutes));
                }
                Some("rate") => {
                    metrics.images_per_second = result
                        .values()
                        .iter()
                        .copied()
                        .filter(|rate| rate.is_finite() && *rate > 0.0)
                        .reduce(f64::max);
                }
                Some("first") => {
                    let milliseconds = result.values().iter().copied().reduce(f64::min);
                    metrics.first_vector_seconds = milliseconds.map(|value| value / 1e3);
                }
                _ => {}
            }
        }
        Ok(metrics)
    }

    async fn working_minutes(&self, now: i64) -> Result<Vec<i64>, Error> {
        let this_minute = now - now.rem_euclid(PERIOD_SECONDS);
        let deleted = self.query("deleted", SQS, "NumberOfMessagesDeleted", "Sum");
        let results = self
            .full_minutes(vec![deleted], this_minute, STOPPED_WINDOW_SECONDS)
            .await?;
        let points = results
            .iter()
            .flat_map(|result| result.timestamps().iter().zip(result.values()));
        Ok(points
            .filter(|(_, count)| **count > 0.0)
            .map(|(at, _)| at.secs())
            .collect())
    }

    async fn list_tasks(
        &self,
        filter: &TaskFilter,
        page: Option<String>,
    ) -> Result<Page<String>, Error> {
        use ecs::types::DesiredStatus;
        let mut request = self
            .ecs
            .list_tasks()
            .cluster(&self.cluster)
            .max_results(100)
            .set_next_token(page);
        request = match filter {
            TaskFilter::Wanted => request.desired_status(DesiredStatus::Running),
            TaskFilter::Unwanted => request.desired_status(DesiredStatus::Stopped),
            TaskFilter::WantedOn(arn) => request
                .container_instance(arn)
                .desired_status(DesiredStatus::Running),
        };
        let answer = request.send().await.map_err(failed("ecs:ListTasks"))?;
        Ok(Page {
            items: answer.task_arns().to_vec(),
            next: answer.next_token().map(str::to_owned),
        })
    }

    async fn describe_tasks(&self, arns: &[String]) -> Result<Vec<Task>, Error> {
        let answer = self
            .ecs
            .describe_tasks()
            .cluster(&self.cluster)
            .set_tasks(Some(arns.to_vec()))
            .send()
            .await
            .map_err(failed("ecs:DescribeTasks"))?;
        Ok(answer.tasks().iter().filter_map(task).collect())
    }

    async fn list_container_instances(&self, page: Option<String>) -> Result<Page<String>, Error> {
        let answer = self
            .ecs
            .list_container_instances()
            .cluster(&self.cluster)
            .max_results(100)
            .set_next_token(page)
            .send()
            .await
            .map_err(failed("ecs:ListContainerInstances"))?;
        Ok(Page {
            items: answer.container_instance_arns().to_vec(),
            next: answer.next_token().map(str::to_owned),
        })
    }

    async fn describe_container_instances(
        &self,
        arns: &[String],
    ) -> Result<Vec<ContainerInstance>, Error> {
        let answer = self
            .ecs
            .describe_container_instances()
            .cluster(&self.cluster)
            .set_container_instances(Some(arns.to_vec()))
            .send()
            .await
            .map_err(failed("ecs:DescribeContainerInstances"))?;
        let described = answer
            .container_instances()
            .iter()
            .filter_map(|instance| {
                Some(ContainerInstance {
                    arn: instance.container_instance_arn()?.to_owned(),
                    instance_id: instance.ec2_instance_id()?.to_owned(),
                    status: ContainerInstanceStatus::from_ecs(instance.status()?),
                    agent_connected: instance.agent_connected(),
                    registered_at: seconds(instance.registered_at()),
                    version: instance.version(),
                    gpus: gpus(instance.registered_resources()),
                    free_gpus: gpus(instance.remaining_resources()),
                })
            })
            .collect();
        Ok(described)
    }

    async fn describe_groups(
        &self,
        names: &[String],
        page: Option<String>,
    ) -> Result<Page<Group>, Error> {
        let answer = self
            .autoscaling
            .describe_auto_scaling_groups()
            .set_auto_scaling_group_names(Some(names.to_vec()))
            .set_next_token(page)
            .send()
            .await
            .map_err(failed("autoscaling:DescribeAutoScalingGroups"))?;
        let items = answer
            .auto_scaling_groups()
            .iter()
            .map(|group| Group {
                name: group
                    .auto_scaling_group_name()
                    .unwrap_or_default()
                    .to_owned(),
                desired: count(group.desired_capacity()),
                min: count(group.min_size()),
                max: count(group.max_size()),
                instances: group
                    .instances()
                    .iter()
                    .filter_map(|instance| {
                        Some(GroupInstance {
                            id: instance.instance_id()?.to_owned(),
                            state: Lifecycle::from_auto_scaling(
                                instance.lifecycle_state()?.as_str(),
                            ),
                            healthy: instance.health_status() != Some("Unhealthy"),
                            zone: instance.availability_zone().unwrap_or_default().to_owned(),
                            instance_type: instance.instance_type().unwrap_or_default().to_owned(),
                        })
                    })
                    .collect(),
                tags: group
                    .tags()
                    .iter()
                    .filter_map(|tag| Some((tag.key()?.to_owned(), tag.value()?.to_owned())))
                    .collect(),
                activities: Vec::new(),
                warm_pool: group.warm_pool_configuration().map(|_| 0),
            })
            .collect();
        Ok(Page {
            items,
            next: answer.next_token().map(str::to_owned),
        })
    }

    async fn describe_activities(&self, group: &str) -> Result<Vec<Activity>, Error> {
        let answer = self
            .autoscaling
            .describe_scaling_activities()
            .auto_scaling_group_name(group)
            .max_records(ACTIVITIES)
            .send()
            .await
            .map_err(failed("autoscaling:DescribeScalingActivities"))?;
        let activities = answer
            .activities()
            .iter()
            .map(|activity| {
                let description = activity.description().unwrap_or_default();
                Activity {
                    kind: ActivityKind::from_description(description),
                    instance: Activity::instance_in(description),
                    started_at: seconds(activity.start_time()).unwrap_or(0),
                    ended_at: seconds(activity.end_time()),
                    status: activity
                        .status_code()
                        .map_or(ActivityStatus::InProgress, |code| {
                            ActivityStatus::from_auto_scaling(code.as_str())
                        }),
                    message: activity.status_message().map(str::to_owned),
                }
            })
            .collect();
        Ok(activities)
    }

    async fn describe_warm_pool(&self, group: &str) -> Result<u32, Error> {
        let answer = self
            .autoscaling
            .describe_warm_pool()
            .auto_scaling_group_name(group)
            .send()
            .await
            .map_err(failed("autoscaling:DescribeWarmPool"))?;
        let ready = answer
            .instances()
            .iter()
            .filter_map(autoscaling::types::Instance::lifecycle_state)
            .filter(|state| {
                matches!(
                    state.as_str(),
                    "Warmed:Stopped" | "Warmed:Hibernated" | "Warmed:Running"
                )
            })
            .count();
        Ok(ready as u32)
    }

    async fn run_task(&self, count: u32, token: &str) -> Result<RunTaskAnswer, Error> {
        let answer = self
            .ecs
            .run_task()
            .cluster(&self.cluster)
            .task_definition(&self.task_definition)
            .launch_type(ecs::types::LaunchType::Ec2)
            .count(count as i32)
            .client_token(token)
            .started_by("scaler")
            .send()
            .await
            .map_err(failed("ecs:RunTask"))?;
        Ok(RunTaskAnswer {
            started: answer
                .tasks()
                .iter()
                .filter_map(|task| task.task_arn().map(str::to_owned))
                .collect(),
            failures: partial("ecs:RunTask", answer.failures()),
        })
    }

    async fn stop_task(&self, task: &str, reason: &str) -> Result<(), Error> {
        self.ecs
            .stop_task()
            .cluster(&self.cluster)
            .task(task)
            .reason(reason)
            .send()
            .await
            .map_err(failed("ecs:StopTask"))?;
        Ok(())
    }

    async fn set_draining(&self, arns: &[String], draining: bool) -> Result<Vec<Error>, Error> {
        use ecs::types::ContainerInstanceStatus as Status;
        let status = if draining {
            Status::Draining
        } else {
            Status::Active
        };
        let answer = self
            .ecs
            .update_container_instances_state()
            .cluster(&self.cluster)
            .set_container_instances(Some(arns.to_vec()))
            .status(status)
            .send()
            .await
            .map_err(failed("ecs:UpdateContainerInstancesState"))?;
        Ok(partial(
            "ecs:UpdateContainerInstancesState",
            answer.failures(),
        ))
    }

    async fn set_desired_capacity(&self, group: &str, desired: u32) -> Result<(), Error> {
        self.autoscaling
            .set_desired_capacity()
            .auto_scaling_group_name(group)
            .desired_capacity(desired as i32)
            .honor_cooldown(false)
            .send()
            .await
            .map_err(failed("autoscaling:SetDesiredCapacity"))?;
        Ok(())
    }

    async fn terminate_instance(&self, id: &str, decrement: bool) -> Result<(), Error> {
        self.autoscaling
            .terminate_instance_in_auto_scaling_group()
            .instance_id(id)
            .should_decrement_desired_capacity(decrement)
            .send()
            .await
            .map_err(failed("autoscaling:TerminateInstanceInAutoScalingGroup"))?;
        Ok(())
    }

    async fn tag_group(&self, group: &str, key: &str, value: &str) -> Result<(), Error> {
        let tag = autoscaling::types::Tag::builder()
            .resource_id(group)
            .resource_type("auto-scaling-group")
            .key(key)
            .value(value)
            .propagate_at_launch(false)
            .build();
        self.autoscaling
            .create_or_update_tags()
            .tags(tag)
            .send()
            .await
            .map_err(failed("autoscaling:CreateOrUpdateTags"))?;
        Ok(())
    }
}
