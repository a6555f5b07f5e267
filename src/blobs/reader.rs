//! Reading a blob, also one that is still being written.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{Semaphore, watch};

use super::kept::{BLOCK, Kept};
use super::writer::{Coming, Failed, State};
use crate::buffers::{Buffer, read_from_memory};

/// Blocks that are read from the disk at once.
pub(super) static READS: Semaphore = Semaphore::const_new(8);

/// Why a blob cannot be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// A block on disk is not what was written, or cannot be read. Give the blob to [`super::Blobs::set_aside`] and ask
    /// for it again.
    #[error("a kept file is damaged on disk, please try again")]
    Damaged(Arc<Kept>),
    #[error("{0}")]
    Writing(Failed),
    /// A file that is still being written cannot be read, or the service stops.
    #[error("a file cannot be read: {0}")]
    Io(#[from] io::Error),
}

/// Reads a part of a blob.
pub struct BlobReader {
    source: Source,
    /// What is left; the end is `u64::MAX` where only the writer will know it.
    left: Range<u64>,
}

enum Source {
    Kept(Arc<Kept>),
    Coming(Arc<Coming>, watch::Receiver<State>),
}

impl BlobReader {
    /// Reads `range` of a blob that is kept.
    pub fn kept(kept: Arc<Kept>, range: Range<u64>) -> Self {
        let end = range.end.min(kept.size);
        Self {
            source: Source::Kept(kept),
            left: range.start..end,
        }
    }

    /// Reads `range` of a blob while it is written; `u64::MAX` as its end is the end of the blob.
    pub fn coming(coming: &Arc<Coming>, range: Range<u64>) -> Self {
        Self {
            source: Source::Coming(Arc::clone(coming), coming.subscribe()),
            left: range,
        }
    }

    /// How much is left, where that is known.
    pub fn left(&self) -> Range<u64> {
        self.left.clone()
    }

    /// The next piece, or `None` at the end. May be dropped and called again.
    ///
    /// # Errors
    /// [`ReadError`]; nothing more comes then.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ReadError> {
        let (coming, state) = match &mut self.source {
            Source::Kept(kept) => return read_kept(kept, &mut self.left).await,
            Source::Coming(coming, state) => (coming, state),
        };
        let at = self.left.start;
        if at >= self.left.end {
            return Ok(None);
        }
        // SECURITY: of a part as well, the last byte goes out only when the whole is known to be right.
        let held_back = self.left.end - 1;
        let (end, released) = {
            let state = state
                .wait_for(|state| state.end.is_some() || state.released().min(held_back) > at)
                .await
                .map_err(|_| ReadError::Writing(Failed::gone()))?;
            (state.end.clone(), state.released().min(held_back))
        };
        match end {
            Some(Err(failed)) => Err(ReadError::Writing(failed)),
            Some(Ok(())) => {
                let Some(kept) = coming.whole() else {
                    return Ok(None);
                };
                self.left.end = self.left.end.min(kept.size);
                let bytes = read_kept(&kept, &mut self.left).await;
                self.source = Source::Kept(kept);
                bytes
            }
            None => {
                let length = (released - at).min(BLOCK as u64) as usize;
                let bytes = read_written(coming, at, length).await?;
                self.left.start += bytes.len() as u64;
                Ok(Some(bytes))
            }
        }
    }
}

/// The next piece of what is left of a whole file.
async fn read_kept(kept: &Arc<Kept>, left: &mut Range<u64>) -> Result<Option<Bytes>, ReadError> {
    if left.is_empty() {
        return Ok(None);
    }
    let block = left.start / BLOCK as u64;
    let bytes = read_block(kept, block).await?;
    let start = (left.start - block * BLOCK as u64) as usize;
    let end = (left.end - block * BLOCK as u64).min(bytes.len() as u64) as usize;
    left.start += (end - start) as u64;
    Ok(Some(bytes.slice(start..end)))
}

/// A whole block, and the right one.
async fn read_block(kept: &Arc<Kept>, block: u64) -> Result<Bytes, ReadError> {
    if let Some(bytes) = kept.hot.get(block) {
        return Ok(bytes);
    }
    let start = block * BLOCK as u64;
    let length = (kept.size - start).min(BLOCK as u64) as usize;
    let buffer = match read_piece(&kept.file, start, length).await? {
        Ok(buffer) => buffer,
        // A disk tells of rot by an error more often than by wrong bytes, and reading again would not help.
        Err(error) => {
            tracing::error!(
                blob = %kept.id.digest, space = %kept.id.space, offset = start, %error,
                "a kept file cannot be read"
            );
            return Err(ReadError::Damaged(Arc::clone(kept)));
        }
    };
    if kept.checks.get(block as usize) != Some(&crc32fast::hash(buffer.as_ref())) {
        return Err(ReadError::Damaged(Arc::clone(kept)));
    }
    kept.hot.keep(block, buffer.as_ref());
    Ok(Bytes::from_owner(buffer))
}

/// What was written a moment ago, and lies in memory.
async fn read_written(coming: &Coming, at: u64, length: usize) -> io::Result<Bytes> {
    let file = coming.file()?;
    Ok(Bytes::from_owner(read_piece(&file, at, length).await??))
}

/// A piece of a file, out of memory or else from the disk.
///
/// # Errors
/// That the service stops; inside, what the file system says.
async fn read_piece(file: &Arc<File>, at: u64, length: usize) -> io::Result<io::Result<Buffer>> {
    let mut buffer = Buffer::for_client(length).await;
    if read_from_memory(file, buffer.as_mut(), at) {
        return Ok(Ok(buffer));
    }
    let turn = READS.acquire().await;
    let file = Arc::clone(file);
    let reading = tokio::task::spawn_blocking(move || {
        // Until the disk has answered, whether or not somebody still waits for it.
        let _turn = turn;
        file.read_exact_at(buffer.as_mut(), at).map(|()| buffer)
    });
    reading.await.map_err(io::Error::other)
}
