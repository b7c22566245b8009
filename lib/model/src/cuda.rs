//! What the driver must be told before ONNX Runtime makes CUDA's context.

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::sync::OnceLock;

use libloading::{Library, Symbol};

/// The driver's library, which comes with the machine.
const DRIVER: &str = "libcuda.so.1";
/// `CU_CTX_SCHED_BLOCKING_SYNC`: a thread that waits for the device sleeps. CUDA's own choice is to
/// spin, which takes a core from the decoders.
const BLOCKING_SYNC: c_uint = 4;

/// Makes sure of a device, and lets threads sleep while they wait for it. Without a device ONNX
/// Runtime registers its CUDA provider all the same and fails later, in other words.
pub(crate) fn prepare() -> Result<(), String> {
    static PREPARED: OnceLock<Result<(), String>> = OnceLock::new();
    PREPARED.get_or_init(ask_the_driver).clone()
}

fn ask_the_driver() -> Result<(), String> {
    // SAFETY: NVIDIA's driver is made to be loaded so. It stays: CUDA will use it.
    let driver = unsafe { Library::new(DRIVER) }
        .map_err(|error| format!("cannot load NVIDIA's driver: {error}"))?;
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
unsafe fn function<F>(driver: &'static Library, name: &CStr) -> Result<Symbol<'static, F>, String> {
    // SAFETY: the caller's promise.
    unsafe { driver.get(name.to_bytes_with_nul()) }
        .map_err(|error| format!("{DRIVER} is none of CUDA's: {error}"))
}

fn succeeded(driver: &'static Library, call: &str, status: c_int) -> Result<(), String> {
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
    Err(format!("{call} failed with CUDA error {status}: {text}"))
}
