//! Passes requests through to an upstream over HTTP while the first clone of a repository is under way, so that for the
//! first clients a cold miss takes no longer than going there directly. Nothing of what passes is kept.

use std::sync::Arc;

use axum::BoxError;
use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::response::Response;
use bytes::{Buf, Bytes, BytesMut};
use futures_util::StreamExt;
use gix_hash::ObjectId;
use gix_object::bstr::ByteSlice;
use tokio::time::timeout;

use crate::git::name::RepoName;
use crate::git::pool::{Passing, PoolError};
use crate::git::serve::Passed;
use crate::git::upload_pack::advertise::{VERSION_2, in_common};
use crate::git::upload_pack::pktline::{self, Packet, PacketError, Packets};
use crate::git::upload_pack::sideband;
use crate::git::upstream::ending::Ending;
use crate::git::upstream::http::HttpUpstream;
use crate::http_client::describe;
use crate::ops::metrics::{AnswerKind, Metrics};

const GIT_PROTOCOL: HeaderName = HeaderName::from_static("git-protocol");

/// What of a request goes to the upstream.
pub struct Relayed {
    pub method: Method,
    /// Below the repository: `info/refs?service=git-upload-pack` or `git-upload-pack`.
    pub tail: &'static str,
    pub body: Bytes,
    /// For a pack.
    pub place: Option<Passing>,
}

/// Asks the upstream and streams its answer; `None` where it sent the request on to another address. Git would ask there
/// from then on, but the client does not know of it, and a POST that is sent on may come there as a GET without a body.
///
/// SECURITY: of the client's headers only those that Git's protocol needs go up: not its credentials, which are
/// meant for us. Of the upstream's only the content type comes down.
///
/// # Errors
/// What the upstream answered instead, or that it did not.
pub async fn relay(
    upstream: &HttpUpstream,
    name: &RepoName,
    request: Relayed,
    headers: &HeaderMap,
    metrics: Arc<Metrics>,
) -> Result<Option<Response>, PoolError> {
    let mut answered = Err(PoolError::NotFound);
    let endings = upstream.endings(name.path());
    for ending in endings {
        match ask(upstream, name, ending, &request, headers).await {
            Err(PoolError::NotFound) => {}
            // To the other it may answer with a page for people.
            Err(PoolError::Upstream(_))
                if ending != endings[0] && upstream.asked_too_often().is_none() => {}
            asked => {
                if let Ok(Some(_)) = asked {
                    upstream.found(name.path(), ending);
                }
                answered = asked;
                break;
            }
        }
    }
    let Some(incoming) = answered? else {
        return Ok(None);
    };
    let idle = upstream.idle();
    let kind = incoming.headers().get(CONTENT_TYPE).cloned();
    let counted = Counted {
        metrics,
        bytes: 0,
        _place: request.place,
    };
    let stream = futures_util::stream::unfold(
        (incoming.bytes_stream(), counted),
        move |(mut incoming, mut counted)| async move {
            let next = match timeout(idle, incoming.next()).await {
                Ok(next) => next?.map_err(std::io::Error::other),
                Err(_) => Err(std::io::Error::from(std::io::ErrorKind::TimedOut)),
            };
            counted.bytes += next.as_ref().map_or(0, |chunk| chunk.len() as u64);
            Some((next, (incoming, counted)))
        },
    );
    let mut response = Response::new(Body::from_stream(stream));
    response
        .headers_mut()
        .extend(kind.map(|kind| (CONTENT_TYPE, kind)));
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(Some(response))
}

/// Asks for the repository by one of the ends that its path may have.
async fn ask(
    upstream: &HttpUpstream,
    name: &RepoName,
    ending: Ending,
    request: &Relayed,
    headers: &HeaderMap,
) -> Result<Option<reqwest::Response>, PoolError> {
    let method = request.method.clone();
    let is_get = method == Method::GET;
    let question = upstream.request(method, name.path(), ending, request.tail);
    let question = question.headers(outgoing(headers));
    let failed = |error: reqwest::Error| {
        PoolError::Upstream(format!("{}: {}", upstream.name(), describe(&error)))
    };
    let idle = upstream.idle();
    let (client, question) = question.body(request.body.clone()).build_split();
    let question = question.map_err(failed)?;
    let asked = question.url().clone();
    let answered = timeout(idle, client.execute(question)).await;
    let silent = || {
        format!(
            "{}: it sent nothing for {}",
            upstream.name(),
            humantime::format_duration(idle)
        )
    };
    let incoming = answered
        .map_err(|_| PoolError::Upstream(silent()))?
        .map_err(failed)?;
    let is_refused = !incoming.status().is_success();
    // A GET that is sent on to nothing asked for nothing.
    if *incoming.url() != asked && !(is_refused && is_get) {
        return Ok(None);
    }
    if is_refused {
        let refusal = upstream.refusal(incoming.status(), incoming.headers());
        return Err(refusal.into());
    }
    let kind = incoming.headers().get(CONTENT_TYPE);
    if !kind.is_some_and(|kind| {
        kind.as_bytes()
            .starts_with(b"application/x-git-upload-pack-")
    }) {
        return Err(PoolError::Upstream(format!(
            "{}: expected an answer of Git's protocol, found {:?}: is the upstream's URL right?",
            upstream.name(),
            kind.unwrap_or(&HeaderValue::from_static("no content type"))
        )));
    }
    Ok(Some(incoming))
}

/// Counts what went through, also when the client leaves early.
struct Counted {
    metrics: Arc<Metrics>,
    bytes: u64,
    _place: Option<Passing>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.metrics.answer(AnswerKind::Relayed, self.bytes);
    }
}

/// What of a client's request goes up with it.
pub fn outgoing(headers: &HeaderMap) -> HeaderMap {
    let given = |header| headers.get(&header).map(|value| (header, value.clone()));
    [GIT_PROTOCOL, CONTENT_TYPE, CONTENT_ENCODING]
        .into_iter()
        .filter_map(given)
        .collect()
}

/// What of an answer follows the packets of `head`, which the client has been sent already.
///
/// # Errors
/// That it begins otherwise.
pub async fn behind(head: &[u8], answer: Response) -> Result<Passed, PoolError> {
    let failed = |what: &str| PoolError::Upstream(format!("the upstream's answer {what}"));
    let mut answer = answer.into_body().into_data_stream();
    let mut begun = BytesMut::new();
    let mut ours = Packets::new(head);
    // With `sideband-all`, progress may come between its lines.
    let banded = head.get(4) == Some(&sideband::PACK);
    while let Ok(Some(expected)) = ours.next_packet() {
        let length = loop {
            let mut theirs = Packets::new(&begun);
            match theirs.next_packet() {
                Ok(Some(found)) if is_same(expected, found) => {
                    break begun.len() - theirs.rest().len();
                }
                Ok(Some(Packet::Data([sideband::PROGRESS, ..]))) if banded => {
                    let length = begun.len() - theirs.rest().len();
                    begun.advance(length);
                }
                Ok(Some(Packet::Data([sideband::ERROR, text @ ..]))) if banded => {
                    let text = pktline::text(text).to_str_lossy();
                    return Err(failed(&format!("is an error: {text}")));
                }
                Ok(Some(Packet::Data(found))) if found.starts_with(b"ERR ") => {
                    let text = pktline::text(&found[4..]).to_str_lossy();
                    return Err(failed(&format!("is an error: {text}")));
                }
                Ok(None) | Err(PacketError::Truncated { .. }) => match answer.next().await {
                    Some(Ok(more)) => begun.extend_from_slice(&more),
                    _ => return Err(failed("broke off")),
                },
                _ => return Err(failed("does not begin as expected")),
            }
        };
        begun.advance(length);
    }
    let begun = futures_util::stream::iter([Ok(begun.freeze())]);
    Ok(begun.chain(answer).boxed())
}

fn is_same(ours: Packet<'_>, theirs: Packet<'_>) -> bool {
    match (ours, theirs) {
        (Packet::Data(ours), Packet::Data(theirs)) => pktline::text(ours) == pktline::text(theirs),
        (ours, theirs) => ours == theirs,
    }
}

/// Leaves out of an upstream's lists of references and capabilities what the mirror will not have: it may be there when the
/// client comes back for what it has seen. Takes the answer to `info/refs` or to `ls-refs`, and passes it on as it comes.
/// `told` hears what stays of the features of `fetch`.
pub fn only_mirrored(
    list: Response,
    is_mirrored: impl Fn(&[u8]) -> bool + Send + 'static,
    told: impl Fn(&[u8]) + Send + 'static,
) -> Response {
    list.map(|body| {
        let mut references = References::default();
        let kept = body
            .into_data_stream()
            .map(move |bytes| references.keep(&bytes?, &is_mirrored, &told));
        Body::from_stream(kept)
    })
}

/// A list of references, or of capabilities of version 2, of which some stay.
#[derive(Default)]
struct References {
    /// The beginning of a packet.
    begun: Vec<u8>,
    /// It is one of capabilities.
    is_version_2: bool,
    /// Up to version 1 they stand behind the first name. Where that is left out, they belong behind the next.
    capabilities: Option<Vec<u8>>,
}

impl References {
    /// What stays of the packets that are whole with `bytes`.
    fn keep(
        &mut self,
        bytes: &[u8],
        is_mirrored: &impl Fn(&[u8]) -> bool,
        told: &impl Fn(&[u8]),
    ) -> Result<Vec<u8>, BoxError> {
        self.begun.extend_from_slice(bytes);
        let mut kept = Vec::new();
        let mut packets = Packets::new(&self.begun);
        loop {
            let rest = packets.rest();
            let packet = match packets.next_packet() {
                Ok(Some(packet)) => packet,
                Ok(None) | Err(PacketError::Truncated { .. }) => {
                    let done = self.begun.len() - rest.len();
                    self.begun.drain(..done);
                    return Ok(kept);
                }
                Err(error) => return Err(error.into()),
            };
            let whole = &rest[..rest.len() - packets.rest().len()];
            let Packet::Data(data) = packet else {
                write_none(&mut kept, self.capabilities.take())?;
                kept.extend_from_slice(whole);
                continue;
            };
            let line = pktline::text(data);
            if self.is_version_2 {
                if let Some(common) = in_common(line) {
                    if let Some(features) = common.strip_prefix(b"fetch=") {
                        told(features);
                    }
                    pktline::write_data(&mut kept, &[&common, b"\n".as_slice()].concat())?;
                }
                continue;
            }
            self.is_version_2 = line == VERSION_2.as_bytes();
            let (line, capabilities) = match line.split_once_str("\0") {
                Some((line, capabilities)) => (line, Some(capabilities)),
                None => (line, None),
            };
            let is_other =
                |name: &[u8]| name != b"HEAD" && name != b"capabilities" && !is_mirrored(name);
            let name = name_of(line);
            if name.is_some_and(is_other) {
                if let Some(capabilities) = capabilities {
                    self.capabilities = Some(capabilities.to_vec());
                }
                continue;
            }
            match self.capabilities.take_if(|_| name.is_some()) {
                Some(capabilities) => write_first(&mut kept, line, &capabilities)?,
                None => {
                    write_none(&mut kept, self.capabilities.take())?;
                    kept.extend_from_slice(whole);
                }
            }
        }
    }
}

/// Capabilities for which no reference is left.
fn write_none(out: &mut Vec<u8>, capabilities: Option<Vec<u8>>) -> Result<(), pktline::TooLong> {
    let Some(capabilities) = capabilities else {
        return Ok(());
    };
    let none = format!("{} capabilities^{{}}", ObjectId::null(gix_hash::Kind::Sha1));
    write_first(out, none.as_bytes(), &capabilities)
}

/// The reference that a line tells of: `<id> <name>`, in version 2 with attributes, before that also as `<name>^{}`.
/// Every other line begins with a word: `unborn`, `shallow`, `version`, `ERR`, or a capability.
fn name_of(line: &[u8]) -> Option<&[u8]> {
    let (id, rest) = line.split_once_str(" ")?;
    ObjectId::from_hex(id).ok()?;
    let name = rest.split(|byte| *byte == b' ').next()?;
    Some(name.strip_suffix(b"^{}").unwrap_or(name))
}

fn write_first(
    out: &mut Vec<u8>,
    line: &[u8],
    capabilities: &[u8],
) -> Result<(), pktline::TooLong> {
    pktline::write_data(out, &[line, b"\0", capabilities, b"\n"].concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::upload_pack::pktline::FLUSH;

    const ID: &str = "1111111111111111111111111111111111111111";

    /// What of a list is passed on where branches and tags are mirrored. `flush` stands for a flush.
    fn kept(lines: &[&str]) -> Vec<String> {
        let mut list = Vec::new();
        for line in lines {
            match *line {
                "flush" => list.extend_from_slice(FLUSH),
                line => pktline::write_line(&mut list, &line.replace("ID", ID)),
            }
        }
        let is_mirrored =
            |name: &[u8]| name.starts_with(b"refs/heads/") || name.starts_with(b"refs/tags/");
        // However it is cut into pieces.
        let in_pieces_of = |size| -> Vec<u8> {
            let mut references = References::default();
            list.chunks(size)
                .flat_map(|piece| references.keep(piece, &is_mirrored, &|_| ()).unwrap())
                .collect()
        };
        let whole = in_pieces_of(list.len());
        for size in [1, 3, 50] {
            assert_eq!(in_pieces_of(size), whole);
        }
        let mut packets = Packets::new(&whole);
        let mut kept = Vec::new();
        while let Some(packet) = packets.next_packet().unwrap() {
            kept.push(match packet {
                Packet::Data(data) => {
                    String::from_utf8_lossy(pktline::text(data)).replace(ID, "ID")
                }
                _ => "flush".to_owned(),
            });
        }
        kept
    }

    #[test]
    fn of_version_2_references_are_left_out() {
        assert_eq!(
            kept(&[
                "ID HEAD symref-target:refs/heads/main",
                "ID refs/changes/1/head",
                "ID refs/heads/main",
                "ID refs/headsman peeled:ID",
                "ID refs/pull/1/head",
                "ID refs/tags/v1 peeled:ID",
                "flush",
            ]),
            [
                "ID HEAD symref-target:refs/heads/main",
                "ID refs/heads/main",
                "ID refs/tags/v1 peeled:ID",
                "flush",
            ]
        );
        let nothing = ["unborn HEAD symref-target:refs/heads/main", "flush"];
        assert_eq!(kept(&nothing), nothing);
    }

    #[test]
    fn of_version_2_what_is_implemented_stays() {
        let list = |lines: &[&'static str]| kept(&[&["version 2"], lines, &["flush"]].concat());
        let expected = |lines: &[&'static str]| [&["version 2"], lines, &["flush"]].concat();
        let common = [
            "agent=git/2",
            "ls-refs=unborn",
            "fetch=shallow filter",
            "server-option",
            "object-format=sha256",
        ];
        assert_eq!(list(&common), expected(&common));
        assert_eq!(
            list(&[
                "agent=git/2",
                "ls-refs=unborn peel-all",
                "fetch=shallow sideband-all filter packfile-uris",
                "server-option",
                "object-info",
                "bundle-uri",
                "session-id=1",
                "promisor-remote=url=x",
            ]),
            expected(&[
                "agent=git/2",
                "ls-refs=unborn",
                "fetch=shallow sideband-all filter",
                "server-option",
            ])
        );
        let plain = ["ls-refs", "fetch"];
        assert_eq!(list(&plain), expected(&plain));
        assert_eq!(list(&["fetch=packfile-uris"]), expected(&["fetch="]));
    }

    #[test]
    fn of_version_0_capabilities_stay() {
        let begin = ["# service=git-upload-pack", "flush", "version 1"];
        let list = |lines: &[&str]| kept(&[&begin, lines, &["flush"]].concat());
        let expected = |lines: &[&'static str]| [&begin, lines, &["flush"]].concat();
        assert_eq!(
            list(&[
                "ID HEAD\0thin-pack agent=git/2",
                "ID refs/heads/main",
                "ID refs/pull/1/head",
                "ID refs/pull/1/tag^{}",
                "ID refs/tags/v1^{}",
                "shallow ID",
            ]),
            expected(&[
                "ID HEAD\0thin-pack agent=git/2",
                "ID refs/heads/main",
                "ID refs/tags/v1^{}",
                "shallow ID",
            ])
        );
        assert_eq!(
            list(&[
                "ID refs/changes/1\0thin-pack",
                "ID refs/changes/2",
                "ID refs/heads/main",
                "ID refs/heads/next",
            ]),
            expected(&["ID refs/heads/main\0thin-pack", "ID refs/heads/next"])
        );
        let nothing = "0000000000000000000000000000000000000000 capabilities^{}\0thin-pack";
        assert_eq!(
            list(&["ID refs/changes/1\0thin-pack"]),
            expected(&[nothing])
        );
        assert_eq!(
            list(&["ID refs/changes/1\0thin-pack", "shallow ID"]),
            expected(&[nothing, "shallow ID"])
        );
        assert_eq!(list(&[nothing]), expected(&[nothing]));
    }

    #[tokio::test]
    async fn what_the_client_has_is_not_sent_again() {
        let behind = async |head: &[u8], pieces: &[&'static str]| {
            let pieces: Vec<_> = pieces.iter().copied().map(Ok::<_, BoxError>).collect();
            let body = Body::from_stream(futures_util::stream::iter(pieces));
            let rest = behind(head, Response::new(body)).await;
            let rest = rest.map_err(|error| error.to_string())?;
            let rest: Vec<Bytes> = rest.map(Result::unwrap).collect().await;
            Ok::<_, String>(String::from_utf8(rest.concat()).unwrap())
        };
        let head = b"0010wanted-refs\n0001000dpackfile\n";
        for answer in [
            &["0010wanted-refs\n0001000dpackfile\n0007\x01PA", "CK"][..],
            &["00", "10wanted-refs\n000", "1000cpackfile0007", "\x01PACK"],
        ] {
            let rest = behind(head, answer).await.unwrap();
            assert_eq!(rest, "0007\x01PACK", "{answer:?}");
        }
        assert_eq!(behind(b"", &["all ", "of it"]).await.unwrap(), "all of it");
        // With `sideband-all`.
        let banded = sideband::wrapped(head);
        let answer = [
            "0011\x01wanted-refs\n0001000c\x022 of 3\n",
            "000e\x01packfile\n0007\x01PA",
        ];
        assert_eq!(behind(&banded, &answer).await.unwrap(), "0007\x01PA");
        let answer = ["0011\x01wanted-refs\n00010010\x03not our ref"];
        let error = behind(&banded, &answer).await.unwrap_err();
        assert!(error.contains("is an error: not our ref"), "{error}");
        for (answer, expected) in [
            (&["0010wanted-refs\n0001"][..], "broke off"),
            (&["000dpackfile\n"], "does not begin as expected"),
            (&["<html>"], "does not begin as expected"),
            (&["0013ERR not our ref"], "not our ref"),
        ] {
            let error = behind(head, answer).await.unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn what_a_client_was_told_that_fetch_can_do() {
        let told = std::cell::RefCell::default();
        let mut list = Vec::new();
        for line in [
            VERSION_2,
            "agent=git/2",
            "fetch=shallow sideband-all packfile-uris",
        ] {
            pktline::write_line(&mut list, line);
        }
        let tell = |features: &[u8]| *told.borrow_mut() = features.to_vec();
        References::default().keep(&list, &|_| true, &tell).unwrap();
        assert_eq!(told.into_inner(), b"shallow sideband-all");
    }

    #[test]
    fn what_is_no_list_is_not_passed_on() {
        let kept = References::default().keep(b"zzzz no packets", &|_| true, &|_| ());
        assert!(kept.is_err());
    }
}
