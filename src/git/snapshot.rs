//! A mirror at one moment: what upload-pack reads while the next fetch goes on.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockReadGuard};

use gix_hash::ObjectId;
use gix_object::Kind;

use crate::git::objects::ObjectError;
use crate::git::objects::commits::{CommitNumber, Commits, peel};
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
    everything: OnceLock<ObjectSet>,
    /// Whether an advertised reference reaches every commit.
    all_live: OnceLock<bool>,
}

impl Snapshot {
    /// Reads the history that `refs` reach into `commits`, which may be that of the snapshot before.
    ///
    /// # Errors
    /// [`ObjectError`] when a reference names what is not in the packs, or history has a hole.
    pub fn new(
        packs: PackSet,
        refs: Refs,
        commits: Arc<RwLock<Commits>>,
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
            for tip in refs.tips().chain(refs.kept.keys().copied()) {
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
            commits
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .extend(&tips, &mut reader)?;
        }
        Ok(Self {
            packs,
            refs,
            commits,
            peeled,
            advertisements: Advertisements::default(),
            everything: OnceLock::new(),
            all_live: OnceLock::new(),
        })
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

    /// Every object once, also those that stand in several packs.
    pub fn everything(&self) -> &ObjectSet {
        self.everything.get_or_init(|| self.packs.all())
    }

    /// Whether nothing but what references reach is in the packs, as far as commits tell.
    pub fn all_live(&self, commits: &Commits) -> bool {
        *self.all_live.get_or_init(|| {
            let tips: Vec<CommitNumber> = self
                .refs
                .tips()
                .filter_map(|tip| self.commit_of(&tip, commits))
                .collect();
            commits.reachable(tips, &commits.no_commits()).len() == commits.len()
        })
    }
}
