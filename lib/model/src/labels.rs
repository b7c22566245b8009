//! The words that an image can be described with, each with the embedding of a sentence about it.

use std::collections::HashMap;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::bundle::BundleError;
use crate::files::little_endian;

/// The labels that a bundle gets unless the user brings others: everyday nouns of many domains.
pub const DEFAULT_LABELS: &str = include_str!("../labels.txt");
/// The sentence whose embedding stands for a label.
pub const PROMPT: &str = "a photo of a {label}";

/// Key of the file metadata with the names as a JSON list. The only key: see
/// [`crate::synthesize::MARK_KEY`].
const NAMES_KEY: &str = "labels";
const TENSOR: &str = "embeddings";

/// Labels with their normalised embeddings.
#[derive(Clone, Debug, PartialEq)]
pub struct Labels {
    names: Vec<String>,
    dimensions: usize,
    /// Row-major, one row of length one per label.
    embeddings: Vec<f32>,
}

impl Labels {
    /// Labels from their embeddings, which are brought to length one.
    ///
    /// # Panics
    ///
    /// Where `embeddings` does not hold one row of `dimensions` values per name.
    pub fn new(names: Vec<String>, dimensions: usize, mut embeddings: Vec<f32>) -> Labels {
        assert_eq!(
            embeddings.len(),
            names.len() * dimensions,
            "one row per label"
        );
        for row in embeddings.chunks_exact_mut(dimensions.max(1)) {
            let length = norm(row);
            for value in row {
                *value /= length;
            }
        }
        Labels {
            names,
            dimensions,
            embeddings,
        }
    }

    /// The names, in the order of the list they were built from.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The `k` labels nearest to an embedding, with their cosine similarity, best first. An
    /// embedding of another length has no label near it.
    pub fn top(&self, embedding: &[f32], k: usize) -> Vec<(String, f32)> {
        if embedding.len() != self.dimensions {
            return Vec::new();
        }
        let length = norm(embedding);
        let mut scored: Vec<(usize, f32)> = self
            .embeddings
            .chunks_exact(self.dimensions)
            .map(|row| row.iter().zip(embedding).map(|(a, b)| a * b).sum::<f32>() / length)
            .enumerate()
            .collect();
        // Equal scores keep the list's order, so that equal images get equal labels.
        scored.sort_by(|(_, a), (_, b)| b.total_cmp(a));
        scored
            .into_iter()
            .take(k)
            .map(|(index, score)| (self.names[index].clone(), score))
            .collect()
    }

    /// Writes the labels as a safetensors file.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let bytes = little_endian(&self.embeddings);
        let shape = vec![self.names.len(), self.dimensions];
        let view = TensorView::new(Dtype::F32, shape, &bytes).map_err(std::io::Error::other)?;
        let names = serde_json::to_string(&self.names).map_err(std::io::Error::other)?;
        let metadata = HashMap::from([(NAMES_KEY.to_owned(), names)]);
        let encoded = safetensors::serialize([(TENSOR, view)], Some(metadata))
            .map_err(std::io::Error::other)?;
        std::fs::write(path, encoded)
    }

    /// Reads what [`Labels::write`] wrote.
    pub(crate) fn read(path: &Path, dimensions: usize) -> Result<Labels, BundleError> {
        Labels::decode(path, dimensions).map_err(|error| BundleError::Damaged {
            path: path.to_owned(),
            reason: error.to_string(),
        })
    }

    fn decode(path: &Path, dimensions: usize) -> Result<Labels, Box<dyn std::error::Error>> {
        let encoded = std::fs::read(path)?;
        let (_, header) = SafeTensors::read_metadata(&encoded)?;
        let metadata = header.metadata().as_ref();
        let names = metadata
            .and_then(|metadata| metadata.get(NAMES_KEY))
            .ok_or("it names no labels")?;
        let names: Vec<String> = serde_json::from_str(names)?;
        let tensors = SafeTensors::deserialize(&encoded)?;
        let tensor = tensors.tensor(TENSOR)?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != [names.len(), dimensions] {
            return Err(format!(
                "embeddings of shape {:?}, wanted {} labels of {dimensions} values",
                tensor.shape(),
                names.len()
            )
            .into());
        }
        let embeddings = tensor
            .data()
            .chunks_exact(4)
            .map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]]))
            .collect();
        Ok(Labels {
            names,
            dimensions,
            embeddings,
        })
    }
}

/// One label per line; empty lines, comments after `#`, and repetitions are dropped.
pub fn parse_list(text: &str) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    text.lines()
        .map(|line| line.split('#').next().unwrap_or_default().trim())
        .filter(|label| !label.is_empty())
        .filter(|label| seen.insert(label.to_lowercase()))
        .map(str::to_owned)
        .collect()
}

/// Length of a vector; never zero, so that it can be divided by.
fn norm(vector: &[f32]) -> f32 {
    vector
        .iter()
        .map(|value| value * value)
        .sum::<f32>()
        .sqrt()
        .max(f32::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn axes() -> Labels {
        let names = ["east", "north", "up"].map(str::to_owned).to_vec();
        Labels::new(names, 3, vec![2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 4.0])
    }

    #[test]
    fn the_nearest_labels_come_first_with_their_cosine() {
        let top = axes().top(&[0.0, 6.0, 8.0], 2);
        assert_eq!(top[0].0, "up");
        assert_eq!(top[1].0, "north");
        assert!((top[0].1 - 0.8).abs() < 1e-6 && (top[1].1 - 0.6).abs() < 1e-6);
    }

    #[test]
    fn asking_for_more_labels_than_there_are_gives_all() {
        assert_eq!(axes().top(&[1.0, 0.0, 0.0], 10).len(), 3);
        assert!(axes().top(&[1.0, 0.0], 10).is_empty());
    }

    #[test]
    fn a_null_vector_is_near_nothing_but_does_not_fail() {
        assert!(axes().top(&[0.0; 3], 1)[0].1.abs() < 1e-6);
    }

    #[test]
    fn labels_survive_their_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("labels");
        axes().write(&path).expect("a written file");
        assert_eq!(Labels::read(&path, 3).expect("labels"), axes());
        assert!(matches!(
            Labels::read(&path, 4),
            Err(BundleError::Damaged { .. })
        ));
    }

    #[test]
    fn the_default_list_is_clean_and_large() {
        let labels = parse_list(DEFAULT_LABELS);
        assert!(labels.len() >= 480, "{}", labels.len());
        let words = DEFAULT_LABELS
            .lines()
            .filter(|line| !line.trim().is_empty() && !line.starts_with('#'))
            .count();
        assert_eq!(labels.len(), words, "the list repeats itself");
    }

    #[test]
    fn lists_may_have_comments_and_repetitions() {
        assert_eq!(
            parse_list("cat\n\n# animals\nDog # a pet\ncat\ndog\n"),
            ["cat", "Dog"]
        );
    }
}
