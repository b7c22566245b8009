//! Files that libjpeg writes by all kinds of scripts, whole and broken: whatever the
//! decoders here make of them, libjpeg alone has to make the same.

use super::codestream;
use super::compare::{OWN_DECODES, Way, disagreement, outcome};
use mozjpeg_sys as ffi;
use proptest::prelude::*;
use std::path::Path;

/// Pixels of a changed file's frame that are still worth a test.
const MOST_PIXELS: u64 = 300_000;

/// What is written, and how.
#[derive(Debug, Clone)]
struct Picture {
    width: u32,
    height: u32,
    /// Sampling factors of each component.
    factors: Vec<(i32, i32)>,
    quality: i32,
    /// Units between restart markers, zero for none.
    restart_interval: u32,
    /// How much of the samples is noise, of 255.
    noise: u8,
    /// Scans, none for a sequential file.
    script: Vec<Pass>,
}

/// A scan of a script.
#[derive(Debug, Clone)]
struct Pass {
    components: Vec<i32>,
    spectrum: (i32, i32),
    high: i32,
    low: i32,
}

impl Pass {
    fn info(&self) -> ffi::jpeg_scan_info {
        let mut index = [0; 4];
        index[..self.components.len()].copy_from_slice(&self.components);
        ffi::jpeg_scan_info {
            comps_in_scan: self.components.len() as i32,
            component_index: index,
            Ss: self.spectrum.0,
            Se: self.spectrum.1,
            Ah: self.high,
            Al: self.low,
        }
    }
}

fn scan(components: &[i32], spectrum: (i32, i32), high: i32, low: i32) -> Pass {
    Pass {
        components: components.to_vec(),
        spectrum,
        high,
        low,
    }
}

/// Shades with some noise in them, the same for the same size.
fn samples(picture: &Picture) -> Vec<u8> {
    let channels = picture.factors.len() as u32;
    let mut state = picture.width.wrapping_mul(0x9e37_79b9) ^ picture.height | 1;
    let mut samples = Vec::new();
    for y in 0..picture.height {
        for x in 0..picture.width * channels {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            // Noise in every other square, so that there are empty blocks, too.
            let is_busy = (x / channels / 16 + y / 16).is_multiple_of(2);
            let noise = if is_busy { state as u8 } else { 128 };
            let shade = ((x * 3 + y * 5) / 4 % 256) as u8;
            let part = u32::from(picture.noise);
            samples.push(((u32::from(noise) * part + u32::from(shade) * (255 - part)) / 255) as u8);
        }
    }
    samples
}

/// The file of `picture`, as libjpeg writes it.
fn encode(picture: &Picture) -> Vec<u8> {
    let samples = samples(picture);
    let stride = samples.len() / picture.height as usize;
    let script: Vec<_> = picture.script.iter().map(Pass::info).collect();
    let (mut buffer, mut length) = (std::ptr::null_mut(), 0);
    // SAFETY: the structures are plain C data for which zero is valid, outlive the
    // compressor and do not move; the pointers are to whole rows and scripts; the
    // buffer is the library's until it has finished, then copied and freed.
    unsafe {
        let mut error: ffi::jpeg_error_mgr = std::mem::zeroed();
        let mut cinfo: ffi::jpeg_compress_struct = std::mem::zeroed();
        cinfo.common.err = ffi::jpeg_std_error(&mut error);
        ffi::jpeg_create_compress(&mut cinfo);
        ffi::jpeg_mem_dest(&mut cinfo, &mut buffer, &mut length);
        (cinfo.image_width, cinfo.image_height) = (picture.width, picture.height);
        cinfo.input_components = picture.factors.len() as i32;
        cinfo.in_color_space = match picture.factors.len() {
            1 => ffi::J_COLOR_SPACE::JCS_GRAYSCALE,
            3 => ffi::J_COLOR_SPACE::JCS_YCbCr,
            _ => ffi::J_COLOR_SPACE::JCS_CMYK,
        };
        let profile = ffi::JCP_FASTEST as u32 as i32;
        ffi::jpeg_c_set_int_param(&mut cinfo, ffi::JINT_COMPRESS_PROFILE, profile);
        ffi::jpeg_set_defaults(&mut cinfo);
        ffi::jpeg_set_quality(&mut cinfo, picture.quality, 1);
        for (index, factors) in picture.factors.iter().enumerate() {
            let component = &mut *cinfo.comp_info.add(index);
            (component.h_samp_factor, component.v_samp_factor) = *factors;
        }
        cinfo.restart_interval = picture.restart_interval;
        if !script.is_empty() {
            cinfo.scan_info = script.as_ptr();
            cinfo.num_scans = script.len() as i32;
        }
        ffi::jpeg_start_compress(&mut cinfo, 1);
        for row in samples.chunks_exact(stride) {
            let row = row.as_ptr();
            ffi::jpeg_write_scanlines(&mut cinfo, &row, 1);
        }
        ffi::jpeg_finish_compress(&mut cinfo);
        ffi::jpeg_destroy_compress(&mut cinfo);
        let bytes = std::slice::from_raw_parts(buffer, length as usize).to_vec();
        libc::free(buffer.cast());
        bytes
    }
}

/// A script that tells all of every coefficient, made of `choices`.
fn script(components: usize, interleaves: bool, choices: &[u8]) -> Vec<Pass> {
    let mut choices = choices.iter().copied().cycle();
    let mut choose = |count: u8| i32::from(choices.next().unwrap_or(0) % count);
    // Scans that have to keep their order, for each of several parts of the image.
    let mut chains: Vec<Vec<Pass>> = Vec::new();
    let mut start = Vec::new();
    let all: Vec<i32> = (0..components as i32).collect();
    let groups: Vec<&[i32]> = if interleaves {
        vec![&all]
    } else {
        all.chunks(1).collect()
    };
    for group in groups {
        let low = choose(3);
        start.push(scan(group, (0, 0), 0, low));
        chains.push(
            (0..low)
                .rev()
                .map(|low| scan(group, (0, 0), low + 1, low))
                .collect(),
        );
    }
    for &component in &all {
        let cut = choose(64);
        let low = choose(4);
        let whole = vec![(1, 63)];
        let parts = if (1..63).contains(&cut) {
            vec![(1, cut), (cut + 1, 63)]
        } else {
            whole.clone()
        };
        // Refinements of parts together, or of each by itself.
        if choose(2) == 0 {
            let mut chain: Vec<_> = parts
                .iter()
                .map(|&part| scan(&[component], part, 0, low))
                .collect();
            chain.extend(
                (0..low)
                    .rev()
                    .map(|low| scan(&[component], (1, 63), low + 1, low)),
            );
            chains.push(chain);
        } else {
            for part in parts {
                let low = choose(4);
                let mut chain = vec![scan(&[component], part, 0, low)];
                chain.extend(
                    (0..low)
                        .rev()
                        .map(|low| scan(&[component], part, low + 1, low)),
                );
                chains.push(chain);
            }
        }
    }
    let mut script = start;
    for chain in &mut chains {
        chain.reverse();
    }
    loop {
        chains.retain(|chain| !chain.is_empty());
        if chains.is_empty() {
            break;
        }
        let chosen = choose(chains.len() as u8) as usize;
        script.extend(chains[chosen].pop());
    }
    script
}

fn pictures() -> impl Strategy<Value = Picture> {
    let factors = prop::sample::select(vec![
        vec![(1, 1)],
        vec![(2, 2)],
        vec![(1, 1), (1, 1), (1, 1)],
        vec![(2, 1), (1, 1), (1, 1)],
        vec![(2, 2), (1, 1), (1, 1)],
        vec![(1, 2), (1, 1), (1, 1)],
        vec![(4, 1), (1, 1), (1, 1)],
        vec![(1, 4), (1, 1), (1, 1)],
        vec![(2, 2), (2, 1), (1, 2)],
        vec![(1, 1), (2, 2), (1, 1)],
        vec![(1, 1), (1, 1), (1, 1), (1, 1)],
        vec![(2, 2), (1, 1), (1, 1), (2, 2)],
    ]);
    let restart_interval = prop_oneof![Just(0u32), 1..9u32, Just(40u32)];
    let choices = prop::collection::vec(any::<u8>(), 1..40);
    (
        (1..120u32, 1..90u32),
        factors,
        (5..100i32, 0..=255u8),
        restart_interval,
        (any::<bool>(), prop::bool::weighted(0.8), choices),
    )
        .prop_map(
            |(size, factors, (quality, noise), restart_interval, (interleaves, many, choices))| {
                let script = if many {
                    script(factors.len(), interleaves, &choices)
                } else {
                    Vec::new()
                };
                Picture {
                    width: size.0,
                    height: size.1,
                    factors,
                    quality,
                    restart_interval,
                    noise,
                    script,
                }
            },
        )
}

/// JPEG files among the goldens.
fn goldens() -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/files");
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "jpg"))
        .collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

#[test]
fn goldens_come_out_as_from_libjpeg_alone() {
    let before = OWN_DECODES.get();
    for bytes in goldens() {
        for is_whole in [true, false] {
            assert_eq!(disagreement(&bytes, is_whole), None);
        }
    }
    assert!(OWN_DECODES.get() > before);
}

#[test]
fn units_of_more_than_ten_blocks_are_refused() {
    let mut picture = Picture {
        width: 40,
        height: 30,
        factors: vec![(1, 1); 3],
        quality: 80,
        restart_interval: 0,
        noise: 100,
        script: Vec::new(),
    };
    for many_scans in [false, true] {
        if many_scans {
            picture.script = script(3, true, &[1, 2, 3]);
        }
        let mut bytes = encode(&picture);
        let is_frame = |pair: &[u8]| matches!(pair, [0xff, 0xc0 | 0xc2]);
        let frame = bytes.windows(2).position(is_frame).unwrap();
        for component in 0..3 {
            bytes[frame + 11 + component * 3] = 0x22;
        }
        for way in [Way::Libjpeg, Way::Own] {
            let refusal = outcome(&bytes, 8, true, way).unwrap_err();
            assert!(refusal.contains("too large"), "{refusal}");
        }
    }
}

/// A change of a file.
#[derive(Debug, Clone)]
enum Change {
    Byte(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    /// Leaves out the segment, with any scan data after it, from this marker on.
    Drop(prop::sample::Index),
    /// Has it twice.
    Repeat(prop::sample::Index),
    /// Puts bytes between.
    Insert(prop::sample::Index, Vec<u8>),
}

fn changes() -> impl Strategy<Value = Change> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        6 => (index(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        1 => index().prop_map(Change::Cut),
        1 => index().prop_map(Change::Drop),
        1 => index().prop_map(Change::Repeat),
        1 => (index(), prop::collection::vec(any::<u8>(), 1..4))
            .prop_map(|(at, bytes)| Change::Insert(at, bytes)),
    ]
}

/// Where the segments of a file begin, with the end of the file.
fn segments(bytes: &[u8]) -> Vec<usize> {
    let is_marker = |pair: &[u8]| pair[0] == 0xff && !matches!(pair[1], 0 | 0xd0..=0xd7 | 0xff);
    let mut starts: Vec<usize> = bytes
        .windows(2)
        .enumerate()
        .filter_map(|(at, pair)| is_marker(pair).then_some(at))
        .collect();
    starts.push(bytes.len());
    starts
}

fn change(bytes: &mut Vec<u8>, change: &Change) {
    if segments(bytes).len() < 2 {
        return;
    }
    let segment = |bytes: &[u8], index: &prop::sample::Index| {
        let starts = segments(bytes);
        let chosen = index.index(starts.len() - 1);
        starts[chosen]..starts[chosen + 1]
    };
    match change {
        Change::Byte(at, byte) => {
            let at = at.index(bytes.len());
            bytes[at] = *byte;
        }
        Change::Cut(at) => bytes.truncate(at.index(bytes.len()).max(2)),
        Change::Drop(index) => {
            let range = segment(bytes, index);
            bytes.drain(range);
        }
        Change::Repeat(index) => {
            let range = segment(bytes, index);
            let copy = bytes[range.clone()].to_vec();
            bytes.splice(range.start..range.start, copy);
        }
        Change::Insert(at, more) => {
            let at = at.index(bytes.len());
            bytes.splice(at..at, more.iter().copied());
        }
    }
}

/// Changes `bytes` and compares all ways of decoding them, if they are not too large.
fn agree_once_broken(
    bytes: &mut Vec<u8>,
    changed: &[Change],
    is_whole: bool,
) -> Result<(), TestCaseError> {
    for changed in changed {
        change(bytes, changed);
    }
    let pixels =
        codestream::scan(bytes).map_or(0, |frame| u64::from(frame.width) * u64::from(frame.height));
    if pixels < MOST_PIXELS {
        prop_assert_eq!(disagreement(bytes, is_whole), None);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn whole_files_are_decoded_here_and_as_by_libjpeg(picture in pictures()) {
        let bytes = encode(&picture);
        let before = OWN_DECODES.get();
        prop_assert_eq!(disagreement(&bytes, true), None);
        prop_assert_eq!(disagreement(&bytes, false), None);
        let own = OWN_DECODES.get() - before;
        // Sampling factors that do not divide are refused by both.
        let is_refused = outcome(&bytes, 8, true, Way::Own).is_err();
        prop_assert!(own == 2 || is_refused, "{own} of 2 were decoded here");
    }

    #[test]
    fn scans_of_all_kinds_give_the_same_at_a_lower_resolution(
        picture in pictures(),
        eighths in 1..8u32,
    ) {
        let plain = Picture { script: Vec::new(), ..picture.clone() };
        if !picture.script.is_empty() {
            let [scripted, plain] = [picture, plain]
                .map(|picture| outcome(&encode(&picture), eighths, true, Way::Own));
            prop_assert!(scripted == plain);
        }
    }

    #[test]
    fn broken_files_come_out_as_from_libjpeg_alone(
        picture in pictures(),
        changed in prop::collection::vec(changes(), 1..4),
        is_whole in any::<bool>(),
    ) {
        let mut bytes = encode(&picture);
        agree_once_broken(&mut bytes, &changed, is_whole)?;
    }

    #[test]
    fn broken_goldens_come_out_as_from_libjpeg_alone(
        golden in any::<prop::sample::Index>(),
        changed in prop::collection::vec(changes(), 1..4),
        is_whole in any::<bool>(),
    ) {
        let goldens = goldens();
        let mut bytes = goldens[golden.index(goldens.len())].clone();
        agree_once_broken(&mut bytes, &changed, is_whole)?;
    }
}
