//! The task's configuration: flags and environment variables, checked before
//! anything starts.

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, RangedU64ValueParser, Resettable, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser};
use clip_image::{DecodeMode, Limits, Options};
use clip_model::engine::ExecutionProvider;
use delivery::{Backoff, OutputConfig};
use events::{S3Url, vector};
use platform::env::Reader;
use platform::metrics::DEFAULT_NAMESPACE;

use crate::services::VISIBILITY_MAX;

/// Read by the logs and by the engine, before or below this configuration.
const READ_ELSEWHERE: &str = "\
Only as variables:
  ORT_DYLIB_PATH  file of ONNX Runtime's shared library; required
  RUST_LOG        log filter; debug shows every stage of every image [default: info]
  LOG_FORMAT      json or text [default: text on a terminal, else json]

Exit codes:
  0    done: idle for IDLE_EXIT_SECONDS, or stopped by SIGTERM
  2    the configuration is wrong
  3    the model cannot be fetched or loaded
  4    a queue, the cache bucket or an output cannot be used (missing, or access refused)
  5    the model fails run after run
  101  a fault of the program itself";

/// When a message that failed for a passing reason comes back: with the usual
/// five deliveries an outage of about two and a half minutes costs nothing.
const RETRY: Backoff = Backoff {
    base: Duration::from_secs(10),
    cap: Duration::from_secs(900),
};

const MIB: u64 = 1024 * 1024;

/// Takes images from a queue, embeds them with CLIP, stores the vectors and
/// publishes the enriched events.
///
/// Every variable can be given as a flag, which then counts. An empty variable
/// counts as absent. The AWS SDK's own variables work as usual.
#[derive(Clone, Debug, Parser)]
#[command(name = "gpu-task", version, after_help = READ_ELSEWHERE, args_override_self = true)]
pub struct Config {
    /// Print the configuration, or what is wrong with it, and exit
    #[arg(long = "check-config")]
    pub check_config: bool,
    /// URL of the SQS queue with the work: each message is a CloudEvent, or any other form in
    /// which work arrives
    #[arg(long, env = "INPUT_QUEUE_URL", value_parser = queue_url)]
    pub input_queue_url: String,
    /// URL of a second SQS queue, for work that only a GPU can do: the input queue's redrive policy
    /// leads there, and the express lane hands over to it
    #[arg(long, env = "GPU_QUEUE_URL", value_parser = queue_url)]
    pub gpu_queue_url: Option<String>,
    /// URL of the SQS queue for rejected messages: one that can never succeed goes there at once,
    /// with its reason
    #[arg(long, env = "DEAD_LETTER_QUEUE_URL", value_parser = queue_url)]
    pub(crate) dead_letter_queue_url: String,
    /// ARN of an SNS topic for events in Lakechain's form, what the next middleware subscribes to;
    /// one output at least is required
    #[arg(long, env = "OUTPUT_TOPIC_ARN")]
    output_topic_arn: Option<String>,
    /// Name or ARN of an EventBridge bus for events as standard CloudEvents 1.0
    #[arg(long, env = "OUTPUT_EVENT_BUS")]
    output_event_bus: Option<String>,
    /// URL of an SQS queue for events in Lakechain's form
    #[arg(long, env = "OUTPUT_QUEUE_URL")]
    output_queue_url: Option<String>,
    /// Name of the S3 bucket for vectors, each one JSON object
    #[arg(long, env = "CACHE_BUCKET")]
    pub(crate) cache_bucket: String,
    /// Folder of the model bundle: one on disk starts fastest
    #[arg(long, env = "MODEL_PATH", conflicts_with = "model_uri")]
    #[arg(required_unless_present = "model_uri")]
    pub(crate) model_path: Option<PathBuf>,
    /// s3://bucket/prefix of the model bundle, fetched once per machine into CACHE_DIR, digests
    /// checked
    #[arg(long, env = "MODEL_URI", requires = "cache_dir", value_parser = model_uri)]
    pub(crate) model_uri: Option<S3Url>,
    /// Folder for fetched bundles, EFS or a disk; several tasks share it safely
    #[arg(long, env = "CACHE_DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
    /// What the model runs on: cpu or cuda; cuda that cannot be used is an error, never a fall-back
    #[arg(long, env = "EXECUTION_PROVIDER", default_value = "cpu", value_parser = provider())]
    pub(crate) execution_provider: ExecutionProvider,
    /// Threads of one model run on a CPU [default: all cores]
    #[arg(long, env = "INTRA_THREADS", default_value_t = cores(), value_parser = within(1..=256))]
    #[arg(hide_default_value = true)]
    pub(crate) intra_threads: usize,
    /// How JPEGs are decoded: fast takes large ones at lower resolution, cosine loss at most 6e-6
    #[arg(long, env = "DECODE", default_value = "exact", value_parser = decode_mode())]
    decode: DecodeMode,
    /// Whether EXIF's orientation counts; the reference ignores it
    #[arg(long, env = "APPLY_EXIF_ORIENTATION", default_value = "false", value_parser = boolean())]
    #[arg(action = clap::ArgAction::Set)]
    apply_exif_orientation: bool,
    /// Whether the bundle's five nearest labels are added to the keywords
    #[arg(long, env = "EXTRACT_LABELS", default_value = "true", value_parser = boolean())]
    #[arg(action = clap::ArgAction::Set)]
    pub(crate) extract_labels: bool,
    /// Pixels of an image: Pillow's limit against decompression bombs
    #[arg(long, env = "MAX_IMAGE_PIXELS", default_value_t = Limits::MAX_PIXELS, value_parser = up_to_2_40())]
    max_image_pixels: u64,
    /// Bytes that decoding one image may take; larger is rejected
    #[arg(long, env = "MAX_IMAGE_MEMORY_BYTES", default_value_t = Limits::MAX_MEMORY, value_parser = up_to_2_40())]
    max_image_memory_bytes: u64,
    /// Seconds of processor time that decoding one image may take on its thread, waiting for a
    /// processor not counted; longer is rejected
    #[arg(
        long = "decode-timeout-seconds",
        env = "DECODE_TIMEOUT_SECONDS",
        value_name = "DECODE_TIMEOUT_SECONDS",
        default_value = "30"
    )]
    #[arg(value_parser = seconds(1..=3600))]
    decode_timeout: Duration,
    /// CloudWatch namespace of the metrics on standard output
    #[arg(long, env = "METRICS_NAMESPACE", default_value = DEFAULT_NAMESPACE)]
    pub metrics_namespace: String,
    /// Name of the ECS cluster, a property of each metric line, for searching
    #[arg(long, env = "CLUSTER_NAME")]
    pub(crate) cluster_name: Option<String>,
    /// What the pipeline reads.
    #[command(flatten)]
    pub settings: Settings,
}

/// How the pipeline runs.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Images, 1 to 512: larger gains nothing on a CPU; with cuda 64, which fills a T4
    #[arg(long, env = "BATCH_SIZE", value_parser = within(1..=512))]
    #[arg(
        default_value = "8",
        default_value_if("execution_provider", "cuda", "64")
    )]
    pub batch_size: usize,
    /// Milliseconds that an image waits for company while the model is idle and more is on its
    /// way; with cuda 150, since decoders fill a batch slower than a GPU empties it
    #[arg(long = "batch-wait-ms", env = "BATCH_WAIT_MS", value_name = "BATCH_WAIT_MS", value_parser = milliseconds(0..=10_000))]
    #[arg(
        default_value = "40",
        default_value_if("execution_provider", "cuda", "150")
    )]
    pub batch_wait: Duration,
    /// Images decoded at the same time [default: all cores]
    #[arg(long, env = "DECODE_THREADS", default_value_t = cores(), value_parser = within(1..=256))]
    #[arg(hide_default_value = true)]
    pub decode_threads: usize,
    /// Documents fetched at the same time, which hides the storage's latency; with cuda 64
    #[arg(long, env = "DOWNLOADS", value_parser = within(1..=1024))]
    #[arg(
        default_value = "16",
        default_value_if("execution_provider", "cuda", "64")
    )]
    pub downloads: usize,
    /// Vectors written at the same time; with cuda 64
    #[arg(long, env = "STORES", value_parser = within(1..=1024))]
    #[arg(
        default_value = "16",
        default_value_if("execution_provider", "cuda", "64")
    )]
    pub stores: usize,
    /// Most messages held, with cuda 1024; fewer are held when the rate says that more cannot be
    /// finished in time
    #[arg(long, env = "MAX_MESSAGES", value_parser = within(10..=10_000))]
    #[arg(
        default_value = "128",
        default_value_if("execution_provider", "cuda", "1024")
    )]
    pub max_messages: usize,
    /// Bytes of documents in memory and of what decoding them takes, from 64 MiB; with cuda 2 GiB;
    /// an image that needs more runs alone
    #[arg(
        long = "memory-budget-bytes",
        env = "MEMORY_BUDGET_BYTES",
        value_name = "MEMORY_BUDGET_BYTES"
    )]
    #[arg(value_parser = clap::value_parser!(u64).range(64 * MIB..=1 << 42))]
    #[arg(
        default_value = "402653184",
        default_value_if("execution_provider", "cuda", "2147483648")
    )]
    pub memory_budget: u64,
    /// Bytes of a document: an object can have terabytes
    #[arg(long, env = "MAX_IMAGE_BYTES", default_value_t = Limits::MAX_BYTES, value_parser = up_to_2_40())]
    pub max_image_bytes: u64,
    /// Seconds after which a killed task's messages come back; a heartbeat extends them while work
    /// goes on
    #[arg(
        long = "visibility-timeout-seconds",
        env = "VISIBILITY_TIMEOUT_SECONDS",
        value_name = "VISIBILITY_TIMEOUT_SECONDS",
        default_value = "60"
    )]
    #[arg(value_parser = seconds(10..=VISIBILITY_MAX.as_secs()))]
    pub visibility: Duration,
    /// Seconds for one document, all tries together
    #[arg(
        long = "download-timeout-seconds",
        env = "DOWNLOAD_TIMEOUT_SECONDS",
        value_name = "DOWNLOAD_TIMEOUT_SECONDS",
        default_value = "120"
    )]
    #[arg(value_parser = seconds(1..=3600))]
    pub download_timeout: Duration,
    /// Seconds without work after which the task exits; 0 never exits
    #[arg(
        long = "idle-exit-seconds",
        env = "IDLE_EXIT_SECONDS",
        value_name = "IDLE_EXIT_SECONDS",
        default_value = "30"
    )]
    #[arg(value_parser = seconds(0..=86_400))]
    pub idle_exit: Duration,
    /// Seconds of ECS's stop timeout: after SIGTERM everything ends before it
    #[arg(
        long = "stop-timeout-seconds",
        env = "STOP_TIMEOUT_SECONDS",
        value_name = "STOP_TIMEOUT_SECONDS",
        default_value = "30"
    )]
    #[arg(value_parser = seconds(1..=120))]
    pub stop_timeout: Duration,
    /// Seconds between metrics: short enough that a task of a minute is seen
    #[arg(
        long = "metrics-interval-seconds",
        env = "METRICS_INTERVAL_SECONDS",
        value_name = "METRICS_INTERVAL_SECONDS",
        default_value = "10"
    )]
    #[arg(value_parser = seconds(1..=3600))]
    pub metrics_interval: Duration,
    /// Prefix of the vectors' keys, by default the product page's
    #[arg(long, env = "CACHE_PREFIX", default_value = vector::DEFAULT_PREFIX)]
    pub cache_prefix: String,
    /// Log lines about single images; what is above is not written, so that logs cost less than
    /// the GPU
    #[arg(long, env = "IMAGE_LINES_PER_SECOND", default_value = "100")]
    #[arg(value_parser = clap::value_parser!(u32).range(0..=100_000))]
    pub image_lines_per_second: u32,
    /// When a message that failed for a passing reason comes back.
    #[arg(skip = RETRY)]
    pub retry: Backoff,
    /// Who works, in rejections.
    #[arg(skip = "gpu-task")]
    pub program: &'static str,
}

impl Config {
    /// Reads and checks flags and variables. The error is also what asks for
    /// the help or the version: [`clap::Error::exit`] does what is right.
    pub fn read(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut command = Self::command().mut_args(|arg| {
            // Templates pass empty strings for options that are off.
            let value = arg.get_env().and_then(std::env::var_os);
            if value.is_some_and(|value| value.to_string_lossy().trim().is_empty()) {
                arg.env(Resettable::Reset)
            } else {
                arg
            }
        });
        let matches = command.try_get_matches_from_mut(arguments)?;
        let config = Self::from_arg_matches(&matches)?;
        config
            .outputs()
            .map_err(|error| command.error(ErrorKind::ValueValidation, error))?;
        if config.input_queue_url == config.dead_letter_queue_url {
            let problem = "DEAD_LETTER_QUEUE_URL must be another queue than INPUT_QUEUE_URL: \
                           rejected messages would come back for ever";
            return Err(command.error(ErrorKind::ArgumentConflict, problem));
        }
        Ok(config)
    }

    /// The queues that a task receives from, that of the GPUs first.
    pub fn queue_urls(&self) -> Vec<String> {
        let gpu = self.gpu_queue_url.iter();
        gpu.chain([&self.input_queue_url]).cloned().collect()
    }

    /// Where events go.
    pub(crate) fn outputs(&self) -> Result<OutputConfig, platform::env::EnvError> {
        OutputConfig::from_env(&Reader::new(|name| match name {
            "OUTPUT_TOPIC_ARN" => self.output_topic_arn.clone(),
            "OUTPUT_EVENT_BUS" => self.output_event_bus.clone(),
            "OUTPUT_QUEUE_URL" => self.output_queue_url.clone(),
            _ => None,
        }))
    }

    /// How images are decoded, but for the model's side.
    pub(crate) fn image_options(&self) -> Options {
        Options {
            limits: Limits {
                max_pixels: self.max_image_pixels,
                max_bytes: self.settings.max_image_bytes,
                max_memory: self.max_image_memory_bytes,
            },
            apply_exif_orientation: self.apply_exif_orientation,
            decode: self.decode,
            time_limit: self.decode_timeout,
            ..Options::default()
        }
    }

    /// The input queue's name, the dimension of the metrics.
    pub fn queue_name(&self) -> &str {
        let url = self.input_queue_url.trim_end_matches('/');
        url.rsplit('/').next().unwrap_or_default()
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn within(range: RangeInclusive<u64>) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(range)
}

/// What a limit may be: there is no larger image.
fn up_to_2_40() -> RangedU64ValueParser<u64> {
    RangedU64ValueParser::new().range(1..=1 << 40)
}

fn seconds(range: RangeInclusive<u64>) -> impl TypedValueParser<Value = Duration> {
    RangedU64ValueParser::<u64>::new()
        .range(range)
        .map(Duration::from_secs)
}

fn milliseconds(range: RangeInclusive<u64>) -> impl TypedValueParser<Value = Duration> {
    RangedU64ValueParser::<u64>::new()
        .range(range)
        .map(Duration::from_millis)
}

/// `true`, `false` and the other usual words.
fn boolean() -> clap::builder::BoolishValueParser {
    clap::builder::BoolishValueParser::new()
}

fn provider() -> impl TypedValueParser<Value = ExecutionProvider> {
    PossibleValuesParser::new(["cpu", "cuda"]).map(|word| match word.as_str() {
        "cuda" => ExecutionProvider::Cuda,
        _ => ExecutionProvider::Cpu,
    })
}

fn decode_mode() -> impl TypedValueParser<Value = DecodeMode> {
    PossibleValuesParser::new(["exact", "fast"]).map(|word| match word.as_str() {
        "fast" => DecodeMode::Fast,
        _ => DecodeMode::Exact,
    })
}

fn queue_url(url: &str) -> Result<String, &'static str> {
    if url.starts_with("http") && !url.ends_with(".fifo") {
        return Ok(url.to_owned());
    }
    Err("not the URL of a standard SQS queue (https://sqs.REGION.amazonaws.com/ACCOUNT/NAME)")
}

fn model_uri(uri: &str) -> Result<S3Url, &'static str> {
    let place = uri.trim_end_matches('/').parse();
    place.map_err(|_| "not s3://bucket/prefix")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    const LEAST: [(&str, &str); 5] = [
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
    ];

    /// The least configuration with changes; an empty value removes one.
    fn read(changes: &[(&str, &str)]) -> Result<Config, clap::Error> {
        let mut values: std::collections::BTreeMap<&str, &str> = LEAST.into();
        values.extend(changes.iter().copied());
        values.retain(|_, value| !value.is_empty());
        let flags = values.iter().map(|(name, value)| {
            let flag = name.to_ascii_lowercase().replace('_', "-");
            format!("--{flag}={value}").into()
        });
        Config::read(std::iter::once("gpu-task".into()).chain(flags))
    }

    #[test]
    fn the_least_configuration_is_enough() {
        let config = read(&[]).unwrap();
        assert_eq!(config.queue_name(), "input");
        assert_eq!(config.settings.batch_size, 8);
        assert_eq!(config.settings.memory_budget, 384 * MIB);
        assert_eq!(config.settings.idle_exit, Duration::from_secs(30));
        assert_eq!(config.decode_timeout, clip_image::DEFAULT_TIME_LIMIT);
        assert_eq!(config.settings.cache_prefix, "clip-image-processor");
    }

    #[test]
    fn what_an_image_may_cost_reaches_its_decoder() {
        let config = read(&[
            ("DECODE_TIMEOUT_SECONDS", "7"),
            ("MAX_IMAGE_PIXELS", "1"),
            ("MAX_IMAGE_BYTES", "2"),
            ("MAX_IMAGE_MEMORY_BYTES", "3"),
        ]);
        let options = config.unwrap().image_options();
        assert_eq!(options.time_limit, Duration::from_secs(7));
        let limits = options.limits;
        assert_eq!(
            (limits.max_pixels, limits.max_bytes, limits.max_memory),
            (1, 2, 3)
        );
    }

    #[test]
    fn a_gpu_has_defaults_of_its_own() {
        let config = read(&[("EXECUTION_PROVIDER", "cuda")]).unwrap();
        // What the simulator counts on.
        assert_eq!(config.settings.batch_size, planner::worker::GPU_BATCH_SIZE);
        assert_eq!(
            config.settings.max_messages,
            planner::worker::GPU_MAX_MESSAGES
        );
        assert_eq!(config.settings.memory_budget, 2 << 30);
        assert_eq!(config.settings.batch_wait, Duration::from_millis(150));
    }

    #[test]
    fn what_is_not_accepted_is_named_with_what_is() {
        for (name, value, accepted) in [
            ("INPUT_QUEUE_URL", "input", "https://sqs"),
            (
                "DEAD_LETTER_QUEUE_URL",
                "https://sqs.eu-west-1.amazonaws.com/1/input",
                "another queue",
            ),
            ("OUTPUT_TOPIC_ARN", "topic", "arn:PARTITION:sns"),
            ("EXECUTION_PROVIDER", "tpu", "cpu, cuda"),
            ("BATCH_SIZE", "0", "1..=512"),
            ("VISIBILITY_TIMEOUT_SECONDS", "43201", "10..=43200"),
            ("STOP_TIMEOUT_SECONDS", "121", "1..=120"),
            ("DECODE_TIMEOUT_SECONDS", "0", "1..=3600"),
            ("MODEL_URI", "s3://models/b32", "MODEL_PATH"),
            ("DECODE", "slow", "exact, fast"),
            ("EXTRACT_LABELS", "perhaps", "boolean"),
        ] {
            let error = read(&[(name, value)]).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
            assert!(error.contains(accepted), "{error}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        for name in LEAST.map(|(name, _)| name) {
            let error = read(&[(name, "")]).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_model_in_s3_needs_a_folder_to_be_cached_in() {
        let uri = ("MODEL_URI", "s3://models/clip/b32/");
        let error = read(&[("MODEL_PATH", ""), uri]).unwrap_err().to_string();
        assert!(error.contains("CACHE_DIR"), "{error}");
        let config = read(&[("MODEL_PATH", ""), uri, ("CACHE_DIR", "/efs")]).unwrap();
        assert_eq!(config.model_uri, Some(S3Url::new("models", "clip/b32")));
    }

    #[test]
    fn the_readme_has_a_row_for_every_variable_and_no_other() {
        let command = Config::command();
        let mut read: BTreeSet<String> = command
            .get_arguments()
            .filter_map(|arg| arg.get_env()?.to_str().map(str::to_owned))
            .collect();
        read.extend(["ORT_DYLIB_PATH", "RUST_LOG", "LOG_FORMAT"].map(str::to_owned));
        let rows: BTreeSet<String> = include_str!("../../../gpu-task/README.md")
            .lines()
            .filter_map(|line| Some(line.strip_prefix("| `")?.split_once('`')?.0.to_owned()))
            .collect();
        assert_eq!(read, rows);
    }

    #[test]
    fn a_flag_is_a_variable_and_a_wrong_one_is_refused() {
        for (name, flag) in Config::command().get_arguments().filter_map(|arg| {
            Some((
                arg.get_env()?.to_str()?.to_owned(),
                arg.get_long()?.to_owned(),
            ))
        }) {
            assert_eq!(name, flag.to_ascii_uppercase().replace('-', "_"));
        }
        let parse = |line: &str| Config::read(line.split(' ').map(OsString::from));
        for wrong in [
            "gpu-task --batchsize 4",
            "gpu-task --decode",
            "gpu-task run",
        ] {
            assert!(parse(wrong).is_err());
        }
        let kind = |line: &str| parse(line).unwrap_err().kind();
        assert_eq!(kind("gpu-task --version"), ErrorKind::DisplayVersion);
        assert_eq!(kind("gpu-task --help"), ErrorKind::DisplayHelp);
        assert!(read(&[]).is_ok_and(|config| !config.check_config));
    }
}
