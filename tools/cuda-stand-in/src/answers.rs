//! How functions of C's interface are written here.

/// Exports functions under C's rules.
macro_rules! export {
    ($(fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> $result $body
        )*
    };
}

/// Exports functions that only answer with a status. Whatever arguments they are given stay with the
/// caller, as on x86-64 they may.
macro_rules! answer {
    ($status:expr; $($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            pub extern "C" fn $name() -> i32 {
                $status
            }
        )*
    };
}

/// Exports functions that the model's graph has no use for. One that is called all the same says so:
/// then the rehearsal says nothing about it.
macro_rules! refuse {
    ($status:expr; $($name:ident)*) => {
        $(
            #[unsafe(no_mangle)]
            pub extern "C" fn $name() -> i32 {
                eprintln!("cuda-stand-in: {} is not stood in for", stringify!($name));
                $status
            }
        )*
    };
}

pub(crate) use {answer, export, refuse};

use std::ffi::c_void;

/// A handle of whatever kind: an address that is not null and is never followed.
pub(crate) fn handle() -> *mut c_void {
    static HANDLE: u64 = 0;
    (&raw const HANDLE).cast_mut().cast()
}
