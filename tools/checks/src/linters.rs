//! The linters: `sam validate --lint`, cfn-lint on what CloudFormation will
//! make of the template, checkov with justified skips, hadolint. They run
//! offline, from one Python environment.
//!
//! Before the SAM translation a mistyped IAM action, a Lambda time-out of 1000
//! and a mistyped schedule pass unseen; so each run also seeds such mistakes
//! and fails unless the linters see them ([`seeded_mistakes`]).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::Finding;
use template::read_yaml;

/// Region that the linters assume; the template itself names none.
const REGION: &str = "us-east-1";

pub struct Linters {
    root: PathBuf,
    tools: PathBuf,
}

/// A mistake that only a linter can see: what to change in the template, and
/// what the linter that must object calls it.
struct Seed {
    name: &'static str,
    from: &'static str,
    to: &'static str,
    linter: Linter,
    says: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Linter {
    CfnLint,
    Checkov,
}

/// Mistakes that the linters must find, or they are not awake.
const SEEDS: &[Seed] = &[
    Seed {
        name: "a mistyped IAM action",
        from: "Action: sqs:GetQueueAttributes\n",
        to: "Action: sqs:GetQueueAttribute\n",
        linter: Linter::CfnLint,
        says: "'getqueueattribute' is not one of",
    },
    Seed {
        name: "a Lambda time-out of 1000 s",
        from: "      Timeout: 60\n",
        to: "      Timeout: 1000\n",
        linter: Linter::CfnLint,
        says: "1000",
    },
    Seed {
        name: "a mistyped schedule",
        from: "rate(1 minute)",
        to: "rate(1 minutes)",
        linter: Linter::CfnLint,
        says: "'minutes' is not one of",
    },
    Seed {
        name: "a property that does not exist",
        from: "      ReceiveMessageWaitTimeSeconds: 20\n",
        to: "      ReceiveMessageWaitSeconds: 20\n",
        linter: Linter::CfnLint,
        says: "ReceiveMessageWaitSeconds",
    },
    Seed {
        name: "a public bucket",
        from: "        BlockPublicPolicy: true\n",
        to: "        BlockPublicPolicy: false\n",
        linter: Linter::Checkov,
        says: "CKV_AWS_54",
    },
];

/// An order of resources that follows from a reference too. CDK's own function says one.
const SAID_TWICE: &str = "W3005";

/// A Dockerfile that hadolint must object to.
const BAD_DOCKERFILE: &str = "FROM debian\nRUN cd /tmp && apt-get install curl\n";

/// The reason why a checkov check does not apply to a resource.
struct Skip {
    check: String,
    resource: String,
}

impl Linters {
    /// Linters installed in the Python environment `tools`, for the project
    /// below `root`.
    pub fn new(root: &Path, tools: &Path) -> anyhow::Result<Self> {
        let tools = root.join(tools);
        for program in ["sam", "cfn-lint", "checkov", "hadolint", "python"] {
            let path = tools.join("bin").join(program);
            ensure!(
                path.is_file(),
                "{} is missing: install infra/requirements.txt into a Python environment at {}",
                path.display(),
                tools.display()
            );
        }
        Ok(Self {
            root: root.to_owned(),
            tools,
        })
    }

    /// Runs every linter on everything, then the seeded mistakes. What infra/cdk synthesised has
    /// the template's names for the template's resources.
    pub fn run(&self, scratch: &Path, synthesised: &[PathBuf]) -> anyhow::Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let mut templates = vec![PathBuf::from("infra/template.yaml")];
        for entry in fs::read_dir(self.root.join("infra/examples"))? {
            let name = entry?.file_name();
            templates.push(Path::new("infra/examples").join(name));
        }
        templates.sort();
        for template in &templates {
            let place = template.display().to_string();
            eprintln!("sam validate --lint {place}");
            findings.extend(self.sam_validate(&self.root.join(template), &place)?);
            eprintln!("cfn-lint {place} (after translation)");
            let translated = self.translate(&self.root.join(template), scratch)?;
            findings.extend(self.cfn_lint(&translated, &place)?);
        }
        eprintln!("checkov infra/template.yaml (after translation)");
        let translated = self.translate(&self.root.join("infra/template.yaml"), scratch)?;
        let own = translated_resources(&translated)?;
        findings.extend(self.checkov_with_skips(&translated, &own)?);
        for path in synthesised {
            eprintln!("cfn-lint and checkov {}", path.display());
            let found = self.cfn_lint(path, "synthesised")?;
            findings.extend(
                found
                    .into_iter()
                    .filter(|one| !one.problem.contains(SAID_TWICE)),
            );
            findings.extend(self.checkov_with_skips(path, &own)?);
        }
        eprintln!("hadolint gpu-task/Dockerfile");
        findings.extend(self.hadolint(
            &self.root.join("gpu-task/Dockerfile"),
            "gpu-task/Dockerfile",
        )?);
        eprintln!("seeded mistakes");
        findings.extend(self.seeded_mistakes(scratch)?);
        Ok(findings)
    }

    fn sam_validate(&self, template: &Path, place: &str) -> anyhow::Result<Vec<Finding>> {
        let mut command = self.tool("sam");
        command
            .args(["validate", "--lint", "--region", REGION, "--template-file"])
            .arg(template);
        Ok(lines_of_failure(
            "sam validate --lint",
            place,
            &run(&mut command)?,
        ))
    }

    /// What CloudFormation makes of a SAM template, as a file in `scratch`.
    fn translate(&self, template: &Path, scratch: &Path) -> anyhow::Result<PathBuf> {
        let mut command = self.tool("python");
        command
            .arg(self.root.join("tools/checks/translate.py"))
            .arg(template);
        let output = run(&mut command)?;
        if !output.status.success() {
            bail!(
                "{} cannot be translated: {}",
                template.display(),
                text(&output.stderr)
            );
        }
        let translated = scratch.join("translated.yaml");
        fs::write(&translated, &output.stdout)?;
        Ok(translated)
    }

    fn cfn_lint(&self, translated: &Path, place: &str) -> anyhow::Result<Vec<Finding>> {
        let mut command = self.tool("cfn-lint");
        // Parseable: one line per finding.
        command
            .args(["--format", "parseable", "--regions", REGION, "--"])
            .arg(translated);
        Ok(lines_of_failure("cfn-lint", place, &run(&mut command)?))
    }

    /// Checkov's failed checks, as (check, resource, its title).
    fn checkov(&self, translated: &Path) -> anyhow::Result<Vec<(String, String, String)>> {
        let mut command = self.tool("checkov");
        command
            .args("--framework cloudformation --output json --compact --quiet".split(' '))
            .args(["--skip-download", "--file"])
            .arg(translated);
        let output = run(&mut command)?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("checkov's answer is no JSON: {}", text(&output.stderr)))?;
        ensure!(
            report["summary"]["parsing_errors"] == 0 && report["summary"]["resource_count"] != 0,
            "checkov could not read the template: {}",
            report["summary"]
        );
        let failed = report["results"]["failed_checks"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        let field = |check: &Value, name: &str| check[name].as_str().unwrap_or_default().to_owned();
        Ok(failed
            .iter()
            .map(|check| {
                let resource = field(check, "resource");
                let id = resource.rsplit('.').next().unwrap_or_default().to_owned();
                (field(check, "check_id"), id, field(check, "check_name"))
            })
            .collect())
    }

    fn checkov_with_skips(&self, template: &Path, own: &Value) -> anyhow::Result<Vec<Finding>> {
        let skips = read_skips(&self.root.join("tools/checks/checkov-skips.yaml"))?;
        let mut used = BTreeSet::new();
        let mut findings = Vec::new();
        for (check, resource, title) in self.checkov(template)? {
            // CDK's, such as its function for buckets' notifications.
            if own[&resource].is_null() {
                continue;
            }
            let skip = skips
                .iter()
                .position(|skip| skip.check == check && skip.resource == resource);
            match skip {
                Some(index) => {
                    used.insert(index);
                }
                None => {
                    let problem = format!("{check}: {title}");
                    findings.push(Finding::new("checkov", resource, problem));
                }
            }
        }
        for (index, skip) in skips.iter().enumerate() {
            if !used.contains(&index) {
                findings.push(Finding::new(
                    "checkov",
                    "tools/checks/checkov-skips.yaml",
                    format!(
                        "{} of {} passes: take the skip out",
                        skip.check, skip.resource
                    ),
                ));
            }
        }
        Ok(findings)
    }

    fn hadolint(&self, dockerfile: &Path, place: &str) -> anyhow::Result<Vec<Finding>> {
        let mut command = self.tool("hadolint");
        command
            .args(["--no-color", "--failure-threshold", "info"])
            .arg(dockerfile);
        Ok(lines_of_failure("hadolint", place, &run(&mut command)?))
    }

    /// Puts each mistake into a copy of the template and expects the linter to
    /// object.
    fn seeded_mistakes(&self, scratch: &Path) -> anyhow::Result<Vec<Finding>> {
        let template = fs::read_to_string(self.root.join("infra/template.yaml"))?;
        let mut findings = Vec::new();
        for seed in SEEDS {
            ensure!(
                template.contains(seed.from),
                "{} cannot be seeded: the template no longer says {:?}",
                seed.name,
                seed.from
            );
            let seeded = scratch.join("seeded.yaml");
            fs::write(&seeded, template.replacen(seed.from, seed.to, 1))?;
            let translated = self.translate(&seeded, scratch)?;
            let is_seen = match seed.linter {
                Linter::CfnLint => {
                    let found = self.cfn_lint(&translated, "seeded")?;
                    found
                        .iter()
                        .any(|finding| finding.problem.contains(seed.says))
                }
                Linter::Checkov => self
                    .checkov(&translated)?
                    .iter()
                    .any(|(check, _, _)| check == seed.says),
            };
            if !is_seen {
                findings.push(Finding::new(
                    "seeded mistakes",
                    "linters",
                    format!("{} passes unseen", seed.name),
                ));
            }
        }
        let dockerfile = scratch.join("Dockerfile");
        fs::write(&dockerfile, BAD_DOCKERFILE)?;
        if self.hadolint(&dockerfile, "seeded")?.is_empty() {
            findings.push(Finding::new(
                "seeded mistakes",
                "hadolint",
                "a bad Dockerfile passes unseen",
            ));
        }
        Ok(findings)
    }

    /// A tool that finds no account, no network and no user settings.
    fn tool(&self, name: &str) -> Command {
        let mut command = Command::new(self.tools.join("bin").join(name));
        command
            .current_dir(&self.root)
            .env("AWS_DEFAULT_REGION", REGION)
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("SAM_CLI_TELEMETRY", "0")
            .env("__SAM_CLI_APP_DIR", self.tools.join("sam-home"))
            .env("PYTHONWARNINGS", "ignore")
            .env("NO_COLOR", "1");
        command
    }
}

fn translated_resources(path: &Path) -> anyhow::Result<Value> {
    Ok(read_yaml(&fs::read_to_string(path)?)?["Resources"].take())
}

fn run(command: &mut Command) -> anyhow::Result<Output> {
    command
        .output()
        .with_context(|| format!("{} cannot be started", command.get_program().display()))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().to_owned()
}

fn lines_of_failure(check: &'static str, place: &str, output: &Output) -> Vec<Finding> {
    if output.status.success() {
        return Vec::new();
    }
    let all = format!("{}\n{}", text(&output.stdout), text(&output.stderr));
    let mut findings: Vec<Finding> = all
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| Finding::new(check, place, line.trim()))
        .collect();
    if findings.is_empty() {
        let problem = format!("ended with {}", output.status);
        findings.push(Finding::new(check, place, problem));
    }
    findings
}

fn read_skips(path: &Path) -> anyhow::Result<Vec<Skip>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("{} cannot be read", path.display()))?;
    skips_of(&read_yaml(&text)?)
}

fn skips_of(entries: &Value) -> anyhow::Result<Vec<Skip>> {
    let mut skips = Vec::new();
    for entry in entries.as_array().context("the list of skips is no list")? {
        let field = |name: &str| entry[name].as_str().unwrap_or_default();
        let (check, reason) = (field("check"), field("reason"));
        ensure!(
            check.starts_with("CKV") && !reason.is_empty(),
            "a skip needs a check, resources and a reason: {entry}"
        );
        for resource in entry["resources"]
            .as_array()
            .context("a skip needs resources")?
        {
            skips.push(Skip {
                check: check.to_owned(),
                resource: resource.as_str().unwrap_or_default().to_owned(),
            });
        }
    }
    Ok(skips)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_skip_needs_a_reason() {
        let good = json!([{"check": "CKV_AWS_1", "resources": ["A", "B"], "reason": "because"}]);
        assert_eq!(skips_of(&good).unwrap().len(), 2);
        let bad = json!([{"check": "CKV_AWS_1", "resources": ["A"]}]);
        assert!(skips_of(&bad).is_err());
    }

    #[test]
    fn every_mistake_can_be_seeded() {
        let template = include_str!("../../../infra/template.yaml");
        for seed in SEEDS {
            assert!(template.contains(seed.from), "{}", seed.name);
            assert!(!template.contains(seed.to), "{}", seed.name);
        }
    }
}
