//! A local cloud with fast timings, and SDK clients for it.

use std::{collections::BTreeMap, path::Path, time::Duration};

use local::{
    Cloud, CloudConfig,
    cloud::{GroupConfig, ImageProgram, Snapshot, Timings},
};
use serde_json::{Value, json};
use tempfile::TempDir;

pub const CLUSTER: &str = "clip";
pub const GROUP: &str = "clip-1";
pub const FAMILY: &str = "gpu-task";

pub struct World {
    pub cloud: Cloud,
    pub ecs: aws_sdk_ecs::Client,
    pub autoscaling: aws_sdk_autoscaling::Client,
    // Dropped last: the tasks' logs lie in it.
    _folder: TempDir,
}

/// A cluster with one group of `max` g4dn.xlarge from zero, and a task
/// definition whose container runs `script` in a shell.
pub async fn world(max: usize, script: &str) -> World {
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
    cloud.create_group(GroupConfig::new(GROUP, CLUSTER, "g4dn.xlarge", max));
    cloud
        .register_task_definition(&definition(script))
        .expect("a task definition");
    let endpoint = cloud.serve().await.expect("a port");
    let config = local::sdk::config(&endpoint);
    World {
        ecs: aws_sdk_ecs::Client::new(&config),
        autoscaling: aws_sdk_autoscaling::Client::new(&config),
        cloud,
        _folder: folder,
    }
}

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

impl World {
    /// Scales the group and waits until its instances have registered.
    pub async fn scale(&self, desired: i32) {
        self.autoscaling
            .set_desired_capacity()
            .auto_scaling_group_name(GROUP)
            .desired_capacity(desired)
            .send()
            .await
            .expect("a new desired capacity");
        let desired = usize::try_from(desired).expect("not negative");
        self.until("instances registered", |world| {
            let registered = world
                .instances
                .iter()
                .filter(|instance| instance.container_status.is_some());
            registered
                .filter(|instance| instance.lifecycle.is_live())
                .count()
                == desired
        })
        .await;
    }

    /// Waits until the snapshot is as wanted.
    pub async fn until(&self, what: &str, wanted: impl Fn(&Snapshot) -> bool) -> Snapshot {
        for _ in 0..500 {
            let snapshot = self.cloud.snapshot();
            if wanted(&snapshot) {
                return snapshot;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("not within 5 s: {what}; now {:#?}", self.cloud.snapshot());
    }

    pub fn run(
        &self,
        count: i32,
    ) -> aws_sdk_ecs::operation::run_task::builders::RunTaskFluentBuilder {
        self.ecs
            .run_task()
            .cluster(CLUSTER)
            .task_definition(FAMILY)
            .launch_type(aws_sdk_ecs::types::LaunchType::Ec2)
            .count(count)
    }
}
