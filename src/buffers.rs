//! What is read from files comes in buffers that are used again.

use std::fs::File;
use std::io::IoSliceMut;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::io::{ReadWriteFlags, preadv2};
use tokio::sync::{Semaphore, SemaphorePermit};

/// Memory for one piece of a file. Dropped, it serves the next: an allocator would keep some for each thread that ever had one.
pub struct Buffer {
    /// As long as the longest piece that was ever in it: growing writes zeros, which are overwritten a moment later.
    memory: Vec<u8>,
    length: usize,
    /// Given back when the last byte is sent.
    _place: Option<SemaphorePermit<'static>>,
}

/// Of a large buffer, in bytes.
pub const CAPACITY: usize = 256 << 10;

/// Of a small one, and the unit in which they are counted.
const SMALL: usize = 64 << 10;

/// Buffers of each size that are kept when nobody reads.
const MOST_SPARE: usize = 64;
static SPARE: [Mutex<Vec<Vec<u8>>>; 2] = [const { Mutex::new(Vec::new()) }; 2];

/// Buffers with what clients are sent, in units: 128 MiB. A client that is slower than we are, or stops reading, holds two
/// or three.
const MOST_FOR_CLIENTS: usize = 2048;
static FOR_CLIENTS: Semaphore = Semaphore::const_new(MOST_FOR_CLIENTS);

impl Buffer {
    /// A buffer of `length` bytes, at most [`CAPACITY`], with whatever was in it. Waits while there are as many as may be,
    /// in the order in which they are asked for.
    pub async fn for_client(length: usize) -> Self {
        let capacity = if length <= SMALL { SMALL } else { CAPACITY };
        let place = FOR_CLIENTS.acquire_many((capacity / SMALL) as u32).await;
        let mut memory = spare(length)
            .pop()
            .unwrap_or_else(|| Vec::with_capacity(capacity));
        if memory.len() < length {
            memory.resize(length, 0);
        }
        Self {
            memory,
            length,
            _place: place.ok(),
        }
    }
}

/// Where buffers for pieces of this length lie when they are not used.
fn spare(length: usize) -> MutexGuard<'static, Vec<Vec<u8>>> {
    let spare = &SPARE[usize::from(length > SMALL)];
    spare.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether nobody gets a large buffer before another client has taken what it is sent.
pub fn are_short() -> bool {
    FOR_CLIENTS.available_permits() < CAPACITY / SMALL
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut spare = spare(self.length);
        if spare.len() < MOST_SPARE {
            spare.push(std::mem::take(&mut self.memory));
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory[..self.length]
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.length]
    }
}

/// Fills `buffer` if that takes no disk, but only a copy: that is quick enough for an async worker, and what is
/// worth keeping mostly lies in memory.
pub fn read_from_memory(file: &File, buffer: &mut [u8], offset: u64) -> bool {
    let length = buffer.len();
    let read = preadv2(
        file,
        &mut [IoSliceMut::new(buffer)],
        offset,
        ReadWriteFlags::NOWAIT,
    );
    // Whatever is the matter, a plain read will say it.
    read.is_ok_and(|read| read == length)
}
