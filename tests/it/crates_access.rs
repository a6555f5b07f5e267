//! Who may read which registry, and whose credentials go where.

use std::path::Path;

use serde_json::{Value, json};

use crate::crates_cache::over;
use crate::support::registry::{Published, Registry, noise};
use crate::support::warmdock::{Builder, run};
use crate::support::{Warmdock, http};

fn secret(folder: &Path, name: &str, content: &str) -> String {
    let path = folder.join(name);
    std::fs::write(&path, format!("{content}\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

fn status(warmdock: &Warmdock, target: &str, token: Option<&str>) -> u16 {
    let headers: Vec<_> = token
        .iter()
        .map(|token| ("Authorization", *token))
        .collect();
    http::request(warmdock.address(), "GET", target, &headers, b"").status
}

/// A registry that wants a token, under two names: one for all, one that is hidden from some.
fn closed(registry: &Registry, folder: &Path) -> Builder {
    registry.require("up-secret");
    let token = secret(folder, "up", "up-secret");
    let entry = |name: &str| json!({ "name": name, "url": registry.url(), "token_file": token });
    let tokens = json!([
        { "name": "all", "token_file": secret(folder, "all", "t-all") },
        { "name": "corp", "token_file": secret(folder, "corp", "t-corp"), "registries": ["corp"] },
        { "name": "git", "token_file": secret(folder, "git", "t-git"), "repos": ["git.example.test/team/*"] },
        { "name": "none", "token_file": secret(folder, "none", "t-none"), "registries": [] },
    ]);
    over(registry)
        .set(
            "/crates/registries",
            json!([entry("corp"), entry("hidden"), { "name": "crates.io", "url": registry.url() }]),
        )
        .set("/access", json!({ "anonymous": "none", "tokens": tokens }))
}

#[test]
fn what_may_not_be_read_looks_as_if_it_did_not_exist() {
    let registry = Registry::start();
    let folder = crate::support::temporary_folder();
    let file = registry.publish_bytes("big", "1.0.0", &[], noise(3000, 1));
    let warmdock = closed(&registry, folder.path()).start();
    let table = [
        (None, [401, 401, 401]),
        (Some("t-wrong"), [401, 401, 401]),
        (Some("Bearer t-wrong"), [401, 401, 401]),
        (Some("t-all"), [200, 200, 200]),
        (Some("Bearer t-all"), [200, 200, 200]),
        (Some("t-corp"), [200, 404, 404]),
        (Some("t-git"), [404, 404, 200]),
        (Some("t-none"), [404, 404, 404]),
    ];
    for (token, expected) in table {
        let of = |path: &str| {
            ["corp", "hidden", "crates.io"]
                .map(|name| status(&warmdock, &format!("/crates/{name}/{path}"), token))
        };
        assert_eq!(of("config.json"), expected, "{token:?}");
    }
    let target = |name: &str| format!("/crates/{name}/{}", file.path());
    assert_eq!(status(&warmdock, &target("hidden"), Some("t-corp")), 404);
    assert_eq!(status(&warmdock, &target("nothing"), Some("t-corp")), 404);
    assert_eq!(status(&warmdock, &target("corp"), Some("t-corp")), 200);
    assert_eq!(
        status(&warmdock, "/crates/corp/3/b/big", Some("t-corp")),
        200
    );
    let config = http::request(
        warmdock.address(),
        "GET",
        "/crates/corp/config.json",
        &[("Authorization", "t-corp")],
        b"",
    );
    let config: Value = serde_json::from_slice(&config.body).unwrap();
    assert_eq!(config["auth-required"], true);
    // The registry sees our token, and never that of a client.
    for asked in registry.asked() {
        let shown = asked.header("authorization").unwrap_or("up-secret");
        assert_eq!(shown, "up-secret", "{}", asked.path);
    }
    for text in [warmdock.log(), warmdock.metrics()] {
        for secret in ["up-secret", "t-all", "t-corp"] {
            assert!(!text.contains(secret));
        }
    }
    let pages = ["/", "/api/v1/status", "/api/v1/client-config/cargo"];
    for page in pages {
        let page = http::request(
            warmdock.address(),
            "GET",
            page,
            &[("Authorization", "Bearer t-corp")],
            b"",
        )
        .text();
        assert!(page.contains("corp") && !page.contains("hidden"), "{page}");
    }
}

/// What one registry has is not found through another, whoever knows its checksum.
#[test]
fn a_checksum_opens_nothing() {
    let (private, public) = (Registry::start(), Registry::start());
    let file = private.publish_bytes("secret", "1.0.0", &[], noise(3000, 1));
    let warmdock = over(&private)
        .set(
            "/crates/registries",
            json!([
                { "name": "corp", "url": private.url() }, { "name": "open", "url": public.url() }
            ]),
        )
        .start();
    let target = |name: &str| format!("/crates/{name}/{}", file.path());
    assert_eq!(status(&warmdock, &target("corp"), None), 200);
    assert_eq!(status(&warmdock, &target("open"), None), 404);
}

#[test]
fn a_wrong_token_for_the_registry_says_what_to_do() {
    let registry = Registry::start();
    registry.require("up-secret");
    registry.publish("leaf", "1.0.0", &[], "");
    let warmdock = over(&registry).start();
    let response = http::get(warmdock.address(), "/crates/corp/le/af/leaf");
    assert_eq!(response.status, 502);
    assert!(
        response.text().contains("token_file"),
        "{}",
        response.text()
    );
}

/// A service over `registry` with this token for it.
fn with_token(registry: &Registry, folder: &Path, token: &str) -> Builder {
    let file = secret(folder, "up", token);
    over(registry).set("/crates/registries/0/token_file", file)
}

#[track_caller]
fn is_whole(warmdock: &Warmdock, file: &Published) {
    let target = format!("/crates/corp/{}", file.path());
    let response = http::get(warmdock.address(), &target);
    assert_eq!(response.status, 200, "{}", response.text());
    assert!(response.complete && response.body == file.bytes);
}

/// What came as `Authorization` with each request to this host.
fn tokens_at(host: &Registry) -> Vec<String> {
    let asked = host.asked();
    asked
        .iter()
        .map(|asked| asked.header("authorization").unwrap_or("none").to_owned())
        .collect()
}

/// The same crate at each of these hosts.
fn published_at(hosts: &[&Registry]) -> Published {
    let publish = |host: &&Registry| host.publish_bytes("big", "1.0.0", &[], noise(3000, 1));
    let published: Vec<_> = hosts.iter().map(publish).collect();
    published[0].clone()
}

/// The tokens of Gitea, Forgejo and Artifactory begin with their scheme, and cargo sends them as they are.
#[test]
fn a_token_with_its_scheme_is_sent_as_it_is() {
    let registry = Registry::start();
    registry.require("Bearer up-secret");
    let folder = crate::support::temporary_folder();
    let file = published_at(&[&registry]);
    let warmdock = with_token(&registry, folder.path(), "Bearer up-secret").start();
    assert_eq!(status(&warmdock, "/crates/corp/3/b/big", None), 200);
    is_whole(&warmdock, &file);
    for token in tokens_at(&registry) {
        assert_eq!(token, "Bearer up-secret");
    }
    let config = warmdock.config_file();
    let check = run(&["check", "--config", config.to_str().unwrap()]).ok();
    for text in [
        check.text(),
        check.stderr,
        warmdock.log(),
        warmdock.metrics(),
    ] {
        assert!(!text.contains("up-secret"), "{text}");
    }
}

#[test]
fn the_token_of_an_index_does_not_go_to_files_elsewhere() {
    let (registry, files) = (Registry::start(), Registry::start());
    registry.send_for_files(&files);
    let folder = crate::support::temporary_folder();
    let file = published_at(&[&registry, &files]);
    let warmdock = with_token(&registry, folder.path(), "up-secret").start();
    assert_eq!(status(&warmdock, "/crates/corp/3/b/big", None), 200);
    is_whole(&warmdock, &file);
    assert_eq!(tokens_at(&files), ["none"]);
    for asked in registry.asked() {
        assert_eq!(asked.header("authorization"), Some("up-secret"));
        assert!(asked.path.starts_with("/index/"), "{}", asked.path);
    }
}

/// As cargo does: `auth-required` is about files as well, wherever the registry has them.
#[test]
fn files_elsewhere_that_want_the_token_get_it() {
    let (registry, files) = (Registry::start(), Registry::start());
    for host in [&registry, &files] {
        host.require("up-secret");
    }
    registry.send_for_files(&files);
    let folder = crate::support::temporary_folder();
    let file = published_at(&[&registry, &files]);
    let warmdock = with_token(&registry, folder.path(), "up-secret").start();
    is_whole(&warmdock, &file);
    assert_eq!(tokens_at(&files), ["up-secret"]);
}

/// As registries send to signed addresses in the storage of their files; and that storage sends to a place of its own.
#[test]
fn redirects_to_another_host_go_without_the_token() {
    let (registry, files, storage) = (Registry::start(), Registry::start(), Registry::start());
    for host in [&registry, &files] {
        host.require("up-secret");
    }
    registry.send_for_files(&files);
    let folder = crate::support::temporary_folder();
    let file = published_at(&[&registry, &storage]);
    files.redirect(
        "/files/big/1.0.0",
        &storage.at("/signed?signature=up-signature"),
    );
    storage.redirect(
        "/signed",
        &storage.at("/files/big/1.0.0?signature=up-signature"),
    );
    let warmdock = with_token(&registry, folder.path(), "up-secret").start();
    is_whole(&warmdock, &file);
    assert_eq!(tokens_at(&files), ["up-secret"]);
    assert_eq!(tokens_at(&storage), ["none", "none"]);
    for asked in storage.asked() {
        assert_eq!(asked.query, "signature=up-signature");
    }
    for secret in ["up-secret", "up-signature"] {
        assert!(!warmdock.log().contains(secret));
    }
}

#[test]
fn hosts_that_redirect_to_each_other_without_end() {
    let (registry, storage) = (Registry::start(), Registry::start());
    let file = published_at(&[&registry]);
    registry.redirect("/files/big/1.0.0", &storage.at("/back"));
    storage.redirect("/back", &registry.at("/files/big/1.0.0"));
    let warmdock = over(&registry).start();
    let target = format!("/crates/corp/{}", file.path());
    assert_eq!(status(&warmdock, &target, None), 502);
}
