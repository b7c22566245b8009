//! Small helpers around files: digests, permissions.

use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};

/// Read size for digests: large enough that system calls do not show, small enough for the cache.
const DIGEST_CHUNK: usize = 1 << 20;

/// SHA-256 of bytes, in lower-case hexadecimal.
pub fn sha256_of_bytes(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// SHA-256 of a file, in lower-case hexadecimal.
pub fn sha256_of_file(path: &Path) -> io::Result<String> {
    let mut file = BufReader::with_capacity(DIGEST_CHUNK, File::open(path)?);
    let mut hasher = Sha256::new();
    io::copy(&mut file, &mut hasher)?;
    Ok(hex::encode(hasher.finalize()))
}

/// Floats as little-endian bytes. Written into a buffer of known size: the compiler makes a copy of
/// it, where collecting byte by byte would cost seconds for a model.
pub fn little_endian(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(values)];
    for (word, value) in bytes.chunks_exact_mut(size_of::<f32>()).zip(values) {
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Temporary files are born private; what they become is as readable as any other file.
pub fn make_readable(path: &Path) -> io::Result<()> {
    let mode = if path.is_dir() { 0o755 } else { 0o644 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
}
