//! Sizes and durations as people write them: `"50GiB"`, `"10s"`.

use std::borrow::Cow;
use std::fmt;
use std::time::Duration;

use bytesize::ByteSize;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serializer;

use crate::git::name::RepoName;

/// A number of bytes, written with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl Size {
    /// # Errors
    /// Nothing but that it is no size: the caller says what one looks like.
    pub fn parse(text: &str) -> Result<Self, NotThis> {
        // bytesize takes `50` for bytes; so do we. It saturates, and the largest number is no size anybody means.
        // A bare number is as likely meant in another unit.
        if text.ends_with(|last: char| last.is_ascii_digit()) {
            return Err(NotThis);
        }
        let ByteSize(bytes) = text.parse().map_err(|_| NotThis)?;
        if bytes == u64::MAX {
            Err(NotThis)
        } else {
            Ok(Self(bytes))
        }
    }
}

impl fmt::Display for Size {
    /// In the largest unit that says it exactly, so that reading it back gives the same number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
        let (mut number, mut unit) = (self.0, 0);
        while number != 0 && number.is_multiple_of(1024) && unit + 1 < UNITS.len() {
            number /= 1024;
            unit += 1;
        }
        write!(f, "{number}{}", UNITS[unit])
    }
}

/// A length of time, written with a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

/// Far more than any setting needs, and far from where adding it to a clock overflows.
pub const LONGEST: Duration = Duration::from_secs(366 * 24 * 60 * 60);

impl Span {
    /// # Errors
    /// Nothing but that it is no duration of at most [`LONGEST`].
    pub fn parse(text: &str) -> Result<Self, NotThis> {
        match humantime::parse_duration(text) {
            Ok(duration) if duration <= LONGEST => Ok(Self(duration)),
            _ => Err(NotThis),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

/// The text is none of the kind.
#[derive(Debug, PartialEq, Eq)]
pub struct NotThis;

impl JsonSchema for Size {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^[0-9]+(\.[0-9]+)?\s*([kKmMgGtTpPeE][iI]?[bB]?|[bB])$",
            "examples": ["50GiB", "500MB"],
        })
    }
}

impl JsonSchema for Span {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": r"^\s*(0|([0-9]+\s*[a-zA-Zµ]+\s*)+)$",
            "examples": ["10s", "1h 30m", "500ms"],
        })
    }
}

pub(super) fn write_size<S: Serializer>(bytes: &u64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Size(*bytes))
}

pub(super) fn write_duration<S: Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Span(*duration))
}

pub(super) fn write_url<S: Serializer>(url: &url::Url, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(url)
}

pub(super) fn write_optional_url<S: Serializer>(
    url: &Option<url::Url>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    match url {
        Some(url) => serializer.collect_str(url),
        None => serializer.serialize_none(),
    }
}

pub(super) fn write_public_key<S: Serializer>(
    key: &russh::keys::PublicKey,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let text = key.to_openssh().map_err(serde::ser::Error::custom)?;
    serializer.serialize_str(&text)
}

pub(super) fn write_names<S: Serializer>(
    names: &[RepoName],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(names.iter().map(ToString::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_back() {
        for (text, bytes, written) in [
            ("50GiB", 50 << 30, "50GiB"),
            ("1.5 MiB", 3 << 19, "1536KiB"),
            ("500MB", 500_000_000, "500000000B"),
            ("0B", 0, "0B"),
            ("1023B", 1023, "1023B"),
        ] {
            assert_eq!(Size::parse(text), Ok(Size(bytes)), "{text}");
            assert_eq!(Size(bytes).to_string(), written);
            assert_eq!(
                Size::parse(written).map(|size| size.0 / 1000),
                Ok(bytes / 1000)
            );
        }
    }

    #[test]
    fn no_sizes() {
        for text in [
            "",
            "50",
            "GiB",
            "-1GiB",
            "50 potatoes",
            "99999999999999999999EiB",
            "1..5GiB",
        ] {
            assert_eq!(Size::parse(text), Err(NotThis), "{text}");
        }
    }

    #[test]
    fn durations_read_back() {
        for (text, duration, written) in [
            ("10s", Duration::from_secs(10), "10s"),
            ("90m", Duration::from_secs(5400), "1h 30m"),
            ("500ms", Duration::from_millis(500), "500ms"),
            ("0s", Duration::ZERO, "0s"),
        ] {
            assert_eq!(Span::parse(text), Ok(Span(duration)), "{text}");
            assert_eq!(Span(duration).to_string(), written);
            assert_eq!(Span::parse(written), Ok(Span(duration)));
        }
    }

    #[test]
    fn no_durations() {
        for text in ["", "10", "-1s", "ten seconds", "2years", "10 parsecs"] {
            assert_eq!(Span::parse(text), Err(NotThis), "{text}");
        }
    }
}
