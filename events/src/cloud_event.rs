//! The CloudEvent of Lakechain's middlewares, as strict as their SDK (0.10.0)
//! but for what is listed here.
//!
//! Let through, which the SDK rejects: attributes of `properties` that are not
//! what their kind prescribes (each middleware knows its own, and a vector is
//! not refused for another's; `embeddings` is written anew); a text that is a
//! URL by its beginning alone, in `image` and in the publisher's.
//!
//! Rejected, which the SDK lets through: what JSON may not say in UTF-8 (half
//! a surrogate pair) or says more than 127 levels deep; `data` or a document
//! as JSON inside a string. None of its middlewares writes any of these.
//!
//! A key keeps its `/../`: it names an object of S3, and the SDK's URL another.
//!
//! Unknown keys are dropped where the SDK drops them at its next hop, but in
//! attributes and in the publisher, which pass as they are.

use chrono::{SecondsFormat, Utc};
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Number, Value, json};
use serde_with::skip_serializing_none;
use uuid::Uuid;

use crate::{ImageType, S3Url};

/// This middleware's name, which goes to the front of `data.callStack`.
pub const SERVICE: &str = "clip-image-processor";

/// What happened to the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum EventType {
    /// A document was created or overwritten.
    #[serde(rename = "document-created")]
    DocumentCreated,
    /// A document was deleted.
    #[serde(rename = "document-deleted")]
    DocumentDeleted,
}

impl EventType {
    /// The type as the event carries it.
    pub const fn name(self) -> &'static str {
        match self {
            EventType::DocumentCreated => "document-created",
            EventType::DocumentDeleted => "document-deleted",
        }
    }
}

/// Why an event is not one that Lakechain's middlewares accept.
#[derive(Debug, thiserror::Error)]
#[error("not a valid CloudEvent: {0}")]
pub struct EventError(#[from] serde_json::Error);

/// The envelope. No other key is allowed at this level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudEvent {
    /// Version of the CloudEvents specification.
    #[serde(default = "spec_version")]
    pub specversion: String,
    /// Identifies the event.
    #[serde(default = "fresh_id")]
    pub id: String,
    /// What happened.
    #[serde(rename = "type")]
    pub kind: EventType,
    /// When it happened, RFC 3339.
    #[serde(default = "now")]
    pub time: String,
    /// The document and all that is known of it.
    pub data: Data,
}

fn spec_version() -> String {
    "1.0".to_owned()
}

fn fresh_id() -> String {
    Uuid::new_v4().to_string()
}

fn now() -> String {
    Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// The data of an event. Unknown keys are accepted and dropped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Data {
    /// Identifies the chain of events that began with one source document.
    #[serde(deserialize_with = "uuid_text")]
    pub chain_id: String,
    /// The document that began the chain.
    #[serde(deserialize_with = "without_nulls")]
    pub source: Document,
    /// The document that this event is about.
    #[serde(deserialize_with = "without_nulls")]
    pub document: Document,
    /// What the middlewares so far have found out.
    #[serde(default, deserialize_with = "without_nulls")]
    pub metadata: Metadata,
    /// The middlewares that the event passed, most recent first.
    #[serde(default)]
    pub call_stack: Vec<String>,
}

/// A reference to a document. No other key is allowed.
#[skip_serializing_none]
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// Where it is: `s3://bucket/key` or `https://…`.
    #[serde(deserialize_with = "document_url")]
    pub url: String,
    /// Its MIME type.
    #[serde(rename = "type")]
    pub mime_type: String,
    /// Its size in bytes.
    pub size: Option<Number>,
    /// Its ETag, without quotes.
    pub etag: Option<String>,
}

/// What is known of a document. No other key is allowed; what each holds is
/// the business of the middleware that wrote it, so most pass through as they
/// are.
#[skip_serializing_none]
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
#[allow(missing_docs)] // The names are the contract's own.
pub struct Metadata {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub created_at: Option<String>,
    pub updated_at: Option<String>,
    #[serde(deserialize_with = "checked::<_, Link>")]
    pub image: Option<Value>,
    pub authors: Option<Vec<String>>,
    #[serde(deserialize_with = "checked::<_, Publisher>")]
    pub publisher: Option<Value>,
    pub title: Option<String>,
    pub description: Option<String>,
    pub keywords: Option<Vec<String>>,
    pub topics: Option<Vec<String>>,
    #[serde(default, deserialize_with = "rating")]
    pub rating: Option<Number>,
    pub language: Option<String>,
    #[serde(deserialize_with = "checked::<_, DocumentUrl>")]
    pub ontology: Option<Value>,
    pub custom: Option<Map<String, Value>>,
    #[serde(deserialize_with = "some_object")]
    pub properties: Option<Properties>,
}

/// What a publisher has to be.
#[derive(Deserialize)]
struct Publisher(
    #[serde(deserialize_with = "without_nulls")]
    #[allow(dead_code)]
    PublisherFields,
);

#[derive(Deserialize)]
#[allow(dead_code)] // Only looked at.
struct PublisherFields {
    #[serde(rename = "type")]
    kind: Option<String>,
    name: String,
    url: Option<Link>,
    logo: Option<Link>,
}

/// A text that begins as a URL.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Link;

impl TryFrom<String> for Link {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_url = text.split_once(':').is_some_and(|(scheme, rest)| {
            scheme.starts_with(|first: char| first.is_ascii_alphabetic()) && !rest.is_empty()
        });
        is_url
            .then_some(Self)
            .ok_or_else(|| format!("{text:?} is no URL"))
    }
}

/// The URL of a document or another object that a middleware will read.
#[derive(Deserialize)]
struct DocumentUrl(
    #[serde(deserialize_with = "document_url")]
    #[allow(dead_code)]
    String,
);

/// Attributes by the kind of document. Other keys are dropped at the next hop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Properties {
    /// `image`, `text`, `video` or `audio`.
    #[serde(deserialize_with = "property_kind")]
    pub kind: String,
    /// The attributes.
    #[serde(default)]
    pub attrs: Map<String, Value>,
}

/// The pointer to a vector that this middleware adds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Embedding {
    /// URL of the JSON array of numbers.
    pub vectors: String,
    /// The model's name, `ViT-B/32` and so on.
    pub model: String,
    /// The vector's length.
    pub dimensions: usize,
}

impl CloudEvent {
    /// Parses and validates an event.
    pub fn parse(body: &[u8]) -> Result<Self, EventError> {
        Ok(serde_json::from_slice(body)?)
    }

    /// Validates an event that is parsed already.
    pub fn from_value(value: Value) -> Result<Self, EventError> {
        Ok(serde_json::from_value(value)?)
    }

    /// A fresh event for a document, with an id and a chain of its own.
    pub fn new(kind: EventType, document: Document) -> Self {
        Self {
            specversion: spec_version(),
            id: fresh_id(),
            kind,
            time: now(),
            data: Data {
                chain_id: fresh_id(),
                source: document.clone(),
                document,
                metadata: Metadata::default(),
                call_stack: Vec::new(),
            },
        }
    }

    /// The event as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("an event's maps have string keys")
    }

    /// The event that goes to the next middleware: the same, with the pointer
    /// to its vector and the keywords merged into what is there, and this
    /// middleware at the front of the call stack.
    ///
    /// `details` goes under `metadata.properties.attrs.custom.clip`, one of
    /// the few places that every later middleware passes on; empty adds
    /// nothing.
    pub fn with_embedding(
        mut self,
        embedding: &Embedding,
        keywords: &[String],
        details: Map<String, Value>,
    ) -> Self {
        let properties = self
            .data
            .metadata
            .properties
            .get_or_insert_with(|| Properties {
                kind: String::new(),
                attrs: Map::new(),
            });
        // Three of the four vector stores throw on any other kind.
        properties.kind = "text".to_owned();
        properties.attrs.insert(
            "embeddings".to_owned(),
            json!({
                "vectors": embedding.vectors,
                "model": embedding.model,
                "dimensions": embedding.dimensions,
            }),
        );
        if !details.is_empty() {
            let custom = properties
                .attrs
                .entry("custom")
                .or_insert_with(|| json!({}));
            if !custom.is_object() {
                *custom = json!({});
            }
            custom["clip"] = Value::Object(details);
        }
        if !keywords.is_empty() {
            let merged = self.data.metadata.keywords.get_or_insert_with(Vec::new);
            for keyword in keywords {
                if !merged.contains(keyword) {
                    merged.push(keyword.clone());
                }
            }
        }
        self.passed_here()
    }

    /// The event with this middleware at the front of the call stack, once:
    /// an event that is handled twice does not grow.
    pub fn passed_here(mut self) -> Self {
        let call_stack = &mut self.data.call_stack;
        if call_stack.first().map(String::as_str) != Some(SERVICE) {
            call_stack.insert(0, SERVICE.to_owned());
        }
        self
    }

    /// The standard CloudEvents 1.0 form, for an EventBridge bus: with
    /// `source`, `subject` and `datacontenttype`, which Lakechain's
    /// middlewares reject and the standard requires or recommends.
    pub fn to_standard(&self) -> Value {
        let document_url = &self.data.document.url;
        let source = match document_url.parse::<S3Url>() {
            Ok(url) => format!("s3://{}", url.bucket),
            Err(_) => SERVICE.to_owned(),
        };
        json!({
            "specversion": self.specversion,
            "id": self.id,
            "source": source,
            "type": self.kind.name(),
            "subject": document_url,
            "time": self.time,
            "datacontenttype": "application/json",
            "data": self.data,
        })
    }
}

impl Document {
    /// The supported type that the document claims to have.
    pub fn image_type(&self) -> Option<ImageType> {
        ImageType::from_mime(&self.mime_type)
    }
}

/// Anything as it is, if a `T` can be made of it.
fn checked<'de, D, T>(deserializer: D) -> Result<Option<Value>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let value = Value::deserialize(deserializer)?;
    T::deserialize(&value).map_err(D::Error::custom)?;
    Ok(Some(value))
}

fn some_object<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let map = Map::deserialize(deserializer)?;
    serde_json::from_value(map.into()).map_err(D::Error::custom)
}

/// An object (a derived reader takes an array, too) none of whose members is
/// null: the validators of the next middlewares tell "absent" from "null" and
/// reject the second.
fn without_nulls<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: DeserializeOwned,
{
    let map = Map::deserialize(deserializer)?;
    if let Some((name, _)) = map.iter().find(|(_, member)| member.is_null()) {
        return Err(D::Error::custom(format!(
            "{name} is null where a value or nothing is expected"
        )));
    }
    serde_json::from_value(map.into()).map_err(D::Error::custom)
}

fn uuid_text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    /// Length of the hyphenated form, the only one accepted.
    const HYPHENATED_LENGTH: usize = 36;
    let text = String::deserialize(deserializer)?;
    if text.len() != HYPHENATED_LENGTH || Uuid::try_parse(&text).is_err() {
        return Err(D::Error::custom(format!("chainId {text:?} is no UUID")));
    }
    Ok(text)
}

fn document_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    // As the SDK writes it: without blanks around it, the scheme in lower case.
    let (scheme, rest) = text
        .trim_matches(|each: char| each <= ' ')
        .split_once("://")
        .unwrap_or_default();
    let scheme = scheme.to_ascii_lowercase();
    let url = format!("{scheme}://{rest}");
    if scheme == "s3" {
        url.parse::<S3Url>().map_err(D::Error::custom)?;
        return Ok(url);
    }
    if scheme == "https" && !rest.is_empty() && !rest.starts_with(['/', '?', '#']) {
        return Ok(url);
    }
    Err(D::Error::custom(format!(
        "document url {text:?} is neither s3:// nor https://"
    )))
}

fn rating<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Number>, D::Error> {
    let number: Option<Number> = Option::deserialize(deserializer)?;
    match number.as_ref().and_then(Number::as_f64) {
        Some(rating) if !(1.0..=5.0).contains(&rating) => Err(D::Error::custom(format!(
            "rating {rating} is not within 1 to 5"
        ))),
        _ => Ok(number),
    }
}

fn property_kind<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let kind = String::deserialize(deserializer)?;
    if !matches!(kind.as_str(), "image" | "text" | "video" | "audio") {
        return Err(D::Error::custom(format!(
            "properties.kind {kind:?} is none of image, text, video, audio"
        )));
    }
    Ok(kind)
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    fn valid() -> Value {
        json!({
            "specversion": "1.0",
            "id": "1780d5de-fd6f-4530-98d7-82ebee85ea39",
            "type": "document-created",
            "time": "2023-10-22T13:19:10.657Z",
            "data": {
                "chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
                "source": {"url": "s3://bucket/image.png", "type": "image/png", "size": 245328, "etag": "1243"},
                "document": {"url": "s3://bucket/image.png", "type": "image/png", "size": 245328, "etag": "1243"},
                "metadata": {},
                "callStack": []
            }
        })
    }

    fn with(pointer: &str, value: Value) -> Value {
        let mut event = valid();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        event.pointer_mut(parent).unwrap()[name] = value;
        event
    }

    fn embedding() -> Embedding {
        Embedding {
            vectors: "s3://cache/clip-image-processor/45a42b35c3225085.json".to_owned(),
            model: "ViT-B/32".to_owned(),
            dimensions: 512,
        }
    }

    #[test]
    fn what_the_next_middleware_rejects_is_rejected() {
        for (pointer, value) in [
            ("/source", json!("s3")),
            ("/traceparent", json!("00-1")),
            ("/type", json!("document-moved")),
            ("/id", json!(null)),
            ("/data/chainId", json!("7")),
            ("/data/metadata", json!(null)),
            ("/data/callStack", json!("x")),
            ("/data/document/url", json!("http://example.com/a.png")),
            ("/data/document/url", json!("s3://bucket/k")),
            ("/data/document/url", json!("https:///x")),
            ("/data/document/etag", json!(null)),
            ("/data/document/size", json!("12")),
            ("/data/document/versionId", json!("v")),
            ("/data/metadata/colour", json!("red")),
            ("/data/metadata/rating", json!(6)),
            ("/data/metadata/keywords", json!(null)),
            ("/data/metadata/keywords", json!([1])),
            (
                "/data/metadata/properties",
                json!({"kind": "picture", "attrs": {}}),
            ),
        ] {
            let event = with(pointer, value.clone());
            assert!(
                CloudEvent::from_value(event).is_err(),
                "{pointer} = {value} must be rejected"
            );
        }
    }

    #[test]
    fn what_has_a_default_may_be_absent() {
        let event = CloudEvent::from_value(json!({
            "type": "document-created",
            "data": {
                "chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
                "source": {"url": "https://example.com/a.png", "type": "image/png"},
                "document": {"url": "https://example.com/a.png", "type": "image/png"},
                "later": "dropped",
            }
        }))
        .unwrap();
        assert_eq!(event.specversion, "1.0");
        assert!(Uuid::try_parse(&event.id).is_ok());
        assert!(DateTime::parse_from_rfc3339(&event.time).is_ok());
        assert!(!event.to_json().contains("later"));
    }

    #[test]
    fn the_incoming_event_is_passed_on_and_its_metadata_merged_deeply() {
        let mut incoming = with("/data/metadata/keywords", json!(["sea", "dog"]));
        incoming["data"]["metadata"]["custom"] = json!({"mine": 1});
        incoming["data"]["metadata"]["rating"] = json!(4);
        incoming["data"]["metadata"]["properties"] = json!({"kind": "image", "attrs": {"dimensions": {"width": 2}, "custom": {"other": true}}});
        incoming["data"]["callStack"] = json!(["s3-event-trigger"]);
        let keywords = ["dog".to_owned(), "boat".to_owned()];
        let details = json!({"precision": "fp16"}).as_object().cloned().unwrap();
        let event = CloudEvent::from_value(incoming.clone())
            .unwrap()
            .with_embedding(&embedding(), &keywords, details);
        let output: Value = serde_json::from_str(&event.to_json()).unwrap();
        for same in [
            "/id",
            "/time",
            "/data/chainId",
            "/data/source",
            "/data/document",
        ] {
            assert_eq!(output.pointer(same), incoming.pointer(same), "{same}");
        }
        assert_eq!(
            output["data"]["metadata"],
            json!({
                "keywords": ["sea", "dog", "boat"],
                "custom": {"mine": 1},
                "rating": 4,
                "properties": {
                    "kind": "text",
                    "attrs": {
                        "dimensions": {"width": 2},
                        "custom": {"other": true, "clip": {"precision": "fp16"}},
                        "embeddings": {
                            "vectors": "s3://cache/clip-image-processor/45a42b35c3225085.json",
                            "model": "ViT-B/32",
                            "dimensions": 512,
                        },
                    },
                },
            })
        );
        assert_eq!(
            output["data"]["callStack"],
            json!(["clip-image-processor", "s3-event-trigger"])
        );
    }

    #[test]
    fn without_labels_the_keywords_are_untouched() {
        let none =
            CloudEvent::from_value(valid())
                .unwrap()
                .with_embedding(&embedding(), &[], Map::new());
        assert_eq!(none.data.metadata.keywords, None);
        let some = CloudEvent::from_value(with("/data/metadata/keywords", json!(["a"])))
            .unwrap()
            .with_embedding(&embedding(), &[], Map::new());
        assert_eq!(some.data.metadata.keywords, Some(vec!["a".to_owned()]));
    }

    #[test]
    fn the_output_is_itself_valid_input_and_handling_it_again_changes_nothing() {
        let once = CloudEvent::from_value(valid()).unwrap().with_embedding(
            &embedding(),
            &["dog".to_owned()],
            Map::new(),
        );
        let again = CloudEvent::parse(once.to_json().as_bytes())
            .unwrap()
            .with_embedding(&embedding(), &["dog".to_owned()], Map::new());
        assert_eq!(once, again);
    }

    #[test]
    fn the_standard_form_has_what_cloudevents_requires() {
        let standard = CloudEvent::from_value(valid()).unwrap().to_standard();
        for required in ["specversion", "id", "source", "type"] {
            assert!(
                standard[required]
                    .as_str()
                    .is_some_and(|text| !text.is_empty()),
                "{required}"
            );
        }
        assert_eq!(standard["source"], "s3://bucket");
        assert_eq!(standard["subject"], "s3://bucket/image.png");
        assert_eq!(standard["datacontenttype"], "application/json");
    }
}
