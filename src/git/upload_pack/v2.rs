//! Protocol version 2 (gitprotocol-v2): commands `ls-refs` and `fetch`.

use gix_hash::ObjectId;
use gix_object::bstr::{BString, ByteSlice};

use super::advertise::{LsRefs, MAX_PREFIXES, Prefixes, WantPolicy};
use super::negotiate::Common;
use super::pktline::{self, DELIM, FLUSH, Packet, Packets};
use super::plan;
use super::request::{Band, FetchRequest, MAX_IDS, check_room, shown};
use super::{PackResponse, Refusal, Response, sideband};
use crate::git::refs::Refs;
use crate::git::snapshot::Snapshot;

/// A request of version 2.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    LsRefs(LsRefs),
    Fetch(Box<FetchRequest>),
    /// A flush alone: the client says goodbye.
    Nothing,
}

/// Reads one request.
///
/// # Errors
/// [`Refusal::Malformed`] says what was expected and what was found.
pub fn parse(body: &[u8]) -> Result<Command, Refusal> {
    let mut packets = Packets::new(body);
    let command = match packets.next_packet()? {
        None | Some(Packet::Flush) => return Ok(Command::Nothing),
        Some(Packet::Data(data)) => pktline::text(data),
        Some(other) => {
            return Err(Refusal::Malformed(format!(
                "expected a command, found {other:?}"
            )));
        }
    };
    let name = command.strip_prefix(b"command=").ok_or_else(|| {
        Refusal::Malformed(format!("expected `command=…`, found {:?}", shown(command)))
    })?;
    match name {
        b"ls-refs" => parse_ls_refs(packets).map(Command::LsRefs),
        b"fetch" => parse_fetch(packets).map(|request| Command::Fetch(Box::new(request))),
        _ => Err(Refusal::Malformed(format!(
            "expected the command ls-refs or fetch, found {:?}",
            shown(name)
        ))),
    }
}

/// Reads capabilities and then arguments to the end; gives each argument to `take` at once, since there may be
/// millions.
fn for_each_argument<'a>(
    mut packets: Packets<'a>,
    mut take: impl FnMut(&'a [u8]) -> Result<(), Refusal>,
) -> Result<(), Refusal> {
    if !parse_capabilities(&mut packets)? {
        return Ok(());
    }
    loop {
        match packets.next_packet()? {
            Some(Packet::Data(data)) => take(pktline::text(data))?,
            Some(Packet::Flush) => return Ok(()),
            other => {
                return Err(Refusal::Malformed(format!(
                    "expected an argument or a flush, found {other:?}"
                )));
            }
        }
    }
}

/// Reads capabilities; true when arguments follow.
fn parse_capabilities(packets: &mut Packets<'_>) -> Result<bool, Refusal> {
    loop {
        match packets.next_packet()? {
            Some(Packet::Data(data)) => {
                if pktline::text(data).starts_with(b"command=") {
                    return Err(Refusal::Malformed(
                        "expected one command, found two".to_owned(),
                    ));
                }
                // What we do not know we do not need: `agent`, `session-id`, `server-option`.
                if let Some(format) = pktline::text(data).strip_prefix(b"object-format=")
                    && format != b"sha1"
                {
                    return Err(Refusal::Malformed(format!(
                        "expected object-format=sha1, found {:?}: this repository has SHA-1 objects",
                        shown(format)
                    )));
                }
            }
            Some(Packet::Delim) => return Ok(true),
            Some(Packet::Flush) => return Ok(false),
            other => {
                return Err(Refusal::Malformed(format!(
                    "expected a capability, found {other:?}"
                )));
            }
        }
    }
}

fn parse_ls_refs(packets: Packets<'_>) -> Result<LsRefs, Refusal> {
    let mut request = LsRefs::default();
    let mut prefixes = Some(Vec::new());
    for_each_argument(packets, |argument| {
        match argument {
            b"symrefs" => request.symrefs = true,
            b"peel" => request.peel = true,
            b"unborn" => request.unborn = true,
            other => {
                if let Some(prefix) = other.strip_prefix(b"ref-prefix ")
                    && let Some(some) = &mut prefixes
                {
                    some.push(prefix.into());
                    if some.len() > MAX_PREFIXES {
                        prefixes = None;
                    }
                }
            }
        }
        Ok(())
    })?;
    request.prefixes = Prefixes::new(prefixes.unwrap_or_default());
    Ok(request)
}

fn parse_fetch(packets: Packets<'_>) -> Result<FetchRequest, Refusal> {
    let mut request = FetchRequest {
        band: Band::Large,
        ..FetchRequest::default()
    };
    for_each_argument(packets, |argument| {
        match argument {
            b"thin-pack" => request.thin_pack = true,
            b"ofs-delta" => request.ofs_delta = true,
            b"include-tag" => request.include_tag = true,
            b"no-progress" => request.no_progress = true,
            b"wait-for-done" => request.wait_for_done = true,
            b"sideband-all" => request.sideband_all = true,
            b"deepen-relative" => request.deepen.relative = true,
            line => {
                if let Some(name) = line.strip_prefix(b"want-ref ") {
                    check_room(request.want_refs.len(), MAX_IDS, "want-ref")?;
                    request.want_refs.push(name.into());
                } else if !request.take_line(line)? {
                    return Err(Refusal::Malformed(format!(
                        "expected an argument of fetch, found {:?}",
                        shown(line)
                    )));
                }
            }
        }
        Ok(())
    })?;
    refuse_doubles(&request.want_refs)?;
    Ok(request)
}

fn refuse_doubles(want_refs: &[BString]) -> Result<(), Refusal> {
    let mut names: Vec<&BString> = want_refs.iter().collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Refusal::Malformed(format!(
            "expected each `want-ref` once, found {:?} twice",
            shown(pair[0])
        ))),
        None => Ok(()),
    }
}

/// Whether an answer to `request` can begin whatever objects the mirror holds.
pub fn has_certain_head(request: &FetchRequest) -> bool {
    let asks = !request.wants.is_empty() || !request.want_refs.is_empty();
    asks && (is_plain(request) || request.sideband_all)
}

/// Whether references alone tell what comes before the pack.
fn is_plain(request: &FetchRequest) -> bool {
    // Who is done is told of no haves; where history ends, the objects say.
    (request.haves.is_empty() || request.done)
        && request.shallow.is_empty()
        && !request.deepen.is_asked()
}

/// What the answer to `request` begins with whatever objects the mirror holds, where its references are `refs`, and the
/// objects that this tells of. That is nothing where only `sideband-all` lets progress come first; `None` where nothing
/// may be sent. Takes processor time: references are many.
pub fn certain_head(request: &FetchRequest, refs: &Refs) -> Option<(Vec<u8>, Vec<ObjectId>)> {
    if !has_certain_head(request) {
        return None;
    }
    if !is_plain(request) {
        return Some(Default::default());
    }
    let (ids, mut out) = resolve(&request.want_refs, refs).ok()?;
    pktline::write_line(&mut out, "packfile");
    let head = match request.sideband_all {
        true => sideband::wrapped(&out),
        false => out,
    };
    Some((head, ids))
}

/// The objects that references come to which are wanted by name, and the section that tells of them.
///
/// # Errors
/// [`Refusal::UnknownRef`] for the first that is not there.
fn resolve(want_refs: &[BString], refs: &Refs) -> Result<(Vec<ObjectId>, Vec<u8>), Refusal> {
    let (mut ids, mut section) = (Vec::with_capacity(want_refs.len()), Vec::new());
    if want_refs.is_empty() {
        return Ok((ids, section));
    }
    pktline::write_line(&mut section, "wanted-refs");
    for name in want_refs {
        let target = match name.as_bytes() {
            b"HEAD" => refs.head_id(),
            _ => refs.names.get(name).map(|target| target.id),
        };
        let unknown = || Refusal::UnknownRef(name.clone());
        let id = target.ok_or_else(unknown)?;
        ids.push(id);
        // What fits into no line is not advertised either. In the side band a line is shorter by one.
        let line = [format!("{id} ").as_bytes(), name, b"\n"].concat();
        if line.len() > sideband::LARGE_PAYLOAD {
            return Err(unknown());
        }
        pktline::write_data(&mut section, &line).map_err(|_| unknown())?;
    }
    section.extend_from_slice(DELIM);
    Ok((ids, section))
}

/// Answers `fetch`.
///
/// # Errors
/// [`Refusal`], whose text goes to the client.
pub fn fetch(
    request: FetchRequest,
    snapshot: &Snapshot,
    policy: WantPolicy,
) -> Result<Response, Refusal> {
    let sideband_all = request.sideband_all;
    let mut response = respond(request, snapshot, policy)?;
    if sideband_all {
        response.head = sideband::wrapped(&response.head);
    }
    Ok(response)
}

fn respond(
    mut request: FetchRequest,
    snapshot: &Snapshot,
    policy: WantPolicy,
) -> Result<Response, Refusal> {
    let mut out = Vec::new();
    let (ids, wanted_refs) = resolve(&request.want_refs, &snapshot.refs)?;
    request.wants.extend(ids);
    if request.wants.is_empty() && !request.wait_for_done {
        return Ok(Response::without_pack(out));
    }

    let commits = snapshot.commits();
    let wants = plan::check_wants(&request.wants, snapshot, &commits, policy)?;
    let mut common = Common::none(&commits);
    let acknowledged: Vec<_> = request
        .haves
        .iter()
        .filter(|have| common.take(have, snapshot, &commits))
        .copied()
        .collect();
    if !request.haves.is_empty() && !request.done {
        pktline::write_line(&mut out, "acknowledgments");
        if acknowledged.is_empty() {
            pktline::write_line(&mut out, "NAK");
        }
        for have in &acknowledged {
            pktline::write_line(&mut out, &format!("ACK {have}"));
        }
        if request.wait_for_done || !common.is_enough_for(&wants, &commits) {
            out.extend_from_slice(FLUSH);
            return Ok(Response::without_pack(out));
        }
        pktline::write_line(&mut out, "ready");
        out.extend_from_slice(DELIM);
    }

    let plan = plan::plan(&request, &wants, &common, snapshot, &commits)?;
    if !request.shallow.is_empty() || request.deepen.is_asked() {
        pktline::write_line(&mut out, "shallow-info");
        plan.write_boundary(&mut out);
        out.extend_from_slice(DELIM);
    }
    out.extend_from_slice(&wanted_refs);
    pktline::write_line(&mut out, "packfile");
    let pack = PackResponse {
        plan,
        band: request.band,
        progress: !request.no_progress,
    };
    Ok(Response {
        head: out,
        pack: Some(pack),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::upload_pack::fixture::Repository;

    fn request(lines: &[&str]) -> Vec<u8> {
        let mut body = Vec::new();
        for line in lines {
            match *line {
                "0001" => body.extend_from_slice(DELIM),
                "0000" => body.extend_from_slice(FLUSH),
                line => pktline::write_line(&mut body, line),
            }
        }
        body
    }

    #[test]
    fn commands_are_read() {
        let body = request(&[
            "command=ls-refs",
            "agent=git/2",
            "0001",
            "peel",
            "ref-prefix refs/heads/",
            "0000",
        ]);
        let expected = LsRefs {
            peel: true,
            prefixes: Prefixes::new(vec!["refs/heads/".into()]),
            ..LsRefs::default()
        };
        assert_eq!(parse(&body).unwrap(), Command::LsRefs(expected));
        assert_eq!(parse(b"0000").unwrap(), Command::Nothing);
        let body = request(&[
            "command=fetch",
            "object-format=sha1",
            "0001",
            "thin-pack",
            "done",
            "0000",
        ]);
        assert!(
            matches!(parse(&body).unwrap(), Command::Fetch(fetch) if fetch.thin_pack && fetch.done)
        );
    }

    #[test]
    fn what_is_no_request_is_refused_with_what_was_expected() {
        for lines in [
            &["hello", "0000"][..],
            &["command=push", "0000"],
            &["command=fetch", "object-format=sha256", "0000"],
            &["command=fetch", "0001", "make-me-a-sandwich", "0000"],
            &["command=fetch", "0001", "done"],
            &["0001"],
        ] {
            let refusal = parse(&request(lines)).unwrap_err().to_string();
            assert!(refusal.contains("expected"), "{lines:?}: {refusal}");
        }
    }

    #[test]
    fn a_reference_is_wanted_once_and_not_too_many_are() {
        let many = |number| {
            let names = (0..number).map(|nth| format!("want-ref refs/heads/{nth}"));
            let lines: Vec<String> = ["command=fetch", "0001"]
                .map(String::from)
                .into_iter()
                .chain(names)
                .chain(["0000".to_owned()])
                .collect();
            parse(&request(
                &lines.iter().map(String::as_str).collect::<Vec<_>>(),
            ))
        };
        assert!(
            matches!(many(MAX_IDS).unwrap(), Command::Fetch(fetch) if fetch.want_refs.len() == MAX_IDS)
        );
        let refusal = many(MAX_IDS + 1).unwrap_err().to_string();
        assert!(refusal.contains("at most 262144 `want-ref`"), "{refusal}");

        let twice = [
            "command=fetch",
            "0001",
            "want-ref a",
            "want-ref b",
            "want-ref a",
            "0000",
        ];
        let refusal = parse(&request(&twice)).unwrap_err().to_string();
        assert!(refusal.contains("\"a\" twice"), "{refusal}");
    }

    #[test]
    fn too_many_prefixes_are_as_good_as_none() {
        let mut body = request(&["command=ls-refs", "0001"]);
        for nth in 0..2 * MAX_PREFIXES {
            pktline::write_line(&mut body, &format!("ref-prefix {nth}"));
        }
        pktline::write_line(&mut body, "peel");
        body.extend_from_slice(FLUSH);
        let expected = LsRefs {
            peel: true,
            ..LsRefs::default()
        };
        assert_eq!(parse(&body).unwrap(), Command::LsRefs(expected));
    }

    #[test]
    fn what_is_certain_is_what_the_answer_begins_with() {
        let mut repository = Repository::new();
        let line = repository.line(3);
        let snapshot = repository.snapshot(&[("refs/heads/main", line[2])]);
        let want = format!("want {}", line[2]);
        let have = format!("have {}", line[0]);
        let shallow = format!("shallow {}", line[1]);
        let cases: &[(&[&str], bool)] = &[
            (&[&want, "done"], true),
            (&[&want], true),
            (&[&want, "wait-for-done"], true),
            (&[&want, "deepen-relative", "filter tree:0", "done"], true),
            (&[&want, &have, "done"], true),
            (&[&want, &have], false),
            (&[&want, &shallow, "done"], false),
            (&[&want, "deepen 1", "done"], false),
            (&["want-ref refs/heads/main", "done"], true),
            (&["want-ref refs/heads/main", "want-ref HEAD", &want], true),
            (&["want-ref HEAD", &have, "done"], true),
            (&["want-ref HEAD", &have], false),
            (&["want-ref HEAD", "deepen 1", "done"], false),
            (&["done"], false),
        ];
        for (arguments, certain) in cases {
            let lines = [&["command=fetch", "0001"], *arguments, &["0000"]].concat();
            let Command::Fetch(asked) = parse(&request(&lines)).unwrap() else {
                panic!("{arguments:?}");
            };
            let head = certain_head(&asked, &snapshot.refs);
            assert_eq!(head.is_some(), *certain, "{arguments:?}");
            let answer = fetch(*asked, &snapshot, WantPolicy::Reachable).unwrap();
            if let Some((head, _)) = head {
                assert_eq!(head, answer.head, "{arguments:?}");
            }

            // Where the whole answer comes in the band, all but nothing can begin.
            let lines = [&lines[..2], &["sideband-all"], &lines[2..]].concat();
            let Command::Fetch(asked) = parse(&request(&lines)).unwrap() else {
                panic!("{arguments:?}");
            };
            let head = certain_head(&asked, &snapshot.refs).map(|(head, _)| head);
            let wrapped = sideband::wrapped(&answer.head);
            let expected = match *certain {
                true => Some(wrapped.clone()),
                false => (*arguments != ["done"]).then(Vec::new),
            };
            assert_eq!(head, expected, "{arguments:?}");
            let answer = fetch(*asked, &snapshot, WantPolicy::Reachable).unwrap();
            assert_eq!(answer.head, wrapped, "{arguments:?}");
        }
        // It may be there once the upstream is asked again.
        let unknown = FetchRequest {
            want_refs: vec!["refs/heads/absent".into()],
            ..FetchRequest::default()
        };
        assert_eq!(certain_head(&unknown, &snapshot.refs), None);
    }
}
