//! Passes requests through to an upstream over HTTP while the first clone of a repository is under way, so that for the
//! first clients a cold miss takes no longer than going there directly. Nothing of what passes is kept.

use std::sync::Arc;

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::response::Response;
use bytes::Bytes;
use futures_util::StreamExt;
use tokio::time::timeout;

use crate::git::name::RepoName;
use crate::git::pool::{Passing, PoolError};
use crate::git::upstream::http::HttpUpstream;
use crate::ops::metrics::{AnswerKind, Metrics};

const GIT_PROTOCOL: HeaderName = HeaderName::from_static("git-protocol");

/// What of a request goes to the upstream.
pub struct Relayed {
    pub method: Method,
    /// Below the repository: `info/refs?service=git-upload-pack` or `git-upload-pack`.
    pub tail: &'static str,
    pub body: Bytes,
    /// For a pack.
    pub place: Option<Passing>,
}

/// Asks the upstream and streams its answer; `None` where it sent the request on to another address. Git would ask there
/// from then on, but the client does not know of it, and a POST that is sent on may come there as a GET without a body.
///
/// SECURITY: of the client's headers only those that Git's protocol needs go up: not its credentials, which are
/// meant for us. Of the upstream's only the content type comes down.
///
/// # Errors
/// What the upstream answered instead, or that it did not.
pub async fn relay(
    upstream: &HttpUpstream,
    name: &RepoName,
    request: Relayed,
    headers: &HeaderMap,
    metrics: Arc<Metrics>,
) -> Result<Option<Response>, PoolError> {
    let mut outgoing = upstream.request(request.method, name.path(), request.tail);
    for header in [GIT_PROTOCOL, CONTENT_TYPE, CONTENT_ENCODING] {
        if let Some(value) = headers.get(&header) {
            outgoing = outgoing.header(header, value);
        }
    }
    let failed = |error: reqwest::Error| {
        PoolError::Upstream(format!(
            "{}: {}",
            upstream.name(),
            HttpUpstream::describe(&error)
        ))
    };
    let idle = upstream.idle();
    let (client, outgoing) = outgoing.body(request.body).build_split();
    let outgoing = outgoing.map_err(failed)?;
    let asked = outgoing.url().clone();
    let answered = timeout(idle, client.execute(outgoing)).await;
    let silent = || {
        format!(
            "{}: it sent nothing for {}",
            upstream.name(),
            humantime::format_duration(idle)
        )
    };
    let incoming = answered
        .map_err(|_| PoolError::Upstream(silent()))?
        .map_err(failed)?;
    if *incoming.url() != asked {
        return Ok(None);
    }
    if !incoming.status().is_success() {
        return Err(upstream.refusal(incoming.status()).into());
    }
    let kind = incoming.headers().get(CONTENT_TYPE).cloned();
    if !kind.as_ref().is_some_and(|kind| {
        kind.as_bytes()
            .starts_with(b"application/x-git-upload-pack-")
    }) {
        return Err(PoolError::Upstream(format!(
            "{}: expected an answer of Git's protocol, found {:?}: is the upstream's URL right?",
            upstream.name(),
            kind.unwrap_or_else(|| HeaderValue::from_static("no content type"))
        )));
    }

    let counted = Counted {
        metrics,
        bytes: 0,
        _place: request.place,
    };
    let stream = futures_util::stream::unfold(
        (incoming.bytes_stream(), counted),
        move |(mut incoming, mut counted)| async move {
            let next = match timeout(idle, incoming.next()).await {
                Ok(next) => next?.map_err(std::io::Error::other),
                Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut)),
            };
            counted.bytes += next.as_ref().map_or(0, |chunk| chunk.len() as u64);
            Some((next, (incoming, counted)))
        },
    );
    let mut response = Response::new(Body::from_stream(stream));
    response
        .headers_mut()
        .extend(kind.map(|kind| (CONTENT_TYPE, kind)));
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(Some(response))
}

/// Counts what went through, also when the client leaves early.
struct Counted {
    metrics: Arc<Metrics>,
    bytes: u64,
    _place: Option<Passing>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.metrics.answer(AnswerKind::Relayed, self.bytes);
    }
}
