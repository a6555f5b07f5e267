//! The SSH door, with OpenSSH's own client: who is let in, what can be asked for, and what cannot. What git itself does
//! through it is in `git_clients`.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};

use serde_json::{Value, json};

use crate::support::compare::{self, Objects};
use crate::support::process::Output;
use crate::support::ssh_door::{Agent, SshDoor};
use crate::support::warmdock::{Builder, Warmdock, builder};
use crate::support::{Client, Fault, HOST, Repo, SAMPLE, Upstream, wait_for};

/// A service with two repositories, a key for both, and a key for `other/*` only.
pub struct Setup {
    upstream: Upstream,
    pub door: SshDoor,
    pub warmdock: Warmdock,
}

pub fn setup() -> Setup {
    setup_with(|builder| builder)
}

pub fn setup_with(change: impl FnOnce(Builder) -> Builder) -> Setup {
    let (upstream, _repo) = Upstream::with_sample();
    upstream.sample("other/repo");
    let door = SshDoor::new();
    door.keygen("limited");
    door.keygen("stranger");
    let entries = json!([
        { "name": "limited", "public_key": door.public("limited"), "repos": [format!("{HOST}/other/*")] },
    ]);
    let config = builder(&upstream.file_url())
        .set("/access/anonymous", "none")
        .set("/access/keys/entries", entries)
        .environment("RUST_LOG", "debug");
    let warmdock = door.open(change(config));
    Setup {
        upstream,
        door,
        warmdock,
    }
}

impl Setup {
    pub fn client(&self, key: &str) -> Client {
        let mut client = Client::new(2);
        client.set("GIT_SSH_COMMAND", &self.door.ssh(key));
        client
    }

    pub fn clone(&self, key: &str, name: &str) -> Output {
        self.client(key)
            .clone(&self.warmdock.ssh_url(name), "ours", &["--bare"])
    }

    /// A command whose standard input stays open.
    pub fn hold(&self, options: &[&str], command: &str) -> Child {
        let mut ssh = self.door.command(&self.warmdock, "user", options);
        ssh.arg(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        ssh.spawn().unwrap()
    }

    pub fn run(&self, key: &str, options: &[&str], command: &[&str]) -> Output {
        self.door.run(&self.warmdock, key, options, command)
    }
}

#[test]
fn a_key_of_the_file_reads_everything() {
    let setup = setup();
    setup.clone("user", SAMPLE).ok();
    setup.clone("user", "other/repo").ok();
}

#[test]
fn version_1() {
    let setup = setup();
    let mut client = Client::new(1);
    client.set("GIT_SSH_COMMAND", &setup.door.ssh("user"));
    client
        .clone(&setup.warmdock.ssh_url(SAMPLE), "ours", &["--bare"])
        .ok();
    client
        .clone(&setup.upstream.direct(SAMPLE), "direct", &["--bare"])
        .ok();
    compare::assert_same(&client, "ours", "direct", Objects::Exactly);
}

/// OpenSSH would rather have ChaCha20, and takes it from a machine without instructions for AES.
#[test]
fn a_client_that_knows_aes_gcm_speaks_it_and_every_other_what_it_knows() {
    const AES_GCM: &str = "aes128-gcm@openssh.com";
    let setup = setup();
    let spoken = |options: &[&str]| {
        let options = [&["-v"], options].concat();
        let command = format!("git-upload-pack '/{HOST}/{SAMPLE}.git'");
        let output = setup.run("user", &options, &[&command]);
        let begin = "kex: server->client cipher: ";
        let line = output
            .stderr
            .lines()
            .find_map(|line| line.split_once(begin));
        let (_, cipher) = line.unwrap_or_else(|| panic!("{}", output.describe()));
        assert!(
            output.text().contains("refs/heads/main"),
            "{}",
            output.describe()
        );
        cipher.split(' ').next().unwrap().to_owned()
    };
    let has_instructions = cfg!(target_arch = "x86_64")
        && std::fs::read_to_string("/proc/cpuinfo")
            .unwrap()
            .contains(" aes ");
    if has_instructions {
        // Who says late what it knows is offered everything.
        wait_for("AES-GCM", || (spoken(&[]) == AES_GCM).then_some(()));
    }
    for one in [AES_GCM, "chacha20-poly1305@openssh.com", "aes256-ctr"] {
        assert_eq!(spoken(&["-c", one]), one);
    }
}

#[test]
fn an_agent_has_the_key() {
    let setup = setup();
    let agent = Agent::start();
    for key in ["stranger", "user"] {
        agent.add(&setup.door.path(key));
    }
    let mut client = Client::new(2);
    client.set("GIT_SSH_COMMAND", &setup.door.ssh_without_key());
    client.set("SSH_AUTH_SOCK", &agent.socket());
    client
        .clone(&setup.warmdock.ssh_url(SAMPLE), "ours", &[])
        .ok();
}

/// Everything that differs between two refusals tells something.
#[test]
fn what_a_key_may_not_read_looks_like_what_is_not_there() {
    let setup = setup();
    setup.clone("limited", "other/repo").ok();
    // It is mirrored, which must not show either.
    setup.clone("user", SAMPLE).ok();
    let said = |name: &str| {
        let command = format!("git-upload-pack '/{HOST}/{name}.git'");
        let output = setup.run("limited", &[], &[&command]).failed();
        (output.status.code(), output.stdout, output.stderr)
    };
    let denied = said(SAMPLE);
    assert_eq!(denied.0, Some(128));
    assert!(denied.2.contains("nothing that you may read"), "{denied:?}");
    for name in ["team/absent", "other/absent", "nothing/at-all"] {
        assert_eq!(said(name), denied, "{name}");
    }
    let push = |name: &str| {
        let command = format!("git-receive-pack '/{HOST}/{name}.git'");
        setup.run("limited", &[], &[&command]).failed().stderr
    };
    assert_eq!(push(SAMPLE), push("team/absent"));
}

#[test]
fn a_key_that_nobody_has_is_refused_and_told_of() {
    let setup = setup();
    let output = setup.clone("stranger", SAMPLE).failed();
    assert!(
        output.stderr.contains("Permission denied (publickey)"),
        "{}",
        output.describe()
    );
    // Whatever the name of the user.
    let said = |user: &str| {
        let output = setup.run("stranger", &["-l", user], &["x"]).failed();
        output.stderr.replace(user, "USER")
    };
    assert_eq!(said("git"), said("nobody-of-that-name"));
    assert!(setup.clone("user", SAMPLE).status.success());
}

#[test]
fn there_is_nothing_but_git_upload_pack() {
    let setup = setup();
    for (options, command) in [
        (&["-T"][..], &[][..]),
        (&["-tt"], &[]),
        (&[], &["ls", "/"]),
        (&[], &["git-upload-pack", "/etc"]),
        (&[], &["git-upload-pack '/../../etc/passwd'"]),
        (&[], &["git-upload-archive '/x/y'"]),
        (&[], &["git-shell"]),
        (&["-s"], &["sftp"]),
    ] {
        let output = setup.run("user", options, command).failed();
        assert!(
            output.stderr.contains("warmdock: ")
                || output.stderr.contains("subsystem request failed")
                || output.stderr.contains("PTY allocation request failed"),
            "{}",
            output.describe()
        );
        assert_eq!(output.text(), "", "{}", output.describe());
    }
    let here = setup.warmdock.address().to_string();
    // Forwarding of what is behind the service.
    let output = setup.run("user", &["-W", &here], &[]).failed();
    assert!(
        output.stderr.contains("administratively prohibited"),
        "{}",
        output.describe()
    );
    let remote = format!("0:{here}");
    let output = setup
        .run(
            "user",
            &["-o", "ExitOnForwardFailure=yes", "-N", "-R", &remote],
            &[],
        )
        .failed();
    assert!(
        output.stderr.contains("remote port forwarding failed"),
        "{}",
        output.describe()
    );
}

#[test]
fn a_push_is_told_where_to_go() {
    let setup = setup();
    let client = setup.client("user");
    client
        .clone(&setup.warmdock.ssh_url(SAMPLE), "ours", &[])
        .ok();
    let output = client
        .git_in("ours", &["push", "origin", "HEAD:refs/heads/mine"])
        .failed();
    let expected = format!("warmdock is read-only: push to {HOST}/{SAMPLE}");
    assert!(output.stderr.contains(&expected), "{}", output.describe());
}

/// Also on a connection that was made before.
#[test]
fn a_revoked_key_is_refused_after_the_reload() {
    let setup = setup();
    let shared = setup.door.one_connection();
    let shared: Vec<&str> = shared.split(' ').collect();
    let command = format!("git-upload-pack '/{HOST}/{SAMPLE}.git'");
    // The conversation ends at once: there is nothing on standard input.
    let first = setup.run("user", &shared, &[&command]).ok();
    assert!(
        first.text().contains("refs/heads/main"),
        "{}",
        first.describe()
    );
    std::fs::write(setup.door.path("authorized_keys"), "").unwrap();
    setup.warmdock.signal("HUP");
    wait_for("new connections to be refused", || {
        (!setup.clone("user", SAMPLE).status.success()).then_some(())
    });
    let kept = setup.run("user", &shared, &[&command]).failed();
    assert!(
        kept.stderr.contains("This key lets nobody in any more"),
        "{}",
        kept.describe()
    );
    let _ = setup.run("user", &[&shared[..], &["-O", "exit"]].concat(), &[]);
}

#[test]
fn a_key_that_is_added_is_let_in_after_the_reload() {
    let setup = setup();
    let mut config = setup.warmdock.config();
    config["access"]["keys"]["entries"].as_array_mut().unwrap().push(json!({
        "name": "new", "public_key": setup.door.public("stranger"), "repos": [format!("{HOST}/team/*")],
    }));
    setup.warmdock.write_config(&config.to_string());
    setup.warmdock.signal("HUP");
    wait_for("the key to be let in", || {
        setup
            .clone("stranger", SAMPLE)
            .status
            .success()
            .then_some(())
    });
    setup.clone("stranger", "other/repo").failed();
}

#[test]
fn the_host_key_is_made_once_and_for_nobody_else() {
    let mut setup = setup();
    let path = setup.door.path("host_key");
    let key = std::fs::read(&path).unwrap();
    assert_eq!(
        std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o600
    );
    setup.warmdock.stop();
    setup.warmdock.start_again();
    assert_eq!(std::fs::read(&path).unwrap(), key);
    setup.door.know(&setup.warmdock);
    setup.clone("user", SAMPLE).ok();
}

/// Who asks first waits for the first clone, and hears how far it is.
#[test]
fn a_first_clone_of_an_http_upstream() {
    for protocol in [0, 2] {
        let (upstream, _repo) = Upstream::with_sample();
        let door = SshDoor::new();
        let warmdock = door.open(builder(&upstream.url()));
        let mut client = Client::new(protocol);
        client.set("GIT_SSH_COMMAND", &door.ssh("user"));
        client
            .clone(&warmdock.ssh_url(SAMPLE), "ours", &["--mirror"])
            .ok();
        client
            .clone(&upstream.direct(SAMPLE), "direct", &["--mirror"])
            .ok();
        compare::assert_same(&client, "ours", "direct", Objects::Reachable);
        client
            .clone(&warmdock.ssh_url("team/absent"), "absent", &[])
            .failed();
    }
}

/// Git hears how far the first clone is while there is nothing of the pack yet, and nothing of what comes before it: where
/// history ends, and what of its own history is known, only the mirror can tell.
#[test]
fn a_slow_first_clone_tells_how_far_it_is() {
    let (upstream, repo) = Upstream::with_sample();
    let door = SshDoor::new();
    let warmdock = door.open(builder(&upstream.url()));
    let mut client = Client::new(2);
    client.set("GIT_SSH_COMMAND", &door.ssh("user"));
    client.git(&["init", "--quiet", "other"]).ok();
    let commit = ["commit", "--quiet", "--allow-empty", "-m", "mine"];
    client.git_in("other", &commit).ok();
    upstream.fail(Fault::HoldPackAfter(2000));
    let url = warmdock.ssh_url(SAMPLE);
    let main = "main:refs/remotes/origin/main";
    let commands: [&[&str]; 4] = [
        &["clone", "--progress", "--bare", &url, "whole"],
        &[
            "clone",
            "--progress",
            "--bare",
            "--depth=1",
            &url,
            "shallow",
        ],
        &["-C", "other", "fetch", "--progress", &url, main],
        // It is kept waiting without a word.
        &["clone", "--quiet", "--bare", "--depth=1", &url, "quiet"],
    ];
    let mut clients = commands.map(|command| {
        let mut client = client.command(command);
        client.stderr(Stdio::piped()).spawn().unwrap()
    });
    for client in &mut clients[..3] {
        let errors = client.stderr.as_mut().unwrap();
        let (mut said, mut buffer) = (Vec::new(), [0; 1024]);
        while !String::from_utf8_lossy(&said).contains("first clone of this repository") {
            let read = errors.read(&mut buffer).unwrap();
            assert!(read > 0, "ended: {}", String::from_utf8_lossy(&said));
            said.extend_from_slice(&buffer[..read]);
        }
    }
    upstream.release();
    for (client, command) in clients.into_iter().zip(commands) {
        let ended = client.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ended.stderr);
        assert!(ended.status.success(), "{command:?}: {said}");
        assert!(command[1] != "--quiet" || said.is_empty(), "{said}");
    }
    let direct = upstream.direct(SAMPLE);
    client.clone(&direct, "direct", &["--bare"]).ok();
    compare::assert_same(&client, "whole", "direct", Objects::Reachable);
    client.clone(&direct, "one", &["--bare", "--depth=1"]).ok();
    for shallow in ["shallow", "quiet"] {
        compare::assert_same(&client, shallow, "one", Objects::Reachable);
    }
    let tip = client.git_in("other", &["rev-parse", "origin/main"]).ok();
    assert_eq!(tip.text(), repo.id("main"));
}

/// Haves in many batches, of which the service has none, some, and then enough: state that lives between batches.
#[test]
fn a_long_negotiation() {
    for protocol in [0, 2] {
        let setup = setup();
        let mut client = Client::new(protocol);
        client.set("GIT_SSH_COMMAND", &setup.door.ssh("user"));
        let repo = Repo::at(&setup.upstream.path(SAMPLE));
        client
            .clone(&setup.warmdock.ssh_url(SAMPLE), "ours", &[])
            .ok();
        for number in 0..150 {
            let message = format!("mine {number}");
            client
                .git_in(
                    "ours",
                    &["commit", "--quiet", "--allow-empty", "-m", &message],
                )
                .ok();
        }
        repo.commits("main", 50);
        client.git_in("ours", &["fetch", "--quiet", "origin"]).ok();
        assert_eq!(
            client.git_in("ours", &["rev-parse", "origin/main"]).text(),
            repo.id("main")
        );
        client.git_in("ours", &["fsck", "--strict"]).ok();
    }
}

#[test]
fn a_clone_under_way_survives_a_stop() {
    let (upstream, _repo) = Upstream::with_sample();
    Repo::large(&upstream.path("team/large"), 24 << 20);
    let door = SshDoor::new();
    let mut warmdock = door.open(builder(&upstream.file_url()));
    let mut client = Client::new(2);
    client.set("GIT_SSH_COMMAND", &door.ssh("user"));
    let url = warmdock.ssh_url("team/large");
    client.clone(&url, "first", &["--bare"]).ok();
    std::thread::scope(|scope| {
        let client = &client;
        let clone = scope.spawn(move || client.clone(&url, "second", &["--bare"]));
        wait_for("the clone to begin", || {
            (warmdock.metric(|name| name == "warmdock_ssh_requests_in_flight") > 0.0).then_some(())
        });
        warmdock.signal("TERM");
        clone.join().unwrap().ok();
    });
    assert!(warmdock.wait().success());
    client.git_in("second", &["fsck", "--strict"]).ok();
}

#[test]
fn commands_are_counted_and_written_down_without_secrets() {
    let setup = setup();
    setup.clone("user", SAMPLE).ok();
    setup.clone("limited", SAMPLE).failed();
    setup.clone("stranger", SAMPLE).failed();
    let count = |name: &str| setup.warmdock.metric(|sample| sample == name);
    assert_eq!(count("warmdock_ssh_requests_total{result=\"ok\"}"), 1.0);
    assert_eq!(
        count("warmdock_ssh_requests_total{result=\"refused\"}"),
        1.0
    );
    assert_eq!(count("warmdock_ssh_logins_total{result=\"ok\"}"), 2.0);
    assert!(count("warmdock_ssh_response_bytes_total") > 1000.0);
    let event = setup.warmdock.wait_log("the refused request", |event| {
        event["message"] == "request" && event["ssh.status"] == 128
    });
    assert_eq!(event["name"], Value::from("limited"));
    assert_eq!(event["repo"], Value::from(format!("{HOST}/{SAMPLE}")));
    assert!(
        event["peer"].as_str().unwrap().starts_with("127.0.0.1:"),
        "{event}"
    );
    assert!(!setup.warmdock.log().contains("PRIVATE KEY"));
}

#[test]
fn check_says_what_is_wrong() {
    let folder = crate::support::temporary_folder();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    std::fs::write(at("keys"), "from=\"10.0.0.0/8\" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIINKY5jRtJGMPKDMA/f+JTJ4LKiW3+B823wE36Klfuvq x\n").unwrap();
    std::fs::write(at("host_key"), "hello\n").unwrap();
    std::fs::write(at("known_hosts"), "what is this\n").unwrap();
    let config = json!({
        "listen": { "ssh": { "host_key_file": at("host_key") } },
        "git": { "upstreams": [
            { "host": "a", "url": "ssh://git@a", "token_file": at("keys") },
            { "host": "b", "url": "ssh://git@b", "key_file": at("keys"), "known_hosts_file": at("known_hosts") },
            { "host": "c", "url": "https://c", "key_file": at("keys") },
        ] },
        "access": { "keys": {
            "authorized_keys_file": at("keys"),
            "entries": [{ "name": "x", "public_key": "ssh-ed25519 hunter2" }],
            "authorities": [{ "name": "y", "public_key": "" }],
        } },
    });
    std::fs::write(at("config.json"), config.to_string()).unwrap();
    let output = crate::support::warmdock::run(&["check", "--config", &at("config.json")]).failed();
    for part in [
        "listen.ssh.address: found nothing",
        "in which there is no private key",
        "git.upstreams[0].known_hosts_file: found nothing",
        "git.upstreams[0].token_file: found a token beside the ssh:// URL",
        "git.upstreams[0].key_file: found nothing; expected a file with a private key, or an agent named by SSH_AUTH_SOCK",
        "whose line 1 is none of that",
        "git.upstreams[2].key_file: found a file for SSH beside a URL of the scheme `https`",
        "whose line 1 has the option \"from\", which is not kept here",
        "access.keys.entries[0].public_key: found text that is none",
        "access.keys.authorities[0].principals: found nothing",
    ] {
        assert!(output.stderr.contains(part), "{part}\n{}", output.stderr);
    }
    assert!(!output.stderr.contains("hunter2"));
}

/// What `check` prints is a configuration that says the same.
#[test]
fn check_prints_a_configuration_again() {
    let setup = setup_with(|builder| builder.set("/access/ask_upstream", json!([])));
    let file = setup.warmdock.config_file();
    let check = |path: &std::path::Path| {
        crate::support::warmdock::run(&["check", "--config", path.to_str().unwrap()])
            .ok()
            .text()
    };
    let first = check(&file);
    let printed: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(printed["listen"]["ssh"]["address"], "127.0.0.1:0");
    assert_eq!(printed["access"]["keys"]["entries"][0]["name"], "limited");
    let again = setup.door.path("again.json");
    std::fs::write(&again, &first).unwrap();
    assert_eq!(check(&again), first);
}

#[test]
fn client_config_for_the_ssh_door() {
    let setup = setup();
    let file = setup.warmdock.config_file();
    let file = file.to_str().unwrap();
    let run = |arguments: &[&str]| {
        let command = ["client-config", "git", "--config", file];
        crate::support::warmdock::run(&[&command[..], arguments].concat())
    };
    // Without an address, the one that the service knows itself by.
    let text = run(&["--ssh"]).ok().text();
    assert!(
        text.contains(&format!("[url \"ssh://git@warmdock:0/{HOST}/\"]")),
        "{text}"
    );
    assert_eq!(
        run(&["--ssh", "--url", "http://x"]).failed().status.code(),
        Some(64)
    );
    let address = format!("ssh://git@{}", setup.warmdock.ssh_address());
    let text = run(&["--ssh", "--url", &address]).ok().text();
    let client = setup.client("user");
    let gitconfig = std::fs::read_to_string(client.home().join(".gitconfig")).unwrap();
    client.write_gitconfig(&(gitconfig + &text));
    for (number, url) in [
        format!("https://{HOST}/{SAMPLE}"),
        format!("git@{HOST}:{SAMPLE}.git"),
    ]
    .iter()
    .enumerate()
    {
        client.clone(url, &number.to_string(), &[]).ok();
    }
}
