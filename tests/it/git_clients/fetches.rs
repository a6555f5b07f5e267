//! Fetches into a clone: what is sent, and that nothing is missing afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::{Setup, Way, setup, setup_with};
use crate::support::client::git_at;
use crate::support::compare::{Objects, assert_same};
use crate::support::repo::Rng;
use crate::support::{Client, Repo, SAMPLE, Upstream, warmdock};

each_way!(
    fetch_of_new_commits,
    fetch_of_a_new_branch_on_old_commits,
    fetch_of_new_versions,
    fetch_of_a_folder_that_moved,
    fetch_of_a_revert,
    fetch_with_local_commits,
    fetch_with_nothing_new,
    fetch_after_a_force_push,
    fetch_that_deepens_all_branches,
    fetch_by_commit_id,
    fetch_by_tag_object_id,
    fetch_of_a_missing_id,
    unrelated_repository_into_the_same_clone,
);

fn fetch_of_new_commits(way: Way) {
    let setup = setup(way);
    setup.clone_both(&[]);
    for number in 0..3 {
        let text = format!("{number}\n");
        setup.repo.commit(
            "main",
            &[("src/deep/er/module1.rs", text.as_bytes()), ("n", b"")],
        );
        setup.repo.commit(
            &format!("topic/{number}"),
            &[("topic.txt", text.as_bytes())],
        );
        setup.git_both(&["fetch", "--quiet"]);
        setup.assert_same(Objects::Exactly);
    }
}

fn fetch_of_a_new_branch_on_old_commits(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare", "--mirror"]);
    setup.repo.git(&["branch", "from-old", "v0.1~3"]);
    setup
        .repo
        .git(&["branch", "--delete", "--force", "feature/two"]);
    setup.git_both(&["fetch", "--quiet", "--prune"]);
    setup.assert_same(Objects::Reachable);
}

/// A pack from `git gc` has the newest version whole and the older ones as deltas of it. To a client with an older one
/// the newest goes as a delta all the same.
fn fetch_of_new_versions(way: Way) {
    let mut rng = Rng(11);
    let mut content = rng.bytes(200_000);
    let names: Vec<String> = (0..2000).map(|n| format!("many/{n:04}")).collect();
    let setup = setup_with(way, |path| {
        let repo = Repo::empty(path);
        let mut files: Vec<(&str, &[u8])> = vec![("large", &content)];
        files.extend(names.iter().map(|name| (name.as_str(), name.as_bytes())));
        repo.commit("main", &files);
        repo
    });
    setup.clone_past_the_service();
    for version in 0..4 {
        let at = 20_000 + version * 30_000;
        content.splice(at..at + 50, rng.bytes(100));
        let files: [(&str, &[u8]); 2] = [("large", &content), ("many/0777", &content[at..][..9])];
        setup.repo.commit("main", &files);
    }
    setup.repo.git(&["repack", "-adfq"]);
    setup.git_both(&FETCH_INTO_A_PACK);
    setup.assert_same(Objects::Exactly);
    assert_sent(&setup, 500.0..10_000.0);
}

/// The pack has the new version as a delta of one that the client's history has as well, but that is much older than the
/// client's own: what both have in common is not sent again.
#[test]
fn fetch_of_a_version_stored_as_a_delta_of_an_old_one() {
    let mut rng = Rng(14);
    let (common, only_old, later) = (rng.bytes(60_000), rng.bytes(20_000), rng.bytes(15_000));
    let old = [&common[..], &only_old].concat();
    let mut of_client = [&common[..], &later].concat();
    let new = of_client.clone();
    of_client.splice(100..150, rng.bytes(70));
    let setup = setup_with(v2::WAY, |path| {
        let repo = Repo::empty(path);
        repo.commit("main", &[("file", &old)]);
        repo.commit("side", &[("file", &new)]);
        repo.git(&["repack", "-adfq"]);
        repo.commit("main", &[("file", &of_client)]);
        repo.git(&["branch", "--delete", "--force", "side"]);
        repo
    });
    setup.clone_past_the_service();
    setup.repo.commit("main", &[("file", &new)]);
    setup.repo.git(&["repack", "-adq"]);
    setup.git_both(&FETCH_INTO_A_PACK);
    setup.assert_same(Objects::Exactly);
    assert_sent(&setup, 100.0..1_000.0);
}

#[track_caller]
fn assert_sent(setup: &Setup, expected: Range<f64>) {
    let sent = setup
        .warmdock
        .metric(|sample| sample.starts_with("warmdock_git_answer_bytes"));
    assert!(expected.contains(&sent), "{sent} bytes");
}

/// A tree comes back that is as it was before, with a file that is new to the client: neither the change nor its revert
/// brings the file, but the commit before them.
fn fetch_of_a_revert(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare"]);
    setup
        .repo
        .commit("main", &[("revert/changed", b"1"), ("kept", b"1")]);
    setup.git_both(&["fetch", "--quiet", "origin", "main:main"]);
    for files in [("revert/new", "new"), ("revert/changed", "2")] {
        setup.repo.commit("main", &[(files.0, files.1.as_bytes())]);
    }
    setup.repo.commit("main", &[("revert/changed", b"1")]);
    setup.git_both(&["fetch", "--quiet", "origin", "main:main"]);
    setup.assert_same(Objects::Exactly);

    // The same for one that has nothing yet: by a single branch, and whole where something else is unreachable.
    for garbage in [false, true] {
        if garbage {
            setup.repo.force_push("feature/one");
            setup.refresh();
        }
        for (name, args) in [
            ("whole", &["--mirror"][..]),
            ("single", &["--bare", "--single-branch"]),
        ] {
            let into = [name, "-direct"].map(|side| format!("{name}{side}-{garbage}"));
            let urls = [setup.url(), setup.upstream.direct(SAMPLE)];
            for (url, into) in urls.iter().zip(&into) {
                setup.client.clone(url, into, args).ok();
            }
            assert_same(&setup.client, &into[0], &into[1], Objects::Reachable);
        }
    }
}

/// Nobody has the commit of a submodule in this repository, although a file here may have the same id.
#[test]
fn fetch_of_a_file_in_the_place_of_a_submodule_with_its_id() {
    let setup = setup(v2::WAY);
    setup.clone_both(&["--bare", "--single-branch", "--branch=main"]);
    setup.repo.commit("side", &[("file", b"of another branch")]);
    let id = gix::ObjectId::from_hex(setup.repo.id("side:file").as_bytes()).unwrap();
    for mode in ["160000", "100644"] {
        // `git mktree` would not make the first of them.
        let entry = [format!("{mode} place\0").as_bytes(), id.as_slice()].concat();
        let write = ["hash-object", "-t", "tree", "-w", "--stdin"];
        let tree = git_at(&setup.repo.path, &write, &entry).ok().text();
        let commit = ["commit-tree", "-m", "place", "-p", "main", &tree];
        let commit = setup.repo.git(&commit);
        setup.repo.git(&["update-ref", "refs/heads/main", &commit]);
    }
    setup.git_both(&FETCH_INTO_A_PACK);
    setup.assert_same(Objects::Exactly);
}

/// Histories in which contents come back, files move to each other's places, and branches are merged any way. Git looks
/// for every object of what it fetched.
#[test]
fn fetches_in_random_histories() {
    for seed in 0..4 {
        let mut rng = Rng(seed);
        let upstream = Upstream::start();
        let repo = Repo::empty(&upstream.path(SAMPLE));
        let commits = 60;
        let history = random_history(&mut rng, commits);
        let import = ["fast-import", "--quiet", "--force"];
        git_at(&repo.path, &import, history.as_bytes()).ok();
        repo.git(&["repack", "-adfq"]);
        let warmdock = warmdock::over_files(&upstream);
        let client = Client::new(2);
        for pair in 0..12 {
            let [has, wants] = [1, 1].map(|first| first + rng.below(commits));
            let into = format!("clone-{pair}");
            client.git(&["init", "--quiet", "--bare", &into]).ok();
            let urls = [upstream.direct(SAMPLE), warmdock.url(SAMPLE)];
            for (url, commit) in urls.iter().zip([has, wants]) {
                let what = format!("refs/tags/c{commit}:refs/heads/c{commit}");
                let args = [
                    "-c",
                    "fetch.unpackLimit=1",
                    "fetch",
                    "--no-tags",
                    url,
                    &what,
                ];
                client.git_in(&into, &args).ok();
            }
            client.git_in(&into, &["fsck", "--strict"]).ok();
        }
    }
}

/// In the format of `git fast-import`: so many commits, each with a tag `c` and its number.
fn random_history(rng: &mut Rng, commits: u64) -> String {
    const PATHS: [&str; 6] = ["a", "b", "d/a", "d/b", "d/e/a", "d/e/b"];
    // The files of each commit, and its first parent; 0 is none.
    let mut made = vec![(BTreeMap::new(), 0)];
    let mut stream = String::new();
    for commit in 1..=commits {
        stream += &format!(
            "commit refs/tags/c{commit}\nmark :{commit}\ncommitter A <a@example.test> {commit} +0000\ndata 0\n"
        );
        let mut near = || (commit - 1).saturating_sub(rng.below(3));
        let (first, second) = (near(), near());
        if first > 0 {
            stream += &format!("from :{first}\n");
        }
        if first > 0 && second > 0 && second != first && rng.below(3) == 0 {
            stream += &format!("merge :{second}\n");
        }
        let (mut files, before) = made[first as usize].clone();
        let path = PATHS[rng.below(6) as usize];
        match rng.below(4) {
            // A revert, a file that moves, and a new one.
            0 => files = made[before].0.clone(),
            1 => {
                if let Some(content) = files.remove(PATHS[rng.below(6) as usize]) {
                    files.insert(path, content);
                }
            }
            _ => {
                // Long enough for deltas.
                let lines = (0..20).map(|line| format!("{path}, line {line} of {commit}\n"));
                files.insert(path, lines.collect::<String>());
            }
        }
        stream += "deleteall\n";
        for (path, content) in &files {
            stream += &format!("M 100644 inline {path}\ndata {}\n{content}", content.len());
        }
        made.push((files, first as usize));
    }
    stream
}

/// Small fetches as well, which git would unpack otherwise.
pub const FETCH_INTO_A_PACK: [&str; 6] = [
    "-c",
    "fetch.unpackLimit=1",
    "fetch",
    "--quiet",
    "origin",
    "main:main",
];

/// What only moved, the client has: neither contents nor the folder's tree are sent again.
fn fetch_of_a_folder_that_moved(way: Way) {
    let mut rng = Rng(13);
    let setup = setup_with(way, |path| {
        let repo = Repo::empty(path);
        let (one, two) = (rng.bytes(50_000), rng.bytes(50_000));
        repo.commit("main", &[("src/one/a", &one), ("src/one/b", &two)]);
        repo
    });
    setup.clone_past_the_service();
    let moves = "commit refs/heads/main\ncommitter A <a@example.test> 1 +0000\ndata 0\nfrom refs/heads/main^0\n\
                 R src/one lib/two\n";
    git_at(
        &setup.repo.path,
        &["fast-import", "--quiet"],
        moves.as_bytes(),
    )
    .ok();
    setup.git_both(&FETCH_INTO_A_PACK);
    setup.assert_same(Objects::Exactly);
    assert_sent(&setup, 100.0..1_000.0);
}

/// A file that moved, and another one in its place: nothing is made a delta of its own delta.
#[test]
fn fetch_of_a_file_that_moved_and_its_successor() {
    let mut content = Rng(12).bytes(100_000);
    let setup = setup_with(v2::WAY, |path| {
        let repo = Repo::empty(path);
        repo.commit("main", &[("b", &content)]);
        repo.commit("topic", &[("topic", b"first")]);
        repo
    });
    setup.clone_past_the_service();
    let before = content.clone();
    content.extend(b"more, so that git keeps this one whole");
    setup
        .repo
        .commit("main", &[("a", &before), ("b", &content)]);
    setup.repo.git(&["repack", "-adfq"]);
    setup.refresh();
    // Objects that nothing reaches: there is no telling any more what else the client has.
    setup
        .repo
        .commit_to("refs/heads/topic", None, &[("topic", b"second")]);
    setup.refresh();
    setup.git_both(&FETCH_INTO_A_PACK);
    setup.assert_same(Objects::Exactly);
    assert_sent(&setup, 100.0..1_000.0);
}

/// The client has commits that nobody else has: many `have` lines before one that is common.
fn fetch_with_local_commits(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--branch", "main"]);
    for repo in ["ours", "direct"] {
        Repo::at(&setup.client.path(repo).join(".git")).commits("main", 70);
    }
    setup.repo.commit("main", &[("new.txt", b"new\n")]);
    setup.git_both(&["fetch", "--quiet"]);
    setup.assert_same(Objects::Exactly);
}

fn fetch_with_nothing_new(way: Way) {
    let setup = setup(way);
    setup.clone_both(&[]);
    setup.git_both(&["fetch", "--quiet"]);
    setup.assert_same(Objects::Exactly);
}

fn fetch_after_a_force_push(way: Way) {
    let setup = setup(way);
    setup.clone_both(&[]);
    setup.repo.force_push("main");
    setup.repo.force_push("feature/one");
    setup.git_both(&["fetch", "--quiet"]);
    setup.assert_same(Objects::Reachable);
    setup.client.clone(&setup.url(), "fresh", &["--bare"]).ok();
    setup
        .client
        .clone(&setup.upstream.direct(SAMPLE), "fresh-direct", &["--bare"])
        .ok();
    assert_same(&setup.client, "fresh", "fresh-direct", Objects::Reachable);
}

/// The boundary also moves on branches that are not asked for.
fn fetch_that_deepens_all_branches(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare", "--depth", "2", "--no-single-branch"]);
    setup.git_both(&["fetch", "--quiet", "--deepen=1", "origin", "main"]);
    setup.assert_same(Objects::Reachable);
}

/// What BuildKit does for a commit id.
fn fetch_by_commit_id(way: Way) {
    let setup = setup(way);
    let old = setup.repo.id("main~5");
    for (number, extra) in [&["--depth=1", "--no-tags"][..], &["--tags"], &[]]
        .into_iter()
        .enumerate()
    {
        for (kind, url) in [
            ("ours", setup.url()),
            ("direct", setup.upstream.direct(SAMPLE)),
        ] {
            let repo = format!("{kind}{number}");
            setup.client.git(&["init", "--quiet", "--bare", &repo]).ok();
            setup
                .client
                .git_in(
                    &repo,
                    &[
                        &["fetch", "--quiet", &url, &format!("{old}:refs/heads/it")],
                        extra,
                    ]
                    .concat(),
                )
                .ok();
        }
        assert_same(
            &setup.client,
            &format!("ours{number}"),
            &format!("direct{number}"),
            Objects::Reachable,
        );
    }
}

fn fetch_by_tag_object_id(way: Way) {
    let setup = setup(way);
    let (tag, blob) = (setup.repo.id("v1.0"), setup.repo.id("main:bin/run"));
    setup
        .client
        .git(&["init", "--quiet", "--bare", "ours"])
        .ok();
    setup
        .ours(&[
            "fetch",
            "--quiet",
            &setup.url(),
            &format!("{tag}:refs/tags/it"),
        ])
        .ok();
    assert_eq!(
        setup.ours(&["cat-file", "-t", "refs/tags/it"]).ok().text(),
        "tag"
    );
    setup
        .ours(&[
            "fetch",
            "--quiet",
            &setup.url(),
            &format!("{blob}:refs/blobs/it"),
        ])
        .ok();
    assert_eq!(
        setup.ours(&["cat-file", "-t", "refs/blobs/it"]).ok().text(),
        "blob"
    );
}

fn fetch_of_a_missing_id(way: Way) {
    let setup = setup(way);
    setup
        .client
        .git(&["init", "--quiet", "--bare", "empty"])
        .ok();
    let args = [
        "fetch",
        &setup.url(),
        "0123456789012345678901234567890123456789",
    ];
    let output = setup.client.git_in("empty", &args).failed();
    assert!(
        output
            .stderr
            .contains("not our ref 0123456789012345678901234567890123456789"),
        "{}",
        output.describe()
    );
    // And the client that does this does no harm to the next one.
    setup.clone_both(&["--bare"]);
}

/// Nothing in common: all the `have` lines are unknown.
fn unrelated_repository_into_the_same_clone(way: Way) {
    let setup = setup(way);
    let other = Repo::sample(&setup.upstream.path("team/other"), 2);
    other.commit("main", &[("other.txt", b"other\n")]);
    setup.clone_both(&["--bare"]);
    setup
        .ours(&["remote", "add", "other", &setup.url_of("team/other")])
        .ok();
    setup
        .client
        .git_in(
            "direct",
            &[
                "remote",
                "add",
                "other",
                &setup.upstream.direct("team/other"),
            ],
        )
        .ok();
    setup.git_both(&["fetch", "--quiet", "--no-tags", "other"]);
    setup.assert_same(Objects::Reachable);
}

/// `wait-for-done`, which git asks for before a push: it is told what both have in common, and takes no pack.
#[test]
fn negotiate_only() {
    for way in [v2::WAY, ssh_v2::WAY] {
        let setup = setup(way);
        setup.clone_both(&["--bare"]);
        // More than git tells of at once.
        for repo in ["ours", "direct"] {
            Repo::at(&setup.client.path(repo)).commits("main", 70);
        }
        let in_common = |repo| {
            let negotiate = [
                "fetch",
                "--negotiate-only",
                "--negotiation-tip=main",
                "--negotiation-tip=release/1.0",
                "origin",
            ];
            let common = setup.client.git_in(repo, &negotiate).ok().text();
            // Git's own server leaves out most of what is behind a commit that it has named.
            let newest = ["merge-base", "--independent"];
            let args: Vec<&str> = newest.into_iter().chain(common.lines()).collect();
            let newest = setup.client.git_in(repo, &args).ok().text();
            newest.lines().map(str::to_owned).collect::<BTreeSet<_>>()
        };
        assert_eq!(in_common("ours"), in_common("direct"));
        let tips = ["main", "release/1.0"].map(|tip| setup.repo.id(tip));
        assert_eq!(in_common("ours"), BTreeSet::from(tips));
    }
}
