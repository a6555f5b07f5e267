//! One line in the access log and the metrics for each request, at the end of its answer.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::body::Body;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, StatusCode, Uri};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::app::App;
use crate::ops::metrics::{Counted, Metrics};
use crate::server::connection::Peer;
use crate::server::panics;

/// Middleware around everything: a handler that panics is recorded as the 500 that it is answered with.
pub async fn record(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let mut record = Record {
        matched: request.extensions().get::<MatchedPath>().cloned(),
        method: request.method().clone(),
        uri: request.uri().clone(),
        peer: request.extensions().get::<Peer>().copied(),
        began: Instant::now(),
        status: None,
        bytes: 0,
        whole: false,
        metrics: app.metrics.clone(),
        _in_flight: app.metrics.http_in_flight(),
    };
    let response = panics::caught(&record.uri, next.run(request)).await;
    record.status = Some(response.status());
    app.metrics
        .http_request(record.route(), &record.method, response.status());
    response.map(|inner| Body::new(Recorded { inner, record }))
}

/// What is known of a request; written down when it is dropped.
struct Record {
    matched: Option<MatchedPath>,
    method: Method,
    uri: Uri,
    peer: Option<Peer>,
    began: Instant,
    /// `None` while there is no answer: the client may leave before.
    status: Option<StatusCode>,
    bytes: u64,
    whole: bool,
    metrics: Arc<Metrics>,
    _in_flight: Counted,
}

impl Record {
    /// Templates only: paths are chosen by clients and would fill the metrics.
    fn route(&self) -> &str {
        self.matched.as_ref().map_or("none", MatchedPath::as_str)
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let elapsed = self.began.elapsed();
        self.metrics
            .http_response(self.route(), elapsed, self.bytes);
        let status = self.status.map_or(0, |status| status.as_u16());
        // Each clone with credentials begins with a 401: git sends none before it has been asked for them.
        let notable = status >= 400 && status != 401;
        let peer = self.peer.map(|peer| tracing::field::display(peer.address));
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    http.method = %self.method,
                    // SECURITY: without the query, which is where other programs put secrets.
                    http.path = self.uri.path(),
                    http.status = status,
                    peer,
                    bytes = self.bytes,
                    whole = self.whole,
                    elapsed_ms = elapsed.as_millis() as u64,
                    "request"
                )
            };
        }
        if notable { line!(info) } else { line!(debug) }
    }
}

struct Recorded {
    inner: Body,
    record: Record,
}

impl http_body::Body for Recorded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let frame = Pin::new(&mut self.inner).poll_frame(cx);
        match &frame {
            Poll::Ready(Some(Ok(frame))) => {
                self.record.bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
                // hyper does not ask again after a body that says that it is over.
                self.record.whole = self.inner.is_end_stream();
            }
            Poll::Ready(None) => self.record.whole = true,
            _ => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
