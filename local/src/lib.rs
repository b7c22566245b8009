//! The pipeline on one machine.
//!
//! - [`cloud`]: ECS and Auto Scaling with AWS's own rules, where a RUNNING task
//!   is a real `gpu-task` process; served over HTTP by [`Cloud::serve`];
//! - [`ecs`], [`autoscaling`]: the rules of the two APIs;
//! - [`process`]: children that cannot outlive this program.

mod autoscaling;
pub mod cloud;
pub mod ecs;
pub mod process;
pub mod sdk;
mod server;
mod xml;

pub use cloud::{Cloud, CloudConfig};
