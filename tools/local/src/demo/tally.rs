//! What became of each file: the one place where events, rejections and log
//! lines are told to the files they are about.

use std::{
    collections::HashMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use events::S3Url;
use serde_json::Value;

use super::files::InputFile;
use crate::deployment::{DeadLetter, DeployError, LogLine, SOURCE_BUCKET};

/// What intake writes of an object that is no image and does not claim to be one.
const UNSUPPORTED: &str = "neither is an image nor claims to be";

#[derive(Debug, Clone)]
pub enum Fate {
    Embedded {
        /// From its upload here to its event.
        after: Option<Duration>,
        event: Value,
    },
    Rejected {
        by: String,
        reason: String,
    },
    NotUploaded {
        reason: String,
    },
    /// The pipeline is at rest and nothing was heard of it.
    Lost,
}

impl Fate {
    /// Whether the file has its vector.
    pub fn is_good(&self) -> bool {
        matches!(self, Self::Embedded { .. })
    }
}

#[derive(Debug, Clone)]
pub struct TrackedFile {
    pub input: InputFile,
    pub url: String,
    pub uploaded: Option<Instant>,
    pub fate: Option<Fate>,
    /// The express lane embedded it, not a task.
    pub is_express: bool,
}

#[derive(Debug)]
pub struct Tally {
    pub files: Vec<TrackedFile>,
    by_url: HashMap<String, usize>,
    /// Events beyond the first for a file: SQS and SNS deliver at least once.
    pub repeated_events: usize,
    is_open: bool,
}

impl Tally {
    pub fn new(inputs: Vec<InputFile>) -> Self {
        let files: Vec<TrackedFile> = inputs
            .into_iter()
            .map(|input| TrackedFile {
                url: S3Url::new(SOURCE_BUCKET, &input.key).to_string(),
                input,
                uploaded: None,
                fate: None,
                is_express: false,
            })
            .collect();
        let by_url = files
            .iter()
            .enumerate()
            .map(|(index, file)| (file.url.clone(), index))
            .collect();
        Self {
            files,
            by_url,
            repeated_events: 0,
            is_open: false,
        }
    }

    /// From now on whatever is heard of counts, others' uploads and repeated
    /// ones included.
    pub fn open(&mut self) {
        self.is_open = true;
    }

    fn index_of(&mut self, url: &str) -> Option<usize> {
        let known = self.by_url.get(url).copied();
        known.or_else(|| {
            let url: S3Url = url.parse().ok().filter(|_| self.is_open)?;
            self.by_url.insert(url.to_string(), self.files.len());
            self.files.push(TrackedFile {
                url: url.to_string(),
                input: InputFile {
                    path: PathBuf::new(),
                    key: url.key,
                },
                uploaded: None,
                fate: None,
                is_express: false,
            });
            Some(self.files.len() - 1)
        })
    }

    pub fn uploaded(&mut self, index: usize, at: Instant, result: Result<(), DeployError>) {
        let Some(file) = self.files.get_mut(index) else {
            return;
        };
        match result {
            Ok(()) => file.uploaded = Some(at),
            Err(error) => {
                let reason = error.to_string();
                file.fate = Some(Fate::NotUploaded { reason });
            }
        }
    }

    /// An event has arrived. Answers the file it is about, when it is its first.
    pub fn event(&mut self, event: Value, at: Instant) -> Option<&TrackedFile> {
        let url = event["data"]["document"]["url"].as_str()?;
        let index = self.index_of(url)?;
        let file = self.files.get_mut(index)?;
        if file.fate.as_ref().is_some_and(Fate::is_good) && !self.is_open {
            self.repeated_events += 1;
            return None;
        }
        // An event after the first comes of an upload that is not this one.
        let after = file.uploaded.filter(|_| file.fate.is_none());
        let after = after.map(|uploaded| at.saturating_duration_since(uploaded));
        file.fate = Some(Fate::Embedded { after, event });
        self.files.get(index)
    }

    /// A rejection was found. Answers the file it is about.
    pub fn rejection(&mut self, rejection: &DeadLetter) -> Option<&TrackedFile> {
        let index = self.index_of(rejection.object.as_deref()?)?;
        let by = rejection.by.clone().unwrap_or_else(|| "SQS".to_owned());
        let reason = match (&rejection.reason, &rejection.stage) {
            (Some(reason), Some(stage)) => format!("{reason} (stage {stage})"),
            (Some(reason), None) => reason.clone(),
            (None, _) => "given up after too many attempts; the tasks' logs say why".to_owned(),
        };
        self.reject(index, by, reason)
    }

    /// A line of the express lane's log.
    pub fn express_line(&mut self, line: &LogLine) {
        let line = line.json().unwrap_or_default();
        let object = line["object"].as_str().unwrap_or_default();
        if line["message"] == "image embedded"
            && let Some(index) = self.index_of(object)
        {
            self.files[index].is_express = true;
        }
    }

    /// A line of intake's log. Answers the file it is about, when intake has
    /// put it aside without a record in the dead-letter queue.
    pub fn intake_line(&mut self, line: &LogLine) -> Option<&TrackedFile> {
        let line = line.json()?;
        if line["message"].as_str() != Some(UNSUPPORTED) {
            return None;
        }
        let index = self.index_of(line["url"].as_str()?)?;
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

    fn reject(&mut self, index: usize, by: String, reason: String) -> Option<&TrackedFile> {
        let file = self.files.get_mut(index)?;
        if file.fate.is_some() && !self.is_open {
            return None;
        }
        file.fate = Some(Fate::Rejected { by, reason });
        self.files.get(index)
    }

    pub fn close(&mut self) {
        for file in &mut self.files {
            file.fate.get_or_insert(Fate::Lost);
        }
    }

    pub fn settled(&self) -> usize {
        self.files.iter().filter(|file| file.fate.is_some()).count()
    }

    pub fn embedded(&self) -> usize {
        self.files
            .iter()
            .filter(|file| file.fate.as_ref().is_some_and(Fate::is_good))
            .count()
    }

    pub fn uploads(&self) -> usize {
        self.files
            .iter()
            .filter(|file| file.uploaded.is_some())
            .count()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tally() -> Tally {
        let file = |key: &str| InputFile {
            path: key.into(),
            key: key.to_owned(),
        };
        Tally::new(vec![
            file("a/my photo+é.png"),
            file("lie.jpg"),
            file("notes.txt"),
            file("other.gif"),
        ])
    }

    #[test]
    fn each_file_ends_once() {
        let mut tally = tally();
        let start = Instant::now();
        tally.uploaded(0, start, Ok(()));
        let event =
            json!({"data": {"document": {"url": "s3://clip-source/a/my%20photo%2B%C3%A9.png"}}});
        let file = tally
            .event(event.clone(), start + Duration::from_secs(3))
            .expect("the file");
        assert_eq!(file.input.key, "a/my photo+é.png");
        assert!(
            matches!(file.fate, Some(Fate::Embedded { after, .. }) if after == Some(Duration::from_secs(3)))
        );
        assert!(tally.event(event, start).is_none(), "delivered twice");
        assert_eq!(
            (tally.settled(), tally.embedded(), tally.repeated_events),
            (1, 1, 1)
        );

        let rejection = DeadLetter {
            body: String::new(),
            reason: Some("it ends early".into()),
            stage: Some("decode".into()),
            by: Some("gpu-task".into()),
            object: Some("s3://clip-source/lie.jpg".into()),
        };
        let file = tally.rejection(&rejection).expect("the file");
        assert!(
            matches!(&file.fate, Some(Fate::Rejected { reason, .. }) if reason == "it ends early (stage decode)")
        );
        assert!(tally.rejection(&rejection).is_none(), "once is enough");

        let line = json!({"message": UNSUPPORTED, "url": "s3://clip-source/notes.txt", "content_type": "text/plain"});
        let line = LogLine {
            timestamp: 0,
            message: line.to_string(),
        };
        assert_eq!(
            tally.intake_line(&line).map(|file| file.input.key.clone()),
            Some("notes.txt".to_owned())
        );

        assert_eq!(tally.settled(), 3);
        tally.close();
        assert!(matches!(tally.files[3].fate, Some(Fate::Lost)));
    }

    #[test]
    fn an_event_after_a_rejection_wins() {
        // A message that SQS gave up may have been finished all the same.
        let mut tally = tally();
        let given_up = DeadLetter {
            body: String::new(),
            reason: None,
            stage: None,
            by: None,
            object: Some("s3://clip-source/other.gif".into()),
        };
        assert!(tally.rejection(&given_up).is_some());
        let event = json!({"data": {"document": {"url": "s3://clip-source/other.gif"}}});
        assert!(tally.event(event, Instant::now()).is_some());
        assert_eq!(tally.embedded(), 1);
    }

    #[test]
    fn once_open_everything_that_is_heard_of_counts() {
        let mut tally = tally();
        let event = json!({"data": {"document": {"url": "s3://clip-source/by%20hand.png"}}});
        assert!(tally.event(event.clone(), Instant::now()).is_none());
        tally.open();
        for _ in 0..2 {
            let file = tally.event(event.clone(), Instant::now()).expect("told");
            assert_eq!(file.input.key, "by hand.png");
        }
        assert_eq!((tally.files.len(), tally.repeated_events), (5, 0));
    }
}
