//! What both sides have in common.

use gix_hash::ObjectId;

use crate::git::objects::commits::{CommitNumber, CommitSet, Commits};
use crate::git::snapshot::Snapshot;

/// The common commits that a client's `have` lines showed so far.
pub struct Common {
    commits: CommitSet,
    last: Option<ObjectId>,
}

impl Common {
    pub fn none(commits: &Commits) -> Self {
        Self {
            commits: commits.no_commits(),
            last: None,
        }
    }

    /// Takes one `have`; true when we have it as well.
    pub fn take(&mut self, have: &ObjectId, snapshot: &Snapshot, commits: &Commits) -> bool {
        let Some(commit) = snapshot
            .commit_of(have, commits)
            .filter(|_| snapshot.packs.contains(have))
        else {
            return false;
        };
        self.commits.insert(commit);
        self.last = Some(*have);
        true
    }

    pub fn is_empty(&self) -> bool {
        self.commits.is_empty()
    }

    /// The have that was found last, which some acknowledgements repeat.
    pub fn last(&self) -> Option<ObjectId> {
        self.last
    }

    pub fn commits(&self) -> &CommitSet {
        &self.commits
    }

    /// Whether more haves would tell nothing: each wanted commit descends from a common one (`ok_to_give_up` in
    /// upload-pack.c). One pass over history, whatever the number of wants.
    pub fn is_enough_for(&self, wants: &[CommitNumber], commits: &Commits) -> bool {
        if self.is_empty() {
            return false;
        }
        let mut state = vec![Reach::Unknown; commits.len()];
        let index = |commit: CommitNumber| commit.index();
        for common in self.commits.iter() {
            state[index(common)] = Reach::Yes;
        }
        wants.iter().all(|want| {
            let mut path = vec![*want];
            while let Some(commit) = path.last().copied() {
                match state[index(commit)] {
                    Reach::Yes | Reach::No => {
                        path.pop();
                    }
                    Reach::Unknown => {
                        state[index(commit)] = Reach::Open;
                        let parents = &commits.get(commit).parents;
                        path.extend(
                            parents
                                .iter()
                                .filter(|parent| state[index(**parent)] == Reach::Unknown),
                        );
                    }
                    Reach::Open => {
                        let parents = &commits.get(commit).parents;
                        let found = parents
                            .iter()
                            .any(|parent| state[index(*parent)] == Reach::Yes);
                        state[index(commit)] = if found { Reach::Yes } else { Reach::No };
                        path.pop();
                    }
                }
            }
            state[index(*want)] == Reach::Yes
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reach {
    Unknown,
    /// Its parents are being looked at.
    Open,
    Yes,
    No,
}
