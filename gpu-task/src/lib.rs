//! The worker: takes images from the queue, embeds them and publishes the enriched event.
