//! The redrive against an emulated AWS: the real program.

mod common;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::convert::Infallible;
use std::process::Output;
use std::rc::Rc;
use std::time::Duration;

use aws_sdk_sqs::types::MessageAttributeValue;
use common::{Emulator, json, text};
use delivery::{DeadLetters, OutputConfig, Rejection};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use intake::{AwsServices, Intake};
use serde_json::{Value, json};

/// More than one receive brings.
const DENIED: usize = 23;

fn body(index: usize) -> String {
    format!(
        r#"{{ "type": "document-created", "data": {{"chainId": "6ebf76e4-f70c-440c-98f9-3e3e7eb34c79",
        "source": {{"url": "s3://b/{index}.png", "type": "image/png"}},
        "document": {{"url": "s3://b/{index}.png", "type": "image/png"}}}} }}"#
    )
}

fn rejection(index: usize, reason: &str) -> Rejection {
    Rejection {
        stage: "download".to_owned(),
        reason: reason.to_owned(),
        by: "gpu-task".to_owned(),
        object: Some(format!("s3://b/{index}.png")),
        event: None,
    }
}

/// Rejected messages as the programs of this pipeline write them, one that
/// SQS moved by itself, and one whose body was cut.
async fn fill(emulator: &Emulator, dead_letters: &str) {
    let mut rejected: Vec<(String, Rejection)> = (0..DENIED)
        .map(|index| (body(index), rejection(index, "GetObject: AccessDenied")))
        .collect();
    rejected.push((body(100), rejection(100, "not a PNG: truncated")));
    rejected.push(("x".repeat(300_000), rejection(101, "not JSON")));
    let queue = DeadLetters::new(&emulator.sdk(), dead_letters);
    for result in queue.reject_all(&rejected).await {
        result.expect("the rejection is taken");
    }
    let sqs = aws_sdk_sqs::Client::new(&emulator.sdk());
    let moved = sqs
        .send_message()
        .queue_url(dead_letters)
        .message_body(body(102));
    moved.send().await.expect("a message");
}

fn bodies(messages: &[Value]) -> BTreeSet<String> {
    let body = |message: &Value| message["Body"].as_str().map(str::to_owned);
    messages.iter().filter_map(body).collect()
}

#[tokio::test]
async fn the_redrive_against_an_emulated_aws() {
    let emulator = Emulator::start(|_| ());
    let dead_letters = emulator.queue("dead").await;
    let input = emulator.queue("input").await;
    fill(&emulator, &dead_letters).await;
    let total = DENIED + 3;
    let run = |more: &[&str]| {
        let common = [
            "redrive",
            "--dead-letter-queue",
            &dead_letters,
            "--queue",
            &input,
        ];
        emulator.run(&[&common, more].concat())
    };

    // Showing consumes nothing, and everything is visible again at once.
    for _ in 0..2 {
        let shown = run(&["--json"]);
        let result = json(&shown);
        assert_eq!(result["counts"]["seen"], total, "{}", text(&shown));
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for message in result["messages"].as_array().expect("messages") {
            *reasons
                .entry(message["reason"].as_str().expect("a reason"))
                .or_default() += 1;
            assert!(message["ageSeconds"].is_u64() && message["receiveCount"].is_u64());
        }
        assert_eq!(reasons["GetObject: AccessDenied"], DENIED);
        assert_eq!(reasons.len(), 4, "{reasons:?}");
        let stored = emulator.messages(&dead_letters);
        assert_eq!(stored.len(), total);
        assert!(stored.iter().all(|message| message["IsVisible"] == true));
    }
    let table = text(&run(&["--list", "--limit", "3"]));
    assert!(
        table.contains("REASON") && table.contains("3 chosen"),
        "{table}"
    );
    let moved = text(&run(&["--reason", "moved here by SQS", "--dry-run"]));
    assert!(
        moved.contains("s3://b/102.png") && moved.contains("1 chosen"),
        "{moved}"
    );

    // Chosen by reason: their bodies go back as they were, without attributes.
    let sent = run(&["--reason", "Access(Denied)?$"]);
    assert!(sent.status.success(), "{}", text(&sent));
    assert!(
        text(&sent).contains(&format!("{DENIED} sent back")),
        "{}",
        text(&sent)
    );
    let arrived = emulator.messages(&input);
    assert_eq!(arrived.len(), DENIED);
    assert_eq!(bodies(&arrived), (0..DENIED).map(body).collect());
    assert!(
        arrived
            .iter()
            .all(|message| message["MessageAttributes"] == json!({}))
    );
    assert_eq!(emulator.messages(&dead_letters).len(), 3);

    // Chosen by id.
    let rest = json(&run(&["--json"]));
    let truncated = rest["messages"]
        .as_array()
        .and_then(|all| {
            all.iter()
                .find(|one| one["reason"] == "not a PNG: truncated")
        })
        .expect("it stays");
    let id = truncated["id"].as_str().expect("an id");
    assert!(run(&["--ids", id]).status.success());
    assert!(bodies(&emulator.messages(&input)).contains(&body(100)));

    // A cut body stays; the one that SQS moved goes.
    let all = run(&["--all"]);
    assert!(
        text(&all).contains("1 sent back, 1 stay, they are not whole"),
        "{}",
        text(&all)
    );
    let left = emulator.messages(&dead_letters);
    assert_eq!(left.len(), 1);
    assert!(left[0]["MessageAttributes"]["RejectionReason"].is_object());

    // Discarding needs a yes.
    let refused = run(&["--all", "--delete"]);
    assert_eq!(refused.status.code(), Some(2), "{}", text(&refused));
    assert_eq!(emulator.messages(&dead_letters).len(), 1);
    assert!(run(&["--all", "--delete", "--yes"]).status.success());
    assert!(emulator.messages(&dead_letters).is_empty());
    assert_eq!(emulator.messages(&input).len(), DENIED + 2);

    let nowhere = format!("{dead_letters}-gone");
    let failed = emulator.run(&["redrive", "--dead-letter-queue", &nowhere]);
    assert_eq!(failed.status.code(), Some(1), "{}", text(&failed));
    assert!(
        text(&failed).contains("NonExistentQueue"),
        "{}",
        text(&failed)
    );
}

/// Lambda's Invoke API in front of functions of this process: intake's own
/// code, and whatever else a name may lead to.
struct Functions {
    intakes: HashMap<&'static str, Intake<AwsServices>>,
}

impl Functions {
    /// Serves until the test ends; answers the endpoint. Intake's futures stay
    /// on the thread that they begin on, as in Lambda's runtime.
    fn serve(self) -> String {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let endpoint = format!("http://{}", listener.local_addr().expect("an address"));
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            tokio::task::LocalSet::new().block_on(&runtime, self.accept(listener));
        });
        endpoint
    }

    async fn accept(self, listener: std::net::TcpListener) {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a socket");
        let functions = Rc::new(self);
        while let Ok((stream, _)) = listener.accept().await {
            let functions = Rc::clone(&functions);
            tokio::task::spawn_local(async move {
                let serve = service_fn(|request| functions.invoke(request));
                let connection = hyper::server::conn::http1::Builder::new();
                // A client that hangs up is none of the test's business.
                let _ = connection
                    .serve_connection(TokioIo::new(stream), serve)
                    .await;
            });
        }
    }

    async fn invoke(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<Full<Bytes>>, Infallible> {
        let path = request.uri().path().to_owned();
        let name = path
            .strip_prefix("/2015-03-31/functions/")
            .and_then(|rest| rest.strip_suffix("/invocations"))
            .unwrap_or_else(|| panic!("{path} is no invocation"));
        assert_eq!(
            request.headers()["x-amz-invocation-type"],
            "RequestResponse"
        );
        let Some(intake) = self.intakes.get(name) else {
            let answer = json!({"verdict": "the queue is empty"});
            return Ok(Response::new(Full::from(answer.to_string())));
        };
        let body = request.into_body().collect().await.expect("a body");
        let payload: Value = serde_json::from_slice(&body.to_bytes()).expect("JSON");
        let mut response = Response::builder();
        let answer = match intake.handle(&payload).await {
            Ok((answer, _)) => answer,
            Err(error) => {
                response = response.header("x-amz-function-error", "Unhandled");
                json!({"errorMessage": error.to_string(), "errorType": "&ServiceError"})
            }
        };
        let response = response.body(Full::from(answer.to_string()));
        Ok(response.expect("a response"))
    }
}

/// Lambda's record of an invocation of intake that failed for good.
fn record(payload: Option<Value>) -> String {
    let mut record = json!({
        "version": "1.0",
        "timestamp": "2026-05-01T10:00:00.000Z",
        "requestContext": {
            "requestId": "b7a3b9c4-0d4f-4f0e-9d63-6f1c0c9b6f11",
            "functionArn": "arn:aws:lambda:eu-west-1:000000000000:function:intake:$LATEST",
            "condition": "RetriesExhausted",
            "approximateInvokeCount": 3,
        },
        "responseContext": {"statusCode": 200, "executedVersion": "$LATEST", "functionError": "Unhandled"},
        "responsePayload": {"errorMessage": "SendMessageBatch: no such queue", "errorType": "&ServiceError"},
    });
    if let Some(payload) = payload {
        record["requestPayload"] = payload;
    }
    record.to_string()
}

/// What EventBridge sends for an object.
fn object_event(detail_type: &str, key: &str) -> Value {
    json!({
        "version": "0", "id": "17793124-05d4-b198-2fde-7ededc63b103",
        "detail-type": detail_type, "source": "aws.s3", "account": "000000000000",
        "time": "2026-05-01T10:00:00Z", "region": "eu-west-1",
        "resources": ["arn:aws:s3:::photos"],
        "detail": {"version": "0", "bucket": {"name": "photos"}, "object": {"key": key}},
    })
}

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR";

#[tokio::test]
async fn what_intake_could_not_take_goes_back_through_intake() {
    let emulator = Emulator::start(|buckets| {
        for (bucket, key, content) in [
            ("photos", "a.png", PNG),
            ("photos", "nameless", PNG),
            ("photos", "notes.txt", b"no image"),
            ("cache", "unrelated", b""),
        ] {
            std::fs::create_dir_all(buckets.join(bucket)).expect("a folder");
            std::fs::write(buckets.join(bucket).join(key), content).expect("a file");
        }
    });
    let failures = emulator.queue("intake-failures").await;
    let input = emulator.queue("input").await;
    let dead_letters = emulator.queue("dead").await;
    let output = emulator.queue("output").await;

    let intake = |input: &str| {
        let config = intake::Config {
            input_queue_url: input.to_owned(),
            dead_letter_queue_url: dead_letters.clone(),
            scaler_function_name: None,
            wake_interval: Duration::from_secs(5),
            cache_bucket: "cache".to_owned(),
            cache_prefix: "clip-image-processor".to_owned(),
            model_name: None,
            outputs: OutputConfig {
                topic_arn: None,
                event_bus: None,
                queue_url: Some(output.clone()),
            },
        };
        Intake::new(AwsServices::new(&emulator.sdk(), config), Duration::ZERO)
    };
    let functions = Functions {
        intakes: HashMap::from([
            ("intake", intake(&input)),
            ("broken", intake(&format!("{input}-gone"))),
        ]),
    };
    let endpoint = functions.serve();
    let run = |more: &[&str]| -> Output {
        let common = ["redrive", "--dead-letter-queue", &failures];
        let mut command = emulator.clip_ops(&[&common, more].concat());
        command.env("AWS_ENDPOINT_URL_LAMBDA", &endpoint);
        command.output().expect("the program runs")
    };

    // A record of three creations, one of a deletion, one that lost its
    // payload, and an event that EventBridge could not deliver.
    let created: Vec<Value> = ["a.png", "nameless", "notes.txt"]
        .map(|key| {
            json!({"eventName": "ObjectCreated:Put", "s3": {
                "bucket": {"name": "photos"}, "object": {"key": key},
            }})
        })
        .to_vec();
    let sqs = aws_sdk_sqs::Client::new(&emulator.sdk());
    let send = |body: String| sqs.send_message().queue_url(&failures).message_body(body);
    for body in [
        record(Some(json!({ "Records": created }))),
        record(Some(object_event("Object Deleted", "old.png"))),
        record(None),
    ] {
        send(body).send().await.expect("a message");
    }
    let mut undelivered = send(object_event("Object Created", "a.png").to_string());
    for (name, value) in [
        (
            "RULE_ARN",
            "arn:aws:events:eu-west-1:000000000000:rule/images",
        ),
        ("ERROR_CODE", "NO_PERMISSIONS"),
        ("ERROR_MESSAGE", "not authorized"),
    ] {
        let value = MessageAttributeValue::builder()
            .data_type("String")
            .string_value(value)
            .build()
            .expect("an attribute");
        undelivered = undelivered.message_attributes(name, value);
    }
    undelivered.send().await.expect("a message");

    // Everything is shown with its reason and its object.
    let shown = json(&run(&["--json"]));
    assert_eq!(shown["counts"]["seen"], 4, "{shown}");
    let messages = shown["messages"].as_array().expect("messages");
    let find = |by: &str, object: &str| {
        let found = messages
            .iter()
            .find(|one| one["by"] == by && one["object"].as_str().unwrap_or_default() == object);
        found.unwrap_or_else(|| panic!("nothing by {by} about {object:?} in {shown}"))
    };
    let three = find("Lambda", "s3://photos/a.png and 2 more");
    assert_eq!(
        three["reason"],
        "RetriesExhausted after 3 invocations: SendMessageBatch: no such queue"
    );
    find("Lambda", "s3://photos/old.png");
    find("EventBridge", "s3://photos/a.png");
    assert_eq!(find("Lambda", "")["isEmptyRecord"], true);

    // To the input queue a record does not go: no task could read it. What
    // intake fails on again stays, and so does what another function answers.
    let id = three["id"].as_str().expect("an id");
    for (options, code, words) in [
        (
            &["--ids", id, "--queue", &input][..],
            1,
            "--intake FUNCTION",
        ),
        (
            &["--ids", id, "--intake", "broken"],
            1,
            "the output queue failed 5 times: sqs:SendMessageBatch",
        ),
        (
            &["--all", "--intake", "scaler"],
            1,
            "is it the right function?",
        ),
        (&["--all", "--intake", "intake", "--dry-run"], 0, "4 chosen"),
    ] {
        let ran = run(options);
        assert_eq!(ran.status.code(), Some(code), "{}", text(&ran));
        assert!(text(&ran).contains(words), "{words} in {}", text(&ran));
        let left = emulator.messages(&failures);
        assert_eq!(left.len(), 4);
        assert!(left.iter().all(|message| message["IsVisible"] == true));
        assert!(emulator.messages(&input).is_empty());
    }

    // Through intake: images become work, whatever their names; the deletion
    // goes to the output; what is no image goes nowhere.
    let sent = run(&["--all", "--intake", "intake"]);
    assert!(sent.status.success(), "{}", text(&sent));
    assert!(
        text(&sent).contains("3 sent back, 1 stay, they are not whole"),
        "{}",
        text(&sent)
    );
    let mut urls: Vec<String> = bodies(&emulator.messages(&input))
        .iter()
        .map(|body| {
            let event: Value = serde_json::from_str(body).expect("an event");
            assert_eq!(event["type"], "document-created");
            assert_eq!(event["data"]["document"]["type"], "image/png");
            event["data"]["document"]["url"]
                .as_str()
                .expect("a URL")
                .to_owned()
        })
        .collect();
    urls.sort_unstable();
    assert_eq!(
        urls,
        [
            "s3://photos/a.png",
            "s3://photos/a.png",
            "s3://photos/nameless"
        ]
    );
    let published = bodies(&emulator.messages(&output));
    assert_eq!(published.len(), 1);
    assert!(
        published
            .iter()
            .all(|body| body.contains("document-deleted"))
    );
    assert!(emulator.messages(&dead_letters).is_empty());
    let left = emulator.messages(&failures);
    assert_eq!(left.len(), 1);
    assert!(
        !left[0]["Body"]
            .as_str()
            .expect("a body")
            .contains("requestPayload")
    );
}
