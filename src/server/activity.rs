//! What goes on on one connection, and when it has been too little.
//!
//! Defences in this file, each against clients that hold a connection without using it:
//! - the first request has to come within `header` of the connection (also where the version of HTTP is undecided,
//!   and where HTTP/2 is spoken without any request);
//! - the head of each further HTTP/1.1 request has to come within `header` of its first byte;
//! - a connection without requests is closed after `idle`;
//! - where a new connection finds all places taken, the one that is of least use is closed sooner ([`Connections`]);
//! - a response whose next piece nobody takes ends the connection after `stall`: with HTTP/2 a closed window stops a
//!   stream without stopping the socket. Sooner, while others wait for the memory that it takes.
//!
//! For the SSH door a request is a command. It has times of its own for all of this but the places, see
//! [`crate::ssh::connection`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

use crate::buffers;

/// The times that bound a connection.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// For a TLS handshake.
    pub handshake: Duration,
    /// For the head of a request.
    pub header: Duration,
    /// For a pause in a request body.
    pub body_idle: Duration,
    /// For a pause between requests.
    pub idle: Duration,
    /// For a pause in which the client takes nothing of a response.
    pub stall: Duration,
}

/// Longer than the 60 s after which common load balancers drop idle connections of theirs: if the server were first, a
/// request of theirs could meet the closing connection and fail.
const KEEP_ALIVE: Duration = Duration::from_secs(75);

/// How many times the pause that a sender may make a reader may make: readers stop for reasons of their own (a full
/// disk cache, `index-pack` at work), and a stopped reader costs one buffer. With the default of 30 s this is 5 min.
const STALL_FACTOR: u32 = 10;

/// While others wait for a place: the time for a first request, for a further head, for a pause between requests, and
/// for the end of a connection that is told to end. Requests under way have all the time they need.
const WHILE_OTHERS_WAIT: Duration = Duration::from_secs(2);

impl Times {
    /// From the configuration.
    pub fn of(limits: &crate::config::Limits) -> Self {
        Self {
            handshake: limits.tls_handshake_timeout,
            header: limits.header_timeout,
            body_idle: limits.body_idle_timeout,
            idle: KEEP_ALIVE,
            stall: limits.body_idle_timeout.saturating_mul(STALL_FACTOR),
        }
    }

    /// For a pause in which the client takes nothing of a response, at the moment: while others wait for the memory that
    /// it takes, a reader has no more time than a sender.
    pub fn stall_now(&self) -> Duration {
        if buffers::are_short() {
            self.stall.min(self.body_idle)
        } else {
            self.stall
        }
    }
}

/// Pings, and answers to them, make an idle connection no less idle: one of HTTP/2 has 17 bytes, and what TLS adds,
/// one of SSH up to 100. The end of an answer may be as short, and then makes some moments less of its time.
const LARGEST_PING: usize = 128;

/// Why a connection is not worth keeping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expired {
    /// No request since it was opened.
    NoRequest,
    /// A request's head began and does not end.
    SlowHead,
    /// No request since the last one.
    Idle,
    /// A response that is not taken.
    StalledReader,
}

/// The state of one connection, shared by its IO, its requests and its task.
pub struct Activity {
    times: Times,
    state: Mutex<State>,
    /// Wakes the task when the connection is asked to end.
    asked: Notify,
}

struct State {
    opened: Instant,
    requests: u64,
    in_flight: usize,
    /// Requests run side by side, and pings come between them.
    multiplexed: bool,
    closing: bool,
    /// To end, since somebody else waits for its place.
    asked: bool,
    /// When something was last sent, or a request ended.
    last: Instant,
    /// The client has to take something before more can be sent, also of answers that are over for us.
    blocked: bool,
    /// When the first byte of a further HTTP/1.1 request came.
    head_began: Option<Instant>,
    /// What of responses waits for the client: of as many requests at most as may run side by side.
    untaken: Vec<Untaken>,
}

/// What of a response waits for the client.
struct Untaken {
    /// The request.
    id: u64,
    /// Pieces that it has not taken.
    pieces: usize,
    /// When it began to wait for the oldest of them.
    since: Instant,
    /// Bytes that it has taken of late, and for how long they had waited in all.
    taken: usize,
    waited: Duration,
}

/// A request that is under way, until the last of its response has left the service.
pub struct Exchange {
    activity: Arc<Activity>,
    id: u64,
}

impl Activity {
    /// For a connection that begins now.
    pub fn new(times: Times) -> Arc<Self> {
        let now = Instant::now();
        let state = State {
            opened: now,
            requests: 0,
            in_flight: 0,
            multiplexed: false,
            closing: false,
            asked: false,
            last: now,
            blocked: false,
            head_began: None,
            untaken: Vec::new(),
        };
        Arc::new(Self {
            times,
            state: Mutex::new(state),
            asked: Notify::new(),
        })
    }

    /// A step before the first request is done, such as the TLS handshake: the time for the next one begins.
    pub fn opened(&self) {
        self.state().opened = Instant::now();
    }

    /// Bytes came from the client.
    pub fn received(&self) {
        let mut state = self.state();
        // Idle connections of HTTP/2 and SSH exchange pings.
        let may_begin = state.in_flight == 0 && !state.multiplexed && state.head_began.is_none();
        if state.requests > 0 && may_begin {
            state.head_began = Some(Instant::now());
        }
    }

    /// So many bytes went to the client.
    pub fn sent(&self, bytes: usize) {
        let mut state = self.state();
        if state.in_flight > 0 || bytes > LARGEST_PING {
            state.last = Instant::now();
        }
        state.blocked = false;
    }

    /// There is more to send than the client takes now. The socket itself fails when that goes on for too long.
    pub fn blocked(&self) {
        self.state().blocked = true;
    }

    /// A request's head has come, over HTTP/2 or SSH if `multiplexed`.
    pub fn request(self: &Arc<Self>, multiplexed: bool) -> Exchange {
        let mut state = self.state();
        state.requests += 1;
        state.in_flight += 1;
        state.multiplexed = multiplexed;
        state.asked = false;
        state.head_began = None;
        Exchange {
            activity: self.clone(),
            id: state.requests,
        }
    }

    /// The client has been told to end the connection: it has as long for that as for a request's head.
    pub fn closing(&self) {
        let mut state = self.state();
        state.closing = true;
        state.last = Instant::now();
    }

    /// Returns when the connection is not worth keeping any more.
    pub async fn expired(&self) -> Expired {
        let Times {
            header,
            idle,
            body_idle,
            ..
        } = self.times;
        let shortest = header.min(idle).min(body_idle);
        loop {
            let (deadline, why) = self.deadline();
            let now = Instant::now();
            if deadline <= now {
                return why;
            }
            // A head or a stall may begin in the meantime, with an earlier deadline: nobody wakes us for it, so that
            // reads and writes cost next to nothing.
            tokio::select! {
                () = sleep_until(deadline.min(now + shortest)) => {}
                () = self.asked.notified() => {}
            }
        }
    }

    /// Returns when the connection is asked to end: for before the time of [`expired`](Self::expired).
    pub async fn asked_to_end(&self) {
        while !self.state().asked {
            self.asked.notified().await;
        }
    }

    /// Asks the connection to end, unless a request has come.
    fn ask_to_end(&self) {
        let mut state = self.state();
        state.asked = !state.is_busy();
        drop(state);
        self.asked.notify_one();
    }

    /// Of how much use the connection is while others wait for its place: least where a head does not come or does not
    /// end, and among equals where that has gone on for longest. `None` when it is not to be asked to end.
    fn usefulness(&self, now: Instant) -> Option<(bool, Instant)> {
        let state = self.state();
        let (since, why) = state.waiting();
        let can_be_asked =
            !state.is_busy() && !state.closing && !state.asked && since + WHILE_OTHERS_WAIT <= now;
        can_be_asked.then_some((why == Expired::Idle, since))
    }

    fn deadline(&self) -> (Instant, Expired) {
        let Times { header, idle, .. } = self.times;
        let stall = self.times.stall_now();
        let state = self.state();
        if state.in_flight > 0 {
            let waiting = state.untaken.iter().filter(|untaken| untaken.pieces > 0);
            let deadlines =
                waiting.map(|untaken| untaken.since + stall.saturating_sub(untaken.waited));
            return match deadlines.min() {
                Some(deadline) => (deadline, Expired::StalledReader),
                // Our turn to work. Look again when a reader could have stalled at the earliest.
                None => (Instant::now() + stall, Expired::StalledReader),
            };
        }
        if state.blocked {
            return (state.last + stall, Expired::StalledReader);
        }
        let (since, why) = state.waiting();
        let limit = match why {
            Expired::Idle if !state.closing => idle,
            _ => header,
        };
        let limit = if state.asked {
            limit.min(WHILE_OTHERS_WAIT)
        } else {
            limit
        };
        (since + limit, why)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl State {
    /// Of a request that is under way.
    fn untaken_of(&mut self, id: u64) -> &mut Untaken {
        let known = self.untaken.iter().position(|untaken| untaken.id == id);
        let place = known.unwrap_or_else(|| {
            self.untaken.push(Untaken {
                id,
                pieces: 0,
                since: Instant::now(),
                taken: 0,
                waited: Duration::ZERO,
            });
            self.untaken.len() - 1
        });
        &mut self.untaken[place]
    }

    /// Whether the client waits for us, or for what is on its way to it.
    fn is_busy(&self) -> bool {
        self.in_flight > 0 || self.blocked
    }

    /// Without a request under way: since when the client is waited for, and what ends the connection if it goes on.
    fn waiting(&self) -> (Instant, Expired) {
        if self.requests == 0 {
            (self.opened, Expired::NoRequest)
        } else if let Some(began) = self.head_began {
            (began, Expired::SlowHead)
        } else {
            (self.last, Expired::Idle)
        }
    }
}

/// The open connections of a door.
#[derive(Clone, Default)]
pub struct Connections(Arc<Mutex<Listed>>);

#[derive(Default)]
struct Listed {
    next: u64,
    open: BTreeMap<u64, Arc<Activity>>,
}

/// A connection in the list, until dropped.
pub struct Entry {
    connections: Connections,
    number: u64,
}

impl Connections {
    /// Adds a connection, so that it can be asked to end.
    pub fn add(&self, activity: Arc<Activity>) -> Entry {
        let mut listed = self.listed();
        let number = listed.next;
        listed.next += 1;
        listed.open.insert(number, activity);
        Entry {
            connections: self.clone(),
            number,
        }
    }

    /// Asks the connection that is of least use to end, because somebody waits for a place. None is asked while all
    /// have something to do, have been asked already, or have not yet had their time.
    pub fn ask_one_to_end(&self) {
        let now = Instant::now();
        let listed = self.listed();
        let spare = listed
            .open
            .values()
            .filter_map(|activity| Some((activity.usefulness(now)?, activity)))
            .min_by_key(|(usefulness, _)| *usefulness);
        if let Some((_, activity)) = spare {
            activity.ask_to_end();
        }
    }

    fn listed(&self) -> MutexGuard<'_, Listed> {
        self.0
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.connections.listed().open.remove(&self.number);
    }
}

impl Exchange {
    /// The connection got a piece of the response.
    pub fn given(&self) {
        let mut state = self.activity.state();
        let untaken = state.untaken_of(self.id);
        if untaken.pieces == 0 {
            untaken.since = Instant::now();
        }
        untaken.pieces += 1;
    }

    /// A piece of so many bytes is on its way to the client.
    pub fn taken(&self, bytes: usize) {
        let mut state = self.activity.state();
        // The client reads one connection, whatever runs side by side on it.
        let share = buffers::CAPACITY / state.untaken.len().max(1);
        let untaken = state.untaken_of(self.id);
        untaken.pieces -= 1;
        untaken.taken += bytes;
        // SECURITY: while others wait for memory, what counts is that a client takes a whole buffer in its time, and not that it
        // takes a little now and then.
        let counts = untaken.taken >= share || !buffers::are_short();
        if untaken.pieces > 0 || !counts {
            let now = Instant::now();
            untaken.waited += now - untaken.since;
            untaken.since = now;
        }
        if counts {
            untaken.taken = 0;
            untaken.waited = Duration::ZERO;
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let mut state = self.activity.state();
        state.untaken.retain(|untaken| untaken.id != self.id);
        state.in_flight -= 1;
        state.last = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{sleep, timeout};

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const PIECE: usize = 16 << 10;

    fn connection() -> Arc<Activity> {
        Activity::new(Times {
            handshake: SECOND,
            header: SECOND * 10,
            body_idle: SECOND * 30,
            idle: SECOND * 75,
            stall: SECOND * 300,
        })
    }

    async fn within(activity: &Activity, seconds: u32) -> Option<Expired> {
        timeout(SECOND * seconds, activity.expired()).await.ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_request_expires() {
        let activity = connection();
        activity.received();
        activity.sent(1000);
        assert_eq!(within(&activity, 9).await, None);
        assert_eq!(within(&activity, 2).await, Some(Expired::NoRequest));
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_does_not_take_from_the_time_for_the_request() {
        let activity = connection();
        sleep(SECOND * 9).await;
        activity.opened();
        assert_eq!(within(&activity, 9).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_may_take_hours_when_we_are_the_slow_ones() {
        let activity = connection();
        let exchange = activity.request(false);
        assert_eq!(within(&activity, 7200).await, None);
        exchange.given();
        exchange.taken(PIECE);
        assert_eq!(within(&activity, 7200).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_that_nobody_takes_expires_beside_others_that_are_taken() {
        let activity = connection();
        let stalled = activity.request(true);
        let busy = activity.request(true);
        stalled.given();
        for _ in 0..29 {
            sleep(SECOND * 10).await;
            busy.given();
            busy.given();
            busy.taken(PIECE);
            busy.taken(PIECE);
        }
        assert_eq!(within(&activity, 9).await, None);
        assert_eq!(within(&activity, 2).await, Some(Expired::StalledReader));
    }

    /// Who takes a piece now and then, and so keeps whole buffers from others.
    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_expires_while_others_wait_for_memory() {
        let slow = |pieces: u32| async move {
            let activity = connection();
            let exchange = activity.request(true);
            let mut expired = None;
            for _ in 0..40 {
                (0..pieces).for_each(|_| exchange.given());
                expired = expired.or(within(&activity, 10).await);
                (0..pieces).for_each(|_| exchange.taken(PIECE));
            }
            expired
        };
        assert_eq!(slow(1).await, None);
        let mut held = Vec::new();
        while !buffers::are_short() {
            held.push(buffers::Buffer::for_client(buffers::CAPACITY).await);
        }
        assert_eq!(slow(1).await, Some(Expired::StalledReader));
        assert_eq!(slow(2).await, Some(Expired::StalledReader));
        // A whole buffer in less than the time for one.
        assert_eq!(slow(8).await, None);
        // And so where it is of many streams.
        let activity = connection();
        let streams: [_; 16] = std::array::from_fn(|_| activity.request(true));
        for _ in 0..40 {
            streams.iter().for_each(Exchange::given);
            assert_eq!(within(&activity, 20).await, None);
            streams.iter().for_each(|stream| stream.taken(PIECE));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_connection_expires_after_what_it_still_sent() {
        let activity = connection();
        drop(activity.request(false));
        sleep(SECOND * 60).await;
        activity.sent(1000);
        assert_eq!(within(&activity, 74).await, None);
        assert_eq!(within(&activity, 2).await, Some(Expired::Idle));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_head_expires_before_an_idle_connection() {
        let activity = connection();
        drop(activity.request(false));
        sleep(SECOND * 60).await;
        for _ in 0..9 {
            activity.received();
            assert_eq!(within(&activity, 1).await, None);
        }
        assert_eq!(within(&activity, 2).await, Some(Expired::SlowHead));
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_that_begins_later_is_seen_while_an_earlier_one_is_awaited() {
        let activity = connection();
        drop(activity.request(false));
        let began = Instant::now();
        let waiting = tokio::spawn({
            let activity = activity.clone();
            async move { activity.expired().await }
        });
        sleep(SECOND * 20).await;
        activity.received();
        assert_eq!(waiting.await.expect("no panic"), Expired::SlowHead);
        assert!(
            began.elapsed() <= SECOND * 40,
            "in paused time, which is exact"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn pings_of_idle_http2_are_no_head() {
        let activity = connection();
        drop(activity.request(true));
        activity.received();
        assert_eq!(within(&activity, 74).await, None);
        // Ours give no more time either.
        activity.sent(17);
        activity.received();
        assert_eq!(within(&activity, 2).await, Some(Expired::Idle));
    }

    /// The last bytes of an answer wait in buffers when its request is over for us.
    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_still_being_taken_is_no_idle_connection() {
        let connections = Connections::default();
        let activity = connection();
        let _listed = connections.add(activity.clone());
        drop(activity.request(false));
        activity.blocked();
        sleep(SECOND * 100).await;
        connections.ask_one_to_end();
        assert_eq!(within(&activity, 100).await, None);
        activity.sent(1000);
        sleep(SECOND * 3).await;
        connections.ask_one_to_end();
        assert_eq!(within(&activity, 0).await, Some(Expired::Idle));
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_of_least_use_ends_first_when_others_wait() {
        let connections = Connections::default();
        let [busy, kept_alive, young, silent, slow] = std::array::from_fn(|_| connection());
        let _listed =
            [&busy, &kept_alive, &young, &silent, &slow].map(|one| connections.add(one.clone()));
        let _exchange = busy.request(false);
        drop(kept_alive.request(false));
        drop(slow.request(false));
        sleep(SECOND).await;
        slow.received();
        sleep(SECOND).await;
        young.opened();
        for (activity, why) in [
            (&silent, Some(Expired::NoRequest)),
            (&kept_alive, Some(Expired::Idle)),
            (&slow, None),
        ] {
            assert_eq!(within(activity, 0).await, None);
            connections.ask_one_to_end();
            assert_eq!(within(activity, 0).await, why);
        }
        sleep(SECOND).await;
        connections.ask_one_to_end();
        assert_eq!(within(&slow, 0).await, Some(Expired::SlowHead));
        sleep(SECOND).await;
        connections.ask_one_to_end();
        assert_eq!(within(&young, 0).await, Some(Expired::NoRequest));
        connections.ask_one_to_end();
        assert_eq!(within(&busy, 7200).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_comes_in_time_keeps_the_connection() {
        let connections = Connections::default();
        let activity = connection();
        let listed = connections.add(activity.clone());
        sleep(SECOND * 5).await;
        connections.ask_one_to_end();
        activity.asked_to_end().await;
        drop(activity.request(false));
        assert_eq!(within(&activity, 74).await, None);
        drop(listed);
        connections.ask_one_to_end();
        assert_eq!(within(&activity, 0).await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_closing_connection_has_less_time_when_others_wait() {
        let connections = Connections::default();
        let activity = connection();
        let _listed = connections.add(activity.clone());
        drop(activity.request(true));
        sleep(SECOND * 60).await;
        connections.ask_one_to_end();
        assert_eq!(within(&activity, 0).await, Some(Expired::Idle));
        activity.closing();
        assert_eq!(within(&activity, 1).await, None);
        assert_eq!(within(&activity, 2).await, Some(Expired::Idle));
    }

    #[tokio::test(start_paused = true)]
    async fn a_closing_connection_has_little_time() {
        let activity = connection();
        drop(activity.request(true));
        sleep(SECOND * 60).await;
        activity.closing();
        assert_eq!(within(&activity, 9).await, None);
        assert_eq!(within(&activity, 2).await, Some(Expired::Idle));
    }
}
