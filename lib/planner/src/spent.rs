//! What was spent since midnight UTC, as far as one run can know it: the
//! running time of instances from their groups' activities, the lane's from its
//! function's metrics. Storage, requests and transfer are not in it.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::observation::{ActivityKind, Group, Lifecycle, Observation};
use crate::policy::Policy;

const DAY_SECONDS: i64 = 86_400;

/// Dollars since midnight UTC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// On instances.
    pub instances: f64,
    /// On the express lane.
    pub lane: f64,
}

impl Spent {
    /// Both together.
    pub fn total(self) -> f64 {
        self.instances + self.lane
    }
}

impl fmt::Display for Spent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { instances, lane } = self;
        let total = self.total();
        write!(
            formatter,
            "${total:.2} (instances ${instances:.2}, express lane ${lane:.2})"
        )
    }
}

/// On instances, since midnight. A group's activities are read fifty at a time:
/// of a day with more, the older ones are missing.
pub(crate) fn on_instances(seen: &Observation, policy: &Policy) -> f64 {
    let midnight = seen.at - seen.at.rem_euclid(DAY_SECONDS);
    let options = policy.options.iter().filter_map(|option| {
        let group = &option.auto_scaling_group;
        let group = seen.groups.iter().find(|known| known.name == *group)?;
        Some((group, option.usd_per_hour?))
    });
    options
        .map(|(group, price)| running_seconds(group, midnight, seen.at) as f64 * price / 3600.0)
        .sum()
}

fn running_seconds(group: &Group, midnight: i64, now: i64) -> i64 {
    let when = |kind: ActivityKind, id: &str| {
        let mut all = group.activities.iter();
        all.find(|activity| activity.kind == kind && activity.instance.as_deref() == Some(id))
            .map(|activity| activity.started_at)
    };
    let named = group
        .activities
        .iter()
        .filter_map(|activity| activity.instance.as_deref());
    let there = group.instances.iter();
    let there = there.filter(|instance| instance.state != Lifecycle::Terminating);
    let there: Vec<&str> = there.map(|instance| instance.id.as_str()).collect();
    let mut ids: Vec<&str> = named.chain(there.iter().copied()).collect();
    ids.sort_unstable();
    ids.dedup();
    ids.into_iter()
        .filter_map(|id| {
            let launched = when(ActivityKind::Launch, id).unwrap_or(midnight);
            let ended = match when(ActivityKind::Terminate, id) {
                Some(at) => at,
                None if there.contains(&id) => now,
                None => return None,
            };
            Some((ended - launched.max(midnight)).max(0))
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::{Activity, ActivityStatus, GroupInstance};
    use crate::policy::CapacityOption;

    #[test]
    fn instances_cost_from_their_launch_or_midnight_to_their_end_or_now() {
        let midnight = 20_000 * DAY_SECONDS;
        let activity = |kind, id: &str, started_at| Activity {
            kind,
            instance: Some(id.to_owned()),
            started_at,
            ended_at: None,
            status: ActivityStatus::Successful,
            message: None,
        };
        let group = Group {
            name: "g".to_owned(),
            instances: vec![GroupInstance {
                id: "i-runs".to_owned(),
                state: Lifecycle::InService,
                healthy: true,
                zone: String::new(),
                instance_type: String::new(),
            }],
            activities: vec![
                activity(ActivityKind::Launch, "i-runs", midnight + 5_400),
                activity(ActivityKind::Terminate, "i-old", midnight + 1_800),
                activity(ActivityKind::Terminate, "i-gone", midnight - 7_200),
                activity(ActivityKind::Launch, "i-gone", midnight - 9_000),
            ],
            ..Group::default()
        };
        let seen = Observation {
            at: midnight + 7_200,
            groups: vec![group],
            ..Observation::default()
        };
        let mut option = CapacityOption::of_group("g");
        option.usd_per_hour = Some(0.5);
        let policy = Policy {
            options: vec![option],
            ..Policy::default()
        };
        // Half an hour since its launch, and half an hour since midnight.
        assert_eq!(on_instances(&seen, &policy), 0.5);
    }
}
