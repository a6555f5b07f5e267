//! File operations that a crash or a power cut leaves done or not done, never half done.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

/// Writes `content` to `path`: temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// What the file system says; the old file is still there then.
pub fn write_file(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("warmdock-new");
    let mut file = File::create(&temporary)?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    rename(&temporary, path)
}

/// Renames `from` to `to` and waits until the folder of `to` knows.
///
/// # Errors
/// What the file system says.
pub fn rename(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::rename(from, to)?;
    sync_parent(to)
}

/// Waits until the content of the file or the names in the folder at `path` are on disk.
///
/// # Errors
/// What the file system says.
pub fn sync(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

/// Waits until the folder in which `path` lies knows its name.
///
/// # Errors
/// What the file system says.
pub fn sync_parent(path: &Path) -> std::io::Result<()> {
    path.parent().map_or(Ok(()), sync)
}
