//! The channel of a command that runs on the host, as a pair of blocking streams.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::{Buf, Bytes};
use russh::client::Msg;
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf};

use super::super::health::Health;
use super::super::patience::Patience;
use super::connections::Running;

/// More of what a command says on its standard error is not kept.
const MOST_SAID: usize = 2048;

/// How long the end of a channel may follow the end of its data.
const TAIL: Duration = Duration::from_secs(2);

/// Of version 2, in bytes. In version 0 all references stand there.
const LONGEST_GREETING: usize = 4096;

/// How far a command is, and how it ended, as far as that is known.
#[derive(Clone, Default)]
pub(super) struct Ended(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    /// Something was asked of it: what it writes from then on is an answer.
    asked: bool,
    /// Bytes that it wrote before that.
    greeting: usize,
    said: Vec<u8>,
    status: Option<u32>,
    failure: Option<String>,
}

pub(super) struct Reader {
    read: ChannelReadHalf,
    /// Holds the connection, and the place on it.
    running: Arc<Place>,
    chunk: Bytes,
    patience: Patience,
    health: Arc<Health>,
    ended: Ended,
    over: bool,
}

pub(super) struct Writer {
    write: ChannelWriteHalf<Msg>,
    _running: Arc<Place>,
    buffer: Vec<u8>,
    patience: Patience,
    ended: Ended,
}

type Place = super::connections::Place;

/// Splits a running command into what it writes and what it reads.
pub(super) fn blocking(
    running: Running,
    patience: Patience,
    health: Arc<Health>,
) -> (Reader, Writer, Ended) {
    let ended = Ended::default();
    let (read, write) = running.channel.split();
    let place = Arc::new(running.place);
    let reader = Reader {
        read,
        running: Arc::clone(&place),
        chunk: Bytes::new(),
        patience: patience.clone(),
        health,
        ended: ended.clone(),
        over: false,
    };
    let writer = Writer {
        write,
        _running: place,
        buffer: Vec::new(),
        patience,
        ended: ended.clone(),
    };
    (reader, writer, ended)
}

impl Ended {
    /// What the command said on its standard error, without control characters.
    pub fn said(&self) -> String {
        let said = String::from_utf8_lossy(&self.state().said).into_owned();
        let visible = said.replace(|c: char| c.is_control(), " ");
        visible.trim().to_owned()
    }

    pub fn status(&self) -> Option<u32> {
        self.state().status
    }

    /// What went wrong with the channel or its connection.
    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    fn fail(&self, what: String) -> io::Error {
        self.state().failure.get_or_insert_with(|| what.clone());
        io::Error::other(what)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether so many bytes of output are an answer. In version 0 nothing is asked before the list, which is long.
    fn is_answered_by(&mut self, bytes: usize) -> bool {
        self.greeting = self.greeting.saturating_add(bytes);
        self.asked || self.greeting > LONGEST_GREETING
    }
}

impl Reader {
    fn fill(&mut self) -> io::Result<()> {
        while self.chunk.is_empty() && !self.over {
            let length = |message: &Option<ChannelMsg>| match message {
                Some(ChannelMsg::Data { data } | ChannelMsg::ExtendedData { data, .. }) => {
                    data.len()
                }
                _ => 0,
            };
            let message = self
                .patience
                .read(self.read.wait(), length)
                .map_err(|why| self.ended.fail(why.to_string()))?;
            let is_answer = match &message {
                // What is said before anything is asked may come from what stands before the host, and says nothing of it: a
                // greeting, and a shell's or a banner's words.
                Some(ChannelMsg::Data { data }) => self.ended.state().is_answered_by(data.len()),
                Some(ChannelMsg::ExtendedData { .. }) => self.ended.state().asked,
                // Who ends the command without a word refuses it.
                Some(ChannelMsg::Eof | ChannelMsg::Close | ChannelMsg::Failure) => true,
                _ => false,
            };
            if is_answer {
                self.health.heard();
            }
            match message {
                Some(ChannelMsg::Data { data }) => self.chunk = data,
                Some(ChannelMsg::Eof) => {
                    self.over = true;
                    self.read_tail();
                }
                Some(ChannelMsg::Close) => self.over = true,
                Some(ChannelMsg::Failure) => {
                    let what = "it refuses to run git-upload-pack".to_owned();
                    return Err(self.ended.fail(what));
                }
                Some(other) => note(&self.ended, other),
                None => {
                    let what = self.running.why_closed();
                    return Err(self.ended.fail(what));
                }
            }
        }
        Ok(())
    }

    /// The status and the last words may come after the data.
    fn read_tail(&mut self) {
        let (read, ended) = (&mut self.read, &self.ended);
        let tail = async {
            while let Some(message) = read.wait().await {
                if matches!(message, ChannelMsg::Close) {
                    break;
                }
                note(ended, message);
            }
        };
        // Without them there is less to tell, and that is all.
        let tail = async { tokio::time::timeout(TAIL, tail).await };
        let _ = self.patience.wait("did not end", tail);
    }
}

fn note(ended: &Ended, message: ChannelMsg) {
    match message {
        ChannelMsg::ExtendedData { data, .. } => {
            let mut state = ended.state();
            let room = MOST_SAID - state.said.len();
            state.said.extend_from_slice(&data[..data.len().min(room)]);
        }
        ChannelMsg::ExitStatus { exit_status } => ended.state().status = Some(exit_status),
        ChannelMsg::ExitSignal { signal_name, .. } => {
            ended.fail(format!("git-upload-pack was ended by {signal_name:?}"));
        }
        _ => {}
    }
}

impl Read for Reader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fill()?;
        let taken = self.chunk.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&self.chunk[..taken]);
        self.chunk.advance(taken);
        Ok(taken)
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    /// Each request is flushed once, when it is whole.
    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let request = std::mem::take(&mut self.buffer);
        self.ended.state().asked = true;
        self.patience
            .wait("took no request", self.write.data_bytes(request))
            .map_err(|why| self.ended.fail(why.to_string()))?
            .map_err(io::Error::other)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Ends the command, whatever it is doing. The connection stays for the next one.
        let close = self.write.close();
        let _ = self.patience.wait("did not end", close);
    }
}
