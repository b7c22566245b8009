//! `cargo xtask soak`: everything that can go wrong, for as many images as asked for.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use pipeline_tests::soak::{Plan, draw, run};

/// Run the whole pipeline under faults, then look at every object: it has a vector and an event,
/// or a dead letter with its reason, or is deleted and has left nothing
#[derive(Parser)]
struct Arguments {
    #[arg(long, default_value_t = 10_000)]
    images: usize,
    /// No more uploads after this time
    #[arg(long, default_value_t = 5)]
    minutes: u64,
    /// Of the files, their order and the faults
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[arg(long, default_value = "soak.svg")]
    plot: PathBuf,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let report = run(Plan {
        images: arguments.images,
        limit: Duration::from_secs(60 * arguments.minutes),
        seed: arguments.seed,
    })
    .await?;
    println!("{report}");
    draw(&report, &arguments.plot)?;
    Ok(ExitCode::from(u8::from(!report.violations.is_empty())))
}
