//! The container image's root filesystem, assembled without a Docker engine
//! from what `gpu-task/Dockerfile` uses: Debian's packages for the base, the
//! pinned wheels for the native libraries, the release build for the program.
//!
//! What must hold in it: every needed library, version and symbol is there
//! but the driver's; nothing needs cuFFT; the task runs in it as an
//! unprivileged user with a read-only root, and embeds an image; in a
//! rehearsal without a GPU, its CUDA path opens the libraries that it has and
//! no others.

mod assemble;
mod elf;
mod rehearsal;
mod trial;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

pub use elf::resolve;

/// Largest image, compressed: what an instance pulls at each cold start.
const MAX_COMPRESSED_BYTES: u64 = 1_200_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    /// For trials without a GPU.
    Cpu,
    /// For GPU instances.
    Cuda,
}

impl Variant {
    fn name(self) -> &'static str {
        match self {
            Variant::Cpu => "cpu",
            Variant::Cuda => "cuda",
        }
    }
}

/// What to assemble, from what. Relative paths are the workspace's.
#[derive(Args)]
pub struct Request {
    /// The image for trials without a GPU (the default)
    #[arg(long = "cpu", conflicts_with = "cuda")]
    _cpu: bool,
    /// The image for GPU instances
    #[arg(long)]
    cuda: bool,
    /// Only rehearse the CUDA path, over stand-ins of CUDA's libraries
    #[arg(long, requires = "cuda")]
    pub rehearse: bool,
    /// The release build of gpu-task
    #[arg(long, default_value = "target/release/gpu-task", value_parser = whole)]
    gpu_task: PathBuf,
    /// A model bundle for one inference
    #[arg(long, value_parser = whole)]
    model: PathBuf,
    /// A model bundle of ViT-B/32 in fp16, for the rehearsal
    #[arg(long, required_if_eq("cuda", "true"), value_parser = whole)]
    rehearsal_model: Option<PathBuf>,
    /// The folder of libcuda_stand_in.so and cuda-soak, for the rehearsal
    #[arg(long, default_value = "target/debug", value_parser = whole)]
    stand_ins: PathBuf,
    /// Downloads and the root filesystem are kept here
    #[arg(long, default_value = ".tools/image", value_parser = whole)]
    work: PathBuf,
    /// A Python with pip, which downloads the native libraries
    #[arg(long, default_value = "python3")]
    python: PathBuf,
    /// The AWS emulator's program, for the trial
    #[arg(
        long,
        env = "LOCAL_MINISTACK",
        default_value = ".tools/venv/bin/ministack",
        value_parser = whole
    )]
    emulator: PathBuf,
}

/// Programs that are started elsewhere, or see another root, are told whole paths.
fn whole(path: &str) -> std::io::Result<PathBuf> {
    std::path::absolute(path)
}

impl Request {
    fn variant(&self) -> Variant {
        if self.cuda {
            Variant::Cuda
        } else {
            Variant::Cpu
        }
    }

    fn rehearsal_model(&self) -> &Path {
        self.rehearsal_model.as_ref().unwrap_or(&self.model)
    }
}

struct Layer {
    name: &'static str,
    bytes: u64,
    compressed: u64,
}

pub struct Report {
    variant: Variant,
    layers: Vec<Layer>,
    elf: elf::Summary,
    trial: Vec<String>,
    rehearsal: rehearsal::Rehearsal,
    problems: Vec<String>,
}

impl Report {
    pub fn is_good(&self) -> bool {
        self.problems.is_empty()
    }
}

/// Assembles the image, checks it and runs the task in it.
pub fn build(request: &Request) -> anyhow::Result<Report> {
    let image = assemble::assemble(request)?;
    eprintln!("resolving libraries …");
    let elf = elf::resolve(&image.root)?;
    let mut problems = elf.problems.clone();
    eprintln!("running gpu-task in the image …");
    let trial = match trial::run(request, &image.root) {
        Ok(lines) => lines,
        Err(error) => {
            problems.push(format!("{error:#}"));
            Vec::new()
        }
    };
    let rehearsal = match request.variant() {
        Variant::Cpu => rehearsal::Rehearsal::default(),
        Variant::Cuda => {
            eprintln!("rehearsing CUDA …");
            rehearsal::rehearse(request, &image.root.join("opt/clip"))?
        }
    };
    problems.extend(rehearsal.problems.iter().cloned());
    eprintln!("compressing layers …");
    let mut layers = Vec::new();
    for (name, folder) in &image.layers {
        let (bytes, compressed) =
            assemble::sizes(folder).with_context(|| format!("layer {name}"))?;
        layers.push(Layer {
            name,
            bytes,
            compressed,
        });
    }
    let compressed: u64 = layers.iter().map(|layer| layer.compressed).sum();
    if compressed > MAX_COMPRESSED_BYTES {
        problems.push(format!(
            "{compressed} bytes compressed are more than {MAX_COMPRESSED_BYTES}"
        ));
    }
    Ok(Report {
        variant: request.variant(),
        layers,
        elf,
        trial,
        rehearsal,
        problems,
    })
}

/// Rehearses the CUDA path alone: with the image's native libraries, without
/// its root filesystem. Whether all is well.
pub fn rehearse(request: &Request) -> anyhow::Result<bool> {
    let layer = request.work.join("rehearsal-libraries");
    assemble::remove(&layer)?;
    assemble::libraries(request, &layer)?;
    let rehearsal = rehearsal::rehearse(request, &layer.join("opt/clip"))?;
    assemble::remove(&layer)?;
    print!("{rehearsal}");
    for problem in &rehearsal.problems {
        println!("  PROBLEM: {problem}");
    }
    Ok(rehearsal.problems.is_empty())
}

impl fmt::Display for rehearsal::Rehearsal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let opened: Vec<&str> = self.opened.iter().map(String::as_str).collect();
        writeln!(
            formatter,
            "  CUDA rehearsed without a GPU; needed at run time: {}",
            opened.join(", ")
        )?;
        for line in &self.lines {
            writeln!(formatter, "    {line}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mega = |bytes: u64| bytes as f64 / 1e6;
        writeln!(formatter, "image {}", self.variant.name())?;
        writeln!(
            formatter,
            "  {:<24} {:>10} {:>14}",
            "layer", "MB", "MB compressed"
        )?;
        for layer in &self.layers {
            writeln!(
                formatter,
                "  {:<24} {:>10.1} {:>14.1}",
                layer.name,
                mega(layer.bytes),
                mega(layer.compressed)
            )?;
        }
        let total = |size: fn(&Layer) -> u64| mega(self.layers.iter().map(size).sum());
        writeln!(
            formatter,
            "  {:<24} {:>10.1} {:>14.1}",
            "all",
            total(|layer| layer.bytes),
            total(|layer| layer.compressed)
        )?;
        writeln!(
            formatter,
            "  {} programs and libraries, every one that they need is there but the driver's: {}",
            self.elf.objects,
            self.elf.left_to_the_driver.join(", ")
        )?;
        for line in &self.trial {
            writeln!(formatter, "  {line}")?;
        }
        if self.variant == Variant::Cuda {
            write!(formatter, "{}", self.rehearsal)?;
        }
        for problem in &self.problems {
            writeln!(formatter, "  PROBLEM: {problem}")?;
        }
        write!(
            formatter,
            "{}",
            if self.is_good() { "good" } else { "not good" }
        )
    }
}
