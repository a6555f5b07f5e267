//! The state of the service at one moment, as one requester may see it: what the status page and its JSON show.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::http::HeaderMap;

use crate::app::App;
use crate::crates::RegistryStatus;
use crate::crates::counters::{CacheStatus, Kind};
use crate::git::pool::RepoStatus;
use crate::storage::Part;

/// What one requester may know of the service at one moment.
pub struct Snapshot {
    /// Of the service.
    pub version: &'static str,
    /// Since the start.
    pub uptime: Duration,
    /// Why requests should not be sent here.
    pub not_ready: Option<String>,
    /// The repositories that the requester may read, by name.
    pub repos: Vec<RepoStatus>,
    /// The hosts of the upstreams; for a requester that may not read every repository only those of `repos`.
    pub hosts: Vec<String>,
    /// The registries of crates that the requester may read.
    pub registries: Vec<RegistryStatus>,
    /// What cargo was answered with, for whoever may read a registry.
    pub crates: CratesStatus,
    /// Bytes on disk by the one account: mirrors (also those that are not shown, and what is on its way to them), answers
    /// and the crate cache.
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
            hits: of(CacheStatus::Hit) + of(CacheStatus::Revalidated) + of(CacheStatus::Shared),
            misses: of(CacheStatus::Upstream),
            stale: of(CacheStatus::Stale),
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
        let mut repos = app.pool.status();
        repos.retain(|status| principal.may_read(&status.repo));
        // SECURITY: the names of internal hosts are of no concern to who may read nothing there.
        let is_shown = |host: &str| {
            principal.may_read_every_repo() || repos.iter().any(|status| status.repo.host() == host)
        };
        let hosts = config.git.upstreams.iter().map(|upstream| &upstream.host);
        let hosts = hosts.filter(|host| is_shown(host)).cloned().collect();
        let storage = app.pool.storage();
        Ok(Self {
            version: env!("CARGO_PKG_VERSION"),
            uptime: app.started.elapsed(),
            not_ready: app.ready().err(),
            repos,
            hosts,
            registries: app.crates.status(&principal),
            crates: CratesStatus::of(app),
            storage_used: storage.used_in_all(),
            storage_limit: storage.limit(),
            now: SystemTime::now(),
        })
    }
}

/// How long ago the upstream was last asked with success.
pub fn age(status: &RepoStatus, now: SystemTime) -> Option<Duration> {
    status
        .last_fetch
        .map(|last| now.duration_since(last).unwrap_or_default())
}

#[cfg(test)]
mod tests {

    use axum::http::HeaderValue;
    use axum::http::header::AUTHORIZATION;

    use super::*;
    use crate::config::environment::Environment;
    use crate::config::patterns::Patterns;
    use crate::config::secret::Secret;
    use crate::config::{Anonymous, Config, Token};

    /// A service for two tokens: `all`, and `few` that is for one repository.
    fn app(folder: &tempfile::TempDir) -> Arc<App> {
        let mut config = Config::parse("{}", &Environment::default()).expect("the default");
        config.data_dir = folder.path().to_owned();
        config.access.anonymous = Anonymous::None;
        let tokens = [("all", vec![]), ("few", vec!["github.com/o/r".to_owned()])];
        config.access.tokens = tokens
            .map(|(name, repos)| Token {
                name: name.into(),
                token_file: "/run/secrets/token".into(),
                secret: Secret::new(name.as_bytes()),
                repos: Patterns::new(repos).expect("patterns"),
                registries: None,
            })
            .into();
        App::of(config)
    }

    fn seen_by(token: &'static str, app: &Arc<App>) -> Snapshot {
        let token = HeaderValue::from_static(token);
        Snapshot::take(app, &HeaderMap::from_iter([(AUTHORIZATION, token)])).expect("let in")
    }

    #[tokio::test]
    async fn who_may_read_every_repository_sees_every_host() {
        let folder = tempfile::tempdir().expect("a folder");
        let app = app(&folder);
        let hosts = ["github.com", "gitlab.com", "codeberg.org", "bitbucket.org"];
        assert_eq!(seen_by("Bearer all", &app).hosts, hosts);
        assert!(seen_by("Bearer few", &app).hosts.is_empty());
    }

    #[tokio::test]
    async fn what_has_no_mirror_yet_takes_room_as_well() {
        let folder = tempfile::tempdir().expect("a folder");
        let app = app(&folder);
        let first_clone = app.pool.storage().count(Part::Git, 7);
        assert_eq!(seen_by("Bearer all", &app).storage_used, 7);
        drop(first_clone);
        assert_eq!(seen_by("Bearer all", &app).storage_used, 0);
    }
}
