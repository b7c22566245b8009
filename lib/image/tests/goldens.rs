//! Every kind of image against Pillow's crop of it. The files, the crops and
//! what Pillow refuses were made by `goldens/make.py`.

use clip_image::{ImageError, ImageType, Options, prepare, testing};
use serde_json::Value;
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

fn cases(kind: ImageType) -> Vec<Value> {
    let index = std::fs::read(folder().join("index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let all = index["cases"].as_array().unwrap();
    let of_kind: Vec<Value> = all
        .iter()
        .filter(|case| ImageType::from_name(case["file"].as_str().unwrap()) == Some(kind))
        .cloned()
        .collect();
    assert!(!of_kind.is_empty(), "no golden files of {kind:?}");
    of_kind
}

/// Mean and greatest difference.
fn differences(ours: &[u8], expected: &[u8]) -> (f64, u8) {
    assert_eq!(ours.len(), expected.len());
    let each = || ours.iter().zip(expected).map(|(a, b)| a.abs_diff(*b));
    let sum: u64 = each().map(u64::from).sum();
    (sum as f64 / ours.len() as f64, each().max().unwrap_or(0))
}

/// What is wrong with a case, if anything.
fn complaint(case: &Value, kind: ImageType) -> Option<String> {
    let name = case["file"].as_str().unwrap();
    let bytes = std::fs::read(folder().join("files").join(name)).unwrap();
    if let Some(expected) = case["decoded"].as_str() {
        let expected = std::fs::read(folder().join("expected").join(expected)).unwrap();
        return match testing::decode_whole(&bytes, kind) {
            Ok((_, _, samples)) if samples == expected => None,
            Ok((_, _, samples)) => {
                let (mean, most) = differences(&samples, &expected);
                Some(format!(
                    "{name}: decoded pixels differ by {mean:.3}, at most {most}"
                ))
            }
            Err(error) => Some(format!("{name}: {error}")),
        };
    }
    let options = Options {
        size: case["size"].as_u64().unwrap() as u32,
        apply_exif_orientation: case["orient"].as_bool().unwrap_or(false),
        ..Options::default()
    };
    let mut crop = vec![0; (options.size * options.size * 3) as usize];
    let result = prepare(&bytes, kind, &options, &mut crop);
    match (result, case["expected"].as_str()) {
        (Ok(_), Some(expected)) => {
            let expected = std::fs::read(folder().join("expected").join(expected)).unwrap();
            let (mean, most) = differences(&crop, &expected);
            let allowed = &case["tolerance"];
            let mean_allowed = allowed[0].as_f64().unwrap_or(0.0);
            let most_allowed = allowed[1].as_u64().unwrap_or(0);
            (mean > mean_allowed || u64::from(most) > most_allowed)
                .then(|| format!("{name}: crop differs by {mean:.3}, at most {most}"))
        }
        (Err(error), Some(_)) => Some(format!("{name}: refused: {error}")),
        (Ok(_), None) => Some(format!(
            "{name}: decoded, but refused there: {}",
            case["refused"]
        )),
        (Err(ImageError::Decoder { detail, .. }), None) => Some(format!("{name}: panic: {detail}")),
        (Err(_), None) => None,
    }
}

fn all_match(kind: ImageType) {
    let complaints: Vec<String> = cases(kind)
        .iter()
        .filter_map(|case| complaint(case, kind))
        .collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn jpeg_pixels_and_crops_are_pillows() {
    all_match(ImageType::Jpeg);
}

#[test]
fn png_crops_are_pillows() {
    all_match(ImageType::Png);
}

#[test]
fn gif_crops_are_pillows() {
    all_match(ImageType::Gif);
}

#[test]
fn bmp_crops_are_pillows() {
    all_match(ImageType::Bmp);
}

#[test]
fn pcx_crops_are_pillows() {
    all_match(ImageType::Pcx);
}

#[test]
fn webp_crops_are_pillows() {
    all_match(ImageType::Webp);
}

#[test]
fn tiff_crops_are_pillows() {
    all_match(ImageType::Tiff);
}
