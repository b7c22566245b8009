//! The messages that the task holds, and how many they may be.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::Shared;
use crate::config::Settings;
use crate::rules::holding::{self, Gate};
use crate::rules::ledger::{Ledger, Message};
use crate::rules::suspects::{self, Company, Hand};
use crate::services::QueueFacts;

/// Batches of messages held before the rate is known: enough for a model that
/// is as fast as it gets behind a storage that answers after 100 ms.
const BATCHES_AT_FIRST: usize = 8;

/// How often the number of messages held is set anew.
const LIMIT_INTERVAL: Duration = Duration::from_secs(1);

/// Batches of messages held while a suspect is among them: one in the model,
/// one in front of it, so that caution costs little.
const FEW_BATCHES: usize = 2;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No critical section below leaves anything half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct Held {
    pub(super) ledger: Ledger,
    pub(super) gate: Gate,
    pub(super) facts: OnceLock<QueueFacts>,
    /// Where messages go whose items have all ended.
    pub(super) desk: mpsc::UnboundedSender<Arc<Message>>,
    last_active: Mutex<Instant>,
    hand: Mutex<Hand>,
    /// Messages that wait for their turn.
    waiting: Mutex<HashMap<u64, Arc<Message>>>,
    /// Something changed that the hand's rules look at.
    news: Notify,
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
            hand: Mutex::new(Hand::new(FEW_BATCHES * settings.batch_size)),
            waiting: Mutex::default(),
            news: Notify::new(),
        }
    }

    /// Takes a message off the books.
    pub(super) fn forget(&self, message: &Arc<Message>) {
        if self.ledger.remove(message) {
            lock(&self.hand).leave(message.number);
            lock(&self.waiting).remove(&message.number);
            self.gate.release(1);
            self.touch();
            self.news.notify_one();
        }
    }

    /// A message arrived; it waits for its turn.
    pub(super) fn enter(&self, message: Arc<Message>) {
        let facts = self.facts.get().copied().unwrap_or_default();
        let company = suspects::company(message.unexplained, facts);
        let number = message.number;
        let limit = {
            let mut hand = lock(&self.hand);
            hand.enter(number, company, message.receive_count);
            lock(&self.waiting).insert(number, message);
            hand.limit()
        };
        self.gate.set_cap(limit);
        self.news.notify_one();
    }

    /// The next message whose turn it is.
    pub(super) async fn next(&self) -> (Arc<Message>, Company) {
        loop {
            let next = lock(&self.hand).next();
            let Some((number, company)) = next else {
                self.news.notified().await;
                continue;
            };
            // One that left in this very moment needs no turn.
            if let Some(message) = lock(&self.waiting).remove(&number) {
                return (message, company);
            }
            lock(&self.hand).leave(number);
        }
    }

    pub(super) fn touch(&self) {
        *lock(&self.last_active) = Instant::now();
    }

    pub(super) fn idle_for(&self) -> Duration {
        lock(&self.last_active).elapsed()
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
