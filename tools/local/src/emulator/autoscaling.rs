//! The Auto Scaling API (AWS Query, XML), as far as the pipeline calls it, with
//! AWS's rules and error texts.
//!
//! Sources: the Amazon EC2 Auto Scaling API reference; the texts of validation
//! errors as seen in public reports (kubernetes/autoscaler#943,
//! hashicorp/nomad-autoscaler#1290).

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::{
    cloud::{
        Cloud, Lifecycle,
        groups::{self, TerminateRefusal},
        state::{Activity, ActivityStatus, CloudState, Group, GroupTag, Instance},
    },
    ecs::{Answer, Refusal},
};

/// DescribeAutoScalingGroups answers at most this many, and by default half.
const GROUPS_MAX: usize = 100;
/// Default page of DescribeAutoScalingGroups.
const PAGE_DEFAULT: usize = 50;
/// DescribeScalingActivities answers at most this many, and by default as many.
const ACTIVITIES_MAX: usize = 100;

fn validation(message: impl Into<String>) -> Refusal {
    Refusal::client("ValidationError", message)
}

/// Carries out one call, whose parameters have flat names (`InstanceIds.member.1`);
/// the answer is the content of its result element.
pub(crate) fn call(cloud: &Cloud, operation: &str, request: &Value) -> Answer {
    match operation {
        "DescribeAutoScalingGroups" => describe_groups(cloud, request),
        "DescribeScalingActivities" => describe_activities(cloud, request),
        "DescribeWarmPool" => describe_warm_pool(cloud, request),
        "SetDesiredCapacity" => set_desired_capacity(cloud, request),
        "TerminateInstanceInAutoScalingGroup" => terminate(cloud, request),
        "CreateOrUpdateTags" => create_tags(cloud, request),
        other => Err(Refusal::client(
            "InvalidAction",
            format!("The action {other} is not served locally."),
        )),
    }
}

fn describe_groups(cloud: &Cloud, request: &Value) -> Answer {
    let names = members(request, "AutoScalingGroupNames");
    let state = cloud.lock();
    let groups = state
        .groups
        .values()
        .filter(|group| names.is_empty() || names.contains(&group.config.name))
        .map(|group| describe_group(&state, group))
        .collect();
    page(
        groups,
        request,
        "AutoScalingGroups",
        PAGE_DEFAULT,
        GROUPS_MAX,
    )
}

fn describe_group(state: &CloudState, group: &Group) -> Value {
    let config = &group.config;
    let instances: Vec<Value> = state
        .instances_of(&config.name)
        .filter(|instance| instance.lifecycle != Lifecycle::Terminated)
        .map(describe_instance)
        .collect();
    let tags = group.tags.iter().map(|(key, tag)| {
        json!({
            "ResourceId": config.name,
            "ResourceType": "auto-scaling-group",
            "Key": key,
            "Value": tag.value,
            "PropagateAtLaunch": tag.propagate,
        })
    });
    json!({
        "AutoScalingGroupName": config.name,
        "AutoScalingGroupARN": group.arn,
        "LaunchTemplate": {
            "LaunchTemplateId": "lt-0local0000000000",
            "LaunchTemplateName": config.name,
            "Version": "1",
        },
        "MinSize": config.min,
        "MaxSize": config.max,
        "DesiredCapacity": config.desired,
        "DefaultCooldown": 300,
        "AvailabilityZones": config.zones,
        "LoadBalancerNames": [],
        "HealthCheckType": "EC2",
        "HealthCheckGracePeriod": 0,
        "Instances": instances,
        "CreatedTime": time(group.created_at),
        "SuspendedProcesses": [],
        "Tags": tags.collect::<Vec<_>>(),
        "TerminationPolicies": ["Default"],
        "NewInstancesProtectedFromScaleIn": config.protect_new_instances,
    })
}

fn describe_instance(instance: &Instance) -> Value {
    json!({
        "InstanceId": instance.id,
        "InstanceType": instance.instance_type,
        "AvailabilityZone": instance.zone,
        "LifecycleState": instance.lifecycle,
        "HealthStatus": "Healthy",
        "ProtectedFromScaleIn": instance.protected,
    })
}

fn describe_activities(cloud: &Cloud, request: &Value) -> Answer {
    let ids = members(request, "ActivityIds");
    let group = request["AutoScalingGroupName"].as_str();
    let state = cloud.lock();
    if let Some(name) = group {
        group_of(&state, name)?;
    }
    let mut activities: Vec<&Activity> = state
        .groups
        .values()
        .filter(|candidate| group.is_none_or(|name| name == candidate.config.name))
        .flat_map(|candidate| &candidate.activities)
        .filter(|activity| ids.is_empty() || ids.contains(&activity.id))
        .collect();
    // Newest first; of one instant, the one that was added last.
    activities.reverse();
    activities.sort_by_key(|activity| std::cmp::Reverse(activity.start));
    let shown = activities.into_iter().map(describe_activity).collect();
    page(shown, request, "Activities", ACTIVITIES_MAX, ACTIVITIES_MAX)
}

fn describe_activity(activity: &Activity) -> Value {
    let is_over = activity.status != ActivityStatus::InProgress;
    json!({
        "ActivityId": activity.id,
        "AutoScalingGroupName": activity.group,
        "Description": activity.description,
        "Cause": activity.cause,
        "StartTime": time(activity.start),
        "EndTime": activity.end.map(time),
        "StatusCode": activity.status,
        "StatusMessage": activity.message,
        "Progress": if is_over { 100 } else { 50 },
        "Details": json!({"Availability Zone": activity.zone}).to_string(),
    })
}

fn describe_warm_pool(cloud: &Cloud, request: &Value) -> Answer {
    let state = cloud.lock();
    group_of(&state, required(request, "AutoScalingGroupName")?)?;
    // No group here has a warm pool.
    Ok(json!({"Instances": []}))
}

fn set_desired_capacity(cloud: &Cloud, request: &Value) -> Answer {
    let name = required(request, "AutoScalingGroupName")?.to_owned();
    let desired =
        number(request, "DesiredCapacity")?.ok_or_else(|| null_value("desiredCapacity"))?;
    {
        let mut state = cloud.lock();
        let config = match state.groups.get_mut(&name) {
            Some(group) => &mut group.config,
            None => return Err(not_found(&name)),
        };
        for (is_beyond, side, limit) in [
            (desired > config.max, "above max", config.max),
            (desired < config.min, "below min", config.min),
        ] {
            if is_beyond {
                return Err(validation(format!(
                    "New SetDesiredCapacity value {desired} is {side} value {limit} for the AutoScalingGroup."
                )));
            }
        }
        config.desired = desired;
    }
    groups::reconcile(cloud, &name);
    Ok(json!({}))
}

fn terminate(cloud: &Cloud, request: &Value) -> Answer {
    let instance_id = required(request, "InstanceId")?;
    let decrement = match request["ShouldDecrementDesiredCapacity"].as_str() {
        Some("true") => true,
        Some("false") => false,
        _ => return Err(null_value("shouldDecrementDesiredCapacity")),
    };
    let activity = groups::terminate(cloud, instance_id, decrement).map_err(|refusal| match refusal {
        TerminateRefusal::NotFound => validation(format!("Instance Id not found - No managed instance found for instance ID {instance_id}")),
        TerminateRefusal::BelowMinimum(min) => validation(format!(
            "Currently, desiredSize equals minSize ({min}). Terminating instance without replacement will violate group's min size constraint. Either set shouldDecrementDesiredCapacity flag to false or lower group's min size."
        )),
    })?;
    Ok(json!({"Activity": describe_activity(&activity)}))
}

fn create_tags(cloud: &Cloud, request: &Value) -> Answer {
    let mut state = cloud.lock();
    for index in 1.. {
        let field = |name: &str| request[format!("Tags.member.{index}.{name}")].as_str();
        let Some(key) = field("Key") else { break };
        let group_name = field("ResourceId").ok_or_else(|| null_value("tags.member.resourceId"))?;
        group_of(&state, group_name)?;
        let tag = GroupTag {
            value: field("Value").unwrap_or_default().to_owned(),
            propagate: field("PropagateAtLaunch").is_some_and(|value| value == "true"),
        };
        if let Some(group) = state.groups.get_mut(group_name) {
            group.tags.insert(key.to_owned(), tag);
        }
    }
    Ok(json!({}))
}

// ----------------------------------------------------------------- helpers --

fn group_of<'a>(state: &'a CloudState, name: &str) -> Result<&'a Group, Refusal> {
    state.groups.get(name).ok_or_else(|| not_found(name))
}

fn not_found(name: &str) -> Refusal {
    validation(format!(
        "AutoScalingGroup name not found - AutoScalingGroup '{name}' not found"
    ))
}

fn null_value(member: &str) -> Refusal {
    validation(format!(
        "1 validation error detected: Value null at '{member}' failed to satisfy constraint: Member must not be null"
    ))
}

fn required<'a>(request: &'a Value, name: &str) -> Result<&'a str, Refusal> {
    request[name].as_str().ok_or_else(|| {
        let mut member = name.to_owned();
        member[..1].make_ascii_lowercase();
        null_value(&member)
    })
}

fn number(request: &Value, name: &str) -> Result<Option<usize>, Refusal> {
    let parse = |text: &str| {
        let wrong = || format!("{name} must be a number of at least 0, not '{text}'");
        text.parse().map_err(|_| validation(wrong()))
    };
    request[name].as_str().map(parse).transpose()
}

/// The members of a list parameter.
fn members(request: &Value, name: &str) -> Vec<String> {
    (1..)
        .map_while(|index| request[format!("{name}.member.{index}")].as_str())
        .map(str::to_owned)
        .collect()
}

fn page(all: Vec<Value>, request: &Value, name: &str, default: usize, most: usize) -> Answer {
    let size = number(request, "MaxRecords")?.unwrap_or(default).min(most);
    let start = match request["NextToken"].as_str() {
        None => 0,
        Some(token) => token
            .strip_prefix("page-")
            .and_then(|start| start.parse::<usize>().ok())
            .ok_or_else(|| Refusal::client("InvalidNextToken", "The token is not valid."))?,
    };
    let next = (start + size < all.len()).then(|| format!("page-{}", start + size));
    let items: Vec<Value> = all.into_iter().skip(start).take(size).collect();
    Ok(json!({name: items, "NextToken": next}))
}

fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}
