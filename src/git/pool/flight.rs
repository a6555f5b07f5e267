//! A fetch that is under way, and all who wait for it.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, watch};
use tokio::time::timeout;

use super::entry::{Entry, Failure};
use super::fetch::{self, Surroundings};
use super::{Cold, PATIENCE, Pool, PoolError, data_dir, slow};
use crate::git::refs::Refs;
use crate::git::snapshot::Snapshot;
use crate::git::upstream::{HANGS_AFTER, Progress, Upstream, UpstreamError};
use crate::ops::metrics::{FetchResult, Queue};

/// One fetch of one repository. There is never a second one for the same repository.
pub struct Flight {
    /// No mirror was there when it began.
    pub first: bool,
    pub progress: Progress,
    /// It was counted against its upstream.
    blamed: AtomicBool,
    refs_wanted: Notify,
    refs: watch::Sender<Option<Told>>,
    /// Held by whoever asks for them once more, with the time of the last such question.
    asked_again: tokio::sync::Mutex<Option<Instant>>,
    end: watch::Sender<Option<Result<Arc<Snapshot>, UpstreamError>>>,
}

/// The upstream's references.
#[derive(Clone)]
pub struct Told {
    /// When it was asked for them.
    asked: Instant,
    pub refs: Arc<Refs>,
}

impl Told {
    /// Whether they were at most `max_age` old when a client `came`.
    fn is_fresh(&self, came: Instant, max_age: Duration) -> bool {
        came.saturating_duration_since(self.asked) <= max_age
    }
}

impl Flight {
    pub fn new(first: bool) -> Arc<Self> {
        Arc::new(Self {
            first,
            progress: Progress::default(),
            blamed: AtomicBool::new(false),
            refs_wanted: Notify::new(),
            refs: watch::Sender::new(None),
            asked_again: tokio::sync::Mutex::default(),
            end: watch::Sender::new(None),
        })
    }

    /// Ends when somebody wants to know the references.
    pub(super) async fn refs_wanted(&self) {
        self.refs_wanted.notified().await;
    }

    /// The upstream told its references, when it was `asked`.
    pub(super) fn set_refs(&self, asked: Instant, refs: Refs) {
        self.refs.send_if_modified(|told| {
            let is_newer = told.as_ref().is_none_or(|told| told.asked <= asked);
            if is_newer {
                let refs = Arc::new(refs);
                *told = Some(Told { asked, refs });
            }
            is_newer
        });
    }

    pub(super) fn finish(&self, result: Result<Arc<Snapshot>, UpstreamError>) {
        self.end.send_replace(Some(result));
    }

    /// The upstream's references as it was last asked for them. They come long before the pack.
    ///
    /// # Errors
    /// Why the fetch failed.
    pub async fn told(&self) -> Result<Told, UpstreamError> {
        self.refs_wanted.notify_one();
        let mut refs = self.refs.subscribe();
        tokio::select! {
            biased;
            found = refs.wait_for(Option::is_some) => match found.ok().and_then(|found| found.clone()) {
                Some(found) => Ok(found),
                None => Err(UpstreamError::Stopped),
            },
            end = self.wait() => end.map(|snapshot| Told {
                asked: Instant::now(),
                refs: Arc::new(snapshot.refs.clone()),
            }),
        }
    }

    /// Whether it has its turn, and the upstream has told its references: whoever waits for the pack can be told how far
    /// it is.
    pub(super) fn has_begun(&self) -> bool {
        self.progress.begun.get().is_some() && self.refs.borrow().is_some()
    }

    /// Counts against the upstream, once, that it was asked and has told nothing for so long that it hangs.
    pub(super) fn blame_if_it_hangs(&self, upstream: &Upstream) {
        if let Some(asked) = self.progress.begun.get()
            && asked.elapsed() >= HANGS_AFTER
            && self.refs.borrow().is_none()
            && !self.blamed.swap(true, Ordering::Relaxed)
        {
            upstream.blame(*asked);
        }
    }

    /// The mirror as the fetch left it.
    ///
    /// # Errors
    /// Why the fetch failed.
    pub async fn wait(&self) -> Result<Arc<Snapshot>, UpstreamError> {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await;
        end.ok()
            .and_then(|end| end.clone())
            .unwrap_or(Err(UpstreamError::Stopped))
    }
}

impl Pool {
    /// The fetch of `entry` that is under way, begun now if there was none.
    pub(super) fn fly(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: Arc<Upstream>,
    ) -> Arc<Flight> {
        self.fly_from(entry, upstream, None)
    }

    /// The same from a place in the queue, which is held until the fetch has its turn.
    pub(super) fn fly_from(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: Arc<Upstream>,
        waiting: Option<OwnedSemaphorePermit>,
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
            let result = pool
                .fetch_now(&entry, Arc::clone(&upstream), &under_way, waiting)
                .await;
            if let Err(UpstreamError::Failed(_)) = &result {
                under_way.blame_if_it_hangs(&upstream);
            }
            pool.landed(&entry, &under_way, result.as_ref(), started);
            let result = result.map(|(snapshot, _)| snapshot);
            under_way.finish(result.clone());
            if let Ok(snapshot) = result {
                if under_way.first {
                    pool.more_open.notify_one();
                }
                pool.after_fetch(&entry, snapshot).await;
            }
        });
        flight
    }

    /// The references of a repository whose first clone is under way. That takes long, and what it brings is as old as its
    /// beginning: these are no older than those of a mirror would be, and what they name comes with the fetch that follows.
    ///
    /// # Errors
    /// As [`Pool::first_clone`], and why that failed; that the upstream does not tell them now, where stale ones may not be
    /// served.
    pub async fn first_refs(self: &Arc<Self>, cold: &Cold) -> Result<Arc<Refs>, PoolError> {
        let came = Instant::now();
        let flight = self.first_clone(cold)?;
        let told = flight.told().await?;
        let max_age = self.config.borrow().git.max_age;
        if told.is_fresh(came, max_age) {
            return Ok(told.refs);
        }
        let result = if !self.may_be_stale() {
            self.told_again(cold, flight, came, max_age).await
        } else if !cold.upstream.is_worth_waiting() {
            Err(slow())
        } else {
            let again = self.told_again(cold, flight, came, max_age);
            timeout(PATIENCE, again).await.unwrap_or_else(|_| {
                cold.upstream.blame(came);
                Err(slow())
            })
        };
        match result {
            Ok(told) => Ok(told.refs),
            Err(error) if self.may_be_stale() => {
                self.serves_stale(&cold.entry, &error);
                Ok(told.refs)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Asks the upstream for its references, once for all who wait for newer ones, and whoever of them goes away.
    async fn told_again(
        self: &Arc<Self>,
        cold: &Cold,
        flight: Arc<Flight>,
        came: Instant,
        max_age: Duration,
    ) -> Result<Told, UpstreamError> {
        let (pool, cold) = (Arc::clone(self), cold.clone());
        let asking = async move { pool.ask_once_more(&cold, &flight, came, max_age).await };
        let asked = self.tasks.spawn(asking).await;
        asked.unwrap_or_else(|panic| Err(panicked(&panic)))
    }

    async fn ask_once_more(
        self: &Arc<Self>,
        cold: &Cold,
        flight: &Arc<Flight>,
        came: Instant,
        max_age: Duration,
    ) -> Result<Told, UpstreamError> {
        let mut asked_again = flight.asked_again.lock().await;
        let told = flight.told().await?;
        if told.is_fresh(came, max_age) {
            return Ok(told);
        }
        if asked_again.is_some_and(|asked| asked >= came) {
            return Err(slow());
        }
        *asked_again = Some(Instant::now());
        let place = Arc::clone(&cold.upstream.fetches).acquire_owned().await;
        let place = place.map_err(|_| UpstreamError::Stopped)?;
        self.list(&cold.entry, &cold.upstream, flight, place)
            .await?;
        flight.told().await
    }

    /// Asks for the references alone, on behalf of those who wait for `flight`.
    async fn list(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: &Arc<Upstream>,
        flight: &Arc<Flight>,
        place: OwnedSemaphorePermit,
    ) -> Result<(), UpstreamError> {
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
        listed.await.unwrap_or_else(|panic| Err(panicked(&panic)))
    }

    /// Fetches when it is its turn. Returns the mirror, and whether that brought anything.
    async fn fetch_now(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        upstream: Arc<Upstream>,
        flight: &Arc<Flight>,
        waiting: Option<OwnedSemaphorePermit>,
    ) -> Result<(Arc<Snapshot>, bool), UpstreamError> {
        let queued = flight.first.then(|| self.metrics.queued(Queue::FirstClone));
        let place = tokio::select! {
            place = self.turn(entry, &upstream, flight) => place?,
            () = self.stopping.cancelled() => return Err(UpstreamError::Stopped),
        };
        // From here on nobody else changes the mirror.
        let _busy = entry.busy.lock().await;
        flight.progress.begun.get_or_init(Instant::now);
        drop((queued, waiting));
        let (first, limit) = (
            flight.first,
            self.config.borrow().limits.first_clone_timeout,
        );
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
        let too_long = tokio::select! {
            done = &mut work => return done.unwrap_or_else(|panic| Err(panicked(&panic))),
            () = self.stopping.cancelled() => false,
            () = tokio::time::sleep(limit) => true,
        };
        // The thread looks at the flag between reads, and reads have a time limit of their own.
        stop.store(true, Ordering::Relaxed);
        let result = work.await.unwrap_or_else(|panic| Err(panicked(&panic)));
        match result {
            Err(UpstreamError::Stopped) if too_long && first => Err(UpstreamError::Hopeless(
                "the first clone took longer than limits.first_clone_timeout".to_owned(),
            )),
            Err(UpstreamError::Stopped) if too_long => Err(UpstreamError::Failed(
                "the fetch took longer than limits.first_clone_timeout".to_owned(),
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
            let _queued = self.metrics.queued(Queue::Fetch);
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
        tokio::select! {
            biased;
            place = &mut turn => return place.map_err(stopped),
            listed = self.list(entry, upstream, flight, place) => listed?,
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
                let failure = if flight.first {
                    Failure::after
                } else {
                    Failure::of_mirror
                };
                state.failed = Some(failure(state.failed.as_ref(), error.clone()));
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
}

fn panicked(panic: &tokio::task::JoinError) -> UpstreamError {
    UpstreamError::Failed(format!("the work on the mirror failed: {panic}"))
}
