//! What a run cost and how long images waited.

use crate::world::Ms;

/// Latency samples of one piece of work: enough for percentiles, few enough
/// for a million images.
const SAMPLES_PER_PIECE: u64 = 8;

/// What was paid for, and what was not done, from a moment on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment {
    pub at: Ms,
    pub paid: u32,
    pub backlog: u64,
}

#[derive(Clone, Debug, Default)]
pub struct Tally {
    pub arrived: u64,
    pub done: u64,
    /// Milliseconds of instances that were paid for.
    pub paid: Ms,
    /// Of these, before an instance's first task was ready.
    pub booting: Ms,
    /// Of these, with images on the GPU.
    pub busy: Ms,
    pub instance_times: Vec<Ms>,
    pub launch_times: Vec<Ms>,
    /// Most instances at once, those on their way out included.
    pub most_instances: u32,
    pub first_arrival: Option<Ms>,
    /// From the first arrival to the first image done, whichever it was.
    pub first_vector: Option<Ms>,
    pub last_done: Ms,
    /// Latencies (milliseconds, images).
    pub latencies: Vec<(u32, u32)>,
    /// Billed milliseconds of the express lane, its invocations, its images, and
    /// the receives of its idle mapping.
    pub lane_ms: Ms,
    pub lane_requests: u64,
    pub lane_images: u64,
    pub lane_polls: f64,
    /// Every change.
    pub curve: Vec<Moment>,
}

impl Tally {
    /// `count` images that arrived together were done one after the other,
    /// each `per_image` after the one before it; the first of them
    /// `done_before + 1` times that after `began`.
    pub fn images_done(
        &mut self,
        arrived: Ms,
        count: u64,
        began: f64,
        done_before: u64,
        per_image: f64,
    ) {
        let at = |number: u64| (began + (done_before + number) as f64 * per_image).round() as Ms;
        let first_done = at(1) - self.first_arrival.unwrap_or(arrived);
        let earliest = self
            .first_vector
            .map_or(first_done, |known| known.min(first_done));
        self.first_vector = Some(earliest);
        self.done += count;
        let samples = count.min(SAMPLES_PER_PIECE);
        let mut counted = 0;
        for sample in 1..=samples {
            let upto = count * sample / samples;
            let weight = upto - counted;
            let middle = counted + weight.div_ceil(2);
            self.latencies
                .push(((at(middle) - arrived).max(0) as u32, weight as u32));
            counted = upto;
        }
    }

    /// Notes a point of the curve, if something has changed.
    pub fn note(&mut self, at: Ms, paid: u32, backlog: u64) {
        let moment = Moment { at, paid, backlog };
        match self.curve.last_mut() {
            Some(last) if last.at == at => *last = moment,
            Some(last) if last.paid == paid && last.backlog == backlog => {}
            _ => self.curve.push(moment),
        }
    }

    /// Dollars of the instances, of the lane, and of its idle mapping.
    pub fn dollars(&self, prices: &Prices) -> [f64; 3] {
        [
            self.paid as f64 / 3_600_000.0 * prices.instance_hour,
            self.lane_ms as f64 / 1000.0 * prices.lane_second
                + self.lane_requests as f64 * prices.lane_request,
            self.lane_polls * prices.queue_request,
        ]
    }

    pub fn longest(&self) -> f64 {
        let latencies = self.latencies.iter().map(|(latency, _)| *latency);
        f64::from(latencies.max().unwrap_or(0)) / 1000.0
    }

    /// Paid milliseconds without work after the first task was ready.
    pub fn idle(&self) -> Ms {
        (self.paid - self.booting - self.busy).max(0)
    }
}

/// What things cost, in dollars.
#[derive(Clone, Copy, Debug)]
pub struct Prices {
    pub instance_hour: f64,
    /// A second of the function at its memory.
    pub lane_second: f64,
    pub lane_request: f64,
    pub queue_request: f64,
}

/// The numbers of a table's row, over one or several runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Averages {
    /// Mean GPU-hours of a run.
    pub gpu_hours: f64,
    /// Mean dollars of a run: instances, lane, the lane's idle mapping.
    pub dollars: [f64; 3],
    /// Mean seconds from the first arrival to its vector.
    pub first_vector: Option<f64>,
    /// Half of the images took no longer, in seconds.
    pub p50: Option<f64>,
    pub p95: Option<f64>,
    pub p99: Option<f64>,
    pub idle_seconds: f64,
    pub instances_started: f64,
    pub done: f64,
}

impl Averages {
    pub fn total(&self) -> f64 {
        self.dollars.iter().sum()
    }

    pub fn of(runs: &[Tally], prices: &Prices) -> Self {
        let number = runs.len().max(1) as f64;
        let mean = |value: &dyn Fn(&Tally) -> f64| runs.iter().map(value).sum::<f64>() / number;
        let mut latencies: Vec<(u32, u32)> = runs
            .iter()
            .flat_map(|run| run.latencies.iter().copied())
            .collect();
        latencies.sort_unstable();
        let firsts: Vec<f64> = runs
            .iter()
            .filter_map(|run| run.first_vector)
            .map(|at| at as f64 / 1000.0)
            .collect();
        let arrived: u64 = runs.iter().map(|run| run.arrived).sum();
        let done: u64 = runs.iter().map(|run| run.done).sum();
        Self {
            gpu_hours: mean(&|run| run.paid as f64 / 3_600_000.0),
            dollars: [0, 1, 2].map(|part| mean(&|run| run.dollars(prices)[part])),
            first_vector: (!firsts.is_empty())
                .then(|| firsts.iter().sum::<f64>() / firsts.len() as f64),
            p50: percentile(&latencies, 0.50),
            p95: percentile(&latencies, 0.95),
            p99: percentile(&latencies, 0.99),
            idle_seconds: mean(&|run| run.idle() as f64 / 1000.0),
            instances_started: mean(&|run| run.instance_times.len() as f64),
            done: if arrived == 0 {
                1.0
            } else {
                done as f64 / arrived as f64
            },
        }
    }
}

/// Weighted percentile of sorted latencies, in seconds.
fn percentile(sorted: &[(u32, u32)], share: f64) -> Option<f64> {
    let total: u64 = sorted.iter().map(|(_, weight)| u64::from(*weight)).sum();
    let wanted = (total as f64 * share).ceil() as u64;
    let mut seen = 0;
    for (latency, weight) in sorted {
        seen += u64::from(*weight);
        if seen >= wanted.max(1) {
            return Some(f64::from(*latency) / 1000.0);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_weigh_images() {
        let latencies = [(1000, 90), (5000, 9), (9000, 1)];
        assert_eq!(percentile(&latencies, 0.5), Some(1.0));
        assert_eq!(percentile(&latencies, 0.95), Some(5.0));
        assert_eq!(percentile(&latencies, 1.0), Some(9.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn a_piece_is_sampled_with_all_its_weight() {
        let mut stats = Tally::default();
        stats.images_done(0, 1000, 5000.0, 0, 10.0);
        let weight: u64 = stats.latencies.iter().map(|(_, w)| u64::from(*w)).sum();
        assert_eq!((weight, stats.done), (1000, 1000));
        assert_eq!(stats.first_vector, Some(5010));
    }
}
