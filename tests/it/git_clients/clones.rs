//! Clones: whole, of single branches, shallow, and partial.

use super::{Way, setup};
use crate::support::SAMPLE;
use crate::support::compare::{Objects, assert_same, shallow};
use crate::support::repo::{DAY, FIRST_DAY};

each_way!(
    whole_clone,
    clone_with_checkout,
    mirror_clone,
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
