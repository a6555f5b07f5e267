//! File operations that a crash or a power cut leaves done or not done, never half done.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::thread;

/// Writes `content` to `path`: temporary file beside it, fsync, rename, fsync of the folder.
///
/// # Errors
/// What the file system says; the old file is still there then.
pub fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
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
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_parent(to)
}

/// Waits until the content of the file or the names in the folder at `path` are on disk.
///
/// # Errors
/// What the file system says.
pub fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Waits until the folder in which `path` lies knows its name.
///
/// # Errors
/// What the file system says.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), sync)
}

/// Makes the folder `path` where it is missing, and those above it; waits until each that it makes is known to the one it
/// lies in.
///
/// # Errors
/// What the file system says.
pub fn create_folder(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(above) = path.parent() {
        create_folder(above)?;
    }
    match fs::create_dir(path) {
        // Another thread has made it, and may not have waited yet.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made?,
    }
    sync_parent(path)
}

/// In a folder that was emptied, what it held before.
const LEFTOVERS: &str = "leftovers";

/// Makes the folder `path`, or moves what an earlier process left in it out of the way, to be removed in the background:
/// that may be much, and clients wait for the start. It counts as removed at once, since that is far quicker than writing
/// as much anew.
///
/// # Errors
/// What the file system says.
pub fn emptied(path: &Path) -> io::Result<()> {
    let empty = path.with_extension("warmdock-new");
    if let Some(above) = path.parent() {
        create_folder(above)?;
    }
    fs::create_dir_all(&empty)?;
    if path.try_exists()? {
        // Hardly ever there: a start was cut short, and an older version that knows of no such folder came after it.
        remove(&empty.join(LEFTOVERS));
    }
    match fs::rename(path, empty.join(LEFTOVERS)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        // Nothing was there, or a start before this one was cut short here.
        _ => fs::rename(&empty, path)?,
    }
    let leftovers = path.join(LEFTOVERS);
    thread::Builder::new().spawn(move || remove(&leftovers))?;
    Ok(())
}

/// Removes a folder for temporary files; what stays goes at the next start.
pub fn remove(folder: &Path) {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, "temporary files were not removed");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::{Duration, Instant};

    use super::*;

    fn files_in(folder: &Path) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    #[test]
    fn folders_are_made_where_they_are_missing() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("a/b/c");
        for _ in 0..2 {
            create_folder(&folder).unwrap();
            assert!(folder.is_dir());
        }
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        for wrong in [&file, &file.join("below")] {
            let error = create_folder(wrong).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{wrong:?}");
        }
    }

    #[test]
    fn a_folder_is_empty_at_once_wherever_a_start_was_cut_short() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("tmp");
        let empty = root.path().join("tmp.warmdock-new");
        let cut_short: [&dyn Fn(); 5] = [
            &|| {},
            &|| fs::create_dir(&empty).unwrap(),
            &|| {
                fs::create_dir(&empty).unwrap();
                fs::rename(&folder, empty.join(LEFTOVERS)).unwrap();
            },
            &|| fs::remove_dir_all(&folder).unwrap(),
            &|| fs::create_dir_all(empty.join(LEFTOVERS).join("folder")).unwrap(),
        ];
        emptied(&folder).unwrap();
        for cut_short in cut_short {
            fs::create_dir_all(folder.join("0/folder")).unwrap();
            fs::write(folder.join("1"), "half").unwrap();
            cut_short();
            emptied(&folder).unwrap();
            assert!(!folder.join("0").exists() && !folder.join("1").exists());
            let began = Instant::now();
            while !files_in(&folder).is_empty() {
                assert!(began.elapsed() < Duration::from_secs(60), "leftovers stay");
                thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(files_in(root.path()), std::slice::from_ref(&folder));
        }
    }
}
