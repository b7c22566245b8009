//! Exponential backoff with full jitter.

use std::time::Duration;

/// How long to wait before try after try.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    /// The longest wait before the second try.
    pub base: Duration,
    /// The longest wait before any try.
    pub cap: Duration,
}

impl Backoff {
    /// The longest wait after `failures` failures (1 or more): it doubles
    /// with each, up to the cap.
    pub fn ceiling(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(30);
        self.base.saturating_mul(1 << doublings).min(self.cap)
    }

    /// A random wait between half the ceiling and the ceiling: those who
    /// failed together do not come back together, and nobody comes at once.
    pub fn wait(&self, failures: u32) -> Duration {
        self.ceiling(failures).mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACKOFF: Backoff = Backoff {
        base: Duration::from_secs(2),
        cap: Duration::from_secs(60),
    };

    #[test]
    fn it_doubles_up_to_the_cap() {
        let seconds: Vec<u64> = (1..=7).map(|n| BACKOFF.ceiling(n).as_secs()).collect();
        assert_eq!(seconds, [2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(BACKOFF.ceiling(u32::MAX), BACKOFF.cap);
    }

    #[test]
    fn a_wait_stays_between_half_the_ceiling_and_the_ceiling() {
        for failures in 1..100 {
            let wait = BACKOFF.wait(failures);
            assert!(wait <= BACKOFF.ceiling(failures), "{wait:?}");
            assert!(wait >= BACKOFF.ceiling(failures) / 2, "{wait:?}");
        }
    }
}
