//! PNG: all colour types and depths, interlaced, and the first frame of an
//! animation. Chunks are read here, because what the reference refuses and what
//! it lets pass is decided there (checksums before the pixels, none after);
//! inflating is `flate2`'s work.

use crate::budget;
use crate::error::{Blame, ImageError, Result};
use crate::inflate::{Ending, Inflater};
use crate::raster::{Mode, Palette, Raster, Sink, Spec, palette_from_rgb};
use crate::{Header, exif};
use flate2::{Decompress, FlushDecompress, Status};

const PNG: Blame = Blame("PNG");

const SIGNATURE: &[u8; 8] = b"\x89PNG\r\n\x1a\n";

/// How samples lie in a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Packing {
    /// Below eight bits: grey is spread over 0 to 255, indices are not.
    Bits(u8),
    /// Bytes that are already the image's mode.
    Bytes,
    /// Big-endian grey of sixteen bits.
    Grey16,
    /// Big-endian channels of which the high byte is kept.
    High(usize),
    /// Big-endian grey and alpha, which become RGBA.
    GreyAlpha16,
}

struct Parsed<'a> {
    bytes: &'a [u8],
    width: u32,
    height: u32,
    mode: Mode,
    packing: Packing,
    /// Bits of a pixel in a line.
    bits: usize,
    interlaced: bool,
    palette: Option<Box<Palette>>,
    /// Left, top, width and height of the first frame, where an animation says so.
    frame: Option<[u32; 4]>,
    /// Where the first chunk of pixels begins, at its length.
    pixels: usize,
    exif: Option<&'a [u8]>,
    so_far: SoFar,
}

/// What the chunks have said so far.
#[derive(Default)]
struct SoFar {
    frames: u32,
    /// Number of the last frame control or frame data chunk.
    sequence: Option<u32>,
    /// The pixels are an image of their own, not the first frame.
    has_own_default: bool,
    /// Bytes of text, inflated.
    text_bytes: u64,
    /// What texts are inflated with, one after the other.
    decoder: Option<Decompress>,
}

impl SoFar {
    fn is_moving(&self) -> bool {
        self.frames > 0 && self.frames + u32::from(self.has_own_default) > 1
    }

    /// Refuses numbers that are not one more than the last.
    fn step(&mut self, number: Option<u32>, may_begin: bool) -> Result<()> {
        let expected = match self.sequence {
            Some(last) => last.checked_add(1),
            None if may_begin => Some(0),
            None => None,
        };
        if number.is_none() || number != expected {
            return Err(PNG.corrupt("the frames of the animation are out of sequence"));
        }
        self.sequence = number;
        Ok(())
    }
}

/// One chunk: name, data, and where the next one begins.
struct Chunk<'a> {
    name: [u8; 4],
    data: &'a [u8],
    next: usize,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

fn is_name(name: [u8; 4]) -> bool {
    name.iter()
        .all(|byte| byte.is_ascii_alphanumeric() || *byte == b'_')
}

fn show(name: [u8; 4]) -> String {
    String::from_utf8_lossy(&name).into_owned()
}

/// The chunk at `at`; its data may be cut by the end of the file only where
/// `cut` allows it.
fn chunk(bytes: &[u8], at: usize, cut: bool) -> Result<Chunk<'_>> {
    let (Some(length), Some(name)) = (word(bytes, at), bytes.get(at + 4..at + 8)) else {
        return Err(PNG.truncated(format!("no chunk at byte {at}")));
    };
    let name = [name[0], name[1], name[2], name[3]];
    if !is_name(name) {
        return Err(PNG.corrupt(format!("no chunk name at byte {}", at + 4)));
    }
    let start = at + 8;
    let end = start.saturating_add(length as usize);
    if end > bytes.len() && !cut {
        return Err(PNG.truncated(format!(
            "chunk {} is cut at byte {}",
            show(name),
            bytes.len()
        )));
    }
    Ok(Chunk {
        name,
        data: &bytes[start..end.min(bytes.len())],
        next: end.saturating_add(4),
    })
}

/// Text and profiles may not become larger than this, in bytes, when they are
/// inflated.
const MAX_TEXT_BYTES: u64 = 1024 * 1024;

/// All texts of a file together may not.
const MAX_TEXTS_BYTES: u64 = 64 * MAX_TEXT_BYTES;

/// Refuses what the reference's chunk handlers refuse.
fn check_chunk(chunk: &Chunk<'_>, so_far: &mut SoFar) -> Result<()> {
    let least = match &chunk.name {
        b"IHDR" => 13,
        b"gAMA" => 4,
        b"cHRM" => 32,
        b"sRGB" => 1,
        b"pHYs" => 9,
        b"acTL" => 8,
        b"fcTL" => 26,
        _ => 0,
    };
    if chunk.data.len() < least {
        return Err(PNG.truncated(format!(
            "chunk {} has {} bytes of {least}",
            show(chunk.name),
            chunk.data.len()
        )));
    }
    match &chunk.name {
        b"acTL" if so_far.frames == 0 => {
            so_far.frames = word(chunk.data, 0).filter(|&n| n <= 1 << 31).unwrap_or(0);
        }
        // A second one makes the file a still image.
        b"acTL" => so_far.frames = 0,
        b"fcTL" => so_far.step(word(chunk.data, 0), true)?,
        b"fdAT" => so_far.step(word(chunk.data, 0), false)?,
        b"iCCP" | b"tEXt" | b"zTXt" | b"iTXt" => check_text(chunk, so_far)?,
        _ => {}
    }
    Ok(())
}

/// Refuses text that is a bomb, alone or with all before it, or compressed in an
/// unknown way.
fn check_text(chunk: &Chunk<'_>, so_far: &mut SoFar) -> Result<()> {
    let Some(end) = chunk.data.iter().position(|&byte| byte == 0) else {
        return Ok(());
    };
    let rest = &chunk.data[end + 1..];
    let (method, text, is_compressed) = match &chunk.name {
        b"tEXt" => (0, rest, false),
        b"iTXt" => {
            // Flag, method, language, translated keyword, text.
            let [flag, method, fields @ ..] = rest else {
                return Ok(());
            };
            match fields.splitn(3, |&byte| byte == 0).nth(2) {
                Some(text) if *flag == 0 => (0, text, false),
                Some(text) if *method == 0 => (0, text, true),
                _ => return Ok(()),
            }
        }
        _ => match rest.split_first() {
            Some((&method, compressed)) => (method, compressed, true),
            None => return Ok(()),
        },
    };
    if method != 0 {
        return Err(PNG.unsupported(format!(
            "compression {method} in chunk {}",
            show(chunk.name)
        )));
    }
    let length = if is_compressed {
        let decoder = so_far.decoder.get_or_insert_with(|| Decompress::new(true));
        inflated_bytes(decoder, text)?
    } else {
        text.len() as u64
    };
    if is_compressed && length > MAX_TEXT_BYTES {
        return Err(PNG.corrupt(format!(
            "chunk {} inflates to over {MAX_TEXT_BYTES} bytes",
            show(chunk.name)
        )));
    }
    if &chunk.name != b"iCCP" {
        so_far.text_bytes += length;
    }
    if so_far.text_bytes > MAX_TEXTS_BYTES {
        return Err(ImageError::LimitExceeded {
            what: "bytes of text",
            needed: so_far.text_bytes,
            limit: MAX_TEXTS_BYTES,
        });
    }
    Ok(())
}

/// How many bytes a text has, or that it has more than [`MAX_TEXT_BYTES`]; none where
/// it is broken.
fn inflated_bytes(decoder: &mut Decompress, compressed: &[u8]) -> Result<u64> {
    let mut scratch = [0; 16 * 1024];
    decoder.reset(true);
    loop {
        budget::check()?;
        let (taken, made) = (decoder.total_in(), decoder.total_out());
        let rest = &compressed[taken as usize..];
        let status = decoder.decompress(rest, &mut scratch, FlushDecompress::None);
        match status {
            Err(_) => return Ok(0),
            Ok(Status::StreamEnd) => return Ok(decoder.total_out()),
            _ if decoder.total_out() > MAX_TEXT_BYTES => return Ok(decoder.total_out()),
            _ if (taken, made) == (decoder.total_in(), decoder.total_out()) => return Ok(made),
            Ok(_) => {}
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Parsed<'_>> {
    if !bytes.starts_with(SIGNATURE) {
        return Err(PNG.corrupt("no signature"));
    }
    let mut size = None;
    let mut layout = None;
    let mut interlaced = false;
    let mut palette = None;
    let mut frame = None;
    let mut exif = None;
    let mut so_far = SoFar::default();
    let mut at = SIGNATURE.len();
    let pixels = loop {
        budget::check()?;
        let head = chunk(bytes, at, true)?;
        if &head.name == b"IDAT" || &head.name == b"fdAT" {
            if &head.name == b"fdAT" {
                check_chunk(&head, &mut so_far)?;
            }
            so_far.has_own_default = frame.is_none();
            break at;
        }
        if &head.name == b"IEND" {
            return Err(PNG.corrupt("no pixels before the end of the file"));
        }
        let chunk = chunk(bytes, at, false)?;
        check_chunk(&chunk, &mut so_far)?;
        let data = chunk.data;
        match &chunk.name {
            b"IHDR" => {
                size = word(data, 0).zip(word(data, 4));
                layout = layout_of(data[8], data[9]).or(layout);
                interlaced = data[12] != 0;
                if data[11] != 0 {
                    return Err(PNG.unsupported(format!("filter method {}", data[11])));
                }
            }
            b"PLTE" => {
                if data.len() / 3 > 256 {
                    return Err(PNG.corrupt(format!("palette of {} bytes", data.len())));
                }
                palette = Some(palette_from_rgb(data));
            }
            b"tRNS" => {
                let least = match layout {
                    Some((Mode::Rgb, ..)) => 6,
                    Some((Mode::Bit | Mode::Grey | Mode::Grey16, ..)) => 2,
                    _ => 0,
                };
                if data.len() < least {
                    return Err(PNG.truncated("chunk tRNS is too short"));
                }
            }
            b"eXIf" => exif = Some(data),
            b"fcTL" => {
                let field = |index: usize| word(data, 4 + index * 4).unwrap_or(0);
                let (width, height, left, top) = (field(0), field(1), field(2), field(3));
                let (canvas_width, canvas_height) = size.unwrap_or((0, 0));
                if u64::from(left) + u64::from(width) > u64::from(canvas_width)
                    || u64::from(top) + u64::from(height) > u64::from(canvas_height)
                {
                    return Err(PNG.corrupt("the first frame reaches over the canvas"));
                }
                frame = Some([left, top, width, height]);
            }
            _ => {}
        }
        let stored = word(bytes, chunk.next - 4);
        if stored != Some(checksum(chunk.name, data)) {
            return Err(PNG.corrupt(format!("wrong checksum of chunk {}", show(chunk.name))));
        }
        at = chunk.next;
    };
    let Some((width, height)) = size else {
        return Err(PNG.corrupt("no header chunk"));
    };
    let Some((mode, packing, bits)) = layout else {
        return Err(PNG.unsupported("colour type and bit depth do not go together"));
    };
    Ok(Parsed {
        bytes,
        width,
        height,
        mode,
        packing,
        bits,
        interlaced,
        palette: palette.filter(|_| mode == Mode::Palette),
        frame,
        pixels,
        exif,
        so_far,
    })
}

fn checksum(name: [u8; 4], data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&name);
    hasher.update(data);
    hasher.finalize()
}

fn layout_of(depth: u8, colour: u8) -> Option<(Mode, Packing, usize)> {
    Some(match (depth, colour) {
        (1, 0) => (Mode::Bit, Packing::Bits(1), 1),
        (2 | 4, 0) => (Mode::Grey, Packing::Bits(depth), usize::from(depth)),
        (8, 0) => (Mode::Grey, Packing::Bytes, 8),
        (16, 0) => (Mode::Grey16, Packing::Grey16, 16),
        (8, 2) => (Mode::Rgb, Packing::Bytes, 24),
        (16, 2) => (Mode::Rgb, Packing::High(3), 48),
        (1 | 2 | 4, 3) => (Mode::Palette, Packing::Bits(depth), usize::from(depth)),
        (8, 3) => (Mode::Palette, Packing::Bytes, 8),
        (8, 4) => (Mode::GreyAlpha, Packing::Bytes, 16),
        (16, 4) => (Mode::Rgba, Packing::GreyAlpha16, 32),
        (8, 6) => (Mode::Rgba, Packing::Bytes, 32),
        (16, 6) => (Mode::Rgba, Packing::High(4), 64),
        _ => return None,
    })
}

pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let parsed = parse(bytes)?;
    let line = (u64::from(parsed.width) * parsed.bits as u64).div_ceil(8) + 1;
    let mut memory = line * 2 + INFLATED_BYTES as u64 + u64::from(parsed.width) * 4;
    if needs_raster(&parsed) {
        memory += u64::from(parsed.width) * u64::from(parsed.height) * parsed.mode.bytes() as u64;
    }
    Ok(Header {
        width: parsed.width,
        height: parsed.height,
        memory,
        mode: parsed.mode,
    })
}

fn needs_raster(parsed: &Parsed<'_>) -> bool {
    let whole = [0, 0, parsed.width, parsed.height];
    parsed.interlaced || parsed.frame.is_some_and(|frame| frame != whole)
}

/// The pieces of the zlib stream; their checksums are not looked at, as the
/// reference does not.
struct Pieces<'a> {
    bytes: &'a [u8],
    /// Where the next chunk begins.
    at: usize,
}

impl<'a> Iterator for Pieces<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let chunk = chunk(self.bytes, self.at, true).ok()?;
        let data = match &chunk.name {
            b"IDAT" | b"DDAT" => chunk.data,
            b"fdAT" => chunk.data.get(4..).unwrap_or_default(),
            _ => return None,
        };
        self.at = chunk.next;
        Some(data)
    }
}

pub(crate) fn decode(bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
    let parsed = parse(bytes)?;
    let mut inflater = Inflater::new(Pieces {
        bytes,
        at: parsed.pixels,
    });
    let spec =
        Spec::new(parsed.width, parsed.height, parsed.mode).with_palette(parsed.palette.clone());
    if needs_raster(&parsed) {
        let mut raster = Raster::zeroed(spec)?;
        let [left, top, width, height] =
            parsed.frame.unwrap_or([0, 0, parsed.width, parsed.height]);
        let passes: &[[u32; 4]] = if parsed.interlaced {
            &ADAM7
        } else {
            &[[0, 0, 1, 1]]
        };
        let mut begun = false;
        'passes: for &[first_x, first_y, step_x, step_y] in passes {
            let columns = width.saturating_sub(first_x).div_ceil(step_x);
            let rows = height.saturating_sub(first_y).div_ceil(step_y);
            if columns == 0 || rows == 0 {
                continue;
            }
            let mut lines = Lines::new(&parsed, columns as usize, rows as usize);
            let pixel = parsed.mode.bytes();
            let mut row = vec![0u8; columns as usize * pixel];
            for index in 0..rows {
                if !lines.next(&mut inflater, first_y + index * step_y, begun)? {
                    break 'passes;
                }
                begun = true;
                lines.unpack(&parsed, &mut row);
                let target = raster.row_mut(top + first_y + index * step_y);
                for (column, value) in row.chunks_exact(pixel).enumerate() {
                    let x = left as usize + first_x as usize + column * step_x as usize;
                    target[x * pixel..][..pixel].copy_from_slice(value);
                }
            }
        }
        check_rest(&parsed, inflater.rest().at)?;
        return raster.feed(sink);
    }
    sink.start(spec)?;
    let mut lines = Lines::new(&parsed, parsed.width as usize, parsed.height as usize);
    let mut row = vec![0u8; parsed.width as usize * parsed.mode.bytes()];
    let mut ended = false;
    for y in 0..parsed.height {
        budget::check()?;
        if !ended && !lines.next(&mut inflater, y, y > 0)? {
            // The stream ended between two lines: the reference leaves the rest black.
            ended = true;
            row.fill(0);
        }
        if sink.wants(y) {
            if !ended {
                lines.unpack(&parsed, &mut row);
            }
            sink.row(y, &row);
        }
    }
    check_rest(&parsed, inflater.rest().at)
}

/// First column and row, and the steps, of each pass of an interlaced image.
const ADAM7: [[u32; 4]; 7] = [
    [0, 0, 8, 8],
    [4, 0, 8, 8],
    [0, 4, 4, 8],
    [2, 0, 4, 4],
    [0, 2, 2, 4],
    [1, 0, 2, 2],
    [0, 1, 1, 2],
];

/// Bytes that are inflated at once, unless a line is longer.
const INFLATED_BYTES: usize = 32 * 1024;

/// Decodes the lines of one pass.
struct Lines {
    /// Whole lines, each with its filter, after the last one of before.
    buffer: Vec<u8>,
    /// Bytes of a line.
    length: usize,
    /// Where the current line begins.
    at: usize,
    /// Where the data ends.
    end: usize,
    /// Lines that are not in the buffer yet.
    to_come: usize,
    /// Why there may be less data than lines.
    ending: Ending,
    /// Bytes between a sample and the same one of the pixel before.
    distance: usize,
}

impl Lines {
    fn new(parsed: &Parsed<'_>, columns: usize, rows: usize) -> Self {
        let length = (columns * parsed.bits).div_ceil(8) + 1;
        let at_once = (INFLATED_BYTES / length).clamp(1, rows);
        Self {
            buffer: vec![0; length * (at_once + 1)],
            length,
            at: 0,
            end: length,
            to_come: rows,
            ending: Ending::Full,
            distance: parsed.bits.div_ceil(8),
        }
    }

    /// Reads the next line; `false` where the stream ended before it, which only
    /// the first line of the image may not do.
    fn next<'a>(
        &mut self,
        inflater: &mut Inflater<'a, impl Iterator<Item = &'a [u8]>>,
        y: u32,
        may_end: bool,
    ) -> Result<bool> {
        if self.at + self.length == self.end && self.ending == Ending::Full {
            // The last line stays as the one above the next.
            self.buffer.copy_within(self.at..self.end, 0);
            let count = self.to_come.min(self.buffer.len() / self.length - 1);
            self.to_come -= count;
            let wanted = &mut self.buffer[self.length..self.length * (count + 1)];
            let (got, ending) = inflater.read(wanted)?;
            if let Ending::Broken(reason) = ending {
                return Err(PNG.corrupt(format!("{reason} after row {y}")));
            }
            (self.at, self.end, self.ending) = (0, self.length + got, ending);
        }
        let left = self.end - self.at - self.length;
        if left < self.length {
            if self.ending == Ending::Finished && left == 0 && may_end {
                return Ok(false);
            }
            return Err(PNG.truncated(format!("pixels end in row {y}")));
        }
        self.at += self.length;
        self.unfilter(y)?;
        Ok(true)
    }

    fn unfilter(&mut self, y: u32) -> Result<()> {
        let (above, line) = self.buffer[self.at - self.length..].split_at_mut(self.length);
        let (filter, line) = (line[0], &mut line[1..self.length]);
        let above = &above[1..];
        match filter {
            0 => {}
            1 => sub(line, self.distance),
            2 => {
                for (sample, &up) in line.iter_mut().zip(above) {
                    *sample = sample.wrapping_add(up);
                }
            }
            3 => average(line, above, self.distance),
            4 => paeth(line, above, self.distance),
            other => return Err(PNG.corrupt(format!("filter {other} in row {y}"))),
        }
        Ok(())
    }

    fn unpack(&self, parsed: &Parsed<'_>, row: &mut [u8]) {
        let line = &self.buffer[self.at + 1..self.at + self.length];
        match parsed.packing {
            Packing::Bytes => row.copy_from_slice(line),
            Packing::Bits(depth) => {
                let top = (1u8 << depth) - 1;
                let spread = if parsed.mode == Mode::Palette {
                    1
                } else {
                    255 / top
                };
                let per_byte = 8 / usize::from(depth);
                for (x, pixel) in row.iter_mut().enumerate() {
                    let shift = (per_byte - 1 - x % per_byte) * usize::from(depth);
                    *pixel = (line[x / per_byte] >> shift & top) * spread;
                }
            }
            Packing::Grey16 => {
                for (pixel, stored) in row.chunks_exact_mut(2).zip(line.chunks_exact(2)) {
                    (pixel[0], pixel[1]) = (stored[1], stored[0]);
                }
            }
            Packing::High(_) => {
                for (sample, stored) in row.iter_mut().zip(line.chunks_exact(2)) {
                    *sample = stored[0];
                }
            }
            Packing::GreyAlpha16 => {
                for (pixel, stored) in row.chunks_exact_mut(4).zip(line.chunks_exact(4)) {
                    pixel[..3].fill(stored[0]);
                    pixel[3] = stored[2];
                }
            }
        }
    }
}

fn sub(line: &mut [u8], distance: usize) {
    for index in distance..line.len() {
        line[index] = line[index].wrapping_add(line[index - distance]);
    }
}

fn average(line: &mut [u8], above: &[u8], distance: usize) {
    for index in 0..line.len() {
        let left = if index < distance {
            0
        } else {
            line[index - distance]
        };
        let mean = (u16::from(left) + u16::from(above[index])) / 2;
        line[index] = line[index].wrapping_add(mean as u8);
    }
}

fn paeth(line: &mut [u8], above: &[u8], distance: usize) {
    match distance {
        3 => paeth_pixels::<3>(line, above),
        4 => paeth_pixels::<4>(line, above),
        _ => {
            for index in 0..line.len() {
                let (left, corner) = if index < distance {
                    (0, 0)
                } else {
                    (line[index - distance], above[index - distance])
                };
                line[index] = line[index].wrapping_add(predict(left, above[index], corner));
            }
        }
    }
}

/// The common pixel sizes with the left neighbours kept in registers.
fn paeth_pixels<const N: usize>(line: &mut [u8], above: &[u8]) {
    let (mut left, mut corner) = ([0u8; N], [0u8; N]);
    for (pixel, up) in line.chunks_exact_mut(N).zip(above.chunks_exact(N)) {
        for channel in 0..N {
            let value =
                pixel[channel].wrapping_add(predict(left[channel], up[channel], corner[channel]));
            pixel[channel] = value;
            left[channel] = value;
            corner[channel] = up[channel];
        }
    }
}

fn predict(left: u8, up: u8, corner: u8) -> u8 {
    let (a, b, c) = (i16::from(left), i16::from(up), i16::from(corner));
    let (to_left, to_up, to_corner) = ((b - c).abs(), (a - c).abs(), (a + b - 2 * c).abs());
    if to_left <= to_up && to_left <= to_corner {
        left
    } else if to_up <= to_corner {
        up
    } else {
        corner
    }
}

/// The reference reads the chunks from `at` on, after those whose pixels it
/// needed, and refuses a file that is cut within one of them. A broken name or a
/// missing end is let pass.
fn check_rest(parsed: &Parsed<'_>, mut at: usize) -> Result<()> {
    let mut so_far = SoFar {
        decoder: None,
        ..parsed.so_far
    };
    loop {
        budget::check()?;
        let head = match chunk(parsed.bytes, at, true) {
            Ok(head) if &head.name != b"IEND" => head,
            _ => return Ok(()),
        };
        if &head.name == b"fcTL" && so_far.is_moving() {
            return Ok(());
        }
        check_chunk(&chunk(parsed.bytes, at, false)?, &mut so_far)?;
        at = head.next;
    }
}

/// The orientation in the file's EXIF chunk, before or after the pixels.
pub(crate) fn orientation(bytes: &[u8]) -> u8 {
    let Ok(parsed) = parse(bytes) else {
        return 1;
    };
    let mut found = parsed.exif;
    let mut at = parsed.pixels;
    while let Ok(chunk) = chunk(bytes, at, true) {
        match &chunk.name {
            b"IEND" => break,
            b"eXIf" => found = Some(chunk.data),
            _ => {}
        }
        at = chunk.next;
    }
    found.map_or(1, exif::orientation)
}
