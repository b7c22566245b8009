//! Where the objects come from: an S3 Inventory in CSV.
//!
//! Form: "Locating your inventory list" and "Amazon S3 Inventory list" in the
//! S3 user guide. The rows are in no order, so the position is a row's number.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom, Write};

use anyhow::{Context, bail};
use async_trait::async_trait;
use aws_sdk_s3::Client;
use chrono::{DateTime, Utc};
use csv::StringRecord;
use events::{S3Url, decode_notification_key};
use flate2::read::MultiGzDecoder;
use platform::aws;
use serde::Deserialize;

use super::job::{Job, Object, Position};
use super::source::{Entry, Source, SourceError};

/// Rows of a page: as many as a page of a listing has.
const PAGE_ROWS: usize = 1_000;

/// Bytes of a manifest at most; a real one names some thousand files.
const MAX_MANIFEST_BYTES: usize = 64 << 20;

/// Tries of one file of the inventory. The SDK retries the request, not a
/// body that breaks off in the middle.
const DOWNLOAD_TRIES: u32 = 3;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    source_bucket: String,
    destination_bucket: String,
    file_format: String,
    file_schema: String,
    files: Vec<ManifestFile>,
}

#[derive(Deserialize)]
struct ManifestFile {
    key: String,
}

/// A row, by the names of its columns in lower case.
#[derive(Deserialize)]
struct Row {
    key: String,
    etag: String,
    size: Option<u64>,
    #[serde(rename = "lastmodifieddate")]
    last_modified: Option<DateTime<Utc>>,
    #[serde(rename = "storageclass")]
    storage_class: Option<String>,
    #[serde(rename = "islatest", default)]
    is_latest: String,
    #[serde(rename = "isdeletemarker", default)]
    is_delete_marker: String,
}

/// The names of the columns in lower case, if those are there that the job needs.
fn columns(schema: &str, job: &Job) -> anyhow::Result<StringRecord> {
    let names: Vec<String> = schema
        .split(',')
        .map(|name| name.trim().to_lowercase())
        .collect();
    let has_size_filter = job.max_size.is_some() || job.min_size > 1;
    let has_date_filter = job.since.is_some() || job.until.is_some();
    for (is_needed, name, what) in [
        (true, "Key", "a backfill"),
        (true, "ETag", "the look-up of vectors"),
        (has_size_filter, "Size", "--min-size or --max-size"),
        (has_date_filter, "LastModifiedDate", "--since or --until"),
    ] {
        if is_needed && !names.contains(&name.to_lowercase()) {
            bail!(
                "it has no column {name}, which {what} needs: \
                 add it to the inventory's optional fields"
            );
        }
    }
    Ok(StringRecord::from(names))
}

fn object(row: &StringRecord, columns: &StringRecord) -> anyhow::Result<Object> {
    if row.len() != columns.len() {
        let (has, named) = (row.len(), columns.len());
        bail!("it has {has} columns, the manifest names {named}");
    }
    let row: Row = row.deserialize(Some(columns))?;
    let is_old = row.is_latest.eq_ignore_ascii_case("false");
    let is_delete_marker = row.is_delete_marker.eq_ignore_ascii_case("true");
    Ok(Object {
        key: decode_notification_key(&row.key)?,
        etag: row.etag.trim_matches('"').to_owned(),
        size: row.size,
        last_modified: row.last_modified,
        storage_class: row.storage_class,
        is_current: !is_old && !is_delete_marker,
    })
}

pub struct Inventory {
    s3: Client,
    /// The manifest's URL, for errors.
    url: String,
    prefix: String,
    bucket: String,
    files: Vec<String>,
    columns: StringRecord,
    file: usize,
    rows: u64,
    open: Option<csv::Reader<MultiGzDecoder<BufReader<File>>>>,
}

impl Inventory {
    /// Reads the manifest, and goes on after the position.
    pub async fn open(
        s3: Client,
        manifest_bucket: &str,
        manifest_key: &str,
        job: &Job,
        position: Option<&Position>,
    ) -> Result<Self, SourceError> {
        let url = format!("s3://{manifest_bucket}/{manifest_key}");
        let unusable = |problem: anyhow::Error| SourceError::Inventory {
            manifest: url.clone(),
            problem,
        };
        let mut content = Vec::new();
        download(&s3, manifest_bucket, manifest_key, &mut |bytes| {
            content.extend_from_slice(bytes);
            if content.len() > MAX_MANIFEST_BYTES {
                bail!("a manifest has at most {MAX_MANIFEST_BYTES} bytes");
            }
            Ok(())
        })
        .await?
        .map_err(unusable)?;
        let manifest = parse_manifest(&content, job).map_err(unusable)?;
        let columns = columns(&manifest.file_schema, job).map_err(unusable)?;
        let (file, rows) = match position {
            Some(Position::Row { file, rows }) => (*file, *rows),
            _ => (0, 0),
        };
        let bucket = manifest
            .destination_bucket
            .rsplit(':')
            .next()
            .unwrap_or_default()
            .to_owned();
        Ok(Self {
            s3,
            url,
            prefix: job.prefix.clone(),
            bucket,
            files: manifest.files.into_iter().map(|file| file.key).collect(),
            columns,
            file,
            rows,
            open: None,
        })
    }

    /// Fetches the current file and skips the rows that are done. The file
    /// goes to the disk first: a walk with a low rate reads it for hours,
    /// longer than S3 keeps a connection.
    async fn fetch(&self) -> Result<csv::Reader<MultiGzDecoder<BufReader<File>>>, SourceError> {
        let key = &self.files[self.file];
        let mut tries = 0;
        let mut file = loop {
            tries += 1;
            let mut file = tempfile::tempfile().map_err(|error| self.no_file(error))?;
            let mut write = |bytes: &[u8]| Ok(file.write_all(bytes)?);
            match download(&self.s3, &self.bucket, key, &mut write).await {
                Ok(written) => {
                    written.map_err(|problem| self.no_file(problem))?;
                    break file;
                }
                Err(error) if tries == DOWNLOAD_TRIES => return Err(error.into()),
                Err(error) => tracing::warn!(%error, "fetching the inventory's file again"),
            }
        };
        file.seek(SeekFrom::Start(0))
            .map_err(|error| self.no_file(error))?;
        let mut reader = csv::ReaderBuilder::new()
            .has_headers(false)
            // Counted in `object`, with a better error.
            .flexible(true)
            .from_reader(MultiGzDecoder::new(BufReader::new(file)));
        let mut row = StringRecord::new();
        for number in 0..self.rows {
            let is_there = reader
                .read_record(&mut row)
                .map_err(|error| self.wrong_row(number, error.into()))?;
            if !is_there {
                break;
            }
        }
        Ok(reader)
    }

    fn unusable(&self, problem: anyhow::Error) -> SourceError {
        SourceError::Inventory {
            manifest: self.url.clone(),
            problem,
        }
    }

    fn no_file(&self, problem: impl Into<anyhow::Error>) -> SourceError {
        self.unusable(problem.into().context("no temporary file"))
    }

    fn wrong_row(&self, number: u64, problem: anyhow::Error) -> SourceError {
        let file = self.files.get(self.file).map_or("", String::as_str);
        self.unusable(problem.context(format!("row {} of {file}", number + 1)))
    }
}

#[async_trait]
impl Source for Inventory {
    async fn next_page(&mut self) -> Result<Option<Vec<Entry>>, SourceError> {
        if self.file >= self.files.len() {
            return Ok(None);
        }
        let mut reader = match self.open.take() {
            Some(reader) => reader,
            None => self.fetch().await?,
        };
        let mut entries = Vec::new();
        let mut row = StringRecord::new();
        for _ in 0..PAGE_ROWS {
            let is_there = reader
                .read_record(&mut row)
                .map_err(|error| self.wrong_row(self.rows, error.into()))?;
            if !is_there {
                self.file += 1;
                self.rows = 0;
                return Ok(Some(entries));
            }
            let object = object(&row, &self.columns)
                .map_err(|problem| self.wrong_row(self.rows, problem))?;
            self.rows += 1;
            if object.key.starts_with(&self.prefix) {
                entries.push(Entry {
                    object,
                    position: Position::Row {
                        file: self.file,
                        rows: self.rows,
                    },
                });
            }
        }
        self.open = Some(reader);
        Ok(Some(entries))
    }
}

fn parse_manifest(content: &[u8], job: &Job) -> anyhow::Result<Manifest> {
    let manifest: Manifest =
        serde_json::from_slice(content).context("it is no manifest.json of S3 Inventory")?;
    if !manifest.file_format.eq_ignore_ascii_case("CSV") {
        bail!(
            "it is in {}, and only CSV is read: set the inventory's output format to CSV, or \
             leave --manifest out and the bucket is listed",
            manifest.file_format
        );
    }
    if manifest.source_bucket != job.bucket {
        bail!(
            "it is of the bucket {}, and the backfill is of {}",
            manifest.source_bucket,
            job.bucket
        );
    }
    Ok(manifest)
}

/// Gives the object's bytes to the sink; the inner error is the sink's.
async fn download(
    s3: &Client,
    bucket: &str,
    key: &str,
    sink: &mut (dyn FnMut(&[u8]) -> anyhow::Result<()> + Send),
) -> Result<anyhow::Result<()>, aws::Error> {
    const OPERATION: &str = "s3:GetObject";
    let about = |error: aws::Error| error.of(S3Url::new(bucket, key).to_string());
    let response = s3.get_object().bucket(bucket).key(key).send().await;
    let mut body = response
        .map_err(|error| about(aws::Error::from_sdk(OPERATION, &error)))?
        .body;
    while let Some(bytes) = body.next().await {
        let bytes =
            bytes.map_err(|error| about(aws::Error::network(OPERATION, "BrokenBody", &error)))?;
        if let Err(problem) = sink(&bytes) {
            return Ok(Err(problem));
        }
    }
    Ok(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backfill::job::tests::job;

    const SCHEMA: &str = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag, StorageClass";

    fn row(values: [&str; 9]) -> StringRecord {
        StringRecord::from(values.to_vec())
    }

    #[test]
    fn a_row_becomes_an_object_with_its_key_decoded() {
        let columns = columns(SCHEMA, &job()).unwrap();
        let object = object(
            &row([
                "photos",
                "a/my+photo%2B%C3%A9.png",
                "",
                "true",
                "false",
                "10",
                "2026-05-01T10:00:00.000Z",
                "abc-3",
                "STANDARD",
            ]),
            &columns,
        )
        .unwrap();
        assert_eq!(object.key, "a/my photo+é.png");
        assert_eq!((object.etag.as_str(), object.size), ("abc-3", Some(10)));
        assert!(object.is_current && object.last_modified.is_some());
    }

    #[test]
    fn old_versions_and_delete_markers_are_not_current() {
        let columns = columns(SCHEMA, &job()).unwrap();
        for (latest, marker) in [("false", "false"), ("true", "true")] {
            let row = row(["b", "ab.png", "v", latest, marker, "", "", "", ""]);
            assert!(!object(&row, &columns).unwrap().is_current);
        }
    }

    #[test]
    fn a_column_that_a_filter_needs_is_asked_for_by_name() {
        let mut job = job();
        assert!(columns("Bucket, Key, ETag", &job).is_ok());
        let problem = columns("Bucket, Key", &job).unwrap_err().to_string();
        assert!(problem.contains("ETag"), "{problem}");
        job.max_size = Some(1);
        let problem = columns("Bucket, Key, ETag", &job).unwrap_err().to_string();
        assert!(problem.contains("Size"), "{problem}");
    }

    #[test]
    fn a_row_that_does_not_fit_is_an_error() {
        let columns = columns(SCHEMA, &job()).unwrap();
        assert!(object(&StringRecord::from(vec!["b", "k"]), &columns).is_err());
        let mut values = ["b", "ab.png", "", "", "", "many", "", "e", ""];
        assert!(object(&row(values), &columns).is_err());
        values[5] = "1";
        values[6] = "yesterday";
        assert!(object(&row(values), &columns).is_err());
    }

    #[test]
    fn other_formats_and_other_buckets_are_refused_with_what_to_do() {
        let manifest = |format: &str, bucket: &str| {
            format!(
                r#"{{"sourceBucket":"{bucket}","destinationBucket":"arn:aws:s3:::d","version":"2016-11-30",
                "fileFormat":"{format}","fileSchema":"Bucket, Key","files":[]}}"#
            )
        };
        for format in ["ORC", "Parquet"] {
            let problem = parse_manifest(manifest(format, "photos").as_bytes(), &job());
            let problem = problem.err().unwrap().to_string();
            assert!(
                problem.contains(format) && problem.contains("CSV"),
                "{problem}"
            );
        }
        let problem = parse_manifest(manifest("CSV", "other").as_bytes(), &job());
        assert!(problem.err().unwrap().to_string().contains("other"));
        assert!(parse_manifest(b"Bucket,Key", &job()).is_err());
    }
}
