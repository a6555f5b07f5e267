//! Glob patterns that allow repositories.

use std::fmt;

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use serde::{Serialize, Serializer};

/// A list of glob patterns. `*` and `?` stay within one segment of the path, `**` crosses segments, `{a,b}` and `[ab]`
/// choose. An empty list allows everything.
///
/// SECURITY: case matters, as these are allow-lists: a pattern never allows more than what it spells.
#[derive(Clone)]
pub struct Patterns {
    texts: Vec<String>,
    set: GlobSet,
}

impl Patterns {
    /// # Errors
    /// The first pattern that is none, by its place in the list, and what is wrong with it.
    pub fn new(texts: Vec<String>) -> Result<Self, (usize, String)> {
        let mut set = GlobSetBuilder::new();
        for (index, text) in texts.iter().enumerate() {
            check(text).map_err(|wrong| (index, wrong))?;
            let glob = GlobBuilder::new(text).literal_separator(true).build();
            set.add(glob.map_err(|error| (index, error.kind().to_string()))?);
        }
        let set = set.build().map_err(|error| (0, error.kind().to_string()))?;
        Ok(Self { texts, set })
    }

    /// The empty list, which allows everything.
    pub fn everything() -> Self {
        Self {
            texts: Vec::new(),
            set: GlobSet::empty(),
        }
    }

    /// Whether `text` is allowed: a path below a host, or `host/path`, as the owner of the list says.
    pub fn matches(&self, text: &str) -> bool {
        self.texts.is_empty() || self.set.is_match(text)
    }

    /// The patterns as written.
    pub fn texts(&self) -> &[String] {
        &self.texts
    }
}

/// Refuses what compiles but can never match a repository.
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
    match GlobBuilder::new(text).literal_separator(true).build() {
        Ok(_) => Ok(()),
        Err(error) => Err(error.kind().to_string()),
    }
}

impl Default for Patterns {
    fn default() -> Self {
        Self::everything()
    }
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
    fn names_the_wrong_pattern() {
        let wrong = |texts: &[&str]| {
            Patterns::new(texts.iter().map(|t| t.to_string()).collect()).unwrap_err()
        };
        assert_eq!(wrong(&["a/*", "a/[b"]).0, 1);
        assert_eq!(wrong(&[""]).0, 0);
        assert_eq!(wrong(&["/a"]).0, 0);
        assert_eq!(wrong(&["a/b.git"]).0, 0);
    }
}
