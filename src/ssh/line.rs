//! A channel on which a command runs, as the other end of a conversation.

use bytes::Bytes;
use futures_util::FutureExt;
use russh::server::Msg;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use tokio::time::{Instant, timeout, timeout_at};

use super::pace::{PATIENCE, Pace};
use crate::git::conversation::{Client, Gone};
use crate::git::ssh_door;
use crate::server::activity::Times;

/// What a client may say while it is being answered; then it is none.
const MOST_UNREAD: usize = 1 << 20;

/// The pieces in which a client has to take an answer, each in the time of `Times::stall`.
const PIECE: usize = 32 << 10;

/// A channel on which a command runs.
pub(super) struct Line {
    read: ChannelReadHalf,
    write: ChannelWriteHalf<Msg>,
    times: Times,
    pace: Pace,
    /// Came while something was being sent.
    unread: Vec<u8>,
    /// Nothing more will come.
    ended: bool,
    gone: bool,
}

impl Line {
    pub fn new(channel: Channel<Msg>, times: Times, pace: Pace) -> Self {
        let (read, write) = channel.split();
        Self {
            read,
            write,
            times,
            pace,
            unread: Vec::new(),
            ended: false,
            gone: false,
        }
    }

    /// Tells the client how it ended, and closes the channel.
    pub async fn finish(mut self, end: ssh_door::End) {
        if let Some(message) = end.message {
            let text = format!("warmdock: {message}\n");
            let _ = self.send_piece(text.into(), Stream::Error).await;
        }
        let _ = self.write.exit_status(end.status).await;
        let _ = self.write.eof().await;
        let _ = self.write.close().await;
    }

    fn take(&mut self, message: Option<ChannelMsg>) {
        match message {
            Some(ChannelMsg::Data { data }) => {
                self.unread.extend_from_slice(&data);
                self.gone |= self.unread.len() > MOST_UNREAD;
            }
            Some(ChannelMsg::WindowAdjusted { new_size }) => self.pace.window_is(new_size),
            Some(ChannelMsg::Eof) => self.ended = true,
            Some(ChannelMsg::Close) | None => self.gone = true,
            Some(_) => {}
        }
    }

    /// Waits while the client has more than enough, for a little while.
    async fn keep_pace(&mut self) -> Result<(), Gone> {
        while let Some(message) = self.read.wait().now_or_never() {
            self.take(message);
            if self.gone {
                return Err(Gone);
            }
        }
        let mut patience = Instant::now() + PATIENCE;
        while self.pace.is_far_ahead() && !self.gone {
            let taken = self.pace.taken();
            if let Ok(message) = timeout_at(patience, self.read.wait()).await {
                self.take(message);
            }
            // What says nothing of that gives no more time.
            let is_over = Instant::now() >= patience;
            if self.pace.taken() == taken && is_over {
                self.pace.was_too_little();
            }
            if self.pace.taken() > taken || is_over {
                patience = Instant::now() + PATIENCE;
            }
        }
        if self.gone { Err(Gone) } else { Ok(()) }
    }

    /// Sends one piece while it listens: were nobody to read, the connection would wait for us and we for it.
    async fn send_piece(&mut self, piece: Bytes, stream: Stream) -> Result<(), Gone> {
        let bytes = piece.len();
        let (write, read) = (&self.write, &mut self.read);
        let sending = async {
            match stream {
                Stream::Output => write.data_bytes(piece).await,
                Stream::Error => write.extended_data_bytes(1, piece).await,
            }
        };
        let mut heard = Vec::new();
        let sent = {
            let mut sending = std::pin::pin!(timeout(self.times.stall, sending));
            let (mut is_open, mut bytes) = (true, 0);
            loop {
                tokio::select! {
                    biased;
                    sent = &mut sending => break matches!(sent, Ok(Ok(()))),
                    message = read.wait(), if is_open => {
                        is_open = !matches!(message, Some(ChannelMsg::Close) | None);
                        if let Some(ChannelMsg::Data { data }) = &message {
                            bytes += data.len();
                        }
                        heard.push(message);
                        // Nobody takes what is sent to a channel that is closed.
                        if !is_open || bytes > MOST_UNREAD {
                            break false;
                        }
                    }
                }
            }
        };
        for message in heard {
            self.take(message);
        }
        if sent && !self.gone {
            self.pace.sent(bytes);
            Ok(())
        } else {
            self.gone = true;
            Err(Gone)
        }
    }
}

#[derive(Clone, Copy)]
enum Stream {
    Output,
    Error,
}

impl Client for Line {
    async fn receive(&mut self) -> Option<Bytes> {
        while self.unread.is_empty() {
            if self.ended || self.gone {
                return None;
            }
            match timeout(self.times.stall, self.read.wait()).await {
                Ok(message) => self.take(message),
                Err(_) => self.gone = true,
            }
        }
        Some(std::mem::take(&mut self.unread).into())
    }

    async fn send(&mut self, mut bytes: Bytes) -> Result<(), Gone> {
        if self.gone {
            return Err(Gone);
        }
        while !bytes.is_empty() {
            self.keep_pace().await?;
            let piece = bytes.split_to(bytes.len().min(PIECE));
            self.send_piece(piece, Stream::Output).await?;
        }
        Ok(())
    }
}
