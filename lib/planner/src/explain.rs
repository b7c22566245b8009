//! A plan in words: for `scaler explain`, and for people who read logs.

use std::fmt::Write;

use serde_json::Value;

use crate::lane::{Choice, Comparison};
use crate::observation::Observation;
use crate::plan::{Action, Plan};
use crate::policy::Policy;

/// Something recorded that is no observation.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// Not JSON, or not of the right form.
    #[error(
        "not a recorded observation: {0}; a log line of the scaler or its `observation` is accepted"
    )]
    Form(#[from] serde_json::Error),
}

/// An observation and, when it was recorded too, its policy.
pub struct Recorded {
    /// What was seen.
    pub observation: Observation,
    /// The rules of that run.
    pub policy: Option<Policy>,
}

/// Reads a whole log line (`observation` and `policy` inside), or a bare
/// observation.
pub fn read_record(text: &str) -> Result<Recorded, RecordError> {
    let mut value: Value = serde_json::from_str(text)?;
    let policy = match value.get_mut("policy").map(Value::take) {
        Some(policy) if !policy.is_null() => Some(serde_json::from_value(policy)?),
        _ => None,
    };
    let observation = match value.get_mut("observation") {
        Some(inner) => inner.take(),
        None => value,
    };
    Ok(Recorded {
        observation: serde_json::from_value(observation)?,
        policy,
    })
}

/// The plan for people.
pub fn render(observation: &Observation, policy: &Policy, plan: &Plan) -> String {
    let mut text = String::new();
    let queue = &observation.queue;
    let figures = &plan.figures;
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}", plan.verdict);
    let _ = write!(
        text,
        "\nqueue      {} visible, {} in flight, {} delayed",
        queue.visible, queue.in_flight, queue.delayed
    );
    if let Some(age) = queue.oldest_age {
        let _ = write!(text, ", oldest {age} s");
    }
    let source = match observation.images_per_second {
        Some(_) => "reported",
        None => "configured",
    };
    let boot_source = match figures.boot_is_learned {
        true => "learned",
        false => "configured",
    };
    let _ = writeln!(
        text,
        "\nrate       {:.1} images/s a task ({source}); drain within {} s, boot {:.0} s ({boot_source})",
        figures.images_per_second, policy.target_drain_seconds, figures.boot_seconds
    );
    let _ = writeln!(
        text,
        "tasks      {} wanted; {} running, {} starting, {} stopping, {} lost",
        figures.tasks_wanted, figures.running, figures.starting, figures.stopping, figures.lost
    );
    let _ = writeln!(
        text,
        "instances  {} wanted, {} count against the maximum of {}; {} ready, {} booting, {} requested, {} draining, {} unusable, {} terminating",
        figures.instances_wanted,
        figures.footprint,
        policy.max_instances,
        figures.ready,
        figures.booting,
        figures.requested,
        figures.draining,
        figures.unusable,
        figures.terminating
    );
    let _ = writeln!(
        text,
        "backlog    {} now, {} when an instance asked for now would begin",
        figures.backlog, figures.backlog_after_boot
    );
    if let Some(comparison) = &figures.comparison {
        let _ = write!(text, "{}", compared(comparison, observation));
    }
    if let Some(spent) = &figures.spent {
        let _ = writeln!(text, "spent      {spent} since midnight UTC");
    }
    if figures.crash_loop > 0 {
        let _ = writeln!(text, "launches   {} failed in a row", figures.crash_loop);
    }
    let _ = writeln!(text, "\nactions");
    if plan.decisions.is_empty() {
        let _ = writeln!(text, "  none");
    }
    for decision in &plan.decisions {
        let _ = writeln!(
            text,
            "  {}\n      because {}",
            describe(&decision.action),
            decision.why
        );
    }
    if !plan.notes.is_empty() {
        let _ = writeln!(text, "\nseen");
        for note in &plan.notes {
            let _ = writeln!(text, "  {note}");
        }
    }
    text
}

fn compared(comparison: &Comparison, observation: &Observation) -> String {
    let mut text = String::new();
    let lane = observation.lane.clone().unwrap_or_default();
    let source = match lane.seconds_per_image {
        Some(_) => "reported",
        None => "configured",
    };
    let _ = writeln!(
        text,
        "lane       {:?}; {:.3} s an image ({source}), {:.1} images/s at most, ${:.2} a million; {} messages in the GPUs' own queue",
        lane.state,
        comparison.seconds_per_image,
        comparison.ceiling,
        comparison.dollars_per_image * 1e6,
        lane.gpu_queue.backlog()
    );
    for (name, choice, estimate) in [
        ("lane alone", Choice::Lane, &comparison.lane),
        ("both", Choice::Both, &comparison.both),
        ("GPUs alone", Choice::Gpus, &comparison.gpus),
    ] {
        let mark = if comparison.choice == choice {
            "→"
        } else {
            " "
        };
        let _ = write!(
            text,
            "         {mark} {name:<11}{:>8.0} s  ${:<9.4} {} instances started",
            estimate.seconds, estimate.dollars, estimate.starts
        );
        let why = match comparison.choice == choice {
            true => format!(": {}", comparison.why),
            false => String::new(),
        };
        let _ = writeln!(text, "{why}");
    }
    text
}

/// An action in words.
pub fn describe(action: &Action) -> String {
    match action {
        Action::Release {
            group,
            instance,
            decrement,
            ..
        } => {
            let capacity = if *decrement {
                "and lower the group by one"
            } else {
                "and leave the group's capacity"
            };
            format!("drain and terminate {instance} of {group} {capacity}")
        }
        Action::StopTask { task, .. } => format!("stop {task}"),
        Action::SetDesired { group, from, to } => {
            format!("set the capacity of {group} from {from} to {to}")
        }
        Action::Activate { instance, .. } => format!("take {instance} back into use"),
        Action::RunTasks { count, .. } => format!("run {} tasks", count.get()),
        Action::SetLane { open: true } => "open the express lane".to_owned(),
        Action::SetLane { open: false } => "close the express lane".to_owned(),
        Action::Remember { key, value, .. } => format!("remember {key}: {value}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_line_and_a_bare_observation_are_read() {
        let bare = r#"{"at": 5, "queue": {"visible": 2}}"#;
        let record = read_record(bare).expect("a bare observation");
        assert_eq!(record.observation.queue.visible, 2);
        assert!(record.policy.is_none());
        let line = format!(
            r#"{{"message":"scaler run","observation":{bare},"policy":{{"maxInstances":7}}}}"#
        );
        let record = read_record(&line).expect("a log line");
        assert_eq!(record.policy.map(|policy| policy.max_instances), Some(7));
        assert!(read_record("[]").is_err());
    }
}
