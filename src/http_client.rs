//! The HTTP client for every upstream that packs, crates and keys come from: certificates, time to connect, and where
//! redirects may lead.

use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use reqwest::redirect::{Attempt, Policy};

/// Who asks. crates.io refuses clients that do not say.
pub const AGENT: &str = concat!(
    "warmdock/",
    env!("CARGO_PKG_VERSION"),
    " (cache for container builds)"
);

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MOST_REDIRECTS: usize = 5;
/// What may lie unread of all answers on one HTTP/2 connection, in bytes. Of one answer 2 MiB may: some that are passed on,
/// to clients who do not take them, hold up nothing else from that host.
const CONNECTION_WINDOW: u32 = 64 << 20;

/// Where an upstream may send us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirects {
    /// SECURITY: our credentials go to the host that the operator named and to no other, and never from https to
    /// http.
    SameOrigin,
    /// Also to other hosts, as registries send to the storage of their files; never from https to http. The redirect
    /// there is the answer: whoever asked follows it, without credentials.
    OtherHosts,
    /// Nowhere: a redirect is an error.
    None,
}

/// A client. Reads certificates from disk.
///
/// # Errors
/// No usable certificates.
pub fn client(redirects: Redirects) -> anyhow::Result<reqwest::Client> {
    builder(redirects).build().context(
        "the HTTP client cannot be made: are there CA certificates? SSL_CERT_FILE names a bundle",
    )
}

/// When the file of CA certificates was changed, and its bytes.
pub type Bundle = (SystemTime, u64);

/// The file of CA certificates that `SSL_CERT_FILE` names, as it is now: a client that was made from another one is out
/// of date.
pub fn bundle() -> Option<Bundle> {
    let found = fs::metadata(std::env::var_os("SSL_CERT_FILE")?).ok()?;
    Some((found.modified().ok()?, found.len()))
}

fn builder(redirects: Redirects) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .redirect(Policy::custom(move |attempt| follow(attempt, redirects)))
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_initial_connection_window_size(CONNECTION_WINDOW)
}

fn follow(attempt: Attempt<'_>, redirects: Redirects) -> reqwest::redirect::Action {
    let first = &attempt.previous()[0];
    let same = first.origin() == attempt.url().origin();
    let downgraded = first.scheme() == "https" && attempt.url().scheme() != "https";
    if redirects == Redirects::None {
        attempt.error("it redirects, and only its own answer counts")
    } else if attempt.previous().len() > MOST_REDIRECTS {
        attempt.error("it redirects without end")
    } else if same {
        attempt.follow()
    } else if redirects == Redirects::OtherHosts && !downgraded {
        // SECURITY: reqwest, if it followed, would leave credentials off here, and put them on again for the next
        // redirect at that host.
        attempt.stop()
    } else {
        let elsewhere = attempt.url().origin().ascii_serialization();
        attempt.error(format!(
            "it redirects to {elsewhere}: configure that host as the upstream"
        ))
    }
}

/// The message of an HTTP client's error with its causes, without the URL.
pub fn describe(error: &reqwest::Error) -> String {
    let mut text = if error.is_connect() {
        "it cannot be reached".to_owned()
    } else {
        "the connection failed".to_owned()
    };
    let mut cause = std::error::Error::source(error);
    let mut last = None;
    while let Some(next) = cause {
        last = Some(next.to_string());
        cause = next.source();
    }
    if let Some(last) = last {
        text = format!("{text}: {last}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::ready;

    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::body::Incoming;
    use hyper::server::conn::http2;
    use hyper::service::service_fn;
    use hyper::{Request, Response};
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn answers_that_nobody_reads_hold_up_no_other() {
        const LENGTH: usize = 3 << 20;
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let body = Full::new(Bytes::from(vec![0; LENGTH]));
            let answer = service_fn(move |_: Request<Incoming>| {
                ready(Ok::<_, Infallible>(Response::new(body.clone())))
            });
            http2::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), answer)
                .await
        });
        let client = builder(Redirects::SameOrigin)
            .no_proxy()
            .tls_certs_only([])
            .http2_prior_knowledge();
        let client = client.build().unwrap();
        let mut unread = Vec::new();
        for _ in 0..16 {
            unread.push(client.get(&url).send().await.unwrap());
        }
        let read = client.get(&url).send().await.unwrap().bytes();
        let read = timeout(Duration::from_secs(60), read).await;
        assert_eq!(read.expect("it is held up").unwrap().len(), LENGTH);
        drop(unread);
    }
}
