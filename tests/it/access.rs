//! Who may read what: tokens in every form that clients send, and no way to find out what one may not read.

use serde_json::json;

use crate::support::http::{self, Response};
use crate::support::pkt;
use crate::support::warmdock::{Builder, builder, target};
use crate::support::{Client, HOST, SAMPLE, Upstream, Warmdock, wait_for};

const CI: &str = "token-of-ci-b81f6a";
const OTHER: &str = "token-of-the-others-c93e17";

/// A service with two repositories and two tokens: one for all of `team`, one for `other` only.
struct Setup {
    upstream: Upstream,
    warmdock: Warmdock,
    secrets: tempfile::TempDir,
}

fn setup(anonymous: &str) -> Setup {
    let (upstream, _repo) = Upstream::with_sample();
    upstream.sample("other/repo");
    let secrets = crate::support::temporary_folder();
    std::fs::write(secrets.path().join("ci"), format!("{CI}\n")).unwrap();
    std::fs::write(secrets.path().join("other"), OTHER).unwrap();
    let tokens = json!([
        { "name": "ci", "token_file": secrets.path().join("ci"), "repos": [format!("{HOST}/team/*")] },
        { "name": "other", "token_file": secrets.path().join("other"), "repos": [format!("{HOST}/other/*")] },
    ]);
    let config: Builder = builder(&upstream.file_url()).environment("RUST_LOG", "trace");
    let warmdock = config
        .set(
            "/access",
            json!({ "anonymous": anonymous, "tokens": tokens }),
        )
        .start();
    Setup {
        upstream,
        warmdock,
        secrets,
    }
}

fn basic(user: &str, password: &str) -> String {
    use base64::Engine as _;
    format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"))
    )
}

impl Setup {
    fn info(&self, name: &str, authorization: Option<&str>) -> Response {
        let headers: Vec<_> = authorization
            .map(|value| ("Authorization", value))
            .into_iter()
            .collect();
        let target = format!("{}/info/refs?service=git-upload-pack", target(name));
        http::request(self.warmdock.address(), "GET", &target, &headers, b"")
    }

    fn url_with(&self, user_info: &str, name: &str) -> String {
        self.warmdock
            .url(name)
            .replace("http://", &format!("http://{user_info}@"))
    }
}

#[test]
fn tokens_in_every_form() {
    let setup = setup("none");
    let good = [
        format!("Bearer {CI}"),
        format!("bearer {CI}"),
        basic("x-access-token", CI),
        basic("anybody", CI),
        basic("", CI),
        basic(CI, ""),
        basic(CI, "x-oauth-basic"),
    ];
    for value in &good {
        assert_eq!(setup.info(SAMPLE, Some(value)).status, 200, "{value}");
    }
    let bad = [
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        format!("Bearer {CI}x"),
        format!("Bearer {}", &CI[..CI.len() - 1]),
        format!("Bearer {}", CI.to_uppercase()),
        format!("Token {CI}"),
        CI.to_owned(),
        "Basic".to_owned(),
        "Basic !!!".to_owned(),
        "Basic eA==".to_owned(),
        basic("ci", "wrong"),
        basic("", ""),
        "\u{7f}".to_owned(),
        format!("Bearer {}", "x".repeat(5000)),
    ];
    for value in &bad {
        let response = setup.info(SAMPLE, Some(value));
        assert!(
            matches!(response.status, 400 | 401),
            "{value}: {}",
            response.status
        );
    }
}

#[test]
fn git_with_a_token_in_its_url() {
    let setup = setup("none");
    for (number, user_info) in [
        format!("x-access-token:{CI}"),
        format!("ci:{CI}"),
        CI.to_owned(),
    ]
    .iter()
    .enumerate()
    {
        for protocol in [0, 2] {
            let client = Client::new(protocol);
            let into = format!("ours{number}");
            // Without a password git would ask the person; an empty one is what people write.
            let user_info = if user_info.contains(':') {
                user_info.clone()
            } else {
                format!("{user_info}:")
            };
            client
                .clone(&setup.url_with(&user_info, SAMPLE), &into, &["--bare"])
                .ok();
        }
    }
    let client = Client::new(2);
    let header = format!("http.extraHeader=Authorization: Bearer {CI}");
    client
        .git(&[
            "-c",
            &header,
            "clone",
            "--quiet",
            &setup.warmdock.url(SAMPLE),
            "by-header",
        ])
        .ok();
}

#[test]
fn without_a_token_git_is_asked_for_one() {
    let setup = setup("none");
    let response = setup.info(SAMPLE, None);
    assert_eq!(response.status, 401);
    assert!(
        response
            .header("www-authenticate")
            .is_some_and(|value| value.starts_with("Basic realm="))
    );
    let output = Client::new(2)
        .clone(&setup.warmdock.url(SAMPLE), "ours", &[])
        .failed();
    assert!(
        output.stderr.contains("terminal prompts disabled")
            || output.stderr.contains("Authentication failed")
    );
    // The same for what does not exist, and for hosts that are not served.
    for name in ["team/absent", "nothing/at-all"] {
        let other = setup.info(name, None);
        assert_eq!((other.status, other.text()), (401, response.text()));
    }
}

/// The answers, but for the time of day.
fn shape(response: &Response) -> (u16, Vec<(String, String)>, Vec<u8>) {
    let headers = response
        .headers
        .iter()
        .filter(|(name, _)| !matches!(name.as_str(), "date" | "x-request-id"));
    (
        response.status,
        headers.cloned().collect(),
        response.body.clone(),
    )
}

#[test]
fn what_one_may_not_read_looks_like_what_is_not_there() {
    let setup = setup("none");
    // It is mirrored, which must not show either.
    assert_eq!(
        setup.info(SAMPLE, Some(&format!("Bearer {CI}"))).status,
        200
    );
    let as_other = format!("Bearer {OTHER}");
    assert_eq!(setup.info("other/repo", Some(&as_other)).status, 200);
    let (denied, missing) = (
        setup.info(SAMPLE, Some(&as_other)),
        setup.info("team/absent", Some(&as_other)),
    );
    assert_eq!(shape(&denied), shape(&missing));
    assert_eq!(denied.status, 404);
    // Nor does it look otherwise where one may read, but nothing is there.
    assert_eq!(
        shape(&setup.info("other/absent", Some(&as_other))),
        shape(&missing)
    );
    for version in ["version=2", "version=1"] {
        let ask = |name: &str, method: &str, end: &str| {
            let headers = [
                ("Authorization", as_other.as_str()),
                ("Git-Protocol", version),
                ("Content-Type", "application/x-git-upload-pack-request"),
            ];
            let target = format!("{}{end}", target(name));
            shape(&http::request(
                setup.warmdock.address(),
                method,
                &target,
                &headers,
                &pkt::v2("ls-refs", &[]),
            ))
        };
        for (method, end) in [
            ("GET", "/info/refs?service=git-upload-pack"),
            ("POST", "/git-upload-pack"),
            ("GET", "/info/refs?service=git-receive-pack"),
        ] {
            assert_eq!(
                ask(SAMPLE, method, end),
                ask("team/absent", method, end),
                "{method} {end} {version}"
            );
        }
    }
}

/// What is not allowed must not make the service fetch, or use up the upstream's patience.
#[test]
fn what_one_may_not_read_is_not_fetched() {
    let (upstream, _repo) = Upstream::with_sample();
    let secrets = crate::support::temporary_folder();
    std::fs::write(secrets.path().join("other"), OTHER).unwrap();
    let token =
        json!([{ "name": "other", "token_file": secrets.path().join("other"), "repos": ["x/y"] }]);
    let access = json!({ "anonymous": "none", "tokens": token });
    let warmdock = builder(&upstream.url()).set("/access", access).start();
    let url = warmdock
        .url(SAMPLE)
        .replace("http://", &format!("http://x:{OTHER}@"));
    let output = Client::new(2).clone(&url, "ours", &[]).failed();
    assert!(output.stderr.contains("not found"), "{}", output.describe());
    assert!(upstream.asked().is_empty());
}

#[test]
fn anonymous_reads_beside_tokens() {
    let setup = setup("read");
    assert_eq!(setup.info(SAMPLE, None).status, 200);
    assert_eq!(
        setup.info(SAMPLE, Some(&format!("Bearer {CI}"))).status,
        200
    );
    // Wrong credentials are an error and not anonymous: somebody should find out.
    assert_eq!(setup.info(SAMPLE, Some("Bearer wrong")).status, 401);
}

/// A token that is replaced in its file, and one that is taken out of the configuration.
#[test]
fn a_revoked_token_is_refused_after_the_reload() {
    let setup = setup("none");
    let with = |token: &str| setup.info(SAMPLE, Some(&format!("Bearer {token}"))).status;
    assert_eq!(with(CI), 200);
    std::fs::write(setup.secrets.path().join("ci"), "a-new-token\n").unwrap();
    setup.warmdock.signal("HUP");
    wait_for("the new token to be taken", || {
        (with("a-new-token") == 200).then_some(())
    });
    assert_eq!(with(CI), 401);
    let mut config = setup.warmdock.config();
    config["access"]["tokens"].as_array_mut().unwrap().remove(0);
    setup.warmdock.write_config(&config.to_string());
    setup.warmdock.signal("HUP");
    wait_for("the token to be refused", || {
        (with("a-new-token") == 401).then_some(())
    });
}

#[test]
fn no_token_in_log_page_or_metric() {
    let setup = setup("none");
    for protocol in [0, 2] {
        Client::new(protocol)
            .clone(
                &setup.url_with(&format!("ci:{CI}"), SAMPLE),
                "ours",
                &["--bare"],
            )
            .ok();
    }
    setup.info(SAMPLE, Some("Bearer wrong-token-5d2f"));
    setup.info("other/repo", Some(&format!("Bearer {CI}")));
    let auth = format!("Bearer {CI}");
    let mut texts = vec![setup.warmdock.log()];
    for target in [
        "/",
        "/metrics",
        "/readyz",
        "/api/v1/repos",
        "/api/v1/status",
    ] {
        let response = http::request(
            setup.warmdock.address(),
            "GET",
            target,
            &[("Authorization", &auth)],
            b"",
        );
        texts.push(format!("{:?} {}", response.headers, response.text()));
    }
    for text in &texts {
        for secret in [
            CI,
            OTHER,
            "wrong-token-5d2f",
            &basic("ci", CI)["Basic ".len()..],
        ] {
            assert!(!text.contains(secret), "{text}");
        }
    }
    drop(setup.upstream);
}
