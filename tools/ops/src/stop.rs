//! Stopping on a signal without leaving anything half done.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Exit codes of a program that a signal ended: 128 and the signal's number.
const INTERRUPTED: i32 = 130;
const TERMINATED: i32 = 143;

#[derive(Clone)]
pub struct Stop {
    /// Cancelled with the first signal.
    pub token: CancellationToken,
    exit_code: Arc<AtomicI32>,
}

impl Stop {
    /// Listens for SIGINT and SIGTERM. The first asks for an orderly stop, the
    /// second ends the program where it stands.
    pub fn on_signals() -> std::io::Result<Self> {
        let stop = Self {
            token: CancellationToken::new(),
            exit_code: Arc::new(AtomicI32::new(INTERRUPTED)),
        };
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let listening = stop.clone();
        tokio::spawn(async move {
            loop {
                let code = tokio::select! {
                    _ = interrupt.recv() => INTERRUPTED,
                    _ = terminate.recv() => TERMINATED,
                };
                if listening.token.is_cancelled() {
                    std::process::exit(code);
                }
                listening.exit_code.store(code, Ordering::SeqCst);
                listening.token.cancel();
            }
        });
        Ok(stop)
    }

    /// What a program that stopped on the signal exits with.
    pub fn exit_code(&self) -> u8 {
        u8::try_from(self.exit_code.load(Ordering::SeqCst)).unwrap_or(1)
    }
}
