//! Who owns a message when. `design.md` beside this crate tells the whole
//! protocol; this is its bookkeeping, without any I/O.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::rules::failure::{Cause, Failure, Stage, TaskError};
use crate::services::{Receipt, Received};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ownership {
    /// This task; the work has not reached the model yet, so a stop hands the
    /// message back. Entered by receiving.
    Held,
    /// This task; an image of it is in the model or behind it, so a stop
    /// finishes it. Entered from `Held` when the model begins with its batch.
    Committed,
    /// Somebody else, or soon: the visibility ended. Entered from `Held` or
    /// `Committed` by the heartbeat.
    Lost,
    /// The queue: handed back by a stop. Entered from `Held`, or from
    /// `Committed` when the time to stop is up.
    HandedBack,
}

impl Ownership {
    /// Whether work on the message still makes sense.
    pub const fn is_ours(self) -> bool {
        matches!(self, Ownership::Held | Ownership::Committed)
    }
}

/// What became of one item of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ItemFailure {
    pub error: TaskError,
    /// The object that the item is about, where it is known.
    pub object: Option<String>,
    /// What goes to the dead-letter queue when the failure is permanent.
    pub body: String,
}

/// What became of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Everything is stored and published: delete it.
    Done,
    /// At least one item may succeed later: return it.
    Retry(TaskError),
    /// Some items will never succeed, all others are done: reject those, then
    /// delete it.
    Reject(Vec<ItemFailure>),
}

struct Standing {
    ownership: Ownership,
    receipt: Receipt,
    expires: Instant,
    open_items: usize,
    is_removed: bool,
    failures: Vec<ItemFailure>,
    note: Note,
}

/// The note outside the task that a message is worked on alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    None,
    /// Written by this task; it goes when the work ends, however that is.
    Written,
    /// Found: a task died with it. It goes only with the message.
    Found,
}

/// A message in work.
pub struct Message {
    /// Identifies it across deliveries.
    pub message_id: String,
    pub body: String,
    /// How often it was delivered, this time included.
    pub receive_count: u32,
    /// Deliveries before this one of which this task does not know that they
    /// ended without a death.
    pub unexplained: u32,
    /// Unique among the messages of this task.
    pub number: u64,
    pub received: Instant,
    standing: Mutex<Standing>,
}

impl Message {
    fn standing(&self) -> MutexGuard<'_, Standing> {
        // Every critical section below leaves it whole.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn ownership(&self) -> Ownership {
        self.standing().ownership
    }

    /// The receipt of its latest delivery, the only one that SQS honours.
    pub fn receipt(&self) -> Receipt {
        self.standing().receipt.clone()
    }

    pub fn note(&self) -> Note {
        self.standing().note
    }

    pub fn set_note(&self, note: Note) {
        self.standing().note = note;
    }

    /// Marks it as having reached the model. False when it is not ours any more.
    fn commit(&self) -> bool {
        let mut standing = self.standing();
        if standing.ownership == Ownership::Held {
            standing.ownership = Ownership::Committed;
        }
        standing.ownership.is_ours()
    }

    fn change_if(&self, accepted: impl Fn(Ownership) -> bool, to: Ownership) -> bool {
        let mut standing = self.standing();
        let is_accepted = accepted(standing.ownership);
        if is_accepted {
            standing.ownership = to;
        }
        is_accepted
    }

    /// What to do with the message once all its items have ended.
    pub fn verdict(&self) -> Verdict {
        let standing = self.standing();
        let transient = standing
            .failures
            .iter()
            .find(|failure| failure.error.failure == Failure::Transient);
        match transient {
            Some(failure) => Verdict::Retry(failure.error.clone()),
            None if standing.failures.is_empty() => Verdict::Done,
            None => Verdict::Reject(standing.failures.clone()),
        }
    }
}

/// One item of a message on its way. It must end: a ticket that is dropped
/// unfinished (a panic, a stage that went away) counts as a transient failure,
/// so that no message is forgotten.
pub struct Ticket {
    message: Arc<Message>,
    desk: mpsc::UnboundedSender<Arc<Message>>,
    has_ended: bool,
}

impl Ticket {
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// Whether work on the item still makes sense.
    pub fn is_ours(&self) -> bool {
        self.message.ownership().is_ours()
    }

    /// Marks the message as having reached the model. False when it is not ours.
    pub fn commit(&self) -> bool {
        self.message.commit()
    }

    /// The item is stored and published, or there was nothing to do.
    pub fn finish(mut self) {
        self.end(None);
    }

    pub fn fail(mut self, error: TaskError, object: Option<String>, body: String) {
        self.end(Some(ItemFailure {
            error,
            object,
            body,
        }));
    }

    fn end(&mut self, failure: Option<ItemFailure>) {
        self.has_ended = true;
        let is_last = {
            let mut standing = self.message.standing();
            standing.failures.extend(failure);
            standing.open_items -= 1;
            standing.open_items == 0
        };
        if is_last {
            // The desk outlives every ticket but in the last moments of the
            // process, when the message is handed back anyway.
            let _ = self.desk.send(self.message.clone());
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let error = TaskError::transient(
            Stage::Acknowledge,
            Cause::Internal,
            "the work was dropped before its end",
        );
        self.end(Some(ItemFailure {
            error,
            object: None,
            body: String::new(),
        }));
    }
}

/// Every message in work.
#[derive(Default)]
pub struct Ledger {
    messages: Mutex<HashMap<String, Arc<Message>>>,
    emptied: Notify,
    /// Messages that were done but could not be deleted, the latest of them.
    done: Mutex<VecDeque<String>>,
    /// How many deliveries of a message this task has ended by returning it.
    returned: Mutex<HashMap<String, u32>>,
    taken: AtomicU64,
}

/// Messages that are remembered as done. Only those are whose deletion failed.
const MAX_DONE: usize = 1000;

/// Messages whose returns are remembered. Forgetting them costs the messages
/// nothing but company.
const MAX_RETURNED: usize = 10_000;

/// What [`Ledger::take`] made of a delivery.
pub enum Taken {
    New(Arc<Message>),
    /// The message is in work here already; its lease is the new one now.
    Duplicate,
    /// The message was done here already and only has to be deleted, with
    /// this receipt.
    Done(Receipt),
}

impl Ledger {
    fn messages(&self) -> MutexGuard<'_, HashMap<String, Arc<Message>>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a delivery. SQS delivers at least once: a message that is in
    /// work here already is not worked on twice; only its receipt is renewed,
    /// since the latest receipt is the one that SQS honours.
    pub fn take(&self, received: Received, now: Instant, visibility: Duration) -> Taken {
        let mut messages = self.messages();
        if let Some(known) = messages.get(&received.message_id) {
            let mut standing = known.standing();
            if standing.ownership.is_ours() {
                standing.receipt = received.receipt;
                standing.expires = now + visibility;
                return Taken::Duplicate;
            }
        }
        if self.is_done(&received.message_id) {
            return Taken::Done(received.receipt);
        }
        let explained = self.returned().get(&received.message_id).copied();
        let message = Arc::new(Message {
            message_id: received.message_id,
            body: received.body,
            receive_count: received.receive_count,
            unexplained: received
                .receive_count
                .saturating_sub(1 + explained.unwrap_or_default()),
            number: self.taken.fetch_add(1, Ordering::Relaxed),
            received: now,
            standing: Mutex::new(Standing {
                ownership: Ownership::Held,
                receipt: received.receipt,
                expires: now + visibility,
                open_items: 0,
                is_removed: false,
                failures: Vec::new(),
                note: Note::None,
            }),
        });
        messages.insert(message.message_id.clone(), message.clone());
        Taken::New(message)
    }

    fn returned(&self) -> MutexGuard<'_, HashMap<String, u32>> {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The message was returned to the queue: its next delivery does not mean
    /// that a worker died.
    pub fn remember_returned(&self, message: &Message) {
        let mut returned = self.returned();
        if returned.len() >= MAX_RETURNED {
            returned.clear();
        }
        *returned.entry(message.message_id.clone()).or_default() += 1;
    }

    fn done(&self) -> MutexGuard<'_, VecDeque<String>> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_done(&self, message_id: &str) -> bool {
        self.done().iter().any(|done| done == message_id)
    }

    /// The message is done, but could not be deleted: when it is delivered
    /// again, that is all that is left to do.
    pub fn remember_done(&self, message: &Message) {
        let mut done = self.done();
        if done.len() == MAX_DONE {
            done.pop_front();
        }
        done.push_back(message.message_id.clone());
    }

    /// Tickets for the items of a message that was just taken. The message
    /// goes to `desk` when the last one has ended.
    pub fn tickets(
        message: &Arc<Message>,
        items: usize,
        desk: &mpsc::UnboundedSender<Arc<Message>>,
    ) -> Vec<Ticket> {
        message.standing().open_items += items;
        (0..items)
            .map(|_| Ticket {
                message: message.clone(),
                desk: desk.clone(),
                has_ended: false,
            })
            .collect()
    }

    /// Removes a message whose fate is sealed; answers whether it was there.
    /// A message that was replaced by a newer delivery of itself counts as
    /// there once, when it is removed.
    pub fn remove(&self, message: &Arc<Message>) -> bool {
        if std::mem::replace(&mut message.standing().is_removed, true) {
            return false;
        }
        let mut messages = self.messages();
        if messages
            .get(&message.message_id)
            .is_some_and(|known| Arc::ptr_eq(known, message))
        {
            messages.remove(&message.message_id);
        }
        if messages.is_empty() {
            self.emptied.notify_waiters();
        }
        true
    }

    pub fn len(&self) -> usize {
        self.messages().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub async fn wait_until_empty(&self) {
        loop {
            let emptied = self.emptied.notified();
            tokio::pin!(emptied);
            // Registered before the check, so that no wake-up falls between.
            emptied.as_mut().enable();
            if self.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// The messages whose visibility ends within `margin`; those for which it
    /// has ended already are lost, and left out.
    pub fn due(&self, now: Instant, margin: Duration) -> Vec<Arc<Message>> {
        let mut due = Vec::new();
        for message in self.messages().values() {
            let mut standing = message.standing();
            if !standing.ownership.is_ours() {
                continue;
            }
            if standing.expires <= now {
                standing.ownership = Ownership::Lost;
                tracing::warn!(
                    message_id = message.message_id,
                    "the visibility ended before the work did"
                );
            } else if standing.expires - now <= margin {
                due.push(message.clone());
            }
        }
        due
    }

    /// The lease of `receipt` was extended at `at`.
    pub fn extended(message: &Message, receipt: &Receipt, at: Instant, visibility: Duration) {
        let mut standing = message.standing();
        if standing.receipt == *receipt {
            standing.expires = at + visibility;
        }
    }

    /// The queue says that `receipt` is stale. True when the message was ours
    /// until now and no newer delivery renewed it.
    pub fn lost(message: &Message, receipt: &Receipt) -> bool {
        let mut standing = message.standing();
        let is_lost = standing.receipt == *receipt && standing.ownership.is_ours();
        if is_lost {
            standing.ownership = Ownership::Lost;
        }
        is_lost
    }

    /// Gives up the messages that a stop hands back: those that have not
    /// reached the model, and with `all` the others too.
    pub fn give_up(&self, all: bool) -> Vec<Arc<Message>> {
        let is_given_up = |ownership: Ownership| {
            ownership == Ownership::Held || (all && ownership == Ownership::Committed)
        };
        self.messages()
            .values()
            .filter(|message| message.change_if(is_given_up, Ownership::HandedBack))
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VISIBILITY: Duration = Duration::from_secs(30);

    fn receipt(handle: &str) -> Receipt {
        Receipt {
            queue: 0,
            handle: handle.to_owned(),
        }
    }

    fn received(id: &str, handle: &str) -> Received {
        Received {
            message_id: id.to_owned(),
            receipt: receipt(handle),
            body: "{}".to_owned(),
            receive_count: 1,
        }
    }

    fn take(ledger: &Ledger, id: &str) -> Arc<Message> {
        match ledger.take(received(id, "r1"), Instant::now(), VISIBILITY) {
            Taken::New(message) => message,
            Taken::Duplicate | Taken::Done(_) => panic!("{id} is new"),
        }
    }

    fn failure(kind: Failure) -> TaskError {
        TaskError {
            failure: kind,
            ..TaskError::permanent(Stage::Decode, Cause::Damaged, "why")
        }
    }

    #[tokio::test]
    async fn a_message_goes_to_the_desk_when_its_last_item_has_ended() {
        let ledger = Ledger::default();
        let (desk, mut done) = mpsc::unbounded_channel();
        let message = take(&ledger, "a");
        let mut tickets = Ledger::tickets(&message, 2, &desk);
        tickets.remove(0).finish();
        assert!(done.try_recv().is_err());
        tickets.remove(0).finish();
        assert_eq!(done.try_recv().unwrap().verdict(), Verdict::Done);
    }

    #[tokio::test]
    async fn a_transient_failure_of_one_item_returns_the_whole_message() {
        let ledger = Ledger::default();
        let (desk, mut done) = mpsc::unbounded_channel();
        let message = take(&ledger, "a");
        let mut tickets = Ledger::tickets(&message, 2, &desk);
        let permanent = failure(Failure::Permanent);
        tickets.remove(0).fail(permanent, None, String::new());
        let transient = failure(Failure::Transient);
        tickets.remove(0).fail(transient, None, String::new());
        let verdict = done.try_recv().unwrap().verdict();
        assert!(matches!(verdict, Verdict::Retry(_)), "{verdict:?}");
    }

    #[tokio::test]
    async fn a_dropped_ticket_returns_the_message() {
        let ledger = Ledger::default();
        let (desk, mut done) = mpsc::unbounded_channel();
        let message = take(&ledger, "a");
        drop(Ledger::tickets(&message, 1, &desk));
        let verdict = done.try_recv().unwrap().verdict();
        assert!(matches!(verdict, Verdict::Retry(error) if error.cause == Cause::Internal));
    }

    #[tokio::test]
    async fn a_second_delivery_renews_the_lease_and_is_no_new_work() {
        let ledger = Ledger::default();
        let message = take(&ledger, "a");
        let again = ledger.take(received("a", "r2"), Instant::now(), VISIBILITY);
        assert!(matches!(again, Taken::Duplicate));
        assert_eq!(message.receipt(), receipt("r2"));
        // News about the old receipt changes nothing.
        assert!(!Ledger::lost(&message, &receipt("r1")));
        assert!(message.ownership().is_ours());
    }

    #[tokio::test]
    async fn a_lost_message_that_comes_back_is_new_work_and_the_old_one_cannot_end_it() {
        let ledger = Ledger::default();
        let old = take(&ledger, "a");
        assert!(Ledger::lost(&old, &receipt("r1")));
        let again = ledger.take(received("a", "r2"), Instant::now(), VISIBILITY);
        assert!(matches!(again, Taken::New(_)));
        assert!(ledger.remove(&old), "it took room at the gate");
        assert!(!ledger.remove(&old));
        assert_eq!(ledger.len(), 1);
    }

    #[tokio::test]
    async fn a_message_that_was_done_but_not_deleted_is_only_deleted_when_it_comes_back() {
        let ledger = Ledger::default();
        let message = take(&ledger, "a");
        ledger.remember_done(&message);
        ledger.remove(&message);
        let again = ledger.take(received("a", "r2"), Instant::now(), VISIBILITY);
        assert!(matches!(again, Taken::Done(again) if again == receipt("r2")));
        assert!(ledger.is_empty());
    }

    #[tokio::test]
    async fn a_delivery_that_this_task_ended_by_returning_it_is_explained() {
        let ledger = Ledger::default();
        let again = |receive_count| Received {
            receive_count,
            ..received("a", "r")
        };
        let taken =
            |receive_count| match ledger.take(again(receive_count), Instant::now(), VISIBILITY) {
                Taken::New(message) => message,
                Taken::Duplicate | Taken::Done(_) => panic!("it is new"),
            };
        let first = taken(1);
        assert_eq!(first.unexplained, 0);
        ledger.remember_returned(&first);
        ledger.remove(&first);
        let second = taken(2);
        assert_eq!(second.unexplained, 0);
        ledger.remove(&second);
        assert_eq!(taken(4).unexplained, 2);
    }

    #[tokio::test]
    async fn a_stop_hands_back_what_has_not_reached_the_model_first() {
        let ledger = Ledger::default();
        let waiting = take(&ledger, "waiting");
        let batched = take(&ledger, "batched");
        assert!(batched.commit());
        let first: Vec<String> = ids(&ledger.give_up(false));
        assert_eq!(first, ["waiting"]);
        assert!(!waiting.commit(), "it is not ours any more");
        assert_eq!(ids(&ledger.give_up(true)), ["batched"]);
        assert_eq!(batched.ownership(), Ownership::HandedBack);
    }

    fn ids(messages: &[Arc<Message>]) -> Vec<String> {
        messages
            .iter()
            .map(|message| message.message_id.clone())
            .collect()
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_due_before_it_ends_and_lost_after() {
        let ledger = Ledger::default();
        let message = take(&ledger, "a");
        let margin = Duration::from_secs(15);
        assert!(ledger.due(Instant::now(), margin).is_empty());
        tokio::time::advance(Duration::from_secs(20)).await;
        assert_eq!(ledger.due(Instant::now(), margin).len(), 1);
        Ledger::extended(&message, &receipt("r1"), Instant::now(), VISIBILITY);
        assert!(ledger.due(Instant::now(), margin).is_empty());
        tokio::time::advance(Duration::from_secs(31)).await;
        assert!(ledger.due(Instant::now(), margin).is_empty());
        assert_eq!(message.ownership(), Ownership::Lost);
    }
}
