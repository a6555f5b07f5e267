//! The git command line against the service, with each protocol version and through each door. What a clone through the service has is
//! compared with a clone straight from the upstream.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::support::client::git_at;
use crate::support::compare::{Objects, assert_same, shallow};
use crate::support::process::Output;
use crate::support::repo::{DAY, FIRST_DAY, Rng};
use crate::support::ssh_door::SshDoor;
use crate::support::{Client, Repo, SAMPLE, Upstream, Warmdock, warmdock};

/// How the client comes to the service.
#[derive(Clone, Copy)]
struct Way {
    protocol: u8,
    door: Door,
}

#[derive(Clone, Copy, PartialEq)]
enum Door {
    Http,
    Ssh,
}

/// Runs each scenario with protocol 0, 1 and 2, over HTTP and over SSH.
macro_rules! each_way {
    ($($scenario:ident),* $(,)?) => {
        each_way!(v0, 0, Http, $($scenario),*);
        each_way!(v1, 1, Http, $($scenario),*);
        each_way!(v2, 2, Http, $($scenario),*);
        each_way!(ssh_v0, 0, Ssh, $($scenario),*);
        each_way!(ssh_v2, 2, Ssh, $($scenario),*);
    };
    ($module:ident, $protocol:literal, $door:ident, $($scenario:ident),*) => {
        mod $module {
            pub(super) const WAY: super::Way = super::Way { protocol: $protocol, door: super::Door::$door };
            $(#[test] fn $scenario() { super::$scenario(WAY); })*
        }
    };
}

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
    fetch_of_new_commits,
    fetch_of_a_new_branch_on_old_commits,
    fetch_of_new_versions,
    fetch_of_a_folder_that_moved,
    fetch_of_a_revert,
    fetch_with_local_commits,
    fetch_with_nothing_new,
    fetch_after_a_force_push,
    fetch_by_commit_id,
    fetch_by_tag_object_id,
    fetch_of_a_missing_id,
    no_tags,
    tags_come_with_their_commits,
    ls_remote,
    ls_remote_with_patterns,
    empty_repository,
    detached_head,
    head_is_another_branch,
    tags_of_tags_trees_and_blobs,
    many_references,
    push_is_refused,
    unrelated_repository_into_the_same_clone,
);

/// A service over the sample on disk, and a client.
struct Setup {
    upstream: Upstream,
    repo: Repo,
    warmdock: Warmdock,
    client: Client,
    /// The keys, over SSH.
    ssh: Option<SshDoor>,
}

fn setup(way: Way) -> Setup {
    setup_with(way, |path| Repo::sample(path, 1))
}

fn setup_with(way: Way, make: impl FnOnce(&std::path::Path) -> Repo) -> Setup {
    let upstream = Upstream::start();
    let repo = make(&upstream.path(SAMPLE));
    let mut client = Client::new(way.protocol);
    let builder = warmdock::builder(&upstream.file_url());
    let (warmdock, ssh) = match way.door {
        Door::Http => (builder.start(), None),
        Door::Ssh => {
            let door = SshDoor::new();
            let warmdock = door.open(builder);
            client.set("GIT_SSH_COMMAND", &door.ssh("user"));
            (warmdock, Some(door))
        }
    };
    Setup {
        repo,
        warmdock,
        client,
        ssh,
        upstream,
    }
}

impl Setup {
    fn url(&self) -> String {
        self.url_of(SAMPLE)
    }

    fn url_of(&self, name: &str) -> String {
        match &self.ssh {
            None => self.warmdock.url(name),
            Some(_) => self.warmdock.ssh_url(name),
        }
    }

    /// Clones through the service to `ours` and straight to `direct`.
    #[track_caller]
    fn clone_both(&self, args: &[&str]) {
        self.client.clone(&self.url(), "ours", args).ok();
        self.client
            .clone(&self.upstream.direct(SAMPLE), "direct", args)
            .ok();
    }

    /// Clones straight to both, and lets `ours` fetch through the service from now on, which has no mirror yet.
    #[track_caller]
    fn clone_past_the_service(&self) {
        for clone in ["ours", "direct"] {
            let url = self.upstream.direct(SAMPLE);
            self.client.clone(&url, clone, &["--bare"]).ok();
        }
        self.ours(&["remote", "set-url", "origin", &self.url()])
            .ok();
    }

    /// Runs the same git command in both clones.
    #[track_caller]
    fn git_both(&self, args: &[&str]) {
        self.client.git_in("ours", args).ok();
        self.client.git_in("direct", args).ok();
    }

    #[track_caller]
    fn ours(&self, args: &[&str]) -> Output {
        self.client.git_in("ours", args)
    }

    #[track_caller]
    fn assert_same(&self, objects: Objects) {
        assert_same(&self.client, "ours", "direct", objects);
    }
}

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
            setup.client.git(&["ls-remote", &setup.url()]).ok();
            setup.warmdock.wait_mirrored(SAMPLE, &setup.repo);
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
        let somebody = ["-c", "user.name=A", "-c", "user.email=a@example.test"];
        let commit = ["commit-tree", "-m", "place", "-p", "main", &tree];
        let commit = setup.repo.git(&[&somebody[..], &commit].concat());
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
const FETCH_INTO_A_PACK: [&str; 6] = [
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
    setup.client.git(&["ls-remote", &setup.url()]).ok();
    setup.warmdock.wait_mirrored(SAMPLE, &setup.repo);
    // Objects that nothing reaches: there is no telling any more what else the client has.
    setup
        .repo
        .commit_to("refs/heads/topic", None, &[("topic", b"second")]);
    setup.client.git(&["ls-remote", &setup.url()]).ok();
    setup.warmdock.wait_mirrored(SAMPLE, &setup.repo);
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

fn no_tags(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--bare", "--no-tags"]);
    setup.assert_same(Objects::Reachable);
    assert_eq!(setup.ours(&["tag"]).ok().text(), "");
}

/// `include-tag`: a tag that points into what is fetched comes along with it.
fn tags_come_with_their_commits(way: Way) {
    let setup = setup(way);
    setup.clone_both(&["--single-branch"]);
    let commit = setup.repo.commit("main", &[("released.txt", b"1.2\n")]);
    setup.repo.git(&[
        "-c",
        "user.name=T",
        "-c",
        "user.email=t@example.test",
        "tag",
        "-a",
        "-m",
        "1.2",
        "v1.2",
        &commit,
    ]);
    setup.repo.git(&["tag", "light", &commit]);
    setup.git_both(&["fetch", "--quiet", "origin"]);
    setup.assert_same(Objects::Reachable);
    setup.ours(&["rev-parse", "--verify", "v1.2^{tag}"]).ok();
}

fn ls_remote(way: Way) {
    let setup = setup(way);
    for args in [&["ls-remote"][..], &["ls-remote", "--symref"]] {
        let ours = setup
            .client
            .git(&[args, &[&setup.url()]].concat())
            .ok()
            .text();
        let direct = setup
            .client
            .git(&[args, &[&setup.upstream.direct(SAMPLE)]].concat())
            .ok()
            .text();
        assert_eq!(ours, direct);
        assert!(ours.contains("refs/tags/v1.0^{}"));
    }
}

fn ls_remote_with_patterns(way: Way) {
    let setup = setup(way);
    let patterns: [&[&str]; 6] = [
        &["main"],
        &["refs/heads/feature/*"],
        &["v1.*", "HEAD"],
        &["refs/heads/main", "refs/heads/absent"],
        &["nothing-like-this"],
        &[
            "refs/heads/main",
            "refs/heads/main^{}",
            "refs/tags/main",
            "refs/tags/main^{}",
        ],
    ];
    for pattern in patterns {
        for options in [
            &["ls-remote"][..],
            &["ls-remote", "--heads"],
            &["ls-remote", "--tags"],
        ] {
            let ask = |url: String| {
                setup
                    .client
                    .git(&[options, &[url.as_str()], pattern].concat())
                    .ok()
                    .text()
            };
            assert_eq!(
                ask(setup.url()),
                ask(setup.upstream.direct(SAMPLE)),
                "{options:?} {pattern:?}"
            );
        }
    }
}

fn empty_repository(way: Way) {
    let setup = setup_with(way, |path| Repo::init(path, &["--initial-branch=trunk"]));
    setup.clone_both(&[]);
    assert_eq!(setup.ours(&["for-each-ref"]).ok().text(), "");
    let head = |repo| {
        setup
            .client
            .git_in(repo, &["symbolic-ref", "HEAD"])
            .ok()
            .text()
    };
    assert_eq!(head("ours"), head("direct"));
    if way.protocol == 2 {
        assert_eq!(head("ours"), "refs/heads/trunk");
    }
    // Its first commit arrives.
    setup.repo.commit("trunk", &[("first.txt", b"first\n")]);
    setup.git_both(&["fetch", "--quiet"]);
    setup.assert_same(Objects::Exactly);
}

fn detached_head(way: Way) {
    let setup = setup(way);
    let id = setup.repo.id("main~3");
    std::fs::write(setup.repo.path.join("HEAD"), format!("{id}\n")).unwrap();
    setup.clone_both(&[]);
    setup.assert_same(Objects::Exactly);
    assert_eq!(setup.ours(&["rev-parse", "HEAD"]).ok().text(), id);
    setup.ours(&["symbolic-ref", "HEAD"]).failed();
}

fn head_is_another_branch(way: Way) {
    let setup = setup(way);
    setup
        .repo
        .git(&["symbolic-ref", "HEAD", "refs/heads/release/1.0"]);
    setup.clone_both(&[]);
    setup.assert_same(Objects::Exactly);
    assert_eq!(
        setup.ours(&["symbolic-ref", "HEAD"]).ok().text(),
        "refs/heads/release/1.0"
    );
}

fn tags_of_tags_trees_and_blobs(way: Way) {
    let setup = setup(way);
    let tag = |name: &str, target: &str| {
        let who = ["-c", "user.name=T", "-c", "user.email=t@example.test"];
        setup.repo.git(
            &[
                &who[..],
                &["tag", "--annotate", "--message", name, name, target],
            ]
            .concat(),
        );
    };
    tag("of-tag", "v1.0");
    tag("of-tag-of-tag", "of-tag");
    tag("of-tree", "main:src");
    tag("of-blob", "main:bin/run");
    setup.repo.git(&["tag", "light-of-tree", "main~9^{tree}"]);
    setup.repo.git(&["tag", "light-of-tag", "v0.2"]);
    setup.clone_both(&["--mirror"]);
    setup.assert_same(Objects::Exactly);
    let list = |url: String| setup.client.git(&["ls-remote", &url]).ok().text();
    assert_eq!(list(setup.url()), list(setup.upstream.direct(SAMPLE)));
    setup
        .client
        .clone(&setup.url(), "shallow", &["--mirror", "--depth", "1"])
        .ok();
    setup
        .client
        .clone(
            &setup.upstream.direct(SAMPLE),
            "shallow-direct",
            &["--mirror", "--depth", "1"],
        )
        .ok();
    assert_same(&setup.client, "shallow", "shallow-direct", Objects::Exactly);
}

/// Request bodies become so large that git compresses them, and sends them as chunks.
fn many_references(way: Way) {
    let setup = setup(way);
    setup.repo.tag_often(2000);
    // The smallest that git takes: above it a body is sent in chunks.
    setup
        .client
        .git(&["config", "--global", "http.postBuffer", "70000"])
        .ok();
    setup.clone_both(&["--mirror"]);
    setup.assert_same(Objects::Exactly);
    setup.repo.commit("topic", &[("x", b"x\n")]);
    setup.git_both(&["fetch", "--quiet"]);
    setup.assert_same(Objects::Exactly);
}

fn push_is_refused(way: Way) {
    let setup = setup(way);
    setup.client.clone(&setup.url(), "ours", &[]).ok();
    setup
        .ours(&["commit", "--quiet", "--allow-empty", "-m", "mine"])
        .ok();
    let output = setup
        .ours(&["push", "origin", "HEAD:refs/heads/mine"])
        .failed();
    let (status, remote) = match way.door {
        Door::Http => ("403", "remote: "),
        Door::Ssh => ("warmdock is read-only", "warmdock: "),
    };
    assert!(output.stderr.contains(status), "{}", output.describe());
    assert!(
        output
            .stderr
            .lines()
            .any(|line| line.starts_with(remote) && line.contains("push")),
        "git shows the person no reason: {}",
        output.describe()
    );
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
