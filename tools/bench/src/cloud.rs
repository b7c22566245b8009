//! The emulated AWS: started here, filled here, read here.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use aws_sdk_sns::types::PublishBatchRequestEntry;
use aws_sdk_sqs::types::{
    DeleteMessageBatchRequestEntry, QueueAttributeName, SendMessageBatchRequestEntry,
};
use events::{CloudEvent, Document, EventType, S3Url};
use futures_util::{StreamExt, TryStreamExt, stream};
use ministack::{MiniStack, REGION};

const SOURCE: &str = "bench-source";

/// Requests at the same time while the emulator's own ceiling is measured.
const CEILING_LOOPS: usize = 4;

/// Bytes of the vectors written meanwhile: those of 512 numbers as JSON.
const CEILING_VECTOR_BYTES: usize = 6_000;

pub struct Cloud {
    _emulator: MiniStack,
    pub port: u16,
    pub endpoint: String,
    s3: aws_sdk_s3::Client,
    sqs: aws_sdk_sqs::Client,
    sns: aws_sdk_sns::Client,
    etags: std::sync::Mutex<BTreeMap<String, (String, u64)>>,
    runs: std::sync::atomic::AtomicUsize,
}

/// Queues and buckets of one run, and what lies in them.
pub struct Run {
    pub input_queue: String,
    pub dead_letters: String,
    pub topic: String,
    pub cache: String,
    /// Different documents among the messages.
    pub documents: usize,
    output_queue: String,
    /// Document URL by ETag: the reference names its vectors by ETag alone.
    by_etag: BTreeMap<String, String>,
}

/// What reached the queue behind the topic.
pub struct Published {
    /// Events, duplicates included.
    pub events: usize,
    /// Events whose message had one before.
    pub duplicates: usize,
}

impl Cloud {
    pub async fn start(ministack: &Path, logs: &Path) -> Result<Self> {
        let emulator = MiniStack::start(ministack, &logs.join("ministack.log"))?;
        let (port, endpoint) = (emulator.port(), emulator.endpoint().to_owned());
        let config = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .region(REGION)
            .endpoint_url(&endpoint)
            .http_client(
                platform::aws_config()
                    .await
                    .http_client()
                    .context("an HTTP client")?,
            )
            .test_credentials()
            .load()
            .await;
        let cloud = Self {
            _emulator: emulator,
            port,
            s3: platform::s3_client(&config),
            sqs: aws_sdk_sqs::Client::new(&config),
            sns: aws_sdk_sns::Client::new(&config),
            endpoint,
            etags: std::sync::Mutex::default(),
            runs: std::sync::atomic::AtomicUsize::new(0),
        };
        cloud.s3.create_bucket().bucket(SOURCE).send().await?;
        Ok(cloud)
    }

    /// Puts the files of a set into the source bucket.
    pub async fn upload(&self, set: &str, files: &[PathBuf]) -> Result<()> {
        stream::iter(files)
            .map(|path| async move {
                let key = key(set, path);
                let body = tokio::fs::read(path).await?;
                let size = body.len() as u64;
                let put = self
                    .s3
                    .put_object()
                    .bucket(SOURCE)
                    .key(&key)
                    .content_type("image/jpeg")
                    .body(body.into())
                    .send()
                    .await?;
                let etag = put.e_tag().unwrap_or_default().trim_matches('"').to_owned();
                self.etags.lock().unwrap().insert(key, (etag, size));
                anyhow::Ok(())
            })
            .buffer_unordered(4)
            .try_collect()
            .await
    }

    /// Fresh queues and a fresh cache bucket, and one message per image.
    pub async fn prepare(&self, set: &str, files: &[PathBuf], count: usize) -> Result<Run> {
        let number = self.runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dead_letters = self.queue(&format!("dead-{number}")).await?;
        let input_queue = self.queue(&format!("input-{number}")).await?;
        let output_queue = self.queue(&format!("output-{number}")).await?;
        let topic = self
            .sns
            .create_topic()
            .name(format!("topic-{number}"))
            .send()
            .await?;
        let topic = topic.topic_arn().context("a topic ARN")?.to_owned();
        let output_arn = self
            .attribute(&output_queue, QueueAttributeName::QueueArn)
            .await?;
        self.sns
            .subscribe()
            .topic_arn(&topic)
            .protocol("sqs")
            .endpoint(output_arn)
            .attributes("RawMessageDelivery", "true")
            .send()
            .await?;
        let cache = format!("bench-cache-{number}");
        self.s3.create_bucket().bucket(&cache).send().await?;
        let etags = self.etags.lock().unwrap().clone();
        let mut by_etag = BTreeMap::new();
        let mut bodies = Vec::new();
        for index in 0..count {
            let key = key(set, &files[index % files.len()]);
            let (etag, size) = &etags[&key];
            let url = S3Url::new(SOURCE, &key).to_string();
            by_etag.insert(etag.clone(), url.clone());
            let event = CloudEvent::new(
                EventType::DocumentCreated,
                Document {
                    url,
                    mime_type: "image/jpeg".to_owned(),
                    size: Some((*size).into()),
                    etag: Some(etag.clone()),
                },
            );
            bodies.push(event.to_json());
        }
        stream::iter(bodies.chunks(10))
            .map(|chunk| self.send(&input_queue, chunk))
            .buffer_unordered(4)
            .try_collect::<()>()
            .await?;
        Ok(Run {
            input_queue,
            dead_letters,
            topic,
            cache,
            output_queue,
            documents: count.min(files.len()),
            by_etag,
        })
    }

    async fn send(&self, queue: &str, bodies: &[String]) -> Result<()> {
        let mut request = self.sqs.send_message_batch().queue_url(queue);
        for (index, body) in bodies.iter().enumerate() {
            let entry = SendMessageBatchRequestEntry::builder()
                .id(index.to_string())
                .message_body(body)
                .build()?;
            request = request.entries(entry);
        }
        let response = request.send().await?;
        if !response.failed().is_empty() {
            bail!("{} messages were not sent", response.failed().len());
        }
        Ok(())
    }

    async fn queue(&self, name: &str) -> Result<String> {
        let created = self
            .sqs
            .create_queue()
            .queue_name(name)
            .attributes(QueueAttributeName::VisibilityTimeout, "60")
            .send()
            .await?;
        Ok(created.queue_url().context("a queue URL")?.to_owned())
    }

    async fn attribute(&self, queue: &str, name: QueueAttributeName) -> Result<String> {
        let response = self
            .sqs
            .get_queue_attributes()
            .queue_url(queue)
            .attribute_names(name.clone())
            .send()
            .await?;
        let value = response.attributes().and_then(|all| all.get(&name));
        Ok(value.context("the attribute")?.clone())
    }

    /// Messages that are visible or in flight.
    pub async fn backlog(&self, queue: &str) -> Result<u64> {
        let visible = QueueAttributeName::ApproximateNumberOfMessages;
        let in_flight = QueueAttributeName::ApproximateNumberOfMessagesNotVisible;
        let visible: u64 = self.attribute(queue, visible).await?.parse()?;
        let in_flight: u64 = self.attribute(queue, in_flight).await?.parse()?;
        Ok(visible + in_flight)
    }

    /// Whether any vector is there.
    pub async fn has_vector(&self, run: &Run) -> Result<bool> {
        let listed = self
            .s3
            .list_objects_v2()
            .bucket(&run.cache)
            .max_keys(1)
            .send()
            .await?;
        Ok(!listed.contents().is_empty())
    }

    /// All vectors of a run, by the URL of their document.
    pub async fn vectors(&self, run: &Run) -> Result<BTreeMap<String, Vec<f32>>> {
        let mut keys = Vec::new();
        let mut pages = self
            .s3
            .list_objects_v2()
            .bucket(&run.cache)
            .into_paginator()
            .send();
        while let Some(page) = pages.next().await {
            keys.extend(page?.contents().iter().filter_map(|one| one.key.clone()));
        }
        stream::iter(keys)
            .map(|key| async move {
                let object = self
                    .s3
                    .get_object()
                    .bucket(&run.cache)
                    .key(&key)
                    .send()
                    .await?;
                let owner = object
                    .metadata()
                    .and_then(|all| all.get(events::vector::DOCUMENT_METADATA))
                    .cloned();
                let name = key.rsplit('/').next().unwrap_or_default();
                let url = owner
                    .or_else(|| run.by_etag.get(name).cloned())
                    .with_context(|| format!("{key} belongs to no image"))?;
                let body = object.body.collect().await?.into_bytes();
                anyhow::Ok((url, serde_json::from_slice(&body)?))
            })
            .buffer_unordered(8)
            .try_collect()
            .await
    }

    /// Counts the events that reached the queue behind the topic.
    pub async fn published(&self, run: &Run) -> Result<Published> {
        let mut ids = BTreeSet::new();
        let mut events = 0;
        loop {
            let received = self.receive(&run.output_queue).await?;
            if received.is_empty() {
                break;
            }
            for message in received {
                let event = CloudEvent::parse(message.body().unwrap_or_default().as_bytes())?;
                ids.insert(event.id);
                events += 1;
            }
        }
        Ok(Published {
            events,
            duplicates: events - ids.len(),
        })
    }

    async fn receive(&self, queue: &str) -> Result<Vec<aws_sdk_sqs::types::Message>> {
        let received = self
            .sqs
            .receive_message()
            .queue_url(queue)
            .max_number_of_messages(10)
            .visibility_timeout(3600)
            .send()
            .await?;
        Ok(received.messages.unwrap_or_default())
    }

    /// Images per second that the emulator serves to a worker that computes
    /// nothing: receive, get the image, put a vector, publish, delete.
    pub async fn ceiling(&self, run: &Run, images: usize) -> Result<f64> {
        let started = std::time::Instant::now();
        futures_util::future::try_join_all((0..CEILING_LOOPS).map(|_| self.pass_through(run)))
            .await?;
        Ok(images as f64 / started.elapsed().as_secs_f64())
    }

    async fn pass_through(&self, run: &Run) -> Result<()> {
        loop {
            let messages = self.receive(&run.input_queue).await?;
            if messages.is_empty() {
                return Ok(());
            }
            let copies = messages.iter().map(|message| self.copy_one(run, message));
            futures_util::future::try_join_all(copies).await?;
            let mut publish = self.sns.publish_batch().topic_arn(&run.topic);
            let mut delete = self.sqs.delete_message_batch().queue_url(&run.input_queue);
            for (index, message) in messages.iter().enumerate() {
                publish = publish.publish_batch_request_entries(
                    PublishBatchRequestEntry::builder()
                        .id(index.to_string())
                        .message(message.body().unwrap_or_default())
                        .build()?,
                );
                delete = delete.entries(
                    DeleteMessageBatchRequestEntry::builder()
                        .id(index.to_string())
                        .receipt_handle(message.receipt_handle().unwrap_or_default())
                        .build()?,
                );
            }
            publish.send().await?;
            delete.send().await?;
        }
    }

    async fn copy_one(&self, run: &Run, message: &aws_sdk_sqs::types::Message) -> Result<()> {
        let event = CloudEvent::parse(message.body().unwrap_or_default().as_bytes())?;
        let url: S3Url = event.data.document.url.parse()?;
        let object = self
            .s3
            .get_object()
            .bucket(&url.bucket)
            .key(&url.key)
            .send()
            .await?;
        object.body.collect().await?;
        self.s3
            .put_object()
            .bucket(&run.cache)
            .key(&url.key)
            .body(vec![b' '; CEILING_VECTOR_BYTES].into())
            .send()
            .await?;
        Ok(())
    }
}

fn key(set: &str, path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!("{set}/{name}")
}
