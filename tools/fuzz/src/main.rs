//! libFuzzer around the target that `FUZZ_TARGET` names.
#![no_main]

use std::sync::OnceLock;

static TARGET: OnceLock<fuzz::Target> = OnceLock::new();

// What GCC calls at each branch of the C libraries, with `-fsanitize-coverage=trace-pc`;
// libFuzzer looks at Rust's own counters and at this table.
std::arch::global_asm!(
    ".globl __sanitizer_cov_trace_pc",
    "__sanitizer_cov_trace_pc:",
    "mov rax, [rsp]",
    "movzx eax, ax",
    "lea rcx, [rip + fuzz_c_branches]",
    "inc byte ptr [rax + rcx]",
    "ret",
    ".pushsection __libfuzzer_extra_counters, \"aw\"",
    "fuzz_c_branches: .zero 65536",
    ".popsection",
);

fn begin() {
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let target = fuzz::TARGETS.iter().find(|(known, _)| *known == name);
    let (_, target) = target.unwrap_or_else(|| panic!("FUZZ_TARGET is {name:?}, no target"));
    TARGET.get_or_init(|| *target);
    fuzz::memory::watch();
}

libfuzzer_sys::fuzz_target!(init: begin(), |bytes: &[u8]| {
    if let Some(target) = TARGET.get() {
        target(bytes);
    }
});
