//! The git command line against the service, with each protocol version and through each door. What a clone through the
//! service has is compared with a clone straight from the upstream.

use std::path::Path;

use crate::support::compare::{Objects, assert_same};
use crate::support::process::Output;
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
            use crate::git_clients::{Door, Way};
            pub(super) const WAY: Way = Way { protocol: $protocol, door: Door::$door };
            $(#[test] fn $scenario() { super::$scenario(WAY); })*
        }
    };
}

mod clones;
mod fetches;
mod references;

/// A service over the sample, and a client.
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

/// The upstream is a folder.
fn setup_with(way: Way, make: impl FnOnce(&Path) -> Repo) -> Setup {
    setup_over(Upstream::file_url, way, make)
}

/// The upstream is git's own server behind the door that passes nothing through to it, so that what comes is the
/// mirror's; behind the other it is a folder.
fn setup_over_both(way: Way) -> Setup {
    let url = match way.door {
        Door::Http => Upstream::file_url,
        Door::Ssh => Upstream::url,
    };
    setup_over(url, way, |path| Repo::sample(path, 1))
}

fn setup_over(url: fn(&Upstream) -> String, way: Way, make: impl FnOnce(&Path) -> Repo) -> Setup {
    let upstream = Upstream::start();
    let repo = make(&upstream.path(SAMPLE));
    let mut client = Client::new(way.protocol);
    let builder = warmdock::builder(&url(&upstream));
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

    /// Lets the service have what its upstream has now.
    #[track_caller]
    fn refresh(&self) {
        self.client.git(&["ls-remote", &self.url()]).ok();
        self.warmdock.wait_mirrored(SAMPLE, &self.repo);
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
