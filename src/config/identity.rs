//! Who the server is in TLS.

use std::fmt;
use std::sync::Arc;

use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;

/// A certificate chain and the private key that belongs to it.
#[derive(Clone)]
pub struct Identity(Arc<CertifiedKey>);

/// What is wrong, and with which of the two files.
#[derive(Debug, PartialEq, Eq)]
pub enum Wrong {
    Cert(&'static str),
    Key(&'static str),
}

impl Identity {
    /// From the contents of two PEM files.
    ///
    /// # Errors
    /// Which file is wrong and what was found in it, in words that go behind "found" and the path.
    pub fn from_pem(cert: &[u8], key: &[u8]) -> Result<Self, Wrong> {
        let chain: Vec<_> = CertificateDer::pem_slice_iter(cert)
            .collect::<Result<_, _>>()
            .map_err(|_| Wrong::Cert("which is no PEM"))?;
        if chain.is_empty() {
            return Err(Wrong::Cert("in which there is no certificate"));
        }
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|_| Wrong::Key("in which there is no private key"))?;
        // The last argument is the provider that main installs as well; named here so that tests need no order.
        match CertifiedKey::from_der(chain, key, &default_provider()) {
            Ok(identity) => Ok(Self(Arc::new(identity))),
            Err(rustls::Error::InconsistentKeys(_)) => {
                Err(Wrong::Key("which does not belong to the certificate"))
            }
            Err(rustls::Error::InvalidCertificate(_)) => {
                Err(Wrong::Cert("whose certificate cannot be read"))
            }
            Err(_) => Err(Wrong::Key("whose private key is of an unknown kind")),
        }
    }

    /// For a rustls `ResolvesServerCert`.
    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.0)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn takes_a_pair_that_belongs_together() {
        let (cert, key) = pair();
        let identity = Identity::from_pem(cert.as_bytes(), key.as_bytes()).unwrap();
        assert_eq!(identity.certified_key().cert.len(), 1);
        assert_eq!(format!("{identity:?}"), "***");
    }

    #[test]
    fn says_which_file_is_wrong() {
        let ((cert, key), (_, other_key)) = (pair(), pair());
        let wrong = |cert: &str, key: &str| {
            Identity::from_pem(cert.as_bytes(), key.as_bytes()).unwrap_err()
        };
        assert_eq!(
            wrong(&cert, &other_key),
            Wrong::Key("which does not belong to the certificate")
        );
        assert_eq!(
            wrong("hello", &key),
            Wrong::Cert("in which there is no certificate")
        );
        assert_eq!(
            wrong(&key, &cert),
            Wrong::Cert("in which there is no certificate")
        );
        assert_eq!(
            wrong(&cert, "hello"),
            Wrong::Key("in which there is no private key")
        );
        assert_eq!(
            wrong(&cert, &cert),
            Wrong::Key("in which there is no private key")
        );
        let cut = format!("{}\n-----END CERTIFICATE-----\n", &cert[..200]);
        assert!(matches!(wrong(&cut, &key), Wrong::Cert(_)));
    }
}
