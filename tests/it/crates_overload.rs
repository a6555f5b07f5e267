//! Clients that ask a registry for too much, or for what it does not have: others are served as before.

use std::sync::mpsc::{Receiver, channel};

use reqwest::{Client, Response};
use tokio::runtime::Runtime;

use crate::crates_cache::{ask_and_forget, over};
use crate::support::registry::{Fault, Of, Published, Registry, index_path, noise};
use crate::support::{PATIENCE, Warmdock, http, wait_for};

/// Files that may be on their way from one registry, and index entries.
const FILES: usize = 2048;
const ENTRIES: usize = 2048;
/// How many of each are asked for at once.
const FILES_AT_ONCE: usize = 32;
const ENTRIES_AT_ONCE: usize = 64;
/// Files that are passed on at once.
const PASSED_ON: usize = 24;
/// How many more are asked for.
const TOO_MANY: usize = 20;
/// Requests on one connection. The service takes 100.
const STREAMS: usize = 90;

fn get(warmdock: &Warmdock, path: &str) -> http::Response {
    http::get(warmdock.address(), &format!("/crates/corp/{path}"))
}

#[track_caller]
fn is_whole(warmdock: &Warmdock, file: &Published) {
    let response = get(warmdock, &file.path());
    assert_eq!(response.status, 200, "{}", response.text());
    assert!(response.complete && response.body == file.bytes);
}

#[track_caller]
fn has_entry(warmdock: &Warmdock, registry: &Registry, name: &str) {
    let response = get(warmdock, &index_path(name));
    let found = (response.status, response.text());
    assert_eq!(found, (200, registry.entry(name)));
}

/// Asks for all of that at once, and gives the answers as they come. Over HTTP/2: connections of their own would be more
/// than the service takes.
fn ask_all(
    runtime: &Runtime,
    warmdock: &Warmdock,
    paths: &[String],
) -> Receiver<reqwest::Result<Response>> {
    // reqwest wants one for plain HTTP as well.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let (sender, answers) = channel();
    for paths in paths.chunks(STREAMS) {
        let client = Client::builder().no_proxy().tls_certs_only([]);
        let client = client.http2_prior_knowledge().build().unwrap();
        for path in paths {
            let url = format!("http://{}/crates/corp/{path}", warmdock.address());
            let (request, sender) = (client.get(url), sender.clone());
            runtime.spawn(async move {
                // Nobody waits for those that a failed test leaves.
                let _ = sender.send(request.send().await);
            });
        }
    }
    answers
}

/// Asks for more than the `most` that may wait for a registry, which does not answer.
fn what_is_too_much_is_refused(
    of: Of,
    most: usize,
    at_once: usize,
    path: impl Fn(usize) -> String,
) {
    let queue = match of {
        Of::Files => "warmdock_crates_queue_length{kind=\"file\"}",
        _ => "warmdock_crates_queue_length{kind=\"index\"}",
    };
    let registry = Registry::start();
    let known = registry.publish_bytes("known", "1.0.0", &[], noise(3000, 1));
    let warmdock = over(&registry)
        .set("/limits/upstream_idle_timeout", "10m")
        .start();
    has_entry(&warmdock, &registry, "known");
    wait_for("an answer out of the store", || {
        is_whole(&warmdock, &known);
        let hits = warmdock.metric(|name| name.contains("kind=\"file\",from=\"cache\""));
        (hits > 0.0).then_some(())
    });
    let wait_queued = |length: usize| {
        wait_for("the length of the queue", || {
            let found = warmdock.metric(|name| name == queue);
            (found == length as f64).then_some(())
        });
    };
    wait_queued(0);
    registry.fail(of, Fault::Hang);
    let paths: Vec<String> = (0..most + TOO_MANY).map(path).collect();
    let runtime = Runtime::new().unwrap();
    let answers = ask_all(&runtime, &warmdock, &paths);
    let next = || answers.recv_timeout(PATIENCE).expect("an answer").unwrap();
    for _ in 0..TOO_MANY {
        let answer = next();
        assert_eq!(answer.status().as_u16(), 503);
        let seconds = answer.headers()["retry-after"].to_str().unwrap();
        assert!(seconds.parse::<u64>().unwrap() >= 1, "{seconds}");
    }
    wait_queued(most - at_once);
    // The entry is old, and not asked for again.
    is_whole(&warmdock, &known);
    has_entry(&warmdock, &registry, "known");
    assert_eq!(http::get(warmdock.address(), "/healthz").status, 200);
    assert!(answers.try_recv().is_err(), "the others wait");
    let new = registry.publish_bytes("new", "1.0.0", &[], noise(3000, 2));
    registry.release();
    for _ in 0..most {
        assert_ne!(next().status().as_u16(), 503);
    }
    wait_queued(0);
    // There is room again.
    has_entry(&warmdock, &registry, "new");
    is_whole(&warmdock, &new);
}

#[test]
fn files_that_wait_for_a_registry_are_limited() {
    what_is_too_much_is_refused(Of::Files, FILES, FILES_AT_ONCE, |number| {
        format!("dl/random{number}/1.0.0/{number:064x}")
    });
}

#[test]
fn index_entries_that_wait_for_a_registry_are_limited() {
    what_is_too_much_is_refused(Of::Index, ENTRIES, ENTRIES_AT_ONCE, |number| {
        index_path(&format!("random{number}"))
    });
}

/// Whoever names the wrong crate beside a checksum takes nothing from those who name the right one.
#[test]
fn a_wrong_name_fails_nobody_else() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(300_000, 1));
    registry.publish_bytes("bogus", "1.0.0", &[], noise(300_000, 2));
    let warmdock = over(&registry).start();
    registry.fail(Of::Files, Fault::HoldAfter(100_000));
    let address = warmdock.address();
    let path = format!("/crates/corp/dl/bogus/1.0.0/{}", file.checksum);
    let asking = std::thread::spawn(move || ask_and_forget(address, &path));
    registry.wait_held();
    // From now on it holds nothing else.
    registry.fail(Of::Entry("nobody"), Fault::HoldAfter(0));
    is_whole(&warmdock, &file);
    registry.release();
    asking.join().unwrap();
    // Nor does what came then take the place of what is kept.
    is_whole(&warmdock, &file);
}

/// No room is made for what no crate can be.
#[test]
fn what_a_registry_announces_evicts_nothing() {
    const LIMIT: u64 = 1 << 30;
    let registry = Registry::start();
    let kept = registry.publish_bytes("kept", "1.0.0", &[], noise(200_000, 1));
    let other = registry.publish_bytes("other", "1.0.0", &[], noise(1000, 2));
    let max_size = format!("{LIMIT}B");
    let warmdock = over(&registry).set("/storage/max_size", max_size).start();
    is_whole(&warmdock, &kept);
    registry.fail(Of::Files, Fault::Announce(LIMIT - 100_000));
    let path = format!("/crates/corp/{}", other.path());
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let answered = http::exchange(warmdock.address(), request.as_bytes());
    assert_eq!(answered.unwrap().status, 502);
    assert_eq!(registry.asked_for("/files/other/1.0.0"), 1);
    registry.fail(Of::Everything, Fault::CutOff);
    is_whole(&warmdock, &kept);
}

/// Whoever does not read what is passed on leaves room for others of the same registry.
#[test]
fn files_that_are_passed_on_at_once_are_limited() {
    let registry = Registry::start();
    let small = registry.publish_bytes("small", "1.0.0", &[], noise(3000, 1));
    let large = registry.publish_bytes("large", "1.0.0", &[], noise(8 << 20, 2));
    let warmdock = over(&registry).set("/storage/max_size", "4MiB").start();
    let paths = vec![large.path(); PASSED_ON + TOO_MANY];
    let runtime = Runtime::new().unwrap();
    let answers = ask_all(&runtime, &warmdock, &paths);
    let next = || answers.recv_timeout(PATIENCE).expect("an answer").unwrap();
    let unread: Vec<_> = (0..PASSED_ON).map(|_| next()).collect();
    assert!(unread.iter().all(|answer| answer.status() == 200));
    is_whole(&warmdock, &small);
    assert!(answers.try_recv().is_err(), "the others wait");
    drop(unread);
    for _ in 0..TOO_MANY {
        assert_eq!(next().status(), 200);
    }
}
