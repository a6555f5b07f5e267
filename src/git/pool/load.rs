//! Mirrors on disk: found at the start, opened when they are first needed, closed when nobody uses them any more.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::entry::Entry;
use super::{Pool, PoolError};
use crate::git::name::RepoName;
use crate::git::objects::ObjectError;
use crate::git::snapshot::Snapshot;
use crate::ops::process;
use crate::storage::Part;

/// A mirror that nobody asked for this long is closed.
const IDLE: Duration = Duration::from_secs(3600);

/// Where open mirrors take more than their part of memory, one that nobody asked for this long: a clone is several requests.
const IDLE_IN_NEED: Duration = Duration::from_secs(10);

/// How often it is looked for mirrors to close.
const LOOK: Duration = Duration::from_secs(60);

/// The part of memory that open mirrors may take: with the 512 MiB of the files that are shipped, 128 MiB.
const MEMORY_SHARE: u64 = 4;
const MEMORY_IF_UNKNOWN: u64 = 512 << 20;

impl Pool {
    /// Finds the mirrors on disk. They are opened when they are first needed.
    pub(super) fn load(self: &Arc<Self>) {
        let root = self.data.git();
        let mut found = Vec::new();
        find_mirrors(&root, &root, &mut found);
        for name in found {
            let entry = self.entry_of(&name);
            let bytes = entry.folder.bytes();
            // Requests are served meanwhile: what was fetched since is counted.
            let mut state = entry.state();
            if state.on_disk && state.reservation.bytes() == 0 {
                state.reservation = self.storage.count(Part::Git, bytes);
            }
        }
        self.storage.make_room();
    }

    /// The open mirror, opening it first when it only lies on disk.
    ///
    /// # Errors
    /// The machine has no more of something: the mirror may be fine.
    pub(super) async fn opened(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
    ) -> Result<Option<Arc<Snapshot>>, PoolError> {
        let is_settled = |entry: &Entry| {
            let state = entry.state();
            (state.snapshot.is_some() || !state.on_disk).then(|| state.snapshot.clone())
        };
        if let Some(settled) = is_settled(entry) {
            return Ok(settled);
        }
        let (pool, entry) = (Arc::clone(self), Arc::clone(entry));
        // In a task of its own: a client that goes away does not leave it half done.
        let opening = self.tasks.spawn(async move {
            let _busy = entry.busy.lock().await;
            if let Some(settled) = is_settled(&entry) {
                return Ok(settled);
            }
            let folder = entry.folder.clone();
            let opened = tokio::task::spawn_blocking(move || {
                let (packs, refs) = folder.open()?;
                Snapshot::new(packs, refs, Arc::default(), folder.has_garbage())
            });
            let damage = match opened.await {
                Ok(Ok(snapshot)) => {
                    let snapshot = Arc::new(snapshot);
                    let verified = {
                        let mut state = entry.state();
                        state.snapshot = Some(Arc::clone(&snapshot));
                        state.verified
                    };
                    pool.more_open.notify_one();
                    if !verified {
                        pool.verify_in_background(&entry, &snapshot);
                    }
                    // Its upstream may be away, and what is there be all for long.
                    pool.prepare_in_background(&entry, &snapshot);
                    return Ok(Some(snapshot));
                }
                Ok(Err(ObjectError::Io(error))) if !is_damage(&error) => {
                    return Err(PoolError::Upstream(format!(
                        "the mirror cannot be opened: {error}"
                    )));
                }
                Ok(Err(error)) => error.to_string(),
                Err(panic) => format!("opening it failed: {panic}"),
            };
            pool.set_aside(&entry, None, &damage).await;
            Ok(None)
        });
        opening.await.unwrap_or(Err(PoolError::Stopping))
    }

    /// Closes mirrors that nobody uses, for ever. An open one has its history and the places of its objects in memory, and
    /// every pack is an open file.
    pub(super) async fn close_idle(self: Arc<Self>) {
        loop {
            let _ = timeout(LOOK, self.more_open.notified()).await;
            let pool = Arc::clone(&self);
            let closing = self.tasks.spawn_blocking(move || {
                for entry in pool.open_and_not_warm() {
                    entry.close_if_idle(IDLE);
                }
                pool.close_down_to(pool.memory_for_mirrors, IDLE_IN_NEED);
            });
            if let Err(error) = closing.await {
                tracing::error!(%error, "closing mirrors failed");
            }
        }
    }

    /// Closes mirrors that nobody has used within `idle`, the least recently used first, until all that are open take no
    /// more than so many bytes of memory. Blocks.
    pub(super) fn close_down_to(&self, bytes: u64, idle: Duration) {
        let open = |entry: &Entry| entry.state().snapshot.as_ref().map(|open| open.memory());
        let all: Vec<_> = self.entries().values().cloned().collect();
        let mut taken: u64 = all.iter().filter_map(|entry| open(entry)).sum();
        if taken <= bytes {
            return;
        }
        let mut entries = self.open_and_not_warm();
        entries.sort_by_cached_key(|entry| entry.state().used);
        for entry in entries {
            let before = open(&entry).unwrap_or(0);
            entry.close_if_idle(idle);
            taken -= before.saturating_sub(open(&entry).unwrap_or(0)).min(taken);
            if taken <= bytes {
                return;
            }
        }
    }

    fn open_and_not_warm(&self) -> Vec<Arc<Entry>> {
        let warm = self.config.borrow().git.warm.clone();
        let entries = self.entries();
        let open = entries
            .values()
            .filter(|entry| entry.state().snapshot.is_some() && !warm.contains(&entry.name));
        open.cloned().collect()
    }
}

/// Bytes of memory for all open mirrors.
pub(super) fn memory_for_mirrors() -> u64 {
    process::memory_limit().unwrap_or(MEMORY_IF_UNKNOWN) / MEMORY_SHARE
}

/// What an error says of the files, rather than of the machine.
fn is_damage(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | InvalidData | UnexpectedEof)
}

/// Folders that end in `.git` below `folder`, by the names of their repositories. Links are not followed.
fn find_mirrors(root: &Path, folder: &Path, found: &mut Vec<RepoName>) {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "git") {
            let name = path.strip_prefix(root).ok().and_then(Path::to_str);
            found.extend(name.and_then(|name| RepoName::parse(name).ok()));
        } else {
            find_mirrors(root, &path, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::pool::over_files::{OverFiles, name, wait_for};

    #[tokio::test(flavor = "multi_thread")]
    async fn what_was_not_used_for_longest_is_closed_first() {
        let paths = ["team/old", "team/new", "team/used", "team/warm"];
        let over = OverFiles::new(&paths).set("warm", vec!["git.test/team/warm"]);
        let pool = over.start();
        let mut entries = Vec::new();
        for path in ["team/warm", "team/old", "team/used", "team/new"] {
            entries.push(over.mirrored(&pool, path).await);
        }
        let [warm, old, used, new] = &entries[..] else {
            unreachable!()
        };
        wait_for("their first clones to be over", || {
            let is_over = |entry: &Arc<Entry>| {
                let state = entry.state();
                state
                    .snapshot
                    .as_ref()
                    .is_some_and(|open| Arc::strong_count(open) == 1)
            };
            entries.iter().all(is_over)
        })
        .await;
        let somebody_reads = used.snapshot().unwrap();
        let is_open = |entry: &Entry| entry.snapshot().is_some();
        let each = somebody_reads.memory();

        pool.close_down_to(4 * each, Duration::ZERO);
        assert!(entries.iter().all(|entry| is_open(entry)));
        pool.close_down_to(0, Duration::from_secs(3600));
        assert!(entries.iter().all(|entry| is_open(entry)), "all are in use");
        pool.close_down_to(4 * each - 1, Duration::ZERO);
        assert!(!is_open(old) && is_open(used) && is_open(new));
        pool.close_down_to(0, Duration::ZERO);
        assert!(is_open(warm) && is_open(used) && !is_open(new));
        pool.fresh(&name("team/old")).await.unwrap();
        assert!(is_open(old), "it is opened again");
        pool.shutdown().await;
    }
}
