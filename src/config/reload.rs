//! Takes over a changed configuration while the service runs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::{error, info, warn};

use super::problem::Problems;
use super::reader::Reader;
use super::source::Source;
use super::{Config, restart, warnings};

/// How often the files are looked at. A few small files: cheaper than what a watch of the file system misses, which is
/// bind mounts, network file systems and the links that Kubernetes swaps.
const PERIOD: Duration = Duration::from_secs(2);

/// Keeps the configuration that holds, and what it was read from.
pub struct Reload {
    source: Source,
    reader: Reader,
    current: Arc<Config>,
}

/// What became of a new configuration.
#[derive(Debug)]
pub enum Outcome {
    /// It holds now, except for these keys, which wait for a restart.
    Applied(Arc<Config>, Vec<&'static str>),
    /// It is wrong and the old one stays.
    Refused(Problems),
}

impl Reload {
    /// Loads the configuration for the first time.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn first(source: Source) -> Result<Self, Problems> {
        let mut reader = Reader::default();
        let current = Arc::new(source.load(&mut reader)?);
        Ok(Self {
            source,
            reader,
            current,
        })
    }

    /// The configuration that holds.
    pub fn current(&self) -> &Arc<Config> {
        &self.current
    }

    /// Loads again if one of the files has another content.
    pub fn look(&mut self) -> Option<Outcome> {
        self.reader.changed().then(|| self.load())
    }

    /// Loads again.
    pub fn load(&mut self) -> Outcome {
        // A new reader, so that a wrong configuration is looked at again when one of *its* files changes.
        self.reader = Reader::default();
        match self.source.load(&mut self.reader) {
            Ok(mut config) => {
                let waiting = restart::keep(&self.current, &mut config);
                self.current = Arc::new(config);
                Outcome::Applied(Arc::clone(&self.current), waiting)
            }
            Err(problems) => Outcome::Refused(problems),
        }
    }

    /// Follows changes of the files and SIGHUP in a task of its own, until nobody holds the receiver any more.
    ///
    /// # Errors
    /// When SIGHUP cannot be listened to.
    pub fn follow(mut self) -> io::Result<watch::Receiver<Arc<Config>>> {
        let (sender, receiver) = watch::channel(Arc::clone(&self.current));
        let mut hangup = signal(SignalKind::hangup())?;
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(PERIOD);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                let asked = tokio::select! {
                    _ = sender.closed() => return,
                    _ = ticks.tick() => false,
                    _ = hangup.recv() => true,
                };
                // Reading files may block for as long as a network file system likes.
                let work = tokio::task::spawn_blocking(move || {
                    let outcome = if asked {
                        Some(self.load())
                    } else {
                        self.look()
                    };
                    (self, outcome)
                });
                let outcome;
                (self, outcome) = match work.await {
                    Ok(done) => done,
                    Err(error) => {
                        error!(%error, "the configuration is not followed any more; restart to change it");
                        return;
                    }
                };
                match outcome {
                    Some(Outcome::Applied(config, waiting)) => {
                        log_applied(&self.source, &config, &waiting);
                        sender.send_replace(config);
                    }
                    Some(Outcome::Refused(problems)) => log_refused(&self.source, &problems),
                    None => {}
                }
            }
        });
        Ok(receiver)
    }
}

fn log_applied(source: &Source, config: &Config, waiting: &[&str]) {
    info!(config = %source, "configuration reloaded");
    for key in waiting {
        warn!(config = %source, key, "{key} has changed, which needs a restart; until then the old value holds");
    }
    for warning in warnings::warnings(config) {
        warn!(config = %source, "{warning}");
    }
}

fn log_refused(source: &Source, problems: &Problems) {
    for problem in problems.iter() {
        error!(config = %source, key = problem.key, "the new configuration is wrong, the old one stays: {problem}");
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::super::environment::Environment;
    use super::*;

    struct Files {
        folder: tempfile::TempDir,
    }

    impl Files {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("token"), "one\n").unwrap();
            Self { folder }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.folder.path().join(name)
        }

        fn write(&self, max_age: &str) {
            let text = format!(
                r#"{{"git": {{"max_age": "{max_age}"}}, "access": {{"tokens": [{{"name": "ci", "token_file": {:?}}}]}}}}"#,
                self.path("token")
            );
            std::fs::write(self.path("config.json"), text).unwrap();
        }

        fn reload(&self) -> Reload {
            Reload::first(Source::find(
                Some(self.path("config.json")),
                Environment::default(),
            ))
            .unwrap()
        }
    }

    #[test]
    fn nothing_happens_while_nothing_changes() {
        let files = Files::new();
        files.write("10s");
        let mut reload = files.reload();
        assert!(reload.look().is_none());
        files.write("10s");
        assert!(reload.look().is_none(), "the same content, written again");
    }

    #[test]
    fn a_wrong_file_keeps_the_old_configuration() {
        let files = Files::new();
        files.write("10s");
        let mut reload = files.reload();
        files.write("soon");
        let Some(Outcome::Refused(problems)) = reload.look() else {
            panic!("not refused")
        };
        assert!(
            problems
                .to_string()
                .starts_with("git.max_age: found \"soon\"; expected a duration"),
            "{problems}"
        );
        assert_eq!(reload.current().git.max_age, Duration::from_secs(10));
        assert!(reload.look().is_none(), "said once");
        files.write("20s");
        assert!(
            matches!(reload.look(), Some(Outcome::Applied(config, _)) if config.git.max_age.as_secs() == 20)
        );
    }

    #[test]
    fn a_named_file_is_followed() {
        let files = Files::new();
        files.write("10s");
        let mut reload = files.reload();
        std::fs::write(files.path("token"), "two").unwrap();
        let Some(Outcome::Applied(config, _)) = reload.look() else {
            panic!("not applied")
        };
        assert_eq!(config.access.tokens[0].secret.expose(), b"two");
        std::fs::remove_file(files.path("token")).unwrap();
        assert!(matches!(reload.look(), Some(Outcome::Refused(_))));
        assert_eq!(reload.current().access.tokens[0].secret.expose(), b"two");
        std::fs::write(files.path("token"), "three").unwrap();
        let Some(Outcome::Applied(config, _)) = reload.look() else {
            panic!("not applied")
        };
        assert_eq!(config.access.tokens[0].secret.expose(), b"three");
    }

    /// Kubernetes mounts `config.json -> ..data/config.json` and swaps the link `..data`.
    #[test]
    fn a_swapped_link_is_followed() {
        let files = Files::new();
        for (version, max_age) in [("v1", "10s"), ("v2", "20s")] {
            std::fs::create_dir(files.path(version)).unwrap();
            let text = format!(r#"{{"git": {{"max_age": "{max_age}"}}}}"#);
            std::fs::write(files.path(version).join("config.json"), text).unwrap();
        }
        let link = |to: &str| {
            std::os::unix::fs::symlink(to, files.path("new")).unwrap();
            std::fs::rename(files.path("new"), files.path("..data")).unwrap();
        };
        link("v1");
        std::os::unix::fs::symlink(Path::new("..data/config.json"), files.path("config.json"))
            .unwrap();
        let mut reload = files.reload();
        link("v2");
        assert!(
            matches!(reload.look(), Some(Outcome::Applied(config, _)) if config.git.max_age.as_secs() == 20)
        );
    }

    #[test]
    fn what_needs_a_restart_is_named_and_waits() {
        let files = Files::new();
        std::fs::write(files.path("config.json"), "{}").unwrap();
        let mut reload = files.reload();
        let text = r#"{"listen": {"http": "127.0.0.1:9"}, "data_dir": "/x", "git": {"first_clones": 3, "refresh": "1m"},
            "limits": {"connections": 7, "packs_per_repo": 7, "packs_queue_per_repo": 7, "pack_threads": 7}}"#;
        std::fs::write(files.path("config.json"), text).unwrap();
        let old = Arc::clone(reload.current());
        let Some(Outcome::Applied(config, waiting)) = reload.look() else {
            panic!("not applied")
        };
        let keys = [
            "listen.http",
            "data_dir",
            "git.first_clones",
            "limits.connections",
            "limits.packs_per_repo",
            "limits.packs_queue_per_repo",
            "limits.pack_threads",
        ];
        assert_eq!(waiting, keys);
        assert_eq!(
            (config.listen.http, &config.data_dir),
            (old.listen.http, &old.data_dir)
        );
        assert_eq!(config.limits.connections, old.limits.connections);
        assert_eq!(
            config.git.refresh,
            Duration::from_secs(60),
            "the rest is taken over"
        );
    }

    #[test]
    fn a_certificate_is_followed_and_tls_itself_waits() {
        let files = Files::new();
        let write_pair = || {
            let made = rcgen::generate_simple_self_signed(["localhost".to_string()]).unwrap();
            std::fs::write(files.path("crt"), made.cert.pem()).unwrap();
            std::fs::write(files.path("key"), made.signing_key.serialize_pem()).unwrap();
        };
        write_pair();
        let (cert, key) = (files.path("crt"), files.path("key"));
        let text = format!(r#"{{"listen": {{"tls": {{"cert": {cert:?}, "key": {key:?}}}}}}}"#);
        std::fs::write(files.path("config.json"), &text).unwrap();
        let mut reload = files.reload();
        let shown = |reload: &Reload| {
            let tls = reload.current().listen.tls.as_ref().unwrap();
            tls.identity.certified_key().cert.clone()
        };
        let first = shown(&reload);

        let old_cert = std::fs::read(&cert).unwrap();
        write_pair();
        std::fs::write(&cert, old_cert).unwrap();
        let Some(Outcome::Refused(problems)) = reload.look() else {
            panic!("not refused")
        };
        let wrong =
            format!("listen.tls.key: found {key:?}, which does not belong to the certificate");
        assert!(problems.to_string().starts_with(&wrong), "{problems}");
        assert_eq!(shown(&reload), first);

        write_pair();
        assert!(matches!(reload.look(), Some(Outcome::Applied(_, waiting)) if waiting.is_empty()));
        assert_ne!(shown(&reload), first);

        std::fs::write(files.path("config.json"), "{}").unwrap();
        let Some(Outcome::Applied(config, waiting)) = reload.look() else {
            panic!("not applied")
        };
        assert_eq!(waiting, ["listen.tls"]);
        assert!(config.listen.tls.is_some());
    }

    #[test]
    fn the_embedded_default_can_be_loaded_again() {
        let mut reload = Reload::first(Source::find(None, Environment::default())).unwrap();
        assert!(matches!(reload.load(), Outcome::Applied(_, waiting) if waiting.is_empty()));
    }
}
