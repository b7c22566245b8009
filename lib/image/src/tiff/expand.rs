//! From the bytes of a strip or tile to its samples.

use super::fax::{self, Scheme};
use super::layout::{self, Layout};
use super::{LZMA_BYTES, Parsed, TIFF, tag};
use crate::budget::{self, PIECE_BYTES};
use crate::error::{ImageError, Result};
use crate::gif::MAX_IDLE_STEPS;
use crate::inflate::{Ending, Inflater};
use crate::jpeg::{Space, decode_tile};
use crate::raster::try_zeroed;
use std::borrow::Cow;
use std::io::Read;
use weezl::BitOrder;

/// Compressions that the reference reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    None,
    FaxRuns,
    FaxGroup3,
    FaxGroup4,
    Lzw,
    OldJpeg,
    Jpeg,
    Deflate,
    PackBits,
    ThunderScan,
    Lzma,
    Zstandard,
}

impl Codec {
    pub(super) fn from_tag(compression: u64) -> Option<Self> {
        Some(match compression {
            1 => Self::None,
            2 => Self::FaxRuns,
            3 => Self::FaxGroup3,
            4 => Self::FaxGroup4,
            5 => Self::Lzw,
            6 => Self::OldJpeg,
            7 => Self::Jpeg,
            8 | 32946 => Self::Deflate,
            32773 => Self::PackBits,
            32809 => Self::ThunderScan,
            34925 => Self::Lzma,
            50000 => Self::Zstandard,
            _ => return None,
        })
    }
}

/// Expanded samples, row after row.
pub(super) struct Strip<'a> {
    pub(super) data: Cow<'a, [u8]>,
    pub(super) row_bytes: usize,
}

impl Strip<'_> {
    pub(super) fn unpack(&self, line: usize, columns: usize, layout: &Layout, row: &mut [u8]) {
        let line = &self.data[line * self.row_bytes..][..self.row_bytes];
        layout::unpack(line, columns, layout, row);
    }

    pub(super) fn unpack_plane(
        &self,
        line: usize,
        columns: usize,
        plane: usize,
        layout: &Layout,
        row: &mut [u8],
    ) {
        debug_assert_eq!(row.len(), columns * layout.mode.bytes());
        let line = &self.data[line * self.row_bytes..][..self.row_bytes];
        layout::unpack_plane(line, plane, layout, row);
    }
}

#[allow(clippy::too_many_arguments)]
pub(super) fn expand(
    file: &[u8],
    data: &[u8],
    parsed: &Parsed<'_>,
    width: usize,
    rows: usize,
    row_bytes: usize,
    what: &str,
    index: usize,
) -> Result<Strip<'static>> {
    // Chroma-subsampled data has its own unit: a block of lumas with two chromas.
    let blocks = parsed.subsampling.map(|(across, down)| Blocks {
        across,
        down,
        row_bytes: width.div_ceil(across) * (across * down + 2),
        rows: rows.div_ceil(down),
    });
    let (line, lines) = blocks
        .as_ref()
        .map_or((row_bytes, rows), |blocks| (blocks.row_bytes, blocks.rows));
    let wanted = line * lines;
    let short = |got: usize| {
        TIFF.truncated(format!(
            "{what} {index} has {got} bytes of {wanted} after expansion"
        ))
    };
    let broken = |reason: String| TIFF.corrupt(format!("{what} {index}: {reason}"));
    if matches!(parsed.codec, Codec::Jpeg | Codec::OldJpeg) {
        return jpeg(file, data, parsed, width, rows);
    }
    let reversed;
    let data = if parsed.fill_reversed {
        reversed = data
            .iter()
            .map(|byte| byte.reverse_bits())
            .collect::<Vec<u8>>();
        &reversed[..]
    } else {
        data
    };
    let mut out = try_zeroed(wanted)?;
    match parsed.codec {
        Codec::PackBits => {
            let got = packbits(data, &mut out)?;
            if got < wanted {
                return Err(short(got));
            }
        }
        Codec::Lzw => {
            let got = lzw(data, &mut out, broken)?;
            if got < wanted {
                return Err(short(got));
            }
        }
        Codec::Deflate => {
            let (got, ending) = Inflater::new(data.chunks(PIECE_BYTES)).read(&mut out)?;
            match ending {
                Ending::Full => {}
                Ending::Broken(reason) => return Err(broken(reason)),
                Ending::Finished | Ending::Starved => return Err(short(got)),
            }
        }
        Codec::Zstandard => {
            let broken = |reason: String| budget::look().err().unwrap_or_else(|| broken(reason));
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(Watched(data))
                .map_err(|error| broken(error.to_string()))?;
            decoder
                .read_exact(&mut out)
                .map_err(|error| broken(error.to_string()))?;
        }
        Codec::Lzma => {
            let stream = liblzma::stream::Stream::new_stream_decoder(LZMA_BYTES, 0);
            let stream = stream.map_err(|error| broken(error.to_string()))?;
            liblzma::read::XzDecoder::new_stream(Watched(data), stream)
                .read_exact(&mut out)
                .map_err(|error| {
                    budget::look()
                        .err()
                        .unwrap_or_else(|| broken(error.to_string()))
                })?;
        }
        Codec::ThunderScan => {
            if parsed.depth != 4 {
                return Err(TIFF.unsupported("ThunderScan of other than four bits"));
            }
            thunder_scan(data, width, &mut out, row_bytes)
                .ok_or_else(|| broken("ThunderScan rows do not fit".to_owned()))?;
        }
        Codec::FaxRuns | Codec::FaxGroup3 | Codec::FaxGroup4 => {
            if parsed.depth != 1 || parsed.samples != 1 {
                return Err(TIFF.unsupported("CCITT coding of other than one bit"));
            }
            let options = parsed.directory.number(tag::T4_OPTIONS).unwrap_or(0);
            let scheme = match parsed.codec {
                Codec::FaxRuns => Scheme::Runs,
                Codec::FaxGroup3 => Scheme::Group3 {
                    two_dimensional: options & 1 != 0,
                },
                _ => Scheme::Group4,
            };
            fax::expand(data, scheme, width, &mut out)?;
        }
        Codec::None | Codec::Jpeg | Codec::OldJpeg => {}
    }
    let samples = if parsed.planar { 1 } else { parsed.samples };
    let is_big = parsed.directory.is_big_endian();
    let predictor = match parsed.codec {
        Codec::Lzw | Codec::Deflate | Codec::Zstandard | Codec::Lzma => {
            parsed.directory.number(tag::PREDICTOR).unwrap_or(1)
        }
        _ => 1,
    };
    if predictor != 3 && is_big {
        to_native(&mut out, parsed.depth);
    }
    match predictor {
        1 => {}
        2 => {
            for row in out.chunks_exact_mut(line) {
                undo_differences(row, samples, parsed.depth).ok_or_else(|| {
                    TIFF.unsupported(format!("predictor of {} bits", parsed.depth))
                })?;
            }
        }
        3 => {
            if !matches!(parsed.depth, 16 | 24 | 32 | 64) {
                return Err(TIFF.unsupported("float predictor of whole numbers"));
            }
            for row in out.chunks_exact_mut(line) {
                undo_float_differences(row, samples, parsed.depth / 8);
            }
        }
        other => return Err(TIFF.unsupported(format!("predictor {other}"))),
    }
    match blocks {
        Some(blocks) => blocks.to_rgb(&out, width, rows),
        None => Ok(Strip {
            data: out.into(),
            row_bytes,
        }),
    }
}

/// Puts big-endian samples in this machine's order.
fn to_native(data: &mut [u8], depth: usize) {
    match depth {
        16 => data.chunks_exact_mut(2).for_each(<[u8]>::reverse),
        32 => data.chunks_exact_mut(4).for_each(<[u8]>::reverse),
        64 => data.chunks_exact_mut(8).for_each(<[u8]>::reverse),
        _ => {}
    }
}

fn undo_differences(row: &mut [u8], samples: usize, depth: usize) -> Option<()> {
    match depth {
        8 => {
            for at in samples..row.len() {
                row[at] = row[at].wrapping_add(row[at - samples]);
            }
        }
        16 => {
            for at in samples..row.len() / 2 {
                let before =
                    u16::from_le_bytes([row[(at - samples) * 2], row[(at - samples) * 2 + 1]]);
                let now = u16::from_le_bytes([row[at * 2], row[at * 2 + 1]]);
                row[at * 2..at * 2 + 2].copy_from_slice(&now.wrapping_add(before).to_le_bytes());
            }
        }
        32 => {
            let word = |row: &[u8], at: usize| {
                u32::from_le_bytes([
                    row[at * 4],
                    row[at * 4 + 1],
                    row[at * 4 + 2],
                    row[at * 4 + 3],
                ])
            };
            for at in samples..row.len() / 4 {
                let sum = word(row, at).wrapping_add(word(row, at - samples));
                row[at * 4..at * 4 + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        _ => return None,
    }
    Some(())
}

/// Bytes of a row were sorted by significance, then differenced.
fn undo_float_differences(row: &mut [u8], samples: usize, size: usize) {
    for at in samples..row.len() {
        row[at] = row[at].wrapping_add(row[at - samples]);
    }
    let sorted = row.to_vec();
    let count = row.len() / size;
    for value in 0..count {
        for byte in 0..size {
            row[value * size + byte] = sorted[(size - 1 - byte) * count + value];
        }
    }
}

fn packbits(mut data: &[u8], out: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < out.len() {
        budget::check()?;
        let Some((&head, rest)) = data.split_first() else {
            break;
        };
        data = rest;
        match head as i8 {
            -128 => {}
            literal @ 0.. => {
                let count = (literal as usize + 1)
                    .min(out.len() - filled)
                    .min(data.len());
                out[filled..filled + count].copy_from_slice(&data[..count]);
                filled += count;
                data = &data[(literal as usize + 1).min(data.len())..];
            }
            repeat => {
                let Some((&value, rest)) = data.split_first() else {
                    break;
                };
                data = rest;
                let count = (1 - isize::from(repeat)) as usize;
                let count = count.min(out.len() - filled);
                out[filled..filled + count].fill(value);
                filled += count;
            }
        }
    }
    Ok(filled)
}

fn lzw(data: &[u8], out: &mut [u8], broken: impl Fn(String) -> ImageError) -> Result<usize> {
    // Old writers put the low bit first and switch code sizes late; their streams
    // begin with a clear code that gives them away.
    let is_old = data.len() >= 2 && data[0] == 0 && data[1] & 1 != 0;
    let mut decoder = if is_old {
        weezl::decode::Decoder::new(BitOrder::Lsb, 8)
    } else {
        weezl::decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8)
    };
    let (mut read, mut filled, mut idle) = (0, 0, 0);
    while filled < out.len() {
        budget::look()?;
        let piece = &data[read..data.len().min(read + PIECE_BYTES)];
        let step = decoder.decode_bytes(piece, &mut out[filled..]);
        read += step.consumed_in;
        filled += step.consumed_out;
        match step.status {
            Ok(weezl::LzwStatus::Done) => break,
            Ok(weezl::LzwStatus::NoProgress) => break,
            Ok(_) if step.consumed_in == 0 && step.consumed_out == 0 => {
                idle += 1;
                if idle > MAX_IDLE_STEPS {
                    break;
                }
            }
            Ok(_) => idle = 0,
            Err(error) if filled < out.len() => return Err(broken(error.to_string())),
            Err(_) => break,
        }
    }
    Ok(filled)
}

/// Input of a decoder that is asked for little at a time, with an eye on the clock.
struct Watched<'a>(&'a [u8]);

impl Read for Watched<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        budget::check().map_err(std::io::Error::other)?;
        self.0.read(out)
    }
}

/// Four-bit greys as runs and differences.
fn thunder_scan(data: &[u8], width: usize, out: &mut [u8], row_bytes: usize) -> Option<()> {
    const TWO_BIT: [i8; 4] = [0, 1, 0, -1];
    const THREE_BIT: [i8; 8] = [0, 1, 2, 3, 0, -3, -2, -1];
    let mut input = data.iter().copied();
    for row in out.chunks_exact_mut(row_bytes) {
        let (mut x, mut last) = (0usize, 0u8);
        let mut put = |x: &mut usize, value: u8| {
            let value = value & 15;
            if *x < width {
                row[*x / 2] |= if (*x).is_multiple_of(2) {
                    value << 4
                } else {
                    value
                };
            }
            *x += 1;
            value
        };
        while x < width {
            let code = input.next()?;
            match code >> 6 {
                0 => {
                    for _ in 0..code & 63 {
                        put(&mut x, last);
                    }
                }
                1 => {
                    for shift in [4, 2, 0] {
                        let delta = code >> shift & 3;
                        if delta != 2 {
                            last = put(
                                &mut x,
                                last.wrapping_add_signed(TWO_BIT[usize::from(delta)]),
                            );
                        }
                    }
                }
                2 => {
                    for shift in [3, 0] {
                        let delta = code >> shift & 7;
                        if delta != 4 {
                            last = put(
                                &mut x,
                                last.wrapping_add_signed(THREE_BIT[usize::from(delta)]),
                            );
                        }
                    }
                }
                _ => last = put(&mut x, code & 15),
            }
        }
        if x != width {
            return None;
        }
    }
    Some(())
}

fn jpeg(
    file: &[u8],
    data: &[u8],
    parsed: &Parsed<'_>,
    width: usize,
    rows: usize,
) -> Result<Strip<'static>> {
    let space = if parsed.photometric == 6 {
        Space::YCbCr
    } else {
        Space::Raw
    };
    let mut data = data;
    if parsed.codec == Codec::OldJpeg {
        // Only the form with one whole stream is read; the other, with its tables
        // in tags, has not been written for thirty years.
        let stream = parsed
            .directory
            .number(tag::JPEG_STREAM)
            .and_then(|offset| file.get(usize::try_from(offset).ok()?..))
            .filter(|stream| stream.starts_with(&[0xff, 0xd8]));
        match stream {
            Some(stream) if parsed.tiles.down == 1 => data = stream,
            _ if data.starts_with(&[0xff, 0xd8]) => {}
            _ => return Err(TIFF.unsupported("old-style JPEG without a whole stream")),
        }
    }
    let tables = parsed.directory.bytes(tag::JPEG_TABLES);
    let most = if parsed.codec == Codec::OldJpeg {
        (
            parsed.width.next_multiple_of(32),
            parsed.height.next_multiple_of(32),
        )
    } else {
        (width, rows.max(parsed.tiles.height))
    };
    let (got_width, got_rows, components, samples) = decode_tile(tables, data, space, most)
        .map_err(|error| match error {
            ImageError::Truncated { detail, .. } => TIFF.truncated(detail),
            ImageError::Corrupt { detail, .. } => TIFF.corrupt(detail),
            other => other,
        })?;
    let wanted = if parsed.planar { 1 } else { parsed.samples };
    let (got_width, got_rows) = (got_width as usize, got_rows as usize);
    if got_width < width.min(parsed.width) || components as usize != wanted {
        return Err(TIFF.corrupt(format!(
            "JPEG of {got_width}×{got_rows} with {components} components in a tile of {width}×{rows}"
        )));
    }
    let row_bytes = width * wanted;
    if got_width == width && got_rows >= rows {
        return Ok(Strip {
            data: samples.into(),
            row_bytes,
        });
    }
    let mut out = try_zeroed(row_bytes * rows)?;
    let stride = got_width * wanted;
    for (target, source) in out
        .chunks_exact_mut(row_bytes)
        .zip(samples.chunks_exact(stride))
    {
        let count = row_bytes.min(stride);
        target[..count].copy_from_slice(&source[..count]);
    }
    if got_rows < rows && got_rows < parsed.height {
        return Err(TIFF.truncated(format!("JPEG of {got_rows} rows in a tile of {rows}")));
    }
    Ok(Strip {
        data: out.into(),
        row_bytes,
    })
}

/// Units of chroma-subsampled data.
struct Blocks {
    across: usize,
    down: usize,
    row_bytes: usize,
    rows: usize,
}

impl Blocks {
    fn to_rgb(&self, data: &[u8], width: usize, rows: usize) -> Result<Strip<'static>> {
        let unit = self.across * self.down + 2;
        let mut out = try_zeroed(width * rows * 3)?;
        for (y, row) in out.chunks_exact_mut(width * 3).enumerate() {
            let line = &data[y / self.down * self.row_bytes..][..self.row_bytes];
            for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
                let block = &line[x / self.across * unit..][..unit];
                let luma = block[y % self.down * self.across + x % self.across];
                pixel.copy_from_slice(&to_rgb(luma, block[unit - 2], block[unit - 1]));
            }
        }
        Ok(Strip {
            data: out.into(),
            row_bytes: width * 3,
        })
    }
}

/// YCbCr with full range, as libtiff converts it by default: 16-bit fixed point.
fn to_rgb(luma: u8, cb: u8, cr: u8) -> [u8; 3] {
    const ONE: f64 = 65_536.0;
    let fix = |factor: f64| (factor * ONE + 0.5) as i32;
    let (cb, cr) = (i32::from(cb) - 128, i32::from(cr) - 128);
    let luma = i32::from(luma);
    let half = 1 << 15;
    let red = luma + ((fix(1.402) * cr + half) >> 16);
    let green = luma + ((-fix(0.344_136) * cb - fix(0.714_136) * cr + half) >> 16);
    let blue = luma + ((fix(1.772) * cb + half) >> 16);
    [red, green, blue].map(|value| value.clamp(0, 255) as u8)
}
