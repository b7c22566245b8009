//! The markers before the first scan, read as the reference reads them: what it
//! refuses here, libjpeg never sees.

// What only the decoders of x86-64 ask for.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

use crate::budget;
use crate::error::{Blame, Result};
use crate::raster::Mode;
use std::ops::Range;

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
    /// Where the EXIF segments are, without their identifiers but the first.
    pub(super) exif: Vec<Range<usize>>,
    /// Where the data of the first scan begins.
    pub(super) data: usize,
    /// Where there is but one scan with everything in it.
    pub(super) scan: Option<Scan>,
    /// Where the file is progressive, and Huffman-coded.
    pub(super) progression: Option<Progression>,
    /// Identifiers of the components.
    components: Vec<u8>,
    coding: Coding,
}

/// What a frame header says of the scans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Sequential,
    Progressive,
    /// Arithmetic, lossless or differential.
    Other,
}

/// A Huffman table as the file has it.
#[derive(Debug, Clone)]
pub(super) struct Huffman {
    /// How many codes there are of each length from one to sixteen.
    pub(super) counts: [u8; 16],
    pub(super) symbols: Vec<u8>,
}

/// What scans refer to, as it is after some segments.
#[derive(Debug, Clone, Default)]
pub(super) struct CodingTables {
    pub(super) dc: [Option<Huffman>; 4],
    pub(super) ac: [Option<Huffman>; 4],
    /// Units between restart markers, zero for none.
    pub(super) restart_interval: u32,
}

/// A sequential, Huffman-coded scan of all components, and what it needs.
#[derive(Debug)]
pub(super) struct Scan {
    pub(super) coding: CodingTables,
    /// Numbers of each component's tables.
    pub(super) tables: Vec<(usize, usize)>,
}

/// The first of many scans, and what is known before it.
#[derive(Debug)]
pub(super) struct Progression {
    /// Width and height of the image.
    pub(super) full: (u32, u32),
    /// Identifiers of the components.
    pub(super) components: Vec<u8>,
    /// Where the header of the first scan is; its data follows.
    pub(super) header: Range<usize>,
    pub(super) tables: CodingTables,
}

/// Lines of buffers that libjpeg keeps for each component of a sequential image.
const BUFFERED_LINES: u64 = 64;

pub(super) fn scan(bytes: &[u8]) -> Result<Frame> {
    if !bytes.starts_with(&[0xff, 0xd8, 0xff]) {
        return Err(JPEG.corrupt("no start-of-image marker"));
    }
    let mut frame: Option<Frame> = None;
    let mut exif = Vec::new();
    let mut tables = CodingTables::default();
    let mut at = 2;
    loop {
        budget::check()?;
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
            // What is wrong with these, libjpeg tells.
            0xc4 => {
                tables.read_huffman(data);
            }
            0xcc => {}
            0xdd => {
                tables.read_restart_interval(data);
            }
            0xc0..=0xcf | 0xde => frame = Some(read_frame(code, data)?),
            0xdb => check_quantisation(data)?,
            0xe1 if data.starts_with(b"Exif\0\0") => {
                let identifier = if exif.is_empty() { 0 } else { 6 };
                exif.push(end - data.len() + identifier..end);
            }
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
                frame.data = at;
                match frame.coding {
                    Coding::Sequential => {
                        frame.scan = tables_of(data, &frame.components).map(|numbers| Scan {
                            coding: tables,
                            tables: numbers,
                        });
                    }
                    Coding::Progressive => {
                        frame.progression = Some(Progression {
                            full: (frame.width, frame.height),
                            components: frame.components.clone(),
                            header: at - data.len()..at,
                            tables,
                        });
                    }
                    Coding::Other => {}
                }
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
        exif: Vec::new(),
        data: 0,
        scan: None,
        progression: None,
        components: data[6..].chunks_exact(3).map(|c| c[0]).collect(),
        coding: match code {
            0xc0 | 0xc1 => Coding::Sequential,
            0xc2 => Coding::Progressive,
            _ => Coding::Other,
        },
    })
}

impl CodingTables {
    /// Takes in the tables of a segment, as far as they are whole; `None` where
    /// something is wrong.
    pub(super) fn read_huffman(&mut self, mut data: &[u8]) -> Option<()> {
        while let Some((head, rest)) = data.split_at_checked(17) {
            let mut counts = [0; 16];
            counts.copy_from_slice(&head[1..]);
            let total: usize = counts.iter().map(|&count| usize::from(count)).sum();
            let (symbols, rest) = rest.split_at_checked(total)?;
            let class = if head[0] & 0x10 == 0 {
                &mut self.dc
            } else {
                &mut self.ac
            };
            let table = class.get_mut(usize::from(head[0] & !0x10))?;
            if total > 256 {
                return None;
            }
            *table = Some(Huffman {
                counts,
                symbols: symbols.to_vec(),
            });
            data = rest;
        }
        data.is_empty().then_some(())
    }

    /// `None` where the segment is too long or too short.
    pub(super) fn read_restart_interval(&mut self, data: &[u8]) -> Option<()> {
        let [high, low] = *data else { return None };
        self.restart_interval = u32::from(u16::from_be_bytes([high, low]));
        Some(())
    }
}

/// Bytes of a scan's data, up to a marker other than for a restart; `None` where
/// there is none.
pub(super) fn data_length(bytes: &[u8]) -> Option<usize> {
    /// Bytes that are looked through at once.
    const STEP: usize = 64;
    let mut at = 0;
    loop {
        for chunk in bytes[at..].chunks_exact(STEP) {
            if chunk.iter().fold(false, |any, &byte| any | (byte == 0xff)) {
                break;
            }
            at += STEP;
        }
        at += bytes[at..].iter().position(|&byte| byte == 0xff)?;
        match bytes.get(at + 1)? {
            0 | 0xd0..=0xd7 => at += 2,
            _ => return Some(at),
        }
    }
}

/// The code of the marker at `at`, and where its segment lies without its length.
/// `None` where there is no marker or the segment is cut.
pub(super) fn segment(bytes: &[u8], mut at: usize) -> Option<(u8, Range<usize>)> {
    if *bytes.get(at)? != 0xff {
        return None;
    }
    while *bytes.get(at)? == 0xff {
        at += 1;
    }
    let code = bytes[at];
    at += 1;
    if code == 0xd9 {
        return Some((code, at..at));
    }
    let length = bytes.get(at..at + 2)?;
    let length = usize::from(u16::from_be_bytes([length[0], length[1]]));
    if length < 2 {
        return None;
    }
    let segment = at + 2..at + length;
    (segment.end <= bytes.len()).then_some((code, segment))
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
