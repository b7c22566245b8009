//! The seven supported image types, and how one is recognised: by content
//! first, then by declared MIME type, then by the name's extension.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How many first bytes of a file [`ImageType::detect`] looks at.
pub const DETECTION_BYTES: usize = 16;

/// A supported image type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[allow(missing_docs)] // Their MIME types say it.
pub enum ImageType {
    #[serde(rename = "image/bmp")]
    Bmp,
    #[serde(rename = "image/gif")]
    Gif,
    #[serde(rename = "image/jpeg")]
    Jpeg,
    #[serde(rename = "image/png")]
    Png,
    #[serde(rename = "image/tiff")]
    Tiff,
    #[serde(rename = "image/webp")]
    Webp,
    #[serde(rename = "image/x-pcx")]
    Pcx,
}

impl ImageType {
    /// All types, in the order of the product page.
    pub const ALL: [ImageType; 7] = [
        ImageType::Bmp,
        ImageType::Gif,
        ImageType::Jpeg,
        ImageType::Png,
        ImageType::Tiff,
        ImageType::Webp,
        ImageType::Pcx,
    ];

    /// The MIME type, as events carry it.
    pub const fn mime(self) -> &'static str {
        match self {
            ImageType::Bmp => "image/bmp",
            ImageType::Gif => "image/gif",
            ImageType::Jpeg => "image/jpeg",
            ImageType::Png => "image/png",
            ImageType::Tiff => "image/tiff",
            ImageType::Webp => "image/webp",
            ImageType::Pcx => "image/x-pcx",
        }
    }

    /// Recognises a MIME type or one of its common aliases, in any case and
    /// with or without parameters (`image/jpeg; charset=binary`).
    pub fn from_mime(mime: &str) -> Option<Self> {
        let essence = mime.split(';').next()?.trim().to_ascii_lowercase();
        Some(match essence.as_str() {
            "image/bmp" | "image/x-bmp" | "image/x-ms-bmp" | "image/x-windows-bmp" => {
                ImageType::Bmp
            }
            "image/gif" => ImageType::Gif,
            "image/jpeg" | "image/jpg" | "image/pjpeg" | "image/x-jpeg" | "image/x-jpg" => {
                ImageType::Jpeg
            }
            "image/png" | "image/x-png" | "image/apng" => ImageType::Png,
            "image/tiff" | "image/tif" | "image/x-tiff" | "image/x-tif" => ImageType::Tiff,
            "image/webp" | "image/x-webp" => ImageType::Webp,
            "image/x-pcx" | "image/pcx" | "image/x-pc-paintbrush" | "image/vnd.zbrush.pcx" => {
                ImageType::Pcx
            }
            _ => return None,
        })
    }

    /// Recognises a file name or key by its extension, in any case.
    pub fn from_name(name: &str) -> Option<Self> {
        let file_name = name.rsplit('/').next()?;
        let (_, extension) = file_name.rsplit_once('.')?;
        Some(match extension.to_ascii_lowercase().as_str() {
            "bmp" | "dib" => ImageType::Bmp,
            "gif" => ImageType::Gif,
            "jpg" | "jpeg" | "jpe" | "jfif" | "pjpeg" | "pjp" => ImageType::Jpeg,
            "png" | "apng" => ImageType::Png,
            "tif" | "tiff" => ImageType::Tiff,
            "webp" => ImageType::Webp,
            "pcx" => ImageType::Pcx,
            _ => return None,
        })
    }

    /// Recognises a file by its first bytes ([`DETECTION_BYTES`] suffice).
    ///
    /// The signatures are those that Pillow's openers accept, so that a file
    /// which Pillow would open as one of the seven types is that type here.
    pub fn detect(content: &[u8]) -> Option<Self> {
        if content.starts_with(b"\xff\xd8\xff") {
            return Some(ImageType::Jpeg);
        }
        if content.starts_with(b"\x89PNG\r\n\x1a\n") {
            return Some(ImageType::Png);
        }
        if content.starts_with(b"GIF87a") || content.starts_with(b"GIF89a") {
            return Some(ImageType::Gif);
        }
        if content.starts_with(b"RIFF") && content.get(8..12) == Some(b"WEBP") {
            return Some(ImageType::Webp);
        }
        // Classic and big TIFF in both byte orders, and the two mixed forms
        // that some writers produce.
        const TIFF: [&[u8]; 6] = [
            b"II\x2a\x00",
            b"MM\x00\x2a",
            b"II\x00\x2a",
            b"MM\x2a\x00",
            b"II\x2b\x00",
            b"MM\x00\x2b",
        ];
        if TIFF.iter().any(|magic| content.starts_with(magic)) {
            return Some(ImageType::Tiff);
        }
        if content.starts_with(b"BM") {
            return Some(ImageType::Bmp);
        }
        // PCX has one magic byte; version, encoding and bits per plane make
        // the test safe enough against other files that begin with a newline.
        if let [0x0a, version, encoding, bits, ..] = content
            && matches!(version, 0 | 2 | 3 | 4 | 5)
            && matches!(encoding, 0 | 1)
            && matches!(bits, 1 | 2 | 4 | 8)
        {
            return Some(ImageType::Pcx);
        }
        None
    }
}

impl fmt::Display for ImageType {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.mime())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_is_known_by_its_mime_type_and_by_name_in_any_case() {
        for kind in ImageType::ALL {
            assert_eq!(ImageType::from_mime(kind.mime()), Some(kind));
            assert_eq!(
                ImageType::from_mime(&kind.mime().to_uppercase()),
                Some(kind)
            );
            assert_eq!(
                serde_json::to_string(&kind).unwrap(),
                format!("{:?}", kind.mime())
            );
        }
        for (name, kind) in [
            ("a/b.PNG", ImageType::Png),
            ("photo.webp", ImageType::Webp),
            ("x.y.JpG", ImageType::Jpeg),
            ("scan.tif", ImageType::Tiff),
        ] {
            assert_eq!(ImageType::from_name(name), Some(kind), "{name}");
        }
        for name in ["jpg", "a.jpg/", "a.png/readme", "a.txt", ""] {
            assert_eq!(ImageType::from_name(name), None, "{name}");
        }
    }

    #[test]
    fn common_aliases_map_to_the_seven() {
        for (alias, kind) in [
            ("image/jpg", ImageType::Jpeg),
            ("image/pjpeg", ImageType::Jpeg),
            ("image/x-ms-bmp", ImageType::Bmp),
            ("image/tif", ImageType::Tiff),
            ("image/pcx", ImageType::Pcx),
            ("Image/JPEG; charset=binary", ImageType::Jpeg),
        ] {
            assert_eq!(ImageType::from_mime(alias), Some(kind), "{alias}");
        }
        assert_eq!(ImageType::from_mime("image/svg+xml"), None);
    }

    #[test]
    fn content_tells_the_type() {
        let cases: [(&[u8], Option<ImageType>); 11] = [
            (b"\xff\xd8\xff\xe0\x00\x10JFIF", Some(ImageType::Jpeg)),
            (b"\x89PNG\r\n\x1a\n\x00\x00", Some(ImageType::Png)),
            (b"GIF89a\x01\x00", Some(ImageType::Gif)),
            (b"RIFF\x10\x00\x00\x00WEBPVP8 ", Some(ImageType::Webp)),
            (b"RIFF\x10\x00\x00\x00WAVEfmt ", None),
            (b"MM\x00\x2a\x00\x00", Some(ImageType::Tiff)),
            (b"BM\x36\x00", Some(ImageType::Bmp)),
            (b"\x0a\x05\x01\x08\x00\x00", Some(ImageType::Pcx)),
            (b"\n\nhello", None),
            (b"This is text", None),
            (b"", None),
        ];
        for (content, expected) in cases {
            assert_eq!(ImageType::detect(content), expected, "{content:?}");
        }
    }
}
