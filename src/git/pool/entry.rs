//! One repository of the pool, as it is in memory.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::Semaphore;

use super::flight::Flight;
use crate::git::mirror::MirrorFolder;
use crate::git::name::RepoName;
use crate::git::snapshot::Snapshot;
use crate::git::upstream::UpstreamError;
use crate::storage::{Reservation, StorageFull};

/// A repository that was asked for, or whose mirror was found on disk.
pub struct Entry {
    pub name: RepoName,
    pub folder: MirrorFolder,
    state: Mutex<State>,
    /// Held by whoever opens, changes or evicts the mirror on disk.
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
    pub failed: Option<Failure>,
    /// When consolidation was last tried.
    pub maintained: Option<Instant>,
    /// When the mirror was last found to be damaged.
    pub set_aside: Option<Instant>,
    pub used: SystemTime,
    pub touched: Option<Instant>,
    pub reservation: Reservation,
}

/// Why the upstream could not be asked, and how often in a row.
#[derive(Clone)]
pub(super) struct Failure {
    pub when: Instant,
    pub error: UpstreamError,
    pub times: u32,
}

/// After a failure the upstream is left alone for this long, twice as long after the next, and so on.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What does not fit, or was damaged twice, is not tried again soon: each try costs a whole clone.
const HOPELESS_PAUSE: Duration = Duration::from_secs(600);

impl Failure {
    /// The failure that follows `before`.
    pub fn after(before: Option<&Self>, error: UpstreamError) -> Self {
        Self {
            when: Instant::now(),
            error,
            times: before.map_or(1, |before| before.times.saturating_add(1)),
        }
    }

    /// Whether it is too early to try again.
    pub fn is_recent(&self) -> bool {
        let pause = match &self.error {
            UpstreamError::Storage(StorageFull::Limit { .. }) | UpstreamError::Hopeless(_) => {
                HOPELESS_PAUSE
            }
            _ => (FIRST_PAUSE * 2u32.saturating_pow(self.times.saturating_sub(1).min(10)))
                .min(LONGEST_PAUSE),
        };
        self.when.elapsed() < pause
    }
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
                maintained: None,
                set_aside: None,
                used,
                touched: None,
                reservation,
            }),
            folder,
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
