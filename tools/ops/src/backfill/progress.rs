//! The progress of a walk on standard error: a bar on a terminal, a line now
//! and then anywhere else.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::Progress;
use super::counts::Counts;

/// Between two lines where there is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// Between two movements of the bar's spinner.
const TICK: Duration = Duration::from_millis(200);

pub struct Display {
    bar: ProgressBar,
    first: Mutex<Option<(Instant, u64)>>,
    last_line: Mutex<Instant>,
}

impl Display {
    pub fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {elapsed_precise} {msg}")
            .unwrap_or_else(|_| ProgressStyle::default_spinner());
        bar.set_style(style);
        bar.enable_steady_tick(TICK);
        Self {
            bar,
            first: Mutex::new(None),
            last_line: Mutex::new(Instant::now()),
        }
    }

    /// Says what is being done before there are counts.
    pub fn step(&self, what: &'static str) {
        self.bar.set_message(what);
    }

    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }

    /// Enqueued per second since the first counts of this run, which are
    /// those of the runs before.
    fn rate(&self, enqueued: u64) -> f64 {
        let mut first = self
            .first
            .lock()
            .unwrap_or_else(|broken| broken.into_inner());
        let (since, at_start) = *first.get_or_insert((Instant::now(), enqueued));
        let seconds = since.elapsed().as_secs_f64();
        if seconds < 0.5 {
            return 0.0;
        }
        enqueued.saturating_sub(at_start) as f64 / seconds
    }
}

impl Progress for Display {
    fn counts(&self, counts: &Counts) {
        let line = format!("{} ({:.0}/s)", counts.line(), self.rate(counts.enqueued));
        if self.bar.is_hidden() {
            let mut last = self
                .last_line
                .lock()
                .unwrap_or_else(|broken| broken.into_inner());
            if last.elapsed() >= LINE_INTERVAL {
                *last = Instant::now();
                eprintln!("{line}");
            }
        } else {
            self.bar.set_message(line);
        }
    }

    fn note(&self, line: &str) {
        if self.bar.is_hidden() {
            eprintln!("{line}");
        } else {
            self.bar.suspend(|| eprintln!("{line}"));
        }
    }
}
