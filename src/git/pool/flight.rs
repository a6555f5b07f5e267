//! A fetch that is under way, and all who wait for it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{Notify, watch};

use crate::git::refs::Refs;
use crate::git::snapshot::Snapshot;
use crate::git::upstream::{Progress, UpstreamError};

/// One fetch of one repository. There is never a second one for the same repository.
pub struct Flight {
    /// No mirror was there when it began.
    pub first: bool,
    pub progress: Progress,
    refs_wanted: Notify,
    refs: watch::Sender<Option<Arc<Refs>>>,
    end: watch::Sender<Option<Result<Arc<Snapshot>, UpstreamError>>>,
}

impl Flight {
    pub fn new(first: bool) -> Arc<Self> {
        Arc::new(Self {
            first,
            progress: Progress::default(),
            refs_wanted: Notify::new(),
            refs: watch::Sender::new(None),
            end: watch::Sender::new(None),
        })
    }

    /// Ends when somebody wants to know the references.
    pub(super) async fn refs_wanted(&self) {
        self.refs_wanted.notified().await;
    }

    /// The upstream told its references.
    pub(super) fn set_refs(&self, refs: Refs) {
        self.refs.send_replace(Some(Arc::new(refs)));
    }

    pub(super) fn finish(&self, result: Result<Arc<Snapshot>, UpstreamError>) {
        self.end.send_replace(Some(result));
    }

    /// The upstream's references, which come long before the pack. A first clone that waits for its turn asks for them
    /// again when it begins.
    ///
    /// # Errors
    /// Why the fetch failed.
    pub async fn refs(&self) -> Result<Arc<Refs>, UpstreamError> {
        self.refs_wanted.notify_one();
        let mut refs = self.refs.subscribe();
        tokio::select! {
            found = refs.wait_for(Option::is_some) => match found.ok().and_then(|found| found.clone()) {
                Some(found) => Ok(found),
                None => Err(UpstreamError::Stopped),
            },
            end = self.wait() => end.map(|snapshot| Arc::new(snapshot.refs.clone())),
        }
    }

    /// Whether it has its turn, and the upstream has told its references: whoever waits for the pack can be told how far
    /// it is.
    pub(super) fn has_begun(&self) -> bool {
        self.progress.begun.load(Ordering::Relaxed) && self.refs.borrow().is_some()
    }

    /// The mirror as the fetch left it.
    ///
    /// # Errors
    /// Why the fetch failed.
    pub async fn wait(&self) -> Result<Arc<Snapshot>, UpstreamError> {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await;
        end.ok()
            .and_then(|end| end.clone())
            .unwrap_or(Err(UpstreamError::Stopped))
    }
}
