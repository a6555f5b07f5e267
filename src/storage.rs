//! The limit on disk space: whoever writes reserves first, and what was not used for longest goes.

use std::cell::Cell;
use std::error::Error;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use tokio::sync::Notify;

/// What the space is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Git,
    Answers,
    Blobs,
    /// Entries of crates' indexes.
    Index,
}

impl Part {
    pub const ALL: [Self; 4] = [Self::Git, Self::Answers, Self::Blobs, Self::Index];

    pub fn name(self) -> &'static str {
        match self {
            Self::Git => "git",
            Self::Answers => "answers",
            Self::Blobs => "blobs",
            Self::Index => "index",
        }
    }
}

/// There is no room to write something.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StorageFull {
    /// Nothing more could be evicted.
    #[error(
        "storage.max_size is reached: {wanted} bytes are wanted and {used} of {limit} are used by what is in use or kept warm; \
         raise storage.max_size or shorten git.warm"
    )]
    Limit { wanted: u64, used: u64, limit: u64 },
    /// Others write to the same disk, or the limit is larger than it.
    #[error(
        "the disk of data_dir is full, below storage.max_size: make room on it or lower storage.max_size"
    )]
    Disk,
}

impl StorageFull {
    /// Whether an error comes from a lack of room, wherever in its causes that stands.
    pub fn of(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        let mut found = None;
        while let Some(current) = cause {
            if let Some(full) = current.downcast_ref::<Self>() {
                return Some(full.clone());
            }
            cause = match current.downcast_ref::<io::Error>() {
                Some(error) => {
                    if let io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded = error.kind()
                    {
                        found = Some(Self::Disk);
                    }
                    // The source is that of the error that it wraps, not that error.
                    error.get_ref().map(|wrapped| wrapped as _)
                }
                None => current.source(),
            };
        }
        found
    }
}

impl From<StorageFull> for io::Error {
    fn from(full: StorageFull) -> Self {
        Self::new(io::ErrorKind::StorageFull, full)
    }
}

/// Something that can give space back.
pub trait Evict: Send + Sync {
    /// Frees about `bytes`, least recently used first. Blocks on the disk. What it frees is given back before it
    /// returns, and by the same thread: otherwise it counts as having nothing to give.
    fn evict(&self, bytes: u64);

    /// When what would go first was last used. `None` for what is of no use, or cheap to make again: it goes before all else.
    fn oldest(&self) -> Option<SystemTime> {
        None
    }
}

/// Space below one limit. Reservations never pass it; files are counted until nobody has them open any more.
pub struct Storage {
    limit: AtomicU64,
    used: [AtomicU64; Part::ALL.len()],
    /// The sum of `used`: one number, so that it can be compared with the limit and exchanged in one step.
    in_all: AtomicU64,
    evictors: Mutex<Vec<Weak<dyn Evict>>>,
    /// Held while something is evicted: two who evict for the same lack would evict twice as much.
    evicting: Mutex<()>,
    /// Held while waiting for `evicting`.
    next: Mutex<()>,
    /// Somebody had to evict to write.
    crowded: Notify,
}

/// Evicting goes on to this share of the limit, so that not every write has to evict.
const EVICT_TO_PERCENT: u64 = 80;

/// What is asked of one evictor before it is looked again which has the oldest: this part of the limit within these bounds.
/// An evictor looks through all that it has each time; and what is asked of it at once may be younger than what another has.
const SLICES_OF_LIMIT: u64 = 200;
const SMALLEST_SLICE: u64 = 64 << 20;
const LARGEST_SLICE: u64 = 1 << 30;

thread_local! {
    /// Bytes that this thread gave back since it began. So it is known what an evictor gave, whatever others take and
    /// give back meanwhile.
    static GIVEN_BACK: Cell<u64> = const { Cell::new(0) };
}

impl Storage {
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit: limit.into(),
            used: Default::default(),
            in_all: AtomicU64::new(0),
            evictors: Mutex::default(),
            evicting: Mutex::default(),
            next: Mutex::default(),
            crowded: Notify::new(),
        })
    }

    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// A new limit holds for what is reserved from now on.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Bytes that `part` uses.
    pub fn used(&self, part: Part) -> u64 {
        self.used[part as usize].load(Ordering::Relaxed)
    }

    fn full(&self, wanted: u64) -> StorageFull {
        StorageFull::Limit {
            wanted,
            used: self.used_in_all(),
            limit: self.limit(),
        }
    }

    pub fn used_in_all(&self) -> u64 {
        self.in_all.load(Ordering::Acquire)
    }

    pub fn add_evictor(&self, evictor: Weak<dyn Evict>) {
        lock(&self.evictors).push(evictor);
    }

    /// Space that is used already, whatever the limit: what lies on disk at start.
    pub fn count(self: &Arc<Self>, part: Part, bytes: u64) -> Reservation {
        self.add(part, bytes);
        Reservation {
            storage: Arc::clone(self),
            part,
            bytes,
        }
    }

    /// An empty reservation, to be grown.
    pub fn nothing(self: &Arc<Self>, part: Part) -> Reservation {
        self.count(part, 0)
    }

    /// Evicts down to the usual share when more than the limit is used. Blocks on the disk.
    pub fn make_room(&self) {
        if self.used_in_all() > self.limit() {
            self.evict_down_to(self.usual_share());
        }
    }

    /// Evicts down to the usual share in the background, each time that a writer met the limit: writers themselves
    /// only wait until there is room for what they write. Never ends.
    pub async fn keep_room(self: Arc<Self>) {
        loop {
            self.crowded.notified().await;
            let storage = Arc::clone(&self);
            let evicting = tokio::task::spawn_blocking(move || {
                storage.evict_down_to(storage.usual_share());
            });
            if let Err(error) = evicting.await {
                tracing::error!(%error, "evicting failed");
            }
        }
    }

    fn usual_share(&self) -> u64 {
        self.limit() / 100 * EVICT_TO_PERCENT
    }

    fn add(&self, part: Part, bytes: u64) {
        self.used[part as usize].fetch_add(bytes, Ordering::Relaxed);
        self.in_all.fetch_add(bytes, Ordering::Release);
    }

    fn give_back(&self, part: Part, bytes: u64) {
        self.used[part as usize].fetch_sub(bytes, Ordering::Relaxed);
        self.in_all.fetch_sub(bytes, Ordering::Release);
        GIVEN_BACK.set(GIVEN_BACK.get() + bytes);
    }

    /// Takes all or nothing, and nobody sees an attempt that fails.
    ///
    /// # Errors
    /// How many bytes are missing, at least one.
    fn try_take(&self, part: Part, bytes: u64) -> Result<(), u64> {
        let mut used = self.used_in_all();
        loop {
            let limit = self.limit();
            let after = used.saturating_add(bytes);
            if after > limit {
                return Err(after - limit);
            }
            let exchanged =
                self.in_all
                    .compare_exchange_weak(used, after, Ordering::AcqRel, Ordering::Acquire);
            match exchanged {
                Ok(_) => break,
                Err(now) => used = now,
            }
        }
        self.used[part as usize].fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    fn evict_down_to(&self, target: u64) {
        self.evict_until(false, || match self.used_in_all().saturating_sub(target) {
            0 => Ok(()),
            excess => Err(excess),
        });
    }

    /// Evicts for as long as `enough` says how many bytes are missing and somebody gives some; returns whether it was
    /// enough in the end.
    /// What is cheap to make again goes first, then what was not used for longest, whichever part it is of.
    /// With `again`, what others finished meanwhile goes as well where all else was not enough.
    fn evict_until(&self, again: bool, enough: impl Fn() -> Result<(), u64>) -> bool {
        let mut evictors = self.evictors();
        let mut some_given = false;
        loop {
            let _turn = self.turn();
            // Only now: whoever had the turn before may have made room.
            let Err(missing) = enough() else {
                return true;
            };
            let ages = evictors
                .iter()
                .enumerate()
                .map(|(at, evictor)| (evictor.oldest(), at));
            let Some((_, at)) = ages.min() else {
                if !(some_given && again) {
                    return false;
                }
                // Others took what was given, and what they have finished since can be evicted as well.
                some_given = false;
                evictors = self.evictors();
                continue;
            };
            let before = GIVEN_BACK.get();
            let slice = (self.limit() / SLICES_OF_LIMIT).clamp(SMALLEST_SLICE, LARGEST_SLICE);
            evictors[at].evict(missing.min(slice));
            let given = GIVEN_BACK.get() > before;
            some_given |= given;
            if !given {
                evictors.remove(at);
            }
        }
    }

    fn evictors(&self) -> Vec<Arc<dyn Evict>> {
        let evictors = lock(&self.evictors);
        evictors.iter().filter_map(Weak::upgrade).collect()
    }

    /// Waits until nobody else evicts. Whoever waits first is the next, even when the one that has the turn wants it
    /// again at once: a writer waits for one slice of what is evicted in the background, not for all of it.
    fn turn(&self) -> MutexGuard<'_, ()> {
        let _next = lock(&self.next);
        lock(&self.evicting)
    }
}

/// A panic leaves nothing half changed behind these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Space that is taken until this is dropped.
pub struct Reservation {
    storage: Arc<Storage>,
    part: Part,
    bytes: u64,
}

impl Reservation {
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Takes `more` bytes. Blocks on the disk when something has to be evicted.
    ///
    /// # Errors
    /// [`StorageFull`] when evicting did not make room.
    pub fn grow(&mut self, more: u64) -> Result<(), StorageFull> {
        let storage = &self.storage;
        if storage.try_take(self.part, more).is_err() {
            // What can never fit is no reason to throw all else away.
            let taken = more <= storage.limit()
                && storage.evict_until(true, || storage.try_take(self.part, more));
            storage.crowded.notify_one();
            if !taken {
                return Err(storage.full(more));
            }
        }
        self.bytes += more;
        Ok(())
    }

    /// Whether `more` bytes could be taken while `others` stay, if all else were evicted.
    ///
    /// # Errors
    /// [`StorageFull`] when they could not.
    pub fn can_grow(&self, more: u64, others: u64) -> Result<(), StorageFull> {
        if others.saturating_add(more) <= self.storage.limit() {
            Ok(())
        } else {
            Err(self.storage.full(more))
        }
    }

    /// Takes over what `other` has: at no moment is it counted twice or not at all.
    pub fn absorb(&mut self, mut other: Self) {
        debug_assert_eq!(self.part, other.part, "space is not moved between parts");
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// A part of it, for something that goes at another time.
    pub fn split(&mut self, bytes: u64) -> Self {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        Self {
            storage: Arc::clone(&self.storage),
            part: self.part,
            bytes,
        }
    }

    /// Gives back what is above `bytes`, or counts what is below.
    pub fn set(&mut self, bytes: u64) {
        if bytes > self.bytes {
            self.storage.add(self.part, bytes - self.bytes);
        } else {
            self.storage.give_back(self.part, self.bytes - bytes);
        }
        self.bytes = bytes;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;
    use crate::git::objects::ObjectError;

    #[test]
    fn a_lack_of_room_is_seen_through_what_wraps_it() {
        let wrapped = |error: io::Error| io::Error::other(ObjectError::from(error));
        let disk = || io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        for error in [disk(), wrapped(disk()), io::ErrorKind::QuotaExceeded.into()] {
            assert!(
                matches!(StorageFull::of(&error), Some(StorageFull::Disk)),
                "{error}"
            );
        }
        let limit = StorageFull::Limit {
            wanted: 3,
            used: 2,
            limit: 4,
        };
        let found = StorageFull::of(&wrapped(limit.into()));
        assert!(matches!(found, Some(StorageFull::Limit { wanted: 3, .. })));
        assert!(StorageFull::of(&wrapped(io::ErrorKind::NotFound.into())).is_none());
    }

    struct Holder(Mutex<Vec<Reservation>>);

    impl Evict for Holder {
        fn evict(&self, bytes: u64) {
            let mut freed = 0;
            let mut held = self.0.lock().unwrap();
            while freed < bytes && !held.is_empty() {
                freed += held.remove(0).bytes();
            }
        }
    }

    #[test]
    fn the_limit_holds_at_the_byte() {
        let storage = Storage::new(100);
        let mut taken = storage.nothing(Part::Git);
        taken.grow(100).unwrap();
        assert!(storage.nothing(Part::Answers).grow(1).is_err());
        let part = taken.split(1);
        assert_eq!((taken.bytes(), part.bytes()), (99, 1));
        assert!(storage.nothing(Part::Answers).grow(1).is_err());
        drop(part);
        storage.nothing(Part::Answers).grow(1).unwrap();
        drop(taken);
        assert_eq!(storage.used_in_all(), 0);
    }

    #[tokio::test]
    async fn evicts_what_must_go_at_once_and_the_rest_in_the_background() {
        let storage = Storage::new(100);
        let holder = Arc::new(Holder(Mutex::default()));
        let weak: Weak<dyn Evict> = Arc::downgrade(&holder) as _;
        storage.add_evictor(weak);
        for _ in 0..10 {
            let mut part = storage.nothing(Part::Answers);
            part.grow(10).unwrap();
            holder.0.lock().unwrap().push(part);
        }
        let mut new = storage.nothing(Part::Git);
        new.grow(10).unwrap();
        assert_eq!(storage.used(Part::Answers), 90);
        let keeping = tokio::spawn(Arc::clone(&storage).keep_room());
        while storage.used_in_all() > 80 {
            tokio::task::yield_now().await;
        }
        keeping.abort();
        assert_eq!(storage.used(Part::Answers), 70);
        assert!(storage.nothing(Part::Git).grow(101).is_err());
    }

    /// Counts how often it is asked, as each time takes as long as there is much.
    struct Large(Holder, AtomicU64);

    impl Evict for Large {
        fn evict(&self, bytes: u64) {
            self.1.fetch_add(1, Ordering::Relaxed);
            self.0.evict(bytes);
        }
    }

    #[test]
    fn what_is_large_is_evicted_in_few_slices() {
        const LIMIT: u64 = 100 << 30;
        let storage = Storage::new(LIMIT);
        let held = (0..1600).map(|_| storage.count(Part::Blobs, LIMIT / 1600));
        let large = Arc::new(Large(Holder(Mutex::new(held.collect())), 0.into()));
        add_evictor(&storage, &large);
        storage.evict_down_to(storage.usual_share());
        assert_eq!(storage.used_in_all(), LIMIT / 100 * 80);
        assert_eq!(large.1.load(Ordering::Relaxed), 40);
    }

    fn add_evictor<T: Evict + 'static>(storage: &Storage, evictor: &Arc<T>) {
        let weak: Weak<dyn Evict> = Arc::downgrade(evictor) as _;
        storage.add_evictor(weak);
    }

    /// Another writer is quicker to take what it frees, a few times.
    struct Snatched {
        storage: Arc<Storage>,
        held: Holder,
        others: Mutex<Vec<Reservation>>,
    }

    impl Evict for Snatched {
        fn evict(&self, bytes: u64) {
            self.held.evict(bytes);
            let mut others = self.others.lock().unwrap();
            if others.len() < 3 {
                let mut other = self.storage.nothing(Part::Git);
                other.grow(bytes).unwrap();
                others.push(other);
            }
        }

        fn oldest(&self) -> Option<SystemTime> {
            Some(SystemTime::UNIX_EPOCH)
        }
    }

    #[test]
    fn what_others_snatch_is_evicted_again() {
        let storage = Storage::new(100);
        let held = (0..10).map(|_| storage.count(Part::Blobs, 10)).collect();
        let snatched = Arc::new(Snatched {
            storage: Arc::clone(&storage),
            held: Holder(Mutex::new(held)),
            others: Mutex::default(),
        });
        add_evictor(&storage, &snatched);
        let mut new = storage.nothing(Part::Blobs);
        new.grow(10).unwrap();
        assert_eq!(storage.used(Part::Git), 30);
        assert_eq!(storage.used_in_all(), 100);
        new.grow(60).unwrap();
        assert!(new.grow(1).is_err());
        assert_eq!((new.bytes(), storage.used_in_all()), (70, 100));
    }

    /// Lets others run between what it frees and what is done with it.
    struct Slow(Holder);

    impl Evict for Slow {
        fn evict(&self, bytes: u64) {
            self.0.evict(bytes);
            std::thread::yield_now();
        }
    }

    #[test]
    fn writers_that_meet_at_the_limit_all_get_room() {
        const WRITERS: usize = 8;
        let storage = Storage::new(1000);
        let held = (0..10).map(|_| storage.count(Part::Blobs, 100)).collect();
        let slow = Arc::new(Slow(Holder(Mutex::new(held))));
        add_evictor(&storage, &slow);
        let together = Barrier::new(WRITERS);
        let (refused, most) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..WRITERS {
                scope.spawn(|| {
                    for _ in 0..200 {
                        together.wait();
                        let mut new = storage.nothing(Part::Blobs);
                        // A panic would leave the others waiting.
                        if new.grow(100).is_err() {
                            refused.fetch_add(1, Ordering::Relaxed);
                        }
                        most.fetch_max(storage.used_in_all(), Ordering::Relaxed);
                        slow.0.0.lock().unwrap().push(new);
                    }
                });
            }
        });
        assert_eq!(refused.into_inner(), 0);
        assert_eq!(most.into_inner(), 1000);
    }

    struct Aged(Holder, u64);

    impl Evict for Aged {
        fn evict(&self, bytes: u64) {
            self.0.evict(bytes);
        }

        fn oldest(&self) -> Option<SystemTime> {
            Some(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(self.1))
        }
    }

    #[test]
    fn the_oldest_goes_first_whichever_part_it_is_of() {
        let storage = Storage::new(100);
        let held = |part| {
            let mut taken = storage.nothing(part);
            taken.grow(30).unwrap();
            Holder(Mutex::new(vec![taken]))
        };
        let new = Arc::new(Aged(held(Part::Git), 2));
        let old = Arc::new(Aged(held(Part::Blobs), 1));
        for evictor in [&new, &old] {
            let weak: Weak<dyn Evict> = Arc::downgrade(evictor) as _;
            storage.add_evictor(weak);
        }
        storage.nothing(Part::Index).grow(50).unwrap();
        assert_eq!(storage.used(Part::Git), 30);
        assert_eq!(storage.used(Part::Blobs), 0);
    }
}
