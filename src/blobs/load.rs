//! What is on disk at start, found while the service is already serving.

use std::fs;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::{BlobId, Blobs, Digest, Slot, is_space};
use crate::storage::Part;

impl Blobs {
    /// Finds what is on disk, with the time of its last use, and then evicts what is too much; not all of it at a
    /// stop. Blocks.
    pub fn load(&self, stopping: &CancellationToken) {
        let spaces = fs::read_dir(&self.root).into_iter().flatten().flatten();
        for space in spaces
            .map(|entry| entry.path())
            .filter(|path| is_space(path))
        {
            let Some(name) = space.file_name().and_then(|name| name.to_str()) else {
                continue;
            };
            let name: Arc<str> = name.into();
            for folder in fs::read_dir(&space).into_iter().flatten().flatten() {
                if stopping.is_cancelled() {
                    return;
                }
                self.load_folder(&name, &folder.path());
            }
        }
        let (files, bytes) = {
            let mut index = self.index();
            index.loaded = true;
            (index.slots.len(), index.reservation.bytes())
        };
        if files > 0 {
            tracing::info!(files, bytes, "kept files are counted");
        }
        self.storage.make_room();
    }

    fn load_folder(&self, space: &Arc<str>, folder: &Path) {
        let found: Vec<_> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name();
                let digest = name.to_str().and_then(|name| Digest::from_str(name).ok());
                let metadata = entry.metadata().ok().filter(fs::Metadata::is_file);
                Some((digest?, Slot::of(&metadata?)))
            })
            .collect();
        let mut index = self.index();
        for (digest, slot) in found {
            let id = BlobId {
                space: Arc::clone(space),
                digest,
            };
            // Somebody may have asked for it meanwhile, or evicted it again.
            if !index.slots.contains_key(&id) && !index.leaving.contains(&id) {
                let counted = self.storage.count(Part::Blobs, slot.size);
                index.reservation.absorb(counted);
                index.slots.insert(id, slot);
            }
        }
    }
}
