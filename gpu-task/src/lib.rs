//! The worker: takes images from the queue, embeds them and publishes the
//! enriched event. `design.md` beside this crate is its protocol.
//!
//! `rules` decide and touch nothing; `adapters` are AWS, the engine, the
//! decoders and the disk behind the traits of `services`; `pipeline` is the
//! flow between them.

mod adapters;
mod app;
pub mod config;
mod metrics;
mod pipeline;
mod rules;
pub mod services;

pub use adapters::bundle_cache;
pub use app::run;
pub use metrics::Metrics;
pub use pipeline::{Ended, Loading, Summary, run as run_pipeline};
pub use rules::failure::{Cause, Failure, Fatal, Stage, TaskError};
