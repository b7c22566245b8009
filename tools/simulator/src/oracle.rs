//! (d) The oracle: a lower bound of the GPU time of anyone who keeps the
//! policy's promise, knowing every arrival.
//!
//! The promise: every image is done within `TARGET_DRAIN_SECONDS` of its
//! arrival, as far as `MAX_INSTANCES` can. The oracle boots ahead of the work,
//! so nobody waits for a boot; it stops an instance the moment its last image
//! is done; it keeps one through a pause only when that is cheaper than
//! another boot. No real scaler can do any of the three.
//!
//! For a work time of `1/r` per image, boot `b` and promise `T`, with arrivals
//! cut into clusters at every pause longer than `b − T`:
//!
//! - inside a cluster a pause costs its whole length on at least one instance,
//!   since a stop would cost a boot and work can move by at most `T`: on-time
//!   of at least max(work, span − T);
//! - between clusters it costs min(b, pause − T), the cheaper of stop and stay;
//! - a cluster whose work in some window of arrivals of length `w` needs more
//!   than `k − 1` instances to be done within `w + T` needs a k-th boot, once
//!   per group of clusters that no pause longer than `b + T` separates.

use crate::evaluate::Setting;
use crate::trace::Trace;
use crate::world::{Ms, Physics};

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bound {
    pub gpu_seconds: f64,
    pub starts: f64,
}

pub fn bound(trace: &Trace, physics: &Physics, promise_seconds: f64, max: u32) -> Bound {
    let boot = physics.boot_seconds;
    let per_image = 1.0 / physics.images_per_second;
    let seconds = |at: Ms| at as f64 / 1000.0;
    let mut gpu_seconds = 0.0;
    let mut starts = 0.0;
    let arrivals = &trace.arrivals;
    let mut group_begin = 0;
    while group_begin < arrivals.len() {
        // A group of clusters: everything up to a pause that no instance outlives.
        let mut group_end = group_begin + 1;
        while group_end < arrivals.len()
            && seconds(arrivals[group_end].0 - arrivals[group_end - 1].0) <= boot + promise_seconds
        {
            group_end += 1;
        }
        let group = &arrivals[group_begin..group_end];
        let peak = peak_instances(group, per_image, promise_seconds, max);
        gpu_seconds += f64::from(peak) * boot;
        starts += f64::from(peak);
        let mut cluster_begin = 0;
        for index in 1..=group.len() {
            let pause = match group.get(index) {
                Some((at, _)) => seconds(at - group[index - 1].0),
                None => f64::INFINITY,
            };
            if pause <= boot - promise_seconds {
                continue;
            }
            let cluster = &group[cluster_begin..index];
            let work: u64 = cluster.iter().map(|(_, count)| count).sum();
            let span = seconds(group[index - 1].0 - cluster[0].0);
            gpu_seconds += (work as f64 * per_image).max(span - promise_seconds);
            if index < group.len() {
                gpu_seconds += (pause - promise_seconds).max(0.0).min(boot);
            }
            cluster_begin = index;
        }
        group_begin = group_end;
    }
    Bound {
        gpu_seconds,
        starts,
    }
}

/// Dollars that nobody with both kinds of capacity gets below: between pauses
/// that no instance outlives, either the lane does everything, in full batches
/// and without a cold start, or at least one instance boots and every image
/// costs what it costs on the cheaper of both.
pub fn bound_of_two(trace: &Trace, setting: &Setting) -> f64 {
    let (policy, prices, physics) = (&setting.policy, setting.prices(), setting.physics());
    let pause = policy.boot_seconds + policy.target_drain_seconds;
    let second = prices.instance_hour / 3600.0;
    let seconds = setting
        .lane
        .seconds_per_image(physics.fetch + physics.deliver);
    let in_lane =
        seconds * prices.lane_second + prices.lane_request / setting.lane.batch_size as f64;
    let on_gpu = second / physics.images_per_second;
    let groups = trace
        .arrivals
        .chunk_by(|(before, _), (after, _)| after - before <= Ms::from(pause) * 1000);
    let of_group = |group: &[(Ms, u64)]| {
        let images = group.iter().map(|(_, count)| count).sum::<u64>() as f64;
        let boot = second * physics.boot_seconds;
        (images * in_lane).min(boot + images * in_lane.min(on_gpu))
    };
    groups.map(of_group).sum()
}

/// Instances that some window of the arrivals cannot do without. Windows of
/// growing length over running sums; lengths double, which can only miss a
/// need and so keeps the bound a bound.
fn peak_instances(group: &[(Ms, u64)], per_image: f64, promise: f64, max: u32) -> u32 {
    let mut peak = 1;
    let total: u64 = group.iter().map(|(_, count)| count).sum();
    if total == 0 {
        return 0;
    }
    let mut window = 0.0;
    loop {
        let mut first = 0;
        let mut inside = 0;
        for last in 0..group.len() {
            inside += group[last].1;
            while (group[last].0 - group[first].0) as f64 / 1000.0 > window {
                inside -= group[first].1;
                first += 1;
            }
            let needed = (inside as f64 * per_image / (window + promise)).ceil() as u32;
            peak = peak.max(needed);
        }
        let span = (group[group.len() - 1].0 - group[0].0) as f64 / 1000.0;
        if window >= span {
            return peak.min(max);
        }
        window = (window * 2.0).max(1.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace(arrivals: &[(Ms, u64)]) -> Trace {
        Trace {
            name: "t".to_owned(),
            about: String::new(),
            arrivals: arrivals.to_vec(),
        }
    }

    fn spent(arrivals: &[(Ms, u64)]) -> f64 {
        bound(&trace(arrivals), &Physics::new(50.0, 180.0), 60.0, 5).gpu_seconds
    }

    fn assert_close(spent: f64, expected: f64) {
        assert!((spent - expected).abs() < 1e-6, "{spent} is not {expected}");
    }

    #[test]
    fn one_image_costs_a_boot_and_its_work() {
        assert_close(spent(&[(0, 1)]), 180.0 + 0.02);
    }

    #[test]
    fn a_batch_costs_the_boots_that_its_promise_needs() {
        // 10,000 / 50 = 200 s of work, 60 s to do it: four instances.
        assert_close(spent(&[(0, 10_000)]), 4.0 * 180.0 + 200.0);
        // At the maximum the promise gives way, not the bound.
        assert_close(spent(&[(0, 1_000_000)]), 5.0 * 180.0 + 20_000.0);
    }

    #[test]
    fn a_pause_costs_the_cheaper_of_stop_and_stay() {
        assert_close(spent(&[(0, 1), (1_000_000, 1)]), 2.0 * 180.02);
        let stays = spent(&[(0, 1), (200_000, 1)]);
        assert_close(stays, 180.0 + 0.02 + 140.0 + 0.02);
    }

    #[test]
    fn a_steady_trickle_keeps_one_instance() {
        let arrivals: Vec<(Ms, u64)> = (0..7200).map(|second| (second * 1000, 1)).collect();
        assert_close(spent(&arrivals), 180.0 + 7199.0 - 60.0);
    }
}
