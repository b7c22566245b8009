//! What became of each file: the one place where events, rejections and log
//! lines are told to the files they are about.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use events::S3Url;
use serde_json::Value;

use super::files::InputFile;
use crate::{
    deployment::{Rejection, SOURCE_BUCKET},
    emulator::LogLine,
};

/// What intake writes of an object that is no image and does not claim to be one.
const UNSUPPORTED: &str = "neither is an image nor claims to be";

/// How a file ended.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Its event has arrived at the next middleware.
    Embedded {
        /// From its upload to its event.
        after: Duration,
        /// The event.
        event: Value,
    },
    /// It has no vector, for this reason.
    Rejected {
        /// Who said so.
        by: String,
        /// Why.
        reason: String,
    },
    /// It could not be read or uploaded.
    NotUploaded {
        /// Why.
        reason: String,
    },
    /// The pipeline is at rest and nothing was heard of it.
    Lost,
}

impl Outcome {
    /// Whether the file has its vector.
    #[must_use]
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Embedded { .. })
    }
}

/// A file and what became of it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The file.
    pub file: InputFile,
    /// Its URL in events.
    pub url: String,
    /// When it was uploaded.
    pub uploaded: Option<Instant>,
    /// How it ended.
    pub outcome: Option<Outcome>,
}

/// All files.
#[derive(Debug)]
pub struct Ledger {
    /// In the order in which they were given.
    pub entries: Vec<Entry>,
    by_url: HashMap<String, usize>,
    /// Events beyond the first for a file: SQS and SNS deliver at least once.
    pub repeated_events: usize,
}

impl Ledger {
    /// A ledger of files that are not uploaded yet.
    #[must_use]
    pub fn new(files: Vec<InputFile>) -> Self {
        let entries: Vec<Entry> = files
            .into_iter()
            .map(|file| Entry {
                url: S3Url::new(SOURCE_BUCKET, &file.key).to_string(),
                file,
                uploaded: None,
                outcome: None,
            })
            .collect();
        let by_url = entries
            .iter()
            .enumerate()
            .map(|(index, entry)| (entry.url.clone(), index))
            .collect();
        Self {
            entries,
            by_url,
            repeated_events: 0,
        }
    }

    /// A file was uploaded, or could not be.
    pub fn uploaded(&mut self, index: usize, at: Instant, result: Result<(), String>) {
        let Some(entry) = self.entries.get_mut(index) else {
            return;
        };
        match result {
            Ok(()) => entry.uploaded = Some(at),
            Err(reason) => entry.outcome = Some(Outcome::NotUploaded { reason }),
        }
    }

    /// An event has arrived. Answers the file it is about, when it is its first.
    pub fn event(&mut self, event: Value, at: Instant) -> Option<&Entry> {
        let url = event["data"]["document"]["url"].as_str()?;
        let index = *self.by_url.get(url)?;
        let entry = self.entries.get_mut(index)?;
        if entry.outcome.as_ref().is_some_and(Outcome::is_good) {
            self.repeated_events += 1;
            return None;
        }
        // The event may be seen before the upload's own answer is.
        let after = entry.uploaded.map_or(Duration::ZERO, |uploaded| {
            at.saturating_duration_since(uploaded)
        });
        entry.outcome = Some(Outcome::Embedded { after, event });
        self.entries.get(index)
    }

    /// A rejection was found. Answers the file it is about.
    pub fn rejection(&mut self, rejection: &Rejection) -> Option<&Entry> {
        let index = *self.by_url.get(rejection.object.as_deref()?)?;
        let by = rejection.by.clone().unwrap_or_else(|| "SQS".to_owned());
        let reason = match (&rejection.reason, &rejection.stage) {
            (Some(reason), Some(stage)) => format!("{reason} (stage {stage})"),
            (Some(reason), None) => reason.clone(),
            (None, _) => "given up after too many attempts; the tasks' logs say why".to_owned(),
        };
        self.reject(index, by, reason)
    }

    /// A line of intake's log. Answers the file it is about, when intake has
    /// put it aside without a record in the dead-letter queue.
    pub fn intake_line(&mut self, line: &LogLine) -> Option<&Entry> {
        let line = line.json()?;
        if line["message"].as_str() != Some(UNSUPPORTED) {
            return None;
        }
        let index = *self.by_url.get(line["url"].as_str()?)?;
        let declared = line["content_type"]
            .as_str()
            .filter(|kind| *kind != "application/octet-stream");
        let declared = declared
            .map(|kind| format!(", Content-Type {kind}"))
            .unwrap_or_default();
        self.reject(
            index,
            "intake".to_owned(),
            format!("it is none of the seven image types{declared}"),
        )
    }

    fn reject(&mut self, index: usize, by: String, reason: String) -> Option<&Entry> {
        let entry = self.entries.get_mut(index)?;
        if entry.outcome.is_some() {
            return None;
        }
        entry.outcome = Some(Outcome::Rejected { by, reason });
        self.entries.get(index)
    }

    /// Whatever is still open is lost.
    pub fn close(&mut self) {
        for entry in &mut self.entries {
            entry.outcome.get_or_insert(Outcome::Lost);
        }
    }

    /// Files whose end is known.
    #[must_use]
    pub fn settled(&self) -> usize {
        self.entries
            .iter()
            .filter(|entry| entry.outcome.is_some())
            .count()
    }

    /// Files with their vector.
    #[must_use]
    pub fn embedded(&self) -> usize {
        self.entries
            .iter()
            .filter(|entry| entry.outcome.as_ref().is_some_and(Outcome::is_good))
            .count()
    }

    /// Files that are in the source bucket.
    #[must_use]
    pub fn uploads(&self) -> usize {
        self.entries
            .iter()
            .filter(|entry| entry.uploaded.is_some())
            .count()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ledger() -> Ledger {
        let file = |key: &str| InputFile {
            path: key.into(),
            key: key.to_owned(),
        };
        Ledger::new(vec![
            file("a/my photo+é.png"),
            file("lie.jpg"),
            file("notes.txt"),
            file("other.gif"),
        ])
    }

    #[test]
    fn each_file_ends_once() {
        let mut ledger = ledger();
        let start = Instant::now();
        ledger.uploaded(0, start, Ok(()));
        let event =
            json!({"data": {"document": {"url": "s3://clip-source/a/my%20photo%2B%C3%A9.png"}}});
        let entry = ledger
            .event(event.clone(), start + Duration::from_secs(3))
            .expect("the file");
        assert_eq!(entry.file.key, "a/my photo+é.png");
        assert!(
            matches!(entry.outcome, Some(Outcome::Embedded { after, .. }) if after == Duration::from_secs(3))
        );
        assert!(ledger.event(event, start).is_none(), "delivered twice");
        assert_eq!(
            (ledger.settled(), ledger.embedded(), ledger.repeated_events),
            (1, 1, 1)
        );

        let rejection = Rejection {
            body: String::new(),
            reason: Some("it ends early".into()),
            stage: Some("decode".into()),
            by: Some("gpu-task".into()),
            object: Some("s3://clip-source/lie.jpg".into()),
        };
        let entry = ledger.rejection(&rejection).expect("the file");
        assert!(
            matches!(&entry.outcome, Some(Outcome::Rejected { reason, .. }) if reason == "it ends early (stage decode)")
        );
        assert!(ledger.rejection(&rejection).is_none(), "once is enough");

        let line = json!({"message": UNSUPPORTED, "url": "s3://clip-source/notes.txt", "content_type": "text/plain"});
        let line = LogLine {
            timestamp: 0,
            message: line.to_string(),
        };
        assert_eq!(
            ledger
                .intake_line(&line)
                .map(|entry| entry.file.key.clone()),
            Some("notes.txt".to_owned())
        );

        assert_eq!(ledger.settled(), 3);
        ledger.close();
        assert!(matches!(ledger.entries[3].outcome, Some(Outcome::Lost)));
    }

    #[test]
    fn an_event_after_a_rejection_wins() {
        // A message that SQS gave up may have been finished all the same.
        let mut ledger = ledger();
        let given_up = Rejection {
            body: String::new(),
            reason: None,
            stage: None,
            by: None,
            object: Some("s3://clip-source/other.gif".into()),
        };
        assert!(ledger.rejection(&given_up).is_some());
        let event = json!({"data": {"document": {"url": "s3://clip-source/other.gif"}}});
        assert!(ledger.event(event, Instant::now()).is_some());
        assert_eq!(ledger.embedded(), 1);
    }
}
