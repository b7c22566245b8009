//! Plain HTTP calls to the emulator, for what needs no SDK crate of its own.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use thiserror::Error;

/// No call to a program on this machine takes longer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A call that was not answered with 200.
#[derive(Debug, Error)]
#[error("{url}: {problem}")]
pub struct HttpError {
    url: String,
    problem: String,
}

/// Sends a request and answers the body of a 200.
pub(crate) async fn send(
    method: Method,
    url: &str,
    headers: &[(&str, &str)],
    body: String,
) -> Result<Bytes, HttpError> {
    let failed = |problem: String| HttpError {
        url: url.to_owned(),
        problem,
    };
    let mut request = Request::builder().method(method).uri(url);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| failed(error.to_string()))?;
    let client = Client::builder(TokioExecutor::new()).build_http::<Full<Bytes>>();
    let exchange = async {
        let response = client
            .request(request)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let status = response.status();
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(|error| failed(error.to_string()))?
            .to_bytes();
        if status.is_success() {
            Ok(body)
        } else {
            Err(failed(format!(
                "{status}: {}",
                String::from_utf8_lossy(&body)
            )))
        }
    };
    match tokio::time::timeout(TIMEOUT, exchange).await {
        Ok(result) => result,
        Err(_) => Err(failed(format!("no answer within {TIMEOUT:?}"))),
    }
}
