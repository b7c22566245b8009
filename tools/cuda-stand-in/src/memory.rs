//! Device memory, and copies from and to it.

use std::collections::BTreeMap;
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::counters::{Counter, add, raise, set};
use crate::fault::{self, OUT_OF_MEMORY, SUCCESS, remember, strikes};
use crate::settings::settings;

/// What a T4 has.
pub(crate) const TOTAL_BYTES: usize = 15_843_721_216;
/// CUDA aligns allocations so.
const ALIGNMENT: usize = 512;

/// Maps a file for reading and writing.
pub(crate) fn map_shared(file: c_int, bytes: usize) -> Option<*mut c_void> {
    let access = libc::PROT_READ | libc::PROT_WRITE;
    let place = unsafe { libc::mmap(null_mut(), bytes, access, libc::MAP_SHARED, file, 0) };
    (place != libc::MAP_FAILED).then_some(place)
}

struct Device {
    /// Where the device's addresses begin: nothing may be read or written there.
    addresses: usize,
    /// Where its bytes are.
    bytes: usize,
    /// Offset and size of every allocation.
    allocations: BTreeMap<usize, usize>,
    /// Samples of the images that were copied here last, a row for each.
    images: Vec<Vec<f32>>,
}

static DEVICE: LazyLock<Mutex<Device>> = LazyLock::new(|| {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let (addresses, bytes) = unsafe {
        let file = libc::memfd_create(c"cuda-stand-in".as_ptr(), 0);
        assert_eq!(libc::ftruncate(file, TOTAL_BYTES as libc::off_t), 0);
        (
            libc::mmap(null_mut(), TOTAL_BYTES, libc::PROT_NONE, flags, -1, 0),
            map_shared(file, TOTAL_BYTES),
        )
    };
    assert_ne!(addresses, libc::MAP_FAILED, "no addresses for the device");
    Mutex::new(Device {
        addresses: addresses.addr(),
        bytes: bytes.expect("memory for the device").addr(),
        allocations: BTreeMap::new(),
        images: Vec::new(),
    })
});

fn device() -> std::sync::MutexGuard<'static, Device> {
    DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device {
    fn offset(&self, address: *const c_void) -> Option<usize> {
        let offset = address.addr().checked_sub(self.addresses)?;
        (offset < TOTAL_BYTES).then_some(offset)
    }

    /// Where the bytes of an address are, of the device or of the host.
    fn place(&self, address: *const c_void) -> *mut u8 {
        match self.offset(address) {
            Some(offset) => (self.bytes + offset) as *mut u8,
            None => address.cast::<u8>().cast_mut(),
        }
    }

    /// The first gap that is large enough.
    fn allocate(&mut self, bytes: usize) -> Option<usize> {
        let mut offset = 0;
        for (&start, &size) in &self.allocations {
            if start - offset >= bytes {
                break;
            }
            offset = (start + size).next_multiple_of(ALIGNMENT);
        }
        if TOTAL_BYTES.checked_sub(offset)? < bytes {
            return None;
        }
        self.allocations.insert(offset, bytes);
        Some(self.addresses + offset)
    }

    fn used(&self) -> usize {
        self.allocations.values().sum()
    }

    fn count(&self) {
        set(Counter::Bytes, self.used() as u64);
        raise(Counter::PeakBytes, self.used() as u64);
    }

    /// Remembers what was copied to the device, if it is pixels: samples over the whole image and all
    /// channels.
    fn saw_pixels(&mut self, pixels: &[u8]) {
        let (image, values) = (settings().image_bytes, settings().row_values);
        if image == 0 || pixels.is_empty() || !pixels.len().is_multiple_of(image) {
            return;
        }
        let stride = image / values.max(1) + 1;
        self.images = pixels
            .chunks_exact(image)
            .map(|one| {
                (0..values)
                    .map(|at| f32::from(one[at * stride % image]))
                    .collect()
            })
            .collect();
    }

    /// Fills what is copied from the device, if it is embeddings, with the samples of their images.
    fn mark_rows(&self, bytes: &mut [u8]) {
        let row = settings().row_values * size_of::<f32>();
        if row == 0 || self.images.is_empty() || bytes.len() != self.images.len() * row {
            return;
        }
        for (place, values) in bytes.chunks_exact_mut(row).zip(&self.images) {
            for (place, value) in place.chunks_exact_mut(size_of::<f32>()).zip(values) {
                place.copy_from_slice(&value.to_ne_bytes());
            }
        }
        add(Counter::Batches, 1);
        add(Counter::Rows, self.images.len() as u64);
    }
}

/// `cudaMalloc`.
pub(crate) unsafe fn allocate(pointer: *mut *mut c_void, bytes: usize) -> i32 {
    let status = fault::status();
    if status != SUCCESS {
        return status;
    }
    let mut device = device();
    let is_in_run = !device.images.is_empty();
    if strikes("out-of-memory") || (is_in_run && strikes("out-of-memory-in-run")) {
        return remember(OUT_OF_MEMORY);
    }
    let Some(address) = device.allocate(bytes.max(1)) else {
        return remember(OUT_OF_MEMORY);
    };
    device.count();
    add(Counter::Allocations, 1);
    *pointer = address as *mut c_void;
    SUCCESS
}

/// `cudaFree`.
pub(crate) fn free(pointer: *mut c_void) -> i32 {
    let mut device = device();
    if let Some(offset) = device.offset(pointer) {
        device.allocations.remove(&offset);
        device.count();
    }
    fault::status()
}

pub(crate) fn free_bytes() -> usize {
    TOTAL_BYTES - device().used()
}

pub(crate) fn is_of_device(pointer: *const c_void) -> bool {
    device().offset(pointer).is_some()
}

/// `cudaMemcpy`.
pub(crate) unsafe fn copy(to: *mut c_void, from: *const c_void, bytes: usize) -> i32 {
    let status = fault::status();
    if status != SUCCESS {
        return status;
    }
    let mut device = device();
    let (is_up, is_down) = (
        device.offset(from).is_none() && device.offset(to).is_some(),
        device.offset(from).is_some() && device.offset(to).is_none(),
    );
    let (source, sink) = (device.place(from), device.place(to));
    std::ptr::copy(source, sink, bytes);
    if is_up {
        device.saw_pixels(std::slice::from_raw_parts(source, bytes));
    } else if is_down {
        device.mark_rows(std::slice::from_raw_parts_mut(sink, bytes));
    }
    SUCCESS
}

/// `cudaMemset`.
pub(crate) unsafe fn fill(to: *mut c_void, value: c_int, bytes: usize) -> i32 {
    device().place(to).write_bytes(value as u8, bytes);
    fault::status()
}
