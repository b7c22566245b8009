//! A worker's process, from start to stop, with what it cost.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
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

/// Which worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `gpu-task`.
    Task,
    /// One message at a time, in Python.
    Reference,
}

impl Kind {
    /// The name in the table.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Task => "gpu-task",
            Kind::Reference => "reference",
        }
    }
}

/// How to start a worker.
pub struct Worker {
    pub kind: Kind,
    pub program: PathBuf,
    pub variables: Vec<(String, String)>,
}

/// What a run took; times count from the process's start.
pub struct Finished {
    pub first_vector: Duration,
    pub done: Duration,
    /// Processor time in all, start and stop included.
    pub cpu: Duration,
    /// Processor time between the first vector and the last deletion.
    pub working_cpu: Duration,
    pub peak_bytes: u64,
    pub exit_code: Option<i32>,
    pub stop: Duration,
}

impl Worker {
    /// Runs the worker until the queue is empty.
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
        let watched = self.watch(cloud, run, started, limit, &mut child).await;
        let asked_to_stop = Instant::now();
        let ended = end(child.id())?;
        let watched = watched.with_context(|| {
            format!("{name} ended with {:?}; see {name}.stderr", ended.exit_code)
        })?;
        Ok(Finished {
            first_vector: watched.first_vector,
            done: watched.done,
            working_cpu: watched.working_cpu,
            stop: asked_to_stop.elapsed(),
            ..ended
        })
    }

    async fn watch(
        &self,
        cloud: &Cloud,
        run: &Run,
        started: Instant,
        limit: Duration,
        child: &mut std::process::Child,
    ) -> Result<Watched> {
        let is_alive = |child: &mut std::process::Child| -> Result<()> {
            // Looked at without reaping: the exit status is read with the
            // costs at the end.
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", child.id()))?;
            if stat
                .rsplit(')')
                .next()
                .is_some_and(|rest| rest.starts_with(" Z"))
            {
                bail!("it ended early");
            }
            if started.elapsed() > limit {
                bail!("it took more than {} s", limit.as_secs());
            }
            Ok(())
        };
        while !cloud.has_vector(run).await? {
            is_alive(child)?;
            tokio::time::sleep(FIRST_POLL).await;
        }
        let first_vector = started.elapsed();
        let cpu_before = cpu_so_far(child.id())?;
        while cloud.backlog(&run.input_queue).await? > 0 {
            is_alive(child)?;
            tokio::time::sleep(POLL).await;
        }
        Ok(Watched {
            first_vector,
            done: started.elapsed(),
            working_cpu: cpu_so_far(child.id())?.saturating_sub(cpu_before),
        })
    }
}

/// What was seen of a worker while it ran.
struct Watched {
    first_vector: Duration,
    done: Duration,
    working_cpu: Duration,
}

/// Processor time that a running process has taken so far, from
/// `/proc/PID/stat`: fields 14 and 15, in ticks.
fn cpu_so_far(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name in the second field may hold anything but ends at the last ')'.
    let fields = stat.rsplit(')').next().unwrap_or_default();
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = 0u64;
    for _ in 0..2 {
        ticks += fields
            .next()
            .context("a field of /proc/PID/stat")?
            .parse::<u64>()?;
    }
    // SAFETY: `sysconf` only reads a constant of the system.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// Asks the process to stop, waits for it and reads what it cost.
fn end(pid: u32) -> Result<Finished> {
    let pid = libc::pid_t::try_from(pid)?;
    let mut status = 0;
    // SAFETY: an all-zero `rusage` is a valid value of that plain C struct.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `pid` is a child of ours that nobody has waited for yet, so the
    // number cannot belong to another process; both pointers are to locals.
    let waited = unsafe {
        libc::kill(pid, libc::SIGTERM);
        libc::wait4(pid, &mut status, 0, &mut usage)
    };
    if waited != pid {
        bail!("cannot wait for the worker");
    }
    let time = |value: libc::timeval| {
        Duration::from_secs(value.tv_sec as u64) + Duration::from_micros(value.tv_usec as u64)
    };
    Ok(Finished {
        first_vector: Duration::ZERO,
        done: Duration::ZERO,
        working_cpu: Duration::ZERO,
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        // Linux counts it in kilobytes.
        peak_bytes: usage.ru_maxrss as u64 * 1024,
        exit_code: libc::WIFEXITED(status).then(|| libc::WEXITSTATUS(status)),
        stop: Duration::ZERO,
    })
}
