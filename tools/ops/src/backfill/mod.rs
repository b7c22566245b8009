//! Putting what lies in a bucket already onto the input queue.
//!
//! A walk goes through the objects in an order that never changes, decides
//! about each by what the listing tells, and sends the wanted ones in windows.
//! `design.md` beside this file tells what is remembered when, and what that
//! means after each kind of end.

mod checkpoint;
mod counts;
mod inventory;
mod job;
mod progress;
mod rate;
mod source;
mod vectors;
mod waker;

pub use checkpoint::{
    Checkpoint, CheckpointError, CheckpointFile, Settled, read as read_checkpoint,
};
pub use counts::{Counts, Skip};
pub use inventory::Inventory;
pub use job::{Job, Wanted};
pub use progress::Display;
pub use rate::TokenBucket;
pub use source::{Entry, Listing, Source, SourceError};
pub use vectors::{Heads, MAX_TABLE, Table, Unknown, Vectors};
pub use waker::{Scaler, Waker};

use delivery::{Outputs, PublishError};
use events::CloudEvent;
use platform::{Failure, aws};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Why a walk ended before its end, other than by a wish.
#[derive(Debug, thiserror::Error)]
pub enum BackfillError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Vectors(#[from] aws::Error),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The queue did not take some events in several tries.
    #[error("the queue did not take {failed} of {sent} events: {problem}")]
    Queue {
        failed: usize,
        sent: usize,
        /// What it said of the first.
        problem: Box<PublishError>,
    },
}

impl BackfillError {
    /// Whether running the same command again can help.
    pub fn failure(&self) -> Failure {
        match self {
            BackfillError::Queue { .. }
            | BackfillError::Vectors(_)
            | BackfillError::Source(SourceError::Call(_)) => Failure::Transient,
            BackfillError::Source(_) | BackfillError::Checkpoint(_) => Failure::Permanent,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Every object is settled.
    Complete,
    /// It was asked to stop, and remembers where it is.
    Stopped,
}

pub trait Progress: Send + Sync {
    fn counts(&self, counts: &Counts);
    fn note(&self, line: &str);
}

pub struct Walk<'a> {
    pub job: &'a Job,
    /// Where the objects come from, beginning after the state's position.
    pub source: &'a mut dyn Source,
    pub vectors: &'a dyn Vectors,
    /// The input queue; `None` sends nothing (a dry run).
    pub queue: Option<&'a Outputs>,
    pub waker: Option<&'a dyn Waker>,
    pub rate: TokenBucket,
    /// Where the state is kept, if it is.
    pub checkpoint: Option<&'a CheckpointFile>,
    pub progress: &'a dyn Progress,
    pub stop: &'a CancellationToken,
}

impl Walk<'_> {
    /// Goes on from `state` to the end, to the first failure, or until asked
    /// to stop. `state` is what the checkpoint holds, also after an error.
    pub async fn run(self, state: &mut Checkpoint) -> Result<End, BackfillError> {
        let mut window = Vec::with_capacity(self.rate.window());
        let mut engine = Engine {
            ahead: state.clone(),
            is_awake: false,
            walk: self,
            kept: state,
        };
        let end = engine.go_on(&mut window).await;
        if engine.walk.queue.is_none() && end.is_ok() {
            // A dry run has nothing to leave open.
            engine.send(&mut window).await?;
        }
        // What was settled without sending (a long stretch of other objects)
        // is kept too, unless a window is open before it.
        if window.is_empty() && end.is_ok() {
            *engine.kept = engine.ahead.clone();
            engine.kept.complete = matches!(end, Ok(End::Complete));
            engine.save()?;
        }
        engine.walk.progress.counts(&engine.kept.counts);
        end
    }
}

struct Engine<'a, 'b> {
    walk: Walk<'a>,
    /// The state that the checkpoint holds.
    kept: &'b mut Checkpoint,
    /// The state with everything that has been decided since: it becomes the
    /// kept one when the open window is settled.
    ahead: Checkpoint,
    is_awake: bool,
}

impl Engine<'_, '_> {
    async fn go_on(&mut self, window: &mut Vec<Wanted>) -> Result<End, BackfillError> {
        let stop = self.walk.stop.clone();
        loop {
            let page = tokio::select! {
                () = stop.cancelled() => return Ok(End::Stopped),
                page = self.walk.source.next_page() => page?,
            };
            let Some(page) = page else {
                break;
            };
            let decided = tokio::select! {
                () = stop.cancelled() => return Ok(End::Stopped),
                decided = self.decide(&page) => decided?,
            };
            for (entry, decision) in page.into_iter().zip(decided) {
                if window.len() == self.walk.rate.window() && !self.send(window).await? {
                    return Ok(End::Stopped);
                }
                self.ahead.counts.listed += 1;
                self.ahead.position = Some(entry.position);
                match decision {
                    Decision::Send(wanted) => window.push(*wanted),
                    Decision::Settle(id, settled, size) => self.settle(id, settled, size),
                    Decision::Skip(id, skip) => {
                        self.ahead.counts.skip(skip);
                        if let Some(id) = id {
                            self.ahead.in_doubt.remove(&id);
                        }
                    }
                }
            }
            self.walk.progress.counts(&self.ahead.counts);
        }
        if !window.is_empty() && !self.send(window).await? {
            return Ok(End::Stopped);
        }
        // Objects that were sent and then vanished or changed, so that the
        // walk did not meet them again.
        for (_, settled) in std::mem::take(&mut self.ahead.settled) {
            self.ahead.counts.listed += 1;
            match settled {
                Settled::Enqueued => self.ahead.counts.enqueued += 1,
                Settled::Refused => self.ahead.counts.refused += 1,
            }
        }
        self.ahead.in_doubt.clear();
        self.wake().await;
        Ok(End::Complete)
    }

    /// Decides about a page, in its order: what is settled already, then what
    /// the filters say, then whether the vector exists.
    async fn decide(&self, page: &[Entry]) -> Result<Vec<Decision>, aws::Error> {
        let filtered: Vec<Result<Wanted, Skip>> = page
            .iter()
            .map(|entry| self.walk.job.decide(&entry.object))
            .collect();
        let unsettled = |wanted: &&Wanted| !self.ahead.settled.contains_key(&wanted.id);
        let keys: Vec<String> = filtered
            .iter()
            .flatten()
            .filter(unsettled)
            .map(|wanted| wanted.vector_key.clone())
            .collect();
        let mut exist = self.walk.vectors.exist(&keys).await?.into_iter();
        let mut decisions = Vec::with_capacity(page.len());
        for one in filtered {
            decisions.push(match one {
                Err(skip) => Decision::Skip(None, skip),
                Ok(wanted) => match self.ahead.settled.get(&wanted.id) {
                    Some(settled) => Decision::Settle(wanted.id, *settled, wanted.size),
                    None if exist.next() == Some(true) => {
                        Decision::Skip(Some(wanted.id), Skip::AlreadyEmbedded)
                    }
                    None => Decision::Send(Box::new(wanted)),
                },
            });
        }
        Ok(decisions)
    }

    fn save(&self) -> Result<(), CheckpointError> {
        match self.walk.checkpoint {
            Some(file) => file.save(self.kept),
            None => Ok(()),
        }
    }

    /// Counts an object that an earlier run settled beyond its position.
    fn settle(&mut self, id: uuid::Uuid, settled: Settled, size: u64) {
        self.ahead.settled.remove(&id);
        match settled {
            Settled::Enqueued => {
                self.ahead.counts.enqueued += 1;
                self.ahead.counts.enqueued_bytes += size;
            }
            Settled::Refused => self.ahead.counts.refused += 1,
        }
    }

    /// Sends the window. `false` when asked to stop before its turn came:
    /// then nothing of it was sent.
    async fn send(&mut self, window: &mut Vec<Wanted>) -> Result<bool, BackfillError> {
        let Some(queue) = self.walk.queue else {
            for wanted in window.drain(..) {
                self.ahead.counts.enqueued += 1;
                self.ahead.counts.enqueued_bytes += wanted.size;
            }
            return Ok(true);
        };
        let wait = self.walk.rate.take(window.len(), Instant::now());
        tokio::select! {
            biased;
            () = self.walk.stop.cancelled() => return Ok(false),
            () = tokio::time::sleep(wait) => {}
        }

        // The intent comes first: whatever ends this process from here on,
        // the next run knows which events may be in the queue.
        self.kept.in_doubt.extend(window.iter().map(|one| one.id));
        self.save()?;

        let events: Vec<CloudEvent> = window.iter().map(|one| one.event.clone()).collect();
        let results = queue.publish(&events).await;

        let mut first_problem = None;
        let mut failed = 0;
        let mut outcomes = Vec::with_capacity(window.len());
        for (wanted, result) in window.iter().zip(results) {
            match result {
                Ok(()) => outcomes.push((wanted, Settled::Enqueued)),
                Err(problem) if problem.failure() == Failure::Permanent => {
                    let url = &wanted.event.data.document.url;
                    self.walk.progress.note(&format!("{url}: {problem}"));
                    outcomes.push((wanted, Settled::Refused));
                }
                Err(problem) => {
                    failed += 1;
                    first_problem.get_or_insert(problem);
                }
            }
        }
        if let Some(problem) = first_problem {
            // The position stays; what is known of the window is kept beyond
            // it. What failed stays in doubt: an answer may have been lost.
            for (wanted, settled) in outcomes {
                self.kept.in_doubt.remove(&wanted.id);
                self.kept.settled.insert(wanted.id, settled);
            }
            self.save()?;
            return Err(BackfillError::Queue {
                failed,
                sent: window.len(),
                problem: Box::new(problem),
            });
        }
        for (wanted, settled) in outcomes {
            if self.ahead.in_doubt.remove(&wanted.id) && settled == Settled::Enqueued {
                self.ahead.counts.sent_again += 1;
            }
            self.settle(wanted.id, settled, wanted.size);
        }
        window.clear();
        *self.kept = self.ahead.clone();
        self.save()?;
        self.walk.progress.counts(&self.kept.counts);
        if !self.is_awake {
            self.wake().await;
        }
        Ok(true)
    }

    /// Wakes the scaler with the first work, and once more at the end. A
    /// failure is told and no more: the scaler has a schedule of its own.
    async fn wake(&mut self) {
        let Some(waker) = self.walk.waker else {
            return;
        };
        if self.kept.counts.enqueued == 0 {
            return;
        }
        self.is_awake = true;
        if let Err(problem) = waker.wake().await {
            let line = format!("the scaler was not woken, its schedule will run it: {problem}");
            self.walk.progress.note(&line);
        }
    }
}

enum Decision {
    Send(Box<Wanted>),
    /// Known from an earlier run: the event's id, its fate, the object's size.
    Settle(uuid::Uuid, Settled, u64),
    /// The event's id, for an object that would have one.
    Skip(Option<uuid::Uuid>, Skip),
}

#[cfg(test)]
mod tests;
