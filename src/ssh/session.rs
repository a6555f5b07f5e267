//! What a client may do on a connection: log in with a key, open channels, and run `git-upload-pack` on each. Nothing
//! else exists: no shell, no terminal, no forwarding, no subsystem.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use russh::keys::{Algorithm, Certificate};
use russh::server::{self, Auth, ChannelOpenHandle, Msg, PublicKeyOffer, VerifiedPublicKey};
use russh::{
    Channel, ChannelId, ChannelMsg, ChannelOpenFailure, ChannelReadHalf, ChannelWriteHalf, Pty,
};
use tokio::sync::watch;
use tokio::time::timeout;

use super::connection::Shared;
use crate::access::SshIdentity;
use crate::git::conversation::{Client, Gone};
use crate::git::ssh_door;
use crate::git::upload_pack::Version;
use crate::server::activity::Times;

/// Channels of one connection at once, as OpenSSH's server has it.
const MOST_CHANNELS: usize = 10;

/// What a client may say while it is being answered; then it is none.
const MOST_UNREAD: usize = 1 << 20;

/// The pieces in which a client has to take an answer, each in the time of `Times::stall`.
const PIECE: usize = 32 << 10;

/// What the connection's task knows of its session.
pub(super) struct State {
    logged_in: watch::Sender<bool>,
    /// Channels that are open.
    commands: watch::Sender<usize>,
    /// Channels on which nothing runs yet.
    waiting: Mutex<HashMap<ChannelId, Waiting>>,
}

struct Waiting {
    channel: Channel<Msg>,
    version: Version,
    open: OpenChannel,
}

/// Counts a channel as long as it lives.
struct OpenChannel(Arc<State>);

impl Drop for OpenChannel {
    fn drop(&mut self) {
        self.0.commands.send_modify(|commands| *commands -= 1);
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            logged_in: watch::Sender::new(false),
            commands: watch::Sender::new(0),
            waiting: Mutex::default(),
        }
    }
}

impl State {
    pub async fn logged_in(&self) {
        let _ = self.logged_in.subscribe().wait_for(|done| *done).await;
    }

    pub async fn no_commands(&self) {
        let _ = self
            .commands
            .subscribe()
            .wait_for(|count| *count == 0)
            .await;
    }

    pub async fn some_command(&self) {
        let _ = self.commands.subscribe().wait_for(|count| *count > 0).await;
    }

    /// Drops the channels on which nothing runs: russh waits for as long as somebody could read from them.
    pub fn forget_channels(&self) {
        self.waiting().clear();
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<ChannelId, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The server's side of one connection.
pub(super) struct Session {
    shared: Arc<Shared>,
    peer: SocketAddr,
    times: Times,
    state: Arc<State>,
    /// The name of the user, which matters to upstreams that are asked, and what was proved.
    login: Option<(String, SshIdentity)>,
}

impl Session {
    pub fn new(shared: Arc<Shared>, peer: SocketAddr, times: Times, state: Arc<State>) -> Self {
        Self {
            shared,
            peer,
            times,
            state,
            login: None,
        }
    }

    /// Whether somebody is let in with this, and who that was.
    fn log_in(&mut self, user: &str, identity: SshIdentity) -> Auth {
        let access = &self.shared.app.access;
        // Which upstream is to be asked is known when a repository is asked for. Until then nobody is told anything.
        let is_asked_later =
            matches!(identity, SshIdentity::Key(_)) && access.takes_other_keys().of_upstreams;
        let let_in = is_asked_later || access.ssh_principal(&identity, self.peer.ip()).is_ok();
        self.shared.app.metrics.ssh_login(let_in);
        if let_in {
            self.login = Some((user.to_owned(), identity));
            Auth::Accept
        } else {
            tracing::info!(peer = %self.peer, key = identity.shown(), "a key was refused");
            Auth::reject()
        }
    }

    /// Runs what was asked for on a channel, in a task of its own.
    fn run(&self, waiting: Waiting, command: Result<Vec<u8>, &'static str>) {
        let Waiting {
            channel,
            version,
            open,
        } = waiting;
        let Some((user, identity)) = self.login.clone() else {
            return;
        };
        let (app, peer, times) = (Arc::clone(&self.shared.app), self.peer, self.times);
        tokio::spawn(async move {
            let _open = open;
            let (read, write) = channel.split();
            let mut line = Line {
                read,
                write,
                times,
                unread: Vec::new(),
                ended: false,
                gone: false,
            };
            let end = match command {
                Ok(command) => {
                    let asked = ssh_door::Asked {
                        command: &command,
                        version,
                        user: &user,
                        identity: &identity,
                        peer,
                    };
                    ssh_door::serve(&app, asked, &mut line).await
                }
                Err(what) => ssh_door::End::refused(what),
            };
            line.finish(end).await;
        });
    }

    /// Ends a channel on which something is asked that does not exist here, with a message for people.
    fn refuse(
        &self,
        channel: ChannelId,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        session.channel_success(channel)?;
        if let Some(waiting) = self.state.waiting().remove(&channel) {
            self.run(
                waiting,
                Err("there is no shell here, only git clone and git fetch"),
            );
        }
        Ok(())
    }
}

impl server::Handler for Session {
    type Error = russh::Error;

    async fn auth_publickey_offered(
        &mut self,
        _: &str,
        offer: PublicKeyOffer<'_>,
    ) -> Result<Auth, russh::Error> {
        // SECURITY: signatures with SHA-1 are not taken.
        if *offer.algorithm == (Algorithm::Rsa { hash: None }) {
            return Ok(Auth::reject());
        }
        let access = &self.shared.app.access;
        let identity = SshIdentity::Key(Box::new(offer.public_key.clone()));
        // What is offered may be the key of a certificate, which is shown later.
        let other = access.takes_other_keys();
        let may_be_right = other.certificates
            || other.of_upstreams
            || access.ssh_principal(&identity, self.peer.ip()).is_ok();
        Ok(if may_be_right {
            Auth::Accept
        } else {
            Auth::reject()
        })
    }

    async fn auth_publickey(
        &mut self,
        user: &str,
        key: VerifiedPublicKey<'_>,
    ) -> Result<Auth, russh::Error> {
        let identity = SshIdentity::Key(Box::new(key.public_key.clone()));
        Ok(self.log_in(user, identity))
    }

    async fn auth_openssh_certificate(
        &mut self,
        user: &str,
        certificate: &Certificate,
    ) -> Result<Auth, russh::Error> {
        let identity = SshIdentity::Certificate(Box::new(certificate.clone()));
        Ok(self.log_in(user, identity))
    }

    async fn auth_succeeded(&mut self, _: &mut server::Session) -> Result<(), russh::Error> {
        self.state.logged_in.send_replace(true);
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let is_full = *self.state.commands.borrow() >= MOST_CHANNELS;
        if is_full || self.shared.ending.draining.is_cancelled() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        self.state.commands.send_modify(|commands| *commands += 1);
        let waiting = Waiting {
            version: Version::V0,
            open: OpenChannel(Arc::clone(&self.state)),
            channel,
        };
        self.state.waiting().insert(waiting.channel.id(), waiting);
        reply.accept().await;
        Ok(())
    }

    async fn channel_close(
        &mut self,
        channel: ChannelId,
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        self.state.waiting().remove(&channel);
        Ok(())
    }

    async fn env_request(
        &mut self,
        channel: ChannelId,
        name: &str,
        value: &str,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        if name == "GIT_PROTOCOL"
            && let Some(waiting) = self.state.waiting().get_mut(&channel)
        {
            waiting.version = Version::from_parameters(value);
            return session.channel_success(channel);
        }
        session.channel_failure(channel)
    }

    async fn exec_request(
        &mut self,
        channel: ChannelId,
        command: &[u8],
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        let waiting = self.state.waiting().remove(&channel);
        match waiting {
            Some(waiting) => {
                session.channel_success(channel)?;
                self.run(waiting, Ok(command.to_vec()));
                Ok(())
            }
            // One command runs there already.
            None => session.channel_failure(channel),
        }
    }

    async fn shell_request(
        &mut self,
        channel: ChannelId,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        self.refuse(channel, session)
    }

    async fn subsystem_request(
        &mut self,
        channel: ChannelId,
        _: &str,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        session.channel_failure(channel)
    }

    async fn pty_request(
        &mut self,
        channel: ChannelId,
        _: &str,
        _: u32,
        _: u32,
        _: u32,
        _: u32,
        _: &[(Pty, u32)],
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        session.channel_failure(channel)
    }

    async fn x11_request(
        &mut self,
        channel: ChannelId,
        _: bool,
        _: &str,
        _: &str,
        _: u32,
        session: &mut server::Session,
    ) -> Result<(), russh::Error> {
        session.channel_failure(channel)
    }
}

/// A channel on which a command runs.
struct Line {
    read: ChannelReadHalf,
    write: ChannelWriteHalf<Msg>,
    times: Times,
    /// Came while something was being sent.
    unread: Vec<u8>,
    /// Nothing more will come.
    ended: bool,
    gone: bool,
}

impl Line {
    fn take(&mut self, message: Option<ChannelMsg>) {
        match message {
            Some(ChannelMsg::Data { data }) => {
                self.unread.extend_from_slice(&data);
                self.gone |= self.unread.len() > MOST_UNREAD;
            }
            Some(ChannelMsg::Eof) => self.ended = true,
            Some(ChannelMsg::Close) | None => self.gone = true,
            Some(_) => {}
        }
    }

    /// Sends one piece while it listens: were nobody to read, the connection would wait for us and we for it.
    async fn send_piece(&mut self, piece: Bytes, stream: Stream) -> Result<(), Gone> {
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
            Ok(())
        } else {
            self.gone = true;
            Err(Gone)
        }
    }

    /// Tells the client how it ended, and closes the channel.
    async fn finish(mut self, end: ssh_door::End) {
        if let Some(message) = end.message {
            let text = format!("warmdock: {message}\n");
            let _ = self.send_piece(text.into(), Stream::Error).await;
        }
        let _ = self.write.exit_status(end.status).await;
        let _ = self.write.eof().await;
        let _ = self.write.close().await;
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
            let piece = bytes.split_to(bytes.len().min(PIECE));
            self.send_piece(piece, Stream::Output).await?;
        }
        Ok(())
    }
}
