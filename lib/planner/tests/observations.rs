//! What `scaler explain` says of recorded observations.

use planner::explain::read_record;
use planner::{Action, CapacityOption, Plan, Policy, plan};

/// Just after a stack update: three instances are busy with tasks of the task
/// definition that the update replaced.
const OLDER_DEFINITION: &str = include_str!("observations/older_definition.json");

fn decided(observation: &planner::Observation) -> Plan {
    let policy = Policy {
        options: vec![CapacityOption::of_group("clip-1")],
        ..Policy::default()
    };
    plan(observation, &policy)
}

fn gives_up(plan: &Plan) -> bool {
    plan.actions().any(|action| {
        matches!(
            action,
            Action::Release { .. } | Action::StopTask { .. } | Action::Remember { .. }
        )
    })
}

#[test]
fn instances_busy_with_an_older_definition_are_kept() {
    let seen = read_record(OLDER_DEFINITION).expect("a record").observation;
    let plan = decided(&seen);
    assert_eq!(plan.figures.running, 3);
    assert!(!gives_up(&plan), "{plan:?}");
}

#[test]
fn a_held_gpu_keeps_its_instance_though_no_task_is_seen_and_no_work_is_left() {
    let mut seen = read_record(OLDER_DEFINITION).expect("a record").observation;
    seen.tasks.clear();
    for (visible, oldest_age) in [(629, Some(3_000)), (0, None)] {
        seen.queue.visible = visible;
        seen.queue.in_flight = 0;
        seen.queue.oldest_age = oldest_age;
        let plan = decided(&seen);
        assert!(!gives_up(&plan), "{plan:?}");
    }
    // Were they free, they would go.
    for instance in &mut seen.container_instances {
        instance.free_gpus = 1;
    }
    assert!(gives_up(&decided(&seen)));
}

#[test]
fn an_instance_without_a_gpu_is_given_back_and_its_option_rests() {
    let mut seen = read_record(OLDER_DEFINITION).expect("a record").observation;
    seen.tasks.remove(2);
    let third = &mut seen.container_instances[2];
    (third.gpus, third.free_gpus) = (0, 0);
    third.registered_at = Some(seen.at - 59);
    assert!(!gives_up(&decided(&seen)));
    seen.at += 1;
    let plan = decided(&seen);
    let actions: Vec<&Action> = plan.actions().collect();
    assert!(
        matches!(actions[..], [Action::Release { instance, .. }, Action::Remember { key, .. }]
            if instance == "i-03" && key == planner::streak::OPTION_KEY),
        "{plan:?}"
    );
}
