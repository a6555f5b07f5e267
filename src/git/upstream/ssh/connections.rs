//! Connections to one host: made when they are needed, kept, and shared by the commands that run there.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use humantime::format_duration;
use russh::client::{self, AuthResult, DisconnectReason, Handle, Msg};
use russh::keys::agent::AgentIdentity;
use russh::keys::agent::client::AgentClient;
use russh::keys::{Algorithm, HashAlg, PrivateKeyWithHashAlg, PublicKey, PublicKeyOrCertificate};
use russh::{Channel, Preferred, SshId};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::breaker::growing_pause;
use crate::config::{SshIdentity, UpstreamSsh};
use crate::ssh::known_hosts::Mistrust;
use crate::ssh::private_key::SshKey;
use crate::ssh::{algorithms, shown};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// For the key exchange and the authentication; an agent may have to ask a person.
const LOGIN_TIMEOUT: Duration = Duration::from_secs(20);
/// OpenSSH allows ten sessions on a connection. They share its window and one core's decryption, so less is more.
const CHANNELS_PER_CONNECTION: usize = 4;
/// A host is not asked for more keys than OpenSSH's server lets a client try.
const MOST_AGENT_KEYS: usize = 6;

const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVES_UNANSWERED: usize = 3;

/// After a failure nobody connects for this long, twice as long after the next, and so on: a host that is down or
/// does not know our key is not asked once for each repository.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

pub(super) struct Connections {
    ssh: UpstreamSsh,
    config: Arc<client::Config>,
    /// Held while a connection is being made, so that everyone who comes meanwhile shares it.
    open: tokio::sync::Mutex<Open>,
}

#[derive(Default)]
struct Open {
    connections: Vec<Arc<Connection>>,
    failed: Option<Failed>,
}

struct Failed {
    when: Instant,
    times: u32,
    why: String,
}

struct Connection {
    handle: Handle<Gatekeeper>,
    places: Arc<Semaphore>,
    closed: Arc<Mutex<Option<String>>>,
}

/// A command that runs on the host.
pub(super) struct Running {
    pub channel: Channel<Msg>,
    pub place: Place,
}

/// A place on a connection, which lives as long.
pub(super) struct Place {
    connection: Arc<Connection>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// Why the connection is gone, in words that go behind the host's name.
    pub fn why_closed(&self) -> String {
        let closed = &self.connection.closed;
        let why = closed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        why.unwrap_or_else(|| "the connection broke off".to_owned())
    }
}

impl Connections {
    pub fn new(ssh: UpstreamSsh) -> Self {
        let mut preferred = algorithms();
        // The kinds of keys that we know of this host come first, else it may show one that we do not.
        let known = ssh.known_hosts.algorithms(&ssh.host, ssh.port);
        let is_rsa = |algorithm: &Algorithm| matches!(algorithm, Algorithm::Rsa { .. });
        let rank = |algorithm: &Algorithm| {
            !(known.contains(algorithm) || is_rsa(algorithm) && known.iter().any(is_rsa))
        };
        let mut keys = preferred.key.into_owned();
        keys.sort_by_key(rank);
        if ssh.known_hosts.has_authority(&ssh.host, ssh.port) {
            preferred.host_key_certificates = keys.clone().into();
        }
        let config = client::Config {
            client_id: SshId::Standard(
                concat!("SSH-2.0-warmdock_", env!("CARGO_PKG_VERSION")).into(),
            ),
            keepalive_interval: Some(KEEPALIVE),
            keepalive_max: KEEPALIVES_UNANSWERED,
            nodelay: true,
            preferred: Preferred {
                key: keys.into(),
                ..preferred
            },
            ..client::Config::default()
        };
        Self {
            ssh,
            config: Arc::new(config),
            open: tokio::sync::Mutex::default(),
        }
    }

    /// Whether they lead to the same place, with the same keys.
    pub fn are_same(&self, other: &Self) -> bool {
        self.ssh == other.ssh
    }

    /// Runs `command` on the host, on a connection that is there if one has a place.
    ///
    /// # Errors
    /// What was expected, what was offered, and what to do; without the name of the host.
    pub async fn run(&self, command: &str) -> Result<Running, String> {
        loop {
            let (place, is_new) = self.place().await?;
            match start(&place, command).await {
                Ok(channel) => return Ok(Running { channel, place }),
                Err(error) if is_new => {
                    return Err(format!("it opens no channel: {error}"));
                }
                // It may have been closed since it was last used.
                Err(error) => {
                    tracing::debug!(upstream.host = self.ssh.host, %error, "a kept connection is of no use");
                    let mut open = self.open.lock().await;
                    open.connections
                        .retain(|connection| !Arc::ptr_eq(connection, &place.connection));
                }
            }
        }
    }

    /// A place on a connection, and whether the connection is new.
    async fn place(&self) -> Result<(Place, bool), String> {
        let mut open = self.open.lock().await;
        open.connections
            .retain(|connection| !connection.handle.is_closed());
        for connection in &open.connections {
            if let Ok(permit) = Arc::clone(&connection.places).try_acquire_owned() {
                let connection = Arc::clone(connection);
                return Ok((
                    Place {
                        connection,
                        _permit: permit,
                    },
                    false,
                ));
            }
        }
        if let Some(failed) = &open.failed
            && failed.when.elapsed() < pause(failed.times)
        {
            return Err(failed.why.clone());
        }
        match self.connect().await {
            Ok(connection) => {
                open.failed = None;
                let permit = Arc::clone(&connection.places).try_acquire_owned();
                let permit = permit.map_err(|error| error.to_string())?;
                open.connections.push(Arc::clone(&connection));
                Ok((
                    Place {
                        connection,
                        _permit: permit,
                    },
                    true,
                ))
            }
            Err(why) => {
                open.failed = Some(Failed {
                    when: Instant::now(),
                    times: open.failed.as_ref().map_or(0, |failed| failed.times) + 1,
                    why: why.clone(),
                });
                Err(why)
            }
        }
    }

    async fn connect(&self) -> Result<Arc<Connection>, String> {
        let UpstreamSsh { host, port, .. } = &self.ssh;
        let address = (host.trim_matches(['[', ']']), *port);
        let stream = timeout(CONNECT_TIMEOUT, TcpStream::connect(address))
            .await
            .map_err(|_| {
                let waited = format_duration(CONNECT_TIMEOUT);
                format!("it cannot be reached: port {port} did not answer for {waited}")
            })?
            .map_err(|error| format!("it cannot be reached: {error}"))?;
        timeout(LOGIN_TIMEOUT, self.log_in(stream))
            .await
            .map_err(|_| {
                let waited = format_duration(LOGIN_TIMEOUT);
                format!("it did not let us in for {waited}")
            })?
    }

    async fn log_in(&self, stream: TcpStream) -> Result<Arc<Connection>, String> {
        let (mistrust, closed) = (Arc::default(), Arc::default());
        let gatekeeper = Gatekeeper {
            ssh: self.ssh.clone(),
            mistrust: Arc::clone(&mistrust),
            closed: Arc::clone(&closed),
        };
        let connected = client::connect_stream(Arc::clone(&self.config), stream, gatekeeper).await;
        let mut handle = match connected {
            Ok(handle) => handle,
            Err(error) => {
                let mistrust: Option<Mistrust> = mistrust
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .take();
                return Err(match mistrust {
                    Some(mistrust) => mistrust.to_string(),
                    None => format!("the SSH handshake failed: {error}"),
                });
            }
        };
        match &self.ssh.identity {
            SshIdentity::Key(key) => self.show_key(&mut handle, key).await?,
            SshIdentity::Agent(socket) => self.show_agent_keys(&mut handle, socket).await?,
        }
        tracing::debug!(upstream.host = self.ssh.host, "connected over SSH");
        Ok(Arc::new(Connection {
            handle,
            places: Arc::new(Semaphore::new(CHANNELS_PER_CONNECTION)),
            closed,
        }))
    }

    async fn show_key(&self, handle: &mut Handle<Gatekeeper>, key: &SshKey) -> Result<(), String> {
        let key = Arc::clone(key.expose());
        let public = key.public_key().clone();
        let hash = hash_for(&public, handle).await?;
        let shown_key = PrivateKeyWithHashAlg::new(key, hash);
        match handle
            .authenticate_publickey(&self.ssh.user, shown_key)
            .await
        {
            Ok(AuthResult::Success) => Ok(()),
            Ok(AuthResult::Failure { .. }) => Err(self.refused(&shown(&public))),
            Err(error) => Err(format!(
                "it ended the connection while we logged in: {error}"
            )),
        }
    }

    async fn show_agent_keys(
        &self,
        handle: &mut Handle<Gatekeeper>,
        socket: &std::path::Path,
    ) -> Result<(), String> {
        let no_agent = |error| {
            format!(
                "the agent of SSH_AUTH_SOCK does not answer ({error}): start one, or set key_file"
            )
        };
        let mut agent = AgentClient::connect_uds(socket).await.map_err(no_agent)?;
        let identities = agent.request_identities().await.map_err(no_agent)?;
        let mut tried = Vec::new();
        for identity in identities.into_iter().take(MOST_AGENT_KEYS) {
            let AgentIdentity::PublicKey { key, .. } = identity else {
                continue;
            };
            tried.push(shown(&key));
            let hash = hash_for(&key, handle).await?;
            let answer = handle
                .authenticate_publickey_with(&self.ssh.user, key, hash, &mut agent)
                .await;
            match answer {
                Ok(AuthResult::Success) => return Ok(()),
                Ok(AuthResult::Failure { .. }) => {}
                Err(error) => return Err(format!("the agent does not sign: {error}")),
            }
        }
        if tried.is_empty() {
            return Err("the agent of SSH_AUTH_SOCK has no key: add one with ssh-add".to_owned());
        }
        Err(self.refused(&tried.join(", ")))
    }

    fn refused(&self, keys: &str) -> String {
        format!(
            "expected to be let in as {:?} with {keys}, which it refuses: give the public key access there, or set \
             another key_file",
            self.ssh.user
        )
    }
}

async fn start(place: &Place, command: &str) -> Result<Channel<Msg>, russh::Error> {
    let channel = place.connection.handle.channel_open_session().await?;
    // Where the host does not take it, version 0 is spoken.
    channel.set_env(false, "GIT_PROTOCOL", "version=2").await?;
    channel.exec(true, command).await?;
    Ok(channel)
}

/// What an RSA key signs with: SHA-2, whatever the host says of it.
async fn hash_for(key: &PublicKey, handle: &Handle<Gatekeeper>) -> Result<Option<HashAlg>, String> {
    if !matches!(key.algorithm(), Algorithm::Rsa { .. }) {
        return Ok(None);
    }
    let best = handle.best_supported_rsa_hash().await;
    match best.map_err(|error| error.to_string())? {
        Some(Some(hash)) => Ok(Some(hash)),
        None => Ok(Some(HashAlg::Sha512)),
        Some(None) => Err(format!(
            "expected rsa-sha2-512 or rsa-sha2-256 for {}, it offers ssh-rsa with SHA-1 only: use an ed25519 key",
            shown(key)
        )),
    }
}

fn pause(times: u32) -> Duration {
    growing_pause(FIRST_PAUSE, times, LONGEST_PAUSE)
}

/// Decides whether the host is who it should be.
struct Gatekeeper {
    ssh: UpstreamSsh,
    mistrust: Arc<Mutex<Option<Mistrust>>>,
    closed: Arc<Mutex<Option<String>>>,
}

impl client::Handler for Gatekeeper {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        offered: &PublicKeyOrCertificate,
    ) -> Result<bool, russh::Error> {
        let UpstreamSsh { host, port, .. } = &self.ssh;
        let verdict = self
            .ssh
            .known_hosts
            .check(host, *port, offered, SystemTime::now());
        let trusted = verdict.is_ok();
        *self.mistrust.lock().unwrap_or_else(PoisonError::into_inner) = verdict.err();
        Ok(trusted)
    }

    async fn disconnected(
        &mut self,
        reason: DisconnectReason<russh::Error>,
    ) -> Result<(), russh::Error> {
        let why = match &reason {
            DisconnectReason::ReceivedDisconnect(_) => "it ended the connection".to_owned(),
            DisconnectReason::Error(russh::Error::KeepaliveTimeout) => {
                "it does not answer any more".to_owned()
            }
            DisconnectReason::Error(error) => format!("the connection broke off: {error}"),
        };
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
        match reason {
            DisconnectReason::ReceivedDisconnect(_) => Ok(()),
            DisconnectReason::Error(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_a_limit() {
        let seconds: Vec<u64> = (1..9).map(|times| pause(times).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(pause(u32::MAX), LONGEST_PAUSE);
    }
}
