//! What the task decides, without any input or output.

pub mod batching;
pub mod budget;
pub mod failure;
pub mod holding;
pub mod ledger;
pub mod suspects;
