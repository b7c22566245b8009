//! Properties of the pure plan, on arbitrary observations.

use planner::observation::{
    ContainerInstance, ContainerInstanceStatus, Group, GroupInstance, LaneState, Lifecycle,
    Observation, Queue, Task, TaskStatus,
};
use planner::{Action, CapacityOption, Plan, Policy, plan};
use proptest::prelude::*;

const NOW: i64 = 1_700_000_000;

#[derive(Clone, Debug)]
struct AnyInstance {
    group: usize,
    lifecycle: Lifecycle,
    registered: bool,
    status: ContainerInstanceStatus,
    connected: bool,
    age: i64,
    task: Option<(TaskStatus, i64)>,
    /// Of those that it registered, without a task on it.
    gpus: (u32, u32),
    past: Option<(i64, i32)>,
}

fn any_instance() -> impl Strategy<Value = AnyInstance> {
    let lifecycle = prop_oneof![
        6 => Just(Lifecycle::InService),
        2 => Just(Lifecycle::Pending),
        1 => Just(Lifecycle::Terminating),
    ];
    let status = prop_oneof![
        6 => Just(ContainerInstanceStatus::Active),
        1 => Just(ContainerInstanceStatus::Draining),
        1 => Just(ContainerInstanceStatus::Other),
    ];
    let task_status = prop_oneof![
        Just(TaskStatus::Provisioning),
        Just(TaskStatus::Pending),
        Just(TaskStatus::Running),
        Just(TaskStatus::Running),
        Just(TaskStatus::Deactivating),
    ];
    (
        0..2_usize,
        lifecycle,
        any::<bool>(),
        status,
        prop::bool::weighted(0.9),
        0..2000_i64,
        prop::option::of((task_status, 0..1500_i64)),
        prop_oneof![8 => Just((1, 1)), 1 => Just((1, 0)), 1 => Just((0, 0))],
        prop::option::weighted(0.3, (0..1500_i64, 0..2_i32)),
    )
        .prop_map(
            |(group, lifecycle, registered, status, connected, age, task, gpus, past)| {
                AnyInstance {
                    group,
                    lifecycle,
                    registered,
                    status,
                    connected,
                    age,
                    task: task.filter(|_| registered && gpus == (1, 1)),
                    gpus,
                    past,
                }
            },
        )
}

fn any_policy() -> impl Strategy<Value = Policy> {
    (
        1..30_u32,
        0..4_u32,
        1..400_u32,
        0..200_u32,
        1..400_u32,
        0.1..300.0_f64,
        1..3_usize,
    )
        .prop_map(|(max, min, drain, grace, boot, rate, options)| Policy {
            max_instances: max,
            min_instances: min.min(max),
            target_drain_seconds: drain,
            idle_grace_seconds: grace,
            idle_exit_seconds: grace,
            boot_seconds: boot,
            images_per_second: rate,
            options: (0..options)
                .map(|number| CapacityOption::of_group(&format!("group-{number}")))
                .collect(),
            ..Policy::default()
        })
}

fn observation(
    policy: &Policy,
    queue: Queue,
    instances: &[AnyInstance],
    unfilled: [u32; 2],
) -> Observation {
    let mut groups: Vec<Group> = policy
        .options
        .iter()
        .map(|option| Group {
            name: option.auto_scaling_group.clone(),
            max: policy.max_instances,
            ..Group::default()
        })
        .collect();
    let mut seen = Observation {
        at: NOW,
        queue,
        ..Observation::default()
    };
    for (number, instance) in instances.iter().enumerate() {
        let group = instance.group % groups.len();
        let id = format!("i-{number}");
        groups[group].instances.push(GroupInstance {
            id: id.clone(),
            state: instance.lifecycle,
            healthy: true,
            zone: String::new(),
            instance_type: String::new(),
        });
        if instance.lifecycle != Lifecycle::Terminating {
            groups[group].desired += 1;
        }
        let arn = format!("ci/{number}");
        if instance.registered {
            seen.container_instances.push(ContainerInstance {
                arn: arn.clone(),
                instance_id: id,
                status: instance.status,
                agent_connected: instance.connected,
                registered_at: Some(NOW - instance.age),
                version: number as i64,
                gpus: instance.gpus.0,
                free_gpus: instance
                    .gpus
                    .1
                    .saturating_sub(u32::from(instance.task.is_some())),
            });
        }
        if let Some((status, age)) = instance.task {
            seen.tasks.push(Task {
                arn: format!("task/{number}"),
                status,
                stopping: status == TaskStatus::Deactivating,
                container_instance: Some(arn.clone()),
                created_at: Some(NOW - age - 30),
                started_at: (!status.is_starting()).then_some(NOW - age),
                stopped_at: None,
                stop_code: None,
                stop_reason: None,
                exit_code: None,
            });
        }
        if let Some((ago, exit_code)) = instance.past {
            seen.tasks.push(Task {
                arn: format!("past/{number}"),
                status: TaskStatus::Stopped,
                stopping: true,
                container_instance: Some(arn),
                created_at: Some(NOW - ago - 100),
                started_at: Some(NOW - ago - 50),
                stopped_at: Some(NOW - ago),
                stop_code: None,
                stop_reason: None,
                exit_code: Some(exit_code),
            });
        }
    }
    for (group, extra) in groups.iter_mut().zip(unfilled) {
        group.desired = (group.desired + extra).min(group.max);
    }
    seen.groups = groups;
    seen
}

fn any_case() -> impl Strategy<Value = (Policy, Observation)> {
    (
        any_policy(),
        prop::collection::vec(any_instance(), 0..12),
        (0..20_000_u64, 0..300_u64, 0..3_u64),
        [0..3_u32, 0..3_u32],
        any::<bool>(),
    )
        .prop_map(
            |(policy, instances, (visible, in_flight, delayed), unfilled, is_empty)| {
                let queue = if is_empty {
                    Queue::default()
                } else {
                    Queue {
                        visible,
                        in_flight,
                        delayed,
                        oldest_age: None,
                    }
                };
                let seen = observation(&policy, queue, &instances, unfilled);
                (policy, seen)
            },
        )
}

/// Instances that count against the maximum.
fn footprint(seen: &Observation) -> u32 {
    seen.groups
        .iter()
        .map(|group| {
            let terminating = group
                .instances
                .iter()
                .filter(|instance| instance.state == Lifecycle::Terminating)
                .count() as u32;
            let living = group.instances.len() as u32 - terminating;
            terminating + living.max(group.desired)
        })
        .sum()
}

/// The world right after the plan: what was released is on its way out, what
/// was launched is pending, what was asked for is not there yet.
fn after(seen: &Observation, plan: &Plan) -> Observation {
    let mut next = seen.clone();
    for action in plan.actions() {
        match action {
            Action::Release {
                group,
                instance,
                decrement,
                ..
            } => {
                let group = next
                    .groups
                    .iter_mut()
                    .find(|known| known.name == *group)
                    .expect("a known group");
                group
                    .instances
                    .iter_mut()
                    .filter(|known| known.id == *instance)
                    .for_each(|known| known.state = Lifecycle::Terminating);
                group.desired -= u32::from(*decrement);
            }
            Action::StopTask { task, reason } => {
                for known in next.tasks.iter_mut().filter(|known| known.arn == *task) {
                    known.stopping = true;
                    known.status = TaskStatus::Stopped;
                    known.stopped_at = Some(seen.at);
                    known.stop_reason = Some(reason.clone());
                    known.stop_code = Some("UserInitiated".to_owned());
                }
            }
            Action::SetDesired { group, to, .. } => {
                next.groups
                    .iter_mut()
                    .filter(|known| known.name == *group)
                    .for_each(|known| known.desired = *to);
            }
            Action::Activate {
                container_instance, ..
            } => next
                .container_instances
                .iter_mut()
                .filter(|known| known.arn == *container_instance)
                .for_each(|known| known.status = ContainerInstanceStatus::Active),
            Action::RunTasks { count, .. } => {
                let mut left = count.get();
                let living: Vec<String> = next
                    .groups
                    .iter()
                    .flat_map(|group| &group.instances)
                    .filter(|instance| instance.state != Lifecycle::Terminating)
                    .map(|instance| instance.id.clone())
                    .collect();
                for instance in &mut next.container_instances {
                    let is_free = instance.free_gpus > 0
                        && instance.agent_connected
                        && instance.status == ContainerInstanceStatus::Active
                        && living.contains(&instance.instance_id);
                    if left == 0 || !is_free {
                        continue;
                    }
                    left -= 1;
                    instance.free_gpus = 0;
                    instance.version += 100;
                    next.tasks.push(Task {
                        arn: format!("new/{}", instance.arn),
                        status: TaskStatus::Pending,
                        stopping: false,
                        container_instance: Some(instance.arn.clone()),
                        created_at: Some(seen.at),
                        started_at: None,
                        stopped_at: None,
                        stop_code: None,
                        stop_reason: None,
                        exit_code: None,
                    });
                }
            }
            Action::SetLane { open } => {
                let lane = next.lane.as_mut().expect("a lane");
                lane.state = if *open {
                    LaneState::Opening
                } else {
                    LaneState::Closing
                };
            }
            Action::Remember { group, key, value } => {
                next.groups
                    .iter_mut()
                    .filter(|known| known.name == *group)
                    .for_each(|known| {
                        known.tags.insert(key.clone(), value.clone());
                    });
            }
        }
    }
    next
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn never_above_the_maximum((policy, seen) in any_case()) {
        let plan = plan(&seen, &policy);
        let before = footprint(&seen);
        let next = footprint(&after(&seen, &plan));
        prop_assert!(next <= before.max(policy.max_instances), "{before} → {next}: {plan:?}");
        for group in &after(&seen, &plan).groups {
            prop_assert!(group.desired <= group.max.max(group.instances.len() as u32));
        }
        prop_assert!(plan.figures.tasks_wanted <= policy.max_instances);
    }

    #[test]
    fn launches_fit_the_places_and_the_calls((policy, seen) in any_case()) {
        let plan = plan(&seen, &policy);
        let places = plan.figures.ready
            + plan.actions().filter(|action| matches!(action, Action::Activate { .. })).count() as u32;
        prop_assert!(plan.launches() <= places);
        let mut tokens: Vec<&str> = plan
            .actions()
            .filter_map(|action| match action {
                Action::RunTasks { token, .. } => Some(token.as_str()),
                _ => None,
            })
            .collect();
        let calls = tokens.len();
        tokens.sort_unstable();
        tokens.dedup();
        prop_assert_eq!(tokens.len(), calls, "every call has its own token");
        prop_assert!(tokens.iter().all(|token| token.len() <= 64));
    }

    #[test]
    fn an_instance_with_a_task_is_never_released((policy, seen) in any_case()) {
        let plan = plan(&seen, &policy);
        for action in plan.actions() {
            let Action::Release { container_instance: Some(arn), .. } = action else { continue };
            let holds = seen.tasks.iter().any(|task| {
                task.status != TaskStatus::Stopped && task.container_instance.as_ref() == Some(arn)
            });
            prop_assert!(!holds, "{arn} holds a task");
            let held = seen.container_instances.iter().any(|known| known.arn == *arn && known.holds_gpu());
            prop_assert!(!held, "a GPU of {arn} is held");
        }
    }

    #[test]
    fn more_backlog_never_means_fewer((policy, seen) in any_case(), more in 1..50_000_u64) {
        let mut larger = seen.clone();
        larger.queue.visible += more;
        let small = plan(&seen, &policy).figures;
        let large = plan(&larger, &policy).figures;
        prop_assert!(large.tasks_wanted >= small.tasks_wanted);
        prop_assert!(large.instances_wanted >= small.instances_wanted, "{small:?} {large:?}");
    }

    #[test]
    fn a_plan_that_was_carried_out_leaves_nothing_to_do((policy, seen) in any_case()) {
        let mut world = seen;
        // Options that rest are tried one after the other; each step settles one.
        for _ in 0..6 {
            let plan = plan(&world, &policy);
            if plan.decisions.is_empty() {
                return Ok(());
            }
            world = after(&world, &plan);
        }
        let left = plan(&world, &policy);
        prop_assert!(left.decisions.is_empty(), "{:?}", left.decisions);
    }

    #[test]
    fn the_same_observation_gives_the_same_plan((policy, seen) in any_case()) {
        let first = plan(&seen, &policy);
        prop_assert_eq!(&first, &plan(&seen, &policy));
        // Carried out twice, it ends where it ends when carried out once, but
        // for RunTask and Terminate, which AWS itself refuses to repeat.
        for decision in &first.decisions {
            if let Action::SetDesired { to, .. } = decision.action {
                prop_assert!(to <= policy.max_instances.max(footprint(&seen)));
            }
        }
    }

    #[test]
    fn work_always_leads_somewhere((policy, seen) in any_case()) {
        // Something runs, starts, boots, is asked for, or the plan says why not.
        let plan = plan(&seen, &policy);
        let figures = &plan.figures;
        let moves = figures.running + figures.starting + figures.booting + figures.requested
            + figures.stopping + figures.ready + figures.unusable + figures.draining
            + plan.decisions.len() as u32;
        if seen.queue.backlog() > 0 && moves == 0 {
            prop_assert!(
                !plan.notes.is_empty() || plan.verdict.contains("held"),
                "no action and no reason: {}", plan.verdict
            );
        }
        prop_assert!(!plan.verdict.is_empty());
        prop_assert!(plan.decisions.iter().all(|decision| !decision.why.is_empty()));
    }

    #[test]
    fn an_empty_queue_launches_nothing((policy, mut seen) in any_case()) {
        seen.queue = Queue::default();
        let plan = plan(&seen, &policy);
        prop_assert_eq!(plan.launches(), 0);
        let living: u32 = seen.groups.iter().map(|group| group.instances.len() as u32).sum();
        let raised = plan.actions().any(|action| matches!(action, Action::SetDesired { from, to, .. } if to > from));
        prop_assert!(!raised || living <= policy.min_instances.max(living) && policy.min_instances > 0);
    }
}

#[test]
fn a_decision_over_a_hundred_tasks_and_instances_takes_no_time() {
    let policy = Policy {
        max_instances: 200,
        options: vec![CapacityOption::of_group("group-0")],
        ..Policy::default()
    };
    let instances: Vec<AnyInstance> = (0..100)
        .map(|_| AnyInstance {
            group: 0,
            lifecycle: Lifecycle::InService,
            registered: true,
            status: ContainerInstanceStatus::Active,
            connected: true,
            age: 500,
            task: Some((TaskStatus::Running, 400)),
            gpus: (1, 1),
            past: Some((450, 0)),
        })
        .collect();
    let queue = Queue {
        visible: 1_000_000,
        ..Queue::default()
    };
    let seen = observation(&policy, queue, &instances, [0, 0]);
    let began = std::time::Instant::now();
    let plan = plan(&seen, &policy);
    assert_eq!(plan.figures.running, 100);
    assert!(began.elapsed().as_millis() < 100, "{:?}", began.elapsed());
}
