//! Where the configuration comes from.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use super::Config;
use super::environment::Environment;
use super::file::UpstreamFile;
use super::given::Written;
use super::parse::{Parsed, parse};
use super::problem::{Problems, quote};
use super::reader::Reader;
use super::validate::validate;

/// Where a container has its configuration when nothing else is said.
const STANDARD: &str = "/config/app_config.json";

/// What the configuration is made of, on every load anew.
#[derive(Debug, Clone)]
pub struct Source {
    /// `None` is the embedded default.
    file: Option<PathBuf>,
    /// Host and URL of upstreams from the command line, which come on top of the file's.
    upstreams: Vec<(String, String)>,
    environment: Environment,
}

impl Source {
    /// The first of: the file that the command line names, the one that `WARMDOCK_CONFIG` names,
    /// `/config/app_config.json` if there is one, the embedded default.
    pub fn find(named: Option<PathBuf>, environment: Environment) -> Self {
        Self::find_with(named, environment, Path::new(STANDARD))
    }

    fn find_with(named: Option<PathBuf>, environment: Environment, standard: &Path) -> Self {
        let variable = environment
            .config
            .as_ref()
            .filter(|path| !path.is_empty())
            .map(PathBuf::from);
        // What may not be looked at counts as being there: better an error than a default that nobody asked for.
        let standard = || {
            standard
                .try_exists()
                .unwrap_or(true)
                .then(|| standard.to_path_buf())
        };
        let file = named.or(variable).or_else(standard);
        Self {
            file,
            upstreams: Vec::new(),
            environment,
        }
    }

    /// With an upstream on top of what is configured; it takes the place of one with the same host.
    pub fn with_upstream(mut self, host: String, url: String) -> Self {
        self.upstreams.push((host, url));
        self
    }

    /// Reads it all. `reader` learns every file that matters, also when the result is an error.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn load(&self, reader: &mut Reader) -> Result<Config, Problems> {
        let mut parsed = self.parse(reader)?;
        for (host, url) in &self.upstreams {
            let added = UpstreamFile::new(host, url);
            let is_same = |upstream: &&mut UpstreamFile| {
                let given = upstream.host.as_ref().and_then(|host| host.read().ok());
                given.is_some_and(|given: String| given.eq_ignore_ascii_case(host))
            };
            match parsed.file.git.upstreams.iter_mut().find(is_same) {
                Some(same) => *same = added,
                None => parsed.file.git.upstreams.push(added),
            }
        }
        validate(parsed, &self.environment, reader)
    }

    /// Only where the service listens, and whether with TLS: for the health check, which must go on while somebody is
    /// writing a wrong configuration that the service has refused.
    ///
    /// # Errors
    /// What is wrong with that part.
    pub fn listen_address(&self) -> Result<(SocketAddr, bool), Problems> {
        let mut parsed = self.parse(&mut Reader::default())?;
        match parsed.file.listen.http.read() {
            Ok(address) if !parsed.problems.touch("listen") => {
                return Ok((address, parsed.file.listen.tls.is_some()));
            }
            Ok(_) => {}
            Err(found) => parsed
                .problems
                .add("listen.http", found, SocketAddr::expected()),
        }
        Err(parsed.problems)
    }

    fn parse(&self, reader: &mut Reader) -> Result<Parsed, Problems> {
        let Some(path) = &self.file else {
            return Ok(Parsed::default());
        };
        match reader.read(path) {
            Ok(text) => Ok(parse(&text)),
            Err(error) => Err(Problems::one(
                format!("{}, {error}", quote(&path.to_string_lossy())),
                "a JSON file",
            )),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.file {
            Some(path) => path.display().fmt(f),
            None => f.write_str("embedded default"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(config: Option<&str>) -> Environment {
        Environment {
            config: config.map(Into::into),
            ..Environment::default()
        }
    }

    #[test]
    fn the_first_that_is_named_wins() {
        let folder = tempfile::tempdir().unwrap();
        let standard = folder.path().join("app_config.json");
        let found = |named: Option<&str>, variable| {
            Source::find_with(named.map(Into::into), environment(variable), &standard).file
        };
        assert_eq!(found(None, None), None);
        assert_eq!(found(None, Some("")), None);
        std::fs::write(&standard, "{}").unwrap();
        assert_eq!(found(None, None), Some(standard.clone()));
        assert_eq!(found(None, Some("/b")), Some("/b".into()));
        assert_eq!(found(Some("/a"), Some("/b")), Some("/a".into()));
    }

    #[test]
    fn a_folder_gets_its_own_message() {
        let folder = tempfile::tempdir().unwrap();
        let source = Source::find_with(None, environment(None), folder.path());
        let message = source.load(&mut Reader::default()).unwrap_err().to_string();
        assert!(
            message.contains("which is a folder (Docker makes one"),
            "{message}"
        );
    }

    #[test]
    fn a_missing_file_is_named() {
        let source = Source::find(Some("/nowhere/warmdock.json".into()), environment(None));
        let message = source.load(&mut Reader::default()).unwrap_err().to_string();
        assert_eq!(
            message,
            "found \"/nowhere/warmdock.json\", which does not exist; expected a JSON file"
        );
    }

    #[test]
    fn upstreams_of_the_command_line_come_on_top() {
        let source = Source::find_with(None, environment(None), Path::new("/nowhere"))
            .with_upstream("GitHub.com".into(), "http://127.0.0.1:1/".into())
            .with_upstream("local".into(), "file:///srv/git".into());
        let config = source.load(&mut Reader::default()).unwrap();
        let hosts: Vec<&str> = config
            .git
            .upstreams
            .iter()
            .map(|upstream| upstream.host.as_str())
            .collect();
        assert_eq!(
            hosts,
            [
                "github.com",
                "gitlab.com",
                "codeberg.org",
                "bitbucket.org",
                "local"
            ]
        );
        assert_eq!(
            config.upstream("github.com").unwrap().url.as_str(),
            "http://127.0.0.1:1/"
        );
        assert_eq!(
            config.upstream("local").unwrap().url.as_str(),
            "file:///srv/git"
        );
    }

    #[test]
    fn the_address_is_found_in_a_configuration_that_is_otherwise_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        let address = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Source::find(Some(path.clone()), environment(None)).listen_address()
        };
        let tls = r#"{"listen": {"http": "0.0.0.0:8443", "tls": {"cert": "/nowhere"}}, "git": 5}"#;
        assert_eq!(address(tls), Ok(("0.0.0.0:8443".parse().unwrap(), true)));
        assert_eq!(
            address("{}"),
            Ok(("127.0.0.1:8080".parse().unwrap(), false))
        );
        assert!(address(r#"{"listen": {"http": "8443"}}"#).is_err());
        assert!(address(r#"{"listen": "0.0.0.0:8443"}"#).is_err());
    }
}
