//! What the crate cache counts.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::{Registry, Unit};

/// Where an answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    /// What is here, young enough.
    Cache,
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

const ALL: [From; 7] = [
    From::Cache,
    From::Revalidated,
    From::Upstream,
    From::Shared,
    From::Stale,
    From::Missing,
    From::Failed,
];

/// Of what an answer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Index,
    File,
}

/// Cheap to update from anywhere.
#[derive(Clone, Default)]
pub struct Counters {
    answers: Family<AnswerLabels, Counter>,
    bytes: Family<KindLabel, Counter>,
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
        let counters = Self::default();
        for kind in [Kind::Index, Kind::File] {
            for from in ALL {
                drop(counters.answers.get_or_create(&answer(kind, from)));
            }
            drop(counters.bytes.get_or_create(&kind.label()));
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
    pub fn answer(&self, kind: Kind, from: From) {
        self.answers.get_or_create(&answer(kind, from)).inc();
    }

    /// How many answers of a kind came from there.
    pub fn answers(&self, kind: Kind, from: From) -> u64 {
        self.answers.get_or_create(&answer(kind, from)).get()
    }

    /// Counts what was sent to clients.
    pub fn sent(&self, kind: Kind, bytes: u64) {
        self.bytes.get_or_create(&kind.label()).inc_by(bytes);
    }

    /// Bytes that were sent to clients.
    pub fn sent_bytes(&self) -> u64 {
        let of = |kind: Kind| self.bytes.get_or_create(&kind.label()).get();
        of(Kind::Index) + of(Kind::File)
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
            "Files from registries that were not what their checksums say, and were refused",
            self.mismatches.clone(),
        );
    }
}

fn answer(kind: Kind, from: From) -> AnswerLabels {
    AnswerLabels {
        kind: kind.label().kind,
        from: match from {
            From::Cache => "cache",
            From::Revalidated => "revalidated",
            From::Upstream => "upstream",
            From::Shared => "shared",
            From::Stale => "stale",
            From::Missing => "missing",
            From::Failed => "failed",
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
