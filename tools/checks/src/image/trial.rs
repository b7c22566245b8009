//! Runs the task in the assembled root filesystem: as the unprivileged user of
//! the task definition, with a read-only root, against the AWS emulator.

use std::path::Path;
use std::process::{Command, Output};
use std::time::Instant;

use anyhow::{Context, ensure};
use ministack::MiniStack;
use ministack::REGION;
use serde_json::{Value, json};

use super::Request;
use super::assemble::USER;

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
pub(super) fn run(request: &Request, root: &Path) -> anyhow::Result<Vec<String>> {
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

fn enter(
    request: &Request,
    root: &Path,
    variables: &[(&str, String)],
    arguments: &[&str],
) -> anyhow::Result<Output> {
    ensure_root()?;
    let mut command = Command::new("unshare");
    command
        .args("--mount --propagation private --pid --fork sh -c".split(' '))
        .args([ENTER, "sh"])
        .arg(root)
        .arg(&request.model)
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
    command.env("LD_LIBRARY_PATH", "/opt/clip:/usr/lib64");
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
fn embed(request: &Request, root: &Path) -> anyhow::Result<String> {
    let emulator = Emulator::start(&request.emulator)?;
    for bucket in ["images", "cache"] {
        emulator.s3("PUT", bucket, b"")?;
    }
    emulator.s3("PUT", "images/trial.png", IMAGE)?;
    let (input, dead, output) = (
        emulator.queue("input")?,
        emulator.queue("dead")?,
        emulator.queue("output")?,
    );
    let event = document_created(0, "s3://images/trial.png", "image/png", IMAGE.len());
    emulator.sqs(
        "SendMessage",
        json!({ "QueueUrl": input, "MessageBody": event.to_string() }),
    )?;
    let mut variables = emulator.variables();
    variables.extend([
        ("INPUT_QUEUE_URL", input),
        ("DEAD_LETTER_QUEUE_URL", dead.clone()),
        ("OUTPUT_QUEUE_URL", output.clone()),
        ("MODEL_PATH", "/models".to_owned()),
        // The CUDA image's library runs models on the processor as well.
        ("EXECUTION_PROVIDER", "cpu".to_owned()),
        ("IDLE_EXIT_SECONDS", "3".to_owned()),
    ]);
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

pub(super) struct Emulator(MiniStack);

impl Emulator {
    pub(super) fn start(program: &Path) -> anyhow::Result<Self> {
        Ok(Self(MiniStack::start(program, Path::new("/dev/null"))?))
    }

    /// What a task needs to find it, but for its queues.
    pub(super) fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", self.0.endpoint().to_owned()),
            ("AWS_REGION", REGION.to_owned()),
            ("AWS_ACCESS_KEY_ID", "test".to_owned()),
            ("AWS_SECRET_ACCESS_KEY", "test".to_owned()),
            ("CACHE_BUCKET", "cache".to_owned()),
            ("LOG_FORMAT", "json".to_owned()),
        ]
    }

    /// Makes a queue; answers its URL.
    pub(super) fn queue(&self, name: &str) -> anyhow::Result<String> {
        let answer = self.sqs("CreateQueue", json!({ "QueueName": name }))?;
        let url = answer["QueueUrl"].as_str();
        Ok(url.context("the emulator made no queue")?.to_owned())
    }

    pub(super) fn s3(&self, method: &str, path: &str, body: &[u8]) -> anyhow::Result<Vec<u8>> {
        self.request(method, &format!("/{path}"), "s3", &[], body)
    }

    pub(super) fn sqs(&self, operation: &str, input: Value) -> anyhow::Result<Value> {
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

    /// The emulator asks for no signature, but tells the services apart by it.
    fn request(
        &self,
        method: &str,
        path: &str,
        service: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> anyhow::Result<Vec<u8>> {
        let signed = format!(
            "AWS4-HMAC-SHA256 Credential=test/20260101/{REGION}/{service}/aws4_request, \
             SignedHeaders=host, Signature=0"
        );
        let headers = [headers, &[("Authorization", signed.as_str())]].concat();
        Ok(self.0.request(method, path, &headers, body)?)
    }
}

/// The event of an image, with ids that end in its number.
pub(super) fn document_created(number: usize, url: &str, kind: &str, size: usize) -> Value {
    let document = json!({ "url": url, "type": kind, "size": size });
    json!({
        "specversion": "1.0",
        "id": format!("1780d5de-fd6f-4530-98d7-{number:012}"),
        "type": "document-created",
        "time": "2026-01-01T00:00:00.000Z",
        "data": {
            "chainId": format!("6ebf76e4-f70c-440c-98f9-{number:012}"),
            "source": document,
            "document": document,
        },
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}
