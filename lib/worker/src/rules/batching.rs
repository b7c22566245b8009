//! When a batch goes to the model. The rule has no I/O and no clock.

use std::time::Duration;

/// What the batcher sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct View {
    /// Images that wait in the batch.
    pub filled: usize,
    /// Images that a batch holds.
    pub capacity: usize,
    /// Images on their way to the batch: being downloaded or decoded.
    pub upstream: usize,
    /// Whether the model has nothing to do.
    pub model_is_idle: bool,
    /// How long the oldest image of the batch has waited.
    pub oldest_waits: Duration,
    /// How long an image may wait for company while the model is idle.
    pub patience: Duration,
}

/// What the batcher does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    Send,
    /// Something must happen first: an image arrives, the model becomes idle,
    /// the upstream runs dry; or this time passes.
    Wait(Option<Duration>),
}

/// A batch goes when it is full, or when waiting cannot help: the model is
/// idle and nothing is on its way. While something is on its way an idle
/// model waits for it, but not for long: what comes may be a giant.
pub fn decide(view: View) -> Decision {
    if view.filled == 0 {
        return Decision::Wait(None);
    }
    if view.filled >= view.capacity {
        return Decision::Send;
    }
    if !view.model_is_idle {
        // A partial batch would gain nothing by queueing at the model, and
        // would lose the company that still comes.
        return Decision::Wait(None);
    }
    if view.upstream == 0 || view.oldest_waits >= view.patience {
        return Decision::Send;
    }
    Decision::Wait(Some(view.patience - view.oldest_waits))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn view() -> impl Strategy<Value = View> {
        (
            0usize..=8,
            1usize..=8,
            0usize..4,
            any::<bool>(),
            0u64..100,
            0u64..100,
        )
            .prop_map(
                |(filled, capacity, upstream, model_is_idle, waited, patience)| View {
                    filled: filled.min(capacity),
                    capacity,
                    upstream,
                    model_is_idle,
                    oldest_waits: Duration::from_millis(waited),
                    patience: Duration::from_millis(patience),
                },
            )
    }

    proptest! {
        #[test]
        fn an_empty_batch_never_goes(view in view()) {
            let decision = decide(View { filled: 0, ..view });
            prop_assert_eq!(decision, Decision::Wait(None));
        }

        #[test]
        fn a_full_batch_always_goes(view in view()) {
            let full = View { filled: view.capacity, ..view };
            prop_assert_eq!(decide(full), Decision::Send);
        }

        #[test]
        fn an_idle_model_never_waits_for_nothing(view in view()) {
            let dry = View { upstream: 0, model_is_idle: true, ..view };
            prop_assert_eq!(decide(dry) == Decision::Send, dry.filled > 0);
        }

        #[test]
        fn a_partial_batch_never_queues_at_a_busy_model(view in view()) {
            let busy = View { model_is_idle: false, ..view };
            prop_assert_eq!(decide(busy) == Decision::Send, busy.filled == busy.capacity);
        }

        #[test]
        fn nobody_waits_longer_than_the_patience_at_an_idle_model(view in view()) {
            let idle = View { model_is_idle: true, ..view };
            if let Decision::Wait(Some(time)) = decide(idle) {
                prop_assert!(time > Duration::ZERO);
                let later = View { oldest_waits: idle.oldest_waits + time, ..idle };
                prop_assert_eq!(decide(later), Decision::Send);
            }
        }
    }
}
