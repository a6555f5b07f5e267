//! SSH keys and certificates: whose they are.
//!
//! Defences in this file:
//! - a key counts only where it is listed, and what it may read is what its entry says;
//! - a key that is revoked counts for nothing, wherever else it stands, in a certificate and as what signed one too;
//! - a certificate counts only if a listed authority signed it for a user, within its time, for a principal that is
//!   listed with the authority, and if we understand everything that it restricts;
//! - signatures with SHA-1 count for nothing.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use russh::keys::ssh_key::certificate::CertType;
use russh::keys::ssh_key::public::KeyData;
use russh::keys::{Algorithm, Certificate, PublicKey};

use super::Principal;
use crate::config;
use crate::config::network::Network;
use crate::config::patterns::Patterns;

/// The keys of one configuration.
pub(super) struct Keys {
    revoked: HashSet<KeyData>,
    known: HashMap<KeyData, Principal>,
    authorities: Vec<Authority>,
}

struct Authority {
    key: KeyData,
    principals: Vec<String>,
    name: String,
    repos: Arc<Patterns>,
}

impl Keys {
    /// A key that is in both lists has what its entry says: that narrows it down.
    pub fn of(keys: &config::Keys) -> Self {
        let everything = Arc::new(Patterns::everything());
        let authorized = keys.authorized.iter().map(|authorized| {
            let principal = Principal::named(&authorized.name, Arc::clone(&everything));
            (authorized.key.key_data().clone(), principal)
        });
        let entries = keys.entries.iter().map(|entry| {
            let principal = Principal::named(&entry.name, Arc::new(entry.repos.clone()));
            (entry.public_key.key_data().clone(), principal)
        });
        let authorities = keys.authorities.iter().map(|authority| Authority {
            key: authority.public_key.key_data().clone(),
            principals: authority.principals.clone(),
            name: authority.name.clone(),
            repos: Arc::new(authority.repos.clone()),
        });
        let revoked = keys.revoked.iter();
        Self {
            revoked: revoked
                .map(|revoked| revoked.key.key_data().clone())
                .collect(),
            known: authorized.chain(entries).collect(),
            authorities: authorities.collect(),
        }
    }

    /// Whether any authority is listed.
    pub fn takes_certificates(&self) -> bool {
        !self.authorities.is_empty()
    }

    /// Whether it counts for nothing, wherever else it stands.
    pub fn is_revoked(&self, key: &PublicKey) -> bool {
        self.revoked.contains(key.key_data())
    }

    /// Whose key this is; `None` where it is not listed, or revoked.
    pub fn find(&self, key: &PublicKey) -> Option<Principal> {
        let known = self.known.get(key.key_data());
        known.filter(|_| !self.is_revoked(key)).cloned()
    }

    /// Whose certificate this is when `peer` shows it; `None` where it does not count.
    pub fn find_certificate(&self, certificate: &Certificate, peer: IpAddr) -> Option<Principal> {
        let good = certificate.cert_type() == CertType::User
            && certificate.signature().algorithm() != (Algorithm::Rsa { hash: None })
            && !self.revoked.contains(certificate.public_key())
            && !self.revoked.contains(certificate.signature_key())
            && is_valid_at(certificate, SystemTime::now())
            && is_meant_for(certificate, peer);
        if !good {
            return None;
        }
        let named = |authority: &&Authority| {
            authority.key == *certificate.signature_key()
                && certificate
                    .valid_principals()
                    .iter()
                    .any(|principal| authority.principals.contains(principal))
        };
        let authority = self.authorities.iter().find(named)?;
        certificate.verify_signature().ok()?;
        let name = format!("{}: {}", authority.name, shown(certificate.key_id()));
        Some(Principal::named(&name, Arc::clone(&authority.repos)))
    }
}

/// Asked at every request: a connection may outlive its certificate.
fn is_valid_at(certificate: &Certificate, now: SystemTime) -> bool {
    certificate
        .valid_after_time()
        .is_none_or(|from| from <= now)
        && certificate.valid_before_time().is_none_or(|to| now < to)
}

/// SECURITY: what a critical option asks for has to be understood (PROTOCOL.certkeys). `source-address` is; commands
/// cannot be forced, and who verifies a person's presence is the client.
fn is_meant_for(certificate: &Certificate, peer: IpAddr) -> bool {
    certificate
        .critical_options()
        .iter()
        .all(|(option, value)| {
            option == "source-address" && value.split(',').any(|range| is_within(peer, range))
        })
}

/// Whether an address is in a range such as `10.0.0.0/8`, or is that one. What is no range has nobody in it.
fn is_within(address: IpAddr, range: &str) -> bool {
    Network::parse(range.trim()).is_some_and(|network| network.contains(address))
}

/// The name that an authority gave to a certificate, for one line of a log.
fn shown(key_id: &str) -> String {
    key_id
        .chars()
        .filter(|c| !c.is_control())
        .take(100)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// OpenSSH's client does not offer what is none of a user, so only a client of somebody's own can try.
    #[test]
    fn certificates_of_hosts_let_nobody_in() {
        let authority = include_str!("../ssh/fixtures/ca.pub");
        let keys = Keys::of(&config::Keys {
            authorities: vec![config::Authority {
                name: "corp".into(),
                public_key: PublicKey::from_openssh(authority).unwrap(),
                principals: vec!["git".into(), "git.corp.example".into()],
                repos: Patterns::everything(),
            }],
            ..config::Keys::default()
        });
        let found = |text| {
            let certificate = Certificate::from_openssh(text).unwrap();
            keys.find_certificate(&certificate, IpAddr::from([127, 0, 0, 1]))
        };
        let user = found(include_str!("../ssh/fixtures/user-cert.pub"));
        assert!(user.is_some(), "the same authority, for a user");
        assert!(found(include_str!("../ssh/fixtures/good-cert.pub")).is_none());
    }

    #[test]
    fn addresses_are_within_their_ranges() {
        let table = [
            ("10.1.2.3", "10.0.0.0/8", true),
            ("10.1.2.3", "10.1.2.3", true),
            ("10.1.2.3", "10.1.2.4", false),
            ("11.1.2.3", "10.0.0.0/8", false),
            ("11.1.2.3", "0.0.0.0/0", true),
            ("::ffff:10.1.2.3", "10.0.0.0/8", true),
            ("fd00::1", "fd00::/16", true),
            ("fd01::1", "fd00::/16", false),
            ("fd01::1", "::/0", true),
            ("10.1.2.3", "::/0", false),
            ("10.1.2.3", "nonsense", false),
            ("10.1.2.3", "10.0.0.0/x", false),
            ("10.1.2.3", "10.1.2.3/33", false),
            ("fd00::1", "fd00::1/129", false),
        ];
        for (address, range, expected) in table {
            assert_eq!(
                is_within(address.parse().unwrap(), range),
                expected,
                "{address} {range}"
            );
        }
    }
}
