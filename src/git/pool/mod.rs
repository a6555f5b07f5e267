//! The pool of mirrors: which there are, how fresh they are, and that each is fetched once however many ask.

mod damage;
mod data_dir;
mod entry;
mod evict;
mod fetch;
mod flight;
mod load;
mod maintenance;
#[cfg(test)]
mod over_files;
mod prepare;
mod refresh;
mod status;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::{Config, WhenUpstreamFails};
use crate::git::answers::Answers;
use crate::git::mirror::MirrorFolder;
use crate::git::name::RepoName;
use crate::git::snapshot::Snapshot;
use crate::git::upstream::http::HttpUpstream;
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

/// First clones that clients began and that wait for a place. Beyond that, requests only pass through, or are told to
/// come back. Those of `git.warm` do not count: they are as many as the operator says.
const MOST_WAITING: usize = 64;

/// Who may get stale references waits for fresh ones until somebody has waited this long for them; the fetch goes on.
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
    /// Made when they are first used, and anew after a reload that changes them: each with the configuration that it was
    /// last compared with.
    upstreams: Mutex<Upstreams>,
    first_clones: Arc<Semaphore>,
    /// Threads that make packs for clients.
    threads: Arc<Semaphore>,
    /// Threads for what no client waits for: packs that are consolidated and verified, answers that are prepared.
    background: Arc<Semaphore>,
    unkept: Arc<Semaphore>,
    planning: Arc<Semaphore>,
    at_once: AtOnce,
    /// Places in the queue for first clones that clients begin.
    waiting_clones: Arc<Semaphore>,
    /// One more mirror is open.
    more_open: Notify,
    /// Bytes that open mirrors may take.
    memory_for_mirrors: u64,
    loaded: AtomicBool,
    scratch: AtomicU64,
    stop: Arc<AtomicBool>,
    stopping: CancellationToken,
    tasks: TaskTracker,
}

/// By host.
type Upstreams = HashMap<String, (Arc<Config>, Arc<Upstream>)>;

/// What the pool has of a repository.
pub enum Found {
    Mirror(Arc<Entry>, Arc<Snapshot>),
    /// No mirror yet.
    Cold(Cold),
}

/// A repository without a mirror. Where its upstream speaks HTTP, some requests are passed through to it while
/// [`Pool::first_clone`] makes the mirror; else they wait for that.
#[derive(Clone)]
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
            upstreams: Mutex::default(),
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
            waiting_clones: Arc::new(Semaphore::new(MOST_WAITING)),
            more_open: Notify::new(),
            memory_for_mirrors: load::memory_for_mirrors(),
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
        self.note_last_uses();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Notes the uses that are not on disk yet: after a restart as well, the least recently used goes first.
    fn note_last_uses(&self) {
        let entries: Vec<_> = self.entries().values().cloned().collect();
        self.tasks.spawn_blocking(move || {
            for entry in entries {
                if let Some(used) = entry.use_to_note() {
                    entry.folder.touch(used);
                }
            }
        });
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
        let (entry, upstream) = self.allowed_entry(name).await?;
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
        let (entry, upstream) = self.allowed_entry(name).await?;
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
        let (_, upstream) = self.allowed_entry(&entry.name).await?;
        // What the client expects may have been pushed a moment before it came. Without that it gets nothing: it waits also
        // where others do with what is here.
        let fetched = self.fetched(entry, upstream, came, Duration::ZERO);
        let result = match entry.recent_failure() {
            Some(error) => Err(error),
            None if self.may_be_stale() => timeout(PATIENCE, fetched)
                .await
                .unwrap_or_else(|_| Err(slow())),
            None => fetched.await,
        };
        self.or_stale(entry, snapshot, result)
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
            _ => {
                let waiting = Arc::clone(&self.waiting_clones).try_acquire_owned();
                let waiting = waiting.map_err(|_| PoolError::Busy)?;
                let upstream = Arc::clone(&cold.upstream);
                Ok(self.fly_from(&cold.entry, upstream, Some(waiting)))
            }
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
        // An upstream that just failed is not asked by everyone who comes.
        let result = match entry.recent_failure() {
            Some(error) => Err(error),
            None if self.may_be_stale() => self.fetched_soon(entry, upstream, came, max_age).await,
            None => self.fetched(entry, upstream, came, max_age).await,
        };
        self.or_stale(entry, snapshot, result)
    }

    fn may_be_stale(&self) -> bool {
        self.config.borrow().git.when_upstream_fails == WhenUpstreamFails::ServeStale
    }

    /// What a fetch brought, or where it failed what is here, if that may be stale.
    fn or_stale(
        &self,
        entry: &Entry,
        snapshot: Arc<Snapshot>,
        fetched: Result<Arc<Snapshot>, UpstreamError>,
    ) -> Result<Arc<Snapshot>, PoolError> {
        match fetched {
            Ok(snapshot) => Ok(snapshot),
            // Also when the upstream answers that the repository is gone: builds that are locked to it go on.
            Err(error) if self.may_be_stale() => {
                self.serves_stale(entry, &error);
                Ok(entry.snapshot().unwrap_or(snapshot))
            }
            Err(error) => Err(error.into()),
        }
    }

    fn serves_stale(&self, entry: &Entry, error: &UpstreamError) {
        tracing::warn!(repo = %entry.name, %error, "serving stale references");
        self.metrics.stale_served(&entry.name);
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

    /// The same for who may get what is here instead: it waits until the question is [`PATIENCE`] old, and not at all for a
    /// host that answers nobody.
    async fn fetched_soon(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: Arc<Upstream>,
        came: Instant,
        max_age: Duration,
    ) -> Result<Arc<Snapshot>, UpstreamError> {
        let under_way = entry.state().flight.clone();
        // In our own queue it is not yet asked.
        let asked = under_way.and_then(|flight| flight.progress.begun.get().copied());
        let waited = asked.map_or(Duration::ZERO, |asked| asked.elapsed());
        let left = PATIENCE.saturating_sub(waited);
        // Who does not wait in any case is not the one that finds out whether the host still hangs.
        if !left.is_zero() && !upstream.is_worth_waiting() {
            return Err(slow());
        }
        let fetched = self.fetched(entry, Arc::clone(&upstream), came, max_age);
        if let Ok(landed) = timeout(left, fetched).await {
            return landed;
        }
        let under_way = entry.state().flight.clone();
        if let Some(flight) = under_way {
            flight.blame_if_it_hangs(&upstream);
        }
        Err(slow())
    }

    fn cold(&self, entry: Arc<Entry>, upstream: Arc<Upstream>) -> Result<Found, PoolError> {
        // A clone that is under way has asked already.
        let is_to_ask = entry.state().flight.is_none();
        let asked_too_often = upstream.http().and_then(HttpUpstream::asked_too_often);
        if let Some(error) = asked_too_often.filter(|_| is_to_ask) {
            return Err(error.into());
        }
        match entry.recent_failure() {
            // That is an answer, and the same for everybody.
            Some(error @ (UpstreamError::NotFound | UpstreamError::Sha256)) => Err(error.into()),
            Some(error) if upstream.http().is_none() => Err(error.into()),
            // No mirror could be made: requests can still pass through.
            Some(_) | None => Ok(Found::Cold(Cold { entry, upstream })),
        }
    }

    /// The entry of a repository, if the operator allows that, with its upstream. Counts as a use of it.
    async fn allowed_entry(
        self: &Arc<Self>,
        name: &RepoName,
    ) -> Result<(Arc<Entry>, Arc<Upstream>), PoolError> {
        let upstream = self.upstream(name.host()).await?;
        if !upstream.allows(name.path()) {
            return Err(PoolError::NotFound);
        }
        let known = self.entries().get(name).cloned();
        let entry = match known {
            Some(entry) => entry,
            None => {
                let (pool, name) = (Arc::clone(self), name.clone());
                let made = tokio::task::spawn_blocking(move || pool.entry_of(&name));
                made.await.map_err(|_| PoolError::Stopping)?
            }
        };
        if let Some(now) = entry.use_now() {
            let folder = entry.folder.clone();
            self.tasks.spawn_blocking(move || folder.touch(now));
        }
        Ok((entry, upstream))
    }

    /// The entry of a repository, made now if there was none. Looks at the disk.
    fn entry_of(&self, name: &RepoName) -> Arc<Entry> {
        let new = Arc::new(Entry::new(
            name.clone(),
            MirrorFolder::at(name.folder_below(&self.data.git())),
            self.storage.nothing(Part::Git),
            &self.at_once,
        ));
        let mut entries = self.entries();
        if entries.len() >= MOST_ENTRIES {
            // Beside one that somebody uses, another would be made, and each be fetched. And what lies on disk is counted
            // by its entry.
            entries.retain(|_, entry| {
                Arc::strong_count(entry) > 1 || entry.state().reservation.bytes() > 0
            });
        }
        Arc::clone(entries.entry(name.clone()).or_insert(new))
    }

    async fn upstream(self: &Arc<Self>, host: &str) -> Result<Arc<Upstream>, PoolError> {
        let config = self.config.borrow().clone();
        if let Some((compared, upstream)) = self.upstreams().get(host)
            && Arc::ptr_eq(compared, &config)
        {
            return Ok(Arc::clone(upstream));
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
        let new = match made.await {
            Ok(Some(Ok(new))) => new,
            Ok(Some(Err(error))) => return Err(PoolError::Upstream(format!("{host}: {error:#}"))),
            Ok(None) | Err(_) => return Err(PoolError::NotFound),
        };
        let mut made = self.upstreams();
        let current = self.config.borrow().clone();
        if !Arc::ptr_eq(&config, &current) {
            // What a newer one says is not replaced.
            return Ok(Arc::new(new));
        }
        made.retain(|host, _| config.upstream(host).is_some());
        let upstream = match made.get(host) {
            // What it has stays: its connections, who is being asked, and that it fails.
            Some((_, same)) if same.is_same(&new) => Arc::clone(same),
            _ => Arc::new(new),
        };
        made.insert(host.to_owned(), (config, Arc::clone(&upstream)));
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

fn slow() -> UpstreamError {
    UpstreamError::Failed("the upstream takes long to answer".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::environment::Environment;

    #[tokio::test]
    async fn what_somebody_uses_is_not_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::parse("{}", &Environment::default()).unwrap();
        config.data_dir = folder.path().to_owned();
        let config = watch::channel(Arc::new(config)).1;
        let pool = Pool::start(config, Arc::new(Metrics::new())).unwrap();
        let entry = |number: usize| {
            let name = RepoName::parse(&format!("git.test/team/r{number}")).unwrap();
            pool.entry_of(&name)
        };
        let used = entry(0);
        for number in 1..=MOST_ENTRIES {
            entry(number);
        }
        assert!(pool.entries().len() < MOST_ENTRIES);
        assert!(Arc::ptr_eq(&used, &entry(0)));
    }
}
