//! What people and programs see of a mirror.

use std::time::SystemTime;

use super::Pool;
use crate::git::name::RepoName;

/// What the status page, its JSON and the metrics show of one repository.
#[derive(Clone, Debug)]
pub struct RepoStatus {
    /// The repository.
    pub repo: RepoName,
    /// For people, one word or two: `ready`, `fetching`, `failed`.
    pub state: &'static str,
    /// How many references the mirror has.
    pub refs: usize,
    /// How many objects its packs have.
    pub objects: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// When the upstream was last asked with success.
    pub last_fetch: Option<SystemTime>,
    /// Whether the mirror is served although the upstream could not be asked.
    pub stale: bool,
    /// Why the last fetch failed; shown to whoever may read the repository, so never with credentials.
    pub error: Option<String>,
    /// Whether it is in `git.warm`.
    pub warm: bool,
}

impl Pool {
    /// All repositories. Neither blocks nor touches the disk.
    pub fn status(&self) -> Vec<RepoStatus> {
        let config = self.config.borrow().clone();
        let entries: Vec<_> = self.entries().values().cloned().collect();
        let mut all: Vec<RepoStatus> = entries
            .iter()
            .map(|entry| {
                let state = entry.state();
                let failed = state
                    .failed
                    .as_ref()
                    .map(|failure| failure.error.to_string());
                RepoStatus {
                    repo: entry.name.clone(),
                    state: match (&state.flight, state.on_disk, &failed) {
                        (Some(flight), _, _) if flight.first => "cloning",
                        (Some(_), ..) => "fetching",
                        (None, true, _) => "ready",
                        (None, false, Some(_)) => "failed",
                        (None, false, None) => "absent",
                    },
                    refs: state.counts().0,
                    objects: state.counts().1,
                    bytes: state.reservation.bytes(),
                    // A mirror that was evicted has no age.
                    last_fetch: state.last_fetch.filter(|_| state.on_disk),
                    stale: state.on_disk && failed.is_some(),
                    error: failed,
                    warm: config.git.warm.contains(&entry.name),
                }
            })
            .collect();
        all.sort_by(|a, b| a.repo.cmp(&b.repo));
        all
    }
}
