//! HTTP for gix's Git client: its [`Http`] trait over our asynchronous client, so that both our own fetches and what
//! is passed through share connections, timeouts, certificates and the rule for redirects.

use std::io::{self, BufRead, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf, Bytes};
use gix_error::{ErrorExt, Result, message};
use gix_transport::client::blocking_io::http::{GetResponse, Http, PostBodyDataKind, PostResponse};

use super::health::Health;
use super::patience::Patience;
use crate::http_client::describe;

/// Blocks the calling thread, which must not be an async worker.
pub(super) struct Blocking {
    client: reqwest::Client,
    headers: reqwest::header::HeaderMap,
    pub patience: Patience,
    health: Arc<Health>,
    /// Where the last GET ended up, without what was asked below it.
    redirected: Option<String>,
    /// The first thing that went wrong, in our own words.
    pub failure: Arc<Mutex<Option<Failure>>>,
}

/// What the upstream did instead of answering.
#[derive(Debug, Clone)]
pub(super) enum Failure {
    Status(reqwest::StatusCode, reqwest::header::HeaderMap),
    Transport(String),
}

impl Blocking {
    /// `headers` go with every request: who we are, and our credentials. `patience` bounds the wait for each byte.
    pub fn new(
        client: reqwest::Client,
        headers: reqwest::header::HeaderMap,
        patience: Patience,
        health: Arc<Health>,
    ) -> Self {
        Self {
            client,
            headers,
            patience,
            health,
            redirected: None,
            failure: Arc::default(),
        }
    }

    fn request(
        &self,
        method: reqwest::Method,
        url: &str,
        headers: impl IntoIterator<Item = impl AsRef<str>>,
    ) -> reqwest::RequestBuilder {
        let mut request = self.client.request(method, url);
        for header in headers {
            // Ours says more about who asks.
            if let Some((name, value)) = header.as_ref().split_once(':')
                && !name.eq_ignore_ascii_case("user-agent")
            {
                request = request.header(name.trim(), value.trim());
            }
        }
        request.headers(self.headers.clone())
    }

    fn exchange(&self, request: reqwest::RequestBuilder) -> Arc<Mutex<Exchange>> {
        Arc::new(Mutex::new(Exchange {
            request: Some(request),
            body: Vec::new(),
            response: None,
            chunk: Bytes::new(),
            patience: self.patience.clone(),
            health: Arc::clone(&self.health),
            failure: Arc::clone(&self.failure),
        }))
    }
}

impl Http for Blocking {
    type Headers = Headers;
    type ResponseBody = io::BufReader<Body>;
    type PostBody = PostBody;

    fn get(
        &mut self,
        url: &str,
        base_url: &str,
        headers: impl IntoIterator<Item = impl AsRef<str>>,
    ) -> Result<GetResponse<Headers, io::BufReader<Body>>> {
        let exchange = self.exchange(self.request(reqwest::Method::GET, url, headers));
        {
            let mut open = lock(&exchange);
            open.send().map_err(|error| message!("{error}").raise())?;
            let tail = url.strip_prefix(base_url).unwrap_or_default();
            let actual = open
                .response
                .as_ref()
                .map(|response| response.url().as_str().to_owned());
            self.redirected =
                actual.and_then(|actual| actual.strip_suffix(tail).map(str::to_owned));
        }
        let headers = Headers {
            exchange: Arc::clone(&exchange),
            text: None,
        };
        Ok(GetResponse {
            headers,
            body: io::BufReader::new(Body { exchange }),
        })
    }

    fn post(
        &mut self,
        url: &str,
        _base_url: &str,
        headers: impl IntoIterator<Item = impl AsRef<str>>,
        _body: PostBodyDataKind,
    ) -> Result<PostResponse<Headers, io::BufReader<Body>, PostBody>> {
        let exchange = self.exchange(self.request(reqwest::Method::POST, url, headers));
        Ok(PostResponse {
            post_body: PostBody {
                exchange: Arc::clone(&exchange),
            },
            headers: Headers {
                exchange: Arc::clone(&exchange),
                text: None,
            },
            body: io::BufReader::new(Body { exchange }),
        })
    }

    fn configure(&mut self, _config: &dyn std::any::Any) -> Result {
        Ok(())
    }

    fn redirected_base_url(&self) -> Option<String> {
        self.redirected.clone()
    }
}

/// One request and its response. It is sent when its response is first looked at, and by then its body is whole.
struct Exchange {
    request: Option<reqwest::RequestBuilder>,
    body: Vec<u8>,
    response: Option<reqwest::Response>,
    chunk: Bytes,
    patience: Patience,
    health: Arc<Health>,
    failure: Arc<Mutex<Option<Failure>>>,
}

impl Exchange {
    fn send(&mut self) -> io::Result<()> {
        let Some(mut request) = self.request.take() else {
            return Ok(());
        };
        let is_greeting = self.body.is_empty();
        if !is_greeting {
            request = request.body(std::mem::take(&mut self.body));
        }
        let response = match self.patience.wait("did not answer", request.send()) {
            Err(why) => return Err(self.failed(why.to_string())),
            Ok(Err(error)) => return Err(self.failed(describe(&error))),
            Ok(Ok(response)) => response,
        };
        // What may be said before anybody is asked for references, by something that stands before the host, says nothing.
        if !is_greeting || !response.status().is_success() {
            self.health.heard();
        }
        if !response.status().is_success() {
            let (status, headers) = (response.status(), response.headers().clone());
            *lock(&self.failure) = Some(Failure::Status(status, headers));
            return Err(io::Error::other(format!("status {status}")));
        }
        self.response = Some(response);
        Ok(())
    }

    fn fill(&mut self) -> io::Result<&[u8]> {
        self.send()?;
        while self.chunk.is_empty() {
            let Some(mut response) = self.response.take() else {
                break;
            };
            let length = |chunk: &reqwest::Result<Option<Bytes>>| match chunk {
                Ok(Some(chunk)) => chunk.len(),
                _ => 0,
            };
            match self.patience.read(response.chunk(), length) {
                Err(why) => return Err(self.failed(why.to_string())),
                Ok(Err(error)) => return Err(self.failed(describe(&error))),
                Ok(Ok(Some(chunk))) => {
                    self.chunk = chunk;
                    self.response = Some(response);
                }
                Ok(Ok(None)) => {}
            }
        }
        Ok(&self.chunk)
    }

    fn failed(&mut self, what: String) -> io::Error {
        self.response = None;
        *lock(&self.failure) = Some(Failure::Transport(what.clone()));
        io::Error::other(what)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) struct PostBody {
    exchange: Arc<Mutex<Exchange>>,
}

impl Write for PostBody {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.exchange).body.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Response headers as lines.
pub(super) struct Headers {
    exchange: Arc<Mutex<Exchange>>,
    text: Option<io::Cursor<Vec<u8>>>,
}

impl Headers {
    fn text(&mut self) -> io::Result<&mut io::Cursor<Vec<u8>>> {
        if self.text.is_none() {
            let mut exchange = lock(&self.exchange);
            exchange.send()?;
            let mut text = Vec::new();
            for (name, value) in exchange
                .response
                .iter()
                .flat_map(|response| response.headers())
            {
                text.extend_from_slice(name.as_str().as_bytes());
                text.push(b':');
                text.extend_from_slice(value.as_bytes());
                text.push(b'\n');
            }
            drop(exchange);
            self.text = Some(io::Cursor::new(text));
        }
        self.text
            .as_mut()
            .ok_or_else(|| io::Error::other("no headers"))
    }
}

impl Read for Headers {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.text()?.read(buffer)
    }
}

impl BufRead for Headers {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.text()?.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        if let Some(text) = &mut self.text {
            text.consume(amount);
        }
    }
}

/// The response body. The bytes are copied out of the exchange: a guard cannot be lent to the caller.
pub(super) struct Body {
    exchange: Arc<Mutex<Exchange>>,
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut exchange = lock(&self.exchange);
        let available = exchange.fill()?;
        let taken = available.len().min(buffer.len());
        buffer[..taken].copy_from_slice(&available[..taken]);
        exchange.chunk.advance(taken);
        Ok(taken)
    }
}
