//! The worker's program: reads the configuration and runs the task.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use gpu_task::app;
use gpu_task::config::{self, Command, Config};
use gpu_task::failure::{EXIT_DONE, Fatal};
use platform::env::Reader;

/// Decoders that still run when the task ends are not waited for.
const SHUTDOWN: Duration = Duration::from_millis(100);

fn main() -> ExitCode {
    let started = Instant::now();
    let (settings, only_checks) = match config::parse_arguments(std::env::args().skip(1)) {
        Ok(Command::Help) => {
            print!("{}", config::help());
            return ExitCode::from(EXIT_DONE);
        }
        Ok(Command::Version) => {
            println!("gpu-task {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::from(EXIT_DONE);
        }
        Ok(Command::Run(settings)) => (settings, false),
        Ok(Command::Check(settings)) => (settings, true),
        Err(problem) => return end(&Fatal::Configuration(problem)),
    };
    let flag_or_variable = |name: &str| {
        let flag = settings.iter().rev().find(|(flag, _)| flag == name);
        flag.map(|(_, value)| value.clone())
            .or_else(|| std::env::var(name).ok())
    };
    let config = match Config::read(&Reader::new(flag_or_variable)) {
        Ok(config) => config,
        Err(error) => return end(&Fatal::Configuration(error.to_string())),
    };
    if only_checks {
        println!("{config:#?}");
        return ExitCode::from(EXIT_DONE);
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
            let problem = format!("cannot start the runtime: {error}");
            return end(&Fatal::Configuration(problem));
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
            EXIT_DONE
        }
        Err(fatal) => fatal.exit_code(),
    };
    exit_at_once(code)
}

/// Ends with a message for whoever started the program, before logs exist.
fn end(fatal: &Fatal) -> ExitCode {
    eprintln!("gpu-task: {fatal}");
    ExitCode::from(fatal.exit_code())
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
