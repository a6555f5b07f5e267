//! cargo as a client: with the libgit2 that is built into it, with git2-curl, and with the git command line; over HTTP
//! and, with the key in an agent, over SSH.
//!
//! The crates say `https://git.example.test/…`; a `.gitconfig` sends cargo to the service. Nothing is built twice and
//! no registry is asked: the crates depend on nothing else.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::support::process::{self, Output};
use crate::support::ssh_door::{Agent, SshDoor};
use crate::support::warmdock::Builder;
use crate::support::{Client, Fault, HOST, Repo, Upstream, Warmdock, warmdock};

/// A crate `leaf` that says which commit it was built from.
struct Setup {
    upstream: Upstream,
    leaf: Repo,
    /// The commit that the dependency by `rev` names.
    rev: String,
    warmdock: Warmdock,
    client: Client,
    /// For cargo itself, which has its own environment.
    environment: Vec<(&'static str, String)>,
}

const CARGO_TOML: &[u8] = b"[package]\nname = \"leaf\"\nversion = \"0.1.0\"\nedition = \"2021\"\n";

fn source(who: &str) -> Vec<u8> {
    format!("pub const WHO: &str = \"{who}\";\n").into_bytes()
}

fn setup(over_http: bool) -> Setup {
    setup_with(over_http, Builder::start)
}

fn setup_with(over_http: bool, open: impl FnOnce(Builder) -> Warmdock) -> Setup {
    let upstream = Upstream::start();
    let leaf = Repo::empty(&upstream.path("team/leaf"));
    let commit = |branch: &str, who: &str| {
        leaf.commit(
            branch,
            &[("Cargo.toml", CARGO_TOML), ("src/lib.rs", &source(who))],
        )
    };
    let rev = commit("trunk", "rev");
    let tag = commit("trunk", "tag");
    leaf.git(&["tag", "-a", "-m", "1.0", "v1.0", &tag]);
    leaf.git(&["branch", "stable", &rev]);
    commit("stable", "branch");
    commit("trunk", "default");
    leaf.git(&["symbolic-ref", "HEAD", "refs/heads/trunk"]);
    let url = if over_http {
        upstream.url()
    } else {
        upstream.file_url()
    };
    let warmdock = open(warmdock::builder(&url));
    let client = Client::new(2);
    client.write_gitconfig(&format!(
        "[url \"http://{}/git/{HOST}/\"]\n\tinsteadOf = https://{HOST}/\n[url \"http://{0}/git/github.com/\"]\n\tinsteadOf = https://github.com/\n",
        warmdock.address()
    ));
    Setup {
        upstream,
        leaf,
        rev,
        warmdock,
        client,
        environment: Vec::new(),
    }
}

/// The same through the SSH door, with the key in an agent as BuildKit forwards one.
fn setup_over_ssh() -> (Setup, SshDoor, Agent) {
    let (door, agent) = (SshDoor::new(), Agent::start());
    agent.add(&door.path("user"));
    let mut setup = setup_with(false, |builder| {
        door.open(builder.set("/access/anonymous", "none"))
    });
    let address = setup.warmdock.ssh_address();
    setup.client.write_gitconfig(&format!(
        "[url \"ssh://git@{address}/{HOST}/\"]\n\tinsteadOf = https://{HOST}/\n"
    ));
    let known_hosts = setup.client.home().join(".ssh");
    std::fs::create_dir_all(&known_hosts).unwrap();
    // cargo looks for the host under the port of the address in Cargo.toml, which is another.
    let line = std::fs::read_to_string(door.path("known_hosts")).unwrap();
    let (name, key) = line.split_once(' ').unwrap();
    let line = format!("{name},{} {key}", address.ip());
    std::fs::write(known_hosts.join("known_hosts"), line).unwrap();
    setup.environment = vec![
        ("SSH_AUTH_SOCK", agent.socket()),
        // ssh looks for the file in the home of the account, whatever HOME says.
        ("GIT_SSH_COMMAND", door.ssh_without_key()),
    ];
    (setup, door, agent)
}

impl Setup {
    /// Writes the crate `app` that depends on `leaf` in every way.
    fn write_app(&self) {
        let url = format!("https://{HOST}/team/leaf.git");
        self.write_app_with(&[
            ("by_branch", format!("git = \"{url}\", branch = \"stable\"")),
            ("by_tag", format!("git = \"{url}\", tag = \"v1.0\"")),
            ("by_rev", format!("git = \"{url}\", rev = \"{}\"", self.rev)),
            ("by_default", format!("git = \"{url}\"")),
        ]);
    }

    fn write_app_with(&self, dependencies: &[(&str, String)]) {
        let mut manifest =
            "[package]\nname = \"app\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[dependencies]\n"
                .to_owned();
        let mut main = "fn main() {\n".to_owned();
        for (name, keys) in dependencies {
            manifest += &format!("{name} = {{ package = \"leaf\", {keys} }}\n");
            main += &format!("    println!(\"{name} {{}}\", {name}::WHO);\n");
        }
        let app = self.client.path("app");
        std::fs::create_dir_all(app.join("src")).unwrap();
        std::fs::write(app.join("Cargo.toml"), manifest).unwrap();
        std::fs::write(app.join("src/main.rs"), main + "}\n").unwrap();
    }

    /// Runs cargo in `app` with a cargo home of its own that has this `config.toml`.
    fn cargo(&self, home: &str, config: &str, args: &[&str]) -> Output {
        let home = self.client.path(home);
        std::fs::create_dir_all(&home).unwrap();
        std::fs::write(home.join("config.toml"), config).unwrap();
        let cargo = PathBuf::from(std::env::var_os("CARGO").expect("cargo says where it is"));
        let rustc = cargo.with_file_name("rustc");
        let mut command = Command::new(&cargo);
        command
            .args(args)
            .current_dir(self.client.path("app"))
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.client.home())
            .env("CARGO_HOME", &home)
            .env("CARGO_TARGET_DIR", self.client.path("target"))
            .env("CARGO_BUILD_JOBS", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        // A toolchain's folder has both; without rustup there is one of each on the path.
        if rustc.exists() {
            command.env("RUSTC", rustc);
        }
        process::run(command, b"", Duration::from_secs(120))
    }

    #[track_caller]
    fn build_and_run(&self, home: &str, config: &str) {
        self.cargo(home, config, &["build", "--quiet"]).ok();
        let program = self.client.path("target").join("debug/app");
        let said = process::run(Command::new(program), b"", Duration::from_secs(10))
            .ok()
            .text();
        assert_eq!(
            said,
            "by_branch branch\nby_tag tag\nby_rev rev\nby_default default"
        );
    }
}

#[test]
fn libgit2_builds_by_branch_tag_rev_and_default() {
    let setup = setup(false);
    setup.write_app();
    setup.build_and_run("cargo-home", "");
}

#[test]
fn libgit2_over_a_cold_http_upstream() {
    let setup = setup(true);
    setup.write_app();
    setup.build_and_run("cargo-home", "");
}

/// Any setting in `[http]` makes cargo use git2-curl, which sends a Host header without the port.
#[test]
fn git2_curl_builds_by_branch_tag_rev_and_default() {
    let setup = setup(false);
    setup.write_app();
    setup.build_and_run(
        "cargo-home",
        "[http]\ntimeout = 60\nuser-agent = \"somebody\"\n",
    );
}

#[test]
fn git_command_line_builds_by_branch_tag_rev_and_default() {
    let setup = setup(false);
    setup.write_app();
    setup.build_and_run("cargo-home", "[net]\ngit-fetch-with-cli = true\n");
}

#[test]
fn libgit2_through_the_ssh_door() {
    let (setup, _door, _agent) = setup_over_ssh();
    setup.write_app();
    setup.build_and_run("cargo-home", "");
}

#[test]
fn git_command_line_through_the_ssh_door() {
    let (setup, _door, _agent) = setup_over_ssh();
    setup.write_app();
    setup.build_and_run("cargo-home", "[net]\ngit-fetch-with-cli = true\n");
}

/// What a build with a lock file does on a machine that never saw the crates, while the upstream is away.
#[test]
fn locked_build_needs_no_upstream() {
    let setup = setup(true);
    setup.write_app();
    setup.build_and_run("first-home", "");
    setup.warmdock.wait_mirrored("team/leaf", &setup.leaf);
    setup.upstream.fail(Fault::CutOff);
    for (home, config) in [
        ("second-home", ""),
        ("third-home", "[net]\ngit-fetch-with-cli = true\n"),
    ] {
        std::fs::remove_dir_all(setup.client.path("target")).unwrap();
        setup
            .cargo(home, config, &["build", "--quiet", "--locked"])
            .ok();
    }
}

#[test]
fn update_follows_new_commits() {
    let setup = setup(false);
    setup.write_app();
    setup.build_and_run("cargo-home", "");
    for (branch, who) in [("trunk", "newer default"), ("stable", "newer branch")] {
        setup.leaf.commit(branch, &[("src/lib.rs", &source(who))]);
    }
    setup.cargo("cargo-home", "", &["update", "--quiet"]).ok();
    setup.cargo("cargo-home", "", &["build", "--quiet"]).ok();
    let program = setup.client.path("target").join("debug/app");
    let said = process::run(Command::new(program), b"", Duration::from_secs(10))
        .ok()
        .text();
    assert_eq!(
        said,
        "by_branch newer branch\nby_tag tag\nby_rev rev\nby_default newer default"
    );
}

/// For this host alone cargo asks for one commit by its id: `+SHA:refs/commit/SHA`, over protocol v0. The host itself
/// is never asked: the rev is a whole id, and fetching goes through `insteadOf`.
#[test]
fn one_commit_of_github_by_its_id() {
    let setup = setup(false);
    let mut config = setup.warmdock.config();
    let upstream = config["git"]["upstreams"][0].clone();
    config["git"]["upstreams"]
        .as_array_mut()
        .unwrap()
        .push(upstream);
    config["git"]["upstreams"][1]["host"] = "github.com".into();
    setup.warmdock.write_config(&config.to_string());
    let Setup { warmdock, .. } = &setup;
    warmdock.signal("HUP");
    crate::support::wait_for("the new upstream", || {
        let target = "/git/github.com/team/leaf.git/info/refs?service=git-upload-pack";
        (crate::support::http::get(warmdock.address(), target).status == 200).then_some(())
    });
    let url = "https://github.com/team/leaf";
    setup.write_app_with(&[(
        "by_rev",
        format!("git = \"{url}\", rev = \"{}\"", setup.rev),
    )]);
    for (home, config) in [
        ("home-1", ""),
        ("home-2", "[net]\ngit-fetch-with-cli = true\n"),
    ] {
        let _ = std::fs::remove_dir_all(setup.client.path("target"));
        let _ = std::fs::remove_file(setup.client.path("app/Cargo.lock"));
        setup.cargo(home, config, &["build", "--quiet"]).ok();
        let program = setup.client.path("target").join("debug/app");
        assert_eq!(
            process::run(Command::new(program), b"", Duration::from_secs(10))
                .ok()
                .text(),
            "by_rev rev"
        );
    }
}
