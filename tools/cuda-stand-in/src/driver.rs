//! The driver's interface: what fused attention looks up to load and launch its kernels, and what
//! the task itself asks before it loads a model.

use std::ffi::{c_char, c_int, c_uint, c_void};

use crate::answers::{answer, export, handle, refuse};
use crate::counters::{Counter, add, set};
use crate::fault::{self, NOT_SUPPORTED, SUCCESS, launch_status};
use crate::runtime::{attribute, error_name, error_text};

/// CUDA 13.0, as driver 580 has it.
pub(crate) const VERSION: c_int = 13_000;

answer!(fault::status();
    cuInit cuFuncSetAttribute cuFuncSetCacheConfig cuModuleUnload
    cuLinkAddData_v2 cuLinkAddFile_v2 cuLinkDestroy
);

answer!({ add(Counter::DriverLaunches, 1); launch_status() };
    cuLaunchKernel cuLaunchCooperativeKernel cuLaunchKernelEx
);

refuse!(NOT_SUPPORTED; cuTensorMapEncodeTiled cuModuleGetGlobal_v2 cuLinkCreate_v2 cuLinkComplete);

export! {
    fn cuDriverGetVersion(version: *mut c_int) -> i32 {
        *version = VERSION;
        SUCCESS
    }

    fn cuDeviceGetCount(count: *mut c_int) -> i32 {
        *count = 1;
        fault::status()
    }

    fn cuDeviceGet(device: *mut c_int, _ordinal: c_int) -> i32 {
        *device = 0;
        fault::status()
    }

    fn cuDeviceGetAttribute(value: *mut c_int, which: c_int, _device: c_int) -> i32 {
        *value = attribute(which);
        fault::status()
    }

    fn cuDevicePrimaryCtxSetFlags_v2(_device: c_int, flags: c_uint) -> i32 {
        set(Counter::ContextFlags, u64::from(flags) + 1);
        fault::status()
    }

    fn cuModuleLoadData(module: *mut *mut c_void, _image: *const c_void) -> i32 {
        *module = handle();
        fault::status()
    }

    fn cuModuleGetFunction(
        function: *mut *mut c_void,
        _module: *mut c_void,
        _name: *const c_char,
    ) -> i32 {
        *function = handle();
        fault::status()
    }

    fn cuFuncGetAttribute(value: *mut c_int, _which: c_int, _function: *mut c_void) -> i32 {
        *value = 0;
        fault::status()
    }

    fn cuGetErrorName(status: i32, name: *mut *const c_char) -> i32 {
        *name = error_name(status).as_ptr();
        SUCCESS
    }

    fn cuGetErrorString(status: i32, text: *mut *const c_char) -> i32 {
        *text = error_text(status).as_ptr();
        SUCCESS
    }
}
