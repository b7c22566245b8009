//! Store and publish: the vector first, then the event that points to it.

use std::sync::Arc;
use std::time::Duration;

use delivery::{Presence, PublishError};
use events::{CloudEvent, Embedding, S3Url, vector};
use serde_json::Map;
use sha2::{Digest, Sha256};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use super::decode::About;
use super::{Image, Job, Shared, Subject, Times, gather, milliseconds, stage};
use crate::rules::failure::{Cause, Stage, TaskError};
use crate::services::ModelInfo;

/// How long an event waits for others to share a request with.
const LINGER: Duration = Duration::from_millis(15);

/// Publish requests at the same time: at 100 ms each and ten events a
/// request, 800 events/s.
const PUBLISHES: usize = 8;

/// Where events that no output takes are kept, below the vectors' prefix.
const OVERSIZE_FOLDER: &str = "oversize-events";

/// An image with its vector.
pub(super) struct Embedded {
    pub(super) image: Image,
    pub(super) vector: Vec<f32>,
    pub(super) about: About,
}

/// A document that is gone: its vectors go too, and the event is passed on.
pub(super) struct Deletion {
    pub(super) job: Job,
    pub(super) event: Option<CloudEvent>,
}

pub(super) enum ToStore {
    Vector(Box<Embedded>),
    Deletion(Box<Deletion>),
}

/// An event on its way out.
pub(super) struct Outgoing {
    event: CloudEvent,
    origin: Origin,
}

/// Where an event comes from, and what its log line tells.
enum Origin {
    Image {
        image: Box<Image>,
        about: About,
        labels: Vec<String>,
        key: String,
    },
    Deletion(Job),
}

impl Origin {
    fn job(&self) -> &Job {
        match self {
            Origin::Image { image, .. } => &image.job,
            Origin::Deletion(job) => job,
        }
    }

    fn into_job(self) -> Job {
        match self {
            Origin::Image { image, .. } => image.job,
            Origin::Deletion(job) => job,
        }
    }
}

pub(super) async fn run(
    shared: Arc<Shared>,
    arrivals: mpsc::Receiver<ToStore>,
    to_publish: mpsc::Sender<Outgoing>,
) {
    let workers = shared.settings.stores;
    stage(arrivals, workers, move |arrival: ToStore| {
        let (shared, to_publish) = (shared.clone(), to_publish.clone());
        async move {
            let outgoing = match arrival {
                ToStore::Vector(embedded) => {
                    shared.metrics.leaves(Stage::Store);
                    store(&shared, *embedded).await
                }
                ToStore::Deletion(deletion) => delete(&shared, *deletion).await,
            };
            if let Some(outgoing) = outgoing {
                shared.metrics.waits(Stage::Publish);
                let _ = to_publish.send(outgoing).await;
            }
        }
    })
    .await;
}

/// Writes the vector and makes the event.
async fn store(shared: &Arc<Shared>, embedded: Embedded) -> Option<Outgoing> {
    let Embedded {
        mut image,
        vector: values,
        about,
    } = embedded;
    if !image.job.ticket.is_ours() {
        return None;
    }
    let model = shared
        .model()
        .await
        .or_else(|| shared.model.borrow().clone())?;
    let started = Instant::now();
    if let Some(position) = values.iter().position(|value| !value.is_finite()) {
        let message = format!(
            "the model's answer for {} is not finite at position {position}",
            image.job.object
        );
        let error = TaskError::permanent(Stage::Infer, Cause::NotFinite, message);
        image.job.fail(shared, error);
        return None;
    }
    let key = vector::key(
        &shared.settings.cache_prefix,
        &image.job.object,
        &about.version,
        &model.name,
    );
    let vectors = &shared.services.vectors;
    let body = vector::to_json(&values);
    let stored = vectors
        .put(&key, &image.job.object, &model.name, body)
        .await;
    image.times.store = milliseconds(started);
    shared.metrics.did(Stage::Store, started.elapsed());
    if let Err(error) = stored {
        let error = TaskError::of_call(Stage::Store, &error);
        image.job.fail(shared, error);
        return None;
    }
    // A deletion that came before the vector was there did not find it.
    match forget_if_gone(shared, &image.job.object, &model.name).await {
        Ok(false) => {}
        Ok(true) => {
            tracing::info!(object = image.job.object, "deleted while it was in work");
            image.job.ticket.finish();
            return None;
        }
        Err(error) => {
            image
                .job
                .fail(shared, TaskError::of_call(Stage::Store, &error));
            return None;
        }
    }
    shared.metrics.stored();
    let labels = model
        .labels
        .as_ref()
        .map(|labels_of| labels_of(&values))
        .unwrap_or_default();
    let event = match &image.subject {
        Subject::Event(event) => event.as_ref().clone(),
        Subject::Object(object) => object.to_event(about.kind),
    };
    let embedding = Embedding {
        vectors: S3Url::new(vectors.bucket(), &key).to_string(),
        model: model.name.clone(),
        dimensions: values.len(),
    };
    match fit(shared, &model, event, &embedding, &labels).await {
        Ok(event) => Some(Outgoing {
            event,
            origin: Origin::Image {
                image: Box::new(image),
                about,
                labels,
                key,
            },
        }),
        Err(error) => {
            image.job.fail(shared, error);
            None
        }
    }
}

/// Deletes the vectors of a document in S3 if it is gone; answers whether it is.
pub(super) async fn forget_if_gone(
    shared: &Shared,
    url: &str,
    model: &str,
) -> Result<bool, platform::aws::Error> {
    let is_gone = is_gone(shared, url).await? == Some(true);
    if is_gone {
        shared.services.vectors.delete_document(url, model).await?;
    }
    Ok(is_gone)
}

/// Whether a document in S3 is gone; `None` of any other.
async fn is_gone(shared: &Shared, url: &str) -> Result<Option<bool>, platform::aws::Error> {
    let Ok(url) = url.parse::<S3Url>() else {
        return Ok(None);
    };
    let presence = shared.services.vectors.presence(&url).await?;
    Ok(Some(presence != Presence::Live))
}

/// The event, in a form that every output takes: with the labels if it fits,
/// without them otherwise. An event that does not fit either way is kept in
/// the cache bucket, and the message is rejected with its place: nothing of
/// the work is lost, and a person can pass it on.
async fn fit(
    shared: &Shared,
    model: &ModelInfo,
    event: CloudEvent,
    embedding: &Embedding,
    labels: &[String],
) -> Result<CloudEvent, TaskError> {
    let outputs = &shared.services.outputs;
    let full = event.clone().with_embedding(embedding, labels, Map::new());
    if outputs.check_size(&full).is_ok() {
        return Ok(full);
    }
    let slim = event.with_embedding(embedding, &[], Map::new());
    let Err(problem) = outputs.check_size(&slim) else {
        tracing::warn!(
            object = slim.data.document.url,
            "the event is too large with its labels, sent without them"
        );
        return Ok(slim);
    };
    let vectors = &shared.services.vectors;
    let url = &full.data.document.url;
    let body = full.to_json().into_bytes();
    let name = hex::encode(&Sha256::digest(&body)[..8]);
    let prefix = shared.settings.cache_prefix.trim_matches('/');
    let key = format!("{prefix}/{OVERSIZE_FOLDER}/{name}.json");
    vectors
        .put(&key, url, &model.name, body)
        .await
        .map_err(|error| TaskError::of_call(Stage::Store, &error))?;
    let place = S3Url::new(vectors.bucket(), &key).to_string();
    Err(TaskError {
        event: Some(place.clone()),
        ..TaskError::permanent(
            Stage::Publish,
            Cause::EventTooLarge,
            format!("{problem}; the vector is stored, and the finished event lies at {place}"),
        )
    })
}

async fn delete(shared: &Arc<Shared>, deletion: Deletion) -> Option<Outgoing> {
    let Deletion { job, event } = deletion;
    if !job.ticket.is_ours() {
        return None;
    }
    let model = shared.model().await?;
    let started = Instant::now();
    match is_gone(shared, &job.object).await {
        Ok(Some(false)) => {
            tracing::info!(
                object = job.object,
                "the object exists: its deletion is no longer true"
            );
            job.ticket.finish();
            return None;
        }
        // Of what is not in S3 the sender's word is taken.
        Ok(_) => {}
        Err(error) => {
            job.fail(shared, TaskError::of_call(Stage::Store, &error));
            return None;
        }
    }
    let deleted = shared
        .services
        .vectors
        .delete_document(&job.object, &model.name)
        .await;
    shared.metrics.did(Stage::Store, started.elapsed());
    match deleted {
        Err(error) => {
            job.fail(shared, TaskError::of_call(Stage::Store, &error));
            None
        }
        Ok(vectors) => {
            tracing::info!(
                object = job.object,
                vectors,
                "document deleted, vectors deleted"
            );
            let Some(event) = event else {
                job.ticket.finish();
                return None;
            };
            Some(Outgoing {
                event: event.passed_here(),
                origin: Origin::Deletion(job),
            })
        }
    }
}

/// Sends events, as many as one request takes, several requests at a time.
pub(super) async fn publish(shared: Arc<Shared>, mut arrivals: mpsc::Receiver<Outgoing>) {
    let slots = Arc::new(Semaphore::new(PUBLISHES));
    loop {
        let slot = slots.clone().acquire_owned().await;
        let may_come = || shared.metrics.images_in_work();
        let Some(outgoing) = gather(|context| arrivals.poll_recv(context), may_come, LINGER).await
        else {
            return;
        };
        let shared = shared.clone();
        tokio::spawn(async move {
            publish_all(&shared, outgoing).await;
            drop(slot);
        });
    }
}

async fn publish_all(shared: &Shared, outgoing: Vec<Outgoing>) {
    let mut events = Vec::with_capacity(outgoing.len());
    let mut origins = Vec::with_capacity(outgoing.len());
    for Outgoing { event, origin } in outgoing {
        shared.metrics.leaves(Stage::Publish);
        // Whoever holds the message now publishes it.
        if origin.job().ticket.is_ours() {
            events.push(event);
            origins.push(origin);
        }
    }
    if events.is_empty() {
        return;
    }
    let started = Instant::now();
    let results = shared.services.outputs.publish(&events).await;
    let time = started.elapsed();
    for (origin, result) in origins.into_iter().zip(results) {
        shared.metrics.did(Stage::Publish, time);
        match result {
            Ok(()) => finish(shared, origin, milliseconds(started)),
            Err(error) => origin.into_job().fail(shared, publish_error(error)),
        }
    }
}

fn publish_error(error: PublishError) -> TaskError {
    let message = error.to_string();
    let cause = match &error {
        PublishError::TooLarge { .. } => Cause::EventTooLarge,
        PublishError::Refused { .. } => Cause::Refused,
        PublishError::Unavailable { error, .. } => Cause::from(error),
    };
    TaskError {
        failure: error.failure(),
        ..TaskError::permanent(Stage::Publish, cause, message)
    }
}

fn finish(shared: &Shared, origin: Origin, publish: f64) {
    shared.ending.count_refusals(None);
    if let Origin::Image {
        image,
        about,
        labels,
        key,
    } = &origin
    {
        shared.metrics.image_done();
        let most = shared.settings.image_lines_per_second;
        if shared.metrics.may_log_image(most) {
            log_image(image, about, labels, key, publish);
        }
    }
    origin.into_job().ticket.finish();
}

/// The line that a person or the demo follows the work by.
fn log_image(image: &Image, about: &About, labels: &[String], key: &str, publish: f64) {
    let Times {
        download,
        decode,
        batch,
        infer,
        store,
    } = image.times;
    let rounded = |milliseconds: f64| (milliseconds * 10.0).round() / 10.0;
    tracing::info!(
        object = image.job.object,
        "type" = about.kind.mime(),
        width = about.size.width,
        height = about.size.height,
        labels = labels.join(", "),
        vector = key,
        download_ms = rounded(download),
        decode_ms = rounded(decode),
        batch_ms = rounded(batch),
        infer_ms = rounded(infer),
        store_ms = rounded(store),
        publish_ms = rounded(publish),
        total_ms = rounded(milliseconds(image.job.ticket.message().received)),
        "image embedded"
    );
}
