//! The express lane: nothing is lost between its queues, and off it leaves no
//! trace.

use serde_json::Value;

use super::storage::container_variable;
use super::{LEAST, REQUIRED, in_each_stack};
use crate::{Findings, Project};
use template::{NotDeployed, Stack, list, number, referred};

/// What the lane brings, and what it changes.
const BRINGS: &[&str] = &[
    "ExpressErrorsAlarm",
    "ExpressFunction",
    "ExpressLogGroup",
    "ExpressMapping",
    "ExpressRole",
    "GpuQueue",
    "GpuQueuePolicy",
    "OnnxRuntimeLayer",
];
const CHANGES: &[&str] = &[
    "Dashboard",
    "InputQueue",
    "ScalerFunction",
    "ScalerRole",
    "TaskDefinition",
    "TaskRole",
];

/// What the lane cannot do gets to a GPU, and is counted and told as it is.
pub fn deliveries(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        let mapping = stack.properties("ExpressMapping");
        if mapping.is_null() {
            return;
        }
        let function = stack.properties("ExpressFunction");
        let told = &function["Environment"]["Variables"];
        let (input, gpu) = (stack.properties("InputQueue"), stack.properties("GpuQueue"));
        let next = |queue: &Value| {
            referred(&queue["RedrivePolicy"]["deadLetterTargetArn"]).map(str::to_owned)
        };
        let receives =
            |queue: &Value| number(&queue["RedrivePolicy"]["maxReceiveCount"]).unwrap_or_default();
        let container = &stack.properties("TaskDefinition")["ContainerDefinitions"][0];
        let task = container_variable(container, "GPU_QUEUE_URL");
        let rules = [
            (
                next(input).as_deref() == Some("GpuQueue"),
                "InputQueue",
                "what the lane fails at must get to the GPU queue",
            ),
            (
                next(gpu).as_deref() == Some("DeadLetterQueue"),
                "GpuQueue",
                "has no dead-letter queue",
            ),
            (
                receives(gpu) >= receives(input) + 4.0,
                "GpuQueue",
                "a message keeps its receive count: maxReceiveCount must leave tasks four deliveries",
            ),
            (
                task.and_then(referred) == Some("GpuQueue"),
                "TaskDefinition",
                "GPU_QUEUE_URL is not the queue that nobody else reads",
            ),
            (
                referred(&told["GPU_QUEUE_URL"]) == Some("GpuQueue"),
                "ExpressFunction",
                "GPU_QUEUE_URL is not the queue that tasks read",
            ),
            (
                number(&told["VISIBILITY_TIMEOUT_SECONDS"]) == number(&input["VisibilityTimeout"]),
                "ExpressFunction",
                "VISIBILITY_TIMEOUT_SECONDS is not the input queue's",
            ),
            (
                number(&told["BATCH_SIZE"]) == number(&mapping["BatchSize"]),
                "ExpressFunction",
                "BATCH_SIZE is not the mapping's",
            ),
            (
                list(&mapping["FunctionResponseTypes"])
                    .contains(&&Value::from("ReportBatchItemFailures")),
                "ExpressMapping",
                "one message that fails would bring its whole batch back",
            ),
            (
                function["ReservedConcurrentExecutions"].is_null(),
                "ExpressFunction",
                "what reserved concurrency throttles counts as received: MaximumConcurrency is the limit",
            ),
        ];
        for (_, place, problem) in rules.into_iter().filter(|(holds, ..)| !holds) {
            findings.add(place, problem);
        }
    })
}

/// Without the lane the stack is as if there were none.
pub fn off(project: &Project, findings: &mut Findings) {
    let resolve = |lane: &str| {
        let least = LEAST.iter().filter(|(name, _)| *name != "ExpressLane");
        let given = REQUIRED.iter().chain(least).copied();
        let given = given.chain([("ExpressLane", lane)]);
        let given = given.map(|(name, value)| (name.to_owned(), value.to_owned()));
        project.template.resolve(&given.collect(), &NotDeployed)
    };
    let (Ok(on), Ok(off)) = (resolve("on"), resolve("off")) else {
        return findings.add("template", "cannot be resolved");
    };
    for place in traces(&off) {
        findings.add(place, "knows of the lane, which is off");
    }
    for (id, resource) in &on.resources {
        let same = off.resources.get(id).map(|one| &one.properties);
        let is_known = BRINGS.contains(&id.as_str()) || CHANGES.contains(&id.as_str());
        if same != Some(&resource.properties) && !is_known {
            findings.add(id, "differs with the lane");
        }
    }
}

fn traces(stack: &Stack) -> Vec<&str> {
    let is_trace = |id: &str, properties: &Value| {
        let text = properties.to_string();
        let words = ["GPU_QUEUE", "EXPRESS_", "express lane"];
        BRINGS.contains(&id) || BRINGS.iter().chain(&words).any(|word| text.contains(word))
    };
    let all = stack.resources.iter();
    all.filter(|(id, resource)| is_trace(id, &resource.properties))
        .map(|(id, _)| id.as_str())
        .collect()
}
