//! Environment variables: what a program reads, its deployment sets, and the
//! other way round.

use std::collections::BTreeSet;

use super::{container, in_each_stack};
use crate::{Findings, Project};
use template::{Stack, list};

/// Read by the AWS SDK and its runtime, not by a program.
const READ_BY_THE_SDK: &[&str] = &["AWS_REGION"];

/// Read by the dynamic linker, NVIDIA's container runtime and ONNX Runtime.
const READ_BY_THE_SYSTEM: &[&str] = &[
    "ORT_DISABLE_TELEMETRY",
    "LD_LIBRARY_PATH",
    "NVIDIA_DRIVER_CAPABILITIES",
    "NVIDIA_VISIBLE_DEVICES",
];

/// Read by a program, but not for the template to set, and why.
const NOT_SET: &[(&str, &str)] = &[
    ("AWS_ENDPOINT_URL", "set only against an emulator"),
    ("AWS_ENDPOINT_URL_S3", "set only against an emulator"),
    ("AWS_LAMBDA_RUNTIME_API", "set by Lambda"),
    ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "set by Lambda"),
    (
        "MODEL_PATH",
        "instead of MODEL_URI, for a bundle that is part of the image",
    ),
];

/// Set only with what they belong to: the express lane, a daily ceiling.
const OPTIONAL: &[&str] = &["EXPRESS_", "GPU_QUEUE_URL", "MAX_DAILY_COST", "PRICE_"];

/// Every variable that a program reads is set, and every one that is set is read.
pub fn variables(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        for (program, place, set) in deployed(stack, project) {
            let read = project.programs.of(program).variables;
            for name in &read {
                let is_off = stack.name != "everything on"
                    && OPTIONAL.iter().any(|prefix| name.starts_with(prefix));
                let is_exempt = is_off || NOT_SET.iter().any(|(exempt, _)| exempt == name);
                if !set.contains(name) && !is_exempt {
                    findings.add(place, format!("{program} reads {name}, which is not set"));
                }
            }
            // A name that goes through a function of the program's own is a literal.
            let literals = project.programs.of(program).literals;
            for name in &set {
                let known = READ_BY_THE_SDK.contains(&name.as_str())
                    || READ_BY_THE_SYSTEM.contains(&name.as_str());
                if !read.contains(name) && !literals.contains(name) && !known {
                    findings.add(
                        place,
                        format!("{name} is set, but {program} does not read it"),
                    );
                }
            }
        }
    })
}

fn deployed(
    stack: &Stack,
    project: &Project,
) -> Vec<(&'static str, &'static str, BTreeSet<String>)> {
    let of_function = |id: &str| -> BTreeSet<String> {
        let variables = stack.properties(id)["Environment"]["Variables"].as_object();
        variables
            .into_iter()
            .flatten()
            .map(|(name, _)| name.clone())
            .collect()
    };
    let task = stack.properties("TaskDefinition");
    let mut of_task: BTreeSet<String> = list(&task["ContainerDefinitions"])
        .into_iter()
        .flat_map(|container| list(&container["Environment"]))
        .filter_map(|entry| entry["Name"].as_str())
        .map(str::to_owned)
        .collect();
    of_task.extend(container::variables(&project.dockerfile));
    let express = stack
        .resources
        .contains_key("ExpressFunction")
        .then(|| ("express", "ExpressFunction", of_function("ExpressFunction")));
    let mut deployed = vec![
        ("intake", "IntakeFunction", of_function("IntakeFunction")),
        ("scaler", "ScalerFunction", of_function("ScalerFunction")),
        ("gpu-task", "TaskDefinition", of_task),
    ];
    deployed.extend(express);
    deployed
}
