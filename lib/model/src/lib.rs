//! Compiles CLIP weights into the ONNX bundle that the task loads, and runs it.
//!
//! [`checkpoint`] reads published weights, [`synthesize`] makes seeded ones, [`towers`] compiles
//! both into ONNX graphs, [`bundle`] is what lies on disk, and [`engine`] runs it.

#![warn(missing_docs)]

pub mod architecture;
pub mod bench;
pub mod build;
pub mod bundle;
pub mod checkpoint;
mod cuda;
pub mod engine;
pub mod fetch;
pub mod files;
pub mod labels;
mod onnx;
mod precision;
pub mod synthesize;
pub mod tokenizer;
mod towers;
mod widen;

pub use architecture::Architecture;
pub use bundle::{Bundle, BundleError, Manifest, WeightsOrigin};
pub use labels::Labels;
pub use precision::Precision;
pub use towers::blocks;
