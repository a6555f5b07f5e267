//! The HTTP door to the pool: Git's smart protocol (gitprotocol-http). Parses requests, asks access, and hands the
//! rest to upload-pack. Knows nothing of packs.

use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::response::Response;
use axum::routing::any;

use crate::app::App;
use crate::config::{AllowWants, USUAL_REFS};
use crate::error::Error;
use crate::git::body::{self, Encoding, Kept};
use crate::git::exchange::{self, Command, Otherwise, Reply, refused, work};
use crate::git::name::RepoName;
use crate::git::pool::{Cold, Found, Passing, PoolError};
use crate::git::relay::{Relayed, behind, only_mirrored, outgoing, relay};
use crate::git::upload_pack::pktline::{self, FLUSH};
use crate::git::upload_pack::{Refusal, Version};

/// The routes below `/git/`.
pub fn routes() -> Router<Arc<App>> {
    // One route: repository names have as many segments as they like.
    Router::new().route("/git/{*path}", any(handle))
}

/// What a path asks for.
enum Service {
    Refs,
    UploadPack,
    ReceivePack,
}

async fn handle(State(app): State<Arc<App>>, request: Request) -> Result<Response, Error> {
    let principal = app.access.principal(request.headers())?;
    let (name, service) = parse_path(&request)?;
    if !principal.may_read(&name) {
        return Err(Error::NotFound);
    }
    match (service, request.method()) {
        (Service::ReceivePack, _) => Err(Error::PushRefused {
            upstream: name.to_string(),
        }),
        (Service::Refs, &Method::GET) => refs(&app, &name, request.headers()).await,
        (Service::UploadPack, &Method::POST) => upload_pack(&app, name, request).await,
        (Service::Refs, _) => Err(Error::MethodNotAllowed { allow: "GET" }),
        (Service::UploadPack, _) => Err(Error::MethodNotAllowed { allow: "POST" }),
    }
}

/// Reads `/git/<host>/<path>[.git]/info/refs?service=…` or `…/git-upload-pack`, as it was sent: nothing is decoded,
/// since no repository's name needs it.
fn parse_path(request: &Request) -> Result<(RepoName, Service), Error> {
    let path = request
        .uri()
        .path()
        .strip_prefix("/git/")
        .unwrap_or_default();
    let (name, service) = if let Some(name) = path.strip_suffix("/info/refs") {
        let query = request.uri().query().unwrap_or_default();
        let service = query
            .split('&')
            .find_map(|pair| pair.strip_prefix("service="));
        match service {
            Some("git-upload-pack") => (name, Service::Refs),
            Some("git-receive-pack") => (name, Service::ReceivePack),
            _ => {
                return Err(Error::BadRequest(
                    "Expected ?service=git-upload-pack: only Git's smart protocol is served here."
                        .into(),
                ));
            }
        }
    } else if let Some(name) = path.strip_suffix("/git-upload-pack") {
        (name, Service::UploadPack)
    } else if let Some(name) = path.strip_suffix("/git-receive-pack") {
        (name, Service::ReceivePack)
    } else {
        return Err(Error::NotFound);
    };
    let name = RepoName::parse(name)
        .map_err(|error| Error::BadRequest(format!("This cannot name a repository: {error}.")))?;
    Ok((name, service))
}

async fn refs(app: &Arc<App>, name: &RepoName, headers: &HeaderMap) -> Result<Response, Error> {
    let version = version_of(headers);
    let found = exchange::look_up(app, name, version).await?;
    if let Some(cold) = to_pass_through(app, &found) {
        let request = Relayed {
            method: Method::GET,
            tail: "info/refs?service=git-upload-pack",
            body: Bytes::new(),
            place: None,
        };
        if let Some(list) = pass_through(app, cold, request, headers).await? {
            return Ok(as_of_mirror(cold, list));
        }
    }
    let list = exchange::advertise(app, &found, version).await?;
    Ok(advertisement(version, list))
}

/// What requests are passed through for: a repository without a mirror, whose upstream speaks HTTP.
///
/// SECURITY: an upstream answers to our credentials. It lists all its references and gives any object that it lets us
/// have, so where the operator says which of them clients get, they wait for the mirror.
fn to_pass_through<'f>(app: &App, found: &'f Found) -> Option<&'f Cold> {
    let Found::Cold(cold) = found else {
        return None;
    };
    let git = &app.config().git;
    // With these among them, nothing is held back from whoever clones.
    let has = |usual: &&str| git.refs.iter().any(|given| given == usual);
    let gives_all = git.allow_wants == AllowWants::Reachable && USUAL_REFS.iter().all(has);
    (gives_all && cold.upstream.http().is_some()).then_some(cold)
}

/// Hands a request for a repository without a mirror to its upstream; `None` where only the mirror can answer it. Once
/// the upstream has answered, a mirror is worth making.
async fn pass_through(
    app: &Arc<App>,
    cold: &Cold,
    request: Relayed,
    headers: &HeaderMap,
) -> Result<Option<Response>, Error> {
    let upstream = cold.upstream.http().ok_or(Error::NotFound)?;
    let answer = relay(
        upstream,
        &cold.entry.name,
        request,
        headers,
        Arc::clone(&app.metrics),
    )
    .await;
    match answer {
        Ok(answer) => {
            // When too many wait already, this client is served all the same.
            let _ = app.pool.first_clone(cold);
            Ok(answer)
        }
        Err(error) => {
            if matches!(error, PoolError::NotFound) {
                app.pool.not_found(cold);
            }
            Err(refused(error))
        }
    }
}

/// What of an upstream's list the mirror will list.
fn as_of_mirror(cold: &Cold, list: Response) -> Response {
    let (upstream, asked) = (Arc::clone(&cold.upstream), Arc::clone(&cold.upstream));
    only_mirrored(
        list,
        move |name| upstream.mirrors(name),
        move |features| {
            if let Some(upstream) = asked.http() {
                upstream.told_features(features);
            }
        },
    )
}

fn advertisement(version: Version, list: Bytes) -> Response {
    let body = match version {
        Version::V2 => list.into(),
        Version::V0 | Version::V1 => {
            let mut head = Vec::new();
            pktline::write_line(&mut head, "# service=git-upload-pack");
            head.extend_from_slice(FLUSH);
            let parts = [Ok::<_, std::io::Error>(Bytes::from(head)), Ok(list)];
            Body::from_stream(futures_util::stream::iter(parts))
        }
    };
    // libgit2 compares the type to the letter.
    git_response(body, "application/x-git-upload-pack-advertisement")
}

async fn upload_pack(app: &Arc<App>, name: RepoName, request: Request) -> Result<Response, Error> {
    let (parts, body) = request.into_parts();
    let headers = parts.headers;
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    if kind != Some(b"application/x-git-upload-pack-request") {
        // SECURITY: a form of a web page cannot send this type without asking its server first.
        return Err(Error::UnsupportedMediaType(
            "Expected the content type application/x-git-upload-pack-request: is this a Git client?".into(),
        ));
    }
    let encoding = Encoding::of(&headers)?;
    let limit = app.config().limits.request_body;
    let body = body::read(body, limit).await?;

    let version = version_of(&headers);
    let found = app.pool.present(&name).await.map_err(refused)?;
    let packed = to_pass_through(app, &found).map(|cold| (cold, body.shared()));
    // The body as well, whose room is taken as long as it may be passed on.
    let parsed = work(&app.pool, move || {
        let body = body.decoded(encoding, limit)?;
        Ok::<_, Parsing>((exchange::parse(version, body.bytes())?, body))
    });
    let parsed = parsed.await?;
    // The client may have seen our capabilities instead of the upstream's.
    let packed = packed.filter(|(cold, _)| match (&parsed, cold.upstream.http()) {
        (Ok((command, _)), Some(upstream)) => {
            let features = command.features();
            features.into_iter().all(|name| upstream.has_feature(name))
        }
        _ => true,
    });
    // What is no request for us may be one for the upstream, whose capabilities the client may have seen.
    let can_wait = parsed.as_ref().is_ok_and(|(command, _)| command.can_wait());
    let mut otherwise = None;
    if let Some((cold, packed)) = packed {
        if let Some(place) = cold.entry.pass_through(can_wait) {
            let request = question(packed, place);
            if let Some(answer) = pass_through(app, cold, request, &headers).await? {
                return Ok(match parsed {
                    Ok((Command::LsRefs(_), _)) => as_of_mirror(cold, answer),
                    _ => answer,
                });
            }
        } else {
            otherwise = pass_through_later(app, &name, packed, &headers);
        }
    }
    let (command, _room) = match parsed {
        Err(Parsing::Body(error)) => return Err(error),
        Err(Parsing::Refusal(refusal)) => return Ok(result(exchange::refusal_reply(&refusal))),
        Ok((command, body)) => (command, body.if_large()),
    };
    exchange::answer(app, &name, found, command, otherwise)
        .await
        .map(result)
}

/// A request with a body, for the upstream.
fn question(body: Bytes, place: Passing) -> Relayed {
    Relayed {
        method: Method::POST,
        tail: "git-upload-pack",
        body,
        place: Some(place),
    }
}

/// Hands on a request that waits for a mirror, should that not be made. None where the request is not kept for so long.
fn pass_through_later(
    app: &Arc<App>,
    name: &RepoName,
    body: Bytes,
    headers: &HeaderMap,
) -> Option<Otherwise> {
    let body = Kept::new(body)?;
    let (app, name, headers) = (Arc::clone(app), name.clone(), outgoing(headers));
    let ask = async move |head: Vec<u8>| {
        let found = app.pool.present(&name).await.map_err(refused)?;
        let Some(cold) = to_pass_through(&app, &found) else {
            return Ok(None);
        };
        let Some(place) = cold.entry.pass_through(false) else {
            return Ok(None);
        };
        let request = question(body.bytes.clone(), place);
        let Some(answer) = pass_through(&app, cold, request, &headers).await? else {
            return Ok(None);
        };
        behind(&head, answer).await.map(Some).map_err(refused)
    };
    Some(Box::new(|head| Box::pin(async move { ask(head).await })))
}

enum Parsing {
    Body(Error),
    Refusal(Refusal),
}

impl From<Error> for Parsing {
    fn from(error: Error) -> Self {
        Self::Body(error)
    }
}

impl From<Refusal> for Parsing {
    fn from(refusal: Refusal) -> Self {
        Self::Refusal(refusal)
    }
}

fn version_of(headers: &HeaderMap) -> Version {
    let parameters = headers
        .get("git-protocol")
        .and_then(|value| value.to_str().ok());
    Version::from_parameters(parameters.unwrap_or_default())
}

fn result(reply: Reply) -> Response {
    let body = match reply {
        Reply::Whole(bytes) | Reply::Refused(bytes) => bytes.into(),
        Reply::Streamed(chunks) => Body::from_stream(futures_util::stream::unfold(
            chunks,
            |mut chunks| async move {
                let chunk = chunks.recv().await?;
                Some((chunk, chunks))
            },
        )),
    };
    git_response(body, "application/x-git-upload-pack-result")
}

fn git_response(body: Body, kind: &'static str) -> Response {
    let mut response = Response::new(body);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response.headers_mut().insert(
        CACHE_CONTROL,
        HeaderValue::from_static("no-cache, max-age=0, must-revalidate"),
    );
    response
}
