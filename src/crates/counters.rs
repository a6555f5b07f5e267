//! What the crate cache counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

use crate::ops::metrics::Counted;

/// Where an answer came from: what the cache had to do for it, in the sense of RFC 9211.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheStatus {
    /// What is here, young enough.
    Hit,
    /// What is here, and the registry says that it is still right.
    Revalidated,
    /// The registry.
    Upstream,
    /// What somebody else was fetching already.
    Shared,
    /// What is here, though the registry could not be asked.
    Stale,
    /// The registry has no such crate.
    Missing,
    /// Nothing: an error.
    Failed,
}

const ALL: [CacheStatus; 7] = [
    CacheStatus::Hit,
    CacheStatus::Revalidated,
    CacheStatus::Upstream,
    CacheStatus::Shared,
    CacheStatus::Stale,
    CacheStatus::Missing,
    CacheStatus::Failed,
];

/// Of what an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Index,
    File,
}

const KINDS: [Kind; 2] = [Kind::Index, Kind::File];

/// Cheap to update from anywhere.
#[derive(Clone, Default)]
pub struct Counters {
    answers: Family<AnswerLabels, Counter>,
    /// The same in the order of [`Kind`] and [`CacheStatus`]: every hit counts, and is not to look for its labels.
    answers_by: [[Counter; ALL.len()]; KINDS.len()],
    bytes: Family<KindLabel, Counter>,
    bytes_by: [Counter; KINDS.len()],
    queues: Family<KindLabel, Gauge>,
    upstream_requests: Family<UpstreamLabels, Counter>,
    upstream_bytes: Counter,
    mismatches: Counter,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct AnswerLabels {
    kind: &'static str,
    from: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct UpstreamLabels {
    kind: &'static str,
    result: &'static str,
}

impl Counters {
    /// All at zero, so that a first scrape already shows what there is.
    pub fn new() -> Self {
        let mut counters = Self::default();
        for kind in KINDS {
            for from in ALL {
                let counter = counters.answers.get_or_create_owned(&answer(kind, from));
                counters.answers_by[kind as usize][from as usize] = counter;
            }
            counters.bytes_by[kind as usize] = counters.bytes.get_or_create_owned(&kind.label());
            drop(counters.queues.get_or_create(&kind.label()));
            for ok in [true, false] {
                drop(
                    counters
                        .upstream_requests
                        .get_or_create(&upstream(kind, ok)),
                );
            }
        }
        counters
    }

    /// Counts an answer to a client.
    pub fn answer(&self, kind: Kind, from: CacheStatus) {
        self.answers_by[kind as usize][from as usize].inc();
    }

    /// How many answers of a kind came from there.
    pub fn answers(&self, kind: Kind, from: CacheStatus) -> u64 {
        self.answers_by[kind as usize][from as usize].get()
    }

    /// Counts what was sent to clients.
    pub fn sent(&self, kind: Kind, bytes: u64) {
        self.bytes_by[kind as usize].inc_by(bytes);
    }

    /// Bytes that were sent to clients.
    pub fn sent_bytes(&self) -> u64 {
        self.bytes_by.iter().map(Counter::get).sum()
    }

    /// Waits for one of the `places` at a registry, and is counted meanwhile.
    ///
    /// # Errors
    /// None, as nobody closes them.
    pub async fn turn<'a>(
        &self,
        kind: Kind,
        places: &'a Semaphore,
    ) -> Result<SemaphorePermit<'a>, AcquireError> {
        let _waiting = Counted::of(&self.queues.get_or_create_owned(&kind.label()));
        places.acquire().await
    }

    /// Counts a request to a registry by whether it was answered as it should.
    pub fn asked(&self, kind: Kind, ok: bool) {
        self.upstream_requests
            .get_or_create(&upstream(kind, ok))
            .inc();
    }

    /// Counts what came from registries.
    pub fn received(&self, bytes: u64) {
        self.upstream_bytes.inc_by(bytes);
    }

    /// Counts a file that was not what its checksum says.
    pub fn mismatch(&self) {
        self.mismatches.inc();
    }

    /// Names it all.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "crates_answers",
            "Answers to cargo by where they came from",
            self.answers.clone(),
        );
        registry.register_with_unit(
            "crates_sent",
            "What cargo was sent",
            Unit::Bytes,
            self.bytes.clone(),
        );
        registry.register(
            "crates_queue_length",
            "Index entries and files that wait for a place at their registry",
            self.queues.clone(),
        );
        registry.register(
            "crates_upstream_requests",
            "Requests to registries by result",
            self.upstream_requests.clone(),
        );
        registry.register_with_unit(
            "crates_upstream",
            "What registries sent",
            Unit::Bytes,
            self.upstream_bytes.clone(),
        );
        registry.register(
            "crates_checksum_mismatches",
            "Files from registries that were not what their checksums, or the announced length, say, and were refused",
            self.mismatches.clone(),
        );
    }
}

fn answer(kind: Kind, from: CacheStatus) -> AnswerLabels {
    AnswerLabels {
        kind: kind.label().kind,
        from: match from {
            CacheStatus::Hit => "cache",
            CacheStatus::Revalidated => "revalidated",
            CacheStatus::Upstream => "upstream",
            CacheStatus::Shared => "shared",
            CacheStatus::Stale => "stale",
            CacheStatus::Missing => "missing",
            CacheStatus::Failed => "failed",
        },
    }
}

fn upstream(kind: Kind, ok: bool) -> UpstreamLabels {
    UpstreamLabels {
        kind: kind.label().kind,
        result: if ok { "ok" } else { "failed" },
    }
}

impl Kind {
    fn label(self) -> KindLabel {
        let kind = match self {
            Self::Index => "index",
            Self::File => "file",
        };
        KindLabel { kind }
    }
}
