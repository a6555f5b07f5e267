//! An upstream that fails is left alone for a while, so that builds do not wait for it one by one.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Failures in a row that open the breaker. One may be chance.
pub const FAILURES: u32 = 2;
/// How long nobody asks then. Short: when the upstream is back, what is new there should be seen.
pub const PAUSE: Duration = Duration::from_secs(15);

/// How long what failed so many `times` in a row is left alone: `first`, twice as long each time after that, and `longest`
/// at most.
pub fn growing_pause(first: Duration, times: u32, longest: Duration) -> Duration {
    (first * 2_u32.saturating_pow(times.saturating_sub(1).min(10))).min(longest)
}

/// Whether an upstream is asked at all.
#[derive(Default)]
pub struct Breaker(Mutex<State>);

#[derive(Default)]
struct State {
    failures: u32,
    /// While it is open.
    until: Option<Instant>,
}

impl Breaker {
    /// Whether the upstream may be asked. After a pause one may try, and the others go on waiting for what he learns.
    pub fn allows(&self) -> bool {
        self.allows_at(Instant::now())
    }

    fn allows_at(&self, now: Instant) -> bool {
        let mut state = self.state();
        match state.until {
            Some(until) if now < until => false,
            Some(_) => {
                state.until = Some(now + PAUSE);
                true
            }
            None => true,
        }
    }

    /// Whether it is open now.
    pub fn is_open(&self) -> bool {
        self.state().until.is_some()
    }

    /// The upstream answered. Returns whether the breaker was open until now.
    pub fn succeeded(&self) -> bool {
        std::mem::take(&mut *self.state()).until.is_some()
    }

    /// It did not. Returns whether the breaker is open since now.
    pub fn failed(&self) -> bool {
        self.failed_at(Instant::now())
    }

    fn failed_at(&self, now: Instant) -> bool {
        let mut state = self.state();
        // Some ask without looking at the breaker, and may fail all the time. Who is to try has his turn anyway.
        if state.until.is_some() {
            return false;
        }
        state.failures += 1;
        if state.failures < FAILURES {
            return false;
        }
        state.until = Some(now + PAUSE);
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_after_failures_in_a_row_and_lets_one_try() {
        let breaker = Breaker::default();
        assert!(!breaker.failed());
        assert!(!breaker.succeeded());
        assert!(!breaker.failed());
        assert!(breaker.allows());
        assert!(breaker.failed());
        assert!(!breaker.failed(), "open already");
        assert!(!breaker.allows() && breaker.is_open());
        let later = Instant::now() + PAUSE;
        assert!(breaker.allows_at(later));
        assert!(!breaker.allows_at(later), "one alone");
        assert!(breaker.succeeded());
        assert!(breaker.allows() && !breaker.is_open());
    }

    #[test]
    fn failures_while_it_is_open_do_not_keep_it_open() {
        let (breaker, begin) = (Breaker::default(), Instant::now());
        assert!(!breaker.failed_at(begin));
        assert!(breaker.failed_at(begin));
        for second in 1..PAUSE.as_secs() {
            let now = begin + Duration::from_secs(second);
            assert!(!breaker.failed_at(now) && !breaker.allows_at(now));
        }
        let until = begin + PAUSE;
        assert!(breaker.allows_at(until));
        // Nor does the failure of the one who tries then.
        assert!(!breaker.failed_at(until + PAUSE / 2));
        assert!(!breaker.allows_at(until + PAUSE / 2));
        assert!(breaker.allows_at(until + PAUSE));
    }
}
