//! What the service counts. How it is written out for Prometheus is in [`super::scrape`].
//!
//! Every label has a bounded set of values: routes are templates, methods and statuses are few, and repositories are
//! limited to [`MAX_REPO_LABELS`].

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use axum::http::{Method, StatusCode};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::git::name::RepoName;

/// How many repositories get a series of their own; the others share `repo="other"`. A thousand series cost
/// Prometheus next to nothing, and clients cannot make more by asking for repositories.
pub const MAX_REPO_LABELS: usize = 1000;

/// Where the bytes of a Git answer came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerKind {
    /// All that the references reach, which is one answer for all full clones: kept, or made now.
    Whole,
    /// Less than all, kept from an equal request; also what was still being made.
    Cached,
    /// Less than all, made for this request.
    Made,
    /// Passed through from the upstream, as there was no mirror yet; also a list of references.
    Relayed,
}

/// How a fetch from an upstream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FetchResult {
    /// With new references or objects.
    Ok,
    /// Without anything new.
    Unchanged,
    /// Not at all.
    Failed,
}

/// Where requests wait for their turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queue {
    /// For a thread that reads a request, or walks history for it.
    Plan,
    /// For a thread that makes a pack.
    Pack,
    /// For the first fetch of a repository.
    FirstClone,
    /// For a later one: each upstream has a few places.
    Fetch,
}

/// All counters and gauges of the service. Cheap to update from anywhere.
pub struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    request_duration: Family<RouteLabel, Histogram>,
    response_bytes: Counter,
    in_flight: Gauge,
    connections: Gauge,
    ssh_connections: Gauge,
    ssh_logins: Family<ResultLabel, Counter>,
    ssh_requests: Family<ResultLabel, Counter>,
    ssh_request_duration: Histogram,
    ssh_in_flight: Gauge,
    ssh_response_bytes: Counter,
    answers: Family<KindLabel, Counter>,
    answer_bytes: Family<KindLabel, Counter>,
    fetches: Family<ResultLabel, Counter>,
    fetch_duration: Histogram,
    queues: Family<QueueLabel, Gauge>,
    damaged_packs: Counter,
    mirrors_evicted: Counter,
    stale_served: Mutex<StaleServed>,
}

/// Counts something as long as it lives.
#[must_use = "counts only as long as it lives"]
pub struct Counted(Gauge);

/// Answers from mirrors whose upstream could not be asked, by repository up to the limit of labels.
#[derive(Default)]
pub(super) struct StaleServed {
    /// How many answers, for the first [`MAX_REPO_LABELS`] that had any.
    pub(super) repos: BTreeMap<RepoName, u64>,
    /// How many answers from all others.
    pub(super) others: u64,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    route: String,
    method: &'static str,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RouteLabel {
    route: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct QueueLabel {
    queue: &'static str,
}

/// From a fetch that finds nothing new on a near host to a large first clone, in seconds.
const FETCH_BUCKETS: [f64; 12] = [
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0,
];
/// From a health check to a large clone on a slow line, in seconds.
const REQUEST_BUCKETS: [f64; 12] = [
    0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0, 1800.0,
];

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero, so that a first scrape already shows what there is.
    pub fn new() -> Self {
        let metrics = Self {
            registry: Registry::with_prefix("warmdock"),
            requests: Family::default(),
            request_duration: Family::new_with_constructor(|| Histogram::new(REQUEST_BUCKETS)),
            response_bytes: Counter::default(),
            in_flight: Gauge::default(),
            connections: Gauge::default(),
            ssh_connections: Gauge::default(),
            ssh_logins: Family::default(),
            ssh_requests: Family::default(),
            ssh_request_duration: Histogram::new(REQUEST_BUCKETS),
            ssh_response_bytes: Counter::default(),
            ssh_in_flight: Gauge::default(),
            answers: Family::default(),
            answer_bytes: Family::default(),
            fetches: Family::default(),
            fetch_duration: Histogram::new(FETCH_BUCKETS),
            queues: Family::default(),
            damaged_packs: Counter::default(),
            mirrors_evicted: Counter::default(),
            stale_served: Mutex::default(),
        };
        for kind in [
            AnswerKind::Whole,
            AnswerKind::Cached,
            AnswerKind::Made,
            AnswerKind::Relayed,
        ] {
            drop(metrics.answers.get_or_create(&kind.label()));
            drop(metrics.answer_bytes.get_or_create(&kind.label()));
        }
        for result in [SSH_OK, SSH_REFUSED] {
            drop(metrics.ssh_logins.get_or_create(&result));
            drop(metrics.ssh_requests.get_or_create(&result));
        }
        for result in [FetchResult::Ok, FetchResult::Unchanged, FetchResult::Failed] {
            drop(metrics.fetches.get_or_create(&result.label()));
        }
        for queue in [Queue::Plan, Queue::Pack, Queue::FirstClone, Queue::Fetch] {
            drop(metrics.queues.get_or_create(&queue.label()));
        }
        metrics.registered()
    }

    /// Counts a request when its response begins. `route` is the template, never the path.
    pub fn http_request(&self, route: &str, method: &Method, status: StatusCode) {
        let labels = RequestLabels {
            route: route.into(),
            method: method_label(method),
            status: status.as_u16(),
        };
        self.requests.get_or_create(&labels).inc();
    }

    /// Counts the end of a response: how long from the request's head to the end of the body, and the body's bytes.
    pub fn http_response(&self, route: &str, duration: Duration, bytes: u64) {
        self.request_duration
            .get_or_create(&RouteLabel {
                route: route.into(),
            })
            .observe(duration.as_secs_f64());
        self.response_bytes.inc_by(bytes);
    }

    /// A request that is being answered.
    pub fn http_in_flight(&self) -> Counted {
        Counted::of(&self.in_flight)
    }

    /// An open connection.
    pub fn connection(&self) -> Counted {
        Counted::of(&self.connections)
    }

    /// An open connection of SSH.
    pub fn ssh_connection(&self) -> Counted {
        Counted::of(&self.ssh_connections)
    }

    /// A command over SSH that is being answered.
    pub fn ssh_in_flight(&self) -> Counted {
        Counted::of(&self.ssh_in_flight)
    }

    /// Counts a key or certificate whose owner was proved.
    pub fn ssh_login(&self, let_in: bool) {
        self.ssh_logins.get_or_create(&ssh_label(let_in)).inc();
    }

    /// Counts a command over SSH at its end, with the bytes that it was answered with.
    pub fn ssh_request(&self, served: bool, duration: Duration, bytes: u64) {
        self.ssh_requests.get_or_create(&ssh_label(served)).inc();
        self.ssh_request_duration.observe(duration.as_secs_f64());
        self.ssh_response_bytes.inc_by(bytes);
    }

    /// Counts an answer of upload-pack that was sent, with its bytes.
    pub fn answer(&self, kind: AnswerKind, bytes: u64) {
        self.answers.get_or_create(&kind.label()).inc();
        self.answer_bytes.get_or_create(&kind.label()).inc_by(bytes);
    }

    /// Counts a fetch from an upstream.
    pub fn fetch(&self, result: FetchResult, duration: Duration) {
        self.fetches.get_or_create(&result.label()).inc();
        self.fetch_duration.observe(duration.as_secs_f64());
    }

    /// Somebody who waits in a queue.
    pub fn queued(&self, queue: Queue) -> Counted {
        Counted::of(&self.queues.get_or_create(&queue.label()))
    }

    /// Counts an answer that was made although the upstream could not be asked.
    pub fn stale_served(&self, repo: &RepoName) {
        let mut served = self.stale_served_by_repo();
        if let Some(count) = served.repos.get_mut(repo) {
            *count += 1;
        } else if served.repos.len() < MAX_REPO_LABELS {
            served.repos.insert(repo.clone(), 1);
        } else {
            served.others += 1;
        }
    }

    /// Counts a pack whose bytes on disk do not fit its checksums.
    pub fn damaged_pack(&self) {
        self.damaged_packs.inc();
    }

    /// Counts a mirror that was removed to make room.
    pub fn mirror_evicted(&self) {
        self.mirrors_evicted.inc();
    }

    /// What is counted here, to be written out.
    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// The counts of [`Self::stale_served`].
    pub(super) fn stale_served_by_repo(&self) -> MutexGuard<'_, StaleServed> {
        self.stale_served
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn registered(mut self) -> Self {
        let r = &mut self.registry;
        r.register(
            "build",
            "The version that runs",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        r.register(
            "http_requests",
            "Requests by route, method and status",
            self.requests.clone(),
        );
        r.register_with_unit(
            "http_request_duration",
            "From the head of a request to the end of the answer's body",
            Unit::Seconds,
            self.request_duration.clone(),
        );
        r.register_with_unit(
            "http_response",
            "Bodies that were sent",
            Unit::Bytes,
            self.response_bytes.clone(),
        );
        r.register(
            "http_requests_in_flight",
            "Requests that are being answered",
            self.in_flight.clone(),
        );
        r.register(
            "http_connections",
            "Open connections",
            self.connections.clone(),
        );
        r.register(
            "ssh_connections",
            "Open connections of SSH",
            self.ssh_connections.clone(),
        );
        r.register(
            "ssh_logins",
            "Keys and certificates that clients proved to have, by whether they were let in",
            self.ssh_logins.clone(),
        );
        r.register(
            "ssh_requests",
            "Commands over SSH by result",
            self.ssh_requests.clone(),
        );
        r.register(
            "ssh_requests_in_flight",
            "Commands over SSH that are being answered",
            self.ssh_in_flight.clone(),
        );
        r.register_with_unit(
            "ssh_request_duration",
            "From a command to the end of its answer",
            Unit::Seconds,
            self.ssh_request_duration.clone(),
        );
        r.register_with_unit(
            "ssh_response",
            "What was sent for commands",
            Unit::Bytes,
            self.ssh_response_bytes.clone(),
        );
        r.register(
            "git_answers",
            "Answers to fetches: whole (all of a repository), cached (less, from an equal request), made (less, for this \
             one), relayed (passed through from the upstream, lists of references as well)",
            self.answers.clone(),
        );
        r.register_with_unit(
            "git_answer",
            "Bytes of answers to fetches, by the kinds of git_answers",
            Unit::Bytes,
            self.answer_bytes.clone(),
        );
        r.register(
            "git_fetches",
            "Fetches from upstreams by result",
            self.fetches.clone(),
        );
        r.register_with_unit(
            "git_fetch_duration",
            "How long fetches from upstreams took",
            Unit::Seconds,
            self.fetch_duration.clone(),
        );
        r.register(
            "git_queue_length",
            "What waits for its turn: plan and pack for a thread, first_clone and fetch for a place at the upstream",
            self.queues.clone(),
        );
        r.register(
            "git_damaged_packs",
            "Packs whose bytes did not fit their checksums",
            self.damaged_packs.clone(),
        );
        r.register(
            "git_mirrors_evicted",
            "Mirrors that were removed to stay below storage.max_size",
            self.mirrors_evicted.clone(),
        );
        self
    }
}

impl Counted {
    /// One more in `gauge`.
    pub fn of(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

const SSH_OK: ResultLabel = ResultLabel { result: "ok" };
const SSH_REFUSED: ResultLabel = ResultLabel { result: "refused" };

fn ssh_label(ok: bool) -> ResultLabel {
    if ok { SSH_OK } else { SSH_REFUSED }
}

impl AnswerKind {
    fn label(self) -> KindLabel {
        let kind = match self {
            Self::Whole => "whole",
            Self::Cached => "cached",
            Self::Made => "made",
            Self::Relayed => "relayed",
        };
        KindLabel { kind }
    }
}

impl FetchResult {
    fn label(self) -> ResultLabel {
        let result = match self {
            Self::Ok => "ok",
            Self::Unchanged => "unchanged",
            Self::Failed => "failed",
        };
        ResultLabel { result }
    }
}

impl Queue {
    fn label(self) -> QueueLabel {
        let queue = match self {
            Self::Plan => "plan",
            Self::Pack => "pack",
            Self::FirstClone => "first_clone",
            Self::Fetch => "fetch",
        };
        QueueLabel { queue }
    }
}

/// A client may send any word as method.
fn method_label(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// Gauges are signed.
pub(super) fn saturating(value: u64) -> i64 {
    value.try_into().unwrap_or(i64::MAX)
}
