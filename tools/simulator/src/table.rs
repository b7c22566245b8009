//! Tables for people.

use std::fmt::Write;

use crate::evaluate::{Comparison, INSTANCE, Verdict};
use crate::tally::Averages;

fn seconds(value: Option<f64>) -> String {
    value.map_or_else(|| "–".to_owned(), |value| format!("{value:.1}"))
}

pub fn comparison(comparison: &Comparison) -> String {
    let mut text = String::new();
    let trace = &comparison.trace;
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "{}: {} ({} images)\n",
        trace.name,
        trace.about,
        trace.images()
    );
    let _ = writeln!(
        text,
        "{:<22}{:>10}{:>10}{:>10}{:>10}{:>12}{:>9}{:>9}{:>9}{:>11}{:>9}",
        "",
        "GPU-hours",
        "USD",
        "of lane",
        "of idle",
        "1st vector",
        "p50",
        "p95",
        "p99",
        "idle GPU s",
        "started"
    );
    for row in &comparison.rows {
        let Averages {
            gpu_hours,
            dollars: [_, lane, idle],
            first_vector,
            p50,
            p95,
            p99,
            idle_seconds,
            instances_started,
            ..
        } = row.averages;
        let _ = writeln!(
            text,
            "{:<22}{gpu_hours:>10.4}{:>10.4}{lane:>10.4}{idle:>10.4}{:>12}{:>9}{:>9}{:>9}{idle_seconds:>11.0}{instances_started:>9.1}",
            row.model,
            row.averages.total(),
            seconds(first_vector),
            seconds(p50),
            seconds(p95),
            seconds(p99),
        );
    }
    let oracle_hours = comparison.oracle.gpu_seconds / 3600.0;
    let _ = writeln!(
        text,
        "{:<22}{oracle_hours:>10.4}{:>10.4}{:>79}{:>9.1}",
        "(d) oracle, at least",
        oracle_hours * prices::usd(INSTANCE),
        "",
        comparison.oracle.starts,
    );
    let _ = writeln!(
        text,
        "{:<22}{:>10}{:>10.4}",
        "… with a lane", "", comparison.oracle_of_two
    );
    text
}

/// Requirements with pass or fail. The second value: whether all hold.
pub fn verdicts(verdicts: &[Verdict]) -> (String, bool) {
    let mut text = String::new();
    let width = verdicts
        .iter()
        .map(|verdict| verdict.what.chars().count())
        .max()
        .unwrap_or(0);
    for verdict in verdicts {
        let mark = if verdict.holds { "pass" } else { "FAIL" };
        let _ = writeln!(
            text,
            "{mark}  {:<width$}  {}",
            verdict.what, verdict.numbers
        );
    }
    let all_hold = verdicts.iter().all(|verdict| verdict.holds);
    (text, all_hold)
}
