//! A mirror at one moment: what upload-pack reads while the next fetch goes on.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use gix_hash::{ObjectId, oid};
use gix_object::Kind;

use crate::git::objects::ObjectError;
use crate::git::objects::commits::{CommitNumber, CommitSet, Commits, closure, peel};
use crate::git::objects::packs::{PackSet, Reader};
use crate::git::objects::set::ObjectSet;
use crate::git::refs::Refs;
use crate::git::upload_pack::advertise::Advertisements;

/// Packs, references and history that belong together. Never changes; a fetch makes the next one.
pub struct Snapshot {
    pub packs: PackSet,
    pub refs: Refs,
    commits: Arc<RwLock<Commits>>,
    /// What annotated tags come to.
    peeled: HashMap<ObjectId, ObjectId>,
    pub advertisements: Advertisements,
    /// The commits that advertised references reach.
    live: CommitSet,
    /// Whether nothing else is in the packs.
    all_live: bool,
    garbage: bool,
    live_objects: OnceLock<ObjectSet>,
    memory: u64,
}

/// About what a commit takes in memory, an object by its place in a pack, and a reference.
const COMMIT_BYTES: u64 = 150;
const OBJECT_BYTES: u64 = 16;
const REF_BYTES: u64 = 300;

impl Snapshot {
    /// Reads the history that `refs` reach into `commits`, which may be that of the snapshot before. Kept tips that a
    /// reference reaches need no keeping and are dropped: after most moves of a branch that is all of them.
    ///
    /// `garbage` says that the packs hold objects which nothing reaches.
    ///
    /// # Errors
    /// [`ObjectError`] when a reference names what is not in the packs, or history has a hole.
    pub fn new(
        packs: PackSet,
        mut refs: Refs,
        commits: Arc<RwLock<Commits>>,
        garbage: bool,
    ) -> Result<Self, ObjectError> {
        let peeled: HashMap<ObjectId, ObjectId> = refs
            .names
            .values()
            .filter_map(|target| Some((target.id, target.peeled?)))
            .collect();
        let mut reader = Reader::new(&packs);
        let mut tips = Vec::new();
        {
            let known = commits.read().unwrap_or_else(PoisonError::into_inner);
            for tip in refs.held() {
                let tip = peeled.get(&tip).copied().unwrap_or(tip);
                if known.number(&tip).is_some() && packs.contains(&tip) {
                    continue;
                }
                let end = peel(tip, &mut reader)?;
                if end.kind == Kind::Commit {
                    tips.push(end.id);
                }
            }
        }
        if !tips.is_empty() {
            // Whoever changes a mirror is alone, so nothing is added between reading and appending, and readers wait
            // for the appending only.
            let new = commits
                .read()
                .unwrap_or_else(PoisonError::into_inner)
                .read_new(&tips, &mut reader)?;
            commits
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .append(new);
        }
        let history = commits.read().unwrap_or_else(PoisonError::into_inner);
        let live = reached(refs.tips(), &peeled, &history);
        refs.kept
            .retain(|kept, _| !history.number(kept).is_some_and(|kept| live.contains(kept)));
        let all_live = !garbage && refs.kept.is_empty() && live.len() == history.len();
        let memory = history.len() as u64 * COMMIT_BYTES
            + u64::from(packs.room()) * OBJECT_BYTES
            + refs.names.len() as u64 * REF_BYTES;
        drop(history);
        Ok(Self {
            packs,
            refs,
            live,
            all_live,
            garbage,
            commits,
            peeled,
            advertisements: Advertisements::default(),
            live_objects: OnceLock::new(),
            memory,
        })
    }

    /// About how many bytes of memory it takes as long as it is open.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    pub fn commits(&self) -> RwLockReadGuard<'_, Commits> {
        self.commits.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The history, for the snapshot that follows this one.
    pub fn shared_commits(&self) -> Arc<RwLock<Commits>> {
        Arc::clone(&self.commits)
    }

    /// The commit that `id` is or, as a tag, comes to.
    pub fn commit_of(&self, id: &ObjectId, commits: &Commits) -> Option<CommitNumber> {
        commits.number(self.peeled.get(id).unwrap_or(id))
    }

    /// The commits that advertised references reach.
    pub fn live(&self) -> &CommitSet {
        &self.live
    }

    /// Whether `new`, commits and annotated tags of a pack, all belong to this history. Others may come from an upstream
    /// that sends more than was asked for, as this service does where a client wants nearly everything.
    ///
    /// # Errors
    /// [`ObjectError`] when a tag is damaged.
    pub fn knows(&self, new: &[&oid]) -> Result<bool, ObjectError> {
        let mut strangers: HashSet<&oid> = {
            let history = self.commits();
            let unknown =
                |id: &&oid| history.number(id).is_none() && !self.peeled.contains_key(*id);
            new.iter().copied().filter(unknown).collect()
        };
        if strangers.is_empty() {
            return Ok(true);
        }
        // A tag may stand between another one and what that comes to.
        let mut reader = Reader::new(&self.packs);
        for tip in self.refs.held() {
            for tag in peel(tip, &mut reader)?.tags {
                strangers.remove(&*tag);
            }
        }
        Ok(strangers.is_empty())
    }

    /// Whether its references, kept ones included, reach all that those of `before` did, an earlier snapshot with the same
    /// history.
    pub fn reaches_all_of(&self, before: &Self) -> bool {
        let history = self.commits();
        let held: HashSet<ObjectId> = self.refs.held().collect();
        // Of a tag that is only kept, no more is known than before.
        let peeled = |tip| {
            self.peeled
                .get(&tip)
                .or(before.peeled.get(&tip))
                .copied()
                .unwrap_or(tip)
        };
        let reach = |refs: &Refs| {
            let commits = refs.held().filter_map(|tip| history.number(&peeled(tip)));
            history.reachable(commits, &history.no_commits())
        };
        let still = reach(&self.refs);
        reach(&before.refs)
            .iter()
            .all(|commit| still.contains(commit))
            && before
                .refs
                .held()
                .all(|tip| history.number(&tip).is_some() || held.contains(&tip))
    }

    /// Says that the packs hold objects which nothing reaches.
    pub fn set_garbage(&mut self) {
        self.garbage = true;
        self.all_live = false;
    }

    /// Whether the packs hold objects that nothing reaches.
    pub fn has_garbage(&self) -> bool {
        self.garbage
    }

    /// Whether `id` is a live commit or an advertised tag, so that it and all it reaches are in
    /// [`Snapshot::live_objects`].
    pub fn is_live(&self, id: &ObjectId, commits: &Commits) -> bool {
        self.peeled.contains_key(id)
            || commits
                .number(id)
                .is_some_and(|commit| self.live.contains(commit))
    }

    /// Annotated tags of what is no commit, with what they name in the end.
    pub fn loose_tags(&self, commits: &Commits) -> Vec<(ObjectId, ObjectId)> {
        let named = self
            .peeled
            .iter()
            .filter(|(_, named)| commits.number(named).is_none());
        let mut tags: Vec<_> = named.map(|(tag, named)| (*tag, *named)).collect();
        tags.sort_unstable();
        tags
    }

    /// What tells one set of live objects from another: the packs, and the tips where packs hold more than they reach.
    pub fn live_name(&self) -> impl Iterator<Item = Vec<u8>> + '_ {
        let packs = self.packs.packs().iter();
        let packs = packs.map(|pack| {
            pack.path()
                .file_name()
                .unwrap_or_default()
                .as_encoded_bytes()
                .to_vec()
        });
        let mut tips: Vec<ObjectId> = if self.all_live {
            Vec::new()
        } else {
            self.refs.tips().collect()
        };
        tips.sort_unstable();
        tips.dedup();
        packs.chain(tips.into_iter().map(|tip| tip.as_slice().to_vec()))
    }

    /// Every object that an advertised reference reaches. The first call may have to walk all of history.
    ///
    /// # Errors
    /// [`ObjectError`] when an object is missing or damaged.
    pub fn live_objects(
        &self,
        reader: &mut Reader<'_>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<&ObjectSet, ObjectError> {
        if let Some(live) = self.live_objects.get() {
            return Ok(live);
        }
        let live = if self.all_live {
            self.packs.all()
        } else {
            let tips: Vec<ObjectId> = self.refs.tips().collect();
            closure(|| self.commits(), &tips, &[], reader, cancelled)?
        };
        Ok(self.live_objects.get_or_init(|| live))
    }
}

fn reached(
    tips: impl Iterator<Item = ObjectId>,
    peeled: &HashMap<ObjectId, ObjectId>,
    commits: &Commits,
) -> CommitSet {
    let tips = tips.filter_map(|tip| commits.number(peeled.get(&tip).unwrap_or(&tip)));
    commits.reachable(tips, &commits.no_commits())
}
