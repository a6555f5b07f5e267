//! Writing a blob: one writer, followed by whoever wants it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tokio::sync::watch;

use super::kept::{BLOCK, Kept};
use super::{BlobId, Blobs, Hasher, Slot, seconds};
use crate::durable;
use crate::storage::{Part, Reservation, StorageFull};

/// A blob that is being written.
pub struct Coming {
    /// Where it comes from, as whoever began it says.
    pub(super) source: Box<str>,
    state: watch::Sender<State>,
    /// None before the first byte.
    file: Mutex<Option<Arc<File>>>,
    /// Since the whole is known to be right: from then on every block is checked again when it is read.
    whole: OnceLock<Arc<Kept>>,
}

/// How far the writer is.
#[derive(Clone, Debug)]
pub struct State {
    /// What the whole will have, where the source said so.
    pub length: Option<u64>,
    pub written: u64,
    pub end: Option<Result<(), Failed>>,
}

/// Why a blob was not written. The text reaches clients.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Failed {
    #[error("the source has no such file")]
    NotFound,
    /// There is no room to keep it.
    #[error("there is no room for it")]
    Full,
    /// It would be one too many that is on its way.
    #[error("too many files are on their way, please try again")]
    Busy,
    #[error("{0}")]
    Source(Arc<str>),
    /// Not what it should be.
    #[error("{0}")]
    Wrong(Arc<str>),
}

impl Failed {
    pub(super) fn gone() -> Self {
        Self::Source("its writer went away, please try again".into())
    }
}

impl State {
    /// Bytes that may be sent: the last one only when the whole is known to be right.
    pub fn released(&self) -> u64 {
        match (&self.end, self.length) {
            (Some(Ok(())), _) => self.written,
            (_, Some(length)) => self.written.min(length.saturating_sub(1)),
            (_, None) => self.written.saturating_sub(1),
        }
    }
}

impl Coming {
    fn new(source: &str) -> Arc<Self> {
        Arc::new(Self {
            source: source.into(),
            state: watch::Sender::new(State {
                length: None,
                written: 0,
                end: None,
            }),
            file: Mutex::default(),
            whole: OnceLock::new(),
        })
    }

    pub(super) fn whole(&self) -> Option<Arc<Kept>> {
        self.whole.get().cloned()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Waits until there is something to answer with: a block of bytes, or the end. So whoever asks for a small file that
    /// turns out wrong is told so, instead of being cut off.
    ///
    /// # Errors
    /// Why there will be nothing.
    pub async fn begun(&self) -> Result<State, Failed> {
        let mut state = self.state.subscribe();
        let begun = state
            .wait_for(|state| state.end.is_some() || state.released() >= BLOCK as u64)
            .await
            .map_err(|_| Failed::gone())?
            .clone();
        match begun.end {
            Some(Err(failed)) => Err(failed),
            // Also where the source did not tell the length.
            Some(Ok(())) => Ok(State {
                length: Some(begun.written),
                ..begun
            }),
            None => Ok(begun),
        }
    }

    /// Waits until the whole is written, whatever it came to.
    pub async fn ended(&self) -> Result<(), Failed> {
        let mut state = self.state.subscribe();
        let ended = state.wait_for(|state| state.end.is_some()).await;
        ended
            .map_err(|_| Failed::gone())?
            .end
            .clone()
            .unwrap_or(Ok(()))
    }

    pub(super) fn file(&self) -> io::Result<Arc<File>> {
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.clone()
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))
    }
}

/// Writes one blob. Dropped before [`BlobWriter::finish`], whoever follows gets an error and nothing is kept.
pub struct BlobWriter {
    blobs: Arc<Blobs>,
    id: BlobId,
    coming: Arc<Coming>,
    path: PathBuf,
    file: Option<Arc<File>>,
    reservation: Reservation,
    hasher: Hasher,
    written: u64,
    checks: Vec<u32>,
    block: crc32fast::Hasher,
    /// Whoever follows knows how it ended.
    ended: bool,
    /// The file has its place.
    moved: bool,
}

impl BlobWriter {
    pub(super) fn new(blobs: Arc<Blobs>, id: BlobId, source: &str) -> (Self, Arc<Coming>) {
        let coming = Coming::new(source);
        let writer = Self {
            path: blobs.temporary_path(),
            reservation: blobs.storage.nothing(Part::Blobs),
            blobs,
            id,
            coming: Arc::clone(&coming),
            file: None,
            hasher: Hasher::default(),
            written: 0,
            checks: Vec::new(),
            block: crc32fast::Hasher::new(),
            ended: false,
            moved: false,
        };
        (writer, coming)
    }

    /// What is written.
    pub fn id(&self) -> &BlobId {
        &self.id
    }

    /// Bytes so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// What the source says that the whole has. Reserves room for it. Blocks on the disk when something has to be
    /// evicted for that.
    ///
    /// # Errors
    /// [`Failed::Full`].
    pub fn expect(&mut self, length: u64) -> Result<(), Failed> {
        let more = length.saturating_sub(self.reservation.bytes());
        self.reservation.grow(more)?;
        self.coming
            .state
            .send_modify(|state| state.length = Some(length));
        Ok(())
    }

    /// Writes some more. Blocks on the disk.
    ///
    /// # Errors
    /// [`Failed::Full`], also when the disk itself is; or what is wrong with the disk.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Failed> {
        let end = self.written + bytes.len() as u64;
        if end > self.reservation.bytes() {
            self.reservation.grow(end - self.reservation.bytes())?;
        }
        let file = match &self.file {
            Some(file) => Arc::clone(file),
            None => {
                let mut options = File::options();
                let made = options
                    .read(true)
                    .write(true)
                    .create_new(true)
                    .open(&self.path);
                let file = Arc::new(made.map_err(|error| unwritable(&error))?);
                self.file = Some(Arc::clone(&file));
                *self
                    .coming
                    .file
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&file));
                file
            }
        };
        file.write_all_at(bytes, self.written)
            .map_err(|error| unwritable(&error))?;
        self.hasher.update(bytes);
        self.check(bytes);
        self.written = end;
        self.coming.state.send_modify(|state| state.written = end);
        Ok(())
    }

    fn check(&mut self, mut bytes: &[u8]) {
        let mut filled = (self.written % BLOCK as u64) as usize;
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(BLOCK - filled));
            self.block.update(now);
            filled += now.len();
            bytes = later;
            if filled == BLOCK {
                self.checks.push(std::mem::take(&mut self.block).finalize());
                filled = 0;
            }
        }
    }

    /// Compares the whole with its name and the length that was announced, releases it to whoever follows, and brings it to its place. Blocks on the
    /// disk, until it is sure to be there.
    ///
    /// # Errors
    /// [`Failed::Wrong`]; then nobody got the last byte, or as many as were announced.
    pub fn finish(mut self) -> Result<(), Failed> {
        let found = std::mem::take(&mut self.hasher).finish();
        let wrong = if found != self.id.digest {
            Some(format!(
                "expected a file with the SHA-256 {}, found {} bytes with {found}",
                self.id.digest, self.written
            ))
        } else {
            // Whoever follows has told it to a client.
            let announced = self.coming.state.borrow().length;
            announced
                .filter(|length| *length != self.written)
                .map(|length| {
                    let written = self.written;
                    format!("expected {length} bytes, as was announced, found {written}")
                })
        };
        if let Some(text) = wrong {
            let failed = Failed::Wrong(text.into());
            self.end(Err(failed.clone()));
            return Err(failed);
        }
        if !self.written.is_multiple_of(BLOCK as u64) {
            self.checks.push(std::mem::take(&mut self.block).finalize());
        }
        if self.written == 0 {
            // Nothing made the file.
            self.write(b"")?;
        }
        self.reservation.set(self.written);
        let Some(kept) = self.whole() else {
            return Ok(());
        };
        // SECURITY: only now, with the right checksum, the last byte goes out.
        self.end(Ok(()));
        // They have what they came for; that it cannot be kept is nothing to them.
        if let Err(error) = self.keep(&kept) {
            tracing::warn!(blob = %self.id.digest, %error, "a file cannot be kept");
        }
        Ok(())
    }

    /// The open file, for whoever reads it from now on.
    fn whole(&mut self) -> Option<Arc<Kept>> {
        let file = self.file.take()?;
        let kept = Arc::new(Kept {
            id: self.id.clone(),
            file,
            size: self.written,
            checks: std::mem::take(&mut self.checks).into(),
            was_here: false.into(),
            hot: self.blobs.hot.blocks(self.written),
        });
        // Nobody else sets it.
        let _ = self.coming.whole.set(Arc::clone(&kept));
        Some(kept)
    }

    fn keep(&mut self, kept: &Arc<Kept>) -> io::Result<()> {
        // From another source it may be here by now.
        if self.blobs.index().open.contains_key(&self.id) {
            return Ok(());
        }
        kept.file.sync_all()?;
        self.blobs.wait_left(&self.id);
        let path = self.blobs.path(&self.id);
        let folder = path.parent().unwrap_or(&path);
        durable::create_folder(folder)?;
        fs::rename(&self.path, &path)?;
        self.moved = true;
        let reservation = std::mem::replace(
            &mut self.reservation,
            self.blobs.storage.nothing(Part::Blobs),
        );
        let mut slot = Slot::new(self.written, seconds());
        slot.checks = Some(Arc::clone(&kept.checks));
        slot.open = Arc::downgrade(kept);
        let mut index = self.blobs.index();
        index.forget(&self.id);
        index.reservation.absorb(reservation);
        index.slots.insert(self.id.clone(), slot);
        self.blobs.stay_open(&mut index, &self.id, kept);
        drop(index);
        durable::sync_parent(&path)
    }

    /// Tells whoever follows why there is nothing, and removes what was written. Blocks on the disk if anything was.
    pub fn fail(mut self, why: Failed) {
        self.end(Err(why));
    }

    fn end(&mut self, end: Result<(), Failed>) {
        if !std::mem::replace(&mut self.ended, true) {
            self.coming.state.send_modify(|state| state.end = Some(end));
        }
    }
}

impl Drop for BlobWriter {
    fn drop(&mut self) {
        self.end(Err(Failed::gone()));
        {
            // Who comes from now on finds it kept, or writes it anew.
            let mut index = self.blobs.index();
            if let Some(all) = index.coming.get_mut(&self.id) {
                all.retain(|coming| !Arc::ptr_eq(coming, &self.coming));
                if all.is_empty() {
                    index.coming.remove(&self.id);
                }
            }
        }
        // Whoever has written nothing need not be on a thread that may wait for the disk.
        if !self.moved && self.coming.file().is_ok() {
            // What is left goes at the next start.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl From<StorageFull> for Failed {
    fn from(full: StorageFull) -> Self {
        tracing::warn!(error = %full, "a file is not kept");
        Self::Full
    }
}

fn unwritable(error: &io::Error) -> Failed {
    tracing::error!(%error, "a file cannot be written");
    match StorageFull::of(error) {
        Some(_) => Failed::Full,
        None => Failed::Source(format!("it cannot be written here: {}", error.kind()).into()),
    }
}
