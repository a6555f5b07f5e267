//! What is allowed and still probably not meant.

use url::Host;

use super::{Anonymous, Config};

/// Sentences for the log, each with the key it is about.
pub fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    if config.git.upstreams.is_empty() {
        warnings
            .push("git.upstreams: the list is empty, so that no repository can be served".into());
    }
    for (index, upstream) in config.git.upstreams.iter().enumerate() {
        let key = format!("git.upstreams[{index}]");
        // SECURITY: whoever is on the way reads along.
        if upstream.token.is_some()
            && upstream.url.scheme() == "http"
            && !is_loopback(&upstream.url)
        {
            warnings.push(format!(
                "{key}.url: the token goes over the network in clear text; use https"
            ));
        }
        // SECURITY: the upstream's credentials open what the operator can read to everybody who can connect.
        if (upstream.token.is_some() || upstream.ssh.is_some())
            && config.access.anonymous == Anonymous::Read
            && !config.listen.http.ip().is_loopback()
        {
            warnings.push(format!(
                "access.anonymous: clients without a token may read what the credentials of {key} ({}) can read; set it \
                 to \"none\" and give clients tokens or keys of their own unless everybody who can connect may read that",
                upstream.host
            ));
        }
        if upstream.url.scheme() != "file" {
            for pattern in upstream
                .repos
                .texts()
                .iter()
                .filter(|pattern| !crosses_segments(pattern))
            {
                warnings.push(format!(
                    "{key}.repos: {pattern:?} matches paths of one segment only; `owner/*` allows the repositories of \
                     an owner, `**` everything"
                ));
            }
        }
    }
    for (index, registry) in config.crates.registries.iter().enumerate() {
        let key = format!("crates.registries[{index}]");
        if registry.token.is_none() {
            continue;
        }
        // SECURITY: as for upstreams of Git above.
        if registry.url.scheme() == "http" && !is_loopback(&registry.url) {
            warnings.push(format!(
                "{key}.url: the token goes over the network in clear text; use https"
            ));
        }
        if config.access.anonymous == Anonymous::Read && !config.listen.http.ip().is_loopback() {
            warnings.push(format!(
                "access.anonymous: clients without a token may read what the token of {key} ({}) can read; set it to \
                 \"none\" and give clients tokens of their own unless everybody who can connect may read that",
                registry.name
            ));
        }
    }
    for (index, token) in config.access.tokens.iter().enumerate() {
        let key = format!("access.tokens[{index}].repos");
        if !token.repos.texts().is_empty() && config.access.anonymous == Anonymous::Read {
            warnings.push(format!(
                "{key}: keeps nothing from anybody while access.anonymous is \"read\", which lets clients without a \
                 token read everything"
            ));
        }
        for pattern in token
            .repos
            .texts()
            .iter()
            .filter(|pattern| names_no_upstream(pattern, config))
        {
            warnings.push(no_such_host(&key, pattern));
        }
    }
    let keys = &config.access.keys;
    let has_keys = keys.authorized_keys_file.is_some()
        || !keys.entries.is_empty()
        || !keys.authorities.is_empty()
        || !config.access.ask_upstream.is_empty();
    let has_door = config.listen.ssh.is_some();
    if has_door && !has_keys {
        warnings.push(
            "access.keys: there are none, so that nobody is let in through listen.ssh".into(),
        );
    }
    if has_keys && !has_door {
        warnings.push(
            "access.keys: they let nobody in, as there is no listen.ssh for clients of SSH".into(),
        );
    }
    let entries = keys.entries.iter().map(|entry| &entry.repos);
    let authorities = keys.authorities.iter().map(|authority| &authority.repos);
    for (list, all) in [
        ("entries", entries.collect::<Vec<_>>()),
        ("authorities", authorities.collect()),
    ] {
        for (index, repos) in all.into_iter().enumerate() {
            for pattern in repos
                .texts()
                .iter()
                .filter(|pattern| names_no_upstream(pattern, config))
            {
                warnings.push(no_such_host(
                    &format!("access.keys.{list}[{index}].repos"),
                    pattern,
                ));
            }
        }
    }
    if config.access.anonymous == Anonymous::None && config.access.tokens.is_empty() && !has_keys {
        warnings.push(
            "access: anonymous is \"none\" and there are neither tokens nor keys, so that nobody can read anything"
                .into(),
        );
    }
    warnings
}

fn no_such_host(key: &str, pattern: &str) -> String {
    format!(
        "{key}: {pattern:?} matches no repository, as names here begin with a host of git.upstreams, such as \
         \"github.com/my-org/*\""
    )
}

fn crosses_segments(pattern: &str) -> bool {
    pattern.contains('/') || pattern.contains("**")
}

/// Whether the pattern of a token can match no host. Hosts are in lower case.
fn names_no_upstream(pattern: &str, config: &Config) -> bool {
    if pattern.contains("**") {
        return false;
    }
    let Some((host, _)) = pattern.split_once('/') else {
        return true;
    };
    !host.contains(['*', '?', '[', '{', '\\']) && config.upstream(host).is_none()
}

fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use super::super::environment::Environment;
    use super::*;

    fn of(text: &str) -> String {
        warnings(&Config::parse(text, &Environment::default()).unwrap()).join("\n")
    }

    #[test]
    fn the_default_is_as_meant() {
        assert_eq!(of("{}"), "");
    }

    #[test]
    fn says_what_is_probably_not_meant() {
        let folder = tempfile::tempdir().unwrap();
        let token = folder.path().join("token");
        std::fs::write(&token, "hunter2\n").unwrap();
        let text = format!(
            r#"{{"listen": {{"http": "0.0.0.0:0"}},
                "git": {{"upstreams": [{{"host": "h", "url": "http://h/", "token_file": {token:?}, "repos": ["*"]}}]}},
                "access": {{"tokens": [{{"name": "ci", "token_file": {token:?}, "repos": ["my-org/*", "h/**", "*/a/*"]}}]}}}}"#
        );
        let found = of(&text);
        for part in [
            "clear text",
            "access.anonymous",
            "one segment only",
            "access.tokens[0].repos",
        ] {
            assert!(found.contains(part), "{part} in {found}");
        }
        assert_eq!(found.lines().count(), 5, "{found}");
        assert!(!found.contains("hunter2"));
        let keys = |text: &str| of(&format!(r#"{{"access": {{"keys": {text}}}}}"#));
        let entry = r#"{"entries": [{"name": "a", "repos": ["my-org/*"],
            "public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIINKY5jRtJGMPKDMA/f+JTJ4LKiW3+B823wE36Klfuvq"}]}"#;
        assert!(keys(entry).contains("there is no listen.ssh"));
        assert!(keys(entry).contains("access.keys.entries[0].repos"));
        let door =
            r#"{"listen": {"ssh": {"address": "127.0.0.1:0", "host_key_file": "/nowhere/key"}}}"#;
        assert!(of(door).contains("nobody is let in through listen.ssh"));
        assert!(
            of(r#"{"git": {"upstreams": []}, "access": {"anonymous": "none"}}"#)
                .lines()
                .count()
                == 2
        );
    }
}
