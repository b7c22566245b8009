//! Decodes images and prepares them for CLIP exactly as Pillow and the reference do.
//!
//! [`prepare`] takes the bytes of a file and gives the square RGB crop that the
//! model reads: resize of the shorter side (antialiased bicubic), centre crop,
//! then conversion to RGB, in this order and in the image's own mode. The first
//! frame of an animation or a multi-page file is taken.
//!
//! No file takes the process down: sizes are checked against [`Limits`] from the
//! header before anything is allocated for pixels, and a decoder that panics
//! becomes an [`ImageError::Decoder`].

#![warn(missing_docs)]

mod bmp;
mod budget;
mod convert;
mod error;
mod exif;
mod geometry;
mod gif;
mod inflate;
mod jpeg;
mod pcx;
mod png;
mod raster;
mod resample;
mod tiff;
mod vp8l;
mod webp;

pub use budget::WORK_LIMIT;
pub use error::ImageError;
pub use events::ImageType;

use error::Result;
use raster::{Collect, Mode, Sink};
use resample::Crop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

/// Side of the crop that the published CLIP models read, in pixels.
pub const DEFAULT_SIZE: u32 = 224;

/// Shorter side that `DecodeMode::Fast` keeps at least, in multiples of the crop's.
const FAST_OVERSAMPLING: u32 = 3;

/// Tables, windows and small buffers of a decoder, which no header tells of.
const DECODER_BYTES: u64 = 2 * 1024 * 1024;

/// What one image may cost. Checked from the header, before allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Pixels of the image, width times height.
    pub max_pixels: u64,
    /// Bytes of the file.
    pub max_bytes: u64,
    /// Bytes of memory that decoding may take besides the file itself.
    pub max_memory: u64,
}

impl Limits {
    /// Where Pillow, and so the reference, refuses an image as a decompression bomb.
    pub const MAX_PIXELS: u64 = 178_956_970;
    /// More than any photo; S3 objects can be terabytes.
    pub const MAX_BYTES: u64 = 512 * 1024 * 1024;
    /// Room for the largest allowed RGBA image with its buffers, below one gibibyte.
    pub const MAX_MEMORY: u64 = 960 * 1024 * 1024;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_pixels: Self::MAX_PIXELS,
            max_bytes: Self::MAX_BYTES,
            max_memory: Self::MAX_MEMORY,
        }
    }
}

/// How a JPEG is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DecodeMode {
    /// Every pixel as the reference decodes it.
    #[default]
    Exact,
    /// At a lower resolution where the image is much larger than the crop: the
    /// shorter side stays at least three times the crop's, and the resize of what
    /// is left is exact. Cosine loss of an embedding is a few millionths.
    Fast,
}

/// How [`prepare`] works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Side of the square crop, in pixels.
    pub size: u32,
    /// What one image may cost.
    pub limits: Limits,
    /// Turn the image as its EXIF orientation says. The reference does not, but
    /// for TIFF, which Pillow always turns.
    pub apply_exif_orientation: bool,
    /// Exact or fast decoding of JPEG.
    pub decode: DecodeMode,
    /// Computing time that one image may take before it is given up.
    pub time_limit: Duration,
}

/// Ten times what the largest honest files take on one core.
pub const DEFAULT_TIME_LIMIT: Duration = Duration::from_secs(30);

impl Default for Options {
    fn default() -> Self {
        Self {
            size: DEFAULT_SIZE,
            limits: Limits::default(),
            apply_exif_orientation: false,
            decode: DecodeMode::Exact,
            time_limit: DEFAULT_TIME_LIMIT,
        }
    }
}

/// What was found in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// Width of the image as it was resized, after any orientation, in pixels.
    pub width: u32,
    /// Height of the image as it was resized, after any orientation, in pixels.
    pub height: u32,
}

/// What a header says of an image.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    pub(crate) width: u32,
    pub(crate) height: u32,
    /// Bytes that the decoder itself holds, beyond the rows that it hands on.
    pub(crate) memory: u64,
    pub(crate) mode: Mode,
}

fn format_name(kind: ImageType) -> &'static str {
    match kind {
        ImageType::Bmp => "BMP",
        ImageType::Gif => "GIF",
        ImageType::Jpeg => "JPEG",
        ImageType::Pcx => "PCX",
        ImageType::Png => "PNG",
        ImageType::Tiff => "TIFF",
        ImageType::Webp => "WebP",
    }
}

/// Reads the header of `bytes` and decodes no pixel.
fn header(bytes: &[u8], kind: ImageType) -> Result<Header> {
    let blame = error::Blame(format_name(kind));
    let header = match kind {
        ImageType::Bmp => bmp::header(bytes)?,
        ImageType::Gif => gif::header(bytes)?,
        ImageType::Jpeg => jpeg::header(bytes)?,
        ImageType::Pcx => pcx::header(bytes)?,
        ImageType::Png => png::header(bytes)?,
        ImageType::Tiff => tiff::header(bytes)?,
        ImageType::Webp => webp::header(bytes)?,
    };
    if header.width == 0 || header.height == 0 {
        return Err(blame.corrupt(format!(
            "size {}×{} has no pixels",
            header.width, header.height
        )));
    }
    Ok(header)
}

fn check(what: &'static str, needed: u64, limit: u64) -> Result<()> {
    if needed > limit {
        return Err(ImageError::LimitExceeded {
            what,
            needed,
            limit,
        });
    }
    Ok(())
}

/// The EXIF orientation to apply, 1 where there is none.
fn orientation(bytes: &[u8], kind: ImageType, options: &Options) -> u8 {
    match kind {
        // Pillow turns TIFF when it loads it, so the reference does, too.
        ImageType::Tiff => tiff::orientation(bytes),
        _ if !options.apply_exif_orientation => 1,
        ImageType::Jpeg => jpeg::orientation(bytes),
        ImageType::Png => png::orientation(bytes),
        ImageType::Webp => webp::orientation(bytes),
        ImageType::Bmp | ImageType::Gif | ImageType::Pcx => 1,
    }
}

/// Checks everything that the header tells, and gives the header, the
/// orientation and the bytes that decoding will take.
fn examine(bytes: &[u8], kind: ImageType, options: &Options) -> Result<(Header, u8, u64)> {
    let limits = &options.limits;
    check("bytes of file", bytes.len() as u64, limits.max_bytes)?;
    let header = header(bytes, kind)?;
    let pixels = u64::from(header.width) * u64::from(header.height);
    check("pixels", pixels, limits.max_pixels)?;
    let turn = orientation(bytes, kind, options);
    let (width, height) = if turn >= 5 {
        (header.height, header.width)
    } else {
        (header.width, header.height)
    };
    let mut memory =
        DECODER_BYTES + header.memory + Crop::memory(width, height, header.mode, options.size);
    if turn != 1 {
        // The image as it is stored, and turned.
        memory += 2 * pixels * header.mode.bytes() as u64;
    }
    Ok((header, turn, memory))
}

/// Bytes of memory that [`prepare`] takes at most for this file, besides the
/// file and the output; from the header, so cheap. Errors as `prepare` does for
/// what the header shows, but for the memory limit itself.
///
/// # Errors
///
/// Where the header cannot be read or the image has more pixels or bytes than
/// `options` allow.
pub fn memory_needed(bytes: &[u8], kind: ImageType, options: &Options) -> Result<u64> {
    budget::limited(options.time_limit, || {
        guarded(kind, || {
            examine(bytes, kind, options).map(|(_, _, memory)| memory)
        })
    })
}

/// Decodes `bytes`, a file of type `kind`, and writes the crop to `out`, which
/// has `size × size × 3` bytes: rows from top to bottom, red, green, blue.
///
/// # Errors
///
/// Where the reference refuses the file, or where it exceeds the limits. Every
/// error is permanent.
pub fn prepare(
    bytes: &[u8],
    kind: ImageType,
    options: &Options,
    out: &mut [u8],
) -> Result<Prepared> {
    prepare_by(bytes, kind, options, out, true)
}

/// [`prepare`], streaming the rows of an image that need not be turned if `streams`.
fn prepare_by(
    bytes: &[u8],
    kind: ImageType,
    options: &Options,
    out: &mut [u8],
    streams: bool,
) -> Result<Prepared> {
    let wanted = options.size as usize * options.size as usize * 3;
    if out.len() != wanted || wanted == 0 {
        return Err(ImageError::OutputSize {
            got: out.len(),
            wanted,
        });
    }
    let work = || {
        let (header, turn, memory) = examine(bytes, kind, options)?;
        check("bytes of memory", memory, options.limits.max_memory)?;
        let mut crop = Crop::new(options.size);
        let (mut width, mut height) = (header.width, header.height);
        if turn == 1 && streams {
            decode(bytes, kind, options, &mut crop)?;
        } else {
            let mut collect = Collect::default();
            decode(bytes, kind, options, &mut collect)?;
            if let Some(raster) = collect.into_raster() {
                let turned = raster.oriented(turn)?;
                drop(raster);
                (width, height) = (turned.spec.width, turned.spec.height);
                turned.feed(&mut crop)?;
            }
        }
        if crop.finish(out) {
            Ok(Prepared { width, height })
        } else {
            Err(error::Blame(format_name(kind)).corrupt("no image in the file"))
        }
    };
    budget::limited(options.time_limit, || guarded(kind, work))
}

fn decode(bytes: &[u8], kind: ImageType, options: &Options, sink: &mut dyn Sink) -> Result<()> {
    match kind {
        ImageType::Bmp => bmp::decode(bytes, sink),
        ImageType::Gif => gif::decode(bytes, sink),
        ImageType::Jpeg => jpeg::decode(bytes, options, sink),
        ImageType::Pcx => pcx::decode(bytes, sink),
        ImageType::Png => png::decode(bytes, sink),
        ImageType::Tiff => tiff::decode(bytes, sink),
        ImageType::Webp => webp::decode(bytes, sink),
    }
}

/// Runs `work` so that a panic in a decoder is an error of this one image.
fn guarded<T>(kind: ImageType, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let detail = panic
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "panic without a message".to_owned());
        Err(ImageError::Decoder {
            format: format_name(kind),
            detail,
        })
    })
}

/// Other ways to the pixels, for tests that compare.
#[doc(hidden)]
pub mod testing {
    use super::{Collect, ImageError, ImageType, Options, Prepared, decode, guarded, prepare_by};

    /// [`super::prepare`] by way of the whole image.
    ///
    /// # Errors
    ///
    /// As [`super::prepare`].
    pub fn prepare_whole(
        bytes: &[u8],
        kind: ImageType,
        options: &Options,
        out: &mut [u8],
    ) -> Result<Prepared, ImageError> {
        prepare_by(bytes, kind, options, out, false)
    }

    /// What differs between the decoder here and libjpeg alone.
    #[cfg(all(fuzzing, target_arch = "x86_64"))]
    pub fn jpeg_disagreement(bytes: &[u8], is_whole: bool) -> Option<String> {
        super::jpeg::compare::disagreement(bytes, is_whole)
    }

    /// Width, height and interleaved samples in the image's own mode.
    ///
    /// # Errors
    ///
    /// As [`super::prepare`].
    pub fn decode_whole(bytes: &[u8], kind: ImageType) -> Result<(u32, u32, Vec<u8>), ImageError> {
        guarded(kind, || {
            let mut collect = Collect::default();
            decode(bytes, kind, &Options::default(), &mut collect)?;
            let raster = collect.into_raster().ok_or(ImageError::Corrupt {
                format: super::format_name(kind),
                detail: "no image in the file".to_owned(),
            })?;
            Ok((raster.spec.width, raster.spec.height, raster.data))
        })
    }
}
