//! Download: the document's bytes, within the limits and the budget, and its
//! type.

use std::sync::Arc;

use events::ImageType;
use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Image, Shared, Subject, milliseconds, stage, store};
use crate::rules::budget::Reserved;
use crate::rules::failure::{Cause, Failure, Stage, TaskError};

/// Reserved for a document of unknown size before its head is read.
const UNKNOWN_BYTES: u64 = 1024 * 1024;

/// Tries within the task before the message goes back to the queue.
const TRIES: u32 = 2;

/// An image whose document is in memory.
pub(super) struct Fetched {
    pub(super) image: Image,
    pub(super) document: Document,
}

pub(super) struct Document {
    pub(super) bytes: Vec<u8>,
    pub(super) kind: ImageType,
    /// What tells this version of the document from others.
    pub(super) version: String,
    pub(super) memory: Reserved,
}

/// A document as the storage tells of it.
struct Read {
    bytes: Vec<u8>,
    content_type: Option<String>,
    etag: Option<String>,
    memory: Reserved,
}

pub(super) async fn run(
    shared: Arc<Shared>,
    images: mpsc::Receiver<Image>,
    to_decode: mpsc::Sender<Fetched>,
) {
    let workers = shared.settings.downloads;
    stage(images, workers, move |mut image: Image| {
        let (shared, to_decode) = (shared.clone(), to_decode.clone());
        async move {
            shared.metrics.leaves(Stage::Download);
            if !image.job.ticket.is_ours() {
                return;
            }
            match download(&shared, &mut image).await {
                Ok(document) => {
                    shared.metrics.waits(Stage::Decode);
                    let _ = to_decode.send(Fetched { image, document }).await;
                }
                Err(error) if error.cause == Cause::NotFound => {
                    fail_without(&shared, image, error).await;
                }
                Err(error) => image.job.fail(&shared, error),
            }
        }
    })
    .await;
}

/// An earlier delivery may have stored a vector and died before it saw that the
/// object was deleted: nobody else would find that vector.
async fn fail_without(shared: &Shared, image: Image, error: TaskError) {
    // Without a model the task ends, and the message goes back.
    let Some(model) = shared.model().await else {
        return;
    };
    let forgotten = store::forget_if_gone(shared, &image.job.object, &model.name).await;
    let error = match forgotten {
        Ok(_) => error,
        Err(failed) => TaskError::of_call(Stage::Store, &failed),
    };
    image.job.fail(shared, error);
}

async fn download(shared: &Shared, image: &mut Image) -> Result<Document, TaskError> {
    let (announced, named, event_etag) = match &image.subject {
        Subject::Event(event) => {
            let document = &event.data.document;
            let size = document.size.as_ref().and_then(|size| size.as_u64());
            (size, Some(&document.mime_type), &document.etag)
        }
        Subject::Object(object) => (object.size, None, &object.etag),
    };
    let url = &image.job.object;
    let wanted = announced
        .unwrap_or(UNKNOWN_BYTES)
        .min(shared.settings.max_image_bytes);
    let limit = shared.settings.download_timeout;
    let mut tries = 1;
    let read = loop {
        let memory = shared.documents_budget.reserve(wanted).await;
        if !image.job.ticket.is_ours() {
            let (stage, cause) = (Stage::Download, Cause::LeaseLost);
            return Err(TaskError::transient(stage, cause, "lease lost"));
        }
        let started = Instant::now();
        let result = tokio::time::timeout(limit, read(shared, url, memory)).await;
        image.times.download += milliseconds(started);
        shared.metrics.did(Stage::Download, started.elapsed());
        let error = match result {
            Ok(Ok(read)) => break read,
            Ok(Err(error)) => error,
            Err(_) => {
                let message = format!("{url} was not read in {} s", limit.as_secs());
                let (stage, cause) = (Stage::Download, Cause::Timeout);
                return Err(TaskError::transient(stage, cause, message));
            }
        };
        if error.failure == Failure::Permanent || tries == TRIES {
            return Err(error);
        }
        tries += 1;
    };
    shared.metrics.read(read.bytes.len() as u64);
    let judged = judge_type(
        &read.bytes,
        read.content_type.as_deref(),
        named.map(String::as_str),
        url,
    )?;
    for disagreement in judged.disagreements {
        tracing::info!(
            object = url,
            content = judged.kind.mime(),
            disagreement,
            "the content is of another type than declared; the content counts"
        );
    }
    let version = read
        .etag
        .or_else(|| event_etag.clone())
        .unwrap_or_else(|| content_digest(&read.bytes));
    Ok(Document {
        bytes: read.bytes,
        kind: judged.kind,
        version,
        memory: read.memory,
    })
}

async fn read(shared: &Shared, url: &str, memory: Reserved) -> Result<Read, TaskError> {
    let most = shared.settings.max_image_bytes;
    let too_large = |bytes: u64| {
        let message = format!("{url} has {bytes} bytes or more, MAX_IMAGE_BYTES is {most}");
        TaskError::permanent(Stage::Download, Cause::TooLarge, message)
    };
    let mut opened = shared.services.documents.open(url).await?;
    // A body of unknown length could grow to the limit, so it counts as that.
    let expected = opened.length.unwrap_or(most);
    if expected > most {
        return Err(too_large(expected));
    }
    let room = shared.documents_budget.total();
    if let Some(length) = opened.length {
        shared.check_room(Stage::Download, length, room)?;
    }
    let memory = if expected > memory.bytes() {
        // Given back before more is asked for: nobody who holds memory waits
        // for memory.
        drop(memory);
        shared.documents_budget.reserve(expected).await
    } else {
        memory
    };
    let mut bytes = Vec::with_capacity(opened.length.unwrap_or(UNKNOWN_BYTES) as usize);
    while let Some(chunk) = opened.body.next().await {
        let chunk = chunk?;
        let length = (bytes.len() + chunk.len()) as u64;
        if length > most {
            return Err(too_large(length));
        }
        shared.check_room(Stage::Download, length, room)?;
        bytes.extend_from_slice(&chunk);
    }
    if let Some(length) = opened.length
        && length != bytes.len() as u64
    {
        let message = format!("{url} ended after {} of {length} bytes", bytes.len());
        return Err(TaskError::transient(
            Stage::Download,
            Cause::Unavailable,
            message,
        ));
    }
    if bytes.is_empty() {
        let message = format!("{url} is empty");
        return Err(TaskError::permanent(Stage::Download, Cause::Empty, message));
    }
    Ok(Read {
        bytes,
        content_type: opened.content_type,
        etag: opened.etag.filter(|etag| !etag.is_empty()),
        memory,
    })
}

fn content_digest(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// The type that counts, and what said otherwise.
#[derive(Debug, PartialEq, Eq)]
struct Judged {
    kind: ImageType,
    disagreements: Vec<String>,
}

/// The content decides; where it says nothing, the storage's content type,
/// then the event's, then the name's extension.
fn judge_type(
    bytes: &[u8],
    content_type: Option<&str>,
    event_type: Option<&str>,
    url: &str,
) -> Result<Judged, TaskError> {
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let claims = [
        ("content type", content_type.and_then(ImageType::from_mime)),
        ("event", event_type.and_then(ImageType::from_mime)),
        ("name", ImageType::from_name(path)),
    ];
    let first_claim = claims.iter().find_map(|(_, claim)| *claim);
    let Some(kind) = ImageType::detect(bytes).or(first_claim) else {
        let declared = content_type.unwrap_or("none");
        let message = format!(
            "{url} is none of the supported image types, neither by content nor by name \
             (declared type: {declared})"
        );
        return Err(TaskError::permanent(
            Stage::Download,
            Cause::Unsupported,
            message,
        ));
    };
    let disagreements = claims
        .into_iter()
        .filter_map(|(who, claim)| claim.map(|claim| (who, claim)))
        .filter(|(_, claim)| *claim != kind)
        .map(|(who, claim)| format!("{who} says {}", claim.mime()))
        .collect();
    Ok(Judged {
        kind,
        disagreements,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PNG: &[u8] = b"\x89PNG\r\n\x1a\n........";

    #[test]
    fn the_content_decides_and_who_disagrees_is_named() {
        let judged = judge_type(PNG, Some("image/jpeg"), Some("image/png"), "s3://b/lie.jpg");
        assert_eq!(
            judged,
            Ok(Judged {
                kind: ImageType::Png,
                disagreements: vec![
                    "content type says image/jpeg".to_owned(),
                    "name says image/jpeg".to_owned()
                ],
            })
        );
    }

    #[test]
    fn silent_content_leaves_it_to_the_claims_in_their_order() {
        let kind = |content_type, event_type, url| {
            judge_type(b"unknown content", content_type, event_type, url)
                .map(|judged| judged.kind)
                .ok()
        };
        let webp = Some(ImageType::Webp);
        assert_eq!(
            kind(Some("image/webp"), Some("image/gif"), "s3://b/x.png"),
            webp
        );
        assert_eq!(
            kind(Some("binary/octet-stream"), Some("image/webp"), "s3://b/x"),
            webp
        );
        assert_eq!(kind(None, None, "https://h/a/X.WEBP?size=1"), webp);
        assert_eq!(kind(Some("text/plain"), None, "s3://b/x.txt"), None);
    }
}
