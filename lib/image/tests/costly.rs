//! Files that were made to cost much: each is prepared in a process of its own, whose
//! memory and time are measured. Right, or refused with the reason; within ten seconds
//! and one gibibyte, and no more memory than was announced and 64 MiB.

use clip_image::{ImageType, Limits, Options, memory_needed, prepare};
use flate2::{Compression, write::ZlibEncoder};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// What a decode may take beyond what it announced.
const SLACK: u64 = 64 * MIB;

/// What a process may take with the file and all.
const MOST_MEMORY: u64 = 1024 * MIB;

const MOST_SECONDS: f64 = 10.0;

/// Names the case to the process that runs it.
const CASE: &str = "CLIP_IMAGE_COSTLY_CASE";

/// What comes of a case.
enum Expected {
    Prepared,
    /// Refused, with this in the reason.
    Refused(&'static str),
    /// Either, as long as it costs little.
    Any,
}
use Expected::{Any, Prepared, Refused};

struct Case {
    name: &'static str,
    kind: ImageType,
    make: fn() -> Vec<u8>,
    expected: Expected,
    time_limit: Duration,
    /// What the system gives the process beyond what it has.
    memory: u64,
}

fn case(name: &'static str, kind: ImageType, make: fn() -> Vec<u8>, expected: Expected) -> Case {
    Case {
        name,
        kind,
        make,
        expected,
        time_limit: clip_image::DEFAULT_TIME_LIMIT,
        memory: MOST_MEMORY,
    }
}

fn cases() -> Vec<Case> {
    use ImageType::{Gif, Jpeg, Png, Tiff, Webp};
    vec![
        case("tiff_lzma_bomb", Tiff, lzma_bomb, Prepared),
        case(
            "tiff_offsets_as_bytes",
            Tiff,
            offsets_as_bytes,
            Refused("strips"),
        ),
        case("tiff_width_of_many_values", Tiff, width_of_many_values, Any),
        case("tiff_fax_of_empty_runs", Tiff, fax_of_empty_runs, Any),
        case(
            "tiff_large_jpeg_in_a_small_strip",
            Tiff,
            large_jpeg_in_a_small_strip,
            Refused("20000×20000"),
        ),
        case("tiff_raw_in_one_strip", Tiff, raw_in_one_strip, Prepared),
        case("jpeg_of_metadata", Jpeg, metadata_before_a_jpeg, Prepared),
        case("tiff_fax_at_1200_dpi", Tiff, || fax(9921, 14_031), Prepared),
        case(
            "tiff_fax_of_long_lines",
            Tiff,
            || fax(60_000, 2900),
            Prepared,
        ),
        case(
            "jpeg_of_100_scans",
            Jpeg,
            || many_scans(100),
            Refused("blocks in scans"),
        ),
        case(
            "jpeg_of_3000_scans",
            Jpeg,
            || many_scans(3000),
            Refused("blocks in scans"),
        ),
        case(
            "jpeg_of_arithmetic_scans",
            Jpeg,
            || arithmetic_scans(10_000, 100),
            Refused("blocks in scans"),
        ),
        case(
            "png_of_tiny_texts",
            Png,
            || texts(1_000_000, b"."),
            Prepared,
        ),
        case(
            "png_of_more_text_than_allowed",
            Png,
            || texts(30_000, &[b'.'; 4096]),
            Refused("bytes of text"),
        ),
        case("png_of_one_pixel_a_row", Png, thin_png, Prepared),
        case(
            "tiff_strips_of_the_same_empty_blocks",
            Tiff,
            strips_of_empty_blocks,
            Refused("bytes of strips"),
        ),
        case(
            "tiff_strips_of_the_same_jpeg",
            Tiff,
            strips_of_the_same_jpeg,
            Refused("blocks in scans"),
        ),
        case(
            "tiff_strips_of_the_same_no_ops",
            Tiff,
            strips_of_no_ops,
            Refused("bytes of strips"),
        ),
        case(
            "tiff_tiles_that_hardly_touch_the_image",
            Tiff,
            tiles_beyond_the_image,
            Refused("bytes of tiles"),
        ),
        case(
            "tiff_strips_of_the_same_lzma_noise",
            Tiff,
            strips_of_lzma_noise,
            Refused("bytes of strips"),
        ),
        case("gif_of_two_clear_codes", Gif, || gif_of_clears(2), Prepared),
        case(
            "gif_of_a_million_clear_codes",
            Gif,
            || gif_of_clears(1_000_000),
            Prepared,
        ),
        case(
            "tiff_lzw_of_two_clear_codes",
            Tiff,
            || lzw_of_clears(2),
            Prepared,
        ),
        case(
            "webp_of_163_megapixels",
            Webp,
            || lossless((16_383, 10_000), None),
            Prepared,
        ),
        case(
            "webp_of_many_groups",
            Webp,
            || lossless((1024, 1024), Some(0)),
            Prepared,
        ),
        case(
            "webp_of_many_large_groups",
            Webp,
            || lossless((1024, 1024), Some(11)),
            Refused("bytes of memory"),
        ),
        // Where the system refuses a decoder in C what it asks for.
        Case {
            memory: 300 * MIB,
            ..case(
                "webp_without_memory",
                Webp,
                || lossless((16_383, 10_000), None),
                Refused("memory"),
            )
        },
        Case {
            memory: 100 * MIB,
            ..case(
                "jpeg_without_memory",
                Jpeg,
                || arithmetic_scans(6000, 1),
                Refused("memory"),
            )
        },
        Case {
            memory: 32 * MIB,
            ..case(
                "tiff_lzma_without_memory",
                Tiff,
                lzma_of_a_large_dictionary,
                Refused("memory"),
            )
        },
        Case {
            time_limit: Duration::from_millis(300),
            ..case(
                "time_that_is_over",
                Jpeg,
                || arithmetic_scans(10_000, 10),
                Refused("milliseconds"),
            )
        },
    ]
}

macro_rules! tests {
    ($($name:ident)*) => {$(
        #[test]
        fn $name() {
            in_a_process_of_its_own(stringify!($name));
        }
    )*

        #[test]
        fn every_case_is_a_test() {
            let tests = [$(stringify!($name)),*];
            let cases: Vec<_> = cases().iter().map(|case| case.name).collect();
            assert_eq!(tests[..], cases[..]);
        }
    };
}

tests! {
    tiff_lzma_bomb
    tiff_offsets_as_bytes
    tiff_width_of_many_values
    tiff_fax_of_empty_runs
    tiff_large_jpeg_in_a_small_strip
    tiff_raw_in_one_strip
    jpeg_of_metadata
    tiff_fax_at_1200_dpi
    tiff_fax_of_long_lines
    jpeg_of_100_scans
    jpeg_of_3000_scans
    jpeg_of_arithmetic_scans
    png_of_tiny_texts
    png_of_more_text_than_allowed
    png_of_one_pixel_a_row
    tiff_strips_of_the_same_empty_blocks
    tiff_strips_of_the_same_jpeg
    tiff_strips_of_the_same_no_ops
    tiff_tiles_that_hardly_touch_the_image
    tiff_strips_of_the_same_lzma_noise
    gif_of_two_clear_codes
    gif_of_a_million_clear_codes
    tiff_lzw_of_two_clear_codes
    webp_of_163_megapixels
    webp_of_many_groups
    webp_of_many_large_groups
    webp_without_memory
    jpeg_without_memory
    tiff_lzma_without_memory
    time_that_is_over
}

fn in_a_process_of_its_own(name: &str) {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--nocapture", "one_case"])
        .env(CASE, name)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success() && text(&output.stdout).contains("1 passed"),
        "{}: {}\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
}

#[test]
#[ignore = "the others run it in a process of its own, which says which case it is"]
fn one_case() {
    let name = std::env::var(CASE).unwrap();
    let case = cases().into_iter().find(|case| case.name == name).unwrap();
    let bytes = (case.make)();
    let options = Options {
        time_limit: case.time_limit,
        ..Options::default()
    };
    let mut crop = vec![0; (options.size * options.size * 3) as usize];
    let before = memory("VmRSS");
    forget_peak();
    keep_within(memory("VmSize") + case.memory);
    let started = cpu_seconds();
    let announced = memory_needed(&bytes, case.kind, &options).unwrap_or(0);
    let result = prepare(&bytes, case.kind, &options, &mut crop);
    let (seconds, peak) = (cpu_seconds() - started, memory("VmHWM"));
    let taken = peak.saturating_sub(before);
    println!(
        "{name}: file {} bytes, {:.2} s, peak {} MiB, {} MiB of them taken, {} MiB announced: {result:?}",
        bytes.len(),
        seconds,
        peak / MIB,
        taken / MIB,
        announced / MIB,
    );
    assert!(result.is_err() || announced <= Limits::MAX_MEMORY);
    match case.expected {
        Prepared => assert!(result.is_ok()),
        Refused(reason) => {
            let refusal = result.unwrap_err().to_string();
            assert!(refusal.contains(reason), "{refusal}");
        }
        Any => {}
    }
    assert!(taken <= announced + SLACK);
    assert!(peak <= MOST_MEMORY);
    assert!(seconds <= MOST_SECONDS);
}

/// A line of this process's own status, in bytes.
fn memory(what: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

/// Has the system count the peak anew.
fn forget_peak() {
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
}

/// Has the system refuse more address space than `bytes`.
fn keep_within(bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: bytes,
        rlim_max: bytes,
    };
    // SAFETY: the limit is valid and only read.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}

/// CPU time of this thread.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid to write to.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn golden(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/files");
    std::fs::read(folder.join(name)).unwrap()
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes
        .windows(what.len())
        .position(|window| window == what)
        .unwrap()
}

/// The values of a tag.
enum Values {
    Shorts(Vec<u16>),
    Longs(Vec<u32>),
    /// The same byte so many times.
    Repeated(u8, usize),
}
use Values::{Longs, Repeated, Shorts};

fn long(value: u32) -> Values {
    Longs(vec![value])
}

/// A little-endian TIFF: the data first, at byte 8, then the tags and what is too long
/// for them.
fn tiff(data: &[u8], mut tags: Vec<(u16, Values)>) -> Vec<u8> {
    tags.sort_by_key(|(tag, _)| *tag);
    let directory = (8 + data.len()).next_multiple_of(2);
    let mut file = b"II*\0".to_vec();
    file.extend((directory as u32).to_le_bytes());
    file.extend(data);
    file.resize(directory, 0);
    file.extend((tags.len() as u16).to_le_bytes());
    let mut more = Vec::new();
    let end = directory + 2 + tags.len() * 12 + 4;
    for (tag, values) in tags {
        let (kind, count, bytes) = match values {
            Shorts(values) => {
                let bytes = values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                (3u16, values.len(), bytes)
            }
            Longs(values) => {
                let bytes = values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect();
                (4, values.len(), bytes)
            }
            Repeated(byte, count) => (1, count, vec![byte; count]),
        };
        file.extend(tag.to_le_bytes());
        file.extend(kind.to_le_bytes());
        file.extend((count as u32).to_le_bytes());
        if bytes.len() <= 4 {
            let mut inline = bytes.clone();
            inline.resize(4, 0);
            file.extend(inline);
        } else {
            file.extend(((end + more.len()) as u32).to_le_bytes());
            more.extend(bytes);
        }
    }
    file.extend([0; 4]);
    file.append(&mut more);
    file
}

/// The tags that every image has, of `samples` samples of `depth` bits, in one strip.
fn tags(
    (width, height): (u32, u32),
    (samples, depth): (u16, u16),
    compression: u16,
    photometric: u16,
) -> Vec<(u16, Values)> {
    vec![
        (256, long(width)),
        (257, long(height)),
        (258, Shorts(vec![depth; usize::from(samples)])),
        (259, Shorts(vec![compression])),
        (262, Shorts(vec![photometric])),
        (277, Shorts(vec![samples])),
    ]
}

fn one_strip(data: &[u8], mut tags: Vec<(u16, Values)>) -> Vec<u8> {
    tags.push((273, long(8)));
    tags.push((279, long(data.len() as u32)));
    tiff(data, tags)
}

/// Grey, with `count` strips of `rows` rows that all have the same data.
fn same_strips(data: &[u8], width: u32, rows: u32, count: u32, compression: u16) -> Vec<u8> {
    let mut tags = tags((width, rows * count), (1, 8), compression, 1);
    tags.push((273, Longs(vec![8; count as usize])));
    tags.push((278, long(rows)));
    tags.push((279, Longs(vec![data.len() as u32; count as usize])));
    tiff(data, tags)
}

fn lzma_bomb() -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
    let zeros = vec![0; 1 << 20];
    for _ in 0..1536 {
        encoder.write_all(&zeros).unwrap();
    }
    let data = encoder.finish().unwrap();
    one_strip(&data, tags((1, 1), (1, 8), 34_925, 1))
}

fn lzma_of_a_large_dictionary() -> Vec<u8> {
    let mut options = liblzma::stream::LzmaOptions::new_preset(0).unwrap();
    options.dict_size(64 << 20);
    let mut filters = liblzma::stream::Filters::new();
    filters.lzma2(&options);
    let check = liblzma::stream::Check::None;
    let stream = liblzma::stream::Stream::new_stream_encoder(&filters, check).unwrap();
    let mut encoder = liblzma::write::XzEncoder::new_stream(Vec::new(), stream);
    encoder.write_all(&[7; 100]).unwrap();
    one_strip(
        &encoder.finish().unwrap(),
        tags((10, 10), (1, 8), 34_925, 1),
    )
}

fn offsets_as_bytes() -> Vec<u8> {
    let mut tags = tags((100, 100), (1, 8), 8, 1);
    tags.push((273, Repeated(8, 480 << 20)));
    tags.push((278, long(1)));
    tags.push((279, Repeated(8, 16)));
    tiff(&[0; 16], tags)
}

fn width_of_many_values() -> Vec<u8> {
    let mut tags = tags((100, 100), (1, 8), 1, 1);
    tags[0].1 = Repeated(100, 128 << 20);
    one_strip(&[0; 10_000], tags)
}

/// Bits from the highest of each byte.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    word: u64,
    count: u32,
}

impl Bits {
    fn put(&mut self, bits: u64, count: u32) {
        self.word = self.word << count | bits;
        self.count += count;
        while self.count >= 8 {
            self.count -= 8;
            self.bytes.push((self.word >> self.count) as u8);
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.put(0, (8 - self.count % 8) % 8);
        self.bytes
    }
}

/// Bits from the lowest of each byte.
#[derive(Default)]
struct LowBits {
    bytes: Vec<u8>,
    word: u64,
    count: u32,
}

impl LowBits {
    fn put(&mut self, bits: u64, count: u32) {
        self.word |= bits << self.count;
        self.count += count;
        while self.count >= 8 {
            self.bytes.push(self.word as u8);
            self.word >>= 8;
            self.count -= 8;
        }
    }

    fn finish(mut self) -> Vec<u8> {
        self.bytes.push(self.word as u8);
        self.bytes
    }
}

fn fax_of_empty_runs() -> Vec<u8> {
    let mut bits = Bits::default();
    for _ in 0..8 {
        // Horizontal, no white pixels, no black ones.
        bits.put(0b001, 3);
        bits.put(0b0011_0101, 8);
        bits.put(0b00_0011_0111, 10);
    }
    let data = bits.finish().repeat((250 << 20) / 21);
    one_strip(&data, tags((1000, 1000), (1, 1), 4, 0))
}

/// Two white pixels and two black ones, again and again, in Group 4: as dithered as can be.
fn fax(width: u32, height: u32) -> Vec<u8> {
    let mut bits = Bits::default();
    for _ in 0..height {
        for _ in 0..width / 4 {
            bits.put(0b001, 3);
            bits.put(0b0111, 4);
            bits.put(0b11, 2);
        }
        match width % 4 {
            0 => {}
            // Horizontal, one white pixel, no black ones.
            1 => {
                bits.put(0b001, 3);
                bits.put(0b00_0111, 6);
                bits.put(0b00_0011_0111, 10);
            }
            other => panic!("{other} pixels are left"),
        }
    }
    one_strip(&bits.finish(), tags((width, height), (1, 1), 4, 0))
}

/// A progressive JPEG that says that it has another size.
fn resized_jpeg(side: u16) -> Vec<u8> {
    let mut jpeg = golden("jpeg-progressive-444.jpg");
    let frame = find(&jpeg, &[0xff, 0xc2]);
    let [high, low] = side.to_be_bytes();
    jpeg[frame + 5..frame + 9].copy_from_slice(&[high, low, high, low]);
    jpeg
}

fn large_jpeg_in_a_small_strip() -> Vec<u8> {
    one_strip(&resized_jpeg(20_000), tags((1, 1), (3, 8), 7, 6))
}

fn raw_in_one_strip() -> Vec<u8> {
    let mut tags = tags((11_500, 11_500), (4, 8), 1, 2);
    tags.push((338, Shorts(vec![2])));
    one_strip(&vec![77; 11_500 * 11_500 * 4], tags)
}

fn metadata_before_a_jpeg() -> Vec<u8> {
    let jpeg = golden("jpeg-444.jpg");
    let mut file = Vec::with_capacity(512 << 20);
    file.extend(&jpeg[..2]);
    let mut segment = vec![0xff, 0xe1, 0xff, 0xff];
    segment.extend(b"Exif\0\0");
    segment.resize(2 + 0xffff, 0);
    while file.len() < 511 << 20 {
        file.extend(&segment);
    }
    file.extend(&jpeg[2..]);
    file
}

fn many_scans(count: usize) -> Vec<u8> {
    let jpeg = resized_jpeg(10_000);
    let scan = find(&jpeg, &[0xff, 0xda]);
    let next = scan + 2 + find(&jpeg[scan + 2..], &[0xff, 0xc4]);
    let mut file = jpeg[..scan].to_vec();
    for _ in 0..count {
        file.extend(&jpeg[scan..next]);
    }
    file.extend([0xff, 0xd9]);
    file
}

/// First scans of all coefficients of one component, in arithmetic coding, of which
/// there is no data: zeros without end.
fn arithmetic_scans(side: u16, count: usize) -> Vec<u8> {
    let [high, low] = side.to_be_bytes();
    let mut file = vec![0xff, 0xd8, 0xff, 0xdb, 0, 67, 0];
    file.extend([1; 64]);
    file.extend([0xff, 0xca, 0, 17, 8, high, low, high, low, 3]);
    for component in 1..=3 {
        file.extend([component, 0x11, 0]);
    }
    file.extend([0xff, 0xda, 0, 12, 3, 1, 0, 2, 0, 3, 0, 0, 0, 0]);
    for _ in 0..count {
        file.extend([0xff, 0xda, 0, 8, 1, 1, 0, 1, 63, 0]);
    }
    file.extend([0xff, 0xd9]);
    file
}

fn zlib(data: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn put_chunk(file: &mut Vec<u8>, name: &[u8; 4], data: &[u8]) {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(name);
    hasher.update(data);
    file.extend((data.len() as u32).to_be_bytes());
    file.extend(name);
    file.extend(data);
    file.extend(hasher.finalize().to_be_bytes());
}

/// A PNG of zeros with something before its pixels.
fn png((width, height): (u32, u32), depth: u8, before: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut file = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut header = width.to_be_bytes().to_vec();
    header.extend(height.to_be_bytes());
    header.extend([depth, 0, 0, 0, 0]);
    put_chunk(&mut file, b"IHDR", &header);
    before(&mut file);
    let line = 1 + (width as usize * usize::from(depth)).div_ceil(8);
    put_chunk(&mut file, b"IDAT", &zlib(&vec![0; line * height as usize]));
    put_chunk(&mut file, b"IEND", &[]);
    file
}

fn texts(count: usize, text: &[u8]) -> Vec<u8> {
    let mut data = b"k\0\0".to_vec();
    data.extend(zlib(text));
    png((10, 10), 8, |file| {
        for _ in 0..count {
            put_chunk(file, b"zTXt", &data);
        }
    })
}

fn thin_png() -> Vec<u8> {
    png((1, 178_000_000), 1, |_| {})
}

fn strips_of_empty_blocks() -> Vec<u8> {
    let mut data = vec![0x78, 0x01];
    for _ in 0..1_000_000 {
        data.extend([0, 0, 0, 0xff, 0xff]);
    }
    same_strips(&data, 100, 1, 20_000, 8)
}

fn strips_of_the_same_jpeg() -> Vec<u8> {
    // As large as the strip, so that only the work is too much.
    let mut jpeg = many_scans(20);
    let frame = find(&jpeg, &[0xff, 0xc2]);
    jpeg[frame + 5..frame + 9].copy_from_slice(&[0, 128, 5, 0]);
    let count = 1000;
    let mut tags = tags((1280, 128 * count), (3, 8), 7, 6);
    tags.push((273, Longs(vec![8; count as usize])));
    tags.push((278, long(128)));
    tags.push((279, Longs(vec![jpeg.len() as u32; count as usize])));
    tiff(&jpeg, tags)
}

fn strips_of_no_ops() -> Vec<u8> {
    same_strips(&vec![0x80; 16 << 20], 100, 1, 10_000, 32_773)
}

fn tiles_beyond_the_image() -> Vec<u8> {
    let data = zlib(&vec![0; 1024 * 16]);
    let height = 1_000_000;
    let count = height / 16;
    let mut tags = tags((1, height), (1, 8), 8, 1);
    tags.push((322, long(1024)));
    tags.push((323, long(16)));
    tags.push((324, Longs(vec![8; count as usize])));
    tags.push((325, Longs(vec![data.len() as u32; count as usize])));
    tiff(&data, tags)
}

fn strips_of_lzma_noise() -> Vec<u8> {
    let mut state = 1u32;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        // Half a byte of noise in each, so that it is worth coding.
        (state & 15) as u8
    })
    .take(4 << 20)
    .collect();
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
    encoder.write_all(&noise).unwrap();
    let data = encoder.finish().unwrap();
    same_strips(&data, 4096, 1024, 40, 34_925)
}

/// Two pixels after so many clear codes.
fn gif_of_clears(count: usize) -> Vec<u8> {
    let mut file = b"GIF89a".to_vec();
    file.extend([2, 0, 1, 0, 0x80, 0, 0, 10, 20, 30, 200, 100, 50]);
    file.extend([b',', 0, 0, 0, 0, 2, 0, 1, 0, 0, 2]);
    // Codes of three bits: clears, one, zero, the end.
    let mut bits = LowBits::default();
    for code in std::iter::repeat_n(4, count).chain([1, 0, 5]) {
        bits.put(code, 3);
    }
    let data = bits.finish();
    for block in data.chunks(255) {
        file.push(block.len() as u8);
        file.extend(block);
    }
    file.extend([0, b';']);
    file
}

fn lzw_of_clears(count: usize) -> Vec<u8> {
    let mut bits = Bits::default();
    for code in std::iter::repeat_n(256, count).chain([7, 9, 257]) {
        bits.put(code, 9);
    }
    one_strip(&bits.finish(), tags((2, 1), (1, 8), 5, 1))
}

/// A black WebP without loss, whose pixels take no bits; with a group of codes for each block
/// of four by four pixels, and colour caches of so many bits, if wanted.
fn lossless((width, height): (u64, u64), groups: Option<u64>) -> Vec<u8> {
    /// A code of one symbol, the first.
    const ONE: (u64, u32) = (0b0001, 4);
    let mut bits = LowBits::default();
    bits.put(0x2f, 8);
    bits.put((width - 1) | (height - 1) << 14, 32);
    // No transforms.
    bits.put(0, 1);
    match groups {
        None | Some(0) => bits.put(0, 1),
        Some(cache) => bits.put(1 | cache << 1, 5),
    }
    let mut count = 1;
    if groups.is_none() {
        bits.put(0, 1);
    } else {
        count = width / 4 * (height / 4);
        // Several groups, of blocks of four; their image has no cache.
        bits.put(0b0_0001, 5);
        for symbols in [280u64, 256] {
            // Eight bits for each of the first 256 symbols, none for the others: the lengths'
            // own code has one bit for 8 and one for many zeros.
            bits.put(0b1_1110, 5);
            for place in 0..19 {
                bits.put((place == 1 || place == 11).into(), 3);
            }
            (0..1 + 256).for_each(|_| bits.put(0, 1));
            if symbols > 256 {
                bits.put(1 | (symbols - 256 - 11) << 1, 8);
            }
        }
        (0..3).for_each(|_| bits.put(ONE.0, ONE.1));
        for group in 0..count {
            let [red, green] = (group as u16).to_be_bytes();
            bits.put(green.reverse_bits().into(), 8);
            bits.put(red.reverse_bits().into(), 8);
        }
    }
    (0..count * 5).for_each(|_| bits.put(ONE.0, ONE.1));
    let mut data = bits.finish();
    data.resize(data.len().next_multiple_of(2) + 64, 0);
    let length = data.len() as u32;
    let mut file = b"RIFF".to_vec();
    file.extend((length + 12).to_le_bytes());
    file.extend(b"WEBPVP8L");
    file.extend(length.to_le_bytes());
    file.extend(data);
    file
}

#[test]
fn clear_codes_change_no_pixel() {
    let prepared = |bytes: &[u8], kind: ImageType| {
        let options = Options {
            size: 8,
            ..Options::default()
        };
        let mut crop = vec![0; 8 * 8 * 3];
        prepare(bytes, kind, &options, &mut crop).unwrap();
        crop
    };
    let gif = prepared(&gif_of_clears(1), ImageType::Gif);
    assert!(gif.contains(&200) && gif.contains(&10));
    assert_eq!(prepared(&gif_of_clears(7), ImageType::Gif), gif);
    let tiff = prepared(&lzw_of_clears(1), ImageType::Tiff);
    assert!(tiff.iter().all(|&level| (6..=10).contains(&level)));
    assert_eq!(prepared(&lzw_of_clears(7), ImageType::Tiff), tiff);
}
