//! From the shape of the file to the effective configuration: all values, all named files, all problems.

mod access;
mod crates;
mod git;
mod limits;
mod listen;
mod ssh;
mod storage;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Config;
use super::environment::Environment;
use super::file::ConfigFile;
use super::given::{AbsolutePath, Given, Written};
use super::parse::Parsed;
use super::patterns::{self, Patterns};
use super::problem::{Problems, quote};
use super::reader::Reader;
use super::secret::Secret;
use super::units::{Size, Span};

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

    /// The path of a file and the secret in it, of a form that `is_right` knows, without the line end as well.
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

/// What `read` makes of a value that may be absent: `None` where that is wrong, `Some(None)` where there is none.
fn optional<G, T>(given: &Option<G>, read: impl FnOnce(&G) -> Option<T>) -> Option<Option<T>> {
    match given {
        Some(given) => read(given).map(Some),
        None => Some(None),
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
