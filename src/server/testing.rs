//! A server with routes of a test's own, and clients that can be told to misbehave.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use hyper::client::conn::{http1, http2};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::accept::Ending;
use super::connection::{self, Shared};
use super::{accept, tls};
use crate::config::Config;
use crate::config::environment::Environment;
use crate::ops::metrics::Metrics;

/// Longer than anything that a test waits for: whoever reaches it has failed.
pub const NEVER: Duration = Duration::from_secs(3600);
/// Short, for the timeout that a test wants to happen.
pub const SOON: Duration = Duration::from_millis(50);

pub struct Server {
    pub address: SocketAddr,
    pub config: watch::Sender<Arc<Config>>,
    pub draining: CancellationToken,
    /// How many connections were cut.
    pub task: JoinHandle<usize>,
}

/// The embedded default with all timeouts at [`NEVER`].
pub fn config() -> Config {
    let mut config = Config::parse("{}", &Environment::default()).expect("the default");
    config.listen.http = ([127, 0, 0, 1], 0).into();
    let limits = &mut config.limits;
    limits.tls_handshake_timeout = NEVER;
    limits.header_timeout = NEVER;
    limits.body_idle_timeout = NEVER;
    limits.drain_timeout = NEVER;
    config
}

impl Server {
    pub async fn start(router: Router, config: Config) -> Self {
        let listener = TcpListener::bind(config.listen.http)
            .await
            .expect("a free port");
        let address = listener.local_addr().expect("bound");
        let has_tls = config.listen.tls.is_some();
        let (sender, config) = watch::channel(Arc::new(config));
        let ending = Ending::default();
        let draining = ending.draining.clone();
        let shared = Arc::new(Shared {
            router,
            tls: has_tls.then(|| tls::acceptor(config.clone()).expect("TLS")),
            ending: ending.clone(),
            metrics: Arc::new(Metrics::new()),
        });
        let serve = move |stream, address, times| {
            connection::serve(stream, address, times, Arc::clone(&shared))
        };
        let task = tokio::spawn(accept::run(listener, config, ending, serve));
        Self {
            address,
            config: sender,
            draining,
            task,
        }
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("connected")
    }

    /// Stops it and waits for the end; how many connections were cut.
    pub async fn stop(self) -> usize {
        self.draining.cancel();
        self.task.await.expect("no panic")
    }
}

/// Sends `request` as it is and returns all that comes until the server closes the connection.
pub async fn raw(stream: &mut TcpStream, request: &str) -> String {
    // Either side may be first to go: what came until then counts.
    let _ = stream.write_all(request.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

pub fn get(path: &str) -> Request<Body> {
    let uri = format!("http://dock.test{path}");
    Request::get(uri)
        .header("host", "dock.test")
        .body(Body::empty())
        .expect("a request")
}

pub async fn http1<T>(stream: T, request: Request<Body>) -> Response<Body>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .expect("a handshake");
    tokio::spawn(connection);
    sender
        .send_request(request)
        .await
        .expect("an answer")
        .map(Body::new)
}

pub async fn http2<T>(stream: T, request: Request<Body>) -> Response<Body>
where
    T: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
        .await
        .expect("a handshake");
    tokio::spawn(connection);
    sender
        .send_request(request)
        .await
        .expect("an answer")
        .map(Body::new)
}

/// A response body that the test feeds; sending fails when the server has dropped it.
pub fn fed_body() -> (mpsc::Sender<Bytes>, Body) {
    let (sender, mut receiver) = mpsc::channel(1);
    let pieces = futures_util::stream::poll_fn(move |cx| {
        receiver
            .poll_recv(cx)
            .map(|piece| piece.map(Ok::<_, std::io::Error>))
    });
    (sender, Body::from_stream(pieces))
}
