//! Discrete-event simulation of SQS, Auto Scaling, ECS and GPU tasks, driven
//! by the scaler's real planner and by models of what users would have
//! instead. `README.md` beside this crate names the models' sources.

// A program's own parts, no library: their names say what they are.

pub mod days;
pub mod evaluate;
pub mod models;
pub mod oracle;
pub mod ours;
pub mod plot;
pub mod table;
pub mod tally;
pub mod trace;
pub mod world;
