//! Whether a host knows its repositories by paths that end in `.git`. Most know them with it or do not care; Azure DevOps
//! and AWS CodeCommit know none with it, and where a folder is served either may be.

use std::sync::atomic::{AtomicBool, Ordering};

use super::UpstreamError;

/// What to put behind the path of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    Git,
    None,
}

impl Ending {
    pub fn text(self) -> &'static str {
        match self {
            Self::Git => ".git",
            Self::None => "",
        }
    }
}

/// What a host is asked for first: what it answered last.
#[derive(Default)]
pub(super) struct Endings {
    is_without: AtomicBool,
}

impl Endings {
    pub fn in_order(&self) -> [Ending; 2] {
        if self.is_without.load(Ordering::Relaxed) {
            [Ending::None, Ending::Git]
        } else {
            [Ending::Git, Ending::None]
        }
    }

    /// The host knew a repository by this.
    pub fn found(&self, ending: Ending) {
        self.is_without
            .store(ending == Ending::None, Ordering::Relaxed);
    }

    /// Asks once more where the host knows no repository by the first one. So what is not there costs it two questions, each
    /// time that it is asked; how often that is, is bounded by the pause after a failure.
    ///
    /// # Errors
    /// What it said to the first. To the second it may answer with a page for people, or want a login.
    pub fn ask<T>(
        &self,
        mut ask: impl FnMut(Ending) -> Result<T, UpstreamError>,
    ) -> Result<T, UpstreamError> {
        let [first, second] = self.in_order();
        match ask(first) {
            Err(UpstreamError::NotFound) => {}
            answer => return answer,
        }
        match ask(second) {
            Err(UpstreamError::Failed(_)) => Err(UpstreamError::NotFound),
            answer => {
                if answer.is_ok() {
                    self.found(second);
                }
                answer
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_right_is_asked_first() {
        let endings = Endings::default();
        let mut asked = Vec::new();
        let mut ask = |right: &[Ending]| {
            asked.clear();
            let answer = endings.ask(|ending| {
                asked.push(ending.text());
                right
                    .contains(&ending)
                    .then_some(())
                    .ok_or(UpstreamError::NotFound)
            });
            (answer.is_ok(), asked.clone())
        };
        assert_eq!(ask(&[Ending::Git]), (true, vec![".git"]));
        assert_eq!(ask(&[Ending::None]), (true, vec![".git", ""]));
        assert_eq!(ask(&[Ending::None]), (true, vec![""]));
        assert_eq!(ask(&[]), (false, vec!["", ".git"]));
        assert_eq!(ask(&[Ending::Git]), (true, vec!["", ".git"]));
        assert_eq!(ask(&[Ending::Git, Ending::None]), (true, vec![".git"]));
    }

    #[test]
    fn what_is_said_of_the_other_does_not_count() {
        let answer = Endings::default().ask(|ending| match ending {
            Ending::Git => Err(UpstreamError::NotFound),
            Ending::None => Err::<(), _>(UpstreamError::Failed("a page for people".to_owned())),
        });
        assert!(matches!(answer, Err(UpstreamError::NotFound)));
    }
}
