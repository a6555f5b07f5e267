//! What is fuzzed (tests/fuzz), with the seeds and with what little changes make of them: whoever changes the code hears
//! of it without a fuzzer.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::support::repo::Rng;

#[path = "../fuzz/properties/authorization.rs"]
mod authorization;
#[path = "../fuzz/properties/configuration.rs"]
mod configuration;
#[path = "../fuzz/properties/crate_path.rs"]
mod crate_path;
#[path = "../fuzz/properties/pkt_line.rs"]
mod pkt_line;
#[path = "../fuzz/properties/repo_path.rs"]
mod repo_path;
#[path = "../fuzz/properties/upload_pack_request.rs"]
mod upload_pack_request;

/// Of each seed.
const CHANGED: usize = 5000;

#[track_caller]
fn holds(name: &str, check: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds");
    let mut seeds: Vec<_> = std::fs::read_dir(folder.join(name))
        .unwrap()
        .map(|seed| seed.unwrap().path())
        .collect();
    seeds.sort();
    assert!(!seeds.is_empty());
    let mut rng = Rng(7);
    for path in seeds {
        let seed = std::fs::read(&path).unwrap();
        check(&seed);
        for _ in 0..CHANGED {
            let mut bytes = seed.clone();
            for _ in 0..=rng.below(3) {
                change(&mut bytes, &mut rng);
            }
            catch_unwind(AssertUnwindSafe(|| check(&bytes))).unwrap_or_else(|_| {
                panic!("{name} with {}", bytes.escape_ascii());
            });
        }
    }
}

fn change(bytes: &mut Vec<u8>, rng: &mut Rng) {
    let at = |rng: &mut Rng, length: usize| rng.below(length as u64 + 1) as usize;
    let place = at(rng, bytes.len());
    match rng.below(4) {
        0 => bytes.truncate(place),
        1 => bytes.insert(place, rng.next() as u8),
        2 if place < bytes.len() => bytes[place] = rng.next() as u8,
        _ => {
            let end = place + at(rng, bytes.len() - place).min(40);
            let again = bytes[place..end].to_vec();
            let into = at(rng, bytes.len());
            bytes.splice(into..into, again);
        }
    }
}

/// For what takes text.
fn of_text(check: impl Fn(&str)) -> impl Fn(&[u8]) {
    move |bytes| {
        if let Ok(text) = std::str::from_utf8(bytes) {
            check(text);
        }
    }
}

#[test]
fn of_packets() {
    holds("pkt_line", pkt_line::check);
}

#[test]
fn of_requests() {
    holds("upload_pack_request", upload_pack_request::check);
}

#[test]
fn of_names_of_repositories() {
    holds("repo_path", of_text(repo_path::check));
}

#[test]
fn of_paths_of_crates() {
    holds("crate_path", of_text(crate_path::check));
}

#[test]
fn of_credentials() {
    holds("authorization", authorization::check);
}

#[test]
fn of_configurations() {
    holds("configuration", of_text(configuration::check));
}
