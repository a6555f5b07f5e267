//! Placeholder: the lead replaces this file; [`RepoStatus`] is the contract with the status page and the metrics.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::config::Config;
use crate::git::name::RepoName;
use crate::ops::metrics::Metrics;

/// The mirrors.
pub struct Pool {}

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
    /// Opens the pool.
    ///
    /// # Errors
    /// When the data folder cannot be used.
    pub fn start(
        _config: watch::Receiver<Arc<Config>>,
        _metrics: Arc<Metrics>,
    ) -> anyhow::Result<Arc<Self>> {
        Ok(Arc::new(Self {}))
    }

    /// Stops background work and waits for it.
    pub async fn shutdown(&self) {}

    /// Whether requests can be served.
    ///
    /// # Errors
    /// Why not, as text for anybody.
    pub fn ready(&self) -> Result<(), String> {
        Ok(())
    }

    /// All repositories. Neither blocks nor touches the disk.
    pub fn status(&self) -> Vec<RepoStatus> {
        Vec::new()
    }
}
