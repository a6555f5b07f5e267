//! What a path below `/crates/` asks for: names of crates, versions and checksums, safe to use as files and in
//! addresses.
//!
//! SECURITY: the constructors are the only way in, and they take only an allow-list of bytes, so that no `..`, NUL,
//! percent sign or second slash gets through.

use std::fmt;
use std::sync::Arc;

use crate::blobs::Digest;

/// The longest name that crates.io takes.
const MAX_NAME: usize = 64;
/// Of a version; semver itself sets no limit.
const MAX_VERSION: usize = 128;

/// The name of a crate in lower case, as it stands in the paths of an index.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CrateName(Arc<str>);

/// What a request asks a registry for.
#[derive(Debug, PartialEq, Eq)]
pub enum Wanted {
    Config,
    Entry(CrateName),
    File(CrateFile),
    /// What is above the index: search, publishing, owners.
    Api,
}

/// One `.crate` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrateFile {
    /// As published: upper case counts in addresses of files.
    pub name: Arc<str>,
    pub version: Arc<str>,
    pub digest: Digest,
}

impl Wanted {
    /// What `path`, below the registry, stands for. `None` for what nothing can be at.
    pub fn parse(path: &str) -> Option<Self> {
        let mut parts = path.split('/');
        match [(); 5].map(|()| parts.next()) {
            [Some("config.json"), None, ..] => Some(Self::Config),
            [Some("api"), Some("v1"), ..] => Some(Self::Api),
            [Some("dl"), Some(name), Some(version), Some(digest), None] => {
                CrateFile::parse(name, version, digest).map(Self::File)
            }
            _ => {
                let name = CrateName::parse(path.rsplit('/').next()?)?;
                (name.index_path() == path).then_some(Self::Entry(name))
            }
        }
    }
}

impl CrateFile {
    /// `None` where one of them cannot be right.
    pub fn parse(name: &str, version: &str, digest: &str) -> Option<Self> {
        (is_name(name) && is_version(version)).then_some(())?;
        Some(Self {
            name: name.into(),
            version: version.into(),
            digest: digest.parse().ok()?,
        })
    }
}

impl CrateName {
    /// Takes lower case only: an index has each entry once.
    pub fn parse(text: &str) -> Option<Self> {
        let lower = !text.bytes().any(|byte| byte.is_ascii_uppercase());
        (lower && is_name(text)).then(|| Self(text.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where an index has its entry: `1/a`, `2/ab`, `3/a/abc`, `ab/cd/abcd`.
    pub fn index_path(&self) -> String {
        format!("{}/{}", prefix(&self.0), self.0)
    }
}

/// The folders before a name in an index, and what `{prefix}` stands for in `dl`.
pub(super) fn prefix(name: &str) -> String {
    match name.len() {
        length @ (1 | 2) => length.to_string(),
        3 => format!("3/{}", &name[..1]),
        _ => format!("{}/{}", &name[..2], &name[2..4]),
    }
}

fn is_name(text: &str) -> bool {
    (1..=MAX_NAME).contains(&text.len())
        && !text.starts_with('-')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
}

fn is_version(text: &str) -> bool {
    text.len() <= MAX_VERSION
        && text.starts_with(|first: char| first.is_ascii_digit())
        && !text.contains("..")
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'+'))
}

impl fmt::Display for CrateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for CrateName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHA: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn paths_of_an_index() {
        for path in [
            "1/a",
            "2/ab",
            "3/a/abc",
            "ab/cd/abcd",
            "se/rd/serde_json",
            "dl/x_/dlx_",
            "co/nf/config",
        ] {
            let Some(Wanted::Entry(name)) = Wanted::parse(path) else {
                panic!("{path}")
            };
            assert_eq!(name.index_path(), path);
        }
        assert_eq!(Wanted::parse("config.json"), Some(Wanted::Config));
        assert_eq!(Wanted::parse("api/v1/crates"), Some(Wanted::Api));
        let long = format!("aa/aa/{}", "a".repeat(65));
        for path in [
            "",
            "/",
            "a",
            "1/b/a",
            "1/ab",
            "2/a",
            "3/b/abc",
            "ab/ce/abcd",
            "Ab/cd/Abcd",
            "ab/cd/ABCD",
            "ab/cd/abcd/",
            "/1/a",
            "1//a",
            "ab/cd/../abcd",
            "1/.",
            "2/..",
            "3/./...",
            "1/%61",
            "1/\0",
            "1/é",
            "se/rd/serde.json",
            "1/-",
            "api",
            &long,
        ] {
            assert_eq!(Wanted::parse(path), None, "{path}");
        }
    }

    #[test]
    fn paths_of_files() {
        let path = format!("dl/Inflector/0.11.4-rc.1+build/{SHA}");
        let Some(Wanted::File(file)) = Wanted::parse(&path) else {
            panic!("{path}")
        };
        assert_eq!(
            (&*file.name, &*file.version),
            ("Inflector", "0.11.4-rc.1+build")
        );
        let sha = SHA.to_uppercase();
        for path in [
            format!("dl/serde/1.0.0/{sha}"),
            format!("dl/serde/1.0.0/{}", &SHA[1..]),
            format!("dl/serde/v1.0.0/{SHA}"),
            format!("dl/serde/1..0/{SHA}"),
            format!("dl/serde/../{SHA}"),
            format!("dl/../1.0.0/{SHA}"),
            format!("dl/ser%64e/1.0.0/{SHA}"),
            format!("dl/serde/1.0.0/{SHA}/"),
            "dl/serde/1.0.0".into(),
        ] {
            assert_eq!(Wanted::parse(&path), None, "{path}");
        }
    }

    proptest! {
        /// Whatever is asked, only such names become files.
        #[test]
        fn no_path_leaves_its_folder(path in "[a-zA-Z0-9./%_\\\\-]{0,40}") {
            if let Some(Wanted::Entry(name)) = Wanted::parse(&path) {
                prop_assert!(!name.as_str().contains(['/', '.', '\\', '%']));
                prop_assert_eq!(name.index_path(), path);
            }
        }
    }
}
