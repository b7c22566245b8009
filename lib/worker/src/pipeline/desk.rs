//! The desk: where messages whose items have all ended are deleted, returned
//! or rejected; and the heartbeat, which keeps those in work ours.

use std::sync::Arc;
use std::time::Duration;

use delivery::{Backoff, Rejection};
use futures_util::StreamExt;
use futures_util::stream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::{Shared, gather};
use crate::rules::failure::{Cause, Stage, TaskError};
use crate::rules::ledger::{ItemFailure, Ledger, Message, Note, Ownership, Verdict};
use crate::services::{BATCH_MAX, Extension, LeaseError, Receipt};

/// How long a finished message waits for others to share a request with.
const LINGER: Duration = Duration::from_millis(20);

/// Requests of the desk at the same time.
const CONCURRENT: usize = 16;

/// Tries of a deletion or a return. A message whose deletion fails is
/// delivered again, and its event is sent twice.
const TRIES: u32 = 4;

const BACKOFF: Backoff = Backoff {
    base: Duration::from_millis(100),
    cap: Duration::from_secs(2),
};

pub(super) async fn run(shared: Arc<Shared>, mut arrivals: mpsc::UnboundedReceiver<Arc<Message>>) {
    let slots = Arc::new(Semaphore::new(CONCURRENT));
    loop {
        let slot = slots.clone().acquire_owned().await;
        let may_come = || shared.held.ledger.len();
        let Some(ended) = gather(|context| arrivals.poll_recv(context), may_come, LINGER).await
        else {
            return;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            settle(&shared, ended).await;
            drop(slot);
        });
    }
}

/// Seals the fate of up to a request's worth of messages.
async fn settle(shared: &Arc<Shared>, ended: Vec<Arc<Message>>) {
    let started = Instant::now();
    let count = ended.len();
    let mut done = Vec::new();
    let mut returned = Vec::new();
    let mut rejected = Vec::new();
    let mut cut_short = Vec::new();
    for message in ended {
        let ownership = message.ownership();
        match (ownership, message.verdict()) {
            (Ownership::HandedBack, _) => shared.held.forget(&message),
            // The work was done in full before the loss was noticed: if the
            // old receipt still deletes the message, a duplicate is spared.
            (Ownership::Lost, Verdict::Done) => done.push(message),
            (Ownership::Lost, _) => {
                let error =
                    TaskError::transient(Stage::Acknowledge, Cause::LeaseLost, "lease lost");
                shared.metrics.failed(&error);
                tracing::warn!(
                    message_id = message.message_id,
                    "the lease was lost, whoever has it now does the work"
                );
                shared.held.forget(&message);
            }
            (_, Verdict::Done) => done.push(message),
            // A stop cut the work short: nothing is wrong with the message.
            (_, Verdict::Retry(error))
                if error.cause == Cause::Internal && shared.ending.stop.is_cancelled() =>
            {
                cut_short.push(message);
            }
            (_, Verdict::Retry(error)) => match give_up_reason(shared, &message, &error) {
                None => returned.push(message),
                Some(reason) => {
                    let failure = ItemFailure {
                        error: TaskError::permanent(error.stage, error.cause, reason),
                        object: None,
                        body: message.body.clone(),
                    };
                    rejected.push((message, vec![failure]));
                }
            },
            (_, Verdict::Reject(failures)) => rejected.push((message, failures)),
        }
    }
    let (rejected, failed) = reject(shared, rejected).await;
    done.extend(rejected);
    returned.extend(failed);
    let hand_back_later = async {
        if !cut_short.is_empty() {
            // A receiver that still polls would be given them at once.
            shared.ending.receivers_ended.cancelled().await;
            hand_back(shared, cut_short).await;
        }
    };
    tokio::join!(
        acknowledge(shared, done),
        hand_in(shared, returned),
        hand_back_later
    );
    for _ in 0..count {
        shared.metrics.did(Stage::Acknowledge, started.elapsed());
    }
}

/// On the last delivery that the queue's redrive policy allows, a transient
/// failure is final: the queue would move the message without a reason.
fn give_up_reason(shared: &Shared, message: &Message, error: &TaskError) -> Option<String> {
    let max_receives = shared
        .held
        .facts
        .get()
        .and_then(|facts| facts.max_receives)?;
    if message.receive_count < max_receives {
        return None;
    }
    Some(format!(
        "gave up after {} deliveries: {}",
        message.receive_count, error.message
    ))
}

/// Puts messages into the dead-letter queue; answers those that are there and
/// those that are not.
async fn reject(
    shared: &Shared,
    rejected: Vec<(Arc<Message>, Vec<ItemFailure>)>,
) -> (Vec<Arc<Message>>, Vec<Arc<Message>>) {
    let (mut letters, mut owners) = (Vec::new(), Vec::new());
    let (mut too_large, mut their_owners) = (Vec::new(), Vec::new());
    for (index, (_, failures)) in rejected.iter().enumerate() {
        for failure in failures {
            let rejection = Rejection {
                stage: failure.error.stage.name().to_owned(),
                reason: failure.error.message.clone(),
                by: shared.settings.program.to_owned(),
                object: failure.object.clone(),
                event: failure.error.event.clone(),
            };
            let (place, owners) = match failure.error.cause {
                Cause::BeyondWorker => (&mut too_large, &mut their_owners),
                _ => (&mut letters, &mut owners),
            };
            place.push((failure.body.clone(), rejection));
            owners.push(index);
        }
    }
    let mut results = Vec::new();
    if !letters.is_empty() {
        results = shared.services.rejects.reject_all(&letters).await;
    }
    if let Some(larger) = shared
        .services
        .larger
        .as_ref()
        .filter(|_| !too_large.is_empty())
    {
        owners.append(&mut their_owners);
        results.extend(larger.reject_all(&too_large).await);
    }
    let mut is_in = vec![true; rejected.len()];
    for (owner, result) in owners.into_iter().zip(results) {
        if let Err(error) = result {
            tracing::error!(%error, "cannot put a message where it belongs, it is tried again later");
            is_in[owner] = false;
        }
    }
    let mut done = Vec::new();
    let mut failed = Vec::new();
    for ((message, _), is_in) in rejected.into_iter().zip(is_in) {
        if is_in {
            done.push(message);
        } else {
            failed.push(message);
        }
    }
    (done, failed)
}

async fn acknowledge(shared: &Shared, messages: Vec<Arc<Message>>) {
    remove_notes(shared, &messages, |note| note != Note::None).await;
    let left = in_tries(messages, |messages| async move {
        let receipts: Vec<Receipt> = messages.iter().map(|message| message.receipt()).collect();
        let results = shared.services.queue.acknowledge(&receipts).await;
        let mut failed = Vec::new();
        for ((message, receipt), result) in messages.into_iter().zip(receipts).zip(results) {
            match result {
                Ok(()) => shared.held.forget(&message),
                // Delivered again meanwhile: the new receipt is the one.
                Err(LeaseError::Lost(_)) if message.receipt() != receipt => failed.push(message),
                Err(LeaseError::Lost(error)) => {
                    let (stage, cause) = (Stage::Acknowledge, Cause::LeaseLost);
                    let error = TaskError::transient(stage, cause, error.to_string());
                    shared.metrics.failed(&error);
                    leave_done(shared, &message, &error.message);
                }
                Err(LeaseError::Failed(error)) => {
                    tracing::warn!(reason = %error, "deleting a message failed");
                    failed.push(message);
                }
            }
        }
        failed
    });
    for message in left.await {
        leave_done(shared, &message, "deleting it failed again and again");
    }
}

/// Takes back the notes of messages that did not kill this task. One that
/// stays would accuse its message.
async fn remove_notes(
    shared: &Shared,
    messages: &[Arc<Message>],
    goes: impl Fn(Note) -> bool + Send,
) {
    for message in messages.iter().filter(|message| goes(message.note())) {
        let id = &message.message_id;
        match shared.services.notes.remove(id).await {
            Ok(()) => message.set_note(Note::None),
            Err(error) => tracing::warn!(message_id = id, %error, "cannot remove a note"),
        }
    }
}

/// Gives up deleting a message whose work is done; should it come back, that
/// is all that is left to do.
fn leave_done(shared: &Shared, message: &Arc<Message>, reason: &str) {
    tracing::warn!(
        message_id = message.message_id,
        reason,
        "finished, but not deleted: the message may be worked on again"
    );
    shared.held.ledger.remember_done(message);
    shared.held.forget(message);
}

/// Calls with what is left until nothing is; answers what is left at the end.
async fn in_tries<T, Calling: Future<Output = Vec<T>>>(
    mut left: Vec<T>,
    call: impl Fn(Vec<T>) -> Calling,
) -> Vec<T> {
    for tries in 1..=TRIES {
        if left.is_empty() {
            break;
        }
        if tries > 1 {
            tokio::time::sleep(BACKOFF.wait(tries - 1)).await;
        }
        left = call(left).await;
    }
    left
}

/// Returns messages whose failure may pass, each with a backoff by how often
/// it was delivered.
async fn hand_in(shared: &Shared, messages: Vec<Arc<Message>>) {
    if messages.is_empty() {
        return;
    }
    let retry = shared.settings.retry;
    let delays: Vec<Duration> = messages
        .iter()
        // Whole seconds are what SQS takes; at least one, so that a broken
        // service is not asked in a tight loop.
        .map(|message| {
            retry
                .wait(message.receive_count)
                .max(Duration::from_secs(1))
        })
        .collect();
    change(shared, messages, &delays).await;
}

/// Hands messages back to the queue at once; answers how many.
pub(super) async fn hand_back(shared: &Shared, messages: Vec<Arc<Message>>) -> usize {
    let count = messages.len();
    stream::iter(messages)
        .chunks(BATCH_MAX)
        .for_each_concurrent(CONCURRENT, |chunk| async {
            let delays = vec![Duration::ZERO; chunk.len()];
            change(shared, chunk, &delays).await;
        })
        .await;
    count
}

/// Changes the visibility of messages that are not ours any more after it.
async fn change(shared: &Shared, messages: Vec<Arc<Message>>, delays: &[Duration]) {
    remove_notes(shared, &messages, |note| note == Note::Written).await;
    let all = messages.into_iter().zip(delays.iter().copied()).collect();
    let left = in_tries(all, |some: Vec<(Arc<Message>, Duration)>| async move {
        let extensions: Vec<Extension> = some
            .iter()
            .map(|(message, visibility)| Extension {
                receipt: message.receipt(),
                visibility: *visibility,
            })
            .collect();
        let results = shared.services.queue.extend(&extensions).await;
        let mut failed = Vec::new();
        for ((message, delay), result) in some.into_iter().zip(results) {
            match result {
                Err(LeaseError::Failed(error)) => {
                    tracing::warn!(reason = %error, "returning a message failed");
                    failed.push((message, delay));
                }
                // A lost lease means that the queue has it already.
                Err(LeaseError::Lost(_)) => shared.held.forget(&message),
                Ok(()) => {
                    shared.held.ledger.remember_returned(&message);
                    shared.held.forget(&message);
                }
            }
        }
        failed
    });
    // Its visibility ends by itself.
    for (message, _) in left.await {
        shared.held.forget(&message);
    }
}

/// Extends what is in work before it becomes visible again, in batches.
pub(super) async fn heartbeat(shared: Arc<Shared>) {
    let visibility = shared.settings.visibility;
    // Due in the second half of the lease, looked for eight times in it: an
    // extension has at least three tries.
    let margin = visibility / 2;
    let mut ticks = tokio::time::interval(visibility / 8);
    loop {
        ticks.tick().await;
        let due = shared.held.ledger.due(Instant::now(), margin);
        stream::iter(due)
            .chunks(BATCH_MAX)
            .for_each_concurrent(CONCURRENT, |chunk| extend(&shared, chunk))
            .await;
    }
}

async fn extend(shared: &Shared, messages: Vec<Arc<Message>>) {
    let visibility = shared.settings.visibility;
    let extensions: Vec<Extension> = messages
        .iter()
        .map(|message| Extension {
            receipt: message.receipt(),
            visibility,
        })
        .collect();
    let asked_at = Instant::now();
    let results = shared.services.queue.extend(&extensions).await;
    for ((message, extension), result) in messages.iter().zip(&extensions).zip(results) {
        match result {
            Ok(()) => Ledger::extended(message, &extension.receipt, asked_at, visibility),
            Err(LeaseError::Lost(error)) => {
                if Ledger::lost(message, &extension.receipt) {
                    tracing::warn!(message_id = message.message_id, reason = %error, "lease lost");
                }
            }
            Err(LeaseError::Failed(error)) => {
                tracing::warn!(
                    message_id = message.message_id,
                    reason = %error,
                    "cannot extend the visibility yet"
                );
            }
        }
    }
}
