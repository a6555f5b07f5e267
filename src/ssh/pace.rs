//! How much is sent ahead of what a client has taken.
//!
//! Clients open a window of 2 MiB, which a reader that is slower than we are soon lets fill up. OpenSSH's client keeps what
//! waits in one buffer that it copies whenever it grows: 2 MiB of it cost 130 ms of processor time, as much as decrypting
//! 100 MB does. So a client that is near is sent no more than keeps it busy. One that is far away needs all of its window,
//! which is on its way then and does not wait.

use std::time::Duration;

/// What is sent ahead, beside what russh still has in its queue. libssh2, which cargo has, says what it took after each half a MiB.
const AHEAD: u64 = 640 << 10;
/// With [`AHEAD`], a client whose answers take longer could not be sent 1 Gbit/s.
const NEAR: Duration = Duration::from_millis(5);
/// The window of OpenSSH, libssh2 and most others. russh does not tell a window; it is guessed when a client first says
/// that it took something, as a multiple of `UNIT`. One that is believed to be smaller than it is lets more be sent ahead,
/// and one that is believed to be larger costs [`PATIENCE`] until more is.
const WINDOW: u64 = 2 << 20;
const UNIT: u64 = 1 << 20;
/// How long a client that has all this may say nothing: then it waits for more before it does. On a busy machine it is
/// some tens of milliseconds until it is its turn.
pub const PATIENCE: Duration = Duration::from_millis(100);

/// What is known of one channel, in bytes since its beginning.
pub struct Pace {
    sent: u64,
    taken: u64,
    /// The window that the client opened, once it can be told.
    window: Option<u64>,
    /// What may be sent and not be taken.
    ahead: u64,
}

impl Pace {
    /// For a client whose shortest answer took `way`, there and back.
    pub fn new(way: Duration) -> Self {
        Self {
            sent: 0,
            taken: 0,
            window: None,
            ahead: if way < NEAR { AHEAD } else { u64::MAX },
        }
    }

    /// Whether the client has enough for now.
    pub fn is_far_ahead(&self) -> bool {
        self.sent - self.taken >= self.ahead
    }

    /// What the client is known to have taken, which only grows.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes as u64;
    }

    /// The client took something: its window is `left` now.
    pub fn window_is(&mut self, left: u32) {
        let reach = self.sent + u64::from(left);
        let window = *self.window.get_or_insert((reach / UNIT * UNIT).min(WINDOW));
        let taken = reach.saturating_sub(window).min(self.sent);
        self.taken = self.taken.max(taken);
    }

    /// The client said nothing for [`PATIENCE`].
    pub fn was_too_little(&mut self) {
        self.ahead = self.ahead.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PIECE: u64 = 32 << 10;

    /// A client that says what it took after each `step`.
    struct Client {
        pace: Pace,
        taken: u64,
        told: u64,
        step: u64,
    }

    impl Client {
        fn new(step: u64) -> Self {
            Self {
                pace: Pace::new(Duration::from_micros(200)),
                taken: 0,
                told: 0,
                step,
            }
        }

        /// Sends it what may be sent, and gives how much that is ahead.
        fn fill(&mut self) -> u64 {
            while !self.pace.is_far_ahead() && self.pace.sent - self.told < WINDOW {
                self.pace.sent(PIECE as usize);
            }
            self.pace.sent - self.taken
        }

        /// Takes some of it, and gives whether it said so.
        fn take(&mut self, bytes: u64) -> bool {
            self.taken = (self.taken + bytes).min(self.pace.sent);
            let tells = self.taken - self.told >= self.step;
            if tells {
                self.told = self.taken;
                self.pace
                    .window_is((WINDOW + self.told - self.pace.sent) as u32);
            }
            tells
        }
    }

    #[test]
    fn a_client_that_is_near_is_never_given_more_than_it_needs() {
        for step in [3 * PIECE, WINDOW / 4] {
            let mut client = Client::new(step);
            for _ in 0..1000 {
                assert_eq!(client.fill().max(AHEAD), AHEAD);
                client.take(PIECE);
            }
            assert_eq!(client.taken, 1000 * PIECE);
        }
    }

    #[test]
    fn a_client_that_has_taken_everything_is_always_given_more() {
        let mut client = Client::new(WINDOW / 4);
        for _ in 0..100 {
            client.fill();
            assert!(client.take(WINDOW));
            assert!(!client.pace.is_far_ahead());
        }
    }

    #[test]
    fn a_client_that_says_nothing_is_given_more() {
        let mut client = Client::new(WINDOW / 2);
        client.fill();
        assert!(!client.take(WINDOW));
        assert!(client.pace.is_far_ahead());
        client.pace.was_too_little();
        client.fill();
        assert!(client.take(WINDOW));
        client.pace.was_too_little();
        assert_eq!(client.fill(), WINDOW);
    }

    #[test]
    fn a_client_far_away_is_given_its_window() {
        let mut client = Client::new(3 * PIECE);
        client.pace = Pace::new(NEAR);
        assert_eq!(client.fill(), WINDOW);
    }
}
