//! Upstreams over `https` and `http`: gix's Git client for what is mirrored, and the bare HTTP exchange for what is
//! passed through while a first clone is under way.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gix_transport::client::blocking_io::http::Transport;
use reqwest::StatusCode;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER, USER_AGENT};

use super::client::{self, AGENT};
use super::ending::{Ending, Endings};
use super::health::Health;
use super::patience::Patience;
use super::transport::{Blocking, Failure};
use super::{FetchJob, Fetched, UpstreamError};
use crate::breaker::PAUSE;
use crate::config::{self, UpstreamAuth};
use crate::http_client::{self, Bundle, Redirects};

/// A host that speaks smart HTTP.
pub struct HttpUpstream {
    /// As configured, which clients know it by.
    host: String,
    base: url::Url,
    client: reqwest::Client,
    /// What the client was made from.
    bundle: Option<Bundle>,
    headers: HeaderMap,
    has_token: bool,
    idle: Duration,
    health: Arc<Health>,
    endings: Endings,
    /// What its `fetch` can do in version 2, as it last told a client.
    features: Mutex<Vec<u8>>,
    /// Until when it is left alone since it was asked too often, and how it said so.
    too_often: Mutex<Option<(Instant, StatusCode)>>,
}

/// A host that was asked too often is left alone for as long as it says, within these bounds: asked at once it would
/// refuse again, and a quota that is used up for an hour may be raised.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

impl HttpUpstream {
    pub(super) fn new(
        upstream: &config::Upstream,
        idle: Duration,
        health: Arc<Health>,
    ) -> anyhow::Result<Self> {
        // Before it is read: one that changes meanwhile is read again.
        let bundle = http_client::bundle();
        let client = http_client::client(Redirects::SameOrigin)?;
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        if let Some(token) = &upstream.token {
            headers.insert(AUTHORIZATION, authorization(upstream, token.expose())?);
        }
        Ok(Self {
            host: upstream.host.clone(),
            base: upstream.url.clone(),
            client,
            bundle,
            headers,
            has_token: upstream.token.is_some(),
            idle,
            health,
            endings: Endings::default(),
            features: Mutex::default(),
            too_often: Mutex::default(),
        })
    }

    /// The URL of a repository.
    fn repository(&self, path: &str, ending: Ending) -> String {
        let base = self.base.as_str().trim_end_matches('/');
        format!("{base}/{path}{}", ending.text())
    }

    /// The ends that the path of a repository may have, the likeliest first: where there is none by that, the other one is
    /// to be tried.
    pub fn endings(&self, path: &str) -> [Ending; 2] {
        self.endings.in_order(path)
    }

    /// There was a repository by this.
    pub fn found(&self, path: &str, ending: Ending) {
        self.endings.found(path, ending);
    }

    /// It told a client of these features of `fetch`, with spaces between them.
    pub fn told_features(&self, features: &[u8]) {
        *self.features() = features.to_vec();
    }

    /// Whether it is known to have one.
    pub fn has_feature(&self, name: &str) -> bool {
        let features = self.features();
        features
            .split(|byte| *byte == b' ')
            .any(|feature| feature == name.as_bytes())
    }

    fn features(&self) -> MutexGuard<'_, Vec<u8>> {
        self.features.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request below the repository's URL, with our credentials and without the client's.
    pub fn request(
        &self,
        method: reqwest::Method,
        path: &str,
        ending: Ending,
        tail: &str,
    ) -> reqwest::RequestBuilder {
        let url = format!("{}/{tail}", self.repository(path, ending));
        self.client
            .request(method, url)
            .headers(self.headers.clone())
    }

    /// How long the upstream may send nothing.
    pub fn idle(&self) -> Duration {
        self.idle
    }

    /// Whether `other` asks in the same way. Both tokens are ours: that takes whatever time it likes.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        self.base == other.base
            && self.headers == other.headers
            && self.idle == other.idle
            && self.bundle == other.bundle
    }

    /// What it means that the upstream answers with `status`.
    pub fn refusal(&self, status: StatusCode, headers: &HeaderMap) -> UpstreamError {
        match status {
            StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS
                if status == StatusCode::TOO_MANY_REQUESTS || is_rate_limit(headers) =>
            {
                let until = Instant::now() + pause(headers, SystemTime::now());
                let mut said = self.too_often();
                // Of several answers the longest pause holds.
                let until = said.map_or(until, |(before, _)| before.max(until));
                *said = Some((until, status));
                self.left_alone(until, status)
            }
            StatusCode::NOT_FOUND
            | StatusCode::GONE
            | StatusCode::UNAVAILABLE_FOR_LEGAL_REASONS => UpstreamError::NotFound,
            // Hosts answer so for repositories that do not exist, to those whom they do not know.
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !self.has_token => {
                UpstreamError::NotFound
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => UpstreamError::Failed(format!(
                "{} answered {status}: the token in its token_file may not read this repository",
                self.name()
            )),
            _ => UpstreamError::Failed(format!("{} answered {status}", self.name())),
        }
    }

    /// Why it is not to be asked now, where it said that it was asked too often.
    pub fn asked_too_often(&self) -> Option<UpstreamError> {
        let (until, status) = (*self.too_often())?;
        (Instant::now() < until).then(|| self.left_alone(until, status))
    }

    fn left_alone(&self, until: Instant, status: StatusCode) -> UpstreamError {
        UpstreamError::AskedTooOften {
            host: self.host.clone(),
            status,
            until,
        }
    }

    fn too_often(&self) -> MutexGuard<'_, Option<(Instant, StatusCode)>> {
        self.too_often
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The host, for messages.
    pub fn name(&self) -> &str {
        &self.host
    }

    pub(super) fn fetch(
        &self,
        path: &str,
        namespaces: &[String],
        mut job: FetchJob<'_>,
    ) -> Result<Fetched, UpstreamError> {
        self.endings.ask(path, |ending| {
            self.fetch_by(&self.repository(path, ending), namespaces, job.again())
        })
    }

    fn fetch_by(
        &self,
        url: &str,
        namespaces: &[String],
        job: FetchJob<'_>,
    ) -> Result<Fetched, UpstreamError> {
        if let Some(error) = self.asked_too_often() {
            return Err(error);
        }
        let http = Blocking::new(
            self.client.clone(),
            self.headers.clone(),
            Patience::new(self.idle, Arc::clone(job.stop)),
            Arc::clone(&self.health),
        );
        let failure = Arc::clone(&http.failure);
        let stop = Arc::clone(job.stop);
        fetch_over(http, url, namespaces, job).map_err(|error| {
            let seen = failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            match (error, seen) {
                (UpstreamError::Failed(_), _) if stop.load(Ordering::Relaxed) => {
                    UpstreamError::Stopped
                }
                (_, Some(Failure::Status(status, headers))) => self.refusal(status, &headers),
                (UpstreamError::Failed(_), Some(Failure::Transport(what)))
                | (UpstreamError::Failed(what), None) => {
                    UpstreamError::Failed(format!("{}: {what}", self.name()))
                }
                (other, _) => other,
            }
        })
    }
}

fn fetch_over(
    http: Blocking,
    url: &str,
    namespaces: &[String],
    job: FetchJob<'_>,
) -> Result<Fetched, UpstreamError> {
    let url = gix_url::parse(url).map_err(client::failed)?;
    let patience = http.patience.clone();
    let transport = Transport::new_http(http, url, gix_transport::Protocol::V2, false);
    client::fetch(transport, &patience, namespaces, job)
}

/// GitHub says with either of these that it was asked too often, also where the status is 403.
fn is_rate_limit(headers: &HeaderMap) -> bool {
    let left = headers.get("x-ratelimit-remaining");
    headers.contains_key(RETRY_AFTER) || left.is_some_and(|left| left == "0")
}

/// How long a host that was asked too often is left alone: as `Retry-After` says, in seconds or by a date (RFC 9110,
/// 10.2.3), else, where nothing is left of a quota, until GitHub's `x-ratelimit-reset`, a Unix time in seconds. [`PAUSE`]
/// where it says neither.
fn pause(headers: &HeaderMap, now: SystemTime) -> Duration {
    let said = |name: &str| headers.get(name)?.to_str().ok();
    let seconds = |text: &str| text.parse().ok().map(Duration::from_secs);
    let date = |text: &str| httpdate::parse_http_date(text).ok();
    let until = |time: SystemTime| time.duration_since(now).ok();
    let asked = said(RETRY_AFTER.as_str())
        .and_then(|text| seconds(text).or_else(|| Some(until(date(text)?).unwrap_or_default())));
    let is_used_up = said("x-ratelimit-remaining").is_none_or(|left| left == "0");
    let reset = said("x-ratelimit-reset").filter(|_| is_used_up);
    asked
        .or_else(|| until(UNIX_EPOCH.checked_add(seconds(reset?)?)?))
        .unwrap_or(PAUSE)
        .clamp(SHORTEST_PAUSE, LONGEST_PAUSE)
}

fn authorization(upstream: &config::Upstream, token: &[u8]) -> anyhow::Result<HeaderValue> {
    let value = match upstream.auth {
        UpstreamAuth::Bearer => [b"Bearer ", token].concat(),
        UpstreamAuth::Basic => {
            let pair = [upstream.user.as_bytes(), b":", token].concat();
            format!("Basic {}", STANDARD.encode(pair)).into_bytes()
        }
    };
    let mut value = HeaderValue::from_bytes(&value)
        .context("the token has bytes that HTTP headers cannot carry")?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderName;

    use super::*;

    #[test]
    fn a_host_says_for_how_long_it_is_left_alone() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777); // 1994-11-06T08:49:37Z
        let pause = |lines: &[(&'static str, &'static str)]| {
            let headers: HeaderMap = lines
                .iter()
                .map(|&(name, value)| {
                    (
                        HeaderName::from_static(name),
                        HeaderValue::from_static(value),
                    )
                })
                .collect();
            super::pause(&headers, now).as_secs()
        };
        for (said, expected) in [
            ("60", 60),
            ("0", 1),
            ("86400", 300),
            ("Sun, 06 Nov 1994 08:50:37 GMT", 60),
            ("Mon, 07 Nov 1994 08:49:37 GMT", 300),
            ("Sun, 06 Nov 1994 08:49:00 GMT", 1),
            ("Sun, 06 Nov 1994 08:50:37 CET", 15),
            ("Sun, 06 Nev 1994 08:50:37 GMT", 15),
            ("Sun, 36 Nov 1994 08:50:37 GMT", 15),
            ("99999999999999999999", 15),
            ("soon", 15),
            ("", 15),
        ] {
            assert_eq!(pause(&[("retry-after", said)]), expected, "{said}");
        }
        let reset = |time| ("x-ratelimit-reset", time);
        assert_eq!(pause(&[reset("784111837")]), 60);
        assert_eq!(pause(&[reset("9223372036854775807")]), 300);
        assert_eq!(pause(&[reset("784111000")]), 15, "a clock is wrong");
        assert_eq!(pause(&[reset("784111837"), ("retry-after", "30")]), 30);
        assert_eq!(pause(&[reset("784111837"), ("retry-after", "soon")]), 60);
        let left = |left| ("x-ratelimit-remaining", left);
        assert_eq!(pause(&[left("0")]), 15);
        assert_eq!(pause(&[left("0"), reset("784111837")]), 60);
        assert_eq!(pause(&[left("3"), reset("784111837")]), 15);
    }
}
