//! The pipeline on one machine.
//!
//! - [`cloud`]: ECS and Auto Scaling with AWS's own rules, where a RUNNING task
//!   is a real `gpu-task` process; served over HTTP by [`Cloud::serve`];
//! - [`ecs`], [`autoscaling`]: the rules of the two APIs;
//! - [`emulator`]: MiniStack as a child process;
//! - [`template`]: the SAM template, resolved;
//! - [`deployment`]: the pipeline of that template, deployed into the two;
//! - [`demo`]: the main job, shown as it goes;
//! - [`process`]: children that cannot outlive this program.

mod autoscaling;
pub mod cloud;
pub mod demo;
pub mod deployment;
pub mod ecs;
pub mod emulator;
mod http;
pub mod process;
mod router;
pub mod sdk;
mod server;
pub mod template;
mod xml;

pub use cloud::{Cloud, CloudConfig};
pub use deployment::{Deployment, DeploymentOptions};
pub use http::HttpError;
