//! Whether an object is there: the only ground on which a deletion is believed.

use aws_sdk_s3::Client;
use events::S3Url;
use platform::aws::{self, ErrorKind};

/// The header by which S3 tells a delete marker from a key that never was.
const DELETE_MARKER: &str = "x-amz-delete-marker";

/// What the latest version of a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// An object.
    Live,
    /// A delete marker.
    Marked,
    /// Nothing.
    Gone,
}

/// Asks S3. Only an answer that the object is not there counts as one: without
/// `s3:ListBucket` S3 refuses a missing key with 403, which is an error here.
pub async fn presence(s3: &Client, url: &S3Url) -> Result<Presence, aws::Error> {
    let head = s3.head_object().bucket(&url.bucket).key(&url.key);
    let Err(error) = head.send().await else {
        return Ok(Presence::Live);
    };
    let header = error
        .raw_response()
        .and_then(|response| response.headers().get(DELETE_MARKER));
    let is_marked = header == Some("true");
    let error = aws::Error::from_sdk("s3:HeadObject", &error).of(url.to_string());
    match error.kind {
        ErrorKind::NotFound if is_marked => Ok(Presence::Marked),
        ErrorKind::NotFound => Ok(Presence::Gone),
        _ => Err(error),
    }
}
