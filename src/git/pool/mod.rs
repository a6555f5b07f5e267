//! The pool of mirrors: which there are, how fresh they are, and that each is fetched once however many ask.

mod damage;
mod data_dir;
mod entry;
mod fetch;
mod flight;
mod maintenance;
mod prepare;
mod refresh;
mod status;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, WhenUpstreamFails};
use crate::git::answers::Answers;
use crate::git::mirror::MirrorFolder;
use crate::git::name::RepoName;
use crate::git::snapshot::Snapshot;
use crate::git::upstream::{Upstream, UpstreamError};
use crate::ops::metrics::Metrics;
use crate::storage::{Evict, Part, Storage, StorageFull};
use data_dir::DataDir;

use entry::{AtOnce, Failure};
pub use entry::{Entry, Passing};
pub use flight::Flight;
pub use status::RepoStatus;

/// Names that were asked for and are no mirrors are forgotten beyond this many.
const MOST_ENTRIES: usize = 10_000;

/// First clones that wait for a place. Beyond that, requests only pass through, or are told to come back.
const MOST_WAITING: usize = 64;

/// Who may get stale references waits no longer than this for fresh ones; the fetch goes on.
const PATIENCE: Duration = Duration::from_secs(10);

/// A mirror whose upstream was asked this recently is not asked again at once for what it lacks.
const JUST_NOW: Duration = Duration::from_secs(1);

/// Packs that are made for one client alone since there is no room to keep them. They hold a thread as long as the
/// client reads.
const UNKEPT_AT_ONCE: usize = 8;

/// Requests that are planned at once, for each core: history is walked for that.
const PLANS_PER_CORE: usize = 2;

/// On one core, too, answers are prepared while a large mirror's packs are consolidated.
const LEAST_BACKGROUND: usize = 2;

/// The mirrors.
pub struct Pool {
    config: watch::Receiver<Arc<Config>>,
    metrics: Arc<Metrics>,
    storage: Arc<Storage>,
    answers: Arc<Answers>,
    data: DataDir,
    entries: Mutex<HashMap<RepoName, Arc<Entry>>>,
    /// Made when they are first used, and anew after a reload.
    upstreams: Mutex<Upstreams>,
    first_clones: Arc<Semaphore>,
    /// Threads that make packs for clients.
    threads: Arc<Semaphore>,
    /// Threads for what no client waits for: packs that are consolidated and verified, answers that are prepared.
    background: Arc<Semaphore>,
    unkept: Arc<Semaphore>,
    planning: Arc<Semaphore>,
    at_once: AtOnce,
    waiting_clones: AtomicUsize,
    loaded: AtomicBool,
    scratch: AtomicU64,
    stop: Arc<AtomicBool>,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

/// Upstreams by host, and the configuration that they were made from.
type Upstreams = (Arc<Config>, HashMap<String, Arc<Upstream>>);

/// What the pool has of a repository.
pub enum Found {
    Mirror(Arc<Entry>, Arc<Snapshot>),
    /// No mirror yet.
    Cold(Cold),
}

/// A repository without a mirror. Where its upstream speaks HTTP, some requests are passed through to it while
/// [`Pool::first_clone`] makes the mirror; else they wait for that.
pub struct Cold {
    pub entry: Arc<Entry>,
    pub upstream: Arc<Upstream>,
}

/// Why the pool has nothing to serve.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PoolError {
    #[error("there is no such repository")]
    NotFound,
    #[error("{0}")]
    Upstream(String),
    #[error("{0}")]
    Storage(#[from] StorageFull),
    #[error("too many first clones are waiting")]
    Busy,
    #[error("the service is stopping")]
    Stopping,
}

impl From<UpstreamError> for PoolError {
    fn from(error: UpstreamError) -> Self {
        match error {
            UpstreamError::NotFound => Self::NotFound,
            UpstreamError::Storage(full) => Self::Storage(full),
            UpstreamError::Stopped => Self::Stopping,
            other => Self::Upstream(other.to_string()),
        }
    }
}

impl Pool {
    /// Opens the data folder and begins to load, warm and refresh in the background.
    ///
    /// # Errors
    /// A data folder that cannot be used, or that another process uses.
    pub fn start(
        config: watch::Receiver<Arc<Config>>,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Arc<Self>> {
        let current = config.borrow().clone();
        let data = DataDir::open(&current.data_dir)?;
        let storage = Storage::new(current.storage.max_size);
        let answers = Answers::open(data.answers(), Arc::clone(&storage))?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = if current.limits.pack_threads == 0 {
            cores
        } else {
            current.limits.pack_threads
        };
        let planning = PLANS_PER_CORE * cores;
        let limits = &current.limits;
        let making = limits.packs_per_repo.min(threads);
        let pool = Arc::new(Self {
            upstreams: Mutex::new((Arc::clone(&current), HashMap::new())),
            first_clones: Arc::new(Semaphore::new(current.git.first_clones)),
            threads: Arc::new(Semaphore::new(threads)),
            background: Arc::new(Semaphore::new(threads.max(LEAST_BACKGROUND))),
            at_once: AtOnce {
                planning,
                making,
                waiting: limits.packs_per_repo - making + limits.packs_queue_per_repo,
            },
            config,
            metrics,
            storage,
            answers,
            data,
            entries: Mutex::default(),
            unkept: Arc::new(Semaphore::new(UNKEPT_AT_ONCE)),
            planning: Arc::new(Semaphore::new(planning)),
            waiting_clones: AtomicUsize::new(0),
            loaded: AtomicBool::new(false),
            scratch: AtomicU64::new(0),
            stop: Arc::default(),
            stopping: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        let weak: Weak<dyn Evict> = Arc::downgrade(&pool) as _;
        pool.storage.add_evictor(weak);
        pool.tasks.spawn(Arc::clone(&pool).run());
        let (storage, stopping) = (Arc::clone(&pool.storage), pool.stopping.clone());
        let closing = Arc::clone(&pool).close_idle();
        pool.tasks.spawn(async move {
            stopping
                .run_until_cancelled(async { tokio::join!(storage.keep_room(), closing) })
                .await;
        });
        Ok(pool)
    }

    /// Stops background work and waits for it. What is cut off all the same survives that as it would a crash.
    pub async fn shutdown(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Whether requests can be served.
    ///
    /// # Errors
    /// Why not, as text for anybody.
    pub fn ready(&self) -> Result<(), String> {
        if self.loaded.load(Ordering::Relaxed) {
            Ok(())
        } else {
            Err("loading: looking for mirrors on disk".into())
        }
    }

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

    /// The space on disk and its limit.
    pub fn storage(&self) -> &Arc<Storage> {
        &self.storage
    }

    pub fn answers(&self) -> &Arc<Answers> {
        &self.answers
    }

    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Permits for the threads that make packs.
    pub fn threads(&self) -> &Arc<Semaphore> {
        &self.threads
    }

    /// Permits for packs that are made for one client alone.
    pub fn unkept(&self) -> &Arc<Semaphore> {
        &self.unkept
    }

    /// Permits for walking history on behalf of a client.
    pub fn planning(&self) -> &Arc<Semaphore> {
        &self.planning
    }

    /// Spawns work that a stop waits for.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.tasks.spawn(work);
    }

    /// What there is of `name`, with references no older than `git.max_age`.
    ///
    /// # Errors
    /// [`PoolError::NotFound`] also for what the operator does not allow.
    pub async fn fresh(self: &Arc<Self>, name: &RepoName) -> Result<Found, PoolError> {
        let came = Instant::now();
        let (entry, upstream) = self.entry(name).await?;
        let Some(snapshot) = self.opened(&entry).await? else {
            return self.cold(entry, upstream);
        };
        let max_age = self.config.borrow().git.max_age;
        let snapshot = match entry.fresh(came, max_age) {
            Some(fresh) => fresh,
            None => {
                self.refreshed(&entry, upstream, snapshot, came, max_age)
                    .await?
            }
        };
        Ok(Found::Mirror(entry, snapshot))
    }

    /// What there is of `name`, without asking anybody.
    ///
    /// # Errors
    /// [`PoolError::NotFound`] also for what the operator does not allow.
    pub async fn present(self: &Arc<Self>, name: &RepoName) -> Result<Found, PoolError> {
        let (entry, upstream) = self.entry(name).await?;
        match self.opened(&entry).await? {
            Some(snapshot) => Ok(Found::Mirror(entry, snapshot)),
            None => self.cold(entry, upstream),
        }
    }

    /// The mirror after asking the upstream, since `snapshot` lacks something that a client expects there.
    ///
    /// # Errors
    /// Why the upstream cannot be asked, where a stale mirror may not be served.
    pub async fn ask_again(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        snapshot: Arc<Snapshot>,
    ) -> Result<Arc<Snapshot>, PoolError> {
        let came = Instant::now();
        let age = entry.state().fresh.map(|fresh| fresh.elapsed());
        if let Some(early) = age.and_then(|age| JUST_NOW.checked_sub(age)) {
            tokio::time::sleep(early).await;
        }
        let (_, upstream) = self.entry(&entry.name).await?;
        // What the client expects may have been pushed a moment before it came.
        self.refreshed(entry, upstream, snapshot, came, Duration::ZERO)
            .await
    }

    /// Begins the first clone of a repository, or joins it.
    ///
    /// # Errors
    /// [`PoolError::Busy`] when too many wait for theirs; why the last one failed, when that was a moment ago.
    pub fn first_clone(self: &Arc<Self>, cold: &Cold) -> Result<Arc<Flight>, PoolError> {
        let (under_way, failed) = {
            let state = cold.entry.state();
            (state.flight.clone(), state.failed.clone())
        };
        match (under_way, failed) {
            (Some(flight), _) => Ok(flight),
            // Each try costs the upstream a whole clone, and what is here its room.
            (None, Some(failure)) if failure.is_recent() => Err(failure.error.into()),
            _ if self.waiting_clones.load(Ordering::Relaxed) >= MOST_WAITING => {
                Err(PoolError::Busy)
            }
            _ => Ok(self.fly(&cold.entry, Arc::clone(&cold.upstream))),
        }
    }

    /// Remembers for a moment that the upstream has no such repository, so that not everyone who asks is passed on.
    pub fn not_found(&self, cold: &Cold) {
        let mut state = cold.entry.state();
        state.failed = Some(Failure::after(
            state.failed.as_ref(),
            UpstreamError::NotFound,
        ));
    }

    /// The mirror with references that were at most `max_age` old when the client `came`; where it may be stale, also
    /// with older ones.
    async fn refreshed(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: Arc<Upstream>,
        snapshot: Arc<Snapshot>,
        came: Instant,
        max_age: Duration,
    ) -> Result<Arc<Snapshot>, PoolError> {
        let may_be_stale =
            self.config.borrow().git.when_upstream_fails == WhenUpstreamFails::ServeStale;
        // An upstream that just failed is not asked by everyone who comes.
        let recent = entry.state().failed.clone().filter(Failure::is_recent);
        let result = match recent {
            Some(failure) => Err(failure.error),
            None if may_be_stale => {
                let fetched = self.fetched(entry, upstream, came, max_age);
                let landed = tokio::time::timeout(PATIENCE, fetched).await;
                let slow = || UpstreamError::Failed("the upstream takes long to answer".to_owned());
                landed.unwrap_or_else(|_| Err(slow()))
            }
            None => self.fetched(entry, upstream, came, max_age).await,
        };
        match result {
            Ok(snapshot) => Ok(snapshot),
            // Also when the upstream answers that the repository is gone: builds that are locked to it go on.
            Err(error) if may_be_stale => {
                tracing::warn!(repo = %entry.name, %error, "serving stale references");
                self.metrics.stale_served(&entry.name);
                Ok(entry.snapshot().unwrap_or(snapshot))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Waits for a fetch. One that was under way may have asked the upstream too early for a client that `came` later:
    /// then another one follows, which cannot have.
    async fn fetched(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: Arc<Upstream>,
        came: Instant,
        max_age: Duration,
    ) -> Result<Arc<Snapshot>, UpstreamError> {
        if let Some(fresh) = entry.fresh(came, max_age) {
            return Ok(fresh);
        }
        let first = self.fly(entry, Arc::clone(&upstream)).wait().await?;
        if entry.fresh(came, max_age).is_some() {
            return Ok(first);
        }
        self.fly(entry, upstream).wait().await
    }

    fn cold(&self, entry: Arc<Entry>, upstream: Arc<Upstream>) -> Result<Found, PoolError> {
        let recent = entry.state().failed.clone().filter(Failure::is_recent);
        match recent.map(|failure| failure.error) {
            // That is an answer, and the same for everybody.
            Some(error @ (UpstreamError::NotFound | UpstreamError::Sha256)) => Err(error.into()),
            Some(error) if upstream.http().is_none() => Err(error.into()),
            // No mirror could be made: requests can still pass through.
            Some(_) | None => Ok(Found::Cold(Cold { entry, upstream })),
        }
    }

    /// The entry of a repository that the operator allows.
    async fn entry(
        self: &Arc<Self>,
        name: &RepoName,
    ) -> Result<(Arc<Entry>, Arc<Upstream>), PoolError> {
        let upstream = self.upstream(name.host()).await?;
        if !upstream.allows(name.path()) {
            return Err(PoolError::NotFound);
        }
        let entry = self.entry_of(name);
        let touch = {
            let mut state = entry.state();
            state.used = SystemTime::now();
            let due = state
                .touched
                .is_none_or(|touched| touched.elapsed() > Duration::from_secs(60));
            if due {
                state.touched = Some(Instant::now());
            }
            due && state.on_disk
        };
        if touch {
            let folder = entry.folder.clone();
            self.tasks.spawn_blocking(move || folder.touch());
        }
        Ok((entry, upstream))
    }

    fn entry_of(&self, name: &RepoName) -> Arc<Entry> {
        if let Some(entry) = self.entries().get(name) {
            return Arc::clone(entry);
        }
        // Looks at the disk, which may be slow: not while others wait for the list.
        let new = Arc::new(Entry::new(
            name.clone(),
            MirrorFolder::at(name.folder_below(&self.data.git())),
            self.storage.nothing(Part::Git),
            &self.at_once,
        ));
        let mut entries = self.entries();
        if entries.len() >= MOST_ENTRIES {
            entries.retain(|_, entry| {
                let state = entry.state();
                state.on_disk || state.flight.is_some()
            });
        }
        Arc::clone(entries.entry(name.clone()).or_insert(new))
    }

    async fn upstream(self: &Arc<Self>, host: &str) -> Result<Arc<Upstream>, PoolError> {
        let config = self.config.borrow().clone();
        {
            let mut made = self.upstreams();
            if !Arc::ptr_eq(&made.0, &config) {
                *made = (Arc::clone(&config), HashMap::new());
            }
            if let Some(upstream) = made.1.get(host) {
                return Ok(Arc::clone(upstream));
            }
        }
        if config.upstream(host).is_none() {
            return Err(PoolError::NotFound);
        }
        // Reads certificates from disk.
        let (asked, key) = (Arc::clone(&config), host.to_owned());
        let made = tokio::task::spawn_blocking(move || {
            asked
                .upstream(&key)
                .map(|upstream| Upstream::new(upstream, &asked))
        });
        let upstream = match made.await {
            Ok(Some(Ok(upstream))) => Arc::new(upstream),
            Ok(Some(Err(error))) => return Err(PoolError::Upstream(format!("{host}: {error:#}"))),
            Ok(None) | Err(_) => return Err(PoolError::NotFound),
        };
        let mut made = self.upstreams();
        if Arc::ptr_eq(&made.0, &config) {
            made.1.insert(host.to_owned(), Arc::clone(&upstream));
        }
        Ok(upstream)
    }

    fn entries(&self) -> MutexGuard<'_, HashMap<RepoName, Arc<Entry>>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn upstreams(&self) -> MutexGuard<'_, Upstreams> {
        self.upstreams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A path for temporary files that nobody else has.
    fn scratch(&self) -> std::path::PathBuf {
        self.data
            .scratch()
            .join(self.scratch.fetch_add(1, Ordering::Relaxed).to_string())
    }
}

impl Evict for Pool {
    fn oldest(&self) -> Option<SystemTime> {
        let warm = self.config.borrow().git.warm.clone();
        let entries = self.entries();
        let idle = entries.values().filter(|entry| !warm.contains(&entry.name));
        let used = idle.filter_map(|entry| {
            let state = entry.state();
            (state.reservation.bytes() > 0).then_some(state.used)
        });
        // Without any there is nothing to evict: those who have some come first.
        Some(used.min().unwrap_or_else(SystemTime::now))
    }

    /// Removes whole mirrors: never one in `git.warm`, in use, or being fetched or consolidated.
    fn evict(&self, bytes: u64) {
        let warm = self.config.borrow().git.warm.clone();
        let mut idle: Vec<_> = self
            .entries()
            .values()
            .filter(|entry| !warm.contains(&entry.name))
            .map(|entry| (entry.state().used, Arc::clone(entry)))
            .collect();
        idle.sort_by_key(|(used, _)| *used);
        let mut freed = 0;
        for (_, entry) in idle {
            if freed >= bytes {
                return;
            }
            // Being opened, fetched or consolidated.
            let (Ok(_busy), Ok(_maintaining)) =
                (entry.busy.try_lock(), entry.maintaining.try_lock())
            else {
                continue;
            };
            let scratch = self.scratch();
            let mut state = entry.state();
            let unused = state
                .snapshot
                .as_ref()
                .is_none_or(|snapshot| Arc::strong_count(snapshot) == 1);
            if state.reservation.bytes() == 0 || state.flight.is_some() || !unused {
                continue;
            }
            if let Err(error) = std::fs::rename(entry.folder.path(), &scratch) {
                tracing::error!(repo = %entry.name, %error, "the mirror cannot be evicted");
                continue;
            }
            state.on_disk = false;
            let last = state.snapshot.take();
            state.fresh = None;
            // Counted until the files are gone; a mirror that is made meanwhile has a reservation of its own.
            let mut reservation =
                std::mem::replace(&mut state.reservation, self.storage.nothing(Part::Git));
            drop(state);
            self.answers.forget_repo(&entry.name);
            data_dir::remove(&scratch);
            let bytes = reservation.bytes();
            // Somebody may read them still by a snapshot before the last one.
            for pack in last.iter().flat_map(|last| last.packs.packs()) {
                pack.unlinked(&mut reservation);
            }
            freed += bytes;
            tracing::info!(repo = %entry.name, bytes, "evicted the mirror to stay below storage.max_size");
        }
    }
}
