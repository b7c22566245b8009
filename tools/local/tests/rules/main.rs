//! The rules of the local ECS and Auto Scaling, seen through AWS's own clients.

mod autoscaling;
mod common;
mod ecs;
mod shell_cloud;
