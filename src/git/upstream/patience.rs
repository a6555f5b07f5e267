//! Waiting for an upstream on a thread of its own: for at most so long, and not beyond a stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;

/// How long a stop may go unnoticed by a fetch that waits.
const LOOK_FOR_STOP: Duration = Duration::from_millis(200);

/// How one fetch waits. Blocks the calling thread, which must not be an async worker.
#[derive(Clone)]
pub(super) struct Patience {
    runtime: Handle,
    idle: Duration,
    stop: Arc<AtomicBool>,
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
        }
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
}
