//! The section `crates`.

use std::collections::HashMap;
use std::time::Duration;

use url::Url;

use super::{Validator, indexed, is_token, optional};
use crate::config::file::{CratesFile, RegistryFile};
use crate::config::given::{Given, is_word};
use crate::config::lock_file::LockFile;
use crate::config::problem::quote;
use crate::config::{CRATES_IO, Crates, Git, Registry};

impl Validator<'_> {
    pub(super) fn crates(&mut self, file: &CratesFile, git: Option<&Git>) -> Option<Crates> {
        let mut names = HashMap::new();
        let registries: Vec<_> = indexed("crates.registries", &file.registries)
            .map(|(key, file)| self.registry(&key, file, &mut names))
            .collect();
        let max_age = self.span("crates.max_age", &file.max_age, Duration::ZERO);
        let fails = self.read("crates.when_upstream_fails", &file.when_upstream_fails);
        let warm: Vec<_> = indexed("crates.warm", &file.warm)
            .map(|(key, given)| self.lock_file(&key, given, git))
            .collect();
        Some(Crates {
            registries: registries.into_iter().collect::<Option<_>>()?,
            max_age: max_age?,
            when_upstream_fails: fails?.0,
            warm: warm.into_iter().collect::<Option<_>>()?,
        })
    }

    fn registry(
        &mut self,
        key: &str,
        file: &RegistryFile,
        names: &mut HashMap<String, String>,
    ) -> Option<Registry> {
        let name = self.registry_name(&format!("{key}.name"), file.name.as_ref(), names);
        let url_key = format!("{key}.url");
        let url = match (&file.url, &name) {
            (Some(given), _) => self.read(&url_key, given).map(|url| url.0),
            (None, None) => None,
            (None, Some(name)) => index_below(name).or_else(|| {
                let expected =
                    "the address of the sparse index, which only crates.io can be without";
                self.missing(&url_key, expected)
            }),
        };
        let token = optional(&file.token_file, |given| {
            let expected =
                "a file with one token, or with a scheme such as `Bearer`, one space and the token";
            let key = format!("{key}.token_file");
            self.secret_that(is_credentials, &key, given, expected)
        });
        let (token_file, token) = token?.unzip();
        Some(Registry {
            name: name?,
            url: url?,
            token_file,
            token,
        })
    }

    fn registry_name(
        &mut self,
        key: &str,
        given: Option<&Given<String>>,
        names: &mut HashMap<String, String>,
    ) -> Option<String> {
        let expected =
            "a name of 1 to 64 letters, digits, `.`, `-` and `_` that does not begin with `.`";
        let Some(given) = given else {
            return self.missing(key, expected);
        };
        let name = self.read(key, given)?.to_ascii_lowercase();
        // SECURITY: it becomes a folder, and a part of addresses.
        let is_name = (1..=64).contains(&name.len()) && !name.starts_with('.') && is_word(&name);
        if !is_name {
            return self.wrong(key, quote(&name), expected);
        }
        // What cargo calls it, in the configuration that clients get: it knows no names with dots, and no two tables of
        // one name.
        if let Some(other) = names.insert(name.replace('.', "-"), name.clone()) {
            if other == name {
                let found = format!("{} a second time", quote(&name));
                return self.wrong(key, found, "each name once");
            }
            let found = format!("{} beside {}", quote(&name), quote(&other));
            let expected =
                "another name: cargo takes `-` in place of `.`, and so these two for one";
            return self.wrong(key, found, expected);
        }
        Some(name)
    }

    /// `git` is `None` when something is wrong there; then nothing can be said of its repositories.
    fn lock_file(
        &mut self,
        key: &str,
        given: &Given<LockFile>,
        git: Option<&Git>,
    ) -> Option<LockFile> {
        let lock_file = self.read(key, given)?;
        if let (LockFile::InRepo { repo, .. }, Some(git)) = (&lock_file, git)
            && !git.warm.contains(repo)
        {
            let found = quote(&repo.to_string());
            return self.wrong(key, found, "a repository of git.warm");
        }
        Some(lock_file)
    }
}

/// Whether it is what cargo sends as `Authorization`: a token, or with its scheme (RFC 9110, section 11.4).
fn is_credentials(text: &[u8]) -> bool {
    let Some(space) = text.iter().position(|byte| *byte == b' ') else {
        return is_token(text);
    };
    let (scheme, token) = (&text[..space], &text[space + 1..]);
    let is_scheme = scheme
        .iter()
        .all(|byte| byte.is_ascii_alphanumeric() || *byte == b'-');
    is_scheme && is_token(token)
}

/// Where the index of crates.io is. SECURITY: of no other registry, as its token would go to a host that was guessed.
fn index_below(name: &str) -> Option<Url> {
    let is_known = name == CRATES_IO;
    is_known.then(|| Url::parse(&format!("https://index.{name}/")).ok())?
}
