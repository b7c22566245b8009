//! The emulated S3, SQS, SNS, EventBridge, CloudWatch and Lambda: MiniStack, as
//! a child process on a free port of 127.0.0.1.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs, io,
    net::TcpListener,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use hyper::Method;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::process::Child;

use crate::{
    cloud::ACCOUNT,
    http::{self, HttpError},
    process, sdk,
};

/// Names the `ministack` program.
pub const PROGRAM_VARIABLE: &str = "LOCAL_MINISTACK";
/// MiniStack starts in well under a second; a loaded machine gets more.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a port that someone else took meanwhile is replaced by another.
const START_TRIES: usize = 3;

/// Why the emulator is not there.
#[derive(Debug, Error)]
pub enum EmulatorError {
    /// No program was named.
    #[error(
        "{PROGRAM_VARIABLE} is not set: it names the ministack program, which `cargo xtask` installs into .tools/venv (run `cargo xtask demo` or `cargo xtask test`)"
    )]
    NotNamed,
    /// It could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It started and did not answer.
    #[error("{program} does not answer: {problem}; its output is in {log}")]
    Silent {
        /// The program.
        program: PathBuf,
        /// In words.
        problem: String,
        /// Its log file.
        log: PathBuf,
    },
    /// A call to it failed.
    #[error(transparent)]
    Call(#[from] HttpError),
}

/// The program that `LOCAL_MINISTACK` names.
///
/// # Errors
/// When the variable is not set.
pub fn program_from_env() -> Result<PathBuf, EmulatorError> {
    std::env::var_os(PROGRAM_VARIABLE)
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .ok_or(EmulatorError::NotNamed)
}

/// A running emulator. It ends when this is dropped, with all it started.
#[derive(Debug)]
pub struct Emulator {
    endpoint: String,
    child: Child,
    leader: u32,
    log: PathBuf,
    scratch: PathBuf,
}

impl Emulator {
    /// Starts the emulator, with its log and its temporary files in `folder`,
    /// and waits until it answers.
    ///
    /// # Errors
    /// When it cannot be started or does not answer.
    pub async fn start(program: &Path, folder: &Path) -> Result<Self, EmulatorError> {
        let mut last = None;
        for _ in 0..START_TRIES {
            match Self::start_once(program, folder).await {
                Ok(emulator) => return Ok(emulator),
                // Someone may have taken the port between our look and its bind.
                Err(error @ EmulatorError::Silent { .. }) => last = Some(error),
                Err(error) => return Err(error),
            }
        }
        Err(last.unwrap_or(EmulatorError::NotNamed))
    }

    async fn start_once(program: &Path, folder: &Path) -> Result<Self, EmulatorError> {
        let failed = |source: io::Error| EmulatorError::Start {
            program: program.to_owned(),
            source,
        };
        let folder = std::path::absolute(folder).map_err(failed)?;
        let scratch = folder.join("tmp");
        fs::create_dir_all(&scratch).map_err(failed)?;
        let log = folder.join("ministack.log");
        let port = TcpListener::bind(("127.0.0.1", 0))
            .and_then(|listener| listener.local_addr())
            .map_err(failed)?
            .port();
        let endpoint = format!("http://127.0.0.1:{port}");
        let mut environment = process::base_environment();
        let own: [(&str, OsString); 11] = [
            ("GATEWAY_PORT", port.to_string().into()),
            // Its default listens on every interface.
            ("BIND_HOST", "127.0.0.1".into()),
            ("MINISTACK_HOST", "127.0.0.1".into()),
            ("MINISTACK_REGION", sdk::REGION.into()),
            ("MINISTACK_ACCOUNT_ID", ACCOUNT.into()),
            // What its Lambdas call.
            ("AWS_ENDPOINT_URL", endpoint.clone().into()),
            ("AWS_ACCESS_KEY_ID", sdk::ACCESS_KEY.into()),
            ("AWS_SECRET_ACCESS_KEY", sdk::SECRET_KEY.into()),
            ("AWS_EC2_METADATA_DISABLED", "true".into()),
            ("TMPDIR", scratch.clone().into()),
            ("PYTHONUNBUFFERED", "1".into()),
        ];
        environment.extend(BTreeMap::from(
            own.map(|(name, value)| (name.to_owned(), value)),
        ));
        // A venv's script starts with its interpreter's path: it needs no activation.
        let spec = process::Spec {
            program,
            args: &[],
            environment,
            directory: &folder,
            log: &log,
        };
        let mut child = process::spawn(&spec).map_err(failed)?;
        let leader = child.id().unwrap_or_default();
        let started = Instant::now();
        let problem = loop {
            if let Ok(Some(status)) = child.try_wait() {
                break format!("it ended with {status}");
            }
            let health = http::send(
                Method::GET,
                &format!("{endpoint}/_ministack/health"),
                &[],
                String::new(),
            )
            .await;
            if health.is_ok() {
                return Ok(Self {
                    endpoint,
                    child,
                    leader,
                    log,
                    scratch,
                });
            }
            if started.elapsed() > START_LIMIT {
                break format!("no answer within {START_LIMIT:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        process::kill_group(leader);
        Err(EmulatorError::Silent {
            program: program.to_owned(),
            problem,
            log,
        })
    }

    /// Where it is served.
    #[must_use]
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Its log file.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Ends it and all it started, and waits until they are gone. There is
    /// nothing to save, so nothing is asked politely.
    pub async fn stop(&mut self) {
        process::kill_group(self.leader);
        let _ = self.child.wait().await;
    }

    /// The log lines of a Lambda function from `since_ms` (epoch) on, oldest
    /// first. They appear when an invocation ends.
    ///
    /// # Errors
    /// When the emulator does not answer.
    pub async fn function_logs(
        &self,
        function: &str,
        since_ms: i64,
    ) -> Result<Vec<LogLine>, EmulatorError> {
        logs(&self.endpoint, function, since_ms).await
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        process::kill_group(self.leader);
        // Nothing is lost with these: unpacked Lambda code.
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// A line that a Lambda function wrote.
#[derive(Debug, Clone)]
pub struct LogLine {
    /// Milliseconds since 1970.
    pub timestamp: i64,
    /// The line.
    pub message: String,
}

impl LogLine {
    /// The line as a JSON object, where it is one.
    #[must_use]
    pub fn json(&self) -> Option<Value> {
        serde_json::from_str(&self.message)
            .ok()
            .filter(Value::is_object)
    }
}

/// CloudWatch Logs' FilterLogEvents, every page.
pub(crate) async fn logs(
    endpoint: &str,
    function: &str,
    since_ms: i64,
) -> Result<Vec<LogLine>, EmulatorError> {
    let headers = [
        ("content-type", "application/x-amz-json-1.1"),
        ("x-amz-target", "Logs_20140328.FilterLogEvents"),
    ];
    let mut lines = Vec::new();
    let mut token: Option<String> = None;
    loop {
        let mut request =
            json!({"logGroupName": format!("/aws/lambda/{function}"), "startTime": since_ms});
        if let Some(token) = &token {
            request["nextToken"] = json!(token);
        }
        let answer = match http::send(Method::POST, endpoint, &headers, request.to_string()).await {
            Ok(answer) => answer,
            // The group appears with the first invocation.
            Err(error) if error.to_string().contains("ResourceNotFoundException") => {
                return Ok(lines);
            }
            Err(error) => return Err(error.into()),
        };
        let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
        for event in answer["events"].as_array().into_iter().flatten() {
            let message = event["message"].as_str().unwrap_or_default().to_owned();
            lines.push(LogLine {
                timestamp: event["timestamp"].as_i64().unwrap_or_default(),
                message,
            });
        }
        let next = answer["nextToken"].as_str().map(str::to_owned);
        if next.is_none() || next == token {
            break;
        }
        token = next;
    }
    lines.sort_by_key(|line| line.timestamp);
    Ok(lines)
}
