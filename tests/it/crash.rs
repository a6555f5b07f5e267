//! Power failures and bad disks: the service comes back whole, and never serves what is wrong.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;

use crate::crates_cache::{ask_and_forget, over};
use crate::support::compare::{Objects, assert_same, clone_is_whole};
use crate::support::registry::{Fault as RegistryFault, Of, Registry, index_path, noise};
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
        clone_is_whole(protocol, upstream, warmdock, SAMPLE);
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

/// What was cut short may be done again meanwhile.
#[track_caller]
fn no_leftovers(warmdock: &Warmdock) {
    wait_for("no leftovers", || {
        leftovers(&warmdock.data()).is_empty().then_some(())
    });
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
        no_leftovers(&warmdock);
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
        no_leftovers(&warmdock);
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
        std::thread::sleep(Duration::from_millis(rng.below(200)));
        warmdock.kill9();
        let _ = asking.join();
        warmdock.start_again();
    }
    Client::new(2)
        .git(&["ls-remote", &warmdock.url(SAMPLE)])
        .ok();
    all_is_well(&upstream, &repo, &warmdock);
}

/// Killed while packs are consolidated, at some moment of it, and while what comes meanwhile is fetched.
#[test]
fn killed_while_packs_are_consolidated() {
    let (upstream, repo) = Upstream::with_sample();
    let mut warmdock = builder(&upstream.url())
        .set("/git/warm", json!([format!("{HOST}/{SAMPLE}")]))
        .set("/git/keep_unreachable", "0s")
        .start();
    warmdock.wait_mirrored(SAMPLE, &repo);
    repo.commits("main", 2_000);
    let ask = |url: String| Client::new(2).git(&["ls-remote", &url]);
    ask(warmdock.url(SAMPLE)).ok();
    let mut rng = crate::support::repo::Rng(5);
    let mut cut_short = 0;
    for round in 0..8_u64 {
        // What is dropped while it does not run is noticed at its start, and cleaned up then.
        warmdock.kill9();
        repo.force_push("main");
        warmdock.start_again();
        warmdock.wait_log("consolidation", |event| {
            event["message"] == "consolidating packs"
        });
        repo.commit("main", &[("round.txt", format!("{round}\n").as_bytes())]);
        let url = warmdock.url(SAMPLE);
        let asking = (round % 2 == 1).then(|| std::thread::spawn(move || ask(url)));
        std::thread::sleep(Duration::from_millis(rng.below(120)));
        warmdock.kill9();
        cut_short += usize::from(!warmdock.log().contains("consolidated packs"));
        let _ = asking.map(std::thread::JoinHandle::join);
        warmdock.start_again();
        ask(warmdock.url(SAMPLE)).ok();
        all_is_well(&upstream, &repo, &warmdock);
        no_leftovers(&warmdock);
    }
    assert!(cut_short > 0, "each consolidation was quicker");
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

/// Nobody clones: it is looked for, also where the mirror is fetched at once.
#[test]
fn a_pack_that_was_damaged_while_stopped_is_found() {
    let (upstream, repo) = Upstream::with_sample();
    let mut warmdock = warm_service(&upstream);
    warmdock.wait_mirrored(SAMPLE, &repo);
    warmdock.stop();
    damage_packs(&warmdock);
    repo.commit("main", &[("new.txt", b"new\n")]);
    warmdock.start_again();
    warmdock.wait_log("the damage", |event| {
        event["level"] == "ERROR" && event.to_string().contains("damaged")
    });
    wait_for("a whole mirror", || {
        let mirror = warmdock.mirror(SAMPLE);
        let fsck = crate::support::client::git_at(&mirror, &["fsck", "--strict", "--full"], b"");
        (fsck.status.success() && !fsck.stderr.contains("error")).then_some(())
    });
    warmdock.wait_mirrored(SAMPLE, &repo);
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

/// An index entry, as a client gets it.
fn index_entry(warmdock: &Warmdock, name: &str) -> http::Response {
    http::get(warmdock.address(), &index_target(name))
}

fn index_target(name: &str) -> String {
    format!("/crates/corp/{}", index_path(name))
}

/// What is kept of an index entry in a `data_dir`.
pub fn kept_entry(data: &Path, name: &str) -> Option<Vec<u8>> {
    let files = files_below(&data.join("crates"));
    let path = files
        .into_iter()
        .find(|path| path.ends_with(index_path(name)))?;
    Some(std::fs::read(path).unwrap())
}

/// Index entries that are being written, or were when the service ended.
fn unfinished_entries(warmdock: &Warmdock) -> Vec<PathBuf> {
    let mut files = files_below(&warmdock.data().join("crates"));
    files.retain(|path| path.parent().unwrap().ends_with("tmp"));
    files
}

/// Without anybody who asks for something.
#[track_caller]
fn wait_none_unfinished(warmdock: &Warmdock) {
    wait_for("unfinished index entries to be removed", || {
        unfinished_entries(warmdock).is_empty().then_some(())
    });
}

#[test]
fn killed_while_an_index_entry_comes() {
    let registry = Registry::start();
    registry.publish_bytes("leaf", "1.0.0", &[], noise(10, 1));
    let mut warmdock = over(&registry).start();
    let whole = registry.entry("leaf");
    for bytes in [0, 1, whole.len() / 2, whole.len() - 1] {
        registry.fail(Of::Index, RegistryFault::HoldAfter(bytes));
        let address = warmdock.address();
        let asking = std::thread::spawn(move || ask_and_forget(address, &index_target("leaf")));
        registry.wait_held();
        warmdock.kill9();
        registry.release();
        asking.join().unwrap();
        warmdock.start_again();
        wait_none_unfinished(&warmdock);
        assert_eq!(kept_entry(&warmdock.data(), "leaf"), None);
    }
    assert_eq!(index_entry(&warmdock, "leaf").text(), whole);
}

/// At every stage of a file, also where an older one lies in its place.
#[test]
fn killed_in_the_middle_of_writing_an_index_entry() {
    let registry = Registry::start();
    registry.publish_bytes("leaf", "1.0.0", &[], noise(10, 1));
    let mut warmdock = over(&registry).start();
    index_entry(&warmdock, "leaf");
    let first = wait_for("an entry to be kept", || {
        kept_entry(&warmdock.data(), "leaf")
    });
    // Each version makes the file longer.
    let almost_all = first.len() as u64 - 1;
    for (round, bytes) in [0, 1, almost_all / 2, almost_all].into_iter().enumerate() {
        for name in ["leaf".to_owned(), format!("fresh{round}")] {
            let before = kept_entry(&warmdock.data(), &name);
            let old = before.as_ref().map(|_| registry.entry(&name));
            let content = noise(10, 2 + round as u64);
            registry.publish_bytes(&name, &format!("1.1.{round}"), &[], content);
            warmdock.end_after_writing(bytes);
            ask_and_forget(warmdock.address(), &index_target(&name));
            let status = warmdock.wait();
            assert_eq!(status.signal(), Some(Signal::XFSZ.as_raw()), "{status}");
            let unfinished = unfinished_entries(&warmdock);
            let sizes: Vec<_> = unfinished
                .iter()
                .map(|path| path.metadata().unwrap().len())
                .collect();
            assert_eq!(sizes, [bytes], "{name}");
            assert_eq!(kept_entry(&warmdock.data(), &name), before);
            registry.fail(Of::Everything, RegistryFault::CutOff);
            warmdock.start_again();
            wait_none_unfinished(&warmdock);
            let response = index_entry(&warmdock, &name);
            match old {
                Some(old) => assert_eq!((response.status, response.text()), (200, old)),
                None => assert_eq!(response.status, 502),
            }
            registry.release();
            let new = registry.entry(&name);
            wait_for("the new entry", || {
                (index_entry(&warmdock, &name).text() == new).then_some(())
            });
            wait_for("the new entry to be kept", || {
                (kept_entry(&warmdock.data(), &name) != before).then_some(())
            });
        }
    }
}

/// At moments that nobody chose, while entries are written all the time.
#[test]
fn killed_again_and_again_while_index_entries_are_written() {
    let registry = Registry::start();
    let names: Vec<_> = (0..40).map(|number| format!("crate{number}")).collect();
    let mut seen = vec![String::new(); names.len()];
    let mut warmdock = over(&registry).start();
    let mut rng = crate::support::repo::Rng(5);
    for round in 0..8 {
        for name in &names {
            registry.publish_bytes(name, &format!("1.0.{round}"), &[], noise(10, round));
        }
        let address = warmdock.address();
        let asking: Vec<_> = names
            .iter()
            .map(|name| index_target(name))
            .map(|target| std::thread::spawn(move || ask_and_forget(address, &target)))
            .collect();
        std::thread::sleep(Duration::from_millis(rng.below(100)));
        warmdock.kill9();
        for one in asking {
            one.join().unwrap();
        }
        registry.fail(Of::Everything, RegistryFault::CutOff);
        warmdock.start_again();
        wait_none_unfinished(&warmdock);
        for (name, seen) in names.iter().zip(&mut seen) {
            let is_kept = kept_entry(&warmdock.data(), name).is_some();
            let response = index_entry(&warmdock, name);
            if !is_kept {
                assert_eq!((response.status, &**seen), (502, ""), "{name} got lost");
                continue;
            }
            assert_eq!(response.status, 200, "{name}");
            // Whole lines, and no fewer than before.
            let text = response.text();
            assert!(text.ends_with('\n') && text.starts_with(&**seen), "{text}");
            assert!(registry.entry(name).starts_with(&text), "{text}");
            *seen = text;
        }
        registry.release();
        // One that has not seen the registry fail.
        warmdock.kill9();
        warmdock.start_again();
    }
    for name in &names {
        assert_eq!(index_entry(&warmdock, name).text(), registry.entry(name));
    }
}
