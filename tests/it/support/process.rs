//! Child processes that cannot outlive their limit in time.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What a finished process left.
pub struct Output {
    pub command: String,
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Output {
    /// Standard output as text without the newline at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Passes the output on if the process succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        assert!(self.status.success(), "{}", self.describe());
        self
    }

    /// Passes the output on if the process failed by itself.
    #[track_caller]
    pub fn failed(self) -> Self {
        assert!(
            !self.status.success(),
            "expected a failure: {}",
            self.describe()
        );
        self
    }

    pub fn describe(&self) -> String {
        format!(
            "{} → {}\n--- stdout\n{}\n--- stderr\n{}",
            self.command,
            self.status,
            self.text(),
            self.stderr
        )
    }
}

/// Runs `command` to its end with `stdin` as its input.
///
/// # Panics
/// When it cannot be started, or runs longer than `limit`: then its whole process group is stopped.
#[track_caller]
pub fn run(mut command: Command, stdin: &[u8], limit: Duration) -> Output {
    let shown = format!("{command:?}");
    // A group of its own: git starts helpers that hold the pipes open after git itself is gone.
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {shown}: {error}"));
    let (mut input, mut output, mut errors) = (
        child.stdin.take().unwrap(),
        child.stdout.take().unwrap(),
        child.stderr.take().unwrap(),
    );
    let stdin = stdin.to_vec();
    std::thread::spawn(move || input.write_all(&stdin));
    let output = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        output.read_to_end(&mut bytes).map(|_| bytes)
    });
    let errors = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        errors.read_to_end(&mut bytes).map(|_| bytes)
    });
    let begin = Instant::now();
    let (status, in_time) = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break (status, true);
        }
        if begin.elapsed() > limit {
            signal("KILL", &format!("-{}", child.id()));
            break (child.wait().unwrap(), false);
        }
        std::thread::sleep(Duration::from_millis(3));
    };
    let output = Output {
        command: shown,
        status,
        stdout: output.join().unwrap().unwrap_or_default(),
        stderr: String::from_utf8_lossy(&errors.join().unwrap().unwrap_or_default()).into_owned(),
    };
    assert!(
        in_time,
        "did not end within {limit:?}: {}",
        output.describe()
    );
    output
}

/// Sends a signal by its name, through the shell's own `kill`: nothing here is unsafe code.
pub fn signal(name: &str, process: &str) {
    // The target may just have ended by itself.
    let _ = Command::new("kill")
        .args(["-s", name, "--", process])
        .stderr(Stdio::null())
        .status();
}
