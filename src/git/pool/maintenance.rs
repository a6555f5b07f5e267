//! Consolidates packs: many small ones become one, and what no reference reaches any more goes. Deltas are kept.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use super::entry::Entry;
use super::{Pool, data_dir};
use crate::durable;
use crate::git::mirror::MirrorFolder;
use crate::git::objects::ObjectError;
use crate::git::objects::commits::{Commits, closure};
use crate::git::objects::packs::{Pack, PackSet, Reader};
use crate::git::objects::set::ObjectSet;
use crate::git::objects::writer::{PackFormat, write_pack};
use crate::git::refs::Refs;
use crate::git::snapshot::Snapshot;
use crate::git::upstream::pack::{most_reserved, receive_from};
use crate::git::upstream::{Progress, UpstreamError};
use crate::storage::{Part, Reservation};

/// Consolidation reads and writes a whole mirror, so it is not tried more often than this.
const MAINTENANCE_PAUSE: Duration = Duration::from_secs(3600);

/// Packs beside the largest, before they become one. Each look-up asks every pack.
const MOST_PACKS: usize = 8;

/// What there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    /// Put all packs but the largest together.
    MergeSmall,
    /// Write one pack of what references reach.
    Rewrite,
}

/// What the mirror needs. The caller holds `entry.busy`, or the mark may be one that a fetch sets for a moment.
fn needed(folder: &MirrorFolder, snapshot: &Snapshot) -> Option<Work> {
    let packs = snapshot.packs.packs();
    let small: u64 = packs.iter().skip(1).map(|pack| pack.bytes()).sum();
    if folder.has_garbage() {
        Some(Work::Rewrite)
    } else if packs.len() <= MOST_PACKS {
        None
    } else if small > packs[0].bytes() / 2 {
        Some(Work::Rewrite)
    } else {
        Some(Work::MergeSmall)
    }
}

/// Why packs could not be consolidated.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error("{0}")]
    Objects(#[from] ObjectError),
    #[error("{0}")]
    Other(#[from] UpstreamError),
    #[error("the mirror cannot be written: {0}")]
    Io(#[from] io::Error),
}

impl Pool {
    /// Consolidates the packs of `entry`; the new snapshot when something was done. Fetches go on while the new pack is
    /// written, and wait only for its being put into place.
    pub(super) async fn maintain(self: &Arc<Self>, entry: &Arc<Entry>) -> Option<Arc<Snapshot>> {
        let _maintaining = entry.maintaining.try_lock().ok()?;
        if entry
            .state()
            .maintained
            .is_some_and(|last| last.elapsed() < MAINTENANCE_PAUSE)
        {
            return None;
        }
        let (before, work) = {
            let _busy = entry.busy.lock().await;
            let before = entry.snapshot()?;
            let (same, old) = (Arc::clone(entry), Arc::clone(&before));
            let needed = tokio::task::spawn_blocking(move || needed(&same.folder, &old));
            let needed = needed.await.inspect_err(|panic| {
                tracing::error!(repo = %entry.name, error = %panic, "consolidating packs failed");
            });
            (before, needed.ok()??)
        };
        let permit = Arc::clone(&self.background).acquire_owned().await.ok()?;
        let started = Instant::now();
        let (pool, same, old) = (Arc::clone(self), Arc::clone(entry), Arc::clone(&before));
        let written = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            tracing::info!(repo = %same.name, packs = old.packs.packs().len(), ?work, "consolidating packs");
            same.state().maintained = Some(Instant::now());
            let scratch = Scratch(pool.scratch());
            let reservation = pool.storage.nothing(Part::Git);
            let beside = pool.bytes_beside(&same);
            Replacement::write(work, old, beside, scratch, reservation, &pool.stop)
        });
        let done = match written.await {
            Ok(Ok(replacement)) => {
                let _busy = entry.busy.lock().await;
                let (pool, same) = (Arc::clone(self), Arc::clone(entry));
                tokio::task::spawn_blocking(move || replacement.take_over(&same, &pool.stop)).await
            }
            Ok(Err(trouble)) => Ok(Err(trouble)),
            Err(panic) => Err(panic),
        };
        let elapsed_ms = || started.elapsed().as_millis() as u64;
        match done {
            Ok(Ok(None)) => None,
            Ok(Ok(Some(snapshot))) => {
                tracing::info!(
                    repo = %entry.name,
                    packs.before = before.packs.packs().len(),
                    packs.after = snapshot.packs.packs().len(),
                    bytes = snapshot.packs.bytes(),
                    elapsed_ms = elapsed_ms(),
                    "consolidated packs"
                );
                Some(snapshot)
            }
            Ok(Err(trouble)) => {
                tracing::warn!(repo = %entry.name, error = %trouble, elapsed_ms = elapsed_ms(), "packs were not consolidated");
                if let Trouble::Objects(error) = &trouble {
                    self.report(entry, &before, error).await;
                }
                None
            }
            Err(panic) => {
                tracing::error!(repo = %entry.name, error = %panic, "consolidating packs failed");
                None
            }
        }
    }
}

/// A folder for temporary files, which goes with whoever works in it.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        data_dir::remove(&self.0);
    }
}

/// A pack that is to take the place of others, beside the mirror.
struct Replacement {
    work: Work,
    /// The mirror that it was made from.
    before: Arc<Snapshot>,
    replaced: PackSet,
    /// None where nothing is left.
    index: Option<PathBuf>,
    /// The history of what is in it: commits that go must not be taken for present.
    history: Arc<RwLock<Commits>>,
    scratch: Scratch,
    reservation: Reservation,
}

impl Replacement {
    /// Reads `before` and writes the new pack. Changes nothing of the mirror. So many bytes are `beside` it, whatever is
    /// evicted.
    ///
    /// # Errors
    /// What went wrong.
    fn write(
        work: Work,
        before: Arc<Snapshot>,
        beside: u64,
        scratch: Scratch,
        mut reservation: Reservation,
        stop: &AtomicBool,
    ) -> Result<Self, Trouble> {
        let all = before.packs.packs();
        let replaced = PackSet::new(match work {
            Work::Rewrite => all.to_vec(),
            // The first is the largest.
            Work::MergeSmall => all.get(1..).unwrap_or_default().to_vec(),
        });
        let objects = match work {
            Work::Rewrite => reached_since(&Refs::default(), &before, &replaced, stop)?,
            Work::MergeSmall => replaced.all(),
        };
        // For what will not fit beside what stays, nothing is evicted.
        let most = most_reserved(objects.len() as u64, replaced.bytes_of(&objects));
        reservation
            .can_grow(most, beside)
            .map_err(UpstreamError::Storage)?;
        let index = rewrite(&replaced, &objects, &scratch.0, stop, &mut reservation)?;
        let history = match (work, &index) {
            (Work::Rewrite, Some(index)) => {
                let packs = PackSet::new(vec![Arc::new(Pack::open(index)?)]);
                Snapshot::new(packs, before.refs.clone(), Arc::default(), false)?.shared_commits()
            }
            (Work::Rewrite, None) => Arc::default(),
            (Work::MergeSmall, _) => before.shared_commits(),
        };
        Ok(Self {
            work,
            before,
            replaced,
            index,
            history,
            scratch,
            reservation,
        })
    }

    /// Puts the new pack into place and removes those that it replaces. Does nothing when they are not in the mirror any
    /// more. The caller holds `entry.busy`.
    ///
    /// # Errors
    /// What went wrong; the mirror is then as it was, but for packs that are there twice until the next attempt.
    fn take_over(
        mut self,
        entry: &Entry,
        stop: &AtomicBool,
    ) -> Result<Option<Arc<Snapshot>>, Trouble> {
        let is_same = |now: &Arc<Snapshot>| now.packs.has_all(&self.before.packs);
        let Some(now) = entry.snapshot().filter(is_same) else {
            return Ok(None);
        };
        let mut new = Vec::from_iter(self.index.take());
        let (kept, garbage) = match self.work {
            Work::Rewrite => {
                // What fetches brought meanwhile may build on what goes: of it, too, stays what references reach.
                let objects = reached_since(&self.before.refs, &now, &now.packs, stop)?;
                let scratch = &self.scratch.0;
                new.extend(rewrite(
                    &now.packs,
                    &objects,
                    scratch,
                    stop,
                    &mut self.reservation,
                )?);
                let garbage = now.has_garbage() && !now.reaches_all_of(&self.before);
                (Vec::new(), garbage)
            }
            Work::MergeSmall => {
                let stay = |pack: &&Arc<Pack>| !self.replaced.has(pack);
                let kept = now.packs.packs().iter().filter(stay).cloned();
                (kept.collect(), now.has_garbage())
            }
        };
        entry.state().reservation.absorb(self.reservation);
        let installed = install(&entry.folder, &new, kept).and_then(|packs| {
            Ok(Snapshot::new(
                packs,
                now.refs.clone(),
                self.history,
                garbage,
            )?)
        });
        let snapshot = match installed {
            Ok(snapshot) => Arc::new(snapshot),
            Err(trouble) => {
                let bytes = entry.folder.bytes();
                entry.state().reservation.set(bytes);
                return Err(trouble);
            }
        };
        {
            let mut state = entry.state();
            let current = state.snapshot.as_ref();
            if !current.is_some_and(|current| Arc::ptr_eq(current, &now)) {
                // Found to be damaged meanwhile.
                return Ok(None);
            }
            state.snapshot = Some(Arc::clone(&snapshot));
            if self.work == Work::MergeSmall {
                // That was cheap, and may soon be due again.
                state.maintained = None;
            }
        }

        if let Err(error) = remove_others(&entry.folder, &snapshot) {
            tracing::warn!(repo = %entry.name, %error, "packs that were consolidated are not all removed");
        }
        let bytes = entry.folder.bytes();
        let mut state = entry.state();
        let gone = |pack: &&Arc<Pack>| !snapshot.packs.has(pack);
        for pack in now.packs.packs().iter().filter(gone) {
            pack.unlinked(&mut state.reservation);
        }
        state.reservation.set(bytes);
        drop(state);
        Ok(Some(snapshot))
    }
}

/// Moves the packs of these indices into the mirror, beside those that are `kept`.
fn install(
    folder: &MirrorFolder,
    indices: &[PathBuf],
    kept: Vec<Arc<Pack>>,
) -> Result<PackSet, Trouble> {
    let mut packs = kept;
    for index in indices {
        packs.push(Arc::new(Pack::open(&folder.install(index)?)?));
    }
    Ok(PackSet::new(packs))
}

/// Removes all packs but those of `snapshot`: those that were put together, and what an attempt that failed has left. A
/// pack that was written byte for byte as before has its name, and is the new one.
fn remove_others(folder: &MirrorFolder, snapshot: &Snapshot) -> io::Result<()> {
    let packs = snapshot.packs.packs();
    for index in folder.indices()? {
        let pack = index.with_extension("pack");
        if !packs.iter().any(|new| new.path() == pack) {
            folder.remove_pack(&pack)?;
        }
    }
    if !snapshot.has_garbage() {
        // The mark goes after all that it tells of, also when the power does.
        durable::sync(&folder.packs())?;
        folder.set_garbage(false)?;
    }
    Ok(())
}

/// What of `packs` the references of `snapshot` reach and those of `before` did not.
fn reached_since(
    before: &Refs,
    snapshot: &Snapshot,
    packs: &PackSet,
    stop: &AtomicBool,
) -> Result<ObjectSet, ObjectError> {
    let known: HashSet<_> = before.held().collect();
    let tips = snapshot.refs.held().filter(|tip| !known.contains(tip));
    let new: HashSet<_> = tips.collect();
    if new.is_empty() {
        return Ok(ObjectSet::default());
    }
    closure(
        || snapshot.commits(),
        &Vec::from_iter(new),
        &Vec::from_iter(known),
        &mut Reader::new(packs),
        &|| stop.load(Ordering::Relaxed),
    )
}

/// Writes `objects` to a new pack and takes it in like one from outside: all is decoded and hashed once more.
fn rewrite(
    source: &PackSet,
    objects: &ObjectSet,
    scratch: &Path,
    stop: &AtomicBool,
    reservation: &mut Reservation,
) -> Result<Option<PathBuf>, Trouble> {
    if objects.is_empty() {
        return Ok(None);
    }
    fs::create_dir_all(scratch)?;
    receive_from(
        |out| -> Result<(), Trouble> {
            let format = PackFormat {
                ofs_delta: true,
                thin: None,
            };
            write_pack(&mut Reader::new(source), objects, format, out, &|| {
                stop.load(Ordering::Relaxed)
            })?;
            out.flush()?;
            Ok(())
        },
        &PackSet::default(),
        scratch,
        &Progress::default(),
        stop,
        reservation,
    )
}

#[cfg(test)]
mod tests;
