//! Auto Scaling groups and their instances.
//!
//! A group is always brought towards its desired capacity by [`reconcile`]:
//! launches while there are too few live instances, terminations of the oldest
//! unprotected ones while there are too many. A launch that EC2 has no capacity
//! for becomes a Failed activity and is tried again later, as on AWS; the
//! desired capacity stays.

use chrono::{DateTime, Utc};
use serde_json::json;
use uuid::Uuid;

use super::{
    AwsEvent, Cloud, GroupConfig, InstanceType, Lifecycle,
    state::{
        Activity, ActivityStatus, CloudState, ContainerInstanceStatus, Group, Instance,
        Registration, Resources,
    },
    tasks,
};

pub(crate) fn create(cloud: &Cloud, config: GroupConfig) {
    let name = config.name.clone();
    let arn = cloud.arn(
        "autoscaling",
        &format!(
            "autoScalingGroup:{}:autoScalingGroupName/{name}",
            Uuid::new_v4()
        ),
    );
    let group = Group {
        arn,
        created_at: Utc::now(),
        tags: std::collections::BTreeMap::new(),
        activities: Vec::new(),
        capacity: None,
        never_register: 0,
        retry_scheduled: false,
        config,
    };
    cloud.lock().groups.insert(name.clone(), group);
    reconcile(cloud, &name);
}

/// What a pass over a group decided; carried out after the lock is released.
enum Step {
    Launched { instance: String },
    Retry,
    Terminating { instance: String },
    Publish(AwsEvent),
}

/// Brings a group towards its desired capacity.
pub(crate) fn reconcile(cloud: &Cloud, name: &str) {
    let mut steps = Vec::new();
    {
        let mut state = cloud.lock();
        let Some(group) = state.groups.get(name) else {
            return;
        };
        let desired = group.config.desired;
        let live = live_instances(&state, name);
        if live.len() < desired {
            for _ in live.len()..desired {
                let step = launch(cloud, &mut state, name);
                let failed = !matches!(step, Step::Launched { .. });
                steps.push(step);
                if failed {
                    if let Some(group) = state.groups.get_mut(name)
                        && !group.retry_scheduled
                    {
                        group.retry_scheduled = true;
                        steps.push(Step::Retry);
                    }
                    break;
                }
            }
        } else if live.len() > desired {
            let surplus = live.len() - desired;
            let newest_first = group.config.newest_first;
            // Protection begins when an instance is InService: one that still
            // boots can be withdrawn.
            let is_protected = |id: &String| {
                let instance = &state.instances[id];
                instance.protected && instance.lifecycle == Lifecycle::InService
            };
            let mut candidates: Vec<String> =
                live.into_iter().filter(|id| !is_protected(id)).collect();
            if newest_first {
                candidates.reverse();
            }
            candidates.truncate(surplus);
            for id in candidates {
                let cause = format!(
                    "At {} an instance was taken out of service in response to a difference between desired and actual capacity, shrinking the capacity from {} to {}.",
                    iso(),
                    desired + surplus,
                    desired
                );
                start_termination(&mut state, &id, cause);
                steps.push(Step::Terminating { instance: id });
            }
        }
        state.note_peaks();
    }
    carry_out(cloud, name, steps);
}

fn carry_out(cloud: &Cloud, name: &str, steps: Vec<Step>) {
    for step in steps {
        match step {
            Step::Launched { instance } => {
                cloud.later(cloud.timings().instance_launch, move |cloud| {
                    enter_service(cloud, &instance)
                });
            }
            Step::Retry => {
                let name = name.to_owned();
                cloud.later(cloud.timings().capacity_retry, move |cloud| {
                    if let Some(group) = cloud.lock().groups.get_mut(&name) {
                        group.retry_scheduled = false;
                    }
                    reconcile(cloud, &name);
                });
            }
            Step::Terminating { instance } => finish_termination_later(cloud, instance),
            Step::Publish(event) => cloud.publish(event),
        }
    }
}

fn live_instances(state: &CloudState, group: &str) -> Vec<String> {
    let instances = state.instances_of(group);
    let live = instances.filter(|instance| instance.lifecycle.is_live());
    live.map(|instance| instance.id.clone()).collect()
}

fn launch(cloud: &Cloud, state: &mut CloudState, name: &str) -> Step {
    let number = state.number();
    // Instances on their way out still occupy EC2's capacity.
    let occupied = state
        .instances_of(name)
        .filter(|instance| instance.lifecycle != Lifecycle::Terminated)
        .count();
    let live = live_instances(state, name).len();
    let Some(group) = state.groups.get_mut(name) else {
        return Step::Retry;
    };
    let zones = &group.config.zones;
    let zone_index = usize::try_from(number).unwrap_or_default() % zones.len().max(1);
    let zone = zones
        .get(zone_index)
        .cloned()
        .unwrap_or_else(|| format!("{}a", cloud.region()));
    let cause = format!(
        "At {} an instance was started in response to a difference between desired and actual capacity, increasing the capacity from {live} to {}.",
        iso(),
        group.config.desired
    );
    let now = Utc::now();
    let mut activity = Activity::begun(name, &zone, cause);

    if group.capacity.is_some_and(|capacity| occupied >= capacity) {
        let message = no_capacity(&group.config, &zone);
        activity.description = format!("Launching a new EC2 instance.  Status Reason: {message}");
        activity.status = ActivityStatus::Failed;
        activity.end = Some(now);
        activity.message = Some(message);
        let event = activity_event(cloud, group, &activity, "EC2 Instance Launch Unsuccessful");
        group.activities.push(activity);
        return Step::Publish(event);
    }

    let id = format!("i-{number:017x}");
    activity.instance_id = Some(id.clone());
    activity.description = format!("Launching a new EC2 instance: {id}");
    group.activities.push(activity);
    let registers = group.never_register == 0;
    group.never_register = group.never_register.saturating_sub(1);
    let kind = InstanceType::named(&group.config.instance_type);
    let instance = Instance {
        id: id.clone(),
        group: name.to_owned(),
        cluster: group.config.cluster.clone(),
        instance_type: group.config.instance_type.clone(),
        zone,
        lifecycle: Lifecycle::Pending,
        protected: group.config.protect_new_instances,
        launched_at: now,
        in_service_at: None,
        resources: Resources {
            cpu: kind.cpu_units(),
            memory_mib: kind.registered_memory_mib(),
            gpus: (0..kind.gpus)
                .map(|index| format!("GPU-{number:08x}-{index:04x}"))
                .collect(),
        },
        registration: None,
        registers,
    };
    state.instances.insert(id.clone(), instance);
    Step::Launched { instance: id }
}

/// The status message of a launch without capacity, in Auto Scaling's words.
fn no_capacity(config: &GroupConfig, zone: &str) -> String {
    if config.spot {
        return "Could not launch Spot Instances. UnfulfillableCapacity - Unable to fulfill capacity due to your request configuration. Please adjust your request and try again. Launching EC2 instance failed.".to_owned();
    }
    let others: Vec<&str> = config
        .zones
        .iter()
        .map(String::as_str)
        .filter(|other| *other != zone)
        .collect();
    let hint = if others.is_empty() {
        String::new()
    } else {
        format!(" or choosing {}", others.join(", "))
    };
    format!(
        "We currently do not have sufficient {} capacity in the Availability Zone you requested ({zone}). Our system will be working on provisioning additional capacity. You can currently get {} capacity by not specifying an Availability Zone in your request{hint}. Launching EC2 instance failed.",
        config.instance_type, config.instance_type
    )
}

fn enter_service(cloud: &Cloud, instance_id: &str) {
    let event = {
        let mut state = cloud.lock();
        let Some(instance) = state.instances.get_mut(instance_id) else {
            return;
        };
        if instance.lifecycle != Lifecycle::Pending {
            return;
        }
        instance.lifecycle = Lifecycle::InService;
        instance.in_service_at = Some(Utc::now());
        let group_name = instance.group.clone();
        let Some(group) = state.groups.get_mut(&group_name) else {
            return;
        };
        finish_activity(group, instance_id);
        last_activity_of(group, instance_id)
            .cloned()
            .map(|activity| {
                activity_event(cloud, group, &activity, "EC2 Instance Launch Successful")
            })
    };
    if let Some(event) = event {
        cloud.publish(event);
    }
    let id = instance_id.to_owned();
    cloud.later(cloud.timings().instance_register, move |cloud| {
        register(cloud, &id)
    });
}

fn register(cloud: &Cloud, instance_id: &str) {
    {
        let mut state = cloud.lock();
        let Some(instance) = state.instances.get_mut(instance_id) else {
            return;
        };
        if instance.lifecycle != Lifecycle::InService || !instance.registers {
            return;
        }
        let resource = format!(
            "container-instance/{}/{}",
            instance.cluster,
            Uuid::new_v4().simple()
        );
        instance.registration = Some(Registration {
            arn: cloud.arn("ecs", &resource),
            status: ContainerInstanceStatus::Active,
            status_reason: None,
            agent_connected: true,
            registered_at: Utc::now(),
            version: 0,
        });
    }
    cloud.publish_container_instance(instance_id);
}

fn start_termination(state: &mut CloudState, instance_id: &str, cause: String) {
    let Some(instance) = state.instances.get_mut(instance_id) else {
        return;
    };
    instance.lifecycle = Lifecycle::Terminating;
    let (group_name, zone) = (instance.group.clone(), instance.zone.clone());
    let Some(group) = state.groups.get_mut(&group_name) else {
        return;
    };
    // A launch that never finished ends with the instance.
    finish_activity(group, instance_id);
    group.activities.push(Activity {
        instance_id: Some(instance_id.to_owned()),
        description: format!("Terminating EC2 instance: {instance_id}"),
        ..Activity::begun(&group_name, &zone, cause)
    });
}

fn finish_termination_later(cloud: &Cloud, instance_id: String) {
    cloud.later(cloud.timings().instance_terminate, move |cloud| {
        finish_termination(cloud, &instance_id)
    });
}

fn finish_termination(cloud: &Cloud, instance_id: &str) {
    let (event, group_name) = {
        let mut state = cloud.lock();
        let Some(instance) = state.instances.get_mut(instance_id) else {
            return;
        };
        if instance.lifecycle == Lifecycle::Terminated {
            return;
        }
        instance.lifecycle = Lifecycle::Terminated;
        if let Some(registration) = &mut instance.registration {
            registration.agent_connected = false;
            registration.status = ContainerInstanceStatus::Inactive;
        }
        let group_name = instance.group.clone();
        let event = state.groups.get_mut(&group_name).and_then(|group| {
            finish_activity(group, instance_id);
            let activity = last_activity_of(group, instance_id)?.clone();
            Some(activity_event(
                cloud,
                group,
                &activity,
                "EC2 Instance Terminate Successful",
            ))
        });
        (event, group_name)
    };
    tasks::lose_tasks_of(cloud, instance_id);
    cloud.publish_container_instance(instance_id);
    if let Some(event) = event {
        cloud.publish(event);
    }
    reconcile(cloud, &group_name);
}

pub(crate) fn lose(cloud: &Cloud, instance_id: &str) -> bool {
    {
        let mut state = cloud.lock();
        let Some(instance) = state.instances.get(instance_id) else {
            return false;
        };
        if instance.lifecycle == Lifecycle::Terminated {
            return false;
        }
        let cause = format!(
            "At {} an instance was taken out of service in response to an EC2 health check indicating it has been terminated or stopped.",
            iso()
        );
        start_termination(&mut state, instance_id, cause);
    }
    finish_termination(cloud, instance_id);
    true
}

/// Why TerminateInstanceInAutoScalingGroup was refused.
pub(crate) enum TerminateRefusal {
    NotFound,
    BelowMinimum(usize),
}

/// TerminateInstanceInAutoScalingGroup: answers the activity it started.
pub(crate) fn terminate(
    cloud: &Cloud,
    instance_id: &str,
    decrement: bool,
) -> Result<Activity, TerminateRefusal> {
    let (activity, group_name) = {
        let mut state = cloud.lock();
        let Some(instance) = state.instances.get(instance_id) else {
            return Err(TerminateRefusal::NotFound);
        };
        if instance.lifecycle == Lifecycle::Terminated {
            return Err(TerminateRefusal::NotFound);
        }
        let already = instance.lifecycle == Lifecycle::Terminating;
        let group_name = instance.group.clone();
        let Some(group) = state.groups.get_mut(&group_name) else {
            return Err(TerminateRefusal::NotFound);
        };
        if already {
            // The call is idempotent while the instance goes down.
            let activity = last_activity_of(group, instance_id)
                .cloned()
                .ok_or(TerminateRefusal::NotFound)?;
            return Ok(activity);
        }
        if decrement {
            if group.config.desired <= group.config.min {
                return Err(TerminateRefusal::BelowMinimum(group.config.min));
            }
            group.config.desired -= 1;
        }
        let cause = format!(
            "At {} instance {instance_id} was taken out of service in response to a user request.",
            iso()
        );
        start_termination(&mut state, instance_id, cause);
        let activity = state
            .groups
            .get(&group_name)
            .and_then(|group| last_activity_of(group, instance_id).cloned());
        (activity.ok_or(TerminateRefusal::NotFound)?, group_name)
    };
    finish_termination_later(cloud, instance_id.to_owned());
    reconcile(cloud, &group_name);
    Ok(activity)
}

fn finish_activity(group: &mut Group, instance_id: &str) {
    let open = group.activities.iter_mut().rev().find(|activity| {
        activity.instance_id.as_deref() == Some(instance_id)
            && activity.status == ActivityStatus::InProgress
    });
    if let Some(activity) = open {
        activity.status = ActivityStatus::Successful;
        activity.end = Some(Utc::now());
    }
}

fn last_activity_of<'a>(group: &'a Group, instance_id: &str) -> Option<&'a Activity> {
    group
        .activities
        .iter()
        .rev()
        .find(|activity| activity.instance_id.as_deref() == Some(instance_id))
}

fn activity_event(
    cloud: &Cloud,
    group: &Group,
    activity: &Activity,
    detail_type: &'static str,
) -> AwsEvent {
    let instance_id = activity.instance_id.clone().unwrap_or_default();
    let mut resources = vec![group.arn.clone()];
    if !instance_id.is_empty() {
        resources.push(cloud.arn("ec2", &format!("instance/{instance_id}")));
    }
    let is_failed = activity.status == ActivityStatus::Failed;
    let time = |at: DateTime<Utc>| at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
    let detail = json!({
        "StatusCode": if is_failed { "Failed" } else { "InProgress" },
        "Description": activity.description,
        "AutoScalingGroupName": activity.group,
        "ActivityId": activity.id,
        "RequestId": activity.id,
        "StatusMessage": activity.message.clone().unwrap_or_default(),
        "EC2InstanceId": instance_id,
        "StartTime": time(activity.start),
        "EndTime": time(activity.end.unwrap_or(activity.start)),
        "Cause": activity.cause,
        "Origin": "EC2",
        "Destination": "AutoScalingGroup",
        "Details": {"Availability Zone": activity.zone},
    });
    AwsEvent {
        source: "aws.autoscaling",
        detail_type,
        resources,
        time: Utc::now(),
        detail,
    }
}

fn iso() -> String {
    Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Secs, true)
}
