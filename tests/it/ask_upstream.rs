//! Keys that an upstream publishes for its users.

use std::time::Duration;

use serde_json::json;

use crate::support::ssh_door::SshDoor;
use crate::support::warmdock::{Warmdock, builder};
use crate::support::{Client, Fault, HOST, SAMPLE, Upstream, wait_for};

struct Setup {
    upstream: Upstream,
    door: SshDoor,
    warmdock: Warmdock,
}

/// `alice` and `carol` are asked for, `bob` is not; the upstream publishes the keys of all three.
fn setup() -> Setup {
    let (upstream, repo) = Upstream::with_sample();
    upstream.sample("other/repo");
    let door = SshDoor::new();
    for user in ["alice", "bob", "carol"] {
        door.keygen(user);
        publish(
            &upstream,
            user,
            &format!("ssh-new AAAA\n{}\n", door.public(user)),
        );
    }
    let ask = json!([{
        "host": HOST, "users": ["alice", "carol"], "repos": [format!("{HOST}/team/*")], "keep": "1s",
    }]);
    let warmdock = door.open(
        builder(&upstream.url())
            .set("/access/anonymous", "none")
            .set("/access/ask_upstream", ask),
    );
    // The mirror is there before anybody fails to read it.
    let mut client = Client::new(2);
    client.set("GIT_SSH_COMMAND", &door.ssh("user"));
    client.clone(&warmdock.ssh_url(SAMPLE), "ours", &[]).ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    Setup {
        upstream,
        door,
        warmdock,
    }
}

fn publish(upstream: &Upstream, user: &str, keys: &str) {
    std::fs::write(upstream.root().join(format!("{user}.keys")), keys).unwrap();
}

impl Setup {
    fn may_read(&self, user: &str, key: &str, name: &str) -> bool {
        let mut client = Client::new(2);
        client.set("GIT_SSH_COMMAND", &self.door.ssh(key));
        let url = self
            .warmdock
            .ssh_url(name)
            .replace("git@", &format!("{user}@"));
        client.git(&["ls-remote", &url]).status.success()
    }

    fn asked(&self) -> usize {
        let asked = self.upstream.asked();
        asked
            .iter()
            .filter(|asked| asked.request.path.ends_with(".keys"))
            .count()
    }
}

#[test]
fn a_published_key_is_its_user() {
    let setup = setup();
    // User, key, repository, and whether that may be read.
    let table = [
        ("alice", "alice", SAMPLE, true),
        ("carol", "carol", SAMPLE, true),
        ("alice", "alice", "other/repo", false),
        ("alice", "carol", SAMPLE, false),
        ("bob", "bob", SAMPLE, false),
        ("git", "alice", SAMPLE, false),
        ("Alice", "alice", SAMPLE, false),
        // A key that is listed here counts whatever the name.
        ("bob", "user", SAMPLE, true),
    ];
    for (user, key, name, expected) in table {
        assert_eq!(
            setup.may_read(user, key, name),
            expected,
            "{user} with {key} reads {name}"
        );
    }
}

#[test]
fn a_key_that_is_published_no_more_is_refused() {
    let setup = setup();
    assert!(setup.may_read("alice", "alice", SAMPLE));
    publish(&setup.upstream, "alice", &setup.door.public("bob"));
    wait_for("the old key to be refused", || {
        (!setup.may_read("alice", "alice", SAMPLE)).then_some(())
    });
    assert!(setup.may_read("alice", "bob", SAMPLE));
}

#[test]
fn a_published_key_that_is_revoked_here_is_refused() {
    let setup = setup();
    assert!(setup.may_read("alice", "alice", SAMPLE));
    let revoked = setup.door.path("revoked");
    std::fs::write(&revoked, setup.door.public("alice")).unwrap();
    let mut config = setup.warmdock.config();
    config["access"]["keys"]["revoked_keys_file"] = json!(revoked);
    setup.warmdock.write_config(&config.to_string());
    wait_for("the key to be refused", || {
        (!setup.may_read("alice", "alice", SAMPLE)).then_some(())
    });
    assert!(setup.may_read("carol", "carol", SAMPLE));
}

#[test]
fn an_upstream_that_is_away_lets_nobody_in_for_long() {
    let setup = setup();
    assert!(setup.may_read("alice", "alice", SAMPLE));
    setup.upstream.fail(Fault::Status(503));
    wait_for("kept keys to count no more", || {
        std::thread::sleep(Duration::from_millis(500));
        (!setup.may_read("alice", "alice", SAMPLE)).then_some(())
    });
    setup.upstream.release();
    wait_for("the key to be let in again", || {
        setup.may_read("alice", "alice", SAMPLE).then_some(())
    });
    assert!(setup.asked() < 30, "asked {} times", setup.asked());
}

#[test]
fn another_address_that_is_named_instead_is_not_asked() {
    let (setup, other) = (setup(), Upstream::start());
    publish(&other, "alice", &setup.door.public("alice"));
    setup.upstream.fail(Fault::Redirect(other.url()));
    assert!(!setup.may_read("alice", "alice", SAMPLE));
    setup.warmdock.wait_log("why", |event| {
        let is_why = event["message"] == "keys cannot be asked for";
        is_why && event["error"].to_string().contains("it redirects")
    });
    assert!(other.asked().is_empty());
}

/// As over HTTP: who is served over SSH is told, and so is the operator.
#[test]
fn an_upstream_that_fails_is_in_the_log() {
    let setup = setup();
    setup.upstream.fail(Fault::Status(503));
    assert!(!setup.may_read("git", "user", "team/cold"));
    setup.warmdock.wait_log("the failure", |event| {
        event["level"] == "WARN" && event["message"] == "upstream failed"
    });
}
