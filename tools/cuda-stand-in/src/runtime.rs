//! The CUDA runtime.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::{LazyLock, Mutex, PoisonError};

use crate::answers::{answer, export, handle, refuse};
use crate::counters::{Counter, add};
use crate::driver::VERSION;
use crate::fault::{
    self, ILLEGAL_ADDRESS, NO_DEVICE, NO_KERNEL_IMAGE, NOT_SUPPORTED, OUT_OF_MEMORY, SUCCESS,
    launch_status, remember, strikes,
};
use crate::memory;

/// A T4: compute capability 7.5.
const MAJOR: c_int = 7;
const MINOR: c_int = 5;
const MULTIPROCESSORS: c_int = 40;
const THREADS_PER_BLOCK: c_int = 1024;
const SHARED_PER_BLOCK: c_int = 49_152;
const SHARED_PER_MULTIPROCESSOR: c_int = 65_536;
const REGISTERS: c_int = 65_536;

/// Bytes of `cudaDeviceProp`, and where in it things are (CUDA 13.0's driver_types.h).
const PROPERTIES_BYTES: usize = 1008;
const TOTAL_MEMORY_AT: usize = 288;
const SHARED_PER_BLOCK_AT: usize = 296;
const INTEGERS_AT: &[(usize, c_int)] = &[
    (304, REGISTERS),
    (308, 32),
    (320, THREADS_PER_BLOCK),
    (324, THREADS_PER_BLOCK),
    (328, THREADS_PER_BLOCK),
    (332, 64),
    (336, c_int::MAX),
    (340, 65_535),
    (344, 65_535),
    (360, MAJOR),
    (364, MINOR),
    (384, MULTIPROCESSORS),
    (392, 1),
    (560, 1),
    (584, 3),
    (588, 1),
    (596, 4_194_304),
    (604, 1024),
    (608, 1),
    (632, REGISTERS),
    (668, 1),
    (688, 16),
];
const SHARED_PER_MULTIPROCESSOR_AT: usize = 624;
const SHARED_OPT_IN_AT: usize = 672;

/// `cudaFuncAttributes`.
#[repr(C)]
pub struct FunctionAttributes {
    shared: usize,
    constant: usize,
    local: usize,
    threads_per_block: c_int,
    registers: c_int,
    ptx_version: c_int,
    binary_version: c_int,
    cache_mode: c_int,
    dynamic_shared: c_int,
    rest: [c_int; 24],
}

/// `cudaPointerAttributes`.
#[repr(C)]
pub struct PointerAttributes {
    kind: c_int,
    device: c_int,
    device_pointer: *mut c_void,
    host_pointer: *mut c_void,
    reserved: [i64; 8],
}

/// The value of a device attribute, whose numbers runtime and driver share.
pub(crate) fn attribute(which: c_int) -> c_int {
    match which {
        1..=4 => THREADS_PER_BLOCK,
        5 => c_int::MAX,
        6 | 7 => 65_535,
        8 => SHARED_PER_BLOCK,
        10 => 32,
        12 | 82 => REGISTERS,
        16 => MULTIPROCESSORS,
        19 | 31 | 41 | 78 | 95 => 1,
        38 => 4_194_304,
        39 => 1024,
        40 => 3,
        75 => MAJOR,
        76 => MINOR,
        81 | 97 => SHARED_PER_MULTIPROCESSOR,
        106 => 16,
        _ => 0,
    }
}

pub(crate) fn error_name(status: i32) -> &'static CStr {
    match status {
        SUCCESS => c"cudaSuccess",
        OUT_OF_MEMORY => c"cudaErrorMemoryAllocation",
        NO_DEVICE => c"cudaErrorNoDevice",
        NO_KERNEL_IMAGE => c"cudaErrorNoKernelImageForDevice",
        ILLEGAL_ADDRESS => c"cudaErrorIllegalAddress",
        _ => c"cudaErrorNotSupported",
    }
}

pub(crate) fn error_text(status: i32) -> &'static CStr {
    match status {
        SUCCESS => c"no error",
        OUT_OF_MEMORY => c"out of memory",
        NO_DEVICE => c"no CUDA-capable device is detected",
        NO_KERNEL_IMAGE => c"no kernel image is available for execution on the device",
        ILLEGAL_ADDRESS => c"an illegal memory access was encountered",
        _ => c"operation not supported",
    }
}

/// Pinned memory that is held, and how it was asked for.
static PINNED: LazyLock<Mutex<HashMap<usize, Layout>>> = LazyLock::new(Mutex::default);

fn pinned() -> std::sync::MutexGuard<'static, HashMap<usize, Layout>> {
    PINNED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pages, as pinned memory is.
const PAGE: usize = 4096;

unsafe fn allocate_pinned(place: *mut *mut c_void, bytes: usize) -> i32 {
    let status = fault::status();
    if status != SUCCESS {
        return status;
    }
    if strikes("pinned-memory") {
        return remember(OUT_OF_MEMORY);
    }
    let Ok(layout) = Layout::from_size_align(bytes.max(1), PAGE) else {
        return remember(OUT_OF_MEMORY);
    };
    let memory = alloc(layout);
    pinned().insert(memory.addr(), layout);
    *place = memory.cast();
    SUCCESS
}

fn launch() -> i32 {
    add(Counter::Launches, 1);
    launch_status()
}

unsafe fn make(place: *mut *mut c_void) -> i32 {
    *place = handle();
    fault::status()
}

answer!(launch();
    __cudaLaunchKernel cudaLaunchKernel cudaLaunchKernelExC cudaLaunchCooperativeKernel
);

answer!(fault::status();
    cudaSetDevice cudaDeviceSynchronize
    cudaEventDestroy cudaEventRecord cudaEventRecordWithFlags cudaEventSynchronize
    cudaStreamDestroy cudaStreamSynchronize cudaStreamWaitEvent
    cudaFuncSetAttribute cudaKernelSetAttributeForDevice
);

answer!(0;
    __cudaPushCallConfiguration __cudaRegisterFatBinaryEnd __cudaRegisterFunction
    __cudaRegisterVar __cudaUnregisterFatBinary
);

refuse!(remember(NOT_SUPPORTED);
    cudaEventElapsedTime cudaFreeAsync cudaGraphDestroy cudaGraphExecDestroy cudaGraphInstantiate
    cudaGraphLaunch cudaLibraryGetKernel cudaLibraryLoadData cudaLibraryUnload
    cudaMallocFromPoolAsync cudaMemPoolCreate cudaMemPoolDestroy cudaMemPoolGetAttribute
    cudaMemPoolSetAttribute cudaMemPoolTrimTo cudaMemcpy2DAsync cudaMemcpyFromSymbol
    cudaStreamBeginCapture cudaStreamEndCapture
);

export! {
    fn __cudaRegisterFatBinary(_binary: *mut c_void) -> *mut c_void { handle() }

    fn __cudaPopCallConfiguration(
        grid: *mut [c_uint; 3],
        block: *mut [c_uint; 3],
        shared: *mut usize,
        stream: *mut *mut c_void,
    ) -> i32 {
        *grid = [1; 3];
        *block = [1; 3];
        *shared = 0;
        *stream = std::ptr::null_mut();
        SUCCESS
    }

    fn __cudaGetKernel(kernel: *mut *const c_void, function: *const c_void) -> i32 {
        *kernel = function;
        SUCCESS
    }

    fn cudaGetDeviceCount(count: *mut c_int) -> i32 {
        let status = remember(fault::status());
        *count = c_int::from(status == SUCCESS);
        status
    }

    fn cudaGetDevice(device: *mut c_int) -> i32 {
        *device = 0;
        remember(fault::status())
    }

    fn cudaGetDeviceProperties(properties: *mut u8, _device: c_int) -> i32 {
        properties.write_bytes(0, PROPERTIES_BYTES);
        let name = b"Tesla T4 (stand-in)";
        properties.copy_from_nonoverlapping(name.as_ptr(), name.len());
        let large = [
            (TOTAL_MEMORY_AT, memory::TOTAL_BYTES),
            (SHARED_PER_BLOCK_AT, SHARED_PER_BLOCK as usize),
            (SHARED_PER_MULTIPROCESSOR_AT, SHARED_PER_MULTIPROCESSOR as usize),
            (SHARED_OPT_IN_AT, SHARED_PER_MULTIPROCESSOR as usize),
        ];
        for (at, value) in large {
            properties.add(at).cast::<usize>().write_unaligned(value);
        }
        for &(at, value) in INTEGERS_AT {
            properties.add(at).cast::<c_int>().write_unaligned(value);
        }
        remember(fault::status())
    }

    fn cudaDeviceGetAttribute(value: *mut c_int, which: c_int, _device: c_int) -> i32 {
        *value = attribute(which);
        fault::status()
    }

    fn cudaDriverGetVersion(version: *mut c_int) -> i32 {
        *version = VERSION;
        SUCCESS
    }

    fn cudaRuntimeGetVersion(version: *mut c_int) -> i32 {
        *version = VERSION;
        SUCCESS
    }

    fn cudaGetDriverEntryPointByVersion(
        symbol: *const c_char,
        function: *mut *mut c_void,
        _version: c_uint,
        _flags: c_ulonglong,
        found: *mut c_int,
    ) -> i32 {
        // A null library: whatever is loaded beside this one, and so itself.
        *function = libc::dlsym(std::ptr::null_mut(), symbol);
        if !found.is_null() {
            *found = c_int::from((*function).is_null());
        }
        fault::status()
    }

    fn cudaGetErrorName(status: i32) -> *const c_char { error_name(status).as_ptr() }
    fn cudaGetErrorString(status: i32) -> *const c_char { error_text(status).as_ptr() }
    fn cudaGetLastError() -> i32 { fault::take_last() }
    fn cudaPeekAtLastError() -> i32 { fault::last() }

    fn cudaEventCreate(event: *mut *mut c_void) -> i32 { make(event) }
    fn cudaEventCreateWithFlags(event: *mut *mut c_void, _flags: c_uint) -> i32 { make(event) }
    fn cudaStreamCreate(stream: *mut *mut c_void) -> i32 { make(stream) }
    fn cudaStreamCreateWithFlags(stream: *mut *mut c_void, _flags: c_uint) -> i32 { make(stream) }

    fn cudaStreamIsCapturing(_stream: *mut c_void, status: *mut c_int) -> i32 {
        *status = 0;
        fault::status()
    }

    fn cudaLaunchHostFunc(
        _stream: *mut c_void,
        function: extern "C" fn(*mut c_void),
        data: *mut c_void,
    ) -> i32 {
        function(data);
        fault::status()
    }

    fn cudaFuncGetAttributes(attributes: *mut FunctionAttributes, _function: *const c_void) -> i32 {
        attributes.write(FunctionAttributes {
            shared: 0,
            constant: 0,
            local: 0,
            threads_per_block: THREADS_PER_BLOCK,
            registers: 32,
            ptx_version: MAJOR * 10 + MINOR,
            binary_version: MAJOR * 10 + MINOR,
            cache_mode: 0,
            dynamic_shared: SHARED_PER_BLOCK,
            rest: [0; 24],
        });
        fault::status()
    }

    fn cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: *mut c_int,
        _function: *const c_void,
        _block: c_int,
        _shared: usize,
        _flags: c_uint,
    ) -> i32 {
        *blocks = 1;
        fault::status()
    }

    fn cudaMalloc(place: *mut *mut c_void, bytes: usize) -> i32 { memory::allocate(place, bytes) }
    fn cudaFree(pointer: *mut c_void) -> i32 { memory::free(pointer) }

    fn cudaMemGetInfo(free: *mut usize, total: *mut usize) -> i32 {
        *free = memory::free_bytes();
        *total = memory::TOTAL_BYTES;
        remember(fault::status())
    }

    fn cudaMallocHost(place: *mut *mut c_void, bytes: usize) -> i32 {
        allocate_pinned(place, bytes)
    }

    fn cudaHostAlloc(place: *mut *mut c_void, bytes: usize, _flags: c_uint) -> i32 {
        allocate_pinned(place, bytes)
    }

    fn cudaFreeHost(pointer: *mut c_void) -> i32 {
        if let Some(layout) = pinned().remove(&pointer.addr()) {
            dealloc(pointer.cast(), layout);
        }
        fault::status()
    }

    fn cudaMemcpy(to: *mut c_void, from: *const c_void, bytes: usize, _kind: c_int) -> i32 {
        memory::copy(to, from, bytes)
    }

    fn cudaMemcpyAsync(
        to: *mut c_void,
        from: *const c_void,
        bytes: usize,
        _kind: c_int,
        _stream: *mut c_void,
    ) -> i32 {
        memory::copy(to, from, bytes)
    }

    fn cudaMemset(to: *mut c_void, value: c_int, bytes: usize) -> i32 {
        memory::fill(to, value, bytes)
    }

    fn cudaMemsetAsync(to: *mut c_void, value: c_int, bytes: usize, _stream: *mut c_void) -> i32 {
        memory::fill(to, value, bytes)
    }

    fn cudaPointerGetAttributes(
        attributes: *mut PointerAttributes,
        pointer: *mut c_void,
    ) -> i32 {
        let is_device = memory::is_of_device(pointer);
        let is_pinned = pinned().contains_key(&pointer.addr());
        let null = std::ptr::null_mut();
        attributes.write(PointerAttributes {
            kind: if is_device { 2 } else { c_int::from(is_pinned) },
            device: 0,
            device_pointer: if is_device { pointer } else { null },
            host_pointer: if is_device { null } else { pointer },
            reserved: [0; 8],
        });
        fault::status()
    }
}
