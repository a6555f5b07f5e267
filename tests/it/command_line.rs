//! The command line: its exit codes, and what it prints for others to use.

use std::time::Duration;

use serde_json::json;

use crate::support::compare::{Objects, assert_same};
use crate::support::process;
use crate::support::warmdock::{builder, command, run};
use crate::support::{Client, HOST, SAMPLE, Upstream, wait_for, warmdock};

#[test]
fn a_wrong_command_line_ends_with_64() {
    let table: [&[&str]; 9] = [
        &["frobnicate"],
        &["--frobnicate"],
        &["serve", "--config"],
        &["serve", "extra"],
        &["serve", "--upstream", "no-url"],
        &["serve", "--upstream", "x=ftp://x.test"],
        &["client-config"],
        &["client-config", "svn", "--url", "http://x"],
        &["client-config", "git"],
    ];
    for args in table {
        let output = run(args);
        assert_eq!(output.status.code(), Some(64), "{}", output.describe());
        assert!(
            !output.stderr.is_empty() && !output.stderr.contains("panicked"),
            "{}",
            output.describe()
        );
    }
}

#[test]
fn help_and_version_are_fine() {
    for args in [
        &["--help"][..],
        &["serve", "--help"],
        &["--version"],
        &["help"],
    ] {
        let output = run(args).ok();
        assert!(output.text().contains("warmdock"), "{}", output.describe());
    }
}

#[test]
fn a_port_that_is_taken_ends_with_1() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let folder = crate::support::temporary_folder();
    let path = folder.path().join("config.json");
    std::fs::write(
        &path,
        json!({ "listen": { "http": address }, "data_dir": folder.path().join("data") })
            .to_string(),
    )
    .unwrap();
    let output = run(&["serve", "--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert!(output.stderr.contains(&address), "{}", output.describe());
}

/// Two services on one data folder would damage it.
#[test]
fn a_data_folder_that_is_in_use_is_refused() {
    let (upstream, _repo) = Upstream::with_sample();
    let first = warmdock::over_files(&upstream);
    let mut config = first.config();
    config["listen"]["http"] = "127.0.0.1:0".into();
    let folder = crate::support::temporary_folder();
    let path = folder.path().join("config.json");
    std::fs::write(&path, config.to_string()).unwrap();
    // Ends by itself: one that runs on is stopped after the limit, and fails the test.
    let output = run(&["serve", "--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert!(output.stderr.contains("data"), "{}", output.describe());
    Client::new(2)
        .clone(&first.url(SAMPLE), "ours", &["--bare"])
        .ok();
}

#[test]
fn upstreams_from_the_command_line() {
    let (upstream, repo) = Upstream::with_sample();
    let option = format!("local={}", upstream.file_url());
    let warmdock = builder("https://unused.example.test")
        .argument("--upstream")
        .argument(&option)
        .start();
    let url = format!("http://{}/git/local/{SAMPLE}.git", warmdock.address());
    let client = Client::new(2);
    client.clone(&url, "ours", &["--bare"]).ok();
    assert_eq!(
        client.git_in("ours", &["rev-parse", "main"]).ok().text(),
        repo.id("main")
    );
}

/// A port for those who must know it before the service starts.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

#[test]
fn healthcheck_asks_the_running_service() {
    let (upstream, _repo) = Upstream::with_sample();
    let address = format!("127.0.0.1:{}", free_port());
    let mut warmdock = builder(&upstream.file_url())
        .set("/listen/http", address)
        .start();
    let config = warmdock.config_file();
    let healthcheck = || {
        let mut check = command(&["healthcheck", "--config", config.to_str().unwrap()]);
        check.env("HOME", "/nonexistent");
        process::run(check, b"", Duration::from_secs(20))
    };
    wait_for("readiness", || healthcheck().status.success().then_some(()));
    warmdock.kill9();
    let output = healthcheck();
    assert_eq!(output.status.code(), Some(1), "{}", output.describe());
    assert!(!output.stderr.is_empty(), "says why");
}

/// Reads come through the service, and what is pushed goes to the address that somebody wrote.
#[track_caller]
fn goes_past_us_with_pushes(client: &Client, repo: &str, written: &str) {
    let push = client.git_in(repo, &["remote", "get-url", "--push", "origin"]);
    assert_eq!(push.ok().text(), written);
}

/// The printed configuration is used as it is: a build that knows nothing of the service goes through it.
#[test]
fn client_config_for_git() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let base = format!("http://{}", warmdock.address());
    let config = warmdock.config_file();
    for url in [base.clone(), format!("{base}/")] {
        let output = run(&[
            "client-config",
            "git",
            "--url",
            &url,
            "--config",
            config.to_str().unwrap(),
        ])
        .ok();
        let client = Client::new(2);
        client.write_gitconfig(&output.text());
        for written in [
            format!("https://{HOST}/{SAMPLE}.git"),
            format!("https://{HOST}/{SAMPLE}"),
        ] {
            let into = format!("ours{}", written.len());
            client.clone(&written, &into, &["--bare"]).ok();
            assert_eq!(
                client.git_in(&into, &["rev-parse", "main"]).ok().text(),
                repo.id("main")
            );
            goes_past_us_with_pushes(&client, &into, &written);
        }
        client
            .clone(&upstream.direct(SAMPLE), "direct", &["--bare"])
            .ok();
    }
}

#[test]
fn client_config_for_git_sends_ssh_addresses_too() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let base = format!("http://{}", warmdock.address());
    let output = run(&[
        "client-config",
        "git",
        "--url",
        &base,
        "--config",
        warmdock.config_file().to_str().unwrap(),
    ])
    .ok();
    let client = Client::new(2);
    client.write_gitconfig(&output.text());
    client
        .clone(&upstream.direct(SAMPLE), "direct", &["--bare"])
        .ok();
    for (number, written) in [
        format!("ssh://git@{HOST}/{SAMPLE}.git"),
        format!("git@{HOST}:{SAMPLE}.git"),
    ]
    .iter()
    .enumerate()
    {
        let into = format!("ours{number}");
        client.clone(written, &into, &["--bare"]).ok();
        assert_same(&client, &into, "direct", Objects::Reachable);
        goes_past_us_with_pushes(&client, &into, written);
    }
}

#[test]
fn client_config_wants_a_url_that_is_one() {
    for url in ["", "warmdock", "ftp://x", "http://"] {
        let output = run(&["client-config", "git", "--url", url]);
        assert_eq!(output.status.code(), Some(64), "{}", output.describe());
    }
}

/// On a terminal people read the log, otherwise machines do; `RUST_LOG` says how much.
#[test]
fn the_log_is_json_and_follows_rust_log() {
    let (upstream, _repo) = Upstream::with_sample();
    let quiet = builder(&upstream.file_url()).start();
    let verbose = builder(&upstream.file_url())
        .environment("RUST_LOG", "warmdock=debug")
        .start();
    for warmdock in [&quiet, &verbose] {
        Client::new(2)
            .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
            .ok();
    }
    let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
    for line in lines(quiet.log()).into_iter().chain(lines(verbose.log())) {
        let event: serde_json::Value =
            serde_json::from_str(&line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        assert!(
            event["message"].is_string() && event["level"].is_string(),
            "{line}"
        );
    }
    assert!(lines(verbose.log()).len() > lines(quiet.log()).len());
}
