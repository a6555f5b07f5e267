//! The state of the service at one moment, as one requester may see it: what the status page and its JSON show.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;

use crate::access::Principal;
use crate::app::App;
use crate::crates::RegistryStatus;
use crate::crates::counters::{From, Kind};
use crate::git::pool::RepoStatus;
use crate::storage::Part;

/// See the module.
pub struct Snapshot {
    /// Of the service.
    pub version: &'static str,
    /// Since the start.
    pub uptime: Duration,
    /// Why requests should not be sent here.
    pub not_ready: Option<String>,
    /// The repositories that the requester may read, by name.
    pub repos: Vec<RepoStatus>,
    /// The hosts of the upstreams; for a requester that may not read everything only those of `repos`.
    pub hosts: Vec<String>,
    /// The registries of crates that the requester may read.
    pub registries: Vec<RegistryStatus>,
    /// What cargo was answered with, for whoever may read a registry.
    pub crates: CratesStatus,
    /// Bytes on disk: mirrors (also those that are not shown), finished answers and the crate cache.
    pub storage_used: u64,
    /// Bytes that may be stored.
    pub storage_limit: u64,
    /// The moment.
    pub now: SystemTime,
}

/// The crate cache in numbers.
#[derive(Clone, Debug, Default)]
pub struct CratesStatus {
    /// Index entries and files that were here.
    pub hits: u64,
    /// Those that were not.
    pub misses: u64,
    /// Index entries that were served though the registry could not be asked.
    pub stale: u64,
    /// Bytes that cargo was sent.
    pub sent_bytes: u64,
    /// Bytes on disk.
    pub stored_bytes: u64,
}

impl CratesStatus {
    fn of(app: &App) -> Self {
        let of = |from| {
            let answers = |kind| app.crates.counters.answers(kind, from);
            answers(Kind::Index) + answers(Kind::File)
        };
        let storage = app.pool.storage();
        Self {
            hits: of(From::Cache) + of(From::Revalidated) + of(From::Shared),
            misses: of(From::Upstream),
            stale: of(From::Stale),
            sent_bytes: app.crates.counters.sent_bytes(),
            stored_bytes: storage.used(Part::Blobs) + storage.used(Part::Index),
        }
    }
}

impl Snapshot {
    /// The state for the sender of these headers.
    ///
    /// # Errors
    /// [`crate::error::Error::Unauthorized`] by [`crate::access::Access::principal`].
    pub fn take(app: &Arc<App>, headers: &HeaderMap) -> Result<Self, crate::error::Error> {
        let principal = app.access.principal(headers)?;
        let config = app.config();
        let hosts = config
            .git
            .upstreams
            .iter()
            .map(|upstream| upstream.host.clone());
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            uptime: app.started.elapsed(),
            not_ready: app.ready().err(),
            repos: Vec::new(),
            hosts: hosts.collect(),
            registries: app.crates.status(&principal),
            crates: CratesStatus::of(app),
            storage_used: [Part::Answers, Part::Blobs, Part::Index]
                .map(|part| app.pool.storage().used(part))
                .iter()
                .sum(),
            storage_limit: config.storage.max_size,
            now: SystemTime::now(),
        }
        .with(app.pool.status(), &principal))
    }

    fn with(mut self, all: Vec<RepoStatus>, principal: &Principal) -> Self {
        self.storage_used += all.iter().map(|repo| repo.bytes).sum::<u64>();
        self.repos = all;
        self.repos.retain(|status| principal.may_read(&status.repo));
        self.repos.sort_by(|a, b| a.repo.cmp(&b.repo));
        if principal.name().is_some() {
            // SECURITY: the names of internal hosts are of no concern to who may read nothing there.
            let repos = &self.repos;
            self.hosts
                .retain(|host| repos.iter().any(|status| status.repo.host() == host));
        }
        self
    }
}

/// How long ago the upstream was last asked with success.
pub fn age(status: &RepoStatus, now: SystemTime) -> Option<Duration> {
    status
        .last_fetch
        .map(|last| now.duration_since(last).unwrap_or_default())
}
