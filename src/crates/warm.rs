//! Crates of lock files, fetched before anybody asks: so that the first build is warm as well.

use std::collections::HashMap;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{StreamExt, iter};

use super::cargo_lock::{Locked, locked, without_checksum};
use super::download::{Opened, on_disk};
use super::index::Terms;
use super::name::{CrateFile, CrateName};
use super::{Crates, Registry};
use crate::blobs::{BlobId, Digest};
use crate::config::lock_file::LockFile;
use crate::config::{CRATES_IO, Config, WhenUpstreamFails};
use crate::git::file_at::file_at;
use crate::git::pool::{Found, Pool};

/// Crates that are fetched at once. Builds that run meanwhile come first: they have places of their own.
const AT_ONCE: usize = 8;
/// How often it is looked whether a lock file has changed.
const LOOK: Duration = Duration::from_secs(10);
/// How long what could not be fetched is left alone, twice as long after the next time, and so on. A registry that was
/// away for a moment is back soon, and a crate that was removed never comes.
const FIRST_PAUSE: Duration = LOOK;
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// In bytes. The largest lock files have some 10,000 lines.
const MOST_LOCK_FILE: u64 = 16 << 20;

/// Keeps the crates of `crates.warm` here, until the service stops.
pub async fn keep_warm(crates: Arc<Crates>, pool: Arc<Pool>) {
    let mut known: HashMap<String, Warming> = HashMap::new();
    // Why not, of those that could not be read when they were last looked at.
    let mut unreadable: HashMap<String, String> = HashMap::new();
    loop {
        let config = crates.config.borrow().clone();
        for lock_file in &config.crates.warm {
            let shown = shown(lock_file);
            let text = match read(&pool, lock_file).await {
                Ok(text) => {
                    unreadable.remove(&shown);
                    text
                }
                Err(error) => {
                    let error = error.to_string();
                    if unreadable.get(&shown) != Some(&error) {
                        tracing::warn!(lock_file = shown, error, "a lock file cannot be read");
                        unreadable.insert(shown, error);
                    }
                    continue;
                }
            };
            let Some(text) = text else {
                tracing::debug!(lock_file = shown, "not there yet");
                continue;
            };
            let digest = Digest::of(text.as_bytes());
            let mut warming = match known.remove(&shown) {
                Some(warming) if warming.digest == digest => warming,
                _ => {
                    let crates = without_checksum(&text);
                    if crates > 0 {
                        tracing::warn!(
                            lock_file = shown,
                            crates,
                            "crates of a lock file have no checksum with them, as in files of version 1: they are not fetched"
                        );
                    }
                    Warming::new(digest, &text)
                }
            };
            if warming.is_due(Instant::now()) {
                let failed = warm(&crates, &config, &shown, warming.left.clone()).await;
                warming.tried(failed, Instant::now());
            }
            known.insert(shown, warming);
        }
        // A mirror that is being made is looked for often, it may be there at any moment.
        tokio::time::sleep(LOOK).await;
    }
}

/// How far the crates of a lock file are.
struct Warming {
    /// Of the lock file.
    digest: Digest,
    /// What has not been here yet. What is evicted later is not fetched again and again.
    left: Vec<Locked>,
    pause: Duration,
    /// When to fetch that, if there is any.
    due: Option<Instant>,
}

impl Warming {
    fn new(digest: Digest, text: &str) -> Self {
        Self {
            digest,
            left: locked(text),
            pause: Duration::ZERO,
            due: Some(Instant::now()),
        }
    }

    fn is_due(&self, now: Instant) -> bool {
        self.due.is_some_and(|due| due <= now)
    }

    /// All that was left was tried, and `failed` is left now.
    fn tried(&mut self, failed: Vec<Locked>, now: Instant) {
        self.pause = if failed.len() < self.left.len() {
            // The others may follow soon.
            FIRST_PAUSE
        } else {
            (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE)
        };
        self.due = (!failed.is_empty()).then(|| now + self.pause);
        self.left = failed;
    }
}

/// Fetches what is not here. Returns what is not here then.
async fn warm(
    crates: &Arc<Crates>,
    config: &Config,
    shown: &str,
    wanted: Vec<Locked>,
) -> Vec<Locked> {
    let begin = Instant::now();
    let terms = Terms {
        max_age: config.crates.max_age,
        when_upstream_fails: WhenUpstreamFails::ServeStale,
    };
    let (mut todo, mut unknown) = (Vec::new(), 0_usize);
    for found in wanted {
        let registry = match registry_of(crates, config, &found.source).await {
            Some(registry) => registry,
            None => {
                unknown += 1;
                continue;
            }
        };
        match CrateFile::parse(&found.name, &found.version, &found.checksum) {
            Some(file) => todo.push((found, registry, file)),
            None => unknown += 1,
        }
    }
    let crates_in_all = todo.len();
    let fetching = iter(todo).map(|(found, registry, file)| {
        let crates = Arc::clone(crates);
        async move { (found, fetch(&crates, &registry, &file, terms).await) }
    });
    let results: Vec<_> = fetching.buffer_unordered(AT_ONCE).collect().await;
    let fetched = results
        .iter()
        .filter(|(_, result)| *result == Fetch::Fetched)
        .count();
    let failed: Vec<_> = results
        .into_iter()
        .filter(|(_, result)| *result == Fetch::Failed)
        .map(|(found, _)| found)
        .collect();
    tracing::info!(
        lock_file = shown,
        crates = crates_in_all,
        fetched,
        failed = failed.len(),
        unknown,
        elapsed_ms = begin.elapsed().as_millis() as u64,
        "crates of a lock file are here"
    );
    failed
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Fetch {
    Here,
    Fetched,
    Failed,
}

async fn fetch(
    crates: &Arc<Crates>,
    registry: &Arc<Registry>,
    file: &CrateFile,
    terms: Terms,
) -> Fetch {
    let name = CrateName::parse(&file.name.to_ascii_lowercase());
    let entry = match name {
        Some(name) => registry
            .index
            .get(&name, &registry.upstream, terms)
            .await
            .is_ok(),
        None => false,
    };
    let id = BlobId {
        space: Arc::clone(&registry.space),
        digest: file.digest,
    };
    // What is only on its way is waited for below: it may not come.
    let path = crates.blobs.path(&id);
    if matches!(on_disk(move || path.is_file()).await, Ok(true)) {
        return if entry { Fetch::Here } else { Fetch::Failed };
    }
    let here = match crates.open(registry, file).await {
        Ok((Opened::Kept(_), _)) => true,
        Ok((Opened::Coming(coming, _), _)) => coming.ended().await.is_ok(),
        // There is no room for it, and nobody has asked.
        Ok((Opened::Passing(_), _)) | Err(_) => false,
    };
    if entry && here {
        Fetch::Fetched
    } else {
        Fetch::Failed
    }
}

/// The registry that a lock file means.
async fn registry_of(crates: &Arc<Crates>, config: &Config, source: &str) -> Option<Arc<Registry>> {
    let mut registries = config.crates.registries.iter();
    let name = match source.split_once('+')? {
        // Lock files name crates.io by the Git repository that its index once was.
        ("registry", url) if url.ends_with("/crates.io-index") => CRATES_IO,
        ("registry" | "sparse", url) => {
            let url = url.trim_end_matches('/');
            let same = |own: &str| own.trim_end_matches('/') == url;
            &registries
                .find(|registry| same(registry.url.as_str()))?
                .name
        }
        _ => return None,
    };
    crates.registry(name).await.ok()?
}

/// `None` while the mirror is not there yet, or has no such file.
async fn read(pool: &Arc<Pool>, lock_file: &LockFile) -> anyhow::Result<Option<String>> {
    let content = match lock_file {
        LockFile::OnDisk(path) => {
            let path = path.clone();
            tokio::task::spawn_blocking(move || {
                let mut content = Vec::new();
                let file = std::fs::File::open(path)?;
                file.take(MOST_LOCK_FILE + 1).read_to_end(&mut content)?;
                anyhow::ensure!(
                    content.len() as u64 <= MOST_LOCK_FILE,
                    "expected at most {MOST_LOCK_FILE} bytes, found more"
                );
                anyhow::Ok(content)
            })
            .await??
        }
        LockFile::InRepo { repo, path } => {
            let Found::Mirror(_, snapshot) = pool.present(repo).await? else {
                return Ok(None);
            };
            let Some(head) = snapshot.refs.head_id() else {
                return Ok(None);
            };
            let path = path.clone();
            let content = tokio::task::spawn_blocking(move || {
                file_at(&snapshot.packs, head, &path, MOST_LOCK_FILE)
            });
            match content.await?? {
                Some(content) => content,
                None => anyhow::bail!(
                    "expected a file of at most {MOST_LOCK_FILE} bytes at that path in HEAD, found none"
                ),
            }
        }
    };
    Ok(Some(String::from_utf8(content)?))
}

fn shown(lock_file: &LockFile) -> String {
    match lock_file {
        LockFile::OnDisk(path) => path.display().to_string(),
        LockFile::InRepo { repo, path } => format!("{repo}/{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_comes_is_tried_less_and_less() {
        let lock = |names: &[&str]| -> String {
            let package = |name: &&str| {
                format!(
                    "[[package]]\nname = \"{name}\"\nversion = \"1.0.0\"\nsource = \"x\"\nchecksum = \"y\"\n"
                )
            };
            names.iter().map(package).collect()
        };
        let (text, now) = (lock(&["good", "bad"]), Instant::now());
        let bad = locked(&lock(&["bad"]));
        let mut warming = Warming::new(Digest::of(text.as_bytes()), &text);
        assert_eq!(warming.left.len(), 2);
        let pauses: Vec<u64> = (0..9)
            .map(|_| {
                warming.tried(bad.clone(), now);
                warming.due.unwrap().duration_since(now).as_secs()
            })
            .collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 600, 600, 600]);
        assert_eq!(warming.left, bad);
        assert!(!warming.is_due(now) && warming.is_due(now + LONGEST_PAUSE));
        warming.tried(Vec::new(), now);
        assert!(!warming.is_due(now + LONGEST_PAUSE), "all of it is here");
    }
}
