//! The HTTP door of the local ECS and Auto Scaling: one port for both, told
//! apart by the protocol (ECS names its operation in a header, Auto Scaling in
//! the form body).

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use chrono::Utc;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response, StatusCode, body::Incoming, header, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use uuid::Uuid;

use super::{
    autoscaling,
    cloud::{ApiCall, ApiFaultKind, Cloud, state::CALLS_KEPT},
    ecs::{self, Answer, Refusal},
    xml,
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

/// One of the two APIs: how it carries out a call, and what it calls its errors.
struct Api {
    call: fn(&Cloud, &str, &Value) -> Answer,
    throttled: &'static str,
    internal: &'static str,
}

const ECS: Api = Api {
    call: ecs::call,
    throttled: "ThrottlingException",
    internal: "ServerException",
};

const AUTOSCALING: Api = Api {
    call: autoscaling::call,
    throttled: "Throttling",
    internal: "InternalFailure",
};

impl Api {
    /// Carries a call out, unless a fault keeps it from that, and records it.
    async fn answer(&self, cloud: &Cloud, operation: &str, request: Value) -> Answer {
        let carry_out = || (self.call)(cloud, operation, &request);
        let internal_error = || Refusal {
            status: 500,
            ..Refusal::client(self.internal, "An internal error occurred.")
        };
        let answer = match cloud.inner.faults.strike(operation) {
            None => carry_out(),
            Some(ApiFaultKind::Throttle) => Err(Refusal::client(self.throttled, "Rate exceeded")),
            Some(ApiFaultKind::ServerError) => Err(internal_error()),
            Some(ApiFaultKind::AnswerLost) => {
                let _ = carry_out();
                Err(internal_error())
            }
            Some(ApiFaultKind::Refused { code, message }) => Err(Refusal::client(&code, message)),
            Some(ApiFaultKind::Slow(delay)) => {
                tokio::time::sleep(delay).await;
                carry_out()
            }
        };
        let call = ApiCall {
            at: Utc::now(),
            operation: operation.to_owned(),
            request,
            error: answer.as_ref().err().map(|error| error.code.clone()),
        };
        let mut state = cloud.lock();
        if state.calls.len() == CALLS_KEPT {
            state.calls.pop_front();
        }
        state.calls.push_back(call);
        answer
    }
}

async fn ecs_answer(cloud: &Cloud, target: &str, body: &[u8]) -> Response<Full<Bytes>> {
    let operation = target.strip_prefix(ECS_TARGET).unwrap_or(target);
    let request: Value = serde_json::from_slice(body).unwrap_or_else(|_| json!({}));
    match ECS.answer(cloud, operation, request).await {
        Ok(answer) => amz_json(StatusCode::OK, None, &answer),
        Err(error) => {
            let mut shape = error.extra.clone();
            shape.insert("__type".into(), json!(error.code));
            shape.insert("message".into(), json!(error.message));
            amz_json(status_of(&error), Some(&error.code), &Value::Object(shape))
        }
    }
}

async fn autoscaling_answer(cloud: &Cloud, body: &[u8]) -> Response<Full<Bytes>> {
    let mut request: Map<String, Value> = form_urlencoded::parse(body)
        .map(|(name, value)| (name.into_owned(), json!(value)))
        .collect();
    let operation = request.remove("Action").unwrap_or_default();
    let operation = operation.as_str().unwrap_or_default();
    request.remove("Version");
    let answer = AUTOSCALING.answer(cloud, operation, Value::Object(request));
    let request_id = Uuid::new_v4().to_string();
    let (status, root, content) = match answer.await {
        Ok(result) => {
            // Clients want the result before the rest.
            let result = xml::write(&json!({ format!("{operation}Result"): result }));
            let rest = json!({"ResponseMetadata": {"RequestId": request_id}});
            let content = result + &xml::write(&rest);
            (StatusCode::OK, format!("{operation}Response"), content)
        }
        Err(error) => {
            let kind = if error.status < 500 {
                "Sender"
            } else {
                "Receiver"
            };
            let content = json!({
                "Error": {"Type": kind, "Code": error.code, "Message": error.message},
                "RequestId": request_id,
            });
            (
                status_of(&error),
                "ErrorResponse".to_owned(),
                xml::write(&content),
            )
        }
    };
    text(
        status,
        "text/xml",
        format!("<{root} xmlns=\"{AUTOSCALING_NAMESPACE}\">{content}</{root}>"),
    )
}

fn status_of(error: &Refusal) -> StatusCode {
    StatusCode::from_u16(error.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
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
