//! cuBLAS and cuBLASLt.

use std::ffi::{c_char, c_int, c_void};

use crate::answers::{answer, export, handle, refuse};
use crate::counters::{Counter, add};
use crate::fault::{self, strikes};

const SUCCESS: i32 = 0;
const EXECUTION_FAILED: i32 = 13;
const NOT_SUPPORTED: i32 = 15;

/// What cuBLASLt's heuristic answers.
#[repr(C)]
pub struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

fn product() -> i32 {
    add(Counter::Products, 1);
    if strikes("product") || fault::status() != fault::SUCCESS {
        return EXECUTION_FAILED;
    }
    SUCCESS
}

/// A handle cannot be had where the device is gone.
unsafe fn make(place: *mut *mut c_void) -> i32 {
    *place = handle();
    if fault::status() == fault::SUCCESS {
        SUCCESS
    } else {
        1
    }
}

answer!(product();
    cublasSgemm_v2 cublasGemmEx cublasGemmStridedBatchedEx cublasGemmBatchedEx
    cublasSgemmBatched cublasSgemmStridedBatched cublasLtMatmul
);

answer!(SUCCESS;
    cublasDestroy_v2 cublasSetStream_v2 cublasSetMathMode
    cublasLtDestroy
    cublasLtMatmulAlgoConfigSetAttribute cublasLtMatmulAlgoInit
    cublasLtMatmulDescDestroy cublasLtMatmulDescSetAttribute
    cublasLtMatmulPreferenceDestroy cublasLtMatmulPreferenceSetAttribute
    cublasLtMatrixLayoutDestroy cublasLtMatrixLayoutSetAttribute
    cublasLtMatrixTransformDescDestroy
);

refuse!(NOT_SUPPORTED;
    cublasDgeam cublasDgemmBatched cublasDgemmStridedBatched cublasDgemm_v2 cublasDgetrfBatched
    cublasDgetriBatched cublasScopy_v2 cublasSgeam cublasSgetrfBatched cublasSgetriBatched
    cublasSscal_v2 cublasLtMatrixTransform
);

export! {
    fn cublasCreate_v2(place: *mut *mut c_void) -> i32 { make(place) }
    fn cublasLtCreate(place: *mut *mut c_void) -> i32 { make(place) }
    fn cublasLtMatmulDescCreate(place: *mut *mut c_void) -> i32 { make(place) }
    fn cublasLtMatmulPreferenceCreate(place: *mut *mut c_void) -> i32 { make(place) }
    fn cublasLtMatrixLayoutCreate(place: *mut *mut c_void) -> i32 { make(place) }
    fn cublasLtMatrixTransformDescCreate(place: *mut *mut c_void) -> i32 { make(place) }

    fn cublasGetMathMode(_blas: *mut c_void, mode: *mut c_int) -> i32 {
        *mode = 0;
        SUCCESS
    }

    fn cublasLtMatmulAlgoGetHeuristic(
        _blas: *mut c_void,
        _operation: *mut c_void,
        _a: *mut c_void,
        _b: *mut c_void,
        _c: *mut c_void,
        _d: *mut c_void,
        _preference: *mut c_void,
        wanted: c_int,
        results: *mut Heuristic,
        found: *mut c_int,
    ) -> i32 {
        if wanted > 0 {
            results.write(Heuristic {
                algorithm: [0; 8],
                workspace: 0,
                state: SUCCESS,
                waves: 1.0,
                reserved: [0; 4],
            });
        }
        *found = wanted.min(1);
        SUCCESS
    }

    fn cublasGetStatusName(status: i32) -> *const c_char {
        match status {
            SUCCESS => c"CUBLAS_STATUS_SUCCESS",
            EXECUTION_FAILED => c"CUBLAS_STATUS_EXECUTION_FAILED",
            NOT_SUPPORTED => c"CUBLAS_STATUS_NOT_SUPPORTED",
            _ => c"CUBLAS_STATUS_NOT_INITIALIZED",
        }.as_ptr()
    }

    fn cublasGetStatusString(status: i32) -> *const c_char {
        cublasGetStatusName(status)
    }
}
