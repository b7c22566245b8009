//! The project's commands: demo, test, bench and checks.
