//! Which objects have their vector already.
//!
//! The vector's key *is* a 64-bit number (16 hex digits), so one listing of
//! the cache becomes a sorted table of 8 bytes per vector, and every object
//! costs a search in memory. A listing request tells of 1,000 vectors; a HEAD
//! request of one, at a fraction of that price only: ten million objects are
//! 10,000 requests or ten million. So listing is the default, and asking for
//! each object is what remains when the cache has more vectors than the table
//! may hold, or when few objects meet a huge cache (`--embedded-check head`).

use async_trait::async_trait;
use aws_sdk_s3::Client;
use events::S3Url;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use platform::aws::{self, ErrorKind};

/// Vectors that the table holds at most: 8 bytes each, so 256 MiB (and, while
/// it grows, half as much again).
pub const MAX_TABLE: usize = 32 << 20;

/// HEAD requests at the same time.
const CONCURRENT_HEADS: usize = 32;

/// Tells which vectors exist.
#[async_trait]
pub trait Vectors: Send + Sync {
    /// One answer per key.
    async fn exist(&self, keys: &[String]) -> Result<Vec<bool>, aws::Error>;
}

/// All vectors of a cache, as the numbers that their keys are.
pub struct Table {
    sorted: Vec<u64>,
}

impl Table {
    /// Lists the cache, in sixteen parts at once: the keys are digests, so
    /// the parts are of equal size. `None` when there are more than `max`.
    pub async fn list(
        s3: &Client,
        bucket: &str,
        prefix: &str,
        max: usize,
    ) -> Result<Option<Self>, aws::Error> {
        let folder = format!("{}/", prefix.trim_matches('/'));
        let parts: Vec<String> = (0..16).map(|digit| format!("{folder}{digit:x}")).collect();
        let pages = parts.iter().map(|part| pages(s3, bucket, part));
        let mut pages = stream::select_all(pages.map(Box::pin));
        let mut numbers = Vec::new();
        while let Some(page) = pages.try_next().await? {
            numbers.extend(page);
            if numbers.len() > max {
                return Ok(None);
            }
        }
        Ok(Some(Self::of(numbers)))
    }

    fn of(mut numbers: Vec<u64>) -> Self {
        numbers.sort_unstable();
        numbers.dedup();
        Self { sorted: numbers }
    }

    pub fn len(&self) -> usize {
        self.sorted.len()
    }
}

fn pages<'a>(
    s3: &'a Client,
    bucket: &'a str,
    part: &'a str,
) -> impl stream::Stream<Item = Result<Vec<u64>, aws::Error>> + 'a {
    let request = s3.list_objects_v2().bucket(bucket).prefix(part);
    let paginator = request.into_paginator().send();
    stream::unfold(paginator, move |mut paginator| async move {
        let page = paginator.next().await?;
        let numbers = match page {
            Ok(page) => {
                let keys = page.contents().iter().filter_map(|object| object.key());
                Ok(keys.filter_map(number_of).collect())
            }
            Err(error) => {
                let place = S3Url::new(bucket, part).to_string();
                Err(aws::Error::from_sdk("s3:ListObjectsV2", &error).of(place))
            }
        };
        Some((numbers, paginator))
    })
}

/// The number that a vector's key is; `None` for any other object.
fn number_of(key: &str) -> Option<u64> {
    let name = key.rsplit('/').next()?.strip_suffix(".json")?;
    let is_digest = name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_digest.then(|| u64::from_str_radix(name, 16).ok())?
}

#[async_trait]
impl Vectors for Table {
    async fn exist(&self, keys: &[String]) -> Result<Vec<bool>, aws::Error> {
        let is_there = |key: &String| {
            number_of(key).is_some_and(|number| self.sorted.binary_search(&number).is_ok())
        };
        Ok(keys.iter().map(is_there).collect())
    }
}

pub struct Heads {
    pub s3: Client,
    pub bucket: String,
}

#[async_trait]
impl Vectors for Heads {
    async fn exist(&self, keys: &[String]) -> Result<Vec<bool>, aws::Error> {
        let asked = keys.iter().cloned().map(|key| self.exists(key));
        stream::iter(asked)
            .buffered(CONCURRENT_HEADS)
            .try_collect()
            .await
    }
}

impl Heads {
    async fn exists(&self, key: String) -> Result<bool, aws::Error> {
        let head = self.s3.head_object().bucket(&self.bucket).key(&key);
        match head.send().await.map_err(aws::failed("s3:HeadObject")) {
            Ok(_) => Ok(true),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error.of(S3Url::new(&self.bucket, &key).to_string())),
        }
    }
}

pub struct Unknown;

#[async_trait]
impl Vectors for Unknown {
    async fn exist(&self, keys: &[String]) -> Result<Vec<bool>, aws::Error> {
        Ok(vec![false; keys.len()])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use events::vector;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_vectors_key_is_a_number(url in "s3://[a-z]{3,9}/.{2,30}", etag in "[0-9a-f-]{1,36}") {
            for prefix in [vector::DEFAULT_PREFIX, "deep/er/", ""] {
                let key = vector::key(prefix, &url, &etag, "ViT-B/32");
                let number = number_of(&key).expect("a number");
                let name = format!("{number:016x}.json");
                prop_assert!(key.ends_with(&name));
            }
        }
    }

    #[test]
    fn what_is_no_vector_is_no_number() {
        for key in [
            "clip-image-processor/readme.txt",
            "clip-image-processor/+123456789012345.json",
            "clip-image-processor/12345678901234567.json",
            "clip-image-processor/1234567890abcdef",
        ] {
            assert_eq!(number_of(key), None, "{key}");
        }
    }

    #[tokio::test]
    async fn the_table_finds_what_it_holds_and_nothing_else() {
        let key = |name: &str| vector::key("p", name, "etag", "ViT-B/32");
        let held: Vec<String> = (0..1_000)
            .map(|index| key(&format!("held-{index}")))
            .collect();
        let numbers = held.iter().filter_map(|key| number_of(key)).collect();
        let table = Table::of(numbers);
        assert_eq!(table.len(), 1_000);
        assert!(table.exist(&held).await.unwrap().into_iter().all(|is| is));
        let others: Vec<String> = (0..1_000)
            .map(|index| key(&format!("new-{index}")))
            .collect();
        assert!(!table.exist(&others).await.unwrap().into_iter().any(|is| is));
    }
}
