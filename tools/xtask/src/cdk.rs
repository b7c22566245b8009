//! `infra/cdk`: what its tests, which Node runs, need on this machine.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

use crate::tools::{Tools, Variables, run, set_unless_set};

/// The oldest Node that the package says it runs on.
const OLDEST_NODE: u32 = 20;

pub struct Package {
    pub folder: PathBuf,
}

/// Whether the package can be used on this machine.
pub enum Installation {
    Done(Package),
    /// What the machine lacks for it.
    Lacking(String),
}

impl Package {
    /// Installs the dependencies unless they are there as the lock file says.
    pub fn install(tools: &Tools) -> anyhow::Result<Installation> {
        if let Some(lacks) = lacking(version("node").as_deref(), version("npm").is_some()) {
            return Ok(Installation::Lacking(lacks));
        }
        let folder = tools.root.join("infra/cdk");
        let lock = fs::read_to_string(folder.join("package-lock.json"))
            .context("infra/cdk/package-lock.json cannot be read")?;
        // Written last, and `npm ci` begins by removing its folder: an install that was
        // interrupted is begun anew.
        let marker = folder.join("node_modules/installed-package-lock.json");
        if !fs::read_to_string(&marker).is_ok_and(|installed| installed == lock) {
            eprintln!("installing aws-cdk-lib and TypeScript (about 200 MB) into infra/cdk …");
            let mut install = npm(&folder);
            run(install.args(["ci", "--silent", "--no-audit", "--no-fund"]))
                .context("npm failed: is a package registry in reach?")?;
            fs::write(&marker, &lock)?;
        }
        Ok(Installation::Done(Self { folder }))
    }

    /// Compares its template with SAM's translation, which takes SAM, and synthesises a stack as a
    /// template of its own, for the linters.
    pub fn synthesise(&self, variables: &Variables, to: &Path) -> anyhow::Result<()> {
        let mut compare = npm(&self.folder);
        set_unless_set(&mut compare, variables);
        run(compare.args(["--silent", "run", "test:sam"]))?;
        // checkov wants a key and a limit, and takes a condition for having them.
        let mut example = npm(&self.folder);
        example.args(["--silent", "run", "synth:example", "--", "pipeline"]);
        example.arg(
            r#"{"KmsKeyArn": "arn:aws:kms:us-east-1:123456789012:key/11111111-2222-3333-4444-555555555555", "ReserveScalerConcurrency": "true"}"#,
        );
        run(example.stdout(File::create(to)?))
    }

    /// Its tests. Their results are in the form of the Test Anything Protocol.
    pub fn tests(&self) -> Command {
        let mut tests = npm(&self.folder);
        tests.args(["--silent", "test"]);
        tests.env("NODE_OPTIONS", "--test-reporter=tap");
        tests
    }
}

fn npm(folder: &Path) -> Command {
    let mut npm = Command::new("npm");
    npm.current_dir(folder);
    npm
}

/// What a program answers to `--version`, if it is there.
fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}

fn lacking(node: Option<&str>, has_npm: bool) -> Option<String> {
    let Some(node) = node else {
        return Some("no node".to_owned());
    };
    let major = node.trim_start_matches('v').split('.').next();
    let is_new = major
        .and_then(|major| major.parse().ok())
        .is_some_and(|major: u32| major >= OLDEST_NODE);
    if !is_new {
        return Some(format!("node {node}, not {OLDEST_NODE} or later"));
    }
    (!has_npm).then(|| "no npm".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said_by_name() {
        assert_eq!(lacking(Some("v20.20.2"), true), None);
        assert_eq!(lacking(Some("v24.0.0"), true), None);
        assert_eq!(lacking(Some("v24.0.0"), false).unwrap(), "no npm");
        assert_eq!(lacking(None, true).unwrap(), "no node");
        assert_eq!(
            lacking(Some("v18.19.1"), true).unwrap(),
            "node v18.19.1, not 20 or later"
        );
    }
}
