//! Which files are uploaded, and under which keys.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use events::ImageType;
use thiserror::Error;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputFile {
    pub path: PathBuf,
    /// Its key in the source bucket.
    pub key: String,
}

#[derive(Debug, Error)]
pub enum FilesError {
    /// A path that is not there or cannot be read.
    #[error("{path}: {source}")]
    Unreadable { path: PathBuf, source: io::Error },
    #[error("no files in {0}")]
    Nothing(String),
}

/// Expands files and folders, the latter recursively; hidden files are left
/// out. A folder's files keep their path below it, and its name, as their key.
pub fn collect(arguments: &[PathBuf]) -> Result<Vec<InputFile>, FilesError> {
    let mut files = Vec::new();
    for argument in arguments {
        let unreadable = |source| FilesError::Unreadable {
            path: argument.clone(),
            source,
        };
        if fs::metadata(argument).map_err(unreadable)?.is_dir() {
            // The name of `.` or `photos/..` is only known to the system.
            let whole = fs::canonicalize(argument).map_err(unreadable)?;
            let name = whole
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            walk(argument, &name, &mut files)?;
        } else {
            let name = argument.file_name().unwrap_or(argument.as_os_str());
            files.push(InputFile {
                path: argument.clone(),
                key: name.to_string_lossy().into_owned(),
            });
        }
    }
    if files.is_empty() {
        let given: Vec<String> = arguments
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        return Err(FilesError::Nothing(given.join(", ")));
    }
    make_keys_unique(&mut files);
    Ok(files)
}

/// So many images, the files' contents in turn under keys of their own.
pub fn burst(files: &[InputFile], count: usize) -> Vec<InputFile> {
    let numbered = files.iter().cycle().take(count).enumerate();
    numbered
        .map(|(number, file)| InputFile {
            path: file.path.clone(),
            key: format!("burst/{number:06}/{}", file.key),
        })
        .collect()
}

/// The sample images that come with the project.
pub fn samples() -> Result<Vec<InputFile>, FilesError> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("samples");
    let mut files = Vec::new();
    walk(&folder, "", &mut files)?;
    files.retain(|file| ImageType::from_name(&file.key).is_some());
    if files.is_empty() {
        Err(FilesError::Nothing(folder.display().to_string()))
    } else {
        Ok(files)
    }
}

fn walk(folder: &Path, prefix: &str, files: &mut Vec<InputFile>) -> Result<(), FilesError> {
    let unreadable = |source| FilesError::Unreadable {
        path: folder.to_owned(),
        source,
    };
    let mut entries = fs::read_dir(folder)
        .map_err(unreadable)?
        .collect::<Result<Vec<_>, _>>()
        .map_err(unreadable)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') {
            continue;
        }
        let key = if prefix.is_empty() {
            name
        } else {
            format!("{prefix}/{name}")
        };
        let kind = entry.file_type().map_err(unreadable)?;
        // Links to folders are not followed: they may lead round in a circle.
        if kind.is_dir() {
            walk(&entry.path(), &key, files)?;
        } else if entry.path().is_file() {
            files.push(InputFile {
                path: entry.path(),
                key,
            });
        }
    }
    Ok(())
}

/// S3's keys have at least two characters here (the wire contract), and two
/// files of one name are two objects.
fn make_keys_unique(files: &mut [InputFile]) {
    let mut taken = BTreeSet::new();
    for file in files {
        let plain = if file.key.chars().count() < 2 {
            format!("{}_", file.key)
        } else {
            file.key.clone()
        };
        let mut key = plain.clone();
        let mut number = 2;
        while !taken.insert(key.clone()) {
            key = format!("{number}/{plain}");
            number += 1;
        }
        file.key = key;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_walked_and_keys_are_unique() {
        let folder = tempfile::tempdir().expect("a folder");
        let photos = folder.path().join("my photos");
        fs::create_dir_all(photos.join("deep/er")).expect("folders");
        for name in ["b é+.jpg", "deep/er/a.png", ".hidden", "x"] {
            fs::write(photos.join(name), name).expect("a file");
        }
        let lone = photos.join("x");
        let files = collect(&[
            photos.clone(),
            lone,
            photos.join("deep/er/a.png"),
            photos.join("deep/er/a.png"),
        ])
        .expect("files");
        let keys: Vec<&str> = files.iter().map(|file| file.key.as_str()).collect();
        assert_eq!(
            keys,
            [
                "my photos/b é+.jpg",
                "my photos/deep/er/a.png",
                "my photos/x",
                "x_",
                "a.png",
                "2/a.png"
            ]
        );
    }

    #[test]
    fn what_is_not_there_is_named() {
        let missing = collect(&["/no/such/photo.jpg".into()])
            .expect_err("an error")
            .to_string();
        assert!(missing.starts_with("/no/such/photo.jpg: "), "{missing}");
        let empty = tempfile::tempdir().expect("a folder");
        assert!(matches!(
            collect(&[empty.path().to_owned()]),
            Err(FilesError::Nothing(_))
        ));
    }

    #[test]
    fn the_samples_are_all_seven_types() {
        let files = samples().expect("samples");
        let types: BTreeSet<&str> = files
            .iter()
            .filter_map(|file| ImageType::from_name(&file.key))
            .map(|kind| kind.mime())
            .collect();
        assert_eq!(types.len(), 7, "{types:?}");
        for file in &files {
            let content = fs::read(&file.path).expect("readable");
            assert_eq!(
                ImageType::detect(&content),
                ImageType::from_name(&file.key),
                "{}",
                file.key
            );
        }
    }
}
