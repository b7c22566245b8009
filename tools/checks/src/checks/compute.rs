//! Auto Scaling groups, instances and tasks.

use std::collections::BTreeSet;

use serde_json::Value;

use super::in_each_stack;
use super::storage::container_variable;
use crate::{Findings, Project};
use template::{Stack, list, number, referred};

/// Longest stop timeout: Fargate's limit, and the two minutes' notice of a
/// Spot interruption (ECS developer guide, task definition parameters).
const STOP_TIMEOUT_MAX_SECONDS: f64 = 120.0;

/// Shortest stop timeout that ECS accepts.
const STOP_TIMEOUT_MIN_SECONDS: f64 = 2.0;

/// What the smallest instance type on offer (g4dn.xlarge, 16 GiB) registers
/// with ECS, less 512 MiB for the agent and the system.
const TASK_MEMORY_MAX_MIB: f64 = 15.0 * 1024.0;

/// Groups start from zero, belong to the scaler alone, and never keep a stack
/// from being deleted.
pub fn auto_scaling_groups(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        let maximum =
            stack.properties("ScalerFunction")["Environment"]["Variables"]["MAX_INSTANCES"].clone();
        let guarded = guarded_groups(stack);
        for (id, group) in stack.of_type("AWS::AutoScaling::AutoScalingGroup") {
            let mut fail = |problem: &str| findings.add(id, problem);
            if number(&group["MinSize"]) != Some(0.0) {
                fail("MinSize must be 0: the scaler keeps the minimum, over all groups");
            }
            if !group["DesiredCapacity"].is_null() {
                fail(
                    "DesiredCapacity must not be set: every stack update would reset what the scaler asked for",
                );
            }
            if number(&group["MaxSize"]) != number(&maximum) {
                fail("MaxSize must be MAX_INSTANCES");
            }
            if group["NewInstancesProtectedFromScaleIn"] != true {
                fail(
                    "new instances must be protected from scale-in: a lower DesiredCapacity could end a working one",
                );
            } else if !guarded.contains(id) {
                fail(
                    "its protected instances keep the stack from being deleted: no custom resource that lifts the protection lists it",
                );
            }
        }
        for (id, provider) in stack.of_type("AWS::ECS::CapacityProvider") {
            let provider = &provider["AutoScalingGroupProvider"];
            let group =
                stack.properties(referred(&provider["AutoScalingGroupArn"]).unwrap_or_default());
            let is_managed = provider["ManagedScaling"]["Status"] == "ENABLED";
            let is_protected = group["NewInstancesProtectedFromScaleIn"] == true;
            if provider["ManagedTerminationProtection"] == "ENABLED"
                && !(is_managed && is_protected)
            {
                findings.add(
                    id,
                    "managed termination protection needs managed scaling and protected instances",
                );
            }
        }
    })
}

/// Groups listed by a custom resource whose function unprotects instances and
/// may do so.
fn guarded_groups(stack: &Stack) -> BTreeSet<String> {
    let mut guarded = BTreeSet::new();
    for (_, kind, guard) in stack.all() {
        if !kind.starts_with("Custom::") {
            continue;
        }
        let function = stack.properties(referred(&guard["ServiceToken"]).unwrap_or_default());
        let code = function["Code"]["ZipFile"].as_str().unwrap_or_default();
        let role = stack.properties(referred(&function["Role"]).unwrap_or_default());
        let is_allowed = role
            .to_string()
            .contains("autoscaling:SetInstanceProtection");
        if code.contains("set_instance_protection") && code.contains("\"Delete\"") && is_allowed {
            let groups = list(&guard["Groups"]);
            guarded.extend(groups.into_iter().filter_map(referred).map(str::to_owned));
        }
    }
    guarded
}

/// Instances: IMDSv2, no way from a container to the instance's role, nothing
/// reachable from outside, nothing that survives.
pub fn instances(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        for (id, template) in stack.of_type("AWS::EC2::LaunchTemplate") {
            let mut fail = |problem: &str| findings.add(id, problem);
            let data = &template["LaunchTemplateData"];
            let metadata = &data["MetadataOptions"];
            if metadata["HttpTokens"] != "required" {
                fail("IMDSv2 is not required (MetadataOptions.HttpTokens)");
            }
            if number(&metadata["HttpPutResponseHopLimit"]) != Some(1.0) {
                fail("containers reach the instance's metadata: HttpPutResponseHopLimit must be 1");
            }
            if data["DisableApiTermination"] == true {
                fail("instances with termination protection survive the deletion of the stack");
            }
            let user_data = data["UserData"].to_string();
            for setting in [
                "ECS_CLUSTER=${Cluster}",
                "ECS_ENABLE_GPU_SUPPORT=true",
                "ECS_ENABLE_SPOT_INSTANCE_DRAINING=true",
                "ECS_WARM_POOLS_CHECK=true",
            ] {
                if !user_data.contains(setting) {
                    fail(&format!("the user data does not set {setting}"));
                }
            }
        }
        for (id, group) in stack.of_type("AWS::EC2::SecurityGroup") {
            let is_open = list(&group["SecurityGroupIngress"])
                .iter()
                .any(|rule| !rule["CidrIp"].is_null() || !rule["CidrIpv6"].is_null());
            if is_open {
                findings.add(id, "takes connections from an address range");
            }
        }
    })
}

pub fn tasks(project: &Project, findings: &mut Findings) {
    in_each_stack(project, findings, |stack, findings| {
        for (id, task) in stack.of_type("AWS::ECS::TaskDefinition") {
            task_findings(stack, id, task, findings);
        }
    });
}

fn task_findings(stack: &Stack, id: &str, task: &Value, findings: &mut Findings) {
    let mut fail = |problem: String| findings.add(id, problem);
    if task["Family"].is_null() {
        fail(
            "Family is not set: every update would make a new one, and the scaler would end tasks of the old"
                .to_owned(),
        );
    }
    if task["NetworkMode"] == "host" {
        fail("host networking shares the instance's network and its metadata".to_owned());
    }
    let declared: BTreeSet<&str> = list(&task["Volumes"])
        .iter()
        .filter_map(|volume| volume["Name"].as_str())
        .collect();
    let mut mounted = BTreeSet::new();
    for container in list(&task["ContainerDefinitions"]) {
        let name = container["Name"].as_str().unwrap_or("container");
        match number(&container["StopTimeout"]) {
            None => fail(format!("{name}: StopTimeout is not set")),
            Some(stop) => {
                if !(STOP_TIMEOUT_MIN_SECONDS..=STOP_TIMEOUT_MAX_SECONDS).contains(&stop) {
                    fail(format!(
                        "{name}: StopTimeout {stop} s is outside of what ECS allows (2 to 120 s)"
                    ));
                }
                let told = container_variable(container, "STOP_TIMEOUT_SECONDS").and_then(number);
                if told != Some(stop) {
                    fail(format!(
                        "{name}: STOP_TIMEOUT_SECONDS {told:?} must be StopTimeout {stop}"
                    ));
                }
            }
        }
        match number(&container["Memory"]) {
            None => fail(format!(
                "{name}: Memory is not set: one image could take the whole instance down"
            )),
            Some(memory) if memory > TASK_MEMORY_MAX_MIB => fail(format!(
                "{name}: Memory {memory} MiB does not fit on a 16 GiB instance (at most {TASK_MEMORY_MAX_MIB})"
            )),
            Some(_) => {}
        }
        if container["ReadonlyRootFilesystem"] != true {
            fail(format!("{name}: the root filesystem is writable"));
        }
        let user = container["User"].as_str().unwrap_or("root");
        if user.starts_with("root") || user.split(':').next() == Some("0") {
            fail(format!("{name}: runs as root"));
        }
        if container["Privileged"] == true {
            fail(format!("{name}: is privileged"));
        }
        let gpus: Vec<&Value> = list(&container["ResourceRequirements"])
            .into_iter()
            .filter(|requirement| requirement["Type"] == "GPU")
            .collect();
        if gpus.len() != 1 || gpus[0]["Value"] != "1" {
            fail(format!("{name}: must ask for exactly one GPU"));
        }
        if container["HealthCheck"]["Command"].is_null() {
            fail(format!("{name}: has no health check"));
        }
        if container["LogConfiguration"]["LogDriver"] != "awslogs" {
            fail(format!(
                "{name}: its logs, and with them its metrics, go nowhere"
            ));
        }
        let mut paths = Vec::new();
        for mount in list(&container["MountPoints"]) {
            let volume = mount["SourceVolume"].as_str().unwrap_or_default();
            if !declared.contains(volume) {
                fail(format!(
                    "{name}: mounts the volume {volume}, which is not declared"
                ));
            }
            mounted.insert(volume);
            paths.extend(mount["ContainerPath"].as_str());
        }
        let cache = container_variable(container, "CACHE_DIR").and_then(Value::as_str);
        if cache.is_some_and(|cache| !paths.iter().any(|path| cache.starts_with(path))) {
            fail(format!(
                "{name}: CACHE_DIR {cache:?} lies on no volume, and the root is read-only"
            ));
        }
    }
    for volume in declared.difference(&mounted) {
        fail(format!("the volume {volume} is declared and not mounted"));
    }
    let targets: BTreeSet<String> = stack
        .of_type("AWS::EFS::MountTarget")
        .map(|(_, target)| target["SubnetId"].to_string())
        .collect();
    for (group, properties) in stack.of_type("AWS::AutoScaling::AutoScalingGroup") {
        for subnet in list(&properties["VPCZoneIdentifier"]) {
            if !targets.contains(&subnet.to_string()) {
                fail(format!(
                    "instances of {group} in {subnet} have no mount target of the model cache"
                ));
            }
        }
    }
}
