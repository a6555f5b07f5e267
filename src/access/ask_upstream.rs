//! Keys that an upstream publishes for its users: GitHub and GitLab list them at `https://host/<user>.keys`. Whoever
//! logs in with the name of such a user and one of these keys is that user.
//!
//! Defences in this file:
//! - only for users whom the operator has named: that somebody has an account there says nothing about what is private;
//! - the name is one that can stand in a path, the answer has a limit in size and time, and no credentials go along;
//! - what was asked is kept, so that clients cannot make us ask more than once in a while for each named user.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::USER_AGENT;
use russh::keys::PublicKey;
use russh::keys::ssh_key::public::KeyData;
use tokio::sync::{OnceCell, watch};
use tokio::time::{Instant, timeout_at};

use super::Principal;
use crate::config::{self, Config};
use crate::git::name::RepoName;
use crate::http_client::{self, AGENT, Redirects};

/// How long an upstream has to answer. Whoever is refused waits as long, so it is seconds and no more.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// A few hundred keys.
const MOST_BYTES: usize = 256 << 10;
/// An upstream that does not answer is left alone for this long.
const PAUSE: Duration = Duration::from_secs(10);

/// Asks, and remembers.
pub(super) struct AskUpstream {
    config: watch::Receiver<Arc<Config>>,
    client: OnceCell<reqwest::Client>,
    /// By host and user; as many as the operator has named.
    kept: Mutex<HashMap<HostAndUser, Arc<tokio::sync::Mutex<Kept>>>>,
}

type HostAndUser = (String, String);

/// Held while the upstream is asked, so that everyone who comes meanwhile shares the answer.
#[derive(Default)]
struct Kept {
    asked: Option<Instant>,
    answered: Option<Instant>,
    keys: Vec<KeyData>,
}

impl AskUpstream {
    /// Nobody has been asked yet.
    pub fn new(config: watch::Receiver<Arc<Config>>) -> Self {
        Self {
            config,
            client: OnceCell::new(),
            kept: Mutex::default(),
        }
    }

    /// Whether any upstream is asked.
    pub fn is_configured(&self) -> bool {
        !self.config.borrow().access.ask_upstream.is_empty()
    }

    /// Who `user` with this key is to `repo`; `None` at `until` at the latest.
    pub async fn principal(
        &self,
        user: &str,
        key: &PublicKey,
        repo: &RepoName,
        until: Instant,
    ) -> Option<Principal> {
        let config = self.config.borrow().clone();
        let ask =
            config.access.ask_upstream.iter().find(|ask| {
                ask.host == repo.host() && ask.users.iter().any(|named| named == user)
            })?;
        let upstream = config.upstream(&ask.host)?;
        let kept = {
            let mut all = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let place = (ask.host.clone(), user.to_owned());
            Arc::clone(all.entry(place).or_default())
        };
        let mut kept = timeout_at(until, kept.lock()).await.ok()?;
        let is_fresh = kept.answered.is_some_and(|when| when.elapsed() < ask.keep);
        if !is_fresh
            && kept
                .asked
                .is_none_or(|when| when.elapsed() >= PAUSE.min(ask.keep))
        {
            kept.asked = Some(Instant::now());
            match timeout_at(until, self.ask(upstream, user)).await {
                Ok(Ok(keys)) => {
                    kept.keys = keys;
                    kept.answered = Some(Instant::now());
                }
                Ok(Err(error)) => {
                    tracing::warn!(
                        upstream.host = ask.host,
                        user,
                        error = format!("{error:#}"),
                        "keys cannot be asked for"
                    );
                }
                Err(_) => {
                    tracing::warn!(
                        upstream.host = ask.host,
                        user,
                        "keys cannot be asked for: no answer within {PATIENCE:?}"
                    );
                }
            }
        }
        // SECURITY: what was kept for too long counts for nothing, whether the upstream answers or not.
        let counts = kept
            .answered
            .is_some_and(|when| when.elapsed() < ask.keep.max(PAUSE));
        if !counts || !kept.keys.contains(key.key_data()) {
            return None;
        }
        let name = format!("{user} of {}", ask.host);
        Some(Principal::named(&name, Arc::new(ask.repos.clone())))
    }

    async fn ask(&self, upstream: &config::Upstream, user: &str) -> anyhow::Result<Vec<KeyData>> {
        let url = keys_url(upstream, user);
        let client = self.client.get_or_try_init(client).await?;
        let request = client.get(url).header(USER_AGENT, AGENT);
        let mut response = request.send().await?.error_for_status()?;
        let mut text = Vec::new();
        while let Some(chunk) = response.chunk().await? {
            text.extend_from_slice(&chunk);
            anyhow::ensure!(
                text.len() <= MOST_BYTES,
                "expected at most {MOST_BYTES} bytes of keys, found more"
            );
        }
        let text = String::from_utf8_lossy(&text);
        // Lines that we cannot read are keys of kinds that we do not take.
        let keys = text
            .lines()
            .filter_map(|line| PublicKey::from_openssh(line.trim()).ok());
        Ok(keys.map(|key| key.key_data().clone()).collect())
    }
}

/// Upstreams over SSH have their web pages at the same host.
fn keys_url(upstream: &config::Upstream, user: &str) -> String {
    match &upstream.ssh {
        Some(ssh) => format!("https://{}/{user}.keys", ssh.host),
        None => format!(
            "{}/{user}.keys",
            upstream.url.as_str().trim_end_matches('/')
        ),
    }
}

/// Reads certificates from disk.
async fn client() -> anyhow::Result<reqwest::Client> {
    // SECURITY: another address's word on whose key it is counts for nothing.
    tokio::task::spawn_blocking(|| http_client::client(Redirects::None)).await?
}
