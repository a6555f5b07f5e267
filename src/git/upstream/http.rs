//! Upstreams over `https` and `http`: gix's Git client for what is mirrored, and the bare HTTP exchange for what is
//! passed through while a first clone is under way.

use std::io::BufRead;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use gix_hash::ObjectId;
use gix_object::bstr::BString;
use gix_protocol::fetch::{Arguments, Negotiate, Options, Response, Shallow, Tags, negotiate};
use gix_protocol::handshake::Ref;
use gix_transport::client::blocking_io::http::Transport;
use gix_utils::progress::Discard;
use reqwest::StatusCode;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, USER_AGENT};
use reqwest::redirect::Policy;

use super::pack::{last_cause, receive};
use super::transport::{Blocking, Failure};
use super::{FetchJob, Fetched, LONGEST_NAME, UpstreamError, is_mirrored};
use crate::config::{self, UpstreamAuth};
use crate::git::refs::{Head, Refs, Target};

/// Hosts of Git look at the beginning: what is no `git/` gets web pages from some.
const AGENT: &str = concat!("git/2 (warmdock ", env!("CARGO_PKG_VERSION"), ")");
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MOST_REDIRECTS: usize = 5;

/// A host that speaks smart HTTP.
pub struct HttpUpstream {
    /// As configured, which clients know it by.
    host: String,
    base: url::Url,
    client: reqwest::Client,
    headers: HeaderMap,
    has_token: bool,
    idle: Duration,
}

impl HttpUpstream {
    pub(super) fn new(upstream: &config::Upstream, idle: Duration) -> anyhow::Result<Self> {
        let client = reqwest::Client::builder()
            .redirect(Policy::custom(|attempt| {
                // SECURITY: our credentials go to the host that the operator named and to no other, and never from
                // https to http.
                let first = &attempt.previous()[0];
                if attempt.previous().len() > MOST_REDIRECTS {
                    attempt.error("it redirects without end")
                } else if first.origin() == attempt.url().origin() {
                    attempt.follow()
                } else {
                    let elsewhere = attempt.url().origin().ascii_serialization();
                    attempt.error(format!("it redirects to {elsewhere}: configure that host as the upstream"))
                }
            }))
            .connect_timeout(CONNECT_TIMEOUT)
            .build()
            .context("the HTTP client cannot be made: are there CA certificates? SSL_CERT_FILE names a bundle")?;
        let mut headers = HeaderMap::new();
        headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
        if let Some(token) = &upstream.token {
            headers.insert(AUTHORIZATION, authorization(upstream, token.expose())?);
        }
        Ok(Self {
            host: upstream.host.clone(),
            base: upstream.url.clone(),
            client,
            headers,
            has_token: upstream.token.is_some(),
            idle,
        })
    }

    /// The URL of a repository, with `.git` at its end.
    pub fn repository(&self, path: &str) -> String {
        format!("{}/{path}.git", self.base.as_str().trim_end_matches('/'))
    }

    /// A request below the repository's URL, with our credentials and without the client's.
    pub fn request(
        &self,
        method: reqwest::Method,
        path: &str,
        tail: &str,
    ) -> reqwest::RequestBuilder {
        let url = format!("{}/{tail}", self.repository(path));
        self.client
            .request(method, url)
            .headers(self.headers.clone())
    }

    /// How long the upstream may send nothing.
    pub fn idle(&self) -> Duration {
        self.idle
    }

    /// What went wrong with a request, without its URL.
    pub fn describe(error: &reqwest::Error) -> String {
        super::transport::describe(error)
    }

    /// What it means that the upstream answers with `status`.
    pub fn refusal(&self, status: StatusCode) -> UpstreamError {
        match status {
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

    /// The host, for messages.
    pub fn name(&self) -> String {
        self.host.clone()
    }

    pub(super) fn fetch(
        &self,
        path: &str,
        namespaces: &[String],
        job: FetchJob<'_>,
    ) -> Result<Fetched, UpstreamError> {
        let http = Blocking::new(
            self.client.clone(),
            tokio::runtime::Handle::current(),
            self.headers.clone(),
            self.idle,
            Arc::clone(job.stop),
        );
        let failure = Arc::clone(&http.failure);
        let stop = Arc::clone(job.stop);
        self.fetch_over(http, path, namespaces, job)
            .map_err(|error| {
                let seen = failure
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .clone();
                match (error, seen) {
                    (UpstreamError::Failed(_), _) if stop.load(Ordering::Relaxed) => {
                        UpstreamError::Stopped
                    }
                    (_, Some(Failure::Status(status))) => self.refusal(status),
                    (UpstreamError::Failed(_), Some(Failure::Transport(what)))
                    | (UpstreamError::Failed(what), None) => {
                        UpstreamError::Failed(format!("{}: {what}", self.name()))
                    }
                    (other, _) => other,
                }
            })
    }

    fn fetch_over(
        &self,
        http: Blocking,
        path: &str,
        namespaces: &[String],
        job: FetchJob<'_>,
    ) -> Result<Fetched, UpstreamError> {
        let url = gix_url::parse(self.repository(path).as_str()).map_err(failed)?;
        let mut transport = Transport::new_http(http, url, gix_transport::Protocol::V2, false);
        let mut handshake = gix_protocol::handshake(
            &mut transport,
            gix_transport::Service::UploadPack,
            |_| Ok(None),
            Vec::new(),
            &mut Discard,
        )
        .map_err(failed)?;
        let format = handshake.capabilities.capability("object-format");
        if format
            .and_then(|format| format.value().map(|value| value != "sha1"))
            .unwrap_or(false)
        {
            return Err(UpstreamError::Sha256);
        }
        let agent = ("agent", Some(AGENT.replace([' ', '(', ')'], "-")));
        let listed = match handshake.refs.take() {
            Some(listed) => listed,
            None => {
                let mut prefixes = gix_protocol::ls_refs::RefPrefixes::new();
                prefixes.extend(
                    ["HEAD".to_owned()]
                        .iter()
                        .chain(namespaces)
                        .map(|name| BString::from(name.as_str())),
                );
                gix_protocol::LsRefsCommand::new(
                    Some(prefixes),
                    &handshake.capabilities,
                    agent.clone(),
                )
                .invoke_blocking(&mut transport, &mut Discard, false)
                .map_err(failed)?
            }
        };
        let refs = refs_of(listed, namespaces);
        (job.on_refs)(&refs);

        let FetchJob {
            local,
            haves,
            folder,
            progress,
            stop,
            reservation,
            ..
        } = job;
        let mut wants: Vec<ObjectId> = refs.tips().filter(|tip| !local.contains(tip)).collect();
        wants.sort_unstable();
        wants.dedup();
        if wants.is_empty() {
            return Ok(Fetched { refs, index: None });
        }
        let mut received = None;
        let consume =
            |input: &mut dyn BufRead, _: &mut dyn gix_utils::progress::DynNestedProgress, _: &_| {
                received = Some(receive(input, local, folder, progress, stop, reservation));
                Ok(matches!(received, Some(Ok(_))))
            };
        let outcome = gix_protocol::fetch(
            &mut AllAtOnce { wants, haves },
            consume,
            Discard,
            stop,
            gix_protocol::fetch::Context {
                handshake: &mut handshake,
                transport: &mut transport,
                user_agent: agent,
                trace_packetlines: false,
            },
            Options {
                // A mirror is whole: there is no such file, and an upstream that is shallow itself is refused.
                shallow_file: folder.join("shallow"),
                shallow: &Shallow::NoChange,
                tags: Tags::None,
                reject_shallow_remote: true,
            },
        );
        match (received, outcome) {
            (Some(Err(error)), _) => Err(error),
            (_, Err(error)) => Err(failed(error)),
            (Some(Ok(index)), Ok(_)) => Ok(Fetched { refs, index }),
            (None, Ok(_)) => Err(UpstreamError::Failed(
                "it sent no pack for what it had offered".to_owned(),
            )),
        }
    }
}

fn failed(error: gix_error::Error) -> UpstreamError {
    UpstreamError::Failed(last_cause(&error))
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

fn refs_of(listed: Vec<Ref>, namespaces: &[String]) -> Refs {
    let mut refs = Refs::default();
    let mut head_id = None;
    for listed in listed {
        let (name, target) = match listed {
            Ref::Unborn {
                full_ref_name,
                target,
            } => {
                if full_ref_name == "HEAD" && is_name(&target) {
                    refs.head = Head::Branch(target);
                }
                continue;
            }
            Ref::Symbolic {
                full_ref_name,
                target,
                tag,
                object,
            } => {
                if full_ref_name == "HEAD" && is_name(&target) {
                    refs.head = Head::Branch(target);
                    continue;
                }
                (
                    full_ref_name,
                    Target {
                        id: tag.unwrap_or(object),
                        peeled: tag.map(|_| object),
                    },
                )
            }
            Ref::Direct {
                full_ref_name,
                object,
            } => (
                full_ref_name,
                Target {
                    id: object,
                    peeled: None,
                },
            ),
            Ref::Peeled {
                full_ref_name,
                tag,
                object,
            } => (
                full_ref_name,
                Target {
                    id: tag,
                    peeled: Some(object),
                },
            ),
        };
        if name == "HEAD" {
            head_id = Some(target.id);
        } else if is_mirrored(&name, namespaces) && is_name(&name) {
            refs.names.insert(name, target);
        }
    }
    if let (Head::Unknown, Some(id)) = (&refs.head, head_id) {
        refs.head = Head::Detached(id);
    }
    refs
}

/// Whether an upstream's text can stand in our files and answers as the name of a reference.
fn is_name(name: &BString) -> bool {
    name.len() <= LONGEST_NAME && gix_ref::FullName::try_from(name.clone()).is_ok()
}

/// Tells what we have and want in one request, and that this is all: the upstream answers with the pack at once.
struct AllAtOnce {
    wants: Vec<ObjectId>,
    haves: Vec<ObjectId>,
}

impl Negotiate for AllAtOnce {
    fn mark_complete_and_common_ref(&mut self) -> gix_error::Result<negotiate::Action> {
        Ok(negotiate::Action::MustNegotiate {
            remote_ref_target_known: Vec::new(),
        })
    }

    fn add_wants(&mut self, arguments: &mut Arguments, _: &[bool]) -> bool {
        for want in &self.wants {
            arguments.want(want);
        }
        true
    }

    fn one_round(
        &mut self,
        _: &mut negotiate::one_round::State,
        arguments: &mut Arguments,
        _: Option<&Response>,
    ) -> gix_error::Result<(negotiate::Round, bool)> {
        for have in &self.haves {
            arguments.have(have);
        }
        let round = negotiate::Round {
            haves_sent: self.haves.len(),
            in_vain: 0,
            haves_to_send: 0,
            previous_response_had_at_least_one_in_common: false,
        };
        Ok((round, true))
    }
}
