//! `clip-ops`, the operator's commands: wires the clients and tells the results.
//!
//! - [`backfill`] puts what lies in a bucket already onto the input queue, as
//!   the S3 trigger would have when the objects came;
//! - [`redrive`] shows the dead-letter queue with its reasons and sends chosen
//!   messages back;
//! - [`doctor`] looks whether an account has what a deployment needs.
//!
//! The first two know the queues, the buckets and the event; neither knows images.

mod backfill;
mod cli;
mod doctor;
mod estimate;
mod redrive;
mod stop;
mod table;
mod units;

use std::process::ExitCode;
use std::time::Duration;

use aws_config::SdkConfig;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use clap::{CommandFactory, Parser};
use delivery::Outputs;
use platform::Failure;
use serde_json::json;
use tokio::time::Instant;

use crate::backfill::{
    BackfillError, Checkpoint, CheckpointFile, Display, End, Heads, Inventory, Job, Listing,
    MAX_TABLE, Progress, Scaler, Source, Table, TokenBucket, Unknown, Vectors, Waker, Walk,
    read_checkpoint,
};
use crate::cli::{BackfillArgs, Cli, Command, DoctorArgs, EmbeddedCheck, RedriveArgs};
use crate::doctor::Verdict;
use crate::redrive::{Action, Choice, Counts, Intake, SqsQueues, WayBack, table};
use crate::stop::Stop;

/// Tries of one call. A walk of hours meets every kind of weather.
const MAX_ATTEMPTS: u32 = 8;

/// One try of a call to S3. Listing a bucket that is full of delete markers
/// takes its time.
const S3_CALL_TIMEOUT: Duration = Duration::from_secs(60);

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let checked = match &cli.command {
        Command::Backfill(args) => args.check(),
        Command::Redrive(args) => args.check(),
        Command::Estimate(args) => {
            return match estimate::run(args) {
                Ok(text) => {
                    println!("{text}");
                    ExitCode::SUCCESS
                }
                Err(problem) => {
                    eprintln!("clip-ops: {problem}");
                    ExitCode::from(2)
                }
            };
        }
        Command::Doctor(_) => Ok(()),
    };
    if let Err(problem) = checked {
        Cli::command()
            .error(clap::error::ErrorKind::ValueValidation, problem)
            .exit();
    }
    platform::init_logs("clip-ops");
    let sdk = platform::aws_config().await;
    if sdk.region().is_none() {
        eprintln!("clip-ops: no region: set AWS_REGION, or a profile that has one");
        return ExitCode::FAILURE;
    }
    let sdk = sdk
        .to_builder()
        .retry_config(RetryConfig::standard().with_max_attempts(MAX_ATTEMPTS))
        .build();
    let stop = match Stop::on_signals() {
        Ok(stop) => stop,
        Err(problem) => {
            eprintln!("clip-ops: signals cannot be listened for: {problem}");
            return ExitCode::FAILURE;
        }
    };
    match cli.command {
        Command::Backfill(args) => run_backfill(&args, &sdk, &stop).await,
        Command::Redrive(args) => run_redrive(&args, &sdk, &stop).await,
        // Told before AWS was asked for anything.
        Command::Estimate(_) => ExitCode::SUCCESS,
        Command::Doctor(args) => run_doctor(&args, &sdk, &stop).await,
    }
}

async fn run_backfill(args: &BackfillArgs, sdk: &SdkConfig, stop: &Stop) -> ExitCode {
    let job = args.job();
    let (checkpoint, mut state) = match open_checkpoint(args, &job) {
        Ok(opened) => opened,
        Err(problem) => return fail(&problem, args),
    };
    if state.complete {
        eprintln!("this backfill is complete already; to walk again, remove its checkpoint");
        tell(args, "complete", &state);
        return ExitCode::SUCCESS;
    }
    let display = Display::new();
    if state.counts.listed > 0 {
        display.note(&format!("going on: {}", state.counts.line()));
    }
    if !state.in_doubt.is_empty() {
        display.note(&format!(
            "{} events may be in the queue already, since the run that sent them ended before it \
             knew: they are sent again, with the same ids",
            state.in_doubt.len()
        ));
    }
    let end = walk(
        args,
        &job,
        sdk,
        stop,
        checkpoint.as_ref(),
        &mut state,
        &display,
    )
    .await;
    display.finish();
    match end {
        Ok(End::Complete) => {
            tell(
                args,
                if args.dry_run { "dry-run" } else { "complete" },
                &state,
            );
            ExitCode::SUCCESS
        }
        Ok(End::Stopped) => {
            tell(args, "stopped", &state);
            eprintln!("stopped; {}", how_to_go_on(args));
            ExitCode::from(stop.exit_code())
        }
        Err(problem) => fail(&problem, args),
    }
}

fn open_checkpoint(
    args: &BackfillArgs,
    job: &Job,
) -> Result<(Option<CheckpointFile>, Checkpoint), BackfillError> {
    match &args.checkpoint {
        None => Ok((None, Checkpoint::default())),
        // A dry run tells what is left to do, and writes nothing.
        Some(path) if args.dry_run => Ok((None, read_checkpoint(path, job)?)),
        Some(path) => {
            let (file, state) = CheckpointFile::open(path, job)?;
            Ok((Some(file), state))
        }
    }
}

async fn walk(
    args: &BackfillArgs,
    job: &Job,
    sdk: &SdkConfig,
    stop: &Stop,
    checkpoint: Option<&CheckpointFile>,
    state: &mut Checkpoint,
    display: &Display,
) -> Result<End, BackfillError> {
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_secs(3))
        .operation_attempt_timeout(S3_CALL_TIMEOUT)
        .build();
    let s3 = platform::s3_client(&sdk.to_builder().timeout_config(timeouts).build());
    // Nothing is changed before the walk, so a stop needs no care.
    let prepared = tokio::select! {
        () = stop.token.cancelled() => return Ok(End::Stopped),
        prepared = prepare(args, job, &s3, state, display) => prepared?,
    };
    let (vectors, mut source) = prepared;
    let queue = Outputs::to_queue(&job.queue, sdk);
    let scaler = args.wake_scaler.as_ref().map(|function| Scaler {
        lambda: aws_sdk_lambda::Client::new(&delivery::with_call_timeout(sdk)),
        function: function.clone(),
    });
    let walk = Walk {
        job,
        source: source.as_mut(),
        vectors: vectors.as_ref(),
        queue: (!args.dry_run).then_some(&queue),
        waker: scaler.as_ref().map(|scaler| scaler as &dyn Waker),
        rate: TokenBucket::new(args.rate, Instant::now()),
        checkpoint,
        progress: display,
        stop: &stop.token,
    };
    walk.run(state).await
}

/// Finds out which vectors exist, and opens the source where the walk goes on.
async fn prepare(
    args: &BackfillArgs,
    job: &Job,
    s3: &aws_sdk_s3::Client,
    state: &Checkpoint,
    display: &Display,
) -> Result<(Box<dyn Vectors>, Box<dyn Source>), BackfillError> {
    let heads = || Heads {
        s3: s3.clone(),
        bucket: job.cache_bucket.clone(),
    };
    let vectors: Box<dyn Vectors> = match args.embedded_check {
        EmbeddedCheck::Off => Box::new(Unknown),
        EmbeddedCheck::Head => Box::new(heads()),
        EmbeddedCheck::List => {
            display.step("listing the cache");
            match Table::list(s3, &job.cache_bucket, &job.cache_prefix, MAX_TABLE).await? {
                Some(table) => {
                    let vectors = units::count(table.len() as u64);
                    display.note(&format!("{vectors} vectors in the cache"));
                    Box::new(table)
                }
                None => {
                    display.note(&format!(
                        "the cache has more than {} vectors: each object is asked for instead",
                        units::count(MAX_TABLE as u64)
                    ));
                    Box::new(heads())
                }
            }
        }
    };
    let position = state.position.as_ref();
    let source: Box<dyn Source> = match &args.manifest {
        None => Box::new(Listing::new(s3.clone(), job, position)),
        Some(manifest) => {
            let (bucket, key) = (&manifest.bucket, &manifest.rest);
            Box::new(Inventory::open(s3.clone(), bucket, key, job, position).await?)
        }
    };
    Ok((vectors, source))
}

fn tell(args: &BackfillArgs, outcome: &str, state: &Checkpoint) {
    if args.json {
        println!("{}", json!({ "outcome": outcome, "counts": state.counts }));
    } else {
        println!("{outcome}");
        print!("{}", state.counts.table(args.dry_run));
    }
}

fn how_to_go_on(args: &BackfillArgs) -> String {
    match &args.checkpoint {
        _ if args.dry_run => "nothing was sent".to_owned(),
        Some(path) => format!("the same command goes on where {} says", path.display()),
        None => "without --checkpoint the same command begins again, and sends again what has no \
                 vector by then"
            .to_owned(),
    }
}

fn fail(problem: &BackfillError, args: &BackfillArgs) -> ExitCode {
    eprintln!("clip-ops: {problem}");
    if problem.failure() == Failure::Transient {
        eprintln!("clip-ops: {}", how_to_go_on(args));
    }
    ExitCode::FAILURE
}

async fn run_redrive(args: &RedriveArgs, sdk: &SdkConfig, stop: &Stop) -> ExitCode {
    let choice = match &args.reason {
        Some(reason) => Choice::Reason(reason.clone()),
        None if args.ids.is_empty() => Choice::All,
        None => Choice::Ids(args.ids.clone()),
    };
    let action = if args.only_shows() || args.dry_run {
        Action::Show
    } else if args.delete {
        Action::Discard
    } else {
        Action::SendBack
    };
    let back = match (&args.intake, &args.queue) {
        (Some(function), _) => WayBack::Intake(Intake::new(sdk, function)),
        (None, Some(queue)) => WayBack::Queue(queue.clone()),
        (None, None) => WayBack::None,
    };
    let queues = SqsQueues::new(sdk, &args.dead_letter_queue, back);
    let report = redrive::run(&queues, &choice, action, args.limit, &stop.token).await;
    if args.json {
        let result = json!({
            "messages": report.chosen,
            "counts": report.counts,
            "problems": report.problems,
        });
        println!("{result:#}");
    } else {
        if !report.chosen.is_empty() {
            print!("{}", table(&report.chosen));
        }
        println!("{}", summary(action, &report.counts));
    }
    for problem in &report.problems {
        eprintln!("clip-ops: {problem}");
    }
    if let Some(error) = &report.error {
        eprintln!("clip-ops: {error}");
        return ExitCode::FAILURE;
    }
    if report.is_stopped {
        eprintln!("stopped; what is not named above was not looked at");
        return ExitCode::from(stop.exit_code());
    }
    if report.counts.failed > 0 {
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn summary(action: Action, counts: &Counts) -> String {
    let parts = [
        (true, counts.seen, "seen"),
        (true, counts.chosen, "chosen"),
        (action == Action::SendBack, counts.sent, "sent back"),
        (action == Action::Discard, counts.deleted, "discarded"),
        (counts.cut > 0, counts.cut, "stay, they are not whole"),
        (counts.failed > 0, counts.failed, "failed"),
    ];
    let told = parts.into_iter().filter(|(is_told, ..)| *is_told);
    let told: Vec<String> = told
        .map(|(_, number, what)| format!("{} {what}", units::count(number)))
        .collect();
    told.join(", ")
}

async fn run_doctor(args: &DoctorArgs, sdk: &SdkConfig, stop: &Stop) -> ExitCode {
    let report = tokio::select! {
        () = stop.token.cancelled() => return ExitCode::from(stop.exit_code()),
        report = doctor::examine(args, sdk) => report,
    };
    let report = match report {
        Ok(report) => report,
        Err(problem) => {
            eprintln!("clip-ops: {problem:#}");
            return ExitCode::FAILURE;
        }
    };
    if args.json {
        println!("{:#}", json!(report));
    } else {
        print!("{}", report.table());
        println!(
            "{} passed, {} failed, {} cannot be told",
            report.count(Verdict::Pass),
            report.count(Verdict::Fail),
            report.count(Verdict::CannotTell)
        );
    }
    match report.has_failed() {
        true => ExitCode::FAILURE,
        false => ExitCode::SUCCESS,
    }
}
