//! What the dynamic linker will look for: libraries, versions and symbols.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use object::Endianness;
use object::elf;
use object::read::elf::{Dyn as _, ElfFile64, FileHeader as _, SectionHeader as _, Sym as _};

/// Libraries of NVIDIA's driver, which its container toolkit brings from the
/// host.
const DRIVER_LIBRARIES: &[&str] = &["libcuda.so.1"];

/// Libraries that nothing in the image may need: the model's graph has no
/// Fourier transform, TensorRT is not used, and they are gigabytes.
const FORBIDDEN_LIBRARIES: &[&str] = &["libcufft", "libnvinfer"];

/// Where the linker looks, in order: `LD_LIBRARY_PATH` of the image, then
/// glibc's own folders.
const SEARCH_PATH: &[&str] = &[
    "opt/clip",
    "usr/lib64",
    "lib/x86_64-linux-gnu",
    "usr/lib/x86_64-linux-gnu",
    "lib64",
    "lib",
    "usr/lib",
];

/// What starts or is loaded by name.
const ROOTS: &[&str] = &["usr/local/bin", "opt/clip"];

#[derive(Debug, Default)]
pub struct Summary {
    pub objects: usize,
    pub left_to_the_driver: Vec<String>,
    pub problems: Vec<String>,
}

#[derive(Default)]
struct Object {
    needed: Vec<String>,
    wants: Vec<(String, String)>,
    /// Versions that it has.
    has: BTreeSet<String>,
    defined: BTreeSet<String>,
    /// Undefined and not weak.
    undefined: Vec<String>,
}

/// Follows every program and library of the root filesystem at `root`.
pub fn resolve(root: &Path) -> anyhow::Result<Summary> {
    let mut summary = Summary::default();
    let mut waiting: Vec<PathBuf> = Vec::new();
    for folder in ROOTS {
        for entry in fs::read_dir(root.join(folder))
            .with_context(|| format!("the image has no /{folder}"))?
        {
            waiting.push(entry?.path());
        }
    }
    let mut objects: BTreeMap<String, Object> = BTreeMap::new();
    let mut driver = BTreeSet::new();
    while let Some(path) = waiting.pop() {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if objects.contains_key(&name) {
            continue;
        }
        let object = read(&path)?;
        for library in &object.needed {
            match fate(root, library) {
                Fate::Found(found) => waiting.push(found),
                Fate::TheDrivers => {
                    driver.insert(library.clone());
                }
                Fate::Forbidden => summary
                    .problems
                    .push(format!("{name} needs {library}, which must not be needed")),
                Fate::Missing => summary
                    .problems
                    .push(format!("{name} needs {library}, which is not in the image")),
            }
        }
        objects.insert(name, object);
    }
    summary.objects = objects.len();
    summary.left_to_the_driver = driver.into_iter().collect();
    summary.problems.extend(missing_versions(&objects));
    summary.problems.extend(missing_symbols(&objects));
    Ok(summary)
}

#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Found(PathBuf),
    /// NVIDIA's container toolkit mounts it from the host.
    TheDrivers,
    Forbidden,
    Missing,
}

fn fate(root: &Path, library: &str) -> Fate {
    if FORBIDDEN_LIBRARIES
        .iter()
        .any(|forbidden| library.starts_with(forbidden))
    {
        return Fate::Forbidden;
    }
    if DRIVER_LIBRARIES.contains(&library) {
        return Fate::TheDrivers;
    }
    SEARCH_PATH
        .iter()
        .map(|folder| root.join(folder).join(library))
        .find(|path| path.exists())
        .map_or(Fate::Missing, Fate::Found)
}

fn missing_versions(objects: &BTreeMap<String, Object>) -> Vec<String> {
    let mut problems = Vec::new();
    for (name, object) in objects {
        for (library, version) in &object.wants {
            let is_there = objects
                .get(library)
                .is_none_or(|found| found.has.contains(version));
            if !is_there {
                problems.push(format!(
                    "{name} wants {version} of {library}, which the image's is too old for"
                ));
            }
        }
    }
    problems
}

fn missing_symbols(objects: &BTreeMap<String, Object>) -> Vec<String> {
    let defined: BTreeSet<&String> = objects
        .values()
        .flat_map(|object| &object.defined)
        .collect();
    let mut problems = Vec::new();
    for (name, object) in objects {
        let needs_driver = object
            .needed
            .iter()
            .any(|library| DRIVER_LIBRARIES.contains(&library.as_str()));
        for symbol in &object.undefined {
            let is_the_drivers = needs_driver && is_driver_symbol(symbol);
            if !defined.contains(symbol) && !is_the_drivers {
                problems.push(format!(
                    "{name} needs the symbol {symbol}, which nothing defines"
                ));
            }
        }
    }
    problems
}

/// The driver API: `cuMemAlloc`, unlike the runtime's `cudaMalloc` and
/// cuBLAS's `cublasCreate`.
fn is_driver_symbol(symbol: &str) -> bool {
    symbol
        .strip_prefix("cu")
        .is_some_and(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()))
}

pub(super) fn links(path: &Path) -> anyhow::Result<Vec<String>> {
    Ok(read(path)?.needed)
}

fn read(path: &Path) -> anyhow::Result<Object> {
    let data = fs::read(path).with_context(|| format!("{} cannot be read", path.display()))?;
    parse(&data).with_context(|| format!("{} is no ELF file", path.display()))
}

fn parse(data: &[u8]) -> anyhow::Result<Object> {
    let file: ElfFile64<'_, Endianness> = ElfFile64::parse(data)?;
    let endian = file.endian();
    let sections = file.elf_header().sections(endian, data)?;
    let mut object = Object::default();
    if let Some((dynamic, link)) = sections.dynamic(endian, data)? {
        let strings = sections.strings(endian, data, link)?;
        for entry in dynamic {
            if entry.tag(endian) == elf::DT_NEEDED {
                let name = entry.string(endian, strings)?;
                object
                    .needed
                    .push(String::from_utf8_lossy(name).into_owned());
            }
        }
    }
    if let Some((mut needs, link)) = sections.gnu_verneed(endian, data)? {
        let strings = sections.strings(endian, data, link)?;
        while let Some((need, mut versions)) = needs.next()? {
            let library = String::from_utf8_lossy(need.file(endian, strings)?).into_owned();
            while let Some(version) = versions.next()? {
                let name = String::from_utf8_lossy(version.name(endian, strings)?).into_owned();
                object.wants.push((library.clone(), name));
            }
        }
    }
    if let Some((mut definitions, link)) = sections.gnu_verdef(endian, data)? {
        let strings = sections.strings(endian, data, link)?;
        while let Some((_, mut names)) = definitions.next()? {
            if let Some(first) = names.next()? {
                object
                    .has
                    .insert(String::from_utf8_lossy(first.name(endian, strings)?).into_owned());
            }
        }
    }
    let symbols = sections.symbols(endian, data, elf::SHT_DYNSYM)?;
    for symbol in symbols.iter() {
        let name = String::from_utf8_lossy(symbol.name(endian, symbols.strings())?).into_owned();
        if name.is_empty() {
            continue;
        }
        if symbol.st_shndx(endian) != elf::SHN_UNDEF {
            object.defined.insert(name);
        } else if symbol.st_bind() != elf::STB_WEAK {
            object.undefined.push(name);
        }
    }
    // A file without section headers would look as if it needed nothing.
    anyhow::ensure!(
        sections
            .iter()
            .any(|section| section.sh_type(endian) == elf::SHT_DYNAMIC),
        "it has no dynamic section"
    );
    Ok(object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_program_needs_libc() {
        let own = read(&std::env::current_exe().unwrap()).unwrap();
        assert!(
            own.needed.iter().any(|library| library == "libc.so.6"),
            "{:?}",
            own.needed
        );
        assert!(
            own.wants
                .iter()
                .any(|(_, version)| version.starts_with("GLIBC_"))
        );
        assert!(own.undefined.iter().any(|symbol| symbol == "malloc"));
    }

    fn object(needed: &[&str], undefined: &[&str], defined: &[&str]) -> Object {
        Object {
            needed: needed.iter().map(|&name| name.to_owned()).collect(),
            undefined: undefined.iter().map(|&name| name.to_owned()).collect(),
            defined: defined.iter().map(|&name| name.to_owned()).collect(),
            ..Object::default()
        }
    }

    #[test]
    fn a_symbol_that_nothing_defines_is_found_but_the_drivers_is_not() {
        let objects = BTreeMap::from([
            (
                "provider.so".to_owned(),
                object(
                    &["libcuda.so.1"],
                    &["cublasCreate_v2", "cuMemAlloc", "cudaGone"],
                    &[],
                ),
            ),
            (
                "libcublas.so".to_owned(),
                object(&[], &[], &["cublasCreate_v2"]),
            ),
        ]);
        let problems = missing_symbols(&objects);
        assert_eq!(
            problems,
            ["provider.so needs the symbol cudaGone, which nothing defines"]
        );
    }

    #[test]
    fn a_version_that_the_library_lacks_is_found() {
        let mut program = object(&["libc.so.6"], &[], &[]);
        program.wants = vec![("libc.so.6".to_owned(), "GLIBC_2.99".to_owned())];
        let mut library = object(&[], &[], &[]);
        library.has = BTreeSet::from(["GLIBC_2.36".to_owned()]);
        let objects =
            BTreeMap::from([("p".to_owned(), program), ("libc.so.6".to_owned(), library)]);
        assert_eq!(missing_versions(&objects).len(), 1);
    }

    #[test]
    fn cufft_is_forbidden_even_where_it_is_there() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("opt/clip");
        fs::create_dir_all(&folder).unwrap();
        for library in ["libcufft.so.12", "libcublas.so.13"] {
            fs::write(folder.join(library), b"").unwrap();
        }
        assert_eq!(fate(root.path(), "libcufft.so.12"), Fate::Forbidden);
        assert_eq!(fate(root.path(), "libcuda.so.1"), Fate::TheDrivers);
        assert_eq!(fate(root.path(), "libcurand.so.10"), Fate::Missing);
        let found = Fate::Found(folder.join("libcublas.so.13"));
        assert_eq!(fate(root.path(), "libcublas.so.13"), found);
    }

    #[test]
    fn what_is_missing_and_what_is_forbidden_is_found_in_a_tree() {
        let root = tempfile::tempdir().unwrap();
        for folder in ROOTS {
            fs::create_dir_all(root.path().join(folder)).unwrap();
        }
        fs::copy(
            std::env::current_exe().unwrap(),
            root.path().join("usr/local/bin/program"),
        )
        .unwrap();
        let summary = resolve(root.path()).unwrap();
        assert!(
            summary
                .problems
                .iter()
                .any(|problem| problem.contains("program needs libc.so.6")),
            "{:?}",
            summary.problems
        );
    }
}
