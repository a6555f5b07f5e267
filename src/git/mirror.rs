//! A mirror on disk: a bare repository that stock git reads, with packs and `packed-refs` and nothing loose.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::durable;
use crate::git::objects::ObjectError;
use crate::git::objects::packs::{PackSet, index_files};
use crate::git::refs::Refs;

/// The folder of one mirror.
#[derive(Clone, Debug)]
pub struct MirrorFolder {
    path: PathBuf,
}

/// Its presence says that objects may lie in the packs which no reference reaches.
const GARBAGE: &str = "warmdock-garbage";
/// Its time is when the mirror was last used.
const LAST_USED: &str = "warmdock-last-used";

impl MirrorFolder {
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a mirror is there. Mirrors come into place whole, so what is there is whole.
    pub fn exists(&self) -> bool {
        self.path.join("HEAD").is_file()
    }

    pub fn packs(&self) -> PathBuf {
        self.path.join("objects/pack")
    }

    /// Makes an empty bare repository.
    ///
    /// # Errors
    /// What the file system says.
    pub fn create(&self) -> io::Result<()> {
        durable::create_folder(&self.packs())?;
        fs::create_dir_all(self.path.join("refs"))?;
        // Packs are looked after here: a stock `git gc` beside us would take what is kept for a while.
        durable::write_file(
            &self.path.join("config"),
            b"[core]\n\trepositoryformatversion = 0\n\tbare = true\n[gc]\n\tauto = 0\n",
        )
    }

    /// Moves a new pack and its index into the repository, the index last: without it nobody looks at the pack.
    ///
    /// # Errors
    /// What the file system says.
    pub fn install(&self, index: &Path) -> io::Result<PathBuf> {
        let name = index
            .file_name()
            .ok_or_else(|| io::Error::other("an index without a name"))?;
        let installed = self.packs().join(name);
        fs::rename(
            index.with_extension("pack"),
            installed.with_extension("pack"),
        )?;
        durable::rename(index, &installed)?;
        Ok(installed)
    }

    /// Takes a pack out of the repository. Who has it open can read on.
    ///
    /// # Errors
    /// What the file system says.
    pub fn remove_pack(&self, pack: &Path) -> io::Result<()> {
        for extension in ["idx", "pack"] {
            match fs::remove_file(pack.with_extension(extension)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts a damaged pack where nobody takes it for one; it stays until the repository is fetched again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn set_aside(&self, pack: &Path) -> io::Result<()> {
        for extension in ["idx", "pack"] {
            let path = pack.with_extension(extension);
            fs::rename(&path, path.with_extension(format!("{extension}-damaged")))?;
        }
        durable::sync(&self.packs())
    }

    /// Reads packs and references, after removing what an earlier process left half done.
    ///
    /// # Errors
    /// [`ObjectError`] when a file is damaged or missing.
    pub fn open(&self) -> Result<(PackSet, Refs), ObjectError> {
        self.sweep()?;
        Ok((PackSet::open(&self.packs())?, Refs::read(&self.path)?))
    }

    /// Removes packs without an index and temporary files.
    fn sweep(&self) -> io::Result<()> {
        for folder in [self.packs(), self.path.clone()] {
            for entry in fs::read_dir(&folder)? {
                let path = entry?.path();
                let extension = path.extension().unwrap_or_default();
                let orphan = extension == "pack" && !path.with_extension("idx").exists()
                    || extension == "idx" && !path.with_extension("pack").exists();
                if orphan || extension == "warmdock-new" {
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(())
    }

    /// The paths of all indices.
    ///
    /// # Errors
    /// What the file system says.
    pub fn indices(&self) -> io::Result<Vec<PathBuf>> {
        index_files(&self.packs())
    }

    /// Bytes on disk.
    pub fn bytes(&self) -> u64 {
        bytes_below(&self.path)
    }

    pub fn has_garbage(&self) -> bool {
        self.path.join(GARBAGE).exists()
    }

    /// Remembers, over restarts, whether there is something to clean up.
    ///
    /// # Errors
    /// What the file system says.
    pub fn set_garbage(&self, garbage: bool) -> io::Result<()> {
        let path = self.path.join(GARBAGE);
        match (garbage, path.exists()) {
            (true, false) => {
                File::create(&path)?;
                durable::sync(&self.path)
            }
            (false, true) => fs::remove_file(path),
            _ => Ok(()),
        }
    }

    /// Notes when the mirror was last used. It is no loss when this fails.
    pub fn touch(&self, used: SystemTime) {
        let touched =
            File::create(self.path.join(LAST_USED)).and_then(|file| file.set_modified(used));
        if let Err(error) = touched {
            tracing::debug!(%error, "the time of use was not noted");
        }
    }

    /// When the mirror was last used, as far as that was noted.
    pub fn last_used(&self) -> SystemTime {
        let time = |path: PathBuf| fs::metadata(path).and_then(|found| found.modified());
        time(self.path.join(LAST_USED))
            .or_else(|_| time(self.path.join("HEAD")))
            .unwrap_or(SystemTime::UNIX_EPOCH)
    }
}

/// Bytes of the files in a folder and below it. What goes away meanwhile does not count.
pub fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => bytes_below(&entry.path()),
            Ok(found) => found.len(),
            Err(_) => 0,
        })
        .sum()
}
