//! The HTTP door to the pool: Git's smart protocol (gitprotocol-http). Parses requests, asks access, and hands the
//! rest to upload-pack. Knows nothing of packs.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::response::Response;
use axum::routing::any;

use crate::app::App;
use crate::config::AllowWants;
use crate::error::Error;
use crate::git::body::{self, Encoding};
use crate::git::name::RepoName;
use crate::git::pool::{Cold, Entry, Found, Pool, PoolError};
use crate::git::refs::Refs;
use crate::git::relay::{Relayed, relay};
use crate::git::serve::{self, Busy, Chunks};
use crate::git::snapshot::Snapshot;
use crate::git::upload_pack::advertise::{Advertisements, LsRefs, WantPolicy, advertise_v2};
use crate::git::upload_pack::pktline::{self, FLUSH};
use crate::git::upload_pack::request::FetchRequest;
use crate::git::upload_pack::{Refusal, Response as Answer, Version, error_packet, v0, v2};

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
        _ => Err(Error::MethodNotAllowed),
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
    let found = match version {
        // Capabilities name no reference, so there is nothing to be fresh.
        Version::V2 => app.pool.present(name).await,
        Version::V0 | Version::V1 => app.pool.fresh(name).await,
    };
    let (entry, snapshot) = match found.map_err(refused)? {
        Found::Mirror(entry, snapshot) => (entry, snapshot),
        Found::Cold(cold) if cold.upstream.http().is_some() => {
            let tail = "info/refs?service=git-upload-pack";
            return pass_through(app, &cold, Method::GET, tail, Bytes::new(), headers).await;
        }
        Found::Cold(cold) => {
            let refs = refs_of_first_clone(app, &cold).await?;
            return Ok(advertisement(
                version,
                &Advertisements::default(),
                &refs,
                policy(app),
            ));
        }
    };
    let response = advertisement(
        version,
        &snapshot.advertisements,
        &snapshot.refs,
        policy(app),
    );
    drop(entry);
    Ok(response)
}

/// Hands a request for a repository without a mirror to its upstream. Once that has answered, a mirror is worth
/// making.
async fn pass_through(
    app: &Arc<App>,
    cold: &Cold,
    method: Method,
    tail: &'static str,
    body: Bytes,
    headers: &HeaderMap,
) -> Result<Response, Error> {
    let upstream = cold.upstream.http().ok_or(Error::NotFound)?;
    let request = Relayed { method, tail, body };
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

/// The references of a repository whose first clone is under way: they come long before the pack.
async fn refs_of_first_clone(app: &Arc<App>, cold: &Cold) -> Result<Arc<Refs>, Error> {
    let flight = app.pool.first_clone(cold).map_err(refused)?;
    flight.refs().await.map_err(|error| refused(error.into()))
}

fn advertisement(
    version: Version,
    kept: &Advertisements,
    refs: &Refs,
    policy: WantPolicy,
) -> Response {
    let body = match version {
        Version::V2 => advertise_v2().into(),
        Version::V0 | Version::V1 => {
            let mut head = Vec::new();
            pktline::write_line(&mut head, "# service=git-upload-pack");
            head.extend_from_slice(FLUSH);
            let list = kept.v0(refs, version, policy);
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
        return Err(Error::BadRequest(
            "Expected the content type application/x-git-upload-pack-request: is this a Git client?".into(),
        ));
    }
    let encoding = Encoding::of(&headers)?;
    let limit = app.config().limits.request_body;
    let body = body::read(body, limit).await?;

    let version = version_of(&headers);
    let found = app.pool.present(&name).await.map_err(refused)?;
    if let Found::Cold(cold) = &found
        && cold.upstream.http().is_some()
    {
        // Kept while the body goes up.
        let (bytes, _place) = body.into_parts();
        let tail = "git-upload-pack";
        return pass_through(app, cold, Method::POST, tail, bytes, &headers).await;
    }
    let command = work(&app.pool, move || {
        let body = body.decoded(encoding, limit)?;
        parse(version, body.bytes())
    });
    match command.await? {
        Err(Parsing::Body(error)) => Err(error),
        Err(Parsing::Refusal(refusal)) => Ok(result(error_packet(&refusal.to_string()))),
        Ok(Command::Nothing) => Ok(result(Vec::new())),
        Ok(Command::LsRefs(arguments)) => ls_refs(app, &name, arguments).await,
        Ok(Command::Fetch(fetch)) => match found {
            Found::Mirror(entry, snapshot) => answer(app, entry, snapshot, fetch).await,
            Found::Cold(cold) => answer_cold(app, cold, fetch).await,
        },
    }
}

/// A request of either protocol generation.
enum Command {
    Nothing,
    LsRefs(LsRefs),
    Fetch(Fetch),
}

#[derive(Clone)]
enum Fetch {
    V0(Arc<v0::Request>),
    V2(Arc<FetchRequest>),
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

fn parse(version: Version, body: &[u8]) -> Result<Command, Parsing> {
    Ok(match version {
        Version::V0 | Version::V1 => Command::Fetch(Fetch::V0(Arc::new(v0::parse(body)?))),
        Version::V2 => match v2::parse(body)? {
            v2::Command::Nothing => Command::Nothing,
            v2::Command::LsRefs(arguments) => Command::LsRefs(arguments),
            v2::Command::Fetch(request) => Command::Fetch(Fetch::V2(Arc::from(request))),
        },
    })
}

async fn ls_refs(app: &Arc<App>, name: &RepoName, arguments: LsRefs) -> Result<Response, Error> {
    let make: Box<dyn FnOnce() -> Bytes + Send> =
        match app.pool.fresh(name).await.map_err(refused)? {
            Found::Mirror(_, snapshot) => {
                if let Some(list) = snapshot.advertisements.kept_ls_refs(&arguments) {
                    return Ok(result(list));
                }
                Box::new(move || snapshot.advertisements.ls_refs(&snapshot.refs, &arguments))
            }
            Found::Cold(cold) => {
                let refs = refs_of_first_clone(app, &cold).await?;
                Box::new(move || Advertisements::default().ls_refs(&refs, &arguments))
            }
        };
    // References are many, and so can prefixes be.
    let list = work(&app.pool, make).await?;
    Ok(result(list))
}

async fn answer(
    app: &Arc<App>,
    entry: Arc<Entry>,
    snapshot: Arc<Snapshot>,
    fetch: Fetch,
) -> Result<Response, Error> {
    let policy = policy(app);
    let mut snapshot = snapshot;
    let mut answer = respond(&app.pool, fetch.clone(), Arc::clone(&snapshot), policy).await?;
    if matches!(answer, Err(Refusal::NotOurRef(_) | Refusal::UnknownRef(_))) {
        // The upstream may have it by now.
        snapshot = app
            .pool
            .ask_again(&entry, snapshot)
            .await
            .map_err(refused)?;
        answer = respond(&app.pool, fetch, Arc::clone(&snapshot), policy).await?;
    }
    let Answer { head, pack } = match answer {
        Ok(answer) => answer,
        Err(refusal) => {
            if let Refusal::Mirror(error) = &refusal {
                app.pool.report(&entry, &snapshot, error).await;
            }
            return Ok(result(error_packet(&refusal.to_string())));
        }
    };
    let Some(pack) = pack else {
        return Ok(result(head));
    };
    let prepared = serve::prepare(&app.pool, &entry, &snapshot, pack).map_err(|Busy| busy())?;
    Ok(streamed(serve::send(
        head,
        prepared,
        entry.name.clone(),
        Arc::clone(&app.metrics),
    )))
}

/// Answers from a mirror that is not there yet: with progress where the response's beginning is known, else when the
/// first clone is done.
async fn answer_cold(app: &Arc<App>, cold: Cold, fetch: Fetch) -> Result<Response, Error> {
    let flight = app.pool.first_clone(&cold).map_err(refused)?;
    let entry = cold.entry;
    let beginning = match &fetch {
        Fetch::V2(request) => v2::certain_head(request).map(|head| (head, request.band)),
        Fetch::V0(request) => v0::certain_head(request).map(|head| (head, request.fetch.band)),
    };
    let Some((head, band)) = beginning else {
        let snapshot = flight.wait().await.map_err(|error| refused(error.into()))?;
        return answer(app, entry, snapshot, fetch).await;
    };
    // Refused or on its way: whichever, the client hears of it at once.
    flight.refs().await.map_err(|error| refused(error.into()))?;
    let (name, metrics, policy, pool) = (
        entry.name.clone(),
        Arc::clone(&app.metrics),
        policy(app),
        Arc::clone(&app.pool),
    );
    let rest: serve::Respond = Box::new(move |snapshot| {
        Box::pin(async move {
            let answer = respond(&pool, fetch, Arc::clone(&snapshot), policy)
                .await
                .map_err(|error| error.to_string())?;
            let pack = answer.map_err(|refusal| refusal.to_string())?.pack;
            let pack = pack.ok_or_else(|| "nothing was asked for".to_owned())?;
            serve::prepare(&pool, &entry, &snapshot, pack).map_err(|Busy| busy().to_string())
        })
    });
    Ok(streamed(serve::send_after_first_clone(
        head, band, flight, name, metrics, rest,
    )))
}

/// Negotiates and plans, on a thread of its own: history is walked for that.
async fn respond(
    pool: &Pool,
    fetch: Fetch,
    snapshot: Arc<Snapshot>,
    policy: WantPolicy,
) -> Result<Result<Answer, Refusal>, Error> {
    work(pool, move || match fetch {
        Fetch::V0(request) => v0::respond(&request, &snapshot, policy),
        Fetch::V2(request) => v2::fetch(FetchRequest::clone(&request), &snapshot, policy),
    })
    .await
}

/// Runs what takes processor time, on one of a few threads for that.
async fn work<T: Send + 'static>(
    pool: &Pool,
    what: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let permit = Arc::clone(pool.planning()).acquire_owned().await;
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        what()
    })
    .await
    .map_err(|panic| Error::Internal(panic.into()))
}

fn version_of(headers: &HeaderMap) -> Version {
    let parameters = headers
        .get("git-protocol")
        .and_then(|value| value.to_str().ok());
    Version::from_parameters(parameters.unwrap_or_default())
}

fn policy(app: &App) -> WantPolicy {
    match app.config.borrow().git.allow_wants {
        AllowWants::Advertised => WantPolicy::Advertised,
        AllowWants::Reachable => WantPolicy::Reachable,
    }
}

fn refused(error: PoolError) -> Error {
    match error {
        PoolError::NotFound => Error::NotFound,
        PoolError::Upstream(what) => Error::UpstreamFailed(what),
        PoolError::Storage(_) => Error::StorageFull,
        PoolError::Busy | PoolError::Stopping => Error::Busy {
            retry_after: RETRY_AFTER,
        },
    }
}

/// Packs take seconds; a client that comes back sooner would find the queue as it was.
const RETRY_AFTER: Duration = Duration::from_secs(5);

fn busy() -> Error {
    Error::Busy {
        retry_after: RETRY_AFTER,
    }
}

fn result(body: impl Into<Body>) -> Response {
    git_response(body.into(), "application/x-git-upload-pack-result")
}

fn streamed(chunks: Chunks) -> Response {
    let stream = futures_util::stream::unfold(chunks, |mut chunks| async move {
        let chunk = chunks.recv().await?;
        Some((chunk, chunks))
    });
    git_response(
        Body::from_stream(stream),
        "application/x-git-upload-pack-result",
    )
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
