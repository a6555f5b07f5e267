//! One repository of the pool, as it is in memory.

use std::fs::{self, File};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::flight::Flight;
use crate::breaker::growing_pause;
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
    /// Held while packs are consolidated, which reads the mirror beside those who change it: not to be evicted meanwhile.
    pub(super) maintaining: tokio::sync::Mutex<()>,
    /// Places for requests with a body that are passed through to the upstream.
    passing: Arc<Semaphore>,
    /// Requests that are planned.
    pub planning: Arc<Semaphore>,
    /// Packs that are being made.
    pub making: Arc<Semaphore>,
    /// Those, and the ones that wait for their turn.
    pub making_or_waiting: Arc<Semaphore>,
}

/// How much is done for one repository at once. It is no more than the threads that there are for all: what else there
/// is waits here, in the repository's own queue, and not before other repositories' in the common one.
pub(super) struct AtOnce {
    pub planning: usize,
    pub making: usize,
    /// Packs that may wait.
    pub waiting: usize,
}

pub(super) struct State {
    pub snapshot: Option<Arc<Snapshot>>,
    /// What [`Self::counts`] were when it was last open.
    counts: (usize, u64),
    /// A whole mirror lies on disk.
    pub on_disk: bool,
    pub flight: Option<Arc<Flight>>,
    /// When the upstream was asked for the references of the snapshot.
    pub fresh: Option<Instant>,
    /// When it last answered; also before this process began.
    pub last_fetch: Option<SystemTime>,
    pub failed: Option<Failure>,
    /// When consolidation was last tried.
    pub maintained: Option<Instant>,
    /// When the mirror was last found to be damaged.
    pub set_aside: Option<Instant>,
    /// Every byte was compared with its checksum since this process began.
    pub verified: bool,
    pub used: SystemTime,
    /// The use that is noted on disk.
    noted: Option<SystemTime>,
    pub reservation: Reservation,
}

impl State {
    /// References and objects of the mirror, as far as it was open since this process began.
    pub fn counts(&self) -> (usize, u64) {
        self.snapshot.as_ref().map_or(self.counts, |snapshot| {
            (snapshot.refs.names.len(), snapshot.packs.room().into())
        })
    }
}

/// A request that is passed through, as long as this lives.
pub struct Passing {
    _place: Option<OwnedSemaphorePermit>,
}

/// Why the upstream could not be asked, and how often in a row.
#[derive(Clone)]
pub(super) struct Failure {
    pub when: Instant,
    pub error: UpstreamError,
    pub times: u32,
    /// There is a mirror, which grows old meanwhile.
    has_mirror: bool,
}

/// Packs of one repository that its upstream makes for clients at once. All of them and the first clone have to share the
/// way there: with fifty builders that start together, nobody would have anything for long.
const PASSING_AT_ONCE: usize = 4;

/// After a failure the upstream is left alone for this long, twice as long after the next, and so on.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// What does not fit, takes too long, has objects of another format or was damaged twice is not tried again soon, and
/// ever less often: each try may cost a whole clone, and all that is evicted for it. What is new of a mirror and does not
/// fit costs less, and may be made room for in a moment: the pauses grow from the first to the first of these.
const HOPELESS_PAUSE: Duration = Duration::from_secs(600);
const LONGEST_HOPELESS_PAUSE: Duration = Duration::from_secs(6 * 3600);

/// The use of a mirror is noted on disk no more often than this, and at a stop.
const NOTE_PAUSE: Duration = Duration::from_secs(60);

/// The file whose time is when the upstream last answered: written when references change, touched when they do not.
const REFS: &str = "packed-refs";

impl Failure {
    /// The failure that follows `before`, without a mirror. What does not get better by itself begins to count anew.
    pub fn after(before: Option<&Self>, error: UpstreamError) -> Self {
        Self::following(before, error, false)
    }

    /// The same where there is a mirror.
    pub fn of_mirror(before: Option<&Self>, error: UpstreamError) -> Self {
        Self::following(before, error, true)
    }

    fn following(before: Option<&Self>, error: UpstreamError, has_mirror: bool) -> Self {
        let mut failure = Self {
            when: Instant::now(),
            error,
            times: 1,
            has_mirror,
        };
        if let Some(before) = before
            && before.is_hopeless() == failure.is_hopeless()
        {
            failure.times = before.times.saturating_add(1);
        }
        failure
    }

    /// Whether it is too early to try again.
    pub fn is_recent(&self) -> bool {
        Instant::now() < self.until()
    }

    /// When it may be tried again.
    pub fn until(&self) -> Instant {
        self.when + self.pause()
    }

    /// Whether it is for want of room below the limit.
    pub fn is_for_room(&self) -> bool {
        matches!(
            self.error,
            UpstreamError::Storage(StorageFull::Limit { .. })
        )
    }

    /// Whether the upstream said for how long it is not to be asked.
    pub fn is_left_alone(&self) -> bool {
        matches!(self.error, UpstreamError::AskedTooOften { .. })
    }

    fn is_hopeless(&self) -> bool {
        self.is_for_room() && !self.has_mirror
            || matches!(
                self.error,
                UpstreamError::Sha256 | UpstreamError::Hopeless(_)
            )
    }

    fn pause(&self) -> Duration {
        if let UpstreamError::AskedTooOften { until, .. } = self.error {
            return until.saturating_duration_since(self.when);
        }
        let (first, longest) = if self.is_hopeless() {
            (HOPELESS_PAUSE, LONGEST_HOPELESS_PAUSE)
        } else if self.is_for_room() {
            (FIRST_PAUSE, HOPELESS_PAUSE)
        } else {
            (FIRST_PAUSE, LONGEST_PAUSE)
        };
        growing_pause(first, self.times, longest)
    }
}

impl Entry {
    pub(super) fn new(
        name: RepoName,
        folder: MirrorFolder,
        reservation: Reservation,
        at_once: &AtOnce,
    ) -> Self {
        let on_disk = folder.exists();
        let last_fetch = on_disk.then(|| last_fetch(&folder));
        let used = if on_disk {
            folder.last_used()
        } else {
            SystemTime::now()
        };
        Self {
            name,
            state: Mutex::new(State {
                snapshot: None,
                counts: (0, 0),
                on_disk,
                flight: None,
                fresh: None,
                last_fetch,
                failed: None,
                maintained: None,
                set_aside: None,
                verified: false,
                used,
                noted: on_disk.then_some(used),
                reservation,
            }),
            folder,
            busy: tokio::sync::Mutex::default(),
            maintaining: tokio::sync::Mutex::default(),
            passing: Arc::new(Semaphore::new(PASSING_AT_ONCE)),
            planning: Arc::new(Semaphore::new(at_once.planning)),
            making: Arc::new(Semaphore::new(at_once.making)),
            making_or_waiting: Arc::new(Semaphore::new(at_once.making + at_once.waiting)),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a request for a pack is passed through to the upstream. Not where that makes packs for others already, a
    /// first clone is under way, and the client `can_wait` for that.
    pub fn pass_through(&self, can_wait: bool) -> Option<Passing> {
        let place = Arc::clone(&self.passing).try_acquire_owned().ok();
        let has_begun = || {
            let state = self.state();
            state
                .flight
                .as_ref()
                .is_some_and(|flight| flight.has_begun())
        };
        let waits = place.is_none() && can_wait && has_begun();
        (!waits).then_some(Passing { _place: place })
    }

    /// Why its upstream could not be asked, where it is too early to try again.
    pub(super) fn recent_failure(&self) -> Option<UpstreamError> {
        let state = self.state();
        let recent = state.failed.as_ref().filter(|failed| failed.is_recent());
        recent.map(|failed| failed.error.clone())
    }

    /// The mirror as it is now, when it is open.
    pub fn snapshot(&self) -> Option<Arc<Snapshot>> {
        self.state().snapshot.clone()
    }

    /// The mirror, when its references were at most `max_age` old when the client `came`.
    pub fn fresh(&self, came: Instant, max_age: Duration) -> Option<Arc<Snapshot>> {
        let state = self.state();
        let age = came.saturating_duration_since(state.fresh?);
        state.snapshot.clone().filter(|_| age <= max_age)
    }

    /// Somebody uses it now. Returns the time where that is to be noted on disk.
    pub(super) fn use_now(&self) -> Option<SystemTime> {
        let now = SystemTime::now();
        let mut state = self.state();
        state.used = now;
        let is_due = |noted: SystemTime| {
            let pause = now.duration_since(noted);
            pause.map_or(true, |pause| pause > NOTE_PAUSE)
        };
        let is_to_note = state.on_disk && state.noted.is_none_or(is_due);
        if is_to_note {
            state.noted = Some(now);
        }
        is_to_note.then_some(now)
    }

    /// When it was last used, where that is not noted on disk.
    pub(super) fn use_to_note(&self) -> Option<SystemTime> {
        let state = self.state();
        let is_to_note = state.on_disk && state.noted != Some(state.used);
        is_to_note.then_some(state.used)
    }

    /// Closes the mirror unless somebody uses it, or has within `idle`. It is opened again when it is needed. Blocks.
    pub(super) fn close_if_idle(&self, idle: Duration) {
        let (Ok(_busy), Ok(_maintaining)) = (self.busy.try_lock(), self.maintaining.try_lock())
        else {
            return;
        };
        let mut state = self.state();
        if state.flight.is_some() || state.used.elapsed().is_ok_and(|unused| unused < idle) {
            return;
        }
        // Readers of an older snapshot hold its packs.
        let nobody_reads = |snapshot: &mut Arc<Snapshot>| {
            let mut packs = snapshot.packs.packs().iter();
            Arc::strong_count(snapshot) == 1 && packs.all(|pack| Arc::strong_count(pack) == 1)
        };
        state.counts = state.counts();
        let closed = state.snapshot.take_if(nobody_reads);
        drop(state);
        drop(closed); // which takes its time
    }

    /// Remembers, over restarts, when the upstream last answered. It is no loss when this fails.
    pub(super) fn note_fetch(&self, when: SystemTime) {
        let noted = File::open(self.folder.path().join(REFS))
            .and_then(|references| references.set_modified(when));
        if let Err(error) = noted {
            tracing::debug!(repo = %self.name, %error, "the time of the fetch was not noted");
        }
    }
}

/// When the upstream of a mirror on disk last answered, as far as that was noted.
fn last_fetch(folder: &MirrorFolder) -> SystemTime {
    fs::metadata(folder.path().join(REFS))
        .and_then(|found| found.modified())
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_does_not_grow_old_for_a_short_lack_of_room() {
        let full = || {
            UpstreamError::Storage(StorageFull::Limit {
                wanted: 3,
                used: 2,
                limit: 4,
            })
        };
        assert_eq!(Failure::after(None, full()).pause(), HOPELESS_PAUSE);
        let mut failure = Failure::of_mirror(None, full());
        assert_eq!(failure.pause(), FIRST_PAUSE);
        for _ in 0..100 {
            failure = Failure::of_mirror(Some(&failure), full());
        }
        assert_eq!(failure.pause(), HOPELESS_PAUSE);
    }

    #[test]
    fn what_does_not_get_better_is_left_alone_for_longer() {
        let pause = |error| Failure::after(None, error).pause();
        for error in [
            UpstreamError::Sha256,
            UpstreamError::Hopeless("it is too large".to_owned()),
        ] {
            assert_eq!(pause(error.clone()), HOPELESS_PAUSE);
            let again = Failure::after(Some(&Failure::after(None, error.clone())), error);
            assert_eq!(again.pause(), 2 * HOPELESS_PAUSE);
        }
        let cut_off = UpstreamError::Failed("it was cut off".to_owned());
        assert_eq!(pause(cut_off.clone()), FIRST_PAUSE);
        let mut failure = Failure::after(None, cut_off.clone());
        for _ in 0..100 {
            failure = Failure::after(Some(&failure), cut_off.clone());
        }
        assert_eq!(failure.pause(), LONGEST_PAUSE);
        let until = Instant::now() + 3 * LONGEST_PAUSE;
        let too_often = UpstreamError::AskedTooOften {
            host: "git.test".to_owned(),
            status: reqwest::StatusCode::TOO_MANY_REQUESTS,
            until,
        };
        let refused = Failure::after(Some(&failure), too_often);
        assert_eq!(refused.when + refused.pause(), until);
        let other = Failure::after(Some(&failure), UpstreamError::Sha256);
        assert_eq!(other.pause(), HOPELESS_PAUSE);
    }
}
