//! Pillow's antialiased bicubic resize, computed only where the crop needs it.
//!
//! Pillow resizes in two passes, first along rows, then along columns, and
//! rounds to the image's own sample type after each. Both passes of eight-bit
//! images use 22-bit fixed-point coefficients and 32-bit sums. The passes here
//! give the same sums, so the same bytes; the vector code splits a coefficient
//! in two 16-bit halves, which is exact, and takes half the instructions that
//! 32-bit products need.

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

/// Taps are padded to this many, the width of one vector step.
const TAP_STEP: usize = 16;

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
    /// Weights of outputs `first .. first + count` when `input` samples become `output`.
    fn new(input: u32, output: u32, first: u32, count: u32) -> Self {
        const SUPPORT: f64 = 2.0; // bicubic reaches two samples to each side
        // Pillow keeps the box in single precision.
        let scale = f64::from(input as f32) / f64::from(output);
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
        let end = self.bounds.iter().map(|&(low, taps)| low + taps).max().unwrap_or(0);
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
    /// For each output `padded` high halves, then `padded` low halves.
    halves: Vec<i16>,
    stride: usize,
    padded: usize,
}

impl Fixed {
    fn new(weights: &Weights) -> Self {
        let stride = weights.stride;
        let padded = stride.next_multiple_of(TAP_STEP);
        let scale = f64::from(1u32 << PRECISION_BITS);
        let whole: Vec<i32> = weights
            .exact
            .iter()
            .map(|&weight| {
                let half = if weight < 0.0 { -0.5 } else { 0.5 };
                (half + weight * scale) as i32
            })
            .collect();
        let mut halves = vec![0i16; weights.bounds.len() * padded * 2];
        for (output, taps) in whole.chunks_exact(stride).enumerate() {
            let (high, low) = halves[output * padded * 2..][..padded * 2].split_at_mut(padded);
            for (tap, &weight) in taps.iter().enumerate() {
                high[tap] = (weight >> LOW_BITS) as i16;
                low[tap] = (weight & ((1 << LOW_BITS) - 1)) as i16;
            }
        }
        Self {
            bounds: weights.bounds.clone(),
            whole,
            halves,
            stride,
            padded,
        }
    }
}

fn clip8(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

/// One row of one channel: `out[i] = Σ row[bounds(i)] · weights(i)`.
fn horizontal_plain(row: &[u8], fixed: &Fixed, out: &mut [u8]) {
    for (index, target) in out.iter_mut().enumerate() {
        let (low, taps) = fixed.bounds[index];
        let weights = &fixed.whole[index * fixed.stride..][..taps];
        let sum: i32 = row[low..low + taps]
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

    use super::{Fixed, HALF, LOW_BITS, PRECISION_BITS, ROW_PADDING, TAP_STEP};
    use std::arch::x86_64::*;

    /// Adds the eight lanes of each of four vectors.
    #[target_feature(enable = "avx2")]
    fn sums(a: __m256i, b: __m256i, c: __m256i, d: __m256i) -> __m128i {
        let ab = _mm256_hadd_epi32(a, b);
        let cd = _mm256_hadd_epi32(c, d);
        let abcd = _mm256_hadd_epi32(ab, cd);
        _mm_add_epi32(
            _mm256_castsi256_si128(abcd),
            _mm256_extracti128_si256::<1>(abcd),
        )
    }

    /// All channels of one row; `channels[c]` gives `outs[c * size ..]`.
    #[target_feature(enable = "avx2")]
    pub(super) fn horizontal<const N: usize>(
        channels: [&[u8]; N],
        fixed: &Fixed,
        outs: &mut [u8],
        size: usize,
    ) {
        let reach = fixed
            .bounds
            .iter()
            .map(|&(low, taps)| low + taps.next_multiple_of(TAP_STEP))
            .max()
            .unwrap_or(0);
        assert!(channels.iter().all(|row| row.len() >= reach));
        assert!(outs.len() >= N * size && size <= fixed.bounds.len());
        debug_assert!(ROW_PADDING >= TAP_STEP);
        let zero = _mm256_setzero_si256();
        for index in 0..size {
            let (low, taps) = fixed.bounds[index];
            let weights = &fixed.halves[index * fixed.padded * 2..][..fixed.padded * 2];
            let mut high_sums = [zero; N];
            let mut low_sums = [zero; N];
            let mut tap = 0;
            while tap < taps {
                // SAFETY: `tap + 16 <= padded`, since `padded` is a multiple of 16
                // that is at least `taps`; the row is long enough by the assertion.
                unsafe {
                    let high = _mm256_loadu_si256(weights.as_ptr().add(tap).cast());
                    let fine =
                        _mm256_loadu_si256(weights.as_ptr().add(fixed.padded + tap).cast());
                    for channel in 0..N {
                        let samples = _mm256_cvtepu8_epi16(_mm_loadu_si128(
                            channels[channel].as_ptr().add(low + tap).cast(),
                        ));
                        high_sums[channel] = _mm256_add_epi32(
                            high_sums[channel],
                            _mm256_madd_epi16(samples, high),
                        );
                        low_sums[channel] = _mm256_add_epi32(
                            low_sums[channel],
                            _mm256_madd_epi16(samples, fine),
                        );
                    }
                }
                tap += TAP_STEP;
            }
            let mut whole = [zero; 4];
            for channel in 0..N {
                whole[channel] = _mm256_add_epi32(
                    _mm256_slli_epi32::<{ LOW_BITS as i32 }>(high_sums[channel]),
                    low_sums[channel],
                );
            }
            let total = sums(whole[0], whole[1], whole[2], whole[3]);
            let rounded = _mm_srai_epi32::<{ PRECISION_BITS as i32 }>(_mm_add_epi32(
                total,
                _mm_set1_epi32(HALF),
            ));
            let packed = _mm_packus_epi16(_mm_packs_epi32(rounded, rounded), rounded);
            let bytes = (_mm_cvtsi128_si32(packed) as u32).to_le_bytes();
            for channel in 0..N {
                outs[channel * size + index] = bytes[channel];
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
                let pair = |a: i32, b: i32| _mm256_set1_epi32((a & 0xffff) | (b << 16));
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
            let bytes = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(words, words));
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

fn horizontal<const N: usize>(channels: [&[u8]; N], fixed: &Fixed, outs: &mut [u8], size: usize) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        unsafe { x86::horizontal(channels, fixed, outs, size) };
        return;
    }
    for (row, out) in channels.iter().zip(outs.chunks_exact_mut(size)) {
        horizontal_plain(row, fixed, out);
    }
}

/// The first pass over one row of planes, or a copy from `left` on where there is
/// nothing to resize.
fn first_pass(
    planes: &[&[u8]],
    across: Option<&Fixed>,
    left: usize,
    out: &mut [u8],
    size: usize,
) {
    match (across, planes) {
        (Some(fixed), &[a]) => horizontal([a], fixed, out, size),
        (Some(fixed), &[a, b]) => horizontal([a, b], fixed, out, size),
        (Some(fixed), &[a, b, c]) => horizontal([a, b, c], fixed, out, size),
        (Some(fixed), &[a, b, c, d]) => horizontal([a, b, c, d], fixed, out, size),
        (_, _) => {
            for (plane, target) in planes.iter().zip(out.chunks_exact_mut(size)) {
                target.copy_from_slice(&plane[left..left + size]);
            }
        }
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

/// What the passes need, by the kind of sample.
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
        /// First row that is needed, and one past the last.
        rows: (usize, usize),
        /// Rows after the first pass, channel after channel within a row.
        passed: Vec<u8>,
        /// One row, one plane for each channel.
        planes: Vec<Vec<u8>>,
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
        let Some((spec, work)) = self.state else {
            return false;
        };
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
                rows,
                passed,
                ..
            } => {
                let width = channels * size;
                let mut line = vec![0u8; width];
                for (y, targets) in out.chunks_exact_mut(size * 3).enumerate().take(size) {
                    match &down {
                        Some(fixed) => {
                            let (low, taps) = fixed.bounds[y];
                            let weights = &fixed.whole[y * fixed.stride..][..taps];
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

/// Splits interleaved samples into planes.
fn deinterleave(row: &[u8], channels: usize, first: usize, end: usize, planes: &mut [Vec<u8>]) {
    match planes {
        [only] => only[first..end].copy_from_slice(&row[first..end]),
        [red, green, blue] => {
            let source = row[first * 3..end * 3].chunks_exact(3);
            let targets = red[first..end]
                .iter_mut()
                .zip(&mut green[first..end])
                .zip(&mut blue[first..end]);
            for (pixel, ((red, green), blue)) in source.zip(targets) {
                (*red, *green, *blue) = (pixel[0], pixel[1], pixel[2]);
            }
        }
        many => {
            for (channel, plane) in many.iter_mut().enumerate() {
                let source = row[first * channels..end * channels].chunks_exact(channels);
                for (target, pixel) in plane[first..end].iter_mut().zip(source) {
                    *target = pixel[channel];
                }
            }
        }
    }
}

impl Sink for Crop {
    fn start(&mut self, mut spec: Spec) -> Result<()> {
        let plan = Plan::new(spec.width, spec.height, self.size);
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
            .then(|| Weights::new(spec.width, plan.resized.0, left, size));
        let down = (plan.resized.1 != spec.height)
            .then(|| Weights::new(spec.height, plan.resized.1, top, size));
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
                let width = spec.width as usize;
                Work::Eight {
                    channels,
                    premultiply,
                    across: across.as_ref().map(Fixed::new),
                    down: down.as_ref().map(Fixed::new),
                    columns,
                    rows,
                    passed: try_zeroed(kept * channels)?,
                    planes: vec![vec![0; width + ROW_PADDING]; channels],
                    scratch: if premultiply {
                        vec![0; width * channels]
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
            Some((_, Work::Eight { rows, .. } | Work::Wide { rows, .. })) => {
                (rows.0..rows.1).contains(&(y as usize))
            }
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
        self.planes(y, planes);
    }

    fn row(&mut self, y: u32, pixels: &[u8]) {
        let size = self.size as usize;
        let Some((spec, work)) = &mut self.state else {
            return;
        };
        match work {
            Work::Nearest { columns, rows, out } => {
                let first = rows.partition_point(|&row| row < y);
                for (line, _) in rows.iter().enumerate().skip(first).take_while(|(_, row)| **row == y)
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
                rows,
                passed,
                planes,
                scratch,
                ..
            } => {
                let line = y as usize;
                if line < rows.0 || line >= rows.1 {
                    return;
                }
                let (first, end) = *columns;
                let source = if *premultiply {
                    let range = first * *channels..end * *channels;
                    scratch[range.clone()].copy_from_slice(&pixels[range.clone()]);
                    if *channels == 4 {
                        convert::premultiply::<4>(&mut scratch[range]);
                    } else {
                        convert::premultiply::<2>(&mut scratch[range]);
                    }
                    &scratch[..]
                } else {
                    pixels
                };
                deinterleave(source, *channels, first, end, planes);
                let out = &mut passed[(line - rows.0) * *channels * size..][..*channels * size];
                let planes: [&[u8]; 4] = std::array::from_fn(|index| {
                    planes.get(index).map_or(&[][..], |plane| &plane[..])
                });
                first_pass(&planes[..*channels], across.as_ref(), first, out, size);
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

impl Crop {
    /// As [`Sink::row_planar`], for modes without alpha.
    fn planes(&mut self, y: u32, planes: &[&[u8]]) {
        let size = self.size as usize;
        let Some((_, work)) = &mut self.state else {
            return;
        };
        let Work::Eight {
            channels,
            across,
            columns,
            rows,
            passed,
            ..
        } = work
        else {
            return;
        };
        let line = y as usize;
        if line >= rows.0 && line < rows.1 {
            let out = &mut passed[(line - rows.0) * *channels * size..][..*channels * size];
            first_pass(planes, across.as_ref(), columns.0, out, size);
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
        ) {
            let mut state = seed;
            let mut row: Vec<u8> = (0..width)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 56) as u8
                })
                .collect();
            let fixed = Fixed::new(&Weights::new(width, size, 0, size));
            let mut plain = vec![0; size as usize];
            horizontal_plain(&row, &fixed, &mut plain);
            row.resize(width as usize + ROW_PADDING, 7);
            let mut fast = vec![0; size as usize * 2];
            horizontal([&row, &row], &fixed, &mut fast, size as usize);
            prop_assert_eq!(&fast[..size as usize], &plain[..]);
            prop_assert_eq!(&fast[size as usize..], &plain[..]);
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
            let fixed = Fixed::new(&Weights::new(height, 16, 0, 16));
            for y in 0..16 {
                let (low, taps) = fixed.bounds[y];
                let weights = &fixed.whole[y * fixed.stride..][..taps];
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
