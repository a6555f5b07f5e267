//! What a client needs to be sent through this service, over HTTP or over SSH.

use std::fmt::Write;
use std::str::FromStr;

use url::Url;

use crate::config::{Anonymous, CRATES_IO, Config};

/// Where clients reach this service: `http`, `https` or `ssh`, without a slash at its end.
#[derive(Debug, Clone)]
pub struct ServiceUrl(Url);

impl FromStr for ServiceUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = "expected a URL such as http://warmdock:8080 or ssh://git@warmdock:2222";
        let url = Url::parse(text).map_err(|error| format!("{expected} ({error})"))?;
        if !matches!(url.scheme(), "http" | "https" | "ssh") || !url.has_host() {
            return Err(format!("{expected}, found the scheme `{}`", url.scheme()));
        }
        let is_ssh = url.scheme() == "ssh";
        // SECURITY: the printed file is made to be passed around. The user of SSH is no secret.
        if !url.username().is_empty() && !is_ssh || url.password().is_some() {
            return Err(format!(
                "{expected}, found a user name or password in it; use a credential helper"
            ));
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err(format!("{expected}, found a query or fragment"));
        }
        Ok(Self(url))
    }
}

/// The address of the SSH door: what was given, or what the service knows of itself, under the name `warmdock`.
///
/// # Errors
/// What was expected.
pub fn through_ssh(given: Option<ServiceUrl>, config: &Config) -> Result<ServiceUrl, &'static str> {
    match (given, &config.listen.ssh) {
        (Some(ServiceUrl(url)), _) if url.scheme() == "ssh" => Ok(ServiceUrl(url)),
        (Some(_), _) => Err("expected an address such as ssh://git@warmdock:2222 beside --ssh"),
        (None, Some(ssh)) => format!("ssh://git@warmdock:{}", ssh.address.port())
            .parse()
            .map_err(|_| "expected a port in listen.ssh.address"),
        (None, None) => Err(
            "expected listen.ssh in the configuration, or --url with the address of the SSH door",
        ),
    }
}

impl ServiceUrl {
    /// Whether it is `http` or `https`.
    pub fn is_http(&self) -> bool {
        self.0.scheme() != "ssh"
    }

    /// What the paths of repositories begin with, without a slash at its end.
    fn root(&self) -> String {
        let url = self.0.as_str().trim_end_matches('/');
        match self.0.scheme() {
            "ssh" => url.to_owned(),
            _ => format!("{url}/git"),
        }
    }
}

const HEAD: &str = "\
# Sends Git reads through warmdock. Save it as ~/.gitconfig of a builder. On your own machine, save it in a file of its own
# and include that: git config --global --add include.path FILE
# Nothing else changes: Cargo.toml, Cargo.lock and remotes keep the addresses they have, and git and cargo
# replace the beginning of an address by the one in brackets when they connect.
# Where warmdock wants a token, use a credential helper; the user name does not matter.
# warmdock takes no pushes: with pushInsteadOf they go to the host itself.
";

/// A gitconfig with every host of `config`, in the forms in which people write its addresses.
pub fn git(service: &ServiceUrl, config: &Config) -> String {
    let root = service.root();
    let mut text = String::from(HEAD);
    for upstream in &config.git.upstreams {
        let host = &upstream.host;
        let mut lines = vec![format!("https://{host}/")];
        if upstream.url.scheme() == "http" {
            lines.push(format!("http://{host}/"));
        }
        // The port in a host's name is that of HTTP, and the form with a colon has no place for one.
        if !host.contains(':') {
            lines.push(format!("ssh://git@{host}/"));
            lines.push(format!("git@{host}:"));
        }
        // Where its own address is another: with a port, a user or a folder of its own.
        if upstream.url.scheme() == "ssh" {
            let own = format!("{}/", upstream.url.as_str().trim_end_matches('/'));
            if !lines.contains(&own) {
                lines.push(own);
            }
        }
        write!(text, "\n[url \"{root}/{host}/\"]\n").expect("writing to text does not fail");
        for line in &lines {
            writeln!(text, "\tinsteadOf = {line}").expect("writing to text does not fail");
        }
        for line in &lines {
            writeln!(text, "[url \"{line}\"]\n\tpushInsteadOf = {line}")
                .expect("writing to text does not fail");
        }
    }
    text
}

const CARGO_HEAD: &str = "\
# Sends cargo's crates through warmdock. Save it as config.toml in CARGO_HOME (~/.cargo). Where there is one already, pass
# this file to cargo (cargo --config FILE build), or copy its tables: cargo refuses a table that is there twice.
# Nothing else changes: Cargo.toml and Cargo.lock keep the names and checksums that they have. What warmdock does not
# serve, such as `cargo search` and `cargo publish`, goes past it with `--registry crates-io`.
";

/// Credentials: cargo sends none that are not configured so.
const CARGO_TOKEN: &str = "
# warmdock wants a token: put it into CARGO_REGISTRIES_WARMDOCK_TOKEN (for others: their name in place of WARMDOCK),
# as a secret of the build, or once into credentials.toml with `cargo login --registry warmdock`.
[registry]
global-credential-providers = [\"cargo:token\"]
";

/// A `config.toml` for cargo, with the registries of `config` that `may_read` allows. crates.io is replaced by this
/// service; other registries get a name of their own.
pub fn cargo(service: &ServiceUrl, config: &Config, may_read: impl Fn(&str) -> bool) -> String {
    let root = service.0.as_str().trim_end_matches('/');
    let mut text = String::from(CARGO_HEAD);
    let registries = config.crates.registries.iter();
    for registry in registries.filter(|registry| may_read(&registry.name)) {
        let url = format!("sparse+{root}/crates/{}/", registry.name);
        let written = if registry.name == CRATES_IO {
            write!(
                text,
                "\n[source.crates-io]\nreplace-with = \"warmdock\"\n\n[source.warmdock]\nregistry = \"{url}\"\n\n\
                 [registries.warmdock]\nindex = \"{url}\"\n"
            )
        } else {
            // Cargo.lock names the registry by its own address: a source with that address is replaced.
            let (name, own) = (registry.name.replace('.', "-"), &registry.url);
            write!(
                text,
                "\n[source.{name}-upstream]\nregistry = \"sparse+{own}\"\nreplace-with = \"warmdock-{name}\"\n\n\
                 [source.warmdock-{name}]\nregistry = \"{url}\"\n\n[registries.warmdock-{name}]\nindex = \"{url}\"\n"
            )
        };
        written.expect("writing to text does not fail");
    }
    if config.access.anonymous == Anonymous::None {
        text += CARGO_TOKEN;
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::environment::Environment;

    #[test]
    fn every_host_in_every_form() {
        let config = r#"{"git": {"upstreams": [
            {"host": "github.com", "url": "https://github.com"},
            {"host": "git.corp.example:8443", "url": "http://git.corp.example:8443"}]}}"#;
        let config = Config::parse(config, &Environment::default()).unwrap();
        let text = git(&"http://localhost:8080/".parse().unwrap(), &config);
        let expected = "
[url \"http://localhost:8080/git/github.com/\"]
\tinsteadOf = https://github.com/
\tinsteadOf = ssh://git@github.com/
\tinsteadOf = git@github.com:
[url \"https://github.com/\"]
\tpushInsteadOf = https://github.com/
[url \"ssh://git@github.com/\"]
\tpushInsteadOf = ssh://git@github.com/
[url \"git@github.com:\"]
\tpushInsteadOf = git@github.com:

[url \"http://localhost:8080/git/git.corp.example:8443/\"]
\tinsteadOf = https://git.corp.example:8443/
\tinsteadOf = http://git.corp.example:8443/
[url \"https://git.corp.example:8443/\"]
\tpushInsteadOf = https://git.corp.example:8443/
[url \"http://git.corp.example:8443/\"]
\tpushInsteadOf = http://git.corp.example:8443/
";
        assert_eq!(text.strip_prefix(HEAD).unwrap(), expected);
        assert!(HEAD.lines().all(|line| line.starts_with('#')));
    }

    #[test]
    fn every_registry_for_cargo() {
        let text = r#"{"access": {"anonymous": "none"}, "crates": {"registries": [{"name": "crates.io"},
            {"name": "corp", "url": "sparse+https://crates.corp.example/index"}, {"name": "hidden", "url": "https://x"}]}}"#;
        let config = Config::parse(text, &Environment::default()).unwrap();
        let service: ServiceUrl = "https://dock/".parse().unwrap();
        let text = cargo(&service, &config, |name| name != "hidden");
        let expected = "
[source.crates-io]
replace-with = \"warmdock\"

[source.warmdock]
registry = \"sparse+https://dock/crates/crates.io/\"

[registries.warmdock]
index = \"sparse+https://dock/crates/crates.io/\"

[source.corp-upstream]
registry = \"sparse+https://crates.corp.example/index/\"
replace-with = \"warmdock-corp\"

[source.warmdock-corp]
registry = \"sparse+https://dock/crates/corp/\"

[registries.warmdock-corp]
index = \"sparse+https://dock/crates/corp/\"
";
        let body = text.strip_prefix(CARGO_HEAD).unwrap();
        assert_eq!(body.strip_suffix(CARGO_TOKEN).unwrap(), expected);
    }

    #[test]
    fn over_ssh() {
        let config = Config::parse(
            r#"{"git": {"upstreams": [{"host": "github.com", "url": "https://github.com"}]}}"#,
            &Environment::default(),
        )
        .unwrap();
        let text = git(&"ssh://git@warmdock:2222/".parse().unwrap(), &config);
        let expected = "
[url \"ssh://git@warmdock:2222/github.com/\"]
\tinsteadOf = https://github.com/
\tinsteadOf = ssh://git@github.com/
\tinsteadOf = git@github.com:
[url \"https://github.com/\"]
\tpushInsteadOf = https://github.com/
[url \"ssh://git@github.com/\"]
\tpushInsteadOf = ssh://git@github.com/
[url \"git@github.com:\"]
\tpushInsteadOf = git@github.com:
";
        assert_eq!(text.strip_prefix(HEAD).unwrap(), expected);
        assert!(
            through_ssh(None, &config)
                .unwrap_err()
                .contains("listen.ssh")
        );
        let http: ServiceUrl = "http://warmdock:8080".parse().unwrap();
        assert!(
            through_ssh(Some(http), &config)
                .unwrap_err()
                .contains("ssh://")
        );
    }

    #[test]
    fn refuses_what_clients_cannot_use() {
        for text in [
            "",
            "warmdock:8080",
            "localhost",
            "ssh://git:hunter2@x",
            "http://user:hunter2@x",
            "http://x/?a",
            "http://",
        ] {
            let error = text.parse::<ServiceUrl>().unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
