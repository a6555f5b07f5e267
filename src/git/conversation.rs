//! A client that keeps its connection, as git does over SSH: it is told what there is, and then asks until it has what
//! it wants (gitprotocol-pack, gitprotocol-v2). Knows nothing of SSH.

use std::sync::Arc;

use bytes::Bytes;

use crate::app::App;
use crate::error::Error;
use crate::git::body::Place;
use crate::git::exchange::{self, Command, Fetch, Reply, in_turn, work};
use crate::git::name::RepoName;
use crate::git::pool::{Entry, Found};
use crate::git::snapshot::Snapshot;
use crate::git::upload_pack::pktline::Packets;
use crate::git::upload_pack::stream::{Part, Stream};
use crate::git::upload_pack::v0::{End, Negotiation, Request};
use crate::git::upload_pack::{PackResponse, Refusal, Version, v0};

/// The client's end of the connection.
pub trait Client: Send {
    /// The next bytes; `None` when no more will come.
    fn receive(&mut self) -> impl Future<Output = Option<Bytes>> + Send;

    /// Sends bytes, waiting until the client takes them.
    fn send(&mut self, bytes: Bytes) -> impl Future<Output = Result<(), Gone>> + Send;
}

/// The client has left, or takes nothing any more.
#[derive(Debug)]
pub struct Gone;

/// Why a conversation ended early.
#[derive(Debug)]
pub enum Broken {
    /// The client has been told why, as an `ERR` packet.
    Refused,
    Gone,
    /// The client is yet to be told.
    Failed(Error),
}

impl From<Error> for Broken {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl From<Gone> for Broken {
    fn from(Gone: Gone) -> Self {
        Self::Gone
    }
}

/// Serves `name` to `client` until it has what it wants.
///
/// # Errors
/// [`Broken`].
pub async fn hold(
    app: &Arc<App>,
    name: &RepoName,
    version: Version,
    client: &mut impl Client,
) -> Result<(), Broken> {
    let found = exchange::look_up(app, name, version).await?;
    client
        .send(exchange::advertise(app, &found, version).await?)
        .await?;
    let limit = usize::try_from(app.config().limits.request_body).unwrap_or(usize::MAX);
    let mut line = Line {
        app,
        client,
        stream: Stream::new(limit),
        place: Place::none(),
    };
    match version {
        Version::V0 | Version::V1 => hold_v0(&mut line, name, found).await,
        Version::V2 => hold_v2(&mut line, name).await,
    }
}

/// A client and what it has said.
struct Line<'a, C> {
    app: &'a Arc<App>,
    client: &'a mut C,
    stream: Stream,
    place: Place,
}

impl<C: Client> Line<'_, C> {
    /// The next part of what the client says; `None` when it has nothing more to say.
    async fn next(&mut self, part: Part) -> Result<Option<Vec<u8>>, Broken> {
        loop {
            match self.stream.next_part(part) {
                Ok(Some(bytes)) => return Ok(Some(bytes)),
                Ok(None) => {}
                Err(refusal) => return self.refuse(&refusal).await,
            }
            match self.place.keep_while(self.client.receive()).await? {
                Some(bytes) => {
                    self.stream.push(&bytes);
                    self.place.make_room_for(self.stream.len()).await?;
                }
                None if self.stream.is_empty() => return Ok(None),
                None => return Err(Broken::Gone),
            }
        }
    }

    async fn refuse<T>(&mut self, refusal: &Refusal) -> Result<T, Broken> {
        self.reply(exchange::refusal_reply(refusal)).await?;
        Err(Broken::Refused)
    }

    async fn reply(&mut self, reply: Reply) -> Result<(), Broken> {
        match reply {
            Reply::Whole(bytes) if bytes.is_empty() => Ok(()),
            Reply::Whole(bytes) => {
                self.place = Place::none();
                Ok(self.client.send(bytes).await?)
            }
            Reply::Refused(bytes) => {
                self.client.send(bytes).await?;
                Err(Broken::Refused)
            }
            Reply::Streamed(mut chunks) => {
                // Nobody works on what the client said any more.
                self.place = Place::none();
                while let Some(chunk) = chunks.recv().await {
                    // The client has been told what there was to tell.
                    let chunk = chunk.map_err(|_| Broken::Refused)?;
                    self.client.send(chunk).await?;
                }
                Ok(())
            }
        }
    }
}

/// Each request is whole, so that nothing is kept between two of them.
async fn hold_v2(line: &mut Line<'_, impl Client>, name: &RepoName) -> Result<(), Broken> {
    while let Some(bytes) = line.next(Part::UpToFlush).await? {
        let parsed = work(&line.app.pool, move || exchange::parse(Version::V2, &bytes)).await?;
        let command = match parsed {
            Ok(Command::Nothing) => return Ok(()),
            Ok(command) => command,
            Err(refusal) => return line.refuse(&refusal).await,
        };
        let found = exchange::look_up(line.app, name, Version::V2).await?;
        let reply = exchange::answer(line.app, name, found, command, None).await?;
        line.reply(reply).await?;
    }
    Ok(())
}

/// What is wanted comes first, then haves in batches, each of which is answered.
async fn hold_v0(
    line: &mut Line<'_, impl Client>,
    name: &RepoName,
    found: Found,
) -> Result<(), Broken> {
    let Some(bytes) = line.next(Part::UpToFlush).await? else {
        return Ok(());
    };
    let opening = work(&line.app.pool, move || {
        v0::parse_opening(&mut Packets::new(&bytes))
    });
    let mut request = match opening.await? {
        Ok(request) if request.fetch.wants.is_empty() => return Ok(()),
        Ok(request) => request,
        Err(refusal) => return line.refuse(&refusal).await,
    };
    let mut batch = None;
    if !request.is_answered_at_once() {
        let next;
        (request, next) = match next_batch(line, request).await? {
            Some(next) => next,
            None => return Ok(()),
        };
        if next == End::Done {
            // Nothing was negotiated: as whole as over HTTP.
            let command = Command::Fetch(Fetch::V0(Arc::new(request)));
            let reply = exchange::answer(line.app, name, found, command, None).await?;
            return line.reply(reply).await;
        }
        batch = Some(next);
    }
    let (entry, snapshot) = match found {
        Found::Mirror(entry, snapshot) => (entry, snapshot),
        Found::Cold(cold) => {
            let snapshot = exchange::first_clone(line.app, &cold).await?;
            (cold.entry, snapshot)
        }
    };
    negotiate(line, request, batch, entry, snapshot).await
}

async fn negotiate(
    line: &mut Line<'_, impl Client>,
    request: Request,
    mut batch: Option<End>,
    entry: Arc<Entry>,
    snapshot: Arc<Snapshot>,
) -> Result<(), Broken> {
    let (request, snapshot, begun) = begin(line.app, request, &entry, snapshot).await?;
    let (mut negotiation, head) = match begun {
        Ok(begun) => begun,
        Err(refusal) => return line.refuse(&refusal).await,
    };
    let mut request = request;
    line.reply(Reply::Whole(head.into())).await?;
    loop {
        if batch.take().is_none() {
            match next_batch(line, request).await? {
                Some((more, _)) => request = more,
                None => return Ok(()),
            }
        }
        let from = Arc::clone(&snapshot);
        let answered = in_turn(&line.app.pool, &entry, move || {
            let mut out = Vec::new();
            let pack = take_batch(&mut negotiation, &request, &from, &mut out);
            (request, negotiation, out, pack)
        });
        let (out, pack);
        (request, negotiation, out, pack) = answered.await?;
        match pack {
            Ok(None) => line.reply(Reply::Whole(out.into())).await?,
            Ok(Some(pack)) => {
                let reply = exchange::send(line.app, &entry, &snapshot, out, pack)?;
                return line.reply(reply).await;
            }
            Err(refusal) => {
                line.reply(Reply::Whole(out.into())).await?;
                return line.refuse(&refusal).await;
            }
        }
    }
}

fn take_batch(
    negotiation: &mut Negotiation,
    request: &Request,
    snapshot: &Snapshot,
    out: &mut Vec<u8>,
) -> Result<Option<PackResponse>, Refusal> {
    let batch = request.last_batch();
    negotiation.take_batch(request, batch, snapshot, &snapshot.commits(), out)
}

type Begun = Result<(Negotiation, Vec<u8>), Refusal>;

/// Begins to negotiate, if need be with references that the upstream is asked for once more.
async fn begin(
    app: &Arc<App>,
    request: Request,
    entry: &Arc<Entry>,
    snapshot: Arc<Snapshot>,
) -> Result<(Request, Arc<Snapshot>, Begun), Error> {
    let policy = exchange::policy(app);
    let begin_with = async |request: Request, snapshot: Arc<Snapshot>| {
        in_turn(&app.pool, entry, move || {
            let mut out = Vec::new();
            let begun =
                Negotiation::begin(&request, &snapshot, &snapshot.commits(), policy, &mut out);
            (request, begun.map(|begun| (begun, out)))
        })
        .await
    };
    let (request, begun) = begin_with(request, Arc::clone(&snapshot)).await?;
    if !matches!(begun, Err(Refusal::NotOurRef(_) | Refusal::UnknownRef(_))) {
        return Ok((request, snapshot, begun));
    }
    let asked = app.pool.ask_again(entry, snapshot).await;
    let snapshot = asked.map_err(exchange::refused)?;
    let (request, begun) = begin_with(request, Arc::clone(&snapshot)).await?;
    Ok((request, snapshot, begun))
}

/// Reads the next batch of haves into `request`; `None` when the client has left.
async fn next_batch(
    line: &mut Line<'_, impl Client>,
    mut request: Request,
) -> Result<Option<(Request, End)>, Broken> {
    let Some(bytes) = line.next(Part::Batch).await? else {
        return Ok(None);
    };
    let parsed = work(&line.app.pool, move || {
        let end = request.parse_batch(&mut Packets::new(&bytes));
        (request, end)
    });
    let (request, end) = parsed.await?;
    match end {
        Ok(end) => Ok(end.map(|end| (request, end))),
        Err(refusal) => line.refuse(&refusal).await,
    }
}
