//! An AWS emulator for one test file, and the real program.

#![allow(dead_code)] // Each test file uses a part of it.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

/// The emulator's account, for the access key `test`.
const ACCOUNT: &str = "000000000000";

const REGION: &str = "eu-west-1";

/// How long the emulator may take to start on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(30);

/// MiniStack, with a folder of its own that it reads its buckets from.
pub struct Emulator {
    process: Child,
    pub endpoint: String,
    folder: TempDir,
}

impl Emulator {
    /// Starts it. Before that, `fill` puts files into `FOLDER/BUCKET/KEY`,
    /// which is hundreds of times faster than uploading them.
    pub fn start(fill: impl FnOnce(&Path)) -> Self {
        let program = std::env::var_os("LOCAL_MINISTACK").expect(
            "LOCAL_MINISTACK must be the path of the ministack program (MiniStack 1.5.33 from \
             PyPI): run `cargo xtask test`, which installs and names it",
        );
        let folder = tempfile::tempdir().expect("a folder");
        let buckets = folder.path().join(ACCOUNT);
        std::fs::create_dir(&buckets).expect("a folder");
        fill(&buckets);
        let port = free_port();
        let endpoint = format!("http://127.0.0.1:{port}");
        let log = std::fs::File::create(folder.path().join("emulator.log")).expect("a log");
        let process = Command::new(&program)
            .env("GATEWAY_PORT", port.to_string())
            .env("BIND_HOST", "127.0.0.1")
            .env("MINISTACK_REGION", REGION)
            .env("AWS_ENDPOINT_URL", &endpoint)
            .env("S3_PERSIST", "1")
            .env("S3_DATA_DIR", folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a log"))
            .stderr(log)
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "LOCAL_MINISTACK={} cannot be started: {error}",
                    program.display()
                )
            });
        let mut emulator = Self {
            process,
            endpoint,
            folder,
        };
        emulator.wait();
        emulator
    }

    fn wait(&mut self) {
        let start = Instant::now();
        let url = format!("{}/_ministack/health", self.endpoint);
        while ureq::get(&url).call().is_err() {
            let ended = self.process.try_wait().expect("a process");
            if ended.is_some() || start.elapsed() > START_LIMIT {
                let log = std::fs::read_to_string(self.folder.path().join("emulator.log"));
                panic!(
                    "the emulator does not answer ({ended:?}):\n{}",
                    log.unwrap_or_default()
                );
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A folder for a test's own files.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program with this emulator as its AWS, and with nothing of the
    /// surrounding shell that could lead it elsewhere.
    pub fn clip_ops(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_clip-ops"));
        command
            .env_clear()
            .env("AWS_ENDPOINT_URL", &self.endpoint)
            .env("AWS_REGION", REGION)
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "test")
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("RUST_LOG", "warn")
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.clip_ops(arguments).output().expect("the program runs")
    }

    /// The SDK's configuration for this emulator.
    pub fn sdk(&self) -> aws_config::SdkConfig {
        aws_config::SdkConfig::builder()
            .behavior_version(aws_config::BehaviorVersion::latest())
            .http_client(aws_smithy_http_client::Builder::new().build_http())
            .region(aws_config::Region::new(REGION))
            .endpoint_url(&self.endpoint)
            .credentials_provider(aws_sdk_sqs::config::SharedCredentialsProvider::new(
                aws_sdk_sqs::config::Credentials::new("test", "test", None, None, "tests"),
            ))
            .build()
    }

    /// Creates a queue and answers its URL.
    pub async fn queue(&self, name: &str) -> String {
        let sqs = aws_sdk_sqs::Client::new(&self.sdk());
        let created = sqs.create_queue().queue_name(name).send().await;
        let url = created.expect("a queue").queue_url.expect("a URL");
        // As it is reached from here, whatever host name the emulator has.
        format!(
            "{}/{ACCOUNT}/{}",
            self.endpoint,
            url.rsplit('/').next().expect("a name")
        )
    }

    /// Every message of a queue, looked at without receiving it.
    pub fn messages(&self, queue: &str) -> Vec<Value> {
        let url = format!("{}/_ministack/sqs/messages?QueueUrl={queue}", self.endpoint);
        let mut response = ureq::get(&url).call().expect("the messages");
        let text = response
            .body_mut()
            .with_config()
            .limit(1 << 30)
            .read_to_string()
            .expect("a body");
        let body: Value = serde_json::from_str(&text).expect("JSON");
        let mut all = Vec::new();
        let accounts = body["messages"].as_object().expect("accounts");
        for regions in accounts.values() {
            for queues in regions.as_object().expect("regions").values() {
                for messages in queues.as_object().expect("queues").values() {
                    all.extend(messages.as_array().expect("messages").clone());
                }
            }
        }
        all
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        if let Some(group) = rustix::process::Pid::from_raw(self.process.id() as i32) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.process.wait();
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

/// What a program wrote, for a failing test's message.
pub fn text(output: &Output) -> String {
    format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// The JSON that a program wrote.
pub fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no JSON: {}", text(output)))
}
