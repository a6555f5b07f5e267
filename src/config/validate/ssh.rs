//! What SSH needs, on both sides: keys, passphrases, the keys of hosts, and those of clients.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use russh::keys::PublicKey;
use url::Url;

use super::{Validator, indexed, optional, shown};
use crate::config::file::{AuthorityFile, KeyFile, KeysFile, ListenSshFile, UpstreamFile};
use crate::config::given::{AbsolutePath, Given, PublicKeyText, Written};
use crate::config::reader::Unreadable;
use crate::config::secret::Secret;
use crate::config::{Authority, KeyEntry, Keys, ListenSsh, SshIdentity, UpstreamSsh};
use crate::ssh::authorized_keys;
use crate::ssh::known_hosts::KnownHosts;
use crate::ssh::private_key::{SshKey, Wrong};

/// The keys of an upstream that belong to SSH.
#[derive(Default)]
pub(super) struct SshFiles {
    pub key_file: Option<PathBuf>,
    pub passphrase_file: Option<PathBuf>,
    pub known_hosts_file: Option<PathBuf>,
    pub ssh: Option<UpstreamSsh>,
}

/// Who is meant when a URL names nobody: Git hosts have one user for everybody.
const USER: &str = "git";

impl Validator<'_> {
    pub(super) fn upstream_ssh(
        &mut self,
        key: &str,
        url: &Url,
        file: &UpstreamFile,
    ) -> Option<SshFiles> {
        let given = [
            ("key_file", &file.key_file),
            ("passphrase_file", &file.passphrase_file),
            ("known_hosts_file", &file.known_hosts_file),
        ];
        if url.scheme() != "ssh" {
            let mut fine = Some(SshFiles::default());
            for (name, _) in given.iter().filter(|(_, given)| given.is_some()) {
                let found = format!(
                    "a file for SSH beside a URL of the scheme `{}`",
                    url.scheme()
                );
                fine = self.wrong(&format!("{key}.{name}"), found, "none, or an ssh:// URL");
            }
            return fine;
        }
        let known_hosts = self.known_hosts(&format!("{key}.known_hosts_file"), file);
        let passphrase = optional(&file.passphrase_file, |given| {
            self.passphrase(&format!("{key}.passphrase_file"), given)
        });
        let identity = match (&file.key_file, passphrase) {
            (Some(given), Some(passphrase)) => {
                self.private_key(&format!("{key}.key_file"), given, passphrase)
            }
            (Some(_), None) => None,
            (None, Some(None)) => self.agent(&format!("{key}.key_file")),
            (None, _) => self.missing(
                &format!("{key}.key_file"),
                "the file of the key that passphrase_file opens",
            ),
        };
        let ((known_hosts_file, known_hosts), identity) = (known_hosts?, identity?);
        let user = match url.username() {
            "" => USER,
            user => user,
        };
        Some(SshFiles {
            key_file: identity.key_file,
            passphrase_file: identity.passphrase_file,
            known_hosts_file: Some(known_hosts_file),
            ssh: Some(UpstreamSsh {
                user: user.to_owned(),
                host: url.host_str().unwrap_or_default().to_ascii_lowercase(),
                port: url.port().unwrap_or(22),
                root: url.path().trim_end_matches('/').to_owned(),
                identity: identity.identity,
                known_hosts: Arc::new(known_hosts),
            }),
        })
    }

    pub(super) fn listen_ssh(&mut self, file: &ListenSshFile) -> Option<ListenSsh> {
        let (address_key, file_key) = ("listen.ssh.address", "listen.ssh.host_key_file");
        let address = match &file.address {
            Some(given) => self.read(address_key, given),
            None => self.missing(address_key, &SocketAddr::expected()),
        };
        let host_key_file = self.required(file_key, file.host_key_file.as_ref());
        let AbsolutePath(host_key_file) = host_key_file?;
        // It is made when the service starts. What is there has to be a key.
        if host_key_file.exists() {
            let expected = "a file with a private key as ssh-keygen makes it, without passphrase";
            let content = self.content(file_key, &host_key_file, expected)?;
            if let Err(wrong) = SshKey::read(&content, None) {
                let found = format!("{}, {wrong}", shown(&host_key_file));
                return self.wrong(file_key, found, expected);
            }
        }
        Some(ListenSsh {
            address: address?,
            host_key_file,
        })
    }

    pub(super) fn keys(&mut self, file: &KeysFile, names: &mut HashSet<String>) -> Option<Keys> {
        let mut known = HashSet::new();
        let authorized = self.listed_keys(
            "access.keys.authorized_keys_file",
            file.authorized_keys_file.as_ref(),
        );
        let revoked = self.listed_keys(
            "access.keys.revoked_keys_file",
            file.revoked_keys_file.as_ref(),
        );
        let entries: Vec<_> = indexed("access.keys.entries", &file.entries)
            .map(|(key, file)| self.key_entry(&key, file, names, &mut known))
            .collect();
        let mut known = HashSet::new();
        let authorities: Vec<_> = indexed("access.keys.authorities", &file.authorities)
            .map(|(key, file)| self.authority(&key, file, names, &mut known))
            .collect();
        let (authorized_keys_file, authorized) = authorized?;
        let (revoked_keys_file, revoked) = revoked?;
        Some(Keys {
            authorized_keys_file,
            authorized,
            revoked_keys_file,
            revoked,
            entries: entries.into_iter().collect::<Option<_>>()?,
            authorities: authorities.into_iter().collect::<Option<_>>()?,
        })
    }

    /// The keys of a file that lists them; none where no file is given.
    fn listed_keys(
        &mut self,
        key: &str,
        given: Option<&Given<AbsolutePath>>,
    ) -> Option<(Option<PathBuf>, Vec<authorized_keys::AuthorizedKey>)> {
        let expected = "a file of OpenSSH's authorized_keys format";
        let Some(given) = given else {
            return Some((None, Vec::new()));
        };
        let AbsolutePath(path) = self.read(key, given)?;
        let content = match self.reader.read(&path) {
            // Who takes the last key out wants nobody to be in the list.
            Err(Unreadable::Empty) => Vec::new(),
            Ok(content) => content,
            Err(error) => return self.wrong(key, format!("{}, {error}", shown(&path)), expected),
        };
        match authorized_keys::parse(&content) {
            Ok(keys) => Some((Some(path), keys)),
            Err(wrong) => self.wrong(key, format!("{}, {wrong}", shown(&path)), expected),
        }
    }

    fn key_entry(
        &mut self,
        key: &str,
        file: &KeyFile,
        names: &mut HashSet<String>,
        known: &mut HashSet<String>,
    ) -> Option<KeyEntry> {
        let name = self.name(&format!("{key}.name"), file.name.as_ref(), names);
        let public_key = self.public_key(
            &format!("{key}.public_key"),
            file.public_key.as_ref(),
            known,
        );
        let repos = self.patterns(&format!("{key}.repos"), &file.repos);
        Some(KeyEntry {
            name: name?,
            public_key: public_key?,
            repos: repos?,
        })
    }

    fn authority(
        &mut self,
        key: &str,
        file: &AuthorityFile,
        names: &mut HashSet<String>,
        known: &mut HashSet<String>,
    ) -> Option<Authority> {
        let name = self.name(&format!("{key}.name"), file.name.as_ref(), names);
        let public_key = self.public_key(
            &format!("{key}.public_key"),
            file.public_key.as_ref(),
            known,
        );
        let principals_key = format!("{key}.principals");
        let principals: Vec<_> = indexed(&principals_key, &file.principals)
            .map(|(key, given)| self.read(&key, given))
            .collect();
        // SECURITY: without one, whoever has any certificate of the authority would be let in.
        if principals.is_empty() {
            return self.missing(&principals_key, "at least one principal, such as \"build\"");
        }
        let repos = self.patterns(&format!("{key}.repos"), &file.repos);
        Some(Authority {
            name: name?,
            public_key: public_key?,
            principals: principals.into_iter().collect::<Option<_>>()?,
            repos: repos?,
        })
    }

    fn public_key(
        &mut self,
        key: &str,
        given: Option<&Given<PublicKeyText>>,
        known: &mut HashSet<String>,
    ) -> Option<PublicKey> {
        let PublicKeyText(public_key) = self.required(key, given)?;
        if !known.insert(crate::ssh::shown(&public_key)) {
            return self.wrong(key, "a key that another entry has", "a key of its own");
        }
        Some(public_key)
    }

    fn known_hosts(&mut self, key: &str, file: &UpstreamFile) -> Option<(PathBuf, KnownHosts)> {
        let expected = "a file of OpenSSH's known_hosts format with the keys of this host";
        let Some(given) = &file.known_hosts_file else {
            return self.missing(key, expected);
        };
        let AbsolutePath(path) = self.read(key, given)?;
        let content = self.content(key, &path, expected)?;
        let parsed = match std::str::from_utf8(&content) {
            Ok(text) => KnownHosts::parse(text),
            Err(_) => Err(1),
        };
        match parsed {
            Ok(known_hosts) => Some((path, known_hosts)),
            Err(line) => {
                let found = format!("{}, whose line {line} is none of that", shown(&path));
                self.wrong(key, found, expected)
            }
        }
    }

    fn passphrase(&mut self, key: &str, given: &Given<AbsolutePath>) -> Option<(PathBuf, Secret)> {
        let AbsolutePath(path) = self.read(key, given)?;
        let content = self.content(key, &path, "a file with one passphrase")?;
        // Spaces may be part of it, the line end that editors and `echo` leave is not.
        let line = content.strip_suffix(b"\n").unwrap_or(&content);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        Some((path, Secret::new(line)))
    }

    fn private_key(
        &mut self,
        key: &str,
        given: &Given<AbsolutePath>,
        passphrase: Option<(PathBuf, Secret)>,
    ) -> Option<Identity> {
        let expected = "a file with a private key as ssh-keygen makes it";
        let AbsolutePath(path) = self.read(key, given)?;
        let content = self.content(key, &path, expected)?;
        let (passphrase_file, passphrase) = passphrase.unzip();
        match SshKey::read(&content, passphrase.as_ref().map(Secret::expose)) {
            Ok(identity) => Some(Identity {
                key_file: Some(path),
                passphrase_file,
                identity: SshIdentity::Key(identity),
            }),
            Err(wrong) => {
                let expected = match wrong {
                    Wrong::Encrypted => "passphrase_file beside it, or a key without passphrase",
                    Wrong::Passphrase => "its passphrase in passphrase_file",
                    Wrong::Public => "the private key, which is the file without `.pub`",
                    Wrong::NoKey => expected,
                };
                self.wrong(key, format!("{}, {wrong}", shown(&path)), expected)
            }
        }
    }

    fn agent(&mut self, key: &str) -> Option<Identity> {
        let socket = self.environment.auth_socket.as_ref().map(PathBuf::from);
        match socket.filter(|socket| socket.is_absolute()) {
            Some(socket) => Some(Identity {
                key_file: None,
                passphrase_file: None,
                identity: SshIdentity::Agent(socket),
            }),
            None => self.missing(
                key,
                "a file with a private key, or an agent named by SSH_AUTH_SOCK",
            ),
        }
    }
}

struct Identity {
    key_file: Option<PathBuf>,
    passphrase_file: Option<PathBuf>,
    identity: SshIdentity,
}
