//! The section `git`.

use std::collections::HashSet;
use std::time::Duration;

use super::ssh::SshFiles;
use super::{Validator, indexed, optional};
use crate::config::file::{GitFile, UpstreamFile};
use crate::config::given::Given;
use crate::config::problem::quote;
use crate::config::{Git, Upstream};
use crate::git::name::{self, RepoName};

impl Validator<'_> {
    pub(super) fn git(&mut self, file: &GitFile) -> Option<Git> {
        let mut hosts = HashSet::new();
        let upstreams: Vec<_> = indexed("git.upstreams", &file.upstreams)
            .map(|(key, file)| self.upstream(&key, file, &mut hosts))
            .collect();
        let upstreams: Option<Vec<Upstream>> = upstreams.into_iter().collect();
        let warm: Vec<_> = indexed("git.warm", &file.warm)
            .map(|(key, given)| self.warm(&key, given, upstreams.as_deref()))
            .collect();
        let refs: Vec<_> = indexed("git.refs", &file.refs)
            .map(|(key, given)| self.reference(&key, given))
            .collect();
        if file.refs.is_empty() {
            self.problems.add(
                "git.refs",
                "an empty list",
                "at least one entry, such as \"refs/heads/*\"",
            );
        }
        let max_age = self.span("git.max_age", &file.max_age, Duration::ZERO);
        let refresh = self.span("git.refresh", &file.refresh, Duration::from_secs(1));
        let when_upstream_fails = self.read("git.when_upstream_fails", &file.when_upstream_fails);
        let keep_unreachable = self.span(
            "git.keep_unreachable",
            &file.keep_unreachable,
            Duration::ZERO,
        );
        let first_clones = self.count("git.first_clones", &file.first_clones, 1..=1000);
        let allow_wants = self.read("git.allow_wants", &file.allow_wants);
        let mut warm: Vec<RepoName> = warm.into_iter().collect::<Option<_>>()?;
        let mut known = HashSet::new();
        warm.retain(|name| known.insert(name.clone()));
        Some(Git {
            upstreams: upstreams?,
            warm,
            max_age: max_age?,
            refresh: refresh?,
            when_upstream_fails: when_upstream_fails?.0,
            refs: refs.into_iter().collect::<Option<_>>()?,
            keep_unreachable: keep_unreachable?,
            first_clones: first_clones?,
            allow_wants: allow_wants?.0,
        })
    }

    fn upstream(
        &mut self,
        key: &str,
        file: &UpstreamFile,
        hosts: &mut HashSet<String>,
    ) -> Option<Upstream> {
        let host = self.host(&format!("{key}.host"), file.host.as_ref(), hosts);
        let url_key = format!("{key}.url");
        let url = self.required(&url_key, file.url.as_ref()).map(|url| url.0);
        let token_key = format!("{key}.token_file");
        let token = optional(&file.token_file, |given| self.secret(&token_key, given));
        let instead = match url.as_ref().map(|url| url.scheme()) {
            Some("file") => Some(("the folder", "none, a folder needs no token")),
            Some("ssh") => Some(("the ssh:// URL", "none, SSH takes a key: key_file")),
            _ => None,
        };
        if let (Some(_), Some((beside, expected))) = (&file.token_file, instead) {
            self.problems.add(
                &token_key,
                format!("a token beside {beside} of {url_key}"),
                expected,
            );
        }
        let auth = self.read(&format!("{key}.auth"), &file.auth);
        let user = self.user(&format!("{key}.user"), &file.user);
        let ssh = url.as_ref().map(|url| self.upstream_ssh(key, url, file));
        let repos = self.patterns(&format!("{key}.repos"), &file.repos);
        let (token_file, token) = token?.unzip();
        let SshFiles {
            key_file,
            passphrase_file,
            known_hosts_file,
            ssh,
        } = ssh??;
        Some(Upstream {
            host: host?,
            url: url?,
            token_file,
            token,
            auth: auth?.0,
            user: user?,
            key_file,
            passphrase_file,
            known_hosts_file,
            ssh,
            repos: repos?,
        })
    }

    fn host(
        &mut self,
        key: &str,
        given: Option<&Given<String>>,
        hosts: &mut HashSet<String>,
    ) -> Option<String> {
        let expected = "a host name such as \"github.com\" or \"git.corp.example:8443\"";
        let Some(given) = given else {
            return self.missing(key, expected);
        };
        let host = self.read(key, given)?.to_ascii_lowercase();
        if !name::is_host(&host) {
            return self.wrong(key, quote(&host), expected);
        }
        if !hosts.insert(host.clone()) {
            return self.wrong(
                key,
                format!("{} a second time", quote(&host)),
                "each host once",
            );
        }
        Some(host)
    }

    fn user(&mut self, key: &str, given: &Given<String>) -> Option<String> {
        let user = self.read(key, given)?;
        // A colon ends the user name in Basic (RFC 7617, section 2).
        if user.is_empty()
            || !user
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b':')
        {
            // SECURITY: `name:password` is what people try here.
            let found = "another text (not shown, it may be a secret)";
            return self.wrong(
                key,
                found,
                "a user name of printable ASCII without `:` and spaces",
            );
        }
        Some(user)
    }

    /// `upstreams` is `None` when one of them is wrong; then nothing can be said of their hosts.
    fn warm(
        &mut self,
        key: &str,
        given: &Given<RepoName>,
        upstreams: Option<&[Upstream]>,
    ) -> Option<RepoName> {
        let name = self.read(key, given)?;
        let upstreams = upstreams?;
        if self.problems.touch("git.upstreams") {
            return None;
        }
        match upstreams
            .iter()
            .find(|upstream| upstream.host == name.host())
        {
            None => {
                let hosts: Vec<&str> = upstreams
                    .iter()
                    .map(|upstream| upstream.host.as_str())
                    .collect();
                let expected = format!(
                    "a repository of a host in git.upstreams ({})",
                    hosts.join(", ")
                );
                self.wrong(key, quote(&name.to_string()), expected)
            }
            Some(upstream) if !upstream.repos.matches(name.path()) => {
                let expected = format!(
                    "a repository that the upstream's repos allow ({:?})",
                    upstream.repos
                );
                self.wrong(key, quote(&name.to_string()), expected)
            }
            Some(_) => Some(name),
        }
    }

    fn reference(&mut self, key: &str, given: &Given<String>) -> Option<String> {
        let text = self.read(key, given)?;
        if is_refs(&text) {
            return Some(text);
        }
        self.wrong(
            key,
            quote(&text),
            "`refs/<something>/*`, or one reference in full such as \"refs/heads/main\"",
        )
    }
}

/// Whether `text` is `refs/<something>/*` or a full name, by the rules of git-check-ref-format.
fn is_refs(text: &str) -> bool {
    let name = text.strip_suffix("/*").unwrap_or(text);
    let Some(rest) = name.strip_prefix("refs/") else {
        return false;
    };
    rest.split('/').all(|part| {
        !part.is_empty()
            && !part.starts_with('.')
            && !part.ends_with('.')
            && !part.ends_with(".lock")
    }) && !name.contains("..")
        && !name.contains("@{")
        && !name
            .bytes()
            .any(|byte| byte <= b' ' || byte == 0x7f || b"~^:?*[\\".contains(&byte))
}
