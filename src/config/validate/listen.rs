//! The section `listen`, but for its door for SSH.

use super::{Validator, indexed, optional, shown};
use crate::config::file::{ListenFile, TlsFile};
use crate::config::given::AbsolutePath;
use crate::config::identity::{Identity, Wrong};
use crate::config::{Listen, Tls};

impl Validator<'_> {
    pub(super) fn listen(&mut self, file: &ListenFile) -> Option<Listen> {
        let http = self.read("listen.http", &file.http);
        let tls = optional(&file.tls, |file| self.tls(file));
        let public_url = optional(&file.public_url, |given| {
            self.read("listen.public_url", given)
        });
        let proxies: Vec<_> = indexed("listen.trusted_proxies", &file.trusted_proxies)
            .map(|(key, given)| self.read(&key, given))
            .collect();
        let ssh = optional(&file.ssh, |file| self.listen_ssh(file));
        Some(Listen {
            http: http?,
            tls: tls?,
            public_url: public_url?.map(|url| url.0),
            trusted_proxies: proxies.into_iter().collect::<Option<_>>()?,
            ssh: ssh?,
        })
    }

    fn tls(&mut self, file: &TlsFile) -> Option<Tls> {
        let (cert_key, key_key) = ("listen.tls.cert", "listen.tls.key");
        let expected_cert = "a PEM file with the certificate chain";
        let expected_key = "a PEM file with the private key of the certificate";
        let cert = self.required(cert_key, file.cert.as_ref());
        let cert = cert.and_then(|AbsolutePath(path)| {
            Some((self.content(cert_key, &path, expected_cert)?, path))
        });
        let key = self.required(key_key, file.key.as_ref());
        let key = key.and_then(|AbsolutePath(path)| {
            Some((self.content(key_key, &path, expected_key)?, path))
        });
        let ((cert_pem, cert), (key_pem, key)) = (cert?, key?);
        match Identity::from_pem(&cert_pem, &key_pem) {
            Ok(identity) => Some(Tls {
                cert,
                key,
                identity,
            }),
            Err(Wrong::Cert(found)) => self.wrong(
                cert_key,
                format!("{}, {found}", shown(&cert)),
                expected_cert,
            ),
            Err(Wrong::Key(found)) => {
                self.wrong(key_key, format!("{}, {found}", shown(&key)), expected_key)
            }
        }
    }
}
