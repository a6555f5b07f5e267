//! What the tests stand on: upstreams, repositories, clients, and the service as a child process.

pub mod cgi;
pub mod client;
pub mod compare;
pub mod http;
pub mod pkt;
pub mod process;
pub mod registry;
pub mod repo;
pub mod ssh_door;
pub mod sshd;
pub mod tmpfs;
pub mod upstream;
pub mod warmdock;

pub use client::Client;
pub use repo::Repo;
pub use upstream::{Fault, Upstream};
pub use warmdock::Warmdock;

use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// The host under which the test's upstream is configured. Reserved by RFC 2606: never resolves.
pub const HOST: &str = "git.example.test";

/// The name of the sample repository below [`HOST`].
pub const SAMPLE: &str = "team/sample";

/// How long to wait for something that should be there in a moment. No test measures time: this only ends a hang.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A folder that is removed with its last owner. `KEEP_TEMPORARY=1` keeps it, to look at what a failed test left.
pub fn temporary_folder() -> tempfile::TempDir {
    let keep = std::env::var_os("KEEP_TEMPORARY").is_some();
    tempfile::Builder::new()
        .prefix("warmdock-test-")
        .disable_cleanup(keep)
        .tempdir()
        .unwrap()
}

/// Serves each connection in a thread of its own, with what `next` gives for it, until that gives nothing.
fn accept<S: Send + 'static>(
    listener: TcpListener,
    mut next: impl FnMut() -> Option<S> + Send + 'static,
    serve: fn(S, TcpStream),
) {
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Some(server) = next() else { return };
            std::thread::spawn(move || serve(server, stream));
        }
    });
}

/// Asks `probe` until it gives a value.
///
/// # Panics
/// After [`PATIENCE`], naming `what`.
#[track_caller]
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(
            begin.elapsed() < PATIENCE,
            "waited {PATIENCE:?} in vain for: {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
