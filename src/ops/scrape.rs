//! `/metrics`: what is counted, and what is measured at the moment of asking, as Prometheus text.
//!
//! SECURITY: anybody may ask, as scrapers rarely have credentials, but repositories that the requester may not read
//! are folded into `repo="other"`.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, AUTHORIZATION, CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use prometheus_client::encoding::text::encode_eof;
use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::{Registry, Unit};

use crate::app::App;
use crate::error::Error;
use crate::git::name::RepoName;
use crate::git::pool::RepoStatus;
use crate::ops::metrics::{MAX_REPO_LABELS, Metrics, saturating};
use crate::ops::process::Process;
use crate::storage::{Part, Storage};

/// The media types of <https://prometheus.io/docs/instrumenting/content_negotiation/>.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What is measured when somebody asks.
pub struct Measured<'a> {
    /// All repositories.
    pub repos: &'a [RepoStatus],
    /// The account of disk space: what is on its way is in it as well, and what nobody has but a reader.
    pub storage: &'a Storage,
    /// The crate cache's own counters.
    pub crates: &'a dyn Fn(&mut Registry),
    /// Registries that fail, and are left alone for a while.
    pub failing_registries: u64,
    /// This process.
    pub process: Process,
    /// The time, against which staleness is measured.
    pub now: SystemTime,
    /// Which repositories may be named.
    pub visible: &'a dyn Fn(&RepoName) -> bool,
}

/// Answers `/metrics`.
///
/// # Errors
/// [`Error::Unauthorized`] for wrong credentials.
pub async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Result<Response, Error> {
    let principal = match app.access.principal(&headers) {
        Ok(principal) => Some(principal),
        Err(_) if !headers.contains_key(AUTHORIZATION) => None,
        Err(error) => return Err(error),
    };
    let visible = |repo: &RepoName| {
        principal
            .as_ref()
            .is_some_and(|principal| principal.may_read(repo))
    };
    let measured = Measured {
        repos: &app.pool.status(),
        storage: app.pool.storage(),
        crates: &|registry| {
            app.crates.counters.register(registry);
            app.crates.blobs().register(registry);
            app.crates.second_tier.register(registry);
        },
        failing_registries: app.crates.failing(),
        process: Process::now(),
        now: SystemTime::now(),
        visible: &visible,
    };
    let accepts = headers
        .get(ACCEPT)
        .map_or(&b""[..], |value| value.as_bytes());
    let open = accepts
        .windows(28)
        .any(|part| part.eq_ignore_ascii_case(b"application/openmetrics-text"));
    let content_type = if open { OPEN_METRICS } else { TEXT };
    let text = render(&app.metrics, &measured);
    Ok((
        [(CONTENT_TYPE, content_type), (CACHE_CONTROL, "no-store")],
        text,
    )
        .into_response())
}

/// Everything as text.
pub fn render(metrics: &Metrics, measured: &Measured<'_>) -> String {
    let mut text = String::new();
    let written = encode_registry(&mut text, metrics.registry())
        .and_then(|()| encode_registry(&mut text, &of_service(metrics, measured)))
        .and_then(|()| encode_registry(&mut text, &of_process(&measured.process)))
        .and_then(|()| encode_eof(&mut text));
    written.expect("a String takes everything");
    text
}

type ByRepo<M> = Family<[(&'static str, String); 1], M>;

fn of_service(metrics: &Metrics, measured: &Measured<'_>) -> Registry {
    let mut registry = Registry::with_prefix("warmdock");

    let staleness: ByRepo<Gauge<f64, std::sync::atomic::AtomicU64>> = Family::default();
    for (repo, seconds) in stalenesses(measured) {
        staleness.get_or_create(&[("repo", repo)]).set(seconds);
    }
    let help = "Since the upstream was last asked with success";
    registry.register_with_unit("git_mirror_staleness", help, Unit::Seconds, staleness);

    let served: ByRepo<prometheus_client::metrics::counter::Counter> = Family::default();
    for (repo, count) in stale_served(metrics, measured) {
        served.get_or_create(&[("repo", repo)]).inc_by(count);
    }
    let help = "Answers from a mirror whose upstream could not be asked";
    registry.register("git_stale_served", help, served);

    let storage: Family<[(&'static str, &'static str); 1], Gauge> = Family::default();
    for part in Part::ALL {
        storage
            .get_or_create(&[("part", part.name())])
            .set(saturating(measured.storage.used(part)));
    }
    registry.register_with_unit("storage", "Disk that is used", Unit::Bytes, storage);
    let limit = ConstGauge::new(saturating(measured.storage.limit()));
    registry.register_with_unit("storage_limit", "Disk that may be used", Unit::Bytes, limit);
    // Others were asked for, and have no mirror or lost it.
    let mirrors = measured.repos.iter();
    let mirrors = mirrors.filter(|repo| repo.last_fetch.is_some()).count();
    let mirrors = ConstGauge::new(saturating(mirrors as u64));
    registry.register("git_mirrors", "Repositories that are mirrored", mirrors);
    (measured.crates)(&mut registry);
    let failing = ConstGauge::new(saturating(measured.failing_registries));
    let help = "Registries of crates that fail, and are left alone for a while";
    registry.register("crates_registries_failing", help, failing);
    registry
}

/// Under the names without prefix that all dashboards know.
fn of_process(process: &Process) -> Registry {
    let mut registry = Registry::with_prefix("process");
    if let Some(bytes) = process.resident_bytes {
        let gauge = ConstGauge::new(saturating(bytes));
        registry.register_with_unit(
            "resident_memory",
            "Memory that is really there",
            Unit::Bytes,
            gauge,
        );
    }
    if let Some(seconds) = process.cpu_seconds {
        let counter = ConstCounter::new(seconds);
        registry.register_with_unit("cpu", "User and system time", Unit::Seconds, counter);
    }
    if let Some(count) = process.open_fds {
        registry.register(
            "open_fds",
            "Open files and sockets",
            ConstGauge::new(saturating(count)),
        );
    }
    registry
}

/// By repository, warm ones first when there are too many; the oldest of the others stands for them all.
fn stalenesses(measured: &Measured<'_>) -> BTreeMap<String, f64> {
    let mut by_repo = BTreeMap::new();
    let (warm, rest): (Vec<_>, Vec<_>) = measured.repos.iter().partition(|repo| repo.warm);
    let mut named = 0;
    for status in warm.into_iter().chain(rest) {
        let Some(last) = status.last_fetch else {
            continue;
        };
        let seconds = measured
            .now
            .duration_since(last)
            .unwrap_or_default()
            .as_secs_f64();
        if named < MAX_REPO_LABELS && (measured.visible)(&status.repo) {
            named += 1;
            by_repo.insert(status.repo.to_string(), seconds);
        } else {
            let oldest = by_repo.entry("other".to_owned()).or_insert(seconds);
            *oldest = oldest.max(seconds);
        }
    }
    by_repo
}

fn stale_served(metrics: &Metrics, measured: &Measured<'_>) -> BTreeMap<String, u64> {
    let served = metrics.stale_served_by_repo();
    let mut by_repo = BTreeMap::new();
    let mut others = served.others;
    for (repo, count) in &served.repos {
        if (measured.visible)(repo) {
            by_repo.insert(repo.to_string(), *count);
        } else {
            others += count;
        }
    }
    if others > 0 {
        by_repo.insert("other".to_owned(), others);
    }
    by_repo
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::time::Duration;

    use axum::http::{Method, StatusCode};
    use futures_util::future::poll_immediate;
    use tokio::sync::watch;

    use super::*;
    use crate::config::Config;
    use crate::config::environment::Environment;
    use crate::git::exchange::work;
    use crate::git::pool::Pool;
    use crate::ops::metrics::{AnswerKind, FetchResult, Queue};

    fn repo(name: &str) -> RepoName {
        RepoName::parse(name).expect("a name")
    }

    fn status(name: &str, age: u64, warm: bool) -> RepoStatus {
        RepoStatus {
            repo: repo(name),
            state: "ready",
            refs: 1,
            objects: 2,
            bytes: 10,
            last_fetch: Some(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000 - age)),
            stale: false,
            error: None,
            warm,
        }
    }

    fn text(
        metrics: &Metrics,
        repos: &[RepoStatus],
        visible: &dyn Fn(&RepoName) -> bool,
    ) -> String {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let process = Process {
            resident_bytes: Some(4096),
            cpu_seconds: Some(1.5),
            open_fds: Some(7),
        };
        let storage = Storage::new(100);
        let _used = [(Part::Git, 22), (Part::Answers, 33)].map(|(part, n)| storage.count(part, n));
        render(
            metrics,
            &Measured {
                repos,
                storage: &storage,
                crates: &|registry| crate::crates::counters::Counters::new().register(registry),
                failing_registries: 1,
                process,
                now,
                visible,
            },
        )
    }

    #[track_caller]
    fn has(text: &str, lines: &[&str]) {
        for line in lines {
            assert!(
                text.lines().any(|found| found == *line),
                "expected `{line}` in\n{text}"
            );
        }
    }

    #[test]
    fn a_new_service_already_shows_what_it_counts() {
        let text = text(&Metrics::new(), &[], &|_| true);
        has(
            &text,
            &[
                concat!(
                    "warmdock_build_info{version=\"",
                    env!("CARGO_PKG_VERSION"),
                    "\"} 1"
                ),
                "warmdock_git_answers_total{kind=\"whole\"} 0",
                "warmdock_git_answer_bytes_total{kind=\"relayed\"} 0",
                "warmdock_git_fetches_total{result=\"failed\"} 0",
                "warmdock_git_queue_length{queue=\"first_clone\"} 0",
                "warmdock_git_queue_length{queue=\"fetch\"} 0",
                "warmdock_git_damaged_packs_total 0",
                "warmdock_git_mirrors_evicted_total 0",
                "warmdock_http_connections 0",
                // A first clone has no mirror yet, and takes room all the same.
                "warmdock_storage_bytes{part=\"git\"} 22",
                "warmdock_storage_bytes{part=\"index\"} 0",
                "warmdock_storage_limit_bytes 100",
                "process_resident_memory_bytes 4096",
                "process_cpu_seconds_total 1.5",
                "process_open_fds 7",
            ],
        );
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn what_is_counted_is_written() {
        let metrics = Metrics::new();
        metrics.http_request("/git/{*path}", &Method::POST, StatusCode::OK);
        metrics.http_request(
            "none",
            &Method::from_bytes(b"BREW").expect("a token"),
            StatusCode::NOT_FOUND,
        );
        metrics.http_response("/git/{*path}", Duration::from_millis(3), 17);
        metrics.answer(AnswerKind::Cached, 5);
        metrics.fetch(FetchResult::Unchanged, Duration::from_secs(1));
        metrics.damaged_pack();
        let waiting = [Queue::Pack, Queue::Pack, Queue::FirstClone].map(|at| metrics.queued(at));
        let connection = metrics.connection();
        drop(metrics.http_in_flight());
        has(
            &text(
                &metrics,
                &[status("h/a", 1, true), status("h/b", 1, true)],
                &|_| true,
            ),
            &[
                "warmdock_http_requests_total{route=\"/git/{*path}\",method=\"POST\",status=\"200\"} 1",
                "warmdock_http_requests_total{route=\"none\",method=\"other\",status=\"404\"} 1",
                "warmdock_http_response_bytes_total 17",
                "warmdock_http_requests_in_flight 0",
                "warmdock_http_connections 1",
                "warmdock_git_answers_total{kind=\"cached\"} 1",
                "warmdock_git_answer_bytes_total{kind=\"cached\"} 5",
                "warmdock_git_fetches_total{result=\"unchanged\"} 1",
                "warmdock_git_fetch_duration_seconds_count 1",
                "warmdock_git_damaged_packs_total 1",
                "warmdock_git_queue_length{queue=\"pack\"} 2",
                "warmdock_git_queue_length{queue=\"first_clone\"} 1",
                "warmdock_storage_bytes{part=\"answers\"} 33",
                "warmdock_git_mirrors 2",
            ],
        );
        drop((waiting, connection));
        has(
            &text(&metrics, &[], &|_| true),
            &[
                "warmdock_http_connections 0",
                "warmdock_git_queue_length{queue=\"first_clone\"} 0",
            ],
        );
    }

    #[tokio::test]
    async fn who_waits_for_a_thread_is_seen() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut config = Config::parse("{}", &Environment::default()).expect("the default");
        config.data_dir = folder.path().to_owned();
        let config = watch::channel(Arc::new(config)).1;
        let metrics = Arc::new(Metrics::new());
        let pool = Pool::start(config, metrics.clone()).expect("a pool");
        let waiting = |length: usize| {
            let line = format!("warmdock_git_queue_length{{queue=\"plan\"}} {length}");
            has(&text(&metrics, &[], &|_| true), &[&line]);
        };
        let threads = pool.planning();
        let all = threads.available_permits() as u32;
        let taken = Arc::clone(threads).acquire_many_owned(all).await;
        let mut request = pin!(work(&pool, || ()));
        assert!(poll_immediate(request.as_mut()).await.is_none());
        waiting(1);
        drop(taken);
        request.await.expect("its turn");
        waiting(0);
    }

    #[test]
    fn what_has_no_mirror_neither_counts_nor_ages() {
        let evicted = RepoStatus {
            last_fetch: None,
            ..status("h/evicted", 9, false)
        };
        let repos = [status("h/a", 1, false), evicted];
        let text = text(&Metrics::new(), &repos, &|_| true);
        has(&text, &["warmdock_git_mirrors 1"]);
        assert!(!text.contains("h/evicted"), "{text}");
    }

    #[test]
    fn repositories_that_may_not_be_read_are_not_named() {
        let metrics = Metrics::new();
        metrics.stale_served(&repo("h/open"));
        metrics.stale_served(&repo("h/secret"));
        metrics.stale_served(&repo("h/secret"));
        let repos = [
            status("h/open", 5, false),
            status("h/secret", 9, false),
            status("h/private", 7, true),
        ];
        let text = text(&metrics, &repos, &|repo| repo.path() == "open");
        has(
            &text,
            &[
                "warmdock_git_mirror_staleness_seconds{repo=\"h/open\"} 5.0",
                "warmdock_git_mirror_staleness_seconds{repo=\"other\"} 9.0",
                "warmdock_git_stale_served_total{repo=\"h/open\"} 1",
                "warmdock_git_stale_served_total{repo=\"other\"} 2",
            ],
        );
        assert!(
            !text.contains("secret") && !text.contains("private"),
            "{text}"
        );
    }

    #[test]
    fn the_number_of_repositories_with_a_label_is_limited_and_warm_ones_come_first() {
        let metrics = Metrics::new();
        let mut repos: Vec<_> = (0..1500)
            .map(|i| status(&format!("h/cold{i}"), 60 + i, false))
            .collect();
        repos.push(status("h/warm", 1, true));
        for repo in &repos {
            metrics.stale_served(&repo.repo);
        }
        let text = text(&metrics, &repos, &|_| true);
        let count = |prefix: &str| text.lines().filter(|line| line.starts_with(prefix)).count();
        assert_eq!(
            count("warmdock_git_mirror_staleness_seconds{"),
            MAX_REPO_LABELS + 1
        );
        assert_eq!(
            count("warmdock_git_stale_served_total{"),
            MAX_REPO_LABELS + 1
        );
        has(
            &text,
            &[
                "warmdock_git_mirror_staleness_seconds{repo=\"h/warm\"} 1.0",
                "warmdock_git_mirror_staleness_seconds{repo=\"other\"} 1559.0",
                "warmdock_git_stale_served_total{repo=\"other\"} 501",
            ],
        );
    }
}
