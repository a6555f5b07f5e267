//! From the shape of the file to the effective configuration: all values, all named files, all problems.

mod access;
mod crates;
mod git;
mod limits;
mod ssh;
mod storage;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::environment::Environment;
use super::file::{ConfigFile, ListenFile, TlsFile};
use super::given::{AbsolutePath, Given, Written};
use super::identity::{Identity, Wrong};
use super::parse::Parsed;
use super::patterns::{self, Patterns};
use super::problem::{Problems, quote};
use super::reader::Reader;
use super::secret::Secret;
use super::units::{Size, Span};
use super::{Config, Listen, Tls};

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
        environment,
        reader,
    };
    let config = validator.config(&parsed.file);
    match config {
        Some(config) if validator.problems.is_empty() => Ok(config),
        _ => Err(validator.problems),
    }
}

/// Goes through the file. A method returns `None` when it has added a problem; it looks at all of its values first.
struct Validator<'a> {
    problems: Problems,
    environment: &'a Environment,
    reader: &'a mut Reader,
}

impl Validator<'_> {
    fn config(&mut self, file: &ConfigFile) -> Option<Config> {
        let listen = self.listen(&file.listen);
        let data_dir = self.data_dir(file.data_dir.as_ref());
        let storage = self.storage(&file.storage);
        let git = self.git(&file.git);
        let crates = self.crates(&file.crates, git.as_ref());
        let access = self.access(&file.access, git.as_ref());
        let limits = self.limits(&file.limits);
        Some(Config {
            listen: listen?,
            data_dir: data_dir?,
            storage: storage?,
            git: git?,
            crates: crates?,
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
        let public_url = match &file.public_url {
            Some(given) => self.read("listen.public_url", given).map(Some),
            None => Some(None),
        };
        let proxies: Vec<_> = indexed("listen.trusted_proxies", &file.trusted_proxies)
            .map(|(key, given)| self.read(&key, given))
            .collect();
        let ssh = match &file.ssh {
            Some(file) => self.listen_ssh(file).map(Some),
            None => Some(None),
        };
        Some(Listen {
            http: http?,
            tls: tls?,
            public_url: public_url?.map(|url| url.0),
            trusted_proxies: proxies.into_iter().collect::<Option<_>>()?,
            ssh: ssh?,
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

    fn data_dir(&mut self, given: Option<&Given<AbsolutePath>>) -> Option<PathBuf> {
        let path = match given {
            Some(given) => self.read("data_dir", given)?.0,
            None => self.environment.data_dir(),
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
        self.secret_that(is_token, key, given, "a file with one token")
    }

    /// The same for a secret of another form.
    fn secret_that(
        &mut self,
        is_right: fn(&[u8]) -> bool,
        key: &str,
        given: &Given<AbsolutePath>,
        expected: &str,
    ) -> Option<(PathBuf, Secret)> {
        let AbsolutePath(path) = self.read(key, given)?;
        let content = self.content(key, &path, expected)?;
        let secret = content.trim_ascii();
        if !is_right(secret) {
            let found = format!(
                "{}, in which there are more words, or other characters than printable ASCII",
                shown(&path)
            );
            return self.wrong(key, found, expected);
        }
        Some((path, Secret::new(secret)))
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

/// Whether it can go into a header, where neither line ends nor controls can be (RFC 9110, section 5.5), as one word.
fn is_token(text: &[u8]) -> bool {
    text.iter().all(u8::is_ascii_graphic)
}

fn shown(path: &Path) -> String {
    quote(&path.to_string_lossy())
}
