//! What a job costs and takes, by lane, beside what it costs elsewhere: the
//! planner's own comparison for a backlog of one burst, and list prices.

use std::fmt::Write;

use anyhow::{Context, bail};
use planner::lane::{Choice, Estimate};
use planner::observation::{Group, Lane, LaneState, Queue};
use planner::{CapacityOption, LanePolicy, Observation, Policy, plan};
use serde_json::{Value, json};

use crate::cli::EstimateArgs;
use crate::units;

/// What a model takes where nobody has measured it: estimates, to be replaced
/// with the dashboard's figures by the options.
struct Speeds {
    model: &'static str,
    /// Seconds of the model for an image in the lane, and the function's memory.
    lane: (f64, u32),
    /// Images per second of a g4dn.xlarge.
    gpu: f64,
    /// Numbers of a vector.
    dimensions: f64,
}

/// Lane: fp32 on AVX2, of `BENCHMARKS.md`'s machine, for one vCPU (L/14: two);
/// GPU: the template's default, and the lower ends of published T4 figures.
const SPEEDS: [Speeds; 3] = [
    Speeds {
        model: "ViT-B/32",
        lane: (0.1, 1_769),
        gpu: 60.0,
        dimensions: 512.0,
    },
    Speeds {
        model: "ViT-B/16",
        lane: (0.42, 1_769),
        gpu: 60.0,
        dimensions: 512.0,
    },
    Speeds {
        model: "ViT-L/14",
        lane: (1.07, 3_008),
        gpu: 40.0,
        dimensions: 768.0,
    },
];

/// Billed seconds of an invocation for its transfers, side by side: twice what S3
/// takes for a small object.
const TRANSFER_SECONDS: f64 = 0.3;

/// Characters of a number in a vector's JSON, and bytes of an image's log lines
/// and metrics.
const NUMBER_BYTES: f64 = 12.0;
const LOG_BYTES: f64 = 400.0;

const GB: f64 = 1e9;
const HOURS_PER_MONTH: f64 = 730.0;

/// Messages of one request to SQS, in a backlog.
const BATCH: f64 = 10.0;

/// One item of the bill.
struct Item {
    name: &'static str,
    usd: f64,
}

/// Reads the arguments and tells the result.
pub fn run(args: &EstimateArgs) -> anyhow::Result<String> {
    let result = estimate(args)?;
    Ok(match args.json {
        true => serde_json::to_string_pretty(&result)?,
        false => table(args, &result),
    })
}

fn estimate(args: &EstimateArgs) -> anyhow::Result<Value> {
    let speeds = SPEEDS.iter().find(|speeds| speeds.model == args.model);
    let speeds = speeds.with_context(|| {
        let known: Vec<&str> = SPEEDS.iter().map(|speeds| speeds.model).collect();
        format!("--model {} is none of {}", args.model, known.join(", "))
    })?;
    if args.bursts > args.images {
        bail!(
            "--bursts {} is more than --images {}",
            args.bursts,
            args.images
        );
    }
    let hour = args
        .usd_per_hour
        .or_else(|| prices::find(&format!("instanceHour.{}", args.instance_type)));
    let hour = hour.with_context(|| {
        format!(
            "no price of {} is known: give --usd-per-hour",
            args.instance_type
        )
    })?;
    let per_burst = args.images.div_ceil(args.bursts);
    let batch_size = per_burst.min(10) as u32;
    let transfers = TRANSFER_SECONDS / f64::from(batch_size);
    let lane_seconds = args.lane_seconds.unwrap_or(speeds.lane.0 + transfers);
    let mut option = CapacityOption::of_group("gpu");
    option.usd_per_hour = Some(hour);
    let policy = Policy {
        max_instances: args.max_instances,
        target_drain_seconds: args.target_drain_seconds,
        images_per_second: args.images_per_second.unwrap_or(speeds.gpu),
        options: vec![option],
        lane: Some(LanePolicy {
            max_concurrency: args.lane_concurrency,
            memory_mb: speeds.lane.1,
            batch_size,
            seconds_per_image: lane_seconds,
            usd_per_gb_second: prices::usd("lambdaGbSecond"),
            usd_per_request: prices::usd("lambdaRequest"),
        }),
        ..Policy::default()
    };
    let compare = |state| {
        let seen = Observation {
            queue: Queue {
                visible: per_burst,
                ..Queue::default()
            },
            groups: vec![Group {
                name: "gpu".to_owned(),
                max: args.max_instances,
                ..Group::default()
            }],
            lane: Some(Lane {
                state,
                ..Lane::default()
            }),
            ..Observation::default()
        };
        let figures = plan(&seen, &policy).figures;
        figures.comparison.context("the planner compared nothing")
    };
    let comparison = compare(LaneState::Open)?;
    // Without a lane that has to be closed first.
    let gpus = compare(LaneState::Closed)?.gpus;
    let way = |name: &str, choice: Choice, estimate: &Estimate| {
        json!({
            "way": name,
            "isChosen": comparison.choice == choice,
            "usd": estimate.dollars * args.bursts as f64,
            "secondsPerBurst": estimate.seconds,
            "instancesPerBurst": estimate.starts,
        })
    };
    let besides: Vec<Value> = besides(args, speeds)
        .iter()
        .map(|item| json!({"name": item.name, "usd": item.usd}))
        .collect();
    Ok(json!({
        "images": args.images,
        "bursts": args.bursts,
        "model": args.model,
        "compute": [
            way("lane alone", Choice::Lane, &comparison.lane),
            way("lane, then GPUs", Choice::Both, &comparison.both),
            way("GPUs alone", Choice::Gpus, &gpus),
        ],
        "why": comparison.why,
        "besides": besides,
        "bedrockTitanUsd": args.images as f64 * prices::usd("bedrockTitanImage"),
        "region": prices::all().region,
        "prices": prices::all().prices,
    }))
}

/// What costs the same whoever embeds.
fn besides(args: &EstimateArgs, speeds: &Speeds) -> Vec<Item> {
    let images = args.images as f64;
    let bytes = images * args.size as f64;
    let vector = speeds.dimensions * NUMBER_BYTES;
    let alone = args.images == args.bursts;
    // Sent one by one; received and deleted in batches when there is a backlog.
    let requests = images * (1.0 + 2.0 / if alone { 1.0 } else { BATCH });
    let mut items = vec![
        Item {
            name: "requests: SQS, S3, EventBridge",
            usd: requests * prices::usd("sqsRequest")
                + images
                    * (prices::usd("s3Get")
                        + prices::usd("s3Put")
                        + prices::usd("eventBridgeEvent")),
        },
        Item {
            name: "vectors in S3, a month",
            usd: images * vector / GB * prices::usd("s3GbMonth"),
        },
        Item {
            name: "logs and metrics",
            usd: images * LOG_BYTES / GB * prices::usd("logsGb"),
        },
    ];
    if args.nat {
        items.push(Item {
            name: "NAT gateway, a month, and the images through it",
            usd: HOURS_PER_MONTH * prices::usd("natHour") + bytes / GB * prices::usd("natGb"),
        });
    }
    items
}

fn table(args: &EstimateArgs, result: &Value) -> String {
    let usd = |value: &Value| value.as_f64().unwrap_or(0.0);
    let list = |name: &str| result[name].as_array().cloned().unwrap_or_default();
    let mut text = format!(
        "{} images of {}, {}; bursts: {}\n\n{:<18}{:>12}{:>16}{:>12}\n",
        units::count(args.images),
        units::bytes(args.size),
        args.model,
        units::count(args.bursts),
        "compute",
        "USD",
        "a burst takes",
        "instances"
    );
    // Writing to a String cannot fail.
    for way in list("compute") {
        let chosen = way["isChosen"].as_bool().unwrap_or(false);
        let _ = writeln!(
            text,
            "{:<18}{:>12.4}{:>14.0} s{:>12}{}",
            way["way"].as_str().unwrap_or_default(),
            usd(&way["usd"]),
            usd(&way["secondsPerBurst"]),
            way["instancesPerBurst"].as_u64().unwrap_or(0),
            if chosen { "  ← chosen: " } else { "" }.to_owned()
                + if chosen {
                    result["why"].as_str().unwrap_or_default()
                } else {
                    ""
                },
        );
    }
    let _ = writeln!(text, "\nbesides, in every case");
    for item in list("besides") {
        let name = item["name"].as_str().unwrap_or_default();
        let _ = writeln!(text, "{name:<50}{:>10.4}", usd(&item["usd"]));
    }
    let _ = writeln!(
        text,
        "\n{:<50}{:>10.4}\n\nlist prices of {}, without free tiers:",
        "Bedrock, Titan Multimodal Embeddings G1",
        usd(&result["bedrockTitanUsd"]),
        prices::all().region
    );
    for (name, price) in &prices::all().prices {
        let _ = writeln!(
            text,
            "  {name:<26}{:>14} a {} ({}, {})",
            price.usd, price.per, price.source, price.date
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn estimated(options: &[&str]) -> anyhow::Result<Value> {
        let all = ["clip-ops", "estimate"].iter().chain(options);
        match Cli::try_parse_from(all)?.command {
            Command::Estimate(args) => estimate(&args),
            _ => bail!("not an estimate"),
        }
    }

    fn chosen(result: &Value) -> &Value {
        let ways = result["compute"].as_array().expect("a list");
        ways.iter()
            .find(|way| way["isChosen"] == true)
            .expect("one is chosen")
    }

    #[test]
    fn few_images_are_the_lanes_and_many_the_gpus() {
        let few = estimated(&["--images", "1000"]).expect("an estimate");
        assert_eq!(chosen(&few)["way"], "lane alone");
        let bedrock = few["bedrockTitanUsd"].as_f64().expect("a number");
        assert!((bedrock - 0.06).abs() < 1e-9);
        let many = estimated(&["--images", "1000000"]).expect("an estimate");
        assert_ne!(chosen(&many)["way"], "lane alone");
        assert!(chosen(&many)["usd"].as_f64() < many["bedrockTitanUsd"].as_f64());
        let gpus = &few["compute"][2];
        assert_eq!(gpus["instancesPerBurst"], 1);
        // The same number in a thousand bursts wakes nobody.
        let spread = estimated(&["--images", "1000000", "--bursts", "1000"]).expect("an estimate");
        assert_eq!(chosen(&spread)["way"], "lane alone");
    }

    #[test]
    fn the_table_names_each_price_with_its_source() {
        let Command::Estimate(args) =
            Cli::parse_from(["clip-ops", "estimate", "--images", "5", "--nat"]).command
        else {
            panic!("not an estimate");
        };
        let text = run(&args).expect("a table");
        for words in [
            "← chosen",
            "NAT gateway",
            "Bedrock",
            "Amazon SQS pricing, 20",
        ] {
            assert!(text.contains(words), "{words} in {text}");
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for (options, words) in [
            (
                &["--images", "5", "--bursts", "6"][..],
                "more than --images",
            ),
            (&["--images", "5", "--model", "ViT-H"], "none of"),
            (
                &["--images", "5", "--instance-type", "x9"],
                "--usd-per-hour",
            ),
        ] {
            let problem = estimated(options).expect_err(words).to_string();
            assert!(problem.contains(words), "{problem}");
        }
    }
}
