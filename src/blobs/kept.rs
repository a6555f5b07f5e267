//! A blob on disk that is open.

use std::fs::{self, File, FileTimes};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use super::hot::HotBlocks;
use super::{BlobId, Blobs, Hasher, Slot, seconds, seconds_of};

/// What is checked and sent in one go. Small enough for hundreds of clients, each of which holds one.
pub(super) const BLOCK: usize = 64 << 10;

/// An open file, known to have had the right content since the service started.
#[derive(Debug)]
pub struct Kept {
    pub(super) id: BlobId,
    pub(super) file: Arc<File>,
    pub(super) size: u64,
    /// CRC-32 of each block: a byte that rots is found before it is sent, at a tenth of what SHA-256 costs.
    pub(super) checks: Arc<[u32]>,
    /// Before the service started; until its first use.
    pub(super) was_here: AtomicBool,
    /// Its first blocks, as far as they may stay in memory.
    pub(super) hot: Arc<HotBlocks>,
}

impl Kept {
    /// In bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether it was here before the service started, and this is its first use since. Says so once.
    pub fn is_first_use(&self) -> bool {
        self.was_here.swap(false, Ordering::Relaxed)
    }

    /// Writes the time of this read to disk. The file system itself does that once a day at most.
    pub(super) fn touch(&self) {
        let times = FileTimes::new().set_accessed(SystemTime::now());
        // Only the order of eviction after a restart depends on it.
        if let Err(error) = self.file.set_times(times) {
            tracing::debug!(blob = %self.id.digest, %error, "the time of a read was not written");
        }
    }
}

impl Blobs {
    /// Opens a file that may be on disk, and reads it as a whole when that was not done since the start. Blocks.
    pub(super) fn open_file(self: &Arc<Self>, id: &BlobId) -> Option<Arc<Kept>> {
        let known = {
            let mut index = self.index();
            if let Some((kept, _)) = index.open.get(id) {
                return Some(Arc::clone(kept));
            }
            if index.leaving.contains(id) {
                return None;
            }
            // It was closed, but somebody still reads it.
            let open = index.slots.get(id).and_then(|slot| slot.open.upgrade());
            if let Some(kept) = open {
                self.stay_open(&mut index, id, &kept);
                return Some(kept);
            }
            let slot = index.slots.get(id);
            slot.and_then(|slot| Some((slot.size, slot.checks.clone()?)))
        };
        let path = self.path(id);
        let (file, size, checks) = match open_checked(&path, id, known) {
            Ok(opened) => opened,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::InvalidData
                ) =>
            {
                let mut index = self.index();
                // Somebody has written it meanwhile.
                if let Some((kept, _)) = index.open.get(id) {
                    return Some(Arc::clone(kept));
                }
                if error.kind() == io::ErrorKind::NotFound {
                    index.forget(id);
                } else if let Some(room) = index.leave(id) {
                    drop(index);
                    self.quarantine(id, room);
                }
                return None;
            }
            Err(error) => {
                tracing::error!(blob = %id.digest, %error, "a kept file cannot be read");
                return None;
            }
        };
        let now = seconds();
        let mut index = self.index();
        if !index.slots.contains_key(id) {
            let counted = self.storage.count(crate::storage::Part::Blobs, size);
            index.reservation.absorb(counted);
            index.slots.insert(id.clone(), Slot::new(size, now));
        }
        // What is written here has them from the start. Of several who read it now, the first sets them.
        let slot = index.slots.get(id);
        let was_here = slot.is_some_and(|slot| slot.checks.is_none());
        let kept = Arc::new(Kept {
            id: id.clone(),
            file: Arc::new(file),
            size,
            checks: Arc::clone(&checks),
            was_here: was_here.into(),
            hot: self.hot.blocks(size),
        });
        if let Some(slot) = index.slots.get_mut(id) {
            slot.checks = Some(checks);
            slot.open = Arc::downgrade(&kept);
        }
        let touch = index.use_slot(id, now);
        self.stay_open(&mut index, id, &kept);
        drop(index);
        if touch {
            kept.touch();
        }
        Some(kept)
    }
}

impl Slot {
    pub(super) fn new(size: u64, used: u64) -> Self {
        Self {
            size,
            used,
            touched: used,
            checks: None,
            open: std::sync::Weak::new(),
        }
    }

    /// What the file system says of a file.
    pub(super) fn of(metadata: &fs::Metadata) -> Self {
        let read = metadata.accessed().map_or(0, seconds_of);
        let written = metadata.modified().map_or(0, seconds_of);
        Self::new(metadata.len(), read.max(written))
    }
}

/// `known` are the size of a file that was found right before, and its checks: only one that is cut short or longer now is
/// read as a whole once more.
///
/// # Errors
/// [`io::ErrorKind::InvalidData`] for a file that is not what its name says.
fn open_checked(
    path: &Path,
    id: &BlobId,
    known: Option<(u64, Arc<[u32]>)>,
) -> io::Result<(File, u64, Arc<[u32]>)> {
    let file = File::open(path)?;
    let size = file.metadata()?.len();
    if let Some((known_size, checks)) = known
        && known_size == size
        && checks.len() as u64 == size.div_ceil(BLOCK as u64)
    {
        return Ok((file, size, checks));
    }
    let mut hasher = Hasher::default();
    let mut checks = Vec::new();
    let mut block = vec![0; BLOCK.min(usize::try_from(size).unwrap_or(BLOCK))];
    let mut at = 0;
    while at < size {
        let length = usize::try_from(size - at).unwrap_or(BLOCK).min(BLOCK);
        // What the disk does not read is damaged as well.
        file.read_exact_at(&mut block[..length], at)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        hasher.update(&block[..length]);
        checks.push(crc32fast::hash(&block[..length]));
        at += length as u64;
    }
    if hasher.finish() != id.digest {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((file, size, checks.into()))
}
