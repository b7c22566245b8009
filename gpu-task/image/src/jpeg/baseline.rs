//! A decoder for the JPEG that nearly every camera and page writes: one
//! sequential scan with all components, Huffman-coded. It reads the bits with
//! tables that give whole coefficients, which libjpeg's do not.
//!
//! It gives up at the first thing that is not as it should be, and libjpeg
//! decodes the file from the start: what a broken file looks like, and whether
//! it is refused, stays libjpeg's word.

use super::assemble::{Assembly, Plane, Sampling};
use super::codestream::{Huffman, Scan};
use super::idct;
use crate::raster::Sink;

/// Codes up to this many bits are looked up at once.
const LOOKUP_BITS: u32 = 10;

/// Zigzag order to natural order; runs may overshoot by up to fifteen, which is
/// noticed only at the end of a block.
const NATURAL: [u8; 64 + 16] = {
    let mut order = [63u8; 80];
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

/// What the next bits are, in one word: the coefficient, or the symbol where the
/// kind is [`SYMBOL`], in the high half; zeros before the coefficient in the four
/// bits from the eighth; the kind; bits to drop in the low five.
type Entry = u32;

/// Bits of an entry that say how many bits it takes.
const LENGTH: Entry = 31;
/// Bits of an entry that say what it is.
const KIND: Entry = 3 << 5;
/// No code of at most `LOOKUP_BITS` bits.
const LONG: Entry = 0;
/// A code whose value is in the bits after it.
const SYMBOL: Entry = 1 << 5;
/// A code with its value.
const WHOLE: Entry = 2 << 5;

/// A Huffman table made for fast reading.
struct Table {
    lookup: Box<[Entry; 1 << LOOKUP_BITS]>,
    /// For each length: one past its largest code, shifted up to sixteen bits.
    limits: [u32; 17],
    /// For each length: what to add to a code to find its symbol.
    offsets: [i32; 17],
    symbols: Vec<u8>,
}

/// The number that `size` bits mean.
fn extend(bits: u32, size: u32) -> i32 {
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
    fn new(huffman: &Huffman, is_dc: bool) -> Option<Self> {
        let mut table = Self {
            lookup: Box::new([LONG; 1 << LOOKUP_BITS]),
            limits: [0; 17],
            offsets: [0; 17],
            symbols: huffman.symbols.clone(),
        };
        if is_dc && huffman.symbols.iter().any(|&symbol| symbol > 15) {
            return None;
        }
        let (mut code, mut first) = (0u32, 0usize);
        for length in 1..=16u32 {
            let count = usize::from(huffman.counts[length as usize - 1]);
            table.offsets[length as usize] = first as i32 - code as i32;
            for (index, &symbol) in huffman
                .symbols
                .get(first..first + count)?
                .iter()
                .enumerate()
            {
                if length <= LOOKUP_BITS {
                    table.fill(code + index as u32, length, symbol, is_dc);
                }
            }
            code += count as u32;
            first += count;
            // The code of all ones is not allowed.
            if count > 0 && code >= 1 << length {
                return None;
            }
            table.limits[length as usize] = code << (16 - length);
            code <<= 1;
        }
        Some(table)
    }

    fn fill(&mut self, code: u32, length: u32, symbol: u8, is_dc: bool) {
        let free = LOOKUP_BITS - length;
        let size = u32::from(symbol & 15);
        let run = if is_dc { 0 } else { u32::from(symbol >> 4) };
        for rest in 0..1u32 << free {
            let entry = &mut self.lookup[((code << free) | rest) as usize];
            *entry = if size > 0 && size <= free {
                let value = extend(rest >> (free - size), size);
                (value as u32) << 16 | run << 8 | WHOLE | (length + size)
            } else {
                u32::from(symbol) << 16 | SYMBOL | length
            };
        }
    }
}

/// Something that this decoder leaves to libjpeg.
struct GiveUp;

type Step<T> = Result<T, GiveUp>;

/// Bits of the scan, the next one highest.
struct Bits<'a> {
    data: &'a [u8],
    at: usize,
    bits: u64,
    count: u32,
    /// Zeros that were added after the last byte before a marker.
    padding: u32,
}

impl Bits<'_> {
    #[cold]
    #[inline(never)]
    fn refill_slowly(&mut self) {
        while self.count <= 55 {
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

    fn window(&self) -> Window {
        Window {
            bits: self.bits,
            count: self.count,
            at: self.at,
        }
    }

    /// Whether more bits were read than there are.
    fn is_overdrawn(&self) -> bool {
        self.count < self.padding
    }

    /// Goes on after restart marker `number`, which must be next.
    fn restart(&mut self, number: u8) -> Step<()> {
        self.refill_slowly();
        // Less than a byte may be left before the marker.
        if self.padding == 0 || self.count - self.padding >= 8 {
            return Err(GiveUp);
        }
        if self.data.get(self.at..self.at + 2) != Some(&[0xff, 0xd0 | number]) {
            return Err(GiveUp);
        }
        self.at += 2;
        (self.bits, self.count, self.padding) = (0, 0, 0);
        Ok(())
    }
}

/// A copy of what is read most, for the registers.
#[derive(Clone, Copy)]
struct Window {
    bits: u64,
    count: u32,
    at: usize,
}

impl Window {
    /// At least 48 bits, of which the last may be padding.
    #[inline(always)]
    fn refill(&mut self, source: &mut Bits<'_>) {
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

    fn put_back(self, source: &mut Bits<'_>) {
        (source.bits, source.count, source.at) = (self.bits, self.count, self.at);
    }

    #[inline(always)]
    fn look_up(&self, table: &Table) -> Entry {
        table.lookup[(self.bits >> (64 - LOOKUP_BITS)) as usize]
    }

    #[inline(always)]
    fn drop(&mut self, count: u32) {
        self.bits <<= count;
        self.count -= count;
    }

    #[inline(always)]
    fn take(&mut self, count: u32) -> u32 {
        // Two shifts, since `count` may be zero.
        let value = (self.bits >> 1 >> (63 - count)) as u32;
        self.drop(count);
        value
    }

    /// The symbol of an entry that has no value.
    #[inline(always)]
    fn symbol(&mut self, entry: Entry, table: &Table) -> Step<u32> {
        if entry & KIND == SYMBOL {
            self.drop(entry & LENGTH);
            return Ok(entry >> 16);
        }
        let (symbol, length) = long_symbol((self.bits >> 48) as u32, table)?;
        self.drop(length);
        Ok(symbol)
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

/// Reads one block. Coefficients are in natural order and zero before.
#[inline(always)]
fn read_block(
    source: &mut Bits<'_>,
    dc: &Table,
    ac: &Table,
    last_dc: &mut i32,
    block: &mut [i16; 64],
) -> Step<()> {
    let mut window = source.window();
    window.refill(source);
    let entry = window.look_up(dc);
    let difference = if entry & KIND == WHOLE {
        window.drop(entry & LENGTH);
        entry as i32 >> 16
    } else {
        let size = window.symbol(entry, dc)?;
        extend(window.take(size), size)
    };
    *last_dc = last_dc.wrapping_add(difference);
    block[0] = *last_dc as i16;
    let mut index = 1;
    while index < 64 {
        // A code and its value have at most 31 bits.
        if window.count < 32 {
            window.refill(source);
        }
        let entry = window.look_up(ac);
        if entry & KIND == WHOLE {
            window.drop(entry & LENGTH);
            index += (entry >> 8 & 15) as usize;
            block[usize::from(NATURAL[index]) & 63] = (entry >> 16) as i16;
            index += 1;
            continue;
        }
        let symbol = window.symbol(entry, ac)?;
        let (run, size) = (symbol as usize >> 4, symbol & 15);
        if size == 0 {
            if run != 15 {
                window.put_back(source);
                return Ok(());
            }
            index += 16;
            continue;
        }
        index += run;
        block[usize::from(NATURAL[index]) & 63] = extend(window.take(size), size) as i16;
        index += 1;
    }
    window.put_back(source);
    // A run past the end is an error, and so is a last run of sixteen zeros.
    if index == 64 { Ok(()) } else { Err(GiveUp) }
}

/// One component's way through the scan.
struct Component<'a> {
    dc: &'a Table,
    ac: &'a Table,
    quantisers: [u16; 64],
    across: usize,
    down: usize,
    last_dc: i32,
}

/// Decodes the scan in `data` into `assembly`. `false` where this is left to
/// libjpeg; rows may have gone out then, and all have to come again.
pub(super) fn decode(
    data: &[u8],
    scan: &Scan,
    quantisers: &[[u16; 64]],
    samplings: &[Sampling],
    assembly: &mut Assembly,
    sink: &mut dyn Sink,
) -> bool {
    let made = |tables: &[Option<Huffman>; 4], is_dc: bool| -> Vec<Option<Table>> {
        tables
            .iter()
            .map(|huffman| Table::new(huffman.as_ref()?, is_dc))
            .collect()
    };
    let (dc, ac) = (made(&scan.dc, true), made(&scan.ac, false));
    let mut components = Vec::with_capacity(quantisers.len());
    for (index, quantisers) in quantisers.iter().enumerate() {
        let (dc_index, ac_index) = scan.tables[index];
        let (Some(Some(dc)), Some(Some(ac))) = (dc.get(dc_index), ac.get(ac_index)) else {
            return false;
        };
        components.push(Component {
            dc,
            ac,
            quantisers: *quantisers,
            across: samplings[index].across,
            down: samplings[index].down,
            last_dc: 0,
        });
    }
    let mut bits = Bits {
        data,
        at: 0,
        bits: 0,
        count: 0,
        padding: 0,
    };
    let units = assembly.units_across();
    let has_bmi = std::arch::is_x86_feature_detected!("bmi2");
    let mut until_restart = scan.restart_interval;
    let mut restarts = 0u8;
    for band in 0..assembly.bands() {
        let is_needed = assembly.needs(band, sink);
        for unit in 0..units {
            if scan.restart_interval > 0 {
                if until_restart == 0 {
                    if bits.restart(restarts).is_err() {
                        return false;
                    }
                    restarts = (restarts + 1) & 7;
                    until_restart = scan.restart_interval;
                    for component in &mut components {
                        component.last_dc = 0;
                    }
                }
                until_restart -= 1;
            }
            let read = if has_bmi {
                // SAFETY: the processor has what the function asks for.
                unsafe {
                    read_unit_bmi(&mut bits, &mut components, assembly, band, unit, is_needed)
                }
            } else {
                read_unit(&mut bits, &mut components, assembly, band, unit, is_needed)
            };
            if read.is_err() || bits.is_overdrawn() {
                return false;
            }
        }
        assembly.emit(band, sink);
    }
    is_end(&data[bits.at.min(data.len())..])
}

/// Whether a scan may end where `rest` begins: the end of the image is the next
/// marker. libjpeg reads on to it, and takes offence at others; without any it
/// wants enough bytes not to miss one.
fn is_end(rest: &[u8]) -> bool {
    const CERTAINTY: usize = 64;
    let marker = rest
        .windows(2)
        .find(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff));
    match marker {
        Some(marker) => marker[1] == 0xd9,
        None => rest.len() >= CERTAINTY,
    }
}

/// [`read_unit`] with shifts that do not wait for flags.
#[target_feature(enable = "bmi1,bmi2")]
fn read_unit_bmi(
    bits: &mut Bits<'_>,
    components: &mut [Component<'_>],
    assembly: &mut Assembly,
    band: usize,
    unit: usize,
    is_needed: bool,
) -> Step<()> {
    read_unit(bits, components, assembly, band, unit, is_needed)
}

/// Reads and stores the blocks of one unit of the scan.
#[inline(always)]
fn read_unit(
    bits: &mut Bits<'_>,
    components: &mut [Component<'_>],
    assembly: &mut Assembly,
    band: usize,
    unit: usize,
    is_needed: bool,
) -> Step<()> {
    for (component, plane) in components.iter_mut().zip(&mut assembly.planes) {
        for row in 0..component.down {
            for column in 0..component.across {
                let mut block = [0i16; 64];
                read_block(
                    bits,
                    component.dc,
                    component.ac,
                    &mut component.last_dc,
                    &mut block,
                )?;
                let at = unit * component.across + column;
                if is_needed && plane.needs_block(at) {
                    store(&block, &component.quantisers, plane, band, row, at);
                }
            }
        }
    }
    Ok(())
}

/// Transforms a block and puts it in its place.
fn store(
    block: &[i16; 64],
    quantisers: &[u16; 64],
    plane: &mut Plane,
    band: usize,
    row: usize,
    column: usize,
) {
    let size = plane.size;
    let samples = idct::sized_block(size, block, quantisers);
    let stride = plane.stride;
    let start = (band % 2 * plane.band + row * size) * stride + column * size;
    for (line, samples) in samples.iter().enumerate().take(size) {
        // Reduced blocks write past their end, where the next block or the padding
        // of the row is.
        plane.samples[start + line * stride..][..8].copy_from_slice(samples);
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
}
