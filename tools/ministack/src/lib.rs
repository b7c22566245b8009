//! MiniStack, the emulated S3, SQS, SNS, EventBridge, CloudWatch and Lambda, as
//! a child process on a free port of 127.0.0.1. However the program that
//! started it ends, it goes, with its functions and its temporary files.

pub mod process;

use std::{
    fs,
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;
use thiserror::Error;

/// Names the `ministack` program.
pub const PROGRAM_VARIABLE: &str = "LOCAL_MINISTACK";
/// The region of everything local, unless MINISTACK_REGION says otherwise.
pub const REGION: &str = "us-east-1";
/// The account of everything local.
pub const ACCOUNT: &str = "000000000000";
/// The emulator's access key and secret key; it checks no signature.
pub const CREDENTIALS: &str = "test";
/// It starts in well under a second; a loaded machine gets more.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a port that someone else took meanwhile is replaced by another.
const START_TRIES: usize = 3;
/// No call to a program on this machine takes longer.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// Waits for the end of its standard input, which comes with the end of the
/// program that holds the other side; then ends a process group and removes a
/// folder. A group may be there for a while after it was killed.
const GUARD: &str = r#"read -r _
for _ in 1 2 3 4 5 6 7 8 9 10; do kill -9 -- "-$1" 2>/dev/null || break; sleep 0.1; done
rm -rf "$2""#;

#[derive(Debug, Error)]
pub enum StartError {
    #[error(
        "{PROGRAM_VARIABLE} is not set: it names the ministack program, which `cargo xtask` installs into .tools/venv (run `cargo xtask demo` or `cargo xtask test`)"
    )]
    NotNamed,
    #[error("cannot start {program}: {source}")]
    Start { program: PathBuf, source: io::Error },
    #[error("{program} does not answer: {problem}; its output is in {log}")]
    Silent {
        program: PathBuf,
        problem: String,
        log: PathBuf,
    },
}

#[derive(Debug, Error)]
pub enum CallError {
    #[error("the emulator does not answer {call}: {source}")]
    Connection { call: String, source: io::Error },
    /// Another status than 2xx.
    #[error("{call}: {status}: {body}")]
    Status {
        call: String,
        status: u16,
        body: String,
    },
}

/// The program that `LOCAL_MINISTACK` names.
pub fn program_from_env() -> Result<PathBuf, StartError> {
    std::env::var_os(PROGRAM_VARIABLE)
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .ok_or(StartError::NotNamed)
}

/// A running emulator. Dropping it ends it and all it started, waits until
/// they are gone, and removes its temporary files.
#[derive(Debug)]
pub struct MiniStack {
    port: u16,
    endpoint: String,
    child: Child,
    guard: Child,
    // After the guard, which removes the folder's content.
    _scratch: TempDir,
}

impl MiniStack {
    /// Starts the emulator, with its output in `log`, and waits until it answers.
    pub fn start(program: &Path, log: &Path) -> Result<Self, StartError> {
        Self::start_with(program, log, &[])
    }

    /// As [`Self::start`], with further settings as environment variables.
    pub fn start_with(
        program: &Path,
        log: &Path,
        settings: &[(&str, &str)],
    ) -> Result<Self, StartError> {
        let mut tries = 1..START_TRIES;
        loop {
            match Self::start_once(program, log, settings) {
                // Someone may have taken the port between our look and its bind.
                Err(StartError::Silent { .. }) if tries.next().is_some() => {}
                result => return result,
            }
        }
    }

    fn start_once(
        program: &Path,
        log: &Path,
        settings: &[(&str, &str)],
    ) -> Result<Self, StartError> {
        let failed = |source: io::Error| StartError::Start {
            program: program.to_owned(),
            source,
        };
        let scratch = tempfile::Builder::new()
            .prefix("ministack-")
            .tempdir()
            .map_err(failed)?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .map_err(failed)?
            .port();
        let endpoint = format!("http://127.0.0.1:{port}");
        let output = fs::File::options().create(true).append(true).open(log);
        let output = output.map_err(failed)?;
        // A venv's script starts with its interpreter's path: it needs no activation.
        let mut command = Command::new(std::path::absolute(program).map_err(failed)?);
        command
            .env_clear()
            .envs(process::base_environment())
            .env("GATEWAY_PORT", port.to_string())
            // Its default listens on every interface.
            .env("BIND_HOST", "127.0.0.1")
            .env("MINISTACK_HOST", "127.0.0.1")
            .env("MINISTACK_REGION", REGION)
            .env("MINISTACK_ACCOUNT_ID", ACCOUNT)
            // What its Lambdas call.
            .env("AWS_ENDPOINT_URL", &endpoint)
            .env("AWS_ACCESS_KEY_ID", CREDENTIALS)
            .env("AWS_SECRET_ACCESS_KEY", CREDENTIALS)
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("TMPDIR", scratch.path())
            .env("PYTHONUNBUFFERED", "1")
            .envs(settings.iter().copied())
            .current_dir(scratch.path())
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(failed)?)
            .stderr(output);
        process::tie(&mut command);
        let child = process::on_spawner_thread(move || command.spawn()).map_err(failed)?;
        let guard = guard(child.id(), scratch.path()).inspect_err(|_| {
            process::kill_group(child.id());
        });
        let mut emulator = Self {
            port,
            endpoint,
            child,
            guard: guard.map_err(failed)?,
            _scratch: scratch,
        };
        let started = Instant::now();
        let problem = loop {
            if let Ok(Some(status)) = emulator.child.try_wait() {
                break format!("it ended with {status}");
            }
            if emulator
                .request("GET", "/_ministack/health", &[], b"")
                .is_ok()
            {
                return Ok(emulator);
            }
            if started.elapsed() > START_LIMIT {
                break format!("no answer within {START_LIMIT:?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        Err(StartError::Silent {
            program: program.to_owned(),
            problem,
            log: log.to_owned(),
        })
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// One plain HTTP call, for what needs no SDK crate.
    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Vec<u8>, CallError> {
        request(self.port, method, path, headers, body)
    }
}

impl Drop for MiniStack {
    fn drop(&mut self) {
        // There is nothing to save in it, so nothing is asked politely.
        process::kill_group(self.child.id());
        let _ = self.child.wait();
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

fn guard(group: u32, folder: &Path) -> io::Result<Child> {
    use std::os::unix::process::CommandExt;
    Command::new("/bin/sh")
        .args(["-c", GUARD, "guard", &group.to_string()])
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn()
}

/// One plain HTTP call to the emulator on a port; see [`MiniStack::request`].
pub fn request(
    port: u16,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Result<Vec<u8>, CallError> {
    let call = || format!("{method} {path}");
    let failed = |source| CallError::Connection {
        call: call(),
        source,
    };
    // HTTP 1.0 ends an answer with its connection: there is nothing to parse.
    let mut head = format!(
        "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {}\r\n",
        body.len()
    );
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    let exchange = || -> io::Result<Vec<u8>> {
        let mut connection = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        connection.set_read_timeout(Some(CALL_LIMIT))?;
        connection.write_all(head.as_bytes())?;
        connection.write_all(body)?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let mut answer = exchange().map_err(failed)?;
    let split = answer.windows(4).position(|window| window == b"\r\n\r\n");
    let split = split.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
    let content = answer.split_off(split + 4);
    let status = String::from_utf8_lossy(&answer);
    let status = status.split(' ').nth(1).and_then(|code| code.parse().ok());
    match status {
        Some(200..300) => Ok(content),
        status => Err(CallError::Status {
            call: call(),
            status: status.unwrap_or_default(),
            body: String::from_utf8_lossy(&content).into_owned(),
        }),
    }
}
