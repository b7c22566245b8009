//! S3 URLs as events carry them: `s3://bucket/key`, with each segment of the
//! key percent-encoded.

use std::fmt;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// What stays as it is in a segment: ECMAScript's `encodeURIComponent`, which
/// the S3 trigger in front of this system applies to each segment.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'!')
    .remove(b'~')
    .remove(b'*')
    .remove(b'\'')
    .remove(b'(')
    .remove(b')');

/// The shortest key that the next middleware accepts, in characters.
const KEY_MIN_CHARS: usize = 2;

/// A bucket and a key (decoded).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct S3Url {
    /// The bucket's name.
    pub bucket: String,
    /// The object's key, as the S3 API takes it.
    pub key: String,
}

/// Why a URL names no S3 object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // The messages say it.
pub enum S3UrlError {
    #[error("{0:?} is no s3:// URL")]
    Scheme(String),
    #[error("{0:?} names no bucket")]
    Bucket(String),
    #[error("the key of {0:?} has fewer than {KEY_MIN_CHARS} characters")]
    Key(String),
    #[error("the key of {0:?} is not UTF-8 after percent-decoding")]
    Encoding(String),
}

impl S3Url {
    /// A URL for an object whose key is not encoded.
    pub fn new(bucket: &str, key: &str) -> Self {
        Self {
            bucket: bucket.to_owned(),
            key: key.to_owned(),
        }
    }
}

impl fmt::Display for S3Url {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "s3://{}", self.bucket)?;
        for segment in self.key.split('/') {
            write!(formatter, "/{}", utf8_percent_encode(segment, SEGMENT))?;
        }
        Ok(())
    }
}

impl FromStr for S3Url {
    type Err = S3UrlError;

    fn from_str(url: &str) -> Result<Self, S3UrlError> {
        let rest = url
            .strip_prefix("s3://")
            .ok_or_else(|| S3UrlError::Scheme(url.to_owned()))?;
        // A key has both encoded, so that what is not is a query or a fragment.
        let rest = rest.split(['?', '#']).next().unwrap_or_default();
        let (bucket, encoded_key) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(S3UrlError::Bucket(url.to_owned()));
        }
        let key = percent_decode_str(encoded_key)
            .decode_utf8()
            .map_err(|_| S3UrlError::Encoding(url.to_owned()))?;
        if key.chars().count() < KEY_MIN_CHARS {
            return Err(S3UrlError::Key(url.to_owned()));
        }
        Ok(Self::new(bucket, &key))
    }
}

/// Decodes the key of an S3 event notification, which is form-encoded: `+` is
/// a space, then percent-decoding. (EventBridge's `Object Created` carries the
/// key as it is; it must not be decoded.)
pub fn decode_notification_key(key: &str) -> Result<String, S3UrlError> {
    let spaced = key.replace('+', " ");
    percent_decode_str(&spaced)
        .decode_utf8()
        .map(|decoded| decoded.into_owned())
        .map_err(|_| S3UrlError::Encoding(key.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_notification_key_becomes_the_url_that_the_trigger_writes() {
        let key = decode_notification_key("a/my+photo%2B%C3%A9%26%281%29.png").unwrap();
        assert_eq!(key, "a/my photo+é&(1).png");
        assert_eq!(
            S3Url::new("src", &key).to_string(),
            "s3://src/a/my%20photo%2B%C3%A9%26(1).png"
        );
    }

    #[test]
    fn a_url_that_names_no_object_is_refused_with_its_reason() {
        for url in [
            "http://b/key",
            "s3:///key",
            "s3://b",
            "s3://b/k",
            "s3://b/%ff%fe",
        ] {
            let error = url.parse::<S3Url>().unwrap_err();
            assert!(error.to_string().contains(url), "{error}");
        }
    }

    proptest! {
        #[test]
        fn every_key_survives_the_url(bucket in "[a-z0-9][a-z0-9.-]{2,20}", key in ".{2,60}") {
            let url = S3Url::new(&bucket, &key);
            prop_assert_eq!(url.to_string().parse::<S3Url>().unwrap(), url);
        }

        #[test]
        fn an_encoded_url_is_ascii(key in "\\PC{2,40}") {
            prop_assert!(S3Url::new("bucket", &key).to_string().is_ascii());
        }
    }
}
