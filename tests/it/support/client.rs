//! The git command line as a client, apart from whoever's machine this is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::process::{self, Output};

/// Longer than any single git command takes here, also on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A person's machine: a home folder with a `.gitconfig`, and a folder to clone into.
pub struct Client {
    folder: tempfile::TempDir,
    environment: Vec<(String, String)>,
}

impl Client {
    /// A client that speaks the given protocol version and checks every object that it receives.
    pub fn new(protocol: u8) -> Self {
        let client = Self {
            folder: crate::support::temporary_folder(),
            environment: Vec::new(),
        };
        std::fs::create_dir(client.home()).unwrap();
        client.write_gitconfig(&format!(
            "[protocol]\n\tversion = {protocol}\n[transfer]\n\tfsckObjects = true\n\
             [user]\n\tname = Somebody\n\temail = somebody@example.test\n[init]\n\tdefaultBranch = main\n\
             [gc]\n\tauto = 0\n[maintenance]\n\tauto = false\n[advice]\n\tdetachedHead = false\n"
        ));
        client
    }

    /// Sets a variable for every command.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    /// A path in this client's folder.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write_gitconfig(&self, text: &str) {
        std::fs::write(self.home().join(".gitconfig"), text).unwrap();
    }

    /// A git command in this client's folder, not yet run.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = git_command(&self.home());
        command.current_dir(self.folder.path()).args(args);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs git in this client's folder.
    #[track_caller]
    pub fn git(&self, args: &[&str]) -> Output {
        process::run(self.command(args), b"", LIMIT)
    }

    /// Runs git in a repository of this client.
    #[track_caller]
    pub fn git_in(&self, repo: &str, args: &[&str]) -> Output {
        let mut command = self.command(args);
        command.current_dir(self.path(repo));
        process::run(command, b"", LIMIT)
    }

    /// Clones `url` to `into`, with further arguments.
    #[track_caller]
    pub fn clone(&self, url: &str, into: &str, args: &[&str]) -> Output {
        self.git(&[&["clone", "--quiet"], args, &[url, into]].concat())
    }
}

/// git with nothing of this machine's configuration, and no way to ask a person anything.
pub fn git_command(home: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", home)
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0");
    command
}

/// Runs git on a repository by its path, as its administrator would.
#[track_caller]
pub fn git_at(repo: &Path, args: &[&str], stdin: &[u8]) -> Output {
    let mut command = git_command(Path::new("/nonexistent"));
    command.arg("-C").arg(repo).args(args);
    process::run(command, stdin, LIMIT)
}
