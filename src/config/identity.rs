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
