//! The limit on disk space: whoever writes reserves first, and what was not used for longest goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// What the space is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Git,
    Answers,
}

impl Part {
    pub const ALL: [Self; 2] = [Self::Git, Self::Answers];

    pub fn name(self) -> &'static str {
        match self {
            Self::Git => "git",
            Self::Answers => "answers",
        }
    }
}

/// Nothing more could be evicted.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "storage.max_size is reached: {wanted} bytes are wanted and {used} of {limit} are used by what is in use or kept warm; \
     raise storage.max_size or shorten git.warm"
)]
pub struct StorageFull {
    pub wanted: u64,
    pub used: u64,
    pub limit: u64,
}

impl From<StorageFull> for std::io::Error {
    fn from(full: StorageFull) -> Self {
        Self::new(std::io::ErrorKind::StorageFull, full)
    }
}

/// Something that can give space back.
pub trait Evict: Send + Sync {
    /// Frees about `bytes`, least recently used first. Blocks on the disk.
    fn evict(&self, bytes: u64);
}

/// Space below one limit. Reservations never pass it; files are counted until nobody has them open any more.
pub struct Storage {
    limit: AtomicU64,
    used: [AtomicU64; Part::ALL.len()],
    /// In the order in which they are asked: what is cheap to make again first.
    evictors: Mutex<Vec<Weak<dyn Evict>>>,
}

/// Evicting goes on to this share of the limit, so that not every write has to evict.
const EVICT_TO_PERCENT: u64 = 80;

impl Storage {
    pub fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit: limit.into(),
            used: Default::default(),
            evictors: Mutex::default(),
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

    pub fn used_in_all(&self) -> u64 {
        Part::ALL.iter().map(|part| self.used(*part)).sum()
    }

    pub fn add_evictor(&self, evictor: Weak<dyn Evict>) {
        self.evictors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(evictor);
    }

    /// Space that is used already, whatever the limit: what lies on disk at start.
    pub fn count(self: &Arc<Self>, part: Part, bytes: u64) -> Reservation {
        self.used[part as usize].fetch_add(bytes, Ordering::Relaxed);
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
        let target = self.limit() / 100 * EVICT_TO_PERCENT;
        if self.used_in_all() > self.limit() {
            self.evict_until(|| self.used_in_all() <= target, target);
        }
    }

    fn try_take(&self, part: Part, bytes: u64) -> bool {
        // Two threads may both add before they look; then both take back, and at worst evict once too often.
        self.used[part as usize].fetch_add(bytes, Ordering::Relaxed);
        if self.used_in_all() <= self.limit() {
            return true;
        }
        self.used[part as usize].fetch_sub(bytes, Ordering::Relaxed);
        false
    }

    fn evict_until(&self, done: impl Fn() -> bool, target: u64) {
        let evictors: Vec<_> = self
            .evictors
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for evictor in evictors.iter().filter_map(Weak::upgrade) {
            if done() {
                return;
            }
            evictor.evict(self.used_in_all().saturating_sub(target));
        }
    }
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
        if !self.storage.try_take(self.part, more) {
            let limit = self.storage.limit();
            let target = (limit / 100 * EVICT_TO_PERCENT).min(limit.saturating_sub(more));
            self.storage
                .evict_until(|| self.storage.used_in_all() <= target, target);
            if !self.storage.try_take(self.part, more) {
                return Err(StorageFull {
                    wanted: more,
                    used: self.storage.used_in_all(),
                    limit,
                });
            }
        }
        self.bytes += more;
        Ok(())
    }

    /// Takes over what `other` has: at no moment is it counted twice or not at all.
    pub fn absorb(&mut self, mut other: Self) {
        debug_assert_eq!(self.part, other.part, "space is not moved between parts");
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Gives back what is above `bytes`, or counts what is below.
    pub fn set(&mut self, bytes: u64) {
        let used = &self.storage.used[self.part as usize];
        if bytes > self.bytes {
            used.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        } else {
            used.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
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
    use super::*;

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
        taken.set(99);
        storage.nothing(Part::Answers).grow(1).unwrap();
        drop(taken);
        assert_eq!(storage.used_in_all(), 0);
    }

    #[test]
    fn evicts_to_make_room_and_not_more_than_it_must() {
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
        assert_eq!(storage.used(Part::Answers), 80);
        assert!(storage.nothing(Part::Git).grow(101).is_err());
    }
}
