//! Disks that are full, by a small tmpfs (which needs root, and says so where nobody is) and by the service's own limit.

use crate::crash::kept_entry;
use crate::crates_cache::over;
use crate::support::client::git_at;
use crate::support::registry::{Registry, index_path, noise};
use crate::support::tmpfs::Tmpfs;
use crate::support::warmdock::{builder, files_below};
use crate::support::{Client, HOST, Repo, SAMPLE, Upstream, http, wait_for};

#[test]
fn crates_are_served_from_a_full_disk() {
    let Some(disk) = Tmpfs::mount("3m") else {
        return;
    };
    let registry = Registry::start();
    let small = registry.publish_bytes("small", "1.0.0", &[], noise(500_000, 1));
    let large = registry.publish_bytes("large", "1.0.0", &[], noise(5_000_000, 2));
    let warmdock = over(&registry)
        .set("/data_dir", disk.path().to_str().unwrap())
        .start();
    let get = |path: &str| http::get(warmdock.address(), &format!("/crates/corp/{path}"));
    assert!(get(&small.path()).body == small.bytes);
    let kept = || files_below(&disk.path().join("blobs"));
    wait_for("the file to be kept", || {
        kept()
            .iter()
            .any(|path| path.ends_with(&small.checksum))
            .then_some(())
    });
    for _ in 0..3 {
        // There is no room to keep it, but a build goes on all the same.
        let response = get(&large.path());
        assert!(
            response.complete && response.body == large.bytes,
            "{}",
            response.status
        );
        assert!(get(&small.path()).body == small.bytes);
        assert_eq!(get("sm/al/small").text(), registry.entry("small"));
        wait_for("the rest to be removed", || {
            (kept().len() == 1).then_some(())
        });
    }
    assert_eq!(http::get(warmdock.address(), "/readyz").status, 200);

    // Not a byte is left: new entries are served, and kept once there is room.
    let entry = |name: &str| kept_entry(disk.path(), name);
    let old = wait_for("the entry to be kept", || entry("small"));
    let filling = disk.fill();
    registry.publish_bytes("small", "1.1.0", &[], noise(10, 3));
    registry.publish_bytes("fresh", "1.0.0", &[], noise(10, 4));
    for name in ["small", "fresh"] {
        wait_for("the entry of now", || {
            (get(&index_path(name)).text() == registry.entry(name)).then_some(())
        });
        warmdock.wait_log("that it is not kept", |event| {
            let text = event["message"].as_str().unwrap_or_default();
            text.contains("cannot be kept on disk") && event["crate"] == name
        });
    }
    assert_eq!(entry("small"), Some(old.clone()), "whole, if old");
    assert_eq!(entry("fresh"), None);
    std::fs::remove_file(filling).unwrap();
    wait_for("what is new to be kept", || {
        for name in ["small", "fresh"] {
            assert_eq!(get(&index_path(name)).text(), registry.entry(name));
        }
        let is_kept = entry("small").is_some_and(|new| new != old) && entry("fresh").is_some();
        is_kept.then_some(())
    });
    drop(warmdock);
}

#[test]
fn repositories_are_served_from_a_full_disk() {
    let Some(disk) = Tmpfs::mount("6m") else {
        return;
    };
    let (upstream, small) = Upstream::with_sample();
    let large = Repo::large(&upstream.path("team/large"), 8 << 20);
    let warmdock = builder(&upstream.url())
        .set("/data_dir", disk.path().to_str().unwrap())
        .set("/git/max_age", "0s")
        .start();
    let clone = |name: &str, args: &[&str]| {
        let client = Client::new(2);
        client
            .clone(&warmdock.url(name), "ours", &[&["--bare"], args].concat())
            .ok();
        client.git_in("ours", &["fsck", "--strict"]).ok();
        client.git_in("ours", &["rev-parse", "main"]).ok().text()
    };
    assert_eq!(clone(SAMPLE, &[]), small.id("main"));
    warmdock.wait_log("the mirror", |event| event["message"] == "fetched");
    let mirrors = || files_below(&disk.path().join("git"));
    let settled = mirrors();

    // What does not fit is passed through, again and again; nothing of it stays.
    assert_eq!(clone("team/large", &[]), large.id("main"));
    let said = warmdock.wait_log("why there is no mirror", |event| {
        event["message"] == "fetch failed" && event["repo"].to_string().contains("large")
    });
    let error = said["error"].as_str().unwrap();
    assert!(
        error.contains("the disk of data_dir is full"),
        "names what is full: {error}"
    );
    wait_for("the rest to be removed", || {
        let left = files_below(&disk.path().join("tmp"));
        (left.is_empty() && mirrors() == settled).then_some(())
    });
    assert_eq!(clone("team/large", &[]), large.id("main"));
    assert_eq!(clone(SAMPLE, &[]), small.id("main"));

    // Not a byte is left: answers are made without being kept, and new commits cannot come.
    let filling = disk.fill();
    let old = small.id("main");
    assert_eq!(clone(SAMPLE, &["--depth=3"]), old);
    small.commit("main", &[("new.txt", &noise(100_000, 3))]);
    assert_eq!(clone(SAMPLE, &["--depth=2"]), old, "stale, and whole");
    assert_eq!(http::get(warmdock.address(), "/readyz").status, 200);

    std::fs::remove_file(filling).unwrap();
    wait_for("the new commit", || {
        (clone(SAMPLE, &[]) == small.id("main")).then_some(())
    });
    let mirror = disk.path().join(format!("git/{HOST}/{SAMPLE}.git"));
    git_at(&mirror, &["fsck", "--strict", "--no-dangling"], b"").ok();
}

#[test]
fn what_never_fits_is_passed_through_and_not_tried_each_time() {
    let upstream = Upstream::start();
    let large = Repo::large(&upstream.path("team/large"), 6 << 20);
    let warmdock = builder(&upstream.url())
        .set("/storage/max_size", "4MiB")
        .start();
    for _ in 0..3 {
        let client = Client::new(2);
        let url = warmdock.url("team/large");
        client.clone(&url, "ours", &["--bare"]).ok();
        let tip = client.git_in("ours", &["rev-parse", "main"]).ok().text();
        assert_eq!(tip, large.id("main"));
        warmdock.wait_log("why there is no mirror", |event| {
            event["message"] == "fetch failed" && event.to_string().contains("max_size")
        });
    }
    assert_eq!(upstream.packs_for_mirror(), 1);
}

/// Who joined an answer that turns out not to fit may have some of its bytes already.
#[test]
fn clones_that_share_an_answer_which_does_not_fit_are_all_served() {
    let upstream = Upstream::start();
    let large = Repo::large(&upstream.path("team/large"), 8 << 20);
    let tip = large.id("main");
    // Room for the mirror and not half an answer. From a folder nothing is passed through: the clones wait for the
    // mirror together, and then ask for the same at the same moment.
    let warmdock = builder(&upstream.file_url())
        .set("/storage/max_size", "12MiB")
        .start();
    for _ in 0..2 {
        std::thread::scope(|scope| {
            for _ in 0..6 {
                scope.spawn(|| {
                    let client = Client::new(2);
                    let url = warmdock.url("team/large");
                    client.clone(&url, "ours", &["--bare"]).ok();
                    let ours = client.git_in("ours", &["rev-parse", "main"]);
                    assert_eq!(ours.ok().text(), tip);
                });
            }
        });
    }
    warmdock.wait_log("that an answer was not kept", |event| {
        event["message"] == "an answer is sent without being kept"
    });
    let log = warmdock.log();
    assert!(!log.contains("an answer broke off"), "{log}");
}

/// The limit at the byte, without any file that could go.
#[test]
fn the_limit_holds_and_reads_go_on() {
    let registry = Registry::start();
    let small = registry.publish_bytes("small", "1.0.0", &[], noise(100_000, 1));
    let large = registry.publish_bytes("large", "1.0.0", &[], noise(200_001, 2));
    let warmdock = over(&registry).set("/storage/max_size", "200000B").start();
    let get = |path: &str| http::get(warmdock.address(), &format!("/crates/corp/{path}"));
    assert!(get(&small.path()).body == small.bytes);
    let response = get(&large.path());
    assert!(
        response.complete && response.body == large.bytes,
        "{}",
        response.status
    );
    assert_eq!(http::get(warmdock.address(), "/healthz").status, 200);
    let used = warmdock.metric(|name| name.starts_with("warmdock_storage_bytes"));
    assert!(used <= 200_000.0, "{used}");
    assert!(get(&small.path()).body == small.bytes);
}
