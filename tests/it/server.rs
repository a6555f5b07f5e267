//! The listener: stopping, HTTP versions, pages beside the repositories.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::http::{self, connect};
use crate::support::process::{self, Output};
use crate::support::tmpfs::Tmpfs;
use crate::support::warmdock::{builder, target};
use crate::support::{
    Client, Fault, HOST, Repo, SAMPLE, Upstream, Warmdock, pkt, wait_for, warmdock,
};

/// Runs curl on the service's cleartext port.
fn curl(args: &[&str]) -> Output {
    let mut command = Command::new("curl");
    command
        .args(["--silent", "--show-error", "--max-time", "20"])
        .args(args);
    process::run(command, b"", Duration::from_secs(30))
}

#[test]
fn http_2_by_prior_knowledge() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let url = format!("{}/info/refs?service=git-upload-pack", warmdock.url(SAMPLE));
    for (option, version) in [("--http2-prior-knowledge", "2"), ("--http1.1", "1.1")] {
        let output = curl(&[
            option,
            "--write-out",
            "\n%{http_version} %{http_code}",
            &url,
        ])
        .ok();
        assert!(
            output.text().ends_with(&format!("\n{version} 200")),
            "{}",
            output.describe()
        );
        assert!(output.text().contains("refs/heads/main"));
    }
}

#[test]
fn pages_beside_the_repositories() {
    let (upstream, repo) = Upstream::with_sample();
    let warm = json!([format!("{HOST}/{SAMPLE}")]);
    let warmdock = builder(&upstream.url()).set("/git/warm", warm).start();
    warmdock.wait_mirrored(SAMPLE, &repo);
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
        .ok();
    for (target, kind) in [
        ("/healthz", "text/plain"),
        ("/readyz", "text/plain"),
        ("/", "text/html"),
        ("/metrics", "text"),
    ] {
        let response = http::get(warmdock.address(), target);
        assert_eq!(response.status, 200, "{target}");
        let found = response.header("content-type").unwrap_or_default();
        assert!(
            found.contains(kind) || found.contains("openmetrics"),
            "{target} {found}"
        );
    }
    assert!(
        http::get(warmdock.address(), "/").text().contains(SAMPLE),
        "the status page lists the mirrors"
    );
    assert_eq!(http::get(warmdock.address(), "/nothing/here").status, 404);
    let head = http::request(warmdock.address(), "HEAD", "/healthz", &[], b"");
    assert_eq!(head.status, 200);
    assert!(head.body.is_empty());
}

#[test]
fn metrics_count() {
    let (upstream, repo) = Upstream::with_sample();
    let warm = json!([format!("{HOST}/{SAMPLE}")]);
    let warmdock = builder(&upstream.url()).set("/git/warm", warm).start();
    warmdock.wait_mirrored(SAMPLE, &repo);
    let answers = || warmdock.metric(|name| name.contains("answers_total"));
    let before = answers();
    for _ in 0..3 {
        Client::new(2)
            .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
            .ok();
    }
    assert_eq!(answers() - before, 3.0, "{}", warmdock.metrics());
    assert!(warmdock.metric(|name| name.contains("fetches_total")) >= 1.0);
    assert!(warmdock.metric(|name| name.contains("requests_total")) >= 6.0);
    let staleness = format!("warmdock_git_mirror_staleness_seconds{{repo=\"{HOST}/{SAMPLE}\"}} ");
    assert!(warmdock.metrics().contains(&staleness), "{staleness}");
    assert!(warmdock.metric(|name| name.starts_with("warmdock_storage_bytes{")) > 0.0);
}

/// A clone that is under way when the stop signal comes is finished; nobody new is let in.
#[test]
fn stopping_does_not_cut_a_clone() {
    let upstream = Upstream::start();
    let size = 12 << 20;
    let repo = Repo::large(&upstream.path(SAMPLE), size);
    let mut warmdock = warmdock::over_files(&upstream);
    Client::new(2)
        .git(&["ls-remote", &warmdock.url(SAMPLE)])
        .ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    let (mut head, mut reader) = begin_clone(&warmdock, &repo.id("main"));
    warmdock.signal("TERM");
    wait_for("no more connections to be taken", || {
        TcpStream::connect(warmdock.address())
            .is_err()
            .then_some(())
    });
    http::read_body(&mut reader, &mut head);
    assert!(head.complete, "cut after {} bytes", head.body.len());
    let pack = pkt::pack_of(&head.body);
    assert!(pack.len() > size);
    assert!(warmdock.wait().success());
    // It is whole: git takes it.
    let client = Client::new(2);
    client.git(&["init", "--quiet", "--bare", "ours"]).ok();
    crate::support::client::git_at(
        &client.path("ours"),
        &["index-pack", "--stdin", "--strict"],
        &pack,
    )
    .ok();
}

/// Asks for everything and reads the head only.
fn begin_clone(warmdock: &Warmdock, want: &str) -> (http::Response, BufReader<TcpStream>) {
    let body = pkt::v2_clone(want);
    let mut stream = connect(warmdock.address());
    let head = format!(
        "POST {}/git-upload-pack HTTP/1.1\r\nHost: x\r\nGit-Protocol: version=2\r\nContent-Length: {}\r\n\
         Content-Type: application/x-git-upload-pack-request\r\n\r\n",
        target(SAMPLE),
        body.len()
    );
    stream
        .write_all(&[head.as_bytes(), &body].concat())
        .unwrap();
    let mut reader = BufReader::with_capacity(1024, stream);
    (http::read_head(&mut reader).expect("an answer"), reader)
}

#[test]
fn draining_has_an_end() {
    let upstream = Upstream::start();
    let repo = Repo::large(&upstream.path(SAMPLE), 12 << 20);
    let config = builder(&upstream.file_url()).set("/limits/drain_timeout", "1s");
    let mut warmdock = config.start();
    Client::new(2)
        .git(&["ls-remote", &warmdock.url(SAMPLE)])
        .ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    let (_head, reader) = begin_clone(&warmdock, &repo.id("main"));
    warmdock.signal("TERM");
    // The reader never reads on.
    warmdock.wait();
    drop(reader);
    assert!(
        warmdock.log().contains("connections cut"),
        "says that it gave up: {}",
        warmdock.log()
    );
}

#[test]
fn both_signals_stop_it_well() {
    let (upstream, _repo) = Upstream::with_sample();
    for signal in ["TERM", "INT"] {
        let mut warmdock = warmdock::over_files(&upstream);
        // A client that only keeps its connection open holds nobody up.
        let _idle = http::used_connection(warmdock.address());
        warmdock.signal(signal);
        assert!(warmdock.wait().success(), "{signal}: {}", warmdock.log());
    }
}

/// The port is open before anything is fetched; liveness and readiness differ only in what is broken.
#[test]
fn listens_before_it_warms() {
    let (upstream, repo) = Upstream::with_sample();
    upstream.fail(Fault::Hang);
    let warm = json!([format!("{HOST}/{SAMPLE}")]);
    let warmdock = builder(&upstream.url())
        .set("/git/warm", warm)
        // A first try that has given up is followed by another.
        .set("/git/refresh", json!("1s"))
        .start();
    assert_eq!(http::get(warmdock.address(), "/healthz").status, 200);
    upstream.release();
    warmdock.wait_mirrored(SAMPLE, &repo);
    wait_for("readiness", || {
        (http::get(warmdock.address(), "/readyz").status == 200).then_some(())
    });
}

/// A limit of open files that is below `limits.connections` is raised, where the system lets everybody do that.
#[test]
fn more_connections_than_open_files_at_first() {
    let folder = crate::support::temporary_folder();
    let file = folder.path().join("config.json");
    let data = folder.path().join("data");
    let config = json!({ "listen": { "http": "127.0.0.1:0" }, "data_dir": data });
    std::fs::write(&file, config.to_string()).unwrap();
    let serve = warmdock::command(&["serve", "--config", file.to_str().unwrap()]);
    let mut command = Command::new("sh");
    command
        .args(["-c", "ulimit -S -n 64 && exec \"$@\"", "sh"])
        .arg(serve.get_program())
        .args(serve.get_args())
        .env_clear()
        .envs(
            serve
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .stderr(Stdio::piped());
    let mut service = Killed(command.spawn().unwrap());
    let mut log = BufReader::new(service.0.stderr.take().unwrap()).lines();
    let address = log.by_ref().map_while(Result::ok).find_map(|line| {
        let event: Value = serde_json::from_str(&line).ok()?;
        event["address"].as_str()?.parse::<SocketAddr>().ok()
    });
    let address = address.expect("the event `listening`");
    let connections: Vec<_> = (0..100).map(|_| http::used_connection(address)).collect();
    drop(connections);
}

/// A process that ends with the test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn several_requests_on_one_connection() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let stream = connect(warmdock.address());
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let body = pkt::v2_clone(&repo.id("main"));
    for _ in 0..3 {
        let info = format!(
            "GET {}/info/refs?service=git-upload-pack HTTP/1.1\r\nHost: x\r\n\r\n",
            target(SAMPLE)
        );
        (&stream).write_all(info.as_bytes()).unwrap();
        let response = http::read_response(&mut reader).unwrap();
        assert!(response.status == 200 && response.complete);
        let head = format!(
            "POST {}/git-upload-pack HTTP/1.1\r\nHost: x\r\nGit-Protocol: version=2\r\nContent-Length: {}\r\n\
             Content-Type: application/x-git-upload-pack-request\r\nExpect: 100-continue\r\n\r\n",
            target(SAMPLE),
            body.len()
        );
        (&stream).write_all(head.as_bytes()).unwrap();
        assert_eq!(http::read_head(&mut reader).unwrap().status, 100);
        (&stream).write_all(&body).unwrap();
        let response = http::read_response(&mut reader).unwrap();
        assert!(response.status == 200 && response.complete);
        assert!(pkt::pack_of(&response.body).starts_with(b"PACK"));
    }
}

/// There may be as much of it as the disk holds. This cannot be removed at all, as something is mounted on it.
#[test]
fn nobody_waits_until_leftovers_are_removed() {
    let (upstream, _repo) = Upstream::with_sample();
    let Some(disk) = Tmpfs::mount("1m") else {
        return;
    };
    let mut warmdock = warmdock::over_files(&upstream);
    warmdock.stop();
    let answers = warmdock.data().join("answers");
    let leftovers = answers.join("leftovers");
    let mounted = Mounted::on(disk.path(), &answers.join("busy"), &leftovers.join("busy"));
    warmdock.start_again();
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
        .ok();
    warmdock.wait_log("leftovers that stay", |event| {
        event["message"] == "temporary files were not removed"
    });
    drop(mounted);
    warmdock.stop();
    warmdock.start_again();
    wait_for("the leftovers to be removed", || {
        (!leftovers.exists()).then_some(())
    });
}

/// A folder that is seen a second time, unmounted when dropped, wherever it has been moved.
struct Mounted([PathBuf; 2]);

impl Mounted {
    fn on(folder: &Path, place: &Path, moved: &Path) -> Self {
        std::fs::create_dir(place).unwrap();
        let mut mount = Command::new("mount");
        mount.arg("--bind").args([folder, place]);
        process::run(mount, b"", Duration::from_secs(10)).ok();
        Self([place, moved].map(Path::to_path_buf))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        for place in self.0.iter().filter(|place| place.exists()) {
            let _ = Command::new("umount").arg("-l").arg(place).status();
        }
    }
}
