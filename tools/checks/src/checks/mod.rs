//! The project's own assertions: what no linter sees.

mod compute;
mod container;
mod contract;
mod environment;
mod operation;
mod permissions;
mod storage;

use crate::template::Stack;
use crate::{Finding, Project};

/// A check, from the project to what is wrong with it.
pub type Check = fn(&Project) -> Vec<Finding>;

/// Every check.
pub const ALL: &[Check] = &[
    compute::auto_scaling_groups,
    compute::instances,
    compute::tasks,
    container::dockerfile,
    contract::subscription,
    environment::variables,
    operation::alarms_and_dashboard,
    operation::functions,
    operation::log_groups,
    operation::parameters,
    container::health_check,
    permissions::api_calls,
    permissions::literals,
    permissions::wildcards,
    storage::encryption,
    storage::lifetime,
    storage::tls_only,
    storage::visibility,
];

/// Values for the parameters without a default.
const REQUIRED: &[(&str, &str)] = &[
    ("VpcId", "vpc-0123456789abcdef0"),
    ("PrivateSubnet1", "subnet-0123456789abcdef1"),
    ("SourceBucket1", "images"),
    ("ModelBucket", "models"),
];

/// Every option on, on top of [`REQUIRED`].
const EVERYTHING: &[(&str, &str)] = &[
    ("PrivateSubnet2", "subnet-0123456789abcdef2"),
    ("PrivateSubnet3", "subnet-0123456789abcdef3"),
    ("SourceBucket2", "images2"),
    ("SourceBucket3", "images3"),
    ("SourcePrefix", "in/"),
    (
        "SourceKmsKeyArn",
        "arn:aws:kms:eu-west-1:123456789012:key/source",
    ),
    (
        "SourceTopicArn",
        "arn:aws:sns:eu-west-1:123456789012:previous",
    ),
    (
        "NotificationTopicArn",
        "arn:aws:sns:eu-west-1:123456789012:notifications",
    ),
    (
        "NotificationQueueArn",
        "arn:aws:sqs:eu-west-1:123456789012:notifications",
    ),
    ("OutputKind", "topic+event-bus+queue"),
    ("KmsKeyArn", "arn:aws:kms:eu-west-1:123456789012:key/own"),
    ("AlarmTopicArn", "arn:aws:sns:eu-west-1:123456789012:alarms"),
    ("Purchase1", "spot"),
    ("RetentionDays", "3"),
];

/// Every option off, on top of [`REQUIRED`].
const LEAST: &[(&str, &str)] = &[
    ("SourceEvents", "None"),
    ("InstanceType2", ""),
    ("InstanceType3", ""),
    ("OutputKind", "queue"),
    ("ReserveScalerConcurrency", "false"),
];

/// The template for three choices of parameters, or why it has none.
fn stacks(project: &Project) -> Result<Vec<Stack>, Finding> {
    let choices: [(&'static str, &[(&str, &str)]); 3] = [
        ("defaults", &[]),
        ("everything on", EVERYTHING),
        ("everything off", LEAST),
    ];
    let mut stacks = Vec::new();
    for (name, choice) in choices {
        let parameters: Vec<(&str, &str)> = REQUIRED.iter().chain(choice).copied().collect();
        let stack = project
            .template
            .evaluate(name, &parameters)
            .map_err(|error| Finding::new("template", name, format!("{error:#}")))?;
        stacks.push(stack);
    }
    Ok(stacks)
}

/// Runs `check` on the template for each choice of parameters.
fn in_each_stack(project: &Project, check: impl Fn(&Stack) -> Vec<Finding>) -> Vec<Finding> {
    match stacks(project) {
        Ok(stacks) => stacks.iter().flat_map(check).collect(),
        Err(finding) => vec![finding],
    }
}
