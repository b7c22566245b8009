//! Alarms, dashboard, logs and the functions' own settings.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::{Choice, SYNTHESISED, in_each_stack};
use crate::{Findings, Project};
use template::{Stack, list, number, referred};

/// Where the programs' own metrics go.
const NAMESPACE: &str = "ClipImageProcessor";

/// What somebody must be told of: an alarm's metric, and what it means.
const REQUIRED_ALARMS: &[(&str, &str)] = &[
    (
        "ApproximateNumberOfMessagesVisible",
        "the dead-letter queue is not empty",
    ),
    (
        "ApproximateAgeOfOldestMessage",
        "the oldest message is too old",
    ),
    ("Errors", "the scaler fails"),
    ("CapacityShortage", "instances cannot be launched"),
    ("FailedActions", "what the scaler does fails"),
    ("CrashLoop", "tasks crash in a loop"),
    ("TasksWanted", "the maximum is reached for long"),
    ("Instances", "instances stand and nothing is done"),
];

/// Longest time-out of a Lambda function.
const FUNCTION_TIMEOUT_MAX_SECONDS: f64 = 900.0;

/// The alarms that must be there are; every metric of our own that an alarm or
/// the dashboard shows is emitted by a program.
pub fn alarms_and_dashboard(project: &Project, findings: &mut Findings) {
    let emitted: BTreeSet<String> = project
        .programs
        .0
        .values()
        .flat_map(|facts| facts.literals.iter().cloned())
        .collect();
    in_each_stack(project, findings, |stack, findings| {
        let mut watched = BTreeSet::new();
        for (id, alarm) in stack.of_type("AWS::CloudWatch::Alarm") {
            let computed = list(&alarm["Metrics"])
                .into_iter()
                .map(|one| &one["MetricStat"]["Metric"])
                .filter(|metric| !metric.is_null());
            let simple = Some(alarm).filter(|alarm| !alarm["MetricName"].is_null());
            for source in computed.chain(simple) {
                let metric = source["MetricName"].as_str().unwrap_or_default();
                watched.insert(metric);
                if source["Namespace"] == NAMESPACE && !emitted.contains(metric) {
                    findings.add(id, format!("no program emits {metric}"));
                }
                for dimension in list(&source["Dimensions"]) {
                    let name = dimension["Name"].as_str().unwrap_or_default();
                    if source["Namespace"] == NAMESPACE && !emitted.contains(name) {
                        findings.add(id, format!("no metric has the dimension {name}"));
                    }
                }
            }
            let is_told = !list(&alarm["AlarmActions"]).is_empty()
                && (alarm["TreatMissingData"] != "missing"
                    || !list(&alarm["InsufficientDataActions"]).is_empty());
            if stack.name == "everything on" && !is_told {
                findings.add(id, "reaches nobody");
            }
            if alarm["TreatMissingData"].is_null() {
                findings.add(id, "must say what missing data means (TreatMissingData)");
            }
        }
        for (metric, meaning) in REQUIRED_ALARMS {
            if !watched.contains(metric) {
                findings.add("alarms", format!("none tells that {meaning} ({metric})"));
            }
        }
        for (id, dashboard) in stack.of_type("AWS::CloudWatch::Dashboard") {
            dashboard_findings(id, &dashboard["DashboardBody"], &emitted, findings);
        }
    })
}

fn dashboard_findings(id: &str, body: &Value, emitted: &BTreeSet<String>, findings: &mut Findings) {
    let text = body
        .as_str()
        .or_else(|| body["Fn::Sub"].as_str())
        .unwrap_or_default();
    let Ok(board) = serde_json::from_str::<Value>(text) else {
        return findings.add(id, "its body is no JSON");
    };
    for widget in list(&board["widgets"]) {
        for metric in list(&widget["properties"]["metrics"]) {
            let is_own = metric[0] == NAMESPACE;
            let names = list(metric).into_iter().skip(1).filter_map(Value::as_str);
            for name in names.filter(|name| is_own && !name.starts_with("${")) {
                if !emitted.contains(name) {
                    let problem =
                        format!("{}: no program emits {name}", widget["properties"]["title"]);
                    findings.add(id, problem);
                }
            }
        }
    }
}

/// Logs are kept for a time, not for ever, and every function has its group.
pub fn log_groups(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        for (id, group) in stack.of_type("AWS::Logs::LogGroup") {
            if number(&group["RetentionInDays"]).is_none() {
                findings.add(id, "keeps its logs for ever");
            }
        }
        for (id, function) in all_functions(stack) {
            if referred(&function["LoggingConfig"]["LogGroup"]).is_none() {
                findings.add(id, "writes to a log group that is not in the template");
            }
        }
    })
}

fn all_functions(stack: &Stack) -> impl Iterator<Item = (&str, &Value)> {
    stack
        .of_type("AWS::Serverless::Function")
        .chain(stack.of_type("AWS::Lambda::Function"))
}

/// Time-outs within Lambda's limits, no asynchronous event lost, one scaler.
pub fn functions(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, function_findings)
}

fn function_findings(stack: &Choice, findings: &mut Findings) {
    for (id, function) in all_functions(stack) {
        let timeout = number(&function["Timeout"]);
        if timeout.is_none_or(|seconds| !(1.0..=FUNCTION_TIMEOUT_MAX_SECONDS).contains(&seconds)) {
            findings.add(id, format!("Timeout {timeout:?} must be 1 to 900 s"));
        }
    }
    let keeps_failures = stack
        .of_type("AWS::Lambda::EventInvokeConfig")
        .any(|(_, config)| {
            referred(&config["FunctionName"]) == Some("IntakeFunction")
                && !config["DestinationConfig"]["OnFailure"]["Destination"].is_null()
        });
    if !keeps_failures {
        findings.add(
            "IntakeFunction",
            "an event that fails three times is lost: no OnFailure destination",
        );
    }
    for (id, rule) in stack.of_type("AWS::Events::Rule") {
        for target in list(&rule["Targets"]) {
            let to = referred(&target["Arn"]).unwrap_or_default();
            let is_permitted = stack
                .of_type("AWS::Lambda::Permission")
                .any(|(_, permission)| {
                    referred(&permission["FunctionName"]) == Some(to)
                        && referred(&permission["SourceArn"]) == Some(id)
                        && permission["Principal"] == "events.amazonaws.com"
                });
            if !is_permitted {
                findings.add(id, format!("may not invoke {to}"));
            }
            if to == "IntakeFunction" && target["DeadLetterConfig"]["Arn"].is_null() {
                findings.add(
                    id,
                    "an event that cannot be delivered is lost: no DeadLetterConfig",
                );
            }
        }
    }
    let reserved = number(&stack.properties("ScalerFunction")["ReservedConcurrentExecutions"]);
    let wanted = matches!(stack.name, "everything on" | SYNTHESISED).then_some(1.0);
    if reserved != wanted {
        findings.add("ScalerFunction", format!(
                "ReservedConcurrentExecutions is {reserved:?} and must be {wanted:?}: a new account can reserve none"
            ));
    }
}

/// The largest MaxInstances that the template's rules compare with MinInstances.
const LARGEST_RULED_MAXIMUM: usize = 9;

/// A minimum above the maximum is refused before anything is made.
pub fn rules(project: &Project, findings: &mut Findings) {
    let written: BTreeSet<String> = list(
        project
            .template
            .part("/Rules/MinimumWithinMaximum/Assertions"),
    )
    .into_iter()
    .map(|assertion| assertion["Assert"].to_string())
    .collect();
    for maximum in 1..=LARGEST_RULED_MAXIMUM {
        let minima: Vec<String> = (0..=maximum).map(|minimum| minimum.to_string()).collect();
        let assertion = json!({"Fn::Or": [
            {"Fn::Not": [{"Fn::Equals": [{"Ref": "MaxInstances"}, maximum.to_string()]}]},
            {"Fn::Contains": [minima, {"Ref": "MinInstances"}]},
        ]});
        if !written.contains(&assertion.to_string()) {
            let problem = format!("takes any MinInstances for MaxInstances {maximum}");
            findings.add("MinimumWithinMaximum", problem);
        }
    }
}

/// Every parameter is explained in the README and grouped for the console.
pub fn parameters(project: &Project, findings: &mut Findings) {
    let groups = project
        .template
        .part("/Metadata/AWS::CloudFormation::Interface/ParameterGroups");
    let grouped: BTreeSet<&str> = list(groups)
        .into_iter()
        .flat_map(|group| list(&group["Parameters"]))
        .filter_map(Value::as_str)
        .collect();
    let parameters = project.template.part("/Parameters").as_object();
    for (name, parameter) in parameters.into_iter().flatten() {
        let description = parameter["Description"].as_str().unwrap_or_default().trim();
        let mut fail = |problem: &str| findings.add(name.as_str(), problem);
        if description.is_empty() {
            fail("has no description");
        }
        if !grouped.contains(name.as_str()) {
            fail("is in no group of Metadata: the console would show it last");
        }
        let is_explained = project
            .readme
            .lines()
            .any(|line| line.starts_with(&format!("| `{name}` |")) && line.contains(description));
        if !is_explained {
            fail("infra/README.md does not list it with its description");
        }
    }
}
