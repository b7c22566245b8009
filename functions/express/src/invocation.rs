//! One invocation as the worker's queue: its records are all there is to
//! receive, and what is acknowledged is what the answer does not name.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use aws_lambda_events::sqs::{BatchItemFailure, SqsBatchResponse, SqsEvent};
use platform::aws;
use tokio_util::sync::CancellationToken;
use worker::services::{Extension, LeaseError, Queue, Receipt, Received};

#[derive(Default)]
struct Records {
    waiting: Vec<Received>,
    /// The worker has not told of these what becomes of them.
    open: HashSet<Receipt>,
    /// Each message with its receipt, until it is acknowledged.
    left: Vec<(String, Receipt)>,
}

pub struct Invocation {
    sqs: Arc<dyn Queue>,
    /// How long a record stays hidden from others.
    visibility: Duration,
    records: Mutex<Records>,
    /// Cancelled once the fate of every record is known.
    ended: CancellationToken,
}

impl Invocation {
    /// The records of `event`, whose visibility `sqs` can change.
    pub fn new(event: SqsEvent, sqs: Arc<dyn Queue>, visibility: Duration) -> Self {
        let mut records = Records::default();
        for record in event.records {
            let (Some(message_id), Some(handle)) = (record.message_id, record.receipt_handle)
            else {
                continue;
            };
            let receipt = Receipt { queue: 0, handle };
            records.open.insert(receipt.clone());
            records.left.push((message_id.clone(), receipt.clone()));
            records.waiting.push(Received {
                message_id,
                receipt,
                body: record.body.unwrap_or_default(),
                receive_count: record
                    .attributes
                    .get("ApproximateReceiveCount")
                    .and_then(|count| count.parse().ok())
                    .unwrap_or(1),
            });
        }
        let ended = CancellationToken::new();
        if records.open.is_empty() {
            ended.cancel();
        }
        Self {
            sqs,
            visibility,
            records: Mutex::new(records),
            ended,
        }
    }

    pub fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// Gives everything that is left back at once.
    pub async fn give_up(&self) {
        let left = self.records().left.clone();
        let extensions: Vec<Extension> = left
            .into_iter()
            .map(|(_, receipt)| Extension {
                receipt,
                visibility: Duration::ZERO,
            })
            .collect();
        for result in self.extend(&extensions).await {
            if let Err(error) = result {
                tracing::warn!(reason = %error, "returning a message failed");
            }
        }
    }

    /// What Lambda is told: the messages that it must not delete.
    pub fn answer(&self) -> SqsBatchResponse {
        let mut answer = SqsBatchResponse::default();
        let left = self.records().left.clone();
        answer.batch_item_failures = left
            .into_iter()
            .map(|(message_id, _)| {
                let mut failure = BatchItemFailure::default();
                failure.item_identifier = message_id;
                failure
            })
            .collect();
        answer
    }

    fn records(&self) -> MutexGuard<'_, Records> {
        // Every critical section leaves it whole.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settle(&self, settled: impl Fn(&mut Records)) {
        let mut records = self.records();
        settled(&mut records);
        if records.open.is_empty() {
            self.ended.cancel();
        }
    }
}

#[async_trait]
impl Queue for Invocation {
    async fn receive(
        &self,
        _queue: usize,
        max: usize,
        _wait: Duration,
        _visibility: Duration,
    ) -> Result<Vec<Received>, aws::Error> {
        let received: Vec<Received> = {
            let waiting = &mut self.records().waiting;
            let count = max.min(waiting.len());
            waiting.drain(..count).collect()
        };
        if received.is_empty() {
            self.ended.cancelled().await;
        }
        Ok(received)
    }

    /// To be hidden for less than a lease is to be given back.
    async fn extend(&self, extensions: &[Extension]) -> Vec<Result<(), LeaseError>> {
        let results = self.sqs.extend(extensions).await;
        self.settle(|records| {
            for extension in extensions {
                if extension.visibility < self.visibility {
                    records.open.remove(&extension.receipt);
                }
            }
        });
        results
    }

    /// Nothing is called: Lambda deletes what the answer does not name.
    async fn acknowledge(&self, receipts: &[Receipt]) -> Vec<Result<(), LeaseError>> {
        self.settle(|records| {
            for receipt in receipts {
                records.open.remove(receipt);
                records.left.retain(|(_, left)| left != receipt);
            }
        });
        vec![Ok(()); receipts.len()]
    }
}
