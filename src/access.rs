//! Who asks, and what they may read.
//!
//! Defences in this file:
//! - tokens are compared as SHA-256 digests in constant time against every configured token, without early exit;
//! - credentials that are wrong are an error, also where anonymous users may read: nobody is silently downgraded.

use std::sync::{Arc, Mutex};

use aws_lc_rs::constant_time::verify_slices_are_equal;
use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use tokio::sync::watch;

use crate::config::patterns::Patterns;
use crate::config::{Anonymous, Config};
use crate::error::Error;
use crate::git::name::RepoName;

/// Answers who a request comes from, by the configuration of the moment.
pub struct Access {
    config: watch::Receiver<Arc<Config>>,
    /// The table for the configuration that it was made from; holding that one keeps its address from being reused.
    table: Mutex<(Arc<Config>, Arc<Table>)>,
}

/// Who a request comes from.
#[derive(Clone)]
pub struct Principal {
    grant: Grant,
}

#[derive(Clone)]
enum Grant {
    Anonymous,
    Token {
        name: Arc<str>,
        repos: Arc<Patterns>,
    },
}

struct Table {
    anonymous: bool,
    tokens: Vec<Entry>,
}

struct Entry {
    digest: [u8; SHA256_OUTPUT_LEN],
    name: Arc<str>,
    repos: Arc<Patterns>,
}

/// Some clients leave the padding out.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

impl Access {
    /// Follows `config`: after a reload the next request is judged by the new one.
    pub fn new(config: watch::Receiver<Arc<Config>>) -> Self {
        let current = config.borrow().clone();
        let table = Arc::new(Table::of(&current.access));
        Self {
            config,
            table: Mutex::new((current, table)),
        }
    }

    /// Who sends these headers.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] for credentials that are wrong, and for none where anonymous users may not read.
    pub fn principal(&self, headers: &HeaderMap) -> Result<Principal, Error> {
        let table = self.table();
        let mut presented = headers.get_all(AUTHORIZATION).iter();
        let grant = match (presented.next(), presented.next()) {
            (None, _) if table.anonymous => Some(Grant::Anonymous),
            (Some(value), None) => token(value.as_bytes()).and_then(|token| table.find(&token)),
            // None where one is needed, or two: which one another proxy would take is unknown.
            _ => None,
        };
        grant
            .map(|grant| Principal { grant })
            .ok_or(Error::Unauthorized)
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
    /// Whether this principal may know of and read `repo`. The list of upstreams is checked elsewhere.
    pub fn may_read(&self, repo: &RepoName) -> bool {
        match &self.grant {
            Grant::Anonymous => true,
            Grant::Token { repos, .. } => repos.matches(&repo.to_string()),
        }
    }

    /// The token's name in the configuration, for the log; `None` for anonymous.
    pub fn name(&self) -> Option<&str> {
        match &self.grant {
            Grant::Anonymous => None,
            Grant::Token { name, .. } => Some(name),
        }
    }

    /// Whoever comes without credentials.
    pub fn anonymous() -> Self {
        Self {
            grant: Grant::Anonymous,
        }
    }
}

impl Table {
    fn of(access: &crate::config::Access) -> Self {
        let tokens = access.tokens.iter().map(|token| Entry {
            digest: sha256(token.secret.expose()),
            name: token.name.as_str().into(),
            repos: Arc::new(token.repos.clone()),
        });
        Self {
            anonymous: matches!(access.anonymous, Anonymous::Read),
            tokens: tokens.collect(),
        }
    }

    /// SECURITY: compares with all tokens, each in constant time; digests have one length, so none leaks.
    fn find(&self, token: &[u8]) -> Option<Grant> {
        let digest = sha256(token);
        let mut found = None;
        for entry in &self.tokens {
            if verify_slices_are_equal(&entry.digest, &digest).is_ok() {
                found = Some(entry);
            }
        }
        found.map(|entry| Grant::Token {
            name: entry.name.clone(),
            repos: entry.repos.clone(),
        })
    }
}

fn sha256(bytes: &[u8]) -> [u8; SHA256_OUTPUT_LEN] {
    digest(&SHA256, bytes)
        .as_ref()
        .try_into()
        .expect("SHA-256 has 32 bytes")
}

/// The token in an `Authorization` value: `Bearer <token>` (RFC 6750), or Basic (RFC 7617) with it as password of any
/// user, or as user with an empty password or `x-oauth-basic`, which is what people have in their URLs for GitHub.
fn token(value: &[u8]) -> Option<Vec<u8>> {
    let space = value.iter().position(|byte| *byte == b' ')?;
    let (scheme, rest) = (&value[..space], value[space..].trim_ascii());
    let token = if scheme.eq_ignore_ascii_case(b"bearer") {
        rest.to_vec()
    } else if scheme.eq_ignore_ascii_case(b"basic") {
        let pair = BASE64.decode(rest).ok()?;
        let colon = pair.iter().position(|byte| *byte == b':')?;
        let (user, password) = (&pair[..colon], &pair[colon + 1..]);
        if matches!(password, b"" | b"x-oauth-basic") {
            user.to_vec()
        } else {
            password.to_vec()
        }
    } else {
        return None;
    };
    // SECURITY: an empty token is never right, whatever a token file holds.
    (!token.is_empty()).then_some(token)
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;
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
        });
        config.access = config::Access {
            anonymous,
            tokens: tokens.collect(),
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
