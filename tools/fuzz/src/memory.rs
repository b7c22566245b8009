//! What the decoders hold at most, theirs and C's, as AddressSanitizer's allocator tells.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" {
    fn __sanitizer_install_malloc_and_free_hooks(
        on_malloc: unsafe extern "C" fn(*const c_void, usize),
        on_free: unsafe extern "C" fn(*const c_void),
    ) -> c_int;
    fn __sanitizer_get_allocated_size(block: *const c_void) -> usize;
}

unsafe extern "C" fn on_malloc(_: *const c_void, size: usize) {
    let held = HELD.fetch_add(size, Relaxed).wrapping_add(size);
    PEAK.fetch_max(held, Relaxed);
}

unsafe extern "C" fn on_free(block: *const c_void) {
    if !block.is_null() {
        // SAFETY: the allocator calls this with a block that it still owns.
        let size = unsafe { __sanitizer_get_allocated_size(block) };
        // Blocks from before the watch began are not counted.
        let _ = HELD.fetch_update(Relaxed, Relaxed, |held| Some(held.saturating_sub(size)));
    }
}

/// Counts from now on.
pub fn watch() {
    // SAFETY: both hooks allocate nothing and live as long as the process.
    let installed = unsafe { __sanitizer_install_malloc_and_free_hooks(on_malloc, on_free) };
    assert_ne!(installed, 0, "the allocator takes no more hooks");
}

/// What `work` held at most beyond what was held before, in bytes.
pub fn peak<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    (result, PEAK.load(Relaxed).saturating_sub(before) as u64)
}
