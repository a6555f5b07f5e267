//! What a pack will hold, and the name under which its bytes can be found again.

use std::fmt;
use std::io::Write;

use aws_lc_rs::digest;
use gix_hash::ObjectId;
use gix_object::Kind;

use super::negotiate::Common;
use super::pktline;
use super::request::FetchRequest;
use super::shallow::Boundary;
use super::{Refusal, advertise::WantPolicy};
use crate::git::objects::commits::{CommitNumber, CommitSet, Commits};
use crate::git::objects::packs::Reader;
use crate::git::objects::walk::{Filter, Walk};
use crate::git::objects::writer::{PackFormat, PackStats, write_pack};
use crate::git::objects::{ObjectError, commits};
use crate::git::snapshot::Snapshot;

/// The name of an answer: equal requests to one repository have equal keys, and what a key stands for never changes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AnswerKey([u8; 32]);

impl fmt::Display for AnswerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AnswerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// What to send.
pub struct Plan {
    key: AnswerKey,
    content: Content,
    ofs_delta: bool,
    shallow: Vec<ObjectId>,
    unshallow: Vec<ObjectId>,
}

enum Content {
    /// All that the mirror has.
    Whole,
    Exact(Box<Exact>),
}

/// Just what is asked for.
struct Exact {
    wants: Vec<ObjectId>,
    /// What the client has, as the tips of it.
    common: CommitSet,
    cuts: CommitSet,
    client_cuts: CommitSet,
    moves_boundary: bool,
    filter: Filter,
    thin: bool,
    include_tag: bool,
}

/// A pack that holds everything is sent when at least this share of the commits is wanted: what is too much costs
/// less than counting what is not.
const WHOLE_FROM: f64 = 0.8;

/// Checks that each id may be wanted and is there; returns the commits that they come to.
///
/// # Errors
/// [`Refusal::NotOurRef`] for the first that is not.
pub fn check_wants(
    wants: &[ObjectId],
    snapshot: &Snapshot,
    commits: &Commits,
    policy: WantPolicy,
) -> Result<Vec<CommitNumber>, Refusal> {
    let mut reader = None;
    let mut found = Vec::with_capacity(wants.len());
    let tips = (policy == WantPolicy::Advertised).then(|| {
        snapshot
            .refs
            .tips()
            .collect::<std::collections::HashSet<ObjectId>>()
    });
    for want in wants {
        if tips.as_ref().is_some_and(|tips| !tips.contains(want)) || !snapshot.packs.contains(want)
        {
            return Err(Refusal::NotOurRef(*want));
        }
        if let Some(commit) = snapshot.commit_of(want, commits) {
            found.push(commit);
            continue;
        }
        // A tag that no reference names, a tree, or a blob.
        let reader = reader.get_or_insert_with(|| Reader::new(&snapshot.packs));
        let peeled = commits::peel(*want, reader).map_err(|error| match error {
            ObjectError::Missing(_) => Refusal::NotOurRef(*want),
            other => other.into(),
        })?;
        match (peeled.kind, commits.number(&peeled.id)) {
            (Kind::Commit, None) => return Err(Refusal::NotOurRef(*want)),
            (_, number) => found.extend(number),
        }
    }
    Ok(found)
}

/// Decides what to send for `request`, whose wants come to the commits `wants`.
///
/// # Errors
/// [`Refusal`] when the boundary that is asked for does not exist.
pub fn plan(
    request: &FetchRequest,
    wants: &[CommitNumber],
    common: &Common,
    snapshot: &Snapshot,
    commits: &Commits,
) -> Result<Plan, Refusal> {
    let boundary = Boundary::of(request, wants, snapshot, commits)?;
    let plain = common.is_empty()
        && request.shallow.is_empty()
        && boundary.cuts.is_empty()
        && request.filter == Filter::default();
    if plain && request.ofs_delta && wants_nearly_all(wants, snapshot, commits) {
        let mut key = KeyBuilder::new("whole");
        for pack in snapshot.packs.packs() {
            key.add(
                pack.path()
                    .file_name()
                    .unwrap_or_default()
                    .as_encoded_bytes(),
            );
        }
        return Ok(Plan {
            key: key.finish(),
            content: Content::Whole,
            ofs_delta: true,
            shallow: boundary.shallow,
            unshallow: boundary.unshallow,
        });
    }

    let mut wanted = request.wants.clone();
    wanted.sort_unstable();
    wanted.dedup();
    let exact = Exact {
        wants: wanted,
        common: common.commits().clone(),
        moves_boundary: request.deepen.is_asked() || !request.shallow.is_empty(),
        // A partial clone may lack the base of a delta.
        thin: request.thin_pack && request.filter == Filter::default(),
        filter: request.filter,
        include_tag: request.include_tag,
        cuts: boundary.cuts,
        client_cuts: boundary.client_cuts,
    };
    Ok(Plan {
        key: exact.key(request.ofs_delta, snapshot, commits),
        content: Content::Exact(Box::new(exact)),
        ofs_delta: request.ofs_delta,
        shallow: boundary.shallow,
        unshallow: boundary.unshallow,
    })
}

/// SECURITY: what a force-push took away is not handed to those who did not ask for it, so nothing may be in the
/// packs that no reference reaches.
fn wants_nearly_all(wants: &[CommitNumber], snapshot: &Snapshot, commits: &Commits) -> bool {
    snapshot.all_live(commits)
        && commits
            .reachable(wants.iter().copied(), &commits.no_commits())
            .len() as f64
            >= WHOLE_FROM * commits.len() as f64
}

impl Plan {
    pub fn key(&self) -> AnswerKey {
        self.key
    }

    pub fn is_whole(&self) -> bool {
        matches!(self.content, Content::Whole)
    }

    /// The `shallow` and `unshallow` lines.
    pub fn write_boundary(&self, out: &mut Vec<u8>) {
        for id in &self.shallow {
            pktline::write_line(out, &format!("shallow {id}"));
        }
        for id in &self.unshallow {
            pktline::write_line(out, &format!("unshallow {id}"));
        }
    }

    /// Writes the pack. Takes processor time and disk reads: not for an async worker.
    ///
    /// # Errors
    /// [`ObjectError`]; what was written so far is of no use then.
    pub fn write(
        &self,
        snapshot: &Snapshot,
        out: &mut dyn Write,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<PackStats, ObjectError> {
        let mut reader = Reader::new(&snapshot.packs);
        let exact = match &self.content {
            Content::Whole => {
                let format = PackFormat {
                    ofs_delta: true,
                    thin_bases: None,
                };
                return write_pack(&mut reader, snapshot.everything(), format, out, cancelled);
            }
            Content::Exact(exact) => exact,
        };
        let walked = exact.walk(snapshot, &mut reader, cancelled)?;
        let thin_bases = exact.thin.then_some(&walked.known);
        write_pack(
            &mut reader,
            &walked.objects,
            PackFormat {
                ofs_delta: self.ofs_delta,
                thin_bases,
            },
            out,
            cancelled,
        )
    }
}

impl Exact {
    fn walk(
        &self,
        snapshot: &Snapshot,
        reader: &mut Reader<'_>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<crate::git::objects::walk::Walked, ObjectError> {
        let commits = snapshot.commits();
        let theirs = commits.reachable(self.common.iter(), &self.client_cuts);
        let mut walk = Walk::filtered(reader, self.filter, cancelled);
        if self.moves_boundary {
            // History grows behind these: what they have must not be sent again.
            for edge in self
                .client_cuts
                .iter()
                .filter(|edge| theirs.contains(*edge))
            {
                walk.mark_known_tree(&commits.get(edge).tree)?;
            }
        }
        let mut starts = Vec::new();
        let mut explicit = Vec::new();
        for want in &self.wants {
            let peeled = walk.peel_into(*want)?;
            match commits.number(&peeled.id) {
                Some(commit) => starts.push(commit),
                None => explicit.push(peeled.id),
            }
        }
        let included = commits.reachable_without(starts, &self.cuts, &theirs);
        walk.add_commits(&commits, &included, &theirs, &self.cuts)?;
        for id in explicit {
            walk.add_object(&id)?;
        }
        if self.include_tag {
            for target in snapshot
                .refs
                .names
                .values()
                .filter(|target| target.peeled.is_some())
            {
                let sent = snapshot
                    .commit_of(&target.id, &commits)
                    .is_some_and(|commit| included.contains(commit));
                if sent {
                    walk.peel_into(target.id)?;
                }
            }
        }
        Ok(walk.finish())
    }

    fn key(&self, ofs_delta: bool, snapshot: &Snapshot, commits: &Commits) -> AnswerKey {
        let mut key = KeyBuilder::new("exact");
        for want in &self.wants {
            key.add(want.as_slice());
        }
        for set in [&self.common, &self.cuts, &self.client_cuts] {
            let mut ids: Vec<ObjectId> = set.iter().map(|commit| commits.get(commit).id).collect();
            ids.sort_unstable();
            key.add(b"set");
            for id in ids {
                key.add(id.as_slice());
            }
        }
        let flags = [self.moves_boundary, self.thin, self.include_tag, ofs_delta].map(u8::from);
        key.add(&flags);
        key.add(format!("{:?}", self.filter).as_bytes());
        if self.include_tag {
            // Which tags follow depends on the tags there are.
            for target in snapshot
                .refs
                .names
                .values()
                .filter(|target| target.peeled.is_some())
            {
                key.add(target.id.as_slice());
            }
        }
        key.finish()
    }
}

struct KeyBuilder(digest::Context);

impl KeyBuilder {
    /// The version changes when the bytes that are made for equal requests do.
    fn new(kind: &str) -> Self {
        let mut key = Self(digest::Context::new(&digest::SHA256));
        key.add(concat!("1 ", env!("CARGO_PKG_VERSION")).as_bytes());
        key.add(kind.as_bytes());
        key
    }

    /// Adds `part` with its length, so that no two lists of parts look alike.
    fn add(&mut self, part: &[u8]) {
        self.0.update(&(part.len() as u64).to_be_bytes());
        self.0.update(part);
    }

    fn finish(self) -> AnswerKey {
        let mut key = [0; 32];
        key.copy_from_slice(self.0.finish().as_ref());
        AnswerKey(key)
    }
}
