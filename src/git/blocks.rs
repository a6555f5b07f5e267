//! Answers in blocks: what is written is cut into them.

use std::io::{self, Write};

use crate::git::upload_pack::sideband::LARGE_PACKET;

/// What of an answer is written, checked and sent in one go: whole packets, so that others can be put between. Large
/// enough that a switch of threads does not count, small enough for hundreds of clients.
pub const BLOCK: usize = 4 * LARGE_PACKET;

const _: () = assert!(BLOCK <= crate::buffers::CAPACITY);

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
