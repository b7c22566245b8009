//! The Auto Scaling API (AWS Query, XML), as far as the pipeline calls it, with
//! AWS's rules and error texts.
//!
//! Sources: the Amazon EC2 Auto Scaling API reference; the texts of validation
//! errors as seen in public reports (kubernetes/autoscaler#943,
//! hashicorp/nomad-autoscaler#1290).

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};

use super::{
    cloud::{
        Cloud, Lifecycle,
        groups::{self, TerminateRefusal},
        state::{Activity, CloudState, Group, GroupTag, Instance},
    },
    ecs::Refusal,
    xml::Xml,
};

/// DescribeAutoScalingGroups answers at most this many, and by default half.
const GROUPS_MAX: usize = 100;
/// Default page of DescribeAutoScalingGroups.
const PAGE_DEFAULT: usize = 50;
/// DescribeScalingActivities answers at most this many, and by default as many.
const ACTIVITIES_MAX: usize = 100;
/// The parameters of a call, as flat names (`InstanceIds.member.1`).
pub(crate) type Parameters = BTreeMap<String, String>;

type Answer = Result<Xml, Refusal>;

fn validation(message: impl Into<String>) -> Refusal {
    Refusal::client("ValidationError", message)
}

/// Carries out one call; the answer is the content of its result element.
pub(crate) fn call(cloud: &Cloud, operation: &str, parameters: &Parameters) -> Answer {
    match operation {
        "DescribeAutoScalingGroups" => describe_groups(cloud, parameters),
        "DescribeScalingActivities" => describe_activities(cloud, parameters),
        "DescribeWarmPool" => describe_warm_pool(cloud, parameters),
        "SetDesiredCapacity" => set_desired_capacity(cloud, parameters),
        "TerminateInstanceInAutoScalingGroup" => terminate(cloud, parameters),
        "CreateOrUpdateTags" => create_tags(cloud, parameters),
        other => Err(Refusal::client(
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

fn write_group(xml: &mut Xml, state: &CloudState, group: &Group) {
    let name = &group.config.name;
    xml.text("AutoScalingGroupName", name);
    xml.text("AutoScalingGroupARN", &group.arn);
    xml.element("LaunchTemplate", |xml| {
        xml.text("LaunchTemplateId", "lt-0local0000000000");
        xml.text("LaunchTemplateName", name);
        xml.text("Version", "1");
    });
    xml.text("MinSize", group.config.min);
    xml.text("MaxSize", group.config.max);
    xml.text("DesiredCapacity", group.config.desired);
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
    xml.list("SuspendedProcesses", &[] as &[String], |_, _| {});
    let tags: Vec<(&String, &GroupTag)> = group.tags.iter().collect();
    xml.list("Tags", &tags, |xml, (key, tag)| {
        write_tag(xml, name, key, tag)
    });
    xml.list("TerminationPolicies", &["Default"], |xml, policy| {
        xml.raw_text(policy)
    });
    xml.text(
        "NewInstancesProtectedFromScaleIn",
        group.config.protect_new_instances,
    );
}

/// The group's instances, those on their way out included, oldest first.
fn instances_of<'a>(state: &'a CloudState, group: &str) -> Vec<&'a Instance> {
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
        if desired > group.config.max {
            return Err(validation(format!(
                "New SetDesiredCapacity value {desired} is above max value {} for the AutoScalingGroup.",
                group.config.max
            )));
        }
        if desired < group.config.min {
            return Err(validation(format!(
                "New SetDesiredCapacity value {desired} is below min value {} for the AutoScalingGroup.",
                group.config.min
            )));
        }
        group.config.desired = desired;
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

fn required<'a>(parameters: &'a Parameters, name: &str) -> Result<&'a str, Refusal> {
    parameters.get(name).map(String::as_str).ok_or_else(|| {
        let mut member = name.to_owned();
        member[..1].make_ascii_lowercase();
        null_value(&member)
    })
}

fn number(parameters: &Parameters, name: &str) -> Result<Option<usize>, Refusal> {
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
) -> Result<(&'a [T], Option<String>), Refusal> {
    let size = number(parameters, "MaxRecords")?
        .unwrap_or(default)
        .min(most);
    let start = match parameters.get("NextToken") {
        None => 0,
        Some(token) => token
            .strip_prefix("page-")
            .and_then(|start| start.parse::<usize>().ok())
            .ok_or_else(|| Refusal::client("InvalidNextToken", "The token is not valid."))?,
    };
    let start = start.min(all.len());
    let end = (start + size).min(all.len());
    let next = (end < all.len()).then(|| format!("page-{end}"));
    Ok((&all[start..end], next))
}

fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true)
}
