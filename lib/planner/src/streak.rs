//! What one run tells the next: a line of text in a tag of an Auto Scaling
//! group. `design.md` says why there.

use std::fmt;
use std::str::FromStr;

/// Tag key on the first option's group: failed task launches in a row.
pub const TASKS_KEY: &str = "clip-scaler:tasks";

/// Tag key on each option's group: instances that never became useful.
pub const OPTION_KEY: &str = "clip-scaler:option";

/// Longest value of a tag (Auto Scaling API reference, type Tag).
const MAX_TAG_VALUE: usize = 256;

/// How often something failed in a row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FailureStreak {
    /// Failures in a row.
    pub failures: u32,
    /// When the last one that is counted happened.
    pub at: i64,
    /// What it said.
    pub why: String,
}

impl fmt::Display for FailureStreak {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = format!("k={} at={} why=", self.failures, self.at);
        let mut line = head;
        // A tag takes letters, digits, spaces and `_ . : / = + - @`.
        for character in self.why.chars() {
            let allowed = character.is_ascii_alphanumeric() || " _.:/=+-@".contains(character);
            line.push(if allowed { character } else { ' ' });
        }
        line.truncate(MAX_TAG_VALUE);
        formatter.write_str(line.trim_end())
    }
}

/// A tag that is not one of ours.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the tag is not of the form k=… at=… why=…")]
pub struct NotAStreak;

impl FromStr for FailureStreak {
    type Err = NotAStreak;

    fn from_str(line: &str) -> Result<Self, NotAStreak> {
        let rest = line.strip_prefix("k=").ok_or(NotAStreak)?;
        let (failures, rest) = rest.split_once(" at=").ok_or(NotAStreak)?;
        let (at, why) = match rest.split_once(" why=") {
            Some((at, why)) => (at, why),
            None => (rest.strip_suffix(" why").unwrap_or(rest), ""),
        };
        Ok(Self {
            failures: failures.parse().map_err(|_| NotAStreak)?,
            at: at.trim().parse().map_err(|_| NotAStreak)?,
            why: why.to_owned(),
        })
    }
}

impl FailureStreak {
    /// The memory in a tag; no tag or a foreign one is an empty memory.
    pub fn from_tag(tag: Option<&String>) -> Self {
        tag.and_then(|line| line.parse().ok()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_survives_the_tag() {
        let memory = FailureStreak {
            failures: 3,
            at: 1_732_370_000,
            why: "exit code 1: model digest differs".to_owned(),
        };
        assert_eq!(memory.to_string().parse(), Ok(memory));
        let empty = FailureStreak::default();
        assert_eq!(empty.to_string().parse(), Ok(empty));
    }

    #[test]
    fn a_tag_keeps_to_its_characters_and_length() {
        let memory = FailureStreak {
            failures: 1,
            at: 2,
            why: "naïve “quote” ".repeat(60),
        };
        let line = memory.to_string();
        assert!(line.len() <= MAX_TAG_VALUE);
        assert!(line.is_ascii());
        assert_eq!(line.parse::<FailureStreak>().map(|m| m.failures), Ok(1));
    }

    #[test]
    fn a_foreign_tag_is_no_memory() {
        assert_eq!(
            FailureStreak::from_tag(Some(&"hello".to_owned())),
            FailureStreak::default()
        );
    }
}
