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
pub mod http_url;
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
    /// Where clients connect.
    pub listen: Listen,
    /// The folder of all data; absolute.
    pub data_dir: PathBuf,
    /// What may lie there.
    pub storage: Storage,
    /// The clone pool.
    pub git: Git,
    /// The crate cache.
    pub crates: Crates,
    /// Who may read what.
    pub access: Access,
    /// Bounds on what clients and upstreams can make the service do.
    pub limits: Limits,
}

/// Where clients connect, and what they are told of it.
#[derive(Debug, Clone, Serialize)]
pub struct Listen {
    /// Port 0 is any that is free.
    pub http: SocketAddr,
    /// Without it `http` speaks cleartext.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Where clients reach the service, `http` or `https`; `None` is the address of their request.
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "units::write_optional_url"
    )]
    pub public_url: Option<url::Url>,
    /// Proxies whose `X-Forwarded-…` count.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub trusted_proxies: Vec<Network>,
    /// Without it nobody comes in over SSH.
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

/// Where clients of SSH connect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListenSsh {
    /// Port 0 is any that is free.
    pub address: SocketAddr,
    /// The private key that clients know the service by. Made when the service starts, if it is not there.
    pub host_key_file: PathBuf,
}

/// Who the service is to clients of TLS.
#[derive(Debug, Clone, Serialize)]
pub struct Tls {
    /// PEM, the server's own certificate first.
    pub cert: PathBuf,
    /// PEM.
    pub key: PathBuf,
    /// The certificate chain and key that stood in the files when they were read, known to belong together.
    #[serde(skip)]
    pub identity: Identity,
}

/// What may be stored, and where beside the disk.
#[derive(Debug, Clone, Serialize)]
pub struct Storage {
    /// Bytes on disk that are never passed.
    #[serde(serialize_with = "units::write_size")]
    pub max_size: u64,
    /// The second tier of the crate cache.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3>,
}

/// A bucket that several warmdocks share.
#[derive(Debug, Clone, Serialize)]
pub struct S3 {
    /// Its name.
    pub bucket: String,
    /// `http` or `https`; `None` is AWS.
    #[serde(
        skip_serializing_if = "Option::is_none",
        serialize_with = "units::write_optional_url"
    )]
    pub endpoint: Option<url::Url>,
    /// As the service names it.
    pub region: String,
    /// What the names of all objects begin with; may be empty.
    pub prefix: String,
    /// Absolute.
    pub access_key_file: PathBuf,
    /// What stood in `access_key_file`.
    #[serde(skip)]
    pub access_key: Secret,
    /// Absolute.
    pub secret_key_file: PathBuf,
    /// What stood in `secret_key_file`.
    #[serde(skip)]
    pub secret_key: Secret,
}

/// The clone pool.
#[derive(Debug, Clone, Serialize)]
pub struct Git {
    /// Hosts are unique.
    pub upstreams: Vec<Upstream>,
    /// Repositories that are kept fresh. Each is once here, of a listed upstream and allowed by its patterns.
    #[serde(serialize_with = "units::write_names")]
    pub warm: Vec<RepoName>,
    /// References that were looked up longer ago are looked up again before they are shown.
    #[serde(serialize_with = "units::write_duration")]
    pub max_age: Duration,
    /// How often those of `warm` are looked up; at least a second.
    #[serde(serialize_with = "units::write_duration")]
    pub refresh: Duration,
    /// When references cannot be looked up.
    pub when_upstream_fails: WhenUpstreamFails,
    /// Reference namespaces that are mirrored: `refs/<something>/*`, or one reference in full.
    pub refs: Vec<String>,
    /// How long objects stay that no reference reaches any more.
    #[serde(serialize_with = "units::write_duration")]
    pub keep_unreachable: Duration,
    /// First-time clones from upstreams at once.
    pub first_clones: usize,
    /// Which objects a client may ask for.
    pub allow_wants: AllowWants,
}

/// `git.refs` where it is not set: what a clone asks an upstream for.
pub const USUAL_REFS: [&str; 2] = ["refs/heads/*", "refs/tags/*"];

/// The public registry, which is there without configuration.
pub const CRATES_IO: &str = "crates.io";

/// The crate cache.
#[derive(Debug, Clone, Serialize)]
pub struct Crates {
    /// Names are unique.
    pub registries: Vec<Registry>,
    /// An index entry that was looked up longer ago is looked up again before it is served.
    #[serde(serialize_with = "units::write_duration")]
    pub max_age: Duration,
    /// When an entry cannot be looked up.
    pub when_upstream_fails: WhenUpstreamFails,
    /// Lock files whose crates are fetched ahead. Repositories among them are in [`Git::warm`].
    pub warm: Vec<LockFile>,
}

/// A registry with a sparse index.
#[derive(Debug, Clone, Serialize)]
pub struct Registry {
    /// In lower case, safe as the name of a folder.
    pub name: String,
    /// Of its sparse index, ending in `/`.
    #[serde(serialize_with = "units::write_url")]
    pub url: url::Url,
    /// Absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// What stood in `token_file`: a whole value of `Authorization`.
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

/// A host whose repositories are mirrored.
#[derive(Debug, Clone, Serialize)]
pub struct Upstream {
    /// Lower case; the first part of the names of its repositories.
    pub host: String,
    /// `https`, `http`, `ssh` or `file`, without password, query and fragment; only `ssh` has a user.
    #[serde(serialize_with = "units::write_url")]
    pub url: url::Url,
    /// For `http` and `https`; absolute.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// What stood in `token_file`.
    #[serde(skip)]
    pub token: Option<Secret>,
    /// How the token is sent.
    pub auth: UpstreamAuth,
    /// User name sent with Basic.
    pub user: String,
    /// For `ssh`, as the two below; absolute. `None` where an agent is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<PathBuf>,
    /// What opens an encrypted key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passphrase_file: Option<PathBuf>,
    /// The keys that the host may show.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known_hosts_file: Option<PathBuf>,
    /// Made of `url` and these three files; there for `ssh` alone.
    #[serde(skip)]
    pub ssh: Option<UpstreamSsh>,
    /// Over the path below the host; empty means all.
    pub repos: Patterns,
}

/// Where an upstream is that speaks SSH, and who we are to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamSsh {
    /// The name to log in with; `git` where the URL has none.
    pub user: String,
    /// As in the URL: an IPv6 address has its brackets.
    pub host: String,
    /// 22 where the URL has none.
    pub port: u16,
    /// Before the paths of repositories; empty or beginning with `/`.
    pub root: String,
    /// What we show to it.
    pub identity: SshIdentity,
    /// What it has to show to us.
    pub known_hosts: Arc<KnownHosts>,
}

/// What we show to a host over SSH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SshIdentity {
    /// What stood in `key_file`.
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

/// Who may read what.
#[derive(Debug, Clone, Serialize)]
pub struct Access {
    /// Over HTTP; nobody is anonymous over SSH.
    pub anonymous: Anonymous,
    /// Names and secrets are unique.
    pub tokens: Vec<Token>,
    /// For SSH.
    pub keys: Keys,
    /// For SSH: whose keys upstreams are asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ask_upstream: Vec<AskUpstream>,
}

/// Users of an upstream whose keys it is asked for. Each host at most once.
#[derive(Debug, Clone, Serialize)]
pub struct AskUpstream {
    /// Of one of [`Git::upstreams`] that is no folder.
    pub host: String,
    /// Not empty; each can stand in a path.
    pub users: Vec<String>,
    /// Over the whole `host/path`; empty means all of the host.
    pub repos: Patterns,
    /// How long an answer counts; at least a second.
    #[serde(serialize_with = "units::write_duration")]
    pub keep: Duration,
}

/// Who comes in over SSH. Names and keys are unique.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Keys {
    /// Absolute, in OpenSSH's format; as `revoked_keys_file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authorized_keys_file: Option<PathBuf>,
    /// What stood in `authorized_keys_file`. These may read everything.
    #[serde(skip)]
    pub authorized: Vec<AuthorizedKey>,
    /// May be empty, until a key is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revoked_keys_file: Option<PathBuf>,
    /// What stood in `revoked_keys_file`. These count for nothing, wherever else they stand.
    #[serde(skip)]
    pub revoked: Vec<AuthorizedKey>,
    /// These may read what they say.
    pub entries: Vec<KeyEntry>,
    /// Whose certificates count.
    pub authorities: Vec<Authority>,
}

/// A key and what it may read.
#[derive(Debug, Clone, Serialize)]
pub struct KeyEntry {
    /// For logs.
    pub name: String,
    /// Whoever has the private one is let in.
    #[serde(serialize_with = "units::write_public_key")]
    pub public_key: PublicKey,
    /// Over the whole `host/path`; empty means all.
    pub repos: Patterns,
}

/// Who signs certificates of users, and what these may read.
#[derive(Debug, Clone, Serialize)]
pub struct Authority {
    /// For logs.
    pub name: String,
    /// The key that signs.
    #[serde(serialize_with = "units::write_public_key")]
    pub public_key: PublicKey,
    /// A certificate counts if it is for one of these. Not empty.
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

/// What a client over HTTP shows, and what it may read.
#[derive(Debug, Clone, Serialize)]
pub struct Token {
    /// For logs.
    pub name: String,
    /// Absolute.
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

/// Bounds on what clients and upstreams can make the service do.
#[derive(Debug, Clone, Serialize)]
pub struct Limits {
    /// Open client connections at once.
    pub connections: usize,
    /// From a connection to the end of its handshake.
    #[serde(serialize_with = "units::write_duration")]
    pub tls_handshake_timeout: Duration,
    /// From a connection over SSH to the end of its authentication.
    #[serde(serialize_with = "units::write_duration")]
    pub ssh_login_timeout: Duration,
    /// For the whole header of a request.
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
    /// For the first clone of a repository as a whole, and for each later fetch.
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
