//! The pipeline on one machine: emulated AWS, ECS and Auto Scaling with their rules, and the demo.
