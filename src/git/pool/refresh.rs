//! The pool's background: loading what is on disk, keeping `git.warm` fresh, and the fetches themselves.

use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::OwnedSemaphorePermit;

use super::entry::{Entry, Failure};
use super::fetch::{self, Surroundings};
use super::flight::Flight;
use super::{Pool, PoolError, data_dir};
use crate::config;
use crate::git::name::RepoName;
use crate::git::objects::ObjectError;
use crate::git::snapshot::Snapshot;
use crate::git::upstream::{Upstream, UpstreamError};
use crate::ops::metrics::{FetchResult, Queue};
use crate::storage::Part;

/// A mirror that nobody asked for this long is closed.
const IDLE: Duration = Duration::from_secs(3600);

impl Pool {
    /// Runs until the pool is stopped.
    pub(super) async fn run(self: Arc<Self>) {
        let loading = Arc::clone(&self);
        if tokio::task::spawn_blocking(move || loading.load())
            .await
            .is_err()
        {
            tracing::error!("loading the mirrors failed");
        }
        self.loaded.store(true, Ordering::Relaxed);
        let mut config = self.config.clone();
        loop {
            let current = config.borrow_and_update().clone();
            if current.storage.max_size != self.storage.limit() {
                self.storage.set_limit(current.storage.max_size);
                for entry in self.entries().values() {
                    entry.state().failed.take_if(|failed| failed.is_for_room());
                }
                let storage = Arc::clone(&self.storage);
                self.tasks.spawn_blocking(move || storage.make_room());
            }
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.keep_all_warm(&current.git) => {}
                changed = config.changed() => if changed.is_err() {
                    return;
                }
            }
        }
    }

    /// Refreshes each warm repository when it is due, for ever.
    async fn keep_all_warm(self: &Arc<Self>, git: &config::Git) {
        let mut due = vec![Instant::now(); git.warm.len()];
        loop {
            for (name, due) in git.warm.iter().zip(&mut due) {
                if *due <= Instant::now() {
                    let looked = self.keep_warm(name, git.refresh).await;
                    *due = looked.unwrap_or_else(|error| {
                        tracing::error!(repo = %name, %error, "cannot be kept warm");
                        Instant::now() + git.refresh
                    });
                }
            }
            let Some(next) = due.iter().min() else {
                return std::future::pending().await;
            };
            tokio::time::sleep_until((*next).into()).await;
        }
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

    /// Finds the mirrors on disk. They are opened when they are first needed.
    fn load(self: &Arc<Self>) {
        let root = self.data.git();
        let mut found = Vec::new();
        find_mirrors(&root, &root, &mut found);
        for name in found {
            let entry = self.entry_of(&name);
            let bytes = entry.folder.bytes();
            entry.state().reservation = self.storage.count(Part::Git, bytes);
        }
        self.storage.make_room();
    }

    /// Refreshes a mirror unless its upstream was asked within `refresh`. Returns when to look at it again: the question
    /// may come later than the decision to ask, and others ask as well.
    async fn keep_warm(
        self: &Arc<Self>,
        name: &RepoName,
        refresh: Duration,
    ) -> Result<Instant, PoolError> {
        let (entry, upstream) = self.entry(name).await?;
        self.opened(&entry).await?;
        let now = Instant::now();
        let (fresh, paused) = {
            let state = entry.state();
            let paused = state.failed.as_ref().is_some_and(Failure::is_recent);
            (state.fresh, paused)
        };
        if let Some(due) = fresh.map(|fresh| fresh + refresh)
            && due > now
        {
            return Ok(due);
        }
        if !paused {
            self.fly(&entry, upstream);
        }
        Ok(now + refresh)
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

    /// The fetch of `entry` that is under way, begun now if there was none.
    pub(super) fn fly(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: Arc<Upstream>,
    ) -> Arc<Flight> {
        let flight = {
            let mut state = entry.state();
            if let Some(flight) = &state.flight {
                return Arc::clone(flight);
            }
            let flight = Flight::new(state.snapshot.is_none());
            state.flight = Some(Arc::clone(&flight));
            flight
        };
        let (pool, entry, under_way) = (Arc::clone(self), Arc::clone(entry), Arc::clone(&flight));
        self.tasks.spawn(async move {
            let started = Instant::now();
            let result = pool.fetch_now(&entry, upstream, &under_way).await;
            pool.landed(&entry, &under_way, result.as_ref(), started);
            let result = result.map(|(snapshot, _)| snapshot);
            under_way.finish(result.clone());
            if let Ok(snapshot) = result {
                pool.after_fetch(&entry, snapshot).await;
            }
        });
        flight
    }

    /// Fetches when it is its turn. Returns the mirror, and whether that brought anything.
    async fn fetch_now(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: Arc<Upstream>,
        flight: &Arc<Flight>,
    ) -> Result<(Arc<Snapshot>, bool), UpstreamError> {
        let queued = flight.first.then(|| {
            (
                self.metrics.queued(Queue::FirstClone),
                Waiting::new(&self.waiting_clones),
            )
        });
        let place = tokio::select! {
            place = self.turn(entry, &upstream, flight) => place?,
            () = self.stopping.cancelled() => return Err(UpstreamError::Stopped),
        };
        // From here on nobody else changes the mirror.
        let _busy = entry.busy.lock().await;
        flight.progress.begun.store(true, Ordering::Relaxed);
        drop(queued);
        let limit = flight
            .first
            .then(|| self.config.borrow().limits.first_clone_timeout);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let keep_unreachable = self.config.borrow().git.keep_unreachable;
        let (pool, entry, flight) = (Arc::clone(self), Arc::clone(entry), Arc::clone(flight));
        let mut work = tokio::task::spawn_blocking(move || {
            let _place = place;
            let scratch = pool.scratch();
            let made = std::fs::create_dir_all(&scratch);
            let around = Surroundings {
                upstream: &upstream,
                storage: &pool.storage,
                scratch: &scratch,
                keep_unreachable,
                stop: &stopped,
            };
            let before = entry.snapshot();
            let result = made
                .map_err(UpstreamError::unwritable)
                .and_then(|()| fetch::fetch(&entry, before.clone(), &flight, &around));
            data_dir::remove(&scratch);
            result.map(|now| {
                let is_new = before.is_none_or(|before| !Arc::ptr_eq(&before, &now));
                (now, is_new)
            })
        });
        let limit = async {
            match limit {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        let too_long = tokio::select! {
            done = &mut work => return done.unwrap_or_else(|panic| Err(panicked(&panic))),
            () = self.stopping.cancelled() => false,
            () = limit => true,
        };
        // The thread looks at the flag between reads, and reads have a time limit of their own.
        stop.store(true, Ordering::Relaxed);
        let result = work.await.unwrap_or_else(|panic| Err(panicked(&panic)));
        match result {
            Err(UpstreamError::Stopped) if too_long => Err(UpstreamError::Hopeless(
                "the first clone took longer than limits.first_clone_timeout".to_owned(),
            )),
            other => other,
        }
    }

    /// Waits for a place. Others may hold those of first clones for many minutes: who wants to know the references is told
    /// them meanwhile, since clients give up where nothing comes.
    async fn turn(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: &Arc<Upstream>,
        flight: &Arc<Flight>,
    ) -> Result<OwnedSemaphorePermit, UpstreamError> {
        let stopped = |_| UpstreamError::Stopped;
        let fetches = Arc::clone(&upstream.fetches).acquire_owned();
        if !flight.first {
            return fetches.await.map_err(stopped);
        }
        let mut turn = pin!(Arc::clone(&self.first_clones).acquire_owned());
        let wanted = async {
            flight.refs_wanted().await;
            fetches.await
        };
        let place = tokio::select! {
            biased;
            place = &mut turn => return place.map_err(stopped),
            place = wanted => place.map_err(stopped)?,
        };
        let (pool, entry, upstream, flight) = (
            Arc::clone(self),
            Arc::clone(entry),
            Arc::clone(upstream),
            Arc::clone(flight),
        );
        let listed = tokio::task::spawn_blocking(move || {
            let _place = place;
            fetch::list(&entry, &flight, &upstream, &pool.stop)
        });
        tokio::select! {
            biased;
            place = &mut turn => return place.map_err(stopped),
            listed = listed => listed.unwrap_or_else(|panic| Err(panicked(&panic)))?,
        }
        turn.await.map_err(stopped)
    }

    /// Notes how the fetch ended.
    fn landed(
        &self,
        entry: &Entry,
        flight: &Flight,
        result: Result<&(Arc<Snapshot>, bool), &UpstreamError>,
        started: Instant,
    ) {
        let elapsed = started.elapsed();
        let elapsed_ms = elapsed.as_millis() as u64;
        let mut state = entry.state();
        state.flight = None;
        let counted = match result {
            Ok((_, is_new)) => {
                state.failed = None;
                let bytes = flight.progress.bytes.load(Ordering::Relaxed);
                if *is_new {
                    tracing::info!(repo = %entry.name, bytes, elapsed_ms, first = flight.first, "fetched");
                    FetchResult::Ok
                } else {
                    tracing::debug!(repo = %entry.name, elapsed_ms, "nothing new");
                    FetchResult::Unchanged
                }
            }
            Err(error) => {
                match error {
                    UpstreamError::Stopped | UpstreamError::NotFound => {
                        tracing::info!(repo = %entry.name, elapsed_ms, %error, "not fetched");
                    }
                    _ => {
                        tracing::warn!(repo = %entry.name, upstream.host = entry.name.host(), elapsed_ms, %error, "fetch failed")
                    }
                }
                state.failed = Some(Failure::after(state.failed.as_ref(), error.clone()));
                FetchResult::Failed
            }
        };
        drop(state);
        self.metrics.fetch(counted, elapsed);
    }

    /// Prepares answers for warm repositories and consolidates packs where that is due.
    async fn after_fetch(self: &Arc<Self>, entry: &Arc<Entry>, snapshot: Arc<Snapshot>) {
        self.prepare_if_warm(entry, &snapshot).await;
        drop(snapshot);
        if let Some(snapshot) = self.maintain(entry).await {
            self.prepare_if_warm(entry, &snapshot).await;
        }
    }

    async fn prepare_if_warm(self: &Arc<Self>, entry: &Arc<Entry>, snapshot: &Arc<Snapshot>) {
        let warm = self.config.borrow().git.warm.contains(&entry.name);
        if warm {
            self.prepare(entry, snapshot).await;
        }
    }
}

/// What an error says of the files, rather than of the machine.
fn is_damage(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | InvalidData | UnexpectedEof)
}

/// One first clone that waits for its place.
struct Waiting<'p>(&'p AtomicUsize);

impl<'p> Waiting<'p> {
    fn new(count: &'p AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn panicked(panic: &tokio::task::JoinError) -> UpstreamError {
    UpstreamError::Failed(format!("the work on the mirror failed: {panic}"))
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
