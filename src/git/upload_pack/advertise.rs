//! What the server tells before it is asked: capabilities and references.

use std::collections::HashMap;
use std::ops::Bound;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use gix_hash::ObjectId;
use gix_object::bstr::{BStr, BString, ByteSlice};

use super::pktline::{self, FLUSH};
use super::{AGENT, Version};
use crate::git::refs::{Head, Refs, Target};

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
    /// Only references that begin with one of these.
    pub prefixes: Prefixes,
}

/// Beginnings of names: sorted, and none begins with another. Without any, every name is meant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Prefixes(Vec<BString>);

impl Prefixes {
    pub fn new(mut prefixes: Vec<BString>) -> Self {
        prefixes.sort_unstable();
        // What begins with another stands behind it, and between the two stand only such as begin with it too.
        prefixes.dedup_by(|next, kept| next.starts_with(kept));
        Self(prefixes)
    }

    fn bytes(&self) -> usize {
        self.0.iter().map(|prefix| prefix.len()).sum()
    }

    fn match_name(&self, name: &[u8]) -> bool {
        self.0.is_empty() || self.0.iter().any(|prefix| name.starts_with(prefix))
    }

    /// The references that begin with one of these, in the order of their names.
    fn select<'r>(&self, refs: &'r Refs) -> Vec<(&'r BString, &'r Target)> {
        if self.0.is_empty() {
            return refs.names.iter().collect();
        }
        let mut found = Vec::new();
        for prefix in &self.0 {
            let from = (Bound::Included(prefix.as_bstr()), Bound::Unbounded);
            let names = refs.names.range::<BStr, _>(from);
            found.extend(names.take_while(|(name, _)| name.starts_with(prefix)));
        }
        found
    }
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

/// Builders ask in a handful of ways.
const KEPT_LISTS: usize = 32;

/// Bytes of kept lists, with the prefixes that they are for: a list of some 200,000 references. A longer one is kept alone:
/// each client would have one of its own.
const KEPT_BYTES: usize = 16 << 20;

/// A list for more prefixes than this is not kept: git asks with six for a name, and nobody asks so twice.
const KEPT_PREFIXES: usize = 16;

impl Advertisements {
    /// The advertisement of versions 0 and 1, if it is there already.
    pub fn kept_v0(&self, version: Version, policy: WantPolicy) -> Option<Bytes> {
        let kept = self.v0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(&(version, policy)).cloned()
    }

    /// The advertisement of versions 0 and 1: references, with the capabilities behind the first. Takes processor time
    /// where it is not kept: not for an async worker.
    pub fn v0(&self, refs: &Refs, version: Version, policy: WantPolicy) -> Bytes {
        if let Some(list) = self.kept_v0(version, policy) {
            return list;
        }
        let list = Bytes::from(advertise_v0(refs, version, policy));
        let mut kept = self.v0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.insert((version, policy), list.clone());
        list
    }

    /// The answer to `ls-refs`, if it is there already.
    pub fn kept_ls_refs(&self, arguments: &LsRefs) -> Option<Bytes> {
        if arguments.prefixes.0.len() > KEPT_PREFIXES {
            return None;
        }
        let kept = self.ls_refs.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(arguments).cloned()
    }

    /// The answer to `ls-refs`. Takes processor time where it is not kept: not for an async worker.
    pub fn ls_refs(&self, refs: &Refs, arguments: &LsRefs) -> Bytes {
        if let Some(list) = self.kept_ls_refs(arguments) {
            return list;
        }
        // Nobody waits for the lock meanwhile. That two make the same list does no harm.
        let list = Bytes::from(list_refs(refs, arguments));
        if arguments.prefixes.0.len() <= KEPT_PREFIXES {
            let mut kept = self.ls_refs.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = bytes_kept(&kept) + arguments.prefixes.bytes() + list.len();
            if kept.len() >= KEPT_LISTS || bytes > KEPT_BYTES {
                // What is asked for again comes back; what nobody asks for twice stays away.
                kept.clear();
            }
            kept.insert(arguments.clone(), list.clone());
        }
        list
    }
}

fn bytes_kept(kept: &HashMap<LsRefs, Bytes>) -> usize {
    kept.iter()
        .map(|(arguments, list)| arguments.prefixes.bytes() + list.len())
        .sum()
}

/// The first line of an advertisement of version 2.
pub const VERSION_2: &str = "version 2";

/// What is implemented of version 2.
const CAPABILITIES: [&str; 5] = [
    AGENT,
    "ls-refs=unborn",
    "fetch=shallow wait-for-done filter ref-in-want sideband-all",
    // Taken and ignored, as by git's own server: clients refuse to send them elsewhere.
    "server-option",
    "object-format=sha1",
];

/// The capability advertisement of version 2. It names no reference, so it is the same for every repository.
pub fn advertise_v2() -> Vec<u8> {
    let mut out = Vec::new();
    for line in [VERSION_2].iter().chain(&CAPABILITIES) {
        pktline::write_line(&mut out, line);
    }
    out.extend_from_slice(FLUSH);
    out
}

/// What of a capability that another server has in version 2 is implemented here as well; `None` where nothing of it is.
pub fn in_common(capability: &[u8]) -> Option<Vec<u8>> {
    let parts = |capability| -> (&[u8], Option<&[u8]>) {
        <[u8]>::split_once_str(capability, "=")
            .map_or((capability, None), |(name, values)| (name, Some(values)))
    };
    let (name, theirs) = parts(capability);
    let mut all = CAPABILITIES.iter().map(|ours| parts(ours.as_bytes()));
    let (_, ours) = all.find(|(ours, _)| *ours == name)?;
    let (Some(theirs), Some(ours), b"ls-refs" | b"fetch") = (theirs, ours, name) else {
        return Some(capability.to_vec());
    };
    let is_ours = |value: &&[u8]| ours.split_str(" ").any(|ours| ours == *value);
    let values: Vec<_> = theirs.split_str(" ").filter(is_ours).collect();
    Some([name, b"=", &values.join(&b" "[..])].concat())
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
    // Of other symbolic references nothing is told, as by git's own server: many would not fit into the packet.
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
    let mut out = Vec::new();
    let mut line = |data: Vec<u8>| write_reference(&mut out, data);
    if arguments.prefixes.match_name(b"HEAD") {
        match (refs.head_id(), &refs.head) {
            (Some(id), Head::Branch(name)) if arguments.symrefs => {
                line([format!("{id} HEAD symref-target:").as_bytes(), name].concat());
            }
            (Some(id), _) => {
                line(format!("{id} HEAD").into_bytes());
            }
            (None, Head::Branch(name)) if arguments.unborn && arguments.symrefs => {
                line([b"unborn HEAD symref-target:".as_slice(), name].concat());
            }
            _ => {}
        }
    }
    for (name, target) in arguments.prefixes.select(refs) {
        let mut data = format!("{} ", target.id).into_bytes();
        data.extend_from_slice(name);
        if arguments.symrefs
            && let Some(target) = refs.symref_target(name)
        {
            data.extend_from_slice(b" symref-target:");
            data.extend_from_slice(target);
        }
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
    use proptest::prelude::*;

    use super::*;
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
    fn an_unborn_branch_is_told_of_by_its_name() {
        let refs = refs("refs/heads/main", &[]);
        let told = |symrefs| {
            let arguments = LsRefs {
                unborn: true,
                symrefs,
                ..LsRefs::default()
            };
            lines(&list_refs(&refs, &arguments))
        };
        assert_eq!(told(true), ["unborn HEAD symref-target:refs/heads/main"]);
        assert!(told(false).is_empty());
    }

    #[test]
    fn where_symbolic_references_lead_is_told_to_who_asks() {
        let mut refs = refs("refs/heads/main", &["refs/heads/latest", "refs/heads/main"]);
        refs.set_symrefs(vec![("refs/heads/latest".into(), "refs/heads/main".into())]);
        let (one, two) = (id("1"), id("2"));
        for (symrefs, told) in [(true, " symref-target:refs/heads/main"), (false, "")] {
            let arguments = LsRefs {
                symrefs,
                peel: true,
                ..LsRefs::default()
            };
            assert_eq!(
                lines(&list_refs(&refs, &arguments)),
                [
                    format!("{one} HEAD{told}"),
                    format!("{one} refs/heads/latest{told} peeled:{two}"),
                    format!("{one} refs/heads/main peeled:{two}"),
                ]
            );
        }
        let lines = lines(&advertise_v0(&refs, Version::V0, WantPolicy::Advertised));
        assert_eq!(lines[0].matches("symref=").count(), 1, "{lines:?}");
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

    fn ls_refs(prefixes: &[&str]) -> LsRefs {
        LsRefs {
            prefixes: Prefixes::new(prefixes.iter().map(|prefix| (*prefix).into()).collect()),
            ..LsRefs::default()
        }
    }

    #[test]
    fn of_prefixes_only_those_stay_that_say_something() {
        let kept = |prefixes| ls_refs(prefixes).prefixes.0;
        assert_eq!(
            kept(&["b/", "a/b", "a/", "b/", "ab", "a/c"]),
            ["a/", "ab", "b/"]
        );
        assert_eq!(kept(&["refs/", "", "HEAD"]), [""]);
        assert!(kept(&[]).is_empty());
    }

    #[test]
    fn lists_are_kept_for_few_prefixes_only_and_not_too_many() {
        let advertisements = Advertisements::default();
        let refs = refs("refs/heads/a1", &["refs/heads/a1", "refs/heads/b"]);
        let many: Vec<String> = (0..=KEPT_PREFIXES)
            .map(|nth| format!("refs/heads/a{nth:02}"))
            .collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for (prefixes, kept) in [
            (&many[1..], true),
            (&many, false),
            (&["x"], true),
            (&[], true),
        ] {
            let arguments = ls_refs(prefixes);
            let list = advertisements.ls_refs(&refs, &arguments);
            assert_eq!(list, list_refs(&refs, &arguments));
            let expected = kept.then_some(list);
            assert_eq!(
                advertisements.kept_ls_refs(&arguments),
                expected,
                "{prefixes:?}"
            );
        }
        for nth in 0..2 * KEPT_LISTS {
            let arguments = ls_refs(&[&nth.to_string()]);
            advertisements.ls_refs(&refs, &arguments);
            assert!(advertisements.kept_ls_refs(&arguments).is_some(), "{nth}");
            assert!(advertisements.ls_refs.lock().unwrap().len() <= KEPT_LISTS);
        }
    }

    #[test]
    fn lists_are_kept_as_far_as_they_have_room() {
        let name = |end: usize| format!("refs/heads/{end:060000}");
        let names: Vec<String> = (0..=KEPT_BYTES / 60_000).map(name).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let refs = refs(names[0], &names);
        let advertisements = Advertisements::default();
        // The first two are larger than all may be. The newest is kept in any case.
        for (prefix, expected) in [
            ("refs/", &["refs/"][..]),
            ("refs/heads/", &["refs/heads/"]),
            ("x", &["x"]),
            ("y", &["x", "y"]),
        ] {
            advertisements.ls_refs(&refs, &ls_refs(&[prefix]));
            let mut kept = vec!["refs/", "refs/heads/", "x", "y"];
            kept.retain(|prefix| advertisements.kept_ls_refs(&ls_refs(&[*prefix])).is_some());
            assert_eq!(kept, expected);
        }
        // Prefixes as well are the client's choice.
        let long = "x".repeat(KEPT_BYTES / 4);
        for end in 0..KEPT_LISTS {
            advertisements.ls_refs(&refs, &ls_refs(&[&format!("{end}{long}")]));
        }
        assert!(bytes_kept(&advertisements.ls_refs.lock().unwrap()) <= KEPT_BYTES);
    }

    proptest! {
        #[test]
        fn a_list_has_the_names_that_begin_with_a_prefix_in_order(
            names in prop::collection::btree_set("[a-c]{1,4}", 0..20),
            prefixes in prop::collection::vec("[a-cH]{0,3}", 1..6),
        ) {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let prefixes: Vec<&str> = prefixes.iter().map(String::as_str).collect();
            let mut refs = refs("a", &names);
            refs.head = Head::Detached(id("1"));
            let expected: Vec<String> = ["HEAD"]
                .iter()
                .chain(&names)
                .filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix)))
                .map(|name| format!("{} {name}", id("1")))
                .collect();
            prop_assert_eq!(lines(&list_refs(&refs, &ls_refs(&prefixes))), expected);
        }
    }
}
