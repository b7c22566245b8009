//! Documents from S3 and over HTTPS.

use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use aws_config::SdkConfig;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::error::display::DisplayErrorContext;
use bytes::Bytes;
use events::S3Url;
use futures_util::future::{BoxFuture, FutureExt};
use futures_util::stream::{self, BoxStream, StreamExt};
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, ETAG, LOCATION};
use hyper::{Request, Response, StatusCode, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::{GaiResolver, Name};
use hyper_util::rt::TokioExecutor;
use platform::aws;
use tower_service::Service;

use crate::rules::failure::{Cause, Stage, TaskError};
use crate::services::{Documents, OpenDocument};

/// From request to the response's head, in one try.
const HEAD_TIMEOUT: Duration = Duration::from_secs(20);

/// Between two pieces of a body.
const BODY_IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// Redirects of one HTTPS document: more is a loop.
const MAX_REDIRECTS: usize = 5;

pub struct RemoteDocuments {
    s3: aws_sdk_s3::Client,
    https: Https,
}

impl RemoteDocuments {
    pub fn new(sdk: &SdkConfig) -> Self {
        Self {
            s3: platform::s3_client(&delivery::with_timeout(sdk, HEAD_TIMEOUT)),
            https: Https::new(false),
        }
    }
}

#[async_trait]
impl Documents for RemoteDocuments {
    async fn open(&self, url: &str) -> Result<OpenDocument, TaskError> {
        if url.starts_with("s3://") {
            open_s3(&self.s3, url).await
        } else {
            self.https.open(url).await
        }
    }
}

async fn open_s3(s3: &aws_sdk_s3::Client, url: &str) -> Result<OpenDocument, TaskError> {
    let place: S3Url = url.parse().map_err(|error: events::S3UrlError| {
        TaskError::permanent(Stage::Download, Cause::NotFound, error.to_string())
    })?;
    let response = s3
        .get_object()
        .bucket(&place.bucket)
        .key(&place.key)
        .send()
        .await
        .map_err(|error| {
            let error = aws::Error::from_sdk("s3:GetObject", &error).of(url);
            TaskError::of_call(Stage::Download, &error)
        })?;
    Ok(OpenDocument {
        content_type: response.content_type,
        length: response
            .content_length
            .and_then(|length| length.try_into().ok()),
        etag: response.e_tag.map(|etag| etag.trim_matches('"').to_owned()),
        body: sdk_body(response.body.into_inner(), url.to_owned()),
    })
}

/// The SDK's body, whose checksum is verified as it is read.
fn sdk_body(body: SdkBody, url: String) -> BoxStream<'static, Result<Bytes, TaskError>> {
    stream::unfold((body, url), |(mut body, url)| async move {
        loop {
            let failed = |why: String| {
                let message = format!("reading {url} broke off: {why}");
                TaskError::transient(Stage::Download, Cause::Unavailable, message)
            };
            let frame = match tokio::time::timeout(BODY_IDLE_TIMEOUT, body.frame()).await {
                Err(_) => {
                    let error = failed(format!("no data for {} s", BODY_IDLE_TIMEOUT.as_secs()));
                    return Some((Err(error), (body, url)));
                }
                Ok(None) => return None,
                Ok(Some(Err(error))) => {
                    let error = failed(error.to_string());
                    return Some((Err(error), (body, url)));
                }
                Ok(Some(Ok(frame))) => frame,
            };
            if let Ok(data) = frame.into_data() {
                return Some((Ok(data), (body, url)));
            }
        }
    })
    .boxed()
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type HttpsClient = Client<HttpsConnector<HttpConnector<PublicNames>>, Empty<Bytes>>;

/// Whoever sends an event names the host: it must not be one that only the
/// task can reach (metadata of the instance, services of the VPC).
#[derive(Debug, thiserror::Error)]
#[error("{0} is inside the network, where nothing is fetched but s3://")]
struct Inside(String);

/// Addresses of names, but for those inside the network: looked at where the
/// connection is made, so that a name cannot change between look and use.
#[derive(Clone)]
struct PublicNames {
    accepts_all: bool,
}

impl Service<Name> for PublicNames {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let (host, accepts_all) = (name.to_string(), self.accepts_all);
        async move {
            let found = GaiResolver::new().call(name).await?;
            let public = found.filter(|place| accepts_all || is_public(place.ip()));
            let public: Vec<_> = public.collect();
            match public.is_empty() {
                true => Err(Inside(host).into()),
                false => Ok(public.into_iter()),
            }
        }
        .boxed()
    }
}

/// Whether the address is one of the open internet's.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => {
            let [a, b, c, _] = address.octets();
            // What is shared, reserved or for tests, beside what the library knows.
            let is_special = matches!(
                (a, b, c),
                (0 | 240.., _, _) | (100, 64..128, _) | (192, 0, 0) | (198, 18 | 19, _)
            );
            !(is_special
                || address.is_private()
                || address.is_loopback()
                || address.is_link_local()
                || address.is_multicast()
                || address.is_documentation())
        }
        IpAddr::V6(address) => match address.segments() {
            // NAT64 leads to the IPv4 address at its end.
            [0x64, 0xff9b, 0, 0, 0, 0, high, low] => is_public(IpAddr::from(
                (u32::from(high) << 16 | u32::from(low)).to_be_bytes(),
            )),
            // Global unicast, without documentation and tunnels.
            [0x2001, 0..0x200 | 0xdb8, ..] | [0x2002, ..] => false,
            [first, ..] => first & 0xe000 == 0x2000,
        },
    }
}

/// Documents over HTTPS: no other scheme, few redirects, bounded waits.
struct Https {
    /// Made when the first such document comes: reading the system's
    /// certificates costs start-up time that most tasks never need to pay.
    client: OnceLock<HttpsClient>,
    /// Plain HTTP, and this machine, too: for this module's tests.
    accepts_all: bool,
}

impl Https {
    fn new(accepts_all: bool) -> Self {
        Self {
            client: OnceLock::new(),
            accepts_all,
        }
    }

    fn client(&self) -> Result<&HttpsClient, TaskError> {
        if let Some(client) = self.client.get() {
            return Ok(client);
        }
        let builder = HttpsConnectorBuilder::new()
            .with_provider_and_native_roots(rustls::crypto::ring::default_provider())
            .map_err(|error| {
                let message = format!("cannot read the system's certificates: {error}");
                TaskError::transient(Stage::Download, Cause::Internal, message)
            })?;
        Ok(self.client.get_or_init(|| {
            let accepts_all = self.accepts_all;
            let mut connector = HttpConnector::new_with_resolver(PublicNames { accepts_all });
            connector.enforce_http(false);
            let builder = match accepts_all {
                true => builder.https_or_http(),
                false => builder.https_only(),
            };
            let connector = builder.enable_http1().wrap_connector(connector);
            Client::builder(TokioExecutor::new()).build(connector)
        }))
    }

    async fn open(&self, url: &str) -> Result<OpenDocument, TaskError> {
        let mut place = self.accept(url)?;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.get(&place).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(open_response(response, place.to_string()));
            }
            if !status.is_redirection() {
                return Err(refused(&place, status));
            }
            let location = response
                .headers()
                .get(LOCATION)
                .and_then(|location| location.to_str().ok())
                .ok_or_else(|| refused(&place, status))?;
            place = self.accept(&resolve(&place, location))?;
        }
        Err(TaskError::permanent(
            Stage::Download,
            Cause::NotFound,
            format!("{url} redirects more than {MAX_REDIRECTS} times"),
        ))
    }

    /// The URL, if this program fetches from such places.
    fn accept(&self, url: &str) -> Result<Uri, TaskError> {
        let without_fragment = url.split('#').next().unwrap_or_default();
        let permanent =
            |message: String| TaskError::permanent(Stage::Download, Cause::NotFound, message);
        let uri: Uri = without_fragment
            .parse()
            .map_err(|error| permanent(format!("{url:?} is no URL: {error}")))?;
        let is_accepted = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => self.accepts_all,
            _ => false,
        };
        if !is_accepted || uri.host().is_none() {
            let message =
                format!("{url:?} is neither s3:// nor https://, which are all that is fetched");
            return Err(permanent(message));
        }
        // Addresses are not resolved.
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        match host.parse() {
            Ok(address) if !self.accepts_all && !is_public(address) => {
                Err(permanent(Inside(host.to_owned()).to_string()))
            }
            _ => Ok(uri),
        }
    }

    async fn get(&self, place: &Uri) -> Result<Response<Incoming>, TaskError> {
        let request = Request::get(place)
            .header(
                "user-agent",
                concat!("clip-image-processor/", env!("CARGO_PKG_VERSION")),
            )
            .header("accept", "image/*, */*;q=0.1")
            .body(Empty::new())
            .map_err(|error| {
                let message = format!("cannot ask for {place}: {error}");
                TaskError::permanent(Stage::Download, Cause::NotFound, message)
            })?;
        let transient = |cause: Cause, why: String| {
            TaskError::transient(Stage::Download, cause, format!("cannot get {place}: {why}"))
        };
        match tokio::time::timeout(HEAD_TIMEOUT, self.client()?.request(request)).await {
            Err(_) => {
                let why = format!("no answer in {} s", HEAD_TIMEOUT.as_secs());
                Err(transient(Cause::Timeout, why))
            }
            Ok(Err(error)) => Err(match inside(&error) {
                Some(inside) => {
                    let message = format!("cannot get {place}: {inside}");
                    TaskError::permanent(Stage::Download, Cause::AccessDenied, message)
                }
                None => transient(Cause::Unavailable, DisplayErrorContext(&error).to_string()),
            }),
            Ok(Ok(response)) => Ok(response),
        }
    }
}

fn inside<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a Inside> {
    std::iter::successors(Some(error), |error| error.source())
        .find_map(|error| error.downcast_ref())
}

/// A redirect's target. Servers send absolute URLs, or absolute paths.
fn resolve(base: &Uri, location: &str) -> String {
    let scheme = base.scheme_str().unwrap_or("https");
    let authority = base.authority().map_or("", |authority| authority.as_str());
    if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else if location.contains("://") {
        location.to_owned()
    } else {
        let folder = base
            .path()
            .rsplit_once('/')
            .map_or("", |(folder, _)| folder);
        format!("{scheme}://{authority}{folder}/{location}")
    }
}

fn refused(place: &Uri, status: StatusCode) -> TaskError {
    let message = format!("{place} answers {status}");
    match status {
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS => {
            TaskError::transient(Stage::Download, Cause::Unavailable, message)
        }
        status if status.is_server_error() => {
            TaskError::transient(Stage::Download, Cause::Unavailable, message)
        }
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            TaskError::permanent(Stage::Download, Cause::AccessDenied, message)
        }
        _ => TaskError::permanent(Stage::Download, Cause::NotFound, message),
    }
}

fn open_response(response: Response<Incoming>, url: String) -> OpenDocument {
    let text = |name| {
        response
            .headers()
            .get(name)
            .and_then(|value: &hyper::header::HeaderValue| value.to_str().ok())
            .map(str::to_owned)
    };
    let etag = text(ETAG).map(|etag| {
        let strong = etag.strip_prefix("W/").unwrap_or(&etag);
        strong.trim_matches('"').to_owned()
    });
    OpenDocument {
        content_type: text(CONTENT_TYPE),
        length: text(CONTENT_LENGTH).and_then(|length| length.parse().ok()),
        etag: etag.filter(|etag| !etag.is_empty()),
        body: sdk_body(SdkBody::from_body_1_x(response.into_body()), url),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use platform::Failure;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    /// A server that answers each path with a fixed response.
    async fn serve(answers: &'static [(&'static str, &'static str)]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut socket, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut request = vec![0; 4096];
                    let read = socket.read(&mut request).await.unwrap_or(0);
                    let text = String::from_utf8_lossy(&request[..read]).into_owned();
                    let path = text.split(' ').nth(1).unwrap_or_default();
                    let answer = answers.iter().find(|(known, _)| *known == path);
                    let answer = answer.map_or(
                        "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n",
                        |one| one.1,
                    );
                    let _ = socket.write_all(answer.as_bytes()).await;
                });
            }
        });
        format!("http://{address}")
    }

    async fn failure(https: &Https, url: &str) -> TaskError {
        match https.open(url).await {
            Ok(_) => panic!("{url} must not open"),
            Err(error) => error,
        }
    }

    #[tokio::test]
    async fn a_document_is_read_with_its_type_length_and_etag() {
        let base = serve(&[(
            "/a.png?x=1",
            "HTTP/1.1 200 OK\r\ncontent-type: image/png\r\netag: W/\"abc\"\r\ncontent-length: 5\r\n\r\nhello",
        )])
        .await;
        let document = Https::new(true)
            .open(&format!("{base}/a.png?x=1#top"))
            .await;
        let mut document = document.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(document.content_type.as_deref(), Some("image/png"));
        assert_eq!(document.length, Some(5));
        assert_eq!(document.etag.as_deref(), Some("abc"));
        assert_eq!(document.body.next().await.unwrap().unwrap(), "hello");
        assert!(document.body.next().await.is_none());
    }

    #[tokio::test]
    async fn redirects_are_followed_but_not_for_ever() {
        let base = serve(&[
            (
                "/old",
                "HTTP/1.1 302 Found\r\nlocation: /new\r\ncontent-length: 0\r\n\r\n",
            ),
            ("/new", "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"),
            (
                "/loop",
                "HTTP/1.1 302 Found\r\nlocation: loop\r\ncontent-length: 0\r\n\r\n",
            ),
            (
                "/away",
                "HTTP/1.1 302 Found\r\nlocation: file:///etc/passwd\r\ncontent-length: 0\r\n\r\n",
            ),
        ])
        .await;
        let https = Https::new(true);
        assert!(https.open(&format!("{base}/old")).await.is_ok());
        for path in ["/loop", "/away"] {
            let error = failure(&https, &format!("{base}{path}")).await;
            assert_eq!(error.failure, Failure::Permanent, "{error}");
        }
    }

    #[tokio::test]
    async fn the_status_tells_permanent_from_transient() {
        let base = serve(&[
            ("/busy", "HTTP/1.1 503 Slow\r\ncontent-length: 0\r\n\r\n"),
            ("/much", "HTTP/1.1 429 Slow\r\ncontent-length: 0\r\n\r\n"),
            ("/mine", "HTTP/1.1 403 No\r\ncontent-length: 0\r\n\r\n"),
        ])
        .await;
        let https = Https::new(true);
        for (path, expected) in [
            ("/busy", (Failure::Transient, Cause::Unavailable)),
            ("/much", (Failure::Transient, Cause::Unavailable)),
            ("/mine", (Failure::Permanent, Cause::AccessDenied)),
            ("/gone", (Failure::Permanent, Cause::NotFound)),
        ] {
            let error = failure(&https, &format!("{base}{path}")).await;
            assert_eq!((error.failure, error.cause), expected, "{path}");
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_transient() {
        let base = serve(&[("/cut", "HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhalf")]).await;
        let mut document = match Https::new(true).open(&format!("{base}/cut")).await {
            Ok(document) => document,
            Err(error) => panic!("{error}"),
        };
        let mut last = document.body.next().await;
        while let Some(Ok(_)) = last {
            last = document.body.next().await;
        }
        let error = last.expect("the body ends early").unwrap_err();
        assert_eq!(error.failure, Failure::Transient);
    }

    #[tokio::test]
    async fn nothing_but_https_is_fetched() {
        for url in [
            "http://example.com/a.png",
            "file:///etc/passwd",
            "ftp://x/y",
        ] {
            let error = failure(&Https::new(false), url).await;
            assert_eq!(error.failure, Failure::Permanent, "{url}");
        }
    }

    #[test]
    fn addresses_inside_the_network_are_known() {
        for inside in [
            "10.0.0.1",
            "172.31.0.2",
            "192.168.1.1",
            "127.0.0.1",
            "169.254.169.254",
            "169.254.170.2",
            "100.64.0.1",
            "0.0.0.0",
            "255.255.255.255",
            "198.18.0.1",
            "224.0.0.1",
            "::1",
            "::",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "fd00:ec2::254",
            "fe80::1",
            "2002:a00:1::",
        ] {
            assert!(!is_public(inside.parse().unwrap()), "{inside}");
        }
        for outside in [
            "8.8.8.8",
            "172.32.0.1",
            "100.128.0.1",
            "2600:9000::1",
            "64:ff9b::808:808",
        ] {
            assert!(is_public(outside.parse().unwrap()), "{outside}");
        }
    }

    #[tokio::test]
    async fn nothing_inside_the_network_is_fetched_by_address_name_or_redirect() {
        let https = Https::new(false);
        for url in [
            "https://169.254.169.254/latest/meta-data/",
            "https://[fd00:ec2::254]/latest/meta-data/",
            "https://10.0.0.5:8443/a.png",
            "https://localhost/a.png",
        ] {
            let error = failure(&https, url).await;
            assert_eq!(error.failure, Failure::Permanent, "{error}");
            assert!(error.to_string().contains("inside the network"), "{error}");
        }
        // Each hop is held against the same rule.
        let here = "https://example.com/a".parse().unwrap();
        for location in [
            "http://169.254.170.2/v2/credentials",
            "//169.254.169.254/",
            "https://[::1]/",
        ] {
            assert!(
                https.accept(&resolve(&here, location)).is_err(),
                "{location}"
            );
        }
    }
}
