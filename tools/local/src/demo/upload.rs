//! The demo's uploads, some at a time.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use events::ImageType;
use tokio::sync::mpsc;

use super::{files::InputFile, tally::Tally};
use crate::{
    Deployment,
    deployment::{DeployError, SOURCE_BUCKET},
    sdk::sent,
};

/// Uploads at a time: enough to keep intake busy on two cores.
const PARALLEL_UPLOADS: usize = 8;

/// A file's place in the tally, when it was uploaded, and why not.
pub(super) type Uploaded = (usize, Instant, Result<(), DeployError>);

pub(super) fn start(pipeline: &Deployment, tally: &Tally) -> mpsc::UnboundedReceiver<Uploaded> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let files = tally.files.iter().map(|file| file.input.clone());
    let queue: Vec<(usize, InputFile)> = files.enumerate().collect();
    let queue = Arc::new(Mutex::new(queue.into_iter()));
    for _ in 0..PARALLEL_UPLOADS {
        let (s3, sender, queue) = (pipeline.s3.clone(), sender.clone(), queue.clone());
        tokio::spawn(async move {
            let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            while let Some((index, file)) = next() {
                let result = upload(&s3, &file).await;
                // The demo was given up: nobody waits for the rest.
                if sender.send((index, Instant::now(), result)).is_err() {
                    return;
                }
            }
        });
    }
    receiver
}

async fn upload(s3: &aws_sdk_s3::Client, file: &InputFile) -> Result<(), DeployError> {
    let content = tokio::fs::read(&file.path).await;
    // As an ordinary uploader does: the type by the name.
    let content_type = ImageType::from_name(&file.key).map(|kind| kind.mime().to_owned());
    let put = s3
        .put_object()
        .bucket(SOURCE_BUCKET)
        .key(&file.key)
        .set_content_type(content_type)
        .body(content.map_err(DeployError::file(&file.path))?.into());
    sent("uploading it", put.send()).await?;
    Ok(())
}
