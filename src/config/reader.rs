//! Reads the files of a configuration and remembers what stood in them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::blobs::Digest;

/// Far above any configuration, certificate chain or token; what is larger is a wrong path.
const MAX_FILE: u64 = 1 << 20;

/// Reads files, and keeps a digest of each, so that a change can be told later. Digests and not contents: secrets
/// should not lie in memory twice.
#[derive(Debug, Default, Clone)]
pub struct Reader {
    seen: BTreeMap<PathBuf, Seen>,
}

/// What a file was when it was read. A file that could not be read counts as well: it may come later.
type Seen = Option<Digest>;

/// Why a file was not read, in words that go behind "found" and the path.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    #[error("which does not exist")]
    Missing,
    #[error(
        "which is a folder (Docker makes one where the file of a bind mount is missing on the host: create the file \
         there, remove the folder and start the container again)"
    )]
    Folder,
    #[error("which is no regular file")]
    Special,
    #[error("which this process may not read (permission denied)")]
    Denied,
    #[error("which is empty")]
    Empty,
    #[error("which is larger than 1 MiB")]
    TooLarge,
    #[error("which cannot be read ({0})")]
    Other(io::ErrorKind),
}

impl Reader {
    /// The whole content of a file that is not empty.
    ///
    /// # Errors
    /// Why there is none.
    pub fn read(&mut self, path: &Path) -> Result<Vec<u8>, Unreadable> {
        let content = read(path);
        self.seen
            .insert(path.to_path_buf(), content.as_deref().ok().map(Digest::of));
        match content {
            Ok(content) if content.iter().all(u8::is_ascii_whitespace) => Err(Unreadable::Empty),
            other => other,
        }
    }

    /// Whether a file that was read has another content now. Reads them all again: neither the time nor the inode of
    /// a file tells what a bind mount or a swapped symbolic link shows.
    pub fn changed(&self) -> bool {
        self.seen
            .iter()
            .any(|(path, seen)| read(path).ok().as_deref().map(Digest::of) != *seen)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Unreadable> {
    // Looked at before it is opened: opening a named pipe waits for its other end.
    let kind = std::fs::metadata(path).map_err(unreadable)?.file_type();
    if kind.is_dir() {
        return Err(Unreadable::Folder);
    }
    if !kind.is_file() {
        return Err(Unreadable::Special);
    }
    let mut content = Vec::new();
    File::open(path)
        .map_err(unreadable)?
        .take(MAX_FILE + 1)
        .read_to_end(&mut content)
        .map_err(unreadable)?;
    if content.len() as u64 > MAX_FILE {
        Err(Unreadable::TooLarge)
    } else {
        Ok(content)
    }
}

fn unreadable(error: io::Error) -> Unreadable {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Unreadable::Missing,
        io::ErrorKind::PermissionDenied => Unreadable::Denied,
        io::ErrorKind::IsADirectory => Unreadable::Folder,
        other => Unreadable::Other(other),
    }
}
