//! A company's Git host and a service with private crates: one from `ssh://`, one from `https://`, as teams have them.
//!
//! The host is OpenSSH's own server on this machine, and a warmdock in front of it that wants a token. The name
//! `git.corp.example` leads to it in builds only.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use crate::builder::client_config;
use crate::docker::{Build, ROOT, text};
use crate::project::Project;
use crate::support::ssh_door::{Agent, SshDoor};
use crate::support::sshd::Sshd;
use crate::support::warmdock::Builder;
use crate::support::{Repo, Warmdock, temporary_folder, wait_for};

pub const HOST: &str = "git.corp.example";
const TOKEN: &str = "token-PJTqZpT8dQ3wY6Kz";
const COMMENT: &str = "comment-of-the-deploy-key-f2Ls9";

pub struct Corp {
    folder: tempfile::TempDir,
    pub sshd: Sshd,
    pub agent: Agent,
    pub door: SshDoor,
    pub warmdock: Warmdock,
    pub greeting: Repo,
    pub tally: Repo,
    user: String,
}

impl Corp {
    pub fn start() -> Self {
        let folder = temporary_folder();
        let at = |name: &str| folder.path().join(name);
        let greeting = Repo::empty(&at("team/greeting.git"));
        let tally = Repo::empty(&at("team/tally.git"));
        let root = at("");
        let root = root.to_str().unwrap().trim_end_matches('/');
        // As Git hosts do: whatever is asked for is a path below their own folder.
        std::fs::write(
            at("only-git"),
            format!(
                "#!/bin/sh\ncase $SSH_ORIGINAL_COMMAND in\n\"git-upload-pack '\"*) ;;\n*) exit 1 ;;\nesac\n\
                 path=${{SSH_ORIGINAL_COMMAND#*\\'}}\nexec git upload-pack \"{root}${{path%\\'}}\"\n"
            ),
        )
        .unwrap();
        let sshd = Sshd::start_with(&format!(
            "AcceptEnv GIT_PROTOCOL\nForceCommand sh {root}/only-git\n"
        ));
        sshd.keygen("deploy", &["-t", "ed25519", "-C", COMMENT]);
        let keys = ["user", "deploy"].map(|name| format!("{}\n", sshd.public(name)));
        sshd.write("authorized_keys", &keys.concat());
        let agent = Agent::start();
        agent.add(&sshd.path("deploy"));

        std::fs::write(at("token"), TOKEN).unwrap();
        let user = sshd.url(Path::new(""));
        let user = user["ssh://".len()..].split('@').next().unwrap().to_owned();
        let door = SshDoor::new();
        std::fs::copy(sshd.path("deploy.pub"), door.path("authorized_keys")).unwrap();
        let config = json!({
            "listen": { "http": "127.0.0.1:0" },
            "git": { "upstreams": [{
                "host": HOST,
                "url": sshd.url(Path::new("")).trim_end_matches('/'),
                "key_file": sshd.path("user"),
                "known_hosts_file": sshd.known_hosts("ed25519"),
            }], "max_age": "0s" },
            "access": { "anonymous": "none", "tokens": [{ "name": "builds", "token_file": at("token") }] },
        });
        let warmdock = door.open(Builder::of(config));
        let corp = Self {
            folder,
            sshd,
            agent,
            door,
            warmdock,
            greeting,
            tally,
            user,
        };
        corp.publish_greeting("hello from the private crate");
        // Its address is the same in all tests: the folder's name makes a commit that is in no cache. Ports recur.
        let source = format!("pub fn count() -> u32 {{\n    41\n}}\n// {root}\n");
        corp.tally.commit(
            "main",
            &[
                ("Cargo.toml", manifest("tally").as_bytes()),
                ("src/lib.rs", source.as_bytes()),
            ],
        );
        corp
    }

    /// A new commit of the crate `greeting`, under the same version.
    pub fn publish_greeting(&self, text: &str) {
        self.publish_greeting_on("main", text);
    }

    pub fn publish_greeting_on(&self, branch: &str, text: &str) {
        let source = format!("pub fn hello() -> &'static str {{\n    \"{text}\"\n}}\n");
        self.greeting.commit(
            branch,
            &[
                ("Cargo.toml", manifest("greeting").as_bytes()),
                ("src/lib.rs", source.as_bytes()),
            ],
        );
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    fn port(&self) -> String {
        self.sshd.name().rsplit(':').next().unwrap().to_owned()
    }

    /// The service, whose Cargo.lock has the crates as they are now.
    pub fn greeter(&self) -> Project {
        let project = Project::empty("greeter");
        let template = include_str!("service/Cargo.toml.in");
        let manifest = template
            .replace("@USER@", &self.user)
            .replace("@PORT@", &self.port());
        project.write("Cargo.toml", &manifest);
        project.write("src/main.rs", include_str!("service/src/main.rs"));
        self.lock(&project);
        project
    }

    /// Takes the crates as they are now into Cargo.lock.
    pub fn lock(&self, project: &Project) {
        let folder = format!("url.file://{}/.insteadOf", self.folder.path().display());
        let ssh = format!("ssh://{}@{HOST}:{}/", self.user, self.port());
        let https = format!("https://{HOST}/");
        project.lock(&[(&folder, &ssh), (&folder, &https)]);
    }

    /// What the file `known_hosts` of somebody who builds has about the host.
    pub fn known_hosts(&self) -> PathBuf {
        let key = self.sshd.public("host_ed25519");
        self.write("known_hosts", &format!("[{HOST}]:{} {key}\n", self.port()))
    }

    /// A file with the key of another host under this one's name.
    pub fn wrong_known_hosts(&self) -> PathBuf {
        let key = self.sshd.public("user");
        self.write(
            "wrong_known_hosts",
            &format!("[{HOST}]:{} {key}\n", self.port()),
        )
    }

    /// Sends https through warmdock, and SSH past it.
    pub fn gitconfig_for_https(&self) -> PathBuf {
        let address = self.warmdock.address();
        self.write(
            "gitconfig_for_https",
            &format!(
                "[url \"http://{address}/git/{HOST}/\"]\n\tinsteadOf = https://{HOST}/\n\
                 [http \"http://{address}/\"]\n\textraHeader = Authorization: Bearer {TOKEN}\n"
            ),
        )
    }

    /// Sends all of the host through warmdock: what `client-config git --url` says, and a token where one is wanted.
    pub fn gitconfig(&self, url: &str) -> PathBuf {
        // The service knows the host by this machine's address, builders by its name.
        let upstream = format!("ssh://{}@{HOST}:{}", self.user, self.port());
        let config = self.write(
            "client-config.json",
            &json!({ "git": { "upstreams": [{
                "host": HOST, "url": upstream, "known_hosts_file": self.known_hosts(), "key_file": self.sshd.path("user"),
            }] } })
            .to_string(),
        );
        let mut text = client_config("git", &config, url);
        if url.starts_with("http") {
            text +=
                &format!("\n[http \"{url}/\"]\n\textraHeader = Authorization: Bearer {TOKEN}\n");
        }
        self.write("gitconfig", &text)
    }

    /// Waits until the service has mirrors of both crates.
    #[track_caller]
    pub fn warm(&self) {
        for name in ["team/greeting", "team/tally"] {
            let url = format!("http://{}/git/{HOST}/{name}.git", self.warmdock.address());
            let header = format!("http.extraHeader=Authorization: Bearer {TOKEN}");
            let mirror = self
                .warmdock
                .data()
                .join("git")
                .join(HOST)
                .join(format!("{name}.git"));
            wait_for("a mirror", || {
                crate::support::client::git_at(
                    Path::new("/"),
                    &["-c", &header, "ls-remote", &url],
                    b"",
                )
                .ok();
                mirror.join("HEAD").is_file().then_some(())
            });
        }
    }

    /// A build of the service on this machine's network.
    pub fn build(&self, project: &Project) -> Build {
        project.build("Dockerfile.musl").on_this_machine(HOST)
    }

    /// The same straight from the host: the agent, the host's key, and the token for the crate from https.
    pub fn build_directly(&self, project: &Project) -> Build {
        self.build(project)
            .agent(&self.agent.socket())
            .secret("known_hosts", &self.known_hosts())
            .secret("gitconfig", &self.gitconfig_for_https())
    }

    /// A build by the bake file, whose variables name what opens the crates, into the image `greeter:<tag>`.
    pub fn bake(&self, project: &Project, tag: &str) -> Build {
        let network = json!({ "target": { "musl": {
            "network": "host",
            "entitlements": ["network.host"],
            "extra-hosts": { HOST: "127.0.0.1" },
        } } });
        let network = self.write("network.json", &network.to_string());
        Build::bake(&["musl"])
            .option("--file")
            .option(network)
            .option("--allow=network.host")
            .option(format!("--set=*.context={}", project.root().display()))
            .option(format!("--set=*.dockerfile={ROOT}/Dockerfile.musl"))
            .variable("PACKAGE", &project.name)
            .variable("TAG", tag)
    }

    /// The same straight from the host.
    pub fn bake_directly(&self, project: &Project, tag: &str) -> Build {
        self.bake(project, tag)
            .option("--allow=ssh")
            .variable("SSH", "true")
            .variable("SSH_AUTH_SOCK", &self.agent.socket())
            .variable("KNOWN_HOSTS", text(&self.known_hosts()))
            .variable("GITCONFIG", text(&self.gitconfig_for_https()))
    }

    /// For builds that a host refuses: cargo would ask it three times more, with pauses of eleven seconds in all.
    pub fn with_one_retry(&self) -> PathBuf {
        self.write("with_one_retry.toml", "[net]\nretry = 1\n")
    }

    /// What must be nowhere in an image, nor in what is made beside it: by name, the bytes.
    pub fn secrets(&self) -> Vec<(&'static str, Vec<u8>)> {
        let private = std::fs::read_to_string(self.sshd.path("deploy")).unwrap();
        // Lines of the file between head and foot; the first of them are the same in all keys of the kind.
        let lines: Vec<&str> = private
            .lines()
            .filter(|line| !line.starts_with("--"))
            .collect();
        // Its 32 bytes themselves: behind the second name of the kind come the public key and both, with their lengths.
        let decoded = STANDARD
            .decode(lines.concat())
            .expect("a private key is base64");
        let kind = memmem_last(&decoded, b"ssh-ed25519");
        let seed = decoded[kind + 11 + 4 + 32 + 4..][..32].to_vec();
        let host_key = self.sshd.public("host_ed25519");
        vec![
            ("the private key's bytes", seed),
            ("the private key", lines[lines.len() - 2].into()),
            ("the private key's comment", COMMENT.into()),
            ("the token", TOKEN.into()),
            (
                "the line of known_hosts",
                host_key.split(' ').nth(1).unwrap().into(),
            ),
            ("the agent's socket", self.agent.socket().into()),
            (
                "the host's name as known_hosts has it",
                format!("[{HOST}]:").into(),
            ),
        ]
    }
}

fn manifest(name: &str) -> String {
    format!("[package]\nname = \"{name}\"\nversion = \"0.1.0\"\nedition = \"2024\"\n")
}

fn memmem_last(bytes: &[u8], part: &[u8]) -> usize {
    let place = bytes.windows(part.len()).rposition(|window| window == part);
    place.expect("the kind of the key is in it")
}
