//! How and why the task ends.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio_util::sync::CancellationToken;

use super::Ended;
use crate::rules::failure::{Cause, Fatal, Stage, TaskError};

/// Refusals of access in a row, with no success between them, after which the
/// task ends: its role is wrong, not the images.
const MAX_ACCESS_REFUSALS: usize = 20;

pub(super) struct Ending {
    /// Cancelled when the task stops, for whatever reason.
    pub(super) stop: CancellationToken,
    /// Cancelled when no receiver polls any more.
    pub(super) receivers_ended: CancellationToken,
    is_idle: OnceLock<()>,
    fatal: OnceLock<Fatal>,
    access_refusals: AtomicUsize,
}

impl Ending {
    pub(super) fn new(stop: CancellationToken) -> Self {
        Self {
            stop,
            receivers_ended: CancellationToken::new(),
            is_idle: OnceLock::new(),
            fatal: OnceLock::new(),
            access_refusals: AtomicUsize::new(0),
        }
    }

    pub(super) fn end_with(&self, fatal: Fatal) {
        tracing::error!(exit_code = fatal.exit_code(), %fatal, "the task cannot go on");
        let _ = self.fatal.set(fatal);
        self.stop.cancel();
    }

    pub(super) fn end_idle(&self) {
        let _ = self.is_idle.set(());
        self.stop.cancel();
    }

    pub(super) fn is_fatal(&self) -> bool {
        self.fatal.get().is_some()
    }

    /// Why the task ended, once it has.
    pub(super) fn reason(&self) -> Result<Ended, Fatal> {
        match (self.fatal.get(), self.is_idle.get()) {
            (Some(fatal), _) => Err(fatal.clone()),
            (None, Some(())) => Ok(Ended::Idle),
            (None, None) => Ok(Ended::Stopped),
        }
    }

    /// Counts refusals of access by the cache bucket and the outputs; a
    /// success starts the count again.
    pub(super) fn count_refusals(&self, error: Option<&TaskError>) {
        let Some(error) = error else {
            self.access_refusals.store(0, Ordering::Relaxed);
            return;
        };
        let is_own = matches!(error.stage, Stage::Store | Stage::Publish);
        if !is_own || error.cause != Cause::AccessDenied {
            return;
        }
        let in_a_row = self.access_refusals.fetch_add(1, Ordering::Relaxed) + 1;
        if in_a_row == MAX_ACCESS_REFUSALS {
            self.end_with(Fatal::Access(format!(
                "refused {in_a_row} times in a row, check the task's role: {error}"
            )));
        }
    }
}
