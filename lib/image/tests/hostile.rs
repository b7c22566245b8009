//! Files that mean harm, or that a broken disk made: no panic, no memory beyond
//! the limits, an error that says why.

use clip_image::{DecodeMode, ImageError, ImageType, Limits, Options, memory_needed, prepare};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const SIZE: u32 = 32;

fn golden(name: &str) -> Vec<u8> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/files");
    std::fs::read(folder.join(name)).unwrap()
}

/// Every golden file, with its type.
fn seeds() -> &'static [(ImageType, Vec<u8>)] {
    static SEEDS: OnceLock<Vec<(ImageType, Vec<u8>)>> = OnceLock::new();
    SEEDS.get_or_init(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens/files");
        let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        paths.sort();
        paths
            .iter()
            .map(|path| {
                let kind = ImageType::from_name(path.to_str().unwrap()).unwrap();
                (kind, std::fs::read(path).unwrap())
            })
            .collect()
    })
}

fn options() -> Options {
    Options {
        size: SIZE,
        limits: Limits {
            // Small, so that a changed header cannot make the test slow.
            max_pixels: 4_000_000,
            max_memory: 64 * 1024 * 1024,
            ..Limits::default()
        },
        apply_exif_orientation: true,
        ..Options::default()
    }
}

/// Prepares and says whether that went as it must: no panic inside a decoder.
fn survives(bytes: &[u8], kind: ImageType, options: &Options) -> Result<(), TestCaseError> {
    let mut crop = vec![0; (SIZE * SIZE * 3) as usize];
    let result = prepare(bytes, kind, options, &mut crop);
    if let Err(error) = &result {
        prop_assert!(
            !matches!(error, ImageError::Decoder { .. }),
            "{kind:?}: {error}"
        );
        prop_assert!(!error.to_string().is_empty());
    } else {
        let needed = memory_needed(bytes, kind, options).unwrap();
        prop_assert!(needed <= options.limits.max_memory);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn changed_bytes_do_no_harm(
        seed in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), any::<bool>()), 1..12),
        fast in any::<bool>(),
    ) {
        let (kind, bytes) = &seeds()[seed.index(seeds().len())];
        let mut bytes = bytes.clone();
        for (place, value, early) in changes {
            if !bytes.is_empty() {
                // Headers are where harm is done, so they are hit as often as the rest.
                let reach = if early { bytes.len().min(200) } else { bytes.len() };
                let at = place.index(reach);
                bytes[at] = value;
            }
        }
        let mut options = options();
        if fast {
            options.decode = DecodeMode::Fast;
        }
        survives(&bytes, *kind, &options)?;
    }

    #[test]
    fn cut_files_do_no_harm(
        seed in any::<prop::sample::Index>(),
        length in any::<prop::sample::Index>(),
    ) {
        let (kind, bytes) = &seeds()[seed.index(seeds().len())];
        let length = length.index(bytes.len() + 1);
        survives(&bytes[..length], *kind, &options())?;
    }

    #[test]
    fn a_file_under_another_type_does_no_harm(
        seed in any::<prop::sample::Index>(),
        kind in prop::sample::select(&ImageType::ALL[..]),
    ) {
        let (_, bytes) = &seeds()[seed.index(seeds().len())];
        survives(bytes, kind, &options())?;
    }

    #[test]
    fn noise_does_no_harm(
        kind in prop::sample::select(&ImageType::ALL[..]),
        bytes in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        survives(&bytes, kind, &options())?;
    }
}

#[test]
fn a_bomb_is_refused_by_its_header_with_the_figures() {
    let mut crop = vec![0; (SIZE * SIZE * 3) as usize];
    let options = Options {
        size: SIZE,
        ..Options::default()
    };
    let error = prepare(&golden("png-huge.png"), ImageType::Png, &options, &mut crop).unwrap_err();
    assert_eq!(
        error,
        ImageError::LimitExceeded {
            what: "pixels",
            needed: 3_600_000_000,
            limit: 178_956_970,
        }
    );
    assert_eq!(error.kind(), "limit-exceeded");
}

#[test]
fn memory_is_limited_by_what_the_header_tells() {
    let bytes = golden("jpeg-progressive-420.jpg");
    let mut options = Options {
        size: SIZE,
        ..Options::default()
    };
    let needed = memory_needed(&bytes, ImageType::Jpeg, &options).unwrap();
    options.limits.max_memory = needed - 1;
    let mut crop = vec![0; (SIZE * SIZE * 3) as usize];
    assert_eq!(
        prepare(&bytes, ImageType::Jpeg, &options, &mut crop),
        Err(ImageError::LimitExceeded {
            what: "bytes of memory",
            needed,
            limit: needed - 1,
        })
    );
    options.limits.max_memory = needed;
    assert!(prepare(&bytes, ImageType::Jpeg, &options, &mut crop).is_ok());
}

#[test]
fn a_file_larger_than_allowed_is_not_looked_at() {
    let bytes = golden("jpeg-text.jpg");
    let mut options = Options::default();
    options.limits.max_bytes = 5;
    assert!(matches!(
        memory_needed(&bytes, ImageType::Jpeg, &options),
        Err(ImageError::LimitExceeded {
            what: "bytes of file",
            limit: 5,
            ..
        })
    ));
}

#[test]
fn a_thin_image_costs_only_its_crop() {
    let bytes = golden("png-thin.png");
    let needed = memory_needed(&bytes, ImageType::Png, &Options::default()).unwrap();
    // Two mebibytes are the decoder's own in any case.
    assert!(needed < 3 * 1024 * 1024, "{needed} bytes");
}

#[test]
fn thousands_of_scans_are_refused_soon() {
    // A progressive file whose first scan is repeated: legal, and endless work.
    let bytes = golden("jpeg-progressive-444.jpg");
    let scan = find(&bytes, &[0xff, 0xda]);
    let next = scan + 2 + find(&bytes[scan + 2..], &[0xff, 0xc4]);
    let mut hostile = bytes[..scan].to_vec();
    // The largest frame that the limits allow.
    let frame = find(&hostile, &[0xff, 0xc2]);
    hostile[frame + 5..frame + 9].copy_from_slice(&[0x20, 0, 0x20, 0]);
    for _ in 0..4000 {
        hostile.extend_from_slice(&bytes[scan..next]);
    }
    hostile.extend_from_slice(&[0xff, 0xd9]);
    let started = std::time::Instant::now();
    let mut crop = vec![0; (SIZE * SIZE * 3) as usize];
    let options = Options {
        size: SIZE,
        ..Options::default()
    };
    let result = prepare(&hostile, ImageType::Jpeg, &options, &mut crop);
    assert!(result.is_err(), "{result:?}");
    assert!(started.elapsed().as_secs() < 10);
}

fn find(bytes: &[u8], what: &[u8]) -> usize {
    bytes
        .windows(what.len())
        .position(|window| window == what)
        .unwrap()
}

#[test]
fn the_output_must_have_the_crops_size() {
    let bytes = golden("png-rgb.png");
    let mut crop = vec![0; 10];
    assert_eq!(
        prepare(&bytes, ImageType::Png, &Options::default(), &mut crop),
        Err(ImageError::OutputSize {
            got: 10,
            wanted: 224 * 224 * 3,
        })
    );
}

#[test]
fn fast_decoding_stays_close_to_exact() {
    for name in ["jpeg-landscape.jpg", "jpeg-portrait.jpg"] {
        let bytes = golden(name);
        // A small crop, so that every reduced scale has its turn.
        for size in [16, 24, 32, 40, 48, 56, 64, 72, 96, 128] {
            let exact = Options {
                size,
                ..Options::default()
            };
            let fast = Options {
                decode: DecodeMode::Fast,
                ..exact
            };
            let mut crops = [exact, fast].map(|options| {
                let mut crop = vec![0; (size * size * 3) as usize];
                prepare(&bytes, ImageType::Jpeg, &options, &mut crop).unwrap();
                crop
            });
            let [exact, fast] = &mut crops;
            let sum: u64 = exact
                .iter()
                .zip(fast)
                .map(|(a, b)| u64::from(a.abs_diff(*b)))
                .sum();
            let mean = sum as f64 / f64::from(size * size * 3);
            // Noise and hard edges throughout; photos come to about 0.2.
            assert!(mean < 2.0, "{name} at {size}: {mean}");
        }
    }
}
