//! Child processes that cannot outlive this one.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{OnceLock, mpsc},
};

use rustix::process::{Pid, Signal};

/// Makes a command lead a process group of its own, so that it gets no signals
/// of the terminal, and be killed when this process dies in any way. For the
/// latter it has to be started with [`on_spawner_thread`].
pub fn tie(command: &mut Command) {
    command.process_group(0);
    #[cfg(target_os = "linux")]
    // SAFETY: between fork and exec only async-signal-safe calls are allowed;
    // this is the prctl system call alone, with no allocation and no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                .map_err(io::Error::from)
        });
    }
}

/// Linux sends the parent-death signal when the *thread* that forked ends, so
/// one thread that lives as long as the process does all the forking.
pub fn on_spawner_thread<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    type Job = Box<dyn FnOnce() + Send>;
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (sender, receiver) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("spawner".into())
            .spawn(move || receiver.into_iter().for_each(|job| job()))
            .expect("a thread can be started");
        sender
    });
    let (answer, answered) = mpsc::channel();
    let job = move || {
        // The asker waits below, so it is there to receive.
        let _ = answer.send(act());
    };
    spawner
        .send(Box::new(job))
        .expect("the spawner thread never ends");
    answered
        .recv()
        .expect("the spawner thread answers every job")
}

/// SIGTERM to one process. False when it is not there.
pub fn terminate(pid: u32) -> bool {
    signal(pid, Signal::TERM)
}

/// SIGKILL to one process. False when it is not there.
pub fn kill(pid: u32) -> bool {
    signal(pid, Signal::KILL)
}

pub fn kill_group(leader: u32) -> bool {
    pid_of(leader).is_some_and(|pid| rustix::process::kill_process_group(pid, Signal::KILL).is_ok())
}

fn signal(pid: u32, signal: Signal) -> bool {
    pid_of(pid).is_some_and(|pid| rustix::process::kill_process(pid, signal).is_ok())
}

fn pid_of(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

/// The variables that programs need from this process to run at all: where
/// programs, libraries and temporary files are. Credentials and endpoints of
/// the surrounding shell are not among them, so that nothing reaches real AWS.
/// ONNX Runtime asks the environment alone whether it may send telemetry when
/// it is loaded, and leaves files of it behind.
pub fn base_environment() -> BTreeMap<String, OsString> {
    const PASSED_ON: [&str; 10] = [
        "PATH",
        "HOME",
        "LANG",
        "LC_ALL",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "ORT_DYLIB_PATH",
        "RUST_LOG",
        "RUST_BACKTRACE",
        "NO_COLOR",
    ];
    PASSED_ON
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), std::env::var_os(name)?)))
        .chain([("ORT_DISABLE_TELEMETRY".to_owned(), "1".into())])
        .collect()
}

/// The path of a program beside the running one: `target/debug/local` finds
/// `target/debug/gpu-task`; a test in `target/debug/deps` finds it one up.
pub fn sibling(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let mut folder = own.parent().unwrap_or(Path::new(".")).to_owned();
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder.pop();
    }
    folder.join(name)
}
