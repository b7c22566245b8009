//! A decoder for Huffman-coded progressive files, which tell every block in many
//! scans. It reads all scans side by side, a line of blocks of each before the next
//! line, so it keeps no more than one line of coefficients, where libjpeg keeps the
//! image's.
//!
//! Like the one for sequential files it gives up at the first thing that is not as
//! it should be, and libjpeg decodes the file from the start. That includes files
//! whose scans do not tell all of every coefficient: libjpeg smoothes those.
//!
//! Which coefficients of a block are not zero is kept in a word, the first one in
//! zigzag order in its highest bit. In a scan that refines, a code means so many
//! coefficients that are still zero, and each other one passed on the way has a bit:
//! both are found in the word at once.

use super::assemble::{Assembly, Sampling};
use super::codestream::{self, CodingTables, Progression};
use super::entropy::{
    Bits, Code, END_PLACES, GiveUp, LOOKUP_BITS, MAX_BLOCKS_OF_UNIT, Pairs, Purpose, REFILLED,
    Step, Table, Window, natural,
};
use super::idct::Place;
use super::machine::Modern;
use crate::budget;
use crate::raster::Sink;

/// Scans of a file; encoders write about ten. Each has tables of 12 kB.
const MAX_SCANS: usize = 64;

/// Lookups that a refilled window is enough for.
const ROUNDS: u32 = REFILLED / LOOKUP_BITS;

/// The most bits of a coefficient that a scan may leave to later ones.
const MAX_LOW: u8 = 13;

/// What a scan tells.
enum Kind {
    FirstDc { tables: Vec<Table> },
    RefinedDc,
    FirstAc { table: Pairs },
    RefinedAc { table: Pairs },
}

/// A scan and how far it was read.
struct Scan<'a> {
    kind: Kind,
    bits: Bits<'a>,
    /// Which of the frame's components it has.
    components: Vec<usize>,
    /// The first and the last coefficient, in zigzag order.
    first: u32,
    last: u32,
    /// Bits that are left to later scans.
    low: u32,
    restart_interval: u32,
    until_restart: u32,
    restarts: u8,
    last_dc: Vec<i32>,
    /// Blocks to come that have no new coefficient.
    end_run: u32,
}

impl Scan<'_> {
    /// Makes sure that the next unit can be read, and says how many of `wanted` may
    /// follow it at once.
    fn units_at_once(&mut self, wanted: usize) -> Step<usize> {
        if self.restart_interval == 0 {
            return Ok(wanted);
        }
        if self.until_restart == 0 {
            if self.end_run > 0 {
                return Err(GiveUp);
            }
            self.bits.restart(self.restarts)?;
            self.restarts = (self.restarts + 1) & 7;
            self.until_restart = self.restart_interval;
            self.last_dc.fill(0);
        }
        let count = wanted.min(self.until_restart as usize);
        self.until_restart -= count as u32;
        Ok(count)
    }

    /// The coefficients that the scan has, as bits of a word.
    fn range(&self) -> u64 {
        (!0 >> self.first) & (!0 << (63 - self.last))
    }
}

/// One line of a component's blocks.
struct Grid {
    across: usize,
    down: usize,
    /// Blocks from one row to the next.
    stride: usize,
    /// Blocks that the image has, in each direction: what interleaved scans have
    /// beyond them is padding.
    width: usize,
    height: usize,
    quantisers: [u16; 64],
    blocks: Vec<[i16; 64]>,
    /// Coefficients that are not zero, without the first.
    masks: Vec<u64>,
    /// Coefficients that count for the size of the samples' blocks.
    counting: u64,
    /// First block that matters, and one past the last.
    columns: (usize, usize),
}

/// The scans of the file; `None` where one does not go on where others ended, or
/// something else is out of order.
fn plan<'a>(bytes: &'a [u8], progression: &Progression) -> Option<Vec<Scan<'a>>> {
    let ids = &progression.components[..];
    let is_twice = |index: usize| ids[..index].contains(&ids[index]);
    if (0..ids.len()).any(is_twice) {
        return None;
    }
    let mut tables = progression.tables.clone();
    // Bits that are still to come of each coefficient; all, where it has not begun.
    let mut to_come = vec![[None; 64]; ids.len()];
    let mut scans = Vec::new();
    let mut header = bytes.get(progression.header.clone())?;
    let mut at = progression.header.end;
    loop {
        if scans.len() == MAX_SCANS {
            return None;
        }
        let end = at + codestream::data_length(&bytes[at..])?;
        let data = &bytes[at..end];
        scans.push(scan(data, header, ids, &tables, &mut to_come)?);
        at = end;
        loop {
            let (code, segment) = codestream::segment(bytes, at)?;
            at = segment.end;
            let data = &bytes[segment];
            match code {
                0xda => {
                    header = data;
                    break;
                }
                0xd9 => {
                    let is_done = |bits: &Option<u8>| *bits == Some(0);
                    return to_come.iter().flatten().all(is_done).then_some(scans);
                }
                0xc4 => tables.read_huffman(data)?,
                0xdd => tables.read_restart_interval(data)?,
                // What an application or a writer adds.
                0xe0..=0xef | 0xfe => {}
                _ => return None,
            }
        }
    }
}

/// A scan from its header and its `data`.
fn scan<'a>(
    data: &'a [u8],
    header: &[u8],
    ids: &[u8],
    tables: &CodingTables,
    to_come: &mut [[Option<u8>; 64]],
) -> Option<Scan<'a>> {
    let (&count, rest) = header.split_first()?;
    let count = usize::from(count);
    if rest.len() != count * 2 + 3 || count == 0 {
        return None;
    }
    let (selectors, rest) = rest.split_at(count * 2);
    let (first, last, high, low) = (rest[0], rest[1], rest[2] >> 4, rest[2] & 15);
    let is_dc = first == 0;
    if last > 63 || first > last || low > MAX_LOW || is_dc && last > 0 || !is_dc && count > 1 {
        return None;
    }
    let before = match high {
        0 => None,
        _ if high == low + 1 => Some(high),
        _ => return None,
    };
    let mut components: Vec<usize> = Vec::with_capacity(count);
    let mut made = Vec::new();
    for selector in selectors.chunks_exact(2) {
        let component = ids.iter().position(|&id| id == selector[0])?;
        if components.last().is_some_and(|&last| last >= component) {
            return None;
        }
        components.push(component);
        for bits in &mut to_come[component][usize::from(first)..=usize::from(last)] {
            if *bits != before {
                return None;
            }
            *bits = Some(low);
        }
        let (dc, ac) = (usize::from(selector[1] >> 4), usize::from(selector[1] & 15));
        let bit = u32::from(low);
        match (is_dc, before) {
            (true, None) => made.push(Table::new(tables.dc.get(dc)?.as_ref()?, Purpose::Dc)?),
            (true, Some(_)) => {}
            (false, None) => {
                let huffman = tables.ac.get(ac)?.as_ref()?;
                made.push(Table::new(huffman, Purpose::First { low: bit })?);
            }
            (false, Some(_)) => {
                let huffman = tables.ac.get(ac)?.as_ref()?;
                made.push(Table::new(huffman, Purpose::Refinement { low: bit })?);
            }
        }
    }
    let kind = match (is_dc, before) {
        (true, None) => Kind::FirstDc { tables: made },
        (true, Some(_)) => Kind::RefinedDc,
        (false, None) => Kind::FirstAc {
            table: Pairs::new(made.pop()?),
        },
        (false, Some(_)) => Kind::RefinedAc {
            table: Pairs::new(made.pop()?),
        },
    };
    Some(Scan {
        kind,
        bits: Bits::new(data),
        last_dc: vec![0; components.len()],
        components,
        first: first.into(),
        last: last.into(),
        low: low.into(),
        restart_interval: tables.restart_interval,
        until_restart: tables.restart_interval,
        restarts: 0,
        end_run: 0,
    })
}

/// Coefficients that count for blocks of `size` by `size` samples.
fn counting(size: usize) -> u64 {
    (0..64)
        .filter(|&index| natural(index) % 8 < size && natural(index) / 8 < size)
        .fold(0, |mask, index| mask | 1 << 63 >> index)
}

/// Decodes all scans into `assembly`. `false` where this is left to libjpeg; rows may
/// have gone out then, and all have to come again.
pub(super) fn decode(
    bytes: &[u8],
    progression: &Progression,
    quantisers: &[[u16; 64]],
    samplings: &[Sampling],
    assembly: &mut Assembly,
    sink: &mut dyn Sink,
) -> bool {
    let Some(mut scans) = plan(bytes, progression) else {
        return false;
    };
    let full = progression.full;
    let most_across = samplings.iter().map(|s| s.across).max().unwrap_or(1);
    let most_down = samplings.iter().map(|s| s.down).max().unwrap_or(1);
    let mut grids: Vec<Grid> = samplings
        .iter()
        .zip(quantisers)
        .zip(&assembly.planes)
        .map(|((&Sampling { across, down }, quantisers), plane)| {
            let stride = assembly.units_across() * across;
            let part =
                |side: u32, factor: usize, most: usize| (side as usize * factor).div_ceil(most * 8);
            let is_needed = |index: &usize| plane.needs_block(*index);
            Grid {
                across,
                down,
                stride,
                width: part(full.0, across, most_across),
                height: part(full.1, down, most_down),
                quantisers: *quantisers,
                blocks: vec![[0; 64]; stride * down],
                masks: vec![0; stride * down],
                counting: counting(plane.size),
                columns: (
                    (0..stride).find(is_needed).unwrap_or(stride),
                    (0..stride).rfind(is_needed).map_or(0, |last| last + 1),
                ),
            }
        })
        .collect();
    let blocks: usize = grids.iter().map(|grid| grid.width * grid.height).sum();
    if budget::check_scans(scans.len() as u64, blocks as u64).is_err() {
        return false;
    }
    for scan in &scans {
        let blocks = scan.components.iter().map(|&index| &grids[index]);
        let blocks: usize = blocks.map(|grid| grid.across * grid.down).sum();
        if scan.components.len() > 1 && blocks > MAX_BLOCKS_OF_UNIT {
            return false;
        }
    }
    let modern = assembly.modern;
    for band in 0..assembly.bands() {
        if budget::look().is_err() {
            return false;
        }
        let is_needed = assembly.needs(band, sink);
        // SAFETY: the processor has what the function asks for.
        let read = unsafe { read_band(modern, &mut scans, &mut grids, assembly, band, is_needed) };
        if read.is_err() {
            return false;
        }
        assembly.emit(band, sink);
    }
    scans
        .iter_mut()
        .all(|scan| scan.end_run == 0 && scan.bits.is_at_marker() && scan.bits.rest().is_empty())
}

/// Reads a line of blocks of every scan, and makes its samples.
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn read_band(
    machine: Modern,
    scans: &mut [Scan<'_>],
    grids: &mut [Grid],
    assembly: &mut Assembly,
    band: usize,
    is_needed: bool,
) -> Step<()> {
    for scan in scans {
        if let [component] = scan.components[..] {
            let grid = &mut grids[component];
            for row in 0..grid.down.min(grid.height.saturating_sub(band * grid.down)) {
                let mut column = 0;
                while column < grid.width {
                    let count = scan.units_at_once(grid.width - column)?;
                    read_blocks(machine, scan, grid, row, column..column + count, is_needed)?;
                    column += count;
                }
            }
        } else {
            let mut unit = 0;
            while unit < assembly.units_across() {
                let count = scan.units_at_once(assembly.units_across() - unit)?;
                read_units(scan, grids, unit..unit + count)?;
                unit += count;
            }
        }
        if scan.bits.is_overdrawn() {
            return Err(GiveUp);
        }
    }
    for (grid, plane) in grids.iter_mut().zip(&mut assembly.planes) {
        let (first, end) = grid.columns;
        for row in 0..if is_needed { grid.down } else { 0 } {
            for column in first..end {
                let at = row * grid.stride + column;
                let is_flat = grid.masks[at] & grid.counting == 0;
                let size = plane.size;
                let (samples, stride) = plane.block(band, row, column);
                let mut place = Place { samples, stride };
                let quantisers = &grid.quantisers;
                machine.transform(size, &grid.blocks[at], quantisers, is_flat, &mut place);
            }
        }
        for (block, mask) in grid.blocks.iter_mut().zip(&mut grid.masks) {
            if *mask != 0 {
                *mask = 0;
                block.fill(0);
            }
        }
    }
    Ok(())
}

/// Reads units of a scan with more than one component, which tells only the first
/// coefficients.
#[inline(always)]
fn read_units(scan: &mut Scan<'_>, grids: &mut [Grid], units: std::ops::Range<usize>) -> Step<()> {
    let mut window = scan.bits.window();
    for unit in units {
        for (part, &component) in scan.components.iter().enumerate() {
            let grid = &mut grids[component];
            for row in 0..grid.down {
                let start = row * grid.stride + unit * grid.across;
                let blocks = &mut grid.blocks[start..start + grid.across];
                match &scan.kind {
                    Kind::FirstDc { tables } => {
                        let last = &mut scan.last_dc[part];
                        let (table, low) = (&tables[part], scan.low);
                        first_dc(&mut window, &mut scan.bits, table, last, low, blocks)?;
                    }
                    _ => refined_dc(&mut window, &mut scan.bits, scan.low, blocks),
                }
            }
        }
    }
    window.put_back(&mut scan.bits);
    Ok(())
}

/// Reads the first coefficients of blocks.
#[inline(always)]
fn first_dc(
    window: &mut Window,
    source: &mut Bits<'_>,
    table: &Table,
    last_dc: &mut i32,
    low: u32,
    blocks: &mut [[i16; 64]],
) -> Step<()> {
    for block in blocks {
        window.need(LOOKUP_BITS, source);
        let difference = window.difference(table, source)?;
        // libjpeg refuses the file where this overflows.
        *last_dc = last_dc.checked_add(difference).ok_or(GiveUp)?;
        block[0] = (*last_dc << low) as i16;
    }
    Ok(())
}

/// Reads one more bit of them.
#[inline(always)]
fn refined_dc(window: &mut Window, source: &mut Bits<'_>, low: u32, blocks: &mut [[i16; 64]]) {
    for block in blocks {
        window.need(1, source);
        block[0] |= (window.take(1) << low) as i16;
    }
}

/// Reads blocks of a scan of one component.
#[inline(always)]
fn read_blocks(
    machine: Modern,
    scan: &mut Scan<'_>,
    grid: &mut Grid,
    row: usize,
    columns: std::ops::Range<usize>,
    is_needed: bool,
) -> Step<()> {
    let range = scan.range();
    let mut window = scan.bits.window();
    let places = row * grid.stride + columns.start..row * grid.stride + columns.end;
    let blocks = &mut grid.blocks[places.clone()];
    let masks = &mut grid.masks[places];
    match &scan.kind {
        Kind::FirstDc { tables } => {
            let last = &mut scan.last_dc[0];
            let (table, low) = (&tables[0], scan.low);
            first_dc(&mut window, &mut scan.bits, table, last, low, blocks)?;
        }
        Kind::RefinedDc => refined_dc(&mut window, &mut scan.bits, scan.low, blocks),
        Kind::FirstAc { table } | Kind::RefinedAc { table } => {
            let mut reader = AcReader {
                source: &mut scan.bits,
                window,
                table,
                first: scan.first as usize,
                last: scan.last as usize,
                range,
                low: scan.low,
                end_run: scan.end_run,
            };
            if matches!(scan.kind, Kind::FirstAc { .. }) {
                reader.first_ones(blocks, masks)?;
            } else {
                let (first, end) = if is_needed { grid.columns } else { (0, 0) };
                for (index, (block, mask)) in blocks.iter_mut().zip(masks).enumerate() {
                    let counts = (first..end).contains(&(columns.start + index));
                    let counting = if counts { grid.counting } else { 0 };
                    reader.refine(machine, block, mask, counting)?;
                }
            }
            (window, scan.end_run) = (reader.window, reader.end_run);
        }
    }
    window.put_back(&mut scan.bits);
    Ok(())
}

/// Reads the coefficients but the first of blocks of a scan.
struct AcReader<'r, 'a> {
    source: &'r mut Bits<'a>,
    window: Window,
    table: &'r Pairs,
    first: usize,
    last: usize,
    range: u64,
    low: u32,
    /// Blocks without new coefficients. While one is read, it is among them.
    end_run: u32,
}

impl AcReader<'_, '_> {
    /// Reads the blocks of a scan that is the first to have these coefficients.
    #[inline(always)]
    fn first_ones(&mut self, blocks: &mut [[i16; 64]], masks: &mut [u64]) -> Step<()> {
        let mut at = 0;
        while at < blocks.len() {
            if self.end_run > 0 {
                let skipped = (self.end_run as usize).min(blocks.len() - at);
                self.end_run -= skipped as u32;
                at += skipped;
                continue;
            }
            self.new_ones(self.first, &mut blocks[at], &mut masks[at])?;
            self.end_run = self.end_run.saturating_sub(1);
            at += 1;
        }
        Ok(())
    }

    /// Reads new coefficients from `index` on, where all are zero.
    #[inline(always)]
    fn new_ones(&mut self, mut index: usize, block: &mut [i16; 64], mask: &mut u64) -> Step<()> {
        let mut added = 0u64;
        'block: while index <= self.last {
            self.window.refill(self.source);
            for _ in 0..ROUNDS {
                let pair = self.table.look_up(&self.window);
                let ((first, value), (second, other)) = (pair.first(), pair.second());
                if index + second >= self.last {
                    self.window.need(LOOKUP_BITS, self.source);
                    match self.window.code(&self.table.single, self.source)? {
                        Code::End { blocks } => {
                            self.end_run = blocks;
                            break 'block;
                        }
                        Code::Value { run, value } => {
                            index += run as usize;
                            if index > self.last {
                                return Err(GiveUp);
                            }
                            block[natural(index)] = value;
                            // No value after a run of sixteen zeros.
                            added |= u64::from(value != 0) << (63 - index);
                            index += 1;
                            continue 'block;
                        }
                    }
                }
                self.window.drop(pair.length());
                block[natural(index + first)] = value;
                block[natural(index + second)] = other;
                added |= 1 << 63 >> (index + first) | 1 << 63 >> (index + second);
                index += pair.places();
                if index >= END_PLACES {
                    // The end alone came with a zero for a value.
                    added &= !(1 << 63 >> (index - END_PLACES));
                    self.end_run = 1;
                    break 'block;
                }
            }
        }
        *mask |= added;
        Ok(())
    }

    /// A block of a later scan. Only coefficients of `counting` have to be right.
    #[inline(always)]
    fn refine(
        &mut self,
        machine: Modern,
        block: &mut [i16; 64],
        mask: &mut u64,
        counting: u64,
    ) -> Step<()> {
        // Coefficients that are to be passed by and have a bit.
        let mut passing = *mask & self.range;
        let mut fixes = 0;
        if self.end_run == 0 {
            let zeros = !*mask & self.range;
            let mut left = zeros.count_ones();
            let mut index = self.first;
            while passing != 0 {
                self.window.need(LOOKUP_BITS, self.source);
                let (run, value) = match self.window.code(&self.table.single, self.source)? {
                    Code::Value { run, value } => (run, value),
                    Code::End { blocks } => {
                        self.end_run = blocks;
                        break;
                    }
                };
                if run >= left {
                    return Err(GiveUp);
                }
                left -= run + 1;
                let target = machine.deposit(1 << left, zeros);
                let later = target - 1;
                fixes |= self.fixes(machine, passing & !later);
                passing &= later;
                index = target.leading_zeros() as usize;
                block[natural(index)] = value;
                *mask |= if value == 0 { 0 } else { target };
                index += 1;
            }
            if self.end_run == 0 {
                self.new_ones(index, block, mask)?;
            }
        }
        fixes |= self.fixes(machine, passing);
        self.end_run = self.end_run.saturating_sub(1);
        fixes &= counting;
        while fixes != 0 {
            let index = 63 - fixes.trailing_zeros();
            fixes &= fixes - 1;
            let coefficient = &mut block[natural(index as usize)];
            // One more, away from zero.
            *coefficient += (*coefficient >> 15 | 1) << self.low;
        }
        Ok(())
    }

    /// Takes the bits of the passed coefficients, and says which are ones.
    #[inline(always)]
    fn fixes(&mut self, machine: Modern, passed: u64) -> u64 {
        let count = passed.count_ones();
        if self.window.count() < count {
            self.window.refill(self.source);
            if self.window.count() < count {
                return self.many_fixes(machine, passed);
            }
        }
        machine.deposit(self.window.take(count), passed)
    }

    /// [`Self::fixes`] of more coefficients than a window has bits.
    #[cold]
    #[inline(never)]
    fn many_fixes(&mut self, machine: Modern, passed: u64) -> u64 {
        let mut fixes = 0;
        for half in [passed & !0 << 32, passed & !(!0 << 32)] {
            self.window.need(half.count_ones(), self.source);
            fixes |= machine.deposit(self.window.take(half.count_ones()), half);
        }
        fixes
    }
}
