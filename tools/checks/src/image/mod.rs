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
use std::path::Path;

use anyhow::Context;

pub use elf::resolve;

/// Largest image, compressed: what an instance pulls at each cold start.
const MAX_COMPRESSED_BYTES: u64 = 1_200_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
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

pub struct Request<'a> {
    pub variant: Variant,
    pub root: &'a Path,
    pub gpu_task: &'a Path,
    pub model: &'a Path,
    pub work: &'a Path,
    /// A Python with pip, for the wheels.
    pub python: &'a Path,
    pub emulator: &'a Path,
    pub stand_in: &'a Path,
    /// The program that runs a model over it, `cuda-soak`.
    pub soak: &'a Path,
    /// A model bundle in fp16 for it.
    pub rehearsal_model: &'a Path,
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
pub fn build(request: &Request<'_>) -> anyhow::Result<Report> {
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
    let rehearsal = match request.variant {
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
        variant: request.variant,
        layers,
        elf,
        trial,
        rehearsal,
        problems,
    })
}

/// Rehearses the CUDA path alone: with the image's native libraries, without
/// its root filesystem. Whether all is well.
pub fn rehearse(request: &Request<'_>) -> anyhow::Result<bool> {
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
