//! Sends a pack to a client: a kept answer, one that is being made, or one that has to be made first.

use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::{sleep, timeout};

use crate::git::answers::{AnswerWriter, Found};
use crate::git::name::RepoName;
use crate::git::objects::ObjectError;
use crate::git::pack_stream::{PackStream, Source};
use crate::git::pool::{Entry, Flight, Pool};
use crate::git::snapshot::Snapshot;
use crate::git::upload_pack::PackResponse;
use crate::git::upload_pack::request::Band;
use crate::git::upload_pack::sideband::{self, Reframe};
use crate::git::upstream::UpstreamError;
use crate::ops::metrics::{AnswerKind, Metrics, Queue};

/// How often a client that waits for its pack hears of us. Cargo's client gives up where less than 10 bytes come per
/// second over 30 s.
const PULSE: Duration = Duration::from_secs(1);

/// Blocks that are read ahead of a client, beside the one that is being sent.
const READ_AHEAD: usize = 1;

/// The bytes of a response as they come; an error cuts the connection.
pub type Chunks = mpsc::Receiver<Result<Bytes, std::io::Error>>;
type Sender = mpsc::Sender<Result<Bytes, std::io::Error>>;

/// Too many packs of this repository are being made or waited for.
#[derive(Debug)]
pub struct Busy;

/// A pack that will come.
pub struct Prepared {
    stream: PackStream,
    kind: AnswerKind,
    band: Band,
    progress: bool,
}

/// Finds the answer for `pack`, or begins to make it.
///
/// # Errors
/// [`Busy`] when it would have to be made and the repository's queue is full.
pub fn prepare(
    pool: &Arc<Pool>,
    entry: &Arc<Entry>,
    snapshot: &Arc<Snapshot>,
    pack: PackResponse,
) -> Result<Prepared, Busy> {
    let PackResponse {
        plan,
        band,
        progress,
    } = pack;
    let whole = plan.is_whole();
    let place = || {
        Arc::clone(&entry.making_or_waiting)
            .try_acquire_owned()
            .map_err(|_| Busy)
    };
    let key = plan.key();
    let source = Source {
        pool: Arc::clone(pool),
        entry: Arc::clone(entry),
        snapshot: Arc::clone(snapshot),
        plan: Arc::new(plan),
    };
    let early = if pool.answers().has(&entry.name, key) {
        None
    } else {
        Some(place()?)
    };
    let (reader, kind) = match pool.answers().get_or_new(&entry.name, key, false) {
        Found::Kept(reader) if whole => (reader, AnswerKind::Whole),
        Found::Kept(reader) => (reader, AnswerKind::Cached),
        Found::New(reader, writer) => {
            // The answer may have been evicted since we looked.
            let place = match early {
                Some(place) => place,
                None => place()?,
            };
            if whole {
                pool.answers().supersede_whole(&entry.name, key);
            }
            pool.spawn(make(source.clone(), writer, place));
            let kind = if whole {
                AnswerKind::Whole
            } else {
                AnswerKind::Made
            };
            (reader, kind)
        }
    };
    Ok(Prepared {
        stream: PackStream::new(source, reader),
        kind,
        band,
        progress,
    })
}

async fn make(source: Source, writer: AnswerWriter, place: OwnedSemaphorePermit) {
    let Source {
        pool,
        entry,
        snapshot,
        plan,
    } = source;
    let queued = pool.metrics().queued(Queue::Pack);
    let turn = Arc::clone(&entry.making).acquire_owned().await;
    let thread = Arc::clone(pool.threads()).acquire_owned().await;
    drop(queued);
    let from = Arc::clone(&snapshot);
    let made = tokio::task::spawn_blocking(move || {
        let _held = (place, turn, thread);
        writer.run(|out, cancelled| plan.write(&from, out, cancelled))
    });
    match made.await {
        Ok(Ok(stats)) => {
            tracing::debug!(
                repo = %entry.name,
                objects = stats.objects,
                bytes = stats.bytes,
                reencoded = stats.reencoded,
                "made a pack"
            );
        }
        Ok(Err(ObjectError::Cancelled)) => {}
        Ok(Err(error)) if error.is_for_want_of_room() => {
            tracing::warn!(repo = %entry.name, %error, "an answer is sent without being kept");
        }
        Ok(Err(error)) => {
            tracing::warn!(repo = %entry.name, %error, "a pack was not made");
            pool.report(&entry, &snapshot, &error).await;
        }
        Err(panic) => tracing::error!(repo = %entry.name, error = %panic, "making a pack failed"),
    }
}

/// Sends `head` and then the pack.
pub fn send(head: Vec<u8>, prepared: Prepared, name: RepoName, metrics: Arc<Metrics>) -> Chunks {
    let (sender, chunks) = mpsc::channel(READ_AHEAD);
    tokio::spawn(async move {
        if sender.send(Ok(head.into())).await.is_ok() {
            send_pack(&sender, prepared, &name, &metrics).await;
        }
    });
    chunks
}

async fn send_pack(sender: &Sender, prepared: Prepared, name: &RepoName, metrics: &Metrics) {
    let Prepared {
        mut stream,
        kind,
        band,
        progress,
    } = prepared;
    let stats = stream.stats();
    let doing = match stats {
        Some(_) => "reading the pack",
        None => "making the pack",
    };
    if progress {
        let what = match stats {
            Some(stats) => format!(
                "warm: {} objects, {}\n",
                stats.objects,
                bytesize::ByteSize(stats.bytes)
            ),
            None => format!("{doing}\n"),
        };
        let _ = sender
            .send(Ok(
                sideband::progress(band, &format!("warmdock: {what}")).into()
            ))
            .await;
    }
    let mut reframe = Reframe::to(band);
    let mut sent = 0;
    let mut waits_since = Some(Instant::now());
    // Nothing more is read for a client that has yet to take what there is.
    while sender.reserve().await.is_ok() {
        let mut block = pin!(stream.next());
        let block = loop {
            tokio::select! {
                biased;
                block = &mut block => break block,
                // Nobody is left to be told of it.
                () = sender.closed() => break Ok(None),
                () = sleep(PULSE) => {
                    let waiting = waits_since.filter(|_| progress);
                    let far = waiting
                        .map(|since| format!("{doing}: {} s", since.elapsed().as_secs()));
                    let pulse = pulse(band, far, &sideband::keepalive(band));
                    if !pulse.is_empty() {
                        // A client that has not taken the last one needs no other.
                        let _ = sender.try_send(Ok(pulse));
                    }
                }
            }
        };
        let chunk = match block {
            Ok(Some(block)) if reframe.is_identity() => block,
            Ok(Some(block)) => Bytes::from_owner(Reframed {
                bytes: reframe.push(&block),
                _block: block,
            }),
            Ok(None) => {
                let _ = sender
                    .send(Ok(Bytes::from_static(sideband::end(band))))
                    .await;
                break;
            }
            Err(error) => {
                tracing::warn!(repo = %name, %error, bytes = sent, "an answer broke off");
                let _ = sender
                    .send(Ok(
                        sideband::error(band, &format!("warmdock: {error}\n")).into()
                    ))
                    .await;
                // Without a band, only a connection that ends early tells of the error.
                let _ = sender.send(Err(std::io::Error::other(error))).await;
                break;
            }
        };
        waits_since = None;
        sent += chunk.len() as u64;
        if sender.send(Ok(chunk)).await.is_err() {
            break;
        }
    }
    metrics.answer(kind, sent);
}

/// Sends what the upstream answers.
pub fn pass(passed: Passed) -> Chunks {
    let (sender, chunks) = mpsc::channel(READ_AHEAD);
    tokio::spawn(async move { send_passed(&sender, passed).await });
    chunks
}

async fn send_passed(sender: &Sender, mut passed: Passed) {
    loop {
        let next = tokio::select! {
            next = passed.next() => next,
            () = sender.closed() => None,
        };
        let Some(next) = next else {
            return;
        };
        let is_last = next.is_err();
        let sent = sender.send(next.map_err(std::io::Error::other)).await;
        if is_last || sent.is_err() {
            return;
        }
    }
}

/// A block in the form of another band. It takes the place of the block among the buffers, of which there are so many.
struct Reframed {
    bytes: Vec<u8>,
    _block: Bytes,
}

impl AsRef<[u8]> for Reframed {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// What a client hears that waits: how far it is, where it wants that and there is something to tell.
fn pulse(band: Band, far: Option<String>, keepalive: &[u8]) -> Bytes {
    match far {
        Some(text) => sideband::progress(band, &format!("warmdock: {text}\r")).into(),
        None => Bytes::copy_from_slice(keepalive),
    }
}

/// The bytes of an upstream's answer as they come.
pub type Passed = BoxStream<'static, Result<Bytes, axum::Error>>;

/// What follows the beginning of a response.
pub enum Rest {
    Answer {
        /// What comes before the pack.
        head: Vec<u8>,
        pack: Option<Prepared>,
    },
    /// The upstream's, in the same form.
    Passed(Passed),
}

/// Makes the rest of a response, once the first clone has ended in whichever way. An error is a sentence for the client.
pub type Respond = Box<
    dyn FnOnce(Result<Arc<Snapshot>, UpstreamError>) -> BoxFuture<'static, Result<Rest, String>>
        + Send,
>;

/// With what a response begins in any case, and how its pack is wrapped.
pub struct Beginning {
    pub head: Vec<u8>,
    pub band: Band,
    /// Whether the client wants to hear how far it is.
    pub progress: bool,
    /// What it gets instead, to know that it still is under way.
    pub keepalive: Vec<u8>,
}

/// Sends the beginning, then progress while the first clone is under way, and then the pack.
pub fn send_after_first_clone(
    beginning: Beginning,
    flight: Arc<Flight>,
    name: RepoName,
    metrics: Arc<Metrics>,
    respond: Respond,
) -> Chunks {
    let (sender, chunks) = mpsc::channel(READ_AHEAD);
    let Beginning {
        head,
        band,
        progress,
        keepalive,
    } = beginning;
    tokio::spawn(async move {
        let mut next = Bytes::from(head);
        // Also while the upstream is asked for what came after the clone began.
        let mut rest = pin!(async { respond(flight.wait().await).await });
        let rest = loop {
            if sender.send(Ok(next)).await.is_err() {
                return;
            }
            match timeout(PULSE, &mut rest).await {
                Ok(rest) => break rest,
                Err(_) => {
                    let far = progress.then(|| flight.progress.describe());
                    let far = far.map(|far| format!("first clone of this repository: {far}"));
                    next = pulse(band, far, &keepalive);
                }
            }
        };
        match rest {
            Ok(Rest::Answer { head, pack }) => {
                let taken = head.is_empty() || sender.send(Ok(head.into())).await.is_ok();
                if let Some(prepared) = pack.filter(|_| taken) {
                    send_pack(&sender, prepared, &name, &metrics).await;
                }
            }
            Ok(Rest::Passed(passed)) => send_passed(&sender, passed).await,
            Err(error) => {
                let text = format!("warmdock: {error}\n");
                let _ = sender.send(Ok(sideband::error(band, &text).into())).await;
                // gix takes the error for progress, and reads on until the connection ends.
                let _ = sender.send(Err(std::io::Error::other(error))).await;
            }
        }
    });
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_that_waits_hears_ten_bytes_a_second() {
        for band in [Band::Small, Band::Large] {
            for keepalive in [sideband::keepalive(band), sideband::keepalive_before_pack()] {
                for said in [None, Some(String::new())] {
                    let bytes = pulse(band, said, &keepalive).len() as f64;
                    assert!(bytes / PULSE.as_secs_f64() >= 10.0, "{band:?}");
                }
            }
        }
    }
}
