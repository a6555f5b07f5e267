//! The name of a repository: a host and a path below it, safe to use as a folder.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `host/path`, for example `github.com/rust-lang/log`; never with a `.git` at its end.
///
/// SECURITY: whatever holds a `RepoName` may join it to a folder. The constructor is the only way in, and it takes
/// only an allow-list of bytes, so that no `..`, NUL, separator of another system or encoded form of these gets through.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepoName {
    host: Arc<str>,
    path: Arc<str>,
}

/// Why a text is no repository name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    #[error("expected `host/path`, found nothing after the host")]
    NoPath,
    #[error("expected a host name of letters, digits, `.`, `-`, `_` and `:port`")]
    Host,
    #[error(
        "expected path segments of letters, digits, `.`, `-`, `_`, `+`, `~` and `@` that are more than dots and do not \
         end in `.git`"
    )]
    Segment,
    #[error("expected at most {MAX_NAME} bytes and {MAX_SEGMENTS} path segments")]
    TooLong,
}

/// Well below PATH_MAX, so that the folder of the mirror and the files in it always fit.
pub const MAX_NAME: usize = 512;
/// GitLab allows 20 nested groups.
pub const MAX_SEGMENTS: usize = 24;
/// A folder's name may have 255 bytes on Linux; the mirror's ends in `.git`.
const MAX_SEGMENT: usize = 200;

impl RepoName {
    /// Parses `host/path`, `host/path.git` or `host/path/`. Takes decoded text: percent signs are refused.
    ///
    /// # Errors
    /// [`InvalidName`] says which part is wrong.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        if text.len() > MAX_NAME {
            return Err(InvalidName::TooLong);
        }
        let (host, path) = text.split_once('/').ok_or(InvalidName::NoPath)?;
        if !is_host(host) {
            return Err(InvalidName::Host);
        }
        let path = path.strip_suffix('/').unwrap_or(path);
        let path = path.strip_suffix(".git").unwrap_or(path);
        if path.is_empty() {
            return Err(InvalidName::NoPath);
        }
        if path.split('/').count() > MAX_SEGMENTS {
            return Err(InvalidName::TooLong);
        }
        if !path.split('/').all(is_segment) {
            return Err(InvalidName::Segment);
        }
        Ok(Self {
            host: host.to_ascii_lowercase().into(),
            path: path.into(),
        })
    }

    /// The host as configured in `git.upstreams[].host`, in lower case.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The path below the host, without `.git`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where the mirror of this repository lies below `root`: `<root>/<host>/<path>.git`.
    pub fn folder_below(&self, root: &Path) -> PathBuf {
        root.join(&*self.host).join(format!("{}.git", self.path))
    }
}

/// Whether `text` can be a host in a repository name: a DNS name or address, with an optional port.
pub fn is_host(text: &str) -> bool {
    let (name, port) = match text.split_once(':') {
        Some((name, port)) => (name, Some(port)),
        None => (text, None),
    };
    !name.is_empty()
        // The folder of the host has the port in its name, and names of folders have 255 bytes at most.
        && name.len() <= 249
        // It would be taken for a mirror.
        && !name.to_ascii_lowercase().ends_with(".git")
        && name.as_bytes()[0].is_ascii_alphanumeric()
        && !name.contains("..")
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        && port.is_none_or(|port| {
            !port.is_empty() && port.len() <= 5 && port.bytes().all(|b| b.is_ascii_digit())
        })
}

fn is_segment(segment: &str) -> bool {
    !segment.is_empty()
        && segment.len() <= MAX_SEGMENT
        // `.` and `..` are folders; a segment in `.git` would lie inside another mirror.
        && !segment.bytes().all(|b| b == b'.')
        && !segment.to_ascii_lowercase().ends_with(".git")
        && segment.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b'+' | b'~' | b'@'))
}

impl fmt::Display for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.path)
    }
}

impl fmt::Debug for RepoName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl std::str::FromStr for RepoName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        Self::parse(text)
    }
}
