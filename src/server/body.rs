//! Bodies that may not dribble: those of requests, and by the same measure those of upstreams.

use std::error::Error as StdError;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

/// The cause of an error in a request body that stopped coming; [`crate::error::Error::from_body`] makes 408 of it.
#[derive(Debug, thiserror::Error)]
#[error("the request body stopped coming")]
pub struct Idle;

/// SECURITY: what has to arrive before the time begins anew. With one byte as measure, a client could hold a
/// connection for days with a byte now and then; no line that can carry a clone is this slow.
const PROGRESS: usize = 1024;

/// How far somebody is with the next [`PROGRESS`] bytes, and how long we have been kept waiting for them.
#[derive(Default)]
pub struct Progress {
    received: usize,
    waited: Duration,
}

impl Progress {
    /// So many bytes came after such a wait.
    pub fn arrived(&mut self, bytes: usize, waited: Duration) {
        self.received += bytes;
        self.waited += waited;
        if self.received >= PROGRESS {
            *self = Self::default();
        }
    }

    /// How much longer to wait, where that may be `limit` in all.
    pub fn left(&self, limit: Duration) -> Duration {
        limit.saturating_sub(self.waited)
    }
}

/// A request body that fails with [`Idle`] when the client keeps us waiting for longer than `limit` without
/// [`PROGRESS`] bytes. Only waiting counts: a handler may take its time between two reads.
pub struct RequestBody<B> {
    inner: B,
    limit: Duration,
    progress: Progress,
    waiting: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl<B> RequestBody<B> {
    /// Guards `inner`.
    pub fn new(inner: B, limit: Duration) -> Self {
        Self {
            inner,
            limit,
            progress: Progress::default(),
            waiting: None,
        }
    }

    fn arrived(&mut self, bytes: usize) {
        let since = self.waiting.take().map(|(since, _)| since);
        let waited = since.map_or(Duration::ZERO, |since| since.elapsed());
        self.progress.arrived(bytes, waited);
    }
}

impl<B> Body for RequestBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn StdError + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Box<dyn StdError + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.inner).poll_frame(cx) {
            let bytes = match &frame {
                Some(Ok(frame)) => frame.data_ref().map_or(0, Bytes::len),
                _ => 0,
            };
            this.arrived(bytes);
            return Poll::Ready(frame.map(|frame| frame.map_err(Into::into)));
        }
        let left = this.progress.left(this.limit);
        let (_, timer) = this
            .waiting
            .get_or_insert_with(|| (Instant::now(), Box::pin(sleep(left))));
        timer
            .as_mut()
            .poll(cx)
            .map(|()| Some(Err(Box::new(Idle) as Self::Error)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, Full, StreamBody};
    use tokio::sync::mpsc;

    use super::*;

    /// A body of pieces that each come after a pause.
    fn pieces(
        pieces: Vec<(Duration, usize)>,
    ) -> impl Body<Data = Bytes, Error = std::io::Error> + Unpin {
        let (sender, mut receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            for (pause, length) in pieces {
                sleep(pause).await;
                let piece = Frame::data(Bytes::from(vec![b'x'; length]));
                if sender.send(Ok(piece)).await.is_err() {
                    return;
                }
            }
        });
        StreamBody::new(futures_util::stream::poll_fn(move |cx| {
            receiver.poll_recv(cx)
        }))
    }

    async fn read(body: impl Body<Data = Bytes, Error = std::io::Error> + Unpin) -> Option<usize> {
        let limit = Duration::from_secs(30);
        match RequestBody::new(body, limit).collect().await {
            Ok(whole) => Some(whole.to_bytes().len()),
            Err(error) => {
                assert!(error.is::<Idle>(), "{error}");
                None
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_with_pauses_below_the_limit_is_read() {
        let second = Duration::from_secs(1);
        assert_eq!(
            read(pieces(vec![(second * 29, 2048); 10])).await,
            Some(20_480)
        );
        assert_eq!(read(pieces(vec![])).await, Some(0));
        let whole = Full::new(Bytes::from_static(b"x")).map_err(|never| match never {});
        assert_eq!(read(whole).await, Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_fails() {
        let second = Duration::from_secs(1);
        assert_eq!(
            read(pieces(vec![(second, 4096), (second * 31, 1)])).await,
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_dribbles_fails() {
        assert_eq!(
            read(pieces(vec![(Duration::from_secs(10), 1); 1000])).await,
            None
        );
    }

    #[tokio::test(start_paused = true)]
    async fn time_that_the_handler_takes_does_not_count() {
        let second = Duration::from_secs(1);
        let mut body = RequestBody::new(pieces(vec![(second, 10); 3]), second * 30);
        for _ in 0..3 {
            body.frame().await.expect("a frame").expect("no error");
            sleep(second * 300).await;
        }
        assert!(body.frame().await.is_none());
    }
}
