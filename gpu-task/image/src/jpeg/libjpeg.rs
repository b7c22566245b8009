//! The C library: owning its state, its errors, and its rows.

use super::codestream::{Frame, JPEG};
#[cfg(target_arch = "x86_64")]
use super::idct;
use super::planes::{Upsampling, ycc_to_rgb};
use crate::error::{ImageError, Result};
use crate::raster::{Mode, Reduced, Sink, Spec};
use crate::resample::ROW_PADDING;
use mozjpeg_sys as ffi;
use std::ffi::{c_int, c_long};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;

/// Work that a progressive file may ask for, in blocks times scans: a hostile
/// file can have thousands of empty scans over a large frame. A file of the
/// largest allowed size with a hundred scans stays below.
const MAX_SCAN_BLOCKS: u64 = 1_000_000_000;

/// Message of libjpeg's fatal error, carried by the unwinding.
struct Fatal(String);

/// The library's state. The three structures point to each other, so they are
/// boxed together and never moved.
struct State {
    cinfo: ffi::jpeg_decompress_struct,
    error: ffi::jpeg_error_mgr,
    source: ffi::jpeg_source_mgr,
    progress: ffi::jpeg_progress_mgr,
    created: bool,
}

struct Decompress(Box<MaybeUninit<State>>);

unsafe extern "C-unwind" fn on_fatal(cinfo: &mut ffi::jpeg_common_struct) {
    let mut text = [0u8; 80];
    // SAFETY: `err` is the manager that this module installed; the buffer has the
    // length that the library asks for, and the library writes to it in spite of
    // the binding's shared reference, so it is passed through a mutable pointer.
    unsafe {
        if let Some(format) = (*cinfo.err).format_message {
            let buffer = ptr::from_mut(&mut text);
            format(cinfo, &*buffer);
        }
    }
    let length = text
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(text.len());
    let message = String::from_utf8_lossy(&text[..length]).into_owned();
    // Unwinds through the C frames, which are built for it, without the panic hook.
    resume_unwind(Box::new(Fatal(message)));
}

unsafe extern "C-unwind" fn on_message(_: &mut ffi::jpeg_common_struct) {}

unsafe extern "C-unwind" fn on_level(_: &mut ffi::jpeg_common_struct, _: c_int) {}

unsafe extern "C-unwind" fn on_progress(cinfo: &mut ffi::jpeg_common_struct) {
    // SAFETY: this monitor is only installed in a decompressor, of which the
    // common structure is the first field.
    let cinfo = unsafe { &*ptr::from_mut(cinfo).cast::<ffi::jpeg_decompress_struct>() };
    let blocks = u64::from(cinfo.image_width.div_ceil(8))
        * u64::from(cinfo.image_height.div_ceil(8))
        * cinfo.num_components.max(1) as u64;
    let scans = cinfo.input_scan_number.max(0) as u64;
    if scans > 100 && scans * blocks > MAX_SCAN_BLOCKS {
        resume_unwind(Box::new(Fatal(format!("{scans} scans are too many"))));
    }
}

unsafe extern "C-unwind" fn no_op(_: &mut ffi::jpeg_decompress_struct) {}

/// The whole file is in the buffer, so a request for more means that it is cut:
/// suspending tells the caller so.
unsafe extern "C-unwind" fn no_more(_: &mut ffi::jpeg_decompress_struct) -> ffi::boolean {
    0
}

unsafe extern "C-unwind" fn skip(cinfo: &mut ffi::jpeg_decompress_struct, count: c_long) {
    let Ok(count) = usize::try_from(count) else {
        return;
    };
    // SAFETY: `src` is the source that this module installed; it never moves past
    // the end of the buffer.
    unsafe {
        let source = &mut *cinfo.src;
        let step = count.min(source.bytes_in_buffer);
        source.next_input_byte = source.next_input_byte.add(step);
        source.bytes_in_buffer -= step;
    }
}

impl Decompress {
    /// A decompressor that reads `bytes`, which must outlive it.
    fn new() -> Self {
        let mut state: Box<MaybeUninit<State>> = Box::new(MaybeUninit::zeroed());
        // SAFETY: all fields are plain C data for which zero is valid (null
        // pointers, absent callbacks), and the library fills them in.
        unsafe {
            let state = &mut *state.as_mut_ptr();
            ffi::jpeg_std_error(&mut state.error);
            state.error.error_exit = Some(on_fatal);
            state.error.output_message = Some(on_message);
            state.error.emit_message = Some(on_level);
            state.cinfo.common.err = &mut state.error;
        }
        Self(state)
    }

    fn state(&mut self) -> &mut State {
        // SAFETY: initialised by `new`.
        unsafe { &mut *self.0.as_mut_ptr() }
    }

    fn create(&mut self) {
        let state = self.state();
        // SAFETY: the error manager is set; the library initialises the rest.
        unsafe { ffi::jpeg_create_decompress(&mut state.cinfo) };
        state.created = true;
        state.progress.progress_monitor = Some(on_progress);
        state.cinfo.common.progress = &mut state.progress;
        state.source.init_source = Some(no_op);
        state.source.fill_input_buffer = Some(no_more);
        state.source.skip_input_data = Some(skip);
        state.source.resync_to_restart = Some(ffi::jpeg_resync_to_restart);
        state.source.term_source = Some(no_op);
        state.cinfo.src = &mut state.source;
    }

    fn set_input(&mut self, bytes: &[u8]) {
        let source = &mut self.state().source;
        source.next_input_byte = bytes.as_ptr();
        source.bytes_in_buffer = bytes.len();
    }
}

impl Drop for Decompress {
    fn drop(&mut self) {
        let state = self.state();
        if state.created {
            // SAFETY: created and destroyed once. Destruction only frees memory,
            // also after an error.
            unsafe { ffi::jpeg_destroy_decompress(&mut state.cinfo) };
        }
    }
}

/// Runs `work`, in which libjpeg may fail by unwinding.
fn caught<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result,
        Err(panic) => match panic.downcast::<Fatal>() {
            Ok(fatal) => Err(JPEG.corrupt(fatal.0.to_lowercase())),
            Err(panic) => resume_unwind(panic),
        },
    }
}

fn cut(row: u32, height: u32) -> ImageError {
    JPEG.truncated(format!("pixels end in row {row} of {height}"))
}

/// Decodes a whole file at `eighths` of its resolution.
pub(super) fn decode(bytes: &[u8], frame: &Frame, eighths: u32, sink: &mut dyn Sink) -> Result<()> {
    caught(|| {
        let mut decompress = Decompress::new();
        decompress.create();
        decompress.set_input(bytes);
        let state = decompress.state();
        // SAFETY: the decompressor was created and its source set.
        unsafe {
            // Skips over streams that hold nothing but tables.
            loop {
                match ffi::jpeg_read_header(&mut state.cinfo, 0) {
                    1 => break,
                    2 => {}
                    _ => return Err(JPEG.truncated("header")),
                }
            }
        }
        state.cinfo.out_color_space = match frame.mode {
            Mode::Grey => ffi::J_COLOR_SPACE::JCS_GRAYSCALE,
            Mode::Cmyk => ffi::J_COLOR_SPACE::JCS_CMYK,
            _ => ffi::J_COLOR_SPACE::JCS_RGB,
        };
        state.cinfo.scale_num = eighths;
        state.cinfo.scale_denom = 8;
        run(state, frame.mode, eighths, sink)
    })
}

/// The part of libjpeg's inverse-DCT module that it calls through.
#[repr(C)]
struct InverseDct {
    start_pass: Option<unsafe extern "C-unwind" fn(*mut ffi::jpeg_decompress_struct)>,
    methods: [Option<Method>; 10],
}

type Method = unsafe extern "C-unwind" fn(
    *mut ffi::jpeg_decompress_struct,
    *mut ffi::jpeg_component_info,
    *mut i16,
    *mut *mut u8,
    u32,
);

/// What the inverse DCT may leave out.
struct Needed {
    /// Whether any row of this line of blocks matters.
    rows: bool,
    /// First column, and one past the last, of each component.
    columns: [(u32, u32); 4],
    /// The methods that libjpeg chose.
    methods: [Option<Method>; 4],
    /// Samples across a block of each component, as libjpeg counts and as they
    /// are written.
    sizes: [(u32, u32); 4],
}

/// Takes the place of libjpeg's inverse DCT: leaves out blocks that the crop does
/// not need, and transforms the others with vector code where there is some.
unsafe extern "C-unwind" fn inverse_dct(
    cinfo: *mut ffi::jpeg_decompress_struct,
    component: *mut ffi::jpeg_component_info,
    coefficients: *mut i16,
    rows: *mut *mut u8,
    column: u32,
) {
    // SAFETY: libjpeg passes its own valid structures; `client_data` points to the
    // `Needed` of the running decode; a block has 64 coefficients, and eight rows
    // have room for eight samples at `column`.
    unsafe {
        let needed = &*(*cinfo).common.client_data.cast::<Needed>();
        let index = (*component).component_index as usize & 3;
        let (first, end) = needed.columns[index];
        let (counted, size) = needed.sizes[index];
        let column = column / counted * size;
        if !needed.rows || column + size <= first || column >= end {
            return;
        }
        #[cfg(target_arch = "x86_64")]
        if !(*component).quant_table.is_null() && (5..=8).contains(&size) {
            let quantisers = &(*(*component).quant_table).quantval;
            let coefficients = &*coefficients.cast();
            let samples = match size {
                5 => idct::reduced_block::<5>(coefficients, quantisers),
                6 => idct::reduced_block::<6>(coefficients, quantisers),
                7 => idct::reduced_block::<7>(coefficients, quantisers),
                _ => idct::block(coefficients, quantisers),
            };
            for (line, samples) in samples.iter().enumerate().take(size as usize) {
                // Reduced blocks write past their end, where the next block or the
                // padding of the row is.
                let target = (*rows.add(line)).add(column as usize);
                ptr::copy_nonoverlapping(samples.as_ptr(), target, 8);
            }
            return;
        }
        if let Some(method) = needed.methods[index] {
            method(cinfo, component, coefficients, rows, column);
        }
    }
}

/// One component's last two lines of blocks.
struct Plane {
    samples: Vec<u8>,
    stride: usize,
    /// Rows that one line of blocks has.
    band: usize,
    /// Size of the component.
    width: usize,
    height: usize,
    upsampling: Upsampling,
}

impl Plane {
    fn row(&self, y: usize) -> &[u8] {
        &self.samples[y % (2 * self.band) * self.stride..][..self.stride]
    }
}

/// What libjpeg computed when it started.
struct Shape {
    width: usize,
    height: usize,
    /// Rows of the image in a line of blocks.
    band: usize,
    planes: Vec<Plane>,
    /// As [`Needed::sizes`].
    sizes: [(u32, u32); 4],
}

/// Sizes of the component planes, by libjpeg's own rules.
fn shape(cinfo: &ffi::jpeg_decompress_struct, eighths: u32) -> Result<Shape> {
    let count = cinfo.num_components.max(0) as usize;
    // SAFETY: after the header there are `num_components` components.
    let components = unsafe { std::slice::from_raw_parts(cinfo.comp_info, count) };
    let most = |factor: fn(&ffi::jpeg_component_info) -> c_int| {
        components.iter().map(factor).max().unwrap_or(1).max(1) as usize
    };
    let (most_across, most_down) = (most(|c| c.h_samp_factor), most(|c| c.v_samp_factor));
    let smallest = eighths as usize;
    let mut sizes = [(1, 1); 4];
    let mut planes = Vec::with_capacity(count);
    for (index, component) in components.iter().enumerate() {
        let (across, down) = (
            component.h_samp_factor as usize,
            component.v_samp_factor as usize,
        );
        // Subsampled components are decoded at up to twice the scale, again and
        // again, as long as that does not make them larger than the image.
        let mut size = smallest;
        while size < 8
            && (most_across * smallest).is_multiple_of(across * size * 2)
            && (most_down * smallest).is_multiple_of(down * size * 2)
        {
            size *= 2;
        }
        let counted = size;
        #[cfg(target_arch = "x86_64")]
        if idct::REDUCED_SIZES.contains(&smallest) && down == 1 {
            // The library has no vector code for such blocks, and this has it for
            // the smallest size only; upsampling does the rest. With one block from
            // top to bottom the library's row pointers fit all the same.
            size = smallest;
        }
        let (reach, depth) = (most_across * smallest, most_down * smallest);
        if !reach.is_multiple_of(across * size) || !depth.is_multiple_of(down * size) {
            return Err(JPEG.unsupported("sampling factors that are not whole multiples"));
        }
        let width = (cinfo.image_width as usize * across * size).div_ceil(most_across * 8);
        let height = (cinfo.image_height as usize * down * size).div_ceil(most_down * 8);
        let blocks = (component.width_in_blocks as usize).next_multiple_of(across);
        // Eight more than the blocks take: a scaled block writes what it has, and
        // the readers may look a little past the end.
        let stride = blocks * size + 64;
        let band = down * size;
        sizes[index & 3] = (counted as u32, size as u32);
        planes.push(Plane {
            samples: vec![0; stride * band * 2],
            stride,
            band,
            width,
            height,
            upsampling: Upsampling::choose(
                reach / (across * size),
                depth / (down * size),
                width,
                smallest > 1,
            ),
        });
    }
    Ok(Shape {
        width: cinfo.output_width as usize,
        height: cinfo.output_height as usize,
        band: most_down * smallest,
        planes,
        sizes,
    })
}

/// Starts the decompressor and hands on its rows. CMYK is inverted, because the
/// reference takes it to be stored as Adobe does.
fn run(state: &mut State, mode: Mode, eighths: u32, sink: &mut dyn Sink) -> Result<()> {
    let cinfo = &mut state.cinfo;
    cinfo.raw_data_out = 1;
    // SAFETY: the header was read.
    if unsafe { ffi::jpeg_start_decompress(cinfo) } == 0 {
        return Err(JPEG.truncated("the scans end early"));
    }
    let Shape {
        width,
        height,
        band,
        mut planes,
        sizes,
    } = shape(cinfo, eighths)?;
    if planes.len() != mode.bytes() {
        return Err(JPEG.corrupt("the number of components changes"));
    }
    let mut spec = Spec::new(width as u32, height as u32, mode);
    spec.reduced = (eighths != 8).then_some(Reduced {
        width: cinfo.image_width,
        height: cinfo.image_height,
        eighths,
    });
    sink.start(spec)?;
    let columns = sink.columns();
    let mut needed = Needed {
        rows: true,
        columns: [(0, u32::MAX); 4],
        methods: [None; 4],
        sizes,
    };
    for (index, plane) in planes.iter().enumerate() {
        // Filters look one sample further.
        let (across, _) = plane.upsampling.factors();
        let first = (columns.0 / across).saturating_sub(2);
        let end = columns.1 / across + 3;
        needed.columns[index] = (first as u32, end as u32);
    }
    // SAFETY: the structure ends with the pointers to its modules for the inverse
    // DCT, upsampling, colour conversion and quantisation, which the binding keeps
    // private; the exact version is pinned, and every decode in the tests goes
    // through here. libjpeg has set the module up when it started.
    unsafe {
        let end = ptr::from_mut(cinfo).add(1).cast::<*mut InverseDct>();
        let module = end.sub(4).read();
        for index in 0..planes.len() {
            needed.methods[index] = (*module).methods[index];
            (*module).methods[index] = Some(inverse_dct);
        }
    }
    let converts = match (cinfo.jpeg_color_space, mode) {
        (ffi::J_COLOR_SPACE::JCS_YCbCr, Mode::Rgb) | (ffi::J_COLOR_SPACE::JCS_YCCK, _) => true,
        (ffi::J_COLOR_SPACE::JCS_RGB | ffi::J_COLOR_SPACE::JCS_CMYK, _) => false,
        (_, Mode::Grey) => false,
        (other, _) => return Err(JPEG.unsupported(format!("colour space {}", other as i32))),
    };
    let holds_back = planes.iter().any(|plane| plane.upsampling.needs_context());
    let widest = planes.iter().map(|plane| plane.stride).max().unwrap_or(0);
    let mut sums = vec![0u16; widest];
    // Upsampling writes whole pairs, and the resize reads past the end.
    let mut rows = vec![vec![0u8; width + ROW_PADDING]; planes.len()];
    let bands = height.div_ceil(band);
    let mut done = 0;
    for index in 0..bands {
        let ready = if index + 1 == bands {
            height
        } else {
            (index + 1) * band - usize::from(holds_back)
        };
        // Blocks matter if any row does that they or their neighbours reach.
        let reach = (index * band).saturating_sub(2)..((index + 1) * band + 2).min(height);
        needed.rows = reach.into_iter().any(|y| sink.wants(y as u32));
        cinfo.common.client_data = ptr::from_ref(&needed).cast_mut().cast();
        let mut lines: Vec<Vec<*mut u8>> = planes
            .iter_mut()
            .map(|plane| {
                let start = index % 2 * plane.band * plane.stride;
                plane.samples[start..][..plane.band * plane.stride]
                    .chunks_exact_mut(plane.stride)
                    .map(<[u8]>::as_mut_ptr)
                    .collect()
            })
            .collect();
        let mut components: Vec<*mut *mut u8> = lines.iter_mut().map(Vec::as_mut_ptr).collect();
        // SAFETY: each component has as many rows as a line of its blocks, each as
        // wide as its blocks padded to whole units of a scan.
        let got = unsafe { ffi::jpeg_read_raw_data(cinfo, components.as_mut_ptr(), band as u32) };
        if got == 0 {
            return Err(cut((index * band) as u32, height as u32));
        }
        for y in done..ready {
            if !sink.wants(y as u32) {
                continue;
            }
            for (plane, out) in planes.iter().zip(&mut rows) {
                let (near, far) = plane.upsampling.sources(y, plane.height);
                plane.upsampling.row(
                    plane.row(near),
                    plane.row(far),
                    y,
                    plane.width,
                    columns,
                    &mut sums,
                    out,
                );
            }
            if converts && let [luma, cb, cr, ..] = &mut rows[..] {
                let range = columns.0..columns.1;
                ycc_to_rgb(
                    &mut luma[range.clone()],
                    &mut cb[range.clone()],
                    &mut cr[range],
                );
            }
            if mode == Mode::Cmyk {
                invert(converts, &mut rows, columns);
            }
            let slices: [&[u8]; 4] =
                std::array::from_fn(|index| rows.get(index).map_or(&[][..], |row| &row[..]));
            sink.row_planar(y as u32, &slices[..rows.len()]);
        }
        done = ready;
    }
    Ok(())
}

/// Inverts what is to be inverted of CMYK. YCCK becomes CMY by an inversion of
/// its own after its conversion to RGB, so only black is left to invert.
fn invert(was_converted: bool, rows: &mut [Vec<u8>], columns: (usize, usize)) {
    let skip = if was_converted { 3 } else { 0 };
    for row in &mut rows[skip..] {
        for sample in &mut row[columns.0..columns.1] {
            *sample = 255 - *sample;
        }
    }
}

/// Colour space of the data in a TIFF's strip or tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// As the components are.
    Raw,
    /// Luma and chroma, to be converted to RGB.
    YCbCr,
}

/// Decodes one strip or tile of a TIFF, whose `tables` may be stored apart:
/// width, height, components and samples.
pub(crate) fn decode_tile(
    tables: Option<&[u8]>,
    bytes: &[u8],
    space: Space,
) -> Result<(u32, u32, u32, Vec<u8>)> {
    caught(|| {
        let mut decompress = Decompress::new();
        decompress.create();
        if let Some(tables) = tables {
            decompress.set_input(tables);
            // SAFETY: created, source set. A stream of tables alone is not an error.
            unsafe { ffi::jpeg_read_header(&mut decompress.state().cinfo, 0) };
        }
        decompress.set_input(bytes);
        let state = decompress.state();
        let cinfo = &mut state.cinfo;
        // SAFETY: created, source set.
        if unsafe { ffi::jpeg_read_header(cinfo, 1) } != 1 {
            return Err(JPEG.truncated("header of a strip"));
        }
        if space == Space::YCbCr && cinfo.num_components == 3 {
            cinfo.jpeg_color_space = ffi::J_COLOR_SPACE::JCS_YCbCr;
            cinfo.out_color_space = ffi::J_COLOR_SPACE::JCS_RGB;
        } else {
            cinfo.jpeg_color_space = ffi::J_COLOR_SPACE::JCS_UNKNOWN;
            cinfo.out_color_space = ffi::J_COLOR_SPACE::JCS_UNKNOWN;
        }
        // SAFETY: the header was read.
        if unsafe { ffi::jpeg_start_decompress(cinfo) } == 0 {
            return Err(JPEG.truncated("the scans of a strip end early"));
        }
        let (width, height) = (cinfo.output_width, cinfo.output_height);
        let components = cinfo.output_components.max(0) as u32;
        let stride = width as usize * components as usize;
        let mut samples = crate::raster::try_zeroed(stride * height as usize)?;
        for (y, row) in samples.chunks_exact_mut(stride.max(1)).enumerate() {
            let mut lines = [row.as_mut_ptr()];
            // SAFETY: the row has room for a line of the output's components.
            if unsafe { ffi::jpeg_read_scanlines(cinfo, lines.as_mut_ptr(), 1) } != 1 {
                return Err(cut(y as u32, height));
            }
        }
        Ok((width, height, components, samples))
    })
}
