//! The markers before the first scan, read as the reference reads them: what it
//! refuses here, libjpeg never sees.

use crate::error::{Blame, Result};
use crate::raster::Mode;

pub(super) const JPEG: Blame = Blame("JPEG");

/// What the frame header and the segments before the scan say.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) mode: Mode,
    /// Bytes that libjpeg will hold.
    pub(super) memory: u64,
    /// Samples of all components for each pixel, after subsampling.
    samples: f64,
    is_progressive: bool,
    /// All EXIF segments, joined, without their identifiers but the first.
    pub(super) exif: Option<Vec<u8>>,
    /// Where there is but one scan with everything in it.
    pub(super) scan: Option<Scan>,
    /// Identifiers of the components, where the frame is sequential and Huffman-coded.
    simple: Option<Vec<u8>>,
}

/// A Huffman table as the file has it.
#[derive(Debug, Clone)]
pub(super) struct Huffman {
    /// How many codes there are of each length from one to sixteen.
    pub(super) counts: [u8; 16],
    pub(super) symbols: Vec<u8>,
}

/// A sequential, Huffman-coded scan of all components, and what it needs.
#[derive(Debug)]
pub(super) struct Scan {
    /// Where its data begins.
    pub(super) start: usize,
    /// Units between restart markers, zero for none.
    pub(super) restart_interval: u32,
    pub(super) dc: [Option<Huffman>; 4],
    pub(super) ac: [Option<Huffman>; 4],
    /// Numbers of each component's tables.
    pub(super) tables: Vec<(usize, usize)>,
}

/// Lines of buffers that libjpeg keeps for each component of a sequential image.
const BUFFERED_LINES: u64 = 64;

pub(super) fn scan(bytes: &[u8]) -> Result<Frame> {
    if !bytes.starts_with(&[0xff, 0xd8, 0xff]) {
        return Err(JPEG.corrupt("no start-of-image marker"));
    }
    let mut frame: Option<Frame> = None;
    let mut exif: Option<Vec<u8>> = None;
    let mut restart_interval = 0;
    let mut dc: [Option<Huffman>; 4] = [const { None }; 4];
    let mut ac: [Option<Huffman>; 4] = [const { None }; 4];
    let mut at = 2;
    loop {
        // A marker is any number of 0xff and a code; anything else is skipped.
        let Some(skipped) = bytes[at..].iter().position(|&byte| byte == 0xff) else {
            return Err(JPEG.truncated("no scan before the end of the file"));
        };
        at += skipped + 1;
        let Some(&code) = bytes.get(at) else {
            return Err(JPEG.truncated("no scan before the end of the file"));
        };
        match code {
            0x00 => {
                at += 1;
                continue;
            }
            0xff => continue,
            0xc8 | 0xd0..=0xd9 | 0xf0..=0xfd => {
                at += 1;
                continue;
            }
            0x01..=0xbf => {
                return Err(JPEG.corrupt(format!("unknown marker {code:#04x} at byte {at}")));
            }
            _ => {}
        }
        at += 1;
        let Some(length) = bytes.get(at..at + 2) else {
            return Err(JPEG.truncated(format!("segment {code:#04x} has no length")));
        };
        let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
        // A length below its own two bytes is an empty segment to the reference.
        let end = at + length.max(2);
        let Some(data) = bytes.get(at + 2..end) else {
            return Err(JPEG.truncated(format!("segment {code:#04x} at byte {at} is cut")));
        };
        at = end;
        match code {
            0xc4 => read_huffman(data, &mut dc, &mut ac),
            0xcc => {}
            0xdd => {
                let [high, low, ..] = *data else { continue };
                restart_interval = u32::from(u16::from_be_bytes([high, low]));
            }
            0xc0..=0xcf | 0xde => frame = Some(read_frame(code, data)?),
            0xdb => check_quantisation(data)?,
            0xe1 if data.starts_with(b"Exif\0\0") => match &mut exif {
                None => exif = Some(data.to_vec()),
                Some(joined) => joined.extend_from_slice(&data[6..]),
            },
            0xda => {
                let Some(mut frame) = frame else {
                    return Err(JPEG.corrupt("a scan before any frame header"));
                };
                let components_in_scan = data.first().copied().unwrap_or_default();
                let planes = frame.mode.bytes() as u64;
                if frame.is_progressive || u64::from(components_in_scan) < planes {
                    // Progressive, or one component after the other: libjpeg keeps
                    // all coefficients, two bytes each, padded to whole blocks.
                    let padded = |side: u32| f64::from(side.next_multiple_of(32));
                    let pixels = padded(frame.width) * padded(frame.height);
                    frame.memory = (pixels * frame.samples * 2.0) as u64;
                }
                frame.memory += u64::from(frame.width) * planes * BUFFERED_LINES;
                frame.exif = exif;
                frame.scan = frame
                    .simple
                    .as_deref()
                    .and_then(|components| tables_of(data, components))
                    .map(|tables| Scan {
                        start: at,
                        restart_interval,
                        dc,
                        ac,
                        tables,
                    });
                return Ok(frame);
            }
            _ => {}
        }
    }
}

fn read_frame(code: u8, data: &[u8]) -> Result<Frame> {
    let Some(fields) = data.get(..6) else {
        return Err(JPEG.truncated("frame header"));
    };
    if fields[0] != 8 {
        return Err(JPEG.unsupported(format!("{} bits per sample", fields[0])));
    }
    let mode = match fields[5] {
        1 => Mode::Grey,
        3 => Mode::Rgb,
        4 => Mode::Cmyk,
        other => return Err(JPEG.unsupported(format!("{other} components"))),
    };
    if !(data.len() - 6).is_multiple_of(3) {
        return Err(JPEG.corrupt("frame header does not hold whole components"));
    }
    let factors = || data[6..].chunks_exact(3).map(|c| (c[1] >> 4, c[1] & 15));
    let most_across = factors().map(|(across, _)| across).max().unwrap_or(1);
    let most_down = factors().map(|(_, down)| down).max().unwrap_or(1);
    let units: u32 = factors()
        .map(|(across, down)| u32::from(across) * u32::from(down))
        .sum();
    let unit = u32::from(most_across.max(1)) * u32::from(most_down.max(1));
    Ok(Frame {
        width: u32::from(u16::from_be_bytes([fields[3], fields[4]])),
        height: u32::from(u16::from_be_bytes([fields[1], fields[2]])),
        mode,
        // Counted at the scan, which tells whether it is kept.
        memory: 0,
        samples: f64::from(units) / f64::from(unit),
        is_progressive: matches!(code, 0xc2 | 0xc6 | 0xca | 0xce),
        exif: None,
        scan: None,
        simple: matches!(code, 0xc0 | 0xc1)
            .then(|| data[6..].chunks_exact(3).map(|c| c[0]).collect()),
    })
}

/// Takes in the tables of a segment, as far as they are whole.
fn read_huffman(mut data: &[u8], dc: &mut [Option<Huffman>; 4], ac: &mut [Option<Huffman>; 4]) {
    while let Some((head, rest)) = data.split_at_checked(17) {
        let mut counts = [0; 16];
        counts.copy_from_slice(&head[1..]);
        let total: usize = counts.iter().map(|&count| usize::from(count)).sum();
        let Some((symbols, rest)) = rest.split_at_checked(total) else {
            return;
        };
        let class = if head[0] & 0x10 == 0 {
            &mut *dc
        } else {
            &mut *ac
        };
        if let Some(table) = class.get_mut(usize::from(head[0] & 15)) {
            *table = Some(Huffman {
                counts,
                symbols: symbols.to_vec(),
            });
        }
        data = rest;
    }
}

/// The tables of each component of a scan that has all components in the frame's
/// order and every coefficient.
fn tables_of(data: &[u8], components: &[u8]) -> Option<Vec<(usize, usize)>> {
    let (&count, rest) = data.split_first()?;
    if usize::from(count) != components.len() || rest.len() != components.len() * 2 + 3 {
        return None;
    }
    let (pairs, spectrum) = rest.split_at(components.len() * 2);
    if spectrum != [0, 63, 0] {
        return None;
    }
    pairs
        .chunks_exact(2)
        .zip(components)
        .map(|(pair, &component)| {
            (pair[0] == component).then(|| (usize::from(pair[1] >> 4), usize::from(pair[1] & 15)))
        })
        .collect()
}

fn check_quantisation(mut data: &[u8]) -> Result<()> {
    while let Some(&head) = data.first() {
        let length = if head >> 4 == 0 { 65 } else { 129 };
        match data.get(length..) {
            Some(rest) => data = rest,
            None => return Err(JPEG.corrupt("quantisation table is cut")),
        }
    }
    Ok(())
}
