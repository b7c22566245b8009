//! The project's own assertions: what no linter sees.

mod compute;
mod container;
mod contract;
mod environment;
mod lane;
mod operation;
mod permissions;
mod storage;

use std::ops::Deref;

use template::{NotDeployed, Parameters, Stack, Template};

use crate::{Finding, Findings, Project};

/// A check, from the project to what is wrong with it.
pub type Check = fn(&Project, &mut Findings);

/// Every check, with the name that its findings bear.
pub const ALL: &[(&str, Check)] = &[
    ("Auto Scaling groups", compute::auto_scaling_groups),
    ("instances", compute::instances),
    ("task definition", compute::tasks),
    ("Dockerfile", container::dockerfile),
    ("wire contract", contract::subscription),
    ("environment", environment::variables),
    ("express lane", lane::deliveries),
    ("express lane off", lane::off),
    ("metrics", operation::alarms_and_dashboard),
    ("functions", operation::functions),
    ("logs", operation::log_groups),
    ("parameters", operation::parameters),
    ("rules", operation::rules),
    ("health check", container::health_check),
    ("permissions", permissions::api_calls),
    ("permissions", permissions::literals),
    ("permissions", permissions::wildcards),
    ("encryption", storage::encryption),
    ("lifetimes", storage::lifetime),
    ("TLS only", storage::tls_only),
    ("visibility timeout", storage::visibility),
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
    ("AlarmEmail", "operator@example.com"),
    ("InstanceSessions", "true"),
    ("AlarmTopicArn", "arn:aws:sns:eu-west-1:123456789012:alarms"),
    ("Purchase1", "spot"),
    ("InstanceType3", "g5.xlarge"),
    ("ReserveScalerConcurrency", "true"),
    ("ExpressLane", "on"),
    ("MaxDailyCost", "5"),
    ("RetentionDays", "3"),
    ("VectorRetentionDays", "0"),
];

/// Every option off, on top of [`REQUIRED`].
const LEAST: &[(&str, &str)] = &[
    ("SourceEvents", "None"),
    ("ExpressLane", "off"),
    ("InstanceType2", ""),
    ("OutputKind", "queue"),
    ("CacheBucketName", "vectors"),
];

/// What infra/cdk made, with a key and with the scaler's concurrency reserved.
const SYNTHESISED: &str = "synthesised";

/// The template for one choice of parameters.
struct Choice {
    /// For messages and for what holds for some choices only.
    name: &'static str,
    stack: Stack,
}

impl Deref for Choice {
    type Target = Stack;

    fn deref(&self) -> &Stack {
        &self.stack
    }
}

/// The template for three choices and what is synthesised of it, or why there is none.
fn choices(project: &Project) -> Result<Vec<Choice>, Finding> {
    let choices: [(&'static str, &[(&str, &str)]); 3] = [
        ("defaults", &[]),
        ("everything on", EVERYTHING),
        ("everything off", LEAST),
    ];
    let resolved = |name, template: &Template, given| match template.resolve(&given, &NotDeployed) {
        Ok(stack) => Ok(Choice { name, stack }),
        Err(error) => Err(Finding::new("template", name, error.to_string())),
    };
    let chosen = choices.into_iter().map(|(name, choice)| {
        let given = REQUIRED.iter().chain(choice);
        let given = given.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        resolved(name, &project.template, given.collect())
    });
    let mut all: Vec<Choice> = chosen.collect::<Result<_, _>>()?;
    for template in &project.synthesised {
        let mut synthesised = resolved(SYNTHESISED, template, Parameters::new())?;
        synthesised.stack.parameters = all[0].parameters.clone();
        // The others are CDK's, such as its function for buckets' notifications.
        let own = &all[1].stack.resources;
        synthesised
            .stack
            .resources
            .retain(|id, _| own.contains_key(id));
        all.push(synthesised);
    }
    Ok(all)
}

/// Runs `check` on the template for each choice of parameters.
fn in_each_stack(
    project: &Project,
    findings: &mut Findings,
    check: impl Fn(&Choice, &mut Findings),
) {
    match choices(project) {
        Ok(choices) => choices.iter().for_each(|choice| check(choice, findings)),
        Err(finding) => findings.all.push(finding),
    }
}
