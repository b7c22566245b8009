//! The express lane: the worker of `worker`, run once for each invocation, so
//! that a few images need no GPU. `design.md` beside this crate tells how work
//! reaches it and what becomes of what it cannot do.

mod invocation;
mod lane;

pub use lane::Lane;
