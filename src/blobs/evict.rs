//! What was not read for longest goes first, and never what is being read.

use std::fs;
use std::sync::Arc;
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
        let mut index = self.index();
        if is_read(&index, id) {
            return false;
        }
        index.open.remove(id);
        // Under the lock, so that nobody opens or writes it meanwhile; removing a name is quick.
        match fs::remove_file(self.path(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::error!(blob = %id.digest, %error, "a kept file cannot be evicted");
                false
            }
            _ => index.forget(id),
        }
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
