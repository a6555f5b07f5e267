//! `docker compose up`, as the README says it: ready, locked down, lasting, and clear about a wrong configuration.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use crate::docker;
use crate::support::process::{self, Output};
use crate::support::ssh_door::SshDoor;
use crate::support::{Client, Repo, temporary_folder, wait_for};

/// The compose file's service in a project of its own, with repositories in a folder as its upstream.
pub struct Compose {
    name: String,
    variant: &'static str,
    /// Further compose files, of the checkout or a test's own.
    files: Vec<PathBuf>,
    environment: Vec<(&'static str, String)>,
    folder: tempfile::TempDir,
    pub config: PathBuf,
}

impl Compose {
    pub fn new(variant: &'static str) -> Self {
        let folder = temporary_folder();
        let unique = folder.path().file_name().unwrap().to_str().unwrap();
        let name = unique.to_lowercase();
        let config = folder.path().join("app_config.json");
        let mut compose = Self {
            name,
            variant,
            files: Vec::new(),
            environment: Vec::new(),
            config,
            folder,
        };
        let config = json!({
            "listen": { "http": "0.0.0.0:8080" },
            "data_dir": "/var/lib/warmdock",
            "git": { "upstreams": [{ "host": "git.example.test", "url": "file:///upstream" }], "warm": ["git.example.test/team/sample"] },
            "access": { "anonymous": "read" },
        });
        std::fs::write(&compose.config, config.to_string()).unwrap();
        Repo::sample(&compose.upstream().join("team/sample.git"), 1);
        // Where the upstream is in the container.
        let volumes = [read_only(&compose.upstream(), "/upstream")];
        compose.add(
            "upstream",
            &json!({ "services": { "warmdock": { "volumes": volumes } } }),
        );
        compose
    }

    /// A compose file of a test's own, after all others.
    pub fn add(&mut self, name: &str, content: &Value) {
        let file = self.folder.path().join(format!("{name}.json"));
        std::fs::write(&file, content.to_string()).unwrap();
        self.files.push(file);
    }

    /// A compose file of the checkout.
    pub fn add_from_checkout(&mut self, name: &str) {
        self.files.push(Path::new(docker::ROOT).join(name));
    }

    /// A variable that compose files ask for.
    pub fn set(&mut self, name: &'static str, value: &str) {
        self.environment.push((name, value.to_owned()));
    }

    /// Adds crates.io to the configuration, and lets the container trust whom this machine trusts: where a site looks into
    /// TLS, its own authority.
    pub fn with_crates_io(mut self) -> Self {
        let trusted = std::env::var("SSL_CERT_FILE");
        let trusted = trusted.unwrap_or_else(|_| "/etc/ssl/certs/ca-certificates.crt".to_owned());
        let service = json!({
            "volumes": [read_only(Path::new(&trusted), "/site-ca.crt")],
            "environment": { "SSL_CERT_FILE": "/site-ca.crt" },
        });
        self.add("site-ca", &json!({ "services": { "warmdock": service } }));
        self.configure("crates", json!({ "registries": [{ "name": "crates.io" }] }));
        self
    }

    fn configure(&self, key: &str, value: Value) {
        let mut config: Value =
            serde_json::from_slice(&std::fs::read(&self.config).unwrap()).unwrap();
        config[key] = value;
        std::fs::write(&self.config, config.to_string()).unwrap();
    }

    pub fn upstream(&self) -> PathBuf {
        self.folder.path().join("upstream")
    }

    /// What the SSH door needs, as deploy/compose.ssh.yml mounts it.
    fn ssh_files(&self) -> PathBuf {
        self.folder.path().join("ssh")
    }

    /// Opens the SSH door to the key `user` of `door`.
    fn with_ssh(mut self, door: &SshDoor) -> Self {
        door.keygen("ssh_host_key");
        std::fs::create_dir(self.ssh_files()).unwrap();
        for name in ["ssh_host_key", "authorized_keys"] {
            let file = self.ssh_files().join(name);
            std::fs::copy(door.path(name), &file).unwrap();
            // Not everybody who runs this can give files to user 65532.
            std::fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
        }
        let ssh = json!({
            "address": "0.0.0.0:2222",
            "host_key_file": "/run/secrets/ssh/ssh_host_key",
        });
        self.configure("listen", json!({ "http": "0.0.0.0:8080", "ssh": ssh }));
        let keys = json!({ "authorized_keys_file": "/run/secrets/ssh/authorized_keys" });
        self.configure("access", json!({ "anonymous": "read", "keys": keys }));
        self.add_from_checkout("deploy/compose.ssh.yml");
        self
    }

    /// As in contents.rs: Debian's image is here for its shape.
    fn profile(&self) -> &'static str {
        match self.variant {
            "debian" => "quick",
            _ => "release",
        }
    }

    /// Runs `docker compose` for this project.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = docker::command(&["compose", "--project-name", &self.name]);
        command
            .args(["--progress=plain", "--file=docker-compose.yml"])
            .args(
                self.files
                    .iter()
                    .map(|file| format!("--file={}", file.display())),
            )
            .args(args)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("VARIANT", self.variant)
            .env("PROFILE", self.profile())
            .env("CONFIG", &self.config)
            .env("PORT", "0")
            .env("SSH_FILES", self.ssh_files())
            .env("SSH_PORT", "0");
        process::run(command, b"", Duration::from_secs(25 * 60))
    }

    #[track_caller]
    pub fn up(&self) {
        self.run(&["up", "--detach", "--wait"]).ok();
    }

    /// The container's id.
    #[track_caller]
    fn id(&self) -> String {
        self.run(&["ps", "--all", "--quiet", "warmdock"])
            .ok()
            .text()
    }

    #[track_caller]
    fn inspect(&self) -> Value {
        let text = docker::run(&["inspect", &self.id()]).ok().text();
        let list: Value = serde_json::from_str(&text).unwrap();
        list[0].clone()
    }

    /// The address on this machine of a port in the container.
    #[track_caller]
    pub fn address(&self, port: &str) -> String {
        let address = self.run(&["port", "warmdock", port]).ok().text();
        assert!(
            address.starts_with("127.0.0.1:"),
            "{address}: only for this machine"
        );
        address
    }

    /// Where the sample repository is for clients.
    #[track_caller]
    fn url(&self) -> String {
        let address = self.address("8080");
        format!("http://{address}/git/git.example.test/team/sample.git")
    }

    /// Clones and compares with the upstream.
    #[track_caller]
    fn clone(&self, tip: &str) {
        let client = Client::new(2);
        client.clone(&self.url(), "clone", &[]).ok();
        assert_eq!(
            client.git_in("clone", &["rev-parse", "HEAD"]).ok().text(),
            tip
        );
    }

    /// How the container ended, once Docker has given up starting it again.
    #[track_caller]
    fn exit_code(&self) -> Value {
        wait_for("the container to stay ended", || {
            let state = self.inspect()["State"].clone();
            (state["Status"] == "exited").then(|| state["ExitCode"].clone())
        })
    }

    pub fn logs(&self) -> String {
        let output = self.run(&["logs", "--no-log-prefix"]);
        format!("{}{}", output.text(), output.stderr)
    }

    /// Expects that the container does not come up; gives what it or compose said.
    #[track_caller]
    fn refuses(&self) -> String {
        let failed = self.run(&["up", "--detach", "--wait"]).failed();
        format!("{}{}", failed.stderr, self.logs())
    }
}

impl Drop for Compose {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of compose\n{}", self.logs());
        }
        self.run(&["down", "--volumes", "--timeout=0"]);
    }
}

fn read_only(source: &Path, target: &str) -> Value {
    json!({ "type": "bind", "source": source, "target": target, "read_only": true })
}

fn tip(upstream: &Path) -> String {
    Repo::at(&upstream.join("team/sample.git")).id("main")
}

/// A value of `/proc/<pid>/status`.
#[track_caller]
fn status(pid: &Value, key: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(":"));
    line.expect(key)
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

#[test]
fn serves_locked_down_and_stops_at_once() {
    let compose = Compose::new("musl");
    compose.up();
    compose.clone(&tip(&compose.upstream()));

    let container = compose.inspect();
    assert_eq!(container["State"]["Health"]["Status"], "healthy");
    let pid = &container["State"]["Pid"];
    assert_eq!(status(pid, "Uid"), "65532 65532 65532 65532");
    assert_eq!(status(pid, "Gid"), "65532 65532 65532 65532");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    let host = &container["HostConfig"];
    assert_eq!(host["ReadonlyRootfs"], true);
    assert_eq!(host["Privileged"], false);
    for limit in ["Memory", "PidsLimit", "NanoCpus"] {
        assert!(
            host[limit].as_i64().unwrap_or_default() > 0,
            "no limit {limit}"
        );
    }
    let mounts = container["Mounts"].as_array().unwrap();
    for mount in mounts {
        let data = mount["Destination"] == "/var/lib/warmdock";
        assert_eq!(mount["RW"] == true, data, "{mount}");
    }
    for secret in ["github_token", "ci_token"] {
        let place = format!("/run/secrets/{secret}");
        assert!(
            mounts.iter().any(|mount| mount["Destination"] == *place),
            "no {place}"
        );
    }
    assert_eq!(container["Config"]["StopTimeout"], 75);
    assert_eq!(
        host["RestartPolicy"],
        json!({ "Name": "on-failure", "MaximumRetryCount": 5 })
    );

    // The limit is a promise: nobody waits for ten seconds because PID 1 knows no SIGTERM. Both times are Docker's own: when
    // it had sent the signal, and when the process had ended.
    let id = compose.id();
    docker::run(&["kill", "--signal=TERM", &id]).ok();
    assert_eq!(docker::run(&["wait", &id]).ok().text(), "0");
    let events = [
        "events",
        "--since=10m",
        "--until=0s",
        "--filter=event=kill",
        "--format={{.TimeNano}}",
        "--filter",
    ];
    let killed = wait_for("Docker's word about the signal", || {
        let said = docker::run(&[&events[..], &[&format!("container={id}")]].concat());
        said.ok().text().parse::<u64>().ok()
    });
    let mut date = Command::new("date");
    let finished = compose.inspect()["State"]["FinishedAt"].clone();
    date.args(["+%s%N", "--date", finished.as_str().unwrap()]);
    let ended = process::run(date, b"", Duration::from_secs(10)).ok().text();
    let ended: u64 = ended.parse().unwrap();
    let took = Duration::from_nanos(ended.saturating_sub(killed));
    eprintln!("stopped {took:?} after SIGTERM");
    assert!(took < Duration::from_secs(1), "took {took:?} to stop");
}

#[test]
fn restarts_with_its_data() {
    let compose = Compose::new("musl");
    compose.up();
    let tip = tip(&compose.upstream());
    compose.clone(&tip);
    // The mirror is made beside the first clone.
    wait_for("the mirror", || {
        compose.logs().contains("fetched").then_some(())
    });
    std::fs::rename(
        compose.upstream().join("team"),
        compose.upstream().join("gone"),
    )
    .unwrap();
    compose.run(&["restart"]).ok();
    compose.up();
    compose.clone(&tip);
    // Another container with the same volume.
    compose.run(&["down"]).ok();
    compose.up();
    compose.clone(&tip);
}

#[test]
fn refuses_a_configuration_that_is_a_folder() {
    let compose = Compose::new("musl");
    std::fs::remove_file(&compose.config).unwrap();
    std::fs::create_dir(&compose.config).unwrap();
    let said = compose.refuses();
    assert!(said.contains("/config/app_config.json"), "{said}");
    assert!(said.contains("folder"), "{said}");
    assert_eq!(compose.exit_code(), 78);
}

#[test]
fn refuses_a_configuration_that_is_missing() {
    let compose = Compose::new("musl");
    std::fs::remove_file(&compose.config).unwrap();
    let said = compose.refuses();
    assert!(said.contains("bind source path does not exist"), "{said}");
    assert!(said.contains(compose.config.to_str().unwrap()), "{said}");
    assert!(!compose.config.exists(), "nobody makes a folder of it");
}

#[test]
fn refuses_a_configuration_that_is_wrong() {
    let compose = Compose::new("musl");
    std::fs::write(&compose.config, r#"{"listen": {"htpp": "0.0.0.0:8080"}}"#).unwrap();
    let said = compose.refuses();
    assert!(said.contains("listen"), "{said}");
    assert!(said.contains("htpp"), "{said}");
    assert_eq!(compose.exit_code(), 78);
}

#[test]
fn the_debian_image_by_one_variable() {
    let compose = Compose::new("debian");
    compose.up();
    compose.clone(&tip(&compose.upstream()));
    let container = compose.inspect();
    assert_eq!(container["Config"]["Image"], "warmdock:debian");
    assert_eq!(
        status(&container["State"]["Pid"], "Uid"),
        "65532 65532 65532 65532"
    );
}

#[test]
fn the_ssh_door_by_a_second_file() {
    let door = SshDoor::new();
    let compose = Compose::new("musl").with_ssh(&door);
    compose.up();
    let (address, host_key) = (compose.address("2222"), door.public("ssh_host_key"));
    let port = address.rsplit(':').next().unwrap();
    let known = format!("[127.0.0.1]:{port} {host_key}\n");
    std::fs::write(door.path("known_hosts"), known).unwrap();
    assert!(compose.logs().contains(&host_key), "{}", compose.logs());
    let mut client = Client::new(2);
    client.set("GIT_SSH_COMMAND", &door.ssh("user"));
    let url = format!("ssh://git@{address}/git.example.test/team/sample.git");
    client.clone(&url, "clone", &["--bare"]).ok();

    // As an editor writes it: a new file in the place of the old one.
    let keys = compose.ssh_files().join("authorized_keys");
    let new = keys.with_extension("new");
    std::fs::write(&new, "").unwrap();
    std::fs::rename(new, keys).unwrap();
    wait_for("the key to be refused", || {
        let output = client.git(&["ls-remote", &url]);
        (!output.status.success()).then_some(())
    });
}
