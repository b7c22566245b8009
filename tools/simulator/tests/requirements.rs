//! What the scaler must do, shown in simulation with its real planner. The
//! full numbers come from `simulator check` in a release build.

use planner::{CapacityOption, Policy};
use simulator::days::{Day, bill, crash_loop, day};
use simulator::evaluate::{Setting, compare, run_once, verdicts};
use simulator::ours::Ours;
use simulator::trace::Trace;
use simulator::world::Ms;

/// Random days of the test suite; a release run does 10,000.
const DAYS: u64 = 200;

const HOUR: Ms = 3_600_000;

fn holds(name: &str) {
    let setting = Setting::new(Policy::default());
    let trace = Trace::named(name).expect("a built-in trace");
    let comparison = compare(&setting, &trace);
    for verdict in verdicts(&comparison) {
        assert!(verdict.holds, "{}: {}", verdict.what, verdict.numbers);
    }
}

#[test]
fn one_image() {
    holds("one");
}

#[test]
fn a_hundred_at_once() {
    holds("hundred");
}

#[test]
fn ten_thousand_at_once() {
    holds("ten-thousand");
}

#[test]
fn one_a_second_for_two_hours() {
    holds("steady");
}

#[test]
fn bursts_over_a_day() {
    holds("bursts");
}

#[test]
fn a_day_with_its_curve() {
    holds("day");
}

#[test]
fn a_million_images_at_once() {
    holds("backfill");
}

#[test]
fn random_days_with_failing_apis_keep_both_promises() {
    let mut most_days_work = 0;
    for seed in 0..DAYS {
        let day = day(seed);
        assert_eq!(day.fault(), None);
        most_days_work += u64::from(day.most_instances > 0);
    }
    assert_eq!(
        most_days_work, DAYS,
        "a day without an instance proves nothing"
    );
}

#[test]
fn random_days_with_a_lane_cost_no_more_than_the_cheaper_of_both_alone() {
    let bills: Vec<_> = (0..DAYS / 2).map(bill).collect();
    for bill in &bills {
        assert!(bill.finished && bill.ratio() <= 1.05, "{bill:?}");
    }
    // What makes both worth having: most days need one of them, some the other.
    assert!(bills.iter().any(|bill| bill.ratio() < 0.5));
}

#[test]
fn a_broken_promise_is_reported() {
    let good = day(3);
    assert_eq!(good.fault(), None);
    let too_many = Day {
        most_instances: good.max_instances + 1,
        ..good.clone()
    };
    assert!(too_many.fault().is_some());
    let too_late = Day {
        to_zero: good.allowed + 1,
        ..good.clone()
    };
    assert!(too_late.fault().is_some());
    let unfinished = Day {
        finished: false,
        ..good
    };
    assert!(unfinished.fault().is_some());
}

#[test]
fn a_crash_looping_task_costs_five_launches_in_its_first_hour_and_recovers() {
    for (max_instances, images) in [(1, 1), (5, 1), (5, 100_000), (25, 1_000_000)] {
        let cost = crash_loop(max_instances, images, 2 * HOUR);
        assert!(cost.first_hour <= 5, "{cost:?}");
        assert!(cost.first_hour >= 2, "it is tried again: {cost:?}");
        assert!(cost.recovered, "{cost:?}");
        let long = crash_loop(max_instances, images, 30 * HOUR);
        assert!(long.first_day <= 12, "the backoff grows: {long:?}");
        assert!(long.recovered, "{long:?}");
    }
}

/// A load that does not change for two hours.
fn constant_load(images_per_second: f64) -> Trace {
    let mut rng = fastrand::Rng::with_seed(9);
    let mut arrivals = Vec::new();
    let mut owed = 0.0;
    for second in 0..7200 {
        owed += images_per_second;
        let count = owed as u64;
        owed -= count as f64;
        if count > 0 {
            arrivals.push((second * 1000 + rng.i64(0..1000), count));
        }
    }
    Trace {
        name: "load".to_owned(),
        about: String::new(),
        arrivals,
    }
}

#[test]
fn a_constant_load_settles_without_oscillation() {
    let setting = Setting::new(Policy::default());
    let rate = setting.policy.images_per_second;
    for share in [0.01, 0.1, 0.5, 0.9, 1.3, 1.5, 2.2, 2.8, 3.4, 4.2] {
        let mut ours = Ours::new(setting.policy.clone(), 17_000);
        let (stats, ended) = run_once(&setting, &constant_load(share * rate), &mut ours);
        assert!(ended);
        assert_eq!(stats.done, stats.arrived);
        let late_starts = stats
            .instance_times
            .iter()
            .filter(|at| **at > 20 * 60_000)
            .count();
        assert_eq!(late_starts, 0, "load {share}: {:?}", stats.instance_times);
        // Enough for the load, and not a GPU more than its busiest hour wants.
        let paid_hours = stats.paid as f64 / HOUR as f64;
        let wanted = (share / 0.7).ceil().max(1.0);
        assert!(
            paid_hours <= 2.0 * wanted + 1.2,
            "load {share}: {paid_hours} h"
        );
    }
}

#[test]
fn a_fleet_that_drained_a_burst_is_not_kept_by_a_trickle() {
    let mut trace = constant_load(1.0);
    trace.arrivals.insert(0, (0, 10_000));
    let setting = Setting::new(Policy::default());
    let (stats, _) = run_once(&setting, &trace, &mut Ours::new(setting.policy.clone(), 0));
    assert_eq!(stats.instance_times.len(), 4);
    assert!(stats.paid < 3 * HOUR, "{} s", stats.paid / 1000);
}

#[test]
fn the_maximum_of_one_is_kept_too() {
    let setting = Setting::new(Policy {
        max_instances: 1,
        ..Policy::default()
    });
    let trace = Trace::named("ten-thousand").expect("built in");
    let (stats, ended) = run_once(&setting, &trace, &mut Ours::new(setting.policy.clone(), 0));
    assert!(ended);
    assert_eq!((stats.most_instances, stats.instance_times.len()), (1, 1));
}

#[test]
fn without_capacity_in_the_first_option_the_second_serves() {
    let options = ["first", "second"].map(CapacityOption::of_group).to_vec();
    let setting = Setting::new(Policy {
        options,
        ..Policy::default()
    });
    let trace = Trace::named("hundred").expect("built in");
    let mut world = setting.world(&trace);
    world.set_shortages(0, vec![(0, 10 * HOUR)]);
    let mut ours = Ours::new(setting.policy.clone(), 30_000);
    assert!(world.run(&mut ours, 24 * HOUR));
    let first = world.tally.first_vector.expect("done");
    // The boot, and a few seconds to be refused and to ask elsewhere.
    assert!(first < 200_000, "{first} ms");
}
