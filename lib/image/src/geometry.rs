//! Sizes and positions: what the reference's `Resize` and `CenterCrop` decide
//! before any pixel is touched.

/// Where the crop lies in the resized image, and how large that image would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plan {
    /// Width and height of the whole resized image, most of which is never made.
    pub(crate) resized: (u32, u32),
    /// Left and top of the crop within it.
    pub(crate) origin: (u32, u32),
    /// Side of the square crop.
    pub(crate) size: u32,
}

impl Plan {
    /// The plan for an image of `width × height`, neither of which is zero.
    pub(crate) fn new(width: u32, height: u32, size: u32) -> Self {
        let (short, long) = (width.min(height), width.max(height));
        // torchvision truncates `size * long / short`, a division of doubles;
        // the product is exact there, so the truncated quotient is the integer one
        // except where the rounding of the double reaches the next integer.
        let resized_long = (f64::from(size) * f64::from(long) / f64::from(short)) as u32;
        let resized = if width <= height {
            (size, resized_long)
        } else {
            (resized_long, size)
        };
        Self {
            resized,
            origin: (centred(resized.0, size), centred(resized.1, size)),
            size,
        }
    }
}

/// `int(round((length - size) / 2.0))` with Python's rounding of halves to even.
fn centred(length: u32, size: u32) -> u32 {
    let doubled = length - size;
    let half = doubled / 2;
    if doubled % 2 == 1 && half % 2 == 1 {
        half + 1
    } else {
        half
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shorter_side_becomes_size_and_longer_is_truncated() {
        assert_eq!(Plan::new(640, 480, 224).resized, (298, 224));
        assert_eq!(Plan::new(480, 640, 224).resized, (224, 298));
        assert_eq!(Plan::new(1, 8000, 224).resized, (224, 1_792_000));
        assert_eq!(Plan::new(224, 224, 224).resized, (224, 224));
    }

    #[test]
    fn halves_round_to_even_as_in_python() {
        // (225 - 224) / 2 = 0.5 → 0, 1.5 → 2, 2.5 → 2
        assert_eq!(centred(225, 224), 0);
        assert_eq!(centred(227, 224), 2);
        assert_eq!(centred(229, 224), 2);
        assert_eq!(centred(228, 224), 2);
    }
}
