//! The pipeline, deployed on this machine from `infra/template.yaml`, or from that as CDK synthesises it.
//!
//! The template's resources that the pipeline's programs touch are created in
//! MiniStack and in the local cloud; the others (roles, policies, alarms,
//! security groups, the file system) have no counterpart here and are left out.
//! Around it stands what a user's account has already: the source bucket, and
//! a queue for the next middleware, subscribed as a vector store subscribes.

mod names;
mod resources;
mod usage;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::Mutex,
};

use aws_config::SdkConfig;
use ministack::{CREDENTIALS, MiniStack, REGION, StartError, process};
use template::{Parameters, Stack, Template, TemplateError, text_of};
use thiserror::Error;
use tokio::task::JoinHandle;

pub use usage::{DeadLetter, LogLine, QueueCounts};

use crate::{
    cloud::{Cloud, CloudConfig, ImageProgram, Timings},
    emulator::router,
    sdk::{self, CallFailed, failed},
};

pub const SOURCE_BUCKET: &str = "clip-source";
/// The queue that stands for the next middleware.
const NEXT_QUEUE: &str = "clip-next-middleware";

#[derive(Debug, Error)]
pub enum DeployError {
    #[error(transparent)]
    Emulator(#[from] StartError),
    #[error("{path}: {source}")]
    Template {
        path: PathBuf,
        source: TemplateError,
    },
    #[error("{path}: {source}")]
    File { path: PathBuf, source: io::Error },
    #[error(
        "{0} is not there: build it first (cargo build -p express -p gpu-task -p intake -p scaler)"
    )]
    NotBuilt(PathBuf),
    /// A resource could not be created, or a call failed.
    #[error(transparent)]
    Call(#[from] CallFailed),
    /// An update would change a resource that it does not change here.
    #[error("an update that changes {0} is not served locally")]
    NotUpdated(String),
    #[error("the template has no {0}")]
    Lacks(&'static str),
}

impl DeployError {
    pub(crate) fn file(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }
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

#[derive(Debug, Clone)]
pub struct Programs {
    pub gpu_task: PathBuf,
    /// Where the functions' programs lie, by the names that the template builds.
    pub functions: PathBuf,
}

impl Programs {
    /// Those built beside the running program (`target/debug`).
    pub fn beside_this_one() -> Self {
        Self {
            gpu_task: process::sibling("gpu-task"),
            functions: process::sibling(""),
        }
    }
}

#[derive(Debug, Clone)]
pub struct DeploymentOptions {
    pub ministack: PathBuf,
    pub programs: Programs,
    pub template: PathBuf,
    /// Values for its parameters, over [`local_parameters`].
    pub parameters: Parameters,
    pub bundle: PathBuf,
    pub work_dir: PathBuf,
    /// How images reach intake.
    pub way_in: WayIn,
    pub timings: Timings,
    pub task_environment: BTreeMap<String, String>,
    /// Variables of every function, over the template's.
    pub function_environment: BTreeMap<String, String>,
}

impl DeploymentOptions {
    /// The workspace's template and programs, a bundle, and a folder for logs;
    /// the emulator is the one that `LOCAL_MINISTACK` names.
    pub fn new(bundle: &Path, work_dir: &Path) -> Result<Self, StartError> {
        Ok(Self {
            ministack: ministack::program_from_env()?,
            programs: Programs::beside_this_one(),
            template: Path::new(env!("CARGO_MANIFEST_DIR")).join("../../infra/template.yaml"),
            parameters: BTreeMap::new(),
            bundle: bundle.to_owned(),
            work_dir: work_dir.to_owned(),
            way_in: WayIn::default(),
            timings: Timings::default(),
            task_environment: BTreeMap::new(),
            function_environment: BTreeMap::new(),
        })
    }

    /// The template as CloudFormation resolves it here, with the task definition's ARN.
    fn resolve(
        &self,
        template: &Template,
        endpoint: &str,
        task_definition: &str,
    ) -> Result<Stack, DeployError> {
        let mut parameters = local_parameters();
        if self.way_in == WayIn::Notification {
            parameters.insert("SourceEvents".to_owned(), "None".to_owned());
        }
        // A template synthesised by CDK has their values in it.
        parameters.retain(|name, _| !template.part(&format!("/Parameters/{name}")).is_null());
        parameters.extend(self.parameters.clone());
        let names = names::Names {
            endpoint,
            task_definition,
        };
        let stack = template.resolve(&parameters, &names);
        stack.map_err(|source| self.wrong(source))
    }

    fn wrong(&self, source: TemplateError) -> DeployError {
        DeployError::Template {
            path: self.template.clone(),
            source,
        }
    }

    pub fn parameter(mut self, name: &str, value: impl ToString) -> Self {
        self.parameters.insert(name.to_owned(), value.to_string());
        self
    }
}

/// The template's parameters as one machine needs them: names of what stands
/// around the stack, and times that fit instances which boot in seconds.
pub fn local_parameters() -> Parameters {
    owned([
        ("VpcId", "vpc-00000000"),
        ("PrivateSubnet1", "subnet-0000000a"),
        ("PrivateSubnet2", "subnet-0000000b"),
        ("SourceBucket1", SOURCE_BUCKET),
        ("ModelBucket", "clip-models"),
        ("ModelName", "ViT-B/32"),
        // Two cores do in one process what they would do in two.
        ("ExpressLane", "off"),
        ("IdleExitSeconds", "2"),
        ("IdleGraceSeconds", "1"),
        ("BootSeconds", "10"),
        // A debug build on two cores; tasks report their own rate soon.
        ("ImagesPerSecond", "5"),
        ("TargetDrainSeconds", "60"),
    ])
}

fn owned<const N: usize>(values: [(&str, &str); N]) -> BTreeMap<String, String> {
    values
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into()
}

fn built(program: PathBuf) -> Result<PathBuf, DeployError> {
    if program.is_file() {
        std::path::absolute(&program).map_err(DeployError::file(&program))
    } else {
        Err(DeployError::NotBuilt(program))
    }
}

/// The running pipeline. Dropping it kills every process it started.
pub struct Deployment {
    pub cloud: Cloud,
    /// S3, SQS, SNS, EventBridge, CloudWatch and Lambda.
    pub emulator: MiniStack,
    /// A client configuration for the emulator.
    pub sdk: SdkConfig,
    pub s3: aws_sdk_s3::Client,
    pub sqs: aws_sdk_sqs::Client,
    pub sns: aws_sdk_sns::Client,
    pub lambda: aws_sdk_lambda::Client,
    pub events: aws_sdk_eventbridge::Client,
    /// The resolved template, as it was first deployed.
    pub stack: Stack,
    /// Where the emulated ECS and Auto Scaling are served.
    pub cloud_endpoint: String,
    pub next_queue_url: String,
    router: JoinHandle<()>,
    started_ms: i64,
    options: DeploymentOptions,
    template: Template,
    /// The ARN of the newest revision.
    task_definition: Mutex<String>,
    /// Identifiers of event source mappings, by their names in the template.
    mappings: Mutex<BTreeMap<String, String>>,
}

impl Drop for Deployment {
    fn drop(&mut self) {
        self.router.abort();
        self.cloud.kill_everything();
    }
}

impl Deployment {
    /// Starts the emulators and deploys the template into them.
    pub async fn start(options: &DeploymentOptions) -> Result<Self, DeployError> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(DeployError::file(path));
        let options = DeploymentOptions {
            work_dir: absolute(&options.work_dir)?,
            bundle: absolute(&options.bundle)?,
            ..options.clone()
        };
        let work_dir = &options.work_dir;
        let program = built(options.programs.gpu_task.clone())?;
        fs::create_dir_all(work_dir).map_err(DeployError::file(work_dir))?;
        let text = fs::read_to_string(&options.template);
        let text = text.map_err(DeployError::file(&options.template))?;
        let template = Template::parse(&text).map_err(|source| options.wrong(source))?;

        let started_ms = chrono::Utc::now().timestamp_millis();
        let (ministack, log) = (options.ministack.clone(), work_dir.join("ministack.log"));
        let emulator = tokio::task::spawn_blocking(move || MiniStack::start(&ministack, &log));
        let emulator = emulator.await.map_err(failed("starting the emulator"))??;
        let endpoint = emulator.endpoint();
        let draft = options.resolve(&template, endpoint, "")?;
        let definition = resources::task_definition(&draft, &options)?;
        let image = text_of(&definition["containerDefinitions"][0]["image"]);
        // What a container on AWS gets from its surroundings.
        let environment = owned([
            ("AWS_REGION", REGION),
            ("AWS_DEFAULT_REGION", REGION),
            ("AWS_ACCESS_KEY_ID", CREDENTIALS),
            ("AWS_SECRET_ACCESS_KEY", CREDENTIALS),
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ]);
        let task = ImageProgram {
            program,
            environment,
        };
        let cloud = Cloud::new(CloudConfig {
            region: REGION.to_owned(),
            timings: options.timings.clone(),
            images: BTreeMap::from([(image, task)]),
            log_dir: work_dir.clone(),
        });
        let task_definition = resources::register(&cloud, &definition)?;
        let stack = options.resolve(&template, endpoint, &task_definition)?;
        let cloud_endpoint = cloud.serve().await.map_err(DeployError::file(work_dir))?;
        let sdk = sdk::config(endpoint);
        let s3 = aws_sdk_s3::config::Builder::from(&sdk).force_path_style(true);
        let deployment = Self {
            s3: aws_sdk_s3::Client::from_conf(s3.build()),
            sqs: aws_sdk_sqs::Client::new(&sdk),
            sns: aws_sdk_sns::Client::new(&sdk),
            lambda: aws_sdk_lambda::Client::new(&sdk),
            events: aws_sdk_eventbridge::Client::new(&sdk),
            next_queue_url: names::queue_url(endpoint, NEXT_QUEUE),
            router: router::start(&cloud, endpoint),
            cloud,
            emulator,
            sdk,
            stack,
            cloud_endpoint,
            started_ms,
            options,
            template,
            task_definition: Mutex::new(task_definition),
            mappings: Mutex::default(),
        };
        deployment.create_storage().await?;
        deployment.create_cluster()?;
        deployment.create_functions().await?;
        deployment.create_rules().await?;
        deployment.connect(deployment.options.way_in).await?;
        Ok(deployment)
    }

    /// Ends the pipeline and waits until every process is gone.
    pub async fn stop(self) {
        self.cloud.shut_down().await;
    }
}
