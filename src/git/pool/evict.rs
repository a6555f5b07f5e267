//! What was not used for longest goes first, whole mirrors at a time.

use std::sync::Arc;
use std::time::SystemTime;

use super::entry::Entry;
use super::{Pool, data_dir};
use crate::storage::{Evict, Part};

impl Evict for Pool {
    fn oldest(&self) -> Option<SystemTime> {
        let warm = self.config.borrow().git.warm.clone();
        let entries = self.entries();
        let idle = entries.values().filter(|entry| !warm.contains(&entry.name));
        let used = idle.filter_map(|entry| {
            let state = entry.state();
            (state.reservation.bytes() > 0).then_some(state.used)
        });
        // Without any there is nothing to evict: those who have some come first.
        Some(used.min().unwrap_or_else(SystemTime::now))
    }

    /// Removes whole mirrors: never one in `git.warm`, in use, or being fetched or consolidated.
    fn evict(&self, bytes: u64) {
        let warm = self.config.borrow().git.warm.clone();
        let mut idle: Vec<_> = self
            .entries()
            .values()
            .filter(|entry| !warm.contains(&entry.name))
            .map(|entry| (entry.state().used, Arc::clone(entry)))
            .collect();
        idle.sort_by_key(|(used, _)| *used);
        let mut freed = 0;
        for (_, entry) in idle {
            if freed >= bytes {
                return;
            }
            // Being opened, fetched or consolidated.
            let (Ok(_busy), Ok(_maintaining)) =
                (entry.busy.try_lock(), entry.maintaining.try_lock())
            else {
                continue;
            };
            let mut state = entry.state();
            let unused = state
                .snapshot
                .as_ref()
                .is_none_or(|snapshot| Arc::strong_count(snapshot) == 1);
            if state.reservation.bytes() == 0 || state.flight.is_some() || !unused {
                continue;
            }
            // Whoever comes from now on makes a new one, as soon as nobody is busy with this one.
            let was_on_disk = std::mem::take(&mut state.on_disk);
            let last = state.snapshot.take();
            state.fresh = None;
            // Counted until the files are gone; a mirror that is made meanwhile has a reservation of its own.
            let mut reservation =
                std::mem::replace(&mut state.reservation, self.storage.nothing(Part::Git));
            drop(state);
            let scratch = self.scratch();
            if let Err(error) = std::fs::rename(entry.folder.path(), &scratch)
                // If not, somebody else has removed it, and there is nothing left to count.
                && entry.folder.path().exists()
            {
                tracing::error!(repo = %entry.name, %error, "the mirror cannot be evicted");
                let mut state = entry.state();
                state.on_disk = was_on_disk;
                state.reservation.absorb(reservation);
                continue;
            }
            self.answers.forget_repo(&entry.name);
            data_dir::remove(&scratch);
            let bytes = reservation.bytes();
            // Somebody may read them still by a snapshot before the last one.
            for pack in last.iter().flat_map(|last| last.packs.packs()) {
                pack.unlinked(&mut reservation);
            }
            freed += bytes;
            self.metrics.mirror_evicted();
            tracing::info!(repo = %entry.name, bytes, "evicted the mirror to stay below storage.max_size");
        }
    }
}

impl Pool {
    /// Bytes that stay whatever is evicted for the sake of `entry`: its own, and those of mirrors in `git.warm`.
    pub(super) fn bytes_beside(&self, entry: &Arc<Entry>) -> u64 {
        let warm = self.config.borrow().git.warm.clone();
        let entries = self.entries();
        let stay = entries
            .values()
            .filter(|other| Arc::ptr_eq(other, entry) || warm.contains(&other.name));
        stay.map(|other| other.state().reservation.bytes()).sum()
    }
}
