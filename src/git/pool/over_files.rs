//! For tests: a pool whose upstream is a folder of repositories, made by stock git.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Entry, Found, Pool};
use crate::config::Config;
use crate::config::environment::Environment;
use crate::git::name::RepoName;
use crate::ops::metrics::Metrics;

/// The folder of repositories, and that of the pool.
pub struct OverFiles {
    folder: tempfile::TempDir,
    config: Value,
}

impl OverFiles {
    /// With repositories at these paths, of one commit each.
    pub fn new(paths: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let upstreams = folder.path().join("upstreams");
        let over = Self {
            config: json!({
                "data_dir": folder.path().join("data"),
                "git": {
                    "upstreams": [{ "host": "git.test", "url": format!("file://{}", upstreams.display()) }],
                    "max_age": "0s",
                    "refresh": "1h",
                },
            }),
            folder,
        };
        for path in paths {
            let repo = over.repo(path);
            fs::create_dir_all(&repo).unwrap();
            git_at(&repo, &["init", "--quiet", "--initial-branch=main"]);
            // Most of a pack, and not to be compressed.
            let mut noise = vec![0; 64 << 10];
            aws_lc_rs::rand::fill(&mut noise).unwrap();
            fs::write(repo.join("noise"), noise).unwrap();
            over.commit(path, "first");
        }
        over
    }

    /// Sets a key of `git`.
    pub fn set(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.config["git"][key] = value.into();
        self
    }

    /// Commits a file with its own name as content.
    pub fn commit(&self, path: &str, file: &str) {
        let repo = self.repo(path);
        fs::write(repo.join(file), file).unwrap();
        git_at(&repo, &["add", "."]);
        git_at(&repo, &["commit", "--quiet", "--message", file]);
    }

    /// A pool as after a start.
    pub fn start(&self) -> Arc<Pool> {
        let config = Config::parse(&self.config.to_string(), &Environment::default()).unwrap();
        let (sender, config) = watch::channel(Arc::new(config));
        // Nobody reloads it.
        std::mem::forget(sender);
        Pool::start(config, Arc::new(Metrics::new())).unwrap()
    }

    /// The mirror of a repository as it is upstream now.
    pub async fn mirrored(&self, pool: &Arc<Pool>, path: &str) -> Arc<Entry> {
        match pool.fresh(&name(path)).await.unwrap() {
            Found::Mirror(entry, _) => entry,
            Found::Cold(cold) => {
                let flight = pool.first_clone(&cold).unwrap();
                flight.wait().await.unwrap();
                cold.entry
            }
        }
    }

    fn repo(&self, path: &str) -> std::path::PathBuf {
        self.folder.path().join("upstreams").join(path)
    }
}

/// The name of the repository at `path`.
pub fn name(path: &str) -> RepoName {
    RepoName::parse(&format!("git.test/{path}")).unwrap()
}

/// Asks `probe` until it says yes.
///
/// # Panics
/// After a minute, naming `what`.
pub async fn wait_for(what: &str, mut probe: impl FnMut() -> bool) {
    let waiting = async {
        while !probe() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(60), waiting).await;
    assert!(waited.is_ok(), "waited in vain for {what}");
}

/// What git says, in `folder`.
pub fn git_at(folder: &Path, args: &[&str]) -> String {
    let identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"];
    let mut command = Command::new("git");
    command.args(identity).args(args).current_dir(folder);
    // Nothing of the machine's, nor of a hook's that runs this.
    for name in ["GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"] {
        command.env_remove(name);
    }
    command
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1");
    let output = command.output().expect("git, which the tests need");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "git {args:?}: {error}");
    String::from_utf8(output.stdout)
        .unwrap()
        .trim_end()
        .to_owned()
}
