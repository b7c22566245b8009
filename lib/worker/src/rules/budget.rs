//! A budget of bytes. Whoever wants memory waits until it is free, in the
//! order of asking, so that a large image is not starved by small ones.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The grain of the budget: small enough to count thumbnails, large enough
/// for terabytes in the semaphore's 32-bit requests.
const GRAIN_BYTES: u64 = 4096;

#[derive(Clone)]
pub struct Budget {
    grains: Arc<Semaphore>,
    total: u32,
}

/// Bytes that are in use until this is dropped.
pub struct Reserved {
    permit: OwnedSemaphorePermit,
}

impl Reserved {
    pub fn bytes(&self) -> u64 {
        self.permit.num_permits() as u64 * GRAIN_BYTES
    }
}

impl Budget {
    pub fn new(bytes: u64) -> Self {
        let total = grains(bytes);
        Self {
            grains: Arc::new(Semaphore::new(total as usize)),
            total,
        }
    }

    /// How much there is in all.
    pub fn total(&self) -> u64 {
        u64::from(self.total) * GRAIN_BYTES
    }

    /// Waits for `bytes`. Who wants more than the whole budget gets all of
    /// it, and so runs alone.
    pub async fn reserve(&self, bytes: u64) -> Reserved {
        let wanted = grains(bytes).min(self.total);
        let permit = self.grains.clone().acquire_many_owned(wanted).await;
        Reserved {
            permit: permit.expect("the semaphore is never closed"),
        }
    }
}

fn grains(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(GRAIN_BYTES).max(1)).unwrap_or(u32::MAX >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    const SHORT: Duration = Duration::from_millis(10);

    #[tokio::test(start_paused = true)]
    async fn what_does_not_fit_waits() {
        let budget = Budget::new(100_000);
        let first = budget.reserve(60_000).await;
        assert!(timeout(SHORT, budget.reserve(60_000)).await.is_err());
        drop(first);
        assert!(timeout(SHORT, budget.reserve(60_000)).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_larger_than_everything_runs_alone() {
        let budget = Budget::new(100_000);
        let small = budget.reserve(1).await;
        assert!(timeout(SHORT, budget.reserve(1 << 40)).await.is_err());
        drop(small);
        let all = budget.reserve(1 << 40).await;
        assert!(timeout(SHORT, budget.reserve(1)).await.is_err());
        assert_eq!(all.bytes(), 100_000u64.next_multiple_of(GRAIN_BYTES));
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_is_not_overtaken_for_ever() {
        let budget = Budget::new(100_000);
        let first = budget.reserve(50_000).await;
        let large = tokio::spawn({
            let budget = budget.clone();
            async move { budget.reserve(90_000).await }
        });
        tokio::task::yield_now().await;
        assert!(timeout(SHORT, budget.reserve(10)).await.is_err());
        drop(first);
        assert!(timeout(SHORT, large).await.is_ok());
    }
}
