//! WebP through libwebp, the library that the reference uses: lossy, lossless,
//! with alpha, and the first frame of an animation on its canvas.

use crate::error::{Blame, ImageError, Result};
use crate::raster::{Mode, Sink, Spec, try_zeroed};
use crate::{Header, Limits, exif, vp8l};
use libwebp_sys as ffi;
use std::mem::MaybeUninit;
use std::ptr;

const WEBP: Blame = Blame("WebP");

/// Of a lossless image so much is made at once, since its decoder has all of it besides.
const BAND_BYTES: usize = 256 * 1024 * 1024;

/// The first frame of a file, as libwebp's demultiplexer finds it.
struct Frame<'a> {
    demuxer: *mut ffi::WebPDemuxer,
    /// Chunks of the frame: its alpha, and its image last.
    data: &'a [u8],
    canvas: (u32, u32),
    place: (usize, usize),
    size: (usize, usize),
    mode: Mode,
}

impl Drop for Frame<'_> {
    fn drop(&mut self) {
        // SAFETY: made by `WebPDemuxInternal` and deleted once.
        unsafe { ffi::WebPDemuxDelete(self.demuxer) }
    }
}

impl<'a> Frame<'a> {
    fn first(bytes: &'a [u8]) -> Result<Self> {
        if !bytes.starts_with(b"RIFF") || bytes.get(8..12) != Some(b"WEBP") {
            return Err(WEBP.corrupt("no signature"));
        }
        let data = ffi::WebPData {
            bytes: bytes.as_ptr(),
            size: bytes.len(),
        };
        let version = ffi::WEBP_DEMUX_ABI_VERSION as _;
        // SAFETY: `data` points into `bytes`, which outlives the demultiplexer.
        let demuxer = unsafe { ffi::WebPDemuxInternal(&data, 0, ptr::null_mut(), version) };
        if demuxer.is_null() {
            return Err(WEBP.corrupt("the container is not valid or cut"));
        }
        let mut frame = Self {
            demuxer,
            data: &[],
            canvas: (0, 0),
            place: (0, 0),
            size: (0, 0),
            mode: Mode::Rgba,
        };
        let mut found = MaybeUninit::zeroed();
        // SAFETY: the demultiplexer is valid; the iterator is written on success and holds
        // nothing of its own. The frame's data lies in `bytes`.
        unsafe {
            use ffi::WebPFormatFeature::{WEBP_FF_CANVAS_HEIGHT, WEBP_FF_CANVAS_WIDTH};
            let feature = |which| ffi::WebPDemuxGetI(demuxer, which);
            frame.canvas = (
                feature(WEBP_FF_CANVAS_WIDTH),
                feature(WEBP_FF_CANVAS_HEIGHT),
            );
            if ffi::WebPDemuxGetFrame(demuxer, 1, found.as_mut_ptr()) == 0 {
                return Err(WEBP.corrupt("there is no frame"));
            }
            let found: ffi::WebPIterator = found.assume_init();
            frame.data = std::slice::from_raw_parts(found.fragment.bytes, found.fragment.size);
            frame.place = (
                found.x_offset.max(0) as usize,
                found.y_offset.max(0) as usize,
            );
            frame.size = (found.width.max(0) as usize, found.height.max(0) as usize);
        }
        let mut features = MaybeUninit::uninit();
        // SAFETY: the features are written where the status says so.
        let has_alpha = unsafe {
            let status = ffi::WebPGetFeatures(bytes.as_ptr(), bytes.len(), features.as_mut_ptr());
            status != ffi::VP8StatusCode::VP8_STATUS_OK || features.assume_init().has_alpha != 0
        };
        if !has_alpha {
            frame.mode = Mode::Rgb;
        }
        Ok(frame)
    }

    fn is_lossless(&self) -> bool {
        self.data.starts_with(b"VP8L")
    }

    /// Rows that are decoded at once.
    fn band(&self) -> usize {
        if self.is_lossless() {
            (BAND_BYTES / self.stride()).clamp(1, self.canvas.1 as usize)
        } else {
            self.canvas.1 as usize
        }
    }

    fn stride(&self) -> usize {
        self.canvas.0 as usize * self.mode.bytes()
    }

    /// Bytes that the decoder itself holds.
    fn memory(&self) -> Result<u64> {
        let pixels = (self.size.0 * self.size.1) as u64;
        if self.is_lossless() {
            return Ok(4 * pixels + vp8l::memory(self.data.get(8..).unwrap_or_default(), None)?);
        }
        let alpha = chunks(self.data).find(|(name, _)| name == b"ALPH");
        Ok(match alpha {
            None => 0,
            // How it is compressed stands in the lowest two bits.
            Some((_, [how, stream @ ..])) if how & 3 == 1 => {
                5 * pixels + vp8l::memory(stream, Some(self.size))?
            }
            Some(_) => pixels,
        })
    }

    /// Decodes `rows` of the frame from row `top` on into `out`, which has the canvas's stride.
    fn decode(&self, top: usize, rows: usize, out: &mut [u8]) -> Result<()> {
        let mut config = MaybeUninit::<ffi::WebPDecoderConfig>::zeroed();
        let version = ffi::WEBP_DECODER_ABI_VERSION as _;
        // SAFETY: the configuration is written, and then describes `out`, to whose end no row of
        // the frame reaches; the data lies in the file.
        let status = unsafe {
            if ffi::WebPInitDecoderConfigInternal(config.as_mut_ptr(), version) == 0 {
                return Err(WEBP.corrupt("the decoder has another version"));
            }
            let mut config = config.assume_init();
            config.options.use_cropping = (rows < self.size.1).into();
            config.options.crop_top = top as i32;
            config.options.crop_width = self.size.0 as i32;
            config.options.crop_height = rows as i32;
            config.output.colorspace = match self.mode {
                Mode::Rgb => ffi::WEBP_CSP_MODE::MODE_RGB,
                _ => ffi::WEBP_CSP_MODE::MODE_RGBA,
            };
            config.output.is_external_memory = 1;
            config.output.u.RGBA = ffi::WebPRGBABuffer {
                rgba: out.as_mut_ptr(),
                stride: self.stride() as i32,
                size: out.len(),
            };
            ffi::WebPDecode(self.data.as_ptr(), self.data.len(), &mut config)
        };
        match status {
            ffi::VP8StatusCode::VP8_STATUS_OK => Ok(()),
            ffi::VP8StatusCode::VP8_STATUS_OUT_OF_MEMORY => Err(ImageError::LimitExceeded {
                what: "bytes of memory",
                needed: (self.size.0 * self.size.1 * 4) as u64,
                limit: 0,
            }),
            _ => Err(WEBP.corrupt("the first frame does not decode")),
        }
    }
}

/// Names and contents of chunks one after another.
fn chunks(bytes: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let head = rest.get(..8)?;
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        let content = &rest[8..];
        let content = &content[..length.min(content.len())];
        // Chunks are padded to an even length.
        rest = rest[8..]
            .get(length.next_multiple_of(2)..)
            .unwrap_or_default();
        Some((&head[..4], content))
    })
}

pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let frame = Frame::first(bytes)?;
    let (width, height) = frame.canvas;
    let pixels = u64::from(width) * u64::from(height);
    // Else what comes before the pixels would be read in vain.
    crate::check("pixels", pixels, Limits::MAX_PIXELS)?;
    let memory = frame.memory();
    #[cfg(fuzzing)]
    if memory.is_err() && pixels < 500_000 {
        let mut out = vec![0; frame.stride() * height as usize];
        let decoded = frame.decode(0, frame.size.1, &mut out);
        assert!(
            decoded.is_err(),
            "refused for what libwebp reads: {memory:?}"
        );
    }
    Ok(Header {
        width,
        height,
        memory: (frame.band() * frame.stride()) as u64 + memory?,
        mode: frame.mode,
    })
}

pub(crate) fn decode(bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
    let frame = Frame::first(bytes)?;
    let (width, height) = frame.canvas;
    sink.start(Spec::new(width, height, frame.mode))?;
    let (stride, height) = (frame.stride(), height as usize);
    let mut pixels = try_zeroed(frame.band() * stride)?;
    for top in (0..height).step_by(frame.band()) {
        let rows = frame.band().min(height - top);
        // The part of the frame in this band.
        let from = frame.place.1.max(top);
        let to = (frame.place.1 + frame.size.1).min(top + rows);
        // What the frame does not cover stays transparent.
        pixels.fill(0);
        if from < to {
            let start = (from - top) * stride + frame.place.0 * frame.mode.bytes();
            frame.decode(from - frame.place.1, to - from, &mut pixels[start..])?;
        }
        for (y, row) in (top as u32..).zip(pixels.chunks_exact(stride).take(rows)) {
            if sink.wants(y) {
                sink.row(y, row);
            }
        }
    }
    Ok(())
}

/// The orientation in the file's EXIF chunk.
pub(crate) fn orientation(bytes: &[u8]) -> u8 {
    let exif = chunks(bytes.get(12..).unwrap_or_default()).find(|(name, _)| name == b"EXIF");
    exif.map_or(1, |(_, content)| exif::orientation(content))
}
