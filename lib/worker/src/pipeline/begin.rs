//! Begin and parse: from messages in hand to items of work, each message when
//! its turn comes.

use std::sync::Arc;

use events::{CloudEvent, EventType, Item};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::store::{Deletion, ToStore};
use super::{Image, Job, Presence, Shared, Subject, Times};
use crate::rules::failure::{Cause, Stage, TaskError};
use crate::rules::ledger::{Ledger, Message, Note, Ticket};
use crate::rules::suspects::Company;

pub(super) async fn run(
    shared: Arc<Shared>,
    to_download: mpsc::Sender<Image>,
    to_store: mpsc::Sender<ToStore>,
) {
    let stop = shared.ending.stop.clone();
    let beginner = Beginner {
        shared,
        to_download,
        to_store,
    };
    // A stop hands back what has not had its turn.
    let _ = stop.run_until_cancelled(beginner.run()).await;
}

struct Beginner {
    shared: Arc<Shared>,
    to_download: mpsc::Sender<Image>,
    to_store: mpsc::Sender<ToStore>,
}

impl Beginner {
    async fn run(&self) {
        loop {
            let (message, company) = self.shared.held.next().await;
            let problem = match company {
                Company::Any | Company::Few => None,
                Company::Nobody if message.ownership().is_ours() => self.note(&message).await,
                Company::Nobody => None,
            };
            self.parse(message, problem).await;
        }
    }

    /// Leaves a note that the message is worked on alone, for whoever receives
    /// it should this task die. Where a note is found, one has died.
    async fn note(&self, message: &Message) -> Option<TaskError> {
        let notes = &self.shared.services.notes;
        let receives = message.receive_count;
        tracing::info!(
            message_id = message.message_id,
            receives,
            "received before and not finished, working on it alone"
        );
        let result = match notes.is_there(&message.message_id).await {
            Ok(true) => {
                message.set_note(Note::Found);
                return Some(TaskError::permanent(
                    Stage::Receive,
                    Cause::KilledWorker,
                    format!(
                        "killed its worker: {} deliveries ended with the worker's death, the last \
                         one while it worked on this message alone",
                        receives - 1
                    ),
                ));
            }
            Ok(false) => {
                message.set_note(Note::Written);
                notes.write(&message.message_id).await
            }
            Err(error) => Err(error),
        };
        let error = result.err()?;
        let message = format!("cannot keep a note of a suspect in the cache bucket: {error}");
        Some(TaskError::transient(
            Stage::Store,
            Cause::from(&error),
            message,
        ))
    }

    async fn parse(&self, message: Arc<Message>, problem: Option<TaskError>) {
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
            self.dispatch(item, ticket, is_alone, problem.clone()).await;
        }
        // A body without any item has one ticket and nothing to do.
        tickets.for_each(Ticket::finish);
    }

    async fn dispatch(
        &self,
        item: Item,
        ticket: Ticket,
        is_alone: bool,
        problem: Option<TaskError>,
    ) {
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
                if let Some(problem) = problem {
                    job.fail(&self.shared, problem);
                } else if event.kind == EventType::DocumentDeleted {
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
                if let Some(problem) = problem {
                    job.fail(&self.shared, problem);
                } else if object.kind == EventType::DocumentDeleted {
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
