//! Discrete-event simulation of SQS, Auto Scaling, ECS and GPU tasks, driven
//! by the scaler's real planner and by models of what users would have
//! instead. `README.md` beside this crate names the models' sources.

pub mod days;
pub mod evaluate;
pub mod models;
pub mod oracle;
pub mod ours;
pub mod plot;
pub mod stats;
pub mod table;
pub mod trace;
pub mod world;
