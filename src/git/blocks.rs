//! Answers in blocks: what is written is cut into them, and what is read comes in buffers that are used again.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use crate::git::upload_pack::sideband::LARGE_PACKET;

/// What of an answer is written, checked and sent in one go: whole packets, so that others can be put between. Large
/// enough that a switch of threads does not count, small enough for hundreds of clients.
pub const BLOCK: usize = 4 * LARGE_PACKET;

/// Hands each full block to `take`, and the rest at the end.
pub struct Blocks<F> {
    block: Vec<u8>,
    take: F,
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Blocks<F> {
    pub fn new(take: F) -> Self {
        Self {
            block: Vec::with_capacity(BLOCK),
            take,
        }
    }

    /// Hands out what does not fill a block.
    ///
    /// # Errors
    /// Those of `take`.
    pub fn finish(mut self) -> io::Result<()> {
        self.hand_out()
    }

    fn hand_out(&mut self) -> io::Result<()> {
        if !self.block.is_empty() {
            (self.take)(&self.block)?;
            self.block.clear();
        }
        Ok(())
    }
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Write for Blocks<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(BLOCK - self.block.len());
        self.block.extend_from_slice(&bytes[..taken]);
        if self.block.len() == BLOCK {
            self.hand_out()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Memory for one block. Dropped, it serves the next: an allocator would keep some for each thread that ever had one.
pub struct Buffer(Vec<u8>);

static SPARE: Mutex<Vec<Vec<u8>>> = Mutex::new(Vec::new());

/// Buffers that are kept when nobody reads.
const MOST_SPARE: usize = 64;

impl Buffer {
    /// A buffer of `length` bytes, at most [`BLOCK`], with whatever was in it.
    pub fn of(length: usize) -> Self {
        let spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut bytes = spare.unwrap_or_else(|| Vec::with_capacity(BLOCK));
        bytes.resize(length, 0);
        Self(bytes)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
        if spare.len() < MOST_SPARE {
            spare.push(std::mem::take(&mut self.0));
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}
