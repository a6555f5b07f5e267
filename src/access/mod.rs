//! Who asks, and what they may read. Every door asks here: the credentials differ, the decision is one.
//!
//! Credentials that are wrong are an error, also where anonymous users may read: nobody is silently downgraded.

mod ask_upstream;
mod key;
mod token;

use std::net::IpAddr;
use std::sync::{Arc, Mutex};

use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use russh::keys::{Certificate, PublicKey};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::config::patterns::Patterns;
use crate::config::{Anonymous, CRATES_IO, Config};
use crate::error::Error;
use crate::git::name::RepoName;
use ask_upstream::{AskUpstream, PATIENCE};
use key::Keys;
use token::Tokens;

/// Answers who a request comes from, by the configuration of the moment.
pub struct Access {
    config: watch::Receiver<Arc<Config>>,
    /// The table for the configuration that it was made from; holding that one keeps its address from being reused.
    table: Mutex<(Arc<Config>, Arc<Table>)>,
    ask_upstream: AskUpstream,
}

/// Who a request comes from, and what that allows.
#[derive(Clone)]
pub struct Principal {
    /// In the configuration, for the log; `None` for anonymous.
    name: Option<Arc<str>>,
    /// Over the whole `host/path`.
    repos: Arc<Patterns>,
    registries: Registries,
}

/// Registries of crates that somebody may read.
#[derive(Clone)]
enum Registries {
    All,
    These(Arc<Patterns>),
    /// For whoever is limited to some repositories, and nothing was said of registries: what the whole world can read.
    CratesIo,
    None,
}

/// What keys may be right beside those that are listed.
#[derive(Clone, Copy)]
pub struct OtherKeys {
    /// Those that a listed authority has signed.
    pub certificates: bool,
    /// Those that an upstream publishes for one of its users.
    pub of_upstreams: bool,
}

/// What a client of SSH has proved to have.
#[derive(Clone)]
pub enum SshIdentity {
    /// Its private key.
    Key(Box<PublicKey>),
    /// Its signature by the authority it names, and its time, have been checked.
    Certificate(Box<Certificate>),
}

impl SshIdentity {
    /// The key as people compare it, for the log.
    pub fn shown(&self) -> String {
        match self {
            Self::Key(key) => crate::ssh::shown(key),
            Self::Certificate(certificate) => {
                let key = PublicKey::from(certificate.public_key().clone());
                format!("certificate of {}", crate::ssh::shown(&key))
            }
        }
    }
}

struct Table {
    anonymous: Option<Principal>,
    tokens: Tokens,
    keys: Keys,
}

impl Access {
    /// Follows `config`: after a reload the next request is judged by the new one.
    pub fn new(config: watch::Receiver<Arc<Config>>) -> Self {
        let current = config.borrow().clone();
        let table = Arc::new(Table::of(&current.access));
        Self {
            ask_upstream: AskUpstream::new(config.clone()),
            config,
            table: Mutex::new((current, table)),
        }
    }

    /// Who sends these headers.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] for credentials that are wrong, and for none where anonymous users may not read.
    pub fn principal(&self, headers: &HeaderMap) -> Result<Principal, Error> {
        self.principal_by(headers, token::token)
    }

    /// Who sends these headers from cargo, which sends a token as it is, without a scheme before it.
    ///
    /// # Errors
    /// As [`Access::principal`].
    pub fn cargo_principal(&self, headers: &HeaderMap) -> Result<Principal, Error> {
        self.principal_by(headers, token::cargo_token)
    }

    fn principal_by(
        &self,
        headers: &HeaderMap,
        token: impl Fn(&[u8]) -> Option<Vec<u8>>,
    ) -> Result<Principal, Error> {
        let table = self.table();
        let mut presented = headers.get_all(AUTHORIZATION).iter();
        let principal = match (presented.next(), presented.next()) {
            (None, _) => table.anonymous.clone(),
            (Some(value), None) => {
                token(value.as_bytes()).and_then(|token| table.tokens.find(&token))
            }
            // Two: which one another proxy would take is unknown.
            _ => None,
        };
        principal.ok_or(Error::Unauthorized)
    }

    /// Who shows this key or certificate from this address. There are no anonymous readers over SSH. To be asked at
    /// every command: what is revoked, and a certificate that ran out, count no more.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] for keys and certificates that nobody has.
    pub fn ssh_principal(&self, identity: &SshIdentity, peer: IpAddr) -> Result<Principal, Error> {
        let table = self.table();
        let principal = match identity {
            SshIdentity::Key(key) => table.keys.find(key),
            SshIdentity::Certificate(certificate) => table.keys.find_certificate(certificate, peer),
        };
        principal.ok_or(Error::Unauthorized)
    }

    /// Who shows it, logged in as `user`, and asks for `repo`: an upstream may know the key. Takes up to [`PATIENCE`].
    ///
    /// # Errors
    /// [`Error::NotFound`] for keys that nobody has, always after the same time: it is not told whether the upstream
    /// knows the user, or which users it is asked for. [`Error::Unauthorized`] where no upstream is asked.
    pub async fn ssh_principal_for(
        &self,
        user: &str,
        identity: &SshIdentity,
        peer: IpAddr,
        repo: &RepoName,
    ) -> Result<Principal, Error> {
        let known = self.ssh_principal(identity, peer);
        match identity {
            SshIdentity::Key(key) if known.is_err() && self.ask_upstream.is_configured() => {
                let until = Instant::now() + PATIENCE;
                let asked = match self.table().keys.is_revoked(key) {
                    true => None,
                    false => self.ask_upstream.principal(user, key, repo, until).await,
                };
                if asked.is_none() {
                    // SECURITY: no upstream is waited for any longer, so that the time of a refusal tells nothing.
                    sleep_until(until).await;
                }
                asked.ok_or(Error::NotFound)
            }
            _ => known,
        }
    }

    /// Whether a key that is not listed may turn out to be right: in a certificate, or since an upstream knows it.
    pub fn takes_other_keys(&self) -> OtherKeys {
        OtherKeys {
            certificates: self.table().keys.takes_certificates(),
            of_upstreams: self.ask_upstream.is_configured(),
        }
    }

    fn table(&self) -> Arc<Table> {
        let config = self.config.borrow().clone();
        let mut kept = self
            .table
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        if !Arc::ptr_eq(&kept.0, &config) {
            *kept = (config.clone(), Arc::new(Table::of(&config.access)));
        }
        kept.1.clone()
    }
}

impl Principal {
    /// SECURITY: the one decision about who may know of and read `repo`, for every door and every kind of
    /// credentials. The list of upstreams is checked elsewhere.
    pub fn may_read(&self, repo: &RepoName) -> bool {
        self.repos.matches(&repo.to_string())
    }

    /// SECURITY: the same for a registry of crates.
    pub fn may_read_registry(&self, name: &str) -> bool {
        match &self.registries {
            Registries::All => true,
            Registries::These(patterns) => patterns.matches(name),
            Registries::CratesIo => name == CRATES_IO,
            Registries::None => false,
        }
    }

    /// Whether [`Principal::may_read`] holds for every repository there may be, so that the names of all hosts are no
    /// secret.
    pub fn may_read_every_repo(&self) -> bool {
        self.repos.texts().is_empty()
    }

    /// The name in the configuration, for the log; `None` for anonymous.
    pub fn name(&self) -> Option<&str> {
        self.name.as_deref()
    }

    /// Whoever comes without credentials.
    pub fn anonymous() -> Self {
        Self {
            name: None,
            repos: Arc::new(Patterns::everything()),
            registries: Registries::All,
        }
    }

    fn named(name: &str, repos: Arc<Patterns>) -> Self {
        Self {
            name: Some(name.into()),
            repos,
            // Whoever comes over SSH, where there are no crates.
            registries: Registries::None,
        }
    }

    fn of_token(token: &crate::config::Token) -> Self {
        let registries = match &token.registries {
            Some(patterns) if patterns.texts().is_empty() => Registries::None,
            Some(patterns) => Registries::These(Arc::new(patterns.clone())),
            None if token.repos.texts().is_empty() => Registries::All,
            None => Registries::CratesIo,
        };
        Self {
            registries,
            ..Self::named(&token.name, Arc::new(token.repos.clone()))
        }
    }
}

impl Table {
    fn of(access: &crate::config::Access) -> Self {
        Self {
            anonymous: match access.anonymous {
                Anonymous::Read => Some(Principal::anonymous()),
                Anonymous::None => None,
            },
            tokens: Tokens::of(&access.tokens),
            keys: Keys::of(&access.keys),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
    use base64::Engine;
    use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

    use super::*;
    use crate::config::environment::Environment;
    use crate::config::secret::Secret;
    use crate::config::{self, Token};

    fn config(anonymous: Anonymous, tokens: &[(&str, &str, &[&str])]) -> Arc<Config> {
        let mut config = Config::parse("{}", &Environment::default()).expect("the default");
        let tokens = tokens.iter().map(|(name, secret, repos)| Token {
            name: (*name).into(),
            token_file: "/run/secrets/token".into(),
            secret: Secret::new(secret.as_bytes()),
            repos: Patterns::new(repos.iter().map(|text| (*text).into()).collect())
                .expect("patterns"),
            registries: None,
        });
        config.access = config::Access {
            anonymous,
            tokens: tokens.collect(),
            ..config.access
        };
        Arc::new(config)
    }

    fn access(anonymous: Anonymous) -> Access {
        let tokens: &[(&str, &str, &[&str])] = &[
            ("all", "s3cret", &[]),
            ("ci", "t:ok en", &["github.com/my-org/*", "git.corp/**"]),
            ("last", "zzz", &["git.corp/only/this"]),
        ];
        Access::new(watch::channel(config(anonymous, tokens)).1)
    }

    fn headers(values: &[String]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(
                AUTHORIZATION,
                HeaderValue::from_str(value).expect("a header"),
            );
        }
        headers
    }

    fn basic(pair: &str) -> String {
        format!("Basic {}", STANDARD.encode(pair))
    }

    /// The name of whoever is let in; `None` is 401.
    fn name(access: &Access, values: &[String]) -> Option<String> {
        match access.principal(&headers(values)) {
            Ok(principal) => Some(principal.name().unwrap_or("anonymous").to_owned()),
            Err(Error::Unauthorized) => None,
            Err(other) => panic!("{other}"),
        }
    }

    #[test]
    fn tokens_are_taken_in_every_usual_form_and_nothing_else() {
        let access = access(Anonymous::Read);
        let good = [
            ("Bearer s3cret".into(), "all"),
            ("bearer  s3cret ".into(), "all"),
            ("Bearer zzz".into(), "last"),
            (basic("x-access-token:s3cret"), "all"),
            (basic("anybody:s3cret"), "all"),
            (basic(":s3cret"), "all"),
            (basic("s3cret:"), "all"),
            (basic("s3cret:x-oauth-basic"), "all"),
            (basic("user:t:ok en"), "ci"),
            (
                format!("BASIC {}", STANDARD_NO_PAD.encode("u:s3cret")),
                "all",
            ),
        ];
        for (value, expected) in good {
            assert_eq!(
                name(&access, std::slice::from_ref(&value)).as_deref(),
                Some(expected),
                "{value}"
            );
        }
        let bad = [
            "Bearer wrong".into(),
            "Bearer s3cre".into(),
            "Bearer s3cret2".into(),
            "Bearer S3cret".into(),
            "Bearer ".into(),
            "Bearer".into(),
            "s3cret".into(),
            "Digest s3cret".into(),
            "Basic".into(),
            "Basic !!!".into(),
            "Basic s3cret".into(),
            String::new(),
            basic("s3cret"),
            basic(":"),
            basic("s3cret:wrong"),
            basic("wrong:x-oauth-basic"),
        ];
        for value in bad {
            assert_eq!(name(&access, std::slice::from_ref(&value)), None, "{value}");
        }
    }

    #[test]
    fn two_sets_of_credentials_are_refused() {
        let both = ["Bearer s3cret".to_owned(), "Bearer s3cret".to_owned()];
        assert_eq!(name(&access(Anonymous::Read), &both), None);
    }

    #[test]
    fn anonymous_users_are_let_in_by_configuration() {
        assert_eq!(
            name(&access(Anonymous::Read), &[]).as_deref(),
            Some("anonymous")
        );
        assert_eq!(name(&access(Anonymous::None), &[]), None);
        assert_eq!(
            name(&access(Anonymous::None), &["Bearer zzz".into()]).as_deref(),
            Some("last")
        );
    }

    #[test]
    fn an_empty_token_lets_nobody_in() {
        let access = Access::new(watch::channel(config(Anonymous::None, &[("empty", "", &[])])).1);
        for value in ["Bearer ".into(), basic(":"), basic(":x-oauth-basic")] {
            assert_eq!(name(&access, std::slice::from_ref(&value)), None, "{value}");
        }
    }

    #[test]
    fn who_may_read_what() {
        let access = access(Anonymous::Read);
        let repos = [
            "github.com/my-org/a",
            "github.com/other/a",
            "git.corp/deep/er/b",
            "git.corp/only/this",
        ];
        let table = [
            ("", [true, true, true, true]),
            ("Bearer s3cret", [true, true, true, true]),
            ("Bearer t:ok en", [true, false, true, true]),
            ("Bearer zzz", [false, false, false, true]),
        ];
        for (value, expected) in table {
            let values = if value.is_empty() {
                vec![]
            } else {
                vec![value.to_owned()]
            };
            let principal = access.principal(&headers(&values)).expect("let in");
            let may = repos.map(|repo| principal.may_read(&RepoName::parse(repo).expect("a name")));
            assert_eq!(may, expected, "{value}");
            assert_eq!(principal.may_read_every_repo(), !expected.contains(&false));
        }
    }

    /// Neither an upstream that is slow nor one that is not asked: else who is named could be found out.
    #[tokio::test(start_paused = true)]
    async fn every_refusal_takes_as_long() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        // Takes connections, and never answers.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let text = format!(
            r#"{{"git": {{"upstreams": [{{"host": "git.corp", "url": "http://{}"}}]}},
                "access": {{"ask_upstream": [{{"host": "git.corp", "users": ["named"]}}]}}}}"#,
            silent.local_addr().expect("an address")
        );
        let config = Config::parse(&text, &Environment::default()).expect("a configuration");
        let access = Access::new(watch::channel(Arc::new(config)).1);
        let key = PublicKey::from_openssh(include_str!("../ssh/fixtures/ca.pub")).expect("a key");
        let identity = SshIdentity::Key(Box::new(key));
        let repo = RepoName::parse("git.corp/my-org/a").expect("a name");
        for user in ["named", "other"] {
            let began = Instant::now();
            let peer = IpAddr::from([127, 0, 0, 1]);
            let who = access.ssh_principal_for(user, &identity, peer, &repo);
            assert!(matches!(who.await, Err(Error::NotFound)), "{user}");
            assert_eq!(began.elapsed().as_secs(), PATIENCE.as_secs(), "{user}");
        }
    }

    #[test]
    fn a_reload_holds_for_the_next_request() {
        let (sender, receiver) = watch::channel(config(Anonymous::Read, &[("old", "one", &[])]));
        let access = Access::new(receiver);
        assert_eq!(
            name(&access, &["Bearer one".into()]).as_deref(),
            Some("old")
        );
        sender.send_replace(config(Anonymous::None, &[("new", "two", &[])]));
        assert_eq!(name(&access, &["Bearer one".into()]), None);
        assert_eq!(
            name(&access, &["Bearer two".into()]).as_deref(),
            Some("new")
        );
        assert_eq!(name(&access, &[]), None);
    }
}
