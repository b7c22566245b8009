//! Needs `LOCAL_MINISTACK`. Each test runs a program that starts an emulator,
//! ends it in its way, and looks at what is left.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    net::TcpStream,
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use ministack::MiniStack;
use tempfile::TempDir;

/// The guard needs a moment after a sudden end; a busy machine gets more.
const PATIENCE: Duration = Duration::from_secs(20);

/// The program of the other tests: starts an emulator, tells its port, and
/// ends as it is told.
#[test]
#[ignore = "the program that the other tests run"]
fn program() {
    let Some(log) = std::env::var_os("TEST_LOG") else {
        return;
    };
    let program = ministack::program_from_env().expect("LOCAL_MINISTACK is set");
    let emulator = MiniStack::start(&program, Path::new(&log)).expect("it starts");
    println!("port {}", emulator.port());
    let mut order = String::new();
    std::io::stdin().read_line(&mut order).expect("an order");
    assert_eq!(order.trim(), "end", "told to panic");
}

struct Started {
    child: Child,
    port: u16,
    /// Its temporary folder.
    folder: TempDir,
    _output: BufReader<ChildStdout>,
    _log: TempDir,
}

fn start() -> Started {
    let (folder, log) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "program", "--nocapture"])
        .env("TMPDIR", folder.path())
        .env("TEST_LOG", log.path().join("log"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("this test's program");
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let port = (&mut output)
        .lines()
        .map_while(Result::ok)
        .find_map(|line| line.split_once("port ")?.1.parse().ok())
        .expect("LOCAL_MINISTACK must be set; `cargo xtask test` does that");
    assert!(fs::read_dir(folder.path()).unwrap().next().is_some());
    assert!(!processes_in(folder.path()).is_empty());
    TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    Started {
        child,
        port,
        folder,
        _output: output,
        _log: log,
    }
}

/// Waits until nothing is left of the emulator.
fn assert_nothing_stays(started: &Started) {
    let began = Instant::now();
    loop {
        let files: Vec<_> = fs::read_dir(started.folder.path())
            .unwrap()
            .flatten()
            .collect();
        let processes = processes_in(started.folder.path());
        let listens = TcpStream::connect(("127.0.0.1", started.port)).is_ok();
        if files.is_empty() && processes.is_empty() && !listens {
            return;
        }
        assert!(
            began.elapsed() < PATIENCE,
            "left: {files:?}, {processes:?}, listening: {listens}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Processes whose temporary folder lies in `folder`.
fn processes_in(folder: &Path) -> Vec<String> {
    let wanted = format!("TMPDIR={}/", folder.display());
    let is_one = |path: &Path| {
        fs::read(path.join("environ"))
            .is_ok_and(|all| String::from_utf8_lossy(&all).contains(&wanted))
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes
        .filter(|entry| is_one(&entry.path()))
        .map(|entry| fs::read_to_string(entry.path().join("comm")).unwrap_or_default())
        .collect()
}

fn order(started: &mut Started, order: &str) -> bool {
    let mut input = started.child.stdin.take().unwrap();
    writeln!(input, "{order}").unwrap();
    started.child.wait().unwrap().success()
}

fn signal(started: &mut Started, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_child(&started.child);
    rustix::process::kill_process(pid, signal).unwrap();
    started.child.wait().unwrap();
}

#[test]
fn an_emulator_that_is_dropped_leaves_nothing() {
    let mut started = start();
    assert!(order(&mut started, "end"));
    // Without a guard's moment: the drop waits.
    assert_eq!(fs::read_dir(started.folder.path()).unwrap().count(), 0);
    assert_nothing_stays(&started);
}

#[test]
fn a_panic_leaves_nothing() {
    let mut started = start();
    assert!(!order(&mut started, "panic"));
    assert_nothing_stays(&started);
}

#[test]
fn an_interrupt_leaves_nothing() {
    let mut started = start();
    signal(&mut started, rustix::process::Signal::INT);
    assert_nothing_stays(&started);
}

#[test]
fn a_kill_leaves_nothing() {
    let mut started = start();
    signal(&mut started, rustix::process::Signal::KILL);
    assert_nothing_stays(&started);
}

#[test]
fn it_listens_on_the_loopback_address_alone() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let program = ministack::program_from_env().expect("LOCAL_MINISTACK is set");
    let emulator = MiniStack::start(&program, log.path()).expect("it starts");
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    let port = format!(":{:04X}", emulator.port());
    let listening: Vec<&str> = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields[1].ends_with(&port) && fields[3] == "0A")
        .map(|fields| fields[1].split(':').next().unwrap())
        .map(|address| {
            if address == "0100007F" {
                "127.0.0.1"
            } else {
                "another"
            }
        })
        .collect();
    assert_eq!(listening, ["127.0.0.1"]);
}

#[test]
fn a_program_that_ends_at_once_is_said_with_its_log() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let error = MiniStack::start(Path::new("/bin/false"), log.path()).expect_err("it fails");
    assert!(
        error.to_string().contains("it ended with exit status: 1"),
        "{error}"
    );
    let error = MiniStack::start(Path::new("/no/such/program"), log.path()).expect_err("it fails");
    assert!(
        error
            .to_string()
            .starts_with("cannot start /no/such/program"),
        "{error}"
    );
}
