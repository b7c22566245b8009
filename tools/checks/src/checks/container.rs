//! `gpu-task/Dockerfile`: what hadolint does not know.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::{Findings, Project};
use template::list;

/// Names of the variables that the Dockerfile's `ENV` instructions set.
pub fn variables(dockerfile: &str) -> BTreeSet<String> {
    let joined = dockerfile.replace("\\\n", " ");
    joined
        .lines()
        .filter_map(|line| line.trim().strip_prefix("ENV "))
        .flat_map(str::split_whitespace)
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// The health check runs the image's own program with a flag that it knows:
/// the image has no shell and no other program.
pub fn health_check(project: &Project, findings: &mut Findings) {
    let container = project
        .template
        .part("/Resources/TaskDefinition/Properties/ContainerDefinitions/0");
    let command: Vec<&str> = list(&container["HealthCheck"]["Command"])
        .into_iter()
        .filter_map(Value::as_str)
        .collect();
    let known = project.programs.of("gpu-task").literals;
    let entry_point = "/usr/local/bin/gpu-task";
    if command.first() != Some(&"CMD") || command.get(1) != Some(&entry_point) {
        let problem = format!("{command:?} must be CMD and {entry_point}: the image has no shell");
        findings.add("TaskDefinition", problem);
    }
    for flag in command
        .iter()
        .skip(2)
        .filter(|flag| !known.contains(flag.trim_start_matches("--")))
    {
        let problem = format!("gpu-task knows no {flag}");
        findings.add("TaskDefinition", problem);
    }
}

/// The images run as a fixed, unprivileged user, without a shell, from pinned
/// parts.
pub fn dockerfile(project: &Project, findings: &mut Findings) {
    const PLACE: &str = "gpu-task/Dockerfile";
    let text = &project.dockerfile;
    let mut fail = |problem: String| findings.add(PLACE, problem);
    for target in ["cpu", "cuda"] {
        if !text
            .lines()
            .any(|line| line.starts_with("FROM ") && line.ends_with(&format!(" AS {target}")))
        {
            fail(format!("has no target {target}"));
        }
    }
    let runtime = text.find(" AS runtime").map_or("", |at| &text[at..]);
    let user = runtime
        .lines()
        .find_map(|line| line.strip_prefix("USER "))
        .unwrap_or("root");
    if user.starts_with("root") || user.starts_with('0') {
        fail("the runtime stage must name a user that is not root".to_owned());
    }
    let expected = project
        .template
        .part("/Resources/TaskDefinition/Properties/ContainerDefinitions/0/User");
    if expected != user {
        fail(format!(
            "USER {user} is not the task definition's {expected}"
        ));
    }
    if !runtime.contains("ENTRYPOINT [\"") {
        fail("the entry point must be a program and not a shell".to_owned());
    }
    for line in text
        .lines()
        .filter(|line| line.contains("pip ") && !line.trim_start().starts_with('#'))
    {
        if !line.contains("--require-hashes") {
            fail(format!("pip without --require-hashes: {}", line.trim()));
        }
    }
    for line in text
        .lines()
        .filter(|line| line.starts_with("ARG ") && line.contains("_IMAGE="))
    {
        let pins_version = line
            .split_once('=')
            .is_some_and(|(_, image)| image.contains(':') || image.contains('@'));
        if !pins_version || line.ends_with(":latest") {
            fail(format!("{line}: a base image needs a version or digest"));
        }
    }
    for (name, reason) in [
        (
            "NVIDIA_DRIVER_CAPABILITIES",
            "must be compute,utility, or no driver library is mounted",
        ),
        (
            "ORT_DISABLE_TELEMETRY",
            "must be 1: ONNX Runtime sends events when it is loaded, before a program can refuse",
        ),
    ] {
        if !variables(text).contains(name) {
            fail(format!("{name} {reason}"));
        }
    }
}
