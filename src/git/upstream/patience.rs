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

/// How one fetch waits. Blocks the calling thread, which must not be an async worker.
#[derive(Clone)]
pub(super) struct Patience {
    runtime: Handle,
    idle: Duration,
    stop: Arc<AtomicBool>,
    progress: Arc<Mutex<Progress>>,
}

/// Why there was nothing to wait for any more, in words for [`super::UpstreamError::Failed`].
#[derive(Debug, thiserror::Error)]
pub(super) enum Impatience {
    #[error("it {what} for {}", humantime::format_duration(*idle))]
    Silence { what: &'static str, idle: Duration },
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
            progress: Arc::default(),
        }
    }

    /// Blocks until `work` gives the next piece of what the upstream sends, of this `length` in bytes.
    ///
    /// # Errors
    /// [`Impatience`], also where it has sent next to nothing for long.
    pub fn read<T>(
        &self,
        work: impl Future<Output = T>,
        length: impl Fn(&T) -> usize,
    ) -> Result<T, Impatience> {
        let (begin, most) = (Instant::now(), DRIBBLES * self.idle);
        let left = self.reading().left(most);
        let piece = self.wait("sent nothing", async {
            tokio::time::timeout(left, work).await
        })?;
        let piece = piece.map_err(|_| Impatience::Silence {
            what: "sent next to nothing",
            idle: most,
        })?;
        self.reading().arrived(length(&piece), begin.elapsed());
        Ok(piece)
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

    fn reading(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
