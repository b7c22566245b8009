//! The ECS API (awsJson1.1), as far as the pipeline calls it, with AWS's rules.
//!
//! Sources of the rules: the Amazon ECS API reference (RunTask, ListTasks,
//! DescribeTasks, StopTask, UpdateContainerInstancesState, "Ensuring
//! idempotency", "API failure reasons") and error texts seen in public reports,
//! such as "No Container Instances were found in your cluster."
//! (aws/amazon-ecs-cli#1122).

use std::{collections::BTreeMap, sync::Arc, sync::atomic::Ordering};

use chrono::{TimeDelta, Utc};
use serde_json::{Map, Value, json};
use thiserror::Error;

use crate::cloud::{
    Cloud, ContainerInstanceStatus, Lifecycle, TaskStatus,
    state::{ClientToken, ClusterState, Container, Instance, State, TaskDefinition, TimeForm},
    tasks,
};

/// RunTask starts at most this many tasks in one call.
pub const RUN_TASK_MAX_COUNT: i64 = 10;
/// StartTask takes at most this many container instances.
const START_TASK_MAX_INSTANCES: usize = 10;
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
/// At most this many tasks of a cluster wait in PROVISIONING.
const PROVISIONING_MAX: usize = 100;
/// SIGKILL follows SIGTERM after this many seconds unless the definition says otherwise.
const DEFAULT_STOP_TIMEOUT_S: u64 = 30;

/// An answer other than 200.
#[derive(Debug, Clone, Error)]
#[error("{code}: {message}")]
pub struct ApiError {
    /// The HTTP status.
    pub status: u16,
    /// The error's type, such as `InvalidParameterException`.
    pub code: String,
    /// In words.
    pub message: String,
    /// Further members of the error's shape.
    pub extra: Map<String, Value>,
}

impl ApiError {
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

type Answer = Result<Value, ApiError>;

/// Carries out one call.
pub(crate) fn call(cloud: &Cloud, operation: &str, request: &Value) -> Answer {
    match operation {
        "RunTask" => run_task(cloud, request),
        "StartTask" => start_task(cloud, request),
        "StopTask" => stop_task(cloud, request),
        "ListTasks" => list_tasks(cloud, request),
        "DescribeTasks" => describe_tasks(cloud, request),
        "ListContainerInstances" => list_container_instances(cloud, request),
        "DescribeContainerInstances" => describe_container_instances(cloud, request),
        "UpdateContainerInstancesState" => update_container_instances_state(cloud, request),
        "CreateCluster" => create_cluster(cloud, request),
        "DescribeClusters" => describe_clusters(cloud, request),
        "ListClusters" => list_clusters(cloud, request),
        "RegisterTaskDefinition" => register_task_definition(cloud, request),
        "DescribeTaskDefinition" => describe_task_definition(cloud, request),
        "DeregisterTaskDefinition" => deregister_task_definition(cloud, request),
        "ListTaskDefinitions" => list_task_definitions(cloud, request),
        "DescribeCapacityProviders" => describe_capacity_providers(cloud, request),
        other => Err(ApiError::client(
            "UnsupportedFeatureException",
            format!("{other} is not served locally"),
        )),
    }
}

/// Whether an instance takes part in the cluster at all.
fn is_member(instance: &Instance) -> bool {
    instance
        .registration
        .as_ref()
        .is_some_and(|registration| registration.status != ContainerInstanceStatus::Inactive)
}

// ---------------------------------------------------------------- RunTask --

fn run_task(cloud: &Cloud, request: &Value) -> Answer {
    let count = match &request["count"] {
        Value::Null => 1,
        value => value
            .as_i64()
            .ok_or_else(|| ApiError::invalid("count must be a number"))?,
    };
    if !(1..=RUN_TASK_MAX_COUNT).contains(&count) {
        return Err(ApiError::invalid("Count should be between 1 and 10."));
    }
    let strategy = request["capacityProviderStrategy"]
        .as_array()
        .filter(|list| !list.is_empty());
    let launch_type = request["launchType"].as_str();
    if strategy.is_some() && launch_type.is_some() {
        return Err(ApiError::invalid(
            "Specifying both a launch type and capacity provider strategy is not supported. Remove one and try again.",
        ));
    }
    if launch_type.is_some_and(|launch_type| launch_type != "EC2") {
        return Err(ApiError::client(
            "PlatformUnknownException",
            "only launch type EC2 is served locally",
        ));
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
                let mut conflict = ApiError::client(
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
        let order = order(
            request,
            &cluster,
            definition.clone(),
            provider_of(strategy)?,
        )?;
        let constraints = Constraint::parse_all(&request["placementConstraints"])?;

        let mut failures = Vec::new();
        for _ in 0..count {
            match place(&state, &cluster, &order, &constraints) {
                Placement::On(instance) => {
                    created.push(tasks::create(cloud, &mut state, &order, Some(&instance)))
                }
                Placement::Provision => {
                    created.push(tasks::create(cloud, &mut state, &order, None))
                }
                Placement::NoInstances => {
                    if created.is_empty() {
                        let place = if order.capacity_provider.is_some() {
                            "capacity provider"
                        } else {
                            "cluster"
                        };
                        return Err(ApiError::invalid(format!(
                            "No Container Instances were found in your {place}."
                        )));
                    }
                }
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

fn client_token(request: &Value) -> Result<Option<String>, ApiError> {
    let Some(token) = request["clientToken"]
        .as_str()
        .filter(|token| !token.is_empty())
    else {
        return Ok(None);
    };
    let printable = token.bytes().all(|byte| (33..=126).contains(&byte));
    if token.len() > CLIENT_TOKEN_MAX_CHARS || !printable {
        return Err(ApiError::invalid(
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

fn provider_of(strategy: Option<&Vec<Value>>) -> Result<Option<String>, ApiError> {
    let Some(strategy) = strategy else {
        return Ok(None);
    };
    let first = strategy
        .first()
        .and_then(|item| item["capacityProvider"].as_str());
    first
        .map(|name| Some(name.to_owned()))
        .ok_or_else(|| ApiError::invalid("Capacity provider strategy is malformed."))
}

fn order(
    request: &Value,
    cluster: &ClusterState,
    definition: Arc<TaskDefinition>,
    capacity_provider: Option<String>,
) -> Result<tasks::Order, ApiError> {
    let started_by = request["startedBy"].as_str().map(str::to_owned);
    if started_by
        .as_ref()
        .is_some_and(|by| by.len() > STARTED_BY_MAX_CHARS)
    {
        return Err(ApiError::invalid(
            "startedBy length should be less than or equal to 128.",
        ));
    }
    let overrides = match &request["overrides"] {
        Value::Null => json!({"containerOverrides": [], "inferenceAcceleratorOverrides": []}),
        given => given.clone(),
    };
    for change in overrides["containerOverrides"]
        .as_array()
        .into_iter()
        .flatten()
    {
        let name = change["name"].as_str().unwrap_or_default();
        if name != definition.container.name {
            return Err(ApiError::invalid(format!(
                "Override for container named {name} is not a container in the TaskDefinition."
            )));
        }
    }
    let group = request["group"]
        .as_str()
        .map_or_else(|| format!("family:{}", definition.family), str::to_owned);
    let tags = match &request["tags"] {
        Value::Null => json!([]),
        given => given.clone(),
    };
    Ok(tasks::Order {
        cluster: cluster.name.clone(),
        cluster_arn: cluster.arn.clone(),
        definition,
        capacity_provider,
        started_by,
        group,
        overrides,
        tags,
    })
}

enum Placement {
    On(String),
    Provision,
    NoInstances,
    Refused(Vec<Value>),
}

/// Finds an instance for one more task: of those where it fits, the emptiest.
fn place(
    state: &State,
    cluster: &ClusterState,
    order: &tasks::Order,
    constraints: &[Constraint],
) -> Placement {
    let provider = order.capacity_provider.as_deref();
    let candidates: Vec<&Instance> = state
        .instances
        .values()
        .filter(|instance| instance.cluster == cluster.name && instance.is_active())
        .filter(|instance| provider.is_none_or(|provider| instance.group == provider))
        .collect();
    let managed = provider.is_some();
    if candidates.is_empty() && !managed {
        return Placement::NoInstances;
    }
    let mut failures = Vec::new();
    let mut best: Option<(usize, &Instance)> = None;
    for instance in candidates {
        let obstacle = tasks::obstacle(state, instance, &order.definition).or_else(|| {
            constraints
                .iter()
                .find_map(|constraint| constraint.obstacle(instance))
        });
        if let Some(reason) = obstacle {
            let arn = instance
                .registration
                .as_ref()
                .map(|registration| registration.arn.clone());
            failures.push(json!({"arn": arn, "reason": reason}));
            continue;
        }
        let load = state.tasks_on(&instance.id).count();
        if best.is_none_or(|(least, _)| load < least) {
            best = Some((load, instance));
        }
    }
    if let Some((_, instance)) = best {
        return Placement::On(instance.id.clone());
    }
    let waiting = state
        .tasks
        .values()
        .filter(|task| task.cluster == cluster.name && task.status == TaskStatus::Provisioning)
        .count();
    if managed && waiting < PROVISIONING_MAX {
        return Placement::Provision;
    }
    if failures.is_empty() {
        return Placement::NoInstances;
    }
    Placement::Refused(failures)
}

/// A placement constraint, as far as it is served: `memberOf` with one comparison.
enum Constraint {
    Attribute {
        name: String,
        equal: bool,
        value: String,
    },
    InstanceIn(Vec<String>),
}

impl Constraint {
    fn parse_all(list: &Value) -> Result<Vec<Self>, ApiError> {
        let mut parsed = Vec::new();
        for item in list.as_array().into_iter().flatten() {
            match item["type"].as_str() {
                Some("memberOf") => parsed.push(Self::parse(
                    item["expression"].as_str().unwrap_or_default(),
                )?),
                // One GPU task per instance is what resources enforce anyway.
                Some("distinctInstance") => {}
                other => {
                    return Err(ApiError::invalid(format!(
                        "placement constraint type {other:?} is not valid."
                    )));
                }
            }
        }
        Ok(parsed)
    }

    fn parse(expression: &str) -> Result<Self, ApiError> {
        let invalid = || ApiError::invalid(format!("Invalid expression: {expression}"));
        let expression = expression.trim();
        if let Some(rest) = expression.strip_prefix("attribute:") {
            let (name, equal, value) = match (rest.split_once("=="), rest.split_once("!=")) {
                (Some((name, value)), _) => (name, true, value),
                (None, Some((name, value))) => (name, false, value),
                (None, None) => return Err(invalid()),
            };
            let value = value.trim().trim_matches('\'').to_owned();
            return Ok(Self::Attribute {
                name: name.trim().to_owned(),
                equal,
                value,
            });
        }
        if let Some(rest) = expression.strip_prefix("ec2InstanceId") {
            let rest = rest.trim();
            if let Some(value) = rest.strip_prefix("==") {
                return Ok(Self::InstanceIn(vec![
                    value.trim().trim_matches('\'').to_owned(),
                ]));
            }
            let list = rest.strip_prefix("in").map(str::trim).ok_or_else(invalid)?;
            let list = list
                .strip_prefix('[')
                .and_then(|list| list.strip_suffix(']'))
                .ok_or_else(invalid)?;
            return Ok(Self::InstanceIn(
                list.split(',')
                    .map(|id| id.trim().trim_matches('\'').to_owned())
                    .collect(),
            ));
        }
        Err(invalid())
    }

    fn obstacle(&self, instance: &Instance) -> Option<&'static str> {
        let holds = match self {
            Self::InstanceIn(ids) => ids.contains(&instance.id),
            Self::Attribute { name, equal, value } => {
                let actual = match name.as_str() {
                    "ecs.instance-type" => Some(instance.instance_type.as_str()),
                    "ecs.availability-zone" => Some(instance.zone.as_str()),
                    "ecs.os-type" => Some("linux"),
                    _ => None,
                };
                (actual == Some(value.as_str())) == *equal
            }
        };
        (!holds).then_some("MemberOf placement constraint unsatisfied.")
    }
}

fn start_task(cloud: &Cloud, request: &Value) -> Answer {
    let wanted = texts(&request["containerInstances"]);
    if wanted.is_empty() || wanted.len() > START_TASK_MAX_INSTANCES {
        return Err(ApiError::invalid(
            "Container instances should be between 1 and 10.",
        ));
    }
    let mut created = Vec::new();
    let answer = {
        let mut state = cloud.lock();
        let cluster = cluster_of(&state, request)?.clone();
        let definition = definition_of(
            &state,
            request["taskDefinition"].as_str().unwrap_or_default(),
        )?;
        let order = order(request, &cluster, definition, None)?;
        let mut failures = Vec::new();
        for reference in wanted {
            let found = find_instance(&state, &cluster, &reference);
            let reason = match found {
                None => Some("MISSING"),
                Some(instance) if !instance.is_active() => Some("INACTIVE"),
                Some(instance) => tasks::obstacle(&state, instance, &order.definition),
            };
            let instance_id = found.map(|instance| instance.id.clone());
            match (reason, instance_id) {
                (None, Some(id)) => {
                    created.push(tasks::create(cloud, &mut state, &order, Some(&id)))
                }
                (reason, _) => failures.push(json!({"arn": reference, "reason": reason})),
            }
        }
        state.note_peaks();
        let tasks: Vec<Value> = created
            .iter()
            .map(|id| state.tasks[id].describe(TimeForm::Epoch))
            .collect();
        json!({"tasks": tasks, "failures": failures})
    };
    for id in created {
        tasks::begin(cloud, &id);
    }
    Ok(answer)
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
            .is_some_and(|task| task.cluster == cluster.name);
        if !known {
            return Err(ApiError::invalid("The referenced task was not found."));
        }
        id
    };
    tasks::stop(cloud, &id, reason);
    let state = cloud.lock();
    let task = state
        .tasks
        .get(&id)
        .ok_or_else(|| ApiError::invalid("The referenced task was not found."))?;
    Ok(json!({"task": task.describe(TimeForm::Epoch)}))
}

fn list_tasks(cloud: &Cloud, request: &Value) -> Answer {
    let state = cloud.lock();
    let cluster = cluster_of(&state, request)?;
    let family = request["family"].as_str();
    let started_by = request["startedBy"].as_str();
    let instance = request["containerInstance"].as_str();
    if started_by.is_some() && (family.is_some() || request["serviceName"].is_string()) {
        return Err(ApiError::invalid(
            "cannot specify family or service name when startedBy is given",
        ));
    }
    let stopped = match request["desiredStatus"].as_str() {
        None | Some("RUNNING") => false,
        Some("STOPPED") => true,
        // Nothing ever has the desired status PENDING: the call answers no task.
        Some("PENDING") => return Ok(json!({"taskArns": []})),
        Some(other) => {
            return Err(ApiError::invalid(format!(
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
                    ApiError::invalid("The referenced container instance was not found.")
                })?,
        ),
    };
    let arns: Vec<String> = state
        .tasks
        .values()
        .filter(|task| task.cluster == cluster.name && task.desired_stopped == stopped)
        .filter(|task| family.is_none_or(|family| task.definition.family == family))
        .filter(|task| started_by.is_none_or(|by| task.started_by.as_deref() == Some(by)))
        .filter(|task| instance_id.is_none() || task.instance == instance_id)
        .map(|task| task.arn.clone())
        .collect();
    page(arns, request, "taskArns")
}

fn describe_tasks(cloud: &Cloud, request: &Value) -> Answer {
    let wanted = texts(&request["tasks"]);
    if wanted.is_empty() {
        return Err(ApiError::invalid("Tasks cannot be empty."));
    }
    if wanted.len() > DESCRIBE_MAX {
        return Err(ApiError::invalid("Tasks can have at most 100 items."));
    }
    let state = cloud.lock();
    let cluster = cluster_of(&state, request)?;
    let mut found = Vec::new();
    let mut failures = Vec::new();
    for reference in wanted {
        match state
            .tasks
            .get(last_segment(&reference))
            .filter(|task| task.cluster == cluster.name)
        {
            Some(task) => found.push(task.describe(TimeForm::Epoch)),
            None => failures.push(missing(
                cloud,
                &reference,
                &format!("task/{}", cluster.name),
            )),
        }
    }
    Ok(json!({"tasks": found, "failures": failures}))
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
        Some(other) => return Err(ApiError::invalid(format!("status {other} is not valid."))),
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
    let wanted = texts(&request["containerInstances"]);
    if wanted.is_empty() {
        return Err(ApiError::invalid("Container instances cannot be empty."));
    }
    if wanted.len() > DESCRIBE_MAX {
        return Err(ApiError::invalid(
            "Container instances can have at most 100 items.",
        ));
    }
    let state = cloud.lock();
    let cluster = cluster_of(&state, request)?;
    let mut found = Vec::new();
    let mut failures = Vec::new();
    for reference in wanted {
        let shown = find_instance(&state, cluster, &reference)
            .and_then(|instance| state.describe_container_instance(instance, TimeForm::Epoch));
        match shown {
            Some(shown) => found.push(shown),
            None => failures.push(missing(
                cloud,
                &reference,
                &format!("container-instance/{}", cluster.name),
            )),
        }
    }
    Ok(json!({"containerInstances": found, "failures": failures}))
}

fn update_container_instances_state(cloud: &Cloud, request: &Value) -> Answer {
    let wanted = texts(&request["containerInstances"]);
    if wanted.is_empty() || wanted.len() > UPDATE_STATE_MAX {
        return Err(ApiError::invalid(
            "Container instances should be between 1 and 10.",
        ));
    }
    let status = match request["status"].as_str() {
        Some("ACTIVE") => ContainerInstanceStatus::Active,
        Some("DRAINING") => ContainerInstanceStatus::Draining,
        other => {
            return Err(ApiError::invalid(format!(
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
    tasks::place_provisioning(cloud);
    Ok(answer)
}

fn find_instance<'a>(
    state: &'a State,
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

// ---------------------------------------------------------------- clusters --

fn create_cluster(cloud: &Cloud, request: &Value) -> Answer {
    let name = request["clusterName"].as_str().unwrap_or("default");
    cloud.create_cluster(name);
    let state = cloud.lock();
    let cluster = state
        .clusters
        .get(name)
        .ok_or_else(|| ApiError::invalid("the cluster was not created"))?;
    Ok(json!({"cluster": describe_cluster(&state, cluster)}))
}

fn describe_clusters(cloud: &Cloud, request: &Value) -> Answer {
    let mut wanted = texts(&request["clusters"]);
    if wanted.is_empty() {
        wanted.push("default".to_owned());
    }
    if wanted.len() > DESCRIBE_MAX {
        return Err(ApiError::invalid("Clusters can have at most 100 items."));
    }
    let state = cloud.lock();
    let mut found = Vec::new();
    let mut failures = Vec::new();
    for reference in wanted {
        match state.clusters.get(last_segment(&reference)) {
            Some(cluster) => found.push(describe_cluster(&state, cluster)),
            None => failures.push(missing(cloud, &reference, "cluster")),
        }
    }
    Ok(json!({"clusters": found, "failures": failures}))
}

fn list_clusters(cloud: &Cloud, request: &Value) -> Answer {
    let arns = cloud
        .lock()
        .clusters
        .values()
        .map(|cluster| cluster.arn.clone())
        .collect();
    page(arns, request, "clusterArns")
}

fn describe_cluster(state: &State, cluster: &ClusterState) -> Value {
    let tasks = |wanted: fn(TaskStatus) -> bool| {
        state
            .tasks
            .values()
            .filter(|task| task.cluster == cluster.name && wanted(task.status))
            .count()
    };
    let instances = state
        .instances
        .values()
        .filter(|instance| instance.cluster == cluster.name && is_member(instance))
        .count();
    json!({
        "clusterArn": cluster.arn,
        "clusterName": cluster.name,
        "status": "ACTIVE",
        "registeredContainerInstancesCount": instances,
        "runningTasksCount": tasks(|status| status == TaskStatus::Running),
        "pendingTasksCount": tasks(|status| status < TaskStatus::Running),
        "activeServicesCount": 0,
        "statistics": [],
        "tags": [],
        "settings": [],
        "capacityProviders": [],
        "defaultCapacityProviderStrategy": [],
    })
}

/// A capacity provider here is a group by its name, with managed scaling left
/// to whoever tests it: tasks wait in PROVISIONING, nothing scales by itself.
fn describe_capacity_providers(cloud: &Cloud, request: &Value) -> Answer {
    let wanted = texts(&request["capacityProviders"]);
    let state = cloud.lock();
    let shown: Vec<Value> = state
        .groups
        .values()
        .filter(|group| wanted.is_empty() || wanted.iter().any(|name| last_segment(name) == group.config.name))
        .map(|group| {
            json!({
                "capacityProviderArn": cloud.arn("ecs", &format!("capacity-provider/{}", group.config.name)),
                "name": group.config.name,
                "status": "ACTIVE",
                "autoScalingGroupProvider": {
                    "autoScalingGroupArn": group.arn,
                    "managedScaling": {"status": "ENABLED", "targetCapacity": 100},
                    "managedTerminationProtection": "DISABLED",
                },
                "tags": [],
            })
        })
        .collect();
    Ok(json!({"capacityProviders": shown, "failures": []}))
}

// -------------------------------------------------------- task definitions --

pub(crate) fn register_task_definition(cloud: &Cloud, request: &Value) -> Answer {
    let client = |message: &str| ApiError::client("ClientException", message);
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
        revision,
        arn: cloud.arn("ecs", &format!("task-definition/{family}:{revision}")),
        document: request.as_object().cloned().unwrap_or_default(),
        registered_at: Utc::now(),
        active: true.into(),
        cpu: number(&request["cpu"])
            .or_else(|| number(&main["cpu"]))
            .unwrap_or(0),
        memory_mib: memory,
        gpus: usize::try_from(gpus).unwrap_or(usize::MAX),
        container,
    });
    revisions.push(definition.clone());
    Ok(json!({"taskDefinition": show_definition(&definition), "tags": []}))
}

fn describe_task_definition(cloud: &Cloud, request: &Value) -> Answer {
    let state = cloud.lock();
    let reference = request["taskDefinition"].as_str().unwrap_or_default();
    let definition = find_definition(&state, reference).ok_or_else(|| {
        ApiError::client("ClientException", "Unable to describe task definition.")
    })?;
    Ok(json!({"taskDefinition": show_definition(&definition), "tags": []}))
}

fn deregister_task_definition(cloud: &Cloud, request: &Value) -> Answer {
    let state = cloud.lock();
    let reference = request["taskDefinition"].as_str().unwrap_or_default();
    if !reference.contains(':') {
        return Err(ApiError::client(
            "ClientException",
            "Unable to describe task definition: revision is required.",
        ));
    }
    let definition = find_definition(&state, reference).ok_or_else(|| {
        ApiError::client("ClientException", "Unable to describe task definition.")
    })?;
    definition.active.store(false, Ordering::Relaxed);
    Ok(json!({"taskDefinition": show_definition(&definition)}))
}

fn list_task_definitions(cloud: &Cloud, request: &Value) -> Answer {
    let prefix = request["familyPrefix"].as_str();
    let arns = cloud
        .lock()
        .definitions
        .values()
        .flatten()
        .filter(|definition| definition.active.load(Ordering::Relaxed))
        .filter(|definition| prefix.is_none_or(|prefix| definition.family == prefix))
        .map(|definition| definition.arn.clone())
        .collect();
    page(arns, request, "taskDefinitionArns")
}

fn show_definition(definition: &TaskDefinition) -> Value {
    let mut shown = definition.document.clone();
    shown.insert("taskDefinitionArn".into(), json!(definition.arn));
    shown.insert("revision".into(), json!(definition.revision));
    let status = if definition.active.load(Ordering::Relaxed) {
        "ACTIVE"
    } else {
        "INACTIVE"
    };
    shown.insert("status".into(), json!(status));
    shown.insert(
        "registeredAt".into(),
        TimeForm::Epoch.write(definition.registered_at),
    );
    shown
        .entry("compatibilities")
        .or_insert_with(|| json!(["EC2"]));
    shown.remove("tags");
    Value::Object(shown)
}

fn definition_of(state: &State, reference: &str) -> Result<Arc<TaskDefinition>, ApiError> {
    if reference.is_empty() {
        return Err(ApiError::client(
            "ClientException",
            "TaskDefinition can not be blank.",
        ));
    }
    let definition = find_definition(state, reference)
        .ok_or_else(|| ApiError::client("ClientException", "TaskDefinition not found."))?;
    if !definition.active.load(Ordering::Relaxed) {
        return Err(ApiError::client(
            "ClientException",
            "TaskDefinition is inactive",
        ));
    }
    Ok(definition)
}

/// By family (its latest active revision), family and revision, or ARN.
fn find_definition(state: &State, reference: &str) -> Option<Arc<TaskDefinition>> {
    let name = last_segment(reference);
    match name.split_once(':') {
        Some((family, revision)) => {
            let index = revision.parse::<usize>().ok()?.checked_sub(1)?;
            state.definitions.get(family)?.get(index).cloned()
        }
        None => state
            .definitions
            .get(name)?
            .iter()
            .rev()
            .find(|definition| definition.active.load(Ordering::Relaxed))
            .cloned(),
    }
}

// ----------------------------------------------------------------- helpers --

fn cluster_of<'a>(state: &'a State, request: &Value) -> Result<&'a ClusterState, ApiError> {
    let reference = request["cluster"].as_str().unwrap_or("default");
    state
        .clusters
        .get(last_segment(reference))
        .ok_or_else(|| ApiError::client("ClusterNotFoundException", "Cluster not found."))
}

fn missing(cloud: &Cloud, reference: &str, kind: &str) -> Value {
    let arn = if reference.starts_with("arn:") {
        reference.to_owned()
    } else {
        cloud.arn("ecs", &format!("{kind}/{reference}"))
    };
    json!({"arn": arn, "reason": "MISSING"})
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
        Some(_) => return Err(ApiError::invalid("maxResults should be between 1 and 100.")),
    };
    let start = match request["nextToken"].as_str() {
        None => 0,
        Some(token) => token
            .strip_prefix("page-")
            .and_then(|start| start.parse::<usize>().ok())
            .ok_or_else(|| ApiError::invalid("Invalid token."))?,
    };
    let items: Vec<String> = all.iter().skip(start).take(size).cloned().collect();
    let mut answer = json!({ name: items });
    if start + size < all.len() {
        answer["nextToken"] = json!(format!("page-{}", start + size));
    }
    Ok(answer)
}
