//! Passes over a made-up dead-letter queue.

use std::collections::HashSet;
use std::sync::Mutex;

use regex_lite::Regex;

use super::letter::tests::letter;
use super::*;

/// A message in the made-up queue: the letter, and until when it is hidden.
struct Stored {
    letter: Letter,
    hidden_until: Instant,
}

#[derive(Default)]
struct FakeQueues {
    stored: Mutex<Vec<Stored>>,
    input: Mutex<Vec<String>>,
    /// In which order sends and deletions happened.
    log: Mutex<Vec<String>>,
    send_fails: HashSet<&'static str>,
    delete_fails: HashSet<&'static str>,
    /// A receive takes so long.
    slowness: Duration,
}

impl FakeQueues {
    fn with(letters: Vec<Letter>) -> Self {
        let stored = letters.into_iter().map(|letter| Stored {
            letter,
            hidden_until: Instant::now(),
        });
        Self {
            stored: Mutex::new(stored.collect()),
            ..Self::default()
        }
    }

    fn ids(&self) -> Vec<String> {
        let stored = self.stored.lock().unwrap();
        stored
            .iter()
            .map(|one| one.letter.fields.id.clone())
            .collect()
    }

    fn visible(&self) -> usize {
        let now = Instant::now();
        let stored = self.stored.lock().unwrap();
        stored.iter().filter(|one| one.hidden_until <= now).count()
    }
}

fn id_of(receipt: &str) -> &str {
    receipt
        .strip_prefix("receipt-")
        .expect("a receipt of these tests")
}

#[async_trait]
impl Queues for FakeQueues {
    async fn receive(&self) -> Result<Vec<Letter>, aws::Error> {
        tokio::time::sleep(self.slowness).await;
        let now = Instant::now();
        let mut stored = self.stored.lock().unwrap();
        let visible = stored.iter_mut().filter(|one| one.hidden_until <= now);
        let received = visible.take(MAX_BATCH).map(|one| {
            one.hidden_until = now + HOLD;
            one.letter.clone()
        });
        Ok(received.collect())
    }

    async fn hold(&self, receipts: &[&str], time: Duration) {
        assert!(receipts.len() <= MAX_BATCH);
        let mut stored = self.stored.lock().unwrap();
        for receipt in receipts {
            let found = stored.iter_mut().find(|one| one.letter.receipt == *receipt);
            found.expect("a stored message").hidden_until = Instant::now() + time;
        }
    }

    async fn send(&self, letters: &[&Letter]) -> Results {
        assert!(letters.len() <= MAX_BATCH);
        let send = |letter: &&Letter| {
            let id = letter.fields.id.as_str();
            if self.send_fails.contains(id) {
                return Err(
                    aws::Error::of_code("sqs:SendMessageBatch", "InternalError", "").into(),
                );
            }
            self.log.lock().unwrap().push(format!("send {id}"));
            self.input.lock().unwrap().push(letter.body.clone());
            Ok(())
        };
        letters.iter().map(send).collect()
    }

    async fn delete(&self, receipts: &[&str]) -> Results {
        assert!(receipts.len() <= MAX_BATCH);
        let delete = |receipt: &&str| {
            let id = id_of(receipt);
            if self.delete_fails.contains(id) {
                return Err(aws::Error::of_code(
                    "sqs:DeleteMessageBatch",
                    "ReceiptHandleIsInvalid",
                    "",
                )
                .into());
            }
            self.log.lock().unwrap().push(format!("delete {id}"));
            self.stored
                .lock()
                .unwrap()
                .retain(|one| one.letter.receipt != **receipt);
            Ok(())
        };
        receipts.iter().map(delete).collect()
    }
}

fn letters(count: usize) -> Vec<Letter> {
    (0..count)
        .map(|index| {
            let reason = if index % 2 == 0 {
                "AccessDenied"
            } else {
                "not a PNG"
            };
            letter(&format!("m{index}"), &[("RejectionReason", reason)])
        })
        .collect()
}

async fn go(queues: &FakeQueues, choice: Choice, action: Action, limit: Option<u64>) -> Report {
    run(queues, &choice, action, limit, &CancellationToken::new()).await
}

#[tokio::test(start_paused = true)]
async fn showing_sees_everything_once_and_leaves_everything_visible() {
    let mut queues = FakeQueues::with(letters(95));
    // Slow enough that the first messages would be visible again in between.
    queues.slowness = Duration::from_secs(30);
    let outcome = go(&queues, Choice::All, Action::Show, None).await;
    assert_eq!((outcome.counts.seen, outcome.counts.chosen), (95, 95));
    let ids: HashSet<&String> = outcome.chosen.iter().map(|one| &one.id).collect();
    assert_eq!(ids.len(), 95);
    assert_eq!(queues.visible(), 95);
}

#[tokio::test(start_paused = true)]
async fn chosen_ones_are_sent_first_and_deleted_then() {
    let queues = FakeQueues::with(letters(25));
    let choice = Choice::Reason(Regex::new("^Access").unwrap());
    let outcome = go(&queues, choice, Action::SendBack, None).await;
    let counts = outcome.counts;
    assert_eq!(
        (counts.seen, counts.chosen, counts.sent, counts.deleted),
        (25, 13, 13, 13)
    );
    assert_eq!(queues.input.lock().unwrap().len(), 13);
    assert_eq!((queues.ids().len(), queues.visible()), (12, 12));
    let log = queues.log.lock().unwrap();
    for id in ["m0", "m24"] {
        let at = |what: &str| log.iter().position(|line| *line == format!("{what} {id}"));
        assert!(at("send") < at("delete") && at("send").is_some(), "{log:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_sent_is_not_deleted() {
    let mut queues = FakeQueues::with(letters(5));
    queues.send_fails = HashSet::from(["m1"]);
    queues.delete_fails = HashSet::from(["m2"]);
    let outcome = go(&queues, Choice::All, Action::SendBack, None).await;
    let counts = outcome.counts;
    assert_eq!((counts.sent, counts.deleted, counts.failed), (4, 3, 2));
    assert_eq!(queues.ids(), ["m1", "m2"]);
    assert_eq!(queues.visible(), 2);
    let problems = outcome.problems.join("\n");
    assert!(problems.contains("m1 was not sent back"), "{problems}");
    assert!(
        problems.contains("m2 was sent back, but not deleted"),
        "{problems}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_cut_body_stays_where_it_can_be_looked_at() {
    let cut = letter(
        "m0",
        &[("RejectionReason", "r"), ("OriginalBytes", "300000")],
    );
    let queues = FakeQueues::with(vec![cut]);
    let outcome = go(&queues, Choice::All, Action::SendBack, None).await;
    assert_eq!((outcome.counts.cut, outcome.counts.sent), (1, 0));
    assert_eq!(queues.visible(), 1);
    let outcome = go(&queues, Choice::All, Action::Discard, None).await;
    assert_eq!(outcome.counts.deleted, 1);
    assert!(queues.ids().is_empty());
}

#[tokio::test(start_paused = true)]
async fn the_limit_is_on_what_is_chosen() {
    let queues = FakeQueues::with(letters(40));
    let choice = Choice::Reason(Regex::new("PNG").unwrap());
    let outcome = go(&queues, choice, Action::Discard, Some(7)).await;
    assert_eq!((outcome.counts.chosen, outcome.counts.deleted), (7, 7));
    assert_eq!((queues.ids().len(), queues.visible()), (33, 33));
}

#[tokio::test(start_paused = true)]
async fn a_stop_gives_back_what_is_held() {
    let queues = FakeQueues::with(letters(20));
    let stop = CancellationToken::new();
    stop.cancel();
    let outcome = run(&queues, &Choice::All, Action::SendBack, None, &stop).await;
    assert!(outcome.is_stopped && outcome.counts.sent == 0);
    assert_eq!(queues.visible(), 20);
}
