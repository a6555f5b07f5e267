//! Clones: whole, of single branches, shallow, and partial.

use std::collections::BTreeSet;

use super::{Setup, Way, setup_over_both as setup};
use crate::support::SAMPLE;
use crate::support::client::git_at;
use crate::support::compare::{Objects, assert_same, shallow};
use crate::support::repo::{DAY, FIRST_DAY};
use crate::support::warmdock::files_below;

each_way!(
    whole_clone,
    clone_with_checkout,
    mirror_clone,
    a_name_that_begins_with_a_dot,
    single_branch,
    single_branch_that_is_small,
    depth_1,
    depth_1_of_a_tag,
    depth_of_all_branches,
    depth_then_deepen,
    depth_beyond_the_history,
    shallow_since,
    shallow_exclude,
    unshallow,
    fetch_into_a_shallow_clone,
    filter_blob_none,
    filter_blob_limit,
    filter_tree_0,
    filter_tree_1,
    filter_object_type,
    filter_with_depth,
    without_ofs_delta,
);

fn whole_clone(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare"]);
    setup.assert_same(Objects::Exactly);
    // The second time the answer may come from where finished answers are kept.
    setup.client.clone(&setup.url(), "again", &["--bare"]).ok();
    assert_same(&setup.client, "again", "direct", Objects::Exactly);
}

fn clone_with_checkout(way: Way) {
    let setup = setup(way);
    setup.clone_both(&[]);
    setup.assert_same(Objects::Exactly);
    assert_eq!(setup.ours(&["status", "--porcelain"]).ok().text(), "");
    assert_eq!(
        setup
            .ours(&["rev-parse", "--abbrev-ref", "HEAD"])
            .ok()
            .text(),
        "main"
    );
}

fn mirror_clone(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--mirror"]);
    setup.assert_same(Objects::Exactly);
}

/// As github.com/<organisation>/.github, which many have.
fn a_name_that_begins_with_a_dot(way: Way) {
    let setup = setup(way);
    let name = "team/.github";
    setup.upstream.sample(name);
    setup
        .client
        .clone(&setup.url_of(name), "ours", &["--bare"])
        .ok();
    setup
        .client
        .clone(&setup.upstream.direct(name), "direct", &["--bare"])
        .ok();
    setup.assert_same(Objects::Exactly);
}

fn single_branch(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare", "--single-branch"]);
    setup.assert_same(Objects::Reachable);
}

fn single_branch_that_is_small(way: Way) {
    let setup = setup(way);
    // So much else is in the repository that sending all of it would not do.
    let large = crate::support::repo::Rng(3).bytes(400_000);
    setup.repo.commit("main", &[("large.bin", &large)]);
    setup.clone_both(&[
        "--bare",
        "--single-branch",
        "--no-tags",
        "--branch",
        "feature/one",
    ]);
    setup.assert_same(Objects::Exactly);
}

fn depth_1(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--depth", "1"]);
    setup.assert_same(Objects::Exactly);
    assert_eq!(shallow(&setup.client, "ours").len(), 1);
    setup
        .client
        .clone(&setup.url(), "again", &["--depth", "1"])
        .ok();
    assert_same(&setup.client, "again", "direct", Objects::Exactly);
}

fn depth_1_of_a_tag(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--depth", "1", "--branch", "v1.0"]);
    setup.assert_same(Objects::Exactly);
}

fn depth_of_all_branches(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare", "--depth", "3", "--no-single-branch"]);
    setup.assert_same(Objects::Exactly);
}

fn depth_then_deepen(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare", "--depth", "1"]);
    for deepen in ["--deepen=2", "--deepen=7", "--depth=15", "--depth=4"] {
        setup.git_both(&["fetch", "--quiet", deepen, "origin", "main"]);
        setup.assert_same(Objects::Reachable);
    }
}

fn depth_beyond_the_history(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare", "--depth", "100000"]);
    setup.assert_same(Objects::Reachable);
}

fn shallow_since(way: Way) {
    let setup = setup(way);
    let since = format!("--shallow-since=@{}", FIRST_DAY + 30 * DAY);
    setup.clone_both(&["--bare", "--no-single-branch", &since]);
    setup.assert_same(Objects::Exactly);
    let earlier = format!("--shallow-since=@{}", FIRST_DAY + 12 * DAY);
    setup.git_both(&["fetch", "--quiet", &earlier, "origin", "main"]);
    setup.assert_same(Objects::Reachable);
}

fn shallow_exclude(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare", "--shallow-exclude=v0.1"]);
    setup.assert_same(Objects::Exactly);
    setup.git_both(&[
        "fetch",
        "--quiet",
        "--shallow-exclude=feature/one",
        "origin",
        "main",
    ]);
    setup.assert_same(Objects::Reachable);
}

fn unshallow(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--depth", "2", "--no-single-branch"]);
    setup.git_both(&["fetch", "--quiet", "--unshallow"]);
    setup.assert_same(Objects::Reachable);
    assert!(shallow(&setup.client, "ours").is_empty());
}

fn fetch_into_a_shallow_clone(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--depth", "2"]);
    setup.repo.commit("main", &[("new.txt", b"new\n")]);
    setup.repo.commit("main", &[("newer.txt", b"newer\n")]);
    setup.git_both(&["fetch", "--quiet"]);
    setup.assert_same(Objects::Reachable);
    setup.repo.commit("main", &[("newest.txt", b"newest\n")]);
    setup.git_both(&["fetch", "--quiet", "--depth", "1"]);
    setup.assert_same(Objects::Reachable);
}

/// A partial clone, then everything that was left out, fetched object by object when it is checked out.
fn filtered(way: Way, filter: &str) {
    let setup = setup(way);
    let filter = format!("--filter={filter}");
    setup.clone_both(&["--no-checkout", &filter]);
    setup.assert_same(Objects::Partial);
    setup.git_both(&["checkout", "--quiet", "main"]);
    setup.assert_same(Objects::Partial);
    assert_eq!(setup.ours(&["status", "--porcelain"]).ok().text(), "");
    setup
        .ours(&["log", "--patch", "--output=/dev/null", "-5"])
        .ok();
}

fn filter_blob_none(way: Way) {
    filtered(way, "blob:none");
}

fn filter_blob_limit(way: Way) {
    filtered(way, "blob:limit=100");
}

fn filter_tree_0(way: Way) {
    filtered(way, "tree:0");
}

fn filter_tree_1(way: Way) {
    filtered(way, "tree:1");
}

fn filter_object_type(way: Way) {
    let setup = setup(way);
    for repo in ["ours", "direct"] {
        setup.client.git(&["init", "--quiet", "--bare", repo]).ok();
    }
    setup.ours(&["remote", "add", "origin", &setup.url()]).ok();
    setup
        .client
        .git_in(
            "direct",
            &["remote", "add", "origin", &setup.upstream.direct(SAMPLE)],
        )
        .ok();
    setup.git_both(&[
        "fetch",
        "--quiet",
        "--filter=object:type=commit",
        "origin",
        "+refs/heads/*:refs/heads/*",
    ]);
    setup.assert_same(Objects::Partial);
}

fn filter_with_depth(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--no-checkout", "--depth", "2", "--filter=blob:none"]);
    setup.assert_same(Objects::Partial);
    setup.git_both(&["checkout", "--quiet", "main"]);
    setup.assert_same(Objects::Partial);
}

/// Deltas then name their bases by id, in a clone and in a fetch. Git would take the others as well, so that only what
/// came shows it.
fn without_ofs_delta(way: Way) {
    let setup = setup(way);
    // What git makes its own packs with, it also asks for.
    setup.clone_both(&["--bare", "-c", "repack.useDeltaBaseOffset=false"]);
    setup.assert_same(Objects::Exactly);
    for text in [&b"new\n"[..], b"newer\n"] {
        let files = [("src/deep/er/module1.rs", text), ("new.txt", text)];
        setup.repo.commit("main", &files);
    }
    setup.repo.git(&["repack", "-adfq"]);
    setup.git_both(&crate::git_clients::fetches::FETCH_INTO_A_PACK);
    setup.assert_same(Objects::Exactly);
    for repo in ["ours", "direct"] {
        let types = entry_types(&setup, repo);
        assert!(
            types.contains(&REF_DELTA) && !types.contains(&OFS_DELTA),
            "{repo}: {types:?}"
        );
    }
}

/// How a pack says that an entry is a delta of another one, named by its place or by its id (gitformat-pack).
const OFS_DELTA: u8 = 6;
const REF_DELTA: u8 = 7;

/// The types of all entries in the packs of a clone, which are stored as they came.
#[track_caller]
fn entry_types(setup: &Setup, repo: &str) -> BTreeSet<u8> {
    let folder = setup.client.path(repo);
    let mut types = BTreeSet::new();
    for path in files_below(&folder.join("objects/pack")) {
        if path.extension().is_some_and(|e| e == "pack") {
            let pack = std::fs::read(&path).unwrap();
            let index = std::fs::read(path.with_extension("idx")).unwrap();
            let list = git_at(&folder, &["show-index"], &index).ok().text();
            // Each line begins with the place of an entry, which begins with its type.
            for line in list.lines() {
                let (place, _) = line.split_once(' ').unwrap();
                let first = pack[place.parse::<usize>().unwrap()];
                types.insert((first >> 4) & 7);
            }
        }
    }
    types
}
