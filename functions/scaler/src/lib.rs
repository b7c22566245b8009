//! Lambda: decides how many tasks and instances the backlog needs, and acts on it.
//!
//! `observe → plan → act`; the protocol is in `design.md` beside this crate.
//! [`plan`] is pure: what it decides can be read, tested and simulated without
//! any AWS. [`observe`] and [`act`] speak to AWS through one trait, [`aws::Aws`].

pub mod act;
pub mod aws;
pub mod config;
pub mod explain;
pub mod handler;
pub mod history;
pub mod memory;
pub mod observation;
pub mod observe;
mod planner;
pub mod policy;
mod sdk;

pub use observation::Observation;
pub use planner::{Action, Decision, Figures, LaunchCount, Plan, RUN_TASK_MAX_COUNT, plan};
pub use policy::{CapacityOption, Policy};
pub use sdk::SdkAws;
