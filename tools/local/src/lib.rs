//! The pipeline on one machine.
//!
//! - [`emulator`]: ECS and Auto Scaling with AWS's own rules, where a RUNNING
//!   task is a real `gpu-task` process;
//! - [`deployment`]: the pipeline of the template, deployed into these and into
//!   MiniStack;
//! - [`demo`]: the main job, shown as it goes.

pub mod demo;
pub mod deployment;
pub mod emulator;
mod process;
pub mod sdk;

pub use deployment::{Deployment, DeploymentOptions};
pub use emulator::cloud::{self, Cloud, CloudConfig};
