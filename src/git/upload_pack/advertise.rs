//! What the server tells before it is asked: capabilities and references.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
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
    let mut capabilities = String::from(
        "multi_ack thin-pack side-band side-band-64k ofs-delta shallow deepen-since deepen-not deepen-relative \
         no-progress include-tag multi_ack_detailed allow-tip-sha1-in-want",
    );
    if policy == WantPolicy::Reachable {
        capabilities.push_str(" allow-reachable-sha1-in-want");
    }
    capabilities.push_str(" no-done");
    if let Head::Branch(name) = &refs.head
        && refs.head_id().is_some()
    {
        capabilities.push_str(&format!(" symref=HEAD:{name}"));
    }
    capabilities.push_str(&format!(" filter object-format=sha1 {AGENT}"));

    let head = refs.head_id().map(|id| (b"HEAD".as_slice(), id, None));
    let others = refs
        .names
        .iter()
        .map(|(name, target)| (name.as_slice(), target.id, target.peeled));
    let mut first = true;
    let mut line = |name: &[u8], id: gix_hash::ObjectId| {
        let mut data = format!("{id} ").into_bytes();
        data.extend_from_slice(name);
        if std::mem::take(&mut first) {
            data.push(0);
            data.extend_from_slice(capabilities.as_bytes());
        }
        data.push(b'\n');
        pktline::write_data(&mut out, &data);
    };
    for (name, id, peeled) in head.into_iter().chain(others) {
        line(name, id);
        if let Some(peeled) = peeled {
            line(&[name, b"^{}"].concat(), peeled);
        }
    }
    if refs.head_id().is_none() && refs.names.is_empty() {
        line(
            b"capabilities^{}",
            gix_hash::ObjectId::null(gix_hash::Kind::Sha1),
        );
    }
    out.extend_from_slice(FLUSH);
    out
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
    let mut line = |data: &[u8]| pktline::write_data(&mut out, &[data, b"\n"].concat());
    if wanted(b"HEAD") {
        match (refs.head_id(), &refs.head) {
            (Some(id), Head::Branch(name)) if arguments.symrefs => {
                line(&[format!("{id} HEAD symref-target:").as_bytes(), name].concat());
            }
            (Some(id), _) => line(format!("{id} HEAD").as_bytes()),
            (None, Head::Branch(name)) if arguments.unborn => {
                let target = if arguments.symrefs {
                    [b" symref-target:", name.as_slice()].concat()
                } else {
                    Vec::new()
                };
                line(&[b"unborn HEAD".as_slice(), &target].concat());
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
        line(&data);
    }
    out.extend_from_slice(FLUSH);
    out
}
