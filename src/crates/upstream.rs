//! Asking a registry: one request, with patience for each byte and our credentials where they belong.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, USER_AGENT};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use tokio::sync::Mutex;
use tokio::time::timeout;
use url::Url;

use super::counters::{Counters, Kind};
use super::name::{CrateFile, prefix};
use crate::breaker::Breaker;
use crate::config;
use crate::http_client::{self, AGENT};

/// How long a registry's own `config.json` counts. It changes every few years.
const CONFIG_AGE: Duration = Duration::from_secs(600);
/// Of a `config.json`.
const MOST_CONFIG: u64 = 64 << 10;

/// Why a registry did not answer as it should. The text reaches clients: hosts and statuses, never credentials.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Trouble {
    #[error("the registry has nothing there")]
    NotFound,
    #[error("{0}")]
    Failed(Arc<str>),
}

/// A registry as it is asked.
pub struct Upstream {
    client: Client,
    /// Of the index, ending in `/`.
    pub url: Url,
    token: Option<HeaderValue>,
    /// How long it may send nothing.
    pub idle: Duration,
    pub counters: Counters,
    /// Open while the index, or whoever has the files, takes requests and answers none: a build with hundreds of files
    /// that are not here is not to wait for each of them.
    hanging: [Breaker; 2],
    config: Mutex<Option<(tokio::time::Instant, Arc<UpstreamConfig>)>>,
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
    ) -> anyhow::Result<Self> {
        let token = registry.token.as_ref().map(|token| {
            // As cargo sends it: without a scheme.
            let mut value = HeaderValue::from_bytes(token.expose())?;
            value.set_sensitive(true);
            anyhow::Ok(value)
        });
        Ok(Self {
            client,
            url: registry.url.clone(),
            token: token.transpose()?,
            idle,
            counters,
            hanging: Default::default(),
            config: Mutex::default(),
        })
    }

    /// The name of the host, for messages.
    pub fn host(&self) -> &str {
        self.url.host_str().unwrap_or("the registry")
    }

    /// Asks the index.
    ///
    /// # Errors
    /// [`Trouble`] for whatever is neither 2xx nor 304.
    pub async fn index(&self, path: &str, headers: HeaderMap) -> Result<Response, Trouble> {
        let url = self
            .url
            .join(path)
            .map_err(|error| failed(format!("{path}: {error}")))?;
        self.get(url, headers, Kind::Index, true).await
    }

    /// Asks for a file, from the byte `from` on where the registry can do that.
    ///
    /// # Errors
    /// [`Trouble`].
    pub async fn file(&self, file: &CrateFile, from: u64) -> Result<Response, Trouble> {
        let config = self.config().await?;
        let url = config.file(file);
        let url = Url::parse(&url).map_err(|error| {
            failed(format!(
                "{}: expected a URL in `dl` of its config.json ({error})",
                self.host()
            ))
        })?;
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
        self.get(url, headers, Kind::File, with_token).await
    }

    async fn get(
        &self,
        url: Url,
        headers: HeaderMap,
        kind: Kind,
        with_token: bool,
    ) -> Result<Response, Trouble> {
        let host = url.host_str().unwrap_or_default().to_owned();
        let hanging = &self.hanging[kind as usize];
        if !hanging.allows() {
            return Err(failed(format!(
                "{host}: it answered nothing again and again, and is left alone for a moment"
            )));
        }
        let mut request = self
            .client
            .get(url)
            .headers(headers)
            .header(USER_AGENT, AGENT);
        if let Some(token) = self.token.as_ref().filter(|_| with_token) {
            request = request.header(AUTHORIZATION, token);
        }
        let answered = match timeout(self.idle, request.send()).await {
            Ok(Ok(response)) => {
                hanging.succeeded();
                self.judged(&host, response)
            }
            Ok(Err(error)) => {
                // Other errors come at once, and so does the next one.
                if error.is_timeout() {
                    hanging.failed();
                }
                Err(failed(format!("{host}: {}", http_client::describe(&error))))
            }
            Err(_) => {
                hanging.failed();
                Err(self.silent(&host))
            }
        };
        let ok = !matches!(answered, Err(Trouble::Failed(_)));
        self.counters.asked(kind, ok);
        answered
    }

    fn judged(&self, host: &str, response: Response) -> Result<Response, Trouble> {
        match response.status() {
            status if status.is_success() || status == StatusCode::NOT_MODIFIED => Ok(response),
            StatusCode::NOT_FOUND
            | StatusCode::GONE
            | StatusCode::UNAVAILABLE_FOR_LEGAL_REASONS => Err(Trouble::NotFound),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                let what = match self.token {
                    Some(_) => "the token in its token_file may not read this",
                    None => "does it need a token_file?",
                };
                Err(failed(format!("{host} answered {status}: {what}")))
            }
            status => Err(failed(format!("{host} answered {status}"))),
        }
    }

    /// The next piece of a body.
    ///
    /// # Errors
    /// [`Trouble::Failed`] also when nothing comes for too long.
    pub async fn chunk(&self, response: &mut Response) -> Result<Option<Bytes>, Trouble> {
        match timeout(self.idle, response.chunk()).await {
            Ok(Ok(chunk)) => {
                self.counters
                    .received(chunk.as_ref().map_or(0, |chunk| chunk.len() as u64));
                Ok(chunk)
            }
            Ok(Err(error)) => Err(failed(format!(
                "{}: {}",
                self.host(),
                http_client::describe(&error)
            ))),
            Err(_) => Err(self.silent(&response_host(response))),
        }
    }

    /// A whole body of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Upstream::chunk`], and for what is longer.
    pub async fn whole(&self, mut response: Response, limit: u64) -> Result<Bytes, Trouble> {
        let mut whole = BytesMut::new();
        while let Some(chunk) = self.chunk(&mut response).await? {
            if (whole.len() + chunk.len()) as u64 > limit {
                let host = response_host(&response);
                return Err(failed(format!(
                    "{host}: expected an answer of at most {limit} bytes"
                )));
            }
            whole.extend_from_slice(&chunk);
        }
        Ok(whole.freeze())
    }

    fn silent(&self, host: &str) -> Trouble {
        failed(format!(
            "{host}: it sent nothing for {}",
            humantime::format_duration(self.idle)
        ))
    }

    /// The registry's own `config.json`. One asks, the others wait for that.
    async fn config(&self) -> Result<Arc<UpstreamConfig>, Trouble> {
        let mut kept = self.config.lock().await;
        if let Some((read, config)) = &*kept
            && read.elapsed() < CONFIG_AGE
        {
            return Ok(Arc::clone(config));
        }
        match self.read_config().await {
            Ok(config) => {
                let config = Arc::new(config);
                *kept = Some((tokio::time::Instant::now(), Arc::clone(&config)));
                Ok(config)
            }
            // Files can be fetched as before.
            Err(trouble) => match &*kept {
                Some((_, config)) => Ok(Arc::clone(config)),
                None => Err(trouble),
            },
        }
    }

    async fn read_config(&self) -> Result<UpstreamConfig, Trouble> {
        let response = self.index("config.json", HeaderMap::new()).await;
        let response = response.map_err(|trouble| match trouble {
            Trouble::NotFound => failed(format!(
                "{}: there is no config.json: is crates.registries[].url the address of a sparse index?",
                self.host()
            )),
            other => other,
        })?;
        let text = self.whole(response, MOST_CONFIG).await?;
        serde_json::from_slice(&text).map_err(|error| {
            failed(format!(
                "{}: expected the config.json of a sparse index ({error})",
                self.host()
            ))
        })
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

fn response_host(response: &Response) -> String {
    response.url().host_str().unwrap_or_default().to_owned()
}

pub(super) fn failed(text: String) -> Trouble {
    Trouble::Failed(text.into())
}

#[cfg(test)]
mod tests {
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
}
