//! What must hold for any bytes that somebody else made. Each target is a function of bytes that
//! panics where it does not; `cargo xtask fuzz` has libFuzzer look for such bytes, and the tests
//! run the seeds and all that was ever found.

#[cfg(feature = "libfuzzer")]
pub mod memory;

use clip_image::{DecodeMode, ImageError, ImageType, Limits, Options, memory_needed, prepare};
use clip_model::Precision;
use clip_model::build::{BuildOptions, build};
use clip_model::checkpoint::{Checkpoint, Overrides};
use events::{CloudEvent, Item, S3Url, decode_notification_key, deliveries, parse_work};
use template::{NotDeployed, Parameters, Template};

/// Panics where something does not hold.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: &[(&str, Target)] = &[
    ("bmp", |bytes| image(bytes, ImageType::Bmp)),
    ("gif", |bytes| image(bytes, ImageType::Gif)),
    ("jpeg", |bytes| image(bytes, ImageType::Jpeg)),
    ("pcx", |bytes| image(bytes, ImageType::Pcx)),
    ("png", png),
    ("tiff", |bytes| image(bytes, ImageType::Tiff)),
    ("webp", |bytes| image(bytes, ImageType::Webp)),
    ("events", events),
    ("s3-key", s3_key),
    ("checkpoint", checkpoint),
    ("template", template),
];

/// Side of the crops: small, so that decoding is what takes the time.
const SIZE: u32 = 32;

/// What a decode may hold beyond what it announced.
const SLACK_BYTES: u64 = 64 * 1024 * 1024;

fn options() -> Options {
    Options {
        size: SIZE,
        limits: Limits {
            max_pixels: 500_000,
            max_memory: 64 * 1024 * 1024,
            ..Limits::default()
        },
        ..Options::default()
    }
}

/// The pixels, or why there are none.
fn crop(
    bytes: &[u8],
    kind: ImageType,
    options: &Options,
    by: impl FnOnce(&[u8], ImageType, &Options, &mut [u8]) -> Result<clip_image::Prepared, ImageError>,
) -> Result<(clip_image::Prepared, Vec<u8>), ImageError> {
    let mut crop = vec![0; (SIZE * SIZE * 3) as usize];
    let result = by(bytes, kind, options, &mut crop);
    if let Err(error) = &result {
        let is_slow = matches!(
            error,
            ImageError::LimitExceeded {
                what: "milliseconds of work",
                ..
            }
        );
        let is_panic = matches!(error, ImageError::Decoder { .. });
        assert!(!is_slow && !is_panic, "{error}");
        assert!(!error.to_string().is_empty());
    }
    result.map(|prepared| (prepared, crop))
}

/// A decode holds what it announced, and gives the same row by row and as a whole.
fn image(bytes: &[u8], kind: ImageType) {
    let options = options();
    let announced = memory_needed(bytes, kind, &options);
    let streamed = within(announced.as_ref().map_or(0, |bytes| *bytes), || {
        crop(bytes, kind, &options, prepare)
    });
    if streamed.is_ok() {
        assert!(
            announced
                .as_ref()
                .is_ok_and(|bytes| *bytes <= options.limits.max_memory)
        );
    }
    // One of the other ways, by the bytes themselves, so that it is the same each time.
    match (crc32fast::hash(bytes) % 4, kind) {
        #[cfg(all(fuzzing, target_arch = "x86_64"))]
        (0 | 1, ImageType::Jpeg) if announced.is_ok() => {
            let is_whole = crc32fast::hash(bytes) % 4 == 0;
            assert_eq!(
                clip_image::testing::jpeg_disagreement(bytes, is_whole),
                None
            );
        }
        (2, ImageType::Jpeg) => {
            let fast = Options {
                decode: DecodeMode::Fast,
                ..options
            };
            let _ = crop(bytes, kind, &fast, prepare);
        }
        (3, ImageType::Jpeg | ImageType::Png | ImageType::Webp) => {
            let turned = Options {
                apply_exif_orientation: true,
                ..options
            };
            let _ = crop(bytes, kind, &turned, prepare);
        }
        _ => {
            let whole = crop(bytes, kind, &options, clip_image::testing::prepare_whole);
            let outcomes = [&streamed, &whole].map(|way| way.as_ref().map(|_| ()));
            assert!(streamed == whole, "row by row and as a whole: {outcomes:?}");
        }
    }
}

/// Runs `work`, which may hold `announced` bytes and a little more.
fn within<T>(announced: u64, work: impl FnOnce() -> T) -> T {
    #[cfg(feature = "libfuzzer")]
    {
        let (result, peak) = memory::peak(work);
        let most = announced + SLACK_BYTES;
        assert!(
            peak <= most,
            "{peak} bytes were held, {announced} announced"
        );
        result
    }
    #[cfg(not(feature = "libfuzzer"))]
    {
        let _ = (announced, SLACK_BYTES);
        work()
    }
}

/// Mostly with checksums that fit, which mutations never find.
fn png(bytes: &[u8]) {
    let mut mended = bytes.to_vec();
    if crc32fast::hash(bytes).is_multiple_of(8) {
        return image(bytes, ImageType::Png);
    }
    let mut at = 8;
    while let Some(head) = mended.get(at..at + 8) {
        let length = u32::from_be_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let end = at + 8 + length;
        let Some(chunk) = mended.get(at + 4..end) else {
            break;
        };
        let checksum = crc32fast::hash(chunk).to_be_bytes();
        let Some(place) = mended.get_mut(end..end + 4) else {
            break;
        };
        place.copy_from_slice(&checksum);
        at = end + 4;
    }
    image(&mended, ImageType::Png);
}

/// Whatever form work arrives in, what is taken out of it means the same when it is sent on.
fn events(bytes: &[u8]) {
    let mut items = parse_work(bytes).unwrap_or_default();
    if let Ok(payload) = serde_json::from_slice(bytes) {
        for delivery in deliveries(&payload) {
            items.extend(delivery.items.unwrap_or_default());
        }
    }
    for item in items {
        match item {
            Item::Object(object) => {
                assert_eq!(object.url.to_string().parse(), Ok(object.url.clone()));
                let event = object.to_event(ImageType::Jpeg);
                sent_on(&event);
            }
            Item::Event(event) => sent_on(&event),
            Item::Rejected { reason, .. } | Item::Ignored { reason } => assert!(!reason.is_empty()),
        }
    }
}

fn sent_on(event: &CloudEvent) {
    let again = CloudEvent::parse(event.to_json().as_bytes());
    assert_eq!(again.as_ref().ok(), Some(event));
    let _ = (event.data.source.image_type(), event.to_standard());
}

/// A key survives its way through a URL and through a notification.
fn s3_key(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    if let Ok(url) = text.parse::<S3Url>() {
        assert_eq!(url.to_string().parse(), Ok(url));
    }
    let url = S3Url::new("bucket", &text);
    let written = url.to_string();
    if text.chars().count() >= 2 {
        assert_eq!(written.parse(), Ok(url));
    }
    let path = &written["s3://bucket/".len()..];
    assert_eq!(decode_notification_key(path).as_deref(), Ok(&*text));
    let _ = (decode_notification_key(&text), ImageType::from_name(&text));
}

/// A checkpoint is read, and compiled where it can be, within a multiple of its size. Bytes that
/// are a JSON header get the length before it and as many zeros as it asks for behind it.
fn checkpoint(bytes: &[u8]) {
    /// Data behind a header.
    const MOST_DATA: u64 = 1024 * 1024;
    let mut file = bytes.to_vec();
    if bytes.first() == Some(&b'{') {
        let header: serde_json::Value = serde_json::from_slice(bytes).unwrap_or_default();
        let ends = header.as_object().into_iter().flatten();
        let ends = ends.filter_map(|(_, tensor)| tensor["data_offsets"][1].as_u64());
        let data = ends.max().unwrap_or(0).min(MOST_DATA) as usize;
        file = (bytes.len() as u64).to_le_bytes().to_vec();
        file.extend(bytes);
        file.resize(file.len() + data, 0);
    }
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let path = folder.path().join("weights.safetensors");
    std::fs::write(&path, &file).expect("room for the weights");
    within(8 * file.len() as u64, || {
        let Ok(checkpoint) = Checkpoint::open(&path, Overrides::default()) else {
            return;
        };
        let options = BuildOptions {
            precision: if bytes.len().is_multiple_of(2) {
                Precision::Fp32
            } else {
                Precision::Int8
            },
            labels: None,
            ..BuildOptions::default()
        };
        let _ = build(
            &checkpoint,
            &folder.path().join("bundle"),
            &options,
            &|_| {},
        );
    });
}

/// A template is read and resolved.
fn template(bytes: &[u8]) {
    within(0, || {
        if let Ok(template) = Template::parse(&String::from_utf8_lossy(bytes)) {
            let _ = template.resolve(&Parameters::new(), &NotDeployed);
        }
    });
}
