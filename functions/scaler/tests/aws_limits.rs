//! Whole runs (observe, plan, act) against an AWS that enforces its limits.

mod common;

use common::{FakeAws, config, launch, now};
use planner::LanePolicy;
use planner::observation::{ActivityStatus, LaneState, Queue, TaskStatus};
use planner::streak::OPTION_KEY;
use scaler::act::Completion;
use scaler::aws::Aws;
use scaler::config::Config;
use scaler::handler::{Cause, RunRecord, metric_line, run};

fn visible(count: u64) -> Queue {
    Queue {
        visible: count,
        ..Queue::default()
    }
}

async fn wake(aws: &FakeAws, max: u32, options: usize) -> RunRecord {
    let cause = Cause::Other("schedule".to_owned());
    run(aws, &config(max, options), &cause)
        .await
        .expect("everything essential can be read")
}

/// Instances and tasks from zero: how many instances, and the RunTask calls of
/// the first and, once the first tasks are seen to work, the second wake.
async fn from_zero(messages: u64, max: u32) -> (u32, Vec<String>, usize) {
    let aws = FakeAws::new(max, &["gpu"]);
    aws.with(|state| state.queue = visible(messages));
    wake(&aws, max, 1).await;
    let desired = aws.with(|state| state.group("gpu").desired);
    assert!(aws.with(|state| state.calls_of("RunTask")).is_empty());
    aws.with(|state| state.boot_all("gpu"));
    wake(&aws, max, 1).await;
    aws.with(|state| {
        for task in &mut state.tasks {
            task.status = TaskStatus::Running;
            task.started_at = Some(now() - 90);
        }
    });
    wake(&aws, max, 1).await;
    // A converged state asks for nothing more.
    let report = wake(&aws, max, 1).await;
    assert_eq!(report.plan.decisions, Vec::new(), "{}", report.plan.verdict);
    aws.with(|state| {
        let counts = state
            .calls_of("RunTask")
            .iter()
            .map(|call| call.split(' ').nth(1).unwrap_or("").to_owned())
            .collect();
        (desired, counts, state.running())
    })
}

#[tokio::test(start_paused = true)]
async fn from_zero_exactly_what_the_backlog_needs() {
    assert_eq!(from_zero(1, 5).await, (1, vec!["1".to_owned()], 1));
    assert_eq!(from_zero(11, 5).await, (5, vec!["5".to_owned()], 5));
    assert_eq!(from_zero(3, 5).await, (3, vec!["3".to_owned()], 3));
}

#[tokio::test(start_paused = true)]
async fn a_fleet_of_25_comes_in_calls_of_at_most_ten() {
    let (desired, calls, running) = from_zero(120, 25).await;
    assert_eq!((desired, running), (25, 25));
    // Five first, as long as no launch is known to work.
    assert_eq!(calls, ["5", "10", "10"]);
}

#[tokio::test(start_paused = true)]
async fn the_fake_refuses_what_aws_refuses() {
    let aws = FakeAws::new(5, &["gpu"]);
    let code = |answer: Result<_, platform::aws::Error>| answer.map(|_: ()| ()).unwrap_err().code;
    let too_many = aws.run_task(11, "t").await.map(|_| ());
    assert_eq!(code(too_many), "InvalidParameterException");
    let above = aws.set_desired_capacity("gpu", 6).await;
    assert_eq!(code(above), "ValidationError");
    let arns: Vec<String> = (0..101).map(|number| number.to_string()).collect();
    let many = aws.describe_tasks(&arns).await.map(|_| ());
    assert_eq!(code(many), "InvalidParameterException");
    assert!(aws.set_draining(&arns[..11], true).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn lists_over_a_page_are_read_to_their_end() {
    let aws = FakeAws::new(400, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(10_000);
        for number in 0..250 {
            let id = format!("i-{number}");
            state.add_instance("gpu", &id, 500);
            state.add_task(&id, TaskStatus::Running, 400);
        }
    });
    let report = wake(&aws, 400, 1).await;
    assert_eq!(report.plan.figures.running, 250);
    assert_eq!(report.observation.container_instances.len(), 250);
    let described = aws.with(|state| state.calls_of("DescribeTasks"));
    assert_eq!(described.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn throttled_calls_are_tried_again_in_the_same_run() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(1);
        state
            .errors
            .insert("SetDesiredCapacity", vec!["ThrottlingException"]);
        state
            .errors
            .insert("ListTasks", vec!["ThrottlingException"]);
    });
    let report = wake(&aws, 5, 1).await;
    assert_eq!(aws.with(|state| state.group("gpu").desired), 1);
    let failed: Vec<_> = report
        .outcomes
        .iter()
        .filter(|outcome| outcome.result == Completion::Failed)
        .filter_map(|outcome| outcome.cause.as_deref())
        .collect();
    assert_eq!(failed, ["ThrottlingException"]);
}

#[tokio::test(start_paused = true)]
async fn a_run_that_cannot_see_does_nothing() {
    for essential in [
        "GetQueueAttributes",
        "ListTasks",
        "ListContainerInstances",
        "DescribeAutoScalingGroups",
    ] {
        let aws = FakeAws::new(5, &["gpu"]);
        aws.with(|state| {
            state.queue = visible(100);
            state.broken.push(essential);
        });
        let cause = Cause::Other("schedule".to_owned());
        let answer = run(&aws, &config(5, 1), &cause).await;
        assert!(answer.is_err(), "{essential}");
        assert_eq!(aws.with(|state| state.group("gpu").desired), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_run_without_metrics_and_activities_still_decides() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(2);
        state.broken.push("GetMetricData");
        state.broken.push("DescribeScalingActivities");
    });
    let report = wake(&aws, 5, 1).await;
    assert_eq!(aws.with(|state| state.group("gpu").desired), 2);
    assert_eq!(report.observation.missing.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_failure_after_work_is_found_by_the_messages_deleted() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(100);
        state.add_instance("gpu", "i-1", 500);
    });
    wake(&aws, 5, 1).await;
    assert!(aws.with(|state| state.calls_of("GetMetricData deleted").is_empty()));
    aws.with(|state| {
        state.tasks.clear();
        for ran in [120, 240] {
            state.add_task("i-1", TaskStatus::Stopped, ran);
            let task = state.tasks.last_mut().expect("just added");
            task.stopped_at = Some(now() - ran + 100);
            task.exit_code = Some(5);
        }
        state.working_minutes.clear();
    });
    let report = wake(&aws, 5, 1).await;
    assert_eq!(report.plan.figures.crash_loop, 2);
    aws.with(|state| {
        let ended = |task: &planner::observation::Task| task.stopped_at;
        let last = state.tasks.iter().filter_map(ended).max();
        state.working_minutes = vec![last.expect("a stopped task") - 61];
    });
    let report = wake(&aws, 5, 1).await;
    assert_eq!(report.plan.figures.crash_loop, 0);
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_placed_is_reported_and_the_rest_runs() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(3);
        for id in ["i-1", "i-2", "i-3"] {
            state.add_instance("gpu", id, 10);
        }
    });
    // The agent of one goes away between the look and the launch.
    let observation = scaler::observe::observe(&aws, &config(5, 1).policy, now())
        .await
        .expect("readable");
    let plan = planner::plan(&observation, &config(5, 1).policy);
    aws.with(|state| state.instances[1].agent_connected = false);
    let outcomes = scaler::act::act(&aws, &plan).await;
    assert_eq!(outcomes.len(), 1);
    assert_eq!(outcomes[0].result, Completion::Partial);
    assert_eq!(outcomes[0].launched, 2);
    assert_eq!(outcomes[0].cause.as_deref(), Some("RESOURCE:GPU"));
}

#[tokio::test(start_paused = true)]
async fn two_runs_at_once_launch_nothing_twice() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| state.queue = visible(3));
    tokio::join!(wake(&aws, 5, 1), wake(&aws, 5, 1));
    assert_eq!(aws.with(|state| state.group("gpu").desired), 3);

    // Five stand ready, three are wanted: each of the two runs asks for three.
    aws.with(|state| {
        for number in 0..5 {
            state.add_instance("gpu", &format!("i-{number}"), 5);
        }
    });
    let policy = config(5, 1).policy;
    let observation = scaler::observe::observe(&aws, &policy, now())
        .await
        .expect("readable");
    let first = planner::plan(&observation, &policy);
    let second = planner::plan(&observation, &policy);
    scaler::act::act(&aws, &first).await;
    scaler::act::act(&aws, &second).await;
    assert_eq!(aws.with(|state| state.running()), 3);
}

#[tokio::test(start_paused = true)]
async fn a_message_that_arrives_while_the_last_task_exits_is_worked_on_at_once() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.add_instance("gpu", "i-1", 900);
        state.add_task("i-1", TaskStatus::Stopped, 800);
        state.tasks[0].exit_code = Some(0);
        state.queue = visible(1);
    });
    wake(&aws, 5, 1).await;
    aws.with(|state| {
        assert_eq!(state.running(), 1);
        assert_eq!(state.group("gpu").desired, 1);
        assert!(state.calls_of("Terminate").is_empty());
    });
}

#[tokio::test(start_paused = true)]
async fn an_instance_whose_task_exited_idle_goes_with_the_event_of_its_exit() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.add_instance("gpu", "i-1", 900);
        state.add_task("i-1", TaskStatus::Stopped, 800);
        state.tasks[0].exit_code = Some(0);
    });
    wake(&aws, 5, 1).await;
    aws.with(|state| {
        assert_eq!(state.group("gpu").desired, 0);
        assert!(state.group("gpu").instances.is_empty());
        let order: Vec<&String> = state
            .calls
            .iter()
            .filter(|call| call.starts_with("Update") || call.starts_with("Terminate"))
            .collect();
        assert!(order[0].starts_with("UpdateContainerInstancesState true"));
        assert_eq!(order[1], "TerminateInstanceInAutoScalingGroup i-1 true");
    });
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_got_a_task_in_the_last_moment_stays() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.add_instance("gpu", "i-1", 900);
        state.place_before_drain = true;
    });
    let report = wake(&aws, 5, 1).await;
    assert_eq!(report.outcomes[0].result, Completion::Skipped);
    aws.with(|state| {
        assert_eq!(state.group("gpu").instances.len(), 1);
        assert!(state.calls_of("Terminate").is_empty());
    });
}

#[tokio::test(start_paused = true)]
async fn many_idle_instances_are_drained_ten_at_a_time() {
    let aws = FakeAws::new(25, &["gpu"]);
    aws.with(|state| {
        for number in 0..25 {
            state.add_instance("gpu", &format!("i-{number}"), 900);
        }
    });
    wake(&aws, 25, 1).await;
    aws.with(|state| {
        assert_eq!(state.group("gpu").desired, 0);
        assert_eq!(state.calls_of("UpdateContainerInstancesState").len(), 3);
    });
}

#[tokio::test(start_paused = true)]
async fn a_drained_instance_is_taken_back_when_work_comes() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.add_instance("gpu", "i-1", 900);
        state
            .errors
            .insert("TerminateInstanceInAutoScalingGroup", vec!["Throttling"; 9]);
    });
    wake(&aws, 5, 1).await;
    aws.with(|state| state.queue = visible(1));
    wake(&aws, 5, 1).await;
    aws.with(|state| {
        assert_eq!(state.running(), 1);
        assert_eq!(state.group("gpu").instances.len(), 1);
    });
}

#[tokio::test(start_paused = true)]
async fn an_instance_lost_in_mid_work_is_replaced_while_its_messages_wait() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.add_instance("gpu", "i-1", 900);
        state.add_task("i-1", TaskStatus::Running, 800);
        // Gone from the group; ECS still shows instance and task.
        state.group("gpu").instances.clear();
        state.group("gpu").desired = 0;
        state.instances[0].agent_connected = false;
        state.queue = Queue {
            in_flight: 1,
            ..Queue::default()
        };
    });
    let report = wake(&aws, 5, 1).await;
    assert_eq!(report.plan.figures.lost, 1);
    assert_eq!(aws.with(|state| state.group("gpu").desired), 1);
}

#[tokio::test(start_paused = true)]
async fn without_capacity_the_next_option_is_asked() {
    let aws = FakeAws::new(5, &["gpu", "spare"]);
    aws.with(|state| {
        state.queue = visible(2);
        state.group("gpu").desired = 2;
        state.activities.insert(
            "gpu".to_owned(),
            vec![launch(
                None,
                10,
                ActivityStatus::Failed,
                "InsufficientInstanceCapacity",
            )],
        );
    });
    let report = wake(&aws, 5, 2).await;
    aws.with(|state| {
        assert_eq!(state.group("gpu").desired, 0);
        assert_eq!(state.group("spare").desired, 2);
    });
    let whys: String = report
        .plan
        .decisions
        .iter()
        .map(|decision| decision.why.as_str())
        .collect();
    assert!(whys.contains("InsufficientInstanceCapacity"), "{whys}");
}

#[tokio::test(start_paused = true)]
async fn the_only_option_is_left_to_the_groups_own_tries() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(2);
        state.group("gpu").desired = 2;
        state.activities.insert(
            "gpu".to_owned(),
            vec![launch(
                None,
                10,
                ActivityStatus::Failed,
                "InsufficientInstanceCapacity",
            )],
        );
    });
    wake(&aws, 5, 1).await;
    assert_eq!(aws.with(|state| state.group("gpu").desired), 2);
    // Once nothing is wanted any more, the request is withdrawn.
    aws.with(|state| state.queue = Queue::default());
    wake(&aws, 5, 1).await;
    assert_eq!(aws.with(|state| state.group("gpu").desired), 0);
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_never_registers_goes_and_its_option_rests() {
    let aws = FakeAws::new(5, &["gpu", "spare"]);
    aws.with(|state| {
        state.queue = visible(1);
        state.add_to_group("gpu", "i-dead");
        state.activities.insert(
            "gpu".to_owned(),
            vec![launch(Some("i-dead"), 700, ActivityStatus::Successful, "")],
        );
    });
    wake(&aws, 5, 2).await;
    aws.with(|state| {
        assert!(state.group("gpu").instances.is_empty());
        assert_eq!(state.group("gpu").desired, 0);
        assert!(state.group("gpu").tags[OPTION_KEY].starts_with("k=1 "));
    });
    wake(&aws, 5, 2).await;
    assert_eq!(aws.with(|state| state.group("spare").desired), 1);
    assert_eq!(aws.with(|state| state.group("gpu").desired), 0);
}

#[tokio::test(start_paused = true)]
async fn a_task_stuck_before_running_is_stopped_and_counts_as_a_failure() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(1);
        state.add_instance("gpu", "i-1", 900);
        state.add_task("i-1", TaskStatus::Pending, 700);
    });
    let report = wake(&aws, 5, 1).await;
    let stops = aws.with(|state| state.calls_of("StopTask"));
    assert_eq!(stops.len(), 1);
    assert!(stops[0].contains("scaler: stuck in PENDING"), "{stops:?}");
    // The run's second pass has seen it stopped.
    assert_eq!(report.plan.figures.crash_loop, 1);
    assert!(aws.with(|state| state.calls_of("RunTask")).is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_count_that_lags_behind_intake_is_looked_at_again() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(1);
        state.stale_counts = vec![0, 0];
    });
    let cause = Cause::Work("intake".to_owned());
    run(&aws, &config(5, 1), &cause).await.expect("readable");
    assert_eq!(aws.with(|state| state.group("gpu").desired), 1);
}

#[tokio::test(start_paused = true)]
async fn one_wrong_count_does_not_call_back_what_is_on_its_way() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(1);
        state.stale_counts = vec![0];
        state.add_to_group("gpu", "i-1");
        state.activities.insert(
            "gpu".to_owned(),
            vec![launch(Some("i-1"), 60, ActivityStatus::Successful, "")],
        );
    });
    wake(&aws, 5, 1).await;
    assert_eq!(aws.with(|state| state.group("gpu").instances.len()), 1);
    // When it stays empty, the instance is called back.
    aws.with(|state| state.queue = Queue::default());
    wake(&aws, 5, 1).await;
    assert_eq!(aws.with(|state| state.group("gpu").instances.len()), 0);
    assert_eq!(aws.with(|state| state.group("gpu").desired), 0);
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_came_for_nothing_has_no_grace() {
    let launched = |aws: &FakeAws, age: i64| {
        aws.with(|state| {
            state.add_instance("gpu", "i-1", 1);
            let launch = launch(Some("i-1"), age, ActivityStatus::Successful, "");
            state.activities.insert("gpu".to_owned(), vec![launch]);
        });
    };
    let left = |aws: &FakeAws| aws.with(|state| state.group("gpu").instances.len());

    // The queue has been empty since it was launched, but one count is not enough.
    let aws = FakeAws::new(5, &["gpu"]);
    launched(&aws, 60);
    aws.with(|state| {
        state.queue = visible(1);
        state.stale_counts = vec![0];
    });
    wake(&aws, 5, 1).await;
    assert_eq!((left(&aws), aws.with(|state| state.running())), (1, 1));
    let aws = FakeAws::new(5, &["gpu"]);
    launched(&aws, 60);
    let report = wake(&aws, 5, 1).await;
    assert!(report.plan.calls_back);
    assert_eq!(left(&aws), 0);

    // The counts may lag behind the send that asked for it.
    let aws = FakeAws::new(5, &["gpu"]);
    launched(&aws, 10);
    wake(&aws, 5, 1).await;
    assert_eq!(left(&aws), 1);

    // One that has worked keeps its grace.
    let aws = FakeAws::new(5, &["gpu"]);
    launched(&aws, 60);
    aws.with(|state| state.add_task("i-1", TaskStatus::Stopped, 20));
    let report = wake(&aws, 5, 1).await;
    assert!(!report.plan.calls_back);
    assert_eq!(left(&aws), 1);
}

#[tokio::test(start_paused = true)]
async fn a_report_becomes_metrics_and_can_be_explained() {
    let aws = FakeAws::new(5, &["gpu"]);
    aws.with(|state| {
        state.queue = visible(4);
        state
            .errors
            .insert("SetDesiredCapacity", vec!["ThrottlingException"]);
    });
    let report = wake(&aws, 5, 1).await;
    let line = metric_line(&report, Some(0), &config(5, 1));
    let line = line.to_json(SystemTime::UNIX_EPOCH);
    assert_eq!(line["FailedActions"], 1.0);
    assert_eq!(line["QueueName"], "input");
    assert!(line["EventToDecision"].as_f64() > Some(0.0));
    assert_eq!(line.get("RegisteredToTask"), None, "nothing has started");
    let cause = report.outcomes[0].cause.as_deref();
    assert_eq!(cause, Some("ThrottlingException"));

    let line = serde_json::to_string(&report).expect("serialisable");
    let record = planner::explain::read_record(&line).expect("its own log line");
    let policy = record.policy.expect("recorded");
    let plan = planner::plan(&record.observation, &policy);
    assert_eq!(plan, report.plan);
    let text = planner::explain::render(&record.observation, &policy, &plan);
    assert!(text.contains("4 visible"), "{text}");
}

use std::time::SystemTime;

/// With an express lane: ten at once, 0.2 s an image.
fn with_lane() -> Config {
    let mut config = config(5, 1);
    config.policy.target_drain_seconds = 600;
    config.policy.images_per_second = 60.0;
    config.policy.options[0].usd_per_hour = Some(0.526);
    config.policy.lane = Some(LanePolicy {
        max_concurrency: 10,
        memory_mb: 1769,
        batch_size: 10,
        seconds_per_image: 0.2,
        usd_per_gb_second: 0.000_016_666_7,
        usd_per_request: 0.000_000_2,
    });
    config
}

#[tokio::test(start_paused = true)]
async fn the_lane_is_left_what_it_can_do_closed_for_gpus_and_never_lost_sight_of() {
    let aws = FakeAws::new(5, &["gpu"]);
    let wake = async |backlog: u64| {
        aws.with(|state| state.queue = visible(backlog));
        let cause = Cause::Other("schedule".to_owned());
        run(&aws, &with_lane(), &cause).await
    };
    aws.with(|state| state.lane_state = LaneState::Open);
    let record = wake(100).await.expect("a run");
    assert_eq!(record.plan.decisions, Vec::new());
    aws.with(|state| state.gpu_queue = visible(1));
    wake(100).await.expect("a run");
    assert_eq!(aws.with(|state| state.group("gpu").desired), 1);
    assert!(
        aws.with(|state| state.calls_of("UpdateEventSourceMapping"))
            .is_empty()
    );
    wake(200_000).await.expect("a run");
    let set = aws.with(|state| state.calls_of("UpdateEventSourceMapping"));
    assert_eq!(set, ["UpdateEventSourceMapping false"]);
    // What is not essential may be missing; the queue of what only GPUs can do may not.
    aws.with(|state| state.broken = vec!["GetEventSourceMapping"]);
    let record = wake(100).await.expect("a run");
    assert_eq!(record.observation.missing.len(), 1);
    aws.with(|state| state.broken = vec!["GetQueueAttributes"]);
    assert!(wake(100).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn the_days_ceiling_is_a_metric_and_reads_what_the_lane_used() {
    let aws = FakeAws::new(5, &["gpu"]);
    let mut config = with_lane();
    let cause = Cause::Other("schedule".to_owned());
    aws.with(|state| {
        state.queue = visible(1_000_000);
        state.lane_state = LaneState::Open;
        state.lane_usage.seconds = 40_000.0;
    });
    run(&aws, &config, &cause).await.expect("a run");
    assert!(
        !aws.with(|state| state.calls_of("GetMetricData"))
            .contains(&"GetMetricData usage".to_owned())
    );
    aws.with(|state| state.group("gpu").desired = 0);
    config.policy.max_daily_cost = 1.0;
    let record = run(&aws, &config, &cause).await.expect("a run");
    assert_eq!(aws.with(|state| state.group("gpu").desired), 0);
    assert!(
        record.plan.verdict.contains("MAX_DAILY_COST is $1.00"),
        "{}",
        record.plan.verdict
    );
    let line = metric_line(&record, None, &config);
    let json = line.to_json(std::time::SystemTime::now());
    assert_eq!(json["CostCeilingReached"], 1.0);
}
