//! The worker: takes images from the queue, embeds them and publishes the
//! enriched event. `design.md` beside this crate is its protocol.

pub mod app;
pub mod batching;
pub mod bundle_cache;
pub mod config;
pub mod documents;
pub mod failure;
pub mod holding;
pub mod ledger;
pub mod memory;
pub mod model;
pub mod outside;
pub mod pipeline;
pub mod prepare;
pub mod queue;
pub mod services;
pub mod sqs;
pub mod stats;
