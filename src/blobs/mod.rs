//! Files by content: each is named by its SHA-256, written once, and read by many.
//!
//! ```text
//! find ─► kept ──────────────────────────► BlobReader (every block checked before it is sent)
//!    └──► coming ─► readers follow the one writer, the last byte only when the checksum is right
//!    └──► new ────► BlobWriter: reserve ─► temporary file ─► verify ─► fsync ─► rename ─► fsync of the folder
//! ```
//!
//! Files lie in `<root>/<space>/<first two digits>/<SHA-256 in hex>` and hold the content and nothing else.

#[cfg_attr(not(feature = "s3"), path = "no_bucket.rs")]
mod bucket;
mod digest;
mod evict;
mod hot;
mod kept;
mod load;
mod quarantine;
mod reader;
mod second_tier;
mod writer;

use std::collections::{HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::registry::Registry;
use rustix::process::{Resource, getrlimit};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::durable;
use crate::storage::{Evict, Part, Reservation, Storage};

use hot::Hot;
use quarantine::Quarantine;

pub use digest::{Digest, Hasher};
pub use kept::Kept;
pub use reader::{BlobReader, ReadError};
pub use second_tier::{InBucket, SecondTier, Waiting};
pub use writer::{BlobWriter, Coming, Failed};

/// Files that stay open without being read, so that the next reader need not open them: as many as a build asks for,
/// and no more than this share of what the process may have open.
const MOST_IDLE_OPEN: usize = 2048;
const SHARE_OF_OPEN_FILES: u64 = 4;

/// Files that are opened, and checked as a whole, at once. Those that are synced have a bound of their own, the downloads:
/// whoever wants what is here does not wait for them.
const DISK_WORK: usize = 4;

/// How often a read is written down on disk, for the order of eviction after a restart.
const TOUCH: Duration = Duration::from_secs(3600);

/// What names a blob.
///
/// SECURITY: whoever knows a checksum gets nothing out of a space that is not opened to him, so that what a private
/// registry has is never found through a public one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BlobId {
    /// A folder's name.
    pub space: Arc<str>,
    pub digest: Digest,
}

/// The store.
pub struct Blobs {
    root: PathBuf,
    storage: Arc<Storage>,
    index: Mutex<Index>,
    /// One of [`Index::leaving`] has left.
    left: Condvar,
    temporary: AtomicU64,
    disk: Arc<Semaphore>,
    hot: Arc<Hot>,
    most_idle_open: usize,
    tasks: TaskTracker,
    quarantine: Arc<Quarantine>,
    damaged: Counter,
    evicted: Counter,
}

struct Index {
    slots: HashMap<BlobId, Slot>,
    /// Files that are being removed or set aside: nobody opens them any more, and nothing is put in their place before they
    /// are gone.
    leaving: HashSet<BlobId>,
    /// What is being written, once for each source that somebody names.
    coming: HashMap<BlobId, Vec<Arc<Coming>>>,
    /// The files that stay open, with the moment of their last use as a count.
    open: HashMap<BlobId, (Arc<Kept>, u64)>,
    clock: u64,
    /// Of all slots, and what is leaving.
    reservation: Reservation,
    /// Everything on disk has a slot.
    loaded: bool,
}

/// What is known of a file on disk.
struct Slot {
    size: u64,
    /// Seconds since 1970.
    used: u64,
    /// The same on disk.
    touched: u64,
    /// CRC-32 of each block, known since the whole had the right SHA-256.
    checks: Option<Arc<[u32]>>,
    open: Weak<Kept>,
}

/// What the store has of a blob.
pub enum Found {
    Kept(Arc<Kept>),
    /// Somebody is writing it.
    Coming(Arc<Coming>),
    /// The caller has to write it; who asks meanwhile waits for that.
    New(Box<BlobWriter>, Arc<Coming>),
}

impl Blobs {
    /// Opens the store in `root`. What is on disk is found at once, but counted and evicted only after
    /// [`Blobs::load`].
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(root: PathBuf, storage: Arc<Storage>) -> io::Result<Arc<Self>> {
        durable::emptied(&root.join(TEMPORARY))?;
        let reservation = storage.nothing(Part::Blobs);
        let quarantine = Quarantine::new(root.join(QUARANTINE), &storage);
        let blobs = Arc::new(Self {
            root,
            storage: Arc::clone(&storage),
            index: Mutex::new(Index {
                slots: HashMap::new(),
                leaving: HashSet::new(),
                coming: HashMap::new(),
                open: HashMap::new(),
                clock: 0,
                reservation,
                loaded: false,
            }),
            left: Condvar::new(),
            temporary: AtomicU64::new(0),
            disk: Arc::new(Semaphore::new(DISK_WORK)),
            hot: Hot::new(),
            most_idle_open: most_idle_open(),
            tasks: TaskTracker::new(),
            quarantine,
            damaged: Counter::default(),
            evicted: Counter::default(),
        });
        let weak: Weak<dyn Evict> = Arc::downgrade(&blobs) as _;
        storage.add_evictor(weak);
        Ok(blobs)
    }

    /// Names what is counted here.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "blobs_damaged",
            "Files whose bytes on disk did not fit their checksum, and were set aside",
            self.damaged.clone(),
        );
        registry.register(
            "blobs_evicted",
            "Files that were removed to stay below storage.max_size",
            self.evicted.clone(),
        );
    }

    /// Waits for what is being brought to disk.
    pub async fn shutdown(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The blob, or the task to write it.
    ///
    /// SECURITY: only those who name the same `source` share a writer. So whoever names one that has something else, or
    /// nothing, fails nobody but himself.
    pub async fn find(self: &Arc<Self>, id: &BlobId, source: &str) -> Found {
        if let Some(kept) = self.find_open(id) {
            return Found::Kept(kept);
        }
        let may_be_on_disk = {
            let index = self.index();
            if let Some(coming) = index.coming_from(id, source) {
                return Found::Coming(coming);
            }
            !index.loaded || index.slots.contains_key(id)
        };
        if may_be_on_disk {
            let (blobs, asked) = (Arc::clone(self), id.clone());
            let turn = Arc::clone(&self.disk).acquire_owned().await;
            // In a task of its own: a client that goes away does not leave it half done.
            let opening = self.tasks.spawn_blocking(move || {
                let _turn = turn;
                blobs.open_file(&asked)
            });
            if let Ok(Some(kept)) = opening.await {
                return Found::Kept(kept);
            }
        }
        let mut index = self.index();
        if let Some((kept, _)) = index.open.get(id) {
            return Found::Kept(Arc::clone(kept));
        }
        if let Some(coming) = index.coming_from(id, source) {
            return Found::Coming(coming);
        }
        let (writer, coming) = BlobWriter::new(Arc::clone(self), id.clone(), source);
        let all = index.coming.entry(id.clone()).or_default();
        all.push(Arc::clone(&coming));
        Found::New(Box::new(writer), coming)
    }

    /// The blob, if its file is open, as that of what is asked for often is.
    pub fn find_open(self: &Arc<Self>, id: &BlobId) -> Option<Arc<Kept>> {
        let now = seconds();
        let mut index = self.index();
        index.clock += 1;
        let clock = index.clock;
        let (kept, used) = index.open.get_mut(id)?;
        *used = clock;
        let kept = Arc::clone(kept);
        let touch = index.use_slot(id, now);
        drop(index);
        if touch {
            self.touch(&kept);
        }
        Some(kept)
    }

    /// Writes down that it was read.
    fn touch(self: &Arc<Self>, kept: &Arc<Kept>) {
        let (kept, tasks) = (Arc::clone(kept), &self.tasks);
        tasks.spawn_blocking(move || kept.touch());
    }

    /// Keeps a file open, and closes the one that was not used for longest when there are too many.
    fn stay_open(&self, index: &mut Index, id: &BlobId, kept: &Arc<Kept>) {
        index.clock += 1;
        let clock = index.clock;
        if index.open.len() >= self.most_idle_open {
            // Some at once, as looking for the oldest takes as long as there are files.
            let mut used: Vec<u64> = index.open.values().map(|(_, used)| *used).collect();
            let some = used.len() / 8;
            let (_, oldest, _) = used.select_nth_unstable(some);
            let oldest = *oldest;
            index.open.retain(|_, (_, used)| *used > oldest);
        }
        index.open.insert(id.clone(), (Arc::clone(kept), clock));
    }

    /// Puts a file that is not what it should be where nobody reads it, and forgets it: who asks next gets it anew.
    pub fn set_aside(&self, kept: &Kept) {
        let room = {
            let mut index = self.index();
            let is_same = |(open, _): &(Arc<Kept>, u64)| std::ptr::eq(&raw const **open, kept);
            // Another may have been written in its place already.
            if let Some(other) = index.open.get(&kept.id)
                && !is_same(other)
            {
                return;
            }
            index.open.remove(&kept.id);
            if !index.slots.contains_key(&kept.id) {
                return;
            }
            let Some(room) = index.leave(&kept.id) else {
                return;
            };
            room
        };
        self.quarantine(&kept.id, room);
    }

    /// Moves a file away that leaves, with the room that it takes. Blocks.
    fn quarantine(&self, id: &BlobId, room: Reservation) {
        self.damaged.inc();
        let moved = self.quarantine.take(&self.path(id), &id.digest, room);
        self.index().leaving.remove(id);
        self.left.notify_all();
        match moved {
            Ok(()) => tracing::error!(
                blob = %id.digest, space = %id.space, folder = %self.quarantine.folder().display(),
                "a file is damaged: set aside, it is fetched again; is the disk failing?"
            ),
            Err(error) => {
                tracing::error!(blob = %id.digest, space = %id.space, %error, "a damaged file cannot be set aside");
            }
        }
    }

    /// Where the blob lies when it is kept.
    pub fn path(&self, id: &BlobId) -> PathBuf {
        let name = id.digest.to_string();
        self.root.join(&*id.space).join(&name[..2]).join(name)
    }

    fn temporary_path(&self) -> PathBuf {
        let number = self.temporary.fetch_add(1, Ordering::Relaxed);
        self.root.join(TEMPORARY).join(number.to_string())
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Beside the spaces, whose names are longer.
const TEMPORARY: &str = "tmp";
const QUARANTINE: &str = "quarantine";

/// Whether a folder below the root is a space.
fn is_space(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    path.is_dir() && name != TEMPORARY && name != QUARANTINE
}

impl Index {
    /// What is being written of a blob from this source.
    fn coming_from(&self, id: &BlobId, source: &str) -> Option<Arc<Coming>> {
        let mut all = self.coming.get(id)?.iter();
        all.find(|coming| *coming.source == *source).cloned()
    }

    /// Says that the blob was used; returns whether that is worth writing down.
    fn use_slot(&mut self, id: &BlobId, now: u64) -> bool {
        let Some(slot) = self.slots.get_mut(id) else {
            return false;
        };
        slot.used = now;
        let due = now.saturating_sub(slot.touched) >= TOUCH.as_secs();
        if due {
            slot.touched = now;
        }
        due
    }

    /// Forgets a file that begins to leave, and gives the room that it takes until it has left. `None` if it leaves already.
    fn leave(&mut self, id: &BlobId) -> Option<Reservation> {
        if !self.leaving.insert(id.clone()) {
            return None;
        }
        let size = self.slots.remove(id).map_or(0, |slot| slot.size);
        Some(self.reservation.split(size))
    }

    /// Forgets a file, which then no longer counts.
    fn forget(&mut self, id: &BlobId) -> bool {
        let Some(slot) = self.slots.remove(id) else {
            return false;
        };
        self.give_back(slot.size);
        true
    }

    fn give_back(&mut self, bytes: u64) {
        let left = self.reservation.bytes().saturating_sub(bytes);
        self.reservation.set(left);
    }
}

fn most_idle_open() -> usize {
    let may_open = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let share = usize::try_from(may_open / SHARE_OF_OPEN_FILES).unwrap_or(MOST_IDLE_OPEN);
    share.clamp(1, MOST_IDLE_OPEN)
}

fn seconds() -> u64 {
    seconds_of(SystemTime::now())
}

fn seconds_of(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

#[cfg(test)]
mod tests;
