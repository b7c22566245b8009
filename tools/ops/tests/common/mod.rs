//! An AWS emulator for one test file, and the real program.

#![allow(dead_code)] // Each test file uses a part of it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use ministack::{ACCOUNT, MiniStack};
use serde_json::Value;
use tempfile::TempDir;

const REGION: &str = "eu-west-1";

/// MiniStack, with a folder of its own that it reads its buckets from.
pub struct Emulator {
    emulator: MiniStack,
    pub endpoint: String,
    folder: TempDir,
}

impl Emulator {
    /// Starts it. Before that, `fill` puts files into `FOLDER/BUCKET/KEY`,
    /// which is hundreds of times faster than uploading them.
    pub fn start(fill: impl FnOnce(&Path)) -> Self {
        let program = ministack::program_from_env().unwrap_or_else(|error| panic!("{error}"));
        let folder = tempfile::tempdir().expect("a folder");
        let buckets = folder.path().join(ACCOUNT);
        std::fs::create_dir(&buckets).expect("a folder");
        fill(&buckets);
        let emulator = MiniStack::start_with(
            &program,
            &folder.path().join("emulator.log"),
            &[
                ("MINISTACK_REGION", REGION),
                ("S3_PERSIST", "1"),
                ("S3_DATA_DIR", &folder.path().display().to_string()),
            ],
        );
        let emulator = emulator.unwrap_or_else(|error| panic!("{error}"));
        Self {
            endpoint: emulator.endpoint().to_owned(),
            emulator,
            folder,
        }
    }

    pub fn port(&self) -> u16 {
        self.emulator.port()
    }

    /// A call without the SDK.
    pub fn post(&self, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
        let answer = self.emulator.request("POST", "/", headers, body);
        answer.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(body)))
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
        let path = format!("/_ministack/sqs/messages?QueueUrl={queue}");
        let answer = self.emulator.request("GET", &path, &[], b"");
        let body: Value = serde_json::from_slice(&answer.expect("the messages")).expect("JSON");
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
