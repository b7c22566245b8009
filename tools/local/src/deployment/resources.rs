//! The template's resources, created in the emulators.

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::PoisonError,
    time::{Duration, Instant},
};

use aws_sdk_lambda::{
    primitives::Blob,
    types::{
        DestinationConfig, Environment, FunctionCode, FunctionResponseType, OnFailure, Runtime,
        ScalingConfig,
    },
};
use aws_sdk_s3::types::{
    Event, EventBridgeConfiguration, LambdaFunctionConfiguration, NotificationConfiguration,
};
use aws_sdk_sqs::types::QueueAttributeName;
use ministack::REGION;
use serde_json::{Map, Value, json};
use template::{Parameters, Stack, list, number, text_of};

use super::{
    DeployError, Deployment, DeploymentOptions, NEXT_QUEUE, SOURCE_BUCKET, WayIn, built,
    names::{self, arn, name},
};
use crate::{
    cloud::{Cloud, GroupConfig},
    sdk::{CallFailed, failed, sent},
};

/// How a vector store subscribes to this system's topic.
const NEXT_FILTER: &str = include_str!("../../../../events/filters/vector-store.json");
/// Lambda functions must have a role; the emulator asks nothing of it.
const ROLE_ARN: &str = "arn:aws:iam::000000000000:role/local";
/// A function of the template is ready to be invoked well within this.
const FUNCTION_READY_LIMIT: Duration = Duration::from_secs(60);

/// What an update of the stack may change here.
const UPDATED_TYPES: [&str; 3] = [
    "AWS::ECS::TaskDefinition",
    "AWS::Lambda::Function",
    "AWS::Serverless::Function",
];

/// Replaces what does not fit on this machine, which has no GPU, no EFS and no
/// layers: everything else in a worker's environment is the template's.
fn localise(variables: &mut BTreeMap<String, String>, bundle: &Path) {
    variables.retain(|name, _| !["MODEL_URI", "CACHE_DIR"].contains(&name.as_str()));
    variables.insert("EXECUTION_PROVIDER".to_owned(), "cpu".to_owned());
    variables.insert("MODEL_PATH".to_owned(), bundle.display().to_string());
    if let Ok(library) = std::env::var("ORT_DYLIB_PATH") {
        variables.insert("ORT_DYLIB_PATH".to_owned(), library);
    }
}

impl Deployment {
    pub(super) async fn create_storage(&self) -> Result<(), DeployError> {
        let own = self
            .stack
            .of_type("AWS::S3::Bucket")
            .map(|(id, _)| names::bucket(id));
        for bucket in own.chain([SOURCE_BUCKET.to_owned()]) {
            let create = self.s3.create_bucket().bucket(&bucket);
            sent(format!("creating bucket {bucket}"), create.send()).await?;
        }
        // A queue with a redrive policy needs its dead-letter queue first.
        let mut queues: Vec<_> = self.stack.of_type("AWS::SQS::Queue").collect();
        queues.sort_by_key(|(_, queue)| queue["RedrivePolicy"].is_object());
        for (id, queue) in queues {
            self.create_queue(&name(id), queue).await?;
        }
        self.create_queue(NEXT_QUEUE, &Value::Null).await?;

        for (id, _) in self.stack.of_type("AWS::SNS::Topic") {
            let create = self.sns.create_topic().name(name(id));
            sent(format!("creating topic {id}"), create.send()).await?;
        }
        for (_, subscription) in self.stack.of_type("AWS::SNS::Subscription") {
            self.subscribe(subscription).await?;
        }
        // With another output kind there is still the topic itself.
        let topic = self.stack.of_type("AWS::SNS::Topic").next();
        let (topic, _) = topic.ok_or(DeployError::Lacks("AWS::SNS::Topic"))?;
        let next = json!({
            "TopicArn": arn("sns", &name(topic)),
            "Protocol": "sqs",
            "Endpoint": arn("sqs", NEXT_QUEUE),
            "RawMessageDelivery": true,
            "FilterPolicyScope": "MessageBody",
            "FilterPolicy": serde_json::from_str::<Value>(NEXT_FILTER).unwrap_or_default(),
        });
        self.subscribe(&next).await
    }

    /// Creates a queue with the attributes of a template's `AWS::SQS::Queue`.
    pub async fn create_queue(
        &self,
        name: &str,
        properties: &Value,
    ) -> Result<String, DeployError> {
        // The attributes that decide how a queue behaves; encryption does nothing here.
        const ATTRIBUTES: [&str; 6] = [
            "VisibilityTimeout",
            "MessageRetentionPeriod",
            "ReceiveMessageWaitTimeSeconds",
            "RedrivePolicy",
            "DelaySeconds",
            "MaximumMessageSize",
        ];
        let mut create = self.sqs.create_queue().queue_name(name);
        for attribute in ATTRIBUTES {
            let value = &properties[attribute];
            if !value.is_null() {
                create = create.attributes(QueueAttributeName::from(attribute), text_of(value));
            }
        }
        let created = sent(format!("creating queue {name}"), create.send()).await?;
        Ok(created.queue_url.unwrap_or_default())
    }

    /// Subscribes as a template's `AWS::SNS::Subscription` does.
    pub async fn subscribe(&self, subscription: &Value) -> Result<(), DeployError> {
        let field = |name: &str| text_of(&subscription[name]);
        let mut request = self
            .sns
            .subscribe()
            .topic_arn(field("TopicArn"))
            .protocol(field("Protocol"))
            .endpoint(field("Endpoint"));
        for attribute in ["RawMessageDelivery", "FilterPolicyScope", "FilterPolicy"] {
            if !subscription[attribute].is_null() {
                request = request.attributes(attribute, field(attribute));
            }
        }
        let what = format!("subscribing {} to {}", field("Endpoint"), field("TopicArn"));
        sent(what, request.send()).await?;
        Ok(())
    }

    pub(super) fn create_cluster(&self) -> Result<(), DeployError> {
        let cluster = self.stack.of_type("AWS::ECS::Cluster").next();
        let cluster = name(cluster.ok_or(DeployError::Lacks("AWS::ECS::Cluster"))?.0);
        self.cloud.create_cluster(&cluster);
        for (id, group) in self.stack.of_type("AWS::AutoScaling::AutoScalingGroup") {
            self.cloud.create_group(group_of(id, &cluster, group));
        }
        Ok(())
    }

    fn function_environment(&self, function: &Value) -> Environment {
        let mut variables = BTreeMap::from(
            ["AWS_ENDPOINT_URL_ECS", "AWS_ENDPOINT_URL_AUTO_SCALING"]
                .map(|name| (name.to_owned(), self.cloud_endpoint.clone())),
        );
        let declared = function["Environment"]["Variables"].as_object();
        let mappings = self.mappings.lock();
        let mappings = mappings.unwrap_or_else(PoisonError::into_inner);
        variables.extend(declared.into_iter().flatten().map(|(name, value)| {
            let value = text_of(value);
            let uuid = mappings.get(&value).cloned();
            (name.clone(), uuid.unwrap_or(value))
        }));
        if variables.contains_key("MODEL_URI") {
            localise(&mut variables, &self.options.bundle);
        }
        variables.extend(self.options.function_environment.clone());
        Environment::builder()
            .set_variables(Some(variables.into_iter().collect()))
            .build()
    }

    pub(super) async fn create_functions(&self) -> Result<(), DeployError> {
        let functions = functions(&self.stack);
        for (id, function, binary) in &functions {
            let code = code_package(&built(self.options.programs.functions.join(binary))?)?;
            // Reserved concurrency is left out: the emulator drops an asynchronous
            // event that it throttles, where Lambda keeps it for later.
            let create = self
                .lambda
                .create_function()
                .function_name(name(id))
                .runtime(Runtime::Providedal2023)
                .handler("bootstrap")
                .role(ROLE_ARN)
                .set_timeout(integer(&function["Timeout"]))
                .set_memory_size(integer(&function["MemorySize"]))
                .environment(self.function_environment(function))
                .code(FunctionCode::builder().zip_file(Blob::new(code)).build());
            sent(format!("creating function {id}"), create.send()).await?;
            self.until_ready(&name(id)).await?;
            self.create_mappings(&name(id)).await?;
        }
        for (id, config) in self.stack.of_type("AWS::Lambda::EventInvokeConfig") {
            let destination = config["DestinationConfig"]["OnFailure"]["Destination"].as_str();
            let destination = destination.map(|arn| {
                let on_failure = OnFailure::builder().destination(arn).build();
                DestinationConfig::builder().on_failure(on_failure).build()
            });
            let put = self
                .lambda
                .put_function_event_invoke_config()
                .function_name(text_of(&config["FunctionName"]))
                .set_maximum_event_age_in_seconds(integer(&config["MaximumEventAgeInSeconds"]))
                .set_maximum_retry_attempts(integer(&config["MaximumRetryAttempts"]))
                .set_destination_config(destination);
            sent(format!("configuring invocations, {id}"), put.send()).await?;
        }
        Ok(())
    }

    /// Lets the template's mappings of a function bring it their queues' messages.
    async fn create_mappings(&self, function: &str) -> Result<(), DeployError> {
        let all = self.stack.of_type("AWS::Lambda::EventSourceMapping");
        for (id, mapping) in
            all.filter(|(_, mapping)| text_of(&mapping["FunctionName"]) == function)
        {
            let concurrency = integer(&mapping["ScalingConfig"]["MaximumConcurrency"]);
            let scaling = ScalingConfig::builder().set_maximum_concurrency(concurrency);
            let create = self
                .lambda
                .create_event_source_mapping()
                .function_name(function)
                .event_source_arn(text_of(&mapping["EventSourceArn"]))
                .set_batch_size(integer(&mapping["BatchSize"]))
                .function_response_types(FunctionResponseType::ReportBatchItemFailures)
                .set_scaling_config(concurrency.map(|_| scaling.build()));
            let created = sent(format!("creating mapping {id}"), create.send()).await?;
            let mappings = self.mappings.lock();
            let mut mappings = mappings.unwrap_or_else(PoisonError::into_inner);
            mappings.insert(name(id), created.uuid.unwrap_or_default());
        }
        Ok(())
    }

    /// What CloudFormation does with a stack in work when parameters change: a new revision of
    /// the task definition, then the functions' environments, and at last the old revision is
    /// deregistered. Nothing else may change.
    ///
    /// # Errors
    /// When a value is refused, or another resource would change.
    pub async fn update(&self, parameters: Parameters) -> Result<(), DeployError> {
        let mut options = self.options.clone();
        options.parameters.extend(parameters);
        let draft = options.resolve(&self.template, self.emulator.endpoint(), "")?;
        let definition = register(&self.cloud, &task_definition(&draft, &options)?)?;
        let stack = options.resolve(&self.template, self.emulator.endpoint(), &definition)?;
        for (id, resource) in &stack.resources {
            let is_updated = UPDATED_TYPES.contains(&resource.kind.as_str());
            if !is_updated && self.stack.resources.get(id) != Some(resource) {
                return Err(DeployError::NotUpdated(id.clone()));
            }
        }
        for (id, function, _) in functions(&stack) {
            let update = self
                .lambda
                .update_function_configuration()
                .function_name(name(id))
                .environment(self.function_environment(function));
            sent(format!("updating function {id}"), update.send()).await?;
            self.until_ready(&name(id)).await?;
        }
        let current = self.task_definition.lock();
        let mut current = current.unwrap_or_else(PoisonError::into_inner);
        let old = std::mem::replace(&mut *current, definition);
        self.cloud.deregister_task_definition(&old);
        Ok(())
    }

    async fn until_ready(&self, function: &str) -> Result<(), DeployError> {
        let started = Instant::now();
        loop {
            let what = format!("waiting for function {function}");
            let get = self
                .lambda
                .get_function_configuration()
                .function_name(function);
            let answer = sent(&what, get.send()).await?;
            if answer
                .state()
                .is_none_or(|state| state.as_str() == "Active")
            {
                return Ok(());
            }
            if started.elapsed() > FUNCTION_READY_LIMIT {
                let problem = format!("its state is {:?}", answer.state());
                return Err(CallFailed { what, problem }.into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) async fn create_rules(&self) -> Result<(), DeployError> {
        for (id, rule) in self.stack.of_type("AWS::Events::Rule") {
            let what = format!("creating rule {id}");
            let pattern = &rule["EventPattern"];
            let put = self
                .events
                .put_rule()
                .name(name(id))
                .set_schedule_expression(rule["ScheduleExpression"].as_str().map(str::to_owned))
                .set_event_pattern(pattern.is_object().then(|| pattern.to_string()));
            sent(&what, put.send()).await?;
            let mut targets = self.events.put_targets().rule(name(id));
            for target in list(&rule["Targets"]) {
                let target = aws_sdk_eventbridge::types::Target::builder()
                    .id(text_of(&target["Id"]))
                    .arn(text_of(&target["Arn"]));
                targets = targets.targets(target.build().map_err(failed(&what))?);
            }
            sent(&what, targets.send()).await?;
        }
        Ok(())
    }

    /// Lets the source bucket tell intake of its objects.
    pub(super) async fn connect(&self, way_in: WayIn) -> Result<(), DeployError> {
        let what = "notifying intake";
        let configuration = NotificationConfiguration::builder();
        let configuration = match way_in {
            WayIn::EventBridge => configuration
                .event_bridge_configuration(EventBridgeConfiguration::builder().build()),
            WayIn::Notification => {
                let intake = format!("function:{}", name("IntakeFunction"));
                let function = LambdaFunctionConfiguration::builder()
                    .id("intake")
                    .lambda_function_arn(arn("lambda", &intake))
                    .events(Event::from("s3:ObjectCreated:*"))
                    .events(Event::from("s3:ObjectRemoved:*"));
                let function = function.build().map_err(failed(what))?;
                configuration.lambda_function_configurations(function)
            }
        };
        let put = self
            .s3
            .put_bucket_notification_configuration()
            .bucket(SOURCE_BUCKET)
            .notification_configuration(configuration.build());
        sent(what, put.send()).await?;
        Ok(())
    }
}

fn integer(value: &Value) -> Option<i32> {
    number(value).map(|value| value as i32)
}

fn group_of(logical_id: &str, cluster: &str, group: &Value) -> GroupConfig {
    let policy = &group["MixedInstancesPolicy"];
    let instance_type = text_of(&policy["LaunchTemplate"]["Overrides"][0]["InstanceType"]);
    let on_demand = &policy["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"];
    let size = |field: &str| text_of(&group[field]).parse().unwrap_or(0);
    let subnets = list(&group["VPCZoneIdentifier"]).len().max(1);
    let zones = ["a", "b", "c", "d", "e", "f"].into_iter().take(subnets);
    GroupConfig {
        spot: number(on_demand) == Some(0.0),
        min: size("MinSize"),
        desired: size("MinSize"),
        zones: zones.map(|letter| format!("{REGION}{letter}")).collect(),
        protect_new_instances: group["NewInstancesProtectedFromScaleIn"] == true,
        newest_first: group["TerminationPolicies"][0] == "NewestInstance",
        ..GroupConfig::new(&name(logical_id), cluster, &instance_type, size("MaxSize"))
    }
}

/// The functions whose programs are ours, each with that: CDK's synthesis brings others.
fn functions(stack: &Stack) -> Vec<(&str, &Value, &str)> {
    ["AWS::Serverless::Function", "AWS::Lambda::Function"]
        .into_iter()
        .flat_map(|kind| stack.of_type(kind))
        .filter_map(|(id, function)| {
            let binary = &stack.resources[id].metadata["BuildProperties"]["Binary"];
            Some((id, function, binary.as_str()?))
        })
        .collect()
}

/// Registers a task definition and answers its ARN.
pub(super) fn register(cloud: &Cloud, definition: &Value) -> Result<String, DeployError> {
    let registered = cloud.register_task_definition(definition);
    Ok(registered.map_err(failed("registering the task definition"))?)
}

/// The template's task definition as RegisterTaskDefinition takes it, with the
/// variables that only make sense inside its container replaced.
pub(super) fn task_definition(
    stack: &Stack,
    options: &DeploymentOptions,
) -> Result<Value, DeployError> {
    let (id, properties) = stack
        .of_type("AWS::ECS::TaskDefinition")
        .next()
        .ok_or(DeployError::Lacks("AWS::ECS::TaskDefinition"))?;
    let mut definition = camel_case(properties);
    if definition["family"].is_null() {
        // CloudFormation's own names: another one for every version.
        let tail = uuid::Uuid::new_v4().simple().to_string();
        definition["family"] = json!(format!("{}-{}", name(id), &tail[..12]));
    }
    let container = definition["containerDefinitions"]
        .get_mut(0)
        .ok_or(DeployError::Lacks("container definition"))?;
    let mut variables: BTreeMap<String, String> = list(&container["environment"])
        .into_iter()
        .map(|one| (text_of(&one["name"]), text_of(&one["value"])))
        .collect();
    localise(&mut variables, &options.bundle);
    variables.extend(options.task_environment.clone());
    container["environment"] = variables
        .iter()
        .map(|(name, value)| json!({"name": name, "value": value}))
        .collect();
    Ok(definition)
}

/// CloudFormation writes `ContainerDefinitions` where the API has `containerDefinitions`.
fn camel_case(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let renamed = members.iter().map(|(name, member)| {
                let mut name = name.clone();
                name[..1].make_ascii_lowercase();
                (name, camel_case(member))
            });
            Value::Object(renamed.collect::<Map<_, _>>())
        }
        Value::Array(items) => items.iter().map(camel_case).collect(),
        scalar => scalar.clone(),
    }
}

/// A Lambda package: a zip with one file, `bootstrap`, which is the program at
/// its place in the target folder. (Debug builds are 50 MB each: sending them as
/// base64 through two SDK layers made a start take six seconds.)
fn code_package(program: &Path) -> Result<Vec<u8>, DeployError> {
    use std::io::Write;
    // Single quotes keep everything but a single quote from the shell.
    let quoted = program.display().to_string().replace('\'', r"'\''");
    let bootstrap = format!("#!/bin/sh\nexec '{quoted}'\n");
    let package = || -> io::Result<Vec<u8>> {
        let mut archive = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
        let stored = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .unix_permissions(0o755);
        archive.start_file("bootstrap", stored)?;
        archive.write_all(bootstrap.as_bytes())?;
        Ok(archive.finish()?.into_inner())
    };
    package().map_err(DeployError::file(program))
}
