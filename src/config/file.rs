//! The shape of the configuration file and the embedded defaults. The JSON Schema is made from these types.

use std::net::SocketAddr;

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde::{Deserialize, Serialize};

use super::given::{AbsolutePath, Given, PublicKeyText, Word};
use super::http_url::HttpUrl;
use super::lock_file::LockFile;
use super::network::Network;
use super::units::{Size, Span};
use super::upstream_url::UpstreamUrl;
use super::{AllowWants, Anonymous, USUAL_REFS, UpstreamAuth, WhenUpstreamFails};

/// The configuration of warmdock. A section or key that is absent takes its default.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConfigFile {
    /// Where editors find this schema. The service does not look at it.
    #[serde(rename = "$schema", skip_serializing)]
    pub schema: Option<String>,
    pub listen: ListenFile,
    /// The folder of all data. Default: `warmdock` in the user's cache folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_dir: Option<Given<AbsolutePath>>,
    pub storage: StorageFile,
    pub git: GitFile,
    pub crates: CratesFile,
    pub access: AccessFile,
    pub limits: LimitsFile,
}

/// Where clients connect.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ListenFile {
    /// IP address and port. Needs a restart to change.
    #[schemars(with = "String")]
    pub http: Given<SocketAddr>,
    /// Without it the listener speaks cleartext. The files are read again when they change.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsFile>,
    /// Where clients reach the service, for what they are told to fetch next. Without it the address of the request
    /// is used.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_url: Option<Given<HttpUrl>>,
    /// Addresses or networks of proxies whose `X-Forwarded-Host`, `-Proto`, `-Port` and `-Prefix` count.
    #[serde(default)]
    pub trusted_proxies: Vec<Given<Network>>,
    /// A door for Git over SSH. Without it there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ssh: Option<ListenSshFile>,
}

/// Where clients of SSH connect. Needs a restart to change.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ListenSshFile {
    /// IP address and port.
    #[schemars(required, with = "String")]
    pub address: Option<Given<SocketAddr>>,
    /// File with the private key that the service shows to clients. It is made if it is not there.
    #[schemars(required)]
    pub host_key_file: Option<Given<AbsolutePath>>,
}

/// The certificate that clients see.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TlsFile {
    /// PEM file of the certificate chain, the server's certificate first.
    #[schemars(required)]
    pub cert: Option<Given<AbsolutePath>>,
    /// PEM file of the private key.
    #[schemars(required)]
    pub key: Option<Given<AbsolutePath>>,
}

/// What may lie on disk.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct StorageFile {
    /// Bytes that are never passed; what was not used for longest goes first.
    pub max_size: Given<Size>,
    /// A bucket that several warmdocks share. Without it each has its own files only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3File>,
}

/// A bucket of any service that speaks S3.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct S3File {
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bucket: Option<Given<String>>,
    /// Where the service is. Without it, at AWS in the region.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<Given<HttpUrl>>,
    #[serde(default = "default_region")]
    pub region: Given<String>,
    /// What the names of all objects begin with.
    #[serde(default = "default_prefix")]
    pub prefix: Given<String>,
    /// File with the id of the access key.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub access_key_file: Option<Given<AbsolutePath>>,
    /// File with the secret access key.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub secret_key_file: Option<Given<AbsolutePath>>,
}

fn default_region() -> Given<String> {
    Given::text("us-east-1")
}

fn default_prefix() -> Given<String> {
    Given::text("warmdock")
}

/// The clone pool.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct GitFile {
    /// The hosts whose repositories are mirrored. A host that is not listed is refused.
    pub upstreams: Vec<UpstreamFile>,
    /// Repositories (`host/path`) that are fetched at start and kept fresh.
    #[schemars(with = "Vec<String>")]
    pub warm: Vec<Given<crate::git::name::RepoName>>,
    /// A reference that was looked up longer ago is looked up again before it is shown to a client.
    pub max_age: Given<Span>,
    /// How often the repositories of `warm` are refreshed.
    pub refresh: Given<Span>,
    /// What clients get while the upstream cannot be asked.
    pub when_upstream_fails: Given<Word<WhenUpstreamFails>>,
    /// References that are mirrored: `refs/<something>/*`, or one reference in full.
    pub refs: Vec<Given<String>>,
    /// How long objects stay that no reference reaches any more.
    pub keep_unreachable: Given<Span>,
    /// First-time clones from upstreams at once; the others wait in order. Needs a restart to change.
    pub first_clones: Given<usize>,
    /// Which object ids a client may ask for.
    pub allow_wants: Given<Word<AllowWants>>,
}

/// A host whose repositories are mirrored.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct UpstreamFile {
    /// The name below which its repositories are served: `/git/<host>/<path>.git`.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Given<String>>,
    /// Where its repositories are: `https://`, `http://`, `ssh://user@host:port` or `file:///absolute/path`.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<Given<UpstreamUrl>>,
    /// File with the token that reads private repositories.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<Given<AbsolutePath>>,
    /// How the token is sent.
    #[serde(default = "default_auth")]
    pub auth: Given<Word<UpstreamAuth>>,
    /// User name that goes with the token in Basic.
    #[serde(default = "default_user")]
    pub user: Given<String>,
    /// For `ssh://`: file with the private key. Without it the agent of `SSH_AUTH_SOCK` is asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<Given<AbsolutePath>>,
    /// File with the passphrase of an encrypted key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub passphrase_file: Option<Given<AbsolutePath>>,
    /// For `ssh://`: the keys that the host may show, in OpenSSH's format. There is no trust on first use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub known_hosts_file: Option<Given<AbsolutePath>>,
    /// Glob patterns over the path below the host, such as `my-org/*`; none allows all.
    #[serde(default)]
    pub repos: Vec<Given<String>>,
}

/// The crate cache.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct CratesFile {
    /// The registries that are cached. One that is not listed is refused.
    pub registries: Vec<RegistryFile>,
    /// An index entry that was looked up longer ago is looked up again before it is served.
    pub max_age: Given<Span>,
    /// What clients get of the index while the registry cannot be asked.
    pub when_upstream_fails: Given<Word<WhenUpstreamFails>>,
    /// Lock files whose crates are fetched ahead.
    pub warm: Vec<Given<LockFile>>,
}

/// A registry with a sparse index.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RegistryFile {
    /// The name below which it is served: `/crates/<name>/`.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Given<String>>,
    /// Where its sparse index is. Only crates.io can be without: its index is at the host `index` below its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<Given<HttpUrl>>,
    /// File with the token for a registry that wants one, as cargo sends it: alone, or with its scheme, as in
    /// `Bearer TOKEN`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<Given<AbsolutePath>>,
}

/// Who may read what.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct AccessFile {
    /// What clients without a token may do.
    pub anonymous: Given<Word<Anonymous>>,
    pub tokens: Vec<TokenFile>,
    pub keys: KeysFile,
    pub ask_upstream: Vec<AskUpstreamFile>,
}

/// Users of an upstream who come in over SSH under their names there, with the keys that it publishes for them at
/// `/<user>.keys`.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AskUpstreamFile {
    /// A host of `git.upstreams`.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Given<String>>,
    /// Their names there.
    #[schemars(required)]
    #[serde(default)]
    pub users: Vec<Given<String>>,
    /// Glob patterns over `host/path`, such as `github.com/my-org/*`; none allows all of that host.
    #[serde(default)]
    pub repos: Vec<Given<String>>,
    /// How long a user's keys count after they were asked for.
    #[serde(default = "default_keep")]
    pub keep: Given<Span>,
}

fn default_keep() -> Given<Span> {
    Given::text("10m")
}

/// Who comes in over SSH.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct KeysFile {
    /// File in OpenSSH's format with the keys that may read everything.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authorized_keys_file: Option<Given<AbsolutePath>>,
    /// File with public keys, one in a line, that are let in no more: neither by themselves nor in a certificate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revoked_keys_file: Option<Given<AbsolutePath>>,
    pub entries: Vec<KeyFile>,
    pub authorities: Vec<AuthorityFile>,
}

/// A key and what it may read.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyFile {
    /// For logs; unique.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Given<String>>,
    /// As in a `.pub` file: `ssh-ed25519 AAAA…`.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_key: Option<Given<PublicKeyText>>,
    /// Glob patterns over `host/path`, such as `github.com/my-org/*`; none allows all.
    #[serde(default)]
    pub repos: Vec<Given<String>>,
}

/// An authority that signs certificates of users.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthorityFile {
    /// For logs; unique.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Given<String>>,
    /// The key that signs, as in a `.pub` file.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_key: Option<Given<PublicKeyText>>,
    /// A certificate counts if it is for one of these.
    #[schemars(required)]
    #[serde(default)]
    pub principals: Vec<Given<String>>,
    /// Glob patterns over `host/path`, such as `github.com/my-org/*`; none allows all.
    #[serde(default)]
    pub repos: Vec<Given<String>>,
}

/// A token that clients show as Bearer, or as the password of Basic.
#[derive(Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenFile {
    /// For logs; unique.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<Given<String>>,
    /// File with the token.
    #[schemars(required)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<Given<AbsolutePath>>,
    /// Glob patterns over `host/path`, such as `github.com/my-org/*`; none allows all.
    #[serde(default)]
    pub repos: Vec<Given<String>>,
    /// Glob patterns over names of registries. Without the key: all of them, and beside `repos` crates.io alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub registries: Option<Vec<Given<String>>>,
}

/// Bounds on what clients and upstreams can make the service do.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct LimitsFile {
    /// Open client connections at once. Needs a restart to change.
    pub connections: Given<usize>,
    pub tls_handshake_timeout: Given<Span>,
    /// From a connection over SSH to the end of its authentication.
    pub ssh_login_timeout: Given<Span>,
    /// For the whole header of a request.
    pub header_timeout: Given<Span>,
    /// Without a byte in the middle of a request's body. An answer that nobody takes is cut off after ten times that, and
    /// after no more than that where memory for answers is short.
    pub body_idle_timeout: Given<Span>,
    /// How long answers under way may take after the stop signal.
    pub drain_timeout: Given<Span>,
    /// Of a request's body, decoded.
    pub request_body: Given<Size>,
    /// Packs of one repository that are made at once, as far as there are threads. Needs a restart to change.
    pub packs_per_repo: Given<usize>,
    /// Requests of one repository that wait; more get 503. Needs a restart to change.
    pub packs_queue_per_repo: Given<usize>,
    /// Threads that make packs; 0 is the number of cores. Needs a restart to change.
    pub pack_threads: Given<usize>,
    /// Without a byte from the upstream.
    pub upstream_idle_timeout: Given<Span>,
    /// For the first clone of a repository as a whole, and for each later fetch.
    pub first_clone_timeout: Given<Span>,
}

impl Default for ListenFile {
    fn default() -> Self {
        // SECURITY: without a configuration nobody but this machine is served.
        Self {
            http: Given::text("127.0.0.1:8080"),
            tls: None,
            public_url: None,
            trusted_proxies: Vec::new(),
            ssh: None,
        }
    }
}

impl Default for StorageFile {
    fn default() -> Self {
        Self {
            max_size: Given::text("50GiB"),
            s3: None,
        }
    }
}

impl Default for GitFile {
    fn default() -> Self {
        let public = ["github.com", "gitlab.com", "codeberg.org", "bitbucket.org"];
        Self {
            upstreams: public
                .map(|host| UpstreamFile::new(host, &format!("https://{host}")))
                .into(),
            warm: Vec::new(),
            max_age: Given::text("10s"),
            refresh: Given::text("30s"),
            when_upstream_fails: Given::text("serve_stale"),
            refs: USUAL_REFS.map(Given::text).into(),
            keep_unreachable: Given::text("24h"),
            first_clones: Given::number(2),
            allow_wants: Given::text("reachable"),
        }
    }
}

impl Default for CratesFile {
    fn default() -> Self {
        Self {
            registries: vec![RegistryFile {
                name: Some(Given::text(super::CRATES_IO)),
                ..RegistryFile::default()
            }],
            max_age: Given::text("60s"),
            when_upstream_fails: Given::text("serve_stale"),
            warm: Vec::new(),
        }
    }
}

impl UpstreamFile {
    /// One with nothing but its host and URL.
    pub fn new(host: &str, url: &str) -> Self {
        Self {
            host: Some(Given::text(host)),
            url: Some(Given::text(url)),
            token_file: None,
            auth: default_auth(),
            user: default_user(),
            key_file: None,
            passphrase_file: None,
            known_hosts_file: None,
            repos: Vec::new(),
        }
    }
}

fn default_auth() -> Given<Word<UpstreamAuth>> {
    Given::text("basic")
}

/// What GitHub wants beside an app's token, and what the others ignore.
fn default_user() -> Given<String> {
    Given::text("x-access-token")
}

impl Default for AccessFile {
    fn default() -> Self {
        Self {
            anonymous: Given::text("read"),
            tokens: Vec::new(),
            keys: KeysFile::default(),
            ask_upstream: Vec::new(),
        }
    }
}

impl Default for LimitsFile {
    fn default() -> Self {
        Self {
            connections: Given::number(1024),
            tls_handshake_timeout: Given::text("10s"),
            // A person may have to touch a key.
            ssh_login_timeout: Given::text("30s"),
            header_timeout: Given::text("10s"),
            body_idle_timeout: Given::text("30s"),
            drain_timeout: Given::text("60s"),
            // A million haves in v2 are 50 MB.
            request_body: Given::text("64MiB"),
            packs_per_repo: Given::number(20),
            packs_queue_per_repo: Given::number(10),
            pack_threads: Given::number(0),
            upstream_idle_timeout: Given::text("30s"),
            first_clone_timeout: Given::text("2h"),
        }
    }
}

/// The JSON Schema of the configuration file.
pub fn schema() -> Schema {
    SchemaGenerator::new(SchemaSettings::draft2020_12()).into_root_schema_for::<ConfigFile>()
}
