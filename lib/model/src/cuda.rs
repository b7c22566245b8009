//! What the driver must be told before ONNX Runtime makes CUDA's context, and what is not done once a
//! run has failed.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use libloading::{Library, Symbol};
use thiserror::Error;

/// The driver's library, which comes with the machine.
const DRIVER: &str = "libcuda.so.1";
/// `CU_CTX_SCHED_BLOCKING_SYNC`: a thread that waits for the device sleeps. CUDA's own choice is to
/// spin, which takes a core from the decoders.
const BLOCKING_SYNC: c_uint = 4;

/// Whether a run on CUDA has failed.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Remembers that a run on CUDA has failed.
pub(crate) fn has_failed() {
    FAILED.store(true, Ordering::Relaxed);
}

/// Something that may hold memory of CUDA. After a failure it is not freed: every call to CUDA may
/// fail from then on, and ONNX Runtime would end the process in its destructor, before the task has
/// handed its messages back.
pub(crate) struct Held<T>(ManuallyDrop<T>);

impl<T> Held<T> {
    pub(crate) fn new(held: T) -> Held<T> {
        Held(ManuallyDrop::new(held))
    }
}

impl<T> Deref for Held<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> DerefMut for Held<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T> Drop for Held<T> {
    fn drop(&mut self) {
        if !FAILED.load(Ordering::Relaxed) {
            // SAFETY: dropped here alone, and used by nobody after.
            unsafe { ManuallyDrop::drop(&mut self.0) };
        }
    }
}

/// Why NVIDIA's driver gives no device.
#[derive(Clone, Debug, Error)]
pub(crate) enum DriverError {
    #[error("cannot load {DRIVER}, NVIDIA's driver: {0}")]
    Missing(String),
    #[error("{DRIVER} is none of CUDA's: {0}")]
    Foreign(String),
    #[error("{call} failed with CUDA error {status}: {text}")]
    Call {
        call: &'static str,
        status: c_int,
        text: String,
    },
}

/// Makes sure of a device, and lets threads sleep while they wait for it. Without a device ONNX
/// Runtime registers its CUDA provider all the same and fails later, in other words.
pub(crate) fn prepare() -> Result<(), DriverError> {
    static PREPARED: OnceLock<Result<(), DriverError>> = OnceLock::new();
    PREPARED.get_or_init(ask_the_driver).clone()
}

fn ask_the_driver() -> Result<(), DriverError> {
    // SAFETY: NVIDIA's driver is made to be loaded so. It stays: CUDA will use it.
    let driver = unsafe { Library::new(DRIVER) }.map_err(|error| {
        let cause =
            std::error::Error::source(&error).map_or(String::new(), |why| format!(": {why}"));
        DriverError::Missing(format!("{error}{cause}"))
    })?;
    let driver: &'static Library = Box::leak(Box::new(driver));
    // SAFETY: the signatures of CUDA's manual.
    let (init, device, set_flags) = unsafe {
        (
            function::<unsafe extern "C" fn(c_uint) -> c_int>(driver, c"cuInit")?,
            function::<unsafe extern "C" fn(*mut c_int, c_int) -> c_int>(driver, c"cuDeviceGet")?,
            function::<unsafe extern "C" fn(c_int, c_uint) -> c_int>(
                driver,
                c"cuDevicePrimaryCtxSetFlags_v2",
            )?,
        )
    };
    let mut first = 0;
    // SAFETY: `first` outlives the call that writes it.
    unsafe {
        succeeded(driver, "cuInit", init(0))?;
        succeeded(driver, "cuDeviceGet", device(&raw mut first, 0))?;
        succeeded(
            driver,
            "cuDevicePrimaryCtxSetFlags",
            set_flags(first, BLOCKING_SYNC),
        )
    }
}

/// # Safety
/// `F` must be the function's signature.
unsafe fn function<F>(
    driver: &'static Library,
    name: &CStr,
) -> Result<Symbol<'static, F>, DriverError> {
    // SAFETY: the caller's promise.
    unsafe { driver.get(name.to_bytes_with_nul()) }
        .map_err(|error| DriverError::Foreign(error.to_string()))
}

fn succeeded(
    driver: &'static Library,
    call: &'static str,
    status: c_int,
) -> Result<(), DriverError> {
    if status == 0 {
        return Ok(());
    }
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: the signature of CUDA's manual; the text is the driver's and never changes.
    let text = unsafe {
        function::<unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int>(
            driver,
            c"cuGetErrorString",
        )
        .ok()
        .filter(|describe| describe(status, &raw mut text) == 0 && !text.is_null())
        .map(|_| CStr::from_ptr(text).to_string_lossy().into_owned())
    };
    let text = text.unwrap_or_else(|| "unknown to the driver".to_owned());
    Err(DriverError::Call { call, status, text })
}
