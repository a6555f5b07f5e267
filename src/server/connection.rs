//! One connection, from its handshake to its end.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use http_body::{Body as _, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;

use super::accept::Ending;
use super::activity::{Activity, Exchange, Expired, Times};
use super::body::RequestBody;
use super::io::Guarded;
use crate::buffers;
use crate::ops::metrics::Metrics;

/// What all connections share.
pub struct Shared {
    /// Answers the requests.
    pub router: Router,
    /// With TLS or without.
    pub tls: Option<TlsAcceptor>,
    pub ending: Ending,
    pub metrics: Arc<Metrics>,
}

/// Where a request comes from; an extension of every request.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// The address of the client, or of the proxy before us.
    pub address: SocketAddr,
    /// Whether it speaks TLS with us.
    pub tls: bool,
}

/// A request body is read into memory as far as the window goes, so this is per connection what a client can make us
/// hold before anybody reads it: with a thousand clients 64 MiB. Large answers are limited by the client's windows, not
/// by these.
const HTTP2_WINDOW: u32 = 64 << 10;
/// What waits in memory for a client's window, per stream: pieces of a pack, as much as is read of one at a time, so that
/// a fast client never waits.
const HTTP2_SEND_BUFFER: usize = buffers::CAPACITY;
/// What of a response goes into a frame of HTTP/2, so that with its header it fills one TLS record: larger frames end in
/// a second record of nine bytes.
const HTTP2_PIECE: usize = (16 << 10) - 9;
/// Git opens one stream at a time, browsers some.
const HTTP2_STREAMS: u32 = 100;
/// Finds clients that are gone without having said so, while they wait and nothing is on its way to them: within a minute.
/// (Else TCP gives up, or `stall` is over.) With pings of HTTP/2 every request would need some 5 % more of the processor, and
/// HTTP/1.1 has none.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(30);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_COUNT: u32 = 3;
/// The head of a request: nothing that we serve needs more, and hyper's 400 KiB for each of a thousand clients is much.
const HEAD_SIZE: usize = 32 << 10;

/// Serves `stream` until either side ends it.
pub async fn serve(stream: TcpStream, address: SocketAddr, times: Times, shared: Arc<Shared>) {
    let _counted = shared.metrics.connection();
    if let Err(error) = prepare(&stream) {
        tracing::debug!(%error, peer = %address, "not all options of the socket are set");
    }
    let activity = Activity::new(times);
    let _listed = shared.ending.connections.add(activity.clone());
    let stream = Guarded::new(stream, activity.clone(), times.stall);
    let Some(tls) = &shared.tls else {
        return http(
            Box::new(stream),
            Peer {
                address,
                tls: false,
            },
            times,
            activity,
            &shared,
        )
        .await;
    };
    let handshake = tokio::select! {
        handshake = timeout(times.handshake, tls.accept(stream)) => handshake,
        () = shared.ending.draining.cancelled() => return,
        () = activity.asked_to_end() => return,
    };
    match handshake {
        Ok(Ok(stream)) => {
            activity.opened();
            http(
                Box::new(stream),
                Peer { address, tls: true },
                times,
                activity,
                &shared,
            )
            .await;
        }
        Ok(Err(error)) => tracing::debug!(%error, peer = %address, "TLS handshake failed"),
        Err(_) => tracing::debug!(peer = %address, "TLS handshake took too long"),
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Answers are written in large pieces; the last, small one should not wait for an acknowledgement.
    stream.set_nodelay(true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_COUNT)?;
    sockopt::set_socket_keepalive(stream, true)?;
    Ok(())
}

/// With TLS or without: behind a pointer, or all of HTTP/1 and HTTP/2 would be in the binary twice.
type Stream = Box<dyn ReadWrite>;
trait ReadWrite: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> ReadWrite for T {}

async fn http(stream: Stream, peer: Peer, times: Times, activity: Arc<Activity>, shared: &Shared) {
    let service = service_fn(|request: Request<Incoming>| {
        let exchange = activity.request(request.version() == Version::HTTP_2);
        answer(shared.router.clone(), request, exchange, peer, times)
    });
    let builder = builder(times);
    let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
    // Looked at when one of them has happened, and not whenever the connection goes on: they are shared by all connections.
    let mut ends = FuturesUnordered::<BoxFuture<'_, End>>::new();
    ends.push(Box::pin(shared.ending.cut.cancelled().map(|()| End::Cut)));
    ends.push(Box::pin(
        shared.ending.draining.cancelled().map(|()| End::Draining),
    ));
    ends.push(Box::pin(activity.expired().map(End::Expired)));
    let mut closing = false;
    loop {
        tokio::select! {
            // First of all the connection itself: a request that has come is served, also when we are to stop.
            biased;
            end = &mut connection => {
                if let Err(error) = end {
                    // With its causes: hyper's own message rarely has the reason.
                    let error = anyhow::Error::from_boxed(error);
                    tracing::debug!(error = format!("{error:#}"), peer = %peer.address, "connection ended");
                }
                return;
            }
            Some(end) = ends.next() => match end {
                End::Cut => return,
                End::Draining if closing => continue,
                End::Draining => {}
                End::Expired(why) => {
                    tracing::debug!(?why, peer = %peer.address, "connection closed");
                    if closing || why != Expired::Idle {
                        return;
                    }
                    ends.push(Box::pin(activity.expired().map(End::Expired)));
                }
            }
        }
        closing = true;
        activity.closing();
        connection.as_mut().graceful_shutdown();
    }
}

/// What ends a connection from outside of it.
enum End {
    /// The time for a drain is over.
    Cut,
    /// The service stops.
    Draining,
    Expired(Expired),
}

fn builder(times: Times) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // Runs from the end of the last response on, so it bounds idle connections; see `activity` for heads.
        .header_read_timeout(times.idle)
        .max_buf_size(HEAD_SIZE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .initial_stream_window_size(HTTP2_WINDOW)
        .initial_connection_window_size(4 * HTTP2_WINDOW)
        .max_send_buf_size(HTTP2_SEND_BUFFER)
        .max_concurrent_streams(HTTP2_STREAMS)
        .max_header_list_size(HEAD_SIZE as u32);
    builder
}

async fn answer(
    router: Router,
    request: Request<Incoming>,
    exchange: Exchange,
    peer: Peer,
    times: Times,
) -> Result<Response<Tracked>, Infallible> {
    let largest = match request.version() {
        Version::HTTP_2 => HTTP2_PIECE,
        _ => buffers::CAPACITY,
    };
    let mut request = request.map(|body| match body.is_end_stream() {
        true => Body::empty(),
        false => Body::new(RequestBody::new(body, times.body_idle)),
    });
    request.extensions_mut().insert(peer);
    let response = router.oneshot(request).await?;
    Ok(response.map(|inner| Tracked {
        inner,
        rest: Bytes::new(),
        largest,
        exchange: Arc::new(exchange),
    }))
}

/// A response body in pieces of a certain size, which reports how they are taken.
struct Tracked {
    inner: Body,
    /// Of what the body gave last.
    rest: Bytes,
    /// Bytes in a piece.
    largest: usize,
    exchange: Arc<Exchange>,
}

/// A piece of a response. As long as it waits for the client, the request is under way, also where its body is at its end.
struct Unsent {
    piece: Bytes,
    exchange: Arc<Exchange>,
}

impl AsRef<[u8]> for Unsent {
    fn as_ref(&self) -> &[u8] {
        &self.piece
    }
}

impl Drop for Unsent {
    fn drop(&mut self) {
        self.exchange.taken(self.piece.len());
    }
}

impl http_body::Body for Tracked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if self.rest.is_empty() {
            match ready!(Pin::new(&mut self.inner).poll_frame(cx)?) {
                Some(frame) => match frame.into_data() {
                    Ok(data) => self.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                None => return Poll::Ready(None),
            }
        }
        let length = self.rest.len().min(self.largest);
        let piece = self.rest.split_to(length);
        self.exchange.given();
        let exchange = Arc::clone(&self.exchange);
        let piece = Bytes::from_owner(Unsent { piece, exchange });
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.inner.size_hint();
        let rest = self.rest.len() as u64;
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper + rest);
        }
        hint.set_lower(hint.lower() + rest);
        hint
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_client_that_is_gone_is_found_within_a_minute() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let (_client, (stream, _)) = (client.unwrap(), accepted.unwrap());
        prepare(&stream).unwrap();
        assert!(sockopt::socket_keepalive(&stream).unwrap());
        let idle = sockopt::tcp_keepidle(&stream).unwrap();
        let count = sockopt::tcp_keepcnt(&stream).unwrap();
        let silent = sockopt::tcp_keepintvl(&stream).unwrap() * count;
        assert_eq!(idle + silent, Duration::from_secs(60));
        assert!(stream.nodelay().unwrap());
    }
}
