//! What is wrong with a configuration, said so that it can be mended.

use std::fmt;

/// One wrong value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The path of the key, like `git.upstreams[1].url`; empty when it is the file as a whole.
    pub key: String,
    /// What was found there. SECURITY: never what may be a secret.
    pub found: String,
    /// What is allowed there.
    pub expected: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            // It may be anything that somebody wrote there, control characters included.
            write!(f, "{}: ", self.key.escape_debug())?;
        }
        write!(f, "found {}; expected {}", self.found, self.expected)
    }
}

/// Every problem of a configuration, in the order in which they were found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// One more. SECURITY: `found` never holds what may be a secret; [`quote`] takes care of most.
    pub fn add(
        &mut self,
        key: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.0.push(Problem {
            key: key.into(),
            found: found.into(),
            expected: expected.into(),
        });
    }

    /// One problem of the file as a whole.
    pub fn one(found: impl Into<String>, expected: impl Into<String>) -> Self {
        let mut problems = Self::default();
        problems.add("", found, expected);
        problems
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In the order in which they were found.
    pub fn iter(&self) -> std::slice::Iter<'_, Problem> {
        self.0.iter()
    }

    /// Whether something at `key`, below it or above it is known to be wrong.
    pub fn touch(&self, key: &str) -> bool {
        self.0
            .iter()
            .any(|problem| is_below(key, &problem.key) || is_below(&problem.key, key))
    }
}

/// Whether `key` is `above` or a key within it.
fn is_below(key: &str, above: &str) -> bool {
    key.strip_prefix(above)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// `text` in quotes, shortened to what fits a line of a log and with control characters escaped.
///
/// SECURITY: text with an `@` may be a URL with a password, wherever somebody has put it, and is not repeated; absolute
/// paths are.
pub fn quote(text: &str) -> String {
    const SHOWN: usize = 80;
    if text.contains('@') && !text.starts_with('/') {
        return "text with an `@` (not shown, it may hold a password)".into();
    }
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_what_can_be_shown() {
        assert_eq!(quote("a\"b\n"), r#""a\"b\n""#);
        assert_eq!(quote("/run/a@b"), r#""/run/a@b""#);
        assert_eq!(quote(&"ä".repeat(100)), format!("\"{}\"…", "ä".repeat(80)));
        assert!(!quote("https://me:hunter2@host").contains("hunter2"));
    }

    #[test]
    fn knows_what_a_problem_touches() {
        let mut problems = Problems::default();
        problems.add("git.upstreams[1]", "text", "an object");
        for key in [
            "git",
            "git.upstreams",
            "git.upstreams[1]",
            "git.upstreams[1].url",
        ] {
            assert!(problems.touch(key), "{key}");
        }
        for key in ["gi", "git.warm", "git.upstreams[10]", "git.upstreams[0]"] {
            assert!(!problems.touch(key), "{key}");
        }
        assert!(!Problems::one("", "").touch("git"));
    }
}
