//! Whether a clone through the service is what a clone straight from the upstream is.

use super::{Client, Upstream, Warmdock};

/// What two clones are compared by.
#[derive(Clone, Copy, PartialEq)]
pub enum Objects {
    /// Everything reachable, and also nothing else.
    Exactly,
    /// Everything reachable; what else is there does not matter.
    Reachable,
    /// A partial clone: everything that is there, and everything that is missing.
    Partial,
}

/// Asserts that a clone through the service, by this version of the protocol, is what one straight from the upstream is.
#[track_caller]
pub fn clone_is_whole(protocol: u8, upstream: &Upstream, warmdock: &Warmdock, name: &str) {
    let client = Client::new(protocol);
    let bare: &[&str] = &["--bare"];
    client.clone(&warmdock.url(name), "ours", bare).ok();
    client.clone(&upstream.direct(name), "direct", bare).ok();
    assert_same(&client, "ours", "direct", Objects::Reachable);
}

/// Asserts that two repositories of `client` have the same references, the same shallow boundary and the same objects,
/// and that the first is without any fault.
#[track_caller]
pub fn assert_same(client: &Client, ours: &str, direct: &str, objects: Objects) {
    let fsck = client
        .git_in(ours, &["fsck", "--strict", "--full", "--no-dangling"])
        .ok();
    assert!(!fsck.stderr.contains("error"), "{}", fsck.describe());
    same_output(
        client,
        ours,
        direct,
        &[
            "for-each-ref",
            "--format=%(objectname) %(refname) %(symref) %(*objectname).",
        ],
    );
    assert_eq!(
        shallow(client, ours),
        shallow(client, direct),
        "the shallow boundaries"
    );
    let missing = if objects == Objects::Partial {
        "--missing=print"
    } else {
        "--missing=error"
    };
    same_output(
        client,
        ours,
        direct,
        &["rev-list", "--objects", "--all", missing],
    );
    if objects != Objects::Reachable {
        // Without a promisor remote nothing is fetched while looking.
        same_output(
            client,
            ours,
            direct,
            &["cat-file", "--batch-all-objects", "--batch-check"],
        );
    }
}

#[track_caller]
fn same_output(client: &Client, ours: &str, direct: &str, args: &[&str]) {
    let (ours, direct) = (sorted(client, ours, args), sorted(client, direct, args));
    let lacks = |lines: &[String], line: &String| lines.binary_search(line).is_err();
    let surplus: Vec<_> = ours.iter().filter(|line| lacks(&direct, line)).collect();
    let lacking: Vec<_> = direct.iter().filter(|line| lacks(&ours, line)).collect();
    assert!(
        surplus.is_empty() && lacking.is_empty(),
        "git {args:?} differs; only through warmdock: {surplus:#?}; only straight from the upstream: {lacking:#?}"
    );
}

#[track_caller]
fn sorted(client: &Client, repo: &str, args: &[&str]) -> Vec<String> {
    let mut lines: Vec<String> = client
        .git_in(repo, args)
        .ok()
        .text()
        .lines()
        .map(str::to_owned)
        .collect();
    lines.sort_unstable();
    lines
}

/// The commits at which the history ends, in order; empty for a whole clone.
pub fn shallow(client: &Client, repo: &str) -> Vec<String> {
    let file = client
        .git_in(repo, &["rev-parse", "--git-path", "shallow"])
        .ok()
        .text();
    let text = std::fs::read_to_string(client.path(repo).join(file)).unwrap_or_default();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    lines
}
