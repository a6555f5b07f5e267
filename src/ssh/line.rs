//! A channel on which a command runs, as the other end of a conversation.

use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use russh::server::Msg;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use tokio::time::{Instant, sleep, timeout_at};

use super::pace::{PATIENCE, Pace};
use crate::git::conversation::{Client, Gone};
use crate::git::ssh_door;
use crate::server::activity::Times;

/// Bytes that a client may say while it is being answered; then it is none.
const MOST_UNREAD: usize = 1 << 20;

/// How often it is looked whether a client takes a piece in time.
const LOOK: Duration = Duration::from_secs(1);

/// The pieces in which a client has to take an answer, each in the time of `Times::stall_now`.
const PIECE: usize = 32 << 10;

/// A channel on which a command runs.
pub(super) struct Line {
    read: ChannelReadHalf,
    write: ChannelWriteHalf<Msg>,
    times: Times,
    heard: Heard,
}

/// What of all that comes on a channel matters.
///
/// SECURITY: the rest is dropped when it comes. There may be any amount of it, also while we wait for the client to take
/// something.
struct Heard {
    pace: Pace,
    /// Came while something was being sent.
    unread: Vec<u8>,
    /// Nothing more will come.
    ended: bool,
    gone: bool,
}

impl Heard {
    fn take(&mut self, message: Option<ChannelMsg>) {
        match message {
            Some(ChannelMsg::Data { data }) => {
                if self.unread.len() + data.len() > MOST_UNREAD {
                    self.gone = true;
                } else {
                    self.unread.extend_from_slice(&data);
                }
            }
            Some(ChannelMsg::WindowAdjusted { new_size }) => self.pace.window_is(new_size),
            Some(ChannelMsg::Eof) => self.ended = true,
            Some(ChannelMsg::Close) | None => self.gone = true,
            Some(_) => {}
        }
    }
}

impl Line {
    pub fn new(channel: Channel<Msg>, times: Times, pace: Pace) -> Self {
        let (read, write) = channel.split();
        let heard = Heard {
            pace,
            unread: Vec::new(),
            ended: false,
            gone: false,
        };
        Self {
            read,
            write,
            times,
            heard,
        }
    }

    /// Tells the client how it ended, and closes the channel.
    pub async fn finish(mut self, end: ssh_door::End) {
        if let Some(message) = end.message {
            let text = format!("warmdock: {message}\n");
            let _ = self.send_piece(text.into(), Stream::Error).await;
        }
        // Were it there and nobody read, the connection would wait for us and we for it.
        let Self { read, write, .. } = self;
        drop(read);
        let _ = write.exit_status(end.status).await;
        let _ = write.eof().await;
        let _ = write.close().await;
    }

    /// Waits while the client has more than enough, for a little while.
    async fn keep_pace(&mut self) -> Result<(), Gone> {
        let (read, heard) = (&mut self.read, &mut self.heard);
        while let Some(message) = read.wait().now_or_never() {
            heard.take(message);
            if heard.gone {
                return Err(Gone);
            }
        }
        let mut patience = Instant::now() + PATIENCE;
        while heard.pace.is_far_ahead() && !heard.gone {
            let taken = heard.pace.taken();
            if let Ok(message) = timeout_at(patience, read.wait()).await {
                heard.take(message);
            }
            // What says nothing of that gives no more time.
            let is_over = Instant::now() >= patience;
            if heard.pace.taken() == taken && is_over {
                heard.pace.was_too_little();
            }
            if heard.pace.taken() > taken || is_over {
                patience = Instant::now() + PATIENCE;
            }
        }
        if heard.gone { Err(Gone) } else { Ok(()) }
    }

    /// Sends one piece while it listens: were nobody to read, the connection would wait for us and we for it.
    async fn send_piece(&mut self, piece: Bytes, stream: Stream) -> Result<(), Gone> {
        // Nobody takes what is sent to a channel that is closed.
        if self.heard.gone {
            return Err(Gone);
        }
        let bytes = piece.len();
        let (write, read, heard) = (&self.write, &mut self.read, &mut self.heard);
        let sending = async {
            match stream {
                Stream::Output => write.data_bytes(piece).await,
                Stream::Error => write.extended_data_bytes(1, piece).await,
            }
        };
        let mut sending = std::pin::pin!(sending);
        let began = Instant::now();
        let mut look = std::pin::pin!(sleep(LOOK));
        let sent = loop {
            tokio::select! {
                biased;
                sent = &mut sending => break sent.is_ok(),
                () = &mut look => {
                    if began.elapsed() >= self.times.stall_now() {
                        break false;
                    }
                    look.as_mut().reset(Instant::now() + LOOK);
                }
                message = read.wait() => {
                    heard.take(message);
                    if heard.gone {
                        break false;
                    }
                }
            }
        };
        if sent {
            heard.pace.sent(bytes);
            Ok(())
        } else {
            heard.gone = true;
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
        let heard = &mut self.heard;
        // SECURITY: for all that comes until there is something to read, much of which may be nothing.
        let until = Instant::now() + self.times.stall;
        while heard.unread.is_empty() {
            if heard.ended || heard.gone {
                return None;
            }
            match timeout_at(until, self.read.wait()).await {
                Ok(message) => heard.take(message),
                Err(_) => heard.gone = true,
            }
        }
        Some(std::mem::take(&mut heard.unread).into())
    }

    async fn send(&mut self, mut bytes: Bytes) -> Result<(), Gone> {
        if self.heard.gone {
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
