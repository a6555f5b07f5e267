//! One repository of the pool, as it is in memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::Semaphore;

use super::flight::Flight;
use crate::git::mirror::MirrorFolder;
use crate::git::name::RepoName;
use crate::git::snapshot::Snapshot;
use crate::git::upstream::UpstreamError;
use crate::storage::Reservation;

/// A repository that was asked for, or whose mirror was found on disk.
pub struct Entry {
    pub name: RepoName,
    pub folder: MirrorFolder,
    state: Mutex<State>,
    /// Held while the mirror is opened, so that it is opened once.
    pub(super) opening: tokio::sync::Mutex<()>,
    /// Held by whoever changes the mirror on disk.
    pub(super) busy: tokio::sync::Mutex<()>,
    /// Packs that are being made.
    pub making: Arc<Semaphore>,
    /// Those, and the ones that wait for their turn.
    pub making_or_waiting: Arc<Semaphore>,
}

pub(super) struct State {
    pub snapshot: Option<Arc<Snapshot>>,
    /// A whole mirror lies on disk.
    pub on_disk: bool,
    pub flight: Option<Arc<Flight>>,
    /// When the upstream last told its references.
    pub fresh: Option<Instant>,
    pub last_fetch: Option<SystemTime>,
    pub failed: Option<(Instant, UpstreamError)>,
    pub used: SystemTime,
    pub touched: Option<Instant>,
    pub reservation: Reservation,
}

impl Entry {
    pub(super) fn new(
        name: RepoName,
        folder: MirrorFolder,
        reservation: Reservation,
        (at_once, waiting): (usize, usize),
    ) -> Self {
        let on_disk = folder.exists();
        let used = if on_disk {
            folder.last_used()
        } else {
            SystemTime::now()
        };
        Self {
            name,
            state: Mutex::new(State {
                snapshot: None,
                on_disk,
                flight: None,
                fresh: None,
                last_fetch: None,
                failed: None,
                used,
                touched: None,
                reservation,
            }),
            folder,
            opening: tokio::sync::Mutex::default(),
            busy: tokio::sync::Mutex::default(),
            making: Arc::new(Semaphore::new(at_once)),
            making_or_waiting: Arc::new(Semaphore::new(at_once + waiting)),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mirror as it is now, when it is open.
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.state().snapshot.clone()
    }
}
