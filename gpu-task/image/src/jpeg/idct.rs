//! The accurate integer inverse DCT ("islow") of eight by eight coefficients, in
//! SSE2, which every x86-64 has. It stands in for libjpeg-turbo's assembly,
//! which needs an assembler at build time, and gives the same bytes, also where
//! corrupt data overflows: the same sixteen-bit products and saturations.

use std::arch::x86_64::*;
use std::sync::OnceLock;

/// Fraction bits of the constants.
const CONST_BITS: i32 = 13;

/// Fraction bits kept between the passes.
const PASS1_BITS: i32 = 2;

const F_0_298: i16 = 2446;
const F_0_390: i16 = 3196;
const F_0_541: i16 = 4433;
const F_0_765: i16 = 6270;
const F_0_899: i16 = 7373;
const F_1_175: i16 = 9633;
const F_1_501: i16 = 12299;
const F_1_847: i16 = 15137;
const F_1_961: i16 = 16069;
const F_2_053: i16 = 16819;
const F_2_562: i16 = 20995;
const F_3_072: i16 = 25172;

/// `a · first + b · second` for eight lanes, as two halves of four.
#[derive(Clone, Copy)]
struct Wide(__m128i, __m128i);

#[inline(always)]
fn products(low: __m128i, high: __m128i, first: i16, second: i16) -> Wide {
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        let pair = _mm_set1_epi32(i32::from(first as u16) | i32::from(second) << 16);
        Wide(_mm_madd_epi16(low, pair), _mm_madd_epi16(high, pair))
    }
}

#[inline(always)]
fn add(a: Wide, b: Wide) -> Wide {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { Wide(_mm_add_epi32(a.0, b.0), _mm_add_epi32(a.1, b.1)) }
}

#[inline(always)]
fn sub(a: Wide, b: Wide) -> Wide {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { Wide(_mm_sub_epi32(a.0, b.0), _mm_sub_epi32(a.1, b.1)) }
}

/// Sixteen-bit lanes to 32 bits, times two to the power of `CONST_BITS`.
#[inline(always)]
fn widen(a: __m128i) -> Wide {
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        let zero = _mm_setzero_si128();
        Wide(
            _mm_srai_epi32::<{ 16 - CONST_BITS }>(_mm_unpacklo_epi16(zero, a)),
            _mm_srai_epi32::<{ 16 - CONST_BITS }>(_mm_unpackhi_epi16(zero, a)),
        )
    }
}

/// Rounds, shifts and saturates back to sixteen bits.
#[inline(always)]
fn narrow<const SHIFT: i32>(a: Wide) -> __m128i {
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        let half = _mm_set1_epi32(1 << (SHIFT - 1));
        _mm_packs_epi32(
            _mm_srai_epi32::<SHIFT>(_mm_add_epi32(a.0, half)),
            _mm_srai_epi32::<SHIFT>(_mm_add_epi32(a.1, half)),
        )
    }
}

/// Eight one-dimensional transforms, one in each lane.
#[inline(always)]
fn pass<const SHIFT: i32>(v: [__m128i; 8]) -> [__m128i; 8] {
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        // Even part.
        let (low, high) = (
            _mm_unpacklo_epi16(v[2], v[6]),
            _mm_unpackhi_epi16(v[2], v[6]),
        );
        let tmp3 = products(low, high, F_0_541 + F_0_765, F_0_541);
        let tmp2 = products(low, high, F_0_541, F_0_541 - F_1_847);
        let tmp0 = widen(_mm_add_epi16(v[0], v[4]));
        let tmp1 = widen(_mm_sub_epi16(v[0], v[4]));
        let (tmp10, tmp13) = (add(tmp0, tmp3), sub(tmp0, tmp3));
        let (tmp11, tmp12) = (add(tmp1, tmp2), sub(tmp1, tmp2));
        // Odd part.
        let (z3, z4) = (_mm_add_epi16(v[7], v[3]), _mm_add_epi16(v[5], v[1]));
        let (low, high) = (_mm_unpacklo_epi16(z3, z4), _mm_unpackhi_epi16(z3, z4));
        let z3 = products(low, high, F_1_175 - F_1_961, F_1_175);
        let z4 = products(low, high, F_1_175, F_1_175 - F_0_390);
        let (low, high) = (
            _mm_unpacklo_epi16(v[7], v[1]),
            _mm_unpackhi_epi16(v[7], v[1]),
        );
        let tmp0 = add(products(low, high, F_0_298 - F_0_899, -F_0_899), z3);
        let tmp3 = add(products(low, high, -F_0_899, F_1_501 - F_0_899), z4);
        let (low, high) = (
            _mm_unpacklo_epi16(v[5], v[3]),
            _mm_unpackhi_epi16(v[5], v[3]),
        );
        let tmp1 = add(products(low, high, F_2_053 - F_2_562, -F_2_562), z4);
        let tmp2 = add(products(low, high, -F_2_562, F_3_072 - F_2_562), z3);
        [
            narrow::<SHIFT>(add(tmp10, tmp3)),
            narrow::<SHIFT>(add(tmp11, tmp2)),
            narrow::<SHIFT>(add(tmp12, tmp1)),
            narrow::<SHIFT>(add(tmp13, tmp0)),
            narrow::<SHIFT>(sub(tmp13, tmp0)),
            narrow::<SHIFT>(sub(tmp12, tmp1)),
            narrow::<SHIFT>(sub(tmp11, tmp2)),
            narrow::<SHIFT>(sub(tmp10, tmp3)),
        ]
    }
}

#[inline(always)]
fn transpose(v: [__m128i; 8]) -> [__m128i; 8] {
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        let a = [
            _mm_unpacklo_epi16(v[0], v[1]),
            _mm_unpackhi_epi16(v[0], v[1]),
            _mm_unpacklo_epi16(v[2], v[3]),
            _mm_unpackhi_epi16(v[2], v[3]),
            _mm_unpacklo_epi16(v[4], v[5]),
            _mm_unpackhi_epi16(v[4], v[5]),
            _mm_unpacklo_epi16(v[6], v[7]),
            _mm_unpackhi_epi16(v[6], v[7]),
        ];
        let b = [
            _mm_unpacklo_epi32(a[0], a[2]),
            _mm_unpackhi_epi32(a[0], a[2]),
            _mm_unpacklo_epi32(a[1], a[3]),
            _mm_unpackhi_epi32(a[1], a[3]),
            _mm_unpacklo_epi32(a[4], a[6]),
            _mm_unpackhi_epi32(a[4], a[6]),
            _mm_unpacklo_epi32(a[5], a[7]),
            _mm_unpackhi_epi32(a[5], a[7]),
        ];
        [
            _mm_unpacklo_epi64(b[0], b[4]),
            _mm_unpackhi_epi64(b[0], b[4]),
            _mm_unpacklo_epi64(b[1], b[5]),
            _mm_unpackhi_epi64(b[1], b[5]),
            _mm_unpacklo_epi64(b[2], b[6]),
            _mm_unpackhi_epi64(b[2], b[6]),
            _mm_unpacklo_epi64(b[3], b[7]),
            _mm_unpackhi_epi64(b[3], b[7]),
        ]
    }
}

/// Transforms one block: `coefficients` times `quantisers`, both in natural
/// order, to eight rows of eight samples.
fn block(coefficients: &[i16; 64], quantisers: &[u16; 64]) -> [[u8; 8]; 8] {
    // SAFETY: SSE2 is part of x86-64; the loads are of 16 bytes within the arrays.
    unsafe {
        let row = |index: usize| _mm_loadu_si128(coefficients.as_ptr().add(index * 8).cast());
        let scale = |index: usize| _mm_loadu_si128(quantisers.as_ptr().add(index * 8).cast());
        let mut v: [__m128i; 8] = std::array::from_fn(row);
        let mut rest = v[1];
        for row in &v[2..] {
            rest = _mm_or_si128(rest, *row);
        }
        let is_flat = _mm_movemask_epi8(_mm_cmpeq_epi8(rest, _mm_setzero_si128())) == 0xffff;
        let columns = if is_flat {
            let first = _mm_mullo_epi16(v[0], scale(0));
            let first = _mm_slli_epi16::<PASS1_BITS>(first);
            if coefficients[1..8].iter().all(|&value| value == 0) {
                // Only the mean: all samples are the same.
                let mean = i32::from(_mm_extract_epi16::<0>(first) as i16);
                let level = ((mean + (1 << 4)) >> 5).clamp(-128, 127) + 128;
                return [[level as u8; 8]; 8];
            }
            [first; 8]
        } else {
            for (index, row) in v.iter_mut().enumerate() {
                *row = _mm_mullo_epi16(*row, scale(index));
            }
            pass::<{ CONST_BITS - PASS1_BITS }>(v)
        };
        let rows = transpose(pass::<{ CONST_BITS + PASS1_BITS + 3 }>(transpose(columns)));
        let centre = _mm_set1_epi8(-128);
        let mut samples = [[0u8; 8]; 8];
        for pair in 0..4 {
            let bytes = _mm_packs_epi16(rows[pair * 2], rows[pair * 2 + 1]);
            let bytes = _mm_add_epi8(bytes, centre);
            _mm_storeu_si128(samples.as_mut_ptr().add(pair * 2).cast(), bytes);
        }
        samples
    }
}

/// Pairs of weights of the reduced transforms: for size 1 to 7, output and pair
/// of coefficients.
type Reduced = [[[i32; 4]; 8]; 7];

/// Sizes of [`reduced_block`].
const REDUCED_SIZES: std::ops::RangeInclusive<usize> = 1..=7;

fn reduced_weights() -> &'static Reduced {
    static WEIGHTS: OnceLock<Reduced> = OnceLock::new();
    WEIGHTS.get_or_init(|| {
        let mut weights = [[[0; 4]; 8]; 7];
        for size in REDUCED_SIZES {
            let weight = |output: usize, order: usize| {
                if order >= size {
                    return 0;
                }
                let wave = if order == 0 {
                    1.0
                } else {
                    let angle = (2 * output + 1) as f64 * order as f64 / (2 * size) as f64;
                    2.0f64.sqrt() * (angle * std::f64::consts::PI).cos()
                };
                (wave * f64::from(1 << CONST_BITS)).round() as i32
            };
            let table = &mut weights[size - REDUCED_SIZES.start()];
            for (output, pairs) in table.iter_mut().enumerate().take(size) {
                for (pair, packed) in pairs.iter_mut().enumerate() {
                    let (a, b) = (weight(output, pair * 2), weight(output, pair * 2 + 1));
                    *packed = (a & 0xffff) | b << 16;
                }
            }
        }
        weights
    })
}

/// The transform of the `N` lowest orders to `N` samples, eight lanes at once.
#[inline(always)]
fn reduced_pass<const N: usize, const SHIFT: i32>(
    v: [__m128i; 8],
    weights: &[[i32; 4]; 8],
) -> [__m128i; 8] {
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        let pairs: [Wide; 4] = std::array::from_fn(|pair| {
            let (a, b) = (v[pair * 2], v[pair * 2 + 1]);
            Wide(_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b))
        });
        std::array::from_fn(|output| {
            if output >= N {
                return _mm_setzero_si128();
            }
            let mut sum = Wide(_mm_setzero_si128(), _mm_setzero_si128());
            for pair in 0..N.div_ceil(2) {
                let weight = _mm_set1_epi32(weights[output][pair]);
                let product = Wide(
                    _mm_madd_epi16(pairs[pair].0, weight),
                    _mm_madd_epi16(pairs[pair].1, weight),
                );
                sum = add(sum, product);
            }
            narrow::<SHIFT>(sum)
        })
    }
}

/// As [`block`], to `N` by `N` samples, of the coefficients of the lowest orders.
/// For the fast mode, where nothing has to be equal to the last bit.
fn reduced_block<const N: usize>(coefficients: &[i16; 64], quantisers: &[u16; 64]) -> [[u8; 8]; 8] {
    let weights = &reduced_weights()[N - REDUCED_SIZES.start()];
    // SAFETY: SSE2 is part of x86-64; the loads are of 16 bytes within the arrays.
    unsafe {
        let v: [__m128i; 8] = std::array::from_fn(|index| {
            let at = index * 8;
            _mm_mullo_epi16(
                _mm_loadu_si128(coefficients.as_ptr().add(at).cast()),
                _mm_loadu_si128(quantisers.as_ptr().add(at).cast()),
            )
        });
        let columns = reduced_pass::<N, { CONST_BITS - PASS1_BITS }>(v, weights);
        let rows = transpose(reduced_pass::<N, { CONST_BITS + PASS1_BITS + 3 }>(
            transpose(columns),
            weights,
        ));
        let centre = _mm_set1_epi8(-128);
        let mut samples = [[0u8; 8]; 8];
        for pair in 0..4 {
            let bytes = _mm_packs_epi16(rows[pair * 2], rows[pair * 2 + 1]);
            let bytes = _mm_add_epi8(bytes, centre);
            _mm_storeu_si128(samples.as_mut_ptr().add(pair * 2).cast(), bytes);
        }
        samples
    }
}

/// Transforms a block to `size` by `size` samples, 1 to 8; the rest of the result
/// means nothing.
#[inline]
pub(super) fn sized_block(
    size: usize,
    coefficients: &[i16; 64],
    quantisers: &[u16; 64],
) -> [[u8; 8]; 8] {
    match size {
        1 => reduced_block::<1>(coefficients, quantisers),
        2 => reduced_block::<2>(coefficients, quantisers),
        3 => reduced_block::<3>(coefficients, quantisers),
        4 => reduced_block::<4>(coefficients, quantisers),
        5 => reduced_block::<5>(coefficients, quantisers),
        6 => reduced_block::<6>(coefficients, quantisers),
        7 => reduced_block::<7>(coefficients, quantisers),
        _ => block(coefficients, quantisers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The transform to `size` by `size` samples by its definition, in double
    /// precision.
    fn by_definition(
        coefficients: &[i16; 64],
        quantisers: &[u16; 64],
        size: usize,
    ) -> [[f64; 8]; 8] {
        let mut samples = [[0.0; 8]; 8];
        for (y, row) in samples.iter_mut().enumerate().take(size) {
            for (x, sample) in row.iter_mut().enumerate().take(size) {
                let mut sum = 0.0;
                for v in 0..size {
                    for u in 0..size {
                        let norm = |k: usize| if k == 0 { 0.5f64.sqrt() } else { 1.0 };
                        let wave = |k: usize, at: usize| {
                            let angle = (2 * at + 1) as f64 * k as f64 / (2 * size) as f64;
                            (angle * std::f64::consts::PI).cos()
                        };
                        let value =
                            f64::from(coefficients[v * 8 + u]) * f64::from(quantisers[v * 8 + u]);
                        sum += norm(u) * norm(v) * value * wave(u, x) * wave(v, y);
                    }
                }
                *sample = (sum / 4.0 + 128.0).clamp(0.0, 255.0);
            }
        }
        samples
    }

    proptest! {
        #[test]
        fn stays_within_one_of_the_definition(
            coefficients in proptest::collection::vec(-60i16..60, 64),
            keep in 1usize..64,
            quantiser in 1u16..8,
        ) {
            let mut block_of = [0i16; 64];
            block_of[..keep].copy_from_slice(&coefficients[..keep]);
            let quantisers = [quantiser; 64];
            let fast = block(&block_of, &quantisers);
            let exact = by_definition(&block_of, &quantisers, 8);
            for (fast, exact) in fast.iter().flatten().zip(exact.iter().flatten()) {
                prop_assert!((f64::from(*fast) - exact).abs() <= 1.0);
            }
            for size in REDUCED_SIZES {
                let reduced = sized_block(size, &block_of, &quantisers);
                let exact = by_definition(&block_of, &quantisers, size);
                for (fast, exact) in reduced.iter().zip(&exact).take(size) {
                    for (fast, exact) in fast.iter().zip(exact).take(size) {
                        prop_assert!((f64::from(*fast) - exact).abs() <= 1.5);
                    }
                }
            }
        }
    }
}
