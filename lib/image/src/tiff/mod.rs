//! TIFF, first page. The directory and the way in which tags choose a mode are
//! read here as the reference reads them; strips and tiles are expanded by
//! `weezl` (LZW), `flate2` (Deflate), libjpeg (JPEG), `fax`'s code tables
//! (CCITT), `ruzstd` (Zstandard) and liblzma (LZMA).

mod directory;
mod expand;
mod fax;
mod layout;

use crate::budget;
use crate::error::{Blame, Result};
use crate::raster::{Mode, Palette, Raster, Sink, Spec, palette_from_rgb, try_zeroed};
use crate::{Header, exif};
use directory::{Directory, Values};
use expand::{Codec, Strip};
use layout::{Layout, Unpack};
use std::borrow::Cow;

const TIFF: Blame = Blame("TIFF");

/// Tags of the first directory, by their numbers in TIFF 6.0.
mod tag {
    pub(super) const WIDTH: u16 = 256;
    pub(super) const HEIGHT: u16 = 257;
    pub(super) const BITS_PER_SAMPLE: u16 = 258;
    pub(super) const COMPRESSION: u16 = 259;
    pub(super) const PHOTOMETRIC: u16 = 262;
    pub(super) const FILL_ORDER: u16 = 266;
    pub(super) const STRIP_OFFSETS: u16 = 273;
    pub(super) const ORIENTATION: u16 = 274;
    pub(super) const SAMPLES_PER_PIXEL: u16 = 277;
    pub(super) const ROWS_PER_STRIP: u16 = 278;
    pub(super) const STRIP_BYTE_COUNTS: u16 = 279;
    pub(super) const PLANAR_CONFIGURATION: u16 = 284;
    pub(super) const T4_OPTIONS: u16 = 292;
    pub(super) const PREDICTOR: u16 = 317;
    pub(super) const COLOUR_MAP: u16 = 320;
    pub(super) const TILE_WIDTH: u16 = 322;
    pub(super) const TILE_LENGTH: u16 = 323;
    pub(super) const TILE_OFFSETS: u16 = 324;
    pub(super) const TILE_BYTE_COUNTS: u16 = 325;
    pub(super) const EXTRA_SAMPLES: u16 = 338;
    pub(super) const SAMPLE_FORMAT: u16 = 339;
    pub(super) const JPEG_TABLES: u16 = 347;
    pub(super) const JPEG_STREAM: u16 = 513;
    pub(super) const YCBCR_SUBSAMPLING: u16 = 530;
    pub(super) const WINDOWS_MEDIA_PHOTO: u16 = 0xbc01;
}

/// No layout that the reference reads has more samples in a pixel.
const MAX_SAMPLES: u64 = 6;

/// Bytes that the LZMA decoder may take: the dictionary of its highest preset, 64 MiB,
/// with the rest.
const LZMA_BYTES: u64 = 72 * 1024 * 1024;

struct Parsed<'a> {
    directory: Directory<'a>,
    width: usize,
    height: usize,
    codec: Codec,
    layout: Layout,
    planar: bool,
    /// Samples of a pixel, over all planes.
    samples: usize,
    /// Bits of a sample.
    depth: usize,
    fill_reversed: bool,
    photometric: u64,
    /// Chroma subsampling of YCbCr data that is not JPEG.
    subsampling: Option<(usize, usize)>,
    palette: Option<Box<Palette>>,
    tiles: Tiles<'a>,
}

/// How the image is cut.
struct Tiles<'a> {
    width: usize,
    height: usize,
    across: usize,
    down: usize,
    is_tiled: bool,
    offsets: Offsets<'a>,
    counts: Option<Values<'a>>,
}

/// Where the data of strips or tiles begins.
enum Offsets<'a> {
    Stored(Values<'a>),
    /// One of everything.
    One(u64),
}

impl Offsets<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Stored(values) => values.len(),
            Self::One(_) => 1,
        }
    }

    fn get(&self, index: usize) -> Option<u64> {
        match self {
            Self::Stored(values) => values.get(index),
            Self::One(offset) => (index == 0).then_some(*offset),
        }
    }
}

impl Tiles<'_> {
    /// The data of strip or tile `index` from its beginning on, and how much of it
    /// belongs there; `None` where the file tells no beginning.
    fn place<'b>(&self, bytes: &'b [u8], index: usize) -> Option<(&'b [u8], usize)> {
        let offset = usize::try_from(self.offsets.get(index)?).unwrap_or(usize::MAX);
        let data = &bytes[offset.min(bytes.len())..];
        let count = self.counts.and_then(|counts| counts.get(index));
        let count = count.filter(|&count| count > 0).unwrap_or(u64::MAX);
        Some((
            data,
            usize::try_from(count).unwrap_or(usize::MAX).min(data.len()),
        ))
    }
}

fn parse(bytes: &[u8]) -> Result<Parsed<'_>> {
    let directory = Directory::read(bytes)?;
    if directory.has(tag::WINDOWS_MEDIA_PHOTO) {
        return Err(TIFF.unsupported("Windows Media Photo"));
    }
    let compression = directory.number(tag::COMPRESSION).unwrap_or(1);
    let Some(codec) = Codec::from_tag(compression) else {
        return Err(TIFF.unsupported(format!("compression {compression}")));
    };
    let mut planar = directory.number(tag::PLANAR_CONFIGURATION).unwrap_or(1) == 2;
    let mut photometric = directory.number(tag::PHOTOMETRIC).unwrap_or(0);
    if codec == Codec::OldJpeg {
        photometric = 6;
    }
    let fill = directory.number(tag::FILL_ORDER).unwrap_or(1);
    let (Some(width), Some(height)) = (directory.number(tag::WIDTH), directory.number(tag::HEIGHT))
    else {
        return Err(TIFF.corrupt("no width or height"));
    };
    let mut format = directory
        .numbers(tag::SAMPLE_FORMAT)
        .unwrap_or_else(|| vec![1]);
    if format.windows(2).all(|pair| pair[0] == pair[1]) {
        format.truncate(1);
    }
    let mut depths = directory
        .numbers(tag::BITS_PER_SAMPLE)
        .unwrap_or_else(|| vec![1]);
    let mut extra = directory.numbers(tag::EXTRA_SAMPLES).unwrap_or_default();
    let mut samples = directory
        .number(tag::SAMPLES_PER_PIXEL)
        .unwrap_or(if codec == Codec::OldJpeg { 3 } else { 1 });
    let stored_samples = samples;
    if planar && !extra.is_empty() && extra.iter().all(|&kind| kind == 0) {
        depths.truncate(depths.len().saturating_sub(extra.len()));
        samples = samples.saturating_sub(extra.len() as u64);
        extra.clear();
    }
    if samples > MAX_SAMPLES || samples == 0 {
        return Err(TIFF.unsupported(format!("{samples} samples per pixel")));
    }
    let samples = samples as usize;
    if depths.len() == 1 {
        depths = vec![depths[0]; samples];
    }
    depths.truncate(samples);
    if depths.len() != samples {
        return Err(TIFF.corrupt(format!("{} depths for {samples} samples", depths.len())));
    }
    let big = directory.is_big_endian();
    let choose = |fill: u64| layout::choose(big, photometric, &format, fill, &depths, &extra);
    let mut layout = choose(fill).ok_or_else(|| {
        TIFF.unsupported(format!(
            "photometric {photometric}, format {format:?}, depths {depths:?}, extra {extra:?}"
        ))
    })?;
    let mut subsampling = None;
    if codec != Codec::None {
        // The library that expands the strips sets bits and bytes in order, so the
        // layout is that of a file in this machine's order.
        layout = choose(1).ok_or_else(|| TIFF.unsupported(format!("fill order {fill}")))?;
        layout.make_native();
        if photometric == 6 {
            layout = Layout::rgb8();
            if !matches!(codec, Codec::Jpeg | Codec::OldJpeg) {
                let factors = directory.numbers(tag::YCBCR_SUBSAMPLING);
                let factors = factors.as_deref().unwrap_or(&[2, 2]);
                let [across, down] = *factors else {
                    return Err(TIFF.corrupt("chroma subsampling is not two numbers"));
                };
                if ![1, 2, 4].contains(&across) || ![1, 2, 4].contains(&down) {
                    return Err(TIFF.unsupported(format!("chroma subsampling {factors:?}")));
                }
                if planar || samples != 3 {
                    return Err(TIFF.unsupported("YCbCr in planes"));
                }
                subsampling = Some((across as usize, down as usize));
            }
        }
    }
    if samples == 1 || stored_samples == 1 {
        planar = false;
    }
    if planar && codec != Codec::None && !matches!(depths[0], 8 | 16) {
        return Err(TIFF.unsupported(format!("planes of {} bits", depths[0])));
    }
    if planar && codec == Codec::Jpeg && photometric == 6 {
        return Err(TIFF.unsupported("YCbCr JPEG in planes"));
    }
    let palette = if matches!(layout.mode, Mode::Palette | Mode::PaletteAlpha) {
        let Some(map) = directory.numbers(tag::COLOUR_MAP) else {
            return Err(TIFF.corrupt("no colour map"));
        };
        let count = map.len() / 3;
        if count > 256 {
            return Err(TIFF.corrupt(format!("colour map of {count} colours")));
        }
        let level = |index: usize| (map[index] / 256).min(255) as u8;
        let packed: Vec<u8> = (0..count)
            .flat_map(|index| [level(index), level(count + index), level(2 * count + index)])
            .collect();
        Some(palette_from_rgb(&packed))
    } else {
        None
    };
    let limit = |value: u64| {
        usize::try_from(value)
            .ok()
            .filter(|&value| value <= u32::MAX as usize)
    };
    let (Some(width), Some(height)) = (limit(width), limit(height)) else {
        return Err(TIFF.corrupt(format!("size {width}×{height}")));
    };
    let tiles = tiles_of(&directory, width, height, codec)?;
    if planar && codec == Codec::None {
        // Each strip past the last plane has no channel to go to.
        let planes = tiles.offsets.len().div_ceil(tiles.across * tiles.down);
        if planes > layout.mode.bytes() {
            return Err(TIFF.corrupt(format!("{planes} planes for {samples} samples")));
        }
    }
    Ok(Parsed {
        width,
        height,
        codec,
        layout,
        planar,
        samples,
        depth: depths[0] as usize,
        fill_reversed: fill == 2,
        photometric,
        subsampling,
        palette,
        tiles,
        directory,
    })
}

fn tiles_of<'a>(
    directory: &Directory<'a>,
    width: usize,
    height: usize,
    codec: Codec,
) -> Result<Tiles<'a>> {
    let strips = directory.values(tag::STRIP_OFFSETS).map(Offsets::Stored);
    let is_tiled = strips.is_none() || (codec != Codec::None && directory.has(tag::TILE_WIDTH));
    let side = |tag: u16, whole: usize| {
        let value = directory.number(tag).unwrap_or(whole as u64);
        usize::try_from(value).unwrap_or(usize::MAX)
    };
    let (offsets, counts, tile_width, tile_height);
    if is_tiled {
        let tiles = directory.values(tag::TILE_OFFSETS).map(Offsets::Stored);
        let stream = || directory.number(tag::JPEG_STREAM).map(Offsets::One);
        offsets = tiles.or(strips).or_else(stream);
        counts = directory
            .values(tag::TILE_BYTE_COUNTS)
            .or_else(|| directory.values(tag::STRIP_BYTE_COUNTS));
        (tile_width, tile_height) = (side(tag::TILE_WIDTH, width), side(tag::TILE_LENGTH, height));
    } else {
        offsets = strips;
        counts = directory.values(tag::STRIP_BYTE_COUNTS);
        (tile_width, tile_height) = (width, side(tag::ROWS_PER_STRIP, height).min(height));
    }
    let Some(mut offsets) = offsets else {
        return Err(TIFF.corrupt("neither strips nor tiles"));
    };
    if tile_width == 0 || tile_height == 0 {
        return Err(TIFF.corrupt(format!("tiles of {tile_width}×{tile_height}")));
    }
    // A tile may be larger than the image, but not without bound.
    let bound = |side: usize, whole: usize| side <= whole.next_multiple_of(16).max(65_536);
    if !bound(tile_width, width) || !bound(tile_height, height) {
        return Err(TIFF.corrupt(format!("tiles of {tile_width}×{tile_height}")));
    }
    if codec == Codec::None && tile_width == width && tile_height == height && offsets.len() > 1 {
        let is_planar = directory.number(tag::PLANAR_CONFIGURATION) == Some(2);
        if !is_planar {
            // Every strip covers the image: the last one stays.
            let last = offsets.len() - 1;
            offsets = Offsets::One(offsets.get(last).unwrap_or(u64::MAX));
        }
    }
    Ok(Tiles {
        width: tile_width,
        height: tile_height,
        across: width.div_ceil(tile_width),
        down: height.div_ceil(tile_height),
        is_tiled,
        offsets,
        counts,
    })
}

pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let parsed = parse(bytes)?;
    let raster = parsed.width as u64 * parsed.height as u64 * parsed.layout.mode.bytes() as u64;
    let bits = (parsed.samples * parsed.depth) as u64;
    let tile = (parsed.tiles.width as u64)
        .saturating_mul(parsed.tiles.height as u64)
        .saturating_mul(bits)
        .div_ceil(8);
    let mut memory = match parsed.codec {
        Codec::None => 0,
        Codec::Jpeg | Codec::OldJpeg => tile.saturating_mul(4),
        Codec::Lzma => tile.saturating_add(LZMA_BYTES),
        _ => tile,
    };
    if parsed.subsampling.is_some() {
        // As stored, and as RGB.
        memory = memory.saturating_add(tile);
    }
    if parsed.fill_reversed && parsed.codec != Codec::None {
        memory = memory.saturating_add(bytes.len() as u64);
    }
    if needs_raster(&parsed) {
        memory = memory.saturating_add(raster);
    }
    Ok(Header {
        width: u32::try_from(parsed.width).unwrap_or(u32::MAX),
        height: u32::try_from(parsed.height).unwrap_or(u32::MAX),
        memory,
        mode: parsed.layout.mode,
    })
}

/// Pillow turns a TIFF as its orientation tag says.
pub(crate) fn orientation(bytes: &[u8]) -> u8 {
    let value = Directory::read(bytes)
        .ok()
        .and_then(|directory| directory.number(tag::ORIENTATION));
    match value {
        Some(value @ 2..=8) => value as u8,
        Some(_) => 1,
        // Cut directories are read by the same rules as EXIF blocks.
        None => exif::orientation(bytes),
    }
}

fn needs_raster(parsed: &Parsed<'_>) -> bool {
    parsed.planar || parsed.tiles.is_tiled || parsed.tiles.across > 1
}

pub(crate) fn decode(bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
    let parsed = parse(bytes)?;
    let spec = Spec::new(
        parsed.width as u32,
        parsed.height as u32,
        parsed.layout.mode,
    )
    .with_palette(parsed.palette.clone());
    if parsed.layout.unpack == Unpack::Refused {
        return Err(TIFF.unsupported("premultiplied grey cannot become RGB in the reference"));
    }
    check_work(bytes, &parsed)?;
    if needs_raster(&parsed) {
        let mut raster = Raster::zeroed(spec)?;
        let planes = if parsed.planar { parsed.samples } else { 1 };
        for plane in 0..planes {
            decode_plane(bytes, &parsed, plane, &mut raster)?;
        }
        if parsed.planar && parsed.codec != Codec::None && parsed.layout.premultiplied {
            layout::unpremultiply_rgba(&mut raster.data);
        }
        return raster.feed(sink);
    }
    let mut row = vec![0u8; parsed.width * parsed.layout.mode.bytes()];
    sink.start(spec)?;
    let mut y = 0;
    for index in 0..parsed.tiles.down {
        budget::check()?;
        let rows = parsed.tiles.height.min(parsed.height - y);
        if parsed.codec == Codec::None && index >= parsed.tiles.offsets.len() {
            // The reference leaves rows black that no strip covers.
            row.fill(0);
            for line in y..y + rows {
                sink.row(line as u32, &row);
            }
            y += rows;
            continue;
        }
        let strip = read_tile(bytes, &parsed, index, parsed.width, rows, y)?;
        for line in 0..rows {
            if sink.wants((y + line) as u32) {
                strip.unpack(line, parsed.width, &parsed.layout, &mut row);
                sink.row((y + line) as u32, &row);
            }
        }
        y += rows;
    }
    Ok(())
}

/// Refuses what a file can ask for by naming the same data again and again, or by
/// tiles that hardly touch the image.
fn check_work(bytes: &[u8], parsed: &Parsed<'_>) -> Result<()> {
    if parsed.codec == Codec::None {
        return Ok(());
    }
    let tiles = &parsed.tiles;
    let planes = if parsed.planar { parsed.samples } else { 1 };
    let count = tiles.across * tiles.down * planes;
    let size = |width: usize, height: usize| {
        let bits = (parsed.samples * parsed.depth) as u128;
        u64::try_from(width as u128 * height as u128 * bits / 8).unwrap_or(u64::MAX)
    };
    let expanded = size(tiles.width * tiles.across, tiles.height * tiles.down);
    budget::check_padding(expanded, size(parsed.width, parsed.height))?;
    let mut stored = 0u64;
    for index in 0..count.min(tiles.offsets.len()) {
        budget::check()?;
        let length = tiles.place(bytes, index).map_or(0, |(_, length)| length);
        stored = stored.saturating_add(length as u64);
    }
    budget::check_shared(stored, bytes.len() as u64)
}

fn decode_plane(
    bytes: &[u8],
    parsed: &Parsed<'_>,
    plane: usize,
    raster: &mut Raster,
) -> Result<()> {
    let tiles = &parsed.tiles;
    let pixel = parsed.layout.mode.bytes();
    let stride = raster.stride();
    for down in 0..tiles.down {
        for across in 0..tiles.across {
            budget::check()?;
            let index = (plane * tiles.down + down) * tiles.across + across;
            let (left, top) = (across * tiles.width, down * tiles.height);
            let columns = tiles.width.min(parsed.width - left);
            let rows = tiles.height.min(parsed.height - top);
            if parsed.codec == Codec::None && index >= tiles.offsets.len() {
                continue;
            }
            // Tiles are stored whole, strips only as far as the image goes.
            let stored_rows = if tiles.is_tiled { tiles.height } else { rows };
            let strip = read_tile(bytes, parsed, index, tiles.width, stored_rows, top)?;
            for line in 0..rows {
                let start = (top + line) * stride + left * pixel;
                let target = &mut raster.data[start..start + columns * pixel];
                if parsed.planar {
                    strip.unpack_plane(line, columns, plane, &parsed.layout, target);
                } else {
                    strip.unpack(line, columns, &parsed.layout, target);
                }
            }
        }
    }
    Ok(())
}

/// Expands one strip or tile of `width × rows` pixels.
fn read_tile<'a>(
    bytes: &'a [u8],
    parsed: &Parsed<'_>,
    index: usize,
    width: usize,
    rows: usize,
    top: usize,
) -> Result<Strip<'a>> {
    let tiles = &parsed.tiles;
    let what = if tiles.is_tiled { "tile" } else { "strip" };
    let Some((data, length)) = tiles.place(bytes, index) else {
        return Err(TIFF.truncated(format!("no {what} {index}")));
    };
    let samples = if parsed.planar { 1 } else { parsed.samples };
    let bits = samples * parsed.depth;
    let row_bytes = (width * bits).div_ceil(8);
    if parsed.codec == Codec::None {
        // The reference reads on past the length that the file gives.
        let visible = rows.min(parsed.height - top);
        let last = (width.min(parsed.width) * bits).div_ceil(8);
        let wanted = (visible - 1) * row_bytes + last;
        if data.len() < wanted {
            return Err(TIFF.truncated(format!(
                "{what} {index} has {} bytes of {wanted}",
                data.len()
            )));
        }
        let padded = visible * row_bytes;
        let data = match data.get(..padded) {
            Some(data) => Cow::Borrowed(data),
            None => {
                let mut stored = try_zeroed(padded)?;
                stored[..wanted].copy_from_slice(&data[..wanted]);
                Cow::Owned(stored)
            }
        };
        return Ok(Strip { data, row_bytes });
    }
    let data = &data[..length];
    expand::expand(bytes, data, parsed, width, rows, row_bytes, what, index)
}
