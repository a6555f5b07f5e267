//! What a pack will hold, and the name under which its bytes can be found again.

use std::cell::LazyCell;
use std::collections::HashSet;
use std::fmt;
use std::io::Write;

use aws_lc_rs::digest;
use gix_hash::ObjectId;
use gix_object::Kind;
use gix_object::bstr::BString;

use super::negotiate::Common;
use super::pktline;
use super::request::FetchRequest;
use super::shallow::Boundary;
use super::{Refusal, advertise::WantPolicy};
use crate::git::objects::commits::{CommitNumber, CommitSet, Commits};
use crate::git::objects::packs::Reader;
use crate::git::objects::walk::{Filter, Walk, Walked, for_each_commit};
use crate::git::objects::writer::{PackFormat, PackStats, write_pack};
use crate::git::objects::{ObjectError, commits};
use crate::git::refs::Target;
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
    /// All that references reach. SECURITY: and not what a force-push took away, which may still be in the packs.
    Whole,
    Exact(Box<Exact>),
}

/// Just what is asked for.
struct Exact {
    /// What is asked for, and the tags that follow it unasked.
    wants: Vec<ObjectId>,
    /// Tags of trees and blobs, which follow where what they name is sent.
    loose_tags: Vec<(ObjectId, ObjectId)>,
    /// The commits to send.
    included: CommitSet,
    /// The commits that the client has.
    theirs: CommitSet,
    cuts: CommitSet,
    /// Commits of the client's, at which what is sent begins: it has their trees, and what only moved is not sent again.
    /// With a filter only those at which its history ends.
    edges: CommitSet,
    filter: Filter,
    thin: bool,
}

/// A pack that holds everything is sent when at least this share of the commits is wanted: what is too much costs
/// less than counting what is not.
const WHOLE_FROM: f64 = 0.8;

/// Commits on branches that a client does not have, which are walked for finding what it does have.
const MOST_LACKING: usize = 2_000;

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
    let tips = (policy == WantPolicy::Advertised)
        .then(|| snapshot.refs.tips().collect::<HashSet<ObjectId>>());
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
    if plain && request.ofs_delta && wants_nearly_all(request, wants, snapshot, commits) {
        let mut key = KeyBuilder::new("whole");
        for part in snapshot.live_name() {
            key.add(&part);
        }
        return Ok(Plan {
            key: key.finish(),
            content: Content::Whole,
            ofs_delta: true,
            shallow: boundary.shallow,
            unshallow: boundary.unshallow,
        });
    }

    let exact = Exact::of(request, wants, common, &boundary, snapshot, commits);
    Ok(Plan {
        key: exact.key(request, common, &boundary, commits),
        content: Content::Exact(Box::new(exact)),
        ofs_delta: request.ofs_delta,
        shallow: boundary.shallow,
        unshallow: boundary.unshallow,
    })
}

/// Whether the client wants so much that it may as well get all that references reach.
fn wants_nearly_all(
    request: &FetchRequest,
    wants: &[CommitNumber],
    snapshot: &Snapshot,
    commits: &Commits,
) -> bool {
    let reached = commits.reachable(wants.iter().copied(), &commits.no_commits());
    // Git takes every tag whose commit it got: nobody is to get tags by way of what was not asked for, nor what they name
    // beside commits.
    let asked = LazyCell::new(|| request.wants.iter().collect::<HashSet<_>>());
    let is_due = |name: &BString, target: &Target| {
        let commit = snapshot.commit_of(&target.id, commits);
        let Some(commit) = commit else {
            return asked.contains(&target.id);
        };
        if target.peeled.is_some() {
            reached.contains(commit) && (request.include_tag || asked.contains(&target.id))
        } else {
            reached.contains(commit) || !name.starts_with(b"refs/tags/")
        }
    };
    let mut names = snapshot.refs.names.iter();
    if !names.all(|(name, target)| is_due(name, target)) {
        return false;
    }
    let live = snapshot.live().len() as f64;
    request
        .wants
        .iter()
        .all(|want| snapshot.is_live(want, commits))
        && reached.len() as f64 >= WHOLE_FROM * live
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
                    thin: None,
                };
                let live = snapshot.live_objects(&mut reader, cancelled)?;
                return write_pack(&mut reader, live, format, out, cancelled);
            }
            Content::Exact(exact) => exact,
        };
        let walked = exact.walk(snapshot, &mut reader, cancelled)?;
        write_pack(
            &mut reader,
            &walked.objects,
            PackFormat {
                ofs_delta: self.ofs_delta,
                thin: exact.thin.then_some(&walked),
            },
            out,
            cancelled,
        )
    }
}

impl Exact {
    fn of(
        request: &FetchRequest,
        starts: &[CommitNumber],
        common: &Common,
        boundary: &Boundary,
        snapshot: &Snapshot,
        commits: &Commits,
    ) -> Self {
        let theirs = commits.reachable(common.commits().iter(), &boundary.client_cuts);
        // What the client has ends at its boundary; where that moves, history goes on behind it.
        let moved = boundary
            .client_cuts
            .iter()
            .filter(|edge| !boundary.cuts.contains(*edge));
        let behind = moved.flat_map(|edge| commits.get(edge).parents.iter().copied());
        let starts = starts.iter().copied().chain(behind);
        let included = commits.reachable_without(starts, &boundary.cuts, &theirs);
        // A partial clone may lack what has moved.
        let whole = request.filter == Filter::default();
        let parents = included
            .iter()
            .filter(|_| whole)
            .flat_map(|commit| commits.get(commit).parents.iter().copied());
        let ends = boundary.client_cuts.iter();
        let mut edges = commits.no_commits();
        for edge in ends.chain(parents).filter(|edge| theirs.contains(*edge)) {
            edges.insert(edge);
        }
        let tags = snapshot
            .refs
            .names
            .values()
            .filter(|target| request.include_tag && target.peeled.is_some());
        let follows = |tag: &ObjectId| {
            snapshot
                .commit_of(tag, commits)
                .is_some_and(|commit| included.contains(commit))
        };
        let mut wants: Vec<ObjectId> = tags.map(|target| target.id).filter(follows).collect();
        wants.extend(&request.wants);
        wants.sort_unstable();
        wants.dedup();
        let loose_tags = if request.include_tag {
            snapshot.loose_tags(commits)
        } else {
            Vec::new()
        };
        Self {
            wants,
            loose_tags,
            theirs,
            edges,
            cuts: boundary.cuts.clone(),
            filter: request.filter,
            // A partial clone may lack the base of a delta.
            thin: request.thin_pack && !common.is_empty() && request.filter == Filter::default(),
            included,
        }
    }

    fn walk(
        &self,
        snapshot: &Snapshot,
        reader: &mut Reader<'_>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Walked, ObjectError> {
        let mut walk = Walk::filtered(reader, self.filter, cancelled);
        if self.thin {
            walk.note_versions();
        }
        let edges: Vec<ObjectId> = {
            let commits = snapshot.commits();
            self.edges
                .iter()
                .map(|edge| commits.get(edge).tree)
                .collect()
        };
        for tree in &edges {
            walk.mark_known_tree(tree)?;
        }
        let mut explicit = Vec::new();
        for want in &self.wants {
            let peeled = walk.peel_into(*want)?;
            if peeled.kind != Kind::Commit {
                explicit.push(peeled.id);
            } else if snapshot
                .commits()
                .number(&peeled.id)
                .is_some_and(|commit| self.included.contains(commit))
            {
                // What is asked for passes every filter.
                walk.add_unfiltered(&peeled.id)?;
            }
        }
        for_each_commit(
            || snapshot.commits(),
            &self.included,
            &self.theirs,
            &self.cuts,
            |commit| walk.add_commit(commit),
        )?;
        for id in explicit {
            walk.add_object(&id)?;
        }
        for (tag, named) in &self.loose_tags {
            if snapshot
                .packs
                .find(named)
                .is_some_and(|named| walk.contains(named))
            {
                walk.peel_into(*tag)?;
            }
        }
        let mut walked = walk.finish();
        if self.thin {
            self.find_bases(snapshot, reader, &mut walked, cancelled)?;
            walked.settle();
        }
        Ok(walked)
    }

    /// Finds what else the client has: all that no commit brings which it lacks, less what is sent. The walk itself meets
    /// only what the sent objects replace, but deltas build on any older object.
    fn find_bases(
        &self,
        snapshot: &Snapshot,
        reader: &mut Reader<'_>,
        walked: &mut Walked,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<(), ObjectError> {
        let lacking = {
            let commits = snapshot.commits();
            let mut had = self.theirs.clone();
            for commit in self.included.iter() {
                had.insert(commit);
            }
            // History is shared with later snapshots, and may have commits by now that this one lacks.
            commits.all_but(&had, |id| snapshot.packs.contains(id))
        };
        // What nothing reaches is in no commit's trees, so there is no telling who has it.
        if lacking.len() > MOST_LACKING || snapshot.has_garbage() {
            return Ok(());
        }
        let none = CommitSet::default();
        let mut walk = Walk::filtered(reader, Filter::default(), cancelled);
        for_each_commit(
            || snapshot.commits(),
            &lacking,
            &none,
            &none,
            |commit| walk.add_commit(commit),
        )?;
        // Tags, and what they name beside commits, belong to no history.
        for tip in snapshot.refs.held() {
            if snapshot.commits().number(&tip).is_none() {
                let peeled = walk.peel_into(tip)?;
                if peeled.kind != Kind::Commit {
                    walk.add_object(&peeled.id)?;
                }
            }
        }
        let mut known = snapshot.packs.all();
        known.subtract(&walk.finish().objects);
        walked.known = known;
        Ok(())
    }

    /// What follows from objects alone, not from references: an answer stays right for ever.
    fn key(
        &self,
        request: &FetchRequest,
        common: &Common,
        boundary: &Boundary,
        commits: &Commits,
    ) -> AnswerKey {
        let mut key = KeyBuilder::new("exact");
        for want in &self.wants {
            key.add(want.as_slice());
        }
        key.add(b"loose");
        for (tag, _) in &self.loose_tags {
            key.add(tag.as_slice());
        }
        for set in [common.commits(), &boundary.cuts, &boundary.client_cuts] {
            let mut ids: Vec<ObjectId> = set.iter().map(|commit| commits.get(commit).id).collect();
            ids.sort_unstable();
            key.add(b"set");
            for id in ids {
                key.add(id.as_slice());
            }
        }
        key.add(&[self.thin, request.ofs_delta].map(u8::from));
        key.add(format!("{:?}", self.filter).as_bytes());
        key.finish()
    }
}

struct KeyBuilder(digest::Context);

impl KeyBuilder {
    /// The version changes when the bytes that are made for equal requests do.
    fn new(kind: &str) -> Self {
        let mut key = Self(digest::Context::new(&digest::SHA256));
        key.add(concat!("4 ", env!("CARGO_PKG_VERSION")).as_bytes());
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
