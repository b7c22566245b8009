//! What a backfill is asked to do, and which objects it wants.

use chrono::{DateTime, Utc};
use clap::Args;
use events::{CloudEvent, EventType, ImageType, S3Object, S3Url, vector};
use serde::{Deserialize, Serialize};
use uuid::{Uuid, uuid};

use super::counts::Skip;
use crate::cli::{KNOWN_MODELS, parse_queue, parse_type};
use crate::units::{parse_date, parse_size};

/// The namespaces of the ids (version 5 UUIDs) of backfilled events and of
/// their chains. Changing one makes every later event a new one.
const EVENT_NAMESPACE: Uuid = uuid!("9d1c0a52-6c0e-4f0b-8b53-0d6f4a1c7e21");
const CHAIN_NAMESPACE: Uuid = uuid!("f3a7b8de-2f5b-4f0e-9a6f-5b8e2c9d1a47");

/// Storage classes whose objects cannot be read before they are restored.
const ARCHIVE_CLASSES: [&str; 2] = ["GLACIER", "DEEP_ARCHIVE"];

/// Everything that decides which objects go where. Two runs share a
/// checkpoint only when all of it is equal.
#[derive(Args, Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Job {
    #[arg(skip)]
    pub bucket: String,
    /// What the keys begin with.
    #[arg(skip)]
    pub prefix: String,
    /// The S3 Inventory manifest that is read instead of listing the bucket.
    #[arg(skip)]
    pub manifest: Option<String>,
    /// URL of the input queue.
    #[arg(long, env = "INPUT_QUEUE_URL", value_name = "URL", value_parser = parse_queue)]
    pub queue: String,
    /// The bucket that holds the vectors.
    #[arg(long, env = "CACHE_BUCKET", value_name = "BUCKET")]
    pub cache_bucket: String,
    /// What the vectors' keys begin with.
    #[arg(long, env = "CACHE_PREFIX", value_name = "PREFIX", default_value = vector::DEFAULT_PREFIX)]
    pub cache_prefix: String,
    /// The model whose vectors count.
    #[arg(long, env = "MODEL_NAME", value_parser = KNOWN_MODELS, default_value = KNOWN_MODELS[0])]
    pub model: String,
    /// Wanted types by extension, as in `png,jpeg` [default: all seven].
    #[arg(long, value_delimiter = ',', value_parser = parse_type)]
    pub types: Vec<ImageType>,
    /// Leave out smaller objects (500, 10kB, 5MiB).
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1")]
    pub min_size: u64,
    /// Leave out larger objects.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_size: Option<u64>,
    /// Only objects modified then or later (2026-01-31, or with a time).
    #[arg(long, value_name = "DATE", value_parser = parse_date)]
    pub since: Option<DateTime<Utc>>,
    /// Only objects modified before.
    #[arg(long, value_name = "DATE", value_parser = parse_date)]
    pub until: Option<DateTime<Utc>>,
    /// Also objects of the archive storage classes, which must be restored.
    #[arg(long)]
    pub include_archived: bool,
}

/// An object as a listing or an inventory tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub key: String,
    /// Its ETag without quotes.
    pub etag: String,
    pub size: Option<u64>,
    pub last_modified: Option<DateTime<Utc>>,
    pub storage_class: Option<String>,
    /// Whether it is the current version, and no delete marker.
    pub is_current: bool,
}

/// An object that is to be enqueued unless it has its vector already.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub event: CloudEvent,
    pub id: Uuid,
    pub vector_key: String,
    pub size: u64,
}

impl Job {
    /// Decides by what is told of the object alone; nothing is read.
    pub fn decide(&self, object: &Object) -> Result<Wanted, Skip> {
        if !object.is_current {
            return Err(Skip::NotCurrent);
        }
        let image_type = ImageType::from_name(&object.key).ok_or(Skip::NoImageByName)?;
        if !self.types.contains(&image_type) {
            return Err(Skip::OtherType);
        }
        let storage_class = object.storage_class.as_deref().unwrap_or_default();
        if !self.include_archived && ARCHIVE_CLASSES.contains(&storage_class) {
            return Err(Skip::Archived);
        }
        if let Some(size) = object.size {
            if size < self.min_size {
                return Err(Skip::TooSmall);
            }
            if self.max_size.is_some_and(|largest| size > largest) {
                return Err(Skip::TooLarge);
            }
        }
        if let Some(modified) = object.last_modified {
            if self.since.is_some_and(|since| modified < since) {
                return Err(Skip::TooOld);
            }
            if self.until.is_some_and(|until| modified >= until) {
                return Err(Skip::TooNew);
            }
        }
        let url = S3Url::new(&self.bucket, &object.key);
        let url_text = url.to_string();
        // A key that the next middlewares' validators refuse (one character).
        if url_text.parse::<S3Url>().is_err() {
            return Err(Skip::NoImageByName);
        }
        let s3_object = S3Object {
            url,
            kind: EventType::DocumentCreated,
            size: object.size,
            etag: Some(object.etag.clone()),
            version_id: None,
            is_version_removal: false,
        };
        let id = event_id(EVENT_NAMESPACE, &url_text, &object.etag, &self.model);
        let mut event = s3_object.to_event(image_type);
        event.id = id.to_string();
        event.data.chain_id =
            event_id(CHAIN_NAMESPACE, &url_text, &object.etag, &self.model).to_string();
        Ok(Wanted {
            vector_key: vector::key(&self.cache_prefix, &url_text, &object.etag, &self.model),
            size: object.size.unwrap_or(0),
            event,
            id,
        })
    }
}

/// The same object version and model always get the same id, so that an event
/// that is sent twice can be recognised. A zero byte, which no part holds,
/// keeps the parts apart.
fn event_id(namespace: Uuid, url: &str, etag: &str, model: &str) -> Uuid {
    let name = [url, etag, model].join("\0");
    Uuid::new_v5(&namespace, name.as_bytes())
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Position {
    /// A listing: every key up to this one, in the order of the keys' bytes.
    Key(String),
    /// An inventory: so many rows of the file, and all files before it.
    Row {
        /// The file's position in the manifest.
        file: usize,
        rows: u64,
    },
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn job() -> Job {
        Job {
            bucket: "photos".to_owned(),
            prefix: String::new(),
            manifest: None,
            queue: "https://sqs.eu-west-1.amazonaws.com/1/input".to_owned(),
            cache_bucket: "cache".to_owned(),
            cache_prefix: vector::DEFAULT_PREFIX.to_owned(),
            model: "ViT-B/32".to_owned(),
            types: ImageType::ALL.to_vec(),
            min_size: 1,
            max_size: None,
            since: None,
            until: None,
            include_archived: false,
        }
    }

    pub(crate) fn object(key: &str) -> Object {
        Object {
            key: key.to_owned(),
            etag: "9dd4e461268c8034f5c8564e155c67a6".to_owned(),
            size: Some(1_000),
            last_modified: Some("2026-05-01T00:00:00Z".parse().unwrap()),
            storage_class: Some("STANDARD".to_owned()),
            is_current: true,
        }
    }

    #[test]
    fn an_event_is_the_s3_triggers_with_an_id_of_its_object_version_and_model() {
        let job = job();
        let wanted = job.decide(&object("a/my photo+é.png")).unwrap();
        let event = CloudEvent::parse(wanted.event.to_json().as_bytes()).unwrap();
        let document = &event.data.document;
        assert_eq!(document.url, "s3://photos/a/my%20photo%2B%C3%A9.png");
        assert_eq!(document.mime_type, "image/png");
        assert_eq!(document.size, Some(1_000.into()));
        assert_eq!(event.data.source, event.data.document);
        assert_eq!(event.data.call_stack, ["s3-event-trigger"]);
        assert_eq!(
            wanted.vector_key,
            vector::key(
                &job.cache_prefix,
                &document.url,
                document.etag.as_ref().unwrap(),
                &job.model
            )
        );

        let again = job.decide(&object("a/my photo+é.png")).unwrap();
        assert_eq!((again.id, &again.event.id), (wanted.id, &event.id));
        assert_eq!(again.event.data.chain_id, event.data.chain_id);
        assert_ne!(event.id, event.data.chain_id);
        let mut changed = object("a/my photo+é.png");
        changed.etag = "other".to_owned();
        assert_ne!(job.decide(&changed).unwrap().id, wanted.id);
        let mut other_model = job.clone();
        other_model.model = "ViT-L/14".to_owned();
        let other = other_model.decide(&object("a/my photo+é.png")).unwrap();
        assert_ne!(other.id, wanted.id);
    }

    #[test]
    fn each_filter_has_its_own_reason() {
        let mut job = job();
        job.types = vec![ImageType::Png, ImageType::Jpeg];
        job.min_size = 10;
        job.max_size = Some(2_000);
        job.since = Some("2026-05-01T00:00:00Z".parse().unwrap());
        job.until = Some("2026-06-01T00:00:00Z".parse().unwrap());
        let decided = |change: &dyn Fn(&mut Object)| {
            let mut object = object("ab.png");
            change(&mut object);
            job.decide(&object).err()
        };
        let modified = |date: &str| Some(date.parse::<DateTime<Utc>>().unwrap());
        assert_eq!(decided(&|_| ()), None);
        assert_eq!(
            decided(&|one| one.key = "readme.txt".into()),
            Some(Skip::NoImageByName)
        );
        assert_eq!(
            decided(&|one| one.key = "folder.png/".into()),
            Some(Skip::NoImageByName)
        );
        assert_eq!(
            decided(&|one| one.key = "ab.gif".into()),
            Some(Skip::OtherType)
        );
        assert_eq!(decided(&|one| one.size = Some(9)), Some(Skip::TooSmall));
        assert_eq!(decided(&|one| one.size = Some(2_001)), Some(Skip::TooLarge));
        assert_eq!(
            decided(&|one| one.last_modified = modified("2026-04-30T23:59:59Z")),
            Some(Skip::TooOld)
        );
        assert_eq!(
            decided(&|one| one.last_modified = modified("2026-06-01T00:00:00Z")),
            Some(Skip::TooNew)
        );
        assert_eq!(
            decided(&|one| one.storage_class = Some("DEEP_ARCHIVE".into())),
            Some(Skip::Archived)
        );
        assert_eq!(
            decided(&|one| one.is_current = false),
            Some(Skip::NotCurrent)
        );
    }
}
