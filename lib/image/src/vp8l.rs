//! What lossless WebP's decoder allocates besides pixels. It makes Huffman tables for as many
//! groups of codes as a small image inside the compressed data names: up to 65,536 groups of
//! 20 KB each. So all that comes before the groups is read here first.

use crate::budget;
use crate::error::{Blame, Result};

const WEBP: Blame = Blame("WebP");

/// Symbols of the codes of a group: green with lengths, red, blue, alpha, distances.
const ALPHABETS: [usize; 5] = [256 + LENGTH_SYMBOLS, 256, 256, 256, 40];

const LENGTH_SYMBOLS: usize = 24;

/// In this order lengths of the code of code lengths are stored.
const LENGTH_ORDER: [usize; 19] = [
    17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
];

const LONGEST_CODE: usize = 15;

/// Distances below this stand for places near the pixel.
const NEAR_PLACES: usize = 120;

/// Above so many groups, libwebp makes tables only for those in use.
const MANY_GROUPS: usize = 1000;

/// A group's tables without a colour cache, each entry of four bytes, and the group itself.
const GROUP_BYTES: u64 = 4 * (3 * 630 + 410 + 654) + 600;

/// The bits of a stream, the lowest of each byte first.
struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn read(&mut self, count: usize) -> Option<usize> {
        let end = self.at + count;
        if end > self.bytes.len() * 8 {
            return None;
        }
        let mut word = [0; 4];
        let rest = &self.bytes[self.at / 8..];
        let most = rest.len().min(4);
        word[..most].copy_from_slice(&rest[..most]);
        let bits = u32::from_le_bytes(word) >> (self.at % 8);
        self.at = end;
        Some(bits as usize & ((1 << count) - 1))
    }
}

/// A canonical Huffman code: how many symbols have each length, and the symbols by length.
struct Code {
    counts: [u16; LONGEST_CODE + 1],
    symbols: Vec<u16>,
}

impl Code {
    /// `None` where the lengths are no complete code.
    fn new(lengths: &[u8]) -> Option<Self> {
        let mut counts = [0u16; LONGEST_CODE + 1];
        let mut symbols = Vec::new();
        for length in 1..=LONGEST_CODE {
            let of_length = (0u16..)
                .zip(lengths)
                .filter(|(_, own)| usize::from(**own) == length);
            symbols.extend(of_length.map(|(symbol, _)| symbol));
            counts[length] = symbols.len() as u16 - counts[1..length].iter().sum::<u16>();
        }
        let space: usize = (1..)
            .zip(&counts[1..])
            .map(|(length, &count): (usize, _)| usize::from(count) << (LONGEST_CODE - length))
            .sum();
        (symbols.len() == 1 || space == 1 << LONGEST_CODE).then_some(Self { counts, symbols })
    }

    fn read(&self, bits: &mut Bits<'_>) -> Option<usize> {
        if let [only] = self.symbols[..] {
            return Some(usize::from(only));
        }
        let (mut code, mut first, mut index) = (0, 0, 0);
        for &count in &self.counts[1..] {
            let count = usize::from(count);
            code = code << 1 | bits.read(1)?;
            if code < first + count {
                return self
                    .symbols
                    .get(index + code - first)
                    .map(|&symbol| symbol.into());
            }
            index += count;
            first = (first + count) << 1;
        }
        None
    }
}

fn read_code(bits: &mut Bits<'_>, alphabet: usize) -> Option<Code> {
    let mut lengths = vec![0u8; alphabet.max(256)];
    if bits.read(1)? == 1 {
        let has_two = bits.read(1)? == 1;
        let width = if bits.read(1)? == 1 { 8 } else { 1 };
        lengths[bits.read(width)?] = 1;
        if has_two {
            lengths[bits.read(8)?] = 1;
        }
        return Code::new(&lengths[..alphabet]);
    }
    let mut of_lengths = [0; LENGTH_ORDER.len()];
    let count = bits.read(4)? + 4;
    for &place in LENGTH_ORDER.get(..count)? {
        of_lengths[place] = bits.read(3)? as u8;
    }
    let code = Code::new(&of_lengths)?;
    let mut left = alphabet;
    if bits.read(1)? == 1 {
        let width = 2 + 2 * bits.read(3)?;
        left = 2 + bits.read(width)?;
        if left > alphabet {
            return None;
        }
    }
    let (mut at, mut previous) = (0, 8);
    while at < alphabet && left > 0 {
        left -= 1;
        let (length, repeat) = match code.read(bits)? {
            length @ ..16 => (length as u8, 1),
            16 => (previous, 3 + bits.read(2)?),
            17 => (0, 3 + bits.read(3)?),
            _ => (0, 11 + bits.read(7)?),
        };
        if length != 0 {
            previous = length;
        }
        lengths[at..alphabet].get_mut(..repeat)?.fill(length);
        at += repeat;
    }
    Code::new(&lengths[..alphabet])
}

/// Bits that choose a pixel of the colour cache, none where there is none.
fn read_cache_bits(bits: &mut Bits<'_>) -> Option<usize> {
    if bits.read(1)? == 0 {
        return Some(0);
    }
    Some(bits.read(4)?).filter(|count| (1..=11).contains(count))
}

/// A length or a distance, of which `symbol` is the beginning.
fn read_number(bits: &mut Bits<'_>, symbol: usize) -> Option<usize> {
    if symbol < 4 {
        return Some(symbol + 1);
    }
    let more = (symbol - 2) >> 1;
    Some(((2 + (symbol & 1)) << more) + bits.read(more)? + 1)
}

/// The places that near distances stand for: across to the left, and up.
fn near_places() -> Vec<(isize, isize)> {
    let rows = (0..8).flat_map(|up| (-7..=8).map(move |left| (left, up)));
    let mut places: Vec<(isize, isize)> = rows.filter(|&(left, up)| up > 0 || left > 0).collect();
    places.sort_by_key(|&(left, up)| (left * left + up * up, left.abs(), left < 0));
    debug_assert_eq!(places.len(), NEAR_PLACES);
    places
}

/// An image inside the stream, which has one group of codes.
fn read_inner(bits: &mut Bits<'_>, (width, height): (usize, usize)) -> Result<Option<Vec<u32>>> {
    let codes = |bits: &mut Bits<'_>| {
        let cache_bits = read_cache_bits(bits)?;
        let cached = if cache_bits == 0 { 0 } else { 1 << cache_bits };
        let mut codes = Vec::new();
        for (index, alphabet) in ALPHABETS.into_iter().enumerate() {
            let more = if index == 0 { cached } else { 0 };
            codes.push(read_code(bits, alphabet + more)?);
        }
        Some((cache_bits, cached, codes))
    };
    let Some((cache_bits, cached, codes)) = codes(bits) else {
        return Ok(None);
    };
    let places = near_places();
    let mut cache = vec![0u32; cached];
    let mut pixels: Vec<u32> = Vec::with_capacity(width * height);
    while pixels.len() < width * height {
        budget::check()?;
        let from = pixels.len();
        let mut step = || {
            let green = codes[0].read(bits)?;
            if green < 256 {
                let [red, blue, alpha] = [1, 2, 3].map(|index| codes[index].read(bits));
                let pixel = alpha? << 24 | red? << 16 | green << 8 | blue?;
                pixels.push(pixel as u32);
                return Some(());
            }
            let Some(length) = Some(green - 256).filter(|symbol| *symbol < LENGTH_SYMBOLS) else {
                pixels.push(*cache.get(green - 256 - LENGTH_SYMBOLS)?);
                return Some(());
            };
            let length = read_number(bits, length)?;
            let symbol = codes[4].read(bits)?;
            let distance = match read_number(bits, symbol)? {
                near @ ..=NEAR_PLACES => {
                    let (left, up) = places[near - 1];
                    (up * width as isize + left).max(1) as usize
                }
                far => far - NEAR_PLACES,
            };
            if distance > from || length > width * height - from {
                return None;
            }
            for _ in 0..length {
                pixels.push(pixels[pixels.len() - distance]);
            }
            Some(())
        };
        if step().is_none() {
            return Ok(None);
        }
        if cache_bits > 0 {
            for &pixel in &pixels[from..] {
                cache[(0x1e35_a7bd_u32.wrapping_mul(pixel) >> (32 - cache_bits)) as usize] = pixel;
            }
        }
    }
    Ok(Some(pixels))
}

/// Bytes that the decoder of `stream` allocates besides the image's pixels. The size of an
/// image of transparency alone stands elsewhere.
pub(crate) fn memory(stream: &[u8], size: Option<(usize, usize)>) -> Result<u64> {
    let mut bits = Bits {
        bytes: stream,
        at: 0,
    };
    let cut = || WEBP.corrupt("the lossless data does not begin as it should");
    let header = |bits: &mut Bits<'_>| {
        let is_signed = bits.read(8)? == 0x2f;
        let size = (bits.read(14)? + 1, bits.read(14)? + 1);
        let (_alpha, version) = (bits.read(1)?, bits.read(3)?);
        (is_signed && version == 0).then_some(size)
    };
    let (mut width, height) = size.or_else(|| header(&mut bits)).ok_or_else(cut)?;
    let mut memory = 0;
    let mut inner = |bits: &mut Bits<'_>, size: (usize, usize)| {
        let pixels = read_inner(bits, size)?.ok_or_else(cut)?;
        memory += 4 * pixels.len() as u64;
        Ok(pixels)
    };
    let mut seen = [false; 4];
    while bits.read(1).ok_or_else(cut)? == 1 {
        let kind = bits.read(2).ok_or_else(cut)?;
        if std::mem::replace(&mut seen[kind], true) {
            return Err(cut());
        }
        match kind {
            // Predictors, and correlations of colours.
            0 | 1 => {
                let block = 1 << (2 + bits.read(3).ok_or_else(cut)?);
                inner(&mut bits, (width.div_ceil(block), height.div_ceil(block)))?;
            }
            // Green taken from red and blue.
            2 => {}
            // A palette, of which several indices may share a pixel.
            _ => {
                let colours = bits.read(8).ok_or_else(cut)? + 1;
                inner(&mut bits, (colours, 1))?;
                width = width.div_ceil(match colours {
                    1..=2 => 8,
                    3..=4 => 4,
                    5..=16 => 2,
                    _ => 1,
                });
            }
        }
    }
    let cache_bits = read_cache_bits(&mut bits).ok_or_else(cut)?;
    let mut groups = 1;
    if bits.read(1).ok_or_else(cut)? == 1 {
        let block = 1 << (2 + bits.read(3).ok_or_else(cut)?);
        let pixels = inner(&mut bits, (width.div_ceil(block), height.div_ceil(block)))?;
        let mut used = vec![false; 1 << 16];
        for pixel in pixels {
            used[(pixel >> 8 & 0xffff) as usize] = true;
        }
        let most = used
            .iter()
            .rposition(|used| *used)
            .map_or(0, |last| last + 1);
        groups = if most > MANY_GROUPS {
            used.iter().filter(|used| **used).count()
        } else {
            most
        };
    }
    // The largest table of codes that a cache adds symbols to is about twice as long.
    let cached = if cache_bits == 0 {
        0
    } else {
        4 * (2 << cache_bits)
    };
    Ok(memory + groups as u64 * (GROUP_BYTES + cached))
}
