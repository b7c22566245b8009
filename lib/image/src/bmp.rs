//! Windows bitmaps: 1, 4, 8, 16, 24 and 32 bits, bit fields, RLE4 and RLE8,
//! bottom-up and top-down. Written here because palettes have to stay palettes
//! for the nearest-neighbour resize, and crates expand them.

use crate::error::{Blame, Result};
use crate::raster::{Mode, Palette, Sink, Spec, try_zeroed};
use crate::{Header, budget};

const BMP: Blame = Blame("BMP");

/// Bytes of the file header, before the bitmap header.
const FILE_HEADER_BYTES: usize = 14;

/// How the samples of a row lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packing {
    Bit,
    Nibble,
    Byte,
    /// Sixteen bits, five each, or six of green.
    Words {
        green_bits: u32,
    },
    /// Bytes of a pixel, and which of them are red, green, blue and perhaps alpha.
    Bytes {
        pixel: usize,
        order: [usize; 3],
        alpha: Option<usize>,
    },
}

impl Packing {
    fn bits(self) -> usize {
        match self {
            Self::Bit => 1,
            Self::Nibble => 4,
            Self::Byte => 8,
            Self::Words { .. } => 16,
            Self::Bytes { pixel, .. } => pixel * 8,
        }
    }
}

const fn bytes_of(pixel: usize, order: [usize; 3], alpha: Option<usize>) -> Packing {
    Packing::Bytes {
        pixel,
        order,
        alpha,
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Coding {
    Raw,
    Rle4,
    Rle8,
}

struct Parsed {
    width: usize,
    height: usize,
    top_down: bool,
    mode: Mode,
    packing: Packing,
    coding: Coding,
    palette: Option<Box<Palette>>,
    /// Bytes from one row to the next.
    stride: usize,
    /// Where the pixels begin.
    offset: usize,
}

fn parse(bytes: &[u8]) -> Result<Parsed> {
    let long = |at: usize| -> Result<u32> {
        match bytes.get(at..at + 4) {
            Some(word) => Ok(u32::from_le_bytes([word[0], word[1], word[2], word[3]])),
            None => Err(BMP.truncated(format!("header ends before byte {}", at + 4))),
        }
    };
    let short = |at: usize| -> Result<u32> {
        match bytes.get(at..at + 2) {
            Some(word) => Ok(u32::from(u16::from_le_bytes([word[0], word[1]]))),
            None => Err(BMP.truncated(format!("header ends before byte {}", at + 2))),
        }
    };
    // What the clipboard holds has no file header.
    let (base, mut offset) = if bytes.starts_with(b"BM") {
        (FILE_HEADER_BYTES, long(10)? as usize)
    } else if matches!(long(0)?, 12 | 40 | 52 | 56 | 64 | 108 | 124) {
        (0, 0)
    } else {
        return Err(BMP.corrupt("no signature"));
    };
    let header_size = long(base)? as usize;
    // Fields are counted from after the size.
    let at = base + 4;
    if bytes.len() < base + header_size {
        return Err(BMP.truncated(format!("bitmap header of {header_size} bytes is cut")));
    }
    let mut cursor = base + header_size;
    let (width, height, bits, compression, mut colours, entry, top_down);
    let mut masks = [0u32; 4];
    match header_size {
        12 => {
            (width, height) = (short(at)?, short(at + 2)?);
            bits = short(at + 6)?;
            (compression, colours, entry, top_down) = (0, 0, 3, false);
        }
        40 | 52 | 56 | 64 | 108 | 124 => {
            top_down = bytes[at + 7] == 0xff;
            width = long(at)?;
            let stored = long(at + 4)?;
            height = if top_down {
                stored.wrapping_neg()
            } else {
                stored
            };
            bits = short(at + 10)?;
            compression = long(at + 12)?;
            colours = long(at + 28)?;
            entry = 4;
            if compression == 3 {
                let fields = header_size - 4;
                let count = if fields >= 52 { 4 } else { 3 };
                let from = if fields >= 48 {
                    at + 36
                } else {
                    let from = cursor;
                    cursor += 12;
                    from
                };
                for (index, mask) in masks.iter_mut().enumerate().take(count) {
                    *mask = long(from + index * 4)?;
                }
            }
        }
        other => return Err(BMP.unsupported(format!("bitmap header of {other} bytes"))),
    }
    if colours == 0 {
        colours = 1u32.checked_shl(bits).unwrap_or(0);
    }
    if offset == FILE_HEADER_BYTES + header_size && bits <= 8 {
        offset += entry * colours as usize;
    }
    let bgr = bytes_of(3, [2, 1, 0], None);
    let bgrx = bytes_of(4, [2, 1, 0], None);
    let (mut mode, mut packing) = match bits {
        1 => (Mode::Palette, Packing::Bit),
        4 => (Mode::Palette, Packing::Nibble),
        8 => (Mode::Palette, Packing::Byte),
        16 => (Mode::Rgb, Packing::Words { green_bits: 5 }),
        24 => (Mode::Rgb, bgr),
        32 => (Mode::Rgb, bgrx),
        other => return Err(BMP.unsupported(format!("{other} bits per pixel"))),
    };
    let coding = match compression {
        0 => Coding::Raw,
        1 => Coding::Rle8,
        2 => Coding::Rle4,
        3 => {
            packing = match (bits, masks) {
                (32, [0xff_0000, 0xff00, 0xff, 0]) => bgrx,
                (32, [0xff00_0000, 0xff_0000, 0xff00, 0]) => bytes_of(4, [3, 2, 1], None),
                (32, [0xff00_0000, 0xff00, 0xff, 0]) => bytes_of(4, [3, 1, 0], None),
                (32, [0xff00_0000, 0xff_0000, 0xff00, 0xff]) => bytes_of(4, [3, 2, 1], Some(0)),
                (32, [0xff, 0xff00, 0xff_0000, 0xff00_0000]) => bytes_of(4, [0, 1, 2], Some(3)),
                (32, [0xff_0000, 0xff00, 0xff, 0xff00_0000] | [0, 0, 0, 0]) => {
                    bytes_of(4, [2, 1, 0], Some(3))
                }
                (32, [0xff00_0000, 0xff00, 0xff, 0xff_0000]) => bytes_of(4, [3, 1, 0], Some(2)),
                (24, [0xff_0000, 0xff00, 0xff, _]) => bgr,
                (16, [0xf800, 0x7e0, 0x1f, _]) => Packing::Words { green_bits: 6 },
                (16, [0x7c00, 0x3e0, 0x1f, _]) => Packing::Words { green_bits: 5 },
                _ => {
                    return Err(BMP
                        .unsupported(format!("bit fields {masks:x?} with {bits} bits per pixel")));
                }
            };
            if matches!(packing, Packing::Bytes { alpha: Some(_), .. }) {
                mode = Mode::Rgba;
            }
            Coding::Raw
        }
        other => return Err(BMP.unsupported(format!("compression {other}"))),
    };
    let mut palette = None;
    if mode == Mode::Palette {
        if !(1..=65_536).contains(&colours) {
            return Err(BMP.unsupported(format!("palette of {colours} colours")));
        }
        let colours = colours as usize;
        let end = (cursor + entry * colours).min(bytes.len());
        let stored = &bytes[cursor.min(end)..end];
        cursor = end;
        let colour = |index: usize| stored.get(index * entry..index * entry + 3);
        // A palette of greys in order is no palette.
        let is_grey = (0..colours).all(|index| {
            let level = if colours == 2 { index * 255 } else { index };
            u8::try_from(level).is_ok_and(|level| colour(index) == Some(&[level; 3][..]))
        });
        if is_grey {
            (mode, packing) = if colours <= 2 {
                (Mode::Bit, Packing::Bit)
            } else {
                (Mode::Grey, Packing::Byte)
            };
        } else {
            if stored.len() / entry > 256 {
                return Err(BMP.unsupported(format!("palette of {colours} colours")));
            }
            let mut colours = Box::new([[0u8; 3]; 256]);
            for (target, bgr) in colours.iter_mut().zip(stored.chunks_exact(entry)) {
                *target = [bgr[2], bgr[1], bgr[0]];
            }
            palette = Some(colours);
        }
    }
    let stride = ((u64::from(width) * u64::from(bits) + 31) >> 3 & !3) as usize;
    Ok(Parsed {
        width: width as usize,
        height: height as usize,
        top_down,
        mode,
        packing,
        coding,
        palette,
        stride,
        offset: if offset == 0 { cursor } else { offset },
    })
}

pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let parsed = parse(bytes)?;
    let row = parsed.width as u64 * parsed.mode.bytes() as u64;
    let memory = match parsed.coding {
        Coding::Raw => row,
        Coding::Rle4 | Coding::Rle8 => row * (parsed.height as u64 + 1),
    };
    Ok(Header {
        width: u32::try_from(parsed.width).unwrap_or(u32::MAX),
        height: u32::try_from(parsed.height).unwrap_or(u32::MAX),
        memory,
        mode: parsed.mode,
    })
}

pub(crate) fn decode(bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
    let parsed = parse(bytes)?;
    let data = bytes.get(parsed.offset..).unwrap_or_default();
    let spec = Spec::new(parsed.width as u32, parsed.height as u32, parsed.mode)
        .with_palette(parsed.palette.clone());
    let place = |index: usize| {
        let y = if parsed.top_down {
            index
        } else {
            parsed.height - 1 - index
        };
        y as u32
    };
    if parsed.coding != Coding::Raw {
        if parsed.mode == Mode::Bit {
            return Err(BMP.unsupported("run-length coding of a black-and-white image"));
        }
        let pixels = decode_runs(&parsed, data)?;
        sink.start(spec)?;
        for (index, row) in pixels.chunks_exact(parsed.width).enumerate() {
            sink.row(place(index), row);
        }
        return Ok(());
    }
    let row_bytes = (parsed.width * parsed.packing.bits()).div_ceil(8);
    if row_bytes > parsed.stride {
        return Err(BMP.unsupported("grey palette with fewer bits than its pixels need"));
    }
    let needed = (parsed.height - 1) * parsed.stride + row_bytes;
    if data.len() < needed {
        return Err(BMP.truncated(format!("{} bytes of pixels, wanted {needed}", data.len())));
    }
    sink.start(spec)?;
    let mut row = vec![0u8; parsed.width * parsed.mode.bytes()];
    for index in 0..parsed.height {
        let y = place(index);
        if sink.wants(y) {
            let source = &data[index * parsed.stride..][..row_bytes];
            unpack(source, &parsed, &mut row);
            sink.row(y, &row);
        }
    }
    Ok(())
}

fn unpack(source: &[u8], parsed: &Parsed, row: &mut [u8]) {
    match parsed.packing {
        Packing::Bit => {
            let value = if parsed.mode == Mode::Bit { 255 } else { 1 };
            for (x, pixel) in row.iter_mut().enumerate() {
                *pixel = (source[x / 8] >> (7 - x % 8) & 1) * value;
            }
        }
        Packing::Nibble => {
            for (x, pixel) in row.iter_mut().enumerate() {
                *pixel = source[x / 2] >> (4 * (1 - x % 2)) & 15;
            }
        }
        Packing::Byte => row.copy_from_slice(source),
        Packing::Words { green_bits } => {
            let green_top = (1u32 << green_bits) - 1;
            for (pixel, word) in row.chunks_exact_mut(3).zip(source.chunks_exact(2)) {
                let word = u32::from(u16::from_le_bytes([word[0], word[1]]));
                pixel[0] = ((word >> (5 + green_bits) & 31) * 255 / 31) as u8;
                pixel[1] = ((word >> 5 & green_top) * 255 / green_top) as u8;
                pixel[2] = ((word & 31) * 255 / 31) as u8;
            }
        }
        Packing::Bytes {
            pixel: size,
            order,
            alpha,
        } => {
            let wide = parsed.mode.bytes();
            for (pixel, stored) in row.chunks_exact_mut(wide).zip(source.chunks_exact(size)) {
                for (sample, from) in pixel.iter_mut().zip(order) {
                    *sample = stored[from];
                }
                if let Some(from) = alpha {
                    pixel[3] = stored[from];
                }
            }
        }
    }
}

/// Rows in the order of the file, one byte for each pixel.
fn decode_runs(parsed: &Parsed, data: &[u8]) -> Result<Vec<u8>> {
    let width = parsed.width;
    let wanted = width * parsed.height;
    let mut pixels = try_zeroed(wanted)?;
    let mut input = data.iter().copied();
    // Position in `pixels`, and the column as the encoder counts it.
    let (mut at, mut x) = (0, 0);
    while at < wanted {
        budget::check()?;
        let (Some(count), Some(value)) = (input.next(), input.next()) else {
            break;
        };
        if count > 0 {
            let count = usize::from(count).min(width.saturating_sub(x));
            let end = (at + count).min(wanted);
            for (index, pixel) in pixels[at..end].iter_mut().enumerate() {
                *pixel = match parsed.coding {
                    Coding::Rle4 if index % 2 == 0 => value >> 4,
                    Coding::Rle4 => value & 15,
                    _ => value,
                };
            }
            at += count;
            x += count;
            continue;
        }
        match value {
            0 => {
                at = at.next_multiple_of(width);
                x = 0;
            }
            1 => break,
            2 => {
                let (Some(right), Some(up)) = (input.next(), input.next()) else {
                    break;
                };
                at = (at + usize::from(right) + usize::from(up) * width).min(wanted);
                x = at % width;
            }
            literal => {
                let count = usize::from(literal).min(wanted - at);
                let stored = match parsed.coding {
                    Coding::Rle4 => count.div_ceil(2),
                    _ => count,
                };
                let mut read = 0;
                for index in 0..stored {
                    let Some(byte) = input.next() else { break };
                    read += 1;
                    if parsed.coding == Coding::Rle4 {
                        pixels[at] = byte >> 4;
                        at += 1;
                        if index * 2 + 1 < count {
                            pixels[at] = byte & 15;
                            at += 1;
                        }
                    } else {
                        pixels[at] = byte;
                        at += 1;
                    }
                }
                if read < stored {
                    break;
                }
                x += count;
                // Literals are padded to an even number of bytes of the file.
                let position = parsed.offset + data.len() - input.len();
                if !position.is_multiple_of(2) {
                    input.next();
                }
            }
        }
    }
    if at < wanted {
        return Err(BMP.truncated(format!("{at} pixels of {wanted} in the runs")));
    }
    Ok(pixels)
}
