//! What a client may do on a connection: log in with a key, open channels, and run `git-upload-pack` on each. Nothing
//! else exists: no shell, no terminal, no forwarding, no subsystem.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use russh::keys::{Algorithm, Certificate};
use russh::server::{self, Auth, ChannelOpenHandle, Msg, PublicKeyOffer, VerifiedPublicKey};
use russh::{Channel, ChannelId, ChannelOpenFailure, Pty};
use tokio::sync::watch;

use super::connection::LOGIN_ATTEMPTS;
use super::connection::Shared;
use super::line::Line;
use super::pace::Pace;
use crate::access::SshIdentity;
use crate::git::ssh_door;
use crate::git::upload_pack::Version;
use crate::server::activity::{Activity, Exchange, Times};

/// Channels of one connection at once, as OpenSSH's server has it.
const MOST_CHANNELS: usize = 10;

/// What the connection's task knows of its session.
pub(super) struct State {
    activity: Arc<Activity>,
    logged_in: watch::Sender<bool>,
    /// Commands that run.
    commands: watch::Sender<usize>,
    /// Channels on which nothing runs yet.
    waiting: Mutex<HashMap<ChannelId, Waiting>>,
}

struct Waiting {
    channel: Channel<Msg>,
    version: Version,
}

/// Counts a command as long as it lives.
struct Command {
    state: Arc<State>,
    /// As long, the connection is not asked to end.
    _exchange: Exchange,
}

impl Command {
    fn begin(state: &Arc<State>) -> Self {
        let exchange = state.activity.request(true);
        state.commands.send_modify(|commands| *commands += 1);
        Self {
            state: Arc::clone(state),
            _exchange: exchange,
        }
    }
}

impl Drop for Command {
    fn drop(&mut self) {
        self.state.commands.send_modify(|commands| *commands -= 1);
    }
}

impl State {
    pub fn new(activity: Arc<Activity>) -> Self {
        Self {
            activity,
            logged_in: watch::Sender::new(false),
            commands: watch::Sender::new(0),
            waiting: Mutex::default(),
        }
    }

    /// Whether a command runs.
    pub fn is_busy(&self) -> bool {
        *self.commands.borrow() > 0
    }

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

/// What a client is told, and cannot go on without.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    LoggedIn,
    Opened(ChannelId),
}

/// The server's side of one connection.
pub(super) struct Session {
    shared: Arc<Shared>,
    peer: SocketAddr,
    times: Times,
    state: Arc<State>,
    /// Keys that were asked for.
    offered: usize,
    /// The name of the user, which matters to upstreams that are asked, and what was proved.
    login: Option<(String, SshIdentity)>,
    /// What the client has to wait for before it can go on.
    waits_for: Option<(Step, Instant)>,
    /// The shortest time from our answer to what it said then: that of the way, there and back.
    way: Duration,
}

impl Session {
    pub fn new(shared: Arc<Shared>, peer: SocketAddr, times: Times, state: Arc<State>) -> Self {
        Self {
            shared,
            peer,
            times,
            state,
            offered: 0,
            login: None,
            waits_for: None,
            way: Duration::MAX,
        }
    }

    /// The client did what it could not do before `step`.
    fn went_on_after(&mut self, step: Step) {
        if let Some((_, since)) = self.waits_for.take_if(|(awaited, _)| *awaited == step) {
            self.way = self.way.min(since.elapsed());
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
        let Waiting { channel, version } = waiting;
        let Some((user, identity)) = self.login.clone() else {
            return;
        };
        let (app, peer, times) = (Arc::clone(&self.shared.app), self.peer, self.times);
        let pace = Pace::new(self.way);
        let running = Command::begin(&self.state);
        tokio::spawn(async move {
            let _running = running;
            let mut line = Line::new(channel, times, pace);
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
        // Keys are asked for one after the other; russh counts those that are refused, and these may be none.
        self.offered += 1;
        if self.offered <= LOGIN_ATTEMPTS {
            self.state.activity.opened();
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
        self.state.activity.opened();
        self.waits_for = Some((Step::LoggedIn, Instant::now()));
        Ok(())
    }

    async fn channel_open_session(
        &mut self,
        channel: Channel<Msg>,
        reply: ChannelOpenHandle,
        _: &mut server::Session,
    ) -> Result<(), russh::Error> {
        self.went_on_after(Step::LoggedIn);
        let open = self.state.waiting().len() + *self.state.commands.borrow();
        if open >= MOST_CHANNELS || self.shared.ending.draining.is_cancelled() {
            reply.reject(ChannelOpenFailure::ResourceShortage).await;
            return Ok(());
        }
        let waiting = Waiting {
            version: Version::V0,
            channel,
        };
        let step = Step::Opened(waiting.channel.id());
        self.state.waiting().insert(waiting.channel.id(), waiting);
        self.waits_for = Some((step, Instant::now()));
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
        self.went_on_after(Step::Opened(channel));
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
        self.went_on_after(Step::Opened(channel));
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
