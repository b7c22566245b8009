//! WebP through libwebp, the library that the reference uses: lossy, lossless,
//! with alpha, and the first frame of an animation on its canvas.

use crate::error::{Blame, Result};
use crate::raster::{Mode, Sink, Spec};
use crate::{Header, exif};
use libwebp_sys as ffi;
use std::mem::MaybeUninit;
use std::ptr;

const WEBP: Blame = Blame("WebP");

fn features(bytes: &[u8]) -> Option<ffi::WebPBitstreamFeatures> {
    let mut features = MaybeUninit::uninit();
    // SAFETY: the pointer and length are those of a slice; the features are
    // written where the status says so.
    unsafe {
        let status = ffi::WebPGetFeatures(bytes.as_ptr(), bytes.len(), features.as_mut_ptr());
        (status == ffi::VP8StatusCode::VP8_STATUS_OK).then(|| features.assume_init())
    }
}

/// The size of the canvas, as the first chunk declares it.
fn canvas(bytes: &[u8]) -> Option<(u32, u32)> {
    let short = |at: usize| {
        Some(u32::from(u16::from_le_bytes([
            *bytes.get(at)?,
            *bytes.get(at + 1)?,
        ])))
    };
    match bytes.get(12..16)? {
        b"VP8 " if bytes.get(23..26)? == [0x9d, 0x01, 0x2a] => {
            Some((short(26)? & 0x3fff, short(28)? & 0x3fff))
        }
        b"VP8X" => {
            let wide = |at: usize| Some(short(at)? + (u32::from(*bytes.get(at + 2)?) << 16) + 1);
            Some((wide(24)?, wide(27)?))
        }
        b"VP8L" if *bytes.get(20)? == 0x2f => {
            let bits = short(21)? | short(23)? << 16;
            Some(((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1))
        }
        _ => None,
    }
}

pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    if !bytes.starts_with(b"RIFF") || bytes.get(8..12) != Some(b"WEBP") {
        return Err(WEBP.corrupt("no signature"));
    }
    let Some((width, height)) = canvas(bytes) else {
        return Err(WEBP.corrupt("the first chunk gives no size"));
    };
    let pixels = u64::from(width) * u64::from(height);
    let has_alpha = features(bytes).is_none_or(|features| features.has_alpha != 0);
    Ok(Header {
        width,
        height,
        // Two canvases of four bytes, and the decoder's own: four bytes a pixel
        // for lossless, one and a half of planes for lossy.
        memory: pixels * 12 + bytes.len() as u64,
        mode: if has_alpha { Mode::Rgba } else { Mode::Rgb },
    })
}

/// Owns the C decoder.
struct Animation(*mut ffi::WebPAnimDecoder);

impl Drop for Animation {
    fn drop(&mut self) {
        // SAFETY: made by `WebPAnimDecoderNew` and deleted once.
        unsafe { ffi::WebPAnimDecoderDelete(self.0) }
    }
}

pub(crate) fn decode(bytes: &[u8], sink: &mut dyn Sink) -> Result<()> {
    let has_alpha = features(bytes).is_none_or(|features| features.has_alpha != 0);
    let data = ffi::WebPData {
        bytes: bytes.as_ptr(),
        size: bytes.len(),
    };
    // SAFETY: `data` points into `bytes`, which outlives the decoder.
    let decoder = unsafe { ffi::WebPAnimDecoderNew(&data, ptr::null()) };
    if decoder.is_null() {
        return Err(WEBP.corrupt("the container is not valid or cut"));
    }
    let decoder = Animation(decoder);
    let mut info = MaybeUninit::uninit();
    // SAFETY: the decoder is valid; the information is written on success.
    let info = unsafe {
        if ffi::WebPAnimDecoderGetInfo(decoder.0, info.as_mut_ptr()) == 0 {
            return Err(WEBP.corrupt("the container gives no information"));
        }
        info.assume_init()
    };
    let mut canvas: *mut u8 = ptr::null_mut();
    let mut timestamp = 0;
    // SAFETY: the decoder is valid and writes where the canvas is, which it owns.
    if unsafe { ffi::WebPAnimDecoderGetNext(decoder.0, &mut canvas, &mut timestamp) } == 0
        || canvas.is_null()
    {
        return Err(WEBP.corrupt("the first frame does not decode"));
    }
    let (width, height) = (info.canvas_width as usize, info.canvas_height as usize);
    // SAFETY: the canvas has four bytes for each pixel and lives as long as the
    // decoder, which is dropped at the end of this function.
    let pixels = unsafe { std::slice::from_raw_parts(canvas, width * height * 4) };
    let mode = if has_alpha { Mode::Rgba } else { Mode::Rgb };
    sink.start(Spec::new(info.canvas_width, info.canvas_height, mode))?;
    let mut opaque = vec![0u8; if has_alpha { 0 } else { width * 3 }];
    for (y, row) in (0u32..).zip(pixels.chunks_exact(width * 4)) {
        if !sink.wants(y) {
            continue;
        }
        if has_alpha {
            sink.row(y, row);
            continue;
        }
        for (target, pixel) in opaque.chunks_exact_mut(3).zip(row.chunks_exact(4)) {
            target.copy_from_slice(&pixel[..3]);
        }
        sink.row(y, &opaque);
    }
    Ok(())
}

/// The orientation in the file's EXIF chunk.
pub(crate) fn orientation(bytes: &[u8]) -> u8 {
    let mut at = 12;
    while let Some(head) = bytes.get(at..at + 8) {
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if &head[..4] == b"EXIF" {
            let end = at.saturating_add(8).saturating_add(length).min(bytes.len());
            return exif::orientation(&bytes[at + 8..end]);
        }
        // Chunks are padded to an even length.
        at = at
            .saturating_add(8)
            .saturating_add(length)
            .saturating_add(length % 2);
    }
    1
}
