//! The bytes of one pack for one client: from a kept answer, or, where there is no room to keep it, made for this
//! client alone. Who has some of a kept answer when that breaks off, be it the client that it was begun for or one that
//! joined, gets what is missing from a pack that is made anew, if that begins with the same bytes.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::task::JoinHandle;

use crate::buffers::Buffer;
use crate::git::answers::{AnswerError, AnswerReader};
use crate::git::blocks::Blocks;
use crate::git::objects::ObjectError;
use crate::git::objects::writer::PackStats;
use crate::git::pool::{Entry, Pool};
use crate::git::snapshot::Snapshot;
use crate::git::upload_pack::plan::Plan;
use crate::git::upload_pack::sideband::Framed;

/// What a pack is made from. Making it twice gives equal bytes: one thread writes it, in the order of the packs. From
/// another source an equal answer may have other bytes, since the packs may be others.
#[derive(Clone)]
pub struct Source {
    pub pool: Arc<Pool>,
    pub entry: Arc<Entry>,
    pub snapshot: Arc<Snapshot>,
    pub plan: Arc<Plan>,
}

/// A pack in packets of `side-band-64k`. Chunks end where packets end.
pub struct PackStream {
    source: Source,
    from: PackSource,
}

enum PackSource {
    Kept(AnswerReader),
    Direct(Direct),
}

struct Direct {
    blocks: mpsc::Receiver<Bytes>,
    /// Ends with its place among such packs, which is free again only when the client has the last block.
    maker: JoinHandle<Result<Option<OwnedSemaphorePermit>, Unmade>>,
}

/// Why a pack was not made once more.
enum Unmade {
    Objects(ObjectError),
    /// It does not begin with what the client has of the kept answer.
    Differs,
}

/// Blocks that are made ahead of a slow client.
const AHEAD: usize = 2;

impl PackStream {
    /// What `reader` reads, or else the pack that is made from `source`.
    pub fn new(source: Source, reader: AnswerReader) -> Self {
        Self {
            source,
            from: PackSource::Kept(reader),
        }
    }

    /// What the pack came to, where that is known already.
    pub fn stats(&self) -> Option<PackStats> {
        match &self.from {
            PackSource::Kept(reader) => reader.stats(),
            PackSource::Direct(_) => None,
        }
    }

    /// The next bytes, or `None` at the end. Not to be dropped and called again: what was on its way would be missing.
    ///
    /// # Errors
    /// [`AnswerError`], after which nothing more comes.
    pub async fn next(&mut self) -> Result<Option<Bytes>, AnswerError> {
        if let PackSource::Kept(reader) = &mut self.from {
            match reader.next().await {
                Err(AnswerError::Full | AnswerError::Damaged) => {
                    let had = reader.read_so_far();
                    self.from = PackSource::Direct(Direct::make(self.source.clone(), had));
                }
                other => return other,
            }
        }
        let PackSource::Direct(direct) = &mut self.from else {
            return Ok(None);
        };
        if let Some(block) = direct.blocks.recv().await {
            // Among all that clients have yet to take, it counts like a kept one.
            let mut buffer = Buffer::for_client(block.len()).await;
            buffer.as_mut().copy_from_slice(&block);
            return Ok(Some(Bytes::from_owner(buffer)));
        }
        match (&mut direct.maker).await {
            Ok(Ok(_place)) => Ok(None),
            Ok(Err(Unmade::Differs)) => Err(AnswerError::Making(
                "a kept answer broke off, and what is made anew differs from it, please try again"
                    .into(),
            )),
            Ok(Err(Unmade::Objects(error))) => {
                let text = error.to_string();
                let source = self.source.clone();
                // Reporting reads whole packs; the client hears at once.
                self.source.pool.spawn(async move {
                    source
                        .pool
                        .report(&source.entry, &source.snapshot, &error)
                        .await;
                });
                Err(AnswerError::Making(text.into()))
            }
            Err(panic) => Err(AnswerError::Making(panic.to_string().into())),
        }
    }
}

impl Direct {
    /// Makes the pack once more and leaves out the blocks that the client has, whose checksums are `had`.
    fn make(source: Source, had: Vec<u32>) -> Self {
        let (sender, blocks) = mpsc::channel(AHEAD);
        let maker = tokio::spawn(async move {
            let place = Arc::clone(source.pool.unkept()).acquire_owned().await.ok();
            let made = tokio::task::spawn_blocking(move || {
                let closed = sender.clone();
                let mut rest = Rest {
                    had: had.into_iter(),
                    client: sender,
                    differs: false,
                };
                let written = write(&source, &mut rest, &|| closed.is_closed());
                if rest.differs {
                    return Err(Unmade::Differs);
                }
                written.map(|()| place).map_err(Unmade::Objects)
            });
            made.await
                .unwrap_or_else(|panic| Err(Unmade::Objects(io::Error::other(panic).into())))
        });
        Self { blocks, maker }
    }
}

fn write(
    source: &Source,
    rest: &mut Rest,
    cancelled: &dyn Fn() -> bool,
) -> Result<(), ObjectError> {
    let mut framed = Framed::new(Blocks::new(|block| rest.take(block)));
    source
        .plan
        .write(&source.snapshot, &mut framed, cancelled)?;
    framed.finish()?.finish()?;
    Ok(())
}

/// Passes on what of a pack follows the blocks that a client has.
struct Rest {
    /// The checksums of those that were not made again yet.
    had: std::vec::IntoIter<u32>,
    client: mpsc::Sender<Bytes>,
    differs: bool,
}

impl Rest {
    /// Waits for the client to take each block: memory stays bounded.
    fn take(&mut self, block: &[u8]) -> io::Result<()> {
        match self.had.next() {
            None => self
                .client
                .blocking_send(Bytes::copy_from_slice(block))
                .map_err(|_| io::ErrorKind::BrokenPipe.into()),
            // Should another block have the same checksum by chance, the client sees it by the pack's own.
            Some(sum) if sum == crc32fast::hash(block) => Ok(()),
            Some(_) => {
                self.differs = true;
                Err(io::ErrorKind::InvalidData.into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a client that `had` some blocks gets of a pack in `blocks`; none where it had others.
    fn rest_of(blocks: &[&[u8]], had: &[&[u8]]) -> Option<Vec<u8>> {
        let (client, mut received) = mpsc::channel(blocks.len());
        let had: Vec<u32> = had.iter().map(|block| crc32fast::hash(block)).collect();
        let mut rest = Rest {
            had: had.into_iter(),
            client,
            differs: false,
        };
        let taken = blocks.iter().try_for_each(|block| rest.take(block));
        assert_eq!(taken.is_err(), rest.differs);
        let got = std::iter::from_fn(|| received.try_recv().ok()).flatten();
        taken.is_ok().then(|| got.collect())
    }

    #[test]
    fn what_a_client_has_is_left_out_if_it_is_the_same() {
        let blocks: [&[u8]; 3] = [b"one", b"two", b"three"];
        assert_eq!(rest_of(&blocks, &[]), Some(b"onetwothree".to_vec()));
        assert_eq!(rest_of(&blocks, &blocks[..2]), Some(b"three".to_vec()));
        assert_eq!(rest_of(&blocks, &[b"one", b"other"]), None);
    }
}
