//! The Lambda's entry (also `bootstrap` of the custom runtime), and
//! `scaler explain` for people.

use std::process::ExitCode;

use lambda_runtime::{Error, LambdaEvent, service_fn};
use planner::explain::{read_record, render};
use planner::{Policy, plan};
use platform::env::Reader;
use scaler::SdkAws;
use scaler::config::{Config, read_policy};
use scaler::handler::{Cause, log, metric_line, run};
use serde_json::{Value, json};

const HELP: &str = "\
Decides how many GPU instances and tasks the backlog needs, and acts on it.

Usage:
  scaler                        run as a Lambda (AWS_LAMBDA_RUNTIME_API is set by the runtime)
  scaler explain FILE [--json]  print the plan for a recorded observation (- reads standard input)
  scaler observe                look at AWS, change nothing, print observation and policy as JSON
  scaler --help | --version

FILE is a log line of the scaler, or its `observation` alone; then the policy comes from the environment, if it is
set, or is the default one with one option per Auto Scaling group in the observation.

Environment:
  INPUT_QUEUE_URL       queue whose backlog counts                         required
  ECS_CLUSTER           name or ARN of the cluster                         required
  TASK_DEFINITION       family, family:revision or ARN of the task         required
  CAPACITY_OPTIONS      JSON list, best first: [{\"name\":…,\"autoScalingGroup\":…,\"instanceType\":…}]  required
  MAX_INSTANCES         never more instances, over all options             5
  MIN_INSTANCES         never fewer instances                              0
  TARGET_DRAIN_SECONDS  a backlog is drained within this, once tasks work  45
  IDLE_GRACE_SECONDS    an instance without work for this long goes        30
  IDLE_EXIT_SECONDS     how long a task waits for work before it exits
                        with 0; the same value as the task's               30
  BOOT_SECONDS          from asking for an instance to its first vector,
                        until a start was seen                             180
  IMAGES_PER_SECOND     of one task, until tasks report their own          60
  METRICS_NAMESPACE     CloudWatch namespace                               ClipImageProcessor
  PRICE_INSTANCE_HOUR_1 dollars of an hour of the first option; also _2 and _3
  MAX_DAILY_COST        dollars a day (UTC) past which nothing new starts  0: no ceiling

The express lane, if EXPRESS_MAPPING_UUID (from the input queue to its function) is set; then required:
  GPU_QUEUE_URL EXPRESS_FUNCTION_NAME PRICE_EXPRESS_GB_SECOND PRICE_EXPRESS_REQUEST
and by default:
  EXPRESS_MAX_CONCURRENCY=10 EXPRESS_MEMORY_MB=1769 EXPRESS_BATCH_SIZE=10
  EXPRESS_SECONDS_PER_IMAGE=0.2 (billed, in a backlog, until the function reports its own)
";

// One thread: the Lambda has one request at a time and waits for the network.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["-h" | "--help" | "help"] => {
            print!("{HELP}");
            Ok(())
        }
        ["-V" | "--version"] => {
            println!("scaler {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        ["explain", file] => explain(file, false),
        ["explain", file, "--json"] | ["explain", "--json", file] => explain(file, true),
        ["observe"] => observe_only().await,
        [] if std::env::var_os("AWS_LAMBDA_RUNTIME_API").is_some() => serve().await,
        [] => Err("no AWS_LAMBDA_RUNTIME_API: this is a Lambda; try `scaler --help`".into()),
        _ => Err(format!(
            "unknown arguments: {}; try `scaler --help`",
            words.join(" ")
        )
        .into()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("scaler: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn serve() -> Result<(), Error> {
    platform::init_logs("scaler");
    let config = Config::read(&Reader::process())?;
    let aws = SdkAws::new(&platform::aws_config().await, &config);
    let handle = service_fn(|event: LambdaEvent<Value>| {
        let (aws, config) = (&aws, &config);
        async move {
            let cause = Cause::of(&event.payload);
            match run(aws, config, &cause).await {
                Ok(record) => {
                    let since_ms = event.payload["sinceMs"].as_i64();
                    metric_line(&record, since_ms, config).emit();
                    log(&record);
                    Ok(json!({
                        "verdict": record.plan.verdict,
                        "actions": record.plan.decisions.len(),
                        "outcomes": record.outcomes,
                    }))
                }
                Err(error) => {
                    tracing::error!(cause = cause.text(), %error, "nothing was done");
                    // An error, so that Lambda counts it and tries again.
                    Err(Error::from(error))
                }
            }
        }
    });
    lambda_runtime::run(handle).await
}

async fn observe_only() -> Result<(), Error> {
    let config = Config::read(&Reader::process())?;
    let aws = SdkAws::new(&platform::aws_config().await, &config);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64);
    let observation = scaler::observe::observe(&aws, &config.policy, now).await?;
    println!(
        "{}",
        json!({"observation": observation, "policy": config.policy})
    );
    Ok(())
}

fn explain(file: &str, as_json: bool) -> Result<(), Error> {
    let text = if file == "-" {
        std::io::read_to_string(std::io::stdin())
    } else {
        std::fs::read_to_string(file)
    }
    .map_err(|error| format!("cannot read {file}: {error}"))?;
    let record = read_record(&text).map_err(|error| format!("{file}: {error}"))?;
    let policy = match record.policy {
        Some(policy) => policy,
        None if std::env::var_os("CAPACITY_OPTIONS").is_some() => read_policy(&Reader::process())?,
        None => default_policy(&record.observation),
    };
    let plan = plan(&record.observation, &policy);
    if as_json {
        let json = serde_json::to_string_pretty(&plan)?;
        println!("{json}");
    } else {
        print!("{}", render(&record.observation, &policy, &plan));
    }
    Ok(())
}

fn default_policy(observation: &planner::Observation) -> Policy {
    Policy {
        options: observation
            .groups
            .iter()
            .map(|group| planner::CapacityOption::of_group(&group.name))
            .collect(),
        ..Policy::default()
    }
}
