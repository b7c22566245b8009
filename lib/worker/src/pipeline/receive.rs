//! Receive: from the queue into the task's hands.

use std::sync::Arc;
use std::time::Duration;

use delivery::Backoff;
use platform::aws::{self, ErrorKind};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::Shared;
use crate::rules::failure::{Failure, Fatal, Stage, TaskError};
use crate::rules::ledger::Taken;
use crate::services::{LONG_POLL_MAX, Received};

/// Messages for which one receiver is enough at 100 ms a receive.
const MESSAGES_PER_RECEIVER: usize = 64;

/// Receivers at most; each holds a connection in a long poll.
const MAX_RECEIVERS: usize = 8;

/// After a stop, a receive that has something to bring brings it at once; one
/// that is still quiet then waits at an empty queue and may be cut off.
const STOP_GRACE: Duration = Duration::from_millis(200);

/// How long one of several queues is polled: two requests a second cost a
/// hundredth of the task.
const SHARED_POLL: Duration = Duration::from_secs(1);

/// Between receives that fail.
const RECEIVE_BACKOFF: Backoff = Backoff {
    base: Duration::from_millis(200),
    cap: Duration::from_secs(5),
};

/// Refusals in a row after which the task ends. With the backoff they span
/// about half a minute: a role or policy that was just written needs some.
const MAX_REFUSALS: u32 = 10;

/// Starts each queue's receivers. The first always polls; the others help while
/// the queue is deep, so that an idle task costs one long poll at a time.
pub(super) fn spawn(shared: &Arc<Shared>) -> Vec<JoinHandle<()>> {
    let queues = shared.services.queue.count();
    let deep: Vec<_> = (0..queues)
        .map(|_| Arc::new(watch::channel(false).0))
        .collect();
    let receivers = shared.settings.max_messages / MESSAGES_PER_RECEIVER;
    (0..queues * receivers.clamp(1, MAX_RECEIVERS))
        .map(|index| {
            let receiver = Receiver {
                shared: shared.clone(),
                queue: index % queues,
                deep: deep[index % queues].clone(),
                is_first: index < queues,
            };
            tokio::spawn(receiver.run())
        })
        .collect()
}

/// The queue is missing or refuses us: waiting does not help, unless a person
/// does something.
fn is_refusal(error: &aws::Error) -> bool {
    matches!(error.kind, ErrorKind::Access | ErrorKind::NotFound)
}

struct Receiver {
    shared: Arc<Shared>,
    queue: usize,
    /// Whether the last receive came back full.
    deep: Arc<watch::Sender<bool>>,
    is_first: bool,
}

impl Receiver {
    async fn run(self) {
        let stop = self.shared.ending.stop.clone();
        let mut failures = 0;
        loop {
            if !self.is_first {
                let mut deep = self.deep.subscribe();
                tokio::select! {
                    found = deep.wait_for(|is_deep| *is_deep) => if found.is_err() { return },
                    () = stop.cancelled() => return,
                }
            }
            let room = tokio::select! {
                room = self.shared.held.gate.reserve() => room,
                () = stop.cancelled() => return,
            };
            let asked_at = Instant::now();
            let answer = tokio::select! {
                answer = self.shared.services.queue.receive(
                    self.queue,
                    room,
                    self.wait(),
                    self.shared.settings.visibility,
                ) => answer,
                () = async {
                    stop.cancelled().await;
                    tokio::time::sleep(STOP_GRACE).await;
                } => {
                    self.shared.held.gate.release(room);
                    return;
                }
            };
            self.shared.metrics.did(Stage::Receive, asked_at.elapsed());
            match answer {
                Ok(messages) => {
                    failures = 0;
                    self.shared
                        .held
                        .gate
                        .release(room.saturating_sub(messages.len()));
                    self.deep.send_replace(messages.len() == room);
                    if messages.is_empty() {
                        self.end_if_idle();
                    } else {
                        self.accept(messages, asked_at).await;
                    }
                }
                Err(error) => {
                    self.shared.held.gate.release(room);
                    failures += 1;
                    if is_refusal(&error) && failures >= MAX_REFUSALS {
                        let message = format!("cannot receive from the input queue: {error}");
                        self.shared.ending.end_with(Fatal::Access(message));
                        return;
                    }
                    tracing::warn!(failures, reason = %error, "receiving failed, trying again");
                    let failure = Failure::Transient;
                    let error = aws::Error { failure, ..error };
                    let error = TaskError::of_call(Stage::Receive, &error);
                    self.shared.metrics.failed(&error);
                    tokio::select! {
                        () = tokio::time::sleep(RECEIVE_BACKOFF.wait(failures)) => {}
                        () = stop.cancelled() => return,
                    }
                }
            }
        }
    }

    /// How long to wait at an empty queue: as long as SQS allows, but not
    /// past the moment when the task would exit.
    fn wait(&self) -> Duration {
        let idle_exit = self.shared.settings.idle_exit;
        // A poll holds room that another queue's message may need.
        let longest = match self.shared.services.queue.count() {
            1 => LONG_POLL_MAX,
            _ => SHARED_POLL,
        };
        if idle_exit.is_zero() {
            return longest;
        }
        let left = idle_exit.saturating_sub(self.shared.held.idle_for());
        // Whole seconds, rounded up: the API takes no others.
        let seconds = left.as_secs_f64().ceil().max(1.0);
        Duration::from_secs(seconds as u64).min(longest)
    }

    /// After an empty receive: has the task been idle for long enough?
    fn end_if_idle(&self) {
        let shared = &self.shared;
        if !shared.held.ledger.is_empty() {
            shared.held.touch();
            return;
        }
        let idle_exit = shared.settings.idle_exit;
        if !idle_exit.is_zero() && shared.held.idle_for() >= idle_exit {
            shared.ending.end_idle();
        }
    }

    async fn accept(&self, messages: Vec<Received>, asked_at: Instant) {
        let shared = &self.shared;
        shared.held.touch();
        for received in messages {
            // The visibility runs from some moment after the question, so
            // counting from the question errs on the safe side.
            match shared
                .held
                .ledger
                .take(received, asked_at, shared.settings.visibility)
            {
                Taken::Duplicate => {
                    tracing::debug!("delivered again while in work");
                    shared.held.gate.release(1);
                }
                Taken::Done(receipt) => {
                    tracing::debug!("delivered again after it was done");
                    shared.held.gate.release(1);
                    // Should this fail too, the message comes once more.
                    shared.services.queue.acknowledge(&[receipt]).await;
                }
                Taken::New(message) => shared.held.enter(message),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_queue_and_refused_access_are_refusals() {
        let is_refusal =
            |code, message| is_refusal(&aws::Error::of_code("sqs:ReceiveMessage", code, message));
        assert!(is_refusal("AWS.SimpleQueueService.NonExistentQueue", ""));
        assert!(is_refusal("AccessDenied", "no"));
        assert!(is_refusal("KmsAccessDenied", "no"));
        assert!(!is_refusal("ThrottlingException", "slow down"));
        // The message does not decide.
        assert!(!is_refusal("InternalError", "AccessDenied"));
    }
}
