//! When images arrive.

use std::path::Path;

use crate::world::Ms;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    pub name: String,
    pub about: String,
    /// Time and number, in order.
    pub arrivals: Vec<(Ms, u64)>,
}

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("cannot read {path}: {source}")]
    Read {
        path: String,
        source: std::io::Error,
    },
    #[error("{path}, line {line}: {text:?} is not `seconds` or `seconds,count`")]
    Line {
        path: String,
        line: usize,
        text: String,
    },
    #[error("there is no trace {0:?}: {NAMES}, or a CSV file of arrivals")]
    Unknown(String),
}

pub const NAMES: &str = "one, hundred, ten-thousand, steady, bursts, day, backfill";

/// Peak of the day's curve, images per second.
const DAY_PEAK: f64 = 2.0;

/// Images in the night, one in this many seconds.
const NIGHT_GAP_SECONDS: f64 = 1800.0;

/// Bursts per hour of the Poisson trace, and the mean number of images of one.
const BURSTS_PER_HOUR: f64 = 2.0;
const BURST_MEAN: f64 = 200.0;

const HOUR: f64 = 3_600_000.0;

impl Trace {
    pub fn all() -> Vec<Self> {
        NAMES
            .split(", ")
            .filter_map(|name| Self::named(name).ok())
            .collect()
    }

    pub fn named(name: &str) -> Result<Self, TraceError> {
        let at_once = |count: u64| vec![(0, count)];
        let (about, arrivals) = match name {
            "one" => ("one image", at_once(1)),
            "hundred" => ("100 images at once", at_once(100)),
            "ten-thousand" => ("10,000 images at once", at_once(10_000)),
            "backfill" => ("1,000,000 images at once", at_once(1_000_000)),
            "steady" => ("one image a second for two hours", steady(5)),
            "bursts" => (
                "a day of Poisson bursts, two an hour, 200 images on average",
                poisson_bursts(11),
            ),
            "day" => (
                "a day: up to 2 images/s in the afternoon, two an hour at night",
                daily_curve(7),
            ),
            other => return Err(TraceError::Unknown(other.to_owned())),
        };
        Ok(Self {
            name: name.to_owned(),
            about: about.to_owned(),
            arrivals,
        })
    }

    /// A built-in trace, or a CSV file of `seconds[,count]` lines.
    pub fn load(name_or_path: &str) -> Result<Self, TraceError> {
        if !Path::new(name_or_path).is_file() {
            return Self::named(name_or_path);
        }
        let text = std::fs::read_to_string(name_or_path).map_err(|source| TraceError::Read {
            path: name_or_path.to_owned(),
            source,
        })?;
        let name = Path::new(name_or_path).file_stem().map_or_else(
            || "csv".to_owned(),
            |stem| stem.to_string_lossy().into_owned(),
        );
        Ok(Self {
            name,
            about: format!("arrivals from {name_or_path}"),
            arrivals: parse_csv(name_or_path, &text)?,
        })
    }

    pub fn images(&self) -> u64 {
        self.arrivals.iter().map(|(_, count)| count).sum()
    }

    pub fn end(&self) -> Ms {
        self.arrivals.last().map_or(0, |(at, _)| *at)
    }
}

fn parse_csv(path: &str, text: &str) -> Result<Vec<(Ms, u64)>, TraceError> {
    let mut arrivals = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut fields = line.split(',').map(str::trim);
        let seconds = fields.next().and_then(|field| field.parse::<f64>().ok());
        let count = fields
            .next()
            .map_or(Some(1), |field| field.parse::<u64>().ok());
        match (seconds, count) {
            (Some(seconds), Some(count)) if seconds.is_finite() && seconds >= 0.0 => {
                if count > 0 {
                    arrivals.push(((seconds * 1000.0) as Ms, count));
                }
            }
            // A first line of words is a header.
            (None, _) if index == 0 => {}
            _ => {
                return Err(TraceError::Line {
                    path: path.to_owned(),
                    line: index + 1,
                    text: line.to_owned(),
                });
            }
        }
    }
    arrivals.sort_unstable();
    Ok(arrivals)
}

/// Exponentially distributed with the given mean.
pub fn exponential(rng: &mut fastrand::Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.f64()).ln()
}

/// One image in every second, somewhere in it: exactly on the second it would
/// beat with the pollers' clocks.
fn steady(seed: u64) -> Vec<(Ms, u64)> {
    let mut rng = fastrand::Rng::with_seed(seed);
    (0..7200)
        .map(|second| (second * 1000 + rng.i64(0..1000), 1))
        .collect()
}

fn poisson_bursts(seed: u64) -> Vec<(Ms, u64)> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut arrivals = Vec::new();
    let mut at = 0.0;
    loop {
        at += exponential(&mut rng, HOUR / BURSTS_PER_HOUR);
        if at >= 24.0 * HOUR {
            return arrivals;
        }
        let images = exponential(&mut rng, BURST_MEAN).ceil().max(1.0);
        arrivals.push((at as Ms, images as u64));
    }
}

fn daily_curve(seed: u64) -> Vec<(Ms, u64)> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut arrivals = Vec::new();
    let mut at = 0.0;
    // Thinning: candidates at the peak rate, kept with the curve's share.
    loop {
        at += exponential(&mut rng, 1000.0 / DAY_PEAK);
        if at >= 24.0 * HOUR {
            return arrivals;
        }
        let hour = at / HOUR;
        // Working hours, 8 to 20, as one smooth hill.
        let hill = if (8.0..20.0).contains(&hour) {
            ((hour - 8.0) / 12.0 * std::f64::consts::PI).sin().powi(2)
        } else {
            0.0
        };
        let rate = hill * DAY_PEAK + 1.0 / NIGHT_GAP_SECONDS;
        if rng.f64() < rate / DAY_PEAK {
            arrivals.push((at as Ms, 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_a_trace_in_order() {
        let traces = Trace::all();
        assert_eq!(traces.len(), 7);
        for trace in traces {
            assert!(trace.images() > 0, "{}", trace.name);
            assert!(trace.arrivals.is_sorted(), "{}", trace.name);
        }
    }

    #[test]
    fn csv_takes_a_header_counts_and_comments() {
        let text = "seconds,count\n# night\n5,3\n1.5\n\n9,0\n";
        let arrivals = parse_csv("x.csv", text).expect("valid");
        assert_eq!(arrivals, [(1500, 1), (5000, 3)]);
        let error = parse_csv("x.csv", "1,2\nsoon\n")
            .expect_err("a word")
            .to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}
