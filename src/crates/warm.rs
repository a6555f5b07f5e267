//! Crates of lock files, fetched before anybody asks: so that the first build is warm as well.

use std::collections::HashMap;
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{StreamExt, iter};

use super::cargo_lock::locked;
use super::index::Terms;
use super::name::{CrateFile, CrateName};
use super::{Crates, Registry, download::Opened};
use crate::blobs::{BlobId, Digest};
use crate::config::lock_file::LockFile;
use crate::config::{CRATES_IO, Config, WhenUpstreamFails};
use crate::git::file_at::file_at;
use crate::git::pool::{Found, Pool};

/// Crates that are fetched at once. Builds that run meanwhile come first: they have places of their own.
const AT_ONCE: usize = 8;
/// How often it is looked whether a lock file has changed.
const LOOK: Duration = Duration::from_secs(10);
/// The largest lock files have some 10,000 lines.
const MOST_LOCK_FILE: u64 = 16 << 20;

/// Keeps the crates of `crates.warm` here, until the service stops.
pub async fn keep_warm(crates: Arc<Crates>, pool: Arc<Pool>) {
    // What was fetched as a whole. What is evicted later is not fetched again and again.
    let mut done: HashMap<String, Digest> = HashMap::new();
    loop {
        let config = crates.config.borrow().clone();
        for lock_file in &config.crates.warm {
            let shown = shown(lock_file);
            match read(&pool, lock_file).await {
                Ok(None) => tracing::debug!(lock_file = shown, "not there yet"),
                Ok(Some(text)) => {
                    let digest = Digest::of(text.as_bytes());
                    if done.get(&shown) == Some(&digest) {
                        continue;
                    }
                    if warm(&crates, &config, &shown, &text).await {
                        done.insert(shown, digest);
                    }
                }
                Err(error) => tracing::warn!(lock_file = shown, %error, "cannot be read"),
            }
        }
        // A mirror that is being made is looked for often, it may be there at any moment.
        tokio::time::sleep(LOOK).await;
    }
}

/// Fetches what is not here. Returns whether all of it is here then.
async fn warm(crates: &Arc<Crates>, config: &Config, shown: &str, text: &str) -> bool {
    let begin = std::time::Instant::now();
    let terms = Terms {
        max_age: config.crates.max_age,
        when_upstream_fails: WhenUpstreamFails::ServeStale,
    };
    let (mut todo, mut unknown) = (Vec::new(), 0_usize);
    for found in locked(text) {
        let registry = match registry_of(crates, config, &found.source).await {
            Some(registry) => registry,
            None => {
                unknown += 1;
                continue;
            }
        };
        match CrateFile::parse(&found.name, &found.version, &found.checksum) {
            Some(file) => todo.push((registry, file)),
            None => unknown += 1,
        }
    }
    let crates_in_all = todo.len();
    let fetching = iter(todo).map(|(registry, file)| {
        let crates = Arc::clone(crates);
        async move { fetch(&crates, &registry, &file, terms).await }
    });
    let results: Vec<_> = fetching.buffer_unordered(AT_ONCE).collect().await;
    let fetched = results
        .iter()
        .filter(|result| **result == Fetch::Fetched)
        .count();
    let failed = results
        .iter()
        .filter(|result| **result == Fetch::Failed)
        .count();
    tracing::info!(
        lock_file = shown,
        crates = crates_in_all,
        fetched,
        failed,
        unknown,
        elapsed_ms = begin.elapsed().as_millis() as u64,
        "crates of a lock file are here"
    );
    failed == 0
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
    if crates.blobs.has(&id) {
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
                file.take(MOST_LOCK_FILE).read_to_end(&mut content)?;
                std::io::Result::Ok(content)
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
                None => anyhow::bail!("expected a file at that path in HEAD, found none"),
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
