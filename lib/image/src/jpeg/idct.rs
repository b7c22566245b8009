//! The accurate integer inverse DCT ("islow") of eight by eight coefficients, in
//! AVX2. It stands in for libjpeg-turbo's assembly, which needs an assembler at
//! build time, and gives the same bytes, also where corrupt data overflows: the
//! same sixteen-bit products and saturations. And transforms to fewer samples, for
//! the fast mode.
//!
//! A vector holds two rows of eight: the first four of both in its lower half, the
//! last four of both in its upper one. So the instructions that work within halves
//! pair rows and put them together again without any crossing.

use std::arch::x86_64::*;

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

/// Where the samples of a block go: eight bytes for each of its lines, the first
/// at the beginning. Of a reduced block the last bytes of a line mean nothing.
pub(super) struct Place<'a> {
    pub(super) samples: &'a mut [u8],
    /// Bytes from one line to the next.
    pub(super) stride: usize,
}

impl Place<'_> {
    /// Panics where `size` lines do not fit.
    #[inline(always)]
    fn check(&self, size: usize) {
        assert!(self.samples.len() >= (size - 1) * self.stride + 8);
    }

    #[inline(always)]
    fn put(&mut self, line: usize, samples: [u8; 8]) {
        self.samples[line * self.stride..][..8].copy_from_slice(&samples);
    }
}

/// A block whose samples are all the same, as the transforms would make it.
#[inline(always)]
fn flat(size: usize, coefficient: i16, quantiser: u16, place: &mut Place<'_>) {
    let scaled = i32::from(coefficient.wrapping_mul(quantiser as i16)) << PASS1_BITS;
    let mean = if size == 8 {
        i32::from(scaled as i16)
    } else {
        scaled.clamp(i16::MIN.into(), i16::MAX.into())
    };
    let level = ((mean + (1 << 4)) >> 5).clamp(-128, 127) + 128;
    for line in 0..size {
        place.put(line, [level as u8; 8]);
    }
}

/// Weights of a reduced transform for each output of its first half: of orders 0
/// and 2, 4 and 6, 1 and 3, 5 and 7, two in a word. The outputs of the second half
/// have the same with the odd orders negated.
type Weights = [[i32; 4]; 4];

/// The cosine of `step` times π / (2 · `size`), from its series.
const fn cosine(step: usize, size: usize) -> f64 {
    let step = step % (4 * size);
    let step = if step > 2 * size {
        4 * size - step
    } else {
        step
    };
    let (step, sign) = if step > size {
        (2 * size - step, -1.0)
    } else {
        (step, 1.0)
    };
    let angle = step as f64 * std::f64::consts::PI / (2 * size) as f64;
    let (mut sum, mut term, mut power) = (1.0, 1.0, 0);
    while power < 24 {
        term *= -angle * angle / ((power + 1) * (power + 2)) as f64;
        sum += term;
        power += 2;
    }
    sign * sum
}

const fn weight(size: usize, output: usize, order: usize) -> i32 {
    if order >= size {
        return 0;
    }
    let norm = if order == 0 {
        1.0
    } else {
        std::f64::consts::SQRT_2
    };
    let exact = norm * cosine((2 * output + 1) * order, size) * (1 << CONST_BITS) as f64;
    (if exact < 0.0 {
        exact - 0.5
    } else {
        exact + 0.5
    }) as i32
}

const fn weights(size: usize) -> Weights {
    let mut weights = [[0; 4]; 4];
    let mut output = 0;
    while output < size.div_ceil(2) {
        let firsts = [0, 4, 1, 5];
        let mut pair = 0;
        while pair < 4 {
            let a = weight(size, output, firsts[pair]);
            let b = weight(size, output, firsts[pair] + 2);
            weights[output][pair] = (a & 0xffff) | b << 16;
            pair += 1;
        }
        output += 1;
    }
    weights
}

/// The weights of the transform to `N` samples.
struct Reduced<const N: usize>;

impl<const N: usize> Reduced<N> {
    const WEIGHTS: Weights = weights(N);
}

/// Rows 0 and 1, 2 and 3, 4 and 5, 6 and 7.
type Rows = [__m256i; 4];

#[target_feature(enable = "avx2")]
#[inline]
fn products(pairs: __m256i, first: i16, second: i16) -> __m256i {
    let weights = _mm256_set1_epi32(i32::from(first as u16) | i32::from(second) << 16);
    _mm256_madd_epi16(pairs, weights)
}

/// Sixteen-bit lanes of the first row of a vector to 32 bits, times two to the power
/// of `CONST_BITS`.
#[target_feature(enable = "avx2")]
#[inline]
fn widen(row: __m256i) -> __m256i {
    _mm256_srai_epi32::<{ 16 - CONST_BITS }>(_mm256_unpacklo_epi16(_mm256_setzero_si256(), row))
}

/// Rounds two rows, shifts them and saturates them back to sixteen bits.
#[target_feature(enable = "avx2")]
#[inline]
fn narrow<const SHIFT: i32>(first: __m256i, second: __m256i) -> __m256i {
    let half = _mm256_set1_epi32(1 << (SHIFT - 1));
    _mm256_packs_epi32(
        _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(first, half)),
        _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(second, half)),
    )
}

/// Eight one-dimensional transforms, one in each column.
#[target_feature(enable = "avx2")]
#[inline]
fn pass<const SHIFT: i32>(v: Rows) -> Rows {
    let (add, sub) = (_mm256_add_epi32, _mm256_sub_epi32);
    let sums = _mm256_add_epi16(v[0], v[2]);
    // Even part.
    let pairs = _mm256_unpacklo_epi16(v[1], v[3]);
    let tmp3 = products(pairs, F_0_541 + F_0_765, F_0_541);
    let tmp2 = products(pairs, F_0_541, F_0_541 - F_1_847);
    let tmp0 = widen(sums);
    let tmp1 = widen(_mm256_sub_epi16(v[0], v[2]));
    let (tmp10, tmp13) = (add(tmp0, tmp3), sub(tmp0, tmp3));
    let (tmp11, tmp12) = (add(tmp1, tmp2), sub(tmp1, tmp2));
    // Odd part.
    let pairs = _mm256_unpackhi_epi16(_mm256_add_epi16(v[3], v[1]), sums);
    let z3 = products(pairs, F_1_175 - F_1_961, F_1_175);
    let z4 = products(pairs, F_1_175, F_1_175 - F_0_390);
    let pairs = _mm256_unpackhi_epi16(v[3], v[0]);
    let tmp0 = add(products(pairs, F_0_298 - F_0_899, -F_0_899), z3);
    let tmp3 = add(products(pairs, -F_0_899, F_1_501 - F_0_899), z4);
    let pairs = _mm256_unpackhi_epi16(v[2], v[1]);
    let tmp1 = add(products(pairs, F_2_053 - F_2_562, -F_2_562), z4);
    let tmp2 = add(products(pairs, -F_2_562, F_3_072 - F_2_562), z3);
    [
        narrow::<SHIFT>(add(tmp10, tmp3), add(tmp11, tmp2)),
        narrow::<SHIFT>(add(tmp12, tmp1), add(tmp13, tmp0)),
        narrow::<SHIFT>(sub(tmp13, tmp0), sub(tmp12, tmp1)),
        narrow::<SHIFT>(sub(tmp11, tmp2), sub(tmp10, tmp3)),
    ]
}

#[target_feature(enable = "avx2")]
#[inline]
fn transpose(v: Rows) -> Rows {
    // Of four by four values that lie in the lower halves of two vectors and in
    // those of the two others.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn quarter(upper: __m256i, lower: __m256i) -> (__m256i, __m256i) {
        let even = _mm256_unpacklo_epi16(upper, lower);
        let odd = _mm256_unpackhi_epi16(upper, lower);
        (
            _mm256_unpacklo_epi16(even, odd),
            _mm256_unpackhi_epi16(even, odd),
        )
    }
    let (first, second) = quarter(
        _mm256_permute2x128_si256::<0x20>(v[0], v[2]),
        _mm256_permute2x128_si256::<0x20>(v[1], v[3]),
    );
    let (third, fourth) = quarter(
        _mm256_permute2x128_si256::<0x31>(v[0], v[2]),
        _mm256_permute2x128_si256::<0x31>(v[1], v[3]),
    );
    [first, second, third, fourth]
}

/// Transposes, makes bytes and stores the first `size` lines.
#[target_feature(enable = "avx2")]
#[inline]
fn store(size: usize, columns: Rows, place: &mut Place<'_>) {
    place.check(size);
    let centre = _mm256_set1_epi8(-128);
    let order = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,
    ));
    // Lines 0 to 3 in the lower half, 4 to 7 in the upper one.
    let left = _mm256_shuffle_epi8(_mm256_packs_epi16(columns[0], columns[1]), order);
    let right = _mm256_shuffle_epi8(_mm256_packs_epi16(columns[2], columns[3]), order);
    let (left, right) = (
        _mm256_add_epi8(left, centre),
        _mm256_add_epi8(right, centre),
    );
    let near = _mm256_unpacklo_epi32(left, right);
    let far = _mm256_unpackhi_epi32(left, right);
    let lines = [
        _mm256_castsi256_si128(near),
        _mm256_castsi256_si128(far),
        _mm256_extracti128_si256::<1>(near),
        _mm256_extracti128_si256::<1>(far),
    ];
    for (pair, lines) in lines.into_iter().enumerate() {
        let target = place.samples.as_mut_ptr();
        // SAFETY: `check` made sure that eight bytes fit in each line below `size`.
        unsafe {
            if pair * 2 < size {
                let target = target.add(pair * 2 * place.stride);
                _mm_storel_epi64(target.cast(), lines);
            }
            if pair * 2 + 1 < size {
                let target = target.add((pair * 2 + 1) * place.stride);
                _mm_storeh_pd(target.cast(), _mm_castsi128_pd(lines));
            }
        }
    }
}

/// Rows `2 · pair` and the next, as they lie in memory.
#[target_feature(enable = "avx2")]
#[inline]
fn load<T>(values: &[T; 64], pair: usize) -> __m256i {
    const { assert!(size_of::<T>() == 2) };
    assert!(pair < 4);
    // SAFETY: 16 values of two bytes from one of the first 49.
    unsafe { _mm256_loadu_si256(values.as_ptr().add(pair * 16).cast()) }
}

/// From the order in memory to that of [`Rows`].
#[target_feature(enable = "avx2")]
#[inline]
fn split(rows: __m256i) -> __m256i {
    _mm256_permute4x64_epi64::<0b11_01_10_00>(rows)
}

/// Transforms one block: `coefficients` times `quantisers`, both in natural order.
#[target_feature(enable = "avx2")]
fn block(coefficients: &[i16; 64], quantisers: &[u16; 64], place: &mut Place<'_>) {
    let (a, b) = (load(coefficients, 0), load(coefficients, 1));
    let (c, d) = (load(coefficients, 2), load(coefficients, 3));
    let second = _mm256_blend_epi32::<0x0f>(a, _mm256_setzero_si256());
    let rest = _mm256_or_si256(_mm256_or_si256(second, b), _mm256_or_si256(c, d));
    let scaled = _mm256_mullo_epi16(a, load(quantisers, 0));
    let columns = if _mm256_testz_si256(rest, rest) == 1 {
        let first = _mm256_slli_epi16::<PASS1_BITS>(scaled);
        [_mm256_permute4x64_epi64::<0b01_01_00_00>(first); 4]
    } else {
        pass::<{ CONST_BITS - PASS1_BITS }>([
            split(scaled),
            split(_mm256_mullo_epi16(b, load(quantisers, 1))),
            split(_mm256_mullo_epi16(c, load(quantisers, 2))),
            split(_mm256_mullo_epi16(d, load(quantisers, 3))),
        ])
    };
    let rows = transpose(columns);
    store(8, pass::<{ CONST_BITS + PASS1_BITS + 3 }>(rows), place);
}

/// The transform of the `N` lowest orders to `N` samples, of all columns.
#[target_feature(enable = "avx2")]
#[inline]
fn reduced_pass<const N: usize, const SHIFT: i32>(v: Rows) -> Rows {
    let zero = _mm256_setzero_si256();
    let (add, sub) = (_mm256_add_epi32, _mm256_sub_epi32);
    let near = _mm256_unpacklo_epi16(v[0], v[1]);
    let near_odd = _mm256_unpackhi_epi16(v[0], v[1]);
    let far = _mm256_unpacklo_epi16(v[2], v[3]);
    let far_odd = _mm256_unpackhi_epi16(v[2], v[3]);
    let mut out = [zero; 8];
    for (output, weights) in Reduced::<N>::WEIGHTS.iter().enumerate().take(N.div_ceil(2)) {
        let weights = weights.map(|weight| _mm256_set1_epi32(weight));
        let mut even = _mm256_madd_epi16(near, weights[0]);
        if N > 4 {
            even = add(even, _mm256_madd_epi16(far, weights[1]));
        }
        let mut odd = _mm256_madd_epi16(near_odd, weights[2]);
        if N > 5 {
            odd = add(odd, _mm256_madd_epi16(far_odd, weights[3]));
        }
        out[output] = add(even, odd);
        out[N - 1 - output] = sub(even, odd);
    }
    let mut rows = [zero; 4];
    for (pair, row) in rows.iter_mut().enumerate().take(N.div_ceil(2)) {
        *row = narrow::<SHIFT>(out[pair * 2], out[pair * 2 + 1]);
    }
    rows
}

/// As [`block`], to `N` by `N` samples, of the coefficients of the lowest orders.
/// For the fast mode, where nothing has to be equal to the last bit.
#[target_feature(enable = "avx2")]
fn reduced_block<const N: usize>(
    coefficients: &[i16; 64],
    quantisers: &[u16; 64],
    place: &mut Place<'_>,
) {
    let mut rows = [_mm256_setzero_si256(); 4];
    for (pair, row) in rows.iter_mut().enumerate().take(N.div_ceil(2)) {
        let scaled = _mm256_mullo_epi16(load(coefficients, pair), load(quantisers, pair));
        *row = split(scaled);
    }
    let columns = reduced_pass::<N, { CONST_BITS - PASS1_BITS }>(rows);
    let rows = transpose(columns);
    let columns = reduced_pass::<N, { CONST_BITS + PASS1_BITS + 3 }>(rows);
    store(N, columns, place);
}

/// Transforms a block to `size` by `size` samples, 1 to 8. `is_flat` where all but
/// the first of the coefficients that count for this size are known to be zero.
#[target_feature(enable = "avx2")]
#[inline]
pub(super) fn transform(
    size: usize,
    coefficients: &[i16; 64],
    quantisers: &[u16; 64],
    is_flat: bool,
    place: &mut Place<'_>,
) {
    place.check(size);
    if is_flat {
        flat(size, coefficients[0], quantisers[0], place);
        return;
    }
    match size {
        1 => reduced_block::<1>(coefficients, quantisers, place),
        2 => reduced_block::<2>(coefficients, quantisers, place),
        3 => reduced_block::<3>(coefficients, quantisers, place),
        4 => reduced_block::<4>(coefficients, quantisers, place),
        5 => reduced_block::<5>(coefficients, quantisers, place),
        6 => reduced_block::<6>(coefficients, quantisers, place),
        7 => reduced_block::<7>(coefficients, quantisers, place),
        _ => block(coefficients, quantisers, place),
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

    /// `size` lines of a block.
    fn transformed(
        size: usize,
        coefficients: &[i16; 64],
        quantisers: &[u16; 64],
        is_flat: bool,
    ) -> Vec<Vec<u8>> {
        const STRIDE: usize = 11;
        let mut samples = [0; STRIDE * 8];
        let mut place = Place {
            samples: &mut samples[..(size - 1) * STRIDE + 8],
            stride: STRIDE,
        };
        assert!(std::arch::is_x86_feature_detected!("avx2"));
        // SAFETY: the processor has AVX2.
        unsafe { transform(size, coefficients, quantisers, is_flat, &mut place) };
        samples
            .chunks(STRIDE)
            .take(size)
            .map(|line| line[..size].to_vec())
            .collect()
    }

    /// The transform of one row or column in plain code, with the overflows of
    /// sixteen-bit sums and the saturation that libjpeg-turbo's assembly has.
    fn plain_pass(v: [i16; 8], shift: i32) -> [i16; 8] {
        let pair = |a: i16, b: i16, first: i16, second: i16| {
            (i32::from(a) * i32::from(first)).wrapping_add(i32::from(b) * i32::from(second))
        };
        let wide = |a: i16| i32::from(a) << CONST_BITS;
        let tmp3 = pair(v[2], v[6], F_0_541 + F_0_765, F_0_541);
        let tmp2 = pair(v[2], v[6], F_0_541, F_0_541 - F_1_847);
        let tmp0 = wide(v[0].wrapping_add(v[4]));
        let tmp1 = wide(v[0].wrapping_sub(v[4]));
        let even = [
            tmp0.wrapping_add(tmp3),
            tmp1.wrapping_add(tmp2),
            tmp1.wrapping_sub(tmp2),
            tmp0.wrapping_sub(tmp3),
        ];
        let (z3, z4) = (v[7].wrapping_add(v[3]), v[5].wrapping_add(v[1]));
        let low = pair(z3, z4, F_1_175 - F_1_961, F_1_175);
        let high = pair(z3, z4, F_1_175, F_1_175 - F_0_390);
        let odd = [
            pair(v[7], v[1], -F_0_899, F_1_501 - F_0_899).wrapping_add(high),
            pair(v[5], v[3], -F_2_562, F_3_072 - F_2_562).wrapping_add(low),
            pair(v[5], v[3], F_2_053 - F_2_562, -F_2_562).wrapping_add(high),
            pair(v[7], v[1], F_0_298 - F_0_899, -F_0_899).wrapping_add(low),
        ];
        let narrow = |sum: i32| {
            let rounded = sum.wrapping_add(1 << (shift - 1)) >> shift;
            rounded.clamp(i16::MIN.into(), i16::MAX.into()) as i16
        };
        std::array::from_fn(|index| match index {
            0..4 => narrow(even[index].wrapping_add(odd[index])),
            _ => narrow(even[7 - index].wrapping_sub(odd[7 - index])),
        })
    }

    fn plain(coefficients: &[i16; 64], quantisers: &[u16; 64]) -> Vec<Vec<u8>> {
        let scaled: [i16; 64] =
            std::array::from_fn(|at| coefficients[at].wrapping_mul(quantisers[at] as i16));
        let columns: [[i16; 8]; 8] = std::array::from_fn(|x| {
            if coefficients[8..].iter().all(|&value| value == 0) {
                return [scaled[x] << PASS1_BITS; 8];
            }
            plain_pass(
                std::array::from_fn(|y| scaled[y * 8 + x]),
                CONST_BITS - PASS1_BITS,
            )
        });
        (0..8)
            .map(|y| {
                let row = std::array::from_fn(|x| columns[x][y]);
                let levels = plain_pass(row, CONST_BITS + PASS1_BITS + 3);
                levels
                    .iter()
                    .map(|&level| (level.clamp(-128, 127) + 128) as u8)
                    .collect()
            })
            .collect()
    }

    /// Coefficients of which the last may all be zero, or all of a kind of place.
    fn coefficients(values: Vec<i16>, keep: usize, kind: usize) -> [i16; 64] {
        std::array::from_fn(|index| {
            let is_kept = match kind {
                0 => index < keep,
                1 => index < 8,
                2 => index.is_multiple_of(8),
                _ => true,
            };
            if is_kept { values[index] } else { 0 }
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn vectors_overflow_as_plain_code_does(
            small in any::<bool>(),
            values in proptest::collection::vec(any::<i16>(), 64),
            quantisers in proptest::collection::vec(any::<u16>(), 64),
            (keep, kind) in (1usize..64, 0usize..4),
        ) {
            // Whole sixteen-bit values overflow everywhere.
            let shift = if small { 9 } else { 0 };
            let values = values.into_iter().map(|value| value >> shift).collect();
            let coefficients = coefficients(values, keep, kind);
            let quantisers: [u16; 64] = std::array::from_fn(|index| quantisers[index] >> shift);
            let is_flat = coefficients[1..].iter().all(|&value| value == 0);
            prop_assert_eq!(
                plain(&coefficients, &quantisers),
                transformed(8, &coefficients, &quantisers, false)
            );
            for size in 1..=8 {
                if is_flat {
                    prop_assert_eq!(
                        transformed(size, &coefficients, &quantisers, false),
                        transformed(size, &coefficients, &quantisers, true)
                    );
                }
            }
        }

        #[test]
        fn stays_within_one_of_the_definition(
            coefficients in proptest::collection::vec(-60i16..60, 64),
            keep in 1usize..64,
            quantiser in 1u16..8,
        ) {
            let mut block_of = [0i16; 64];
            block_of[..keep].copy_from_slice(&coefficients[..keep]);
            let quantisers = [quantiser; 64];
            for size in 1..=8 {
                let allowed = if size == 8 { 1.0 } else { 1.5 };
                let fast = transformed(size, &block_of, &quantisers, false);
                let exact = by_definition(&block_of, &quantisers, size);
                for (fast, exact) in fast.iter().zip(&exact) {
                    for (fast, exact) in fast.iter().zip(exact) {
                        prop_assert!((f64::from(*fast) - exact).abs() <= allowed);
                    }
                }
            }
        }
    }
}
