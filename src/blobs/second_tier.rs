//! A bucket behind the store, which several warmdocks share: read before a registry is asked, and written behind.
//! Whatever is wrong with it, builds go on as if it were not there.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::bucket::Bucket;
use super::{BlobId, Digest};
use crate::breaker::{Breaker, FAILURES, PAUSE, growing_pause};
use crate::config::Config;

/// What is larger stays here alone: it is held in memory while it is checked.
const LARGEST: u64 = 32 << 20;
/// What files that are read from it may take of memory together, in bytes, until they are on disk here.
const MEMORY: usize = 64 << 20;
/// Files that wait to be written, also while the bucket cannot be reached: some 200 bytes of memory each. More are not
/// written: the next warmdock asks the registry.
const MOST_WAITING: usize = 8192;
/// A file that could not be written is tried again behind all others, for so long.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 3600);
/// One that the bucket does not take, while it takes others, is tried as often.
const TRIES: u32 = 3;
/// After failures in a row the bucket is left alone for [`PAUSE`], twice as long after the next, and so on.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// For the beginning of an answer, with which it says whether it has a file. One that takes longer counts as failed: each
/// file that nobody has here would wait for that.
const FIRST_ANSWER: Duration = Duration::from_secs(2);
/// For one file. A bucket that takes longer is no gain.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
pub struct SecondTier {
    config: watch::Receiver<Arc<Config>>,
    /// Made at the start, and anew when it is first used after a reload.
    bucket: Mutex<(Arc<Config>, Option<Arc<Bucket>>)>,
    /// For reading: a bucket that takes no files may still give some.
    breaker: Breaker,
    memory: Arc<Semaphore>,
    waiting: mpsc::Sender<Offered>,
    results: Family<ResultLabel, Counter>,
}

/// Files to write, for [`SecondTier::write_behind`].
pub type Waiting = mpsc::Receiver<Offered>;

/// Whether the bucket has a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InBucket {
    /// Not one that is right, when it was asked a moment ago.
    No,
    /// Nobody has asked since the service started: it may have stopped before it was written.
    Unknown,
}

/// A file to write.
pub struct Offered {
    id: BlobId,
    /// Where it is kept here.
    path: PathBuf,
    in_bucket: InBucket,
    since: Instant,
    /// How often the bucket did not take it, but others.
    tries: u32,
    /// How many others had been written when it was last tried.
    behind: Option<u64>,
}

impl Offered {
    /// It was not written, when as many others had been. Returns whether it is worth another try.
    fn failed(&mut self, written: u64) -> bool {
        self.tries += u32::from(self.behind.is_none_or(|behind| behind < written));
        self.behind = Some(written);
        self.tries < TRIES && self.since.elapsed() < LONGEST_WAIT
    }
}

/// What came of asking the bucket for a file.
enum Read {
    File(Bytes),
    /// It has none, or one that is too large.
    Nothing,
    /// There was no room in memory for it, which says nothing of the bucket.
    NoRoom,
}

/// A file in memory. Gives its place back when nobody has it any more.
struct InMemory {
    bytes: Bytes,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for InMemory {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

impl SecondTier {
    pub fn new(config: watch::Receiver<Arc<Config>>) -> (Arc<Self>, Waiting) {
        let (sender, receiver) = mpsc::channel(MOST_WAITING);
        let current = config.borrow().clone();
        let bucket = bucket_of(&current);
        let tier = Self {
            config,
            bucket: Mutex::new((current, bucket)),
            breaker: Breaker::default(),
            memory: Arc::new(Semaphore::new(MEMORY)),
            waiting: sender,
            results: Family::default(),
        };
        for result in ["hit", "miss", "written", "failed", "dropped"] {
            drop(tier.results.get_or_create(&ResultLabel { result }));
        }
        (Arc::new(tier), receiver)
    }

    /// Names what is counted here.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "second_tier_files",
            "Files read from and written to storage.s3, by result",
            self.results.clone(),
        );
    }

    /// The file, if the bucket has it and it is right.
    pub async fn read(&self, id: &BlobId) -> Option<Bytes> {
        let bucket = self.bucket().await?;
        if !self.breaker.allows() {
            return None;
        }
        match self.fetched(&bucket, id).await {
            Ok(Read::NoRoom) => None,
            Ok(Read::Nothing) => {
                self.breaker.succeeded();
                self.count("miss");
                None
            }
            Ok(Read::File(bytes)) => {
                self.breaker.succeeded();
                let (bytes, digest) = tokio::task::spawn_blocking(move || {
                    let digest = Digest::of(&bytes);
                    (bytes, digest)
                })
                .await
                .ok()?;
                // SECURITY: nothing is believed because it lies in the bucket.
                if digest != id.digest {
                    self.failed("read", id, "a file in it does not fit its checksum");
                    return None;
                }
                self.count("hit");
                Some(bytes)
            }
            Err(error) => {
                self.breaker.failed();
                self.failed("read", id, &error);
                None
            }
        }
    }

    /// The file as it is in the bucket.
    ///
    /// # Errors
    /// What is wrong with the bucket.
    async fn fetched(&self, bucket: &Bucket, id: &BlobId) -> Result<Read, String> {
        let object = within(FIRST_ANSWER, bucket.get(id)).await?;
        let Some(object) = object.filter(|object| object.size() <= LARGEST) else {
            return Ok(Read::Nothing);
        };
        let memory = Arc::clone(&self.memory);
        // Where others hold all of it for longer, the registry is asked.
        let place = timeout(
            FIRST_ANSWER,
            memory.acquire_many_owned(object.size() as u32),
        )
        .await;
        let Ok(Ok(place)) = place else {
            return Ok(Read::NoRoom);
        };
        let bytes = within(PATIENCE, object.content()).await?;
        Ok(Read::File(Bytes::from_owner(InMemory {
            bytes,
            _place: place,
        })))
    }

    /// Has a file written that is kept at `path`, when there is time.
    pub fn offer(&self, id: BlobId, path: PathBuf, in_bucket: InBucket) {
        if self.config.borrow().storage.s3.is_some() {
            self.queue(Offered {
                id,
                path,
                in_bucket,
                since: Instant::now(),
                tries: 0,
                behind: None,
            });
        }
    }

    fn queue(&self, offered: Offered) {
        // What the bucket may have already makes way for what it has not.
        let has_room =
            offered.in_bucket == InBucket::No || self.waiting.capacity() > MOST_WAITING / 2;
        if !has_room || self.waiting.try_send(offered).is_err() {
            self.count("dropped");
        }
    }

    /// Writes what was offered, one after the other, also what comes while the bucket is away. At a stop it goes on until
    /// nothing new waits, or the bucket fails.
    pub async fn write_behind(self: Arc<Self>, mut waiting: Waiting, stopping: CancellationToken) {
        let (mut failures, mut written) = (0, 0);
        loop {
            let next = tokio::select! {
                biased;
                next = waiting.recv() => next,
                () = stopping.cancelled() => None,
            };
            let Some(mut offered) = next else {
                return;
            };
            // It is offered again at its next use.
            if offered.in_bucket == InBucket::Unknown && stopping.is_cancelled() {
                continue;
            }
            let Some(bucket) = self.bucket().await else {
                continue;
            };
            let id = &offered.id;
            let writing = async {
                if offered.in_bucket == InBucket::Unknown && bucket.has(id).await? {
                    return anyhow::Ok(false);
                }
                match content(id, &offered.path).await {
                    Ok(Some(content)) => bucket.put(id, content).await.map(|()| true),
                    Ok(None) => Ok(false),
                    Err(error) => {
                        self.failed("written", id, &format!("it cannot be read: {error}"));
                        Ok(false)
                    }
                }
            };
            let why = match within(PATIENCE, writing).await {
                Ok(true) => {
                    failures = 0;
                    written += 1;
                    self.count("written");
                    continue;
                }
                Ok(false) => continue,
                Err(why) => why,
            };
            self.failed("written", id, &why);
            if stopping.is_cancelled() {
                return;
            }
            if offered.failed(written) {
                self.queue(offered);
            } else {
                self.count("dropped");
            }
            failures += 1;
            if failures >= FAILURES {
                let pause = growing_pause(PAUSE, failures - FAILURES + 1, LONGEST_PAUSE);
                stopping.run_until_cancelled(sleep(pause)).await;
            }
        }
    }

    async fn bucket(&self) -> Option<Arc<Bucket>> {
        let mut made = self.bucket.lock().await;
        let config = self.config.borrow().clone();
        if !Arc::ptr_eq(&made.0, &config) {
            let from = Arc::clone(&config);
            // Reads certificates from disk.
            let bucket = tokio::task::spawn_blocking(move || bucket_of(&from)).await;
            *made = (config, bucket.ok().flatten());
        }
        made.1.clone()
    }

    fn count(&self, result: &'static str) {
        self.results.get_or_create(&ResultLabel { result }).inc();
    }

    fn failed(&self, what: &str, id: &BlobId, error: &str) {
        self.count("failed");
        tracing::warn!(blob = %id.digest, error, "storage.s3: a file could not be {what}; builds go on without it");
    }
}

/// What the bucket answers, if it does in time.
async fn within<T>(
    time: Duration,
    answer: impl Future<Output = anyhow::Result<T>>,
) -> Result<T, String> {
    match timeout(time, answer).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(_) => Err("it takes too long".into()),
    }
}

/// What is kept at `path`, unless it is evicted already, or is too large.
async fn content(id: &BlobId, path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    let (digest, path) = (id.digest, path.to_owned());
    let read = tokio::task::spawn_blocking(move || {
        let size = path.metadata()?.len();
        let content = (size <= LARGEST)
            .then(|| std::fs::read(&path))
            .transpose()?;
        std::io::Result::Ok(content.filter(|content| Digest::of(content) == digest))
    });
    match read.await? {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        content => content,
    }
}

fn bucket_of(config: &Config) -> Option<Arc<Bucket>> {
    let s3 = config.storage.s3.as_ref()?;
    match Bucket::new(s3) {
        Ok(bucket) => Some(Arc::new(bucket)),
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "storage.s3 cannot be used");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::config::environment::Environment;

    #[test]
    fn what_it_may_have_leaves_room_for_what_is_new() {
        let config = Config::parse("{}", &Environment::default()).unwrap();
        let (tier, waiting) = SecondTier::new(watch::channel(Arc::new(config)).1);
        let offer = |in_bucket| {
            tier.queue(Offered {
                id: BlobId {
                    space: "space".into(),
                    digest: Digest::of(b""),
                },
                path: PathBuf::new(),
                in_bucket,
                since: Instant::now(),
                tries: 0,
                behind: None,
            });
        };
        for (in_bucket, length) in [
            (InBucket::Unknown, MOST_WAITING / 2),
            (InBucket::No, MOST_WAITING),
        ] {
            for _ in 0..MOST_WAITING {
                offer(in_bucket);
            }
            assert_eq!(waiting.len(), length);
        }
    }

    #[test]
    fn after_a_reload_it_is_made_on_a_thread_of_its_own() {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let (release, released) = std::sync::mpsc::channel::<()>();
            tokio::task::spawn_blocking(move || released.recv());
            let config = || Arc::new(Config::parse("{}", &Environment::default()).unwrap());
            let (reload, config_now) = watch::channel(config());
            let (tier, _waiting) = SecondTier::new(config_now);
            assert!(tier.bucket().now_or_never().is_some(), "made at the start");
            reload.send_replace(config());
            assert!(tier.bucket().now_or_never().is_none(), "the thread is busy");
            drop(release);
            assert!(tier.bucket().await.is_none(), "there is none");
        });
    }
}
