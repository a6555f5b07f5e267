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
use crate::http_client::{self, Redirects};
use crate::storage::Storage;
use counters::Counters;
use entries::Entries;
use index::Index;
use upstream::Upstream;

/// Files that are fetched at once from one registry. cargo itself asks for as many as it likes.
const DOWNLOADS: usize = 32;

/// The registries.
pub struct Crates {
    config: watch::Receiver<Arc<Config>>,
    storage: Arc<Storage>,
    blobs: Arc<Blobs>,
    /// The bucket behind it, if there is one.
    pub second_tier: Arc<SecondTier>,
    pub counters: Counters,
    root: PathBuf,
    /// Made when they are first used, and anew after a reload.
    registries: Mutex<Registries>,
    /// By space, so that they outlive reloads.
    indexes: Mutex<HashMap<Arc<str>, Arc<Index>>>,
    client: tokio::sync::OnceCell<reqwest::Client>,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

type Registries = (Arc<Config>, HashMap<String, Arc<Registry>>);

/// A registry as it is configured now.
pub struct Registry {
    pub name: String,
    /// What its files are kept under: its name and where it is, so that one that moves begins anew.
    space: Arc<str>,
    index: Arc<Index>,
    upstream: Arc<Upstream>,
    /// Of its own: one that hangs holds up no other.
    downloads: Semaphore,
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
            registries: Mutex::new((Arc::clone(&current), HashMap::new())),
            root: current.data_dir.join("crates"),
            config,
            storage: Arc::clone(storage),
            blobs,
            second_tier: Arc::clone(&second_tier),
            counters: Counters::new(),
            indexes: Mutex::default(),
            client: tokio::sync::OnceCell::new(),
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        });
        let loading = Arc::clone(&crates);
        crates.tasks.spawn_blocking(move || loading.load());
        let stopping = crates.stopping.clone();
        crates.tasks.spawn(async move {
            stopping
                .run_until_cancelled(second_tier.write_behind(waiting))
                .await;
        });
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
            .map(|registry| {
                let space = space(registry);
                RegistryStatus {
                    name: registry.name.clone(),
                    failing: self
                        .indexes()
                        .get(&space)
                        .is_some_and(|index| index.breaker.is_open()),
                }
            })
            .collect()
    }

    /// How many registries fail, and are left alone for a while.
    pub fn failing(&self) -> u64 {
        let indexes = self.indexes();
        let failing = indexes.values().filter(|index| index.breaker.is_open());
        failing.count() as u64
    }

    /// The registry of this name, if the operator allows it.
    ///
    /// # Errors
    /// What is wrong with certificates, the data folder or a token.
    pub async fn registry(self: &Arc<Self>, name: &str) -> anyhow::Result<Option<Arc<Registry>>> {
        let config = self.config.borrow().clone();
        {
            let mut made = self.registries();
            if !Arc::ptr_eq(&made.0, &config) {
                *made = (Arc::clone(&config), HashMap::new());
            }
            if let Some(registry) = made.1.get(name) {
                return Ok(Some(Arc::clone(registry)));
            }
        }
        let Some(found) = config
            .crates
            .registries
            .iter()
            .find(|found| found.name == name)
        else {
            return Ok(None);
        };
        let client = self
            .client
            .get_or_try_init(|| async {
                // Reads certificates from disk.
                let made = || http_client::client(Redirects::OtherHosts);
                tokio::task::spawn_blocking(made).await?
            })
            .await?;
        let upstream = Upstream::new(
            found,
            client.clone(),
            config.limits.upstream_idle_timeout,
            self.counters.clone(),
            config.crates.when_upstream_fails,
        )?;
        let space = space(found);
        let registry = Arc::new(Registry {
            name: name.to_owned(),
            index: self.index(&space)?,
            space,
            upstream: Arc::new(upstream),
            downloads: Semaphore::new(DOWNLOADS),
        });
        let mut made = self.registries();
        if Arc::ptr_eq(&made.0, &config) {
            made.1.insert(name.to_owned(), Arc::clone(&registry));
        }
        Ok(Some(registry))
    }

    fn index(&self, space: &Arc<str>) -> anyhow::Result<Arc<Index>> {
        let mut indexes = self.indexes();
        if let Some(index) = indexes.get(space) {
            return Ok(Arc::clone(index));
        }
        let entries = Entries::open(self.root.join(&**space), &self.storage)?;
        let loading = Arc::clone(&entries);
        self.tasks.spawn_blocking(move || loading.load());
        let index = Index::new(entries, self.tasks.clone());
        indexes.insert(Arc::clone(space), Arc::clone(&index));
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
                && let Err(error) = self.index(&space.into())
            {
                tracing::error!(space, %error, "index entries on disk cannot be used");
            }
        }
        self.blobs.load();
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
