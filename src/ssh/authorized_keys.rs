//! `authorized_keys`: the keys that are let in (sshd(8), "AUTHORIZED_KEYS FILE FORMAT").

use russh::keys::PublicKey;
use russh::keys::ssh_key::authorized_keys::AuthorizedKeys;

use super::shown;

/// A key of the file.
#[derive(Debug, Clone)]
pub struct AuthorizedKey {
    /// The comment, else the fingerprint.
    pub name: String,
    pub key: PublicKey,
}

/// Why a text is no such file, in words that go behind "found" and the path.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    #[error("whose line {0} is no key")]
    Line(usize),
    #[error("whose line {line} has the option {option:?}, which is not kept here")]
    Option { line: usize, option: String },
}

/// Reads the text of a file.
///
/// SECURITY: an option that restricts a key and is not kept would let more in than its author allowed, so that only
/// those are taken which forbid what does not exist here.
///
/// # Errors
/// What is wrong with the first line that is.
pub fn parse(content: &[u8]) -> Result<Vec<AuthorizedKey>, Wrong> {
    let text = std::str::from_utf8(content).map_err(|_| Wrong::Line(1))?;
    let mut keys = Vec::new();
    for (line, text) in (1..).zip(text.lines()) {
        // The parser takes one line that begins with its first field.
        let Some(entry) = AuthorizedKeys::new(text.trim_start()).next() else {
            continue;
        };
        let entry = entry.map_err(|_| Wrong::Line(line))?;
        for option in entry.config_opts().iter() {
            let is_harmless = option == "restrict"
                || option.starts_with("no-")
                || option.starts_with("environment=");
            if !is_harmless {
                let option = option.split('=').next().unwrap_or_default().to_owned();
                return Err(Wrong::Option { line, option });
            }
        }
        let key = entry.public_key().clone();
        let comment = String::from_utf8_lossy(key.comment().as_ref()).into_owned();
        keys.push(AuthorizedKey {
            name: if comment.trim().is_empty() {
                shown(&key)
            } else {
                comment
                    .chars()
                    .filter(|c| !c.is_control())
                    .take(100)
                    .collect()
            },
            key,
        });
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = include_str!("fixtures/a.pub");

    fn names(text: &str) -> Result<Vec<String>, Wrong> {
        parse(text.as_bytes()).map(|keys| keys.into_iter().map(|key| key.name).collect())
    }

    #[test]
    fn keys_have_names() {
        let a = A.trim();
        let text = format!("# people\n\n{a} ann@example\n  restrict,no-pty {a} ben\n{a}\n");
        let names = names(&text).unwrap();
        assert_eq!(names[..2], ["ann@example", "ben"]);
        assert!(names[2].starts_with("ssh-ed25519 SHA256:"), "{names:?}");
    }

    #[test]
    fn what_restricts_more_than_we_keep_is_refused() {
        let a = A.trim();
        for option in [
            "from=\"10.0.0.0/8\"",
            "command=\"git-shell\"",
            "cert-authority",
            "expiry-time=\"20300101\"",
            "principals=\"x\"",
        ] {
            let name = option.split('=').next().unwrap();
            let wrong = names(&format!("\n{option} {a} x")).unwrap_err();
            assert_eq!(
                wrong,
                Wrong::Option {
                    line: 2,
                    option: name.into()
                }
            );
        }
        assert_eq!(names("ssh-ed25519 !!!").unwrap_err(), Wrong::Line(1));
        assert_eq!(names("hello").unwrap_err(), Wrong::Line(1));
    }
}
