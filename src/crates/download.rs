//! `.crate` files: one download however many ask, checked before the last byte goes out, and mended while they are
//! read.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::stream::{Stream, unfold};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::timeout;

use super::counters::{CacheStatus, Kind};
use super::name::CrateFile;
use super::passing::Passing;
use super::upstream::{Body, Trouble, Upstream};
use super::{Crates, Registry};
use crate::blobs::{
    BlobId, BlobReader, BlobWriter, Coming, Failed, Found, InBucket, Kept, ReadError,
};

/// How often a registry is asked for the rest of a file whose connection broke.
const TRIES: usize = 3;
/// What is written to disk in one go, where the registry sends that quickly.
const BATCH: usize = 256 << 10;
/// More than any crate should have: larger ones are passed on. SECURITY: for what a registry announces and sends, other
/// files are evicted.
const MOST_BYTES: u64 = 512 << 20;
/// How long a file waits for a place among those that are passed on: shorter than the 30 s in which cargo wants the first
/// byte. It asks again when it is told to.
const PATIENCE: Duration = Duration::from_secs(20);
/// How often a file that is found damaged is fetched again for one reader.
const REPAIRS: usize = 2;

/// A file that is there or on its way.
pub enum Opened {
    Kept(Arc<Kept>),
    /// With its length, where the registry has said it.
    Coming(Arc<Coming>, Option<u64>),
    /// There is no room to keep it.
    Passing(Box<Passing>),
}

impl Crates {
    /// Opens a file, and begins to fetch it where it is not there. Waits for the first bytes.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn open(
        self: &Arc<Self>,
        registry: &Arc<Registry>,
        file: &CrateFile,
    ) -> Result<(Opened, CacheStatus), Failed> {
        let id = BlobId {
            space: Arc::clone(&registry.space),
            digest: file.digest,
        };
        if let Some(kept) = self.blobs.find_open(&id) {
            return Ok((Opened::Kept(kept), CacheStatus::Hit));
        }
        let source = format!("{}/{}", file.name, file.version);
        let (coming, from, handed) = match self.blobs.find(&id, &source).await {
            Found::Kept(kept) => {
                if kept.is_first_use() {
                    let path = self.blobs.path(&id);
                    self.second_tier.offer(id, path, InBucket::Unknown);
                }
                return Ok((Opened::Kept(kept), CacheStatus::Hit));
            }
            Found::Coming(coming) => (coming, CacheStatus::Shared, None),
            Found::New(writer, coming) => {
                let Ok(place) = Arc::clone(&registry.files).try_acquire_owned() else {
                    writer.fail(Failed::Busy);
                    return Err(Failed::Busy);
                };
                let handed = self.fetch(registry, file, *writer, place);
                (coming, CacheStatus::Upstream, Some(handed))
            }
        };
        match coming.begun().await {
            Ok(begun) => Ok((Opened::Coming(coming, begun.length), from)),
            Err(Failed::Full) => {
                let passing = match handed.and_then(|mut handed| handed.try_recv().ok()) {
                    Some(passing) => passing,
                    None => self.pass(registry, file).await?,
                };
                Ok((Opened::Passing(Box::new(passing)), CacheStatus::Upstream))
            }
            Err(why) => Err(why),
        }
    }

    async fn pass(&self, registry: &Registry, file: &CrateFile) -> Result<Passing, Failed> {
        let place = place(&registry.passing).await?;
        // Not for as long as the client reads: one that stalls would take the place of others.
        let _turn = self.counters.turn(Kind::File, &registry.downloads).await;
        let passing = Passing::begin(Arc::clone(&registry.upstream), file, place).await;
        passing.map_err(of_trouble)
    }

    /// In a task of its own: it goes on when the client that began it goes away. Where there is no room, that client is
    /// handed the registry's answer, so that nobody asks twice for one request.
    fn fetch(
        self: &Arc<Self>,
        registry: &Arc<Registry>,
        file: &CrateFile,
        writer: BlobWriter,
        place: OwnedSemaphorePermit,
    ) -> oneshot::Receiver<Passing> {
        let (crates, registry, file) = (Arc::clone(self), Arc::clone(registry), file.clone());
        let (hand_over, handed) = oneshot::channel();
        self.tasks.spawn(async move {
            let _place = place;
            let fetching = async {
                let _turn = crates.counters.turn(Kind::File, &registry.downloads).await;
                crates.fetched(&registry, &file, writer, hand_over).await;
            };
            // What is half there when the service stops is fetched by the next one.
            crates.stopping.run_until_cancelled(fetching).await;
        });
        handed
    }

    async fn fetched(
        &self,
        registry: &Registry,
        file: &CrateFile,
        mut writer: BlobWriter,
        hand_over: oneshot::Sender<Passing>,
    ) {
        let id = writer.id().clone();
        if let Some(bytes) = self.second_tier.read(&id).await {
            let written = on_disk(move || {
                let expecting = writer.expect(bytes.len() as u64);
                if let Err(why) = expecting.and_then(|()| writer.write(&bytes)) {
                    // Who waits gets it from the registry, where there is no room.
                    writer.fail(why.clone());
                    return Err(why);
                }
                writer.finish()
            });
            if let Err(why) = written.await.and_then(|end| end) {
                tracing::error!(crate = %file.name, version = %file.version, error = %why, "a crate cannot be kept");
            }
            return;
        }
        let mut tries = TRIES;
        let result = loop {
            tries -= 1;
            let poured;
            (writer, poured) = match self.pour(registry, file, writer).await {
                Ok(poured) => poured,
                Err(why) => break Err(why),
            };
            match poured {
                Ok(None) => break on_disk(move || writer.finish()).await.and_then(|end| end),
                Ok(Some(passing)) => {
                    // Before those who wait are told. The client may be gone.
                    let _ = hand_over.send(passing);
                    let _ = on_disk(move || writer.fail(Failed::Full)).await;
                    return;
                }
                // What broke off is taken up where it broke off.
                Err(Failed::Source(why)) if writer.written() > 0 && tries > 0 => tracing::info!(
                    crate = %file.name, version = %file.version, bytes = writer.written(), error = %why,
                    "a download broke off: asking for the rest"
                ),
                Err(why) => {
                    let said = why.clone();
                    break on_disk(move || writer.fail(said)).await.and(Err(why));
                }
            }
        };
        let Err(why) = result else {
            let path = self.blobs.path(&id);
            return self.second_tier.offer(id, path, InBucket::No);
        };
        self.report(registry, file, &why);
    }

    /// Tells the operator of a file that did not come whole.
    fn report(&self, registry: &Registry, file: &CrateFile, why: &Failed) {
        if matches!(why, Failed::Wrong(_)) {
            self.counters.mismatch();
        }
        if !matches!(why, Failed::NotFound) {
            tracing::error!(
                registry = %registry.name, crate = %file.name, version = %file.version, error = %why,
                "a crate cannot be fetched"
            );
        }
    }

    /// Everything that the writer lacks; or the answer as a whole, where there is no room for its beginning. Gives the
    /// writer back with the result, except where it got lost.
    async fn pour(
        &self,
        registry: &Registry,
        file: &CrateFile,
        mut writer: BlobWriter,
    ) -> Result<(BlobWriter, Result<Option<Passing>, Failed>), Failed> {
        let upstream = &registry.upstream;
        let have = writer.written();
        let mut body = match upstream.file(file, have).await {
            Ok(body) => body,
            Err(trouble) => return Ok((writer, Err(of_trouble(trouble)))),
        };
        // A registry that knows no ranges sends all of it again.
        let mut skip = if body.is_rest() { 0 } else { have };
        let mut expected = body.length.filter(|_| have == 0);
        loop {
            let mut batch = Vec::new();
            let more = self.batch(upstream, &mut body, &mut batch).await;
            let skipped = skip.min(batch.len() as u64);
            skip -= skipped;
            let expected = expected.take();
            let written;
            (writer, batch, written) = on_disk(move || {
                let new = &batch[skipped as usize..];
                let length = expected
                    .unwrap_or(0)
                    .max(writer.written() + new.len() as u64);
                let written = if length > MOST_BYTES {
                    Err(Failed::Full)
                } else {
                    let expecting = expected.map_or(Ok(()), |length| writer.expect(length));
                    expecting.and_then(|()| writer.write(new))
                };
                (writer, batch, written)
            })
            .await?;
            match (written, more) {
                (Ok(()), Ok(true)) => {}
                (Ok(()), Ok(false)) => return Ok((writer, Ok(None))),
                (Err(Failed::Full), Ok(more)) if writer.written() == 0 => {
                    // Where others are passed on, it is asked for again in its turn: it is not held meanwhile.
                    let Ok(place) = Arc::clone(&registry.passing).try_acquire_owned() else {
                        return Ok((writer, Err(Failed::Full)));
                    };
                    let (begun, rest) = (batch.into(), more.then_some(body));
                    let passing = Passing::of(Arc::clone(upstream), file, begun, rest, place);
                    return Ok((writer, Ok(Some(passing))));
                }
                // It would break in the client's hands as well.
                (Err(Failed::Full), Err(trouble)) if writer.written() == 0 => {
                    return Ok((writer, Err(of_trouble(trouble))));
                }
                (Err(why), _) => return Ok((writer, Err(why))),
                (_, Err(trouble)) => return Ok((writer, Err(of_trouble(trouble)))),
            }
        }
    }

    /// What has come, without waiting for more than some of it. Returns whether more will come.
    async fn batch(
        &self,
        upstream: &Upstream,
        body: &mut Body,
        batch: &mut Vec<u8>,
    ) -> Result<bool, Trouble> {
        let mut next = Some(upstream.chunk(body).await?);
        while let Some(chunk) = next {
            let Some(chunk) = chunk else {
                return Ok(false);
            };
            batch.extend_from_slice(&chunk);
            if batch.len() >= BATCH {
                break;
            }
            next = upstream.chunk(body).now_or_never().transpose()?;
        }
        Ok(true)
    }

    /// The bytes of a file in `range`, whatever happens to it meanwhile on disk.
    pub(super) fn stream(
        self: &Arc<Self>,
        registry: &Arc<Registry>,
        file: &CrateFile,
        opened: Opened,
        range: Range<u64>,
    ) -> impl Stream<Item = Result<Bytes, Failed>> + Send + use<> {
        let reading = Reading {
            crates: Arc::clone(self),
            registry: Arc::clone(registry),
            file: file.clone(),
            source: opened.source(range),
            repairs: 0,
        };
        unfold(Some(reading), |reading| async {
            let mut reading = reading?;
            match reading.next().await {
                Ok(Some(bytes)) => Some((Ok(bytes), Some(reading))),
                Ok(None) => None,
                Err(why) => Some((Err(why), None)),
            }
        })
    }
}

impl Opened {
    fn source(self, range: Range<u64>) -> Source {
        match self {
            Self::Kept(kept) => Source::Blob(BlobReader::kept(kept, range)),
            Self::Coming(coming, _) => Source::Blob(BlobReader::coming(&coming, range)),
            Self::Passing(passing) => Source::Registry(Box::new(passing.part(range))),
        }
    }

    /// In bytes, where that is known.
    pub fn length(&self) -> Option<u64> {
        match self {
            Self::Kept(kept) => Some(kept.size()),
            Self::Coming(_, length) => *length,
            Self::Passing(passing) => passing.length(),
        }
    }
}

struct Reading {
    crates: Arc<Crates>,
    registry: Arc<Registry>,
    file: CrateFile,
    source: Source,
    repairs: usize,
}

enum Source {
    Blob(BlobReader),
    Registry(Box<Passing>),
}

impl Reading {
    async fn next(&mut self) -> Result<Option<Bytes>, Failed> {
        let bytes = loop {
            let reader = match &mut self.source {
                Source::Blob(reader) => reader,
                Source::Registry(passing) => {
                    let next = passing.next().await;
                    if let Err(why) = &next {
                        self.crates.report(&self.registry, &self.file, why);
                    }
                    break next?;
                }
            };
            match reader.next().await {
                Ok(bytes) => break bytes,
                Err(ReadError::Damaged(kept)) if self.repairs < REPAIRS => {
                    self.repairs += 1;
                    let left = reader.left();
                    let blobs = Arc::clone(&self.crates.blobs);
                    on_disk(move || blobs.set_aside(&kept)).await?;
                    // The content is known by its checksum: the rest of the new file continues the old one.
                    let (opened, _) = self.crates.open(&self.registry, &self.file).await?;
                    self.source = opened.source(left);
                }
                // The disk is full in the middle.
                Err(ReadError::Writing(Failed::Full)) => {
                    let left = reader.left();
                    let passing = self.crates.pass(&self.registry, &self.file).await?;
                    self.source = Source::Registry(Box::new(passing.part(left)));
                }
                Err(ReadError::Writing(why)) => return Err(why),
                Err(error) => return Err(Failed::Source(error.to_string().into())),
            }
        };
        let length = bytes.as_ref().map_or(0, Bytes::len);
        self.crates.counters.sent(Kind::File, length as u64);
        Ok(bytes)
    }
}

/// A place among the files that are passed on. Clients that stop reading may have all of them for long: the others are
/// told to come again, and do not wait for them without end.
async fn place(passing: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Failed> {
    let place = timeout(PATIENCE, Arc::clone(passing).acquire_owned()).await;
    place.map_err(|_| Failed::Busy)?.map_err(|_| Failed::Busy)
}

/// Work that blocks on the disk.
pub(super) async fn on_disk<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failed> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failed::Source(error.to_string().into()))
}

pub(super) fn of_trouble(trouble: Trouble) -> Failed {
    match trouble {
        Trouble::NotFound => Failed::NotFound,
        Trouble::Failed(why) => Failed::Source(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_place_without_end() {
        let passing = Arc::new(Semaphore::new(1));
        let taken = place(&passing).await.unwrap();
        assert!(matches!(place(&passing).await, Err(Failed::Busy)));
        let waiting = tokio::spawn(async move { place(&passing).await });
        tokio::time::sleep(PATIENCE / 2).await;
        drop(taken);
        assert!(waiting.await.unwrap().is_ok());
    }
}
