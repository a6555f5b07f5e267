//! The accept loop over real sockets. Timeouts are either so short that they happen or so long that they never do;
//! what is asserted is the outcome.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::middleware::{Next, from_fn};
use axum::routing::{get as on_get, post};
use bytes::Bytes;
use http_body_util::BodyExt;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::testing::{SOON, Server, config, fed_body, get, http1, http2, raw};
use super::{Listeners, panics, run};
use crate::config::Tls;
use crate::config::identity::Identity;
use crate::error::Error;

fn hello() -> Router {
    Router::new().route(
        "/",
        on_get(async |request: Request| format!("hello over {:?}", request.version())),
    )
}

async fn text(response: hyper::Response<Body>) -> String {
    let bytes = response
        .into_body()
        .collect()
        .await
        .expect("a whole body")
        .to_bytes();
    String::from_utf8(bytes.to_vec()).expect("text")
}

/// One answer with a body that the test feeds.
fn fed() -> (tokio::sync::mpsc::Sender<Bytes>, Router) {
    let (sender, body) = fed_body();
    let body = Arc::new(Mutex::new(Some(body)));
    let handler = async move || body.lock().expect("no panic").take().expect("asked once");
    (sender, Router::new().route("/", on_get(handler)))
}

#[tokio::test]
async fn speaks_http1_and_http2_without_tls() {
    let server = Server::start(hello(), config()).await;
    assert_eq!(
        text(http1(server.connect().await, get("/")).await).await,
        "hello over HTTP/1.1"
    );
    assert_eq!(
        text(http2(server.connect().await, get("/")).await).await,
        "hello over HTTP/2.0"
    );
}

#[tokio::test]
async fn a_head_that_does_not_end_closes_the_connection() {
    let mut config = config();
    config.limits.header_timeout = SOON;
    let server = Server::start(hello(), config).await;
    for start in [
        "",
        "G",
        "GET / HTTP/1.1\r\nhost: x\r\n",
        "PRI * HTTP/2.0\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let answer = raw(&mut server.connect().await, start).await;
        assert!(!answer.contains("200 OK"), "{start:?}: {answer}");
    }
}

#[tokio::test]
async fn a_second_head_that_does_not_end_closes_the_connection() {
    let mut limits = config();
    limits.limits.header_timeout = SOON * 20;
    let server = Server::start(hello(), limits).await;
    let mut stream = server.connect().await;
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("sent");
    let mut first = [0; 16];
    stream.read_exact(&mut first).await.expect("an answer");
    assert_eq!(&first, b"HTTP/1.1 200 OK\r");
    let rest = raw(&mut stream, "GET / HTTP/1.1\r\nhost:").await;
    assert!(rest.ends_with("hello over HTTP/1.1"), "{rest}");
}

#[tokio::test]
async fn a_handshake_that_does_not_end_closes_the_connection() {
    let mut config = config();
    config.limits.tls_handshake_timeout = SOON;
    config.listen.tls = Some(certificate().0);
    let server = Server::start(hello(), config).await;
    assert_eq!(raw(&mut server.connect().await, "\x16\x03\x01").await, "");
    assert_eq!(raw(&mut server.connect().await, "").await, "");
}

#[tokio::test]
async fn a_request_body_that_stops_coming_is_answered_and_closed() {
    let mut config = config();
    config.limits.body_idle_timeout = SOON;
    let read = async |body: Body| match body.collect().await {
        Ok(whole) => Ok(format!("{} bytes", whole.to_bytes().len())),
        Err(error) => Err(Error::from_body(&error)),
    };
    let server = Server::start(Router::new().route("/", post(read)), config).await;
    let head = "POST / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n";
    let whole = raw(
        &mut server.connect().await,
        &format!("{head}content-length: 4\r\n\r\nabcd"),
    )
    .await;
    assert!(whole.ends_with("4 bytes"), "{whole}");
    let head = "POST / HTTP/1.1\r\nhost: x\r\n";
    for body in [
        "content-length: 4\r\n\r\nabc",
        "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
    ] {
        let answer = raw(&mut server.connect().await, &format!("{head}{body}")).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(
            answer.ends_with("stopped coming: send it without pauses.\n"),
            "{answer}"
        );
    }
}

/// Feeds until the server gives the body up.
async fn feed_until_dropped(body: tokio::sync::mpsc::Sender<Bytes>) {
    let piece = Bytes::from(vec![b'x'; 1 << 16]);
    while body.send(piece.clone()).await.is_ok() {}
}

#[tokio::test]
async fn an_http1_client_that_stops_reading_is_cut() {
    let mut config = config();
    config.limits.body_idle_timeout = SOON;
    let (body, router) = fed();
    let server = Server::start(router, config).await;
    let mut stream = server.connect().await;
    stream
        .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("sent");
    feed_until_dropped(body).await;
}

#[tokio::test]
async fn an_http2_stream_whose_window_stays_closed_is_cut() {
    let mut config = config();
    config.limits.body_idle_timeout = SOON;
    let (body, router) = fed();
    let server = Server::start(router, config).await;
    // The client's connection lives and answers pings, but nobody takes the body.
    let _response = http2(server.connect().await, get("/")).await;
    feed_until_dropped(body).await;
}

#[tokio::test]
async fn no_more_connections_than_the_limit_are_served_at_once_and_none_is_refused() {
    let mut config = config();
    config.limits.connections = 2;
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let seen = most.clone();
    let handler = async move || {
        seen.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        now.fetch_sub(1, Ordering::SeqCst);
        "served"
    };
    let server = Arc::new(Server::start(Router::new().route("/", on_get(handler)), config).await);
    let clients = (0..20).map(|_| {
        let server = server.clone();
        tokio::spawn(async move {
            let request = "GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
            raw(&mut server.connect().await, request).await
        })
    });
    for answer in futures_util::future::join_all(clients).await {
        assert!(answer.expect("no panic").ends_with("served"));
    }
    assert!(most.load(Ordering::SeqCst) <= 2);
}

/// Longer than connections without a request keep a place for which others wait, and shorter than they keep any.
const A_WHILE: Duration = Duration::from_secs(30);

/// Asks for `/hello`, waiting for a place, and stays.
async fn hello_and_stay(server: &Server) -> TcpStream {
    let mut stream = server.connect().await;
    stream
        .write_all(b"GET /hello HTTP/1.1\r\nhost: x\r\n\r\n")
        .await
        .expect("sent");
    let mut first = [0; 16];
    timeout(A_WHILE, stream.read_exact(&mut first))
        .await
        .expect("a place")
        .expect("an answer");
    assert_eq!(&first, b"HTTP/1.1 200 OK\r");
    stream
}

#[tokio::test]
async fn connections_without_a_request_make_room_for_others() {
    let mut config = config();
    config.limits.connections = 3;
    let (body, router) = fed();
    let router = router.route("/hello", on_get(async || "hello"));
    let server = Server::start(router, config).await;
    let busy = http1(server.connect().await, get("/")).await;
    let mut silent = server.connect().await;
    let mut first = hello_and_stay(&server).await;
    let mut second = hello_and_stay(&server).await;
    assert_eq!(raw(&mut silent, "").await, "");
    let third = hello_and_stay(&server).await;
    assert!(raw(&mut first, "").await.ends_with("hello"));
    let fourth = hello_and_stay(&server).await;
    assert!(raw(&mut second, "").await.ends_with("hello"));

    body.send("still here".into()).await.expect("taken");
    drop(body);
    assert_eq!(text(busy).await, "still here");
    drop((third, fourth));
}

#[tokio::test]
async fn a_handshake_that_does_not_begin_makes_room_for_others() {
    let mut config = config();
    config.limits.connections = 1;
    let (identity, trusted) = certificate();
    config.listen.tls = Some(identity);
    let server = Server::start(hello(), config).await;
    let mut silent = server.connect().await;
    let stream = timeout(A_WHILE, tls(&server, &trusted, &["http/1.1"]))
        .await
        .expect("a place")
        .expect("a handshake");
    assert_eq!(raw(&mut silent, "").await, "");
    assert_eq!(
        text(http1(stream, get("/")).await).await,
        "hello over HTTP/1.1"
    );
}

#[tokio::test]
async fn a_handler_that_panics_costs_one_request() {
    let panic = async || -> &'static str { panic!("told to") };
    let catch = async |request: Request<Body>, next: Next| {
        let uri = request.uri().clone();
        panics::caught(&uri, next.run(request)).await
    };
    let router = hello().route("/panic", on_get(panic)).layer(from_fn(catch));
    let server = Server::start(router, config()).await;
    let requests = "GET /panic HTTP/1.1\r\nhost: x\r\n\r\nGET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let answer = raw(&mut server.connect().await, requests).await;
    assert!(answer.starts_with("HTTP/1.1 500 "), "{answer}");
    assert!(!answer.contains("told to"), "{answer}");
    assert!(answer.ends_with("hello over HTTP/1.1"), "{answer}");
}

#[tokio::test]
async fn a_drain_lets_bodies_finish_and_closes_idle_connections() {
    for http2_too in [false, true] {
        let (body, router) = fed();
        let server = Server::start(router.route("/idle", on_get(async || "idle")), config()).await;
        let mut idle = server.connect().await;
        idle.write_all(b"GET /idle HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .expect("sent");
        let stream = server.connect().await;
        let response = if http2_too {
            http2(stream, get("/")).await
        } else {
            http1(stream, get("/")).await
        };
        let mut received = response.into_body();
        body.send("first, ".into()).await.expect("taken");
        let first = received.frame().await.expect("a frame").expect("no error");
        assert_eq!(first.into_data().expect("data"), "first, ");

        server.draining.cancel();
        let mut answer = String::new();
        idle.read_to_string(&mut answer)
            .await
            .expect("closed in order");
        assert!(answer.ends_with("idle"), "{answer}");
        body.send("last".into()).await.expect("still taken");
        drop(body);
        let rest = received.collect().await.expect("not cut").to_bytes();
        assert_eq!(rest, "last");

        let address = server.address;
        assert_eq!(server.stop().await, 0);
        assert!(TcpStream::connect(address).await.is_err());
    }
}

#[tokio::test]
async fn a_drain_ends_at_its_limit_and_counts_whom_it_cut() {
    let mut config = config();
    config.limits.drain_timeout = SOON;
    let (body, router) = fed();
    let server = Server::start(router, config).await;
    let response = http1(server.connect().await, get("/")).await;
    assert_eq!(server.stop().await, 1);
    assert!(response.into_body().collect().await.is_err());
    assert!(body.send(Bytes::new()).await.is_err());
}

#[tokio::test]
async fn the_whole_service_starts_answers_and_stops() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = config();
    config.data_dir = folder.path().to_owned();
    let listeners = Listeners::bind(&config.listen).await.expect("a free port");
    let address = listeners.http.local_addr().expect("bound");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let (_sender, config) = tokio::sync::watch::channel(Arc::new(config));
    let shutdown = async move { stopped.await.expect("told to stop") };
    let service = tokio::spawn(run(config, listeners, shutdown));

    let stream = TcpStream::connect(address).await.expect("connected");
    assert_eq!(text(http1(stream, get("/healthz")).await).await, "ok\n");
    let stream = TcpStream::connect(address).await.expect("connected");
    let page = text(http2(stream, get("/")).await).await;
    assert!(page.contains("http://dock.test/git/"), "{page}");

    stop.send(()).expect("running");
    service.await.expect("no panic").expect("no error");
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test]
async fn an_address_that_is_taken_is_named() {
    let first = Listeners::bind(&config().listen)
        .await
        .expect("a free port");
    let mut listen = config().listen;
    listen.http = first.http.local_addr().expect("bound");
    let error = Listeners::bind(&listen).await.err().expect("taken");
    assert_eq!(
        error.to_string(),
        format!("listen.http: cannot listen on {}", listen.http)
    );
}

fn certificate() -> (Tls, CertificateDer<'static>) {
    let made = rcgen::generate_simple_self_signed(["dock.test".to_owned()]).expect("a certificate");
    let (cert, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    let identity = Identity::from_pem(cert.as_bytes(), key.as_bytes()).expect("a pair");
    let tls = Tls {
        cert: "/tls.crt".into(),
        key: "/tls.key".into(),
        identity,
    };
    (tls, made.cert.der().clone())
}

/// Connects, trusting this one certificate only.
async fn tls(
    server: &Server,
    trusted: &CertificateDer<'static>,
    alpn: &[&str],
) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(trusted.clone()).expect("a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = ServerName::try_from("dock.test").expect("a name");
    TlsConnector::from(Arc::new(config))
        .connect(name, server.connect().await)
        .await
}

#[tokio::test]
async fn tls_chooses_the_version_of_http() {
    let mut config = config();
    let (identity, trusted) = certificate();
    config.listen.tls = Some(identity);
    let server = Server::start(hello(), config).await;

    let stream = tls(&server, &trusted, &["h2", "http/1.1"])
        .await
        .expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(
        text(http2(stream, get("/")).await).await,
        "hello over HTTP/2.0"
    );

    let stream = tls(&server, &trusted, &["http/1.1"])
        .await
        .expect("a handshake");
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
    assert_eq!(
        text(http1(stream, get("/")).await).await,
        "hello over HTTP/1.1"
    );

    let stream = tls(&server, &trusted, &[]).await.expect("a handshake");
    assert_eq!(
        text(http1(stream, get("/")).await).await,
        "hello over HTTP/1.1"
    );
}

#[tokio::test]
async fn a_new_certificate_is_for_new_connections_and_old_ones_go_on() {
    let mut config = config();
    let (first, trust_first) = certificate();
    let (second, trust_second) = certificate();
    config.listen.tls = Some(first);
    let server = Server::start(hello(), config.clone()).await;
    let before = tls(&server, &trust_first, &["h2"])
        .await
        .expect("a handshake");
    assert!(tls(&server, &trust_second, &["h2"]).await.is_err());

    config.listen.tls = Some(second);
    server.config.send_replace(Arc::new(config));
    let after = tls(&server, &trust_second, &["h2"])
        .await
        .expect("a handshake");
    assert!(tls(&server, &trust_first, &["h2"]).await.is_err());
    for stream in [before, after] {
        assert_eq!(
            text(http2(stream, get("/")).await).await,
            "hello over HTTP/2.0"
        );
    }
}
