//! EventBridge's part that the emulator has no door for: `PutEvents` takes no
//! event whose source begins with `aws.` (there as on AWS), so the events of
//! the local ECS and Auto Scaling are routed here. The rules, their patterns
//! and their targets are the emulator's own, matched by its TestEventPattern.
//!
//! Lambda's side of an asynchronous invocation is kept too: events for one
//! function wait in a queue and run one after the other, as they do with a
//! reserved concurrency of 1; throttled ones are tried again while they are young.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use aws_sdk_lambda::{error::ProvideErrorMetadata, primitives::Blob};
use serde_json::Value;
use tokio::{
    sync::{broadcast, mpsc},
    task::JoinHandle,
};
use tracing::{debug, warn};

use crate::{
    cloud::Cloud,
    sdk::{self, CallFailed, sent},
};

/// The rules are asked for again after this time: tests add some.
const RULES_FRESH: Duration = Duration::from_secs(2);
/// Between two attempts at a throttled function.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// A throttled event is given up after this time, as the template's invoke
/// configuration of the scaler has it.
const EVENT_AGE_LIMIT: Duration = Duration::from_secs(60);

struct Rule {
    pattern: String,
    targets: Vec<String>,
}

struct Router {
    events: aws_sdk_eventbridge::Client,
    lambda: aws_sdk_lambda::Client,
    sqs: aws_sdk_sqs::Client,
    endpoint: String,
    rules: Vec<Rule>,
    read_at: Option<Instant>,
    functions: HashMap<String, mpsc::UnboundedSender<(Instant, String)>>,
}

/// Routes the cloud's events until the cloud is shut down.
pub(crate) fn start(cloud: &Cloud, emulator_endpoint: &str) -> JoinHandle<()> {
    let config = sdk::config(emulator_endpoint);
    let mut router = Router {
        events: aws_sdk_eventbridge::Client::new(&config),
        lambda: aws_sdk_lambda::Client::new(&config),
        sqs: aws_sdk_sqs::Client::new(&config),
        endpoint: emulator_endpoint.to_owned(),
        rules: Vec::new(),
        read_at: None,
        functions: HashMap::new(),
    };
    let mut events = cloud.subscribe();
    let cancel = cloud.inner.cancel.clone();
    let region = cloud.region().to_owned();
    tokio::spawn(async move {
        loop {
            let event = tokio::select! {
                () = cancel.cancelled() => return,
                event = events.recv() => event,
            };
            match event {
                Ok(event) => router.route(&event.envelope(&region)).await,
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    warn!(missed, "events were not routed")
                }
                Err(broadcast::error::RecvError::Closed) => return,
            }
        }
    })
}

impl Router {
    async fn route(&mut self, event: &Value) {
        if self.read_at.is_none_or(|at| at.elapsed() > RULES_FRESH) {
            match self.read_rules().await {
                Ok(rules) => {
                    self.rules = rules;
                    self.read_at = Some(Instant::now());
                }
                Err(error) => warn!(%error, "the old rules stay"),
            }
        }
        let text = event.to_string();
        let mut targets = Vec::new();
        for rule in &self.rules {
            let matched = self
                .events
                .test_event_pattern()
                .event_pattern(&rule.pattern)
                .event(&text)
                .send()
                .await;
            match matched {
                Ok(answer) if answer.result() => targets.extend(rule.targets.iter().cloned()),
                Ok(_) => {}
                Err(error) => {
                    warn!(problem = %error.into_service_error(), "a pattern cannot be tested")
                }
            }
        }
        for target in targets {
            self.deliver(&target, &text).await;
        }
    }

    async fn read_rules(&self) -> Result<Vec<Rule>, CallFailed> {
        let mut rules = Vec::new();
        let mut token = None;
        loop {
            let list = self.events.list_rules().set_next_token(token);
            let page = sent("listing rules", list.send()).await?;
            for rule in page.rules() {
                let enabled = rule.state().is_none_or(|state| state.as_str() == "ENABLED");
                let (Some(name), Some(pattern), true) =
                    (rule.name(), rule.event_pattern(), enabled)
                else {
                    continue;
                };
                let list = self.events.list_targets_by_rule().rule(name);
                let targets = sent("listing targets", list.send()).await?;
                let targets = targets
                    .targets()
                    .iter()
                    .map(|target| target.arn().to_owned())
                    .collect();
                rules.push(Rule {
                    pattern: pattern.to_owned(),
                    targets,
                });
            }
            token = page.next_token().map(str::to_owned);
            if token.is_none() {
                return Ok(rules);
            }
        }
    }

    async fn deliver(&mut self, target: &str, event: &str) {
        // arn:aws:lambda:region:account:function:name, arn:aws:sqs:region:account:name
        let parts: Vec<&str> = target.split(':').collect();
        match parts[..] {
            [_, _, "lambda", _, _, "function", name, ..] => self.enqueue(name, event),
            [_, _, "sqs", _, account, name] => {
                let url = format!("{}/{account}/{name}", self.endpoint);
                if let Err(error) = self
                    .sqs
                    .send_message()
                    .queue_url(url)
                    .message_body(event)
                    .send()
                    .await
                {
                    warn!(target, problem = %error.into_service_error(), "an event was not delivered");
                }
            }
            _ => warn!(target, "no such target is served locally"),
        }
    }

    fn enqueue(&mut self, function: &str, event: &str) {
        let queue = self
            .functions
            .entry(function.to_owned())
            .or_insert_with(|| {
                let (sender, receiver) = mpsc::unbounded_channel();
                tokio::spawn(run_one_by_one(
                    self.lambda.clone(),
                    function.to_owned(),
                    receiver,
                ));
                sender
            });
        // The other end lives as long as this one.
        let _ = queue.send((Instant::now(), event.to_owned()));
    }
}

async fn run_one_by_one(
    lambda: aws_sdk_lambda::Client,
    function: String,
    mut queue: mpsc::UnboundedReceiver<(Instant, String)>,
) {
    while let Some((arrived, event)) = queue.recv().await {
        loop {
            let call = lambda
                .invoke()
                .function_name(&function)
                .payload(Blob::new(event.clone().into_bytes()));
            match call.send().await {
                Ok(answer) => {
                    if let Some(error) = answer.function_error() {
                        let payload = answer
                            .payload()
                            .map(|blob| String::from_utf8_lossy(blob.as_ref()).into_owned());
                        warn!(function, error, payload, "the function failed on an event");
                    }
                    break;
                }
                Err(error) => {
                    let error = error.into_service_error();
                    let throttled = error.is_too_many_requests_exception();
                    if !throttled || arrived.elapsed() > EVENT_AGE_LIMIT {
                        debug!(function, code = error.code(), "an event was given up");
                        break;
                    }
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }
}
