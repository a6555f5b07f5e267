//! A private key out of a file, in the formats that OpenSSH and OpenSSL write.

use std::fmt;
use std::sync::Arc;

use russh::keys::{Error, PrivateKey};

use super::shown;

/// A private key, decrypted.
///
/// SECURITY: formatting shows the public half only.
#[derive(Clone, PartialEq, Eq)]
pub struct SshKey(Arc<PrivateKey>);

/// Why a text is no usable key, in words that go behind "found" and the path. They repeat nothing of the text.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    #[error("in which there is no private key that can be read")]
    NoKey,
    #[error("in which there is a public key")]
    Public,
    #[error("whose key is encrypted")]
    Encrypted,
    #[error("whose key this passphrase does not open")]
    Passphrase,
}

impl SshKey {
    /// Reads a key, with a passphrase where it is encrypted.
    ///
    /// # Errors
    /// [`Wrong`].
    pub fn read(text: &[u8], passphrase: Option<&[u8]>) -> Result<Self, Wrong> {
        let text = std::str::from_utf8(text).map_err(|_| Wrong::NoKey)?;
        let passphrase = passphrase
            .map(|passphrase| std::str::from_utf8(passphrase).map_err(|_| Wrong::Passphrase))
            .transpose()?;
        if !text.contains("-----BEGIN ") {
            let is_public = text.starts_with("ssh-") || text.starts_with("ecdsa-");
            return Err(if is_public {
                Wrong::Public
            } else {
                Wrong::NoKey
            });
        }
        match russh::keys::decode_secret_key(text, passphrase) {
            Ok(key) => Ok(Self(Arc::new(key))),
            Err(_) if passphrase.is_some() && is_encrypted(text) => Err(Wrong::Passphrase),
            Err(Error::KeyIsEncrypted) => Err(Wrong::Encrypted),
            Err(_) if is_encrypted(text) => Err(Wrong::Encrypted),
            Err(_) => Err(Wrong::NoKey),
        }
    }

    /// The key itself, for whoever signs with it.
    pub fn expose(&self) -> &Arc<PrivateKey> {
        &self.0
    }
}

fn is_encrypted(text: &str) -> bool {
    match PrivateKey::from_openssh(text) {
        Ok(key) => key.is_encrypted(),
        Err(_) => text.contains("ENCRYPTED"),
    }
}

impl fmt::Debug for SshKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "*** ({})", shown(self.0.public_key()))
    }
}
