//! PC Paintbrush: 1-bit, 2 and 4 planes of bits, 8-bit grey or palette, 24-bit
//! in planes; run-length coded. Written here because no maintained crate reads
//! all of these and keeps the palette, which the nearest-neighbour resize needs.

use crate::error::{Blame, Result};
use crate::raster::{Mode, Palette, Sink, Spec, palette_from_rgb};
use crate::{Header, budget};

const PCX: Blame = Blame("PCX");

/// Bytes before the pixels.
const HEADER_BYTES: usize = 128;

/// A marker and 256 RGB triples at the end of the file.
const TRAILER_BYTES: usize = 769;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    Bits,
    BitPlanes(usize),
    Bytes,
    RgbPlanes,
}

struct Parsed {
    width: usize,
    height: usize,
    mode: Mode,
    layout: Layout,
    palette: Option<Box<Palette>>,
    /// Bytes of one decoded line, all planes.
    line: usize,
    planes: usize,
}

fn parse(bytes: &[u8]) -> Result<Parsed> {
    let Some(head) = bytes.get(..68) else {
        return Err(PCX.truncated(format!("header has {} bytes of 68", bytes.len())));
    };
    if head[0] != 10 || !matches!(head[1], 0 | 2 | 3 | 5) {
        return Err(PCX.corrupt(format!("no signature, first bytes {:?}", &head[..2])));
    }
    let short = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
    let (left, top, right, bottom) = (short(4), short(6), short(8) + 1, short(10) + 1);
    if right <= left || bottom <= top {
        return Err(PCX.corrupt(format!("window {left},{top} to {right},{bottom} is empty")));
    }
    let (width, height) = (right - left, bottom - top);
    let (version, bits, planes) = (head[1], usize::from(head[3]), usize::from(head[65]));
    let mut palette = None;
    let (mode, layout) = match (version, bits, planes) {
        (_, 1, 1) => (Mode::Bit, Layout::Bits),
        (_, 1, 2 | 4) => {
            palette = Some(palette_from_rgb(&head[16..64]));
            (Mode::Palette, Layout::BitPlanes(planes))
        }
        (5, 8, 1) => {
            let Some(start) = bytes.len().checked_sub(TRAILER_BYTES) else {
                return Err(PCX.truncated("no room for a palette of 769 bytes"));
            };
            let trailer = &bytes[start..];
            let is_grey = || {
                trailer[1..]
                    .chunks_exact(3)
                    .zip(0u8..=255)
                    .all(|(rgb, level)| rgb == [level; 3])
            };
            if trailer[0] == 12 && !is_grey() {
                palette = Some(palette_from_rgb(&trailer[1..]));
                (Mode::Palette, Layout::Bytes)
            } else {
                (Mode::Grey, Layout::Bytes)
            }
        }
        (5, 8, 3) => (Mode::Rgb, Layout::RgbPlanes),
        _ => {
            return Err(PCX.unsupported(format!(
                "version {version} with {bits} bits in {planes} planes"
            )));
        }
    };
    // The stride in the header is trusted only as far as it tells whether lines
    // are padded to an even length.
    let mut stride = (width * bits).div_ceil(8);
    if short(66) != stride {
        stride += stride % 2;
    }
    Ok(Parsed {
        width,
        height,
        mode,
        layout,
        palette,
        line: stride * planes,
        planes,
    })
}

pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let parsed = parse(bytes)?;
    Ok(Header {
        width: parsed.width as u32,
        height: parsed.height as u32,
        memory: parsed.line as u64 + parsed.width as u64 * 3,
        mode: parsed.mode,
    })
}

pub(crate) fn decode(bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
    let parsed = parse(bytes)?;
    let mut input = bytes
        .get(HEADER_BYTES..)
        .unwrap_or_default()
        .iter()
        .copied();
    let mut line = vec![0u8; parsed.line];
    let mut row = vec![0u8; parsed.width * parsed.mode.bytes()];
    let spec = Spec::new(parsed.width as u32, parsed.height as u32, parsed.mode);
    sink.start(spec.with_palette(parsed.palette.clone()))?;
    for y in 0..parsed.height {
        budget::check()?;
        let mut filled = 0;
        let ended = || PCX.truncated(format!("pixels end in row {y} of {}", parsed.height));
        while filled < line.len() {
            let byte = input.next().ok_or_else(ended)?;
            if byte & 0xc0 != 0xc0 {
                line[filled] = byte;
                filled += 1;
                continue;
            }
            let run = usize::from(byte & 0x3f);
            let value = input.next().ok_or_else(ended)?;
            if filled + run > line.len() {
                return Err(PCX.corrupt(format!("a run crosses the end of row {y}")));
            }
            line[filled..filled + run].fill(value);
            filled += run;
        }
        if sink.wants(y as u32) {
            unpack(&parsed, &line, &mut row);
            sink.row(y as u32, &row);
        }
    }
    Ok(())
}

fn unpack(parsed: &Parsed, line: &[u8], row: &mut [u8]) {
    let stride = parsed.line / parsed.planes;
    let bit = |plane: usize, x: usize| line[plane * stride + x / 8] >> (7 - x % 8) & 1;
    match parsed.layout {
        Layout::Bits => {
            for (x, pixel) in row.iter_mut().enumerate() {
                *pixel = bit(0, x) * 255;
            }
        }
        Layout::BitPlanes(planes) => {
            for (x, pixel) in row.iter_mut().enumerate() {
                *pixel = (0..planes).map(|plane| bit(plane, x) << plane).sum();
            }
        }
        Layout::Bytes => row.copy_from_slice(&line[..parsed.width]),
        Layout::RgbPlanes => {
            for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
                for (plane, sample) in pixel.iter_mut().enumerate() {
                    *sample = line[plane * stride + x];
                }
            }
        }
    }
}
