//! A socket on which a write may not stall.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

use super::activity::Activity;

/// Wraps a socket, below TLS: reports what goes on to [`Activity`], and fails with `TimedOut` when the client has taken
/// nothing for `stall` while something is to be sent.
pub struct Guarded<T> {
    inner: T,
    activity: Arc<Activity>,
    stall: Duration,
    /// Made at the first write that has to wait, and kept: most writes of a large answer have to.
    timer: Option<Pin<Box<Sleep>>>,
    waiting: bool,
}

impl<T> Guarded<T> {
    /// Guards `inner`.
    pub fn new(inner: T, activity: Arc<Activity>, stall: Duration) -> Self {
        Self {
            inner,
            activity,
            stall,
            timer: None,
            waiting: false,
        }
    }

    fn written(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(written) = &result {
            self.waiting = false;
            self.activity.sent(*written.as_ref().unwrap_or(&0));
            return result;
        }
        self.activity.blocked();
        let stall = self.stall;
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(stall)));
        if !self.waiting {
            self.waiting = true;
            timer.as_mut().reset(Instant::now() + stall);
        }
        timer.as_mut().poll(cx).map(|()| {
            let text = "the client has taken nothing of the answer for too long";
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        })
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Guarded<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(cx, buf);
        if buf.filled().len() > before {
            self.activity.received();
        }
        result
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Guarded<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.written(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, bytes);
        self.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::super::activity::Times;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn guarded<T>(inner: T) -> Guarded<T> {
        let times = Times {
            handshake: SECOND,
            header: SECOND,
            body_idle: SECOND,
            idle: SECOND,
            stall: SECOND * 300,
        };
        Guarded::new(inner, Activity::new(times), times.stall)
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stops_fails_the_write() {
        let (near, _far) = duplex(16);
        let error = guarded(near)
            .write_all(&[0; 17])
            .await
            .expect_err("nobody reads");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_gets_everything() {
        let (near, mut far) = duplex(16);
        let reader = tokio::spawn(async move {
            let mut whole = Vec::new();
            let mut piece = [0; 16];
            loop {
                tokio::time::sleep(SECOND * 299).await;
                match far.read(&mut piece).await.expect("read") {
                    0 => return whole,
                    length => whole.extend_from_slice(&piece[..length]),
                }
            }
        });
        let mut near = guarded(near);
        near.write_all(&[7; 160]).await.expect("written");
        drop(near);
        assert_eq!(reader.await.expect("reader"), vec![7; 160]);
    }
}
