//! From the component planes that libjpeg hands out to full-size colour planes:
//! its fancy upsampling and its YCbCr conversion, exactly, for the columns that
//! are wanted.

use std::arch::x86_64::*;

/// How a component becomes as large as the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Upsampling {
    /// It is.
    None,
    /// Twice as wide, by a triangle filter.
    FancyAcross,
    /// Twice as high, by a triangle filter.
    FancyDown,
    /// Both.
    FancyBoth,
    /// Each sample repeated.
    Repeat { across: usize, down: usize },
}

impl Upsampling {
    /// libjpeg's choice for factors `across` and `down` of a component that is
    /// `width` samples wide; `fine` where its blocks have more than one sample.
    pub(super) fn choose(across: usize, down: usize, width: usize, fine: bool) -> Self {
        match (across, down) {
            (1, 1) => Self::None,
            (2, 1) if fine && width > 2 => Self::FancyAcross,
            (1, 2) if fine => Self::FancyDown,
            (2, 2) if fine && width > 2 => Self::FancyBoth,
            _ => Self::Repeat { across, down },
        }
    }

    /// Whether rows above and below are looked at.
    pub(super) fn needs_context(self) -> bool {
        matches!(self, Self::FancyDown | Self::FancyBoth)
    }

    pub(super) fn factors(self) -> (usize, usize) {
        match self {
            Self::None => (1, 1),
            Self::FancyAcross => (2, 1),
            Self::FancyDown => (1, 2),
            Self::FancyBoth => (2, 2),
            Self::Repeat { across, down } => (across, down),
        }
    }

    /// The two source rows of output row `y`: the near one and, where there is a
    /// filter, the far one. `rows` is the component's height.
    pub(super) fn sources(self, y: usize, rows: usize) -> (usize, usize) {
        let (_, down) = self.factors();
        let near = (y / down).min(rows - 1);
        if !self.needs_context() {
            return (near, near);
        }
        let far = if y.is_multiple_of(2) {
            near.saturating_sub(1)
        } else {
            (near + 1).min(rows - 1)
        };
        (near, far)
    }

    /// Writes columns `first..end` of output row `y` to the same places of `out`.
    /// `width` is the component's own width.
    #[allow(clippy::too_many_arguments)]
    #[target_feature(enable = "avx2")]
    pub(super) fn row(
        self,
        near: &[u8],
        far: &[u8],
        y: usize,
        width: usize,
        (first, end): (usize, usize),
        sums: &mut [u16],
        out: &mut [u8],
    ) {
        match self {
            Self::None => out[first..end].copy_from_slice(&near[first..end]),
            Self::FancyDown => {
                let bias = if y.is_multiple_of(2) { 1 } else { 2 };
                let sources = near[first..end].iter().zip(&far[first..end]);
                for (target, (&near, &far)) in out[first..end].iter_mut().zip(sources) {
                    *target = ((u16::from(near) * 3 + u16::from(far) + bias) >> 2) as u8;
                }
            }
            Self::FancyAcross => {
                for (sum, &near) in sums[..width].iter_mut().zip(near) {
                    *sum = u16::from(near);
                }
                // With quarters instead of sixteenths the roundings are 1 and 2.
                across::<2, 1, 2>(sums, width, (first, end), out);
            }
            Self::FancyBoth => {
                let low = (first / 2).saturating_sub(1);
                let high = (end / 2 + 2).min(width);
                let sources = near[low..high].iter().zip(&far[low..high]);
                for (sum, (&near, &far)) in sums[low..high].iter_mut().zip(sources) {
                    *sum = u16::from(near) * 3 + u16::from(far);
                }
                across::<4, 8, 7>(sums, width, (first, end), out);
            }
            Self::Repeat { across, .. } => {
                for (x, target) in out[first..end].iter_mut().enumerate() {
                    *target = near[((first + x) / across).min(width - 1)];
                }
            }
        }
    }
}

/// Doubles a row of sums: three parts of the nearer and one of the further,
/// shifted by `SHIFT`, with `LEFT` and `RIGHT` added to round.
#[inline(always)]
fn across<const SHIFT: u32, const LEFT: u16, const RIGHT: u16>(
    sums: &[u16],
    width: usize,
    (first, end): (usize, usize),
    out: &mut [u8],
) {
    let last = width - 1;
    let low = (first / 2).max(1);
    let high = end.div_ceil(2).min(last);
    // The ends have no further neighbour: all four parts are their own.
    if first < 2 {
        out[0] = ((sums[0] * 4 + if SHIFT == 2 { 0 } else { LEFT }) >> SHIFT) as u8;
        out[1] = ((sums[0] * 3 + sums[1] + RIGHT) >> SHIFT) as u8;
    }
    if low < high {
        let here = &sums[low..high];
        let before = &sums[low - 1..high - 1];
        let after = &sums[low + 1..high + 1];
        let targets = out[low * 2..high * 2].chunks_exact_mut(2);
        for (((target, &here), &before), &after) in targets.zip(here).zip(before).zip(after) {
            target[0] = ((here * 3 + before + LEFT) >> SHIFT) as u8;
            target[1] = ((here * 3 + after + RIGHT) >> SHIFT) as u8;
        }
    }
    if end > last * 2 {
        out[last * 2] = ((sums[last] * 3 + sums[last - 1] + LEFT) >> SHIFT) as u8;
        if last * 2 + 1 < out.len() {
            out[last * 2 + 1] =
                ((sums[last] * 4 + if SHIFT == 2 { 0 } else { RIGHT }) >> SHIFT) as u8;
        }
    }
}

/// Luma and chroma to red, green and blue.
fn ycc_to_rgb_plain(luma: &mut [u8], cb: &mut [u8], cr: &mut [u8]) {
    const HALF: i32 = 1 << 15;
    for ((first, second), third) in luma.iter_mut().zip(cb).zip(cr) {
        let y = i32::from(*first);
        let (b, r) = (i32::from(*second) - 128, i32::from(*third) - 128);
        let red = y + ((91_881 * r + HALF) >> 16);
        let green = y + ((-22_554 * b - 46_802 * r + HALF) >> 16);
        let blue = y + ((116_130 * b + HALF) >> 16);
        (*first, *second, *third) = (
            red.clamp(0, 255) as u8,
            green.clamp(0, 255) as u8,
            blue.clamp(0, 255) as u8,
        );
    }
}

/// Converts luma and chroma to red, green and blue in place, sixteen pixels at a
/// time.
#[target_feature(enable = "avx2")]
pub(super) fn ycc_to_rgb(luma: &mut [u8], cb: &mut [u8], cr: &mut [u8]) {
    let length = luma.len().min(cb.len()).min(cr.len());
    let centre = _mm256_set1_epi16(128);
    let one = _mm256_set1_epi16(1);
    // What is left of the factors once whole multiples are taken out: 1.402 is
    // 1 + 26345/65536, 1.772 is 2 − 14942/65536, −0.71414 is −1 + 18734/65536.
    let red_factor = _mm256_set1_epi16(26_345);
    let blue_factor = _mm256_set1_epi16(-14_942);
    let green_factors = _mm256_set1_epi32((-22_554i32 & 0xffff) | (18_734 << 16));
    let half = _mm256_set1_epi32(1 << 15);
    let mut x = 0;
    while x + 16 <= length {
        // SAFETY: `x + 16` is within all three slices.
        let (y, b, r) = unsafe {
            let load =
                |from: &[u8]| _mm256_cvtepu8_epi16(_mm_loadu_si128(from.as_ptr().add(x).cast()));
            (load(luma), load(cb), load(cr))
        };
        let (b, r) = (_mm256_sub_epi16(b, centre), _mm256_sub_epi16(r, centre));
        let scaled = |chroma: __m256i, factor: __m256i| {
            let doubled = _mm256_mulhi_epi16(_mm256_add_epi16(chroma, chroma), factor);
            _mm256_srai_epi16::<1>(_mm256_add_epi16(doubled, one))
        };
        let red = _mm256_add_epi16(y, _mm256_add_epi16(r, scaled(r, red_factor)));
        let twice = _mm256_add_epi16(b, b);
        let blue = _mm256_add_epi16(y, _mm256_add_epi16(twice, scaled(b, blue_factor)));
        let part = |pairs: __m256i| {
            let sum = _mm256_madd_epi16(pairs, green_factors);
            _mm256_srai_epi32::<16>(_mm256_add_epi32(sum, half))
        };
        let green = _mm256_packs_epi32(
            part(_mm256_unpacklo_epi16(b, r)),
            part(_mm256_unpackhi_epi16(b, r)),
        );
        let green = _mm256_add_epi16(y, _mm256_sub_epi16(green, r));
        let narrow = |words: __m256i| {
            let bytes = _mm256_packus_epi16(words, words);
            _mm256_castsi256_si128(_mm256_permute4x64_epi64::<0b00_00_10_00>(bytes))
        };
        // SAFETY: as above.
        unsafe {
            _mm_storeu_si128(luma.as_mut_ptr().add(x).cast(), narrow(red));
            _mm_storeu_si128(cb.as_mut_ptr().add(x).cast(), narrow(green));
            _mm_storeu_si128(cr.as_mut_ptr().add(x).cast(), narrow(blue));
        }
        x += 16;
    }
    ycc_to_rgb_plain(&mut luma[x..], &mut cb[x..], &mut cr[x..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vector_colours_equal_plain_ones_for_every_chroma() {
        assert!(std::arch::is_x86_feature_detected!("avx2"));
        for luma in [0u8, 1, 77, 128, 200, 255] {
            let pairs = || (0..=255u8).flat_map(|cb| (0..=255u8).map(move |cr| (cb, cr)));
            let mut fast: [Vec<u8>; 3] = [
                vec![luma; 65_536],
                pairs().map(|(cb, _)| cb).collect(),
                pairs().map(|(_, cr)| cr).collect(),
            ];
            let mut plain = fast.clone();
            let [a, b, c] = &mut fast;
            // SAFETY: the processor has AVX2.
            unsafe { ycc_to_rgb(a, b, c) };
            let [a, b, c] = &mut plain;
            ycc_to_rgb_plain(a, b, c);
            assert_eq!(fast, plain);
        }
    }

    #[test]
    fn a_part_of_a_row_is_the_part_of_the_whole() {
        assert!(std::arch::is_x86_feature_detected!("avx2"));
        let near: Vec<u8> = (0..97u32).map(|x| (x * 37 % 256) as u8).collect();
        let far: Vec<u8> = (0..97u32).map(|x| (x * 91 % 256) as u8).collect();
        for how in [
            Upsampling::FancyAcross,
            Upsampling::FancyBoth,
            Upsampling::FancyDown,
            Upsampling::Repeat { across: 4, down: 1 },
        ] {
            let width = 97 * how.factors().0;
            let mut sums = vec![0; 200];
            let mut whole = vec![0; width];
            // SAFETY: the processor has AVX2.
            unsafe { how.row(&near, &far, 1, 97, (0, width), &mut sums, &mut whole) };
            for (first, end) in [(0, 5), (1, 2), (7, 60), (40, width - 1), (90, width)] {
                let mut part = vec![0; width];
                // SAFETY: the processor has AVX2.
                unsafe { how.row(&near, &far, 1, 97, (first, end), &mut sums, &mut part) };
                assert_eq!(
                    part[first..end],
                    whole[first..end],
                    "{how:?} {first}..{end}"
                );
            }
        }
    }
}
