//! What the processor must have for the decoders here.

use super::idct::{self, Place};

/// The proof of a processor with AVX2, BMI1, BMI2, LZCNT and POPCNT: every server
/// since 2015. On others libjpeg decodes alone.
#[derive(Clone, Copy)]
pub(super) struct Modern(());

impl Modern {
    /// `None` where the processor is not one.
    pub(super) fn detect() -> Option<Self> {
        (std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("bmi1")
            && std::arch::is_x86_feature_detected!("bmi2")
            && std::arch::is_x86_feature_detected!("lzcnt")
            && std::arch::is_x86_feature_detected!("popcnt"))
        .then_some(Self(()))
    }

    /// The lowest bits of `bits`, in order, at the places of the ones of `mask`.
    #[inline(always)]
    pub(super) fn deposit(self, bits: u64, mask: u64) -> u64 {
        // SAFETY: there is no `Modern` but on a processor that has BMI2.
        unsafe { std::arch::x86_64::_pdep_u64(bits, mask) }
    }

    /// [`idct::transform`].
    #[inline(always)]
    pub(super) fn transform(
        self,
        size: usize,
        coefficients: &[i16; 64],
        quantisers: &[u16; 64],
        is_flat: bool,
        place: &mut Place<'_>,
    ) {
        #[cfg(any(test, fuzzing))]
        if size == 8 {
            super::compare::note_range(coefficients, quantisers);
        }
        // SAFETY: there is no `Modern` but on a processor that has AVX2.
        unsafe { idct::transform(size, coefficients, quantisers, is_flat, place) }
    }
}
