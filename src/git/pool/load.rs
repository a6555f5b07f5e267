//! Mirrors on disk: found at the start, opened when they are first needed, closed when nobody uses them any more.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::entry::Entry;
use super::{Pool, PoolError};
use crate::git::name::RepoName;
use crate::git::objects::ObjectError;
use crate::git::snapshot::Snapshot;
use crate::storage::Part;

/// A mirror that nobody asked for this long is closed.
const IDLE: Duration = Duration::from_secs(3600);

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
            tokio::time::sleep(IDLE).await;
            let warm = self.config.borrow().git.warm.clone();
            let mut entries: Vec<_> = self.entries().values().cloned().collect();
            entries.retain(|entry| !warm.contains(&entry.name));
            self.tasks.spawn_blocking(move || {
                for entry in entries {
                    entry.close_if_idle(IDLE);
                }
            });
        }
    }
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
