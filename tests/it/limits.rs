//! Too many at once, too slow, too much: others are served as before.

use std::io::{BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::runtime::Runtime;

use crate::support::http::{self, connect};
use crate::support::pkt;
use crate::support::repo::Rng;
use crate::support::tmpfs::Tmpfs;
use crate::support::warmdock::{Builder, builder, files_below, target};
use crate::support::{Client, HOST, Repo, SAMPLE, Upstream, Warmdock, wait_for, warmdock};

/// More than the system keeps for a connection whose reader sleeps.
const LARGE: usize = 12 << 20;

/// A service over a repository whose clone no buffer holds.
fn large(configure: impl FnOnce(Builder) -> Builder) -> (Upstream, Repo, Warmdock) {
    let upstream = Upstream::start();
    let repo = Repo::large(&upstream.path(SAMPLE), LARGE);
    upstream.sample("team/other");
    let warmdock = configure(builder(&upstream.file_url()).set("/git/max_age", "1h")).start();
    for name in [SAMPLE, "team/other"] {
        Client::new(2).git(&["ls-remote", &warmdock.url(name)]).ok();
    }
    warmdock.wait_mirrored(SAMPLE, &repo);
    (upstream, repo, warmdock)
}

/// Asks for a pack and reads only the head of the answer.
fn stalled(warmdock: &Warmdock, arguments: &[&str]) -> (http::Response, BufReader<TcpStream>) {
    asked_of(warmdock, SAMPLE, arguments)
}

fn asked_of(
    warmdock: &Warmdock,
    repo: &str,
    arguments: &[&str],
) -> (http::Response, BufReader<TcpStream>) {
    let body = pkt::v2("fetch", arguments);
    let mut stream = connect(warmdock.address());
    let head = format!(
        "POST {}/git-upload-pack HTTP/1.1\r\nHost: x\r\nGit-Protocol: version=2\r\nContent-Length: {}\r\n\
         Content-Type: application/x-git-upload-pack-request\r\nConnection: close\r\n\r\n",
        target(repo),
        body.len()
    );
    stream
        .write_all(&[head.as_bytes(), &body].concat())
        .unwrap();
    let mut reader = BufReader::with_capacity(1024, stream);
    let head = http::read_head(&mut reader).expect("an answer");
    (head, reader)
}

#[test]
fn more_packs_than_allowed_get_503() {
    let (_upstream, repo, warmdock) = large(|config| {
        config
            .set("/limits/packs_per_repo", 1)
            .set("/limits/packs_queue_per_repo", 0)
    });
    let want = format!("want {}", repo.id("main"));
    // Questions of their own, so that no answer can be shared or is there already.
    let mut number = 0;
    let mut ask = || {
        number += 1;
        let filter = format!("filter blob:limit={number}g");
        stalled(&warmdock, &[&want, &filter, "done"])
    };
    // The first one may be done before the second is looked at.
    let ((head, mut reader), (second, mut rest)) =
        wait_for("a request that finds no place", || {
            let first = ask();
            let second = ask();
            (first.0.status == 200 && second.0.status == 503).then_some((first, second))
        });
    let seconds = second
        .header("retry-after")
        .expect("Retry-After")
        .parse::<u64>()
        .expect("seconds");
    assert!(seconds >= 1);
    let mut sentence = String::new();
    rest.read_to_string(&mut sentence).unwrap();
    assert!(sentence.contains("try again"), "{sentence}");
    // Other repositories do not suffer.
    Client::new(2)
        .clone(&warmdock.url("team/other"), "ours", &["--bare"])
        .ok();
    // And when the first one is done, there is room again.
    let mut whole = head;
    http::read_body(&mut reader, &mut whole);
    assert!(whole.complete && pkt::pack_of(&whole.body).len() > LARGE);
    wait_for("room for the next one", || {
        Client::new(2)
            .clone(&warmdock.url(SAMPLE), "ours", &["--bare", "--depth=1"])
            .status
            .success()
            .then_some(())
    });
}

#[test]
fn packs_wait_in_the_queue() {
    let (_upstream, _repo, warmdock) = large(|config| {
        config
            .set("/limits/packs_per_repo", 1)
            .set("/limits/packs_queue_per_repo", 20)
    });
    std::thread::scope(|scope| {
        for number in 0..6 {
            let url = warmdock.url(SAMPLE);
            scope.spawn(move || {
                let depth: &[&str] = if number % 2 == 0 {
                    &["--bare"]
                } else {
                    &["--bare", "--depth=1"]
                };
                Client::new(2).clone(&url, "ours", depth).ok();
            });
        }
    });
    assert_eq!(http::get(warmdock.address(), "/healthz").status, 200);
}

/// Who asks one repository for many packs only waits for oneself.
#[test]
fn others_do_not_wait_for_a_repository_that_is_flooded() {
    let (_upstream, repo, warmdock) = large(|config| {
        config
            .set("/limits/pack_threads", 1)
            .set("/limits/packs_per_repo", 100)
    });
    let want = format!("want {}", repo.id("main"));
    let waiting = || {
        warmdock.metric(|sample| sample.starts_with("warmdock_git_queue_length{queue=\"pack\"}"))
    };
    let other = Client::new(2)
        .git(&["ls-remote", &warmdock.url("team/other"), "refs/heads/main"])
        .ok()
        .text();
    let want_other = format!("want {}", &other[..40]);
    let flood: Vec<_> = (1..=60)
        .map(|number| {
            let filter = format!("filter blob:limit={number}g");
            stalled(&warmdock, &[&want, &filter, "done"])
        })
        .collect();
    assert!(flood.iter().all(|(head, _)| head.status == 200));
    assert!(waiting() > 20.0, "no queue: {}", warmdock.metrics());
    let (mut head, mut reader) = asked_of(&warmdock, "team/other", &[&want_other, "done"]);
    http::read_body(&mut reader, &mut head);
    assert!(head.complete && !pkt::pack_of(&head.body).is_empty());
    assert!(waiting() > 0.0, "the whole queue was before another's pack");
}

/// Readers that sleep in the middle of a pack hold neither memory for it nor others up.
#[test]
fn readers_that_stall() {
    let (_upstream, repo, warmdock) = large(|config| config);
    let want = format!("want {}", repo.id("main"));
    let stalled: Vec<_> = (0..6)
        .map(|_| stalled(&warmdock, &[&want, "done"]))
        .collect();
    for (head, _) in &stalled {
        assert_eq!(head.status, 200);
    }
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
        .ok();
    Client::new(0)
        .clone(&warmdock.url("team/other"), "ours", &["--bare"])
        .ok();
    for (mut head, mut reader) in stalled {
        http::read_body(&mut reader, &mut head);
        assert!(head.complete && pkt::pack_of(&head.body).len() > LARGE);
    }
}

/// Health and metrics answer while every thread that makes packs is busy.
#[test]
fn health_is_answered_while_packs_are_made() {
    let (_upstream, repo, warmdock) = large(|config| {
        config
            .set("/limits/pack_threads", 1)
            .set("/git/max_age", "0s")
    });
    // Each depth is a pack of its own.
    for number in 0..4 {
        repo.commit(
            "main",
            &[(
                "large.bin",
                &crate::support::repo::Rng(number).bytes(4 << 20),
            )],
        );
    }
    std::thread::scope(|scope| {
        let clones: Vec<_> = (1..=4)
            .map(|depth| {
                let url = warmdock.url(SAMPLE);
                scope.spawn(move || {
                    Client::new(2)
                        .clone(&url, "ours", &["--bare", &format!("--depth={depth}")])
                        .ok()
                })
            })
            .collect();
        let mut asked = 0;
        while clones.iter().any(|clone| !clone.is_finished()) {
            for target in ["/healthz", "/readyz", "/metrics"] {
                assert_eq!(http::get(warmdock.address(), target).status, 200);
            }
            asked += 1;
        }
        // If an answer waited for a pack, there would be as many as packs.
        assert!(asked > 4, "answered {asked} times while packs were made");
    });
}

#[test]
fn the_number_of_connections_is_limited() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = builder(&upstream.file_url())
        .set("/limits/connections", 4)
        .set("/limits/header_timeout", "1s")
        .start();
    let idle: Vec<_> = (0..30).map(|_| connect(warmdock.address())).collect();
    warmdock.wait_log("the limit", |event| {
        let message = "all connections of limits.connections are taken, others wait";
        event["message"] == message && event["limit"] == 4
    });
    // They are cut off by the header timeout one after the other: whoever waits is served in the end.
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
        .ok();
    drop(idle);
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "again", &["--bare"])
        .ok();
}

/// An orchestrator that hears nothing restarts the service. Whoever says nothing is asked to go, no timeout is needed.
#[test]
fn health_is_answered_while_nobody_gives_up_a_connection() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = builder(&upstream.file_url())
        .set("/limits/connections", 16)
        .set("/limits/header_timeout", "1h")
        .start();
    let used: Vec<_> = (0..6)
        .map(|_| http::used_connection(warmdock.address()))
        .collect();
    let silent: Vec<_> = (0..10).map(|_| connect(warmdock.address())).collect();
    let mut dribbling = connect(warmdock.address());
    dribbling.write_all(b"GET /healthz HT").unwrap();
    for _ in 0..20 {
        assert_eq!(http::get(warmdock.address(), "/healthz").status, 200);
    }
    drop((used, silent, dribbling));
}

/// A client that opens connections and leaves does not use anything up.
#[test]
fn clients_that_leave_in_the_middle() {
    let (_upstream, repo, warmdock) = large(|config| {
        config
            .set("/limits/packs_per_repo", 2)
            .set("/limits/packs_queue_per_repo", 2)
    });
    let want = format!("want {}", repo.id("main"));
    for _ in 0..10 {
        wait_for("a place for one more", || {
            let (head, reader) = stalled(&warmdock, &[&want, "done"]);
            drop(reader);
            (head.status == 200).then_some(())
        });
    }
    wait_for("a place for one that stays", || {
        Client::new(2)
            .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
            .status
            .success()
            .then_some(())
    });
}

/// A mirror with as many packs as are consolidated, 6.3 MiB, and one of 5 MiB that was used before. The disk is not much
/// larger than `max_size`: to pass that would fail.
fn scattered(disk: &Tmpfs, max_size: &str) -> (Upstream, Repo, Warmdock) {
    let upstream = Upstream::start();
    Repo::large(&upstream.path("team/other"), 5 << 20);
    let repo = Repo::large(&upstream.path(SAMPLE), 4 << 20);
    let warmdock = builder(&upstream.file_url())
        .set("/data_dir", disk.path().to_str().unwrap())
        .set("/git/when_upstream_fails", "fail")
        .set("/storage/max_size", max_size)
        .start();
    for name in ["team/other", SAMPLE] {
        refs_of(&warmdock, name);
        warmdock.wait_log("the mirror", |event| {
            event["message"] == "fetched" && event["repo"] == format!("{HOST}/{name}")
        });
    }
    for number in 0..8 {
        let name = format!("{number}.bin");
        repo.commit("main", &[(&name, &Rng(number).bytes(300_000))]);
        refs_of(&warmdock, SAMPLE);
    }
    (upstream, repo, warmdock)
}

fn refs_of(warmdock: &Warmdock, name: &str) -> String {
    let client = Client::new(2);
    client.git(&["ls-remote", &warmdock.url(name)]).ok().text()
}

fn packs_on(disk: &Tmpfs) -> usize {
    let mut files = files_below(&disk.path().join("git"));
    files.retain(|path| path.extension().is_some_and(|end| end == "pack"));
    files.len()
}

#[track_caller]
fn clones_whole(warmdock: &Warmdock, repo: &Repo) {
    let client = Client::new(2);
    let url = warmdock.url(SAMPLE);
    client.clone(&url, "ours", &["--bare"]).ok();
    client.git_in("ours", &["fsck", "--strict"]).ok();
    let tip = client.git_in("ours", &["rev-parse", "main"]).ok().text();
    assert_eq!(tip, repo.id("main"));
}

#[test]
fn the_disk_limit_holds_while_packs_are_consolidated() {
    let Some(disk) = Tmpfs::mount("17m") else {
        return;
    };
    let (_upstream, repo, warmdock) = scattered(&disk, "16MiB");
    warmdock.wait_log("consolidation", |event| {
        event["message"] == "consolidated packs"
    });
    let log = warmdock.log();
    let evicted: Vec<_> = log
        .lines()
        .filter(|line| line.contains("evicted the mirror"))
        .collect();
    assert!(
        evicted.len() == 1 && evicted[0].contains("team/other"),
        "{evicted:#?}"
    );
    assert_eq!(packs_on(&disk), 1);
    clones_whole(&warmdock, &repo);
}

/// Nor is anything evicted in vain.
#[test]
fn packs_that_do_not_fit_twice_stay_as_they_are() {
    let Some(disk) = Tmpfs::mount("13m") else {
        return;
    };
    let (_upstream, repo, warmdock) = scattered(&disk, "12MiB");
    let said = warmdock.wait_log("why nothing is consolidated", |event| {
        event["message"] == "packs were not consolidated"
    });
    let error = said["error"].as_str().unwrap();
    assert!(error.contains("storage.max_size is reached"), "{error}");
    assert_eq!(packs_on(&disk), 10);
    assert!(!warmdock.log().contains("evicted the mirror"));
    let new = repo.commit("main", &[("new.txt", b"new\n")]);
    assert!(refs_of(&warmdock, SAMPLE).contains(&new));
    clones_whole(&warmdock, &repo);
}

/// Over HTTP/2 a closed window stops an answer while it is still with the service, and not in the system's buffers.
#[test]
fn readers_that_stall_have_a_bounded_part_of_memory() {
    const CONNECTIONS: usize = 8;
    // The service takes 100 on each.
    const STREAMS: usize = 90;
    let (_upstream, repo, warmdock) =
        large(|config| config.set("/limits/body_idle_timeout", "40s"));
    let want = format!("want {}", repo.id("main"));
    let arguments = [want.as_str(), "no-progress", "done"];
    // From now on the answer is kept.
    let (mut head, mut reader) = stalled(&warmdock, &arguments);
    http::read_body(&mut reader, &mut head);
    assert!(head.complete);

    let url = format!("{}/git-upload-pack", warmdock.url(SAMPLE));
    let body = pkt::v2("fetch", &arguments);
    let mut asking = Vec::new();
    for _ in 0..CONNECTIONS {
        let client = http::http2_client(Some(1));
        for _ in 0..STREAMS {
            let request = client
                .post(&url)
                .header("content-type", "application/x-git-upload-pack-request")
                .header("git-protocol", "version=2")
                .body(body.clone());
            asking.push(async move { request.send().await });
        }
    }
    let runtime = Runtime::new().unwrap();
    let unread = runtime.block_on(try_join_all(asking)).unwrap();
    assert!(unread.iter().all(|answer| answer.status() == 200));

    wait_for("a client that has to wait for memory", || {
        let (_, mut reader) = stalled(&warmdock, &arguments);
        // The chunk behind `packfile` is one of the pack, or says that the service is still there.
        let mut begin = *b"D\r\n000dpackfile\n\r\n14\r\n0005";
        reader.read_exact(&mut begin).unwrap();
        begin.ends_with(b"0005").then_some(())
    });
    let memory = warmdock.metric(|name| name == "process_resident_memory_bytes");
    assert!(memory < 300e6, "{memory} bytes");
    // They are cut off for whoever waits, long before a reader would be else.
    clones_whole(&warmdock, &repo);
    drop(unread);
}

/// Over HTTP/2 a few connections have requests enough for all places.
#[test]
fn bodies_that_dribble_keep_nobody_out() {
    const CONNECTIONS: usize = 6;
    const STREAMS: usize = 90;
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    Client::new(2)
        .git(&["ls-remote", &warmdock.url(SAMPLE)])
        .ok();
    warmdock.wait_mirrored(SAMPLE, &repo);

    let url = format!("{}/git-upload-pack", warmdock.url(SAMPLE));
    let begun = Arc::new(AtomicUsize::new(0));
    let runtime = Runtime::new().unwrap();
    for _ in 0..CONNECTIONS {
        let client = http::http2_client(None);
        for _ in 0..STREAMS {
            let begun = Arc::clone(&begun);
            let pieces = futures_util::stream::unfold(0, move |piece| {
                let begun = Arc::clone(&begun);
                async move {
                    if piece == 1 {
                        begun.fetch_add(1, Ordering::Relaxed);
                    }
                    if piece > 0 {
                        tokio::time::sleep(Duration::from_secs(10)).await;
                    }
                    Some((Ok::<_, std::io::Error>(vec![b'0'; 1024]), piece + 1))
                }
            });
            let request = client
                .post(&url)
                .header("content-type", "application/x-git-upload-pack-request")
                .header("git-protocol", "version=2")
                .body(reqwest::Body::wrap_stream(pieces));
            runtime.spawn(request.send());
        }
    }
    wait_for("all of them to have begun", || {
        (begun.load(Ordering::Relaxed) == CONNECTIONS * STREAMS).then_some(())
    });
    clones_whole(&warmdock, &repo);
    runtime.shutdown_background();
}
