//! Where the bytes of an answer come from: prepared before anybody asked, kept from an equal request, or made for this
//! one.

use std::path::PathBuf;

use serde_json::json;

use crate::support::client::git_at;
use crate::support::compare::{Objects, assert_same};
use crate::support::repo::Rng;
use crate::support::warmdock::{builder, files_below, target};
use crate::support::{
    Client, HOST, Repo, SAMPLE, Upstream, Warmdock, http, pkt, wait_for, warmdock,
};

/// How many answers there were so far: of a whole repository, from what was kept, and made.
#[track_caller]
fn answers(warmdock: &Warmdock) -> [f64; 3] {
    ["whole", "cached", "made"].map(|kind| {
        let sample = format!("warmdock_git_answers_total{{kind=\"{kind}\"}}");
        warmdock.metric(|name| name == sample)
    })
}

#[test]
fn the_first_clones_of_a_warm_repository_find_their_answers_prepared() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = builder(&upstream.file_url())
        .set("/git/warm", json!([format!("{HOST}/{SAMPLE}")]))
        .start();
    wait_for("the prepared answers", || {
        let files = files_below(&warmdock.data().join("answers"));
        // Each is smaller than a block, so that it is written at once.
        let written = |file: &PathBuf| file.metadata().is_ok_and(|file| file.len() > 0);
        (files.len() == 2 && files.iter().all(written)).then_some(())
    });
    let client = Client::new(2);
    for (into, args, expected) in [
        ("shallow", &["--depth", "1"][..], [0.0, 1.0, 0.0]),
        ("whole", &["--bare"], [1.0, 1.0, 0.0]),
    ] {
        let args = [&["--progress"], args].concat();
        let output = client.clone(&warmdock.url(SAMPLE), into, &args).ok();
        assert!(
            output.stderr.contains("remote: warmdock: warm: "),
            "{}",
            output.describe()
        );
        assert_eq!(answers(&warmdock), expected);
    }
}

/// All of them wait for the first clone of the repository. Then they ask at once, which takes less than the pack does.
#[test]
fn equal_clones_at_once_share_one_answer() {
    let (upstream, repo) = Upstream::with_sample();
    for seed in 0..2 {
        repo.commit("main", &[("large.bin", &Rng(seed).bytes(4 << 20))]);
    }
    let warmdock = warmdock::over_files(&upstream);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let client = Client::new(2);
                let args = ["--bare", "--depth", "2"];
                client.clone(&warmdock.url(SAMPLE), "ours", &args).ok();
                let tip = client.git_in("ours", &["rev-parse", "main"]).ok().text();
                assert_eq!(tip, repo.id("main"));
            });
        }
    });
    assert_eq!(answers(&warmdock), [0.0, 7.0, 1.0]);
}

#[test]
fn an_equal_fetch_gets_what_was_kept_until_there_is_something_new() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let client = Client::new(2);
    // Who has the same and wants the same sends an equal request.
    for clone in ["first", "second", "third"] {
        client
            .clone(&upstream.direct(SAMPLE), clone, &["--bare"])
            .ok();
    }
    let fetch = |clone| {
        let url = warmdock.url(SAMPLE);
        client
            .git_in(clone, &["fetch", "--quiet", &url, "main:main"])
            .ok();
        let tip = client.git_in(clone, &["rev-parse", "main"]).ok().text();
        assert_eq!(tip, repo.id("main"));
        client.git_in(clone, &["fsck", "--strict"]).ok();
        answers(&warmdock)
    };
    repo.commit("main", &[("new.txt", b"new\n")]);
    assert_eq!(fetch("first"), [0.0, 0.0, 1.0]);
    assert_eq!(fetch("second"), [0.0, 1.0, 1.0]);
    repo.commit("main", &[("newer.txt", b"newer\n")]);
    assert_eq!(fetch("third"), [0.0, 1.0, 2.0]);
}

/// The answer that holds what a force-push took away is still kept.
#[test]
fn a_kept_answer_is_only_for_who_may_want_what_is_in_it() {
    for (policy, is_served) in [("reachable", true), ("advertised", false)] {
        let (upstream, repo) = Upstream::with_sample();
        let warmdock = builder(&upstream.file_url())
            .set("/git/allow_wants", policy)
            .start();
        let client = Client::new(2);
        let url = warmdock.url(SAMPLE);
        let old = repo.id("main");
        let fetch_old = |into| {
            client.git(&["init", "--quiet", "--bare", into]).ok();
            client.git_in(into, &["fetch", "--quiet", "--depth=1", &url, &old])
        };
        fetch_old("before").ok();
        assert_eq!(answers(&warmdock), [0.0, 0.0, 1.0]);

        let (_, new) = repo.force_push("main");
        let refs = client.git(&["ls-remote", &url]).ok().text();
        assert!(refs.contains(&new) && !refs.contains(&old), "{refs}");
        if is_served {
            fetch_old("after").ok();
            client.git_in("after", &["cat-file", "-e", &old]).ok();
            assert_eq!(answers(&warmdock), [0.0, 1.0, 1.0]);
        } else {
            let refused = fetch_old("after").failed();
            let why = format!("not our ref {old}");
            assert!(refused.stderr.contains(&why), "{}", refused.describe());
            assert_eq!(answers(&warmdock), [0.0, 0.0, 1.0]);
        }
    }
}

/// Answers that hold it are still kept.
#[test]
fn what_a_force_push_took_away_is_in_no_later_clone() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let client = Client::new(2);
    for when in ["before", "after"] {
        for (how, args) in [("shallow", &["--depth", "1"][..]), ("whole", &[])] {
            let [ours, direct] = ["ours", "direct"].map(|from| format!("{how}-{from}-{when}"));
            let args = [&["--bare"], args].concat();
            client.clone(&warmdock.url(SAMPLE), &ours, &args).ok();
            client.clone(&upstream.direct(SAMPLE), &direct, &args).ok();
            assert_same(&client, &ours, &direct, Objects::Exactly);
        }
        repo.force_push("main");
    }
    assert_eq!(answers(&warmdock), [2.0, 0.0, 2.0]);
}

/// As on a disk that fails, or where somebody tidied up.
#[test]
fn what_cannot_be_read_of_a_kept_answer_is_made_anew() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let client = Client::new(2);
    for into in ["first", "second"] {
        client
            .clone(&warmdock.url(SAMPLE), into, &["--bare", "--depth=3"])
            .ok();
        let tip = client.git_in(into, &["rev-parse", "main"]).ok().text();
        assert_eq!(tip, repo.id("main"));
        for file in files_below(&warmdock.data().join("answers")) {
            std::fs::remove_file(file).unwrap();
        }
    }
    assert_eq!(answers(&warmdock), [0.0, 1.0, 1.0]);
    warmdock.wait_log("why it is made anew", |event| {
        event["message"] == "a kept answer cannot be read: its pack is made anew"
    });
}

/// The upstream was asked for its references a moment ago.
#[test]
fn a_reference_that_is_not_there_is_asked_for_once() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = builder(&upstream.url()).set("/git/max_age", "0s").start();
    let client = Client::new(2);
    client
        .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
        .ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    let asked_for = |name: &str| {
        let before = upstream.asked().len();
        let want = format!("want-ref refs/heads/{name}");
        let headers = [
            ("Git-Protocol", "version=2"),
            ("Content-Type", "application/x-git-upload-pack-request"),
        ];
        let target = format!("{}/git-upload-pack", target(SAMPLE));
        let body = pkt::v2("fetch", &[&want, "done"]);
        let response = http::request(warmdock.address(), "POST", &target, &headers, &body);
        let is_there = !response.text().contains("unknown ref");
        (is_there, upstream.asked().len() - before)
    };
    let (is_there, asked) = asked_for("main");
    assert!(is_there);
    assert_eq!(asked_for("absent"), (false, asked));
}

/// Neither one that goes as it is stored, nor a delta whose base a client wants to be named by its id.
#[test]
fn a_large_object_is_not_in_memory_as_a_whole() {
    const LARGE: usize = 48 << 20;
    let upstream = Upstream::start();
    let repo = Repo::empty(&upstream.path(SAMPLE));
    // The deltas of what is imported stay.
    repo.git(&["config", "fastimport.unpackLimit", "1"]);
    let base = Rng(1).bytes(LARGE);
    let version = [&base[..1 << 20], &Rng(2).bytes(LARGE)].concat();
    let files: [(&str, &[u8]); 2] = [("base.bin", &base), ("version.bin", &version)];
    let tip = repo.commit("main", &files);
    let mut warmdock = warmdock::over_files(&upstream);
    Client::new(2)
        .git(&["ls-remote", &warmdock.url(SAMPLE)])
        .ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    let [pack] = &warmdock.packs(SAMPLE)[..] else {
        panic!("one pack");
    };
    let pack = pack.to_str().unwrap();
    let entries = git_at(&upstream.path(SAMPLE), &["verify-pack", "-v", pack], b"");
    let entries = entries.ok().text();
    let (base, version) = (repo.id("main:base.bin"), repo.id("main:version.bin"));
    let is_delta = |line: &str| line.starts_with(&version) && line.ends_with(&base);
    assert!(entries.lines().any(is_delta), "{entries}");

    warmdock.stop();
    warmdock.start_again();
    let before = warmdock.peak_memory();
    let response = http::request(
        warmdock.address(),
        "POST",
        &format!("{}/git-upload-pack", target(SAMPLE)),
        &[
            ("Git-Protocol", "version=2"),
            ("Content-Type", "application/x-git-upload-pack-request"),
        ],
        &pkt::v2("fetch", &[&format!("want {tip}"), "done"]),
    );
    let grown = warmdock.peak_memory() - before;
    let pack = pkt::pack_of(&response.body);
    assert!(pack.len() > 2 * LARGE);
    git_at(&upstream.path(SAMPLE), &["index-pack", "--stdin"], &pack).ok();
    assert!(grown < LARGE as u64 / 2, "{grown} bytes");
}
