//! Lambda: turns every arriving form of work into validated CloudEvents on
//! the input queue, and wakes the scaler.
//!
//! Deletions go straight to the outputs, and what is no image is rejected
//! here: neither costs a GPU.

mod config;
mod handler;
mod services;

pub use config::Config;
pub use handler::{Counts, Head, Intake, ServiceError, Services};
pub use services::AwsServices;
