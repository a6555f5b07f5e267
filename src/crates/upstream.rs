//! Asking a registry: one request, with patience for each byte and our credentials where they belong.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, USER_AGENT};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use tokio::time::timeout;
use url::Url;

use super::counters::{Counters, Kind};
use super::name::{CrateFile, prefix};
use crate::breaker::Breaker;
use crate::config::{self, WhenUpstreamFails};
use crate::http_client::{self, AGENT};
use crate::server::body::Progress;

/// How long a registry's own `config.json` counts. It changes every few years.
const CONFIG_AGE: Duration = Duration::from_secs(600);
/// How long nobody asks for it again after that failed.
const CONFIG_PAUSE: Duration = Duration::from_secs(30);
/// Of a `config.json`.
const MOST_CONFIG: u64 = 64 << 10;
/// How many hosts one question is sent on to. Usual is one, with signed addresses.
const MOST_HOSTS: usize = 5;

/// Why a registry did not answer as it should. The text reaches clients: hosts and statuses, never credentials.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Trouble {
    #[error("the registry has nothing there")]
    NotFound,
    #[error("{0}")]
    Failed(Arc<str>),
}

/// A question that got no answer to use, and what that says of the registry.
#[derive(Debug)]
pub enum NoAnswer {
    /// The registry is ill: it cannot be reached, falls silent, says so itself, or does not know us any more.
    Ill(Trouble),
    /// It answers: what is wrong here says nothing of its other crates.
    OfThis(Trouble),
}

impl NoAnswer {
    pub fn trouble(self) -> Trouble {
        match self {
            Self::Ill(trouble) | Self::OfThis(trouble) => trouble,
        }
    }
}

/// A registry as it is asked. Clones share what they learn.
#[derive(Clone)]
pub struct Upstream {
    /// Replaced when the CA certificates are other ones.
    client: Arc<Mutex<Client>>,
    /// Of the index, ending in `/`.
    pub url: Url,
    token: Option<HeaderValue>,
    /// How long it may send nothing.
    pub idle: Duration,
    pub counters: Counters,
    /// Open while the index, or whoever has the files, takes requests and answers none: a build with hundreds of files
    /// that are not here is not to wait for each of them.
    hanging: Arc<[Breaker; 2]>,
    /// Of what the index says, its `config.json` as well.
    when_it_fails: WhenUpstreamFails,
    config: Arc<KeptConfig>,
}

/// An answer whose body is on its way.
pub struct Body {
    response: Response,
    /// In bytes, where the registry has said it.
    pub length: Option<u64>,
    progress: Progress,
}

/// A registry's `config.json` as it was last read.
#[derive(Default)]
struct KeptConfig {
    /// With the moment from which on it is to be read anew.
    kept: Mutex<Option<(Arc<UpstreamConfig>, Instant)>>,
    /// Held by who reads one that the others need; and why that failed last.
    first: tokio::sync::Mutex<Option<(Instant, Trouble)>>,
}

/// What a registry says of itself (<https://doc.rust-lang.org/cargo/reference/registry-index.html>).
#[derive(Debug, Deserialize)]
pub struct UpstreamConfig {
    dl: String,
    #[serde(default, rename = "auth-required")]
    auth_required: bool,
}

impl Upstream {
    /// # Errors
    /// A token that no header can carry.
    pub fn new(
        registry: &config::Registry,
        client: Client,
        idle: Duration,
        counters: Counters,
        when_it_fails: WhenUpstreamFails,
    ) -> anyhow::Result<Self> {
        let token = registry.token.as_ref().map(|token| {
            // As cargo sends it: with no scheme but one that is in it.
            let mut value = HeaderValue::from_bytes(token.expose())?;
            value.set_sensitive(true);
            anyhow::Ok(value)
        });
        Ok(Self {
            client: Arc::new(Mutex::new(client)),
            url: registry.url.clone(),
            token: token.transpose()?,
            idle,
            counters,
            hanging: Default::default(),
            when_it_fails,
            config: Arc::default(),
        })
    }

    /// Whether `other` asks the same registry in the same way. Both tokens are ours: that takes whatever time it likes.
    pub fn is_same(&self, other: &Self) -> bool {
        self.url == other.url
            && self.token == other.token
            && self.idle == other.idle
            && self.when_it_fails == other.when_it_fails
    }

    /// Asks with this client from now on. What is on its way comes by the one that asked for it.
    pub fn ask_with(&self, client: Client) {
        *self.client() = client;
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of the host, for messages.
    pub fn host(&self) -> &str {
        self.url.host_str().unwrap_or("the registry")
    }

    /// Asks the index.
    ///
    /// # Errors
    /// [`NoAnswer`] for whatever is neither 2xx nor 304.
    pub async fn index(&self, path: &str, headers: HeaderMap) -> Result<Response, NoAnswer> {
        let url = self
            .url
            .join(path)
            .map_err(|error| NoAnswer::OfThis(failed(format!("{path}: {error}"))))?;
        self.get(url, headers, Kind::Index, true).await
    }

    /// Asks for a file, from the byte `from` on where the registry can do that.
    ///
    /// # Errors
    /// [`Trouble`].
    pub async fn file(&self, file: &CrateFile, from: u64) -> Result<Body, Trouble> {
        let config = self.config().await?;
        let url = config.file(file);
        let url = Url::parse(&url).map_err(|error| {
            failed(format!(
                "{}: expected a URL in `dl` of its config.json ({error})",
                self.host()
            ))
        })?;
        // SECURITY: as with redirects, `dl` leads neither our token nor what it opens from https to http.
        if self.token.is_some() && !stays_https(&self.url, &url) {
            return Err(failed(format!(
                "{}: expected https in `dl` of its config.json, as its index has https and a token_file, found {}: \
                 have the registry name an address with https there",
                self.host(),
                url.origin().ascii_serialization()
            )));
        }
        let mut headers = HeaderMap::new();
        if from > 0 {
            let range = format!("bytes={from}-");
            headers.extend(
                HeaderValue::from_str(&range)
                    .ok()
                    .map(|range| (reqwest::header::RANGE, range)),
            );
        }
        // SECURITY: the token goes to the index's own origin, and elsewhere only where the registry itself says that
        // its files want it, which is what cargo does.
        let with_token = config.auth_required || url.origin() == self.url.origin();
        let answered = self.get(url, headers, Kind::File, with_token).await;
        answered.map(Body::of).map_err(NoAnswer::trouble)
    }

    async fn get(
        &self,
        url: Url,
        headers: HeaderMap,
        kind: Kind,
        with_token: bool,
    ) -> Result<Response, NoAnswer> {
        let host = url.host_str().unwrap_or_default().to_owned();
        let hanging = &self.hanging[kind as usize];
        if !hanging.allows() {
            return Err(NoAnswer::Ill(failed(format!(
                "{host}: it answered nothing again and again, and is left alone for a moment"
            ))));
        }
        let answered = match timeout(self.idle, self.send(url, headers, with_token)).await {
            Ok(Ok(response)) => {
                hanging.succeeded();
                self.judged(&host, response)
            }
            Ok(Err(error)) => {
                // Other errors come at once, and so does the next one.
                if error.is_timeout() {
                    hanging.failed();
                }
                let trouble = failed(format!("{host}: {}", http_client::describe(&error)));
                // A redirect that is not followed is an answer.
                Err(if error.is_redirect() {
                    NoAnswer::OfThis(trouble)
                } else {
                    NoAnswer::Ill(trouble)
                })
            }
            Err(_) => {
                hanging.failed();
                Err(NoAnswer::Ill(self.silent(&host)))
            }
        };
        let ok = matches!(answered, Ok(_) | Err(NoAnswer::OfThis(Trouble::NotFound)));
        self.counters.asked(kind, ok);
        answered
    }

    /// SECURITY: the token goes to no other origin that redirects lead to. reqwest takes it off on the way there, and
    /// puts it on again for the next redirect at that host; so the client stops before it, and a request of its own
    /// goes on.
    async fn send(
        &self,
        url: Url,
        headers: HeaderMap,
        with_token: bool,
    ) -> reqwest::Result<Response> {
        let ask = |url: Url| {
            let request = self.client().get(url).headers(headers.clone());
            request.header(USER_AGENT, AGENT)
        };
        let mut request = ask(url);
        if let Some(token) = self.token.as_ref().filter(|_| with_token) {
            request = request.header(AUTHORIZATION, token);
        }
        let mut response = request.send().await?;
        for _ in 0..MOST_HOSTS {
            let Some(url) = elsewhere(&response) else {
                break;
            };
            response = ask(url).send().await?;
        }
        Ok(response)
    }

    fn judged(&self, host: &str, response: Response) -> Result<Response, NoAnswer> {
        let of_this = |text: String| Err(NoAnswer::OfThis(failed(text)));
        match response.status() {
            status if status.is_success() || status == StatusCode::NOT_MODIFIED => Ok(response),
            StatusCode::NOT_FOUND
            | StatusCode::GONE
            | StatusCode::UNAVAILABLE_FOR_LEGAL_REASONS => Err(NoAnswer::OfThis(Trouble::NotFound)),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                let what = match self.token {
                    Some(_) => "the token in its token_file may not read this",
                    None => "does it need a token_file?",
                };
                let text = format!("{host} answered {status}: {what}");
                if status == StatusCode::UNAUTHORIZED {
                    // About us, and so about all crates.
                    Err(NoAnswer::Ill(failed(text)))
                } else {
                    // Also what stores of objects answer for one that is missing.
                    of_this(text)
                }
            }
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                Err(NoAnswer::Ill(failed(format!("{host} answered {status}"))))
            }
            status => of_this(format!("{host} answered {status}")),
        }
    }

    /// The next piece of a body.
    ///
    /// # Errors
    /// [`Trouble::Failed`] also when nothing comes for too long, or next to nothing: a body that dribbles would hold its
    /// place among the downloads for days.
    pub async fn chunk(&self, body: &mut Body) -> Result<Option<Bytes>, Trouble> {
        let begin = Instant::now();
        let left = body.progress.left(self.idle);
        match timeout(left, body.response.chunk()).await {
            Ok(Ok(chunk)) => {
                let length = chunk.as_ref().map_or(0, Bytes::len);
                self.counters.received(length as u64);
                body.progress.arrived(length, begin.elapsed());
                Ok(chunk)
            }
            Ok(Err(error)) => Err(failed(format!(
                "{}: {}",
                self.host(),
                http_client::describe(&error)
            ))),
            Err(_) => Err(self.silent(&body.host())),
        }
    }

    /// A whole body of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Upstream::chunk`], and for what is longer.
    pub async fn whole(&self, response: Response, limit: u64) -> Result<Bytes, NoAnswer> {
        let mut body = Body::of(response);
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.chunk(&mut body).await.map_err(NoAnswer::Ill)? {
            if (whole.len() + chunk.len()) as u64 > limit {
                let host = body.host();
                return Err(NoAnswer::OfThis(failed(format!(
                    "{host}: expected an answer of at most {limit} bytes"
                ))));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }

    fn silent(&self, host: &str) -> Trouble {
        failed(format!(
            "{host}: it sent nothing, or next to nothing, for {}",
            humantime::format_duration(self.idle)
        ))
    }

    /// The registry's own `config.json`. Where there is none that may serve, one asks, and the others wait for that.
    async fn config(&self) -> Result<Arc<UpstreamConfig>, Trouble> {
        if let Some(config) = self.known_config() {
            return Ok(config);
        }
        let came = Instant::now();
        let mut failed = self.config.first.lock().await;
        if let Some(config) = self.known_config() {
            return Ok(config);
        }
        // Whoever waited for somebody's attempt has its answer.
        if let Some((when, trouble)) = &*failed
            && *when >= came
        {
            return Err(trouble.clone());
        }
        match self.read_config().await {
            Ok(config) => Ok(self.config.keep(config, Instant::now())),
            Err(trouble) => {
                *failed = Some((Instant::now(), trouble.clone()));
                Err(trouble)
            }
        }
    }

    /// The one that was read last. An old one serves while it is read anew, unless the operator prefers an error: where
    /// files are hardly ever changes, and they can be fetched also while the index hangs.
    fn known_config(&self) -> Option<Arc<UpstreamConfig>> {
        let (config, is_due) = self.config.known(Instant::now(), self.when_it_fails)?;
        if is_due {
            let upstream = self.clone();
            tokio::spawn(async move {
                match upstream.read_config().await {
                    Ok(config) => {
                        upstream.config.keep(config, Instant::now());
                    }
                    Err(trouble) => {
                        upstream.config.failed(Instant::now());
                        tracing::warn!(
                            registry = upstream.host(), error = %trouble,
                            "the registry's config.json cannot be read anew: the old one serves"
                        );
                    }
                }
            });
        }
        Some(config)
    }

    async fn read_config(&self) -> Result<UpstreamConfig, Trouble> {
        let response = self.index("config.json", HeaderMap::new()).await;
        let response = response.map_err(|no_answer| match no_answer.trouble() {
            Trouble::NotFound => failed(format!(
                "{}: there is no config.json: is crates.registries[].url the address of a sparse index?",
                self.host()
            )),
            other => other,
        })?;
        let text = self.whole(response, MOST_CONFIG).await;
        let text = text.map_err(NoAnswer::trouble)?;
        serde_json::from_slice(&text).map_err(|error| {
            failed(format!(
                "{}: expected the config.json of a sparse index ({error})",
                self.host()
            ))
        })
    }
}

impl Body {
    fn of(response: Response) -> Self {
        Self {
            length: response.content_length(),
            response,
            progress: Progress::default(),
        }
    }

    /// It is what was missing, and not all of it once more.
    pub fn is_rest(&self) -> bool {
        self.response.status() == StatusCode::PARTIAL_CONTENT
    }

    fn host(&self) -> String {
        let host = self.response.url().host_str();
        host.unwrap_or_default().to_owned()
    }
}

impl KeptConfig {
    /// What is known, and whether it is the caller who reads it anew. An old one only where that may serve, and then
    /// however old it is.
    fn known(
        &self,
        now: Instant,
        when_it_fails: WhenUpstreamFails,
    ) -> Option<(Arc<UpstreamConfig>, bool)> {
        let mut kept = self.kept();
        let (config, due) = kept.as_mut()?;
        let is_due = *due <= now;
        if is_due && when_it_fails == WhenUpstreamFails::Fail {
            return None;
        }
        if is_due {
            // One reads, and this is over long before it is due once more.
            *due = now + CONFIG_AGE;
        }
        Some((Arc::clone(config), is_due))
    }

    fn keep(&self, config: UpstreamConfig, now: Instant) -> Arc<UpstreamConfig> {
        let config = Arc::new(config);
        *self.kept() = Some((Arc::clone(&config), now + CONFIG_AGE));
        config
    }

    /// It could not be read anew.
    fn failed(&self, now: Instant) {
        if let Some((_, due)) = &mut *self.kept() {
            *due = now + CONFIG_PAUSE;
        }
    }

    fn kept(&self) -> MutexGuard<'_, Option<(Arc<UpstreamConfig>, Instant)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl UpstreamConfig {
    /// Where a file is, by cargo's rules.
    fn file(&self, file: &CrateFile) -> String {
        let markers = [
            ("{crate}", file.name.to_string()),
            ("{version}", file.version.to_string()),
            ("{prefix}", prefix(&file.name)),
            ("{lowerprefix}", prefix(&file.name.to_ascii_lowercase())),
            ("{sha256-checksum}", file.digest.to_string()),
        ];
        if !markers.iter().any(|(marker, _)| self.dl.contains(marker)) {
            return format!("{}/{}/{}/download", self.dl, file.name, file.version);
        }
        let replace = |url: String, (marker, value): &(&str, String)| url.replace(marker, value);
        markers.iter().fold(self.dl.clone(), replace)
    }
}

/// Whether the way from an index to a file, or on from there, does not leave https.
fn stays_https(from: &Url, to: &Url) -> bool {
    from.scheme() != "https" || to.scheme() == "https"
}

/// Where a redirect leads that the client does not follow: to another origin.
fn elsewhere(response: &Response) -> Option<Url> {
    let (status, here) = (response.status(), response.url());
    let location = response.headers().get(LOCATION)?.to_str().ok()?;
    let there = here.join(location).ok()?;
    let leads_on = status.is_redirection() && there.origin() != here.origin();
    (leads_on && stays_https(here, &there)).then_some(there)
}

pub(super) fn failed(text: String) -> Trouble {
    Trouble::Failed(text.into())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn addresses_of_files_follow_the_markers() {
        let sha = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let file = CrateFile::parse("MyCrate", "1.0.0+x", sha).unwrap();
        let table = [
            (
                "https://x/dl",
                "https://x/dl/MyCrate/1.0.0+x/download".to_owned(),
            ),
            (
                "https://x/{crate}-{version}.crate",
                "https://x/MyCrate-1.0.0+x.crate".into(),
            ),
            (
                "https://x/{prefix}/{lowerprefix}",
                "https://x/My/Cr/my/cr".into(),
            ),
            ("https://x/{sha256-checksum}", format!("https://x/{sha}")),
        ];
        for (dl, expected) in table {
            let config = UpstreamConfig {
                dl: dl.into(),
                auth_required: false,
            };
            assert_eq!(config.file(&file), expected);
        }
    }

    #[test]
    fn an_old_config_serves_while_one_reads_it_anew() {
        let (kept, begin) = (KeptConfig::default(), Instant::now());
        let keep = |dl: &str, now: Instant| {
            let config = UpstreamConfig {
                dl: dl.into(),
                auth_required: false,
            };
            kept.keep(config, now);
        };
        let known = |now: Instant| {
            let (config, is_due) = kept.known(now, WhenUpstreamFails::ServeStale).unwrap();
            (config.dl.clone(), is_due)
        };
        assert!(kept.known(begin, WhenUpstreamFails::ServeStale).is_none());
        keep("old", begin);
        assert_eq!(known(begin), ("old".to_owned(), false));
        let old = begin + CONFIG_AGE;
        assert_eq!(known(old), ("old".to_owned(), true));
        assert_eq!(known(old), ("old".to_owned(), false), "one alone");
        kept.failed(old);
        assert_eq!(known(old), ("old".to_owned(), false), "not at once");
        let later = old + CONFIG_PAUSE;
        assert_eq!(known(later), ("old".to_owned(), true));
        keep("new", later);
        assert_eq!(known(later), ("new".to_owned(), false));
        assert_eq!(known(later + CONFIG_AGE), ("new".to_owned(), true));
    }

    /// A registry that answers one question, with `answer`, and is gone then.
    async fn answering_once(answer: &'static str, when_it_fails: WhenUpstreamFails) -> Upstream {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let client = Client::builder().no_proxy().tls_certs_only([]);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            drop(listener);
            let mut question = [0; 4096];
            assert!(stream.read(&mut question).await.unwrap() > 0);
            let length = answer.len();
            let head =
                format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        });
        let registry = config::Registry {
            name: "corp".into(),
            url: Url::parse(&url).unwrap(),
            token_file: None,
            token: None,
        };
        let (client, idle) = (client.build().unwrap(), Duration::from_secs(30));
        Upstream::new(&registry, client, idle, Counters::new(), when_it_fails).unwrap()
    }

    #[tokio::test]
    async fn an_old_config_does_not_serve_who_prefers_an_error() {
        for (when_it_fails, first) in [
            (WhenUpstreamFails::ServeStale, "old"),
            (WhenUpstreamFails::Fail, "new"),
        ] {
            let upstream = answering_once("{\"dl\":\"new\"}", when_it_fails).await;
            let kept = &upstream.config;
            let old = UpstreamConfig {
                dl: "old".into(),
                auth_required: false,
            };
            kept.keep(old, Instant::now());
            assert_eq!(upstream.config().await.unwrap().dl, "old", "it is young");
            let grow_old = || kept.kept().as_mut().unwrap().1 = Instant::now();
            grow_old();
            assert_eq!(upstream.config().await.unwrap().dl, first);
            // Read anew in the background, where it was not yet.
            timeout(upstream.idle, async {
                while upstream.config().await.unwrap().dl != "new" {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await
            .unwrap();
            grow_old();
            let without_registry = upstream.config().await;
            let may_serve = when_it_fails == WhenUpstreamFails::ServeStale;
            assert_eq!(without_registry.is_ok(), may_serve, "{when_it_fails:?}");
        }
    }

    #[test]
    fn files_of_an_index_at_https_are_at_https() {
        for (index, file, expected) in [
            ("https://index.test/", "https://files.test/a", true),
            ("https://index.test/", "http://index.test/a", false),
            ("https://index.test/", "http://files.test/a", false),
            ("http://index.test/", "http://files.test/a", true),
            ("http://index.test/", "https://files.test/a", true),
        ] {
            let url = |text: &str| Url::parse(text).unwrap();
            assert_eq!(
                stays_https(&url(index), &url(file)),
                expected,
                "{index} {file}"
            );
        }
    }
}
