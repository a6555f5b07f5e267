//! Requests that no git client sends: each is answered with a sentence, or cut off at a limit, and the next client is
//! served as if nothing had happened.

use std::io::{BufReader, ErrorKind, Read, Write};

use flate2::{Compression, write::GzEncoder};

use crate::support::http::{self, Response, connect};
use crate::support::pkt::{self, DELIMITER, FLUSH, line};
use crate::support::repo::Rng;
use crate::support::warmdock::{builder, target};
use crate::support::{Client, Repo, SAMPLE, Upstream, Warmdock, warmdock};

const V2: (&str, &str) = ("Git-Protocol", "version=2");
const KIND: (&str, &str) = ("Content-Type", "application/x-git-upload-pack-request");

/// A service over the sample, mirrored.
struct Setup {
    _upstream: Upstream,
    repo: Repo,
    warmdock: Warmdock,
}

fn setup() -> Setup {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    Setup {
        _upstream: upstream,
        repo,
        warmdock,
    }
    .mirrored()
}

/// One that takes request bodies of 1 MiB.
fn setup_with_small_bodies() -> Setup {
    let (upstream, repo) = Upstream::with_sample();
    let config = builder(&upstream.file_url()).set("/limits/request_body", "1MiB");
    let warmdock = config.set("/limits/body_idle_timeout", "3s").start();
    Setup {
        _upstream: upstream,
        repo,
        warmdock,
    }
    .mirrored()
}

impl Setup {
    fn mirrored(self) -> Self {
        Client::new(2)
            .git(&["ls-remote", &self.warmdock.url(SAMPLE)])
            .ok();
        self.warmdock.wait_mirrored(SAMPLE, &self.repo);
        self
    }

    #[track_caller]
    fn post(&self, headers: &[(&str, &str)], body: &[u8]) -> Response {
        http::request(
            self.warmdock.address(),
            "POST",
            &upload_pack(),
            headers,
            body,
        )
    }

    /// Sends a body to the v2 and, as it is, to the v0 door.
    #[track_caller]
    fn post_both(&self, body: &[u8]) -> [Response; 2] {
        [self.post(&[KIND, V2], body), self.post(&[KIND], body)]
    }

    /// The service is as it was: alive, and a clone succeeds.
    #[track_caller]
    fn still_works(&self) {
        assert_eq!(http::get(self.warmdock.address(), "/healthz").status, 200);
        Client::new(2)
            .clone(&self.warmdock.url(SAMPLE), "ours", &["--bare"])
            .ok();
        let log = self.warmdock.log();
        assert!(!log.contains("panicked"), "{log}");
    }
}

fn upload_pack() -> String {
    format!("{}/git-upload-pack", target(SAMPLE))
}

/// The client learns that its request was wrong: by the status, or by an ERR packet that git shows to the person.
#[track_caller]
fn is_refused(response: &Response) -> String {
    let text = response.text();
    if response.status == 200 {
        let errors = pkt::errors_of(&response.body);
        assert!(!errors.is_empty(), "no error in: {text:?}");
        return errors;
    }
    assert!(
        (400..500).contains(&response.status),
        "{} {text}",
        response.status
    );
    assert!(text.len() > 10, "a sentence: {text:?}");
    text
}

#[test]
fn garbage_instead_of_packets() {
    let setup = setup();
    let bodies: [&[u8]; 12] = [
        b"",
        b"hello, this is no packet",
        b"\0\0\0\0",
        b"zzzz",
        b"00",
        b"0002",
        b"0003",
        b"-001",
        b"+00ax",
        b"ffff",
        b"\xff\xfe\xfd\xfc",
        b"00000000000000000000",
    ];
    for body in bodies {
        for response in setup.post_both(body) {
            if body.iter().all(|byte| *byte == b'0') || body.is_empty() {
                // Nothing but flush packets asks for nothing: git answers it with nothing.
                assert!(
                    response.status == 200 || response.status == 400,
                    "{body:?} {}",
                    response.status
                );
            } else {
                is_refused(&response);
            }
        }
    }
    setup.still_works();
}

#[test]
fn bytes_that_nobody_chose() {
    let setup = setup();
    for seed in 0..60 {
        let mut rng = Rng(seed);
        let mut body = pkt::v2_clone(&setup.repo.id("main"));
        for _ in 0..=rng.below(4) {
            let place = rng.below(body.len() as u64) as usize;
            body[place] = rng.next() as u8;
        }
        for response in setup.post_both(&body) {
            assert!(
                response.status < 500,
                "{} for {:?}",
                response.status,
                String::from_utf8_lossy(&body)
            );
        }
    }
    setup.still_works();
}

#[test]
fn a_body_that_breaks_off_inside_a_packet() {
    let setup = setup();
    let whole = pkt::v2_clone(&setup.repo.id("main"));
    for length in [
        1,
        3,
        5,
        20,
        60,
        90,
        whole.len() - 5,
        whole.len() - 4,
        whole.len() - 1,
    ] {
        for response in setup.post_both(&whole[..length]) {
            is_refused(&response);
        }
    }
    setup.still_works();
}

/// The head of a request for a pack by protocol v2, with what tells how long its body is, as far as the body.
fn head(length: &str) -> String {
    let target = upload_pack();
    let kind = KIND.1;
    format!(
        "POST {target} HTTP/1.1\r\nHost: x\r\nGit-Protocol: version=2\r\nContent-Type: {kind}\r\n{length}\r\n\r\n"
    )
}

/// The connection ends before the body that was promised.
#[test]
fn a_body_that_is_shorter_than_promised() {
    let setup = setup();
    for head in [
        head("Content-Length: 1000"),
        head("Transfer-Encoding: chunked") + "3e8\r\n",
    ] {
        let mut stream = connect(setup.warmdock.address());
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&line("command=fetch\n")).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
        }
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 4"),
            "{answer}"
        );
    }
    setup.still_works();
}

/// A body that stops coming, with the connection open.
#[test]
fn a_body_that_stops() {
    let setup = setup_with_small_bodies();
    let mut stream = connect(setup.warmdock.address());
    stream
        .write_all(head("Content-Length: 1000").as_bytes())
        .unwrap();
    stream.write_all(&line("command=fetch\n")).unwrap();
    // Ends by itself: the read fails only after 30 s.
    let mut answer = Vec::new();
    stream
        .read_to_end(&mut answer)
        .expect("the service ends the connection");
    let answer = String::from_utf8_lossy(&answer);
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
        "{answer}"
    );
    setup.still_works();
}

/// Valid packets without end, in chunks: as much is taken as the limit says.
#[test]
fn a_body_without_end() {
    let setup = setup_with_small_bodies();
    let mut begin = line("command=fetch\n");
    begin.extend(DELIMITER);
    begin.extend(line(&format!("want {}\n", setup.repo.id("main"))));
    let haves: Vec<u8> = (0..1000)
        .flat_map(|number| line(&format!("have {number:040x}\n")))
        .collect();
    let mut stream = connect(setup.warmdock.address());
    stream
        .write_all(head("Transfer-Encoding: chunked").as_bytes())
        .unwrap();
    let mut writer = stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        let mut sent = 0_u64;
        for chunk in std::iter::once(&begin).chain(std::iter::repeat(&haves)) {
            let framed = [format!("{:x}\r\n", chunk.len()).as_bytes(), chunk, b"\r\n"].concat();
            if writer.write_all(&framed).is_err() {
                return sent;
            }
            sent += chunk.len() as u64;
            assert!(sent < 200 << 20, "the service takes a body without end");
        }
        sent
    });
    // The answer may be lost when the service closes while the client still sends; taking no more is what counts.
    if let Ok(response) = http::read_response(&mut BufReader::new(&stream)) {
        assert_eq!(response.status, 413, "{}", response.text());
        assert!(
            response.text().contains("1048576") || response.text().contains("1MiB"),
            "{}",
            response.text()
        );
    }
    let _ = stream.shutdown(std::net::Shutdown::Both);
    sender.join().unwrap();
    setup.still_works();
}

#[test]
fn a_body_that_is_announced_as_too_large() {
    let setup = setup_with_small_bodies();
    let response = http::exchange(
        setup.warmdock.address(),
        (head("Content-Length: 99999999999") + "0000").as_bytes(),
    );
    assert_eq!(response.unwrap().status, 413);
    setup.still_works();
}

fn gzip(bytes: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    for part in bytes {
        encoder.write_all(&part).unwrap();
    }
    encoder.finish().unwrap()
}

/// Packets that are in order, a hundred times larger than the bytes that were sent.
#[test]
fn a_gzip_bomb() {
    let setup = setup_with_small_bodies();
    let mut begin = line("command=fetch\n");
    begin.extend(DELIMITER);
    let have: Vec<u8> = line(&format!("have {:040}\n", 1)).repeat(1000);
    let bomb = gzip(std::iter::once(begin).chain(std::iter::repeat_n(have, 300)));
    assert!(bomb.len() < 1 << 20);
    let response = setup.post(&[KIND, V2, ("Content-Encoding", "gzip")], &bomb);
    assert_eq!(response.status, 413, "{}", response.text());
    setup.still_works();
}

#[test]
fn gzip_that_is_broken() {
    let setup = setup();
    let body = pkt::v2_clone(&setup.repo.id("main"));
    let good = gzip([body.clone()]);
    let mut damaged = good.clone();
    let last = damaged.len() - 6;
    damaged[last] ^= 0xff;
    for bad in [
        &b"no gzip at all"[..],
        &good[..good.len() / 2],
        &damaged,
        b"",
    ] {
        let response = setup.post(&[KIND, V2, ("Content-Encoding", "gzip")], bad);
        assert!(
            (400..500).contains(&response.status),
            "{} {}",
            response.status,
            response.text()
        );
    }
    let response = setup.post(&[KIND, V2, ("Content-Encoding", "gzip")], &good);
    assert!(pkt::pack_of(&response.body).starts_with(b"PACK"));
    let response = setup.post(&[KIND, V2, ("Content-Encoding", "x-gzip")], &good);
    assert!(
        pkt::pack_of(&response.body).starts_with(b"PACK"),
        "RFC 9110: x-gzip is gzip"
    );
    let response = setup.post(&[KIND, V2, ("Content-Encoding", "zstd")], &body);
    assert_eq!(response.status, 415, "{}", response.text());
    setup.still_works();
}

#[test]
fn a_want_that_does_not_exist() {
    let setup = setup();
    let absent = "dead".repeat(10);
    let body = pkt::v2_clone(&absent);
    let message = is_refused(&setup.post(&[KIND, V2], &body));
    assert!(
        message.contains(&format!("not our ref {absent}")),
        "{message}"
    );
    let mut body = line(&format!(
        "want {absent} multi_ack_detailed side-band-64k ofs-delta\n"
    ));
    body.extend(FLUSH);
    body.extend(line("done\n"));
    let message = is_refused(&setup.post(&[KIND], &body));
    assert!(
        message.contains(&format!("not our ref {absent}")),
        "{message}"
    );
    setup.still_works();
}

#[test]
fn a_million_haves() {
    let setup = setup();
    let mut rng = Rng(5);
    let mut haves = Vec::with_capacity(51_000_000);
    for _ in 0..1_000_000 {
        let (a, b, c) = (rng.next(), rng.next(), rng.next() as u32);
        haves.extend_from_slice(format!("0032have {a:016x}{b:016x}{c:08x}\n").as_bytes());
    }
    let want = setup.repo.id("main");
    let mut v2 = line("command=fetch\n");
    v2.extend(DELIMITER);
    v2.extend(line(&format!("want {want}\n")));
    v2.extend(&haves);
    v2.extend(line("done\n"));
    v2.extend(FLUSH);
    let response = setup.post(&[KIND, V2], &v2);
    // A pack, or a sentence: git itself never sends so many before it gives up.
    if response.status == 200 && pkt::errors_of(&response.body).is_empty() {
        assert!(pkt::pack_of(&response.body).starts_with(b"PACK"));
    } else {
        is_refused(&response);
    }
    setup.still_works();
}

#[test]
fn many_wants() {
    let setup = setup();
    let objects = setup
        .repo
        .git(&["rev-list", "--objects", "--no-object-names", "--all"]);
    let wants: Vec<String> = objects
        .lines()
        .cycle()
        .take(50_000)
        .map(|id| format!("want {id}"))
        .collect();
    let mut arguments: Vec<&str> = wants.iter().map(String::as_str).collect();
    arguments.push("done");
    let response = setup.post(&[KIND, V2], &pkt::v2("fetch", &arguments));
    assert_eq!(response.status, 200);
    assert!(pkt::pack_of(&response.body).starts_with(b"PACK"));
    setup.still_works();
}

#[test]
fn an_unknown_command() {
    let setup = setup();
    for command in ["", "frobnicate", "receive-pack", "fetch ", "FETCH"] {
        let message = is_refused(&setup.post(&[KIND, V2], &pkt::v2(command, &[])));
        assert!(!message.is_empty());
    }
    let mut twice = line("command=ls-refs\n");
    twice.extend(line("command=fetch\n"));
    twice.extend(FLUSH);
    is_refused(&setup.post(&[KIND, V2], &twice));
    let mut none = line("agent=x\n");
    none.extend(FLUSH);
    is_refused(&setup.post(&[KIND, V2], &none));
    setup.still_works();
}

#[test]
fn a_wrong_object_format() {
    let setup = setup();
    for format in ["sha256", "md5", ""] {
        let mut body = line("command=fetch\n");
        body.extend(line(&format!("object-format={format}\n")));
        body.extend(DELIMITER);
        body.extend(line(&format!("want {}\n", setup.repo.id("main"))));
        body.extend(line("done\n"));
        body.extend(FLUSH);
        is_refused(&setup.post(&[KIND, V2], &body));
    }
    setup.still_works();
}

#[test]
fn arguments_that_make_no_sense() {
    let setup = setup();
    let want = format!("want {}", setup.repo.id("main"));
    let tables: [&[&str]; 14] = [
        &[&want, "deepen 0", "done"],
        &[&want, "deepen -1", "done"],
        &[&want, "deepen 99999999999999999999", "done"],
        &[&want, "deepen x", "done"],
        &[&want, "deepen-since yesterday", "done"],
        &[&want, "deepen-not refs/heads/absent", "done"],
        &[&want, "deepen 1", "deepen-since 1", "done"],
        &[&want, "filter nothing:at-all", "done"],
        &[&want, "filter blob:limit=-1", "done"],
        &[&want, "filter sparse:path=/etc/passwd", "done"],
        &[&want, "shallow xyz", "done"],
        &["want xyz", "done"],
        &[&want, "have xyz", "done"],
        &["want-ref refs/heads/absent", "done"],
    ];
    for arguments in tables {
        let response = setup.post(&[KIND, V2], &pkt::v2("fetch", arguments));
        assert!(response.status < 500, "{arguments:?}: {}", response.text());
        is_refused(&response);
    }
    setup.still_works();
}

#[test]
fn wrong_services_methods_and_types() {
    let setup = setup();
    let address = setup.warmdock.address();
    let info = |query: &str| http::get(address, &format!("{}/info/refs{query}", target(SAMPLE)));
    // What the "dumb" protocol would ask for.
    for (query, allowed) in [
        ("", [400, 403, 404]),
        ("?service=git-upload-archive", [400, 403, 404]),
        ("?service=", [400, 403, 404]),
    ] {
        let response = info(query);
        assert!(
            allowed.contains(&response.status),
            "{query} {}",
            response.status
        );
    }
    for path in ["HEAD", "objects/info/packs", "packed-refs", "config"] {
        let response = http::get(address, &format!("{}/{path}", target(SAMPLE)));
        assert!(
            [400, 403, 404].contains(&response.status),
            "{path} {}",
            response.status
        );
    }
    let push = info("?service=git-receive-pack");
    assert_eq!(push.status, 403);
    assert!(push.text().contains("push"), "{}", push.text());
    assert!(
        push.header("content-type")
            .is_some_and(|kind| kind.starts_with("text/plain")),
        "git shows only plain text"
    );
    let push = http::request(
        address,
        "POST",
        &format!("{}/git-receive-pack", target(SAMPLE)),
        &[],
        FLUSH,
    );
    assert_eq!(push.status, 403);
    let refs = format!("{}/info/refs?service=git-upload-pack", target(SAMPLE));
    for (method, path, status, allowed) in [
        ("GET", upload_pack(), 405, Some("POST")),
        ("PUT", upload_pack(), 405, Some("POST")),
        ("POST", refs, 405, Some("GET")),
        ("DELETE", target(SAMPLE), 404, None),
        ("POST", "/healthz".into(), 405, Some("GET,HEAD")),
        (
            "POST",
            "/crates/crates.io/config.json".into(),
            405,
            Some("GET,HEAD"),
        ),
    ] {
        let response = http::request(address, method, &path, &[], b"");
        let found = (response.status, response.header("allow"));
        assert_eq!(found, (status, allowed), "{method} {path}");
    }
    // A form of a web page could send this type without asking the person: git's server refuses it too.
    let response = setup.post(
        &[("Content-Type", "text/plain"), V2],
        &pkt::v2_clone(&setup.repo.id("main")),
    );
    assert_eq!(response.status, 415, "{}", response.text());
    setup.still_works();
}

#[test]
fn headers_as_git_expects_them() {
    let setup = setup();
    let address = setup.warmdock.address();
    for headers in [&[V2][..], &[]] {
        let target = format!("{}/info/refs?service=git-upload-pack", target(SAMPLE));
        let response = http::request(address, "GET", &target, headers, b"");
        // libgit2 compares it byte by byte.
        assert_eq!(
            response.header("content-type"),
            Some("application/x-git-upload-pack-advertisement")
        );
        assert!(
            response
                .header("cache-control")
                .is_some_and(|value| value.contains("no-cache"))
        );
        let service: &[u8] = b"001e# service=git-upload-pack\n0000";
        assert_eq!(
            response.body.starts_with(service),
            headers.is_empty(),
            "only before v2"
        );
    }
    let response = setup.post(&[KIND, V2], &pkt::v2("ls-refs", &[]));
    assert_eq!(
        response.header("content-type"),
        Some("application/x-git-upload-pack-result")
    );
    assert!(
        response
            .header("cache-control")
            .is_some_and(|value| value.contains("no-cache"))
    );
}

#[test]
fn unknown_protocol_versions_are_version_0() {
    let setup = setup();
    for version in [
        "version=3",
        "version=",
        "version=2x",
        "nonsense",
        ":::",
        "version=99999999999999999999",
        "\u{7f}",
    ] {
        let target = format!("{}/info/refs?service=git-upload-pack", target(SAMPLE));
        let response = http::request(
            setup.warmdock.address(),
            "GET",
            &target,
            &[("Git-Protocol", version)],
            b"",
        );
        assert!(
            response.status == 200 || response.status == 400,
            "{version:?} {}",
            response.status
        );
        if response.status == 200 {
            assert!(
                response
                    .body
                    .starts_with(b"001e# service=git-upload-pack\n"),
                "{version:?}"
            );
        }
    }
}

#[test]
fn what_is_no_http() {
    let setup = setup();
    let too_long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(1 << 20));
    let many_headers: String = (0..100_000)
        .map(|number| format!("X-{number}: y\r\n"))
        .collect();
    let many_headers = format!("GET / HTTP/1.1\r\nHost: x\r\n{many_headers}\r\n");
    let long_header = format!(
        "GET / HTTP/1.1\r\nHost: x\r\nX: {}\r\n\r\n",
        "y".repeat(4 << 20)
    );
    let two_lengths =
        "POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab";
    let both = "POST /x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: nonsense\r\n\r\n0000";
    let requests: [&[u8]; 8] = [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello on a cleartext port",
        b"git-upload-pack /team/sample.git\0host=x\0",
        b"GET / HTTP/9.9\r\n\r\n",
        two_lengths.as_bytes(),
        both.as_bytes(),
        too_long.as_bytes(),
        many_headers.as_bytes(),
        long_header.as_bytes(),
    ];
    for request in requests {
        // Refused with a status, or just cut off.
        if let Ok(response) = http::exchange(setup.warmdock.address(), request) {
            assert!(
                (400..600).contains(&response.status) && response.status != 500,
                "{}",
                response.status
            );
        }
    }
    setup.still_works();
}

#[test]
fn slow_headers_are_cut_off() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = builder(&upstream.file_url())
        .set("/limits/header_timeout", "3s")
        .start();
    let mut silent = connect(warmdock.address());
    let mut dribbling = connect(warmdock.address());
    let mut writer = dribbling.try_clone().unwrap();
    std::thread::spawn(move || {
        // Never idle, never at an end.
        for byte in "GET / HTTP/1.1\r\nHost: x\r\nX: "
            .bytes()
            .chain(std::iter::repeat(b'y'))
        {
            if writer.write_all(&[byte]).is_err() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    });
    for stream in [&mut silent, &mut dribbling] {
        let mut answer = Vec::new();
        // A reset is an end as well; a time-out of the read is not.
        if let Err(error) = stream.read_to_end(&mut answer) {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        }
        let answer = String::from_utf8_lossy(&answer);
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 408"),
            "{answer}"
        );
    }
    Setup {
        _upstream: upstream,
        repo,
        warmdock,
    }
    .still_works();
}
