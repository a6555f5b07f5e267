//! Glob patterns that allow repositories and registries.

use std::fmt;

use fast_glob::glob_match;
use serde::{Serialize, Serializer};

/// A list of glob patterns. `*` and `?` stay within one segment of the path, `**` crosses segments, `{a,b}` and `[ab]`
/// choose, `\` takes the next character as it is. An empty list allows everything.
///
/// SECURITY: case matters, as these are allow-lists: a pattern never allows more than what it spells.
#[derive(Clone, Default)]
pub struct Patterns {
    texts: Vec<String>,
}

impl Patterns {
    /// # Errors
    /// The first pattern that is none, by its place in the list, and what is wrong with it.
    pub fn new(texts: Vec<String>) -> Result<Self, (usize, String)> {
        for (index, text) in texts.iter().enumerate() {
            check(text).map_err(|wrong| (index, wrong))?;
        }
        Ok(Self { texts })
    }

    /// The empty list, which allows everything.
    pub fn everything() -> Self {
        Self::default()
    }

    /// Whether `text` is allowed: a path below a host, or `host/path`, as the owner of the list says.
    pub fn matches(&self, text: &str) -> bool {
        self.texts.is_empty() || self.texts.iter().any(|pattern| glob_match(pattern, text))
    }

    /// The patterns as written.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }
}

/// Refuses what is no pattern, and what can never match a repository.
pub fn check(text: &str) -> Result<(), String> {
    if text.is_empty() {
        return Err("it is empty".into());
    }
    if text.starts_with('/') || text.ends_with('/') {
        return Err("it begins or ends with `/`, which no repository's name does".into());
    }
    if text.ends_with(".git") {
        return Err("it ends in `.git`, which is never part of a repository's name here".into());
    }
    // SECURITY: it would allow all but what it spells.
    if text.starts_with('!') {
        return Err("it begins with `!`: write what is allowed, not what is not".into());
    }
    closed(text).map_err(Into::into)
}

/// The matcher takes every text; one that is never closed would silently match nothing.
fn closed(text: &str) -> Result<(), &'static str> {
    let mut braces = 0_usize;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '\\' if characters.next().is_none() => {
                return Err("nothing follows its last `\\`");
            }
            '[' => class(&mut characters).ok_or("a `[` in it has no `]`")?,
            '{' => braces += 1,
            '}' => braces = braces.checked_sub(1).ok_or("a `}` in it has no `{`")?,
            _ => {}
        }
    }
    if braces > 0 {
        return Err("a `{` in it has no `}`");
    }
    Ok(())
}

/// Reads a choice of characters to its end; a `]` at its beginning is one of them.
fn class(characters: &mut std::str::Chars<'_>) -> Option<()> {
    let mut first = characters.next()?;
    if matches!(first, '!' | '^') {
        first = characters.next()?;
    }
    if first == '\\' {
        characters.next()?;
    }
    while let Some(character) = characters.next() {
        match character {
            '\\' => {
                characters.next()?;
            }
            ']' => return Some(()),
            _ => {}
        }
    }
    None
}

impl fmt::Debug for Patterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.texts.fmt(f)
    }
}

impl Serialize for Patterns {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.texts.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, text: &str) -> bool {
        Patterns::new(vec![pattern.into()]).unwrap().matches(text)
    }

    #[test]
    fn a_star_stays_within_a_segment() {
        assert!(matches("my-org/*", "my-org/app"));
        assert!(!matches("my-org/*", "my-org/group/app"));
        assert!(!matches("my-org/*", "other/app"));
        assert!(!matches("my-org/*", "my-org"));
        assert!(!matches("*", "my-org/app"));
    }

    #[test]
    fn two_stars_cross_segments() {
        assert!(matches("my-org/**", "my-org/app"));
        assert!(matches("my-org/**", "my-org/group/app"));
        assert!(!matches("my-org/**", "my-org2/app"));
        assert!(matches("**", "my-org/group/app"));
        assert!(matches("*/my-org/*", "github.com/my-org/app"));
    }

    #[test]
    fn a_pattern_is_anchored_at_both_ends() {
        assert!(!matches("my-org/app", "x/my-org/app"));
        assert!(!matches("my-org/app", "my-org/app2"));
        assert!(!matches("my-org/app", "my-org/App"));
    }

    #[test]
    fn an_empty_list_allows_everything() {
        assert!(Patterns::everything().matches("any/thing"));
        assert!(Patterns::new(Vec::new()).unwrap().matches("any/thing"));
    }

    #[test]
    fn choices() {
        assert!(matches("my-org/{app,lib}", "my-org/lib"));
        assert!(!matches("my-org/{app,lib}", "my-org/tool"));
        assert!(matches("my-org/{app,lib-*}", "my-org/lib-a"));
        assert!(!matches("my-org/{app,lib-*}", "my-org/lib-a/b"));
        assert!(matches("my-org/v[0-9]", "my-org/v1"));
        assert!(!matches("my-org/v[!0-9]", "my-org/v1"));
        assert!(!matches("my-org[!a]app", "my-org/app"));
        assert!(!matches("my-org?app", "my-org/app"));
        assert!(matches("{a,b}/**", "b/c/d"));
    }

    #[test]
    fn names_the_wrong_pattern() {
        let wrong = |texts: &[&str]| {
            Patterns::new(texts.iter().map(|t| t.to_string()).collect()).unwrap_err()
        };
        assert_eq!(wrong(&["a/*", "a/[b"]).0, 1);
        assert_eq!(wrong(&[""]).0, 0);
        assert_eq!(wrong(&["/a"]).0, 0);
        assert_eq!(wrong(&["a/b.git"]).0, 0);
        for pattern in ["!a/b", "a/{b", "a/b}", "a/b\\", "a/[]", "a/[!]", "a/[^\\]"] {
            assert_eq!(wrong(&[pattern]).0, 0, "{pattern}");
        }
    }
}
