//! How fast bytes reach a CUDA device on this machine, from pageable and from
//! pinned memory: the floor under every batch of pixels. It needs CUDA's
//! runtime library and nothing else; no figure of it exists yet for any GPU.

use std::ffi::{c_int, c_void};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use libloading::Library;
use serde_json::json;

/// The names under which CUDA's runtime library is installed, newest first.
const LIBRARIES: [&str; 3] = ["libcudart.so.13", "libcudart.so.12", "libcudart.so"];

/// Copies between two looks at the clock; the median of the rounds counts.
const COPIES: usize = 20;
const ROUNDS: usize = 9;

/// `cudaMemcpyHostToDevice` and `cudaMemcpyDeviceToHost`.
const TO_DEVICE: c_int = 1;
const TO_HOST: c_int = 2;

type Allocate = unsafe extern "C" fn(*mut *mut c_void, usize) -> c_int;
type Copy = unsafe extern "C" fn(*mut c_void, *const c_void, usize, c_int) -> c_int;
type Synchronize = unsafe extern "C" fn() -> c_int;

struct Cuda {
    library: Library,
}

impl Cuda {
    fn load() -> Result<Self> {
        let mut reasons = Vec::new();
        for name in LIBRARIES {
            // SAFETY: the library's own initialisers are all that runs, and
            // it is NVIDIA's, found as any other program finds it.
            match unsafe { Library::new(name) } {
                Ok(library) => return Ok(Self { library }),
                Err(error) => reasons.push(error.to_string()),
            }
        }
        bail!("no CUDA runtime library: {}", reasons.join("; "))
    }

    /// Allocates with `cudaMalloc` (device) or `cudaMallocHost` (pinned).
    /// What is allocated lives until the process ends, which is soon.
    fn allocate(&self, function: &str, bytes: usize) -> Result<*mut c_void> {
        // SAFETY: both functions have this signature in CUDA's headers.
        let allocate = unsafe { self.library.get::<Allocate>(function) }?;
        let mut pointer = std::ptr::null_mut();
        // SAFETY: `pointer` is a valid place for the result.
        check(function, unsafe { allocate(&mut pointer, bytes) })?;
        Ok(pointer)
    }

    /// Gigabytes per second of copies of `bytes` from one place to another.
    fn rate(&self, to: *mut c_void, from: *const c_void, bytes: usize, kind: c_int) -> Result<f64> {
        // SAFETY: both functions have these signatures in CUDA's headers.
        let (copy, synchronize) = unsafe {
            (
                self.library.get::<Copy>("cudaMemcpy")?,
                self.library.get::<Synchronize>("cudaDeviceSynchronize")?,
            )
        };
        let mut rates = Vec::new();
        for _ in 0..ROUNDS {
            let started = Instant::now();
            for _ in 0..COPIES {
                // SAFETY: both places hold at least `bytes`, on the sides
                // that `kind` says, and do not overlap.
                check("cudaMemcpy", unsafe { copy(to, from, bytes, kind) })?;
            }
            // SAFETY: it takes nothing and only waits.
            check("cudaDeviceSynchronize", unsafe { synchronize() })?;
            rates.push((bytes * COPIES) as f64 / started.elapsed().as_secs_f64() / 1e9);
        }
        rates.sort_by(f64::total_cmp);
        Ok(rates[ROUNDS / 2])
    }
}

fn check(function: &str, code: c_int) -> Result<()> {
    if code != 0 {
        bail!("{function} failed with CUDA error {code}");
    }
    Ok(())
}

fn main() -> Result<()> {
    let cuda = Cuda::load().context("this benchmark needs a machine with CUDA")?;
    // Pixels of 1, 8, 64 and 256 images of 224 × 224.
    for images in [1, 8, 64, 256] {
        let bytes = images * 224 * 224 * 3;
        let device = cuda.allocate("cudaMalloc", bytes)?;
        let pinned = cuda.allocate("cudaMallocHost", bytes)?;
        let mut pageable = vec![1u8; bytes];
        let ordinary: *mut c_void = pageable.as_mut_ptr().cast();
        let figures = json!({
            "images": images,
            "bytes": bytes,
            "pageable_to_device_gb_per_s": cuda.rate(device, ordinary, bytes, TO_DEVICE)?,
            "pinned_to_device_gb_per_s": cuda.rate(device, pinned, bytes, TO_DEVICE)?,
            "device_to_pinned_gb_per_s": cuda.rate(pinned, device, bytes, TO_HOST)?,
        });
        println!("{figures}");
    }
    Ok(())
}
