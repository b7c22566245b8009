//! The C library: owning its state, its errors, and its rows.

#[cfg(target_arch = "x86_64")]
use super::assemble::{Assembly, Sampling};
use super::codestream::{Frame, JPEG};
#[cfg(target_arch = "x86_64")]
use super::{baseline, progressive};
use crate::budget;
use crate::error::{ImageError, Result};
use crate::raster::{Mode, Sink, Spec};
use mozjpeg_sys as ffi;
use std::ffi::{c_int, c_long};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;

/// Why libjpeg does not go on, carried by the unwinding.
struct Fatal(ImageError);

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
    resume_unwind(Box::new(Fatal(JPEG.corrupt(message.to_lowercase()))));
}

unsafe extern "C-unwind" fn on_message(_: &mut ffi::jpeg_common_struct) {}

unsafe extern "C-unwind" fn on_level(_: &mut ffi::jpeg_common_struct, _: c_int) {}

unsafe extern "C-unwind" fn on_progress(cinfo: &mut ffi::jpeg_common_struct) {
    // SAFETY: this monitor is only installed in a decompressor, of which the
    // common structure is the first field.
    let cinfo = unsafe { &*ptr::from_mut(cinfo).cast::<ffi::jpeg_decompress_struct>() };
    let (scans, blocks) = scan_work(cinfo);
    let budget = budget::look().and_then(|()| budget::check_scans(scans, blocks));
    if let Err(error) = budget {
        resume_unwind(Box::new(Fatal(error)));
    }
}

/// The scan that libjpeg is at, and the blocks of the image.
fn scan_work(cinfo: &ffi::jpeg_decompress_struct) -> (u64, u64) {
    let blocks = u64::from(cinfo.image_width.div_ceil(8))
        * u64::from(cinfo.image_height.div_ceil(8))
        * cinfo.num_components.max(1) as u64;
    (cinfo.input_scan_number.max(0) as u64, blocks)
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
            Ok(fatal) => Err(fatal.0),
            Err(panic) => resume_unwind(panic),
        },
    }
}

fn cut(row: u32, height: u32) -> ImageError {
    JPEG.truncated(format!("pixels end in row {row} of {height}"))
}

/// Decodes a whole file: here where that gives the same, at `eighths` of its
/// resolution; else by libjpeg, at all of it.
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
        if usize::try_from(state.cinfo.num_components) != Ok(frame.mode.bytes()) {
            return Err(JPEG.corrupt("the number of components changes"));
        }
        #[cfg(target_arch = "x86_64")]
        if decodes_here(bytes, state, frame, eighths, sink).is_some() {
            return Ok(());
        }
        budget::look()?;
        let _ = eighths;
        read_scanlines(state, frame, sink)
    })
}

/// Decodes the scans here, if they are as they should be. Rows may have gone out in
/// vain, and all have to come again, where the result is `None`.
#[cfg(target_arch = "x86_64")]
fn decodes_here(
    bytes: &[u8],
    state: &State,
    frame: &Frame,
    eighths: u32,
    sink: &mut dyn Sink,
) -> Option<()> {
    let cinfo = &state.cinfo;
    if state.source.next_input_byte != bytes[frame.data..].as_ptr() {
        return None;
    }
    let converts = match (cinfo.jpeg_color_space, frame.mode) {
        (ffi::J_COLOR_SPACE::JCS_YCbCr, Mode::Rgb) | (ffi::J_COLOR_SPACE::JCS_YCCK, _) => true,
        (ffi::J_COLOR_SPACE::JCS_RGB | ffi::J_COLOR_SPACE::JCS_CMYK, _) => false,
        (_, Mode::Grey) => false,
        _ => return None,
    };
    // SAFETY: after the header there are as many components as a pixel has bytes.
    let components = unsafe { std::slice::from_raw_parts(cinfo.comp_info, frame.mode.bytes()) };
    let mut samplings: Vec<Sampling> = components
        .iter()
        .map(|component| Sampling {
            across: component.h_samp_factor.max(0) as usize,
            down: component.v_samp_factor.max(0) as usize,
        })
        .collect();
    if let [only] = &mut samplings[..] {
        // A component alone comes block by block, whatever its factors.
        (only.across, only.down) = (1, 1);
    }
    let quantisers: Vec<[u16; 64]> = components
        .iter()
        .map(|component| {
            let table = usize::try_from(component.quant_tbl_no).ok()?;
            let table = *cinfo.quant_tbl_ptrs.get(table)?;
            // SAFETY: the library's tables live as long as its state.
            unsafe { table.as_ref() }.map(|table| table.quantval)
        })
        .collect::<Option<_>>()?;
    let full = (frame.width, frame.height);
    let start = |sink: &mut dyn Sink| {
        Assembly::start(full, eighths, frame.mode, converts, &samplings, sink)
    };
    let is_done = if let Some(progression) = &frame.progression {
        let assembly = &mut start(sink)?;
        progressive::decode(bytes, progression, &quantisers, &samplings, assembly, sink)
    } else if let Some(scan) = &frame.scan {
        let (data, assembly) = (&bytes[frame.data..], &mut start(sink)?);
        baseline::decode(data, scan, &quantisers, &samplings, assembly, sink)
    } else {
        false
    };
    #[cfg(any(test, fuzzing))]
    super::compare::OWN_DECODES.set(super::compare::OWN_DECODES.get() + u32::from(is_done));
    is_done.then_some(())
}

/// Has libjpeg decode what the header described, and hands on its rows.
fn read_scanlines(state: &mut State, frame: &Frame, sink: &mut dyn Sink) -> Result<()> {
    let cinfo = &mut state.cinfo;
    cinfo.out_color_space = match frame.mode {
        Mode::Grey => ffi::J_COLOR_SPACE::JCS_GRAYSCALE,
        Mode::Cmyk => ffi::J_COLOR_SPACE::JCS_CMYK,
        _ => ffi::J_COLOR_SPACE::JCS_RGB,
    };
    // SAFETY: the header was read.
    if unsafe { ffi::jpeg_start_decompress(cinfo) } == 0 {
        return Err(JPEG.truncated("the scans end early"));
    }
    let (width, height) = (cinfo.output_width, cinfo.output_height);
    sink.start(Spec::new(width, height, frame.mode))?;
    let mut row = vec![0; width as usize * frame.mode.bytes()];
    for y in 0..height {
        let mut lines = [row.as_mut_ptr()];
        // SAFETY: the row has room for a line of the output's components.
        if unsafe { ffi::jpeg_read_scanlines(cinfo, lines.as_mut_ptr(), 1) } != 1 {
            return Err(cut(y, height));
        }
        if frame.mode == Mode::Cmyk {
            // The reference takes CMYK to be stored inverted, as Adobe does.
            row.iter_mut().for_each(|sample| *sample = 255 - *sample);
        }
        if sink.wants(y) {
            sink.row(y, &row);
        }
    }
    // What comes after the pixels may still be a fatal error, and then the
    // reference refuses the file. That it may be missing is not one.
    // SAFETY: all rows were read.
    unsafe { ffi::jpeg_finish_decompress(cinfo) };
    Ok(())
}

/// Colour space of the data in a TIFF's strip or tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Space {
    /// As the components are.
    Raw,
    /// Luma and chroma, to be converted to RGB.
    YCbCr,
}

/// Decodes one strip or tile of a TIFF, whose `tables` may be stored apart and which
/// may be as large as `most`: width, height, components and samples.
pub(crate) fn decode_tile(
    tables: Option<&[u8]>,
    bytes: &[u8],
    space: Space,
    most: (usize, usize),
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
        let (width, height) = (cinfo.image_width as usize, cinfo.image_height as usize);
        if width > most.0 || height > most.1 {
            return Err(JPEG.corrupt(format!(
                "{width}×{height} pixels where at most {}×{} belong",
                most.0, most.1
            )));
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
        let (scans, blocks) = scan_work(cinfo);
        budget::spend_scans(scans, blocks);
        Ok((width, height, components, samples))
    })
}
