//! A new configuration while the service runs: by signal, and by itself when the file changes.

use serde_json::{Value, json};

use crate::support::http;
use crate::support::{Client, HOST, SAMPLE, Upstream, Warmdock, wait_for, warmdock};

fn status(warmdock: &Warmdock, host: &str) -> u16 {
    let target = format!("/git/{host}/{SAMPLE}.git/info/refs?service=git-upload-pack");
    http::get(warmdock.address(), &target).status
}

/// The configuration with a second name for its upstream.
fn with_second_host(warmdock: &Warmdock) -> Value {
    let mut config = warmdock.config();
    let mut second = config["git"]["upstreams"][0].clone();
    second["host"] = json!("second.example.test");
    config["git"]["upstreams"]
        .as_array_mut()
        .unwrap()
        .push(second);
    config
}

fn is_complaint(event: &Value) -> bool {
    matches!(event["level"].as_str(), Some("ERROR" | "WARN"))
}

#[test]
fn by_signal() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    assert_eq!(status(&warmdock, "second.example.test"), 404);
    // Files that have not changed are read again for a signal only.
    warmdock.signal("HUP");
    warmdock.wait_log("the reload", |event| {
        event["message"] == "configuration reloaded"
    });
    warmdock.write_config(&with_second_host(&warmdock).to_string());
    warmdock.signal("HUP");
    wait_for("the second host", || {
        (status(&warmdock, "second.example.test") == 200).then_some(())
    });
    // And away again.
    let mut config = warmdock.config();
    config["git"]["upstreams"].as_array_mut().unwrap().remove(0);
    warmdock.write_config(&config.to_string());
    warmdock.signal("HUP");
    wait_for("the first host to be gone", || {
        (status(&warmdock, HOST) == 404).then_some(())
    });
}

#[test]
fn when_the_file_changes() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    warmdock.write_config(&with_second_host(&warmdock).to_string());
    wait_for("the second host", || {
        (status(&warmdock, "second.example.test") == 200).then_some(())
    });
    // Written in place, as editors do.
    let mut config = warmdock.config();
    config["git"]["upstreams"][1]["host"] = json!("third.example.test");
    std::fs::write(warmdock.config_file(), config.to_string()).unwrap();
    wait_for("the third host", || {
        (status(&warmdock, "third.example.test") == 200).then_some(())
    });
}

#[test]
fn a_wrong_file_keeps_the_old_configuration_and_says_so() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let good = warmdock.config();
    let mut wrong = with_second_host(&warmdock);
    wrong["git"]["max_age"] = json!("soon");
    for (text, word) in [
        (wrong.to_string(), "git.max_age"),
        ("{ no json".to_owned(), "JSON"),
    ] {
        warmdock.write_config(&text);
        warmdock.signal("HUP");
        warmdock.wait_log("a complaint that names the key", |event| {
            is_complaint(event) && event.to_string().contains(word)
        });
        assert_eq!(
            (
                status(&warmdock, HOST),
                status(&warmdock, "second.example.test")
            ),
            (200, 404)
        );
    }
    std::fs::remove_file(warmdock.config_file()).unwrap();
    warmdock.signal("HUP");
    warmdock.wait_log("a complaint that the file is gone", |event| {
        is_complaint(event) && event.to_string().contains("does not exist")
    });
    assert_eq!(status(&warmdock, HOST), 200);
    // A right one is taken again.
    warmdock.write_config(&good.to_string());
    warmdock.write_config(&with_second_host(&warmdock).to_string());
    warmdock.signal("HUP");
    wait_for("the second host", || {
        (status(&warmdock, "second.example.test") == 200).then_some(())
    });
}

#[test]
fn what_needs_a_restart_is_named() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    let mut config = with_second_host(&warmdock);
    config["listen"]["http"] = json!("127.0.0.1:1");
    config["data_dir"] = json!("/nonexistent/elsewhere");
    warmdock.write_config(&config.to_string());
    warmdock.signal("HUP");
    for key in ["listen.http", "data_dir"] {
        warmdock.wait_log("a notice that a restart is needed", |event| {
            is_complaint(event)
                && event.to_string().contains(key)
                && event.to_string().contains("restart")
        });
    }
    // The rest of it holds at once.
    wait_for("the second host", || {
        (status(&warmdock, "second.example.test") == 200).then_some(())
    });
}

/// Repositories that are new in `warm` are fetched, without anybody asking.
#[test]
fn new_warm_repositories_are_fetched() {
    let (upstream, repo) = Upstream::with_sample();
    let warmdock = warmdock::over_http(&upstream);
    let mut config = warmdock.config();
    config["git"]["warm"] = json!([format!("{HOST}/{SAMPLE}")]);
    warmdock.write_config(&config.to_string());
    warmdock.signal("HUP");
    warmdock.wait_mirrored(SAMPLE, &repo);
}

/// Requests under way do not notice.
#[test]
fn reloading_again_and_again_fails_nobody() {
    let (upstream, _repo) = Upstream::with_sample();
    let warmdock = warmdock::over_files(&upstream);
    Client::new(2)
        .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
        .ok();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                warmdock.signal("HUP");
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        });
        for number in 0..10 {
            Client::new(number % 3)
                .clone(&warmdock.url(SAMPLE), "ours", &["--bare"])
                .ok();
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
