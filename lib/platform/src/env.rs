//! Configuration from the environment: read once, typed, with errors that
//! name the variable, its value and what is accepted.

use std::fmt::Display;
use std::str::FromStr;
use std::time::Duration;

/// A variable that is missing or holds something that is not accepted.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[allow(missing_docs)] // The messages say it.
pub enum EnvError {
    #[error("{name} is not set: {accepted}")]
    Missing { name: String, accepted: String },
    #[error("{name}={value:?} is not accepted: {accepted}")]
    Invalid {
        name: String,
        value: String,
        accepted: String,
    },
}

/// Reads variables through a look-up, so that tests need no process
/// environment. An empty variable counts as absent: templates pass empty
/// strings for options that are off.
pub struct Reader<'a> {
    look_up: Box<LookUp<'a>>,
}

type LookUp<'a> = dyn Fn(&str) -> Option<String> + 'a;

impl Reader<'static> {
    /// Reads the process environment.
    pub fn process() -> Self {
        Self::new(|name| std::env::var(name).ok())
    }
}

impl<'a> Reader<'a> {
    /// Reads through `look_up`.
    pub fn new(look_up: impl Fn(&str) -> Option<String> + 'a) -> Self {
        Self {
            look_up: Box::new(look_up),
        }
    }

    /// The variable's value, if it is set and not empty.
    pub fn optional(&self, name: &str) -> Option<String> {
        (self.look_up)(name).filter(|value| !value.trim().is_empty())
    }

    /// The variable's value; `accepted` describes it in the error.
    pub fn required(&self, name: &str, accepted: &str) -> Result<String, EnvError> {
        self.optional(name).ok_or_else(|| EnvError::Missing {
            name: name.to_owned(),
            accepted: accepted.to_owned(),
        })
    }

    /// A value of type `T`, or `default` when the variable is not set.
    pub fn parsed<T: FromStr>(
        &self,
        name: &str,
        default: T,
        accepted: &str,
    ) -> Result<T, EnvError> {
        match self.optional(name) {
            None => Ok(default),
            Some(value) => value
                .trim()
                .parse()
                .map_err(|_| invalid(name, &value, accepted)),
        }
    }

    /// A number within `range` (both ends included), or `default`.
    pub fn within<T>(
        &self,
        name: &str,
        default: T,
        range: std::ops::RangeInclusive<T>,
        unit: &str,
    ) -> Result<T, EnvError>
    where
        T: FromStr + PartialOrd + Display + Copy,
    {
        let accepted = format!("{} to {} {unit}", range.start(), range.end());
        let value = self.parsed(name, default, &accepted)?;
        if range.contains(&value) {
            Ok(value)
        } else {
            Err(invalid(name, &value.to_string(), &accepted))
        }
    }

    /// A whole number of seconds within `range`, or `default`.
    pub fn seconds(
        &self,
        name: &str,
        default: u64,
        range: std::ops::RangeInclusive<u64>,
    ) -> Result<Duration, EnvError> {
        self.within(name, default, range, "seconds")
            .map(Duration::from_secs)
    }

    /// `true` or `false`, or `default`.
    pub fn flag(&self, name: &str, default: bool) -> Result<bool, EnvError> {
        match self.optional(name).as_deref().map(str::trim) {
            None => Ok(default),
            Some("true" | "1" | "yes") => Ok(true),
            Some("false" | "0" | "no") => Ok(false),
            Some(value) => Err(invalid(name, value, "true or false")),
        }
    }

    /// One of the named choices, or `default`.
    pub fn choice<T: Copy>(
        &self,
        name: &str,
        default: T,
        choices: &[(&str, T)],
    ) -> Result<T, EnvError> {
        let Some(value) = self.optional(name) else {
            return Ok(default);
        };
        for (word, choice) in choices {
            if value.trim().eq_ignore_ascii_case(word) {
                return Ok(*choice);
            }
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        Err(invalid(name, &value, &words.join(" or ")))
    }
}

/// An error about a variable whose value is not accepted.
pub fn invalid(name: &str, value: &str, accepted: &str) -> EnvError {
    EnvError::Invalid {
        name: name.to_owned(),
        value: value.to_owned(),
        accepted: accepted.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(name: &'static str, value: &'static str) -> Reader<'static> {
        Reader::new(move |asked| (asked == name).then(|| value.to_owned()))
    }

    #[test]
    fn an_error_names_variable_value_and_what_is_accepted() {
        let error = reader("BATCH_SIZE", "0").within("BATCH_SIZE", 8, 1..=256, "images");
        assert_eq!(
            error.unwrap_err().to_string(),
            r#"BATCH_SIZE="0" is not accepted: 1 to 256 images"#
        );
    }

    #[test]
    fn an_empty_variable_counts_as_absent() {
        assert_eq!(reader("DECODE", " ").optional("DECODE"), None);
        assert_eq!(
            reader("EXTRACT_LABELS", "").flag("EXTRACT_LABELS", true),
            Ok(true)
        );
    }

    #[test]
    fn a_missing_variable_says_what_it_should_hold() {
        let error = reader("OTHER", "x").required("INPUT_QUEUE_URL", "the URL of the input queue");
        assert_eq!(
            error.unwrap_err().to_string(),
            "INPUT_QUEUE_URL is not set: the URL of the input queue"
        );
    }

    #[test]
    fn a_choice_is_one_of_the_named_words() {
        let choices = [("cpu", 1), ("cuda", 2)];
        assert_eq!(reader("P", "CUDA").choice("P", 1, &choices), Ok(2));
        assert_eq!(
            reader("P", "tpu")
                .choice("P", 1, &choices)
                .unwrap_err()
                .to_string(),
            r#"P="tpu" is not accepted: cpu or cuda"#
        );
    }
}
