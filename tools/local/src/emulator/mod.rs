//! The emulated part of AWS that is our own: ECS and EC2 Auto Scaling with
//! their rules, and the events that they send.

mod autoscaling;
pub mod cloud;
pub mod ecs;
pub(crate) mod router;
mod server;
mod xml;
