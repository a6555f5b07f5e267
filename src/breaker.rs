//! An upstream that fails is left alone for a while, so that builds do not wait for it one by one.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Failures in a row that open the breaker. One may be chance.
const FAILURES: u32 = 2;
/// How long nobody asks then. Short: when the upstream is back, what is new there should be seen.
const PAUSE: Duration = Duration::from_secs(15);

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
        let mut state = self.state();
        state.failures += 1;
        if state.failures < FAILURES {
            return false;
        }
        let was_open = state.until.is_some();
        state.until = Some(Instant::now() + PAUSE);
        !was_open
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
}
