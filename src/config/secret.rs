//! Bytes that must not be seen.

use std::fmt;

use serde::{Serialize, Serializer};

/// A password or token.
///
/// SECURITY: formatting and serializing show `***`; only [`Secret::expose`] gives the bytes, so that a search for that
/// word finds every place where a secret is used. There is no `PartialEq`, because `==` is not constant-time.
#[derive(Clone)]
pub struct Secret(Box<[u8]>);

const MASK: &str = "***";

impl Secret {
    /// Takes the bytes as they are.
    pub fn new(bytes: impl Into<Box<[u8]>>) -> Self {
        Self(bytes.into())
    }

    /// The bytes themselves: for the header that carries them and the comparison that checks them.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(MASK)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(MASK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_only_a_mask() {
        let secret = Secret::new(*b"hunter2");
        assert_eq!(format!("{secret:?}"), "***");
        assert_eq!(serde_json::to_string(&secret).unwrap(), "\"***\"");
        assert_eq!(secret.expose(), b"hunter2");
    }
}
