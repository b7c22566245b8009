//! The command line.

use std::path::PathBuf;

use anyhow::{Context, anyhow, bail};
use clap::{Args, Parser, Subcommand, ValueEnum};
use events::ImageType;
use regex_lite::Regex;

use crate::backfill::Job;
use crate::units::{Rate, parse_rate, parse_size};

/// The names that bundles have. A name with a slip of the pen would find no
/// vector and enqueue a whole bucket again.
pub const KNOWN_MODELS: [&str; 4] = ["ViT-B/32", "ViT-B/16", "ViT-L/14", "tiny"];

/// The operator's commands of clip-image-processor.
///
/// Region, credentials and endpoints come from the environment, as for every
/// AWS tool: AWS_REGION, AWS_PROFILE, AWS_ENDPOINT_URL and so on.
#[derive(Debug, Parser)]
#[command(name = "clip-ops", version)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Put the images that lie in a bucket already onto the input queue.
    Backfill(Box<BackfillArgs>),
    /// Show the dead-letter queue with its reasons, and send messages back.
    Redrive(RedriveArgs),
    /// Estimate dollars and time by lane, beside Bedrock's price; asks AWS nothing.
    Estimate(EstimateArgs),
    /// Look whether an account has what a deployment needs, before it or after.
    Doctor(DoctorArgs),
}

/// How to find out which objects have their vector already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EmbeddedCheck {
    /// List the cache once: one request per 1,000 vectors.
    List,
    /// Ask for each object: for few objects and a huge cache.
    Head,
    /// Do not: everything is enqueued, embedded or not.
    Off,
}

const BACKFILL_EXAMPLES: &str = "\
Examples:
  What would be done, without doing it:
    clip-ops backfill s3://photos/2025/ --queue $QUEUE --cache-bucket my-cache --dry-run

  200 images a second, and Ctrl-C at any time; the same command goes on:
    clip-ops backfill s3://photos/2025/ --queue $QUEUE --cache-bucket my-cache \\
      --rate 200/s --checkpoint photos-2025.json

  JPEGs and PNGs of January that have at least 10 kB:
    clip-ops backfill s3://photos --queue $QUEUE --cache-bucket my-cache \\
      --types jpeg,png --min-size 10kB --since 2026-01-01 --until 2026-02-01

  From an S3 Inventory in CSV instead of listing the bucket:
    clip-ops backfill s3://photos --queue $QUEUE --cache-bucket my-cache \\
      --manifest s3://inventories/photos/daily/2026-01-31T01-00Z/manifest.json

Exit status: 0 done, 1 failed (run it again to go on), 2 wrong options, 130 and 143 stopped by a signal.";

#[derive(Debug, Args)]
#[command(after_long_help = BACKFILL_EXAMPLES, after_help = "Examples: --help")]
pub struct BackfillArgs {
    /// The bucket, and what the keys begin with (taken as it is, not decoded).
    #[arg(value_name = "s3://BUCKET/PREFIX", value_parser = parse_location)]
    pub source: Location,
    #[command(flatten)]
    asked: Job,
    /// Read this S3 Inventory (CSV) instead of listing the bucket.
    #[arg(long, value_name = "s3://BUCKET/…/manifest.json", value_parser = parse_location)]
    pub manifest: Option<Location>,
    /// How to find out what has its vector already.
    #[arg(long, value_enum, default_value = "list")]
    pub embedded_check: EmbeddedCheck,
    /// Objects per second, as in 500/s, or max.
    #[arg(long, value_parser = parse_rate, default_value = "1000/s")]
    pub rate: Rate,
    /// Remember here how far the walk came; the same command goes on there.
    #[arg(long, value_name = "FILE")]
    pub checkpoint: Option<PathBuf>,
    /// Only count; send nothing, write no checkpoint.
    #[arg(long)]
    pub dry_run: bool,
    /// The scaler's Lambda, to wake with the first work.
    #[arg(long, env = "SCALER_FUNCTION_NAME", value_name = "FUNCTION")]
    pub wake_scaler: Option<String>,
    /// The result as JSON.
    #[arg(long)]
    pub json: bool,
}

impl BackfillArgs {
    pub fn job(&self) -> Job {
        let mut job = self.asked.clone();
        job.bucket.clone_from(&self.source.bucket);
        job.prefix.clone_from(&self.source.rest);
        job.manifest = self.manifest.as_ref().map(Location::url);
        if job.types.is_empty() {
            job.types = ImageType::ALL.to_vec();
        }
        job.types.sort_unstable();
        job.types.dedup();
        job
    }

    /// What no parser of one option sees.
    pub fn check(&self) -> anyhow::Result<()> {
        if self
            .asked
            .max_size
            .is_some_and(|largest| largest < self.asked.min_size)
        {
            bail!("--max-size is below --min-size: nothing would be left");
        }
        if let (Some(since), Some(until)) = (self.asked.since, self.asked.until)
            && until <= since
        {
            bail!("--until is not after --since: nothing would be left");
        }
        if let Some(manifest) = &self.manifest
            && !manifest.rest.ends_with(".json")
        {
            bail!(
                "--manifest {} is no manifest.json: name the inventory's manifest, not its data",
                manifest.url()
            );
        }
        Ok(())
    }
}

const REDRIVE_EXAMPLES: &str = "\
Examples:
  What lies there, and why:
    clip-ops redrive --dead-letter-queue $DLQ

  Send back what failed while a role was wrong:
    clip-ops redrive --dead-letter-queue $DLQ --queue $QUEUE --reason 'AccessDenied'

  Send back two messages, then everything:
    clip-ops redrive --dead-letter-queue $DLQ --queue $QUEUE --ids 0f6c…,81aa…
    clip-ops redrive --dead-letter-queue $DLQ --queue $QUEUE --all

  Have intake take what it could not take when it came (its queue of failures; lost images are there):
    clip-ops redrive --dead-letter-queue $FAILURES
    clip-ops redrive --dead-letter-queue $FAILURES --intake $INTAKE --all

  Discard what is no image:
    clip-ops redrive --dead-letter-queue $DLQ --reason 'none of the seven types' --delete --yes

With --intake, Lambda's records of failed invocations give what intake was invoked with, anything
else its body; a message is deleted when intake has answered that all of it is done. Records do not
go back with --queue. $FAILURES and $INTAKE are the stack's outputs IntakeFailureQueueUrl and
IntakeFunctionArn.

Showing consumes nothing: messages are invisible to others while the command runs (two minutes at
most after a kill), and count one more receive.

Exit status: 0 done, 1 failed, 2 wrong options, 130 and 143 stopped by a signal.";

#[derive(Debug, Args)]
#[command(after_long_help = REDRIVE_EXAMPLES, after_help = "Examples: --help")]
pub struct RedriveArgs {
    /// URL of the dead-letter queue, or of the queue of what intake could not take.
    #[arg(long, env = "DEAD_LETTER_QUEUE_URL", value_name = "URL", value_parser = parse_queue)]
    pub dead_letter_queue: String,
    /// URL of the input queue, to which messages go back.
    #[arg(long, env = "INPUT_QUEUE_URL", value_name = "URL", value_parser = parse_queue)]
    pub queue: Option<String>,
    /// Name or ARN of intake, which takes the messages instead of the input queue.
    #[arg(long, value_name = "FUNCTION")]
    pub intake: Option<String>,
    /// Show, and do nothing [default].
    #[arg(long, group = "choice")]
    pub list: bool,
    /// Choose every message.
    #[arg(long, group = "choice")]
    pub all: bool,
    /// Choose messages whose reason matches.
    #[arg(long, group = "choice", value_name = "REGEX", value_parser = parse_regex)]
    pub reason: Option<Regex>,
    /// Choose messages by their ids (or the beginnings of them).
    #[arg(long, group = "choice", value_name = "ID,…", value_delimiter = ',')]
    pub ids: Vec<String>,
    /// Choose so many messages at most.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub limit: Option<u64>,
    /// Discard the chosen messages instead of sending them back.
    #[arg(long, conflicts_with_all = ["list", "intake"])]
    pub delete: bool,
    /// Yes, discard them.
    #[arg(long, requires = "delete")]
    pub yes: bool,
    /// Show what would be chosen, and do nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// The result as JSON.
    #[arg(long)]
    pub json: bool,
}

impl RedriveArgs {
    /// Whether messages are only shown.
    pub fn only_shows(&self) -> bool {
        let chooses = self.all || self.reason.is_some() || !self.ids.is_empty();
        self.list || !chooses
    }

    /// What no parser of one option sees.
    pub fn check(&self) -> anyhow::Result<()> {
        if self.ids.iter().any(|id| id.trim().is_empty()) {
            bail!("--ids names an empty id, which would choose every message");
        }
        if self.only_shows() {
            if self.delete {
                bail!("--delete needs a choice: --all, --reason REGEX or --ids ID,…");
            }
            return Ok(());
        }
        if self.delete {
            if !self.yes && !self.dry_run {
                bail!("--delete discards messages for good: add --yes, or --dry-run to see which");
            }
            return Ok(());
        }
        match &self.queue {
            _ if self.intake.is_some() => Ok(()),
            None if !self.dry_run => {
                bail!("--queue URL or --intake FUNCTION says where the chosen messages go back to")
            }
            Some(queue) if *queue == self.dead_letter_queue => {
                bail!("--queue is the dead-letter queue itself")
            }
            _ => Ok(()),
        }
    }
}

const ESTIMATE_EXAMPLES: &str = "\
Examples:
  A million images at once, and the same in a month of 1,500 bursts:
    clip-ops estimate --images 1000000
    clip-ops estimate --images 1000000 --bursts 1500

  One at a time, with the figures of the dashboard:
    clip-ops estimate --images 20000 --bursts 20000 --lane-seconds 0.35 --images-per-second 140

Speeds that are not given are estimates; prices are list prices with their date, without free tiers.";

/// Options of `estimate`.
#[derive(Debug, Args)]
#[command(after_long_help = ESTIMATE_EXAMPLES, after_help = "Examples: --help")]
pub struct EstimateArgs {
    /// How many images.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub images: u64,
    /// In how many bursts, far apart, they come: 1 is all at once, as many as
    /// there are images one at a time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    pub bursts: u64,
    /// Size of an image's file.
    #[arg(long, default_value = "200kB", value_parser = parse_size)]
    pub size: u64,
    /// ViT-B/32, ViT-B/16 or ViT-L/14.
    #[arg(long, default_value = "ViT-B/32")]
    pub model: String,
    /// Of the GPU instances.
    #[arg(long, default_value = "g4dn.xlarge")]
    pub instance_type: String,
    /// Dollars of an instance for an hour, such as its Spot price.
    #[arg(long, value_name = "USD")]
    pub usd_per_hour: Option<f64>,
    /// Images per second of one instance, as the dashboard shows it.
    #[arg(long, value_name = "RATE")]
    pub images_per_second: Option<f64>,
    /// Billed seconds of an image in the lane, as the dashboard shows it.
    #[arg(long, value_name = "SECONDS")]
    pub lane_seconds: Option<f64>,
    /// The stack's ExpressMaxConcurrency.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=1000))]
    pub lane_concurrency: u32,
    /// The stack's MaxInstances.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=500))]
    pub max_instances: u32,
    /// The stack's TargetDrainSeconds.
    #[arg(long, default_value_t = 45, value_parser = clap::value_parser!(u32).range(1..=86400))]
    pub target_drain_seconds: u32,
    /// Count a NAT gateway, with the images through it (no S3 endpoint).
    #[arg(long)]
    pub nat: bool,
    /// The result as JSON.
    #[arg(long)]
    pub json: bool,
}

const DOCTOR_EXAMPLES: &str = "\
Examples:
  Before the deployment, with the parameters that it will have:
    clip-ops doctor VpcId=vpc-… PrivateSubnet1=subnet-… SourceBucket1=photos ModelBucket=models

  After it, and what an update would need:
    clip-ops doctor --stack clip-image-processor
    clip-ops doctor --stack clip-image-processor InstanceType1=g5.xlarge Purchase1=spot

Nothing is changed. Each line says pass, FAIL or cannot tell, and what to do.

Exit status: 0 nothing failed, 1 something did or nothing could be asked, 2 wrong options.";

/// Options of `doctor`.
#[derive(Debug, Args)]
#[command(after_long_help = DOCTOR_EXAMPLES, after_help = "Examples: --help")]
pub struct DoctorArgs {
    /// The template's parameters, as `sam deploy --parameter-overrides` takes them.
    #[arg(value_name = "PARAMETER=VALUE", value_parser = parse_parameter)]
    pub parameters: Vec<(String, String)>,
    /// A deployed stack: its parameters, unless given, and its health.
    #[arg(long, value_name = "NAME")]
    pub stack: Option<String>,
    /// Read the model's files and compare their digests (hundreds of MB).
    #[arg(long)]
    pub read_model: bool,
    /// The result as JSON.
    #[arg(long)]
    pub json: bool,
}

fn parse_parameter(text: &str) -> anyhow::Result<(String, String)> {
    let (name, value) = text
        .split_once('=')
        .with_context(|| format!("{text:?} is no parameter: write Name=Value"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// A bucket and what follows it in a URL, neither decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    pub bucket: String,
    pub rest: String,
}

impl Location {
    pub fn url(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.rest)
    }
}

fn parse_location(text: &str) -> anyhow::Result<Location> {
    let path = text.strip_prefix("s3://").unwrap_or_default();
    let (bucket, rest) = path.split_once('/').unwrap_or((path, ""));
    if bucket.is_empty() {
        bail!("{text:?} is no location: write s3://bucket or s3://bucket/prefix");
    }
    Ok(Location {
        bucket: bucket.to_owned(),
        rest: rest.to_owned(),
    })
}

pub fn parse_queue(text: &str) -> anyhow::Result<String> {
    if text.ends_with(".fifo") {
        bail!("{text:?} is a FIFO queue; this pipeline's are standard queues");
    }
    if !text.starts_with("https://") && !text.starts_with("http://") {
        bail!("{text:?} is no queue URL: write https://sqs.REGION.amazonaws.com/ACCOUNT/NAME");
    }
    Ok(text.to_owned())
}

pub fn parse_type(text: &str) -> anyhow::Result<ImageType> {
    let name = text.trim();
    ImageType::from_name(&format!("x.{name}"))
        .or_else(|| ImageType::from_mime(name))
        .with_context(|| {
            format!("{text:?} is none of the seven types: bmp, gif, jpeg, png, tiff, webp, pcx")
        })
}

fn parse_regex(text: &str) -> anyhow::Result<Regex> {
    Regex::new(text).map_err(|problem| anyhow!("{text:?} is no regular expression: {problem}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKFILL: &[&str] = &[
        "clip-ops",
        "backfill",
        "s3://photos/a b/",
        "--queue",
        "https://sqs/1/input",
        "--cache-bucket",
        "cache",
    ];
    const REDRIVE: &[&str] = &[
        "clip-ops",
        "redrive",
        "--dead-letter-queue",
        "https://sqs/1/dead",
    ];

    fn backfill(more: &[&str]) -> anyhow::Result<Box<BackfillArgs>> {
        match Cli::try_parse_from(BACKFILL.iter().chain(more))?.command {
            Command::Backfill(args) => args.check().map(|()| args),
            _ => bail!("not a backfill"),
        }
    }

    fn redrive(more: &[&str]) -> anyhow::Result<RedriveArgs> {
        match Cli::try_parse_from(REDRIVE.iter().chain(more))?.command {
            Command::Redrive(args) => args.check().map(|()| args),
            _ => bail!("not a redrive"),
        }
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_prefix_is_taken_as_it_is() {
        let job = backfill(&[]).unwrap().job();
        assert_eq!(
            (job.bucket.as_str(), job.prefix.as_str()),
            ("photos", "a b/")
        );
        assert_eq!(job.types, ImageType::ALL);
        assert_eq!(job.model, "ViT-B/32");
        assert!(parse_location("s3://").is_err() && parse_location("photos").is_err());
        assert_eq!(parse_location("s3://photos").unwrap().rest, "");
    }

    #[test]
    fn the_order_of_types_makes_no_other_job() {
        let one = backfill(&["--types", "png,jpg"]).unwrap().job();
        let other = backfill(&["--types", "image/jpeg,PNG,png"]).unwrap().job();
        assert_eq!(one, other);
    }

    #[test]
    fn what_cannot_be_meant_is_refused_with_its_reason() {
        for (options, words) in [
            (&["--types", "heic"][..], "seven types"),
            (&["--model", "ViT-B-32"], "ViT-B/32"),
            (&["--rate", "0"], "no rate"),
            (&["--min-size", "10", "--max-size", "9"], "below --min-size"),
            (
                &["--since", "2026-02-01", "--until", "2026-02-01"],
                "not after --since",
            ),
            (&["--manifest", "s3://i/data.csv.gz"], "manifest.json"),
        ] {
            let problem = backfill(options).unwrap_err().to_string();
            assert!(problem.contains(words), "{words} in {problem}");
        }
    }

    #[test]
    fn a_queue_is_a_standard_queue_by_its_url() {
        assert!(parse_queue("https://sqs.eu-west-1.amazonaws.com/1/input").is_ok());
        assert!(
            parse_queue("https://sqs/1/in.fifo")
                .unwrap_err()
                .to_string()
                .contains("FIFO")
        );
        assert!(
            parse_queue("input")
                .unwrap_err()
                .to_string()
                .contains("queue URL")
        );
    }

    #[test]
    fn redrive_shows_unless_something_is_chosen() {
        assert!(redrive(&[]).unwrap().only_shows());
        assert!(redrive(&["--list", "--limit", "3"]).unwrap().only_shows());
        let queue = ["--queue", "https://sqs/1/input"];
        assert!(
            !redrive(&[&queue[..], &["--all"]].concat())
                .unwrap()
                .only_shows()
        );
        let through = redrive(&["--all", "--intake", "intake"]).unwrap();
        assert!(through.queue.is_none() && !through.only_shows());
        for (options, words) in [
            (&["--all"][..], "--queue URL or --intake"),
            (
                &["--all", "--intake", "intake", "--delete", "--yes"],
                "cannot be used with",
            ),
            (&["--all", "--ids", "x"], "cannot be used with"),
            (
                &["--all", "--queue", "https://sqs/1/dead"],
                "dead-letter queue itself",
            ),
            (&["--delete", "--yes"], "needs a choice"),
            (&["--all", "--delete"], "--yes"),
            (&["--reason", "("], "regular expression"),
            (&["--ids", "a,,b", "--delete", "--yes"], "empty id"),
        ] {
            let problem = redrive(options).unwrap_err().to_string();
            assert!(problem.contains(words), "{words} in {problem}");
        }
    }
}
