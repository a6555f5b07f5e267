//! The service under test: the built binary as a child process, with a configuration and a data folder of its own.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};

use super::client::git_at;
use super::process::{self, Output, signal};
use super::{HOST, PATIENCE, Repo, Upstream, http, wait_for};

/// What a test wants the service to be.
pub struct Builder {
    config: Value,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

/// A running service. Killed when dropped.
pub struct Warmdock {
    child: Child,
    address: SocketAddr,
    log: Arc<Log>,
    folder: Arc<tempfile::TempDir>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
}

/// The lines of standard error so far.
#[derive(Default)]
struct Log {
    lines: Mutex<Vec<String>>,
    more: Condvar,
    /// The process closed its standard error: nothing more will come.
    ended: AtomicBool,
}

/// A service whose only upstream is `url`, under the name [`HOST`].
pub fn builder(url: &str) -> Builder {
    Builder::new().set("/git/upstreams", json!([{ "host": HOST, "url": url }]))
}

impl Builder {
    fn new() -> Self {
        // What is old at once is refreshed before each answer: tests see new commits without waiting.
        let config = json!({
            "listen": { "http": "127.0.0.1:0" },
            "git": { "upstreams": [], "max_age": "0s", "refresh": "1h" },
            "access": { "anonymous": "read" },
        });
        Self {
            config,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// A service with exactly this configuration.
    pub fn of(config: Value) -> Self {
        Self {
            config,
            arguments: Vec::new(),
            environment: Vec::new(),
        }
    }

    /// Sets one key, named by its JSON pointer. Folders in between are made.
    pub fn set(mut self, pointer: &str, value: impl Into<Value>) -> Self {
        let mut place = &mut self.config;
        for key in pointer[1..].split('/') {
            if place.is_array() {
                place = &mut place[key.parse::<usize>().unwrap()];
            } else {
                place = &mut place[key];
            }
        }
        *place = value.into();
        self
    }

    pub fn argument(mut self, argument: &str) -> Self {
        self.arguments.push(argument.to_owned());
        self
    }

    pub fn environment(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Starts the service and waits until it listens.
    #[track_caller]
    pub fn start(mut self) -> Warmdock {
        let folder = Arc::new(crate::support::temporary_folder());
        if self.config["data_dir"].is_null() {
            self.config["data_dir"] = json!(folder.path().join("data"));
        }
        std::fs::write(folder.path().join("config.json"), self.config.to_string()).unwrap();
        launch(folder, self.arguments, self.environment)
    }
}

#[track_caller]
fn launch(
    folder: Arc<tempfile::TempDir>,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
) -> Warmdock {
    let config = folder.path().join("config.json");
    let mut command = command(&["serve", "--config", config.to_str().unwrap()]);
    command
        .args(&arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("warmdock starts");
    let log = Arc::new(Log::default());
    let (writer, errors) = (log.clone(), child.stderr.take().unwrap());
    std::thread::spawn(move || {
        for line in BufReader::new(errors).lines().map_while(Result::ok) {
            writer.lines().push(line);
            writer.more.notify_all();
        }
        writer.ended.store(true, Ordering::Release);
        writer.more.notify_all();
    });
    let address = ([0, 0, 0, 0], 0).into();
    let mut warmdock = Warmdock {
        child,
        address,
        log,
        folder,
        arguments,
        environment,
    };
    let listening = warmdock.wait_log("the event `listening`", |event| {
        event["message"] == "listening" && event["listener"] == "http"
    });
    warmdock.address = listening["address"]
        .as_str()
        .expect("an address")
        .parse()
        .expect("an address with its port");
    warmdock
}

/// The program with nothing of this machine's environment but its path, not yet run.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_warmdock"));
    command.env_clear().args(arguments);
    for name in ["PATH", "LLVM_PROFILE_FILE", "RUST_BACKTRACE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// Runs the program to its end.
#[track_caller]
pub fn run(arguments: &[&str]) -> Output {
    process::run(command(arguments), b"", Duration::from_secs(20))
}

impl Warmdock {
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the SSH door is.
    #[track_caller]
    pub fn ssh_address(&self) -> SocketAddr {
        let listening = self.wait_log("the event `listening` for SSH", |event| {
            event["message"] == "listening" && event["listener"] == "ssh"
        });
        listening["address"].as_str().unwrap().parse().unwrap()
    }

    /// Where a client finds a repository of [`HOST`] over SSH.
    #[track_caller]
    pub fn ssh_url(&self, name: &str) -> String {
        format!("ssh://git@{}/{HOST}/{name}.git", self.ssh_address())
    }

    /// Where a client finds a repository of [`HOST`].
    pub fn url(&self, name: &str) -> String {
        format!("http://{}{}", self.address, target(name))
    }

    /// The address of [`HOST`]'s repositories, for another service behind this one.
    pub fn as_upstream(&self) -> String {
        format!("http://{}/git/{HOST}", self.address)
    }

    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    /// The configuration file.
    pub fn config_file(&self) -> PathBuf {
        self.folder.path().join("config.json")
    }

    /// The configuration as it is in the file.
    pub fn config(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.config_file()).unwrap()).unwrap()
    }

    /// Replaces the configuration file, by renaming as careful people do.
    pub fn write_config(&self, text: &str) {
        let new = self.folder.path().join("config.json.new");
        std::fs::write(&new, text).unwrap();
        std::fs::rename(new, self.config_file()).unwrap();
    }

    /// The folder of a mirror.
    pub fn mirror(&self, name: &str) -> PathBuf {
        self.data()
            .join("git")
            .join(HOST)
            .join(format!("{name}.git"))
    }

    /// Waits until the mirror of a repository has the references of its upstream: clones are then the service's own
    /// work and not passed through.
    #[track_caller]
    pub fn wait_mirrored(&self, name: &str, upstream: &Repo) {
        let namespaces = ["refs/heads", "refs/tags"];
        let expected = upstream.git(&[&["for-each-ref"], &namespaces[..]].concat());
        wait_for("the mirror to have the references of the upstream", || {
            let mirror = self.mirror(name);
            mirror.join("HEAD").is_file().then_some(())?;
            let refs = git_at(&mirror, &[&["for-each-ref"], &namespaces[..]].concat(), b"");
            (refs.status.success() && refs.text() == expected).then_some(())
        });
        // Its files are there a moment before it is in service.
        if self.config()["listen"]["tls"].is_null() {
            // Nobody sees the names of those that only some may read.
            let names = [format!("{HOST}/{name}"), "other".to_owned()];
            let samples = names
                .map(|name| format!("warmdock_git_mirror_staleness_seconds{{repo=\"{name}\"}}"));
            wait_for("the mirror to be in service", || {
                let metrics = self.metrics();
                let is_there = |sample: &String| metrics.contains(sample);
                samples.iter().any(is_there).then_some(())
            });
        }
    }

    /// Whether a mirror holds what nothing reaches, or held that until packs were consolidated.
    pub fn has_had_garbage(&self, name: &str) -> bool {
        self.mirror(name).join("warmdock-garbage").exists()
            || self.log().contains("consolidated packs")
    }

    /// `git fsck --strict` over a mirror, by stock git.
    #[track_caller]
    pub fn fsck_mirror(&self, name: &str) {
        let mut tries = 3;
        loop {
            let packs = self.packs(name);
            let output = git_at(
                &self.mirror(name),
                &["fsck", "--strict", "--full", "--no-dangling"],
                b"",
            );
            tries -= 1;
            // Packs that were consolidated meanwhile vanish under git's hands.
            if tries > 0 && self.packs(name) != packs {
                continue;
            }
            let output = output.ok();
            assert!(!output.stderr.contains("error"), "{}", output.describe());
            return;
        }
    }

    /// The files with packs of a mirror.
    pub fn packs(&self, name: &str) -> Vec<PathBuf> {
        files_below(&self.mirror(name))
            .into_iter()
            .filter(|path| path.extension().is_some_and(|e| e == "pack"))
            .collect()
    }

    /// All lines of the log so far.
    pub fn log(&self) -> String {
        self.log.lines().join("\n")
    }

    /// Waits for an event in the log.
    #[track_caller]
    pub fn wait_log(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Value {
        self.log.wait(what, matches)
    }

    /// The text of `/metrics`.
    #[track_caller]
    pub fn metrics(&self) -> String {
        let response = http::get(self.address, "/metrics");
        assert_eq!(response.status, 200, "{}", response.text());
        response.text()
    }

    /// The sum over all samples of the metrics whose name and labels `matches`.
    #[track_caller]
    pub fn metric(&self, matches: impl Fn(&str) -> bool) -> f64 {
        let text = self.metrics();
        let samples = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| line.rsplit_once(' '));
        samples
            .filter(|(name, _)| matches(name))
            .filter_map(|(_, value)| value.parse::<f64>().ok())
            .sum()
    }

    /// The most bytes that it has ever had in memory since it was started.
    #[track_caller]
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|peak| peak.trim().strip_suffix(" kB"));
        kib.expect("a peak").parse::<u64>().unwrap() << 10
    }

    pub fn signal(&self, name: &str) {
        signal(name, &self.child.id().to_string());
    }

    /// Waits for the end of the process.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait_for("the service to end", || self.child.try_wait().unwrap());
        self.wait_log_ended();
        status
    }

    fn wait_log_ended(&self) {
        wait_for("the last line of the log", || {
            self.log.ended.load(Ordering::Acquire).then_some(())
        });
    }

    /// Stops it as an orchestrator does, and expects that it ends well.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal("TERM");
        let status = self.wait();
        assert!(status.success(), "stopped with {status}:\n{}", self.log());
    }

    /// Stops it as a power failure does.
    pub fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if !std::thread::panicking() {
            self.wait_log_ended();
        }
    }

    /// From now on the kernel ends it, as [`Warmdock::kill9`] does, when it has written this many bytes of a file and
    /// wants to write more.
    pub fn end_after_writing(&self, bytes: u64) {
        // The signal would also leave an image of its memory, in the folder of whoever runs the tests.
        for (resource, most) in [(Resource::Core, 0), (Resource::Fsize, bytes)] {
            let limit = Rlimit {
                current: Some(most),
                maximum: Some(most),
            };
            prlimit(Some(Pid::from_child(&self.child)), resource, limit).unwrap();
        }
    }

    /// Starts it again on the same data and the configuration file as it is now.
    #[track_caller]
    pub fn start_again(&mut self) {
        let again = launch(
            self.folder.clone(),
            self.arguments.clone(),
            self.environment.clone(),
        );
        *self = again;
    }
}

impl Drop for Warmdock {
    fn drop(&mut self) {
        self.kill9();
        if std::thread::panicking() {
            eprintln!("--- end of the log of warmdock\n{}", self.log.end());
        }
    }
}

/// So much of the end of a log is shown.
const LINES_SHOWN: usize = 200;

impl Log {
    /// What a person who looks for the reason of a failure reads: where it is shown, the beginning of what is long may be all
    /// that is left of it.
    fn end(&self) -> String {
        let lines = self.lines();
        let ours = lines
            .iter()
            .filter(|line| !line.contains(r#""target":"russh"#));
        let ours: Vec<_> = ours.map(String::as_str).collect();
        ours[ours.len().saturating_sub(LINES_SHOWN)..].join("\n")
    }

    /// Also when a test has failed while it looked at them.
    fn lines(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[track_caller]
    fn wait(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Value {
        let begin = Instant::now();
        let mut lines = self.lines();
        let mut seen = 0;
        loop {
            for line in &lines[seen..] {
                match serde_json::from_str(line) {
                    Ok(event) if matches(&event) => return event,
                    _ => {}
                }
            }
            seen = lines.len();
            assert!(
                !self.ended.load(Ordering::Acquire),
                "the service ended before {what}"
            );
            assert!(
                begin.elapsed() < PATIENCE,
                "waited in vain for {what} in the log"
            );
            lines = self
                .more
                .wait_timeout(lines, Duration::from_millis(200))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// The path of a repository of [`HOST`] in a request.
pub fn target(name: &str) -> String {
    format!("/git/{HOST}/{name}.git")
}

/// Every file below a folder.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => files.extend(files_below(&entry.path())),
            _ => files.push(entry.path()),
        }
    }
    files
}

/// A service over a folder of repositories on disk: it has mirrors only, there is nobody to pass a request through to.
#[track_caller]
pub fn over_files(upstream: &Upstream) -> Warmdock {
    builder(&upstream.file_url()).start()
}

/// A service over an HTTP upstream.
#[track_caller]
pub fn over_http(upstream: &Upstream) -> Warmdock {
    builder(&upstream.url()).start()
}
