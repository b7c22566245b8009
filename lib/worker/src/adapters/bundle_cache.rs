//! The model bundle from S3, cached on a disk that several tasks may share.
//!
//! A bundle lies in the folder of its manifest's digest. Whoever holds the
//! lock of that folder fetches into a temporary folder beside it, compares
//! every file's digest, and renames: a folder with the final name is complete.
//! The lock is the operating system's, so it goes when its holder does.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_s3::Client;
use clip_model::bundle::{
    Bundle, BundleError, MANIFEST, Manifest, TEXT_DATA, TEXT_GRAPH, TOKENIZER,
};
use events::S3Url;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use platform::aws;
use sha2::{Digest, Sha256};

/// Bytes of one request: large files are fetched in parts, since one
/// connection to S3 carries less than the machine's network does.
const PART_BYTES: u64 = 16 * 1024 * 1024;

/// Parts fetched at the same time.
const CONCURRENT_PARTS: usize = 8;

/// Between looks at a lock that another task holds.
const LOCK_POLL: Duration = Duration::from_millis(200);

/// How long another task may take to fetch the same bundle: the largest at a
/// slow 10 MB/s.
const LOCK_PATIENCE: Duration = Duration::from_secs(600);

/// A manifest has a few kilobytes; more is not one.
const MAX_MANIFEST_BYTES: usize = 4 * 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("cannot get the bundle (from MODEL_URI): {0}")]
    Get(#[from] aws::Error),
    #[error("s3://{bucket}/{key} (from MODEL_URI) is no bundle's manifest: {reason}")]
    Manifest {
        bucket: String,
        key: String,
        reason: String,
    },
    #[error("cannot write the model cache {} (from CACHE_DIR): {error}", path.display())]
    Write { path: PathBuf, error: io::Error },
    #[error("fetched from s3://{bucket}/{prefix} (from MODEL_URI): {error}")]
    Damaged {
        bucket: String,
        prefix: String,
        error: BundleError,
    },
    /// Another task fetches the bundle and does not finish.
    #[error("another task holds {} for more than {} s", path.display(), LOCK_PATIENCE.as_secs())]
    Locked { path: PathBuf },
}

/// The folder of the bundle under `s3://bucket/prefix`, fetched into `cache`
/// if it is not there.
pub async fn fetch(
    s3: &Client,
    bucket: &str,
    prefix: &str,
    cache: &Path,
) -> Result<PathBuf, FetchError> {
    let source = Source {
        s3: s3.clone(),
        bucket: bucket.to_owned(),
        prefix: prefix.to_owned(),
    };
    let manifest_json = source.manifest().await?;
    let name = hex::encode(Sha256::digest(&manifest_json));
    let folder = cache.join(&name);
    if Bundle::open(&folder).is_ok() {
        return Ok(folder);
    }
    let started = Instant::now();
    let lock = take_lock(cache, &name).await?;
    // Another task may have finished while this one waited for the lock.
    if Bundle::open(&folder).is_ok() {
        return Ok(folder);
    }
    let mut manifest: Manifest =
        serde_json::from_slice(&manifest_json).map_err(|error| FetchError::Manifest {
            bucket: source.bucket.clone(),
            key: source.key(MANIFEST),
            reason: error.to_string(),
        })?;
    // No worker reads texts: the labels' vectors are a file of their own.
    for text in [TEXT_GRAPH, TEXT_DATA, TOKENIZER] {
        manifest.files.remove(text);
    }
    let partial = cache.join(format!("{name}.part"));
    source.fetch_into(&partial, &manifest).await?;
    let place = folder.clone();
    let renamed = blocking(move || {
        // A folder that is there but does not open is a damaged one.
        match std::fs::remove_dir_all(&place) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        std::fs::rename(&partial, &place)
    });
    renamed.await.map_err(|error| FetchError::Write {
        path: folder.clone(),
        error,
    })?;
    drop(lock);
    tracing::info!(
        folder = %folder.display(),
        seconds = started.elapsed().as_secs_f64(),
        "model bundle fetched"
    );
    Ok(folder)
}

/// Runs file work off the runtime's threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Waits for the lock of a bundle. It is held until the file is dropped.
async fn take_lock(cache: &Path, name: &str) -> Result<File, FetchError> {
    let path = cache.join(format!("{name}.lock"));
    let failed = |error: io::Error| FetchError::Write {
        path: path.clone(),
        error,
    };
    std::fs::create_dir_all(cache).map_err(failed)?;
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    let started = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::WouldBlock) => {}
            Err(std::fs::TryLockError::Error(error)) => return Err(failed(error)),
        }
        if started.elapsed() > LOCK_PATIENCE {
            return Err(FetchError::Locked { path });
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
}

struct Source {
    s3: Client,
    bucket: String,
    prefix: String,
}

impl Source {
    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.prefix)
    }

    async fn get(&self, name: &str, range: Option<String>) -> Result<bytes::Bytes, aws::Error> {
        const OPERATION: &str = "s3:GetObject";
        let key = self.key(name);
        let about = |error: aws::Error| error.of(S3Url::new(&self.bucket, &key).to_string());
        let response = self
            .s3
            .get_object()
            .bucket(&self.bucket)
            .key(&key)
            .set_range(range)
            .send()
            .await
            .map_err(|error| about(aws::Error::from_sdk(OPERATION, &error)))?;
        let body = response.body.collect().await;
        body.map(|body| body.into_bytes())
            .map_err(|error| about(aws::Error::network(OPERATION, "BrokenBody", &error)))
    }

    async fn manifest(&self) -> Result<bytes::Bytes, FetchError> {
        let json = self.get(MANIFEST, None).await?;
        if json.len() > MAX_MANIFEST_BYTES {
            return Err(FetchError::Manifest {
                bucket: self.bucket.clone(),
                key: self.key(MANIFEST),
                reason: format!("it has {} bytes", json.len()),
            });
        }
        Ok(json)
    }

    async fn fetch_into(&self, partial: &Path, manifest: &Manifest) -> Result<(), FetchError> {
        let failed = |error: io::Error| FetchError::Write {
            path: partial.to_owned(),
            error,
        };
        // What a killed task left behind: the lock says that nobody uses it.
        match std::fs::remove_dir_all(partial) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        std::fs::create_dir_all(partial).map_err(failed)?;
        for (name, digest) in &manifest.files {
            // The manifest comes from elsewhere: its names must stay inside.
            if Path::new(name).file_name() != Some(name.as_ref()) || name.contains('\\') {
                return Err(FetchError::Manifest {
                    bucket: self.bucket.clone(),
                    key: self.key(MANIFEST),
                    reason: format!("it names the file {name:?}"),
                });
            }
            self.fetch_file(&partial.join(name), name, digest.bytes)
                .await?;
        }
        let mut file = File::create(partial.join(MANIFEST)).map_err(failed)?;
        file.write_all(manifest.to_json().as_bytes())
            .map_err(failed)?;
        file.sync_all().map_err(failed)?;
        let folder = partial.to_owned();
        let verified = tokio::task::spawn_blocking(move || {
            Bundle::open(&folder).and_then(|bundle| bundle.verify())
        });
        match verified.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(FetchError::Damaged {
                bucket: self.bucket.clone(),
                prefix: self.prefix.clone(),
                error,
            }),
            Err(error) => Err(failed(io::Error::other(error))),
        }
    }

    async fn fetch_file(&self, path: &Path, name: &str, bytes: u64) -> Result<(), FetchError> {
        let failed = |error: io::Error| FetchError::Write {
            path: path.to_owned(),
            error,
        };
        let file = File::create(path).map_err(failed)?;
        file.set_len(bytes).map_err(failed)?;
        let file = Arc::new(file);
        let starts: Vec<u64> = (0..bytes).step_by(PART_BYTES as usize).collect();
        stream::iter(starts)
            .map(|start| {
                let file = file.clone();
                async move {
                    let end = (start + PART_BYTES).min(bytes) - 1;
                    let part = self.get(name, Some(format!("bytes={start}-{end}"))).await?;
                    blocking(move || file.write_all_at(&part, start))
                        .await
                        .map_err(|error| FetchError::Write {
                            path: path.to_owned(),
                            error,
                        })
                }
            })
            .buffer_unordered(CONCURRENT_PARTS)
            .try_collect::<()>()
            .await?;
        blocking(move || file.sync_all()).await.map_err(failed)
    }
}
