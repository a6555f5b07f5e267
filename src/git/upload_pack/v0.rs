//! Protocol versions 0 and 1 (gitprotocol-pack). Version 1 differs only in the advertisement.

use gix_hash::ObjectId;
use gix_object::bstr::ByteSlice;

use super::advertise::WantPolicy;
use super::negotiate::Common;
use super::pktline::{self, FLUSH, Packet, Packets};
use super::plan;
use super::request::{Band, FetchRequest, shown};
use super::{PackResponse, Refusal, Response};
use crate::git::objects::commits::{CommitNumber, Commits};
use crate::git::snapshot::Snapshot;

/// How common commits are acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum MultiAck {
    #[default]
    None,
    Continue,
    Detailed,
}

/// A request of version 0: what is wanted, then haves in batches.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Request {
    pub fetch: FetchRequest,
    /// Where each batch ends in `fetch.haves`: at a flush, the last one perhaps at `done`.
    batch_ends: Vec<usize>,
    multi_ack: MultiAck,
    no_done: bool,
}

/// Git sends one batch in a body. Each is answered with a line at least, and takes a few bytes to send and to keep.
const MAX_BATCHES: usize = 65_536;

/// How a batch of haves ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The client waits for an answer.
    Flush,
    /// The client wants the pack now.
    Done,
}

/// Reads a request as smart HTTP sends it: whole, in one body.
///
/// # Errors
/// [`Refusal::Malformed`] says what was expected and what was found.
pub fn parse(body: &[u8]) -> Result<Request, Refusal> {
    let mut packets = Packets::new(body);
    let mut request = parse_opening(&mut packets)?;
    while !request.fetch.done && request.parse_batch(&mut packets)?.is_some() {}
    Ok(request)
}

/// Reads what a request begins with: what is wanted, up to a flush. An empty body asks for nothing.
///
/// # Errors
/// [`Refusal::Malformed`] says what was expected and what was found.
pub fn parse_opening(packets: &mut Packets<'_>) -> Result<Request, Refusal> {
    let mut request = Request::default();
    let mut first = true;
    loop {
        match packets.next_packet()? {
            Some(Packet::Data(data)) => {
                let mut line = pktline::text(data);
                if std::mem::take(&mut first) {
                    line = request.take_capabilities(line)?;
                }
                if !matches!(
                    line.split_once_str(" "),
                    Some((
                        b"want"
                            | b"shallow"
                            | b"deepen"
                            | b"deepen-since"
                            | b"deepen-not"
                            | b"filter",
                        _
                    ))
                ) || !request.fetch.take_line(line)?
                {
                    return Err(Refusal::Malformed(format!(
                        "expected `want <id>`, found {:?}",
                        shown(line)
                    )));
                }
            }
            Some(Packet::Flush) => return Ok(request),
            None if first => return Ok(request),
            other => {
                return Err(Refusal::Malformed(format!(
                    "expected a want or a flush, found {other:?}"
                )));
            }
        }
    }
}

impl Request {
    /// Reads haves up to the end of their batch; `None` when there is nothing more.
    ///
    /// # Errors
    /// [`Refusal::Malformed`] says what was expected and what was found.
    pub fn parse_batch(&mut self, packets: &mut Packets<'_>) -> Result<Option<End>, Refusal> {
        loop {
            match packets.next_packet()? {
                Some(Packet::Data(data)) => {
                    let line = pktline::text(data);
                    if !(line.starts_with(b"have ") || line == b"done")
                        || !self.fetch.take_line(line)?
                    {
                        return Err(Refusal::Malformed(format!(
                            "expected `have <id>` or `done`, found {:?}",
                            shown(line)
                        )));
                    }
                    if self.fetch.done {
                        self.end_batch()?;
                        return Ok(Some(End::Done));
                    }
                }
                Some(Packet::Flush) => {
                    self.end_batch()?;
                    return Ok(Some(End::Flush));
                }
                None => return Ok(None),
                other => {
                    return Err(Refusal::Malformed(format!(
                        "expected a have or a flush, found {other:?}"
                    )));
                }
            }
        }
    }

    /// Whether the boundary of the client's history is to be told before it goes on.
    pub fn is_answered_at_once(&self) -> bool {
        self.fetch.deepen.is_asked()
    }

    fn end_batch(&mut self) -> Result<(), Refusal> {
        if self.batch_ends.len() >= MAX_BATCHES {
            return Err(Refusal::Malformed(format!(
                "expected at most {MAX_BATCHES} batches of `have` lines, found more"
            )));
        }
        self.batch_ends.push(self.fetch.haves.len());
        Ok(())
    }

    /// The haves of the batch that was read last.
    pub fn last_batch(&self) -> &[ObjectId] {
        match self.batch_ends[..] {
            [.., start, end] => &self.fetch.haves[start..end],
            [end] => &self.fetch.haves[..end],
            [] => &[],
        }
    }

    fn batches(&self) -> impl Iterator<Item = &[ObjectId]> {
        let starts = std::iter::once(&0).chain(&self.batch_ends);
        starts
            .zip(&self.batch_ends)
            .map(|(start, end)| &self.fetch.haves[*start..*end])
    }

    /// Reads the capabilities behind the first want and returns the want.
    fn take_capabilities<'l>(&mut self, line: &'l [u8]) -> Result<&'l [u8], Refusal> {
        // `want <40 digits> capabilities…`
        let end = line.len().min("want ".len() + 40);
        let (want, capabilities) = line.split_at(end);
        for capability in capabilities.split(|byte| *byte == b' ') {
            let fetch = &mut self.fetch;
            match capability {
                b"multi_ack" if self.multi_ack == MultiAck::None => {
                    self.multi_ack = MultiAck::Continue
                }
                b"multi_ack_detailed" => self.multi_ack = MultiAck::Detailed,
                b"no-done" => self.no_done = true,
                b"thin-pack" => fetch.thin_pack = true,
                b"ofs-delta" => fetch.ofs_delta = true,
                b"include-tag" => fetch.include_tag = true,
                b"no-progress" => fetch.no_progress = true,
                b"deepen-relative" => fetch.deepen.relative = true,
                b"side-band" if fetch.band == Band::None => fetch.band = Band::Small,
                b"side-band-64k" => fetch.band = Band::Large,
                other => {
                    if let Some(format) = other.strip_prefix(b"object-format=")
                        && format != b"sha1"
                    {
                        return Err(Refusal::Malformed(format!(
                            "expected object-format=sha1, found {:?}: this repository has SHA-1 objects",
                            shown(format)
                        )));
                    }
                }
            }
        }
        Ok(want)
    }
}

/// What the answer to `request` begins with whatever the mirror holds; `None` where that is not known.
pub fn certain_head(request: &Request) -> Option<Vec<u8>> {
    let fetch = &request.fetch;
    // Without haves, but with flushes, each of these is answered with a NAK of its own.
    let at_once = fetch.done && fetch.haves.is_empty() && request.batch_ends.len() == 1;
    let plain = at_once && !fetch.deepen.is_asked() && !fetch.wants.is_empty();
    (plain && fetch.band != Band::None).then(|| {
        let mut out = Vec::new();
        pktline::write_line(&mut out, "NAK");
        out
    })
}

/// Answers a request that came whole (stateless-rpc).
///
/// # Errors
/// [`Refusal`], whose text goes to the client.
pub fn respond(
    request: &Request,
    snapshot: &Snapshot,
    policy: WantPolicy,
) -> Result<Response, Refusal> {
    let mut out = Vec::new();
    if request.fetch.wants.is_empty() {
        return Ok(Response::without_pack(out));
    }
    let commits = snapshot.commits();
    let mut negotiation = Negotiation::begin(request, snapshot, &commits, policy, &mut out)?;
    let mut pack = None;
    for batch in request.batches() {
        pack = negotiation.take_batch(request, batch, snapshot, &commits, &mut out)?;
        if pack.is_some() {
            break;
        }
    }
    Ok(Response { head: out, pack })
}

/// What the server remembers between batches of haves. On a stream (git over SSH) it lives as long as the connection;
/// over HTTP each request repeats what was said.
pub struct Negotiation {
    wants: Vec<CommitNumber>,
    common: Common,
    ready: bool,
    batches: usize,
}

impl Negotiation {
    /// Checks what is wanted, and tells the boundary of history where that was asked.
    ///
    /// # Errors
    /// [`Refusal`], whose text goes to the client.
    pub fn begin(
        request: &Request,
        snapshot: &Snapshot,
        commits: &Commits,
        policy: WantPolicy,
        out: &mut Vec<u8>,
    ) -> Result<Self, Refusal> {
        let fetch = &request.fetch;
        let wants = plan::check_wants(&fetch.wants, snapshot, commits, policy)?;
        if fetch.deepen.is_asked() {
            plan::plan(fetch, &wants, &Common::none(commits), snapshot, commits)?
                .write_boundary(out);
            out.extend_from_slice(FLUSH);
        }
        Ok(Self {
            wants,
            common: Common::none(commits),
            ready: false,
            batches: 0,
        })
    }

    /// Answers the next batch of `request`; gives the pack when it is time for that.
    ///
    /// # Errors
    /// [`Refusal`], whose text goes to the client.
    pub fn take_batch(
        &mut self,
        request: &Request,
        batch: &[ObjectId],
        snapshot: &Snapshot,
        commits: &Commits,
        out: &mut Vec<u8>,
    ) -> Result<Option<PackResponse>, Refusal> {
        self.batches += 1;
        let (fetch, multi_ack) = (&request.fetch, request.multi_ack);
        let (wants, common) = (&self.wants, &mut self.common);
        let (mut got_common, mut got_other) = (false, false);
        for have in batch {
            if common.take(have, snapshot, commits) {
                got_common = true;
                match multi_ack {
                    MultiAck::Detailed => pktline::write_line(out, &format!("ACK {have} common")),
                    MultiAck::Continue => pktline::write_line(out, &format!("ACK {have} continue")),
                    MultiAck::None if common.commits().len() == 1 => {
                        pktline::write_line(out, &format!("ACK {have}"));
                    }
                    MultiAck::None => {}
                }
            } else {
                got_other = true;
                if multi_ack != MultiAck::None && common.is_enough_for(wants, commits) {
                    let word = if multi_ack == MultiAck::Detailed {
                        "ready"
                    } else {
                        "continue"
                    };
                    self.ready |= multi_ack == MultiAck::Detailed;
                    pktline::write_line(out, &format!("ACK {have} {word}"));
                }
            }
        }
        if fetch.done && self.batches == request.batch_ends.len() {
            match common.last() {
                None => pktline::write_line(out, "NAK"),
                Some(last) if multi_ack != MultiAck::None => {
                    pktline::write_line(out, &format!("ACK {last}"))
                }
                Some(_) => {}
            }
            return self.pack(fetch, snapshot, commits).map(Some);
        }
        // The batch ended with a flush.
        if multi_ack == MultiAck::Detailed
            && got_common
            && !got_other
            && common.is_enough_for(wants, commits)
            && let Some(last) = common.last()
        {
            self.ready = true;
            pktline::write_line(out, &format!("ACK {last} ready"));
        }
        if common.is_empty() || multi_ack != MultiAck::None {
            pktline::write_line(out, "NAK");
        }
        if request.no_done
            && self.ready
            && let Some(last) = common.last()
        {
            pktline::write_line(out, &format!("ACK {last}"));
            return self.pack(fetch, snapshot, commits).map(Some);
        }
        Ok(None)
    }

    fn pack(
        &self,
        fetch: &FetchRequest,
        snapshot: &Snapshot,
        commits: &Commits,
    ) -> Result<PackResponse, Refusal> {
        let plan = plan::plan(fetch, &self.wants, &self.common, snapshot, commits)?;
        Ok(PackResponse {
            plan,
            band: fetch.band,
            progress: !fetch.no_progress,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::upload_pack::fixture::Repository;

    const ID: &str = "1111111111111111111111111111111111111111";

    fn body(lines: &[&str]) -> Vec<u8> {
        let mut body = Vec::new();
        for line in lines {
            if *line == "0000" {
                body.extend_from_slice(FLUSH)
            } else {
                pktline::write_line(&mut body, line)
            }
        }
        body
    }

    #[test]
    fn libgit2s_request_is_read() {
        let want =
            format!("want {ID} multi_ack_detailed side-band-64k include-tag thin-pack ofs-delta ");
        let have = format!("have {ID}");
        let request = parse(&body(&[&want, "0000", &have, "0000", &have, "done"])).unwrap();
        assert_eq!(
            request.batches().map(<[_]>::len).collect::<Vec<_>>(),
            [1, 1]
        );
        assert_eq!(request.multi_ack, MultiAck::Detailed);
        assert!(request.fetch.done && request.fetch.thin_pack && request.fetch.include_tag);
        assert_eq!(request.fetch.band, Band::Large);
    }

    #[test]
    fn flushes_have_a_number() {
        let mut request = body(&[&format!("want {ID}"), "0000"]);
        request.extend(FLUSH.repeat(MAX_BATCHES));
        assert_eq!(parse(&request).unwrap().batches().count(), MAX_BATCHES);
        request.extend_from_slice(FLUSH);
        let refusal = parse(&request).unwrap_err().to_string();
        assert!(refusal.contains("65536 batches"), "{refusal}");
    }

    #[test]
    fn what_is_no_request_is_refused_with_what_was_expected() {
        let want = format!("want {ID}");
        for lines in [
            &["hello"][..],
            &[&want],
            &[&want, "0000", "want x"],
            &["want 12", "0000"],
            &[&want, "0000", "nope"],
        ] {
            let refusal = parse(&body(lines)).unwrap_err().to_string();
            assert!(refusal.contains("expected"), "{lines:?}: {refusal}");
        }
    }

    #[test]
    fn what_is_certain_is_what_the_answer_begins_with() {
        let mut repository = Repository::new();
        let line = repository.line(3);
        let snapshot = repository.snapshot(&[("refs/heads/main", line[2])]);
        let band = format!("want {} side-band-64k", line[2]);
        let bare = format!("want {}", line[2]);
        let have = format!("have {}", line[0]);
        let shallow = format!("shallow {}", line[1]);
        let cases: &[(&[&str], bool)] = &[
            (&[&band, "0000", "done"], true),
            (&[&band, &shallow, "0000", "done"], true),
            (&[&band, "filter blob:none", "0000", "done"], true),
            (&[&bare, "0000", "done"], false),
            (&[&band, "0000"], false),
            (&[&band, "0000", "0000", "done"], false),
            (&[&band, "deepen 1", "0000", "done"], false),
            (&[&band, &shallow, "deepen 2", "0000", "done"], false),
            (&[&band, "0000", &have, "done"], false),
            (&["0000"], false),
        ];
        for (lines, certain) in cases {
            let request = parse(&body(lines)).unwrap();
            let head = certain_head(&request);
            assert_eq!(head.is_some(), *certain, "{lines:?}");
            let answer = respond(&request, &snapshot, WantPolicy::Reachable).unwrap();
            if let Some(head) = head {
                assert_eq!(head, answer.head, "{lines:?}");
            }
        }
    }
}
