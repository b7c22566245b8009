//! The pipeline, deployed on this machine from `infra/template.yaml`.
//!
//! The template's resources that the pipeline's programs touch are created in
//! the emulator and in the local cloud; the others (roles, policies, alarms,
//! security groups, the file system) have no counterpart here and are left out.
//! Around it stands what a user's account has already: the source bucket, and
//! a queue for the next middleware, subscribed as a vector store subscribes.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use aws_config::SdkConfig;
use aws_sdk_lambda::types::{DestinationConfig, Environment, FunctionCode, OnFailure, Runtime};
use aws_sdk_s3::types::{Event, LambdaFunctionConfiguration, NotificationConfiguration};
use aws_sdk_sqs::types::{DeleteMessageBatchRequestEntry, QueueAttributeName};
use serde_json::{Map, Value, json};
use thiserror::Error;
use tokio::task::JoinHandle;

use crate::{
    cloud::{ACCOUNT, Cloud, CloudConfig, GroupConfig, ImageProgram, Timings},
    emulator::{Emulator, EmulatorError, LogLine},
    process, router, sdk,
    template::{PhysicalIds, Resource, Stack, Template, TemplateError, text_of},
};

/// The stack's name, the beginning of every physical name.
const STACK: &str = "clip";
/// The bucket that images are uploaded to.
pub const SOURCE_BUCKET: &str = "clip-source";
/// The queue that stands for the next middleware.
const NEXT_QUEUE: &str = "clip-next-middleware";
/// How a vector store subscribes to this system's topic.
const NEXT_FILTER: &str = include_str!("../../../events/filters/vector-store.json");
/// Lambda functions must have a role; the emulator asks nothing of it.
const ROLE_ARN: &str = "arn:aws:iam::000000000000:role/local";
/// Messages of one receive call (SQS ReceiveMessage API).
const RECEIVE_MAX: i32 = 10;
/// A function of the template is ready to be invoked well within this.
const FUNCTION_READY_LIMIT: Duration = Duration::from_secs(60);

/// What does not fit on AWS's side of the container: these variables of the task
/// definition are replaced, since this machine has no GPU and no EFS.
/// Everything else in the task's environment is the template's.
const TASK_VARIABLES_LEFT_OUT: [&str; 2] = ["MODEL_URI", "CACHE_DIR"];

/// Why the pipeline is not up.
#[derive(Debug, Error)]
pub enum DeployError {
    /// The emulator.
    #[error(transparent)]
    Emulator(#[from] EmulatorError),
    /// The template.
    #[error("{path}: {source}")]
    Template {
        /// The template's file.
        path: PathBuf,
        /// What is wrong.
        source: TemplateError,
    },
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A program is not built.
    #[error("{0} is not there: build it first (cargo build -p gpu-task -p intake -p scaler)")]
    NotBuilt(PathBuf),
    /// A resource could not be created, or a call failed.
    #[error("{what}: {problem}")]
    Call {
        /// What was being done.
        what: String,
        /// What the service said.
        problem: String,
    },
    /// The template lacks something that the pipeline needs.
    #[error("{template} has no {what}")]
    Lacks {
        /// The template's file.
        template: PathBuf,
        /// What it lacks.
        what: String,
    },
}

/// How images in the source bucket reach intake; both are ways in that the
/// template provides for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WayIn {
    /// S3 notifications straight to the function. The emulator tries a failed
    /// invocation again on this way, as AWS does on both.
    #[default]
    Notification,
    /// The bucket's events on the default event bus, matched by the template's rule.
    EventBridge,
}

/// The pipeline's own programs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The task.
    pub gpu_task: PathBuf,
    /// Where the functions' programs lie, by the names that the template builds.
    pub functions: PathBuf,
}

impl Programs {
    /// Those built beside the running program (`target/debug`).
    #[must_use]
    pub fn beside_this_one() -> Self {
        let gpu_task = process::sibling("gpu-task");
        let functions = gpu_task.parent().map(Path::to_owned).unwrap_or_default();
        Self {
            gpu_task,
            functions,
        }
    }
}

/// What to deploy, and how.
#[derive(Debug, Clone)]
pub struct DeploymentOptions {
    /// The `ministack` program.
    pub ministack: PathBuf,
    /// The pipeline's own programs.
    pub programs: Programs,
    /// The SAM template.
    pub template: PathBuf,
    /// Values for its parameters, over [`local_parameters`].
    pub parameters: BTreeMap<String, String>,
    /// The model bundle that tasks load.
    pub bundle: PathBuf,
    /// Logs, and the emulator's temporary files.
    pub work_dir: PathBuf,
    /// How images reach intake.
    pub way_in: WayIn,
    /// How long instances and tasks take to start.
    pub timings: Timings,
    /// Variables of every task, over the template's.
    pub task_environment: BTreeMap<String, String>,
    /// Variables of every function, over the template's.
    pub function_environment: BTreeMap<String, String>,
}

impl DeploymentOptions {
    /// The workspace's template and programs, a bundle, and a folder for logs;
    /// the emulator is the one that `LOCAL_MINISTACK` names.
    ///
    /// # Errors
    /// When `LOCAL_MINISTACK` is not set.
    pub fn new(bundle: &Path, work_dir: &Path) -> Result<Self, EmulatorError> {
        Ok(Self {
            ministack: crate::emulator::program_from_env()?,
            programs: Programs::beside_this_one(),
            template: workspace_template(),
            parameters: BTreeMap::new(),
            bundle: bundle.to_owned(),
            work_dir: work_dir.to_owned(),
            way_in: WayIn::default(),
            timings: Timings::default(),
            task_environment: BTreeMap::new(),
            function_environment: BTreeMap::new(),
        })
    }

    /// Sets a parameter of the template.
    #[must_use]
    pub fn parameter(mut self, name: &str, value: impl ToString) -> Self {
        self.parameters.insert(name.to_owned(), value.to_string());
        self
    }
}

/// The template of this workspace.
#[must_use]
pub fn workspace_template() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../infra/template.yaml")
}

/// The template's parameters as one machine needs them: names of what stands
/// around the stack, and times that fit instances which boot in seconds.
#[must_use]
pub fn local_parameters() -> BTreeMap<String, String> {
    let values = [
        ("VpcId", "vpc-00000000"),
        ("PrivateSubnet1", "subnet-0000000a"),
        ("PrivateSubnet2", "subnet-0000000b"),
        ("SourceBucket1", SOURCE_BUCKET),
        ("ModelBucket", "clip-models"),
        ("ModelName", "ViT-B/32"),
        ("IdleExitSeconds", "2"),
        ("IdleGraceSeconds", "1"),
        ("BootSeconds", "10"),
        // A debug build on two cores; tasks report their own rate soon.
        ("ImagesPerSecond", "5"),
        ("TargetDrainSeconds", "60"),
    ];
    values
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// Physical names: `clip-<LogicalId>`, in the form that each service has.
struct Names<'a> {
    endpoint: &'a str,
}

impl Names<'_> {
    fn name(logical_id: &str, kind: &str) -> String {
        let name = format!("{STACK}-{logical_id}");
        if kind == "AWS::S3::Bucket" {
            name.to_lowercase()
        } else {
            name
        }
    }

    fn arn(service: &str, resource: &str) -> String {
        format!("arn:aws:{service}:{}:{ACCOUNT}:{resource}", sdk::REGION)
    }
}

impl PhysicalIds for Names<'_> {
    fn reference(&self, logical_id: &str, kind: &str) -> String {
        let name = Self::name(logical_id, kind);
        match kind {
            "AWS::SQS::Queue" => format!("{}/{ACCOUNT}/{name}", self.endpoint),
            "AWS::SNS::Topic" => Self::arn("sns", &name),
            "AWS::ECS::TaskDefinition" => Self::arn("ecs", &format!("task-definition/{name}:1")),
            _ => name,
        }
    }

    fn attribute(&self, logical_id: &str, kind: &str, attribute: &str) -> String {
        let name = Self::name(logical_id, kind);
        match (kind, attribute) {
            ("AWS::SQS::Queue", "Arn") => Self::arn("sqs", &name),
            ("AWS::SNS::Topic", "TopicArn") => Self::arn("sns", &name),
            ("AWS::S3::Bucket", "Arn") => format!("arn:aws:s3:::{name}"),
            ("AWS::Serverless::Function" | "AWS::Lambda::Function", "Arn") => {
                Self::arn("lambda", &format!("function:{name}"))
            }
            ("AWS::ECS::Cluster", "Arn") => Self::arn("ecs", &format!("cluster/{name}")),
            ("AWS::Events::Rule", "Arn") => Self::arn("events", &format!("rule/{name}")),
            ("AWS::IAM::Role", "Arn") => format!("arn:aws:iam::{ACCOUNT}:role/{name}"),
            (_, "QueueName" | "TopicName" | "RoleName") => name,
            _ => format!("{name}.{attribute}"),
        }
    }

    fn pseudo(&self, name: &str) -> Option<String> {
        Some(match name {
            "Region" => sdk::REGION.to_owned(),
            "AccountId" => ACCOUNT.to_owned(),
            "Partition" => "aws".to_owned(),
            "URLSuffix" => "amazonaws.com".to_owned(),
            "StackName" => STACK.to_owned(),
            "StackId" => Self::arn("cloudformation", &format!("stack/{STACK}/local")),
            _ => return None,
        })
    }
}

/// A message in the dead-letter queue.
#[derive(Debug, Clone)]
pub struct Rejection {
    /// What was rejected, as it was received.
    pub body: String,
    /// `RejectionReason`; none when SQS gave the message up after too many receives.
    pub reason: Option<String>,
    /// `RejectionStage`.
    pub stage: Option<String>,
    /// `RejectedBy`.
    pub by: Option<String>,
    /// `RejectedObject`, or the document in the body.
    pub object: Option<String>,
}

/// Messages of a queue.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueCounts {
    /// Waiting.
    pub visible: usize,
    /// Received and not yet deleted.
    pub in_flight: usize,
}

impl QueueCounts {
    /// All of them.
    #[must_use]
    pub fn total(self) -> usize {
        self.visible + self.in_flight
    }
}

/// The running pipeline. Dropping it kills every process it started.
pub struct Deployment {
    /// ECS and Auto Scaling: snapshots, events, faults.
    pub cloud: Cloud,
    /// The emulator.
    pub emulator: Emulator,
    /// A client configuration for the emulator.
    pub sdk: SdkConfig,
    /// S3, path style.
    pub s3: aws_sdk_s3::Client,
    /// SQS.
    pub sqs: aws_sdk_sqs::Client,
    /// SNS.
    pub sns: aws_sdk_sns::Client,
    /// Lambda.
    pub lambda: aws_sdk_lambda::Client,
    /// EventBridge.
    pub events: aws_sdk_eventbridge::Client,
    /// The resolved template.
    pub stack: Stack,
    /// Where the emulated ECS and Auto Scaling are served.
    pub cloud_endpoint: String,
    /// The queue that stands for the next middleware.
    pub next_queue_url: String,
    router: JoinHandle<()>,
    started_ms: i64,
}

impl Drop for Deployment {
    fn drop(&mut self) {
        self.router.abort();
        self.cloud.kill_everything();
    }
}

impl Deployment {
    /// Starts the emulator and the local cloud and deploys the template into them.
    ///
    /// # Errors
    /// When anything that the pipeline needs is missing or refused.
    pub async fn start(options: &DeploymentOptions) -> Result<Self, DeployError> {
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| DeployError::File { path, source }
        };
        let work_dir = std::path::absolute(&options.work_dir).map_err(file(&options.work_dir))?;
        fs::create_dir_all(&work_dir).map_err(file(&work_dir))?;
        let text = fs::read_to_string(&options.template).map_err(file(&options.template))?;
        let template_error = |source| DeployError::Template {
            path: options.template.clone(),
            source,
        };
        let template = Template::parse(&text).map_err(template_error)?;
        if !options.programs.gpu_task.is_file() {
            return Err(DeployError::NotBuilt(options.programs.gpu_task.clone()));
        }

        let started_ms = chrono::Utc::now().timestamp_millis();
        let emulator = Emulator::start(&options.ministack, &work_dir).await?;
        let mut parameters = local_parameters();
        if options.way_in == WayIn::Notification {
            parameters.insert("SourceEvents".to_owned(), "None".to_owned());
        }
        parameters.extend(options.parameters.clone());
        let names = Names {
            endpoint: emulator.endpoint(),
        };
        let stack = template
            .resolve(&parameters, &names)
            .map_err(template_error)?;
        let sdk = sdk::config(emulator.endpoint());

        let bundle = std::path::absolute(&options.bundle).map_err(file(&options.bundle))?;
        let definition = task_definition(
            &stack,
            &options.template,
            &bundle,
            &options.task_environment,
        )?;
        let image = definition["containerDefinitions"][0]["image"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let task = ImageProgram {
            program: std::path::absolute(&options.programs.gpu_task)
                .map_err(file(&options.programs.gpu_task))?,
            environment: container_surroundings(emulator.endpoint()),
        };
        let cloud = Cloud::new(CloudConfig {
            region: sdk::REGION.to_owned(),
            timings: options.timings.clone(),
            images: BTreeMap::from([(image, task)]),
            log_dir: work_dir.clone(),
        });
        let cloud_endpoint = cloud.serve().await.map_err(file(&work_dir))?;
        let s3_config = aws_sdk_s3::config::Builder::from(&sdk)
            .force_path_style(true)
            .build();
        let router = router::start(&cloud, emulator.endpoint());
        let mut deployment = Self {
            s3: aws_sdk_s3::Client::from_conf(s3_config),
            sqs: aws_sdk_sqs::Client::new(&sdk),
            sns: aws_sdk_sns::Client::new(&sdk),
            lambda: aws_sdk_lambda::Client::new(&sdk),
            events: aws_sdk_eventbridge::Client::new(&sdk),
            next_queue_url: format!("{}/{ACCOUNT}/{NEXT_QUEUE}", emulator.endpoint()),
            cloud,
            emulator,
            sdk,
            stack,
            cloud_endpoint,
            router,
            started_ms,
        };
        deployment.create_storage().await?;
        deployment.create_cluster(&definition)?;
        deployment.create_functions(options).await?;
        deployment.create_rules().await?;
        deployment.connect(options.way_in).await?;
        Ok(deployment)
    }

    // ------------------------------------------------------------ resources --

    async fn create_storage(&mut self) -> Result<(), DeployError> {
        let mut buckets = vec![SOURCE_BUCKET.to_owned()];
        buckets.extend(
            self.stack
                .of_kind("AWS::S3::Bucket")
                .map(|(id, _)| Names::name(id, "AWS::S3::Bucket")),
        );
        for bucket in buckets {
            let created = self.s3.create_bucket().bucket(&bucket).send().await;
            created.map_err(|error| {
                call(
                    format!("creating bucket {bucket}"),
                    &error.into_service_error(),
                )
            })?;
        }

        let queues: Vec<(String, Value)> = self
            .stack
            .of_kind("AWS::SQS::Queue")
            .map(|(id, queue)| (Names::name(id, ""), queue.properties.clone()))
            .collect();
        // A queue with a redrive policy needs its dead-letter queue first.
        let (with_redrive, without): (Vec<_>, Vec<_>) = queues
            .into_iter()
            .partition(|(_, properties)| properties["RedrivePolicy"].is_object());
        for (name, properties) in without.into_iter().chain(with_redrive) {
            self.create_queue(&name, &properties).await?;
        }
        self.create_queue(NEXT_QUEUE, &Value::Null).await?;

        let topics: Vec<String> = self
            .stack
            .of_kind("AWS::SNS::Topic")
            .map(|(id, _)| Names::name(id, ""))
            .collect();
        for topic in topics {
            let created = self.sns.create_topic().name(&topic).send().await;
            created.map_err(|error| {
                call(
                    format!("creating topic {topic}"),
                    &error.into_service_error(),
                )
            })?;
        }
        let subscriptions: Vec<Value> = self
            .stack
            .of_kind("AWS::SNS::Subscription")
            .map(|(_, resource)| resource.properties.clone())
            .collect();
        for subscription in subscriptions {
            self.subscribe(&subscription).await?;
        }
        let topic = self.output_topic_arn()?;
        let next = json!({
            "TopicArn": topic,
            "Protocol": "sqs",
            "Endpoint": Names::arn("sqs", NEXT_QUEUE),
            "RawMessageDelivery": true,
            "FilterPolicyScope": "MessageBody",
            "FilterPolicy": serde_json::from_str::<Value>(NEXT_FILTER).unwrap_or_default(),
        });
        self.subscribe(&next).await
    }

    /// Creates a queue with the attributes of a template's `AWS::SQS::Queue`.
    ///
    /// # Errors
    /// When the emulator refuses it.
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
        let mut request = self.sqs.create_queue().queue_name(name);
        for attribute in ATTRIBUTES {
            let value = &properties[attribute];
            if !value.is_null() {
                request = request.attributes(QueueAttributeName::from(attribute), text_of(value));
            }
        }
        let created = request.send().await.map_err(|error| {
            call(
                format!("creating queue {name}"),
                &error.into_service_error(),
            )
        })?;
        Ok(created.queue_url().unwrap_or_default().to_owned())
    }

    /// Subscribes as a template's `AWS::SNS::Subscription` does.
    ///
    /// # Errors
    /// When the emulator refuses it.
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
        request
            .send()
            .await
            .map(|_| ())
            .map_err(|error| call(what, &error.into_service_error()))
    }

    fn create_cluster(&self, definition: &Value) -> Result<(), DeployError> {
        for (id, _) in self.stack.of_kind("AWS::ECS::Cluster") {
            self.cloud.create_cluster(&Names::name(id, ""));
        }
        let cluster = self
            .stack
            .of_kind("AWS::ECS::Cluster")
            .next()
            .map(|(id, _)| Names::name(id, ""))
            .unwrap_or_default();
        for (id, group) in self.stack.of_kind("AWS::AutoScaling::AutoScalingGroup") {
            self.cloud.create_group(group_of(id, &cluster, group));
        }
        let registered = self.cloud.register_task_definition(definition);
        registered.map(|_| ()).map_err(|problem| DeployError::Call {
            what: "registering the task definition".to_owned(),
            problem,
        })
    }

    async fn create_functions(&self, options: &DeploymentOptions) -> Result<(), DeployError> {
        let functions: Vec<(String, Resource)> = self
            .stack
            .of_kind("AWS::Serverless::Function")
            .map(|(id, resource)| (id.to_owned(), resource.clone()))
            .collect();
        let mut names = Vec::new();
        for (id, function) in functions {
            let name = Names::name(&id, "");
            let binary = text_of(&function.metadata["BuildProperties"]["Binary"]);
            let program = options.programs.functions.join(&binary);
            if binary.is_empty() || !program.is_file() {
                return Err(DeployError::NotBuilt(program));
            }
            let code = code_package(&program)?;
            let mut variables = BTreeMap::from([
                (
                    "AWS_ENDPOINT_URL_ECS".to_owned(),
                    self.cloud_endpoint.clone(),
                ),
                (
                    "AWS_ENDPOINT_URL_AUTO_SCALING".to_owned(),
                    self.cloud_endpoint.clone(),
                ),
            ]);
            if let Some(declared) = function.properties["Environment"]["Variables"].as_object() {
                // An empty value stands for "not set", as it does on AWS's console.
                variables.extend(
                    declared
                        .iter()
                        .map(|(name, value)| (name.clone(), text_of(value))),
                );
            }
            variables.extend(options.function_environment.clone());
            let environment = Environment::builder()
                .set_variables(Some(variables.into_iter().collect()))
                .build();
            let number = |field: &str| {
                function.properties[field]
                    .as_i64()
                    .and_then(|value| i32::try_from(value).ok())
            };
            // Reserved concurrency is left out: the emulator drops an asynchronous
            // event that it throttles, where Lambda keeps it for later.
            let request = self
                .lambda
                .create_function()
                .function_name(&name)
                .runtime(Runtime::Providedal2023)
                .handler("bootstrap")
                .role(ROLE_ARN)
                .set_timeout(number("Timeout"))
                .set_memory_size(number("MemorySize"))
                .environment(environment)
                .code(
                    FunctionCode::builder()
                        .zip_file(aws_sdk_lambda::primitives::Blob::new(code))
                        .build(),
                );
            request.send().await.map_err(|error| {
                call(
                    format!("creating function {name}"),
                    &error.into_service_error(),
                )
            })?;
            names.push(name);
        }
        for name in names {
            self.until_ready(&name).await?;
        }
        let configs: Vec<Value> = self
            .stack
            .of_kind("AWS::Lambda::EventInvokeConfig")
            .map(|(_, resource)| resource.properties.clone())
            .collect();
        for config in configs {
            let name = text_of(&config["FunctionName"]);
            let number = |field: &str| {
                config[field]
                    .as_i64()
                    .and_then(|value| i32::try_from(value).ok())
            };
            let destination = config["DestinationConfig"]["OnFailure"]["Destination"]
                .as_str()
                .map(|arn| {
                    DestinationConfig::builder()
                        .on_failure(OnFailure::builder().destination(arn).build())
                        .build()
                });
            let request = self
                .lambda
                .put_function_event_invoke_config()
                .function_name(&name)
                .set_maximum_event_age_in_seconds(number("MaximumEventAgeInSeconds"))
                .set_maximum_retry_attempts(number("MaximumRetryAttempts"))
                .set_destination_config(destination);
            request.send().await.map_err(|error| {
                call(
                    format!("configuring function {name}"),
                    &error.into_service_error(),
                )
            })?;
        }
        Ok(())
    }

    async fn until_ready(&self, function: &str) -> Result<(), DeployError> {
        let started = Instant::now();
        loop {
            let answer = self
                .lambda
                .get_function_configuration()
                .function_name(function)
                .send()
                .await;
            let state = answer.map_err(|error| {
                call(
                    format!("reading function {function}"),
                    &error.into_service_error(),
                )
            })?;
            if state.state().is_none_or(|state| state.as_str() == "Active") {
                return Ok(());
            }
            if started.elapsed() > FUNCTION_READY_LIMIT {
                let problem = format!("its state is {:?}", state.state());
                return Err(DeployError::Call {
                    what: format!("creating function {function}"),
                    problem,
                });
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn create_rules(&self) -> Result<(), DeployError> {
        for (id, rule) in self.stack.of_kind("AWS::Events::Rule") {
            let name = Names::name(id, "");
            let what = || format!("creating rule {name}");
            let mut request = self.events.put_rule().name(&name);
            if let Some(schedule) = rule.properties["ScheduleExpression"].as_str() {
                request = request.schedule_expression(schedule);
            }
            if rule.properties["EventPattern"].is_object() {
                request = request.event_pattern(rule.properties["EventPattern"].to_string());
            }
            request
                .send()
                .await
                .map_err(|error| call(what(), &error.into_service_error()))?;
            let mut targets = self.events.put_targets().rule(&name);
            for target in rule.properties["Targets"].as_array().into_iter().flatten() {
                let target = aws_sdk_eventbridge::types::Target::builder()
                    .id(text_of(&target["Id"]))
                    .arn(text_of(&target["Arn"]))
                    .build()
                    .map_err(|error| DeployError::Call {
                        what: what(),
                        problem: error.to_string(),
                    })?;
                targets = targets.targets(target);
            }
            targets
                .send()
                .await
                .map_err(|error| call(what(), &error.into_service_error()))?;
        }
        Ok(())
    }

    /// Lets the source bucket tell intake of its objects.
    async fn connect(&self, way_in: WayIn) -> Result<(), DeployError> {
        let configuration = match way_in {
            WayIn::EventBridge => NotificationConfiguration::builder()
                .event_bridge_configuration(
                    aws_sdk_s3::types::EventBridgeConfiguration::builder().build(),
                )
                .build(),
            WayIn::Notification => {
                let arn = Names::arn(
                    "lambda",
                    &format!("function:{}", Names::name("IntakeFunction", "")),
                );
                let function = LambdaFunctionConfiguration::builder()
                    .id("intake")
                    .lambda_function_arn(arn)
                    .events(Event::from("s3:ObjectCreated:*"))
                    .events(Event::from("s3:ObjectRemoved:*"))
                    .build()
                    .map_err(|error| DeployError::Call {
                        what: "notifying intake".to_owned(),
                        problem: error.to_string(),
                    })?;
                NotificationConfiguration::builder()
                    .lambda_function_configurations(function)
                    .build()
            }
        };
        let request = self
            .s3
            .put_bucket_notification_configuration()
            .bucket(SOURCE_BUCKET)
            .notification_configuration(configuration);
        request
            .send()
            .await
            .map(|_| ())
            .map_err(|error| call("notifying intake".to_owned(), &error.into_service_error()))
    }

    // ---------------------------------------------------------------- usage --

    fn variable(&self, function: &str, name: &str) -> String {
        let resource = self.stack.resources.get(function);
        resource
            .map(|resource| text_of(&resource.properties["Environment"]["Variables"][name]))
            .unwrap_or_default()
    }

    fn output_topic_arn(&self) -> Result<String, DeployError> {
        let topic = self.variable("IntakeFunction", "OUTPUT_TOPIC_ARN");
        if !topic.is_empty() {
            return Ok(topic);
        }
        // With another output kind there is still the topic itself.
        let first = self
            .stack
            .of_kind("AWS::SNS::Topic")
            .next()
            .map(|(id, _)| Names::arn("sns", &Names::name(id, "")));
        first.ok_or_else(|| DeployError::Lacks {
            template: workspace_template(),
            what: "AWS::SNS::Topic".to_owned(),
        })
    }

    /// The input queue.
    #[must_use]
    pub fn input_queue_url(&self) -> String {
        self.variable("IntakeFunction", "INPUT_QUEUE_URL")
    }

    /// The dead-letter queue.
    #[must_use]
    pub fn dead_letter_queue_url(&self) -> String {
        self.variable("IntakeFunction", "DEAD_LETTER_QUEUE_URL")
    }

    /// The bucket with the vectors.
    #[must_use]
    pub fn cache_bucket(&self) -> String {
        self.variable("IntakeFunction", "CACHE_BUCKET")
    }

    /// Uploads an object into the source bucket.
    ///
    /// # Errors
    /// When the emulator refuses it.
    pub async fn upload(
        &self,
        key: &str,
        content: Vec<u8>,
        content_type: Option<&str>,
    ) -> Result<(), DeployError> {
        let request = self
            .s3
            .put_object()
            .bucket(SOURCE_BUCKET)
            .key(key)
            .body(content.into());
        let sent = request
            .set_content_type(content_type.map(str::to_owned))
            .send()
            .await;
        sent.map(|_| ())
            .map_err(|error| call(format!("uploading {key}"), &error.into_service_error()))
    }

    /// Takes what has arrived at the next middleware: CloudEvents, oldest first.
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub async fn take_events(&self) -> Result<Vec<Value>, DeployError> {
        let messages = self.take(&self.next_queue_url.clone()).await?;
        Ok(messages
            .iter()
            .map(|message| {
                serde_json::from_str(message.body().unwrap_or_default()).unwrap_or_default()
            })
            .collect())
    }

    /// Takes what has arrived in the dead-letter queue.
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub async fn take_rejections(&self) -> Result<Vec<Rejection>, DeployError> {
        let messages = self.take(&self.dead_letter_queue_url()).await?;
        Ok(messages.iter().map(rejection_of).collect())
    }

    async fn take(&self, queue_url: &str) -> Result<Vec<aws_sdk_sqs::types::Message>, DeployError> {
        let mut taken = Vec::new();
        loop {
            let answer = self
                .sqs
                .receive_message()
                .queue_url(queue_url)
                .max_number_of_messages(RECEIVE_MAX)
                .message_attribute_names("All")
                .wait_time_seconds(0)
                .send()
                .await
                .map_err(|error| {
                    call(
                        format!("receiving from {queue_url}"),
                        &error.into_service_error(),
                    )
                })?;
            if answer.messages().is_empty() {
                return Ok(taken);
            }
            let mut deletion = self.sqs.delete_message_batch().queue_url(queue_url);
            for (index, message) in answer.messages().iter().enumerate() {
                let entry = DeleteMessageBatchRequestEntry::builder()
                    .id(index.to_string())
                    .receipt_handle(message.receipt_handle().unwrap_or_default())
                    .build()
                    .map_err(|error| DeployError::Call {
                        what: format!("deleting from {queue_url}"),
                        problem: error.to_string(),
                    })?;
                deletion = deletion.entries(entry);
            }
            let deleted = deletion.send().await;
            deleted.map_err(|error| {
                call(
                    format!("deleting from {queue_url}"),
                    &error.into_service_error(),
                )
            })?;
            taken.extend(answer.messages().iter().cloned());
        }
    }

    /// How many messages a queue holds.
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub async fn queue_counts(&self, queue_url: &str) -> Result<QueueCounts, DeployError> {
        let (visible, hidden) = (
            QueueAttributeName::ApproximateNumberOfMessages,
            QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
        );
        let request = self
            .sqs
            .get_queue_attributes()
            .queue_url(queue_url)
            .attribute_names(visible.clone())
            .attribute_names(hidden.clone());
        let answer = request
            .send()
            .await
            .map_err(|error| call(format!("counting {queue_url}"), &error.into_service_error()))?;
        let count = |name| {
            answer
                .attributes()
                .and_then(|all| all.get(name))
                .and_then(|text| text.parse().ok())
                .unwrap_or(0)
        };
        Ok(QueueCounts {
            visible: count(&visible),
            in_flight: count(&hidden),
        })
    }

    /// Reads an object; none when there is none.
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub async fn object(&self, bucket: &str, key: &str) -> Result<Option<Vec<u8>>, DeployError> {
        let what = || format!("reading s3://{bucket}/{key}");
        match self.s3.get_object().bucket(bucket).key(key).send().await {
            Ok(found) => {
                let body = found.body.collect().await;
                let body = body.map_err(|error| DeployError::Call {
                    what: what(),
                    problem: error.to_string(),
                })?;
                Ok(Some(body.into_bytes().to_vec()))
            }
            Err(error) => {
                let error = error.into_service_error();
                if error.is_no_such_key() {
                    Ok(None)
                } else {
                    Err(call(what(), &error))
                }
            }
        }
    }

    /// Invokes a function by its logical id and answers its payload.
    ///
    /// # Errors
    /// When it cannot be invoked or fails.
    pub async fn invoke(&self, logical_id: &str, payload: &Value) -> Result<Value, DeployError> {
        let name = Names::name(logical_id, "");
        let what = || format!("invoking {name}");
        let payload = aws_sdk_lambda::primitives::Blob::new(payload.to_string().into_bytes());
        let answer = self
            .lambda
            .invoke()
            .function_name(&name)
            .payload(payload)
            .send()
            .await;
        let answer = answer.map_err(|error| call(what(), &error.into_service_error()))?;
        let text = answer
            .payload()
            .map(|blob| String::from_utf8_lossy(blob.as_ref()).into_owned())
            .unwrap_or_default();
        if answer.function_error().is_some() {
            return Err(DeployError::Call {
                what: what(),
                problem: text,
            });
        }
        Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// The log lines of a function since the deployment, by its logical id.
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub async fn function_logs(&self, logical_id: &str) -> Result<Vec<LogLine>, DeployError> {
        self.function_logs_since(logical_id, self.started_ms).await
    }

    /// The log lines of a function from an instant on (milliseconds since 1970).
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub async fn function_logs_since(
        &self,
        logical_id: &str,
        since_ms: i64,
    ) -> Result<Vec<LogLine>, DeployError> {
        Ok(self
            .emulator
            .function_logs(&Names::name(logical_id, ""), since_ms)
            .await?)
    }

    /// Waits until no message, task or instance is left. False when that took
    /// longer than `limit`.
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub async fn until_idle(&self, limit: Duration) -> Result<bool, DeployError> {
        let started = Instant::now();
        loop {
            let messages = self.queue_counts(&self.input_queue_url()).await?.total();
            let now = self.cloud.snapshot();
            if messages == 0 && now.live_tasks() == 0 && now.live_instances() == 0 {
                return Ok(true);
            }
            if started.elapsed() > limit {
                return Ok(false);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Ends the pipeline and waits until every process is gone.
    pub async fn stop(mut self) {
        self.cloud.shut_down().await;
        self.emulator.stop().await;
    }
}

fn call(what: String, error: &dyn std::error::Error) -> DeployError {
    // SDK errors say little by themselves: what they come from says why.
    let mut problem = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        problem.push_str(": ");
        problem.push_str(&cause.to_string());
        source = cause.source();
    }
    DeployError::Call { what, problem }
}

fn rejection_of(message: &aws_sdk_sqs::types::Message) -> Rejection {
    let attribute = |name: &str| {
        message
            .message_attributes()
            .and_then(|all| all.get(name))
            .and_then(|value| value.string_value())
            .map(str::to_owned)
    };
    let body = message.body().unwrap_or_default().to_owned();
    let document = serde_json::from_str::<Value>(&body)
        .ok()
        .and_then(|event| event["data"]["document"]["url"].as_str().map(str::to_owned));
    Rejection {
        reason: attribute("RejectionReason"),
        stage: attribute("RejectionStage"),
        by: attribute("RejectedBy"),
        object: attribute("RejectedObject").or(document),
        body,
    }
}

/// What a container on AWS gets from its surroundings instead of its definition.
fn container_surroundings(endpoint: &str) -> BTreeMap<String, String> {
    let values = [
        ("AWS_REGION", sdk::REGION),
        ("AWS_DEFAULT_REGION", sdk::REGION),
        ("AWS_ACCESS_KEY_ID", sdk::ACCESS_KEY),
        ("AWS_SECRET_ACCESS_KEY", sdk::SECRET_KEY),
        ("AWS_ENDPOINT_URL", endpoint),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    values
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

fn group_of(logical_id: &str, cluster: &str, group: &Resource) -> GroupConfig {
    let properties = &group.properties;
    let number = |field: &str| text_of(&properties[field]).parse::<usize>().unwrap_or(0);
    let policy = &properties["MixedInstancesPolicy"];
    let instance_type = text_of(&policy["LaunchTemplate"]["Overrides"][0]["InstanceType"]);
    let on_demand =
        text_of(&policy["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"]);
    let subnets = properties["VPCZoneIdentifier"]
        .as_array()
        .map_or(1, Vec::len);
    let letters = ["a", "b", "c", "d", "e", "f"];
    GroupConfig {
        spot: on_demand == "0",
        min: number("MinSize"),
        max: number("MaxSize"),
        desired: number("MinSize"),
        zones: letters
            .iter()
            .take(subnets.max(1))
            .map(|letter| format!("{}{letter}", sdk::REGION))
            .collect(),
        protect_new_instances: properties["NewInstancesProtectedFromScaleIn"] == json!(true),
        newest_first: properties["TerminationPolicies"][0] == json!("NewestInstance"),
        ..GroupConfig::new(&Names::name(logical_id, ""), cluster, &instance_type, 0)
    }
}

/// The template's task definition as RegisterTaskDefinition takes it, with the
/// variables that only make sense inside its container replaced.
fn task_definition(
    stack: &Stack,
    template: &Path,
    bundle: &Path,
    own: &BTreeMap<String, String>,
) -> Result<Value, DeployError> {
    let lacks = |what: &str| DeployError::Lacks {
        template: template.to_owned(),
        what: what.to_owned(),
    };
    let (id, resource) = stack
        .of_kind("AWS::ECS::TaskDefinition")
        .next()
        .ok_or_else(|| lacks("AWS::ECS::TaskDefinition"))?;
    let mut definition = camel_case(&resource.properties);
    definition["family"] = json!(Names::name(id, ""));
    let container = definition["containerDefinitions"]
        .get_mut(0)
        .ok_or_else(|| lacks("container definition"))?;
    let mut variables: BTreeMap<String, String> = container["environment"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|one| (text_of(&one["name"]), text_of(&one["value"])))
        .filter(|(name, _)| !TASK_VARIABLES_LEFT_OUT.contains(&name.as_str()))
        .collect();
    variables.insert("EXECUTION_PROVIDER".to_owned(), "cpu".to_owned());
    variables.insert("MODEL_PATH".to_owned(), bundle.display().to_string());
    variables.extend(own.clone());
    let list: Vec<Value> = variables
        .iter()
        .map(|(name, value)| json!({"name": name, "value": value}))
        .collect();
    container["environment"] = json!(list);
    Ok(definition)
}

/// CloudFormation writes `ContainerDefinitions` where the API has `containerDefinitions`.
fn camel_case(value: &Value) -> Value {
    match value {
        Value::Object(members) => {
            let renamed: Map<String, Value> = members
                .iter()
                .map(|(name, member)| {
                    let mut letters = name.chars();
                    let first = letters.next().map(|letter| letter.to_ascii_lowercase());
                    (
                        first.into_iter().chain(letters).collect(),
                        camel_case(member),
                    )
                })
                .collect();
            Value::Object(renamed)
        }
        Value::Array(items) => Value::Array(items.iter().map(camel_case).collect()),
        scalar => scalar.clone(),
    }
}

/// A Lambda package: a zip with one file, `bootstrap`, which is the program at
/// its place in the target folder. (Debug builds are 50 MB each: sending them as
/// base64 through two SDK layers made a start take six seconds.)
fn code_package(program: &Path) -> Result<Vec<u8>, DeployError> {
    use std::io::Write;
    let file = |source: io::Error| DeployError::File {
        path: program.to_owned(),
        source,
    };
    let path = std::path::absolute(program).map_err(file)?;
    // Single quotes keep everything but a single quote from the shell.
    let quoted = path.display().to_string().replace('\'', r"'\''");
    let bootstrap = format!("#!/bin/sh\nexec '{quoted}'\n");
    let mut archive = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    let stored = zip::write::SimpleFileOptions::default()
        .compression_method(zip::CompressionMethod::Stored)
        .unix_permissions(0o755);
    archive
        .start_file("bootstrap", stored)
        .map_err(|error| file(error.into()))?;
    archive.write_all(bootstrap.as_bytes()).map_err(file)?;
    Ok(archive
        .finish()
        .map_err(|error| file(error.into()))?
        .into_inner())
}
