//! The worker on a GPU instance: reads the configuration and runs the task.

mod app;

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use worker::Fatal;
use worker::config::Config;

/// Decoders that still run when the task ends are not waited for.
const SHUTDOWN: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    // SAFETY: nothing has started a thread yet.
    unsafe { clip_model::engine::disable_telemetry() };
    let started = Instant::now();
    let config = match Config::read(std::env::args_os()) {
        Ok(config) => config,
        // The help and the version too; a mistake ends with 2.
        Err(error) => error.exit(),
    };
    if config.check_config {
        println!("{config:#?}");
        return ExitCode::SUCCESS;
    }
    platform::init_logs("gpu-task");
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        queue = config.input_queue_url,
        "starting"
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            let fatal = Fatal::Configuration(format!("cannot start the runtime: {error}"));
            eprintln!("gpu-task: {fatal}");
            return ExitCode::from(fatal.exit_code());
        }
    };
    let result = runtime.block_on(app::run(config));
    runtime.shutdown_timeout(SHUTDOWN);
    let code = match result {
        Ok(summary) => {
            tracing::info!(
                ended = ?summary.ended,
                images = summary.images,
                rejected = summary.rejected,
                handed_back = summary.handed_back,
                seconds = (started.elapsed().as_secs_f64() * 10.0).round() / 10.0,
                "done"
            );
            0
        }
        Err(fatal) => fatal.exit_code(),
    };
    exit_at_once(code)
}

/// Ends the process without the destructors of the C++ libraries in it: a
/// thread may still be inside the model or a decoder, and pulling the
/// library's globals from under it turns a clean end into a crash.
fn exit_at_once(code: u8) -> ! {
    let _ = std::io::stdout().flush();
    let _ = std::io::stderr().flush();
    // SAFETY: `_exit` is always safe to call; both streams are flushed, and
    // nothing else of this process needs an orderly end.
    unsafe { libc::_exit(i32::from(code)) }
}
