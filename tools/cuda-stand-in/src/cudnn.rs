//! What the CUDA provider looks up in cuDNN: a handle, which attention asks for and does not use. The
//! real `libcudnn.so.9` forwards it to `libcudnn_graph.so.9`, in whose place this is, and asks that
//! which configuration of cuDNN it belongs to.

use std::ffi::{c_char, c_void};

use crate::answers::{answer, export, handle};
use crate::counters::{Counter, add};
use crate::fault::strikes;

const SUCCESS: i32 = 0;
const NOT_INITIALIZED: i32 = 1001;

export! {
    fn cudnnCreate(place: *mut *mut c_void) -> i32 {
        if strikes("cudnn") {
            return NOT_INITIALIZED;
        }
        add(Counter::DnnHandles, 1);
        *place = handle();
        SUCCESS
    }

    fn cudnnGetErrorString(status: i32) -> *const c_char {
        match status {
            SUCCESS => c"CUDNN_STATUS_SUCCESS",
            _ => c"CUDNN_STATUS_NOT_INITIALIZED",
        }
        .as_ptr()
    }
}

// The configuration of the whole cuDNN is 0.
answer!(SUCCESS; cudnnSetStream cudnnDestroy cudnnGetLibConfig);
