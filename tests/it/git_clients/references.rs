//! References and tags, and repositories that have unusual ones or none; and a push, which is refused.

use serde_json::json;

use super::{Door, Way, setup, setup_with};
use crate::support::compare::{Objects, assert_same};
use crate::support::http::{self, Response};
use crate::support::pkt;
use crate::support::warmdock::{builder, target};
use crate::support::{Fault, HOST, Repo, SAMPLE, Upstream, Warmdock, wait_for};

each_way!(
    no_tags,
    tags_come_with_their_commits,
    ls_remote,
    ls_remote_with_patterns,
    empty_repository,
    detached_head,
    head_is_another_branch,
    tags_of_tags_trees_and_blobs,
    many_references,
    reftable_in_a_folder_is_refused,
    a_folder_that_becomes_a_reftable,
    push_is_refused,
);

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
    setup.repo.git(&["tag", "-a", "-m", "1.2", "v1.2", &commit]);
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
        setup
            .repo
            .git(&["tag", "--annotate", "--message", name, name, target]);
    };
    tag("of-tag", "v1.0");
    tag("of-tag-of-tag", "of-tag");
    tag("between", "v1.0");
    tag("of-tag-without-a-name", "between");
    setup.repo.git(&["tag", "--delete", "between"]);
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
    // All of it is reached, so there is nothing to clean up.
    assert!(!setup.warmdock.has_had_garbage(SAMPLE));
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

fn reftable_in_a_folder_is_refused(way: Way) {
    let setup = setup_with(way, |path| {
        let repo = Repo::init(path, &["--initial-branch=main", "--ref-format=reftable"]);
        repo.commit("main", &[("first.txt", b"first\n")]);
        repo
    });
    let output = setup.client.clone(&setup.url(), "ours", &[]).failed();
    for part in ["reftable", "git refs migrate --ref-format=files"] {
        assert!(output.stderr.contains(part), "{}", output.describe());
    }
}

/// The mirror keeps what it has, and goes on when its upstream can be read again.
fn a_folder_that_becomes_a_reftable(way: Way) {
    let setup = setup(way);
    setup.refresh();
    let list = || setup.client.git(&["ls-remote", &setup.url()]).ok().text();
    let before = list();
    let migrate = |to: &str| setup.repo.git(&["refs", "migrate", to]);
    migrate("--ref-format=reftable");
    assert_eq!(list(), before);
    setup.warmdock.wait_log("stale references", |event| {
        event["message"] == "serving stale references" && event.to_string().contains("reftable")
    });
    migrate("--ref-format=files");
    setup.repo.commit("main", &[("new.txt", b"new\n")]);
    wait_for("what is new", || (list() != before).then_some(()));
    setup.clone_both(&["--bare"]);
    setup.assert_same(Objects::Reachable);
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

/// Git's own server takes them as well, and does nothing with them.
#[test]
fn server_options_are_taken() {
    for way in [v2::WAY, ssh_v2::WAY] {
        let setup = setup(way);
        let option = "--server-option=any";
        setup.client.git(&["ls-remote", option, &setup.url()]).ok();
        setup.client.clone(&setup.url(), "ours", &[option]).ok();
    }
}

/// `want-ref` and `deepen-not` without a list before them. What is wanted by its id is there without asking anybody.
#[test]
fn references_by_name_are_as_fresh_as_in_a_list() {
    let (upstream, repo) = Upstream::with_sample();
    repo.git(&["branch", "cut", "main~5"]);
    let warmdock = mirrored(&upstream, "0s");
    let want = format!("want {}", repo.id("main"));
    let cut_at = |commit: &str| {
        repo.git(&["branch", "--force", "cut", &format!("{commit}~1")]);
        format!("shallow {}\n", repo.id(commit))
    };

    let boundary = cut_at("main~2");
    let response = fetch(&warmdock, &[&want, "deepen-not cut", "done"]);
    assert_says(&response, &boundary);

    let boundary = cut_at("main~1");
    let mut body = pkt::line(&format!("{want} side-band-64k ofs-delta\n"));
    body.extend(pkt::line("deepen-not cut\n"));
    body.extend(pkt::FLUSH);
    body.extend(pkt::line("done\n"));
    assert_says(&post(&warmdock, "version=0", &body), &boundary);

    let new = repo.commit("main", &[("new.txt", b"new\n")]);
    let by_name = ["want-ref refs/heads/main", "done"];
    let response = fetch(&warmdock, &by_name);
    assert_says(&response, &format!("{new} refs/heads/main\n"));

    upstream.fail(Fault::CutOff);
    assert_eq!(fetch(&warmdock, &by_name).status, 502);
    let response = fetch(&warmdock, &[&want, "done"]);
    assert!(pkt::pack_of(&response.body).starts_with(b"PACK"));
}

#[test]
fn references_by_name_ask_nobody_within_max_age() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = mirrored(&upstream, "1h");
    let (tip, asked) = (repo.id("main"), upstream.asked().len());
    repo.commit("main", &[("new.txt", b"new\n")]);
    let response = fetch(&warmdock, &["want-ref refs/heads/main", "done"]);
    assert_says(&response, &format!("{tip} refs/heads/main\n"));
    assert_eq!(upstream.asked().len(), asked);
}

/// A service that has mirrored the sample, and serves nothing stale.
fn mirrored(upstream: &Upstream, max_age: &str) -> Warmdock {
    let warmdock = builder(&upstream.url())
        .set("/git/warm", json!([format!("{HOST}/{SAMPLE}")]))
        .set("/git/max_age", max_age)
        .set("/git/when_upstream_fails", "fail")
        .start();
    warmdock.wait_log("the first fetch to end", |event| {
        event["message"] == "fetched"
    });
    warmdock
}

fn fetch(warmdock: &Warmdock, arguments: &[&str]) -> Response {
    post(warmdock, "version=2", &pkt::v2("fetch", arguments))
}

fn post(warmdock: &Warmdock, version: &str, body: &[u8]) -> Response {
    let headers = [
        ("Git-Protocol", version),
        ("Content-Type", "application/x-git-upload-pack-request"),
    ];
    let target = format!("{}/git-upload-pack", target(SAMPLE));
    http::request(warmdock.address(), "POST", &target, &headers, body)
}

#[track_caller]
fn assert_says(response: &Response, line: &str) {
    let packets = pkt::read(&response.body);
    assert!(packets.contains(&line.as_bytes()), "{}", response.text());
}
