//! The HTTP door of the local ECS and Auto Scaling: one port for both, told
//! apart by the protocol (ECS names its operation in a header, Auto Scaling in
//! the form body).

use std::{collections::BTreeMap, convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use chrono::Utc;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use uuid::Uuid;

use super::{
    autoscaling,
    cloud::{ApiCall, ApiFaultKind, Cloud, state::CALLS_KEPT},
    ecs::{self, Refusal},
    xml::Xml,
};

/// What ECS's requests carry before the operation's name.
const ECS_TARGET: &str = "AmazonEC2ContainerServiceV20141113.";
/// The namespace of Auto Scaling's answers.
const AUTOSCALING_NAMESPACE: &str = "http://autoscaling.amazonaws.com/doc/2011-01-01/";
/// No request of these APIs is near this size (bytes).
const MAX_REQUEST_BYTES: usize = 4 << 20;

/// Serves both APIs on a free port of 127.0.0.1 until the cloud is shut down.
pub(crate) async fn serve(cloud: &Cloud) -> std::io::Result<SocketAddr> {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    let address = listener.local_addr()?;
    let cancel = cloud.inner.cancel.clone();
    let runners = cloud.inner.runners.clone();
    // The server holds the cloud weakly: a handle that is dropped ends it.
    let weak = std::sync::Arc::downgrade(&cloud.inner);
    cloud.inner.runners.spawn(async move {
        loop {
            let accepted = tokio::select! {
                () = cancel.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else { continue };
            let weak = weak.clone();
            let cancel = cancel.clone();
            runners.spawn(async move {
                let service = service_fn(move |request| {
                    let weak = weak.clone();
                    async move {
                        let answer = match weak.upgrade() {
                            Some(inner) => answer(&Cloud { inner }, request).await,
                            None => {
                                text(StatusCode::SERVICE_UNAVAILABLE, "text/plain", String::new())
                            }
                        };
                        Ok::<_, Infallible>(answer)
                    }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                tokio::select! {
                    () = cancel.cancelled() => {}
                    // A client that goes away in mid-request is the client's affair.
                    _ = connection => {}
                }
            });
        }
    });
    Ok(address)
}

async fn answer(cloud: &Cloud, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let target = request
        .headers()
        .get("x-amz-target")
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    let body = match Limited::new(request.into_body(), MAX_REQUEST_BYTES)
        .collect()
        .await
    {
        Ok(body) => body.to_bytes(),
        Err(error) => {
            return text(
                StatusCode::PAYLOAD_TOO_LARGE,
                "text/plain",
                error.to_string(),
            );
        }
    };
    match target {
        Some(target) => ecs_answer(cloud, &target, &body).await,
        None => autoscaling_answer(cloud, &body).await,
    }
}

/// The fault that hits a call, as an answer of its API: an error instead of
/// carrying it out, or what is answered although it was carried out.
async fn strike(
    cloud: &Cloud,
    operation: &str,
    throttle: &str,
    internal: &str,
) -> Result<Option<Refusal>, Refusal> {
    let internal_error = Refusal {
        status: 500,
        ..Refusal::client(internal, "An internal error occurred.")
    };
    match cloud.inner.faults.strike(operation) {
        None => Ok(None),
        Some(ApiFaultKind::Throttle) => Err(Refusal::client(throttle, "Rate exceeded")),
        Some(ApiFaultKind::ServerError) => Err(internal_error),
        Some(ApiFaultKind::AnswerLost) => Ok(Some(internal_error)),
        Some(ApiFaultKind::Refused { code, message }) => Err(Refusal::client(&code, message)),
        Some(ApiFaultKind::Slow(delay)) => {
            tokio::time::sleep(delay).await;
            Ok(None)
        }
    }
}

/// Carries a call out unless a fault keeps it from that.
fn carry_out<T>(
    struck: Result<Option<Refusal>, Refusal>,
    call: impl FnOnce() -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let lost = struck?;
    let done = call();
    lost.map_or(done, Err)
}

fn record(cloud: &Cloud, operation: &str, request: Value, error: Option<&Refusal>) {
    let call = ApiCall {
        at: Utc::now(),
        operation: operation.to_owned(),
        request,
        error: error.map(|error| error.code.clone()),
    };
    let mut state = cloud.lock();
    if state.calls.len() == CALLS_KEPT {
        state.calls.pop_front();
    }
    state.calls.push_back(call);
}

async fn ecs_answer(cloud: &Cloud, target: &str, body: &[u8]) -> Response<Full<Bytes>> {
    let operation = target.strip_prefix(ECS_TARGET).unwrap_or(target);
    let request: Value = serde_json::from_slice(body).unwrap_or_else(|_| json!({}));
    let struck = strike(cloud, operation, "ThrottlingException", "ServerException").await;
    let result = carry_out(struck, || ecs::call(cloud, operation, &request));
    record(cloud, operation, request, result.as_ref().err());
    match result {
        Ok(answer) => amz_json(StatusCode::OK, None, &answer),
        Err(error) => {
            let mut shape = error.extra.clone();
            shape.insert("__type".into(), json!(error.code));
            shape.insert("message".into(), json!(error.message));
            let status =
                StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            amz_json(status, Some(&error.code), &Value::Object(shape))
        }
    }
}

async fn autoscaling_answer(cloud: &Cloud, body: &[u8]) -> Response<Full<Bytes>> {
    let mut parameters: BTreeMap<String, String> = form_urlencoded::parse(body)
        .map(|(name, value)| (name.into_owned(), value.into_owned()))
        .collect();
    let operation = parameters.remove("Action").unwrap_or_default();
    parameters.remove("Version");
    let struck = strike(cloud, &operation, "Throttling", "InternalFailure").await;
    let result = carry_out(struck, || autoscaling::call(cloud, &operation, &parameters));
    record(cloud, &operation, json!(parameters), result.as_ref().err());
    let request_id = Uuid::new_v4().to_string();
    let (status, root, content) = match result {
        Ok(answer) => {
            let mut xml = Xml::new();
            let inner = answer.into_string();
            xml.text("RequestId", &request_id);
            let metadata = xml.into_string();
            let content = format!(
                "<{operation}Result>{inner}</{operation}Result><ResponseMetadata>{metadata}</ResponseMetadata>"
            );
            (StatusCode::OK, format!("{operation}Response"), content)
        }
        Err(error) => {
            let mut xml = Xml::new();
            xml.element("Error", |xml| {
                xml.text(
                    "Type",
                    if error.status < 500 {
                        "Sender"
                    } else {
                        "Receiver"
                    },
                );
                xml.text("Code", &error.code);
                xml.text("Message", &error.message);
            });
            xml.text("RequestId", &request_id);
            let status =
                StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            (status, "ErrorResponse".to_owned(), xml.into_string())
        }
    };
    text(
        status,
        "text/xml",
        format!("<{root} xmlns=\"{AUTOSCALING_NAMESPACE}\">{content}</{root}>"),
    )
}

fn amz_json(status: StatusCode, error: Option<&str>, body: &Value) -> Response<Full<Bytes>> {
    let mut response = text(status, "application/x-amz-json-1.1", body.to_string());
    if let Some(value) = error.and_then(|error| error.parse().ok()) {
        response.headers_mut().insert("x-amzn-errortype", value);
    }
    response
}

fn text(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        header::HeaderValue::from_static(content_type),
    );
    if let Ok(id) = Uuid::new_v4().to_string().parse() {
        headers.insert("x-amzn-requestid", id);
    }
    response
}
