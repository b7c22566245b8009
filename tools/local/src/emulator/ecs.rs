//! The ECS API (awsJson1.1), as far as the pipeline calls it, with AWS's rules.
//!
//! Sources of the rules: the Amazon ECS API reference (RunTask, ListTasks,
//! DescribeTasks, StopTask, UpdateContainerInstancesState, "Ensuring
//! idempotency", "API failure reasons") and error texts seen in public reports,
//! such as "No Container Instances were found in your cluster."
//! (aws/amazon-ecs-cli#1122).

use std::{collections::BTreeMap, sync::Arc};

use chrono::{TimeDelta, Utc};
use serde_json::{Map, Value, json};
use thiserror::Error;

use super::cloud::{
    Cloud, ContainerInstanceStatus, Lifecycle,
    state::{ClientToken, CloudState, ClusterState, Container, Instance, TaskDefinition, TimeForm},
    tasks,
};

/// RunTask starts at most this many tasks in one call.
pub const RUN_TASK_MAX_COUNT: i64 = 10;
/// DescribeTasks and DescribeContainerInstances take at most this many.
pub const DESCRIBE_MAX: usize = 100;
/// List calls answer at most this many, and by default as many.
pub const LIST_MAX: usize = 100;
/// UpdateContainerInstancesState takes at most this many.
const UPDATE_STATE_MAX: usize = 10;
/// A RunTask client token has at most this many characters.
const CLIENT_TOKEN_MAX_CHARS: usize = 64;
/// A RunTask client token is remembered this long.
const CLIENT_TOKEN_HOURS: i64 = 24;
/// A task's `startedBy` has at most this many characters.
const STARTED_BY_MAX_CHARS: usize = 128;
/// SIGKILL follows SIGTERM after this many seconds unless the definition says otherwise.
const DEFAULT_STOP_TIMEOUT_S: u64 = 30;

/// An answer other than 200.
#[derive(Debug, Clone, Error)]
#[error("{code}: {message}")]
pub struct Refusal {
    pub status: u16,
    /// The error's type, such as `InvalidParameterException`.
    pub code: String,
    pub message: String,
    /// Further members of the error's shape.
    pub extra: Map<String, Value>,
}

impl Refusal {
    pub(crate) fn client(code: &str, message: impl Into<String>) -> Self {
        Self {
            status: 400,
            code: code.to_owned(),
            message: message.into(),
            extra: Map::new(),
        }
    }

    fn invalid(message: impl Into<String>) -> Self {
        Self::client("InvalidParameterException", message)
    }
}

pub(crate) type Answer = Result<Value, Refusal>;

pub(crate) fn call(cloud: &Cloud, operation: &str, request: &Value) -> Answer {
    match operation {
        "RunTask" => run_task(cloud, request),
        "StopTask" => stop_task(cloud, request),
        "ListTasks" => list_tasks(cloud, request),
        "DescribeTasks" => describe_tasks(cloud, request),
        "ListContainerInstances" => list_container_instances(cloud, request),
        "DescribeContainerInstances" => describe_container_instances(cloud, request),
        "UpdateContainerInstancesState" => update_container_instances_state(cloud, request),
        other => Err(Refusal::client(
            "UnsupportedFeatureException",
            format!("{other} is not served locally"),
        )),
    }
}

/// Whether an instance takes part in the cluster at all.
fn is_member(instance: &Instance) -> bool {
    let status = instance.container_status();
    status.is_some_and(|status| status != ContainerInstanceStatus::Inactive)
}

// ---------------------------------------------------------------- RunTask --

fn run_task(cloud: &Cloud, request: &Value) -> Answer {
    let count = match &request["count"] {
        Value::Null => 1,
        value => value
            .as_i64()
            .ok_or_else(|| Refusal::invalid("count must be a number"))?,
    };
    if !(1..=RUN_TASK_MAX_COUNT).contains(&count) {
        return Err(Refusal::invalid("Count should be between 1 and 10."));
    }
    for parameter in [
        "capacityProviderStrategy",
        "placementConstraints",
        "overrides",
    ] {
        if !request[parameter].is_null() {
            return Err(Refusal::invalid(format!(
                "{parameter} is not served locally"
            )));
        }
    }
    if request["launchType"] != "EC2" {
        return Err(Refusal::invalid("only launch type EC2 is served locally"));
    }
    let token = client_token(request)?;

    let mut created = Vec::new();
    let answer = {
        let mut state = cloud.lock();
        let cluster = cluster_of(&state, request)?.clone();
        let canonical = canonical_request(request);
        if let Some(token) = &token {
            let now = Utc::now();
            state
                .client_tokens
                .retain(|_, known| now - known.created_at < TimeDelta::hours(CLIENT_TOKEN_HOURS));
            if let Some(known) = state
                .client_tokens
                .get(&(cluster.name.clone(), token.clone()))
            {
                if known.request == canonical {
                    return Ok(known.response.clone());
                }
                let mut conflict = Refusal::client(
                    "ConflictException",
                    "The provided clientToken is already in use with a different RunTask request.",
                );
                conflict
                    .extra
                    .insert("resourceIds".into(), json!(known.task_arns));
                return Err(conflict);
            }
        }
        let definition = definition_of(
            &state,
            request["taskDefinition"].as_str().unwrap_or_default(),
        )?;
        let order = order(request, &cluster, definition)?;
        let mut failures = Vec::new();
        for _ in 0..count {
            match place(&state, &cluster, &order) {
                Placement::On(instance) => {
                    created.push(tasks::create(cloud, &mut state, &order, &instance));
                }
                Placement::NoInstances if created.is_empty() => {
                    return Err(Refusal::invalid(
                        "No Container Instances were found in your cluster.",
                    ));
                }
                Placement::NoInstances => {}
                Placement::Refused(reasons) => {
                    failures = reasons;
                    break;
                }
            }
        }
        state.note_peaks();
        let tasks: Vec<Value> = created
            .iter()
            .map(|id| state.tasks[id].describe(TimeForm::Epoch))
            .collect();
        let response = json!({"tasks": tasks, "failures": failures});
        if let Some(token) = token.filter(|_| !created.is_empty()) {
            let task_arns = created
                .iter()
                .map(|id| state.tasks[id].arn.clone())
                .collect();
            let known = ClientToken {
                request: canonical,
                response: response.clone(),
                task_arns,
                created_at: Utc::now(),
            };
            state
                .client_tokens
                .insert((cluster.name.clone(), token), known);
        }
        response
    };
    for id in created {
        tasks::begin(cloud, &id);
    }
    Ok(answer)
}

fn client_token(request: &Value) -> Result<Option<String>, Refusal> {
    let Some(token) = request["clientToken"]
        .as_str()
        .filter(|token| !token.is_empty())
    else {
        return Ok(None);
    };
    let printable = token.bytes().all(|byte| (33..=126).contains(&byte));
    if token.len() > CLIENT_TOKEN_MAX_CHARS || !printable {
        return Err(Refusal::invalid(
            "clientToken must be up to 64 ASCII characters in the range of 33-126 (inclusive).",
        ));
    }
    Ok(Some(token.to_owned()))
}

/// The request without its token: serde_json's maps are sorted, so two requests
/// with the same members are the same text.
fn canonical_request(request: &Value) -> String {
    let mut rest = request.clone();
    if let Some(members) = rest.as_object_mut() {
        members.remove("clientToken");
    }
    rest.to_string()
}

fn order(
    request: &Value,
    cluster: &ClusterState,
    definition: Arc<TaskDefinition>,
) -> Result<tasks::Order, Refusal> {
    let started_by = request["startedBy"].as_str().map(str::to_owned);
    if started_by
        .as_ref()
        .is_some_and(|by| by.len() > STARTED_BY_MAX_CHARS)
    {
        return Err(Refusal::invalid(
            "startedBy length should be less than or equal to 128.",
        ));
    }
    Ok(tasks::Order {
        cluster: cluster.clone(),
        definition,
        started_by,
    })
}

enum Placement {
    On(String),
    NoInstances,
    Refused(Vec<Value>),
}

/// Finds an instance for one more task: of those where it fits, the emptiest.
fn place(state: &CloudState, cluster: &ClusterState, order: &tasks::Order) -> Placement {
    let mut failures = Vec::new();
    let mut fitting = Vec::new();
    for instance in state.instances.values() {
        let Some(registration) = &instance.registration else {
            continue;
        };
        if instance.cluster != cluster.name || !instance.is_active() {
            continue;
        }
        match tasks::obstacle(state, instance, &order.definition) {
            Some(reason) => failures.push(json!({"arn": registration.arn, "reason": reason})),
            None => fitting.push(instance),
        }
    }
    match fitting
        .into_iter()
        .min_by_key(|one| state.tasks_on(&one.id).count())
    {
        Some(instance) => Placement::On(instance.id.clone()),
        None if failures.is_empty() => Placement::NoInstances,
        None => Placement::Refused(failures),
    }
}

fn stop_task(cloud: &Cloud, request: &Value) -> Answer {
    let reason = request["reason"].as_str().unwrap_or("Task stopped by user");
    let id = {
        let state = cloud.lock();
        let cluster = cluster_of(&state, request)?;
        let id = last_segment(request["task"].as_str().unwrap_or_default()).to_owned();
        let known = state
            .tasks
            .get(&id)
            .is_some_and(|task| task.cluster.name == cluster.name);
        if !known {
            return Err(Refusal::invalid("The referenced task was not found."));
        }
        id
    };
    tasks::stop(cloud, &id, reason);
    let state = cloud.lock();
    let task = state
        .tasks
        .get(&id)
        .ok_or_else(|| Refusal::invalid("The referenced task was not found."))?;
    Ok(json!({"task": task.describe(TimeForm::Epoch)}))
}

fn list_tasks(cloud: &Cloud, request: &Value) -> Answer {
    let state = cloud.lock();
    let cluster = cluster_of(&state, request)?;
    let family = request["family"].as_str();
    let started_by = request["startedBy"].as_str();
    let instance = request["containerInstance"].as_str();
    if started_by.is_some() && (family.is_some() || request["serviceName"].is_string()) {
        return Err(Refusal::invalid(
            "cannot specify family or service name when startedBy is given",
        ));
    }
    let stopped = match request["desiredStatus"].as_str() {
        None | Some("RUNNING") => false,
        Some("STOPPED") => true,
        // Nothing ever has the desired status PENDING: the call answers no task.
        Some("PENDING") => return Ok(json!({"taskArns": []})),
        Some(other) => {
            return Err(Refusal::invalid(format!(
                "desiredStatus {other} is not valid."
            )));
        }
    };
    let instance_id = match instance {
        None => None,
        Some(reference) => Some(
            find_instance(&state, cluster, reference)
                .map(|instance| instance.id.clone())
                .ok_or_else(|| {
                    Refusal::invalid("The referenced container instance was not found.")
                })?,
        ),
    };
    let arns: Vec<String> = state
        .tasks
        .values()
        .filter(|task| task.cluster.name == cluster.name && task.desired_stopped == stopped)
        .filter(|task| family.is_none_or(|family| task.definition.family == family))
        .filter(|task| started_by.is_none_or(|by| task.started_by.as_deref() == Some(by)))
        .filter(|task| instance_id.as_ref().is_none_or(|id| task.instance == *id))
        .map(|task| task.arn.clone())
        .collect();
    page(arns, request, "taskArns")
}

fn describe_tasks(cloud: &Cloud, request: &Value) -> Answer {
    describe(
        cloud,
        request,
        "tasks",
        "Tasks",
        |state, cluster, reference| {
            let task = state.tasks.get(last_segment(reference));
            let task = task.filter(|task| task.cluster.name == cluster.name);
            task.map(|task| task.describe(TimeForm::Epoch))
        },
    )
}

fn describe(
    cloud: &Cloud,
    request: &Value,
    member: &str,
    label: &str,
    find: impl Fn(&CloudState, &ClusterState, &str) -> Option<Value>,
) -> Answer {
    let wanted = texts(&request[member]);
    if wanted.is_empty() {
        return Err(Refusal::invalid(format!("{label} cannot be empty.")));
    }
    if wanted.len() > DESCRIBE_MAX {
        return Err(Refusal::invalid(format!(
            "{label} can have at most 100 items."
        )));
    }
    let state = cloud.lock();
    let cluster = cluster_of(&state, request)?;
    let (mut found, mut failures) = (Vec::new(), Vec::new());
    for reference in wanted {
        match find(&state, cluster, &reference) {
            Some(shown) => found.push(shown),
            None => failures.push(json!({"arn": reference, "reason": "MISSING"})),
        }
    }
    Ok(json!({ member: found, "failures": failures }))
}

// ----------------------------------------------------- container instances --

fn list_container_instances(cloud: &Cloud, request: &Value) -> Answer {
    let state = cloud.lock();
    let cluster = cluster_of(&state, request)?;
    let wanted = match request["status"].as_str() {
        None => None,
        Some("ACTIVE") => Some(ContainerInstanceStatus::Active),
        Some("DRAINING") => Some(ContainerInstanceStatus::Draining),
        Some("REGISTERING" | "DEREGISTERING" | "REGISTRATION_FAILED") => {
            return Ok(json!({"containerInstanceArns": []}));
        }
        Some(other) => return Err(Refusal::invalid(format!("status {other} is not valid."))),
    };
    let arns: Vec<String> = state
        .instances
        .values()
        .filter(|instance| instance.cluster == cluster.name && is_member(instance))
        .filter_map(|instance| instance.registration.as_ref())
        .filter(|registration| wanted.is_none_or(|wanted| registration.status == wanted))
        .map(|registration| registration.arn.clone())
        .collect();
    page(arns, request, "containerInstanceArns")
}

fn describe_container_instances(cloud: &Cloud, request: &Value) -> Answer {
    const MEMBER: &str = "containerInstances";
    let find = |state: &CloudState, cluster: &ClusterState, reference: &str| {
        let instance = find_instance(state, cluster, reference)?;
        state.describe_container_instance(instance, TimeForm::Epoch)
    };
    describe(cloud, request, MEMBER, "Container instances", find)
}

fn update_container_instances_state(cloud: &Cloud, request: &Value) -> Answer {
    let wanted = texts(&request["containerInstances"]);
    if wanted.is_empty() || wanted.len() > UPDATE_STATE_MAX {
        return Err(Refusal::invalid(
            "Container instances should be between 1 and 10.",
        ));
    }
    let status = match request["status"].as_str() {
        Some("ACTIVE") => ContainerInstanceStatus::Active,
        Some("DRAINING") => ContainerInstanceStatus::Draining,
        other => {
            return Err(Refusal::invalid(format!(
                "Container instance status should be one of [ACTIVE,DRAINING], not {}.",
                other.unwrap_or("none")
            )));
        }
    };
    let mut changed = Vec::new();
    let answer =
        {
            let mut state = cloud.lock();
            let cluster = cluster_of(&state, request)?.clone();
            let mut shown = Vec::new();
            let mut failures = Vec::new();
            for reference in wanted {
                let found = find_instance(&state, &cluster, &reference);
                let reason = match found {
                    None => Some("MISSING"),
                    Some(instance)
                        if !is_member(instance) || instance.lifecycle == Lifecycle::Terminated =>
                    {
                        Some("INACTIVE")
                    }
                    Some(_) => None,
                };
                let id = found.map(|instance| instance.id.clone());
                let (Some(id), None) = (id, reason) else {
                    failures.push(json!({"arn": reference, "reason": reason}));
                    continue;
                };
                if let Some(registration) = state
                    .instances
                    .get_mut(&id)
                    .and_then(|instance| instance.registration.as_mut())
                {
                    registration.status = status;
                }
                shown.extend(state.instances.get(&id).and_then(|instance| {
                    state.describe_container_instance(instance, TimeForm::Epoch)
                }));
                changed.push(id);
            }
            json!({"containerInstances": shown, "failures": failures})
        };
    for id in changed {
        cloud.publish_container_instance(&id);
    }
    Ok(answer)
}

fn find_instance<'a>(
    state: &'a CloudState,
    cluster: &ClusterState,
    reference: &str,
) -> Option<&'a Instance> {
    let id = last_segment(reference);
    state.instances.values().find(|instance| {
        instance.cluster == cluster.name
            && instance
                .registration
                .as_ref()
                .is_some_and(|registration| last_segment(&registration.arn) == id)
    })
}

// -------------------------------------------------------- task definitions --

/// RegisterTaskDefinition, by the handle alone: CloudFormation calls it, no program does.
pub(crate) fn register_task_definition(cloud: &Cloud, request: &Value) -> Result<String, Refusal> {
    let client = |message: &str| Refusal::client("ClientException", message);
    let family = request["family"]
        .as_str()
        .filter(|family| !family.is_empty())
        .ok_or_else(|| client("Family should not be blank."))?;
    let containers = request["containerDefinitions"]
        .as_array()
        .filter(|list| !list.is_empty());
    let containers =
        containers.ok_or_else(|| client("Container definitions should not be null or empty."))?;
    // The first essential container is the one that is run; `essential` is true by default.
    let main = containers
        .iter()
        .find(|one| one["essential"] != json!(false));
    let main = main.ok_or_else(|| {
        client("Invalid 'essential' setting: a task must have at least one essential container.")
    })?;
    let name = main["name"]
        .as_str()
        .ok_or_else(|| client("Container.name should not be null or empty."))?;
    let image = main["image"]
        .as_str()
        .ok_or_else(|| client("Container.image should not be null or empty."))?;
    let number = |value: &Value| {
        value
            .as_u64()
            .or_else(|| value.as_str().and_then(|text| text.parse().ok()))
    };
    let memory = number(&request["memory"])
        .or_else(|| number(&main["memory"]))
        .or_else(|| number(&main["memoryReservation"]))
        .ok_or_else(|| client("Invalid setting for container: at least one of 'memory' or 'memoryReservation' must be specified."))?;
    let gpus = main["resourceRequirements"]
        .as_array()
        .into_iter()
        .flatten()
        .filter(|one| one["type"] == json!("GPU"))
        .filter_map(|one| number(&one["value"]))
        .sum::<u64>();
    let stop_timeout_s = number(&main["stopTimeout"]).unwrap_or(DEFAULT_STOP_TIMEOUT_S);
    let environment: BTreeMap<String, String> = main["environment"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|one| {
            Some((
                one["name"].as_str()?.to_owned(),
                one["value"].as_str()?.to_owned(),
            ))
        })
        .collect();
    let container = Container {
        name: name.to_owned(),
        image: image.to_owned(),
        command: texts(&main["command"]),
        environment,
        stop_timeout_s,
    };
    let mut state = cloud.lock();
    let revisions = state.definitions.entry(family.to_owned()).or_default();
    let revision = revisions.len() + 1;
    let definition = Arc::new(TaskDefinition {
        family: family.to_owned(),
        arn: cloud.arn("ecs", &format!("task-definition/{family}:{revision}")),
        cpu: number(&request["cpu"])
            .or_else(|| number(&main["cpu"]))
            .unwrap_or(0),
        memory_mib: memory,
        gpus: usize::try_from(gpus).unwrap_or(usize::MAX),
        container,
    });
    revisions.push(definition.clone());
    Ok(definition.arn.clone())
}

fn definition_of(state: &CloudState, reference: &str) -> Result<Arc<TaskDefinition>, Refusal> {
    let refused = |message: &str| Refusal::client("ClientException", message);
    if reference.is_empty() {
        return Err(refused("TaskDefinition can not be blank."));
    }
    let definition =
        find_definition(state, reference).ok_or_else(|| refused("TaskDefinition not found."))?;
    if state.inactive_definitions.contains(&definition.arn) {
        return Err(refused("TaskDefinition is inactive"));
    }
    Ok(definition)
}

/// By family (its latest revision), family and revision, or ARN.
fn find_definition(state: &CloudState, reference: &str) -> Option<Arc<TaskDefinition>> {
    let name = last_segment(reference);
    let (family, revision) = name.split_once(':').unwrap_or((name, ""));
    let revisions = state.definitions.get(family)?;
    if revision.is_empty() {
        return revisions.last().cloned();
    }
    let index = revision.parse::<usize>().ok()?.checked_sub(1)?;
    revisions.get(index).cloned()
}

// ----------------------------------------------------------------- helpers --

fn cluster_of<'a>(state: &'a CloudState, request: &Value) -> Result<&'a ClusterState, Refusal> {
    let reference = request["cluster"].as_str().unwrap_or("default");
    state
        .clusters
        .get(last_segment(reference))
        .ok_or_else(|| Refusal::client("ClusterNotFoundException", "Cluster not found."))
}

fn last_segment(reference: &str) -> &str {
    reference.rsplit('/').next().unwrap_or(reference)
}

fn texts(list: &Value) -> Vec<String> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(|item| item.as_str().map(str::to_owned))
        .collect()
}

/// One page of a list; the token is the place where the next one begins.
fn page(all: Vec<String>, request: &Value, name: &str) -> Answer {
    let size = match request["maxResults"].as_u64() {
        None => LIST_MAX,
        Some(size) if (1..=LIST_MAX as u64).contains(&size) => {
            usize::try_from(size).unwrap_or(LIST_MAX)
        }
        Some(_) => return Err(Refusal::invalid("maxResults should be between 1 and 100.")),
    };
    let start = match request["nextToken"].as_str() {
        None => 0,
        Some(token) => token
            .strip_prefix("page-")
            .and_then(|start| start.parse::<usize>().ok())
            .ok_or_else(|| Refusal::invalid("Invalid token."))?,
    };
    let items: Vec<String> = all.iter().skip(start).take(size).cloned().collect();
    let mut answer = json!({ name: items });
    if start + size < all.len() {
        answer["nextToken"] = json!(format!("page-{}", start + size));
    }
    Ok(answer)
}
