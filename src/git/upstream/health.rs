//! Whether a host answers, as far as those who ask it see.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::breaker::Breaker;

/// What is known of one host.
pub(super) struct Health {
    host: String,
    /// Open while the host takes questions and answers none: clients are not to wait for it one by one.
    hanging: Breaker,
    /// When it last sent anything.
    heard: Mutex<Option<Instant>>,
}

impl Health {
    pub fn new(host: &str) -> Self {
        Self {
            host: host.to_owned(),
            hanging: Breaker::default(),
            heard: Mutex::default(),
        }
    }

    /// Whether clients wait for what it answers.
    pub fn is_worth_waiting(&self) -> bool {
        self.hanging.allows()
    }

    /// It sends something. A refusal is an answer as well.
    pub fn heard(&self) {
        *self.last() = Some(Instant::now());
        if self.hanging.succeeded() {
            tracing::info!(upstream.host = self.host, "the upstream answers again");
        }
    }

    /// A question that was `asked` then got no answer for so long that it hangs. Where others were answered since, that is
    /// not the host.
    pub fn blame(&self, asked: Instant) {
        let is_heard = self.last().is_some_and(|heard| heard >= asked);
        if !is_heard && self.hanging.failed() {
            tracing::error!(
                upstream.host = self.host,
                "the upstream takes questions and answers none"
            );
        }
    }

    fn last(&self) -> MutexGuard<'_, Option<Instant>> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_answers_others_does_not_hang() {
        let health = Health::new("git.example.test");
        let asked = Instant::now();
        health.heard();
        for _ in 0..3 {
            health.blame(asked);
        }
        assert!(health.is_worth_waiting());
        let asked = Instant::now();
        health.blame(asked);
        assert!(health.is_worth_waiting(), "it may be that repository");
        health.blame(asked);
        assert!(!health.is_worth_waiting());
        health.heard();
        assert!(health.is_worth_waiting());
    }
}
