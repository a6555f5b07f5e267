//! One request for references or for a pack, answered from the pool, whatever door it came through.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::BoxFuture;
use gix_hash::ObjectId;
use tokio::time::timeout;

use crate::app::App;
use crate::config::AllowWants;
use crate::error::Error;
use crate::git::name::RepoName;
use crate::git::pool::{Cold, Entry, Flight, Found, Pool, PoolError};
use crate::git::serve::{self, Busy, Chunks, Passed, Rest};
use crate::git::snapshot::Snapshot;
use crate::git::upload_pack::advertise::{Advertisements, LsRefs, WantPolicy, advertise_v2};
use crate::git::upload_pack::request::{Band, FetchRequest};
use crate::git::upload_pack::{
    PackResponse, Refusal, Response as Answer, Version, error_packet, sideband, v0, v2,
};
use crate::git::upstream::UpstreamError;
use crate::ops::metrics::Queue;

/// What is sent to the client.
pub enum Reply {
    Whole(Bytes),
    /// Comes while it is being made.
    Streamed(Chunks),
    /// Why there is nothing, as the packet that a client shows: `ERR`, or an error of the side band.
    Refused(Bytes),
}

/// A request of either protocol generation.
pub enum Command {
    Nothing,
    LsRefs(LsRefs),
    Fetch(Fetch),
}

#[derive(Clone)]
pub enum Fetch {
    V0(Arc<v0::Request>),
    V2(Arc<FetchRequest>),
}

impl Fetch {
    fn request(&self) -> &FetchRequest {
        match self {
            Self::V0(request) => &request.fetch,
            Self::V2(request) => request,
        }
    }
}

impl Command {
    /// Whether a client that waits for a first clone to answer this is told something meanwhile.
    pub fn can_wait(&self) -> bool {
        match self {
            Self::Nothing | Self::LsRefs(_) => true,
            Self::Fetch(Fetch::V2(request)) => v2::has_certain_head(request),
            Self::Fetch(Fetch::V0(request)) => v0::certain_head(request).is_some(),
        }
    }

    /// What has to be among the features of `fetch` of a server that is asked this, in version 2.
    pub fn features(&self) -> Vec<&'static str> {
        let Self::Fetch(Fetch::V2(request)) = self else {
            return Vec::new();
        };
        let features = [
            (request.sideband_all, "sideband-all"),
            (request.wait_for_done, "wait-for-done"),
            (!request.want_refs.is_empty(), "ref-in-want"),
        ];
        let used = features.into_iter().filter(|(is_used, _)| *is_used);
        used.map(|(_, name)| name).collect()
    }
}

/// Reads a whole request. Takes processor time.
///
/// # Errors
/// [`Refusal::Malformed`].
pub fn parse(version: Version, body: &[u8]) -> Result<Command, Refusal> {
    Ok(match version {
        Version::V0 | Version::V1 => Command::Fetch(Fetch::V0(Arc::new(v0::parse(body)?))),
        Version::V2 => match v2::parse(body)? {
            v2::Command::Nothing => Command::Nothing,
            v2::Command::LsRefs(arguments) => Command::LsRefs(arguments),
            v2::Command::Fetch(request) => Command::Fetch(Fetch::V2(Arc::from(request))),
        },
    })
}

/// What there is of a repository for who begins to ask: fresh where references are told at once.
///
/// # Errors
/// As [`Pool::fresh`].
pub async fn look_up(app: &Arc<App>, name: &RepoName, version: Version) -> Result<Found, Error> {
    let found = match version {
        // Capabilities name no reference, so there is nothing to be fresh.
        Version::V2 => app.pool.present(name).await,
        Version::V0 | Version::V1 => app.pool.fresh(name).await,
    };
    found.map_err(refused)
}

/// What a client is told before it asks: capabilities, and up to version 1 references.
///
/// # Errors
/// Why a first clone fails.
pub async fn advertise(app: &Arc<App>, found: &Found, version: Version) -> Result<Bytes, Error> {
    let policy = policy(app);
    let make: Box<dyn FnOnce() -> Bytes + Send> = match found {
        Found::Mirror(_, snapshot) => {
            if let Some(list) = snapshot.advertisements.kept_v0(version, policy) {
                return Ok(list);
            }
            let snapshot = Arc::clone(snapshot);
            Box::new(move || snapshot.advertisements.v0(&snapshot.refs, version, policy))
        }
        Found::Cold(cold) => {
            // They also tell whether there is such a repository.
            let refs = app.pool.first_refs(cold).await.map_err(refused)?;
            Box::new(move || Advertisements::default().v0(&refs, version, policy))
        }
    };
    match version {
        Version::V2 => Ok(advertise_v2().into()),
        Version::V0 | Version::V1 => work(&app.pool, make).await,
    }
}

/// Asks an upstream the same as the service was asked, where a first clone failed. Gives what of its answer follows the given
/// beginning, which the client has been sent; `None` where it is not to be asked.
pub type Otherwise =
    Box<dyn FnOnce(Vec<u8>) -> BoxFuture<'static, Result<Option<Passed>, Error>> + Send>;

/// Answers a request. References that it names are as fresh as those in a list; `found` is what there is for any other.
///
/// # Errors
/// Whatever keeps it from being answered but the request itself.
pub async fn answer(
    app: &Arc<App>,
    name: &RepoName,
    found: Found,
    command: Command,
    otherwise: Option<Otherwise>,
) -> Result<Reply, Error> {
    match command {
        Command::Nothing => Ok(Reply::Whole(Bytes::new())),
        Command::LsRefs(arguments) => ls_refs(app, name, arguments).await.map(Reply::Whole),
        Command::Fetch(fetch) => {
            let came = Instant::now();
            let found = if fetch.request().names_references() {
                app.pool.fresh(name).await.map_err(refused)?
            } else {
                found
            };
            match found {
                Found::Mirror(entry, snapshot) => {
                    answer_fetch(app, entry, snapshot, came, fetch).await
                }
                Found::Cold(cold) => answer_cold(app, cold, fetch, otherwise).await,
            }
        }
    }
}

async fn ls_refs(app: &Arc<App>, name: &RepoName, arguments: LsRefs) -> Result<Bytes, Error> {
    let make: Box<dyn FnOnce() -> Bytes + Send> =
        match app.pool.fresh(name).await.map_err(refused)? {
            Found::Mirror(_, snapshot) => {
                if let Some(list) = snapshot.advertisements.kept_ls_refs(&arguments) {
                    return Ok(list);
                }
                Box::new(move || snapshot.advertisements.ls_refs(&snapshot.refs, &arguments))
            }
            Found::Cold(cold) => {
                let refs = app.pool.first_refs(&cold).await.map_err(refused)?;
                Box::new(move || Advertisements::default().ls_refs(&refs, &arguments))
            }
        };
    // References are many, and so can prefixes be.
    work(&app.pool, make).await
}

async fn answer_fetch(
    app: &Arc<App>,
    entry: Arc<Entry>,
    snapshot: Arc<Snapshot>,
    came: Instant,
    fetch: Fetch,
) -> Result<Reply, Error> {
    let sideband_all = fetch.request().sideband_all;
    let (snapshot, answer) = respond(app, &entry, snapshot, came, fetch).await?;
    let Answer { head, pack } = match answer {
        Ok(answer) => answer,
        Err(refusal) if sideband_all => {
            let text = refusal.to_string();
            return Ok(Reply::Refused(sideband::error(Band::Large, &text).into()));
        }
        Err(refusal) => return Ok(refusal_reply(&refusal)),
    };
    let Some(pack) = pack else {
        return Ok(Reply::Whole(head.into()));
    };
    send(app, &entry, &snapshot, head, pack)
}

/// Answers from a mirror that is not there yet: with progress where that takes long and the response's beginning is
/// known, else when the first clone is done.
async fn answer_cold(
    app: &Arc<App>,
    cold: Cold,
    fetch: Fetch,
    otherwise: Option<Otherwise>,
) -> Result<Reply, Error> {
    let came = Instant::now();
    let flight = app.pool.first_clone(&cold).map_err(refused)?;
    let beginning = match timeout(SILENCE, flight.wait()).await {
        Ok(_) => None,
        Err(_) => early_head(app, &cold, &flight, fetch.clone()).await?,
    };
    let entry = cold.entry;
    let Some((beginning, told)) = beginning else {
        return match flight.wait().await {
            Ok(snapshot) => answer_fetch(app, entry, snapshot, came, fetch).await,
            Err(error) => match without_mirror(&error, otherwise, Vec::new()).await? {
                Some(passed) => Ok(Reply::Streamed(serve::pass(passed))),
                None => Err(refused(error.into())),
            },
        };
    };
    let (name, metrics, app) = (
        entry.name.clone(),
        Arc::clone(&app.metrics),
        Arc::clone(app),
    );
    let begun = beginning.head.clone();
    let rest: serve::Respond = Box::new(move |landed| {
        let rest = async move {
            let snapshot = match landed {
                Ok(snapshot) => snapshot,
                Err(error) => {
                    let passed = without_mirror(&error, otherwise, begun).await?;
                    return Ok(passed.map(Rest::Passed).ok_or(error.to_string()));
                }
            };
            let snapshot = with_all(&app, &entry, snapshot, told).await?;
            let (snapshot, answer) = respond(&app, &entry, snapshot, came, fetch).await?;
            let answer = match answer {
                Ok(answer) => answer,
                Err(refusal) => return Ok(Err(refusal.to_string())),
            };
            // What has begun is at its pack.
            let head = match begun.is_empty() {
                true => answer.head,
                false => Vec::new(),
            };
            let prepare = |pack| serve::prepare(&app.pool, &entry, &snapshot, pack);
            let pack = answer.pack.map(prepare).transpose();
            let pack = pack.map_err(|Busy| busy())?;
            Ok(Ok(Rest::Answer { head, pack }))
        };
        Box::pin(async move {
            rest.await.unwrap_or_else(|error: Error| {
                error.log();
                Err(error.to_string())
            })
        })
    });
    Ok(Reply::Streamed(serve::send_after_first_clone(
        beginning, flight, name, metrics, rest,
    )))
}

/// What follows `head` where a first clone failed: the upstream's answer, if it is to be asked for that.
async fn without_mirror(
    error: &UpstreamError,
    otherwise: Option<Otherwise>,
    head: Vec<u8>,
) -> Result<Option<Passed>, Error> {
    match otherwise {
        Some(otherwise) if !matches!(error, UpstreamError::Stopped) => otherwise(head).await,
        _ => Ok(None),
    }
}

/// What the answer begins with, where that is known before the first clone has ended, and the objects that it tells of.
async fn early_head(
    app: &Arc<App>,
    cold: &Cold,
    flight: &Flight,
    fetch: Fetch,
) -> Result<Option<(serve::Beginning, Vec<ObjectId>)>, Error> {
    let refs = if fetch.request().names_references() {
        app.pool.first_refs(cold).await
    } else {
        let told = flight.told().await;
        told.map(|told| told.refs).map_err(PoolError::from)
    };
    let refs = refs.map_err(refused)?;
    work(&app.pool, move || {
        let (head, told) = match &fetch {
            Fetch::V2(request) => v2::certain_head(request, &refs)?,
            Fetch::V0(request) => (v0::certain_head(request)?, Vec::new()),
        };
        let request = fetch.request();
        let beginning = serve::Beginning {
            head,
            band: request.band,
            progress: !request.no_progress,
            keepalive: match request.sideband_all {
                true => sideband::keepalive_before_pack(),
                false => sideband::keepalive(request.band),
            },
        };
        Some((beginning, told))
    })
    .await
}

/// A mirror with what a client was `told` of: `snapshot`, or what the upstream has by now. Where a reference was
/// force-pushed meanwhile, git finds that what it was told did not come, and the next try gets it.
async fn with_all(
    app: &App,
    entry: &Arc<Entry>,
    snapshot: Arc<Snapshot>,
    told: Vec<ObjectId>,
) -> Result<Arc<Snapshot>, Error> {
    let packs = Arc::clone(&snapshot);
    let has_all = in_turn(&app.pool, entry, move || {
        told.iter().all(|id| packs.packs.contains(id))
    });
    if has_all.await? {
        return Ok(snapshot);
    }
    let asked = app.pool.ask_again(entry, snapshot).await;
    asked.map_err(refused)
}

/// The mirror once its first clone is done.
///
/// # Errors
/// Why that failed.
pub async fn first_clone(app: &Arc<App>, cold: &Cold) -> Result<Arc<Snapshot>, Error> {
    // The client may have taken its time, and the mirror may have been made meanwhile, and closed.
    if let Found::Mirror(_, snapshot) = app.pool.present(&cold.entry.name).await.map_err(refused)? {
        return Ok(snapshot);
    }
    let flight = app.pool.first_clone(cold).map_err(refused)?;
    flight.wait().await.map_err(|error| refused(error.into()))
}

/// Negotiates and plans, with `snapshot` or, where that lacks what is wanted, with what the upstream has by now. Tells which
/// it was.
///
/// # Errors
/// That the upstream could not be asked, where a stale mirror may not be served.
async fn respond(
    app: &App,
    entry: &Arc<Entry>,
    snapshot: Arc<Snapshot>,
    came: Instant,
    fetch: Fetch,
) -> Result<(Arc<Snapshot>, Result<Answer, Refusal>), Error> {
    let mut snapshot = snapshot;
    let mut answer = respond_from(app, entry, fetch.clone(), &snapshot).await?;
    let is_worth_asking = match answer {
        Err(Refusal::NotOurRef(_)) => true,
        // Not where that was asked for this request.
        Err(Refusal::UnknownRef(_)) => entry.fresh(came, Duration::ZERO).is_none(),
        _ => false,
    };
    if is_worth_asking {
        // The upstream may have it by now.
        let asked = app.pool.ask_again(entry, snapshot).await;
        snapshot = asked.map_err(refused)?;
        answer = respond_from(app, entry, fetch, &snapshot).await?;
    }
    if let Err(Refusal::Mirror(error)) = &answer {
        app.pool.report(entry, &snapshot, error).await;
    }
    Ok((snapshot, answer))
}

async fn respond_from(
    app: &App,
    entry: &Arc<Entry>,
    fetch: Fetch,
    snapshot: &Arc<Snapshot>,
) -> Result<Result<Answer, Refusal>, Error> {
    let (snapshot, policy) = (Arc::clone(snapshot), policy(app));
    in_turn(&app.pool, entry, move || match fetch {
        Fetch::V0(request) => v0::respond(&request, &snapshot, policy),
        Fetch::V2(request) => v2::fetch(FetchRequest::clone(&request), &snapshot, policy),
    })
    .await
}

/// [`work`] that walks a repository's history, in turn with that of other repositories.
///
/// # Errors
/// As [`work`].
pub async fn in_turn<T: Send + 'static>(
    pool: &Pool,
    entry: &Arc<Entry>,
    what: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let queued = pool.metrics().queued(Queue::Plan);
    let turn = Arc::clone(&entry.planning).acquire_owned().await;
    drop(queued);
    work(pool, move || {
        let _turn = turn;
        what()
    })
    .await
}

/// Runs what takes processor time, on one of a few threads for that.
///
/// # Errors
/// That it panicked.
pub async fn work<T: Send + 'static>(
    pool: &Pool,
    what: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let queued = pool.metrics().queued(Queue::Plan);
    let permit = Arc::clone(pool.planning()).acquire_owned().await;
    drop(queued);
    tokio::task::spawn_blocking(move || {
        let _permit = permit;
        what()
    })
    .await
    .map_err(|panic| Error::Internal(panic.into()))
}

/// Sends `head` and then a pack: a kept one, or one that is made now.
///
/// # Errors
/// [`Error::Busy`] when too many packs of this repository are being made.
pub fn send(
    app: &Arc<App>,
    entry: &Arc<Entry>,
    snapshot: &Arc<Snapshot>,
    head: Vec<u8>,
    pack: PackResponse,
) -> Result<Reply, Error> {
    let prepared = serve::prepare(&app.pool, entry, snapshot, pack).map_err(|Busy| busy())?;
    Ok(Reply::Streamed(serve::send(
        head,
        prepared,
        entry.name.clone(),
        Arc::clone(&app.metrics),
    )))
}

/// The reply that says why there is none.
pub fn refusal_reply(refusal: &Refusal) -> Reply {
    Reply::Refused(error_packet(&refusal.to_string()).into())
}

/// What may be wanted.
pub fn policy(app: &App) -> WantPolicy {
    match app.config.borrow().git.allow_wants {
        AllowWants::Advertised => WantPolicy::Advertised,
        AllowWants::Reachable => WantPolicy::Reachable,
    }
}

/// What a client is told when the pool has nothing.
pub fn refused(error: PoolError) -> Error {
    match error {
        PoolError::NotFound => Error::NotFound,
        PoolError::Upstream(what) => Error::UpstreamFailed(what),
        PoolError::Storage(_) => Error::StorageFull,
        PoolError::Busy | PoolError::Stopping => Error::Busy {
            retry_after: RETRY_AFTER,
        },
    }
}

/// A client that waits for a first clone hears nothing for so long, as from git's own server between two keepalives. A
/// clone that fails by then is told of by a status: once an answer has begun there is only the side band.
const SILENCE: Duration = Duration::from_secs(5);

/// Packs take seconds; a client that comes back sooner would find the queue as it was.
const RETRY_AFTER: Duration = Duration::from_secs(5);

fn busy() -> Error {
    Error::Busy {
        retry_after: RETRY_AFTER,
    }
}
