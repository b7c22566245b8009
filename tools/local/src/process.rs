//! Child processes that cannot outlive this one.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{OnceLock, mpsc},
};

use rustix::process::{Pid, Signal};
use tokio::process::{Child, Command};

/// A program to run in its own process group, its output in a file.
#[derive(Debug)]
pub struct Spec<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub args: &'a [String],
    /// Its whole environment: nothing else is inherited.
    pub environment: BTreeMap<String, OsString>,
    /// Its working directory.
    pub directory: &'a Path,
    /// Where its standard output and error go, appended.
    pub log: &'a Path,
}

/// Starts a program. It gets no terminal signals (its group is its own), is
/// killed when the handle is dropped, and when this process dies in any way.
///
/// # Errors
/// When the log cannot be opened or the program cannot be started.
pub fn spawn(spec: &Spec<'_>) -> io::Result<Child> {
    let log: File = OpenOptions::new()
        .create(true)
        .append(true)
        .open(spec.log)?;
    let mut command = Command::new(spec.program);
    command
        .args(spec.args)
        .env_clear()
        .envs(&spec.environment)
        .current_dir(spec.directory)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .process_group(0)
        .kill_on_drop(true);
    die_with_parent(&mut command);
    on_spawner_thread(move || command.spawn())
}

#[cfg(target_os = "linux")]
fn die_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec only async-signal-safe calls are allowed;
    // this is the prctl system call alone, with no allocation and no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
                .map_err(io::Error::from)
        });
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_command: &mut Command) {}

/// Linux sends the parent-death signal when the *thread* that forked ends, so
/// one thread that lives as long as the process does all the forking.
fn on_spawner_thread<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
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
    let runtime = tokio::runtime::Handle::current();
    let (answer, answered) = mpsc::channel();
    let job = move || {
        let _inside = runtime.enter();
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

/// SIGKILL to a process group.
pub fn kill_group(leader: u32) -> bool {
    pid_of(leader).is_some_and(|pid| rustix::process::kill_process_group(pid, Signal::KILL).is_ok())
}

/// Whether any process of a group is left.
#[must_use]
pub fn group_is_alive(leader: u32) -> bool {
    pid_of(leader).is_some_and(|pid| rustix::process::test_kill_process_group(pid).is_ok())
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
#[must_use]
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
        .collect()
}

/// The path of a program beside the running one: `target/debug/local` finds
/// `target/debug/gpu-task`; a test in `target/debug/deps` finds it one up.
#[must_use]
pub fn sibling(name: &str) -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let mut folder = own.parent().unwrap_or(Path::new(".")).to_owned();
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder.pop();
    }
    folder.join(name)
}
