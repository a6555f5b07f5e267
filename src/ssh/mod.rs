//! SSH: what both sides share (algorithms, keys, and the files that people keep them in), and the server's side.
//!
//! The protocol itself is russh's. The client's side is [`crate::git::upstream::ssh`].

pub mod authorized_keys;
pub mod connection;
mod greeting;
pub mod host_key;
pub mod known_hosts;
mod line;
mod pace;
pub mod private_key;
mod session;

use std::borrow::Cow;

use russh::Preferred;
use russh::keys::{Algorithm, EcdsaCurve, HashAlg, PublicKey};
use russh::{cipher, compression, mac};

/// The algorithms that we take, the best first.
///
/// SECURITY: russh's key exchanges, which are free of SHA-1; no signatures with SHA-1; ciphers that authenticate, and
/// AES in counter mode with encrypt-then-MAC for libssh2, which cargo has. Packs are compressed already.
pub fn algorithms() -> Preferred {
    Preferred {
        key: Cow::Borrowed(KEYS),
        cipher: Cow::Borrowed(CIPHERS),
        mac: Cow::Borrowed(MACS),
        compression: Cow::Borrowed(&[compression::NONE]),
        ..Preferred::DEFAULT
    }
}

const KEYS: &[Algorithm] = &[
    Algorithm::Ed25519,
    Algorithm::Ecdsa {
        curve: EcdsaCurve::NistP256,
    },
    Algorithm::Ecdsa {
        curve: EcdsaCurve::NistP384,
    },
    Algorithm::Ecdsa {
        curve: EcdsaCurve::NistP521,
    },
    Algorithm::Rsa {
        hash: Some(HashAlg::Sha512),
    },
    Algorithm::Rsa {
        hash: Some(HashAlg::Sha256),
    },
];

/// AES first: processors have instructions for it. At the door the client's order counts, see [`greeting`].
const CIPHERS: &[cipher::Name] = &[
    cipher::AES_256_GCM,
    cipher::AES_128_GCM,
    cipher::CHACHA20_POLY1305,
    cipher::AES_256_CTR,
    cipher::AES_128_CTR,
];

const MACS: &[mac::Name] = &[
    mac::HMAC_SHA256_ETM,
    mac::HMAC_SHA512_ETM,
    mac::HMAC_SHA256,
    mac::HMAC_SHA512,
];

/// A public key as people compare it: `ssh-ed25519 SHA256:…`.
pub fn shown(key: &PublicKey) -> String {
    format!("{} {}", key.algorithm(), key.fingerprint(HashAlg::Sha256))
}
