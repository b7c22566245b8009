//! Both ways of decoding a file side by side, for tests and for the fuzzer.

use super::{codestream, libjpeg};
use crate::raster::{Collect, Sink};
use crate::resample::Crop;
use std::cell::Cell;

thread_local! {
    /// Files of this thread that libjpeg did not have to decode.
    pub(crate) static OWN_DECODES: Cell<u32> = const { Cell::new(0) };
    /// Whether a block of this thread had samples so far out of range that plain C
    /// wraps around where the reference's vector code saturates.
    static IS_OUT_OF_RANGE: Cell<bool> = const { Cell::new(false) };
}

/// Looks at a block that is transformed here.
pub(crate) fn note_range(coefficients: &[i16; 64], quantisers: &[u16; 64]) {
    /// libjpeg's tables of what to limit reach this far from the middle.
    const REACH: f64 = 500.0;
    /// What sixteen bits hold between the passes, which scale by eight in all.
    const SUM: f64 = 4000.0;
    let scaled: Vec<f64> = coefficients
        .iter()
        .zip(quantisers)
        .map(|(&value, &quantiser)| f64::from(value) * f64::from(quantiser))
        .collect();
    let sum: f64 = scaled.iter().map(|value| value.abs()).sum();
    if sum / 4.0 < REACH {
        return;
    }
    let wave = |order: usize, at: usize| {
        let norm = if order == 0 { 0.5f64.sqrt() } else { 1.0 };
        norm * (((2 * at + 1) * order) as f64 * std::f64::consts::PI / 16.0).cos() / 2.0
    };
    let waves: [[f64; 8]; 8] =
        std::array::from_fn(|at| std::array::from_fn(|order| wave(order, at)));
    let columns: [[f64; 8]; 8] = std::array::from_fn(|x| {
        std::array::from_fn(|y| (0..8).map(|v| scaled[v * 8 + x] * waves[y][v]).sum())
    });
    let is_in_range = columns.iter().flatten().all(|value| value.abs() < SUM)
        && scaled
            .iter()
            .all(|value| value.abs() < f64::from(i16::MAX) / 2.0)
        && (0..8).all(|y| {
            (0..8).all(|x| {
                let sample: f64 = (0..8).map(|u| columns[u][y] * waves[x][u]).sum();
                sample.abs() < REACH
            })
        });
    if !is_in_range {
        IS_OUT_OF_RANGE.set(true);
    }
}

/// Who decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Libjpeg,
    Own,
}

/// What comes of a file: the pixels, or why there are none.
pub(crate) fn outcome(
    bytes: &[u8],
    eighths: u32,
    is_whole: bool,
    way: Way,
) -> Result<Vec<u8>, String> {
    let mut frame = codestream::scan(bytes).map_err(|error| error.to_string())?;
    if way == Way::Libjpeg {
        (frame.scan, frame.progression) = (None, None);
    }
    let mut collect = Collect::default();
    let mut crop = Crop::new(16);
    let sink: &mut dyn Sink = if is_whole { &mut collect } else { &mut crop };
    libjpeg::decode(bytes, &frame, eighths, sink).map_err(|error| error.to_string())?;
    if is_whole {
        return Ok(collect
            .into_raster()
            .map_or(Vec::new(), |raster| raster.data));
    }
    let mut out = vec![0; 16 * 16 * 3];
    assert!(crop.finish(&mut out));
    Ok(out)
}

/// What differs between both ways of decoding `bytes`.
pub(crate) fn disagreement(bytes: &[u8], is_whole: bool) -> Option<String> {
    let libjpeg = outcome(bytes, 8, is_whole, Way::Libjpeg);
    IS_OUT_OF_RANGE.set(false);
    let own = outcome(bytes, 8, is_whole, Way::Own);
    let lengths = (own.as_ref().map(Vec::len), libjpeg.as_ref().map(Vec::len));
    if own == libjpeg || IS_OUT_OF_RANGE.get() && lengths.0 == lengths.1 {
        return None;
    }
    let mut pairs = own.iter().flatten().zip(libjpeg.iter().flatten());
    let place = pairs.position(|(a, b)| a != b);
    Some(format!(
        "{:?}, not {:?}, first difference at {place:?}",
        lengths.0, lengths.1
    ))
}
