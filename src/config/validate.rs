//! From the shape of the file to the effective configuration: all values, all named files, all problems.

use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::environment::Environment;
use super::file::{
    AccessFile, ConfigFile, GitFile, LimitsFile, ListenFile, TlsFile, TokenFile, UpstreamFile,
};
use super::given::{AbsolutePath, Given, Written};
use super::identity::{Identity, Wrong};
use super::parse::Parsed;
use super::patterns::{self, Patterns};
use super::problem::{Problems, quote};
use super::reader::Reader;
use super::secret::Secret;
use super::units::{Size, Span};
use super::{Access, Config, Git, Limits, Listen, Storage, Tls, Token, Upstream};
use crate::git::name::{self, RepoName};

/// Checks everything and reads the files that are named.
///
/// # Errors
/// All problems, those of parsing included.
pub fn validate(
    parsed: Parsed,
    environment: &Environment,
    reader: &mut Reader,
) -> Result<Config, Problems> {
    let mut validator = Validator {
        problems: parsed.problems,
        reader,
    };
    let config = validator.config(&parsed.file, environment);
    match config {
        Some(config) if validator.problems.is_empty() => Ok(config),
        _ => Err(validator.problems),
    }
}

/// Goes through the file. A method returns `None` when it has added a problem; it looks at all of its values first.
struct Validator<'a> {
    problems: Problems,
    reader: &'a mut Reader,
}

impl Validator<'_> {
    fn config(&mut self, file: &ConfigFile, environment: &Environment) -> Option<Config> {
        let listen = self.listen(&file.listen);
        let data_dir = self.data_dir(file.data_dir.as_ref(), environment);
        let max_size = self.size("storage.max_size", &file.storage.max_size);
        let git = self.git(&file.git);
        let access = self.access(&file.access);
        let limits = self.limits(&file.limits);
        Some(Config {
            listen: listen?,
            data_dir: data_dir?,
            storage: Storage {
                max_size: max_size?,
            },
            git: git?,
            access: access?,
            limits: limits?,
        })
    }

    fn listen(&mut self, file: &ListenFile) -> Option<Listen> {
        let http = self.read("listen.http", &file.http);
        let tls = match &file.tls {
            Some(file) => self.tls(file).map(Some),
            None => Some(None),
        };
        Some(Listen {
            http: http?,
            tls: tls?,
        })
    }

    fn tls(&mut self, file: &TlsFile) -> Option<Tls> {
        let (cert_key, key_key) = ("listen.tls.cert", "listen.tls.key");
        let expected_cert = "a PEM file with the certificate chain";
        let expected_key = "a PEM file with the private key of the certificate";
        let cert = self.required(cert_key, file.cert.as_ref());
        let cert = cert.and_then(|AbsolutePath(path)| {
            Some((self.content(cert_key, &path, expected_cert)?, path))
        });
        let key = self.required(key_key, file.key.as_ref());
        let key = key.and_then(|AbsolutePath(path)| {
            Some((self.content(key_key, &path, expected_key)?, path))
        });
        let ((cert_pem, cert), (key_pem, key)) = (cert?, key?);
        match Identity::from_pem(&cert_pem, &key_pem) {
            Ok(identity) => Some(Tls {
                cert,
                key,
                identity,
            }),
            Err(Wrong::Cert(found)) => self.wrong(
                cert_key,
                format!("{}, {found}", shown(&cert)),
                expected_cert,
            ),
            Err(Wrong::Key(found)) => {
                self.wrong(key_key, format!("{}, {found}", shown(&key)), expected_key)
            }
        }
    }

    fn data_dir(
        &mut self,
        given: Option<&Given<AbsolutePath>>,
        environment: &Environment,
    ) -> Option<PathBuf> {
        let path = match given {
            Some(given) => self.read("data_dir", given)?.0,
            None => environment.data_dir(),
        };
        // It is made when the service starts; only what can never become a folder is wrong here.
        if path.exists() && !path.is_dir() {
            return self.wrong(
                "data_dir",
                format!("{}, which is no folder", shown(&path)),
                "a folder",
            );
        }
        Some(path)
    }

    fn git(&mut self, file: &GitFile) -> Option<Git> {
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
        let token = match &file.token_file {
            Some(given) => self.secret(&token_key, given).map(Some),
            None => Some(None),
        };
        if file.token_file.is_some() && url.as_ref().is_some_and(|url| url.scheme() == "file") {
            self.problems.add(
                &token_key,
                format!("a token beside the folder of {url_key}"),
                "none, a folder needs no token",
            );
        }
        let auth = self.read(&format!("{key}.auth"), &file.auth);
        let user = self.user(&format!("{key}.user"), &file.user);
        let repos = self.patterns(&format!("{key}.repos"), &file.repos);
        let (token_file, token) = token?.unzip();
        Some(Upstream {
            host: host?,
            url: url?,
            token_file,
            token,
            auth: auth?.0,
            user: user?,
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
            return self.wrong(
                key,
                quote(&user),
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

    fn access(&mut self, file: &AccessFile) -> Option<Access> {
        let anonymous = self.read("access.anonymous", &file.anonymous);
        let mut names = HashSet::new();
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
        })
    }

    fn token(&mut self, key: &str, file: &TokenFile, names: &mut HashSet<String>) -> Option<Token> {
        let name_key = format!("{key}.name");
        let name = self
            .required(&name_key, file.name.as_ref())
            .and_then(|name| {
                if name.is_empty() || name.len() > 100 || name.chars().any(char::is_control) {
                    return self.wrong(&name_key, quote(&name), "a name of 1 to 100 characters");
                }
                if !names.insert(name.clone()) {
                    return self.wrong(
                        &name_key,
                        format!("{} a second time", quote(&name)),
                        "each name once",
                    );
                }
                Some(name)
            });
        let file_key = format!("{key}.token_file");
        let secret = match &file.token_file {
            Some(given) => self.secret(&file_key, given),
            None => self.missing(&file_key, &AbsolutePath::expected()),
        };
        let repos = self.patterns(&format!("{key}.repos"), &file.repos);
        let (token_file, secret) = secret?;
        Some(Token {
            name: name?,
            token_file,
            secret,
            repos: repos?,
        })
    }

    fn limits(&mut self, file: &LimitsFile) -> Option<Limits> {
        // A timeout of nothing would refuse everybody.
        let shortest = Duration::from_millis(10);
        let connections = self.count("limits.connections", &file.connections, 1..=1_000_000);
        let tls_handshake_timeout = self.span(
            "limits.tls_handshake_timeout",
            &file.tls_handshake_timeout,
            shortest,
        );
        let header_timeout = self.span("limits.header_timeout", &file.header_timeout, shortest);
        let body_idle_timeout = self.span(
            "limits.body_idle_timeout",
            &file.body_idle_timeout,
            shortest,
        );
        let drain_timeout = self.span("limits.drain_timeout", &file.drain_timeout, Duration::ZERO);
        let request_body = self.size("limits.request_body", &file.request_body);
        let packs_per_repo = self.count("limits.packs_per_repo", &file.packs_per_repo, 1..=100_000);
        let packs_queue_per_repo = self.count(
            "limits.packs_queue_per_repo",
            &file.packs_queue_per_repo,
            0..=100_000,
        );
        let pack_threads = self.count("limits.pack_threads", &file.pack_threads, 0..=1024);
        let upstream_idle_timeout = self.span(
            "limits.upstream_idle_timeout",
            &file.upstream_idle_timeout,
            shortest,
        );
        let first_clone_timeout = self.span(
            "limits.first_clone_timeout",
            &file.first_clone_timeout,
            shortest,
        );
        Some(Limits {
            connections: connections?,
            tls_handshake_timeout: tls_handshake_timeout?,
            header_timeout: header_timeout?,
            body_idle_timeout: body_idle_timeout?,
            drain_timeout: drain_timeout?,
            request_body: request_body?,
            packs_per_repo: packs_per_repo?,
            packs_queue_per_repo: packs_queue_per_repo?,
            pack_threads: pack_threads?,
            upstream_idle_timeout: upstream_idle_timeout?,
            first_clone_timeout: first_clone_timeout?,
        })
    }

    fn patterns(&mut self, key: &str, given: &[Given<String>]) -> Option<Patterns> {
        let expected = "a glob pattern such as \"my-org/*\"";
        let texts: Vec<_> = indexed(key, given)
            .map(|(key, given)| {
                let text = self.read(&key, given)?;
                match patterns::check(&text) {
                    Ok(()) => Some(text),
                    Err(wrong) => self.wrong(&key, format!("{} ({wrong})", quote(&text)), expected),
                }
            })
            .collect();
        match Patterns::new(texts.into_iter().collect::<Option<_>>()?) {
            Ok(patterns) => Some(patterns),
            Err((_, wrong)) => self.wrong(
                key,
                format!("patterns that do not go together ({wrong})"),
                expected,
            ),
        }
    }

    /// The path of a file and the token in it, without the line end that editors and `echo` leave.
    fn secret(&mut self, key: &str, given: &Given<AbsolutePath>) -> Option<(PathBuf, Secret)> {
        let expected = "a file with one token";
        let AbsolutePath(path) = self.read(key, given)?;
        let content = self.content(key, &path, expected)?;
        let token = content.trim_ascii();
        // It goes into a header, where neither line ends nor controls can be (RFC 9110, section 5.5).
        if !token.iter().all(|byte| byte.is_ascii_graphic()) {
            let found = format!(
                "{}, in which there is more than one word of printable ASCII",
                shown(&path)
            );
            return self.wrong(key, found, expected);
        }
        Some((path, Secret::new(token)))
    }

    fn content(&mut self, key: &str, path: &Path, expected: &str) -> Option<Vec<u8>> {
        match self.reader.read(path) {
            Ok(content) => Some(content),
            Err(error) => self.wrong(key, format!("{}, {error}", shown(path)), expected),
        }
    }

    fn size(&mut self, key: &str, given: &Given<Size>) -> Option<u64> {
        match self.read(key, given)? {
            Size(0) => self.wrong(key, "0 bytes", "more than nothing"),
            Size(bytes) => Some(bytes),
        }
    }

    fn span(&mut self, key: &str, given: &Given<Span>, shortest: Duration) -> Option<Duration> {
        let Span(duration) = self.read(key, given)?;
        if duration < shortest {
            return self.wrong(
                key,
                format!("\"{}\"", Span(duration)),
                format!("at least \"{}\"", Span(shortest)),
            );
        }
        Some(duration)
    }

    fn count(
        &mut self,
        key: &str,
        given: &Given<usize>,
        allowed: RangeInclusive<usize>,
    ) -> Option<usize> {
        let expected = format!(
            "a whole number from {} to {}",
            allowed.start(),
            allowed.end()
        );
        match given.read() {
            Ok(number) if allowed.contains(&number) => Some(number),
            Ok(number) => self.wrong(key, number.to_string(), expected),
            Err(found) => self.wrong(key, found, expected),
        }
    }

    fn required<T: Written>(&mut self, key: &str, given: Option<&Given<T>>) -> Option<T> {
        match given {
            Some(given) => self.read(key, given),
            None => self.missing(key, &T::expected()),
        }
    }

    fn missing<T>(&mut self, key: &str, expected: &str) -> Option<T> {
        // What was no object was emptied by parsing, which has said so.
        if self.problems.touch(key) {
            None
        } else {
            self.wrong(key, "nothing", expected)
        }
    }

    fn read<T: Written>(&mut self, key: &str, given: &Given<T>) -> Option<T> {
        match given.read() {
            Ok(value) => Some(value),
            Err(found) => self.wrong(key, found, T::expected()),
        }
    }

    fn wrong<T>(
        &mut self,
        key: &str,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Option<T> {
        self.problems.add(key, found, expected);
        None
    }
}

fn indexed<'a, T>(key: &'a str, list: &'a [T]) -> impl Iterator<Item = (String, &'a T)> {
    list.iter()
        .enumerate()
        .map(move |(index, item)| (format!("{key}[{index}]"), item))
}

fn shown(path: &Path) -> String {
    quote(&path.to_string_lossy())
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
