//! Upstreams that fail: what clients see of it, and that nothing wrong stays behind.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::compare::clone_is_whole;
use crate::support::http::{self, Response};
use crate::support::process::Output;
use crate::support::warmdock::{Builder, builder, files_below, target};
use crate::support::{Client, Fault, HOST, Repo, SAMPLE, Upstream, Warmdock, wait_for};

const TOKEN: &str = "upstream-secret-4f1d9a72";

/// Fails fast where the service itself sets the pace.
fn config(upstream: &Upstream) -> Builder {
    builder(&upstream.url()).set("/limits/upstream_idle_timeout", "3s")
}

fn advertisement(warmdock: &Warmdock) -> Response {
    advertisement_of(warmdock, SAMPLE)
}

fn advertisement_of(warmdock: &Warmdock, name: &str) -> Response {
    http::get(
        warmdock.address(),
        &format!("{}/info/refs?service=git-upload-pack", target(name)),
    )
}

/// A first clone fails with a reason, and works as soon as the upstream does.
#[track_caller]
fn fails_and_recovers(fault: Fault) {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = config(&upstream).start();
    upstream.fail(fault.clone());
    for protocol in [0, 2] {
        clone(&warmdock, protocol).failed();
    }
    assert!(
        !warmdock.mirror(SAMPLE).join("HEAD").exists(),
        "nothing is made from {fault:?}"
    );
    upstream.release();
    recovers(&upstream, &repo, &warmdock);
}

/// The service may wait a moment before it asks a failing upstream again.
#[track_caller]
fn recovers(upstream: &Upstream, repo: &Repo, warmdock: &Warmdock) {
    wait_for("clones to succeed", || {
        clone(warmdock, 2).status.success().then_some(())
    });
    // Until there is one they are passed through, and only a client that comes makes the service try again.
    wait_for("a mirror", || {
        advertisement(warmdock);
        warmdock.mirror(SAMPLE).exists().then_some(())
    });
    warmdock.wait_mirrored(SAMPLE, repo);
    warmdock.fsck_mirror(SAMPLE);
    clone_is_whole(2, upstream, warmdock, SAMPLE);
}

fn clone(warmdock: &Warmdock, protocol: u8) -> Output {
    Client::new(protocol).clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
}

/// By the name that clients know, or by where it is.
fn names_upstream(text: &str) -> bool {
    text.contains(HOST) || text.contains("127.0.0.1")
}

/// What a client without a mirror to fall back to is told.
#[track_caller]
fn reason(fault: Fault) -> String {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = config(&upstream).start();
    upstream.fail(fault);
    let response = advertisement(&warmdock);
    assert_eq!(response.status, 502, "{}", response.text());
    assert!(
        names_upstream(&response.text()),
        "names the upstream: {}",
        response.text()
    );
    response.text()
}

#[test]
fn cut_off() {
    reason(Fault::CutOff);
    fails_and_recovers(Fault::CutOff);
}

#[test]
fn hangs() {
    reason(Fault::Hang);
    fails_and_recovers(Fault::Hang);
}

#[test]
fn answers_garbage_instead_of_http() {
    reason(Fault::Garbage);
    fails_and_recovers(Fault::Garbage);
}

#[test]
fn answers_garbage_instead_of_packets() {
    fails_and_recovers(Fault::GarbageBody);
}

#[test]
fn answers_a_page_for_people() {
    let text = reason(Fault::Html);
    assert!(!text.contains("<html>"), "{text}");
    fails_and_recovers(Fault::Html);
}

#[test]
fn answers_500() {
    assert!(reason(Fault::Status(500)).contains("500"));
    fails_and_recovers(Fault::Status(500));
}

#[test]
fn answers_429() {
    assert!(reason(Fault::Status(429)).contains("429"));
    fails_and_recovers(Fault::Status(429));
}

/// What GitHub answers to those who ask too often. Without such a line, 403 may say that there is no such repository.
const ASKED_TOO_OFTEN: [Fault; 2] = [
    Fault::StatusWith(403, "x-ratelimit-remaining: 0"),
    Fault::StatusWith(403, "retry-after: 20"),
];

#[test]
fn answers_403_to_those_who_ask_too_often() {
    for fault in ASKED_TOO_OFTEN {
        let text = reason(fault.clone());
        assert!(text.contains("403") && text.contains("too often"), "{text}");
        fails_and_recovers(fault);
    }
}

#[test]
fn a_host_that_was_asked_too_often_is_not_asked_for_each_client() {
    for fault in ASKED_TOO_OFTEN.into_iter().chain([Fault::Status(429)]) {
        let (upstream, _repo) = Upstream::with_sample();
        let warmdock = config(&upstream).start();
        upstream.fail(fault);
        for _ in 0..5 {
            let response = advertisement(&warmdock);
            let text = response.text();
            assert!(
                response.status == 502 && text.contains("too often"),
                "{text}"
            );
        }
        assert_eq!(upstream.asked().len(), 1);
    }
}

/// Within bounds: nobody goes without what is new for an hour.
#[test]
fn a_host_says_for_how_long_it_is_left_alone() {
    for (line, seconds) in [
        ("retry-after: 40", 40),
        ("retry-after: 0", 1),
        ("retry-after: 86400", 300),
        ("retry-after: Thu, 31 Dec 2099 23:59:59 GMT", 300),
        ("x-ratelimit-reset: 4102444799", 300),
        ("retry-after: soon", 15),
    ] {
        let text = reason(Fault::StatusWith(429, line));
        let said = format!("asked again in {seconds} s");
        assert!(text.contains(&said), "{line}: {text}");
    }
}

/// By whoever comes, for what is mirrored and for what is not.
#[test]
fn a_host_is_left_alone_for_as_long_as_it_says() {
    let (upstream, repo) = Upstream::with_sample();
    let (other, absent) = ("team/other", "team/absent");
    let other_repo = upstream.sample(other);
    upstream.sample(absent);
    let warm = [SAMPLE, other].map(|name| format!("{HOST}/{name}"));
    let warmdock = config(&upstream)
        .set("/git/warm", json!(warm))
        .set("/git/when_upstream_fails", "fail")
        .start();
    warmdock.wait_mirrored(SAMPLE, &repo);
    warmdock.wait_mirrored(other, &other_repo);
    // Longer than where it says nothing.
    upstream.fail(Fault::StatusWith(429, "retry-after: 20"));
    let before = upstream.asked().len();
    let begin = Instant::now();
    for name in [SAMPLE, other, absent] {
        let response = advertisement_of(&warmdock, name);
        let text = response.text();
        assert!(
            response.status == 502 && text.contains("too often"),
            "{name}: {text}"
        );
    }
    assert_eq!(upstream.asked().len(), before + 1);
    upstream.release();
    wait_for("the host to be asked again", || {
        (advertisement_of(&warmdock, absent).status == 200).then_some(())
    });
    assert!(begin.elapsed() >= Duration::from_secs(20));
}

#[test]
fn another_address_is_asked_at_once() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = config(&upstream)
        .set("/git/when_upstream_fails", "fail")
        .start();
    assert_eq!(advertisement(&warmdock).status, 200);
    warmdock.wait_mirrored(SAMPLE, &repo);
    upstream.fail(Fault::StatusWith(429, "retry-after: 300"));
    assert_eq!(advertisement(&warmdock).status, 502);
    let mut config = warmdock.config();
    config["git"]["upstreams"][0]["url"] = json!(upstream.file_url());
    warmdock.write_config(&config.to_string());
    warmdock.signal("HUP");
    wait_for("the other address to be asked", || {
        (advertisement(&warmdock).status == 200).then_some(())
    });
}

/// Of what is mirrored, fetches are refused, and no requests that are passed through.
#[test]
fn answers_403_to_fetches() {
    let too_often = ASKED_TOO_OFTEN.map(|fault| (fault, 502));
    for (fault, expected) in too_often.into_iter().chain([(Fault::Status(403), 404)]) {
        let (upstream, repo) = Upstream::with_sample();
        let warmdock = config(&upstream)
            .set("/git/warm", json!([format!("{HOST}/{SAMPLE}")]))
            .set("/git/when_upstream_fails", "fail")
            .start();
        warmdock.wait_mirrored(SAMPLE, &repo);
        upstream.fail(fault);
        let response = advertisement(&warmdock);
        assert_eq!(response.status, expected, "{}", response.text());
    }
}

#[test]
fn cuts_the_pack_in_the_middle() {
    fails_and_recovers(Fault::CutPackAfter(10_000));
}

#[test]
fn cuts_the_pack_at_its_beginning() {
    fails_and_recovers(Fault::CutPackAfter(60));
}

#[test]
fn sends_a_damaged_pack() {
    fails_and_recovers(Fault::DamagePackAt(12_345));
}

#[test]
fn gives_no_packs() {
    fails_and_recovers(Fault::NoPacks);
}

/// Clients lose nothing by a mirror that cannot be made, and do not make the service try again each time.
#[test]
fn what_cannot_be_mirrored_is_passed_through() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = builder(&upstream.url())
        .set("/limits/first_clone_timeout", "1s")
        .start();
    upstream.fail(Fault::HoldPackAfter(0));
    assert_eq!(advertisement(&warmdock).status, 200);
    warmdock.wait_log("why there is no mirror", |event| {
        event["message"] == "fetch failed" && event.to_string().contains("first_clone_timeout")
    });
    upstream.release();
    let asked_for_mirror = || {
        let asked = upstream.asked().into_iter();
        asked
            .filter(|asked| asked.agent.contains("warmdock"))
            .count()
    };
    let before = asked_for_mirror();
    for protocol in [0, 1, 2] {
        let client = Client::new(protocol);
        client
            .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
            .ok();
        let tip = client.git_in("ours", &["rev-parse", "main"]).ok().text();
        assert_eq!(tip, repo.id("main"));
    }
    assert_eq!(asked_for_mirror(), before);
}

/// Each fault on a repository that is mirrored: the mirror goes on as it was, and people are told. Also where the
/// upstream says that it has no such repository any more, or shows it to others only.
#[test]
fn a_mirror_survives_every_fault() {
    let faults = [
        Fault::CutOff,
        Fault::Hang,
        Fault::Garbage,
        Fault::GarbageBody,
        Fault::Html,
        Fault::Status(500),
        Fault::Status(401),
        Fault::Status(403),
        Fault::Status(404),
        Fault::CutPackAfter(10_000),
        Fault::DamagePackAt(10_000),
        Fault::NoPacks,
    ];
    // Side by side: the service waits a while before it asks a failing upstream again.
    std::thread::scope(|scope| {
        for (number, fault) in faults.into_iter().enumerate() {
            scope.spawn(move || survives(fault, number as u64));
        }
    });
}

fn survives(fault: Fault, seed: u64) {
    let (upstream, repo) = Upstream::with_sample();
    let warm = json!([format!("{HOST}/{SAMPLE}")]);
    let warmdock = config(&upstream).set("/git/warm", warm).start();
    warmdock.wait_mirrored(SAMPLE, &repo);
    let before = repo.id("main");
    let new = crate::support::repo::Rng(seed).bytes(30_000);
    let after = repo.commit("main", &[("new.bin", &new)]);
    upstream.fail(fault.clone());
    let client = Client::new(2);
    client.clone(&warmdock.url(SAMPLE), "ours", &[]).ok();
    let tip = client.git_in("ours", &["rev-parse", "HEAD"]).ok().text();
    assert_eq!(tip, before, "what was there before {fault:?}");
    warmdock.wait_log("a warning", |event| {
        event["level"] == "WARN" && event["message"] == "serving stale references"
    });
    wait_for("the reason on the status page", || {
        let status = http::get(warmdock.address(), "/api/v1/status");
        let status: Value = serde_json::from_slice(&status.body).unwrap();
        let shown = &status["repositories"][0];
        (shown["stale"] == true && shown["error"].is_string()).then_some(())
    });
    warmdock.fsck_mirror(SAMPLE);
    upstream.release();
    wait_for("the service to follow its upstream again", || {
        advertisement(&warmdock)
            .text()
            .contains(&after)
            .then_some(())
    });
    recovers(&upstream, &repo, &warmdock);
}

#[test]
fn references_that_never_end() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = builder(&upstream.url())
        .set("/git/warm", json!([format!("{HOST}/{SAMPLE}")]))
        .set("/git/refresh", "1s")
        .start();
    warmdock.wait_mirrored(SAMPLE, &repo);
    upstream.fail(Fault::EndlessList);
    warmdock.wait_log("the end of the fetch", |event| {
        event["message"] == "fetch failed"
            && event
                .to_string()
                .contains("list of references is longer than 64 MiB")
    });
    assert_eq!(advertisement(&warmdock).status, 200);
}

/// Both hold the repository, and one of the host's places: clients get what is older meanwhile.
#[test]
fn a_later_fetch_ends_as_well() {
    for (fault, limit, said) in [
        (Fault::HoldPackAfter(0), "20s", "limits.first_clone_timeout"),
        (Fault::KeepAlive, "2h", "next to nothing"),
    ] {
        let (upstream, repo) = Upstream::with_sample();
        let warmdock = builder(&upstream.url())
            .set("/git/warm", json!([format!("{HOST}/{SAMPLE}")]))
            .set("/git/refresh", "1s")
            .set("/limits/first_clone_timeout", limit)
            .set(
                "/limits/upstream_idle_timeout",
                if limit == "2h" { "2s" } else { "10m" },
            )
            .start();
        warmdock.wait_mirrored(SAMPLE, &repo);
        upstream.fail(fault);
        repo.commit("main", &[("new.txt", b"new\n")]);
        warmdock.wait_log("the end of the fetch", |event| {
            event["message"] == "fetch failed" && event.to_string().contains(said)
        });
        upstream.release();
        warmdock.wait_mirrored(SAMPLE, &repo);
    }
}

/// Each host has places of its own for fetches.
#[test]
fn a_host_that_hangs_makes_no_other_stale() {
    let (hanging, hung) = (Upstream::start(), "hanging.example.test");
    let names: Vec<_> = (0..12).map(|number| format!("team/r{number}")).collect();
    for name in &names {
        hanging.sample(name);
    }
    let (upstream, repo) = Upstream::with_sample();
    let upstreams = json!([
        { "host": HOST, "url": upstream.url() },
        { "host": hung, "url": hanging.url() },
    ]);
    let mut warm: Vec<_> = names.iter().map(|name| format!("{hung}/{name}")).collect();
    warm.push(format!("{HOST}/{SAMPLE}"));
    let mirrors = warm.len();
    let warmdock = builder(&upstream.url())
        .set("/git/upstreams", upstreams)
        .set("/git/warm", warm)
        .set("/git/first_clones", mirrors)
        .set("/git/refresh", "1s")
        .set("/limits/upstream_idle_timeout", "10m")
        .start();
    wait_for("all mirrors", || {
        let fetched = warmdock.metric(|name| name == "warmdock_git_fetches_total{result=\"ok\"}");
        (fetched >= mirrors as f64).then_some(())
    });
    hanging.fail(Fault::Hang);
    let asked = hanging.asked().len();
    wait_for("its places to be taken", || {
        (hanging.asked().len() >= asked + 8).then_some(())
    });
    wait_for("the others to be seen in the queue", || {
        let queue = |name: &str| name == "warmdock_git_queue_length{queue=\"fetch\"}";
        (warmdock.metric(queue) == (names.len() - 8) as f64).then_some(())
    });
    let new = repo.commit("main", &[("new.txt", b"new\n")]);
    let listed = advertisement(&warmdock).text();
    assert!(listed.contains(&new), "{listed}");
}

/// A service whose upstream wants a token.
fn with_token(upstream: &Upstream, auth: &str, token: &str) -> (tempfile::NamedTempFile, Warmdock) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), format!("{token}\n")).unwrap();
    let config = config(upstream)
        .set("/git/upstreams/0/token_file", file.path().to_str().unwrap())
        .set("/git/upstreams/0/auth", auth)
        .environment("RUST_LOG", "trace");
    (file, config.start())
}

fn basic(user: &str, token: &str) -> String {
    use base64::Engine as _;
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(format!("{user}:{token}"))
    )
}

#[test]
fn a_token_goes_as_basic() {
    let (upstream, repo) = Upstream::with_sample();
    upstream.require(&basic("x-access-token", TOKEN));
    let (_file, warmdock) = with_token(&upstream, "basic", TOKEN);
    for protocol in [0, 2] {
        clone(&warmdock, protocol).ok();
    }
    warmdock.wait_mirrored(SAMPLE, &repo);
    no_secret_anywhere(&warmdock, &[]);
}

#[test]
fn a_token_goes_as_bearer() {
    let (upstream, repo) = Upstream::with_sample();
    upstream.require(&format!("Bearer {TOKEN}"));
    let (_file, warmdock) = with_token(&upstream, "bearer", TOKEN);
    clone(&warmdock, 2).ok();
    warmdock.wait_mirrored(SAMPLE, &repo);
    no_secret_anywhere(&warmdock, &[]);
}

#[test]
fn a_wrong_token_is_said_without_the_token() {
    let (upstream, _repo) = Upstream::with_sample();
    upstream.require(&basic("x-access-token", "another one"));
    let (_file, warmdock) = with_token(&upstream, "basic", TOKEN);
    let output = clone(&warmdock, 2).failed();
    let response = advertisement(&warmdock);
    // Not 401: the client's own credentials are fine, and git would ask the person for others.
    assert_eq!(response.status, 502, "{}", response.text());
    assert!(
        names_upstream(&response.text()) && response.text().contains("401"),
        "{}",
        response.text()
    );
    no_secret_anywhere(
        &warmdock,
        &[
            response.text(),
            output.describe(),
            format!("{:?}", response.headers),
        ],
    );
}

/// What a client sends to the service is not passed on, and the upstream's token never reaches a client.
#[test]
fn credentials_of_clients_stay_here() {
    let (upstream, repo) = Upstream::with_sample();
    upstream.require(&basic("x-access-token", TOKEN));
    let client_token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(client_token.path(), "client-secret-77aa").unwrap();
    let upstream_token = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(upstream_token.path(), TOKEN).unwrap();
    let tokens = json!([{ "name": "ci", "token_file": client_token.path() }]);
    let warmdock = config(&upstream)
        .set(
            "/git/upstreams/0/token_file",
            upstream_token.path().to_str().unwrap(),
        )
        .set("/access", json!({ "anonymous": "none", "tokens": tokens }))
        .start();
    let url = warmdock
        .url(SAMPLE)
        .replace("http://", "http://ci:client-secret-77aa@");
    for protocol in [0, 2] {
        Client::new(protocol).clone(&url, "ours", &["--bare"]).ok();
    }
    warmdock.wait_mirrored(SAMPLE, &repo);
    for asked in upstream.asked() {
        assert_eq!(
            asked.request.header("authorization"),
            Some(basic("x-access-token", TOKEN).as_str())
        );
        assert!(!format!("{:?}", asked.request.headers).contains("client-secret"));
    }
}

#[test]
fn credentials_do_not_follow_a_redirect_elsewhere() {
    let (upstream, _repo) = Upstream::with_sample();
    // Has the repository and asks nobody for anything.
    let (elsewhere, _other) = Upstream::with_sample();
    let (_file, warmdock) = with_token(&upstream, "basic", TOKEN);
    upstream.fail(Fault::Redirect(elsewhere.url()));
    for protocol in [0, 2] {
        // Whether it is followed without credentials or refused is the service's choice.
        let _ = clone(&warmdock, protocol);
    }
    assert!(!upstream.asked().is_empty());
    for asked in elsewhere.asked() {
        assert_eq!(asked.request.header("authorization"), None);
        assert!(!format!("{:?}", asked.request).contains(TOKEN));
    }
    no_secret_anywhere(&warmdock, &[]);
}

/// A redirect must not make the service read from where only it can: its own machine's other services, files.
#[test]
fn a_redirect_to_other_schemes_is_refused() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = config(&upstream).start();
    for (target, said) in [
        // No address that the HTTP client would know.
        (upstream.file_url(), "answered 302 Found"),
        (
            "ftp://127.0.0.1:1".to_owned(),
            "configure that host as the upstream",
        ),
        (
            "gopher://127.0.0.1:1".to_owned(),
            "configure that host as the upstream",
        ),
    ] {
        upstream.fail(Fault::Redirect(target));
        let output = clone(&warmdock, 2).failed();
        assert!(output.stderr.contains(said), "{}", output.describe());
    }
}

#[test]
fn a_redirect_that_never_ends() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = config(&upstream).start();
    upstream.fail(Fault::Redirect(upstream.url()));
    clone(&warmdock, 2).failed();
    assert!(
        upstream.asked().len() < 100,
        "{} requests",
        upstream.asked().len()
    );
    upstream.release();
    recovers(&upstream, &repo, &warmdock);
}

/// Looks through everything that the service shows and keeps, but for the token's own file.
#[track_caller]
fn no_secret_anywhere(warmdock: &Warmdock, more: &[String]) {
    let mut texts = more.to_vec();
    for target in [
        "/",
        "/metrics",
        "/healthz",
        "/readyz",
        "/api/v1/repos",
        "/api/v1/status",
        "/api/v1/",
    ] {
        let response = http::get(warmdock.address(), target);
        texts.push(format!(
            "{target} {:?} {}",
            response.headers,
            response.text()
        ));
    }
    texts.push(warmdock.log());
    for file in files_below(&warmdock.data()) {
        let content = std::fs::read(&file).unwrap_or_default();
        texts.push(format!(
            "{} {}",
            file.display(),
            String::from_utf8_lossy(&content)
        ));
    }
    let encoded = basic("x-access-token", TOKEN);
    for text in texts {
        for secret in [TOKEN, &encoded["Basic ".len()..]] {
            assert!(
                !text.contains(secret),
                "the secret is in: {}",
                text.chars().take(3000).collect::<String>()
            );
        }
    }
}
