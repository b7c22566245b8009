//! How many tasks and instances the backlog needs: [`plan`] is a pure function
//! of what one run of the scaler observes and what the user wants. It can be
//! read, tested, replayed and simulated without any AWS; the protocol around
//! it is in `functions/scaler/design.md`.

pub mod explain;
pub mod history;
pub mod observation;
mod plan;
mod policy;
pub mod streak;

pub use observation::Observation;
pub use plan::{Action, Decision, Figures, LaunchCount, Plan, RUN_TASK_MAX_COUNT, plan};
pub use policy::{CapacityOption, Policy};
