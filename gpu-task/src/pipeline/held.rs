//! The messages that the task holds, and how many they may be.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Shared;
use crate::config::Settings;
use crate::rules::holding::{self, Gate};
use crate::rules::ledger::{Ledger, Message};
use crate::services::QueueFacts;

/// Batches of messages held before the rate is known: enough for a model that
/// is as fast as it gets behind a storage that answers after 100 ms.
const BATCHES_AT_FIRST: usize = 8;

/// How often the number of messages held is set anew.
const LIMIT_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Held {
    pub(super) ledger: Ledger,
    pub(super) gate: Gate,
    pub(super) facts: OnceLock<QueueFacts>,
    /// Where messages go whose items have all ended.
    pub(super) desk: mpsc::UnboundedSender<Arc<Message>>,
    last_active: Mutex<Instant>,
}

impl Held {
    pub(super) fn new(settings: &Settings, desk: mpsc::UnboundedSender<Arc<Message>>) -> Self {
        let limit = BATCHES_AT_FIRST * settings.batch_size;
        Self {
            ledger: Ledger::default(),
            gate: Gate::new(limit.min(settings.max_messages)),
            facts: OnceLock::new(),
            desk,
            last_active: Mutex::new(Instant::now()),
        }
    }

    /// Takes a message off the books.
    pub(super) fn forget(&self, message: &Arc<Message>) {
        if self.ledger.remove(message) {
            self.gate.release(1);
            self.touch();
        }
    }

    pub(super) fn touch(&self) {
        let mut last = self
            .last_active
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *last = Instant::now();
    }

    pub(super) fn idle_for(&self) -> Duration {
        self.last_active
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .elapsed()
    }
}

/// Lets the throughput of the last second of full work set how many messages
/// may be held.
pub(super) async fn adapt_limit(shared: Arc<Shared>) {
    let settings = &shared.settings;
    let least = holding::LEAST_BATCHES_HELD * settings.batch_size;
    let mut ticks = tokio::time::interval(LIMIT_INTERVAL);
    let mut before = shared.metrics.work_done();
    loop {
        ticks.tick().await;
        let now = shared.metrics.work_done();
        let busy = now.0 - before.0;
        if busy < LIMIT_INTERVAL / 2 {
            continue;
        }
        let rate = (now.1 - before.1) as f64 / busy.as_secs_f64();
        before = now;
        let limit = holding::limit(rate, settings.visibility, least, settings.max_messages);
        shared.held.gate.set_limit(limit);
    }
}
