//! What both sides have in common.

use gix_hash::ObjectId;

use crate::git::objects::commits::{CommitNumber, CommitSet, Commits};
use crate::git::snapshot::Snapshot;

/// The common commits that a client's `have` lines showed so far, in one negotiation about the same wants.
pub struct Common {
    commits: CommitSet,
    /// Commits that `descent` does not know of yet.
    new: Vec<CommitNumber>,
    last: Option<ObjectId>,
    descent: Option<Descent>,
}

impl Common {
    pub fn none(commits: &Commits) -> Self {
        Self {
            commits: commits.no_commits(),
            new: Vec::new(),
            last: None,
            descent: None,
        }
    }

    /// Takes one `have`; true when we have it as well.
    pub fn take(&mut self, have: &ObjectId, snapshot: &Snapshot, commits: &Commits) -> bool {
        let Some(commit) = snapshot
            .commit_of(have, commits)
            // A negotiation that goes on for long may see commits that were added after it began.
            .filter(|commit| self.commits.has_room_for(*commit))
            .filter(|_| snapshot.packs.contains(have))
        else {
            return false;
        };
        self.insert(commit);
        self.last = Some(*have);
        true
    }

    fn insert(&mut self, commit: CommitNumber) {
        if self.commits.insert(commit) {
            self.new.push(commit);
        }
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
    /// upload-pack.c). `wants` are the same at each call.
    ///
    /// SECURITY: this is asked after each of some hundred thousand haves. All calls together walk history once.
    pub fn is_enough_for(&mut self, wants: &[CommitNumber], commits: &Commits) -> bool {
        if self.is_empty() {
            return false;
        }
        let descent = self
            .descent
            .get_or_insert_with(|| Descent::of(wants, &self.commits, commits));
        for common in self.new.drain(..) {
            descent.cover(common);
        }
        descent.open == 0
    }
}

/// Which wanted commits descend from common ones. Made once, and then told of each common commit.
struct Descent {
    /// The children of commit `n` in the history that was looked at: `children[first_child[n]..first_child[n + 1]]`.
    first_child: Vec<u32>,
    children: Vec<CommitNumber>,
    /// Common commits, and what descends from them.
    covered: CommitSet,
    wanted: CommitSet,
    /// Number of wanted commits that are not covered.
    open: usize,
    /// Commits and children that were looked at.
    #[cfg(test)]
    steps: usize,
}

impl Descent {
    /// Looks at history down to `common`: what lies behind that leads to nothing that is not covered.
    fn of(wants: &[CommitNumber], common: &CommitSet, commits: &Commits) -> Self {
        let mut wanted = commits.no_commits();
        for want in wants {
            wanted.insert(*want);
        }
        let history = commits.reachable(wanted.iter(), common);
        // Counted, summed up, and then filled from behind, which leaves each sum at the first child.
        let mut first_child = vec![0; commits.len() + 1];
        let parents = |commit| commits.get(commit).parents.iter();
        for parent in history.iter().flat_map(parents) {
            first_child[parent.index()] += 1;
        }
        let mut sum = 0;
        for end in &mut first_child {
            sum += *end;
            *end = sum;
        }
        let mut children = match wants.first() {
            Some(placeholder) => vec![*placeholder; sum as usize],
            None => Vec::new(),
        };
        for child in history.iter() {
            for parent in parents(child) {
                let at = &mut first_child[parent.index()];
                *at -= 1;
                children[*at as usize] = child;
            }
        }
        Self {
            first_child,
            #[cfg(test)]
            steps: history.len() + children.len(),
            children,
            covered: commits.no_commits(),
            open: wanted.len(),
            wanted,
        }
    }

    /// Takes `common` and what descends from it, as far as that is new.
    fn cover(&mut self, common: CommitNumber) {
        let mut todo = vec![common];
        while let Some(commit) = todo.pop() {
            if !self.covered.insert(commit) {
                continue;
            }
            if self.wanted.contains(commit) {
                self.open -= 1;
            }
            let [first, end] = [0, 1].map(|next| self.first_child[commit.index() + next] as usize);
            todo.extend(&self.children[first..end]);
            #[cfg(test)]
            {
                self.steps += 1 + end - first;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::git::upload_pack::fixture::{Repository, unknown};

    #[test]
    fn history_behind_what_is_common_is_not_looked_at() {
        let mut repository = Repository::new();
        let line = repository.line(300);
        let snapshot = repository.snapshot(&[("refs/heads/main", line[299])]);
        let commits = snapshot.commits();
        let mut common = Common::none(&commits);
        common.take(&line[297], &snapshot, &commits);
        assert!(common.is_enough_for(&[commits.number(&line[299]).unwrap()], &commits));
        assert!(common.descent.unwrap().steps < 20);
    }

    #[test]
    fn history_is_walked_once_however_many_haves_come() {
        let mut repository = Repository::new();
        let wanted = repository.line(300);
        let theirs = repository.line(300);
        let snapshot = repository.snapshot(&[
            ("refs/heads/main", wanted[299]),
            ("refs/heads/other", theirs[299]),
        ]);
        let commits = snapshot.commits();
        let wants = [commits.number(&wanted[299]).unwrap()];
        let mut common = Common::none(&commits);
        for (number, have) in (0..).zip(&theirs) {
            assert!(common.take(have, &snapshot, &commits));
            assert!(!common.take(&unknown(number), &snapshot, &commits));
            assert!(!common.is_enough_for(&wants, &commits));
        }
        assert!(common.take(&wanted[7], &snapshot, &commits));
        for _ in 0..300 {
            assert!(common.is_enough_for(&wants, &commits));
        }
        let steps = common.descent.unwrap().steps;
        assert!(steps <= 2 * (600 + 600), "{steps} steps for 600 commits");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Commit `n` has the parents `parents[n]`, taken modulo `n`.
        #[test]
        fn it_is_enough_when_all_wants_descend_from_what_is_common(
            parents in prop::collection::vec(prop::collection::vec(any::<usize>(), 0..3), 1..12),
            wants in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
            haves in prop::collection::vec(any::<prop::sample::Index>(), 1..6),
        ) {
            let mut repository = Repository::new();
            let mut ids = Vec::new();
            for parents in &parents {
                let parents: Vec<ObjectId> = match ids.len() {
                    0 => Vec::new(),
                    before => parents.iter().map(|parent| ids[parent % before]).collect(),
                };
                ids.push(repository.commit(&parents));
            }
            let names: Vec<String> = (0..ids.len()).map(|nth| format!("refs/heads/{nth}")).collect();
            let branches: Vec<_> = names.iter().map(String::as_str).zip(ids.iter().copied()).collect();
            let snapshot = repository.snapshot(&branches);
            let commits = snapshot.commits();
            let wants: Vec<CommitNumber> =
                wants.iter().map(|want| commits.number(&ids[want.index(ids.len())]).unwrap()).collect();
            let mut common = Common::none(&commits);
            for have in haves {
                common.take(have.get(&ids), &snapshot, &commits);
                let expected = wants.iter().all(|want| {
                    commits
                        .reachable([*want], &commits.no_commits())
                        .iter()
                        .any(|reached| common.commits().contains(reached))
                });
                prop_assert_eq!(common.is_enough_for(&wants, &commits), expected);
            }
        }
    }
}
