//! What the processor can do, as types: code that is generic over them is compiled
//! once for each, and calls what suits without asking again.

use super::idct::{self, Place};

/// The steps that depend on the processor.
pub(super) trait Machine: Copy {
    /// The lowest bits of `bits`, in order, at the places of the ones of `mask`.
    fn deposit(self, bits: u64, mask: u64) -> u64;

    /// [`idct::transform`].
    fn transform(
        self,
        size: usize,
        coefficients: &[i16; 64],
        quantisers: &[u16; 64],
        is_flat: bool,
        place: &mut Place<'_>,
    );
}

/// Any x86-64.
#[derive(Clone, Copy)]
pub(super) struct Basic;

impl Machine for Basic {
    #[inline(always)]
    fn deposit(self, mut bits: u64, mut mask: u64) -> u64 {
        let mut placed = 0;
        while mask != 0 && bits != 0 {
            if bits & 1 == 1 {
                placed |= mask & mask.wrapping_neg();
            }
            bits >>= 1;
            mask &= mask - 1;
        }
        placed
    }

    #[inline(always)]
    fn transform(
        self,
        size: usize,
        coefficients: &[i16; 64],
        quantisers: &[u16; 64],
        is_flat: bool,
        place: &mut Place<'_>,
    ) {
        idct::transform(size, coefficients, quantisers, is_flat, place);
    }
}

#[cfg(test)]
thread_local! {
    /// Whether tests of this thread do without what the processor has.
    pub(super) static IS_BASIC: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// One with AVX2, BMI1, BMI2, LZCNT and POPCNT: every server since 2015.
#[derive(Clone, Copy)]
pub(super) struct Modern(());

impl Modern {
    /// `None` where the processor is not one.
    pub(super) fn detect() -> Option<Self> {
        #[cfg(test)]
        if IS_BASIC.get() {
            return None;
        }
        (std::arch::is_x86_feature_detected!("avx2")
            && std::arch::is_x86_feature_detected!("bmi1")
            && std::arch::is_x86_feature_detected!("bmi2")
            && std::arch::is_x86_feature_detected!("lzcnt")
            && std::arch::is_x86_feature_detected!("popcnt"))
        .then_some(Self(()))
    }
}

impl Machine for Modern {
    #[inline(always)]
    fn deposit(self, bits: u64, mask: u64) -> u64 {
        // SAFETY: there is no `Modern` but on a processor that has BMI2.
        unsafe { std::arch::x86_64::_pdep_u64(bits, mask) }
    }

    #[inline(always)]
    fn transform(
        self,
        size: usize,
        coefficients: &[i16; 64],
        quantisers: &[u16; 64],
        is_flat: bool,
        place: &mut Place<'_>,
    ) {
        // SAFETY: there is no `Modern` but on a processor that has AVX2.
        unsafe { idct::avx2::transform(size, coefficients, quantisers, is_flat, place) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_go_to_the_ones_of_the_mask_in_order() {
        assert_eq!(Basic.deposit(0b101, 0b1101_0000), 0b1001_0000);
        assert_eq!(Basic.deposit(!0, 0b1101_0000), 0b1101_0000);
        assert_eq!(Basic.deposit(0, !0), 0);
    }

    proptest! {
        #[test]
        fn the_instruction_deposits_the_same(bits: u64, mask: u64) {
            if let Some(modern) = Modern::detect() {
                prop_assert_eq!(modern.deposit(bits, mask), Basic.deposit(bits, mask));
            }
        }
    }
}
