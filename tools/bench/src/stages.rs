//! What the worker said of its own stages: its metrics, read from its output.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

/// The worker's stages, in the order in which an image passes them.
const STAGES: [&str; 8] = [
    "receive",
    "download",
    "decode",
    "batch",
    "infer",
    "store",
    "publish",
    "acknowledge",
];

#[derive(Clone, Debug, Serialize)]
pub struct StageFigures {
    pub stage: &'static str,
    /// Pieces of work: requests, images or batches.
    pub done: u64,
    /// Time at work, all of the stage's workers together.
    pub busy_seconds: f64,
    /// Workers at work on average, from start to last deletion.
    pub workers_busy: f64,
    /// Pieces that waited for the stage when the metrics were written: mean.
    pub mean_waiting: f64,
    /// Median over the metrics' samples.
    pub median_ms: f64,
}

#[derive(Default)]
struct Sum {
    done: f64,
    busy_ms: f64,
    waiting: Vec<f64>,
    latencies: Vec<f64>,
}

/// Reads the metrics (CloudWatch's embedded format, a JSON line each) from the
/// worker's output; `seconds` is how long it ran.
pub fn read(output: &Path, seconds: f64) -> Result<Vec<StageFigures>> {
    let text = std::fs::read_to_string(output).with_context(|| output.display().to_string())?;
    Ok(summarise(&text, seconds))
}

fn summarise(output: &str, seconds: f64) -> Vec<StageFigures> {
    let mut sums: BTreeMap<String, Sum> = BTreeMap::new();
    for line in output.lines() {
        let Ok(line) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let (Some(stage), Some(done)) = (line["Stage"].as_str(), line["Done"].as_f64()) else {
            continue;
        };
        let sum = sums.entry(stage.to_owned()).or_default();
        sum.done += done;
        sum.busy_ms += line["BusyTime"].as_f64().unwrap_or_default();
        sum.waiting
            .push(line["QueueLength"].as_f64().unwrap_or_default());
        match &line["Latency"] {
            Value::Array(values) => sum
                .latencies
                .extend(values.iter().filter_map(Value::as_f64)),
            one => sum.latencies.extend(one.as_f64()),
        }
    }
    STAGES
        .into_iter()
        .filter_map(|stage| {
            let mut sum = sums.remove(stage)?;
            sum.latencies.sort_by(f64::total_cmp);
            let middle = sum.latencies.len() / 2;
            Some(StageFigures {
                stage,
                done: sum.done as u64,
                busy_seconds: sum.busy_ms / 1e3,
                workers_busy: sum.busy_ms / 1e3 / seconds,
                mean_waiting: sum.waiting.iter().sum::<f64>() / sum.waiting.len() as f64,
                median_ms: sum.latencies.get(middle).copied().unwrap_or_default(),
            })
        })
        .collect()
}

pub fn print(stages: &[StageFigures]) {
    println!("  stage        done   busy, s  workers busy  waiting  median, ms");
    for one in stages {
        println!(
            "  {:<11} {:>6} {:>9.1} {:>13.2} {:>8.1} {:>11.1}",
            one.stage,
            one.done,
            one.busy_seconds,
            one.workers_busy,
            one.mean_waiting,
            one.median_ms
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_all_intervals_are_added_up_and_log_lines_are_not_figures() {
        let output = r#"{"level":"INFO","message":"started"}
{"Stage":"infer","Done":3,"BusyTime":1500.0,"QueueLength":4,"Latency":[500.0,400.0,600.0]}
not JSON
{"Stage":"infer","Done":1,"BusyTime":500.0,"QueueLength":0,"Latency":500.0}
{"Stage":"infer","Cause":"damaged","Failures":1}"#;
        let stages = summarise(output, 4.0);
        assert_eq!(stages.len(), 1);
        let infer = &stages[0];
        assert_eq!((infer.stage, infer.done), ("infer", 4));
        assert_eq!(
            (infer.busy_seconds, infer.workers_busy, infer.mean_waiting),
            (2.0, 0.5, 2.0)
        );
        assert_eq!(infer.median_ms, 500.0);
    }
}
