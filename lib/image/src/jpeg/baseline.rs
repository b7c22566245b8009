//! A decoder for the JPEG that nearly every camera and page writes: one
//! sequential scan with all components, Huffman-coded.
//!
//! It gives up at the first thing that is not as it should be, and libjpeg
//! decodes the file from the start: what a broken file looks like, and whether
//! it is refused, stays libjpeg's word.

use super::assemble::{Assembly, Sampling};
use super::codestream::{Huffman, Scan};
use super::entropy::{
    Bits, Code, END_PLACES, GiveUp, LOOKUP_BITS, MAX_BLOCKS_OF_UNIT, Pairs, Purpose, REFILLED,
    Step, Table, natural,
};
use super::idct::Place;
use super::machine::Modern;
use crate::budget;
use crate::raster::Sink;

/// Lookups that a refilled window is enough for, after one of a difference.
const ROUNDS: u32 = REFILLED / LOOKUP_BITS - 1;

/// The last coefficient of a block.
const LAST: usize = 63;

/// Reads one block. Coefficients are in natural order and zero before. Says
/// whether there is none but the first.
#[inline(always)]
fn read_block(
    source: &mut Bits<'_>,
    dc: &Table,
    ac: &Pairs,
    last_dc: &mut i32,
    block: &mut [i16; 64],
) -> Step<bool> {
    let mut window = source.window();
    window.refill(source);
    *last_dc = last_dc.wrapping_add(window.difference(dc, source)?);
    window.need(REFILLED - LOOKUP_BITS, source);
    block[0] = *last_dc as i16;
    let mut index = 1;
    'block: loop {
        for _ in 0..ROUNDS {
            let pair = ac.look_up(&window);
            let ((first, value), (second, other)) = (pair.first(), pair.second());
            if index + second >= LAST {
                window.need(LOOKUP_BITS, source);
                match window.code(&ac.single, source)? {
                    Code::End { .. } => break 'block,
                    Code::Value { run, value } => {
                        index += run as usize;
                        if index > LAST {
                            return Err(GiveUp);
                        }
                        block[natural(index)] = value;
                        index += 1;
                    }
                }
                if index > LAST {
                    break 'block;
                }
                break;
            }
            window.drop(pair.length());
            block[natural(index + first)] = value;
            block[natural(index + second)] = other;
            index += pair.places();
            if index >= END_PLACES {
                index -= END_PLACES;
                break 'block;
            }
        }
        window.refill(source);
    }
    window.put_back(source);
    Ok(index == 1)
}

/// One component's way through the scan.
struct Component<'a> {
    dc: &'a Table,
    ac: &'a Pairs,
    quantisers: [u16; 64],
    across: usize,
    down: usize,
    last_dc: i32,
}

/// What is read, and how far.
struct Reader<'a> {
    bits: Bits<'a>,
    components: Vec<Component<'a>>,
    restart_interval: u32,
    until_restart: u32,
    restarts: u8,
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
    let blocks: usize = samplings.iter().map(|s| s.across * s.down).sum();
    if samplings.len() > 1 && blocks > MAX_BLOCKS_OF_UNIT {
        return false;
    }
    let made = |tables: &[Option<Huffman>; 4], purpose: Purpose| -> Vec<Option<Table>> {
        tables
            .iter()
            .map(|huffman| Table::new(huffman.as_ref()?, purpose))
            .collect()
    };
    let dc = made(&scan.coding.dc, Purpose::Dc);
    let ac: Vec<Option<Pairs>> = made(&scan.coding.ac, Purpose::Sequential)
        .into_iter()
        .map(|table| table.map(Pairs::new))
        .collect();
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
    let mut reader = Reader {
        bits: Bits::new(data),
        components,
        restart_interval: scan.coding.restart_interval,
        until_restart: scan.coding.restart_interval,
        restarts: 0,
    };
    let modern = assembly.modern;
    for band in 0..assembly.bands() {
        if budget::look().is_err() {
            return false;
        }
        let is_needed = assembly.needs(band, sink);
        // SAFETY: the processor has what the function asks for.
        let read = unsafe { read_band(modern, &mut reader, assembly, band, is_needed) };
        if read.is_err() || reader.bits.is_overdrawn() {
            return false;
        }
        assembly.emit(band, sink);
    }
    is_end(reader.bits.rest())
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

/// Reads a line of units, and stores its blocks where they are needed.
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn read_band(
    machine: Modern,
    reader: &mut Reader<'_>,
    assembly: &mut Assembly,
    band: usize,
    is_needed: bool,
) -> Step<()> {
    let mut block = [0i16; 64];
    for unit in 0..assembly.units_across() {
        if reader.restart_interval > 0 {
            if reader.until_restart == 0 {
                reader.bits.restart(reader.restarts)?;
                reader.restarts = (reader.restarts + 1) & 7;
                reader.until_restart = reader.restart_interval;
                for component in &mut reader.components {
                    component.last_dc = 0;
                }
            }
            reader.until_restart -= 1;
        }
        for (component, plane) in reader.components.iter_mut().zip(&mut assembly.planes) {
            for row in 0..component.down {
                for column in 0..component.across {
                    block.fill(0);
                    let is_flat = read_block(
                        &mut reader.bits,
                        component.dc,
                        component.ac,
                        &mut component.last_dc,
                        &mut block,
                    )?;
                    let at = unit * component.across + column;
                    if is_needed && plane.needs_block(at) {
                        let size = plane.size;
                        let (samples, stride) = plane.block(band, row, at);
                        machine.transform(
                            size,
                            &block,
                            &component.quantisers,
                            is_flat,
                            &mut Place { samples, stride },
                        );
                    }
                }
            }
        }
    }
    Ok(())
}
