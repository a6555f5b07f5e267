//! gitoxide as a client: clones and fetches with each protocol version.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use gix::progress::Discard;
use gix::remote::{Direction, fetch::Shallow};

use crate::support::compare::{Objects, assert_same};
use crate::support::{Client, Repo, SAMPLE, Upstream, Warmdock, warmdock};

/// Clones `url` into `into` without checking anything out.
fn clone(url: &str, into: &Path, protocol: u8, shallow: Shallow) -> gix::Repository {
    // The reqwest in gix takes whichever TLS the process has chosen, also for plain HTTP.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let options =
        gix::open::Options::isolated().config_overrides([format!("protocol.version={protocol}")]);
    let create = gix::create::Options::default();
    let fetch =
        gix::clone::PrepareFetch::new(url, into, gix::create::Kind::WithWorktree, create, options)
            .unwrap();
    let (repo, _) = fetch
        .with_shallow(shallow)
        .fetch_only(Discard, &AtomicBool::new(false))
        .unwrap();
    repo
}

/// Fetches what is new.
fn fetch(repo: &gix::Repository) {
    let remote = repo.find_remote("origin").unwrap();
    let connection = remote.connect(Direction::Fetch).unwrap();
    let prepared = connection
        .prepare_fetch(Discard, gix::remote::ref_map::Options::default())
        .unwrap();
    prepared.receive(Discard, &AtomicBool::new(false)).unwrap();
}

fn setup() -> (Upstream, Repo, Warmdock, Client) {
    let (upstream, repo) = Upstream::with_sample();
    // The service reads the folder, gix talks to the upstream over HTTP: it needs an external program for `file://`.
    let warmdock = warmdock::over_files(&upstream);
    (upstream, repo, warmdock, Client::new(2))
}

fn clone_and_fetch(protocol: u8) {
    let (upstream, repo, warmdock, client) = setup();
    let direct_url = format!("{}/{SAMPLE}.git", upstream.url());
    let ours = clone(
        &warmdock.url(SAMPLE),
        &client.path("ours"),
        protocol,
        Shallow::NoChange,
    );
    let direct = clone(
        &direct_url,
        &client.path("direct"),
        protocol,
        Shallow::NoChange,
    );
    assert_same(&client, "ours", "direct", Objects::Exactly);
    repo.commit("main", &[("new.txt", b"new\n")]);
    repo.commit("topic", &[("topic.txt", b"topic\n")]);
    repo.force_push("feature/one");
    fetch(&ours);
    fetch(&direct);
    assert_same(&client, "ours", "direct", Objects::Reachable);
}

#[test]
fn v0_clone_and_fetch() {
    clone_and_fetch(0);
}

#[test]
fn v1_clone_and_fetch() {
    clone_and_fetch(1);
}

#[test]
fn v2_clone_and_fetch() {
    clone_and_fetch(2);
}

/// With v1 gix also sends `deepen-relative`, whereupon git's own server gives it the whole history: so do we.
fn depth_1(protocol: u8) {
    let (upstream, _repo, warmdock, client) = setup();
    let depth = || Shallow::DepthAtRemote(1.try_into().unwrap());
    clone(
        &warmdock.url(SAMPLE),
        &client.path("ours"),
        protocol,
        depth(),
    );
    clone(
        &format!("{}/{SAMPLE}.git", upstream.url()),
        &client.path("direct"),
        protocol,
        depth(),
    );
    assert_same(&client, "ours", "direct", Objects::Exactly);
}

#[test]
fn v1_depth_1() {
    depth_1(1);
}

#[test]
fn v2_depth_1() {
    depth_1(2);
}

/// What an upstream can do and the service cannot is not offered to a client that may be served by either.
#[test]
fn a_fetch_that_begins_before_there_is_a_mirror_and_goes_on_with_it() {
    let (upstream, repo) = Upstream::with_sample();
    for setting in [
        "uploadpack.allowSidebandAll",
        "uploadpack.advertiseBundleURIs",
        "transfer.advertiseObjectInfo",
    ] {
        repo.git(&["config", setting, "true"]);
    }
    let warmdock = warmdock::over_http(&upstream);
    let client = Client::new(2);
    // The reqwest in gix takes whichever TLS the process has chosen, also for plain HTTP.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let ours = gix::init_bare(client.path("ours")).unwrap();
    let remote = ours.remote_at(warmdock.url(SAMPLE)).unwrap();
    let remote = remote
        .with_refspecs(["+refs/heads/*:refs/heads/*"], Direction::Fetch)
        .unwrap();
    let connection = remote.connect(Direction::Fetch).unwrap();
    let prepared = connection
        .prepare_fetch(Discard, gix::remote::ref_map::Options::default())
        .unwrap();
    warmdock.wait_mirrored(SAMPLE, &repo);
    prepared.receive(Discard, &AtomicBool::new(false)).unwrap();
    let tip = client.git_in("ours", &["rev-parse", "main"]).ok().text();
    assert_eq!(tip, repo.id("main"));
}
