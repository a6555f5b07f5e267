//! The typed configuration: what an operator may set, and what holds when nothing is set.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::git::name::RepoName;

pub struct Config {
    pub listen: Listen,
    pub data_dir: PathBuf,
    pub storage: Storage,
    pub git: Git,
    pub access: Access,
    pub limits: Limits,
}
pub struct Listen { pub http: SocketAddr, pub tls: Option<Tls> }
pub struct Tls { pub cert: PathBuf, pub key: PathBuf }
pub struct Storage { pub max_size: u64 }
pub struct Git {
    pub upstreams: Vec<Upstream>,
    pub warm: Vec<RepoName>,
    pub max_age: Duration,
    pub refresh: Duration,
    pub when_upstream_fails: WhenUpstreamFails,
    /// Reference namespaces that are mirrored, as prefixes ending in `/*`. Default `refs/heads/*`, `refs/tags/*`.
    pub refs: Vec<String>,
    /// How long objects stay that no reference reaches any more. Default 24 h.
    pub keep_unreachable: Duration,
    /// First-time clones from upstreams at once. Default 2.
    pub first_clones: usize,
    /// Which object ids a client may want. Default `reachable`.
    pub allow_wants: AllowWants,
}
pub enum WhenUpstreamFails { ServeStale, Fail }
/// `advertised`: tips of references only. `reachable`: any object that a reference reaches.
pub enum AllowWants { Advertised, Reachable }
pub struct Upstream {
    pub host: String,
    pub url: url::Url,
    pub token_file: Option<PathBuf>,
    pub auth: UpstreamAuth,
    /// User name sent with Basic. Default `x-access-token`.
    pub user: String,
    /// Glob patterns over the path below the host; empty means all.
    pub repos: Vec<String>,
}
pub enum UpstreamAuth { Basic, Bearer }
pub struct Access { pub anonymous: Anonymous, pub tokens: Vec<Token> }
pub enum Anonymous { Read, None }
pub struct Token { pub name: String, pub token_file: PathBuf, pub repos: Vec<String> }
pub struct Limits {
    pub connections: usize,              // 1024
    pub tls_handshake_timeout: Duration, // 10s
    pub header_timeout: Duration,        // 10s
    pub body_idle_timeout: Duration,     // 30s
    pub drain_timeout: Duration,         // 60s
    pub request_body: u64,               // 64MiB, decoded
    pub packs_per_repo: usize,           // 20 made or sent at once
    pub packs_queue_per_repo: usize,     // 10 waiting
    pub pack_threads: usize,             // 0: number of cores
    pub upstream_idle_timeout: Duration, // 30s without a byte
    pub first_clone_timeout: Duration,   // 2h
}
