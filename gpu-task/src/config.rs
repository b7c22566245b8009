//! The task's configuration: one struct, read once from flags and the
//! environment, checked before anything starts.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use clip_image::{DecodeMode, Limits};
use clip_model::engine::ExecutionProvider;
use delivery::OutputConfig;
use events::{S3Url, vector};
use platform::env::{EnvError, Reader, invalid};
use platform::metrics::DEFAULT_NAMESPACE;

use crate::queue::VISIBILITY_MAX;

/// A variable of the environment, as `--help` and the README tell of it.
pub struct Variable {
    /// Its name. As a flag: `--batch-size` for `BATCH_SIZE`.
    pub name: &'static str,
    /// What it holds, with its unit.
    pub holds: &'static str,
    /// Its default.
    pub default: &'static str,
    /// Why it exists, or why the default is what it is.
    pub why: &'static str,
}

const fn variable(
    name: &'static str,
    holds: &'static str,
    default: &'static str,
    why: &'static str,
) -> Variable {
    Variable {
        name,
        holds,
        default,
        why,
    }
}

/// Every variable that the task reads. The SDK's own (`AWS_REGION`,
/// `AWS_ENDPOINT_URL`, credentials) are not repeated here.
pub const VARIABLES: &[Variable] = &[
    variable(
        "INPUT_QUEUE_URL",
        "URL of the SQS queue with the work",
        "required",
        "each message is a CloudEvent, or any other form in which work arrives",
    ),
    variable(
        "DEAD_LETTER_QUEUE_URL",
        "URL of the SQS queue for rejected messages",
        "required",
        "a message that can never succeed goes there at once, with its reason",
    ),
    variable(
        "OUTPUT_TOPIC_ARN",
        "ARN of an SNS topic",
        "one output at least",
        "events in Lakechain's form, what the next middleware subscribes to",
    ),
    variable(
        "OUTPUT_EVENT_BUS",
        "name or ARN of an EventBridge bus",
        "one output at least",
        "events as standard CloudEvents 1.0",
    ),
    variable(
        "OUTPUT_QUEUE_URL",
        "URL of an SQS queue",
        "one output at least",
        "events in Lakechain's form",
    ),
    variable(
        "CACHE_BUCKET",
        "name of the S3 bucket for vectors",
        "required",
        "each vector is one JSON object",
    ),
    variable(
        "CACHE_PREFIX",
        "prefix of the vectors' keys",
        "clip-image-processor",
        "the product page's",
    ),
    variable(
        "MODEL_PATH",
        "folder of the model bundle",
        "this or MODEL_URI",
        "a bundle on disk starts fastest",
    ),
    variable(
        "MODEL_URI",
        "s3://bucket/prefix of the model bundle",
        "this or MODEL_PATH",
        "fetched once per machine into CACHE_DIR, digests checked",
    ),
    variable(
        "CACHE_DIR",
        "folder for fetched bundles",
        "required with MODEL_URI",
        "EFS or a disk; several tasks share it safely",
    ),
    variable(
        "ORT_DYLIB_PATH",
        "file of ONNX Runtime's shared library",
        "required",
        "the same program runs with the CPU or the CUDA library",
    ),
    variable(
        "EXECUTION_PROVIDER",
        "cpu or cuda",
        "cpu",
        "what the model runs on; cuda that cannot be used is an error, never a fall-back",
    ),
    variable(
        "BATCH_SIZE",
        "images, 1 to 512",
        "cpu 8, cuda 64",
        "larger gains nothing on a CPU and fills a T4 on CUDA",
    ),
    variable(
        "BATCH_WAIT_MS",
        "milliseconds, 0 to 10000",
        "cpu 40, cuda 10",
        "how long an image waits for company while the model is idle and more is on its way",
    ),
    variable(
        "INTRA_THREADS",
        "threads, 1 to 256",
        "all cores",
        "threads of one model run on a CPU",
    ),
    variable(
        "DECODE_THREADS",
        "threads, 1 to 256",
        "all cores",
        "images decoded at the same time",
    ),
    variable(
        "DOWNLOADS",
        "documents, 1 to 1024",
        "cpu 16, cuda 64",
        "documents fetched at the same time; hides the storage's latency",
    ),
    variable(
        "STORES",
        "vectors, 1 to 1024",
        "cpu 16, cuda 64",
        "vectors written at the same time",
    ),
    variable(
        "MAX_MESSAGES",
        "messages, 10 to 10000",
        "cpu 128, cuda 1024",
        "most messages held; fewer are held when the rate says that more cannot be finished in time",
    ),
    variable(
        "MEMORY_BUDGET_BYTES",
        "bytes, from 64 MiB",
        "cpu 384 MiB, cuda 2 GiB",
        "documents in memory and what decoding them takes; an image that needs more runs alone",
    ),
    variable(
        "DECODE",
        "exact or fast",
        "exact",
        "fast decodes large JPEGs at lower resolution, cosine loss at most 6e-6",
    ),
    variable(
        "APPLY_EXIF_ORIENTATION",
        "true or false",
        "false",
        "the reference ignores it",
    ),
    variable(
        "EXTRACT_LABELS",
        "true or false",
        "true",
        "adds the five nearest labels of the bundle to the keywords",
    ),
    variable(
        "MAX_IMAGE_PIXELS",
        "pixels",
        "178956970",
        "Pillow's limit against decompression bombs",
    ),
    variable(
        "MAX_IMAGE_BYTES",
        "bytes",
        "536870912",
        "an object can have terabytes",
    ),
    variable(
        "MAX_IMAGE_MEMORY_BYTES",
        "bytes",
        "1006632960",
        "what decoding one image may take; larger is rejected",
    ),
    variable(
        "VISIBILITY_TIMEOUT_SECONDS",
        "seconds, 10 to 43200",
        "60",
        "a killed task's messages come back after it; a heartbeat extends it while work goes on",
    ),
    variable(
        "DOWNLOAD_TIMEOUT_SECONDS",
        "seconds, 1 to 3600",
        "120",
        "one document, all tries together",
    ),
    variable(
        "IDLE_EXIT_SECONDS",
        "seconds, 0 to 86400",
        "30",
        "exit when nothing came for so long; 0 never exits",
    ),
    variable(
        "STOP_TIMEOUT_SECONDS",
        "seconds, 1 to 120",
        "30",
        "ECS's stop timeout: after SIGTERM everything ends before it",
    ),
    variable(
        "METRICS_NAMESPACE",
        "CloudWatch namespace",
        DEFAULT_NAMESPACE,
        "of the metrics on standard output",
    ),
    variable(
        "METRICS_INTERVAL_SECONDS",
        "seconds, 1 to 3600",
        "10",
        "how often metrics are written; short enough that a task of a minute is seen",
    ),
    variable(
        "CLUSTER_NAME",
        "name of the ECS cluster",
        "none",
        "a property of each metric line, for searching",
    ),
    variable(
        "IMAGE_LINES_PER_SECOND",
        "lines, 0 to 100000",
        "100",
        "log lines about single images; what is above is not written, so that logs cost less than the GPU",
    ),
    variable(
        "RUST_LOG",
        "log filter",
        "info",
        "debug shows every stage of every image",
    ),
    variable(
        "LOG_FORMAT",
        "json or text",
        "text on a terminal, else json",
        "form of the log on standard error",
    ),
];

/// What the model runs on decides most defaults.
struct Defaults {
    batch_size: usize,
    batch_wait_ms: u64,
    downloads: usize,
    stores: usize,
    max_messages: usize,
    memory_budget: u64,
}

const MIB: u64 = 1024 * 1024;

const CPU: Defaults = Defaults {
    batch_size: 8,
    batch_wait_ms: 40,
    downloads: 16,
    stores: 16,
    max_messages: 128,
    memory_budget: 384 * MIB,
};

const CUDA: Defaults = Defaults {
    batch_size: 64,
    batch_wait_ms: 10,
    downloads: 64,
    stores: 64,
    max_messages: 1024,
    memory_budget: 2048 * MIB,
};

/// Where the model comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelSource {
    /// A folder.
    Path(PathBuf),
    /// An S3 prefix, cached in a folder.
    Uri {
        /// The bucket.
        bucket: String,
        /// The prefix, without a slash at its end.
        prefix: String,
        /// The folder.
        cache: PathBuf,
    },
}

/// The configuration. Each field is the variable of its name; see
/// [`VARIABLES`] for units, defaults and reasons.
#[derive(Clone, Debug)]
pub struct Config {
    pub input_queue_url: String,
    pub dead_letter_queue_url: String,
    pub outputs: OutputConfig,
    pub cache_bucket: String,
    pub cache_prefix: String,
    pub model: ModelSource,
    pub provider: ExecutionProvider,
    pub batch_size: usize,
    pub batch_wait: Duration,
    pub intra_threads: usize,
    pub decode_threads: usize,
    pub downloads: usize,
    pub stores: usize,
    pub max_messages: usize,
    pub memory_budget: u64,
    pub decode: DecodeMode,
    pub apply_exif_orientation: bool,
    pub extract_labels: bool,
    pub limits: Limits,
    pub visibility: Duration,
    pub download_timeout: Duration,
    /// `None`: never.
    pub idle_exit: Option<Duration>,
    pub stop_timeout: Duration,
    pub metrics_namespace: String,
    pub metrics_interval: Duration,
    pub cluster_name: Option<String>,
    pub image_lines_per_second: u32,
}

impl Config {
    /// Reads and checks everything.
    pub fn read(env: &Reader<'_>) -> Result<Self, EnvError> {
        let provider = env.choice(
            "EXECUTION_PROVIDER",
            ExecutionProvider::Cpu,
            &[
                ("cpu", ExecutionProvider::Cpu),
                ("cuda", ExecutionProvider::Cuda),
            ],
        )?;
        let defaults = match provider {
            ExecutionProvider::Cpu => CPU,
            ExecutionProvider::Cuda => CUDA,
        };
        let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
        let decode_modes = [("exact", DecodeMode::Exact), ("fast", DecodeMode::Fast)];
        let config = Self {
            input_queue_url: queue_url(env, "INPUT_QUEUE_URL")?,
            dead_letter_queue_url: queue_url(env, "DEAD_LETTER_QUEUE_URL")?,
            outputs: OutputConfig::from_env(env)?,
            cache_bucket: env.required("CACHE_BUCKET", "the name of the bucket for vectors")?,
            cache_prefix: env
                .optional("CACHE_PREFIX")
                .unwrap_or_else(|| vector::DEFAULT_PREFIX.to_owned()),
            model: model_source(env)?,
            provider,
            batch_size: env.within("BATCH_SIZE", defaults.batch_size, 1..=512, "images")?,
            batch_wait: Duration::from_millis(env.within(
                "BATCH_WAIT_MS",
                defaults.batch_wait_ms,
                0..=10_000,
                "milliseconds",
            )?),
            intra_threads: env.within("INTRA_THREADS", cores, 1..=256, "threads")?,
            decode_threads: env.within("DECODE_THREADS", cores, 1..=256, "threads")?,
            downloads: env.within("DOWNLOADS", defaults.downloads, 1..=1024, "documents")?,
            stores: env.within("STORES", defaults.stores, 1..=1024, "vectors")?,
            max_messages: env.within(
                "MAX_MESSAGES",
                defaults.max_messages,
                10..=10_000,
                "messages",
            )?,
            memory_budget: env.within(
                "MEMORY_BUDGET_BYTES",
                defaults.memory_budget,
                64 * MIB..=1 << 42,
                "bytes",
            )?,
            decode: env.choice("DECODE", DecodeMode::Exact, &decode_modes)?,
            apply_exif_orientation: env.flag("APPLY_EXIF_ORIENTATION", false)?,
            extract_labels: env.flag("EXTRACT_LABELS", true)?,
            limits: Limits {
                max_pixels: env.within(
                    "MAX_IMAGE_PIXELS",
                    Limits::MAX_PIXELS,
                    1..=1 << 40,
                    "pixels",
                )?,
                max_bytes: env.within(
                    "MAX_IMAGE_BYTES",
                    Limits::MAX_BYTES,
                    1..=1 << 40,
                    "bytes",
                )?,
                max_memory: env.within(
                    "MAX_IMAGE_MEMORY_BYTES",
                    Limits::MAX_MEMORY,
                    1..=1 << 40,
                    "bytes",
                )?,
            },
            visibility: env.seconds(
                "VISIBILITY_TIMEOUT_SECONDS",
                60,
                10..=VISIBILITY_MAX.as_secs(),
            )?,
            download_timeout: env.seconds("DOWNLOAD_TIMEOUT_SECONDS", 120, 1..=3600)?,
            idle_exit: Some(env.seconds("IDLE_EXIT_SECONDS", 30, 0..=86_400)?)
                .filter(|time| !time.is_zero()),
            stop_timeout: env.seconds("STOP_TIMEOUT_SECONDS", 30, 1..=120)?,
            metrics_namespace: env
                .optional("METRICS_NAMESPACE")
                .unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned()),
            metrics_interval: env.seconds("METRICS_INTERVAL_SECONDS", 10, 1..=3600)?,
            cluster_name: env.optional("CLUSTER_NAME"),
            image_lines_per_second: env.within(
                "IMAGE_LINES_PER_SECOND",
                100,
                0..=100_000,
                "lines",
            )?,
        };
        if config.input_queue_url == config.dead_letter_queue_url {
            return Err(invalid(
                "DEAD_LETTER_QUEUE_URL",
                &config.dead_letter_queue_url,
                "another queue than INPUT_QUEUE_URL: rejected messages would come back for ever",
            ));
        }
        Ok(config)
    }

    /// The input queue's name, the dimension of the metrics.
    pub fn queue_name(&self) -> &str {
        self.input_queue_url
            .trim_end_matches('/')
            .rsplit('/')
            .next()
            .unwrap_or_default()
    }
}

fn queue_url(env: &Reader<'_>, name: &str) -> Result<String, EnvError> {
    const ACCEPTED: &str =
        "the URL of a standard SQS queue (https://sqs.REGION.amazonaws.com/ACCOUNT/NAME)";
    let url = env.required(name, ACCEPTED)?;
    if !url.starts_with("http") || url.ends_with(".fifo") {
        return Err(invalid(name, &url, ACCEPTED));
    }
    Ok(url)
}

fn model_source(env: &Reader<'_>) -> Result<ModelSource, EnvError> {
    const ONE: &str = "exactly one of MODEL_PATH (a folder) and MODEL_URI (s3://bucket/prefix) \
                       says where the model bundle is";
    match (env.optional("MODEL_PATH"), env.optional("MODEL_URI")) {
        (Some(path), None) => Ok(ModelSource::Path(path.into())),
        (None, Some(uri)) => {
            let place: S3Url = uri
                .trim_end_matches('/')
                .parse()
                .map_err(|_| invalid("MODEL_URI", &uri, "s3://bucket/prefix"))?;
            let cache = env.required("CACHE_DIR", "a folder for the bundle of MODEL_URI")?;
            Ok(ModelSource::Uri {
                bucket: place.bucket,
                prefix: place.key,
                cache: cache.into(),
            })
        }
        (Some(_), Some(uri)) => Err(invalid("MODEL_URI", &uri, ONE)),
        (None, None) => Err(EnvError::Missing {
            name: "MODEL_PATH".to_owned(),
            accepted: ONE.to_owned(),
        }),
    }
}

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run, with these variables in place of the environment's.
    Run(Vec<(String, String)>),
    /// Check the configuration and print it.
    Check(Vec<(String, String)>),
    /// Print the help.
    Help,
    /// Print the version.
    Version,
}

/// Reads the command line: every variable is a flag as well (`BATCH_SIZE` is
/// `--batch-size`), which wins over the environment.
pub fn parse_arguments(arguments: impl Iterator<Item = String>) -> Result<Command, String> {
    let mut settings = Vec::new();
    let mut only_checks = false;
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            "--check-config" => {
                only_checks = true;
                continue;
            }
            _ => {}
        }
        let Some(flag) = argument.strip_prefix("--") else {
            return Err(format!("unexpected argument {argument:?}; see --help"));
        };
        let (flag, value) = match flag.split_once('=') {
            Some((flag, value)) => (flag, Some(value.to_owned())),
            None => (flag, None),
        };
        let name = flag.replace('-', "_").to_ascii_uppercase();
        if !VARIABLES.iter().any(|variable| variable.name == name) {
            return Err(format!("unknown flag --{flag}; see --help"));
        }
        let value = value
            .or_else(|| arguments.next())
            .ok_or_else(|| format!("--{flag} needs a value"))?;
        settings.push((name, value));
    }
    Ok(if only_checks {
        Command::Check(settings)
    } else {
        Command::Run(settings)
    })
}

/// The text of `--help`.
pub fn help() -> String {
    let mut text = String::from(
        "gpu-task: takes images from a queue, embeds them with CLIP, stores the vectors and \
         publishes the enriched events.\n\n\
         Usage: gpu-task [--check-config] [--NAME VALUE]...\n\n\
         Every variable can be given as a flag too: BATCH_SIZE as --batch-size.\n\
         --check-config prints the configuration and exits; --version prints the version.\n\n\
         Variables:\n",
    );
    for variable in VARIABLES {
        let Variable {
            name,
            holds,
            default,
            why,
        } = variable;
        // Writing to a string does not fail.
        let _ = writeln!(text, "  {name}\n      {holds} [{default}]\n      {why}");
    }
    text.push_str(
        "\nExit codes:\n  \
         0  done: idle for IDLE_EXIT_SECONDS, or stopped by SIGTERM\n  \
         2  the configuration is wrong\n  \
         3  the model cannot be fetched or loaded\n  \
         4  a queue, the cache bucket or an output cannot be used (missing, or access refused)\n  \
         5  the model fails run after run\n  \
         101  a fault of the program itself\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn read(changes: &[(&str, &str)]) -> Result<Config, EnvError> {
        let mut values = HashMap::from([
            (
                "INPUT_QUEUE_URL",
                "https://sqs.eu-west-1.amazonaws.com/1/input",
            ),
            (
                "DEAD_LETTER_QUEUE_URL",
                "https://sqs.eu-west-1.amazonaws.com/1/dead",
            ),
            ("OUTPUT_TOPIC_ARN", "arn:aws:sns:eu-west-1:1:out"),
            ("CACHE_BUCKET", "cache"),
            ("MODEL_PATH", "/models/vit-b-32"),
        ]);
        values.extend(changes.iter().copied());
        Config::read(&Reader::new(|name| {
            values.get(name).map(|value| (*value).to_owned())
        }))
    }

    #[test]
    fn the_least_configuration_is_enough() {
        let config = read(&[]).unwrap();
        assert_eq!(config.queue_name(), "input");
        assert_eq!(config.batch_size, 8);
        assert_eq!(config.idle_exit, Some(Duration::from_secs(30)));
        assert_eq!(config.cache_prefix, "clip-image-processor");
    }

    #[test]
    fn a_gpu_has_defaults_of_its_own() {
        let config = read(&[("EXECUTION_PROVIDER", "cuda")]).unwrap();
        // What the simulator counts on.
        assert_eq!(config.batch_size, planner::worker::GPU_BATCH_SIZE);
        assert_eq!(config.max_messages, planner::worker::GPU_MAX_MESSAGES);
        assert_eq!(config.memory_budget, 2 << 30);
    }

    #[test]
    fn what_is_not_accepted_is_named() {
        for (name, value) in [
            ("INPUT_QUEUE_URL", "input"),
            (
                "DEAD_LETTER_QUEUE_URL",
                "https://sqs.eu-west-1.amazonaws.com/1/input",
            ),
            ("EXECUTION_PROVIDER", "tpu"),
            ("BATCH_SIZE", "0"),
            ("VISIBILITY_TIMEOUT_SECONDS", "43201"),
            ("STOP_TIMEOUT_SECONDS", "121"),
            ("MODEL_URI", "s3://models/b32"),
            ("DECODE", "slow"),
        ] {
            let error = read(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_model_in_s3_needs_a_folder_to_be_cached_in() {
        let uri = ("MODEL_URI", "s3://models/clip/b32/");
        let error = read(&[("MODEL_PATH", ""), uri]).unwrap_err().to_string();
        assert!(error.contains("CACHE_DIR"), "{error}");
        let config = read(&[("MODEL_PATH", ""), uri, ("CACHE_DIR", "/efs")]).unwrap();
        assert_eq!(
            config.model,
            ModelSource::Uri {
                bucket: "models".to_owned(),
                prefix: "clip/b32".to_owned(),
                cache: "/efs".into(),
            }
        );
    }

    #[test]
    fn every_variable_that_is_read_is_documented_and_the_other_way_round() {
        let asked = std::cell::RefCell::new(std::collections::BTreeSet::new());
        let base = HashMap::from([
            ("INPUT_QUEUE_URL", "https://a/b/input"),
            ("DEAD_LETTER_QUEUE_URL", "https://a/b/dead"),
            ("OUTPUT_QUEUE_URL", "https://a/b/out"),
            ("CACHE_BUCKET", "cache"),
            ("MODEL_URI", "s3://models/b32"),
            ("CACHE_DIR", "/efs"),
        ]);
        Config::read(&Reader::new(|name| {
            asked.borrow_mut().insert(name.to_owned());
            base.get(name).map(|value| (*value).to_owned())
        }))
        .unwrap();
        // Read elsewhere: by the engine and by the logs.
        let elsewhere = ["ORT_DYLIB_PATH", "RUST_LOG", "LOG_FORMAT"];
        let mut asked = asked.into_inner();
        asked.extend(elsewhere.map(str::to_owned));
        let documented: std::collections::BTreeSet<String> =
            VARIABLES.iter().map(|one| one.name.to_owned()).collect();
        assert_eq!(asked, documented);
        let readme = include_str!("../README.md");
        for name in &documented {
            assert!(
                readme.contains(&format!("`{name}`")),
                "{name} is not in the README"
            );
        }
    }

    #[test]
    fn a_flag_is_a_variable_and_a_wrong_one_is_refused() {
        let parse = |line: &str| parse_arguments(line.split(' ').map(str::to_owned));
        let setting = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            parse("--batch-size 4 --decode=fast"),
            Ok(Command::Run(vec![
                setting("BATCH_SIZE", "4"),
                setting("DECODE", "fast")
            ]))
        );
        assert_eq!(parse("--check-config"), Ok(Command::Check(Vec::new())));
        assert_eq!(parse("--version"), Ok(Command::Version));
        assert!(parse("--batchsize 4").is_err());
        assert!(parse("--decode").is_err());
        assert!(parse("run").is_err());
    }
}
