//! CCITT run-length, Group 3 (one- and two-dimensional) and Group 4, with the
//! code tables of the `fax` crate. The lines are put together here because
//! TIFF's variants (no end-of-line codes, byte alignment, a known number of rows)
//! are not that crate's subject.

use super::TIFF;
use crate::budget;
use crate::error::Result;
use fax::BitReader;
use fax::maps::{Mode, black, mode, white};

/// How lines are coded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    /// Runs of one line, each line from a byte boundary, no codes between (2).
    Runs,
    /// Group 3: end-of-line codes, and perhaps two-dimensional lines (3).
    Group3 { two_dimensional: bool },
    /// Group 4: two-dimensional lines only (4).
    Group4,
}

/// Bits from the highest of each byte; zeros after the end.
struct Bits<'a> {
    data: &'a [u8],
    position: usize,
}

impl Bits<'_> {
    fn is_over(&self) -> bool {
        self.position >= self.data.len() * 8
    }

    fn look(&self, count: u8) -> u16 {
        let byte = |index: usize| u32::from(self.data.get(index).copied().unwrap_or(0));
        let at = self.position / 8;
        let window = byte(at) << 16 | byte(at + 1) << 8 | byte(at + 2);
        let shifted = window << (8 + self.position % 8);
        (shifted >> (32 - u32::from(count))) as u16
    }
}

impl BitReader for Bits<'_> {
    type Error = ();

    fn peek(&self, bits: u8) -> Option<u16> {
        if bits == 0 {
            return Some(0);
        }
        (!self.is_over()).then(|| self.look(bits))
    }

    fn consume(&mut self, bits: u8) -> std::result::Result<(), ()> {
        self.position += usize::from(bits);
        Ok(())
    }

    fn bits_to_byte_boundary(&self) -> u8 {
        ((8 - self.position % 8) % 8) as u8
    }
}

/// A run: make-up codes and the terminating one.
fn run(bits: &mut Bits<'_>, is_black: bool) -> Option<usize> {
    let mut length = 0;
    loop {
        let part = if is_black {
            black::decode(bits)?
        } else {
            white::decode(bits)?
        };
        length += usize::from(part);
        if part < 64 {
            return Some(length);
        }
    }
}

/// Changes of colour that libtiff has room for in a line: runs of no length count.
fn most_changes(width: usize) -> usize {
    2 * width.next_multiple_of(32)
}

/// Positions where the colour changes, of a line of runs, as far as it is sound.
fn one_dimensional(bits: &mut Bits<'_>, width: usize, changes: &mut Vec<usize>) -> Line {
    changes.clear();
    let (mut position, mut is_black) = (0, false);
    while position < width {
        if changes.len() > most_changes(width) {
            return Line::Broken;
        }
        let Some(length) = run(bits, is_black) else {
            return Line::Broken;
        };
        position += length;
        changes.push(position.min(width));
        is_black = !is_black;
    }
    Line::Good
}

/// The changes of the line above, read from left to right.
struct Reference<'a> {
    changes: &'a [usize],
    /// The first change right of where the line is.
    next: usize,
    width: usize,
}

impl Reference<'_> {
    /// The first change right of `from` (or at the left edge) to the colour opposite
    /// to `is_black`, and the one after it.
    fn after(&mut self, from: isize, is_black: bool) -> (usize, usize) {
        let is_right = |index: usize| self.changes[index] as isize > from;
        // A line goes back by a few pixels at most.
        while self.next > 0 && is_right(self.next - 1) {
            self.next -= 1;
        }
        while self.next < self.changes.len() && !is_right(self.next) {
            self.next += 1;
        }
        let first = self.next + usize::from(self.next % 2 != usize::from(is_black));
        let change = |index: usize| self.changes.get(index).copied().unwrap_or(self.width);
        (change(first), change(first + 1))
    }
}

/// What a line came to.
enum Line {
    Good,
    Broken,
    EndOfBlock,
}

fn two_dimensional(
    bits: &mut Bits<'_>,
    reference: &[usize],
    width: usize,
    changes: &mut Vec<usize>,
) -> Line {
    changes.clear();
    let mut reference = Reference {
        changes: reference,
        next: 0,
        width,
    };
    let (mut position, mut is_black) = (-1isize, false);
    while position < width as isize {
        if changes.len() > most_changes(width) {
            return Line::Broken;
        }
        let Some(code) = mode::decode(bits) else {
            return Line::Broken;
        };
        let (b1, b2) = reference.after(position, is_black);
        match code {
            Mode::Pass => position = b2 as isize,
            Mode::Vertical(delta) => {
                let target = b1 as isize + isize::from(delta);
                if target < position.max(0) {
                    return Line::Broken;
                }
                position = target.min(width as isize);
                changes.push(position as usize);
                is_black = !is_black;
                if position == 0 && b1 == 0 {
                    continue;
                }
            }
            Mode::Horizontal => {
                for _ in 0..2 {
                    let Some(length) = run(bits, is_black) else {
                        return Line::Broken;
                    };
                    position = (position.max(0) + length as isize).min(width as isize);
                    changes.push(position as usize);
                    is_black = !is_black;
                }
            }
            Mode::Extension => return Line::Broken,
            Mode::EOF => return Line::EndOfBlock,
        }
    }
    Line::Good
}

fn paint(changes: &[usize], width: usize, row: &mut [u8]) {
    row.fill(0);
    for pair in changes.chunks(2) {
        let start = pair[0].min(width);
        let end = pair.get(1).copied().unwrap_or(width).min(width);
        if start >= end {
            continue;
        }
        let (first, last) = (start / 8, (end - 1) / 8);
        let (from, to) = (0xff >> (start % 8), !(0x7f >> ((end - 1) % 8)));
        if first == last {
            row[first] |= from & to;
        } else {
            row[first] |= from;
            row[first + 1..last].fill(0xff);
            row[last] |= to;
        }
    }
}

/// Skips fill and an end-of-line code, if one is next. Fill is zeros, and no
/// other code begins with eleven of them.
fn skip_end_of_line(bits: &mut Bits<'_>) -> bool {
    if bits.look(11) != 0 || bits.is_over() {
        return false;
    }
    while !bits.is_over() && bits.look(1) == 0 {
        bits.position += 1;
    }
    bits.position += 1;
    true
}

/// Expands `data` to rows of `width` bits, black as one. Data may end early, and the rows
/// after it are white; but a broken code is an error, since what libtiff makes of the rest
/// of its line, and of all lines that refer to it, is nobody's picture.
pub(super) fn expand(data: &[u8], scheme: Scheme, width: usize, out: &mut [u8]) -> Result<()> {
    let row_bytes = width.div_ceil(8);
    let mut bits = Bits { data, position: 0 };
    let (mut reference, mut changes) = (Vec::new(), Vec::new());
    for (index, row) in out.chunks_exact_mut(row_bytes).enumerate() {
        budget::check()?;
        if scheme == Scheme::Runs {
            bits.position = bits.position.next_multiple_of(8);
        }
        let mut is_one = scheme == Scheme::Runs;
        if let Scheme::Group3 { two_dimensional } = scheme {
            let mut ends = 0;
            is_one = true;
            while skip_end_of_line(&mut bits) {
                ends += 1;
                if two_dimensional {
                    is_one = bits.look(1) == 1;
                    bits.position += 1;
                }
            }
            if ends >= 6 {
                break;
            }
        }
        if bits.is_over() {
            if index == 0 {
                return Err(TIFF.truncated("no line of CCITT data"));
            }
            break;
        }
        let line = if is_one {
            one_dimensional(&mut bits, width, &mut changes)
        } else {
            two_dimensional(&mut bits, &reference, width, &mut changes)
        };
        match line {
            Line::EndOfBlock if scheme == Scheme::Group4 && index > 0 => break,
            Line::Good => {}
            // The data ends in the line, or an end-of-line code comes early.
            Line::Broken if bits.is_over() => {}
            Line::Broken if scheme != Scheme::Group4 && bits.look(11) == 0 => {}
            Line::Broken | Line::EndOfBlock => {
                return Err(TIFF.corrupt(format!("line {index} of CCITT data is broken")));
            }
        }
        paint(&changes, width, row);
        std::mem::swap(&mut reference, &mut changes);
    }
    Ok(())
}
