//! Files that turned out damaged, kept for whoever wants to see what a disk does to them: the newest few, and only while
//! there is room for what is of use.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{Digest, seconds};
use crate::durable;
use crate::storage::{Evict, Part, Reservation, Storage};

/// A disk that fails damages one file after another.
pub(super) const MOST: usize = 16;

/// The folder. A file in it is called `<SHA-256 that it should have>-<seconds since 1970>`.
pub(super) struct Quarantine {
    folder: PathBuf,
    /// Of what lies there. Locked while files come or go.
    reservation: Mutex<Reservation>,
}

struct Aside {
    seconds: u64,
    path: PathBuf,
    size: u64,
}

impl Quarantine {
    pub fn new(folder: PathBuf, storage: &Arc<Storage>) -> Arc<Self> {
        let quarantine = Arc::new(Self {
            folder,
            reservation: Mutex::new(storage.nothing(Part::Blobs)),
        });
        // What an earlier process left, and nobody evicts before it is counted.
        quarantine.shorten();
        let weak: Weak<dyn Evict> = Arc::downgrade(&quarantine) as _;
        storage.add_evictor(weak);
        quarantine
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Moves a file here that should have this digest, and takes up this room. Blocks.
    ///
    /// # Errors
    /// What the file system says; the file is then where it was.
    pub fn take(&self, path: &Path, digest: &Digest, room: Reservation) -> io::Result<()> {
        {
            let mut reservation = self.reservation();
            durable::create_folder(&self.folder)?;
            let name = format!("{digest}-{}", seconds());
            fs::rename(path, self.folder.join(name))?;
            reservation.absorb(room);
        }
        self.shorten();
        Ok(())
    }

    /// Removes all but the newest, and counts those.
    fn shorten(&self) {
        self.remove_oldest_while(|left, _| left > MOST);
    }

    /// Removes files, oldest first, while `too_much` says so of the number that is left and the bytes that were freed.
    /// Returns how many were removed.
    fn remove_oldest_while(&self, too_much: impl Fn(usize, u64) -> bool) -> usize {
        let mut reservation = self.reservation();
        let mut left = self.files();
        left.sort_unstable_by_key(|aside| aside.seconds);
        let all = left.len();
        let (mut freed, mut remaining) = (0, all);
        left.retain(|aside| {
            if !too_much(remaining, freed) {
                return true;
            }
            remaining -= 1;
            match fs::remove_file(&aside.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::error!(path = %aside.path.display(), %error, "a file in quarantine cannot be removed");
                    true
                }
                _ => {
                    freed += aside.size;
                    false
                }
            }
        });
        reservation.set(left.iter().map(|aside| aside.size).sum());
        all - left.len()
    }

    fn reservation(&self) -> MutexGuard<'_, Reservation> {
        self.reservation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// What somebody else put there is left alone.
    fn files(&self) -> Vec<Aside> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let aside = entries.filter_map(|entry| {
            let name = entry.file_name();
            let (digest, seconds) = name.to_str()?.rsplit_once('-')?;
            Digest::from_str(digest).ok()?;
            Some(Aside {
                seconds: seconds.parse().ok()?,
                path: entry.path(),
                size: entry.metadata().ok()?.len(),
            })
        });
        aside.collect()
    }
}

impl Evict for Quarantine {
    fn evict(&self, bytes: u64) {
        let files = self.remove_oldest_while(|_, freed| freed < bytes);
        if files > 0 {
            let folder = self.folder.display();
            tracing::info!(files, %folder, "removed damaged files to stay below storage.max_size");
        }
    }
}
