//! Upstreams over SSH, against OpenSSH's own server with git's own upload-pack.

use std::fs::{self, File};
use std::path::Path;

use serde_json::{Value, json};

use crate::support::client::git_at;
use crate::support::compare::{self, Objects};
use crate::support::ssh_door::Agent;
use crate::support::sshd::{SshFault, Sshd, ssh_keygen};
use crate::support::warmdock::{Builder, Warmdock, builder};
use crate::support::{Client, Fault, HOST, Repo, SAMPLE, Upstream, wait_for};

/// A folder with the sample repository behind a server, and a service over it that is yet to be started.
struct Setup {
    upstream: Upstream,
    repo: Repo,
    sshd: Sshd,
}

impl Setup {
    fn new() -> Self {
        Self::with(Sshd::start())
    }

    fn with(sshd: Sshd) -> Self {
        let (upstream, repo) = Upstream::with_sample();
        Self {
            upstream,
            repo,
            sshd,
        }
    }

    fn entry(&self) -> Value {
        self.sshd.upstream(self.upstream.root())
    }

    /// The service, with one key of the entry replaced.
    fn builder_with(&self, key: &str, value: impl Into<Value>) -> Builder {
        let mut entry = self.entry();
        entry[key] = value.into();
        over(entry)
    }

    fn start(&self) -> Warmdock {
        over(self.entry()).start()
    }

    #[track_caller]
    fn clones(&self, warmdock: &Warmdock) {
        let client = Client::new(2);
        client
            .clone(&warmdock.url(SAMPLE), "ours", &["--mirror"])
            .ok();
        client
            .clone(&self.upstream.direct(SAMPLE), "direct", &["--mirror"])
            .ok();
        compare::assert_same(&client, "ours", "direct", Objects::Reachable);
        warmdock.fsck_mirror(SAMPLE);
    }

    /// What a client is told when the upstream cannot be asked.
    #[track_caller]
    fn refusal(&self, warmdock: &Warmdock) -> String {
        let output = Client::new(2)
            .clone(&warmdock.url(SAMPLE), "ours", &[])
            .failed();
        assert!(
            !warmdock.log().contains("PRIVATE KEY"),
            "{}",
            warmdock.log()
        );
        output.stderr
    }
}

fn over(entry: Value) -> Builder {
    builder("file:///nowhere")
        .set("/git/upstreams", json!([entry]))
        .environment("RUST_LOG", "debug")
}

#[test]
fn clone_and_incremental_fetch() {
    let setup = Setup::new();
    let warmdock = setup.start();
    setup.clones(&warmdock);
    let packs = warmdock.packs(SAMPLE).len();
    setup.repo.commit("main", &[("new.txt", b"new\n")]);
    setup.clones(&warmdock);
    assert_eq!(
        warmdock.packs(SAMPLE).len(),
        packs + 1,
        "only what is new was fetched"
    );
    // Nothing new: nothing comes.
    setup.clones(&warmdock);
    assert_eq!(warmdock.packs(SAMPLE).len(), packs + 1);
}

/// A server that takes no `GIT_PROTOCOL` speaks version 0, in which both sides keep state.
#[test]
fn a_server_without_version_2() {
    let setup = Setup::with(Sshd::start_with(""));
    let warmdock = setup.start();
    setup.clones(&warmdock);
    setup.repo.commit("main", &[("new.txt", b"new\n")]);
    setup.repo.force_push("feature/one");
    setup.clones(&warmdock);
}

#[test]
fn connections_are_kept_and_shared() {
    let setup = Setup::new();
    setup.upstream.sample("team/other");
    let warmdock = setup.start();
    setup.clones(&warmdock);
    for number in 0..3 {
        setup
            .repo
            .commit("main", &[("n", format!("{number}").as_bytes())]);
        setup.clones(&warmdock);
        Client::new(2)
            .clone(&warmdock.url("team/other"), "other", &[])
            .ok();
    }
    assert_eq!(setup.sshd.connections(), 1);
}

/// Twelve repositories at once need more than one connection has places for, and no more than a few.
#[test]
fn many_first_clones_at_once() {
    let setup = Setup::new();
    let names: Vec<String> = (0..12).map(|number| format!("team/r{number}")).collect();
    let repos: Vec<_> = names
        .iter()
        .map(|name| setup.upstream.sample(name))
        .collect();
    let addresses: Vec<_> = names.iter().map(|name| format!("{HOST}/{name}")).collect();
    // Nobody asks meanwhile: what is passed through to clients takes places as well.
    let warmdock = over(setup.entry())
        .set("/git/first_clones", 12)
        .set("/git/warm", json!(addresses))
        .start();
    for (name, repo) in names.iter().zip(&repos) {
        warmdock.wait_mirrored(name, repo);
        Client::new(2).clone(&warmdock.url(name), "ours", &[]).ok();
    }
    assert!(
        (2..=4).contains(&setup.sshd.connections()),
        "{}",
        setup.sshd.connections()
    );
}

#[test]
fn keys_of_every_kind() {
    for (name, args) in [
        ("rsa", &["-t", "rsa", "-b", "2048"][..]),
        ("rsa_pem", &["-t", "rsa", "-b", "2048", "-m", "PEM"]),
        ("rsa_pkcs8", &["-t", "rsa", "-b", "2048", "-m", "PKCS8"]),
        ("p256", &["-t", "ecdsa", "-b", "256"]),
        ("p384", &["-t", "ecdsa", "-b", "384"]),
        ("p521", &["-t", "ecdsa", "-b", "521"]),
        ("ed25519", &["-t", "ed25519"]),
    ] {
        let setup = Setup::new();
        let key = setup.sshd.keygen(name, args);
        setup.sshd.authorize(name);
        let warmdock = setup
            .builder_with("key_file", key.to_str().unwrap())
            .start();
        println!("{name}");
        setup.clones(&warmdock);
    }
}

#[test]
fn an_encrypted_key_and_its_passphrase() {
    const PASSPHRASE: &str = "correct horse 5c1e";
    let setup = Setup::new();
    let key = setup
        .sshd
        .keygen("locked", &["-t", "ed25519", "-N", PASSPHRASE]);
    setup.sshd.authorize("locked");
    let file = setup.sshd.write("passphrase", &format!("{PASSPHRASE}\n"));
    let mut entry = setup.entry();
    entry["key_file"] = json!(key);
    entry["passphrase_file"] = json!(file);
    let warmdock = over(entry).environment("RUST_LOG", "trace").start();
    setup.clones(&warmdock);
    assert!(!warmdock.log().contains(PASSPHRASE));
}

#[test]
fn an_agent() {
    let setup = Setup::new();
    let agent = Agent::start();
    agent.add(&setup.sshd.keygen("another", &["-t", "ed25519"]));
    agent.add(&setup.sshd.path("user"));
    let mut entry = setup.entry();
    entry.as_object_mut().unwrap().remove("key_file");
    let warmdock = over(entry)
        .environment("SSH_AUTH_SOCK", &agent.socket())
        .start();
    setup.clones(&warmdock);
}

#[test]
fn a_wrong_key() {
    let setup = Setup::new();
    let key = setup.sshd.keygen("stranger", &["-t", "ed25519"]);
    let warmdock = setup
        .builder_with("key_file", key.to_str().unwrap())
        .start();
    let refusal = setup.refusal(&warmdock);
    let fingerprint = ssh_keygen(&["-l", "-f", key.to_str().unwrap()]).text();
    let fingerprint = fingerprint.split(' ').nth(1).unwrap();
    assert!(
        refusal.contains("expected to be let in as")
            && refusal.contains(fingerprint)
            && refusal.contains("give the public key access there"),
        "{refusal}"
    );
}

#[test]
fn an_unknown_host_key() {
    let setup = Setup::new();
    let known_hosts = setup.sshd.write(
        "elsewhere",
        &format!("elsewhere.example {}\n", setup.sshd.public("host_ed25519")),
    );
    let warmdock = setup
        .builder_with("known_hosts_file", known_hosts.to_str().unwrap())
        .start();
    let refusal = setup.refusal(&warmdock);
    let line = format!(
        "{} {}",
        setup.sshd.name(),
        setup.sshd.public("host_ed25519")
    );
    assert!(
        refusal.contains("has no line for") && refusal.contains(&line),
        "{refusal}"
    );
}

#[test]
fn a_changed_host_key() {
    let setup = Setup::new();
    setup.sshd.keygen("before", &["-t", "ed25519"]);
    let line = format!("{} {}\n", setup.sshd.name(), setup.sshd.public("before"));
    let known_hosts = setup.sshd.write("changed", &format!("# a comment\n{line}"));
    let warmdock = setup
        .builder_with("known_hosts_file", known_hosts.to_str().unwrap())
        .start();
    let refusal = setup.refusal(&warmdock);
    assert!(
        refusal.contains("of line 2 of known_hosts_file, the host offered ssh-ed25519 SHA256:"),
        "{refusal}"
    );
    // Mended in the file, it works after the reload.
    std::fs::copy(setup.sshd.known_hosts("ed25519"), known_hosts).unwrap();
    warmdock.signal("HUP");
    wait_for("the mended file to hold", || {
        let client = Client::new(2);
        client
            .clone(&warmdock.url(SAMPLE), "ours", &[])
            .status
            .success()
            .then_some(())
    });
}

/// The host has three keys, and shows the one that we know.
#[test]
fn the_known_key_is_asked_for() {
    for kind in ["ecdsa", "rsa"] {
        let setup = Setup::new();
        let known_hosts = setup.sshd.known_hosts(kind);
        let warmdock = setup
            .builder_with("known_hosts_file", known_hosts.to_str().unwrap())
            .start();
        setup.clones(&warmdock);
    }
}

#[test]
fn hashed_and_revoked_names() {
    let setup = Setup::new();
    let hashed = setup.sshd.known_hosts("ed25519");
    ssh_keygen(&["-q", "-H", "-f", hashed.to_str().unwrap()]);
    let text = std::fs::read_to_string(&hashed).unwrap();
    assert!(text.starts_with("|1|"), "{text}");
    let file = setup.sshd.write("hashed", &text);
    let warmdock = setup
        .builder_with("known_hosts_file", file.to_str().unwrap())
        .start();
    setup.clones(&warmdock);

    let revoked = format!("{text}@revoked * {}\n", setup.sshd.public("host_ed25519"));
    let file = setup.sshd.write("revoked", &revoked);
    let warmdock = setup
        .builder_with("known_hosts_file", file.to_str().unwrap())
        .start();
    let refusal = setup.refusal(&warmdock);
    assert!(
        refusal.contains("which line 2 of known_hosts_file revokes"),
        "{refusal}"
    );
}

#[test]
fn host_certificates() {
    // What the certificate says, and what a client is told of it.
    let cases: [(&[&str], Option<&str>); 4] = [
        (&["-h", "-n", "127.0.0.1"], None),
        (
            &["-h", "-n", "other.example"],
            Some("for 127.0.0.1, the host offered one for [\"other.example\"]"),
        ),
        (
            &["-h", "-n", "127.0.0.1", "-V", "20200101:20200102"],
            Some("that is valid now"),
        ),
        (
            &["-n", "127.0.0.1"],
            Some("a host certificate for hosts, the host offered one for users"),
        ),
    ];
    for (args, refusal) in cases {
        let (upstream, repo) = Upstream::with_sample();
        let keys = crate::support::temporary_folder();
        let at = |name: &str| keys.path().join(name).to_str().unwrap().to_owned();
        crate::support::sshd::keygen(Path::new(&at("ca")), &["-t", "ed25519"]);
        crate::support::sshd::keygen(Path::new(&at("host")), &["-t", "ed25519"]);
        ssh_keygen(
            &[
                &["-q", "-s", &at("ca"), "-I", "host"],
                args,
                &[&at("host.pub")],
            ]
            .concat(),
        );
        let sshd = Sshd::start_with(&format!(
            "AcceptEnv GIT_PROTOCOL\nHostKey {}\nHostCertificate {}\n",
            at("host"),
            at("host-cert.pub")
        ));
        let authority = std::fs::read_to_string(at("ca.pub")).unwrap();
        let file = sshd.write(
            "authority",
            &format!("@cert-authority [127.0.0.*]:* {authority}"),
        );
        let setup = Setup {
            upstream,
            repo,
            sshd,
        };
        let warmdock = setup
            .builder_with("known_hosts_file", file.to_str().unwrap())
            .start();
        match refusal {
            None => setup.clones(&warmdock),
            Some(part) => {
                let text = setup.refusal(&warmdock);
                assert!(text.contains(part), "{text}");
            }
        }
    }
}

#[test]
fn what_is_not_there_is_not_found() {
    let setup = Setup::new();
    let warmdock = setup.start();
    let output = Client::new(2)
        .clone(&warmdock.url("team/absent"), "ours", &[])
        .failed();
    assert!(output.stderr.contains("not found"), "{}", output.describe());
}

/// Git's own server looks for a folder of just that name, or with more behind it.
#[test]
fn a_name_without_git_at_its_end() {
    let setup = Setup::new();
    let plain = Repo::sample(&setup.upstream.root().join("team/plain"), 2);
    let warmdock = setup.start();
    let client = Client::new(2);
    let url = warmdock.url("team/plain");
    client.clone(&url, "ours", &["--bare"]).ok();
    let tip = client.git_in("ours", &["rev-parse", "main"]).ok().text();
    assert_eq!(tip, plain.id("main"));
    setup.clones(&warmdock);
}

#[test]
fn a_server_that_is_killed_in_the_middle_of_a_pack() {
    let setup = Setup::new();
    Repo::large(&setup.upstream.path("team/large"), 4 << 20);
    let warmdock = setup.start();
    setup.sshd.fail(SshFault::CutAfter(1 << 20));
    let output = Client::new(2)
        .clone(&warmdock.url("team/large"), "ours", &[])
        .failed();
    assert!(
        output.stderr.contains("error: 502"),
        "{}",
        output.describe()
    );
    warmdock.wait_log("the reason", |event| {
        let error = event["error"].as_str().unwrap_or_default();
        error.starts_with(&format!("{HOST}: the connection broke off"))
    });
    assert!(!warmdock.mirror("team/large").exists());
    setup.sshd.fail(SshFault::None);
    wait_for("the next clone to work", || {
        let output = Client::new(2).clone(&warmdock.url("team/large"), "ours", &[]);
        output.status.success().then_some(())
    });
}

#[test]
fn a_server_that_hangs() {
    let setup = Setup::new();
    let warmdock = over(setup.entry())
        .set("/limits/upstream_idle_timeout", "3s")
        .start();
    setup.sshd.fail(SshFault::Hang);
    let refusal = setup.refusal(&warmdock);
    assert!(refusal.contains("did not answer for 3s"), "{refusal}");
    // In the middle of a pack as well.
    Repo::large(&setup.upstream.path("team/large"), 4 << 20);
    setup.sshd.fail(SshFault::None);
    wait_for("the host to be asked again", || {
        let output = Client::new(2).clone(&warmdock.url(SAMPLE), "ours", &[]);
        output.status.success().then_some(())
    });
    setup.sshd.fail(SshFault::HoldAfter(1 << 20));
    let output = Client::new(2)
        .clone(&warmdock.url("team/large"), "ours", &[])
        .failed();
    assert!(
        output.stderr.contains("error: 502"),
        "{}",
        output.describe()
    );
    warmdock.wait_log("the reason", |event| {
        let error = event["error"].as_str().unwrap_or_default();
        error == format!("{HOST}: it sent nothing for 3s")
    });
}

/// In the exchange of keys, in the command, or behind git's greeting. That, and what a shell or a banner says before, may come
/// from what stands before the host.
#[test]
fn a_host_that_hangs_is_not_waited_for_by_all() {
    let says = "echo 'Authorized use only.' >&2; exec cat >/dev/null";
    let greets = r#"eval "$SSH_ORIGINAL_COMMAND --advertise-refs"; exec cat >/dev/null"#;
    // Beyond the server's identification, and far from the end of its algorithms.
    let identifies = SshFault::HoldAfter(100);
    std::thread::scope(|scope| {
        for (fault, command) in [
            (identifies, RUNS),
            (SshFault::None, says),
            (SshFault::None, greets),
        ] {
            scope.spawn(move || is_left_alone(fault, command));
        }
    });
}

/// What a server runs for us, and nothing else.
const RUNS: &str = r#"eval "exec $SSH_ORIGINAL_COMMAND""#;

/// Clients of two repositories wait for a host that has `fault`, or runs `command` in place of git. Others do not, until
/// it answers.
fn is_left_alone(fault: SshFault, command: &str) {
    let setup = Setup::new();
    let script = setup.sshd.write("command", RUNS);
    let (script, key) = (script.display(), setup.sshd.public("user"));
    let forced = format!("command=\"sh {script}\" {key}\n");
    setup.sshd.write("authorized_keys", &forced);
    let (asked, other) = ([SAMPLE, "team/asked"], "team/other");
    setup.upstream.sample(asked[1]);
    setup.upstream.sample(other);
    let mut warmdock = setup.start();
    for name in [asked[0], asked[1], other] {
        Client::new(2).clone(&warmdock.url(name), "ours", &[]).ok();
    }
    // From here on there is no connection that was kept.
    warmdock.stop();
    warmdock.start_again();
    setup.sshd.fail(fault);
    setup.sshd.write("command", command);

    let list = |name: &str| Client::new(2).git(&["ls-remote", &warmdock.url(name)]).ok();
    std::thread::scope(|scope| {
        for name in asked {
            scope.spawn(move || list(name));
        }
    });
    warmdock.wait_log("the host to be blamed", |event| {
        event["message"] == "the upstream takes questions and answers none"
    });
    setup.sshd.fail(SshFault::None);
    setup.sshd.write("command", RUNS);
    wait_for("the service to hear from its upstream", || {
        list(other);
        warmdock.log().contains("answers again").then_some(())
    });
}

/// A connection that the host ends between two fetches is made anew, and nobody hears of it.
#[test]
fn a_kept_connection_that_ended() {
    let setup = Setup::new();
    let warmdock = setup.start();
    setup.clones(&warmdock);
    setup.sshd.fail(SshFault::CutAfter(0));
    setup.repo.commit("main", &[("new.txt", b"new\n")]);
    // From what is here: the kept connection has ended, and there is no other.
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "stale", &[])
        .ok();
    warmdock.wait_log("stale references", |event| {
        event["message"] == "serving stale references"
    });
    setup.sshd.fail(SshFault::None);
    wait_for("the new commit", || {
        let client = Client::new(2);
        client
            .clone(&warmdock.url(SAMPLE), "ours", &["--mirror"])
            .ok();
        (client.git_in("ours", &["rev-parse", "main"]).text() == setup.repo.id("main"))
            .then_some(())
    });
}

#[test]
fn a_stop_does_not_wait_for_a_server_that_hangs() {
    let setup = Setup::new();
    let mut warmdock = setup.start();
    setup.clones(&warmdock);
    setup.sshd.fail(SshFault::HoldAfter(0));
    setup.repo.commit("main", &[("new.txt", b"new\n")]);
    let url = warmdock.url(SAMPLE);
    let waiting = std::thread::spawn(move || Client::new(2).clone(&url, "ours", &[]));
    setup.sshd.wait_held();
    assert!(!waiting.is_finished(), "the client waits for the fetch");
    warmdock.stop();
    waiting.join().unwrap();
}

/// Large first clones can have all turns for minutes, and cargo's client gives up when nothing comes for 30 s: who waits
/// for a turn is told references at once, and then that it waits.
#[test]
fn a_first_clone_that_waits_for_its_turn() {
    let setup = Setup::new();
    let (slow, _large) = Upstream::with_sample();
    slow.sample("team/other");
    slow.fail(Fault::HoldPackAfter(2000));
    let (folder, far) = ("folder.example.test", "far.example.test");
    let upstreams = json!([
        setup.entry(),
        { "host": folder, "url": setup.upstream.file_url() },
        { "host": far, "url": slow.url() },
    ]);
    let warmdock = builder("file:///nowhere")
        .set("/git/upstreams", upstreams)
        .set("/git/warm", json!([format!("{far}/{SAMPLE}")]))
        .set("/git/first_clones", 1)
        // Nobody is passed through.
        .set("/git/allow_wants", "advertised")
        .set("/limits/upstream_idle_timeout", "10m")
        .start();
    slow.wait_held();

    let client = Client::new(2);
    let url = |host: &str, name: &str| {
        let address = warmdock.address();
        format!("http://{address}/git/{host}/{name}.git")
    };
    let absent = client
        .git(&["ls-remote", &url(folder, "team/absent")])
        .failed();
    assert!(absent.stderr.contains("not found"), "{}", absent.describe());
    let before = setup.repo.id("main");
    let waiting = [(HOST, SAMPLE), (folder, SAMPLE), (far, "team/other")];
    let clones = waiting.map(|(host, name)| {
        let url = url(host, name);
        let listed = client.git(&["ls-remote", &url]).ok().text();
        assert!(listed.contains(&before), "{listed}");
        let said = client.path(&format!("{host}.log"));
        let mut command = client.command(&["clone", "--progress", "--bare", &url, host]);
        command.stderr(File::create(&said).unwrap());
        (host, said, command.spawn().unwrap())
    });
    for (_, said, _) in &clones {
        wait_for("word that it waits", || {
            let said = fs::read_to_string(said).unwrap();
            said.contains("waiting for its turn").then_some(())
        });
    }
    // What was told is what the clients get, and what is there by then is what is listed and mirrored.
    let after = setup.repo.commit("main", &[("new.txt", b"new\n")]);
    for host in [HOST, folder] {
        let listed = client.git(&["ls-remote", &url(host, SAMPLE)]).ok().text();
        assert!(listed.contains(&after), "{listed}");
    }
    slow.release();
    for (host, said, mut clone) in clones {
        let status = wait_for("a clone to end", || clone.try_wait().unwrap());
        assert!(status.success(), "{}", fs::read_to_string(said).unwrap());
        let tip = client.git_in(host, &["rev-parse", "main"]).ok().text();
        assert_eq!(tip, before);
    }
    let mirror = warmdock.mirror(SAMPLE);
    let tip = git_at(&mirror, &["rev-parse", "main"], b"").ok().text();
    assert_eq!(tip, after);
}
