//! A worker's process, from start to stop, with what it cost.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cloud::{Cloud, Run};

/// The reference worker, written into the program so that it can be run from
/// anywhere.
const REFERENCE: &str = include_str!("../reference_worker.py");

/// Between looks at the queue.
const POLL: Duration = Duration::from_millis(100);

/// Between looks for the first vector.
const FIRST_POLL: Duration = Duration::from_millis(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Task,
    /// One message at a time, in Python.
    Reference,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Task => "gpu-task",
            Kind::Reference => "reference",
        }
    }
}

pub struct Worker {
    pub kind: Kind,
    pub program: PathBuf,
    pub variables: Vec<(String, String)>,
}

/// What a run took; times count from the process's start.
pub struct Finished {
    pub first_vector: Duration,
    pub done: Duration,
    /// Processor time from the start to the last deletion.
    pub cpu: Duration,
    /// Processor time between the first vector and the last deletion.
    pub working_cpu: Duration,
    pub peak_bytes: u64,
    pub exit_code: Option<i32>,
    pub stop: Duration,
}

impl Worker {
    pub async fn run(
        &self,
        cloud: &Cloud,
        run: &Run,
        s3_endpoint: &str,
        logs: &Path,
        limit: Duration,
    ) -> Result<Finished> {
        let name = self.kind.name();
        let output = File::create(logs.join(format!("{name}.stdout")))?;
        let errors = File::create(logs.join(format!("{name}.stderr")))?;
        let mut command = Command::new(&self.program);
        if self.kind == Kind::Reference {
            let script = logs.join("reference_worker.py");
            std::fs::write(&script, REFERENCE)?;
            command.arg(script);
        }
        command
            .env("INPUT_QUEUE_URL", &run.input_queue)
            .env("DEAD_LETTER_QUEUE_URL", &run.dead_letters)
            .env("OUTPUT_TOPIC_ARN", &run.topic)
            .env("CACHE_BUCKET", &run.cache)
            .env("IDLE_EXIT_SECONDS", "0")
            .env("AWS_ENDPOINT_URL", &cloud.endpoint)
            .env("AWS_ENDPOINT_URL_S3", s3_endpoint)
            .env("AWS_REGION", "us-east-1")
            .env("AWS_DEFAULT_REGION", "us-east-1")
            .env("AWS_ACCESS_KEY_ID", "bench")
            .env("AWS_SECRET_ACCESS_KEY", "bench")
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .envs(self.variables.iter().cloned())
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let mut watched = watch(cloud, run, started, limit, &mut child).await;
        let asked_to_stop = Instant::now();
        if child.try_wait()?.is_none() {
            // SAFETY: nobody has waited for the child yet, so the number
            // cannot belong to another process.
            unsafe { libc::kill(libc::pid_t::try_from(child.id())?, libc::SIGTERM) };
        }
        let status = child.wait()?;
        if let Ok(finished) = &mut watched {
            finished.exit_code = status.code();
            finished.stop = asked_to_stop.elapsed();
        }
        watched.with_context(|| format!("{name} ended with {status}; see {name}.stderr"))
    }
}

async fn watch(
    cloud: &Cloud,
    run: &Run,
    started: Instant,
    limit: Duration,
    child: &mut Child,
) -> Result<Finished> {
    let pid = child.id();
    let mut look = || -> Result<()> {
        if child.try_wait()?.is_some() {
            bail!("it ended early");
        }
        if started.elapsed() > limit {
            bail!("it took more than {} s", limit.as_secs());
        }
        Ok(())
    };
    while !cloud.has_vector(run).await? {
        look()?;
        tokio::time::sleep(FIRST_POLL).await;
    }
    let first_vector = started.elapsed();
    let cpu_before = cpu_so_far(pid)?;
    while cloud.backlog(&run.input_queue).await? > 0 {
        look()?;
        tokio::time::sleep(POLL).await;
    }
    let cpu = cpu_so_far(pid)?;
    Ok(Finished {
        first_vector,
        done: started.elapsed(),
        cpu,
        working_cpu: cpu.saturating_sub(cpu_before),
        peak_bytes: peak_bytes(pid)?,
        exit_code: None,
        stop: Duration::ZERO,
    })
}

/// Ticks of a second in `/proc`, the same on every Linux for programs.
const USER_HZ: f64 = 100.0;

/// Processor time that a running process has taken so far, from
/// `/proc/PID/stat`: fields 14 and 15, in ticks.
fn cpu_so_far(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in the second field may hold anything but ends at the last ')'.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let mut ticks = 0.0;
    for field in fields.split_whitespace().skip(11).take(2) {
        ticks += field.parse::<f64>()?;
    }
    Ok(Duration::from_secs_f64(ticks / USER_HZ))
}

fn peak_bytes(pid: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kilobytes
        .context("VmHWM of /proc/PID/status")?
        .trim()
        .parse::<u64>()?
        * 1024)
}
