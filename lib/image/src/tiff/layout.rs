//! Which mode the tags mean, and how samples become pixels of that mode.

use crate::convert::unpremultiply;
use crate::raster::Mode;

/// How stored samples become the mode's pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unpack {
    /// Samples of 1, 2 or 4 bits, spread over the byte for greys.
    Bits { depth: usize, inverted: bool },
    /// Grey or index bytes.
    Bytes { inverted: bool },
    /// The first of `stored` bytes of each pixel, as many as the mode has.
    Leading { stored: usize },
    /// As `Leading`, of sixteen-bit samples, of which the high byte is kept.
    LeadingHigh { stored: usize, big: bool },
    /// Twelve bits, two pixels in three bytes.
    Twelve,
    /// Sixteen bits as they are, perhaps with bits in reverse order.
    Sixteen,
    /// Sixteen bits whose bytes change places.
    SwappedSixteen,
    /// Signed sixteen bits that become thirty-two.
    SignedSixteen { big: bool },
    /// Four bytes, integer or float.
    Four { big: bool },
    /// L*a*b* with signed a and b.
    Lab,
    /// A layout that decodes but that the reference cannot convert.
    Refused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) mode: Mode,
    pub(super) unpack: Unpack,
    /// Bits of every byte are in reverse order.
    pub(super) reversed: bool,
    /// Colours are multiplied by alpha in the file.
    pub(super) premultiplied: bool,
}

impl Layout {
    fn new(mode: Mode, unpack: Unpack) -> Self {
        Self {
            mode,
            unpack,
            reversed: false,
            premultiplied: false,
        }
    }

    /// Red, green and blue, a byte each.
    pub(super) fn rgb8() -> Self {
        Self::new(Mode::Rgb, Unpack::Leading { stored: 3 })
    }

    /// For samples that were put in this machine's order. The reference does not
    /// know that of signed and float samples and swaps them again; so must this.
    pub(super) fn make_native(&mut self) {
        match &mut self.unpack {
            Unpack::LeadingHigh { big, .. } => *big = false,
            Unpack::Sixteen if self.mode == Mode::Grey16Big => self.unpack = Unpack::SwappedSixteen,
            _ => {}
        }
    }
}

/// The layout for a combination of tags; `None` for one that the reference does
/// not know.
pub(super) fn choose(
    big: bool,
    photometric: u64,
    format: &[u64],
    fill: u64,
    depths: &[u64],
    extra: &[u64],
) -> Option<Layout> {
    let [format] = *format else { return None };
    let reversed = match fill {
        1 => false,
        2 => true,
        _ => return None,
    };
    let first = depths[0];
    if depths.iter().any(|&depth| depth != first) {
        return None;
    }
    let count = depths.len();
    let mut layout = match (photometric, count, extra) {
        (0 | 1, 1, []) => grey(big, photometric == 0, format, reversed, first)?,
        (0 | 1, 2, [kind]) if photometric == 1 && format == 1 && !reversed && first == 8 => {
            match kind {
                0 => Layout::new(Mode::Grey, Unpack::Leading { stored: 2 }),
                1 => Layout::new(Mode::GreyAlpha, Unpack::Refused),
                2 => Layout::new(Mode::GreyAlpha, Unpack::Leading { stored: 2 }),
                _ => return None,
            }
        }
        (2, 3, []) if format == 1 => match first {
            8 => Layout::rgb8(),
            16 if !reversed => Layout::new(Mode::Rgb, Unpack::LeadingHigh { stored: 3, big }),
            _ => return None,
        },
        (2, 4..=6, extra) if format == 1 && !reversed => rgb_and_more(big, first, count, extra)?,
        (3, 1, []) if format == 1 => match first {
            1 | 2 | 4 => Layout::new(
                Mode::Palette,
                Unpack::Bits {
                    depth: first as usize,
                    inverted: false,
                },
            ),
            8 => Layout::new(Mode::Palette, Unpack::Bytes { inverted: false }),
            _ => return None,
        },
        (3, 2, [kind]) if format == 1 && !reversed && first == 8 => match kind {
            0 => Layout::new(Mode::Palette, Unpack::Leading { stored: 2 }),
            2 => Layout::new(Mode::PaletteAlpha, Unpack::Leading { stored: 2 }),
            _ => return None,
        },
        (5, 4..=6, extra) if format == 1 && !reversed => {
            let more_is_nothing = extra.len() == count - 4 && extra.iter().all(|&kind| kind == 0);
            match first {
                8 if more_is_nothing => Layout::new(Mode::Cmyk, Unpack::Leading { stored: count }),
                16 if count == 4 && extra.is_empty() => {
                    Layout::new(Mode::Cmyk, Unpack::LeadingHigh { stored: 4, big })
                }
                _ => return None,
            }
        }
        (6, 1, []) if format == 1 && !reversed && first == 8 => {
            Layout::new(Mode::Grey, Unpack::Bytes { inverted: false })
        }
        (6, 3, []) if format == 1 && !reversed && first == 8 => {
            Layout::new(Mode::YCbCr, Unpack::Leading { stored: 3 })
        }
        (8, 3, []) if format == 1 && !reversed && first == 8 => Layout::new(Mode::Lab, Unpack::Lab),
        _ => return None,
    };
    layout.reversed = reversed;
    Some(layout)
}

fn grey(big: bool, inverted: bool, format: u64, reversed: bool, depth: u64) -> Option<Layout> {
    Some(match (format, depth) {
        (1, 1) => Layout::new(Mode::Bit, Unpack::Bits { depth: 1, inverted }),
        (1, 2 | 4) => Layout::new(
            Mode::Grey,
            Unpack::Bits {
                depth: depth as usize,
                inverted,
            },
        ),
        (1, 8) => Layout::new(Mode::Grey, Unpack::Bytes { inverted }),
        (2, 8) if !inverted && !reversed => {
            Layout::new(Mode::Grey, Unpack::Bytes { inverted: false })
        }
        (1, 12) if !big && !inverted && !reversed => Layout::new(Mode::Grey16, Unpack::Twelve),
        (1, 16) if !big && (!reversed || !inverted) => Layout::new(Mode::Grey16, Unpack::Sixteen),
        (1, 16) if big && !inverted && !reversed => Layout::new(Mode::Grey16Big, Unpack::Sixteen),
        (2, 16) if !inverted && !reversed => {
            Layout::new(Mode::Int32, Unpack::SignedSixteen { big })
        }
        (1, 32) if !big && !inverted && !reversed => {
            Layout::new(Mode::Int32, Unpack::Four { big: false })
        }
        (2, 32) if !inverted && !reversed => Layout::new(Mode::Int32, Unpack::Four { big }),
        (3, 32) if !reversed => Layout::new(Mode::Float32, Unpack::Four { big }),
        _ => return None,
    })
}

fn rgb_and_more(big: bool, depth: u64, count: usize, extra: &[u64]) -> Option<Layout> {
    // What comes after the first extra sample must be nothing in particular.
    let (kind, rest) = match extra {
        [] if count == 4 => (2, &[][..]),
        [kind, rest @ ..] if extra.len() == count - 3 => (*kind, rest),
        _ => return None,
    };
    if rest.iter().any(|&kind| kind != 0) {
        return None;
    }
    let unpack = match depth {
        8 => Unpack::Leading { stored: count },
        16 if count == 4 => Unpack::LeadingHigh { stored: 4, big },
        _ => return None,
    };
    Some(match kind {
        0 => Layout::new(Mode::Rgb, unpack),
        1 => Layout {
            premultiplied: true,
            ..Layout::new(Mode::Rgba, unpack)
        },
        2 => Layout::new(Mode::Rgba, unpack),
        // CorelDRAW 10 writes 999.
        999 if depth == 8 && count == 4 => Layout::new(Mode::Rgba, unpack),
        _ => return None,
    })
}

/// Divides the colours of RGBA pixels by their alpha; transparent ones become black.
pub(super) fn unpremultiply_rgba(pixels: &mut [u8]) {
    for pixel in pixels.chunks_exact_mut(4) {
        let alpha = pixel[3];
        if alpha == 0 {
            pixel.fill(0);
        } else {
            for colour in &mut pixel[..3] {
                *colour = unpremultiply(*colour, alpha);
            }
        }
    }
}

/// Turns `columns` stored pixels of a line into the mode's.
pub(super) fn unpack(line: &[u8], columns: usize, layout: &Layout, row: &mut [u8]) {
    let byte = |at: usize| {
        let value = line[at];
        if layout.reversed {
            value.reverse_bits()
        } else {
            value
        }
    };
    let wide = layout.mode.bytes();
    let flip = |inverted: bool| if inverted { 0xff } else { 0 };
    match layout.unpack {
        Unpack::Bits { depth, inverted } => {
            let per_byte = 8 / depth;
            let top = ((1u16 << depth) - 1) as u8;
            let spread = if layout.mode == Mode::Palette {
                1
            } else {
                255 / top
            };
            let flip = flip(inverted);
            for (x, pixel) in row.iter_mut().enumerate() {
                let shift = (per_byte - 1 - x % per_byte) * depth;
                *pixel = ((byte(x / per_byte) ^ flip) >> shift & top) * spread;
            }
        }
        Unpack::Bytes { inverted } => {
            for (x, pixel) in row.iter_mut().enumerate() {
                *pixel = byte(x) ^ flip(inverted);
            }
        }
        Unpack::Leading { stored } => {
            for (x, pixel) in row.chunks_exact_mut(wide).enumerate() {
                for (sample, value) in pixel.iter_mut().enumerate() {
                    *value = byte(x * stored + sample);
                }
            }
        }
        Unpack::LeadingHigh { stored, big } => {
            let high = usize::from(!big);
            for (x, pixel) in row.chunks_exact_mut(wide).enumerate() {
                for (sample, value) in pixel.iter_mut().enumerate() {
                    *value = byte((x * stored + sample) * 2 + high);
                }
            }
        }
        Unpack::Twelve => {
            for (x, pixel) in row.chunks_exact_mut(2).enumerate() {
                let at = x / 2 * 3;
                let value = if x % 2 == 0 {
                    u16::from(byte(at)) << 4 | u16::from(byte(at + 1)) >> 4
                } else {
                    u16::from(byte(at + 1) & 15) << 8 | u16::from(byte(at + 2))
                };
                pixel.copy_from_slice(&value.to_le_bytes());
            }
        }
        Unpack::Sixteen => {
            for (at, value) in row.iter_mut().enumerate() {
                *value = byte(at);
            }
        }
        Unpack::SwappedSixteen => {
            for (x, pixel) in row.chunks_exact_mut(2).enumerate() {
                (pixel[0], pixel[1]) = (byte(x * 2 + 1), byte(x * 2));
            }
        }
        Unpack::SignedSixteen { big } => {
            for (x, pixel) in row.chunks_exact_mut(4).enumerate() {
                let bytes = [byte(x * 2), byte(x * 2 + 1)];
                let value = if big {
                    i16::from_be_bytes(bytes)
                } else {
                    i16::from_le_bytes(bytes)
                };
                pixel.copy_from_slice(&i32::from(value).to_le_bytes());
            }
        }
        Unpack::Four { big } => {
            for (x, pixel) in row.chunks_exact_mut(4).enumerate() {
                for (index, value) in pixel.iter_mut().enumerate() {
                    *value = byte(x * 4 + if big { 3 - index } else { index });
                }
            }
        }
        Unpack::Lab => {
            for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
                pixel[0] = byte(x * 3);
                pixel[1] = byte(x * 3 + 1) ^ 128;
                pixel[2] = byte(x * 3 + 2) ^ 128;
            }
        }
        Unpack::Refused => {}
    }
    debug_assert_eq!(row.len(), columns * wide);
    if layout.premultiplied {
        unpremultiply_rgba(row);
    }
}

/// One plane's samples into their places among the pixels.
pub(super) fn unpack_plane(line: &[u8], plane: usize, layout: &Layout, row: &mut [u8]) {
    let wide = layout.mode.bytes();
    if plane >= wide {
        return;
    }
    let (step, high) = match layout.unpack {
        Unpack::LeadingHigh { big, .. } => (2, usize::from(!big)),
        _ => (1, 0),
    };
    let offset = if layout.mode == Mode::Lab && plane > 0 {
        128
    } else {
        0
    };
    for (x, pixel) in row.chunks_exact_mut(wide).enumerate() {
        let value = line[x * step + high];
        pixel[plane] = offset
            ^ if layout.reversed {
                value.reverse_bits()
            } else {
                value
            };
    }
}
