//! The accept loop and the drain, the same for every door.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::activity::{Connections, Times};
use crate::config::Config;

/// After an error that is not the client's, such as too many open files: time for some of them to be closed.
const PAUSE_AFTER_ERROR: Duration = Duration::from_secs(1);
/// A crowd fills the connections many times a second; the log needs to hear of it once in a while.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// How long one connection is waited for that was asked to end, before another is asked as well.
const ASK_EVERY: Duration = Duration::from_millis(200);

/// How connections are told to end.
#[derive(Clone, Default)]
pub struct Ending {
    /// Cancelled when the service stops: finish what is under way.
    pub draining: CancellationToken,
    /// Cancelled when that has taken too long.
    pub cut: CancellationToken,
    /// One door's connections: when all places are taken, those without a request are asked to end.
    pub connections: Connections,
}

/// Accepts connections and has `serve` serve them until `ending.draining` is cancelled, then lets them finish what is
/// under way for at most `limits.drain_timeout` and returns how many had to be cut.
pub async fn run<S, F>(
    listener: TcpListener,
    config: watch::Receiver<Arc<Config>>,
    ending: Ending,
    serve: S,
) -> usize
where
    S: Fn(TcpStream, SocketAddr, Times) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let slots = Slots::new(
        config.borrow().limits.connections,
        ending.connections.clone(),
    );
    let connections = TaskTracker::new();
    let accepting = async {
        let mut slots = slots;
        loop {
            // Accepted first: whether somebody waits for a place is not known otherwise.
            let (stream, address) = accept(&listener).await;
            let slot = slots.next().await;
            let times = Times::of(&config.borrow().limits);
            let serving = serve(stream, address, times);
            connections.spawn(async move {
                let _held = slot;
                serving.await;
            });
        }
    };
    tokio::select! {
        () = ending.draining.cancelled() => {}
        () = accepting => {}
    }
    drop(listener);
    drain(&connections, &config, &ending).await
}

async fn drain(
    connections: &TaskTracker,
    config: &watch::Receiver<Arc<Config>>,
    ending: &Ending,
) -> usize {
    let limit = config.borrow().limits.drain_timeout;
    connections.close();
    tracing::info!(
        connections = connections.len(),
        limit_s = limit.as_secs(),
        "draining"
    );
    if timeout(limit, connections.wait()).await.is_ok() {
        tracing::info!("drained");
        return 0;
    }
    let cut = connections.len();
    tracing::warn!(
        connections = cut,
        limit_s = limit.as_secs(),
        "connections cut: they did not finish in time"
    );
    ending.cut.cancel();
    connections.wait().await;
    cut
}

async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            Err(error) if is_of_one_client(&error) => tracing::debug!(%error, "a client went away"),
            Err(error) => {
                tracing::error!(%error, "cannot accept connections, trying again");
                sleep(PAUSE_AFTER_ERROR).await;
            }
        }
    }
}

fn is_of_one_client(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset
    )
}

/// The connections that may be open. When all are taken nobody is refused: the system's queue holds who comes next.
///
/// SECURITY: whoever asks whether the service is alive waits there as well, so connections without a request are asked
/// to end.
struct Slots {
    free: Arc<Semaphore>,
    limit: usize,
    taken_by: Connections,
    warned: Option<Instant>,
}

impl Slots {
    fn new(limit: usize, taken_by: Connections) -> Self {
        Self {
            free: Arc::new(Semaphore::new(limit.clamp(1, Semaphore::MAX_PERMITS))),
            limit,
            taken_by,
            warned: None,
        }
    }

    async fn next(&mut self) -> OwnedSemaphorePermit {
        if let Ok(permit) = self.free.clone().try_acquire_owned() {
            return permit;
        }
        if self
            .warned
            .is_none_or(|warned| warned.elapsed() >= WARN_EVERY)
        {
            self.warned = Some(Instant::now());
            tracing::warn!(
                limit = self.limit,
                "all connections of limits.connections are taken, others wait"
            );
        }
        loop {
            self.taken_by.ask_one_to_end();
            let free = self.free.clone().acquire_owned();
            if let Ok(permit) = timeout(ASK_EVERY, free).await {
                return permit.expect("nobody closes this semaphore");
            }
        }
    }
}
