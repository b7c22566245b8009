//! What each role may do: what its program calls, and nothing more.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::in_each_stack;
use crate::{Findings, Project};
use template::{Stack, list, referred};

/// The IAM actions behind each SDK operation, by the service authorisation
/// reference. An operation that is not here is reported.
const ACTIONS: &str = "
    change_message_visibility: sqs:ChangeMessageVisibility
    change_message_visibility_batch: sqs:ChangeMessageVisibility
    create_or_update_tags: autoscaling:CreateOrUpdateTags
    delete_message: sqs:DeleteMessage
    delete_message_batch: sqs:DeleteMessage
    delete_object: s3:DeleteObject
    delete_objects: s3:DeleteObject
    describe_auto_scaling_groups: autoscaling:DescribeAutoScalingGroups
    describe_container_instances: ecs:DescribeContainerInstances
    describe_scaling_activities: autoscaling:DescribeScalingActivities
    describe_tasks: ecs:DescribeTasks
    describe_warm_pool: autoscaling:DescribeWarmPool
    get_event_source_mapping: lambda:GetEventSourceMapping
    get_function_concurrency: lambda:GetFunctionConcurrency
    get_metric_data: cloudwatch:GetMetricData
    # Without ListBucket S3 answers 403 for an object that is gone.
    get_object: s3:GetObject s3:ListBucket
    get_queue_attributes: sqs:GetQueueAttributes
    head_object: s3:GetObject s3:ListBucket
    invoke: lambda:InvokeFunction
    list_container_instances: ecs:ListContainerInstances
    list_objects_v2: s3:ListBucket
    list_tasks: ecs:ListTasks
    publish: sns:Publish
    publish_batch: sns:Publish
    put_events: events:PutEvents
    put_object: s3:PutObject
    receive_message: sqs:ReceiveMessage
    # The task's two roles are handed over.
    run_task: ecs:RunTask iam:PassRole
    send_message: sqs:SendMessage
    send_message_batch: sqs:SendMessage
    set_desired_capacity: autoscaling:SetDesiredCapacity
    stop_task: ecs:StopTask
    terminate_instance_in_auto_scaling_group: autoscaling:TerminateInstanceInAutoScalingGroup
    update_event_source_mapping: lambda:UpdateEventSourceMapping
    update_container_instances_state: ecs:UpdateContainerInstancesState
";

/// Allowed although no code of ours calls it: role, action, why.
const BY_THE_PLATFORM: &str = "
    IntakeRole logs:CreateLogStream: Lambda writes the function's log
    IntakeRole logs:PutLogEvents: Lambda writes the function's log
    IntakeRole sqs:ReceiveMessage: Lambda polls the notification queue
    IntakeRole sqs:DeleteMessage: Lambda polls the notification queue
    IntakeRole sqs:GetQueueAttributes: Lambda polls the notification queue
    IntakeRole kms:Decrypt: encrypted queues, topic, bucket and images
    IntakeRole kms:GenerateDataKey: encrypted queues and topic
    ScalerRole logs:CreateLogStream: Lambda writes the function's log
    ScalerRole logs:PutLogEvents: Lambda writes the function's log
    ScalerRole kms:Decrypt: the function's encrypted environment
    ExpressRole logs:CreateLogStream: Lambda writes the function's log
    ExpressRole logs:PutLogEvents: Lambda writes the function's log
    ExpressRole kms:Decrypt: encrypted queues, topic, bucket, images and environment
    ExpressRole kms:GenerateDataKey: encrypted queues, topic and bucket
    TaskRole elasticfilesystem:ClientMount: ECS mounts the model cache
    TaskRole elasticfilesystem:ClientWrite: the model cache is filled by the first task
    TaskRole kms:Decrypt: encrypted queues, topic, bucket and images
    TaskRole kms:GenerateDataKey: encrypted queues, topic and bucket
";

/// Programs and the roles that they run under.
const ROLES: &[(&str, &str)] = &[
    ("intake", "IntakeRole"),
    ("scaler", "ScalerRole"),
    ("gpu-task", "TaskRole"),
    ("express", "ExpressRole"),
];

/// Actions without a resource level in the service authorisation reference,
/// or with none that is known beforehand. They alone may say `Resource: "*"`.
const WITHOUT_RESOURCE_LEVEL: &[&str] = &[
    "autoscaling:DescribeAutoScalingGroups",
    "autoscaling:DescribeScalingActivities",
    "autoscaling:DescribeWarmPool",
    "cloudwatch:GetMetricData",
    "ecr:GetAuthorizationToken",
    "ecs:DiscoverPollEndpoint",
    // Restricted by the condition ecs:cluster instead.
    "ecs:ListTasks",
    "ssm:UpdateInstanceInformation",
    "ssmmessages:CreateControlChannel",
    "ssmmessages:CreateDataChannel",
    "ssmmessages:OpenControlChannel",
    "ssmmessages:OpenDataChannel",
];

/// Every API call in the code is allowed by its role, and nothing more.
pub fn api_calls(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        // Outputs that are off take their permissions with them.
        let is_full = stack.name == "everything on";
        for (program, role) in ROLES {
            let needed = needed_actions(project, program);
            let allowed = allowed_actions(stack, role);
            for (action, operations) in &needed {
                if is_full && !allowed.contains(action) {
                    let problem = format!("{program} calls {operations:?}, but may not {action}");
                    findings.add(*role, problem);
                }
            }
            for action in &allowed {
                let entry = format!("{role} {action}: ");
                let mut lines = BY_THE_PLATFORM.lines();
                let by_platform = lines.any(|line| line.trim().starts_with(&entry));
                if !needed.contains_key(action) && !by_platform {
                    let problem = format!("{action} is allowed, but {program} never does it");
                    findings.add(*role, problem);
                }
            }
        }
    });
    for (program, _) in ROLES {
        let facts = project.programs.of(program);
        for call in &facts.unknown_calls {
            findings.add(*program, format!("which API call is this? {call}"));
        }
        for operation in &facts.operations {
            if actions_of(operation).is_none() {
                let problem = format!(
                    "calls {operation}, whose IAM actions are not in the table of this check"
                );
                findings.add(*program, problem);
            }
        }
    }
}

fn actions_of(operation: &str) -> Option<impl Iterator<Item = &'static str>> {
    let of_line = |line: &'static str| line.trim().strip_prefix(operation)?.strip_prefix(": ");
    ACTIONS
        .lines()
        .find_map(of_line)
        .map(|line| line.split(' '))
}

fn needed_actions(project: &Project, program: &str) -> BTreeMap<String, Vec<String>> {
    let mut needed: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for operation in project.programs.of(program).operations {
        for action in actions_of(&operation).into_iter().flatten() {
            let operations = needed.entry(action.to_owned()).or_default();
            operations.push(operation.clone());
        }
    }
    needed
}

/// The statements of a role: its own and those of policies attached to it.
fn statements<'a>(stack: &'a Stack, role: &str) -> Vec<&'a Value> {
    let own = list(&stack.properties(role)["Policies"]).into_iter();
    let attached = stack
        .of_type("AWS::IAM::Policy")
        .filter(|(_, policy)| {
            list(&policy["Roles"])
                .into_iter()
                .any(|one| referred(one) == Some(role))
        })
        .map(|(_, policy)| policy);
    own.chain(attached)
        .flat_map(|policy| list(&policy["PolicyDocument"]["Statement"]))
        .collect()
}

fn allowed_actions(stack: &Stack, role: &str) -> BTreeSet<String> {
    statements(stack, role)
        .into_iter()
        .filter(|statement| statement["Effect"] == "Allow")
        .flat_map(|statement| list(&statement["Action"]))
        .filter_map(|action| action.as_str().map(str::to_owned))
        .collect()
}

/// No action with a wildcard; `Resource: "*"` only where the API leaves no
/// choice, and then with a comment.
pub fn wildcards(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        let mut policies: Vec<(String, &Value)> = Vec::new();
        for (id, kind, properties) in stack.all() {
            let is_policy = matches!(kind, "AWS::IAM::Policy" | "AWS::IAM::ManagedPolicy");
            if kind == "AWS::IAM::Role" {
                if !properties["ManagedPolicyArns"].is_null() {
                    findings.add(id, "managed policies allow more than is needed");
                }
                policies.extend(
                    list(&properties["Policies"])
                        .into_iter()
                        .map(|one| (id.to_owned(), &one["PolicyDocument"])),
                );
            } else if is_policy {
                policies.push((id.to_owned(), &properties["PolicyDocument"]));
            }
        }
        for (id, document) in policies {
            for statement in list(&document["Statement"]) {
                statement_findings(&id, statement, findings);
            }
        }
    });
    uncommented_wildcards(&project.template.text, findings);
}

fn statement_findings(id: &str, statement: &Value, findings: &mut Findings) {
    if statement["Effect"] != "Allow" {
        return;
    }
    if !statement["NotAction"].is_null() || !statement["NotResource"].is_null() {
        findings.add(id, "NotAction and NotResource allow what nobody listed");
    }
    let resources = list(&statement["Resource"]);
    // Events name buckets: which ones may be read is for the template to say.
    let is_anything = resources.iter().any(|resource| {
        let text = resource.as_str().or(resource["Fn::Sub"].as_str());
        text.is_some_and(|text| text == "*" || text.contains(":s3:::*"))
    });
    if resources.is_empty() {
        findings.add(id, "a statement without a resource");
    }
    for action in list(&statement["Action"])
        .into_iter()
        .filter_map(Value::as_str)
    {
        if action.contains('*') {
            findings.add(id, format!("{action} is a wildcard: name the actions"));
        }
        if is_anything && !WITHOUT_RESOURCE_LEVEL.contains(&action) {
            findings.add(
                id,
                format!("{action} has a resource level: name the resource"),
            );
        }
    }
}

/// Every `Resource: "*"` in the text has its reason on the line above.
fn uncommented_wildcards(text: &str, findings: &mut Findings) {
    let lines: Vec<&str> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        let is_wildcard = line.trim() == r#"Resource: "*""#;
        let has_reason = index > 0 && lines[index - 1].trim().starts_with('#');
        if is_wildcard && !has_reason {
            findings.add(
                format!("infra/template.yaml:{}", index + 1),
                "a comment must say why the resource is a wildcard",
            );
        }
    }
}

/// No ARN or host name that is right in one partition only.
pub fn literals(project: &Project, findings: &mut Findings) {
    for (index, line) in project.template.text.lines().enumerate() {
        let code = line.split(" #").next().unwrap_or_default();
        // The mapping of partitions to consoles.
        let is_mapped = code.contains("{ Domain: console.");
        let is_service_principal = code.contains("Service:") || code.contains("PassedToService");
        let problem = if code.contains("arn:aws:") || code.contains("arn:aws-") {
            "an ARN of one partition: write arn:${AWS::Partition}:"
        } else if (code.contains(".amazonaws.com") || code.contains(".aws.amazon.com"))
            && !is_service_principal
            && !is_mapped
            && !code.trim_start().starts_with('#')
            && !code.contains("Principal: ")
        {
            "a host name of one partition: write ${AWS::URLSuffix}"
        } else {
            continue;
        };
        findings.add(format!("infra/template.yaml:{}", index + 1), problem);
    }
}
