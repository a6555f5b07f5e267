//! The section `access`.

use std::collections::HashSet;
use std::time::Duration;

use super::{Validator, indexed, optional};
use crate::config::file::{AccessFile, AskUpstreamFile, TokenFile};
use crate::config::given::{AbsolutePath, Given, Written, is_word};
use crate::config::problem::quote;
use crate::config::{Access, AskUpstream, Git, Token};

impl Validator<'_> {
    pub(super) fn access(&mut self, file: &AccessFile, git: Option<&Git>) -> Option<Access> {
        let anonymous = self.read("access.anonymous", &file.anonymous);
        let mut names = HashSet::new();
        let keys = self.keys(&file.keys, &mut names);
        let mut hosts = HashSet::new();
        let ask_upstream: Vec<_> = indexed("access.ask_upstream", &file.ask_upstream)
            .map(|(key, file)| self.ask_upstream(&key, file, git, &mut hosts))
            .collect();
        let tokens: Vec<_> = indexed("access.tokens", &file.tokens)
            .map(|(key, file)| self.token(&key, file, &mut names))
            .collect();
        for (index, token) in tokens.iter().enumerate() {
            let same = |other: &Token| {
                token
                    .as_ref()
                    .is_some_and(|token| token.secret.expose() == other.secret.expose())
            };
            if let Some(first) = tokens[..index].iter().flatten().find(|other| same(other)) {
                let found = format!("the same token as that of {}", quote(&first.name));
                self.problems.add(
                    format!("access.tokens[{index}].token_file"),
                    found,
                    "a token of its own",
                );
            }
        }
        Some(Access {
            anonymous: anonymous?.0,
            tokens: tokens.into_iter().collect::<Option<_>>()?,
            keys: keys?,
            ask_upstream: ask_upstream.into_iter().collect::<Option<_>>()?,
        })
    }

    fn token(&mut self, key: &str, file: &TokenFile, names: &mut HashSet<String>) -> Option<Token> {
        let name = self.name(&format!("{key}.name"), file.name.as_ref(), names);
        let file_key = format!("{key}.token_file");
        let secret = match &file.token_file {
            Some(given) => self.secret(&file_key, given),
            None => self.missing(&file_key, &AbsolutePath::expected()),
        };
        let repos = self.patterns(&format!("{key}.repos"), &file.repos);
        let registries = optional(&file.registries, |given| {
            self.patterns(&format!("{key}.registries"), given)
        });
        let (token_file, secret) = secret?;
        Some(Token {
            name: name?,
            token_file,
            secret,
            repos: repos?,
            registries: registries?,
        })
    }

    /// `git` is `None` when something is wrong there; then nothing can be said of its hosts.
    fn ask_upstream(
        &mut self,
        key: &str,
        file: &AskUpstreamFile,
        git: Option<&Git>,
        hosts: &mut HashSet<String>,
    ) -> Option<AskUpstream> {
        let (host_key, users_key) = (format!("{key}.host"), format!("{key}.users"));
        let host = self.required(&host_key, file.host.as_ref());
        let host = host.and_then(|host| {
            let host = host.to_ascii_lowercase();
            let can_be_asked = |git: &Git| {
                let mut upstreams = git.upstreams.iter();
                upstreams.any(|upstream| upstream.host == host && upstream.url.scheme() != "file")
            };
            if git.is_some_and(|git| !can_be_asked(git)) {
                let expected = "a host of git.upstreams that is no folder";
                return self.wrong(&host_key, quote(&host), expected);
            }
            if !hosts.insert(host.clone()) {
                let found = format!("{} a second time", quote(&host));
                return self.wrong(&host_key, found, "each host once");
            }
            Some(host)
        });
        let users: Vec<_> = indexed(&users_key, &file.users)
            .map(|(key, given)| self.upstream_user(&key, given))
            .collect();
        // SECURITY: everybody can have an account at a public host.
        if users.is_empty() {
            return self.missing(&users_key, "at least one user of that host");
        }
        let repos = self.patterns(&format!("{key}.repos"), &file.repos);
        let keep = self.span(&format!("{key}.keep"), &file.keep, Duration::from_secs(1));
        Some(AskUpstream {
            host: host?,
            users: users.into_iter().collect::<Option<_>>()?,
            repos: repos?,
            keep: keep?,
        })
    }

    fn upstream_user(&mut self, key: &str, given: &Given<String>) -> Option<String> {
        let user = self.read(key, given)?;
        let can_be_in_a_path = !user.is_empty() && !user.starts_with('.') && is_word(&user);
        if !can_be_in_a_path {
            return self.wrong(
                key,
                quote(&user),
                "a user of letters, digits, `.`, `-` and `_`",
            );
        }
        Some(user)
    }

    /// The name of whoever is let in, which stands in logs.
    pub(super) fn name(
        &mut self,
        key: &str,
        given: Option<&Given<String>>,
        names: &mut HashSet<String>,
    ) -> Option<String> {
        let name = self.required(key, given)?;
        if name.is_empty() || name.len() > 100 || name.chars().any(char::is_control) {
            return self.wrong(key, quote(&name), "a name of 1 to 100 characters");
        }
        if !names.insert(name.clone()) {
            let found = format!("{} a second time", quote(&name));
            return self.wrong(key, found, "each name once");
        }
        Some(name)
    }
}
