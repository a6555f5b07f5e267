//! Where mirrors come from: one fetch from an upstream, over HTTP, over SSH or from a folder.
//!
//! Everything here blocks, and runs on threads made for that.

mod client;
pub mod ending;
pub mod file;
mod health;
pub mod http;
pub mod pack;
mod patience;
pub mod ssh;
mod transport;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use gix_hash::ObjectId;
use reqwest::StatusCode;
use tokio::sync::Semaphore;

use crate::config::{self, Config};
use crate::git::objects::packs::PackSet;
use crate::git::refs::Refs;
use crate::storage::{Reservation, StorageFull};
use health::Health;

/// What can be mirrored from one configured host.
pub struct Upstream {
    /// As in the names of repositories.
    pub host: String,
    kind: Kind,
    /// Patterns over the path below the host.
    repos: config::patterns::Patterns,
    /// Namespaces as prefixes that end in `/`, or full names.
    namespaces: Vec<String>,
    /// Places for fetches later than the first, and for lists of references. They are the host's own: one that hangs
    /// makes no other's mirrors stale.
    pub fetches: Arc<Semaphore>,
    health: Arc<Health>,
}

enum Kind {
    Http(Box<http::HttpUpstream>),
    Ssh(Box<ssh::SshUpstream>),
    File(PathBuf),
}

/// What one fetch is given.
pub struct FetchJob<'a> {
    /// Called with the upstream's references before the pack comes.
    pub on_refs: &'a dyn Fn(&Refs),
    /// Where the pack goes; `None` where the references are all that is asked for.
    pub pack: Option<PackJob<'a>>,
    pub stop: &'a Arc<AtomicBool>,
}

impl FetchJob<'_> {
    /// The same job, for one of several tries.
    fn again(&mut self) -> FetchJob<'_> {
        let pack = self.pack.as_mut().map(|pack| PackJob {
            local: pack.local,
            haves: pack.haves.clone(),
            folder: pack.folder,
            progress: pack.progress,
            reservation: pack.reservation,
        });
        FetchJob {
            on_refs: self.on_refs,
            pack,
            stop: self.stop,
        }
    }
}

/// What a fetch is given for its pack.
pub struct PackJob<'a> {
    /// What the mirror has.
    pub local: &'a PackSet,
    /// Tips to tell the upstream of, the most telling first.
    pub haves: Vec<ObjectId>,
    /// An empty folder of this fetch's own, on the disk of the mirror.
    pub folder: &'a Path,
    pub progress: &'a Progress,
    /// Grows with what is written.
    pub reservation: &'a mut Reservation,
}

/// What a fetch brought.
pub struct Fetched {
    pub refs: Refs,
    /// The index of the new pack in the job's folder; none when everything was there, or no pack was asked for.
    pub index: Option<PathBuf>,
}

/// How far a fetch is, for those who wait.
#[derive(Default)]
pub struct Progress {
    /// Since when it has its turn.
    pub begun: OnceLock<Instant>,
    pub bytes: AtomicU64,
    pub objects: AtomicU64,
}

impl Progress {
    /// For people: `12 MiB received`.
    pub fn describe(&self) -> String {
        let bytes = self.bytes.load(Ordering::Relaxed);
        if self.begun.get().is_none() {
            "waiting for its turn".to_owned()
        } else if bytes == 0 {
            "waiting for the upstream".to_owned()
        } else {
            format!("{} received", bytesize::ByteSize(bytes))
        }
    }
}

/// Why nothing could be fetched. The texts reach clients: they name hosts and statuses, never credentials.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UpstreamError {
    #[error("the upstream has no such repository")]
    NotFound,
    #[error("{0}")]
    Failed(String),
    /// The host said so, and is left alone until then.
    #[error("{host} answered {status}: it was asked too often, and is asked again in {} s", seconds_to(*until))]
    AskedTooOften {
        host: String,
        status: StatusCode,
        until: Instant,
    },
    /// Trying again would give the same.
    #[error("{0}")]
    Hopeless(String),
    #[error("the repository has SHA-256 objects: expected SHA-1, the only format that is served")]
    Sha256,
    #[error("{0}")]
    Storage(#[from] StorageFull),
    #[error("the service is stopping")]
    Stopped,
}

impl UpstreamError {
    /// Something of a mirror could not be written.
    pub fn unwritable(error: io::Error) -> Self {
        match StorageFull::of(&error) {
            Some(full) => full.into(),
            None => Self::Failed(format!("the mirror cannot be written: {error}")),
        }
    }
}

fn seconds_to(moment: Instant) -> u128 {
    let left = moment.saturating_duration_since(Instant::now());
    left.as_millis().div_ceil(1000)
}

/// More haves than this cost the upstream more than they save.
pub const MOST_HAVES: usize = 256;

/// Fetches of mirrors that are there already, at once from one host. They are short; upstreams dislike more.
const FETCHES_AT_ONCE: usize = 8;

/// A host that has told no references for so long hangs. Slow ones take a second or two.
pub const HANGS_AFTER: Duration = Duration::from_secs(5);

impl Upstream {
    /// The upstream as configured.
    ///
    /// # Errors
    /// No usable certificates for `https`.
    pub fn new(upstream: &config::Upstream, config: &Config) -> anyhow::Result<Self> {
        let idle = config.limits.upstream_idle_timeout;
        let health = Arc::new(Health::new(&upstream.host));
        let kind = match (&upstream.ssh, upstream.url.scheme()) {
            (Some(ssh), _) => Kind::Ssh(Box::new(ssh::SshUpstream::new(
                &upstream.host,
                ssh,
                idle,
                Arc::clone(&health),
            ))),
            (None, "file") => Kind::File(
                upstream
                    .url
                    .to_file_path()
                    .map_err(|()| anyhow::anyhow!("expected file:///absolute/path"))?,
            ),
            _ => Kind::Http(Box::new(http::HttpUpstream::new(
                upstream,
                idle,
                Arc::clone(&health),
            )?)),
        };
        let namespaces = config
            .git
            .refs
            .iter()
            .map(|pattern| pattern.trim_end_matches('*').to_owned())
            .collect();
        Ok(Self {
            host: upstream.host.clone(),
            kind,
            repos: upstream.repos.clone(),
            namespaces,
            fetches: Arc::new(Semaphore::new(FETCHES_AT_ONCE)),
            health,
        })
    }

    /// Whether `other` asks the same host for the same in the same way.
    pub fn is_same(&self, other: &Self) -> bool {
        let is_there = match (&self.kind, &other.kind) {
            (Kind::Http(ours), Kind::Http(other)) => ours.is_same(other),
            (Kind::Ssh(ours), Kind::Ssh(other)) => ours.is_same(other),
            (Kind::File(ours), Kind::File(other)) => ours == other,
            _ => false,
        };
        is_there
            && self.host == other.host
            && self.repos.texts() == other.repos.texts()
            && self.namespaces == other.namespaces
    }

    /// Whether clients wait for what it answers. While it hangs, one does now and then, and the others go on without.
    pub fn is_worth_waiting(&self) -> bool {
        self.health.is_worth_waiting()
    }

    /// A fetch that began when it was `asked` hangs. Counts against the host, unless that has answered others since.
    pub fn blame(&self, asked: Instant) {
        self.health.blame(asked);
    }

    /// Whether the operator allows the repository at `path`.
    pub fn allows(&self, path: &str) -> bool {
        self.repos.matches(path)
    }

    /// Whether references of this name are mirrored.
    pub fn mirrors(&self, name: &[u8]) -> bool {
        is_mirrored(name, &self.namespaces)
    }

    /// The upstream's HTTP side, where it has one: requests can be passed through to it.
    pub fn http(&self) -> Option<&http::HttpUpstream> {
        match &self.kind {
            Kind::Http(http) => Some(http),
            Kind::Ssh(_) | Kind::File(_) => None,
        }
    }

    /// Fetches the references of the repository at `path`, and what the mirror lacks. Blocks for as long as it takes.
    ///
    /// # Errors
    /// [`UpstreamError`]; what lies in the job's folder then is of no use.
    pub fn fetch(&self, path: &str, job: FetchJob<'_>) -> Result<Fetched, UpstreamError> {
        let on_refs = job.on_refs;
        let job = FetchJob {
            on_refs: &|refs| {
                self.health.heard();
                on_refs(refs);
            },
            ..job
        };
        match &self.kind {
            Kind::Http(http) => http.fetch(path, &self.namespaces, job),
            Kind::Ssh(ssh) => ssh.fetch(path, &self.namespaces, job),
            Kind::File(root) => {
                let fetched = file::fetch(root, path, &self.namespaces, job);
                self.health.heard();
                fetched
            }
        }
    }
}

/// Longer names fit neither into a line of the protocol beside its capabilities nor on anybody's screen.
const LONGEST_NAME: usize = 1024;

/// Whether references of this name are mirrored.
fn is_mirrored(name: &[u8], namespaces: &[String]) -> bool {
    name.len() <= LONGEST_NAME
        && namespaces.iter().any(|namespace| {
            if namespace.ends_with('/') {
                name.starts_with(namespace.as_bytes())
            } else {
                name == namespace.as_bytes()
            }
        })
}
