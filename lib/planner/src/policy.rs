//! What the user wants, as numbers.

use serde::{Deserialize, Serialize};

/// The planner's rules. Every field has the meaning of the environment
/// variable of its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Policy {
    /// Never more instances than this, in any state, over all options.
    pub max_instances: u32,
    /// Never fewer instances than this.
    pub min_instances: u32,
    /// A backlog is drained within this many seconds once its tasks work.
    pub target_drain_seconds: u32,
    /// An instance that has had no work for this many seconds goes.
    pub idle_grace_seconds: u32,
    /// How long a task waits for work before it exits with 0: this time counts
    /// as idle time of its instance.
    pub idle_exit_seconds: u32,
    /// From asking for an instance to the first vector on it, until a start was
    /// seen: then that counts ([`crate::boot`]).
    pub boot_seconds: u32,
    /// Images per second of one task, until tasks report their own.
    pub images_per_second: f64,
    /// Capacity options in the order of preference.
    pub options: Vec<CapacityOption>,
    /// The express lane, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lane: Option<LanePolicy>,
    /// Once so many dollars are spent since midnight UTC, nothing new is
    /// started; 0: no ceiling.
    #[serde(skip_serializing_if = "is_zero")]
    pub max_daily_cost: f64,
}

fn is_zero(number: &f64) -> bool {
    *number == 0.0
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            max_instances: 5,
            min_instances: 0,
            target_drain_seconds: 45,
            idle_grace_seconds: 30,
            idle_exit_seconds: 30,
            boot_seconds: 180,
            images_per_second: 60.0,
            options: Vec::new(),
            lane: None,
            max_daily_cost: 0.0,
        }
    }
}

/// A place to get instances from: one Auto Scaling group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CapacityOption {
    /// What logs call it, such as `g4dn.xlarge/on-demand`.
    pub name: String,
    /// Name of the group.
    pub auto_scaling_group: String,
    /// Instance type, for logs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance_type: Option<String>,
    /// Dollars of an instance for an hour, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usd_per_hour: Option<f64>,
}

/// What the express lane is and costs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LanePolicy {
    /// Invocations at once at most.
    pub max_concurrency: u32,
    /// The function's memory in MiB: a second of it costs so much more.
    pub memory_mb: u32,
    /// Most images of one invocation.
    pub batch_size: u32,
    /// Billed seconds of one image when there is a backlog, until the lane
    /// reports its own.
    pub seconds_per_image: f64,
    /// Dollars of a second of one GiB.
    pub usd_per_gb_second: f64,
    /// Dollars of an invocation.
    pub usd_per_request: f64,
}

impl CapacityOption {
    /// An option that is called as its group.
    pub fn of_group(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            auto_scaling_group: name.to_owned(),
            instance_type: None,
            usd_per_hour: None,
        }
    }
}

/// What tasks report is believed within this factor of the configured rate: a
/// wrong metric must not start a fleet, nor starve a backlog.
const RATE_TRUST: f64 = 10.0;

impl Policy {
    /// The rate to plan with: what tasks report, else the configured one.
    pub fn rate(&self, reported: Option<f64>) -> f64 {
        let configured = self.images_per_second.max(0.001);
        match reported {
            Some(rate) if rate.is_finite() && rate > 0.0 => {
                rate.clamp(configured / RATE_TRUST, configured * RATE_TRUST)
            }
            _ => configured,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absurd_rate_is_bounded() {
        let policy = Policy {
            images_per_second: 50.0,
            ..Policy::default()
        };
        assert_eq!(policy.rate(None), 50.0);
        assert_eq!(policy.rate(Some(80.0)), 80.0);
        assert_eq!(policy.rate(Some(0.001)), 5.0);
        assert_eq!(policy.rate(Some(1e9)), 500.0);
        assert_eq!(policy.rate(Some(f64::NAN)), 50.0);
    }
}
