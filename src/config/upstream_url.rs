//! Where an upstream's repositories are.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use url::Url;

use super::given::is_word;

/// The address below which an upstream's repositories are: `https://`, `http://`, `ssh://user@host:port` or
/// `file:///absolute/path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamUrl(pub Url);

/// What is allowed, in words that go behind "expected".
pub const ALLOWED: &str =
    "`https://host`, `http://host`, `ssh://git@host` or `file:///absolute/path`";

/// Why a text is none. SECURITY: says nothing of the text itself where a password may be in it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    #[error("no URL but {0}")]
    NoUrl(String),
    #[error("a URL with a user name or password in it (not shown)")]
    Credentials,
    #[error("an address in the form `user@host:path`, which is written `ssh://user@host/path`")]
    Scp,
    #[error("an `ssh` URL whose user name is not of letters, digits, `.`, `-` and `_`")]
    User,
    #[error("a URL of the scheme `{0}`")]
    Scheme(String),
    #[error("a `file` URL with the host `{0}`")]
    FileHost(String),
    #[error("a `file` URL of the root folder")]
    Root,
    #[error("a URL with a query or fragment")]
    Query,
}

impl UpstreamUrl {
    /// # Errors
    /// What is wrong, in words that go behind "found".
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let shown = || super::problem::quote(text);
        // `git@host:path` is what people copy, and no URL at all.
        if !text.contains("://") {
            return Err(if text.contains('@') && text.contains(':') {
                Wrong::Scp
            } else {
                Wrong::NoUrl(shown())
            });
        }
        let url = Url::parse(text).map_err(|_| Wrong::NoUrl(shown()))?;
        // An SSH URL has a user by nature.
        let is_ssh = url.scheme() == "ssh";
        if url.password().is_some() || !is_ssh && !url.username().is_empty() {
            return Err(Wrong::Credentials);
        }
        if !is_word(url.username()) {
            return Err(Wrong::User);
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(Wrong::Query);
        }
        match url.scheme() {
            "https" | "http" => Ok(Self(url)),
            "ssh" if url.host_str().is_some_and(|host| !host.is_empty()) => Ok(Self(url)),
            "ssh" => Err(Wrong::NoUrl(shown())),
            "file" => match url.host_str() {
                Some(host) if !host.is_empty() => Err(Wrong::FileHost(host.into())),
                _ if url.path() == "/" => Err(Wrong::Root),
                _ => Ok(Self(url)),
            },
            scheme => Err(Wrong::Scheme(scheme.into())),
        }
    }
}

impl JsonSchema for UpstreamUrl {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "UpstreamUrl".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^(https?://|ssh://|file:///)",
            "examples": ["https://github.com", "ssh://git@git.corp.example:2222", "file:///srv/git"],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_schemes() {
        for text in [
            "ssh://git@git.corp.example:2222",
            "ssh://git.corp.example/~git/team",
            "ssh://git@[::1]:22/",
            "https://github.com",
            "http://127.0.0.1:8080/x",
            "file:///srv/git",
            "https://[::1]:8443/git/",
        ] {
            assert!(UpstreamUrl::parse(text).is_ok(), "{text}");
        }
    }

    #[test]
    fn says_what_is_wrong() {
        let wrong = |text| UpstreamUrl::parse(text).unwrap_err();
        assert_eq!(wrong("git@github.com:my-org"), Wrong::Scp);
        assert_eq!(wrong("ssh://git:hunter2@github.com"), Wrong::Credentials);
        assert_eq!(wrong("ssh://g%20it@github.com"), Wrong::User);
        assert!(matches!(wrong("ssh:///srv/git"), Wrong::NoUrl(_)));
        assert_eq!(wrong("https://user:hunter2@github.com"), Wrong::Credentials);
        assert_eq!(wrong("https://hunter2@github.com"), Wrong::Credentials);
        assert_eq!(wrong("ftp://github.com"), Wrong::Scheme("ftp".into()));
        assert_eq!(wrong("file://srv/git"), Wrong::FileHost("srv".into()));
        assert_eq!(wrong("file:///"), Wrong::Root);
        assert_eq!(wrong("https://github.com/?token=x"), Wrong::Query);
        assert!(matches!(wrong("github.com"), Wrong::NoUrl(_)));
        assert!(matches!(wrong("https://"), Wrong::NoUrl(_)));
    }

    #[test]
    fn never_repeats_a_password() {
        for text in [
            "https://user:hunter2@git hub.com",
            "https://user:hunter2@",
            "user:hunter2@host",
            "ssh://a:hunter2@h",
        ] {
            let message = UpstreamUrl::parse(text).unwrap_err().to_string();
            assert!(!message.contains("hunter2"), "{message}");
        }
    }
}
