//! People who come in over SSH: their keys, and OpenSSH's client as they use it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use super::process::{self, Output};
use super::sshd::{keygen, ssh_keygen};
use super::wait_for;
use super::warmdock::{Builder, Warmdock};

/// The keys of a service's SSH door, on both sides.
pub struct SshDoor {
    folder: tempfile::TempDir,
}

impl SshDoor {
    /// A door for the key `user`, which may read everything.
    pub fn new() -> Self {
        let folder = crate::support::temporary_folder();
        let door = Self { folder };
        door.keygen("user");
        std::fs::copy(door.path("user.pub"), door.path("authorized_keys")).unwrap();
        door
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes a key that the door does not know.
    pub fn keygen(&self, name: &str) -> PathBuf {
        keygen(&self.path(name), &["-t", "ed25519"]);
        self.path(name)
    }

    /// Kind and key of a public key, without its comment.
    pub fn public(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.path(&format!("{name}.pub"))).unwrap();
        text.split_whitespace()
            .take(2)
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// Adds the door to a service. It makes its host key itself.
    pub fn add_to(&self, builder: Builder) -> Builder {
        builder
            .set(
                "/listen/ssh",
                json!({ "address": "127.0.0.1:0", "host_key_file": self.path("host_key") }),
            )
            .set(
                "/access/keys/authorized_keys_file",
                json!(self.path("authorized_keys")),
            )
    }

    /// Starts a service with this door, and tells clients its host key.
    #[track_caller]
    pub fn open(&self, builder: Builder) -> Warmdock {
        self.open_as_it_is(self.add_to(builder))
    }

    /// The same for a service that is configured already.
    #[track_caller]
    pub fn open_as_it_is(&self, builder: Builder) -> Warmdock {
        let warmdock = builder.start();
        self.know(&warmdock);
        warmdock
    }

    /// Tells clients the host key of a service.
    #[track_caller]
    pub fn know(&self, warmdock: &Warmdock) {
        let port = warmdock.ssh_address().port();
        let key = ssh_keygen(&["-y", "-f", self.path("host_key").to_str().unwrap()]).text();
        std::fs::write(
            self.path("known_hosts"),
            format!("[127.0.0.1]:{port} {key}\n"),
        )
        .unwrap();
    }

    /// The command line of a client with one key and nothing of this machine's configuration: for `GIT_SSH_COMMAND`.
    pub fn ssh(&self, key: &str) -> String {
        format!(
            "{} -i {} -o IdentitiesOnly=yes -o IdentityAgent=none",
            self.ssh_without_key(),
            self.path(key).display()
        )
    }

    /// The same for a client that asks its agent.
    pub fn ssh_without_key(&self) -> String {
        format!(
            "ssh -F none -o BatchMode=yes -o StrictHostKeyChecking=yes -o UserKnownHostsFile={} \
             -o GlobalKnownHostsFile=none",
            self.path("known_hosts").display()
        )
    }

    /// OpenSSH's client with the key `key` and further options, without what is to be run.
    pub fn command(&self, warmdock: &Warmdock, key: &str, options: &[&str]) -> Command {
        let line = self.ssh(key);
        let mut words = line.split(' ');
        let mut ssh = Command::new(words.next().unwrap());
        let port = warmdock.ssh_address().port().to_string();
        ssh.args(words).args(options);
        ssh.args(["-p", &port, "git@127.0.0.1"]);
        ssh
    }

    /// Options with which OpenSSH's client has one connection for all commands, and makes it for the first of them.
    pub fn one_connection(&self) -> String {
        let control = self.path("control");
        let control = control.display();
        format!("-oControlMaster=auto -oControlPersist=600 -oControlPath={control}")
    }

    /// Runs OpenSSH's client with the key `key`, further options, and what is to be run.
    #[track_caller]
    pub fn run(
        &self,
        warmdock: &Warmdock,
        key: &str,
        options: &[&str],
        command: &[&str],
    ) -> Output {
        let mut ssh = self.command(warmdock, key, options);
        ssh.args(command);
        process::run(ssh, b"", Duration::from_secs(60))
    }
}

/// An agent of OpenSSH, with a socket of its own.
pub struct Agent {
    process: Child,
    folder: tempfile::TempDir,
}

impl Agent {
    pub fn start() -> Self {
        let folder = crate::support::temporary_folder();
        let mut command = Command::new("ssh-agent");
        command.arg("-D").arg("-a").arg(folder.path().join("agent"));
        let process = command
            .stdout(Stdio::null())
            .spawn()
            .expect("ssh-agent starts");
        let agent = Self { process, folder };
        // The socket's file is there a moment before the agent listens on it.
        wait_for("the agent's socket", || {
            UnixStream::connect(agent.socket()).ok()
        });
        agent
    }

    pub fn socket(&self) -> String {
        self.folder
            .path()
            .join("agent")
            .to_str()
            .unwrap()
            .to_owned()
    }

    pub fn add(&self, key: &Path) {
        let mut command = Command::new("ssh-add");
        command
            .arg("-q")
            .arg(key)
            .env("SSH_AUTH_SOCK", self.socket());
        process::run(command, b"", Duration::from_secs(20)).ok();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
