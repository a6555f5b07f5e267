//! The second tier, on a server that really speaks S3 and checks signatures: s3s-fs.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

use crate::crates_cache::{memory_at_rest, over};
use crate::support::http::Request;
use crate::support::registry::{Fault, Of, Published, Registry, noise};
use crate::support::warmdock::files_below;
use crate::support::{Warmdock, http, wait_for};

/// An S3 server with the bucket `warm`, until dropped.
struct S3 {
    child: Child,
    folder: tempfile::TempDir,
    port: u16,
}

impl S3 {
    fn start() -> Self {
        let folder = crate::support::temporary_folder();
        std::fs::create_dir(folder.path().join("warm")).unwrap();
        // It cannot tell which port it got.
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let child = run(folder.path(), port);
        let s3 = Self {
            child,
            folder,
            port,
        };
        s3.wait();
        s3
    }

    fn wait(&self) {
        wait_for("the S3 server", || {
            std::net::TcpStream::connect(("127.0.0.1", self.port)).ok()
        });
    }

    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn start_again(&mut self) {
        self.child = run(self.folder.path(), self.port);
        self.wait();
    }

    /// The file of an object.
    fn object(&self, file: &Published) -> Option<PathBuf> {
        let all = files_below(&self.folder.path().join("warm"));
        all.into_iter().find(|path| path.ends_with(&file.checksum))
    }

    #[track_caller]
    fn wait_object(&self, file: &Published) -> PathBuf {
        wait_for("the object in the bucket", || {
            let path = self.object(file)?;
            (path.metadata().ok()?.len() == file.bytes.len() as u64).then_some(path)
        })
    }

    fn config(&self, secret: &str) -> Value {
        config_at(
            ([127, 0, 0, 1], self.port).into(),
            self.folder.path(),
            secret,
        )
    }

    fn warmdock(&self, registry: &Registry) -> Warmdock {
        over(registry)
            .set("/storage", json!({ "s3": self.config("secret-3f7a") }))
            .start()
    }
}

/// A bucket at this address, with keys in files in `folder`.
fn config_at(address: SocketAddr, folder: &Path, secret: &str) -> Value {
    let key = |name: &str, content: &str| {
        let path = folder.join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    json!({
        "bucket": "warm", "endpoint": format!("http://{address}"), "prefix": "team/dock",
        "access_key_file": key("access", "access-id"), "secret_key_file": key(secret, secret),
    })
}

/// A server that says what no well-behaved one would. `answer` answers each request.
fn ill_server(answer: impl Fn(&Request, &TcpStream) + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Arc::new(answer);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            std::thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                while let Some(request) = Request::read(&mut reader) {
                    answer(&request, &stream);
                }
            });
        }
    });
    address
}

impl Drop for S3 {
    fn drop(&mut self) {
        self.stop();
    }
}

fn run(folder: &Path, port: u16) -> Child {
    let mut command = Command::new("s3s-fs");
    command.args(["--host", "127.0.0.1", "--port", &port.to_string()]);
    command.args(["--access-key", "access-id", "--secret-key", "secret-3f7a"]);
    command
        .arg(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().expect("s3s-fs starts")
}

#[track_caller]
fn is_whole(warmdock: &Warmdock, file: &Published) {
    let response = http::get(warmdock.address(), &format!("/crates/corp/{}", file.path()));
    assert_eq!(response.status, 200, "{}", response.text());
    assert!(response.complete && response.body == file.bytes);
}

fn counted(warmdock: &Warmdock, result: &str) -> f64 {
    let name = format!("warmdock_second_tier_files_total{{result=\"{result}\"}}");
    warmdock.metric(|found| found == name)
}

#[test]
fn what_one_has_fetched_the_others_have() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(1_000_000, 1));
    let s3 = S3::start();
    let first = s3.warmdock(&registry);
    is_whole(&first, &file);
    let object = s3.wait_object(&file);
    let shown = object.to_string_lossy().into_owned();
    assert!(shown.contains("/warm/team/dock/corp-"), "{shown}");
    wait_for("the count", || {
        (counted(&first, "written") == 1.0).then_some(())
    });
    registry.fail(Of::Files, Fault::CutOff);
    let second = s3.warmdock(&registry);
    is_whole(&second, &file);
    assert_eq!(
        (counted(&first, "miss"), counted(&second, "hit")),
        (1.0, 1.0)
    );
    for text in [first.log(), second.log(), second.metrics()] {
        assert!(!text.contains("secret-3f7a") && !text.contains("access-id"));
    }
}

/// Files that are fetched while the bucket is away.
fn five_files(registry: &Registry, warmdock: &Warmdock) -> Vec<Published> {
    let files: Vec<_> = (0..5)
        .map(|number| {
            let version = format!("1.0.{number}");
            registry.publish_bytes("big", &version, &[], noise(100_000, number))
        })
        .collect();
    for file in &files {
        is_whole(warmdock, file);
    }
    // After two reads no more are tried: two files are not written then, and come behind the others.
    wait_for("the bucket to be left alone", || {
        (counted(warmdock, "failed") >= 4.0).then_some(())
    });
    files
}

/// The bucket gets what was fetched while it was away.
#[test]
fn what_waits_for_it_is_written_when_it_is_back() {
    let registry = Registry::start();
    let mut s3 = S3::start();
    let warmdock = s3.warmdock(&registry);
    s3.stop();
    let files = five_files(&registry, &warmdock);
    s3.start_again();
    for file in &files {
        s3.wait_object(file);
    }
    assert_eq!(counted(&warmdock, "dropped"), 0.0);
    wait_for("the count", || {
        (counted(&warmdock, "written") == 5.0).then_some(())
    });
}

/// Nor does a stop lose what waits.
#[test]
fn what_waits_for_it_is_written_at_a_stop() {
    let registry = Registry::start();
    let mut s3 = S3::start();
    let mut warmdock = s3.warmdock(&registry);
    s3.stop();
    let files = five_files(&registry, &warmdock);
    s3.start_again();
    warmdock.stop();
    for file in &files {
        assert!(s3.object(file).is_some(), "{}", file.version);
    }
}

/// What was not written before a crash is written when it is used again, and what the bucket has is not.
#[test]
fn what_a_crash_kept_from_it_is_written_later() {
    let registry = Registry::start();
    let mut s3 = S3::start();
    let mut warmdock = s3.warmdock(&registry);
    let [there, lost] = [0, 1].map(|number| {
        let version = format!("1.0.{number}");
        registry.publish_bytes("big", &version, &[], noise(100_000, number))
    });
    let changed = |path: &Path| path.metadata().unwrap().modified().unwrap();
    is_whole(&warmdock, &there);
    let written = changed(&s3.wait_object(&there));
    s3.stop();
    is_whole(&warmdock, &lost);
    wait_for("both to be kept", || {
        let kept = files_below(&warmdock.data().join("blobs"));
        let has = |file: &Published| kept.iter().any(|path| path.ends_with(&file.checksum));
        (has(&there) && has(&lost)).then_some(())
    });
    warmdock.kill9();
    s3.start_again();
    warmdock.start_again();
    registry.fail(Of::Files, Fault::CutOff);
    for file in [&there, &lost] {
        is_whole(&warmdock, file);
    }
    s3.wait_object(&lost);
    assert_eq!(changed(&s3.wait_object(&there)), written);
}

#[test]
fn what_there_is_no_room_for_is_passed_through() {
    let registry = Registry::start();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(1_000_000, 1));
    let s3 = S3::start();
    let first = s3.warmdock(&registry);
    is_whole(&first, &file);
    s3.wait_object(&file);
    let storage = json!({ "s3": s3.config("secret-3f7a"), "max_size": "200000B" });
    let second = over(&registry).set("/storage", storage).start();
    for _ in 0..2 {
        is_whole(&second, &file);
    }
    assert!(counted(&second, "hit") >= 1.0);
}

#[test]
fn its_failure_fails_no_build() {
    let registry = Registry::start();
    let publish = |number: u64| {
        registry.publish_bytes("big", &format!("1.0.{number}"), &[], noise(100_000, number))
    };
    let mut s3 = S3::start();
    let first = s3.warmdock(&registry);
    let damaged = publish(0);
    is_whole(&first, &damaged);
    // What somebody damaged in the bucket is not believed.
    let object = s3.wait_object(&damaged);
    let mut bytes = damaged.bytes.clone();
    bytes[50_000] ^= 1;
    std::fs::write(object, bytes).unwrap();
    let second = s3.warmdock(&registry);
    is_whole(&second, &damaged);
    assert_eq!(registry.asked_for("/files/big/1.0.0"), 2);
    // It is away.
    s3.stop();
    for number in 1..5 {
        is_whole(&second, &publish(number));
    }
    assert!(counted(&second, "failed") > 0.0);
    // Keys that are wrong.
    s3.start_again();
    let third = over(&registry)
        .set("/storage", json!({ "s3": s3.config("wrong") }))
        .start();
    let file = publish(9);
    is_whole(&third, &file);
    third.wait_log("the reason", |event| {
        event["message"]
            .as_str()
            .is_some_and(|message| message.contains("storage.s3"))
    });
    assert!(s3.object(&file).is_none());
}

/// They are in memory until they are checked and on disk.
#[test]
fn files_of_a_bucket_have_a_bounded_part_of_memory() {
    const FILES: usize = 16;
    const SIZE: usize = 24 << 20;
    let asked = Arc::new(AtomicUsize::new(0));
    let goes_on = Arc::new(AtomicBool::new(true));
    let (counted, held) = (Arc::clone(&asked), Arc::clone(&goes_on));
    // All but the end comes, and what comes is wrong.
    let bucket = ill_server(move |request, mut stream| {
        if request.method != "GET" {
            return;
        }
        let date = "Tue, 01 Jan 2030 00:00:00 GMT";
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {SIZE}\r\netag: \"x\"\r\nlast-modified: {date}\r\n\r\n"
        );
        let sent = stream.write_all(head.as_bytes());
        counted.fetch_add(1, Ordering::Relaxed);
        // Nobody reads it any more, at the end.
        let _ = sent.and_then(|()| stream.write_all(&vec![7; SIZE - 1]));
        while held.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = stream.shutdown(std::net::Shutdown::Both);
    });
    let registry = Registry::start();
    let files = (0..FILES as u64).map(|number| {
        registry.publish_bytes(&format!("crate{number}"), "1.0.0", &[], noise(1000, number))
    });
    let files = Vec::from_iter(files);
    let folder = crate::support::temporary_folder();
    let s3 = config_at(bucket, folder.path(), "secret");
    let warmdock = over(&registry).set("/storage", json!({ "s3": s3 })).start();
    std::thread::scope(|scope| {
        for file in &files {
            scope.spawn(|| is_whole(&warmdock, file));
        }
        wait_for("the bucket to be asked for all", || {
            (asked.load(Ordering::Relaxed) == FILES).then_some(())
        });
        let memory = memory_at_rest(&warmdock);
        goes_on.store(false, Ordering::Relaxed);
        assert!(memory < 200e6, "{memory} bytes");
    });
}

/// Each file that is not here would wait for that.
#[test]
fn a_bucket_that_answers_slowly_is_left_alone() {
    let asked = Arc::new(AtomicUsize::new(0));
    let counts = Arc::clone(&asked);
    let bucket = ill_server(move |request, mut stream| {
        if request.method == "GET" {
            counts.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_secs(4));
        }
        // It may be gone by now.
        let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n");
    });
    let registry = Registry::start();
    let folder = crate::support::temporary_folder();
    let s3 = config_at(bucket, folder.path(), "secret");
    let warmdock = over(&registry).set("/storage", json!({ "s3": s3 })).start();
    for number in 0..4 {
        let version = format!("1.0.{number}");
        let file = registry.publish_bytes("leaf", &version, &[], noise(1000, number));
        is_whole(&warmdock, &file);
    }
    // After two that failed.
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

/// As AWS answers: with the key's name and what was signed. Of that, the log has only the status.
#[test]
fn what_a_bucket_says_of_wrong_keys_is_not_logged() {
    let bucket = ill_server(|request, mut stream| {
        let signed = request.header("authorization").unwrap_or_default();
        let body = format!(
            "<Error><Code>SignatureDoesNotMatch</Code><AWSAccessKeyId>access-id</AWSAccessKeyId>\
             <StringToSign>{signed}</StringToSign></Error>"
        );
        let length = body.len();
        let head = format!("HTTP/1.1 403 Forbidden\r\ncontent-length: {length}\r\n\r\n");
        // It may be gone by now.
        let _ = stream.write_all((head + &body).as_bytes());
    });
    let registry = Registry::start();
    let file = registry.publish_bytes("leaf", "1.0.0", &[], noise(1000, 1));
    let folder = crate::support::temporary_folder();
    let s3 = config_at(bucket, folder.path(), "secret-3f7a");
    let warmdock = over(&registry).set("/storage", json!({ "s3": s3 })).start();
    is_whole(&warmdock, &file);
    for what in ["read", "written"] {
        warmdock.wait_log(what, |event| {
            let message = event["message"].as_str().unwrap_or_default();
            let error = event["error"].as_str().unwrap_or_default();
            message.contains(&format!("could not be {what}")) && error.contains("403 Forbidden")
        });
    }
    let log = warmdock.log();
    for word in ["access-id", "Signature", "AWS4", "<Error", "secret-3f7a"] {
        assert!(!log.contains(word), "{word}: {log}");
    }
}
