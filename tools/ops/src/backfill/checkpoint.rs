//! What a walk remembers, so that an interrupted one goes on where it was.
//!
//! `design.md` beside this file tells the protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use super::counts::Counts;
use super::job::{Job, Position};

/// The form of the file. Another number is another form.
const VERSION: u32 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Settled {
    /// The queue has confirmed it.
    Enqueued,
    /// The queue will never take it.
    Refused,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Checkpoint {
    /// All objects up to here are settled and counted; `None` at the start.
    pub position: Option<Position>,
    pub counts: Counts,
    /// Events beyond the position whose fate is known.
    pub settled: BTreeMap<Uuid, Settled>,
    /// Events beyond the position whose sending began and was never confirmed.
    pub in_doubt: BTreeSet<Uuid>,
    pub complete: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Form {
    version: u32,
    job: Value,
    #[serde(flatten)]
    state: Checkpoint,
}

#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("the checkpoint {path} cannot be {verb}: {problem}")]
    Io {
        path: PathBuf,
        verb: &'static str,
        problem: io::Error,
    },
    #[error("{path} is no checkpoint of this program: {problem}; name another file")]
    Form { path: PathBuf, problem: String },
    #[error(
        "the checkpoint {path} is of a different job: {differences}; \
         give the same options, or name another file"
    )]
    OtherJob {
        path: PathBuf,
        /// Which parameters differ, with both values.
        differences: String,
    },
    #[error("the checkpoint {path} is in use by another backfill")]
    InUse { path: PathBuf },
}

#[derive(Debug)]
pub struct CheckpointFile {
    path: PathBuf,
    job: Value,
    /// Held as long as this process writes the file.
    _lock: File,
}

impl CheckpointFile {
    /// Opens the checkpoint for writing and reads what it holds. No other
    /// process can open it until this value is dropped.
    pub fn open(path: &Path, job: &Job) -> Result<(Self, Checkpoint), CheckpointError> {
        let lock = lock(path)?;
        let checkpoint = read(path, job)?;
        let file = Self {
            path: path.to_owned(),
            job: job_value(job),
            _lock: lock,
        };
        Ok((file, checkpoint))
    }

    /// Replaces the file in one step: whoever reads it, after whatever kind
    /// of end, finds the old state or the new one.
    pub fn save(&self, state: &Checkpoint) -> Result<(), CheckpointError> {
        let form = Form {
            version: VERSION,
            job: self.job.clone(),
            state: state.clone(),
        };
        let mut content = serde_json::to_vec_pretty(&form).expect("a state's maps have text keys");
        content.push(b'\n');
        replace(&self.path, &content).map_err(io_error(&self.path, "written"))
    }
}

fn io_error(path: &Path, verb: &'static str) -> impl Fn(io::Error) -> CheckpointError {
    move |problem| CheckpointError::Io {
        path: path.to_owned(),
        verb,
        problem,
    }
}

/// Reads a checkpoint without opening it for writing; a file that is not
/// there is a walk's start.
pub fn read(path: &Path, job: &Job) -> Result<Checkpoint, CheckpointError> {
    let content = match fs::read(path) {
        Ok(content) => content,
        Err(problem) if problem.kind() == io::ErrorKind::NotFound => {
            return Ok(Checkpoint::default());
        }
        Err(problem) => return Err(io_error(path, "read")(problem)),
    };
    let wrong_form = |problem: String| CheckpointError::Form {
        path: path.to_owned(),
        problem,
    };
    let form: Form =
        serde_json::from_slice(&content).map_err(|problem| wrong_form(problem.to_string()))?;
    if form.version != VERSION {
        let found = form.version;
        return Err(wrong_form(format!(
            "its version is {found}, this program's is {VERSION}"
        )));
    }
    let differences = differences(&form.job, &job_value(job));
    if !differences.is_empty() {
        return Err(CheckpointError::OtherJob {
            path: path.to_owned(),
            differences,
        });
    }
    Ok(form.state)
}

fn job_value(job: &Job) -> Value {
    serde_json::to_value(job).expect("a job is plain data")
}

fn differences(saved: &Value, wanted: &Value) -> String {
    let empty = serde_json::Map::new();
    let saved = saved.as_object().unwrap_or(&empty);
    let wanted = wanted.as_object().unwrap_or(&empty);
    let names: BTreeSet<&String> = saved.keys().chain(wanted.keys()).collect();
    let mut differing = Vec::new();
    for name in names {
        let (before, now) = (saved.get(name), wanted.get(name));
        if before != now {
            let text = |value: Option<&Value>| match value {
                None | Some(Value::Null) => "not given".to_owned(),
                Some(value) => value.to_string(),
            };
            differing.push(format!("{name} was {} and is {}", text(before), text(now)));
        }
    }
    differing.join(", ")
}

/// The lock is on a file beside the checkpoint, which is itself replaced with
/// every save. It stays behind: removing it would let two processes lock two
/// files of one name.
fn lock(path: &Path) -> Result<File, CheckpointError> {
    let lock_path = beside(path, "lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&lock_path)
        .map_err(io_error(&lock_path, "written"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(CheckpointError::InUse {
            path: path.to_owned(),
        }),
        Err(TryLockError::Error(problem)) => Err(io_error(&lock_path, "written")(problem)),
    }
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(suffix);
    PathBuf::from(name)
}

/// Writes to a file beside the target, brings it to the disk, and renames it:
/// a rename is atomic, and after the two syncs it survives a power failure.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let new_path = beside(path, "new");
    let mut file = File::create(&new_path)?;
    file.write_all(content)?;
    file.sync_data()?;
    drop(file);
    fs::rename(&new_path, path)?;
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backfill::job::tests::job;

    fn state() -> Checkpoint {
        Checkpoint {
            position: Some(Position::Key("a/ü b.png".to_owned())),
            counts: Counts {
                listed: 7,
                enqueued: 5,
                other_type: 2,
                ..Counts::default()
            },
            settled: BTreeMap::from([(Uuid::from_u128(1), Settled::Enqueued)]),
            in_doubt: BTreeSet::from([Uuid::from_u128(2)]),
            complete: false,
        }
    }

    #[test]
    fn what_is_saved_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("walk.json");
        let (file, at_start) = CheckpointFile::open(&path, &job()).unwrap();
        assert_eq!(at_start, Checkpoint::default());
        file.save(&state()).unwrap();
        drop(file);
        let (_file, read) = CheckpointFile::open(&path, &job()).unwrap();
        assert_eq!(read, state());
    }

    #[test]
    fn another_jobs_checkpoint_is_refused_with_what_differs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("walk.json");
        let (file, _) = CheckpointFile::open(&path, &job()).unwrap();
        file.save(&state()).unwrap();
        drop(file);
        let mut other = job();
        other.model = "ViT-L/14".to_owned();
        other.max_size = Some(5);
        let problem = CheckpointFile::open(&path, &other).unwrap_err().to_string();
        for words in [
            "model was \"ViT-B/32\" and is \"ViT-L/14\"",
            "max-size was not given and is 5",
        ] {
            assert!(problem.contains(words), "{words} in {problem}");
        }
    }

    #[test]
    fn two_processes_cannot_share_a_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("walk.json");
        let _first = CheckpointFile::open(&path, &job()).unwrap();
        let second = CheckpointFile::open(&path, &job());
        assert!(matches!(second, Err(CheckpointError::InUse { .. })));
    }

    #[test]
    fn a_file_that_is_no_checkpoint_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notes.txt");
        fs::write(&path, "buy milk").unwrap();
        let problem = CheckpointFile::open(&path, &job()).unwrap_err();
        assert!(matches!(problem, CheckpointError::Form { .. }), "{problem}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "buy milk");
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let problem = CheckpointFile::open(Path::new("/no/such/folder/x.json"), &job());
        let problem = problem.unwrap_err().to_string();
        assert!(problem.contains("/no/such/folder/x.json"), "{problem}");
    }
}
