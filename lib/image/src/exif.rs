//! The orientation that a camera recorded.

/// Tag of the orientation in the first directory.
const ORIENTATION: u16 = 0x0112;

/// The orientation in an EXIF block, with or without its `Exif\0\0` prefix; 1,
/// upright, where there is none that makes sense.
pub(crate) fn orientation(exif: &[u8]) -> u8 {
    let mut tiff = exif;
    for _ in 0..2 {
        tiff = tiff.strip_prefix(b"Exif\0\0").unwrap_or(tiff);
    }
    find(tiff).unwrap_or(1)
}

fn find(tiff: &[u8]) -> Option<u8> {
    let big = match tiff.get(..2)? {
        b"MM" => true,
        b"II" => false,
        _ => return None,
    };
    let short = |at: usize| {
        let bytes: [u8; 2] = tiff.get(at..at + 2)?.try_into().ok()?;
        Some(if big {
            u16::from_be_bytes(bytes)
        } else {
            u16::from_le_bytes(bytes)
        })
    };
    let long = |at: usize| {
        let bytes: [u8; 4] = tiff.get(at..at + 4)?.try_into().ok()?;
        Some(if big {
            u32::from_be_bytes(bytes)
        } else {
            u32::from_le_bytes(bytes)
        })
    };
    let directory = long(4)? as usize;
    let entries = usize::from(short(directory)?);
    for entry in 0..entries {
        let at = directory + 2 + entry * 12;
        if short(at)? != ORIENTATION {
            continue;
        }
        let value = match short(at + 2)? {
            1 => u32::from(*tiff.get(at + 8)?),
            3 => u32::from(short(at + 8)?),
            4 => long(at + 8)?,
            _ => return None,
        };
        return u8::try_from(value)
            .ok()
            .filter(|value| (1..=8).contains(value));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_byte_orders_and_survives_nonsense() {
        let little = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let big = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0\0\0\0\0";
        assert_eq!(orientation(little), 6);
        assert_eq!(orientation(big), 8);
        assert_eq!(orientation(b"Exif\0\0II*\0\xff\xff\xff\xff"), 1);
        assert_eq!(orientation(b""), 1);
    }
}
