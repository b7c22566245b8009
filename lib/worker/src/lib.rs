//! What a worker does with messages: it embeds their images, publishes the
//! enriched events, and only then acknowledges. `design.md` beside this crate
//! is the protocol.
//!
//! `rules` decide and touch nothing; `adapters` are AWS, the engine, the
//! decoders and the disk behind the traits of `services`; `pipeline` is the
//! flow between them; `wiring` puts them together as the configuration says.

mod adapters;
pub mod config;
mod metrics;
mod pipeline;
mod rules;
pub mod services;
mod wiring;

pub use adapters::{bundle_cache, sqs::SqsQueue};
pub use metrics::Metrics;
pub use pipeline::{Ended, Loading, Summary, run as run_pipeline};
pub use rules::failure::{Cause, Failure, Fatal, Stage, TaskError};
pub use wiring::{connect, load, metrics};
