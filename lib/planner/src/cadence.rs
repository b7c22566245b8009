//! How often the scaler is woken and looks again, for those who wake it, run
//! it and simulate it.

use std::time::Duration;

/// A busy intake wakes the scaler at most once in this time, unless
/// configured: the scaler sees what came meanwhile within its own next run.
pub const WAKE_INTERVAL: Duration = Duration::from_secs(5);

/// Waits before another look at a queue that seems empty though somebody says
/// that work came: SQS's counts are approximate and lag behind a send.
pub const SECOND_LOOKS: [Duration; 3] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// Wait before something on its way is called back for an empty queue: one
/// count that is wrong for a moment must not cost a start.
pub const RECALL_LOOK: Duration = Duration::from_secs(2);

/// Waits before another pass when a call failed that can succeed, or when a
/// task was stopped whose instance can go at once: the schedule's minute is
/// long when an instance is paid for.
pub const NEXT_PASSES: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(8)];
