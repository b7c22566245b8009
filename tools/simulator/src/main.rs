//! `simulator`: compares scalers on traces, simulates random days, checks the
//! requirements.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, Parser, Subcommand};
use planner::Policy;
use simulator::days::{Bill, Day, bill, crash_loop, day};
use simulator::evaluate::{Setting, Verdict, compare, verdicts};
use simulator::plot;
use simulator::table;
use simulator::trace::Trace;
use simulator::world::LanePhysics;

type Error = Box<dyn std::error::Error>;

/// Simulates the queue, the Auto Scaling groups, ECS and the tasks, with the
/// scaler's real planner and with what users would have instead.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare the scalers on traces: a table and an SVG each.
    Run {
        /// one, hundred, ten-thousand, steady, bursts, day, backfill, or CSV
        /// files of `seconds[,count]` lines; all of the built-in ones without any.
        traces: Vec<String>,
        /// Folder for the plots.
        #[arg(long, default_value = ".local/simulation")]
        out: PathBuf,
        #[command(flatten)]
        conditions: Conditions,
    },
    /// Simulate random days with API failures; fails when a promise is broken.
    Days {
        /// How many.
        #[arg(long, default_value_t = 10_000)]
        count: u64,
        /// First seed.
        #[arg(long, default_value_t = 0)]
        first: u64,
    },
    /// Check every requirement that a simulation can; exit code 1 when one fails.
    Check {
        /// Random days to simulate.
        #[arg(long, default_value_t = 10_000)]
        days: u64,
        /// Random days whose bills are compared.
        #[arg(long, default_value_t = 1_000)]
        bills: u64,
        #[command(flatten)]
        conditions: Conditions,
    },
}

/// Given or measured rates.
#[derive(Args)]
struct Conditions {
    /// Images per second of one task.
    #[arg(long, default_value_t = Policy::default().images_per_second)]
    images_per_second: f64,
    /// Seconds from asking for an instance to its first vector, for every scaler.
    #[arg(long, default_value_t = Policy::default().boot_seconds)]
    boot_seconds: u32,
    /// MAX_INSTANCES, for every scaler.
    #[arg(long, default_value_t = Policy::default().max_instances)]
    max_instances: u32,
    /// TARGET_DRAIN_SECONDS.
    #[arg(long, default_value_t = Policy::default().target_drain_seconds)]
    target_drain_seconds: u32,
    /// IDLE_GRACE_SECONDS and IDLE_EXIT_SECONDS.
    #[arg(long, default_value_t = Policy::default().idle_grace_seconds)]
    idle_seconds: u32,
    /// Express functions at once at most.
    #[arg(long, default_value_t = LanePhysics::default().max_concurrency)]
    lane_concurrency: u32,
    /// Milliseconds of the model for an image in the lane.
    #[arg(long, default_value_t = LanePhysics::default().per_image)]
    lane_milliseconds: f64,
    /// Milliseconds that an express function takes to start.
    #[arg(long, default_value_t = LanePhysics::default().cold_start)]
    lane_start: i64,
}

impl Conditions {
    fn setting(&self) -> Result<Setting, Error> {
        if !(self.images_per_second > 0.0 && self.boot_seconds > 0 && self.max_instances > 0) {
            return Err("rate, boot time and maximum must be above zero".into());
        }
        let lane = LanePhysics {
            max_concurrency: self.lane_concurrency,
            per_image: self.lane_milliseconds,
            cold_start: self.lane_start,
            ..LanePhysics::default()
        };
        let policy = Policy {
            images_per_second: self.images_per_second,
            boot_seconds: self.boot_seconds,
            max_instances: self.max_instances,
            target_drain_seconds: self.target_drain_seconds.max(1),
            idle_grace_seconds: self.idle_seconds,
            idle_exit_seconds: self.idle_seconds,
            ..Policy::default()
        };
        Ok(Setting::with_lane(policy, lane))
    }
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Run {
            traces,
            out,
            conditions,
        } => run(&traces, &out, &conditions),
        Command::Days { count, first } => Ok(days(first, count)),
        Command::Check {
            days,
            bills,
            conditions,
        } => check(days, bills, &conditions),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("simulator: {message}");
            ExitCode::from(2)
        }
    }
}

fn run(names: &[String], out: &std::path::Path, conditions: &Conditions) -> Result<bool, Error> {
    let setting = conditions.setting()?;
    let traces = if names.is_empty() {
        Trace::all()
    } else {
        names
            .iter()
            .map(|name| Trace::load(name))
            .collect::<Result<_, _>>()?
    };
    for trace in &traces {
        let comparison = compare(&setting, trace);
        println!("{}", table::comparison(&comparison));
        let path = plot::draw(&comparison, out)?;
        println!("plot: {}\n", path.display());
    }
    Ok(true)
}

/// What many days showed.
struct Days {
    faults: Vec<String>,
    runs: u64,
    /// Seconds after the grace until nothing was paid for, at the latest.
    latest: i64,
}

/// Of each seed, on all processors.
fn for_seeds<T: Send>(first: u64, count: u64, one: fn(u64) -> T) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let seeds = |thread| (first..first + count).skip(thread).step_by(threads);
        let workers: Vec<_> = (0..threads)
            .map(|thread| scope.spawn(move || seeds(thread).map(one).collect::<Vec<_>>()))
            .collect();
        let joined = workers.into_iter().map(|worker| worker.join());
        joined
            .flat_map(|days| days.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn simulate_days(first: u64, count: u64) -> Days {
    let all: Vec<Day> = for_seeds(first, count, day);
    let late = all.iter().map(|day| (day.to_zero - day.grace) / 1000);
    Days {
        faults: all.iter().filter_map(Day::fault).collect(),
        runs: all.iter().map(|day| day.runs).sum(),
        latest: late.max().unwrap_or(0),
    }
}

fn days(first: u64, count: u64) -> bool {
    let began = Instant::now();
    let Days {
        faults,
        runs,
        latest,
    } = simulate_days(first, count);
    for fault in faults.iter().take(20) {
        println!("FAIL  {fault}");
    }
    println!(
        "{count} days, {runs} planner runs, {} broken promises, at the latest {latest} s after the grace at zero, {:.1} s",
        faults.len(),
        began.elapsed().as_secs_f64()
    );
    faults.is_empty()
}

fn check(count: u64, bills: u64, conditions: &Conditions) -> Result<bool, Error> {
    let setting = conditions.setting()?;
    let mut all = Vec::new();
    for trace in Trace::all() {
        all.extend(verdicts(&compare(&setting, &trace)));
    }
    let Days {
        faults,
        runs,
        latest,
    } = simulate_days(0, count);
    all.push(Verdict {
        what: format!("{count} random days: never above the maximum, zero within grace + 90 s"),
        holds: faults.is_empty(),
        numbers: faults
            .first()
            .cloned()
            .unwrap_or_else(|| format!("{runs} runs, at the latest grace + {latest} s")),
    });
    let bills: Vec<Bill> = for_seeds(0, bills, bill);
    let dearest = bills
        .iter()
        .max_by(|one, other| one.ratio().total_cmp(&other.ratio()));
    let above = bills.iter().filter(|bill| bill.ratio() > 1.05).count();
    let sum = |part: fn(&Bill) -> f64| bills.iter().map(part).sum::<f64>();
    all.push(Verdict {
        what: format!("{} random days with a lane: dollars at most 1.05 × the cheaper of lane and GPUs alone, of those in time", bills.len()),
        holds: above <= bills.len() / 1000 && bills.iter().all(|bill| bill.finished),
        numbers: dearest.map_or_else(String::new, |bill| {
            format!(
                "{above} above, at most {:.3} (seed {}); all together {:.3}",
                bill.ratio(),
                bill.seed,
                sum(|bill| bill.both) / sum(|bill| bill.cheaper)
            )
        }),
    });
    for (max_instances, images) in [(5, 1), (5, 100_000), (25, 1_000_000)] {
        let cost = crash_loop(max_instances, images, 30 * 3_600_000);
        all.push(Verdict {
            what: format!(
                "crash loop, {images} images, maximum {max_instances}: at most 5 launches in the first hour, recovers"
            ),
            holds: cost.first_hour <= 5 && cost.recovered,
            numbers: format!(
                "{} in the first hour, {} in the first day",
                cost.first_hour, cost.first_day
            ),
        });
    }
    let (text, holds) = table::verdicts(&all);
    print!("{text}");
    Ok(holds)
}
