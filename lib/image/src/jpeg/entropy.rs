//! Reading Huffman-coded data: the bits, and tables that give whole coefficients,
//! which libjpeg's do not.

use super::codestream::Huffman;

/// Bits that are looked up at once.
pub(super) const LOOKUP_BITS: u32 = 10;

/// Blocks of a unit that has several components: the format's own limit, and
/// libjpeg's.
pub(super) const MAX_BLOCKS_OF_UNIT: usize = 10;

/// Bits that a refilled window has at least.
pub(super) const REFILLED: u32 = 56;

/// Zigzag order to natural order. Runs may lead past the end of a block by up to
/// 31, which is noticed only once they were followed.
pub(super) const NATURAL: [u8; 128] = {
    let mut order = [63u8; 128];
    let (mut x, mut y, mut up, mut index) = (0i32, 0i32, true, 0);
    while index < 64 {
        order[index] = (y * 8 + x) as u8;
        index += 1;
        if up {
            if x == 7 {
                y += 1;
                up = false;
            } else if y == 0 {
                x += 1;
                up = false;
            } else {
                x += 1;
                y -= 1;
            }
        } else if y == 7 {
            x += 1;
            up = true;
        } else if x == 0 {
            y += 1;
            up = true;
        } else {
            x -= 1;
            y += 1;
        }
    }
    order
};

/// Place of coefficient `index` of the zigzag order in a block.
#[inline(always)]
pub(super) fn natural(index: usize) -> usize {
    usize::from(NATURAL[index & 127]) & 63
}

/// What the next bits are, in one word: the value in the high half; zeros before
/// the coefficient in the four bits from the eighth; the kind; bits to drop in the
/// low five.
type Entry = u32;

/// Bits of an entry that say how many bits it takes.
const LENGTH: Entry = 31;
/// Bits of an entry that say what it is.
const KIND: Entry = 3 << 5;
/// No code that is short enough.
const LONG: Entry = 0;
/// A code whose value is in the bits after it: the symbol.
const SYMBOL: Entry = 1 << 5;
/// A code with its value: a coefficient, or zero after fifteen others.
const WHOLE: Entry = 2 << 5;
/// The end of this many blocks, this one among them.
const END: Entry = 3 << 5;

/// What a code of coefficients means.
pub(super) enum Code {
    /// A coefficient after `run` zeros; zero after fifteen others, too.
    Value { run: u32, value: i16 },
    /// The end of this many blocks, this one among them.
    End { blocks: u32 },
}

/// What a table's symbols mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// Sizes of differences.
    Dc,
    /// Runs and sizes of coefficients.
    Sequential,
    /// The same, of coefficients without their `low` last bits, and ends of many
    /// blocks.
    First { low: u32 },
    /// The same, where each coefficient is new and has this bit alone.
    Refinement { low: u32 },
}

/// A Huffman table made for fast reading.
pub(super) struct Table {
    purpose: Purpose,
    lookup: Box<[Entry; 1 << LOOKUP_BITS]>,
    /// For each length: one past its largest code, shifted up to sixteen bits.
    limits: [u32; 17],
    /// For each length: what to add to a code to find its symbol.
    offsets: [i32; 17],
    symbols: Vec<u8>,
}

/// The number that `size` bits mean.
#[inline(always)]
pub(super) fn extend(bits: u32, size: u32) -> i32 {
    if size == 0 {
        0
    } else if bits < 1 << (size - 1) {
        bits as i32 - (1 << size) + 1
    } else {
        bits as i32
    }
}

impl Table {
    /// `None` where the code lengths do not make a code.
    pub(super) fn new(huffman: &Huffman, purpose: Purpose) -> Option<Self> {
        let mut table = Self {
            purpose,
            lookup: Box::new([LONG; 1 << LOOKUP_BITS]),
            limits: [0; 17],
            offsets: [0; 17],
            symbols: huffman.symbols.clone(),
        };
        if purpose == Purpose::Dc && huffman.symbols.iter().any(|&symbol| symbol > 15) {
            return None;
        }
        let (mut code, mut first) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(huffman.counts[length as usize - 1]);
            table.offsets[length as usize] = first as i32 - code as i32;
            // The code of all ones is not allowed.
            if count > 0 && code + count as u32 >= 1 << length {
                return None;
            }
            for (index, &symbol) in huffman
                .symbols
                .get(first..first + count)?
                .iter()
                .enumerate()
            {
                if length <= LOOKUP_BITS {
                    table.fill(code + index as u32, length, symbol);
                }
            }
            code += count as u32;
            first += count;
            table.limits[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Some(table)
    }

    fn fill(&mut self, code: u32, length: u32, symbol: u8) {
        let free = LOOKUP_BITS - length;
        for rest in 0..1u32 << free {
            // The next bits, as far as they are known.
            let next = |size: u32| (size <= free).then(|| rest >> (free - size));
            self.lookup[((code << free) | rest) as usize] =
                entry(symbol, length, self.purpose, next)
                    .unwrap_or(u32::from(symbol) << 16 | SYMBOL | length);
        }
    }
}

/// The entry of `symbol`, whose code has `length` bits, with its value; `None`
/// where the value is not in the known bits, or is not as it should be.
fn entry(
    symbol: u8,
    length: u32,
    purpose: Purpose,
    next: impl Fn(u32) -> Option<u32>,
) -> Option<Entry> {
    let (run, size) = (u32::from(symbol >> 4), u32::from(symbol & 15));
    let whole = |run: u32, value: i32, length: u32| {
        let value = i16::try_from(value).ok()?;
        Some(u32::from(value as u16) << 16 | run << 8 | WHOLE | length)
    };
    if purpose == Purpose::Dc {
        let value = extend(next(size)?, size);
        return whole(0, value, length + size);
    }
    match (purpose, run, size) {
        (_, 15, 0) => whole(15, 0, length),
        (Purpose::Sequential, _, 0) => Some(1 << 16 | END | length),
        (_, _, 0) => {
            let blocks = 1 << run | next(run)?;
            Some(blocks << 16 | END | (length + run))
        }
        (Purpose::First { low }, ..) => whole(run, extend(next(size)?, size) << low, length + size),
        (Purpose::Refinement { low }, _, 1) => whole(run, extend(next(1)?, 1) << low, length + 1),
        (Purpose::Refinement { .. }, ..) => None,
        _ => whole(run, extend(next(size)?, size), length + size),
    }
}

/// Something that these decoders leave to libjpeg.
pub(super) struct GiveUp;

pub(super) type Step<T> = Result<T, GiveUp>;

/// Bits of the scan, the next one highest.
pub(super) struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    bits: u64,
    count: u32,
    /// Zeros that were added after the last byte before a marker.
    padding: u32,
}

impl<'a> Bits<'a> {
    pub(super) fn new(data: &'a [u8]) -> Self {
        Self {
            data,
            at: 0,
            bits: 0,
            count: 0,
            padding: 0,
        }
    }

    #[cold]
    #[inline(never)]
    fn refill_slowly(&mut self) {
        while self.count < REFILLED {
            let byte = match (self.data.get(self.at), self.data.get(self.at + 1)) {
                (Some(0xff), Some(0)) => {
                    self.at += 2;
                    0xff
                }
                (Some(0xff) | None, _) => {
                    self.padding += 8;
                    0
                }
                (Some(&byte), _) => {
                    self.at += 1;
                    byte
                }
            };
            // What is below the counted bits may be left from a longer word.
            let kept = !0u64 << (63 - self.count) << 1;
            let kept = if self.count == 0 { 0 } else { kept };
            self.bits = (self.bits & kept) | u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
    }

    #[inline(always)]
    pub(super) fn window(&self) -> Window {
        Window {
            bits: self.bits,
            count: self.count,
            at: self.at,
        }
    }

    /// Whether more bits were read than there are.
    pub(super) fn is_overdrawn(&self) -> bool {
        self.count < self.padding
    }

    /// Whether what comes next is a marker, or the end, with less than a byte of
    /// bits before it.
    pub(super) fn is_at_marker(&mut self) -> bool {
        self.refill_slowly();
        !self.is_overdrawn() && self.padding > 0 && self.count - self.padding < 8
    }

    /// Goes on after restart marker `number`, which must be next.
    pub(super) fn restart(&mut self, number: u8) -> Step<()> {
        if !self.is_at_marker() || !self.rest().starts_with(&[0xff, 0xd0 | number]) {
            return Err(GiveUp);
        }
        self.at += 2;
        (self.bits, self.count, self.padding) = (0, 0, 0);
        Ok(())
    }

    /// Bytes that were not looked at.
    pub(super) fn rest(&self) -> &'a [u8] {
        &self.data[self.at.min(self.data.len())..]
    }
}

/// A copy of what is read most, for the registers.
#[derive(Clone, Copy)]
pub(super) struct Window {
    bits: u64,
    count: u32,
    at: usize,
}

impl Window {
    /// At least [`REFILLED`] bits, of which the last may be padding.
    #[inline(always)]
    pub(super) fn refill(&mut self, source: &mut Bits<'_>) {
        if let Some(next) = source.data.get(self.at..self.at + 8) {
            let word = u64::from_be_bytes(next.try_into().unwrap_or_default());
            // A byte of ones would need a closer look.
            let inverted = !word;
            let ones = inverted.wrapping_sub(0x0101_0101_0101_0101) & word & 0x8080_8080_8080_8080;
            if ones == 0 {
                self.bits |= word >> self.count;
                let taken = (63 - self.count) / 8;
                self.at += taken as usize;
                self.count += taken * 8;
                return;
            }
        }
        self.put_back(source);
        source.refill_slowly();
        *self = source.window();
    }

    /// At least `count` bits, up to [`REFILLED`].
    #[inline(always)]
    pub(super) fn need(&mut self, count: u32, source: &mut Bits<'_>) {
        if self.count < count {
            self.refill(source);
        }
    }

    /// Bits that there are.
    #[inline(always)]
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    #[inline(always)]
    pub(super) fn put_back(self, source: &mut Bits<'_>) {
        (source.bits, source.count, source.at) = (self.bits, self.count, self.at);
    }

    /// The next bits, as an index of a table.
    #[inline(always)]
    pub(super) fn index(&self) -> usize {
        (self.bits >> (64 - LOOKUP_BITS)) as usize
    }

    #[inline(always)]
    fn look_up(&self, table: &Table) -> Entry {
        table.lookup[self.index()]
    }

    #[inline(always)]
    pub(super) fn drop(&mut self, count: u32) {
        self.bits <<= count;
        self.count -= count;
    }

    #[inline(always)]
    pub(super) fn take(&mut self, count: u32) -> u64 {
        // Two shifts, since `count` may be zero.
        let value = self.bits >> 1 >> (63 - count);
        self.drop(count);
        value
    }

    /// The run and the size of an entry that has no value. Leaves at least 16 bits.
    #[inline(always)]
    fn symbol(&mut self, entry: Entry, table: &Table, source: &mut Bits<'_>) -> Step<(u32, u32)> {
        self.need(32, source);
        let (symbol, length) = if entry & KIND == SYMBOL {
            (entry >> 16, entry & LENGTH)
        } else {
            long_symbol((self.bits >> 48) as u32, table)?
        };
        self.drop(length);
        Ok((symbol >> 4, symbol & 15))
    }

    /// The next coefficient, or the end of the block. There must be [`LOOKUP_BITS`].
    #[inline(always)]
    pub(super) fn code(&mut self, table: &Table, source: &mut Bits<'_>) -> Step<Code> {
        let entry = self.look_up(table);
        if entry & WHOLE == 0 {
            return self.long_code(entry, table, source);
        }
        self.drop(entry & LENGTH);
        Ok(if entry & KIND == WHOLE {
            Code::Value {
                run: entry >> 8 & 15,
                value: (entry >> 16) as i16,
            }
        } else {
            Code::End {
                blocks: entry >> 16,
            }
        })
    }

    /// [`Self::code`], where the entry has no value.
    #[inline(always)]
    fn long_code(&mut self, entry: Entry, table: &Table, source: &mut Bits<'_>) -> Step<Code> {
        let (run, size) = self.symbol(entry, table, source)?;
        if size == 0 && run < 15 {
            let blocks = match table.purpose {
                Purpose::Sequential => 1,
                _ => 1 << run | self.take(run) as u32,
            };
            return Ok(Code::End { blocks });
        }
        let low = match table.purpose {
            Purpose::First { low } => low,
            // A new coefficient has one bit.
            Purpose::Refinement { .. } if size > 1 => return Err(GiveUp),
            Purpose::Refinement { low } => low,
            Purpose::Dc | Purpose::Sequential => 0,
        };
        let value = extend(self.take(size) as u32, size) << low;
        let value = i16::try_from(value).map_err(|_| GiveUp)?;
        Ok(Code::Value { run, value })
    }

    /// The next difference. There must be [`LOOKUP_BITS`].
    #[inline(always)]
    pub(super) fn difference(&mut self, table: &Table, source: &mut Bits<'_>) -> Step<i32> {
        let entry = self.look_up(table);
        if entry & KIND == WHOLE {
            self.drop(entry & LENGTH);
            return Ok(entry as i32 >> 16);
        }
        let (_, size) = self.symbol(entry, table, source)?;
        Ok(extend(self.take(size) as u32, size))
    }
}

/// The symbol of a code that is longer than the lookup, and the code's length;
/// `code` has sixteen bits from its beginning on.
#[cold]
#[inline(never)]
fn long_symbol(code: u32, table: &Table) -> Step<(u32, u32)> {
    for length in LOOKUP_BITS + 1..=16 {
        if code < table.limits[length as usize] {
            let index = (code >> (16 - length)) as i32 + table.offsets[length as usize];
            let symbol = usize::try_from(index)
                .ok()
                .and_then(|index| table.symbols.get(index))
                .ok_or(GiveUp)?;
            return Ok((u32::from(*symbol), length));
        }
    }
    Err(GiveUp)
}

/// Two coefficients at once, and the end of the block if it is in the same bits:
/// from the low byte on, bits to drop, zeros before the first, places from the first
/// zero to the second, places in all; then the second value and the first. Where
/// there is but one, it is both. Of the end alone both are zero.
#[derive(Clone, Copy)]
pub(super) struct Pair(u64);

/// What the end of a block counts for, in places: enough that no run leads there.
pub(super) const END_PLACES: usize = 128;

impl Pair {
    /// A second place that is in no block.
    const NONE: Self = Self(0xff << 16);

    fn from_entry(entry: Entry) -> Self {
        let length = u64::from(entry & LENGTH);
        let (run, value) = (u64::from(entry >> 8 & 15), u64::from(entry >> 16));
        match entry & KIND {
            WHOLE if value != 0 => {
                Self(value << 48 | value << 32 | (run + 1) << 24 | run << 16 | run << 8 | length)
            }
            END if value == 1 => Self((END_PLACES as u64) << 24 | length),
            _ => Self::NONE,
        }
    }

    /// This one and then `next`, if that is not one of those that come alone.
    fn then(self, next: Entry) -> Option<Self> {
        let next = Self::from_entry(next);
        let length = self.length() + next.length();
        if next.is_none() || length > LOOKUP_BITS {
            return None;
        }
        let places = self.places() + next.places();
        let (first, value) = self.first();
        let (second, other) = if next.places() == END_PLACES {
            self.second()
        } else {
            (self.places() + next.first().0, next.first().1)
        };
        let values = u64::from(value as u16) << 48 | u64::from(other as u16) << 32;
        let places = (places as u64) << 24 | (second as u64) << 16 | (first as u64) << 8;
        Some(Self(values | places | u64::from(length)))
    }

    fn is_none(self) -> bool {
        self.0 == Self::NONE.0
    }

    #[inline(always)]
    pub(super) fn length(self) -> u32 {
        u32::from(self.0 as u8)
    }

    #[inline(always)]
    pub(super) fn places(self) -> usize {
        usize::from((self.0 >> 24) as u8)
    }

    /// Places from here to the first value, and the value.
    #[inline(always)]
    pub(super) fn first(self) -> (usize, i16) {
        (usize::from((self.0 >> 8) as u8), (self.0 >> 48) as i16)
    }

    /// The same of the second. Where this leads to the last place of the block, or
    /// further, the codes have to be taken one by one: the last of them may not be
    /// this block's.
    #[inline(always)]
    pub(super) fn second(self) -> (usize, i16) {
        (usize::from((self.0 >> 16) as u8), (self.0 >> 32) as i16)
    }
}

/// A table of coefficients that gives two at once.
pub(super) struct Pairs {
    pub(super) single: Table,
    pairs: Box<[Pair; 1 << LOOKUP_BITS]>,
}

impl Pairs {
    pub(super) fn new(single: Table) -> Self {
        let mut pairs = Box::new([Pair::NONE; 1 << LOOKUP_BITS]);
        let rest = |index: usize, length: u32| (index << length) & ((1 << LOOKUP_BITS) - 1);
        for (index, pair) in pairs.iter_mut().enumerate() {
            *pair = Pair::from_entry(single.lookup[index]);
            // One more coefficient, and then the end.
            for may_be_value in [true, false] {
                if pair.is_none() || pair.places() >= END_PLACES {
                    break;
                }
                let next = single.lookup[rest(index, pair.length())];
                if next & KIND == WHOLE && !may_be_value {
                    break;
                }
                *pair = match pair.then(next) {
                    Some(both) => both,
                    None => break,
                };
            }
        }
        Self { single, pairs }
    }

    #[inline(always)]
    pub(super) fn look_up(&self, window: &Window) -> Pair {
        self.pairs[window.index()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zigzag_visits_all_and_begins_and_ends_as_in_the_standard() {
        let mut seen = [false; 64];
        for &place in &NATURAL[..64] {
            seen[usize::from(place)] = true;
        }
        assert!(seen.iter().all(|&seen| seen));
        assert_eq!(NATURAL[..10], [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]);
        assert_eq!(NATURAL[60..64], [47, 55, 62, 63]);
    }

    #[test]
    fn values_extend_as_in_the_standard() {
        assert_eq!(extend(0, 0), 0);
        assert_eq!((extend(0, 1), extend(1, 1)), (-1, 1));
        assert_eq!((extend(0, 3), extend(3, 3), extend(4, 3)), (-7, -4, 4));
    }

    /// Codes 0, 10 and 110 for a coefficient of one bit, the end, and one of two
    /// bits after a zero.
    fn table() -> Table {
        let mut counts = [0; 16];
        counts[..3].copy_from_slice(&[1, 1, 1]);
        let huffman = Huffman {
            counts,
            symbols: vec![0x01, 0x00, 0x12],
        };
        Table::new(&huffman, Purpose::Sequential).unwrap()
    }

    #[test]
    fn pairs_hold_what_follows_in_the_same_bits() {
        let pairs = Pairs::new(table());
        let pair = |bits: &str| {
            let bits = format!("{bits:0<width$}", width = LOOKUP_BITS as usize);
            pairs.pairs[usize::from_str_radix(&bits, 2).unwrap()]
        };
        // One of value 1, one of −3 after a zero, and the end.
        let three = pair("01 110 00 10".replace(' ', "").as_str());
        assert_eq!((three.first(), three.second()), ((0, 1), (2, -3)));
        assert_eq!((three.length(), three.places()), (9, 3 + END_PLACES));
        // The end alone, whatever follows.
        let end = pair("1001");
        assert_eq!((end.length(), end.places()), (2, END_PLACES));
        // One coefficient, then a code of which nothing is known.
        let one = pair("0111111111");
        assert_eq!((one.first(), one.second()), ((0, 1), (0, 1)));
        assert_eq!((one.length(), one.places()), (2, 1));
        assert!(pair("111").is_none());
    }
}
