//! Showing the dead-letter queue, and sending chosen messages back.
//!
//! A message is received with a short visibility timeout, which is renewed
//! while the command runs and set to zero at its end: whatever is not chosen
//! is visible again at once. A chosen message is sent first and deleted then,
//! so that an end in between leaves it in both queues and never in neither.
//!
//! What intake itself could not take lies in a queue of its own. It goes back
//! through intake, which finds out what an object is, passes deletions on and
//! wakes the scaler; a message is deleted when intake has answered that all of
//! its work is done.

mod intake;
mod letter;
mod record;
mod sqs;
mod table;

pub use intake::Intake;
pub use letter::{Choice, Fields, Letter};
pub use sqs::{SqsQueues, WayBack};
pub use table::table;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use async_trait::async_trait;
use platform::aws;
use serde::Serialize;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How long a received message stays invisible unless renewed. After a kill
/// nobody waits longer for it.
pub const HOLD: Duration = Duration::from_secs(120);

/// Messages of one request (SQS API).
const MAX_BATCH: usize = 10;

/// Receives that bring nothing new before the queue counts as seen through.
/// Each asks all of SQS's servers (long polling), so two are ample.
const EMPTY_RECEIVES: u32 = 2;

#[derive(Debug, thiserror::Error)]
pub enum Problem {
    #[error(transparent)]
    Call(#[from] aws::Error),
    #[error("intake failed ({kind}): {message}")]
    IntakeFailed { kind: String, message: String },
    #[error("intake could not take {0} of the messages in it")]
    NotTaken(usize),
    #[error("{0} is no answer of intake's: is it the right function?")]
    NotIntake(Value),
    /// No task could read it in the input queue.
    #[error(
        "it is Lambda's record of a failed invocation; \
         --intake FUNCTION has intake take what is in it"
    )]
    NeedsIntake,
    #[error("no way back is named")]
    NoWayBack,
}

pub type Results = Vec<Result<(), Problem>>;

/// The two queues. Every slice has at most ten letters.
#[async_trait]
pub trait Queues: Send + Sync {
    /// Receives from the dead-letter queue, invisible to others for [`HOLD`].
    async fn receive(&self) -> Result<Vec<Letter>, aws::Error>;
    /// Changes for how long messages stay invisible. What fails becomes visible
    /// by itself when its time is over.
    async fn hold(&self, receipts: &[&str], time: Duration);
    /// Sends what is in the letters back: to the input queue, or through intake.
    async fn send(&self, letters: &[&Letter]) -> Results;
    async fn delete(&self, receipts: &[&str]) -> Results;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Show,
    /// They are sent back and deleted here.
    SendBack,
    Discard,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Counts {
    pub seen: u64,
    pub chosen: u64,
    pub sent: u64,
    pub deleted: u64,
    /// Chosen messages that stay: their body was cut when they were rejected,
    /// or the record lacks what intake was invoked with.
    pub cut: u64,
    /// Chosen messages that could not be sent or deleted.
    pub failed: u64,
}

#[derive(Debug, Default)]
pub struct Report {
    pub counts: Counts,
    /// The chosen messages, as they were when they were seen.
    pub chosen: Vec<Fields>,
    pub problems: Vec<String>,
    pub is_stopped: bool,
    /// Why the run ended before it had seen every message.
    pub error: Option<aws::Error>,
}

pub async fn run(
    queues: &dyn Queues,
    choice: &Choice,
    action: Action,
    limit: Option<u64>,
    stop: &CancellationToken,
) -> Report {
    let mut pass = Pass {
        queues,
        action,
        report: Report::default(),
        held: HashMap::new(),
        done: HashSet::new(),
    };
    pass.go(choice, limit, stop).await;
    pass.let_go().await;
    pass.report
}

struct Held {
    receipt: String,
    until: Instant,
}

struct Pass<'a> {
    queues: &'a dyn Queues,
    action: Action,
    report: Report,
    /// Messages that stay, by id.
    held: HashMap<String, Held>,
    /// Ids of messages that were sent or deleted here. One of them can come
    /// again when its deletion failed, or by SQS's at-least-once delivery.
    done: HashSet<String>,
}

impl Pass<'_> {
    async fn go(&mut self, choice: &Choice, limit: Option<u64>, stop: &CancellationToken) {
        let mut empty_receives = 0;
        while empty_receives < EMPTY_RECEIVES {
            if stop.is_cancelled() {
                self.report.is_stopped = true;
                return;
            }
            let left = limit.map(|limit| limit.saturating_sub(self.report.counts.chosen));
            if left == Some(0) {
                return;
            }
            self.renew().await;
            let letters = match self.queues.receive().await {
                Ok(letters) => letters,
                Err(error) => {
                    self.report.error = Some(error);
                    return;
                }
            };
            let until = Instant::now() + HOLD;
            let mut chosen = Vec::new();
            let mut is_new = false;
            for letter in letters {
                let id = letter.fields.id.clone();
                let is_known = self.held.contains_key(&id) || self.done.contains(&id);
                let held = Held {
                    receipt: letter.receipt.clone(),
                    until,
                };
                self.held.insert(id, held);
                if is_known {
                    continue;
                }
                is_new = true;
                self.report.counts.seen += 1;
                let has_room = left.is_none_or(|left| (chosen.len() as u64) < left);
                if has_room && choice.takes(&letter.fields) {
                    self.report.counts.chosen += 1;
                    self.report.chosen.push(letter.fields.clone());
                    chosen.push(letter);
                }
            }
            empty_receives = if is_new { 0 } else { empty_receives + 1 };
            for batch in chosen.chunks(MAX_BATCH) {
                self.act(batch).await;
            }
        }
    }

    async fn act(&mut self, letters: &[Letter]) {
        let to_delete = match self.action {
            Action::Show => return,
            Action::Discard => letters.iter().collect(),
            Action::SendBack => self.send(letters).await,
        };
        if to_delete.is_empty() {
            return;
        }
        let receipts: Vec<&str> = to_delete.iter().map(|one| one.receipt.as_str()).collect();
        let results = self.queues.delete(&receipts).await;
        for (letter, result) in to_delete.iter().zip(results) {
            match result {
                Ok(()) => {
                    self.report.counts.deleted += 1;
                    self.held.remove(&letter.fields.id);
                }
                Err(problem) if self.action == Action::SendBack => {
                    self.fail(letter, "was sent back, but not deleted here", &problem);
                }
                Err(problem) => self.fail(letter, "was not deleted", &problem),
            }
        }
    }

    /// Sends what can be sent; answers what was.
    async fn send<'l>(&mut self, letters: &'l [Letter]) -> Vec<&'l Letter> {
        let (cut, whole): (Vec<&Letter>, Vec<&Letter>) =
            letters.iter().partition(|letter| letter.fields.is_cut());
        self.report.counts.cut += cut.len() as u64;
        if whole.is_empty() {
            return Vec::new();
        }
        let results = self.queues.send(&whole).await;
        let mut sent = Vec::new();
        for (letter, result) in whole.into_iter().zip(results) {
            match result {
                Ok(()) => {
                    self.report.counts.sent += 1;
                    self.done.insert(letter.fields.id.clone());
                    sent.push(letter);
                }
                Err(problem) => self.fail(letter, "was not sent back", &problem),
            }
        }
        sent
    }

    fn fail(&mut self, letter: &Letter, what: &str, problem: &Problem) {
        self.report.counts.failed += 1;
        let line = format!("{} {what}: {problem}", letter.fields.id);
        self.report.problems.push(line);
    }

    /// Keeps what is held from becoming visible, and from being received over
    /// and over in this very run.
    async fn renew(&mut self) {
        let now = Instant::now();
        let due: Vec<String> = self
            .held
            .iter()
            .filter(|(_, held)| held.until.saturating_duration_since(now) < HOLD / 2)
            .map(|(id, _)| id.clone())
            .collect();
        for ids in due.chunks(MAX_BATCH) {
            let receipts: Vec<&str> = ids
                .iter()
                .map(|id| self.held[id].receipt.as_str())
                .collect();
            // One that cannot be renewed comes again, and is known.
            self.queues.hold(&receipts, HOLD).await;
            for id in ids {
                if let Some(held) = self.held.get_mut(id) {
                    held.until = now + HOLD;
                }
            }
        }
    }

    /// Makes everything that stays visible again.
    async fn let_go(&mut self) {
        let receipts: Vec<&str> = self
            .held
            .values()
            .map(|held| held.receipt.as_str())
            .collect();
        for batch in receipts.chunks(MAX_BATCH) {
            self.queues.hold(batch, Duration::ZERO).await;
        }
    }
}

#[cfg(test)]
mod tests;
