//! Waiting for an upstream on a thread of its own: for at most so long, and not beyond a stop.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;

use crate::server::body::Progress;

/// How long a stop may go unnoticed by a fetch that waits.
const LOOK_FOR_STOP: Duration = Duration::from_millis(200);

/// For so many times the idle limit, an upstream may send next to nothing. Git's own server says every five seconds that it
/// is still there; it tells how it gets on as well, and for large repositories it counts for minutes.
const DRIBBLES: u32 = 10;

/// All that comes before the list of references has ended, in bytes: a million references of usual names. It is in memory
/// several times over.
const LONGEST_LIST: u64 = 64 << 20;

/// How one fetch waits, and how much it takes. Blocks the calling thread, which must not be an async worker.
#[derive(Clone)]
pub(super) struct Patience {
    runtime: Handle,
    idle: Duration,
    stop: Arc<AtomicBool>,
    reading: Arc<Mutex<Reading>>,
}

/// How far an upstream is with what it sends.
#[derive(Default)]
struct Reading {
    progress: Progress,
    /// Bytes so far of the list of references.
    list: u64,
    has_listed: bool,
}

/// Why there was nothing to wait for any more, in words for [`super::UpstreamError::Failed`].
#[derive(Debug, thiserror::Error)]
pub(super) enum Impatience {
    #[error("it {what} for {}", humantime::format_duration(*idle))]
    Silence { what: &'static str, idle: Duration },
    #[error("its list of references is longer than {} MiB", LONGEST_LIST >> 20)]
    EndlessList,
    #[error("the service is stopping")]
    Stopped,
}

impl Patience {
    /// For a thread of the current runtime. `idle` bounds each single wait.
    pub fn new(idle: Duration, stop: Arc<AtomicBool>) -> Self {
        Self {
            runtime: Handle::current(),
            idle,
            stop,
            reading: Arc::default(),
        }
    }

    /// Blocks until `work` gives the next piece of what the upstream sends, of this `length` in bytes.
    ///
    /// # Errors
    /// [`Impatience`], also where it has sent next to nothing for long, or a list without end.
    pub fn read<T>(
        &self,
        work: impl Future<Output = T>,
        length: impl Fn(&T) -> usize,
    ) -> Result<T, Impatience> {
        let (begin, most) = (Instant::now(), DRIBBLES * self.idle);
        let left = self.reading().progress.left(most);
        let piece = self.wait("sent nothing", async {
            tokio::time::timeout(left, work).await
        })?;
        let piece = piece.map_err(|_| Impatience::Silence {
            what: "sent next to nothing",
            idle: most,
        })?;
        let (length, mut reading) = (length(&piece), self.reading());
        reading.progress.arrived(length, begin.elapsed());
        if !reading.has_listed {
            reading.list += length as u64;
            if reading.list > LONGEST_LIST {
                return Err(Impatience::EndlessList);
            }
        }
        Ok(piece)
    }

    /// The list of references has ended. A pack may be as long as there is room for it.
    pub fn has_listed(&self) {
        self.reading().has_listed = true;
    }

    /// Why what failed would fail again, where that is known.
    pub fn hopeless(&self) -> Option<String> {
        let reading = self.reading();
        let is_endless = !reading.has_listed && reading.list > LONGEST_LIST;
        is_endless.then(|| format!("the upstream: {}", Impatience::EndlessList))
    }

    /// Blocks until `work` is done. `what` says what the upstream failed to do if that takes too long.
    ///
    /// # Errors
    /// [`Impatience`].
    pub fn wait<T>(
        &self,
        what: &'static str,
        work: impl Future<Output = T>,
    ) -> Result<T, Impatience> {
        let stopped = async {
            while !self.stop.load(Ordering::Relaxed) {
                tokio::time::sleep(LOOK_FOR_STOP).await;
            }
        };
        let idle = self.idle;
        self.runtime.block_on(async {
            tokio::select! {
                done = work => Ok(done),
                () = tokio::time::sleep(idle) => Err(Impatience::Silence { what, idle }),
                () = stopped => Err(Impatience::Stopped),
            }
        })
    }

    fn reading(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
