//! The accurate integer inverse DCT ("islow") of eight by eight coefficients, in
//! SSE2, which every x86-64 has, and in AVX2. It stands in for libjpeg-turbo's
//! assembly, which needs an assembler at build time, and gives the same bytes,
//! also where corrupt data overflows: the same sixteen-bit products and
//! saturations. And transforms to fewer samples, for the fast mode.

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

/// Rows of samples from eight vectors of columns' samples.
#[inline(always)]
fn bytes(columns: [__m128i; 8]) -> [[u8; 8]; 8] {
    let rows = transpose(columns);
    let mut samples = [[0u8; 8]; 8];
    // SAFETY: SSE2 is part of x86-64; two rows have the 16 bytes of a store.
    unsafe {
        let centre = _mm_set1_epi8(-128);
        for pair in 0..4 {
            let bytes = _mm_packs_epi16(rows[pair * 2], rows[pair * 2 + 1]);
            let bytes = _mm_add_epi8(bytes, centre);
            _mm_storeu_si128(samples.as_mut_ptr().add(pair * 2).cast(), bytes);
        }
    }
    samples
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
        let is_even = _mm_movemask_epi8(_mm_cmpeq_epi8(rest, _mm_setzero_si128())) == 0xffff;
        let columns = if is_even {
            let first = _mm_mullo_epi16(v[0], scale(0));
            [_mm_slli_epi16::<PASS1_BITS>(first); 8]
        } else {
            for (index, row) in v.iter_mut().enumerate() {
                *row = _mm_mullo_epi16(*row, scale(index));
            }
            pass::<{ CONST_BITS - PASS1_BITS }>(v)
        };
        bytes(pass::<{ CONST_BITS + PASS1_BITS + 3 }>(transpose(columns)))
    }
}

/// Sizes of the reduced transforms.
#[cfg(test)]
const REDUCED_SIZES: std::ops::RangeInclusive<usize> = 1..=7;

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

/// The transform of the `N` lowest orders to `N` samples, eight lanes at once.
#[inline(always)]
fn reduced_pass<const N: usize, const SHIFT: i32>(v: [__m128i; 8]) -> [__m128i; 8] {
    // SAFETY: SSE2 is part of x86-64.
    unsafe {
        let pair =
            |a: __m128i, b: __m128i| Wide(_mm_unpacklo_epi16(a, b), _mm_unpackhi_epi16(a, b));
        let pairs = [
            pair(v[0], v[2]),
            pair(v[4], v[6]),
            pair(v[1], v[3]),
            pair(v[5], v[7]),
        ];
        let mut out = [_mm_setzero_si128(); 8];
        for (output, weights) in Reduced::<N>::WEIGHTS.iter().enumerate().take(N.div_ceil(2)) {
            let product = |index: usize| {
                let weight = _mm_set1_epi32(weights[index]);
                Wide(
                    _mm_madd_epi16(pairs[index].0, weight),
                    _mm_madd_epi16(pairs[index].1, weight),
                )
            };
            let even = add(product(0), product(1));
            let odd = add(product(2), product(3));
            out[output] = narrow::<SHIFT>(add(even, odd));
            out[N - 1 - output] = narrow::<SHIFT>(sub(even, odd));
        }
        out
    }
}

/// As [`block`], to `N` by `N` samples, of the coefficients of the lowest orders.
/// For the fast mode, where nothing has to be equal to the last bit.
fn reduced_block<const N: usize>(coefficients: &[i16; 64], quantisers: &[u16; 64]) -> [[u8; 8]; 8] {
    // SAFETY: SSE2 is part of x86-64; the loads are of 16 bytes within the arrays.
    let rows = unsafe {
        let mut rows = [_mm_setzero_si128(); 8];
        for (index, row) in rows.iter_mut().enumerate().take(N) {
            *row = _mm_mullo_epi16(
                _mm_loadu_si128(coefficients.as_ptr().add(index * 8).cast()),
                _mm_loadu_si128(quantisers.as_ptr().add(index * 8).cast()),
            );
        }
        rows
    };
    let columns = reduced_pass::<N, { CONST_BITS - PASS1_BITS }>(rows);
    bytes(reduced_pass::<N, { CONST_BITS + PASS1_BITS + 3 }>(
        transpose(columns),
    ))
}

/// Transforms a block to `size` by `size` samples, 1 to 8. `is_flat` where all but
/// the first of the coefficients that count for this size are known to be zero.
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
    let samples = match size {
        1 => reduced_block::<1>(coefficients, quantisers),
        2 => reduced_block::<2>(coefficients, quantisers),
        3 => reduced_block::<3>(coefficients, quantisers),
        4 => reduced_block::<4>(coefficients, quantisers),
        5 => reduced_block::<5>(coefficients, quantisers),
        6 => reduced_block::<6>(coefficients, quantisers),
        7 => reduced_block::<7>(coefficients, quantisers),
        _ => block(coefficients, quantisers),
    };
    for (line, samples) in samples.iter().enumerate().take(size) {
        place.put(line, *samples);
    }
}

/// The same with vectors of twice the length.
///
/// A vector holds two rows of eight: the first four of both in its lower half, the
/// last four of both in its upper one. So the instructions that work within halves
/// pair rows and put them together again without any crossing.
pub(super) mod avx2 {
    use super::*;

    /// Rows 0 and 1, 2 and 3, 4 and 5, 6 and 7.
    type Rows = [__m256i; 4];

    #[target_feature(enable = "avx2")]
    #[inline]
    fn products(pairs: __m256i, first: i16, second: i16) -> __m256i {
        let weights = _mm256_set1_epi32(i32::from(first as u16) | i32::from(second) << 16);
        _mm256_madd_epi16(pairs, weights)
    }

    /// As [`super::widen`], of the first row of a vector.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn widen(row: __m256i) -> __m256i {
        _mm256_srai_epi32::<{ 16 - CONST_BITS }>(_mm256_unpacklo_epi16(_mm256_setzero_si256(), row))
    }

    /// As [`super::narrow`], of two rows.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn narrow<const SHIFT: i32>(first: __m256i, second: __m256i) -> __m256i {
        let half = _mm256_set1_epi32(1 << (SHIFT - 1));
        _mm256_packs_epi32(
            _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(first, half)),
            _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(second, half)),
        )
    }

    /// As [`super::pass`].
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

    /// As [`super::reduced_pass`].
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

    /// As [`super::transform`].
    #[target_feature(enable = "avx2")]
    #[inline]
    pub(in crate::jpeg) fn transform(
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

    /// `size` lines of a block, by the given transform.
    fn lines(size: usize, transform: impl FnOnce(&mut Place<'_>)) -> Vec<Vec<u8>> {
        const STRIDE: usize = 11;
        let mut samples = [0; STRIDE * 8];
        transform(&mut Place {
            samples: &mut samples[..(size - 1) * STRIDE + 8],
            stride: STRIDE,
        });
        samples
            .chunks(STRIDE)
            .take(size)
            .map(|line| line[..size].to_vec())
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
        fn both_vector_lengths_give_the_same_bytes(
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
            for size in 1..=8 {
                let plain = lines(size, |place| {
                    transform(size, &coefficients, &quantisers, false, place);
                });
                if is_flat {
                    let known = lines(size, |place| {
                        transform(size, &coefficients, &quantisers, true, place);
                    });
                    prop_assert_eq!(&plain, &known);
                }
                if std::arch::is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has AVX2.
                    let wide = lines(size, |place| unsafe {
                        avx2::transform(size, &coefficients, &quantisers, false, place);
                    });
                    prop_assert_eq!(&plain, &wide);
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
            let fast = block(&block_of, &quantisers);
            let exact = by_definition(&block_of, &quantisers, 8);
            for (fast, exact) in fast.iter().flatten().zip(exact.iter().flatten()) {
                prop_assert!((f64::from(*fast) - exact).abs() <= 1.0);
            }
            for size in REDUCED_SIZES {
                let reduced = lines(size, |place| transform(size, &block_of, &quantisers, false, place));
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
