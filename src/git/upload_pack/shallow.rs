//! Where history is cut off: `deepen`, `deepen-since`, `deepen-not`, and the boundary that a client has already.

use std::collections::VecDeque;

use gix_hash::ObjectId;
use gix_object::bstr::{BStr, BString, ByteSlice};

use super::Refusal;
use super::request::{Deepen, FetchRequest};
use crate::git::objects::commits::{CommitNumber, CommitSet, Commits};
use crate::git::refs::Refs;
use crate::git::snapshot::Snapshot;

/// The boundary before and after a fetch.
pub struct Boundary {
    /// Commits that become boundary: `shallow` lines.
    pub shallow: Vec<ObjectId>,
    /// Commits that are boundary no longer: `unshallow` lines.
    pub unshallow: Vec<ObjectId>,
    /// Commits without parents for the client after the fetch.
    pub cuts: CommitSet,
    /// Commits without parents for the client before it.
    pub client_cuts: CommitSet,
}

impl Boundary {
    /// Works out the boundary for a request whose wants come to the commits `wants`.
    ///
    /// # Errors
    /// [`Refusal`] when a `deepen-not` names no reference, or when no commit is left.
    pub fn of(
        request: &FetchRequest,
        wants: &[CommitNumber],
        snapshot: &Snapshot,
        commits: &Commits,
    ) -> Result<Self, Refusal> {
        let mut client_cuts = commits.no_commits();
        // History is shared with other snapshots, and may have commits that are not in these packs.
        let present = request
            .shallow
            .iter()
            .filter(|id| snapshot.packs.contains(id));
        for commit in present.filter_map(|id| commits.number(id)) {
            client_cuts.insert(commit);
        }
        let mut boundary = Self {
            shallow: Vec::new(),
            unshallow: Vec::new(),
            cuts: client_cuts.clone(),
            client_cuts,
        };
        if !request.deepen.is_asked() {
            return Ok(boundary);
        }
        if request.deepen.depth.is_some()
            && (request.deepen.since.is_some() || !request.deepen.not.is_empty())
        {
            return Err(Refusal::Malformed(
                "expected `deepen`, or `deepen-since` and `deepen-not`, found both".to_owned(),
            ));
        }

        let (inside, edge) = included(
            &request.deepen,
            wants,
            &boundary.client_cuts,
            snapshot,
            commits,
        )?;
        boundary.cuts = commits.no_commits();
        for commit in edge.iter() {
            boundary.cuts.insert(commit);
            if !boundary.client_cuts.contains(commit) {
                boundary.shallow.push(commits.get(commit).id);
            }
        }
        let infinite = request.deepen.depth == Some(Deepen::INFINITE);
        for commit in boundary.client_cuts.iter() {
            if infinite || inside.contains(commit) {
                boundary.unshallow.push(commits.get(commit).id);
            } else {
                boundary.cuts.insert(commit);
            }
        }
        Ok(boundary)
    }
}

/// The commits that keep their parents, and those at the edge that lose them.
fn included(
    deepen: &Deepen,
    wants: &[CommitNumber],
    client_cuts: &CommitSet,
    snapshot: &Snapshot,
    commits: &Commits,
) -> Result<(CommitSet, CommitSet), Refusal> {
    match deepen.depth {
        Some(Deepen::INFINITE) => Ok((commits.no_commits(), commits.no_commits())),
        // Counted from a boundary that the client does not have, nothing is cut: a complete clone stays complete.
        Some(depth) if deepen.relative => {
            let reachable = commits.reachable(wants.iter().copied(), &commits.no_commits());
            // The boundary moves on every branch, wanted or not, as with git's own server.
            let starts: Vec<_> = client_cuts
                .iter()
                .filter(|cut| reachable.contains(*cut) || snapshot.live().contains(*cut))
                .collect();
            Ok(to_depth(&starts, depth.saturating_add(1), commits))
        }
        Some(depth) => Ok(to_depth(wants, depth, commits)),
        None => by_limits(deepen, wants, snapshot, commits),
    }
}

fn to_depth(starts: &[CommitNumber], depth: u32, commits: &Commits) -> (CommitSet, CommitSet) {
    let (mut inside, mut edge) = (commits.no_commits(), commits.no_commits());
    let mut seen = commits.no_commits();
    // Breadth first, so that a commit is met at its least depth.
    let mut queue: VecDeque<(CommitNumber, u32)> = starts.iter().map(|start| (*start, 1)).collect();
    while let Some((commit, at)) = queue.pop_front() {
        if !seen.insert(commit) {
            continue;
        }
        if at >= depth {
            edge.insert(commit);
        } else {
            inside.insert(commit);
            queue.extend(
                commits
                    .get(commit)
                    .parents
                    .iter()
                    .map(|parent| (*parent, at + 1)),
            );
        }
    }
    (inside, edge)
}

fn by_limits(
    deepen: &Deepen,
    wants: &[CommitNumber],
    snapshot: &Snapshot,
    commits: &Commits,
) -> Result<(CommitSet, CommitSet), Refusal> {
    let mut not = Vec::new();
    for name in &deepen.not {
        let id = resolve(&snapshot.refs, name.as_bstr())
            .ok_or_else(|| Refusal::UnknownRef(name.clone()))?;
        not.extend(snapshot.commit_of(&id, commits));
    }
    let mut outside = commits.reachable(not, &commits.no_commits());
    let since = deepen.since.unwrap_or(i64::MIN);
    let reachable = commits.reachable(wants.iter().copied(), &commits.no_commits());
    for commit in reachable
        .iter()
        .filter(|commit| commits.get(*commit).time < since)
    {
        outside.insert(commit);
    }
    let taken = commits.reachable_without(wants.iter().copied(), &commits.no_commits(), &outside);
    if taken.is_empty() {
        return Err(Refusal::Malformed(
            "no commits selected for shallow requests".to_owned(),
        ));
    }
    let (mut inside, mut edge) = (commits.no_commits(), commits.no_commits());
    for commit in taken.iter() {
        let whole = commits
            .get(commit)
            .parents
            .iter()
            .all(|parent| taken.contains(*parent));
        if whole {
            inside.insert(commit)
        } else {
            edge.insert(commit)
        };
    }
    Ok((inside, edge))
}

/// Finds a reference as `git rev-parse` would: as it is, as a tag, as a branch.
fn resolve(refs: &Refs, name: &BStr) -> Option<ObjectId> {
    if name == "HEAD" {
        return refs.head_id();
    }
    ["", "refs/", "refs/tags/", "refs/heads/"]
        .iter()
        .find_map(|prefix| {
            let full: BString = [prefix.as_bytes(), name].concat().into();
            refs.names.get(&full).map(|target| target.id)
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::git::upload_pack::fixture::{Repository, unknown};

    const DEEPER: Deepen = Deepen {
        depth: Some(1),
        relative: true,
        since: None,
        not: Vec::new(),
    };

    /// What is cut for a request that wants the end of a line of ten commits.
    fn lines(deepen: Deepen, boundary: impl Fn(&[ObjectId]) -> Vec<ObjectId>) -> [Vec<usize>; 2] {
        let mut repository = Repository::new();
        let line = repository.line(10);
        let snapshot = repository.snapshot(&[("refs/heads/main", line[9])]);
        let commits = snapshot.commits();
        let request = FetchRequest {
            wants: vec![line[9]],
            shallow: boundary(&line),
            deepen,
            ..FetchRequest::default()
        };
        let wants = [commits.number(&line[9]).unwrap()];
        let boundary = Boundary::of(&request, &wants, &snapshot, &commits).unwrap();
        let place = |id: &ObjectId| line.iter().position(|commit| commit == id).unwrap();
        let mut cuts: Vec<usize> = boundary
            .cuts
            .iter()
            .map(|cut| place(&commits.get(cut).id))
            .collect();
        cuts.sort_unstable();
        assert_eq!(boundary.shallow.len(), cuts.len());
        [cuts, boundary.unshallow.iter().map(place).collect()]
    }

    const NOTHING: [Vec<usize>; 2] = [Vec::new(), Vec::new()];

    #[test]
    fn a_boundary_moves_by_as_many_commits_as_are_asked_for() {
        assert_eq!(lines(DEEPER, |line| vec![line[5]]), [vec![4], vec![5]]);
    }

    #[test]
    fn deepening_a_complete_clone_cuts_nothing() {
        assert_eq!(lines(DEEPER, |_| vec![]), NOTHING);
        assert_eq!(lines(DEEPER, |_| vec![unknown(1)]), NOTHING);
    }

    #[test]
    fn a_boundary_that_only_another_snapshot_has_is_none() {
        let mut repository = Repository::new();
        let line = repository.line(2);
        let early = repository.snapshot(&[("refs/heads/main", line[1])]);
        let newer = repository.commit(&[line[1]]);
        let late = repository.snapshot(&[("refs/heads/main", newer)]);
        let history = late.shared_commits();
        let snapshot = Snapshot::new(early.packs, early.refs, history, false).unwrap();
        let commits = snapshot.commits();
        let request = FetchRequest {
            wants: vec![line[1]],
            shallow: vec![newer],
            deepen: Deepen {
                depth: Some(Deepen::INFINITE),
                ..Deepen::default()
            },
            ..FetchRequest::default()
        };
        let wants = [commits.number(&line[1]).unwrap()];
        let boundary = Boundary::of(&request, &wants, &snapshot, &commits).unwrap();
        assert!(boundary.client_cuts.is_empty() && boundary.unshallow.is_empty());
    }

    #[test]
    fn a_depth_counts_from_what_is_wanted() {
        let three = Deepen {
            depth: Some(3),
            ..Deepen::default()
        };
        assert_eq!(lines(three, |_| vec![]), [vec![7], vec![]]);
    }
}
