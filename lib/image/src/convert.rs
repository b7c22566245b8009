//! The last step of the reference's transform: from the image's own mode to RGB.
//! Each formula is Pillow's, rounding included.

use crate::raster::Palette;

/// `a * b / 255`, rounded as Pillow does.
fn multiply_255(a: u8, b: u8) -> u8 {
    let product = u32::from(a) * u32::from(b) + 128;
    (((product >> 8) + product) >> 8) as u8
}

/// Multiplies the colours of pixels of `N` bytes by the alpha in their last byte.
pub(crate) fn premultiply<const N: usize>(pixels: &mut [u8]) {
    for pixel in pixels.chunks_exact_mut(N) {
        let alpha = pixel[N - 1];
        for colour in &mut pixel[..N - 1] {
            *colour = multiply_255(*colour, alpha);
        }
    }
}

/// A premultiplied colour back to a plain one.
pub(crate) fn unpremultiply(colour: u8, alpha: u8) -> u8 {
    if alpha == 255 || alpha == 0 {
        colour
    } else {
        (255 * u32::from(colour) / u32::from(alpha)).min(255) as u8
    }
}

/// Naive CMYK to RGB, as `Image.convert` does it without colour profiles.
pub(crate) fn cmyk_to_rgb(cmyk: [u8; 4]) -> [u8; 3] {
    let white = 255 - cmyk[3];
    [0, 1, 2].map(|channel| white.saturating_sub(multiply_255(cmyk[channel], white)))
}

/// JPEG's YCbCr to RGB in Pillow's six-bit fixed point.
pub(crate) fn ycbcr_to_rgb(ycbcr: [u8; 3]) -> [u8; 3] {
    // Truncation towards zero after adding a half is how the tables were made.
    let scaled =
        |factor: f64, chroma: u8| (factor * (f64::from(chroma) - 128.0) * 64.0 + 0.5) as i32;
    let luma = i32::from(ycbcr[0]);
    let (cb, cr) = (ycbcr[1], ycbcr[2]);
    let red = luma + (scaled(1.402, cr) >> 6);
    let green = luma + ((scaled(-0.34414, cb) + scaled(-0.71414, cr)) >> 6);
    let blue = luma + (scaled(1.772, cb) >> 6);
    [red, green, blue].map(|value| value.clamp(0, 255) as u8)
}

/// CIE L*a*b* (D50) to sRGB, as a colour-management module does it with the
/// perceptual intent between matrix profiles.
pub(crate) fn lab_to_rgb(lab: [u8; 3]) -> [u8; 3] {
    let lightness = f64::from(lab[0]) * 100.0 / 255.0;
    let a = f64::from(lab[1]) - 128.0;
    let b = f64::from(lab[2]) - 128.0;
    let fy = (lightness + 16.0) / 116.0;
    let inverse = |t: f64| {
        if t > 6.0 / 29.0 {
            t * t * t
        } else {
            3.0 * (6.0f64 / 29.0).powi(2) * (t - 4.0 / 29.0)
        }
    };
    // D50 white of the profile connection space.
    let x = 0.9642 * inverse(fy + a / 500.0);
    let y = inverse(fy);
    let z = 0.8249 * inverse(fy - b / 200.0);
    // XYZ (D50) to linear sRGB, Bradford-adapted.
    let linear = [
        3.133_856_1 * x - 1.616_866_7 * y - 0.490_614_6 * z,
        -0.978_768_4 * x + 1.916_141_5 * y + 0.033_454_0 * z,
        0.071_945_3 * x - 0.228_991_4 * y + 1.405_242_7 * z,
    ];
    linear.map(|value| {
        let value = value.clamp(0.0, 1.0);
        let encoded = if value <= 0.003_130_8 {
            12.92 * value
        } else {
            1.055 * value.powf(1.0 / 2.4) - 0.055
        };
        (encoded * 255.0 + 0.5) as u8
    })
}

/// A colour of the palette.
pub(crate) fn palette_to_rgb(index: u8, palette: Option<&Palette>) -> [u8; 3] {
    palette.map_or([0; 3], |palette| palette[usize::from(index)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cmyk_follows_the_reference() {
        assert_eq!(cmyk_to_rgb([0, 0, 0, 0]), [255, 255, 255]);
        assert_eq!(cmyk_to_rgb([255, 0, 0, 0]), [0, 255, 255]);
        assert_eq!(cmyk_to_rgb([10, 20, 30, 255]), [0, 0, 0]);
    }

    #[test]
    fn alpha_survives_a_round_trip_at_the_ends() {
        assert_eq!(unpremultiply(17, 255), 17);
        assert_eq!(unpremultiply(17, 0), 17);
        assert_eq!(unpremultiply(200, 100), 255);
    }
}
