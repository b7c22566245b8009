//! JPEG through libjpeg-turbo (as `mozjpeg-sys` builds it with the C compiler
//! alone), with the accurate integer DCT and fancy upsampling: the reference's
//! own decoder and settings, so its pixels bit for bit. It reads the header; where
//! nothing is out of order, the scans are read here and give the same, only faster.

#[cfg(target_arch = "x86_64")]
mod assemble;
#[cfg(target_arch = "x86_64")]
mod baseline;
mod codestream;
#[cfg(all(any(test, fuzzing), target_arch = "x86_64"))]
pub(crate) mod compare;
#[cfg(target_arch = "x86_64")]
mod entropy;
#[cfg(target_arch = "x86_64")]
mod idct;
mod libjpeg;
#[cfg(target_arch = "x86_64")]
mod machine;
#[cfg(target_arch = "x86_64")]
mod planes;
#[cfg(target_arch = "x86_64")]
mod progressive;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

use crate::error::Result;
use crate::raster::Sink;
use crate::{DecodeMode, FAST_OVERSAMPLING, Header, Options, exif};
pub(crate) use libjpeg::{Space, decode_tile};

/// Bytes of EXIF in which the orientation is looked for; it is near the beginning.
const MAX_EXIF_BYTES: usize = 1024 * 1024;

/// Eighths of the full resolution: all of it.
const FULL_SCALE: u32 = 8;

pub(crate) fn header(bytes: &[u8]) -> Result<Header> {
    let frame = codestream::scan(bytes)?;
    Ok(Header {
        width: frame.width,
        height: frame.height,
        memory: frame.memory,
        mode: frame.mode,
    })
}

pub(crate) fn decode(bytes: &[u8], options: &Options, sink: &mut dyn Sink) -> Result<()> {
    let frame = codestream::scan(bytes)?;
    let eighths = match options.decode {
        DecodeMode::Exact => FULL_SCALE,
        DecodeMode::Fast => fast_scale(frame.width, frame.height, options.size),
    };
    libjpeg::decode(bytes, &frame, eighths, sink)
}

/// The smallest scale, in eighths, that leaves the shorter side long enough.
fn fast_scale(width: u32, height: u32, size: u32) -> u32 {
    let shorter = width.min(height);
    let wanted = size * FAST_OVERSAMPLING;
    (1..FULL_SCALE)
        .find(|eighths| (shorter * eighths).div_ceil(FULL_SCALE) >= wanted)
        .unwrap_or(FULL_SCALE)
}

/// The orientation in the file's EXIF segment.
pub(crate) fn orientation(bytes: &[u8]) -> u8 {
    let segments = codestream::scan(bytes).map_or_else(|_| Vec::new(), |frame| frame.exif);
    let mut joined = Vec::new();
    for segment in segments {
        if joined.len() < MAX_EXIF_BYTES {
            joined.extend_from_slice(&bytes[segment]);
        }
    }
    exif::orientation(&joined)
}

#[cfg(test)]
mod scale_tests {
    use super::*;

    #[test]
    fn fast_scale_keeps_three_times_the_crop() {
        assert_eq!(fast_scale(4000, 3000, 224), 2);
        assert_eq!(fast_scale(1000, 671, 224), 8);
        assert_eq!(fast_scale(1789, 1342, 224), 5);
        assert_eq!(fast_scale(6000, 5376, 224), 1);
    }
}
