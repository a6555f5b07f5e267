//! How the commits of a mirror hang together.

use std::collections::{HashMap, HashSet};

use gix_hash::{Kind as HashKind, ObjectId, oid};
use gix_object::{CommitRefIter, Kind, TagRefIter};

use super::packs::Reader;
use super::{ObjectError, set::ObjectSet};

/// The number of a commit in a [`Commits`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CommitNumber(u32);

impl CommitNumber {
    /// Its place in sequences that hold one item for each commit.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// One commit, without its message.
pub struct Commit {
    pub id: ObjectId,
    pub tree: ObjectId,
    pub parents: Vec<CommitNumber>,
    /// Committer time in seconds since 1970.
    pub time: i64,
}

/// Commits that were read and are not added yet.
#[derive(Default)]
pub struct NewCommits(Vec<NewCommit>);

struct NewCommit {
    id: ObjectId,
    tree: ObjectId,
    parents: Vec<ObjectId>,
    time: i64,
}

/// Every commit that a reference reached since the mirror was opened. Kept in memory, about 100 bytes a commit, so
/// that negotiation and depth need no object to be decoded.
#[derive(Default)]
pub struct Commits {
    commits: Vec<Commit>,
    numbers: HashMap<ObjectId, CommitNumber>,
}

impl Commits {
    /// Reads the commits that `tips` reach and that are not known yet, to be added by [`Commits::append`].
    ///
    /// # Errors
    /// [`ObjectError::Missing`] when history has a hole.
    pub fn read_new(
        &self,
        tips: &[ObjectId],
        reader: &mut Reader<'_>,
    ) -> Result<NewCommits, ObjectError> {
        let mut new = NewCommits::default();
        let mut seen = HashSet::new();
        let mut todo: Vec<ObjectId> = tips.to_vec();
        let mut buffer = Vec::new();
        while let Some(id) = todo.pop() {
            if self.numbers.contains_key(&id) || !seen.insert(id) {
                continue;
            }
            reader.read_kind(&id, Kind::Commit, &mut buffer)?;
            let damaged = |_| ObjectError::Damaged {
                pack: "?".to_owned(),
                what: format!("commit {id} cannot be parsed"),
            };
            let mut fields = CommitRefIter::from_bytes(&buffer, HashKind::Sha1);
            let tree = fields.tree_id().map_err(damaged)?;
            let parents: Vec<ObjectId> = fields.parent_ids().collect();
            // A commit whose date no one can read still has its place in history.
            let time = fields.committer().map_or(0, |who| who.seconds());
            todo.extend(&parents);
            new.0.push(NewCommit {
                id,
                tree,
                parents,
                time,
            });
        }
        Ok(new)
    }

    /// Adds what [`Commits::read_new`] read of these same commits.
    pub fn append(&mut self, new: NewCommits) {
        for commit in &new.0 {
            self.numbers
                .insert(commit.id, CommitNumber(self.numbers.len() as u32));
        }
        for NewCommit {
            id,
            tree,
            parents,
            time,
        } in new.0
        {
            let parents = parents
                .iter()
                .filter_map(|parent| self.number(parent))
                .collect();
            self.commits.push(Commit {
                id,
                tree,
                parents,
                time,
            });
        }
    }

    pub fn number(&self, id: &oid) -> Option<CommitNumber> {
        self.numbers.get(id).copied()
    }

    pub fn get(&self, commit: CommitNumber) -> &Commit {
        &self.commits[commit.0 as usize]
    }

    pub fn len(&self) -> usize {
        self.commits.len()
    }

    pub fn is_empty(&self) -> bool {
        self.commits.is_empty()
    }

    /// An empty set that can hold any of these commits.
    pub fn no_commits(&self) -> CommitSet {
        CommitSet {
            seen: vec![false; self.commits.len()],
            members: Vec::new(),
        }
    }

    /// The commits that are not in `these`, and whose id is one of `among`.
    pub fn all_but(&self, these: &CommitSet, among: impl Fn(&oid) -> bool) -> CommitSet {
        let mut others = self.no_commits();
        for number in (0..self.commits.len() as u32).map(CommitNumber) {
            if !these.contains(number) && among(&self.get(number).id) {
                others.insert(number);
            }
        }
        others
    }

    /// The commits of `set`, each behind those of its parents that are in the set as well.
    pub fn parents_first(&self, set: &CommitSet) -> Vec<CommitNumber> {
        let mut order = Vec::with_capacity(set.len());
        let mut seen = self.no_commits();
        // Commits whose parents are looked at, and how many of them were.
        let mut path: Vec<(CommitNumber, usize)> = Vec::new();
        for start in set.iter() {
            if seen.insert(start) {
                path.push((start, 0));
            }
            while let Some((commit, looked_at)) = path.last_mut() {
                let Some(parent) = self.get(*commit).parents.get(*looked_at) else {
                    order.push(*commit);
                    path.pop();
                    continue;
                };
                *looked_at += 1;
                if set.contains(*parent) && seen.insert(*parent) {
                    path.push((*parent, 0));
                }
            }
        }
        order
    }

    /// The commits that `tips` reach, tips included. A commit in `cuts` is reached, its parents are not through it.
    pub fn reachable(
        &self,
        tips: impl IntoIterator<Item = CommitNumber>,
        cuts: &CommitSet,
    ) -> CommitSet {
        self.reachable_without(tips, cuts, &self.no_commits())
    }

    /// The commits that `tips` reach without passing one of `stop`, which are not among them.
    pub fn reachable_without(
        &self,
        tips: impl IntoIterator<Item = CommitNumber>,
        cuts: &CommitSet,
        stop: &CommitSet,
    ) -> CommitSet {
        let mut found = self.no_commits();
        let mut todo: Vec<CommitNumber> = tips.into_iter().collect();
        while let Some(commit) = todo.pop() {
            if stop.contains(commit) || !found.insert(commit) {
                continue;
            }
            if !cuts.contains(commit) {
                todo.extend(&self.get(commit).parents);
            }
        }
        found
    }
}

/// A set of commits.
#[derive(Clone, Default)]
pub struct CommitSet {
    seen: Vec<bool>,
    members: Vec<CommitNumber>,
}

impl CommitSet {
    /// Adds `commit`; true when it is new.
    pub fn insert(&mut self, commit: CommitNumber) -> bool {
        let seen = &mut self.seen[commit.0 as usize];
        let new = !*seen;
        if new {
            *seen = true;
            self.members.push(commit);
        }
        new
    }

    /// Whether `commit` was there when this set was made.
    pub fn has_room_for(&self, commit: CommitNumber) -> bool {
        commit.index() < self.seen.len()
    }

    pub fn contains(&self, commit: CommitNumber) -> bool {
        self.seen.get(commit.0 as usize).copied().unwrap_or(false)
    }

    /// In the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = CommitNumber> + '_ {
        self.members.iter().copied()
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
}

/// What an object id comes to when tags are followed.
pub struct Peeled {
    pub id: ObjectId,
    pub kind: Kind,
    /// The tags on the way, outermost first.
    pub tags: Vec<ObjectId>,
}

/// More tags on tags than this are no history but an attack.
const DEEPEST_TAG: usize = 32;

/// Follows tags from `id` to what they name in the end.
///
/// # Errors
/// [`ObjectError`] when an object is missing or damaged.
pub fn peel(id: ObjectId, reader: &mut Reader<'_>) -> Result<Peeled, ObjectError> {
    let mut peeled = Peeled {
        id,
        kind: Kind::Commit,
        tags: Vec::new(),
    };
    let mut buffer = Vec::new();
    loop {
        let number = reader.packs().require(&peeled.id)?;
        peeled.kind = reader.header(number)?.kind;
        if peeled.kind != Kind::Tag {
            return Ok(peeled);
        }
        let damaged = || ObjectError::Damaged {
            pack: "?".to_owned(),
            what: format!("tag {} cannot be parsed", peeled.id),
        };
        if peeled.tags.len() == DEEPEST_TAG {
            return Err(damaged());
        }
        reader.read(number, &mut buffer)?;
        let target = TagRefIter::from_bytes(&buffer, HashKind::Sha1)
            .target_id()
            .map_err(|_| damaged())?;
        peeled.tags.push(peeled.id);
        peeled.id = target;
    }
}

/// The objects of the packs that `tips` reach: everything, trees and blobs included. What `known` reach as well may be
/// left out. `history` knows the commits that all of them reach, and is not held for long.
///
/// # Errors
/// [`ObjectError`] when an object is missing or damaged.
pub fn closure<'h, H: std::ops::Deref<Target = Commits> + 'h>(
    history: impl Fn() -> H,
    tips: &[ObjectId],
    known: &[ObjectId],
    reader: &mut Reader<'_>,
    cancelled: &dyn Fn() -> bool,
) -> Result<ObjectSet, ObjectError> {
    let mut stops = Vec::new();
    for tip in known {
        stops.extend(history().number(&peel(*tip, reader)?.id));
    }
    let mut walk = super::walk::Walk::filtered(reader, super::walk::Filter::default(), cancelled);
    let mut starts = Vec::new();
    for tip in tips {
        let peeled = walk.peel_into(*tip)?;
        match peeled.kind {
            Kind::Commit => starts.extend(history().number(&peeled.id)),
            _ => walk.add_object(&peeled.id)?,
        }
    }
    let (included, passed, none) = {
        let commits = history();
        let none = commits.no_commits();
        let passed = commits.reachable(stops, &none);
        let included = commits.reachable_without(starts, &none, &passed);
        (included, passed, none)
    };
    super::walk::for_each_commit(&history, &included, &passed, &none, |commit| {
        walk.add_commit(commit)
    })?;
    Ok(walk.finish().objects)
}
