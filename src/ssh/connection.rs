//! One connection of a client, from its handshake to its end.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use russh::keys::PrivateKey;
use russh::server::{self, run_stream};
use russh::{Disconnect, MethodKind, MethodSet, Preferred, SshId};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use super::algorithms;
use super::greeting::{self, AES_GCM};
use super::session::{Session, State};
use crate::app::App;
use crate::server::accept::Ending;
use crate::server::activity::{Activity, Times};
use crate::server::io::Guarded;

/// What all connections share.
pub struct Shared {
    pub app: Arc<App>,
    pub protocol: Protocol,
    pub ending: Ending,
}

/// OpenSSH's default is six; agents with more keys than that are common.
pub(super) const LOGIN_ATTEMPTS: usize = 10;
/// SECURITY: a refusal takes as long whether the key is nobody's, of a kind that is not taken, or badly signed.
const REFUSAL: Duration = Duration::from_millis(100);
/// Finds clients that are gone without having said so.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVES_UNANSWERED: usize = 3;
/// What a client can make us hold for each channel; requests are small.
const WINDOW: u32 = 256 << 10;
/// Messages that wait for a channel, and for the connection. Each has 32 KiB at most.
const QUEUE: usize = 16;
/// Clients end their connection themselves when their command is done; who was told first would report an error.
const PARTING: Duration = Duration::from_secs(2);

const IDENTIFICATION: &str = concat!("SSH-2.0-warmdock_", env!("CARGO_PKG_VERSION"));

/// How we speak SSH to clients.
pub struct Protocol {
    any: Arc<server::Config>,
    /// For clients that know AES-GCM, where the processor has instructions for it.
    aes_gcm: Option<Arc<server::Config>>,
}

impl Protocol {
    pub fn new(host_key: &PrivateKey) -> Self {
        let offering = |preferred| {
            Arc::new(server::Config {
                server_id: SshId::Standard(IDENTIFICATION.into()),
                methods: MethodSet::from(&[MethodKind::PublicKey][..]),
                auth_rejection_time: REFUSAL,
                // Every client begins with a question that is always refused.
                auth_rejection_time_initial: Some(Duration::ZERO),
                keys: vec![host_key.clone()],
                window_size: WINDOW,
                channel_buffer_size: QUEUE,
                event_buffer_size: QUEUE,
                preferred,
                max_auth_attempts: LOGIN_ATTEMPTS,
                // Bounded here and in `session`: what counts is whether something is under way.
                inactivity_timeout: None,
                keepalive_interval: Some(KEEPALIVE),
                keepalive_max: KEEPALIVES_UNANSWERED,
                ..server::Config::default()
            })
        };
        let aes_gcm = Preferred {
            cipher: Cow::Borrowed(AES_GCM),
            ..algorithms()
        };
        Self {
            any: offering(algorithms()),
            aes_gcm: greeting::has_instructions().then(|| offering(aes_gcm)),
        }
    }

    fn with(&self, knows_aes_gcm: bool) -> Arc<server::Config> {
        let aes_gcm = self.aes_gcm.as_ref().filter(|_| knows_aes_gcm);
        Arc::clone(aes_gcm.unwrap_or(&self.any))
    }
}

/// Serves `stream` until either side ends it.
pub async fn serve(stream: TcpStream, peer: SocketAddr, times: Times, shared: Arc<Shared>) {
    let _counted = shared.app.metrics.ssh_connection();
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, %peer, "no TCP_NODELAY");
    }
    let activity = Activity::new(times);
    let _listed = shared.ending.connections.add(Arc::clone(&activity));
    let cut = shared.ending.cut.child_token();
    let stream = Cuttable {
        inner: Guarded::new(stream, Arc::clone(&activity), times.stall),
        cut: Box::pin(cut.clone().cancelled_owned()),
    };
    let state = Arc::new(State::new(Arc::clone(&activity)));
    let session = Session::new(Arc::clone(&shared), peer, times, Arc::clone(&state));
    let login = shared.app.config().limits.ssh_login_timeout;
    let greeting = async {
        let greeted = greeting::exchange(stream, IDENTIFICATION).await?;
        // Keys are exchanged and shown next, which takes some times the way there and back.
        activity.opened();
        let protocol = shared.protocol.with(greeted.knows_aes_gcm);
        run_stream(protocol, greeted, session).await
    };
    let running = tokio::select! {
        greeting = timeout(login, greeting) => match greeting {
            Ok(Ok(running)) => running,
            Ok(Err(error)) => return tracing::debug!(%error, %peer, "no SSH client"),
            Err(_) => return tracing::debug!(%peer, "no SSH client: it says nothing"),
        },
        () = shared.ending.draining.cancelled() => return,
        () = activity.asked_to_end() => {
            return tracing::debug!(%peer, "no SSH client yet, and others wait for its place");
        }
    };
    let handle = running.handle();
    let mut running = pin!(running);
    loop {
        tokio::select! {
            end = &mut running => return ended(peer, end),
            () = shared.ending.cut.cancelled() => break,
            (reason, why) = worth_nothing(&activity, &state, login, times.idle, &shared.ending.draining) => {
                if state.is_busy() {
                    // Since a moment.
                    continue;
                }
                tracing::debug!(%peer, why, "connection closed");
                activity.closing();
                let goodbye = handle.disconnect(reason, why.to_owned(), "en".to_owned());
                let parted = timeout(PARTING, async {
                    let _ = goodbye.await;
                    (&mut running).await
                });
                if let Ok(end) = parted.await {
                    return ended(peer, end);
                }
                break;
            }
        }
    }
    // Whatever it waits for, it finds that there is nothing any more.
    cut.cancel();
    state.forget_channels();
    ended(peer, running.await);
}

fn ended(peer: SocketAddr, end: Result<(), russh::Error>) {
    if let Err(error) = end {
        tracing::debug!(%error, %peer, "connection ended");
    }
}

/// Returns, with the reason, when a connection is not worth keeping: after a while, or sooner where others wait.
async fn worth_nothing(
    activity: &Activity,
    state: &State,
    login: Duration,
    idle: Duration,
    draining: &CancellationToken,
) -> (Disconnect, &'static str) {
    tokio::select! {
        why = over(state, login, idle, draining) => (Disconnect::ByApplication, why),
        () = activity.asked_to_end() => (
            Disconnect::TooManyConnections,
            "nothing is done on this connection, and others wait for its place",
        ),
    }
}

/// Returns, with the reason, when a connection has had its time.
async fn over(
    state: &State,
    login: Duration,
    idle: Duration,
    draining: &CancellationToken,
) -> &'static str {
    tokio::select! {
        in_time = timeout(login, state.logged_in()) => if in_time.is_err() {
            return "the time to log in is over";
        },
        () = draining.cancelled() => return "the service is stopping",
    }
    loop {
        state.no_commands().await;
        tokio::select! {
            () = state.some_command() => {}
            () = sleep(idle) => return "nothing was asked for a while",
            () = async {
                draining.cancelled().await;
                sleep(PARTING).await;
            } => return "the service is stopping",
        }
    }
}

/// A stream that ends when it is told to: russh has the other end of it, in a task of its own.
struct Cuttable<T> {
    inner: T,
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<T> Cuttable<T> {
    fn is_cut(&mut self, cx: &mut Context<'_>) -> bool {
        self.cut.as_mut().poll(cx).is_ready()
    }
}

fn aborted() -> std::io::Error {
    std::io::ErrorKind::ConnectionAborted.into()
}

impl<T: AsyncRead + Unpin> AsyncRead for Cuttable<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        if self.is_cut(cx) {
            return Poll::Ready(Err(aborted()));
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Cuttable<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.is_cut(cx) {
            return Poll::Ready(Err(aborted()));
        }
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        if self.is_cut(cx) {
            return Poll::Ready(Err(aborted()));
        }
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
