//! The typed configuration: what an operator may set, and what holds when nothing is set.
//!
//! A configuration is read in three steps, each of which reports every problem it finds:
//!
//! 1. [`parse`] turns JSON into the shape of the file ([`file::ConfigFile`]): known keys, objects and lists where they belong;
//! 2. [`validate`] turns that into [`Config`]: every value checked, every named file read;
//! 3. [`source`] says where the file comes from, and [`reload`] does it all again when the file changes.
//!
//! Behind this edge there are no strings to parse again.

mod duplicate;
pub mod environment;
pub mod file;
pub mod given;
pub mod identity;
pub mod lock_file;
pub mod network;
pub mod parse;
pub mod patterns;
pub mod problem;
pub mod reader;
pub mod reload;
pub mod restart;
pub mod secret;
pub mod service_url;
pub mod source;
pub mod units;
pub mod upstream_url;
pub mod validate;
pub mod warnings;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use russh::keys::PublicKey;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::git::name::RepoName;
use crate::ssh::authorized_keys::AuthorizedKey;
use crate::ssh::known_hosts::KnownHosts;
use crate::ssh::private_key::SshKey;
use environment::Environment;
use identity::Identity;
use lock_file::LockFile;
use network::Network;
use patterns::Patterns;
use problem::Problems;
use secret::Secret;

/// The effective configuration. Serialized, it is a configuration file again, without any secret in it.
#[derive(Debug, Clone, Serialize)]
pub struct Config {
    pub listen: Listen,
    /// Absolute.
    pub data_dir: PathBuf,
    pub storage: Storage,
    pub git: Git,
    pub crates: Crates,
    pub access: Access,
    pub limits: Limits,
}

#[derive(Debug, Clone, Serialize)]
pub struct Listen {
    pub http: SocketAddr,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// `http` or `https`.
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "units::write_optional_url"
    )]
    pub public_url: Option<url::Url>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<Network>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh: Option<ListenSsh>,
}

impl Listen {
    /// Whether a proxy at this address is believed.
    pub fn trusts(&self, address: IpAddr) -> bool {
        self.trusted_proxies
            .iter()
            .any(|network| network.contains(address))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListenSsh {
    pub address: SocketAddr,
    /// Made when the service starts, if it is not there.
    pub host_key_file: PathBuf,
}

#[derive(Debug, Clone, Serialize)]
pub struct Tls {
    pub cert: PathBuf,
    pub key: PathBuf,
    /// The certificate chain and key that stood in the files when they were read, known to belong together.
    #[serde(skip)]
    pub identity: Identity,
}

#[derive(Debug, Clone, Serialize)]
pub struct Storage {
    /// Bytes on disk that are never passed.
    #[serde(serialize_with = "units::write_size")]
    pub max_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3>,
}

/// A bucket that several warmdocks share.
#[derive(Debug, Clone, Serialize)]
pub struct S3 {
    pub bucket: String,
    /// `http` or `https`; `None` is AWS.
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "units::write_optional_url"
    )]
    pub endpoint: Option<url::Url>,
    pub region: String,
    pub prefix: String,
    pub access_key_file: PathBuf,
    /// What stood in `access_key_file`.
    #[serde(skip)]
    pub access_key: Secret,
    pub secret_key_file: PathBuf,
    /// What stood in `secret_key_file`.
    #[serde(skip)]
    pub secret_key: Secret,
}

#[derive(Debug, Clone, Serialize)]
pub struct Git {
    /// Hosts are unique.
    pub upstreams: Vec<Upstream>,
    /// Each is of a listed upstream and allowed by its patterns.
    #[serde(serialize_with = "units::write_names")]
    pub warm: Vec<RepoName>,
    #[serde(serialize_with = "units::write_duration")]
    pub max_age: Duration,
    #[serde(serialize_with = "units::write_duration")]
    pub refresh: Duration,
    pub when_upstream_fails: WhenUpstreamFails,
    /// Reference namespaces that are mirrored: `refs/<something>/*`, or one reference in full.
    pub refs: Vec<String>,
    /// How long objects stay that no reference reaches any more.
    #[serde(serialize_with = "units::write_duration")]
    pub keep_unreachable: Duration,
    /// First-time clones from upstreams at once.
    pub first_clones: usize,
    pub allow_wants: AllowWants,
}

/// `git.refs` where it is not set: what a clone asks an upstream for.
pub const USUAL_REFS: [&str; 2] = ["refs/heads/*", "refs/tags/*"];

/// The public registry, which is there without configuration.
pub const CRATES_IO: &str = "crates.io";

#[derive(Debug, Clone, Serialize)]
pub struct Crates {
    /// Names are unique.
    pub registries: Vec<Registry>,
    #[serde(serialize_with = "units::write_duration")]
    pub max_age: Duration,
    pub when_upstream_fails: WhenUpstreamFails,
    /// Repositories among them are in [`Git::warm`].
    pub warm: Vec<LockFile>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Registry {
    /// In lower case, safe as the name of a folder.
    pub name: String,
    /// Of its sparse index, ending in `/`.
    #[serde(serialize_with = "units::write_url")]
    pub url: url::Url,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// What stood in `token_file`.
    #[serde(skip)]
    pub token: Option<Secret>,
}

/// What clients get when the upstream cannot be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WhenUpstreamFails {
    /// What the mirror has, marked in log and metric.
    ServeStale,
    /// 502 with the reason.
    Fail,
}

/// Which object ids a client may want.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AllowWants {
    /// Tips of references only.
    Advertised,
    /// Any object that a reference reaches.
    Reachable,
}

#[derive(Debug, Clone, Serialize)]
pub struct Upstream {
    /// Lower case; the first part of the names of its repositories.
    pub host: String,
    /// `https`, `http`, `ssh` or `file`, without password, query and fragment; only `ssh` has a user.
    #[serde(serialize_with = "units::write_url")]
    pub url: url::Url,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// What stood in `token_file`.
    #[serde(skip)]
    pub token: Option<Secret>,
    pub auth: UpstreamAuth,
    /// User name sent with Basic.
    pub user: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passphrase_file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known_hosts_file: Option<PathBuf>,
    /// What `url` and these files come to, for `ssh`.
    #[serde(skip)]
    pub ssh: Option<UpstreamSsh>,
    /// Over the path below the host; empty means all.
    pub repos: Patterns,
}

/// Where an upstream is that speaks SSH, and who we are to it.
#[derive(Debug, Clone)]
pub struct UpstreamSsh {
    pub user: String,
    /// As in the URL: an IPv6 address has its brackets.
    pub host: String,
    pub port: u16,
    /// Before the paths of repositories; empty or beginning with `/`.
    pub root: String,
    pub identity: SshIdentity,
    pub known_hosts: Arc<KnownHosts>,
}

/// What we show to a host over SSH.
#[derive(Debug, Clone)]
pub enum SshIdentity {
    Key(SshKey),
    /// Whatever the agent behind this socket has.
    Agent(PathBuf),
}

/// How the token is sent to an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum UpstreamAuth {
    /// As the password, beside `user`.
    Basic,
    /// As `Authorization: Bearer`.
    Bearer,
}

#[derive(Debug, Clone, Serialize)]
pub struct Access {
    pub anonymous: Anonymous,
    /// Names and secrets are unique.
    pub tokens: Vec<Token>,
    pub keys: Keys,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ask_upstream: Vec<AskUpstream>,
}

/// Users of an upstream whose keys it is asked for. Each host at most once.
#[derive(Debug, Clone, Serialize)]
pub struct AskUpstream {
    pub host: String,
    /// Not empty; each can stand in a path.
    pub users: Vec<String>,
    /// Over the whole `host/path`; empty means all of the host.
    pub repos: Patterns,
    #[serde(serialize_with = "units::write_duration")]
    pub keep: Duration,
}

/// Who comes in over SSH. Names and keys are unique.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Keys {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authorized_keys_file: Option<PathBuf>,
    /// What stood in `authorized_keys_file`.
    #[serde(skip)]
    pub authorized: Vec<AuthorizedKey>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revoked_keys_file: Option<PathBuf>,
    /// What stood in `revoked_keys_file`.
    #[serde(skip)]
    pub revoked: Vec<AuthorizedKey>,
    pub entries: Vec<KeyEntry>,
    pub authorities: Vec<Authority>,
}

#[derive(Debug, Clone, Serialize)]
pub struct KeyEntry {
    pub name: String,
    #[serde(serialize_with = "units::write_public_key")]
    pub public_key: PublicKey,
    /// Over the whole `host/path`; empty means all.
    pub repos: Patterns,
}

#[derive(Debug, Clone, Serialize)]
pub struct Authority {
    pub name: String,
    #[serde(serialize_with = "units::write_public_key")]
    pub public_key: PublicKey,
    /// Not empty.
    pub principals: Vec<String>,
    /// Over the whole `host/path`; empty means all.
    pub repos: Patterns,
}

/// What a client without a token may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Anonymous {
    /// Read every repository.
    Read,
    /// Nothing.
    None,
}

#[derive(Debug, Clone, Serialize)]
pub struct Token {
    pub name: String,
    pub token_file: PathBuf,
    /// What stood in `token_file`.
    #[serde(skip)]
    pub secret: Secret,
    /// Over the whole `host/path`; empty means all.
    pub repos: Patterns,
    /// Over names of registries; empty means none. `None` where nothing was said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registries: Option<Patterns>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Limits {
    /// Open client connections at once.
    pub connections: usize,
    #[serde(serialize_with = "units::write_duration")]
    pub tls_handshake_timeout: Duration,
    #[serde(serialize_with = "units::write_duration")]
    pub ssh_login_timeout: Duration,
    #[serde(serialize_with = "units::write_duration")]
    pub header_timeout: Duration,
    /// Without a byte from the client in the middle of a body.
    #[serde(serialize_with = "units::write_duration")]
    pub body_idle_timeout: Duration,
    /// How long answers under way may take after the stop signal.
    #[serde(serialize_with = "units::write_duration")]
    pub drain_timeout: Duration,
    /// Bytes of a request body, decoded.
    #[serde(serialize_with = "units::write_size")]
    pub request_body: u64,
    /// Packs of one repository that are made at once.
    pub packs_per_repo: usize,
    /// Requests of one repository that wait for their turn.
    pub packs_queue_per_repo: usize,
    /// 0: the number of cores.
    pub pack_threads: usize,
    /// Without a byte from the upstream.
    #[serde(serialize_with = "units::write_duration")]
    pub upstream_idle_timeout: Duration,
    #[serde(serialize_with = "units::write_duration")]
    pub first_clone_timeout: Duration,
}

impl Config {
    /// What holds without any file: loopback only, the public Git hosts, data in the user's cache folder.
    pub fn embedded(environment: &Environment) -> Self {
        Self::parse("{}", environment).expect("the embedded default is valid, a test says so")
    }

    /// Reads a configuration from JSON text. Files that it names are read now.
    ///
    /// # Errors
    /// All problems of the text, each with the path of its key.
    pub fn parse(text: &str, environment: &Environment) -> Result<Self, Problems> {
        let parsed = parse::parse(text.as_bytes());
        validate::validate(parsed, environment, &mut reader::Reader::default())
    }

    /// The upstream that `host` (lower case) names.
    pub fn upstream(&self, host: &str) -> Option<&Upstream> {
        self.git
            .upstreams
            .iter()
            .find(|upstream| upstream.host == host)
    }

    /// The effective configuration as a file: pretty JSON that [`Config::parse`] reads back.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self)
            .expect("a configuration has only text, numbers and lists")
    }
}
