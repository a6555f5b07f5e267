//! `known_hosts`: which keys a host may show (sshd(8), "SSH_KNOWN_HOSTS FILE FORMAT").
//!
//! Defences in this file:
//! - a host that no line names is refused: nothing is trusted on first use;
//! - `@revoked` wins over every other line;
//! - a certificate counts only for an authority that a `@cert-authority` line names for this host, while it is valid,
//!   as a host's certificate, and for the name that we connected to.

use std::time::SystemTime;

use aws_lc_rs::hmac::{HMAC_SHA1_FOR_LEGACY_USE_ONLY, Key, verify};
use russh::keys::ssh_key::certificate::CertType;
use russh::keys::ssh_key::known_hosts::{HostPatterns, Marker};
use russh::keys::{Algorithm, Certificate, PublicKey, PublicKeyOrCertificate};

use super::shown;

/// The lines of a file that could be understood.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KnownHosts {
    lines: Vec<Line>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Line {
    number: usize,
    marker: Option<Marker>,
    hosts: HostPatterns,
    key: PublicKey,
}

/// Why a host is not who it should be. The texts say what was expected, what was offered, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mistrust {
    #[error(
        "expected a host key from known_hosts_file, which has no line for {name}; the host offered {offered}: ask the \
         host's operator whether that is its key, and if it is, add the line `{line}`"
    )]
    Unknown {
        name: String,
        offered: String,
        line: String,
    },
    #[error(
        "expected the host key {expected} of line {number} of known_hosts_file, the host offered {offered}: either its \
         key was replaced, which its operator can tell you, or somebody else answers in its place"
    )]
    Changed {
        expected: String,
        number: usize,
        offered: String,
    },
    #[error(
        "expected any host key but {offered}, which line {number} of known_hosts_file revokes: the host needs a new one"
    )]
    Revoked { offered: String, number: usize },
    #[error("expected a host certificate {expected}, the host offered one {found}")]
    Certificate { expected: String, found: String },
}

impl KnownHosts {
    /// Reads the text of a file. Lines with keys of kinds that we do not know are left out: no host can show us one.
    ///
    /// # Errors
    /// The number of the first line that is none. SECURITY: an unreadable line may be a revocation.
    pub fn parse(text: &str) -> Result<Self, usize> {
        let mut lines = Vec::new();
        for (number, text) in (1..).zip(text.lines()) {
            let text = text.trim();
            if text.is_empty() || text.starts_with('#') {
                continue;
            }
            let mut fields = text.split_ascii_whitespace().peekable();
            let marker = fields
                .next_if(|field| field.starts_with('@'))
                .map(str::parse)
                .transpose()
                .map_err(|_| number)?;
            let (hosts, kind, key) = (fields.next(), fields.next(), fields.next());
            let (Some(hosts), Some(kind), Some(key)) = (hosts, kind, key) else {
                return Err(number);
            };
            // Every key begins with the length of the name of its kind.
            if !key.starts_with("AAAA") {
                return Err(number);
            }
            if matches!(
                Algorithm::new(kind),
                Err(_) | Ok(Algorithm::Other(_) | Algorithm::Dsa)
            ) {
                continue;
            }
            lines.push(Line {
                number,
                marker,
                hosts: hosts.parse().map_err(|_| number)?,
                key: PublicKey::from_openssh(&format!("{kind} {key}")).map_err(|_| number)?,
            });
        }
        Ok(Self { lines })
    }

    /// The algorithms of the keys that are listed for a host: to be asked for first, so that a host with several keys
    /// shows the one that we know.
    pub fn algorithms(&self, host: &str, port: u16) -> Vec<Algorithm> {
        self.of(host, port)
            .filter(|line| line.marker.is_none())
            .map(|line| line.key.algorithm())
            .collect()
    }

    /// Whether certificates of this host can be checked.
    pub fn has_authority(&self, host: &str, port: u16) -> bool {
        self.of(host, port)
            .any(|line| line.marker == Some(Marker::CertAuthority))
    }

    /// Checks what a host shows.
    ///
    /// # Errors
    /// [`Mistrust`].
    pub fn check(
        &self,
        host: &str,
        port: u16,
        offered: &PublicKeyOrCertificate,
        now: SystemTime,
    ) -> Result<(), Mistrust> {
        let key = offered.public_key();
        match offered.certificate() {
            None => self.check_key(host, port, &key),
            Some(certificate) => self.check_certificate(host, port, certificate, now),
        }
    }

    fn check_key(&self, host: &str, port: u16, key: &PublicKey) -> Result<(), Mistrust> {
        self.check_revoked(host, port, key)?;
        let mut other = None;
        for line in self.of(host, port).filter(|line| line.marker.is_none()) {
            if line.key.key_data() == key.key_data() {
                return Ok(());
            }
            // The one of the same kind tells more.
            if other.is_none() || line.key.algorithm() == key.algorithm() {
                other = Some(line);
            }
        }
        let offered = shown(key);
        Err(match other {
            Some(line) => Mistrust::Changed {
                expected: shown(&line.key),
                number: line.number,
                offered,
            },
            None => {
                let name = name_of(host, port);
                let key = key.to_openssh().unwrap_or_default();
                Mistrust::Unknown {
                    line: format!("{name} {key}"),
                    name,
                    offered,
                }
            }
        })
    }

    fn check_certificate(
        &self,
        host: &str,
        port: u16,
        certificate: &Certificate,
        now: SystemTime,
    ) -> Result<(), Mistrust> {
        let authority = PublicKey::from(certificate.signature_key().clone());
        self.check_revoked(
            host,
            port,
            &PublicKey::from(certificate.public_key().clone()),
        )?;
        self.check_revoked(host, port, &authority)?;
        let wrong = |expected: &str, found: String| {
            Err(Mistrust::Certificate {
                expected: expected.to_owned(),
                found,
            })
        };
        let is_listed = self.of(host, port).any(|line| {
            line.marker == Some(Marker::CertAuthority)
                && line.key.key_data() == authority.key_data()
        });
        if !is_listed {
            // As OpenSSH does: the key itself may be listed, whoever else vouches for it.
            let key = PublicKey::from(certificate.public_key().clone());
            if self.check_key(host, port, &key).is_ok() {
                return Ok(());
            }
            return wrong(
                "of an authority that known_hosts_file lists for it",
                format!("of {}", shown(&authority)),
            );
        }
        if certificate.verify_signature().is_err()
            || certificate.signature().algorithm() == (Algorithm::Rsa { hash: None })
        {
            return wrong(
                "with a good signature",
                "with a wrong one, or with SHA-1".into(),
            );
        }
        if certificate.cert_type() != CertType::Host {
            return wrong("for hosts", "for users".into());
        }
        if certificate
            .valid_after_time()
            .is_some_and(|from| now < from)
            || certificate.valid_before_time().is_some_and(|to| now >= to)
        {
            return wrong(
                "that is valid now",
                "that is not: it needs a new one".into(),
            );
        }
        if !certificate.critical_options().is_empty() {
            return wrong("without critical options", "with some".into());
        }
        let names = certificate.valid_principals();
        if !names.iter().any(|name| matches(name, host)) {
            return wrong(&format!("for {host}"), format!("for {names:?}"));
        }
        Ok(())
    }

    fn check_revoked(&self, host: &str, port: u16, key: &PublicKey) -> Result<(), Mistrust> {
        let revoked = self.lines.iter().find(|line| {
            line.marker == Some(Marker::Revoked)
                && line.key.key_data() == key.key_data()
                && (line.names(&name_of(host, port)) || line.names(host))
        });
        match revoked {
            Some(line) => Err(Mistrust::Revoked {
                offered: shown(key),
                number: line.number,
            }),
            None => Ok(()),
        }
    }

    /// The lines for a host: those that name it with its port, else, as OpenSSH does, those that name it without.
    fn of<'a>(&'a self, host: &'a str, port: u16) -> impl Iterator<Item = &'a Line> {
        let full = name_of(host, port);
        let is_for_us =
            |line: &Line, name: &str| line.marker != Some(Marker::Revoked) && line.names(name);
        let name = if self.lines.iter().any(|line| is_for_us(line, &full)) {
            full
        } else {
            host.to_owned()
        };
        self.lines.iter().filter(move |line| is_for_us(line, &name))
    }
}

impl Line {
    fn names(&self, name: &str) -> bool {
        match &self.hosts {
            HostPatterns::HashedName { salt, hash } => {
                let key = Key::new(HMAC_SHA1_FOR_LEGACY_USE_ONLY, salt);
                verify(&key, name.as_bytes(), hash).is_ok()
            }
            HostPatterns::Patterns(patterns) => {
                let mut found = false;
                for pattern in patterns {
                    match pattern.strip_prefix('!') {
                        Some(pattern) if matches(pattern, name) => return false,
                        Some(_) => {}
                        None => found |= matches(pattern, name),
                    }
                }
                found
            }
        }
    }
}

/// How the file names a host: with its port when that is not SSH's own.
fn name_of(host: &str, port: u16) -> String {
    match port {
        22 => host.to_owned(),
        port => format!("[{host}]:{port}"),
    }
}

/// Whether `pattern`, in which `*` stands for any text and `?` for one character, is `name`, whatever the case.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    // Where the last `*` stands, and what it took so far.
    let (mut at, mut place, mut star) = (0, 0, None);
    while place < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                star = Some((at, place));
                at += 1;
            }
            Some(byte) if *byte == b'?' || byte.eq_ignore_ascii_case(&name[place]) => {
                at += 1;
                place += 1;
            }
            _ => match star {
                Some((behind, taken)) => {
                    star = Some((behind, taken + 1));
                    at = behind + 1;
                    place = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Public keys and certificates that ssh-keygen made.
    const A: &str = include_str!("fixtures/a.pub");
    const B: &str = include_str!("fixtures/b.pub");
    const CA: &str = include_str!("fixtures/ca.pub");
    const HOST: &str = "git.corp.example";

    fn key(text: &str) -> PublicKeyOrCertificate {
        PublicKey::from_openssh(text).unwrap().into()
    }

    fn certificate(text: &str) -> PublicKeyOrCertificate {
        Certificate::from_openssh(text).unwrap().into()
    }

    fn check(file: &str, port: u16, offered: &PublicKeyOrCertificate) -> Result<(), Mistrust> {
        KnownHosts::parse(file)
            .unwrap()
            .check(HOST, port, offered, SystemTime::now())
    }

    #[test]
    fn hosts_are_named_in_every_form() {
        // The hosts of a line, and whether they are our host on port 22 and on port 2222.
        let table = [
            ("git.corp.example", [true, true]),
            ("GIT.corp.example", [true, true]),
            ("[git.corp.example]:2222", [false, true]),
            ("[git.corp.example]:22", [false, false]),
            ("*.example,!git.*", [false, false]),
            ("other.example,*.corp.example", [true, true]),
            ("git.corp.exampl?", [true, true]),
            ("git.corp.exampl", [false, false]),
            ("git.corp.example.org", [false, false]),
            ("[*.corp.example]:*", [false, true]),
            ("*", [true, true]),
        ];
        for (hosts, expected) in table {
            let file = format!("# a comment\n\n{hosts}\t{A}");
            let found = [22, 2222].map(|port| check(&file, port, &key(A)).is_ok());
            assert_eq!(found, expected, "{hosts}");
        }
    }

    #[test]
    fn hashed_names_are_found() {
        let hashed = include_str!("fixtures/hashed");
        assert_eq!(check(hashed, 22, &key(A)), Ok(()));
        assert_eq!(check(hashed, 2222, &key(A)), Ok(()));
        let other = KnownHosts::parse(hashed).unwrap();
        let verdict = other.check("other.example", 22, &key(A), SystemTime::now());
        assert!(matches!(verdict, Err(Mistrust::Unknown { .. })));
    }

    #[test]
    fn a_line_with_the_port_stands_before_one_without() {
        let file = format!("{HOST} {A}[{HOST}]:2222 {B}");
        assert_eq!(check(&file, 2222, &key(B)), Ok(()));
        assert!(matches!(
            check(&file, 2222, &key(A)),
            Err(Mistrust::Changed { number: 2, .. })
        ));
    }

    #[test]
    fn an_unknown_host_is_refused_with_the_line_to_add() {
        let Err(Mistrust::Unknown { line, .. }) = check("", 2222, &key(A)) else {
            panic!("not refused")
        };
        assert_eq!(check(&line, 2222, &key(A)), Ok(()));
        let message = check("", 22, &key(A)).unwrap_err().to_string();
        assert!(
            message.contains("has no line for git.corp.example;"),
            "{message}"
        );
    }

    #[test]
    fn revoked_keys_are_refused_whatever_else_is_said() {
        let file = format!("{HOST} {A}@revoked * {A}");
        assert!(matches!(
            check(&file, 22, &key(A)),
            Err(Mistrust::Revoked { number: 2, .. })
        ));
        let elsewhere = format!("{HOST} {A}@revoked other.example {A}");
        assert_eq!(check(&elsewhere, 22, &key(A)), Ok(()));
        let authority = format!("@cert-authority * {CA}@revoked * {CA}");
        let good = certificate(include_str!("fixtures/good-cert.pub"));
        assert!(matches!(
            check(&authority, 22, &good),
            Err(Mistrust::Revoked { .. })
        ));
        let certified = format!("@cert-authority * {CA}@revoked * {B}");
        assert!(matches!(
            check(&certified, 22, &good),
            Err(Mistrust::Revoked { .. })
        ));
    }

    #[test]
    fn certificates_are_checked() {
        let authority = format!("@cert-authority *.corp.example {CA}");
        let good = certificate(include_str!("fixtures/good-cert.pub"));
        assert_eq!(check(&authority, 22, &good), Ok(()));
        assert_eq!(check(&authority, 2222, &good), Ok(()));
        for (text, part) in [
            (include_str!("fixtures/user-cert.pub"), "for hosts"),
            (include_str!("fixtures/old-cert.pub"), "valid now"),
            (
                include_str!("fixtures/other_ca-cert.pub"),
                "of an authority",
            ),
            (
                include_str!("fixtures/nonames-cert.pub"),
                "for git.corp.example",
            ),
        ] {
            let message = check(&authority, 22, &certificate(text))
                .unwrap_err()
                .to_string();
            assert!(message.contains(part), "{message}");
        }
        // Of another authority, but the key is known.
        let other = certificate(include_str!("fixtures/other_ca-cert.pub"));
        assert_eq!(check(&format!("{authority}{HOST} {B}"), 22, &other), Ok(()));
        // The key of an authority is no key of a host, and the other way round.
        assert!(check(&authority, 22, &key(CA)).is_err());
        assert!(check(&format!("{HOST} {CA}"), 22, &good).is_err());
    }

    #[test]
    fn an_authority_is_one_of_its_hosts_only() {
        let good = certificate(include_str!("fixtures/good-cert.pub"));
        assert!(check(&format!("@cert-authority *.other.example {CA}"), 22, &good).is_err());
        let git = KnownHosts::parse(&format!("@cert-authority * {CA}")).unwrap();
        let now = SystemTime::now();
        assert_eq!(git.check("git", 22, &good, now), Ok(()));
        assert!(git.check("corp.example", 22, &good, now).is_err());
    }

    #[test]
    fn what_is_no_line_is_named() {
        for text in [
            "one",
            "one two",
            "one two three",
            "host ssh-ed25519 !!!",
            "@what host ssh-ed25519 AAAA",
            "|1|x| ssh-ed25519 AAAA",
        ] {
            assert_eq!(
                KnownHosts::parse(&format!("# first\n{text}\n")).unwrap_err(),
                2,
                "{text}"
            );
        }
        let unknown = "host ssh-dss AAAAB3NzaC1kc3MAAACBAP1\nhost ssh-new@example.org AAAA\n";
        assert!(KnownHosts::parse(unknown).unwrap().lines.is_empty());
    }

    #[test]
    fn the_kinds_that_are_known_are_told() {
        let known = KnownHosts::parse(&format!("{HOST} {A}@cert-authority {HOST} {CA}")).unwrap();
        assert_eq!(known.algorithms(HOST, 22), [Algorithm::Ed25519]);
        assert!(known.has_authority(HOST, 22) && !known.has_authority("x", 22));
    }
}
