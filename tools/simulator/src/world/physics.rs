//! How fast things are, and what goes wrong by itself.

use std::time::Duration;

use planner::worker::{GPU_BATCH_SIZE, GPU_MAX_MESSAGES, LEAST_BATCHES_HELD, holding_limit};

use super::Ms;

/// Share of the boot time between launch and registration with ECS; the rest
/// is the task's image pull and model load.
const REGISTER_SHARE: f64 = 0.6;

/// How fast things are. The same for every scaler that is compared.
#[derive(Clone, Debug)]
pub struct Physics {
    pub images_per_second: f64,
    /// From asking for an instance to its first vector.
    pub boot_seconds: f64,
    /// From a capacity change to the launch.
    pub group_reaction: Ms,
    /// From terminate to gone.
    pub terminate: Ms,
    /// Container start on an instance that has the image.
    pub warm_start: Ms,
    /// Model load, once the container runs.
    pub load: Ms,
    /// From the container's end to STOPPED.
    pub stop: Ms,
    /// From a message's receive to its image's place in the model's queue:
    /// download and decode. Images do it side by side.
    pub fetch: Ms,
    /// From the model to the message's deletion: store and publish. Images do
    /// it side by side.
    pub deliver: Ms,
    /// Messages of a lost task come back after this.
    pub visibility: Ms,
}

impl Physics {
    /// The usual delays, with the given rate and boot time.
    pub fn new(images_per_second: f64, boot_seconds: f64) -> Self {
        Self {
            images_per_second,
            boot_seconds,
            group_reaction: 3_000,
            terminate: 40_000,
            warm_start: 3_000,
            load: (boot_seconds * 1000.0 * 0.07) as Ms,
            stop: 2_000,
            // Small objects come and go in 100 to 200 ms (Amazon S3 user
            // guide, "Best practices design patterns: optimizing Amazon S3
            // performance").
            fetch: 150,
            deliver: 150,
            // The template's VisibilityTimeoutSeconds.
            visibility: 180_000,
        }
    }

    /// Messages that a task holds at most, as `gpu-task` on a GPU does.
    pub(super) fn held_most(&self) -> u64 {
        let visibility = Duration::from_millis(self.visibility as u64);
        let least = LEAST_BATCHES_HELD * GPU_BATCH_SIZE;
        holding_limit(self.images_per_second, visibility, least, GPU_MAX_MESSAGES) as u64
    }

    /// Milliseconds of the model for one image.
    pub(super) fn per_image(&self) -> f64 {
        1000.0 / self.images_per_second
    }

    pub(super) fn register_after(&self) -> Ms {
        (self.boot_seconds * 1000.0 * REGISTER_SHARE) as Ms - self.group_reaction
    }

    pub(super) fn cold_start(&self) -> Ms {
        (self.boot_seconds * 1000.0 * (1.0 - REGISTER_SHARE)) as Ms - self.load
    }
}

#[derive(Clone, Debug, Default)]
pub struct Chaos {
    /// Decides everything below.
    pub rng: fastrand::Rng,
    /// Chance that one try of an API call fails; the SDK tries three times.
    pub call_failure: f64,
    /// Spans in which every call fails.
    pub outages: Vec<(Ms, Ms)>,
    pub never_registers: f64,
    /// Chance that an instance is lost at some time of its life.
    pub lost: f64,
    /// Spans in which tasks fail at start.
    pub broken_tasks: Vec<(Ms, Ms)>,
    /// Chance that the queue's count is zero though it is not.
    pub count_dips: f64,
}

impl Chaos {
    /// Whether a call, with the SDK's two more tries, succeeds.
    pub fn call_succeeds(&mut self, now: Ms) -> bool {
        if within(&self.outages, now) {
            return false;
        }
        (0..3).any(|_| self.rng.f64() >= self.call_failure)
    }
}

pub(super) fn within(spans: &[(Ms, Ms)], at: Ms) -> bool {
    spans.iter().any(|(from, to)| (*from..*to).contains(&at))
}
