//! A part of a file (RFC 9110, section 14): one range of bytes, or all of it.

use std::ops::Range;

/// What of a file of `length` bytes a `Range` header asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Also where the header is none that is understood, as the RFC has it.
    Whole,
    Some(Range<u64>),
    /// Nothing that is there: 416.
    Outside,
}

impl Part {
    pub fn of(header: Option<&str>, length: u64) -> Self {
        let Some(range) = header.and_then(|header| header.trim().strip_prefix("bytes=")) else {
            return Self::Whole;
        };
        let Some((first, last)) = range.trim().split_once('-') else {
            return Self::Whole;
        };
        let number = |text: &str| {
            let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            digits.then(|| text.parse().unwrap_or(u64::MAX))
        };
        let range = match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(length),
            (Some(first), None) if last.is_empty() => first..length,
            (None, Some(last)) if first.is_empty() => length.saturating_sub(last)..length,
            _ => return Self::Whole,
        };
        if range.start >= length || range.is_empty() {
            Self::Outside
        } else {
            Self::Some(range)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_the_rfc_has_it() {
        let table = [
            ("bytes=0-0", Part::Some(0..1)),
            ("bytes=0-9", Part::Some(0..10)),
            ("bytes=2-", Part::Some(2..10)),
            ("bytes=2-99999999999999999999999", Part::Some(2..10)),
            ("bytes=-3", Part::Some(7..10)),
            ("bytes=-99", Part::Some(0..10)),
            ("bytes=10-", Part::Outside),
            ("bytes=-0", Part::Outside),
            ("bytes=5-2", Part::Whole),
            ("bytes=0-1,3-4", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes=+1-2", Part::Whole),
            ("bytes=-", Part::Whole),
            ("lines=1-2", Part::Whole),
            ("", Part::Whole),
        ];
        for (header, expected) in table {
            assert_eq!(Part::of(Some(header), 10), expected, "{header}");
        }
        assert_eq!(Part::of(None, 10), Part::Whole);
        assert_eq!(Part::of(Some("bytes=0-"), 0), Part::Outside);
    }
}
