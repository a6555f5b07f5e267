//! Whether a host knows its repositories by paths that end in `.git`. Most know them with it or do not care; Azure DevOps
//! and AWS CodeCommit know none with it, and where a folder is served either may be.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

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

/// More are not remembered: they are asked for in vain once more.
const MOST_WITHOUT: usize = 10_000;

/// By which path a host knows a repository: with `.git`, unless it answered to that without. It is remembered for each, since
/// where both are there they can be two repositories, and a mirror is of one.
#[derive(Default)]
pub(super) struct Endings {
    without: Mutex<HashSet<String>>,
}

impl Endings {
    pub fn in_order(&self, path: &str) -> [Ending; 2] {
        if self.without().contains(path) {
            [Ending::None, Ending::Git]
        } else {
            [Ending::Git, Ending::None]
        }
    }

    /// The host knew the repository by this.
    pub fn found(&self, path: &str, ending: Ending) {
        let mut without = self.without();
        if ending == Ending::Git {
            without.remove(path);
        } else {
            if without.len() >= MOST_WITHOUT {
                without.clear();
            }
            without.insert(path.to_owned());
        }
    }

    fn without(&self) -> MutexGuard<'_, HashSet<String>> {
        self.without.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks once more where the host knows no repository by the first one. So what is not there costs it two questions, each
    /// time that it is asked; how often that is, is bounded by the pause after a failure.
    ///
    /// # Errors
    /// What it said to the first. To the second it may answer with a page for people, or want a login.
    pub fn ask<T>(
        &self,
        path: &str,
        mut ask: impl FnMut(Ending) -> Result<T, UpstreamError>,
    ) -> Result<T, UpstreamError> {
        let order = self.in_order(path);
        for ending in order {
            match ask(ending) {
                Err(UpstreamError::NotFound) => {}
                Err(UpstreamError::Failed(_)) if ending != order[0] => {}
                answer => {
                    if answer.is_ok() {
                        self.found(path, ending);
                    }
                    return answer;
                }
            }
        }
        Err(UpstreamError::NotFound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_right_is_asked_first() {
        let endings = Endings::default();
        let mut asked = Vec::new();
        let mut ask = |path: &str, right: &[Ending]| {
            asked.clear();
            let answer = endings.ask(path, |ending| {
                asked.push(ending.text());
                right
                    .contains(&ending)
                    .then_some(())
                    .ok_or(UpstreamError::NotFound)
            });
            (answer.is_ok(), asked.clone())
        };
        assert_eq!(ask("app", &[Ending::Git]), (true, vec![".git"]));
        assert_eq!(ask("app", &[Ending::None]), (true, vec![".git", ""]));
        assert_eq!(ask("app", &[Ending::None]), (true, vec![""]));
        assert_eq!(ask("other", &[Ending::Git]), (true, vec![".git"]));
        assert_eq!(ask("app", &[Ending::None]), (true, vec![""]));
        assert_eq!(ask("app", &[]), (false, vec!["", ".git"]));
        assert_eq!(ask("app", &[Ending::Git]), (true, vec!["", ".git"]));
        assert_eq!(
            ask("app", &[Ending::Git, Ending::None]),
            (true, vec![".git"])
        );
    }

    #[test]
    fn what_is_said_of_the_other_does_not_count() {
        let answer = Endings::default().ask("app", |ending| match ending {
            Ending::Git => Err(UpstreamError::NotFound),
            Ending::None => Err::<(), _>(UpstreamError::Failed("a page for people".to_owned())),
        });
        assert!(matches!(answer, Err(UpstreamError::NotFound)));
    }
}
