//! Rehearses the CUDA path where there is no GPU: the real task, ONNX Runtime and CUDA provider over
//! stand-ins of CUDA's libraries (`tools/cuda-stand-in`). Values mean nothing; what runs where, who
//! gets which row, what fails how, and which libraries are opened does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};

use super::assemble::{remove, run};
use super::trial::{Emulator, document_created};
use super::{Request, elf};

/// Libraries of the image that are rehearsed themselves; for the others stand-ins are loaded, which
/// link what those link.
const REAL: &[&str] = &["libonnxruntime", "libcudnn.so.9"];

/// The driver's library, which the container toolkit brings.
const DRIVER: &str = "libcuda.so.1";

const STAND_IN: &str = "libcuda_stand_in.so";

/// What the base image has: Debian's libc6, libgcc-s1 and libstdc++6.
const BASE: &[&str] = &[
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
];

/// Bytes of one image's pixels and values of its embedding, of ViT-B/32 and ViT-B/16.
const IMAGE_BYTES: usize = 224 * 224 * 3;
const ROW_VALUES: usize = 512;

/// Images of the main run, and of each fault.
const IMAGES: usize = 300;
const IMAGES_PER_FAULT: usize = 40;

/// The flag of the device's context that lets waiting threads sleep.
const BLOCKING_SYNC: u64 = 4;

/// Bytes of a log that a problem shows; the reason comes last.
const SHOWN_LOG: usize = 3000;

/// No run takes nearly as long.
const LIMIT: Duration = Duration::from_secs(120);

#[derive(Default)]
pub(super) struct Rehearsal {
    /// Libraries of the image that were opened, linked or not.
    pub opened: BTreeSet<String>,
    pub lines: Vec<String>,
    pub problems: Vec<String>,
}

/// A failure of the GPU, and how the task must take it.
struct Fault {
    /// As the stand-in is told.
    what: String,
    /// The task's largest batch, where the fault needs another than its own.
    batch_size: Option<&'static str>,
    exit: i32,
    says: &'static str,
}

/// Rehearses with the image's native libraries in the folder `libraries`.
pub(super) fn rehearse(request: &Request, libraries: &Path) -> anyhow::Result<Rehearsal> {
    let started = Instant::now();
    let stage = Stage::build(request, libraries)?;
    let mut seen = Rehearsal::default();

    let soak = stage.finish(
        stage
            .command(&request.stand_ins.join("cuda-soak"))
            .arg(request.rehearsal_model()),
    )?;
    match soak.exit {
        Some(0) => seen.lines.push(soak.said.trim().to_owned()),
        _ => bail!("the soak ended with {:?}: {}", soak.exit, soak.log),
    }

    let world = World::start(request)?;
    let idle = stage.task(request, &world, None)?;
    ensure!(
        idle.exit == Some(0),
        "the task ended with {:?}: {}",
        idle.exit,
        idle.log
    );
    world.send(0..IMAGES)?;
    let main = stage.task(request, &world, None)?;
    seen.problems.extend(main.problems(&stage));
    work_off(request, &stage, &world)?;
    world.all_done(0..IMAGES)?;
    if idle.counters.context_flags != BLOCKING_SYNC + 1 {
        seen.problems
            .push("threads that wait for the device spin".to_owned());
    }
    seen.lines.push(format!(
        "the task: {IMAGES} images in {} batches, each vector of its own image; {:.0} kernels, {:.0} \
         fused attentions and {:.0} products a batch; {:.0} MB of device memory at most",
        main.counters.batches - idle.counters.batches,
        per_batch(&main, &idle, |counters| counters.launches),
        per_batch(&main, &idle, |counters| counters.attentions),
        per_batch(&main, &idle, |counters| counters.products),
        main.counters.peak_bytes as f64 / 1e6,
    ));
    seen.opened = main.opened_by_name();
    seen.problems.extend(differences(&stage, &seen.opened));

    for fault in faults(&idle.counters) {
        let problem = endure(request, &stage, &world, &fault)?;
        seen.problems.extend(problem);
        seen.lines.push(format!(
            "{}: exit code {}, \"{}\", and every message is done after it",
            fault.what, fault.exit, fault.says
        ));
    }
    for library in stage.libraries.iter().map(String::as_str).chain([DRIVER]) {
        if !stage.fails_without(request, &world, library)? {
            seen.problems.push(format!(
                "without {library} nothing fails, or nothing names it"
            ));
        }
    }
    seen.lines.push(format!(
        "without any one of these libraries it fails and names it; {:.0} s",
        started.elapsed().as_secs_f64()
    ));
    Ok(seen)
}

fn per_batch(main: &Run, idle: &Run, counter: fn(&Counters) -> u64) -> f64 {
    let batches = main.counters.batches - idle.counters.batches;
    (counter(&main.counters) - counter(&idle.counters)) as f64 / batches.max(1) as f64
}

/// The image must have what is opened, and nothing else.
fn differences(stage: &Stage, opened: &BTreeSet<String>) -> Vec<String> {
    let shipped = &stage.libraries;
    let superfluous = shipped.difference(opened);
    let superfluous =
        superfluous.map(|library| format!("the image has {library}, which nothing opens"));
    let missing = opened.difference(shipped);
    let missing = missing.map(|library| format!("{library} is opened and not in the image"));
    superfluous.chain(missing).collect()
}

/// Failures at load, in the first run and in a later one, by what a run without any counted until it
/// was ready.
fn faults(ready: &Counters) -> Vec<Fault> {
    let fault = |what: String, exit, says| Fault {
        what,
        batch_size: None,
        exit,
        says,
    };
    let (launch, product) = (ready.launches + 20, ready.products + 20);
    vec![
        fault("no-device@1+".to_owned(), 3, "no CUDA-capable device"),
        fault(
            "out-of-memory@1+".to_owned(),
            3,
            "Failed to allocate memory",
        ),
        // The first run's activations have room beside the weights unless the batch is large.
        Fault {
            batch_size: Some("512"),
            ..fault(
                "out-of-memory-in-run@1+".to_owned(),
                3,
                "Failed to allocate memory",
            )
        },
        fault("no-kernel-image@1+".to_owned(), 3, "no kernel image"),
        fault("cudnn@1+".to_owned(), 3, "CUDNN failure"),
        fault(
            format!("illegal-address@{launch}"),
            5,
            "an illegal memory access",
        ),
        fault(format!("product@{product}+"), 5, "CUBLAS"),
        fault(
            format!("product@{product}"),
            0,
            "trying its images one by one",
        ),
        fault("pinned-memory@1+".to_owned(), 0, "cannot pin memory"),
    ]
}

/// A task meets the fault, the next one does not: together they do all work.
fn endure(
    request: &Request,
    stage: &Stage,
    world: &World,
    fault: &Fault,
) -> anyhow::Result<Option<String>> {
    world.send(0..IMAGES_PER_FAULT)?;
    let run = stage.task(request, world, Some(fault))?;
    let problem = if run.exit != Some(fault.exit) || !run.log.contains(fault.says) {
        Some(format!(
            "{}: ended with {:?} instead of {}, or did not say \"{}\": {}",
            fault.what,
            run.exit,
            fault.exit,
            fault.says,
            run.end_of_log()
        ))
    } else if run.counters.faults == 0 && fault.what != "no-device@1+" {
        Some(format!("{}: never met", fault.what))
    } else {
        None
    };
    work_off(request, stage, world).with_context(|| format!("after {}", fault.what))?;
    world
        .all_done(0..IMAGES_PER_FAULT)
        .with_context(|| format!("after {}: {}", fault.what, problem.as_deref().unwrap_or("")))?;
    Ok(problem)
}

/// Lets tasks finish what is left in the queue. Something can be left after a good one as well: a
/// receive that the task before it left behind takes messages with it until their lease ends.
fn work_off(request: &Request, stage: &Stage, world: &World) -> anyhow::Result<()> {
    for _ in 0..3 {
        world.wait_for_leases()?;
        if world.count(&world.input, WAITING)? == 0 {
            return Ok(());
        }
        let successor = stage.task(request, world, None)?;
        ensure!(
            successor.exit == Some(0),
            "the next task ended with {:?}: {}",
            successor.exit,
            successor.end_of_log()
        );
    }
    bail!("three tasks leave messages in the queue");
}

/// The folders of the image that the dynamic linker searches, with stand-ins.
struct Stage {
    folder: PathBuf,
    /// What the image has in `/opt/clip`.
    libraries: BTreeSet<String>,
}

impl Stage {
    fn build(request: &Request, libraries: &Path) -> anyhow::Result<Self> {
        let stage = Stage {
            folder: request.work.join("rehearsal"),
            libraries: fs::read_dir(libraries)?
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<anyhow::Result<_>>()?,
        };
        remove(&stage.folder)?;
        for folder in [stage.image(), stage.driver()] {
            fs::create_dir_all(folder)?;
        }
        let stand_in = request.stand_ins.join(STAND_IN);
        fs::copy(&stand_in, stage.driver().join(STAND_IN))
            .with_context(|| format!("{} is missing", stand_in.display()))?;
        stage.link(&stage.driver().join(DRIVER), &[])?;
        let (real, stood_in): (Vec<_>, Vec<_>) = stage
            .libraries
            .iter()
            .partition(|name| REAL.iter().any(|real| name.starts_with(real)));
        for name in real {
            // Not by a symbolic link: some look for their neighbours where they really are.
            fs::hard_link(libraries.join(name), stage.image().join(name))?;
        }
        // First all of them, so that one can be linked to another.
        for name in &stood_in {
            stage.link(&stage.image().join(name), &[])?;
        }
        for name in stood_in {
            let mut needed = elf::links(&libraries.join(name))?;
            needed.retain(|needed| stage.libraries.contains(needed));
            stage.link(&stage.image().join(name), &needed)?;
        }
        Ok(stage)
    }

    /// `/opt/clip`.
    fn image(&self) -> PathBuf {
        self.folder.join("opt/clip")
    }

    /// `/usr/lib64`, where the container toolkit puts the driver.
    fn driver(&self) -> PathBuf {
        self.folder.join("usr/lib64")
    }

    /// Makes an empty library that links `needed` and the stand-in.
    fn link(&self, path: &Path, needed: &[String]) -> anyhow::Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-nostdlib", "-Wl,--no-as-needed"])
            .arg(format!("-Wl,-soname,{name}"))
            .arg("-o")
            .arg(path)
            .arg("-L")
            .arg(self.image())
            .arg("-L")
            .arg(self.driver())
            .args(needed.iter().map(|needed| format!("-l:{needed}")))
            .arg(format!("-l:{STAND_IN}"));
        run(&mut compiler)
    }

    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        let search = format!("{}:{}", self.image().display(), self.driver().display());
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("ORT_DYLIB_PATH", self.image().join("libonnxruntime.so"))
            .env("LD_LIBRARY_PATH", search)
            .env("LD_DEBUG", "files,libs")
            .env("LD_DEBUG_OUTPUT", self.folder.join("linker"))
            .env("CUDA_STAND_IN_IMAGE_BYTES", IMAGE_BYTES.to_string())
            .env("CUDA_STAND_IN_ROW_VALUES", ROW_VALUES.to_string())
            .env("CUDA_STAND_IN_COUNTERS", self.counters());
        command
    }

    fn counters(&self) -> PathBuf {
        self.folder.join("counters")
    }

    fn task(&self, request: &Request, world: &World, fault: Option<&Fault>) -> anyhow::Result<Run> {
        let mut command = self.command(&request.gpu_task);
        command
            .env("EXECUTION_PROVIDER", "cuda")
            .env("MODEL_PATH", request.rehearsal_model())
            .envs(world.emulator.variables())
            .env("INPUT_QUEUE_URL", &world.input)
            .env("DEAD_LETTER_QUEUE_URL", &world.dead)
            .env("OUTPUT_QUEUE_URL", &world.output)
            .env("EXTRACT_LABELS", "false")
            .env("VISIBILITY_TIMEOUT_SECONDS", "10")
            .env("IDLE_EXIT_SECONDS", "2")
            .env("IMAGE_LINES_PER_SECOND", "0");
        if let Some(fault) = fault {
            command.env("CUDA_STAND_IN_FAULT", &fault.what);
            command.envs(fault.batch_size.map(|size| ("BATCH_SIZE", size)));
        }
        self.finish(&mut command)
    }

    fn finish(&self, command: &mut Command) -> anyhow::Result<Run> {
        fs::write(self.counters(), b"")?;
        let (said, log) = (self.folder.join("said"), self.folder.join("log"));
        let mut child = command
            .stdout(File::create(&said)?)
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            match child.try_wait()? {
                Some(status) => break status,
                None if Instant::now() > deadline => {
                    child.kill()?;
                    break child.wait()?;
                }
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        let linker = self.folder.join(format!("linker.{}", child.id()));
        let opened = opened(&fs::read_to_string(&linker)?);
        fs::remove_file(&linker)?;
        Ok(Run {
            exit: status.code(),
            said: fs::read_to_string(&said)?,
            log: String::from_utf8_lossy(&fs::read(&log)?)
                .lines()
                .filter(|line| !line.contains(r#""level":"INFO""#))
                .collect::<Vec<_>>()
                .join("\n"),
            opened,
            counters: Counters::read(&self.counters())?,
        })
    }

    /// Whether a task fails without the library, and says which one it wants.
    fn fails_without(
        &self,
        request: &Request,
        world: &World,
        library: &str,
    ) -> anyhow::Result<bool> {
        let folder = if library == DRIVER {
            self.driver()
        } else {
            self.image()
        };
        let aside = self.folder.join("aside");
        fs::rename(folder.join(library), &aside)?;
        let run = self.task(request, world, None);
        fs::rename(&aside, folder.join(library))?;
        // The provider names cuDNN without its version.
        let name = match library.split_once(".so") {
            Some((stem, _)) => format!("{stem}.so"),
            None => library.to_owned(),
        };
        let problems = run?.problems(self);
        Ok(problems.iter().any(|problem| problem.contains(&name)))
    }
}

struct Run {
    exit: Option<i32>,
    said: String,
    /// On standard error, but for what is no trouble.
    log: String,
    /// Every library that the dynamic linker opened, by the name that was asked for.
    opened: BTreeMap<String, PathBuf>,
    counters: Counters,
}

impl Run {
    fn end_of_log(&self) -> &str {
        let start = self.log.len().saturating_sub(SHOWN_LOG);
        &self.log[self.log.ceil_char_boundary(start)..]
    }

    fn problems(&self, stage: &Stage) -> Vec<String> {
        let mut problems = Vec::new();
        if self.exit != Some(0) {
            problems.push(format!(
                "the task ended with {:?}: {}",
                self.exit,
                self.end_of_log()
            ));
        }
        for (name, path) in &self.opened {
            if !path.starts_with(&stage.folder) && !BASE.contains(&name.as_str()) {
                let path = path.display();
                problems.push(format!(
                    "{name} is not in the image; this machine's {path} was opened"
                ));
            }
        }
        problems
    }

    fn opened_by_name(&self) -> BTreeSet<String> {
        let names = self.opened.keys().cloned();
        names
            .filter(|name| !BASE.contains(&name.as_str()) && name != STAND_IN && name != DRIVER)
            .collect()
    }
}

/// Reads what the dynamic linker says of its work (`LD_DEBUG=files,libs`).
fn opened(said: &str) -> BTreeMap<String, PathBuf> {
    let mut opened = BTreeMap::new();
    let mut tried = PathBuf::new();
    for line in said.lines() {
        if let Some((_, path)) = line.split_once("trying file=") {
            tried = PathBuf::from(path.trim());
        }
        let is_opened = line.contains("generating link map");
        let asked = line.split_once("file=").filter(|_| is_opened);
        if let Some((name, _)) = asked.and_then(|(_, rest)| rest.split_once(" [")) {
            let path = if name.contains('/') {
                PathBuf::from(name)
            } else {
                tried.clone()
            };
            let name = path.file_name().unwrap_or_default();
            opened.insert(name.to_string_lossy().into_owned(), path);
        }
    }
    opened
}

/// What the stand-in counted, in the order of its file.
struct Counters {
    launches: u64,
    attentions: u64,
    products: u64,
    peak_bytes: u64,
    batches: u64,
    context_flags: u64,
    faults: u64,
}

impl Counters {
    fn read(path: &Path) -> anyhow::Result<Self> {
        let bytes = fs::read(path)?;
        let mut words = bytes.chunks_exact(8).map(|word| {
            let word = word.try_into().unwrap_or_default();
            u64::from_ne_bytes(word)
        });
        let mut next = || words.next().unwrap_or(0);
        let (launches, attentions, products) = (next(), next(), next());
        let (_allocations, _bytes, peak_bytes) = (next(), next(), next());
        let (batches, _rows, _handles) = (next(), next(), next());
        Ok(Self {
            launches,
            attentions,
            products,
            peak_bytes,
            batches,
            context_flags: next(),
            faults: next(),
        })
    }
}

struct World {
    emulator: Emulator,
    input: String,
    dead: String,
    output: String,
}

impl World {
    fn start(request: &Request) -> anyhow::Result<Self> {
        let emulator = Emulator::start(&request.emulator)?;
        for bucket in ["images", "cache"] {
            emulator.s3("PUT", bucket, b"")?;
        }
        for image in 0..IMAGES.max(IMAGES_PER_FAULT) {
            emulator.s3("PUT", &object(image), &bitmap(colour(image)))?;
        }
        Ok(Self {
            input: emulator.queue("input")?,
            dead: emulator.queue("dead")?,
            output: emulator.queue("output")?,
            emulator,
        })
    }

    fn send(&self, images: std::ops::Range<usize>) -> anyhow::Result<()> {
        let images: Vec<usize> = images.collect();
        for part in images.chunks(10) {
            let entries: Vec<Value> = part
                .iter()
                .map(|&image| {
                    json!({ "Id": image.to_string(), "MessageBody": event(image).to_string() })
                })
                .collect();
            let input = json!({ "QueueUrl": self.input, "Entries": entries });
            self.emulator.sqs("SendMessageBatch", input)?;
        }
        Ok(())
    }

    /// Takes all events, and holds them against the images: each has one that leads to its vector.
    fn all_done(&self, images: std::ops::Range<usize>) -> anyhow::Result<()> {
        let mut vectors = BTreeMap::new();
        while self.count(&self.output, WAITING)? > 0 {
            let wanted = json!({ "QueueUrl": self.output, "MaxNumberOfMessages": 10 });
            let answer = self.emulator.sqs("ReceiveMessage", wanted)?;
            for message in answer["Messages"].as_array().into_iter().flatten() {
                let body: Value = serde_json::from_str(message["Body"].as_str().unwrap_or(""))?;
                let data = &body["data"];
                let vector = &data["metadata"]["properties"]["attrs"]["embeddings"]["vectors"];
                vectors.insert(data["source"]["url"].to_string(), vector.clone());
                let receipt = &message["ReceiptHandle"];
                let deletion = json!({ "QueueUrl": self.output, "ReceiptHandle": receipt });
                self.emulator.sqs("DeleteMessage", deletion)?;
            }
        }
        for image in images {
            let source = Value::from(format!("s3://{}", object(image))).to_string();
            let vector = vectors
                .get(&source)
                .with_context(|| format!("no event of {source}"))?;
            let key = vector.as_str().and_then(|url| url.strip_prefix("s3://"));
            let key = key.context("the event names no vector")?;
            let vector: Vec<f64> = serde_json::from_slice(&self.emulator.s3("GET", key, b"")?)?;
            // The stand-in's samples pass through the channels in turn.
            let own = colour(image).into_iter().map(f64::from).cycle();
            ensure!(
                vector.len() == ROW_VALUES && vector.iter().copied().eq(own.take(ROW_VALUES)),
                "the vector of {source} is another image's: {:?}",
                &vector[..3.min(vector.len())]
            );
        }
        ensure!(
            self.count(&self.input, WAITING)? == 0 && self.count(&self.input, IN_FLIGHT)? == 0,
            "messages are left in the queue"
        );
        ensure!(
            self.count(&self.dead, WAITING)? == 0,
            "messages were rejected"
        );
        Ok(())
    }

    /// Until every message that a task died with can be received again.
    fn wait_for_leases(&self) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        while self.count(&self.input, IN_FLIGHT)? > 0 {
            ensure!(Instant::now() < deadline, "messages stay in flight");
            std::thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    fn count(&self, queue: &str, attribute: &str) -> anyhow::Result<u64> {
        let input = json!({ "QueueUrl": queue, "AttributeNames": [attribute] });
        let answer = self.emulator.sqs("GetQueueAttributes", input)?;
        let count = answer["Attributes"][attribute].as_str();
        Ok(count.context("the emulator counts nothing")?.parse()?)
    }
}

const WAITING: &str = "ApproximateNumberOfMessages";
const IN_FLIGHT: &str = "ApproximateNumberOfMessagesNotVisible";

fn object(image: usize) -> String {
    format!("images/{image:04}.bmp")
}

fn colour(image: usize) -> [u8; 3] {
    [image as u8, (image >> 8) as u8 + 100, 255 - image as u8]
}

fn event(image: usize) -> Value {
    let url = format!("s3://{}", object(image));
    document_created(image, &url, "image/bmp", bitmap(colour(image)).len())
}

/// A small image of one colour, which stays that colour at any size.
fn bitmap([red, green, blue]: [u8; 3]) -> Vec<u8> {
    const SIDE: u32 = 16;
    const HEADERS: u32 = 14 + 40;
    let pixels = SIDE * SIDE * 3;
    let mut file = b"BM".to_vec();
    for word in [HEADERS + pixels, 0, HEADERS, 40, SIDE, SIDE] {
        file.extend(word.to_le_bytes());
    }
    // One plane, 24 bits a pixel, no compression.
    file.extend([1, 0, 24, 0]);
    for word in [0, pixels, 0, 0, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend([blue, green, red].repeat((SIDE * SIDE) as usize));
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_linker_opened_is_read_from_its_words() {
        let said = "\
            7:\tfind library=libz.so.1 [0]; searching\n\
            7:\t  trying file=/stage/opt/clip/libz.so.1\n\
            7:\t  trying file=/lib/x86_64-linux-gnu/libz.so.1\n\
            7:\tfile=libz.so.1 [0];  generating link map\n\
            7:\tfind library=libgone.so.1 [0]; searching\n\
            7:\t  trying file=/stage/opt/clip/libgone.so.1\n\
            7:\tfile=/stage/opt/clip/libcudnn.so.9 [0];  dynamically loaded by x [0]\n\
            7:\tfile=/stage/opt/clip/libcudnn.so.9 [0];  generating link map\n";
        let opened: Vec<_> = opened(said).into_values().collect();
        let wanted = [
            "/stage/opt/clip/libcudnn.so.9",
            "/lib/x86_64-linux-gnu/libz.so.1",
        ];
        assert_eq!(opened, wanted.map(PathBuf::from));
    }

    fn stage(libraries: &[&str]) -> Stage {
        Stage {
            folder: PathBuf::from("/stage"),
            libraries: libraries.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn a_library_of_this_machine_is_none_of_the_image() {
        let run = Run {
            exit: Some(0),
            said: String::new(),
            log: String::new(),
            opened: ["/stage/opt/clip/a.so", "/lib/libz.so.1", "/lib/libc.so.6"]
                .map(PathBuf::from)
                .map(|path| {
                    let name = path.file_name().unwrap().to_string_lossy().into_owned();
                    (name, path)
                })
                .into(),
            counters: Counters::read(Path::new("/dev/null")).unwrap(),
        };
        let problems = run.problems(&stage(&["a.so"]));
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("libz.so.1"));
    }

    #[test]
    fn the_image_must_have_what_is_opened_and_nothing_else() {
        let opened = ["a.so", "b.so"].map(str::to_owned).into();
        assert!(differences(&stage(&["a.so", "b.so"]), &opened).is_empty());
        assert_eq!(differences(&stage(&["a.so"]), &opened).len(), 1);
        assert_eq!(
            differences(&stage(&["a.so", "b.so", "c.so"]), &opened).len(),
            1
        );
    }
}
