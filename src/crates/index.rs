//! The sparse index of one registry: fresh entries at once, older ones after one question to the registry that all
//! who wait share, and old ones when it cannot be asked.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use reqwest::StatusCode;
use reqwest::header::{
    ACCEPT_ENCODING, CONTENT_ENCODING, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, LAST_MODIFIED,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ASKED_OR_WAITING;
use super::counters::{CacheStatus, Kind};
use super::entries::Entries;
use super::entry::{Entry, MOST_BYTES, Received};
use super::name::CrateName;
use super::upstream::{NoAnswer, Trouble, Upstream, failed};
use crate::breaker::Breaker;
use crate::config::WhenUpstreamFails;

/// Who may get an old entry waits no longer than this for a new one; the question goes on.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long nobody asks again for a crate that does not exist.
const MISSING_AGE: Duration = Duration::from_secs(30);
/// How long an error is told to those who ask for the same.
const FAILED_AGE: Duration = Duration::from_millis(500);
/// Names of which something is known, before those are forgotten that nobody uses and that have no entry in memory.
const MOST_SLOTS: usize = 20_000;
/// Compressed entries that stay in memory. A build with 300 crates asks for some 3 MB.
const MOST_IN_MEMORY: usize = 24 << 20;
/// Questions to a registry at once: over HTTP/2 they share one connection.
const QUESTIONS: usize = 64;
/// Entries that are read from disk at once, for which clients wait, and as many that are written. Others use the same
/// threads.
const DISK_WORK: usize = 4;
/// Entries that wait to be written or removed, in places of [`PLACE`] bytes: 32 MiB. More are not: what is on disk then is
/// as old as the time of its file says.
const MOST_UNWRITTEN: usize = 2048;
/// Most entries are smaller.
const PLACE: usize = 16 << 10;

/// See the module. Outlives reloads of the configuration.
pub struct Index {
    entries: Arc<Entries>,
    slots: Mutex<HashMap<CrateName, Arc<Slot>>>,
    in_memory: AtomicUsize,
    clock: AtomicU64,
    pub breaker: Breaker,
    questions: Semaphore,
    asked_or_waiting: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    writes: Arc<Semaphore>,
    unwritten: Arc<Semaphore>,
    tasks: TaskTracker,
    stopping: CancellationToken,
}

#[derive(Default)]
struct Slot {
    state: Mutex<State>,
    /// Held by who reads or writes its file: one after the other, and who waited for a reader has what that one found.
    file: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    known: Known,
    /// In memory.
    entry: Option<Arc<Entry>>,
    /// When the registry last confirmed it.
    confirmed: Option<Instant>,
    /// What is on disk is older.
    unwritten: bool,
    /// Counts what was planned for its file. Of what waits for the disk, the last is what the file is to become.
    planned: u64,
    used: u64,
    flight: Option<Flight>,
}

#[derive(Default, Clone)]
enum Known {
    /// Whatever is on disk.
    #[default]
    Nothing,
    /// That nothing is on disk.
    NotHere,
    Entry,
    Missing(Instant),
    Failed(Instant, Trouble),
}

type Landed = Result<(Answer, CacheStatus), Trouble>;

/// A question that is under way.
#[derive(Clone)]
struct Flight {
    lands: Shared<BoxFuture<'static, Landed>>,
    /// It counts against the registry already: once, however many wait for it.
    blamed: Arc<AtomicBool>,
}

/// What an index says of a crate.
#[derive(Clone, Debug)]
pub enum Answer {
    Entry(Arc<Entry>),
    Missing,
}

/// Why an index says nothing of a crate.
#[derive(Debug, thiserror::Error)]
pub enum NoEntry {
    #[error("too many questions wait for the registry")]
    Busy,
    #[error(transparent)]
    Trouble(#[from] Trouble),
}

/// How fresh an answer must be.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    pub max_age: Duration,
    pub when_upstream_fails: WhenUpstreamFails,
}

impl Index {
    /// At `stopping` questions end; what `tasks` has on disk to do goes on.
    pub fn new(
        entries: Arc<Entries>,
        tasks: TaskTracker,
        stopping: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self {
            entries,
            slots: Mutex::default(),
            in_memory: AtomicUsize::new(0),
            clock: AtomicU64::new(0),
            breaker: Breaker::default(),
            questions: Semaphore::new(QUESTIONS),
            asked_or_waiting: Arc::new(Semaphore::new(ASKED_OR_WAITING)),
            reads: Arc::new(Semaphore::new(DISK_WORK)),
            writes: Arc::new(Semaphore::new(DISK_WORK)),
            unwritten: Arc::new(Semaphore::new(MOST_UNWRITTEN)),
            tasks,
            stopping,
        })
    }

    /// What the registry says of a crate, and where that came from.
    ///
    /// # Errors
    /// Why nobody knows.
    pub async fn get(
        self: &Arc<Self>,
        name: &CrateName,
        upstream: &Arc<Upstream>,
        terms: Terms,
    ) -> Result<(Answer, CacheStatus), NoEntry> {
        let found = self.find(name, upstream, terms).await;
        // Old ones as well: they are what builds use while the registry is away.
        if let Ok((Answer::Entry(_), _)) = &found {
            self.entries.use_now(name);
        }
        found
    }

    async fn find(
        self: &Arc<Self>,
        name: &CrateName,
        upstream: &Arc<Upstream>,
        terms: Terms,
    ) -> Result<(Answer, CacheStatus), NoEntry> {
        let slot = self.slot(name);
        if let Some(answer) = self.fresh(&slot, terms.max_age) {
            return Ok((answer?, CacheStatus::Hit));
        }
        // Since a restart nobody has looked whether it is on disk.
        if matches!(slot.state().known, Known::Nothing) {
            self.old(name, &slot).await;
            if let Some(answer) = self.fresh(&slot, terms.max_age) {
                return Ok((answer?, CacheStatus::Hit));
            }
        }
        let old = || slot.state().entry.clone();
        let may_be_stale = terms.when_upstream_fails == WhenUpstreamFails::ServeStale;
        let Some((flight, joined)) = self.fly(name, &slot, upstream, terms.max_age) else {
            let stale = old().filter(|_| may_be_stale).ok_or(NoEntry::Busy)?;
            return Ok((Answer::Entry(stale), CacheStatus::Stale));
        };
        let landed = match (may_be_stale, old()) {
            (true, Some(entry)) => match tokio::time::timeout(PATIENCE, flight.lands).await {
                Ok(landed) => landed,
                Err(_) => {
                    if self.blame(&flight.blamed, upstream) {
                        tracing::warn!(crate = %name, registry = upstream.host(), "the registry takes long to answer");
                    }
                    return Ok((Answer::Entry(entry), CacheStatus::Stale));
                }
            },
            _ => flight.lands.await,
        };
        match landed {
            Ok((answer, CacheStatus::Upstream)) if joined => Ok((answer, CacheStatus::Shared)),
            Ok((_, CacheStatus::Stale)) | Err(_) if !may_be_stale => match landed {
                Err(trouble) => Err(trouble.into()),
                Ok(_) => {
                    let text = format!("{} has not been answering", upstream.host());
                    Err(failed(text).into())
                }
            },
            Ok(landed) => Ok(landed),
            Err(trouble) => match old() {
                Some(entry) => Ok((Answer::Entry(entry), CacheStatus::Stale)),
                None => Err(trouble.into()),
            },
        }
    }

    fn fresh(&self, slot: &Slot, max_age: Duration) -> Option<Result<Answer, Trouble>> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let mut state = slot.state();
        match &state.known {
            Known::Missing(at) if at.elapsed() < MISSING_AGE.min(max_age) => {
                Some(Ok(Answer::Missing))
            }
            Known::Failed(at, trouble) if at.elapsed() < FAILED_AGE && state.entry.is_none() => {
                Some(Err(trouble.clone()))
            }
            Known::Entry if state.confirmed.is_some_and(|at| at.elapsed() < max_age) => {
                state.used = now;
                Some(Ok(Answer::Entry(state.entry.clone()?)))
            }
            _ => None,
        }
    }

    /// The question that is under way, or a new one, and whether somebody else has begun it. `None` where too many wait
    /// already.
    fn fly(
        self: &Arc<Self>,
        name: &CrateName,
        slot: &Arc<Slot>,
        upstream: &Arc<Upstream>,
        max_age: Duration,
    ) -> Option<(Flight, bool)> {
        let mut state = slot.state();
        if let Some(flight) = &state.flight {
            return Some((flight.clone(), true));
        }
        let place = Arc::clone(&self.asked_or_waiting)
            .try_acquire_owned()
            .ok()?;
        let (index, name, slot, upstream) = (
            Arc::clone(self),
            name.clone(),
            Arc::clone(slot),
            Arc::clone(upstream),
        );
        let blamed = Arc::<AtomicBool>::default();
        let asking = Arc::clone(&blamed);
        // In a task of its own: it goes on when the client that began it goes away.
        let task = self.tasks.spawn(async move {
            let _place = place;
            let landing = Landing(slot);
            let asked = index.ask(&name, &landing.0, &upstream, max_age, &asking);
            // By then clients are served, or cut off.
            let landed = index.stopping.run_until_cancelled(asked).await;
            landed.unwrap_or_else(|| Err(failed("the service stops, please try again".into())))
        });
        let lands = task
            .map(|joined| joined.unwrap_or_else(|error| Err(failed(format!("{error}")))))
            .boxed()
            .shared();
        let flight = Flight { lands, blamed };
        state.flight = Some(flight.clone());
        Some((flight, false))
    }

    async fn ask(
        self: &Arc<Self>,
        name: &CrateName,
        slot: &Arc<Slot>,
        upstream: &Arc<Upstream>,
        max_age: Duration,
        blamed: &AtomicBool,
    ) -> Result<(Answer, CacheStatus), Trouble> {
        let old = self.old(name, slot).await;
        if let Some(answer) = self.fresh(slot, max_age) {
            return answer.map(|answer| (answer, CacheStatus::Hit));
        }
        if let Some(entry) = &old
            && !self.breaker.allows()
        {
            return Ok((Answer::Entry(Arc::clone(entry)), CacheStatus::Stale));
        }
        let answered = {
            let _turn = upstream.counters.turn(Kind::Index, &self.questions).await;
            self.question(name, old.as_deref(), upstream).await
        };
        // The breaker is about all crates: an error that is about this one does not count.
        if matches!(answered, Err(NoAnswer::Ill(_))) {
            self.blame(blamed, upstream);
        } else if self.breaker.succeeded() {
            tracing::info!(registry = upstream.host(), "the registry answers again");
        }
        match answered.map_err(NoAnswer::trouble) {
            Ok(None) => {
                let entry = old.ok_or_else(|| failed("it confirmed what was not asked".into()))?;
                if slot.state().unwritten {
                    self.keep(name, slot, &entry);
                } else {
                    self.confirmed(name, slot, &entry);
                }
                Ok((Answer::Entry(entry), CacheStatus::Revalidated))
            }
            Ok(Some(entry)) => {
                let entry = Arc::new(entry);
                self.keep(name, slot, &entry);
                Ok((Answer::Entry(entry), CacheStatus::Upstream))
            }
            Err(Trouble::NotFound) => {
                self.missing(name, slot, old.is_some());
                Ok((Answer::Missing, CacheStatus::Upstream))
            }
            Err(trouble) => {
                tracing::warn!(
                    crate = %name, registry = upstream.host(), error = %trouble, "an index entry cannot be fetched"
                );
                slot.state().known = match old {
                    Some(_) => Known::Entry,
                    None => Known::Failed(Instant::now(), trouble.clone()),
                };
                Err(trouble)
            }
        }
    }

    /// `None` when the registry confirms `old`.
    async fn question(
        &self,
        name: &CrateName,
        old: Option<&Entry>,
        upstream: &Upstream,
    ) -> Result<Option<Entry>, NoAnswer> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("gzip"));
        let meta = old.map(|entry| &entry.meta);
        let condition = match meta {
            Some(meta) if meta.etag_is_theirs => Some((IF_NONE_MATCH, &meta.etag)),
            Some(meta) => meta
                .last_modified
                .as_ref()
                .map(|at| (IF_MODIFIED_SINCE, at)),
            None => None,
        };
        if let Some((header, value)) = condition
            && let Ok(value) = HeaderValue::from_str(value)
        {
            headers.insert(header, value);
        }
        let response = upstream.index(&name.index_path(), headers).await?;
        if response.status() == StatusCode::NOT_MODIFIED {
            return Ok(None);
        }
        let text = |header: HeaderName| {
            let value = response.headers().get(header)?.to_str().ok()?;
            (value.len() <= 1024).then(|| value.to_owned())
        };
        let encoding = text(CONTENT_ENCODING);
        let received = Received {
            etag: text(ETAG),
            last_modified: text(LAST_MODIFIED),
            is_packed: matches!(encoding.as_deref(), Some("gzip" | "x-gzip")),
        };
        let body = upstream.whole(response, MOST_BYTES).await?;
        let crate_name = name.clone();
        let host = upstream.host();
        let checked = tokio::task::spawn_blocking(move || {
            Entry::receive(crate_name.as_str(), received, body)
        });
        let why = match checked.await {
            Ok(Ok(entry)) => return Ok(Some(entry)),
            Ok(Err(found)) => format!("{host}: {found}"),
            Err(error) => format!("{error}"),
        };
        Err(NoAnswer::OfThis(failed(why)))
    }

    /// What is here already, from memory or from disk.
    async fn old(&self, name: &CrateName, slot: &Arc<Slot>) -> Option<Arc<Entry>> {
        if let Some(entry) = slot.state().entry.clone() {
            return Some(entry);
        }
        let _file = slot.file.lock().await;
        {
            let state = slot.state();
            if state.entry.is_some() || matches!(state.known, Known::NotHere) {
                return state.entry.clone();
            }
        }
        let asked = name.clone();
        let turn = Arc::clone(&self.reads).acquire_owned().await;
        let read = self.on_disk(turn.ok(), move |entries| entries.read(&asked));
        let Some((entry, confirmed)) = read.await? else {
            let mut state = slot.state();
            if matches!(state.known, Known::Nothing) {
                state.known = Known::NotHere;
            }
            return None;
        };
        let age = confirmed.elapsed().unwrap_or_default();
        let entry = Arc::new(entry);
        self.remember(slot, &entry, Instant::now().checked_sub(age));
        Some(entry)
    }

    fn keep(self: &Arc<Self>, name: &CrateName, slot: &Arc<Slot>, entry: &Arc<Entry>) {
        self.remember(slot, entry, Some(Instant::now()));
        slot.state().unwritten = true;
        let (name, entry, written) = (name.clone(), Arc::clone(entry), Arc::clone(slot));
        let size = entry.packed.len();
        self.later(slot, size, move |entries| {
            written.write(entries, &name, &entry);
        });
    }

    /// Work on the file of a slot, for which nobody waits and which holds so many bytes. It takes the place of what still
    /// waits for the disk.
    fn later(
        self: &Arc<Self>,
        slot: &Arc<Slot>,
        size: usize,
        work: impl FnOnce(&Entries) + Send + 'static,
    ) {
        let places = size.div_ceil(PLACE).max(1) as u32;
        let Ok(place) = Arc::clone(&self.unwritten).try_acquire_many_owned(places) else {
            tracing::debug!(
                "too many index entries wait for the disk: what is there of one stays as it is"
            );
            return;
        };
        let (index, slot) = (Arc::clone(self), Arc::clone(slot));
        let number = {
            let mut state = slot.state();
            state.planned += 1;
            state.planned
        };
        self.tasks.spawn(async move {
            let _place = place;
            // First, as it may take long: who reads the file would wait for it as well.
            let turn = Arc::clone(&index.writes).acquire_owned().await;
            let _file = slot.file.lock().await;
            if slot.state().planned == number {
                index.on_disk(turn.ok(), work).await;
            }
        });
    }

    /// Work that blocks on the disk, in its turn. `None` where it failed.
    async fn on_disk<T: Send + 'static>(
        &self,
        turn: Option<OwnedSemaphorePermit>,
        work: impl FnOnce(&Entries) -> T + Send + 'static,
    ) -> Option<T> {
        let entries = Arc::clone(&self.entries);
        let done = tokio::task::spawn_blocking(move || {
            // Until the disk has answered, whether or not somebody still waits for it.
            let _turn = turn;
            work(&entries)
        });
        done.await.ok()
    }

    fn remember(&self, slot: &Slot, entry: &Arc<Entry>, confirmed: Option<Instant>) {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        // First, as others may let go of it at once.
        self.in_memory
            .fetch_add(entry.packed.len(), Ordering::Relaxed);
        let before = {
            let mut state = slot.state();
            state.known = Known::Entry;
            state.confirmed = confirmed;
            state.unwritten = false;
            state.used = now;
            state.entry.replace(Arc::clone(entry))
        };
        let freed = before.map_or(0, |entry| entry.packed.len());
        self.in_memory.fetch_sub(freed, Ordering::Relaxed);
        if self.in_memory.load(Ordering::Relaxed) > MOST_IN_MEMORY {
            self.forget_some();
        }
    }

    /// Lets go of entries in memory, those first that were not used for longest.
    fn forget_some(&self) {
        let mut slots: Vec<_> = self.slots().values().cloned().collect();
        slots.sort_by_cached_key(|slot| slot.state().used);
        for slot in slots {
            if self.in_memory.load(Ordering::Relaxed) <= MOST_IN_MEMORY / 4 * 3 {
                return;
            }
            let mut state = slot.state();
            if let Some(entry) = state.entry.take() {
                self.in_memory
                    .fetch_sub(entry.packed.len(), Ordering::Relaxed);
                state.known = Known::Nothing;
            }
        }
    }

    fn confirmed(self: &Arc<Self>, name: &CrateName, slot: &Arc<Slot>, entry: &Arc<Entry>) {
        {
            let mut state = slot.state();
            state.known = Known::Entry;
            state.confirmed = Some(Instant::now());
        }
        let (name, entry, written) = (name.clone(), Arc::clone(entry), Arc::clone(slot));
        self.later(slot, entry.packed.len(), move |entries| {
            // It stays in memory for longer than on a full disk.
            if !entries.confirm(&name) {
                written.write(entries, &name, &entry);
            }
        });
    }

    fn missing(self: &Arc<Self>, name: &CrateName, slot: &Arc<Slot>, was_there: bool) {
        {
            let mut state = slot.state();
            state.known = Known::Missing(Instant::now());
            if let Some(entry) = state.entry.take() {
                self.in_memory
                    .fetch_sub(entry.packed.len(), Ordering::Relaxed);
            }
        }
        if was_there {
            let name = name.clone();
            self.later(slot, 0, move |entries| {
                entries.remove(&name);
            });
        }
    }

    /// Counts a question against the registry. Returns whether that had not been done yet.
    fn blame(&self, blamed: &AtomicBool, upstream: &Upstream) -> bool {
        if blamed.swap(true, Ordering::Relaxed) {
            return false;
        }
        if self.breaker.failed() {
            tracing::error!(
                registry = upstream.host(),
                "the registry fails again and again: what is here is served without asking it for a while"
            );
        }
        true
    }

    fn slot(&self, name: &CrateName) -> Arc<Slot> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get(name) {
            return Arc::clone(slot);
        }
        // SECURITY: whoever asks for names that nobody has fills no memory. Of what stays, ASKED_OR_WAITING bounds the
        // flights, the connections bound those who ask, and MOST_IN_MEMORY the entries.
        if slots.len() >= MOST_SLOTS {
            // An entry that comes into one that is not here would never be let go of.
            slots.retain(|_, slot| Arc::strong_count(slot) > 1 || slot.state().entry.is_some());
        }
        let slot = Arc::<Slot>::default();
        slots.insert(name.clone(), Arc::clone(&slot));
        slot
    }

    fn slots(&self) -> MutexGuard<'_, HashMap<CrateName, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who asks from now on asks anew.
struct Landing(Arc<Slot>);

impl Drop for Landing {
    fn drop(&mut self) {
        self.0.state().flight = None;
    }
}

impl Slot {
    /// Blocks on the disk.
    fn write(&self, entries: &Entries, name: &CrateName, entry: &Arc<Entry>) {
        match entries.write(name, entry) {
            Ok(()) => {
                let mut state = self.state();
                let now = state.entry.as_ref();
                state.unwritten &= now.is_some_and(|now| !Arc::ptr_eq(now, entry));
            }
            Err(error) => {
                tracing::warn!(crate = %name, %error, "an index entry cannot be kept on disk");
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::path::Path;
    use std::process::Command;
    use std::sync::mpsc;

    use super::*;
    use crate::storage::Storage;

    fn index_in(folder: &Path) -> Arc<Index> {
        let entries = Entries::open(folder.join("x"), &Storage::new(1 << 20)).unwrap();
        Index::new(entries, TaskTracker::new(), CancellationToken::new())
    }

    fn name(text: &str) -> CrateName {
        CrateName::parse(text).unwrap()
    }

    fn entry(name: &str) -> Entry {
        let text = format!("{{\"name\":\"{name}\",\"vers\":\"1.0.0\",\"cksum\":\"ab\"}}\n");
        Entry::receive(name, Received::default(), text.into()).unwrap()
    }

    #[test]
    fn what_somebody_uses_is_not_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let index = index_in(folder.path());
        let name = |number: usize| CrateName::parse(&format!("name{number}")).unwrap();
        let used = index.slot(&name(0));
        for number in 1..=MOST_SLOTS {
            index.slot(&name(number));
        }
        assert_eq!(index.slots().len(), 2, "it and the last one");
        // As what is read from disk meanwhile.
        index.remember(&used, &Arc::new(entry("name0")), Some(Instant::now()));
        let slots = index.slots();
        let entries = slots.values().filter_map(|slot| slot.state().entry.clone());
        let in_slots: usize = entries.map(|entry| entry.packed.len()).sum();
        assert!(in_slots > 0);
        assert_eq!(index.in_memory.load(Ordering::Relaxed), in_slots);
    }

    /// A crate that is published later is found soon, whatever `crates.max_age` is.
    #[test]
    fn that_there_is_none_is_remembered_for_a_moment() {
        let folder = tempfile::tempdir().unwrap();
        let index = index_in(folder.path());
        let (missing, hour) = (name("leaf"), Duration::from_secs(3600));
        let slot = index.slot(&missing);
        let is_known = |age: Duration, max_age: Duration| {
            let when = Instant::now().checked_sub(age).unwrap();
            slot.state().known = Known::Missing(when);
            matches!(index.fresh(&slot, max_age), Some(Ok(Answer::Missing)))
        };
        assert!(is_known(MISSING_AGE / 2, hour));
        assert!(!is_known(MISSING_AGE, hour));
        assert!(!is_known(MISSING_AGE / 2, MISSING_AGE / 2));
    }

    /// A pipe in place of a file, as of a disk that is slow: who reads it waits, and the content goes to one reader when
    /// somebody takes its other end from the channel.
    fn slow_file(folder: &Path, name: &CrateName, began: mpsc::Sender<(File, Vec<u8>)>) {
        let path = folder.join("x").join(name.index_path());
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let made = Command::new("mkfifo").arg(&path).status().unwrap();
        assert!(made.success());
        let content = entry(name.as_str()).to_file();
        // Opened when somebody reads.
        std::thread::spawn(move || {
            let pipe = File::options().write(true).open(path).unwrap();
            began.send((pipe, content))
        });
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_reads_for_all_and_few_at_once() {
        const NAMES: usize = 3 * DISK_WORK;
        let folder = tempfile::tempdir().unwrap();
        let index = index_in(folder.path());
        let (began, reads) = mpsc::channel();
        let mut asking = Vec::new();
        for number in 0..NAMES {
            let name = name(&format!("name{number}"));
            slow_file(folder.path(), &name, began.clone());
            for _ in 0..5 {
                let (index, name) = (Arc::clone(&index), name.clone());
                asking.push(tokio::spawn(async move {
                    index.old(&name, &index.slot(&name)).await
                }));
            }
        }
        let mut read = 0;
        while read < NAMES {
            // As many as ever will have begun by then.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let begun: Vec<_> = reads.try_iter().collect();
            assert!(begun.len() <= DISK_WORK, "{} at once", begun.len());
            read += begun.len();
            for (mut pipe, content) in begun {
                pipe.write_all(&content).unwrap();
            }
        }
        for asked in asking {
            assert!(asked.await.unwrap().is_some());
        }
    }

    #[tokio::test]
    async fn what_is_written_has_its_turn() {
        let folder = tempfile::tempdir().unwrap();
        let index = index_in(folder.path());
        let all_turns = index.writes.acquire_many(DISK_WORK as u32).await.unwrap();
        let (new, path) = (name("leaf"), folder.path().join("x/le/af/leaf"));
        index.keep(&new, &index.slot(&new), &Arc::new(entry("leaf")));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!path.exists());
        drop(all_turns);
        index.tasks.close();
        index.tasks.wait().await;
        assert!(path.exists());
    }

    /// Else an older entry could be written over a newer one.
    #[tokio::test(flavor = "multi_thread")]
    async fn what_waits_for_the_disk_gives_way_to_what_is_newer() {
        let folder = tempfile::tempdir().unwrap();
        let index = index_in(folder.path());
        let all_turns = index.writes.acquire_many(DISK_WORK as u32).await.unwrap();
        let slot = index.slot(&name("leaf"));
        let (sender, done) = mpsc::channel();
        for number in 0..20 {
            let sender = sender.clone();
            index.later(&slot, 0, move |_| sender.send(number).unwrap());
        }
        drop(all_turns);
        index.tasks.close();
        index.tasks.wait().await;
        assert_eq!(done.try_iter().collect::<Vec<_>>(), [19]);
    }

    /// It was not used for longest, was evicted, and is used again while it is in memory.
    #[tokio::test]
    async fn what_was_evicted_and_is_confirmed_is_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let index = index_in(folder.path());
        let (leaf, kept) = (name("leaf"), Arc::new(entry("leaf")));
        let path = folder.path().join("x/le/af/leaf");
        let slot = index.slot(&leaf);
        index.remember(&slot, &kept, Some(Instant::now()));
        index.confirmed(&leaf, &slot, &kept);
        index.tasks.close();
        index.tasks.wait().await;
        assert!(path.exists());
    }
}
