//! What the tasks' stages do, from the metrics in their logs: one line while
//! they run, and a total at the end.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use serde_json::Value;

/// The stages that are shown, in an image's order.
const SHOWN: [&str; 6] = [
    "download",
    "decode",
    "infer",
    "store",
    "publish",
    "acknowledge",
];

#[derive(Default)]
struct Log {
    read: u64,
    /// The beginning of a line whose end is not written yet.
    rest: Vec<u8>,
}

impl Log {
    fn new_lines(&mut self, path: &Path) -> Vec<String> {
        let mut new = Vec::new();
        let read = File::open(path).and_then(|mut file| {
            file.seek(SeekFrom::Start(self.read))?;
            file.read_to_end(&mut new)
        });
        // A log that cannot be read now can be at the next look.
        self.read += read.unwrap_or_default() as u64;
        self.rest.extend(new);
        let end = self.rest.iter().rposition(|&byte| byte == b'\n');
        let rest = self.rest.split_off(end.map_or(0, |end| end + 1));
        let whole = std::mem::replace(&mut self.rest, rest);
        String::from_utf8_lossy(&whole)
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

#[derive(Clone, Copy, Default)]
struct Stage {
    done: f64,
    busy_ms: f64,
}

#[derive(Default)]
pub(super) struct Stages {
    logs: BTreeMap<PathBuf, Log>,
    totals: BTreeMap<String, Stage>,
    waiting: BTreeMap<(PathBuf, String), u64>,
    /// What was done in a task's last interval.
    images: BTreeMap<PathBuf, u64>,
}

impl Stages {
    /// Reads what a task has written since the last time.
    pub fn read(&mut self, log: &Path) {
        let lines = self.logs.entry(log.to_owned()).or_default().new_lines(log);
        for line in lines {
            if let Ok(line) = serde_json::from_str::<Value>(&line) {
                self.take(log, &line);
            }
        }
    }

    /// A task runs no more: nothing waits in it.
    pub fn forget(&mut self, log: &Path) {
        self.waiting.retain(|(task, _), _| task != log);
        self.images.remove(log);
    }

    fn take(&mut self, log: &Path, line: &Value) {
        if let Some(images) = line["Images"].as_f64() {
            self.images.insert(log.to_owned(), images as u64);
        }
        let (Some(stage), Some(done)) = (line["Stage"].as_str(), line["Done"].as_f64()) else {
            return;
        };
        let total = self.totals.entry(stage.to_owned()).or_default();
        total.done += done;
        total.busy_ms += line["BusyTime"].as_f64().unwrap_or_default();
        let waits = line["QueueLength"].as_f64().unwrap_or_default() as u64;
        self.waiting
            .insert((log.to_owned(), stage.to_owned()), waits);
    }

    /// What happens now, for the terminal's bottom; nothing before a task tells.
    pub fn now(&self) -> String {
        if self.images.is_empty() {
            return String::new();
        }
        let images: u64 = self.images.values().sum();
        let mut text = format!("{images} images in the last second · waiting for");
        for stage in SHOWN {
            let of_stage = self.waiting.iter().filter(|((_, of), _)| of == stage);
            let waits: u64 = of_stage.map(|(_, waits)| waits).sum();
            text.push_str(&format!(" {stage} {waits}"));
        }
        text
    }

    /// How often each stage worked, and how long each time.
    pub fn total(&self) -> String {
        let parts: Vec<String> = SHOWN
            .iter()
            .filter_map(|stage| {
                let total = self.totals.get(*stage).filter(|total| total.done > 0.0)?;
                let each = total.busy_ms / total.done;
                Some(format!("{stage} {:.0} × {each:.1} ms", total.done))
            })
            .collect();
        parts.join(" · ")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn what_a_task_writes_is_counted_once_and_added_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("task.log");
        let mut file = File::create(&path).unwrap();
        let mut stages = Stages::default();
        stages.read(&path);
        assert_eq!(stages.total(), "");
        writeln!(file, r#"{{"Images":3.0,"QueueName":"input"}}"#).unwrap();
        writeln!(
            file,
            r#"{{"Stage":"decode","Done":3.0,"BusyTime":30.0,"QueueLength":2.0}}"#
        )
        .unwrap();
        write!(file, r#"{{"Stage":"decode","Done":1.0,"#).unwrap();
        stages.read(&path);
        stages.read(&path);
        assert_eq!(stages.total(), "decode 3 × 10.0 ms");
        assert!(stages.now().starts_with("3 images in the last second"));
        assert!(stages.now().contains("decode 2 "), "{}", stages.now());
        writeln!(file, r#""BusyTime":50.0,"QueueLength":0.0}}"#).unwrap();
        stages.read(&path);
        assert_eq!(stages.total(), "decode 4 × 20.0 ms");
        stages.forget(&path);
        assert_eq!(stages.now(), "");
        assert_eq!(stages.total(), "decode 4 × 20.0 ms");
    }
}
