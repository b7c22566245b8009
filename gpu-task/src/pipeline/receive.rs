//! Receive and parse: from the queue to items of work.

use std::sync::Arc;
use std::time::Duration;

use delivery::Backoff;
use events::{CloudEvent, EventType, Item};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::store::{Deletion, ToStore};
use super::{Image, Job, Presence, Shared, Subject, Times};
use crate::rules::failure::{Cause, Fatal, Stage, TaskError};
use crate::rules::ledger::{Ledger, Message, Taken, Ticket};
use crate::services::{LONG_POLL_MAX, Received};

/// Messages for which one receiver is enough at 100 ms a receive.
const MESSAGES_PER_RECEIVER: usize = 64;

/// Receivers at most; each holds a connection in a long poll.
const MAX_RECEIVERS: usize = 8;

/// After a stop, a receive that has something to bring brings it at once; one
/// that is still quiet then waits at an empty queue and may be cut off.
const STOP_GRACE: Duration = Duration::from_millis(200);

/// Between receives that fail.
const RECEIVE_BACKOFF: Backoff = Backoff {
    base: Duration::from_millis(200),
    cap: Duration::from_secs(5),
};

/// Refusals in a row after which the task ends. With the backoff they span
/// about half a minute: a role or policy that was just written needs some.
const MAX_REFUSALS: u32 = 10;

/// Starts the receivers. The first always polls; the others help while the
/// queue is deep, so that an idle task costs one long poll at a time.
pub(super) fn spawn(
    shared: &Arc<Shared>,
    to_download: &mpsc::Sender<Image>,
    to_store: &mpsc::Sender<ToStore>,
) -> Vec<JoinHandle<()>> {
    let (deep, _) = watch::channel(false);
    let deep = Arc::new(deep);
    let receivers = shared.settings.max_messages / MESSAGES_PER_RECEIVER;
    (0..receivers.clamp(1, MAX_RECEIVERS))
        .map(|index| {
            let receiver = Receiver {
                shared: shared.clone(),
                deep: deep.clone(),
                is_first: index == 0,
                to_download: to_download.clone(),
                to_store: to_store.clone(),
            };
            tokio::spawn(receiver.run())
        })
        .collect()
}

struct Receiver {
    shared: Arc<Shared>,
    /// Whether the last receive came back full.
    deep: Arc<watch::Sender<bool>>,
    is_first: bool,
    to_download: mpsc::Sender<Image>,
    to_store: mpsc::Sender<ToStore>,
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
                    let reason = error.message;
                    if error.is_refusal && failures >= MAX_REFUSALS {
                        let message = format!("cannot receive from the input queue: {reason}");
                        self.shared.ending.end_with(Fatal::Access(message));
                        return;
                    }
                    tracing::warn!(failures, reason, "receiving failed, trying again");
                    let cause = super::cause_of_call(&reason);
                    let error = TaskError::transient(Stage::Receive, cause, reason);
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
        if idle_exit.is_zero() {
            return LONG_POLL_MAX;
        }
        let left = idle_exit.saturating_sub(self.shared.held.idle_for());
        // Whole seconds, rounded up: the API takes no others.
        let seconds = left.as_secs_f64().ceil().max(1.0);
        Duration::from_secs(seconds as u64).min(LONG_POLL_MAX)
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
                Taken::New(message) => self.parse(message).await,
            }
        }
    }

    async fn parse(&self, message: Arc<Message>) {
        let shared = &self.shared;
        let started = Instant::now();
        let items = events::parse_work(message.body.as_bytes());
        let count = items.as_ref().map_or(1, |items| items.len().max(1));
        let mut tickets = Ledger::tickets(&message, count, &shared.held.desk).into_iter();
        shared.metrics.did(Stage::Parse, started.elapsed());
        let items = match items {
            Ok(items) => items,
            Err(error) => {
                if let Some(ticket) = tickets.next() {
                    let (stage, cause) = (Stage::Parse, Cause::Malformed);
                    let error = TaskError::permanent(stage, cause, error.to_string());
                    job(ticket, String::new(), None).fail(shared, error);
                }
                return;
            }
        };
        let is_alone = items.len() == 1;
        for (item, ticket) in items.into_iter().zip(tickets.by_ref()) {
            self.dispatch(item, ticket, is_alone).await;
        }
        // A body without any item has one ticket and nothing to do.
        tickets.for_each(Ticket::finish);
    }

    async fn dispatch(&self, item: Item, ticket: Ticket, is_alone: bool) {
        let own_body = |event: &CloudEvent| (!is_alone).then(|| event.to_json());
        match item {
            Item::Ignored { reason } => {
                tracing::debug!(reason, "ignored");
                ticket.finish();
            }
            Item::Rejected { object, reason } => {
                let error = TaskError::permanent(Stage::Parse, Cause::Malformed, reason);
                job(ticket, object, None).fail(&self.shared, error);
            }
            Item::Event(event) => {
                let url = event.data.document.url.clone();
                let job = job(ticket, url, own_body(&event));
                if event.kind == EventType::DocumentDeleted {
                    self.send_deletion(job, Some(*event)).await;
                } else {
                    self.send_image(job, Subject::Event(event)).await;
                }
            }
            Item::Object(object) => {
                // Without a type there is no event to pass on, but the vector
                // of an object without an extension still has to go.
                let event = events::ImageType::from_name(&object.url.key)
                    .map(|image_type| object.to_event(image_type));
                let own_body = event.as_ref().and_then(own_body);
                let job = job(ticket, object.url.to_string(), own_body);
                if object.kind == EventType::DocumentDeleted {
                    self.send_deletion(job, event).await;
                } else {
                    self.send_image(job, Subject::Object(object)).await;
                }
            }
        }
    }

    async fn send_image(&self, job: Job, subject: Subject) {
        let image = Image {
            job,
            subject,
            times: Times::default(),
            presence: Presence::new(&self.shared),
        };
        self.shared.metrics.waits(Stage::Download);
        // A closed queue drops the image, whose ticket then returns it.
        let _ = self.to_download.send(image).await;
    }

    async fn send_deletion(&self, job: Job, event: Option<CloudEvent>) {
        let deletion = Box::new(Deletion { job, event });
        let _ = self.to_store.send(ToStore::Deletion(deletion)).await;
    }
}

fn job(ticket: Ticket, object: String, own_body: Option<String>) -> Job {
    Job {
        ticket,
        object,
        own_body,
    }
}
