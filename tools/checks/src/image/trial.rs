//! Runs the task in the assembled root filesystem: as the unprivileged user of
//! the task definition, with a read-only root, against the AWS emulator.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::Request;
use super::assemble::USER;

/// How long the emulator may take to answer.
const EMULATOR_START: Duration = Duration::from_secs(30);

/// A mount namespace in which the image's root is read-only, with what the
/// task definition mounts: a temporary folder, and here the model. Arguments:
/// root, model, user, then the command.
const ENTER: &str = r#"
set -e
root=$1 model=$2 user=$3
shift 3
mount --bind "$root" "$root"
mount --bind "$model" "$root/models"
mount --bind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs -o size=512m,mode=1777 tmpfs "$root/tmp"
mount -o remount,ro,bind "$root/models"
mount -o remount,ro,bind "$root"
if touch "$root/home/nonroot/probe" 2>/dev/null; then
    echo "the root is writable" >&2
    exit 90
fi
exec setpriv --no-new-privs chroot --userspec="$user:$user" "$root" "$@"
"#;

/// A small PNG; any image would do.
const IMAGE: &[u8] = include_bytes!("trial.png");

/// Runs `gpu-task --version`, tries to write to the root, and embeds one
/// image. Answers what was seen.
pub(super) fn run(request: &Request<'_>, root: &Path) -> anyhow::Result<Vec<String>> {
    let mut lines = Vec::new();
    let version = enter(request, root, &[], &["--version"])?;
    ensure!(
        version.status.success(),
        "gpu-task --version ended with {}: {}",
        version.status,
        text(&version.stderr)
    );
    lines.push(format!(
        "{} runs as user {USER} with a read-only root",
        text(&version.stdout)
    ));
    lines.push(embed(request, root)?);
    Ok(lines)
}

/// Runs gpu-task in the image.
fn enter(
    request: &Request<'_>,
    root: &Path,
    variables: &[(&str, String)],
    arguments: &[&str],
) -> anyhow::Result<Output> {
    ensure_root()?;
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--propagation",
            "private",
            "--pid",
            "--fork",
            "sh",
            "-c",
            ENTER,
            "sh",
        ])
        .arg(root)
        .arg(request.model)
        .arg(USER.to_string())
        .arg("/usr/local/bin/gpu-task")
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    for (name, value) in variables {
        command.env(name, value);
    }
    // As the Dockerfile's ENV says.
    command.env("ORT_DYLIB_PATH", "/opt/clip/libonnxruntime.so");
    command.env("LD_LIBRARY_PATH", "/opt/clip");
    command
        .output()
        .context("unshare cannot be started (util-linux)")
}

/// Mount namespaces and chroot need it; a container engine does the same as
/// root.
fn ensure_root() -> anyhow::Result<()> {
    let output = Command::new("id")
        .arg("-u")
        .output()
        .context("id cannot be started")?;
    ensure!(
        text(&output.stdout) == "0",
        "entering the image's root filesystem needs root: run this with sudo"
    );
    Ok(())
}

/// One image through the whole task: message in, vector in the bucket, event
/// out, message gone.
fn embed(request: &Request<'_>, root: &Path) -> anyhow::Result<String> {
    let emulator = Emulator::start(request.emulator)?;
    for bucket in ["images", "cache"] {
        emulator.s3("PUT", bucket, b"")?;
    }
    emulator.s3("PUT", "images/trial.png", IMAGE)?;
    let queue = |name: &str| -> anyhow::Result<String> {
        let answer = emulator.sqs("CreateQueue", json!({ "QueueName": name }))?;
        Ok(answer["QueueUrl"]
            .as_str()
            .context("the emulator made no queue")?
            .to_owned())
    };
    let (input, dead, output) = (queue("input")?, queue("dead")?, queue("output")?);
    let document =
        json!({ "url": "s3://images/trial.png", "type": "image/png", "size": IMAGE.len() });
    let event = json!({
        "specversion": "1.0",
        "id": "1780d5de-fd6f-4530-98d7-82ebee85ea39",
        "type": "document-created",
        "time": "2026-01-01T00:00:00.000Z",
        "data": {
            "chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
            "source": document,
            "document": document,
        },
    });
    emulator.sqs(
        "SendMessage",
        json!({ "QueueUrl": input, "MessageBody": event.to_string() }),
    )?;
    let variables = [
        ("AWS_ENDPOINT_URL", emulator.url()),
        ("AWS_REGION", REGION.to_owned()),
        ("AWS_ACCESS_KEY_ID", "test".to_owned()),
        ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
        ("INPUT_QUEUE_URL", input),
        ("DEAD_LETTER_QUEUE_URL", dead.clone()),
        ("OUTPUT_QUEUE_URL", output.clone()),
        ("CACHE_BUCKET", "cache".to_owned()),
        ("MODEL_PATH", "/models".to_owned()),
        // The CUDA image's library runs models on the processor as well.
        ("EXECUTION_PROVIDER", "cpu".to_owned()),
        ("IDLE_EXIT_SECONDS", "3".to_owned()),
        ("LOG_FORMAT", "json".to_owned()),
    ];
    let start = Instant::now();
    let run = enter(request, root, &variables, &[])?;
    let took = start.elapsed();
    ensure!(
        run.status.success(),
        "gpu-task ended with {}: {}",
        run.status,
        text(&run.stderr)
    );
    let published = emulator.message(&output)?.with_context(|| {
        let rejected = emulator.message(&dead).ok().flatten();
        format!(
            "gpu-task published nothing; rejected: {rejected:?}; log: {}",
            text(&run.stderr)
        )
    })?;
    let embeddings = &published["data"]["metadata"]["properties"]["attrs"]["embeddings"];
    let key = embeddings["vectors"]
        .as_str()
        .and_then(|url| url.strip_prefix("s3://"))
        .context("the event names no vector")?;
    let vector: Value = serde_json::from_slice(&emulator.s3("GET", key, b"")?)?;
    let numbers = vector.as_array().map_or(0, Vec::len);
    let is_right = numbers > 0 && embeddings["dimensions"] == numbers;
    ensure!(
        is_right,
        "the vector has {numbers} numbers, the event says {}",
        embeddings["dimensions"]
    );
    Ok(format!(
        "one image embedded on the CPU in it: {numbers} numbers, {} ({:.1} s with 3 s idle)",
        embeddings["model"].as_str().unwrap_or_default(),
        took.as_secs_f64()
    ))
}

/// Region of the emulator.
const REGION: &str = "us-east-1";

/// The AWS emulator, until it is dropped.
struct Emulator {
    child: Child,
    port: u16,
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself; there is nobody left to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Emulator {
    fn start(program: &Path) -> anyhow::Result<Self> {
        // The port is free again at once; a clash would end the trial with an error.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let child = Command::new(program)
            .env("GATEWAY_PORT", port.to_string())
            .env("BIND_HOST", "127.0.0.1")
            .env("MINISTACK_HOST", "127.0.0.1")
            .env("MINISTACK_REGION", REGION)
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("the AWS emulator {} cannot be started", program.display()))?;
        let emulator = Self { child, port };
        let deadline = Instant::now() + EMULATOR_START;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            ensure!(
                Instant::now() < deadline,
                "the AWS emulator does not answer"
            );
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(emulator)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn s3(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        self.request(method, &format!("/{path}"), "s3", &[], body)
    }

    fn sqs(&self, operation: &str, input: Value) -> anyhow::Result<Value> {
        let target = format!("AmazonSQS.{operation}");
        let headers = [
            ("X-Amz-Target", target.as_str()),
            ("Content-Type", "application/x-amz-json-1.0"),
        ];
        let answer = self.request("POST", "/", "sqs", &headers, input.to_string().as_bytes())?;
        serde_json::from_slice(&answer).context("the emulator's answer is no JSON")
    }

    /// The JSON body of a message in a queue, if there is one.
    fn message(&self, queue: &str) -> anyhow::Result<Option<Value>> {
        let answer = self.sqs(
            "ReceiveMessage",
            json!({ "QueueUrl": queue, "WaitTimeSeconds": 0 }),
        )?;
        let body = answer["Messages"][0]["Body"].as_str();
        body.map(serde_json::from_str)
            .transpose()
            .context("the message is no JSON")
    }

    /// One HTTP request; the emulator asks for no signature, but tells the
    /// services apart by it.
    fn request(
        &self,
        method: &str,
        path: &str,
        service: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> anyhow::Result<Vec<u8>> {
        let mut connection = TcpStream::connect(("127.0.0.1", self.port))?;
        connection.set_read_timeout(Some(EMULATOR_START))?;
        let mut head = format!(
            "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1:{}\r\nContent-Length: {}\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=test/20260101/{REGION}/{service}/aws4_request, \
             SignedHeaders=host, Signature=0\r\n",
            self.port,
            body.len()
        );
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        head.push_str("\r\n");
        connection.write_all(head.as_bytes())?;
        connection.write_all(body)?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer)?;
        let Some(split) = answer.windows(4).position(|window| window == b"\r\n\r\n") else {
            bail!("the emulator's answer to {method} {path} is no HTTP");
        };
        let status = text(&answer[..split])
            .split(' ')
            .nth(1)
            .unwrap_or_default()
            .to_owned();
        let content = answer[split + 4..].to_vec();
        ensure!(
            status.starts_with('2'),
            "{method} {path}: {status}: {}",
            text(&content)
        );
        Ok(content)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}
