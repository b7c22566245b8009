//! Lambda: decides how many tasks and instances the backlog needs, and acts on it.
//!
//! `observe → plan → act`; the protocol is in `design.md` beside this crate.
//! The decision itself is the crate `planner`. [`observe`] and [`act`] speak to
//! AWS through one trait, [`aws::Aws`].

// A program's own parts, no library: their names say what they are.

pub mod act;
pub mod aws;
pub mod config;
pub mod handler;
pub mod observe;
mod sdk;

pub use sdk::SdkAws;
