//! Where the vector of a document lies in the cache bucket.
//!
//! `<prefix>/<16 hex digits>.json`. The first eight digits come from the
//! document's URL, the last eight from its URL, version and model: two models
//! or two versions never overwrite each other, the same version always gets
//! the same key, and all vectors of a URL share a prefix, so that a deletion,
//! which knows the URL alone, finds them. Eight digits are shared by chance
//! now and then, so whoever deletes must compare [`DOCUMENT_METADATA`] first.

use sha2::{Digest, Sha256};

/// The default prefix, which is the product page's.
pub const DEFAULT_PREFIX: &str = "clip-image-processor";

/// Name of the user metadata (`x-amz-meta-…`) of a vector that holds the URL
/// of its document.
pub const DOCUMENT_METADATA: &str = "document-url";

/// Name of the user metadata of a vector that holds the model's name.
pub const MODEL_METADATA: &str = "clip-model";

/// The content type of a vector.
pub const CONTENT_TYPE: &str = "application/json";

/// The key of the vector of `document_url` in its version `version` (the
/// ETag, or the S3 version where there is one) for `model`.
pub fn key(prefix: &str, document_url: &str, version: &str, model: &str) -> String {
    let version = version.trim_matches('"');
    let rest = digits(&[document_url, version, model]);
    format!("{}{rest}.json", document_prefix(prefix, document_url))
}

/// What the keys of all vectors of a document begin with.
pub fn document_prefix(prefix: &str, document_url: &str) -> String {
    format!("{}/{}", prefix.trim_matches('/'), digits(&[document_url]))
}

/// The vector's body: a bare JSON array of numbers, shortest form that reads
/// back as the same 32-bit float. A value that JSON cannot express (NaN,
/// infinity) has no place in a vector; the caller checks for it.
pub fn to_json(vector: &[f32]) -> Vec<u8> {
    let mut body = Vec::with_capacity(vector.len() * 14 + 2);
    body.push(b'[');
    for (index, value) in vector.iter().enumerate() {
        if index > 0 {
            body.push(b',');
        }
        // serde_json writes the shortest decimal that reads back equal.
        serde_json::to_writer(&mut body, value).expect("writing to memory does not fail");
    }
    body.push(b']');
    body
}

/// Eight hex digits of the SHA-256 of the parts. A zero byte, which no part
/// holds, keeps `("ab", "c")` and `("a", "bc")` apart.
fn digits(parts: &[&str]) -> String {
    let mut hasher = Sha256::new();
    for part in parts {
        hasher.update(part.as_bytes());
        hasher.update([0]);
    }
    hex::encode(&hasher.finalize()[..4])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const URL: &str = "s3://bucket/image.png";

    #[test]
    fn a_key_has_the_product_pages_form() {
        let key = key(
            DEFAULT_PREFIX,
            URL,
            "1243cbd6cf145453c8b5519a2ada4779",
            "ViT-B/32",
        );
        let name = key
            .strip_prefix("clip-image-processor/")
            .and_then(|rest| rest.strip_suffix(".json"))
            .unwrap();
        assert_eq!(name.len(), 16);
        assert!(name.bytes().all(|byte| byte.is_ascii_hexdigit()), "{name}");
        assert!(key.starts_with(&document_prefix(DEFAULT_PREFIX, URL)));
    }

    #[test]
    fn models_versions_and_documents_do_not_share_a_key() {
        let base = key("p", URL, "etag", "ViT-B/32");
        assert_ne!(base, key("p", URL, "etag", "ViT-B/16"));
        assert_ne!(base, key("p", URL, "other", "ViT-B/32"));
        assert_ne!(base, key("p", "s3://bucket/other.png", "etag", "ViT-B/32"));
    }

    #[test]
    fn the_same_version_always_gets_the_same_key_with_or_without_quotes() {
        assert_eq!(key("p", URL, "\"e\"", "m"), key("p/", URL, "e", "m"));
    }

    proptest! {
        #[test]
        fn a_vector_reads_back_bit_for_bit(
            vector in proptest::collection::vec(-1e3f32..1e3, 1..64)
        ) {
            let read: Vec<f32> = serde_json::from_slice(&to_json(&vector)).unwrap();
            prop_assert_eq!(read, vector);
        }
    }
}
