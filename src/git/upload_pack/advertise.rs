//! What the server tells before it is asked: capabilities and references.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use gix_hash::ObjectId;
use gix_object::bstr::BString;

use super::pktline::{self, FLUSH};
use super::{AGENT, Version};
use crate::git::refs::{Head, Refs};

/// What may be wanted beyond the tips of references, as version 0 has to say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WantPolicy {
    Advertised,
    Reachable,
}

/// The arguments of `ls-refs`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct LsRefs {
    pub symrefs: bool,
    pub peel: bool,
    pub unborn: bool,
    /// Only references that begin with one of these; all without any.
    pub prefixes: Vec<BString>,
}

/// More prefixes than this are as good as none: everything is listed, which the protocol allows.
pub const MAX_PREFIXES: usize = 65_536;

/// The branch that HEAD names is a capability, if it has at most so many bytes: capabilities share a packet with the
/// first reference.
const LONGEST_SYMREF: usize = 1024;

/// Finished advertisements of one snapshot: the bytes are the same for all who ask until a reference changes.
#[derive(Default)]
pub struct Advertisements {
    v0: Mutex<HashMap<(Version, WantPolicy), Bytes>>,
    ls_refs: Mutex<HashMap<LsRefs, Bytes>>,
}

/// Builders ask in a handful of ways; what comes after these is made anew each time.
const KEPT_LISTS: usize = 32;

impl Advertisements {
    /// The advertisement of versions 0 and 1: references, with the capabilities behind the first.
    pub fn v0(&self, refs: &Refs, version: Version, policy: WantPolicy) -> Bytes {
        let mut kept = self.v0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.entry((version, policy))
            .or_insert_with(|| advertise_v0(refs, version, policy).into())
            .clone()
    }

    /// The answer to `ls-refs`.
    pub fn ls_refs(&self, refs: &Refs, arguments: &LsRefs) -> Bytes {
        let mut kept = self.ls_refs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(list) = kept.get(arguments) {
            return list.clone();
        }
        let list = Bytes::from(list_refs(refs, arguments));
        if kept.len() < KEPT_LISTS {
            kept.insert(arguments.clone(), list.clone());
        }
        list
    }
}

/// The capability advertisement of version 2. It names no reference, so it is the same for every repository.
pub fn advertise_v2() -> Vec<u8> {
    let mut out = Vec::new();
    for line in [
        "version 2",
        AGENT,
        "ls-refs=unborn",
        "fetch=shallow wait-for-done filter ref-in-want",
        "object-format=sha1",
    ] {
        pktline::write_line(&mut out, line);
    }
    out.extend_from_slice(FLUSH);
    out
}

fn advertise_v0(refs: &Refs, version: Version, policy: WantPolicy) -> Vec<u8> {
    let mut out = Vec::new();
    if version == Version::V1 {
        pktline::write_line(&mut out, "version 1");
    }
    let mut capabilities = Vec::from(
        b"multi_ack thin-pack side-band side-band-64k ofs-delta shallow deepen-since deepen-not deepen-relative \
         no-progress include-tag multi_ack_detailed allow-tip-sha1-in-want",
    );
    if policy == WantPolicy::Reachable {
        capabilities.extend_from_slice(b" allow-reachable-sha1-in-want");
    }
    capabilities.extend_from_slice(b" no-done");
    if let Head::Branch(name) = &refs.head
        && refs.head_id().is_some()
        && name.len() <= LONGEST_SYMREF
    {
        capabilities.extend_from_slice(b" symref=HEAD:");
        capabilities.extend_from_slice(name);
    }
    capabilities.extend_from_slice(format!(" filter object-format=sha1 {AGENT}").as_bytes());

    let head = refs.head_id().map(|id| (b"HEAD".as_slice(), id, None));
    let others = refs
        .names
        .iter()
        .map(|(name, target)| (name.as_slice(), target.id, target.peeled));
    // They stand behind the first name that is written.
    let mut capabilities = Some(capabilities);
    let mut line = |name: &[u8], id: ObjectId| {
        let mut data = format!("{id} ").into_bytes();
        data.extend_from_slice(name);
        if let Some(capabilities) = &capabilities {
            data.push(0);
            data.extend_from_slice(capabilities);
        }
        if write_reference(&mut out, data) {
            capabilities = None;
        }
        capabilities.is_some()
    };
    let mut nothing_yet = true;
    for (name, id, peeled) in head.into_iter().chain(others) {
        nothing_yet = line(name, id);
        if let Some(peeled) = peeled {
            nothing_yet = line(&[name, b"^{}"].concat(), peeled);
        }
    }
    if nothing_yet {
        line(b"capabilities^{}", ObjectId::null(gix_hash::Kind::Sha1));
    }
    out.extend_from_slice(FLUSH);
    out
}

/// Appends a line about a reference and a newline; false when it does not fit into a packet. Then it is left out: cut
/// off, it would name another reference.
fn write_reference(out: &mut Vec<u8>, mut data: Vec<u8>) -> bool {
    data.push(b'\n');
    let written = pktline::write_data(out, &data);
    if let Err(error) = &written {
        tracing::debug!(%error, "a reference is not told of");
    }
    written.is_ok()
}

fn list_refs(refs: &Refs, arguments: &LsRefs) -> Vec<u8> {
    let wanted = |name: &[u8]| {
        arguments.prefixes.is_empty()
            || arguments
                .prefixes
                .iter()
                .any(|prefix| name.starts_with(prefix))
    };
    let mut out = Vec::new();
    let mut line = |data: Vec<u8>| write_reference(&mut out, data);
    if wanted(b"HEAD") {
        match (refs.head_id(), &refs.head) {
            (Some(id), Head::Branch(name)) if arguments.symrefs => {
                line([format!("{id} HEAD symref-target:").as_bytes(), name].concat());
            }
            (Some(id), _) => {
                line(format!("{id} HEAD").into_bytes());
            }
            (None, Head::Branch(name)) if arguments.unborn => {
                let target = if arguments.symrefs {
                    [b" symref-target:", name.as_slice()].concat()
                } else {
                    Vec::new()
                };
                line([b"unborn HEAD".as_slice(), &target].concat());
            }
            _ => {}
        }
    }
    for (name, target) in refs.names.iter().filter(|(name, _)| wanted(name)) {
        let mut data = format!("{} ", target.id).into_bytes();
        data.extend_from_slice(name);
        if let Some(peeled) = target.peeled.filter(|_| arguments.peel) {
            data.extend_from_slice(format!(" peeled:{peeled}").as_bytes());
        }
        line(data);
    }
    out.extend_from_slice(FLUSH);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::refs::Target;
    use crate::git::upload_pack::pktline::{MAX_DATA, Packet, Packets};

    fn id(digit: &str) -> ObjectId {
        ObjectId::from_hex(digit.repeat(40).as_bytes()).unwrap()
    }

    fn refs(head: &str, names: &[&str]) -> Refs {
        let target = Target {
            id: id("1"),
            peeled: Some(id("2")),
        };
        Refs {
            head: Head::Branch(head.into()),
            names: names.iter().map(|name| ((*name).into(), target)).collect(),
            ..Refs::default()
        }
    }

    /// The lines, each without its newline.
    fn lines(bytes: &[u8]) -> Vec<String> {
        let mut packets = Packets::new(bytes);
        let mut lines = Vec::new();
        while let Some(Packet::Data(data)) = packets.next_packet().expect("packets") {
            lines.push(String::from_utf8(pktline::text(data).to_vec()).expect("text"));
        }
        assert_eq!(packets.rest(), b"", "after the flush");
        lines
    }

    #[test]
    fn names_that_fit_into_no_packet_are_left_out() {
        let long = format!("refs/heads/a{}", "x".repeat(MAX_DATA));
        let refs = refs(&long, &[&long, "refs/heads/b", "refs/heads/c"]);
        let everything = LsRefs {
            symrefs: true,
            peel: true,
            ..LsRefs::default()
        };
        let (one, two) = (id("1"), id("2"));
        assert_eq!(
            lines(&list_refs(&refs, &everything)),
            [
                format!("{one} refs/heads/b peeled:{two}"),
                format!("{one} refs/heads/c peeled:{two}"),
            ]
        );

        let lines = lines(&advertise_v0(&refs, Version::V0, WantPolicy::Reachable));
        let (first, capabilities) = lines[0].split_once('\0').expect("capabilities");
        assert!(capabilities.ends_with(AGENT), "{capabilities}");
        assert_eq!(first, format!("{one} HEAD"));
        assert_eq!(
            lines[1..],
            [
                format!("{one} refs/heads/b"),
                format!("{two} refs/heads/b^{{}}"),
                format!("{one} refs/heads/c"),
                format!("{two} refs/heads/c^{{}}"),
            ]
        );
    }

    #[test]
    fn capabilities_are_told_where_no_name_fits() {
        let mut refs = refs(
            "refs/heads/main",
            &[&format!("refs/{}", "x".repeat(MAX_DATA))],
        );
        for refs in [Refs::default(), refs.clone(), {
            refs.head = Head::Unknown;
            refs
        }] {
            let lines = lines(&advertise_v0(&refs, Version::V1, WantPolicy::Advertised));
            let expected = format!("{} capabilities^{{}}\0multi_ack ", id("0"));
            assert_eq!((lines.len(), lines[0].as_str()), (2, "version 1"));
            assert!(lines[1].starts_with(&expected), "{lines:?}");
        }
    }
}
