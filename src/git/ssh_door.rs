//! The SSH door to the pool: reads the command that a client wants to run, asks access, and holds the conversation.
//! Knows nothing of packs, and nothing of SSH beyond the words of the command.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout};

use crate::access::{Principal, SshIdentity};
use crate::app::App;
use crate::error::Error;
use crate::git::body::LONGEST_READ;
use crate::git::conversation::{self, Broken, Client, Gone};
use crate::git::name::RepoName;
use crate::git::upload_pack::Version;

/// What a client asked for.
pub struct Asked<'a> {
    /// The command line to run, as it came.
    pub command: &'a [u8],
    /// Of the protocol, by the environment variable `GIT_PROTOCOL`.
    pub version: Version,
    /// The name that it logged in with.
    pub user: &'a str,
    /// The key or certificate that it logged in with.
    pub identity: &'a SshIdentity,
    /// Where it connects from.
    pub peer: SocketAddr,
}

/// What a client is told at the end.
pub struct End {
    /// The exit status of the command.
    pub status: u32,
    /// For people, on standard error.
    pub message: Option<String>,
}

impl End {
    /// Nothing was done.
    pub fn refused(message: impl Into<String>) -> Self {
        Self {
            // What git's own commands end with when they die.
            status: 128,
            message: Some(message.into()),
        }
    }
}

/// Runs a command.
pub async fn serve(app: &Arc<App>, asked: Asked<'_>, client: &mut impl Client) -> End {
    let in_flight = app.metrics.ssh_in_flight();
    let mut record = Record {
        app,
        peer: asked.peer,
        name: None,
        repo: None,
        began: Instant::now(),
        status: None,
        bytes: 0,
    };
    let mut client = Watched::new(client, &mut record.bytes);
    let answered = answer(app, &asked, &mut client, &mut record.name, &mut record.repo).await;
    let answered = client.outcome(answered);
    drop(in_flight);
    let end = match answered {
        Ok(()) => End {
            status: 0,
            message: None,
        },
        Err(Broken::Failed(error)) => {
            error.log();
            End::refused(match error {
                Error::Unauthorized => "This key lets nobody in any more.".to_owned(),
                error => error.to_string(),
            })
        }
        Err(Broken::Refused | Broken::Gone) => End {
            status: 128,
            message: None,
        },
    };
    record.status = Some(end.status);
    end
}

async fn answer(
    app: &Arc<App>,
    asked: &Asked<'_>,
    client: &mut impl Client,
    log_name: &mut Option<String>,
    log_repo: &mut Option<RepoName>,
) -> Result<(), Broken> {
    let (service, name) = parse(asked.command)?;
    *log_repo = Some(name.clone());
    // Asked at every command: a key that was taken out since does not count any more.
    let (identity, peer) = (asked.identity, asked.peer.ip());
    let principal = app
        .access
        .ssh_principal_for(asked.user, identity, peer, &name)
        .await?;
    *log_name = principal.name().map(str::to_owned);
    allow(&principal, &name)?;
    match service {
        Service::UploadPack => conversation::hold(app, &name, asked.version, client).await,
        Service::ReceivePack => Err(Error::PushRefused {
            upstream: name.to_string(),
        }
        .into()),
    }
}

fn allow(principal: &Principal, name: &RepoName) -> Result<(), Error> {
    if principal.may_read(name) {
        Ok(())
    } else {
        Err(Error::NotFound)
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Service {
    UploadPack,
    ReceivePack,
}

/// Reads `git-upload-pack '/host/path.git'` as git, libgit2 and gix write it; `git upload-pack` is the same.
fn parse(command: &[u8]) -> Result<(Service, RepoName), Error> {
    let none = || {
        Error::BadRequest(
            "Expected `git-upload-pack '<host>/<path>'`: only git clone and git fetch are served here."
                .into(),
        )
    };
    let command = std::str::from_utf8(command).map_err(|_| none())?.trim();
    let command = command.strip_prefix("git ").map_or_else(
        || command.to_owned(),
        |command| format!("git-{}", command.trim_start()),
    );
    let (service, path) = command.split_once(' ').ok_or_else(none)?;
    let service = match service {
        "git-upload-pack" => Service::UploadPack,
        "git-receive-pack" => Service::ReceivePack,
        _ => return Err(none()),
    };
    let path = unquoted(path.trim()).ok_or_else(none)?;
    let name = RepoName::parse(path.strip_prefix('/').unwrap_or(&path))
        .map_err(|error| Error::BadRequest(format!("This cannot name a repository: {error}.")))?;
    Ok((service, name))
}

/// One argument as clients quote it for a shell: within `'`, with `'\''` for a quote and `'\!'` for an exclamation
/// mark, or bare. Names of repositories need neither of these two, so that anything but one quoted word is none.
fn unquoted(text: &str) -> Option<String> {
    let word = match text.strip_prefix('\'') {
        Some(rest) => rest.strip_suffix('\'')?,
        None => text,
    };
    let is_plain = !word.is_empty() && !word.contains(['\'', '"', '\\', ' ', '\t', '\n']);
    is_plain.then(|| word.to_owned())
}

/// One line in the log and the metrics for each command, at its end.
struct Record<'a> {
    app: &'a Arc<App>,
    peer: SocketAddr,
    name: Option<String>,
    repo: Option<RepoName>,
    began: Instant,
    /// `None` when the connection ended before.
    status: Option<u32>,
    bytes: u64,
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let elapsed = self.began.elapsed();
        self.app
            .metrics
            .ssh_request(self.status == Some(0), elapsed, self.bytes);
        let repo = self.repo.as_ref().map(tracing::field::display);
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    ssh.status = self.status,
                    name = self.name,
                    repo,
                    peer = %self.peer,
                    bytes = self.bytes,
                    elapsed_ms = elapsed.as_millis() as u64,
                    "request"
                )
            };
        }
        if self.status == Some(0) {
            line!(debug)
        } else {
            line!(info)
        }
    }
}

/// A client of which is known what it was sent.
///
/// SECURITY: from the first to the last byte of what it says between two answers it may keep us waiting for as long as the
/// body of a request over HTTP, so that nobody keeps room for hours with a few bytes now and then. How much that may be is
/// for [`conversation`] to say, and how long it may be silent for who serves the client.
struct Watched<'a, C> {
    client: &'a mut C,
    /// How many it was sent.
    bytes: &'a mut u64,
    /// How long it kept us waiting since it began to say something. What we do meanwhile does not count.
    waited: Option<Duration>,
    /// It took longer than it may.
    is_late: bool,
}

impl<'a, C> Watched<'a, C> {
    fn new(client: &'a mut C, bytes: &'a mut u64) -> Self {
        Self {
            client,
            bytes,
            waited: None,
            is_late: false,
        }
    }

    /// How a conversation ended that itself only knows that no more came.
    fn outcome(&self, ended: Result<(), Broken>) -> Result<(), Broken> {
        if self.is_late {
            Err(Error::RequestTimeout.into())
        } else {
            ended
        }
    }
}

impl<C: Client> Client for Watched<'_, C> {
    async fn receive(&mut self) -> Option<Bytes> {
        let Some(waited) = self.waited else {
            self.waited = Some(Duration::ZERO);
            return self.client.receive().await;
        };
        let since = Instant::now();
        let left = LONGEST_READ.saturating_sub(waited);
        let received = timeout(left, self.client.receive()).await;
        self.waited = Some(waited + since.elapsed());
        received.unwrap_or_else(|_| {
            self.is_late = true;
            None
        })
    }

    async fn send(&mut self, bytes: Bytes) -> Result<(), Gone> {
        let length = bytes.len() as u64;
        self.client.send(bytes).await?;
        *self.bytes += length;
        self.waited = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A client that says something again and again, each time after this pause.
    struct Talks(Duration);

    impl Client for Talks {
        async fn receive(&mut self) -> Option<Bytes> {
            sleep(self.0).await;
            Some(Bytes::from_static(b"0"))
        }

        async fn send(&mut self, _: Bytes) -> Result<(), Gone> {
            Ok(())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_takes_for_ever_to_say_something() {
        for pause in [SECOND / 2, SECOND * 70] {
            let (mut client, mut bytes) = (Talks(pause), 0);
            let mut client = Watched::new(&mut client, &mut bytes);
            client.receive().await.expect("a first byte");
            let began = Instant::now();
            while client.receive().await.is_some() {
                let is_in_time = began.elapsed() <= LONGEST_READ + SECOND;
                assert!(is_in_time, "still listened to");
            }
            let outcome = client.outcome(Err(Broken::Gone));
            assert!(matches!(
                outcome,
                Err(Broken::Failed(Error::RequestTimeout))
            ));
        }
    }

    /// A long negotiation has many rounds, and before the first answer there may be a first clone.
    #[tokio::test(start_paused = true)]
    async fn who_is_answered_and_who_waits_for_us_has_time() {
        let (mut client, mut bytes) = (Talks(SECOND), 0);
        let mut client = Watched::new(&mut client, &mut bytes);
        for _ in 0..1000 {
            client.receive().await.expect("the beginning of a batch");
            client.receive().await.expect("its end");
            client.send(Bytes::from_static(b"NAK")).await.unwrap();
        }
        for _ in 0..3 {
            client.receive().await.expect("what is wanted");
            sleep(LONGEST_READ).await;
        }
        assert!(matches!(
            client.outcome(Err(Broken::Gone)),
            Err(Broken::Gone)
        ));
        assert_eq!(bytes, 3000);
    }

    #[test]
    fn commands_as_clients_write_them() {
        for command in [
            "git-upload-pack '/github.com/my-org/app.git'",
            "git-upload-pack 'github.com/my-org/app'",
            "git upload-pack '/github.com/my-org/app.git/'",
            "git-upload-pack /github.com/my-org/app",
            " git-upload-pack  '/github.com/my-org/app.git' ",
        ] {
            let (service, name) = parse(command.as_bytes()).unwrap();
            assert_eq!(service, Service::UploadPack, "{command}");
            assert_eq!(name.to_string(), "github.com/my-org/app", "{command}");
        }
        let (service, _) = parse(b"git-receive-pack '/h/p.git'").unwrap();
        assert_eq!(service, Service::ReceivePack);
    }

    #[test]
    fn everything_else_is_refused() {
        for command in [
            "",
            "ls",
            "git-upload-pack",
            "git-upload-pack ''",
            "git-upload-pack '/h/../p'",
            "git-upload-pack '/h/p' ; id",
            "git-upload-pack '/h/p'; id",
            "git-upload-pack '/h/p''x'",
            "git-upload-pack --strict '/h/p'",
            "git-upload-pack $(id)",
            "git-upload-archive '/h/p'",
            "git-lfs-authenticate h/p download",
            "git-upload-pack '/h/p\n'",
            "/usr/bin/git-upload-pack '/h/p'",
        ] {
            assert!(parse(command.as_bytes()).is_err(), "{command:?}");
        }
        assert!(parse(b"git-upload-pack '/h/\xff'").is_err());
    }
}
