//! The local Auto Scaling keeps AWS's rules, seen through AWS's own client.

use crate::common::{CLUSTER, GROUP, World, group_config, world, world_of};
use aws_sdk_autoscaling::{
    error::ProvideErrorMetadata,
    types::{LifecycleState, ScalingActivityStatusCode, Tag},
};
use local::cloud::{ApiFault, ApiFaultKind, GroupConfig, Lifecycle, Timings};

async fn set(
    world: &World,
    desired: i32,
) -> Result<(), aws_sdk_autoscaling::operation::set_desired_capacity::SetDesiredCapacityError> {
    let request = world
        .autoscaling
        .set_desired_capacity()
        .auto_scaling_group_name(GROUP)
        .desired_capacity(desired);
    request
        .send()
        .await
        .map(|_| ())
        .map_err(|error| error.into_service_error())
}

async fn group(world: &World) -> aws_sdk_autoscaling::types::AutoScalingGroup {
    let answer = world
        .autoscaling
        .describe_auto_scaling_groups()
        .auto_scaling_group_names(GROUP)
        .send()
        .await
        .expect("an answer");
    answer.auto_scaling_groups()[0].clone()
}

#[tokio::test]
async fn an_instance_takes_its_time_and_then_registers() {
    let world = world(3, "exit 0").await;
    set(&world, 2).await.expect("capacity");
    let at_first = group(&world).await;
    assert_eq!(
        (at_first.desired_capacity(), at_first.instances().len()),
        (Some(2), 2)
    );
    assert!(
        at_first
            .instances()
            .iter()
            .all(|one| one.lifecycle_state() == Some(&LifecycleState::Pending))
    );
    world
        .until("registered", |now| {
            now.instances
                .iter()
                .all(|one| one.container_status().is_some())
        })
        .await;
    let later = group(&world).await;
    assert!(
        later
            .instances()
            .iter()
            .all(|one| one.lifecycle_state() == Some(&LifecycleState::InService))
    );
    assert_eq!(later.instances()[0].instance_type(), Some("g4dn.xlarge"));
    let activities = world
        .autoscaling
        .describe_scaling_activities()
        .auto_scaling_group_name(GROUP)
        .send()
        .await
        .expect("activities");
    assert_eq!(activities.activities().len(), 2);
    assert!(
        activities
            .activities()
            .iter()
            .all(|one| one.status_code() == Some(&ScalingActivityStatusCode::Successful))
    );
}

#[tokio::test]
async fn desired_capacity_stays_within_the_limits() {
    let world = world(3, "exit 0").await;
    let above = set(&world, 4).await.expect_err("a refusal");
    assert_eq!(above.code(), Some("ValidationError"));
    assert_eq!(
        above.message(),
        Some("New SetDesiredCapacity value 4 is above max value 3 for the AutoScalingGroup.")
    );
    world.cloud.create_group(GroupConfig {
        min: 1,
        desired: 1,
        ..GroupConfig::new("from-one", CLUSTER, "g4dn.xlarge", 2)
    });
    let below = world
        .autoscaling
        .set_desired_capacity()
        .auto_scaling_group_name("from-one")
        .desired_capacity(0)
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert_eq!(
        below.message(),
        Some("New SetDesiredCapacity value 0 is below min value 1 for the AutoScalingGroup.")
    );
    let unknown = world
        .autoscaling
        .set_desired_capacity()
        .auto_scaling_group_name("none")
        .desired_capacity(1);
    let unknown = unknown
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert_eq!(
        unknown.message(),
        Some("AutoScalingGroup name not found - AutoScalingGroup 'none' not found")
    );
}

#[tokio::test]
async fn a_launch_without_capacity_fails_and_is_tried_again() {
    let world = world(3, "exit 0").await;
    let mut events = world.cloud.subscribe();
    world.cloud.set_capacity(GROUP, Some(1));
    set(&world, 2).await.expect("capacity");
    world
        .until("one instance", |now| now.live_instances() == 1)
        .await;
    let failed = world
        .autoscaling
        .describe_scaling_activities()
        .auto_scaling_group_name(GROUP)
        .send()
        .await
        .expect("activities");
    let failed: Vec<_> = failed
        .activities()
        .iter()
        .filter(|one| one.status_code() == Some(&ScalingActivityStatusCode::Failed))
        .collect();
    assert!(!failed.is_empty());
    let message = failed[0].status_message().expect("a message");
    assert!(message.starts_with("We currently do not have sufficient g4dn.xlarge capacity in the Availability Zone you requested"), "{message}");
    assert_eq!(
        group(&world).await.desired_capacity(),
        Some(2),
        "the wish stays"
    );
    let mut kinds = Vec::new();
    while let Ok(event) = events.try_recv() {
        kinds.push(event.detail_type);
    }
    assert!(
        kinds.contains(&"EC2 Instance Launch Unsuccessful"),
        "{kinds:?}"
    );
    world.cloud.set_capacity(GROUP, None);
    world
        .until("two instances", |now| now.live_instances() == 2)
        .await;
}

#[tokio::test]
async fn terminating_with_decrement_lowers_the_wish() {
    let world = world(3, "exit 0").await;
    world.scale(2).await;
    let id = world.cloud.snapshot().instances[0].id.clone();
    let terminate = || {
        world
            .autoscaling
            .terminate_instance_in_auto_scaling_group()
            .instance_id(&id)
    };
    let answer = terminate()
        .should_decrement_desired_capacity(true)
        .send()
        .await
        .expect("an answer");
    assert_eq!(
        answer.activity().and_then(|one| one.status_code()),
        Some(&ScalingActivityStatusCode::InProgress)
    );
    assert_eq!(group(&world).await.desired_capacity(), Some(1));
    world
        .until("one is gone", |now| now.live_instances() == 1)
        .await;
    assert_eq!(world.cloud.snapshot().instances.len(), 2, "not replaced");
    let gone = terminate()
        .should_decrement_desired_capacity(true)
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert_eq!(gone.code(), Some("ValidationError"));
    assert!(
        gone.message()
            .is_some_and(|text| text.contains("No managed instance found for instance ID"))
    );
}

#[tokio::test]
async fn terminating_below_the_minimum_is_refused_and_without_decrement_replaces() {
    let from_one = GroupConfig {
        min: 1,
        desired: 1,
        ..group_config(3)
    };
    let world = world_of(from_one, "exit 0").await;
    world
        .until("one instance", |now| {
            now.instances
                .iter()
                .any(|one| one.lifecycle == Lifecycle::InService)
        })
        .await;
    let id = world.cloud.snapshot().instances[0].id.clone();
    let terminate = || {
        world
            .autoscaling
            .terminate_instance_in_auto_scaling_group()
            .instance_id(&id)
    };
    let refused = terminate()
        .should_decrement_desired_capacity(true)
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert!(
        refused
            .message()
            .is_some_and(|text| text.starts_with("Currently, desiredSize equals minSize (1).")),
        "{refused:?}"
    );
    terminate()
        .should_decrement_desired_capacity(false)
        .send()
        .await
        .expect("an answer");
    world
        .until("a replacement", |now| {
            now.instances.len() == 2 && now.live_instances() == 1
        })
        .await;
}

#[tokio::test]
async fn protected_instances_survive_scale_in() {
    let world = world_of(protected(), "exit 0").await;
    world.scale(2).await;
    set(&world, 0).await.expect("capacity");
    tokio::time::sleep(4 * Timings::fast().instance_terminate).await;
    let left = world.cloud.snapshot();
    assert_eq!(left.live_instances(), 2);
    let terminate = world
        .autoscaling
        .terminate_instance_in_auto_scaling_group()
        .instance_id(&left.instances[0].id)
        .should_decrement_desired_capacity(false);
    terminate.send().await.expect("whoever names it may end it");
    world
        .until("one is gone", |now| now.live_instances() == 1)
        .await;
}

fn protected() -> GroupConfig {
    GroupConfig {
        protect_new_instances: true,
        ..group_config(3)
    }
}

#[tokio::test]
async fn a_protected_instance_that_still_boots_can_be_withdrawn() {
    let world = world_of(protected(), "exit 0").await;
    let slow = Timings {
        instance_launch: std::time::Duration::from_millis(400),
        ..Timings::fast()
    };
    world.cloud.set_timings(slow);
    set(&world, 1).await.expect("capacity");
    set(&world, 0).await.expect("capacity");
    let now = world
        .until("it is gone", |now| now.live_instances() == 0)
        .await;
    assert_eq!(now.instances.len(), 1);
}

#[tokio::test]
async fn scale_in_takes_the_newest_where_the_group_says_so() {
    let world = world(3, "exit 0").await;
    let newest = GroupConfig {
        newest_first: true,
        ..GroupConfig::new("newest", CLUSTER, "g5.xlarge", 3)
    };
    world.cloud.create_group(newest);
    let set = |desired| {
        world
            .autoscaling
            .set_desired_capacity()
            .auto_scaling_group_name("newest")
            .desired_capacity(desired)
            .send()
    };
    set(1).await.expect("capacity");
    let first = world.cloud.snapshot().instances[0].id.clone();
    set(2).await.expect("capacity");
    set(1).await.expect("capacity");
    let now = world
        .until("one is left", |now| now.live_instances() == 1)
        .await;
    assert!(
        now.instances
            .iter()
            .any(|one| one.id == first && one.lifecycle.is_live())
    );
}

#[tokio::test]
async fn some_instances_never_register() {
    let world = world(3, "exit 0").await;
    world.cloud.set_never_register(GROUP, 1);
    set(&world, 2).await.expect("capacity");
    world
        .until("both in service", |now| {
            now.instances
                .iter()
                .filter(|one| one.lifecycle == Lifecycle::InService)
                .count()
                == 2
        })
        .await;
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let registered = world
        .cloud
        .snapshot()
        .instances
        .iter()
        .filter(|one| one.container_status().is_some())
        .count();
    assert_eq!(registered, 1);
}

#[tokio::test]
async fn tags_are_kept_on_the_group() {
    let world = world(3, "exit 0").await;
    let tag = |value: &str| {
        Tag::builder()
            .resource_type("auto-scaling-group")
            .resource_id(GROUP)
            .key("clip-scaler:tasks")
            .value(value)
            .propagate_at_launch(false)
            .build()
    };
    world
        .autoscaling
        .create_or_update_tags()
        .tags(tag("k=1 why=<a&b>"))
        .send()
        .await
        .expect("a tag");
    world
        .autoscaling
        .create_or_update_tags()
        .tags(tag("k=2 why=<a&b>"))
        .send()
        .await
        .expect("a tag");
    let shown = group(&world).await;
    assert_eq!(shown.tags().len(), 1);
    assert_eq!(shown.tags()[0].value(), Some("k=2 why=<a&b>"));
}

#[tokio::test]
async fn answers_are_paged() {
    let world = world(120, "exit 0").await;
    for index in 2..60 {
        world.cloud.create_group(GroupConfig::new(
            &format!("clip-{index}"),
            CLUSTER,
            "g5.xlarge",
            1,
        ));
    }
    let first = world
        .autoscaling
        .describe_auto_scaling_groups()
        .send()
        .await
        .expect("a page");
    assert_eq!(first.auto_scaling_groups().len(), 50);
    let next = world
        .autoscaling
        .describe_auto_scaling_groups()
        .set_next_token(first.next_token().map(str::to_owned));
    assert_eq!(
        next.send()
            .await
            .expect("a page")
            .auto_scaling_groups()
            .len(),
        9
    );
    world.scale(110).await;
    let activities = || {
        world
            .autoscaling
            .describe_scaling_activities()
            .auto_scaling_group_name(GROUP)
    };
    let first = activities().send().await.expect("a page");
    assert_eq!(first.activities().len(), 100);
    let second = activities()
        .set_next_token(first.next_token().map(str::to_owned))
        .send()
        .await
        .expect("a page");
    assert_eq!((second.activities().len(), second.next_token()), (10, None));
    assert_eq!(
        activities()
            .max_records(5)
            .send()
            .await
            .expect("a page")
            .activities()
            .len(),
        5
    );
    let pool = world
        .autoscaling
        .describe_warm_pool()
        .auto_scaling_group_name(GROUP)
        .send()
        .await
        .expect("an answer");
    assert!(pool.instances().is_empty() && pool.warm_pool_configuration().is_none());
}

#[tokio::test]
async fn throttling_looks_like_aws() {
    let world = world(3, "exit 0").await;
    world.cloud.inject(ApiFault::always(
        "SetDesiredCapacity",
        ApiFaultKind::Throttle,
    ));
    let throttled = set(&world, 1).await.expect_err("throttled");
    assert_eq!(
        (throttled.code(), throttled.message()),
        (Some("Throttling"), Some("Rate exceeded"))
    );
    world.cloud.clear_api_faults();
    world.cloud.inject(ApiFault::next(
        "SetDesiredCapacity",
        2,
        ApiFaultKind::ServerError,
    ));
    set(&world, 1).await.expect("the third attempt");
}
