//! The rate limit: a token bucket.

use std::time::Duration;

use tokio::time::Instant;

use crate::units::Rate;

/// Objects of one window at most: eight requests of ten, two for each of the
/// requests that `delivery` has in flight at a time. It bounds what is in
/// doubt after a kill, and what a stop has to wait for.
pub const MAX_WINDOW: usize = 80;

/// Gives out permissions at a rate, with a burst of one window.
#[derive(Debug)]
pub struct TokenBucket {
    /// Tokens per second; `None` never waits.
    rate: Option<f64>,
    window: usize,
    tokens: f64,
    filled_at: Instant,
}

impl TokenBucket {
    pub fn new(rate: Rate, now: Instant) -> Self {
        // A window is at most a second's worth, so that a slow walk is even
        // and stops within a second.
        let window = match rate.0 {
            Some(rate) if rate < MAX_WINDOW as f64 => (rate as usize).max(1),
            _ => MAX_WINDOW,
        };
        Self {
            rate: rate.0,
            window,
            tokens: window as f64,
            filled_at: now,
        }
    }

    pub fn window(&self) -> usize {
        self.window
    }

    /// Takes `amount` tokens (at most a window) and says how long to wait
    /// before using them: what is not there yet is owed.
    pub fn take(&mut self, amount: usize, now: Instant) -> Duration {
        debug_assert!(amount <= self.window);
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        let passed = now.saturating_duration_since(self.filled_at);
        self.filled_at = now;
        self.tokens = (self.tokens + passed.as_secs_f64() * rate).min(self.window as f64);
        self.tokens -= amount as f64;
        if self.tokens >= 0.0 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64(-self.tokens / rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_limit_never_waits() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(Rate(None), now);
        for _ in 0..1_000 {
            assert_eq!(bucket.take(MAX_WINDOW, now), Duration::ZERO);
        }
    }

    #[test]
    fn a_window_is_a_seconds_worth_and_never_empty() {
        let window = |rate| TokenBucket::new(Rate(Some(rate)), Instant::now()).window();
        assert_eq!(window(0.1), 1);
        assert_eq!(window(25.0), 25);
        assert_eq!(window(5_000.0), MAX_WINDOW);
    }

    proptest! {
        #[test]
        fn never_more_than_the_rate_and_one_window(
            rate in 0.5f64..500.0,
            steps in proptest::collection::vec((1usize..=80, 0u64..2_000), 1..60)
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = TokenBucket::new(Rate(Some(rate)), now);
            let mut used = 0usize;
            for (amount, idle_ms) in steps {
                let amount = amount.min(bucket.window());
                now += bucket.take(amount, now);
                used += amount;
                let allowed = bucket.window() as f64 + (now - start).as_secs_f64() * rate;
                prop_assert!(used as f64 <= allowed + 1e-3, "{used} of {allowed}");
                now += Duration::from_millis(idle_ms);
            }
        }

        #[test]
        fn a_busy_walk_gets_the_whole_rate(rate in 1.0f64..500.0) {
            let start = Instant::now();
            let mut now = start;
            let mut bucket = TokenBucket::new(Rate(Some(rate)), now);
            let window = bucket.window();
            for _ in 0..100 {
                now += bucket.take(window, now);
            }
            let expected = 99.0 * window as f64 / rate;
            let took = (now - start).as_secs_f64();
            prop_assert!((took - expected).abs() < 0.01 * expected, "{took} s, {expected} s");
        }
    }
}
