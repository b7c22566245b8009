//! From lines of blocks to rows of the image: the planes of the components, two
//! lines of blocks at a time, and what is made of them for the sink.

use super::machine::Modern;
use super::planes::{Upsampling, ycc_to_rgb};
use crate::raster::{Mode, Reduced, Sink, Spec};
use crate::resample::ROW_PADDING;

/// One component of the image.
pub(super) struct Plane {
    /// Its last two lines of blocks.
    pub(super) samples: Vec<u8>,
    pub(super) stride: usize,
    /// Rows that one line of blocks has.
    pub(super) band: usize,
    /// Samples across a block, as they are written.
    pub(super) size: usize,
    /// First sample that matters, and one past the last.
    columns: (usize, usize),
    width: usize,
    height: usize,
    upsampling: Upsampling,
}

impl Plane {
    fn row(&self, y: usize) -> &[u8] {
        &self.samples[y % (2 * self.band) * self.stride..][..self.stride]
    }

    /// Samples from the first of a block of line `band` on, and the stride.
    #[inline(always)]
    pub(super) fn block(&mut self, band: usize, row: usize, column: usize) -> (&mut [u8], usize) {
        let first_row = band % 2 * self.band + row * self.size;
        let start = first_row * self.stride + column * self.size;
        (&mut self.samples[start..], self.stride)
    }

    /// Whether any column of block `index` of a line matters.
    pub(super) fn needs_block(&self, index: usize) -> bool {
        let start = index * self.size;
        start + self.size > self.columns.0 && start < self.columns.1
    }
}

/// What the frame header says of a component.
pub(super) struct Sampling {
    pub(super) across: usize,
    pub(super) down: usize,
}

/// An image being put together.
pub(super) struct Assembly {
    pub(super) modern: Modern,
    pub(super) planes: Vec<Plane>,
    mode: Mode,
    /// Colours are luma and chroma.
    converts: bool,
    width: usize,
    height: usize,
    /// Rows of the image in a line of blocks.
    band: usize,
    /// Units of the scan in a line.
    units: usize,
    /// A row needs the line of blocks below.
    holds_back: bool,
    /// Rows that went out.
    done: usize,
    columns: (usize, usize),
    sums: Vec<u16>,
    rows: Vec<Vec<u8>>,
}

impl Assembly {
    /// Sizes by libjpeg's own rules for an image of `full` size at `eighths` of its
    /// resolution. Starts the sink. `None` where this is left to libjpeg.
    pub(super) fn start(
        full: (u32, u32),
        eighths: u32,
        mode: Mode,
        converts: bool,
        samplings: &[Sampling],
        sink: &mut dyn Sink,
    ) -> Option<Self> {
        let modern = Modern::detect()?;
        let smallest = eighths as usize;
        let side = |side: u32| (u64::from(side) * u64::from(eighths)).div_ceil(8) as usize;
        let (width, height) = (side(full.0), side(full.1));
        let most_across = samplings.iter().map(|s| s.across).max().unwrap_or(1).max(1);
        let most_down = samplings.iter().map(|s| s.down).max().unwrap_or(1).max(1);
        let units = (full.0 as usize).div_ceil(most_across * 8);
        let mut planes = Vec::with_capacity(samplings.len());
        for &Sampling { across, down } in samplings {
            if across == 0 || down == 0 {
                return None;
            }
            // Subsampled components are decoded at up to twice the scale, again and
            // again, as long as that does not make them larger than the image.
            let mut size = smallest;
            while size < 8
                && (most_across * smallest).is_multiple_of(across * size * 2)
                && (most_down * smallest).is_multiple_of(down * size * 2)
            {
                size *= 2;
            }
            if size > 8 {
                // There is code for blocks up to eight; upsampling does the rest.
                size = smallest;
            }
            let (reach, depth) = (most_across * smallest, most_down * smallest);
            if !reach.is_multiple_of(across * size) || !depth.is_multiple_of(down * size) {
                return None;
            }
            let part = |side: u32, factor: usize, most: usize| {
                (side as usize * factor * size).div_ceil(most * 8)
            };
            let plane_width = part(full.0, across, most_across);
            // More than the blocks take: reduced blocks write past their end, and the
            // readers may look a little further.
            let stride = units * across * size + 64;
            let band = down * size;
            planes.push(Plane {
                samples: vec![0; stride * band * 2],
                stride,
                band,
                size,
                columns: (0, usize::MAX),
                width: plane_width,
                height: part(full.1, down, most_down),
                upsampling: Upsampling::choose(
                    reach / (across * size),
                    depth / (down * size),
                    plane_width,
                    smallest > 1,
                ),
            });
        }
        let mut spec = Spec::new(width as u32, height as u32, mode);
        spec.reduced = (eighths != 8).then_some(Reduced {
            width: full.0,
            height: full.1,
            eighths,
        });
        sink.start(spec).ok()?;
        let columns = sink.columns();
        for plane in &mut planes {
            // Filters look one sample further.
            let (across, _) = plane.upsampling.factors();
            plane.columns = (
                (columns.0 / across).saturating_sub(2),
                columns.1 / across + 3,
            );
        }
        let widest = planes.iter().map(|plane| plane.stride).max().unwrap_or(0);
        Some(Self {
            modern,
            holds_back: planes.iter().any(|plane| plane.upsampling.needs_context()),
            sums: vec![0; widest],
            // Upsampling writes whole pairs, and the resize reads past the end.
            rows: vec![vec![0; width + ROW_PADDING]; planes.len()],
            planes,
            mode,
            converts,
            width,
            height,
            band: most_down * smallest,
            units,
            done: 0,
            columns,
        })
    }

    /// Lines of blocks in the image.
    pub(super) fn bands(&self) -> usize {
        self.height.div_ceil(self.band)
    }

    /// Units of an interleaved scan in a line.
    pub(super) fn units_across(&self) -> usize {
        self.units
    }

    /// Whether any row matters that line `band` of blocks, or its neighbours, reach.
    pub(super) fn needs(&self, band: usize, sink: &dyn Sink) -> bool {
        let first = (band * self.band).saturating_sub(2);
        let end = ((band + 1) * self.band + 2).min(self.height);
        (first..end).any(|y| sink.wants(y as u32))
    }

    /// Hands on the rows that are complete once line `band` of blocks is there.
    pub(super) fn emit(&mut self, band: usize, sink: &mut dyn Sink) {
        let ready = if band + 1 == self.bands() {
            self.height
        } else {
            (band + 1) * self.band - usize::from(self.holds_back)
        };
        debug_assert!(self.columns.1 <= self.width);
        for y in self.done..ready {
            if sink.wants(y as u32) {
                self.emit_row(y, sink);
            }
        }
        self.done = ready;
    }

    fn emit_row(&mut self, y: usize, sink: &mut dyn Sink) {
        for (plane, out) in self.planes.iter().zip(&mut self.rows) {
            let (near, far) = plane.upsampling.sources(y, plane.height);
            let (near, far) = (plane.row(near), plane.row(far));
            let (width, sums) = (plane.width, &mut self.sums);
            // SAFETY: a `Modern` processor has AVX2.
            unsafe {
                plane
                    .upsampling
                    .row(near, far, y, width, self.columns, sums, out);
            }
        }
        let range = self.columns.0..self.columns.1;
        if self.converts
            && let [luma, cb, cr, ..] = &mut self.rows[..]
        {
            // SAFETY: a `Modern` processor has AVX2.
            unsafe {
                ycc_to_rgb(
                    &mut luma[range.clone()],
                    &mut cb[range.clone()],
                    &mut cr[range.clone()],
                );
            }
        }
        if self.mode == Mode::Cmyk {
            // The reference takes CMYK to be stored inverted, as Adobe does. YCCK
            // became CMY by an inversion of its own after its conversion, so only
            // black is left to invert.
            let plain = if self.converts { 3 } else { 0 };
            for row in &mut self.rows[plain..] {
                for sample in &mut row[range.clone()] {
                    *sample = 255 - *sample;
                }
            }
        }
        let slices: [&[u8]; 4] =
            std::array::from_fn(|index| self.rows.get(index).map_or(&[][..], |row| &row[..]));
        sink.row_planar(y as u32, &slices[..self.rows.len()]);
    }
}
