//! Upstreams over SSH: gix's Git client over a channel of russh, since a scratch image has no `ssh` to run.

mod channel;
mod connections;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use gix_transport::Protocol;
use gix_transport::client::git::ConnectMode;
use gix_transport::client::git::blocking_io::Connection;

use super::client;
use super::ending::{Ending, Endings};
use super::health::Health;
use super::patience::Patience;
use super::{FetchJob, Fetched, UpstreamError};
use crate::config;
use channel::Ended;
use connections::Connections;

/// A host that runs `git-upload-pack` for us.
pub struct SshUpstream {
    /// As configured, which clients know it by.
    host: String,
    /// Before the paths of repositories; empty or beginning with `/`.
    root: String,
    connections: Connections,
    idle: Duration,
    health: Arc<Health>,
    endings: Endings,
}

impl SshUpstream {
    pub(super) fn new(
        host: &str,
        ssh: &config::UpstreamSsh,
        idle: Duration,
        health: Arc<Health>,
    ) -> Self {
        Self {
            host: host.to_owned(),
            root: ssh.root.clone(),
            connections: Connections::new(ssh.clone()),
            idle,
            health,
            endings: Endings::default(),
        }
    }

    /// Whether `other` asks in the same way.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.idle == other.idle && self.connections.are_same(&other.connections)
    }

    pub(super) fn fetch(
        &self,
        path: &str,
        namespaces: &[String],
        mut job: FetchJob<'_>,
    ) -> Result<Fetched, UpstreamError> {
        let stop = Arc::clone(job.stop);
        self.endings
            .ask(path, |ending| {
                self.fetch_over(&self.repository(path, ending), namespaces, job.again())
            })
            .map_err(|error| match error {
                UpstreamError::Failed(_) if stop.load(Ordering::Relaxed) => UpstreamError::Stopped,
                UpstreamError::Failed(what) => {
                    UpstreamError::Failed(format!("{}: {what}", self.host))
                }
                other => other,
            })
    }

    fn fetch_over(
        &self,
        path: &str,
        namespaces: &[String],
        job: FetchJob<'_>,
    ) -> Result<Fetched, UpstreamError> {
        let patience = Patience::new(self.idle, Arc::clone(job.stop));
        let command = format!("git-upload-pack {}", quoted(path));
        let running = patience
            .wait("did not answer", self.connections.run(&command))
            .map_err(|why| UpstreamError::Failed(why.to_string()))?
            .map_err(UpstreamError::Failed)?;
        let (reader, writer, ended) =
            channel::blocking(running, patience.clone(), Arc::clone(&self.health));
        let transport = Connection::new(
            reader,
            writer,
            Protocol::V2,
            path,
            None::<(String, _)>,
            ConnectMode::Process,
            false,
        );
        client::fetch(transport, &patience, namespaces, job).map_err(|error| match error {
            // What the host said tells more than that its answer ended early.
            UpstreamError::Failed(what) => reason(&ended).unwrap_or(UpstreamError::Failed(what)),
            other => other,
        })
    }

    /// The path that the host knows a repository by. `/~user/…` is `~user/…`, as git sends it.
    fn repository(&self, path: &str, ending: Ending) -> String {
        let path = format!("{}/{path}{}", self.root, ending.text());
        match path.strip_prefix('/') {
            Some(home) if home.starts_with('~') => home.to_owned(),
            _ => path,
        }
    }
}

/// For the shell that the host may hand the command to.
fn quoted(path: &str) -> String {
    format!("'{}'", path.replace('\'', r"'\''"))
}

/// Why the host ended the channel, if it is what it did.
fn reason(ended: &Ended) -> Option<UpstreamError> {
    if let Some(what) = ended.failure() {
        return Some(UpstreamError::Failed(what));
    }
    let said = ended.said();
    if ended.status() == Some(0) && said.is_empty() {
        return None;
    }
    Some(if is_not_found(&said) {
        UpstreamError::NotFound
    } else if said.is_empty() {
        let status = ended.status()?;
        UpstreamError::Failed(format!(
            "git-upload-pack ended with status {status} and said nothing"
        ))
    } else {
        UpstreamError::Failed(format!("it said {said:?}"))
    })
}

/// Whether a host says that it has no such repository. There is no status for it: these are the words of git itself,
/// GitHub, GitLab, Gitea and Bitbucket. Private repositories that the key may not read are said not to exist.
fn is_not_found(said: &str) -> bool {
    let said = said.to_ascii_lowercase();
    [
        "does not appear to be a git repository",
        "repository not found",
        "could not be found",
        "cannot find repository",
        "does not exist",
        "no such repository",
    ]
    .iter()
    .any(|words| said.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_quoted_for_a_shell() {
        assert_eq!(quoted("/a/b.git"), "'/a/b.git'");
        assert_eq!(quoted("/it's.git"), r"'/it'\''s.git'");
    }

    #[test]
    fn hosts_say_in_words_that_there_is_nothing() {
        for said in [
            "fatal: '/x.git' does not appear to be a git repository",
            "ERROR: Repository not found.\nfatal: Could not read from remote repository.",
            "remote: ERROR: The project you were looking for could not be found or you don't have permission to view it.",
            "Gitea: Cannot find repository: x/y",
        ] {
            assert!(is_not_found(said), "{said}");
        }
        assert!(!is_not_found("Permission denied (publickey)."));
    }
}
