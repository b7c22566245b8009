//! Queues, topics, buckets, file systems.

use serde_json::Value;

use super::in_each_stack;
use crate::{Findings, Project};
use template::{Stack, list, number, referred};

/// SQS counts in seconds, S3 in days.
const SECONDS_PER_DAY: f64 = 86_400.0;

/// A message's visibility timeout must outlast whoever may still work on it.
pub fn visibility(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        let mut fail = |place: &str, problem: String| {
            findings.add(place, problem);
        };
        let queue = stack.properties("InputQueue");
        // The queue whose messages only tasks work on.
        let of_tasks = match stack.properties("GpuQueue") {
            Value::Null => queue,
            own => own,
        };
        let visibility = number(&of_tasks["VisibilityTimeout"]).unwrap_or(30.0);
        for (id, task) in stack.of_type("AWS::ECS::TaskDefinition") {
            for container in list(&task["ContainerDefinitions"]) {
                let told =
                    container_variable(container, "VISIBILITY_TIMEOUT_SECONDS").and_then(number);
                if told != Some(visibility) {
                    fail(
                        id,
                        format!(
                            "VISIBILITY_TIMEOUT_SECONDS is {told:?} and the queue's timeout {visibility}: they must be equal"
                        ),
                    );
                }
                let stop = number(&container["StopTimeout"]).unwrap_or(30.0);
                if visibility <= stop {
                    fail(
                        "InputQueue",
                        format!(
                            "a message shows up again after {visibility} s while the stopping task may work on it for {stop} s"
                        ),
                    );
                }
            }
        }
        // AWS: at least six times the function's time-out, so that what is throttled for long is
        // no dead letter. Where the redrive policy leads to other workers, twice is enough.
        let times = |source: &Value| {
            let next = referred(&source["RedrivePolicy"]["deadLetterTargetArn"]);
            let next = stack.properties(next.unwrap_or_default());
            if next["RedrivePolicy"].is_null() {
                6.0
            } else {
                2.0
            }
        };
        for (id, mapping) in stack.of_type("AWS::Lambda::EventSourceMapping") {
            let source = stack.properties(referred(&mapping["EventSourceArn"]).unwrap_or_default());
            let function = stack.properties(referred(&mapping["FunctionName"]).unwrap_or_default());
            let timeout = number(&function["Timeout"]).unwrap_or(3.0);
            if let Some(visibility) = number(&source["VisibilityTimeout"])
                && visibility < times(source) * timeout
            {
                fail(
                    id,
                    format!(
                        "the queue's visibility timeout is {visibility} s, less than {} times the function's {timeout} s",
                        times(source)
                    ),
                );
            }
        }
        if queue["RedrivePolicy"]["deadLetterTargetArn"].is_null() {
            fail("InputQueue", "has no dead-letter queue".to_owned());
        }
    })
}

pub fn container_variable<'a>(container: &'a Value, name: &str) -> Option<&'a Value> {
    list(&container["Environment"])
        .into_iter()
        .find(|entry| entry["Name"] == name)
        .map(|entry| &entry["Value"])
}

/// Vectors live at least as long as the messages that point to them, for
/// every lifetime on offer.
pub fn lifetime(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        let days = stack
            .of_type("AWS::S3::Bucket")
            .flat_map(|(_, bucket)| list(&bucket["LifecycleConfiguration"]["Rules"]))
            .find(|rule| rule["Status"] == "Enabled" && rule["Prefix"].is_null())
            .and_then(|rule| number(&rule["ExpirationInDays"]));
        let chosen = |name: &str| stack.parameters[name].as_str();
        let is_own = chosen("CacheBucketName").is_empty();
        let is_for_ever = chosen("VectorRetentionDays") == "0";
        if days.is_none() == (is_own && !is_for_ever) {
            findings.add(
                "CacheBucket",
                format!("vectors expire after {days:?} days, which is not what was chosen"),
            );
        }
        let messages = number(&chosen("RetentionDays").into()).unwrap_or_default();
        for (id, queue) in stack.of_type("AWS::SQS::Queue") {
            let seconds = number(&queue["MessageRetentionPeriod"]);
            let outlives = days.is_some_and(|days| days < messages);
            if seconds != Some(messages * SECONDS_PER_DAY) || outlives {
                findings.add(id, format!("keeps messages for {seconds:?} s of {messages} days, vectors live for {days:?} days"));
            }
        }
    });
    let mapping = project.template.part("/Mappings/Retention");
    let parameter = project.template.part("/Parameters/RetentionDays");
    let least = number(&parameter["MinValue"]).unwrap_or(0.0) as u32;
    let most = number(&parameter["MaxValue"]).unwrap_or(0.0) as u32;
    for day in least..=most {
        let seconds = number(&mapping[day.to_string().as_str()]["Seconds"]);
        if seconds != Some(f64::from(day) * SECONDS_PER_DAY) {
            let problem = format!("{day} days are not {seconds:?} s");
            findings.add("Mappings/Retention", problem);
        }
    }
}

/// Everything at rest is encrypted.
pub fn encryption(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        for (id, kind, properties) in stack.all() {
            let is_encrypted = match kind {
                "AWS::SQS::Queue" => {
                    properties["SqsManagedSseEnabled"] == true
                        || !properties["KmsMasterKeyId"].is_null()
                }
                // CloudWatch may use no key that AWS manages.
                "AWS::SNS::Topic" if is_for_alarms(stack, id) => {
                    properties["KmsMasterKeyId"] != "alias/aws/sns"
                }
                "AWS::SNS::Topic" => !properties["KmsMasterKeyId"].is_null(),
                "AWS::S3::Bucket" => !properties["BucketEncryption"].is_null(),
                "AWS::EFS::FileSystem" => properties["Encrypted"] == true,
                "AWS::EC2::LaunchTemplate" => {
                    let mappings = list(&properties["LaunchTemplateData"]["BlockDeviceMappings"]);
                    !mappings.is_empty()
                        && mappings
                            .iter()
                            .all(|device| device["Ebs"]["Encrypted"] == true)
                }
                _ => true,
            };
            if !is_encrypted {
                findings.add(id, "is not encrypted at rest");
            }
        }
    })
}

fn is_for_alarms(stack: &Stack, topic: &str) -> bool {
    stack
        .of_type("AWS::CloudWatch::Alarm")
        .flat_map(|(_, alarm)| list(&alarm["AlarmActions"]))
        .any(|action| referred(action) == Some(topic))
}

/// Queues, topics, buckets and file systems refuse plain connections.
pub fn tls_only(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        for (kind, policy_kind, target) in [
            ("AWS::SQS::Queue", "AWS::SQS::QueuePolicy", "Queues"),
            ("AWS::SNS::Topic", "AWS::SNS::TopicPolicy", "Topics"),
            ("AWS::S3::Bucket", "AWS::S3::BucketPolicy", "Bucket"),
        ] {
            for (id, _) in stack.of_type(kind) {
                let is_denied = stack
                    .of_type(policy_kind)
                    .filter(|(_, policy)| {
                        list(&policy[target])
                            .into_iter()
                            .any(|one| referred(one) == Some(id))
                    })
                    .any(|(_, policy)| denies_plain(&policy["PolicyDocument"], Some(id)));
                if !is_denied {
                    findings.add(id, "no policy denies connections without TLS");
                }
            }
        }
        for (id, system) in stack.of_type("AWS::EFS::FileSystem") {
            if !denies_plain(&system["FileSystemPolicy"], None) {
                findings.add(id, "no policy denies connections without TLS");
            }
        }
        plain_mounts(stack, findings);
    })
}

fn denies_plain(document: &Value, resource: Option<&str>) -> bool {
    list(&document["Statement"]).into_iter().any(|statement| {
        let covers = resource.is_none_or(|id| {
            list(&statement["Resource"])
                .into_iter()
                .any(|one| referred(one) == Some(id))
        });
        let everybody = statement["Principal"] == "*" || statement["Principal"]["AWS"] == "*";
        statement["Effect"] == "Deny"
            && everybody
            && covers
            && statement["Condition"]["Bool"]["aws:SecureTransport"] == "false"
    })
}

fn plain_mounts(stack: &Stack, findings: &mut Findings) {
    for (id, task) in stack.of_type("AWS::ECS::TaskDefinition") {
        for volume in list(&task["Volumes"]) {
            let efs = &volume["EFSVolumeConfiguration"];
            if efs.is_null() {
                continue;
            }
            let is_safe = efs["TransitEncryption"] == "ENABLED"
                && efs["AuthorizationConfig"]["IAM"] == "ENABLED"
                && !efs["AuthorizationConfig"]["AccessPointId"].is_null();
            if !is_safe {
                findings.add(
                    id,
                    format!(
                        "volume {} is mounted without TLS, IAM or an access point",
                        volume["Name"]
                    ),
                );
            }
        }
    }
}
