//! Power failures and bad disks: the service comes back whole, and never serves what is wrong.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::support::compare::{Objects, assert_same};
use crate::support::warmdock::{builder, files_below};
use crate::support::{Client, Fault, HOST, Repo, SAMPLE, Upstream, Warmdock, http, wait_for};

fn warm_service(upstream: &Upstream) -> Warmdock {
    builder(&upstream.url())
        .set("/git/warm", json!([format!("{HOST}/{SAMPLE}")]))
        .start()
}

#[track_caller]
fn all_is_well(upstream: &Upstream, repo: &Repo, warmdock: &Warmdock) {
    warmdock.wait_mirrored(SAMPLE, repo);
    warmdock.fsck_mirror(SAMPLE);
    for protocol in [0, 2] {
        let client = Client::new(protocol);
        client
            .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
            .ok();
        client
            .clone(&upstream.direct(SAMPLE), "direct", &["--bare"])
            .ok();
        assert_same(&client, "ours", "direct", Objects::Reachable);
    }
}

/// Files of fetches that never ended.
fn leftovers(data: &Path) -> Vec<PathBuf> {
    let is_leftover = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        path.strip_prefix(data).unwrap().starts_with("tmp")
            || name.contains("tmp")
            || name.ends_with(".warmdock-new")
            || name.ends_with(".lock")
    };
    files_below(data).into_iter().filter(is_leftover).collect()
}

#[test]
fn killed_in_the_middle_of_a_first_clone() {
    let (upstream, repo) = Upstream::with_sample();
    for bytes in [0, 3000, 20_000] {
        upstream.fail(Fault::HoldPackAfter(bytes));
        let mut warmdock = warm_service(&upstream);
        upstream.wait_held();
        warmdock.kill9();
        upstream.release();
        warmdock.start_again();
        all_is_well(&upstream, &repo, &warmdock);
        assert_eq!(leftovers(&warmdock.data()), Vec::<PathBuf>::new());
    }
}

#[test]
fn killed_in_the_middle_of_a_later_fetch() {
    let (upstream, repo) = Upstream::with_sample();
    let mut warmdock = warm_service(&upstream);
    warmdock.wait_mirrored(SAMPLE, &repo);
    for round in 0..3 {
        repo.commit(
            "main",
            &[("new.txt", &crate::support::repo::Rng(round).bytes(30_000))],
        );
        repo.force_push("feature/one");
        upstream.fail(Fault::HoldPackAfter(10_000));
        let url = warmdock.url(SAMPLE);
        let asking = std::thread::spawn(move || Client::new(2).git(&["ls-remote", &url]));
        upstream.wait_held();
        warmdock.kill9();
        upstream.release();
        let _ = asking.join();
        warmdock.start_again();
        // Somebody asks; a warm repository would also come by itself.
        Client::new(2)
            .git(&["ls-remote", &warmdock.url(SAMPLE)])
            .ok();
        all_is_well(&upstream, &repo, &warmdock);
        assert_eq!(leftovers(&warmdock.data()), Vec::<PathBuf>::new());
    }
}

/// Killed at moments that nobody chose, while fetches and clones are under way all the time.
#[test]
fn killed_again_and_again() {
    let (upstream, repo) = Upstream::with_sample();
    let mut warmdock = warm_service(&upstream);
    let mut rng = crate::support::repo::Rng(11);
    for round in 0..8_u64 {
        repo.commit("main", &[("round.txt", format!("{round}\n").as_bytes())]);
        repo.force_push("feature/two");
        let url = warmdock.url(SAMPLE);
        let asking = std::thread::spawn(move || Client::new(2).clone(&url, "ours", &["--bare"]));
        std::thread::sleep(std::time::Duration::from_millis(rng.below(200)));
        warmdock.kill9();
        let _ = asking.join();
        warmdock.start_again();
    }
    Client::new(2)
        .git(&["ls-remote", &warmdock.url(SAMPLE)])
        .ok();
    all_is_well(&upstream, &repo, &warmdock);
}

fn open_to_damage(path: &Path) -> File {
    let mut permissions = path.metadata().unwrap().permissions();
    #[expect(
        clippy::permissions_set_readonly_false,
        reason = "git keeps packs read-only; this is a test's own folder"
    )]
    permissions.set_readonly(false);
    std::fs::set_permissions(path, permissions).unwrap();
    let mut options = File::options();
    options.read(true).write(true).open(path).unwrap()
}

/// Changes one byte in the middle of a file. Its size and, as far as one can, its looks stay the same.
fn flip_a_byte(path: &Path) {
    let mut file = open_to_damage(path);
    let middle = file.metadata().unwrap().len() / 2;
    let mut byte = [0];
    file.seek(SeekFrom::Start(middle)).unwrap();
    file.read_exact(&mut byte).unwrap();
    file.seek(SeekFrom::Start(middle)).unwrap();
    file.write_all(&[byte[0] ^ 0x10]).unwrap();
}

fn damage_packs(warmdock: &Warmdock) {
    let packs = warmdock.packs(SAMPLE);
    assert!(!packs.is_empty());
    for pack in packs {
        flip_a_byte(&pack);
    }
}

#[test]
fn a_pack_that_was_damaged_while_stopped_is_fetched_again() {
    let (upstream, repo) = Upstream::with_sample();
    let mut warmdock = warm_service(&upstream);
    warmdock.wait_mirrored(SAMPLE, &repo);
    warmdock.stop();
    damage_packs(&warmdock);
    warmdock.start_again();
    clones_become_whole(&upstream, &repo, &warmdock);
}

#[test]
fn a_pack_that_is_damaged_while_running_is_fetched_again() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warm_service(&upstream);
    warmdock.wait_mirrored(SAMPLE, &repo);
    damage_packs(&warmdock);
    clones_become_whole(&upstream, &repo, &warmdock);
}

#[test]
fn a_pack_that_is_cut_short_while_running_is_fetched_again() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warm_service(&upstream);
    warmdock.wait_mirrored(SAMPLE, &repo);
    for pack in warmdock.packs(SAMPLE) {
        let file = open_to_damage(&pack);
        // One byte: the file is mapped as well, and without a whole page of it the process could end.
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    }
    clones_become_whole(&upstream, &repo, &warmdock);
}

/// Clones may fail for a while, but none that succeeds is wrong; and the service mends itself.
#[track_caller]
fn clones_become_whole(upstream: &Upstream, repo: &Repo, warmdock: &Warmdock) {
    let client = Client::new(2);
    client
        .clone(&upstream.direct(SAMPLE), "direct", &["--bare"])
        .ok();
    // Not what is kept as a finished answer: an exact pack has to be made from what is on disk.
    let depths: [&[&str]; 4] = [
        &["--bare"],
        &["--bare", "--depth=30"],
        // Everything, but chosen object by object.
        &["--bare", "--filter=blob:limit=1g"],
        &["--bare", "--single-branch", "--no-tags"],
    ];
    let mut number = 0;
    wait_for("clones to succeed again", || {
        number += 1;
        let whole = depths.iter().enumerate().all(|(kind, args)| {
            let into = format!("ours-{number}-{kind}");
            let output = client.clone(&warmdock.url(SAMPLE), &into, args);
            if output.status.success() {
                client
                    .git_in(&into, &["fsck", "--strict", "--full", "--no-dangling"])
                    .ok();
            }
            output.status.success()
        });
        whole.then_some(())
    });
    client
        .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
        .ok();
    assert_same(&client, "ours", "direct", Objects::Reachable);
    warmdock.wait_log("an error about the damage", |event| {
        event["level"] == "ERROR" && event.to_string().contains(SAMPLE)
    });
    wait_for("a whole mirror", || {
        // Where there is none, only a client that comes makes the service try again.
        http::get(
            warmdock.address(),
            &format!("/git/{HOST}/{SAMPLE}.git/info/refs?service=git-upload-pack"),
        );
        let fsck = crate::support::client::git_at(
            &warmdock.mirror(SAMPLE),
            &["fsck", "--strict", "--full"],
            b"",
        );
        (fsck.status.success() && !fsck.stderr.contains("error")).then_some(())
    });
    warmdock.wait_mirrored(SAMPLE, repo);
}

/// What a crash of an older version, or a full disk, may leave.
#[test]
fn a_mirror_without_its_files_is_made_anew() {
    let (upstream, repo) = Upstream::with_sample();
    for part in ["HEAD", "objects", "packed-refs"] {
        let mut warmdock = warm_service(&upstream);
        warmdock.wait_mirrored(SAMPLE, &repo);
        warmdock.stop();
        let path = warmdock.mirror(SAMPLE).join(part);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        } else {
            let _ = std::fs::remove_file(path);
        }
        warmdock.start_again();
        Client::new(2)
            .git(&["ls-remote", &warmdock.url(SAMPLE)])
            .ok();
        all_is_well(&upstream, &repo, &warmdock);
    }
}
