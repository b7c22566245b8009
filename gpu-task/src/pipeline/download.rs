//! Download: the document's bytes, within the limits and the budget, and its
//! type.

use std::sync::Arc;

use events::ImageType;
use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Image, Shared, Subject, milliseconds, stage};
use crate::failure::{Cause, Failure, Stage, TaskError};
use crate::memory::Reserved;

/// Reserved for a document of unknown size before its head is read.
const UNKNOWN_BYTES: u64 = 1024 * 1024;

/// Tries within the task before the message goes back to the queue.
const TRIES: u32 = 2;

/// A document in memory.
pub(super) struct Fetched {
    pub(super) image: Image,
    pub(super) bytes: Vec<u8>,
    pub(super) kind: ImageType,
    /// What tells this version of the document from others.
    pub(super) version: String,
    pub(super) memory: Reserved,
}

struct Document {
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
    stage(images, workers, move |image: Image| {
        let (shared, to_decode) = (shared.clone(), to_decode.clone());
        async move {
            shared.stats.leaves(Stage::Download);
            if !image.ticket.is_ours() {
                return;
            }
            match download(&shared, image).await {
                Ok(fetched) => {
                    shared.stats.waits(Stage::Decode);
                    let _ = to_decode.send(fetched).await;
                }
                Err((image, error)) => image.fail(&shared, error),
            }
        }
    })
    .await;
}

async fn download(shared: &Shared, mut image: Image) -> Result<Fetched, (Image, TaskError)> {
    let announced = match &image.subject {
        Subject::Event(event) => event
            .data
            .document
            .size
            .as_ref()
            .and_then(|size| size.as_u64()),
        Subject::Object(object) => object.size,
    };
    let mut tries = 1;
    let document = loop {
        let most = shared.settings.max_image_bytes;
        let wanted = announced.unwrap_or(UNKNOWN_BYTES).min(most);
        let memory = shared.documents_memory.reserve(wanted).await;
        if !image.ticket.is_ours() {
            let error = TaskError::transient(Stage::Download, Cause::LeaseLost, "lease lost");
            return Err((image, error));
        }
        let started = Instant::now();
        let limit = shared.settings.download_timeout;
        let result = tokio::time::timeout(limit, fetch(shared, &image.url, memory)).await;
        image.times.download += milliseconds(started);
        shared.stats.did(Stage::Download, started.elapsed());
        let error = match result {
            Ok(Ok(document)) => break document,
            Ok(Err(error)) => error,
            Err(_) => {
                let message = format!("{} was not read in {} s", image.url, limit.as_secs());
                return Err((
                    image,
                    TaskError::transient(Stage::Download, Cause::Timeout, message),
                ));
            }
        };
        if error.failure == Failure::Permanent || tries == TRIES {
            return Err((image, error));
        }
        tries += 1;
    };
    shared.stats.read(document.bytes.len() as u64);
    let named = match &image.subject {
        Subject::Event(event) => Some(event.data.document.mime_type.as_str()),
        Subject::Object(_) => None,
    };
    let judged = judge_type(
        &document.bytes,
        document.content_type.as_deref(),
        named,
        &image.url,
    );
    let kind = match judged {
        Ok(judged) => {
            for disagreement in judged.disagreements {
                tracing::info!(
                    object = image.url,
                    content = judged.kind.mime(),
                    disagreement,
                    "the content is of another type than declared; the content counts"
                );
            }
            judged.kind
        }
        Err(error) => return Err((image, error)),
    };
    let event_etag = match &image.subject {
        Subject::Event(event) => event.data.document.etag.clone(),
        Subject::Object(object) => object.etag.clone(),
    };
    let version = document
        .etag
        .or(event_etag)
        .unwrap_or_else(|| content_digest(&document.bytes));
    Ok(Fetched {
        image,
        bytes: document.bytes,
        kind,
        version,
        memory: document.memory,
    })
}

async fn fetch(shared: &Shared, url: &str, memory: Reserved) -> Result<Document, TaskError> {
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
    let memory = if expected > memory.bytes() {
        // Given back before more is asked for: nobody who holds memory waits
        // for memory.
        drop(memory);
        shared.documents_memory.reserve(expected).await
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
    Ok(Document {
        bytes,
        content_type: opened.content_type,
        etag: opened.etag.filter(|etag| !etag.is_empty()),
        memory,
    })
}

fn content_digest(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
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
