//! Downloads and unpacks what the image is made of.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use sha2::{Digest, Sha256};

use super::{Request, Variant};

/// What distroless's `cc` image for Debian 12 is made of, as far as the task
/// or its libraries use it.
const BASE_PACKAGES: &[&str] = &[
    "base-files",
    "ca-certificates",
    "libc6",
    "libgcc-s1",
    "libstdc++6",
    "netbase",
    "tzdata",
];

/// Folders of those packages that nothing at run time reads.
const LEFT_OUT: &[&str] = &[
    "usr/share/doc-base",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/sbin",
    "sbin",
];

/// The user of the task definition and of distroless's `nonroot` images.
pub(super) const USER: u32 = 65532;

pub(super) struct Image {
    pub root: PathBuf,
    /// The layers, from the one that changes least.
    pub layers: Vec<(&'static str, PathBuf)>,
}

pub(super) fn assemble(request: &Request) -> anyhow::Result<Image> {
    let name = request.variant().name();
    let folder = request.work.join(name);
    let layers = vec![
        ("base", folder.join("layers/base")),
        ("libraries", folder.join("layers/libraries")),
        ("gpu-task", folder.join("layers/gpu-task")),
    ];
    for (_, layer) in &layers {
        remove(layer)?;
        fs::create_dir_all(layer)?;
    }
    base(request, &layers[0].1)?;
    libraries(request, &layers[1].1)?;
    program(request, &layers[2].1)?;
    let root = folder.join("root");
    remove(&root)?;
    fs::create_dir_all(&root)?;
    for (_, layer) in &layers {
        // Hard links: the libraries need no second gigabyte.
        run(Command::new("cp")
            .args(["--archive", "--link", "--no-target-directory"])
            .arg(layer)
            .arg(&root))?;
    }
    Ok(Image { root, layers })
}

fn base(request: &Request, layer: &Path) -> anyhow::Result<()> {
    let packages = request.work.join("debian-packages");
    fs::create_dir_all(&packages)?;
    for name in BASE_PACKAGES {
        if find_package(&packages, name)?.is_none() {
            eprintln!("downloading Debian's {name} …");
            run(Command::new("apt-get")
                .current_dir(&packages)
                .args("--quiet=2 --option APT::Sandbox::User=root download".split(' '))
                .arg(name))
            .context("Debian's packages cannot be had (apt-get update?)")?;
        }
        let package = find_package(&packages, name)?
            .with_context(|| format!("apt-get left no package {name}"))?;
        run(Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package)
            .arg(layer))?;
    }
    for folder in LEFT_OUT {
        remove(&layer.join(folder))?;
    }
    certificates(layer)?;
    fs::write(
        layer.join("etc/passwd"),
        format!(
            "root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:{USER}:{USER}:nonroot:/home/nonroot:/sbin/nologin\n"
        ),
    )?;
    fs::write(
        layer.join("etc/group"),
        format!("root:x:0:\nnonroot:x:{USER}:\n"),
    )?;
    for folder in "tmp proc sys dev run cache models home/nonroot".split(' ') {
        fs::create_dir_all(layer.join(folder))?;
    }
    fs::set_permissions(layer.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    Ok(())
}

fn find_package(folder: &Path, name: &str) -> anyhow::Result<Option<PathBuf>> {
    let start = format!("{name}_");
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&start) {
            return Ok(Some(entry.path()));
        }
    }
    Ok(None)
}

fn certificates(layer: &Path) -> anyhow::Result<()> {
    let authorities = fs::read_dir(layer.join("usr/share/ca-certificates/mozilla"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<anyhow::Result<BTreeSet<_>>>()?;
    let mut bundle = String::new();
    for path in authorities {
        bundle.push_str(&fs::read_to_string(path)?);
    }
    let folder = layer.join("etc/ssl/certs");
    fs::create_dir_all(&folder)?;
    fs::write(folder.join("ca-certificates.crt"), bundle)?;
    Ok(())
}

pub(super) fn libraries(request: &Request, layer: &Path) -> anyhow::Result<()> {
    let name = request.variant().name();
    let wheels = request.work.join(format!("wheels-{name}"));
    fs::create_dir_all(&wheels)?;
    let requirements = PathBuf::from(format!("infra/image/wheels-{name}.txt"));
    if !has_all(&wheels, &fs::read_to_string(&requirements)?)? {
        let size = match request.variant() {
            Variant::Cpu => "30 MB",
            Variant::Cuda => "1.1 GB",
        };
        eprintln!("downloading the native libraries (about {size}) …");
        let mut pip = Command::new(&request.python);
        pip.args("-m pip download --quiet --disable-pip-version-check --no-deps".split(' '))
            .args("--only-binary :all: --require-hashes --python-version 3.13".split(' '))
            // The Dockerfile's Python; the shared objects are the same in every wheel.
            .args([
                "--platform=manylinux_2_28_x86_64",
                "--platform=manylinux_2_27_x86_64",
            ])
            .arg("--platform=manylinux2014_x86_64")
            .arg("--dest")
            .arg(&wheels)
            .arg("--requirement")
            .arg(&requirements);
        run(&mut pip)?;
    }
    run(Command::new(&request.python)
        .arg("infra/image/unpack.py")
        .arg(name)
        .arg(&wheels)
        .arg(layer.join("opt/clip")))
}

/// Whether a file of each digest in the requirements is there.
fn has_all(wheels: &Path, requirements: &str) -> anyhow::Result<bool> {
    let mut found = Vec::new();
    for entry in fs::read_dir(wheels)? {
        found.push(sha256(&entry?.path())?);
    }
    let wanted = requirements
        .lines()
        .filter_map(|line| line.split_once("--hash=sha256:"));
    Ok(wanted
        .into_iter()
        .all(|(_, digest)| found.iter().any(|one| one == digest.trim())))
}

fn sha256(path: &Path) -> anyhow::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut digest = Sha256::new();
    std::io::copy(&mut file, &mut digest)?;
    Ok(hex::encode(digest.finalize()))
}

fn program(request: &Request, layer: &Path) -> anyhow::Result<()> {
    ensure!(
        request.gpu_task.is_file(),
        "{} is missing: cargo build --release -p gpu-task",
        request.gpu_task.display()
    );
    let folder = layer.join("usr/local/bin");
    fs::create_dir_all(&folder)?;
    fs::copy(&request.gpu_task, folder.join("gpu-task"))?;
    Ok(())
}

/// Bytes of a layer's files, and of the layer as a registry keeps it: a tar
/// archive, gzip.
pub(super) fn sizes(folder: &Path) -> anyhow::Result<(u64, u64)> {
    let mut tar = Command::new("tar")
        .args("--create --sort=name --mtime=@0 --owner=0 --group=0 --directory".split(' '))
        .arg(folder)
        .arg(".")
        .stdout(Stdio::piped())
        .spawn()
        .context("tar cannot be started")?;
    let archive = tar.stdout.take().context("tar has no output")?;
    let mut gzip = Command::new("gzip")
        .arg("-6")
        .stdin(archive)
        .stdout(Stdio::piped())
        .spawn()
        .context("gzip cannot be started")?;
    let mut output = gzip.stdout.take().context("gzip has no output")?;
    let compressed = std::io::copy(&mut output, &mut std::io::sink())?;
    ensure!(
        tar.wait()?.success() && gzip.wait()?.success(),
        "the layer cannot be compressed"
    );
    Ok((bytes_of(folder)?, compressed))
}

fn bytes_of(folder: &Path) -> anyhow::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.path().symlink_metadata()?;
        bytes += if metadata.is_dir() {
            bytes_of(&entry.path())?
        } else {
            metadata.len()
        };
    }
    Ok(bytes)
}

pub(super) fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{} cannot be removed", path.display()))
        }
        _ => Ok(()),
    }
}

/// Runs a command and fails with its words if it does.
pub(super) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command
        .status()
        .with_context(|| format!("{} cannot be started", command.get_program().display()))?;
    ensure!(status.success(), "{command:?} ended with {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wheel_is_known_by_its_digest_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.whl"), b"abc").unwrap();
        let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let of = |digest: &str| format!("# comment\na==1 --hash=sha256:{digest}\n");
        assert!(has_all(folder.path(), &of(digest)).unwrap());
        assert!(!has_all(folder.path(), &of("00")).unwrap());
    }

    #[test]
    fn a_layer_has_two_sizes() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("zeros"), vec![0; 1_000_000]).unwrap();
        let (bytes, compressed) = sizes(folder.path()).unwrap();
        assert_eq!(bytes, 1_000_000);
        assert!(compressed > 100 && compressed < 100_000, "{compressed}");
    }
}
