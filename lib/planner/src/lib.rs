//! How many tasks and instances the backlog needs: [`plan`] is a pure function
//! of what one run of the scaler observes and what the user wants. It can be
//! read, tested, replayed and simulated without any AWS; the protocol around
//! it is in `functions/scaler/design.md`.

#![warn(missing_docs)]

pub mod boot;
pub mod cadence;
mod decide;
pub mod explain;
pub mod history;
pub mod lane;
pub mod observation;
mod offer;
mod plan;
mod policy;
pub mod spent;
pub mod streak;
pub mod worker;

pub use decide::plan;
pub use observation::Observation;
pub use plan::{
    Action, Decision, Figures, LaunchCount, LaunchCountError, Plan, RUN_TASK_MAX_COUNT,
};
pub use policy::{CapacityOption, LanePolicy, Policy};
