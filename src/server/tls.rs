//! TLS with the certificate of the moment.

use std::sync::Arc;

use anyhow::Context;
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;

use crate::config::Config;

/// Accepts TLS with whatever certificate the configuration has at each handshake: a reload changes it for connections
/// that come later, and a reload that finds a wrong one changes nothing.
///
/// SECURITY: versions 1.2 and 1.3 with the suites of aws-lc's defaults. The provider is named, so that no other crypto
/// stack can slip in by way of a dependency.
///
/// # Errors
/// When the provider lacks the default versions.
pub fn acceptor(config: watch::Receiver<Arc<Config>>) -> anyhow::Result<TlsAcceptor> {
    let mut tls = ServerConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .context("expected TLS 1.2 and 1.3 in the crypto provider")?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(OfTheMoment(config)));
    tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(tls)))
}

#[derive(Debug)]
struct OfTheMoment(watch::Receiver<Arc<Config>>);

impl ResolvesServerCert for OfTheMoment {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let config = self.0.borrow();
        config
            .listen
            .tls
            .as_ref()
            .map(|tls| tls.identity.certified_key())
    }
}
