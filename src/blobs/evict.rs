//! What was not read for longest goes first, and never what is being read.

use std::fs;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::{BlobId, Blobs, Index};
use crate::storage::Evict;

impl Evict for Blobs {
    fn evict(&self, bytes: u64) {
        let mut oldest: Vec<(u64, u64, BlobId)> = self
            .index()
            .slots
            .iter()
            .map(|(id, slot)| (slot.used, slot.size, id.clone()))
            .collect();
        oldest.sort_unstable_by_key(|(used, ..)| *used);
        let (mut freed, mut files) = (0, 0);
        for (_, size, id) in oldest {
            if freed >= bytes {
                break;
            }
            if self.evict_one(&id) {
                freed += size;
                files += 1;
            }
        }
        if files > 0 {
            self.evicted.inc_by(files);
            tracing::info!(
                files,
                bytes = freed,
                "evicted kept files to stay below storage.max_size"
            );
        }
    }

    fn oldest(&self) -> Option<SystemTime> {
        let used = self.index().slots.values().map(|slot| slot.used).min();
        let used = used.map(|used| UNIX_EPOCH + Duration::from_secs(used));
        // Without any there is nothing to evict: those who have some come first.
        Some(used.unwrap_or_else(SystemTime::now))
    }
}

impl Blobs {
    fn evict_one(&self, id: &BlobId) -> bool {
        let (slot, open) = {
            let mut index = self.index();
            if is_read(&index, id) {
                return false;
            }
            let Some(slot) = index.slots.remove(id) else {
                return false;
            };
            index.leaving.insert(id.clone());
            (slot, index.open.remove(id))
        };
        // Not under the lock: a disk at work may take its time, and whoever asks for any file waits for the lock.
        drop(open);
        let removed = match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::error!(blob = %id.digest, %error, "a kept file cannot be evicted");
                false
            }
            _ => true,
        };
        let mut index = self.index();
        index.leaving.remove(id);
        // Who had opened it a moment before has counted it anew.
        if removed || index.slots.contains_key(id) {
            index.give_back(slot.size);
        } else {
            index.slots.insert(id.clone(), slot);
        }
        drop(index);
        self.left.notify_all();
        removed
    }

    /// Waits until the file that had this name is removed, if that is being done. Blocks.
    pub(super) fn wait_left(&self, id: &BlobId) {
        let is_leaving = |index: &mut Index| index.leaving.contains(id);
        let waited = self.left.wait_while(self.index(), is_leaving);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

fn is_read(index: &Index, id: &BlobId) -> bool {
    let idle = match index.open.get(id) {
        Some((kept, _)) => Arc::strong_count(kept) == 1,
        None => index
            .slots
            .get(id)
            .is_none_or(|slot| slot.open.strong_count() == 0),
    };
    !idle
}
