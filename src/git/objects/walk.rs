//! Which objects a set of commits brings: trees and blobs that its parents do not have already.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::rc::Rc;

use gix_hash::{Kind as HashKind, ObjectId};
use gix_object::tree::EntryKind;
use gix_object::{Kind, TreeRefIter};

use super::ObjectError;
use super::commits::{CommitNumber, CommitSet, Commits, Peeled, peel};
use super::packs::{ObjectNumber, Reader};
use super::set::ObjectSet;
use super::versions::Versions;

/// What a partial clone leaves out (`git rev-list --filter`). Filters combine: an object must pass all of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Filter {
    /// Blobs of this many bytes or more are left out; 0 leaves out all (`blob:none`).
    pub blob_limit: Option<u64>,
    /// Trees and blobs at this depth or deeper are left out; root trees are at depth 0.
    pub tree_depth: Option<u64>,
    /// Only objects of this kind.
    pub kind: Option<Kind>,
}

impl Filter {
    fn takes(&self, kind: Kind) -> bool {
        self.kind.is_none_or(|only| only == kind)
    }

    fn reaches(&self, depth: u64) -> bool {
        self.tree_depth.is_none_or(|limit| depth < limit)
    }

    fn walks_trees(&self) -> bool {
        self.reaches(0)
            && self
                .kind
                .is_none_or(|only| matches!(only, Kind::Tree | Kind::Blob))
    }
}

/// What a walk found.
pub struct Walked {
    /// What is to be sent.
    pub objects: ObjectSet,
    /// Objects met on the way that the other side has: bases for a thin pack.
    pub known: ObjectSet,
    /// What the objects replace, where [`Walk::note_versions`] asked for that.
    versions: Versions,
}

impl Walked {
    /// To be called once all that is to be sent is found, and before a thin pack is written.
    pub fn settle(&mut self) {
        // What is sent as well may itself be a delta of what it is to be the base of.
        self.known.subtract(&self.objects);
        self.versions.settle(&self.objects);
        // Each is in a parent's tree, all of which is sent or the other side's: what is not sent, it has.
        for version in self.versions.all() {
            self.known.insert(version);
        }
    }

    /// The last version of `object` that the other side has, once that is settled.
    pub(super) fn known_version(&self, object: ObjectNumber) -> Option<ObjectNumber> {
        self.versions.before(object)
    }
}

/// Trees of the other side that are looked at for what moved. Linux has some 5,000.
const MOST_MARKED: u32 = 10_000;

/// Collects the objects to send.
pub struct Walk<'w, 'p> {
    reader: &'w mut Reader<'p>,
    filter: Filter,
    found: Walked,
    /// At which depth a tree was walked; kept only where the filter looks at depth.
    depths: HashMap<ObjectNumber, u64>,
    trees: TreeCache,
    cancelled: &'w dyn Fn() -> bool,
    steps: u32,
    /// Trees that [`Walk::mark_known_tree`] has looked at.
    marked: u32,
}

impl<'w, 'p> Walk<'w, 'p> {
    pub fn new(reader: &'w mut Reader<'p>) -> Self {
        Self::filtered(reader, Filter::default(), &|| false)
    }

    /// A walk that stops with [`ObjectError::Cancelled`] once `cancelled` says so.
    pub fn filtered(
        reader: &'w mut Reader<'p>,
        filter: Filter,
        cancelled: &'w dyn Fn() -> bool,
    ) -> Self {
        let room = reader.packs().room();
        Self {
            reader,
            filter,
            found: Walked {
                objects: ObjectSet::with_room_for(room),
                known: ObjectSet::with_room_for(room),
                versions: Versions::default(),
            },
            depths: HashMap::new(),
            trees: TreeCache::new(),
            cancelled,
            steps: 0,
            marked: 0,
        }
    }

    /// From now on it is kept what the added trees and blobs replace.
    pub fn note_versions(&mut self) {
        self.found.versions = Versions::with_room_for(self.reader.packs().room());
    }

    pub fn finish(self) -> Walked {
        self.found
    }

    pub fn contains(&self, object: ObjectNumber) -> bool {
        self.found.objects.contains(object)
    }

    /// Follows tags from `id`, adds them, and returns what they name without adding that.
    ///
    /// # Errors
    /// [`ObjectError`] when an object is missing or damaged.
    pub fn peel_into(&mut self, id: ObjectId) -> Result<Peeled, ObjectError> {
        let peeled = peel(id, self.reader)?;
        for tag in &peeled.tags {
            self.found.objects.insert(self.reader.packs().require(tag)?);
        }
        Ok(peeled)
    }

    /// Adds a tree with all below it, or a blob. What was asked for by its id passes every filter.
    ///
    /// # Errors
    /// [`ObjectError`] when an object is missing or damaged.
    pub fn add_object(&mut self, id: &ObjectId) -> Result<(), ObjectError> {
        let number = self.reader.packs().require(id)?;
        if self.reader.header(number)?.kind == Kind::Tree && self.filter.walks_trees() {
            self.add_tree(id, &[])?;
        }
        self.found.objects.insert(number);
        Ok(())
    }

    /// Says that the other side has the tree `id` and all below it; to be called before anything is added. After
    /// [`MOST_MARKED`] trees in all it looks at no more, and what is below them may be sent again.
    ///
    /// # Errors
    /// [`ObjectError`] when an object is missing or damaged.
    pub fn mark_known_tree(&mut self, id: &ObjectId) -> Result<(), ObjectError> {
        let mut todo = vec![*id];
        while let Some(id) = todo.pop() {
            self.step()?;
            let number = self.reader.packs().require(&id)?;
            if !self.found.known.insert(number) {
                continue;
            }
            self.marked += 1;
            if self.marked > MOST_MARKED {
                return Ok(());
            }
            let tree = self.tree(number, &id)?;
            for entry in Entries::of(&tree) {
                match entry.kind {
                    EntryKind::Tree => todo.push(entry.id),
                    EntryKind::Commit => {}
                    _ => {
                        self.found
                            .known
                            .insert(self.reader.packs().require(&entry.id)?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Adds a commit with the trees and blobs that differ from those of its `parents`, each of which is added as well
    /// or is the other side's.
    ///
    /// # Errors
    /// [`ObjectError`] when an object is missing or damaged.
    pub fn add_commit(&mut self, commit: &CommitToAdd) -> Result<(), ObjectError> {
        if self.filter.takes(Kind::Commit) {
            let number = self.reader.packs().require(&commit.id)?;
            self.found.objects.insert(number);
        }
        if self.filter.walks_trees() {
            self.add_tree(&commit.tree, &commit.parents)?;
        }
        Ok(())
    }

    /// Adds an object whatever the filter says.
    ///
    /// # Errors
    /// [`ObjectError::Missing`].
    pub fn add_unfiltered(&mut self, id: &ObjectId) -> Result<(), ObjectError> {
        let number = self.reader.packs().require(id)?;
        self.found.objects.insert(number);
        Ok(())
    }

    /// Goes down without recursion, as a thread's stack is not made for the deepest tree.
    fn add_tree(&mut self, id: &ObjectId, bases: &[Base]) -> Result<(), ObjectError> {
        let mut todo = Vec::new();
        self.add_tree_alone(id, bases, 0, &mut todo)?;
        while let Some(Subtree { id, bases, depth }) = todo.pop() {
            self.add_tree_alone(&id, &bases, depth, &mut todo)?;
        }
        Ok(())
    }

    /// Adds a tree with its blobs, and to `todo` the trees in it, the first as the next one.
    fn add_tree_alone(
        &mut self,
        id: &ObjectId,
        bases: &[Base],
        depth: u64,
        todo: &mut Vec<Subtree>,
    ) -> Result<(), ObjectError> {
        self.step()?;
        if depth > DEEPEST_TREE {
            return Err(ObjectError::TooDeep(*id));
        }
        if !self.filter.reaches(depth) || bases.iter().any(|base| base.tree == *id) {
            return Ok(());
        }
        let number = self.reader.packs().require(id)?;
        if self.found.known.contains(number) || self.walked_before(number, depth) {
            return Ok(());
        }
        if self.filter.takes(Kind::Tree) {
            self.found.objects.insert(number);
        }
        let tree = self.tree(number, id)?;
        let mut base_trees = Vec::with_capacity(bases.len());
        for base in bases {
            let base_number = self.reader.packs().require(&base.tree)?;
            if base.theirs {
                self.found.known.insert(base_number);
            }
            self.found.versions.note(number, base_number);
            base_trees.push((self.tree(base_number, &base.tree)?, base.theirs));
        }
        let above = todo.len();
        let mut base_entries: Vec<_> = base_trees
            .iter()
            .map(|(tree, theirs)| (Entries::of(tree).peekable(), *theirs))
            .collect();

        for entry in Entries::of(&tree) {
            // The entries of the same name in the bases; the entry is old when one of them is the same.
            let mut old = false;
            let mut below = Vec::new();
            let mut before = None;
            for (entries, theirs) in &mut base_entries {
                while entries
                    .peek()
                    .is_some_and(|other| other.cmp_in_tree(&entry) == Ordering::Less)
                {
                    entries.next();
                }
                let Some(other) = entries
                    .peek()
                    .filter(|other| other.cmp_in_tree(&entry) == Ordering::Equal)
                else {
                    continue;
                };
                // A submodule's commit is not here, whatever else has its id.
                let both_here = other.kind != EntryKind::Commit && entry.kind != EntryKind::Commit;
                if other.id == entry.id && both_here {
                    old = true;
                } else if entry.kind == EntryKind::Tree && other.kind == EntryKind::Tree {
                    below.push(Base {
                        tree: other.id,
                        theirs: *theirs,
                    });
                } else if other.kind != EntryKind::Commit
                    && (*theirs || (before.is_none() && self.found.versions.are_kept()))
                    && let Some(base) = self.reader.packs().find(&other.id)
                {
                    if *theirs {
                        self.found.known.insert(base);
                    }
                    before = before.or(Some(base));
                }
            }
            if old {
                continue;
            }
            match entry.kind {
                EntryKind::Commit => {}
                EntryKind::Tree => todo.push(Subtree {
                    id: entry.id,
                    bases: below,
                    depth: depth + 1,
                }),
                _ => self.add_blob(&entry.id, before, depth + 1)?,
            }
        }
        todo[above..].reverse();
        Ok(())
    }

    fn step(&mut self) -> Result<(), ObjectError> {
        self.steps = self.steps.wrapping_add(1);
        if self.steps.is_multiple_of(256) && (self.cancelled)() {
            return Err(ObjectError::Cancelled);
        }
        Ok(())
    }

    fn add_blob(
        &mut self,
        id: &ObjectId,
        before: Option<ObjectNumber>,
        depth: u64,
    ) -> Result<(), ObjectError> {
        if !self.filter.takes(Kind::Blob)
            || !self.filter.reaches(depth)
            || self.filter.blob_limit == Some(0)
        {
            return Ok(());
        }
        let number = self.reader.packs().require(id)?;
        if self.found.known.contains(number) {
            return Ok(());
        }
        if let Some(limit) = self.filter.blob_limit
            && self.reader.header(number)?.object_size >= limit
        {
            return Ok(());
        }
        self.found.objects.insert(number);
        if let Some(before) = before {
            self.found.versions.note(number, before);
        }
        Ok(())
    }

    /// A tree met again needs no second walk, unless it is nearer to the root now and a filter looks at that.
    fn walked_before(&mut self, tree: ObjectNumber, depth: u64) -> bool {
        if self.filter.tree_depth.is_none() && self.filter.takes(Kind::Tree) {
            return self.found.objects.contains(tree);
        }
        match self.depths.get(&tree) {
            Some(before) if *before <= depth => true,
            _ => {
                self.depths.insert(tree, depth);
                false
            }
        }
    }

    fn tree(&mut self, number: ObjectNumber, id: &ObjectId) -> Result<Rc<[u8]>, ObjectError> {
        if let Some(tree) = self.trees.get(number) {
            return Ok(tree);
        }
        let mut buffer = Vec::new();
        let found = self.reader.read(number, &mut buffer)?;
        if found != Kind::Tree {
            return Err(ObjectError::Kind {
                id: *id,
                expected: Kind::Tree,
                found,
            });
        }
        Ok(self.trees.put(number, buffer.into()))
    }
}

/// Git's own limit (`core.maxTreeDepth`). Deeper trees are no source code.
const DEEPEST_TREE: u64 = 2048;

/// A tree that is to be added.
struct Subtree {
    id: ObjectId,
    bases: Vec<Base>,
    depth: u64,
}

/// A tree to compare with, and whether the other side has it.
pub struct Base {
    pub tree: ObjectId,
    pub theirs: bool,
}

/// A commit for [`Walk::add_commit`].
pub struct CommitToAdd {
    pub id: ObjectId,
    pub tree: ObjectId,
    /// The trees of its parents; none for a commit that is to count as without.
    pub parents: Vec<Base>,
}

/// Calls `each` for every commit of `included`. A parent is in `included` as well or in `theirs`, or what it has does not
/// matter; a commit in `cuts` counts as without parents.
///
/// Parents come first: what a commit shares with them counts as added, and a tree that was added before is not looked at
/// again. In another order a change and its revert would each leave to the other what both share.
///
/// History is looked at in slices, so that a fetch that has to add to it never waits for a whole walk.
///
/// # Errors
/// The first of `each`.
pub fn for_each_commit<'h, H: std::ops::Deref<Target = Commits> + 'h>(
    history: impl Fn() -> H,
    included: &CommitSet,
    theirs: &CommitSet,
    cuts: &CommitSet,
    mut each: impl FnMut(&CommitToAdd) -> Result<(), ObjectError>,
) -> Result<(), ObjectError> {
    let order = history().parents_first(included);
    for slice in order.chunks(SLICE) {
        let to_add: Vec<CommitToAdd> = {
            let commits = history();
            let base = |parent: &CommitNumber| Base {
                tree: commits.get(*parent).tree,
                theirs: theirs.contains(*parent),
            };
            let to_add = |number: &CommitNumber| {
                let commit = commits.get(*number);
                let parents = if cuts.contains(*number) {
                    &[][..]
                } else {
                    &commit.parents
                };
                CommitToAdd {
                    id: commit.id,
                    tree: commit.tree,
                    parents: parents.iter().map(base).collect(),
                }
            };
            slice.iter().map(to_add).collect()
        };
        to_add.iter().try_for_each(&mut each)?;
    }
    Ok(())
}

/// Commits that are looked at in one go.
const SLICE: usize = 1024;

struct Entry<'t> {
    kind: EntryKind,
    name: &'t [u8],
    id: ObjectId,
}

impl Entry<'_> {
    /// The order of entries in a tree: folders sort as if their names ended in `/`.
    fn cmp_in_tree(&self, other: &Self) -> Ordering {
        let common = self.name.len().min(other.name.len());
        self.name[..common]
            .cmp(&other.name[..common])
            .then_with(|| {
                let end = |entry: &Self| {
                    entry
                        .name
                        .get(common)
                        .copied()
                        .or((entry.kind == EntryKind::Tree).then_some(b'/'))
                };
                end(self)
                    .cmp(&end(other))
                    .then_with(|| self.name.len().cmp(&other.name.len()))
            })
    }
}

struct Entries<'t>(TreeRefIter<'t>);

impl<'t> Entries<'t> {
    fn of(tree: &'t [u8]) -> Self {
        Self(TreeRefIter::from_bytes(tree, HashKind::Sha1))
    }
}

impl<'t> Iterator for Entries<'t> {
    type Item = Entry<'t>;

    /// An entry that does not parse ends the tree. The object was hashed when it came in, so this is what its
    /// author stored.
    fn next(&mut self) -> Option<Entry<'t>> {
        let entry = self.0.next()?.ok()?;
        Some(Entry {
            kind: entry.mode.kind(),
            name: entry.filename,
            id: entry.oid.to_owned(),
        })
    }
}

/// Trees decoded of late. Neighbouring commits compare the same trees: one lookup in two is saved.
struct TreeCache {
    slots: Vec<Option<(ObjectNumber, Rc<[u8]>)>>,
}

/// 4,096 slots of at most 16 KiB: 64 MiB at the very worst, a few in practice.
const TREE_SLOTS: usize = 4096;
const LARGEST_CACHED_TREE: usize = 16 << 10;

impl TreeCache {
    fn new() -> Self {
        Self {
            slots: vec![None; TREE_SLOTS],
        }
    }

    fn get(&self, number: ObjectNumber) -> Option<Rc<[u8]>> {
        let (found, tree) = self.slots[number.0 as usize % TREE_SLOTS].as_ref()?;
        (*found == number).then(|| Rc::clone(tree))
    }

    fn put(&mut self, number: ObjectNumber, tree: Rc<[u8]>) -> Rc<[u8]> {
        if tree.len() <= LARGEST_CACHED_TREE {
            self.slots[number.0 as usize % TREE_SLOTS] = Some((number, Rc::clone(&tree)));
        }
        tree
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::upload_pack::fixture::Repository;

    #[test]
    fn the_deepest_tree_is_walked_and_a_deeper_one_refused() {
        let mut repository = Repository::new();
        let commit = repository.commit(&[]);
        let trees = repository.nested_trees(DEEPEST_TREE as usize + 1);
        let snapshot = repository.snapshot(&[("refs/heads/main", commit)]);
        let mut reader = Reader::new(&snapshot.packs);
        let [.., deepest, deeper] = trees.as_slice() else {
            panic!("as many as were asked for");
        };
        let mut walk = Walk::new(&mut reader);
        walk.add_object(deepest).unwrap();
        assert_eq!(walk.finish().objects.len(), DEEPEST_TREE as usize + 1);
        let refused = Walk::new(&mut reader).add_object(deeper);
        assert!(matches!(refused, Err(ObjectError::TooDeep(_))));
    }
}
