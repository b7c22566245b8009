//! What a rehearsal sets.

use std::sync::OnceLock;

pub(crate) struct Settings {
    /// `CUDA_STAND_IN_IMAGE_BYTES`: bytes of one image's pixels.
    pub image_bytes: usize,
    /// `CUDA_STAND_IN_ROW_VALUES`: 32-bit values of one embedding.
    pub row_values: usize,
    /// `CUDA_STAND_IN_COUNTERS`: the file that counters are kept in.
    pub counters: Option<String>,
    /// `CUDA_STAND_IN_FAULT`: what fails, and from which call on, such as `product@40`.
    pub fault: Option<(String, u64, bool)>,
}

pub(crate) fn settings() -> &'static Settings {
    static SETTINGS: OnceLock<Settings> = OnceLock::new();
    SETTINGS.get_or_init(|| {
        let variable = |name: &str| std::env::var(format!("CUDA_STAND_IN_{name}")).ok();
        let number = |name: &str| variable(name).and_then(|value| value.parse().ok());
        Settings {
            image_bytes: number("IMAGE_BYTES").unwrap_or(0),
            row_values: number("ROW_VALUES").unwrap_or(0),
            counters: variable("COUNTERS"),
            fault: variable("FAULT").map(|fault| {
                let (what, when) = fault.split_once('@').unwrap_or((&fault, "1+"));
                let first = when.trim_end_matches('+').parse().unwrap_or(1);
                (what.to_owned(), first, when.ends_with('+'))
            }),
        }
    })
}
