//! What people and programs see of a mirror.

use std::time::SystemTime;

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
