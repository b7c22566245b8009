//! What a run leaves behind, in a file that is mapped into memory: a process that ends without an
//! orderly end, as the task does, leaves it as well.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::map_shared;
use crate::settings::settings;

/// Places of the counters in the file, each a 64-bit integer in the machine's order.
#[derive(Clone, Copy)]
pub(crate) enum Counter {
    /// Kernels launched by the CUDA runtime.
    Launches,
    /// Kernels launched by the driver's interface, which is how fused attention comes.
    DriverLaunches,
    /// Matrix products asked of cuBLAS.
    Products,
    /// Successful allocations of device memory.
    Allocations,
    /// Bytes of device memory that are allocated.
    Bytes,
    /// Most bytes that were.
    PeakBytes,
    /// Batches whose embeddings were copied back.
    Batches,
    /// Rows of embeddings that were copied back.
    Rows,
    /// cuDNN handles made.
    DnnHandles,
    /// Flags of the device's context, plus one.
    ContextFlags,
    /// Failures that a fault caused.
    Faults,
}

const FILE_BYTES: usize = 4096;

fn all() -> &'static [AtomicU64] {
    static ALL: OnceLock<&'static [AtomicU64]> = OnceLock::new();
    ALL.get_or_init(|| {
        let count = FILE_BYTES / size_of::<AtomicU64>();
        let mapped = settings().counters.as_ref().and_then(|path| {
            let mut options = File::options();
            options.read(true).write(true).create(true).truncate(false);
            let file = options.open(path).ok()?;
            file.set_len(FILE_BYTES as u64).ok()?;
            map_shared(file.as_raw_fd(), FILE_BYTES)
        });
        match mapped {
            // The mapping is never taken away and has room for all.
            Some(place) => unsafe { std::slice::from_raw_parts(place.cast(), count) },
            None => Box::leak((0..count).map(|_| AtomicU64::new(0)).collect()),
        }
    })
}

/// Adds to a counter; answers what it is then.
pub(crate) fn add(counter: Counter, amount: u64) -> u64 {
    all()[counter as usize]
        .fetch_add(amount, Ordering::Relaxed)
        .wrapping_add(amount)
}

pub(crate) fn set(counter: Counter, value: u64) {
    all()[counter as usize].store(value, Ordering::Relaxed);
}

pub(crate) fn raise(counter: Counter, value: u64) {
    all()[counter as usize].fetch_max(value, Ordering::Relaxed);
}
