//! A local cloud with fast timings, and SDK clients for it.

use std::time::Duration;

use local::{
    Cloud,
    cloud::{GroupConfig, Snapshot},
};
use tempfile::TempDir;

pub use crate::shell_cloud::{CLUSTER, FAMILY, definition};
use crate::shell_cloud::{group, shell_cloud};

pub const GROUP: &str = "clip-1";

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
    world_of(group_config(max), script).await
}

pub fn group_config(max: usize) -> GroupConfig {
    group(GROUP, max)
}

/// As [`world`], with a group of one's own under the name [`GROUP`].
pub async fn world_of(group: GroupConfig, script: &str) -> World {
    let base = shell_cloud(vec![group], script).await;
    let config = local::sdk::config(&base.endpoint);
    World {
        ecs: aws_sdk_ecs::Client::new(&config),
        autoscaling: aws_sdk_autoscaling::Client::new(&config),
        cloud: base.cloud,
        _folder: base.folder,
    }
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
                .filter(|instance| instance.container_status().is_some());
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
