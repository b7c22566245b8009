//! What the planner's figures take for granted of a task: how many messages it
//! holds. `gpu-task` keeps to it, the simulator counts on it.

use std::time::Duration;

/// Share of the visibility within which everything held must be finished at
/// the measured rate. The heartbeat extends what takes longer; the limit
/// keeps that the exception.
const SHARE_OF_VISIBILITY: f64 = 0.5;

/// A task holds at least so many batches, however slow it is: one in the
/// model, one ready, one on its way.
pub const LEAST_BATCHES_HELD: usize = 3;

/// Images of a batch on a GPU, unless configured.
pub const GPU_BATCH_SIZE: usize = 64;

/// Most messages held by a task on a GPU, unless configured.
pub const GPU_MAX_MESSAGES: usize = 1024;

/// How many messages may be held at `rate` images per second. `least` keeps
/// the stages busy however slow the task is.
pub fn holding_limit(rate: f64, visibility: Duration, least: usize, most: usize) -> usize {
    let finishable = rate * visibility.as_secs_f64() * SHARE_OF_VISIBILITY;
    (finishable as usize).clamp(least.min(most).max(1), most.max(1))
}
