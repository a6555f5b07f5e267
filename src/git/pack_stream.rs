//! The bytes of one pack for one client: from a kept answer, or, where there is no room to keep it, made for this
//! client alone.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::git::answers::{AnswerError, AnswerReader};
use crate::git::blocks::Blocks;
use crate::git::objects::ObjectError;
use crate::git::objects::writer::PackStats;
use crate::git::pool::{Entry, Pool};
use crate::git::snapshot::Snapshot;
use crate::git::upload_pack::plan::Plan;
use crate::git::upload_pack::sideband::Framed;

/// What a pack is made from. Making it twice gives equal bytes: one thread writes it, in the order of the packs.
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
    from: From,
    /// The kept answer is made from this very source, so making it again gives equal bytes.
    own: bool,
    /// Bytes that were handed out.
    sent: u64,
}

enum From {
    Kept(AnswerReader),
    Direct(Direct),
}

struct Direct {
    blocks: mpsc::Receiver<Bytes>,
    maker: JoinHandle<Result<(), ObjectError>>,
}

/// Blocks that are made ahead of a slow client.
const AHEAD: usize = 2;

impl PackStream {
    /// `own` says that `reader` reads what is made from `source`.
    pub fn new(source: Source, reader: AnswerReader, own: bool) -> Self {
        Self {
            source,
            from: From::Kept(reader),
            own,
            sent: 0,
        }
    }

    /// What the pack came to, where that is known already.
    pub fn stats(&self) -> Option<PackStats> {
        match &self.from {
            From::Kept(reader) => reader.stats(),
            From::Direct(_) => None,
        }
    }

    /// The next bytes, or `None` at the end. May be dropped and called again.
    ///
    /// # Errors
    /// [`AnswerError`], after which nothing more comes.
    pub async fn next(&mut self) -> Result<Option<Bytes>, AnswerError> {
        if let From::Kept(reader) = &mut self.from {
            match reader.next().await {
                Err(AnswerError::Full | AnswerError::Damaged) if self.own || self.sent == 0 => {
                    self.from = From::Direct(Direct::make(self.source.clone(), self.sent));
                }
                other => return self.count(other),
            }
        }
        let From::Direct(direct) = &mut self.from else {
            return Ok(None);
        };
        if let Some(block) = direct.blocks.recv().await {
            return self.count(Ok(Some(block)));
        }
        match (&mut direct.maker).await {
            Ok(Ok(())) => Ok(None),
            Ok(Err(error)) => {
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

    fn count(
        &mut self,
        next: Result<Option<Bytes>, AnswerError>,
    ) -> Result<Option<Bytes>, AnswerError> {
        self.sent += next.as_ref().map_or(0, |block| {
            block.as_ref().map_or(0, |block| block.len() as u64)
        });
        next
    }
}

impl Direct {
    /// Makes the pack once more and leaves out the first `skip` bytes, which the client has.
    fn make(source: Source, skip: u64) -> Self {
        let (sender, blocks) = mpsc::channel(AHEAD);
        let maker = tokio::spawn(async move {
            let thread = Arc::clone(source.pool.unkept()).acquire_owned().await;
            let made = tokio::task::spawn_blocking(move || {
                let _thread = thread;
                let closed = sender.clone();
                // Waits for the client to take each block: memory stays bounded.
                let mut left_out = 0;
                let mut framed = Framed::new(Blocks::new(|block| {
                    let skipped = (skip - left_out).min(block.len() as u64);
                    left_out += skipped;
                    let rest = Bytes::copy_from_slice(&block[skipped as usize..]);
                    if rest.is_empty() {
                        return Ok(());
                    }
                    sender
                        .blocking_send(rest)
                        .map_err(|_| io::ErrorKind::BrokenPipe.into())
                }));
                source
                    .plan
                    .write(&source.snapshot, &mut framed, &|| closed.is_closed())?;
                framed.finish()?.finish()?;
                Ok(())
            });
            made.await
                .unwrap_or_else(|panic| Err(io::Error::other(panic).into()))
        });
        Self { blocks, maker }
    }
}
