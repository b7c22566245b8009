//! Calls that fail as a GPU would make them fail.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use crate::counters::{Counter, add};
use crate::settings::settings;

/// The statuses that are used, of the CUDA runtime and the driver alike.
pub(crate) const SUCCESS: i32 = 0;
pub(crate) const OUT_OF_MEMORY: i32 = 2;
pub(crate) const NO_DEVICE: i32 = 100;
pub(crate) const NO_KERNEL_IMAGE: i32 = 209;
pub(crate) const ILLEGAL_ADDRESS: i32 = 700;
pub(crate) const NOT_SUPPORTED: i32 = 801;

/// After an illegal address every later call of the process fails.
static STICKY: AtomicI32 = AtomicI32::new(SUCCESS);
/// What `cudaGetLastError` answers and clears.
static LAST: AtomicI32 = AtomicI32::new(SUCCESS);

/// Whether this call of `what` is one that the rehearsal lets fail. Each kind counts its calls.
pub(crate) fn strikes(what: &str) -> bool {
    static CALLS: AtomicU64 = AtomicU64::new(0);
    let Some((fault, first, goes_on)) = &settings().fault else {
        return false;
    };
    if fault != what {
        return false;
    }
    let call = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
    let strikes = call == *first || (*goes_on && call > *first);
    if strikes {
        add(Counter::Faults, 1);
    }
    strikes
}

/// The status of a call that does nothing else.
pub(crate) fn status() -> i32 {
    if strikes_always("no-device") {
        return NO_DEVICE;
    }
    STICKY.load(Ordering::Relaxed)
}

fn strikes_always(what: &str) -> bool {
    settings()
        .fault
        .as_ref()
        .is_some_and(|(fault, _, _)| fault == what)
}

/// The status of a kernel's launch.
pub(crate) fn launch_status() -> i32 {
    if strikes("illegal-address") {
        STICKY.store(ILLEGAL_ADDRESS, Ordering::Relaxed);
    }
    let status = if strikes("no-kernel-image") {
        NO_KERNEL_IMAGE
    } else {
        status()
    };
    remember(status)
}

/// Keeps a failure for `cudaGetLastError`.
pub(crate) fn remember(status: i32) -> i32 {
    if status != SUCCESS {
        LAST.store(status, Ordering::Relaxed);
    }
    status
}

/// The last failure, which is forgotten unless it sticks.
pub(crate) fn take_last() -> i32 {
    match status() {
        SUCCESS => LAST.swap(SUCCESS, Ordering::Relaxed),
        sticky => sticky,
    }
}

/// The last failure.
pub(crate) fn last() -> i32 {
    match status() {
        SUCCESS => LAST.load(Ordering::Relaxed),
        sticky => sticky,
    }
}
