//! Pillow's antialiased bicubic resize, computed only where the crop needs it.
//!
//! Pillow resizes in two passes, first along rows, then along columns, and
//! rounds to the image's own sample type after each. Both passes of eight-bit
//! images use 22-bit fixed-point coefficients and 32-bit sums. The passes here
//! give the same sums, so the same bytes. The vector code splits a coefficient
//! in two 16-bit halves, which is exact, and takes half the instructions that
//! 32-bit products need; the first pass works on sixteen rows at a time, turned
//! so that each lane sums up a row of its own.

use crate::convert;
use crate::error::Result;
use crate::geometry::Plan;
use crate::raster::{Mode, Sink, Spec, try_zeroed};

/// Fraction bits of Pillow's eight-bit coefficients: 32 bits less the sample and
/// two for overshoot.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Bits of a coefficient's low half in the vector code; the high half keeps
/// `PRECISION_BITS + 1 - 11` bits and a sign, so both fit in 16 bits.
const LOW_BITS: u32 = 11;

/// Rows that the first pass takes at once, one in each lane of its sums.
const BATCH: usize = 16;

/// Bytes past the end of a row that a vector step may read.
pub(crate) const ROW_PADDING: usize = 64;

/// For each output position: which inputs, with which weights.
pub(crate) struct Weights {
    /// First input and number of inputs of each output.
    bounds: Vec<(usize, usize)>,
    /// `stride` weights for each output, zero past the bounds.
    exact: Vec<f64>,
    stride: usize,
}

impl Weights {
    /// Weights of outputs `first .. first + count` when the first `covered` of
    /// `input` samples become `output`.
    fn new(input: u32, covered: f64, output: u32, first: u32, count: u32) -> Self {
        const SUPPORT: f64 = 2.0; // bicubic reaches two samples to each side
        // Pillow keeps the box in single precision.
        let scale = f64::from(covered as f32) / f64::from(output);
        let filter_scale = scale.max(1.0);
        let support = SUPPORT * filter_scale;
        let stride = support.ceil() as usize * 2 + 1;
        let inverse = 1.0 / filter_scale;
        let mut bounds = Vec::with_capacity(count as usize);
        let mut exact = vec![0.0; count as usize * stride];
        for (index, position) in (first..first + count).enumerate() {
            let centre = (f64::from(position) + 0.5) * scale;
            let low = ((centre - support + 0.5) as i64).max(0);
            let high = ((centre + support + 0.5) as i64).min(i64::from(input));
            let taps = (high - low).max(0) as usize;
            let weights = &mut exact[index * stride..][..taps];
            let mut sum = 0.0;
            for (offset, weight) in weights.iter_mut().enumerate() {
                *weight = bicubic((offset as f64 + low as f64 - centre + 0.5) * inverse);
                sum += *weight;
            }
            if sum != 0.0 {
                for weight in weights {
                    *weight /= sum;
                }
            }
            bounds.push((low as usize, taps));
        }
        Self {
            bounds,
            exact,
            stride,
        }
    }

    /// The inputs that any output needs.
    fn span(&self) -> (usize, usize) {
        let first = self.bounds.iter().map(|&(low, _)| low).min().unwrap_or(0);
        let end = self
            .bounds
            .iter()
            .map(|&(low, taps)| low + taps)
            .max()
            .unwrap_or(0);
        (first, end)
    }

    fn of(&self, output: usize) -> (usize, &[f64]) {
        let (low, taps) = self.bounds[output];
        (low, &self.exact[output * self.stride..][..taps])
    }
}

fn bicubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

/// Eight-bit weights in fixed point, whole and in halves.
struct Fixed {
    bounds: Vec<(usize, usize)>,
    whole: Vec<i32>,
    stride: usize,
    /// For each output: its first pair of inputs, counted from the first input
    /// that any output needs, and where its pairs of weights are.
    pairs: Vec<(usize, std::ops::Range<usize>)>,
    /// Two high halves in one word, two low halves in the next.
    halves: Vec<[i32; 2]>,
}

impl Fixed {
    fn new(weights: &Weights) -> Self {
        let stride = weights.stride;
        let scale = f64::from(1u32 << PRECISION_BITS);
        let whole: Vec<i32> = weights
            .exact
            .iter()
            .map(|&weight| {
                let half = if weight < 0.0 { -0.5 } else { 0.5 };
                (half + weight * scale) as i32
            })
            .collect();
        let (first, _) = weights.span();
        let mut pairs = Vec::with_capacity(weights.bounds.len());
        let mut halves = Vec::new();
        for (taps, &(low, count)) in whole.chunks_exact(stride).zip(&weights.bounds) {
            // Inputs come in pairs; an odd start gets a weight of zero before it.
            let start = low - first;
            let lead = start % 2;
            let tap = |index: usize| {
                index
                    .checked_sub(lead)
                    .map_or(0, |tap| taps[..count].get(tap).copied().unwrap_or(0))
            };
            let from = halves.len();
            for pair in 0..(lead + count).div_ceil(2) {
                let (a, b) = (tap(pair * 2), tap(pair * 2 + 1));
                let mask = (1 << LOW_BITS) - 1;
                halves.push([pack(a >> LOW_BITS, b >> LOW_BITS), pack(a & mask, b & mask)]);
            }
            pairs.push((start / 2, from..halves.len()));
        }
        Self {
            bounds: weights.bounds.clone(),
            whole,
            stride,
            pairs,
            halves,
        }
    }

    fn weights(&self, output: usize) -> (usize, &[i32]) {
        let (low, taps) = self.bounds[output];
        (low, &self.whole[output * self.stride..][..taps])
    }
}

/// Two sixteen-bit numbers in one word, the first in the low half.
fn pack(first: i32, second: i32) -> i32 {
    (first & 0xffff) | (second << 16)
}

fn clip8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// One row of one channel, of which `row[0]` is input `first`.
fn horizontal_plain(row: &[u8], first: usize, fixed: &Fixed, out: &mut [u8]) {
    for (index, target) in out.iter_mut().enumerate() {
        let (low, weights) = fixed.weights(index);
        let sum: i32 = row[low - first..]
            .iter()
            .zip(weights)
            .map(|(&sample, &weight)| i32::from(sample) * weight)
            .sum();
        *target = clip8(HALF + sum);
    }
}

/// One output row: `out[x] = Σ rows[y][x] · weights[y]`, rows `width` apart.
fn vertical_plain(rows: &[u8], width: usize, weights: &[i32], out: &mut [u8], start: usize) {
    for (x, target) in out.iter_mut().enumerate().skip(start) {
        let mut sum = HALF;
        for (y, &weight) in weights.iter().enumerate() {
            sum += i32::from(rows[y * width + x]) * weight;
        }
        *target = clip8(sum);
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! The same sums, 16 products at a time.

    use super::{BATCH, Fixed, HALF, LOW_BITS, PRECISION_BITS, pack};
    use std::arch::x86_64::*;

    /// Turns eight rows of eight pairs of bytes into eight columns of them.
    #[target_feature(enable = "avx2")]
    fn turn_pairs(v: [__m128i; 8]) -> [__m128i; 8] {
        let a: [__m128i; 8] = std::array::from_fn(|i| {
            let (x, y) = (v[i / 2 * 2], v[i / 2 * 2 + 1]);
            if i % 2 == 0 {
                _mm_unpacklo_epi16(x, y)
            } else {
                _mm_unpackhi_epi16(x, y)
            }
        });
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
        std::array::from_fn(|i| {
            let (x, y) = (b[i / 2], b[i / 2 + 4]);
            if i % 2 == 0 {
                _mm_unpacklo_epi64(x, y)
            } else {
                _mm_unpackhi_epi64(x, y)
            }
        })
    }

    /// Turns sixteen rows of sixteen bytes into sixteen columns of them.
    #[target_feature(enable = "avx2")]
    fn turn_bytes(mut v: [__m128i; 16]) -> [__m128i; 16] {
        // Interleaving each row with the one eight further, four times over, is a
        // transposition.
        // Loops, since the compiler leaves closures by the sixteen as calls at times.
        for _ in 0..4 {
            let before = v;
            for i in 0..8 {
                v[2 * i] = _mm_unpacklo_epi8(before[i], before[i + 8]);
                v[2 * i + 1] = _mm_unpackhi_epi8(before[i], before[i + 8]);
            }
        }
        v
    }

    /// Sixteen rows, `stride` apart, into pairs of columns: 32 bytes for each pair,
    /// two from each row.
    #[target_feature(enable = "avx2")]
    pub(super) fn turn_rows(rows: &[u8], stride: usize, turned: &mut [u8]) {
        assert!(stride.is_multiple_of(16));
        assert!(rows.len() >= BATCH * stride && turned.len() >= BATCH * stride);
        for column in (0..stride).step_by(16) {
            for half in 0..2 {
                // SAFETY: rows are `stride` long, a multiple of 16; there are 16.
                let v: [__m128i; 8] = std::array::from_fn(|row| unsafe {
                    let at = (half * 8 + row) * stride + column;
                    _mm_loadu_si128(rows.as_ptr().add(at).cast())
                });
                for (pair, columns) in turn_pairs(v).into_iter().enumerate() {
                    // SAFETY: pair `column / 2 + pair` begins at 32 times that, below
                    // 16 · `stride`.
                    unsafe {
                        let at = (column / 2 + pair) * 32 + half * 16;
                        _mm_storeu_si128(turned.as_mut_ptr().add(at).cast(), columns);
                    }
                }
            }
        }
    }

    /// Stores sixteen columns of sixteen rows to the rows' places.
    #[target_feature(enable = "avx2")]
    fn store_turned(columns: &[[u8; BATCH]; 16], targets: &mut [&mut [u8]], at: usize) {
        // SAFETY: the loads are of whole arrays of sixteen bytes.
        let v: [__m128i; 16] =
            std::array::from_fn(|i| unsafe { _mm_loadu_si128(columns[i].as_ptr().cast()) });
        let rows = turn_bytes(v);
        for (target, row) in targets.iter_mut().zip(rows) {
            let place = &mut target[at..];
            // A copy of a length that is not known costs five times the store.
            if let Some(whole) = place.first_chunk_mut::<16>() {
                // SAFETY: the chunk has sixteen bytes.
                unsafe { _mm_storeu_si128(whole.as_mut_ptr().cast(), row) };
                continue;
            }
            let mut bytes = [0u8; 16];
            // SAFETY: the array has sixteen bytes.
            unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), row) };
            place.copy_from_slice(&bytes[..place.len()]);
        }
    }

    /// The sums of one output for sixteen rows, as bytes.
    #[target_feature(enable = "avx2")]
    fn sum_avx2(turned: &[u8], start: usize, weights: &[[i32; 2]]) -> [u8; BATCH] {
        assert!(turned.len() >= (start + weights.len()) * 32);
        let zero = _mm256_setzero_si256();
        let (mut high, mut low) = ([zero; 2], [zero; 2]);
        for (pair, &[high_pair, low_pair]) in weights.iter().enumerate() {
            let (high_pair, low_pair) = (_mm256_set1_epi32(high_pair), _mm256_set1_epi32(low_pair));
            for half in 0..2 {
                // SAFETY: within `turned` by the assertion.
                let samples = unsafe {
                    let at = (start + pair) * 32 + half * 16;
                    _mm256_cvtepu8_epi16(_mm_loadu_si128(turned.as_ptr().add(at).cast()))
                };
                high[half] = _mm256_add_epi32(high[half], _mm256_madd_epi16(samples, high_pair));
                low[half] = _mm256_add_epi32(low[half], _mm256_madd_epi16(samples, low_pair));
            }
        }
        let half = _mm256_set1_epi32(HALF);
        let [first, second] = std::array::from_fn(|part| {
            let whole = _mm256_add_epi32(
                _mm256_slli_epi32::<{ LOW_BITS as i32 }>(high[part]),
                low[part],
            );
            _mm256_srai_epi32::<{ PRECISION_BITS as i32 }>(_mm256_add_epi32(whole, half))
        });
        // packs works within 128-bit halves; the permutation restores the order.
        let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(first, second));
        let bytes = _mm_packus_epi16(
            _mm256_castsi256_si128(words),
            _mm256_extracti128_si256::<1>(words),
        );
        let mut out = [0u8; BATCH];
        // SAFETY: the array has sixteen bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), bytes) };
        out
    }

    /// As [`sum_avx2`], with all sixteen rows in one register.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn sum_avx512(turned: &[u8], start: usize, weights: &[[i32; 2]]) -> [u8; BATCH] {
        assert!(turned.len() >= (start + weights.len()) * 32);
        let zero = _mm512_setzero_si512();
        // Two sums each, so that one need not wait for the other.
        let (mut high, mut low) = ([zero; 2], [zero; 2]);
        for (pair, &[high_pair, low_pair]) in weights.iter().enumerate() {
            // SAFETY: within `turned` by the assertion.
            let samples = unsafe {
                let at = (start + pair) * 32;
                _mm512_cvtepu8_epi16(_mm256_loadu_si256(turned.as_ptr().add(at).cast()))
            };
            let which = pair % 2;
            high[which] = _mm512_dpwssd_epi32(high[which], samples, _mm512_set1_epi32(high_pair));
            low[which] = _mm512_dpwssd_epi32(low[which], samples, _mm512_set1_epi32(low_pair));
        }
        let high = _mm512_slli_epi32::<{ LOW_BITS }>(_mm512_add_epi32(high[0], high[1]));
        let whole = _mm512_add_epi32(high, _mm512_add_epi32(low[0], low[1]));
        let rounded = _mm512_srai_epi32::<{ PRECISION_BITS }>(_mm512_add_epi32(
            whole,
            _mm512_set1_epi32(HALF),
        ));
        // Below zero becomes zero, above 255 becomes 255.
        let bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(rounded, zero));
        let mut out = [0u8; BATCH];
        // SAFETY: the array has sixteen bytes.
        unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), bytes) };
        out
    }

    /// All outputs of one channel for as many rows as there are targets.
    #[target_feature(enable = "avx2")]
    pub(super) fn horizontal_avx2(
        turned: &[u8],
        fixed: &Fixed,
        targets: &mut [&mut [u8]],
        size: usize,
    ) {
        let mut columns = [[0u8; BATCH]; 16];
        for index in 0..size {
            let (start, range) = &fixed.pairs[index];
            columns[index % 16] = sum_avx2(turned, *start, &fixed.halves[range.clone()]);
            if index % 16 == 15 || index + 1 == size {
                store_turned(&columns, targets, index / 16 * 16);
            }
        }
    }

    /// As [`horizontal_avx2`].
    #[target_feature(enable = "avx2,avx512f,avx512bw,avx512vnni")]
    pub(super) fn horizontal_avx512(
        turned: &[u8],
        fixed: &Fixed,
        targets: &mut [&mut [u8]],
        size: usize,
    ) {
        let mut columns = [[0u8; BATCH]; 16];
        for index in 0..size {
            let (start, range) = &fixed.pairs[index];
            columns[index % 16] = sum_avx512(turned, *start, &fixed.halves[range.clone()]);
            if index % 16 == 15 || index + 1 == size {
                store_turned(&columns, targets, index / 16 * 16);
            }
        }
    }

    /// Sixteen columns at a time; returns how many columns were done.
    #[target_feature(enable = "avx2")]
    pub(super) fn vertical(rows: &[u8], width: usize, weights: &[i32], out: &mut [u8]) -> usize {
        let taps = weights.len();
        assert!(taps == 0 || rows.len() >= taps * width);
        assert!(out.len() <= width);
        let zero = _mm256_setzero_si256();
        let half = _mm256_set1_epi32(HALF);
        let mut x = 0;
        while x + 16 <= out.len() {
            let mut high_sums = [zero; 2];
            let mut low_sums = [zero; 2];
            let mut y = 0;
            while y < taps {
                let (first, second) = (weights[y], weights.get(y + 1).copied().unwrap_or(0));
                let pair = |a: i32, b: i32| _mm256_set1_epi32(pack(a, b));
                let high = pair(first >> LOW_BITS, second >> LOW_BITS);
                let mask = (1 << LOW_BITS) - 1;
                let fine = pair(first & mask, second & mask);
                // SAFETY: rows `y` and, where it exists, `y + 1` hold `width` bytes
                // each, and `x + 16 <= out.len() <= width`.
                let (above, below) = unsafe {
                    let above = _mm_loadu_si128(rows.as_ptr().add(y * width + x).cast());
                    let next = if y + 1 < taps { y + 1 } else { y };
                    (
                        above,
                        _mm_loadu_si128(rows.as_ptr().add(next * width + x).cast()),
                    )
                };
                let left = _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(above, below));
                let right = _mm256_cvtepu8_epi16(_mm_unpackhi_epi8(above, below));
                for (part, samples) in [left, right].into_iter().enumerate() {
                    high_sums[part] =
                        _mm256_add_epi32(high_sums[part], _mm256_madd_epi16(samples, high));
                    low_sums[part] =
                        _mm256_add_epi32(low_sums[part], _mm256_madd_epi16(samples, fine));
                }
                y += 2;
            }
            let mut rounded = [zero; 2];
            for part in 0..2 {
                let whole = _mm256_add_epi32(
                    _mm256_slli_epi32::<{ LOW_BITS as i32 }>(high_sums[part]),
                    low_sums[part],
                );
                rounded[part] =
                    _mm256_srai_epi32::<{ PRECISION_BITS as i32 }>(_mm256_add_epi32(whole, half));
            }
            // packs works within 128-bit halves; the permutation restores the order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(
                rounded[0], rounded[1],
            ));
            let bytes =
                _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(words, words));
            // SAFETY: `x + 16 <= out.len()`.
            unsafe {
                _mm_storeu_si128(
                    out.as_mut_ptr().add(x).cast(),
                    _mm256_castsi256_si128(bytes),
                );
            }
            x += 16;
        }
        x
    }
}

/// Rows on their way through the first pass.
struct Batch {
    /// First input column, and how many there are, padded.
    first: usize,
    stride: usize,
    /// Which rows of the image are here.
    lines: Vec<usize>,
    /// `BATCH` rows of each channel, channel after channel.
    planes: Vec<u8>,
    /// One channel in pairs of columns.
    turned: Vec<u8>,
}

impl Batch {
    fn new(channels: usize, (first, end): (usize, usize)) -> Self {
        let stride = (end - first).next_multiple_of(16) + 16;
        Self {
            first,
            stride,
            lines: Vec::with_capacity(BATCH),
            planes: vec![0; channels * BATCH * stride],
            turned: vec![0; BATCH * stride],
        }
    }

    /// Where the next row of `channel` goes.
    fn next_row(&mut self, channel: usize) -> &mut [u8] {
        let at = (channel * BATCH + self.lines.len()) * self.stride;
        &mut self.planes[at..at + self.stride]
    }

    /// Takes the row in that was just written; works all off once there are enough.
    fn push(&mut self, line: usize, across: Option<&Fixed>, passed: &mut Passed) {
        self.lines.push(line);
        if self.lines.len() == BATCH {
            self.flush(across, passed);
        }
    }

    /// The first pass over the rows that are here, or a copy where there is
    /// nothing to resize.
    fn flush(&mut self, across: Option<&Fixed>, passed: &mut Passed) {
        let size = passed.size;
        for channel in 0..passed.channels {
            let planes = &self.planes[channel * BATCH * self.stride..][..BATCH * self.stride];
            let mut targets = passed.targets(&self.lines, channel);
            match across {
                None => {
                    for (row, target) in planes.chunks_exact(self.stride).zip(&mut targets) {
                        target.copy_from_slice(&row[..size]);
                    }
                }
                Some(fixed) => {
                    horizontal(
                        planes,
                        self.first,
                        self.stride,
                        &mut self.turned,
                        fixed,
                        &mut targets,
                        size,
                    );
                }
            }
        }
        self.lines.clear();
    }
}

/// Rows after the first pass.
struct Passed {
    /// First row of the image that is kept, and one past the last.
    rows: (usize, usize),
    channels: usize,
    size: usize,
    /// `channels × size` samples for each row.
    samples: Vec<u8>,
}

impl Passed {
    /// The parts of `lines` that hold `channel`, in the order of `lines`.
    fn targets(&mut self, lines: &[usize], channel: usize) -> Vec<&mut [u8]> {
        let width = self.channels * self.size;
        let mut order: Vec<usize> = (0..lines.len()).collect();
        order.sort_unstable_by_key(|&index| lines[index]);
        let mut targets: Vec<Option<&mut [u8]>> = lines.iter().map(|_| None).collect();
        let mut rest = &mut self.samples[..];
        let mut at = self.rows.0;
        for index in order {
            let (_, from) = rest.split_at_mut((lines[index] - at) * width);
            let (row, after) = from.split_at_mut(width);
            targets[index] = Some(&mut row[channel * self.size..][..self.size]);
            rest = after;
            at = lines[index] + 1;
        }
        targets.into_iter().flatten().collect()
    }
}

/// The first pass over one channel of a batch.
fn horizontal(
    planes: &[u8],
    first: usize,
    stride: usize,
    turned: &mut [u8],
    fixed: &Fixed,
    targets: &mut [&mut [u8]],
    size: usize,
) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") {
            // SAFETY: the processor has what the functions ask for.
            unsafe {
                x86::turn_rows(planes, stride, turned);
                if has!("avx512bw") && has!("avx512vnni") {
                    x86::horizontal_avx512(turned, fixed, targets, size);
                } else {
                    x86::horizontal_avx2(turned, fixed, targets, size);
                }
            }
            return;
        }
    }
    let _ = turned;
    for (row, target) in planes.chunks_exact(stride).zip(targets) {
        horizontal_plain(row, first, fixed, target);
    }
}

fn vertical(rows: &[u8], width: usize, weights: &[i32], out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        let done = unsafe { x86::vertical(rows, width, weights, out) };
        vertical_plain(rows, width, weights, out, done);
        return;
    }
    vertical_plain(rows, width, weights, out, 0);
}

/// Source position of each output of a nearest-neighbour resize; the reference
/// adds the step up from the first output on, and so do its roundings.
fn nearest_positions(input: u32, output: u32, first: u32, count: u32) -> Vec<u32> {
    let step = f64::from(input as f32) / f64::from(output);
    let mut position = step * 0.5;
    let mut positions = Vec::with_capacity(count as usize);
    for index in 0..first + count {
        if index >= first {
            positions.push((position as u32).min(input - 1));
        }
        position += step;
    }
    positions
}

/// What the passes need, by the kind of sample. There is one for each image, so
/// its size is no matter.
#[allow(clippy::large_enum_variant)]
enum Work {
    /// Copies of source pixels.
    Nearest {
        columns: Vec<u32>,
        rows: Vec<u32>,
        out: Vec<u8>,
    },
    /// Interleaved eight-bit samples.
    Eight {
        channels: usize,
        premultiply: bool,
        across: Option<Fixed>,
        down: Option<Fixed>,
        /// First column that is needed, and one past the last.
        columns: (usize, usize),
        batch: Batch,
        passed: Passed,
        /// One row, interleaved, for premultiplication.
        scratch: Vec<u8>,
    },
    /// Wider samples, one channel, in double precision.
    Wide {
        across: Option<Weights>,
        down: Option<Weights>,
        left: usize,
        rows: (usize, usize),
        passed: Vec<f64>,
    },
}

/// A [`Sink`] that turns the rows of an image into the crop.
pub(crate) struct Crop {
    size: u32,
    state: Option<(Spec, Work)>,
}

impl Crop {
    pub(crate) fn new(size: u32) -> Self {
        Self { size, state: None }
    }

    /// Bytes that the crop of an image of this size holds while it is made.
    pub(crate) fn memory(width: u32, height: u32, mode: Mode, size: u32) -> u64 {
        let plan = Plan::new(width, height, size);
        let scale = f64::from(height) / f64::from(plan.resized.1);
        let rows = (f64::from(size) * scale + 4.0 * scale.max(1.0) + 4.0).min(f64::from(height));
        let sample = match mode {
            Mode::Grey16 | Mode::Grey16Big | Mode::Int32 | Mode::Float32 => 8,
            other => other.bytes() as u64,
        };
        rows as u64 * u64::from(size) * sample + u64::from(width) * mode.bytes() as u64 * 2
    }

    /// The crop, RGB; `false` where no image was started.
    pub(crate) fn finish(self, out: &mut [u8]) -> bool {
        let size = self.size as usize;
        let Some((spec, mut work)) = self.state else {
            return false;
        };
        if let Work::Eight {
            across,
            batch,
            passed,
            ..
        } = &mut work
        {
            batch.flush(across.as_ref(), passed);
        }
        let palette = spec.palette.as_deref();
        let targets = out.chunks_exact_mut(3);
        match work {
            Work::Nearest { out: picked, .. } => {
                for (target, &value) in targets.zip(&picked) {
                    let rgb = match spec.mode {
                        Mode::Palette => convert::palette_to_rgb(value, palette),
                        _ => [value; 3],
                    };
                    target.copy_from_slice(&rgb);
                }
            }
            Work::Eight {
                channels,
                premultiply,
                down,
                passed,
                ..
            } => {
                let (rows, passed) = (passed.rows, passed.samples);
                let width = channels * size;
                let mut line = vec![0u8; width];
                for (y, targets) in out.chunks_exact_mut(size * 3).enumerate().take(size) {
                    match &down {
                        Some(fixed) => {
                            let (low, weights) = fixed.weights(y);
                            let source = &passed[(low - rows.0) * width..];
                            vertical(source, width, weights, &mut line);
                        }
                        None => line.copy_from_slice(&passed[y * width..][..width]),
                    }
                    eight_to_rgb(&line, spec.mode, premultiply, palette, targets, size);
                }
            }
            Work::Wide {
                down, rows, passed, ..
            } => {
                for (y, targets) in out.chunks_exact_mut(size * 3).enumerate().take(size) {
                    for (x, target) in targets.chunks_exact_mut(3).enumerate() {
                        let value = match &down {
                            Some(weights) => {
                                let (low, weights) = weights.of(y);
                                let mut sum = 0.0;
                                for (tap, weight) in weights.iter().enumerate() {
                                    sum += passed[(low - rows.0 + tap) * size + x] * weight;
                                }
                                store(sum, spec.mode)
                            }
                            None => passed[y * size + x],
                        };
                        target.fill(wide_to_grey(value, spec.mode));
                    }
                }
            }
        }
        true
    }
}

/// One row of eight-bit planes to interleaved RGB.
fn eight_to_rgb(
    line: &[u8],
    mode: Mode,
    premultiplied: bool,
    palette: Option<&crate::raster::Palette>,
    targets: &mut [u8],
    size: usize,
) {
    let at = |channel: usize, x: usize| line[channel * size + x];
    for (x, target) in targets.chunks_exact_mut(3).enumerate() {
        let rgb = match mode {
            Mode::Rgb => [at(0, x), at(1, x), at(2, x)],
            Mode::Rgba if premultiplied => {
                [0, 1, 2].map(|channel| convert::unpremultiply(at(channel, x), at(3, x)))
            }
            Mode::Rgba => [at(0, x), at(1, x), at(2, x)],
            Mode::GreyAlpha if premultiplied => [convert::unpremultiply(at(0, x), at(1, x)); 3],
            Mode::Cmyk => convert::cmyk_to_rgb([at(0, x), at(1, x), at(2, x), at(3, x)]),
            Mode::YCbCr => convert::ycbcr_to_rgb([at(0, x), at(1, x), at(2, x)]),
            Mode::Lab => convert::lab_to_rgb([at(0, x), at(1, x), at(2, x)]),
            Mode::PaletteAlpha => convert::palette_to_rgb(at(0, x), palette),
            _ => [at(0, x); 3],
        };
        target.copy_from_slice(&rgb);
    }
}

/// A sum as the reference stores it between the passes.
fn store(sum: f64, mode: Mode) -> f64 {
    let rounded = || if sum >= 0.0 { sum + 0.5 } else { sum - 0.5 };
    match mode {
        Mode::Grey16 | Mode::Grey16Big => (rounded() as i32).clamp(0, 65_535).into(),
        Mode::Int32 => (rounded() as i32).into(),
        _ => f64::from(sum as f32),
    }
}

fn wide_to_grey(value: f64, mode: Mode) -> u8 {
    if mode == Mode::Grey16Big {
        // The reference takes the first byte of a pixel for its high one here.
        let [high, low] = (value as u16).to_le_bytes();
        return if high != 0 { 255 } else { low };
    }
    // Values are clipped, not scaled; fractions are dropped.
    value.clamp(0.0, 255.0) as u8
}

/// One wide sample of a row.
fn wide_sample(row: &[u8], x: usize, mode: Mode) -> f64 {
    match mode {
        Mode::Grey16 | Mode::Grey16Big => {
            f64::from(u16::from_le_bytes([row[x * 2], row[x * 2 + 1]]))
        }
        Mode::Int32 => {
            let bytes = [row[x * 4], row[x * 4 + 1], row[x * 4 + 2], row[x * 4 + 3]];
            f64::from(i32::from_le_bytes(bytes))
        }
        _ => {
            let bytes = [row[x * 4], row[x * 4 + 1], row[x * 4 + 2], row[x * 4 + 3]];
            f64::from(f32::from_le_bytes(bytes))
        }
    }
}

/// One channel of interleaved pixels of `N` bytes.
fn pick<const N: usize>(pixels: &[u8], channel: usize, target: &mut [u8]) {
    for (sample, pixel) in target.iter_mut().zip(pixels.chunks_exact(N)) {
        *sample = pixel[channel];
    }
}

impl Sink for Crop {
    fn start(&mut self, mut spec: Spec) -> Result<()> {
        let (full_width, full_height) = spec.full_size();
        let covered = spec.covered();
        let plan = Plan::new(full_width, full_height, self.size);
        if spec.mode == Mode::PaletteAlpha && plan.resized != (spec.width, spec.height) {
            // Pillow loses the palette of such an image when it resizes it; what is
            // left is black.
            spec.palette = None;
        }
        let (left, top) = plan.origin;
        let size = self.size;
        if spec.mode.is_nearest() {
            let work = Work::Nearest {
                columns: nearest_positions(spec.width, plan.resized.0, left, size),
                rows: nearest_positions(spec.height, plan.resized.1, top, size),
                out: vec![0; size as usize * size as usize],
            };
            self.state = Some((spec, work));
            return Ok(());
        }
        // A pass that would not change the length is left out, as in the reference.
        let across = (plan.resized.0 != spec.width)
            .then(|| Weights::new(spec.width, covered.0, plan.resized.0, left, size));
        let down = (plan.resized.1 != spec.height)
            .then(|| Weights::new(spec.height, covered.1, plan.resized.1, top, size));
        let whole = |origin: u32| (origin as usize, (origin + size) as usize);
        let columns = across.as_ref().map_or_else(|| whole(left), Weights::span);
        let rows = down.as_ref().map_or_else(|| whole(top), Weights::span);
        let kept = (rows.1 - rows.0) * size as usize;
        let work = match spec.mode {
            Mode::Grey16 | Mode::Grey16Big | Mode::Int32 | Mode::Float32 => Work::Wide {
                left: left as usize,
                across,
                down,
                rows,
                passed: vec![0.0; kept],
            },
            mode => {
                let channels = mode.bytes();
                let has_alpha = matches!(mode, Mode::Rgba | Mode::GreyAlpha);
                // The reference returns a copy, alpha untouched, where nothing is resized.
                let premultiply = has_alpha && plan.resized != (spec.width, spec.height);
                Work::Eight {
                    channels,
                    premultiply,
                    across: across.as_ref().map(Fixed::new),
                    down: down.as_ref().map(Fixed::new),
                    columns,
                    batch: Batch::new(channels, columns),
                    passed: Passed {
                        rows,
                        channels,
                        size: size as usize,
                        samples: try_zeroed(kept * channels)?,
                    },
                    scratch: if premultiply {
                        vec![0; (columns.1 - columns.0) * channels]
                    } else {
                        Vec::new()
                    },
                }
            }
        };
        self.state = Some((spec, work));
        Ok(())
    }

    fn wants(&self, y: u32) -> bool {
        match &self.state {
            Some((_, Work::Nearest { rows, .. })) => rows.binary_search(&y).is_ok(),
            Some((_, Work::Eight { passed, .. })) => {
                (passed.rows.0..passed.rows.1).contains(&(y as usize))
            }
            Some((_, Work::Wide { rows, .. })) => (rows.0..rows.1).contains(&(y as usize)),
            None => false,
        }
    }

    fn columns(&self) -> (usize, usize) {
        match &self.state {
            Some((_, Work::Eight { columns, .. })) => *columns,
            Some((spec, _)) => (0, spec.width as usize),
            None => (0, 0),
        }
    }

    fn row_planar(&mut self, y: u32, planes: &[&[u8]]) {
        if let Some((
            _,
            Work::Eight {
                across,
                columns: (first, end),
                batch,
                passed,
                ..
            },
        )) = &mut self.state
        {
            let line = y as usize;
            if line < passed.rows.0 || line >= passed.rows.1 {
                return;
            }
            for (channel, plane) in planes.iter().enumerate() {
                batch.next_row(channel)[..*end - *first].copy_from_slice(&plane[*first..*end]);
            }
            batch.push(line, across.as_ref(), passed);
        }
    }

    fn row(&mut self, y: u32, pixels: &[u8]) {
        let size = self.size as usize;
        let Some((spec, work)) = &mut self.state else {
            return;
        };
        match work {
            Work::Nearest { columns, rows, out } => {
                let first = rows.partition_point(|&row| row < y);
                for (line, _) in rows
                    .iter()
                    .enumerate()
                    .skip(first)
                    .take_while(|(_, row)| **row == y)
                {
                    let target = &mut out[line * size..][..size];
                    for (value, &column) in target.iter_mut().zip(columns.iter()) {
                        *value = pixels[column as usize];
                    }
                }
            }
            Work::Eight {
                channels,
                premultiply,
                across,
                columns,
                batch,
                passed,
                scratch,
                ..
            } => {
                let line = y as usize;
                if line < passed.rows.0 || line >= passed.rows.1 {
                    return;
                }
                let (first, end) = *columns;
                let mut source = &pixels[first * *channels..end * *channels];
                if *premultiply {
                    scratch.copy_from_slice(source);
                    if *channels == 4 {
                        convert::premultiply::<4>(scratch);
                    } else {
                        convert::premultiply::<2>(scratch);
                    }
                    source = scratch;
                }
                for channel in 0..*channels {
                    let target = &mut batch.next_row(channel)[..end - first];
                    match *channels {
                        1 => target.copy_from_slice(source),
                        2 => pick::<2>(source, channel, target),
                        3 => pick::<3>(source, channel, target),
                        _ => pick::<4>(source, channel, target),
                    }
                }
                batch.push(line, across.as_ref(), passed);
            }
            Work::Wide {
                across,
                left,
                rows,
                passed,
                ..
            } => {
                let line = y as usize;
                if line < rows.0 || line >= rows.1 {
                    return;
                }
                let target = &mut passed[(line - rows.0) * size..][..size];
                for (x, value) in target.iter_mut().enumerate() {
                    *value = match across {
                        Some(weights) => {
                            let (low, weights) = weights.of(x);
                            let mut sum = 0.0;
                            for (tap, weight) in weights.iter().enumerate() {
                                sum += wide_sample(pixels, low + tap, spec.mode) * weight;
                            }
                            store(sum, spec.mode)
                        }
                        None => wide_sample(pixels, *left + x, spec.mode),
                    };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn vector_rows_equal_plain_rows(
            width in 1u32..700,
            seed in any::<u64>(),
            size in 1u32..64,
            rows in 1usize..=BATCH,
        ) {
            let mut state = seed;
            let size_of = size as usize;
            // Only some of the outputs, so that inputs do not begin at zero.
            let fixed = Fixed::new(&Weights::new(width, width.into(), size * 3, size, size));
            let low = fixed.bounds.iter().map(|&(low, _)| low).min().unwrap();
            let end = fixed.bounds.iter().map(|&(low, taps)| low + taps).max().unwrap();
            let mut batch = Batch::new(1, (low, end));
            for _ in 0..rows {
                for sample in &mut batch.next_row(0)[..end - low] {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *sample = (state >> 56) as u8;
                }
                batch.lines.push(batch.lines.len());
            }
            let stride = batch.stride;
            type How<'a> = &'a dyn Fn(&mut [u8], &mut [&mut [u8]]);
            let run = |how: How<'_>| {
                let mut out = vec![0; size_of * rows];
                let mut targets: Vec<&mut [u8]> = out.chunks_exact_mut(size_of).collect();
                how(&mut vec![0; BATCH * stride], &mut targets);
                out
            };
            let plain = run(&|_, targets| {
                for (row, target) in batch.planes.chunks_exact(stride).zip(targets) {
                    horizontal_plain(row, low, &fixed, target);
                }
            });
            let fast = run(&|turned, targets| {
                horizontal(&batch.planes, low, stride, turned, &fixed, targets, size_of);
            });
            prop_assert_eq!(&fast, &plain);
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // What a processor without AVX-512 takes.
                let narrow = run(&|turned, targets| {
                    // SAFETY: the processor has AVX2.
                    unsafe {
                        x86::turn_rows(&batch.planes, stride, turned);
                        x86::horizontal_avx2(turned, &fixed, targets, size_of);
                    }
                });
                prop_assert_eq!(&narrow, &plain);
            }
        }

        #[test]
        fn vector_columns_equal_plain_columns(
            height in 1u32..300,
            width in 1usize..70,
            seed in any::<u64>(),
        ) {
            let mut state = seed;
            let rows: Vec<u8> = (0..height as usize * width)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 56) as u8
                })
                .collect();
            let fixed = Fixed::new(&Weights::new(height, height.into(), 16, 0, 16));
            for y in 0..16 {
                let (low, weights) = fixed.weights(y);
                let mut plain = vec![0; width];
                vertical_plain(&rows[low * width..], width, weights, &mut plain, 0);
                let mut fast = vec![0; width];
                vertical(&rows[low * width..], width, weights, &mut fast);
                prop_assert_eq!(&fast, &plain);
            }
        }
    }

    #[test]
    fn nearest_takes_the_middle_of_each_step() {
        assert_eq!(nearest_positions(10, 5, 0, 5), [1, 3, 5, 7, 9]);
        assert_eq!(nearest_positions(2, 4, 1, 2), [0, 1]);
    }
}
