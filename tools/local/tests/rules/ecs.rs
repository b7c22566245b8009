//! The local ECS keeps AWS's rules, seen through AWS's own client.

use std::time::Duration;

use crate::common::{CLUSTER, FAMILY, definition, world};
use aws_sdk_ecs::{
    error::ProvideErrorMetadata,
    operation::{run_task::RunTaskError, stop_task::StopTaskError},
    types::{ContainerInstanceStatus, DesiredStatus, TaskStopCode},
};
use local::cloud::{ApiFault, ApiFaultKind, TaskStatus};
use serde_json::json;

const SLEEP: &str = "exec sleep 60";

#[tokio::test]
async fn run_task_starts_one_to_ten_tasks() {
    let world = world(3, SLEEP).await;
    world.scale(1).await;
    for count in [0, -1, 11] {
        let refused = world
            .run(count)
            .send()
            .await
            .expect_err("a refusal")
            .into_service_error();
        assert!(
            matches!(refused, RunTaskError::InvalidParameterException(_)),
            "{count}: {refused:?}"
        );
    }
    let answer = world.run(1).send().await.expect("an answer");
    assert_eq!(answer.tasks().len(), 1);
    assert_eq!(answer.tasks()[0].last_status(), Some("PENDING"));
}

#[tokio::test]
async fn without_registered_instances_the_call_is_refused() {
    let world = world(3, SLEEP).await;
    let refused = world
        .run(1)
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert_eq!(refused.code(), Some("InvalidParameterException"));
    assert_eq!(
        refused.message(),
        Some("No Container Instances were found in your cluster.")
    );
}

#[tokio::test]
async fn what_does_not_fit_is_in_failures() {
    let world = world(3, SLEEP).await;
    world.scale(2).await;
    let answer = world.run(5).send().await.expect("an answer");
    assert_eq!(answer.tasks().len(), 2, "one GPU each");
    let reasons: Vec<_> = answer
        .failures()
        .iter()
        .filter_map(|failure| failure.reason())
        .collect();
    assert_eq!(reasons, ["RESOURCE:GPU", "RESOURCE:GPU"]);
    assert!(answer.failures().iter().all(|failure| {
        failure
            .arn()
            .is_some_and(|arn| arn.contains("container-instance"))
    }));
}

#[tokio::test]
async fn memory_and_cpu_are_resources_too() {
    let world = world(3, SLEEP).await;
    world.scale(1).await;
    for (field, amount, reason) in [
        ("memory", 16_384, "RESOURCE:MEMORY"),
        ("cpu", 8192, "RESOURCE:CPU"),
    ] {
        let mut large = definition(SLEEP);
        large["family"] = json!("large");
        large["containerDefinitions"][0][field] = json!(amount);
        world
            .cloud
            .register_task_definition(&large)
            .expect("a definition");
        let answer = world
            .run(1)
            .task_definition("large")
            .send()
            .await
            .expect("an answer");
        assert_eq!(answer.failures()[0].reason(), Some(reason));
    }
}

#[tokio::test]
async fn a_client_token_starts_its_tasks_once() {
    let world = world(3, SLEEP).await;
    world.scale(2).await;
    let first = world
        .run(1)
        .client_token("token-1")
        .send()
        .await
        .expect("an answer");
    let again = world
        .run(1)
        .client_token("token-1")
        .send()
        .await
        .expect("an answer");
    assert_eq!(first.tasks()[0].task_arn(), again.tasks()[0].task_arn());
    assert_eq!(world.cloud.snapshot().tasks.len(), 1);

    let other = world
        .run(2)
        .client_token("token-1")
        .send()
        .await
        .expect_err("a conflict")
        .into_service_error();
    let RunTaskError::ConflictException(conflict) = other else {
        panic!("{other:?}")
    };
    assert_eq!(
        conflict.resource_ids(),
        [first.tasks()[0].task_arn().expect("an ARN").to_owned()]
    );

    let long = "x".repeat(65);
    let refused = world
        .run(1)
        .client_token(long)
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert_eq!(refused.code(), Some("InvalidParameterException"));
}

#[tokio::test]
async fn an_answer_that_got_lost_is_repeated_for_the_same_token() {
    let world = world(3, SLEEP).await;
    world.scale(2).await;
    world
        .cloud
        .inject(ApiFault::next("RunTask", 1, ApiFaultKind::AnswerLost));
    // The SDK tries again by itself, with the same token.
    let answer = world
        .run(1)
        .client_token("token-2")
        .send()
        .await
        .expect("an answer");
    assert_eq!(answer.tasks().len(), 1);
    assert_eq!(
        world.cloud.snapshot().tasks.len(),
        1,
        "one task, although RunTask was called twice"
    );
    let calls = world
        .cloud
        .calls()
        .iter()
        .filter(|call| call.operation == "RunTask")
        .count();
    assert_eq!(calls, 2);
}

#[tokio::test]
async fn a_task_is_a_real_process_with_the_environment_of_its_definition() {
    let world = world(1, "echo $GREETING $NVIDIA_VISIBLE_DEVICES; exit 3").await;
    world.scale(1).await;
    let arn = run_one(world.run(1)).await;
    let snapshot = world
        .until("the task stopped", |now| now.live_tasks() == 0)
        .await;
    let output = std::fs::read_to_string(&snapshot.tasks[0].log).expect("a log");
    assert!(output.starts_with("hello GPU-"), "{output}");

    let task = describe(&world, &arn).await;
    assert_eq!(task.last_status(), Some("STOPPED"));
    assert_eq!(
        task.stop_code(),
        Some(&TaskStopCode::EssentialContainerExited)
    );
    assert_eq!(
        task.stopped_reason(),
        Some("Essential container in task exited")
    );
    assert_eq!(task.containers()[0].exit_code(), Some(3));
    for at in [
        task.created_at(),
        task.pull_started_at(),
        task.pull_stopped_at(),
        task.started_at(),
        task.stopping_at(),
        task.stopped_at(),
    ] {
        assert!(at.is_some());
    }
}

#[tokio::test]
async fn a_task_passes_through_its_states_and_each_is_an_event() {
    let world = world(1, "exit 0").await;
    world.scale(1).await;
    let mut events = world.cloud.subscribe();
    let arn = run_one(world.run(1)).await;
    world
        .until("the task stopped", |now| now.live_tasks() == 0)
        .await;
    let mut seen = Vec::new();
    let mut versions = Vec::new();
    while let Ok(event) = events.try_recv() {
        if event.detail_type == "ECS Task State Change" {
            assert_eq!(event.resources, std::slice::from_ref(&arn));
            seen.push(
                event.detail["lastStatus"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned(),
            );
            versions.push(event.detail["version"].as_u64().expect("a version"));
            assert!(
                event.detail["createdAt"].is_string(),
                "events carry ISO times"
            );
        }
    }
    assert_eq!(seen, ["PENDING", "RUNNING", "STOPPED"]);
    assert!(versions.is_sorted());
}

#[tokio::test]
async fn stop_task_sends_sigterm_then_sigkill() {
    let polite = world(1, "trap 'exit 7' TERM; while :; do sleep 0.05; done").await;
    polite.scale(1).await;
    let arn = run_one(polite.run(1)).await;
    polite
        .until("running", |now| now.tasks[0].status == TaskStatus::Running)
        .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let answer = polite
        .ecs
        .stop_task()
        .cluster(CLUSTER)
        .task(&arn)
        .reason("not needed")
        .send()
        .await
        .expect("an answer");
    assert_eq!(
        answer.task().and_then(|task| task.desired_status()),
        Some("STOPPED")
    );
    polite.until("stopped", |now| now.live_tasks() == 0).await;
    let task = describe(&polite, &arn).await;
    assert_eq!(task.containers()[0].exit_code(), Some(7));
    assert_eq!(task.stop_code(), Some(&TaskStopCode::UserInitiated));
    assert_eq!(task.stopped_reason(), Some("not needed"));

    let deaf = world(1, "trap '' TERM; while :; do sleep 0.05; done").await;
    deaf.scale(1).await;
    let arn = run_one(deaf.run(1)).await;
    deaf.until("running", |now| now.tasks[0].status == TaskStatus::Running)
        .await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    deaf.ecs
        .stop_task()
        .cluster(CLUSTER)
        .task(&arn)
        .send()
        .await
        .expect("an answer");
    deaf.until("stopped", |now| now.live_tasks() == 0).await;
    assert_eq!(
        describe(&deaf, &arn).await.containers()[0].exit_code(),
        Some(137)
    );

    let unknown = deaf
        .ecs
        .stop_task()
        .cluster(CLUSTER)
        .task("none")
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert!(
        matches!(unknown, StopTaskError::InvalidParameterException(_)),
        "{unknown:?}"
    );
}

#[tokio::test]
async fn a_killed_task_exits_with_137() {
    let world = world(1, SLEEP).await;
    world.scale(1).await;
    let arn = run_one(world.run(1)).await;
    let running = world
        .until("running", |now| now.tasks[0].status == TaskStatus::Running)
        .await;
    assert!(world.cloud.kill_task(&running.tasks[0].id));
    world.until("stopped", |now| now.live_tasks() == 0).await;
    let task = describe(&world, &arn).await;
    assert_eq!(task.containers()[0].exit_code(), Some(137));
    assert_eq!(
        task.stop_code(),
        Some(&TaskStopCode::EssentialContainerExited)
    );
}

#[tokio::test]
async fn a_lost_instance_takes_its_tasks_along_and_is_replaced() {
    let world = world(2, SLEEP).await;
    world.scale(1).await;
    let arn = run_one(world.run(1)).await;
    let running = world
        .until("running", |now| now.tasks[0].status == TaskStatus::Running)
        .await;
    let lost = running.instances[0].id.clone();
    assert!(world.cloud.kill_instance(&lost));
    world.until("stopped", |now| now.live_tasks() == 0).await;
    let task = describe(&world, &arn).await;
    assert_eq!(
        task.stopped_reason(),
        Some(format!("Host EC2 (instance {lost}) terminated.").as_str())
    );
    assert_eq!(task.containers()[0].exit_code(), None);
    world
        .until("a new instance", |now| {
            now.instances
                .iter()
                .any(|one| one.id != lost && one.container_status().is_some())
        })
        .await;
}

#[tokio::test]
async fn an_image_that_is_not_there_fails_at_start() {
    let world = world(1, SLEEP).await;
    world.scale(1).await;
    let mut unknown = definition(SLEEP);
    unknown["family"] = json!("unknown");
    unknown["containerDefinitions"][0]["image"] = json!("registry/none:1");
    world
        .cloud
        .register_task_definition(&unknown)
        .expect("a definition");
    let arn = run_one(world.run(1).task_definition("unknown")).await;
    world.until("stopped", |now| now.live_tasks() == 0).await;
    let task = describe(&world, &arn).await;
    assert_eq!(task.stop_code(), Some(&TaskStopCode::TaskFailedToStart));
    assert!(
        task.containers()[0]
            .reason()
            .is_some_and(|reason| reason.starts_with("CannotPullContainerError"))
    );
}

#[tokio::test]
async fn tasks_of_a_deregistered_definition_go_on_and_none_starts() {
    let world = world(1, SLEEP).await;
    world.scale(1).await;
    let arn = run_one(world.run(1)).await;
    world
        .until("running", |now| now.tasks[0].pid.is_some())
        .await;
    let definition = world.cloud.snapshot().tasks[0].definition.arn.clone();
    world.cloud.deregister_task_definition(&definition);
    let refused = world.run(1).send().await.expect_err("refused");
    assert_eq!(refused.message(), Some("TaskDefinition is inactive"));
    assert_eq!(describe(&world, &arn).await.last_status(), Some("RUNNING"));
}

#[tokio::test]
async fn lists_are_paged_and_filtered() {
    let world = world(150, SLEEP).await;
    world
        .cloud
        .register_task_definition(&definition("exit 0"))
        .expect("a second revision");
    world.scale(120).await;
    for _ in 0..12 {
        assert_eq!(
            world
                .run(10)
                .task_definition(format!("{FAMILY}:2"))
                .started_by("test")
                .send()
                .await
                .expect("tasks")
                .tasks()
                .len(),
            10
        );
    }
    world
        .until("all stopped", |now| now.live_tasks() == 0)
        .await;
    let list = || {
        world
            .ecs
            .list_tasks()
            .cluster(CLUSTER)
            .desired_status(DesiredStatus::Stopped)
    };
    let first = list().send().await.expect("a page");
    assert_eq!(first.task_arns().len(), 100);
    let second = list()
        .set_next_token(first.next_token().map(str::to_owned))
        .send()
        .await
        .expect("a page");
    assert_eq!((second.task_arns().len(), second.next_token()), (20, None));
    assert_eq!(
        list()
            .family("other")
            .send()
            .await
            .expect("a page")
            .task_arns()
            .len(),
        0
    );
    assert_eq!(
        list()
            .started_by("test")
            .max_results(7)
            .send()
            .await
            .expect("a page")
            .task_arns()
            .len(),
        7
    );
    let running = world
        .ecs
        .list_tasks()
        .cluster(CLUSTER)
        .send()
        .await
        .expect("a page");
    assert_eq!(running.task_arns().len(), 0, "RUNNING is the default");

    let too_many = world
        .ecs
        .list_tasks()
        .cluster(CLUSTER)
        .max_results(101)
        .send()
        .await
        .expect_err("a refusal");
    assert_eq!(
        too_many.into_service_error().code(),
        Some("InvalidParameterException")
    );
    let both = list()
        .started_by("test")
        .family(FAMILY)
        .send()
        .await
        .expect_err("a refusal");
    assert_eq!(
        both.into_service_error().code(),
        Some("InvalidParameterException")
    );

    let instances = world
        .ecs
        .list_container_instances()
        .cluster(CLUSTER)
        .send()
        .await
        .expect("a page");
    assert_eq!(instances.container_instance_arns().len(), 100);
    let describe = world.ecs.describe_tasks().cluster(CLUSTER);
    let arns: Vec<String> = first
        .task_arns()
        .iter()
        .chain(second.task_arns())
        .cloned()
        .collect();
    let refused = describe
        .clone()
        .set_tasks(Some(arns))
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert_eq!(refused.code(), Some("InvalidParameterException"));
    let answer = describe
        .tasks("nothing")
        .tasks(&first.task_arns()[0])
        .send()
        .await
        .expect("an answer");
    assert_eq!(
        (answer.tasks().len(), answer.failures()[0].reason()),
        (1, Some("MISSING"))
    );
}

#[tokio::test]
async fn a_draining_instance_takes_no_task_and_keeps_its_own() {
    let world = world(2, SLEEP).await;
    world.scale(1).await;
    run_one(world.run(1)).await;
    let arns = world
        .ecs
        .list_container_instances()
        .cluster(CLUSTER)
        .send()
        .await
        .expect("instances");
    let arn = &arns.container_instance_arns()[0];
    let update = |status: ContainerInstanceStatus| {
        world
            .ecs
            .update_container_instances_state()
            .cluster(CLUSTER)
            .container_instances(arn)
            .status(status)
            .send()
    };
    let drained = update(ContainerInstanceStatus::Draining)
        .await
        .expect("an answer");
    assert_eq!(drained.container_instances()[0].status(), Some("DRAINING"));
    let refused = world
        .run(1)
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert_eq!(
        refused.message(),
        Some("No Container Instances were found in your cluster.")
    );
    assert_eq!(world.cloud.snapshot().live_tasks(), 1);
    let draining = world
        .ecs
        .list_container_instances()
        .cluster(CLUSTER)
        .status(ContainerInstanceStatus::Draining)
        .send()
        .await;
    assert_eq!(draining.expect("a list").container_instance_arns().len(), 1);

    let active = update(ContainerInstanceStatus::Active)
        .await
        .expect("an answer");
    let shown = &active.container_instances()[0];
    assert_eq!(shown.status(), Some("ACTIVE"));
    let gpus = |resources: &[aws_sdk_ecs::types::Resource]| {
        resources
            .iter()
            .find(|one| one.name() == Some("GPU"))
            .map(|one| one.string_set_value().len())
    };
    assert_eq!(
        (
            gpus(shown.registered_resources()),
            gpus(shown.remaining_resources())
        ),
        (Some(1), Some(0))
    );
    let wrong = update(ContainerInstanceStatus::Registering)
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert_eq!(wrong.code(), Some("InvalidParameterException"));
}

#[tokio::test]
async fn what_no_program_asks_for_is_refused_and_not_ignored() {
    let world = world(1, SLEEP).await;
    world.scale(1).await;
    let constraint = aws_sdk_ecs::types::PlacementConstraint::builder()
        .r#type(aws_sdk_ecs::types::PlacementConstraintType::DistinctInstance)
        .build();
    let constrained = world.run(1).placement_constraints(constraint).send().await;
    let refused = constrained.expect_err("a refusal").into_service_error();
    assert_eq!(
        refused.message(),
        Some("placementConstraints is not served locally")
    );
    let unknown = world.ecs.list_clusters().send().await;
    let refused = unknown.expect_err("a refusal").into_service_error();
    assert_eq!(
        refused.message(),
        Some("ListClusters is not served locally")
    );
}

#[tokio::test]
async fn unknown_clusters_and_definitions_are_typed_errors() {
    let world = world(1, SLEEP).await;
    let refused = world
        .run(1)
        .cluster("other")
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert!(
        matches!(refused, RunTaskError::ClusterNotFoundException(_)),
        "{refused:?}"
    );
    let refused = world
        .run(1)
        .task_definition("other")
        .send()
        .await
        .expect_err("a refusal")
        .into_service_error();
    assert!(
        matches!(refused, RunTaskError::ClientException(_)),
        "{refused:?}"
    );
}

#[tokio::test]
async fn throttled_and_failing_calls_look_like_aws() {
    let world = world(1, SLEEP).await;
    world
        .cloud
        .inject(ApiFault::always("ListTasks", ApiFaultKind::Throttle));
    let throttled = world
        .ecs
        .list_tasks()
        .cluster(CLUSTER)
        .send()
        .await
        .expect_err("throttled")
        .into_service_error();
    assert_eq!(
        (throttled.code(), throttled.message()),
        (Some("ThrottlingException"), Some("Rate exceeded"))
    );
    world.cloud.clear_api_faults();
    world
        .cloud
        .inject(ApiFault::always("ListTasks", ApiFaultKind::ServerError));
    let failed = world
        .ecs
        .list_tasks()
        .cluster(CLUSTER)
        .send()
        .await
        .expect_err("failed")
        .into_service_error();
    assert!(failed.is_server_exception(), "{failed:?}");
    world.cloud.clear_api_faults();
    // Two throttled calls are less than the SDK's three attempts.
    world
        .cloud
        .inject(ApiFault::next("ListTasks", 2, ApiFaultKind::Throttle));
    world
        .ecs
        .list_tasks()
        .cluster(CLUSTER)
        .send()
        .await
        .expect("the third attempt");
}

#[tokio::test]
async fn when_the_cloud_goes_its_processes_go() {
    let world = world(2, SLEEP).await;
    world.scale(2).await;
    world.run(2).send().await.expect("tasks");
    let running = world
        .until("running", |now| {
            now.tasks
                .iter()
                .all(|task| task.status == TaskStatus::Running)
        })
        .await;
    let pids: Vec<u32> = running.tasks.iter().filter_map(|task| task.pid).collect();
    assert_eq!(pids.len(), 2);
    world.cloud.shut_down().await;
    drop(world);
    for pid in pids {
        for _ in 0..100 {
            if !std::path::Path::new(&format!("/proc/{pid}")).exists() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(
            !std::path::Path::new(&format!("/proc/{pid}")).exists(),
            "process {pid} is left"
        );
    }
}

async fn run_one(
    request: aws_sdk_ecs::operation::run_task::builders::RunTaskFluentBuilder,
) -> String {
    let answer = request.send().await.expect("an answer");
    assert!(answer.failures().is_empty(), "{answer:?}");
    answer.tasks()[0].task_arn().expect("an ARN").to_owned()
}

async fn describe(world: &crate::common::World, arn: &str) -> aws_sdk_ecs::types::Task {
    let answer = world
        .ecs
        .describe_tasks()
        .cluster(CLUSTER)
        .tasks(arn)
        .send()
        .await
        .expect("an answer");
    answer.tasks()[0].clone()
}
