//! Downloads published weights from the model hub.
//!
//! The hub answers a request for a large file with the file's SHA-256 (`X-Linked-Etag`) and a
//! redirection to where its bytes lie. The digest is the hub's own, never one written here. What
//! has arrived is kept beside the target under a name that carries the digest, so that an
//! interrupted download goes on where it stopped, and only a whole, verified file gets the target's
//! name.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use thiserror::Error;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::typestate::WithoutBody;
use ureq::{Agent, Body, RequestBuilder};

use crate::files::sha256_of_file;

/// The model hub, unless `HF_ENDPOINT` names another (a mirror, or a test's own server).
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// The environment variable that names another hub, as the hub's own tools read it.
const ENDPOINT_VARIABLE: &str = "HF_ENDPOINT";
/// The environment variable with an access token, as the hub's own tools read it.
const TOKEN_VARIABLE: &str = "HF_TOKEN";
/// The file in every one of the repositories.
const WEIGHTS_FILE: &str = "open_clip_model.safetensors";
/// The file beside it that says what the tensors do not tell (heads, activation).
const CONFIGURATION_FILE: &str = "open_clip_config.json";

/// Attempts in a row that may end without a byte.
const FRUITLESS_ATTEMPTS: u32 = 5;
/// Wait before the second attempt; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// One attempt reads the body for this long at most and then goes on with another request, so that
/// a connection that has died in silence does not hang the download.
const BODY_TIMEOUT: Duration = Duration::from_secs(300);
/// Whether the hub can be reached is known after this long, or it cannot.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);
/// To connect, and to receive the head of an answer.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Redirections within the hub (renamed repositories) that are followed.
const HUB_REDIRECTIONS: usize = 5;
/// Read size: large enough that system calls and progress do not show.
const CHUNK: usize = 1 << 18;
/// Largest configuration file that is accepted.
const CONFIGURATION_BYTES: u64 = 1 << 20;

/// Why weights cannot be downloaded.
#[allow(missing_docs)] // The messages say it.
#[derive(Debug, Error)]
pub enum FetchError {
    #[error("no published weights are known for `{name}`; known are {}", PUBLISHED.map(|(name, _)| name).join(", "))]
    UnknownModel { name: String },
    #[error("cannot fetch {url}: {reason}")]
    Hub { url: String, reason: String },
    #[error("{url} came without a sha256 (X-Linked-Etag is `{etag}`); nothing unverified is used")]
    NoDigest { url: String, etag: String },
    #[error("{} has sha256 {found}, the hub announced {wanted}; what had arrived was deleted, try again", path.display())]
    Digest {
        path: PathBuf,
        found: String,
        wanted: String,
    },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot download {}: {reason}", path.display())]
    Busy { path: PathBuf, reason: String },
}

/// The models with published weights, and their repositories on the hub.
pub const PUBLISHED: [(&str, &str); 3] = [
    ("ViT-B/32", "timm/vit_base_patch32_clip_224.openai"),
    ("ViT-B/16", "timm/vit_base_patch16_clip_224.openai"),
    ("ViT-L/14", "timm/vit_large_patch14_clip_224.openai"),
];

/// Written beside downloaded weights: where they came from, so that the bundle can say it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The repository on the hub.
    pub repository: String,
    /// Its commit, where the hub said it.
    pub revision: Option<String>,
    /// The file's name there.
    pub file: String,
    /// The file's digest.
    pub sha256: String,
}

impl Receipt {
    /// The receipt beside a weights file, if there is a readable one.
    pub fn beside(weights: &Path) -> Option<Receipt> {
        let json = std::fs::read_to_string(Receipt::path(weights)).ok()?;
        serde_json::from_str(&json).ok()
    }

    fn path(weights: &Path) -> PathBuf {
        let mut name = weights.as_os_str().to_owned();
        name.push(".receipt.json");
        PathBuf::from(name)
    }
}

/// How far a download is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Bytes that are here.
    pub received: u64,
    /// Bytes of the whole file.
    pub total: u64,
}

/// What the hub says about a file.
struct Announcement {
    sha256: String,
    bytes: u64,
    revision: Option<String>,
}

/// The hub's address: `HF_ENDPOINT`, or the public one.
pub fn endpoint() -> String {
    std::env::var(ENDPOINT_VARIABLE)
        .ok()
        .filter(|value| !value.is_empty())
        .unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned())
}

/// Whether anything answers at the hub's address, whatever it says.
pub fn probe(endpoint: &str) -> Result<(), FetchError> {
    let agent: Agent = Agent::config_builder()
        .http_status_as_error(false)
        .timeout_global(Some(PROBE_TIMEOUT))
        .build()
        .into();
    agent
        .head(endpoint)
        .call()
        .map(|_| ())
        .map_err(|error| FetchError::Hub {
            url: endpoint.to_owned(),
            reason: error.to_string(),
        })
}

/// Downloads the published weights of `model` to `output`, and the configuration beside them.
/// Weights that are there already and have the hub's digest are left alone.
pub fn fetch(
    model: &str,
    endpoint: &str,
    output: &Path,
    progress: &dyn Fn(Progress),
) -> Result<Receipt, FetchError> {
    let Some((_, repository)) = PUBLISHED.iter().find(|(name, _)| *name == model) else {
        return Err(FetchError::UnknownModel {
            name: model.to_owned(),
        });
    };
    let hub = Hub::new(endpoint);
    let write = |path: &Path| {
        let path = path.to_owned();
        move |source| FetchError::Write { path, source }
    };
    if let Some(parent) = output.parent() {
        std::fs::create_dir_all(parent).map_err(write(parent))?;
    }
    let url = hub.url(repository, WEIGHTS_FILE);
    let announced = hub.announcement(&url)?;
    let present =
        output.is_file() && sha256_of_file(output).map_err(write(output))? == announced.sha256;
    if !present {
        hub.download(&url, &announced, output, progress)?;
    }
    hub.configuration(repository, output)?;
    let receipt = Receipt {
        repository: (*repository).to_owned(),
        revision: announced.revision,
        file: WEIGHTS_FILE.to_owned(),
        sha256: announced.sha256,
    };
    let path = Receipt::path(output);
    let json = serde_json::to_string_pretty(&receipt).unwrap_or_default();
    std::fs::write(&path, json + "\n").map_err(write(&path))?;
    Ok(receipt)
}

struct Hub {
    endpoint: String,
    token: Option<String>,
    agent: Agent,
    head_agent: Agent,
}

impl Hub {
    fn new(endpoint: &str) -> Hub {
        let configuration = || {
            Agent::config_builder()
                .http_status_as_error(false)
                .timeout_connect(Some(HEAD_TIMEOUT))
                .timeout_recv_response(Some(HEAD_TIMEOUT))
                .timeout_recv_body(Some(BODY_TIMEOUT))
                .user_agent(concat!(
                    env!("CARGO_PKG_NAME"),
                    "/",
                    env!("CARGO_PKG_VERSION")
                ))
        };
        Hub {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: std::env::var(TOKEN_VARIABLE)
                .ok()
                .filter(|token| !token.is_empty()),
            agent: configuration().build().into(),
            // The digest is in the hub's own answer, which a redirection would hide.
            head_agent: configuration()
                .max_redirects(0)
                .max_redirects_will_error(false)
                .build()
                .into(),
        }
    }

    fn url(&self, repository: &str, file: &str) -> String {
        format!("{}/{repository}/resolve/main/{file}", self.endpoint)
    }

    fn authorised(&self, request: RequestBuilder<WithoutBody>) -> RequestBuilder<WithoutBody> {
        // Compressed answers would announce another length.
        let request = request.header("accept-encoding", "identity");
        match &self.token {
            Some(token) => request.header("authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    fn announcement(&self, url: &str) -> Result<Announcement, FetchError> {
        let hub = |reason: String| FetchError::Hub {
            url: url.to_owned(),
            reason,
        };
        let mut target = url.to_owned();
        for _ in 0..HUB_REDIRECTIONS {
            let response = self.patiently(url, || {
                self.authorised(self.head_agent.head(&target)).call()
            })?;
            let headers = response.headers();
            let status = response.status();
            let location = text(headers, "location");
            if let (true, None, Some(location)) = (
                status.is_redirection(),
                text(headers, "x-linked-etag"),
                &location,
            ) && location.starts_with('/')
            {
                target = format!("{}{location}", self.endpoint);
                continue;
            }
            if !status.is_success() && !status.is_redirection() {
                return Err(hub(explain(status)));
            }
            let etag = text(headers, "x-linked-etag").or_else(|| text(headers, "etag"));
            let etag = etag.unwrap_or_default();
            let sha256 = etag
                .trim_start_matches("W/")
                .trim_matches('"')
                .to_lowercase();
            let is_sha256 =
                sha256.len() == 64 && sha256.bytes().all(|byte| byte.is_ascii_hexdigit());
            if !is_sha256 {
                return Err(FetchError::NoDigest {
                    url: url.to_owned(),
                    etag,
                });
            }
            let bytes = text(headers, "x-linked-size").or_else(|| text(headers, "content-length"));
            let bytes = bytes
                .and_then(|bytes| bytes.parse().ok())
                .ok_or_else(|| hub("the answer does not say the file's size".to_owned()))?;
            let revision = text(headers, "x-repo-commit");
            return Ok(Announcement {
                sha256,
                bytes,
                revision,
            });
        }
        Err(hub(format!(
            "more than {HUB_REDIRECTIONS} redirections within the hub"
        )))
    }

    /// Sends a request until it is answered with something other than a passing failure.
    fn patiently(
        &self,
        url: &str,
        send: impl Fn() -> Result<Response<Body>, ureq::Error>,
    ) -> Result<Response<Body>, FetchError> {
        let mut pause = FIRST_PAUSE;
        for attempt in 1.. {
            let reason = match send() {
                Ok(response) if !is_passing(response.status()) => return Ok(response),
                Ok(response) => explain(response.status()),
                Err(error) => error.to_string(),
            };
            if attempt >= FRUITLESS_ATTEMPTS {
                return Err(FetchError::Hub {
                    url: url.to_owned(),
                    reason: format!("{reason} (attempt {attempt} of {FRUITLESS_ATTEMPTS})"),
                });
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
        unreachable!("the loop returns at the last attempt")
    }

    fn download(
        &self,
        url: &str,
        announced: &Announcement,
        output: &Path,
        progress: &dyn Fn(Progress),
    ) -> Result<(), FetchError> {
        // Another version of the file has another digest and thus another name.
        let mut part = output.as_os_str().to_owned();
        part.push(format!(".{}.part", &announced.sha256[..16]));
        let part = PathBuf::from(part);
        let write = |source| FetchError::Write {
            path: part.clone(),
            source,
        };
        let mut file = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(&part)
            .map_err(write)?;
        // Two writers of one file would damage it; the lock goes with the process that holds it.
        if let Err(error) = file.try_lock() {
            let reason = match error {
                TryLockError::WouldBlock => "another fetch is downloading it".to_owned(),
                TryLockError::Error(error) => error.to_string(),
            };
            return Err(FetchError::Busy {
                path: output.to_owned(),
                reason,
            });
        }
        let mut hasher = Sha256::new();
        // What an earlier run has brought; the cursor is at its end afterwards.
        let mut received = io::copy(&mut file, &mut hasher).map_err(write)?;
        progress(Progress {
            received,
            total: announced.bytes,
        });
        let mut pause = FIRST_PAUSE;
        let mut fruitless = 0;
        while received < announced.bytes {
            let before = received;
            let reason = match self.attempt(
                url,
                announced,
                &mut file,
                &mut hasher,
                &mut received,
                progress,
            ) {
                Ok(()) => "the connection closed early".to_owned(),
                Err(Attempt::Passing(reason)) => reason,
                Err(Attempt::Final(error)) => return Err(error),
                Err(Attempt::Write(source)) => return Err(write(source)),
            };
            if received > before {
                fruitless = 0;
                pause = FIRST_PAUSE;
            } else {
                fruitless += 1;
                if fruitless >= FRUITLESS_ATTEMPTS {
                    let reason = format!(
                        "{reason} ({fruitless} attempts without a byte; {received} of {} bytes are \
                         kept, the next fetch goes on from there)",
                        announced.bytes
                    );
                    return Err(FetchError::Hub {
                        url: url.to_owned(),
                        reason,
                    });
                }
                std::thread::sleep(pause);
                pause *= 2;
            }
        }
        file.sync_all().map_err(write)?;
        drop(file);
        let found = hex::encode(hasher.finalize());
        if received != announced.bytes || found != announced.sha256 {
            std::fs::remove_file(&part).map_err(write)?;
            let path = output.to_owned();
            return Err(FetchError::Digest {
                path,
                found,
                wanted: announced.sha256.clone(),
            });
        }
        std::fs::rename(&part, output).map_err(|source| FetchError::Write {
            path: output.to_owned(),
            source,
        })
    }

    /// One request for what is missing.
    fn attempt(
        &self,
        url: &str,
        announced: &Announcement,
        file: &mut File,
        hasher: &mut Sha256,
        received: &mut u64,
        progress: &dyn Fn(Progress),
    ) -> Result<(), Attempt> {
        let mut request = self.authorised(self.agent.get(url));
        if *received > 0 {
            request = request.header("range", format!("bytes={received}-"));
        }
        let response = request
            .call()
            .map_err(|error| Attempt::Passing(error.to_string()))?;
        let status = response.status();
        let continues = status == StatusCode::PARTIAL_CONTENT
            && text(response.headers(), "content-range")
                .is_some_and(|range| range.starts_with(&format!("bytes {received}-")));
        if !continues {
            if status != StatusCode::OK {
                let reason = explain(status);
                return Err(if is_passing(status) {
                    Attempt::Passing(reason)
                } else {
                    Attempt::Final(FetchError::Hub {
                        url: url.to_owned(),
                        reason,
                    })
                });
            }
            // The whole file although a part was asked for: begin again.
            file.set_len(0).map_err(Attempt::Write)?;
            file.seek(SeekFrom::Start(0)).map_err(Attempt::Write)?;
            *hasher = Sha256::new();
            *received = 0;
        }
        // One byte more than announced is enough to notice a file that is too long.
        let limit = announced.bytes - *received + 1;
        let mut body = response.into_body().into_reader().take(limit);
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = match body.read(&mut chunk) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) => return Err(Attempt::Passing(error.to_string())),
            };
            file.write_all(&chunk[..read]).map_err(Attempt::Write)?;
            hasher.update(&chunk[..read]);
            *received += read as u64;
            progress(Progress {
                received: *received,
                total: announced.bytes,
            });
        }
    }

    /// Puts the configuration beside the weights, under the name that [`crate::checkpoint`] reads.
    fn configuration(&self, repository: &str, output: &Path) -> Result<(), FetchError> {
        let url = self.url(repository, CONFIGURATION_FILE);
        let response = self.patiently(&url, || self.authorised(self.agent.get(&url)).call())?;
        let hub = |reason: String| FetchError::Hub {
            url: url.clone(),
            reason,
        };
        if response.status() != StatusCode::OK {
            return Err(hub(explain(response.status())));
        }
        let text = response
            .into_body()
            .into_with_config()
            .limit(CONFIGURATION_BYTES)
            .read_to_string()
            .map_err(|error| hub(error.to_string()))?;
        let path = output.with_file_name(CONFIGURATION_FILE);
        std::fs::write(&path, text).map_err(|source| FetchError::Write { path, source })
    }
}

/// How an attempt ended that did not bring the rest of the file.
enum Attempt {
    Passing(String),
    Final(FetchError),
    Write(io::Error),
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Whether trying again may help.
fn is_passing(status: StatusCode) -> bool {
    status.is_server_error()
        || status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::REQUEST_TIMEOUT
}

fn explain(status: StatusCode) -> String {
    let advice = match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            ": set HF_TOKEN to an access token of the hub"
        }
        StatusCode::NOT_FOUND => ": the repository or file is not there",
        _ => "",
    };
    format!("the hub answered {status}{advice}")
}
