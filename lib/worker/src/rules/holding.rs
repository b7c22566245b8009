//! How many messages the task may hold: enough to keep every stage busy,
//! never more than it can finish while they are invisible.

use std::sync::atomic::{AtomicUsize, Ordering};

pub use planner::worker::{LEAST_BATCHES_HELD, holding_limit as limit};
use tokio::sync::Notify;

use crate::services::BATCH_MAX;

/// Counts the messages held, and lets receivers wait for room.
pub struct Gate {
    /// Those that a receive is under way for included.
    held: AtomicUsize,
    limit: AtomicUsize,
    /// What suspects among the messages leave of the limit.
    cap: AtomicUsize,
    freed: Notify,
}

impl Gate {
    pub fn new(limit: usize) -> Self {
        Self {
            held: AtomicUsize::new(0),
            limit: AtomicUsize::new(limit.max(1)),
            cap: AtomicUsize::new(usize::MAX),
            freed: Notify::new(),
        }
    }

    pub fn set_limit(&self, limit: usize) {
        self.limit.store(limit.max(1), Ordering::Relaxed);
        self.freed.notify_waiters();
    }

    pub fn set_cap(&self, cap: usize) {
        if self.cap.swap(cap.max(1), Ordering::Relaxed) < cap {
            self.freed.notify_waiters();
        }
    }

    /// Waits for room for a whole receive (or for whatever the limit allows
    /// at all), takes it and answers how much it is.
    pub async fn reserve(&self) -> usize {
        loop {
            let freed = self.freed.notified();
            tokio::pin!(freed);
            // Registered before the check, so that no wake-up falls between.
            freed.as_mut().enable();
            let limit = self
                .limit
                .load(Ordering::Relaxed)
                .min(self.cap.load(Ordering::Relaxed));
            let wanted = limit.min(BATCH_MAX);
            let held = self.held.load(Ordering::Relaxed);
            if held + wanted <= limit {
                let swapped = self.held.compare_exchange(
                    held,
                    held + wanted,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
                if swapped.is_ok() {
                    return wanted;
                }
                continue;
            }
            freed.await;
        }
    }

    pub fn release(&self, count: usize) {
        if count > 0 {
            self.held.fetch_sub(count, Ordering::Relaxed);
            self.freed.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;
    use tokio::time::timeout;

    proptest! {
        #[test]
        fn what_is_held_can_be_finished_while_it_is_invisible(
            rate in 0.01f64..5000.0, visibility in 10u64..3600
        ) {
            let visibility = Duration::from_secs(visibility);
            let held = limit(rate, visibility, 16, 512);
            prop_assert!((16..=512).contains(&held));
            if held > 16 {
                prop_assert!(held as f64 / rate <= visibility.as_secs_f64());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_receiver_waits_for_room_for_a_whole_receive() {
        let short = Duration::from_millis(5);
        let gate = Gate::new(25);
        assert_eq!(gate.reserve().await, 10);
        assert_eq!(gate.reserve().await, 10);
        assert!(timeout(short, gate.reserve()).await.is_err());
        gate.release(4);
        assert!(timeout(short, gate.reserve()).await.is_err());
        gate.release(1);
        assert_eq!(timeout(short, gate.reserve()).await, Ok(10));
        assert_eq!(gate.held.load(Ordering::Relaxed), 25);
    }

    #[tokio::test(start_paused = true)]
    async fn a_small_limit_still_lets_something_in() {
        assert_eq!(Gate::new(3).reserve().await, 3);
    }
}
