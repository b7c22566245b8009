//! Stands in for the CUDA libraries where there is no GPU: the real CUDA provider of ONNX Runtime
//! loads it under their names, and does all that it does on a T4, except that kernels are counted
//! and compute nothing.
//!
//! - Device memory is host memory that only copies may touch: its addresses are `PROT_NONE`, so a
//!   program that reads a device pointer dies of it, as it would be wrong on a GPU.
//! - A copy of pixels to the device is remembered, and the copy of the embeddings back is filled with
//!   samples of those pixels, row by row: whoever gets a row can see whose image it belongs to.
//! - [`fault`] lets a call fail as a GPU would.
//!
//! Structures and symbols are those of CUDA 13.0 and cuDNN 9; values that programs get mean nothing.
//! [`settings`] lists the environment variables, [`counters`] what a run leaves behind.

// Every function is called by C under the contract of its CUDA manual page, and is named as there.
#![allow(
    non_snake_case,
    unsafe_op_in_unsafe_fn,
    clippy::missing_safety_doc,
    clippy::undocumented_unsafe_blocks,
    clippy::too_many_arguments
)]

mod answers;
mod counters;
mod cublas;
mod cudnn;
mod driver;
mod fault;
mod memory;
mod runtime;
mod settings;
