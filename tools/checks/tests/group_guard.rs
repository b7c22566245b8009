//! The function in the template that keeps Auto Scaling groups from
//! rebalancing and releases their instances when the stack is deleted, run
//! under plain Python with a stand-in for AWS.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use template::Template;

/// Stand-ins for `boto3` and `cfnresponse`; `GROUPS` is the account. A group's
/// unprotected instances are gone at the next look, as with a capacity of 0.
const FAKES: &str = r#"
import json, sys, types

class AutoScaling:
    calls = []
    def describe_auto_scaling_groups(self, AutoScalingGroupNames):
        found = [GROUPS[n] for n in AutoScalingGroupNames if n in GROUPS]
        answer = json.loads(json.dumps({"AutoScalingGroups": found}))
        for group in found:
            for instance in group["Instances"]:
                if instance["LifecycleState"] == "Pending":
                    instance["LifecycleState"] = "InService"
            group["Instances"] = [i for i in group["Instances"] if i["ProtectedFromScaleIn"]]
        return answer
    def update_auto_scaling_group(self, AutoScalingGroupName, **change):
        self.calls.append(["update", AutoScalingGroupName, change])
    def set_instance_protection(self, AutoScalingGroupName, InstanceIds, ProtectedFromScaleIn):
        assert 0 < len(InstanceIds) <= 50, "SetInstanceProtection takes at most 50 instances"
        assert ProtectedFromScaleIn is False
        for instance in GROUPS[AutoScalingGroupName]["Instances"]:
            if instance["InstanceId"] in InstanceIds:
                assert instance["LifecycleState"] == "InService", "only instances in service can be changed"
                instance["ProtectedFromScaleIn"] = False
        self.calls.append(["unprotect", AutoScalingGroupName, len(InstanceIds)])
    refusals = 0
    def suspend_processes(self, AutoScalingGroupName, ScalingProcesses):
        if AutoScaling.refusals > 0:
            AutoScaling.refusals -= 1
            raise PermissionError("AccessDenied")
        self.calls.append(["suspend", AutoScalingGroupName, ScalingProcesses])

answers = []
sys.modules["boto3"] = types.SimpleNamespace(client=lambda name: AutoScaling())
sys.modules["cfnresponse"] = types.SimpleNamespace(
    SUCCESS="SUCCESS", FAILED="FAILED",
    send=lambda event, context, status, data, id, reason=None: answers.append([status, id, reason]))
import time
time.sleep = lambda seconds: None
class Context:
    left = 10
    def get_remaining_time_in_millis(self):
        self.left -= 1
        return self.left * 100000

def group(*instances):
    return {"Instances": [
        {"InstanceId": "i-%d" % n, "LifecycleState": state, "ProtectedFromScaleIn": True}
        for n, state in enumerate(instances)]}
"#;

/// Runs the function on `event` in an account of `groups` (Python), and
/// answers its calls and answers.
fn run(groups: &str, event: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../infra/template.yaml");
    let text = std::fs::read_to_string(path).expect("the template can be read");
    let template = Template::parse(&text).expect("the template can be parsed");
    let code = template
        .part("/Resources/GroupGuardFunction/Properties/Code/ZipFile")
        .as_str()
        .expect("the function's code is in the template");
    let program = format!(
        "{FAKES}\nGROUPS = {groups}\n{code}\nhandler({event}, Context())\n\
         print(json.dumps([AutoScaling.calls, answers]))\n"
    );
    let mut python = Command::new("python3")
        .arg("-")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("python3 starts");
    let mut input = python.stdin.take().expect("python3 has an input");
    input.write_all(program.as_bytes()).expect("python3 reads");
    drop(input);
    let output = python.wait_with_output().expect("python3 ends");
    assert!(output.status.success());
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[test]
fn a_new_stack_suspends_rebalancing() {
    let seen = run(
        "{'a': group(), 'b': group('InService')}",
        r#"{"RequestType": "Create", "ResourceProperties": {"Groups": ["a"]}}"#,
    );
    assert_eq!(
        seen,
        r#"[[["suspend", "a", ["AZRebalance"]]], [["SUCCESS", "group-guard", null]]]"#
    );
}

#[test]
fn a_role_that_is_not_in_force_yet_is_waited_for() {
    let event = r#"{"RequestType": "Create", "ResourceProperties": {"Groups": ["a"]}}"#;
    let seen = run("{'a': group()}; AutoScaling.refusals = 3", event);
    assert!(
        seen.contains(r#"["SUCCESS", "group-guard", null]"#),
        "{seen}"
    );
    let seen = run("{'a': group()}; AutoScaling.refusals = 4", event);
    assert!(
        seen.contains(r#"["FAILED", "group-guard", "AccessDenied"]"#),
        "{seen}"
    );
}

#[test]
fn deletion_first_stops_launches_then_releases_every_instance() {
    let seen = run(
        "{'a': group(*(['InService'] * 60 + ['Pending']))}",
        r#"{"RequestType": "Delete", "ResourceProperties": {"Groups": ["a"]}}"#,
    );
    let stops = r#"["update", "a", {"MinSize": 0, "MaxSize": 0, "DesiredCapacity": 0, "NewInstancesProtectedFromScaleIn": false}]"#;
    let releases = r#"["unprotect", "a", 50], ["unprotect", "a", 11]"#;
    assert_eq!(
        seen,
        format!(r#"[[{stops}, {releases}], [["SUCCESS", "group-guard", null]]]"#)
    );
}

#[test]
fn an_option_that_an_update_takes_out_is_released() {
    let seen = run(
        "{'a': group(), 'b': group('InService')}",
        r#"{"RequestType": "Update", "ResourceProperties": {"Groups": ["a"]},
            "OldResourceProperties": {"Groups": ["a", "b"]}}"#,
    );
    assert!(seen.contains(r#"["unprotect", "b", 1]"#), "{seen}");
    assert!(
        seen.contains(r#"["suspend", "a", ["AZRebalance"]]"#),
        "{seen}"
    );
    assert!(!seen.contains(r#"["update", "a""#), "{seen}");
}

#[test]
fn a_group_that_is_gone_does_not_keep_the_stack() {
    let seen = run(
        "{}",
        r#"{"RequestType": "Delete", "ResourceProperties": {"Groups": ["a"]}}"#,
    );
    assert_eq!(seen, r#"[[], [["SUCCESS", "group-guard", null]]]"#);
}

#[test]
fn instances_that_stay_protected_are_named() {
    let stuck = "{'a': {'Instances': [{'InstanceId': 'i', 'LifecycleState': 'Standby', 'ProtectedFromScaleIn': True}]}}";
    let seen = run(
        stuck,
        r#"{"RequestType": "Delete", "ResourceProperties": {"Groups": ["a"]}}"#,
    );
    assert!(
        seen.contains(r#"["FAILED", "group-guard", "instances of a are still protected"]"#),
        "{seen}"
    );
}
