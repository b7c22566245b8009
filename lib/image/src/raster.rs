//! Pixels in an image's own mode, and the way in which decoders hand them on.

use crate::error::{ImageError, Result};

/// How a pixel is stored: Pillow's modes, because the reference resizes in the
/// image's own mode and the arithmetic depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// One bit, stored as a byte that is 0 or 255 (Pillow `1`).
    Bit,
    /// Eight-bit grey (`L`).
    Grey,
    /// Index into a palette (`P`).
    Palette,
    /// Index and alpha (`PA`).
    PaletteAlpha,
    /// Grey and alpha (`LA`).
    GreyAlpha,
    /// Red, green, blue (`RGB`).
    Rgb,
    /// Red, green, blue, alpha (`RGBA`).
    Rgba,
    /// Cyan, magenta, yellow, black (`CMYK`).
    Cmyk,
    /// Luma and two chroma (`YCbCr`).
    YCbCr,
    /// CIE L*a*b* in bytes, a and b offset by 128 (`LAB`).
    Lab,
    /// Sixteen-bit grey, little-endian (`I;16`).
    Grey16,
    /// Sixteen-bit grey stored big-endian, which the reference resizes as if it
    /// were little-endian (`I;16B`).
    Grey16Big,
    /// Thirty-two-bit signed grey, little-endian (`I`).
    Int32,
    /// Thirty-two-bit float grey, little-endian (`F`).
    Float32,
}

impl Mode {
    /// Bytes of one pixel.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::Bit | Self::Grey | Self::Palette => 1,
            Self::PaletteAlpha | Self::GreyAlpha | Self::Grey16 | Self::Grey16Big => 2,
            Self::Rgb | Self::YCbCr | Self::Lab => 3,
            Self::Rgba | Self::Cmyk | Self::Int32 | Self::Float32 => 4,
        }
    }

    /// Whether the reference picks the nearest pixel instead of interpolating.
    pub(crate) fn is_nearest(self) -> bool {
        matches!(self, Self::Bit | Self::Palette)
    }
}

/// 256 colours; entries that the file does not give are black.
pub(crate) type Palette = [[u8; 3]; 256];

/// A palette from packed RGB triples; what is beyond the data stays black.
pub(crate) fn palette_from_rgb(packed: &[u8]) -> Box<Palette> {
    let mut palette = Box::new([[0; 3]; 256]);
    for (entry, rgb) in palette.iter_mut().zip(packed.chunks_exact(3)) {
        entry.copy_from_slice(rgb);
    }
    palette
}

/// What a decoder is about to deliver.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) mode: Mode,
    pub(crate) palette: Option<Box<Palette>>,
    /// Where the image was decoded at a lower resolution.
    pub(crate) reduced: Option<Reduced>,
}

/// A reduced resolution: the image's own size, and how many eighths of it the
/// decoder made. The last column and row may be only partly covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reduced {
    pub(crate) width: u32,
    pub(crate) height: u32,
    pub(crate) eighths: u32,
}

impl Spec {
    /// An image at its own resolution, without a palette.
    pub(crate) fn new(width: u32, height: u32, mode: Mode) -> Self {
        Self {
            width,
            height,
            mode,
            palette: None,
            reduced: None,
        }
    }

    /// With a palette, if there is one.
    pub(crate) fn with_palette(mut self, palette: Option<Box<Palette>>) -> Self {
        self.palette = palette;
        self
    }

    /// Size of the image before any reduction.
    pub(crate) fn full_size(&self) -> (u32, u32) {
        self.reduced.map_or((self.width, self.height), |reduced| {
            (reduced.width, reduced.height)
        })
    }

    /// Width and height of what the decoded samples cover, in their own units.
    pub(crate) fn covered(&self) -> (f64, f64) {
        let (width, height) = self.full_size();
        let eighths = self.reduced.map_or(8, |reduced| reduced.eighths);
        let part = |side: u32| f64::from(side) * f64::from(eighths) / 8.0;
        (part(width), part(height))
    }
}

/// Receives an image row by row, in any order, each row whole and once.
pub(crate) trait Sink {
    /// Called once, before the first row.
    fn start(&mut self, spec: Spec) -> Result<()>;

    /// Whether row `y` matters; a decoder may skip the work for one that does not.
    fn wants(&self, y: u32) -> bool;

    /// Row `y`, `width × mode.bytes()` long.
    fn row(&mut self, y: u32, pixels: &[u8]);

    /// First column that matters, and one past the last; known after the start.
    fn columns(&self) -> (usize, usize);

    /// Row `y` as one plane for each byte of a pixel. Of each plane only the
    /// columns that matter need be right, and after the last column there are
    /// `ROW_PADDING` bytes of anything.
    fn row_planar(&mut self, y: u32, planes: &[&[u8]]);
}

/// A whole image in memory, for what cannot be streamed: interlacing, tiles,
/// orientation.
#[derive(Debug)]
pub(crate) struct Raster {
    pub(crate) spec: Spec,
    pub(crate) data: Vec<u8>,
}

impl Raster {
    /// A raster of zeros. The size was checked against the limits by the caller;
    /// an allocation that the system refuses is still an error, not an abort.
    pub(crate) fn zeroed(spec: Spec) -> Result<Self> {
        let bytes = spec.width as usize * spec.height as usize * spec.mode.bytes();
        Ok(Self {
            data: try_zeroed(bytes)?,
            spec,
        })
    }

    pub(crate) fn stride(&self) -> usize {
        self.spec.width as usize * self.spec.mode.bytes()
    }

    pub(crate) fn row_mut(&mut self, y: u32) -> &mut [u8] {
        let stride = self.stride();
        &mut self.data[y as usize * stride..][..stride]
    }

    /// Hands all rows to `sink`, which is started here.
    pub(crate) fn feed(&self, sink: &mut dyn Sink) -> Result<()> {
        sink.start(self.spec.clone())?;
        let stride = self.stride();
        for y in 0..self.spec.height {
            if sink.wants(y) {
                sink.row(y, &self.data[y as usize * stride..][..stride]);
            }
        }
        Ok(())
    }

    /// The image turned and mirrored as EXIF orientation `orientation` (2 to 8) asks.
    pub(crate) fn oriented(&self, orientation: u8) -> Result<Self> {
        let (width, height) = (self.spec.width as usize, self.spec.height as usize);
        let swaps = (5..=8).contains(&orientation);
        let mut spec = self.spec.clone();
        if swaps {
            (spec.width, spec.height) = (spec.height, spec.width);
        }
        let pixel = self.spec.mode.bytes();
        let mut turned = Self::zeroed(spec)?;
        let turned_width = turned.spec.width as usize;
        for (row_index, row) in turned
            .data
            .chunks_exact_mut(turned_width * pixel)
            .enumerate()
        {
            for (column, target) in row.chunks_exact_mut(pixel).enumerate() {
                let (x, y) = match orientation {
                    2 => (width - 1 - column, row_index),
                    3 => (width - 1 - column, height - 1 - row_index),
                    4 => (column, height - 1 - row_index),
                    5 => (row_index, column),
                    6 => (row_index, height - 1 - column),
                    7 => (width - 1 - row_index, height - 1 - column),
                    8 => (width - 1 - row_index, column),
                    _ => (column, row_index),
                };
                target.copy_from_slice(&self.data[(y * width + x) * pixel..][..pixel]);
            }
        }
        Ok(turned)
    }
}

/// Zeroed memory, or an error where the system has none left.
pub(crate) fn try_zeroed(bytes: usize) -> Result<Vec<u8>> {
    let mut data = Vec::new();
    data.try_reserve_exact(bytes)
        .map_err(|_| ImageError::LimitExceeded {
            what: "bytes of memory",
            needed: bytes as u64,
            limit: 0,
        })?;
    data.resize(bytes, 0);
    Ok(data)
}

/// Collects the rows of a decoder into a [`Raster`].
#[derive(Default)]
pub(crate) struct Collect {
    raster: Option<Raster>,
}

impl Collect {
    /// The raster; `None` where the decoder never started.
    pub(crate) fn into_raster(self) -> Option<Raster> {
        self.raster
    }
}

impl Sink for Collect {
    fn start(&mut self, spec: Spec) -> Result<()> {
        self.raster = Some(Raster::zeroed(spec)?);
        Ok(())
    }

    fn wants(&self, _y: u32) -> bool {
        true
    }

    fn row(&mut self, y: u32, pixels: &[u8]) {
        if let Some(raster) = &mut self.raster {
            raster.row_mut(y).copy_from_slice(pixels);
        }
    }

    fn columns(&self) -> (usize, usize) {
        let width = self.raster.as_ref().map_or(0, |raster| raster.spec.width);
        (0, width as usize)
    }

    fn row_planar(&mut self, y: u32, planes: &[&[u8]]) {
        if let Some(raster) = &mut self.raster {
            for (x, pixel) in raster.row_mut(y).chunks_exact_mut(planes.len()).enumerate() {
                for (sample, plane) in pixel.iter_mut().zip(planes) {
                    *sample = plane[x];
                }
            }
        }
    }
}
