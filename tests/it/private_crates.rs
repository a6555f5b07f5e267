//! The page `docs/private-crates.md`: everything that it tells to write or to run is tried as it stands there, with the
//! paths, ports and keys of the test in the places of the page's.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::support::process::{self, Output};
use crate::support::ssh_door::{Agent, SshDoor};
use crate::support::sshd::{SshFault, Sshd};
use crate::support::warmdock::Builder;
use crate::support::{Repo, Upstream, Warmdock, http, temporary_folder};

const PAGE: &str = include_str!("../../docs/private-crates.md");

/// In the place of what the page lets OpenSSL invent.
const TOKEN: &str = "token-Yq3LmB7cW9";

/// The blocks of code in one language, in their order.
fn blocks(language: &str) -> Vec<&'static str> {
    let begin = format!("```{language}\n");
    PAGE.split(begin.as_str())
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .collect()
}

struct Setup {
    folder: tempfile::TempDir,
    sshd: Sshd,
    agent: Agent,
    warmdock: Warmdock,
    _door: SshDoor,
    _upstream: Upstream,
}

impl Setup {
    fn new() -> Self {
        let upstream = Upstream::start();
        let leaf = Repo::empty(&upstream.path("team/leaf"));
        let manifest = "[package]\nname = \"leaf\"\nversion = \"1.0.0\"\nedition = \"2021\"\n";
        let commit = leaf.commit(
            "main",
            &[
                ("Cargo.toml", manifest.as_bytes()),
                ("src/lib.rs", b"pub const WHO: &str = \"leaf\";\n"),
            ],
        );
        leaf.git(&["tag", "v1.0", &commit]);
        let (sshd, door, agent) = (Sshd::start(), SshDoor::new(), Agent::start());
        agent.add(&door.path("user"));
        // The home of whoever follows the page.
        let folder = temporary_folder();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at(".ssh")).unwrap();
        std::fs::copy(door.path("user.pub"), at(".ssh/id_ed25519.pub")).unwrap();
        let files = blocks("sh")[0].replace("openssl rand -hex 32", &format!("echo {TOKEN}"));
        shell(folder.path(), &files).ok();
        let git_key = std::fs::read_to_string(at("warmdock/ssh/git_key.pub")).unwrap();
        sshd.write("authorized_keys", &git_key);
        std::fs::copy(sshd.known_hosts("ed25519"), at("warmdock/ssh/known_hosts")).unwrap();
        let mut config = blocks("json")[0].to_owned();
        for (theirs, ours) in [
            ("0.0.0.0:2222", "127.0.0.1:0"),
            ("0.0.0.0:8080", "127.0.0.1:0"),
            (
                "ssh://git@git.corp.example:2222",
                &sshd.url(upstream.root()),
            ),
            ("/run/secrets", text(&at("warmdock"))),
            ("/var/lib/warmdock", text(&at("data"))),
        ] {
            assert!(config.contains(theirs), "the page has no {theirs}");
            config = config.replace(theirs, ours);
        }
        let config: Value = serde_json::from_str(&config).expect("the page's JSON");
        Self {
            warmdock: Builder::of(config).start(),
            folder,
            sshd,
            agent,
            _door: door,
            _upstream: upstream,
        }
    }

    /// Runs cargo in the application as the Dockerfile does, in a home that has what it copies there.
    #[track_caller]
    fn cargo(&self, home: &str, args: &[&str]) -> Output {
        let home = self.folder.path().join(home);
        for line in blocks("dockerfile")[0]
            .lines()
            .filter(|line| line.starts_with("COPY "))
        {
            let words: Vec<&str> = line.split(' ').collect();
            let [_, from, to] = words[..] else {
                panic!("{line}")
            };
            if let Some(to) = to.strip_prefix("/root/") {
                let to = home.join(to);
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(self.folder.path().join(from), to).unwrap();
            }
        }
        let cargo = PathBuf::from(std::env::var_os("CARGO").expect("cargo says where it is"));
        let mut command = Command::new(&cargo);
        command
            .args(args)
            .current_dir(self.folder.path().join("app"))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", &home)
            .env("CARGO_HOME", home.join("cargo"))
            .env("CARGO_BUILD_JOBS", "1")
            .env("SSH_AUTH_SOCK", self.agent.socket());
        let rustc = cargo.with_file_name("rustc");
        if rustc.exists() {
            command.env("RUSTC", rustc);
        }
        process::run(command, b"", Duration::from_secs(120))
    }

    fn write_app(&self) {
        let source = self.folder.path().join("app/src");
        std::fs::create_dir_all(&source).unwrap();
        let manifest = format!(
            "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2021\"\n{}",
            blocks("toml")[0]
        );
        std::fs::write(source.with_file_name("Cargo.toml"), manifest).unwrap();
        std::fs::write(
            source.join("main.rs"),
            "fn main() { println!(\"{}\", leaf::WHO); }\n",
        )
        .unwrap();
    }
}

/// Runs lines of the page in a shell, at home.
#[track_caller]
fn shell(home: &Path, script: &str) -> Output {
    let program = Path::new(env!("CARGO_BIN_EXE_warmdock"));
    let path = std::env::var("PATH").unwrap_or_default();
    let mut shell = Command::new("sh");
    shell
        .args(["-e", "-c", script])
        .current_dir(home)
        .env("HOME", home)
        .env(
            "PATH",
            format!("{}:{path}", program.parent().unwrap().display()),
        );
    process::run(shell, b"", Duration::from_secs(30))
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn the_page_can_be_followed() {
    let setup = Setup::new();
    let port = setup.warmdock.ssh_address().port();
    let in_container =
        "docker compose --project-name warmdock exec warmdock /usr/local/bin/warmdock";
    let here = format!(
        "warmdock --config {}",
        setup.warmdock.config_file().display()
    );
    let script = blocks("sh")[2];
    assert!(script.contains(in_container), "{script}");
    let script = script.replace(in_container, &here);
    shell(
        setup.folder.path(),
        &script.replace(":2222", &format!(":{port}")),
    )
    .ok();

    setup.write_app();
    setup.cargo("root", &["generate-lockfile"]).ok();
    let run = blocks("dockerfile")[0]
        .lines()
        .find_map(|line| line.strip_prefix("RUN --mount=type=ssh,required=true cargo "));
    let arguments: Vec<&str> = run.expect("the RUN line").split(' ').collect();
    setup.cargo("root", &arguments).ok();
    let said = process::run(
        Command::new(setup.folder.path().join("app/target/release/app")),
        b"",
        Duration::from_secs(10),
    );
    assert_eq!(said.ok().text(), "leaf");

    // On another builder, with the upstream away.
    setup.sshd.fail(SshFault::Refuse);
    std::fs::remove_dir_all(setup.folder.path().join("app/target")).unwrap();
    setup.cargo("another", &arguments).ok();
}

/// Who has not made the host key beforehand finds its public half in the log.
#[test]
fn the_log_has_the_line_for_known_hosts() {
    let setup = Setup::new();
    let public = setup.folder.path().join("warmdock/ssh/ssh_host_key.pub");
    let public = std::fs::read_to_string(public).unwrap();
    let (kind_and_key, _comment) = public.rsplit_once(' ').unwrap();
    setup.warmdock.wait_log("the host key", |event| {
        let line = event["public_key"].as_str();
        line.is_some_and(|line| line.starts_with(kind_and_key))
    });
}

#[test]
fn crates_want_the_page_s_token() {
    let setup = Setup::new();
    let get = |path: &str, headers: &[(&str, &str)]| {
        http::request(setup.warmdock.address(), "GET", path, headers, b"")
    };
    let bearer = format!("Bearer {TOKEN}");
    for path in [
        "/api/v1/client-config/cargo",
        "/crates/crates.io/config.json",
    ] {
        assert_eq!(get(path, &[]).status, 401, "{path}");
        let answer = get(path, &[("Authorization", &bearer)]);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
    }
}

#[test]
fn the_page_s_authority_can_be_configured() {
    let setup = Setup::new();
    let mut config = setup.warmdock.config();
    let authority: Value = serde_json::from_str(blocks("json")[1]).expect("the page's JSON");
    config["access"]["keys"]["authorities"] = Value::Array(vec![authority]);
    setup.warmdock.write_config(&config.to_string());
    let checked =
        crate::support::warmdock::run(&["check", "--config", text(&setup.warmdock.config_file())]);
    assert!(checked.ok().text().contains("\"builds\""));
}
