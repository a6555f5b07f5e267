//! Wrong values with what an operator reads about each.

use std::path::PathBuf;

use crate::config::environment::Environment;
use crate::config::file;
use crate::config::problem::Problems;
use crate::config::{AllowWants, Anonymous, Config, UpstreamAuth, WhenUpstreamFails};

fn environment() -> Environment {
    Environment {
        cache_home: Some("/cache".into()),
        ..Environment::default()
    }
}

fn config(text: &str) -> Result<Config, Problems> {
    Config::parse(text, &environment())
}

/// The only problem of `text`.
fn problem(text: &str) -> String {
    let problems = config(text).expect_err(text);
    assert_eq!(problems.iter().count(), 1, "{text}: {problems}");
    problems.to_string()
}

/// A folder with the files that a test needs.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// The path of a new file, as JSON text.
    fn file(&self, name: &str, content: &str) -> String {
        std::fs::write(self.0.path().join(name), content).unwrap();
        self.path(name)
    }

    fn path(&self, name: &str) -> String {
        format!("{:?}", self.0.path().join(name))
    }
}

fn tokens(list: &[(&str, &str)]) -> String {
    let list: Vec<_> = list
        .iter()
        .map(|(name, file)| format!(r#"{{"name": {name:?}, "token_file": {file}}}"#))
        .collect();
    format!(r#"{{"access": {{"tokens": [{}]}}}}"#, list.join(", "))
}

#[test]
fn the_embedded_default() {
    let config = Config::embedded(&environment());
    assert_eq!(config.listen.http, "127.0.0.1:8080".parse().unwrap());
    assert!(config.listen.tls.is_none());
    assert_eq!(config.data_dir, PathBuf::from("/cache/warmdock"));
    assert_eq!(config.storage.max_size, 50 << 30);
    let urls: Vec<&str> = config
        .git
        .upstreams
        .iter()
        .map(|upstream| upstream.url.as_str())
        .collect();
    assert_eq!(
        urls,
        [
            "https://github.com/",
            "https://gitlab.com/",
            "https://codeberg.org/",
            "https://bitbucket.org/"
        ]
    );
    assert_eq!(
        (config.git.max_age.as_secs(), config.git.refresh.as_secs()),
        (10, 30)
    );
    assert_eq!(
        config.git.when_upstream_fails,
        WhenUpstreamFails::ServeStale
    );
    assert_eq!(config.git.allow_wants, AllowWants::Reachable);
    assert_eq!(config.git.refs, ["refs/heads/*", "refs/tags/*"]);
    assert_eq!(config.git.keep_unreachable.as_secs(), 24 * 60 * 60);
    assert_eq!(config.access.anonymous, Anonymous::Read);
    assert_eq!(config.limits.connections, 1024);
    assert_eq!(config.limits.request_body, 64 << 20);
    assert_eq!(config.limits.first_clone_timeout.as_secs(), 2 * 60 * 60);
}

/// Key, value, what is found, what is expected. Words in capitals are in [`EXPECTED`].
const WRONG_VALUES: &str = r#"
listen.http | "localhost:80" | "localhost:80" | ADDRESS
listen.http | 8080 | the number 8080 | ADDRESS
storage.max_size | "lots" | "lots" | SIZE
storage.max_size | 53687091200 | the number 53687091200 | SIZE
storage.max_size | "0GiB" | 0 bytes | more than nothing
git.max_age | 10 | the number 10 | DURATION
git.max_age | "10" | "10" | DURATION
git.max_age | "3years" | "3years" | DURATION
git.max_age | null | null | DURATION
git.refresh | "500ms" | "500ms" | at least "1s"
git.when_upstream_fails | "panic" | "panic" | one of "serve_stale", "fail"
git.allow_wants | "all" | "all" | one of "advertised", "reachable"
git.first_clones | 0 | 0 | a whole number from 1 to 1000
git.first_clones | -1 | -1 | a whole number from 1 to 1000
git.first_clones | 1.5 | 1.5 | a whole number from 1 to 1000
git.first_clones | "2" | "2" | a whole number from 1 to 1000
git.refs | [] | an empty list | at least one entry, such as "refs/heads/*"
git.refs[0] | ["refs/*"] | "refs/*" | REFERENCE
git.refs[0] | ["heads/*"] | "heads/*" | REFERENCE
git.refs[1] | ["refs/heads/*", "refs/../x"] | "refs/../x" | REFERENCE
git.refs[0] | ["refs/pull/*/head"] | "refs/pull/*/head" | REFERENCE
git.warm[0] | ["github.com"] | "github.com" (expected `host/path`, found nothing after the host) | a repository as `host/path`, such as "github.com/my-org/app"
git.warm[1] | ["github.com/a/b", "example.org/a/b"] | "example.org/a/b" | a repository of a host in git.upstreams (github.com, gitlab.com, codeberg.org, bitbucket.org)
git.upstreams[0].host | [{"url": "https://x"}] | nothing | HOST
git.upstreams[0].host | [{"host": "a/b", "url": "https://x"}] | "a/b" | HOST
git.upstreams[1].host | [{"host": "x", "url": "https://x"}, {"host": "X", "url": "https://x"}] | "x" a second time | each host once
git.upstreams[0].url | [{"host": "x"}] | nothing | URL
git.upstreams[0].url | [{"host": "x", "url": "x"}] | no URL but "x" | URL
git.upstreams[0].url | [{"host": "x", "url": "ftp://x"}] | a URL of the scheme `ftp` | URL
git.upstreams[0].url | [{"host": "x", "url": "file://srv/git"}] | a `file` URL with the host `srv` | URL
git.upstreams[0].url | [{"host": "x", "url": "https://me:hunter2@x"}] | a URL with a user name or password in it (not shown) | URL
git.upstreams[0].url | [{"host": "x", "url": "git@x:y"}] | an address in the form `user@host:path`, which is written `ssh://user@host/path` | URL
git.upstreams[0].url | [{"host": "x", "url": "ssh://me:hunter2@x"}] | a URL with a user name or password in it (not shown) | URL
git.upstreams[0].key_file | [{"host": "x", "url": "https://x", "key_file": "/x"}] | a file for SSH beside a URL of the scheme `https` | none, or an ssh:// URL
git.upstreams[0].auth | [{"host": "x", "url": "https://x", "auth": "digest"}] | "digest" | one of "basic", "bearer"
git.upstreams[0].user | [{"host": "x", "url": "https://x", "user": "a:b"}] | another text (not shown, it may be a secret) | a user name of printable ASCII without `:` and spaces
git.upstreams[0].repos[1] | [{"host": "x", "url": "https://x", "repos": ["a/*", "/b"]}] | "/b" (it begins or ends with `/`, which no repository's name does) | a glob pattern such as "my-org/*"
git.upstreams[0].token_file | [{"host": "x", "url": "https://x", "token_file": "hunter2"}] | text that is no absolute path (not shown, it may be a secret) | FILE
listen.public_url | "ssh://x" | a URL of the scheme `ssh` | HTTP
listen.trusted_proxies[1] | ["::1", "10.0.0.0/99"] | "10.0.0.0/99" | NETWORK
crates.max_age | "soon" | "soon" | DURATION
crates.registries[0].name | [{"url": "https://x"}] | nothing | REGISTRY
crates.registries[0].name | [{"name": "../x", "url": "https://x"}] | "../x" | REGISTRY
crates.registries[1].name | [{"name": "x", "url": "https://x"}, {"name": "X", "url": "https://y"}] | "x" a second time | each name once
crates.registries[1].name | [{"name": "a.b", "url": "https://x"}, {"name": "a-b", "url": "https://y"}] | "a-b" beside "a.b" | another name: cargo takes `-` in place of `.`, and so these two for one
crates.registries[0].url | [{"name": "corp"}] | nothing | the address of the sparse index, which only crates.io can be without
crates.registries[0].url | [{"name": "crates.corp.example"}] | nothing | the address of the sparse index, which only crates.io can be without
crates.registries[0].url | [{"name": "x", "url": "https://me:hunter2@x"}] | a URL with a user name or password in it (not shown) | HTTP
crates.registries[0].token_file | [{"name": "crates.io", "token_file": "hunter2"}] | text that is no absolute path (not shown, it may be a secret) | FILE
crates.warm[0] | ["Cargo.lock"] | text that is no absolute path (not shown, it may be a secret) | LOCK
crates.warm[0] | [{"path": "x"}] | an object without `git` | LOCK
crates.warm[0] | [{"git": "github.com/a/b", "path": "../x"}] | the path "../x", which is none below a repository | LOCK
crates.warm[0] | [{"git": "github.com/a/b"}] | "github.com/a/b" | a repository of git.warm
access.anonymous | "write" | "write" | one of "read", "none"
access.anonymous | true | true or false | one of "read", "none"
access.tokens[0].token_file | [{"name": "ci"}] | nothing | FILE
access.ask_upstream[0].host | [{"host": "x", "users": ["me"]}] | "x" | a host of git.upstreams that is no folder
access.ask_upstream[0].users | [{"host": "github.com"}] | nothing | at least one user of that host
access.ask_upstream[0].users[0] | [{"host": "github.com", "users": ["../x"]}] | "../x" | a user of letters, digits, `.`, `-` and `_`
access.ask_upstream[0].keep | [{"host": "github.com", "users": ["x"], "keep": "0s"}] | "0s" | at least "1s"
access.tokens[0].token_file | [{"name": "ci", "token_file": "/nowhere/token"}] | "/nowhere/token", which does not exist | a file with one token
limits.connections | 0 | 0 | a whole number from 1 to 1000000
limits.header_timeout | "0s" | "0s" | at least "10ms"
limits.request_body | "1 parsec" | "1 parsec" | SIZE
limits.pack_threads | 5000 | 5000 | a whole number from 0 to 1024
"#;

const EXPECTED: [(&str, &str); 11] = [
    ("HTTP", "`https://host/path/` or `http://host/path/`"),
    (
        "NETWORK",
        r#"an IP address or a network, such as "10.0.0.0/8" or "::1""#,
    ),
    (
        "REGISTRY",
        "a name of 1 to 64 letters, digits, `.`, `-` and `_` that does not begin with `.`",
    ),
    (
        "LOCK",
        r#"the absolute path of a Cargo.lock, or `{"git": "host/path", "path": "Cargo.lock"}`"#,
    ),
    (
        "ADDRESS",
        r#"an IP address and a port, such as "0.0.0.0:8080" or "[::]:8080""#,
    ),
    (
        "DURATION",
        r#"a duration in quotes with its unit, such as "10s", "500ms" or "1h 30m", of at most 366 days"#,
    ),
    ("FILE", "an absolute path, beginning with `/`"),
    (
        "HOST",
        r#"a host name such as "github.com" or "git.corp.example:8443""#,
    ),
    (
        "REFERENCE",
        r#"`refs/<something>/*`, or one reference in full such as "refs/heads/main""#,
    ),
    (
        "SIZE",
        r#"a size in quotes with its unit, such as "50GiB" or "500MB""#,
    ),
    (
        "URL",
        "`https://host`, `http://host`, `ssh://git@host` or `file:///absolute/path`",
    ),
];

#[test]
fn every_wrong_value_says_where_what_and_what_is_allowed() {
    for row in WRONG_VALUES.trim().lines() {
        let [key, value, found, expected] = row.split(" | ").collect::<Vec<_>>()[..] else {
            panic!("{row}")
        };
        let expected = EXPECTED
            .iter()
            .find(|(word, _)| *word == expected)
            .map_or(expected, |(_, words)| words);
        let (section, name) = key.split_once('.').unwrap();
        let name = name.split(['[', '.']).next().unwrap();
        let text = format!(r#"{{"{section}": {{"{name}": {value}}}}}"#);
        let message = problem(&text);
        assert_eq!(
            message,
            format!("{key}: found {found}; expected {expected}"),
            "{text}"
        );
        assert!(!message.contains("hunter2"));
    }
}

#[test]
fn all_problems_at_once() {
    let text = r#"{"colour": 1, "data_dir": "data", "storage": {"max_size": 1},
        "git": {"upstreams": [5, {"host": "x", "url": "y"}], "max_age": "x", "warm": ["nope"]}, "access": {"anonymous": 1}}"#;
    let problems = config(text).unwrap_err();
    let keys: Vec<&str> = problems
        .iter()
        .map(|problem| problem.key.as_str())
        .collect();
    assert_eq!(
        keys,
        [
            "colour",
            "git.upstreams[0]",
            "data_dir",
            "storage.max_size",
            "git.upstreams[1].url",
            "git.warm[0]",
            "git.max_age",
            "access.anonymous"
        ]
    );
}

#[test]
fn a_warm_repository_must_be_allowed() {
    let text = r#"{"git": {"upstreams": [{"host": "x", "url": "https://x", "repos": ["a/*"]}], "warm": ["X/a/b.git", "x/a/b"]}}"#;
    let warm = config(text).unwrap().git.warm;
    assert_eq!(
        warm.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["x/a/b"],
        "once"
    );
    assert_eq!(
        problem(&text.replace("X/a/b.git", "x/b/c")),
        "git.warm[0]: found \"x/b/c\"; expected a repository that the upstream's repos allow ([\"a/*\"])"
    );
}

#[test]
fn token_files() {
    let folder = Folder::new();
    let good = folder.file("good", "hunter2\n");
    let config = config(&tokens(&[("ci", &good)])).unwrap();
    assert_eq!(config.access.tokens[0].secret.expose(), b"hunter2");
    assert!(config.access.tokens[0].repos.matches("any/thing"));

    std::fs::create_dir(folder.0.path().join("folder")).unwrap();
    for (file, found) in [
        (folder.file("empty", ""), "which is empty"),
        (folder.file("blank", " \n"), "which is empty"),
        (folder.path("missing"), "which does not exist"),
        (folder.path("good/below"), "which does not exist"),
        (
            folder.path("folder"),
            "which is a folder (Docker makes one where the file of a bind mount is missing",
        ),
        ("\"/dev/null\"".into(), "which is no regular file"),
        (
            folder.file("two", "hunter2 hunter3"),
            "in which there are more words, or other characters than printable ASCII",
        ),
        (
            folder.file("large", &"x".repeat((1 << 20) + 1)),
            "which is larger than 1 MiB",
        ),
    ] {
        let message = problem(&tokens(&[("ci", &file)]));
        assert!(
            message.starts_with(&format!(
                "access.tokens[0].token_file: found {file}, {found}"
            )),
            "{message}"
        );
        assert!(!message.contains("hunter"), "{message}");
    }
    assert_eq!(
        problem(&tokens(&[
            ("ci", &good),
            ("ci", &folder.file("other", "x"))
        ])),
        "access.tokens[1].name: found \"ci\" a second time; expected each name once"
    );
    assert_eq!(
        problem(&tokens(&[
            ("ci", &good),
            ("cd", &folder.file("copy", "hunter2"))
        ])),
        "access.tokens[1].token_file: found the same token as that of \"ci\"; expected a token of its own"
    );
}

/// Some registries have tokens that begin with a scheme; cargo sends them as they are.
#[test]
fn registry_tokens() {
    let folder = Folder::new();
    let text = |file: &str| {
        format!(
            r#"{{"crates": {{"registries": [{{"name": "crates.io", "token_file": {file}}}]}}}}"#
        )
    };
    for token in ["hunter2", "Bearer hunter2", "Basic hunter2=="] {
        let file = folder.file("token", &format!("{token}\n"));
        let config = config(&text(&file)).unwrap();
        let kept = config.crates.registries[0].token.as_ref().unwrap();
        assert_eq!(kept.expose(), token.as_bytes());
        for shown in [config.to_json(), format!("{config:?}")] {
            assert!(!shown.contains("hunter"), "{shown}");
        }
    }
    for wrong in [
        "Bearer hunter2 hunter3",
        "Bearer  hunter2",
        "Bearer\thunter2",
        "Bearer hunter2\nhunter3",
        "Bearer hünter2",
        "\"Bearer hunter2\"",
        "Authorization: hunter2",
    ] {
        let file = folder.file("token", wrong);
        assert_eq!(
            problem(&text(&file)),
            format!(
                "crates.registries[0].token_file: found {file}, in which there are more words, or other characters \
                 than printable ASCII; expected a file with one token, or with a scheme such as `Bearer`, one space \
                 and the token"
            )
        );
    }
}

#[test]
fn upstream_tokens() {
    let folder = Folder::new();
    let token = folder.file("token", "hunter2");
    let text = |url: &str| {
        format!(
            r#"{{"git": {{"upstreams": [{{"host": "x", "url": {url:?}, "token_file": {token}, "auth": "bearer"}}]}}}}"#
        )
    };
    let config = config(&text("https://x")).unwrap();
    let upstream = config.upstream("x").unwrap();
    assert_eq!(upstream.token.as_ref().unwrap().expose(), b"hunter2");
    assert_eq!(
        (upstream.auth, upstream.user.as_str()),
        (UpstreamAuth::Bearer, "x-access-token")
    );
    assert!(
        problem(&text("file:///srv"))
            .starts_with("git.upstreams[0].token_file: found a token beside the folder")
    );
}

#[test]
#[cfg(feature = "s3")]
fn a_bucket_needs_a_name_and_keys() {
    let folder = Folder::new();
    let (id, secret) = (
        folder.file("id", "hunter1"),
        folder.file("secret", "hunter2"),
    );
    let text = |bucket: &str| {
        format!(
            r#"{{"storage": {{"s3": {{"bucket": {bucket:?}, "access_key_file": {id}, "secret_key_file": {secret}}}}}}}"#
        )
    };
    let config = config(&text("warm")).unwrap();
    let s3 = config.storage.s3.as_ref().unwrap();
    assert_eq!(
        (s3.region.as_str(), s3.prefix.as_str()),
        ("us-east-1", "warmdock")
    );
    assert_eq!(s3.secret_key.expose(), b"hunter2");
    assert!(!config.to_json().contains("hunter"));
    assert_eq!(
        problem(&text("a/b")),
        "storage.s3.bucket: found \"a/b\"; expected letters, digits, `.`, `-` and `_`"
    );
    let problems = super::super::Config::parse(r#"{"storage": {"s3": {}}}"#, &environment());
    let keys: Vec<_> = problems
        .unwrap_err()
        .iter()
        .map(|problem| problem.key.clone())
        .collect();
    assert_eq!(
        keys,
        [
            "storage.s3.bucket",
            "storage.s3.access_key_file",
            "storage.s3.secret_key_file"
        ]
    );
}

#[test]
fn data_dir_is_no_file() {
    let folder = Folder::new();
    let file = folder.file("file", "");
    let message = problem(&format!(r#"{{"data_dir": {file}}}"#));
    assert_eq!(
        message,
        format!("data_dir: found {file}, which is no folder; expected a folder")
    );
}

#[test]
fn what_check_prints_is_a_configuration_without_secrets() {
    let folder = Folder::new();
    let (one, two) = (folder.file("one", "hunter1"), folder.file("two", "hunter2"));
    let text = format!(
        r#"{{"listen": {{"http": "[::]:80"}}, "data_dir": "/data", "storage": {{"max_size": "1500MB"}},
            "git": {{"upstreams": [{{"host": "x", "url": "https://x/y", "token_file": {one}, "repos": ["a/**"]}}],
                "warm": ["x/a/b"], "max_age": "1h 30m", "when_upstream_fails": "fail", "allow_wants": "advertised"}},
            "access": {{"anonymous": "none", "tokens": [{{"name": "ci", "token_file": {two}, "repos": ["x/**"]}}]}}}}"#
    );
    let effective = config(&text).unwrap();
    let printed = effective.to_json();
    assert_eq!(config(&printed).unwrap().to_json(), printed);
    for part in [
        "\"1500000000B\"",
        "\"1h 30m\"",
        "\"https://x/y\"",
        "\"x/a/b\"",
        "\"[::]:80\"",
        "\"advertised\"",
    ] {
        assert!(printed.contains(part), "{part} in {printed}");
    }
    for shown in [printed, format!("{effective:?}")] {
        assert!(!shown.contains("hunter"), "{shown}");
    }
}

#[test]
fn the_example_is_valid_and_names_no_file_that_may_be_missing() {
    let config = config(include_str!("../../../config/app_config.json")).unwrap();
    assert_eq!(config.listen.http, "0.0.0.0:8080".parse().unwrap());
    assert_eq!(config.git.upstreams.len(), 4);
}

/// The schema knows the keys that the types know, refuses others and has the defaults.
#[test]
fn the_schema_follows_the_types() {
    let schema = file::schema().to_value();
    let printed: serde_json::Value =
        serde_json::from_str(&Config::embedded(&environment()).to_json()).unwrap();
    for (section, value) in printed.as_object().unwrap() {
        let property = &schema["properties"][section];
        assert!(property.is_object(), "{section}");
        let Some(name) = property["$ref"]
            .as_str()
            .and_then(|name| name.strip_prefix("#/$defs/"))
        else {
            continue;
        };
        let section_schema = &schema["$defs"][name];
        assert_eq!(section_schema["additionalProperties"], false, "{section}");
        for key in value.as_object().unwrap().keys() {
            assert!(
                section_schema["properties"][key].is_object(),
                "{section}.{key}"
            );
        }
    }
    assert_eq!(schema["additionalProperties"], false);
    assert_eq!(
        schema["$defs"]["UpstreamFile"]["required"],
        serde_json::json!(["host", "url"])
    );
    assert_eq!(
        schema["$defs"]["GitFile"]["properties"]["max_age"]["default"],
        "10s"
    );
    assert_eq!(
        schema["$defs"]["GitFile"]["properties"]["warm"]["items"]["type"],
        "string"
    );
}

#[test]
#[cfg(not(feature = "s3"))]
fn a_bucket_needs_the_feature() {
    assert_eq!(
        problem(r#"{"storage": {"s3": {}}}"#),
        "storage.s3: found a bucket, which this build knows nothing of; expected none, or a build with the cargo feature `s3`"
    );
}
