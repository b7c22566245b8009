//! Tasks' processes, which cannot outlive this one.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::OpenOptions,
    io,
    path::Path,
    process::{Command, Stdio},
};

use ministack::process::{on_spawner_thread, tie};
use tokio::process::Child;

/// A program to run in its own process group, its output in a file.
#[derive(Debug)]
pub struct Spec<'a> {
    pub program: &'a Path,
    pub args: &'a [String],
    /// Its whole environment: nothing else is inherited.
    pub environment: BTreeMap<String, OsString>,
    pub directory: &'a Path,
    /// Where its standard output and error go, appended.
    pub log: &'a Path,
}

/// Starts a program. It is killed when the handle is dropped, and when this
/// process dies in any way.
pub fn spawn(spec: &Spec<'_>) -> io::Result<Child> {
    let log = OpenOptions::new()
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
        .stderr(log);
    tie(&mut command);
    let mut command = tokio::process::Command::from(command);
    command.kill_on_drop(true);
    let runtime = tokio::runtime::Handle::current();
    on_spawner_thread(move || {
        let _inside = runtime.enter();
        command.spawn()
    })
}
