//! The arithmetic that a bundle's graphs are compiled for.

use serde::{Deserialize, Serialize};

/// What weights and activations are stored and multiplied in. Inputs and outputs of the graphs are
/// the same in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32-bit floats: the reference's numbers, for CPUs.
    Fp32,
    /// 16-bit floats, for GPUs: half the memory and several times the speed there. Normalisation
    /// and softmax accumulate in 32 bits.
    Fp16,
    /// Opt-in, for CPUs with 8-bit dot products (AVX-VNNI, AVX-512 VNNI, AMX, ARM): the vision
    /// tower's block weights in 8 bits with one scale per output channel, activations quantised as
    /// they come, all else in 32 bits. Faster, and *not* the reference's numbers: see the crate's
    /// README for the measured error.
    Int8,
}

impl std::fmt::Display for Precision {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Precision::Fp32 => "fp32",
            Precision::Fp16 => "fp16",
            Precision::Int8 => "int8",
        })
    }
}
