//! The crate cache: sparse indexes and `.crate` files of the registries that the operator names.
//!
//! ```text
//! cargo ─► door ─► access ─┬─► index ────► entries (files: gzip, as they go over the wire)  ─► registry
//!                          └─► download ─► blobs (by SHA-256, checked before the last byte) ─► registry
//! ```

mod answer;
mod cargo_lock;
pub mod counters;
pub mod door;
mod download;
mod entries;
mod entry;
mod index;
pub mod name;
mod passing;
mod range;
mod upstream;
mod warm;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::access::Principal;
use crate::blobs::{Blobs, Digest, SecondTier};
use crate::config::{self, Config};
use crate::git::pool::Pool;
use crate::http_client::{self, Bundle, Redirects};
use crate::storage::Storage;
use counters::Counters;
use entries::Entries;
use index::Index;
use upstream::Upstream;

/// Files that are fetched at once from one registry. cargo itself asks for as many as it likes.
const DOWNLOADS: usize = 32;
/// Files of one registry that are passed on at once. SECURITY: clients that do not read them leave room on the one HTTP/2
/// connection to a host, where 32 answers fill the window.
const PASSED_ON: usize = 24;
/// Files of one registry that are fetched or wait for that, and as many index entries, at some KB each: more than several
/// builds with hundreds of crates ask for at once. SECURITY: they go on when those who asked go away, so nothing else
/// bounds them.
const ASKED_OR_WAITING: usize = 2048;

/// The registries.
pub struct Crates {
    config: watch::Receiver<Arc<Config>>,
    storage: Arc<Storage>,
    blobs: Arc<Blobs>,
    /// The bucket behind it, if there is one.
    pub second_tier: Arc<SecondTier>,
    pub counters: Counters,
    root: PathBuf,
    /// Made when they are first used, and anew after a reload that changes them: each with the configuration that it was
    /// last compared with.
    registries: Mutex<Registries>,
    /// By space, so that they outlive reloads.
    indexes: Mutex<HashMap<Arc<str>, Arc<Index>>>,
    /// Held by who opens one: the others do not wait for the disk.
    opening: Mutex<()>,
    /// For all registries, with what it was made from.
    client: Mutex<Option<(Option<Bundle>, reqwest::Client)>>,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

type Registries = HashMap<String, (Arc<Config>, Arc<Registry>)>;

/// A registry as it is configured now.
pub struct Registry {
    pub name: String,
    /// What its files are kept under: its name and where it is, so that one that moves begins anew.
    space: Arc<str>,
    index: Arc<Index>,
    upstream: Arc<Upstream>,
    /// Of its own: one that hangs holds up no other.
    downloads: Semaphore,
    /// [`PASSED_ON`].
    passing: Arc<Semaphore>,
    /// Of files, [`ASKED_OR_WAITING`].
    files: Arc<Semaphore>,
}

/// What a registry looks like to people.
#[derive(Clone, Debug)]
pub struct RegistryStatus {
    pub name: String,
    /// It fails, and is left alone for a while.
    pub failing: bool,
}

impl Crates {
    /// Opens what is on disk, and begins to count it in the background.
    ///
    /// # Errors
    /// What the file system says.
    pub fn start(
        config: watch::Receiver<Arc<Config>>,
        storage: &Arc<Storage>,
    ) -> anyhow::Result<Arc<Self>> {
        let current = config.borrow().clone();
        let blobs = Blobs::open(current.data_dir.join("blobs"), Arc::clone(storage))?;
        let (second_tier, waiting) = SecondTier::new(config.clone());
        let crates = Arc::new(Self {
            registries: Mutex::default(),
            root: current.data_dir.join("crates"),
            config,
            storage: Arc::clone(storage),
            blobs,
            second_tier: Arc::clone(&second_tier),
            counters: Counters::new(),
            indexes: Mutex::default(),
            opening: Mutex::default(),
            client: Mutex::default(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        });
        let loading = Arc::clone(&crates);
        crates.tasks.spawn_blocking(move || loading.load());
        let stopping = crates.stopping.clone();
        crates
            .tasks
            .spawn(second_tier.write_behind(waiting, stopping));
        Ok(crates)
    }

    /// Keeps the crates of `crates.warm` here, whose lock files may be in mirrors.
    pub fn keep_warm(self: &Arc<Self>, pool: &Arc<Pool>) {
        let warming = warm::keep_warm(Arc::clone(self), Arc::clone(pool));
        let stopping = self.stopping.clone();
        self.tasks.spawn(async move {
            stopping.run_until_cancelled(warming).await;
        });
    }

    /// Stops background work, and waits for what is being brought to disk.
    pub async fn shutdown(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.blobs.shutdown().await;
    }

    /// The files.
    pub fn blobs(&self) -> &Arc<Blobs> {
        &self.blobs
    }

    /// The registries that somebody may read.
    pub fn status(&self, principal: &Principal) -> Vec<RegistryStatus> {
        let config = self.config.borrow().clone();
        let registries = config.crates.registries.iter();
        let visible = registries.filter(|registry| principal.may_read_registry(&registry.name));
        visible
            .map(|registry| RegistryStatus {
                name: registry.name.clone(),
                failing: self.is_failing(registry),
            })
            .collect()
    }

    /// How many registries fail, and are left alone for a while.
    pub fn failing(&self) -> u64 {
        let config = self.config.borrow().clone();
        // Not those of earlier configurations, which nobody asks again.
        let registries = config.crates.registries.iter();
        let failing = registries.filter(|registry| self.is_failing(registry));
        failing.count() as u64
    }

    fn is_failing(&self, registry: &config::Registry) -> bool {
        let space = space(registry);
        let indexes = self.indexes();
        let index = indexes.get(&space);
        index.is_some_and(|index| index.breaker.is_open())
    }

    /// The registry of this name, if the operator allows it.
    ///
    /// # Errors
    /// What is wrong with certificates, the data folder or a token.
    pub async fn registry(self: &Arc<Self>, name: &str) -> anyhow::Result<Option<Arc<Registry>>> {
        let config = self.config.borrow().clone();
        if let Some((compared, registry)) = self.registries().get(name)
            && Arc::ptr_eq(compared, &config)
        {
            return Ok(Some(Arc::clone(registry)));
        }
        let Some(found) = config
            .crates
            .registries
            .iter()
            .find(|found| found.name == name)
        else {
            return Ok(None);
        };
        let space = space(found);
        let (crates, opened) = (Arc::clone(self), Arc::clone(&space));
        // Reads certificates from disk, and what the index has there.
        let open = move || anyhow::Ok((crates.client()?, crates.open_index(&opened)?));
        let (client, index) = tokio::task::spawn_blocking(open).await??;
        let upstream = Upstream::new(
            found,
            client.clone(),
            config.limits.upstream_idle_timeout,
            self.counters.clone(),
            config.crates.when_upstream_fails,
        )?;
        let new = Arc::new(Registry {
            name: name.to_owned(),
            space,
            index,
            upstream: Arc::new(upstream),
            downloads: Semaphore::new(DOWNLOADS),
            passing: Arc::new(Semaphore::new(PASSED_ON)),
            files: Arc::new(Semaphore::new(ASKED_OR_WAITING)),
        });
        let mut made = self.registries();
        if !Arc::ptr_eq(&config, &self.config.borrow()) {
            // What a newer one says is not replaced.
            return Ok(Some(new));
        }
        let registry = match made.get(name) {
            // What was learned of it stays: its `config.json`, and that it hangs.
            Some((_, same)) if same.upstream.is_same(&new.upstream) => {
                same.upstream.ask_with(client);
                Arc::clone(same)
            }
            _ => new,
        };
        made.insert(name.to_owned(), (config, Arc::clone(&registry)));
        Ok(Some(registry))
    }

    /// The client for all registries, made anew where the CA certificates are other ones now. Blocks on the disk.
    fn client(&self) -> anyhow::Result<reqwest::Client> {
        let mut made = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        // Before it is read: one that changes meanwhile is read again.
        let bundle = http_client::bundle();
        if let Some((from, client)) = &*made
            && *from == bundle
        {
            return Ok(client.clone());
        }
        let client = match (http_client::client(Redirects::OtherHosts), made.take()) {
            (Err(error), Some((_, old))) => {
                tracing::error!(
                    error = format!("{error:#}"),
                    "CA certificates cannot be read anew: registries are asked with the old ones"
                );
                old
            }
            (new, _) => new?,
        };
        *made = Some((bundle, client.clone()));
        Ok(client)
    }

    /// The index that is kept in `space`. Blocks on the disk.
    fn open_index(&self, space: &Arc<str>) -> std::io::Result<Arc<Index>> {
        let known = || self.indexes().get(space).cloned();
        // It does not wait for those that are being opened.
        if let Some(index) = known() {
            return Ok(index);
        }
        let _turn = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = known() {
            return Ok(index);
        }
        let entries = Entries::open(self.root.join(&**space), &self.storage)?;
        let (loading, stopping) = (Arc::clone(&entries), self.stopping.clone());
        self.tasks.spawn_blocking(move || loading.load(&stopping));
        let index = Index::new(entries, self.tasks.clone(), self.stopping.clone());
        self.indexes().insert(Arc::clone(space), Arc::clone(&index));
        Ok(index)
    }

    /// Counts what is on disk. Blocks.
    fn load(&self) {
        // Those of other configurations as well: what is not counted is not evicted.
        for entry in std::fs::read_dir(&self.root)
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = entry.file_name();
            if let Some(space) = name.to_str()
                && let Err(error) = self.open_index(&space.into())
            {
                tracing::error!(space, %error, "index entries on disk cannot be used");
            }
        }
        self.blobs.load(&self.stopping);
    }

    fn registries(&self) -> MutexGuard<'_, Registries> {
        self.registries
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn indexes(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Index>>> {
        self.indexes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn space(registry: &config::Registry) -> Arc<str> {
    let digest = Digest::of(registry.url.as_str().as_bytes()).to_string();
    format!("{}-{}", registry.name, &digest[..8]).into()
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures_util::FutureExt;

    use super::*;
    use crate::config::environment::Environment;

    /// Neither who asks for it nor who looks at the others.
    #[tokio::test]
    async fn no_worker_waits_for_an_index_to_be_opened() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::parse("{}", &Environment::default()).unwrap();
        config.data_dir = folder.path().to_owned();
        let config = watch::channel(Arc::new(config)).1;
        let crates = Crates::start(config, &Storage::new(1 << 20)).unwrap();
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([]);
        *crates.client.lock().unwrap() = Some((http_client::bundle(), client.build().unwrap()));
        let mut asking = pin!(crates.registry(config::CRATES_IO));
        {
            let _slow_disk = crates.opening.lock().unwrap();
            assert!(asking.as_mut().now_or_never().is_none());
            assert_eq!(crates.failing(), 0);
        }
        assert!(asking.await.unwrap().is_some());
    }
}
