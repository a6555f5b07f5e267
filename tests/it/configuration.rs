//! The configuration file: what is wrong is named with its key, and nothing is bound before everything is right.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::process::{self, Output};
use crate::support::warmdock::{command, run};

fn check(config: &str) -> Output {
    let folder = crate::support::temporary_folder();
    let path = folder.path().join("config.json");
    std::fs::write(&path, config).unwrap();
    run(&["check", "--config", path.to_str().unwrap()])
}

/// Everything that was printed for the person.
fn said(output: &Output) -> String {
    format!("{}{}", output.text(), output.stderr)
}

#[test]
fn wrong_values_are_named_with_their_key() {
    let upstream = |value: Value| json!({ "git": { "upstreams": [value] } });
    let table = [
        (json!({ "lisen": {} }), "lisen", "listen"),
        (json!({ "listen": { "htp": "x" } }), "listen.htp", "http"),
        (
            json!({ "listen": { "http": "localhost" } }),
            "listen.http",
            "localhost",
        ),
        (
            json!({ "listen": { "http": 80 } }),
            "listen.http",
            "found the number 80",
        ),
        (
            json!({ "listen": { "http": "127.0.0.1:99999" } }),
            "listen.http",
            "99999",
        ),
        (json!({ "listen": [] }), "listen", "object"),
        (
            json!({ "data_dir": "relative/path" }),
            "data_dir",
            "absolute",
        ),
        (
            json!({ "data_dir": "" }),
            "data_dir",
            "found text that is no absolute path",
        ),
        (
            json!({ "storage": { "max_size": "50" } }),
            "storage.max_size",
            "found \"50\"",
        ),
        (
            json!({ "storage": { "max_size": "fifty" } }),
            "storage.max_size",
            "fifty",
        ),
        (
            json!({ "storage": { "max_size": "-1GiB" } }),
            "storage.max_size",
            "-1GiB",
        ),
        (
            json!({ "storage": { "max_size": "0B" } }),
            "storage.max_size",
            "found 0 bytes",
        ),
        (
            json!({ "git": { "max_age": 10 } }),
            "git.max_age",
            "found the number 10",
        ),
        (
            json!({ "git": { "max_age": "soon" } }),
            "git.max_age",
            "soon",
        ),
        (
            json!({ "git": { "refresh": "" } }),
            "git.refresh",
            "found \"\"",
        ),
        (
            json!({ "git": { "when_upstream_fails": "panic" } }),
            "git.when_upstream_fails",
            "serve_stale",
        ),
        (
            json!({ "git": { "allow_wants": "all" } }),
            "git.allow_wants",
            "reachable",
        ),
        (
            json!({ "git": { "first_clones": 0 } }),
            "git.first_clones",
            "found 0;",
        ),
        (
            json!({ "git": { "refs": [] } }),
            "git.refs",
            "found an empty list",
        ),
        (
            json!({ "git": { "refs": ["heads/*"] } }),
            "git.refs[0]",
            "heads/*",
        ),
        (
            json!({ "git": { "refs": ["refs/heads/*", "refs/../x"] } }),
            "git.refs[1]",
            "refs/../x",
        ),
        (
            json!({ "git": { "warm": ["nowhere.test/a/b"] } }),
            "git.warm[0]",
            "nowhere.test",
        ),
        (
            json!({ "git": { "warm": ["github.com/../x"] } }),
            "git.warm[0]",
            "found \"github.com/../x\"",
        ),
        (
            upstream(json!({ "url": "https://x.test" })),
            "git.upstreams[0].host",
            "found nothing",
        ),
        (
            upstream(json!({ "host": "x.test" })),
            "git.upstreams[0].url",
            "found nothing",
        ),
        (
            upstream(json!({ "host": "x.test/y", "url": "https://x.test" })),
            "git.upstreams[0].host",
            "x.test/y",
        ),
        (
            upstream(json!({ "host": "../x", "url": "https://x.test" })),
            "git.upstreams[0].host",
            "../x",
        ),
        (
            upstream(json!({ "host": "x.test", "url": "x.test" })),
            "git.upstreams[0].url",
            "x.test",
        ),
        (
            upstream(json!({ "host": "x.test", "url": "ftp://x.test" })),
            "git.upstreams[0].url",
            "the scheme `ftp`",
        ),
        (
            upstream(json!({ "host": "x.test", "url": "file://relative" })),
            "git.upstreams[0].url",
            "with the host `relative`",
        ),
        (
            upstream(json!({ "host": "x.test", "url": "https://x.test", "token": "abc" })),
            "git.upstreams[0].token",
            "token_file",
        ),
        (
            upstream(
                json!({ "host": "x.test", "url": "https://x.test", "token_file": "/nonexistent/token" }),
            ),
            "git.upstreams[0].token_file",
            "/nonexistent/token",
        ),
        (
            upstream(json!({ "host": "x.test", "url": "https://x.test", "repos": ["a[b"] })),
            "git.upstreams[0].repos[0]",
            "a[b",
        ),
        (
            upstream(json!({ "host": "x.test", "url": "https://x.test", "auth": "digest" })),
            "git.upstreams[0].auth",
            "basic",
        ),
        (
            json!({ "git": { "upstreams": [{ "host": "x.test", "url": "https://x.test" }, { "host": "X.test", "url": "https://y.test" }] } }),
            "git.upstreams[1].host",
            "x.test",
        ),
        (
            json!({ "access": { "anonymous": "write" } }),
            "access.anonymous",
            "read",
        ),
        (
            json!({ "access": { "tokens": [{ "name": "a" }] } }),
            "access.tokens[0].token_file",
            "found nothing",
        ),
        (
            json!({ "access": { "tokens": [{ "token_file": "/nonexistent" }] } }),
            "access.tokens[0].name",
            "found nothing",
        ),
        (
            json!({ "limits": { "connections": 0 } }),
            "limits.connections",
            "found 0;",
        ),
        (
            json!({ "limits": { "connections": "many" } }),
            "limits.connections",
            "many",
        ),
        (
            json!({ "limits": { "connections": 1.5 } }),
            "limits.connections",
            "1.5",
        ),
        (
            json!({ "limits": { "packs_per_repo": -1 } }),
            "limits.packs_per_repo",
            "found -1",
        ),
        (
            json!({ "limits": { "request_body": "1 parsec" } }),
            "limits.request_body",
            "parsec",
        ),
        (
            json!({ "listen": { "tls": { "cert": "/nonexistent.crt" } } }),
            "listen.tls.key",
            "found nothing",
        ),
        (
            json!({ "listen": { "tls": { "cert": "/nonexistent.crt", "key": "/nonexistent.key" } } }),
            "listen.tls.cert",
            "/nonexistent.crt",
        ),
    ];
    for (config, key, word) in table {
        let output = check(&config.to_string());
        assert_eq!(
            output.status.code(),
            Some(78),
            "{config}: {}",
            output.describe()
        );
        let said = said(&output);
        let of_key = |line: &&str| line.trim_start().starts_with(&format!("{key}: "));
        let line = said.lines().find(of_key);
        assert!(
            line.is_some_and(|line| line.contains(word)),
            "{config}: expected {key:?} and {word:?}: {said}"
        );
        assert!(!said.contains("panicked"), "{said}");
    }
}

/// Who has made three mistakes should not have to run it three times.
#[test]
fn all_problems_are_named_at_once() {
    let output = check(
        r#"{ "storage": { "max_size": "x" }, "git": { "max_age": "y" }, "limits": { "connections": 0 } }"#,
    );
    let said = said(&output);
    for key in ["storage.max_size", "git.max_age", "limits.connections"] {
        assert!(said.contains(key), "{key}: {said}");
    }
}

#[test]
fn what_is_no_json() {
    for text in [
        "",
        "{",
        "[]",
        "null",
        "\"text\"",
        "{\"listen\": }",
        "{} {}",
        "\u{feff}{}x",
        "{\"git\": {}, \"git\": {}}",
    ] {
        let output = check(text);
        assert_eq!(
            output.status.code(),
            Some(78),
            "{text:?}: {}",
            output.describe()
        );
        assert!(said(&output).len() > 20, "{text:?}: {}", output.describe());
    }
    let folder = crate::support::temporary_folder();
    let path = folder.path().join("config.json");
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert_eq!(
        run(&["check", "--config", path.to_str().unwrap()])
            .status
            .code(),
        Some(78)
    );
}

/// What Docker makes of a bind mount whose file is not there.
#[test]
fn a_folder_instead_of_the_file() {
    let folder = crate::support::temporary_folder();
    for subcommand in ["check", "serve"] {
        let output = run(&[subcommand, "--config", folder.path().to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(78), "{}", output.describe());
        let said = said(&output);
        assert!(
            said.contains("folder") || said.contains("directory"),
            "{said}"
        );
        assert!(
            said.contains("mount"),
            "says what probably happened: {said}"
        );
    }
}

#[test]
fn a_file_that_is_not_there() {
    for subcommand in ["check", "serve"] {
        let output = run(&[subcommand, "--config", "/nonexistent/config.json"]);
        assert_eq!(output.status.code(), Some(78), "{}", output.describe());
        assert!(said(&output).contains("/nonexistent/config.json"));
    }
}

#[test]
fn serve_with_a_wrong_file_binds_nothing() {
    let folder = crate::support::temporary_folder();
    let path = folder.path().join("config.json");
    std::fs::write(
        &path,
        r#"{ "listen": { "http": "127.0.0.1:0" }, "git": { "max_age": "soon" } }"#,
    )
    .unwrap();
    let output = run(&["serve", "--config", path.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78), "{}", output.describe());
    assert!(said(&output).contains("git.max_age"));
    assert!(!said(&output).contains("listening"));
}

#[test]
fn check_prints_the_effective_configuration_without_secrets() {
    let folder = crate::support::temporary_folder();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "very-secret-0c51\n").unwrap();
    let config = json!({
        "data_dir": folder.path().join("data"),
        "git": {
            "upstreams": [{ "host": "X.test", "url": "https://x.test", "token_file": secret, "repos": ["a/*"] }],
            "max_age": "90s",
        },
        "access": { "anonymous": "none", "tokens": [{ "name": "ci", "token_file": secret }] },
        "storage": { "max_size": "1GiB" },
    });
    let output = check(&config.to_string()).ok();
    let printed: Value =
        serde_json::from_str(&output.text()).unwrap_or_else(|_| panic!("{}", output.describe()));
    assert_eq!(printed["git"]["upstreams"][0]["host"], "x.test");
    assert_eq!(printed["access"]["anonymous"], "none");
    // A section that is absent takes its default, and the effective one says so.
    assert!(printed["limits"]["connections"].is_number());
    assert_eq!(printed["git"]["when_upstream_fails"], "serve_stale");
    assert!(!said(&output).contains("very-secret"));
    assert!(
        !folder.path().join("data").exists(),
        "checking makes nothing"
    );
    // It can be used as a configuration again, and means the same.
    let again = check(&output.text()).ok();
    assert_eq!(
        serde_json::from_str::<Value>(&again.text()).unwrap(),
        printed
    );
}

#[test]
fn the_embedded_default() {
    let home = crate::support::temporary_folder();
    let mut check = command(&["check"]);
    check.env("HOME", home.path());
    if Path::new("/config/app_config.json").exists() {
        eprintln!("skipped: this machine has a configuration of its own");
        return;
    }
    let output = process::run(check, b"", Duration::from_secs(20)).ok();
    let printed: Value = serde_json::from_str(&output.text()).unwrap();
    assert_eq!(printed["listen"]["http"], "127.0.0.1:8080");
    let hosts: Vec<_> = printed["git"]["upstreams"]
        .as_array()
        .unwrap()
        .iter()
        .map(|upstream| &upstream["host"])
        .collect();
    assert_eq!(
        hosts,
        ["github.com", "gitlab.com", "codeberg.org", "bitbucket.org"]
    );
    assert!(
        printed["data_dir"]
            .as_str()
            .unwrap()
            .starts_with(home.path().to_str().unwrap())
    );
}

#[test]
fn the_environment_names_the_file() {
    let folder = crate::support::temporary_folder();
    let path = folder.path().join("config.json");
    std::fs::write(&path, r#"{ "git": { "max_age": "77s" } }"#).unwrap();
    let mut check = command(&["check"]);
    check
        .env("WARMDOCK_CONFIG", &path)
        .env("HOME", folder.path());
    let output = process::run(check, b"", Duration::from_secs(20)).ok();
    assert!(
        output.text().contains("77s") || output.text().contains("1m 17s"),
        "{}",
        output.describe()
    );
}

/// The schema is one, and agrees with what the program itself takes and refuses.
#[test]
fn the_schema() {
    let output = run(&["check", "--schema"]).ok();
    let schema: Value = serde_json::from_str(&output.text()).expect("JSON");
    assert!(schema["$schema"].is_string());
    for key in ["listen", "data_dir", "storage", "git", "access", "limits"] {
        assert!(!schema["properties"][key].is_null(), "{key}");
    }
    assert_eq!(schema["additionalProperties"], false);
    // What editors find it by.
    let output = check(r#"{"$schema": "./warmdock.schema.json", "git": {"max_age": "77s"}}"#).ok();
    assert!(!output.text().contains("$schema"), "{}", output.describe());
}

/// The example that the README and compose use.
#[test]
fn the_example_is_right() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/app_config.json");
    let text = std::fs::read_to_string(&path).expect("config/app_config.json");
    let example: Value = serde_json::from_str(&text).expect("JSON");
    check(&example.to_string()).ok();
}

/// The paths of all values below `schema`, as the README writes them.
fn keys_below(schema: &Value, all: &Value, path: &str, keys: &mut Vec<String>) {
    let named = [&schema["$ref"], &schema["anyOf"][0]["$ref"]];
    let named = named.iter().find_map(|name| name.as_str());
    let schema = named.map_or(schema, |name| {
        &all["$defs"][name.trim_start_matches("#/$defs/")]
    });
    if let Some(properties) = schema["properties"].as_object() {
        for (key, below) in properties {
            let path = format!("{path}.{key}");
            keys_below(below, all, path.trim_start_matches('.'), keys);
        }
    } else if schema["items"]["$ref"].is_string() {
        keys_below(&schema["items"], all, &format!("{path}[]"), keys);
    } else {
        keys.push(path.trim_end_matches("[]").to_owned());
    }
}

#[test]
fn the_readme_has_every_key_and_marks_what_needs_a_restart() {
    let schema: Value = serde_json::from_str(&run(&["check", "--schema"]).ok().text()).unwrap();
    let mut keys = Vec::new();
    keys_below(&schema, &schema, "", &mut keys);
    assert!(keys.len() > 50, "{keys:?}");
    let readme = include_str!("../../README.md");
    for key in keys.iter().filter(|key| *key != "$schema") {
        assert!(readme.contains(&format!("\n| `{key}`")), "no row for {key}");
    }
    let restart = include_str!("../../src/config/restart.rs");
    for key in restart.split('"').skip(1).step_by(2) {
        let row = format!("| `{key}");
        let mut rows = readme.lines().filter(|line| line.starts_with(&row));
        assert!(rows.any(|row| row.contains('⟲')), "{key}");
    }
}
