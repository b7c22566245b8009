//! GIF, first frame. Container parsed here with the reference's rules for the
//! canvas and its palette; the LZW stream by `weezl`.

use crate::error::{Blame, Result};
use crate::raster::{Mode, Palette, Raster, Sink, Spec, palette_from_rgb, try_zeroed};
use crate::{Header, budget};
use weezl::{BitOrder, LzwStatus, decode::Decoder};

const GIF: Blame = Blame("GIF");

/// Codes longer than this are not GIF.
const MAX_CODE_BITS: u8 = 12;

/// Steps of the LZW decoder that may do nothing that shows: it takes clear codes, of
/// which a few are in the word of bits that it holds.
pub(crate) const MAX_IDLE_STEPS: usize = 64;

/// A reader that knows how much is left.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            return Err(GIF.truncated(format!(
                "{what} needs {count} bytes, {} are left",
                self.rest.len()
            )));
        };
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self, what: &str) -> Result<u8> {
        Ok(self.take(1, what)?[0])
    }

    /// A data sub-block; `None` for the terminator and for a missing length, and
    /// as much as there is of a cut block, as the reference reads it.
    fn block(&mut self) -> Option<&'a [u8]> {
        let (&length, rest) = self.rest.split_first()?;
        self.rest = rest;
        if length == 0 {
            return None;
        }
        let (block, rest) = rest.split_at(usize::from(length).min(rest.len()));
        self.rest = rest;
        Some(block)
    }
}

struct Parsed<'a> {
    width: usize,
    height: usize,
    /// Left, top, right and bottom of the frame on the canvas.
    frame: [usize; 4],
    interlaced: bool,
    transparent: Option<u8>,
    palette: Option<Box<Palette>>,
    code_bits: u8,
    data: &'a [u8],
}

/// A palette whose entries are not simply their own index as grey.
fn colours(packed: &[u8]) -> Option<Box<Palette>> {
    let is_ramp = packed
        .chunks_exact(3)
        .enumerate()
        .all(|(index, rgb)| rgb.iter().all(|&level| usize::from(level) == index));
    (!is_ramp).then(|| palette_from_rgb(packed))
}

fn parse(bytes: &[u8]) -> Result<Parsed<'_>> {
    if !bytes.starts_with(b"GIF87a") && !bytes.starts_with(b"GIF89a") {
        return Err(GIF.corrupt("no signature"));
    }
    let mut reader = Reader { rest: bytes };
    let screen = reader.take(13, "screen descriptor")?;
    let short =
        |bytes: &[u8], at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let (mut width, mut height) = (short(screen, 6), short(screen, 8));
    let mut palette = None;
    if screen[10] & 0x80 != 0 {
        palette = colours(reader.take(6 << (screen[10] & 7), "global palette")?);
    }
    let mut transparent = None;
    loop {
        budget::check()?;
        match reader.byte("block type")? {
            b'!' => {
                let label = reader.byte("extension label")?;
                let mut block = reader.block();
                if let (0xf9, Some(control)) = (label, block) {
                    if control.len() < 4 {
                        return Err(GIF.truncated("graphic control extension"));
                    }
                    if control[0] & 1 != 0 {
                        transparent = Some(control[3]);
                    }
                }
                // The reference reads on to a terminator even where the first
                // block was empty, but for comments.
                if label == 0xfe {
                    while block.is_some() {
                        block = reader.block();
                    }
                } else {
                    while reader.block().is_some() {}
                }
            }
            b',' => {
                let image = reader.take(9, "image descriptor")?;
                let (left, top) = (short(image, 0), short(image, 2));
                let (right, bottom) = (left + short(image, 4), top + short(image, 6));
                width = width.max(right);
                height = height.max(bottom);
                if image[8] & 0x80 != 0 {
                    palette = colours(reader.take(6 << (image[8] & 7), "local palette")?);
                }
                let code_bits = reader.byte("code size")?;
                return Ok(Parsed {
                    width,
                    height,
                    frame: [left, top, right, bottom],
                    interlaced: image[8] & 0x40 != 0,
                    transparent,
                    palette,
                    code_bits,
                    data: reader.rest,
                });
            }
            b';' => return Err(GIF.corrupt("no image before the end of the file")),
            _ => {}
        }
    }
}

pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let parsed = parse(bytes)?;
    let canvas = parsed.width as u64 * parsed.height as u64;
    Ok(Header {
        width: parsed.width as u32,
        height: parsed.height as u32,
        // The canvas, and the frame before it is placed.
        memory: canvas * 2,
        mode: if parsed.palette.is_some() {
            Mode::Palette
        } else {
            Mode::Grey
        },
    })
}

pub(crate) fn decode(bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
    let parsed = parse(bytes)?;
    let [left, top, right, bottom] = parsed.frame;
    let (width, height) = (right - left, bottom - top);
    if width == 0 || height == 0 {
        return Err(GIF.corrupt("the first frame is empty"));
    }
    if parsed.code_bits > MAX_CODE_BITS {
        return Err(GIF.corrupt(format!("code size of {} bits", parsed.code_bits)));
    }
    let pixels = expand(&parsed, width * height)?;
    let mode = if parsed.palette.is_some() {
        Mode::Palette
    } else {
        Mode::Grey
    };
    let spec = Spec::new(parsed.width as u32, parsed.height as u32, mode);
    let mut canvas = Raster::zeroed(spec.with_palette(parsed.palette.clone()))?;
    if let Some(index) = parsed.transparent {
        canvas.data.fill(index);
    }
    let stored_rows = pixels.chunks_exact(width);
    if parsed.interlaced {
        let passes = [(0, 8), (4, 8), (2, 4), (1, 2)];
        let order = passes
            .into_iter()
            .flat_map(|(first, step)| (first..height).step_by(step));
        for (y, row) in order.zip(stored_rows) {
            canvas.row_mut((top + y) as u32)[left..right].copy_from_slice(row);
        }
    } else {
        for (y, row) in stored_rows.enumerate() {
            canvas.row_mut((top + y) as u32)[left..right].copy_from_slice(row);
        }
    }
    canvas.feed(sink)
}

/// The indices of the frame, in the order of the file.
fn expand(parsed: &Parsed<'_>, wanted: usize) -> Result<Vec<u8>> {
    let mut pixels = try_zeroed(wanted)?;
    let mut decoder = Decoder::new(BitOrder::Lsb, parsed.code_bits);
    let mut reader = Reader { rest: parsed.data };
    let mut filled = 0;
    let mut is_over = false;
    'blocks: while filled < wanted && !is_over {
        budget::check()?;
        // Once the blocks are over, the decoder may still hold codes.
        let mut block = reader.block().unwrap_or_else(|| {
            is_over = true;
            &[]
        });
        let mut idle = 0;
        while filled < wanted {
            let step = decoder.decode_bytes(block, &mut pixels[filled..]);
            block = &block[step.consumed_in..];
            filled += step.consumed_out;
            match step.status {
                Ok(LzwStatus::Done) => break 'blocks,
                Ok(LzwStatus::NoProgress) => break,
                Ok(_) if step.consumed_in == 0 && step.consumed_out == 0 => {
                    idle += 1;
                    if idle > MAX_IDLE_STEPS {
                        break;
                    }
                }
                Ok(_) => idle = 0,
                Err(_) if filled == wanted => break 'blocks,
                Err(error) => {
                    return Err(GIF.corrupt(format!("{error} at pixel {filled} of {wanted}")));
                }
            }
        }
    }
    if filled < wanted {
        return Err(GIF.truncated(format!("{filled} pixels of {wanted}")));
    }
    Ok(pixels)
}
