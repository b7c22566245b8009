//! A proxy before the emulated AWS that fails on purpose.

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, http::request::Parts};
use hyper_util::client::legacy::{Client, connect::HttpConnector};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

/// How calls fail while it lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// S3 answers 503 to every second call.
    S3Unavailable,
    /// S3 takes half a second longer.
    S3Slow,
    /// S3 refuses every call: the bucket's policy was changed.
    S3Denied,
    /// SNS throttles every second call.
    SnsThrottled,
    /// Nothing answers.
    Away,
    /// Every batch of messages is received twice, with the same receipts.
    ReceivedTwice,
}

const SLOW: Duration = Duration::from_millis(500);

type Answer = Response<Full<Bytes>>;

/// The running proxy.
#[derive(Clone)]
pub struct Proxy(Arc<Inner>);

struct Inner {
    endpoint: String,
    client: Client<HttpConnector, Full<Bytes>>,
    target: OnceLock<u16>,
    fault: Mutex<Option<Fault>>,
    calls: AtomicU64,
    struck: AtomicU64,
    received: Mutex<Option<Bytes>>,
}

impl Proxy {
    /// Listens on a free port; calls wait for their [`Proxy::target`].
    pub async fn start() -> std::io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let proxy = Self(Arc::new(Inner {
            endpoint: format!("http://{}", listener.local_addr()?),
            client: Client::builder(TokioExecutor::new()).build_http(),
            target: OnceLock::new(),
            fault: Mutex::default(),
            calls: AtomicU64::new(0),
            struck: AtomicU64::new(0),
            received: Mutex::default(),
        }));
        let served = proxy.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let proxy = served.clone();
                let service = service_fn(move |request| {
                    let proxy = proxy.clone();
                    async move { Ok::<_, Infallible>(proxy.answer(request).await) }
                });
                let connection = hyper::server::conn::http1::Builder::new();
                tokio::spawn(connection.serve_connection(TokioIo::new(stream), service));
            }
        });
        Ok(proxy)
    }

    /// Where it is served.
    pub fn endpoint(&self) -> &str {
        &self.0.endpoint
    }

    /// The port that calls go on to.
    pub fn target(&self, port: u16) {
        let _ = self.0.target.set(port);
    }

    /// From now on calls fail so, or not at all.
    pub fn set(&self, fault: Option<Fault>) {
        *self.0.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// Calls that failed so far.
    pub fn struck(&self) -> u64 {
        self.0.struck.load(Ordering::Relaxed)
    }

    async fn answer(&self, request: Request<Incoming>) -> Answer {
        let (parts, body) = request.into_parts();
        let Ok(body) = body.collect().await else {
            return text(StatusCode::BAD_REQUEST, "");
        };
        let body = body.to_bytes();
        let fault = *self.0.fault.lock().unwrap_or_else(PoisonError::into_inner);
        let is_second = self.0.calls.fetch_add(1, Ordering::Relaxed) % 2 == 1;
        let strike = || self.0.struck.fetch_add(1, Ordering::Relaxed);
        match fault {
            Some(Fault::S3Unavailable) if is_second && is_s3(&parts) => {
                strike();
                return text(
                    StatusCode::SERVICE_UNAVAILABLE,
                    "<Error><Code>SlowDown</Code></Error>",
                );
            }
            Some(Fault::S3Denied) if is_s3(&parts) => {
                strike();
                return text(
                    StatusCode::FORBIDDEN,
                    "<Error><Code>AccessDenied</Code></Error>",
                );
            }
            Some(Fault::S3Slow) if is_s3(&parts) => {
                strike();
                tokio::time::sleep(SLOW).await;
            }
            Some(Fault::SnsThrottled) if is_second && body.starts_with(b"Action=Publish") => {
                strike();
                let error = "<ErrorResponse><Error><Type>Sender</Type><Code>Throttling</Code>\
                    <Message>Rate exceeded</Message></Error></ErrorResponse>";
                return text(StatusCode::BAD_REQUEST, error);
            }
            Some(Fault::Away) => {
                strike();
                return text(StatusCode::SERVICE_UNAVAILABLE, "");
            }
            _ => {}
        }
        let is_receive = target_of(&parts) == "AmazonSQS.ReceiveMessage";
        let received = || {
            self.0
                .received
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
        };
        if is_receive && let Some(again) = received().take() {
            strike();
            return amz_json(again);
        }
        let answer = self.pass(parts, body).await;
        if is_receive && fault == Some(Fault::ReceivedTwice) && answer.status().is_success() {
            let Ok(body) = answer.into_body().collect().await;
            let body = body.to_bytes();
            if body.windows(9).any(|window| window == b"MessageId") {
                *received() = Some(body.clone());
            }
            return amz_json(body);
        }
        answer
    }

    async fn pass(&self, parts: Parts, body: Bytes) -> Answer {
        let unavailable = || text(StatusCode::SERVICE_UNAVAILABLE, "");
        let Some(port) = self.0.target.get() else {
            return unavailable();
        };
        let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
        let uri = format!("http://127.0.0.1:{port}{path}");
        let mut request = Request::builder().method(parts.method).uri(uri);
        for (name, value) in &parts.headers {
            request = request.header(name, value);
        }
        let Ok(request) = request.body(Full::new(body)) else {
            return unavailable();
        };
        let Ok(answer) = self.0.client.request(request).await else {
            return unavailable();
        };
        let (mut parts, body) = answer.into_parts();
        parts.headers.remove(hyper::header::TRANSFER_ENCODING);
        match body.collect().await {
            Ok(body) => Response::from_parts(parts, Full::new(body.to_bytes())),
            Err(_) => unavailable(),
        }
    }
}

fn target_of(parts: &Parts) -> &str {
    let target = parts.headers.get("x-amz-target");
    target
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

/// The other services name their operation in a header or the body, or have these paths.
fn is_s3(parts: &Parts) -> bool {
    let path = parts.uri.path();
    let others = ["/2015-03-31/", "/service/"];
    target_of(parts).is_empty() && path.len() > 1 && !others.iter().any(|one| path.starts_with(one))
}

fn amz_json(body: Bytes) -> Answer {
    let mut answer = Response::new(Full::new(body));
    let json = hyper::header::HeaderValue::from_static("application/x-amz-json-1.0");
    answer
        .headers_mut()
        .insert(hyper::header::CONTENT_TYPE, json);
    answer
}

fn text(status: StatusCode, body: &'static str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from_static(body.as_bytes())));
    *answer.status_mut() = status;
    answer
}
