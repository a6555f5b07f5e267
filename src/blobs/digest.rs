//! SHA-256 as a name.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest::{SHA256, SHA256_OUTPUT_LEN};

/// The SHA-256 of some bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; SHA256_OUTPUT_LEN]);

/// Why a text is no digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected a SHA-256 as 64 hexadecimal digits in lower case")]
pub struct NoDigest;

impl Digest {
    /// Of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self::taken(aws_lc_rs::digest::digest(&SHA256, bytes))
    }
}

/// SHA-256, piece by piece.
pub struct Hasher(aws_lc_rs::digest::Context);

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// What it came to.
    pub fn finish(self) -> Digest {
        Digest::taken(self.0.finish())
    }
}

impl Default for Hasher {
    fn default() -> Self {
        Self(aws_lc_rs::digest::Context::new(&SHA256))
    }
}

impl Digest {
    fn taken(digest: aws_lc_rs::digest::Digest) -> Self {
        Self(
            digest
                .as_ref()
                .try_into()
                .expect("SHA-256 has 32 bytes, and no other is made here"),
        )
    }
}

impl FromStr for Digest {
    type Err = NoDigest;

    /// Only lower case: one file, one name.
    fn from_str(text: &str) -> Result<Self, NoDigest> {
        let digit = |byte: u8| match byte {
            b'0'..=b'9' => Ok(byte - b'0'),
            b'a'..=b'f' => Ok(byte - b'a' + 10),
            _ => Err(NoDigest),
        };
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != SHA256_OUTPUT_LEN || !rest.is_empty() {
            return Err(NoDigest);
        }
        let mut bytes = [0; SHA256_OUTPUT_LEN];
        for (byte, [high, low]) in bytes.iter_mut().zip(pairs) {
            *byte = digit(*high)? << 4 | digit(*low)?;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In one piece: a file's name and tag are written for every answer.
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut text = [0; 2 * SHA256_OUTPUT_LEN];
        let (pairs, _) = text.as_chunks_mut::<2>();
        for (pair, byte) in pairs.iter_mut().zip(self.0) {
            *pair = [byte >> 4, byte & 15].map(|digit| DIGITS[usize::from(digit)]);
        }
        f.write_str(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_nothing_else() {
        let text = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(Digest::of(b"").to_string(), text);
        assert_eq!(text.parse(), Ok(Digest::of(b"")));
        let upper = text.to_uppercase();
        let wrong = ["", &text[1..], &upper, &text.replace('e', "g"), "é"];
        for text in wrong
            .into_iter()
            .map(str::to_owned)
            .chain([format!("{text}00")])
        {
            assert_eq!(text.parse::<Digest>(), Err(NoDigest), "{text}");
        }
    }
}
