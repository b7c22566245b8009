//! Checks the deployment on a machine that cannot deploy.
//!
//! - [`source`]: what the programs' sources read and call;
//! - [`checks`]: the project's own assertions, each a function from template
//!   and sources to [`Finding`]s;
//! - [`linters`]: `sam validate --lint`, cfn-lint after translation, checkov
//!   with a list of justified skips, hadolint;
//! - [`image`]: the container image's root filesystem, assembled without a
//!   Docker engine, and what must hold in it.

pub mod checks;
pub mod image;
pub mod linters;
pub mod source;

use std::fmt;
use std::path::Path;

use anyhow::Context;

use source::Programs;
use template::Template;

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    pub check: &'static str,
    pub place: String,
    pub problem: String,
}

impl Finding {
    pub fn new(check: &'static str, place: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            check,
            place: place.into(),
            problem: problem.into(),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            formatter,
            "{}: {}: {}",
            self.check, self.place, self.problem
        )
    }
}

/// What one check finds.
pub struct Findings {
    check: &'static str,
    all: Vec<Finding>,
}

impl Findings {
    fn add(&mut self, place: impl Into<String>, problem: impl Into<String>) {
        self.all.push(Finding::new(self.check, place, problem));
    }
}

#[derive(Clone)]
pub struct Project {
    /// `infra/template.yaml`.
    pub template: Template,
    /// What `infra/cdk` makes of it with a key and the scaler's concurrency reserved.
    pub synthesised: Vec<Template>,
    /// What the programs read and call.
    pub programs: Programs,
    /// `infra/examples/existing-bucket.yaml`.
    pub example: Template,
    /// `gpu-task/Dockerfile`.
    pub dockerfile: String,
    /// `infra/README.md`, which lists the parameters.
    pub readme: String,
    /// `events/filters/subscription.json`, the wire contract's filter.
    pub subscription_filter: serde_json::Value,
    /// `events/filters/vector-store.json`, the next middleware's filter.
    pub vector_store_filter: serde_json::Value,
}

impl Project {
    pub fn read(root: &Path) -> anyhow::Result<Self> {
        let text = |path: &str| {
            std::fs::read_to_string(root.join(path))
                .with_context(|| format!("{path} cannot be read"))
        };
        let filter = |name: &str| -> anyhow::Result<serde_json::Value> {
            let path = format!("events/filters/{name}.json");
            serde_json::from_str(&text(&path)?).with_context(|| format!("{path} is no JSON"))
        };
        Ok(Self {
            template: Template::parse(&text("infra/template.yaml")?)?,
            synthesised: Vec::new(),
            programs: Programs::read(root)?,
            dockerfile: text("gpu-task/Dockerfile")?,
            readme: text("infra/README.md")?,
            example: Template::parse(&text("infra/examples/existing-bucket.yaml")?)?,
            subscription_filter: filter("subscription")?,
            vector_store_filter: filter("vector-store")?,
        })
    }

    pub fn findings(&self) -> Vec<Finding> {
        let run = |(check, look): &(&'static str, checks::Check)| {
            let all = Vec::new();
            let mut findings = Findings { check, all };
            look(self, &mut findings);
            findings.all
        };
        let mut findings: Vec<Finding> = checks::ALL.iter().flat_map(run).collect();
        findings.sort();
        findings.dedup();
        findings
    }
}
