//! The pool's background: what is on disk is found first, then `git.warm` is kept fresh.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{Pool, PoolError};
use crate::config;
use crate::git::name::RepoName;

/// It is looked so soon how a fetch ended, or whether it has.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// What is the matter with the machine or with files may be over by then.
const AFTER_AN_ERROR: Duration = Duration::from_secs(60);

impl Pool {
    /// Runs until the pool is stopped.
    pub(super) async fn run(self: Arc<Self>) {
        let loading = Arc::clone(&self);
        if tokio::task::spawn_blocking(move || loading.load())
            .await
            .is_err()
        {
            tracing::error!("loading the mirrors failed");
        }
        self.loaded.store(true, Ordering::Relaxed);
        let mut config = self.config.clone();
        loop {
            let current = config.borrow_and_update().clone();
            let has_other_limit = current.storage.max_size != self.storage.limit();
            for entry in self.entries().values() {
                // Another address or token may be asked at once; the upstream itself knows whether it is to be left alone.
                entry.state().failed.take_if(|failed| {
                    failed.is_left_alone() || has_other_limit && failed.is_for_room()
                });
            }
            if has_other_limit {
                self.storage.set_limit(current.storage.max_size);
                let storage = Arc::clone(&self.storage);
                self.tasks.spawn_blocking(move || storage.make_room());
            }
            tokio::select! {
                () = self.stopping.cancelled() => return,
                () = self.keep_all_warm(&current.git) => {}
                changed = config.changed() => if changed.is_err() {
                    return;
                }
            }
        }
    }

    /// Refreshes each warm repository when it is due, for ever.
    async fn keep_all_warm(self: &Arc<Self>, git: &config::Git) {
        let mut due = vec![Instant::now(); git.warm.len()];
        loop {
            for (name, due) in git.warm.iter().zip(&mut due) {
                if *due <= Instant::now() {
                    let looked = self.keep_warm(name, git.refresh).await;
                    *due = looked.unwrap_or_else(|error| {
                        tracing::error!(repo = %name, %error, "cannot be kept warm");
                        Instant::now() + git.refresh.min(AFTER_AN_ERROR)
                    });
                }
            }
            let Some(next) = due.iter().min() else {
                return std::future::pending().await;
            };
            tokio::time::sleep_until((*next).into()).await;
        }
    }

    /// Refreshes a mirror unless its upstream was asked within `refresh`. Returns when to look at it again: the question
    /// may come later than the decision to ask, others ask as well, and what fails is tried again after its pause.
    async fn keep_warm(
        self: &Arc<Self>,
        name: &RepoName,
        refresh: Duration,
    ) -> Result<Instant, PoolError> {
        let (entry, upstream) = self.allowed_entry(name).await?;
        self.opened(&entry).await?;
        let now = Instant::now();
        let (fresh, paused) = {
            let state = entry.state();
            let paused = state.failed.as_ref().map(|failed| failed.until());
            (state.fresh, paused.filter(|until| *until > now))
        };
        if let Some(due) = fresh.map(|fresh| fresh + refresh)
            && due > now
        {
            return Ok(due);
        }
        let again = match paused {
            Some(until) => until,
            None => {
                self.fly(&entry, upstream);
                now + LOOK_AGAIN
            }
        };
        Ok(again.min(now + refresh))
    }
}
