//! What is read again and again stays in memory: it was checked, and is neither read nor checked again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::kept::BLOCK;

/// Room in KiB: 32 MiB, the smaller crates of a large service.
const ROOM: usize = 32 << 10;

/// Blocks of a file that may stay in memory. Larger files would take the room of many.
const MOST_OF_A_FILE: u64 = 4;

/// Where there is no room for another block, all have to show again that they are wanted, but not more often than this.
const AT_LEAST: Duration = Duration::from_secs(60);

/// The memory of a store.
#[derive(Debug)]
pub(super) struct Hot {
    /// Also for what has no place any more and is still being sent.
    room: Arc<Semaphore>,
    taken: Mutex<Taken>,
}

#[derive(Debug)]
struct Taken {
    since: Instant,
    by: Vec<Weak<HotBlocks>>,
}

/// The first blocks of a file that is open.
#[derive(Debug)]
pub(super) struct HotBlocks {
    hot: Arc<Hot>,
    blocks: Box<[Place]>,
}

#[derive(Debug, Default)]
struct Place {
    was_read: AtomicBool,
    block: Mutex<Option<Bytes>>,
}

/// Gives its room back when nobody sends it any more.
struct Block {
    bytes: Box<[u8]>,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Block {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Hot {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            room: Arc::new(Semaphore::new(ROOM)),
            taken: Mutex::new(Taken {
                since: Instant::now(),
                by: Vec::new(),
            }),
        })
    }

    /// For a file of `size` bytes.
    pub(super) fn blocks(self: &Arc<Self>, size: u64) -> Arc<HotBlocks> {
        let blocks = size.div_ceil(BLOCK as u64);
        let some = if blocks <= MOST_OF_A_FILE { blocks } else { 0 };
        Arc::new(HotBlocks {
            hot: Arc::clone(self),
            blocks: (0..some).map(|_| Place::default()).collect(),
        })
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_anew(&self) {
        let by = {
            let mut taken = self.taken();
            if taken.since.elapsed() < AT_LEAST {
                return;
            }
            taken.since = Instant::now();
            std::mem::take(&mut taken.by)
        };
        for file in by.iter().filter_map(Weak::upgrade) {
            for place in &file.blocks {
                *place.block() = None;
                place.was_read.store(false, Ordering::Relaxed);
            }
        }
    }
}

impl HotBlocks {
    /// A block that lies in memory.
    pub(super) fn get(&self, block: u64) -> Option<Bytes> {
        self.blocks.get(block as usize)?.block().clone()
    }

    /// Keeps a block that was read from the file, and is right, from its second reading on.
    pub(super) fn keep(self: &Arc<Self>, block: u64, bytes: &[u8]) {
        let Some(place) = self.blocks.get(block as usize) else {
            return;
        };
        if !place.was_read.swap(true, Ordering::Relaxed) {
            return;
        }
        let room = bytes.len().div_ceil(1024) as u32;
        let Ok(room) = Arc::clone(&self.hot.room).try_acquire_many_owned(room) else {
            return self.hot.begin_anew();
        };
        *place.block() = Some(Bytes::from_owner(Block {
            bytes: bytes.into(),
            _room: room,
        }));
        let mut taken = self.hot.taken();
        if taken.by.len() == taken.by.capacity() {
            taken.by.retain(|file| file.strong_count() > 0);
        }
        taken.by.push(Arc::downgrade(self));
    }
}

impl Place {
    fn block(&self) -> MutexGuard<'_, Option<Bytes>> {
        self.block.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_twice_stays_as_long_as_there_is_room() {
        let hot = Hot::new();
        let left = || hot.room.available_permits();
        let bytes = vec![7; BLOCK];
        let file = hot.blocks(2 * BLOCK as u64);
        file.keep(1, &bytes);
        assert_eq!(file.get(1), None, "once is not again");
        file.keep(1, &bytes);
        assert_eq!(file.get(1).unwrap(), bytes);
        assert_eq!(file.get(0), None);
        assert_eq!(left(), ROOM - BLOCK / 1024);
        // Of a large file nothing stays.
        let large = hot.blocks(MOST_OF_A_FILE * BLOCK as u64 + 1);
        for _ in 0..3 {
            large.keep(0, &bytes);
        }
        assert_eq!(large.get(0), None);
        // What is still being sent takes room after its file is closed.
        let sent = file.get(1).unwrap();
        drop(file);
        assert_eq!(left(), ROOM - BLOCK / 1024);
        drop(sent);
        assert_eq!(left(), ROOM);
    }

    #[test]
    fn where_there_is_no_room_everything_begins_anew_after_a_while() {
        let hot = Hot::new();
        let bytes = vec![7; BLOCK];
        let is_kept = |file: &Arc<HotBlocks>| {
            file.keep(0, &bytes);
            file.keep(0, &bytes);
            file.get(0).is_some()
        };
        let files = Vec::from_iter((0..=ROOM * 1024 / BLOCK).map(|_| hot.blocks(BLOCK as u64)));
        let (last, others) = files.split_last().unwrap();
        assert!(others.iter().all(is_kept));
        assert!(!is_kept(last));
        assert!(others[0].get(0).is_some(), "not yet");
        hot.taken().since -= AT_LEAST;
        last.keep(0, &bytes);
        assert_eq!(last.get(0), None);
        assert_eq!(hot.room.available_permits(), ROOM);
        assert!(is_kept(last) && is_kept(&others[0]));
    }
}
