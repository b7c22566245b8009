//! A local cloud with fast timings whose tasks are shell scripts: what the
//! tests of this package and those of the scaler stand on.

use std::{collections::BTreeMap, path::Path};

use local::{
    Cloud, CloudConfig,
    cloud::{GroupConfig, ImageProgram, Timings},
};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const CLUSTER: &str = "clip";
pub const FAMILY: &str = "gpu-task";

/// The cloud, where it is served, and the folder of its tasks' logs, which
/// must outlive it.
pub struct ShellCloud {
    pub cloud: Cloud,
    pub endpoint: String,
    pub folder: TempDir,
}

/// A group of `max` g4dn.xlarge, from zero.
pub fn group(name: &str, max: usize) -> GroupConfig {
    GroupConfig::new(name, CLUSTER, "g4dn.xlarge", max)
}

/// A cluster with these groups, and a task definition whose container runs
/// `script` in a shell.
pub async fn shell_cloud(groups: Vec<GroupConfig>, script: &str) -> ShellCloud {
    let folder = tempfile::tempdir().expect("a folder");
    let shell = ImageProgram {
        program: Path::new("/bin/sh").to_owned(),
        environment: BTreeMap::new(),
    };
    let cloud = Cloud::new(CloudConfig {
        region: local::sdk::REGION.to_owned(),
        timings: Timings::fast(),
        images: BTreeMap::from([("shell".to_owned(), shell)]),
        log_dir: folder.path().to_owned(),
    });
    cloud.create_cluster(CLUSTER);
    for group in groups {
        cloud.create_group(group);
    }
    cloud
        .register_task_definition(&definition(script))
        .expect("a task definition");
    let endpoint = cloud.serve().await.expect("a port");
    ShellCloud {
        cloud,
        endpoint,
        folder,
    }
}

/// The task definition.
pub fn definition(script: &str) -> Value {
    json!({
        "family": FAMILY,
        "containerDefinitions": [{
            "name": "gpu-task",
            "image": "shell",
            "essential": true,
            "cpu": 2048,
            "memory": 8192,
            "command": ["-c", script],
            "stopTimeout": 1,
            "environment": [{"name": "GREETING", "value": "hello"}],
            "resourceRequirements": [{"type": "GPU", "value": "1"}],
        }],
    })
}
