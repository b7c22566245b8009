//! What one image may cost in time and in work that its file can lengthen. A decode
//! runs on one thread, from [`limited`] to its end, so both are that thread's.

use crate::error::{ImageError, Result};
use std::cell::Cell;
use std::time::Duration;

/// Calls of [`check`] between two looks at the clock.
const CALLS_PER_LOOK: u32 = 256;

/// Bytes of input that are worked on between two calls of [`look`].
pub(crate) const PIECE_BYTES: usize = 64 * 1024;

/// Scans that any JPEG may have, whatever its size: the usual script has ten.
const FREE_SCANS: u64 = 16;

/// Blocks times scans that all JPEG data of one image may ask for beyond that.
/// Arithmetic scans, the slowest, take about 0.15 µs for each.
const MAX_SCAN_BLOCKS: u64 = 40_000_000;

/// Bytes of compressed strips that a TIFF may have read, for each of its own: some
/// writers let equal strips share their data.
const SHARED_FACTOR: u64 = 2;

/// And beyond that.
const SHARED_BYTES: u64 = 16 * 1024 * 1024;

/// Bytes of tiles that a TIFF may have expanded, for each of the image's own: those
/// at the edges reach over it.
const PADDING_FACTOR: u64 = 4;

/// And beyond that: a small image in one large tile.
const PADDING_BYTES: u64 = 64 * 1024 * 1024;

#[derive(Clone, Copy)]
struct Running {
    /// Time that the thread had spent before.
    started: Duration,
    limit: Duration,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
    static CALLS: Cell<u32> = const { Cell::new(0) };
    static SCAN_BLOCKS: Cell<u64> = const { Cell::new(0) };
}

/// Takes the limit away again, also when the work panics.
struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        RUNNING.set(None);
    }
}

/// What this thread has computed. A decode never waits, so this is all that can grow
/// without end; and on a machine that is busy with other things an innocent file would
/// be refused, for good, by the clock on the wall.
fn spent() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid to write to; where there is no such clock it stays zero.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

/// Runs the decode of one image, which [`check`] ends once it took `limit`.
pub(crate) fn limited<T>(limit: Duration, work: impl FnOnce() -> T) -> T {
    let started = spent();
    RUNNING.set(Some(Running { started, limit }));
    SCAN_BLOCKS.set(0);
    let _guard = Guard;
    work()
}

/// Refuses the image once its time is over. For loops of short rounds.
#[inline]
pub(crate) fn check() -> Result<()> {
    let calls = CALLS.get();
    CALLS.set(calls.wrapping_add(1));
    if calls.is_multiple_of(CALLS_PER_LOOK) {
        look()?;
    }
    Ok(())
}

/// What [`ImageError::LimitExceeded`] calls the time limit.
pub const WORK_LIMIT: &str = "milliseconds of work";

/// [`check`], for loops of long rounds.
pub(crate) fn look() -> Result<()> {
    let Some(Running { started, limit }) = RUNNING.get() else {
        return Ok(());
    };
    exceeds(
        WORK_LIMIT,
        spent().saturating_sub(started).as_millis(),
        limit.as_millis(),
    )
}

fn exceeds(what: &'static str, needed: u128, limit: u128) -> Result<()> {
    if needed <= limit {
        return Ok(());
    }
    let number = |value: u128| u64::try_from(value).unwrap_or(u64::MAX);
    Err(ImageError::LimitExceeded {
        what,
        needed: number(needed),
        limit: number(limit),
    })
}

/// Refuses JPEG data that is at scan `scans` of `blocks` blocks each, if that is too
/// much with what the image's other JPEG data took.
pub(crate) fn check_scans(scans: u64, blocks: u64) -> Result<()> {
    if scans <= FREE_SCANS && SCAN_BLOCKS.get() == 0 {
        return Ok(());
    }
    let needed = SCAN_BLOCKS
        .get()
        .saturating_add(scans.saturating_mul(blocks));
    exceeds("blocks in scans", needed.into(), MAX_SCAN_BLOCKS.into())
}

/// Adds JPEG data that was decoded as one of many parts of the image.
pub(crate) fn spend_scans(scans: u64, blocks: u64) {
    SCAN_BLOCKS.set(
        SCAN_BLOCKS
            .get()
            .saturating_add(scans.saturating_mul(blocks)),
    );
}

/// Refuses a TIFF whose strips have so many bytes because they share them.
pub(crate) fn check_shared(needed: u64, file: u64) -> Result<()> {
    let limit = file
        .saturating_mul(SHARED_FACTOR)
        .saturating_add(SHARED_BYTES);
    exceeds("bytes of strips", needed.into(), limit.into())
}

/// Refuses a TIFF whose tiles expand to so many bytes more than the image has.
pub(crate) fn check_padding(needed: u64, image: u64) -> Result<()> {
    let limit = image
        .saturating_mul(PADDING_FACTOR)
        .saturating_add(PADDING_BYTES);
    exceeds("bytes of tiles", needed.into(), limit.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_that_is_over_is_refused_with_both_figures() {
        assert_eq!(limited(Duration::from_secs(60), look), Ok(()));
        let refusal = limited(Duration::from_millis(2), || {
            while RUNNING
                .get()
                .is_some_and(|running| spent() - running.started < Duration::from_millis(4))
            {
            }
            look()
        });
        let Err(ImageError::LimitExceeded {
            what: WORK_LIMIT,
            needed: 4..,
            limit: 2,
        }) = refusal
        else {
            panic!("{refusal:?}");
        };
        // Without a decode there is no limit.
        assert_eq!(look(), Ok(()));
    }

    #[test]
    fn many_scans_are_refused_only_where_they_are_work() {
        limited(Duration::MAX, || {
            assert_eq!(check_scans(FREE_SCANS, u64::MAX), Ok(()));
            assert_eq!(check_scans(1000, MAX_SCAN_BLOCKS / 1000), Ok(()));
            assert!(check_scans(FREE_SCANS + 1, MAX_SCAN_BLOCKS / FREE_SCANS).is_err());
            spend_scans(1, MAX_SCAN_BLOCKS);
            assert!(check_scans(1, 1).is_err());
        });
    }
}
