//! The first image file directory, classic or BigTIFF.

use super::TIFF;
use crate::error::Result;
use std::collections::HashMap;

/// A directory can hold 65,535 entries; BigTIFF's count is 64 bits wide, so a
/// hostile one is cut here.
const MAX_ENTRIES: u64 = 65_535;

/// Values of a tag that are looked at, where they are not one for each strip: a colour
/// map has three times 256.
const MAX_VALUES: usize = 1024;

#[derive(Clone, Copy)]
struct Entry<'a> {
    kind: u16,
    data: &'a [u8],
}

pub(super) struct Directory<'a> {
    big: bool,
    entries: HashMap<u16, Entry<'a>>,
}

fn size_of(kind: u16) -> Option<usize> {
    Some(match kind {
        1 | 2 | 6 | 7 => 1,
        3 | 8 => 2,
        4 | 9 | 11 | 13 => 4,
        5 | 10 | 12 | 16 => 8,
        _ => return None,
    })
}

fn unsigned(big: bool, bytes: &[u8]) -> u64 {
    let fold = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
    if big {
        bytes.iter().fold(0, fold)
    } else {
        bytes.iter().rev().fold(0, fold)
    }
}

impl<'a> Directory<'a> {
    /// Reads what can be read: a cut directory keeps the entries before the cut.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self> {
        let Some(head) = bytes.get(..8) else {
            return Err(TIFF.truncated("header"));
        };
        let big = match &head[..4] {
            b"MM\0*" | b"MM*\0" | b"MM\0+" => true,
            b"II*\0" | b"II\0*" | b"II+\0" => false,
            _ => return Err(TIFF.corrupt("no signature")),
        };
        let wide = head[2] == 43;
        let number = |at: usize, length: usize| {
            let end = at.checked_add(length)?;
            Some(unsigned(big, bytes.get(at..end)?))
        };
        let first = if wide { number(8, 8) } else { number(4, 4) };
        let Some(first) = first.filter(|&first| first > 0) else {
            return Err(TIFF.corrupt("no directory"));
        };
        let mut directory = Self {
            big,
            entries: HashMap::new(),
        };
        let (count_size, entry_size, field) = if wide { (8, 20, 8) } else { (2, 12, 4) };
        let first = usize::try_from(first).unwrap_or(usize::MAX);
        let Some(count) = number(first, count_size) else {
            return Err(TIFF.truncated(format!("no directory at byte {first}")));
        };
        let mut total: u64 = 0;
        for index in 0..count.min(MAX_ENTRIES) as usize {
            let at = first + count_size + index * entry_size;
            let (Some(tag), Some(kind), Some(values)) =
                (number(at, 2), number(at + 2, 2), number(at + 4, field))
            else {
                break;
            };
            if bytes.len() < at + entry_size {
                break;
            }
            let (tag, kind) = (tag as u16, kind as u16);
            let Some(unit) = size_of(kind) else {
                continue;
            };
            if directory.entries.contains_key(&tag) {
                continue;
            }
            let Some(size) = values.checked_mul(unit as u64) else {
                continue;
            };
            let inside = at + 4 + field;
            let data = if size <= field as u64 {
                &bytes[inside..inside + size as usize]
            } else {
                total = total.saturating_add(size);
                if total > bytes.len() as u64 {
                    continue;
                }
                let offset = number(inside, field).unwrap_or(u64::MAX);
                let end = offset.saturating_add(size);
                if end > bytes.len() as u64 {
                    break;
                }
                &bytes[offset as usize..end as usize]
            };
            if !data.is_empty() {
                directory.entries.insert(tag, Entry { kind, data });
            }
        }
        Ok(directory)
    }

    pub(super) fn is_big_endian(&self) -> bool {
        self.big
    }

    pub(super) fn has(&self, tag: u16) -> bool {
        self.entries.contains_key(&tag)
    }

    /// The bytes of a tag, as they are.
    pub(super) fn bytes(&self, tag: u16) -> Option<&'a [u8]> {
        self.entries.get(&tag).map(|entry| entry.data)
    }

    /// The values of a tag that holds whole numbers.
    pub(super) fn values(&self, tag: u16) -> Option<Values<'a>> {
        let entry = self.entries.get(&tag)?;
        if !matches!(entry.kind, 1 | 3 | 4 | 6 | 7 | 8 | 9 | 13 | 16) {
            return None;
        }
        Some(Values {
            big: self.big,
            unit: size_of(entry.kind)?,
            data: entry.data,
        })
    }

    /// The first values of a tag, more than any that describes pixels has.
    pub(super) fn numbers(&self, tag: u16) -> Option<Vec<u64>> {
        let values = self.values(tag)?;
        Some(
            (0..MAX_VALUES)
                .map_while(|index| values.get(index))
                .collect(),
        )
    }

    /// The first value of a tag.
    pub(super) fn number(&self, tag: u16) -> Option<u64> {
        self.values(tag)?.get(0)
    }
}

/// Whole numbers as they lie in the file.
#[derive(Clone, Copy)]
pub(super) struct Values<'a> {
    big: bool,
    unit: usize,
    data: &'a [u8],
}

impl Values<'_> {
    pub(super) fn len(&self) -> usize {
        self.data.len() / self.unit
    }

    pub(super) fn get(&self, index: usize) -> Option<u64> {
        let start = index.checked_mul(self.unit)?;
        let value = self.data.get(start..start.checked_add(self.unit)?)?;
        Some(unsigned(self.big, value))
    }
}
