//! The Auto Scaling API (AWS Query, XML), as far as the pipeline calls it, with
//! AWS's rules and error texts.
//!
//! Sources: the Amazon EC2 Auto Scaling API reference; the texts of validation
//! errors as seen in public reports (kubernetes/autoscaler#943,
//! hashicorp/nomad-autoscaler#1290).

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use crate::{
    cloud::{
        Cloud, Lifecycle,
        groups::{self, TerminateRefusal},
        state::{Activity, Group, GroupTag, Instance, State},
    },
    ecs::ApiError,
    xml::Xml,
};

/// DescribeAutoScalingGroups answers at most this many, and by default half.
const GROUPS_MAX: usize = 100;
/// Default page of DescribeAutoScalingGroups and DescribeTags.
const PAGE_DEFAULT: usize = 50;
/// DescribeScalingActivities answers at most this many, and by default as many.
const ACTIVITIES_MAX: usize = 100;
/// SetInstanceProtection takes at most this many instances.
const PROTECTION_MAX: usize = 50;

/// The parameters of a call, as flat names (`InstanceIds.member.1`).
pub(crate) type Parameters = BTreeMap<String, String>;

type Answer = Result<Xml, ApiError>;

fn validation(message: impl Into<String>) -> ApiError {
    ApiError::client("ValidationError", message)
}

/// Carries out one call; the answer is the content of its result element.
pub(crate) fn call(cloud: &Cloud, operation: &str, parameters: &Parameters) -> Answer {
    match operation {
        "DescribeAutoScalingGroups" => describe_groups(cloud, parameters),
        "DescribeAutoScalingInstances" => describe_instances(cloud, parameters),
        "DescribeScalingActivities" => describe_activities(cloud, parameters),
        "DescribeWarmPool" => describe_warm_pool(cloud, parameters),
        "DescribeTags" => describe_tags(cloud, parameters),
        "SetDesiredCapacity" => set_desired_capacity(cloud, parameters),
        "UpdateAutoScalingGroup" => update_group(cloud, parameters),
        "TerminateInstanceInAutoScalingGroup" => terminate(cloud, parameters),
        "SetInstanceProtection" => set_protection(cloud, parameters),
        "CreateOrUpdateTags" => create_tags(cloud, parameters),
        "DeleteTags" => delete_tags(cloud, parameters),
        "SuspendProcesses" => suspend(cloud, parameters, true),
        "ResumeProcesses" => suspend(cloud, parameters, false),
        other => Err(ApiError::client(
            "InvalidAction",
            format!("The action {other} is not served locally."),
        )),
    }
}

fn describe_groups(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let names = members(parameters, "AutoScalingGroupNames");
    let state = cloud.lock();
    let groups: Vec<&Group> = state
        .groups
        .values()
        .filter(|group| names.is_empty() || names.contains(&group.config.name))
        .collect();
    let (page, next) = page(&groups, parameters, PAGE_DEFAULT, GROUPS_MAX)?;
    let mut xml = Xml::new();
    xml.list("AutoScalingGroups", page, |xml, group| {
        write_group(xml, &state, group)
    });
    xml.optional("NextToken", next);
    Ok(xml)
}

fn write_group(xml: &mut Xml, state: &State, group: &Group) {
    let name = &group.config.name;
    xml.text("AutoScalingGroupName", name);
    xml.text("AutoScalingGroupARN", &group.arn);
    xml.element("LaunchTemplate", |xml| {
        xml.text("LaunchTemplateId", "lt-0local0000000000");
        xml.text("LaunchTemplateName", name);
        xml.text("Version", "1");
    });
    xml.text("MinSize", group.min);
    xml.text("MaxSize", group.max);
    xml.text("DesiredCapacity", group.desired);
    xml.text("DefaultCooldown", 300);
    xml.list("AvailabilityZones", &group.config.zones, |xml, zone| {
        xml.raw_text(zone)
    });
    xml.list("LoadBalancerNames", &[] as &[String], |_, _| {});
    xml.text("HealthCheckType", "EC2");
    xml.text("HealthCheckGracePeriod", 0);
    let instances: Vec<&Instance> = instances_of(state, name);
    xml.list("Instances", &instances, |xml, instance| {
        write_instance(xml, instance)
    });
    xml.text("CreatedTime", time(group.created_at));
    xml.list("SuspendedProcesses", &group.suspended, |xml, process| {
        xml.text("ProcessName", process);
        xml.text("SuspensionReason", "User suspended");
    });
    let tags: Vec<(&String, &GroupTag)> = group.tags.iter().collect();
    xml.list("Tags", &tags, |xml, (key, tag)| {
        write_tag(xml, name, key, tag)
    });
    xml.list("TerminationPolicies", &["Default"], |xml, policy| {
        xml.raw_text(policy)
    });
    xml.text(
        "NewInstancesProtectedFromScaleIn",
        group.protect_new_instances,
    );
}

/// The group's instances, those on their way out included, oldest first.
fn instances_of<'a>(state: &'a State, group: &str) -> Vec<&'a Instance> {
    let mut instances: Vec<&Instance> = state
        .instances
        .values()
        .filter(|instance| instance.group == group && instance.lifecycle != Lifecycle::Terminated)
        .collect();
    instances.sort_by(|a, b| (a.launched_at, &a.id).cmp(&(b.launched_at, &b.id)));
    instances
}

fn write_instance(xml: &mut Xml, instance: &Instance) {
    xml.text("InstanceId", &instance.id);
    xml.text("InstanceType", &instance.instance_type);
    xml.text("AvailabilityZone", &instance.zone);
    xml.text("LifecycleState", instance.lifecycle.name());
    xml.text("HealthStatus", "Healthy");
    xml.text("ProtectedFromScaleIn", instance.protected);
}

fn write_tag(xml: &mut Xml, group: &str, key: &str, tag: &GroupTag) {
    xml.text("ResourceId", group);
    xml.text("ResourceType", "auto-scaling-group");
    xml.text("Key", key);
    xml.text("Value", &tag.value);
    xml.text("PropagateAtLaunch", tag.propagate);
}

fn describe_instances(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let ids = members(parameters, "InstanceIds");
    let state = cloud.lock();
    let found: Vec<&Instance> = state
        .instances
        .values()
        .filter(|instance| {
            instance.lifecycle != Lifecycle::Terminated
                && (ids.is_empty() || ids.contains(&instance.id))
        })
        .collect();
    let (page, next) = page(&found, parameters, PAGE_DEFAULT, PAGE_DEFAULT)?;
    let mut xml = Xml::new();
    xml.list("AutoScalingInstances", page, |xml, instance| {
        write_instance(xml, instance);
        xml.text("AutoScalingGroupName", &instance.group);
    });
    xml.optional("NextToken", next);
    Ok(xml)
}

fn describe_activities(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let ids = members(parameters, "ActivityIds");
    let group = parameters.get("AutoScalingGroupName");
    let state = cloud.lock();
    if let Some(name) = group {
        group_of(&state, name)?;
    }
    let mut activities: Vec<&Activity> = state
        .groups
        .values()
        .filter(|candidate| group.is_none_or(|name| *name == candidate.config.name))
        .flat_map(|candidate| &candidate.activities)
        .filter(|activity| ids.is_empty() || ids.contains(&activity.id))
        .collect();
    // Newest first; of one instant, the one that was added last.
    activities.reverse();
    activities.sort_by_key(|activity| std::cmp::Reverse(activity.start));
    let (page, next) = page(&activities, parameters, ACTIVITIES_MAX, ACTIVITIES_MAX)?;
    let mut xml = Xml::new();
    xml.list("Activities", page, |xml, activity| {
        write_activity(xml, activity)
    });
    xml.optional("NextToken", next);
    Ok(xml)
}

fn write_activity(xml: &mut Xml, activity: &Activity) {
    xml.text("ActivityId", &activity.id);
    xml.text("AutoScalingGroupName", &activity.group);
    xml.text("Description", &activity.description);
    xml.text("Cause", &activity.cause);
    xml.text("StartTime", time(activity.start));
    xml.optional("EndTime", activity.end.map(time));
    xml.text("StatusCode", activity.status.name());
    xml.optional("StatusMessage", activity.message.clone());
    xml.text("Progress", activity.status.progress());
    xml.text(
        "Details",
        format!("{{\"Availability Zone\":\"{}\"}}", activity.zone),
    );
}

fn describe_warm_pool(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let state = cloud.lock();
    group_of(&state, required(parameters, "AutoScalingGroupName")?)?;
    // No group here has a warm pool.
    let mut xml = Xml::new();
    xml.list("Instances", &[] as &[String], |_, _| {});
    Ok(xml)
}

fn describe_tags(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let mut filters: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for index in 1.. {
        let Some(name) = parameters.get(&format!("Filters.member.{index}.Name")) else {
            break;
        };
        filters.insert(
            name.clone(),
            members(parameters, &format!("Filters.member.{index}.Values")),
        );
    }
    let allows = |name: &str, value: &str| {
        filters
            .get(name)
            .is_none_or(|values| values.iter().any(|one| one == value))
    };
    let state = cloud.lock();
    let tags: Vec<(&str, &String, &GroupTag)> = state
        .groups
        .values()
        .flat_map(|group| {
            group
                .tags
                .iter()
                .map(|(key, tag)| (group.config.name.as_str(), key, tag))
        })
        .filter(|(group, key, tag)| {
            allows("auto-scaling-group", group) && allows("key", key) && allows("value", &tag.value)
        })
        .collect();
    let (page, next) = page(&tags, parameters, PAGE_DEFAULT, GROUPS_MAX)?;
    let mut xml = Xml::new();
    xml.list("Tags", page, |xml, (group, key, tag)| {
        write_tag(xml, group, key, tag)
    });
    xml.optional("NextToken", next);
    Ok(xml)
}

fn set_desired_capacity(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let name = required(parameters, "AutoScalingGroupName")?.to_owned();
    let desired =
        number(parameters, "DesiredCapacity")?.ok_or_else(|| null_value("desiredCapacity"))?;
    {
        let mut state = cloud.lock();
        group_of(&state, &name)?;
        let Some(group) = state.groups.get_mut(&name) else {
            return Err(not_found(&name));
        };
        if desired > group.max {
            return Err(validation(format!(
                "New SetDesiredCapacity value {desired} is above max value {} for the AutoScalingGroup.",
                group.max
            )));
        }
        if desired < group.min {
            return Err(validation(format!(
                "New SetDesiredCapacity value {desired} is below min value {} for the AutoScalingGroup.",
                group.min
            )));
        }
        group.desired = desired;
    }
    groups::reconcile(cloud, &name);
    Ok(Xml::new())
}

fn update_group(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let name = required(parameters, "AutoScalingGroupName")?.to_owned();
    {
        let mut state = cloud.lock();
        group_of(&state, &name)?;
        let Some(group) = state.groups.get_mut(&name) else {
            return Err(not_found(&name));
        };
        let min = number(parameters, "MinSize")?.unwrap_or(group.min);
        let max = number(parameters, "MaxSize")?.unwrap_or(group.max);
        if min > max {
            return Err(validation(format!(
                "Max bound, {max}, must be greater than or equal to min bound, {min}"
            )));
        }
        let asked = number(parameters, "DesiredCapacity")?;
        if asked.is_some_and(|desired| desired < min || desired > max) {
            return Err(validation(format!(
                "Desired capacity:{} must be between the specified min size:{min} and max size:{max}",
                asked.unwrap_or_default()
            )));
        }
        // Without a new desired capacity the old one is moved inside the new limits.
        group.desired = asked.unwrap_or_else(|| group.desired.clamp(min, max));
        group.min = min;
        group.max = max;
        if let Some(protect) = parameters.get("NewInstancesProtectedFromScaleIn") {
            group.protect_new_instances = protect == "true";
        }
    }
    groups::reconcile(cloud, &name);
    Ok(Xml::new())
}

fn terminate(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let instance_id = required(parameters, "InstanceId")?;
    let decrement = match parameters
        .get("ShouldDecrementDesiredCapacity")
        .map(String::as_str)
    {
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
    let mut xml = Xml::new();
    xml.element("Activity", |xml| write_activity(xml, &activity));
    Ok(xml)
}

fn set_protection(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let name = required(parameters, "AutoScalingGroupName")?;
    let ids = members(parameters, "InstanceIds");
    if ids.is_empty() || ids.len() > PROTECTION_MAX {
        return Err(validation("1 to 50 instance ids must be given"));
    }
    let protect = required(parameters, "ProtectedFromScaleIn")? == "true";
    let mut state = cloud.lock();
    group_of(&state, name)?;
    for id in &ids {
        let ours = state
            .instances
            .get(id)
            .is_some_and(|instance| instance.group == name);
        if !ours {
            return Err(validation(format!(
                "The instance {id} is not part of Auto Scaling group {name}."
            )));
        }
        let in_service = state
            .instances
            .get(id)
            .is_some_and(|instance| instance.lifecycle == Lifecycle::InService);
        if !in_service {
            return Err(validation(format!(
                "The instance {id} is not in InService or EnteringStandby or Standby."
            )));
        }
    }
    for id in &ids {
        if let Some(instance) = state.instances.get_mut(id) {
            instance.protected = protect;
        }
    }
    Ok(Xml::new())
}

fn create_tags(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let mut state = cloud.lock();
    for index in 1.. {
        let field = |name: &str| parameters.get(&format!("Tags.member.{index}.{name}"));
        let Some(key) = field("Key") else { break };
        let group_name = field("ResourceId").ok_or_else(|| null_value("tags.member.resourceId"))?;
        group_of(&state, group_name)?;
        let tag = GroupTag {
            value: field("Value").cloned().unwrap_or_default(),
            propagate: field("PropagateAtLaunch").is_some_and(|value| value == "true"),
        };
        if let Some(group) = state.groups.get_mut(group_name) {
            group.tags.insert(key.clone(), tag);
        }
    }
    Ok(Xml::new())
}

fn delete_tags(cloud: &Cloud, parameters: &Parameters) -> Answer {
    let mut state = cloud.lock();
    for index in 1.. {
        let field = |name: &str| parameters.get(&format!("Tags.member.{index}.{name}"));
        let Some(key) = field("Key") else { break };
        let group_name = field("ResourceId").ok_or_else(|| null_value("tags.member.resourceId"))?;
        if let Some(group) = state.groups.get_mut(group_name) {
            group.tags.remove(key);
        }
    }
    Ok(Xml::new())
}

fn suspend(cloud: &Cloud, parameters: &Parameters, on: bool) -> Answer {
    let name = required(parameters, "AutoScalingGroupName")?.to_owned();
    let processes = members(parameters, "ScalingProcesses");
    {
        let mut state = cloud.lock();
        group_of(&state, &name)?;
        let Some(group) = state.groups.get_mut(&name) else {
            return Err(not_found(&name));
        };
        group
            .suspended
            .retain(|process| !processes.contains(process));
        if on {
            group.suspended.extend(processes);
        }
    }
    groups::reconcile(cloud, &name);
    Ok(Xml::new())
}

// ----------------------------------------------------------------- helpers --

fn group_of<'a>(state: &'a State, name: &str) -> Result<&'a Group, ApiError> {
    state.groups.get(name).ok_or_else(|| not_found(name))
}

fn not_found(name: &str) -> ApiError {
    validation(format!(
        "AutoScalingGroup name not found - AutoScalingGroup '{name}' not found"
    ))
}

fn null_value(member: &str) -> ApiError {
    validation(format!(
        "1 validation error detected: Value null at '{member}' failed to satisfy constraint: Member must not be null"
    ))
}

fn required<'a>(parameters: &'a Parameters, name: &str) -> Result<&'a str, ApiError> {
    parameters.get(name).map(String::as_str).ok_or_else(|| {
        let mut member = name.to_owned();
        member[..1].make_ascii_lowercase();
        null_value(&member)
    })
}

fn number(parameters: &Parameters, name: &str) -> Result<Option<usize>, ApiError> {
    let Some(text) = parameters.get(name) else {
        return Ok(None);
    };
    text.parse().map(Some).map_err(|_| {
        validation(format!(
            "{name} must be a number of at least 0, not '{text}'"
        ))
    })
}

/// The members of a list parameter.
fn members(parameters: &Parameters, name: &str) -> Vec<String> {
    (1..)
        .map_while(|index| parameters.get(&format!("{name}.member.{index}")).cloned())
        .collect()
}

fn page<'a, T>(
    all: &'a [T],
    parameters: &Parameters,
    default: usize,
    most: usize,
) -> Result<(&'a [T], Option<String>), ApiError> {
    let size = number(parameters, "MaxRecords")?
        .unwrap_or(default)
        .min(most);
    let start = match parameters.get("NextToken") {
        None => 0,
        Some(token) => token
            .strip_prefix("page-")
            .and_then(|start| start.parse::<usize>().ok())
            .ok_or_else(|| ApiError::client("InvalidNextToken", "The token is not valid."))?,
    };
    let start = start.min(all.len());
    let end = (start + size).min(all.len());
    let next = (end < all.len()).then(|| format!("page-{end}"));
    Ok((&all[start..end], next))
}

fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}
